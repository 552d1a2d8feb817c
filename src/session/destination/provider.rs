//! The guest that is to arrive, and the provider of its memory.

use std::sync::Arc;

use crate::error::Remedy;
use crate::guest::{GuestControl, GuestError, GuestMemory, MappedGuest};
use crate::ram::{RamBlock, RamBlockTable};
use crate::session::{Error, PassedBlock, shared_blocks};
use crate::stream::qemu::file::Configuration;
use crate::stream::qemu::incoming::Seen;
use crate::sys::{HostRegion, MappingError};
use crate::units::{BlockIndex, PageSize};

/// What the source announced, before any page.
#[derive(Clone, Debug)]
pub struct Incoming {
    /// Machine and capabilities.
    pub configuration: Configuration,
    /// The blocks in stream order.
    pub blocks: Vec<RamBlock>,
    /// Data of the source's VMM
    /// ([`SourceSettings::vmm_configuration`](crate::session::SourceSettings::vmm_configuration)); empty if it sends
    /// none, or is a QEMU.
    pub vmm_configuration: Vec<u8>,
    /// Memory that the source passes as descriptors, if this end takes it
    /// ([`DestinationSettings::take_memory`](crate::session::DestinationSettings::take_memory)): for these blocks the
    /// provider gives mappings of them. None of their pages arrives.
    pub passed: Vec<PassedBlock>,
    /// Sections before the first page, as they arrived. Later ones are part of the device state.
    pub early_sections: Vec<u8>,
    /// The source opened a return path: the result can be reported to it.
    pub has_return_path: bool,
    /// The source has no return path and is no file: it gives its guest away with its last byte, whether the guest is here
    /// then or not ([`Ending::Unanswered`](crate::session::Ending::Unanswered)). A QEMU waits for the answer with its
    /// capability `return-path`.
    pub gives_unasked: bool,
    /// What the stream has shown of its sender; whole once everything has arrived.
    pub seen: Seen,
}

impl Incoming {
    /// Blocks about which nothing else is known.
    pub(in crate::session) fn of_blocks(blocks: Vec<RamBlock>) -> Self {
        Self {
            configuration: Configuration::default(),
            blocks,
            vmm_configuration: Vec::new(),
            passed: Vec::new(),
            early_sections: Vec::new(),
            has_return_path: true,
            gives_unasked: false,
            seen: Seen::default(),
        }
    }

    /// Memory for the announced blocks: mappings of the [passed](Self::passed) ones, and for each other block the
    /// memory that `own` returns. `page` is the target page, 4 KiB on x86.
    ///
    /// # Errors
    /// [`Error::Passed`] if something can't be mapped; [`Error::Guest`] if the blocks form no guest; those of `own`.
    pub fn map(
        &self,
        page: PageSize,
        mut own: impl FnMut(&RamBlock) -> Result<HostRegion, Error>,
    ) -> Result<Arc<MappedGuest>, Error> {
        let mut builder = MappedGuest::builder(page);
        for block in &self.blocks {
            let passed = self.passed.iter().find(|passed| *passed.name() == block.name);
            let region = match passed {
                None => own(block)?,
                Some(passed) => {
                    let refused =
                        |why: MappingError| Error::Passed { block: block.name.clone(), why: why.into() };
                    passed.map().map_err(refused)?.region().clone()
                }
            };
            let mut block = block.clone();
            block.flags.shared |= passed.is_some();
            builder = builder.region(block, region);
        }
        Ok(Arc::new(builder.build()?))
    }
}

/// A guest that is to arrive.
pub struct DestinationGuest {
    /// Provides its memory once the source has announced it.
    pub memory: Box<dyn MemoryProvider>,
    /// Pause, resume, device state.
    pub control: Box<dyn GuestControl>,
}

/// Provides the memory a guest arrives in.
pub trait MemoryProvider: Send {
    /// The memory for the announced blocks: the same names, at least the same lengths. Nothing else writes to it from
    /// this call until the migration has ended. It may hold old bytes, for example of an earlier migration: a page that
    /// the source reports as zero is zero here afterwards. A page that the source does not send at all is left as it
    /// is.
    ///
    /// The memory of blocks that were [passed](Incoming::passed) is a mapping of the passed memory. The source's guest
    /// may run in it: nothing writes to it before the device state is loaded.
    ///
    /// # Errors
    /// [`Error::Guest`] or [`Error::Config`] if this guest is not that guest.
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error>;

    /// True if all of a block of the memory that was [provided](Self::provide) just now is known to read as zero: it
    /// was mapped or cleared for this migration, and nothing has written to it. Then no page is checked.
    ///
    /// Without this promise the kernel is asked, once and before any page arrives, which pages were written since they
    /// were mapped; those, and all where it can't tell, are checked when the source reports them as zero, and cleared
    /// if they are not. The answer `true` for memory with other contents loses zero pages.
    fn is_zeroed(&self, _block: &RamBlock) -> bool {
        false
    }

    /// Everything has arrived, the device state is loaded next; if memory was passed the guest is ours by then.
    /// `incoming` has the early sections now; `native` if a ramwire sent it.
    fn arrived(&mut self, _incoming: &Incoming, _native: bool) {}
}

/// Where each of the source's blocks is in this guest's table: both have the same ones, of the same lengths.
///
/// # Errors
/// [`Error::Guest`] or [`Error::Config`], which name the block that differs.
pub(in crate::session) fn same_blocks(
    announced: &[RamBlock],
    table: &RamBlockTable,
) -> Result<Vec<BlockIndex>, Error> {
    let differs =
        |what| Error::Config { what, remedy: Remedy::Advice("start both ends with the same memory") };
    let find = |theirs: &RamBlock| {
        let index = table.find(theirs.name.as_str()).map_err(GuestError::from)?;
        let (name, length) = (&theirs.name, theirs.used_length);
        let ours = table.get(index).map_or(0, |block| block.used_length);
        match ours == length {
            true => Ok(index),
            false => {
                let what = format!("RAM block {name}: the source has {length} bytes, this guest {ours}");
                Err(differs(what))
            }
        }
    };
    let found = announced.iter().map(find).collect::<Result<_, Error>>()?;
    let is_announced = |ours: &&RamBlock| announced.iter().any(|theirs| theirs.name == ours.name);
    match table.blocks().iter().find(|ours| !is_announced(ours)) {
        None => Ok(found),
        Some(missing) => {
            Err(differs(format!("RAM block {}: the source has none of this name", missing.name)))
        }
    }
}

impl<M: GuestMemory + 'static> MemoryProvider for Arc<M> {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        same_blocks(&incoming.blocks, self.table())?;
        shared_blocks::check_any(incoming, self.table())?;
        Ok(Arc::clone(self) as Arc<dyn GuestMemory>)
    }
}

/// Provides memory that was mapped or cleared for this migration and never written since: with the promise of
/// [`is_zeroed`](MemoryProvider::is_zeroed), so that no check is needed.
#[derive(Debug)]
pub struct Zeroed<M>(pub Arc<M>);

impl<M: GuestMemory + 'static> MemoryProvider for Zeroed<M> {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        self.0.provide(incoming)
    }

    fn is_zeroed(&self, _block: &RamBlock) -> bool {
        true
    }
}
