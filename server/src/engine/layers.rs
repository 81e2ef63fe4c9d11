//! Whose turn it is to do a layer that jobs of several coordinators want, and what came of earlier turns.
//!
//! Pure: what stands of a layer, what that means for a job that wants it, and how a turn changes it. Where it stands, and that of two who
//! change it at once one is refused, is each engine's.
//!
//! A turn is its holder's claim of its job, and holds for as long as that claim does: nobody has to give it back who cannot any more.
//! Turns of those who may not share with each other stand side by side.

use prost::Message;

use super::Claim;
use crate::schedule::Tenant;

/// Turns and results that may stand of one layer: with results of at most some 32 KiB each, that fits into a value.
const ENTRIES_MAX: usize = 8;

/// A job that wants a layer, and with whom it may share one: with its tenant, and with whoever has read of the layer in the same place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sharer {
    /// The right to the job.
    pub claim: Claim,
    /// The coordinator that runs it.
    pub coordinator: String,
    /// Whose it is.
    pub tenant: Tenant,
    /// Where its source is. None: where nobody else has read it.
    pub source: Option<String>,
}

/// What stands of a layer, for one who wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerTurn {
    /// Nobody is at work.
    Free,
    /// Another job is.
    Held(Claim),
    /// It was done.
    Done(LayerResult),
    /// So many others are at work, none of which may share it with this one, that no turn more can be written down.
    Crowded,
}

/// What came of a turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerResult {
    /// The coordinator that had it done.
    pub coordinator: String,
    /// What others have to know of it.
    pub record: String,
}

/// A layer, as it was seen.
#[derive(Clone, Debug)]
pub struct SeenLayer {
    /// Which.
    pub(super) layer: String,
    /// What stood there, without turns that do not hold any more.
    pub(super) record: LayerRecord,
    /// The revision of what stood there.
    pub(super) revision: u64,
    /// What that means for the one who looked.
    pub turn: LayerTurn,
}

/// What stands of a layer.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct LayerRecord {
    /// The latest last.
    #[prost(message, repeated, tag = "1")]
    entries: Vec<Entry>,
    /// Who has given a turn back, if that was the last thing that happened.
    #[prost(message, optional, tag = "2")]
    given_back: Option<GivenBack>,
}

/// A turn that has ended with nothing that others can use.
#[derive(Clone, PartialEq, Message)]
struct GivenBack {
    #[prost(string, tag = "1")]
    job: String,
    #[prost(uint64, tag = "2")]
    epoch: u64,
}

/// A turn, and what came of it.
#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(string, tag = "1")]
    tenant: String,
    #[prost(string, optional, tag = "2")]
    source: Option<String>,
    #[prost(string, tag = "3")]
    coordinator: String,
    #[prost(string, tag = "4")]
    job: String,
    #[prost(uint64, tag = "5")]
    epoch: u64,
    /// None: it has not ended.
    #[prost(string, optional, tag = "6")]
    result: Option<String>,
}

impl Entry {
    fn new(who: &Sharer, result: Option<String>) -> Self {
        Self {
            tenant: who.tenant.to_string(),
            source: who.source.clone(),
            coordinator: who.coordinator.clone(),
            job: who.claim.id.clone(),
            epoch: who.claim.epoch,
            result,
        }
    }

    fn may_share(&self, who: &Sharer) -> bool {
        *self.tenant == *who.tenant || (self.source.is_some() && self.source == who.source)
    }

    /// Whether it is a turn of that claim, and has not ended.
    fn is_held_by(&self, claim: &Claim) -> bool {
        self.result.is_none() && self.job == claim.id && self.epoch == claim.epoch
    }

    fn claim(&self) -> Claim {
        Claim { id: self.job.clone(), epoch: self.epoch }
    }
}

impl LayerRecord {
    /// Whose turns have not ended.
    pub(crate) fn holders(&self) -> Vec<Claim> {
        self.entries.iter().filter(|entry| entry.result.is_none()).map(Entry::claim).collect()
    }

