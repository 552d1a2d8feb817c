//! What the engine of a snapshot decides, done: one thread copies pages and serves the guest's writes.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::callbacks::{Answer, Call, Callbacks};
use super::changes::Changes;
use super::copies::Copies;
use super::outlet::{News, Outlet, Sent};
use super::{SnapshotReport, SnapshotSession, SnapshotSettings};
use crate::engine::{Place, SnapshotAction, SnapshotConfig, SnapshotEngine, SnapshotEvent, SnapshotOutcome};
use crate::error::{Chain, Remedy};
use crate::guest::{GuestControl, GuestMemory, WriteProtection};
use crate::ram::{PageRun, PageSet};
use crate::session::callback::guarded;
use crate::session::handle::Canceller;
use crate::session::{Error, SourceConnection};
use crate::stream::snapshot_note::SnapshotId;
use crate::sys::{Stop, WakeEvent};
use crate::transport::{ChannelError, SnapshotFile};
use crate::units::BlockIndex;

/// Maximum number of bytes that are protected by one call: writers wait for it meanwhile.
const PROTECT: u64 = 2 << 20;
/// Bytes that a write before the moment opens, and that are protected again.
const LIFT: u64 = 256 << 10;
/// Protecting the rest when the guest is paused should take no longer.
const PAUSE_GOAL: Duration = Duration::from_millis(1);

/// Times of the pause.
#[derive(Default)]
struct Times {
    armed_at: Option<Instant>,
    ahead: Duration,
    paused_at: Option<Instant>,
    pause: Duration,
    state: Duration,
    saved_at: Option<Instant>,
    protect: Duration,
}

/// The output, and how it is written.
struct Target {
    connection: Option<SourceConnection>,
    outlet: Option<Outlet>,
    /// Raised with each report from it, and when a call is over.
    wake: Option<Arc<WakeEvent>>,
    /// Pages that may hold something: the others are zero.
    used: PageSet,
    /// The file it is written to, if that keeps a note of which snapshot it is.
    file: Option<(SnapshotId, SnapshotFile)>,
    state: Vec<u8>,
    sent: Sent,
}

/// A snapshot while it is taken.
pub(super) struct Running {
    engine: SnapshotEngine,
    memory: Arc<dyn GuestMemory>,
    copies: Arc<Copies>,
    /// Until its memory may be protected; then `callbacks` has it.
    control: Option<Box<dyn GuestControl>>,
    callbacks: Option<Callbacks>,
    /// Present while writes are held. Dropping it lets them through, for whatever reason this ends.
    protection: Option<WriteProtection>,
    target: Target,
    changes: Changes,
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
        let SnapshotSession { guest, copies, settings, canceller, changes, .. } = session;
        let used = PageSet::new(guest.memory.table());
        let page = guest.memory.table().page();
        let pages = |bytes: u64| (bytes >> page.shift()).max(copies.largest_host_page());
        let config = SnapshotConfig {
            slots: copies.slots(),
            trays: copies.trays(),
            tray_pages: copies.tray_pages(),
            protect_pages: pages(PROTECT),
            lift_pages: pages(LIFT),
            pause_goal: PAUSE_GOAL,
            stall_timeout: settings.stall_timeout,
        };
        Self {
            engine: SnapshotEngine::new(config),
            memory: guest.memory,
            copies,
            control: Some(guest.control),
            callbacks: None,
            protection: None,
            target: Target {
                connection: Some(connection),
                outlet: None,
                wake: None,
                used,
                file: None,
                state: Vec::new(),
                sent: Sent::default(),
            },
            changes,
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
        // A cancel comes before this step or after it: this may be the last step that can be cancelled.
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

    /// Takes events that have occurred, without waiting.
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
        while let Some(answer) = self.callbacks.as_mut().and_then(Callbacks::next) {
            any = true;
            self.returned(answer);
        }
        Ok(any)
    }

