//! One job at a time makes its image visible at a destination: registries put what they are told last, whoever says it.
//!
//! A lock is the claim of its holder, and holds for as long as that claim does. So nothing has to expire: the lock of a coordinator that
//! died goes with its jobs, when another one has found them without an owner.

use std::time::Duration;

use super::connect::bucket;
use super::{JetStream, JetStreamError, hash, patiently};
use crate::engine::Claim;

/// How often one who waits looks whether the holder still holds, beside hearing of what happens to its job.
const POLL: Duration = Duration::from_millis(250);

impl JetStream {
    /// Waits for the lock of a place. False: the claim does not hold any more.
    pub(super) async fn lock_place(&self, claim: &Claim, place: &str) -> Result<bool, JetStreamError> {
        let (subject, own) = (subject(place), written(claim));
        loop {
            if !self.holds_now(claim).await? {
                return Ok(false);
            }
            let (revision, holder) = match self.value(&subject).await? {
                Some((_, value)) if value == own.as_bytes() => return Ok(true),
                Some((revision, value)) => (revision, read(&value)),
                None => (0, None),
            };
            if let Some(holder) = holder {
                let mut changed = self.0.index.subscribers.subscribe(&holder.id);
                if self.holds_now(&holder).await? {
                    // Whichever comes first, it is only a reason to look again.
                    let _ = tokio::time::timeout(POLL, changed.changed()).await;
                    continue;
                }
            }
            // Whether it was this claim's write that came first is seen by reading it.
            patiently("lock a destination", || self.put_if(&subject, own.clone(), revision)).await?;
        }
    }

    /// Gives the lock back, if it still is this claim's.
    pub(super) async fn unlock_place(&self, claim: &Claim, place: &str) -> Result<(), JetStreamError> {
        let subject = subject(place);
        if let Some((revision, value)) = self.value(&subject).await?
            && value == written(claim).as_bytes()
        {
            // What was written there since is another's.
            self.purge(&subject, Some(revision)).await;
        }
        Ok(())
    }
}

fn subject(place: &str) -> String {
    bucket("locks") + &hash(&[place])
}

fn written(claim: &Claim) -> String {
    format!("{} {}", claim.id, claim.epoch)
}

/// None: nobody's.
fn read(value: &[u8]) -> Option<Claim> {
    let (id, epoch) = std::str::from_utf8(value).ok()?.split_once(' ')?;
    Some(Claim { id: id.to_owned(), epoch: epoch.parse().ok()? })
}
