//! The source's session: does what the engine decides, on one thread.

mod counts;
mod handover;
mod metrics;
mod page_loop;
mod peer;
mod postcopy;
pub(super) mod return_path;
mod setup;
#[cfg(test)]
pub(super) mod skip_tests;
mod skips;
mod throttle;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::{
    Handover, Outcome, Pace, Sent, SourceAction, SourceConfig, SourceEngine, SourceEvent, Switchover,
    Throttler,
};
use crate::error::{Chain, Remedy};
use crate::guest::{DirtySource, GuestControl, GuestMemory, sync_all};
use crate::observe::{EventKind, PageCounts, SharedStatistics, Statistics, Status};
use crate::page::PageSearch;
use crate::ram::{DirtyMap, PageBatch, RoundKind};
use crate::stream::qemu::section;
use crate::sys::{CancelToken, SendPart, Stop};
use crate::transport::{ChannelError, Returned, SourceConnection, SourceLink};

pub(super) use setup::described;

use crate::session::callback::{guarded, quietly};
use crate::session::config::SourceSettings;
use crate::session::control::Control;
use crate::session::handle::Canceller;
use crate::session::{Breakage, Error, ErrorKind, shared_blocks};
use metrics::Figures;
use postcopy::Missing;
use return_path::ReturnPath;
use skips::Skips;
use throttle::FixedCosts;

/// A guest that may be slowed down is looked at that often, however long a round takes.
const ROUND_TIMEOUT: Duration = Duration::from_secs(5);

/// A guest to be moved.
pub struct SourceGuest {
    /// Its memory.
    pub memory: Arc<dyn GuestMemory>,
    /// Everything that knows of writes to it; each sync ORs all. None only where
    /// [`guest_stands_still`](SourceSettings::guest_stands_still).
    pub dirty: Vec<Arc<dyn DirtySource>>,
    /// Pause, resume, device state.
    pub control: Box<dyn GuestControl>,
}

/// A guest's own source, in front of a relay: tells when it has stopped its guest.
pub trait Upstream: Send {
    /// Waits at most `time` for news; true once the guest stands still and its last page has come.
    ///
    /// # Errors
    /// Whatever ended the upstream migration.
    fn wait(&mut self, time: Duration) -> Result<bool, Error>;

    /// The peer has everything and may be given the guest, as `handover` says: waits at most `time` until its source has given it to
    /// us. True once it is ours.
    ///
    /// # Errors
    /// Whatever ended the upstream migration: the guest runs on there.
    fn wait_given(&mut self, handover: Handover, time: Duration) -> Result<bool, Error>;

    /// The peer was given the guest and has not said in time that it runs; `why` tells how.
    fn far_end_is_silent(&mut self, _why: &Error) {}

    /// In doubt: true while a late answer of the peer is still of use.
    fn goes_on_listening(&mut self) -> bool {
        false
    }
}

/// How a migration ended, seen from the source.
#[derive(Debug)]
#[non_exhaustive]
pub struct SourceReport {
    /// Who owns the guest.
    pub outcome: Outcome,
    /// Why it is not the destination, or why nobody knows.
    pub error: Option<Error>,
    /// The figures.
    pub statistics: Statistics,
    /// When the first page had been handed to the connection, since the start.
    pub first_page_sent: Option<std::time::Duration>,
    /// Pages the destination does not have for certain; all clean after success.
    pub dirty: DirtyMap,
    /// The guest was paused here and not resumed: it is at the destination, or in doubt, or could not resume.
    pub stands_still: bool,
}

impl SourceReport {
    /// True if the guest runs on, whole, at the source.
    pub fn guest_is_safe_here(&self) -> bool {
        matches!(self.outcome, Outcome::StaysHere(_)) && !self.stands_still
    }
}

/// Time as the engine counts it.
pub trait Clock: Send {
    /// Since the start of the migration.
    fn now(&self) -> Duration;
}

/// The machine's own clock.
pub struct WallClock(Instant);

