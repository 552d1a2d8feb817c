//! Pages by RDMA WRITE, bytes by message: QEMU's `rdma:` protocol.
//!
//! `rdma_hooks` implements the protocol; this module maps a link's pages and bytes to its five hooks.
//!
//! | here | hook |
//! |------|------|
//! | [`RdmaLink`]'s `open_round` | `registration_start`; its mark is the stream's last record before the round |
//! | `offer` | `control_save_page`, once a run |
//! | `close_round` | `registration_stop` |
//! | [`RdmaDestination`]'s `announce` | `block_notification` |
//! | `receive_round` | `serve_round` |
//!
//! # Required orders
//!
//! No stream byte is sent while a round is open. Keys at the destination are revoked before the guest runs there.
//! Neither end disconnects before the other has received everything:
//! [`ByteSink::finish`](crate::transport::ByteSink::finish) of a connection without a return path waits until the
//! destination closes.

mod destination;
mod here;
mod reads;
#[cfg(feature = "tls")]
mod secured;
#[cfg(test)]
mod simulated;
mod source;

use std::sync::Arc;
use std::time::Duration;

use rdma_hooks::{Blame, Fabric, FabricError, HooksError, Stopped};

use crate::sys::{Stop, StopReason};
use crate::transport::{ChannelError, Obstacle, Side};

pub use destination::{RdmaDestination, RdmaListener, RdmaReturnSink};
pub(super) use here::SCHEME;
pub use here::usable_address;
#[cfg(feature = "tls")]
pub(super) use secured::{CameByTls, accept_by_tls};
#[cfg(test)]
pub(super) use simulated::simulated;
#[cfg(all(test, feature = "tls"))]
pub(super) use simulated::simulated_with_tls;
pub use source::{RdmaLink, RdmaReturnSource, connect_over};

/// Messages that two ramwires may have in flight at a time.
const WINDOW: u16 = 8;
/// Queue pairs besides the main one that a source may have.
const MAX_DATA_QUEUES: u16 = 15;

/// One end of the connection, for the bounds and the errors of its waits.
#[derive(Clone)]
struct End {
    fabric: Arc<dyn Fabric>,
    peer: String,
    stall: Option<Duration>,
}

impl End {
    /// Bounds for a wait of at most the stall time and `more`, with the error for exceeding them.
    fn bounds(&self, stop: &Stop, more: Duration) -> Bounds<'_> {
        let stall = self.stall.map(|stall| stall.saturating_add(more));
        let left = stop.left();
        let stalls_first = stall.filter(|stall| left.is_none_or(|left| *stall < left));
        self.bounds_of(stop, stalls_first)
    }

    /// Bounds for a wait that may last as long as the peer is alive.
    fn stall_bounds(&self, stop: &Stop) -> Bounds<'_> {
        self.bounds_of(stop, None)
    }

    fn bounds_of(&self, stop: &Stop, stall: Option<Duration>) -> Bounds<'_> {
        let time = stall.or_else(|| stop.left());
        let deadline = time.and_then(|time| self.fabric.now().checked_add(time));
        let hooks = rdma_hooks::Stop::new(deadline, stop.cancel_flag().into());
        Bounds { end: self, hooks, stall }
    }
}

struct Bounds<'a> {
    end: &'a End,
    hooks: rdma_hooks::Stop,
    /// The stall time, if it ends before the caller's own deadline.
    stall: Option<Duration>,
}

impl Bounds<'_> {
    fn error(&self, doing: &'static str, error: HooksError) -> ChannelError {
        let peer = self.end.peer.clone();
        match (error, self.stall) {
            (HooksError::Stopped(Stopped::Deadline), Some(after)) => {
                ChannelError::Stalled { peer, doing, after }
            }
            (HooksError::Stopped(Stopped::Deadline), None) => {
                ChannelError::Stopped { reason: StopReason::Deadline, doing }
            }
            (HooksError::Stopped(Stopped::Cancelled), _) => {
                ChannelError::Stopped { reason: StopReason::Cancelled, doing }
            }
            (HooksError::Silent { after }, _) => ChannelError::Stalled { peer, doing, after },
            (HooksError::Fabric(FabricError::Disconnected), _) => ChannelError::Closed { peer, doing },
            (error, _) => {
                let side = match error.blame() {
                    Blame::Local => Side::Here,
                    Blame::Peer => Side::Peer,
                    Blame::Network | Blame::Stopped => Side::Between,
                };
                ChannelError::Rdma { peer, doing, side, source: Box::new(error) }
            }
        }
    }
}

/// The obstacle that an error of the crate shows to an operator.
pub(super) fn obstacle_of(error: &(dyn std::error::Error + Send + Sync + 'static)) -> Obstacle {
    let fabric = match error.downcast_ref() {
        Some(HooksError::Fabric(error)) => Some(error),
        Some(_) => None,
        None => error.downcast_ref::<FabricError>(),
    };
    match fabric {
        Some(FabricError::MemoryLock { .. }) => Obstacle::MemoryLock,
        Some(FabricError::NotPinned { .. }) => Obstacle::MayDiscard,
        Some(FabricError::DeviceRemoved) => Obstacle::NoDevice,
        Some(FabricError::Unavailable { source, .. }) if is_missing_call(source) => Obstacle::NoLibrary,
        // A library that finds no device for an address returns ENODEV.
        Some(FabricError::Unavailable { what, .. }) if what.starts_with("rdma_resolve") => Obstacle::NoRoute,
        Some(FabricError::Unavailable { .. }) => Obstacle::NoDevice,
        Some(FabricError::Verb { verb, .. }) if verb.starts_with("rdma_resolve") => Obstacle::NoRoute,
        Some(FabricError::Event { got: "REJECTED", .. } | FabricError::Disconnected) => Obstacle::Refused,
        Some(FabricError::Event { .. }) => Obstacle::NoRoute,
        _ => Obstacle::Other,
    }
}

/// The bindings' error if the library of a call could not be loaded.
fn is_missing_call(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error())
}

/// An invalid call of ours: after the connection ended, or in the wrong order.
fn misused(peer: &str, doing: &'static str, what: &'static str) -> ChannelError {
    let source = Box::new(HooksError::OutOfOrder(what));
    ChannelError::Rdma { peer: peer.to_owned(), doing, side: Side::Here, source }
}
