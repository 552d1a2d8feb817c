//! Which parts of a mapping may hold data: memory that was never written reads as zero.
//!
//! # Source
//! The kernel's admin-guide/mm/pagemap (bits 62 and 63 of an entry), proc(5) (`maps`), lseek(2) (`SEEK_DATA`: a page
//! that is swapped out counts as data, which mincore(2) does not report).

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fstat, fstatfs, seek};
use rustix::io::{Errno, pread};

use super::mapping::HUGETLBFS_MAGIC;
use super::{HostRegion, Pagemap};

/// The backing of mapped memory.
#[derive(Clone, Debug, Default)]
pub(super) enum Backing {
    /// Another owner mapped it, and its backing is unknown.
    #[default]
    Unknown,
    /// None: private memory that is zero until it is written.
    Anonymous,
    /// A shared mapping of a file, from this offset on.
    File(Arc<OwnedFd>, u64),
}

impl HostRegion {
    /// Calls `each` with every range of the region, in order, that may hold anything other than zeros. The rest was
    /// never written since it was mapped. It neither allocates nor reads memory.
    ///
    /// If the kernel can't report it (shared memory whose file is not known, a hidden /proc), this is the whole region.
    pub fn touched(&self, each: impl FnMut(Range<u64>)) {
        self.touched_in(0..self.len(), each);
    }

    /// The same for a part of the region, in whole pages; ranges are offsets in the region.
    pub(crate) fn touched_in(&self, part: Range<u64>, mut each: impl FnMut(Range<u64>)) {
        let part = part.start.min(self.len())..part.end.min(self.len());
        if let Err(error) = self.ask_for_touched(part.clone(), &mut each) {
            tracing::debug!(%error, region = ?self, "all memory counts as used, since the kernel does not report it");
            each(part);
        }
    }

    fn ask_for_touched(&self, part: Range<u64>, each: &mut impl FnMut(Range<u64>)) -> io::Result<()> {
        let base = self.address();
        let range = base + part.start as usize..base + part.end as usize;
        match self.backing() {
            Backing::File(file, start) => {
                let in_file = start.saturating_add(part.start)..start.saturating_add(part.end);
                let mut each = |found: Range<u64>| each(part.start + found.start..part.start + found.end);
                return data_of(file.as_fd(), in_file, &mut each);
            }
            Backing::Unknown if !is_private_anonymous(&range)? => {
                return Err(io::Error::other("the file behind shared memory is not known"));
            }
            Backing::Unknown | Backing::Anonymous => {}
        }
        Pagemap::own()?.present(range, |found| each((found.start - base) as u64..(found.end - base) as u64))
    }
}

/// Calls `each` with the data of `range` of a file, counted from its start.
fn data_of(file: BorrowedFd<'_>, range: Range<u64>, each: &mut impl FnMut(Range<u64>)) -> io::Result<()> {
    // This file system does not report holes, but reports how many pages a file has.
    if fstatfs(file)?.f_type == HUGETLBFS_MAGIC && fstat(file)?.st_blocks == 0 {
        return Ok(());
    }
    let before = seek(file, SeekFrom::Current(0))?;
    let found = walk_data(file, range, each);
    // The position is shared by all users of the descriptor.
    seek(file, SeekFrom::Start(before))?;
    found
}

fn walk_data(file: BorrowedFd<'_>, range: Range<u64>, each: &mut impl FnMut(Range<u64>)) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) if data < range.end => data,
            Ok(_) | Err(Errno::NXIO) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        let hole = seek(file, SeekFrom::Hole(data))?.min(range.end);
        if hole <= data {
            return Err(io::Error::other("SEEK_HOLE made no progress"));
        }
        each(data - range.start..hole - range.start);
        at = hole;
    }
    Ok(())
}

