//! The figures of a migration, with the meanings QEMU's `query-migrate` gives them.

use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use serde_json::{Value, json};

use super::LatencySummary;

/// Where a migration stands, in QEMU's words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Not begun.
    #[default]
    None,
    /// Greeting the peer.
    Setup,
    /// Rounds while the guest runs.
    Active,
    /// The guest is paused.
    Device,
    /// The guest runs at the destination.
    Completed,
    /// Ended before COMMIT by an error; the guest runs at the source.
    Failed,
    /// Ended before COMMIT by request; the guest runs at the source.
    Cancelled,
    /// COMMIT was sent and RUNNING not heard.
    InDoubt,
}

/// Pages by what they travelled as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PageCounts {
    /// Whole pages.
    pub normal: u64,
    /// Zero pages.
    pub zero: u64,
    /// Pages as a difference to what the destination had (XBZRLE).
    pub delta: u64,
}

/// What deltas did, with the meanings `query-migrate` gives its `xbzrle-cache`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeltaCounts {
    /// Bytes of the cache; 0: there is none.
    pub cache_size: u64,
    /// Pages sent as deltas.
    pub pages: u64,
    /// Bytes they took, with their headers.
    pub bytes: u64,
    /// Pages that were dirty and had not changed: nothing was sent.
    pub unchanged: u64,
    /// Pages that were not in the cache.
    pub cache_misses: u64,
    /// Pages that differ too much.
    pub overflows: u64,
}

/// Where the downtime went, in milliseconds. The parts add up to the whole but for rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct DowntimeParts {
    /// Until the guest stood still.
    pub pause_ms: f64,
    /// The last merge of the dirty logs.
    pub sync_ms: f64,
    /// The last round of pages.
    pub pages_ms: f64,
    /// Saving and sending the device state.
    pub state_ms: f64,
    /// Making and sending the digest.
    pub digest_ms: f64,
    /// Until the peer was ready.
    pub ready_ms: f64,
    /// From COMMIT to RUNNING.
    pub handover_ms: f64,
}

impl DowntimeParts {
    /// All parts together.
    pub fn total_ms(&self) -> f64 {
        self.pause_ms
            + self.sync_ms
            + self.pages_ms
            + self.state_ms
            + self.digest_ms
            + self.ready_ms
            + self.handover_ms
    }
}

/// One round of the page loop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct RoundReport {
    /// 1 for the first.
    pub round: u32,
    /// Pages dirty when it began.
    pub dirty_pages: u64,
    /// What was sent.
    pub pages: PageCounts,
    /// Bytes that left.
    pub bytes: u64,
    /// How long it took, in milliseconds.
    pub took_ms: f64,
}

/// One consistent snapshot of a migration's figures. Times are milliseconds, sizes bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Statistics {
    /// Where it stands.
    pub status: Status,
    /// Bytes written to the peer: headers, pages and device state.
    pub transferred: u64,
    /// Of them, while the guest ran.
    pub precopy_bytes: u64,
    /// Of them, while it stood still.
    pub downtime_bytes: u64,
    /// Of all bytes, those on page channels beside the stream.
    pub multifd_bytes: u64,
    /// Dirty pages times the page size; 0 once completed.
    pub remaining: u64,
    /// Used lengths of all blocks that travel.
    pub total: u64,
    /// Pages by kind.
    pub pages: PageCounts,
    /// Bytes of one target page.
    pub page_size: u64,
    /// Merges of the dirty logs.
    pub dirty_sync_count: u64,
    /// Pages a second that the guest wrote between the last two merges.
    pub dirty_pages_rate: u64,
    /// Bytes a second on the page path: the last window, overall once completed.
    pub throughput: u64,
    /// Time since the start.
    pub total_time: f64,
    /// Until the first sync.
    pub setup_time: f64,
    /// From asking for the pause until the peer runs.
    pub downtime: f64,
    /// What the downtime would be now.
    pub expected_downtime: f64,
    /// Where the downtime went.
    pub downtime_parts: DowntimeParts,
    /// The last [`MOST_ROUNDS`](Self::MOST_ROUNDS) rounds; their numbers count from 1.
    pub rounds: Vec<RoundReport>,
    /// What deltas did.
    pub deltas: DeltaCounts,
    /// How long handing a batch to the transport took.
    pub batch_latency: LatencySummary,
    /// How long closing a round took.
    pub fence_latency: LatencySummary,
    /// How long a write to the peer's memory took from its post to its completion (RDMA); counted when a round closes.
    /// Queued writes wait for each other, so this is no round trip.
    pub write_latency: LatencySummary,
    /// Why it failed.
    pub error: Option<String>,
}

impl Statistics {
    /// Rounds that are kept: a guest that never converges must not fill memory with reports.
    pub const MOST_ROUNDS: usize = 1024;

