//! RAM blocks over the guest memory of rust-vmm's `vm-memory`.

use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::{GuestBuilder, GuestError, MappedGuest};
use crate::ram::{BlockError, BlockName, RamBlock};
use crate::sys::HostRegion;
use crate::units::{GuestAddr, PageSize};

impl GuestBuilder {
    /// Adds a block over a region of `vm-memory`, at the region's guest address. The memory stays mapped as long as the
    /// built guest, even if the region is removed from its collection.
    ///
    /// Writes of the VMM itself through `vm-memory` need a dirty source of their own, in addition to those of the
    /// vCPUs.
    ///
    /// # Errors
    /// [`GuestError::Kernel`] for memory that is not mapped readable and writable.
    pub fn vm_memory_region<B: Bitmap + Send + Sync + 'static>(
        self,
        name: BlockName,
        region: &GuestRegionMmap<B>,
    ) -> Result<Self, GuestError> {
        let memory = HostRegion::of_vm_memory(region).map_err(|source| GuestError::Kernel {
            block: name.to_string(),
            what: "taking a region of vm-memory",
            remedy: "map it readable and writable",
            source,
        })?;
        let mut block = RamBlock::new(name, region.len());
        block.guest_addr = Some(GuestAddr(region.start_addr().raw_value()));
        block.flags.shared = region.file_offset().is_some() && region.flags() & libc::MAP_SHARED != 0;
        Ok(self.region(block, memory))
    }
}

impl MappedGuest {
    /// A block for each region of `memory`, in the order of guest addresses; `name` returns the name of each, which the
    /// other end must use too.
    ///
    /// ```
    /// use ramwire::guest::{GuestMemory, MappedGuest};
    /// use ramwire::ram::BlockName;
    /// use ramwire::units::PageSize;
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    ///
    /// let ranges = [(GuestAddress(0), 8 << 20), (GuestAddress(1 << 32), 4 << 20)];
    /// let memory = GuestMemoryMmap::<()>::from_ranges(&ranges)?;
    /// let name = |index| BlockName::new(&format!("ram{index}"));
    /// let guest = MappedGuest::of_vm_memory(&memory, PageSize::SIZE_4K, name)?;
    /// assert_eq!(guest.table().total(), 12 << 20);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// An error of a name; [`GuestError`] for memory that can't be used.
    pub fn of_vm_memory<B: Bitmap + Send + Sync + 'static>(
        memory: &GuestMemoryMmap<B>,
        page: PageSize,
        mut name: impl FnMut(usize) -> Result<BlockName, BlockError>,
    ) -> Result<Self, GuestError> {
        let mut builder = Self::builder(page);
        for (index, region) in memory.iter().enumerate() {
            builder = builder.vm_memory_region(name(index)?, region)?;
        }
        builder.build()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, FileOffset, GuestAddress};

    use super::*;
    use crate::guest::{DirtySource, GuestMemory, WrittenPages};
    use crate::ram::PageBitmap;
    use crate::sys::testing::has_userfaultfd;
    use crate::units::{BlockIndex, BlockOffset};

    fn name(index: usize) -> Result<BlockName, BlockError> {
        BlockName::new(&format!("ram{index}"))
    }

    /// One region of anonymous memory, one of a file from its second page on.
    fn memory() -> GuestMemoryMmap {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(9 * 4096).unwrap();
        let ranges = [
            (GuestAddress(0), 4 * 4096, None),
            (GuestAddress(1 << 32), 8 * 4096, Some(FileOffset::new(file, 4096))),
        ];
        GuestMemoryMmap::from_ranges_with_files(&ranges).unwrap()
    }

    #[test]
    fn regions_become_blocks_over_the_same_memory() {
        let memory = memory();
        let guest = MappedGuest::of_vm_memory(&memory, PageSize::SIZE_4K, name).unwrap();
        let blocks = guest.table().blocks();
        let seen: Vec<_> = blocks
            .iter()
            .map(|block| (block.name.as_str(), block.used_length, block.guest_addr, block.flags.shared))
            .collect();
        let at = |address| Some(GuestAddr(address));
        assert_eq!(seen, [("ram0", 16384, at(0), false), ("ram1", 32768, at(1 << 32), true)]);
        // Written through one, read through the other; the memory outlives the collection.
        memory.write_slice(b"from the VMM", GuestAddress((1 << 32) + 4096 + 7)).unwrap();
        let landing = guest.table().admit(BlockIndex(1), BlockOffset(4096 + 7), 12).unwrap();
        let span = guest.span(landing).unwrap();
        let mut read = [0; 12];
        span.copy_to(&mut read);
        assert_eq!(&read, b"from the VMM");
        span.copy_from(b"from ramwire");
        memory.read_slice(&mut read, GuestAddress((1 << 32) + 4096 + 7)).unwrap();
        assert_eq!(&read, b"from ramwire");
        drop(memory);
        span.copy_to(&mut read);
        assert_eq!(&read, b"from ramwire");
        let mut sparse = [0; 12];
        assert!(guest.region(BlockIndex(1)).unwrap().read_sparse(4096 + 7, &mut sparse));
        assert_eq!(sparse, read, "the file is read where the region begins in it");
    }

    #[test]
    fn what_the_vmm_writes_through_it_is_seen_by_write_protection() {
        if !has_userfaultfd() {
            return;
        }
        let memory = memory();
        let guest = MappedGuest::of_vm_memory(&memory, PageSize::SIZE_4K, name).unwrap();
        let source = WrittenPages::new(&guest);
        source.start().unwrap();
        memory.write_obj(7u64, GuestAddress(3 * 4096)).unwrap();
        let mut map = PageBitmap::new(4);
        source.sync_into(BlockIndex(0), &mut map).unwrap();
        assert_eq!(map.next_run(crate::units::PageIndex(0), 4), Some(3..4));
    }

    #[test]
    fn memory_that_can_not_be_written_is_refused() {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let builder =
            MmapRegionBuilder::<()>::new(4096).with_mmap_prot(libc::PROT_READ).with_mmap_flags(flags);
        let region = GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(0)).unwrap();
        let memory = GuestMemoryMmap::from_arc_regions(vec![Arc::new(region)]).unwrap();
        let error = MappedGuest::of_vm_memory(&memory, PageSize::SIZE_4K, name).unwrap_err().to_string();
        assert!(error.contains("RAM block ram0") && error.contains("readable and writable"), "{error}");
    }
}
