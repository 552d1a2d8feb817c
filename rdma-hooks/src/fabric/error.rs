//! Errors of a network of queue pairs.

use std::fmt;
use std::io;

use crate::stop::Stopped;

/// Why the network or the device failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FabricError {
    /// There is no usable device or library on this host.
    #[error("no RDMA here: {what} failed ({remedy})")]
    Unavailable {
        /// What is missing.
        what: &'static str,
        /// What to do about it.
        remedy: &'static str,
        /// As reported by the system.
        #[source]
        source: io::Error,
    },
    /// A call into the device's library failed.
    #[error("{verb} failed{}", in_brackets(.remedy))]
    Verb {
        /// The library's function.
        verb: &'static str,
        /// What to do about it; perhaps empty.
        remedy: &'static str,
        /// Its errno.
        #[source]
        source: io::Error,
    },
    /// Memory could not be registered.
    #[error("cannot register {bytes} bytes of memory while {registered} are registered ({remedy})")]
    Registration {
        /// Bytes asked for.
        bytes: u64,
        /// Bytes registered so far through this fabric.
        registered: u64,
        /// What to do about it.
        remedy: &'static str,
        /// The library's errno.
        #[source]
        source: io::Error,
    },
    /// The limit on locked memory is too small, found before the first registration.
    #[error(
        "{needed} bytes are to be locked in memory, the limit is {limit}; raise it (ulimit -l, LimitMEMLOCK=, \
         memlock in limits.conf) or give the process CAP_IPC_LOCK"
    )]
    MemoryLock {
        /// Bytes to be locked.
        needed: u64,
        /// The limit, bytes.
        limit: u64,
    },
    /// The memory's owner gives no address for a NIC.
    #[error("memory of {bytes} bytes has no address that is promised to stay; a NIC cannot use it")]
    NotPinned {
        /// Bytes of the region.
        bytes: u64,
    },
    /// The connection manager reported another event than the expected one.
    #[error("waiting for {wanted}, the connection manager reported {got} (status {status}); {remedy}")]
    Event {
        /// The current step.
        wanted: &'static str,
        /// Name of the event.
        got: &'static str,
        /// Its status: an errno, or a reject reason.
        status: i32,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A posted request completed with an error; the queue pair is unusable.
    #[error("{operation} completed with {status} (vendor code {vendor:#x}); {}", .status.remedy())]
    Completion {
        /// The posted request.
        operation: Operation,
        /// How it ended.
        status: CompletionStatus,
        /// The device's own code.
        vendor: u32,
    },
    /// More was posted than the queue holds.
    #[error("the send queue is full")]
    QueueFull,
    /// More READs were to be posted than were agreed for the connection; nothing was posted.
    #[error(
        "{asked} RDMA READs cannot be posted while {under_way} are under way: the connection allows {depth} at a time \
         ({})", more_reads(*.depth)
    )]
    ReadDepth {
        /// READs to be posted.
        asked: usize,
        /// READs posted before whose completions were not given yet.
        under_way: usize,
        /// READs that the connection allows at a time.
        depth: u8,
    },
    /// The scatter list of a READ is not one that the device takes; nothing was posted.
    #[error(
        "an RDMA READ of {bytes} bytes into {pieces} pieces of memory is not possible: a READ fills 1 to {most_pieces} \
         pieces that are not empty, of at most {most_bytes} bytes together (split it)"
    )]
    ReadShape {
        /// Pieces of the READ.
        pieces: usize,
        /// Bytes of the READ.
        bytes: u64,
        /// Pieces that a READ may have.
        most_pieces: usize,
        /// Bytes that a READ may have.
        most_bytes: u64,
    },
    /// The peer's end is gone, or it ended the connection.
    #[error("the peer disconnected; its log says why")]
    Disconnected,
    /// A fabric that knows its peer got something that is not of that peer. The fabrics of this crate know none.
    #[error("{what} is not of the expected peer, or was changed or repeated in the network")]
    NotAuthentic {
        /// What came.
        what: &'static str,
    },
    /// The device went away.
    #[error("the RDMA device was removed")]
    DeviceRemoved,
    /// A wait was given up.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

/// An error and its causes in one line, for logs.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(deeper) = cause {
        text = format!("{text}: {deeper}");
        cause = deeper.source();
    }
    text
}

/// What helps if READs are refused.
fn more_reads(depth: u8) -> &'static str {
    match depth {
        0 => "both ends must ask for READs when they connect, and both devices must offer them",
        _ => "wait for completions",
    }
}

/// ` (remedy)`, or nothing.
fn in_brackets(remedy: &str) -> String {
    if remedy.is_empty() { String::new() } else { format!(" ({remedy})") }
}

/// The posted request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A control message.
    Send,
    /// A receive buffer.
    Receive,
    /// Guest memory, or a probe of the peer.
    Write,
    /// The peer's memory.
    Read,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Send => "SEND",
            Self::Receive => "RECEIVE",
            Self::Write => "RDMA WRITE",
            Self::Read => "RDMA READ",
        })
    }
}

/// How a request ended, in the terms of the InfiniBand specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompletionStatus {
    /// A local buffer is too short or the request malformed.
    LocalLength,
    /// The queue pair was in no state to take it.
    LocalQueuePair,
    /// A local key does not cover the buffer.
    LocalProtection,
    /// Flushed after an earlier error or a disconnect.
    Flushed,
    /// The peer refused the request as malformed.
    RemoteInvalid,
    /// The peer's key does not cover the address, or is dead.
    RemoteAccess,
    /// The peer's device failed.
    RemoteOperation,
    /// The peer acknowledged nothing for as long as the transport tries.
    RetryExceeded,
    /// The peer had no receive buffer posted.
    ReceiverNotReady,
    /// The device broke.
    Fatal,
    /// Another status, by its number.
    Other(u32),
}

impl CompletionStatus {
    fn remedy(self) -> &'static str {
        match self {
            Self::RemoteAccess => {
                "the peer took its key back, has less memory than it announced, or did not give this right to it"
            }
            Self::RetryExceeded => "the peer or the network between is dead",
            Self::ReceiverNotReady => "the peer broke the credit protocol",
            Self::Flushed => "an earlier error or a disconnect ended the connection",
            Self::Fatal => "the device needs a reset",
            _ => "a new connection is needed",
        }
    }
}

impl fmt::Display for CompletionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LocalLength => f.write_str("local length error"),
            Self::LocalQueuePair => f.write_str("local queue pair error"),
            Self::LocalProtection => f.write_str("local protection error"),
            Self::Flushed => f.write_str("work request flushed"),
            Self::RemoteInvalid => f.write_str("remote invalid request"),
            Self::RemoteAccess => f.write_str("remote access error"),
            Self::RemoteOperation => f.write_str("remote operation error"),
            Self::RetryExceeded => f.write_str("transport retry counter exceeded"),
            Self::ReceiverNotReady => f.write_str("receiver-not-ready retry counter exceeded"),
            Self::Fatal => f.write_str("fatal device error"),
            Self::Other(number) => write!(f, "status {number}"),
        }
    }
}
