//! Starting of threads: the embedder can do it, to set affinity and filters.

use std::io;
use std::thread::JoinHandle;

/// What a thread runs.
pub type Job = Box<dyn FnOnce() + Send + 'static>;

/// Starts a thread: called with its name and its job. An embedder sets affinity or a seccomp filter here.
pub type SpawnFn = dyn Fn(&'static str, Job) -> io::Result<JoinHandle<()>> + Send + Sync;

/// Starts a thread as the standard library does.
///
/// # Errors
/// The kernel's error: no memory, or too many threads.
pub fn spawn_thread(name: &'static str, job: Job) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(job)
}

/// Number of the calling thread in the kernel (gettid(2)).
pub(crate) fn this_thread() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs()
}

/// From here on the calling thread runs only while a core is otherwise idle (SCHED_IDLE, sched(7)).
///
/// # Errors
/// The error of sched_setscheduler(2): the call is forbidden.
pub(crate) fn only_when_idle() -> io::Result<()> {
    // SAFETY: all fields are integers, and zero is the one priority of this policy.
    let priority: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is read during the call only; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const priority) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
