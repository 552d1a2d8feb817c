//! Puts the pages of the stream where they belong.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::guest::{GuestMemory, PageWriter, Placer};
use crate::observe::PageCounts;
use crate::ram::{Landing, PageRun, RamBlock};
use crate::stream::qemu::compressed::inflate_page;
use crate::stream::qemu::ram::PAGE_HEAD;
use crate::stream::{DecodeError, Fault, xbzrle};
use crate::sys::Stop;
use crate::units::{BlockIndex, BlockOffset, PageIndex};

use super::ingest::Placement;
use super::{Incoming, IncomingObserver};
use crate::session::relay::{ContentScan, ScanReport};
use crate::session::workers::Spawner;
use crate::session::{Breakage, Error};

/// How often memory is checked for pages that the kernel has lost.
const LOSS_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// What the stream's own thread needs to place pages.
pub(super) struct Placing {
    placer: Arc<Placer>,
    writer: PageWriter,
    observer: Option<Box<dyn IncomingObserver>>,
    scratch: Vec<u8>,
    /// Pages that arrived in the stream.
    in_stream: PageCounts,
    /// For an observer of pages on a link that reports none of them.
    scan: Option<ContentScan>,
    checked: Instant,
    /// This is not the first connection.
    is_later: bool,
    /// Only where an order is switched off.
    older: HashMap<(BlockIndex, BlockOffset), Vec<u8>>,
    breakage: Breakage,
}

impl Placing {
    pub(super) fn new(
        memory: Arc<dyn GuestMemory>,
        announced: &[RamBlock],
        known_zero: impl Fn(&RamBlock) -> bool,
        how: &Placement<'_>,
        mut observer: Option<Box<dyn IncomingObserver>>,
    ) -> Result<Self, Error> {
        let (may_be_postcopy, breakage) = (how.may_be_postcopy, how.breakage);
        let watcher = observer.as_mut().map(|observer| observer.watch(&memory));
        let mut placer = Placer::new(memory, announced, watcher)?;
        if may_be_postcopy {
            placer.empty()?;
        }
        if !may_be_postcopy && !breakage.is(Breakage::TrustMemory) {
            placer.find_used(known_zero);
        }
        if let Some(prints) = &how.prints {
            placer.keep_fingerprints(Arc::clone(prints));
        }
        if how.fences {
            placer.keep_since_fence();
        }
        let placer = Arc::new(placer);
        let scratch = vec![0; placer.page_bytes() as usize];
        let writer = PageWriter::default();
        Ok(Self {
            placer,
            writer,
            observer,
            scratch,
            in_stream: PageCounts::default(),
            scan: None,
            checked: Instant::now(),
            is_later: false,
            older: HashMap::new(),
            breakage,
        })
    }

    pub(super) fn memory(&self) -> &Arc<dyn GuestMemory> {
        self.placer.memory()
    }

    pub(super) fn placer(&self) -> &Arc<Placer> {
        &self.placer
    }

    pub(super) fn counts(&self) -> PageCounts {
        self.placer.counts()
    }

    /// Pages that arrived in the stream, each time that a page arrived.
    pub(super) fn in_stream(&self) -> PageCounts {
        self.in_stream
    }

    /// A fence was read.
    pub(super) fn fenced(&mut self) -> Result<(), Error> {
        if self.breakage.is(Breakage::PlaceFromOld) && self.is_later {
            for ((block, offset), bytes) in std::mem::take(&mut self.older) {
                let landing = self.placer.admit(block, offset, self.placer.page_bytes())?;
                self.writer.place(&self.placer, landing, std::iter::once(&bytes[..]))?;
            }
        }
        self.placer.fenced();
        Ok(())
    }

    /// Another connection follows: on it the source counts from zero.
    pub(super) fn another_connection(&mut self) {
        self.forget_parts();
        self.in_stream = PageCounts::default();
        self.is_later = true;
    }

    /// Called at every section of pages; the watcher takes the first as its beginning.
    pub(super) fn began(&mut self, incoming: &Incoming, section: u32) -> Result<(), Error> {
        let watcher = self.observer.as_mut();
        watcher.map_or(Ok(()), |observer| observer.began(incoming, self.placer.memory(), section))
    }

    /// The observer of pages.
    pub(super) fn watcher(&self) -> Option<&dyn IncomingObserver> {
        self.observer.as_deref()
    }

    pub(super) fn observer(&mut self) -> Option<&mut Box<dyn IncomingObserver>> {
        self.observer.as_mut()
    }

    /// Before each read of the stream.
    pub(super) fn check_faults(&mut self) {
        self.writer.check_faults();
    }

    /// True once in [`LOSS_CHECK_INTERVAL`]: to check at each read would cost too much.
    pub(super) fn is_due(&mut self) -> bool {
        let due = self.checked.elapsed() >= LOSS_CHECK_INTERVAL;
        if due {
            self.checked = Instant::now();
        }
        due
    }

