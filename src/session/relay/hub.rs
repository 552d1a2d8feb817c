//! The connection between the two sides of a relay: it passes events to the engine, which decides, and each side waits
//! for what it may do.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::engine::{Handover, RelayAction, RelayEngine, RelayEvent};
use crate::error::Chain;
use crate::session::callback::{guarded, quietly};
use crate::session::control::Control;
use crate::session::destination::{Switched, ToSource};
use crate::session::handle::CancelReply;
use crate::session::workers::Spawner;
use crate::session::{Breakage, Clock, Error, WallClock};
use crate::sys::{CancelToken, FdKind, Lock as _, queued_bytes};

use super::ends::POLL_INTERVAL;
use super::guard::{Guard, Held};
use super::{Notice, NoticeFn};

/// The engine, its decisions so far, and related state.
#[derive(Default)]
pub(in crate::session) struct Hub {
    inner: Mutex<Inner>,
    changed: Condvar,
}

pub(in crate::session) struct Inner {
    pub(in crate::session) engine: RelayEngine,
    clock: Box<dyn Clock>,
    /// The engine's decisions, in order.
    decided: Vec<RelayAction>,
    /// The guest's device state, once it has arrived.
    pub(super) device_state: Option<Vec<u8>>,
    /// The source's switch to postcopy, once it has switched.
    switched: Option<Switched>,
    /// The source, once it was told that its guest was taken.
    told: Option<Arc<ToSource>>,
    /// Raised when the source is to read and write no more, after a switch.
    source_ends: CancelToken,
    /// Why the far end does not have the guest, or is silent.
    why: Option<String>,
    guard: Option<Box<dyn Guard>>,
    cancel: CancelToken,
    notice: Arc<NoticeFn>,
    spawner: Spawner,
    source: Side,
    far_end: Side,
    /// Pages wait to be read from the source until the far end has taken more.
    pub(super) held_back: bool,
    /// The far end was reported as ready.
    pub(super) far_is_ready: bool,
    /// The far side's control, once it was started.
    outgoing: Option<Control>,
    breakage: Breakage,
}

/// State of the connection to one side.
#[derive(Default)]
struct Side {
    native: bool,
    /// Only this process understands its bytes.
    encrypted: bool,
    connection: Option<OwnedFd>,
    /// Other connections, of which one is the source's for urgent pages.
    urgent: Vec<OwnedFd>,
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            engine: RelayEngine::new(Duration::from_millis(300)),
            clock: Box::new(WallClock::default()),
            decided: Vec::new(),
            device_state: None,
            switched: None,
            told: None,
            source_ends: CancelToken::default(),
            why: None,
            guard: None,
            cancel: CancelToken::default(),
            notice: Arc::new(|_| ()),
            spawner: Spawner::default(),
            source: Side::default(),
            far_end: Side::default(),
            held_back: false,
            far_is_ready: false,
            outgoing: None,
            breakage: Breakage::None,
        }
    }
}

impl Inner {
    /// True once the engine has decided `action`.
    pub(in crate::session) fn has(&self, action: RelayAction) -> bool {
        self.decided.contains(&action)
    }

    /// True while more may be read from the source.
    pub(in crate::session) fn may_read(&self) -> bool {
        self.engine.may_read() || self.breakage.is(Breakage::ReadWithoutBound)
    }

    /// Why the far end does not have the guest.
    pub(super) fn why(&self) -> String {
        self.why.clone().unwrap_or_else(|| "it was cancelled".into())
    }

