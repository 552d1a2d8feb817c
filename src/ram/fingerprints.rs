//! 64 bits of a keyed hash for each page of a guest.

use std::sync::atomic::{AtomicU64, Ordering};

use twox_hash::XxHash3_64;

use super::{PageRun, RamBlockTable};
use crate::units::{BlockIndex, PageIndex};

/// A fingerprint for each page, kept by the threads that touch the page anyway. It guards against loss, not against a
/// forger: two pages that differ have equal ones once in 2^64.
#[derive(Debug)]
pub struct Fingerprints {
    seed: u64,
    zero: u64,
    blocks: Vec<Box<[AtomicU64]>>,
}

/// Stands for a page that has none.
const NONE: u64 = 0;

impl Fingerprints {
    /// None for any page of `table`. Both ends of a migration make theirs with the same `key`.
    pub fn new(table: &RamBlockTable, key: [u8; 16]) -> Self {
        let empty = |pages: u64| (0..pages).map(|_| AtomicU64::new(NONE)).collect();
        let pages =
            table.blocks().iter().map(|block| if block.flags.ignored { 0 } else { table.pages_of(block) });
        let mut new =
            Self { seed: XxHash3_64::oneshot(&key), zero: NONE, blocks: pages.map(empty).collect() };
        new.zero = new.of(&vec![0; table.page().bytes() as usize]);
        new
    }

    /// What `page`, the bytes of one page, has.
    pub fn of(&self, page: &[u8]) -> u64 {
        match XxHash3_64::oneshot_with_seed(self.seed, page) {
            NONE => 1,
            value => value,
        }
    }

    /// Keeps the one of a page.
    pub fn set(&self, block: BlockIndex, page: PageIndex, value: u64) {
        if let Some(slot) = self.slot(block, page) {
            slot.store(value, Ordering::Relaxed);
        }
    }

    /// The pages of `run` are zero.
    pub fn set_zero(&self, run: PageRun) {
        (run.first.0..run.end().0).for_each(|page| self.set(run.block, PageIndex(page), self.zero));
    }

    /// The one that was kept last; `None` for none.
    pub fn get(&self, block: BlockIndex, page: PageIndex) -> Option<u64> {
        self.slot(block, page).map(|slot| slot.load(Ordering::Relaxed)).filter(|value| *value != NONE)
    }

    fn slot(&self, block: BlockIndex, page: PageIndex) -> Option<&AtomicU64> {
        self.blocks.get(block.as_usize())?.get(usize::try_from(page.0).ok()?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::{BlockName, RamBlock};
    use crate::units::PageSize;

    fn table() -> RamBlockTable {
        let block = |name: &str| RamBlock::new(BlockName::new(name).unwrap(), 4 * 4096);
        let mut shared = block("shared");
        shared.flags.ignored = true;
        RamBlockTable::new(PageSize::SIZE_4K, vec![block("ram"), shared]).unwrap()
    }

    #[test]
    fn the_last_one_counts_and_only_of_pages_that_travel() {
        let prints = Fingerprints::new(&table(), [7; 16]);
        let (ram, shared) = (BlockIndex(0), BlockIndex(1));
        assert_eq!(prints.get(ram, PageIndex(3)), None);
        prints.set(ram, PageIndex(3), 9);
        prints.set(ram, PageIndex(3), 11);
        prints.set(ram, PageIndex(4), 12);
        prints.set(shared, PageIndex(0), 12);
        assert_eq!((prints.get(ram, PageIndex(3)), prints.get(ram, PageIndex(4))), (Some(11), None));
        assert_eq!(prints.get(shared, PageIndex(0)), None);
        prints.set_zero(PageRun { block: ram, first: PageIndex(2), pages: 9 });
        assert_eq!(prints.get(ram, PageIndex(3)), Some(prints.of(&[0; 4096])));
    }

    #[test]
    fn one_bit_and_another_key_make_another() {
        let (one, other) = (Fingerprints::new(&table(), [1; 16]), Fingerprints::new(&table(), [2; 16]));
        let mut page = vec![5; 4096];
        let before = one.of(&page);
        assert_ne!(before, other.of(&page));
        page[4095] ^= 1;
        assert_ne!(before, one.of(&page));
        assert_eq!(Fingerprints::new(&table(), [1; 16]).of(&page), one.of(&page));
    }
}
