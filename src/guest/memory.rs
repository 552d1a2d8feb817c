//! Guest RAM as a migration reaches it: [`GuestMemory`].

use std::io;

use crate::observe::named;
use crate::ram::{BlockError, BlockName, Landing, RamBlockTable, Refusal, TableError};
use crate::sys::{HostRegion, HostSpan, Loss, OutOfRegion, WriteFaultsError};
use crate::units::BlockIndex;

/// Why guest memory could not be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// More host pages were begun than one channel may have unfinished.
    #[error("RAM block {block}: a page of the host page at {offset:#x} came while others were unfinished")]
    Unfinished {
        /// The block.
        block: String,
        /// Offset of the host page in bytes.
        offset: u64,
    },
    /// The range is not in a block, or must not travel.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The blocks do not make a table.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A block can't be called so.
    #[error(transparent)]
    Name(#[from] BlockError),
    /// The mapping behind a block is shorter than the block.
    #[error("RAM block {block} is longer than its mapping")]
    Unmapped {
        /// The block.
        block: String,
        /// The range.
        source: OutOfRegion,
    },
    /// Writes to guest memory can't be held.
    #[error(transparent)]
    WriteFaults(#[from] WriteFaultsError),
    /// Writes to a block can't be held.
    #[error("RAM block {block} can't be protected from writes")]
    Unprotected {
        /// The block.
        block: String,
        /// Why.
        source: WriteFaultsError,
    },
    /// The kernel refused to map or to change memory.
    #[error("RAM block {block}: {what} failed ({remedy})")]
    Kernel {
        /// The block.
        block: String,
        /// The operation.
        what: &'static str,
        /// What can be done about it.
        remedy: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What has become of a guest's RAM blocks while they were in use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutChange {
    /// A block has another length.
    #[error("RAM block {block} was resized to {length} bytes")]
    Resized {
        /// The block.
        block: BlockName,
        /// Bytes in use now.
        length: u64,
    },
    /// There is a block more.
    #[error("RAM block {block} was added")]
    Added {
        /// The block.
        block: BlockName,
    },
    /// The kernel has lost memory of a block: its file was made shorter, or what it takes pages from is full.
    #[error("RAM block {block} has lost memory: {loss}")]
    Lost {
        /// The block.
        block: BlockName,
        /// What has become of it.
        loss: Loss,
    },
    /// A block is gone; its memory stays mapped until the migration is over.
    #[error("RAM block {block} was taken away")]
    Removed {
        /// The block.
        block: BlockName,
    },
}

/// Guest RAM, block by block.
///
/// All methods take `&self`: the page loop, channels and the guest itself reach the memory side by side.
pub trait GuestMemory: Send + Sync {
    /// The blocks, in the order of the stream's block list.
    fn table(&self) -> &RamBlockTable;

    /// Where the bytes of `landing` are in this process. The kernel and the NIC read and write there.
    ///
    /// # Errors
    /// [`GuestError::Unmapped`] if `landing` is of another table.
    fn span(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError>;

    /// The memory behind a block in a form that outlives the borrow, for a NIC that reads and writes there by itself.
    /// `None` if it can't promise to stay mapped where it is.
    fn region(&self, _block: BlockIndex) -> Option<HostRegion> {
        None
    }

    /// What has changed since this was made, and is not in [`table`](Self::table): that ends a migration of it, before
    /// COMMIT, and the guest runs on. Looked at before each sync, once a slice, and before the device state is saved.
    fn layout_change(&self) -> Option<LayoutChange> {
        None
    }

    /// The bytes of `landing` are given up (postcopy, balloon); reads see zero afterwards.
    ///
    /// # Errors
    /// [`GuestError::Kernel`]; never called on memory a NIC has registered.
    fn discard(&self, landing: Landing) -> Result<(), GuestError>;
}

/// [`GuestMemory::span`], whose panic is told by its name.
pub(crate) fn span_of(memory: &dyn GuestMemory, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
    named("calling GuestMemory::span", || memory.span(landing))
}
