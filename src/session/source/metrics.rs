//! Turns what the session does into the figures people read.

use std::time::Duration;

use crate::engine::{Outcome, Reason, SourceAction, Throttler, Waiting};
use crate::error::Chain;
use crate::observe::{
    DeltaCounts, Latency, PageCounts, RoundReport, SharedStatistics, SkippedPages, SpliceCounts, Status,
    ZeroCopyCounts,
};
use crate::ram::{PageBatch, RamBlockTable, RoundKind};
use crate::units::Rate;

use crate::session::Error;

/// What a moment of the downtime is spent on.
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

/// Shortest time over which rates are taken.
const PERIOD: Duration = Duration::from_secs(1);

/// Where the period of the delta rates began.
#[derive(Default)]
struct Period {
    began: Duration,
    deltas: DeltaCounts,
    pages: u64,
}

/// The session's own counters; the shared snapshot is brought up to date once a slice.
pub(super) struct Figures {
    shared: SharedStatistics,
    page_bytes: u64,
    pages: PageCounts,
    round_pages: PageCounts,
    round: RoundReport,
    round_began: Duration,
    round_from: u64,
    rounds_bytes: u64,
    rounds_time: Duration,
    last_sync: Option<Duration>,
    /// Pages found dirty since then.
    fresh: u64,
    dirty_rate_known: bool,
    paused_at: Option<Duration>,
    part: Option<(Part, Duration)>,
    batch: Latency,
    fence: Latency,
    write: Latency,
    deltas: DeltaCounts,
    round_deltas: DeltaCounts,
    /// Bytes on page channels so far, and when the round began.
    channel_bytes: u64,
    round_channel_bytes: u64,
    window: Window,
    period: Period,
    /// When the first page had been handed over.
    pub(super) first_page: Option<Duration>,
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
            round_pages: PageCounts::default(),
            round: RoundReport::default(),
            round_began: Duration::ZERO,
            round_from: 0,
            rounds_bytes: 0,
            rounds_time: Duration::ZERO,
            last_sync: None,
            fresh: 0,
            dirty_rate_known: false,
            paused_at: None,
            part: None,
            batch: Latency::default(),
            fence: Latency::default(),
            write: Latency::default(),
            deltas: DeltaCounts::default(),
            round_deltas: DeltaCounts::default(),
            channel_bytes: 0,
            round_channel_bytes: 0,
            window: Window::default(),
            period: Period::default(),
            first_page: None,
        }
    }

    pub(super) fn shared(&self) -> SharedStatistics {
        self.shared.clone()
    }

    /// A step begins: the downtime's parts and the status follow from the steps.
    pub(super) fn step(&mut self, now: Duration, action: SourceAction) {
        let part = match action {
            SourceAction::PauseGuest => {
                self.paused_at = Some(now);
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

    /// Nothing is to be done: the time is spent on what is waited for.
    pub(super) fn waits(&mut self, now: Duration, waiting: Waiting) {
        let part = match waiting {
            Waiting::Embedder => {
                self.shared.update(|s| s.status = Status::PreSwitchover);
                Part::Hold
            }
            Waiting::Ready | Waiting::Guest => Part::Ready,
            _ => return,
        };
        if self.part.is_none_or(|(now, _)| now != part) {
            self.begin_part(now, part);
        }
    }

    fn begin_part(&mut self, now: Duration, part: Part) {
        self.close_part(now);
        self.part = Some((part, now));
    }

    fn close_part(&mut self, now: Duration) {
        let Some((part, since)) = self.part.take() else { return };
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

    /// Postcopy: somebody waits for pages.
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
        (self.round_from, self.round_channel_bytes) = (position, self.channel_bytes);
        self.shared.update(|s| {
            s.status = Status::Active;
            s.setup_time = millis(now);
            s.transferred = position;
        });
    }

    pub(super) fn synced(&mut self, now: Duration, dirty: u64, fresh: u64, expected: Option<Duration>) {
        let rate = self.dirty_rate(now, fresh);
        let remaining = dirty * self.page_bytes;
        self.delta_rates(now);
        self.shared.update(|s| {
            s.dirty_sync_count += 1;
            s.remaining = remaining;
            s.dirty_pages_rate = rate.unwrap_or(s.dirty_pages_rate);
            s.expected_downtime = expected.map(millis).or(s.expected_downtime);
        });
    }

    /// Pages a second that the guest wrote, where enough time has passed: between the two syncs around the pause lie
    /// microseconds. A shorter time counts only while there is no better one.
    fn dirty_rate(&mut self, now: Duration, fresh: u64) -> Option<u64> {
        let Some(last) = self.last_sync else {
            self.last_sync = Some(now);
            return None;
        };
        self.fresh += fresh;
        let took = now.saturating_sub(last);
        if took.is_zero() || (took < WINDOW && self.dirty_rate_known) {
            return None;
        }
        self.dirty_rate_known = true;
        self.last_sync = Some(now);
        Some((std::mem::take(&mut self.fresh) as f64 / took.as_secs_f64()) as u64)
    }

    /// What was left out so far.
    pub(super) fn skipped(&mut self, hinted: u64, discarded: u64) {
        self.shared.update(|s| s.skipped = SkippedPages { hinted, discarded });
    }

    /// How the guest is slowed down now.
    pub(super) fn throttled(&mut self, throttle: &Throttler) {
        let (share, rest) = (throttle.share().get(), throttle.longest_rest().percent_of_run());
        self.shared.update(|s| (s.throttle_percent, s.vcpu_rest_percentage) = (share, rest));
    }

    /// What the rounds so far brought.
    pub(super) fn progress(&mut self, rounds_without: u32, stalled: bool) {
        self.shared.update(|s| {
            s.rounds_without_progress = rounds_without;
            s.stalled |= stalled;
        });
    }

    pub(super) fn round(&mut self, now: Duration, number: u32, dirty_pages: u64) {
        let paused = self.paused_at.is_some();
        let mut round = RoundReport { round: number, dirty_pages, paused, ..RoundReport::default() };
        self.shared.update(|s| {
            round.dirty_pages_rate = s.dirty_pages_rate;
            round.throttle_percent = s.throttle_percent;
            round.expected_downtime_ms = s.expected_downtime;
        });
        self.round = round;
        self.round_pages = PageCounts::default();
        self.round_began = now;
        self.round_deltas = self.deltas;
    }

    pub(super) fn round_closed(&mut self, now: Duration, position: u64) {
        let took = now.saturating_sub(self.round_began);
        self.round.pages = as_sent(self.round_pages, self.deltas, self.round_deltas);
        self.round.bytes = position - self.round_from;
        self.round.took_ms = millis(took);
        self.round.throughput = Rate::of(self.round.bytes, took).map_or(0, |rate| rate.0);
        let in_stream = self.round.bytes.saturating_sub(self.channel_bytes - self.round_channel_bytes);
        self.rounds_bytes += self.round.bytes;
        self.rounds_time += took;
        (self.round_from, self.round_channel_bytes) = (position, self.channel_bytes);
        let round = self.round;
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
        let latencies = (self.batch.summary(), self.fence.summary(), self.write.summary());
        self.shared.update(|s| {
            s.pages = pages;
            (s.batch_latency, s.fence_latency, s.write_latency) = latencies;
            s.push_round(round);
            *if round.paused { &mut s.downtime_bytes } else { &mut s.precopy_bytes } += in_stream;
        });
    }

    pub(super) fn offered(&mut self, took: Duration) {
        self.batch.record(took);
    }

    pub(super) fn fenced(&mut self, took: Duration) {
        self.fence.record(took);
    }

    /// The rates of deltas, where a period is over.
    fn delta_rates(&mut self, now: Duration) {
        let looked_at = self.pages.normal + self.pages.zero;
        if self.deltas.cache_size == 0 || now.saturating_sub(self.period.began) < PERIOD {
            return;
        }
        let pages = looked_at - self.period.pages;
        let rates = self.deltas.rates_since(&self.period.deltas, pages, self.page_bytes);
        self.period = Period { began: now, deltas: self.deltas, pages: looked_at };
        self.shared.update(|s| s.delta_rates = rates);
    }

    /// What deltas did so far; their pages were handed over as whole ones.
    pub(super) fn deltas(&mut self, counts: DeltaCounts) {
        self.deltas = counts;
        self.shared.update(|s| s.deltas = counts);
    }

    /// What zero copy came to so far.
    pub(super) fn zero_copy(&mut self, counts: Option<ZeroCopyCounts>) {
        self.shared.update(|s| {
            s.missed_zero_copy = counts.as_ref().map_or(0, |counts| counts.copied + counts.forbidden);
            s.zero_copy = counts;
        });
    }

    /// What sending by reference came to so far.
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
        took.iter().for_each(|took| self.write.record(*took));
    }

    pub(super) fn counted(&mut self, batch: &PageBatch) {
        for counts in [&mut self.pages, &mut self.round_pages] {
            counts.normal += batch.whole_pages();
            counts.zero += batch.zero_pages();
        }
    }

    pub(super) fn sent(&mut self, now: Duration, bytes: u64, pages_left: u64, rate: Option<Rate>) {
        if bytes > 0 {
            self.first_page.get_or_insert(now);
        }
        let (pages, page_bytes) = (self.pages(), self.page_bytes);
        let per_second = self.window.per_second(now, self.pages.normal + self.pages.zero);
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
        let overall = Rate::of(self.rounds_bytes, self.rounds_time);
        self.shared.update(|s| {
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

/// Shortest time that pages a second are counted over, as QEMU's.
const WINDOW: Duration = Duration::from_millis(100);

/// Pages of every kind, a window at a time.
#[derive(Default)]
struct Window {
    began: Option<(Duration, u64)>,
    any: bool,
}

impl Window {
    /// The rate of the window that ends now, if one does; the first ends at the first look.
    fn per_second(&mut self, now: Duration, pages: u64) -> Option<u64> {
        let (since, before) = *self.began.get_or_insert((now, 0));
        let took = now.saturating_sub(since);
        if took.is_zero() || (took < WINDOW && self.any) {
            return None;
        }
        (self.began, self.any) = (Some((now, pages)), true);
        Some((pages.saturating_sub(before) as f64 / took.as_secs_f64()) as u64)
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
