//! Pages of a checkpoint that arrive beside a guest's memory: memory changes only when a checkpoint is applied.
//!
//! The cache has addresses for all of the guest's memory, and uses as much as the pages that wait to be applied. A page
//! that comes twice is kept once: the later one.

use std::sync::Arc;

use super::{GuestError, GuestMemory, span_of};
use crate::ram::{Landing, PageBitmap, PageRun, RamBlock, RamBlockTable, Refusal};
use crate::sys::{HostRegion, HostSpan, Mapping, MappingError, discard_in, is_zero};
use crate::units::{BlockIndex, PageIndex};

/// Why there is no cache, or why it could not be applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// Addresses for it.
    #[error("memory beside the guest's, for checkpoints")]
    Mapping(#[from] MappingError),
    /// The guest's memory, or pages outside it.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

#[derive(Debug)]
struct Cached {
    mapping: Mapping,
    /// Pages with contents.
    whole: PageBitmap,
    zero: PageBitmap,
}

/// How far a checkpoint is applied.
#[derive(Debug, Default)]
struct Cursor {
    block: u32,
    /// Of the block's zero pages, which come after its other ones.
    zeros: bool,
    page: u64,
}

/// Guest memory, and the part of the next checkpoint that has come.
pub(crate) struct CheckpointCache {
    memory: Arc<dyn GuestMemory>,
    blocks: Vec<Cached>,
    at: Cursor,
    /// Device state of the checkpoint that was applied, and of the one that arrives.
    state: Vec<u8>,
    next_state: Option<Vec<u8>>,
    #[cfg(test)]
    places_early: bool,
    #[cfg(test)]
    loads_early: bool,
}

impl CheckpointCache {
    /// An empty cache for this memory.
    ///
    /// # Errors
    /// [`CacheError::Mapping`].
    pub(crate) fn new(memory: Arc<dyn GuestMemory>) -> Result<Self, CacheError> {
        let table = memory.table();
        let cached = |block: &RamBlock| -> Result<Cached, CacheError> {
            let pages = table.pages_of(block);
            let len = pages * table.page().bytes();
            let bits = || PageBitmap::new(pages);
            Ok(Cached { mapping: Mapping::anonymous(len)?, whole: bits(), zero: bits() })
        };
        let blocks = table.blocks().iter().map(cached).collect::<Result<_, _>>()?;
        Ok(Self {
            memory,
            blocks,
            at: Cursor::default(),
            state: Vec::new(),
            next_state: None,
            #[cfg(test)]
            places_early: false,
            #[cfg(test)]
            loads_early: false,
        })
    }

    /// The guest's blocks.
    fn table(&self) -> &RamBlockTable {
        self.memory.table()
    }

    /// Proves that these pages lie in the guest's memory.
    ///
    /// # Errors
    /// [`CacheError::Guest`] if they do not.
    pub(crate) fn admit(&self, run: PageRun) -> Result<Landing, CacheError> {
        Ok(self.table().admit_run(run).map_err(GuestError::from)?)
    }

    /// Where the bytes of these pages are to be put.
    ///
    /// # Errors
    /// [`CacheError::Guest`] for a landing of another table.
    pub(crate) fn target(&self, landing: Landing) -> Result<HostSpan<'_>, CacheError> {
        #[cfg(test)]
        if self.places_early {
            return Ok(span_of(&*self.memory, landing)?);
        }
        self.span(landing)
    }

    fn span(&self, landing: Landing) -> Result<HostSpan<'_>, CacheError> {
        let (index, blocks) = (landing.block(), self.blocks.len() as u32);
        let unknown = || GuestError::from(Refusal::UnknownIndex { index: index.0, blocks });
        let block = self.blocks.get(index.as_usize()).ok_or_else(unknown)?;
        let span = block.mapping.region().span(landing.offset().0, landing.len());
        let name = || self.table().get(index).map_or_else(String::new, |block| block.name.to_string());
        Ok(span.map_err(|source| GuestError::Unmapped { block: name(), source })?)
    }

    /// The bytes of these pages are in their [target](Self::target).
    pub(crate) fn commit(&mut self, landing: Landing) {
        #[cfg(test)]
        if self.places_early {
            return;
        }
        self.mark(landing, true);
    }

    /// These pages are zero.
    pub(crate) fn zero(&mut self, landing: Landing) {
        self.mark(landing, false);
    }

    fn mark(&mut self, landing: Landing, is_whole: bool) {
        let run = landing.run(self.memory.table().page());
        let Some(block) = self.blocks.get_mut(run.block.as_usize()) else { return };
        let (set, clear) = match is_whole {
            true => (&mut block.whole, &mut block.zero),
            false => (&mut block.zero, &mut block.whole),
        };
        set.set_range(run.first.0..run.end().0);
        clear.clear_range(run.first.0..run.end().0);
    }

    /// The device state of the checkpoint that arrives.
    pub(crate) fn set_state(&mut self, state: Vec<u8>) {
        #[cfg(test)]
        if self.loads_early {
            self.state = state;
            return;
        }
        self.next_state = Some(state);
    }

    /// Pages that wait.
    #[cfg(test)]
    pub(crate) fn pages(&self) -> u64 {
        self.blocks.iter().map(|block| block.whole.count() + block.zero.count()).sum()
    }

    /// Forgets what has come since the last checkpoint was applied.
    pub(crate) fn forget(&mut self) {
        self.next_state = None;
        let page = self.memory.table().page();
        for block in &mut self.blocks {
            block.zero.clear_range(0..u64::MAX);
            let mut from = 0;
            while let Some(run) = block.whole.next_run(PageIndex(from), u64::MAX) {
                from = run.end;
                let (at, len) = (run.start * page.bytes(), (run.end - run.start) * page.bytes());
                block.whole.clear_range(run);
                let region = block.mapping.region();
                if let Ok(span) = region.span(at, len) {
                    give_back(region, span);
                }
            }
        }
    }

    /// Applies the next part of a checkpoint that is whole: at most about `pages` pages. True once all of it is applied,
    /// with its device state; until then the memory is neither this checkpoint nor the one before.
    ///
    /// # Errors
    /// [`CacheError`]; the memory holds no checkpoint then.
    pub(crate) fn apply(&mut self, pages: u64) -> Result<bool, CacheError> {
        let mut left = pages.max(1);
        while let Some((run, is_whole)) = self.next_run(left) {
            self.apply_run(run, is_whole)?;
            left -= run.pages.min(left);
            if left == 0 {
                return Ok(false);
            }
        }
        self.at = Cursor::default();
        if let Some(state) = self.next_state.take() {
            self.state = state;
        }
        Ok(true)
    }

    fn next_run(&mut self, most: u64) -> Option<(PageRun, bool)> {
        while let Some(cached) = self.blocks.get(self.at.block as usize) {
            let Cursor { block, zeros, page } = self.at;
            let bits = if zeros { &cached.zero } else { &cached.whole };
            if let Some(run) = bits.next_run(PageIndex(page), most) {
                self.at.page = run.end;
                let (first, pages) = (PageIndex(run.start), run.end - run.start);
                return Some((PageRun { block: BlockIndex(block), first, pages }, !zeros));
            }
            self.at = Cursor { block: block + u32::from(zeros), zeros: !zeros, page: 0 };
        }
        None
    }

    fn apply_run(&mut self, run: PageRun, is_whole: bool) -> Result<(), CacheError> {
        let landing = self.admit(run)?;
        let to = span_of(&*self.memory, landing)?;
        match is_whole {
            true => {
                let from = self.span(landing)?;
                to.copy_span(from);
                if let Some(block) = self.blocks.get(run.block.as_usize()) {
                    give_back(block.mapping.region(), from);
                }
            }
            false if is_zero(to) => {}
            false => to.fill_zero(),
        }
        let Some(block) = self.blocks.get_mut(run.block.as_usize()) else { return Ok(()) };
        let bits = if is_whole { &mut block.whole } else { &mut block.zero };
        bits.clear_range(run.first.0..run.end().0);
        Ok(())
    }

    /// The device state of the last checkpoint that was applied.
    pub(crate) fn state(&self) -> &[u8] {
        &self.state
    }

    #[cfg(test)]
    pub(crate) fn break_order(&mut self, places_early: bool, loads_early: bool) {
        (self.places_early, self.loads_early) = (places_early, loads_early);
    }
}

