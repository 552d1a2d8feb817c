//! In what order the pages of an already running guest are read: first pages that a thread waits for, then pages that
//! were touched the last time, then pages after the last fault, then the rest.
//!
//! Several readers work in parallel. A reader that serves a fault reads its page immediately, whatever else is being
//! read. A reader of the rest calls [`Fill::next_run`] for a run and reports the result.
//!
//! # Required orders
//!
//! A page is removed from the list of unread pages when a reader takes it, and from the list of missing pages only when
//! it is placed: faults are served until no page is missing. A page that could not be read stays missing, and is read
//! again after a call of [`Fill::retry`]. What a read has brought is placed only if the read succeeded.
//!
//! Pages may be withheld: none of them is given to a reader before [`Fill::grant`]. Then those that a thread waits for
//! come first.

mod breakage;

use std::collections::VecDeque;
use std::time::Duration;

use super::pager::{FaultAnswer, HostPage, Pager, Waiter};
use crate::observe::Latency;
use crate::ram::{PageBitmap, PageRun};
use crate::units::{BlockIndex, BlockOffset, PageIndex, PageSize};
pub(crate) use breakage::FillBreakage;

/// Bytes that are read at a time, for pages that no thread waits for.
const READ: u64 = 1 << 20;

/// Maximum number of runs whose order of first access is recorded.
const MAX_TOUCHED: usize = 1 << 20;

/// A block whose pages are to be read.
#[derive(Clone, Debug)]
pub struct BlockToFill {
    /// Pages that hold data in the source that they are read from.
    pub present: PageBitmap,
    /// Page size of the host's memory; host pages are placed whole.
    pub host_page: PageSize,
}

#[derive(Debug)]
struct Block {
    /// No reader has taken them.
    unread: PageBitmap,
    /// They are not in place.
    missing: PageBitmap,
    /// They could not be read.
    failed: PageBitmap,
    /// They can't be read yet.
    withheld: PageBitmap,
    /// Target pages per host page.
    host: u64,
}

/// How far a memory is filled, in target pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FillCounts {
    /// Pages that hold data and are not placed yet.
    pub missing: u64,
    /// Of these, pages that could not be read.
    pub failed: u64,
    /// Faults that were reported.
    pub faults: u64,
    /// Pages that were read because a thread waited for them, each counted once.
    pub urgent: u64,
}

/// Which pages are read next.
#[derive(Debug)]
pub struct Fill {
    pager: Pager,
    page: PageSize,
    blocks: Vec<Block>,
    /// Runs to read before the rest.
    first: VecDeque<PageRun>,
    /// The page after the last fault.
    behind: Option<(BlockIndex, PageIndex)>,
    /// Where the rest begins, in address order.
    rest: (BlockIndex, PageIndex),
    /// The rest may be read.
    is_open: bool,
    /// No run lies on both sides of a multiple of [`READ`].
    is_aligned: bool,
    /// Withheld pages that a thread has come to wait for.
    wanted: VecDeque<PageRun>,
    touched: Vec<PageRun>,
    urgent: u64,
    breakage: FillBreakage,
}

impl Fill {
    /// The pages to read of `blocks`, whose target pages have `page` bytes. A host page that holds any data is read
    /// whole.
    pub fn new(page: PageSize, blocks: Vec<BlockToFill>) -> Self {
        let blocks = blocks.into_iter().map(|block| {
            let host = (block.host_page.bytes() / page.bytes()).max(1);
            let mut unread = block.present;
            if host > 1 {
                let mut from = PageIndex(0);
                while let Some(run) = unread.next_run(from, u64::MAX) {
                    let end = run.end.next_multiple_of(host);
                    unread.set_range(run.start / host * host..end);
                    from = PageIndex(end);
                }
            }
            let failed = PageBitmap::new(unread.len());
            Block { missing: unread.clone(), unread, failed, withheld: PageBitmap::new(0), host }
        });
        Self {
            pager: Pager::default(),
            page,
            blocks: blocks.collect(),
            first: VecDeque::new(),
            behind: None,
            rest: (BlockIndex(0), PageIndex(0)),
            is_open: false,
            is_aligned: false,
            wanted: VecDeque::new(),
            touched: Vec::new(),
            urgent: 0,
            breakage: FillBreakage::None,
        }
    }

