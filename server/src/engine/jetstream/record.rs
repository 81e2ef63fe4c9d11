//! What stands in JetStream of one job: a record in one value, so that a change and its events are there together or not at all.
//!
//! A value has a limit, so a record holds the latest events alone. Earlier ones are in *pages*, each a value that is written once,
//! before the record that names it: a page that no record names is nothing.

use occy_proto::v1::{Job, JobEvent};
use prost::Message;

/// Bytes of events in a record. Beyond it they go to a page.
const EVENTS_MAX: usize = 64 * 1024;
/// Bytes of events in a page: with one event more, which has at most a message's piece, it fits into a value.
const PAGE_MAX: usize = 384 * 1024;
/// Pages of one job: more events than that has no job that comes to an end.
const PAGES_MAX: usize = 1024;

/// A job, as it is in its value.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Record {
    /// As the API has it, with its spec and its layers.
    #[prost(message, optional, tag = "1")]
    job: Option<Job>,
    /// Grows whenever the job gets or loses its owner.
    #[prost(uint64, tag = "2")]
    pub(super) epoch: u64,
    /// The latest events.
    #[prost(message, repeated, tag = "3")]
    events: Vec<JobEvent>,
    /// Where earlier ones are, in order.
    #[prost(message, repeated, tag = "4")]
    pages: Vec<Page>,
    /// The credentials of a job that has not ended, sealed.
    #[prost(bytes = "vec", optional, tag = "5")]
    pub(super) sealed: Option<Vec<u8>>,
    /// The `traceparent` of one that has not ended.
    #[prost(string, optional, tag = "6")]
    pub(super) trace: Option<String>,
    /// Under which name its idempotency key stands, if it has one.
    #[prost(string, optional, tag = "7")]
    pub(super) key: Option<String>,
    /// The name of the change that made it what it is, by which whoever made it knows that it did.
    #[prost(string, tag = "8")]
    pub(super) change: String,
}

/// Where some of a job's events are.
#[derive(Clone, PartialEq, Message)]
struct Page {
    /// The sequence of the last one there.
    #[prost(uint64, tag = "1")]
    last: u64,
    #[prost(string, tag = "2")]
    name: String,
}

/// Events, as they are in a page.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Events {
    #[prost(message, repeated, tag = "1")]
    pub(super) events: Vec<JobEvent>,
}

/// Where the events after a sequence are.
#[derive(Debug, PartialEq)]
pub(super) enum Place {
    /// Here they are. None: there are no more.
    Here(Vec<JobEvent>),
    /// The first of them are in the page of that name.
    Page(String),
}

/// A job has more events than are kept.
#[derive(Debug)]
pub(super) struct TooMany;

impl Record {
    pub(super) fn new(job: Job) -> Self {
        Self { job: Some(job), ..Self::default() }
    }

    pub(super) fn job(&self) -> Job {
        self.job.clone().unwrap_or_default()
    }

    /// The job has become another, with these events. Gives the pages that have to be there before the record is, by name.
    pub(super) fn become_of(
        &mut self,
        job: Job,
        events: Vec<JobEvent>,
        mut name: impl FnMut() -> String,
    ) -> Result<Vec<(String, Events)>, TooMany> {
        self.job = Some(job);
        self.events.extend(events);
        let mut bytes: usize = self.events.iter().map(Message::encoded_len).sum();
        let mut pages = Vec::new();
        while bytes > EVENTS_MAX {
            let mut page_bytes = 0;
            let count = self.events.iter().take_while(|event| {
                let fits = page_bytes < PAGE_MAX;
                page_bytes += if fits { event.encoded_len() } else { 0 };
                fits
            });
            let count = count.count();
            let events: Vec<_> = self.events.drain(..count).collect();
            bytes -= page_bytes;
            let page = Page { last: events.last().map_or(0, |event| event.sequence), name: name() };
            pages.push((page.name.clone(), Events { events }));
            self.pages.push(page);
        }
        if self.pages.len() > PAGES_MAX { Err(TooMany) } else { Ok(pages) }
    }

    /// Where the events after a sequence are.
    pub(super) fn after(&self, after: u64) -> Place {
        match self.pages.iter().find(|page| page.last > after) {
            Some(page) => Place::Page(page.name.clone()),
            None => Place::Here(since(&self.events, after)),
        }
    }
}

/// Those of the events that come after a sequence.
pub(super) fn since(events: &[JobEvent], after: u64) -> Vec<JobEvent> {
    events.iter().filter(|event| event.sequence > after).cloned().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use occy_proto::v1::FilterOutput;
    use occy_proto::v1::job_event;
    use proptest::prelude::*;

    use super::*;

    fn event(sequence: u64, bytes: usize) -> JobEvent {
        let output = FilterOutput { text: "x".repeat(bytes), ..FilterOutput::default() };
        JobEvent { sequence, time: None, event: Some(job_event::Event::FilterOutput(output)) }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// However many events come at once and however large, each is found once, and no value has more bytes than it may.
        #[test]
        fn every_event_is_found_in_order_and_no_value_is_too_large(
            changes in prop::collection::vec(prop::collection::vec(0_usize..260_000, 0..6), 0..12)
        ) {
            let (mut record, mut pages, mut sequence) = (Record::new(Job::default()), HashMap::new(), 0);
            let mut names = 0;
            for change in changes {
                let events = change.into_iter().map(|bytes| { sequence += 1; event(sequence, bytes) });
                let events = events.collect();
                let name = || { names += 1; names.to_string() };
                for (name, page) in record.become_of(Job::default(), events, name).unwrap() {
                    prop_assert!(page.encoded_len() < 700_000);
                    pages.insert(name, page);
                }
                prop_assert!(record.encoded_len() < EVENTS_MAX + 64 * 1024);
            }
            let mut found = Vec::new();
            loop {
                let after = found.last().copied().unwrap_or(0);
                let events = match record.after(after) {
                    Place::Here(events) => events,
                    Place::Page(name) => since(&pages[&name].events, after),
                };
                if events.is_empty() {
                    break;
                }
                found.extend(events.iter().map(|event| event.sequence));
            }
            prop_assert_eq!(found, (1..=sequence).collect::<Vec<_>>());
        }
    }
}
