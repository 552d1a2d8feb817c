//! Written pages by soft-dirty bits: private memory of this process, on kernels before 6.7.
//!
//! The kernel has no call that reads the bits and clears them in one step: a write to a clean page between the two
//! would be lost. So every writer must be stopped for that moment, which the embedder does ([`PauseWriters`]): a sync
//! costs a short stop of the guest, some 10 ms per GiB, while [`WrittenPages`](super::WrittenPages) costs none.
//! Clearing affects the whole process, so one sync reads the bits of all blocks
//! ([`begin_sync`](DirtySource::begin_sync)), and there can be only one such source per process.
//!
//! Memory that is mapped next to a block may be merged with it into one mapping; the kernel then reports the whole
//! block once.
//!
//! Not for shared memory, whose bits are lost when reclaim unmaps a page, and not for huge pages, which have none.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::dirty::{NoRegion, regions_of};
use super::sources::no_proc;
use super::{DirtyError, DirtySource, GuestMemory};
use crate::error::Chain;
use crate::ram::{PageBitmap, RamBlock};
use crate::sys::{HostRegion, Lock as _, Mapping, SoftDirtyBits};
use crate::units::{BlockIndex, PageSize};

const NAME: &str = "soft-dirty";

/// True while a source of this process is started; the bits belong to the process, not to the source.
static IN_USE: AtomicBool = AtomicBool::new(false);

/// Stops every writer of guest RAM for a moment: vCPUs, device threads, system calls in progress.
pub trait PauseWriters: Send + Sync {
    /// Stops all writers, calls `during` once, and lets them continue. Also called while the guest is paused.
    ///
    /// # Errors
    /// If the writers could not be stopped; `during` was not called then.
    fn paused(&self, during: &mut dyn FnMut()) -> io::Result<()>;
}

/// Dirty source over the soft-dirty bits of this process.
pub struct SoftDirty {
    blocks: Vec<Option<Tracked>>,
    no_region: NoRegion,
    page: PageSize,
    writers: Arc<dyn PauseWriters>,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Tracked {
    block: String,
    shared: bool,
    region: HostRegion,
    range: Range<usize>,
}

#[derive(Debug)]
struct Running {
    bits: SoftDirtyBits,
    /// Pages read from the kernel and not yet handed out, by block.
    taken: Vec<PageBitmap>,
    /// Blocks that were handed out since the bits were read: a second call reports nothing new.
    handed_out: Vec<bool>,
}

impl std::fmt::Debug for SoftDirty {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SoftDirty").field("blocks", &self.blocks).finish_non_exhaustive()
    }
}

impl SoftDirty {
    /// Tracks the blocks of `guest`, whose writers `writers` can stop. [`probe`](DirtySource::probe) refuses a block
    /// without a [`region`](GuestMemory::region).
    pub fn new(guest: &dyn GuestMemory, writers: Arc<dyn PauseWriters>) -> Self {
        let tracked = |block: &RamBlock, region: HostRegion| {
            let len = block.max_length.min(region.len()).next_multiple_of(region.page().bytes());
            let range = region.address()..region.address().saturating_add(len as usize);
            Tracked { block: block.name.to_string(), shared: block.flags.shared, region, range }
        };
        let (blocks, no_region) = regions_of(guest, tracked);
        Self { blocks, no_region, page: guest.table().page(), writers, running: Mutex::new(None) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.locked()
    }

    /// Reads the bits of all blocks into `running.taken`, then clears them; no thread writes meanwhile.
    fn take(&self, running: &mut Running) -> io::Result<()> {
        let blocks = self.blocks.iter().zip(&mut running.taken);
        for (tracked, taken) in blocks.filter_map(|(tracked, taken)| Some((tracked.as_ref()?, taken))) {
            running.bits.read(tracked.range.clone(), |written| {
                let offset = |address: usize| (address - tracked.range.start) as u64;
                let first = offset(written.start) >> self.page.shift();
                taken.set_range(first..self.page.pages_in(offset(written.end)));
            })?;
        }
        running.bits.clear_all()
    }
}

impl DirtySource for SoftDirty {
    fn name(&self) -> &'static str {
        NAME
    }

    fn probe(&self) -> Result<(), DirtyError> {
        self.no_region.check(NAME)?;
        let base = rustix::param::page_size() as u64;
        for tracked in self.blocks.iter().flatten() {
            let why = if tracked.region.page().bytes() != base {
                "has huge pages, which have no soft-dirty bits; give base pages"
            } else if tracked.shared {
                "is shared memory, whose bits get lost by reclaim; give private memory"
            } else {
                continue;
            };
            return Err(DirtyError::unsupported(NAME, format!("RAM block {} {why}", tracked.block)));
        }
        // A probe clears the process's bits: a source in use would lose its own, and proves that the bits work.
        if IN_USE.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let result = probe_scratch();
        IN_USE.store(false, Ordering::Release);
        result
    }

