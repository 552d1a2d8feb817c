//! Bitmaps that several threads set at once.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{PageBitmap, PageRun, RamBlockTable};
use crate::units::{BlockIndex, PageIndex};

/// One bit per page of one block, set from any thread.
#[derive(Debug)]
pub struct AtomicBitmap {
    words: Box<[AtomicU64]>,
    pages: u64,
}

impl AtomicBitmap {
    /// `pages` clear bits.
    pub fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        Self { words: (0..words).map(|_| AtomicU64::new(0)).collect(), pages }
    }

    /// Pages the map covers.
    pub fn len(&self) -> u64 {
        self.pages
    }

    /// True if the map covers no page.
    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// True if `page` is set.
    pub fn get(&self, page: PageIndex) -> bool {
        let word = usize::try_from(page.0 / 64).ok().and_then(|at| self.words.get(at));
        page.0 < self.pages && word.is_some_and(|word| word.load(Ordering::Acquire) >> (page.0 % 64) & 1 == 1)
    }

    /// Sets `pages` pages from `first`, cut at the end of the map; returns how many were clear before.
    ///
    /// Release: a thread that takes the bit sees the bytes written before it was set.
    pub fn set(&self, first: PageIndex, pages: u64) -> u64 {
        let fresh = self.masks(first, pages).map(|(word, mask)| {
            let before = word.fetch_or(mask, Ordering::AcqRel);
            u64::from((mask & !before).count_ones())
        });
        fresh.sum()
    }

    /// Clears `pages` pages from `first`, cut at the end of the map; returns how many were set before.
    pub fn clear(&self, first: PageIndex, pages: u64) -> u64 {
        let cleared = self.masks(first, pages).map(|(word, mask)| {
            let before = word.fetch_and(!mask, Ordering::AcqRel);
            u64::from((mask & before).count_ones())
        });
        cleared.sum()
    }

    /// Clears all pages.
    pub(crate) fn clear_all(&self) {
        // A plain load first, as in `take`.
        for word in self.words.iter().filter(|word| word.load(Ordering::Relaxed) != 0) {
            word.swap(0, Ordering::AcqRel);
        }
    }

    /// The words that a range of pages touches, and which of their bits.
    fn masks(&self, first: PageIndex, pages: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let end = first.0.saturating_add(pages).min(self.pages);
        let mut at = first.0;
        std::iter::from_fn(move || {
            let upto = end.min((at / 64 + 1) * 64);
            let (from, len) = (at, upto.checked_sub(at).filter(|len| *len > 0)?);
            at = upto;
            let mask = (u64::MAX >> (64 - len)) << (from % 64);
            Some((self.words.get((from / 64) as usize)?, mask))
        })
    }

    /// ORs every set bit into `into`.
    pub fn copy_into(&self, into: &mut PageBitmap) {
        for (at, word) in self.words.iter().enumerate() {
            into.merge_words(at, &[word.load(Ordering::Acquire)]);
        }
    }

    /// Moves every set bit into `into` and clears it here; returns how many were clear there before.
    pub fn take_into(&self, into: &mut PageBitmap) -> u64 {
        self.take(into).1
    }

    /// Moves every set bit into `into` and clears it here; returns how many were set here.
    pub fn take_bits(&self, into: &mut PageBitmap) -> u64 {
        self.take(into).0
    }

    fn take(&self, into: &mut PageBitmap) -> (u64, u64) {
        let (mut taken, mut fresh) = (0, 0);
        for (at, word) in self.words.iter().enumerate() {
            // A plain load first: most words of a sparse map are zero and need no locked swap.
            if word.load(Ordering::Relaxed) != 0 {
                let bits = word.swap(0, Ordering::AcqRel);
                taken += u64::from(bits.count_ones());
                fresh += into.merge_words(at, &[bits]);
            }
        }
        (taken, fresh)
    }

    /// Set bits at this moment.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }
}

/// Which pages have arrived, over all blocks; channels mark it in parallel.
#[derive(Debug)]
pub struct ReceivedMap {
    blocks: Vec<AtomicBitmap>,
    count: AtomicU64,
}

impl ReceivedMap {
    /// No page of any block has arrived.
    pub fn new(table: &RamBlockTable) -> Self {
        let blocks = table.blocks().iter().map(|b| AtomicBitmap::new(table.pages_of(b))).collect();
        Self { blocks, count: AtomicU64::new(0) }
    }

    /// Marks a run; returns how many pages arrived for the first time.
    pub fn mark(&self, run: PageRun) -> u64 {
        let fresh = self.blocks.get(run.block.as_usize()).map_or(0, |map| map.set(run.first, run.pages));
        if fresh > 0 {
            self.count.fetch_add(fresh, Ordering::Relaxed);
        }
        fresh
    }

    /// The pages of a run have to be received again.
    pub fn forget(&self, run: PageRun) {
        let map = self.blocks.get(run.block.as_usize());
        let gone = map.map_or(0, |map| map.clear(run.first, run.pages));
        self.count.fetch_sub(gone, Ordering::Relaxed);
    }

    /// All pages have to be received again.
    pub(crate) fn forget_all(&self) {
        self.blocks.iter().for_each(AtomicBitmap::clear_all);
        self.count.store(0, Ordering::Relaxed);
    }

    /// The map of one block.
    pub fn block(&self, block: BlockIndex) -> Option<&AtomicBitmap> {
        self.blocks.get(block.as_usize())
    }

    /// Number of pages that have arrived and were not forgotten. The call costs nothing: pages are counted as they
    /// arrive.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_set_from_threads_are_taken_once() {
        let map = AtomicBitmap::new(10_000);
        let mut taken = PageBitmap::new(10_000);
        std::thread::scope(|scope| {
            for offset in 0..4u64 {
                let map = &map;
                scope.spawn(move || {
                    (0..2500).for_each(|i| assert_eq!(map.set(PageIndex(i * 4 + offset), 1), 1))
                });
            }
            let mut moved = 0;
            while moved < 10_000 {
                moved += map.take_into(&mut taken);
            }
        });
        assert_eq!((taken.count(), map.count()), (10_000, 0));
    }

    #[test]
    fn a_range_is_cut_at_the_end() {
        let map = AtomicBitmap::new(70);
        assert_eq!(map.set(PageIndex(60), 64), 10);
        assert_eq!(map.set(PageIndex(0), 64), 60);
        assert!(map.get(PageIndex(69)) && !map.get(PageIndex(70)));
    }
}
