//! Memory for guest RAM: mapped by us (anonymous, memfd, file, huge pages), filled in ahead, given back.
//!
//! A mapping yields a [`HostRegion`]; if it has a file descriptor, that is kept, since other processes (a vhost-user
//! backend, a second VMM) map the same memory by it. Memory mapped by other code enters by [`HostRegion::from_raw`] and
//! needs nothing of this file but [`populate`] and [`discard`].

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, StatFs, fallocate, fstat, fstatfs, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};

use super::untouched::Backing;
use super::untouched::is_private_huge;
use super::{HostRegion, HostSpan};
use crate::error::Chain;
use crate::units::PageSize;

/// `f_type` of hugetlbfs (statfs(2)); memfds with huge pages are files of it, too.
pub(super) const HUGETLBFS_MAGIC: i64 = 0x958458f6;

/// Why memory could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MappingError {
    /// A length that is zero or beyond the address space.
    #[error("{len} bytes can't be mapped; ask for 1 byte up to the address space")]
    Length {
        /// Requested bytes.
        len: u64,
    },
    /// The kernel has no such huge page to give.
    #[error(
        "{len} bytes of {page} pages: {source}; reserve {pages} more: add {pages} to the number in \
         /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages",
        pages = page.pages_in(*len), kib = page.bytes() / 1024
    )]
    HugePages {
        /// Requested bytes.
        len: u64,
        /// The page size.
        page: PageSize,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The file ends before the range.
    #[error("{len} bytes at {offset:#x} are mapped of a file of {file_len} bytes; make the file longer")]
    FileTooShort {
        /// Start of the range in the file.
        offset: u64,
        /// Requested bytes.
        len: u64,
        /// Bytes the file has.
        file_len: u64,
    },
    /// An offset that no mapping can start at.
    #[error("a file is mapped from a multiple of its {page} pages, not from {offset:#x}")]
    Alignment {
        /// Start of the range in the file.
        offset: u64,
        /// Page size of the file.
        page: PageSize,
    },
    /// A call failed.
    #[error("{what} {len} bytes failed ({remedy})")]
    Kernel {
        /// The operation.
        what: &'static str,
        /// Requested bytes.
        len: u64,
        /// What can be done about it.
        remedy: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Memory mapped by us: a region, and its backing file if there is one.
#[derive(Clone, Debug)]
pub struct Mapping {
    region: HostRegion,
    file: Option<(Arc<OwnedFd>, u64)>,
}

impl Mapping {
    /// Private anonymous memory of base pages, zero until written.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn anonymous(len: u64) -> Result<Self, MappingError> {
        let map = MmapOptions::new().len(to_usize(len)?).map_anon();
        let map = map.map_err(|source| kernel("mapping", len, ENOUGH_MEMORY, source))?;
        Ok(Self { region: region_of(map.into(), base_page()).with_backing(Backing::Anonymous), file: None })
    }

    /// As [`anonymous`](Self::anonymous); with `huge_pages` they are [asked for](Self::advise_huge_pages). A kernel
    /// that has none is no error: a warning is logged.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn private(len: u64, huge_pages: bool) -> Result<Self, MappingError> {
        let mapping = Self::anonymous(len)?;
        if huge_pages && let Err(error) = mapping.advise_huge_pages() {
            tracing::warn!(error = %Chain(&error), "no huge pages for the guest's RAM");
        }
        Ok(mapping)
    }

    /// Private anonymous memory of huge `page`s; `len` is rounded up to whole ones.
    ///
    /// # Errors
    /// [`MappingError::HugePages`] if too few are reserved.
    pub fn anonymous_huge(len: u64, page: PageSize) -> Result<Self, MappingError> {
        let rounded = round_up(len, page)?;
        let map = MmapOptions::new().len(to_usize(rounded)?).huge(Some(page.shift() as u8)).map_anon();
        let map = map.map_err(|source| MappingError::HugePages { len, page, source })?;
        Ok(Self { region: region_of(map.into(), page).with_backing(Backing::Anonymous), file: None })
    }

    /// Shared memory of base pages with a memfd called `name` (seen in /proc/PID/maps).
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn memfd(name: &str, len: u64) -> Result<Self, MappingError> {
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|errno| kernel("making a memfd of", len, "its name has at most 249 bytes", errno))?;
        ftruncate(&fd, len).map_err(|errno| {
            let remedy = if errno == Errno::FBIG { remedy_of(errno) } else { ENOUGH_MEMORY };
            kernel("sizing a memfd to", len, remedy, errno)
        })?;
        Self::file(fd, 0, len)
    }

    /// Shared memory of huge `page`s with a memfd; `len` is rounded up to whole ones.
    ///
    /// # Errors
    /// [`MappingError::HugePages`] if too few are reserved, or the machine has none of that size.
    pub fn memfd_huge(name: &str, len: u64, page: PageSize) -> Result<Self, MappingError> {
        let rounded = round_up(len, page)?;
        let no_pages = |errno: Errno| MappingError::HugePages { len, page, source: errno.into() };
        // memfd_create(2): log2 of the page size from bit MFD_HUGE_SHIFT on.
        let size = MemfdFlags::from_bits_retain(page.shift() << libc::MFD_HUGE_SHIFT);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | size;
        let fd = memfd_create(name, flags).map_err(no_pages)?;
        ftruncate(&fd, rounded).map_err(no_pages)?;
        match Self::file(fd, 0, rounded) {
            Err(MappingError::Kernel { source, .. }) => Err(MappingError::HugePages { len, page, source }),
            other => other,
        }
    }

    /// A shared mapping of `len` bytes of an open file from `offset` on. The page size is the file system's
    /// (hugetlbfs), else the base page.
    ///
    /// # Errors
    /// [`MappingError::FileTooShort`] instead of a mapping whose end would raise SIGBUS.
    pub fn file(fd: OwnedFd, offset: u64, len: u64) -> Result<Self, MappingError> {
        let bytes = to_usize(len)?;
        let failed = |errno: Errno| kernel("looking at a file for", len, "give a regular file", errno);
        let file_len = u64::try_from(fstat(&fd).map_err(failed)?.st_size).unwrap_or(0);
        let page = page_of_file(&fstatfs(&fd).map_err(failed)?);
        if !page.divides(offset) {
            return Err(MappingError::Alignment { offset, page });
        }
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(MappingError::FileTooShort { offset, len, file_len });
        }
        let map = MmapOptions::new().offset(offset).len(bytes).map_raw(&fd).map_err(|source| {
            kernel("mapping a file for", len, "open it for reading and writing, and have memory free", source)
        })?;
        let fd = Arc::new(fd);
        let region = region_of(map, page).with_backing(Backing::File(Arc::clone(&fd), offset));
        Ok(Self { region, file: Some((fd, offset)) })
    }

    /// A private copy of `len` bytes of an open file from `offset` on: what is written to it never gets into the file. Pages
    /// take memory of their own only once they are written.
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub fn file_copy(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Self, MappingError> {
        let bytes = to_usize(len)?;
        let failed = |errno: Errno| kernel("looking at a file for", len, "give a regular file", errno);
        let file_len = u64::try_from(fstat(fd).map_err(failed)?.st_size).unwrap_or(0);
        let page = PageSize::SIZE_4K;
        if !page.divides(offset) {
            return Err(MappingError::Alignment { offset, page });
        }
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(MappingError::FileTooShort { offset, len, file_len });
        }
        let mut options = MmapOptions::new();
        // SAFETY: the mapping becomes a region at once, of which no reference is ever made: that others change the file, or
        // make it shorter, is borne as with any memory of a guest.
        let map = unsafe { options.offset(offset).len(bytes).map_copy(fd.as_raw_fd()) };
        let map = map.map_err(|source| {
            kernel("mapping a file for", len, "open it for reading, and have memory free", source)
        })?;
        Ok(Self { region: region_of(map.into(), page).with_backing(Backing::Unknown), file: None })
    }

    /// As [`file`](Self::file), for a file that is made longer if it ends before the range. With `allocate` the blocks
    /// are taken now, so that a full disk is found here and not by SIGBUS later; if the file system can't (EOPNOTSUPP),
    /// a warning is logged.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn file_grown(fd: OwnedFd, offset: u64, len: u64, allocate: bool) -> Result<Self, MappingError> {
        let end = offset.checked_add(len).ok_or(MappingError::Length { len })?;
        let failed = |errno: Errno| kernel("growing a file to", end, remedy_of(errno), errno);
        let stat = fstat(&fd).map_err(failed)?;
        if u64::try_from(stat.st_size).unwrap_or(0) < end {
            ftruncate(&fd, end).map_err(failed)?;
        }
        if allocate {
            match fallocate(&fd, rustix::fs::FallocateFlags::empty(), offset, len) {
                // Some file systems can't: only written bytes take room.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => tracing::warn!(
                    "this file system reserves no room (fallocate): that it is full is found by the page that finds none"
                ),
                reserved => reserved.map_err(failed)?,
            }
        }
        Self::file(fd, offset, len)
    }

    /// Asks for huge pages where the kernel has some to give when the memory is first touched (MADV_HUGEPAGE;
    /// /sys/kernel/mm/transparent_hugepage defines for which memory). First touches are faster then, several times over
    /// for private memory; a huge page takes memory for the zero pages in it, too.
    ///
    /// # Errors
    /// EINVAL: a kernel without transparent huge pages, or memory of huge pages already.
    pub fn advise_huge_pages(&self) -> io::Result<()> {
        let (start, len) = (self.region.address(), to_usize(self.region.len()).unwrap_or_default());
        let mask = rustix::param::page_size() - 1;
        // SAFETY: the range is this mapping, to the end of its last page; the advice changes no contents.
        Ok(unsafe { madvise(start as *mut _, (len + mask) & !mask, Advice::LinuxHugepage) }?)
    }

    /// The memory.
    pub fn region(&self) -> &HostRegion {
        &self.region
    }

    /// The same memory without the file's descriptor, which is closed with its last user: for a process with thousands
    /// of mappings. Writes through the file ([`HostRegion::write_by_file`]) are then not possible.
    #[must_use]
    pub fn detached(self) -> Self {
        Self { region: self.region.with_backing(Backing::Unknown), file: None }
    }

    /// The backing file and the offset in it at which the memory starts; `None` for anonymous memory.
    pub fn backing(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.file.as_ref().map(|(fd, offset)| (fd.as_fd(), *offset))
    }
}

