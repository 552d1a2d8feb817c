//! A byte stream over a descriptor: a socket, a pipe or a file.
//!
//! The descriptor is non-blocking and every wait is a poll that watches the caller's [`Stop`] too; how long
//! a wait goes on is decided in `patience`. Parts are handed to the kernel where they lie, up to 1024 a
//! call, so guest RAM is not copied by us.

pub(super) mod exec;
pub(super) mod file;
mod low_watermark;
pub(super) mod patience;
pub(super) mod tcp;
pub(super) mod unix;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use rustix::net::Shutdown;
use socket2::SockRef;

use crate::sys::{
    FdKind, MAX_PARTS, RecvPart, SendPart, Stop, StopReason, queued_bytes, recv_parts, send_parts,
};
use crate::transport::{ByteSink, ByteSource, ChannelError};
use exec::ChildCommand;
use low_watermark::{BURST_TIMEOUT, LowWater};
use patience::Patience;

const SENDING: &str = "sending the stream";
const RECEIVING: &str = "waiting for the stream";
const FINISHING: &str = "finishing the stream";

/// Bytes after the stream's end that a command may still print.
const MAX_TRAILING: usize = 1 << 20;

/// How long waits go on, and what the end of a stream means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamOptions {
    /// Longest time without a byte moved. `None`: as long as the peer is alive.
    pub stall: Option<Duration>,
    /// Longest time in which the peer's kernel answers nothing (TCP).
    pub dead_peer: Duration,
    /// Whether [`StreamChannel::finish`] waits until a written file is on the disk.
    pub sync_file: bool,
}

impl Default for StreamOptions {
    /// 30 s without a byte, 10 s without an answer, files on the disk.
    fn default() -> Self {
        Self { stall: Some(Duration::from_secs(30)), dead_peer: Duration::from_secs(10), sync_file: true }
    }
}

/// What lies behind the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Nature {
    Tcp,
    Socket,
    Pipe,
    File,
}

/// The descriptor and what both halves know of it.
#[derive(Debug)]
pub(super) struct End {
    pub(super) fd: OwnedFd,
    pub(super) nature: Nature,
    pub(super) peer: String,
    /// In milliseconds: both halves follow when it changes.
    dead_peer: AtomicU64,
    sync_file: bool,
    /// Status flags to put back: somebody else may use the same pipe or terminal after us.
    flags_before: Option<OFlags>,
    child: Option<ChildCommand>,
}

impl End {
    pub(super) fn kind(&self) -> FdKind {
        match self.nature {
            Nature::Tcp | Nature::Socket => FdKind::Socket,
            Nature::Pipe | Nature::File => FdKind::Other,
        }
    }

    /// How long the peer's kernel may answer nothing.
    pub(super) fn dead_peer(&self) -> Duration {
        Duration::from_millis(self.dead_peer.load(Ordering::Relaxed))
    }

    /// What a failed call means.
    pub(super) fn broken(&self, doing: &'static str, source: std::io::Error) -> ChannelError {
        let peer = self.peer.clone();
        match Errno::from_io_error(&source) {
            Some(Errno::PIPE) => ChannelError::Closed { peer, doing },
            Some(Errno::TIMEDOUT) => ChannelError::Silent { peer, doing, after: self.dead_peer() },
            _ => ChannelError::Io { peer, doing, source },
        }
    }
}

/// Tells what waits in a connection's queue, and does not keep it open.
#[derive(Debug)]
pub(super) struct Queue(Weak<End>);

impl Queue {
    /// Bytes that were sent and have not left this host; 0 where the kernel does not tell.
    pub(super) fn bytes(&self) -> u64 {
        self.0.upgrade().and_then(|end| queued_bytes(end.fd.as_fd(), end.kind()).ok()).unwrap_or(0)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if let Some(flags) = self.flags_before {
            // Nothing can be done about a failure; the descriptor closes next.
            let _ = rustix::fs::fcntl_setfl(&self.fd, flags);
        }
    }
}

/// A byte stream: a sink, a source, or both.
#[derive(Debug)]
pub struct StreamChannel {
    end: Arc<End>,
    sent: u64,
    stall: Option<Duration>,
    /// The peer may be silent while its connection answers.
    quiet: bool,
    low_water: LowWater,
}

impl Drop for StreamChannel {
    fn drop(&mut self) {
        self.low_water.put_back(self.end.fd.as_fd());
    }
}

