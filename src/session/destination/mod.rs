//! The destination's session: reads the stream, puts pages in place, and starts the guest once it is ours.

mod advised;
pub(super) mod arrivals;
mod counts;
mod digests;
mod driver;
mod figures;
mod fingerprints;
mod ingest;
mod keepalive;
mod mapper;
mod observer;
mod owner;
mod passing;
mod placing;
mod postcopy;
mod preempt;
mod provider;
mod reader;
mod reads;
mod receive;
mod recovery;
mod relayed;
mod report;
mod resume;
mod return_path;
mod round;
mod sections;
mod skipped;
mod switch;
mod wire;

use std::time::Duration;

use crate::engine::{DestinationAction, DestinationEngine, DestinationEvent};
use crate::error::Chain;
use crate::guest::load_state;
use crate::observe::SharedStatistics;
use crate::stream::native::Answer;
use crate::stream::qemu::incoming::{IncomingConfig, StreamLimits};
use crate::stream::qemu::own_devices::own_state;
use crate::stream::qemu::return_path::Message;
use crate::sys::{CancelToken, MissingFaults, Stop};
use crate::transport::{ChannelError, DestinationConnection};

use crate::session::callback::{guarded, named};
use crate::session::config::DestinationSettings;
use crate::session::digest::{Digest, carried};
use crate::session::handle::Canceller;
use crate::session::workers::Spawner;
use crate::session::{Breakage, Error};
use arrivals::Connections;
use counts::SourceReports;
use driver::Driver;
use figures::Figures;
use ingest::Ingest;
use keepalive::Keepalive;
pub(crate) use observer::IncomingObserver;
pub use postcopy::MissingPages;
pub(super) use provider::same_blocks;
pub use provider::{DestinationGuest, Incoming, MemoryProvider, Zeroed};
use reader::StreamReader;
use receive::out_of_turn;
pub use recovery::NextConnection;
pub(crate) use relayed::{Switched, ToSource};
pub use report::DestinationReport;
use resume::{Accepts, Resumption};
#[cfg(test)]
pub(super) use resume::{BothWays, Further};
use switch::Switch;
use wire::Wire;

/// The destination's session before and while it runs.
pub struct DestinationSession {
    wire: Wire,
    guest: DestinationGuest,
    settings: DestinationSettings,
    driver: Driver,
    ingest: Ingest,
    switch: Switch,
    resumption: Resumption,
    /// What the source has reported about itself and about the pages it sent.
    reported: SourceReports,
    figures: Figures,
    keepalive: Keepalive,
    error: Option<Error>,
    breakage: Breakage,
}

impl DestinationSession {
    /// A session over an established connection.
    pub fn new(
        guest: DestinationGuest,
        connection: DestinationConnection,
        settings: DestinationSettings,
    ) -> Self {
        let driver = Driver::new(DestinationEngine::new(settings.finish_timeout));
        Self {
            guest,
            wire: Wire::new(connection, &driver.cancel_token()),
            keepalive: Keepalive::new(settings.stall_timeout),
            settings,
            driver,
            ingest: Ingest::default(),
            switch: Switch::default(),
            resumption: Resumption::default(),
            reported: SourceReports::default(),
            figures: Figures::new(SharedStatistics::default()),
            error: None,
            breakage: Breakage::default(),
        }
    }

    /// `arrival` observes pages as they arrive.
    pub(crate) fn with_incoming_observer(mut self, observer: Box<dyn IncomingObserver>) -> Self {
        self.ingest.set_observer(observer);
        self
    }

    /// Where a source connects again after the connection was lost in postcopy: then nothing is lost. Without it such a
    /// loss ends the migration, [`Ending::Incomplete`](crate::session::Ending::Incomplete). Before the guest runs here it
    /// does so as well, if [`reconnect_timeout`](DestinationSettings::reconnect_timeout) is set and the source is a ramwire
    /// that does.
    ///
    /// It also provides the connection for urgent pages, which a QEMU with the capability postcopy-preempt opens: no
    /// setting announces that connection. So it may be called while the first connection is in use, by another thread.
    pub fn with_next_connection(mut self, next: Box<dyn NextConnection>) -> Self {
        self.switch.may_reconnect(Connections::new(next));
        self.resumption.accept_from(Box::new(Accepts(self.switch.next().clone())));
        self
    }

