//! The figures of a migration, with the meanings QEMU's `query-migrate` gives them; docs/statistics.md lists them.

use serde::{Deserialize, Serialize};

use super::{LatencySummary, LostConnections, PageWaits};

/// State of a migration, in QEMU's terms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Not begun.
    #[default]
    None,
    /// Greeting the peer.
    Setup,
    /// Rounds while the guest runs.
    Active,
    /// The guest is paused and its embedder is waited for.
    PreSwitchover,
    /// The guest is paused.
    Device,
    /// COMMIT was sent: the guest belongs to the destination, which has not yet reported that it runs. Every successful
    /// migration is briefly in this state.
    HandingOver,
    /// The guest runs at the destination, and pages are missing there.
    PostcopyActive,
    /// As [`PostcopyActive`](Self::PostcopyActive), and the connection is lost: nothing is, and another is waited for.
    PostcopyPaused,
    /// Another connection exists, and the ends agree on the missing pages.
    PostcopyRecover,
    /// The guest runs at the destination.
    Completed,
    /// Ended before COMMIT by an error; the guest runs at the source.
    Failed,
    /// Ended before COMMIT by request; the guest runs at the source.
    Cancelled,
    /// It has ended: COMMIT was sent and no RUNNING arrived.
    InDoubt,
}

/// Pages by the form in which they were sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    /// Whole pages.
    pub normal: u64,
    /// Zero pages.
    pub zero: u64,
    /// Pages as a difference to what the destination had (XBZRLE).
    pub delta: u64,
}

/// Pages that were left out, since their bytes are not needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SkippedPages {
    /// Pages that were to be sent and that the guest reported as free; each time it did so.
    pub hinted: u64,
    /// Pages found unplugged; each time they became so.
    pub discarded: u64,
}

/// Memory that was passed to the destination as descriptors, and of which no page was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PassedMemory {
    /// Blocks.
    pub blocks: u64,
    /// Their used lengths in bytes.
    pub bytes: u64,
}

/// What deltas did, the parts of which `query-migrate` makes its `xbzrle-cache`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeltaCounts {
    /// Bytes of the cache; 0: there is none.
    pub cache_size: u64,
    /// Pages sent as deltas.
    pub pages: u64,
    /// Bytes of the encodings with their three bytes of head (the block's name where one goes with it), not of the
    /// record's first word; a page that differs too much counts whole.
    pub bytes: u64,
    /// Pages that were dirty and had not changed: nothing was sent.
    pub unchanged: u64,
    /// Pages that were not in the cache.
    pub cache_misses: u64,
    /// Pages that differ too much.
    pub overflows: u64,
}

/// Figures of the sends that read the pages themselves (MSG_ZEROCOPY).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ZeroCopyCounts {
    /// Sends that the kernel took without a copy, or so it was asked.
    pub sends: u64,
    /// Of them, those that the kernel has finished.
    pub released: u64,
    /// Of these, those that it reports as copied nevertheless.
    pub copied: u64,
    /// Sends that the limits on locked memory did not allow; they went as copies.
    pub forbidden: u64,
    /// Why it is not tried any more.
    pub off: Option<String>,
}

/// Figures of sending pages by reference (`splice(2)`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SpliceCounts {
    /// Bytes of pages that went by reference.
    pub bytes: u64,
    /// Bytes of pages that were to go so and were copied: of memory that can't be referred to, or as it was given up.
    pub copied: u64,
    /// Why it is not tried any more, or never was.
    pub off: Option<String>,
}

impl DeltaCounts {
    /// Pages that were found in the cache, however they were sent.
    pub fn hits(&self) -> u64 {
        self.pages + self.unchanged + self.overflows
    }

    /// These, and then those of another connection, whose cache is the one in use.
    pub(crate) fn followed_by(self, next: Self) -> Self {
        Self {
            cache_size: next.cache_size,
            pages: self.pages + next.pages,
            bytes: self.bytes + next.bytes,
            unchanged: self.unchanged + next.unchanged,
            cache_misses: self.cache_misses + next.cache_misses,
            overflows: self.overflows + next.overflows,
        }
    }

