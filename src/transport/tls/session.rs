//! One TLS connection, which two threads may use at once: one reads, one writes.
//!
//! Both directions share the state of a TLS connection: a received message may change the key of the next sent bytes.
//! So a lock protects it, and no call in here waits while it is held: the descriptor is non-blocking, and encrypted
//! bytes without room stay queued in their order. The next call of either thread sends them. Both directions may be
//! full without either thread blocking the other.

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustls::Connection;

use super::TlsError;
use super::refusal::{cut_off, refused};
use crate::sys::{Lock as _, RecvPart};

/// Bytes of one read of the descriptor: several records of 16 KiB.
const INBOX: usize = 128 << 10;

/// A connection, including its handshake.
#[derive(Debug)]
pub(in crate::transport) struct TlsSession(Mutex<State>);

#[derive(Debug)]
struct State {
    tls: Connection,
    /// Received but not decrypted yet: `from..to`.
    inbox: Vec<u8>,
    from: usize,
    to: usize,
    /// Decrypted and peeked at, but not read yet.
    seen: Vec<u8>,
    /// No more bytes follow.
    ended: bool,
}

impl TlsSession {
    pub(super) fn new(mut tls: Connection) -> Self {
        // The sender bounds how much is encrypted at a time.
        tls.set_buffer_limit(None);
        let (inbox, seen) = (Vec::new(), Vec::new());
        Self(Mutex::new(State { tls, inbox, from: 0, to: 0, seen, ended: false }))
    }

    /// True once the handshake is over.
    pub(in crate::transport) fn is_open(&self) -> bool {
        !self.0.locked().tls.is_handshaking()
    }

    /// Continues the handshake as far as possible without waiting; true when it is over.
    ///
    /// # Errors
    /// `WouldBlock` if the peer's bytes are missing; an error with a [`TlsError`] inside, or the kernel's error.
    pub(in crate::transport) fn shake_hands(&self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        self.0.locked().shake_hands(fd).map_err(|error| match error.kind() {
            // A peer that does not use TLS leaves the handshake unread and closes, which is a reset.
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => cut_off(),
            _ => error,
        })
    }

    /// Encrypts bytes, which are queued after earlier ones.
    pub(in crate::transport) fn encrypt(&self, plain: &[u8]) -> io::Result<()> {
        self.0.locked().tls.writer().write_all(plain)
    }

    /// Sends the queued bytes; false if there was not room for all.
    pub(in crate::transport) fn push(&self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        self.0.locked().push(fd)
    }

    /// Announces that no byte follows.
    pub(in crate::transport) fn close(&self) {
        self.0.locked().tls.send_close_notify();
    }

