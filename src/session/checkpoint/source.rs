//! The source's session: does what the engine decides, on one thread.

mod sending;
mod standby_link;
mod to_qemu;
mod to_ramwire;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, bounded};

use self::sending::{Limit, error_of, one_way, out_of_turn};
pub use self::to_qemu::ColoPeer;
use self::to_qemu::ToQemu;
use self::to_ramwire::ToRamwire;
use super::inbox::Inbox;
use super::{CheckpointObserver, CheckpointReport, CheckpointSettings, Lease, refuse_ignored, refuse_short};
use crate::engine::{
    CheckpointAction, CheckpointConfig, CheckpointEngine, CheckpointEvent, CheckpointOutcome,
};
use crate::error::{Chain, Remedy};
use crate::guest::{GuestMemory, sync_all};
use crate::observe::Latency;
use crate::page::PageSearch;
use crate::ram::{ClearShift, DirtyMap, PageBatch};
use crate::session::callback::{guarded, named};
use crate::session::{Error, SourceGuest};
use crate::stream::checkpoints::StandbyMessage;
use crate::sys::{Stop, since_boot};
use crate::transport::StreamChannel;
use standby_link::Standby;

/// A guest that is to be protected by a standby ([`StandbySession`](crate::session::StandbySession)).
pub struct CheckpointSession {
    guest: SourceGuest,
    standby: Box<dyn Standby>,
    observer: Box<dyn CheckpointObserver>,
    settings: CheckpointSettings,
    inbox: Arc<Inbox<CheckpointEvent>>,
    lease: Lease,
}

impl CheckpointSession {
    /// Protects `guest` over a connection in both directions. `observer` learns which checkpoints are safe.
    ///
    /// # Errors
    /// [`Error::Config`] for a guest without dirty sources, with memory that is left out, or with a lease that is too short.
    pub fn new(
        guest: SourceGuest,
        channel: StreamChannel,
        observer: Box<dyn CheckpointObserver>,
        settings: CheckpointSettings,
    ) -> Result<Self, Error> {
        let standby = Box::new(ToRamwire::new(channel));
        Self::checked(guest, standby, observer, settings)
    }

    fn checked(
        guest: SourceGuest,
        standby: Box<dyn Standby>,
        observer: Box<dyn CheckpointObserver>,
        settings: CheckpointSettings,
    ) -> Result<Self, Error> {
        if guest.dirty.is_empty() {
            return Err(Error::Config {
                what: "no dirty source: a checkpoint would not know what the guest has written".into(),
                remedy: Remedy::Advice("give a source for each of its writers"),
            });
        }
        refuse_ignored(&*guest.memory)?;
        refuse_short(settings.lease)?;
        let (inbox, lease) = (Arc::default(), Lease::default());
        Ok(Self { guest, standby, observer, settings, inbox, lease })
    }

    /// Protects `guest` by the QEMU at the other end of `channel`, which waits with `-incoming` and its capability x-colo on
    /// (COLO). `peer` is what it is told. The device state is as QEMU reads it: FULL sections, an end of file, and a VM
    /// description, which is sent with checkpoint 1 only.
    ///
    /// A QEMU runs its own copy of the guest between checkpoints, and knows no leases. It can't be told that the protection
    /// ended: its operator ends it.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::Config`] for a lease.
    pub fn to_qemu(
        guest: SourceGuest,
        channel: StreamChannel,
        observer: Box<dyn CheckpointObserver>,
        settings: CheckpointSettings,
        peer: ColoPeer,
    ) -> Result<Self, Error> {
        if settings.lease.is_some() {
            return Err(Error::Config {
                what: "a QEMU at the other end knows no leases".into(),
                remedy: Remedy::Advice("leave the lease out (CheckpointSettings::lease)"),
            });
        }
        let standby = Box::new(ToQemu::new(channel, Arc::clone(&guest.memory), peer));
        Self::checked(guest, standby, observer, settings)
    }

    /// Governs a lease that the VMM's threads know already: those that run the guest, and let out what it sends.
    #[must_use]
    pub fn with_lease(self, lease: Lease) -> Self {
        Self { lease, ..self }
    }

    /// Protects the guest on a thread `ramwire-ckpt` of the settings' spawner.
    ///
    /// # Errors
    /// [`Error::Thread`]; the guest was not touched.
    pub fn spawn(self) -> Result<CheckpointHandle, Error> {
        let (give, report) = bounded(1);
        let (spawner, inbox) = (self.settings.spawner.clone(), Arc::clone(&self.inbox));
        let job = move || {
            // Without a receiver the report is no longer needed.
            let _ = give.send(Running::new(self).run());
        };
        drop(spawner.spawn("ramwire-ckpt", Box::new(job))?);
        Ok(CheckpointHandle { inbox, report })
    }
}

/// A guest that is protected. Dropping the handle ends the protection.
#[must_use = "dropping the handle ends the protection"]
pub struct CheckpointHandle {
    inbox: Arc<Inbox<CheckpointEvent>>,
    report: Receiver<CheckpointReport>,
}