impl StreamChannel {
    /// Takes a connected stream socket, a pipe or a file.
    ///
    /// `peer` names the other end in messages. A TCP socket is set to send at once (`TCP_NODELAY`) and to
    /// notice a dead peer. A pipe whose reader left raises `SIGPIPE`, which every Rust program ignores
    /// unless it asks not to.
    ///
    /// # Errors
    /// What the kernel says; `InvalidInput` for a socket that is not a stream, or a directory.
    pub fn from_fd(fd: OwnedFd, peer: impl Into<String>, options: &StreamOptions) -> std::io::Result<Self> {
        Self::assemble(fd, peer.into(), options, None)
    }

    /// The same, with the command at the other end of the descriptor.
    pub(super) fn of_command(
        fd: OwnedFd,
        child: ChildCommand,
        options: &StreamOptions,
    ) -> std::io::Result<Self> {
        let peer = format!("exec:{}", child.command());
        Self::assemble(fd, peer, options, Some(child))
    }

    fn assemble(
        fd: OwnedFd,
        peer: String,
        options: &StreamOptions,
        child: Option<ChildCommand>,
    ) -> std::io::Result<Self> {
        let nature = nature_of(fd.as_fd())?;
        if nature == Nature::Tcp {
            tcp::tune(fd.as_fd(), options.dead_peer)?;
        }
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        let blocking = !flags.contains(OFlags::NONBLOCK);
        if blocking {
            rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        }
        let end = End {
            fd,
            nature,
            peer,
            dead_peer: AtomicU64::new(millis(options.dead_peer)),
            sync_file: options.sync_file,
            flags_before: blocking.then_some(flags),
            child,
        };
        Ok(Self {
            end: Arc::new(end),
            sent: 0,
            stall: options.stall,
            quiet: false,
            low_water: LowWater::new(nature),
        })
    }

    /// Two halves of the same connection, for two threads. It closes with the later one.
    pub fn split(self) -> (Self, Self) {
        let low_water = LowWater::new(self.end.nature);
        let other = Self { end: Arc::clone(&self.end), sent: 0, stall: self.stall, quiet: false, low_water };
        (self, other)
    }

    /// The stream and, where the descriptor carries both directions, its return path. What waits there has a
    /// limit of its own, the caller's [`Stop`]: hearing nothing is no stall.
    pub fn with_return_path(self) -> (Self, Option<Self>) {
        let both_ways = self.end.kind() == FdKind::Socket && self.end.child.is_none();
        let (stream, mut back) = self.split();
        back.stall = None;
        (stream, both_ways.then_some(back))
    }

    /// Name of the other end, for messages.
    pub fn peer(&self) -> &str {
        &self.end.peer
    }

    /// A handle that breaks the connection from elsewhere, under both halves.
    pub fn breaker(&self) -> StreamBreaker {
        StreamBreaker(Arc::clone(&self.end))
    }

    /// How long a wait for bytes may go on without any.
    fn stall_in_recv(&self) -> Option<Duration> {
        let answers = self.end.kind() == FdKind::Socket && self.end.child.is_none();
        self.stall.filter(|_| !(self.quiet && answers))
    }

    /// Only the caller's stop ends a wait, whatever the peer's kernel does for `limit`.
    fn outlast_silence(&mut self, limit: Duration) {
        self.stall = None;
        self.end.dead_peer.fetch_max(millis(limit), Ordering::Relaxed);
        if self.end.nature == Nature::Tcp
            && let Err(error) = tcp::keep_alive(&SockRef::from(&self.end.fd), self.end.dead_peer())
        {
            tracing::warn!(%error, "an outage may end this connection sooner than was asked for");
        }
    }

    /// Changes the stall time of this half. `None`: waits go on as long as the peer is alive.
    pub fn set_stall(&mut self, stall: Option<Duration>) {
        self.stall = stall;
    }

    /// Tells a TCP peer at once what has come. A peer that holds a small message back until the one before it is
    /// acknowledged (Nagle's algorithm) otherwise waits for our delayed acknowledgement, 40 ms.
    pub(crate) fn acknowledge_at_once(&self) {
        if self.end.nature == Nature::Tcp
            && let Err(error) = rustix::net::sockopt::set_tcp_quickack(&self.end.fd, true)
        {
            tracing::debug!(%error, "acknowledgements may be delayed");
        }
    }

