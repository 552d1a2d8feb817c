//! The virtual machine as a migration sees it: its memory, what it wrote, and how it is controlled.

mod discards;
mod gate;
mod hints;
#[cfg(feature = "kvm")]
mod kvm;
mod mapped;
mod placing;
#[cfg(test)]
mod race;
#[cfg(all(test, feature = "kvm"))]
mod several_writers;
mod soft_dirty;
mod software;
mod sources;
pub mod synthetic;
mod vhost_log;
#[cfg(feature = "vm-memory")]
mod vm_memory;
mod written_pages;

use std::io::{self, Read, Write};

pub use discards::{DiscardManager, PlugMap};
pub use gate::VcpuGate;
#[cfg(test)]
pub(crate) use hints::HintBreakage;
pub use hints::{HintEpoch, HintError, Hinted, PageHints};
#[cfg(feature = "kvm")]
pub use kvm::{KvmDirtyLog, KvmDirtyRing, KvmSlot, RingSize};
pub use mapped::{GuestBuilder, MappedGuest};
pub use placing::{PageObserver, PageWriter, Placer, ServeError};
pub use soft_dirty::{SoftDirty, Standstill};
pub use software::SoftwareBitmap;
pub use sources::{Choice, NoSource, choose, sync_all};
pub use vhost_log::VhostLog;
pub use written_pages::WrittenPages;

use crate::ram::{BlockError, BlockName, Landing, PageBitmap, PageRun, RamBlockTable, Refusal, TableError};
use crate::sys::{HostRegion, HostSpan, Loss, OutOfRegion};
use crate::units::{BlockIndex, Percent, RestShare};

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

/// Why a dirty source can't be used, or failed in use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyError {
    /// The kernel, the VMM or this memory can't do it: another source is needed.
    #[error("{source_name} can't track this guest: {reason}")]
    Unsupported {
        /// Name of the dirty source.
        source_name: &'static str,
        /// Why, and what would help.
        reason: String,
    },
    /// A call failed in use; the dirty log can't be trusted any more.
    #[error("{source_name}: {what} failed")]
    Kernel {
        /// Name of the dirty source.
        source_name: &'static str,
        /// The operation.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl DirtyError {
    /// `source_name` can't track this guest.
    pub(crate) fn unsupported(source_name: &'static str, reason: String) -> Self {
        Self::Unsupported { source_name, reason }
    }

    /// A call of `source_name` failed.
    pub(crate) fn kernel(source_name: &'static str, what: &'static str, source: io::Error) -> Self {
        Self::Kernel { source_name, what, source }
    }
}

/// Knows which pages were written since it was last asked.
///
/// A guest has a list of sources and every sync ORs all of them: the KVM log sees only vCPU writes, write
/// protection only this process's page tables, a vhost-user backend's writes come by a software map.
/// Methods take `&self`, so that walkers of several blocks can share a source.
pub trait DirtySource: Send + Sync {
    /// Short name for reports: `uffd-wp`, `soft-dirty`, `software`, `kvm-log`, `kvm-ring`.
    fn name(&self) -> &'static str;

    /// Writes a page of scratch memory and looks whether the write is reported.
    ///
    /// # Errors
    /// [`DirtyError::Unsupported`] with the reason and the remedy.
    fn probe(&self) -> Result<(), DirtyError>;

    /// Starts tracking: every write from here on is reported by a later sync.
    ///
    /// # Errors
    /// [`DirtyError`].
    fn start(&self) -> Result<(), DirtyError>;

    /// Begins a sync: called once before [`sync_into`](Self::sync_into) is called for each block. A source
    /// whose kernel log covers all blocks at once takes it here; most sources have nothing to do.
    ///
    /// # Errors
    /// [`DirtyError`].
    fn begin_sync(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    /// ORs the pages of `block` written since the last sync into `into`. Part of a sync that
    /// [`begin_sync`](Self::begin_sync) began; [`sync_all`] does both.
    ///
    ///
    /// # Errors
    /// [`DirtyError`]; bits already set stay set.
    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError>;

    /// Arms the log for `run` again; called after the bits are cleared and before the bytes are read.
    /// A source whose sync re-arms by itself does nothing here.
    ///
    /// # Errors
    /// [`DirtyError`].
    fn reprotect(&self, _run: PageRun) -> Result<(), DirtyError> {
        Ok(())
    }

    /// Stops tracking and takes all protection off. Safe to call twice, and after an error.
    ///
    /// # Errors
    /// [`DirtyError`].
    fn stop(&self) -> Result<(), DirtyError>;
}

/// Controls the machine around the memory; implemented by the VMM.
pub trait GuestControl: Send {
    /// Stops all vCPUs and every device that writes guest RAM; returns when none does any more.
    ///
    /// # Errors
    /// The VMM's own; the migration then fails and the guest runs on.
    fn pause(&mut self) -> io::Result<()>;

    /// Lets the guest run (again). On the destination: for the first time.
    ///
    /// # Errors
    /// The VMM's own.
    fn resume(&mut self) -> io::Result<()>;

    /// Slows the guest's vCPUs down by `share` of their time; 0 ends it.
    fn throttle(&mut self, _share: Percent) {}

    /// Pages that each vCPU has written so far; only ever more. A page counts each time it was found dirty. Empty where
    /// the VMM can't tell whose writes they are (KVM tells with its dirty ring): such a guest has no dirty limit.
    fn vcpu_dirty_pages(&mut self) -> Vec<u64> {
        Vec::new()
    }

    /// Lets vCPU number `vcpu` of [`vcpu_dirty_pages`](Self::vcpu_dirty_pages) rest for the time that it runs, beside what
    /// [`throttle`](Self::throttle) takes of all; 0 ends it.
    fn throttle_vcpu(&mut self, _vcpu: usize, _rest: RestShare) {}

    /// Bytes that [`save_devices`](Self::save_devices) will write, about: they count against the downtime. The guest runs.
    fn device_state_bytes(&mut self) -> u64 {
        0
    }

    /// Writes the state of vCPUs and devices; the guest is paused.
    ///
    /// # Errors
    /// The VMM's own or the writer's.
    fn save_devices(&mut self, out: &mut dyn Write) -> io::Result<()>;

    /// Reads what [`save_devices`](Self::save_devices) wrote on the other host.
    ///
    /// # Errors
    /// The VMM's own or the reader's; the destination then refuses the guest.
    fn load_devices(&mut self, from: &mut dyn Read) -> io::Result<()>;

    /// Promises (or no longer promises) that no page is given back to the kernel meanwhile. `false` if the
    /// guest can't promise: then no NIC may register its memory.
    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        false
    }
}
