//! A bitmap in memory that another process sets: bit `n` is bit `n % 8` of byte `n / 8`.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::HostRegion;

/// Bits in shared memory, set and taken by atomic operations on both sides.
#[derive(Clone, Debug)]
pub(crate) struct SharedBitmap {
    region: HostRegion,
    bits: u64,
}

impl SharedBitmap {
    /// All bits of `region`, which are left unchanged; only whole 64-bit words count. `None` if the region does not
    /// start at a multiple of 8.
    pub(crate) fn new(region: HostRegion) -> Option<Self> {
        let aligned = region.address().is_multiple_of(align_of::<AtomicU64>());
        aligned.then(|| Self { bits: region.len() / 8 * 64, region })
    }

    /// Bits the memory holds.
    pub(crate) fn len(&self) -> u64 {
        self.bits
    }

    /// Sets `bits` as a device would, cut at the end of the map.
    #[cfg(test)]
    pub(crate) fn set(&self, bits: Range<u64>) {
        self.for_words(bits, |_, word, mask| {
            word.fetch_or(mask.to_le(), Ordering::Release);
        });
    }

    /// Clears `bits` and calls `each` with the number of the first bit of a word and the bits that were set in it.
    pub(crate) fn take(&self, bits: Range<u64>, mut each: impl FnMut(u64, u64)) {
        self.for_words(bits, |first, word, mask| {
            // A plain load first: most words of a sparse log are zero and need no locked operation.
            if u64::from_le(word.load(Ordering::Relaxed)) & mask != 0 {
                let taken = u64::from_le(word.fetch_and(!mask.to_le(), Ordering::AcqRel)) & mask;
                each(first, taken);
            }
        });
    }

    fn for_words(&self, bits: Range<u64>, mut each: impl FnMut(u64, &AtomicU64, u64)) {
        let end = bits.end.min(self.bits);
        let mut at = bits.start;
        while at < end {
            let first = at / 64 * 64;
            let upto = end.min(first + 64);
            let mask = (u64::MAX >> (64 - (upto - at))) << (at - first);
            if let Ok(span) = self.region.span(first / 8, 8) {
                // SAFETY: the eight bytes are mapped as long as the region lives, aligned (checked in `new`, and
                // `first` counts whole words), and both sides touch them by atomic operations only.
                let word = unsafe { AtomicU64::from_ptr(span.as_ptr().cast()) };
                each(first, word, mask);
            }
            at = upto;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::Mapping;

    fn taken(map: &SharedBitmap, bits: Range<u64>) -> Vec<u64> {
        let mut found = Vec::new();
        map.take(bits, |first, word| {
            found.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|b| first + b))
        });
        found
    }

    #[test]
    fn bits_lie_in_bytes_as_a_vhost_log_has_them_and_are_taken_once() {
        let memory = Mapping::memfd("log", 4096).unwrap();
        let map = SharedBitmap::new(memory.region().clone()).unwrap();
        map.set(9..10);
        map.set(62..67);
        map.set(map.len() - 1..u64::MAX);
        let mut bytes = [0; 9];
        memory.region().span(0, 9).unwrap().copy_to(&mut bytes);
        assert_eq!(bytes, [0, 2, 0, 0, 0, 0, 0, 0xc0, 7]);
        assert_eq!(taken(&map, 10..65), [62, 63, 64]);
        assert_eq!(taken(&map, 0..u64::MAX), [9, 65, 66, 32767]);
        assert!(taken(&map, 0..u64::MAX).is_empty());
    }

    #[test]
    fn a_map_that_is_not_aligned_is_refused() {
        let memory = Mapping::memfd("log", 4096).unwrap();
        let odd = std::ptr::NonNull::new((memory.region().address() + 4) as *mut u8).unwrap();
        // SAFETY: inside the mapping, which the owner keeps.
        let region =
            unsafe { HostRegion::from_raw(odd, 64, memory.region().page(), std::sync::Arc::new(memory)) };
        assert!(SharedBitmap::new(region).is_none());
    }
}