    fn start(&self) -> Result<(), DirtyError> {
        self.stop()?;
        self.no_region.check(NAME)?;
        let open = |error| {
            DirtyError::unsupported(
                NAME,
                format!("/proc/self: {error}; {}", no_proc(&error, "mount /proc writable")),
            )
        };
        let bits = SoftDirtyBits::open().map_err(open)?;
        let mut running = self.lock();
        if IN_USE.swap(true, Ordering::AcqRel) {
            let reason = "another migration of this process uses the bits; run one at a time";
            return Err(DirtyError::unsupported(NAME, reason.to_owned()));
        }
        // Without a stop of the writers: earlier writes are sent in the first round.
        if let Err(error) = bits.clear_all() {
            IN_USE.store(false, Ordering::Release);
            return Err(DirtyError::kernel(NAME, "clearing /proc/self/clear_refs", error));
        }
        let pages =
            |tracked: &Option<Tracked>| tracked.as_ref().map_or(0, |tracked| tracked.range.len() as u64);
        let taken =
            self.blocks.iter().map(|block| PageBitmap::new(self.page.pages_in(pages(block)))).collect();
        *running = Some(Running { bits, taken, handed_out: vec![true; self.blocks.len()] });
        Ok(())
    }

    fn begin_sync(&self) -> Result<(), DirtyError> {
        let mut running = self.lock();
        let running = running.as_mut().ok_or_else(not_started)?;
        let mut result = Ok(());
        self.writers
            .paused(&mut || result = self.take(running))
            .map_err(|error| DirtyError::kernel(NAME, "stopping the guest's writers", error))?;
        result.map_err(|error| DirtyError::kernel(NAME, "taking the soft-dirty bits", error))?;
        running.handed_out.fill(false);
        Ok(())
    }

    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        let mut running = self.lock();
        let running = running.as_mut().ok_or_else(not_started)?;
        let handed_out = running.handed_out.get_mut(block.as_usize()).map(|out| std::mem::replace(out, true));
        if handed_out == Some(true) {
            return Err(DirtyError::kernel(
                NAME,
                "sync",
                io::Error::other("a block is asked once after each begin_sync"),
            ));
        }
        if let Some(taken) = running.taken.get_mut(block.as_usize()).filter(|taken| taken.count() > 0) {
            into.merge_words(0, taken.words());
            taken.clear_range(0..u64::MAX);
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        if self.lock().take().is_some() {
            IN_USE.store(false, Ordering::Release);
        }
        Ok(())
    }
}

impl Drop for SoftDirty {
    fn drop(&mut self) {
        // There is no caller to return an error to, and nothing here fails.
        drop(self.stop());
    }
}

/// Writes one of two scratch pages after a clear and checks that it is reported.
fn probe_scratch() -> Result<(), DirtyError> {
    let failed = |what: &'static str| {
        move |error: io::Error| DirtyError::unsupported(NAME, format!("{what}: {error}"))
    };
    let bits = SoftDirtyBits::open().map_err(failed("/proc/self/pagemap and clear_refs"))?;
    let page = rustix::param::page_size();
    let scratch = Mapping::anonymous(2 * page as u64)
        .map_err(|error| DirtyError::unsupported(NAME, Chain(&error).to_string()))?;
    let touch = |at: usize| {
        let byte = scratch
            .region()
            .span(at as u64, 1)
            .map_err(|error| DirtyError::unsupported(NAME, Chain(&error).to_string()))?;
        byte.copy_from(&[1]);
        Ok(())
    };
    let start = scratch.region().address();
    let read_bits = || {
        let mut seen = Vec::new();
        let read = bits.read(start..start + 2 * page, |range| seen.push(range));
        read.map(|()| seen).map_err(failed("/proc/self/pagemap"))
    };
    touch(0)?;
    touch(page)?;
    bits.clear_all().map_err(failed("/proc/self/clear_refs"))?;
    let before = read_bits()?;
    touch(page)?;
    let after = read_bits()?;
    let expected = start + page..start + 2 * page;
    match (before.as_slice(), after.as_slice()) {
        ([], [seen]) if *seen == expected => Ok(()),
        ([], []) => Err(DirtyError::unsupported(
            NAME,
            "the kernel takes the clear and then reports no write; it needs CONFIG_MEM_SOFT_DIRTY=y"
                .to_owned(),
        )),
        _ => Err(DirtyError::unsupported(
            NAME,
            format!("the second of two pages was written, but {before:x?} and then {after:x?} were reported"),
        )),
    }
}

