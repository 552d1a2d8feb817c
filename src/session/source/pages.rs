//! Which pages are still to be sent, and the batches they leave in.

use std::time::Duration;

use crate::engine::{Pace, Unconfirmed};
use crate::observe::PageCounts;
use crate::page::PageSearch;
use crate::ram::{DirtyMap, PageBatch, PageRun, RamBlockTable, Verdict};
use crate::session::Breakage;
use crate::transport::{Receipt, Returned};
use crate::units::{BlockIndex, PageIndex};

use super::fingerprints::Prints;
use super::skips::Skips;

/// Bytes of a page's header in the stream, about.
const HEADER: u64 = 9;

/// The dirty pages, the position of the search, the pages left out, the permitted rate, and batches.
pub(super) struct Pages {
    pub(super) dirty: DirtyMap,
    pub(super) search: PageSearch,
    pub(super) skips: Skips,
    pub(super) pace: Pace,
    pub(super) prints: Prints,
    /// Pages that were sent and not confirmed, where a lost connection may be followed by another.
    pub(super) unconfirmed: Option<Unconfirmed>,
    spare: Vec<PageBatch>,
    pub(super) returned: Vec<Returned>,
    aside: Aside,
    /// Nothing counts as sent any more.
    all_unsent: bool,
    page_bytes: u64,
}

/// Batches of a round that the link can't carry: they are sent in the stream after it.
#[derive(Default)]
struct Aside {
    batches: Vec<PageBatch>,
    /// Some have been declined, in any round.
    any: bool,
    sent: PageCounts,
}

impl Pages {
    pub(super) fn new(dirty: DirtyMap, pace: Pace, page_bytes: u64) -> Self {
        Self {
            dirty,
            search: PageSearch::default(),
            skips: Skips::default(),
            pace,
            prints: Prints::default(),
            unconfirmed: None,
            spare: Vec::new(),
            returned: Vec::new(),
            aside: Aside::default(),
            all_unsent: false,
            page_bytes,
        }
    }

    /// Whole pages of the next batch on a link whose batches hold `full`; `limited`: the bandwidth limit counts.
    pub(super) fn batch_pages(&self, full: u64, limited: bool) -> u64 {
        let allowed = if limited { self.pace.batch_pages(self.page_bytes) } else { None };
        allowed.map_or(full, |pages| full.min(pages))
    }

    /// Bytes that `pages` whole ones and `zero` others take in a stream, about.
    pub(super) fn bytes_of(&self, pages: u64, zero: u64) -> u64 {
        pages * (self.page_bytes + HEADER) + zero * HEADER
    }

    /// An empty batch.
    pub(super) fn fresh_batch(&mut self) -> PageBatch {
        let mut batch = self.spare.pop().unwrap_or_default();
        batch.clear();
        batch
    }

    /// A batch is not needed any more.
    pub(super) fn done_with(&mut self, batch: PageBatch) {
        self.spare.push(batch);
    }

    /// The next run of dirty pages, at most `room`; its bits are cleared.
    pub(super) fn next_run(&mut self, room: u64) -> Option<PageRun> {
        let run = self.search.next_run(&mut self.dirty, room)?;
        self.skips.sent(run);
        self.prints.sent(run);
        if let Some(unconfirmed) = &mut self.unconfirmed {
            unconfirmed.sent(run);
        }
        Some(run)
    }

    /// The next requested pages, at most `most`; their bits are cleared.
    pub(super) fn next_requested(&mut self, most: u64) -> Option<PageRun> {
        let run = self.search.next_requested(&mut self.dirty, most)?;
        self.skips.sent(run);
        Some(run)
    }

    /// The pages of `batch` have not left.
    pub(super) fn mark_unsent(&mut self, batch: &PageBatch) {
        for piece in batch.pieces() {
            self.dirty.set_run(piece.run);
        }
    }

    /// No page of a block of `pages` pages is sent.
    pub(super) fn forget(&mut self, block: BlockIndex, pages: u64) {
        let run = PageRun { block, first: PageIndex(0), pages };
        self.dirty.clear_run(run);
        self.skips.forget(run);
    }

    /// All pages that were sent count as not sent: pages may be in neither the map nor the connection.
    pub(super) fn mark_all_unsent(&mut self) {
        self.all_unsent = true;
    }

    /// The link can't carry this batch.
    pub(super) fn put_aside(&mut self, batch: PageBatch) {
        self.aside.any = true;
        self.aside.batches.push(batch);
    }

    pub(super) fn has_aside(&self) -> bool {
        !self.aside.batches.is_empty()
    }

    /// The next batch to send in the stream; put aside again by the caller if that fails.
    pub(super) fn take_aside(&mut self) -> Option<PageBatch> {
        self.aside.batches.pop()
    }

    /// These went in the stream although pages go another way.
    pub(super) fn sent_aside(&mut self, counts: PageCounts) {
        self.aside.sent.normal += counts.normal;
        self.aside.sent.zero += counts.zero;
    }

    /// Pages that went in the stream although pages go another way.
    pub(super) fn aside(&self) -> PageCounts {
        self.aside.sent
    }

