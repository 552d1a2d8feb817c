//! Pages that are missing while the guest runs: each is placed whole and once; then the threads that wait for it
//! continue.
//!
//! # Required orders
//!
//! Pages that will be sent again are discarded before the memory is registered. A page is placed first, then marked
//! received, then waiting threads are woken. A page that is marked received is either mapped, or it was received as
//! zero and never touched: a fault on it is resolved here without a request to the source.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::Placer;
use crate::guest::GuestError;
use crate::ram::{Landing, PageRun, page_bits};
use crate::sys::{
    FaultAt, HostSpan, Lock as _, MissingFaults, MissingFaultsError, PageContents, is_there, set_huge_pages,
};
use crate::units::{BlockIndex, BlockOffset, PageIndex, PageSize};

/// The memory whose missing pages are served.
pub(super) struct Missing {
    faults: Arc<MissingFaults>,
    /// Called for whole host pages once they are placed, marked, and woken.
    placed: Box<dyn Fn(Landing) + Send + Sync>,
    /// Address ranges of the blocks, ascending, with their index in the guest's own table.
    ranges: Vec<(std::ops::Range<usize>, BlockIndex, PageSize)>,
    /// Held while pages are placed that several threads may have read: a page is placed once. A page that the guest has
    /// freed since is missing again.
    turn: Mutex<()>,
}

impl Placer {
    /// Blocks whose pages may be missing while the guest runs, with their memory.
    fn servable(&self) -> Result<Vec<(Landing, PageSize)>, GuestError> {
        let table = self.memory.table();
        let whole = (0..).map(BlockIndex).zip(table.blocks()).filter(|(_, block)| !block.flags.ignored);
        whole
            .map(|(index, block)| {
                Ok((table.admit(index, BlockOffset(0), block.used_length)?, block.host_page))
            })
            .collect()
    }

    /// To be called before the first page of a migration that may switch to postcopy: all memory reads as zero and is
    /// missing, and the kernel maps no huge page over several of its pages.
    ///
    /// # Errors
    /// [`GuestError`]: memory can't be discarded.
    pub fn empty(&mut self) -> Result<(), GuestError> {
        for (landing, page) in self.servable()? {
            // Memory of kinds that never have huge pages returns EINVAL.
            let _ = set_huge_pages(self.target(landing)?, false);
            self.memory.discard(landing)?;
            self.check_missing(landing, page)?;
        }
        self.used.iter_mut().for_each(|used| *used = None);
        Ok(())
    }

    /// Discarded memory is missing. Huge pages that the kernel can't free were zeroed instead: they would be present,
    /// and never requested.
    fn check_missing(&self, landing: Landing, page: PageSize) -> Result<(), GuestError> {
        let is_there = page > self.memory.table().page() && is_there(self.target(landing)?).unwrap_or(true);
        if !is_there {
            return Ok(());
        }
        let block = self.memory.table().get(landing.block());
        Err(GuestError::Kernel {
            block: block.map_or_else(String::new, |block| block.name.to_string()),
            what: "discarding its huge pages for postcopy",
            remedy: "map them shared, or private without a file on Linux 5.18 or later",
            source: std::io::ErrorKind::Unsupported.into(),
        })
    }

    /// Pages that will be sent again: they are missing until then.
    ///
    /// # Errors
    /// [`GuestError`]: memory can't be discarded.
    pub fn forget(&self, landing: Landing) -> Result<(), GuestError> {
        let run = self.run(landing);
        self.received.forget(run);
        self.memory.discard(landing)
    }

    /// From here on a first access to a missing page waits for it, and pages are placed as
    /// [`PageWriter`](super::PageWriter) describes; `placed` is called for whole host pages, several at once if they are
    /// neighbours. To be called once.
    ///
    /// # Errors
    /// [`MissingFaultsError`]; [`GuestError`] for memory that is not of this process.
    pub fn serve_missing(
        &self,
        faults: Arc<MissingFaults>,
        placed: Box<dyn Fn(Landing) + Send + Sync>,
    ) -> Result<(), ServeError> {
        let mut ranges = Vec::new();
        for (landing, page) in self.servable()? {
            let span = self.target(landing)?;
            faults.register(span)?;
            ranges.push((span.address()..span.address() + span.len(), landing.block(), page));
        }
        ranges.sort_by_key(|(range, ..)| range.start);
        let _ = self.missing.set(Missing { faults, placed, ranges, turn: Mutex::default() });
        Ok(())
    }

    /// All pages have been received: accesses no longer wait.
    pub fn stop_serving(&self) {
        let Some(missing) = self.missing.get() else { return };
        for (landing, _) in self.servable().unwrap_or_default() {
            if let Ok(span) = self.target(landing) {
                if let Err(error) = missing.faults.unregister(span) {
                    tracing::debug!(%error, "memory stays under userfaultfd until its descriptor is closed");
                }
                let _ = set_huge_pages(span, true);
            }
        }
    }

