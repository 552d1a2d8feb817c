//! The standby's session: does what the engine decides, on one thread.

mod colo;
mod from_qemu;
mod from_ramwire;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, bounded};

#[cfg(test)]
pub(in crate::session) use self::colo::{ColoIntake, Taken};
use self::from_qemu::FromQemu;
use self::from_ramwire::FromRamwire;
use super::inbox::Inbox;
use super::{StandbyReport, StandbySettings};
use crate::engine::{StandbyAction, StandbyDoubt, StandbyEnding, StandbyEngine, StandbyEvent};
use crate::error::{Chain, Remedy};
use crate::guest::{CheckpointCache, GuestMemory, load_state};
use crate::session::callback::{guarded, named};
use crate::session::{DestinationGuest, Error, Incoming};
use crate::stream::checkpoints::StandbyMessage;
use crate::sys::Stop;
use crate::transport::{ChannelError, StreamChannel};

/// Pages that are applied by one call.
const APPLIED_AT_ONCE: u64 = 4096;
/// Bytes of device state that memory is made for at once: more only after they have come.
const STATE_PIECE: u64 = 1 << 20;
/// Longest time in which a source that may be dead is told that its guest was taken.
const TELL_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest time in which a source takes an answer that it waits for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A standby before it has a guest.
pub struct StandbySession {
    guest: DestinationGuest,
    arrivals: Box<dyn Arrivals>,
    observer: Box<dyn StandbyObserver>,
    settings: StandbySettings,
    inbox: Arc<Inbox<StandbyEvent>>,
}

impl StandbySession {
    /// Keeps the guest that the source at the other end of `channel` has. Its provider is asked for memory once it has
    /// announced its blocks; [`Incoming`] has those and nothing else.
    pub fn new(guest: DestinationGuest, mut channel: StreamChannel, settings: StandbySettings) -> Self {
        // A source may rest for as long as its embedder wants.
        channel.set_stall(None);
        let arrivals = Box::new(FromRamwire::new(channel, &settings));
        Self { guest, arrivals, observer: Box::new(Unwatched), settings, inbox: Arc::default() }
    }

    /// Keeps the guest of the QEMU at the other end of `channel`, whose capability x-colo is on and `return-path` off
    /// (COLO). Its first migration is checkpoint 1. The device state is as QEMU writes it: FULL sections, an end of
    /// file, and the VM description of the first migration, if it fits.
    ///
    /// QEMU has no lease, and no message that says that its guest was taken: [`activate`](StandbyHandle::activate) only
    /// closes the connection.
    pub fn of_qemu(guest: DestinationGuest, mut channel: StreamChannel, settings: StandbySettings) -> Self {
        channel.set_stall(None);
        let arrivals = Box::new(FromQemu::new(channel, &settings));
        Self { guest, arrivals, observer: Box::new(Unwatched), settings, inbox: Arc::default() }
    }

    /// Tells `observer` what comes, and asks it what becomes of the guest when the source is lost.
    #[must_use]
    pub fn with_observer(self, observer: Box<dyn StandbyObserver>) -> Self {
        Self { observer, ..self }
    }

    /// Keeps the guest on a thread `ramwire-standby` of the settings' spawner.
    ///
    /// # Errors
    /// [`Error::Thread`]; nothing was received.
    pub fn spawn(self) -> Result<StandbyHandle, Error> {
        let (give, report) = bounded(1);
        let (spawner, inbox) = (self.settings.spawner.clone(), Arc::clone(&self.inbox));
        let job = move || {
            // Without a receiver the report is no longer needed.
            let _ = give.send(Running::new(self).run());
        };
        drop(spawner.spawn("ramwire-standby", Box::new(job))?);
        Ok(StandbyHandle { inbox, report })
    }
}

/// A standby that keeps a guest. Dropping the handle discards it, unless it was to start.
#[must_use = "dropping the handle discards the standby's guest"]
pub struct StandbyHandle {
    inbox: Arc<Inbox<StandbyEvent>>,
    report: Receiver<StandbyReport>,
}

impl StandbyHandle {
    /// Commands for it that another thread may give.
    pub fn control(&self) -> StandbyControl {
        StandbyControl(Arc::clone(&self.inbox))
    }

    /// Starts the guest here, from the last checkpoint that has come whole. **The source must be dead**, or kept from
    /// running its guest in another way (fencing): a source that still runs is told if it can be reached, and pauses its
    /// guest only then. Of this and [`discard`](Self::discard) the first call counts: from here on the handle may be
    /// dropped.
    pub fn activate(&self) {
        self.inbox.put(StandbyEvent::Activate);
    }

    /// There is to be no guest here, unless it was [to start](Self::activate) before.
    pub fn discard(&self) {
        self.inbox.put(StandbyEvent::Discard);
    }

    /// True once [`wait`](Self::wait) would not wait.
    pub fn is_finished(&self) -> bool {
        !self.report.is_empty()
    }

    /// Waits for the end. A lost connection is none: the embedder decides then.
    ///
    /// # Errors
    /// [`Error::Thread`] if the thread died without a report, by a fault of this library.
    pub fn wait(self) -> Result<StandbyReport, Error> {
        self.report.recv().map_err(|_| Error::Thread {
            name: "ramwire-standby",
            source: io::Error::other("it ended without a report, which is a fault of this library"),
        })
    }
}

