//! Guest RAM as this process sees it: an address and a length, never a slice.
//!
//! The guest writes its RAM at any time, from vCPUs and devices, so no `&[u8]` of it is ever made: bytes are copied out
//! and in, or the kernel or the NIC reads them at their address. Every copy uses the C library's `memcpy`, `memset` and
//! `memcmp`. They are opaque to the compiler, so it cannot assume that the memory does not change.

use std::any::Any;
use std::io::{self, IoSlice};
use std::marker::PhantomData;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{fstat, fstatfs};

use super::lost_memory::Watched;
use super::mapping::page_of_file;
use super::memory_file::MemoryFile;
use super::untouched::Backing;
use crate::units::PageSize;

/// A range that is not inside its region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {offset:#x} are outside the mapped region of {region_len} bytes")]
pub struct OutOfRegion {
    /// Start of the range.
    pub offset: u64,
    /// Length of the range in bytes.
    pub len: u64,
    /// Bytes mapped.
    pub region_len: u64,
}

/// Mapped memory of one RAM block. Clones share the mapping; it is released with the last one.
#[derive(Clone)]
pub struct HostRegion {
    base: NonNull<u8>,
    len: usize,
    page: PageSize,
    /// Address at which the dirty source tracks the same memory, possibly in another process.
    tracked: usize,
    file: Option<MemoryFile>,
    backing: Backing,
    /// Declared before the owner: faults are no longer handled when the memory is released.
    watched: Arc<Watched>,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the region is only an address; all access goes through copies that tolerate concurrent writers,
// and the owner that keeps it mapped is itself Send + Sync.
unsafe impl Send for HostRegion {}
// SAFETY: as above.
unsafe impl Sync for HostRegion {}

impl std::fmt::Debug for HostRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostRegion({:p}, {} bytes of {} pages)", self.base, self.len, self.page)
    }
}

impl HostRegion {
    /// A region over memory that the caller mapped.
    ///
    /// `page` is the page size of the backing; `owner` is dropped together with the last clone.
    ///
    /// # Safety
    /// `base..base + len` must be mapped readable and writable until `owner` is dropped, and no Rust
    /// reference to it may exist while the region does.
    pub unsafe fn from_raw(
        base: NonNull<u8>,
        len: usize,
        page: PageSize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            base,
            len,
            page,
            tracked: base.as_ptr() as usize,
            file: None,
            backing: Backing::Unknown,
            watched: Arc::new(Watched::new(base.as_ptr() as usize, len, page.bytes() as usize)),
            _owner: owner,
        }
    }

    /// As [`from_raw`](Self::from_raw), for a shared mapping of `file` (a memfd, a file on tmpfs, hugetlbfs or a disk)
    /// that shows its bytes from `start` on. The page size is the file system's. With the file, a destination has fewer
    /// page faults, holes of the memory remain holes, and a migration notices that the file was truncated.
    ///
    /// The descriptor is kept as long as the region; `file` may be a duplicate.
    ///
    /// # Errors
    /// InvalidInput if the file ends before the mapping does, or `start` is not at one of its pages; the kernel's error
    /// for the descriptor.
    ///
    /// # Safety
    /// As for [`from_raw`](Self::from_raw). Besides, `base..base + len` must be a `MAP_SHARED` mapping of `file` at
    /// `start`: bytes written to the file are treated as written to the memory.
    pub unsafe fn from_raw_file(
        base: NonNull<u8>,
        len: usize,
        file: OwnedFd,
        start: u64,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> io::Result<Self> {
        let page = page_of_file(&fstatfs(&file)?);
        let length = u64::try_from(fstat(&file)?.st_size).unwrap_or(0);
        let invalid = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if !page.divides(start) {
            return invalid(format!(
                "the mapping's start in its file, {start:#x}, is not at one of its {page} pages"
            ));
        }
        if start.checked_add(len as u64).is_none_or(|end| end > length) {
            return invalid(format!(
                "{len} bytes from {start:#x} on are not all in a file of {length} bytes"
            ));
        }
        // SAFETY: the caller's promise.
        let region = unsafe { Self::from_raw(base, len, page, owner) };
        Ok(region.with_backing(Backing::File(Arc::new(file), start)))
    }

    /// As if the memory had larger pages.
    #[cfg(test)]
    pub(crate) fn with_page(mut self, page: PageSize) -> Self {
        self.page = page;
        self
    }

    /// Sets the backing of the region.
    pub(super) fn with_backing(mut self, backing: Backing) -> Self {
        self.file = match &backing {
            Backing::File(file, start) => MemoryFile::new(file, *start),
            Backing::Unknown | Backing::Anonymous => None,
        };
        self.backing = backing;
        self
    }

    pub(super) fn watched(&self) -> &Watched {
        &self.watched
    }

    pub(super) fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Fills `out` with the bytes from `offset` on as [`HostSpan::copy_to`] does, but without allocating pages that
    /// were never written. Returns `false` if that is not possible: not a memory file of base pages, or not inside the
    /// region.
    pub fn read_sparse(&self, offset: u64, out: &mut [u8]) -> bool {
        let inside = self.span(offset, out.len() as u64).is_ok();
        inside && self.file.as_ref().is_some_and(|file| file.read(offset, out))
    }

    /// Writes `parts`, one after the other, from `offset` on as [`HostSpan::copy_from`] does, but by pwrite to the
    /// backing file. For memory that this process has not mapped this costs half of a first store. Page tables do not
    /// show the write, so a dirty source that reads them does not see it. Returns `false` if that is not possible; the
    /// caller then writes the bytes through a span, some of them possibly for the second time.
    ///
    /// # Errors
    /// The error of pwritev(2), if a span would fail as well: no memory, no room in the file system.
    pub fn write_by_file(&self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<bool> {
        let len = parts.iter().map(|part| part.len() as u64).sum();
        match &self.file {
            Some(file) if self.span(offset, len).is_ok() => file.write(offset, parts),
            _ => Ok(false),
        }
    }

    /// The same memory, whose writes are tracked at `address` (of the process whose pagemap and userfaultfd the dirty
    /// source was given).
    pub fn tracked_at(mut self, address: usize) -> Self {
        self.tracked = address;
        self
    }

    /// Address in this process.
    pub fn address(&self) -> usize {
        self.base.as_ptr() as usize
    }

    /// Address at which a dirty source tracks the memory.
    pub fn tracked_address(&self) -> usize {
        self.tracked
    }

    /// Bytes mapped.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// True for a region of no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Page size of the backing.
    pub fn page(&self) -> PageSize {
        self.page
    }

    /// A part of the region, alive as long as the borrow.
    ///
    /// # Errors
    /// [`OutOfRegion`].
    pub fn span(&self, offset: u64, len: u64) -> Result<HostSpan<'_>, OutOfRegion> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len as u64);
        if !inside {
            return Err(OutOfRegion { offset, len, region_len: self.len as u64 });
        }
        // SAFETY: offset <= self.len, so the address stays inside (or one past) one mapping.
        let ptr = unsafe { self.base.add(offset as usize) };
        Ok(HostSpan { ptr, len: len as usize, region: PhantomData })
    }
}