fn not_started() -> DirtyError {
    DirtyError::kernel(NAME, "sync", io::Error::other("tracking was not started"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::RwLock;

    use super::*;
    use crate::guest::MappedGuest;
    use crate::guest::race::{Follower, guest_of, race, store};
    use crate::ram::PageRun;
    use crate::sys::testing::has_huge_pages;
    use crate::units::PageIndex;

    /// Writers write under the read lock; the stop takes the write lock.
    #[derive(Default)]
    struct Turnstile(RwLock<()>);

    impl PauseWriters for Turnstile {
        fn paused(&self, during: &mut dyn FnMut()) -> io::Result<()> {
            let _nobody_writes = self.0.write().unwrap();
            during();
            Ok(())
        }
    }

    fn source_over(mappings: &[Mapping]) -> (MappedGuest, Arc<Turnstile>, SoftDirty) {
        let (guest, turnstile) = (guest_of(mappings), Arc::new(Turnstile::default()));
        let source = SoftDirty::new(&guest, turnstile.clone());
        (guest, turnstile, source)
    }

    /// Kernels of current distributions differ in this; a kernel without the bits must be detected.
    #[test]
    fn the_probe_passes_or_names_the_missing_option() {
        let (_, _, source) = source_over(&[Mapping::anonymous(8192).unwrap()]);
        if let Err(error) = source.probe() {
            assert!(error.to_string().contains("CONFIG_MEM_SOFT_DIRTY=y"), "{error}");
        }
    }

    /// Debian's kernel has the bits. The tests run one after the other: the bits belong to the process.
    mod in_rxe_guest {
        use super::*;

        #[test]
        #[ignore = "runs in ci/rxe-guest"]
        fn racing_writers_lose_nothing() {
            let blocks = [8 << 20, 37 << 12].map(|len| Mapping::anonymous(len).unwrap());
            let (guest, turnstile, source) = source_over(&blocks);
            source.probe().unwrap();
            let write = |run, stamp| {
                let _holdable = turnstile.0.read().unwrap();
                store(&guest, run, stamp);
            };
            let outcome = race(&guest, &[Arc::new(source)], 4, &write).unwrap();
            assert!(outcome.lost == 0 && outcome.reported > 0, "{outcome:?}");
        }

        #[test]
        #[ignore = "runs in ci/rxe-guest"]
        fn bits_of_all_blocks_are_taken_together_and_once() {
            let blocks = [64 << 12, 64 << 12].map(|len| Mapping::anonymous(len).unwrap());
            let (guest, _, source) = source_over(&blocks);
            let run = |block, page| PageRun { block: BlockIndex(block), first: PageIndex(page), pages: 1 };
            source.start().unwrap();
            let sources: [Arc<dyn DirtySource>; 1] = [Arc::new(source)];
            let mut follower = Follower::new(&guest);
            follower.copy_all();
            store(&guest, run(0, 5), [2; 16]);
            store(&guest, run(1, 63), [3; 16]);
            // Two, unless a new mapping has joined the blocks.
            assert!(follower.sync(&sources).unwrap() >= 2);
            assert_eq!(follower.differing(), 0);
            assert!((0..5).any(|_| follower.sync(&sources).unwrap() == 0), "a write is reported once");
            let mut map = PageBitmap::new(64);
            assert!(sources[0].sync_into(BlockIndex(0), &mut map).is_err(), "without begin_sync");
            let second = SoftDirty::new(&guest, Arc::new(Turnstile::default()));
            assert!(second.start().unwrap_err().to_string().contains("one at a time"));
            second.probe().unwrap();
        }

        /// Why the writers must be stopped.
        #[test]
        #[ignore = "runs in ci/rxe-guest"]
        fn a_write_between_reading_and_clearing_leaves_no_mark() {
            let (guest, _, source) = source_over(&[Mapping::anonymous(64 << 12).unwrap()]);
            source.probe().unwrap();
            let run = PageRun { block: BlockIndex(0), first: PageIndex(7), pages: 1 };
            store(&guest, run, [1; 16]);
            let bits = SoftDirtyBits::open().unwrap();
            let start = guest.region(BlockIndex(0)).unwrap().address();
            let mut seen = Vec::new();
            bits.clear_all().unwrap();
            bits.read(start..start + (64 << 12), |pages| seen.push(pages)).unwrap();
            store(&guest, run, [4; 16]);
            bits.clear_all().unwrap();
            bits.read(start..start + (64 << 12), |pages| seen.push(pages)).unwrap();
            assert!(seen.is_empty(), "{seen:x?}");
        }
    }

    #[test]
    fn memory_without_reliable_bits_is_refused() {
        let huge = has_huge_pages(PageSize::SIZE_2M, 16)
            .then(|| (Mapping::anonymous_huge(2 << 20, PageSize::SIZE_2M).unwrap(), "huge pages"));
        let shared = (Mapping::memfd("ram", 4096).unwrap(), "shared");
        for (mapping, why) in std::iter::once(shared).chain(huge) {
            let source = SoftDirty::new(&guest_of(&[mapping]), Arc::new(Turnstile::default()));
            let error = source.probe().unwrap_err().to_string();
            assert!(error.contains("RAM block b0") && error.contains(why), "{error}");
        }
    }
}
