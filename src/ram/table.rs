//! The blocks of a guest, and the one place where bounds are checked.

use std::collections::HashMap;

use super::{BlockName, PageRun, RamBlock};
use crate::units::{BlockIndex, BlockOffset, GuestAddr, PageIndex, PageSize};

/// Maximum number of blocks in a table; QEMU guests have tens. Bounds what a peer's list can make us allocate.
pub const MAX_BLOCKS: usize = 4096;

/// A range inside a block, proven to be in bounds by [`RamBlockTable::admit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Landing {
    block: BlockIndex,
    offset: BlockOffset,
    len: u64,
}

impl Landing {
    /// The block.
    pub fn block(self) -> BlockIndex {
        self.block
    }

    /// Distance of the first byte from the start of the block.
    pub fn offset(self) -> BlockOffset {
        self.offset
    }

    /// Length in bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// True for an empty range.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// A part of the range; `None` if it is not inside.
    pub fn part(self, skip: u64, len: u64) -> Option<Self> {
        let end = skip.checked_add(len).filter(|end| *end <= self.len)?;
        Some(Self { block: self.block, offset: BlockOffset(self.offset.0 + end - len), len })
    }

    /// The pages the range touches.
    pub fn run(self, page: PageSize) -> PageRun {
        let first = page.page_of(self.offset);
        let end = page.pages_in(self.offset.0 + self.len);
        PageRun { block: self.block, first, pages: end - first.0 }
    }
}

/// Why a range is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The name is not in the table.
    #[error("no RAM block is called {name:?}; both ends must be started with the same memory")]
    UnknownBlock {
        /// The requested name.
        name: String,
    },
    /// The index is not in the table.
    #[error("there is no RAM block number {index} (there are {blocks})")]
    UnknownIndex {
        /// The requested index.
        index: u32,
        /// Blocks in the table.
        blocks: u32,
    },
    /// The range ends after the end of the block.
    #[error("RAM block {block}: {len} bytes at {offset} end beyond the block ({used_length} bytes)")]
    OutOfBlock {
        /// The block.
        block: BlockName,
        /// Start of the range.
        offset: BlockOffset,
        /// Length of the range in bytes.
        len: u64,
        /// Bytes the block has.
        used_length: u64,
    },
    /// The block is shared by both ends: its pages must not be sent.
    #[error(
        "received a page at {offset} of RAM block {block}, which both ends share (x-ignore-shared, or passed as it is)"
    )]
    Ignored {
        /// The block.
        block: BlockName,
        /// Start of the range.
        offset: BlockOffset,
    },
}

/// Why blocks do not make a table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// Two blocks have one name.
    #[error("two RAM blocks are called {name:?}")]
    Duplicate {
        /// The name.
        name: BlockName,
    },
    /// A length is zero, not a multiple of the target page, or larger than the maximum.
    #[error(
        "RAM block {name:?}: length {used_length} (maximum {max_length}) must be a non-zero multiple of {page} up to the maximum"
    )]
    Length {
        /// The block.
        name: BlockName,
        /// Bytes in use.
        used_length: u64,
        /// Bytes it may grow to.
        max_length: u64,
        /// The target page.
        page: PageSize,
    },
    /// The lengths together exceed `u64`.
    #[error("the RAM blocks together exceed 2^64 bytes")]
    TotalOverflow,
    /// More than [`MAX_BLOCKS`].
    #[error("{count} RAM blocks; at most {MAX_BLOCKS} are taken")]
    TooMany {
        /// How many.
        count: usize,
    },
}

