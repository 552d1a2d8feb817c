//! The five hooks and their types.
//!
//! | QEMU's page loop calls | here | does |
//! |---|---|---|
//! | `rdma_block_notification_handle` | [`DestinationHooks::block_notification`] | the destination learns the block order |
//! | `rdma_registration_start` | [`SourceHooks::registration_start`] | opens a round; its mark is the last record |
//! | `rdma_control_save_page` | [`SourceHooks::control_save_page`] | merges, registers on demand, writes |
//! | `rdma_registration_stop` | [`SourceHooks::registration_stop`] | closes the round |
//! | `rdma_registration_handle` | [`DestinationHooks::registration_handle`] | serves a round |

mod destination;
mod read_lane;
mod return_path;
mod source;

pub use destination::{DestinationConfig, DestinationHooks, PeerFilter, RoundSummary};
pub use read_lane::{READ_QUEUES, ReadDone, ReadKey, ReadLane};
pub use return_path::{ReturnReader, ReturnWriter};
pub use source::{ExtensionOffer, SourceConfig, SourceHooks};

use std::time::Duration;

use crate::blocks::BlockError;
use crate::capabilities::CapabilityError;
use crate::control::{Kind, WireError};
use crate::exchange::ExchangeError;
use crate::fabric::FabricError;
use crate::stop::Stopped;

/// Which round a hook is called for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RamControl {
    /// Start of the RAM section: the block tables are exchanged, no page moves.
    Setup,
    /// Pages while the guest runs.
    Round,
    /// The last pages, the guest is stopped.
    Finish,
}

/// The record that ends the stream before a round. The embedder writes it, because it owns the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the destination does not enter the round without the mark in the stream"]
pub struct HookMark(());

impl HookMark {
    /// The flag of a RAM section record that announces a round of RDMA.
    pub const FLAG: u64 = 0x80;

    /// The mark's bytes in the stream.
    pub const fn to_bytes(self) -> [u8; 8] {
        Self::FLAG.to_be_bytes()
    }
}

/// What is known about the content of pages to save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageContent {
    /// At least one byte is not zero, or the content was not checked and the pages are to be sent.
    Data,
    /// All read as zero.
    Zero,
    /// The content was not checked: the hook checks it page by page.
    Unknown,
}

/// Adjacent pages of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSpan {
    /// Position of the block in the announced list.
    pub block: u32,
    /// First byte, counted from the start of the block.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Zero or not.
    pub content: PageContent,
}

/// Number of a save, from 1; later saves have higher numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// What became of saved pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveDisposition {
    /// The pages are sent by RDMA; the embedder sends nothing for them. They have arrived once [`SourceHooks::collect`]
    /// reports this ticket or a higher one.
    Delayed {
        /// Number of this save.
        ticket: Ticket,
        /// Where the last of the pages is.
        state: Delay,
    },
    /// Not by RDMA: the embedder sends the pages in the stream, after the round.
    NotSupported(Reason),
}

/// Where delayed pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delay {
    /// They wait for neighbours to join their write.
    Merging,
    /// Handed to the device.
    Posted,
    /// The destination receives, or has received, the message that they are zero.
    Zeroed,
}

/// Why pages are not sent by RDMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Postcopy has begun: the destination places pages itself.
    Postcopy,
}

/// Why a hook failed. The migration over this connection has ended; the source's guest is intact.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HooksError {
    /// The network or the device.
    #[error(transparent)]
    Fabric(FabricError),
    /// The peer sent bytes that are not a control message.
    #[error("peer broke the protocol")]
    Wire(#[from] WireError),
    /// The peer sent a message out of turn, or gave up.
    #[error(transparent)]
    Exchange(#[from] ExchangeError),
    /// A block, an index or a range.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The peer's private data.
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    /// The peer granted a key that means "none".
    #[error("peer granted key 0 for chunk {chunk} of block {block:?}")]
    NoKey {
        /// The block's name.
        block: String,
        /// The chunk.
        chunk: u64,
    },
    /// The peer repeatedly requests registrations of the same memory.
    #[error("peer asked for {asked} registered bytes, there are {limit} to ask for")]
    TooMuchRegistered {
        /// Bytes for which it would hold keys.
        asked: u64,
        /// Most bytes it may.
        limit: u64,
    },
    /// The peer returned a key that it does not hold.
    #[error("peer gave back chunk {chunk} of block {block:?}, which it holds no key for")]
    NotRegistered {
        /// The block's name.
        block: String,
        /// The chunk.
        chunk: u64,
    },
    /// The end of a round on an additional queue pair has the wrong number.
    #[error("queue pair {queue} ended round {got}, round {want} is open")]
    Fence {
        /// The queue pair, from 1.
        queue: usize,
        /// As received.
        got: u32,
        /// The current round.
        want: u32,
    },
    /// In an open round the source has sent no message and, as far as this end's device reports, no write.
    #[error(
        "the source has sent nothing for {after:?} in an open round: its process is stopped or hangs; if it is \
        only slow, raise DestinationConfig::silence"
    )]
    Silent {
        /// Length of the wait.
        after: Duration,
    },
    /// The embedder called the hooks in an invalid order.
    #[error("hook called out of order: {0}")]
    OutOfOrder(&'static str),
    /// A wait was given up.
    #[error(transparent)]
    Stopped(#[from] Stopped),
}

impl From<FabricError> for HooksError {
    fn from(error: FabricError) -> Self {
        match error {
            FabricError::Stopped(stopped) => Self::Stopped(stopped),
            error => Self::Fabric(error),
        }
    }
}

/// Which side caused a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The embedder's or this host's.
    Local,
    /// The peer's.
    Peer,
    /// The network failed, or the peer is gone.
    Network,
    /// Asked for.
    Stopped,
}

impl HooksError {
    /// Which side caused it.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Fabric(error) => match error {
                FabricError::Completion { .. } | FabricError::Disconnected | FabricError::Event { .. } => {
                    Blame::Network
                }
                FabricError::NotAuthentic { .. } => Blame::Peer,
                _ => Blame::Local,
            },
            Self::OutOfOrder(_) => Blame::Local,
            Self::Stopped(_) => Blame::Stopped,
            _ => Blame::Peer,
        }
    }

    pub(crate) fn unexpected(got: Kind, doing: &'static str) -> Self {
        ExchangeError::Unexpected { got, doing }.into()
    }
}
