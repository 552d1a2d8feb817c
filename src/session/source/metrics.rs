//! Turns what the session does into the figures people read.

use std::time::Duration;

use crate::engine::{Outcome, Reason, SourceAction, Throttler, Waiting};
use crate::error::Chain;
use crate::observe::{
    DeltaCounts, Latency, LostConnection, PageCounts, PassedMemory, RoundReport, SharedStatistics,
    SkippedPages, SpliceCounts, Status, ZeroCopyCounts,
};
use crate::ram::{PageBatch, RamBlockTable, RoundKind};
use crate::units::Rate;

use super::rates::Rates;
use crate::session::Error;

/// The parts of the downtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Pause,
    Hold,
    Sync,
    Pages,
    State,
    Digest,
    Ready,
    Handover,
}

/// The current round.
#[derive(Default)]
struct Round {
    report: RoundReport,
    pages: PageCounts,
    /// Begun and not closed.
    open: bool,
    began: Duration,
    /// Its start: bytes in all, bytes on page channels, deltas.
    from: u64,
    from_channels: u64,
    from_deltas: DeltaCounts,
}

/// How long steps took.
#[derive(Default)]
struct Latencies {
    batch: Latency,
    fence: Latency,
    write: Latency,
}

/// What the downtime is spent on.
#[derive(Default)]
struct Downtime {
    paused_at: Option<Duration>,
    part: Option<(Part, Duration)>,
}

/// The session's own counters; the shared snapshot is brought up to date once a slice.
pub(super) struct Figures {
    shared: SharedStatistics,
    page_bytes: u64,
    pages: PageCounts,
    deltas: DeltaCounts,
    /// Bytes on page channels so far.
    channel_bytes: u64,
    round: Round,
    /// Bytes and time of the rounds that were closed.
    rounds: (u64, Duration),
    downtime: Downtime,
    latencies: Latencies,
    rates: Rates,
    /// When the first page had been handed over.
    first_page: Option<Duration>,
}

impl Figures {
    pub(super) fn new(table: &RamBlockTable, shared: SharedStatistics) -> Self {
        shared.update(|s| {
            s.total = table.travelling();
            s.remaining = table.travelling();
            s.page_size = table.page().bytes();
        });
        Self {
            shared,
            page_bytes: table.page().bytes(),
            pages: PageCounts::default(),
            deltas: DeltaCounts::default(),
            channel_bytes: 0,
            round: Round::default(),
            rounds: (0, Duration::ZERO),
            downtime: Downtime::default(),
            latencies: Latencies::default(),
            rates: Rates::default(),
            first_page: None,
        }
    }

    /// Some memory is passed: `table` has the blocks that are left to migrate.
    pub(super) fn passed(&mut self, table: &RamBlockTable, passed: PassedMemory) {
        self.shared.update(|s| {
            s.passed = passed;
            s.total = table.travelling();
            s.remaining = table.travelling();
        });
    }

    /// When the first page had been handed over.
    pub(super) fn first_page(&self) -> Option<Duration> {
        self.first_page
    }

    pub(super) fn shared(&self) -> SharedStatistics {
        self.shared.clone()
    }

    /// A step begins: the downtime's parts and the status follow from the steps.
    pub(super) fn step(&mut self, now: Duration, action: SourceAction) {
        let part = match action {
            SourceAction::PauseGuest => {
                self.downtime.paused_at = Some(now);
                self.shared.update(|s| s.status = Status::Device);
                Some(Part::Pause)
            }
            SourceAction::Sync { last: true } => {
                self.shared.update(|s| s.status = Status::Device);
                Some(Part::Sync)
            }
            SourceAction::OpenRound { kind: RoundKind::Final, .. } | SourceAction::SendDiscards => {
                Some(Part::Pages)
            }
            SourceAction::SendState | SourceAction::SendPackage => Some(Part::State),
            SourceAction::SendDigest => Some(Part::Digest),
            SourceAction::Commit => {
                self.shared.update(|s| s.status = Status::HandingOver);
                Some(Part::Handover)
            }
            SourceAction::Release | SourceAction::RollBack | SourceAction::Finish(_) => {
                self.close_part(now);
                return;
            }
            _ => None,
        };
        if let Some(part) = part {
            self.begin_part(now, part);
        }
    }

