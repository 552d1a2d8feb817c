//! Received pages as the dirty pages of the session that sends them on.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::guest::{DirtyError, DirtySource};
use crate::ram::{AtomicBitmap, PageBitmap, PageRun, RamBlockTable};
use crate::units::BlockIndex;

use crate::guest::PageObserver;

/// One bit for each page that was received and not taken yet. Unlike the log of a running guest it also counts pages
/// from before its start: no received page is ever dropped.
#[derive(Debug)]
pub(in crate::session) struct Arrivals {
    blocks: Vec<AtomicBitmap>,
    pending: AtomicU64,
}

impl Arrivals {
    pub(in crate::session) fn new(table: &RamBlockTable) -> Self {
        let blocks = table.blocks().iter().map(|block| AtomicBitmap::new(table.pages_of(block))).collect();
        Self { blocks, pending: AtomicU64::new(0) }
    }

    /// Marks pages to be sent on.
    pub(in crate::session) fn mark(&self, run: PageRun) {
        if let Some(map) = self.blocks.get(run.block.as_usize()) {
            // Counted first, so that the count never falls below zero.
            self.pending.fetch_add(run.pages, Ordering::Relaxed);
            let known = run.pages - map.set(run.first, run.pages);
            self.pending.fetch_sub(known, Ordering::Relaxed);
        }
    }

    /// Number of pages that were received and not taken.
    pub(in crate::session) fn pending(&self) -> u64 {
        self.pending.load(Ordering::Relaxed)
    }
}

impl PageObserver for Arrivals {
    fn placed(&self, run: PageRun) {
        self.mark(run);
    }
}

impl DirtySource for Arrivals {
    fn name(&self) -> &'static str {
        "arrivals"
    }

    fn probe(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn start(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        if let Some(map) = self.blocks.get(block.as_usize()) {
            self.pending.fetch_sub(map.take_bits(into), Ordering::Relaxed);
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::{BlockName, RamBlock};
    use crate::units::{PageIndex, PageSize};

    #[test]
    fn a_page_that_came_before_the_start_is_taken_once_and_counted_exactly() {
        let block = RamBlock::new(BlockName::new("ram").unwrap(), 100 * 4096);
        let table = RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap();
        let arrivals = Arrivals::new(&table);
        let run = |first, pages| PageRun { block: BlockIndex(0), first: PageIndex(first), pages };
        arrivals.mark(run(60, 10));
        arrivals.mark(run(65, 10));
        assert_eq!(arrivals.pending(), 15);
        arrivals.start().unwrap();
        let mut dirty = PageBitmap::new(100);
        dirty.set_range(0..70);
        arrivals.sync_into(BlockIndex(0), &mut dirty).unwrap();
        assert_eq!((dirty.count(), arrivals.pending()), (75, 0));
    }
}