    /// The first bytes of the stream of a socket that are there, as many as `into` has room for; they stay to be read. 0 is
    /// the end of the stream.
    ///
    /// # Errors
    /// The kernel's; `AGAIN` where nothing has come.
    pub(crate) fn peek(&self, into: &mut [u8]) -> Result<usize, Errno> {
        rustix::net::recv(&self.end.fd, into, rustix::net::RecvFlags::PEEK).map(|(_, come)| come)
    }

    /// True if the peer of a socket has closed it: nothing comes behind what is there.
    pub(super) fn has_been_closed(&self) -> bool {
        let mut ended = [PollFd::new(&self.end.fd, PollFlags::RDHUP)];
        let over = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        rustix::event::poll(&mut ended, Some(&Timespec::default())).is_ok()
            && ended[0].revents().intersects(over)
    }

    /// The first four bytes of the stream of a socket, which stay to be read.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub(super) fn peek_word(&self, stop: &Stop) -> Result<[u8; 4], ChannelError> {
        /// Time after which a word that has begun is looked at again: the bytes that are there wake no wait.
        const RETRY_INTERVAL: Duration = Duration::from_millis(2);
        const PEEKING: &str = "waiting for the first bytes of a channel";
        let mut patience = Patience::new(&self.end, PEEKING, self.stall);
        let mut word = [0; 4];
        loop {
            match self.peek(&mut word) {
                Ok(4) => return Ok(word),
                Ok(0) => {
                    return Err(ChannelError::Closed { peer: self.end.peer.clone(), doing: PEEKING });
                }
                Ok(_) => patience.rest(RETRY_INTERVAL, stop)?,
                Err(Errno::AGAIN) => patience.wait(PollFlags::IN, stop)?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.end.broken(PEEKING, errno.into())),
            }
        }
    }

    /// Ends the stream in good order: says that no byte follows, waits until the peer's kernel has them all
    /// (TCP), the bytes are on the disk (files, where asked for) or the command has ended.
    ///
    /// # Errors
    /// [`ChannelError`]; what was sent may then not have arrived. Syncing a file can't be stopped.
    pub fn finish(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        match self.end.nature {
            Nature::Tcp => {
                self.close_sending()?;
                self.await_acknowledged(stop)?;
            }
            Nature::Socket => self.close_sending()?,
            Nature::File if self.end.sync_file => self.sync_file()?,
            Nature::Pipe if self.end.child.is_some() => return self.read_out(stop),
            Nature::File | Nature::Pipe => {}
        }
        self.await_child(stop)
    }

    fn close_sending(&self) -> Result<(), ChannelError> {
        match rustix::net::shutdown(&self.end.fd, Shutdown::Write) {
            // The peer closed first: everything it wanted it had.
            Ok(()) | Err(Errno::NOTCONN) => Ok(()),
            Err(errno) => Err(self.end.broken(FINISHING, errno.into())),
        }
    }

    fn await_acknowledged(&self, stop: &Stop) -> Result<(), ChannelError> {
        const RETRY_INTERVAL: Duration = Duration::from_millis(2);
        let fd = self.end.fd.as_fd();
        let mut patience = Patience::new(&self.end, FINISHING, self.stall);
        loop {
            let waiting = queued_bytes(fd, FdKind::Socket);
            if waiting.map_err(|source| self.end.broken(FINISHING, source))? == 0 {
                return Ok(());
            }
            if let Ok(Some(error)) = socket2::SockRef::from(&fd).take_error() {
                return Err(self.end.broken(FINISHING, error));
            }
            // No event tells of the last acknowledgement.
            patience.rest(RETRY_INTERVAL, stop)?;
        }
    }

    /// A command may stand still, or have ended: what waits in the socket to it is not with it.
    fn await_read_by_command(&self, stop: &Stop) -> Result<(), ChannelError> {
        const READING: &str = "waiting for the command to read the stream";
        const RETRY_INTERVAL: Duration = Duration::from_millis(2);
        let Some(child) = &self.end.child else { return Ok(()) };
        let fd = self.end.fd.as_fd();
        let mut patience = Patience::new(&self.end, READING, self.stall);
        loop {
            child.check()?;
            if self.has_been_closed() {
                return Err(ChannelError::Closed { peer: self.end.peer.clone(), doing: READING });
            }
            let waiting = queued_bytes(fd, FdKind::Socket);
            if waiting.map_err(|source| self.end.broken(READING, source))? == 0 {
                return Ok(());
            }
            patience.rest(RETRY_INTERVAL, stop)?;
        }
    }

    fn sync_file(&self) -> Result<(), ChannelError> {
        match rustix::fs::fsync(&self.end.fd) {
            // Opened for reading, or a device that has nothing to sync.
            Ok(()) | Err(Errno::INVAL | Errno::ROFS) => Ok(()),
            Err(errno) => Err(self.end.broken(FINISHING, errno.into())),
        }
    }

    /// Takes what a command prints after the stream's end, so that it does not die of a closed pipe.
    fn read_out(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        let mut scratch = vec![0; 1 << 16];
        let mut taken = 0;
        while taken <= MAX_TRAILING {
            match self.recv(&mut [RecvPart::Own(&mut scratch)], stop)? {
                0 => return Ok(()),
                count => taken += count,
            }
        }
        let source = std::io::Error::new(std::io::ErrorKind::InvalidData, "goes on after the stream's end");
        Err(self.end.broken(FINISHING, source))
    }

    fn await_child(&self, stop: &Stop) -> Result<(), ChannelError> {
        match &self.end.child {
            Some(child) => child.wait(self.stall, stop),
            None => Ok(()),
        }
    }
}

