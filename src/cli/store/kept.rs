//! The memory of a stored guest, which lies in files that are to keep it.

use std::sync::Arc;

use ramwire::guest::{GuestError, GuestMemory, LayoutChange, MappedGuest};
use ramwire::ram::{Landing, RamBlockTable};
use ramwire::sys::{HostRegion, HostSpan, page_out};
use ramwire::units::BlockIndex;

/// Memory that is given back to the kernel without a change to its files: to discard it would punch holes into them.
pub struct Kept(Arc<MappedGuest>);

impl Kept {
    pub(super) fn new(memory: &Arc<MappedGuest>) -> Self {
        Self(Arc::clone(memory))
    }
}

impl GuestMemory for Kept {
    fn table(&self) -> &RamBlockTable {
        self.0.table()
    }

    fn span(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
        self.0.span(landing)
    }

    fn region(&self, block: BlockIndex) -> Option<HostRegion> {
        GuestMemory::region(&*self.0, block)
    }

    fn layout_change(&self) -> Option<LayoutChange> {
        self.0.layout_change()
    }

    fn discard(&self, landing: Landing) -> Result<(), GuestError> {
        page_out(self.0.span(landing)?).map_err(|source| GuestError::Kernel {
            block: self.table().get(landing.block()).map_or_else(String::new, |block| block.name.to_string()),
            what: "giving memory back whose file keeps its bytes",
            remedy: "leave --release-ram out, or take Linux 5.4 or later",
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use ramwire::ram::{BlockName, PageRun, RamBlock};
    use ramwire::sys::Mapping;
    use ramwire::units::{PageIndex, PageSize};

    #[test]
    fn a_file_keeps_what_its_memory_is_given_back_for() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * 4096).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4 * 4096], 0).unwrap();
        let mapping = Mapping::file(file.try_clone().unwrap().into(), 0, 4 * 4096).unwrap();
        let block = RamBlock::new(BlockName::new("ram").unwrap(), 4 * 4096);
        let guest = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &mapping).build().unwrap();
        let kept = Kept::new(&Arc::new(guest));
        let run = PageRun { block: BlockIndex(0), first: PageIndex(0), pages: 4 };
        let landing = kept.table().admit_run(run).unwrap();
        kept.discard(landing).unwrap();
        let mut bytes = vec![0; 4 * 4096];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        assert!(bytes == vec![7; 4 * 4096]);
        let mut bytes = vec![0; 4 * 4096];
        kept.span(landing).unwrap().copy_to(&mut bytes);
        assert!(bytes == vec![7; 4 * 4096]);
    }
}
