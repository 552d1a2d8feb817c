//! Pages in the byte stream, each after its header: every QEMU supports this.
//!
//! A batch is sent in vectored sends of header, page, header, page; the kernel reads the pages in place. The stream
//! keeps the order, so that a fence costs nothing and every batch is released when its send returns. There is no
//! confirmation of placed pages before the migration's end.

mod delta;
mod destination;

use std::sync::Arc;

use crate::guest::GuestMemory;
use crate::observe::{DeltaCounts, PageCounts};
use crate::ram::{MoverAbilities, PageBatch, Piece, RoundKind, Verdict};
use crate::stream::qemu::ram::{PageAt, Record, continued_page, continued_zero};
use crate::sys::{HostSpan, MAX_PARTS, SendPart, Stop};
use crate::transport::{ByteSink, MoveError, Offer, Receipt, Returned, SourceLink, Ticket};
use crate::units::{BlockIndex, BlockOffset, PageIndex};
pub use delta::DeltaCacheSize;
use delta::{DeltaCache, SentAs};
pub use destination::InlineDestination;

/// Whole pages in one vectored send: a header and a page each, up to the kernel's limit of parts.
const PAGES_PER_SEND: usize = MAX_PARTS / 2;

/// Bytes of headers, deltas and copies after which they are sent.
const MAX_HEADERS: usize = 64 << 10;

/// Bytes of a record's offset and flags, which the counters of deltas leave out.
const WORD: usize = 8;

/// Writes batches as records of the stream; also used for pages that another link declines.
pub struct InlinePages {
    guest: Arc<dyn GuestMemory>,
    /// The block of the last record; the next record of the same block carries no name.
    current: Option<BlockIndex>,
    headers: Vec<u8>,
    /// The cache that deltas are computed against.
    deltas: Option<DeltaCache>,
    /// Number of each block's first page, counted over all blocks.
    numbers: Vec<u64>,
    /// Records written.
    counts: PageCounts,
}

impl InlinePages {
    /// Pages of `guest`; the first record names its block.
    pub fn new(guest: Arc<dyn GuestMemory>) -> Self {
        Self {
            guest,
            current: None,
            headers: Vec::with_capacity(PAGES_PER_SEND * 16),
            deltas: None,
            numbers: Vec::new(),
            counts: PageCounts::default(),
        }
    }

    /// Pages written so far, by the form in which they were sent. A page with the destination's content was not sent.
    pub fn counts(&self) -> PageCounts {
        self.counts
    }

    /// Sends the pages of `batch` into `sink`, inside a ram section.
    ///
    /// # Errors
    /// [`MoveError`]; the number of sent pages is then unknown.
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
        let landing = table.admit_run(piece.run).map_err(crate::guest::GuestError::from)?;
        let zero = piece.verdict == Verdict::Zero;
        // A zero page may have no bytes in memory.
        let span = if zero { None } else { Some(crate::guest::span_of(&**guest, landing)?) };
        let page = table.page();
        let bytes = page.bytes() as usize;
        for index in 0..piece.run.pages {
            let page_index = PageIndex(piece.run.first.0 + index);
            let Some(offset) = page.offset_of(page_index) else { break };
            let page = span.and_then(|span| span.part(index as usize * bytes, bytes));
            let at = (piece.run.block, page_index, offset);
            match page {
                Some(page) => self.write_page(at, page, chunk),
                None => self.write_zero(at),
            }
            if chunk.pages.len() == PAGES_PER_SEND || self.headers.len() > MAX_HEADERS {
                self.flush_chunk(chunk, sink, stop)?;
            }
        }
        Ok(())
    }

    fn write_zero(&mut self, at: At) {
        self.write_head(at, Kind::Zero);
        let number = self.number_of(at);
        if let Some(deltas) = self.deltas.as_mut().filter(|deltas| deltas.is_active()) {
            deltas.zero(number);
        }
    }

    /// Sends a page whole, from guest memory or from the cache, or as a difference, or not at all.
    fn write_page<'g>(&mut self, at: At, page: HostSpan<'g>, chunk: &mut Chunk<'g>) {
        let number = self.number_of(at);
        // Taken out and put back: the record's head is written in between.
        let Some(mut deltas) = self.deltas.take_if(|deltas| deltas.is_active()) else {
            self.write_head(at, Kind::Page);
            return chunk.pages.push((self.headers.len(), page));
        };
        match deltas.page(number, page) {
            SentAs::NotAtAll => {}
            SentAs::Delta(bytes) => {
                let before = self.headers.len() + WORD;
                self.write_head(at, Kind::Delta(bytes.len() as u16));
                let head = self.headers.len() - before;
                self.headers.extend_from_slice(bytes);
                deltas.counts.bytes += head as u64;
            }
            SentAs::Copy(bytes) => {
                self.write_head(at, Kind::Page);
                self.headers.extend_from_slice(bytes);
            }
            SentAs::Whole => {
                self.write_head(at, Kind::Page);
                chunk.pages.push((self.headers.len(), page));
            }
        }
        self.deltas = Some(deltas);
    }

    fn number_of(&self, (block, page, _): At) -> u64 {
        self.numbers.get(block.as_usize()).map_or(0, |first| first + page.0)
    }

    fn write_head(&mut self, (block, _, offset): At, kind: Kind) {
        *match kind {
            Kind::Page => &mut self.counts.normal,
            Kind::Zero => &mut self.counts.zero,
            Kind::Delta(_) => &mut self.counts.delta,
        } += 1;
        if self.current == Some(block) {
            match kind {
                Kind::Page => return self.headers.extend_from_slice(&continued_page(offset)),
                Kind::Zero => return self.headers.extend_from_slice(&continued_zero(offset)),
                Kind::Delta(_) => {}
            }
        }
        let guest = Arc::clone(&self.guest);
        let name = guest.table().get(block).map(|block| block.name.as_str());
        let name = name.filter(|_| self.current != Some(block));
        let at = PageAt { block: name, offset };
        let record = match kind {
            Kind::Page => Record::Page(at),
            Kind::Zero => Record::Zero { at, fill: 0 },
            Kind::Delta(len) => Record::Xbzrle { at, len },
        };
        record.encode(&mut self.headers);
        self.current = Some(block);
    }

    /// Sends the gathered parts: each page after its header bytes.
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

