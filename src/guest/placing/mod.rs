//! The only way by which bytes get into guest RAM at a destination.
//!
//! [`Placer::admit`] proves once that a range lies in the guest. What it returns, a [`Landing`], is carried to the end:
//! the bytes go to its [`target`](Placer::target), then [`commit`](Placer::commit) marks the pages received and reports
//! them to the observer. [`PageWriter`] is the policy of one thread: through the mapping, by `pwrite` to the backing
//! file, or populated first.
//!
//! # Order that must hold
//!
//! The bytes are in place, then the page is marked, then the observer sees it.

mod cache;
mod missing;
#[cfg(test)]
mod tests;
mod writer;

use std::io::IoSlice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

pub use cache::CacheError;
pub(crate) use cache::CheckpointCache;
use missing::Missing;
pub use missing::ServeError;
pub use writer::PageWriter;

use super::{GuestError, GuestMemory, span_of};
use crate::observe::PageCounts;
use crate::ram::{AtomicBitmap, Fingerprints, Landing, PageBitmap, PageRun, RamBlock, ReceivedMap};
use crate::sys::{HostRegion, HostSpan, is_zero};
use crate::units::{BlockIndex, BlockOffset, PageIndex};

/// Sees pages as soon as they are in place, on the thread that placed them. A relay forwards them.
pub trait PageObserver: Send + Sync {
    /// The bytes of `run` are in place.
    fn placed(&self, run: PageRun);
}

/// Pages that were placed, by how they came.
#[derive(Debug, Default)]
struct Counters {
    normal: AtomicU64,
    zero: AtomicU64,
    delta: AtomicU64,
    by_file: AtomicU64,
}

/// Guest memory while it fills, shared by every thread that fills it.
pub struct Placer {
    memory: Arc<dyn GuestMemory>,
    received: ReceivedMap,
    /// Pages that were placed since the last fence, if there are fences.
    since_fence: Option<ReceivedMap>,
    observer: Option<Arc<dyn PageObserver>>,
    /// Announced position to position in the guest's own table.
    blocks: Vec<BlockIndex>,
    /// Memory of the guest's blocks that have a backing file, in the order of its own table.
    regions: Vec<Option<HostRegion>>,
    /// Held by the thread that writes to a backing file: the kernel takes one write to a file at a time.
    file_turn: Mutex<()>,
    /// Pages that were written by `pwrite` and are not mapped yet, of blocks in the guest's own table.
    unmapped: Vec<AtomicBitmap>,
    /// Pages that may have held something before the first one came, of blocks in the guest's own table; `None`: none.
    used: Vec<Option<PageBitmap>>,
    page_bytes: u64,
    counters: Counters,
    /// Where the fingerprints of placed pages go, if they are needed.
    prints: Option<Arc<Fingerprints>>,
    /// Set once the guest may run while pages are missing.
    missing: OnceLock<Missing>,
}

impl Placer {
    /// A placer for `announced`, the source's blocks in stream order, in `memory`.
    ///
    /// # Errors
    /// [`GuestError`]: a block is not in the guest's table.
    pub fn new(
        memory: Arc<dyn GuestMemory>,
        announced: &[RamBlock],
        observer: Option<Arc<dyn PageObserver>>,
    ) -> Result<Self, GuestError> {
        let table = memory.table();
        let find = |block: &RamBlock| table.find(block.name.as_str());
        let blocks = announced.iter().map(find).collect::<Result<_, _>>()?;
        let with_file = |region: &HostRegion| region.write_by_file(0, &[]).is_ok_and(|there_is| there_is);
        // No page comes to an ignored block: there is nothing to write to its file, and nothing to map afterwards.
        let region = |(index, block): (u32, &RamBlock)| {
            memory.region(BlockIndex(index)).filter(|region| !block.flags.ignored && with_file(region))
        };
        let regions: Vec<_> = (0..).zip(table.blocks()).map(region).collect();
        let map = |(region, block): (&Option<_>, _)| region.as_ref().map_or(0, |_| table.pages_of(block));
        let unmapped = regions.iter().zip(table.blocks()).map(map).map(AtomicBitmap::new).collect();
        let table_len = table.blocks().len();
        let (page_bytes, received) = (table.page().bytes(), ReceivedMap::new(table));
        Ok(Self {
            received,
            since_fence: None,
            observer,
            blocks,
            regions,
            file_turn: Mutex::default(),
            unmapped,
            used: vec![None; table_len],
            page_bytes,
            counters: Counters::default(),
            prints: None,
            missing: OnceLock::new(),
            memory,
        })
    }

