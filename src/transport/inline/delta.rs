//! Pages as differences to the destination's content (XBZRLE): the cache of sent pages.
//!
//! # Required order
//!
//! The cache's copy of a page equals the destination's content. A page is therefore copied before it is encoded, and a
//! whole page that enters the cache is sent from the cache: the guest may write meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapMut;

use crate::error::Chain;
use crate::observe::DeltaCounts;
use crate::stream::xbzrle::{Encoded, encode};
use crate::sys::HostSpan;

/// Generations for which a page keeps its slot against another page.
const PROTECTED: u64 = 2;

/// Size of the cache in bytes; 0: no deltas. May be changed while a migration runs; copies that still fit stay in the
/// cache. Clones share the size.
#[derive(Clone, Debug, Default)]
pub struct DeltaCacheSize(Arc<AtomicU64>);

impl DeltaCacheSize {
    /// `bytes`; the cache uses the largest power of two of pages that fits, and no more pages than the guest has.
    pub fn new(bytes: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes)))
    }

    /// From the next round on.
    pub fn set(&self, bytes: u64) {
        self.0.store(bytes, Ordering::Relaxed);
    }

    /// The size.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a page travels as.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum SentAs<'a> {
    /// Not at all: the destination has this content.
    NotAtAll,
    /// The encoding of its difference.
    Delta(&'a [u8]),
    /// These bytes, which are now in the cache.
    Copy(&'a [u8]),
    /// From the guest's memory, as without a cache.
    Whole,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// Number of the page plus one; 0: empty.
    page: u64,
    used: u64,
}

impl Slot {
    /// Takes the slot for `page` if it is free, already holds `page`, or its page has not been used lately.
    fn claim(&mut self, page: u64, generation: u64) -> bool {
        let is_own = self.page == page + 1;
        if self.page != 0 && !is_own && self.used + PROTECTED > generation {
            return false;
        }
        *self = Self { page: page + 1, used: generation };
        true
    }
}

/// Slots and their copies.
#[derive(Debug)]
struct Store {
    slots: Vec<Slot>,
    /// Mapped, not allocated: the kernel can refuse, and supplies memory only when a copy is written.
    copies: MmapMut,
    page_bytes: usize,
}

impl Store {
    fn new(slots: usize, page_bytes: usize) -> std::io::Result<Self> {
        let copies = MmapMut::map_anon(slots * page_bytes)?;
        Ok(Self { slots: vec![Slot::default(); slots], copies, page_bytes })
    }

    fn slot_of(&self, page: u64) -> usize {
        (page as usize) & (self.slots.len() - 1)
    }

    fn copy(&self, at: usize) -> &[u8] {
        &self.copies[at * self.page_bytes..(at + 1) * self.page_bytes]
    }

    fn copy_mut(&mut self, at: usize) -> &mut [u8] {
        &mut self.copies[at * self.page_bytes..(at + 1) * self.page_bytes]
    }

    /// Takes over the copies of `from`; of two copies for one slot, the more recently used one.
    fn take_over(&mut self, from: &Self) {
        for (at, slot) in from.slots.iter().enumerate().filter(|(_, slot)| slot.page != 0) {
            let to = self.slot_of(slot.page - 1);
            if self.slots[to].page == 0 || self.slots[to].used < slot.used {
                self.slots[to] = *slot;
                self.copy_mut(to).copy_from_slice(from.copy(at));
            }
        }
    }
}

/// Copies of pages as they were sent, each in the slot that its number determines.
#[derive(Debug)]
pub(super) struct DeltaCache {
    size: DeltaCacheSize,
    sized: u64,
    store: Option<Store>,
    page_bytes: usize,
    guest_pages: u64,
    generation: u64,
    rounds: u32,
    last_round: bool,
    new: Vec<u8>,
    encoded: Vec<u8>,
    pub(super) counts: DeltaCounts,
}

impl DeltaCache {
    /// An empty cache for a guest of `guest_pages`; memory is allocated when the second round begins.
    pub(super) fn new(size: DeltaCacheSize, page_bytes: u64, guest_pages: u64) -> Self {
        let page_bytes = page_bytes as usize;
        Self {
            size,
            sized: 0,
            store: None,
            page_bytes,
            guest_pages,
            generation: 0,
            rounds: 0,
            last_round: false,
            new: vec![0; page_bytes],
            encoded: vec![0; page_bytes],
            counts: DeltaCounts::default(),
        }
    }

    /// Its size, which may be changed.
    pub(super) fn size(&self) -> DeltaCacheSize {
        self.size.clone()
    }

    /// A round of pages begins; the last one does not change the cache any more. In the first there is nothing to
    /// compare with.
    pub(super) fn round(&mut self, last: bool) {
        self.rounds += 1;
        self.generation += 1;
        self.last_round = last;
        let wanted = self.size.get();
        if self.rounds > 1 && wanted != self.sized && !last {
            self.sized = wanted;
            self.resize(wanted);
        }
    }

    fn resize(&mut self, wanted: u64) {
        let pages = (wanted / self.page_bytes as u64).min(self.guest_pages.next_power_of_two());
        let slots = if pages == 0 { 0 } else { 1_usize << pages.ilog2() };
        let old = self.store.take();
        self.counts.cache_size = 0;
        if slots == 0 {
            return;
        }
        match Store::new(slots, self.page_bytes) {
            Ok(mut store) => {
                old.iter().for_each(|old| store.take_over(old));
                self.counts.cache_size = (slots * self.page_bytes) as u64;
                self.store = Some(store);
            }
            // Deltas are optional: the migration continues without them.
            Err(error) => {
                tracing::warn!(error = %Chain(&error), bytes = wanted, "no memory for a cache of pages: no deltas")
            }
        }
    }

    /// True if pages may be sent as deltas in this round.
    pub(super) fn is_active(&self) -> bool {
        self.store.is_some()
    }

    /// How to send page number `page`, which reads as `span`; the page is copied first.
    pub(super) fn page(&mut self, page: u64, span: HostSpan<'_>) -> SentAs<'_> {
        let Some(store) = &mut self.store else { return SentAs::Whole };
        let at = store.slot_of(page);
        if store.slots[at].page != page + 1 {
            self.counts.cache_misses += 1;
            if self.last_round || !store.slots[at].claim(page, self.generation) {
                return SentAs::Whole;
            }
            span.copy_to(store.copy_mut(at));
            return SentAs::Copy(store.copy(at));
        }
        store.slots[at].used = self.generation;
        span.copy_to(&mut self.new);
        let found = encode(store.copy(at), &self.new, &mut self.encoded);
        match found {
            Encoded::Unchanged => {
                self.counts.unchanged += 1;
                return SentAs::NotAtAll;
            }
            Encoded::Overflow => {
                self.counts.overflows += 1;
                self.counts.bytes += self.page_bytes as u64;
            }
            Encoded::Delta(len) => {
                self.counts.pages += 1;
                self.counts.bytes += len as u64;
            }
        }
        if !self.last_round {
            store.copy_mut(at).copy_from_slice(&self.new);
        }
        match found {
            Encoded::Delta(len) => SentAs::Delta(&self.encoded[..len]),
            _ => SentAs::Copy(&self.new),
        }
    }

    /// Page number `page` is sent as zero.
    pub(super) fn zero(&mut self, page: u64) {
        let Some(store) = self.store.as_mut().filter(|_| !self.last_round) else { return };
        let at = store.slot_of(page);
        if store.slots[at].claim(page, self.generation) {
            store.copy_mut(at).fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::stream::xbzrle::decode;
    use crate::sys::Mapping;
    use proptest::prelude::*;

    const PAGE: usize = 4096;

    fn cache(pages: u64) -> DeltaCache {
        let mut cache = DeltaCache::new(DeltaCacheSize::new(pages * PAGE as u64), PAGE as u64, 12);
        cache.round(false);
        assert!(!cache.is_active(), "the first round has nothing to differ from");
        cache.round(false);
        cache
    }

    #[test]
    fn s35_s36_a_page_is_whole_once_then_a_delta_then_nothing() {
        let memory = Mapping::memfd("deltas", 8 * PAGE as u64).unwrap();
        let span = |page: usize| memory.region().span((page * PAGE) as u64, PAGE as u64).unwrap();
        let mut cache = cache(4);
        span(1).copy_from(&[7; PAGE]);
        assert_eq!(cache.page(1, span(1)), SentAs::Copy(&[7; PAGE]));
        span(1).copy_from(&[9; 3]);
        assert_eq!(cache.page(1, span(1)), SentAs::Delta(&[0, 3, 9, 9, 9]));
        assert_eq!(cache.page(1, span(1)), SentAs::NotAtAll);
        span(1).copy_from(&[1; PAGE]);
        assert_eq!(cache.page(1, span(1)), SentAs::Copy(&[1; PAGE]), "too different");
        let DeltaCounts { pages, bytes, unchanged, cache_misses, overflows, cache_size } = cache.counts;
        assert_eq!((pages, bytes, unchanged, cache_misses, overflows), (1, 5 + PAGE as u64, 1, 1, 1));
        assert_eq!(cache_size, 4 * PAGE as u64);
    }

    #[test]
    fn s37_a_place_is_kept_for_two_generations_and_nothing_changes_in_the_last_round() {
        let memory = Mapping::memfd("deltas", 16 * PAGE as u64).unwrap();
        let span = |page: usize| memory.region().span((page * PAGE) as u64, PAGE as u64).unwrap();
        let mut cache = cache(4);
        cache.zero(1);
        assert_eq!(cache.page(5, span(5)), SentAs::Whole, "its place is page 1's");
        cache.round(false);
        assert_eq!(cache.page(5, span(5)), SentAs::Whole);
        cache.round(false);
        span(5).copy_from(&[5; PAGE]);
        assert_eq!(cache.page(5, span(5)), SentAs::Copy(&[5; PAGE]));
        cache.zero(5);
        cache.round(true);
        assert_eq!(cache.page(2, span(2)), SentAs::Whole, "not taken in any more");
        span(5).copy_from(&[0; PAGE]);
        assert_eq!(cache.page(5, span(5)), SentAs::NotAtAll, "its zeros were kept");
    }

    #[test]
    fn the_size_changes_at_a_round_and_what_finds_room_stays() {
        let memory = Mapping::memfd("deltas", 8 * PAGE as u64).unwrap();
        let span = |page: usize| memory.region().span((page * PAGE) as u64, PAGE as u64).unwrap();
        let size = DeltaCacheSize::new(5 * PAGE as u64);
        let mut cache = DeltaCache::new(size.clone(), PAGE as u64, 8);
        cache.round(false);
        cache.round(false);
        assert_eq!(cache.counts.cache_size, 4 * PAGE as u64, "a power of two");
        cache.page(0, span(0));
        size.set(u64::MAX);
        assert_eq!(cache.page(0, span(0)), SentAs::NotAtAll);
        assert_eq!(cache.counts.cache_size, 4 * PAGE as u64, "not within a round");
        cache.round(false);
        assert_eq!(cache.counts.cache_size, 8 * PAGE as u64, "no more than the guest has");
        assert_eq!(cache.page(0, span(0)), SentAs::NotAtAll);
        assert!(matches!(cache.page(4, span(4)), SentAs::Copy(_)), "a place of its own now");
        cache.round(false);
        assert_eq!(cache.page(4, span(4)), SentAs::NotAtAll);
        size.set(PAGE as u64);
        cache.round(false);
        assert_eq!(cache.page(4, span(4)), SentAs::NotAtAll, "used later than page 0");
        assert_eq!(cache.page(0, span(0)), SentAs::Whole);
        size.set(0);
        cache.round(false);
        assert!(!cache.is_active() && cache.counts.cache_size == 0);
    }

    proptest! {
        /// For any writes and any sharing of slots: the receiver's result is the guest's memory.
        #[test]
        fn s35_the_receiver_always_ends_with_what_the_guest_has(
            rounds in prop::collection::vec(
                prop::collection::vec((0usize..12, 0usize..PAGE, 0usize..600, any::<u8>()), 0..20),
                1..8,
            ),
            sizes in prop::collection::vec(0u64..17, 8),
        ) {
            let memory = Mapping::memfd("deltas", 12 * PAGE as u64).unwrap();
            let span = |page: usize| memory.region().span((page * PAGE) as u64, PAGE as u64).unwrap();
            let mut receiver = vec![vec![0; PAGE]; 12];
            let size = DeltaCacheSize::new(sizes[0] * PAGE as u64);
            let mut cache = DeltaCache::new(size.clone(), PAGE as u64, 12);
            cache.round(false);
            let last = rounds.len() - 1;
            for (round, writes) in rounds.iter().enumerate() {
                let mut dirty = std::collections::BTreeSet::new();
                for (page, at, len, value) in writes {
                    let len = (*len).min(PAGE - at);
                    span(*page).part(*at, len).unwrap().copy_from(&vec![*value; len]);
                    dirty.insert(*page);
                }
                size.set(sizes[round] * PAGE as u64);
                cache.round(round == last);
                for page in dirty {
                    if crate::sys::is_zero(span(page)) {
                        cache.zero(page as u64);
                        receiver[page].fill(0);
                        continue;
                    }
                    match cache.page(page as u64, span(page)) {
                        SentAs::NotAtAll => {}
                        SentAs::Delta(bytes) => decode(bytes, &mut receiver[page]).unwrap(),
                        SentAs::Copy(bytes) => receiver[page].copy_from_slice(bytes),
                        SentAs::Whole => {
                            span(page).copy_to(&mut receiver[page]);
                        }
                    }
                    let mut now = vec![0; PAGE];
                    span(page).copy_to(&mut now);
                    prop_assert!(receiver[page] == now, "round {round}, page {page}");
                }
            }
        }
    }
}