    /// These claims do not hold any more, and neither do their turns.
    pub(super) fn forget(&mut self, gone: &[Claim]) {
        self.entries.retain(|entry| !gone.iter().any(|claim| entry.is_held_by(claim)));
    }

    /// What that means for one who wants the layer. Its own turn is no obstacle.
    pub(super) fn turn(&self, who: &Sharer) -> LayerTurn {
        let shared = || self.entries.iter().rev().filter(|entry| entry.may_share(who));
        let done = shared().find_map(|entry| {
            let (coordinator, record) = (entry.coordinator.clone(), entry.result.clone()?);
            Some(LayerResult { coordinator, record })
        });
        if let Some(done) = done {
            return LayerTurn::Done(done);
        }
        if let Some(held) = shared().find(|entry| !entry.is_held_by(&who.claim)) {
            return LayerTurn::Held(held.claim());
        }
        let others = self.entries.iter().filter(|entry| entry.result.is_none() && !entry.may_share(who));
        if others.count() < ENTRIES_MAX { LayerTurn::Free } else { LayerTurn::Crowded }
    }

    /// What is known from earlier turns is of no use to somebody, whose turn it is now. False: it is another's that has not ended.
    pub(super) fn begin(&mut self, who: &Sharer) -> bool {
        self.given_back = None;
        self.entries.retain(|entry| {
            let is_useless = entry.result.is_some() && entry.may_share(who);
            !is_useless && !entry.is_held_by(&who.claim)
        });
        let is_free = self.entries.iter().all(|entry| !entry.may_share(who));
        if is_free {
            self.add(Entry::new(who, None));
        }
        is_free
    }

    /// Somebody's turn has ended, or he has done the layer without one. None: with nothing that others can use.
    pub(super) fn end(&mut self, who: &Sharer, result: Option<String>) {
        let Claim { id: job, epoch } = who.claim.clone();
        self.given_back = result.is_none().then_some(GivenBack { job, epoch });
        self.entries.retain(|entry| {
            let is_replaced = entry.result.is_some() && result.is_some() && entry.may_share(who);
            !entry.is_held_by(&who.claim) && !is_replaced
        });
        if result.is_some() {
            self.add(Entry::new(who, result));
        }
    }

    /// Adds an entry, in the place of an earlier result if there has to be one: a turn that has not ended stays.
    fn add(&mut self, entry: Entry) {
        self.entries.push(entry);
        let result = self.entries.iter().position(|entry| entry.result.is_some());
        if let Some(earliest) = result.filter(|_| self.entries.len() > ENTRIES_MAX) {
            self.entries.remove(earliest);
        }
    }

    /// Whether something came of that turn, or it was given back.
    #[cfg(test)]
    pub(crate) fn was_ended_by(&self, claim: &Claim) -> bool {
        let is_given_back =
            self.given_back.as_ref().is_some_and(|back| (&back.job, back.epoch) == (&claim.id, claim.epoch));
        is_given_back || self.entries.iter().any(|entry| entry.result.is_some() && entry.claim() == *claim)
    }

    /// The first two, if there are any, who have a turn at once and may share the layer.
    #[cfg(test)]
    pub(crate) fn at_once(&self) -> Option<(Claim, Claim)> {
        let held = || self.entries.iter().filter(|entry| entry.result.is_none());
        held().enumerate().find_map(|(place, one)| {
            let shares = |other: &&Entry| {
                one.tenant == other.tenant || (one.source.is_some() && one.source == other.source)
            };
            Some((one.claim(), held().skip(place + 1).find(shares)?.claim()))
        })
    }
}

