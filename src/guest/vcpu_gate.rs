//! The gate between the control of a VM and its vCPU threads.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::sys::Lock as _;
use crate::units::{Percent, RestShare};

/// A kick that comes just before a vCPU enters the guest is lost: it is repeated after this long.
const AGAIN: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Pause,
    Run,
    End,
}

#[derive(Debug)]
struct State {
    mode: Mode,
    paused: u32,
}

/// Lets the vCPU threads of a VM run, pause, slow down and end, as [`GuestControl`](super::GuestControl) requires, for
/// VMMs without a mechanism of their own.
///
/// A vCPU's thread calls [`arrive`](Self::arrive) once. Then it runs its vCPU as long as [`is_open`](Self::is_open),
/// with a call of [`rest`](Self::rest) after each few milliseconds of run time. Otherwise it calls
/// [`wait_while_closed`](Self::wait_while_closed).
#[derive(Debug)]
pub struct VcpuGate {
    state: Mutex<State>,
    changed: Condvar,
    /// `state.mode == Run`, for checks without cost.
    open: AtomicBool,
    /// Percent of its time that is taken from every vCPU.
    throttle: AtomicU8,
    /// How each vCPU rests for the time it runs.
    rests: Vec<AtomicU16>,
}

impl VcpuGate {
    /// Closed. A vCPU without a thread counts as paused.
    pub fn new(vcpus: u32) -> Self {
        Self {
            state: Mutex::new(State { mode: Mode::Pause, paused: vcpus }),
            changed: Condvar::new(),
            open: AtomicBool::new(false),
            throttle: AtomicU8::new(0),
            rests: (0..vcpus).map(|_| AtomicU16::new(0)).collect(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.locked()
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
    }

    fn set(&self, mode: Mode) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.mode = mode;
        self.open.store(mode == Mode::Run, Ordering::Release);
        self.changed.notify_all();
        state
    }

    fn all_paused(&self, state: &State) -> bool {
        state.paused as usize >= self.rests.len()
    }

    /// Lets the vCPUs run.
    pub fn open(&self) {
        drop(self.set(Mode::Run));
    }

    /// Closes the gate and returns when every vCPU is paused. `kick` forces vCPUs out of the guest; it is called each
    /// millisecond until then.
    ///
    /// # Errors
    /// `TimedOut` if some are not paused `within` that time; the gate stays closed.
    pub fn close(&self, within: Duration, mut kick: impl FnMut()) -> io::Result<()> {
        let began = Instant::now();
        let mut state = self.set(Mode::Pause);
        while !self.all_paused(&state) {
            if began.elapsed() >= within {
                let (paused, vcpus) = (state.paused, self.rests.len());
                let what = format!("{paused} of {vcpus} vCPUs were paused within {within:?}");
                return Err(io::Error::new(io::ErrorKind::TimedOut, what));
            }
            kick();
            state = self.wait(state, AGAIN);
        }
        Ok(())
    }

    /// Ends the vCPUs' threads. Those in the guest need a kick.
    pub fn end(&self) {
        drop(self.set(Mode::End));
    }

    /// True while vCPUs may run. The check costs one load.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// True while the gate is closed and every vCPU is paused.
    pub fn is_closed(&self) -> bool {
        let state = self.lock();
        state.mode == Mode::Pause && self.all_paused(&state)
    }

    /// To be called when a vCPU's thread begins: waits, counted as paused, until the gate opens. `false`: the thread
    /// must end.
    #[must_use]
    pub fn arrive(&self) -> bool {
        self.wait_open(self.lock())
    }

    /// To be called when a vCPU's thread finds the gate closed, with no unfinished exit of the guest: waits until the
    /// gate opens. `false`: the thread must end.
    #[must_use]
    pub fn wait_while_closed(&self) -> bool {
        self.wait_open(self.count_as_paused())
    }

    /// As [`wait_while_closed`](Self::wait_while_closed), for a vCPU that can't run any more: waits for the end.
    pub fn wait_for_end(&self) {
        let state = self.count_as_paused();
        drop(self.changed.wait_while(state, |state| state.mode != Mode::End));
    }

    fn count_as_paused(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.paused += 1;
        self.changed.notify_all();
        state
    }

    fn wait_open(&self, state: MutexGuard<'_, State>) -> bool {
        let wait = self.changed.wait_while(state, |state| state.mode == Mode::Pause);
        let mut state = wait.unwrap_or_else(PoisonError::into_inner);
        let runs = state.mode == Mode::Run;
        state.paused -= u32::from(runs);
        runs
    }

    /// Sleeps for `time`, or until the gate is no longer open: an idle vCPU.
    pub fn nap(&self, time: Duration) {
        let state = self.lock();
        drop(self.changed.wait_timeout_while(state, time, |state| state.mode == Mode::Run));
    }

    /// Takes `share` of every vCPU's time from now on.
    pub fn set_throttle(&self, share: Percent) {
        self.throttle.store(share.get(), Ordering::Relaxed);
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Sets the rest of `vcpu` from now on, in addition to the share taken from all vCPUs. An unknown vCPU is ignored.
    pub fn set_rest(&self, vcpu: usize, rest: RestShare) {
        if let Some(slot) = self.rests.get(vcpu) {
            slot.store(rest.percent_of_run(), Ordering::Relaxed);
            drop(self.lock());
            self.changed.notify_all();
        }
    }

    /// Share of its time in which `vcpu` may run, in parts of 10,000, at least 1; `None` if it is not throttled.
    pub fn run_share(&self, vcpu: usize) -> Option<u32> {
        let throttle = u32::from(self.throttle.load(Ordering::Relaxed).min(99));
        let rest = self.rests.get(vcpu).map_or(0, |rest| u32::from(rest.load(Ordering::Relaxed)));
        (throttle + rest > 0).then(|| ((100 - throttle) * WHOLE / (100 + rest)).max(1))
    }

    /// Sleeps as long as `vcpu` must rest after it ran for `ran`; true if it slept. Ends early when the gate closes,
    /// and adapts if the vCPU's throttle changes meanwhile.
    pub fn rest(&self, vcpu: usize, ran: Duration) -> bool {
        let (began, mut rested) = (Instant::now(), false);
        let mut state = self.lock();
        while state.mode == Mode::Run
            && let Some(share) = self.run_share(vcpu)
            && let Some(left) = (ran * (WHOLE - share) / share).checked_sub(began.elapsed())
            && !left.is_zero()
        {
            rested = true;
            state = self.wait(state, left);
        }
        rested
    }

    /// For a thread that kicks throttled vCPUs out of the guest, so that they check their limits: waits at most `time`,
    /// or less if something changes. `None`: the end; otherwise whether any vCPU is throttled.
    pub fn watch(&self, time: Duration) -> Option<bool> {
        let mut state = self.lock();
        if state.mode != Mode::End {
            state = self.wait(state, time);
        }
        let throttled = || (0..self.rests.len()).any(|vcpu| self.run_share(vcpu).is_some());
        (state.mode != Mode::End).then(throttled)
    }
}

/// Parts of a vCPU's time.
pub(super) const WHOLE: u32 = 10_000;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// Threads count as long as the gate is open; none counts after it is closed, and all end.
    #[test]
    fn nobody_runs_behind_a_closed_gate_and_all_end() {
        let gate = Arc::new(VcpuGate::new(3));
        assert!(gate.is_closed(), "without threads");
        let count = Arc::new(AtomicU32::new(0));
        let run = || {
            let (gate, count) = (gate.clone(), count.clone());
            std::thread::spawn(move || {
                let mut runs = gate.arrive();
                while runs {
                    while gate.is_open() {
                        count.fetch_add(1, Ordering::Relaxed);
                        gate.nap(Duration::from_micros(50));
                    }
                    runs = gate.wait_while_closed();
                }
            })
        };
        let threads: Vec<_> = (0..3).map(|_| run()).collect();
        for _ in 0..50 {
            gate.open();
            while count.swap(0, Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
            gate.close(LONG, || {}).unwrap();
            assert!(gate.is_closed());
            count.store(0, Ordering::Relaxed);
            std::thread::yield_now();
            assert_eq!(count.load(Ordering::Relaxed), 0);
        }
        gate.end();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn a_vcpu_that_does_not_stand_still_is_kicked_and_told() {
        let gate = VcpuGate::new(1);
        gate.open();
        assert!(gate.arrive());
        let mut kicks = 0;
        let error = gate.close(Duration::from_millis(20), || kicks += 1).unwrap_err();
        assert!(error.to_string().contains("0 of 1 vCPUs") && kicks > 0, "{error}");
        assert!(!gate.is_closed() && !gate.is_open());
        std::thread::scope(|scope| {
            scope.spawn(|| gate.wait_for_end());
            gate.close(LONG, || {}).unwrap();
            gate.end();
        });
    }

    #[test]
    fn a_throttle_of_all_and_one_of_a_vcpu_add_up() {
        let gate = VcpuGate::new(2);
        assert_eq!([gate.run_share(0), gate.run_share(1)], [None, None]);
        gate.set_rest(1, RestShare::new(300));
        gate.set_rest(7, RestShare::new(300));
        assert_eq!([gate.run_share(0), gate.run_share(1)], [None, Some(2500)]);
        gate.set_throttle(Percent::new(50).unwrap());
        assert_eq!([gate.run_share(0), gate.run_share(1)], [Some(5000), Some(1250)]);
        gate.set_throttle(Percent::new(100).unwrap());
        gate.set_rest(1, RestShare::MAX);
        assert_eq!(gate.run_share(1), Some(1), "it always goes on");
    }

    #[test]
    fn a_rest_ends_with_the_throttle_and_with_the_gate() {
        let gate = VcpuGate::new(1);
        gate.open();
        assert!(!gate.rest(0, LONG), "not throttled");
        gate.set_throttle(Percent::new(50).unwrap());
        assert!(gate.rest(0, Duration::from_micros(1)) || gate.watch(Duration::ZERO) == Some(true));
        for lift in [VcpuGate::close_now, |gate: &VcpuGate| gate.set_throttle(Percent::default())] {
            gate.set_throttle(Percent::new(99).unwrap());
            gate.open();
            std::thread::scope(|scope| {
                let rests = scope.spawn(|| gate.rest(0, LONG));
                std::thread::sleep(Duration::from_millis(20));
                lift(&gate);
                rests.join().unwrap();
            });
        }
        assert_eq!(gate.watch(Duration::ZERO), Some(false));
        gate.end();
        assert_eq!(gate.watch(LONG), None);
    }

    impl VcpuGate {
        fn close_now(&self) {
            drop(self.set(Mode::Pause));
        }
    }
}