/// Frees the space that zeros occupy in the first `len` bytes of `file`, whether reserved (fallocate(2)) or written;
/// returns the number of bytes. Reads return zeros as before. No other writer may write to the file meanwhile.
///
/// It reads what SEEK_DATA reports as data: this includes pages of the page cache that only reads have created.
///
/// # Errors
/// The file system's error; a file system without support has usually reserved nothing.
pub fn release_zeros(file: impl AsFd, len: u64) -> io::Result<u64> {
    const PIECE: usize = 64 << 10;
    static ZEROS: [u8; PIECE] = [0; PIECE];
    let (mut zeros, mut at) = (Vec::new(), 0);
    let mut data_ranges = Vec::new();
    data_of(file.as_fd(), 0..len, &mut |data| {
        zeros.push(at..data.start);
        at = data.end;
        data_ranges.push(data);
    })?;
    zeros.push(at..len);
    let mut buffer = vec![0; PIECE];
    for data in data_ranges {
        for start in data.clone().step_by(PIECE) {
            let end = data.end.min(start + PIECE as u64);
            let piece = &mut buffer[..(end - start) as usize];
            let mut got = 0;
            while got < piece.len() {
                match pread(file.as_fd(), &mut piece[got..], start + got as u64) {
                    Ok(0) => break,
                    Ok(count) => got += count,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
            if got == piece.len() && *piece == ZEROS[..got] {
                match zeros.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => zeros.push(start..end),
                }
            }
        }
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let mut released = 0;
    for range in zeros.into_iter().filter(|range| !range.is_empty()) {
        fallocate(file.as_fd(), flags, range.start, range.end - range.start)?;
        released += range.end - range.start;
    }
    Ok(released)
}

/// True if all of `range` is private memory without a backing file, by /proc/self/maps.
fn is_private_anonymous(range: &Range<usize>) -> io::Result<bool> {
    covers(BufReader::new(File::open("/proc/self/maps")?), range, |inode, _| inode == "0")
}

/// True if all of `range` is private memory in huge pages without a file of its own, by /proc/self/maps.
pub(super) fn is_private_huge(range: &Range<usize>) -> io::Result<bool> {
    let maps = BufReader::new(File::open("/proc/self/maps")?);
    covers(maps, range, |_, path| path.is_some_and(|path| path.starts_with("/anon_hugepage")))
}

/// True if all of `range` is private memory with the given `inode` and path. `maps` has lines as `7f00-7f40 rw-p
/// 00000000 00:00 0    [heap]`.
fn covers(
    maps: impl BufRead,
    range: &Range<usize>,
    is_meant: impl Fn(&str, Option<&str>) -> bool,
) -> io::Result<bool> {
    let mut at = range.start;
    for line in maps.lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        let addresses = words.next().and_then(|word| word.split_once('-'));
        let hex = |text| usize::from_str_radix(text, 16).ok();
        let Some((Some(start), Some(end))) = addresses.map(|(start, end)| (hex(start), hex(end))) else {
            continue;
        };
        if at >= range.end || end <= at {
            continue;
        }
        let private = words.next().is_some_and(|mode| mode.ends_with('p'));
        let meant = words.nth(2).is_some_and(|inode| is_meant(inode, words.next()));
        if start > at || !private || !meant {
            return Ok(false);
        }
        at = end;
    }
    Ok(at >= range.end)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    /// Reserved but unused space is freed; written data stays.
    #[test]
    fn reserved_room_of_zeros_is_given_back() {
        const MIB: u64 = 1 << 20;
        for folder in [env!("CARGO_MANIFEST_DIR"), "/dev/shm"] {
            let file = tempfile::tempfile_in(folder).unwrap();
            let keep = file.try_clone().unwrap();
            let mapping = Mapping::file_grown(file.into(), 0, 16 * MIB, true).unwrap();
            let taken = || fstat(&keep).unwrap().st_blocks as u64 * 512;
            assert!(taken() >= 16 * MIB, "{folder}: {}", taken());
            mapping.region().span(5 * MIB, MIB).unwrap().copy_from(&vec![7; MIB as usize]);
            keep.sync_all().unwrap();
            // Reads through the mapping, and written zeros, do not turn a hole into data.
            let mut out = vec![1; 16 * MIB as usize];
            mapping.region().span(0, 16 * MIB).unwrap().copy_to(&mut out);
            mapping.region().span(9 * MIB, MIB).unwrap().copy_from(&vec![0; MIB as usize]);
            assert_eq!(release_zeros(&keep, 16 * MIB).unwrap(), 15 * MIB, "{folder}");
            assert!(taken() <= MIB + 64 * 1024, "{folder}: {}", taken());
            let mut out = vec![1; 3 * MIB as usize];
            mapping.region().span(4 * MIB, 3 * MIB).unwrap().copy_to(&mut out);
            assert_eq!(out.iter().filter(|byte| **byte == 7).count() as u64, MIB, "{folder}");
            assert_eq!(out.iter().filter(|byte| **byte == 0).count() as u64, 2 * MIB, "{folder}");
        }
    }

    use std::ptr::NonNull;

    use memmap2::{MmapMut, MmapOptions, MmapRaw};

    use super::*;
    use crate::sys::testing::huge_pages;
    use crate::sys::{Mapping, thread_page_faults};
    use crate::units::PageSize;

    const PAGE: u64 = 4096;

    /// Starts and ends.
    fn touched(region: &HostRegion) -> Vec<(u64, u64)> {
        let mut found = Vec::new();
        region.touched(|range| found.push((range.start, range.end)));
        found
    }

    fn foreign(map: MmapRaw) -> HostRegion {
        let base = NonNull::new(map.as_mut_ptr()).unwrap();
        let len = map.len();
        // SAFETY: the map lives in the Arc, and no slice of it is taken.
        unsafe { HostRegion::from_raw(base, len, PageSize::SIZE_4K, Arc::new(map)) }
    }

    fn memfd() -> OwnedFd {
        let fd = rustix::fs::memfd_create("untouched", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 4 << 20).unwrap();
        fd
    }

    /// For any owner of the mapping: written ranges are reported, no others are, and the check allocates no memory.
    #[test]
    fn only_what_was_written_may_hold_something() {
        let on_disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let cases = [
            ("anonymous", Mapping::anonymous(4 << 20).unwrap().region().clone()),
            ("memfd", Mapping::memfd("ram", 4 << 20).unwrap().region().clone()),
            ("file", Mapping::file_grown(on_disk.into(), 0, 4 << 20, true).unwrap().region().clone()),
            ("foreign anonymous", foreign(MmapMut::map_anon(4 << 20).unwrap().into())),
        ];
        for (what, region) in cases {
            let faults = thread_page_faults().unwrap();
            assert!(touched(&region).is_empty(), "{what}: {:?}", touched(&region));
            assert!(thread_page_faults().unwrap() - faults < 512, "{what}: the look touches nothing");
            for page in [0, 300, 1023] {
                region.span(page * PAGE, 1).unwrap().copy_from(&[7]);
            }
            let found = touched(&region);
            // The memory may have larger pages than base pages.
            for page in [0, 300, 1023] {
                assert!(
                    found.iter().any(|(start, end)| (*start..*end).contains(&(page * PAGE))),
                    "{what}: {found:?}"
                );
            }
            let bytes: u64 = found.iter().map(|(start, end)| end - start).sum();
            // A file system may allocate more of a file than was written.
            assert!(bytes < region.len() || what == "file", "{what}: {found:?}");
        }
    }

    #[test]
    fn what_another_mapping_of_the_file_wrote_counts() {
        let fd = memfd();
        let first = Mapping::file(fd.try_clone().unwrap(), 0, 4 << 20).unwrap();
        let second = Mapping::file(fd, 4 * PAGE, 8 * PAGE).unwrap();
        first.region().span(5 * PAGE, 1).unwrap().copy_from(&[7]);
        assert_eq!(touched(second.region()), [(PAGE, 2 * PAGE)]);
    }

    #[test]
    fn memory_that_nothing_is_known_of_is_taken_for_used() {
        let shared = MmapOptions::new().len(4 << 20).map_raw(&memfd()).unwrap();
        // SAFETY: the test does not truncate the file, and no slice of the map is taken.
        let private = unsafe { MmapOptions::new().len(4 << 20).map_copy(&memfd()).unwrap() };
        for region in [foreign(shared), foreign(private.into())] {
            assert_eq!(touched(&region), [(0, 4 << 20)]);
        }
    }

    #[test]
    fn huge_pages_are_known_too() {
        huge_pages(PageSize::SIZE_2M, 8);
        let page = PageSize::SIZE_2M;
        let private = Mapping::anonymous_huge(4 << 20, page).unwrap();
        let shared = Mapping::memfd_huge("ram", 4 << 20, page).unwrap();
        for mapping in [&private, &shared] {
            assert!(touched(mapping.region()).is_empty());
            mapping.region().span(3 << 20, 1).unwrap().copy_from(&[7]);
        }
        assert_eq!(touched(private.region()), [(2 << 20, 4 << 20)]);
        assert_eq!(touched(shared.region()), [(0, 4 << 20)], "hugetlbfs tells no holes");
    }

    #[test]
    fn lines_of_maps_are_understood() {
        let maps = "1000-3000 rw-p 00000000 00:00 0 \n3000-4000 rw-p 00000000 00:00 0 [heap]\n\
                    4000-6000 rw-s 00000000 00:01 1053 /memfd:ram (deleted)\n\
                    8000-9000 rw-p 00002000 fe:00 77 /bin/x\n9000-a000 rw-p 00000000 00:00 0\n";
        for (range, yes) in [
            (0x1000..0x4000, true),
            (0x2000..0x3800, true),
            (0x3000..0x5000, false),
            (0x4000..0x5000, false),
            (0x8000..0x9000, false),
            (0x9000..0xb000, false),
            (0x9000..0xa000, true),
        ] {
            assert_eq!(covers(maps.as_bytes(), &range, |inode, _| inode == "0").unwrap(), yes, "{range:x?}");
        }
    }
}
