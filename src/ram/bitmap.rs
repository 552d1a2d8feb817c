//! A bitmap of the pages of one block, walked in runs, with an exact count.

use std::ops::Range;

use bitvec::order::Lsb0;
use bitvec::vec::BitVec;

use crate::units::PageIndex;

/// One bit per page, and how many are set.
///
/// Single bits go through `bitvec`; walks and merges use its raw words, because whole words are what
/// makes a sparse map of 1 TiB (32 MiB of bits) walk at memory speed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    bits: BitVec<u64, Lsb0>,
    set: u64,
}

impl PageBitmap {
    /// `pages` clear bits.
    pub fn new(pages: u64) -> Self {
        Self { bits: BitVec::repeat(false, to_usize(pages)), set: 0 }
    }

    /// Pages the map covers.
    pub fn len(&self) -> u64 {
        self.bits.len() as u64
    }

    /// True if the map covers no page.
    pub fn is_empty(&self) -> bool {
        self.bits.is_empty()
    }

    /// Set bits.
    pub fn count(&self) -> u64 {
        self.set
    }

    /// True if `page` is set; pages past the end are not.
    pub fn get(&self, page: PageIndex) -> bool {
        self.bits.get(to_usize(page.0)).is_some_and(|bit| *bit)
    }

    /// Sets `pages` (cut at the end of the map) and returns how many were clear before.
    pub fn set_range(&mut self, pages: Range<u64>) -> u64 {
        let fresh = self.for_words(pages, |word, mask| {
            let fresh = mask & !*word;
            *word |= mask;
            fresh.count_ones()
        });
        self.set += fresh;
        fresh
    }

    /// Clears `pages` (cut at the end of the map) and returns how many were set before.
    pub fn clear_range(&mut self, pages: Range<u64>) -> u64 {
        let gone = self.for_words(pages, |word, mask| {
            let gone = mask & *word;
            *word &= !mask;
            gone.count_ones()
        });
        self.set -= gone;
        gone
    }

    /// ORs `words` in, bit 0 of `words[0]` being page `first_word * 64`; bits past the end are ignored.
    /// Returns how many bits were clear before.
    pub fn merge_words(&mut self, first_word: usize, words: &[u64]) -> u64 {
        let len = self.bits.len();
        let own = self.bits.as_raw_mut_slice().get_mut(first_word..).unwrap_or(&mut []);
        let mut fresh = 0;
        for (at, (own, new)) in own.iter_mut().zip(words).enumerate() {
            if *new == 0 {
                continue;
            }
            let new = *new & valid_mask(len, first_word + at);
            fresh += u64::from((new & !*own).count_ones());
            *own |= new;
        }
        self.set += fresh;
        fresh
    }

    /// The first run of set pages at or after `from`, at most `max_pages` long (at least 1).
    pub fn next_run(&self, from: PageIndex, max_pages: u64) -> Option<Range<u64>> {
        if self.set == 0 {
            return None;
        }
        let start = self.find(from.0, self.len(), |word| word)?;
        let limit = start.saturating_add(max_pages.max(1)).min(self.len());
        let end = self.find(start, limit, |word| !word).unwrap_or(limit);
        Some(start..end)
    }

    /// The words of the bitmap, least significant bit first.
    pub fn words(&self) -> &[u64] {
        self.bits.as_raw_slice()
    }

    /// First page in `from..limit` whose bit in `pick(word)` is set.
    fn find(&self, from: u64, limit: u64, pick: impl Fn(u64) -> u64) -> Option<u64> {
        if from >= limit {
            return None;
        }
        let words = self.bits.as_raw_slice();
        let first = to_usize(from / 64);
        let last = to_usize((limit - 1) / 64);
        let head = pick(words[first]) & (u64::MAX << (from % 64));
        let (at, word) = if head != 0 {
            (first, head)
        } else {
            let rest = words.get(first + 1..=last)?;
            let skip = first_nonzero(rest, &pick)?;
            (first + 1 + skip, pick(rest[skip]))
        };
        let page = at as u64 * 64 + u64::from(word.trailing_zeros());
        (page < limit).then_some(page)
    }

    fn for_words(&mut self, pages: Range<u64>, mut each: impl FnMut(&mut u64, u64) -> u32) -> u64 {
        let end = pages.end.min(self.len());
        if pages.start >= end {
            return 0;
        }
        let (first, last) = (to_usize(pages.start / 64), to_usize((end - 1) / 64));
        let words = self.bits.as_raw_mut_slice();
        let mut changed = 0;
        for (at, word) in words[first..=last].iter_mut().enumerate() {
            let mut mask = u64::MAX;
            if at == 0 {
                mask &= u64::MAX << (pages.start % 64);
            }
            if first + at == last {
                mask &= u64::MAX >> (63 - (end - 1) % 64);
            }
            changed += u64::from(each(word, mask));
        }
        changed
    }
}

