//! Threads, started in the embedder's way.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::RecvTimeoutError;

use crate::session::Error;
use crate::session::callback::guarded;
use crate::sys::spawn_thread;
pub use crate::sys::{Job, SpawnFn};

/// Interval at which long work calls its caller back.
const STILL_AT_IT: Duration = Duration::from_secs(1);

/// How threads are started, and how many share work that uses a whole core. Clones share the callback.
#[derive(Clone)]
pub struct Spawner {
    spawn: Arc<SpawnFn>,
    workers: usize,
}

impl Default for Spawner {
    fn default() -> Self {
        Self::new(spawn_thread)
    }
}

impl std::fmt::Debug for Spawner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spawner").field("workers", &self.workers).finish_non_exhaustive()
    }
}

impl Spawner {
    /// Threads are started by `spawn`; work is shared by one thread for each core that this process may use.
    ///
    /// The cores are counted here, since the count reads files that a session's own threads may not be
    /// allowed to open.
    pub fn new(
        spawn: impl Fn(&'static str, Job) -> io::Result<JoinHandle<()>> + Send + Sync + 'static,
    ) -> Self {
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        Self { spawn: Arc::new(spawn), workers }
    }

    /// Work that uses a whole core is shared by `workers` threads, at least one.
    #[must_use]
    pub fn with_workers(mut self, workers: usize) -> Self {
        self.workers = workers.max(1);
        self
    }

    /// The callback, for threads that are not a session's own: a transport's.
    pub fn callback(&self) -> Arc<SpawnFn> {
        Arc::clone(&self.spawn)
    }

    /// Number of threads that share work that uses a whole core.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// Starts one thread.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub fn spawn(&self, name: &'static str, job: Job) -> Result<JoinHandle<()>, Error> {
        (self.spawn)(name, job).map_err(|source| Error::Thread { name, source })
    }

    /// Runs `work` for every item of `0..items` on up to [`workers`](Self::workers) threads and returns the results in
    /// order.
    ///
    /// # Errors
    /// [`Error::Thread`] if not even one thread could be started; an item whose thread died is missing then
    /// too.
    pub fn map<T: Send + 'static>(
        &self,
        name: &'static str,
        items: usize,
        work: impl Fn(usize) -> T + Send + Sync + 'static,
    ) -> Result<Vec<T>, Error> {
        self.map_watched(name, items, work, || Ok(()))
    }

    /// As [`map`](Self::map), and calls `still_at_it` about once a second during the work.
    ///
    /// # Errors
    /// As [`map`](Self::map), and the error of `still_at_it`: the work then stops after the current items.
    pub fn map_watched<T: Send + 'static>(
        &self,
        name: &'static str,
        items: usize,
        work: impl Fn(usize) -> T + Send + Sync + 'static,
        mut still_at_it: impl FnMut() -> Result<(), Error>,
    ) -> Result<Vec<T>, Error> {
        let work = Arc::new(work);
        let next = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let (give, take) = crossbeam::channel::unbounded();
        let mut running = Vec::new();
        for _ in 0..self.workers.min(items.max(1)) {
            let (work, next, give) = (Arc::clone(&work), Arc::clone(&next), give.clone());
            let job = move || loop {
                let item = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if item >= items {
                    return;
                }
                let answer = guarded(name, || work(item));
                let ends = answer.is_err();
                if give.send((item, answer)).is_err() || ends {
                    return;
                }
            };
            match self.spawn(name, Box::new(job)) {
                Ok(handle) => running.push(handle),
                Err(error) if running.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        drop(give);
        let mut answers: Vec<Option<T>> = (0..items).map(|_| None).collect();
        let watched = loop {
            match take.recv_timeout(STILL_AT_IT) {
                Ok((item, Ok(answer))) => answers[item] = Some(answer),
                Ok((_, Err(panicked))) => break Err(panicked),
                Err(RecvTimeoutError::Disconnected) => break Ok(()),
                Err(RecvTimeoutError::Timeout) => {
                    if let Err(error) = still_at_it() {
                        break Err(error);
                    }
                }
            }
        };
        // The threads notice it at their next item.
        drop(take);
        for handle in running {
            // A panic in a worker leaves its result missing, which is reported below.
            let _ = handle.join();
        }
        watched?;
        let died = || Error::Thread { name, source: io::Error::other("it ended before its work was done") };
        answers.into_iter().collect::<Option<Vec<T>>>().ok_or_else(died)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn answers_come_in_order_and_a_dead_thread_is_told() {
        let spawner = Spawner::default().with_workers(3);
        let squares = spawner.map("square", 100, |item| item * item).unwrap();
        assert!(squares.iter().enumerate().all(|(i, square)| *square == i * i));
        assert!(spawner.map("none", 0, |item| item).unwrap().is_empty());
        let refusing = Spawner::new(|_, _| Err(io::Error::other("no")));
        assert!(matches!(refusing.map("no", 1, |i| i), Err(Error::Thread { .. })));
        let dying = Spawner::new(|_, job| {
            drop(job);
            std::thread::Builder::new().spawn(|| {})
        });
        assert!(matches!(dying.map("dead", 1, |i| i), Err(Error::Thread { .. })));
    }

    #[test]
    fn long_work_is_watched_and_left_when_the_watcher_says_so() {
        let spawner = Spawner::default().with_workers(1);
        let (enough, done) = crossbeam::channel::bounded::<()>(0);
        let work = move |item: usize| {
            // The first item runs until the watcher was called; otherwise it would run for ever.
            if item == 0 {
                let _ = done.recv();
            }
            item
        };
        let mut enough = Some(enough);
        let watched = spawner.map_watched("watched", 3, work, || {
            drop(enough.take());
            Ok(())
        });
        assert_eq!(watched.unwrap(), [0, 1, 2]);

        let (enough, done) = crossbeam::channel::bounded::<()>(0);
        let left = spawner.map_watched("left", 1 << 20, move |_| done.recv().is_ok(), {
            let mut enough = Some(enough);
            move || {
                drop(enough.take());
                Err(Error::Cancelled)
            }
        });
        assert!(matches!(left, Err(Error::Cancelled)));
    }
}