    /// The host page that holds an address.
    pub fn host_page_at(&self, fault: FaultAt) -> Option<Landing> {
        let ranges = &self.missing.get()?.ranges;
        let at = ranges.partition_point(|(range, ..)| range.end <= fault.0);
        let (range, block, page) = ranges.get(at).filter(|(range, ..)| range.contains(&fault.0))?;
        let offset = (fault.0 - range.start) as u64 / page.bytes() * page.bytes();
        self.memory.table().admit(*block, BlockOffset(offset), page.bytes()).ok()
    }

    /// A thread waits for a page that is marked received: it was received as zero, or is present by now.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn answer_received(&self, landing: Landing) -> Result<(), GuestError> {
        let Some(missing) = self.missing.get() else { return Ok(()) };
        let span = self.target(landing)?;
        let page = self.host_page(landing);
        let placed = missing.faults.place_zero(span, page).and_then(|_| missing.faults.wake(span));
        placed.map_err(|source| self.unplaced(landing, source))
    }

    /// True if every page of `landing` has been received.
    pub fn has_all(&self, landing: Landing) -> bool {
        let run = self.run(landing);
        let mut pages = (run.first.0..run.end().0).map(PageIndex);
        self.received.block(run.block).is_some_and(|map| pages.all(|page| map.get(page)))
    }

    /// The first page of a run that has not been received.
    pub fn first_missing(&self, run: PageRun) -> Option<PageRun> {
        let map = self.received.block(run.block)?;
        let page = (run.first.0..run.end().0).map(PageIndex).find(|page| !map.get(*page))?;
        Some(PageRun { block: run.block, first: page, pages: 1 })
    }

    /// The received bitmap of a block in the source's format: bit i of byte i / 8 is page i.
    pub fn received_bits(&self, block: BlockIndex) -> Vec<u8> {
        let Some(map) = self.received.block(block) else { return Vec::new() };
        page_bits(map.len(), |page| map.get(page))
    }

    /// True while missing pages are served.
    pub fn serves_missing(&self) -> bool {
        self.missing.get().is_some()
    }

    pub(super) fn host_page(&self, landing: Landing) -> PageSize {
        self.memory.table().get(landing.block()).map_or(self.memory.table().page(), |block| block.host_page)
    }

    /// Places a whole host page, or several. Pages that are already present are left unchanged.
    fn place_missing(
        &self,
        missing: &Missing,
        landing: Landing,
        contents: Option<PageContents<'_>>,
    ) -> Result<(), GuestError> {
        let span = self.target(landing)?;
        let placed = match contents {
            Some(contents) => missing.faults.place_contents(span, contents, self.host_page(landing)),
            None => missing.faults.place_zero(span, self.host_page(landing)),
        };
        placed.map(drop).map_err(|source| self.unplaced(landing, source))
    }

    /// Places whole host pages that one of several readers has read at once, without those already received. The placed
    /// pages are marked, and the threads that wait for them continue.
    ///
    /// # Errors
    /// The kernel's error; the pages before the failed one are placed.
    pub fn place_read(&self, landing: Landing, bytes: &[u8]) -> Result<(), GuestError> {
        self.place_contents(landing, PageContents::Bytes(bytes))
    }

    /// As [`place_read`](Self::place_read), also from memory that a device has filled.
    ///
    /// # Errors
    /// As [`place_read`](Self::place_read).
    pub(crate) fn place_contents(
        &self,
        landing: Landing,
        contents: PageContents<'_>,
    ) -> Result<(), GuestError> {
        let Some(missing) = self.missing.get() else { return Ok(()) };
        debug_assert_eq!(landing.len(), contents.len() as u64);
        let host = self.host_page(landing).bytes();
        let is_received = |at| landing.part(at, host).is_none_or(|page| self.is_received(page));
        let _turn = missing.turn.locked();
        let mut at = 0;
        while at < landing.len() {
            let start = at;
            at += host;
            if is_received(start) {
                continue;
            }
            while at < landing.len() && !is_received(at) {
                at += host;
            }
            let part = landing.part(start, at - start);
            if let Some((part, contents)) = part.zip(contents.part(start as usize, (at - start) as usize)) {
                self.place_missing(missing, part, Some(contents))?;
                self.commit(part);
                (missing.placed)(part);
            }
        }
        Ok(())
    }

    pub(super) fn wake(&self, span: HostSpan<'_>) {
        if let Some(missing) = self.missing.get()
            && let Err(error) = missing.faults.wake(span)
        {
            tracing::warn!(%error, "threads that wait for a page could not be woken");
        }
    }

    fn unplaced(&self, landing: Landing, source: std::io::Error) -> GuestError {
        let block = self.memory.table().get(landing.block());
        GuestError::Kernel {
            block: block.map_or_else(String::new, |block| block.name.to_string()),
            what: "placing a page that the guest may wait for",
            remedy: "free memory, or huge pages of the pool that the guest's RAM is from",
            source,
        }
    }
}

