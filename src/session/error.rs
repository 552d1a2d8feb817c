//! What can end a migration, and what that means for the guest.

use std::io;
use std::time::Duration;

use crate::engine::{ChannelMismatch, LostPages};
use crate::error::Remedy;
use crate::guest::{CacheError, DirtyError, GuestError, LayoutChange, ServeError};
use crate::ram::BlockName;
use crate::session::pager::HandedError;
use crate::session::passed::NotPassed;
use crate::stream::DecodeError;
use crate::sys::Loss;
use crate::transport::{ChannelError, MoveError, OpenError, Side};

/// Whose fault an error is, for exit statuses and retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request does not make sense.
    Config,
    /// This host or this VMM could not do it.
    Local,
    /// The peer broke the protocol or reported that it failed.
    Peer,
    /// The connection failed.
    Channel,
    /// It was cancelled on request.
    Cancelled,
}

/// Why a migration ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request does not make sense.
    #[error("{what}; {remedy}")]
    Config {
        /// What is wrong.
        what: String,
        /// What to do instead.
        remedy: Remedy,
    },
    /// The VMM's own answer.
    #[error("the guest could not {what}")]
    Control {
        /// The step.
        what: &'static str,
        /// The answer.
        source: io::Error,
    },
    /// A callback of the embedder panicked.
    #[error("a callback panicked while {during}: {text}")]
    Panicked {
        /// What the migration was doing.
        during: &'static str,
        /// The argument of `panic!`.
        text: String,
    },
    /// The migration failed and the guest could not be let run again; it is whole at the source.
    #[error("{why}; the guest is whole here but could not be resumed; resume it by hand")]
    NotResumed {
        /// Why the migration failed.
        why: String,
        /// The VMM's answer.
        source: io::Error,
    },
    /// Guest memory.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The dirty log.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// The connection.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The peer's bytes.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// As the peer sent it.
    #[error("invalid migration stream from the peer")]
    Decode(#[from] DecodeError),
    /// The stream ended too early.
    #[error("the stream ended after {at} bytes, inside {inside}; the source has failed or was cancelled")]
    Truncated {
        /// Bytes received.
        at: u64,
        /// What was being received.
        inside: &'static str,
    },
    /// The peer reported that it failed.
    #[error("the peer failed: {why}")]
    PeerFailed {
        /// The peer's reason, or its action.
        why: String,
    },
    /// The peer sent a message at a moment at which it has no meaning.
    #[error("the peer sent {what} while {while_doing}{}", place(*at))]
    OutOfTurn {
        /// The message.
        what: String,
        /// Bytes of its stream before it, where they are counted.
        at: Option<u64>,
        /// The message or action that was due.
        while_doing: &'static str,
    },
    /// The peer is connected and does not send the message that is due.
    #[error("the destination did not report {what} within {} s; {remedy}", after.as_secs_f32())]
    NoAnswer {
        /// The message that was due.
        what: &'static str,
        /// How long it was waited for.
        after: Duration,
        /// What makes the wait longer.
        remedy: Remedy,
    },
    /// There is no connection for urgent pages.
    #[error(
        "the connection for urgent pages could not be made; see that the destination takes one (QEMU: postcopy-preempt), or let \
         urgent pages go with the others"
    )]
    NoUrgentChannel {
        /// Why.
        source: OpenError,
    },
    /// The guest wrote faster than its pages left until the time was over.
    #[error("the migration did not converge within {} s; the guest runs on here; {}", after.as_secs_f32(), Remedy::HelpConvergence)]
    NotConverged {
        /// The time limit.
        after: Duration,
    },
    /// The guest's memory no longer matches the announcement.
    #[error("{0} in the middle of the migration; the guest runs on here; start the migration again")]
    LayoutChanged(LayoutChange),
    /// The kernel has lost memory of the guest.
    #[error(
        "RAM block {block} has lost memory: {loss}; its contents here can't be trusted; check what changed its \
        file or used its pages up"
    )]
    MemoryLost {
        /// The block.
        block: BlockName,
        /// What happened to it.
        loss: Loss,
    },
    /// RAM or state arrived changed.
    #[error("the received guest differs from the one that was sent; it was not started")]
    Digest(#[from] crate::session::digest::Mismatch),
    /// The ends have different numbers of page channels.
    #[error(transparent)]
    Channels(#[from] ChannelMismatch),
    /// The connection of a source with page channels failed before the first round was through, and the destination is
    /// no ramwire, which would have reported how many it has.
    #[error(
        "the connection failed before the end of the first round, with {channels} page channels; the destination may have another \
         number: {}",
        Remedy::AlignChannels
    )]
    NotSetUp {
        /// Page channels of this source.
        channels: usize,
        /// The connection's error.
        source: Box<Error>,
    },
    /// Not all pages that were sent have been placed.
    #[error(transparent)]
    LostPages(#[from] LostPages),
    /// It was cancelled on request.
    #[error("cancelled; the guest runs on at the source")]
    Cancelled,
    /// Wrong information from another process about its memory.
    #[error(transparent)]
    Handed(#[from] HandedError),
    /// Memory of the guest could not be passed to the destination.
    #[error("RAM block {block} can't be passed")]
    Passed {
        /// The block.
        block: BlockName,
        /// Why.
        #[source]
        why: NotPassed,
    },
    /// A checkpoint could not be kept or applied.
    #[error("a checkpoint can't be kept here")]
    Checkpoint(#[from] CacheError),
    /// A thread could not be started.
    #[error("thread {name} could not be started")]
    Thread {
        /// Its name.
        name: &'static str,
        /// The answer.
        source: io::Error,
    },
}

impl From<LayoutChange> for Error {
    fn from(change: LayoutChange) -> Self {
        match change {
            LayoutChange::Lost { block, loss } => Self::MemoryLost { block, loss },
            change => Self::LayoutChanged(change),
        }
    }
}

impl From<MoveError> for Error {
    fn from(error: MoveError) -> Self {
        match error {
            MoveError::Channel(error) => Self::Channel(error),
            MoveError::Guest(error) => Self::Guest(error),
            MoveError::Panicked { during, text } => Self::Panicked { during, text },
            MoveError::UnknownStyle => Self::Config {
                what: "the peer's format of page channels is not known".into(),
                remedy: Remedy::NamePeer,
            },
        }
    }
}

impl Error {
    /// Whose fault it is.
    pub fn kind(&self) -> ErrorKind {
        use crate::sys::StopReason;
        match self {
            Self::Config { .. } | Self::Channels(_) => ErrorKind::Config,
            Self::Handed(_) => ErrorKind::Peer,
            Self::Passed { why, .. } => why.kind(),
            Self::Control { .. }
            | Self::Panicked { .. }
            | Self::NotResumed { .. }
            | Self::Guest(_)
            | Self::Checkpoint(_)
            | Self::Serve(_)
            | Self::Dirty(_)
            | Self::NotConverged { .. }
            | Self::LayoutChanged(_)
            | Self::MemoryLost { .. }
            | Self::Thread { .. } => ErrorKind::Local,
            Self::Channel(ChannelError::Stopped { reason: StopReason::Cancelled, .. }) | Self::Cancelled => {
                ErrorKind::Cancelled
            }
            Self::Channel(ChannelError::Rdma { side: Side::Here, .. }) => ErrorKind::Local,
            Self::Channel(ChannelError::Rdma { side: Side::Peer, .. }) => ErrorKind::Peer,
            Self::Channel(ChannelError::Packet { .. }) => ErrorKind::Peer,
            Self::Channel(_)
            | Self::Truncated { .. }
            | Self::NoAnswer { .. }
            | Self::NotSetUp { .. }
            | Self::NoUrgentChannel { .. } => ErrorKind::Channel,
            Self::Decode(_)
            | Self::PeerFailed { .. }
            | Self::OutOfTurn { .. }
            | Self::Digest(_)
            | Self::LostPages(_) => ErrorKind::Peer,
        }
    }

    /// What would help, where a setting does.
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::Config { remedy, .. } | Self::NoAnswer { remedy, .. } => Some(*remedy),
            Self::NotConverged { .. } => Some(Remedy::HelpConvergence),
            Self::NotSetUp { .. } => Some(Remedy::AlignChannels),
            Self::Channel(error) => error.remedy(),
            Self::Decode(error) => error.remedy(),
            _ => None,
        }
    }

    /// States where in the peer's stream it was found: `at` bytes from its start.
    pub(super) fn at(self, offset: u64) -> Self {
        match self {
            Self::Decode(error) => Self::Decode(error.based(offset)),
            Self::OutOfTurn { what, while_doing, .. } => {
                Self::OutOfTurn { what, at: Some(offset), while_doing }
            }
            other => other,
        }
    }

    /// True if a deadline passed that the caller itself had set.
    /// True if a connection has ended, or its device failed: another one, by another way, may do.
    pub(super) fn is_of_connection(&self) -> bool {
        self.kind() == ErrorKind::Channel || matches!(self, Self::Channel(ChannelError::Rdma { .. }))
    }

    /// True if the time of a wait was over.
    pub(super) fn is_deadline(&self) -> bool {
        use crate::sys::StopReason;
        matches!(self, Self::Channel(ChannelError::Stopped { reason: StopReason::Deadline, .. }))
    }

    /// True if the same migration may succeed when it is tried again as it is.
    pub fn is_recoverable(&self) -> bool {
        matches!(self.kind(), ErrorKind::Channel | ErrorKind::Cancelled)
            || matches!(self, Self::LayoutChanged(_))
    }
}

/// ` (at byte 12 (0xc) of its stream)`.
fn place(at: Option<u64>) -> String {
    at.map(|at| format!(" (at byte {at} ({at:#x}) of its stream)")).unwrap_or_default()
}
