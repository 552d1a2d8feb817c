//! Pages that a NIC has written, found by their content.
//!
//! A NIC's writes touch no page table, so no dirty source reports them, and a source registers a chunk once and writes
//! to it in any later round. So a relay that must know which pages a round has written keeps a fingerprint of every
//! page that the source could ever write to. It computes all of them again when a round is over: a page whose
//! fingerprint has changed was written.
//!
//! # Required orders
//!
//! - The fingerprint is computed first, then the page is reported, then its bytes are read to be sent on: the next scan
//!   finds a write in between.
//! - The source writes no page during a scan: it waits for a message that it receives when the relay continues to read
//!   the stream ([`DestinationLink::waits_after_round`](crate::transport::DestinationLink::waits_after_round)). A round
//!   writes a page once at most, as every pass over a dirty bitmap does, so between two scans no page can change and
//!   then change back.
//! - The last scan comes after the last round. Its time adds to the guest's downtime.
//!
//! # What it costs
//!
//! 16 bytes for each page that may be written to: 1/256 of 4 KiB pages, allocated chunk by chunk as the source requests
//! them. A scan reads all those pages on all cores.
//!
//! Fingerprints are XXH3 with 128 bits under a secret of this run, of which 127 count. A page is missed if its new
//! content has the fingerprint of its old one, so what counts is the number of changed pages that are compared, not of
//! their pairs: 1 TiB of 4 KiB pages all changed in each of 1000 rounds are 2^38 comparisons, and one of them fails
//! with a probability of 2^-89. (64 bits would give 2^-26, too much for a guest that is not verified afterwards.) XXH3
//! is not secure against forgery; but only the guest writes its pages, and it would have to guess the secret to harm
//! itself.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use twox_hash::XxHash3_128;

use crate::guest::PageObserver;
use crate::guest::{GuestError, GuestMemory};
use crate::ram::PageRun;
use crate::session::Error;
use crate::session::workers::Spawner;
use crate::sys::{HostSpan, Lock as _, Stop, is_zero, random_id};
use crate::transport::ChannelError;
use crate::units::{BlockIndex, PageIndex};

/// The fingerprint of a page that was never scanned: equal to no other.
const UNKNOWN: u128 = 0;
/// The fingerprint of a zero page. Those of other pages are odd.
const ZERO: u128 = 2;
/// Length of the secret in bytes: XXH3's default.
const SECRET_BYTES: usize = 192;

/// What scans did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanReport {
    /// How many there were.
    pub scans: u32,
    /// Scanned pages, including repeats.
    pub pages: u64,
    /// Pages found to have changed, including repeats.
    pub found: u64,
    /// Duration of all of them together.
    pub took: Duration,
    /// Duration of the last one, while the guest was paused.
    pub last: Duration,
    /// Bytes that the fingerprints take.
    pub memory: u64,
}

/// Some pages that the source may write to, and their fingerprints.
struct Chunk {
    run: PageRun,
    /// Locked by the thread that scans the chunk.
    prints: Mutex<Box<[u128]>>,
}

/// Fingerprints of all pages that the source was ever allowed to write.
pub(crate) struct ContentScan {
    memory: Arc<dyn GuestMemory>,
    watcher: Arc<dyn PageObserver>,
    secret: Arc<[u8]>,
    /// By block and first page.
    chunks: BTreeMap<(u32, u64), Arc<Chunk>>,
    report: ScanReport,
}

impl ContentScan {
    /// Reports changed pages of `memory` to `watcher`.
    pub(crate) fn new(memory: Arc<dyn GuestMemory>, watcher: Arc<dyn PageObserver>) -> Self {
        let secret = std::iter::repeat_with(random_id).flatten().take(SECRET_BYTES).collect();
        Self { memory, watcher, secret, chunks: BTreeMap::new(), report: ScanReport::default() }
    }

    /// The source may write to `run` from now on. The first scan reports all of it: the far end's content is not known
    /// (a QEMU's ROMs and tables are not zero).
    pub(crate) fn open(&mut self, run: PageRun) {
        let pages = usize::try_from(run.pages).unwrap_or(usize::MAX);
        self.chunks.entry((run.block.0, run.first.0)).or_insert_with(|| {
            self.report.memory += run.pages * size_of::<u128>() as u64;
            Arc::new(Chunk { run, prints: Mutex::new(vec![UNKNOWN; pages].into()) })
        });
    }

