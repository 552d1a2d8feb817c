//! What the engine of a snapshot decides, done: one thread copies pages and serves the guest's writes.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, TryRecvError, bounded};

use super::copies::Copies;
use super::outlet::{News, Outlet, Sent};
use super::{SnapshotReport, SnapshotSession, SnapshotSettings};
use crate::engine::{Place, SnapshotAction, SnapshotEngine, SnapshotEvent, SnapshotOutcome};
use crate::error::{Chain, Remedy};
use crate::guest::{GuestControl, GuestMemory, WriteProtection, save_state};
use crate::ram::{PageRun, PageSet};
use crate::session::callback::{guarded, named, quietly};
use crate::session::handle::Canceller;
use crate::session::{Error, SourceConnection};
use crate::stream::qemu::own_devices::tail_of;
use crate::sys::{Stop, WakeEvent};
use crate::transport::ChannelError;
use crate::units::BlockIndex;

/// The guest's control, which a thread of its own has while it lets the guest run on.
enum Control {
    Here(Box<dyn GuestControl>),
    Resuming(Receiver<Resumed>),
    Lost,
}

/// What comes back of a resume.
type Resumed = (Box<dyn GuestControl>, Result<(), Error>);

/// Times of the pause.
#[derive(Default)]
struct Times {
    paused_at: Option<Instant>,
    pause: Duration,
    state: Duration,
    protect: Duration,
}

/// What is to be written, and by what.
struct Target {
    connection: Option<SourceConnection>,
    outlet: Option<Outlet>,
    /// Raised with each news of it, and by a resume.
    wake: Option<Arc<WakeEvent>>,
    /// Pages that hold nothing.
    unused: PageSet,
    state: Vec<u8>,
    sent: Sent,
}

/// A snapshot while it is taken.
pub(super) struct Running {
    engine: SnapshotEngine,
    memory: Arc<dyn GuestMemory>,
    copies: Arc<Copies>,
    control: Control,
    /// While writes are held. Dropping it lets them through, whatever ends this.
    protection: Option<WriteProtection>,
    target: Target,
    settings: SnapshotSettings,
    canceller: Canceller,
    began: Instant,
    times: Times,
    error: Option<Error>,
    #[cfg(test)]
    fails_at: Option<u32>,
}

impl Running {
    pub(super) fn new(session: SnapshotSession, connection: SourceConnection) -> Self {
        let SnapshotSession { guest, copies, settings, canceller, .. } = session;
        let unused = PageSet::new(guest.memory.table());
        Self {
            engine: SnapshotEngine::new(copies.config(settings.stall_timeout)),
            memory: guest.memory,
            copies,
            control: Control::Here(guest.control),
            protection: None,
            target: Target {
                connection: Some(connection),
                outlet: None,
                wake: None,
                unused,
                state: Vec::new(),
                sent: Sent::default(),
            },
            settings,
            canceller,
            began: Instant::now(),
            times: Times::default(),
            error: None,
            #[cfg(test)]
            fails_at: session.fails_at,
        }
    }

    pub(super) fn run(mut self) -> SnapshotReport {
        self.tell(SnapshotEvent::Begin);
        let outcome = loop {
            if let Err(error) = self.listen() {
                self.keep(error);
                self.tell(SnapshotEvent::Lost);
            }
            match self.engine.poll() {
                Some(SnapshotAction::Finish(outcome)) => break outcome,
                Some(action) => {
                    let done = guarded("taking a snapshot", || self.perform(action)).and_then(|done| done);
                    match done {
                        Ok(event) => self.tell(event),
                        Err(error) => {
                            self.keep(error);
                            self.tell(SnapshotEvent::Failed);
                        }
                    }
                }
                None => {
                    if let Err(error) = self.wait() {
                        self.keep(error);
                        self.tell(SnapshotEvent::Lost);
                    }
                }
            }
        };
        self.report(outcome)
    }

    fn tell(&mut self, event: SnapshotEvent) {
        let now = self.began.elapsed();
        // A cancel comes before this step or after it: the step may be the last that can be given up.
        self.canceller.decide(|| {
            if self.canceller.token().is_cancelled() {
                self.engine.handle(now, SnapshotEvent::Cancel);
            }
            self.engine.handle(now, event);
            ((), self.engine.is_closing())
        });
    }

    fn keep(&mut self, error: Error) {
        tracing::warn!(error = %Chain(&error), "a step of a snapshot failed");
        self.error.get_or_insert(error);
    }

