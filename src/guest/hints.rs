//! Pages that the guest says are free (QEMU's free page optimisation): their bytes need not travel.
//!
//! # Orders that must hold
//!
//! A hint is good between two syncs. Before the logs are read every hint that was taken has had its effect, and from
//! then until the sync is over none is taken: a page that was written meanwhile would be cleared after the log had told
//! of it. A hint arms the log of its pages again before it is taken: a log that is cleared by the chunk would else say
//! nothing of a write between the hint and the chunk's turn. So whatever is written after [`PageHints::free`] has
//! returned is found by the next sync, and is sent.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{DirtyError, DirtySource};
use crate::ram::{PageRun, RamBlockTable, Refusal};
use crate::sys::Lock as _;

/// Runs that wait for the page loop at most; it takes them before each batch.
const MAX_WAITING: usize = 64 << 10;

/// The time between two syncs in which hints are good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HintEpoch(u64);

/// What became of a hint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hinted {
    /// Pages of it that are still to be sent are left out, unless they are written again.
    Taken,
    /// Its time is over, and it changes nothing.
    TooLate,
    /// Tens of thousands of hints wait for the page loop already: this one changes nothing.
    Full,
}

/// Why a hint could not be taken; it changes nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HintError {
    /// The run is not in a block, or its block does not travel.
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
/// It holds the pages free from some moment in the epoch until [`free`](Self::free) has returned. A balloon
/// device learns from events that a sync begins and tells its guest then that the pages are its own again; hints that
/// are still on their way come too late, which is safe.
#[derive(Clone)]
pub struct PageHints(Arc<Shared>);

struct Shared {
    table: RamBlockTable,
    sources: Vec<Arc<dyn DirtySource>>,
    /// There is something to take: the page loop looks here once a batch, without the lock.
    any: AtomicBool,
    told: Mutex<Told>,
    #[cfg(test)]
    breakage: Mutex<HintBreakage>,
}

struct Told {
    epoch: u64,
    open: bool,
    free: Vec<PageRun>,
}

/// Orders of this file switched off, for the simulation.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HintBreakage {
    /// The log of the pages is left as it is.
    pub(crate) unprotected: bool,
    /// The epoch of a hint is not looked at.
    pub(crate) any_epoch: bool,
}

impl PageHints {
    /// Hints about the memory that `table` describes and `sources` watch. None is taken before the first
    /// [`open`](Self::open).
    pub(crate) fn new(table: &RamBlockTable, sources: &[Arc<dyn DirtySource>]) -> Self {
        Self(Arc::new(Shared {
            table: table.clone(),
            sources: sources.to_vec(),
            any: AtomicBool::new(false),
            told: Mutex::new(Told { epoch: 0, open: false, free: Vec::new() }),
            #[cfg(test)]
            breakage: Mutex::default(),
        }))
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.0.told.locked()
    }

    /// The epoch that hints are good for now; `None` while the logs are read, before the first sync and after the last.
    pub fn epoch(&self) -> Option<HintEpoch> {
        let told = self.told();
        told.open.then_some(HintEpoch(told.epoch))
    }

    /// The guest needs nothing that is in the pages of `run`, and holds them until this returns. Waits for a sync's
    /// beginning at most as long as other calls of this take.
    ///
    /// # Errors
    /// [`HintError`]; the pages then travel as all others.
    pub fn free(&self, epoch: HintEpoch, run: PageRun) -> Result<Hinted, HintError> {
        self.0.table.admit_run(run)?;
        let mut told = self.told();
        if !told.open || HintEpoch(told.epoch) != epoch {
            #[cfg(test)]
            if !self.breakage().any_epoch {
                return Ok(Hinted::TooLate);
            }
            #[cfg(not(test))]
            return Ok(Hinted::TooLate);
        }
        if told.free.len() >= MAX_WAITING {
            return Ok(Hinted::Full);
        }
        self.arm(run)?;
        match told.free.last_mut() {
            Some(last) if last.block == run.block && last.end() == run.first => last.pages += run.pages,
            _ => told.free.push(run),
        }
        self.0.any.store(true, Ordering::Release);
        Ok(Hinted::Taken)
    }

    /// From here on a write to the pages of `run` is new to every log.
    fn arm(&self, run: PageRun) -> Result<(), DirtyError> {
        #[cfg(test)]
        if self.breakage().unprotected {
            return Ok(());
        }
        self.0.sources.iter().try_for_each(|source| source.reprotect(run))
    }

    /// A sync is over: hints are taken from here on.
    pub(crate) fn open(&self) {
        let mut told = self.told();
        told.epoch += 1;
        told.open = true;
    }

    /// The logs are about to be read: no hint is taken from here on.
    pub(crate) fn close(&self) {
        self.told().open = false;
    }

    /// Every run that was told of since the last call.
    pub(crate) fn drain(&self, each: impl FnMut(PageRun)) {
        if self.0.any.load(Ordering::Acquire) {
            let mut told = self.told();
            self.0.any.store(false, Ordering::Release);
            told.free.drain(..).for_each(each);
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
