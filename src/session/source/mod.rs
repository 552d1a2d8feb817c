//! The source's session: does what the engine decides, on one thread.

mod behind;
mod counts;
mod driver;
mod ending;
mod filling;
mod fingerprints;
mod handover;
mod metrics;
mod outage;
mod page_loop;
mod pages;
mod passing;
mod peer;
mod postcopy;
mod rates;
mod received;
mod recovery;
mod redial;
mod release;
mod resume;
mod return_path;
mod rounds;
mod served;
mod setup;
#[cfg(test)]
pub(super) mod skip_tests;
mod skips;
mod spread;
mod throttle;
mod urgent;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use crate::engine::{
    Handover, Pace, SourceAction, SourceConfig, SourceEngine, SourceEvent, Switchover, Throttler, Waiting,
};
use crate::error::{Chain, Remedy};
use crate::guest::{DirtySource, GuestControl, GuestMemory};
use crate::observe::SharedStatistics;
use crate::ram::{DirtyMap, RamBlockTable};
use crate::sys::{CancelToken, Stop};
use crate::transport::SourceConnection;

pub(super) use behind::Behind;
pub(crate) use driver::{Clock, WallClock};
pub use ending::SourceReport;
pub(super) use setup::{RAM_SECTION_ID, announcements, described};

use crate::session::callback::{guarded, named, quietly};
use crate::session::config::{SourceSettings, Verify};
use crate::session::control::Control;
use crate::session::handle::Canceller;
use crate::session::workers::Spawner;
use crate::session::{Breakage, Error, ErrorKind, shared_blocks};
use driver::Driver;
use filling::Missing;
use handover::Departure;
use metrics::Figures;
use pages::Pages;
use peer::LastWord;
pub use redial::{NewConnection, Reconnect, Redial};
use throttle::Convergence;
use wire::Wire;

/// Interval at which a guest that may be throttled is checked, however long a round takes.
const ROUND_TIMEOUT: Duration = Duration::from_secs(5);

/// A guest to be moved.
pub struct SourceGuest {
    /// Its memory.
    pub memory: Arc<dyn GuestMemory>,
    /// All sources of information about writes to it; each sync ORs all. None only where
    /// [`guest_is_paused`](SourceSettings::guest_is_paused).
    pub dirty: Vec<Arc<dyn DirtySource>>,
    /// Pause, resume, device state.
    pub control: Box<dyn GuestControl>,
}

/// What became of a guest at its own source.
pub(in crate::session) enum News {
    /// It is still there.
    None,
    /// It is paused, and its last page has arrived.
    Stopped,
    /// It is paused, and runs at our peer next, while pages are missing.
    Switched(Box<dyn Behind>),
}

/// A guest's own source, upstream of a relay: reports when it has stopped its guest.
pub(in crate::session) trait Upstream: Send {
    /// Waits at most `time` for news.
    ///
    /// # Errors
    /// The error that ended the upstream migration.
    fn wait(&mut self, time: Duration) -> Result<News, Error>;

    /// The peer has everything and may be given the guest, in the way `handover`: waits at most `time` until its source
    /// has handed it over to us. True once it is ours.
    ///
    /// # Errors
    /// The error that ended the upstream migration: the guest continues there.
    fn wait_for_ownership(&mut self, handover: Handover, time: Duration) -> Result<bool, Error>;

    /// The peer was given the guest and has not reported in time that it runs; `why` is the reason.
    fn far_end_is_silent(&mut self, _why: &Error) {}