impl SeenLayer {
    pub(super) fn new(layer: &str, record: LayerRecord, revision: u64, who: &Sharer) -> Self {
        let turn = record.turn(who);
        Self { layer: layer.to_owned(), record, revision, turn }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(job: &str, tenant: &str, source: Option<&str>) -> Sharer {
        Sharer {
            claim: Claim { id: job.to_owned(), epoch: 1 },
            coordinator: "here".to_owned(),
            tenant: tenant.into(),
            source: source.map(str::to_owned),
        }
    }

    fn result(record: &str) -> LayerTurn {
        LayerTurn::Done(LayerResult { coordinator: "here".to_owned(), record: record.to_owned() })
    }

    #[test]
    fn another_tenant_shares_only_what_both_have_read_of_in_the_same_place() {
        let mut layer = LayerRecord::default();
        let one = who("a", "one", Some("r.io/a"));
        assert!(layer.begin(&one));
        for (other, is_shared) in [
            (who("b", "one", Some("r.io/b")), true),
            (who("c", "two", Some("r.io/a")), true),
            (who("d", "two", Some("r.io/b")), false),
            (who("e", "two", None), false),
        ] {
            let expected = if is_shared { LayerTurn::Held(one.claim.clone()) } else { LayerTurn::Free };
            assert_eq!(layer.turn(&other), expected, "{other:?}");
        }
        // Without a place, as of images that were sent here, it is the tenant's alone.
        let mut layer = LayerRecord::default();
        assert!(layer.begin(&who("a", "one", None)));
        assert_eq!(layer.turn(&who("b", "two", None)), LayerTurn::Free);
    }

    #[test]
    fn what_came_of_a_turn_is_there_for_all_and_goes_when_somebody_cannot_use_it() {
        let mut layer = LayerRecord::default();
        let (one, other) = (who("a", "one", Some("r.io/a")), who("b", "one", None));
        assert!(layer.begin(&one));
        assert_eq!(layer.turn(&one), LayerTurn::Free, "its own turn is no obstacle");
        layer.end(&one, Some("made".to_owned()));
        assert_eq!((layer.turn(&other), layer.holders().len()), (result("made"), 0));
        assert!(layer.begin(&other));
        assert_eq!(layer.turn(&one), LayerTurn::Held(other.claim.clone()));
        // Who has waited for too long does it beside the other, and what is there first is taken.
        layer.end(&one, Some("beside".to_owned()));
        let third = who("c", "one", None);
        assert_eq!(layer.turn(&third), result("beside"));
        // Who cannot use it waits for the one who is at work.
        let mut useless = layer.clone();
        assert!(!useless.begin(&third));
        assert_eq!(useless.turn(&third), LayerTurn::Held(other.claim.clone()));
        layer.end(&other, None);
        assert_eq!((layer.turn(&other), layer.holders().len()), (result("beside"), 0));
    }

    #[test]
    fn a_holder_that_is_gone_has_no_turn() {
        let mut layer = LayerRecord::default();
        let one = who("a", "one", None);
        assert!(layer.begin(&one));
        let later = Sharer { claim: Claim { epoch: 2, ..one.claim.clone() }, ..one.clone() };
        assert_eq!(
            layer.turn(&later),
            LayerTurn::Held(one.claim.clone()),
            "an earlier attempt's is not its own"
        );
        layer.forget(std::slice::from_ref(&later.claim));
        assert_eq!(layer.holders(), std::slice::from_ref(&one.claim));
        layer.forget(std::slice::from_ref(&one.claim));
        assert_eq!(layer.turn(&later), LayerTurn::Free);
    }

    #[test]
    fn no_turn_is_lost_for_another_and_little_stands_of_a_layer() {
        let mut layer = LayerRecord::default();
        let one = |number| who(&format!("job {number}"), &format!("tenant {number}"), None);
        let tenants: Vec<_> = (0..20).map(one).collect();
        for one in &tenants {
            layer.end(one, Some("made".to_owned()));
        }
        assert_eq!(layer.entries.len(), ENTRIES_MAX);
        for one in &tenants[..ENTRIES_MAX] {
            assert!(matches!(layer.turn(one), LayerTurn::Free), "results make room");
            assert!(layer.begin(one));
        }
        let crowded = &tenants[ENTRIES_MAX];
        assert_eq!(layer.turn(crowded), LayerTurn::Crowded);
        layer.end(crowded, Some("made".to_owned()));
        assert_eq!((layer.holders().len(), layer.entries.len()), (ENTRIES_MAX, ENTRIES_MAX));
    }
}