/// A range of mapped guest RAM, borrowed from its region.
#[derive(Clone, Copy)]
pub struct HostSpan<'a> {
    ptr: NonNull<u8>,
    len: usize,
    region: PhantomData<&'a HostRegion>,
}

// SAFETY: an address; see HostRegion.
unsafe impl Send for HostSpan<'_> {}
// SAFETY: as above.
unsafe impl Sync for HostSpan<'_> {}

impl std::fmt::Debug for HostSpan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostSpan({:p}, {} bytes)", self.ptr, self.len)
    }
}

impl<'a> HostSpan<'a> {
    /// Address in this process.
    pub fn address(self) -> usize {
        self.ptr.as_ptr() as usize
    }

    pub(crate) fn as_ptr(self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Length in bytes.
    pub fn len(self) -> usize {
        self.len
    }

    /// True for an empty span.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// A part of the span; `None` if it is not inside.
    pub fn part(self, offset: usize, len: usize) -> Option<Self> {
        if offset.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: offset <= self.len: inside (or one past) the mapping the span borrows.
        Some(Self { ptr: unsafe { self.ptr.add(offset) }, len, region: PhantomData })
    }

    /// Copies the first bytes of the span into `out`; returns how many (the shorter length).
    ///
    /// The copy may mix old and new bytes if the guest writes meanwhile; that write also marks the page dirty.
    pub fn copy_to(self, out: &mut [u8]) -> usize {
        let len = out.len().min(self.len);
        // SAFETY: both sides are valid for `len` bytes and can't overlap (no slice of guest RAM exists);
        // memcpy is opaque to the compiler, so a concurrent guest write can only mix bytes.
        unsafe { libc::memcpy(out.as_mut_ptr().cast(), self.ptr.as_ptr().cast(), len) };
        len
    }

    /// Copies `bytes` to the start of the span; returns how many (the shorter length).
    pub fn copy_from(self, bytes: &[u8]) -> usize {
        let len = bytes.len().min(self.len);
        // SAFETY: as in copy_to, the other way; the region is writable by `from_raw`'s contract.
        unsafe { libc::memcpy(self.ptr.as_ptr().cast(), bytes.as_ptr().cast(), len) };
        len
    }

    /// Copies the bytes of another span, which does not overlap, to the start of this one; returns how many (the shorter
    /// length).
    pub(crate) fn copy_span(self, from: HostSpan<'_>) -> usize {
        let len = from.len.min(self.len);
        // SAFETY: both spans are valid for `len` bytes; memmove takes any overlap, and is opaque to the compiler, so that a
        // concurrent guest write can only mix bytes.
        unsafe { libc::memmove(self.ptr.as_ptr().cast(), from.ptr.as_ptr().cast(), len) };
        len
    }

    /// As [`copy_from`](Self::copy_from), from separate pieces that are stored one after the other, and bypassing the
    /// caches if the processor supports it: for bytes that this process does not read soon. Otherwise a store to cold
    /// memory first reads the line that it overwrites. Returns how many bytes.
    ///
    /// The bytes are in place for other threads when this returns.
    pub fn stream_pages<'b>(self, pieces: impl Iterator<Item = &'b [u8]>) -> usize {
        let mut at = 0;
        for piece in pieces {
            let Some(room) = self.part(at, piece.len().min(self.len - at)) else { break };
            at += room.stream_piece(piece);
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE2 is part of x86_64. The fence orders the stores before the caller's next accesses.
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
        at
    }

    /// Stores one piece. Other threads may see the stores late, until a fence.
    fn stream_piece(self, bytes: &[u8]) -> usize {
        let len = bytes.len().min(self.len);
        #[cfg(target_arch = "x86_64")]
        if self.address().is_multiple_of(16) && len.is_multiple_of(64) {
            use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
            // SAFETY: source and target are valid for `len` bytes, a multiple of the 64 that each step
            // takes, and don't overlap; the target is aligned for the store, which is an intrinsic with an
            // effect on memory, so that a concurrent access can only mix bytes. SSE2 is part of x86_64.
            unsafe {
                let (from, to) = (bytes.as_ptr(), self.ptr.as_ptr());
                for at in (0..len).step_by(64) {
                    let load = |part: usize| _mm_loadu_si128(from.add(at + part).cast::<__m128i>());
                    let line = [load(0), load(16), load(32), load(48)];
                    for (part, value) in line.into_iter().enumerate() {
                        _mm_stream_si128(to.add(at + part * 16).cast::<__m128i>(), value);
                    }
                }
            }
            return len;
        }
        self.copy_from(&bytes[..len])
    }

    /// Stores zeros. Never punches a hole: the NIC may hold the physical pages.
    pub fn fill_zero(self) {
        // SAFETY: the span is valid and writable for its length.
        unsafe { libc::memset(self.ptr.as_ptr().cast(), 0, self.len) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn region(len: usize) -> HostRegion {
        let mut map = memmap2::MmapMut::map_anon(len).unwrap();
        let base = NonNull::new(map.as_mut_ptr()).unwrap();
        // SAFETY: the map lives in the Arc, and no slice of it is taken.
        unsafe { HostRegion::from_raw(base, len, PageSize::SIZE_4K, Arc::new(map)) }
    }

    #[test]
    fn spans_stay_inside_their_region() {
        let region = region(8192);
        assert!(region.span(8192, 0).is_ok());
        assert!(region.span(8191, 2).is_err() && region.span(u64::MAX, 2).is_err());
        let span = region.span(4096, 4096).unwrap();
        assert!(span.part(4095, 2).is_none() && span.part(usize::MAX, 2).is_none());
        assert_eq!(span.part(4, 4).unwrap().address(), region.address() + 4100);
    }

    /// A VMM that has mapped a memfd passes address and file: bytes written through the file are in the memory, and
    /// holes of the memory remain holes.
    #[test]
    fn memory_given_with_its_file_is_written_by_the_file() {
        const PAGE: usize = 4096;
        let memfd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, 9 * PAGE as u64).unwrap();
        let map = memmap2::MmapOptions::new().offset(PAGE as u64).len(8 * PAGE).map_raw(&memfd).unwrap();
        let base = NonNull::new(map.as_mut_ptr()).unwrap();
        let owner: Arc<dyn Any + Send + Sync> = Arc::new(map);
        let given = |len, start| {
            let file = memfd.try_clone().unwrap();
            // SAFETY: a shared mapping of the file that lives in the owner; no slice of it is taken. The refused ones
            // are not used.
            unsafe { HostRegion::from_raw_file(base, len, file, start, Arc::clone(&owner)) }
        };
        let region = given(8 * PAGE, PAGE as u64).unwrap();
        assert_eq!(region.page(), PageSize::SIZE_4K);
        assert!(region.write_by_file(3 * PAGE as u64, &[IoSlice::new(&[7; PAGE])]).unwrap());
        let mut touched = Vec::new();
        region.touched(|range| touched.push((range.start / PAGE as u64, range.end / PAGE as u64)));
        assert_eq!(touched, [(3, 4)]);
        let mut out = [0; 2];
        region.span(4 * PAGE as u64 - 1, 2).unwrap().copy_to(&mut out);
        assert_eq!(out, [7, 0]);
        for (len, start, why) in
            [(9 * PAGE, PAGE as u64, "not all in a file"), (PAGE, 100, "not at one of its")]
        {
            let error = given(len, start).unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[test]
    fn bytes_enter_and_leave_by_copy() {
        let region = region(4096);
        let span = region.span(0, 4096).unwrap();
        assert_eq!(span.part(10, 5).unwrap().copy_from(b"hello world"), 5);
        let mut out = [0u8; 6];
        assert_eq!(region.clone().span(9, 6).unwrap().copy_to(&mut out), 6);
        assert_eq!(&out, b"\0hello");
        span.fill_zero();
        span.copy_to(&mut out);
        assert_eq!(out, [0; 6]);
    }
}
