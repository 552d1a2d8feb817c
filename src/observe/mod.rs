//! Numbers about a migration: counters, rounds, latencies. Counting costs the page path nothing but adds.

mod callback;
mod event_queue;
mod events;
mod latency;
mod lost;
mod page_waits;
mod query_migrate;
mod record;
mod statistics;

pub(crate) use callback::{Caught, caught, named};
pub use event_queue::Events;
pub use events::{Event, EventKind, NotConverging, SharedStatistics};
pub use latency::{Latency, LatencySummary};
pub use lost::{LostConnection, LostConnections};
pub(crate) use page_waits::nanos;
pub use page_waits::{PageWaits, VcpuWaits, WAIT_INTERVALS, WaitSum};
pub use record::{End, RUN_LOG_SCHEMA, Record, Recorder, RunDescription, Sample};
pub use statistics::{
    DeltaCounts, DeltaRates, DowntimeParts, PageCounts, PassedMemory, RoundReport, SkippedPages,
    SpliceCounts, Statistics, Status, ZeroCopyCounts,
};