    /// Before the first page comes: finds the pages that may hold something, in blocks that are not `known_zero`.
    pub fn find_used(&mut self, known_zero: impl Fn(&RamBlock) -> bool) {
        let table = self.memory.table();
        for (index, (block, used)) in table.blocks().iter().zip(&mut self.used).enumerate() {
            if !block.flags.ignored && !known_zero(block) {
                let region = self.memory.region(BlockIndex(index as u32));
                *used = Some(used_pages(region.as_ref(), table.pages_of(block), self.page_bytes));
            }
        }
    }

    /// Before the first page comes: the fingerprint of each is kept in `prints`, by the guest's own table. Pages that a NIC
    /// writes have none.
    pub fn keep_fingerprints(&mut self, prints: Arc<Fingerprints>) {
        self.prints = Some(prints);
    }

    /// Before the first page comes: there are fences, and pages that are placed between two of them are kept apart. Pages
    /// that a NIC writes are not among them.
    pub(crate) fn keep_since_fence(&mut self) {
        self.since_fence = Some(ReceivedMap::new(self.memory.table()));
    }

    /// A fence: pages count anew. Those that other threads place meanwhile may be lost from the count.
    pub(crate) fn fenced(&self) {
        if let Some(since) = &self.since_fence {
            since.forget_all();
        }
    }

    /// Pages of a block, by the guest's own table, that were placed since the last fence; `None` without fences.
    pub(crate) fn since_fence(&self, block: BlockIndex) -> Option<&AtomicBitmap> {
        self.since_fence.as_ref()?.block(block)
    }

    /// Whole pages with `bytes` go to where `skip` bytes into `landing` are.
    pub(crate) fn print(&self, landing: Landing, skip: u64, bytes: &[u8]) {
        let Some(prints) = &self.prints else { return };
        let first = (landing.offset().0 + skip) / self.page_bytes;
        for (page, bytes) in (first..).zip(bytes.chunks(self.page_bytes as usize)) {
            prints.set(landing.block(), PageIndex(page), prints.of(bytes));
        }
    }

    /// As [`print`](Self::print) for bytes that are in place already.
    ///
    /// # Errors
    /// As [`target`](Self::target).
    pub(crate) fn print_placed(&self, landing: Landing, window: &mut Vec<u8>) -> Result<(), GuestError> {
        if self.prints.is_none() {
            return Ok(());
        }
        let (span, page) = (self.target(landing)?, self.page_bytes as usize);
        window.resize(page, 0);
        let mut at = 0;
        while let Some(bytes) = span.part(at, page) {
            bytes.copy_to(window);
            self.print(landing, at as u64, window);
            at += page;
        }
        Ok(())
    }

    /// The memory that fills.
    pub fn memory(&self) -> &Arc<dyn GuestMemory> {
        &self.memory
    }

    /// Bytes of a target page.
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// The observer of each page.
    pub fn observer(&self) -> Option<&Arc<dyn PageObserver>> {
        self.observer.as_ref()
    }

    /// Pages that arrived, by kind.
    pub fn counts(&self) -> PageCounts {
        let Counters { normal, zero, delta, .. } = &self.counters;
        let [normal, zero, delta] = [normal, zero, delta].map(|count| count.load(Ordering::Relaxed));
        PageCounts { normal, zero, delta }
    }

