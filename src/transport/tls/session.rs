//! One TLS connection, which two threads may use at once: one reads, one writes.
//!
//! Both directions share the state of a TLS connection: a received message may change the key of the next sent bytes.
//! So a lock protects it, and no call in here waits while it is held: the descriptor is non-blocking, and encrypted
//! bytes without room stay queued in their order. The next call of either thread sends them. Both directions may be
//! full without either thread blocking the other.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use rustix::net::{RecvFlags, SendFlags};
use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;

use super::TlsError;
use super::records::{Job, Queue, Records, Step};
use super::refusal::cut_off;
use crate::sys::{Lock as _, RecvPart};

/// Bytes of one read of the descriptor: several records of 16 KiB. More than the longest record or message of a
/// handshake.
const INBOX: usize = 128 << 10;

/// Maximum number of decrypted bytes that wait because a sender looks for the reason of a broken connection.
const LOOKED_THROUGH: usize = 64 << 10;

/// A connection, including its handshake.
#[derive(Debug)]
pub(in crate::transport) struct TlsSession(Mutex<State>);

#[derive(Debug)]
struct State {
    tls: Records,
    inbox: Inbox,
    /// Encrypted and not sent yet.
    outbox: Queue,
    /// Decrypted and not read yet: what was peeked at, and the rest of a record.
    plain: Plain,
    /// No more bytes follow.
    ended: bool,
    /// The peer was told that no byte follows.
    closed: bool,
}

/// Received and not decrypted yet: `from..to`.
#[derive(Debug, Default)]
struct Inbox {
    bytes: Vec<u8>,
    from: usize,
    to: usize,
}

/// Decrypted bytes, of which `read` were read.
#[derive(Debug, Default)]
struct Plain {
    bytes: Vec<u8>,
    read: usize,
}

impl TlsSession {
    pub(super) fn of_client(tls: UnbufferedClientConnection) -> Self {
        Self::new(Records::of_client(tls))
    }

    pub(super) fn of_server(tls: UnbufferedServerConnection) -> Self {
        Self::new(Records::of_server(tls))
    }

    fn new(tls: Records) -> Self {
        let (inbox, outbox, plain) = (Inbox::default(), Queue::default(), Plain::default());
        Self(Mutex::new(State { tls, inbox, outbox, plain, ended: false, closed: false }))
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
        self.0.locked().perform(Job::Encrypt(plain)).and_then(|done| match done {
            true => Ok(()),
            false => Err(io::ErrorKind::NotConnected.into()),
        })
    }

    /// Sends the queued bytes; false if there was not room for all.
    pub(in crate::transport) fn push(&self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        self.0.locked().push(fd)
    }

    /// Announces that no byte follows.
    pub(in crate::transport) fn close(&self) {
        let mut state = self.0.locked();
        if !std::mem::replace(&mut state.closed, true) {
            // A connection that is not open, or has failed, has nobody to tell.
            let _ = state.perform(Job::Close);
        }
    }

