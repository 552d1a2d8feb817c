//! One RAM block: its name, its lengths, the pages it is made of.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use crate::units::{GuestAddr, PageSize};

/// Name of a RAM block: 1 to 255 bytes of UTF-8, as the stream's counted strings allow.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockName(Arc<str>);

impl BlockName {
    /// Longest name in bytes; the wire counts it in one byte.
    pub const MAX: usize = 255;

    /// Checks the length.
    ///
    /// # Errors
    /// [`BlockError::NameLength`] unless `name` has 1 to 255 bytes.
    pub fn new(name: &str) -> Result<Self, BlockError> {
        if name.is_empty() || name.len() > Self::MAX {
            return Err(BlockError::NameLength { len: name.len() });
        }
        Ok(Self(name.into()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for BlockName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

/// How a migration treats a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockFlags {
    /// Both ends map the same memory: the block is announced, its pages are not sent.
    pub ignored: bool,
    /// The backing is shared with other processes.
    pub shared: bool,
    /// The destination may announce a length up to `max_length`.
    pub resizable: bool,
}

/// One migratable RAM block.
///
/// `used_length` and `max_length` are bytes and multiples of the target page; `host_page` is the page
/// size of the backing (4 KiB, 2 MiB or 1 GiB on x86), never smaller than the target page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// Name, unique in its table.
    pub name: BlockName,
    /// Bytes in use.
    pub used_length: u64,
    /// Bytes the block may grow to.
    pub max_length: u64,
    /// Page size of the block's backing.
    pub host_page: PageSize,
    /// Guest physical address of the block, if it is mapped.
    pub guest_addr: Option<GuestAddr>,
    /// How a migration treats it.
    pub flags: BlockFlags,
}

impl RamBlock {
    /// A plain block of 4 KiB host pages that cannot grow.
    pub fn new(name: BlockName, length: u64) -> Self {
        Self {
            name,
            used_length: length,
            max_length: length,
            host_page: PageSize::SIZE_4K,
            guest_addr: None,
            flags: BlockFlags::default(),
        }
    }
}

/// Why a block is invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The wire counts a name in one byte and has no empty name.
    #[error("a RAM block name has 1 to 255 bytes, this one has {len}")]
    NameLength {
        /// Bytes in the refused name.
        len: usize,
    },
}
