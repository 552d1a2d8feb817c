//! Copies of guest pages on their way, as the guest memory that a link reads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::engine::Place;
use crate::guest::{GuestError, GuestMemory, LayoutChange};
use crate::page::{ZeroDetection, classify};
use crate::ram::{Landing, PageBatch, PageRun, RamBlockTable, Verdict};
use crate::sys::{HostSpan, Lock as _, Mapping, MappingError, OutOfRegion};
use crate::units::PageIndex;

/// Target pages of a tray, where host pages are no larger: 512 KiB on x86.
const TRAY_PAGES: u64 = 128;
/// Fewest trays.
const MIN_TRAYS: u64 = 4;

/// Room for copies: slots of one target page, trays of many. Bytes that were not copied can't be read through it.
pub(super) struct Copies {
    guest: Arc<dyn GuestMemory>,
    room: Mapping,
    slots: u64,
    trays: u64,
    tray_pages: u64,
    taken: Mutex<Taken>,
}

struct Taken {
    free_slots: Vec<u64>,
    free_trays: Vec<u64>,
    /// By block and first page.
    copies: BTreeMap<(u32, u64), Copy>,
}

#[derive(Clone, Copy)]
struct Copy {
    pages: u64,
    place: Place,
    number: u64,
}

impl Copies {
    /// Room for about `bytes`, half of it for single pages.
    pub(super) fn new(guest: Arc<dyn GuestMemory>, bytes: u64) -> Result<Self, MappingError> {
        let table = guest.table();
        let page = table.page().bytes();
        let tray_pages = largest_host_page(table).max(TRAY_PAGES);
        let trays = (bytes / 2 / (tray_pages * page)).max(MIN_TRAYS);
        let slots = (bytes / 2 / page).max(1);
        let room = Mapping::anonymous((slots + trays * tray_pages) * page)?;
        let taken = Taken {
            free_slots: (0..slots).collect(),
            free_trays: (0..trays).collect(),
            copies: BTreeMap::new(),
        };
        Ok(Self { guest, room, slots, trays, tray_pages, taken: Mutex::new(taken) })
    }

    pub(super) fn slots(&self) -> u64 {
        self.slots
    }

    pub(super) fn trays(&self) -> u64 {
        self.trays
    }

    pub(super) fn tray_pages(&self) -> u64 {
        self.tray_pages
    }

    /// Target pages of the guest's largest host page.
    pub(super) fn largest_host_page(&self) -> u64 {
        largest_host_page(self.guest.table())
    }

    /// Copies the pages of `run`. The batch marks which of them are zero; if all are, the place is free again, and
    /// `false` is returned.
    ///
    /// # Errors
    /// [`GuestError`] if the run is not in the guest.
    pub(super) fn copy(&self, run: PageRun, place: Place) -> Result<(PageBatch, bool), GuestError> {
        let landing = self.guest.table().admit_run(run)?;
        let from = crate::guest::span_of(&*self.guest, landing)?;
        let number = {
            let mut taken = self.taken.locked();
            let number = taken.free(place).pop();
            // The engine counts the places.
            let number = number.ok_or_else(|| self.unmapped(landing))?;
            taken.copies.insert((run.block.0, run.first.0), Copy { pages: run.pages, place, number });
            number
        };
        let to = self.span_at(place, number, 0, landing.len());
        to.map_err(|_| self.unmapped(landing))?.copy_span(from);
        let mut batch = PageBatch::default();
        classify(self, run, ZeroDetection::Legacy, &mut batch)?;
        let any_whole = batch.whole_pages() > 0;
        if !any_whole {
            self.free(run.block.0, run.first);
        }
        Ok((batch, any_whole))
    }

    /// The batch has left: its place is free again. `None` for a batch of zero pages, which had none.
    pub(super) fn release(&self, batch: &PageBatch) -> Option<Place> {
        let first = batch.pieces().iter().find(|piece| piece.verdict != Verdict::Zero)?.run;
        self.free(first.block.0, first.first)
    }

    fn free(&self, block: u32, page: PageIndex) -> Option<Place> {
        let mut taken = self.taken.locked();
        let (key, copy) = taken.find(block, page.0)?;
        taken.copies.remove(&key);
        taken.free(copy.place).push(copy.number);
        Some(copy.place)
    }