    /// `page` was received in the stream, which reported it: its fingerprint is out of date.
    pub(crate) fn forget(&mut self, block: BlockIndex, page: PageIndex) {
        let Some((_, chunk)) = self.chunks.range(..=(block.0, page.0)).next_back() else { return };
        let inside = chunk.run.block == block && page.0 < chunk.run.end().0;
        let at = usize::try_from(page.0 - chunk.run.first.0).unwrap_or(usize::MAX);
        if let (true, Some(print)) = (inside, chunk.lock().get_mut(at)) {
            *print = UNKNOWN;
        }
    }

    /// Scans every page and reports those that have changed, each as soon as it is found.
    ///
    /// # Errors
    /// [`Error::Guest`], [`Error::Thread`]; [`Error::Cancelled`] and the like if `stop` ends the scan.
    pub(crate) fn scan(&mut self, spawner: &Spawner, stop: &Stop) -> Result<(), Error> {
        let began = Instant::now();
        let chunks: Vec<Arc<Chunk>> = self.chunks.values().cloned().collect();
        let (count, pages) = (chunks.len(), chunks.iter().map(|chunk| chunk.run.pages).sum::<u64>());
        let (memory, watcher, secret) =
            (Arc::clone(&self.memory), Arc::clone(&self.watcher), Arc::clone(&self.secret));
        let scan_chunk = move |item: usize| chunks[item].scan_chunk(&*memory, &secret, &*watcher);
        let found = spawner.map_watched("ramwire-scan", count, scan_chunk, || {
            let stopped = |reason| ChannelError::Stopped { reason, doing: "looking for what a NIC wrote" };
            stop.reason().map_or(Ok(()), |reason| Err(stopped(reason).into()))
        })?;
        let found = found.into_iter().sum::<Result<u64, GuestError>>()?;
        let last = began.elapsed();
        tracing::debug!(pages, found, ?last, "scan for what a NIC wrote");
        let report = &mut self.report;
        report.scans += 1;
        report.pages += pages;
        report.found += found;
        report.took += last;
        report.last = last;
        Ok(())
    }

    pub(crate) fn report(&self) -> ScanReport {
        self.report
    }
}

impl Chunk {
    fn lock(&self) -> std::sync::MutexGuard<'_, Box<[u128]>> {
        self.prints.locked()
    }

    /// Computes the fingerprints again; returns how many pages changed.
    fn scan_chunk(
        &self,
        memory: &dyn GuestMemory,
        secret: &[u8],
        watcher: &dyn PageObserver,
    ) -> Result<u64, GuestError> {
        let table = memory.table();
        let page = table.page().bytes() as usize;
        let span = memory.span(table.admit_run(self.run)?)?;
        let mut window = vec![0; page];
        let mut prints = self.lock();
        let (mut changed, mut found) = (None::<PageRun>, 0);
        for (at, print) in prints.iter_mut().enumerate() {
            let Some(bytes) = span.part(at * page, page) else { break };
            let now = fingerprint(bytes, secret, &mut window);
            let differs = std::mem::replace(print, now) != now;
            found += u64::from(differs);
            match (&mut changed, differs) {
                (Some(run), true) => run.pages += 1,
                (None, true) => {
                    let first = PageIndex(self.run.first.0 + at as u64);
                    changed = Some(PageRun { first, pages: 1, ..self.run });
                }
                (_, false) => changed.take().into_iter().for_each(|run| watcher.placed(run)),
            }
        }
        changed.into_iter().for_each(|run| watcher.placed(run));
        Ok(found)
    }
}