    /// No page can be read before it is [granted](Self::grant), and no run lies on both sides of a multiple of 1 MiB, or
    /// of a larger host page.
    #[must_use]
    pub fn withheld(mut self) -> Self {
        for block in &mut self.blocks {
            let none = PageBitmap::new(block.unread.len());
            block.withheld = std::mem::replace(&mut block.unread, none);
        }
        self.is_aligned = true;
        self
    }

    /// The pages of a run can be read from here on. Returns how many of them are missing.
    pub fn grant(&mut self, run: PageRun) -> u64 {
        let Some(block) = self.blocks.get_mut(run.block.as_usize()) else { return 0 };
        let mut from = run.first;
        while let Some(part) = block.withheld.next_run(from, u64::MAX).filter(|part| part.start < run.end().0)
        {
            let part = part.start..part.end.min(run.end().0);
            from = PageIndex(part.end);
            block.withheld.clear_range(part.clone());
            block.unread.set_range(part);
        }
        let missing = count_within(&block.missing, run);
        if !self.breakage.is(FillBreakage::PassWithheld) {
            // Later ones may have been granted before.
            self.rest = self.rest.min((run.block, run.first));
        }
        let waited: Vec<PageRun> = self.pager.outstanding().map(|page| self.run_of(page)).collect();
        if !self.breakage.is(FillBreakage::ForgetWithheld) {
            let here = |page: &PageRun| page.block == run.block && pages(run).contains(&page.first.0);
            self.first.extend(waited.into_iter().filter(here));
        }
        missing
    }

    /// A page that can't be read yet, and that a thread has come to wait for; each once.
    pub fn next_wanted(&mut self) -> Option<PageRun> {
        self.wanted.pop_front()
    }

    /// These runs are read first, in this order: those that were touched when the same memory was filled before.
    pub fn read_first(&mut self, runs: Vec<PageRun>) {
        self.first.extend(runs.iter().copied());
        self.touched = runs;
    }

    /// From here on [`next_run`](Self::next_run) returns the rest, too.
    pub fn open(&mut self) {
        self.is_open = true;
    }

    /// The threads of these vCPUs are known from here on.
    pub fn know(&mut self, now: Duration, vcpus: impl IntoIterator<Item = u32>) {
        self.pager.know(now, vcpus);
    }

    /// A thread waits for a host page since `now`. [`FaultAnswer::Ask`]: read it now. `received` is as for
    /// [`Pager::fault`].
    pub fn fault(
        &mut self,
        now: Duration,
        page: PageRun,
        who: Waiter,
        received: impl FnOnce() -> bool,
    ) -> FaultAnswer {
        let answer = self.pager.fault(now, self.host_page(page), who, received);
        if answer == FaultAnswer::Received {
            return answer;
        }
        if let Some(block) = self.blocks.get_mut(page.block.as_usize()) {
            if block.withheld.get(page.first) {
                if answer == FaultAnswer::Ask {
                    self.wanted.push_back(page);
                    self.note(page);
                }
                return FaultAnswer::Wait;
            }
            // One that is waited for already may be among those that are read next.
            if answer == FaultAnswer::Ask {
                block.unread.clear_range(pages(page));
            }
        }
        if answer == FaultAnswer::Ask {
            self.urgent += page.pages;
            self.behind = Some((page.block, page.end()));
            self.note(page);
        }
        answer
    }

    fn note(&mut self, page: PageRun) {
        let has_room = self.touched.len() < MAX_TOUCHED;
        match self.touched.last_mut() {
            Some(last) if last.block == page.block && last.end() == page.first => last.pages += page.pages,
            _ if has_room => self.touched.push(page),
            _ => {}
        }
    }

