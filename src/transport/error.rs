//! Why bytes or pages did not move.

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
    /// The other end closed where more was expected.
    #[error("{peer} closed the connection while {doing}")]
    Closed {
        /// Who.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
    },
    /// No byte moved for the stall time.
    #[error("{peer} did not move a byte for {} s while {doing}; {}", after.as_secs(), Remedy::RaiseStallTimeout)]
    Stalled {
        /// Who.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// The stall time.
        after: Duration,
    },
    /// The peer's host no longer answers: dead, cut off, or its network is down.
    #[error("{peer} has not answered for {} s while {doing}; see whether its host and the network are up", after.as_secs())]
    Silent {
        /// Who.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// How long a silence was borne.
        after: Duration,
    },
    /// The command behind `exec:` failed.
    #[error("`{command}` failed: {status}; run it by hand to see why")]
    CommandFailed {
        /// The command line.
        command: String,
        /// Its exit status in words.
        status: String,
    },
    /// The command behind `exec:` was stopped by the kernel, since it wants to use the terminal.
    #[error(
        "`{command}` stands still: it asks something at the terminal, which it can't use from here; have it ask nothing \
         (ssh: a key, a known host, -o BatchMode=yes), or start it by hand and use unix: or fd:"
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
    /// A page channel whose bytes make no sense.
    #[error("{channel} is not understood")]
    Packet {
        /// Which.
        channel: String,
        /// What and where, from the channel's start.
        source: DecodeError,
    },
    /// The RDMA device, or the protocol spoken over it.
    #[error("{peer}: {doing}")]
    Rdma {
        /// Who.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// Whose doing it is.
        side: Side,
        /// What happened, with the remedy.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// TLS refused it, at one of the ends.
    #[error("{peer}: {doing}")]
    Tls {
        /// Who.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// What was refused, with the remedy.
        source: TlsError,
    },
    /// The kernel's answer.
    #[error("{peer}: {doing}")]
    Io {
        /// Who.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// The answer.
        source: io::Error,
    },
}

impl ChannelError {
    /// What would help, where a setting does.
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::Stalled { .. } => Some(Remedy::RaiseStallTimeout),
            Self::Packet { source, .. } => source.remedy(),
            Self::Tls { source, .. } => source.remedy(),
            _ => None,
        }
    }
}

/// On which side a fault lies.
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
    /// Guest memory could not be reached.
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
    /// Page channels are written in another way for each version of QEMU, and nothing tells which it is.
    #[error("nothing tells how the peer wants its page channels; {}", Remedy::NamePeer)]
    UnknownStyle,
}

impl MoveError {
    /// What would help, where a setting does.
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::Channel(error) => error.remedy(),
            Self::Guest(_) | Self::Panicked { .. } => None,
            Self::UnknownStyle => Some(Remedy::NamePeer),
        }
    }
}