impl Default for WallClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for WallClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// The source's session before and while it runs.
pub struct SourceSession {
    pub(super) guest: SourceGuest,
    pub(super) link: Box<dyn SourceLink>,
    pub(super) back: Option<ReturnPath>,
    pub(super) settings: SourceSettings,
    upstream: Option<Box<dyn Upstream>>,
    pub(super) clock: Box<dyn Clock>,
    pub(super) control: Control,
    stop: Stop,
    engine: SourceEngine,
    dirty: DirtyMap,
    skips: Skips,
    search: PageSearch,
    pace: Pace,
    throttle: Throttler,
    fixed: FixedCosts,
    stall_told: bool,
    /// The guest stands still: nothing is held back.
    in_last_round: bool,
    spare: Vec<PageBatch>,
    returned: Vec<Returned>,
    /// Batches of this round that the link can't carry.
    declined: Vec<PageBatch>,
    /// Some pages went in the stream although the link is another.
    any_sent_in_stream: bool,
    /// How many.
    sent_in_stream: PageCounts,
    figures: Figures,
    missing: Missing,
    handover: Handover,
    section_id: u32,
    /// The device state from SendState on; towards a QEMU the part behind `commit_at` is COMMIT.
    state: Vec<u8>,
    commit_at: usize,
    /// When bytes last left for a peer that waits for more.
    last_sign: Duration,
    paused: bool,
    /// Nothing counts as sent any more.
    all_unsent: bool,
    error: Option<Error>,
    pub(super) breakage: Breakage,
}

impl SourceSession {
    /// A session over a connection that stands.
    pub fn new(guest: SourceGuest, connection: SourceConnection, mut settings: SourceSettings) -> Self {
        let table = guest.memory.table();
        shared_blocks::announce(&mut settings.configuration, table);
        let handover = if connection.back.is_some() { Handover::Shut } else { Handover::OneWay };
        let mut config = SourceConfig::new(table.page().bytes(), handover);
        config.downtime_limit = settings.downtime_limit;
        config.digest = settings.digest;
        config.timeout = settings.timeout;
        config.switchover_rate = settings.switchover_bandwidth;
        config.holds = settings.pause_before_switchover;
        config.postcopy = settings.postcopy.as_ref().map(|postcopy| postcopy.rule);
        config.longest_round = settings.throttling.map(|_| ROUND_TIMEOUT);
        config.answers = peer::answer_timeouts(&settings, table);
        let control = Control::new(&settings, connection.link.delta_cache_size());
        let dirty = DirtyMap::new(table, settings.clear_shift);
        let figures = Figures::new(table, SharedStatistics::default());
        let pace = Pace::new(control.bandwidth().clone());
        let missing =
            Missing::new(Arc::clone(&guest.memory), Pace::new(control.postcopy_bandwidth().clone()));
        let throttle = Throttler::new(settings.throttling, settings.throttle_trigger_threshold);
        Self {
            stop: Stop::on(&control.canceller().token()),
            control,
            engine: SourceEngine::new(config),
            dirty,
            figures,
            guest,
            link: connection.link,
            back: connection.back.map(ReturnPath::new),
            settings,
            upstream: None,
            clock: Box::new(WallClock::default()),
            skips: Skips::default(),
            search: PageSearch::default(),
            pace,
            throttle,
            fixed: FixedCosts::default(),
            stall_told: false,
            in_last_round: false,
            spare: Vec::new(),
            returned: Vec::new(),
            declined: Vec::new(),
            any_sent_in_stream: false,
            sent_in_stream: PageCounts::default(),
            missing,
            handover,
            section_id: setup::RAM_SECTION_ID,
            state: Vec::new(),
            commit_at: 0,
            last_sign: Duration::ZERO,
            paused: false,
            all_unsent: false,
            error: None,
            breakage: Breakage::default(),
        }
    }

    /// The guest is paused when `upstream` says that its own source stopped it.
    pub fn with_upstream(mut self, upstream: Box<dyn Upstream>) -> Self {
        self.upstream = Some(upstream);
        self.engine.set_switchover(Switchover::WhenUpstreamStops);
        self.control.guest_is_elsewhere();
        self
    }

    /// A token that the caller has already. A [`control`](Self::control) that was taken before cancels nothing any more.
    pub fn with_cancel(mut self, cancel: CancelToken) -> Self {
        self.stop = Stop::on(&cancel);
        self.control = self.control.with_canceller(Canceller::over(cancel));
        self
    }

    /// Figures that the caller can see already.
    pub fn with_statistics(mut self, statistics: SharedStatistics) -> Self {
        self.figures = Figures::new(self.guest.memory.table(), statistics);
        self
    }

    /// Raise it to cancel. Refused, and said so, once COMMIT was sent.
    pub fn cancel_token(&self) -> CancelToken {
        self.control.canceller().token()
    }

    /// Changes this migration while it runs.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// The figures while it runs.
    pub fn statistics(&self) -> SharedStatistics {
        self.figures.shared()
    }

