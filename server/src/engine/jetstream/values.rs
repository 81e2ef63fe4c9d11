//! The little of JetStream that the engine is made of: values with revisions, each of which can be written under the condition that
//! nobody else has; behind a trait, so that what is done with them can be tried without a server, in a time of its own.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt::Debug;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull};
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream};
use async_nats::jetstream::{ErrorCode, Message};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::{oneshot, watch};
use tokio::time::sleep;

use super::connect::{Buckets, bucket};
use super::index::{Entry, Index};

/// How long one request for changed records is open. Half of that is between two signs of life, and after some that did not come
/// whoever follows begins anew: where the server that sends them is gone, and ours is another one, nothing else tells.
const FOLLOWED: Duration = Duration::from_secs(2);
/// How long what is left of a list of values stays that failed.
const HEADS: Duration = Duration::from_secs(10);
/// Values that are listed at once.
const HEADS_AT_ONCE: usize = 500;

/// The values, by subject. What fails may have been done all the same: its answer was lost.
#[async_trait::async_trait]
pub(super) trait Values: Debug + Send + Sync {
    /// The value at a subject, and its revision.
    async fn last(&self, subject: &str) -> Result<Option<(u64, Bytes)>, String>;

    /// Writes a value, and gives its revision.
    async fn write(&self, subject: &str, value: Value) -> Result<u64, WriteError>;

    /// Removes the values of a subject, or pattern of subjects; all of them, or those up to a revision.
    async fn purge(&self, subject: &str, up_to: Option<u64>) -> Result<(), String>;

    /// The subjects of that pattern which have a value.
    async fn subjects(&self, pattern: &str) -> Result<BTreeSet<String>, String>;

    /// The headers of the values that subjects of that pattern have.
    async fn heads(&self, pattern: &str) -> Result<Vec<HeaderMap>, String>;

    /// Keeps the index as the records of jobs are, for ever. `known` hears when it has all that there were.
    async fn follow(&self, index: &Index, known: oneshot::Sender<()>);
}

/// A value to be written.
#[derive(Debug)]
pub(super) struct Value {
    pub(super) headers: Option<HeaderMap>,
    pub(super) payload: Bytes,
    /// The revision that the subject must have; 0: it must have no value. None: whatever it has.
    pub(super) after: Option<u64>,
}

impl Value {
    pub(super) fn anyway(payload: Bytes) -> Self {
        Self { headers: None, payload, after: None }
    }

    pub(super) fn after(revision: u64, payload: Bytes) -> Self {
        Self { after: Some(revision), ..Self::anyway(payload) }
    }
}

/// Why a value was not written.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    /// The subject has another revision.
    #[error("another has written there")]
    Conflict,
    /// It does not fit.
    #[error("it has more bytes than a value may have")]
    TooLarge,
    /// It may have been written, or not.
    #[error("{0}")]
    Unanswered(String),
}

impl Buckets {
    fn stream(&self, subject: &str) -> &Stream {
        let Self { jobs, parts, keys, leases, locks, layers, schedules, quotas, .. } = self;
        let all = [
            ("jobs", jobs),
            ("parts", parts),
            ("keys", keys),
            ("leases", leases),
            ("locks", locks),
            ("layers", layers),
            ("schedules", schedules),
            ("quotas", quotas),
        ];
        let its = all.into_iter().find(|(name, _)| subject.starts_with(&bucket(name)));
        its.expect("every subject is in a bucket").1
    }
}

