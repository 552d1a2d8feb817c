//! Tracking of the guest's writes: [`DirtySource`].

use std::io;

use super::GuestMemory;
use crate::ram::{PageBitmap, PageRun, RamBlock};
use crate::sys::HostRegion;
use crate::units::BlockIndex;

/// Why a dirty source can't be used, or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyError {
    /// The kernel, the VMM or this memory does not support it: another source is needed.
    #[error("{source_name} can't track this guest: {reason}")]
    Unsupported {
        /// Name of the dirty source.
        source_name: &'static str,
        /// Why, and what would help.
        reason: String,
    },
    /// A call failed during use; the dirty log can't be trusted any more.
    #[error("{source_name}: {what} failed")]
    Kernel {
        /// Name of the dirty source.
        source_name: &'static str,
        /// The operation.
        what: &'static str,
        /// The kernel's error.
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

/// Reports which pages were written since the last sync.
///
/// A guest has a list of sources and every sync ORs all of them: the KVM log sees only vCPU writes, write protection
/// only this process's page tables, a vhost-user backend's writes are reported through its own log. Methods take
/// `&self`, so that walkers of several blocks can share a source.
pub trait DirtySource: Send + Sync {
    /// Short name for reports: `uffd-wp`, `soft-dirty`, `software`, `kvm-log`, `kvm-ring`.
    fn name(&self) -> &'static str;

    /// Writes a page of scratch memory and checks that the write is reported.
    ///
    /// # Errors
    /// [`DirtyError::Unsupported`] with the reason and the remedy.
    fn probe(&self) -> Result<(), DirtyError>;

    /// Starts tracking: every write from here on is reported by a later sync.
    ///
    /// # Errors
    /// [`DirtyError`].
    fn start(&self) -> Result<(), DirtyError>;

    /// Begins a sync: called once before [`sync_into`](Self::sync_into) is called for each block. A source whose kernel
    /// log covers all blocks at once reads it here; most sources do nothing here. One that wraps another passes it on.
    ///
    /// # Errors
    /// [`DirtyError`].
    fn begin_sync(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    /// ORs the pages of `block` written since the last sync into `into`. Part of a sync that
    /// [`begin_sync`](Self::begin_sync) began; [`sync_all`](super::sync_all) does both.
    ///
    /// # Errors
    /// [`DirtyError`]; bits already set stay set.
    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError>;

    /// Arms the log for `run` again; called after the bits are cleared and before the bytes are read.
    /// A source whose sync re-arms by itself does nothing here. One that wraps another passes it on: otherwise writes are
    /// lost.
    ///
    /// # Errors
    /// [`DirtyError`].
    fn reprotect(&self, _run: PageRun) -> Result<(), DirtyError> {
        Ok(())
    }

    /// Stops tracking and removes all protection. Safe to call twice, and after an error.
    ///
    /// # Errors
    /// [`DirtyError`].
    fn stop(&self) -> Result<(), DirtyError>;
}

/// The first migrated block without a [`region`](GuestMemory::region): the kernel can't track it.
#[derive(Debug)]
pub(super) struct NoRegion(Option<String>);

impl NoRegion {
    pub(super) fn check(&self, source_name: &'static str) -> Result<(), DirtyError> {
        self.0.as_ref().map_or(Ok(()), |block| {
            let reason =
                format!("RAM block {block} has no region; give memory whose GuestMemory::region is not None");
            Err(DirtyError::unsupported(source_name, reason))
        })
    }
}

/// The result of `tracked` for each migrated block and its region; `None` for a block that is not migrated.
pub(super) fn regions_of<T>(
    guest: &dyn GuestMemory,
    tracked: impl Fn(&RamBlock, HostRegion) -> T,
) -> (Vec<Option<T>>, NoRegion) {
    let mut missing = None;
    let one = |(index, block): (usize, &RamBlock)| {
        let region = guest.region(BlockIndex(index as u32)).filter(|_| !block.flags.ignored);
        if region.is_none() && !block.flags.ignored && missing.is_none() {
            missing = Some(block.name.to_string());
        }
        region.map(|region| tracked(block, region))
    };
    (guest.table().blocks().iter().enumerate().map(one).collect(), NoRegion(missing))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::super::race::guest_of;
    use super::super::{GuestError, MappedGuest, PauseWriters, SoftDirty, WrittenPages};
    use super::*;
    use crate::ram::{Landing, RamBlockTable};
    use crate::sys::{HostSpan, Mapping};

    /// A VMM's own memory, which provides no region.
    struct Own(MappedGuest);

    impl GuestMemory for Own {
        fn table(&self) -> &RamBlockTable {
            self.0.table()
        }
        fn span(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
            self.0.span(landing)
        }
        fn discard(&self, landing: Landing) -> Result<(), GuestError> {
            self.0.discard(landing)
        }
    }

    struct NoWriters;

    impl PauseWriters for NoWriters {
        fn paused(&self, during: &mut dyn FnMut()) -> io::Result<()> {
            during();
            Ok(())
        }
    }

    #[test]
    fn a_block_without_a_region_is_refused_by_name_instead_of_left_untracked() {
        let own = Own(guest_of(&[Mapping::anonymous(1 << 20).unwrap()]));
        let name = own.table().blocks()[0].name.to_string();
        let sources: [Box<dyn DirtySource>; 2] =
            [Box::new(WrittenPages::new(&own)), Box::new(SoftDirty::new(&own, Arc::new(NoWriters)))];
        for source in sources {
            for refused in [source.probe(), source.start()] {
                let text = refused.unwrap_err().to_string();
                assert!(
                    text.contains(&format!("RAM block {name} has no region")),
                    "{}: {text}",
                    source.name()
                );
            }
        }
    }
}
