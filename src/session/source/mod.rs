//! The source's session: does what the engine decides, on one thread.

mod counts;
mod handover;
mod metrics;
mod page_loop;
mod pages;
mod peer;
mod postcopy;
mod rates;
mod recovery;
mod return_path;
mod setup;
#[cfg(test)]
pub(super) mod skip_tests;
mod skips;
mod throttle;
mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::{
    Handover, Outcome, Pace, Sent, SourceAction, SourceConfig, SourceEngine, SourceEvent, Switchover,
    Throttler,
};
use crate::error::{Chain, Remedy};
use crate::guest::{DirtySource, GuestControl, GuestMemory, sync_all};
use crate::observe::{EventKind, SharedStatistics, Statistics, Status};
use crate::ram::{DirtyMap, RamBlockTable, RoundKind};
use crate::stream::qemu::section;
use crate::sys::{CancelToken, Stop};
use crate::transport::SourceConnection;

pub(super) use setup::described;

use crate::session::callback::{guarded, named, quietly};
use crate::session::config::SourceSettings;
use crate::session::control::Control;
use crate::session::handle::Canceller;
use crate::session::workers::Spawner;
use crate::session::{Breakage, Error, ErrorKind, shared_blocks};
use handover::Departure;
use metrics::Figures;
use pages::Pages;
use postcopy::Missing;
pub use recovery::{NewConnection, Reconnect, Redial};
use throttle::Convergence;
use wire::Wire;

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
pub(crate) trait Upstream: Send {
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
pub(crate) trait Clock: Send {
    /// Since the start of the migration.
    fn now(&self) -> Duration;
}

/// The machine's own clock.
pub(crate) struct WallClock(Instant);

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

/// What decides, when, and what the embedder wants: the engine and its inbox.
struct Driver {
    engine: SourceEngine,
    clock: Box<dyn Clock>,
    control: Control,
}

impl Driver {
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

    /// True if the engine has something else to do by now, or the time of its slice is over.
    fn is_called(&mut self) -> bool {
        let now = self.clock.now();
        self.tell_commands(now);
        self.engine.wake_at().is_some_and(|at| now >= at)
    }
}

/// The source's session before and while it runs.
pub struct SourceSession {
    guest: SourceGuest,
    wire: Wire,
    settings: SourceSettings,
    upstream: Option<Box<dyn Upstream>>,
    driver: Driver,
    pages: Pages,
    convergence: Convergence,
    figures: Figures,
    departure: Departure,
    missing: Missing,
    error: Option<Error>,
    breakage: Breakage,
}

impl SourceSession {
    /// A session over a connection that stands.
    pub fn new(guest: SourceGuest, connection: SourceConnection, mut settings: SourceSettings) -> Self {
        let table = guest.memory.table();
        shared_blocks::announce(&mut settings.configuration, table);
        let handover = if connection.back.is_some() { Handover::Shut } else { Handover::OneWay };
        let control = Control::new(&settings, connection.link.delta_cache_size());
        let page_bytes = table.page().bytes();
        let dirty = DirtyMap::new(table, settings.clear_shift);
        let pace = Pace::new(control.postcopy_bandwidth().clone());
        let throttle = Throttler::new(settings.throttling, settings.throttle_trigger_threshold);
        let engine = SourceEngine::new(engine_config(&settings, table, handover));
        Self {
            wire: Wire::new(connection, Stop::on(&control.canceller().token())),
            pages: Pages::new(dirty, Pace::new(control.bandwidth().clone()), page_bytes),
            driver: Driver { engine, clock: Box::new(WallClock::default()), control },
            convergence: Convergence::new(throttle),
            figures: Figures::new(table, SharedStatistics::default()),
            departure: Departure::default(),
            missing: Missing::new(Arc::clone(&guest.memory), pace),
            guest,
            settings,
            upstream: None,
            error: None,
            breakage: Breakage::default(),
        }
    }

    /// The guest is paused when `upstream` says that its own source stopped it.
    pub(crate) fn with_upstream(mut self, upstream: Box<dyn Upstream>) -> Self {
        self.upstream = Some(upstream);
        self.driver.engine.set_switchover(Switchover::WhenUpstreamStops);
        self.driver.control.guest_is_elsewhere();
        self
    }

