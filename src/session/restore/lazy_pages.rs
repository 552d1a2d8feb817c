//! The pages that come while a guest runs, in the hand of an embedder.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::guest::GuestMemory;

use super::{RestoreSettings, working_set};
use crate::session::Error;
use crate::session::pager::{Filling, LazyProgress, PageFailure};

/// Threads that serve faults: while one reads a page, the other answers.
const FAULT_THREADS: usize = 2;

/// Most threads that read the rest, where nobody says how many.
const MAX_READERS: usize = 4;

/// The memory of a guest that runs while it is read from a file.
///
/// Dropping it changes nothing: threads of this process read on until all is in place. Who touches a page that is missing
/// waits until then, and never sees zeros in its place.
#[derive(Debug)]
pub struct LazyPages {
    filling: Arc<Filling>,
    keeper: Option<JoinHandle<()>>,
}

/// Where the working set is written at the end, and the memory that it is of.
pub(super) type Record = Option<(PathBuf, Arc<dyn GuestMemory>)>;

impl LazyPages {
    /// Starts the threads. Of what nobody waits for they read what was touched the last time.
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

    /// The first page that could not be read, since the last [`retry`](Self::retry). The others are read all the same.
    pub fn failure(&self) -> Option<PageFailure> {
        self.filling.state().failure.clone()
    }

    /// Tries again what could not be read; pages that somebody waits for first. How many target pages those are.
    pub fn retry(&self) -> u64 {
        self.filling.retry()
    }

    /// Waits until all pages are in place, and accesses wait no more.
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

    /// True once [`wait`](Self::wait) would not wait.
    pub fn is_finished(&self) -> bool {
        let state = self.filling.state();
        state.is_over || state.fill.is_stuck()
    }

    /// The guest runs no more and will not again: what is missing is not read, and reads as zero.
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

/// Waits until nothing is missing, then lets the memory go.
fn keep(filling: &Arc<Filling>, threads: Vec<JoinHandle<()>>, record: Record) {
    let mut state = filling.state();
    while !state.is_over && !state.fill.is_whole() {
        state = filling.changed(state);
    }
    let (is_whole, is_abandoned) = (state.fill.is_whole(), state.is_abandoned);
    let touched = state.fill.touched().to_vec();
    drop(state);
    // A fault of a page that has come is answered by the end of the serving, and could not be answered behind it.
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
        // Behind the last descriptor what is missing would read as zero, and the guest go on with it.
        std::mem::forget(Arc::clone(filling));
    }
    filling.end();
}
