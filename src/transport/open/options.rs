//! How connections are opened.

use std::time::Duration;

use crate::transport::{ChannelOptions, StreamOptions};

/// What is asked of an `rdma:` connection; of no effect on others.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RdmaOptions {
    /// Register all of RAM at both ends before the first page.
    pub pin_all: bool,
    /// Without `pin_all`: most bytes registered at a time; the longest unused are given back. `None`: all of RAM in the end.
    pub pin_budget: Option<u64>,
    /// Open a return path to a QEMU: 10.0 with its `return-path` capability set. A ramwire always has one.
    pub return_path: bool,
    /// Queue pairs for pages, 1 to 16; more than one only between two ramwires.
    pub queue_pairs: u16,
    /// At a destination: the source writes nothing between a round's end and what is read next. For a relay, which looks
    /// for the round's pages then. A QEMU always waits so.
    pub wait_after_round: bool,
    /// At a source: the guest can't promise to keep its memory in place (its `GuestControl::forbid_discard` says no). Then
    /// `rdma:` is refused, and `auto:` takes TCP.
    pub may_discard: bool,
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
        }
    }
}

/// How a connection is opened, at either end.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ConnectionOptions {
    /// Of every connection.
    pub stream: StreamOptions,
    /// Of `rdma:` connections.
    pub rdma: RdmaOptions,
    /// Page channels of `tcp:` and `unix:` connections.
    pub channels: ChannelOptions,
    /// Bytes of the cache for pages that travel as differences in the stream, at a source, to begin with; 0: none do.
    pub delta_cache: u64,
    /// How long a source tries again where nobody listens yet, by `tcp:`, `unix:`, `rdma:` and `auto:`; 0: it tries once.
    /// A connection that was taken is not tried again.
    pub retry: Duration,
}

impl ConnectionOptions {
    /// These of the connection, the defaults of the rest.
    pub fn of_stream(stream: StreamOptions) -> Self {
        Self { stream, ..Self::default() }
    }
}
