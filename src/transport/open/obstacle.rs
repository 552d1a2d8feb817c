//! Why RDMA is not possible, in terms that an operator can act on.

use std::fmt;
use std::time::Duration;

use crate::error::Chain;
use crate::transport::{ChannelError, OpenError, WhyNoRdma};

/// Longest time for which an `auto:` source waits for an answer by RDMA, after it has checked its own devices.
pub const DECISION_TIMEOUT: Duration = Duration::from_secs(2);

/// Why RDMA is not possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Obstacle {
    /// The program was built without it.
    NotBuilt,
    /// rdma-core's libraries are not installed here.
    NoLibrary,
    /// There is no device on this host, or none with an active port and an address.
    NoDevice,
    /// No device on this host reaches the peer, or there is no answer.
    NoRoute,
    /// The peer refused: it has no device, or no process listens.
    Refused,
    /// The limit on locked memory is too small.
    MemoryLock,
    /// The guest, or the memory of a block, does not promise to stay in place.
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
            Self::MayDiscard => "memory that may be discarded",
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

/// Why RDMA was not used: the obstacle and its details, in one sentence.
pub(super) fn why(error: &OpenError) -> String {
    let detail = match error {
        OpenError::NoRdma { why, .. } => {
            return format!("RDMA did not work: {}: {}", why.obstacle(), Chain(why));
        }
        // This is the caller's own limit, so raising it is no remedy.
        OpenError::Channel(ChannelError::Stalled { peer, .. } | ChannelError::Silent { peer, .. }) => {
            format!("no answer from {peer} within {} s", DECISION_TIMEOUT.as_secs())
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