/// Not [`UNKNOWN`].
fn fingerprint(page: HostSpan<'_>, secret: &[u8], window: &mut [u8]) -> u128 {
    if is_zero(page) {
        return ZERO;
    }
    page.copy_to(window);
    // Only a secret that is too short is refused.
    XxHash3_128::oneshot_with_secret(secret, window).map_or(UNKNOWN, |hash| hash | 1)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::guest::MappedGuest;
    use crate::ram::{BlockName, RamBlock};
    use crate::sys::{CancelToken, Mapping};
    use crate::units::PageSize;

    #[derive(Default)]
    struct Told(Mutex<Vec<PageRun>>);

    impl PageObserver for Told {
        fn placed(&self, run: PageRun) {
            self.0.lock().unwrap().push(run);
        }
    }

    impl Told {
        /// Block, first page, pages; in order.
        fn take(&self) -> Vec<(u32, u64, u64)> {
            let runs = std::mem::take(&mut *self.0.lock().unwrap());
            let mut runs: Vec<_> = runs.iter().map(|run| (run.block.0, run.first.0, run.pages)).collect();
            runs.sort_unstable();
            runs
        }
    }

    fn run(block: u32, first: u64, pages: u64) -> PageRun {
        PageRun { block: BlockIndex(block), first: PageIndex(first), pages }
    }

    #[test]
    fn what_changes_is_told_of_once_a_scan_and_what_stays_never() {
        let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
        for (name, pages) in [("ram", 600), ("rom", 3)] {
            let block = RamBlock::new(BlockName::new(name).unwrap(), pages * 4096);
            builder = builder.mapping(block, &Mapping::anonymous(pages * 4096).unwrap());
        }
        let guest = Arc::new(builder.build().unwrap());
        let write = |block: u32, page: u64, at: u64, byte: u8| {
            let region = guest.region(BlockIndex(block)).unwrap();
            region.span(page * 4096 + at, 1).unwrap().copy_from(&[byte]);
        };
        let told = Arc::new(Told::default());
        let mut scan = ContentScan::new(Arc::clone(&guest) as _, Arc::clone(&told) as _);
        let (spawner, stop) = (Spawner::default(), Stop::on(&CancelToken::default()));
        let scan_chunk = |scan: &mut ContentScan| {
            scan.scan(&spawner, &stop).unwrap();
            told.take()
        };
        assert_eq!(scan_chunk(&mut scan), []);
        // All of a new chunk is reported, including zero pages; announcing it again changes nothing.
        for chunk in [run(0, 256, 256), run(0, 512, 88), run(0, 256, 256), run(1, 0, 3)] {
            scan.open(chunk);
        }
        assert_eq!(scan_chunk(&mut scan), [(0, 256, 256), (0, 512, 88), (1, 0, 3)]);
        assert_eq!(scan_chunk(&mut scan), []);
        // One byte anywhere in a page; pages that the source may not write to don't count.
        for (block, page, at) in
            [(0, 255, 0), (0, 256, 0), (0, 257, 4095), (0, 511, 9), (0, 599, 4095), (1, 2, 1)]
        {
            write(block, page, at, 1);
        }
        assert_eq!(scan_chunk(&mut scan), [(0, 256, 2), (0, 511, 1), (0, 599, 1), (1, 2, 1)]);
        // To zero again, and two bytes that are swapped.
        write(0, 256, 0, 0);
        for (at, byte) in [(4095, 0), (4094, 1)] {
            write(0, 257, at, byte);
        }
        assert_eq!(scan_chunk(&mut scan), [(0, 256, 2)]);
        // A page that was received in the stream is reported again, whatever its content.
        for (block, page) in [(0, 300), (0, 599), (0, 10), (1, 2)] {
            scan.forget(BlockIndex(block), PageIndex(page));
        }
        assert_eq!(scan_chunk(&mut scan), [(0, 300, 1), (0, 599, 1), (1, 2, 1)]);
        let report = scan.report();
        assert_eq!((report.scans, report.pages, report.memory), (6, 5 * 347, 347 * 16));
        assert_eq!(report.found, 347 + 5 + 2 + 3);
    }

    #[test]
    fn a_page_that_the_guest_has_not_got_is_refused() {
        let block = RamBlock::new(BlockName::new("ram").unwrap(), 4096);
        let guest =
            MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &Mapping::anonymous(4096).unwrap());
        let told = Arc::new(Told::default());
        let mut scan = ContentScan::new(Arc::new(guest.build().unwrap()), told);
        scan.open(run(0, 0, 2));
        let refused = scan.scan(&Spawner::default(), &Stop::on(&CancelToken::default()));
        assert!(matches!(refused, Err(Error::Guest(_))), "{refused:?}");
    }
}
