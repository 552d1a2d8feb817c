//! The descriptor of a stream, shared by its halves.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use rustix::net::Shutdown;

use super::exec::ChildCommand;
use crate::sys::{FdKind, Stop, queued_bytes};
use crate::transport::{ChannelError, TlsError};

/// How long a command that reads no more may take to end, so that the error has its exit status.
const LAST_MOMENT: Duration = Duration::from_millis(500);

/// The kind of the descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::transport) enum StreamKind {
    Tcp,
    Socket,
    Pipe,
    File,
}

/// The descriptor and the state that both halves share.
#[derive(Debug)]
pub(in crate::transport) struct End {
    pub(in crate::transport) fd: OwnedFd,
    pub(in crate::transport) stream_kind: StreamKind,
    pub(in crate::transport) peer: String,
    /// In milliseconds: both halves use a changed value.
    pub(super) dead_peer: AtomicU64,
    pub(super) sync_file: bool,
    /// Status flags to restore: another process may use the same pipe or terminal after us.
    pub(super) flags_before: Option<OFlags>,
    pub(super) child: Option<ChildCommand>,
    /// A file whose old content is deleted in front of the first byte.
    pub(super) to_empty: AtomicBool,
}

impl End {
    /// The first byte is to be written.
    pub(super) fn empty(&self) -> std::io::Result<()> {
        match self.to_empty.swap(false, Ordering::Relaxed) {
            true => Ok(rustix::fs::ftruncate(&self.fd, 0)?),
            false => Ok(()),
        }
    }

    pub(in crate::transport) fn kind(&self) -> FdKind {
        match self.stream_kind {
            StreamKind::Tcp | StreamKind::Socket => FdKind::Socket,
            StreamKind::Pipe | StreamKind::File => FdKind::Other,
        }
    }

    /// How long the peer's kernel may leave everything unanswered.
    pub(in crate::transport) fn dead_peer(&self) -> Duration {
        Duration::from_millis(self.dead_peer.load(Ordering::Relaxed))
    }

    /// What a failed call means.
    pub(in crate::transport) fn broken(&self, doing: &'static str, source: std::io::Error) -> ChannelError {
        let peer = self.peer.clone();
        let source = match source.downcast::<TlsError>() {
            Ok(source) => return ChannelError::Tls { peer, doing, source },
            Err(source) => source,
        };
        if let (Some(child), Some(Errno::PIPE | Errno::CONNRESET)) =
            (&self.child, Errno::from_io_error(&source))
            && let Err(failed @ ChannelError::CommandFailed { .. }) =
                child.wait(Some(LAST_MOMENT), &Stop::never())
        {
            return failed;
        }
        match Errno::from_io_error(&source) {
            Some(Errno::PIPE) => ChannelError::Closed { peer, doing },
            Some(Errno::TIMEDOUT) => ChannelError::Silent { peer, doing, after: self.dead_peer() },
            _ => ChannelError::Io { peer, doing, source },
        }
    }
}

/// Reports the length of a connection's queue, and does not keep the connection open.
#[derive(Debug)]
pub(in crate::transport) struct Queue(pub(super) Weak<End>);

impl Queue {
    /// Bytes that were sent and have not left this host; 0 if the kernel does not report it.
    pub(in crate::transport) fn bytes(&self) -> u64 {
        self.0.upgrade().and_then(|end| queued_bytes(end.fd.as_fd(), end.kind()).ok()).unwrap_or(0)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if let Some(flags) = self.flags_before {
            // A failure has no remedy; the descriptor closes next.
            let _ = rustix::fs::fcntl_setfl(&self.fd, flags);
        }
    }
}

/// Breaks a connection that other threads use. Clones break the same connection.
#[derive(Clone, Debug)]
pub struct StreamBreaker(pub(super) Arc<End>);

impl StreamBreaker {
    /// Closes both directions in an orderly way; bytes that were sent still arrive. Waits of both halves end.
    pub fn close(&self) {
        // A connection that is already gone needs no closing; pipes and files do not support the call.
        let _ = rustix::net::shutdown(&self.0.fd, Shutdown::Both);
    }

    /// Breaks the connection so that the peer sees a reset (TCP); other sockets are closed.
    pub fn reset(&self) {
        if self.0.stream_kind != StreamKind::Tcp || rustix::net::connect_unspec(&self.0.fd).is_err() {
            self.close();
        }
    }
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn stream_kind_of(fd: BorrowedFd<'_>) -> std::io::Result<StreamKind> {
    let refused = |what| std::io::Error::new(std::io::ErrorKind::InvalidInput, what);
    match FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) {
        FileType::Socket => {
            let socket = socket2::SockRef::from(&fd);
            if socket.r#type()? != socket2::Type::STREAM {
                return Err(refused("not a stream socket"));
            }
            let ip = [socket2::Domain::IPV4, socket2::Domain::IPV6].contains(&socket.domain()?);
            Ok(if ip { StreamKind::Tcp } else { StreamKind::Socket })
        }
        FileType::Directory => Err(refused("a directory")),
        FileType::Fifo | FileType::CharacterDevice => Ok(StreamKind::Pipe),
        _ => Ok(StreamKind::File),
    }
}