    /// Where the source of a relay makes its connection for urgent pages. The loss of a connection is an end there.
    pub(crate) fn with_urgent_connection(self, next: Box<dyn NextConnection>) -> Self {
        self.switch.takes_urgent_from(Connections::new(next));
        self
    }

    /// The userfaultfd by which missing pages are served after a switch to postcopy, in place of one that the session
    /// makes when the source announces that it may switch: for a process that has given up the right to make one.
    pub fn with_missing_faults(mut self, faults: MissingFaults) -> Self {
        self.switch.hand_in(faults);
        self
    }

    /// Figures that the caller can read already.
    pub fn with_statistics(mut self, statistics: SharedStatistics) -> Self {
        self.figures = Figures::new(statistics);
        self
    }

    /// A token that the caller has already.
    pub fn with_cancel(mut self, cancel: CancelToken) -> Self {
        self.wire.stop = Stop::on(&cancel);
        self.driver.cancelled_by(cancel);
        self
    }

    /// Raise it to cancel; without effect from READY on, when the source may give the guest away.
    pub fn cancel_token(&self) -> CancelToken {
        self.driver.cancel_token()
    }

    /// Asks this session for its end while it runs; of the token that it has now.
    pub fn canceller(&self) -> Canceller {
        self.driver.canceller()
    }

    /// The source of its threads.
    pub(in crate::session) fn spawner(&self) -> Spawner {
        self.settings.spawner.clone()
    }

    /// Leaves out an order, in tests.
    pub(in crate::session) fn break_order(&mut self, breakage: Breakage) {
        self.breakage = breakage;
    }

    /// The figures while it runs.
    pub fn statistics(&self) -> SharedStatistics {
        self.figures.shared()
    }
}

impl DestinationSession {
    /// Runs the migration to its end on this thread.
    pub fn run(mut self) -> DestinationReport {
        let config = IncomingConfig {
            limits: StreamLimits {
                ram_bytes: self.settings.max_ram,
                tail_bytes: usize::try_from(self.settings.max_state).unwrap_or(usize::MAX),
                package_bytes: u32::try_from(self.settings.max_state).unwrap_or(u32::MAX),
                ..StreamLimits::default()
            },
            accept_hooks: self.wire.link.abilities().has_rounds,
            ..IncomingConfig::default()
        };
        let mut reader = StreamReader::new(config);
        self.figures.begin();
        self.await_memory();
        let ending = loop {
            let event = match self.driver.engine.poll() {
                Some(DestinationAction::Finish(ending)) => break ending,
                Some(action) => {
                    tracing::trace!(?action, at = reader.at, "perform");
                    self.perform_guarded(action, &mut reader)
                        .unwrap_or_else(|error| self.keep(error, &reader))
                }
                None => DestinationEvent::Failed,
            };
            self.tell(event, &reader);
        };
        self.report(ending, reader.at)
    }

    /// A step failed.
    fn keep(&mut self, error: Error, reader: &StreamReader) -> DestinationEvent {
        if self.switch.relayed().is_some() {
            tracing::warn!(error = %Chain(&error), at = reader.at, "the source, after its switch");
            self.ingest.settle();
        }
        // The kernel's answer for memory that it has lost names no block.
        let error = self.ingest.lost_memory().err().unwrap_or(error);
        let error = self.postcopy_failure(error);
        tracing::warn!(error = %Chain(&error), at = reader.at, "destination failed");
        let overdue = error.is_deadline() && self.driver.time_left() == Some(Duration::ZERO);
        let lost = error.is_of_connection() && self.may_resume();
        let left = self.reported.left;
        self.error.get_or_insert(error);
        if let Some(event) = self.relayed_loss() {
            return event;
        }
        if self.has_read_all() {
            self.driver.engine.all_pages_came();
        }
        let survives = self.switch.survives_disconnect(self.may_recover());
        // The thread that loads the device state may have failed in the meantime.
        if !survives && let Some(error) = self.error.take() {
            self.error = Some(self.postcopy_failure(error));
        }
        match () {
            () if survives => DestinationEvent::Lost,
            () if overdue => DestinationEvent::Woken,
            () if lost => DestinationEvent::Lost,
            () if left => DestinationEvent::SourceLeft,
            () => DestinationEvent::Failed,
        }
    }

