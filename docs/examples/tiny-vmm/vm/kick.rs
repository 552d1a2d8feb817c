//! Kicks: signals by which vCPUs leave the guest, to look at their gate.

use std::thread::JoinHandle;
use std::time::Duration;

use ramwire::guest::VcpuGate;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// A braked vCPU runs at most this long before it rests.
pub(super) const SLICE: Duration = Duration::from_millis(10);
/// Time between two looks for a brake that came just before one began to wait.
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

/// What the kicker does until the end: no vCPU runs on for more than a slice without a look at its brake.
pub(super) fn kick_braked(gate: &VcpuGate, threads: &[JoinHandle<()>]) {
    let mut wait = POLL_INTERVAL;
    while let Some(braked) = gate.watch(wait) {
        if braked {
            kick(threads);
        }
        wait = if braked { SLICE } else { POLL_INTERVAL };
    }
}
