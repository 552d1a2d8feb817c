//! Memory that a guest has not plugged (virtio-mem): it is neither read nor sent.

use super::{DirtyError, DirtySource, SoftwareBitmap};
use crate::ram::{AtomicBitmap, PageBitmap, PageRun, RamBlockTable};
use crate::units::{BlockIndex, PageIndex};

/// Reports which memory is unplugged: its contents are not needed, and reading it could allocate memory.
///
/// It is called when a migration starts and after each read of the dirty logs, on the migration's thread. An unplug
/// takes effect at the next sync: its pages may be read until then. A VMM that can't allow this refuses to unplug while
/// a migration runs, as QEMU's virtio-mem does.
///
/// Memory that was unplugged at the last sync and is not at this one counts as dirty. A range that was unplugged and
/// plugged again between two syncs is not detected here: a VMM that allows this must mark the range in a dirty source
/// after it is plugged. [`PlugMap`] does so.
pub trait DiscardManager: Send + Sync {
    /// Calls `found` for every unplugged run of `block`, in any order and only with whole pages.
    fn unplugged(&self, block: BlockIndex, found: &mut dyn FnMut(PageRun));
}

/// Which pages are unplugged, as a device reports it from any thread. Pass it to a migration both as its
/// [`DiscardManager`] and as one of its dirty sources.
#[derive(Debug)]
pub struct PlugMap {
    unplugged: Vec<AtomicBitmap>,
    plugged_again: SoftwareBitmap,
}

impl PlugMap {
    /// All memory is plugged.
    pub fn new(table: &RamBlockTable) -> Self {
        let blocks = table.blocks().iter().map(|block| AtomicBitmap::new(table.pages_of(block)));
        Self { unplugged: blocks.collect(), plugged_again: SoftwareBitmap::new(table) }
    }

    /// The pages of `run` are not needed from here on.
    pub fn unplug(&self, run: PageRun) {
        if let Some(map) = self.unplugged.get(run.block.as_usize()) {
            map.set(run.first, run.pages);
        }
    }

    /// The pages of `run` are plugged, and are the guest's once this returns.
    pub fn plug(&self, run: PageRun) {
        if let Some(map) = self.unplugged.get(run.block.as_usize()) {
            map.clear(run.first, run.pages);
        }
        self.plugged_again.mark_run(run);
    }

    /// True if `page` of `block` is unplugged.
    pub fn is_unplugged(&self, block: BlockIndex, page: PageIndex) -> bool {
        self.unplugged.get(block.as_usize()).is_some_and(|map| map.get(page))
    }
}

impl DiscardManager for PlugMap {
    fn unplugged(&self, block: BlockIndex, found: &mut dyn FnMut(PageRun)) {
        let Some(map) = self.unplugged.get(block.as_usize()) else { return };
        let mut now = PageBitmap::new(map.len());
        map.copy_into(&mut now);
        let mut from = PageIndex(0);
        while let Some(run) = now.next_run(from, u64::MAX) {
            from = PageIndex(run.end);
            found(PageRun { block, first: PageIndex(run.start), pages: run.end - run.start });
        }
    }
}

impl DirtySource for PlugMap {
    fn name(&self) -> &'static str {
        "plugged"
    }

    fn probe(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn start(&self) -> Result<(), DirtyError> {
        self.plugged_again.start()
    }

    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        self.plugged_again.sync_into(block, into)
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.plugged_again.stop()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::{BlockName, RamBlock};
    use crate::units::PageSize;

    #[test]
    fn what_is_plugged_again_is_found_dirty() {
        let block = RamBlock::new(BlockName::new("ram").unwrap(), 200 * 4096);
        let table = RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap();
        let run = |first, pages| PageRun { block: BlockIndex(0), first: PageIndex(first), pages };
        let map = PlugMap::new(&table);
        let unplugged = || {
            let mut found = Vec::new();
            map.unplugged(BlockIndex(0), &mut |run| found.push(run));
            found
        };
        map.start().unwrap();
        map.unplug(run(60, 100));
        map.plug(run(70, 60));
        assert_eq!(unplugged(), [run(60, 10), run(130, 30)]);
        assert!(
            map.is_unplugged(BlockIndex(0), PageIndex(69)) && !map.is_unplugged(BlockIndex(0), PageIndex(70))
        );
        let mut dirty = PageBitmap::new(200);
        map.sync_into(BlockIndex(0), &mut dirty).unwrap();
        assert_eq!((dirty.count(), dirty.next_run(PageIndex(0), 200)), (60, Some(70..130)));
        assert!(!map.is_unplugged(BlockIndex(7), PageIndex(0)));
    }
}
