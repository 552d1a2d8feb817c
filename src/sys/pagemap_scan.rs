//! Which pages were written, and which are present: the PAGEMAP_SCAN call on /proc/PID/pagemap (Linux 6.7).
//!
//! # Source
//! linux/fs.h (`struct pm_scan_arg`) and the kernel's admin-guide/mm/pagemap.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::ioctl::opcode;

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// The same two in an entry of the file, which every kernel has.
const ENTRY_IS_THERE: u64 = 3 << 62;
/// Number of entries per read.
const ENTRIES: usize = 4096;
const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 2;

/// Number of regions in one call: as many as the kernel gathers before it copies them out (512 on x86-64). With room
/// for more, the kernel continues by itself, but then returns as the end of its walk the place where it last copied,
/// and the rest from there on would be walked twice.
const REGIONS: usize = 512;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// The page map of a process, queried for written pages. Addresses are that process's.
#[derive(Debug)]
pub(crate) struct Pagemap {
    fd: OwnedFd,
}

impl Pagemap {
    /// The page map of this process.
    ///
    /// # Errors
    /// EACCES or ENOENT if /proc is hidden.
    pub(crate) fn own() -> io::Result<Self> {
        Ok(Self { fd: File::open("/proc/self/pagemap")?.into() })
    }

    /// An open /proc/PID/pagemap of any process.
    pub(crate) fn adopt(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Calls `each` with every written range of `range` and protects it again, both in one step under the page table's
    /// lock: a write is either reported now or in the next call.
    ///
    /// # Errors
    /// EPERM if a part of `range` is not under asynchronous write protection, ENOTTY before Linux 6.7. Pages reported
    /// before the error are protected again and not reported a second time.
    pub(crate) fn take_written(
        &self,
        range: Range<usize>,
        mut each: impl FnMut(Range<usize>),
    ) -> io::Result<()> {
        let mut regions = vec![PageRegion::default(); REGIONS];
        let mut at = range.start as u64;
        while at < range.end as u64 {
            let flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC;
            let (found, walked) = self.scan(flags, at..range.end as u64, &mut regions)?;
            for region in regions.iter().take(found) {
                each(region.start as usize..region.end as usize);
            }
            if walked <= at {
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            at = walked;
        }
        Ok(())
    }

    /// Checks, without changing anything, whether `range` can be tracked.
    ///
    /// # Errors
    /// As [`take_written`](Self::take_written).
    pub(crate) fn check(&self, range: Range<usize>) -> io::Result<()> {
        let range = range.start as u64..range.end as u64;
        self.scan(PM_SCAN_CHECK_WPASYNC, range, &mut [PageRegion::default()]).map(drop)
    }

    /// Calls `each` with every range of `range` that has pages, in memory or swapped out, in order. All other pages of
    /// private anonymous memory are zero.
    ///
    /// # Errors
    /// The kernel's error; ranges that were reported before remain valid.
    pub(crate) fn present(&self, range: Range<usize>, mut each: impl FnMut(Range<usize>)) -> io::Result<()> {
        let mut regions = vec![PageRegion::default(); REGIONS];
        let mut at = range.start as u64;
        while at < range.end as u64 {
            let there = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
            let arg = ScanArg { category_anyof_mask: there, return_mask: there, ..ScanArg::default() };
            let (found, walked) = match self.call(arg, at..range.end as u64, &mut regions) {
                // An older kernel.
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                    return self.present_by_entry(at as usize..range.end, each);
                }
                other => other?,
            };
            for region in regions.iter().take(found) {
                each(region.start as usize..region.end as usize);
            }
            if walked <= at {
                return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
            }
            at = walked;
        }
        Ok(())
    }

    /// The same by reading an entry of 8 bytes for each page.
    fn present_by_entry(&self, range: Range<usize>, mut each: impl FnMut(Range<usize>)) -> io::Result<()> {
        let page = rustix::param::page_size();
        let mut bytes = vec![0; ENTRIES * 8];
        let mut at = range.start / page;
        let end = range.end.div_ceil(page);
        while at < end {
            let want = (end - at).min(ENTRIES) * 8;
            let got = rustix::io::pread(&self.fd, &mut bytes[..want], at as u64 * 8)? / 8;
            if got == 0 {
                return Err(io::Error::other("the page map ends early"));
            }
            for entry in bytes[..got * 8].chunks_exact(8) {
                let entry = entry.try_into().map_or(u64::MAX, u64::from_ne_bytes);
                if entry & ENTRY_IS_THERE != 0 {
                    each((at * page).max(range.start)..((at + 1) * page).min(range.end));
                }
                at += 1;
            }
        }
        Ok(())
    }

    /// One call for written pages: how many regions were filled, and where the walk ended.
    fn scan(&self, flags: u64, range: Range<u64>, regions: &mut [PageRegion]) -> io::Result<(usize, u64)> {
        let arg = ScanArg {
            flags,
            // Only exactly this mask takes the kernel's fast path, on which a missing page counts as written: shared
            // memory that reclaim unmapped keeps its mark.
            category_mask: PAGE_IS_WRITTEN,
            return_mask: PAGE_IS_WRITTEN,
            ..ScanArg::default()
        };
        self.call(arg, range, regions)
    }

    fn call(&self, arg: ScanArg, range: Range<u64>, regions: &mut [PageRegion]) -> io::Result<(usize, u64)> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            start: range.start,
            end: range.end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            ..arg
        };
        const PAGEMAP_SCAN: rustix::ioctl::Opcode = opcode::read_write::<ScanArg>(b'f', 16);
        // SAFETY: PAGEMAP_SCAN reads and writes one struct pm_scan_arg, whose layout ScanArg has, and writes
        // at most vec_len regions at vec, which is borrowed mutably for the call.
        let found = unsafe { libc::ioctl(self.fd.as_raw_fd(), PAGEMAP_SCAN as _, &mut arg) };
        // Only a signal that kills interrupts the call, so there is no retry.
        let found = usize::try_from(found).map_err(|_| io::Error::last_os_error())?;
        Ok((found.min(regions.len()), arg.walk_end))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::{Mapping, WriteProtector};