    /// Passes an event to the engine and performs its decisions, except for those that a side must perform.
    fn take(&mut self, event: RelayEvent) -> Vec<Notice> {
        let mut notices = Vec::new();
        self.far_is_ready |= event == RelayEvent::FarReady;
        let ready = event == RelayEvent::FarReady && self.engine.has_switched();
        self.pass(if ready && self.source_has_left() { RelayEvent::SourceGone } else { event });
        while let Some(action) = self.engine.poll() {
            tracing::debug!(?event, ?action, "relay");
            self.decided.push(action);
            match action {
                RelayAction::Guard => {
                    let answer = self.hold(&mut notices);
                    self.pass(if self.source_has_left() { RelayEvent::SourceGone } else { answer });
                }
                RelayAction::ReportDoubt => {
                    let (why, switched) = (self.why(), self.engine.has_switched());
                    let source_waits = self.engine.source_waits();
                    notices.push(Notice::InDoubt { why, switched, source_waits });
                }
                RelayAction::Finish(_) | RelayAction::Unguard => self.release(),
                RelayAction::TellFailed | RelayAction::TellNothing | RelayAction::Part => {
                    self.source_ends.cancel();
                }
                RelayAction::Abandon => self.abandon(),
                _ => {}
            }
            self.break_orders(action);
        }
        if matches!(event, RelayEvent::FarEnded(_)) {
            // Its peer must see that the connection ends.
            self.far_end.connection = None;
        }
        notices
    }

    fn pass(&mut self, event: RelayEvent) {
        let now = self.clock.now();
        if event == RelayEvent::SourceGone && !self.has(RelayAction::Abandon) {
            self.why.get_or_insert_with(|| "the guest's source has closed its connection".into());
        }
        if event != RelayEvent::GivesUnasked || !self.breakage.is(Breakage::TrustUnasked) {
            self.engine.handle(now, event);
        }
    }

    /// True if the source is gone and may have taken its guest back. A ramwire never does after its COMMIT.
    fn source_has_left(&self) -> bool {
        let takes_back = self.engine.has_switched() || !self.source.native;
        takes_back && !self.breakage.is(Breakage::GiveToGone) && self.source_is_gone()
    }

    /// True if the source has closed its connection, or it broke. False if that can't be detected.
    fn source_is_gone(&self) -> bool {
        let Some(connection) = &self.source.connection else { return false };
        let mut fds = [PollFd::new(connection, PollFlags::RDHUP)];
        let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().intersects(ended)
    }

    /// From here on the source's connection outlives this process, if possible.
    fn hold(&mut self, notices: &mut Vec<Notice>) -> RelayEvent {
        let Some(guard) = &mut self.guard else { return RelayEvent::Guarded };
        let Some(source) = &self.source.connection else {
            notices.push(Notice::NotGuarded);
            return RelayEvent::Guarded;
        };
        let urgent: Vec<_> = match self.breakage.is(Breakage::LeaveUrgentUnguarded) {
            true => Vec::new(),
            false => self.source.urgent.iter().map(AsFd::as_fd).collect(),
        };
        let held = Held {
            source: source.as_fd(),
            source_is_native: self.source.native,
            source_is_encrypted: self.source.encrypted,
            far_end: self.far_end.connection.as_ref().filter(|_| !self.far_end.encrypted).map(AsFd::as_fd),
            far_end_is_native: self.far_end.native,
            switched: self.engine.has_switched(),
            urgent: &urgent,
        };
        match guarded("holding the source's connection", || guard.hold(&held)) {
            Ok(Ok(())) => RelayEvent::Guarded,
            Ok(Err(error)) => self.not_guarded(&error.to_string()),
            Err(error) => self.not_guarded(&error.to_string()),
        }
    }

    fn not_guarded(&mut self, why: &str) -> RelayEvent {
        self.why =
            Some(format!("the source's connection can't be held beyond the end of this process: {why}"));
        RelayEvent::NotGuarded
    }

    /// The far side sends and waits no more. Before the guest is given away it looks for this decision itself.
    fn abandon(&mut self) {
        if let Some(far_side) = self.outgoing.as_ref().filter(|_| self.engine.has_switched())
            && let Err(error) = far_side.pause()
        {
            tracing::debug!(%error, "the far side has not given the guest away");
        }
    }

    fn release(&mut self) {
        (self.source.connection, self.far_end.connection, self.told) = (None, None, None);
        self.source.urgent.clear();
        let Some(mut guard) = self.guard.take() else { return };
        quietly("releasing the source's connection", || guard.release());
    }