    /// Adds a round, and forgets the oldest where there are too many.
    pub fn push_round(&mut self, round: RoundReport) {
        if self.rounds.len() >= Self::MOST_ROUNDS {
            self.rounds.remove(0);
        }
        self.rounds.push(round);
    }

    /// Rounds that were closed so far, the forgotten ones included.
    pub fn round_count(&self) -> u32 {
        self.rounds.last().map_or(0, |round| round.round)
    }

    /// `xbzrle-cache`: rates over the whole migration.
    fn xbzrle(&self) -> Value {
        let DeltaCounts { cache_size, pages, bytes, cache_misses, overflows, .. } = self.deltas;
        let looked_up = cache_misses + pages + overflows + self.deltas.unchanged;
        let rate = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        json!({
            "cache-size": cache_size,
            "pages": pages,
            "bytes": bytes,
            "cache-miss": cache_misses,
            "cache-miss-rate": rate(cache_misses, looked_up),
            "encoding-rate": rate(pages * self.page_size, bytes),
            "overflow": overflows,
        })
    }

    /// The same figures in the shape of QEMU's `query-migrate`.
    pub fn query_migrate(&self) -> Value {
        let mut out = json!({
            "status": self.status,
            "total-time": self.total_time as u64,
            "setup-time": self.setup_time as u64,
            "ram": {
                "transferred": self.transferred,
                "remaining": self.remaining,
                "total": self.total,
                "duplicate": self.pages.zero,
                "normal": self.pages.normal,
                "normal-bytes": self.pages.normal * self.page_size,
                "dirty-pages-rate": self.dirty_pages_rate,
                "mbps": self.throughput as f64 * 8.0 / 1e6,
                "dirty-sync-count": self.dirty_sync_count,
                "page-size": self.page_size,
                "pages-per-second": self.throughput.checked_div(self.page_size).unwrap_or(0),
                "precopy-bytes": self.precopy_bytes,
                "downtime-bytes": self.downtime_bytes,
                "postcopy-bytes": 0,
                "postcopy-requests": 0,
                "multifd-bytes": self.multifd_bytes,
            },
        });
        if self.deltas.cache_size > 0 {
            out["xbzrle-cache"] = self.xbzrle();
        }
        let ended = matches!(self.status, Status::Completed | Status::InDoubt);
        let (name, value) =
            if ended { ("downtime", self.downtime) } else { ("expected-downtime", self.expected_downtime) };
        out[name] = json!(value as u64);
        if let Some(error) = &self.error {
            out["error-desc"] = json!(error);
        }
        out
    }
}

/// The figures as the migration's threads write and anybody reads them.
#[derive(Clone, Debug, Default)]
pub struct SharedStatistics(Arc<Mutex<Statistics>>);

impl SharedStatistics {
    /// Changes the figures; once a slice, never per page.
    pub fn update(&self, change: impl FnOnce(&mut Statistics)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A consistent copy.
    pub fn snapshot(&self) -> Statistics {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_counted_beyond_those_that_are_kept() {
        let mut statistics = Statistics::default();
        assert_eq!(statistics.round_count(), 0);
        for round in 1..=3000 {
            statistics.push_round(RoundReport { round, ..RoundReport::default() });
        }
        assert_eq!((statistics.round_count(), statistics.rounds.len()), (3000, Statistics::MOST_ROUNDS));
        assert_eq!(statistics.rounds[0].round, 3001 - Statistics::MOST_ROUNDS as u32);
    }

    #[test]
    fn a_snapshot_has_the_fields_of_query_migrate() {
        let shared = SharedStatistics::default();
        shared.update(|s| {
            s.status = Status::Completed;
            s.pages = PageCounts { normal: 3, zero: 5, delta: 0 };
            s.page_size = 4096;
            s.downtime = 12.7;
        });
        let out = shared.snapshot().query_migrate();
        assert_eq!(out["status"], "completed");
        assert_eq!(out["ram"]["normal-bytes"], 3 * 4096);
        assert_eq!(out["ram"]["duplicate"], 5);
        assert_eq!(out["downtime"], 12);
        assert!(out.get("xbzrle-cache").is_none());
        shared.update(|s| {
            s.deltas = DeltaCounts {
                cache_size: 1 << 20,
                pages: 4,
                bytes: 4096,
                unchanged: 1,
                cache_misses: 3,
                overflows: 2,
            };
        });
        let cache = &shared.snapshot().query_migrate()["xbzrle-cache"];
        assert_eq!((&cache["cache-miss-rate"], &cache["encoding-rate"]), (&json!(0.3), &json!(4.0)));
        assert!(out.get("expected-downtime").is_none() && out.get("error-desc").is_none());
    }
}
