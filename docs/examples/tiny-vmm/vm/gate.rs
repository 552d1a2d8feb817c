//! Between those who control the VM and its vCPUs' threads: run, stand still, slow down, end.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// A signal that came just before KVM_RUN is lost: it is sent again after this long.
const AGAIN: Duration = Duration::from_millis(1);
/// A braked vCPU runs at most this long before it rests.
pub(super) const SLICE: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Pause,
    Run,
    End,
}

#[derive(Debug)]
struct State {
    mode: Mode,
    standing: u32,
}

#[derive(Debug)]
pub(super) struct Gate {
    vcpus: u32,
    state: Mutex<State>,
    changed: Condvar,
    /// Percent of its time that every vCPU rests.
    throttle: AtomicU32,
}

/// Makes KVM_RUN return with EINTR: a signal does, if its handler does nothing but exist.
pub(super) fn prepare_kicks() -> std::io::Result<()> {
    extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    Ok(register_signal_handler(SIGRTMIN(), nothing)?)
}

pub(super) fn kick(threads: &[JoinHandle<()>]) {
    // A thread that has ended needs no kick.
    for thread in threads {
        let _ = thread.kill(SIGRTMIN());
    }
}

impl Gate {
    /// Closed. A vCPU without a thread counts as standing still.
    pub(super) fn new(vcpus: u32) -> Self {
        Self {
            vcpus,
            state: Mutex::new(State { mode: Mode::Pause, standing: vcpus }),
            changed: Condvar::new(),
            throttle: AtomicU32::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, mode: Mode) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.mode = mode;
        self.changed.notify_all();
        state
    }

    pub(super) fn open(&self) {
        drop(self.set(Mode::Run));
    }

    /// Closes the gate, and returns when every vCPU stands still.
    pub(super) fn close(&self, threads: &[JoinHandle<()>]) {
        let mut state = self.set(Mode::Pause);
        while state.standing < self.vcpus {
            kick(threads);
            state = self.wait(state, AGAIN);
        }
    }

    pub(super) fn end(&self, threads: &[JoinHandle<()>]) {
        drop(self.set(Mode::End));
        while !threads.iter().all(JoinHandle::is_finished) {
            kick(threads);
            std::thread::sleep(AGAIN);
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.lock().mode == Mode::Run
    }

    /// True while the gate is closed and every vCPU stands still.
    pub(super) fn is_closed(&self) -> bool {
        let state = self.lock();
        state.mode == Mode::Pause && state.standing == self.vcpus
    }

    /// Counted as standing still, a vCPU waits until the gate opens; `false`: it ends. A thread begins `counted` already.
    pub(super) fn stand_still(&self, counted: bool) -> bool {
        let mut state = self.lock();
        state.standing += u32::from(!counted);
        self.changed.notify_all();
        while state.mode == Mode::Pause {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.mode == Mode::Run {
            state.standing -= 1;
        }
        state.mode == Mode::Run
    }

    /// As [`stand_still`](Self::stand_still) for a vCPU that can't run any more: it waits for the end.
    pub(super) fn stand_for_good(&self) {
        let mut state = self.lock();
        state.standing += 1;
        self.changed.notify_all();
        while state.mode != Mode::End {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Sleeps until `until`, or until the gate is no longer open.
    pub(super) fn rest_until(&self, until: Instant) {
        let mut state = self.lock();
        while state.mode == Mode::Run
            && let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
        {
            state = self.wait(state, left);
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
    }

    pub(super) fn set_throttle(&self, percent: u32) {
        self.throttle.store(percent.min(99), Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// How long a vCPU is to rest after it ran for `ran`; `None` without a brake.
    pub(super) fn rest_after(&self, ran: Duration) -> Option<Duration> {
        let throttle = self.throttle.load(Ordering::Relaxed);
        (throttle > 0).then(|| ran * throttle / (100 - throttle))
    }

    /// What the kicker does until the end: no vCPU runs on for more than a slice without a look at its brake.
    pub(super) fn kick_braked(&self, threads: &[JoinHandle<()>]) {
        loop {
            let state = self.lock();
            if state.mode == Mode::End {
                return;
            }
            let braked = self.rest_after(SLICE).is_some();
            // A brake that is put on wakes this; one that came between the look and the wait is seen a second later.
            drop(self.wait(state, if braked { SLICE } else { Duration::from_secs(1) }));
            if braked {
                kick(threads);
            }
        }
    }
}