/// Takes every page of `span` now (MADV_POPULATE_WRITE), so that no later write faults or finds memory short.
/// Contents stay.
///
/// # Errors
/// ENOMEM or EFAULT where memory or huge pages are short; EINVAL before Linux 5.14.
pub fn populate(span: HostSpan<'_>) -> io::Result<()> {
    populate_for(span, Advice::LinuxPopulateWrite)
}

/// Maps every page of `span` as a read does (MADV_POPULATE_READ): a page that was never written stays the kernel's zero
/// page, or becomes an empty page of its file.
///
/// # Errors
/// As [`populate`].
pub(crate) fn populate_read(span: HostSpan<'_>) -> io::Result<()> {
    populate_for(span, Advice::LinuxPopulateRead)
}

fn populate_for(span: HostSpan<'_>, access: Advice) -> io::Result<()> {
    if span.is_empty() {
        return Ok(());
    }
    // The call wants whole pages; those the span touches lie inside its mapping.
    let mask = rustix::param::page_size() - 1;
    let start = span.address() & !mask;
    let len = (span.address() + span.len() - start + mask) & !mask;
    loop {
        // SAFETY: populating changes no contents and the range lies inside one live mapping.
        match unsafe { madvise(start as *mut _, len, access) } {
            Err(Errno::INTR) => {}
            done => return Ok(done?),
        }
    }
}