/// Commands for a standby. Clones command the same one; dropping it changes nothing.
#[derive(Clone)]
pub struct StandbyControl(Arc<Inbox<StandbyEvent>>);

impl StandbyControl {
    /// As [`StandbyHandle::activate`].
    pub fn activate(&self) {
        self.0.put(StandbyEvent::Activate);
    }

    /// As [`StandbyHandle::discard`].
    pub fn discard(&self) {
        self.0.put(StandbyEvent::Discard);
    }
}

impl Drop for StandbyHandle {
    fn drop(&mut self) {
        self.discard();
    }
}

/// The guest's memory, and the part of the next checkpoint that has come.
type Kept = CheckpointCache;

/// What comes from a source of checkpoints, and the answers to it.
trait Arrivals: Send {
    /// Learns what guest it is, and gets memory for it.
    fn greet(&mut self, guest: &mut DestinationGuest, stop: &Stop) -> Result<Kept, Error>;

    /// Keeps what comes until the engine is to know of something.
    fn receive(
        &mut self,
        kept: &mut Kept,
        guest: &mut DestinationGuest,
        is_open: bool,
        stop: &Stop,
    ) -> Result<StandbyEvent, Error>;

    /// Answers, within `limit`.
    fn say(&mut self, message: StandbyMessage, limit: Duration) -> Result<(), Error>;

    /// Closes the connection.
    fn hang_up(&self);
}

/// What becomes of a guest whose source is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenLost {
    /// The embedder, or the lease, decides later.
    #[default]
    Wait,
    /// It starts here, as after [`StandbyHandle::activate`].
    Start,
    /// There is to be none here, as after [`StandbyHandle::discard`].
    Discard,
}

/// Learns at the standby what has come. All calls come on the session's thread.
pub trait StandbyObserver: Send {
    /// The guest would start from this checkpoint now, and its source is told so next.
    fn applied(&mut self, _number: u64) {}

    /// The source is lost; 0: before the first checkpoint. **That it is lost does not mean that it is dead.** Called once.
    fn lost(&mut self, _number: u64) -> WhenLost {
        WhenLost::Wait
    }
}

/// Nobody looks.
struct Unwatched;

impl StandbyObserver for Unwatched {}

struct Running {
    guest: DestinationGuest,
    arrivals: Box<dyn Arrivals>,
    observer: Box<dyn StandbyObserver>,
    inbox: Arc<Inbox<StandbyEvent>>,
    engine: StandbyEngine,
    /// Once the source has announced it.
    kept: Option<Kept>,
    /// The observer was asked about the loss of the source.
    has_asked: bool,
    begun: Instant,
    error: Option<Error>,
}

impl Running {
    fn new(session: StandbySession) -> Self {
        let StandbySession { guest, arrivals, observer, settings, inbox } = session;
        Self {
            guest,
            arrivals,
            observer,
            inbox,
            engine: StandbyEngine::new(settings.starts_by_lease),
            kept: None,
            has_asked: false,
            begun: Instant::now(),
            error: None,
        }
    }

    fn run(mut self) -> StandbyReport {
        self.tell(StandbyEvent::Begin);
        loop {
            self.take_commands();
            if self.engine.gives_source_up() {
                // A source that was not understood learns that at once.
                self.arrivals.hang_up();
            }
            match self.engine.poll() {
                Some(StandbyAction::Finish(ending)) => return self.report(ending),
                Some(action) => {
                    let done = guarded("a checkpoint is kept", || self.perform(action));
                    let event = done.and_then(|done| done).unwrap_or_else(|error| self.keep(error));
                    // A command that ended a wait counts before the wait's end.
                    self.take_commands();
                    self.tell(event);
                    if let Some(doubt) = self.engine.doubt() {
                        self.error.get_or_insert_with(|| doubted(doubt));
                    }
                }
                None if !self.has_asked => self.ask(),
                // Only the embedder decides now, or the lease.
                None => {
                    let _ = self.stop().sleep(Duration::MAX);
                    self.tell(StandbyEvent::Time);
                }
            }
        }
    }

    /// The source is lost.
    fn ask(&mut self) {
        self.has_asked = true;
        let number = self.engine.applied();
        let observer = &mut self.observer;
        let answer = guarded("a checkpoint is kept", || {
            named("calling StandbyObserver::lost", || observer.lost(number))
        });
        match answer {
            Ok(WhenLost::Wait) => {}
            Ok(WhenLost::Start) => self.tell(StandbyEvent::Activate),
            Ok(WhenLost::Discard) => self.tell(StandbyEvent::Discard),
            Err(error) => drop(self.error.get_or_insert(error)),
        }
    }

    fn take_commands(&mut self) {
        for command in self.inbox.take() {
            self.tell(command);
        }
    }

    fn tell(&mut self, event: StandbyEvent) {
        self.engine.handle(self.begun.elapsed(), event);
    }