    /// Pages that are here: that have arrived at least once, or may have been written by a NIC.
    pub fn received_pages(&self) -> u64 {
        self.received.count()
    }

    /// Of the whole pages: those that were written by `pwrite` to the backing file.
    pub fn by_file(&self) -> u64 {
        self.counters.by_file.load(Ordering::Relaxed)
    }

    /// True if some block has a backing file.
    pub fn has_files(&self) -> bool {
        self.regions.iter().any(Option::is_some)
    }

    /// Pages that were written by `pwrite` and not mapped since, by the guest's own table.
    pub fn unmapped(&self) -> &[AtomicBitmap] {
        &self.unmapped
    }

    /// Proves that `bytes` bytes from `offset` on lie in a block, given by its position in the source's list.
    ///
    /// # Errors
    /// [`GuestError`] if they do not.
    pub fn admit(
        &self,
        announced: BlockIndex,
        offset: BlockOffset,
        bytes: u64,
    ) -> Result<Landing, GuestError> {
        // The parser has checked the position against the same list; an unknown one is refused here, too.
        let block = self.blocks.get(announced.as_usize()).copied().unwrap_or(BlockIndex(u32::MAX));
        Ok(self.memory.table().admit(block, offset, bytes)?)
    }

    /// As [`admit`](Self::admit) for `pages` pages from `first` on; `None` for no page, or for numbers that no block has.
    ///
    /// # Errors
    /// As [`admit`](Self::admit).
    pub fn admit_pages(
        &self,
        announced: BlockIndex,
        first: PageIndex,
        pages: u64,
    ) -> Result<Option<Landing>, GuestError> {
        let page = self.memory.table().page();
        let run = PageRun { block: announced, first, pages };
        match (run.offset(page), run.bytes(page)) {
            (Some(offset), Some(bytes)) if bytes > 0 => self.admit(announced, offset, bytes).map(Some),
            _ => Ok(None),
        }
    }

    /// The pages of `landing`, by the guest's own table.
    pub fn run(&self, landing: Landing) -> PageRun {
        landing.run(self.memory.table().page())
    }

    /// The memory of `landing`.
    ///
    /// # Errors
    /// [`GuestError::Unmapped`] for a landing of another table.
    pub fn target(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
        span_of(&*self.memory, landing)
    }

    /// True if a page of `landing` has arrived before.
    pub fn is_received(&self, landing: Landing) -> bool {
        let run = self.run(landing);
        let mut pages = (run.first.0..run.end().0).map(PageIndex);
        self.received.block(run.block).is_some_and(|map| pages.any(|page| map.get(page)))
    }

    /// True if a page of `landing` may have contents: it has arrived, or was there before.
    pub fn may_hold(&self, landing: Landing) -> bool {
        let run = self.run(landing);
        let used = self.used.get(run.block.as_usize()).and_then(Option::as_ref);
        let mut pages = (run.first.0..run.end().0).map(PageIndex);
        self.is_received(landing) || used.is_some_and(|map| pages.any(|page| map.get(page)))
    }

    /// Pages of migrated blocks of which no source has reported anything.
    pub fn missing_pages(&self) -> u64 {
        let table = self.memory.table();
        let travels = |index: &BlockIndex| !table.blocks()[index.as_usize()].flags.ignored;
        let never = |index: BlockIndex| {
            let received = self.received.block(index).map_or(0, AtomicBitmap::count);
            table.pages_of(&table.blocks()[index.as_usize()]).saturating_sub(received)
        };
        self.blocks.iter().copied().filter(travels).map(never).sum()
    }

    /// Whole pages are in place.
    pub fn commit(&self, landing: Landing) {
        self.mark(landing);
        self.counters.normal.fetch_add(landing.len() / self.page_bytes, Ordering::Relaxed);
    }

