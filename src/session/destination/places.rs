//! The guest's memory while it fills, for every thread that fills it.

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::guest::{GuestError, GuestMemory};
use crate::observe::PageCounts;
use crate::ram::{AtomicBitmap, Landing, PageBitmap, PageRun, RamBlock, ReceivedMap};
use crate::sys::{HostRegion, HostSpan, is_zero};
use crate::transport::PagePlaces;
use crate::units::{BlockIndex, BlockOffset, PageIndex};

/// Sees pages the moment they are in place, on the thread that placed them; a relay's.
pub trait Placed: Send + Sync {
    /// The bytes of `run` are in place.
    fn placed(&self, run: PageRun);
}

/// Bytes are copied, then the page is marked, then others see it.
pub(super) struct Places {
    memory: Arc<dyn GuestMemory>,
    received: ReceivedMap,
    watcher: Option<Arc<dyn Placed>>,
    /// Announced position to position in the guest's own table.
    blocks: Vec<BlockIndex>,
    /// Memory of the guest's blocks, in the order of its own table.
    regions: Vec<Option<HostRegion>>,
    /// Pages that were written by the file behind them, until somebody maps them; of blocks in the guest's own table.
    unmapped: Vec<AtomicBitmap>,
    /// Pages that may have held something before any came, of blocks in the guest's own table; `None` for none.
    used: Vec<Option<PageBitmap>>,
    page_bytes: u64,
    normal: AtomicU64,
    zero: AtomicU64,
    delta: AtomicU64,
    by_file: AtomicU64,
}

impl Places {
    pub(super) fn new(
        memory: Arc<dyn GuestMemory>,
        announced: &[RamBlock],
        watcher: Option<Arc<dyn Placed>>,
    ) -> Result<Self, GuestError> {
        let table = memory.table();
        let find = |block: &RamBlock| table.find(block.name.as_str());
        let blocks = announced.iter().map(find).collect::<Result<_, _>>()?;
        let with_file = |region: &HostRegion| region.write_by_file(0, &[]).is_ok_and(|there_is| there_is);
        let region = |index| memory.region(BlockIndex(index)).filter(with_file);
        let regions: Vec<_> = (0..table.blocks().len() as u32).map(region).collect();
        let map = |(region, block): (&Option<_>, _)| region.as_ref().map_or(0, |_| table.pages_of(block));
        let unmapped = regions.iter().zip(table.blocks()).map(map).map(AtomicBitmap::new).collect();
        let table_len = table.blocks().len();
        let (page_bytes, received) = (table.page().bytes(), ReceivedMap::new(table));
        let [normal, zero, delta, by_file] = [0; 4].map(AtomicU64::new);
        Ok(Self {
            received,
            watcher,
            blocks,
            regions,
            unmapped,
            used: vec![None; table_len],
            page_bytes,
            normal,
            zero,
            delta,
            by_file,
            memory,
        })
    }

    /// Before any page comes: looks which pages may hold something, of the blocks that are not `known_zero`.
    pub(super) fn find_used(&mut self, known_zero: impl Fn(&RamBlock) -> bool) {
        let table = self.memory.table();
        for (index, (block, used)) in table.blocks().iter().zip(&mut self.used).enumerate() {
            if !block.flags.ignored && !known_zero(block) {
                let region = self.memory.region(BlockIndex(index as u32));
                *used = Some(used_pages(region.as_ref(), table.pages_of(block), self.page_bytes));
            }
        }
    }

    pub(super) fn memory(&self) -> &Arc<dyn GuestMemory> {
        &self.memory
    }

    pub(super) fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Who is told of each page.
    pub(super) fn watcher(&self) -> Option<&Arc<dyn Placed>> {
        self.watcher.as_ref()
    }

    /// Pages that came, by kind.
    pub(super) fn counts(&self) -> PageCounts {
        let [normal, zero, delta] =
            [&self.normal, &self.zero, &self.delta].map(|count| count.load(Ordering::Relaxed));
        PageCounts { normal, zero, delta }
    }

    /// Of the whole pages: those that were written by the file behind the memory.
    pub(super) fn by_file(&self) -> u64 {
        self.by_file.load(Ordering::Relaxed)
    }

    /// True if some block has a file behind it.
    pub(super) fn has_files(&self) -> bool {
        self.regions.iter().any(Option::is_some)
    }

    /// Pages that were written by the file behind them and not mapped since, by the guest's own table.
    pub(super) fn unmapped(&self) -> &[AtomicBitmap] {
        &self.unmapped
    }

