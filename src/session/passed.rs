//! Memory that is passed to the destination as a descriptor: none of its pages is sent, both ends map the same file.
//!
//! A block whose memory is passed is a block that is ignored as shared ([`BlockFlags::ignored`]) for this migration only.
//! Neither end need mark it so: both sessions look at their guest's memory through a [`PassedMemory`].
//!
//! [`BlockFlags::ignored`]: crate::ram::BlockFlags::ignored

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::error::Remedy;
use crate::guest::{GuestError, GuestMemory, LayoutChange};
use crate::ram::{BlockName, Landing, RamBlock, RamBlockTable};
use crate::session::{Error, ErrorKind};
use crate::sys::{HostRegion, HostSpan, Mapping, MappingError, SharedFile, SharedFileError};
use crate::units::BlockIndex;

/// A block of the guest whose memory arrived as a descriptor.
///
/// The source's guest may still run in this memory: nothing here may write to it before
/// [`GuestControl::resume`](crate::guest::GuestControl::resume), or
/// [`DeviceState::load`](crate::guest::DeviceState::load), is called. Until then the migration may fail, and the guest
/// continues at the source.
#[derive(Clone, Debug)]
pub struct PassedBlock {
    name: BlockName,
    file: SharedFile,
    len: u64,
}

impl PassedBlock {
    /// A whole file, as a QEMU passes the memory of a block ahead of its migration
    /// ([`CprMemory`](crate::transport::CprMemory)).
    ///
    /// # Errors
    /// [`Error::Passed`]: the descriptor is of something else than memory.
    pub fn of_file(name: BlockName, descriptor: OwnedFd) -> Result<Self, Error> {
        let len = rustix::fs::fstat(&descriptor).map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
        Self::received(name, Some(descriptor), (0, len))
    }

    /// The content of a MEMORY command, with the descriptor that arrived with it.
    ///
    /// # Errors
    /// [`Error::Passed`]: no descriptor arrived, or one that is not this much memory.
    pub(super) fn received(
        name: BlockName,
        descriptor: Option<OwnedFd>,
        (start, len): (u64, u64),
    ) -> Result<Self, Error> {
        let refused = |why| Error::Passed { block: name.clone(), why };
        let fd = descriptor.ok_or_else(|| refused(NotPassed::NoDescriptor))?;
        let file = SharedFile::checked(fd, start, len).map_err(|source| refused(source.into()))?;
        Ok(Self { name, file, len })
    }

    /// The block.
    pub fn name(&self) -> &BlockName {
        &self.name
    }

    /// The file that its memory is a shared mapping of.
    pub fn file(&self) -> &SharedFile {
        &self.file
    }

    /// Bytes of memory, at least those of the block.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True for no memory, which is never passed.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Maps the memory into this process.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn map(&self) -> Result<Mapping, MappingError> {
        self.file.map(self.len)
    }

    /// Looks once more whether the file holds the memory.
    pub(super) fn check(&self) -> Result<(), Error> {
        let refused =
            |source: SharedFileError| Error::Passed { block: self.name.clone(), why: source.into() };
        self.file.check(self.len).map_err(refused)
    }
}

/// Why memory could not be passed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotPassed {
    /// The source announced it, and sent none.
    #[error("no descriptor came with it")]
    NoDescriptor,
    /// The descriptor is of something else.
    #[error(transparent)]
    File(#[from] SharedFileError),
    /// It could not be mapped.
    #[error(transparent)]
    Unmapped(#[from] MappingError),
    /// The source announced it twice, or it is not in its list of blocks.
    #[error("the source announced it {0}")]
    Announced(&'static str),
    /// The block is longer than the part of it that was passed.
    #[error("the block has {used_length} bytes, and {len} of them were passed")]
    Part {
        /// Bytes of the block.
        used_length: u64,
        /// Bytes passed.
        len: u64,
    },
    /// Another process can't map it.
    #[error(
        "it is private memory here, and a QEMU takes none of it over this channel; give memory with a file (a memfd)"
    )]
    Private,
    /// It is left out as shared.
    #[error("it is left out as shared (x-ignore-shared), so this end does not have it to pass")]
    LeftOut,
    /// The memory that was provided is other memory.
    #[error(
        "the memory that was provided for it is not a mapping of the descriptor that arrived \
        (Incoming::passed): map that, and give its file (HostRegion::from_raw_file)"
    )]
    OtherMemory,
}

impl NotPassed {
    /// Whose fault it is.
    pub(super) fn kind(&self) -> ErrorKind {
        match self {
            Self::OtherMemory | Self::Unmapped(_) | Self::Private | Self::LeftOut => ErrorKind::Local,
            _ => ErrorKind::Peer,
        }
    }
}

