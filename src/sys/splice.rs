//! Pages sent by reference: `vmsplice(2)` puts references to guest pages into a pipe, `splice(2)` moves them on to a socket.
//!
//! Nothing is copied here. The socket's queue holds references to the pages, which the kernel took at the `vmsplice`:
//! the pages stay even if they are unmapped, and the bytes sent are those at the time of transmission (or, on the same
//! host, of the peer's read). So this is only for memory whose writes are tracked, and never for buffers that are
//! reused. The kernel does not report when it drops the references, and memory safety does not depend on it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};

use super::SendPart;
use super::sigpipe::without_sigpipe;
use super::vectored_io::{NO_PARTS, gather, has_own};

/// A pipe that passes guest pages to a socket.
#[derive(Debug)]
pub(crate) struct PagePipe {
    reader: OwnedFd,
    writer: OwnedFd,
    /// Bytes of whole pages that fit: the pipe counts pages (pipe(7)).
    room: usize,
    held: usize,
}

impl PagePipe {
    /// A pipe for at least `least` bytes, and for `wanted` if the limits allow that much (`pipe-max-size` and
    /// `pipe-user-pages-soft`, proc(5)).
    ///
    /// # Errors
    /// The error of `pipe(2)`; EPERM if not even `least` is allowed.
    pub(crate) fn with_room(wanted: usize, least: usize) -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut size = wanted;
        while size >= least && fcntl_setpipe_size(&writer, size).is_err() {
            size /= 2;
        }
        let room = fcntl_getpipe_size(&writer)?;
        if room < least {
            return Err(Errno::PERM.into());
        }
        Ok(Self { reader, writer, room, held: 0 })
    }

    /// Number of bytes in the pipe.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Adds references to the pages of `parts`, without their first `skip` bytes, as many as fit. Returns how many
    /// bytes.
    ///
    /// # Errors
    /// The error of `vmsplice(2)`: EFAULT for memory that can't be referenced, such as a device's. `WouldBlock` if the
    /// pipe is full, `InvalidInput` for own bytes, which may change before they are sent.
    pub(crate) fn refer_to(&mut self, parts: &[SendPart<'_>], skip: usize) -> io::Result<usize> {
        if has_own(parts) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // A page that was sent in part still occupies a whole slot of the pipe.
        let room = self.room.saturating_sub(self.held.next_multiple_of(rustix::param::page_size()));
        if room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut list = NO_PARTS;
        let used = gather(parts, skip, room, &mut list);
        // SAFETY: every entry names guest RAM that is mapped as long as the borrow of `parts`, which outlives the call.
        // The kernel only reads the memory, now or later; later by references to the pages that it takes here, so that
        // pages unmapped or freed meanwhile are not reused. The pages are not gifts: they stay the guest's, which may
        // write them, and no Rust reference to them exists (`HostRegion`).
        let put =
            unsafe { libc::vmsplice(self.writer.as_raw_fd(), list.as_ptr(), used, libc::SPLICE_F_NONBLOCK) };
        let put = usize::try_from(put).map_err(|_| io::Error::last_os_error())?;
        self.held += put;
        Ok(put)
    }

    /// Moves the pipe's content to a socket, as much as fits; returns how many bytes. `more`: more data follows
    /// immediately.
    ///
    /// After a failed call the rest of the pipe's content is unusable: drop the pipe.
    ///
    /// # Errors
    /// The error of `splice(2)`; EPIPE without a signal. `WouldBlock` if a non-blocking socket has no room.
    pub(crate) fn pass_on(&mut self, to: BorrowedFd<'_>, more: bool) -> io::Result<usize> {
        let more = if more { SpliceFlags::MORE } else { SpliceFlags::empty() };
        let flags = SpliceFlags::NONBLOCK | more;
        let held = self.held;
        let passed = without_sigpipe(held, || splice(&self.reader, None, to, None, held, flags))?;
        self.held = self.held.saturating_sub(passed);
        Ok(passed)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::Mapping;
    use crate::sys::testing::memory_of_the_kernel;

    const PAGE: usize = 4096;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn what_travels_is_what_the_pages_hold_later_and_they_outlive_their_mapping() {
        let (near, mut far) = pair();
        let memory = Mapping::memfd("splice", 4 * PAGE as u64).unwrap();
        let span = memory.region().span(0, 4 * PAGE as u64).unwrap();
        span.copy_from(&[7; 4 * PAGE]);
        let mut pipe = PagePipe::with_room(1 << 19, 1 << 16).unwrap();
        assert_eq!(pipe.refer_to(&[SendPart::Guest(span)], PAGE).unwrap(), 3 * PAGE);
        assert_eq!(pipe.pass_on(near.as_fd(), false).unwrap(), 3 * PAGE);
        assert_eq!(pipe.held(), 0);
        span.part(PAGE, PAGE).unwrap().copy_from(&[9; PAGE]);
        drop(memory);
        let mut got = vec![0; 3 * PAGE];
        far.read_exact(&mut got).unwrap();
        let (first, rest) = got.split_at(PAGE);
        assert!(rest.iter().all(|byte| *byte == 7));
        assert!(first.iter().all(|byte| *byte == 9), "the loopback holds the guest's own pages");
    }

    #[test]
    fn a_full_pipe_own_bytes_and_memory_without_pages_are_refused() {
        let memory = Mapping::anonymous(1 << 20).unwrap();
        let guest = [SendPart::Guest(memory.region().span(0, 1 << 20).unwrap())];
        let mut pipe = PagePipe::with_room(1 << 16, 1 << 16).unwrap();
        assert_eq!(pipe.refer_to(&guest, 0).unwrap(), 1 << 16);
        assert_eq!(pipe.refer_to(&guest, 1 << 16).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let mut pipe = PagePipe::with_room(1 << 16, 1 << 16).unwrap();
        assert_eq!(pipe.refer_to(&[SendPart::Own(&[1])], 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let kernels = memory_of_the_kernel();
        let refused =
            pipe.refer_to(&[SendPart::Guest(kernels.span(0, PAGE as u64).unwrap())], 0).unwrap_err();
        assert_eq!(Errno::from_io_error(&refused), Some(Errno::FAULT));
    }

    #[test]
    fn a_pipe_that_can_not_be_large_enough_is_none() {
        let refused = PagePipe::with_room(1 << 31, 1 << 31).unwrap_err();
        assert_eq!(Errno::from_io_error(&refused), Some(Errno::PERM));
    }

    #[test]
    fn a_connection_that_is_gone_is_an_error_and_the_signal_mask_stays() {
        let (near, far) = pair();
        drop(far);
        let memory = Mapping::anonymous(1 << 16).unwrap();
        let guest = [SendPart::Guest(memory.region().span(0, 1 << 16).unwrap())];
        let mut pipe = PagePipe::with_room(1 << 16, 1 << 16).unwrap();
        let error = loop {
            pipe.refer_to(&guest, pipe.held()).unwrap();
            match pipe.pass_on(near.as_fd(), false) {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(
            [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset].contains(&error.kind()),
            "{error}"
        );
        // tests/multifd/splice.rs tests the effect on the process.
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let mask = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap() >> (libc::SIGPIPE - 1) & 1
        };
        assert_eq!((mask("SigBlk:"), mask("SigPnd:")), (0, 0));
    }
}
