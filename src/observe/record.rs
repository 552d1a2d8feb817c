//! The lines of a run's log: one JSON object each. docs/run-log.md describes them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{DowntimeParts, EventKind, LatencySummary, PageCounts, RoundReport, Statistics, Status};

/// The version of the lines; a reader refuses others. Fields may be added without a new version.
pub const RUN_LOG_SCHEMA: u32 = 1;

/// Description of the run in a log's first line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunDescription {
    /// The program that migrates: a command's name, or the embedder's.
    pub command: String,
    /// `tcp`, `rdma`, ... as the transport reports it.
    pub transport: String,
    /// Why it was this one.
    pub why: String,
    /// Bytes of RAM that travel.
    pub ram_bytes: u64,
    /// Bytes of a page.
    pub page_bytes: u64,
    /// The configured settings, by name.
    pub settings: BTreeMap<String, Value>,
}

impl RunDescription {
    /// Adds a setting.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.settings.insert(name.into(), value.into());
        self
    }
}

/// One line. Times are milliseconds since the log began, sizes bytes, rates bytes or pages a second.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Record {
    /// The first.
    Run {
        /// [`RUN_LOG_SCHEMA`].
        schema: u32,
        /// Version of ramwire.
        ramwire: String,
        /// Milliseconds since 1970 when the log began.
        started_unix_ms: u64,
        /// The run.
        #[serde(flatten)]
        run: RunDescription,
    },
    /// The figures at one moment.
    Sample(Sample),
    /// A round that ended.
    Round {
        /// When it ended.
        at_ms: f64,
        /// Bytes to send when it began.
        remaining: u64,
        /// How long they would have taken at its rate; `None` if no bytes were sent in it.
        eta_ms: Option<f64>,
        /// Its figures.
        #[serde(flatten)]
        round: RoundReport,
    },
    /// A change of state.
    Event {
        /// When.
        at_ms: f64,
        /// Its name, as `active`.
        event: String,
        /// The reason, if there is one.
        why: Option<String>,
    },
    /// The last line. A file without it is truncated.
    End(Box<End>),
}

/// The figures at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// When.
    pub at_ms: f64,
    /// State of the migration.
    pub status: Status,
    /// The current round or the last one; 0 before the first is closed.
    pub round: u32,
    /// Bytes to be sent.
    pub remaining: u64,
    /// Bytes sent.
    pub transferred: u64,
    /// Bytes a second in the last window; 0 if nothing was sent since the previous sample.
    pub throughput: u64,
    /// Pages a second that the guest wrote.
    pub dirty_pages_rate: u64,
    /// How much the guest is throttled.
    pub throttle_percent: u8,
    /// Expected downtime if the guest were paused now; `None` before a rate is known.
    pub expected_downtime_ms: Option<f64>,
    /// How long the remaining bytes take at the last window's rate; `None` before there is one.
    pub eta_ms: Option<f64>,
    /// Pages sent so far.
    pub pages: PageCounts,
}

/// How it ended.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct End {
    /// When.
    pub at_ms: f64,
    /// `completed`, `failed`, `cancelled` or `in-doubt`.
    pub status: Status,
    /// Why.
    pub error: Option<String>,
    /// Of the migration.
    pub total_ms: f64,
    /// Part of it before the first sync.
    pub setup_ms: f64,
    /// Part of it while the guest was paused.
    pub downtime_ms: f64,
    /// What that was spent on.
    pub downtime_parts: DowntimeParts,
    /// Bytes sent.
    pub transferred: u64,
    /// Pages sent.
    pub pages: PageCounts,
    /// Rounds that were closed.
    pub rounds: u32,
    /// Bytes a second over all rounds.
    pub throughput: u64,
    /// Passing a batch to the transport.
    pub batch_latency: LatencySummary,
    /// Closing a round.
    pub fence_latency: LatencySummary,
    /// Writes to the peer's memory (RDMA).
    pub write_latency: LatencySummary,
}

/// Makes the lines of one run.
#[derive(Debug, Default)]
pub struct Recorder {
    page_bytes: u64,
    transferred: u64,
}

impl Recorder {
    /// The first line; `started` counts from 1970.
    pub fn run(&mut self, run: RunDescription, started: Duration) -> Record {
        self.page_bytes = run.page_bytes;
        Record::Run {
            schema: RUN_LOG_SCHEMA,
            ramwire: env!("CARGO_PKG_VERSION").into(),
            started_unix_ms: u64::try_from(started.as_millis()).unwrap_or(u64::MAX),
            run,
        }
    }

