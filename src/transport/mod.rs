//! How bytes and pages are sent from and received on this host.
//!
//! | | the source's end | the destination's |
//! |---|---|---|
//! | a stream of bytes | [`ByteSink`] | [`ByteSource`] |
//! | the transport of pages, with the stream of the same connection | [`SourceLink`] | [`DestinationLink`] |
//! | everything that a session receives | [`SourceConnection`] | [`DestinationConnection`] |
//!
//! Bytes and pages of a connection have one owner: on some links bytes must flush pages first, and on some no byte may
//! be sent while a round is open.

mod bytes;
mod connection;
mod cpr;
mod error;
mod inline;
mod link;
mod mapped_ram;
mod multifd;
mod open;
mod page_server;
mod page_supply;
#[cfg(feature = "rdma")]
pub mod rdma;
mod sealed;
mod stream;
#[cfg(any(test, feature = "testing"))]
mod testing;
mod tls;

pub use crate::stream::qemu::cpr::CprStateError;
pub use crate::stream::qemu::page_compression::PageCompression;
pub use bytes::{ByteSink, ByteSource, ReadHints};
pub use connection::{ChosenTransport, DestinationConnection, SourceConnection};
pub use cpr::{CprError, CprListener, CprMemory, CprSender};
pub use error::{ChannelError, MoveError, Side};
pub use inline::{DeltaCacheSize, InlineDestination, InlineLink, InlinePages};
pub use link::{
    DestinationAbilities, DestinationLink, LiveBytes, Offer, Receipt, Returned, RoundReceived, SourceLink,
    Ticket,
};
pub(crate) use mapped_ram::HeldFile;
pub use mapped_ram::{MappedDestination, MappedLink, MappedPages, SnapshotFile, find_stream};
pub use multifd::{ChannelOptions, MultifdDestination, MultifdLink, Numa, PageSending};
pub use open::{
    Address, AddressError, AllowError, AllowList, ConnectionOptions, DECISION_TIMEOUT, Listener, Obstacle,
    OpenError, RdmaOptions, Target, WhyNoRdma, connect, open_source, rdma_address, why_no_rdma,
};
pub use page_server::{PageServer, RemoteMemory, ServedPages};
pub(crate) use page_supply::{OneByOne, PageReader, PageReads, PageSpan, PulledPages, RemoteSpan};
pub use page_supply::{PageSupply, StoredMemory};
#[cfg(not(any(test, feature = "testing")))]
pub(crate) use sealed::Sealed;
#[cfg(any(test, feature = "testing"))]
pub use sealed::Sealed;
pub use stream::{StreamBreaker, StreamChannel, StreamOptions};
#[cfg(test)]
pub(crate) use testing::Random;
#[cfg(any(test, feature = "testing"))]
pub use testing::{Fault, FaultKind, Faulty, Loopback, LoopbackSink, LoopbackSource, loopback};
pub use tls::{Tls, TlsError, TlsOptions};