impl CheckpointHandle {
    /// Wants a checkpoint now: it is taken as soon as the one before is safe.
    pub fn checkpoint(&self) {
        self.inbox.put(CheckpointEvent::Demand);
    }

    /// Ends the protection: the standby forgets the guest, which runs on here. A checkpoint that is under way is finished
    /// before.
    pub fn stop(&self) {
        self.inbox.put(CheckpointEvent::Stop);
    }

    /// True once [`wait`](Self::wait) would not wait.
    pub fn is_finished(&self) -> bool {
        !self.report.is_empty()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// [`Error::Thread`] if the thread died without a report, by a fault of this library.
    pub fn wait(self) -> Result<CheckpointReport, Error> {
        self.report.recv().map_err(|_| Error::Thread {
            name: "ramwire-ckpt",
            source: io::Error::other("it ended without a report, which is a fault of this library"),
        })
    }
}

impl Drop for CheckpointHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The pages that are dirty.
struct Pages {
    dirty: DirtyMap,
    search: PageSearch,
    batch: PageBatch,
}

#[derive(Default)]
struct Figures {
    safe: u64,
    pages: u64,
    /// Pages of the checkpoint that is sent.
    in_checkpoint: u64,
    first_bytes: u64,
    pauses: Latency,
    fences: u64,
    paused_at: Option<Instant>,
    not_resumed: bool,
}

struct Running {
    guest: SourceGuest,
    standby: Box<dyn Standby>,
    observer: Box<dyn CheckpointObserver>,
    settings: CheckpointSettings,
    inbox: Arc<Inbox<CheckpointEvent>>,
    engine: CheckpointEngine,
    pages: Pages,
    figures: Figures,
    lease: Lease,
    /// Since the machine's start.
    begun: Duration,
    error: Option<Error>,
}

impl Running {
    fn new(session: CheckpointSession) -> Self {
        let CheckpointSession { guest, standby, observer, settings, inbox, lease } = session;
        let table = guest.memory.table();
        let config = CheckpointConfig {
            interval: settings.interval,
            live_rounds: settings.live_rounds,
            live_pages: settings.live_bytes / table.page().bytes(),
            confirm_timeout: settings.confirm_timeout,
            lease: settings.lease,
        };
        let dirty = DirtyMap::new(table, ClearShift::default());
        Self {
            engine: CheckpointEngine::new(config),
            pages: Pages { dirty, search: PageSearch::default(), batch: PageBatch::default() },
            guest,
            standby,
            observer,
            settings,
            inbox,
            figures: Figures::default(),
            lease,
            begun: since_boot(),
            error: None,
        }
    }

    fn run(mut self) -> CheckpointReport {
        self.tell(CheckpointEvent::Begin);
        loop {
            for command in self.inbox.take() {
                self.tell(command);
            }
            if let Err(error) = self.renew() {
                self.failed(error, CheckpointEvent::Failed);
            }
            let action = self.engine.poll();
            self.publish();
            match action {
                Some(CheckpointAction::Finish(outcome)) => return self.report(outcome),
                Some(action) => {
                    let done = guarded("a checkpoint is taken", || self.perform(action));
                    match done.and_then(|done| done) {
                        Ok(event) => self.tell(event),
                        Err(error) => self.failed(error, CheckpointEvent::Failed),
                    }
                }
                None => self.wait(),
            }
        }
    }

    fn tell(&mut self, event: CheckpointEvent) {
        self.engine.handle(self.now(), event);
        self.publish();
    }

    /// On a clock that a suspended machine does not stop: a lease runs out meanwhile.
    fn now(&self) -> Duration {
        since_boot().saturating_sub(self.begun)
    }

    fn publish(&self) {
        self.lease.set(self.engine.may_run_until().map(|until| self.begun.saturating_add(until)));
    }

    /// A standby that has taken the guest closes the connection: its last message says so.
    fn failed(&mut self, error: Error, event: CheckpointEvent) {
        tracing::warn!(error = %Chain(&error), "a checkpoint failed");
        self.error.get_or_insert(error);
        self.tell(event);
        while !self.standby.is_silent() {
            match self.standby.next(&Stop::never().within(Duration::ZERO)) {
                Ok(Some(message)) => self.answered(message),
                Ok(None) | Err(_) => break,
            }
        }
        if event == CheckpointEvent::Lost {
            self.standby.forget_answers();
        }
    }

    fn answered(&mut self, message: StandbyMessage) {
        match message {
            StandbyMessage::Confirm(number) => self.tell(CheckpointEvent::Confirmed(number)),
            StandbyMessage::Taken(_) => self.tell(CheckpointEvent::Taken),
            StandbyMessage::Grant(number) => self.tell(CheckpointEvent::Granted(number)),
            StandbyMessage::Discarded => self.tell(CheckpointEvent::Discarded),
            StandbyMessage::Released => self.tell(CheckpointEvent::Released),
            // Only where it is waited for.
            StandbyMessage::Ready => {
                self.error.get_or_insert(out_of_turn());
                self.tell(CheckpointEvent::Lost);
            }
        }
    }

