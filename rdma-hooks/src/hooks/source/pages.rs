//! Sending pages: merged to runs, written or reported as zero, in an order that keeps every byte correct.

use std::ops::Range;

use super::SourceHooks;
use crate::blocks::BlockError;
use crate::channel::WriteNote;
use crate::chunk::{CHUNK_BYTES, Content, MAX_ZERO_BYTES, Run, chunk_of};
use crate::fabric::WriteRequest;
use crate::hooks::{BlockSpan, Delay, HooksError, PageContent, RamControl, Reason, SaveDisposition, Ticket};
use crate::stop::Stop;

impl SourceHooks {
    /// Hook: pages to save. They join neighbouring ones into one write per chunk; keys are requested on demand; zero
    /// runs are sent as messages, not written. Waits only for keys, credits and room in the queue.
    ///
    /// The dirty log's bits of the pages must be cleared before the call, and each page is saved at most once between
    /// two rounds' ends with the latest content: the device reads memory at some time after the call.
    ///
    /// # Errors
    ///
    /// Anything: the migration over this connection is over.
    pub fn control_save_page(&mut self, span: BlockSpan, stop: &Stop) -> Result<SaveDisposition, HooksError> {
        if self.postcopy {
            return Ok(SaveDisposition::NotSupported(Reason::Postcopy));
        }
        if self.enter_round(stop)? == RamControl::Setup {
            return Err(HooksError::OutOfOrder("no pages in the setup round"));
        }
        let count = self.blocks.len();
        let missing = BlockError::NoSuchIndex { index: span.block, count };
        let range = self.blocks.get(span.block as usize).ok_or(missing)?.range(span.offset, span.len)?;
        self.ticket += 1;
        match span.content {
            PageContent::Data => self.push(span.block, range, Content::Data, stop)?,
            PageContent::Zero => self.push(span.block, range, Content::Zero, stop)?,
            PageContent::Unknown => self.classify_and_push(span.block, range, stop)?,
        }
        self.pump()?;
        let state = match self.merger.pending() {
            Some(run) if run.content == Content::Data => Delay::Merging,
            Some(_) => Delay::Zeroed,
            None => Delay::Posted,
        };
        Ok(SaveDisposition::Delayed { ticket: Ticket(self.ticket), state })
    }

    /// Cuts a range at changes between zero and data.
    fn classify_and_push(&mut self, block: u32, range: Range<u64>, stop: &Stop) -> Result<(), HooksError> {
        let step = self.config.page_bytes.max(1);
        let content_at = |hooks: &Self, at: u64| -> Result<Content, HooksError> {
            let end = (at + step).min(range.end);
            let page = hooks.blocks[block as usize].part(at..end)?;
            let zero = page.is_zero(0, end - at).unwrap_or(false);
            Ok(if zero { Content::Zero } else { Content::Data })
        };
        let mut start = range.start;
        while start < range.end {
            let content = content_at(self, start)?;
            let mut end = (start + step).min(range.end);
            while end < range.end && content_at(self, end)? == content {
                end = (end + step).min(range.end);
            }
            self.push(block, start..end, content, stop)?;
            start = end;
        }
        Ok(())
    }

    /// Cuts a range into runs the merger takes.
    fn push(
        &mut self,
        block: u32,
        range: Range<u64>,
        content: Content,
        stop: &Stop,
    ) -> Result<(), HooksError> {
        let mut start = range.start;
        while start < range.end {
            let most = match content {
                Content::Data => CHUNK_BYTES - start % CHUNK_BYTES,
                Content::Zero => MAX_ZERO_BYTES,
            };
            let end = range.end.min(start + most);
            let run = Run { block, range: start..end, content, ticket: self.ticket };
            if let Some(ready) = self.merger.push(run, self.zero_floor()) {
                self.write_out(ready, stop)?;
            }
            // No later run can join a run that ends at its chunk's end.
            let full = |run: &Run| run.content == Content::Data && run.range.end.is_multiple_of(CHUNK_BYTES);
            if self.merger.pending().is_some_and(full)
                && let Some(ready) = self.merger.take()
            {
                self.write_out(ready, stop)?;
            }
            start = end;
        }
        Ok(())
    }

    fn write_out(&mut self, run: Run, stop: &Stop) -> Result<(), HooksError> {
        if run.content == Content::Data || self.is_cheaper_written(&run) {
            let mut start = run.range.start;
            while start < run.range.end {
                let end = run.range.end.min((chunk_of(start) + 1) * CHUNK_BYTES);
                self.write(&Run { range: start..end, ..run.clone() }, stop)?;
                start = end;
            }
            return Ok(());
        }
        self.queue_zero_run(run, stop)
    }

    /// A few zeros cost less as written bytes than as a message, if the key is at hand.
    fn is_cheaper_written(&self, run: &Run) -> bool {
        let chunks = chunk_of(run.range.start)..=chunk_of(run.range.end - 1);
        run.len() < self.zero_floor()
            && (!self.pinned.is_empty()
                || chunks.into_iter().all(|chunk| self.spans.find(run.block, chunk).is_some()))
    }

    fn write(&mut self, run: &Run, stop: &Stop) -> Result<(), HooksError> {
        self.wait_for_zeroing(run, stop)?;
        let keys = self.keys(run, stop)?;
        let chunk = chunk_of(run.range.start);
        let queue = self.queue_of(run.block, chunk);
        while self.channel(queue).room() == 0 {
            self.channel(queue).ring()?;
            if !self.pump()? && self.channel(queue).room() == 0 {
                self.rest(queue, stop)?;
            }
        }
        if let Some(span) = keys.span {
            self.spans.posted(span);
        }
        if !self.main.data_queues.is_empty() {
            *self.chunk_flights.entry((run.block, chunk)).or_default() += 1;
        }
        let request = WriteRequest {
            id: 0,
            lkey: keys.lkey,
            from: keys.from,
            len: run.len() as u32,
            rkey: keys.rkey,
            to: keys.to,
            signalled: false,
        };
        let note = WriteNote { span: keys.span, block: run.block, chunk, ticket: run.ticket };
        self.channel(queue).write(request, note)?;
        match keys.span {
            Some(span) => self.ask_ahead(span, chunk, stop),
            None => Ok(()),
        }
    }

    /// All writes to a chunk use one queue pair, so they keep their order.
    pub(super) fn queue_of(&self, block: u32, chunk: u64) -> usize {
        let queues = self.queue_pairs() as u64;
        ((chunk + u64::from(block)) % queues) as usize
    }

    pub(super) fn flush_pages(&mut self, stop: &Stop) -> Result<(), HooksError> {
        if let Some(run) = self.merger.take() {
            self.write_out(run, stop)?;
        }
        self.send_gathered(stop)?;
        self.ring()
    }
}
