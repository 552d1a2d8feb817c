//! Both ends' sides of a connection: what a session is given, whatever the connection was made of.

use std::sync::Arc;

use crate::guest::GuestMemory;
use crate::transport::{
    Address, ByteSink, ByteSource, DestinationLink, InlineDestination, InlineLink, SourceLink, StreamChannel,
};

/// The way that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// `rdma`, `tcp`, `unix`, `fd`, `exec` or `file`; `channel` where the embedder made the connection.
    pub transport: &'static str,
    /// Why it was this one; where it was `auto:` and not RDMA: what stood in the way.
    pub why: String,
}

impl Way {
    /// The way that an address names.
    pub(super) fn named(address: &Address) -> Self {
        let transport = match address {
            Address::Tcp { .. } | Address::Auto { .. } => "tcp",
            Address::Rdma { .. } => "rdma",
            Address::Unix(_) => "unix",
            Address::Fd(_) => "fd",
            Address::Exec(_) => "exec",
            Address::File(_) => "file",
        };
        Self { transport, why: "the address says so".into() }
    }

    fn handed_in() -> Self {
        Self { transport: "channel", why: "the connection was handed in".into() }
    }
}

/// The source's side of a connection.
#[non_exhaustive]
pub struct SourceConnection {
    /// Where pages and bytes go.
    pub link: Box<dyn SourceLink>,
    /// Where the destination's messages come from; `None` for files and pipes.
    pub back: Option<Box<dyn ByteSource>>,
    /// What was opened, and why.
    pub way: Way,
}

impl SourceConnection {
    /// A connection of the caller's own.
    pub fn new(link: Box<dyn SourceLink>, back: Option<Box<dyn ByteSource>>) -> Self {
        Self { link, back, way: Way::handed_in() }
    }

    /// Pages of `memory` go in the stream over `channel`; answers come back on it if it is a socket.
    pub fn over(channel: StreamChannel, memory: Arc<dyn GuestMemory>) -> Self {
        let (sink, back) = channel.with_return_path();
        let link = Box::new(InlineLink::new(Box::new(sink), memory));
        Self::new(link, back.map(|back| Box::new(back) as Box<_>))
    }

    pub(super) fn by(self, way: Way) -> Self {
        Self { way, ..self }
    }
}

/// The destination's side of a connection.
#[non_exhaustive]
pub struct DestinationConnection {
    /// Where bytes and pages come from.
    pub link: Box<dyn DestinationLink>,
    /// Where messages to the source go; `None` for files and pipes.
    pub back: Option<Box<dyn ByteSink>>,
    /// By what the source came, and why.
    pub way: Way,
}

impl DestinationConnection {
    /// A connection of the caller's own.
    pub fn new(link: Box<dyn DestinationLink>, back: Option<Box<dyn ByteSink>>) -> Self {
        Self { link, back, way: Way::handed_in() }
    }

    /// All pages come in `stream`.
    pub fn of_stream(stream: Box<dyn ByteSource>, back: Option<Box<dyn ByteSink>>) -> Self {
        Self::new(Box::new(InlineDestination::new(stream)), back)
    }

    /// All pages come in the stream over `channel`; answers go back on it if it is a socket.
    pub fn over(channel: StreamChannel) -> Self {
        let (stream, back) = channel.with_return_path();
        Self::of_stream(Box::new(stream), back.map(|back| Box::new(back) as Box<_>))
    }

    pub(super) fn by(self, way: Way) -> Self {
        Self { way, ..self }
    }
}