/// All memory of a guest by its blocks, as it is passed ahead of a migration
/// ([`CprSender`](crate::transport::CprSender)).
///
/// # Errors
/// [`Error::Passed`]: a block has no file behind it, is not whole in it, or is not this guest's to pass.
pub fn memory_to_pass(memory: &dyn GuestMemory) -> Result<Vec<(BlockName, SharedFile)>, Error> {
    let blocks = (0..).map(BlockIndex).zip(memory.table().blocks());
    let file_of = |(index, block): (BlockIndex, &RamBlock)| {
        let refused = |why| Error::Passed { block: block.name.clone(), why };
        if block.flags.ignored {
            return Err(refused(NotPassed::LeftOut));
        }
        let file = memory.region(index).and_then(|region| region.shared_file());
        let file = file.ok_or_else(|| refused(NotPassed::Private))?;
        file.check(block.used_length).map_err(|source| refused(source.into()))?;
        Ok((block.name.clone(), file))
    };
    blocks.map(file_of).collect()
}

/// Everything that was passed is a block of the list, whole.
///
/// # Errors
/// [`Error::Passed`].
pub(super) fn check_announced(passed: &[PassedBlock], announced: &[RamBlock]) -> Result<(), Error> {
    for PassedBlock { name, len, .. } in passed {
        let block = announced.iter().find(|block| block.name == *name).map(|block| block.used_length);
        let why = match block {
            None => NotPassed::Announced("and has no block of this name"),
            Some(used_length) if used_length > *len => NotPassed::Part { used_length, len: *len },
            Some(_) => continue,
        };
        return Err(Error::Passed { block: name.clone(), why });
    }
    Ok(())
}

/// Where all memory was to come ahead of the stream, each block of the list has some.
///
/// # Errors
/// [`Error::Passed`].
pub(super) fn check_all(passed: &[PassedBlock], announced: &[RamBlock]) -> Result<(), Error> {
    let is_received = |block: &&RamBlock| passed.iter().any(|passed| passed.name == block.name);
    match announced.iter().find(|block| !is_received(block)) {
        Some(block) => Err(Error::Passed { block: block.name.clone(), why: NotPassed::NoDescriptor }),
        None => Ok(()),
    }
}

/// Checks that the memory provided for passed blocks is the passed memory. A guest in other memory would find it empty.
///
/// # Errors
/// [`Error::Passed`].
pub(super) fn check_provided(passed: &[PassedBlock], memory: &dyn GuestMemory) -> Result<(), Error> {
    for PassedBlock { name, file, .. } in passed {
        let index = memory.table().find(name.as_str()).map_err(GuestError::from)?;
        let provided = memory.region(index).and_then(|region| region.shared_file());
        if !provided.is_some_and(|provided| provided.is_same(file)) {
            return Err(Error::Passed { block: name.clone(), why: NotPassed::OtherMemory });
        }
    }
    Ok(())
}

/// A guest's memory, some blocks of which are passed: they are ignored as shared ones are.
pub(super) struct PassedMemory {
    inner: Arc<dyn GuestMemory>,
    table: RamBlockTable,
}

impl PassedMemory {
    /// The memory of `inner`; `is_passed` returns whether a block is passed.
    ///
    /// # Errors
    /// None with a valid table.
    pub(super) fn over(
        inner: Arc<dyn GuestMemory>,
        is_passed: impl Fn(&RamBlock) -> bool,
    ) -> Result<Arc<dyn GuestMemory>, GuestError> {
        let mut blocks = inner.table().blocks().to_vec();
        for block in &mut blocks {
            block.flags.ignored |= is_passed(block);
        }
        let table = RamBlockTable::new(inner.table().page(), blocks)?;
        Ok(Arc::new(Self { inner, table }))
    }
}

impl GuestMemory for PassedMemory {
    fn table(&self) -> &RamBlockTable {
        &self.table
    }

    fn span(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
        self.inner.span(landing)
    }

    fn region(&self, block: BlockIndex) -> Option<HostRegion> {
        self.inner.region(block)
    }

    fn layout_change(&self) -> Option<LayoutChange> {
        self.inner.layout_change()
    }

    fn discard(&self, landing: Landing) -> Result<(), GuestError> {
        self.inner.discard(landing)
    }
}

/// A request of the embedder that can't be fulfilled.
pub(super) fn no_postcopy() -> Error {
    Error::Config {
        what: "memory is to be passed as it is, and a switch to postcopy would empty it".into(),
        remedy: Remedy::Advice("ask for one of the two"),
    }
}
