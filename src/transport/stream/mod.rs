//! A byte stream over a descriptor: a socket, a pipe or a file.
//!
//! The descriptor is non-blocking and every wait is a poll that watches the caller's [`Stop`](crate::sys::Stop) too;
//! how long a wait lasts is decided in `stall_timer`. Parts are handed to the kernel where they lie, up to 1024 a call, so
//! guest RAM is not copied by us.

mod channel;
mod descriptors;
mod end;
pub(super) mod exec;
pub(super) mod file;
mod finish;
pub(super) mod inherited;
mod low_watermark;
mod secured;
pub(super) mod stall_timer;
pub(super) mod tcp;
#[cfg(test)]
mod tests;
mod transfer;
pub(super) mod unix;

use std::time::Duration;

use crate::transport::{Address, OpenError};
pub use channel::StreamChannel;
pub use end::StreamBreaker;
pub(super) use end::{End, Queue, StreamKind};
pub(super) use transfer::SendBackend;

/// How long waits last, and what the end of a stream means.
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

/// The result of opening a stream of this program's own.
fn opened(
    address: &Address,
    remedy: &'static str,
    channel: std::io::Result<StreamChannel>,
) -> Result<StreamChannel, OpenError> {
    let address = || address.to_string();
    channel.map_err(|source| OpenError::Open { address: address(), doing: "opening", remedy, source })
}
