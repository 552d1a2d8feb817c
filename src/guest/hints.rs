//! Pages that the guest reports as free (QEMU's free page optimisation): they need not be sent.
//!
//! # Required orders
//!
//! A hint is valid between two syncs. Every accepted hint is applied before the logs are read, and from then until the
//! sync is over no hint is accepted: otherwise a page that was written meanwhile would be cleared after the log had
//! reported it. The log of the hinted pages is armed again before the hint is accepted: a log that is cleared chunk by
//! chunk would otherwise miss a write between the hint and the clearing of its chunk. So the next sync finds every
//! write that follows the return of [`PageHints::free`], and the page is sent.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{DirtyError, DirtySource};
use crate::ram::{PageRun, RamBlockTable, Refusal};
use crate::sys::Lock as _;

/// Maximum number of runs that wait for the page loop, which takes them before each batch.
const MAX_WAITING: usize = 64 << 10;

/// The time between two syncs in which hints are valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HintEpoch(u64);

/// What became of a hint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hinted {
    /// Its unsent pages are not sent, unless they are written again.
    Taken,
    /// It came too late and has no effect.
    TooLate,
    /// Tens of thousands of hints already wait for the page loop: this one has no effect.
    Full,
}

/// Why a hint was refused; it has no effect.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HintError {
    /// The run is not in a block, or its block is not migrated.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A dirty log could not be armed for its pages.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
}

/// Takes hints for one migration, from any thread; clones share it.
///
/// # What the guest promises
///
/// It holds the pages free from some moment in the epoch until [`free`](Self::free) has returned. A balloon device
/// receives an event when a sync begins, and then returns the pages to its guest. Later hints come too late, which is
/// safe.
#[derive(Clone)]
pub struct PageHints(Arc<Shared>);

struct Shared {
    table: RamBlockTable,
    sources: Vec<Arc<dyn DirtySource>>,
    /// True if there are hints: the page loop checks this once a batch, without the lock.
    any: AtomicBool,
    state: Mutex<State>,
    #[cfg(test)]
    breakage: Mutex<HintBreakage>,
}

struct State {
    epoch: u64,
    open: bool,
    free: Vec<PageRun>,
}

/// Switches off orders of this file, for the simulation.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HintBreakage {
    /// The log of the pages is not armed again.
    pub(crate) unprotected: bool,
    /// The epoch of a hint is not checked.
    pub(crate) any_epoch: bool,
}

impl PageHints {
    /// Hints about the memory that `table` describes and `sources` track. None is accepted before the first
    /// [`open`](Self::open).
    pub(crate) fn new(table: &RamBlockTable, sources: &[Arc<dyn DirtySource>]) -> Self {
        Self(Arc::new(Shared {
            table: table.clone(),
            sources: sources.to_vec(),
            any: AtomicBool::new(false),
            state: Mutex::new(State { epoch: 0, open: false, free: Vec::new() }),
            #[cfg(test)]
            breakage: Mutex::default(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.locked()
    }

    /// The epoch in which hints are valid now; `None` while the logs are read, before the first sync and after the
    /// last.
    pub fn epoch(&self) -> Option<HintEpoch> {
        let state = self.state();
        state.open.then_some(HintEpoch(state.epoch))
    }

    /// The guest does not need the contents of the pages of `run`, and keeps them free until this returns. It delays
    /// the beginning of a sync at most until the current calls end.
    ///
    /// # Errors
    /// [`HintError`]; the pages are then sent like all others.
    pub fn free(&self, epoch: HintEpoch, run: PageRun) -> Result<Hinted, HintError> {
        self.0.table.admit_run(run)?;
        let mut state = self.state();
        if !state.open || HintEpoch(state.epoch) != epoch {
            #[cfg(test)]
            if !self.breakage().any_epoch {
                return Ok(Hinted::TooLate);
            }
            #[cfg(not(test))]
            return Ok(Hinted::TooLate);
        }
        if state.free.len() >= MAX_WAITING {
            return Ok(Hinted::Full);
        }
        self.arm(run)?;
        match state.free.last_mut() {
            Some(last) if last.block == run.block && last.end() == run.first => last.pages += run.pages,
            _ => state.free.push(run),
        }
        self.0.any.store(true, Ordering::Release);
        Ok(Hinted::Taken)
    }

    /// From here on every log reports a write to the pages of `run` again.
    fn arm(&self, run: PageRun) -> Result<(), DirtyError> {
        #[cfg(test)]
        if self.breakage().unprotected {
            return Ok(());
        }
        self.0.sources.iter().try_for_each(|source| source.reprotect(run))
    }

    /// A sync is over: hints are accepted from here on.
    pub(crate) fn open(&self) {
        let mut state = self.state();
        state.epoch += 1;
        state.open = true;
    }

    /// The logs are about to be read: no hint is accepted from here on.
    pub(crate) fn close(&self) {
        self.state().open = false;
    }

    /// Calls `each` for every run that was hinted since the last call.
    pub(crate) fn drain(&self, each: impl FnMut(PageRun)) {
        if self.0.any.load(Ordering::Acquire) {
            let mut state = self.state();
            self.0.any.store(false, Ordering::Release);
            state.free.drain(..).for_each(each);
        }
    }

    #[cfg(test)]
    fn breakage(&self) -> HintBreakage {
        *self.0.breakage.locked()
    }

    #[cfg(test)]
    pub(crate) fn break_orders(&self, breakage: HintBreakage) {
        *self.0.breakage.locked() = breakage;
    }
}

impl fmt::Debug for PageHints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageHints").field("epoch", &self.epoch()).finish_non_exhaustive()
    }
}