/// Why missing pages can't be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The kernel or the privileges of this process do not allow it.
    #[error(transparent)]
    Faults(#[from] MissingFaultsError),
    /// The guest's memory.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// Incomplete host pages of one channel: each is placed when all its target pages have been received.
#[derive(Debug, Default)]
pub(super) struct HostPages {
    parts: HashMap<(BlockIndex, u64), Part>,
    /// Pages that are placed by one call of the kernel.
    gathered: Vec<u8>,
}

/// Bytes that one call of the kernel places at most: a thread that waits for the first of them waits for all.
const GATHERED: usize = 64 << 10;

/// Maximum number of incomplete host pages of one channel: a QEMU has one, and one more after an interruption.
const MAX_PARTS: usize = 4;

#[derive(Debug)]
struct Part {
    bytes: Vec<u8>,
    /// One entry a target page.
    here: Vec<bool>,
    is_zero: bool,
}

impl HostPages {
    /// Takes target pages, one after the other from the first of `landing` on, as [`take`](Self::take). Neighbours are
    /// placed together: a call for each costs more than to copy them.
    pub(super) fn take_run<'a>(
        &mut self,
        placer: &Placer,
        landing: Landing,
        pages: impl Iterator<Item = &'a [u8]>,
    ) -> Result<(), GuestError> {
        let Some(missing) = placer.missing.get() else { return Ok(()) };
        let target = placer.page_bytes();
        let together = placer.host_page(landing).bytes() <= target;
        let mut end = 0;
        for bytes in pages {
            let Some(one) = landing.part(end, target) else { break };
            if !together {
                self.take(placer, one, Some(bytes))?;
                end += target;
                continue;
            }
            // The guest may have written a received page since.
            let is_new = !placer.has_all(one);
            if !is_new || self.gathered.len() >= GATHERED {
                self.place_gathered(placer, missing, landing, end)?;
            }
            if is_new {
                self.gathered.extend_from_slice(bytes);
            }
            end += target;
        }
        self.place_gathered(placer, missing, landing, end)
    }

    /// Places the gathered pages, which end at `end` in `landing`, or before it if there is nothing gathered.
    fn place_gathered(
        &mut self,
        placer: &Placer,
        missing: &Missing,
        landing: Landing,
        end: u64,
    ) -> Result<(), GuestError> {
        let len = self.gathered.len() as u64;
        let Some(part) = landing.part(end.saturating_sub(len), len).filter(|_| len > 0) else {
            return Ok(());
        };
        let placed = placer.place_missing(missing, part, Some(PageContents::Bytes(&self.gathered)));
        self.gathered.clear();
        placed?;
        placer.commit(part);
        (missing.placed)(part);
        Ok(())
    }

    /// Takes one target page, `None` for zero. The whole host page is placed and committed with its last target page.
    pub(super) fn take(
        &mut self,
        placer: &Placer,
        landing: Landing,
        bytes: Option<&[u8]>,
    ) -> Result<(), GuestError> {
        let Some(missing) = placer.missing.get() else { return Ok(()) };
        // The guest may have written the received page since.
        if placer.has_all(landing) {
            return Ok(());
        }
        let (host, target) = (placer.host_page(landing).bytes(), placer.page_bytes());
        if host <= target {
            placer.place_missing(missing, landing, bytes.map(PageContents::Bytes))?;
            placer.commit_kind(landing, bytes.is_none());
            (missing.placed)(landing);
            return Ok(());
        }
        let start = landing.offset().0 / host * host;
        let key = (landing.block(), start);
        if !self.parts.contains_key(&key) && self.parts.len() >= MAX_PARTS {
            let block =
                placer.memory.table().get(landing.block()).map_or_else(String::new, |b| b.name.to_string());
            return Err(GuestError::Unfinished { block, offset: start });
        }
        let part = self.parts.entry(key).or_insert_with(|| Part {
            bytes: vec![0; host as usize],
            here: vec![false; (host / target) as usize],
            is_zero: true,
        });
        let at = (landing.offset().0 - start) as usize;
        match (bytes, part.bytes.get_mut(at..at + target as usize)) {
            (Some(bytes), Some(room)) => {
                room.copy_from_slice(bytes);
                part.is_zero = false;
            }
            (None, Some(room)) => room.fill(0),
            _ => {}
        }
        if let Some(here) = part.here.get_mut(at / target as usize) {
            *here = true;
        }
        if part.here.iter().all(|here| *here)
            && let Some(part) = self.parts.remove(&key)
        {
            let whole = placer.memory.table().admit(landing.block(), BlockOffset(start), host)?;
            placer.place_missing(
                missing,
                whole,
                Some(&part.bytes).filter(|_| !part.is_zero).map(|bytes| PageContents::Bytes(bytes)),
            )?;
            placer.commit_kind(whole, part.is_zero);
            (missing.placed)(whole);
        }
        Ok(())
    }

    /// The channel is gone: its incomplete host pages will be sent again.
    pub(super) fn drop_parts(&mut self) {
        self.parts.clear();
        self.gathered.clear();
    }
}
