//! Which pages the source of a handed-over guest no longer needs, so that their memory may be released.
//!
//! A page is released when it can never be requested again, not even after a lost connection: the destination has it in
//! place and marked as received. Three things prove that. The answer to a mark that was sent after pages on the main
//! connection: both kinds of peer answer it after they have placed all pages sent before it. The answer to the package,
//! for pages that were clean then. And the bitmap of received pages after a lost connection. Pages on the connection
//! for urgent pages have no mark: only a bitmap proves them.
//!
//! # Orders that must hold
//!
//! Confirmed, then released: a page that was only sent may be requested again. Nothing is released before the
//! destination has taken the guest: until then the guest may return to the source. Host pages are released whole.

use std::collections::VecDeque;
use std::ops::Range;

use crate::ram::{DirtyMap, PageBatch, PageBitmap, PageRun, RamBlockTable};
use crate::units::{BlockIndex, PageIndex};

/// Maximum number of pages that are released at a time: a request that arrives meanwhile waits for them.
const PIECE: u64 = 64;

/// The source's record of pages that it may release.
#[derive(Debug)]
pub(crate) struct Release {
    blocks: Vec<Block>,
    /// Pages that left since the last mark.
    open: Vec<PageRun>,
    /// Pages sent before marks that are not answered yet.
    marked: VecDeque<(u32, Vec<PageRun>)>,
    /// The destination has taken the guest.
    taken: bool,
    released: u64,
}

/// Of one block.
#[derive(Debug)]
struct Block {
    /// Confirmed and not released.
    ready: PageBitmap,
    released: PageBitmap,
    /// Pages of a host page.
    host: u64,
}

impl Release {
    /// Of a guest of these blocks.
    pub(crate) fn new(table: &RamBlockTable) -> Self {
        let block = |block: &crate::ram::RamBlock| {
            let pages = if block.flags.ignored { 0 } else { table.pages_of(block) };
            let host = table.page().pages_in(block.host_page.bytes()).max(1);
            Block { ready: PageBitmap::new(pages), released: PageBitmap::new(pages), host }
        };
        let blocks = table.blocks().iter().map(block).collect();
        Self { blocks, open: Vec::new(), marked: VecDeque::new(), taken: false, released: 0 }
    }

    /// Pages that are not `dirty` are in place at the destination, as it reports itself.
    pub(crate) fn confirm_clean(&mut self, dirty: &DirtyMap) {
        for (index, block) in (0..).map(BlockIndex).zip(&mut self.blocks) {
            let mut clean = PageIndex(0);
            let end = block.ready.len();
            while clean.0 < end {
                let next = dirty.block(index).and_then(|dirty| dirty.next_run(clean, u64::MAX));
                let next = next.unwrap_or(end..end);
                block.confirm(clean.0..next.start);
                clean = PageIndex(next.end);
            }
        }
    }

    /// A page that is missing at the destination according to `dirty`, and that was released because the destination
    /// had it.
    pub(crate) fn lost(&self, dirty: &DirtyMap) -> Option<PageRun> {
        let lost = |(index, block): (BlockIndex, &Block)| {
            let mut from = PageIndex(0);
            while let Some(run) = block.released.next_run(from, u64::MAX) {
                let missing = dirty.block(index).and_then(|dirty| dirty.next_run(PageIndex(run.start), 1));
                if let Some(page) = missing.filter(|page| page.start < run.end) {
                    return Some(PageRun { block: index, first: PageIndex(page.start), pages: 1 });
                }
                from = PageIndex(run.end);
            }
            None
        };
        (0..).map(BlockIndex).zip(&self.blocks).find_map(lost)
    }

    /// Pages have left on the main connection.
    pub(crate) fn sent(&mut self, batch: &PageBatch) {
        self.open.extend(batch.pieces().iter().map(|piece| piece.run));
    }

    /// A mark of this value follows them.
    pub(crate) fn marked(&mut self, value: u32) {
        self.marked.push_back((value, std::mem::take(&mut self.open)));
    }

    /// The destination has answered a PING of this value, which need not be a mark.
    pub(crate) fn answered(&mut self, value: u32) {
        let Some(at) = self.marked.iter().position(|(mark, _)| *mark == value) else { return };
        let runs: Vec<_> = self.marked.drain(..=at).flat_map(|(_, runs)| runs).collect();
        runs.into_iter().for_each(|run| self.confirm(run));
    }

    /// The connection is lost: pages in flight may not have arrived.
    pub(crate) fn forget_connection(&mut self) {
        self.open.clear();
        self.marked.clear();
    }

    /// The destination has taken the guest.
    pub(crate) fn taken(&mut self) {
        self.taken = true;
    }

    /// Pages to release now: whole host pages, at most so many that a request may wait for them. They count as released.
    pub(crate) fn next(&mut self) -> Option<PageRun> {
        if !self.taken {
            return None;
        }
        let next = |(index, block): (BlockIndex, &mut Block)| {
            let run = block.next()?;
            Some(PageRun { block: index, first: PageIndex(run.start), pages: run.end - run.start })
        };
        let run = (0..).map(BlockIndex).zip(&mut self.blocks).find_map(next)?;
        self.released += run.pages;
        Some(run)
    }

