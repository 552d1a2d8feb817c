//! Calls that raise SIGPIPE if the other end is gone and have no flag against it, such as `splice(2)` to a socket.
//!
//! Whether SIGPIPE ends the process is the embedder's choice, so the thread blocks the signal instead: the kernel sends
//! it to the thread that made the call (`send_sig` to `current`). There it stays pending while it is blocked, and is
//! removed afterwards.

use std::mem::MaybeUninit;

use rustix::io::Errno;

/// Makes `call`, which moves up to `wanted` bytes, and discards a SIGPIPE that it raises. The thread's signal mask is
/// restored when this returns.
///
/// A call that has moved some bytes and then finds the other end gone raises the signal too, and returns how many bytes
/// it moved: EPIPE is not the only sign.
///
/// If the thread blocked SIGPIPE before, the signal stays pending, as the thread's owner wants it.
pub(super) fn without_sigpipe(
    wanted: usize,
    call: impl FnOnce() -> Result<usize, Errno>,
) -> Result<usize, Errno> {
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
    if answer.map_or_else(|error| error == Errno::PIPE, |moved| moved < wanted) {
        let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: reads a set and a time, and writes nothing: no information about the signal is asked for. A thread's own
        // signals are taken before the process's, so this is the one that the call has raised.
        while unsafe { libc::sigtimedwait(sigpipe.as_ptr(), std::ptr::null_mut(), &raw const at_once) } < 0
            && Errno::from_io_error(&std::io::Error::last_os_error()) == Some(Errno::INTR)
        {}
    }
    // SAFETY: restores the mask that the call above has written.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    answer
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

    use super::*;

    /// The thread of the test: other threads of this process may raise the signal too.
    static THREAD: AtomicI32 = AtomicI32::new(0);
    static HEARD: AtomicU32 = AtomicU32::new(0);

    extern "C" fn hear(_: libc::c_int) {
        // SAFETY: only queries a number.
        if unsafe { libc::gettid() } == THREAD.load(Ordering::Relaxed) {
            HEARD.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_signal_of_a_call_that_moved_less_than_wanted_goes_nowhere() {
        let raise_and = |answer: Result<usize, Errno>| {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            drop(reader);
            assert_eq!(rustix::io::write(&writer, &[0]), Err(Errno::PIPE));
            answer
        };
        // SAFETY: only queries a number; the handler touches atomic numbers only.
        let before = unsafe {
            THREAD.store(libc::gettid(), Ordering::Relaxed);
            libc::signal(libc::SIGPIPE, hear as *const () as libc::sighandler_t)
        };
        for (answer, heard) in [(Err(Errno::PIPE), 0), (Ok(0), 0), (Ok(1), 0), (Ok(2), 1)] {
            assert_eq!(without_sigpipe(2, || raise_and(answer)), answer);
            assert_eq!(HEARD.swap(0, Ordering::Relaxed), heard, "{answer:?}");
        }
        // SAFETY: restores the previous handler.
        unsafe { libc::signal(libc::SIGPIPE, before) };
    }
}