    /// Both methods return the same, for runs of any length.
    #[test]
    fn pages_that_are_there_are_found_by_call_and_by_entry() {
        let page = rustix::param::page_size();
        let pages = 2 * ENTRIES + 100;
        let memory = Mapping::anonymous((pages * page) as u64).unwrap();
        let start = memory.region().address();
        let range = start..start + pages * page;
        let wanted: Vec<usize> = (0..pages).filter(|at| at % 97 < at / 97 || *at == pages - 1).collect();
        for at in &wanted {
            memory.region().span((at * page) as u64, 1).unwrap().copy_from(&[1]);
        }
        let pagemap = Pagemap::own().unwrap();
        let all = |found: Vec<Range<usize>>| -> Vec<usize> {
            found.into_iter().flat_map(|run| (run.start - start) / page..(run.end - start) / page).collect()
        };
        let (mut by_call, mut by_entry) = (Vec::new(), Vec::new());
        pagemap.present(range.clone(), |run| by_call.push(run)).unwrap();
        pagemap.present_by_entry(range.clone(), |run| by_entry.push(run)).unwrap();
        let (by_call, by_entry) = (all(by_call), all(by_entry));
        assert_eq!(by_call, by_entry);
        // The kernel may have used larger pages than requested.
        assert!(wanted.iter().all(|at| by_call.contains(at)));
    }

    /// With less room than there are runs, a call stops where its room ends; with room left it has walked the whole
    /// range. So no part is walked twice, which took a quarter of a sync with a thousand runs.
    #[test]
    fn no_part_is_walked_twice() {
        let page = rustix::param::page_size();
        let runs = 2 * REGIONS - 24;
        let memory = Mapping::anonymous((2 * runs * page) as u64).unwrap();
        let start = memory.region().address();
        let range = start..start + 2 * runs * page;
        let protector = WriteProtector::new().unwrap();
        protector.register(range.clone()).unwrap();
        protector.protect(range.clone()).unwrap();
        for run in 0..runs {
            memory.region().span((2 * run * page) as u64, 1).unwrap().copy_from(&[1]);
        }
        let pagemap = Pagemap::own().unwrap();
        let mut regions = vec![PageRegion::default(); REGIONS];
        let end = range.end as u64;
        let (found, walked) =
            pagemap.scan(PM_SCAN_WP_MATCHING, range.start as u64..end, &mut regions).unwrap();
        assert_eq!(found, REGIONS);
        assert!(walked >= regions[REGIONS - 1].end && walked < end);
        let (found, walked) = pagemap.scan(PM_SCAN_WP_MATCHING, walked..end, &mut regions).unwrap();
        assert_eq!((found, walked), (runs - REGIONS, end));
    }
}
