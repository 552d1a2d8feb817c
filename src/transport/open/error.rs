//! Why there is no connection.

use std::io;

use crate::error::Remedy;
use crate::stream::channel_count::ChannelMismatch;
use crate::stream::qemu::mapped_stream::MappedReadError;
use crate::transport::{ChannelError, PageSending, TlsError};

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The host's name has no address.
    #[error("no address found for host `{host}`; check the name or give the address")]
    Resolve {
        /// The name.
        host: String,
        /// The resolver's answer.
        source: io::Error,
    },
    /// A listener, a file, a descriptor or a command could not be opened.
    #[error("{address}: {doing} failed ({remedy})")]
    Open {
        /// The address to open.
        address: String,
        /// How.
        doing: &'static str,
        /// The remedy.
        remedy: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// A mapped-ram file that is invalid or incomplete.
    #[error("{address} can't be read")]
    Unreadable {
        /// The address.
        address: String,
        /// Why, and where.
        source: MappedReadError,
    },
    /// The connection failed, or the caller stopped.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// RDMA can't be used on this host.
    #[error("{address}: RDMA can't be used here")]
    NoRdma {
        /// The address.
        address: String,
        /// The reason and the remedy.
        #[source]
        why: WhyNoRdma,
    },
    /// An `rdma:` address where only a byte stream is possible.
    #[error("{address} is no byte stream; give a tcp: or unix: address here, or file:")]
    NotAStream {
        /// The address.
        address: String,
    },
    /// TLS is not possible for this address.
    #[error("{address}: no TLS connection")]
    Tls {
        /// The address.
        address: String,
        /// Why not.
        source: TlsError,
    },
    /// TLS for an address without connections.
    #[error("{address} can't be encrypted; use tcp: or unix: with TLS, or rdma: or auto:")]
    NoTls {
        /// The address.
        address: String,
    },
    /// An `auto:` address that neither transport reaches.
    #[error("{address}: {rdma}; TCP failed, too")]
    Neither {
        /// The address.
        address: String,
        /// What stood in RDMA's way.
        rdma: String,
        /// What stood in TCP's.
        #[source]
        tcp: Box<OpenError>,
    },
    /// The connections of a source with page channels are not as expected.
    #[error("{address}: {what}; {}", Remedy::AlignChannels)]
    Channels {
        /// The address.
        address: String,
        /// The problem.
        what: String,
    },
    /// The source, a ramwire, has another number of page channels.
    #[error(transparent)]
    OtherChannels(#[from] ChannelMismatch),
    /// Deltas on a transport that does not send pages in the stream.
    #[error("{address}: only pages in the stream can travel as deltas; {}", Remedy::DropDeltasOrChannels)]
    NoDeltas {
        /// The address.
        address: String,
    },
    /// Compressed pages in a file with fixed page offsets.
    #[error("{address}: pages in a mapped-ram file can't be compressed; leave the compression out")]
    Compressed {
        /// The address.
        address: String,
    },
    /// Another address where a mapped-ram file is needed.
    #[error("{address} is no mapped-ram file; write mapped:PATH")]
    NotMapped {
        /// The address.
        address: String,
    },
    /// Page channels for an address that has only one stream.
    #[error("{address} has no page channels; {}", Remedy::DropChannels)]
    NoChannels {
        /// The address.
        address: String,
    },
    /// Pages that can't be sent by the requested method.
    #[error("{address}: {sending} {why}; {remedy}")]
    NoSuchSending {
        /// The address.
        address: String,
        /// The way.
        sending: PageSending,
        /// Why not.
        why: &'static str,
        /// What would help.
        remedy: Remedy,
    },
    /// A stream that exists only once was opened again.
    #[error("{address} carries one stream only; give a tcp: or unix: address for more channels")]
    OnlyOne {
        /// The address.
        address: String,
    },
}

impl OpenError {
    /// The remedy, if a setting helps.
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::Open { remedy, .. } => Some(Remedy::Advice(remedy)),
            Self::Channel(error) => error.remedy(),
            Self::Tls { source, .. } => source.remedy(),
            Self::Channels { .. } => Some(Remedy::AlignChannels),
            Self::NoDeltas { .. } => Some(Remedy::DropDeltasOrChannels),
            Self::NoChannels { .. } => Some(Remedy::DropChannels),
            Self::NoSuchSending { remedy, .. } => Some(*remedy),
            Self::Neither { tcp, .. } => tcp.remedy(),
            _ => None,
        }
    }
}

/// Why RDMA can't be used on this host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WhyNoRdma {
    /// The program was built without it.
    #[error("this ramwire was built without the `rdma` feature")]
    NotBuilt,
    /// No library, no device, or the limit on locked memory is too small.
    #[error(transparent)]
    Unusable(Box<dyn std::error::Error + Send + Sync>),
    /// The memory of a block may be freed or remapped while it is registered with a NIC.
    #[error("the memory of RAM block {block} is not guaranteed to stay in place")]
    NotInPlace {
        /// The block.
        block: String,
    },
    /// The guest frees memory, or may do so, while it is registered with a NIC.
    #[error(
        "the guest may discard memory that is registered with a NIC; remove its balloon and free page reporting"
    )]
    GuestDiscards,
    /// There are devices, but none carries traffic.
    #[error("no RDMA device has an active port with an IP address ({devices}); see `ramwire devices`")]
    NoActivePort {
        /// Names of the devices.
        devices: String,
    },
}