/// Index of the first word with a picked bit; eight words per step, so that the compiler can use vectors.
fn first_nonzero(words: &[u64], pick: &impl Fn(u64) -> u64) -> Option<usize> {
    let mut chunks = words.chunks_exact(8);
    let mut base = 0;
    for chunk in chunks.by_ref() {
        if chunk.iter().fold(0, |all, word| all | pick(*word)) != 0 {
            break;
        }
        base += 8;
    }
    words[base..].iter().position(|word| pick(*word) != 0).map(|at| base + at)
}

fn valid_mask(len: usize, word: usize) -> u64 {
    let left = len.saturating_sub(word * 64);
    if left >= 64 { u64::MAX } else { (1 << left) - 1 }
}

/// Page numbers of a map that fits in memory fit `usize`; larger ones are past every map's end.
fn to_usize(pages: u64) -> usize {
    usize::try_from(pages).unwrap_or(usize::MAX)
}

/// Which of `pages` pages are set, in the format of QEMU's received bitmap: bit i of byte i / 8 is page i.
pub(crate) fn page_bits(pages: u64, is_set: impl Fn(PageIndex) -> bool) -> Vec<u8> {
    let mut bits = vec![0; to_usize(pages.div_ceil(8))];
    for (byte, first) in bits.iter_mut().zip((0..).step_by(8)) {
        let here = (0..8).filter(|bit| first + bit < pages && is_set(PageIndex(first + bit)));
        *byte = here.fold(0, |byte, bit| byte | 1 << bit);
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_past_the_end_are_cut() {
        let mut map = PageBitmap::new(70);
        assert_eq!(map.set_range(60..1000), 10);
        assert_eq!(map.merge_words(1, &[u64::MAX, u64::MAX]), 0);
        assert_eq!(map.merge_words(0, &[1]), 1);
        assert_eq!(map.count(), 11);
        assert_eq!(map.next_run(PageIndex(1), 100), Some(60..70));
        assert_eq!(map.next_run(PageIndex(70), 100), None);
        assert_eq!(map.next_run(PageIndex(u64::MAX), 1), None);
    }

    #[test]
    fn bits_of_pages_are_those_of_a_received_bitmap() {
        let bits = |pages, set: &[u64]| page_bits(pages, |page| set.contains(&page.0));
        assert_eq!(bits(10, &[0, 7, 9, 10]), [0b1000_0001, 0b10], "what is behind the last page is no page");
        assert_eq!((bits(8, &[1]), bits(0, &[0])), (vec![0b10], vec![]));
    }

    proptest! {
        /// Runs visit every set page once, in order, none longer than asked for; the count is exact.
        #[test]
        fn runs_visit_each_set_page_once(
            model in prop::collection::vec(prop::bool::weighted(0.3), 1..3000),
            max_run in 1u64..300,
        ) {
            let mut map = PageBitmap::new(model.len() as u64);
            for (page, _) in model.iter().enumerate().filter(|(_, set)| **set) {
                map.set_range(page as u64..page as u64 + 1);
            }
            prop_assert_eq!(map.count(), model.iter().filter(|set| **set).count() as u64);
            let mut visited = Vec::new();
            let mut from = PageIndex(0);
            while let Some(run) = map.next_run(from, max_run) {
                prop_assert!(!run.is_empty() && run.end - run.start <= max_run);
                visited.extend(run.clone());
                from = PageIndex(run.end);
            }
            let expected: Vec<u64> = (0..model.len() as u64).filter(|p| model[*p as usize]).collect();
            prop_assert_eq!(visited, expected);
        }

        /// Setting, clearing and merging ranges keeps bits and count equal to a naive model.
        #[test]
        fn ranges_match_a_naive_model(
            ops in prop::collection::vec((0u8..3, 0u64..400, 0u64..400, any::<u64>()), 0..60),
        ) {
            let mut map = PageBitmap::new(333);
            let mut model = vec![false; 333];
            for (op, a, b, word) in ops {
                let range = a.min(b)..a.max(b);
                match op {
                    0 => { map.set_range(range.clone()); }
                    1 => { map.clear_range(range.clone()); }
                    _ => { map.merge_words((a / 64) as usize, &[word]); }
                }
                for (page, bit) in model.iter_mut().enumerate() {
                    let page = page as u64;
                    match op {
                        0 if range.contains(&page) => *bit = true,
                        1 if range.contains(&page) => *bit = false,
                        2 if page / 64 == a / 64 => *bit |= word >> (page % 64) & 1 == 1,
                        _ => {}
                    }
                }
                prop_assert_eq!(map.count(), model.iter().filter(|b| **b).count() as u64);
                for (page, bit) in model.iter().enumerate() {
                    prop_assert_eq!(map.get(PageIndex(page as u64)), *bit);
                }
            }
        }
    }
}
