//! Pages of the file, read one by one in any order.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::layers::Layers;
use crate::ram::PageBitmap;
use crate::stream::qemu::mapped_stream::Places;
use crate::transport::PageSupply;
use crate::units::BlockIndex;

/// The pages in a mapped-ram file, by the blocks of the guest that they belong to.
pub struct MappedPages {
    pub(super) layers: Arc<Layers>,
    pub(super) name: String,
    /// Where the guest's blocks stand in the file's list; `None` for one that is not in the file.
    pub(super) blocks: Vec<Option<(usize, Places)>>,
}

impl MappedPages {
    /// The pages of a block that are in the file.
    pub fn present(&self, block: BlockIndex) -> Option<&PageBitmap> {
        let (own, _) = self.blocks.get(block.as_usize())?.as_ref()?;
        self.layers.present().get(*own)
    }

    /// Length of a block in the file, in bytes.
    pub fn len(&self, block: BlockIndex) -> Option<u64> {
        self.blocks.get(block.as_usize())?.as_ref().map(|(_, places)| places.block.used_length)
    }

    /// The files that they are in.
    pub(in crate::transport) fn files(&self) -> impl Iterator<Item = &File> {
        self.layers.files().map(|file| file.file())
    }

    /// The blocks that it was made for, including those that are not in the file.
    pub fn blocks(&self) -> impl Iterator<Item = BlockIndex> {
        (0..self.blocks.len() as u32).map(BlockIndex)
    }
}

impl PageSupply for MappedPages {
    /// The offsets of pages that are not in the file may hold old bytes: these are not read.
    fn read(&self, block: BlockIndex, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let Some(Some((own, places))) = self.blocks.get(block.as_usize()) else {
            into.fill(0);
            return Ok(());
        };
        let page = places.header.page_size.bytes();
        let (mut at, end) = (offset, offset.saturating_add(into.len() as u64));
        while at < end {
            let run = self.layers.next_run(*own, at / page, u64::MAX);
            let bytes = run
                .as_ref()
                .map_or(end..end, |(_, run, _)| run.start.saturating_mul(page)..run.end.saturating_mul(page));
            let (hole_end, data_end) = (bytes.start.clamp(at, end), bytes.end.clamp(at, end));
            let part = |from: u64, to: u64| (from - offset) as usize..(to - offset) as usize;
            into[part(at, hole_end)].fill(0);
            if let Some((file, _, start)) = run.filter(|_| data_end > hole_end) {
                file.read_all(&mut into[part(hole_end, data_end)], start + (hole_end - bytes.start))?;
            }
            at = data_end.max(hole_end);
        }
        Ok(())
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}
