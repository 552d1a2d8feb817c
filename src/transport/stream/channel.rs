//! A byte stream and what can be asked of its connection.

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use socket2::SockRef;

use super::descriptors::Waiting;
use super::end::{millis, stream_kind_of};
use super::exec::ChildCommand;
use super::low_watermark::LowWater;
use super::secured::Secured;
use super::stall_timer::StallTimer;
use super::{End, Queue, StreamBreaker, StreamKind, StreamOptions, tcp};
use crate::sys::{FdKind, Stop};
use crate::transport::{ChannelError, ReadHints};

/// A byte stream: a sink, a source, or both.
#[derive(Debug)]
pub struct StreamChannel {
    pub(super) end: Arc<End>,
    pub(super) sent: u64,
    pub(super) stall: Option<Duration>,
    /// What its reader expects of the next bytes.
    pub(super) hints: ReadHints,
    pub(super) low_water: LowWater,
    /// Encrypted.
    pub(super) tls: Option<Secured>,
    /// Descriptors that have arrived, if they are wanted.
    pub(super) waiting: Option<Waiting>,
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
    /// The kernel's error; `InvalidInput` for a socket that is not a stream, or a directory.
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
        let stream_kind = stream_kind_of(fd.as_fd())?;
        if stream_kind == StreamKind::Tcp {
            tcp::tune(fd.as_fd(), options.dead_peer)?;
        }
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        let blocking = !flags.contains(OFlags::NONBLOCK);
        if blocking {
            rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        }
        let end = End {
            fd,
            stream_kind,
            peer,
            dead_peer: AtomicU64::new(millis(options.dead_peer)),
            sync_file: options.sync_file,
            flags_before: blocking.then_some(flags),
            child,
            to_empty: AtomicBool::new(false),
        };
        Ok(Self {
            end: Arc::new(end),
            sent: 0,
            stall: options.stall,
            hints: ReadHints::default(),
            low_water: LowWater::new(stream_kind),
            tls: None,
            waiting: None,
        })
    }

    /// Two halves of the same connection, for two threads. It closes with the later one.
    pub fn split(self) -> (Self, Self) {
        let low_water = LowWater::new(self.end.stream_kind);
        let end = Arc::clone(&self.end);
        let tls = self.tls.as_ref().map(Secured::other_half);
        let mut other = Self {
            end,
            sent: 0,
            stall: self.stall,
            hints: ReadHints::default(),
            low_water,
            tls,
            waiting: None,
        };
        if other.tls.is_some() {
            other.low_water.switch_off();
        }
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

    /// A file that is emptied when its first byte is written.
    pub(super) fn emptied_first(self) -> Self {
        self.end.to_empty.store(true, Ordering::Relaxed);
        self
    }

    /// Name of the other end, for messages.
    pub fn peer(&self) -> &str {
        &self.end.peer
    }

    /// A handle that breaks the connection from elsewhere, under both halves.
    pub fn breaker(&self) -> StreamBreaker {
        StreamBreaker(Arc::clone(&self.end))
    }

    /// Longest wait for bytes in which none arrives.
    pub(super) fn stall_in_recv(&self) -> Option<Duration> {
        let answers = self.end.kind() == FdKind::Socket && self.end.child.is_none();
        self.stall.filter(|_| !(self.hints.may_be_silent && answers))
    }

    /// Only the caller's stop ends a wait, whatever the peer's kernel does for `limit`.
    pub(super) fn wait_out_outage(&mut self, limit: Duration) {
        self.stall = None;
        self.end.dead_peer.fetch_max(millis(limit), Ordering::Relaxed);
        if self.end.stream_kind == StreamKind::Tcp
            && let Err(error) = tcp::keep_alive(&SockRef::from(&self.end.fd), self.end.dead_peer())
        {
            tracing::warn!(%error, "an outage may end this connection sooner than was asked for");
        }
    }

    /// Changes the stall time of this half. `None`: waits continue as long as the peer is alive.
    pub fn set_stall(&mut self, stall: Option<Duration>) {
        self.stall = stall;
    }

    /// Acknowledges received bytes to a TCP peer at once. A peer that holds a small message back until the one before
    /// it is acknowledged (Nagle's algorithm) otherwise waits for our delayed acknowledgement, 40 ms.
    pub(crate) fn acknowledge_at_once(&self) {
        if self.end.stream_kind == StreamKind::Tcp
            && let Err(error) = rustix::net::sockopt::set_tcp_quickack(&self.end.fd, true)
        {
            tracing::debug!(%error, "acknowledgements may be delayed");
        }
    }

    /// The first bytes of the stream of a socket that are there, as many as `into` has room for; they stay to be read. 0 is
    /// the end of the stream.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` if nothing has arrived.
    pub(crate) fn peek(&self, into: &mut [u8]) -> std::io::Result<usize> {
        if let Some(tls) = &self.tls {
            return self.peek_secured(tls, into);
        }
        let peeked = rustix::net::recv(&self.end.fd, into, rustix::net::RecvFlags::PEEK);
        Ok(peeked.map(|(_, come)| come)?)
    }

    /// True if the peer of a socket has closed it: nothing follows the bytes that are there.
    pub(in crate::transport) fn has_been_closed(&self) -> bool {
        let mut ended = [PollFd::new(&self.end.fd, PollFlags::RDHUP)];
        let over = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        rustix::event::poll(&mut ended, Some(&Timespec::default())).is_ok()
            && ended[0].revents().intersects(over)
    }

    /// The first four bytes of the stream of a socket, which stay to be read.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub(in crate::transport) fn peek_word(&self, stop: &Stop) -> Result<[u8; 4], ChannelError> {
        /// Time after which an incomplete word is read again: the bytes that are there end no wait.
        const RETRY_INTERVAL: Duration = Duration::from_millis(2);
        const PEEKING: &str = "waiting for the first bytes of a channel";
        let mut timer = StallTimer::new(&self.end, PEEKING, self.stall);
        let mut word = [0; 4];
        loop {
            match self.peek(&mut word) {
                Ok(4) => return Ok(word),
                Ok(0) => {
                    return Err(ChannelError::Closed { peer: self.end.peer.clone(), doing: PEEKING });
                }
                Ok(_) => timer.rest(RETRY_INTERVAL, stop)?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => timer.wait(PollFlags::IN, stop)?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.end.broken(PEEKING, error)),
            }
        }
    }

    /// True if the other end is on this host: its address shows it, or it is a UNIX socket.
    pub(in crate::transport) fn stays_within_host(&self) -> bool {
        let socket = SockRef::from(&self.end.fd);
        match self.end.stream_kind {
            StreamKind::Tcp => tcp::is_within_host(&socket),
            StreamKind::Socket => socket.local_addr().is_ok_and(|address| address.is_unix()),
            StreamKind::Pipe | StreamKind::File => false,
        }
    }

    /// What waits in its queue, for a reader that does not hold it.
    pub(in crate::transport) fn queue(&self) -> Queue {
        Queue(Arc::downgrade(&self.end))
    }

    /// The descriptor, and how long this half bears that nothing moves.
    pub(in crate::transport) fn end(&self) -> (&End, Option<Duration>) {
        (&self.end, self.stall)
    }
}
