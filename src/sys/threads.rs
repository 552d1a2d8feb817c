//! How a thread is started: by whoever embeds us, since affinity and filters are theirs.

use std::io;
use std::thread::JoinHandle;

/// What a thread runs.
pub type Job = Box<dyn FnOnce() + Send + 'static>;

/// Starts a thread: called with its name and its job. An embedder sets affinity or a seccomp filter here.
pub type SpawnFn = dyn Fn(&'static str, Job) -> io::Result<JoinHandle<()>> + Send + Sync;

/// Starts a thread as the standard library does.
///
/// # Errors
/// What the kernel says: no memory, or too many threads.
pub fn spawn_thread(name: &'static str, job: Job) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(job)
}