    /// Memory can't be released: from here on none is.
    pub(crate) fn stop(&mut self) {
        self.blocks.iter_mut().for_each(|block| block.ready = PageBitmap::new(0));
    }

    /// Pages that were released so far.
    pub(crate) fn count(&self) -> u64 {
        self.released
    }

    /// The destination has these pages in place.
    pub(crate) fn confirm(&mut self, run: PageRun) {
        if let Some(block) = self.blocks.get_mut(run.block.as_usize()) {
            block.confirm(run.first.0..run.end().0);
        }
    }
}

impl Block {
    fn confirm(&mut self, pages: Range<u64>) {
        self.ready.set_range(pages.clone());
        // Of those that were released already.
        let mut from = PageIndex(pages.start);
        while let Some(run) = self.released.next_run(from, u64::MAX).filter(|run| run.start < pages.end) {
            self.ready.clear_range(run.clone());
            from = PageIndex(run.end);
        }
    }

    fn next(&mut self) -> Option<Range<u64>> {
        let mut from = PageIndex(0);
        while let Some(run) = self.ready.next_run(from, PIECE.max(self.host)) {
            let last = run.end == self.ready.len();
            let start = run.start.next_multiple_of(self.host);
            let end = if last { run.end } else { run.end / self.host * self.host };
            if start < end {
                self.ready.clear_range(start..end);
                self.released.set_range(start..end);
                return Some(start..end);
            }
            // The rest of this host page is not confirmed.
            from = PageIndex((run.start / self.host + 1) * self.host);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::{BlockName, ClearShift, RamBlock, Verdict};
    use crate::units::PageSize;

    fn table() -> RamBlockTable {
        let mut blocks =
            [8, 1024].map(|pages| RamBlock::new(BlockName::new(&format!("b{pages}")).unwrap(), pages * 4096));
        blocks[1].host_page = PageSize::from_bytes(2 << 20).unwrap();
        RamBlockTable::new(PageSize::SIZE_4K, blocks.to_vec()).unwrap()
    }

    fn batch(block: u32, pages: Range<u64>) -> PageBatch {
        let mut batch = PageBatch::default();
        let run = PageRun {
            block: BlockIndex(block),
            first: PageIndex(pages.start),
            pages: pages.end - pages.start,
        };
        batch.push(run, Verdict::Whole);
        batch
    }

    fn all(release: &mut Release) -> Vec<(u32, u64, u64)> {
        let runs = std::iter::from_fn(|| release.next());
        runs.map(|run| (run.block.0, run.first.0, run.end().0)).collect()
    }

    #[test]
    fn pages_are_released_once_they_are_confirmed_and_the_guest_is_taken() {
        let mut release = Release::new(&table());
        release.sent(&batch(0, 2..4));
        release.marked(7);
        release.sent(&batch(0, 4..5));
        release.answered(9);
        release.answered(7);
        assert_eq!(all(&mut release), [], "not taken");
        release.taken();
        assert_eq!(all(&mut release), [(0, 2, 4)], "page 4 is not confirmed");
        release.forget_connection();
        release.marked(8);
        release.answered(8);
        assert_eq!((all(&mut release), release.count()), (vec![], 2), "it was lost with its connection");
    }

    #[test]
    fn a_host_page_is_released_whole() {
        let mut release = Release::new(&table());
        release.taken();
        release.sent(&batch(1, 0..500));
        release.marked(1);
        release.answered(1);
        assert_eq!(all(&mut release), []);
        release.sent(&batch(1, 500..1000));
        release.marked(2);
        release.answered(2);
        assert_eq!(all(&mut release), [(1, 0, 512)]);
        release.sent(&batch(1, 1000..1024));
        release.marked(3);
        release.answered(3);
        assert_eq!(all(&mut release), [(1, 512, 1024)]);
    }

    #[test]
    fn a_bitmap_confirms_all_but_what_it_misses_and_nothing_that_is_gone_may_be_missing() {
        let mut release = Release::new(&table());
        release.taken();
        let missing = |first| {
            let mut dirty = DirtyMap::new(&table(), ClearShift::default());
            dirty.set_run(PageRun { block: BlockIndex(0), first: PageIndex(first), pages: 2 });
            dirty
        };
        release.confirm_clean(&missing(3));
        assert_eq!(release.lost(&missing(3)), None);
        assert_eq!(all(&mut release), [(0, 0, 3), (0, 5, 8), (1, 0, 512), (1, 512, 1024)]);
        release.confirm_clean(&missing(3));
        assert_eq!(all(&mut release), [], "once");
        let lost = release.lost(&missing(4)).map(|run| (run.block.0, run.first.0));
        assert_eq!(lost, Some((0, 5)));
        assert_eq!(release.lost(&missing(3)), None);
    }
}
