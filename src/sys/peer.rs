//! The process at the other end of a UNIX socket.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};

/// The process that connected, with its ids at that time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerProcess {
    /// Its id; `None` for one outside of this process's namespace.
    pub pid: Option<u32>,
    /// Its effective user.
    pub uid: u32,
}

/// The process that connected (`SO_PEERCRED`, unix(7)).
///
/// # Errors
/// The error of `getsockopt(2)`: it is no UNIX socket.
pub fn peer_process(socket: BorrowedFd<'_>) -> io::Result<PeerProcess> {
    let mut who = MaybeUninit::<libc::ucred>::zeroed();
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes of the structure that it is given room for.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            who.as_mut_ptr().cast(),
            &mut len,
        )
    };
    if answer != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: three numbers, filled or zero.
    let who = unsafe { who.assume_init() };
    Ok(PeerProcess { pid: u32::try_from(who.pid).ok().filter(|pid| *pid > 0), uid: who.uid })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn the_other_end_of_a_unix_socket_has_a_process_and_a_user() {
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let own = PeerProcess { pid: Some(std::process::id()), uid: rustix::process::geteuid().as_raw() };
        assert_eq!(peer_process(near.as_fd()).unwrap(), own);
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(peer_process(tcp.as_fd()).is_err() || peer_process(tcp.as_fd()).unwrap().pid.is_none());
    }
}