    /// The page at `offset`, and those after it: `following` are whole pages, each with its head.
    pub(super) fn pages(
        &mut self,
        block: BlockIndex,
        offset: BlockOffset,
        first: &[u8],
        following: &[u8],
    ) -> Result<(), Error> {
        let others = following.chunks_exact(PAGE_HEAD + first.len()).map(|record| &record[PAGE_HEAD..]);
        let bytes = (others.len() as u64 + 1) * self.placer.page_bytes();
        let landing = self.placer.admit(block, offset, bytes)?;
        self.in_stream.normal += bytes / self.placer.page_bytes();
        if self.breakage.is(Breakage::MarkBeforeCopy) {
            self.placer.commit(landing);
        }
        if self.breakage.is(Breakage::SkipPage) && self.in_stream.normal.is_multiple_of(8) {
            self.placer.commit(landing);
            return Ok(());
        }
        let older = self.older_copy(landing, first);
        if self.breakage.is(Breakage::PlaceFromOld) && !self.is_later {
            self.older.insert((block, offset), first.to_vec());
        }
        let pages = std::iter::once(older.as_deref().unwrap_or(first)).chain(others);
        if self.breakage.is(Breakage::MarkBeforeCopy) {
            return Ok(self.writer.write(&self.placer, landing, 0, pages)?);
        }
        self.writer.place(&self.placer, landing, pages)?;
        self.seen_in_stream(landing);
        Ok(())
    }

    /// The copy of a page that arrived before, if that is to be placed again.
    fn older_copy(&mut self, landing: Landing, bytes: &[u8]) -> Option<Vec<u8>> {
        if !self.breakage.is(Breakage::PlaceStale) {
            return None;
        }
        self.older.insert((landing.block(), landing.offset()), bytes.to_vec())
    }

    pub(super) fn zero(&mut self, block: BlockIndex, offset: BlockOffset) -> Result<(), Error> {
        let landing = self.placer.admit(block, offset, self.placer.page_bytes())?;
        self.writer.place_zero(&self.placer, landing)?;
        self.in_stream.zero += 1;
        self.seen_in_stream(landing);
        Ok(())
    }

    /// The connection is gone: partially received host pages will be sent again.
    pub(super) fn forget_parts(&mut self) {
        self.writer.forget_parts();
    }

    /// Pages that the NIC may have written, and may write in every round from now on.
    pub(super) fn written(&mut self, run: PageRun) {
        self.placer.written(run);
        if let Some(scan) = &mut self.scan {
            scan.open(run);
        }
    }

    /// From here on pages arrive that show only by their content.
    pub(super) fn begin_scans(&mut self) {
        let memory = self.placer.memory();
        self.scan =
            self.placer.observer().map(|watcher| ContentScan::new(Arc::clone(memory), Arc::clone(watcher)));
    }

    /// A round of such pages is over: reports to the observer which they were.
    pub(super) fn scan(&mut self, spawner: &Spawner, stop: &Stop) -> Result<(), Error> {
        self.scan.as_mut().map_or(Ok(()), |scan| scan.scan(spawner, stop))
    }

    /// What scans did, where there are any.
    pub(super) fn scan_report(&self) -> Option<ScanReport> {
        self.scan.as_ref().map(ContentScan::report)
    }

    /// A page that arrived in the stream was reported when it was placed; a scan's knowledge of it is out of date.
    fn seen_in_stream(&mut self, landing: Landing) {
        if let Some(scan) = &mut self.scan {
            let run = self.placer.run(landing);
            (run.first.0..run.end().0).for_each(|page| scan.forget(run.block, PageIndex(page)));
        }
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
        let landing = self.placer.admit(block, offset, self.placer.page_bytes())?;
        let span = self.placer.target(landing)?;
        span.copy_to(&mut self.scratch);
        xbzrle::decode(bytes, &mut self.scratch).map_err(|fault| corrupt(fault.into()))?;
        span.copy_from(&self.scratch);
        self.placer.print(landing, 0, &self.scratch);
        self.placer.commit_delta(landing);
        self.in_stream.delta += 1;
        self.seen_in_stream(landing);
        Ok(())
    }

    /// True if an observer sees each page as it arrives.
    pub(super) fn is_watched(&self) -> bool {
        self.observer.is_some()
    }

    pub(super) fn between_reads(&mut self) -> Result<(), Error> {
        self.observer.as_mut().map_or(Ok(()), |observer| observer.between_reads())
    }

    pub(super) fn ram_complete(&mut self) -> Result<(), Error> {
        let scan = self.scan_report().map(|report| report.last);
        self.observer.as_mut().map_or(Ok(()), |observer| observer.ram_complete(scan))
    }
}

fn corrupt(fault: Fault) -> Error {
    Error::Decode(DecodeError::Corrupt(crate::stream::Corrupt { at: 0, fault }))
}