/// Not memory twice for longer than needed. Pages whose memory can't be given back (locked memory) are overwritten by
/// those of a later checkpoint.
fn give_back(region: &HostRegion, span: HostSpan<'_>) {
    if let Err(error) = discard_in(region, span) {
        tracing::debug!(%error, "memory beside the guest's is not given back");
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::guest::MappedGuest;
    use crate::ram::{BlockName, RamBlock};
    use crate::units::PageSize;

    const PAGES: u64 = 40;

    fn guest() -> Arc<MappedGuest> {
        let mapping = Mapping::anonymous(PAGES * 4096).unwrap();
        let block = RamBlock::new(BlockName::new("ram").unwrap(), PAGES * 4096);
        Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &mapping).build().unwrap())
    }

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { block: BlockIndex(0), first: PageIndex(first), pages }
    }

    fn comes(cache: &mut CheckpointCache, first: u64, bytes: &[u8]) {
        let landing = cache.admit(run(first, bytes.len() as u64)).unwrap();
        let target = cache.target(landing).unwrap();
        for (page, byte) in bytes.iter().enumerate() {
            target.part(page * 4096, 4096).unwrap().copy_from(&[*byte; 4096]);
        }
        cache.commit(landing);
    }

    fn pages(guest: &MappedGuest) -> Vec<u8> {
        let region = guest.region(BlockIndex(0)).unwrap();
        let mut all = vec![0; (PAGES * 4096) as usize];
        region.span(0, PAGES * 4096).unwrap().copy_to(&mut all);
        all.chunks(4096).map(|page| page.iter().copied().max().unwrap()).collect()
    }

    #[test]
    fn memory_changes_when_a_checkpoint_is_applied_and_not_before() {
        let guest = guest();
        let mut cache = CheckpointCache::new(guest.clone()).unwrap();
        comes(&mut cache, 3, &[1, 2, 3, 4]);
        comes(&mut cache, 5, &[9]);
        cache.zero(cache.admit(run(4, 1)).unwrap());
        cache.set_state(b"one".into());
        assert!(pages(&guest).iter().all(|byte| *byte == 0) && cache.state().is_empty());
        assert_eq!(cache.pages(), 4);
        while !cache.apply(1).unwrap() {
            assert!(cache.state().is_empty(), "the state comes last");
        }
        let mut due = vec![0; PAGES as usize];
        due[3..7].copy_from_slice(&[1, 0, 9, 4]);
        assert_eq!((pages(&guest), cache.state(), cache.pages()), (due.clone(), &b"one"[..], 0));
        // A part of the next one is given up.
        comes(&mut cache, 0, &[7; 10]);
        cache.zero(cache.admit(run(20, 5)).unwrap());
        cache.set_state(b"two".into());
        cache.forget();
        assert!(cache.apply(u64::MAX).unwrap());
        assert_eq!((pages(&guest), cache.state()), (due, &b"one"[..]));
    }

    /// Memory of the cache that can't be given back costs memory, and no checkpoint.
    #[test]
    fn locked_memory_costs_no_checkpoint() {
        let guest = guest();
        let mut cache = CheckpointCache::new(guest.clone()).unwrap();
        comes(&mut cache, 3, &[1, 2]);
        let kept = cache.span(cache.admit(run(3, 2)).unwrap()).unwrap();
        crate::sys::lock(kept).unwrap();
        assert!(discard_in(cache.blocks[0].mapping.region(), kept).is_err());
        assert!(cache.apply(u64::MAX).unwrap());
        assert_eq!((&pages(&guest)[3..6], cache.pages()), (&[1, 2, 0][..], 0));
        comes(&mut cache, 3, &[5]);
        cache.forget();
        comes(&mut cache, 4, &[7]);
        assert!(cache.apply(u64::MAX).unwrap());
        assert_eq!(&pages(&guest)[3..6], &[1, 7, 0]);
    }

    #[test]
    fn pages_outside_the_guest_are_refused() {
        let cache = CheckpointCache::new(guest()).unwrap();
        for (first, pages) in [(PAGES, 1), (0, PAGES + 1), (u64::MAX, 2), (1 << 60, 1 << 60)] {
            assert!(matches!(cache.admit(run(first, pages)), Err(CacheError::Guest(_))));
        }
        let other = PageRun { block: BlockIndex(1), ..run(0, 1) };
        assert!(cache.admit(other).is_err());
    }
}
