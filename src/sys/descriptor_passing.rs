//! Descriptors that are sent over a UNIX socket (`SCM_RIGHTS`, unix(7)).
//!
//! A descriptor belongs to a byte of the stream. The kernel ends a read after the message that carried one, so a reader
//! of that byte has the descriptor as well. A read without room for descriptors loses them: the kernel closes them.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Maximum number of descriptors that one read takes.
const MAX_DESCRIPTORS: usize = 8;

/// Sends some of `bytes`, and `descriptor` with the first of them. Returns how many bytes were sent.
///
/// # Errors
/// The error of `sendmsg(2)`; `WouldBlock` on a non-blocking descriptor.
pub(crate) fn send_with_descriptor(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptor: BorrowedFd<'_>,
) -> io::Result<usize> {
    let (mut space, descriptors) = ([MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))], [descriptor]);
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?)
}

/// Reads the bytes that are there into `into`, and appends the descriptors that arrived with them, closed on exec.
/// Returns how many bytes arrived; 0 is the end of the stream.
///
/// # Errors
/// The error of `recvmsg(2)`; `WouldBlock` on a non-blocking descriptor. `InvalidData` if more descriptors arrived at
/// once than are taken, or than this process may have open.
pub(crate) fn recv_with_descriptors(
    socket: BorrowedFd<'_>,
    into: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(socket, &mut [IoSliceMut::new(into)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = part {
            descriptors.extend(more);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        let why = format!(
            "more than {MAX_DESCRIPTORS} descriptors arrived at once, or more than this process may have open \
             (RLIMIT_NOFILE)"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    Ok(message.bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn inode(descriptor: impl AsFd) -> (u64, u64) {
        let stat = rustix::fs::fstat(descriptor).unwrap();
        (stat.st_dev, stat.st_ino)
    }

    fn memfd() -> OwnedFd {
        rustix::fs::memfd_create("passed", rustix::fs::MemfdFlags::CLOEXEC).unwrap()
    }

    /// However small the reads are: a descriptor is there with the byte that it was sent with.
    #[test]
    fn descriptors_come_in_order_and_not_after_their_bytes() {
        for room in [1, 3, 100] {
            let (near, far) = UnixStream::pair().unwrap();
            let files = [memfd(), memfd()];
            (&near).write_all(b"before").unwrap();
            for file in &files {
                assert_eq!(send_with_descriptor(near.as_fd(), b"with", file.as_fd()).unwrap(), 4);
            }
            (&near).write_all(b"after").unwrap();
            drop(near);
            let (mut came, mut bytes) = (Vec::new(), Vec::new());
            loop {
                let mut buffer = vec![0; room];
                let got = recv_with_descriptors(far.as_fd(), &mut buffer, &mut came).unwrap();
                bytes.extend_from_slice(&buffer[..got]);
                assert!(came.len() >= bytes.windows(1).filter(|byte| byte == b"w").count());
                if got == 0 {
                    break;
                }
            }
            assert_eq!(bytes, b"beforewithwithafter");
            let came: Vec<_> = came.iter().map(inode).collect();
            assert_eq!(came, [inode(&files[0]), inode(&files[1])]);
        }
    }

    #[test]
    fn more_descriptors_than_are_taken_are_refused_and_closed() {
        let (near, far) = UnixStream::pair().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let many = [writer.as_fd(); MAX_DESCRIPTORS + 5];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS + 5))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&many)));
        sendmsg(&near, &[IoSlice::new(b"x")], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
        let mut came = Vec::new();
        let refused = recv_with_descriptors(far.as_fd(), &mut [0; 9], &mut came).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
        assert!(came.len() < many.len(), "{}", came.len());
        drop((came, writer));
        assert_eq!((&reader).read(&mut [0; 1]).unwrap(), 0, "no writer is left open");
    }
}