/// Whether the kernel may put transparent huge pages over `span`, which is in whole pages.
///
/// # Errors
/// EINVAL where it never does.
pub(crate) fn set_huge_pages(span: HostSpan<'_>, allowed: bool) -> io::Result<()> {
    let advice = if allowed { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
    // SAFETY: the advice changes no contents and the range lies inside one live mapping.
    unsafe { madvise(span.as_ptr().cast(), span.len(), advice)? };
    Ok(())
}

/// Gives the bytes of `span` back to the kernel; reads see zero afterwards.
///
/// `page` is the page size of the backing: whole pages are punched out (shared memory, MADV_REMOVE) or
/// dropped (private memory, MADV_DONTNEED), the edges are zeroed by store. Where the backing can do neither,
/// as a private mapping of a file, or of huge pages before Linux 5.18, everything is zeroed by store.
///
/// # Errors
/// EINVAL for locked memory (mlock(2)).
pub fn discard(span: HostSpan<'_>, page: PageSize) -> io::Result<()> {
    give_back(span, page, false)
}

/// The same for a part of `region`, whose backing may be known: anonymous memory of base pages is dropped without being asked
/// for a file. qemu-user needs that: it accepts MADV_REMOVE and does nothing.
///
/// # Errors
/// As [`discard`].
pub(crate) fn discard_in(region: &HostRegion, span: HostSpan<'_>) -> io::Result<()> {
    let base = region.page().bytes() == rustix::param::page_size() as u64;
    give_back(span, region.page(), base && matches!(region.backing(), Backing::Anonymous))
}

fn give_back(span: HostSpan<'_>, page: PageSize, anonymous: bool) -> io::Result<()> {
    let page = page.bytes() as usize;
    let head = (span.address().next_multiple_of(page) - span.address()).min(span.len());
    let whole = (span.len() - head) / page * page;
    let tail = span.len() - head - whole;
    let edges = [span.part(0, head), span.part(head + whole, tail)];
    edges.into_iter().flatten().for_each(HostSpan::fill_zero);
    let Some(whole) = span.part(head, whole).filter(|whole| !whole.is_empty()) else { return Ok(()) };
    // SAFETY: the range lies inside one live mapping and holds guest bytes only, which are given up here; the pages read as
    // zeros afterwards.
    let drop = || unsafe { madvise(whole.as_ptr().cast(), whole.len(), Advice::LinuxDontNeed) };
    if anonymous {
        return Ok(drop()?);
    }
    // The kernel knows what the memory is: REMOVE returns EINVAL if it has no backing file, EACCES if it is private to
    // us, EOPNOTSUPP if the file system has no holes.
    // SAFETY: the range lies inside one live mapping and holds guest bytes only, which are given up here.
    match unsafe { madvise(whole.as_ptr().cast(), whole.len(), Advice::LinuxRemove) } {
        Err(Errno::INVAL) => drop()?,
        Err(Errno::ACCESS | Errno::OPNOTSUPP) => {
            let addresses = whole.address()..whole.address() + whole.len();
            let is_ours = page > rustix::param::page_size() && is_private_huge(&addresses).unwrap_or(false);
            if !is_ours || drop().is_err() {
                whole.fill_zero();
            }
        }
        done => done?,
    }
    Ok(())
}

/// True if the first page of `span` is there, so that no access to it faults.
///
/// # Errors
/// The error of mincore(2).
pub(crate) fn is_there(span: HostSpan<'_>) -> io::Result<bool> {
    let start = span.address() / rustix::param::page_size() * rustix::param::page_size();
    let mut first = [0u8; 1];
    // SAFETY: the kernel writes one byte for the one requested page.
    match unsafe { libc::mincore(start as *mut libc::c_void, 1, first.as_mut_ptr()) } {
        0 => Ok(first[0] & 1 == 1),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Locks memory, of which the kernel then takes none back.
#[cfg(test)]
pub(crate) fn lock(span: HostSpan<'_>) -> io::Result<()> {
    // SAFETY: no byte of it changes.
    unsafe { rustix::mm::mlock(span.as_ptr().cast(), span.len())? };
    Ok(())
}

fn remedy_of(errno: Errno) -> &'static str {
    match errno {
        Errno::FBIG => {
            "raise the limit of file sizes (ulimit -f), or take a file system for files of this size"
        }
        Errno::DQUOT => "free room in the quota of its owner",
        Errno::NOSPC => "free room on its file system",
        _ => "take another file system",
    }
}

const ENOUGH_MEMORY: &str = "free memory, or allow more by vm.overcommit_memory and the cgroup's memory.max";

fn kernel(what: &'static str, len: u64, remedy: &'static str, source: impl Into<io::Error>) -> MappingError {
    MappingError::Kernel { what, len, remedy, source: source.into() }
}

fn to_usize(len: u64) -> Result<usize, MappingError> {
    let bytes = NonZeroU64::new(len).and_then(|len| usize::try_from(len.get()).ok());
    bytes.filter(|bytes| *bytes <= isize::MAX as usize).ok_or(MappingError::Length { len })
}

fn round_up(len: u64, page: PageSize) -> Result<u64, MappingError> {
    len.checked_next_multiple_of(page.bytes()).ok_or(MappingError::Length { len })
}

pub(super) fn base_page() -> PageSize {
    PageSize::from_bytes(rustix::param::page_size() as u64).unwrap_or(PageSize::SIZE_4K)
}

pub(super) fn page_of_file(fs: &StatFs) -> PageSize {
    let huge = if fs.f_type == HUGETLBFS_MAGIC { fs.f_bsize as u64 } else { 0 };
    PageSize::from_bytes(huge).unwrap_or_else(base_page)
}

fn region_of(map: MmapRaw, page: PageSize) -> HostRegion {
    // A successful mmap is never at null, and a dangling address can't be reached with length 0.
    let base = NonNull::new(map.as_mut_ptr()).unwrap_or(NonNull::dangling());
    let len = map.len();
    // SAFETY: MmapRaw keeps the range mapped readable and writable until dropped and never makes a reference
    // to it; it moves into the owner.
    unsafe { HostRegion::from_raw(base, len, page, Arc::new(map)) }
}

#[cfg(test)]
mod tests;