    /// Reports the result of the last action to the engine.
    fn tell(&mut self, event: DestinationEvent, reader: &StreamReader) {
        self.driver.engine.set_recoverable(self.may_recover());
        self.driver.engine.set_resumable(self.may_resume());
        if self.driver.tell(event) {
            self.error.get_or_insert(Error::Cancelled);
        }
        if self.driver.engine.is_failing() {
            self.error.get_or_insert_with(|| {
                let at = reader.stream.position();
                out_of_turn(&format!("{event:?}"), "something else was due").at(at)
            });
        }
        if self.driver.engine.is_committed() {
            // The guest is ours: no cancel breaks it off any more.
            self.wire.stop = match self.switch.relayed() {
                // Only the last word is left.
                Some(_) if self.driver.engine.is_whole() => Stop::never(),
                Some(_) => Stop::on(&self.ingest.source_ends()),
                None => self.switch.stop_after_commit(),
            };
        }
    }

    /// A panic of the embedder's code is a failure of the step.
    fn perform_guarded(
        &mut self,
        action: DestinationAction,
        reader: &mut StreamReader,
    ) -> Result<DestinationEvent, Error> {
        if self.breakage.is(Breakage::DieOfPanic) {
            return self.perform(action, reader);
        }
        guarded("receiving the guest", || self.perform(action, reader)).unwrap_or_else(Err)
    }

    /// Lets the guest run. A start that panics may have begun: the guest is stopped again before the failure is
    /// reported.
    fn start_guest(&mut self) -> Result<DestinationEvent, Error> {
        let panic = match guarded("calling GuestControl::resume", || self.guest.control.resume()) {
            Ok(Ok(())) => return Ok(DestinationEvent::Done),
            Ok(Err(source)) => return Err(Error::Control { what: "resume", source }),
            Err(panic) => panic,
        };
        let stopped = self.breakage.is(Breakage::TrustPanickedStart)
            || matches!(guarded("calling GuestControl::pause", || self.guest.control.pause()), Ok(Ok(())));
        if stopped {
            return Err(panic);
        }
        tracing::error!(error = %panic, "whether the guest runs here is not known");
        self.error.get_or_insert(panic);
        Ok(DestinationEvent::MayRun)
    }

