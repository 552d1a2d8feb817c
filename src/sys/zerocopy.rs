//! Sends that the kernel makes from the pages themselves (MSG_ZEROCOPY), and the kernel's notification that it no
//! longer uses the pages.
//!
//! Every send with [`FdKind::ZeroCopy`](super::FdKind) that takes bytes gets a number, from 0 on for each socket. The
//! receipt with that number arrives in the socket's error queue once the kernel and the NIC no longer use the pages.
//! (Documentation/networking/msg_zerocopy.rst)

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd};

/// `SO_EE_ORIGIN_ZEROCOPY` and `SO_EE_CODE_ZEROCOPY_COPIED` (linux/errqueue.h).
const ORIGIN_ZEROCOPY: u8 = 5;
const CODE_COPIED: u8 = 1;

/// Receipt: the kernel no longer uses the pages of some sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ZeroCopyReceipt {
    /// Number of the first send, counted modulo 2^32.
    pub first: u32,
    /// Number of the last one; not below `first`, except after a wrap.
    pub last: u32,
    /// The kernel has copied the bytes instead.
    pub copied: bool,
}

/// Lets `fd` send from the pages themselves (SO_ZEROCOPY, socket(7)).
///
/// # Errors
/// EOPNOTSUPP or ENOTSUPP for sockets without support, such as UNIX ones.
pub(crate) fn allow_zero_copy(fd: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of a value that outlives the call.
    let set = unsafe {
        let value = std::ptr::from_ref(&on).cast();
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, value, len)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Room for the control data of one receipt: the error, and the address that it is about. In words, so that the headers
/// in it are aligned.
type Control = [MaybeUninit<u64>; 32];

/// The next receipt, without waiting; `None` if there is none. Anything else that the error queue holds is skipped.
///
/// # Errors
/// The error of `recvmsg(2)`.
pub(crate) fn zero_copy_receipt(fd: BorrowedFd<'_>) -> io::Result<Option<ZeroCopyReceipt>> {
    loop {
        let mut control: Control = [MaybeUninit::zeroed(); 32];
        // SAFETY: all zeros is an empty message header.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of::<Control>() as _;
        let flags = libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT;
        // SAFETY: the message has room for control data of the length in it, and for no bytes.
        if unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, flags) } < 0 {
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                error if error.kind() == io::ErrorKind::Interrupted => continue,
                error => return Err(error),
            }
        }
        if let Some(receipt) = receipt_in(&message) {
            return Ok(Some(receipt));
        }
    }
}

fn receipt_in(message: &libc::msghdr) -> Option<ZeroCopyReceipt> {
    // SAFETY: the kernel has filled the control buffer, which is aligned for headers, and set its length; the macros
    // stay inside it.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: null, or a header inside the buffer.
    while let Some(header) = unsafe { at.as_ref() } {
        let is_error = matches!(
            (header.cmsg_level, header.cmsg_type),
            (libc::SOL_IP, libc::IP_RECVERR) | (libc::SOL_IPV6, libc::IPV6_RECVERR)
        );
        let holds = size_of::<libc::cmsghdr>() + size_of::<libc::sock_extended_err>();
        if is_error && header.cmsg_len >= holds {
            // SAFETY: by the header, this many bytes follow it; they are read unaligned.
            let error: libc::sock_extended_err =
                unsafe { libc::CMSG_DATA(header).cast::<libc::sock_extended_err>().read_unaligned() };
            if error.ee_errno == 0 && error.ee_origin == ORIGIN_ZEROCOPY {
                let copied = error.ee_code & CODE_COPIED != 0;
                return Some(ZeroCopyReceipt { first: error.ee_info, last: error.ee_data, copied });
            }
        }
        // SAFETY: as for the first.
        at = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::{FdKind, Mapping, SendPart, send_parts};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    /// On the loopback the receiver would read the sender's own pages: the kernel copies, and reports that.
    #[test]
    fn the_loopback_copies_and_says_so() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        allow_zero_copy(near.as_fd()).unwrap();
        assert_eq!(zero_copy_receipt(near.as_fd()).unwrap(), None);
        let memory = Mapping::anonymous(64 << 10).unwrap();
        let pages = [SendPart::Guest(memory.region().span(0, 64 << 10).unwrap())];
        for _ in 0..3 {
            let sent = send_parts(near.as_fd(), FdKind::ZeroCopy, &pages, 0).unwrap();
            std::io::copy(&mut std::io::Read::take(&far, sent as u64), &mut std::io::sink()).unwrap();
        }
        let mut next = 0;
        while next < 3 {
            let Some(receipt) = zero_copy_receipt(near.as_fd()).unwrap() else {
                std::thread::yield_now();
                continue;
            };
            assert_eq!((receipt.first, receipt.copied), (next, true));
            next = receipt.last + 1;
        }
        assert_eq!(next, 3);
        let own = [SendPart::Own(&[1])];
        assert!(send_parts(near.as_fd(), FdKind::ZeroCopy, &own, 0).is_err(), "own bytes may change");
    }

    #[test]
    fn a_unix_socket_can_not() {
        let (near, _far) = UnixStream::pair().unwrap();
        assert!(allow_zero_copy(near.as_fd()).is_err());
    }
}
