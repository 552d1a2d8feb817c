//! The page loop: which page, as what, to the link, a slice at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::{Sent, SourceEvent};
use crate::page::{ZeroDetection, classify};
use crate::ram::{PageBatch, PageRun};
use crate::transport::{InlinePages, Offer, Receipt};

use super::SourceSession;
use crate::session::{Breakage, Error};

/// Most zero pages in a batch: they cost a header each and no look at the clock.
const MAX_BATCH_PAGES: u64 = 16 * 1024;

impl SourceSession {
    /// Sends dirty pages until none is left, or until the engine calls. The peer and the embedder are heard at each batch.
    pub(super) fn send_slice(&mut self) -> Result<SourceEvent, Error> {
        self.poll_return_path()?;
        self.check_layout()?;
        // Also where the limit lets no page leave for long: a link may have to show that we are alive.
        self.take_returned()?;
        self.follow_control();
        self.throttle_vcpus();
        let (before, guest_before) = (self.position(), self.figures.whole_bytes());
        while self.keep_pace()? {
            let batch = self.next_batch()?;
            if batch.is_empty() {
                self.spare.push(batch);
                break;
            }
            self.offer(batch)?;
            self.poll_return_path()?;
            if self.is_called() {
                break;
            }
        }
        let position = self.position();
        let bytes = position - before;
        self.figures.position(position);
        let pages_left = self.dirty.count();
        self.figures.sent(self.clock.now(), bytes, pages_left, self.engine.rate());
        self.figures.channel_bytes(self.link.channel_bytes());
        self.figures.deltas(self.link.deltas());
        self.engine.set_under_way(self.link.under_way());
        let guest = self.figures.whole_bytes() - guest_before;
        Ok(SourceEvent::Sent { pages_left, sent: Sent { guest, wire: bytes } })
    }

    /// True if the engine has something else to do by now, or the time of its slice is over.
    pub(super) fn is_called(&mut self) -> bool {
        let now = self.clock.now();
        self.tell_commands(now);
        self.engine.wake_at().is_some_and(|at| now >= at)
    }