    /// Why the peer ended the connection, if it has sent a reason: a failed send does not show it.
    pub(in crate::transport) fn why_broken(&self, fd: BorrowedFd<'_>) -> Option<io::Error> {
        let mut state = self.0.locked();
        loop {
            // Bytes that the peer sent before it are left to be read; if they do not fit, it is no alert.
            match state.take_in(fd) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    return error.get_ref().is_some_and(|why| why.is::<TlsError>()).then_some(error);
                }
            }
        }
    }

    /// Fills the parts with the received bytes; 0 is the end.
    ///
    /// # Errors
    /// `WouldBlock` if there are none; an error with a [`TlsError`] inside, or the kernel's error.
    pub(in crate::transport) fn recv(
        &self,
        fd: BorrowedFd<'_>,
        into: &mut [RecvPart<'_>],
    ) -> io::Result<usize> {
        self.0.locked().recv(fd, into)
    }

    /// The first received bytes, which stay to be read; 0 is the end.
    ///
    /// # Errors
    /// As [`recv`](Self::recv).
    pub(in crate::transport) fn peek(&self, fd: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
        let mut state = self.0.locked();
        let mut buffer = vec![0; into.len()];
        while state.seen.len() < into.len() {
            let room = into.len() - state.seen.len();
            match state.recv_new(fd, &mut [RecvPart::Own(&mut buffer[..room])]) {
                Ok(0) => break,
                Ok(count) => state.seen.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !state.seen.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        let count = state.seen.len().min(into.len());
        into[..count].copy_from_slice(&state.seen[..count]);
        Ok(count)
    }
}

impl State {
    fn shake_hands(&mut self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        while self.tls.is_handshaking() {
            if !self.push(fd)? {
                return Ok(false);
            }
            if self.tls.is_handshaking() && !self.take_in(fd)? {
                return Err(cut_off());
            }
        }
        self.push(fd)
    }

    fn push(&mut self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut Descriptor(fd)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn recv(&mut self, fd: BorrowedFd<'_>, into: &mut [RecvPart<'_>]) -> io::Result<usize> {
        if self.seen.is_empty() {
            return self.recv_new(fd, into);
        }
        let count = scatter(&self.seen, into);
        self.seen.drain(..count);
        Ok(count)
    }

    /// Reads bytes that were not peeked at.
    fn recv_new(&mut self, fd: BorrowedFd<'_>, into: &mut [RecvPart<'_>]) -> io::Result<usize> {
        let room: usize = into.iter().map(RecvPart::len).sum();
        let mut filled = 0;
        loop {
            filled += self.take_plain(into, filled)?;
            if filled == room || self.ended {
                return Ok(filled);
            }
            // Reads the descriptor again only if no bytes are available.
            if self.from == self.to && filled > 0 {
                return Ok(filled);
            }
            self.take_in(fd)?;
        }
    }

    /// Copies decrypted bytes into the parts, after their first `skip` bytes.
    fn take_plain(&mut self, into: &mut [RecvPart<'_>], mut skip: usize) -> io::Result<usize> {
        let mut taken = 0;
        for part in into {
            if skip >= part.len() {
                skip -= part.len();
                continue;
            }
            let wanted = part.len() - skip;
            let got = match part {
                RecvPart::Own(room) => read_some(&mut self.tls, &mut room[skip..])?,
                RecvPart::Guest(span) => {
                    let mut got = 0;
                    let mut piece = [0; 4096];
                    while got < wanted {
                        let most = piece.len().min(wanted - got);
                        let count = read_some(&mut self.tls, &mut piece[..most])?;
                        let Some(room) = span.part(skip + got, count).filter(|_| count > 0) else { break };
                        room.copy_from(&piece[..count]);
                        got += count;
                    }
                    got
                }
            };
            (taken, skip) = (taken + got, 0);
            if got < wanted {
                break;
            }
        }
        Ok(taken)
    }

    /// Decrypts received bytes, or reads the descriptor once; false at its end.
    fn take_in(&mut self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        if self.from == self.to {
            self.inbox.resize(INBOX, 0);
            (self.from, self.to) = (0, 0);
            self.to = match rustix::net::recv(fd, &mut self.inbox[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    self.ended = true;
                    return if self.tls.is_handshaking() { Err(cut_off()) } else { Ok(false) };
                }
                Ok((count, _)) => count,
                Err(errno) => return Err(errno.into()),
            };
        }
        let mut come = &self.inbox[self.from..self.to];
        let before = come.len();
        self.tls.read_tls(&mut come)?;
        self.from += before - come.len();
        let done = self.tls.process_new_packets();
        // Handshake messages, key updates, and alerts with the reason of a refusal.
        let pushed = self.push(fd);
        let state = done.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, refused(&error)))?;
        pushed?;
        self.ended |= state.peer_has_closed();
        Ok(!self.ended)
    }
}

fn read_some(tls: &mut Connection, room: &mut [u8]) -> io::Result<usize> {
    match tls.reader().read(room) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        read => read,
    }
}

/// Copies as much as fits.
fn scatter(mut bytes: &[u8], into: &mut [RecvPart<'_>]) -> usize {
    let all = bytes.len();
    for part in into {
        let count = part.len().min(bytes.len());
        match part {
            RecvPart::Own(room) => room[..count].copy_from_slice(&bytes[..count]),
            RecvPart::Guest(span) => {
                span.copy_from(&bytes[..count]);
            }
        }
        bytes = &bytes[count..];
    }
    all - bytes.len()
}

/// Writes as much as a socket has room for.
struct Descriptor<'a>(BorrowedFd<'a>);

impl Write for Descriptor<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        rustix::net::send(self.0, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map_err(Errno::into)
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        rustix::net::sendmsg(self.0, parts, &mut Default::default(), flags).map_err(Errno::into)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