    /// Waits end when the embedder commands, or when the source's lease has run out and nothing has come.
    fn stop(&self) -> Stop {
        let stop = Stop::on(&self.inbox.wake());
        match self.engine.wake_at() {
            Some(at) => stop.within(at.saturating_sub(self.begun.elapsed())),
            None => stop,
        }
    }

    /// A wait for the source that a command or the lease has ended, in the middle of whatever came, is no loss of the source:
    /// the command counts, and a source whose guest starts here is told.
    fn keep(&mut self, error: Error) -> StandbyEvent {
        let is_stopped = matches!(error, Error::Channel(ChannelError::Stopped { .. }));
        if is_stopped && self.engine.receives() {
            self.tell(StandbyEvent::Time);
            return StandbyEvent::Done;
        }
        tracing::warn!(error = %Chain(&error), "the standby's step failed");
        self.error.get_or_insert(error);
        if self.engine.receives() { StandbyEvent::Lost } else { StandbyEvent::Failed }
    }

    fn perform(&mut self, action: StandbyAction) -> Result<StandbyEvent, Error> {
        match action {
            StandbyAction::Greet => {
                let stop = self.stop();
                self.kept = Some(self.arrivals.greet(&mut self.guest, &stop)?);
                self.arrivals.say(StandbyMessage::Ready, ANSWER_TIMEOUT)?;
            }
            StandbyAction::Receive => {
                let (stop, is_open) = (self.stop(), self.engine.is_open());
                let kept = self.kept.as_mut().ok_or_else(no_memory)?;
                return self.arrivals.receive(kept, &mut self.guest, is_open, &stop);
            }
            StandbyAction::Confirm(number) => {
                named("calling StandbyObserver::applied", || self.observer.applied(number));
                self.arrivals.say(StandbyMessage::Confirm(number), ANSWER_TIMEOUT)?;
            }
            StandbyAction::Grant(number) => {
                self.arrivals.say(StandbyMessage::Grant(number), ANSWER_TIMEOUT)?;
            }
            StandbyAction::Apply(_) => {
                let kept = self.kept.as_mut().ok_or_else(no_memory)?;
                while !kept.apply(APPLIED_AT_ONCE)? {}
            }
            StandbyAction::TellTaken => {
                let told = self.arrivals.say(StandbyMessage::Taken(self.engine.applied()), TELL_TIMEOUT);
                self.arrivals.hang_up();
                // Memory for the guest that runs here from now on.
                if let Some(kept) = &mut self.kept {
                    kept.forget();
                }
                told?;
            }
            StandbyAction::Load => {
                let kept = self.kept.as_ref().ok_or_else(no_memory)?;
                let loaded = load_state(self.guest.control.as_mut(), kept.state());
                loaded.map_err(|source| Error::Control { what: "load its device state", source })?;
            }
            StandbyAction::Start => {
                let started = named("calling GuestControl::resume", || self.guest.control.resume());
                started.map_err(|source| Error::Control { what: "start", source })?;
            }
            StandbyAction::AnswerRelease => self.arrivals.say(StandbyMessage::Released, TELL_TIMEOUT)?,
            StandbyAction::TellDiscarded => self.arrivals.say(StandbyMessage::Discarded, TELL_TIMEOUT)?,
            StandbyAction::Finish(_) => {}
        }
        Ok(StandbyEvent::Done)
    }

    fn report(self, ending: StandbyEnding) -> StandbyReport {
        StandbyReport {
            ending,
            error: self.error,
            last: self.engine.applied(),
            by_lease: self.engine.starts_by_lease(),
        }
    }
}

fn doubted(doubt: StandbyDoubt) -> Error {
    let what = match doubt {
        StandbyDoubt::Opened { number, due } => {
            format!("the beginning of checkpoint {number}, where that or the end of {due} was due")
        }
        StandbyDoubt::Closed { number, due: Some(due) } => {
            format!("the end of checkpoint {number}, where {due} had begun")
        }
        StandbyDoubt::Closed { number, due: None } => {
            format!("the end of checkpoint {number}, where none had begun")
        }
    };
    out_of_turn(&what, "keeping checkpoints")
}

/// Memory for the guest, if it is not too large.
fn provided(
    guest: &mut DestinationGuest,
    incoming: &Incoming,
    max_ram: u64,
) -> Result<Arc<dyn GuestMemory>, Error> {
    let lengths = incoming.blocks.iter().map(|block| block.used_length);
    let total = lengths.fold(0, u64::saturating_add);
    if total > max_ram {
        let what = format!("the source's guest has {total} bytes of RAM, and {max_ram} are accepted");
        return Err(Error::Config { what, remedy: Remedy::RaiseRamLimit });
    }
    named("calling MemoryProvider::provide", || guest.memory.provide(incoming))
}

fn ended(channel: &StreamChannel) -> Error {
    ChannelError::Closed { peer: channel.peer().to_owned(), doing: "keeping checkpoints" }.into()
}

fn no_memory() -> Error {
    out_of_turn("a checkpoint", "waiting for the source's blocks")
}

fn out_of_turn(what: &str, while_doing: &'static str) -> Error {
    Error::OutOfTurn { what: what.to_owned(), at: None, while_doing }
}
