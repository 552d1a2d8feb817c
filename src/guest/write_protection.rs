//! Guest memory whose pages stay as they are until they were copied: write protection by userfaultfd, block by block.
//!
//! Memory that was never written is neither protected nor read: it is zero, whatever the guest writes there later. So
//! nothing has to be populated, and page tables are made only for used pages. Used pages are searched for while the
//! guest runs; while it is paused only the gaps are searched again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::dirty::regions_of;
use super::{GuestError, GuestMemory};
use crate::ram::{PageRun, PageSet};
use crate::sys::{FaultAt, HostRegion, HostSpan, WriteFaults, populate_read};
use crate::units::{BlockIndex, BlockOffset, PageIndex, PageSize};

/// Gaps of unused memory up to so many bytes are protected with their neighbours: a call for each run would take longer.
const MAX_GAP: u64 = 1 << 20;
/// The largest page whose copying a writer may wait for.
const MAX_HOST_PAGE: PageSize = PageSize::SIZE_2M;

/// The blocks of a guest under one userfaultfd. Dropping it takes all protection off.
#[derive(Debug)]
pub(crate) struct WriteProtection {
    faults: WriteFaults,
    blocks: Vec<Option<Protected>>,
    page: PageSize,
    /// Pages that may hold something, in whole host pages.
    used: PageSet,
    /// Room for the guest's pages.
    nothing: PageSet,
}

/// A block as this process maps it.
#[derive(Debug)]
struct Protected {
    name: String,
    region: HostRegion,
    /// Bytes, in whole host pages.
    len: u64,
    /// Target pages.
    pages: u64,
}

impl WriteProtection {
    /// Makes ready to protect the memory of `guest`, which runs. With `user_mode_only` writes by the kernel (KVM's, read(2)'s)
    /// are not held but fail; that needs no privilege.
    ///
    /// # Errors
    /// [`GuestError::WriteFaults`], [`GuestError::Unprotected`], [`GuestError::Kernel`].
    pub(crate) fn arm(guest: &dyn GuestMemory, user_mode_only: bool) -> Result<Self, GuestError> {
        let table = guest.table();
        let faults = WriteFaults::new(user_mode_only)?;
        let (blocks, missing) = regions_of(guest, |block, region| Protected {
            name: block.name.to_string(),
            len: block.used_length.next_multiple_of(region.page().bytes()).min(region.len()),
            pages: table.pages_of(block),
            region,
        });
        missing.check("a snapshot").map_err(|error| GuestError::Kernel {
            block: "of this guest".into(),
            what: "protecting it from writes",
            remedy: "give memory whose GuestMemory::region is not None",
            source: io::Error::other(error),
        })?;
        let nothing = PageSet::new(table);
        let this = Self { faults, blocks, page: table.page(), used: nothing.clone(), nothing };
        for block in this.blocks.iter().flatten() {
            this.register(block)?;
        }
        Ok(this)
    }

    fn register(&self, block: &Protected) -> Result<(), GuestError> {
        let page = block.region.page();
        if page > MAX_HOST_PAGE {
            return Err(GuestError::Kernel {
                block: block.name.clone(),
                what: "protecting it from writes",
                remedy: "use huge pages of 2 MiB: a write waits until its whole page is copied",
                source: io::Error::other(format!("its pages have {page}")),
            });
        }
        let span = block.span(0, block.len)?;
        let refused = |source| GuestError::Unprotected { block: block.name.clone(), source };
        self.faults.register(span).map_err(refused)
    }

    /// Looks for pages that may have contents and are not known yet: only the gaps are searched. Returns the new ones,
    /// in whole host pages.
    ///
    /// # Errors
    /// [`GuestError::Kernel`].
    pub(crate) fn find_used(&mut self) -> Result<PageSet, GuestError> {
        let merges = if self.faults.protects_unpopulated() { MAX_GAP } else { 0 };
        let mut new = self.nothing.clone();
        for (index, block) in (0..).map(BlockIndex).zip(&self.blocks) {
            let Some(block) = block else { continue };
            let host = block.region.page();
            for gap in self.gaps(index, block.pages) {
                let mut last: Option<u64> = None;
                let bytes = gap.start << self.page.shift()..(gap.end << self.page.shift()).min(block.len);
                block.region.touched_in(bytes, |found| {
                    let near = last.filter(|last| found.start.saturating_sub(*last) <= merges);
                    let start = near.unwrap_or(found.start).min(found.start) & !(host.bytes() - 1);
                    let end = found.end.next_multiple_of(host.bytes());
                    last = Some(end);
                    let first = start >> self.page.shift();
                    let pages = (end >> self.page.shift()) - first;
                    new.add(PageRun { block: index, first: PageIndex(first), pages });
                });
            }
        }
        for run in new.runs() {
            self.used.add(run);
        }
        if !self.faults.protects_unpopulated() {
            self.populate(&new)?;
        }
        Ok(new)
    }

