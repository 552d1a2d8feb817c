//! Calls that raise SIGPIPE where the other end is gone and have no flag against it, as `splice(2)` to a socket.
//!
//! Whether SIGPIPE ends the process is the embedder's choice, so the signal is kept from the thread instead: the kernel
//! sends it to the thread that made the call (`send_sig` to `current`), where it waits while it is blocked, and is
//! taken from there.

use std::mem::MaybeUninit;

use rustix::io::Errno;

/// Makes `call`; a SIGPIPE that it raises goes nowhere. The thread's signal mask is as before when this returns.
///
/// Where the thread blocked SIGPIPE before, the signal stays pending: that is as its owner wants it.
pub(super) fn without_sigpipe<T>(call: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let mut sigpipe = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the first call fills the set, which only then is used; the mask before is written by the third, which fails
    // for an unknown first argument only. All pointers are of values that outlive the calls.
    let was_blocked = unsafe {
        libc::sigemptyset(sigpipe.as_mut_ptr());
        libc::sigaddset(sigpipe.as_mut_ptr(), libc::SIGPIPE);
        libc::pthread_sigmask(libc::SIG_BLOCK, sigpipe.as_ptr(), before.as_mut_ptr());
        libc::sigismember(before.as_ptr(), libc::SIGPIPE) == 1
    };
    let answer = call();
    if was_blocked {
        return answer;
    }
    if matches!(answer, Err(Errno::PIPE)) {
        let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: reads a set and a time, and writes nothing: no information about the signal is asked for. A thread's own
        // signals are taken before the process's, so this is the one that the call has raised.
        while unsafe { libc::sigtimedwait(sigpipe.as_ptr(), std::ptr::null_mut(), &raw const at_once) } < 0
            && Errno::from_io_error(&std::io::Error::last_os_error()) == Some(Errno::INTR)
        {}
    }
    // SAFETY: puts back the mask that the call above has written.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    answer
}
