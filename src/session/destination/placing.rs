//! Puts the pages of the stream where they belong.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::guest::GuestMemory;
use crate::observe::PageCounts;
use crate::ram::{PageRun, RamBlock};
use crate::stream::qemu::compressed::inflate_page;
use crate::stream::qemu::ram::PAGE_HEAD;
use crate::stream::{DecodeError, Fault, xbzrle};
use crate::sys::{FaultWatch, Stop, populate};
use crate::transport::PagePlaces;
use crate::units::{BlockIndex, BlockOffset};

use super::places::Places;
use super::{Arrival, Incoming};
use crate::session::relay::{ContentScan, ScanReport};
use crate::session::workers::Spawner;
use crate::session::{Breakage, Error};

/// Pages that one write to the memory's file takes.
const PAGES_A_WRITE: usize = 64;

/// How often memory is looked at that the kernel may have lost.
const A_LOOK: Duration = Duration::from_millis(50);

/// What the stream's own thread needs to place pages.
pub(super) struct Placing {
    places: Arc<Places>,
    arrival: Option<Box<dyn Arrival>>,
    scratch: Vec<u8>,
    /// Where pages come by a door that shows none of them, and somebody wants to see them all the same.
    scan: Option<ContentScan>,
    faults: FaultWatch,
    looked: Instant,
    /// Memory is met by faults: it is better written to by its file, or taken a run at a time.
    unmapped: bool,
    breakage: Breakage,
}

impl Placing {
    pub(super) fn new(
        memory: Arc<dyn GuestMemory>,
        announced: &[RamBlock],
        known_zero: impl Fn(&RamBlock) -> bool,
        mut arrival: Option<Box<dyn Arrival>>,
        breakage: Breakage,
    ) -> Result<Self, Error> {
        let watcher = arrival.as_mut().map(|arrival| arrival.watch(&memory));
        let mut places = Places::new(memory, announced, watcher)?;
        if !breakage.is(Breakage::TrustMemory) {
            places.find_used(known_zero);
        }
        let places = Arc::new(places);
        let scratch = vec![0; places.page_bytes() as usize];
        Ok(Self {
            places,
            arrival,
            scratch,
            scan: None,
            faults: FaultWatch::default(),
            looked: Instant::now(),
            unmapped: false,
            breakage,
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

    /// Before each read of the stream: looks how its predecessor's bytes fared.
    pub(super) fn look(&mut self) {
        self.unmapped = self.faults.look();
    }

    /// True once in [`A_LOOK`], where each read would cost too much.
    pub(super) fn is_due(&mut self) -> bool {
        let due = self.looked.elapsed() >= A_LOOK;
        if due {
            self.looked = Instant::now();
        }
        due
    }

    /// The page at `offset`, and what lies behind it: `following` are whole pages, each with its head.
    pub(super) fn pages(
        &mut self,
        block: BlockIndex,
        offset: BlockOffset,
        first: &[u8],
        following: &[u8],
    ) -> Result<(), Error> {
        let page = self.places.page_bytes();
        let others = || following.chunks_exact(PAGE_HEAD + first.len()).map(|record| &record[PAGE_HEAD..]);
        let bytes = (others().len() as u64 + 1) * page;
        if self.breakage.is(Breakage::MarkBeforeCopy) {
            self.places.placed(block, offset, bytes)?;
        }
        if !(self.unmapped && self.by_file(block, offset, std::iter::once(first).chain(others()))?) {
            let room = self.places.room(block, offset, bytes)?;
            if self.unmapped {
                // A kernel that can't, or has no memory left, says so again at the fault.
                let _ = populate(room);
            }
            room.stream_pages(std::iter::once(first).chain(others()));
        }
        if self.breakage.is(Breakage::MarkBeforeCopy) {
            return Ok(());
        }
        self.places.placed(block, offset, bytes)?;
        (0..bytes / page)
            .try_for_each(|index| self.came_in_stream(block, BlockOffset(offset.0 + index * page)))
    }

    /// Writes pages that lie one behind the other by the file behind the memory; false if that can't be done.
    fn by_file<'a>(
        &mut self,
        block: BlockIndex,
        offset: BlockOffset,
        mut pages: impl Iterator<Item = &'a [u8]>,
    ) -> Result<bool, Error> {
        let mut at = offset;
        loop {
            let mut parts = [IoSlice::new(&[]); PAGES_A_WRITE];
            let mut used = 0;
            for (part, page) in parts.iter_mut().zip(pages.by_ref()) {
                *part = IoSlice::new(page);
                used += 1;
            }
            if used == 0 {
                self.faults.by_file();
                return Ok(true);
            }
            if !self.places.write_by_file(block, at, &parts[..used])? {
                return Ok(false);
            }
            at.0 += used as u64 * self.places.page_bytes();
        }
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
            Ok(()) => self.pages(block, offset, &scratch, &[]),
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