    fn span_at(&self, place: Place, number: u64, skip: u64, len: u64) -> Result<HostSpan<'_>, OutOfRegion> {
        let page = self.guest.table().page().bytes();
        let start = match place {
            Place::Slot => number * page,
            Place::Tray => (self.slots + number * self.tray_pages) * page,
        };
        self.room.region().span(start + skip, len)
    }

    fn unmapped(&self, landing: Landing) -> GuestError {
        let block = self.guest.table().get(landing.block()).map_or_else(String::new, |b| b.name.to_string());
        let source = OutOfRegion { offset: landing.offset().0, len: landing.len(), region_len: 0 };
        GuestError::Unmapped { block, source }
    }
}

fn largest_host_page(table: &RamBlockTable) -> u64 {
    let pages = |block: &crate::ram::RamBlock| block.host_page.bytes() / table.page().bytes();
    table.blocks().iter().map(pages).max().unwrap_or(1).max(1)
}

impl Taken {
    fn free(&mut self, place: Place) -> &mut Vec<u64> {
        match place {
            Place::Slot => &mut self.free_slots,
            Place::Tray => &mut self.free_trays,
        }
    }

    /// The copy that holds a page.
    fn find(&self, block: u32, page: u64) -> Option<((u32, u64), Copy)> {
        let (key, copy) = self.copies.range(..=(block, page)).next_back()?;
        (key.0 == block && page < key.1 + copy.pages).then_some((*key, *copy))
    }
}

impl GuestMemory for Copies {
    fn table(&self) -> &RamBlockTable {
        self.guest.table()
    }

    /// The memory that holds the copy of these pages, which must be in one.
    fn span(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
        let page = self.table().page();
        let run = landing.run(page);
        let found = self.taken.locked().find(run.block.0, run.first.0);
        let ((_, first), copy) = found.ok_or_else(|| self.unmapped(landing))?;
        if run.end().0 > first + copy.pages {
            return Err(self.unmapped(landing));
        }
        let skip = landing.offset().0 - first * page.bytes();
        let span = self.span_at(copy.place, copy.number, skip, landing.len());
        span.map_err(|_| self.unmapped(landing))
    }

    fn layout_change(&self) -> Option<LayoutChange> {
        self.guest.layout_change()
    }

    fn discard(&self, landing: Landing) -> Result<(), GuestError> {
        Err(self.unmapped(landing))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::session::tests::guest;
    use crate::units::BlockIndex;

    /// A copy stays unchanged, in one piece, until it is released; memory that was not copied can't be read.
    #[test]
    fn a_copy_is_read_until_it_is_released() {
        let memory = guest(&[300, 7]);
        let region = memory.region(BlockIndex(0)).unwrap().clone();
        let write = |page: u64, byte: u8| region.span(page * 4096, 4096).unwrap().copy_from(&[byte; 4096]);
        (10..20).for_each(|page| _ = write(page, 7));
        let copies = Copies::new(memory.clone(), 1 << 20).unwrap();
        let run = |first, pages| PageRun { block: BlockIndex(0), first: PageIndex(first), pages };
        let byte = |first, pages| {
            let landing = memory.table().admit_run(run(first, pages)).unwrap();
            copies.span(landing).ok().map(|span| {
                let mut out = vec![0; span.len()];
                span.copy_to(&mut out);
                assert!(out.iter().all(|byte| *byte == out[0]));
                out[0]
            })
        };
        let (batch, kept) = copies.copy(run(8, 16), Place::Tray).unwrap();
        assert!(kept && batch.whole_pages() == 10 && batch.zero_pages() == 6);
        write(12, 9);
        let (single, _) = copies.copy(run(12, 1), Place::Slot).unwrap();
        assert_eq!(
            (byte(10, 2), byte(13, 7), byte(12, 1)),
            (Some(7), None, Some(9)),
            "the later copy of page 12"
        );
        assert_eq!(copies.release(&single), Some(Place::Slot));
        assert_eq!((byte(10, 10), byte(8, 1), byte(7, 1), byte(24, 1)), (Some(7), Some(0), None, None));
        assert_eq!((copies.release(&batch), byte(10, 1)), (Some(Place::Tray), None));
        let (zeros, kept) = copies.copy(run(100, 5), Place::Tray).unwrap();
        assert_eq!((kept, copies.release(&zeros), zeros.zero_pages()), (false, None, 5));
        let free = copies.taken.locked();
        assert_eq!(
            (free.free_slots.len() as u64, free.free_trays.len() as u64),
            (copies.slots, copies.trays)
        );
    }
}