    /// In doubt: true while a late answer of the peer is still of use.
    fn still_listens(&mut self) -> bool {
        false
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
    /// A session over an established connection.
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

    /// The guest is paused when `upstream` reports that its own source stopped it.
    pub(in crate::session) fn with_upstream(mut self, upstream: Box<dyn Upstream>) -> Self {
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

    /// Figures that the caller can read already.
    pub fn with_statistics(mut self, statistics: SharedStatistics) -> Self {
        self.figures = Figures::new(self.guest.memory.table(), statistics);
        self
    }

    /// Raise it to cancel. Refused, with a report, once COMMIT was sent.
    pub fn cancel_token(&self) -> CancelToken {
        self.driver.control.canceller().token()
    }

    /// Changes this migration while it runs.
    pub fn control(&self) -> Control {
        self.driver.control.clone()
    }

    /// The source of its threads.
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

    fn keep(&mut self, error: Error) -> SourceEvent {
        tracing::warn!(error = %Chain(&error), "migration step failed");
        if let Some(why) = self.why_parted() {
            // The peer has refused nothing: it may have the guest.
            self.error.get_or_insert(why);
            return SourceEvent::Lost;
        }
        // The kernel's answer for memory that it has lost names no block.
        let error = if error.kind() == ErrorKind::Cancelled {
            error
        } else {
            self.check_layout().err().unwrap_or(error)
        };
        let broken = error.kind() == ErrorKind::Channel;
        let error = match broken.then(|| self.last_word()).flatten() {
            Some(LastWord::Running) => return SourceEvent::Running,
            Some(LastWord::Failed(error)) => error,
            None => self.blame_channels(error),
        };
        let may_give_back =
            self.driver.engine.handover() == Handover::Shut || self.driver.engine.is_postcopy();
        let at_the_end = self.driver.engine.waits_for() == Some(Waiting::Running);
        let event = match &error {
            Error::PeerFailed { .. } if may_give_back => SourceEvent::Refused,
            _ if at_the_end && self.breakage.is(Breakage::EndUnheard) => SourceEvent::Failed,
            error if self.is_lost(error) => SourceEvent::Lost,
            _ => SourceEvent::Failed,
        };
        self.error.get_or_insert(error);
        event
    }

    fn perform(&mut self, action: SourceAction) -> Result<SourceEvent, Error> {
        let now = self.driver.clock.now();
        match action {
            // Too late to cancel, and no reason to.
            SourceAction::Commit
            | SourceAction::ReportSilence
            | SourceAction::Release
            | SourceAction::CheckMemory => {
                quietly("reporting a step", || self.figures.step(now, action));
            }
            _ => self.figures.step(now, action),
        }
        match action {
            SourceAction::StartLogs => self.start_logs(),
            SourceAction::SendHeader => self.greet(),
            SourceAction::SendSetup => self.send_setup(),
            SourceAction::OpenUrgent => self.open_urgent(),
            SourceAction::Sync { last } => self.sync(last),
            SourceAction::OpenRound { kind, number } => self.open_round(kind, number),
            SourceAction::Send => self.send_slice(),
            SourceAction::CloseRound { kind } => self.close_round(kind),
            SourceAction::PauseGuest => {
                // Counts as paused from here on, whatever the VMM returns: a failed pause is undone by resume as well.
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
            SourceAction::ResumeGuest => self.let_guest_run(),
            SourceAction::Reconnect => self.reconnect(),
            SourceAction::AskReceived => self.ask_received(),
            SourceAction::CompareReceived if self.driver.engine.is_postcopy() => self.compare_received(),
            SourceAction::CompareReceived => self.compare_held(),
            SourceAction::ResumePages => self.resume_pages(),
            SourceAction::Commit => self.commit(),
            SourceAction::ReportSilence => self.report_silence(),
            SourceAction::Release => {
                self.end_throttling();
                self.release_all();
                self.stop_logs()
            }
            SourceAction::CheckMemory => self.check_memory(),
            SourceAction::RollBack => self.roll_back(),
            SourceAction::RefuseCancel | SourceAction::Finish(_) => Ok(SourceEvent::Done),
        }
    }
}

fn engine_config(settings: &SourceSettings, table: &RamBlockTable, handover: Handover) -> SourceConfig {
    let mut config = SourceConfig::new(table.page().bytes(), handover);
    config.downtime_limit = settings.downtime_limit;
    config.digest = settings.verify == Verify::Full;
    config.memory_check = settings.verify == Verify::Fast;
    config.timeout = settings.timeout;
    config.switchover_rate = settings.switchover_bandwidth;
    config.holds = settings.pause_before_switchover;
    config.postcopy = settings.postcopy.as_ref().map(|postcopy| postcopy.rule);
    config.urgent = urgent::time_of(settings);
    config.longest_round = settings.throttling.map(|_| ROUND_TIMEOUT);
    config.answers = peer::answer_timeouts(settings, table);
    config
}

/// A guest that can't go by a link that registers its memory.
pub(super) fn discards() -> Error {
    Error::Config {
        what: "the guest may discard memory that is registered with a NIC".into(),
        remedy: Remedy::Advice("use a tcp: address, or remove the guest's balloon and free page reporting"),
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
