//! The announced blocks and the current one.

use std::collections::HashMap;

use super::super::super::error::Fault;
use super::super::blocks::{BlockAnnouncement, MAX_BLOCKS};
use super::super::ram::PageAt;
use crate::ram::BlockName;
use crate::units::{BlockIndex, BlockOffset, PageSize};

/// The blocks a source has announced, in its order, and the current block of one channel.
#[derive(Clone, Debug, Default)]
pub struct AnnouncedBlocks {
    blocks: Vec<BlockAnnouncement>,
    by_name: HashMap<BlockName, BlockIndex>,
    current: Option<Current>,
}

/// The current block with the fields that the hot path compares.
#[derive(Clone, Copy, Debug)]
struct Current {
    block: BlockIndex,
    used_length: u64,
}

impl AnnouncedBlocks {
    /// The blocks of `list`.
    ///
    /// # Errors
    ///
    /// [`Fault::DuplicateBlock`], [`Fault::Limit`] for more than [`MAX_BLOCKS`].
    pub fn new(list: Vec<BlockAnnouncement>) -> Result<Self, Fault> {
        let mut blocks = Self::default();
        for block in list {
            blocks.push(block)?;
        }
        Ok(blocks)
    }

    /// Appends a block.
    pub(super) fn push(&mut self, block: BlockAnnouncement) -> Result<BlockIndex, Fault> {
        if self.blocks.len() >= MAX_BLOCKS {
            let (value, limit) = (self.blocks.len() as u64 + 1, MAX_BLOCKS as u64);
            return Err(Fault::Limit { what: "the number of RAM blocks", value, limit });
        }
        let index = BlockIndex(self.blocks.len() as u32);
        if self.by_name.insert(block.name.clone(), index).is_some() {
            return Err(Fault::DuplicateBlock { name: block.name.as_str().into() });
        }
        self.blocks.push(block);
        Ok(index)
    }

    /// The blocks in the order of the stream.
    pub fn as_slice(&self) -> &[BlockAnnouncement] {
        &self.blocks
    }

    /// Position of the block called `name`.
    pub fn find(&self, name: &str) -> Option<BlockIndex> {
        self.by_name.get(name).copied()
    }

    /// Forgets the current block, so that the next record must name one.
    pub fn forget_current(&mut self) {
        self.current = None;
    }

    /// The block and offset that `at` means; its block becomes the current one.
    ///
    /// # Errors
    ///
    /// [`Fault::NoCurrentBlock`], [`Fault::UnknownBlock`], [`Fault::OutsideBlock`].
    #[inline]
    pub fn locate(&mut self, at: PageAt<'_>, page: PageSize) -> Result<(BlockIndex, BlockOffset), Fault> {
        let current = match at.block {
            None => self.current.ok_or(Fault::NoCurrentBlock)?,
            Some(name) => self.name_current(name)?,
        };
        let inside = current.used_length.checked_sub(page.bytes()).is_some_and(|last| at.offset.0 <= last);
        if inside { Ok((current.block, at.offset)) } else { Err(self.outside(current, at.offset)) }
    }

    fn name_current(&mut self, name: &str) -> Result<Current, Fault> {
        let unknown = || Fault::UnknownBlock { name: name.into() };
        let block = self.find(name).ok_or_else(unknown)?;
        let used_length = self.blocks.get(block.as_usize()).ok_or_else(unknown)?.used_length;
        let current = Current { block, used_length };
        self.current = Some(current);
        Ok(current)
    }

    #[cold]
    fn outside(&self, current: Current, offset: BlockOffset) -> Fault {
        let name = self.blocks.get(current.block.as_usize()).map_or("", |block| block.name.as_str());
        Fault::OutsideBlock { block: name.into(), offset, used_length: current.used_length }
    }
}
