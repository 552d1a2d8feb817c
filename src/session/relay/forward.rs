//! Received pages as the dirty pages of the session that sends them on.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::guest::{DirtyError, DirtySource};
use crate::ram::{AtomicBitmap, PageBitmap, PageRun, RamBlockTable};
use crate::sys::{Lock as _, WakeEvent};
use crate::units::BlockIndex;

use crate::guest::PageObserver;

/// One bit for each page that was received and not taken yet. Unlike the log of a running guest it also counts pages
/// from before its start: no received page is ever dropped.
#[derive(Debug)]
pub(in crate::session) struct ForwardedPages {
    blocks: Vec<AtomicBitmap>,
    pending: AtomicU64,
    /// The source has switched to postcopy.
    switched: AtomicBool,
    /// Pages that came since, in the order of their arrival; each is in `blocks` as well, so that none is here twice.
    queue: Mutex<Vec<PageRun>>,
    /// Raised while `queue` holds something.
    wake: Option<WakeEvent>,
}

impl ForwardedPages {
    pub(in crate::session) fn new(table: &RamBlockTable) -> Self {
        let blocks = table.blocks().iter().map(|block| AtomicBitmap::new(table.pages_of(block))).collect();
        Self {
            blocks,
            pending: AtomicU64::new(0),
            switched: AtomicBool::new(false),
            queue: Mutex::default(),
            // Without one the far side looks from time to time.
            wake: WakeEvent::new().ok(),
        }
    }

    /// Marks pages to be sent on.
    pub(in crate::session) fn mark(&self, run: PageRun) {
        if let Some(map) = self.blocks.get(run.block.as_usize()) {
            // Counted first, so that the count never falls below zero.
            self.pending.fetch_add(run.pages, Ordering::Relaxed);
            let known = run.pages - map.set(run.first, run.pages);
            self.pending.fetch_sub(known, Ordering::Relaxed);
            if known < run.pages && self.switched.load(Ordering::Acquire) {
                self.put_in_queue(run);
            }
        }
    }

    /// The source has switched to postcopy, and sends nothing before the far end was given the guest: pages that come
    /// from now on are taken by [`take_queue`](Self::take_queue), in their order.
    pub(in crate::session) fn switch(&self) {
        self.switched.store(true, Ordering::Release);
    }

    fn put_in_queue(&self, run: PageRun) {
        let mut queue = self.queue.locked();
        match queue.last_mut() {
            Some(last) if last.block == run.block && last.end() == run.first => last.pages += run.pages,
            _ => queue.push(run),
        }
        if let Some(wake) = &self.wake {
            wake.raise();
        }
    }

    /// The pages that came since the last call, after [`switch`](Self::switch).
    pub(in crate::session) fn take_queue(&self) -> Vec<PageRun> {
        // A sync may have taken their bits: the queue alone decides.
        let mut queue = self.queue.locked();
        if let Some(wake) = &self.wake {
            wake.clear();
        }
        let runs = std::mem::take(&mut *queue);
        for run in &runs {
            if let Some(map) = self.blocks.get(run.block.as_usize()) {
                self.pending.fetch_sub(map.clear(run.first, run.pages), Ordering::Relaxed);
            }
        }
        runs
    }

    /// Readable while [`take_queue`](Self::take_queue) has something.
    pub(in crate::session) fn wake(&self) -> Option<BorrowedFd<'_>> {
        self.wake.as_ref().map(AsFd::as_fd)
    }

    /// Number of pages that were received and not taken.
    pub(in crate::session) fn pending(&self) -> u64 {
        self.pending.load(Ordering::Relaxed)
    }
}

impl PageObserver for ForwardedPages {
    fn placed(&self, run: PageRun) {
        self.mark(run);
    }
}

impl DirtySource for ForwardedPages {
    fn name(&self) -> &'static str {
        "arrivals"
    }

    fn probe(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn start(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        if let Some(map) = self.blocks.get(block.as_usize()) {
            self.pending.fetch_sub(map.take_bits(into), Ordering::Relaxed);
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::{BlockName, RamBlock};
    use crate::units::{PageIndex, PageSize};

    #[test]
    fn a_page_that_came_before_the_start_is_taken_once_and_counted_exactly() {
        let block = RamBlock::new(BlockName::new("ram").unwrap(), 100 * 4096);
        let table = RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap();
        let forwarded = ForwardedPages::new(&table);
        let run = |first, pages| PageRun { block: BlockIndex(0), first: PageIndex(first), pages };
        forwarded.mark(run(60, 10));
        forwarded.mark(run(65, 10));
        assert_eq!(forwarded.pending(), 15);
        forwarded.start().unwrap();
        let mut dirty = PageBitmap::new(100);
        dirty.set_range(0..70);
        forwarded.sync_into(BlockIndex(0), &mut dirty).unwrap();
        assert_eq!((dirty.count(), forwarded.pending()), (75, 0));
    }

    /// Otherwise it would stay, and what waits for it would be woken for ever.
    #[test]
    fn a_page_in_the_queue_whose_bit_a_sync_has_taken_is_taken_from_the_queue() {
        let block = RamBlock::new(BlockName::new("ram").unwrap(), 100 * 4096);
        let table = RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap();
        let forwarded = ForwardedPages::new(&table);
        forwarded.switch();
        let run = PageRun { block: BlockIndex(0), first: PageIndex(60), pages: 1 };
        forwarded.mark(run);
        forwarded.sync_into(BlockIndex(0), &mut PageBitmap::new(100)).unwrap();
        assert_eq!(forwarded.pending(), 0);
        let is_raised = || {
            let wake = forwarded.wake().unwrap();
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(wake, rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())).unwrap() == 1
        };
        assert!(is_raised());
        assert_eq!(forwarded.take_queue(), [run]);
        assert!(!is_raised() && forwarded.take_queue().is_empty());
    }
}
