//! Which pages are still to be sent, and which parts of the hardware log are still to be cleared.

use super::{PageBitmap, PageRun, PageSet, RamBlockTable};
use crate::units::{BlockIndex, PageIndex};

/// log2 of the pages in one chunk of the clear map: 6 to 31, 18 (1 GiB of 4 KiB pages) by default.
///
/// The limits are the seed's (`x-clear-bitmap-shift`): below 6 a chunk is less than a word of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClearShift(u8);

impl ClearShift {
    /// `None` outside 6 to 31.
    pub const fn new(shift: u8) -> Option<Self> {
        if shift >= 6 && shift <= 31 { Some(Self(shift)) } else { None }
    }

    /// Pages in one chunk.
    pub const fn pages(self) -> u64 {
        1 << self.0
    }
}

impl Default for ClearShift {
    fn default() -> Self {
        Self(18)
    }
}

#[derive(Debug)]
struct BlockDirty {
    dirty: PageBitmap,
    /// One bit a chunk: the log of this chunk was read and not yet cleared.
    to_clear: PageBitmap,
}

/// Dirty pages of every block.
///
/// # Order that must hold
///
/// [`take_run`](Self::take_run) clears the bits, [`take_clear_chunk`](Self::take_clear_chunk) names what
/// to re-protect, and only then are the bytes read. Any other order can lose a guest write.
#[derive(Debug)]
pub struct DirtyMap {
    blocks: Vec<BlockDirty>,
    shift: ClearShift,
}

impl DirtyMap {
    /// No page is dirty, no chunk is to be cleared.
    pub fn new(table: &RamBlockTable, shift: ClearShift) -> Self {
        let block = |pages: u64| BlockDirty {
            dirty: PageBitmap::new(pages),
            to_clear: PageBitmap::new(pages.div_ceil(shift.pages())),
        };
        Self { blocks: table.blocks().iter().map(|b| block(table.pages_of(b))).collect(), shift }
    }

    /// Marks every page of every migrated block.
    pub fn set_all(&mut self, table: &RamBlockTable) {
        for (map, block) in self.blocks.iter_mut().zip(table.blocks()) {
            if !block.flags.ignored {
                map.dirty.set_range(0..u64::MAX);
            }
        }
    }

    /// Marks a run; returns how many pages were clean before.
    pub fn set_run(&mut self, run: PageRun) -> u64 {
        let map = self.blocks.get_mut(run.block.as_usize());
        map.map_or(0, |map| map.dirty.set_range(run.first.0..run.end().0))
    }

    /// Unmarks a run; returns how many pages were dirty before.
    pub fn clear_run(&mut self, run: PageRun) -> u64 {
        let map = self.blocks.get_mut(run.block.as_usize());
        map.map_or(0, |map| map.dirty.clear_range(run.first.0..run.end().0))
    }

    /// Marks every page of a group of `pages` of which one is dirty: host pages are dirty as a whole or not at all.
    pub fn widen(&mut self, block: BlockIndex, pages: u64) {
        let Some(map) = self.blocks.get_mut(block.as_usize()).filter(|_| pages > 1) else { return };
        let mut from = PageIndex(0);
        while let Some(run) = map.dirty.next_run(from, u64::MAX) {
            let (start, end) = (run.start / pages * pages, run.end.next_multiple_of(pages));
            map.dirty.set_range(start..end);
            from = PageIndex(end);
        }
    }

    /// Takes a run out of the map, for pages that need not be sent: its dirty pages go into `skipped`. Returns how many
    /// pages those were.
    pub fn skip_run(&mut self, run: PageRun, skipped: &mut PageSet) -> u64 {
        let Some(map) = self.blocks.get_mut(run.block.as_usize()) else { return 0 };
        let (mut from, end, mut gone) = (run.first.0, run.end().0, 0);
        while let Some(found) = map.dirty.next_run(PageIndex(from), u64::MAX).filter(|f| f.start < end) {
            let found = found.start..found.end.min(end);
            from = found.end;
            let pages = map.dirty.clear_range(found.clone());
            gone += pages;
            skipped.add(PageRun { block: run.block, first: PageIndex(found.start), pages });
        }
        gone
    }

    /// Hands the bitmap of `block` to a sync. Afterwards every chunk counts as read but not cleared.
    pub fn sync_block<E>(
        &mut self,
        block: BlockIndex,
        sync: impl FnOnce(&mut PageBitmap) -> Result<(), E>,
    ) -> Result<u64, E> {
        let Some(map) = self.blocks.get_mut(block.as_usize()) else { return Ok(0) };
        let before = map.dirty.count();
        sync(&mut map.dirty)?;
        map.to_clear.set_range(0..u64::MAX);
        Ok(map.dirty.count() - before)
    }

    /// The next dirty run of `block` at or after `from`, at most `max_pages` long and inside one chunk of
    /// the clear map; its bits are cleared.
    pub fn take_run(&mut self, block: BlockIndex, from: PageIndex, max_pages: u64) -> Option<PageRun> {
        let map = self.blocks.get_mut(block.as_usize())?;
        let pages = map.dirty.next_run(from, max_pages)?;
        let chunk_end = (pages.start / self.shift.pages() + 1) * self.shift.pages();
        let pages = pages.start..pages.end.min(chunk_end);
        map.dirty.clear_range(pages.clone());
        Some(PageRun { block, first: PageIndex(pages.start), pages: pages.end - pages.start })
    }

