//! Which memory is protected while the guest still runs, and when so little is left that it may be paused.

use std::time::Duration;

use super::SnapshotConfig;
use crate::ram::{PageRun, PageSet};
use crate::units::{BlockIndex, PageIndex};

/// Maximum number of passes before the guest is paused, however much is left.
const MAX_PASSES: u32 = 8;

/// The position of a walk through a set of pages, in the order of their addresses.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cursor {
    block: u32,
    page: u64,
}

impl Cursor {
    /// The next pages of `set`, at most `most` and none across a multiple of `most`. They come again until they are taken out
    /// of the set.
    pub(super) fn next(&mut self, set: &PageSet, most: u64) -> Option<PageRun> {
        while (self.block as usize) < set.blocks() {
            let block = BlockIndex(self.block);
            let found = set.block(block).and_then(|pages| pages.next_run(PageIndex(self.page), most));
            if let Some(found) = found {
                let aligned = (found.start / most + 1) * most;
                let end = found.end.min(aligned);
                self.page = found.start;
                return Some(PageRun { block, first: PageIndex(found.start), pages: end - found.start });
            }
            *self = Self { block: self.block + 1, page: 0 };
        }
        None
    }
}

/// The next step while the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Look,
    Protect(PageRun),
    Pause,
}

/// Passes over unprotected memory. Each is shorter than the one before, since a guest opens less in less time.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// To be protected, again or for the first time.
    pub(super) open: PageSet,
    cursor: Cursor,
    pass: u32,
    /// When the pass began, and the number of runs that it has protected.
    began: Duration,
    runs: u32,
    searched: bool,
    /// What the pass was expected to take.
    expected: Option<Duration>,
}

impl Ahead {
    pub(super) fn begin(&mut self, now: Duration) {
        *self =
            Self { open: std::mem::take(&mut self.open), pass: self.pass + 1, began: now, ..Self::default() };
    }

    pub(super) fn searched(&mut self) {
        self.searched = true;
    }

    pub(super) fn protected(&mut self, run: PageRun) {
        self.open.remove(run);
        self.runs += 1;
        // Pages that the cursor has passed and that are opened again are left to the next pass, otherwise a pass would
        // never end.
        self.cursor = Cursor { block: run.block.0, page: run.end().0 };
    }

    /// Protection of `run` was lifted; those of its pages that are `known` are to be protected again.
    pub(super) fn opened(&mut self, known: &PageSet, run: PageRun) {
        let Some(pages) = known.block(run.block) else { return };
        let mut at = run.first;
        while let Some(found) = pages.next_run(at, u64::MAX).filter(|found| found.start < run.end().0) {
            let end = found.end.min(run.end().0);
            self.open.add(PageRun { first: PageIndex(found.start), pages: end - found.start, ..run });
            at = PageIndex(end);
        }
    }

    /// From the first page again.
    pub(super) fn rewind(&mut self) {
        self.cursor = Cursor::default();
    }

    /// The next open pages from here on.
    pub(super) fn next_open(&mut self, config: &SnapshotConfig) -> Option<PageRun> {
        self.cursor.next(&self.open, config.protect_pages)
    }

    pub(super) fn next(&mut self, now: Duration, config: &SnapshotConfig) -> Next {
        if !self.searched {
            return Next::Look;
        }
        if let Some(run) = self.next_open(config) {
            return Next::Protect(run);
        }
        if self.is_enough(now, config) {
            return Next::Pause;
        }
        let left = self.estimate(now);
        self.begin(now);
        self.expected = Some(left);
        Next::Look
    }

    fn is_enough(&self, now: Duration, config: &SnapshotConfig) -> bool {
        if self.open.is_empty() || self.pass >= MAX_PASSES {
            return true;
        }
        // The first pass protects large pieces; the time that small ones take is known only after the second.
        let Some(expected) = self.expected else { return false };
        let left = self.estimate(now);
        // A guest that opens as much as is protected.
        left <= config.pause_goal || left > expected / 4 * 3
    }

    /// Estimated time to protect all open pages.
    fn estimate(&self, now: Duration) -> Duration {
        let left = u32::try_from(self.open.runs().count()).unwrap_or(u32::MAX);
        now.saturating_sub(self.began) / self.runs.max(1) * left
    }
}