    /// Runs the migration to its end on this thread.
    pub fn run(mut self) -> SourceReport {
        self.tell(SourceEvent::Begin);
        let outcome = loop {
            let event = match self.engine.poll() {
                Some(SourceAction::Finish(outcome)) => break outcome,
                Some(SourceAction::RefuseCancel) => {
                    self.refuse_cancel();
                    continue;
                }
                Some(action) => {
                    tracing::trace!(?action, "perform");
                    self.step_guarded(|session| session.perform(action))
                }
                None => self.step_guarded(Self::wait_for_event),
            };
            self.tell(event);
        };
        self.report(outcome)
    }

    /// Tells the engine what has come of its last action, or of the wait for an event.
    fn tell(&mut self, event: SourceEvent) {
        let canceller = self.control.canceller();
        // A cancel comes before this step or after it, never in between: the step may be COMMIT.
        canceller.decide(|| {
            let now = self.clock.now();
            self.tell_commands(now);
            self.engine.handle(now, event);
            ((), self.engine.is_committed())
        });
    }

    /// Tells the engine what the embedder has asked for.
    fn tell_commands(&mut self, now: Duration) {
        if self.control.wants_postcopy() {
            self.engine.handle(now, SourceEvent::StartPostcopy);
        }
        if self.control.canceller().token().is_cancelled() {
            self.engine.handle(now, SourceEvent::Cancel);
        }
    }

    /// After COMMIT a cancel breaks no wait any more.
    fn refuse_cancel(&mut self) {
        if self.stop.reason().is_some() && !self.breakage.is(Breakage::BreakOffAfterCommit) {
            self.stop = Stop::never();
        }
        tracing::warn!("cancel refused: the destination owns the guest");
    }

    /// A panic of the embedder's code is a failure of the step.
    fn step_guarded(&mut self, step: impl FnOnce(&mut Self) -> Result<SourceEvent, Error>) -> SourceEvent {
        let done = if self.breakage.is(Breakage::DieOfPanic) {
            step(self)
        } else {
            let during =
                if self.engine.is_committed() { "the guest is handed over" } else { "sending the guest" };
            guarded(during, || step(self)).unwrap_or_else(|error| {
                // Pages that were on their way from the map to the connection are in neither.
                self.all_unsent = true;
                Err(error)
            })
        };
        done.unwrap_or_else(|error| self.keep(error))
    }

    fn report(mut self, outcome: Outcome) -> SourceReport {
        let now = self.clock.now();
        let given_away = matches!(outcome, Outcome::InDoubt | Outcome::Incomplete);
        if given_away && let Err(error) = self.stop_logs() {
            // The guest stands still: a log left on costs, and loses nothing.
            tracing::warn!(error = %Chain(&error), "a dirty log could not be stopped");
        }
        let position = self.position();
        self.figures.position(position);
        self.figures.zero_copy(self.link.zero_copy());
        self.figures.spliced(self.link.spliced());
        if given_away {
            self.end_throttling();
        }
        self.note_overdue();
        quietly("telling of the end", || self.figures.ended(now, outcome, self.error.as_ref()));
        self.let_go(outcome);
        if self.error.is_none() && matches!(outcome, Outcome::StaysHere(_)) {
            self.error = Some(Error::Cancelled);
        }
        quietly("telling of the end", || self.figures.shared().cleaned_up());
        let statistics = self.figures.shared().snapshot();
        let first_page_sent = self.figures.first_page;
        let (dirty, stands_still) = (self.dirty, self.paused);
        SourceReport { outcome, error: self.error, statistics, first_page_sent, dirty, stands_still }
    }

    /// The connection ends, then the guest may give pages back again.
    fn let_go(&mut self, outcome: Outcome) {
        if outcome == Outcome::Completed {
            let stop = Stop::never().within(self.settings.finish_timeout);
            if let Err(error) = self.link.close(&stop) {
                tracing::warn!(error = %Chain(&error), "the migration is complete, but its connection did not end in good order");
            }
        }
        if self.link.abilities().registers_memory {
            drop(self.link.reclaim());
            quietly("allowing discards", || _ = self.guest.control.forbid_discard(false));
        }
    }

    fn keep(&mut self, error: Error) -> SourceEvent {
        tracing::warn!(error = %Chain(&error), "migration step failed");
        // The kernel's answer for memory that it has lost names no block.
        let error = if error.kind() == ErrorKind::Cancelled {
            error
        } else {
            self.check_layout().err().unwrap_or(error)
        };
        let broken = error.kind() == ErrorKind::Channel;
        let error = broken.then(|| self.peer_failure()).flatten().unwrap_or(error);
        let may_give_back = self.handover == Handover::Shut || self.engine.is_postcopy();
        let event = match &error {
            Error::PeerFailed { .. } if may_give_back => SourceEvent::Refused,
            error if error.kind() == ErrorKind::Channel => SourceEvent::Lost,
            _ => SourceEvent::Failed,
        };
        self.error.get_or_insert(error);
        event
    }

