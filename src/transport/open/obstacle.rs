//! What stood in the way of RDMA, in the terms an operator acts on.

use std::fmt;
use std::time::Duration;

use crate::error::Chain;
use crate::transport::{ChannelError, OpenError, WhyNoRdma};

/// Longest time for which a source that may choose waits for an answer by RDMA, once it has looked at its own devices.
pub const DECISION_TIMEOUT: Duration = Duration::from_secs(2);

/// What stood in the way of RDMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Obstacle {
    /// The program was built without it.
    NotBuilt,
    /// rdma-core's libraries are not installed here.
    NoLibrary,
    /// There is no device here, or none with a port that is up and has an address.
    NoDevice,
    /// No device here reaches the peer, or nobody answers there.
    NoRoute,
    /// The peer said no: it has no device there, or nobody listens.
    Refused,
    /// Too little memory may be locked.
    MemoryLock,
    /// The guest, or the memory behind a block, does not promise to stay in place.
    MayDiscard,
    /// Something else failed.
    Other,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotBuilt => "not built in",
            Self::NoLibrary => "no library",
            Self::NoDevice => "no device",
            Self::NoRoute => "no route",
            Self::Refused => "refused by peer",
            Self::MemoryLock => "memory-lock limit",
            Self::MayDiscard => "memory that can't promise not to be discarded",
            Self::Other => "failed",
        })
    }
}

impl WhyNoRdma {
    /// In the operator's terms.
    pub fn obstacle(&self) -> Obstacle {
        match self {
            Self::NotBuilt => Obstacle::NotBuilt,
            Self::NotInPlace { .. } | Self::GuestDiscards => Obstacle::MayDiscard,
            Self::NoActivePort { .. } => Obstacle::NoDevice,
            Self::Unusable(error) => of_error(&**error),
        }
    }
}

/// Why RDMA was not taken: the obstacle and its details, in one sentence.
pub(super) fn why(error: &OpenError) -> String {
    let detail = match error {
        OpenError::NoRdma { why, .. } => {
            return format!("RDMA did not work: {}: {}", why.obstacle(), Chain(why));
        }
        // The caller's own limit, and no reason to raise it.
        OpenError::Channel(ChannelError::Stalled { peer, .. } | ChannelError::Silent { peer, .. }) => {
            format!("nobody answered at {peer} within {} s", DECISION_TIMEOUT.as_secs())
        }
        error => Chain(error).to_string(),
    };
    format!("RDMA did not work: {}: {detail}", of(error))
}

pub(super) fn of(error: &OpenError) -> Obstacle {
    match error {
        OpenError::NoRdma { why, .. } => why.obstacle(),
        OpenError::Channel(ChannelError::Rdma { source, .. }) => of_error(&**source),
        OpenError::Channel(
            ChannelError::Stalled { .. } | ChannelError::Silent { .. } | ChannelError::Stopped { .. },
        ) => Obstacle::NoRoute,
        OpenError::Channel(ChannelError::Closed { .. }) => Obstacle::Refused,
        _ => Obstacle::Other,
    }
}

#[cfg(feature = "rdma")]
fn of_error(error: &(dyn std::error::Error + Send + Sync + 'static)) -> Obstacle {
    crate::transport::rdma::obstacle_of(error)
}

#[cfg(not(feature = "rdma"))]
fn of_error(_error: &(dyn std::error::Error + Send + Sync + 'static)) -> Obstacle {
    Obstacle::Other
}
