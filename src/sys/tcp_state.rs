//! What the kernel reports about bytes in flight: how many are queued, and whether the peer answers.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use super::FdKind;

/// State of a TCP connection that shows whether the peer answers (`struct tcp_info`, tcp(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TcpState {
    /// Segments sent and not acknowledged.
    pub unacked: u32,
    /// How often the oldest of them was retransmitted since the last acknowledgement of data.
    pub retransmits: u8,
    /// Unanswered probes of a closed window.
    pub probes: u8,
    /// Time since the last acknowledgement.
    pub last_ack: Duration,
    /// Bytes that the peer has room for; `None` if the kernel does not report it.
    pub send_window: Option<u32>,
}

/// Queries the kernel for the state of a TCP socket.
///
/// # Errors
/// The error of `getsockopt(2)`; another kind of socket has no such state.
pub(crate) fn tcp_state(fd: BorrowedFd<'_>) -> io::Result<TcpState> {
    // Offsets in `struct tcp_info`, which only grows; the kernel fills the fields that it supports.
    const RETRANSMITS: usize = 2;
    const PROBES: usize = 3;
    const UNACKED: usize = 24;
    const LAST_ACK: usize = 56;
    const SEND_WINDOW: usize = 228;
    let mut info = [0u8; 232];
    let mut len = info.len() as libc::socklen_t;
    // SAFETY: `info` has room for the `len` bytes the kernel may write; `len` is a valid in/out argument.
    let answer = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut len,
        )
    };
    if answer != 0 {
        return Err(io::Error::last_os_error());
    }
    let word = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    Ok(TcpState {
        unacked: word(UNACKED),
        retransmits: info[RETRANSMITS],
        probes: info[PROBES],
        last_ack: Duration::from_millis(word(LAST_ACK).into()),
        send_window: (len as usize >= SEND_WINDOW + 4).then(|| word(SEND_WINDOW)),
    })
}

/// Bytes written but not yet received by the other end: unacknowledged (TCP) or unread (UNIX sockets, pipes).
///
/// # Errors
/// The error of `ioctl(2)`; a file has no such queue.
pub(crate) fn queued_bytes(fd: BorrowedFd<'_>, kind: FdKind) -> io::Result<u64> {
    let request = match kind {
        // SIOCOUTQ, by its other name.
        FdKind::Socket | FdKind::ZeroCopy | FdKind::More => libc::TIOCOUTQ,
        FdKind::Other => libc::FIONREAD,
    };
    let mut count: libc::c_int = 0;
    // SAFETY: both requests write one int.
    let answer = unsafe { libc::ioctl(fd.as_raw_fd(), request, &mut count) };
    if answer != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(count).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn unread_bytes_are_counted_on_unix_sockets_and_pipes() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        near.write_all(&[1; 1000]).unwrap();
        assert!(queued_bytes(near.as_fd(), FdKind::Socket).unwrap() >= 1000);
        far.read_exact(&mut [0; 1000]).unwrap();
        assert_eq!(queued_bytes(near.as_fd(), FdKind::Socket).unwrap(), 0);
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(&[1; 7]).unwrap();
        assert_eq!(queued_bytes(writer.as_fd(), FdKind::Other).unwrap(), 7);
        drop(reader);
    }

    #[test]
    fn a_tcp_connection_tells_its_window_and_what_is_under_way() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _far = listener.accept().unwrap();
        let state = tcp_state(near.as_fd()).unwrap();
        assert!(state.send_window.is_none_or(|window| window > 0), "{state:?}");
        assert_eq!((state.probes, state.retransmits), (0, 0));
        near.set_nonblocking(true).unwrap();
        while near.write(&[0; 1 << 16]).is_ok() {}
        assert!(queued_bytes(near.as_fd(), FdKind::Socket).unwrap() > 0);
        let (unix, _other) = UnixStream::pair().unwrap();
        assert!(tcp_state(unix.as_fd()).is_err());
    }
}
