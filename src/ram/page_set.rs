//! A set of pages over all blocks.

use super::{PageBitmap, PageRun, RamBlockTable};
use crate::units::{BlockIndex, PageIndex};

/// Pages of all blocks. Allocates no memory before the first page is added.
#[derive(Clone, Debug, Default)]
pub struct PageSet {
    blocks: Vec<PageBitmap>,
}

impl PageSet {
    /// A set with room for the pages of `table`, empty.
    pub fn new(table: &RamBlockTable) -> Self {
        Self { blocks: table.blocks().iter().map(|b| PageBitmap::new(table.pages_of(b))).collect() }
    }

    /// Blocks that it has room for.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// True if no page is in it.
    pub fn is_empty(&self) -> bool {
        self.blocks.iter().all(|pages| pages.count() == 0)
    }

    /// Pages in it.
    pub fn count(&self) -> u64 {
        self.blocks.iter().map(PageBitmap::count).sum()
    }

    /// True if `page` of `block` is in it.
    pub fn contains(&self, block: BlockIndex, page: PageIndex) -> bool {
        self.block(block).is_some_and(|pages| pages.get(page))
    }

    /// True if one page of `run` is in it.
    pub fn touches(&self, run: PageRun) -> bool {
        let first = |pages: &PageBitmap| pages.next_run(run.first, 1);
        self.block(run.block).and_then(first).is_some_and(|found| found.start < run.end().0)
    }

    /// The pages of one block.
    pub fn block(&self, block: BlockIndex) -> Option<&PageBitmap> {
        self.blocks.get(block.as_usize())
    }

    /// Adds a run, cut at the end of its block; returns how many pages were not in it.
    pub fn add(&mut self, run: PageRun) -> u64 {
        self.blocks.get_mut(run.block.as_usize()).map_or(0, |map| map.set_range(run.first.0..run.end().0))
    }

    /// Takes a run out.
    pub fn remove(&mut self, run: PageRun) {
        if let Some(map) = self.blocks.get_mut(run.block.as_usize()) {
            map.clear_range(run.first.0..run.end().0);
        }
    }

    /// The runs, block by block, in the order of their addresses.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> {
        self.blocks.iter().zip(0..).flat_map(|(map, index)| {
            let mut from = PageIndex(0);
            std::iter::from_fn(move || {
                let run = map.next_run(from, u64::MAX)?;
                from = PageIndex(run.end);
                let (first, pages) = (PageIndex(run.start), run.end - run.start);
                Some(PageRun { block: BlockIndex(index), first, pages })
            })
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::{BlockName, RamBlock};
    use crate::units::PageSize;

    #[test]
    fn runs_come_back_as_they_were_added() {
        let block = |name, pages: u64| RamBlock::new(BlockName::new(name).unwrap(), pages * 4096);
        let table = RamBlockTable::new(PageSize::SIZE_4K, vec![block("a", 100), block("b", 70)]).unwrap();
        let run = |block, first, pages| PageRun { block: BlockIndex(block), first: PageIndex(first), pages };
        let mut set = PageSet::new(&table);
        assert!(set.is_empty() && !set.touches(run(0, 0, 100)));
        assert_eq!((set.add(run(0, 10, 5)), set.add(run(0, 12, 8)), set.add(run(1, 60, 99))), (5, 5, 10));
        set.remove(run(0, 11, 2));
        assert_eq!(set.runs().collect::<Vec<_>>(), [run(0, 10, 1), run(0, 13, 7), run(1, 60, 10)]);
        assert!(set.contains(BlockIndex(1), PageIndex(69)) && !set.contains(BlockIndex(1), PageIndex(59)));
        assert!(set.touches(run(0, 0, 11)) && !set.touches(run(0, 0, 10)) && !set.touches(run(0, 11, 2)));
        assert_eq!((set.count(), set.add(run(9, 0, 1))), (18, 0));
    }
}
