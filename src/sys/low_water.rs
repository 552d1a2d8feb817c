//! How many bytes must arrive before a socket counts as readable.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sets how many bytes must be in a TCP socket before `poll(2)` reports it as readable (SO_RCVLOWAT, socket(7)). A new
/// socket has 1.
///
/// The end of the stream, an error and a nearly closed window make it readable at any time. The kernel caps the number
/// at half of the receive buffer's limit, and enlarges the buffer if it may.
///
/// # Errors
/// The error of `setsockopt(2)`.
pub(crate) fn set_low_water(fd: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of a value that outlives the call.
    let set = unsafe {
        let value = std::ptr::from_ref(&bytes).cast();
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, len)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::{CancelToken, Stop, StopReason};
    use rustix::event::PollFlags;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::Duration;

    fn readable(socket: &TcpStream, within: u64) -> bool {
        let stop = Stop::on(&CancelToken::default()).within(Duration::from_millis(within));
        stop.wait(socket.as_fd(), PollFlags::IN).unwrap() != Some(StopReason::Deadline)
    }

    #[test]
    fn a_socket_is_readable_from_its_mark_on_and_at_its_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        set_low_water(far.as_fd(), 1000).unwrap();
        near.write_all(&[1; 999]).unwrap();
        assert!(!readable(&far, 50), "a byte is missing");
        near.write_all(&[1]).unwrap();
        assert!(readable(&far, 10_000));
        set_low_water(far.as_fd(), 2000).unwrap();
        assert!(!readable(&far, 50));
        set_low_water(far.as_fd(), 1).unwrap();
        assert!(readable(&far, 10_000));
        set_low_water(far.as_fd(), 2000).unwrap();
        drop(near);
        assert!(readable(&far, 10_000), "the end of the stream");
    }
}