    /// The next run to read, in whole host pages of one block; no other reader has it. `None`: nothing for now.
    pub fn next_run(&mut self) -> Option<PageRun> {
        let run = self.next_recorded().or_else(|| self.next_of_rest())?;
        let block = self.blocks.get_mut(run.block.as_usize())?;
        if !self.breakage.is(FillBreakage::GiveTwice) {
            block.unread.clear_range(pages(run));
        }
        if self.breakage.is(FillBreakage::WholeWhenRead) {
            block.missing.clear_range(pages(run));
        }
        Some(run)
    }

    fn next_recorded(&mut self) -> Option<PageRun> {
        while let Some(wanted) = self.first.pop_front() {
            let Some(found) =
                self.unread_from(wanted.block, wanted.first).filter(|run| run.first < wanted.end())
            else {
                continue;
            };
            let end = found.end().min(wanted.end().max(self.host_end(found)));
            if end < wanted.end() {
                self.first.push_front(PageRun { first: end, pages: wanted.end().0 - end.0, ..wanted });
            }
            return Some(PageRun { pages: end.0 - found.first.0, ..found });
        }
        None
    }

    fn next_of_rest(&mut self) -> Option<PageRun> {
        if !self.is_open {
            return None;
        }
        if let Some((block, from)) = self.behind {
            let run = self.unread_from(block, from);
            self.behind = run.map(|run| (block, run.end()));
            if run.is_some() {
                return run;
            }
        }
        while self.rest.0.as_usize() < self.blocks.len() {
            if let Some(run) = self.unread_from(self.rest.0, self.rest.1) {
                self.rest.1 = run.end();
                return Some(run);
            }
            self.rest = (BlockIndex(self.rest.0.0 + 1), PageIndex(0));
        }
        None
    }

    /// The first run of a block, from a page on, that no reader has taken: whole host pages.
    fn unread_from(&self, block: BlockIndex, from: PageIndex) -> Option<PageRun> {
        let of = self.blocks.get(block.as_usize())?;
        let most = (READ / self.page.bytes()).max(1).next_multiple_of(of.host);
        // All target pages of a host page have the same marks.
        let from = PageIndex(from.0 / of.host * of.host);
        let run = of.unread.next_run(from, most)?;
        let end = if self.is_aligned { run.end.min((run.start / most + 1) * most) } else { run.end };
        Some(PageRun { block, first: PageIndex(run.start), pages: end - run.start })
    }

    /// The end of the first host page of a run.
    fn host_end(&self, run: PageRun) -> PageIndex {
        let host = self.blocks.get(run.block.as_usize()).map_or(1, |block| block.host);
        PageIndex(run.first.0 + host)
    }

    /// A read of a run has ended. True if what it brought is to be placed.
    #[must_use = "what a failed read has brought is not placed"]
    pub fn ended(&mut self, run: PageRun, is_read: bool) -> bool {
        if !is_read && !self.breakage.is(FillBreakage::PlaceFailed) {
            self.failed(run);
            return false;
        }
        true
    }

    /// A run is in place. Returns how many of its pages were missing.
    pub fn placed(&mut self, now: Duration, run: PageRun) -> u64 {
        let Some(block) = self.blocks.get_mut(run.block.as_usize()) else { return 0 };
        for map in [&mut block.unread, &mut block.failed] {
            map.clear_range(pages(run));
        }
        let placed = block.missing.clear_range(pages(run));
        let host = block.host;
        for first in (run.first.0..run.end().0).step_by(usize::try_from(host).unwrap_or(usize::MAX)) {
            let page = self.host_page(PageRun { first: PageIndex(first), pages: host, ..run });
            self.pager.placed(now, page);
        }
        placed
    }

    #[cfg(test)]
    pub(crate) fn break_order(&mut self, breakage: FillBreakage) {
        self.breakage = breakage;
    }

