//! Dirty pages that somebody tells us: a VMM's own writes, a device thread, a backend in another process.

use super::{DirtyError, DirtySource};
use crate::ram::{AtomicBitmap, Landing, PageBitmap, PageRun, RamBlockTable};
use crate::units::{BlockIndex, PageSize};

/// One bit a page, set by whoever writes guest RAM past the other sources; any thread of this process.
///
/// # Order that must hold
///
/// Write the bytes, then mark. A mark before the write can be taken by a sync that still reads the old bytes.
#[derive(Debug)]
pub struct SoftwareBitmap {
    blocks: Vec<AtomicBitmap>,
    page: PageSize,
}

impl SoftwareBitmap {
    /// No page is marked.
    pub fn new(table: &RamBlockTable) -> Self {
        let blocks = table.blocks().iter().map(|block| AtomicBitmap::new(table.pages_of(block))).collect();
        Self { blocks, page: table.page() }
    }

    /// Marks the pages of a range whose bytes were written.
    pub fn mark(&self, written: Landing) {
        self.mark_run(written.run(self.page));
    }

    /// Marks a run of pages whose bytes were written.
    pub fn mark_run(&self, written: PageRun) {
        if let Some(map) = self.blocks.get(written.block.as_usize()) {
            map.set(written.first, written.pages);
        }
    }
}

impl DirtySource for SoftwareBitmap {
    fn name(&self) -> &'static str {
        "software"
    }

    /// Nothing of the kernel is needed. Whether the writers mark what they write, only they know.
    fn probe(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn start(&self) -> Result<(), DirtyError> {
        // What was marked before belongs to the first round, which takes every page.
        for map in &self.blocks {
            map.take_into(&mut PageBitmap::new(map.len()));
        }
        Ok(())
    }

    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        if let Some(map) = self.blocks.get(block.as_usize()) {
            map.take_into(into);
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
    use std::sync::Arc;

    use super::*;
    use crate::guest::GuestMemory;
    use crate::guest::race::{Follower, guest_of, race, store};
    use crate::sys::Mapping;
    use crate::units::PageIndex;

    #[test]
    fn racing_writers_that_mark_after_the_write_lose_nothing() {
        let guest = guest_of(&[Mapping::anonymous(8 << 20).unwrap(), Mapping::anonymous(4096).unwrap()]);
        let map = Arc::new(SoftwareBitmap::new(guest.table()));
        let source: Arc<dyn DirtySource> = map.clone();
        let write = |run, stamp| {
            store(&guest, run, stamp);
            map.mark(guest.table().admit_run(run).unwrap());
        };
        let outcome = race(&guest, &[source], 4, &write).unwrap();
        assert!(outcome.lost == 0 && outcome.reported > 0, "{outcome:?}");
    }

    /// The order of the type's documentation keeps the write; the other one loses it to a sync in between.
    #[test]
    fn a_mark_before_the_write_is_lost_to_a_sync_in_between() {
        let guest = guest_of(&[Mapping::anonymous(8192).unwrap()]);
        let map = Arc::new(SoftwareBitmap::new(guest.table()));
        let sources: [Arc<dyn DirtySource>; 1] = [map.clone()];
        let run = PageRun { block: BlockIndex(0), first: PageIndex(1), pages: 1 };
        for mark_first in [false, true] {
            let mut follower = Follower::new(&guest);
            follower.copy_all();
            let steps: [&dyn Fn(); 2] =
                [&|| store(&guest, run, [1 + u8::from(mark_first); 16]), &|| map.mark_run(run)];
            let order = if mark_first { [1, 0] } else { [0, 1] };
            for step in order {
                steps[step]();
                follower.sync(&sources).unwrap();
            }
            assert_eq!(follower.differing(), u64::from(mark_first));
        }
    }

    #[test]
    fn marks_from_before_the_start_and_outside_the_blocks_are_dropped() {
        let guest = guest_of(&[Mapping::anonymous(3 * 4096).unwrap()]);
        let map = SoftwareBitmap::new(guest.table());
        map.probe().unwrap();
        let run = |block, first, pages| PageRun { block: BlockIndex(block), first: PageIndex(first), pages };
        map.mark_run(run(0, 0, 1));
        map.start().unwrap();
        map.mark_run(run(0, 2, 5));
        map.mark_run(run(7, 0, 1));
        let mut seen = PageBitmap::new(3);
        map.sync_into(BlockIndex(0), &mut seen).unwrap();
        map.sync_into(BlockIndex(7), &mut seen).unwrap();
        assert_eq!((seen.count(), seen.get(PageIndex(2))), (1, true));
    }
}
