//! Tests: detects that a thread has begun to wait, seen from another thread. Test programs include this file by its
//! path.

use std::time::{Duration, Instant};

/// This thread, for [`until_blocked`].
pub(crate) fn own_thread() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// Returns when thread `thread` of this process waits in a system call other than one for a lock.
///
/// # Panics
///
/// If it does not wait within 20 s, or ends before.
pub(crate) fn until_blocked(thread: i32) {
    let until = Instant::now() + Duration::from_secs(20);
    let path = format!("/proc/self/task/{thread}/syscall");
    loop {
        // Its number and arguments; `running`, or -1 for a wait outside of system calls.
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let call = text.split_whitespace().next().and_then(|number| number.parse().ok());
        if call.is_some_and(|call: i64| call >= 0 && call != libc::SYS_futex) {
            return;
        }
        assert!(Instant::now() < until, "thread {thread} does not wait: {text}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
