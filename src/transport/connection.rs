//! The two sides of a connection: what a session receives, for every kind of connection.

use std::sync::Arc;

use crate::guest::GuestMemory;
use crate::sys::Stop;
use crate::transport::{
    Address, ByteSink, ByteSource, ChannelOptions, ConnectionOptions, DestinationLink, InlineDestination,
    InlineLink, MultifdDestination, OpenError, SourceLink, StreamChannel, multifd,
};

/// How messages name connections that the caller made.
const HANDED_IN: &str = "the connections that were handed in";

/// The transport that a connection uses, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChosenTransport {
    /// A scheme, such as `rdma` or `tcp`; `channel` if the embedder made the connection.
    pub transport: &'static str,
    /// Why this transport was used; for an `auto:` address without RDMA: why RDMA was not possible.
    pub why: String,
}

impl ChosenTransport {
    /// The transport that an address names.
    pub(super) fn named(address: &Address) -> Self {
        Self { transport: address.scheme(), why: "the address says so".into() }
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
    /// Source of the destination's messages; `None` for files and pipes.
    pub back: Option<Box<dyn ByteSource>>,
    /// The transport that was used, and why.
    pub chosen: ChosenTransport,
}

impl SourceConnection {
    /// A connection of the caller's own.
    pub fn new(link: Box<dyn SourceLink>, back: Option<Box<dyn ByteSource>>) -> Self {
        Self { link, back, chosen: ChosenTransport::handed_in() }
    }

    /// Pages of `memory` are sent in the stream over `channel`; the destination's messages come back on it if it is a
    /// socket.
    pub fn over(channel: StreamChannel, memory: Arc<dyn GuestMemory>) -> Self {
        let (sink, back) = channel.with_return_path();
        let link = Box::new(InlineLink::new(Box::new(sink), memory));
        Self::new(link, back.map(|back| Box::new(back) as Box<_>))
    }

    /// Pages of `memory` go over `pages`, connected sockets of the caller's own, and everything else over `main`; the
    /// destination must be given the same number. For a VMM that may open no addresses. `count` of the options is
    /// ignored.
    ///
    /// Starts the channels' threads according to the options.
    ///
    /// # Errors
    /// [`OpenError::Channels`] for none, or more than 255 page channels; [`OpenError::NoSuchSending`] if pages can't be
    /// sent as configured; [`OpenError::Channel`] if a thread can't be started.
    pub fn over_channels(
        main: StreamChannel,
        pages: Vec<StreamChannel>,
        memory: Arc<dyn GuestMemory>,
        options: &ChannelOptions,
    ) -> Result<Self, OpenError> {
        let options = ChannelOptions { count: count_of(pages.len())?, ..options.clone() };
        if let Some((why, remedy)) = options.no_such_sending() {
            let address = HANDED_IN.to_owned();
            return Err(OpenError::NoSuchSending { address, sending: options.sending, why, remedy });
        }
        let (sink, back) = main.with_return_path();
        let mut pages = pages.into_iter();
        let next = || pages.next().ok_or_else(|| wrong("there are fewer than were counted"));
        let link = multifd::connect(Box::new(sink), memory, &options, next)?;
        Ok(Self::new(Box::new(link), back.map(|back| Box::new(back) as Box<_>)))
    }

    pub(super) fn by(self, chosen: ChosenTransport) -> Self {
        Self { chosen, ..self }
    }
}

fn wrong(what: &str) -> OpenError {
    OpenError::Channels { address: HANDED_IN.to_owned(), what: what.to_owned() }
}

/// The number of page channels.
fn count_of(pages: usize) -> Result<u8, OpenError> {
    u8::try_from(pages)
        .ok()
        .filter(|count| *count > 0)
        .ok_or_else(|| wrong(&format!("{pages} of them are for pages; 1 to 255 can be")))
}

/// The destination's side of a connection.
#[non_exhaustive]
pub struct DestinationConnection {
    /// The source of bytes and pages.
    pub link: Box<dyn DestinationLink>,
    /// Sink for messages to the source; `None` for files and pipes.
    pub back: Option<Box<dyn ByteSink>>,
    /// The transport that the source used, and why.
    pub chosen: ChosenTransport,
}

impl DestinationConnection {
    /// A connection of the caller's own.
    pub fn new(link: Box<dyn DestinationLink>, back: Option<Box<dyn ByteSink>>) -> Self {
        Self { link, back, chosen: ChosenTransport::handed_in() }
    }

    /// All pages come in `stream`.
    pub fn of_stream(stream: Box<dyn ByteSource>, back: Option<Box<dyn ByteSink>>) -> Self {
        Self::new(Box::new(InlineDestination::new(stream)), back)
    }

    /// All pages come in the stream over `channel`; messages to the source are sent on it if it is a socket.
    pub fn over(channel: StreamChannel) -> Self {
        let (stream, back) = channel.with_return_path();
        Self::of_stream(Box::new(stream), back.map(|back| Box::new(back) as Box<_>))
    }

    /// The main connection and the page channels of one source, connected sockets of the caller's own, in any order:
    /// their first bytes show which is which. Waits for these bytes, so the source's session must have been started, or
    /// be started by another thread. `count` of the options is ignored.
    ///
    /// # Errors
    /// [`OpenError::Channels`] if none or several are the main connection, or one is of no migration;
    /// [`OpenError::OtherChannels`] if the source, a ramwire, has another number of page channels;
    /// [`OpenError::Channel`] if one breaks, is no socket, or receives nothing within the dead-peer time of the
    /// options.
    pub fn over_channels(
        channels: Vec<StreamChannel>,
        options: &ConnectionOptions,
        stop: &Stop,
    ) -> Result<Self, OpenError> {
        let count = count_of(channels.len().saturating_sub(1))?;
        let mut channels = channels.into_iter();
        let next = |_: &Stop| {
            channels.next().ok_or_else(|| wrong("none of them is the main one, or one has closed"))
        };
        let (main, pages) = multifd::accept(count, HANDED_IN, &options.stream, stop, next)?;
        let (main, back) = main.with_return_path();
        let channels = ChannelOptions { count, ..options.channels.clone() };
        let link = MultifdDestination::new(main, pages, channels, options.stream.stall);
        Ok(Self::new(Box::new(link), back.map(|back| Box::new(back) as Box<_>)))
    }

    pub(super) fn by(self, chosen: ChosenTransport) -> Self {
        Self { chosen, ..self }
    }
}