#[cfg(test)]
thread_local! {
    /// Calls of [`RamBlockTable::admit`] by this thread: bounds are checked once a run.
    pub(crate) static ADMISSIONS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// The blocks of a guest in the order of the stream's block list.
#[derive(Clone, Debug)]
pub struct RamBlockTable {
    page: PageSize,
    blocks: Vec<RamBlock>,
    by_name: HashMap<BlockName, BlockIndex>,
    total: u64,
}

impl RamBlockTable {
    /// Checks names and lengths. `page` is the target page, 4 KiB on x86.
    ///
    /// # Errors
    /// [`TableError`] for duplicate names, bad lengths, and more than [`MAX_BLOCKS`] blocks.
    pub fn new(page: PageSize, blocks: Vec<RamBlock>) -> Result<Self, TableError> {
        if blocks.len() > MAX_BLOCKS {
            return Err(TableError::TooMany { count: blocks.len() });
        }
        let mut by_name = HashMap::with_capacity(blocks.len());
        let mut total = 0u64;
        for (index, block) in blocks.iter().enumerate() {
            let in_pages = page.divides(block.used_length) && page.divides(block.max_length);
            if block.used_length == 0 || block.used_length > block.max_length || !in_pages {
                return Err(TableError::Length {
                    name: block.name.clone(),
                    used_length: block.used_length,
                    max_length: block.max_length,
                    page,
                });
            }
            total = total.checked_add(block.used_length).ok_or(TableError::TotalOverflow)?;
            if by_name.insert(block.name.clone(), BlockIndex(index as u32)).is_some() {
                return Err(TableError::Duplicate { name: block.name.clone() });
            }
        }
        Ok(Self { page, blocks, by_name, total })
    }

    /// The target page: the unit of bitmaps and of records on the wire.
    pub fn page(&self) -> PageSize {
        self.page
    }

    /// All blocks.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// The block with an index.
    pub fn get(&self, index: BlockIndex) -> Option<&RamBlock> {
        self.blocks.get(index.as_usize())
    }

    /// Index of the block called `name`.
    ///
    /// # Errors
    /// [`Refusal::UnknownBlock`].
    pub fn find(&self, name: &str) -> Result<BlockIndex, Refusal> {
        self.by_name.get(name).copied().ok_or_else(|| Refusal::UnknownBlock { name: name.to_owned() })
    }

    /// The block and offset of a guest-physical address.
    pub fn find_addr(&self, addr: GuestAddr) -> Option<(BlockIndex, BlockOffset)> {
        self.blocks.iter().enumerate().find_map(|(index, block)| {
            let offset = addr.0.checked_sub(block.guest_addr?.0)?;
            (offset < block.used_length).then_some((BlockIndex(index as u32), BlockOffset(offset)))
        })
    }

    /// Sum of the used lengths in bytes, ignored blocks included, as the stream announces it.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes of the blocks whose pages are sent.
    pub fn travelling(&self) -> u64 {
        self.blocks.iter().filter(|b| !b.flags.ignored).map(|b| b.used_length).sum()
    }

    /// Target pages of a block.
    pub fn pages_of(&self, block: &RamBlock) -> u64 {
        self.page.pages_in(block.used_length)
    }

    /// Proves that `len` bytes at `offset` lie inside `block` and may be sent.
    ///
    /// # Errors
    /// [`Refusal`], which names the block and the range.
    pub fn admit(&self, block: BlockIndex, offset: BlockOffset, len: u64) -> Result<Landing, Refusal> {
        #[cfg(test)]
        ADMISSIONS.with(|count| count.set(count.get() + 1));
        let Some(ram) = self.get(block) else {
            return Err(Refusal::UnknownIndex { index: block.0, blocks: self.blocks.len() as u32 });
        };
        if ram.flags.ignored {
            return Err(Refusal::Ignored { block: ram.name.clone(), offset });
        }
        match offset.0.checked_add(len) {
            Some(end) if end <= ram.used_length => Ok(Landing { block, offset, len }),
            _ => Err(Refusal::OutOfBlock {
                block: ram.name.clone(),
                offset,
                len,
                used_length: ram.used_length,
            }),
        }
    }

    /// Proves a run of pages.
    ///
    /// # Errors
    /// [`Refusal`], as [`admit`](Self::admit).
    pub fn admit_run(&self, run: PageRun) -> Result<Landing, Refusal> {
        let offset = run.offset(self.page).unwrap_or(BlockOffset(u64::MAX));
        self.admit(run.block, offset, run.bytes(self.page).unwrap_or(u64::MAX))
    }

    /// The whole of a block as a run.
    pub fn whole(&self, index: BlockIndex) -> Option<PageRun> {
        let pages = self.pages_of(self.get(index)?);
        Some(PageRun { block: index, first: PageIndex(0), pages })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn block(name: &str, length: u64) -> RamBlock {
        RamBlock::new(BlockName::new(name).unwrap(), length)
    }

    #[test]
    fn a_table_refuses_what_does_not_make_one() {
        let page = PageSize::SIZE_4K;
        let new = |blocks| RamBlockTable::new(page, blocks).map(|_| ());
        assert!(matches!(new(vec![block("a", 0)]), Err(TableError::Length { .. })));
        assert!(matches!(new(vec![block("a", 4097)]), Err(TableError::Length { .. })));
        let twice = vec![block("a", 4096), block("a", 4096)];
        assert!(matches!(new(twice), Err(TableError::Duplicate { .. })));
        let huge = vec![block("a", 1 << 63), block("b", 1 << 63)];
        assert!(matches!(new(huge), Err(TableError::TotalOverflow)));
        let many = (0..=MAX_BLOCKS).map(|i| block(&i.to_string(), 4096)).collect();
        assert!(matches!(new(many), Err(TableError::TooMany { .. })));
        assert!(BlockName::new("").is_err() && BlockName::new(&"x".repeat(256)).is_err());
    }

    #[test]
    fn admit_proves_bounds_or_says_why_not() {
        let mut shared = block("shared", 4096);
        shared.flags.ignored = true;
        shared.guest_addr = Some(GuestAddr(0x10000));
        let table = RamBlockTable::new(PageSize::SIZE_4K, vec![block("ram", 8192), shared]).unwrap();
        let admit = |block, offset, len| table.admit(BlockIndex(block), BlockOffset(offset), len);
        assert_eq!(admit(0, 4096, 4096).unwrap().run(table.page()).first, PageIndex(1));
        assert!(matches!(admit(0, 4096, 4097), Err(Refusal::OutOfBlock { .. })));
        assert!(matches!(admit(0, u64::MAX, 2), Err(Refusal::OutOfBlock { .. })));
        assert!(matches!(admit(1, 0, 4096), Err(Refusal::Ignored { .. })));
        assert!(matches!(admit(2, 0, 1), Err(Refusal::UnknownIndex { index: 2, blocks: 2 })));
        assert!(matches!(table.find("nope"), Err(Refusal::UnknownBlock { .. })));
        assert_eq!(table.find_addr(GuestAddr(0x10fff)), Some((BlockIndex(1), BlockOffset(0xfff))));
        assert_eq!(table.find_addr(GuestAddr(0x11000)), None);
        assert_eq!((table.total(), table.travelling()), (12288, 8192));
    }
}