    fn returned(&mut self, answer: Answer) {
        let Answer { call, done, began, ended } = answer;
        match call {
            Call::SaveState => {
                self.times.state = ended - began;
                self.times.saved_at = Some(ended);
            }
            Call::Resume => {
                self.times.pause = self.times.paused_at.map_or(Duration::ZERO, |at| ended - at);
                if done.is_ok() {
                    self.times.paused_at = None;
                }
            }
            Call::Pause => {}
        }
        let event = SnapshotEvent::Returned { done: done.is_ok() };
        match done {
            Ok(state) => self.target.state.extend(state),
            Err(error) => self.keep(error),
        }
        self.tell(event);
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
            // The engine has received the cancel; the remaining work has its own end.
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
            SnapshotAction::Track => self.changes.start()?,
            SnapshotAction::Arm => self.arm()?,
            SnapshotAction::Look => return self.find_pages().map(SnapshotEvent::Found),
            SnapshotAction::Protect { run } => {
                if let Some(protection) = &self.protection {
                    protection.protect(run)?;
                }
            }
            SnapshotAction::Pause => {
                let now = Instant::now();
                self.times.ahead = self.times.armed_at.map_or(Duration::ZERO, |at| now - at);
                self.times.paused_at = Some(now);
                self.call(Call::Pause)?;
            }
            SnapshotAction::SaveState => self.call(Call::SaveState)?,
            SnapshotAction::Resume => {
                self.times.protect = self.times.saved_at.map_or(Duration::ZERO, |at| at.elapsed());
                self.call(Call::Resume)?;
            }
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

    fn open(&mut self) -> Result<(), Error> {
        let wake = WakeEvent::new().map_err(|source| Error::Thread { name: "ramwire-snap", source })?;
        let wake = Arc::clone(self.target.wake.insert(Arc::new(wake)));
        let Some(connection) = self.target.connection.take() else { return Ok(()) };
        let note = self.changes.note();
        let copies = Arc::clone(&self.copies) as _;
        let (outlet, file) = Outlet::start(connection, copies, &self.settings, wake, &note)?;
        self.target.file = file.map(|file| (note.id, file));
        self.target.outlet.insert(outlet).open(&Stop::on(&self.canceller.token()))
    }

    fn arm(&mut self) -> Result<(), Error> {
        let (Some(control), Some(wake)) = (self.control.take(), self.target.wake.clone()) else {
            return Ok(());
        };
        let shape = (self.memory.table().page(), self.settings.framing);
        let callbacks = Callbacks::start(control, shape, &self.settings.spawner, wake)?;
        if !self.callbacks.insert(callbacks).keep_memory()? {
            return Err(Error::Config {
                what: "the guest may discard memory while a snapshot is taken, which would then be missing in it"
                    .into(),
                remedy: Remedy::Advice("remove the guest's balloon and free page reporting"),
            });
        }
        self.protection = Some(WriteProtection::arm(&*self.memory, self.settings.user_mode_only)?);
        self.times.armed_at = Some(Instant::now());
        Ok(())
    }

    fn call(&mut self, call: Call) -> Result<(), Error> {
        match &mut self.callbacks {
            Some(callbacks) => callbacks.begin(call),
            None => Ok(()),
        }
    }

    fn find_pages(&mut self) -> Result<PageSet, Error> {
        if let Some(change) = self.memory.layout_change() {
            return Err(change.into());
        }
        let Some(protection) = &mut self.protection else { return Ok(PageSet::default()) };
        let found = match self.changes.find_changed(&*self.memory)? {
            Some(changed) => protection.take(changed)?,
            None => protection.find_used()?,
        };
        for run in found.runs() {
            self.target.used.add(run);
        }
        Ok(found)
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

    /// Closing the descriptor lifts all protection, and wakes the waiting threads.
    fn disarm(&mut self) {
        self.protection = None;
        if let Some(callbacks) = &self.callbacks {
            callbacks.allow_discards();
        }
    }

    /// Pages that hold nothing.
    fn unused(&self) -> PageSet {
        let table = self.memory.table();
        let mut unused = PageSet::new(table);
        if self.changes.has_base() {
            // They are as they were.
            return unused;
        }
        for index in (0..table.blocks().len() as u32).map(BlockIndex) {
            if let Some(all) = table.whole(index) {
                unused.add(all);
            }
        }
        self.target.used.runs().for_each(|run| unused.remove(run));
        unused
    }

    fn close(&mut self) -> Result<(), Error> {
        let (unused, state) = (self.unused(), std::mem::take(&mut self.target.state));
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
        if let Some(callbacks) = self.callbacks.take() {
            callbacks.end();
        }
        if outcome == SnapshotOutcome::Cancelled && self.error.is_none() {
            self.error = Some(Error::Cancelled);
        }
        // The file is closed, and may be held for the next one.
        self.target.outlet = None;
        let taken = self.target.file.as_ref().filter(|_| outcome == SnapshotOutcome::Taken);
        let base = self.changes.end(taken.map(|(id, file)| (*id, file)), &*self.memory);
        let figures = self.engine.figures();
        SnapshotReport {
            outcome,
            error: self.error.filter(|_| outcome != SnapshotOutcome::Taken),
            pages: self.target.sent.pages,
            bytes: self.target.sent.bytes,
            ahead: self.times.ahead,
            early_faults: figures.early,
            pause: self.times.pause,
            state: self.times.state,
            protect: self.times.protect,
            total: self.began.elapsed(),
            faults: figures.faults,
            fault_latency: figures.latency.summary(),
            not_resumed: self.times.paused_at.is_some(),
            base,
        }
    }
}

/// A call that the guest's writes are served by.
fn failed(doing: &'static str, source: std::io::Error) -> Error {
    ChannelError::Io { peer: "userfaultfd".into(), doing, source }.into()
}
