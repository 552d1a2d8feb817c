//! Guest RAM as a migration accesses it: [`GuestMemory`].

use std::io;

use crate::observe::named;
use crate::ram::{BlockError, BlockName, Landing, RamBlockTable, Refusal, TableError};
use crate::sys::{HostRegion, HostSpan, Loss, OutOfRegion, WriteFaultsError};
use crate::units::BlockIndex;

/// Why guest memory could not be accessed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// More host pages were begun than one channel may leave incomplete.
    #[error(
        "RAM block {block}: a page of the host page at {offset:#x} arrived before another host page was \
        complete"
    )]
    Unfinished {
        /// The block.
        block: String,
        /// Offset of the host page in bytes.
        offset: u64,
    },
    /// The range is not in a block, or the block is not migrated.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The blocks do not form a valid table.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The name of a block is invalid.
    #[error(transparent)]
    Name(#[from] BlockError),
    /// The mapping of a block is shorter than the block.
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
        /// The remedy.
        remedy: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

/// How a guest's RAM blocks changed while they were in use.
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
    /// The kernel has lost memory of a block: its file was truncated, or its file system or pool is full.
    #[error("RAM block {block} has lost memory: {loss}")]
    Lost {
        /// The block.
        block: BlockName,
        /// What happened to it.
        loss: Loss,
    },
    /// A block is gone; its memory stays mapped until the migration is over.
    #[error("RAM block {block} was removed")]
    Removed {
        /// The block.
        block: BlockName,
    },
}

/// Guest RAM, block by block.
///
/// All methods take `&self`: the page loop, channels and the guest itself access the memory in parallel.
pub trait GuestMemory: Send + Sync {
    /// The blocks, in the order of the stream's block list.
    fn table(&self) -> &RamBlockTable;

    /// The memory of `landing` in this process. The kernel and the NIC read and write there.
    ///
    /// # Errors
    /// [`GuestError::Unmapped`] if `landing` is of another table.
    fn span(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError>;

    /// The memory of a block in a form that outlives the borrow, for a NIC that reads and writes it by itself. `None`
    /// if it can't promise to stay mapped at its address.
    fn region(&self, _block: BlockIndex) -> Option<HostRegion> {
        None
    }

    /// A change since this was created that is not in [`table`](Self::table): it ends a migration of this memory before
    /// COMMIT, and the guest continues. It is checked before each sync, once a slice, and before the device state is
    /// saved.
    fn layout_change(&self) -> Option<LayoutChange> {
        None
    }

    /// Discards the bytes of `landing` (postcopy, balloon); reads return zero afterwards.
    ///
    /// # Errors
    /// [`GuestError::Kernel`]; never called on memory a NIC has registered.
    fn discard(&self, landing: Landing) -> Result<(), GuestError>;
}

/// [`GuestMemory::span`]; a panic in it is reported with its name.
pub(crate) fn span_of(memory: &dyn GuestMemory, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
    named("calling GuestMemory::span", || memory.span(landing))
}
