//! Kicks: signals by which vCPUs leave the guest, to look at their gate.

use std::thread::JoinHandle;
use std::time::Duration;

use ramwire::guest::VcpuGate;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// A throttled vCPU runs at most this long before it rests.
pub(super) const SLICE: Duration = Duration::from_millis(10);
/// Time between two checks for a throttle that came just before one began to wait.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

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

/// What the kicker does until the end: no vCPU runs on for more than a slice without a check of its throttle.
pub(super) fn kick_throttled(gate: &VcpuGate, threads: &[JoinHandle<()>]) {
    let mut wait = POLL_INTERVAL;
    while let Some(throttled) = gate.watch(wait) {
        if throttled {
            kick(threads);
        }
        wait = if throttled { SLICE } else { POLL_INTERVAL };
    }
}
