//! Errors of moving bytes or pages.

use std::io;
use std::time::Duration;

use crate::error::Remedy;
use crate::guest::GuestError;
use crate::stream::DecodeError;
use crate::sys::StopReason;
use crate::transport::TlsError;

/// Why a channel did not carry bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The other end closed while more was expected.
    #[error("{peer} closed the connection while {doing}")]
    Closed {
        /// The peer.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
    },
    /// No byte moved within the stall time.
    #[error("no byte moved to or from {peer} for {} s while {doing}; {}", after.as_secs(), Remedy::RaiseStallTimeout)]
    Stalled {
        /// The peer.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// The stall time.
        after: Duration,
    },
    /// The peer's host no longer answers: it is dead or disconnected, or its network is down.
    #[error("{peer} has not answered for {} s while {doing}; see whether its host and the network are up", after.as_secs())]
    Silent {
        /// The peer.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// Length of the silence.
        after: Duration,
    },
    /// The command of `exec:` failed.
    #[error("`{command}` failed: {status}; run it by hand to see why")]
    CommandFailed {
        /// The command line.
        command: String,
        /// Its exit status as text.
        status: String,
    },
    /// The kernel stopped the command of `exec:`, since it tried to use the terminal.
    #[error(
        "`{command}` is stopped: it tried to use the terminal, which it can't from here; let it run without \
        questions (ssh: a key, a known host, -o BatchMode=yes), or start it by hand and use unix: or fd:"
    )]
    CommandAsks {
        /// The command line.
        command: String,
    },
    /// The caller's own deadline or cancel.
    #[error("stopped while {doing}: {reason}")]
    Stopped {
        /// Which.
        reason: StopReason,
        /// What this end was doing.
        doing: &'static str,
    },
    /// A page channel whose bytes are invalid.
    #[error("invalid data on {channel}")]
    Packet {
        /// Which.
        channel: String,
        /// The fault and its offset from the channel's start.
        source: DecodeError,
    },
    /// The RDMA device, or its protocol, failed.
    #[error("{peer}: {doing}")]
    Rdma {
        /// The peer.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// Which side caused it.
        side: Side,
        /// What happened, with the remedy.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// One of the ends refused the TLS connection.
    #[error("{peer}: {doing}")]
    Tls {
        /// The peer.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// The reason, with the remedy.
        source: TlsError,
    },
    /// The kernel's error.
    #[error("{peer}: {doing}")]
    Io {
        /// The peer.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// The answer.
        source: io::Error,
    },
}

impl ChannelError {
    /// The remedy, if a setting helps.
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::Stalled { .. } => Some(Remedy::RaiseStallTimeout),
            Self::Packet { source, .. } => source.remedy(),
            Self::Tls { source, .. } => source.remedy(),
            _ => None,
        }
    }
}

/// On which side the fault is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// This host.
    Here,
    /// The peer.
    Peer,
    /// What lies between.
    Between,
}

/// Why pages did not move.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MoveError {
    /// The byte channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// Guest memory could not be accessed.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The embedder's code panicked on the thread of a page channel.
    #[error("a callback panicked while {during}: {text}")]
    Panicked {
        /// What the thread was doing.
        during: &'static str,
        /// What `panic!` was given.
        text: String,
    },
    /// The format of page channels depends on the version of QEMU, which is unknown here.
    #[error("the peer's format of page channels is not known; {}", Remedy::NamePeer)]
    UnknownStyle,
}

impl MoveError {
    /// The remedy, if a setting helps.
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::Channel(error) => error.remedy(),
            Self::Guest(_) | Self::Panicked { .. } => None,
            Self::UnknownStyle => Some(Remedy::NamePeer),
        }
    }
}
