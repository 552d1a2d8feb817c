//! Descriptors that are sent with the bytes of a UNIX socket.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::{End, SendBackend, StreamChannel};
use crate::sys::{
    FdKind, RecvPart, SendPart, Stop, recv_parts, recv_with_descriptors, send_parts, send_with_descriptor,
};
use crate::transport::ChannelError;

/// Maximum number of descriptors that wait to be taken: a reader takes each with the message that it arrived with.
const MAX_WAITING: usize = 16;

/// The first byte that leaves carries the descriptor.
struct WithDescriptor<'a>(Option<BorrowedFd<'a>>);

impl SendBackend for WithDescriptor<'_> {
    fn send(&mut self, end: &End, parts: &[SendPart<'_>], skip: usize) -> io::Result<usize> {
        let (Some(descriptor), [SendPart::Own(bytes), ..]) = (self.0, parts) else {
            return send_parts(end.fd.as_fd(), FdKind::Socket, parts, skip);
        };
        let sent = send_with_descriptor(end.fd.as_fd(), bytes, descriptor)?;
        self.0 = None;
        Ok(sent)
    }
}

/// Descriptors that have arrived and wait to be taken.
#[derive(Debug, Default)]
pub(super) struct Waiting(VecDeque<OwnedFd>);

impl Waiting {
    fn add(&mut self, more: Vec<OwnedFd>) -> io::Result<()> {
        self.0.extend(more);
        if self.0.len() > MAX_WAITING {
            let why = format!("more than {MAX_WAITING} descriptors arrived that no message announced");
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        Ok(())
    }
}

/// As [`recv_parts`]; what descriptors come are kept where they are wanted.
pub(super) fn recv(
    fd: BorrowedFd<'_>,
    into: &mut [RecvPart<'_>],
    waiting: Option<&mut Waiting>,
) -> io::Result<usize> {
    match (waiting, &mut *into) {
        (Some(waiting), [RecvPart::Own(room), ..]) => {
            let mut came = Vec::new();
            let got = recv_with_descriptors(fd, room, &mut came)?;
            waiting.add(came)?;
            Ok(got)
        }
        _ => recv_parts(fd, into),
    }
}

impl StreamChannel {
    /// True for a UNIX socket whose bytes are not encrypted: of TLS no byte of ours leaves as it is.
    pub(super) fn may_carry_descriptors(&self) -> bool {
        let socket = socket2::SockRef::from(&self.end.fd);
        self.end.kind() == FdKind::Socket
            && !self.is_secured()
            && socket.local_addr().is_ok_and(|address| address.is_unix())
    }

    pub(super) fn send_carrying(
        &mut self,
        bytes: &[u8],
        descriptor: BorrowedFd<'_>,
        stop: &Stop,
    ) -> Result<(), ChannelError> {
        self.send_by(&mut WithDescriptor(Some(descriptor)), &[SendPart::Own(bytes)], stop)
    }

    pub(super) fn keep_descriptors(&mut self, wanted: bool) -> bool {
        let can = wanted && self.may_carry_descriptors();
        match can {
            true => drop(self.waiting.get_or_insert_default()),
            false => self.waiting = None,
        }
        can
    }

    pub(super) fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.waiting.as_mut()?.0.pop_front()
    }
}