    /// A page that arrived as a difference is in place.
    pub fn commit_delta(&self, landing: Landing) {
        self.mark(landing);
        self.counters.delta.fetch_add(1, Ordering::Relaxed);
    }

    /// The pages of `landing` are zero. Memory that was never written is not touched.
    ///
    /// # Errors
    /// As [`target`](Self::target).
    pub fn zero(&self, landing: Landing) -> Result<(), GuestError> {
        if self.may_hold(landing) {
            let span = self.target(landing)?;
            if !is_zero(span) {
                span.fill_zero();
            }
        }
        if let Some(prints) = &self.prints {
            prints.set_zero(self.run(landing));
        }
        self.mark(landing);
        self.count_zero(landing.len() / self.page_bytes);
        Ok(())
    }

    /// Pages that were zero, and are in place by other means than [`zero`](Self::zero).
    pub fn count_zero(&self, pages: u64) {
        self.counters.zero.fetch_add(pages, Ordering::Relaxed);
    }

    /// Pages that a NIC may have written in a round, by the guest's own table.
    pub fn written(&self, run: PageRun) {
        self.received.mark(run);
    }

    fn mark(&self, landing: Landing) {
        let run = self.run(landing);
        self.received.mark(run);
        if let Some(since) = &self.since_fence {
            since.mark(run);
        }
        if let Some(observer) = &self.observer {
            observer.placed(run);
        }
        if self.serves_missing()
            && let Ok(span) = self.target(landing)
        {
            self.wake(span);
        }
    }

    /// Pages that arrived whole, or as zero, are in place.
    fn commit_kind(&self, landing: Landing, zero: bool) {
        if zero {
            self.mark(landing);
            self.count_zero(landing.len() / self.page_bytes);
        } else {
            self.commit(landing);
        }
    }

    fn region(&self, landing: Landing) -> Option<&HostRegion> {
        self.regions.get(landing.block().as_usize())?.as_ref()
    }

    /// The turn to write to backing files, if no other thread has it.
    fn try_file_turn(&self) -> Option<MutexGuard<'_, ()>> {
        match self.file_turn.try_lock() {
            Ok(turn) => Some(turn),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }

    /// Writes `parts`, one after the other, from `skip` bytes into `landing` on, by `pwrite` to the backing file. `false`
    /// if that can't be done.
    pub(crate) fn write_by_file(
        &self,
        landing: Landing,
        skip: u64,
        parts: &[IoSlice<'_>],
    ) -> Result<bool, GuestError> {
        let Some(region) = self.region(landing) else { return Ok(false) };
        let bytes: u64 = parts.iter().map(|part| part.len() as u64).sum();
        debug_assert!(skip + bytes <= landing.len(), "parts longer than what was admitted");
        let offset = landing.offset().0 + skip;
        let written = region.write_by_file(offset, parts).map_err(|source| {
            let of_table = self.memory.table().get(landing.block());
            GuestError::Kernel {
                block: of_table.map_or_else(String::new, |block| block.name.to_string()),
                what: "writing pages that came",
                remedy: "free memory, or room in the file system that holds the guest's RAM",
                source,
            }
        })?;
        if written {
            self.counters.by_file.fetch_add(bytes / self.page_bytes, Ordering::Relaxed);
            let map = self.unmapped.get(landing.block().as_usize());
            map.map(|map| map.set(PageIndex(offset / self.page_bytes), bytes / self.page_bytes));
        }
        Ok(written)
    }
}

/// Pages of a block of `pages` pages that may have contents; all of them if its memory is not known.
fn used_pages(region: Option<&HostRegion>, pages: u64, page_bytes: u64) -> PageBitmap {
    let mut used = PageBitmap::new(pages);
    match region {
        Some(region) => region.touched(|bytes| {
            used.set_range(bytes.start / page_bytes..bytes.end.div_ceil(page_bytes).min(pages));
        }),
        None => {
            used.set_range(0..pages);
        }
    }
    used
}