    /// There is no action: the time counts for the wait.
    pub(super) fn waits(&mut self, now: Duration, waiting: Waiting) {
        let part = match waiting {
            Waiting::Embedder => {
                self.shared.update(|s| s.status = Status::PreSwitchover);
                Part::Hold
            }
            Waiting::Ready | Waiting::Guest => Part::Ready,
            _ => return,
        };
        if self.downtime.part.is_none_or(|(now, _)| now != part) {
            self.begin_part(now, part);
        }
    }

    fn begin_part(&mut self, now: Duration, part: Part) {
        self.close_part(now);
        self.downtime.part = Some((part, now));
    }

    fn close_part(&mut self, now: Duration) {
        let Some((part, since)) = self.downtime.part.take() else { return };
        let took = millis(now.saturating_sub(since));
        self.shared.update(|s| {
            let parts = &mut s.downtime_parts;
            *match part {
                Part::Pause => &mut parts.pause_ms,
                Part::Hold => &mut parts.hold_ms,
                Part::Sync => &mut parts.sync_ms,
                Part::Pages => &mut parts.pages_ms,
                Part::State => &mut parts.state_ms,
                Part::Digest => &mut parts.digest_ms,
                Part::Ready => &mut parts.ready_ms,
                Part::Handover => &mut parts.handover_ms,
            } += took;
            s.downtime = parts.total_ms();
        });
    }

    /// Postcopy: the destination has taken the guest, which ends the downtime.
    pub(super) fn taken(&mut self, now: Duration) {
        self.close_part(now);
        self.shared.update(|s| s.status = Status::PostcopyActive);
    }

    /// The guest runs on here after it was paused.
    pub(super) fn runs_on(&mut self, now: Duration) {
        self.close_part(now);
        self.downtime.paused_at = None;
        self.shared.update(|s| s.status = Status::Active);
    }

    /// The connection is lost, and another may follow.
    pub(super) fn lost(&mut self, now: Duration, position: u64, committed: bool, why: String) {
        if std::mem::take(&mut self.round.open) {
            self.round_closed(now, position);
        }
        let (at_ms, round) = (millis(now), self.round.report.round);
        self.shared.update(|s| {
            let mut lost = LostConnection::default();
            (lost.at_ms, lost.round, lost.committed, lost.why) = (at_ms, round, committed, why);
            s.lost.lose(lost);
        });
    }

    /// The ends go on over another connection, and so many pages are sent again.
    pub(super) fn replaced(&mut self, now: Duration, pages: u64) {
        let page_bytes = self.page_bytes;
        self.shared.update(|s| s.lost.replace(millis(now), pages, page_bytes));
    }

    /// Postcopy: a thread waits for pages.
    pub(super) fn requested(&mut self) {
        self.shared.update(|s| s.postcopy_requests += 1);
    }

    /// Postcopy: bytes that a slice has sent.
    pub(super) fn postcopy(&mut self, bytes: u64) {
        self.shared.update(|s| s.postcopy_bytes += bytes);
    }

    /// Bytes that went on page channels so far.
    pub(super) fn channel_bytes(&mut self, bytes: u64) {
        self.channel_bytes = bytes;
        self.shared.update(|s| s.multifd_bytes = bytes);
    }

    pub(super) fn set_up(&mut self, now: Duration, position: u64) {
        (self.round.from, self.round.from_channels) = (position, self.channel_bytes);
        self.shared.update(|s| {
            s.status = Status::Active;
            s.setup_time = millis(now);
            s.transferred = position;
        });
    }

