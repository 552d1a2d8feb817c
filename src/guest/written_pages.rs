//! Written pages by write protection that the kernel removes by itself: any memory of this process.
//!
//! Reports every write through the tracked process's page tables: by its threads, by system calls that fill its memory,
//! and by KVM vCPUs (whose second-level tables follow). It does not report a write by another process to shared memory
//! through its own mapping, nor one by a device to pinned pages: those need a source of their own
//! ([`SoftwareBitmap`](super::SoftwareBitmap), a vhost log).
//!
//! The kernel reads the marks and protects again in one step, so that a write is in this sync or in the next; nothing
//! needs to be cleared later ([`reprotect`](DirtySource::reprotect) does nothing). The unit is the host page: one write
//! to a 2 MiB huge page reports its 512 target pages. Transparent huge pages are split on the first write. Page tables
//! of the whole range are created at the start, 2 MiB per GiB, as the first round of a migration would do anyway.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use super::dirty::{NoRegion, regions_of};
use super::sources::no_proc;
use super::{DirtyError, DirtySource, GuestMemory};
use crate::error::Chain;
use crate::ram::{PageBitmap, RamBlock};
use crate::sys::{HostRegion, Lock as _, Mapping, Pagemap, UffdError, WriteProtector};
use crate::units::{BlockIndex, PageSize};

const NAME: &str = "uffd-wp";

/// Dirty source over asynchronous userfaultfd write protection and PAGEMAP_SCAN (Linux 6.7).
#[derive(Debug)]
pub struct WrittenPages {
    blocks: Vec<Option<Tracked>>,
    no_region: NoRegion,
    page: PageSize,
    /// Another process's descriptors, if they were passed in.
    given: Option<Arc<Armed>>,
    armed: Mutex<Option<Arc<Armed>>>,
}

/// A block as the tracked process maps it.
#[derive(Debug)]
struct Tracked {
    block: String,
    /// Keeps the memory mapped while it is protected.
    _region: HostRegion,
    range: Range<usize>,
    host_page: PageSize,
}

#[derive(Debug)]
struct Armed {
    protector: WriteProtector,
    pagemap: Pagemap,
}

impl WrittenPages {
    /// Tracks the blocks of `guest` in this process. [`probe`](DirtySource::probe) refuses a block without a
    /// [`region`](GuestMemory::region).
    pub fn new(guest: &dyn GuestMemory) -> Self {
        Self::build(guest, None)
    }

    /// Tracks the blocks in another process, at their [`tracked_address`](HostRegion::tracked_address).
    ///
    /// `uffd` is a descriptor that process created with the features of `WriteProtector::new`; `pagemap` is its open
    /// `/proc/PID/pagemap`.
    pub fn of_process(guest: &dyn GuestMemory, uffd: OwnedFd, pagemap: OwnedFd) -> Self {
        let armed = Armed { protector: WriteProtector::adopt(uffd), pagemap: Pagemap::adopt(pagemap) };
        Self::build(guest, Some(Arc::new(armed)))
    }

    fn build(guest: &dyn GuestMemory, given: Option<Arc<Armed>>) -> Self {
        let elsewhere = given.is_some();
        let tracked = |block: &RamBlock, region: HostRegion| {
            let start = if elsewhere { region.tracked_address() } else { region.address() };
            // The kernel protects whole host pages; a mapping always ends on one.
            let len = block.max_length.min(region.len()).next_multiple_of(region.page().bytes());
            let range = start..start.saturating_add(len as usize);
            Tracked { block: block.name.to_string(), host_page: region.page(), _region: region, range }
        };
        let (blocks, no_region) = regions_of(guest, tracked);
        Self { blocks, no_region, page: guest.table().page(), given, armed: Mutex::new(None) }
    }

    fn tracked(&self) -> impl Iterator<Item = &Tracked> {
        self.blocks.iter().flatten()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Armed>>> {
        self.armed.locked()
    }

    fn open(&self) -> Result<Arc<Armed>, DirtyError> {
        self.no_region.check(NAME)?;
        match &self.given {
            Some(given) => Ok(given.clone()),
            None => Ok(Arc::new(open_own()?)),
        }
    }
}

impl DirtySource for WrittenPages {
    fn name(&self) -> &'static str {
        NAME
    }

