//! Pages of a file past the page cache (O_DIRECT), where the file system tells which alignment it wants.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, StatxFlags, statx};

use crate::sys::{HostSpan, SendPart, cached_bytes, write_at};

/// Bytes that a thread reads at once: a window of the file, in which pages that are not wanted lie too.
pub(super) const WINDOW: u64 = 1 << 20;
/// A window of fewer bytes is read through the page cache.
const LEAST: u64 = 128 << 10;

/// The file, opened with O_DIRECT.
#[derive(Debug)]
pub(super) struct Direct {
    file: File,
    /// Required alignment of addresses, offsets and lengths, as the file system reports it.
    align: usize,
    /// Direct I/O failed for aligned pages: the rest uses the page cache.
    refused: AtomicBool,
}

/// A thread's window. Pages are copied from there: the kernel then needs to hold no guest memory for the time that a disk
/// takes.
#[derive(Debug, Default)]
pub(super) struct DirectBuffer {
    bytes: Vec<u8>,
    /// Where in `bytes` the window begins, and how long it is.
    start: usize,
    len: usize,
    /// The file, and the offset of the window in it.
    of: Option<(usize, u64)>,
    /// The file, and a range of it that is better read through the page cache.
    cached: Option<(usize, std::ops::Range<u64>)>,
}

impl DirectBuffer {
    /// The bytes of the window from the file's offset `at` on, at most `most`.
    pub(super) fn part(&self, direct: &Direct, at: u64, most: usize) -> Option<&[u8]> {
        let (_, from) = self.of.filter(|(file, _)| *file == std::ptr::from_ref(direct) as usize)?;
        let skip = usize::try_from(at.checked_sub(from)?).ok().filter(|skip| *skip < self.len)?;
        self.bytes.get(self.start + skip..self.start + self.len.min(skip.saturating_add(most)))
    }
}

impl Direct {
    /// `None` if the file system has no direct I/O, or does not report its alignment (STATX_DIOALIGN, Linux 6.1).
    pub(super) fn to_write(file: &File) -> Option<Self> {
        Self::open(file, OpenOptions::new().write(true))
    }

    /// As [`to_write`](Self::to_write).
    pub(super) fn to_read(file: &File) -> Option<Self> {
        Self::open(file, OpenOptions::new().read(true))
    }

    fn open(file: &File, options: &mut OpenOptions) -> Option<Self> {
        let told = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
        let known = StatxFlags::from_bits_retain(told.stx_mask).contains(StatxFlags::DIOALIGN);
        let aligns = [told.stx_dio_mem_align, told.stx_dio_offset_align];
        if !known || aligns.contains(&0) {
            return None;
        }
        let align = aligns.into_iter().max().and_then(|align| usize::try_from(align).ok())?;
        if !align.is_power_of_two() || align as u64 > LEAST {
            return None;
        }
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = options.custom_flags(libc::O_DIRECT).open(path).ok()?;
        Some(Self { file, align, refused: AtomicBool::new(false) })
    }

    #[cfg(test)]
    pub(super) fn is_used(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    /// `None` if direct I/O is not possible for these bytes: the page cache is used.
    pub(super) fn write(&self, span: HostSpan<'_>, skip: usize, at: u64) -> Option<io::Result<usize>> {
        let offset = usize::try_from(at).ok()?;
        if !self.fits([span.address() + skip, span.len() - skip, offset]) {
            return None;
        }
        self.unless_refused(write_at(self.file.as_fd(), &[SendPart::Guest(span)], skip, at))
    }

    /// Fills the window from `at` on with at most `room` bytes. False where the page cache is to be used: `at` is not aligned,
    /// there is little room, most of it is in the page cache, or it can't be read so.
    pub(super) fn fill(&self, buffer: &mut DirectBuffer, at: u64, room: u64) -> bool {
        let len = room.min(WINDOW) / self.align as u64 * self.align as u64;
        let Ok(offset) = usize::try_from(at) else { return false };
        let id = std::ptr::from_ref(self) as usize;
        let is_known = buffer.cached.as_ref().is_some_and(|(file, range)| *file == id && range.contains(&at));
        if len < LEAST || is_known || !self.fits([offset, 0, 0]) {
            return false;
        }
        // Without an answer (older than Linux 6.5) the page cache is used: a file that is there costs less from it.
        if !cached_bytes(self.file.as_fd(), at, len).is_ok_and(|cached| cached < len / 2) {
            buffer.cached = Some((id, at..at + len));
            return false;
        }
        buffer.of = None;
        buffer.bytes.resize(WINDOW as usize + self.align, 0);
        buffer.start = buffer.bytes.as_ptr().align_offset(self.align).min(self.align);
        let window = &mut buffer.bytes[buffer.start..buffer.start + len as usize];
        match self.unless_refused(self.file.read_at(window, at)) {
            Some(Ok(got)) if got > 0 => {
                buffer.len = got;
                buffer.of = Some((id, at));
                true
            }
            // The end of the file, or an error: the other way names it, if it is one of a page that is wanted.
            _ => false,
        }
    }

    fn fits(&self, numbers: [usize; 3]) -> bool {
        numbers.iter().all(|n| n.is_multiple_of(self.align)) && !self.refused.load(Ordering::Relaxed)
    }

    /// Memory that can't be pinned, or a file system that now refuses, is no error.
    fn unless_refused(&self, done: io::Result<usize>) -> Option<io::Result<usize>> {
        match done {
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EFAULT | libc::EOPNOTSUPP)) =>
            {
                tracing::debug!(%error, "pages go through the page cache");
                self.refused.store(true, Ordering::Relaxed);
                None
            }
            done => Some(done),
        }
    }
}