    /// Takes these pages, in whole host pages, for all that may have contents: other pages are not searched.
    ///
    /// # Errors
    /// [`GuestError::Kernel`].
    pub(crate) fn take(&self, pages: PageSet) -> Result<PageSet, GuestError> {
        if !self.faults.protects_unpopulated() {
            self.populate(&pages)?;
        }
        Ok(pages)
    }

    /// Runs of pages that are not in use.
    fn gaps(&self, index: BlockIndex, pages: u64) -> Vec<std::ops::Range<u64>> {
        let Some(used) = self.used.block(index) else { return Vec::new() };
        let (mut gaps, mut at) = (Vec::new(), 0);
        while let Some(run) = used.next_run(PageIndex(at), u64::MAX) {
            if run.start > at {
                gaps.push(at..run.start);
            }
            at = run.end;
        }
        if at < pages {
            gaps.push(at..pages);
        }
        gaps
    }

    /// An older kernel protects only populated pages. Where it can't tell which are used, more are taken for used.
    fn populate(&self, pages: &PageSet) -> Result<(), GuestError> {
        for run in pages.runs() {
            let Some((block, span)) = self.span(run)? else { continue };
            populate_read(span).map_err(|source| GuestError::Kernel {
                block: block.name.clone(),
                what: "mapping its pages",
                remedy: "Linux 6.4 and newer need not do this, and none older than 5.14 can",
                source,
            })?;
        }
        Ok(())
    }

    /// A first write to the host pages of `run` waits from here on.
    ///
    /// # Errors
    /// [`GuestError::Kernel`]; a part may be protected.
    pub(crate) fn protect(&self, run: PageRun) -> Result<(), GuestError> {
        let Some((block, span)) = self.span(run)? else { return Ok(()) };
        self.faults.protect(span).map_err(|source| block.failed("protecting it from writes", source))
    }

    /// The next host page that a thread waits to write, without waiting.
    ///
    /// # Errors
    /// The kernel's answer.
    pub(crate) fn next(&self) -> io::Result<Option<PageRun>> {
        while let Some(FaultAt(at)) = self.faults.next()? {
            if let Some(run) = self.page_at(at) {
                return Ok(Some(run));
            }
        }
        Ok(None)
    }

    fn page_at(&self, address: usize) -> Option<PageRun> {
        (0..).map(BlockIndex).zip(&self.blocks).find_map(|(index, block)| {
            let block = block.as_ref()?;
            let offset = (address as u64).checked_sub(block.region.address() as u64)?;
            if offset >= block.len {
                return None;
            }
            let host = block.region.page();
            let first = self.page.page_of(BlockOffset(offset & !(host.bytes() - 1)));
            let pages = (host.bytes() >> self.page.shift()).max(1).min(block.pages - first.0);
            Some(PageRun { block: index, first, pages })
        })
    }

    /// Writes to the host pages of `run` go through; threads that wait for one continue.
    ///
    /// # Errors
    /// [`GuestError::Kernel`].
    pub(crate) fn lift(&self, run: PageRun) -> Result<(), GuestError> {
        let Some((block, span)) = self.span(run)? else { return Ok(()) };
        self.faults.lift(span).map_err(|source| block.failed("lifting its protection", source))
    }

    /// The memory of a run, up to the end of its last host page.
    fn span(&self, run: PageRun) -> Result<Option<(&Protected, HostSpan<'_>)>, GuestError> {
        let Some(block) = self.blocks.get(run.block.as_usize()).and_then(Option::as_ref) else {
            return Ok(None);
        };
        let (Some(start), Some(bytes)) = (run.offset(self.page), run.bytes(self.page)) else {
            return Ok(None);
        };
        let len = bytes.next_multiple_of(block.region.page().bytes()).min(block.len - start.0.min(block.len));
        Ok(Some((block, block.span(start.0, len)?)))
    }
}

impl Protected {
    fn span(&self, offset: u64, len: u64) -> Result<HostSpan<'_>, GuestError> {
        self.region
            .span(offset, len)
            .map_err(|source| GuestError::Unmapped { block: self.name.clone(), source })
    }

    fn failed(&self, what: &'static str, source: io::Error) -> GuestError {
        let remedy = "leave its mapping as it is until the snapshot is over; page tables need 2 MiB of memory for each GiB";
        GuestError::Kernel { block: self.name.clone(), what, remedy, source }
    }
}

impl AsFd for WriteProtection {
    /// Readable while a thread waits.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.faults.as_fd()
    }
}