    fn probe(&self) -> Result<(), DirtyError> {
        self.no_region.check(NAME)?;
        probe_own_memory()?;
        for tracked in self.tracked() {
            let page = tracked.host_page;
            if !page.divides(tracked.range.start as u64) {
                let start = tracked.range.start;
                let reason = format!(
                    "RAM block {} starts at {start:#x}, not at one of its {page} pages",
                    tracked.block
                );
                return Err(DirtyError::unsupported(NAME, reason));
            }
        }
        Ok(())
    }

    fn start(&self) -> Result<(), DirtyError> {
        self.stop()?;
        let armed = self.open()?;
        // From here on stop() reverts this, also if a later block fails.
        *self.lock() = Some(armed.clone());
        let arm = |tracked: &Tracked| {
            let range = tracked.range.clone();
            armed.protector.register(range.clone()).map_err(|error| refused(tracked, &error))?;
            armed
                .protector
                .protect(range.clone())
                .map_err(|error| DirtyError::kernel(NAME, "protecting pages", error))?;
            let first = range.start..range.start + tracked.host_page.bytes() as usize;
            armed.pagemap.check(first).map_err(|error| refused(tracked, &error))
        };
        self.tracked().try_for_each(arm).inspect_err(|_| drop(self.stop()))
    }

    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        let Some(tracked) = self.blocks.get(block.as_usize()).and_then(Option::as_ref) else { return Ok(()) };
        let armed = self.lock().clone();
        let armed = armed
            .ok_or_else(|| DirtyError::kernel(NAME, "sync", io::Error::other("tracking was not started")))?;
        let start = tracked.range.start;
        let page = self.page;
        let taken = armed.pagemap.take_written(tracked.range.clone(), |written| {
            let first = (written.start - start) as u64 >> page.shift();
            into.set_range(first..page.pages_in((written.end - start) as u64));
        });
        taken.map_err(|error| DirtyError::kernel(NAME, "PAGEMAP_SCAN", error))
    }

    fn stop(&self) -> Result<(), DirtyError> {
        let Some(armed) = self.lock().take() else { return Ok(()) };
        if self.given.is_none() {
            // The last descriptor to be dropped removes protection and registration; a sync in progress ends first.
            return Ok(());
        }
        let results = self.tracked().map(|tracked| armed.protector.unregister(tracked.range.clone()));
        // All are tried before the first error is returned.
        let results: Vec<_> = results.collect();
        results
            .into_iter()
            .collect::<io::Result<()>>()
            .map_err(|error| DirtyError::kernel(NAME, "taking protection off", error))
    }
}

impl Drop for WrittenPages {
    fn drop(&mut self) {
        // There is no caller to return the error to.
        drop(self.stop());
    }
}

fn open_own() -> Result<Armed, DirtyError> {
    let protector = WriteProtector::new()
        .map_err(|error: UffdError| DirtyError::unsupported(NAME, Chain(&error).to_string()))?;
    let pagemap = Pagemap::own().map_err(|error| {
        DirtyError::unsupported(
            NAME,
            format!("/proc/self/pagemap: {error}; {}", no_proc(&error, "mount /proc in the sandbox")),
        )
    })?;
    Ok(Armed { protector, pagemap })
}

/// Writes one of two scratch pages and checks that it is reported.
fn probe_own_memory() -> Result<(), DirtyError> {
    let armed = open_own()?;
    let page = rustix::param::page_size();
    let scratch = Mapping::anonymous(2 * page as u64)
        .map_err(|error| DirtyError::unsupported(NAME, Chain(&error).to_string()))?;
    let start = scratch.region().address();
    let range = start..start + 2 * page;
    let step = |what: &'static str| {
        move |error: io::Error| DirtyError::unsupported(NAME, format!("{what}: {error}"))
    };
    armed.protector.register(range.clone()).map_err(step("UFFDIO_REGISTER of anonymous memory"))?;
    armed.protector.protect(range.clone()).map_err(step("UFFDIO_WRITEPROTECT of anonymous memory"))?;
    let second = scratch
        .region()
        .span(page as u64, 1)
        .map_err(|error| DirtyError::unsupported(NAME, Chain(&error).to_string()))?;
    second.copy_from(&[1]);
    let scan = || {
        let mut found = Vec::new();
        let taken = armed.pagemap.take_written(range.clone(), |written| found.push(written));
        taken.map(|()| found).map_err(step("PAGEMAP_SCAN, which Linux 6.7 brought"))
    };
    let (first, again) = (scan()?, scan()?);
    let expected = start + page..range.end;
    if first.as_slice() != std::slice::from_ref(&expected) || !again.is_empty() {
        return Err(DirtyError::unsupported(
            NAME,
            format!("of two pages the second was written, but {first:x?} and then {again:x?} were reported"),
        ));
    }
    Ok(())
}