#[async_trait::async_trait]
impl Values for Buckets {
    async fn last(&self, subject: &str) -> Result<Option<(u64, Bytes)>, String> {
        match self.stream(subject).get_last_raw_message_by_subject(subject).await {
            Ok(message) => Ok(Some((message.sequence, message.payload))),
            Err(error) => match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => Ok(None),
                LastRawMessageErrorKind::JetStream(error)
                    if error.error_code() == ErrorCode::NO_MESSAGE_FOUND =>
                {
                    Ok(None)
                }
                _ => Err(error.to_string()),
            },
        }
    }

    async fn write(&self, subject: &str, value: Value) -> Result<u64, WriteError> {
        let Value { headers, payload, after } = value;
        let mut message = PublishMessage::build().payload(payload);
        if let Some(headers) = headers {
            message = message.headers(headers);
        }
        if let Some(revision) = after {
            message = message.expected_last_subject_sequence(revision);
        }
        let written = async { self.context.send_publish(subject.to_owned(), message).await?.await };
        match written.await {
            Ok(written) => Ok(written.sequence),
            Err(error) => Err(match error.kind() {
                PublishErrorKind::WrongLastSequence => WriteError::Conflict,
                PublishErrorKind::MaxPayloadExceeded => WriteError::TooLarge,
                _ => WriteError::Unanswered(error.to_string()),
            }),
        }
    }

    async fn purge(&self, subject: &str, up_to: Option<u64>) -> Result<(), String> {
        let purge = self.stream(subject).purge();
        let purged = match up_to {
            Some(revision) => purge.sequence(revision + 1).filter(subject).await,
            None => purge.filter(subject).await,
        };
        purged.map(drop).map_err(|error| error.to_string())
    }

    async fn subjects(&self, pattern: &str) -> Result<BTreeSet<String>, String> {
        let subjects = self.stream(pattern).info_with_subjects(pattern).await;
        let subjects = subjects.map_err(|error| error.to_string())?;
        subjects.map_ok(|(subject, _)| subject).try_collect().await.map_err(|error| error.to_string())
    }

    async fn heads(&self, pattern: &str) -> Result<Vec<HeaderMap>, String> {
        let stream = self.stream(pattern);
        let config = pull::Config {
            filter_subject: pattern.to_owned(),
            headers_only: true,
            deliver_policy: DeliverPolicy::LastPerSubject,
            ack_policy: AckPolicy::None,
            // It is removed below, and goes by itself where that fails.
            inactive_threshold: HEADS,
            memory_storage: true,
            num_replicas: 1,
            ..pull::Config::default()
        };
        let consumer = stream.create_consumer(config).await.map_err(|error| error.to_string())?;
        let wanted = usize::try_from(consumer.cached_info().num_pending).unwrap_or(usize::MAX);
        let heads = heads(&consumer, wanted).await;
        if let Err(error) = stream.delete_consumer(&consumer.cached_info().name).await {
            tracing::debug!(%error, "a consumer could not be removed");
        }
        heads
    }

    async fn follow(&self, index: &Index, known: oneshot::Sender<()>) {
        follow(&self.jobs, self.connections.clone(), index, known).await;
    }
}

/// The headers of so many messages at most, as many as there are.
async fn heads(consumer: &PullConsumer, wanted: usize) -> Result<Vec<HeaderMap>, String> {
    let mut heads = Vec::new();
    while heads.len() < wanted {
        let batch = consumer.fetch().max_messages((wanted - heads.len()).min(HEADS_AT_ONCE));
        let mut messages = batch.messages().await.map_err(|error| error.to_string())?;
        let before = heads.len();
        while let Some(message) = messages.next().await {
            heads.push(message.map_err(|error| error.to_string())?.headers.clone().unwrap_or_default());
        }
        if heads.len() == before {
            // Some have gone meanwhile.
            break;
        }
    }
    Ok(heads)
}

/// Keeps the index as the records are. `known` hears when it has all that there were.
async fn follow(
    jobs: &Stream,
    mut connections: watch::Receiver<u64>,
    index: &Index,
    known: oneshot::Sender<()>,
) {
    let mut known = Some(known);
    loop {
        connections.mark_unchanged();
        let cause = tokio::select! {
            Err(cause) = follow_once(jobs, index, &mut known) => cause,
            // What changed while there was none is not sent again; the consumer itself would find that out later.
            _ = connections.changed() => continue,
        };
        tracing::warn!(cause, "jobs cannot be followed in JetStream; trying again");
        sleep(Duration::from_secs(1)).await;
    }
}

async fn follow_once(
    jobs: &Stream,
    index: &Index,
    known: &mut Option<oneshot::Sender<()>>,
) -> Result<Infallible, String> {
    let config = pull::OrderedConfig {
        filter_subject: format!("{}>", bucket("jobs")),
        headers_only: true,
        deliver_policy: DeliverPolicy::LastPerSubject,
        max_expires: FOLLOWED,
        ..pull::OrderedConfig::default()
    };
    let consumer = jobs.create_consumer(config).await.map_err(|error| error.to_string())?;
    let mut is_known = consumer.cached_info().num_pending == 0;
    let mut messages = consumer.messages().await.map_err(|error| error.to_string())?;
    loop {
        if is_known && let Some(known) = known.take() {
            // Nobody who waits is gone before that.
            let _ = known.send(());
        }
        let Some(message) = messages.next().await else { return Err("the consumer has ended".to_owned()) };
        let message: Message = message.map_err(|error| error.to_string())?;
        let info = message.info().map_err(|error| error.to_string())?;
        is_known |= info.pending == 0;
        let headers = message.headers.clone().unwrap_or_default();
        if let (Some(id), Some(entry)) =
            (message.subject.strip_prefix(&bucket("jobs")), Entry::read(&headers, info.stream_sequence))
        {
            index.put(id, entry);
        }
    }
}
