//! Guest RAM read from and written to an offset of a file: the kernel copies between the two. And how much of a file is in
//! the page cache.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::HostSpan;
use super::vectored_io::{NO_PARTS, SendPart, gather};

/// Maximum number of bytes in one call, so that the call returns and can be stopped.
const MAX_CALL: usize = 8 << 20;

/// Fills the first bytes of `span` with those at `offset` of a file; returns how many, and 0 only at the file's end.
///
/// # Errors
/// The error of `pread(2)`; `EFAULT` for guest memory that is lost.
pub(crate) fn read_at(fd: BorrowedFd<'_>, span: HostSpan<'_>, offset: u64) -> io::Result<usize> {
    let at = libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let len = span.len().min(MAX_CALL);
    // SAFETY: the span is mapped writable for `len` bytes as long as it is borrowed, and outlives the call.
    let got = unsafe { libc::pread64(fd.as_raw_fd(), span.as_ptr().cast(), len, at) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Writes `parts`, without their first `skip` bytes, to `offset` of a file; returns how many bytes were written.
///
/// # Errors
/// The error of `pwritev(2)`.
pub(crate) fn write_at(
    fd: BorrowedFd<'_>,
    parts: &[SendPart<'_>],
    skip: usize,
    offset: u64,
) -> io::Result<usize> {
    let at = libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut list = NO_PARTS;
    let used = gather(parts, skip, MAX_CALL, &mut list);
    // SAFETY: every entry of the list names bytes borrowed by `parts`, which outlives the call; the kernel only reads them.
    let sent = unsafe { libc::pwritev64(fd.as_raw_fd(), list.as_ptr(), used as libc::c_int, at) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Number of cachestat(2), the same on every architecture that Linux has added since it has it (6.5).
const CACHESTAT: libc::c_long = 451;

/// The range that cachestat(2) is asked about.
#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

/// Its answer, in pages: cached, dirty, being written, evicted, evicted lately.
#[repr(C)]
#[derive(Default)]
struct Cached {
    pages: [u64; 5],
}

/// Bytes of the `len` from `offset` on of a file that are in the page cache, in whole pages. Source: cachestat(2).
///
/// # Errors
/// The kernel's: `ENOSYS` before Linux 6.5, `EOPNOTSUPP` on hugetlbfs.
pub(crate) fn cached_bytes(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<u64> {
    let range = Range { offset, len };
    let mut cached = Cached::default();
    let (asked, answer) = (std::ptr::from_ref(&range), std::ptr::from_mut(&mut cached));
    // SAFETY: the kernel reads a range and writes an answer of the layouts that it defines; both outlive the call.
    let done = unsafe { libc::syscall(CACHESTAT, fd.as_raw_fd(), asked, answer, 0) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cached.pages[0].saturating_mul(rustix::param::page_size() as u64))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::Mapping;

    #[test]
    fn guest_memory_goes_to_its_place_in_a_file_and_back() {
        let file = tempfile::tempfile().unwrap();
        let memory = Mapping::anonymous(8192).unwrap();
        let span = |at, len| memory.region().span(at, len).unwrap();
        span(4096, 3).copy_from(b"abc");
        let parts = [SendPart::Guest(span(4095, 4)), SendPart::Own(b"de")];
        assert_eq!(write_at(file.as_fd(), &parts, 1, 1 << 20).unwrap(), 5);
        assert_eq!(file.metadata().unwrap().len(), (1 << 20) + 5);
        assert_eq!(read_at(file.as_fd(), span(0, 100), (1 << 20) + 1).unwrap(), 4);
        let mut out = [0; 5];
        span(0, 5).copy_to(&mut out);
        assert_eq!(&out, b"bcde\0");
        assert_eq!(read_at(file.as_fd(), span(0, 100), 1 << 30).unwrap(), 0);
        assert!(read_at(file.as_fd(), span(0, 1), u64::MAX).is_err());
        assert!(write_at(file.as_fd(), &parts, 0, u64::MAX).is_err());
    }

    #[test]
    fn what_was_just_written_is_in_the_page_cache_and_a_hole_is_not() {
        let file = tempfile::tempfile().unwrap();
        let memory = Mapping::anonymous(64 << 10).unwrap();
        let parts = [SendPart::Guest(memory.region().span(0, 64 << 10).unwrap())];
        assert_eq!(write_at(file.as_fd(), &parts, 0, 1 << 20).unwrap(), 64 << 10);
        match cached_bytes(file.as_fd(), 1 << 20, 64 << 10) {
            Ok(cached) => {
                assert_eq!(cached, 64 << 10);
                assert_eq!(cached_bytes(file.as_fd(), 0, 64 << 10).unwrap(), 0);
            }
            Err(error) => println!("SKIPPED: cachestat(2): {error}"),
        }
    }
}
