//! Puts arriving pages where they belong.

use std::sync::Arc;

use crate::guest::{GuestError, GuestMemory};
use crate::observe::PageCounts;
use crate::ram::{Landing, PageRun, RamBlock, ReceivedMap};
use crate::stream::qemu::compressed::inflate_page;
use crate::stream::{DecodeError, Fault, xbzrle};
use crate::sys::{is_zero, populate};
use crate::units::{BlockIndex, BlockOffset};

use super::ahead::PopulateAhead;
use super::destination::{Arrival, Incoming};
use super::{Breakage, Error};

/// The guest's memory while it fills. Bytes are copied, then the page is marked, then others see it.
pub(super) struct Placing {
    memory: Arc<dyn GuestMemory>,
    received: ReceivedMap,
    arrival: Option<Box<dyn Arrival>>,
    /// Announced position to position in the guest's own table.
    blocks: Vec<BlockIndex>,
    page_bytes: u64,
    scratch: Vec<u8>,
    pub(super) pages: PageCounts,
    pub(super) ahead: PopulateAhead,
    pub(super) breakage: Breakage,
}

impl Placing {
    pub(super) fn new(
        memory: Arc<dyn GuestMemory>,
        announced: &[RamBlock],
        arrival: Option<Box<dyn Arrival>>,
    ) -> Result<Self, Error> {
        let table = memory.table();
        let find = |block: &RamBlock| table.find(block.name.as_str());
        let blocks = announced.iter().map(find).collect::<Result<_, _>>().map_err(GuestError::from)?;
        let page_bytes = table.page().bytes();
        let received = ReceivedMap::new(table);
        let scratch = vec![0; page_bytes as usize];
        let (pages, ahead, breakage) = (PageCounts::default(), PopulateAhead::default(), Breakage::default());
        Ok(Self { received, arrival, blocks, page_bytes, scratch, pages, ahead, breakage, memory })
    }

    pub(super) fn memory(&self) -> &Arc<dyn GuestMemory> {
        &self.memory
    }

    /// Called at every section of pages; the watcher takes the first as its beginning.
    pub(super) fn began(&mut self, incoming: &Incoming) -> Result<(), Error> {
        let watcher = self.arrival.as_mut();
        watcher.map_or(Ok(()), |arrival| arrival.began(incoming, &self.memory))
    }

    fn landing(&self, announced: BlockIndex, offset: BlockOffset) -> Result<Landing, GuestError> {
        // The parser has checked the position against the same list; an unknown one is refused all the same.
        let block = self.blocks.get(announced.as_usize()).copied().unwrap_or(BlockIndex(u32::MAX));
        Ok(self.memory.table().admit(block, offset, self.page_bytes)?)
    }

    fn placed(&mut self, landing: Landing) -> u64 {
        let run = landing.run(self.memory.table().page());
        let fresh = self.received.mark(run);
        if let Some(arrival) = &mut self.arrival {
            arrival.placed(run);
        }
        fresh
    }

    /// Takes the memory of the page at `offset`, which has come, and of the `following` ones that are coming.
    pub(super) fn populate(&mut self, block: BlockIndex, offset: BlockOffset, following: u64) {
        let bytes = (following + 1) * self.page_bytes;
        self.ahead.taken(block, offset, bytes);
        let index = self.blocks.get(block.as_usize()).copied().unwrap_or(BlockIndex(u32::MAX));
        // Pages beyond the block are refused when they come; a kernel that can't populate, or has no memory
        // left, says so again at the fault.
        if let Ok(landing) = self.memory.table().admit(index, offset, bytes)
            && let Ok(span) = self.memory.span(landing)
        {
            let _ = populate(span);
        }
    }

    pub(super) fn page(&mut self, block: BlockIndex, offset: BlockOffset, bytes: &[u8]) -> Result<(), Error> {
        let landing = self.landing(block, offset)?;
        if self.breakage.is(Breakage::MarkBeforeCopy) {
            self.placed(landing);
            self.memory.span(landing)?.copy_from(bytes);
            return Ok(());
        }
        self.memory.span(landing)?.stream_from(bytes);
        self.placed(landing);
        self.pages.normal += 1;
        Ok(())
    }

    /// Memory starts out zero, so that a page which was never written need not be touched.
    pub(super) fn zero(&mut self, block: BlockIndex, offset: BlockOffset) -> Result<(), Error> {
        let landing = self.landing(block, offset)?;
        let known = self
            .received
            .block(landing.block())
            .is_some_and(|map| map.get(self.memory.table().page().page_of(landing.offset())));
        if known {
            let span = self.memory.span(landing)?;
            if !is_zero(span) {
                span.fill_zero();
            }
        }
        self.placed(landing);
        self.pages.zero += 1;
        Ok(())
    }

    /// Pages that somebody else may have written: the NIC, in a round.
    pub(super) fn written(&mut self, run: PageRun) {
        self.received.mark(run);
    }

    pub(super) fn compressed(
        &mut self,
        block: BlockIndex,
        offset: BlockOffset,
        bytes: &[u8],
    ) -> Result<(), Error> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let placed = match inflate_page(bytes, &mut scratch) {
            Ok(()) => self.page(block, offset, &scratch),
            Err(fault) => Err(corrupt(fault)),
        };
        self.scratch = scratch;
        placed
    }

    /// A delta is applied to a copy and put back whole: a broken one leaves no half page.
    pub(super) fn delta(
        &mut self,
        block: BlockIndex,
        offset: BlockOffset,
        bytes: &[u8],
    ) -> Result<(), Error> {
        let landing = self.landing(block, offset)?;
        let span = self.memory.span(landing)?;
        span.copy_to(&mut self.scratch);
        xbzrle::decode(bytes, &mut self.scratch).map_err(|fault| corrupt(fault.into()))?;
        span.copy_from(&self.scratch);
        self.placed(landing);
        self.pages.normal += 1;
        Ok(())
    }

    /// True if somebody wants to see each page as it arrives.
    pub(super) fn is_watched(&self) -> bool {
        self.arrival.is_some()
    }

    pub(super) fn between_reads(&mut self) -> Result<(), Error> {
        self.arrival.as_mut().map_or(Ok(()), |arrival| arrival.between_reads())
    }

    pub(super) fn ram_complete(&mut self) -> Result<(), Error> {
        self.arrival.as_mut().map_or(Ok(()), |arrival| arrival.ram_complete())
    }
}

fn corrupt(fault: Fault) -> Error {
    Error::Decode(DecodeError::Corrupt(crate::stream::Corrupt { at: 0, fault }))
}
