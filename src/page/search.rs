//! Picks the next run of pages to send.
//!
//! There are two lists: pages that the destination requested, and dirty pages. Requested pages always come first; dirty
//! ones are taken block by block in address order, from the end of the last run, so that adjacent pages share a
//! transfer.
//!
//! This module decides *which* pages are sent. [`classify`](super::classify) decides in which form, and
//! [`transport`](crate::transport) how.

use std::collections::VecDeque;

use crate::ram::{DirtyMap, PageRun};
use crate::units::{BlockIndex, PageIndex};

/// Requested runs that may wait. Who requests more gets those pages in their turn, as dirty ones.
const MAX_REQUESTS: usize = 1 << 16;

/// The cursor of a walk over all blocks.
#[derive(Debug, Default)]
pub struct PageSearch {
    requested: VecDeque<PageRun>,
    block: u32,
    page: u64,
}

impl PageSearch {
    /// Requests a run, which is sent before other dirty pages, unless too many wait by now. Pages of it that are clean
    /// by then are not sent again.
    pub fn request(&mut self, run: PageRun) {
        if self.requested.len() < MAX_REQUESTS {
            self.requested.push_back(run);
        }
    }

    /// Number of requested runs that wait, including clean ones.
    pub fn asked(&self) -> usize {
        self.requested.len()
    }

    /// True if requested pages are left.
    pub fn is_asked(&self) -> bool {
        !self.requested.is_empty()
    }

    /// The next run, at most `max_pages` long; its dirty bits are cleared. `None` once nothing is dirty.
    ///
    /// The walk continues after the last run, even a requested one, since the adjacent pages are likely to be requested
    /// next. It wraps once around all blocks.
    pub fn next_run(&mut self, dirty: &mut DirtyMap, max_pages: u64) -> Option<PageRun> {
        if let Some(run) = self.next_requested(dirty, max_pages) {
            return Some(run);
        }
        self.next_dirty(dirty, max_pages)
    }

    /// The next requested and dirty run, which [`next_run`](Self::next_run) returns first.
    pub fn next_requested(&mut self, dirty: &mut DirtyMap, max_pages: u64) -> Option<PageRun> {
        while let Some(run) = self.requested.pop_front() {
            let found = dirty.take_run(run.block, run.first, max_pages.min(run.pages));
            // take_run searches beyond the request: pages found there are marked dirty again, unless they were
            // requested.
            match found {
                Some(found) if found.first < run.end() => {
                    let (wanted, rest) = found.split_at(run.end().0 - found.first.0);
                    if let Some(rest) = rest {
                        dirty.set_run(rest);
                    }
                    (self.block, self.page) = (wanted.block.0, wanted.end().0);
                    if wanted.end() < run.end() {
                        let pages = run.end().0 - wanted.end().0;
                        self.requested.push_front(PageRun { first: wanted.end(), pages, ..run });
                    }
                    return Some(wanted);
                }
                Some(found) => {
                    dirty.set_run(found);
                }
                None => {}
            }
        }
        None
    }