    /// Orders that a test has switched off.
    fn break_orders(&mut self, action: RelayAction) {
        let broken = match action {
            RelayAction::GiveAway if self.breakage.is(Breakage::TellBeforeFarEnd) => RelayAction::TellRunning,
            RelayAction::ReportDoubt if self.breakage.is(Breakage::DoubtIsFailure) => RelayAction::TellFailed,
            RelayAction::SendState if self.breakage.is(Breakage::AskBeforeFarEnd) => RelayAction::AskForGuest,
            RelayAction::AskForGuest if self.breakage.is(Breakage::GiveBeforeGiven) => RelayAction::GiveAway,
            RelayAction::GiveAway if self.breakage.is(Breakage::TakenBeforeFarEnd) => RelayAction::TellTaken,
            RelayAction::TellTaken if self.breakage.is(Breakage::UnguardEarly) => RelayAction::Unguard,
            RelayAction::Part if self.breakage.is(Breakage::LossIsFailure) => RelayAction::TellFailed,
            _ => return,
        };
        self.decided.push(broken);
        if broken == RelayAction::Unguard {
            self.release();
        }
    }
}

/// The parts of a relay that its sides need.
pub(in crate::session) struct Parts {
    pub(in crate::session) downtime_limit: Duration,
    pub(in crate::session) guard: Option<Box<dyn Guard>>,
    pub(in crate::session) cancel: CancelToken,
    pub(in crate::session) notice: Arc<NoticeFn>,
    pub(in crate::session) spawner: Spawner,
    pub(in crate::session) source: Option<OwnedFd>,
    pub(in crate::session) source_is_encrypted: bool,
}

impl Hub {
    pub(in crate::session) fn begin(&self, parts: Parts) {
        let mut inner = self.lock();
        inner.engine.set_downtime_limit(parts.downtime_limit);
        inner.guard = parts.guard;
        if inner.cancel.is_cancelled() {
            parts.cancel.cancel();
        }
        inner.cancel = parts.cancel;
        inner.notice = parts.notice;
        inner.spawner = parts.spawner;
        (inner.source.connection, inner.source.encrypted) = (parts.source, parts.source_is_encrypted);
    }

    #[cfg(test)]
    pub(in crate::session) fn count_time_by(&self, clock: Box<dyn Clock>) {
        self.lock().clock = clock;
    }

    #[cfg(test)]
    pub(in crate::session) fn break_order(&self, breakage: Breakage) {
        self.lock().breakage = breakage;
    }

    /// The far side begins and may be changed.
    pub(in crate::session) fn far_side_starts(&self, control: Control) {
        self.lock().outgoing = Some(control);
    }

    pub(in crate::session) fn outgoing(&self) -> Option<Control> {
        self.lock().outgoing.clone()
    }

    /// The source has switched to postcopy.
    pub(in crate::session) fn source_has_switched(&self, mut switched: Switched) {
        let waits = switched.waits;
        let mut inner = self.lock();
        inner.device_state = Some(std::mem::take(&mut switched.state));
        inner.source.urgent = std::mem::take(&mut switched.urgent);
        inner.switched = Some(switched);
        drop(inner);
        self.post(RelayEvent::Switched { waits });
    }

    /// The source's switch; given away once.
    pub(in crate::session) fn take_switch(&self) -> Option<Switched> {
        self.lock().switched.take()
    }

    /// Raised when nothing more is read from a source that has switched.
    pub(super) fn source_ends(&self) -> CancelToken {
        self.lock().source_ends.clone()
    }

    pub(in crate::session) fn source_is(&self, native: bool) {
        self.lock().source.native = native;
    }

    pub(super) fn far_end_connects(&self, connection: Option<OwnedFd>, encrypted: bool) {
        let mut inner = self.lock();
        (inner.far_end.connection, inner.far_end.encrypted) = (connection, encrypted);
    }

    /// True if the bytes of a side are encrypted, so that no guardian could speak for this process.
    pub(super) fn is_encrypted(&self) -> bool {
        let inner = self.lock();
        inner.source.encrypted || inner.far_end.encrypted
    }