    /// Until the standby answers, it is time for something, or the embedder commands.
    fn wait(&mut self) {
        let stop = Stop::on(&self.inbox.wake());
        let stop = match self.engine.wake_at() {
            Some(at) => stop.within(at.saturating_sub(self.now())),
            None => stop,
        };
        self.listen(&stop);
        self.tell(CheckpointEvent::Time);
    }

    /// Takes one message, if one comes.
    fn listen(&mut self, stop: &Stop) {
        if self.standby.is_silent() {
            self.error.get_or_insert(one_way());
            return self.tell(CheckpointEvent::Lost);
        }
        match self.standby.next(stop) {
            Ok(Some(message)) => self.answered(message),
            Ok(None) => {}
            Err(error) => self.failed(error, CheckpointEvent::Lost),
        }
    }

    fn perform(&mut self, action: CheckpointAction) -> Result<CheckpointEvent, Error> {
        match action {
            CheckpointAction::StartLogs => {
                self.pages.dirty.set_all(self.guest.memory.table());
                for source in &self.guest.dirty {
                    named("calling DirtySource::start", || source.start())?;
                }
            }
            CheckpointAction::Greet => self.greet()?,
            CheckpointAction::Open(number) => {
                self.figures.in_checkpoint = 0;
                let limit = self.limit();
                self.standby.open(number, &limit)?;
            }
            CheckpointAction::Sync => {
                sync_all(&self.guest.dirty, self.guest.memory.table(), &mut self.pages.dirty)?;
                return Ok(CheckpointEvent::Synced { dirty_pages: self.pages.dirty.count() });
            }
            CheckpointAction::Send => self.send_dirty()?,
            // By the clock of now: this process may have been stopped since the engine decided.
            CheckpointAction::Resume | CheckpointAction::Unfence | CheckpointAction::ReportSafe(_)
                if !self.lease.holds() =>
            {
                return Ok(CheckpointEvent::TooLate);
            }
            CheckpointAction::Pause => {
                self.figures.paused_at = Some(Instant::now());
                self.pause()?;
            }
            CheckpointAction::Fence => {
                self.figures.fences += 1;
                self.pause()?;
            }
            CheckpointAction::Unfence => self.resume()?,
            CheckpointAction::SaveState(number) => self.save_state(number)?,
            CheckpointAction::Close(number) => {
                let limit = self.limit();
                self.standby.close(number, self.figures.in_checkpoint, &limit)?;
                if number == 1 {
                    self.figures.first_bytes = self.standby.position();
                }
            }
            CheckpointAction::Resume => {
                self.resume()?;
                if let Some(paused_at) = self.figures.paused_at.take() {
                    self.figures.pauses.record(paused_at.elapsed());
                }
            }
            CheckpointAction::ReportSafe(number) => {
                self.figures.safe = number;
                named("calling CheckpointObserver::safe", || self.observer.safe(number));
            }
            CheckpointAction::Release => {
                let limit = self.limit();
                self.standby.release(&limit)?;
            }
            CheckpointAction::StopLogs => {
                // Every source is stopped, even if an earlier one refuses.
                let stop = |source: &Arc<dyn crate::guest::DirtySource>| -> Result<(), Error> {
                    Ok(guarded("calling DirtySource::stop", || source.stop())??)
                };
                let results: Vec<_> = self.guest.dirty.iter().map(stop).collect();
                results.into_iter().collect::<Result<(), Error>>()?;
            }
            CheckpointAction::Finish(_) => {}
        }
        Ok(CheckpointEvent::Done)
    }

    fn pause(&mut self) -> Result<(), Error> {
        self.figures.not_resumed = true;
        let paused = named("calling GuestControl::pause", || self.guest.control.pause());
        paused.map_err(|source| Error::Control { what: "pause", source })
    }

    fn resume(&mut self) -> Result<(), Error> {
        let resumed = named("calling GuestControl::resume", || self.guest.control.resume());
        resumed.map_err(|source| Error::Control { what: "resume", source })?;
        self.figures.not_resumed = false;
        Ok(())
    }

    fn report(self, outcome: CheckpointOutcome) -> CheckpointReport {
        let figures = self.figures;
        let cause = self.engine.cause();
        let stays = matches!(outcome, CheckpointOutcome::Taken | CheckpointOutcome::Fenced);
        CheckpointReport {
            outcome,
            error: self.error.or_else(|| Some(error_of(cause?, self.settings.confirm_timeout))),
            fences: figures.fences,
            safe: figures.safe,
            pages: figures.pages,
            bytes: self.standby.position(),
            first_bytes: figures.first_bytes,
            pauses: figures.pauses.summary(),
            not_resumed: figures.not_resumed && !stays,
        }
    }
}