/// Breaks a connection that other threads use. Clones break the same one.
#[derive(Clone, Debug)]
pub struct StreamBreaker(Arc<End>);

impl StreamBreaker {
    /// Closes both directions in order; what was sent still arrives. Waits of both halves end.
    pub fn close(&self) {
        // A connection that is gone already needs no closing; pipes and files have no such call.
        let _ = rustix::net::shutdown(&self.0.fd, Shutdown::Both);
    }

    /// Breaks the connection so that the peer sees a reset (TCP); other sockets are closed.
    pub fn reset(&self) {
        if self.0.nature != Nature::Tcp || rustix::net::connect_unspec(&self.0.fd).is_err() {
            self.close();
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn nature_of(fd: BorrowedFd<'_>) -> std::io::Result<Nature> {
    let refused = |what| std::io::Error::new(std::io::ErrorKind::InvalidInput, what);
    match FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) {
        FileType::Socket => {
            let socket = socket2::SockRef::from(&fd);
            if socket.r#type()? != socket2::Type::STREAM {
                return Err(refused("not a stream socket"));
            }
            let ip = [socket2::Domain::IPV4, socket2::Domain::IPV6].contains(&socket.domain()?);
            Ok(if ip { Nature::Tcp } else { Nature::Socket })
        }
        FileType::Directory => Err(refused("a directory")),
        FileType::Fifo | FileType::CharacterDevice => Ok(Nature::Pipe),
        _ => Ok(Nature::File),
    }
}

/// How parts are handed to the kernel.
pub(super) trait Giving {
    /// Hands over what has room; how many bytes that were.
    fn give(&mut self, end: &End, parts: &[SendPart<'_>], skip: usize) -> std::io::Result<usize>;

    /// There is no room: before a wait until there is.
    fn before_wait(&mut self, _end: &End) -> Result<(), ChannelError> {
        Ok(())
    }
}

/// The kernel copies the bytes.
struct Copying;

impl Giving for Copying {
    fn give(&mut self, end: &End, parts: &[SendPart<'_>], skip: usize) -> std::io::Result<usize> {
        send_parts(end.fd.as_fd(), end.kind(), parts, skip)
    }
}

impl StreamChannel {
    /// Sends all parts, in order.
    pub(super) fn send_by(
        &mut self,
        giving: &mut impl Giving,
        parts: &[SendPart<'_>],
        stop: &Stop,
    ) -> Result<(), ChannelError> {
        let end = &*self.end;
        let (mut first, mut skip) = (0, 0);
        let mut patience: Option<Patience<'_>> = None;
        loop {
            while parts.get(first).is_some_and(|part| skip >= part.len()) {
                skip -= parts[first].len();
                first += 1;
            }
            if first == parts.len() {
                return Ok(());
            }
            if let Some(reason) = stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: SENDING });
            }
            let window = &parts[first..parts.len().min(first + MAX_PARTS)];
            match giving.give(end, window, skip) {
                Ok(count) => {
                    skip += count;
                    self.sent += count as u64;
                    patience = None;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    giving.before_wait(end)?;
                    patience
                        .get_or_insert_with(|| Patience::new(end, SENDING, self.stall))
                        .wait(PollFlags::OUT, stop)?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(end.broken(SENDING, error)),
            }
        }
    }

    /// True if the other end is on this host: its address says so, or it is a UNIX socket.
    pub(super) fn stays_within_host(&self) -> bool {
        let socket = SockRef::from(&self.end.fd);
        match self.end.nature {
            Nature::Tcp => tcp::is_within_host(&socket),
            Nature::Socket => socket.local_addr().is_ok_and(|address| address.is_unix()),
            Nature::Pipe | Nature::File => false,
        }
    }

    /// What waits in its queue, for somebody who does not hold it.
    pub(super) fn queue(&self) -> Queue {
        Queue(Arc::downgrade(&self.end))
    }

    /// The descriptor, and how long this half bears that nothing moves.
    pub(super) fn end(&self) -> (&End, Option<Duration>) {
        (&self.end, self.stall)
    }
}

impl ByteSink for StreamChannel {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        self.send_by(&mut Copying, parts, stop)
    }

    /// Nothing is held back here.
    fn flush(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }

    fn finish(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        Self::finish(self, stop)
    }

    fn await_read(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.await_read_by_command(stop)
    }

    fn outlast(&mut self, limit: Duration) {
        self.outlast_silence(limit);
    }

    fn position(&self) -> u64 {
        self.sent
    }

    fn under_way(&self) -> u64 {
        // Where the kernel does not tell, as of a file, nothing is known to wait.
        queued_bytes(self.end.fd.as_fd(), self.end.kind()).unwrap_or(0)
    }
}

impl StreamChannel {
    /// As [`recv`](ByteSource::recv), where `due` bytes are sure to come if the stream does not end: a wait may go on until
    /// they are there, or many of them.
    pub(super) fn recv_due(
        &mut self,
        into: &mut [RecvPart<'_>],
        due: usize,
        stop: &Stop,
    ) -> Result<usize, ChannelError> {
        let room = into.iter().map(RecvPart::len).sum();
        if room == 0 {
            return Ok(0);
        }
        let (end, stall) = (&*self.end, self.stall_in_recv());
        let fd = end.fd.as_fd();
        let mut patience: Option<Patience<'_>> = None;
        let mut wait_first = self.low_water.waits_first(due);
        if stop.reason().is_none() && self.low_water.waits_briefly(fd) {
            let waited = stop.wait_briefly(fd, PollFlags::IN, BURST_TIMEOUT);
            waited.map_err(|source| end.broken(RECEIVING, source))?;
        }
        loop {
            let reason = stop.reason();
            if let Some(reason @ StopReason::Cancelled) = reason {
                return Err(ChannelError::Stopped { reason, doing: RECEIVING });
            }
            // Once the time is over there is only a look.
            if !std::mem::take(&mut wait_first) || reason.is_some() {
                match recv_parts(fd, into) {
                    Ok(0) => return self.await_child(stop).map(|()| 0),
                    Ok(count) => {
                        self.low_water.took(count, room);
                        return Ok(count);
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                        if let Some(reason) = reason {
                            return Err(ChannelError::Stopped { reason, doing: RECEIVING });
                        }
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(end.broken(RECEIVING, error)),
                }
            }
            let patience = patience.get_or_insert_with(|| Patience::new(end, RECEIVING, stall));
            match self.low_water.before_wait(fd, due) {
                true => patience.wait_for_mark(stop)?,
                false => patience.wait(PollFlags::IN, stop)?,
            }
        }
    }
}

impl ByteSource for StreamChannel {
    /// At the end of a command's output its exit status decides between 0 and an error. No room given is
    /// answered with 0 too.
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        self.recv_due(into, 1, stop)
    }

    fn set_bulk(&mut self, bulk: bool) {
        self.low_water.set_bulk(bulk);
    }

    fn ended_well(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        match self.end.nature {
            Nature::Pipe if self.end.child.is_some() => self.read_out(stop),
            _ => Ok(()),
        }
    }

    fn set_quiet(&mut self, quiet: bool) {
        self.quiet = quiet;
    }

    fn outlast(&mut self, limit: Duration) {
        self.outlast_silence(limit);
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        matches!(self.end.nature, Nature::Tcp | Nature::Socket).then(|| self.end.fd.as_fd())
    }
}

#[cfg(test)]
mod tests;