    /// The figures as they are at `at`.
    pub fn sample(&mut self, at: Duration, now: &Statistics) -> Record {
        let moves = now.transferred > std::mem::replace(&mut self.transferred, now.transferred);
        Record::Sample(Sample {
            at_ms: millis(at),
            status: now.status,
            round: now.round_count(),
            remaining: now.remaining,
            transferred: now.transferred,
            throughput: if moves { now.throughput } else { 0 },
            dirty_pages_rate: now.dirty_pages_rate,
            throttle_percent: now.throttle_percent,
            expected_downtime_ms: now.expected_downtime,
            eta_ms: now.eta_ms(),
            pages: now.pages,
        })
    }

    /// An event at `at`; `None` if the rounds report it in more detail.
    pub fn event(&self, at: Duration, kind: &EventKind) -> Option<Record> {
        let at_ms = millis(at);
        let (event, why) = match kind {
            EventKind::Round(round) => {
                let remaining = round.dirty_pages * self.page_bytes;
                let rate = Some(round.throughput).filter(|rate| *rate > 0);
                let eta_ms = rate.map(|rate| remaining as f64 / rate as f64 * 1e3);
                return Some(Record::Round { at_ms, remaining, eta_ms, round: *round });
            }
            EventKind::SyncBegins { .. } | EventKind::Synced { .. } | EventKind::CleanedUp => return None,
            EventKind::NotConverging(figures) => {
                return Some(Record::Event {
                    at_ms,
                    event: "not-converging".into(),
                    why: Some(figures.to_string()),
                });
            }
            EventKind::NotReplaceable { why } => ("not-replaceable", Some(why)),
            EventKind::Setup => ("setup", None),
            EventKind::Active => ("active", None),
            EventKind::Switchover => ("switchover", None),
            EventKind::PreSwitchover => ("pre-switchover", None),
            EventKind::GivenAway => ("given-away", None),
            EventKind::PostcopyActive => ("postcopy-active", None),
            EventKind::PostcopyPaused => ("postcopy-paused", None),
            EventKind::PostcopyRecover => ("postcopy-recover", None),
            EventKind::Completed => ("completed", None),
            EventKind::Failed { why } => ("failed", Some(why)),
            EventKind::Cancelled => ("cancelled", None),
            EventKind::InDoubt { why } => ("in-doubt", Some(why)),
        };
        Some(Record::Event { at_ms, event: event.into(), why: why.cloned() })
    }

    /// The last line.
    pub fn end(&self, at: Duration, last: &Statistics) -> Record {
        Record::End(Box::new(End {
            at_ms: millis(at),
            status: last.status,
            error: last.error.clone(),
            total_ms: last.total_time,
            setup_ms: last.setup_time,
            downtime_ms: last.downtime,
            downtime_parts: last.downtime_parts,
            transferred: last.transferred,
            pages: last.pages,
            rounds: last.round_count(),
            throughput: last.throughput,
            batch_latency: last.batch_latency,
            fence_latency: last.fence_latency,
            write_latency: last.write_latency,
        }))
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_line_is_read_as_it_was_written() {
        let mut recorder = Recorder::default();
        let run = RunDescription { page_bytes: 4096, ..RunDescription::default() }.with("downtime_ms", 300);
        let now = Statistics { remaining: 5000, throughput: 1000, transferred: 9, ..Statistics::default() };
        let round = RoundReport { round: 2, dirty_pages: 10, throughput: 4096, ..RoundReport::default() };
        let at = Duration::from_micros(1500);
        let records = [
            recorder.run(run, Duration::from_secs(1)),
            recorder.sample(at, &now),
            recorder.sample(at, &now),
            recorder.event(at, &EventKind::Round(round)).unwrap(),
            recorder.event(at, &EventKind::InDoubt { why: "\"silence\"\n".into() }).unwrap(),
            recorder.end(at, &now),
        ];
        for record in &records {
            let line = serde_json::to_string(record).unwrap();
            assert!(!line.contains('\n'), "{line}");
            assert_eq!(serde_json::from_str::<Record>(&line).unwrap(), *record, "{line}");
        }
        let [_, Record::Sample(first), Record::Sample(second), Record::Round { remaining, eta_ms, .. }, ..] =
            &records
        else {
            panic!("{records:?}");
        };
        assert_eq!((first.throughput, first.eta_ms, second.throughput), (1000, Some(5000.0), 0));
        assert_eq!((*remaining, *eta_ms), (40960, Some(10_000.0)));
    }
}