    /// The chunk around `run` if its log was read and not cleared since; it counts as cleared now.
    ///
    /// `run` must not cross a chunk, as [`take_run`](Self::take_run) sees to.
    pub fn take_clear_chunk(&mut self, run: PageRun) -> Option<PageRun> {
        let map = self.blocks.get_mut(run.block.as_usize())?;
        let chunk = run.first.0 / self.shift.pages();
        if map.to_clear.clear_range(chunk..chunk + 1) == 0 {
            return None;
        }
        let first = chunk * self.shift.pages();
        let pages = self.shift.pages().min(map.dirty.len() - first);
        Some(PageRun { block: run.block, first: PageIndex(first), pages })
    }

    /// Dirty pages of all blocks.
    pub fn count(&self) -> u64 {
        self.blocks.iter().map(|map| map.dirty.count()).sum()
    }

    /// Blocks the map covers.
    pub fn block_count(&self) -> u32 {
        self.blocks.len() as u32
    }

    /// The bitmap of one block.
    pub fn block(&self, block: BlockIndex) -> Option<&PageBitmap> {
        self.blocks.get(block.as_usize()).map(|map| &map.dirty)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::{BlockName, RamBlock};
    use crate::units::PageSize;

    fn table(pages: &[u64]) -> RamBlockTable {
        let block = |(i, pages): (usize, &u64)| {
            RamBlock::new(BlockName::new(&format!("b{i}")).unwrap(), pages * 4096)
        };
        RamBlockTable::new(PageSize::SIZE_4K, pages.iter().enumerate().map(block).collect()).unwrap()
    }

    #[test]
    fn a_run_stays_inside_its_clear_chunk_and_the_chunk_is_cleared_once() {
        let table = table(&[200]);
        let mut map = DirtyMap::new(&table, ClearShift::new(6).unwrap());
        map.set_all(&table);
        map.sync_block(BlockIndex(0), |_| Ok::<_, ()>(())).unwrap();
        let run = map.take_run(BlockIndex(0), PageIndex(60), 100).unwrap();
        assert_eq!((run.first, run.pages), (PageIndex(60), 4));
        let chunk = map.take_clear_chunk(run).unwrap();
        assert_eq!((chunk.first, chunk.pages), (PageIndex(0), 64));
        assert_eq!(map.take_clear_chunk(run), None);
        let last = map.take_run(BlockIndex(0), PageIndex(192), 100).unwrap();
        assert_eq!(map.take_clear_chunk(last).unwrap().pages, 8);
        assert_eq!(map.count(), 200 - 4 - 8);
    }

    #[test]
    fn an_ignored_block_never_becomes_dirty_as_a_whole() {
        let mut blocks = table(&[3, 5]).blocks().to_vec();
        blocks[1].flags.ignored = true;
        let table = RamBlockTable::new(PageSize::SIZE_4K, blocks).unwrap();
        let mut map = DirtyMap::new(&table, ClearShift::default());
        map.set_all(&table);
        assert_eq!(map.count(), 3);
    }

    #[test]
    fn what_of_a_run_was_dirty_is_skipped() {
        let table = table(&[200]);
        let run = |first, pages| PageRun { block: BlockIndex(0), first: PageIndex(first), pages };
        let (mut map, mut skipped) = (DirtyMap::new(&table, ClearShift::default()), PageSet::new(&table));
        for dirty in [run(10, 10), run(30, 100)] {
            map.set_run(dirty);
        }
        assert_eq!(map.skip_run(run(15, 25), &mut skipped), 15);
        assert_eq!(skipped.runs().collect::<Vec<_>>(), [run(15, 5), run(30, 10)]);
        assert_eq!((map.count(), map.skip_run(run(15, 25), &mut skipped)), (95, 0));
    }

    #[test]
    fn the_shift_has_limits() {
        assert!(ClearShift::new(5).is_none() && ClearShift::new(32).is_none());
        assert_eq!(ClearShift::default().pages() * 4096, 1 << 30);
    }

    #[test]
    fn a_host_page_is_dirty_as_a_whole() {
        let table = table(&[1024, 64]);
        let mut map = DirtyMap::new(&table, ClearShift::new(6).unwrap());
        let run = |block, first, pages| PageRun { block: BlockIndex(block), first: PageIndex(first), pages };
        map.set_run(run(0, 100, 1));
        map.set_run(run(0, 510, 4));
        map.set_run(run(1, 7, 1));
        map.widen(BlockIndex(1), 1);
        assert_eq!(map.block(BlockIndex(1)).unwrap().count(), 1);
        map.widen(BlockIndex(0), 128);
        let dirty = map.block(BlockIndex(0)).unwrap();
        assert_eq!(dirty.next_run(PageIndex(0), u64::MAX), Some(0..128));
        assert_eq!(dirty.next_run(PageIndex(128), u64::MAX), Some(384..640));
        assert_eq!(dirty.count(), 384);
    }
}
