//! Pages of the file, read one by one in any order.

use std::io;
use std::sync::Arc;

use super::file::MappedFile;
use crate::ram::PageBitmap;
use crate::stream::qemu::mapped_stream::Places;
use crate::transport::PageSupply;
use crate::units::{BlockIndex, PageIndex};

/// The pages in a mapped-ram file, by the blocks of the guest that they belong to.
pub struct MappedPages {
    pub(super) file: Arc<MappedFile>,
    /// The guest's blocks; `None` for one that is not in the file.
    pub(super) blocks: Vec<Option<(Places, PageBitmap)>>,
}

impl MappedPages {
    /// The pages of a block that are in the file.
    pub fn present(&self, block: BlockIndex) -> Option<&PageBitmap> {
        self.blocks.get(block.as_usize())?.as_ref().map(|(_, present)| present)
    }

    /// Length of a block in the file, in bytes.
    pub fn len(&self, block: BlockIndex) -> Option<u64> {
        self.blocks.get(block.as_usize())?.as_ref().map(|(places, _)| places.block.used_length)
    }

    /// The blocks that it was made for, including those that are not in the file.
    pub fn blocks(&self) -> impl Iterator<Item = BlockIndex> {
        (0..self.blocks.len() as u32).map(BlockIndex)
    }
}

impl PageSupply for MappedPages {
    /// The offsets of pages that are not in the file may hold old bytes: these are not read.
    fn read(&self, block: BlockIndex, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let Some(Some((places, present))) = self.blocks.get(block.as_usize()) else {
            into.fill(0);
            return Ok(());
        };
        let page = places.header.page_size.bytes();
        let (mut at, end) = (offset, offset.saturating_add(into.len() as u64));
        while at < end {
            let run = present.next_run(PageIndex(at / page), u64::MAX);
            let run =
                run.map_or(end..end, |run| run.start.saturating_mul(page)..run.end.saturating_mul(page));
            let (hole_end, data_end) = (run.start.clamp(at, end), run.end.clamp(at, end));
            let part = |from: u64, to: u64| (from - offset) as usize..(to - offset) as usize;
            into[part(at, hole_end)].fill(0);
            if data_end > hole_end {
                self.file
                    .read_all(&mut into[part(hole_end, data_end)], places.header.pages_offset + hole_end)?;
            }
            at = data_end.max(hole_end);
        }
        Ok(())
    }

    fn name(&self) -> String {
        self.file.name()
    }
}