    /// No page is read here any more: the threads that wait, to be served in another way, and their figures.
    pub fn take_pager(&mut self) -> Pager {
        if self.breakage.is(FillBreakage::ForgetOutstanding) {
            return Pager::default();
        }
        std::mem::take(&mut self.pager)
    }

    /// A run could not be read. A thread that waits for a page of it keeps waiting.
    pub fn failed(&mut self, run: PageRun) {
        let Some(block) = self.blocks.get_mut(run.block.as_usize()) else { return };
        let mut from = run.first;
        // Another reader may have placed a part of it meanwhile.
        while let Some(part) = block.missing.next_run(from, u64::MAX).filter(|part| part.start < run.end().0)
        {
            let part = part.start..part.end.min(run.end().0);
            from = PageIndex(part.end);
            block.failed.set_range(part.clone());
            block.unread.clear_range(part);
        }
    }

    /// Pages that could not be read are read again, first those that a thread waits for. Returns the number of these
    /// pages.
    pub fn retry(&mut self) -> u64 {
        let mut again = 0;
        for block in &mut self.blocks {
            again += block.failed.count();
            let mut from = PageIndex(0);
            while let Some(run) = block.failed.next_run(from, u64::MAX) {
                from = PageIndex(run.end);
                if !self.breakage.is(FillBreakage::ForgetFailed) {
                    block.unread.set_range(run);
                }
            }
            block.failed = PageBitmap::new(block.unread.len());
        }
        self.rest = (BlockIndex(0), PageIndex(0));
        let waiting: Vec<PageRun> = self.pager.outstanding().map(|page| self.run_of(page)).collect();
        if !self.breakage.is(FillBreakage::ForgetWaiting) {
            waiting.into_iter().rev().for_each(|run| self.first.push_front(run));
        }
        again
    }

    /// Pages of a block that hold data and are not placed yet.
    pub fn missing(&self, block: BlockIndex) -> Option<&PageBitmap> {
        self.blocks.get(block.as_usize()).map(|block| &block.missing)
    }

    /// No page is missing: faults need not be served any more.
    pub fn is_whole(&self) -> bool {
        self.blocks.iter().all(|block| block.missing.count() == 0)
    }

    /// All missing pages are ones that could not be read.
    pub fn is_stuck(&self) -> bool {
        let FillCounts { missing, failed, .. } = self.counts();
        failed > 0 && failed == missing
    }

    /// How far it is.
    pub fn counts(&self) -> FillCounts {
        let sum = |of: fn(&Block) -> &PageBitmap| self.blocks.iter().map(|block| of(block).count()).sum();
        FillCounts {
            missing: sum(|block| &block.missing),
            failed: sum(|block| &block.failed),
            faults: self.pager.counts().0,
            urgent: self.urgent,
        }
    }

    /// Time from a fault until its page is placed.
    pub fn latency(&self) -> &Latency {
        self.pager.latency()
    }

    /// The touched runs, in the order of the faults, after those that were to be read first.
    pub fn touched(&self) -> &[PageRun] {
        &self.touched
    }

    fn host_page(&self, page: PageRun) -> HostPage {
        HostPage { block: page.block, offset: page.offset(self.page).map_or(u64::MAX, |offset| offset.0) }
    }

    fn run_of(&self, page: HostPage) -> PageRun {
        let first = self.page.page_of(BlockOffset(page.offset));
        PageRun {
            block: page.block,
            first,
            pages: self.blocks.get(page.block.as_usize()).map_or(1, |b| b.host),
        }
    }
}

/// Pages of a run that are in `map`.
fn count_within(map: &PageBitmap, run: PageRun) -> u64 {
    let (mut from, mut count) = (run.first, 0);
    while let Some(part) = map.next_run(from, u64::MAX).filter(|part| part.start < run.end().0) {
        count += part.end.min(run.end().0) - part.start;
        from = PageIndex(part.end);
    }
    count
}

fn pages(run: PageRun) -> std::ops::Range<u64> {
    run.first.0..run.end().0
}

#[cfg(test)]
#[path = "fill_tests.rs"]
mod tests;