fn refused(tracked: &Tracked, error: &io::Error) -> DirtyError {
    let remedy = match error.raw_os_error() {
        Some(libc::EBUSY) => "another userfaultfd watches it: end that snapshot or postcopy first",
        Some(libc::EPERM) => "the userfaultfd was made without asynchronous write protection",
        Some(libc::ENOMEM) => "page tables need 2 MiB of free memory for each GiB of RAM",
        _ => "the memory must be mapped writable for its whole length",
    };
    DirtyError::unsupported(NAME, format!("RAM block {}: {error}; {remedy}", tracked.block))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::fd::AsFd;

    use super::*;
    use crate::guest::race::{guest_of, race, store};
    use crate::ram::PageRun;
    use crate::sys::testing::{has_huge_pages, has_userfaultfd};
    use crate::sys::{RecvPart, recv_parts};
    use crate::units::PageIndex;

    fn pages(map: &PageBitmap) -> Vec<u64> {
        (0..map.len()).filter(|page| map.get(PageIndex(*page))).collect()
    }

    fn sync(source: &WrittenPages, block: u32, len: u64) -> PageBitmap {
        let mut map = PageBitmap::new(len);
        source.sync_into(BlockIndex(block), &mut map).unwrap();
        map
    }

    fn every_backing() -> Vec<(&'static str, Mapping)> {
        const MIB: u64 = 1 << 20;
        let on_disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let in_shm = tempfile::tempfile_in("/dev/shm").unwrap();
        let mut every = vec![
            ("anonymous", Mapping::anonymous(12 * MIB + 4096).unwrap()),
            ("memfd", Mapping::memfd("ram", 12 * MIB + 4096).unwrap()),
            ("file on tmpfs", Mapping::file_grown(in_shm.into(), 4096, 12 * MIB + 4096, false).unwrap()),
            ("file on disk", Mapping::file_grown(on_disk.into(), 4096, 12 * MIB + 4096, true).unwrap()),
        ];
        if has_huge_pages(PageSize::SIZE_2M, 16) {
            every.extend([
                ("huge anonymous", Mapping::anonymous_huge(8 * MIB, PageSize::SIZE_2M).unwrap()),
                ("huge memfd", Mapping::memfd_huge("ram", 8 * MIB, PageSize::SIZE_2M).unwrap()),
            ]);
        }
        every
    }

    #[test]
    fn the_probe_passes_on_this_kernel() {
        if !has_userfaultfd() {
            return;
        }
        let guest = guest_of(&[Mapping::anonymous(8192).unwrap()]);
        WrittenPages::new(&guest).probe().unwrap();
    }

    /// A kernel before 6.7 (Debian's 6.1) is detected and named.
    mod in_rxe_guest {
        use super::*;

        #[test]
        #[ignore = "runs in ci/rxe-guest"]
        fn the_probe_names_the_kernel_it_needs() {
            let guest = guest_of(&[Mapping::anonymous(8192).unwrap()]);
            let source = WrittenPages::new(&guest);
            for error in [source.probe().unwrap_err(), source.start().unwrap_err()] {
                assert!(error.to_string().contains("Linux 6.7 or later"), "{error}");
            }
        }
    }

    /// Exactly the written host pages are reported, once, whether populated before the start or not.
    #[test]
    fn each_write_is_reported_once_on_every_backing() {
        if !has_userfaultfd() {
            return;
        }
        for (what, mapping) in every_backing() {
            let guest = guest_of(std::slice::from_ref(&mapping));
            let len = mapping.region().len() / 4096;
            let populated = mapping.region().span(0, 4 << 20).unwrap();
            populated.copy_from(&vec![1; 4 << 20]);
            let source = WrittenPages::new(&guest);
            for round in 0..2 {
                source.start().unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(sync(&source, 0, len).count(), 0, "{what}, round {round}: nothing written yet");
                let written = [3, 700, 1500, len - 1];
                for page in written {
                    mapping.region().span(page * 4096 + 17, 1).unwrap().copy_from(&[9]);
                }
                let per_page = mapping.region().page().bytes() / 4096;
                let mut expected: Vec<u64> = written.iter().map(|page| page / per_page).collect();
                expected.dedup();
                let expected: Vec<u64> =
                    expected.iter().flat_map(|page| page * per_page..(page + 1) * per_page).collect();
                assert_eq!(pages(&sync(&source, 0, len)), expected, "{what}, round {round}");
                assert_eq!(sync(&source, 0, len).count(), 0, "{what}, round {round}: reported once");
                source.stop().unwrap();
                source.stop().unwrap();
            }
        }
    }

    #[test]
    fn a_system_call_that_fills_guest_memory_is_seen() {
        if !has_userfaultfd() {
            return;
        }
        let mapping = Mapping::memfd("ram", 8 * 4096).unwrap();
        let guest = guest_of(std::slice::from_ref(&mapping));
        let source = WrittenPages::new(&guest);
        source.start().unwrap();
        let (mut far, near) = std::os::unix::net::UnixStream::pair().unwrap();
        std::io::Write::write_all(&mut far, &[7; 4096]).unwrap();
        drop(far);
        let mut part = RecvPart::Guest(mapping.region().span(5 * 4096, 4096).unwrap());
        let got = recv_parts(near.as_fd(), std::slice::from_mut(&mut part)).unwrap();
        assert_eq!((got, pages(&sync(&source, 0, 8))), (4096, vec![5]));
    }

    #[test]
    fn racing_writers_lose_nothing_on_any_backing() {
        if !has_userfaultfd() {
            return;
        }
        for (what, mapping) in every_backing() {
            let second = Mapping::memfd("odd", 37 * 4096).unwrap();
            let guest = guest_of(&[mapping, second]);
            let source: Arc<dyn DirtySource> = Arc::new(WrittenPages::new(&guest));
            let outcome = race(&guest, &[source], 3, &|run, stamp| store(&guest, run, stamp)).unwrap();
            assert_eq!(outcome.lost, 0, "{what}: {outcome:?}");
            assert!(outcome.reported > 0, "{what}: {outcome:?}");
        }
    }

    /// The race test can fail: a source that omits one written page in a hundred is detected.
    #[test]
    fn the_race_finds_a_source_that_forgets() {
        if !has_userfaultfd() {
            return;
        }
        struct Forgetful(WrittenPages, std::sync::atomic::AtomicU64);
        impl DirtySource for Forgetful {
            fn name(&self) -> &'static str {
                "forgetful"
            }
            fn probe(&self) -> Result<(), DirtyError> {
                self.0.probe()
            }
            fn start(&self) -> Result<(), DirtyError> {
                self.0.start()
            }
            fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
                let mut found = PageBitmap::new(into.len());
                self.0.sync_into(block, &mut found)?;
                for page in pages(&found) {
                    if self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 100 != 99 {
                        into.set_range(page..page + 1);
                    }
                }
                Ok(())
            }
            fn stop(&self) -> Result<(), DirtyError> {
                self.0.stop()
            }
        }
        let guest = guest_of(&[Mapping::anonymous(4 << 20).unwrap()]);
        let source: Arc<dyn DirtySource> = Arc::new(Forgetful(WrittenPages::new(&guest), 0.into()));
        let outcome = race(&guest, &[source], 1, &|run, stamp| store(&guest, run, stamp)).unwrap();
        assert!(outcome.lost > 0, "{outcome:?}");
    }

    #[test]
    fn memory_that_is_watched_already_is_refused_and_left_as_it_was() {
        if !has_userfaultfd() {
            return;
        }
        let mapping = Mapping::anonymous(8192).unwrap();
        let free = Mapping::anonymous(8192).unwrap();
        let other = WriteProtector::new().unwrap();
        let start = mapping.region().address();
        other.register(start..start + 8192).unwrap();
        let guest = guest_of(&[free.clone(), mapping]);
        let source = WrittenPages::new(&guest);
        let error = source.start().unwrap_err().to_string();
        assert!(error.contains("RAM block b1") && error.contains("end that snapshot"), "{error}");
        let run = PageRun { block: BlockIndex(0), first: PageIndex(0), pages: 1 };
        store(&guest, run, [1; 16]);
        // The first block was released: another descriptor may track it.
        let start = free.region().address();
        other.register(start..start + 8192).unwrap();
        let mut map = PageBitmap::new(2);
        assert!(source.sync_into(BlockIndex(0), &mut map).is_err());
    }
}
