//! The page loop: which page, as what, to the link, a slice at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::{Sent, SourceEvent};
use crate::page::{ZeroDetection, classify};
use crate::ram::{PageBatch, PageRun};
use crate::transport::{InlinePages, Offer, Receipt};

use super::SourceSession;
use super::wire::Wire;
use crate::session::{Breakage, Error, dirty_run};

/// Maximum number of zero pages in a batch: they cost a header each and no look at the clock.
const MAX_BATCH_PAGES: u64 = 16 * 1024;

impl SourceSession {
    /// Sends dirty pages until none is left, or until the engine calls. The peer's messages and the embedder's commands are taken at each batch.
    pub(super) fn send_slice(&mut self) -> Result<SourceEvent, Error> {
        self.poll_return_path()?;
        self.check_layout()?;
        // Also if the limit lets no page leave for long: a link may have to send a keepalive.
        self.take_returned()?;
        self.follow_control();
        self.throttle_vcpus();
        let (before, guest_before) = (self.wire.position(), self.figures.whole_bytes());
        while self.wait_for_pace()? {
            let batch = self.next_batch()?;
            if batch.is_empty() {
                self.pages.done_with(batch);
                break;
            }
            self.offer(batch)?;
            self.fence_within_round()?;
            self.poll_return_path()?;
            if self.driver.is_called() {
                break;
            }
        }
        let position = self.wire.position();
        let bytes = position - before;
        self.figures.position(position);
        let pages_left = self.pages.dirty.count();
        self.figures.sent(self.driver.clock.now(), bytes, pages_left, self.driver.engine.rate());
        self.figures.channel_bytes(self.wire.channel_bytes());
        self.figures.deltas(self.wire.deltas());
        self.driver.engine.set_unacknowledged(self.wire.link.unacknowledged());
        let guest = self.figures.whole_bytes() - guest_before;
        Ok(SourceEvent::Sent { pages_left, sent: Sent { guest, wire: bytes } })
    }

    /// Waits until the rate limit lets the next batch leave, and takes the peer's messages meanwhile; false if the engine
    /// calls before.
    fn wait_for_pace(&mut self) -> Result<bool, Error> {
        while !self.driver.engine.is_last_round() {
            let now = self.driver.clock.now();
            let delay = self.pages.delay(now);
            if delay == Duration::ZERO {
                break;
            }
            let left = self.driver.engine.wake_at().map_or(delay, |at| at.saturating_sub(now));
            self.listen_for(delay.min(left))?;
            if self.driver.is_called() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Gathers runs until the batch is full or nothing is dirty.
    fn next_batch(&mut self) -> Result<PageBatch, Error> {
        let full = u64::from(self.wire.link.abilities().batch_pages);
        let full = self.pages.batch_pages(full, !self.driver.engine.is_last_round());
        self.pages.settle_hints();
        let mut batch = self.pages.fresh_batch();
        while batch.whole_pages() < full && batch.pages() < MAX_BATCH_PAGES {
            let room = full - batch.whole_pages();
            let Some(run) = self.pages.next_run(room) else { break };
            if let Err(error) = self.classify_run(run, &mut batch) {
                self.pages.dirty.set_run(run);
                self.pages.mark_unsent(&batch);
                return Err(error);
            }
        }
        if let Err(error) = self.pages.prints.make(&*self.guest.memory, &batch) {
            self.pages.mark_unsent(&batch);
            return Err(error);
        }
        Ok(batch)
    }

    fn classify_run(&mut self, run: PageRun, batch: &mut PageBatch) -> Result<(), Error> {
        let detection = self.settings.zero_detection.with(self.wire.link.abilities().classifies);
        if self.breakage.is(Breakage::ReadBeforeProtect) {
            let chunk = self.pages.dirty.take_clear_chunk(run);
            classify(&*self.guest.memory, run, detection, batch)?;
            let torn = std::mem::take(batch);
            self.offer(torn)?;
            return dirty_run::reprotect(&self.guest.dirty, chunk);
        }
        let guest = (&*self.guest.memory, self.guest.dirty.as_slice());
        dirty_run::read(guest, &mut self.pages.dirty, run, detection, batch)
    }

    /// Hands a batch to the link; waits while it is full.
    fn offer(&mut self, batch: PageBatch) -> Result<(), Error> {
        let begun = Instant::now();
        let mut bytes = self.pages.bytes_of(batch.whole_pages(), batch.zero_pages());
        let (now, before) = (self.driver.clock.now(), self.wire.position());
        if let Some(unconfirmed) =
            self.pages.unconfirmed.as_mut().filter(|_| self.breakage.is(Breakage::TrustPosted))
        {
            batch.pieces().iter().for_each(|piece| unconfirmed.trust(piece.run));
        }
        let mut batch = batch;
        loop {
            match self.wire.link.offer(batch, &self.wire.stop)? {
                Offer::Taken(_) => break,
                Offer::Full(back) => {
                    batch = back;
                    if let Err(error) = self.make_room() {
                        self.pages.mark_unsent(&batch);
                        return Err(error);
                    }
                }
                Offer::Declined(back) => {
                    self.pages.put_aside(back);
                    break;
                }
            }
        }
        if self.wire.link.deltas().cache_size > 0 {
            // Such a link writes at once, and how much is known only now.
            bytes = self.wire.position() - before;
        }
        self.pages.pace.charge(now, bytes);
        if self.driver.control.max_bandwidth().is_some() {
            // The effect of a limit must show between slices, too.
            let position = self.wire.position();
            self.figures.position(position);
        }
        self.figures.offered(begun.elapsed());
        self.take_returned()
    }

    /// What the link declined in the round that was just closed goes in the stream. Bytes of a link that is
    /// not ordered could overtake its pages: they wait for them.
    pub(super) fn send_declined(&mut self) -> Result<(), Error> {
        if !self.pages.has_aside() {
            return Ok(());
        }
        let Wire { link, stop, .. } = &mut self.wire;
        if !link.abilities().ordered {
            link.drain(stop)?;
        }
        let mut inline = InlinePages::new(Arc::clone(&self.guest.memory));
        while let Some(batch) = self.pages.take_aside() {
            if let Err(error) = inline.write(&batch, link.sink(), stop) {
                self.pages.put_aside(batch);
                return Err(error.into());
            }
            self.figures.counted(&batch);
            self.pages.done_with(batch);
        }
        self.pages.sent_aside(inline.counts());
        Ok(())
    }

    fn make_room(&mut self) -> Result<(), Error> {
        self.wire.link.drain(&self.wire.stop)?;
        self.take_returned()
    }

    /// Takes back what the link has finished.
    pub(super) fn take_returned(&mut self) -> Result<(), Error> {
        self.wire.link.collect(&mut self.pages.returned)?;
        let mut found_zero = 0;
        let mut batches = std::mem::take(&mut self.pages.returned);
        for returned in batches.drain(..) {
            debug_assert!(matches!(returned.receipt, Receipt::Released | Receipt::Placed));
            self.figures.counted(&returned.batch);
            found_zero += returned.batch.zero_pages();
            if self.breakage.is(Breakage::TrustCompleted) {
                self.pages.trust(&returned);
            }
            self.pages.done_with(returned.batch);
        }
        self.pages.returned = batches;
        if self.settings.zero_detection.with(self.wire.link.abilities().classifies) == ZeroDetection::Channels
        {
            // Charged as whole ones, and found to be zero on their way.
            self.pages.pace.refund(self.pages.bytes_of(found_zero, 0));
        }
        Ok(())
    }
}
