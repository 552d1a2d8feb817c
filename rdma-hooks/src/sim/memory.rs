//! Guest memory for simulations: only pages that were ever written take space.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::region::RegionMemory;

const PAGE: u64 = 4096;
static ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];

type Pages = BTreeMap<u64, Box<[u8; PAGE as usize]>>;

/// Memory that reads as zero until it is written.
#[derive(Debug, Default)]
pub struct SparseMemory {
    len: u64,
    pages: Mutex<Pages>,
}

impl SparseMemory {
    /// `len` bytes of zeros.
    pub fn new(len: u64) -> Self {
        Self { len, pages: Mutex::default() }
    }

    /// Offset of the first page (4 KiB) that differs, if any. Both must have the same length.
    pub fn first_difference(&self, other: &Self) -> Option<u64> {
        let (ours, theirs) = (self.pages().clone(), other.pages());
        let zero = [0; PAGE as usize];
        let page = |pages: &Pages, index: &u64| pages.get(index).map_or(zero, |page| **page);
        let mut all: Vec<u64> = ours.keys().chain(theirs.keys()).copied().collect();
        all.sort_unstable();
        all.into_iter().find(|index| page(&ours, index) != page(&theirs, index)).map(|index| index * PAGE)
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pieces of `offset..offset + len` by page: index, place in the page, place in the range.
fn pieces(offset: u64, len: u64) -> impl Iterator<Item = (u64, std::ops::Range<usize>, usize)> {
    let end = offset.saturating_add(len);
    let mut at = offset;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let (index, start) = (at / PAGE, at % PAGE);
            let count = (PAGE - start).min(end - at);
            let done = (at - offset) as usize;
            at += count;
            (index, start as usize..(start + count) as usize, done)
        })
    })
}

impl RegionMemory for SparseMemory {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
        let pages = self.pages();
        for (index, inside, done) in pieces(offset, into.len() as u64) {
            let out = &mut into[done..done + inside.len()];
            match pages.get(&index) {
                Some(page) => out.copy_from_slice(&page[inside]),
                None => out.fill(0),
            }
        }
    }

    fn write(&self, offset: u64, from: &[u8]) {
        let mut pages = self.pages();
        for (index, inside, done) in pieces(offset, from.len() as u64) {
            let from = &from[done..done + inside.len()];
            if !pages.contains_key(&index) && from == &ZEROS[..from.len()] {
                continue;
            }
            pages.entry(index).or_insert_with(|| Box::new([0; PAGE as usize]))[inside].copy_from_slice(from);
        }
    }

    fn zero(&self, offset: u64, len: u64) {
        let mut pages = self.pages();
        let (first, last) = (offset / PAGE, offset.saturating_add(len).div_ceil(PAGE));
        let touched: Vec<u64> = pages.range(first..last).map(|(&index, _)| index).collect();
        for index in touched {
            let start = offset.max(index * PAGE) - index * PAGE;
            let end = (offset + len).min((index + 1) * PAGE) - index * PAGE;
            if let Some(page) = pages.get_mut(&index) {
                page[start as usize..end as usize].fill(0);
            }
        }
    }

    fn is_zero(&self, offset: u64, len: u64) -> bool {
        let pages = self.pages();
        let (first, last) = (offset / PAGE, offset.saturating_add(len).div_ceil(PAGE));
        pages.range(first..last).all(|(&index, page)| {
            let start = offset.max(index * PAGE) - index * PAGE;
            let end = (offset + len).min((index + 1) * PAGE) - index * PAGE;
            page[start as usize..end as usize] == ZEROS[..(end - start) as usize]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_across_pages_read_back_and_zeroing_is_exact() {
        let memory = SparseMemory::new(4 * PAGE);
        memory.write(PAGE - 2, b"abcd");
        let mut seen = [9; 6];
        memory.read(PAGE - 3, &mut seen);
        assert_eq!(&seen, b"\0abcd\0");
        memory.zero(PAGE - 1, 2);
        memory.read(PAGE - 3, &mut seen);
        assert_eq!(&seen, b"\0a\0\0d\0");
        assert!(memory.is_zero(0, PAGE - 2) && !memory.is_zero(0, PAGE - 1));
        let other = SparseMemory::new(4 * PAGE);
        assert_eq!(memory.first_difference(&other), Some(0));
        other.write(PAGE - 2, b"a");
        assert_eq!(memory.first_difference(&other), Some(PAGE));
        other.write(PAGE + 1, b"d");
        assert_eq!(memory.first_difference(&other), None);
    }
}