    /// What a link has placed counts as received. For mutants: its completions say less.
    pub(super) fn trust(&mut self, returned: &Returned) {
        let Some(unconfirmed) = &mut self.unconfirmed else { return };
        if returned.receipt == Receipt::Placed {
            let pieces = returned.batch.pieces().iter();
            pieces
                .filter(|piece| piece.verdict == Verdict::Whole)
                .for_each(|piece| unconfirmed.trust(piece.run));
        }
    }

    /// Another connection follows, on which all is counted from zero. What had not left is dirty by other means.
    pub(super) fn forget_connection(&mut self) {
        self.search = PageSearch::default();
        self.aside = Aside { any: self.aside.any, ..Aside::default() };
        self.returned.clear();
        self.prints.over_stream();
    }

    /// Order 4: the migration failed. The pages in `given_back` and those put aside are dirty, and so are all others
    /// unless the link `confirms` the pages it has placed.
    pub(super) fn give_back(&mut self, given_back: Vec<PageBatch>, confirms: bool, table: &RamBlockTable) {
        let aside = std::mem::take(&mut self.aside.batches);
        for batch in given_back.into_iter().chain(aside) {
            self.mark_unsent(&batch);
        }
        // Released is not placed: on such a link nothing counts as arrived before the end.
        if !confirms || self.aside.any || self.all_unsent {
            self.dirty.set_all(table);
        }
    }

    /// Before anything is read.
    pub(super) fn skip_at_start(&mut self, table: &RamBlockTable, breakage: Breakage) {
        self.skips.check_plugs(table, &mut self.dirty, breakage);
    }

    /// The logs are about to be read.
    pub(super) fn skip_before_sync(&mut self, breakage: Breakage) {
        self.skips.before_sync(&mut self.dirty, breakage);
    }

    /// The logs were read.
    pub(super) fn skip_after_sync(&mut self, table: &RamBlockTable, last: bool, breakage: Breakage) {
        self.skips.after_sync(table, &mut self.dirty, last, breakage);
    }

    /// It is over, or the rest was requested: no page is left out any more.
    pub(super) fn skip_no_more(&mut self, breakage: Breakage) {
        self.skips.give_up(&mut self.dirty, breakage);
    }

    /// Takes the hints that have arrived. Once a batch.
    pub(super) fn settle_hints(&mut self) {
        self.skips.settle(&mut self.dirty);
    }

    /// Waits so long before the next batch.
    pub(super) fn delay(&self, now: Duration) -> Duration {
        self.pace.delay(now)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::engine::BandwidthLimit;
    use crate::guest::GuestMemory;
    use crate::ram::ClearShift;
    use crate::session::tests::guest;

    const PAGES: u64 = 64;

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { block: BlockIndex(0), first: PageIndex(first), pages }
    }

    fn batch(first: u64, pages: u64) -> PageBatch {
        let mut batch = PageBatch::default();
        batch.push(run(first, pages), Verdict::Whole);
        batch
    }

    fn pages(limit: u64) -> (Pages, std::sync::Arc<crate::guest::MappedGuest>) {
        let guest = guest(&[PAGES]);
        let dirty = DirtyMap::new(guest.table(), ClearShift::default());
        (Pages::new(dirty, Pace::new(BandwidthLimit::new(limit)), 4096), guest)
    }

    #[test]
    fn what_was_not_sent_is_found_again() {
        let (mut pages, _guest) = pages(0);
        pages.dirty.set_run(run(3, 5));
        assert_eq!(pages.next_run(2), Some(run(3, 2)));
        assert_eq!((pages.next_run(9), pages.next_run(9)), (Some(run(5, 3)), None));
        pages.mark_unsent(&batch(4, 2));
        assert_eq!(pages.dirty.count(), 2);
        let (mut whole, mut first) = (0, None);
        while let Some(found) = pages.next_run(9) {
            whole += found.pages;
            first = first.or(Some(found.first));
        }
        assert_eq!((whole, first), (2, Some(PageIndex(4))));
    }

    /// Order 4. A link that confirms keeps the pages it has placed; after one batch in the stream, or a panic, none
    /// counts.
    #[test]
    fn after_a_failure_what_is_not_there_for_certain_is_dirty() {
        let given_back = || vec![batch(1, 2)];
        let (mut confirmed, guest) = pages(0);
        confirmed.give_back(given_back(), true, guest.table());
        assert_eq!(confirmed.dirty.count(), 2);

        let (mut unconfirmed, _) = pages(0);
        unconfirmed.give_back(given_back(), false, guest.table());
        assert_eq!(unconfirmed.dirty.count(), PAGES);

        let (mut declined, _) = pages(0);
        declined.put_aside(batch(9, 1));
        assert!(declined.has_aside() && declined.take_aside().is_some() && !declined.has_aside());
        declined.give_back(given_back(), true, guest.table());
        assert_eq!(declined.dirty.count(), PAGES, "a batch went another way, in whatever round");

        let (mut panicked, _) = pages(0);
        panicked.mark_all_unsent();
        panicked.give_back(Vec::new(), true, guest.table());
        assert_eq!(panicked.dirty.count(), PAGES);
    }

    #[test]
    fn a_limit_makes_batches_small_while_it_counts() {
        assert_eq!(pages(0).0.batch_pages(512, true), 512);
        let slow = pages(1 << 20).0;
        assert!(slow.batch_pages(512, true) < 512);
        assert_eq!(slow.batch_pages(512, false), 512, "the guest stands still");
    }
}
