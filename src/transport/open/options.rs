//! How connections are opened.

use std::time::Duration;

use crate::transport::{ChannelOptions, StreamOptions};

/// Options of an `rdma:` connection; they have no effect on others.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RdmaOptions {
    /// Register all of RAM at both ends before the first page.
    pub pin_all: bool,
    /// Without `pin_all`: maximum number of bytes registered at a time; the least recently used are unregistered.
    /// `None`: in the end all of RAM is registered.
    pub pin_budget: Option<u64>,
    /// Open a return path to a QEMU (10.0, with its `return-path` capability set). A ramwire always has one.
    pub return_path: bool,
    /// Queue pairs for pages, 1 to 16; more than one only between two ramwires.
    pub queue_pairs: u16,
    /// At a destination: the source writes no pages between a round's end and the next read. For a relay, which
    /// processes the round's pages then. A QEMU always behaves like this.
    pub wait_after_round: bool,
    /// At a source: the guest can't promise to keep its memory in place (its `GuestControl::forbid_discard` returns
    /// no). Then `rdma:` is refused, and `auto:` uses TCP.
    pub may_discard: bool,
    /// At a source: the guest may switch to postcopy. Its missing pages are read by the destination then, a ramwire; the
    /// queue pairs for that are made with the others.
    pub postcopy: bool,
}

impl Default for RdmaOptions {
    fn default() -> Self {
        Self {
            pin_all: false,
            pin_budget: None,
            return_path: false,
            queue_pairs: 1,
            wait_after_round: false,
            may_discard: false,
            postcopy: false,
        }
    }
}

/// Options for opening a connection, at either end.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ConnectionOptions {
    /// Of every connection.
    pub stream: StreamOptions,
    /// Of `rdma:` connections.
    pub rdma: RdmaOptions,
    /// Page channels of `tcp:` and `unix:` connections.
    pub channels: ChannelOptions,
    /// At a source: initial size in bytes of the cache for pages that are sent as differences in the stream; 0: no
    /// differences.
    pub delta_cache: u64,
    /// How long a source retries if no process listens yet, by `tcp:`, `unix:`, `rdma:` and `auto:`; 0: it tries once.
    /// It does not retry after a connection was accepted.
    pub retry: Duration,
}

impl ConnectionOptions {
    /// These stream options, and the defaults for the rest.
    pub fn of_stream(stream: StreamOptions) -> Self {
        Self { stream, ..Self::default() }
    }
}