    /// The memory of `bytes` bytes from `offset` on of a block of the guest's own table.
    pub(super) fn own_room(
        &self,
        block: BlockIndex,
        offset: BlockOffset,
        bytes: u64,
    ) -> Result<HostSpan<'_>, GuestError> {
        self.memory.span(self.memory.table().admit(block, offset, bytes)?)
    }

    pub(super) fn count_delta(&self) {
        self.delta.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_zero(&self, pages: u64) {
        self.zero.fetch_add(pages, Ordering::Relaxed);
    }

    pub(super) fn landing(
        &self,
        announced: BlockIndex,
        offset: BlockOffset,
        bytes: u64,
    ) -> Result<Landing, GuestError> {
        // The parser has checked the position against the same list; an unknown one is refused all the same.
        let block = self.blocks.get(announced.as_usize()).copied().unwrap_or(BlockIndex(u32::MAX));
        Ok(self.memory.table().admit(block, offset, bytes)?)
    }

    /// `pages` pages of an announced block; `None` for none, or for numbers that no block has.
    pub(super) fn landing_of(
        &self,
        announced: BlockIndex,
        first: PageIndex,
        pages: u64,
    ) -> Result<Option<Landing>, GuestError> {
        let page = self.memory.table().page();
        let run = PageRun { block: announced, first, pages };
        match (run.offset(page), run.bytes(page)) {
            (Some(offset), Some(bytes)) if bytes > 0 => self.landing(announced, offset, bytes).map(Some),
            _ => Ok(None),
        }
    }

    /// True if something may be in a page of `run`: it has come, or was there before.
    pub(super) fn may_hold(&self, run: PageRun) -> bool {
        let came = self.received.block(run.block);
        let used = self.used.get(run.block.as_usize()).and_then(Option::as_ref);
        let pages = || (run.first.0..run.end().0).map(PageIndex);
        came.is_some_and(|map| pages().any(|page| map.get(page)))
            || used.is_some_and(|map| pages().any(|page| map.get(page)))
    }

    /// What is at `landing` is there to be seen.
    pub(super) fn seen(&self, landing: Landing) {
        let run = landing.run(self.memory.table().page());
        self.received.mark(run);
        if let Some(watcher) = &self.watcher {
            watcher.placed(run);
        }
    }

    /// Pages that somebody else may have written: the NIC, in a round.
    pub(super) fn written(&self, run: PageRun) {
        self.received.mark(run);
    }
}

impl PagePlaces for Places {
    fn room(&self, block: BlockIndex, offset: BlockOffset, bytes: u64) -> Result<HostSpan<'_>, GuestError> {
        self.memory.span(self.landing(block, offset, bytes)?)
    }

    fn write_by_file(
        &self,
        block: BlockIndex,
        offset: BlockOffset,
        parts: &[IoSlice<'_>],
    ) -> Result<bool, GuestError> {
        let bytes = parts.iter().map(|part| part.len() as u64).sum();
        let landing = self.landing(block, offset, bytes)?;
        let Some(Some(region)) = self.regions.get(landing.block().as_usize()) else { return Ok(false) };
        let written = region.write_by_file(landing.offset().0, parts).map_err(|source| {
            let of_table = self.memory.table().get(landing.block());
            GuestError::Kernel {
                block: of_table.map_or_else(String::new, |block| block.name.to_string()),
                what: "writing pages that came",
                remedy: "free memory, or room in the file system that holds the guest's RAM",
                source,
            }
        })?;
        if written {
            self.by_file.fetch_add(bytes / self.page_bytes, Ordering::Relaxed);
            let run = landing.run(self.memory.table().page());
            self.unmapped.get(run.block.as_usize()).map(|map| map.set(run.first, run.pages));
        }
        Ok(written)
    }

    fn has_come(&self, block: BlockIndex, offset: BlockOffset) -> bool {
        let page = self.memory.table().page().page_of(offset);
        let index = self.blocks.get(block.as_usize());
        index.and_then(|index| self.received.block(*index)).is_some_and(|map| map.get(page))
    }

    fn placed(&self, block: BlockIndex, offset: BlockOffset, bytes: u64) -> Result<(), GuestError> {
        self.seen(self.landing(block, offset, bytes)?);
        self.normal.fetch_add(bytes / self.page_bytes, Ordering::Relaxed);
        Ok(())
    }

    /// A page that was never written need not be touched.
    fn zero(&self, block: BlockIndex, offset: BlockOffset) -> Result<(), GuestError> {
        let landing = self.landing(block, offset, self.page_bytes)?;
        if self.may_hold(landing.run(self.memory.table().page())) {
            let span = self.memory.span(landing)?;
            if !is_zero(span) {
                span.fill_zero();
            }
        }
        self.seen(landing);
        self.zero.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Pages of a block of `pages` pages that may hold something; all of them where its memory is not known.
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