    /// The rates since `before`, among `pages` that were examined. None of either kind gives 0.
    pub fn rates_since(&self, before: &Self, pages: u64, page_bytes: u64) -> DeltaRates {
        let rate = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        DeltaRates {
            cache_miss: rate(self.cache_misses - before.cache_misses, pages),
            encoding: rate((self.hits() - before.hits()) * page_bytes, self.bytes - before.bytes),
        }
    }
}

/// How deltas did of late: over the last period of at least a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct DeltaRates {
    /// Pages that were not in the cache, of all that were sent.
    pub cache_miss: f64,
    /// Bytes of pages that were, for a byte of encoding.
    pub encoding: f64,
}

/// The parts of the downtime, in milliseconds. The parts add up to the whole but for rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DowntimeParts {
    /// A relay's: the last search for pages that arrived by RDMA, after the guest's source had stopped it.
    pub scan_ms: f64,
    /// Until the guest was paused.
    pub pause_ms: f64,
    /// Until the embedder continued the switchover, if it is asked to.
    pub hold_ms: f64,
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
        self.named().iter().map(|(_, ms)| ms).sum()
    }

    /// The parts in the order in which they come, with their names.
    pub fn named(&self) -> [(&'static str, f64); 9] {
        [
            ("scan", self.scan_ms),
            ("pause", self.pause_ms),
            ("hold", self.hold_ms),
            ("sync", self.sync_ms),
            ("pages", self.pages_ms),
            ("state", self.state_ms),
            ("digest", self.digest_ms),
            ("ready", self.ready_ms),
            ("handover", self.handover_ms),
        ]
    }
}

/// One round of the page loop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// 1 for the first.
    pub round: u32,
    /// Pages dirty when it began.
    pub dirty_pages: u64,
    /// Sent pages.
    pub pages: PageCounts,
    /// Bytes that left.
    pub bytes: u64,
    /// How long it took, in milliseconds.
    pub took_ms: f64,
    /// Bytes a second that left in it.
    pub throughput: u64,
    /// Pages a second that the guest wrote before it, between the last two merges of the dirty logs.
    pub dirty_pages_rate: u64,
    /// Share of its time that the guest was held back, in percent, when it began.
    pub throttle_percent: u8,
    /// What the downtime would have been when it began, in milliseconds; `None` before a rate is known.
    pub expected_downtime_ms: Option<f64>,
    /// The guest was paused.
    pub paused: bool,
}

