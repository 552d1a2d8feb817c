//! Page channels besides the main one (`multifd`): each with a thread, a connection and packets of its own.
//!
//! ```text
//! session -- batches --> queue of a channel -> thread: packets -> socket ... socket -> thread -> guest RAM
//!        \-- bytes, zero records, barriers --> main ............. main --------------> session
//! ```
//!
//! Data on different channels is not ordered. A round ends with a SYNC on each channel and one barrier on main. The
//! destination's threads stop at their SYNC until main has reached the barrier and all of them have reached theirs, so
//! that no page of the next round is placed before all pages of this one. Between two barriers a page is sent once.

mod counter;
mod destination;
mod gather;
mod numa;
mod page_channel;
mod receiver;
mod sender;
mod source;
mod splice;
#[cfg(test)]
mod tests;
mod zerocopy;

use std::sync::Arc;

pub use destination::MultifdDestination;
pub(super) use gather::accept;
pub use numa::Numa;
pub use page_channel::PageSending;
pub use source::MultifdLink;
pub(super) use source::connect;

use crate::error::Remedy;
use crate::stream::qemu::page_compression::PageCompression;
use crate::sys::{SpawnFn, spawn_thread};
use crate::transport::StreamChannel;
use crate::units::{BlockOffset, PageSize};

/// Channels over a network that carry pages, for each core of the source.
const ACTIVE_PER_CORE: usize = 4;

/// Maximum number of `channels` that carry pages, if the options do not set it.
fn default_active(channels: &[StreamChannel]) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let here = channels.iter().all(StreamChannel::stays_within_host);
    if here { cores } else { ACTIVE_PER_CORE * cores }
}

/// Page channels of a migration; both ends must use the same settings.
#[derive(Clone)]
#[non_exhaustive]
pub struct ChannelOptions {
    /// Number of page channels, besides the main one; 0: pages are sent in the stream.
    pub count: u8,
    /// How pages are compressed.
    pub compression: PageCompression,
    /// At a source: maximum number of channels that carry pages; the others only take part in barriers. `None`: one for
    /// each core if all of them end on this host, since more would only take turns; otherwise four for each core, since
    /// a connection over a network also waits for the network.
    pub active: Option<usize>,
    /// At a source: how pages get into the sockets' queues. Only copies can be combined with compression. With
    /// [`PageSending::Splice`] the threads make system calls that a seccomp filter must allow (docs/embedding.md).
    pub sending: PageSending,
    /// UUID of the VM, which is in the first packet of every channel; zero if it has none. A destination compares it
    /// with its own.
    pub uuid: [u8; 16],
    /// On which NUMA nodes their threads work; [`Numa::Off`] unless given.
    pub numa: Numa,
    /// How their threads are started.
    pub spawn: Arc<SpawnFn>,
}

impl ChannelOptions {
    /// Why pages can't be sent as configured, and the remedy; `None` if they can.
    pub fn no_such_sending(&self) -> Option<(&'static str, Remedy)> {
        match (self.sending, self.count, self.compression) {
            (PageSending::Copy, ..) => None,
            (_, 0, _) => Some((
                "needs page channels: in the stream each page has a header of its own",
                Remedy::CopyPagesOrAskForChannels,
            )),
            (_, _, PageCompression::Plain) => None,
            _ => Some((
                "sends pages straight from guest memory, not compressed",
                Remedy::CopyPagesOrDropCompression,
            )),
        }
    }
}

impl Default for ChannelOptions {
    /// No page channels.
    fn default() -> Self {
        Self {
            count: 0,
            compression: PageCompression::Plain,
            active: None,
            sending: PageSending::Copy,
            uuid: [0; 16],
            numa: Numa::Off,
            spawn: Arc::new(spawn_thread),
        }
    }
}

/// The adjacent pages of a packet, as offset and length of each run.
fn runs_of(offsets: &[BlockOffset], page: PageSize) -> Vec<(BlockOffset, u64)> {
    let mut runs: Vec<(BlockOffset, u64)> = Vec::new();
    for offset in offsets {
        match runs.last_mut() {
            Some((first, len)) if first.0 + *len == offset.0 => *len += page.bytes(),
            _ => runs.push((*offset, page.bytes())),
        }
    }
    runs
}

impl std::fmt::Debug for ChannelOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("ChannelOptions");
        out.field("count", &self.count)
            .field("compression", &self.compression)
            .field("sending", &self.sending);
        out.field("numa", &self.numa);
        out.finish_non_exhaustive()
    }
}
