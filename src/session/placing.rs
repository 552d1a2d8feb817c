//! Puts the pages of the stream where they belong.

use std::sync::Arc;

use crate::guest::GuestMemory;
use crate::observe::PageCounts;
use crate::ram::{PageRun, RamBlock};
use crate::stream::qemu::compressed::inflate_page;
use crate::stream::{DecodeError, Fault, xbzrle};
use crate::sys::{Stop, populate};
use crate::transport::PagePlaces;
use crate::units::{BlockIndex, BlockOffset};

use super::ahead::PopulateAhead;
use super::destination::{Arrival, Incoming};
use super::places::Places;
use super::scan::{ContentScan, ScanReport};
use super::workers::Spawner;
use super::{Breakage, Error};

/// What the stream's own thread needs to place pages.
pub(super) struct Placing {
    places: Arc<Places>,
    arrival: Option<Box<dyn Arrival>>,
    scratch: Vec<u8>,
    /// Where pages come by a door that shows none of them, and somebody wants to see them all the same.
    scan: Option<ContentScan>,
    pub(super) ahead: PopulateAhead,
    pub(super) breakage: Breakage,
}

impl Placing {
    pub(super) fn new(
        memory: Arc<dyn GuestMemory>,
        announced: &[RamBlock],
        mut arrival: Option<Box<dyn Arrival>>,
    ) -> Result<Self, Error> {
        let watcher = arrival.as_mut().map(|arrival| arrival.watch(&memory));
        let places = Arc::new(Places::new(memory, announced, watcher)?);
        let scratch = vec![0; places.page_bytes() as usize];
        Ok(Self {
            places,
            arrival,
            scratch,
            scan: None,
            ahead: PopulateAhead::default(),
            breakage: Breakage::default(),
        })
    }

    pub(super) fn memory(&self) -> &Arc<dyn GuestMemory> {
        self.places.memory()
    }

    pub(super) fn places(&self) -> &Arc<Places> {
        &self.places
    }

    pub(super) fn counts(&self) -> PageCounts {
        self.places.counts()
    }

    /// Called at every section of pages; the watcher takes the first as its beginning.
    pub(super) fn began(&mut self, incoming: &Incoming) -> Result<(), Error> {
        let watcher = self.arrival.as_mut();
        watcher.map_or(Ok(()), |arrival| arrival.began(incoming, self.places.memory()))
    }

    /// Takes the memory of the page at `offset`, which has come, and of the `following` ones that are coming.
    pub(super) fn populate(&mut self, block: BlockIndex, offset: BlockOffset, following: u64) {
        let bytes = (following + 1) * self.places.page_bytes();
        self.ahead.taken(block, offset, bytes);
        // Pages beyond the block are refused when they come; a kernel that can't populate, or has no memory
        // left, says so again at the fault.
        if let Ok(span) = self.places.room(block, offset, bytes) {
            let _ = populate(span);
        }
    }

    pub(super) fn page(&mut self, block: BlockIndex, offset: BlockOffset, bytes: &[u8]) -> Result<(), Error> {
        let page = self.places.page_bytes();
        if self.breakage.is(Breakage::MarkBeforeCopy) {
            self.places.placed(block, offset, page)?;
            self.places.room(block, offset, page)?.copy_from(bytes);
            return Ok(());
        }
        self.places.room(block, offset, page)?.stream_from(bytes);
        self.places.placed(block, offset, page)?;
        self.came_in_stream(block, offset)
    }

    pub(super) fn zero(&mut self, block: BlockIndex, offset: BlockOffset) -> Result<(), Error> {
        self.places.zero(block, offset)?;
        self.came_in_stream(block, offset)
    }

    /// Pages that somebody else may have written, and may write to in every round from now on: the NIC.
    pub(super) fn written(&mut self, run: PageRun) {
        self.places.written(run);
        if let Some(scan) = &mut self.scan {
            scan.open(run);
        }
    }

    /// From here on pages come that only their content tells of.
    pub(super) fn begin_scans(&mut self) {
        let memory = self.places.memory();
        self.scan =
            self.places.watcher().map(|watcher| ContentScan::new(Arc::clone(memory), Arc::clone(watcher)));
    }

    /// A round of such pages is over: tells whoever watches which they were.
    pub(super) fn scan(&mut self, spawner: &Spawner, stop: &Stop) -> Result<(), Error> {
        self.scan.as_mut().map_or(Ok(()), |scan| scan.scan(spawner, stop))
    }

    /// What scans did, where there are any.
    pub(super) fn scan_report(&self) -> Option<ScanReport> {
        self.scan.as_ref().map(ContentScan::report)
    }

    /// A page that came in the stream is told of by itself; what a scan knew of it is out of date.
    fn came_in_stream(&mut self, block: BlockIndex, offset: BlockOffset) -> Result<(), Error> {
        if let Some(scan) = &mut self.scan {
            let landing = self.places.landing(block, offset, self.places.page_bytes())?;
            let run = landing.run(self.places.memory().table().page());
            scan.forget(run.block, run.first);
        }
        Ok(())
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
        let page = self.places.page_bytes();
        let span = self.places.room(block, offset, page)?;
        span.copy_to(&mut self.scratch);
        xbzrle::decode(bytes, &mut self.scratch).map_err(|fault| corrupt(fault.into()))?;
        span.copy_from(&self.scratch);
        self.places.seen(self.places.landing(block, offset, page)?);
        self.places.count_delta();
        self.came_in_stream(block, offset)
    }

    /// True if somebody wants to see each page as it arrives.
    pub(super) fn is_watched(&self) -> bool {
        self.arrival.is_some()
    }

    pub(super) fn between_reads(&mut self) -> Result<(), Error> {
        self.arrival.as_mut().map_or(Ok(()), |arrival| arrival.between_reads())
    }

    pub(super) fn ram_complete(&mut self) -> Result<(), Error> {
        let scan = self.scan_report().map(|report| report.last);
        self.arrival.as_mut().map_or(Ok(()), |arrival| arrival.ram_complete(scan))
    }
}

fn corrupt(fault: Fault) -> Error {
    Error::Decode(DecodeError::Corrupt(crate::stream::Corrupt { at: 0, fault }))
}