    pub(super) fn synced(&mut self, now: Duration, dirty: u64, fresh: u64, expected: Option<Duration>) {
        let rate = self.rates.written(now, fresh);
        let remaining = dirty * self.page_bytes;
        self.delta_rates(now);
        self.shared.update(|s| {
            s.dirty_sync_count += 1;
            s.remaining = remaining;
            s.dirty_pages_rate = rate.unwrap_or(s.dirty_pages_rate);
            s.expected_downtime = expected.map(millis).or(s.expected_downtime);
        });
    }

    /// Number of pages left out so far.
    pub(super) fn skipped(&mut self, hinted: u64, discarded: u64) {
        self.shared.update(|s| s.skipped = SkippedPages { hinted, discarded });
    }

    /// How the guest is slowed down now.
    pub(super) fn throttled(&mut self, throttle: &Throttler) {
        let (share, rest) = (throttle.share().get(), throttle.longest_rest().percent_of_run());
        self.shared.update(|s| (s.throttle_percent, s.vcpu_rest_percentage) = (share, rest));
    }

    /// What the rounds so far brought.
    pub(super) fn progress(&mut self, rounds_without_progress: u32, stalled: bool) {
        self.shared.update(|s| {
            s.rounds_without_progress = rounds_without_progress;
            s.stalled |= stalled;
        });
    }

    pub(super) fn round(&mut self, now: Duration, number: u32, dirty_pages: u64) {
        let paused = self.downtime.paused_at.is_some();
        let mut round = RoundReport { round: number, dirty_pages, paused, ..RoundReport::default() };
        self.shared.update(|s| {
            round.dirty_pages_rate = s.dirty_pages_rate;
            round.throttle_percent = s.throttle_percent;
            round.expected_downtime_ms = s.expected_downtime;
        });
        self.round.report = round;
        self.round.pages = PageCounts::default();
        self.round.open = true;
        self.round.began = now;
        self.round.from_deltas = self.deltas;
    }

    pub(super) fn round_closed(&mut self, now: Duration, position: u64) {
        self.round.open = false;
        let took = now.saturating_sub(self.round.began);
        self.round.report.pages = as_sent(self.round.pages, self.deltas, self.round.from_deltas);
        self.round.report.bytes = position - self.round.from;
        self.round.report.took_ms = millis(took);
        self.round.report.throughput = Rate::of(self.round.report.bytes, took).map_or(0, |rate| rate.0);
        let in_stream = self.round.report.bytes.saturating_sub(self.channel_bytes - self.round.from_channels);
        self.rounds.0 += self.round.report.bytes;
        self.rounds.1 += took;
        (self.round.from, self.round.from_channels) = (position, self.channel_bytes);
        let round = self.round.report;
        tracing::info!(
            round = round.round,
            dirty_pages = round.dirty_pages,
            pages_sent = round.pages.normal,
            zero_pages = round.pages.zero,
            bytes = round.bytes,
            took_ms = round.took_ms,
            "round closed",
        );
        let pages = self.pages();
        let latencies =
            (self.latencies.batch.summary(), self.latencies.fence.summary(), self.latencies.write.summary());
        self.shared.update(|s| {
            s.pages = pages;
            (s.batch_latency, s.fence_latency, s.write_latency) = latencies;
            s.push_round(round);
            *if round.paused { &mut s.downtime_bytes } else { &mut s.precopy_bytes } += in_stream;
        });
    }

    pub(super) fn offered(&mut self, took: Duration) {
        self.latencies.batch.record(took);
    }

    pub(super) fn fenced(&mut self, took: Duration) {
        self.latencies.fence.record(took);
    }

    /// The rates of deltas, where a period is over.
    fn delta_rates(&mut self, now: Duration) {
        let looked_at = self.pages.normal + self.pages.zero;
        if let Some(rates) = self.rates.deltas(now, self.deltas, looked_at, self.page_bytes) {
            self.shared.update(|s| s.delta_rates = rates);
        }
    }