/// Block, page and offset.
type At = (BlockIndex, PageIndex, BlockOffset);

#[derive(Clone, Copy)]
enum Kind {
    Page,
    Zero,
    Delta(u16),
}

/// Pages of one vectored send, each with the length of the headers before it.
struct Chunk<'g> {
    pages: Vec<(usize, HostSpan<'g>)>,
}

impl Default for Chunk<'_> {
    fn default() -> Self {
        Self { pages: Vec::with_capacity(PAGES_PER_SEND) }
    }
}

/// The source's link over any byte channel.
pub struct InlineLink {
    sink: Box<dyn ByteSink>,
    pages: InlinePages,
    finished: Vec<Returned>,
    failed: Vec<PageBatch>,
    tickets: u64,
}

impl InlineLink {
    /// Pages of `guest` are sent into `sink`.
    pub fn new(sink: Box<dyn ByteSink>, guest: Arc<dyn GuestMemory>) -> Self {
        Self { sink, pages: InlinePages::new(guest), finished: Vec::new(), failed: Vec::new(), tickets: 0 }
    }

    /// Pages that were sent before may be sent as differences (XBZRLE) from the second round on, while `size` is not 0.
    #[must_use]
    pub fn with_deltas(mut self, size: DeltaCacheSize) -> Self {
        let table = self.pages.guest.table();
        let mut pages = 0;
        let mut next = |block| {
            let number = pages;
            pages += table.pages_of(block);
            number
        };
        let numbers = table.blocks().iter().map(&mut next).collect();
        let cache = DeltaCache::new(size, table.page().bytes(), pages);
        (self.pages.numbers, self.pages.deltas) = (numbers, Some(cache));
        self
    }
}

impl crate::transport::Sealed for InlineLink {}

impl SourceLink for InlineLink {
    fn abilities(&self) -> MoverAbilities {
        MoverAbilities {
            classifies: false,
            takes_deltas: true,
            exclusive_round: false,
            confirms_placement: false,
            ordered: true,
            registers_memory: false,
            serves_reads: false,
            batches_in_flight: 1,
            batch_pages: PAGES_PER_SEND as u32,
        }
    }

    fn sink(&mut self) -> &mut dyn ByteSink {
        &mut *self.sink
    }

    fn sent_pages(&self) -> Vec<PageCounts> {
        vec![self.pages.counts()]
    }

    fn deltas(&self) -> DeltaCounts {
        self.pages.deltas.as_ref().map_or_else(DeltaCounts::default, |deltas| deltas.counts)
    }

    fn delta_cache_size(&self) -> Option<DeltaCacheSize> {
        self.pages.deltas.as_ref().map(DeltaCache::size)
    }

    fn open_round(&mut self, kind: RoundKind, _stop: &Stop) -> Result<(), MoveError> {
        if let Some(deltas) = self.pages.deltas.as_mut().filter(|_| kind != RoundKind::Setup) {
            deltas.round(kind == RoundKind::Final);
        }
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