    fn perform(
        &mut self,
        action: DestinationAction,
        reader: &mut StreamReader,
    ) -> Result<DestinationEvent, Error> {
        match action {
            DestinationAction::Receive => {
                if let Some(left) = self.driver.time_left() {
                    self.wire.stop = Stop::never().within(left);
                }
                return self.receive(reader);
            }
            DestinationAction::MakeDigest => {
                let ours = self.with_keepalive(Self::make_digest)?;
                self.reported.digests.made(ours);
            }
            DestinationAction::CompareDigest => {
                let memory = self.ingest.memory()?;
                self.reported.digests.compare(memory.table(), self.breakage)?;
            }
            DestinationAction::LoadState => {
                // A decompressor reports only at its end that its output was damaged.
                self.wire.link.stream().check_writer(&self.wire.stop)?;
                self.ingest.lost_memory()?;
                if let Some(incoming) = self.ingest.all_received(*reader.stream.seen()) {
                    named("calling MemoryProvider::arrived", || {
                        self.guest.memory.arrived(incoming, self.driver.engine.is_native())
                    });
                }
                let framing = reader.stream.seen().framing;
                let unwraps = !self.settings.raw_device_state;
                self.resumption.loads();
                let loaded = self.with_keepalive(|session| {
                    let state = session.ingest.state();
                    let own = own_state(state, framing).filter(|_| unwraps);
                    load_state(session.guest.control.as_mut(), own.unwrap_or(state))
                });
                loaded.map_err(|source| Error::Control { what: "load its device state", source })?;
            }
            DestinationAction::Listen => self.listen(&reader.stream)?,
            DestinationAction::AwaitRecovery if self.is_before_the_guest() => {
                return self.await_source(reader);
            }
            DestinationAction::AwaitRecovery => self.await_recovery(reader)?,
            DestinationAction::AwaitGuest => self.await_guest()?,
            DestinationAction::SendReady => {
                // From here on the source may hand the guest over at any moment: a cancel could only leave it in doubt.
                // The wait ends by its message, the connection's end, or a timeout.
                self.check_passed()?;
                self.wire.stop = Stop::never();
                // COMMIT may come late, after an outage. Longer than the engine's time, which so ends the wait.
                self.wire.link.stream().tolerate_outage(self.settings.finish_timeout.saturating_mul(2));
                self.send_message(Message::Native(Answer::Ready))?;
                if self.breakage.is(Breakage::ResumeBeforeCommit) {
                    let _ = self.guest.control.resume();
                }
            }
            DestinationAction::Resume => {
                // Nothing else writes to its memory any more.
                self.wire.link.revoke();
                return self.start_guest();
            }
            DestinationAction::SendRunning => {
                let native = self.driver.engine.is_native();
                let running = Message::Native(Answer::Running);
                self.send_message(if native { running } else { Message::Shut { status: 0 } })?;
                self.await_acknowledgement()?;
            }
            DestinationAction::AwaitMemoryCheck => self.await_memory_check(reader),
            DestinationAction::SendFailed => {
                // A source that receives it may resume its guest.
                self.give_up_guest();
                self.send_failed()?;
            }
            DestinationAction::Finish(_) => {}
        }
        Ok(DestinationEvent::Done)
    }

    fn make_digest(&mut self) -> Result<Digest, Error> {
        let memory = self.ingest.memory()?;
        let incoming = self.ingest.incoming();
        let carried = incoming
            .map(|i| carried(i.seen.framing, (&i.configuration, &i.vmm_configuration), &i.early_sections))
            .unwrap_or_default();
        let stop = &self.wire.stop;
        let unsent = self.reported.unsent.clone();
        Digest::make((&memory, unsent), &carried, self.ingest.state(), &self.settings.spawner, || {
            let stopped = |reason| ChannelError::Stopped { reason, doing: "making the digest" };
            stop.reason().map_or(Ok(()), |reason| Err(stopped(reason).into()))
        })
    }

    pub(super) fn send_message(&mut self, message: Message<'_>) -> Result<(), Error> {
        if !self.reported.return_path {
            return Ok(());
        }
        Ok(self.wire.answer(message, self.settings.stall_timeout)?)
    }

    fn send_failed(&mut self) -> Result<(), Error> {
        // A cancel must not keep us from saying so.
        self.wire.stop = Stop::never();
        let why = self.error.as_ref().map(|error| Chain(error).to_string()).unwrap_or_default();
        if self.driver.engine.is_native() || self.reported.greeted {
            return self.send_message(Message::Native(Answer::Refused { why: &why }));
        }
        self.send_message(Message::Shut { status: 1 })
    }
}

/// What tests set that no caller may.
#[cfg(test)]
impl DestinationSession {
    pub(in crate::session) fn settings_mut(&mut self) -> &mut DestinationSettings {
        &mut self.settings
    }

    pub(in crate::session) fn arrive_in(&mut self, provider: Box<dyn MemoryProvider>) {
        self.guest.memory = provider;
    }

    pub(in crate::session) fn control_by(&mut self, control: Box<dyn crate::guest::GuestControl>) {
        self.guest.control = control;
    }

    pub(in crate::session) fn keep_alive_every(&mut self, interval: Duration) {
        self.keepalive.every(interval);
    }
}
