//! Guest RAM that is mapped into this process, block by block.

use std::sync::OnceLock;

use super::{GuestError, GuestMemory, LayoutChange};
use crate::ram::{Landing, RamBlock, RamBlockTable};
use crate::sys::{HostRegion, HostSpan, Mapping, OutOfRegion, discard, discard_in};
use crate::units::{BlockIndex, PageSize};

/// The memory of a guest: its blocks and the mapped region of each.
///
/// ```
/// use ramwire::guest::{GuestMemory, MappedGuest};
/// use ramwire::ram::{BlockName, RamBlock};
/// use ramwire::sys::Mapping;
/// use ramwire::units::PageSize;
///
/// let ram = Mapping::memfd("ram", 64 << 20)?;
/// let block = RamBlock::new(BlockName::new("ram")?, 64 << 20);
/// let guest = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &ram).build()?;
/// assert_eq!(guest.table().total(), 64 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct MappedGuest {
    table: RamBlockTable,
    regions: Vec<HostRegion>,
    changed: OnceLock<LayoutChange>,
}

/// Collects blocks for a [`MappedGuest`], in the order of the stream's block list.
#[derive(Debug)]
pub struct GuestBuilder {
    page: PageSize,
    blocks: Vec<RamBlock>,
    regions: Vec<HostRegion>,
}

impl GuestBuilder {
    /// Adds a block over memory that the embedder mapped; see [`HostRegion::from_raw`]. The page size of
    /// the region becomes the block's `host_page`.
    #[must_use]
    pub fn region(mut self, mut block: RamBlock, region: HostRegion) -> Self {
        block.host_page = region.page();
        self.blocks.push(block);
        self.regions.push(region);
        self
    }

    /// Adds a block over memory that this library mapped; memory with a backing file is marked as shared.
    #[must_use]
    pub fn mapping(self, mut block: RamBlock, mapping: &Mapping) -> Self {
        block.flags.shared |= mapping.backing().is_some();
        self.region(block, mapping.region().clone())
    }

    /// Checks the blocks and that each region holds its block's `max_length`.
    ///
    /// # Errors
    /// [`GuestError::Table`], [`GuestError::Unmapped`].
    pub fn build(self) -> Result<MappedGuest, GuestError> {
        let table = RamBlockTable::new(self.page, self.blocks)?;
        for (block, region) in table.blocks().iter().zip(&self.regions) {
            region
                .span(0, block.max_length)
                .map_err(|source| GuestError::Unmapped { block: block.name.to_string(), source })?;
        }
        Ok(MappedGuest { table, regions: self.regions, changed: OnceLock::new() })
    }
}

impl MappedGuest {
    /// A guest without blocks yet. `page` is the target page: the unit of dirty bits and of the stream's
    /// page records, 4 KiB on x86.
    pub fn builder(page: PageSize) -> GuestBuilder {
        GuestBuilder { page, blocks: Vec::new(), regions: Vec::new() }
    }

    /// To be called when the VMM has resized, added or removed a block, which this object does not know: a running
    /// migration of it ends, and the next one needs a new `MappedGuest`. May be called from any thread; the first
    /// change counts. Blocks that are ignored as shared may change.
    pub fn layout_changed(&self, change: LayoutChange) {
        let (LayoutChange::Resized { block, .. }
        | LayoutChange::Added { block }
        | LayoutChange::Lost { block, .. }
        | LayoutChange::Removed { block }) = &change;
        let found = self.table.find(block.as_str()).ok().and_then(|index| self.table.get(index));
        if !found.is_some_and(|block| block.flags.ignored) {
            let _ = self.changed.set(change);
        }
    }

    /// The region of a block.
    pub fn region(&self, block: BlockIndex) -> Option<&HostRegion> {
        self.regions.get(block.as_usize())
    }

    /// Every block with its index and region.
    pub fn regions(&self) -> impl Iterator<Item = (BlockIndex, &RamBlock, &HostRegion)> {
        let blocks = self.table.blocks().iter().zip(&self.regions);
        blocks.enumerate().map(|(index, (block, region))| (BlockIndex(index as u32), block, region))
    }

    fn name(&self, block: BlockIndex) -> String {
        self.table.get(block).map_or_else(|| format!("number {}", block.0), |b| b.name.to_string())
    }
}