    /// What has come by itself, without waiting.
    fn listen(&mut self) -> Result<bool, Error> {
        let mut any = false;
        while let Some(protection) = &self.protection {
            let next = protection.next();
            let Some(run) = next.map_err(|source| failed("reading which page is waited for", source))? else {
                break;
            };
            any = true;
            self.tell(SnapshotEvent::Fault(run));
        }
        while let Some(news) = self.target.outlet.as_ref().and_then(Outlet::next) {
            any = true;
            match news {
                News::Left(batch) => {
                    if let Some(place) = self.copies.release(&batch) {
                        self.tell(SnapshotEvent::Freed(place));
                    }
                }
                News::Failed(error) => return Err(error),
                News::Opened | News::Closed(_) => {}
            }
        }
        if let Control::Resuming(resumed) = &self.control {
            match resumed.try_recv() {
                Ok(resumed) => {
                    any = true;
                    self.resumed(resumed);
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => {
                    self.control = Control::Lost;
                    let source = std::io::Error::other("it ended before it had let the guest run");
                    self.keep(Error::Thread { name: "ramwire-resume", source });
                    self.tell(SnapshotEvent::Resumed { runs: false });
                }
            }
        }
        Ok(any)
    }

    fn resumed(&mut self, (control, done): Resumed) {
        self.control = Control::Here(control);
        let runs = done.is_ok();
        if let Err(error) = done {
            self.keep(error);
        }
        self.times.pause = self.times.paused_at.map_or(Duration::ZERO, |at| at.elapsed());
        if runs {
            self.times.paused_at = None;
        }
        self.tell(SnapshotEvent::Resumed { runs });
    }

    /// Until something happens.
    fn wait(&mut self) -> Result<(), Error> {
        if let Some(wake) = &self.target.wake {
            wake.clear();
        }
        if self.listen()? {
            return Ok(());
        }
        let stop = match self.canceller.token().is_cancelled() {
            // It was told of that; what is left has its own end.
            true => Stop::never(),
            false => Stop::on(&self.canceller.token()),
        };
        let stop = match self.engine.wake_at() {
            Some(at) => stop.within(at.saturating_sub(self.began.elapsed())),
            None => stop,
        };
        let fds = self.protection.iter().map(AsFd::as_fd);
        let fds: Vec<_> = fds.chain(self.target.wake.iter().map(|wake| wake.as_fd())).collect();
        stop.wait_any(&fds).map_err(|source| failed("waiting for the guest's writes", source))?;
        if self.engine.wake_at().is_some_and(|at| self.began.elapsed() >= at) && self.error.is_none() {
            self.keep(Error::NoAnswer {
                what: "that it has written a page of the snapshot",
                after: self.settings.stall_timeout,
                remedy: Remedy::RaiseStallTimeout,
            });
        }
        self.tell(SnapshotEvent::Time);
        Ok(())
    }

    fn perform(&mut self, action: SnapshotAction) -> Result<SnapshotEvent, Error> {
        #[cfg(test)]
        self.fail_in_turn(action)?;
        match action {
            SnapshotAction::Open => self.open()?,
            SnapshotAction::Arm => self.arm()?,
            SnapshotAction::Pause => {
                self.times.paused_at = Some(Instant::now());
                let paused = named("calling GuestControl::pause", || self.control()?.pause());
                paused.map_err(|source| Error::Control { what: "pause", source })?;
            }
            SnapshotAction::SaveState => self.save_state()?,
            SnapshotAction::Protect => return self.protect().map(SnapshotEvent::Protected),
            SnapshotAction::Resume => self.resume()?,
            SnapshotAction::Copy { run, place } => self.copy(run, place)?,
            SnapshotAction::Lift { run } => {
                if let Some(protection) = &self.protection {
                    protection.lift(run)?;
                }
            }
            SnapshotAction::Disarm => self.disarm(),
            SnapshotAction::Close => self.close()?,
            SnapshotAction::Abandon => {
                if let Some(outlet) = &mut self.target.outlet {
                    outlet.abandon();
                }
                self.target.outlet = None;
                self.target.connection = None;
            }
            SnapshotAction::Finish(_) => {}
        }
        Ok(SnapshotEvent::Done)
    }

    fn control(&mut self) -> std::io::Result<&mut dyn GuestControl> {
        match &mut self.control {
            Control::Here(control) => Ok(control.as_mut()),
            Control::Resuming(_) | Control::Lost => {
                Err(std::io::Error::other("its control was lost in a panic"))
            }
        }
    }

    fn open(&mut self) -> Result<(), Error> {
        let wake = WakeEvent::new().map_err(|source| Error::Thread { name: "ramwire-snap", source })?;
        let wake = Arc::clone(self.target.wake.insert(Arc::new(wake)));
        let Some(connection) = self.target.connection.take() else { return Ok(()) };
        let outlet = Outlet::start(connection, Arc::clone(&self.copies) as _, &self.settings, wake)?;
        self.target.outlet.insert(outlet).open(&Stop::on(&self.canceller.token()))
    }

    fn arm(&mut self) -> Result<(), Error> {
        let promised =
            named("calling GuestControl::forbid_discard", || Ok(self.control()?.forbid_discard(true)));
        if !promised.map_err(|source| Error::Control { what: "promise to keep its memory", source })? {
            return Err(Error::Config {
                what: "the guest does not promise to keep its memory while a snapshot is taken: what it gave back would be \
                       missing there"
                    .into(),
                remedy: Remedy::Advice("take balloon and free page reporting off the guest"),
            });
        }
        self.protection = Some(WriteProtection::arm(&*self.memory, self.settings.user_mode_only)?);
        Ok(())
    }

    fn save_state(&mut self) -> Result<(), Error> {
        let began = Instant::now();
        let saved = self.control().and_then(save_state);
        let saved = saved.map_err(|source| Error::Control { what: "save its device state", source })?;
        self.target.state = tail_of(saved, self.memory.table().page().bytes(), self.settings.framing);
        self.times.state = began.elapsed();
        Ok(())
    }

    fn protect(&mut self) -> Result<PageSet, Error> {
        let began = Instant::now();
        if let Some(change) = self.memory.layout_change() {
            return Err(change.into());
        }
        let Some(protection) = &mut self.protection else { return Ok(PageSet::default()) };
        let used = protection.protect()?;
        self.times.protect = began.elapsed();
        let table = self.memory.table();
        for index in (0..table.blocks().len() as u32).map(BlockIndex) {
            if let Some(all) = table.whole(index) {
                self.target.unused.add(all);
            }
        }
        used.runs().for_each(|run| self.target.unused.remove(run));
        Ok(used)
    }

    /// While memory is protected the callback has a thread of its own: it may write to guest memory itself.
    fn resume(&mut self) -> Result<(), Error> {
        let Control::Here(mut control) = std::mem::replace(&mut self.control, Control::Lost) else {
            return Err(Error::Control {
                what: "resume",
                source: std::io::Error::other("its control was lost"),
            });
        };
        let call = |control: &mut dyn GuestControl| {
            let resumed = guarded("calling GuestControl::resume", || control.resume())?;
            resumed.map_err(|source| Error::Control { what: "resume", source })
        };
        if self.protection.is_none() {
            let done = call(&mut *control);
            self.resumed((control, done));
            return Ok(());
        }
        let (give, take) = bounded(1);
        let (hand_over, taken) = bounded::<Box<dyn GuestControl>>(1);
        let wake = self.target.wake.clone();
        let job = move || {
            let Ok(mut control) = taken.recv() else { return };
            let done = call(&mut *control);
            let _ = give.send((control, done));
            if let Some(wake) = wake {
                wake.raise();
            }
        };
        let started = self.settings.spawner.spawn("ramwire-resume", Box::new(job));
        match started {
            Ok(_) => {
                // It waits for just that.
                let _ = hand_over.send(control);
                self.control = Control::Resuming(take);
                Ok(())
            }
            Err(error) => {
                self.control = Control::Here(control);
                Err(error)
            }
        }
    }

    fn copy(&mut self, run: PageRun, place: Place) -> Result<(), Error> {
        let (batch, kept) = self.copies.copy(run, place)?;
        if let Some(outlet) = &self.target.outlet {
            outlet.pages(batch)?;
        }
        if !kept {
            self.tell(SnapshotEvent::Freed(place));
        }
        Ok(())
    }

    /// Closing the descriptor lifts all there is, and wakes whoever waits.
    fn disarm(&mut self) {
        self.protection = None;
        if let Control::Here(control) = &mut self.control {
            quietly("allowing discards", || _ = control.forbid_discard(false));
        }
    }

    fn close(&mut self) -> Result<(), Error> {
        let (unused, state) =
            (std::mem::take(&mut self.target.unused), std::mem::take(&mut self.target.state));
        let Some(outlet) = &self.target.outlet else { return Ok(()) };
        outlet.close(unused, state)?;
        loop {
            match outlet.wait(&Stop::never())? {
                News::Closed(sent) => {
                    self.target.sent = sent;
                    return Ok(());
                }
                News::Failed(error) => return Err(error),
                News::Left(_) | News::Opened => {}
            }
        }
    }

    #[cfg(test)]
    fn fail_in_turn(&mut self, action: SnapshotAction) -> Result<(), Error> {
        let undoes = matches!(action, SnapshotAction::Disarm | SnapshotAction::Abandon);
        if let Some(left) = self.fails_at.as_mut().filter(|_| !undoes) {
            *left = left.wrapping_sub(1);
            if *left == u32::MAX {
                return Err(Error::Control { what: "do it", source: std::io::Error::other("a test") });
            }
        }
        Ok(())
    }

    fn report(mut self, outcome: SnapshotOutcome) -> SnapshotReport {
        // A discard was forbidden, and the control was away when it was to be allowed again.
        if let Control::Here(control) = &mut self.control {
            quietly("allowing discards", || _ = control.forbid_discard(false));
        }
        if outcome == SnapshotOutcome::Cancelled && self.error.is_none() {
            self.error = Some(Error::Cancelled);
        }
        let figures = self.engine.figures();
        SnapshotReport {
            outcome,
            error: self.error.filter(|_| outcome != SnapshotOutcome::Taken),
            pages: self.target.sent.pages,
            bytes: self.target.sent.bytes,
            pause: self.times.pause,
            state: self.times.state,
            protect: self.times.protect,
            total: self.began.elapsed(),
            faults: figures.faults,
            fault_latency: figures.latency.summary(),
            stands_still: self.times.paused_at.is_some(),
        }
    }
}

/// A call that the guest's writes are served by.
fn failed(doing: &'static str, source: std::io::Error) -> Error {
    ChannelError::Io { peer: "userfaultfd".into(), doing, source }.into()
}