    /// Why the peer ended the connection, if it has sent a reason: a failed send does not show it.
    pub(in crate::transport) fn why_broken(&self, fd: BorrowedFd<'_>) -> Option<io::Error> {
        let mut state = self.0.locked();
        loop {
            // Bytes that the peer sent before it are left to be read; if there are more, it is no alert.
            let looked = match state.step(Job::None) {
                Ok(Step::Idle) => state.fill(fd),
                Ok(Step::Ended) => return None,
                Ok(Step::Again | Step::Done) => Ok(state.plain.left().len() < LOOKED_THROUGH),
                Err(error) => Err(error),
            };
            match looked {
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
        while state.plain.left().len() < into.len() && !state.ended {
            let filled = match state.step(Job::None) {
                Ok(Step::Idle) => state.take_in(fd),
                stepped => stepped.map(|_| true),
            };
            match filled {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !state.plain.left().is_empty() => {
                    break;
                }
                Err(error) => return Err(state.after_alert(fd, error)),
            }
        }
        let come = state.plain.left();
        let count = come.len().min(into.len());
        into[..count].copy_from_slice(&come[..count]);
        Ok(count)
    }
}

impl State {
    fn shake_hands(&mut self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        while self.tls.is_handshaking() {
            match self.step(Job::None).map_err(|error| self.after_alert(fd, error))? {
                Step::Again | Step::Done => {}
                Step::Idle if !self.push(fd)? => return Ok(false),
                Step::Idle => _ = self.fill(fd)?,
                Step::Ended => return Err(cut_off()),
            }
        }
        // The last message of the handshake.
        while self.step(Job::None).map_err(|error| self.after_alert(fd, error))? == Step::Again {}
        self.push(fd)
    }

    /// One step; decrypted bytes are queued to be read.
    fn step(&mut self, job: Job<'_>) -> io::Result<Step> {
        let Self { tls, inbox, outbox, plain, ended, .. } = self;
        let mut take = |record: &[u8]| plain.bytes.extend_from_slice(record);
        let (done, step) = tls.step(inbox.waiting(), outbox, job, &mut take)?;
        inbox.from += done;
        *ended |= step == Step::Ended;
        Ok(step)
    }

    /// Takes what has come until the job can be done; false if the connection is not open.
    fn perform(&mut self, job: Job<'_>) -> io::Result<bool> {
        if self.tls.is_handshaking() {
            return Ok(false);
        }
        let mut has_ended = false;
        loop {
            match self.step(job)? {
                Step::Again => {}
                Step::Done => return Ok(true),
                Step::Idle => return Ok(false),
                // The peer may end its direction and go on reading ours.
                Step::Ended if !std::mem::replace(&mut has_ended, true) => {}
                Step::Ended => return Ok(false),
            }
        }
    }

    /// The error, after the peer was sent the reason if there is room for it.
    fn after_alert(&mut self, fd: BorrowedFd<'_>, error: io::Error) -> io::Error {
        let _ = self.push(fd);
        error
    }

    fn push(&mut self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        while !self.outbox.waiting().is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(fd, self.outbox.waiting(), flags).map_err(io::Error::from) {
                Ok(count) => self.outbox.sent(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn recv(&mut self, fd: BorrowedFd<'_>, into: &mut [RecvPart<'_>]) -> io::Result<usize> {
        let room: usize = into.iter().map(RecvPart::len).sum();
        let mut filled = self.plain.read_into(into);
        while filled < room && !self.ended {
            let Self { tls, inbox, outbox, plain, ended, .. } = self;
            let mut take = |record: &[u8]| {
                let count = scatter(record, into, filled);
                filled += count;
                plain.bytes.extend_from_slice(&record[count..]);
            };
            let step = match tls.step(inbox.waiting(), outbox, Job::None, &mut take) {
                Ok((done, step)) => {
                    inbox.from += done;
                    step
                }
                Err(error) if filled == 0 => return Err(self.after_alert(fd, error)),
                // What came before it is read first; the next call fails again.
                Err(error) => {
                    self.after_alert(fd, error);
                    return Ok(filled);
                }
            };
            *ended |= step == Step::Ended;
            if step == Step::Idle {
                // The descriptor is read again only if no bytes are available.
                if filled > 0 {
                    break;
                }
                self.take_in(fd)?;
            }
        }
        self.push(fd)?;
        Ok(filled)
    }

    /// Sends what the handshake or a key update has queued, and reads the descriptor once; false at its end.
    fn take_in(&mut self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        self.push(fd)?;
        self.fill(fd)
    }

    /// Reads the descriptor once; false at its end.
    fn fill(&mut self, fd: BorrowedFd<'_>) -> io::Result<bool> {
        let count = rustix::net::recv(fd, self.inbox.room(), RecvFlags::DONTWAIT)?.0;
        self.inbox.to += count;
        self.ended |= count == 0;
        if count == 0 && self.tls.is_handshaking() { Err(cut_off()) } else { Ok(count > 0) }
    }
}

impl Inbox {
    fn waiting(&mut self) -> &mut [u8] {
        &mut self.bytes[self.from..self.to]
    }

    /// Room behind the last byte: all but an unfinished record or message.
    fn room(&mut self) -> &mut [u8] {
        self.bytes.resize(INBOX, 0);
        self.bytes.copy_within(self.from..self.to, 0);
        (self.from, self.to) = (0, self.to - self.from);
        &mut self.bytes[self.to..]
    }
}

impl Plain {
    fn left(&self) -> &[u8] {
        &self.bytes[self.read..]
    }

    /// Fills the parts as far as it reaches.
    fn read_into(&mut self, into: &mut [RecvPart<'_>]) -> usize {
        let count = scatter(self.left(), into, 0);
        self.read += count;
        if self.read == self.bytes.len() {
            self.bytes.clear();
            self.read = 0;
        }
        count
    }
}

/// Copies as much as fits into the parts, after their first `skip` bytes.
fn scatter(mut bytes: &[u8], into: &mut [RecvPart<'_>], mut skip: usize) -> usize {
    let all = bytes.len();
    for part in into {
        if skip >= part.len() {
            skip -= part.len();
            continue;
        }
        let count = (part.len() - skip).min(bytes.len());
        match part {
            RecvPart::Own(room) => room[skip..skip + count].copy_from_slice(&bytes[..count]),
            RecvPart::Guest(span) => {
                span.part(skip, count).map(|room| room.copy_from(&bytes[..count]));
            }
        }
        (bytes, skip) = (&bytes[count..], 0);
        if bytes.is_empty() {
            break;
        }
    }
    all - bytes.len()
}