    fn perform(&mut self, action: SourceAction) -> Result<SourceEvent, Error> {
        let now = self.clock.now();
        match action {
            // Too late to give up, and nothing to give up for.
            SourceAction::Commit | SourceAction::ReportSilence | SourceAction::Release => {
                quietly("telling of a step", || self.figures.step(now, action));
            }
            _ => self.figures.step(now, action),
        }
        match action {
            SourceAction::StartLogs => self.start_logs(),
            SourceAction::SendSetup => self.set_up(),
            SourceAction::Sync { last } => self.sync(last),
            SourceAction::OpenRound { kind, number } => self.open_round(kind, number),
            SourceAction::Send => self.send_slice(),
            SourceAction::CloseRound { kind } => self.close_round(kind),
            SourceAction::PauseGuest => {
                // Paused from here on whatever the VMM answers: a failed pause is undone by resume as well.
                self.paused = true;
                let paused = self.guest.control.pause();
                paused.map_err(|source| Error::Control { what: "pause", source })?;
                Ok(SourceEvent::Done)
            }
            SourceAction::Drain => {
                if !self.breakage.is(Breakage::SkipDrain) {
                    self.link.drain(&self.stop)?;
                }
                self.take_returned()?;
                Ok(SourceEvent::Done)
            }
            SourceAction::SendState => self.send_state(),
            SourceAction::SendDigest => self.send_digest(),
            SourceAction::SendDiscards => self.send_discards(),
            SourceAction::SendPackage => self.send_package(),
            SourceAction::SendMissing => self.send_missing(),
            SourceAction::EndPostcopy => self.end_postcopy(),
            SourceAction::Commit => self.commit(),
            SourceAction::ReportSilence => self.report_silence(),
            SourceAction::Release => {
                self.end_throttling();
                self.stop_logs()
            }
            SourceAction::RollBack => self.roll_back(),
            SourceAction::RefuseCancel | SourceAction::Finish(_) => Ok(SourceEvent::Done),
        }
    }

    fn start_logs(&mut self) -> Result<SourceEvent, Error> {
        self.figures.shared().update(|s| s.status = Status::Setup);
        if self.guest.dirty.is_empty() && !self.settings.guest_stands_still {
            return Err(Error::Config {
                what: "no dirty source: what the guest writes while its pages travel would be lost".into(),
                remedy: Remedy::Advice(
                    "give a source for each of its writers, or say that it stands still (guest_stands_still)",
                ),
            });
        }
        self.refuse_what_nobody_does()?;
        self.refuse_postcopy()?;
        let registers =
            self.link.abilities().registers_memory && !self.breakage.is(Breakage::RegisterUnpromised);
        if registers && !self.guest.control.forbid_discard(true) {
            return Err(discards());
        }
        let counts_vcpus = !self.guest.control.vcpu_dirty_pages().is_empty();
        self.control.guest_counts_vcpus(counts_vcpus)?;
        // First: should a log not start, nothing is at the destination.
        if self.settings.all_dirty_at_start {
            self.dirty.set_all(self.guest.memory.table());
        }
        self.skip_at_start();
        for source in &self.guest.dirty {
            source.start()?;
        }
        Ok(SourceEvent::Done)
    }

    fn stop_logs(&mut self) -> Result<SourceEvent, Error> {
        let stop = |source: &Arc<dyn DirtySource>| Ok(guarded("stopping a dirty log", || source.stop())??);
        // Every source is stopped, even if an earlier one refuses.
        let results: Vec<Result<(), Error>> = self.guest.dirty.iter().map(stop).collect();
        results.into_iter().collect::<Result<(), _>>()?;
        Ok(SourceEvent::Done)
    }

    fn sync(&mut self, last: bool) -> Result<SourceEvent, Error> {
        let began = self.clock.now();
        self.check_layout()?;
        self.skip_before_sync();
        self.figures.shared().tell(EventKind::SyncBegins { last });
        let fresh = sync_all(&self.guest.dirty, self.guest.memory.table(), &mut self.dirty)?;
        self.skip_after_sync(last);
        let dirty_pages = self.dirty.count();
        let now = self.clock.now();
        self.fixed.sync = now.saturating_sub(began);
        if !last {
            self.follow_control();
            self.throttle(fresh);
            self.estimate_fixed();
        }
        let expected = self.engine.expected_downtime(dirty_pages);
        self.figures.synced(now, dirty_pages, fresh, expected);
        self.figures.shared().tell(EventKind::Synced { dirty_pages, last });
        Ok(SourceEvent::Synced { dirty_pages })
    }

