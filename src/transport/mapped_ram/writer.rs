//! A thread that writes pages to their offsets in the file.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crossbeam::channel::{Receiver, Sender};

use super::file::MappedFile;
use crate::guest::{GuestError, GuestMemory};
use crate::observe::PageCounts;
use crate::ram::{AtomicBitmap, PageBatch, PageRun, Verdict};
use crate::stream::qemu::mapped_stream::Places;
use crate::sys::{Stop, is_zero, look_ahead};
use crate::transport::{ChannelError, MoveError, Receipt, Returned, Ticket};
use crate::units::PageIndex;

const WRITING: &str = "writing pages";

/// The offsets of a block's pages.
#[derive(Debug)]
pub(super) struct Slots {
    pub(super) bitmap_offset: u64,
    pages_offset: u64,
    page_bytes: u64,
    /// Pages that are in the file.
    pub(super) present: AtomicBitmap,
}

impl Slots {
    pub(super) fn new(places: &Places) -> Self {
        Self {
            bitmap_offset: places.header.bitmap_offset,
            pages_offset: places.header.pages_offset,
            page_bytes: places.header.page_size.bytes(),
            present: AtomicBitmap::new(places.pages()),
        }
    }

    fn offset(&self, page: PageIndex) -> u64 {
        self.pages_offset + page.0 * self.page_bytes
    }
}

/// What all threads have written.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// By the block's position in the list; set once the list was written.
    pub(super) slots: OnceLock<Vec<Slots>>,
    pub(super) bytes: AtomicU64,
    /// What is not in the file is in another one: a zero page is in it, as a hole.
    pub(super) zeros_stay: AtomicBool,
    normal: AtomicU64,
    zero: AtomicU64,
}

impl Written {
    /// Number of pages so far; a page counts each time that it is written.
    pub(super) fn counts(&self) -> PageCounts {
        let [normal, zero] = [&self.normal, &self.zero].map(|count| count.load(Ordering::Relaxed));
        PageCounts { normal, zero, delta: 0 }
    }
}

/// What a thread answers.
#[derive(Debug)]
pub(super) enum Done {
    /// The pages are in the file, or known to be zero. Pages that were not scanned have a verdict now.
    Written(Returned),
    /// They are not.
    Failed(PageBatch, MoveError),
}

/// One thread and its resources.
pub(super) struct PageWriter {
    pub(super) file: Arc<MappedFile>,
    pub(super) guest: Arc<dyn GuestMemory>,
    pub(super) written: Arc<Written>,
    pub(super) work: Receiver<(Ticket, PageBatch)>,
    pub(super) done: Sender<Done>,
    pub(super) stop: Stop,
}

impl PageWriter {
    /// Works until the queue is closed. `done` has no receiver only after the link is gone.
    pub(super) fn run(self) {
        let mut spare = PageBatch::default();
        while let Ok((ticket, batch)) = self.work.recv() {
            spare.clear();
            let done = match self.write_batch(&batch, &mut spare) {
                Ok(()) => {
                    let looked_at = std::mem::replace(&mut spare, batch);
                    Done::Written(Returned { ticket, receipt: Receipt::Released, batch: looked_at })
                }
                Err(error) => Done::Failed(batch, error),
            };
            let _ = self.done.send(done);
        }
    }

    fn write_batch(&self, batch: &PageBatch, looked_at: &mut PageBatch) -> Result<(), MoveError> {
        for piece in batch.pieces() {
            match piece.verdict {
                Verdict::Unknown => self.look_at(piece.run, looked_at)?,
                verdict => looked_at.push(piece.run, verdict),
            }
        }
        for piece in looked_at.pieces() {
            if let Some(reason) = self.stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: WRITING }.into());
            }
            if piece.verdict == Verdict::Zero { self.clear(piece.run)? } else { self.write_run(piece.run)? }
        }
        Ok(())
    }

    fn look_at(&self, run: PageRun, looked_at: &mut PageBatch) -> Result<(), MoveError> {
        let table = self.guest.table();
        let span = self.guest.span(table.admit_run(run).map_err(GuestError::from)?)?;
        let bytes = table.page().bytes() as usize;
        for index in 0..run.pages {
            look_ahead(span, index as usize, bytes);
            let Some(page) = span.part(index as usize * bytes, bytes) else { break };
            let verdict = if is_zero(page) { Verdict::Zero } else { Verdict::Whole };
            looked_at.push(PageRun { first: PageIndex(run.first.0 + index), pages: 1, ..run }, verdict);
        }
        Ok(())
    }

    fn slots(&self, run: PageRun) -> Result<&Slots, MoveError> {
        let slots = self.written.slots.get().and_then(|slots| slots.get(run.block.as_usize()));
        slots.ok_or_else(|| {
            let source = std::io::Error::other("the RAM block was not announced");
            self.file.failed(WRITING, source).into()
        })
    }

    fn write_run(&self, run: PageRun) -> Result<(), MoveError> {
        let slots = self.slots(run)?;
        let span = self.guest.span(self.guest.table().admit_run(run).map_err(GuestError::from)?)?;
        let mut done = 0;
        while done < span.len() {
            let at = slots.offset(run.first) + done as u64;
            match self.file.write_pages(span, done, at) {
                Ok(0) => {
                    let source = std::io::Error::from(std::io::ErrorKind::WriteZero);
                    return Err(self.file.failed_at(WRITING, at, &source).into());
                }
                Ok(count) => {
                    done += count;
                    self.written.bytes.fetch_add(count as u64, Ordering::Relaxed);
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.file.failed_at(WRITING, at, &error).into()),
            }
        }
        slots.present.set(run.first, run.pages);
        self.written.normal.fetch_add(run.pages, Ordering::Relaxed);
        Ok(())
    }

    /// Zero pages are not in the file; pages that were there in an earlier round become holes.
    fn clear(&self, run: PageRun) -> Result<(), MoveError> {
        let slots = self.slots(run)?;
        let in_file = |page: u64| slots.present.get(PageIndex(page));
        let mut pages = run.first.0..run.end().0;
        while let Some(first) = pages.find(|page| in_file(*page)) {
            let end = (first..run.end().0).find(|page| !in_file(*page)).unwrap_or(run.end().0);
            let (offset, len) = (slots.offset(PageIndex(first)), (end - first) * slots.page_bytes);
            slots.present.clear(PageIndex(first), end - first);
            let punched = self.file.punch(offset, len);
            punched.map_err(|error| self.file.failed_at("making a hole", offset, &error))?;
            pages.start = end;
        }
        if self.written.zeros_stay.load(Ordering::Relaxed) {
            slots.present.set(run.first, run.pages);
        }
        self.written.zero.fetch_add(run.pages, Ordering::Relaxed);
        Ok(())
    }
}
