//! Separate byte ranges, our own or the guest's, passed to the kernel in one call.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::HostSpan;

/// Bytes to send: our own, or guest RAM that the kernel reads in place.
#[derive(Clone, Copy, Debug)]
pub enum SendPart<'a> {
    /// Bytes of this program.
    Own(&'a [u8]),
    /// Guest RAM.
    Guest(HostSpan<'a>),
}

impl SendPart<'_> {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Own(bytes) => bytes.len(),
            Self::Guest(span) => span.len(),
        }
    }

    /// True without bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Room to receive into: our own, or guest RAM that the kernel fills in place.
#[derive(Debug)]
pub enum RecvPart<'a> {
    /// A buffer of this program.
    Own(&'a mut [u8]),
    /// Guest RAM.
    Guest(HostSpan<'a>),
}

impl RecvPart<'_> {
    /// Room in bytes.
    pub fn len(&self) -> usize {
        match self {
            Self::Own(room) => room.len(),
            Self::Guest(span) => span.len(),
        }
    }

    /// True without room.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Maximum number of parts in one call (`UIO_MAXIOV`, writev(2)).
pub(crate) const MAX_PARTS: usize = 1024;

/// Maximum number of bytes in one call, so that a write to a slow disk returns and can be stopped.
const MAX_CALL: usize = 8 << 20;

/// How a descriptor is written and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FdKind {
    /// A socket: `sendmsg` without SIGPIPE if the peer is gone.
    Socket,
    /// A socket that [`allow_zero_copy`](super::allow_zero_copy) was called for: as `Socket`, sent from the pages
    /// themselves. These must be guest RAM, since own bytes may change before the kernel reads them.
    ZeroCopy,
    /// As `Socket`, with the flag that more data follows immediately (MSG_MORE): the bytes are sent together with that
    /// data.
    More,
    /// A pipe or a file: `writev`.
    Other,
}

/// Sends from the parts, without their first `skip` bytes; returns how many bytes were sent.
///
/// One call sends at most [`MAX_PARTS`] parts and a few MiB; the caller continues with the rest.
///
/// # Errors
/// The error of `sendmsg(2)` or `writev(2)`; `WouldBlock` on a non-blocking descriptor. `InvalidInput` for own bytes by
/// [`FdKind::ZeroCopy`].
pub(crate) fn send_parts(
    fd: BorrowedFd<'_>,
    kind: FdKind,
    parts: &[SendPart<'_>],
    skip: usize,
) -> io::Result<usize> {
    if kind == FdKind::ZeroCopy && has_own(parts) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut iov = NO_PARTS;
    let used = gather(parts, skip, MAX_CALL, &mut iov);
    // SAFETY: every iovec names bytes borrowed by `parts` (for guest spans: mapped as long as the borrow), which
    // outlives the call; the kernel only reads them. What it reads later (ZeroCopy) it reads by its own references to
    // the pages, so that pages unmapped meanwhile are not reused.
    let sent = unsafe {
        match kind {
            FdKind::Socket | FdKind::ZeroCopy | FdKind::More => {
                let how = match kind {
                    FdKind::ZeroCopy => libc::MSG_ZEROCOPY,
                    FdKind::More => libc::MSG_MORE,
                    _ => 0,
                };
                let mut msg: libc::msghdr = std::mem::zeroed();
                msg.msg_iov = iov.as_mut_ptr();
                msg.msg_iovlen = used as _;
                libc::sendmsg(fd.as_raw_fd(), &msg, libc::MSG_NOSIGNAL | how)
            }
            FdKind::Other => libc::writev(fd.as_raw_fd(), iov.as_ptr(), used as libc::c_int),
        }
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Room for the parts of one call.
pub(super) type PartList = [libc::iovec; MAX_PARTS];

pub(super) const NO_PARTS: PartList =
    [const { libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 } }; MAX_PARTS];

/// Lists the parts for a call of at most `room` bytes, without the first `skip`; returns the number of entries.
pub(super) fn gather(parts: &[SendPart<'_>], skip: usize, room: usize, list: &mut PartList) -> usize {
    let (mut skip, mut room, mut used) = (skip, room, 0);
    for part in parts {
        if used == MAX_PARTS || room == 0 {
            break;
        }
        let (base, len) = match part {
            SendPart::Own(bytes) => (bytes.as_ptr().cast_mut(), bytes.len()),
            SendPart::Guest(span) => (span.as_ptr(), span.len()),
        };
        if skip >= len {
            skip -= len;
            continue;
        }
        let take = (len - skip).min(room);
        list[used] = libc::iovec { iov_base: base.wrapping_add(skip).cast(), iov_len: take };
        room -= take;
        skip = 0;
        used += 1;
    }
    used
}

/// True if some bytes are this program's own.
pub(super) fn has_own(parts: &[SendPart<'_>]) -> bool {
    parts.iter().any(|part| matches!(part, SendPart::Own(_)))
}

/// Fills the parts in order with the available bytes; 0 is the end of the stream (or no room was given).
///
/// # Errors
/// The error of `readv(2)`; `WouldBlock` on a non-blocking descriptor.
pub(crate) fn recv_parts(fd: BorrowedFd<'_>, parts: &mut [RecvPart<'_>]) -> io::Result<usize> {
    let mut iov = [const { libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 } }; 64];
    let mut used = 0;
    for (slot, part) in iov.iter_mut().zip(parts.iter_mut()) {
        *slot = match part {
            RecvPart::Own(bytes) => libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() },
            RecvPart::Guest(span) => libc::iovec { iov_base: span.as_ptr().cast(), iov_len: span.len() },
        };
        used += 1;
    }
    // SAFETY: every iovec names room borrowed mutably (or guest RAM mapped writable) by `parts`, which
    // outlives the call.
    let got = unsafe { libc::readv(fd.as_raw_fd(), iov.as_ptr(), used) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}