    fn open_round(&mut self, kind: RoundKind, number: u32) -> Result<SourceEvent, Error> {
        self.figures.round(self.clock.now(), number, self.dirty.count());
        self.check_progress();
        let mut head = Vec::new();
        self.in_last_round = kind == RoundKind::Final;
        if self.in_last_round {
            setup::before_last_section(self, &mut head);
            section::encode_end(self.section_id, &mut head);
        } else {
            section::encode_part(self.section_id, &mut head);
        }
        self.send_bytes(&head)?;
        self.link.open_round(kind, &self.stop)?;
        Ok(SourceEvent::Done)
    }

    fn close_round(&mut self, kind: RoundKind) -> Result<SourceEvent, Error> {
        let (begun, before, guest_before) = (Instant::now(), self.position(), self.figures.whole_bytes());
        if !self.breakage.is(Breakage::SkipFence) {
            self.link.close_round(kind, &self.stop)?;
        }
        self.send_declined()?;
        let mut tail = crate::stream::qemu::ram::EOS_RECORD.to_vec();
        self.settings.framing.encode_footer(self.section_id, &mut tail);
        self.send_bytes(&tail)?;
        self.link.sink().flush(&self.stop)?;
        self.figures.fenced(begun.elapsed());
        self.take_returned()?;
        let mut writes = Vec::new();
        self.link.take_latencies(&mut writes);
        self.figures.written(&writes);
        self.figures.deltas(self.link.deltas());
        self.figures.channel_bytes(self.link.channel_bytes());
        let sent = self.position();
        let guest = self.figures.whole_bytes() - guest_before;
        self.engine.set_sent_at_fence(Sent { guest, wire: sent - before });
        self.engine.set_under_way(self.link.under_way());
        self.figures.round_closed(self.clock.now(), sent);
        Ok(SourceEvent::Done)
    }

    pub(super) fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), ChannelError> {
        self.link.sink().send(&[SendPart::Own(bytes)], &self.stop)
    }

    /// Before COMMIT: nothing is lost. Unsent and unconfirmed pages are dirty again, the guest runs.
    fn roll_back(&mut self) -> Result<SourceEvent, Error> {
        self.note_overdue();
        self.stop = Stop::never();
        let confirms = self.link.abilities().confirms_placement;
        let given_back = guarded("taking pages back", || self.link.reclaim());
        self.all_unsent |= given_back.is_err();
        if !self.breakage.is(Breakage::ForgetUnsent) {
            for batch in given_back.unwrap_or_default() {
                self.mark_unsent(&batch);
            }
            for batch in std::mem::take(&mut self.declined) {
                self.mark_unsent(&batch);
            }
            // Released is not placed: on such a link nothing counts as arrived before the end.
            if !confirms || self.any_sent_in_stream || self.all_unsent {
                self.dirty.set_all(self.guest.memory.table());
            }
        }
        self.skip_no_more();
        let leave_on = self.breakage.is(Breakage::LeaveLogsOn);
        let stopped = if leave_on { Ok(SourceEvent::Done) } else { self.stop_logs() };
        if !self.breakage.is(Breakage::LeaveThrottleOn) {
            self.end_throttling();
        }
        if self.paused && !self.breakage.is(Breakage::StayPaused) {
            let resumed = guarded("resuming", || self.guest.control.resume());
            let resumed = resumed.unwrap_or_else(|panic| Err(std::io::Error::other(panic)));
            if let Err(source) = resumed {
                // More urgent than what led here: somebody must look after the guest.
                let why =
                    self.error.take().map_or_else(|| "cancelled".into(), |error| Chain(&error).to_string());
                return Err(Error::StandsStill { why, source });
            }
            self.paused = false;
        }
        stopped
    }

    pub(super) fn mark_unsent(&mut self, batch: &PageBatch) {
        for piece in batch.pieces() {
            self.dirty.set_run(piece.run);
        }
    }
}

/// A guest that can't go by a link that registers its memory.
pub(super) fn discards() -> Error {
    Error::Config {
        what: "the guest does not promise to keep its memory in place while a NIC knows it".into(),
        remedy: Remedy::Advice("use a tcp: address, or take balloon and free page reporting off the guest"),
    }
}
