//! Dirty pages from another process, through a log in shared memory: that of a vhost-user backend, or any other in its
//! format.
//!
//! # Source
//! vhost-user protocol, "Migration": one bit for each 4 KiB page of guest physical address space (VHOST_LOG_PAGE
//! is 0x1000), set by an atomic operation after the page was written; bit `n % 8` of byte `n / 8`.

use super::{DirtyError, DirtySource, GuestMemory};
use crate::ram::PageBitmap;
use crate::sys::{HostRegion, SharedBitmap};
use crate::units::{BlockIndex, PageSize};

const NAME: &str = "vhost-log";
const LOG_PAGE: PageSize = PageSize::SIZE_4K;

/// Dirty source over a log that another process sets, bit by guest physical page.
#[derive(Debug)]
pub struct VhostLog {
    log: Option<SharedBitmap>,
    /// For each block its name and first and end bit; `None` if the block has no guest physical address.
    blocks: Vec<Option<(String, u64, u64)>>,
    page: PageSize,
}

impl VhostLog {
    /// Uses the log that was passed to the backend (`VHOST_USER_SET_LOG_BASE`). It does not cover blocks without a
    /// guest physical address.
    pub fn new(guest: &dyn GuestMemory, log: HostRegion) -> Self {
        let blocks = guest.table().blocks().iter().map(|block| {
            let first = block.guest_addr?.0 >> LOG_PAGE.shift();
            Some((block.name.to_string(), first, first + LOG_PAGE.pages_in(block.used_length)))
        });
        Self { blocks: blocks.collect(), log: SharedBitmap::new(log), page: guest.table().page() }
    }

    /// Bytes a log needs for all of `guest`, in whole 64-bit words.
    pub fn bytes_for(guest: &dyn GuestMemory) -> u64 {
        let ends = guest.table().blocks().iter().filter_map(|b| b.guest_addr?.0.checked_add(b.used_length));
        LOG_PAGE.pages_in(ends.max().unwrap_or(0)).div_ceil(64) * 8
    }

    fn log(&self) -> Result<&SharedBitmap, DirtyError> {
        self.log.as_ref().ok_or_else(|| {
            DirtyError::unsupported(NAME, "the log must start at a multiple of 8 bytes".to_owned())
        })
    }
}

impl DirtySource for VhostLog {
    fn name(&self) -> &'static str {
        NAME
    }

    fn probe(&self) -> Result<(), DirtyError> {
        let bits = self.log()?.len();
        for (block, _, end) in self.blocks.iter().flatten() {
            if *end > bits {
                return Err(DirtyError::unsupported(
                    NAME,
                    format!("RAM block {block} ends at bit {end}, the log at {bits}"),
                ));
            }
        }
        match self.page {
            LOG_PAGE => Ok(()),
            page => Err(DirtyError::unsupported(
                NAME,
                format!("the log counts {LOG_PAGE} pages, the guest {page} pages"),
            )),
        }
    }

    fn start(&self) -> Result<(), DirtyError> {
        self.probe()?;
        // Earlier bits belong to the first round, which sends every page.
        self.log()?.take(0..u64::MAX, |_, _| {});
        Ok(())
    }

    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        let Some(Some((_, first, end))) = self.blocks.get(block.as_usize()) else { return Ok(()) };
        self.log()?.take(*first..*end, |word_at, mut bits| {
            while bits != 0 {
                let start = bits.trailing_zeros();
                let run = (bits >> start).trailing_ones();
                let page = word_at + u64::from(start) - first;
                into.set_range(page..page + u64::from(run));
                // A run may end at the word's end: a shift by 64 would overflow.
                bits &= u64::MAX.checked_shl(start + run).unwrap_or(0);
            }
        });
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;
    use crate::guest::MappedGuest;
    use crate::guest::race::{race, store};
    use crate::ram::{BlockName, RamBlock};
    use crate::sys::Mapping;
    use crate::units::{GuestAddr, PageIndex};

    /// Two blocks, at odd positions of the guest's address space.
    fn guest() -> MappedGuest {
        let block = |name, at: u64, pages: u64| {
            let block = RamBlock::new(BlockName::new(name).unwrap(), pages * 4096);
            RamBlock { guest_addr: Some(GuestAddr(at)), ..block }
        };
        let (low, high) = (Mapping::anonymous(100 * 4096).unwrap(), Mapping::memfd("high", 4 << 20).unwrap());
        MappedGuest::builder(PageSize::SIZE_4K)
            .mapping(block("low", 0x3000, 100), &low)
            .mapping(block("high", 0x10_1000, 1024), &high)
            .build()
            .unwrap()
    }

    fn log_for(guest: &MappedGuest) -> (SharedBitmap, VhostLog) {
        let memory = Mapping::memfd("log", VhostLog::bytes_for(guest)).unwrap();
        let (fd, _) = memory.backing().unwrap();
        // The backend maps the log itself.
        let theirs = Mapping::file(fd.try_clone_to_owned().unwrap(), 0, memory.region().len()).unwrap();
        let theirs = SharedBitmap::new(theirs.region().clone()).unwrap();
        (theirs, VhostLog::new(guest, memory.region().clone()))
    }

    #[test]
    fn a_bit_by_guest_address_becomes_a_page_of_its_block() {
        let guest = guest();
        let (backend, log) = log_for(&guest);
        backend.set(5..6);
        log.start().unwrap();
        for bits in [0x3..0x4, 0x3f..0x42, 0x66..0x67, 0x67..0x68, 0x101..0x102, 0x140..0x180, 0x500..0x501] {
            backend.set(bits);
        }
        let synced = |block, len| {
            let mut map = PageBitmap::new(len);
            log.sync_into(BlockIndex(block), &mut map).unwrap();
            (0..len).filter(|page| map.get(PageIndex(*page))).collect::<Vec<_>>()
        };
        // Bit 0x67 lies between the blocks.
        assert_eq!(synced(0, 100), [0, 0x3c, 0x3d, 0x3e, 0x63]);
        let high: Vec<u64> = [0].into_iter().chain(0x3f..0x7f).chain([0x3ff]).collect();
        assert_eq!(synced(1, 1024), high);
        assert_eq!((synced(0, 100).len(), synced(1, 1024).len()), (0, 0));
    }

    #[test]
    fn racing_writers_that_log_after_the_write_lose_nothing() {
        let guest = guest();
        let (backend, log) = log_for(&guest);
        let starts = [0x3, 0x101];
        let source: Arc<dyn DirtySource> = Arc::new(log);
        let write = |run: crate::ram::PageRun, stamp| {
            store(&guest, run, stamp);
            let bit = starts[run.block.as_usize()] + run.first.0;
            backend.set(bit..bit + 1);
        };
        let outcome = race(&guest, &[source], 4, &write).unwrap();
        assert!(outcome.lost == 0 && outcome.reported > 0, "{outcome:?}");
    }

    #[test]
    fn a_log_that_is_too_short_is_refused() {
        let guest = guest();
        let short = Mapping::memfd("log", VhostLog::bytes_for(&guest) - 8).unwrap();
        let error = VhostLog::new(&guest, short.region().clone()).start().unwrap_err().to_string();
        assert!(error.contains("RAM block high ends at bit"), "{error}");
    }
}