    fn next_dirty(&mut self, dirty: &mut DirtyMap, max_pages: u64) -> Option<PageRun> {
        if dirty.count() == 0 {
            return None;
        }
        let blocks = dirty.block_count();
        // The block of the cursor is searched twice: from the cursor first, and from its start last.
        for _ in 0..=blocks {
            if let Some(run) = dirty.take_run(BlockIndex(self.block), PageIndex(self.page), max_pages) {
                self.page = run.end().0;
                return Some(run);
            }
            self.block = if self.block + 1 < blocks { self.block + 1 } else { 0 };
            self.page = 0;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::{BlockName, ClearShift, RamBlock, RamBlockTable};
    use crate::units::PageSize;
    use proptest::prelude::*;

    fn dirty(pages: &[u64]) -> DirtyMap {
        let blocks = pages.iter().enumerate();
        let block =
            |(i, n): (usize, &u64)| RamBlock::new(BlockName::new(&format!("b{i}")).unwrap(), n * 4096);
        let table = RamBlockTable::new(PageSize::SIZE_4K, blocks.map(block).collect()).unwrap();
        DirtyMap::new(&table, ClearShift::new(6).unwrap())
    }

    fn run(block: u32, first: u64, pages: u64) -> PageRun {
        PageRun { block: BlockIndex(block), first: PageIndex(first), pages }
    }

    #[test]
    fn requested_pages_come_first_and_clean_ones_not_at_all() {
        let mut map = dirty(&[100, 100]);
        map.set_run(run(0, 0, 3));
        map.set_run(run(1, 50, 2));
        let mut search = PageSearch::default();
        search.request(run(1, 51, 1));
        search.request(run(1, 60, 4));
        assert_eq!(search.next_run(&mut map, 10), Some(run(1, 51, 1)));
        assert_eq!(search.next_run(&mut map, 2), Some(run(0, 0, 2)));
        assert_eq!(search.next_run(&mut map, 2), Some(run(0, 2, 1)));
        assert_eq!(search.next_run(&mut map, 2), Some(run(1, 50, 1)));
        assert_eq!(search.next_run(&mut map, 2), None);
    }

    #[test]
    fn requests_without_end_take_no_memory_without_end_and_lose_no_page() {
        let mut map = dirty(&[100]);
        map.set_run(run(0, 0, 100));
        let mut search = PageSearch::default();
        (0..2 * MAX_REQUESTS).for_each(|_| search.request(run(0, 70, 1)));
        search.request(run(0, 50, 1));
        assert_eq!(search.asked(), MAX_REQUESTS);
        assert_eq!(search.next_run(&mut map, 1), Some(run(0, 70, 1)));
        let rest = std::iter::from_fn(|| search.next_run(&mut map, 1)).count();
        assert_eq!((rest, map.count()), (99, 0));
    }

    #[test]
    fn the_pages_behind_a_request_come_next() {
        let mut map = dirty(&[100, 100]);
        map.set_run(run(0, 0, 100));
        map.set_run(run(1, 0, 100));
        let mut search = PageSearch::default();
        assert_eq!(search.next_run(&mut map, 4), Some(run(0, 0, 4)));
        search.request(run(1, 40, 1));
        assert!(search.is_asked());
        assert_eq!(search.next_run(&mut map, 4), Some(run(1, 40, 1)));
        assert!(!search.is_asked());
        assert_eq!(search.next_run(&mut map, 4), Some(run(1, 41, 4)));
    }

    proptest! {
        /// Every dirty page comes out once, whatever is requested and wherever the cursor starts.
        #[test]
        fn every_dirty_page_comes_out_once(
            sizes in prop::collection::vec(1u64..200, 1..4),
            marks in prop::collection::vec((0u32..4, 0u64..200, 1u64..40), 0..30),
            asks in prop::collection::vec((0u32..4, 0u64..200, 1u64..80), 0..6),
            warm in prop::collection::vec((0u32..4, 0u64..200), 0..3),
            max in 1u64..50,
        ) {
            let mut map = dirty(&sizes);
            let mut search = PageSearch::default();
            for (block, page) in warm {
                map.set_run(run(block, page, 1));
                search.next_run(&mut map, 1);
            }
            let mut expected = std::collections::BTreeSet::new();
            for (block, first, pages) in marks {
                map.set_run(run(block, first, pages));
                let Some(size) = sizes.get(block as usize) else { continue };
                expected.extend((first..(first + pages).min(*size)).map(|page| (block, page)));
            }
            for (block, first, pages) in asks {
                search.request(run(block, first, pages));
            }
            while let Some(run) = search.next_run(&mut map, max) {
                prop_assert!(run.pages <= max && run.pages > 0);
                for page in run.first.0..run.end().0 {
                    prop_assert!(expected.remove(&(run.block.0, page)), "page {page} came twice");
                }
            }
            prop_assert!(expected.is_empty(), "left behind: {expected:?}");
            prop_assert_eq!(map.count(), 0);
        }
    }
}
