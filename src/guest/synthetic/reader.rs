//! Threads of an arrived guest that read each page once, while its writers write and, after a switch to postcopy, while
//! pages are missing: then each read of a missing page is a fault.

use std::sync::atomic::{AtomicU64, Ordering};

use super::plan::stride;
use super::{Shared, page};
use crate::guest::GuestMemory;
use crate::ram::{PageRun, RamBlockTable};
use crate::units::{BlockIndex, PageIndex};

/// The readers' common order and count.
#[derive(Debug, Default)]
pub(super) struct Readers {
    /// Number of threads; each takes every n-th page of the order.
    pub(super) threads: u32,
    /// Each migrated block, with its number of pages.
    blocks: Vec<(BlockIndex, u64)>,
    /// Number of pages of all these blocks.
    pages: u64,
    read: AtomicU64,
}

impl Readers {
    pub(super) fn new(table: &RamBlockTable, threads: u32) -> Self {
        let blocks = (0u32..).zip(table.blocks()).filter(|(_, block)| !block.flags.ignored);
        let blocks: Vec<_> = blocks.map(|(at, block)| (BlockIndex(at), table.pages_of(block))).collect();
        let pages = blocks.iter().map(|(_, pages)| pages).sum();
        Self { threads, blocks, pages, read: AtomicU64::new(0) }
    }

    /// Number of pages read.
    pub(super) fn read(&self) -> u64 {
        self.read.load(Ordering::Acquire)
    }

    /// True if no page is left to read.
    pub(super) fn are_through(&self) -> bool {
        self.threads == 0 || self.read() >= self.pages
    }

    /// The page at `step` of a scattered order; `None` after the last.
    fn place(&self, step: u64) -> Option<PageRun> {
        let jump = u128::from(step) * u128::from(stride(self.pages)) % u128::from(self.pages.max(1));
        let mut at = jump as u64;
        for (block, pages) in self.blocks.iter().filter(|_| step < self.pages) {
            if at < *pages {
                return Some(PageRun { block: *block, first: PageIndex(at), pages: 1 });
            }
            at -= pages;
        }
        None
    }
}

impl Shared {
    /// Reads each of its pages while the gate is open, then pauses until the end.
    pub(super) fn run_reader(&self, reader: u32) {
        let mut buffer = vec![0; self.memory.table().page().bytes() as usize];
        let mut step = u64::from(reader);
        let mut runs = self.gate.arrive();
        while runs {
            let Some(run) = self.readers.place(step) else { return self.gate.wait_for_end() };
            self.read_page(run, &mut buffer);
            step += u64::from(self.readers.threads);
            self.readers.read.fetch_add(1, Ordering::Release);
            runs = self.gate.is_open() || self.gate.wait_while_closed();
        }
    }

    /// Reads a page, and compares it unless a writer may write it, since the writer compares it.
    fn read_page(&self, run: PageRun, buffer: &mut [u8]) {
        let Some(span) = self.span(run) else { return };
        // May wait for a missing page, so no lock is held.
        span.copy_to(buffer);
        let (block, page) = (run.block.0, run.first.0);
        if !self.plan.is_written(block, page) {
            let found = page::read(buffer, self.plan.config.seed);
            self.faults().check(&self.memory, run, self.plan.initial(block, page), found);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::HashSet;

    use super::*;
    use crate::ram::{BlockName, RamBlock};
    use crate::units::PageSize;

    #[test]
    fn readers_look_at_each_page_once() {
        let block = |(name, pages): (&str, u64)| RamBlock::new(BlockName::new(name).unwrap(), pages * 4096);
        let blocks = [("a", 1000), ("b", 37), ("c", 1)].map(block).into();
        let readers = Readers::new(&RamBlockTable::new(PageSize::SIZE_4K, blocks).unwrap(), 3);
        let places: Vec<_> = (0..1038).map(|step| readers.place(step).unwrap()).collect();
        let different: HashSet<_> = places.iter().map(|run| (run.block.0, run.first.0)).collect();
        assert_eq!((different.len(), readers.place(1038)), (1038, None));
        let neighbours = places.windows(2).filter(|two| two[0].first.0.abs_diff(two[1].first.0) < 8).count();
        assert!(neighbours < 100, "the order jumps: {neighbours}");
    }
}