    /// Waits until the limit lets the next batch leave, and hears the peer meanwhile; false if the engine calls before.
    fn keep_pace(&mut self) -> Result<bool, Error> {
        while !self.in_last_round {
            let now = self.clock.now();
            let delay = self.pace.delay(now);
            if delay == Duration::ZERO {
                break;
            }
            let left = self.engine.wake_at().map_or(delay, |at| at.saturating_sub(now));
            self.listen_for(delay.min(left))?;
            if self.is_called() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn page_bytes(&self) -> u64 {
        self.guest.memory.table().page().bytes()
    }

    /// Bytes that `pages` whole ones and `zero` others take in a stream, about.
    fn bytes_of(&self, pages: u64, zero: u64) -> u64 {
        const HEADER: u64 = 9;
        pages * (self.page_bytes() + HEADER) + zero * HEADER
    }

    /// Bytes sent so far, on whatever channel.
    pub(super) fn position(&mut self) -> u64 {
        self.link.sink().position() + self.link.channel_bytes()
    }

    /// Gathers runs until the batch is full or nothing is dirty.
    fn next_batch(&mut self) -> Result<PageBatch, Error> {
        let mut full = u64::from(self.link.abilities().batch_pages);
        if let (Some(pages), false) = (self.pace.batch_pages(self.page_bytes()), self.in_last_round) {
            full = full.min(pages);
        }
        self.skips.settle(&mut self.dirty);
        let mut batch = self.spare.pop().unwrap_or_default();
        batch.clear();
        while batch.whole_pages() < full && batch.pages() < MAX_BATCH_PAGES {
            let room = full - batch.whole_pages();
            let Some(run) = self.search.next_run(&mut self.dirty, room) else { break };
            self.skips.sent(run);
            if let Err(error) = self.classify_run(run, &mut batch) {
                self.dirty.set_run(run);
                self.mark_unsent(&batch);
                return Err(error);
            }
        }
        Ok(batch)
    }

    /// Order 1: the bits of `run` are cleared, now the log is armed again, only then are the bytes read.
    fn classify_run(&mut self, run: PageRun, batch: &mut PageBatch) -> Result<(), Error> {
        let chunk = self.dirty.take_clear_chunk(run);
        let detection = self.settings.zero_detection.with(self.link.abilities().classifies);
        if self.breakage.is(Breakage::ReadBeforeProtect) {
            classify(&*self.guest.memory, run, detection, batch)?;
            let torn = std::mem::take(batch);
            self.offer(torn)?;
            return self.reprotect(chunk);
        }
        self.reprotect(chunk)?;
        Ok(classify(&*self.guest.memory, run, detection, batch)?)
    }

    fn reprotect(&mut self, chunk: Option<PageRun>) -> Result<(), Error> {
        let Some(chunk) = chunk else { return Ok(()) };
        self.guest.dirty.iter().try_for_each(|source| source.reprotect(chunk))?;
        Ok(())
    }

    /// Hands a batch to the link; waits while it is full.
    fn offer(&mut self, batch: PageBatch) -> Result<(), Error> {
        let begun = Instant::now();
        let mut bytes = self.bytes_of(batch.whole_pages(), batch.zero_pages());
        let (now, before) = (self.clock.now(), self.position());
        let mut batch = batch;
        loop {
            match self.link.offer(batch, &self.stop)? {
                Offer::Taken(_) => break,
                Offer::Full(back) => {
                    batch = back;
                    if let Err(error) = self.make_room() {
                        self.mark_unsent(&batch);
                        return Err(error);
                    }
                }
                Offer::Declined(back) => {
                    self.declined.push(back);
                    break;
                }
            }
        }
        if self.link.deltas().cache_size > 0 {
            // Such a link writes at once, and how much is known only now.
            bytes = self.position() - before;
        }
        self.pace.charge(now, bytes);
        if self.control.max_bandwidth().is_some() {
            // A limit is to be seen at work between slices, too.
            let position = self.position();
            self.figures.position(position);
        }
        self.figures.offered(begun.elapsed());
        self.take_returned()
    }

    /// What the link declined in the round that was just closed goes in the stream. Bytes of a link that is
    /// not ordered could overtake its pages: they wait for them.
    pub(super) fn send_declined(&mut self) -> Result<(), Error> {
        if self.declined.is_empty() {
            return Ok(());
        }
        self.any_sent_in_stream = true;
        if !self.link.abilities().ordered {
            self.link.drain(&self.stop)?;
        }
        let mut pages = InlinePages::new(Arc::clone(&self.guest.memory));
        while let Some(batch) = self.declined.last() {
            pages.write(batch, self.link.sink(), &self.stop)?;
            self.figures.counted(batch);
            self.spare.extend(self.declined.pop());
        }
        let counts = pages.counts();
        self.sent_in_stream.normal += counts.normal;
        self.sent_in_stream.zero += counts.zero;
        Ok(())
    }

    fn make_room(&mut self) -> Result<(), Error> {
        self.link.drain(&self.stop)?;
        self.take_returned()
    }

    /// Takes back what the link has finished.
    pub(super) fn take_returned(&mut self) -> Result<(), Error> {
        self.link.collect(&mut self.returned)?;
        let mut found_zero = 0;
        for returned in self.returned.drain(..) {
            debug_assert!(matches!(returned.receipt, Receipt::Released | Receipt::Placed));
            self.figures.counted(&returned.batch);
            found_zero += returned.batch.zero_pages();
            self.spare.push(returned.batch);
        }
        if self.settings.zero_detection.with(self.link.abilities().classifies) == ZeroDetection::Channels {
            // Charged as whole ones, and found to be zero on their way.
            self.pace.refund(self.bytes_of(found_zero, 0));
        }
        Ok(())
    }
}