/// One consistent snapshot of a migration's figures. Times are milliseconds, sizes bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Statistics {
    /// The state of the migration.
    pub status: Status,
    /// Bytes written to the peer: headers, pages and device state. At a destination: bytes read from it.
    pub transferred: u64,
    /// Of them, those of rounds while the guest ran, without those on page channels.
    pub precopy_bytes: u64,
    /// Of them, those of the round while the guest was paused, without those on page channels and the device state.
    pub downtime_bytes: u64,
    /// Of them, those of pages that were sent after a switch to postcopy.
    pub postcopy_bytes: u64,
    /// Requests for missing pages that arrived after it.
    pub postcopy_requests: u64,
    /// How long threads waited for missing pages here, at a destination after a switch to postcopy.
    pub page_waits: Option<PageWaits>,
    /// Of all bytes, those on page channels; at a destination those that arrived on them.
    pub multifd_bytes: u64,
    /// Sends that should have read pages in place and copied them instead.
    pub missed_zero_copy: u64,
    /// Dirty pages times the page size; 0 once completed.
    pub remaining: u64,
    /// Used lengths of all migrated blocks.
    pub total: u64,
    /// Pages by kind.
    pub pages: PageCounts,
    /// Pages that were left out, as of the last merge of the dirty logs.
    pub skipped: SkippedPages,
    /// Memory that was passed to the other end as it is; the other figures do not include it.
    pub passed: PassedMemory,
    /// Bytes of one target page.
    pub page_size: u64,
    /// Merges of the dirty logs.
    pub dirty_sync_count: u64,
    /// Pages a second that the guest wrote between the last two merges.
    pub dirty_pages_rate: u64,
    /// Bytes a second on the page path: the last window, overall once completed.
    pub throughput: u64,
    /// Pages a second, of every kind, in the last window.
    pub pages_per_second: u64,
    /// Share of its time for which the guest is throttled so that the migration converges, in percent; 0: it is not.
    pub throttle_percent: u8,
    /// Time since the start.
    pub total_time: f64,
    /// Until the first sync.
    pub setup_time: f64,
    /// From asking for the pause until the peer runs.
    pub downtime: f64,
    /// What the downtime would be now; `None` before a rate is known.
    pub expected_downtime: Option<f64>,
    /// The longest rest of a vCPU under a dirty limit, in percent of the time that it runs.
    pub vcpu_rest_percentage: u16,
    /// Rounds since less remained than ever before.
    pub rounds_without_progress: u32,
    /// At some time so many rounds had brought nothing that none suggested an end.
    pub stalled: bool,
    /// The parts of the downtime.
    pub downtime_parts: DowntimeParts,
    /// The last [`MAX_ROUNDS`](Self::MAX_ROUNDS) rounds; their numbers count from 1.
    pub rounds: Vec<RoundReport>,
    /// What deltas did.
    pub deltas: DeltaCounts,
    /// Figures of zero copy, if it was requested.
    pub zero_copy: Option<ZeroCopyCounts>,
    /// Figures of sending by reference, if it was requested.
    pub splice: Option<SpliceCounts>,
    /// How they did of late.
    pub delta_rates: DeltaRates,
    /// How long handing a batch to the transport took.
    pub batch_latency: LatencySummary,
    /// How long closing a round took.
    pub fence_latency: LatencySummary,
    /// How long a write to the peer's memory took from its post to its completion (RDMA); counted when a round closes.
    /// Queued writes wait for each other, so this is no round trip.
    pub write_latency: LatencySummary,
    /// Connections that were lost and could be followed by another, before the guest ran at the destination. At a source.
    pub lost: LostConnections,
    /// Why it failed.
    pub error: Option<String>,
    /// It is over: nothing changes any more.
    pub ended: bool,
}

impl Statistics {
    /// Rounds that are kept: a guest that never converges must not fill memory with reports.
    pub const MAX_ROUNDS: usize = 1024;

    /// Adds a round, and forgets the oldest where there are too many.
    pub fn push_round(&mut self, round: RoundReport) {
        if self.rounds.len() >= Self::MAX_ROUNDS {
            self.rounds.remove(0);
        }
        self.rounds.push(round);
    }

    /// Time that the rest takes at the rate of the last window, in milliseconds; `None` before a rate is known.
    pub fn eta_ms(&self) -> Option<f64> {
        let known = self.remaining == 0 || self.throughput > 0;
        known.then(|| self.remaining as f64 / self.throughput.max(1) as f64 * 1e3)
    }

    /// Rounds that were closed so far, the forgotten ones included.
    pub fn round_count(&self) -> u32 {
        self.rounds.last().map_or(0, |round| round.round)
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
        assert_eq!((statistics.round_count(), statistics.rounds.len()), (3000, Statistics::MAX_ROUNDS));
        assert_eq!(statistics.rounds[0].round, 3001 - Statistics::MAX_ROUNDS as u32);
    }

    #[test]
    fn delta_rates_are_of_a_period() {
        let before = DeltaCounts { pages: 10, bytes: 1000, cache_misses: 5, ..DeltaCounts::default() };
        let now = DeltaCounts { pages: 13, unchanged: 1, bytes: 2000, cache_misses: 7, ..before };
        let rates = now.rates_since(&before, 8, 4096);
        assert_eq!((rates.cache_miss, rates.encoding), (0.25, 16.384));
        assert_eq!(now.rates_since(&now, 0, 4096), DeltaRates::default());
    }
}
