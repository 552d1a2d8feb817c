//! Memory of another process that has handed its faults to this one: a VMM that starts a guest of its own from a
//! snapshot.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;

use rustix::event::epoll;

use crate::engine::Waiter;
use crate::ram::{AtomicBitmap, PageRun};
use crate::sys::{
    HandedEvent, HandedFaults, HandedFaultsError, Lock as _, PageContents, Placement, WakeEvent,
};
use crate::units::{BlockIndex, PageIndex, PageSize};

use super::memory::{PagedMemory, PlaceError};

/// The unit in which received pages are recorded.
pub(super) const PAGE: PageSize = PageSize::SIZE_4K;

/// Most regions of one memory.
const MAX_REGIONS: usize = 4096;

/// Addresses of user space end below this.
const MAX_ADDRESS: u64 = 1 << 56;

/// A part of another process's memory, and the position of its contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandedRegion {
    /// Its first address in that process.
    pub address: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Page size of that memory in bytes.
    pub page: u64,
    /// Offset of its contents in the stored memory, in bytes.
    pub offset: u64,
}

/// Memory that can't be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandedError {
    /// There are no regions to serve, or too many.
    #[error("{count} regions of memory were handed over; 1 to {MAX_REGIONS} are served")]
    Count {
        /// How many.
        count: usize,
    },
    /// A region makes no sense.
    #[error("region {index} of the memory that was handed over: its {field} is {value:#x}, {why}")]
    Region {
        /// Which, from 0 on.
        index: usize,
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// What is wrong with it.
        why: String,
    },
    /// The descriptor.
    #[error(transparent)]
    Faults(#[from] HandedFaultsError),
    /// No descriptor is available for waiting, or no memory.
    #[error("waiting for faults can't be set up")]
    Kernel(#[from] io::Error),
}

/// Checks another process's description of its memory, whose stored contents have `stored` bytes.
pub(super) fn checked(regions: &[HandedRegion], stored: u64) -> Result<(), HandedError> {
    if regions.is_empty() || regions.len() > MAX_REGIONS {
        return Err(HandedError::Count { count: regions.len() });
    }
    let mut ranges: Vec<(u64, u64)> = Vec::with_capacity(regions.len());
    for (index, region) in regions.iter().enumerate() {
        let HandedRegion { address, len, page, offset } = *region;
        let refuse = |field, value, why: String| Err(HandedError::Region { index, field, value, why });
        if ![PAGE.bytes(), PageSize::SIZE_2M.bytes()].contains(&page) {
            return refuse("page size", page, "and pages of 4 KiB and 2 MiB are served".into());
        }
        let odd = |value: u64| !value.is_multiple_of(page);
        if len == 0 || odd(len) {
            return refuse("size", len, format!("which is not in whole pages of {page} bytes"));
        }
        if odd(address) {
            return refuse("address", address, format!("which is inside a page of {page} bytes"));
        }
        let Some(end) = address.checked_add(len).filter(|end| *end <= MAX_ADDRESS && address > 0) else {
            return refuse("address", address, format!("where no process has {len} bytes"));
        };
        if !offset.is_multiple_of(PAGE.bytes()) {
            return refuse("offset", offset, "which is inside a page".into());
        }
        if offset.checked_add(len).is_none_or(|end| end > stored) {
            return refuse(
                "offset",
                offset,
                format!("and {len} bytes from there on end beyond the {stored} that are stored"),
            );
        }
        if let Some(other) = ranges.iter().position(|(start, stop)| address < *stop && *start < end) {
            return refuse("address", address, format!("which is in region {other}, too"));
        }
        ranges.push((address, end));
    }
    Ok(())
}

struct Region {
    range: Range<usize>,
    page: PageSize,
    /// Pages that were placed, are zero, or were freed.
    received: AtomicBitmap,
}

/// The memory, as used by the threads that fill it.
///
/// # Required orders
///
/// Reading the event of a removed page and marking the page is one atomic step for other threads, and placing pages is
/// another: a freed page is never placed again.
pub(super) struct HandedPages {
    faults: HandedFaults,
    regions: Vec<Region>,
    /// Held while events are read and pages placed. Contains faults that were read only to get to later events.
    turn: Mutex<VecDeque<PageRun>>,
    /// Raised while there are such faults.
    left: WakeEvent,
    /// Readable while there is an event, or such a fault.
    ready: OwnedFd,
}

impl HandedPages {
    /// `regions` were [`checked`].
    pub(super) fn new(fd: OwnedFd, regions: &[HandedRegion]) -> Result<Self, HandedError> {
        let faults = HandedFaults::adopt(fd)?;
        let left = WakeEvent::new()?;
        let ready = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?;
        for (which, fd) in [(0, faults.as_fd()), (1, left.as_fd())] {
            let data = epoll::EventData::new_u64(which);
            epoll::add(&ready, fd, data, epoll::EventFlags::IN).map_err(io::Error::from)?;
        }
        let region = |region: &HandedRegion| Region {
            range: region.address as usize..(region.address + region.len) as usize,
            page: PageSize::from_bytes(region.page).unwrap_or(PAGE),
            received: AtomicBitmap::new(region.len / PAGE.bytes()),
        };
        let regions = regions.iter().map(region).collect();
        Ok(Self { faults, regions, turn: Mutex::default(), left, ready })
    }

    /// These are zero.
    pub(super) fn mark(&self, run: PageRun) {
        if let Some(region) = self.regions.get(run.block.as_usize()) {
            region.received.set(run.first, run.pages);
        }
    }

    /// The host page at an address.
    fn page_at(&self, address: usize) -> Option<PageRun> {
        let index = self.regions.iter().position(|region| region.range.contains(&address))?;
        let region = self.regions.get(index)?;
        let page = region.page.bytes();
        let offset = (address - region.range.start) as u64 / page * page;
        let pages = page / PAGE.bytes();
        Some(PageRun { block: BlockIndex(index as u32), first: PageIndex(offset / PAGE.bytes()), pages })
    }

    fn removed(&self, gone: &Range<usize>) {
        for region in &self.regions {
            let (start, end) = (gone.start.max(region.range.start), gone.end.min(region.range.end));
            if start < end {
                let first = (start - region.range.start) as u64 / PAGE.bytes();
                let stop = ((end - region.range.start) as u64).div_ceil(PAGE.bytes());
                region.received.set(PageIndex(first), stop - first);
            }
        }
    }

    /// Reads events up to a fault.
    fn read_fault(&self) -> Result<Option<PageRun>, PlaceError> {
        loop {
            match self.faults.next_event().map_err(|error| PlaceError::Failed(error.to_string()))? {
                Some(HandedEvent::Fault(address)) => match self.page_at(address) {
                    Some(page) => return Ok(Some(page)),
                    None => tracing::warn!(address, "a fault outside of the regions that were handed over"),
                },
                Some(HandedEvent::Removed(range)) => self.removed(&range),
                Some(HandedEvent::Other) => {}
                None => return Ok(None),
            }
        }
    }

    /// Reads all events, which is required before a page can be placed.
    fn read_events(&self, faults: &mut VecDeque<PageRun>) -> Result<(), PlaceError> {
        while let Some(fault) = self.read_fault()? {
            faults.push_back(fault);
            self.left.raise();
        }
        Ok(())
    }

    fn address(&self, run: PageRun) -> Option<(&Region, usize)> {
        let region = self.regions.get(run.block.as_usize())?;
        Some((region, region.range.start + (run.first.0 * PAGE.bytes()) as usize))
    }

    /// Places a host page and the pages after it that have not been placed either, as many as the kernel accepts at
    /// once. Returns the number of processed target pages.
    fn place_some(&self, run: PageRun, contents: PageContents<'_>) -> Result<u64, PlaceError> {
        let Some((region, address)) = self.address(run) else { return Ok(run.pages) };
        let host = region.page.bytes() / PAGE.bytes();
        let is_received = |at: u64| region.received.get(PageIndex(run.first.0 + at));
        let mut faults = self.turn.locked();
        if is_received(0) {
            return Ok(host);
        }
        let pages = (0..run.pages).step_by(host as usize).find(|at| is_received(*at)).unwrap_or(run.pages);
        let len = (pages * PAGE.bytes()) as usize;
        let placed = self.faults.place_contents(address, contents.part(0, len).unwrap_or(contents));
        let done = match placed.map_err(|error| PlaceError::Failed(error.to_string()))? {
            Placement::Placed(count) => count as u64 / PAGE.bytes(),
            Placement::There | Placement::Unmapped => host,
            Placement::Later => {
                self.read_events(&mut faults)?;
                drop(faults);
                // Lets the thread that frees pages continue.
                std::thread::yield_now();
                return Ok(0);
            }
            Placement::Gone => return Err(PlaceError::Gone),
        };
        region.received.set(run.first, done);
        Ok(done)
    }
}

impl PagedMemory for HandedPages {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    fn next_fault(&self) -> Result<Option<(PageRun, Waiter)>, PlaceError> {
        let mut faults = self.turn.locked();
        let left = faults.pop_front();
        let fault = match left {
            Some(fault) => Some(fault),
            None => {
                self.left.clear();
                self.read_fault()?
            }
        };
        // Its threads are another process's.
        Ok(fault.map(|page| (page, Waiter::default())))
    }

    fn is_received(&self, page: PageRun) -> bool {
        self.regions.get(page.block.as_usize()).is_none_or(|region| region.received.get(page.first))
    }

    fn place(&self, run: PageRun, contents: PageContents<'_>) -> Result<(), PlaceError> {
        let mut rest = Some(run);
        while let Some(run_left) = rest {
            let from = ((run_left.first.0 - run.first.0) * PAGE.bytes()) as usize;
            let left = contents.part(from, contents.len().saturating_sub(from));
            match self.place_some(run_left, left.unwrap_or(PageContents::Bytes(&[])))? {
                0 => {}
                done => rest = run_left.split_at(done).1,
            }
        }
        // A thread that waits for a page that was freed meanwhile faults again.
        if let Some((_, address)) = self.address(run) {
            self.faults.wake(address, (run.pages * PAGE.bytes()) as usize);
        }
        Ok(())
    }

    fn answer_received(&self, page: PageRun) -> Result<(), PlaceError> {
        let Some((region, address)) = self.address(page) else { return Ok(()) };
        let len = region.page.bytes() as usize;
        loop {
            let mut faults = self.turn.locked();
            let placed = self.faults.place_zero(address, len);
            match placed.map_err(|error| PlaceError::Failed(error.to_string()))? {
                Placement::Placed(_) | Placement::There | Placement::Unmapped => break,
                Placement::Later => {
                    self.read_events(&mut faults)?;
                    drop(faults);
                    std::thread::yield_now();
                }
                Placement::Gone => return Err(PlaceError::Gone),
            }
        }
        self.faults.wake(address, len);
        Ok(())
    }

    fn host_page(&self, block: BlockIndex) -> PageSize {
        self.regions.get(block.as_usize()).map_or(PAGE, |region| region.page)
    }

    fn block_name(&self, block: BlockIndex) -> String {
        format!("number {}", block.0)
    }

    /// Its owner has a descriptor of its own: its memory stays as it is.
    fn let_go(&self) {}
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn regions_that_make_no_sense_are_refused_by_field_and_value() {
        const MIB: u64 = 1 << 20;
        let good = HandedRegion { address: 0x7f00_0000_0000, len: 4 * MIB, page: 4096, offset: 0 };
        let behind = HandedRegion { address: good.address + good.len, offset: 4 * MIB, ..good.clone() };
        checked(&[good.clone(), behind.clone()], 8 * MIB).unwrap();
        let huge = HandedRegion { page: 2 * MIB, ..good.clone() };
        checked(std::slice::from_ref(&huge), 4 * MIB).unwrap();
        let with = |change: fn(&mut HandedRegion)| {
            let mut bad = good.clone();
            change(&mut bad);
            vec![bad]
        };
        for (regions, part) in [
            (Vec::new(), "0 regions"),
            (vec![good.clone(); 5000], "5000 regions"),
            (with(|r| r.page = 0), "page size is 0x0"),
            (with(|r| r.page = 4097), "page size is 0x1001"),
            (with(|r| r.page = 1 << 30), "page size is 0x40000000"),
            (with(|r| r.len = 0), "size is 0x0"),
            (with(|r| r.len -= 1), "size is 0x3fffff"),
            (with(|r| r.address += 1), "address is 0x7f0000000001"),
            (with(|r| r.address = 0), "where no process"),
            (with(|r| r.address = u64::MAX - 0xfff), "where no process"),
            (with(|r| r.offset = 12), "offset is 0xc"),
            (with(|r| r.offset = 5 << 20), "end beyond the 8388608"),
            (with(|r| r.offset = u64::MAX - 0xfff), "end beyond the 8388608"),
            (vec![good.clone(), good.clone()], "region 1 of the memory"),
            (vec![HandedRegion { address: huge.address + 4096, ..huge.clone() }], "inside a page of 2097152"),
        ] {
            let error = checked(&regions, 8 * MIB).unwrap_err().to_string();
            assert!(error.contains(part), "{error}: {part}");
        }
    }
}