    pub(in crate::session) fn far_end_takes(&self, handover: Handover) {
        self.lock().far_end.native = handover == Handover::Native;
    }

    /// Records why the far end does not have the guest, unless this end stopped the far side for a reason of its own.
    pub(super) fn because(&self, why: &Error) {
        let mut inner = self.lock();
        if !inner.has(RelayAction::Abandon) {
            inner.why = Some(Chain(why).to_string());
        }
    }

    pub(in crate::session) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.locked()
    }

    /// Wakes the sides for a change without an event.
    pub(super) fn notify(&self) {
        self.changed.notify_all();
    }

    /// Passes an event to the engine, and wakes the sides that wait for its decision.
    pub(in crate::session) fn post(&self, event: RelayEvent) {
        let mut inner = self.lock();
        let notices = inner.take(event);
        let (notice, spawner) = (Arc::clone(&inner.notice), inner.spawner.clone());
        drop(inner);
        self.changed.notify_all();
        for due in notices {
            // Reported by a thread of its own: a blocked terminal must not delay the far end's answer.
            let notice = Arc::clone(&notice);
            let tell = move || quietly("reporting to the operator", || notice(&due));
            if let Err(error) = spawner.spawn("ramwire-notice", Box::new(tell)) {
                tracing::warn!(%error, "the relay's notice could not be delivered");
            }
        }
    }

    /// The same for events that no side waits for: figures.
    pub(in crate::session) fn post_quietly(&self, event: RelayEvent) {
        let mut inner = self.lock();
        let now = inner.clock.now();
        inner.engine.handle(now, event);
    }

    /// Bytes in this host's queue towards the far end; 0 if the kernel does not report it.
    pub(super) fn queued(&self) -> u64 {
        let inner = self.lock();
        let connection = inner.far_end.connection.as_ref();
        connection.and_then(|fd| queued_bytes(fd.as_fd(), FdKind::Socket).ok()).unwrap_or(0)
    }

    /// Waits until `ready`, at most `time`.
    pub(super) fn wait(&self, time: Duration, ready: impl Fn(&Inner) -> bool) -> MutexGuard<'_, Inner> {
        let inner = self.lock();
        let waited = self.changed.wait_timeout_while(inner, time, |inner| !ready(inner));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// True if the source has closed its connection, or it broke. False if that can't be detected.
    pub(super) fn source_is_gone(&self) -> bool {
        self.lock().source_is_gone()
    }

    /// The source was told that its guest was taken.
    pub(super) fn source_is_told(&self, source: Arc<ToSource>) {
        self.lock().told = Some(source);
    }

    /// True once the source's host has the answer that its guest was taken. A connection that broke holds no answer any
    /// more: it proves nothing.
    pub(super) fn source_knows(&self) -> bool {
        let told = self.lock().told.clone();
        told.is_some_and(|source| source.has_heard()) && !self.source_is_gone()
    }

    /// The far side has ended: while the relay is in doubt after a switch, the source may still get the answer that its
    /// guest was taken.
    pub(super) fn await_source(&self) {
        let over = |inner: &Inner| !(inner.engine.is_in_doubt() && inner.engine.has_switched());
        while !over(&self.wait(POLL_INTERVAL, over)) {
            if self.source_knows() {
                self.post(RelayEvent::SourceKnows);
            } else if self.source_is_gone() {
                self.post(RelayEvent::SourceGone);
            }
        }
    }

    /// See [`RelayControl::cancel`](super::RelayControl::cancel).
    pub(in crate::session) fn cancel(&self) -> CancelReply {
        let mut inner = self.lock();
        if inner.engine.has_failed() {
            return CancelReply::Accepted;
        }
        if !inner.engine.may_cancel() {
            return CancelReply::TooLate;
        }
        drop(inner.take(RelayEvent::Cancel));
        inner.cancel.cancel();
        drop(inner);
        self.changed.notify_all();
        CancelReply::Accepted
    }
}
