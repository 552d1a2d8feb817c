//! Pages in the byte stream, each behind its header: what every QEMU understands.
//!
//! A batch leaves in vectored sends of header, page, header, page; the kernel reads the pages in place.
//! Order is the stream's own, so that a fence costs nothing and every batch is released when its send
//! returns. Nothing tells that a page was placed before the migration's end.

use std::sync::Arc;

use super::{ByteSink, MoveError, Offer, Receipt, Returned, SourceLink, Ticket};
use crate::guest::GuestMemory;
use crate::ram::{MoverAbilities, PageBatch, Piece, RoundKind, Verdict};
use crate::stream::qemu::ram::{PageAt, Record, continued_page, continued_zero};
use crate::sys::{HostSpan, MAX_PARTS, SendPart, Stop};
use crate::units::{BlockIndex, PageIndex};

/// Whole pages in one vectored send: a header and a page each fill the kernel's limit of parts.
const PAGES_PER_SEND: usize = MAX_PARTS / 2;

/// Writes batches as records of the stream; what a door of its own declines goes this way, too.
pub struct InlinePages {
    guest: Arc<dyn GuestMemory>,
    /// The block of the last record; the next one of the same block carries no name.
    current: Option<BlockIndex>,
    headers: Vec<u8>,
}

impl InlinePages {
    /// Pages of `guest`; the first record names its block.
    pub fn new(guest: Arc<dyn GuestMemory>) -> Self {
        Self { guest, current: None, headers: Vec::with_capacity(PAGES_PER_SEND * 16) }
    }

    /// Sends the pages of `batch` into `sink`, inside a ram section.
    ///
    /// # Errors
    /// [`MoveError`]; how many pages went is then unknown.
    pub fn write(
        &mut self,
        batch: &PageBatch,
        sink: &mut dyn ByteSink,
        stop: &Stop,
    ) -> Result<(), MoveError> {
        let guest = Arc::clone(&self.guest);
        let mut chunk = Chunk::default();
        for piece in batch.pieces() {
            self.write_piece(&guest, piece, &mut chunk, sink, stop)?;
        }
        self.flush_chunk(&mut chunk, sink, stop)
    }

    fn write_piece<'g>(
        &mut self,
        guest: &'g Arc<dyn GuestMemory>,
        piece: &Piece,
        chunk: &mut Chunk<'g>,
        sink: &mut dyn ByteSink,
        stop: &Stop,
    ) -> Result<(), MoveError> {
        let table = guest.table();
        let span = guest.span(table.admit_run(piece.run).map_err(crate::guest::GuestError::from)?)?;
        let page = table.page();
        let bytes = page.bytes() as usize;
        for index in 0..piece.run.pages {
            let page_index = PageIndex(piece.run.first.0 + index);
            let Some(offset) = page.offset_of(page_index) else { break };
            let zero = piece.verdict == Verdict::Zero;
            if self.current == Some(piece.run.block) {
                match zero {
                    true => self.headers.extend_from_slice(&continued_zero(offset)),
                    false => self.headers.extend_from_slice(&continued_page(offset)),
                }
            } else {
                let at = PageAt { block: table.get(piece.run.block).map(|b| b.name.as_str()), offset };
                let record = if zero { Record::Zero { at, fill: 0 } } else { Record::Page(at) };
                record.encode(&mut self.headers);
                self.current = Some(piece.run.block);
            }
            if !zero {
                let page = span.part(index as usize * bytes, bytes);
                chunk.pages.extend(page.map(|page| (self.headers.len(), page)));
            }
            if chunk.pages.len() == PAGES_PER_SEND || self.headers.len() > PAGES_PER_SEND * 16 {
                self.flush_chunk(chunk, sink, stop)?;
            }
        }
        Ok(())
    }

    /// Sends what was gathered: each page behind the header bytes that end where it is due.
    fn flush_chunk(
        &mut self,
        chunk: &mut Chunk<'_>,
        sink: &mut dyn ByteSink,
        stop: &Stop,
    ) -> Result<(), MoveError> {
        let mut parts = [SendPart::Own(&[]); MAX_PARTS + 1];
        let mut used = 0;
        let mut from = 0;
        for (upto, page) in &chunk.pages {
            parts[used] = SendPart::Own(&self.headers[from..*upto]);
            parts[used + 1] = SendPart::Guest(*page);
            (used, from) = (used + 2, *upto);
        }
        if from < self.headers.len() {
            parts[used] = SendPart::Own(&self.headers[from..]);
            used += 1;
        }
        let sent = sink.send(&parts[..used], stop);
        chunk.pages.clear();
        self.headers.clear();
        Ok(sent?)
    }
}

/// Pages of one vectored send, each with the length of the headers in front of it.
struct Chunk<'g> {
    pages: Vec<(usize, HostSpan<'g>)>,
}

impl Default for Chunk<'_> {
    fn default() -> Self {
        Self { pages: Vec::with_capacity(PAGES_PER_SEND) }
    }
}

/// The door that every byte channel has.
pub struct InlineLink {
    sink: Box<dyn ByteSink>,
    pages: InlinePages,
    finished: Vec<Returned>,
    failed: Vec<PageBatch>,
    tickets: u64,
}

impl InlineLink {
    /// Pages of `guest` go into `sink`.
    pub fn new(sink: Box<dyn ByteSink>, guest: Arc<dyn GuestMemory>) -> Self {
        Self { sink, pages: InlinePages::new(guest), finished: Vec::new(), failed: Vec::new(), tickets: 0 }
    }
}

impl SourceLink for InlineLink {
    fn abilities(&self) -> MoverAbilities {
        MoverAbilities {
            classifies: false,
            takes_deltas: true,
            exclusive_round: false,
            confirms_placement: false,
            ordered: true,
            registers_memory: false,
            batches_in_flight: 1,
            batch_pages: PAGES_PER_SEND as u32,
        }
    }

    fn sink(&mut self) -> &mut dyn ByteSink {
        &mut *self.sink
    }

    fn open_round(&mut self, _kind: RoundKind, _stop: &Stop) -> Result<(), MoveError> {
        Ok(())
    }

    fn offer(&mut self, batch: PageBatch, stop: &Stop) -> Result<Offer, MoveError> {
        if let Err(error) = self.pages.write(&batch, &mut *self.sink, stop) {
            self.failed.push(batch);
            return Err(error);
        }
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        self.finished.push(Returned { ticket, receipt: Receipt::Released, batch });
        Ok(Offer::Taken(ticket))
    }

    fn collect(&mut self, out: &mut Vec<Returned>) -> Result<(), MoveError> {
        out.append(&mut self.finished);
        Ok(())
    }

    fn close_round(&mut self, _kind: RoundKind, _stop: &Stop) -> Result<(), MoveError> {
        Ok(())
    }

    fn drain(&mut self, stop: &Stop) -> Result<(), MoveError> {
        Ok(self.sink.flush(stop)?)
    }

    fn reclaim(&mut self) -> Vec<PageBatch> {
        std::mem::take(&mut self.failed)
    }
}
