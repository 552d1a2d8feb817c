//! An embedder's handle for the pages that are read while a guest runs.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::guest::GuestMemory;

use super::{RestoreSettings, working_set};
use crate::session::Error;
use crate::session::pager::{Filling, LazyProgress, PageFailure};

/// Threads that serve faults: while one reads a page, the other is available.
const FAULT_THREADS: usize = 2;

/// Maximum number of threads that read the rest, if no number is configured.
const MAX_READERS: usize = 4;

/// The memory of a guest that runs while it is read from a file.
///
/// Dropping it changes nothing: threads of this process continue until all pages are placed. A thread that touches a
/// missing page waits for it, and never reads zeros instead.
#[derive(Debug)]
pub struct LazyPages {
    filling: Arc<Filling>,
    keeper: Option<JoinHandle<()>>,
}

/// The file to which the working set is written at the end, and the memory that it belongs to.
pub(super) type Record = Option<(PathBuf, Arc<dyn GuestMemory>)>;

impl LazyPages {
    /// Starts the threads. Of the pages that no thread waits for, they first read those that were touched the last
    /// time.
    pub(super) fn start(filling: Filling, settings: &RestoreSettings, record: Record) -> Result<Self, Error> {
        let filling = Arc::new(filling);
        match start_threads(&filling, settings, record) {
            Ok(keeper) => Ok(Self { filling, keeper: Some(keeper) }),
            Err(error) => {
                filling.end();
                Err(error)
            }
        }
    }

    /// The guest runs: the rest is read, too.
    pub(super) fn read_rest(&self) {
        self.filling.change(|state| state.fill.open());
    }

    /// How far it is.
    pub fn progress(&self) -> LazyProgress {
        self.filling.progress()
    }

    /// The first page that could not be read, since the last [`retry`](Self::retry). The others are still read.
    pub fn failure(&self) -> Option<PageFailure> {
        self.filling.failure()
    }

    /// Retries pages that could not be read, requested pages first. Returns the number of these target pages.
    pub fn retry(&self) -> u64 {
        self.filling.retry()
    }

    /// Waits until all pages are placed, so that accesses no longer wait.
    ///
    /// # Errors
    /// Pages could not be read, and nothing else is missing. Call it again after [`retry`](Self::retry).
    pub fn wait(&self) -> Result<(), PageFailure> {
        let mut state = self.filling.state();
        loop {
            let can_not_go_on = state.fill.is_stuck() || state.is_over && !state.fill.is_whole();
            match state.failure.clone().filter(|_| can_not_go_on) {
                Some(failure) => return Err(failure),
                None if state.is_over => return Ok(()),
                None => state = self.filling.changed(state),
            }
        }
    }

    /// True once [`wait`](Self::wait) would not block.
    pub fn is_finished(&self) -> bool {
        let state = self.filling.state();
        state.is_over || state.fill.is_stuck()
    }

    /// The guest no longer runs and never will: missing pages are not read, and read as zero.
    pub fn end(mut self) {
        self.filling.change(|state| state.is_abandoned = true);
        self.filling.end();
        if let Some(keeper) = self.keeper.take() {
            // A panic there was reported where it happened.
            let _ = keeper.join();
        }
    }
}

fn start_threads(
    filling: &Arc<Filling>,
    settings: &RestoreSettings,
    record: Record,
) -> Result<JoinHandle<()>, Error> {
    let spawner = &settings.destination.spawner;
    let readers = match settings.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from).min(MAX_READERS),
        asked => asked.into(),
    };
    let mut threads = Vec::new();
    for _ in 0..FAULT_THREADS {
        let serving = Arc::clone(filling);
        threads.push(spawner.spawn("ramwire-faults", Box::new(move || serving.serve_faults()))?);
    }
    for _ in 0..readers {
        let reading = Arc::clone(filling);
        threads.push(spawner.spawn("ramwire-file-rx", Box::new(move || reading.read_rest()))?);
    }
    let keeping = Arc::clone(filling);
    spawner.spawn("ramwire-restore", Box::new(move || keep(&keeping, threads, record)))
}

/// Waits until no page is missing, then releases the memory.
fn keep(filling: &Arc<Filling>, threads: Vec<JoinHandle<()>>, record: Record) {
    let mut state = filling.state();
    while !state.is_over && !state.fill.is_whole() {
        state = filling.changed(state);
    }
    let (is_whole, is_abandoned) = (state.fill.is_whole(), state.is_abandoned);
    let touched = state.fill.touched().to_vec();
    drop(state);
    // The end of the serving resolves a fault of an already received page; after it, the fault could not be resolved.
    filling.stop_serving();
    for thread in threads {
        // A panic there was reported where it happened; the others have done its work.
        let _ = thread.join();
    }
    if is_whole {
        filling.let_go();
        if let Some((path, memory)) = record
            && let Err(error) = working_set::write(&path, memory.table(), &touched)
        {
            tracing::warn!(%error, path = %path.display(), "the working set could not be kept");
        }
    } else if !is_abandoned {
        // If the last descriptor were closed, missing pages would read as zero, and the guest would continue with them.
        std::mem::forget(Arc::clone(filling));
    }
    filling.end();
}
