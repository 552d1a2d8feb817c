//! Numbers about a migration: counters, rounds, latencies. Counting costs the page path nothing but adds.

mod latency;
mod statistics;

pub use latency::{Latency, LatencySummary};
pub use statistics::{
    DeltaCounts, DowntimeParts, PageCounts, RoundReport, SharedStatistics, Statistics, Status,
};