impl GuestMemory for MappedGuest {
    fn table(&self) -> &RamBlockTable {
        &self.table
    }

    fn span(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
        let (offset, len) = (landing.offset().0, landing.len());
        let span = match self.region(landing.block()) {
            Some(region) => region.span(offset, len),
            None => Err(OutOfRegion { offset, len, region_len: 0 }),
        };
        span.map_err(|source| GuestError::Unmapped { block: self.name(landing.block()), source })
    }

    fn region(&self, block: BlockIndex) -> Option<HostRegion> {
        Self::region(self, block).cloned()
    }

    fn layout_change(&self) -> Option<LayoutChange> {
        let told = self.changed.get().cloned();
        told.or_else(|| {
            let blocks = self.table.blocks().iter().zip(&self.regions);
            let mut used = blocks.filter(|(block, _)| !block.flags.ignored);
            used.find_map(|(block, region)| {
                let loss = region.loss()?;
                Some(LayoutChange::Lost { block: block.name.clone(), loss })
            })
        })
    }

    fn discard(&self, landing: Landing) -> Result<(), GuestError> {
        let span = self.span(landing)?;
        let given = match self.region(landing.block()) {
            Some(region) => discard_in(region, span),
            None => discard(span, self.table.page()),
        };
        given.map_err(|source| GuestError::Kernel {
            block: self.name(landing.block()),
            what: "giving pages back",
            remedy: "unlock the memory (munlock) or leave it in place",
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::BlockName;
    use crate::sys::testing::has_holes;
    use crate::units::BlockOffset;

    fn block(name: &str, length: u64) -> RamBlock {
        RamBlock::new(BlockName::new(name).unwrap(), length)
    }

    #[test]
    fn spans_of_two_blocks_are_their_own_memory() {
        let (ram, rom) = (Mapping::anonymous(16384).unwrap(), Mapping::memfd("rom", 8192).unwrap());
        let guest = MappedGuest::builder(PageSize::SIZE_4K)
            .mapping(block("ram", 16384), &ram)
            .mapping(block("rom", 8192), &rom)
            .build()
            .unwrap();
        let table = guest.table();
        let shared: Vec<bool> = table.blocks().iter().map(|block| block.flags.shared).collect();
        assert_eq!(shared, [false, true]);
        let landing = |block, offset| table.admit(BlockIndex(block), BlockOffset(offset), 4096).unwrap();
        guest.span(landing(1, 4096)).unwrap().copy_from(b"abc");
        let read = |mapping: &Mapping| {
            let mut out = [0; 3];
            mapping.region().span(4096, 3).unwrap().copy_to(&mut out);
            out
        };
        assert_eq!((read(&ram), read(&rom)), ([0; 3], *b"abc"));
        if has_holes() {
            guest.discard(landing(1, 4096)).unwrap();
            assert_eq!(read(&rom), [0; 3]);
        }
    }

    #[test]
    fn a_block_longer_than_its_memory_is_refused() {
        let ram = Mapping::anonymous(8192).unwrap();
        let build = |block| MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &ram).build();
        assert!(matches!(build(block("ram", 12288)), Err(GuestError::Unmapped { .. })));
        let mut grows = block("ram", 4096);
        grows.max_length = 12288;
        let error = crate::error::Chain(&build(grows).unwrap_err()).to_string();
        assert!(error.contains("RAM block ram") && error.contains("12288 bytes"), "{error}");
        assert!(matches!(build(block("ram", 100)), Err(GuestError::Table(_))));
    }

    #[test]
    fn a_landing_of_another_table_finds_no_memory() {
        let ram = Mapping::anonymous(8192).unwrap();
        let small = MappedGuest::builder(PageSize::SIZE_4K).mapping(block("a", 8192), &ram).build().unwrap();
        let other = RamBlockTable::new(PageSize::SIZE_4K, vec![block("a", 65536), block("b", 4096)]).unwrap();
        for (index, offset) in [(0, 32768), (1, 0)] {
            let landing = other.admit(BlockIndex(index), BlockOffset(offset), 4096).unwrap();
            assert!(matches!(small.span(landing), Err(GuestError::Unmapped { .. })));
            assert!(small.discard(landing).is_err());
        }
    }
}