    /// A token that the caller has already. A [`control`](Self::control) that was taken before cancels nothing any more.
    pub fn with_cancel(mut self, cancel: CancelToken) -> Self {
        self.wire.stop = Stop::on(&cancel);
        self.driver.control = self.driver.control.with_canceller(Canceller::over(cancel));
        self
    }

    /// Figures that the caller can see already.
    pub fn with_statistics(mut self, statistics: SharedStatistics) -> Self {
        self.figures = Figures::new(self.guest.memory.table(), statistics);
        self
    }

    /// Raise it to cancel. Refused, and said so, once COMMIT was sent.
    pub fn cancel_token(&self) -> CancelToken {
        self.driver.control.canceller().token()
    }

    /// Changes this migration while it runs.
    pub fn control(&self) -> Control {
        self.driver.control.clone()
    }

    /// Where its threads come from.
    pub(in crate::session) fn spawner(&self) -> Spawner {
        self.settings.spawner.clone()
    }

    /// The figures while it runs.
    pub fn statistics(&self) -> SharedStatistics {
        self.figures.shared()
    }

    /// Runs the migration to its end on this thread.
    pub fn run(mut self) -> SourceReport {
        self.driver.tell(SourceEvent::Begin);
        let outcome = loop {
            let event = match self.driver.engine.poll() {
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
            self.driver.tell(event);
        };
        self.report(outcome)
    }

    /// After COMMIT a cancel breaks no wait any more.
    fn refuse_cancel(&mut self) {
        if self.wire.stop.reason().is_some() && !self.breakage.is(Breakage::BreakOffAfterCommit) {
            self.wire.stop = Stop::never();
        }
        tracing::warn!("cancel refused: the destination owns the guest");
    }

    /// A panic of the embedder's code is a failure of the step.
    fn step_guarded(&mut self, step: impl FnOnce(&mut Self) -> Result<SourceEvent, Error>) -> SourceEvent {
        let done = if self.breakage.is(Breakage::DieOfPanic) {
            step(self)
        } else {
            let during = if self.driver.engine.is_committed() {
                "the guest is handed over"
            } else {
                "sending the guest"
            };
            guarded(during, || step(self)).unwrap_or_else(|error| {
                // Pages that were on their way from the map to the connection are in neither.
                self.pages.mark_all_unsent();
                Err(error)
            })
        };
        done.unwrap_or_else(|error| self.keep(error))
    }

    fn report(mut self, outcome: Outcome) -> SourceReport {
        let now = self.driver.clock.now();
        self.driver.control.connection().over();
        let given_away = matches!(outcome, Outcome::InDoubt | Outcome::Incomplete);
        if given_away && let Err(error) = self.stop_logs() {
            // The guest stands still: a log left on costs, and loses nothing.
            tracing::warn!(error = %Chain(&error), "a dirty log could not be stopped");
        }
        let position = self.wire.position();
        self.figures.position(position);
        self.figures.zero_copy(self.wire.link.zero_copy());
        self.figures.spliced(self.wire.link.spliced());
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
        let first_page_sent = self.figures.first_page();
        let (dirty, stands_still) = (self.pages.dirty, self.departure.paused);
        SourceReport { outcome, error: self.error, statistics, first_page_sent, dirty, stands_still }
    }

    /// The connection ends, then the guest may give pages back again.
    fn let_go(&mut self, outcome: Outcome) {
        if outcome == Outcome::Completed {
            let stop = Stop::never().within(self.settings.finish_timeout);
            if let Err(error) = self.wire.link.close(&stop) {
                tracing::warn!(error = %Chain(&error), "the migration is complete, but its connection did not end in good order");
            }
        }
        if self.wire.link.abilities().registers_memory {
            drop(self.wire.link.reclaim());
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
        let may_give_back =
            self.driver.engine.handover() == Handover::Shut || self.driver.engine.is_postcopy();
        let event = match &error {
            Error::PeerFailed { .. } if may_give_back => SourceEvent::Refused,
            error if error.kind() == ErrorKind::Channel || self.is_lost(error) => SourceEvent::Lost,
            _ => SourceEvent::Failed,
        };
        self.error.get_or_insert(error);
        event
    }

    fn perform(&mut self, action: SourceAction) -> Result<SourceEvent, Error> {
        let now = self.driver.clock.now();
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
                self.departure.paused = true;
                let paused = named("calling GuestControl::pause", || self.guest.control.pause());
                paused.map_err(|source| Error::Control { what: "pause", source })?;
                Ok(SourceEvent::Done)
            }
            SourceAction::Drain => {
                if !self.breakage.is(Breakage::SkipDrain) {
                    self.wire.link.drain(&self.wire.stop)?;
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
            SourceAction::Reconnect => self.reconnect(),
            SourceAction::CompareReceived => self.compare_received(),
            SourceAction::ResumePages => self.resume_pages(),
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
            self.wire.link.abilities().registers_memory && !self.breakage.is(Breakage::RegisterUnpromised);
        if registers && !self.guest.control.forbid_discard(true) {
            return Err(discards());
        }
        let counts_vcpus = !self.guest.control.vcpu_dirty_pages().is_empty();
        self.driver.control.guest_counts_vcpus(counts_vcpus)?;
        // First: should a log not start, nothing is at the destination.
        if self.settings.all_dirty_at_start {
            self.pages.dirty.set_all(self.guest.memory.table());
        }
        self.pages.skip_at_start(self.guest.memory.table(), self.breakage);
        for source in &self.guest.dirty {
            named("calling DirtySource::start", || source.start())?;
        }
        Ok(SourceEvent::Done)
    }

    fn stop_logs(&mut self) -> Result<SourceEvent, Error> {
        let stop =
            |source: &Arc<dyn DirtySource>| Ok(guarded("calling DirtySource::stop", || source.stop())??);
        // Every source is stopped, even if an earlier one refuses.
        let results: Vec<Result<(), Error>> = self.guest.dirty.iter().map(stop).collect();
        results.into_iter().collect::<Result<(), _>>()?;
        Ok(SourceEvent::Done)
    }

    fn sync(&mut self, last: bool) -> Result<SourceEvent, Error> {
        let began = self.driver.clock.now();
        self.check_layout()?;
        self.pages.skip_before_sync(self.breakage);
        self.figures.shared().tell(EventKind::SyncBegins { last });
        let fresh = sync_all(&self.guest.dirty, self.guest.memory.table(), &mut self.pages.dirty)?;
        self.pages.skip_after_sync(self.guest.memory.table(), last, self.breakage);
        let (hinted, discarded) = self.pages.skips.counts();
        self.figures.skipped(hinted, discarded);
        let dirty_pages = self.pages.dirty.count();
        let now = self.driver.clock.now();
        self.convergence.fixed.sync = now.saturating_sub(began);
        if !last {
            self.follow_control();
            self.throttle(fresh);
            self.estimate_fixed();
        }
        let expected = self.driver.engine.expected_downtime(dirty_pages);
        self.figures.synced(now, dirty_pages, fresh, expected);
        self.figures.shared().tell(EventKind::Synced { dirty_pages, last });
        Ok(SourceEvent::Synced { dirty_pages })
    }

    fn open_round(&mut self, kind: RoundKind, number: u32) -> Result<SourceEvent, Error> {
        self.figures.round(self.driver.clock.now(), number, self.pages.dirty.count());
        self.check_progress();
        let mut head = Vec::new();
        if kind == RoundKind::Final {
            setup::before_last_section(self, &mut head);
            section::encode_end(setup::RAM_SECTION_ID, &mut head);
        } else {
            section::encode_part(setup::RAM_SECTION_ID, &mut head);
        }
        self.wire.send(&head)?;
        self.wire.link.open_round(kind, &self.wire.stop)?;
        Ok(SourceEvent::Done)
    }

    fn close_round(&mut self, kind: RoundKind) -> Result<SourceEvent, Error> {
        let (begun, before, guest_before) =
            (Instant::now(), self.wire.position(), self.figures.whole_bytes());
        if !self.breakage.is(Breakage::SkipFence) {
            self.wire.link.close_round(kind, &self.wire.stop)?;
        }
        self.send_declined()?;
        let mut tail = crate::stream::qemu::ram::EOS_RECORD.to_vec();
        self.settings.framing.encode_footer(setup::RAM_SECTION_ID, &mut tail);
        self.wire.send(&tail)?;
        self.wire.link.sink().flush(&self.wire.stop)?;
        self.figures.fenced(begun.elapsed());
        self.take_returned()?;
        let mut writes = Vec::new();
        self.wire.link.take_latencies(&mut writes);
        self.figures.written(&writes);
        self.figures.deltas(self.wire.link.deltas());
        self.figures.channel_bytes(self.wire.link.channel_bytes());
        let sent = self.wire.position();
        let guest = self.figures.whole_bytes() - guest_before;
        self.driver.engine.set_sent_at_fence(Sent { guest, wire: sent - before });
        self.driver.engine.set_under_way(self.wire.link.under_way());
        self.figures.round_closed(self.driver.clock.now(), sent);
        Ok(SourceEvent::Done)
    }

    /// Before COMMIT: nothing is lost. Unsent and unconfirmed pages are dirty again, the guest runs.
    fn roll_back(&mut self) -> Result<SourceEvent, Error> {
        self.note_overdue();
        self.wire.stop = Stop::never();
        let confirms = self.wire.link.abilities().confirms_placement;
        let given_back = guarded("taking pages back", || self.wire.link.reclaim());
        if given_back.is_err() {
            self.pages.mark_all_unsent();
        }
        if !self.breakage.is(Breakage::ForgetUnsent) {
            let table = self.guest.memory.table();
            self.pages.give_back(given_back.unwrap_or_default(), confirms, table);
        }
        self.pages.skip_no_more(self.breakage);
        let leave_on = self.breakage.is(Breakage::LeaveLogsOn);
        let stopped = if leave_on { Ok(SourceEvent::Done) } else { self.stop_logs() };
        if !self.breakage.is(Breakage::LeaveThrottleOn) {
            self.end_throttling();
        }
        if self.departure.paused && !self.breakage.is(Breakage::StayPaused) {
            let resumed = guarded("calling GuestControl::resume", || self.guest.control.resume());
            let resumed = resumed.unwrap_or_else(|panic| Err(std::io::Error::other(panic)));
            if let Err(source) = resumed {
                // More urgent than what led here: somebody must look after the guest.
                let why =
                    self.error.take().map_or_else(|| "cancelled".into(), |error| Chain(&error).to_string());
                return Err(Error::StandsStill { why, source });
            }
            self.departure.paused = false;
        }
        stopped
    }
}

fn engine_config(settings: &SourceSettings, table: &RamBlockTable, handover: Handover) -> SourceConfig {
    let mut config = SourceConfig::new(table.page().bytes(), handover);
    config.downtime_limit = settings.downtime_limit;
    config.digest = settings.digest;
    config.timeout = settings.timeout;
    config.switchover_rate = settings.switchover_bandwidth;
    config.holds = settings.pause_before_switchover;
    config.postcopy = settings.postcopy.as_ref().map(|postcopy| postcopy.rule);
    config.longest_round = settings.throttling.map(|_| ROUND_TIMEOUT);
    config.answers = peer::answer_timeouts(settings, table);
    config
}

/// A guest that can't go by a link that registers its memory.
pub(super) fn discards() -> Error {
    Error::Config {
        what: "the guest does not promise to keep its memory in place while a NIC knows it".into(),
        remedy: Remedy::Advice("use a tcp: address, or take balloon and free page reporting off the guest"),
    }
}

/// What tests set that no caller may.
#[cfg(test)]
impl SourceSession {
    pub(in crate::session) fn count_time_by(&mut self, clock: Box<dyn Clock>) {
        self.driver.clock = clock;
    }

    pub(in crate::session) fn break_order(&mut self, breakage: Breakage) {
        self.breakage = breakage;
    }

    pub(in crate::session) fn guest_mut(&mut self) -> &mut SourceGuest {
        &mut self.guest
    }

    pub(in crate::session) fn settings_mut(&mut self) -> &mut SourceSettings {
        &mut self.settings
    }

    pub(in crate::session) fn connect(&mut self, connection: SourceConnection) {
        self.wire = Wire::new(connection, self.wire.stop.clone());
    }

    /// No answers come any more.
    pub(in crate::session) fn hang_up(&mut self) {
        self.wire.back = None;
    }

    pub(in crate::session) fn into_parts(self) -> (SourceGuest, SourceSettings) {
        (self.guest, self.settings)
    }
}
