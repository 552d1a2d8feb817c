//! The gate between those who control the guest and its writers: run, stand still, slow down, end.

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::units::{Percent, Rate, RestShare};

/// A writer finishes the page it is at before it stands still: microseconds, unless the machine is stuck.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);
/// A writer that fell behind its rate makes up for at most this much.
const BURST: Duration = Duration::from_millis(20);
/// Shorter sleeps cost more than they save.
const NAP: Duration = Duration::from_millis(1);
/// A throttled writer runs and rests within this time.
const PERIOD: Duration = Duration::from_millis(10);
/// Parts of a writer's time.
const WHOLE: u32 = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Pause,
    Run,
    End,
}

#[derive(Debug)]
struct State {
    mode: Mode,
    writers: u32,
    parked: u32,
}

#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// `state.mode == Run`, for the look before each page.
    running: std::sync::atomic::AtomicBool,
    throttle: AtomicU8,
    /// How each writer rests for the time it runs.
    rests: Vec<AtomicU16>,
}

impl Gate {
    /// Closed, with `writers` counted as standing still until they arrive.
    pub(super) fn new(writers: u32) -> Self {
        let state = State { mode: Mode::Pause, writers, parked: writers };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            running: false.into(),
            throttle: AtomicU8::new(0),
            rests: (0..writers).map(|_| AtomicU16::new(0)).collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, mode: Mode) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.mode = mode;
        self.running.store(mode == Mode::Run, Ordering::Release);
        self.changed.notify_all();
        state
    }

    pub(super) fn open(&self) {
        drop(self.set(Mode::Run));
    }

    pub(super) fn end(&self) {
        drop(self.set(Mode::End));
    }

    /// Closes the gate and waits until every writer stands still.
    pub(super) fn close(&self) -> io::Result<()> {
        let state = self.set(Mode::Pause);
        let still = |state: &mut State| state.parked < state.writers;
        let waited = self.changed.wait_timeout_while(state, PAUSE_TIMEOUT, still);
        let (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            let (parked, writers) = (state.parked, state.writers);
            let what = format!("{parked} of {writers} writers stood still within {PAUSE_TIMEOUT:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        Ok(())
    }

    /// True while every writer stands still and the gate is closed.
    pub(super) fn is_closed(&self) -> bool {
        let state = self.lock();
        state.mode == Mode::Pause && state.parked == state.writers
    }

    pub(super) fn set_throttle(&self, share: Percent) {
        self.throttle.store(share.get(), Ordering::Relaxed);
    }

    pub(super) fn set_rest(&self, writer: usize, rest: RestShare) {
        if let Some(slot) = self.rests.get(writer) {
            slot.store(rest.percent_of_run(), Ordering::Relaxed);
        }
    }

    /// Of each [`WHOLE`] of its time, those in which `writer` may run; `None` without a brake.
    fn run_share(&self, writer: u32) -> Option<u32> {
        let throttle = u32::from(self.throttle.load(Ordering::Relaxed).min(99));
        let rest = self.rests.get(writer as usize).map_or(0, |rest| u32::from(rest.load(Ordering::Relaxed)));
        (throttle + rest > 0).then(|| ((100 - throttle) * WHOLE / (100 + rest)).max(1))
    }

    /// Called by a writer before its first page: it has been counted as standing still so far. `false`: end.
    pub(super) fn arrive(&self) -> bool {
        let state = self.lock();
        self.stand_still(state)
    }

    /// Called by a writer before each page. `None`: end. `Some(true)`: it stood still in between.
    pub(super) fn pass(&self) -> Option<bool> {
        if self.running.load(Ordering::Acquire) {
            return Some(false);
        }
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        self.stand_still(state).then_some(true)
    }

    /// Waits, counted in `parked`, until the gate opens.
    fn stand_still(&self, state: MutexGuard<'_, State>) -> bool {
        let wait = self.changed.wait_while(state, |state| state.mode == Mode::Pause);
        let mut state = wait.unwrap_or_else(PoisonError::into_inner);
        state.parked -= 1;
        state.mode == Mode::Run
    }

    /// Sleeps for `time`, or until the gate is no longer open.
    fn nap(&self, time: Duration) {
        let state = self.lock();
        drop(self.changed.wait_timeout_while(state, time, |state| state.mode == Mode::Run));
    }
}

/// Keeps one writer at its rate and inside its throttle. A writer with a rate stands for a vCPU that is busy all the time:
/// what the throttle takes of its time it takes of the rate.
#[derive(Debug)]
pub(super) struct Pace {
    writer: u32,
    rate: Option<Rate>,
    next: Instant,
    period: Instant,
}

impl Pace {
    /// `rate` is this writer's own.
    pub(super) fn new(writer: u32, rate: Option<Rate>) -> Self {
        let now = Instant::now();
        Self { writer, rate, next: now, period: now }
    }

    /// The writer stood still; nothing is made up for.
    pub(super) fn restart(&mut self) {
        (self.next, self.period) = (Instant::now(), Instant::now());
    }

    /// True if an idle guest's writer must not write at all.
    pub(super) fn is_idle(&self) -> bool {
        self.rate == Some(Rate(0))
    }

    /// Sleeps as the rate and the throttle demand after `bytes` were written.
    pub(super) fn wrote(&mut self, bytes: u64, gate: &Gate) {
        let share = gate.run_share(self.writer);
        let now = Instant::now();
        let Some(rate) = self.rate else {
            let Some(share) = share else { return };
            let run = PERIOD * share / WHOLE;
            if now.duration_since(self.period) >= run {
                gate.nap(PERIOD - run);
                self.period = Instant::now();
            }
            return;
        };
        let rate = share.map_or(rate, |share| Rate((rate.0 * u64::from(share) / u64::from(WHOLE)).max(1)));
        let cost = rate.time_for(bytes).unwrap_or(PERIOD);
        self.next = self.next.max(now.checked_sub(BURST).unwrap_or(now)) + cost;
        if let Some(early) = self.next.checked_duration_since(now).filter(|early| *early >= NAP) {
            gate.nap(early);
        }
    }

    /// Sleeps until the gate changes.
    pub(super) fn rest(&self, gate: &Gate) {
        gate.nap(Duration::from_secs(3600));
    }
}