    /// What deltas did so far; their pages were handed over as whole ones.
    pub(super) fn deltas(&mut self, counts: DeltaCounts) {
        self.deltas = counts;
        self.shared.update(|s| s.deltas = counts);
    }

    /// The figures of zero copy so far.
    pub(super) fn zero_copy(&mut self, counts: Option<ZeroCopyCounts>) {
        self.shared.update(|s| {
            s.missed_zero_copy = counts.as_ref().map_or(0, |counts| counts.copied + counts.forbidden);
            s.zero_copy = counts;
        });
    }

    /// The figures of sending by reference so far.
    pub(super) fn spliced(&mut self, counts: Option<SpliceCounts>) {
        self.shared.update(|s| s.splice = counts);
    }

    /// Bytes of the pages that the connection has taken, zero pages apart.
    pub(super) fn whole_bytes(&self) -> u64 {
        self.pages.normal * self.page_bytes
    }

    fn pages(&self) -> PageCounts {
        as_sent(self.pages, self.deltas, DeltaCounts::default())
    }

    pub(super) fn written(&mut self, took: &[Duration]) {
        took.iter().for_each(|took| self.latencies.write.record(*took));
    }

    pub(super) fn counted(&mut self, batch: &PageBatch) {
        for counts in [&mut self.pages, &mut self.round.pages] {
            counts.normal += batch.whole_pages();
            counts.zero += batch.zero_pages();
        }
    }

    pub(super) fn sent(&mut self, now: Duration, bytes: u64, pages_left: u64, rate: Option<Rate>) {
        if bytes > 0 {
            self.first_page.get_or_insert(now);
        }
        let (pages, page_bytes) = (self.pages(), self.page_bytes);
        let per_second = self.rates.sent(now, self.pages.normal + self.pages.zero);
        self.shared.update(|s| {
            s.pages = pages;
            s.remaining = pages_left * page_bytes;
            s.throughput = rate.map_or(s.throughput, |rate| rate.0);
            s.pages_per_second = per_second.unwrap_or(s.pages_per_second);
            s.total_time = millis(now);
        });
    }

    /// Bytes in all, as the sink counts them.
    pub(super) fn position(&mut self, position: u64) {
        self.shared.update(|s| s.transferred = position);
    }

    pub(super) fn ended(&mut self, now: Duration, outcome: Outcome, error: Option<&Error>) {
        let overall = Rate::of(self.rounds.0, self.rounds.1);
        let latencies =
            (self.latencies.batch.summary(), self.latencies.fence.summary(), self.latencies.write.summary());
        self.shared.update(|s| {
            // After a switch to postcopy no round is closed, and before it there may be none.
            (s.batch_latency, s.fence_latency, s.write_latency) = latencies;
            let overall = if s.round_count() > 0 { overall } else { Rate::of(s.transferred, now) };
            s.ended = true;
            s.throttle_percent = 0;
            s.total_time = millis(now);
            s.error = error.map(|error| Chain(error).to_string());
            s.status = match outcome {
                Outcome::Completed => Status::Completed,
                Outcome::StaysHere(Reason::Cancelled) => Status::Cancelled,
                Outcome::StaysHere(Reason::Failed) => Status::Failed,
                Outcome::InDoubt | Outcome::Incomplete => Status::InDoubt,
            };
            if outcome == Outcome::Completed {
                s.remaining = 0;
                s.throughput = overall.map_or(s.throughput, |rate| rate.0);
            }
        });
    }
}

/// Pages as they were handed over, less those that became deltas or nothing since `before`.
fn as_sent(handed: PageCounts, deltas: DeltaCounts, before: DeltaCounts) -> PageCounts {
    let delta = deltas.pages - before.pages;
    let not_whole = delta + deltas.unchanged - before.unchanged;
    PageCounts { normal: handed.normal.saturating_sub(not_whole), delta, ..handed }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
