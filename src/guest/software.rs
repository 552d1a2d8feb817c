//! Dirty pages that are reported to this library: writes by a VMM itself, a device thread, or a backend in another
//! process.

use super::{DirtyError, DirtySource};
use crate::ram::{AtomicBitmap, Landing, PageBitmap, PageRun, RamBlock, RamBlockTable};
use crate::units::{BlockIndex, BlockOffset, GuestAddr, PageIndex, PageSize};

/// One bit per page, set by writers of guest RAM that the other sources don't report, from any thread of this process.
///
/// # Required order
///
/// Write the bytes, then mark. If a page is marked before the write, a sync in between clears the mark and still reads
/// the old bytes.
#[derive(Debug)]
pub struct SoftwareBitmap {
    blocks: Vec<AtomicBitmap>,
    /// For each block its first guest-physical address and its length in bytes.
    addresses: Vec<(Option<GuestAddr>, u64)>,
    page: PageSize,
}

impl SoftwareBitmap {
    /// No page is marked.
    pub fn new(table: &RamBlockTable) -> Self {
        let blocks = table.blocks().iter().map(|block| AtomicBitmap::new(table.pages_of(block))).collect();
        let address = |block: &RamBlock| (block.guest_addr, block.used_length);
        let addresses = table.blocks().iter().map(address).collect();
        Self { blocks, addresses, page: table.page() }
    }

    /// Marks the pages of a range whose bytes were written.
    pub fn mark(&self, written: Landing) {
        self.mark_run(written.run(self.page));
    }

    /// Marks the pages of `len` bytes from the guest-physical address `at` on, whose bytes were written. The range may
    /// cross blocks. `false` if a part of it is in no block with a [`guest_addr`](RamBlock::guest_addr); the rest is
    /// still marked.
    #[must_use = "what is not RAM was not marked"]
    pub fn mark_guest(&self, at: GuestAddr, len: u64) -> bool {
        let end = at.0.saturating_add(len);
        let mut marked = 0;
        for (index, (start, length)) in self.addresses.iter().enumerate() {
            let Some(GuestAddr(start)) = *start else { continue };
            let (first, last) = (at.0.max(start), end.min(start.saturating_add(*length)));
            if first < last {
                let pages = self.page.page_of(BlockOffset(first - start)).0..self.page.pages_in(last - start);
                self.blocks[index].set(PageIndex(pages.start), pages.end - pages.start);
                marked += last - first;
            }
        }
        marked == len
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

    /// Nothing of the kernel is needed. Whether the writers mark their writes can't be tested.
    fn probe(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn start(&self) -> Result<(), DirtyError> {
        // Earlier marks belong to the first round, which sends every page.
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
    use crate::ram::BlockName;
    use crate::sys::Mapping;

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

    /// The order in the type's documentation keeps the write; the opposite order loses it to a sync in between.
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

    /// RAM below and above a hole, as on x86: one block at 0, one that ends at 5 GiB, and a ROM without an address.
    #[test]
    fn writes_are_marked_by_guest_physical_address_across_blocks() {
        let block = |name: &str, at: Option<u64>, pages: u64| {
            let mut block = RamBlock::new(BlockName::new(name).unwrap(), pages * 4096);
            block.guest_addr = at.map(GuestAddr);
            block
        };
        let blocks = vec![block("low", Some(0), 4), block("next", Some(4 * 4096), 4), block("rom", None, 4)];
        let table = RamBlockTable::new(PageSize::SIZE_4K, blocks).unwrap();
        type Case = (&'static str, u64, u64, bool, [&'static [u64]; 2]);
        #[rustfmt::skip]
        let cases: [Case; 8] = [
            ("one byte",               4096,         1,            true,  [&[1], &[]]),
            ("across a page's end",    4095,         2,            true,  [&[0, 1], &[]]),
            ("across two blocks",      3 * 4096,     2 * 4096,     true,  [&[3], &[0]]),
            ("to the end of RAM",      7 * 4096 + 5, 4091,         true,  [&[], &[3]]),
            ("beyond the end of RAM",  7 * 4096,     4097,         false, [&[], &[3]]),
            ("not RAM",                1 << 40,      4096,         false, [&[], &[]]),
            ("nothing",                4096,         0,            true,  [&[], &[]]),
            ("past the last address",  u64::MAX,     8,            false, [&[], &[]]),
        ];
        for (what, at, len, whole, expected) in cases {
            let map = SoftwareBitmap::new(&table);
            assert_eq!(map.mark_guest(GuestAddr(at), len), whole, "{what}");
            for (block, expected) in (0..).zip(expected) {
                let mut seen = PageBitmap::new(4);
                map.sync_into(BlockIndex(block), &mut seen).unwrap();
                let seen: Vec<u64> = (0..4).filter(|page| seen.get(PageIndex(*page))).collect();
                assert_eq!(&seen[..], expected, "{what}, block {block}");
            }
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
