//! Chunks: how a block is divided for registration, how runs of pages merge, and which keys are held.
//!
//! A block is divided into chunks of 1 MiB, counted from the block's own start. A write never crosses a chunk, and
//! needs a key that covers the chunk. A *span* is one or more adjacent chunks registered by one request under one key.
//!
//! [`Merger`] joins neighbouring pieces of pages into one write. [`SpanTable`] records which chunks are registered,
//! decides how many chunks the next request covers, and chooses spans to unregister when the pin budget is used up.

use std::collections::BTreeMap;
use std::ops::Range;

/// log2 of [`CHUNK_BYTES`].
pub const CHUNK_SHIFT: u32 = 20;
/// Bytes of a chunk; part of the protocol.
pub const CHUNK_BYTES: u64 = 1 << CHUNK_SHIFT;
/// Longest zero range in one message: the peer zeroes it in the thread that also reads its stream.
pub const MAX_ZERO_BYTES: u64 = 64 << 20;

/// The chunk that holds `offset` of its block.
pub const fn chunk_of(offset: u64) -> u64 {
    offset >> CHUNK_SHIFT
}

/// Chunks of a block of `length` bytes, the last one perhaps short.
pub const fn chunks_in(length: u64) -> u64 {
    length.div_ceil(CHUNK_BYTES)
}

/// The bytes of `count` chunks from `first`, cut at the end of the block of `length` bytes. `None` if `first` is not
/// in the block or there is no chunk.
pub fn chunk_range(length: u64, first: u64, count: u64) -> Option<Range<u64>> {
    if first >= chunks_in(length) || count == 0 {
        return None;
    }
    let start = first << CHUNK_SHIFT;
    let end = first.saturating_add(count).min(chunks_in(length)) << CHUNK_SHIFT;
    Some(start..end.min(length))
}

/// Whether the bytes of a run are known to be zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Travels as it is.
    Data,
    /// Reads as zero.
    Zero,
}

/// A piece of a block to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Position of the block in the announced list.
    pub block: u32,
    /// Bytes of the block.
    pub range: Range<u64>,
    /// Zero or not.
    pub content: Content,
    /// Number of the oldest save in it.
    pub ticket: u64,
}

impl Run {
    /// Bytes.
    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// True if there is no byte.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

/// Joins runs that touch: data up to the end of a chunk, zeros up to [`MAX_ZERO_BYTES`].
#[derive(Debug, Default)]
pub struct Merger {
    pending: Option<Run>,
}

impl Merger {
    /// Takes a run that does not cross a chunk; returns the runs that must be written before it.
    ///
    /// A short zero run between data costs less if it is written: below `zero_floor` bytes it joins data that it
    /// touches.
    pub fn push(&mut self, run: Run, zero_floor: u64) -> Option<Run> {
        if run.is_empty() {
            return None;
        }
        match &mut self.pending {
            Some(pending) if joins(pending, &run, zero_floor) => {
                pending.range.end = run.range.end;
                None
            }
            pending => pending.replace(run),
        }
    }

    /// Returns the pending run.
    pub fn take(&mut self) -> Option<Run> {
        self.pending.take()
    }

    /// The pending run.
    pub fn pending(&self) -> Option<&Run> {
        self.pending.as_ref()
    }
}

fn joins(pending: &Run, next: &Run, zero_floor: u64) -> bool {
    if pending.block != next.block || pending.range.end != next.range.start {
        return false;
    }
    let same_chunk = chunk_of(pending.range.start) == chunk_of(next.range.end - 1);
    match (pending.content, next.content) {
        (Content::Data, Content::Data) => same_chunk,
        (Content::Data, Content::Zero) => same_chunk && next.len() < zero_floor,
        (Content::Zero, Content::Zero) => pending.len() + next.len() <= MAX_ZERO_BYTES,
        (Content::Zero, Content::Data) => false,
    }
}

/// Identifies a span of a [`SpanTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpanId(u32);

/// Adjacent chunks under one key.
#[derive(Debug)]
pub struct Span<L> {
    /// Position of the block in the announced list.
    pub block: u32,
    /// First chunk.
    pub first: u64,
    /// Chunks.
    pub chunks: u64,
    /// The peer's key.
    pub rkey: u32,
    /// The peer's address of the block's first byte.
    pub base: u64,
    /// This end's own registration of the same bytes.
    pub local: L,
    bytes: u64,
    in_flight: u32,
    used_at: u64,
}

/// The spans the source holds keys for.
#[derive(Debug)]
pub struct SpanTable<L> {
    blocks: Vec<BlockChunks>,
    spans: Vec<Option<Span<L>>>,
    free: Vec<u32>,
    idle_order: BTreeMap<u64, u32>,
    clock: u64,
    pinned_bytes: u64,
    budget_bytes: Option<u64>,
    max_chunks: u64,
}

#[derive(Debug)]
struct BlockChunks {
    length: u64,
    /// Per chunk: number of its span plus one; 0 for none. Grows with use, so an untouched block costs nothing.
    span_of: Vec<u32>,
    /// Where the last span ended, and its length: a walk in address order requests longer and longer spans.
    next: u64,
    grown: u64,
}

impl<L> SpanTable<L> {
    /// No span yet. A single request covers at most `max_chunks`; at most `budget_bytes` are pinned, if given.
    pub fn new(lengths: impl IntoIterator<Item = u64>, max_chunks: u64, budget_bytes: Option<u64>) -> Self {
        let block = |length| BlockChunks { length, span_of: Vec::new(), next: u64::MAX, grown: 0 };
        let affordable = budget_bytes.map_or(u64::MAX, |bytes| (bytes / 4) >> CHUNK_SHIFT);
        Self {
            blocks: lengths.into_iter().map(block).collect(),
            spans: Vec::new(),
            free: Vec::new(),
            idle_order: BTreeMap::new(),
            clock: 0,
            pinned_bytes: 0,
            budget_bytes,
            max_chunks: max_chunks.min(affordable).max(1),
        }
    }

    /// The span that covers a chunk.
    pub fn find(&self, block: u32, chunk: u64) -> Option<SpanId> {
        let slot = *self.blocks.get(block as usize)?.span_of.get(usize::try_from(chunk).ok()?)?;
        slot.checked_sub(1).map(SpanId)
    }

    /// The span itself; `None` once removed.
    pub fn get(&self, id: SpanId) -> Option<&Span<L>> {
        self.spans.get(id.0 as usize)?.as_ref()
    }

    /// How many chunks from `chunk` the next request covers. The first request covers one; each request that continues
    /// where the last span ended covers twice as many. A request never extends into a registered chunk.
    pub fn plan(&self, block: u32, chunk: u64) -> u64 {
        let Some(chunks) = self.blocks.get(block as usize) else { return 1 };
        let wish = if chunks.next == chunk { (chunks.grown * 2).min(self.max_chunks) } else { 1 };
        let last = chunks_in(chunks.length).min(chunk.saturating_add(wish));
        (chunk + 1..last)
            .find(|&next| self.find(block, next).is_some())
            .unwrap_or(last)
            .saturating_sub(chunk)
            .max(1)
    }

    /// True if a walk's last span ended before `chunk`, which is in the block and has no span.
    pub fn continues_at(&self, block: u32, chunk: u64) -> bool {
        let block_continues =
            |block: &BlockChunks| block.next == chunk && chunk < chunks_in(block.length) && block.grown >= 2;
        self.blocks.get(block as usize).is_some_and(block_continues) && self.find(block, chunk).is_none()
    }

    /// Most chunks of a span.
    pub fn max_chunks(&self) -> u64 {
        self.max_chunks
    }

    /// Bytes that a span of these chunks pins.
    pub fn bytes_of(&self, block: u32, first: u64, chunks: u64) -> u64 {
        let length = self.blocks.get(block as usize).map_or(0, |block| block.length);
        chunk_range(length, first, chunks).map_or(0, |range| range.end - range.start)
    }

    /// Which span must be unregistered before `bytes` more may be pinned: the least recently used one that no write is
    /// using. `Ok(None)`: there is room.
    ///
    /// # Errors
    ///
    /// [`AllBusy`]: every span is in use; retry when a write has completed.
    pub fn victim(&self, bytes: u64) -> Result<Option<SpanId>, AllBusy> {
        match self.budget_bytes {
            Some(budget) if self.pinned_bytes.saturating_add(bytes) > budget && self.pinned_bytes > 0 => {
                self.idle_order.values().next().map(|&id| Some(SpanId(id))).ok_or(AllBusy)
            }
            _ => Ok(None),
        }
    }

    /// Enters a registered span of chunks that have none.
    pub fn insert(&mut self, block: u32, first: u64, chunks: u64, rkey: u32, base: u64, local: L) -> SpanId {
        let bytes = self.bytes_of(block, first, chunks);
        self.clock += 1;
        let span = Span { block, first, chunks, rkey, base, local, bytes, in_flight: 0, used_at: self.clock };
        let id = self.free.pop().unwrap_or_else(|| {
            self.spans.push(None);
            (self.spans.len() - 1) as u32
        });
        self.idle_order.insert(self.clock, id);
        self.pinned_bytes += bytes;
        self.mark(&span, id + 1);
        if let Some(chunked) = self.blocks.get_mut(block as usize) {
            (chunked.next, chunked.grown) = (first + chunks, chunks);
        }
        if let Some(slot) = self.spans.get_mut(id as usize) {
            *slot = Some(span);
        }
        SpanId(id)
    }

    /// A write under this span's key was posted.
    pub fn posted(&mut self, id: SpanId) {
        self.clock += 1;
        if let Some(span) = self.spans.get_mut(id.0 as usize).and_then(Option::as_mut) {
            self.idle_order.remove(&span.used_at);
            span.used_at = self.clock;
            span.in_flight += 1;
        }
    }

    /// A write under this span's key completed.
    pub fn retired(&mut self, id: SpanId) {
        if let Some(span) = self.spans.get_mut(id.0 as usize).and_then(Option::as_mut) {
            span.in_flight = span.in_flight.saturating_sub(1);
            if span.in_flight == 0 {
                self.idle_order.insert(span.used_at, id.0);
            }
        }
    }

    /// Takes a span out. `None` if it is gone already or a write is using it.
    pub fn remove(&mut self, id: SpanId) -> Option<Span<L>> {
        let slot = self.spans.get_mut(id.0 as usize)?;
        if slot.as_ref().is_none_or(|span| span.in_flight > 0) {
            return None;
        }
        let span = slot.take()?;
        self.idle_order.remove(&span.used_at);
        self.pinned_bytes -= span.bytes;
        self.mark(&span, 0);
        self.free.push(id.0);
        Some(span)
    }

    /// Bytes pinned at each end.
    pub fn pinned_bytes(&self) -> u64 {
        self.pinned_bytes
    }

    /// Spans held.
    pub fn len(&self) -> usize {
        self.spans.len() - self.free.len()
    }

    /// True if no span is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn mark(&mut self, span: &Span<L>, value: u32) {
        let Some(block) = self.blocks.get_mut(span.block as usize) else { return };
        let end = (span.first + span.chunks).min(chunks_in(block.length)) as usize;
        if block.span_of.len() < end {
            block.span_of.resize(end, 0);
        }
        if let Some(slots) = block.span_of.get_mut(span.first as usize..end) {
            slots.fill(value);
        }
    }
}

/// Every span has a write in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("every registered span has a write in flight")]
pub struct AllBusy;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    fn run(offset: u64, len: u64, content: Content) -> Run {
        Run { block: 0, range: offset..offset + len, content, ticket: 0 }
    }

    #[test]
    fn r27_chunks_count_from_the_block_and_the_last_one_is_cut() {
        assert_eq!((chunk_of(0), chunk_of(0xf_ffff), chunk_of(0x10_0000)), (0, 0, 1));
        assert_eq!(chunk_range(0x28_0000, 2, 1), Some(0x20_0000..0x28_0000));
        assert_eq!(chunk_range(0x28_0000, 0, u64::MAX), Some(0..0x28_0000));
        assert_eq!(chunk_range(0x1000, 0, 1), Some(0..0x1000));
        for (length, first, count) in [(0x20_0000, 2, 1), (0, 0, 1), (0x1000, u64::MAX, 1), (0x1000, 0, 0)] {
            assert_eq!(chunk_range(length, first, count), None, "{length:#x} {first} {count}");
        }
    }

    #[test]
    fn r50_merged_data_ends_at_the_chunk_and_zeros_go_on() {
        use Content::*;
        #[rustfmt::skip]
        let cases = [
            ("neighbours join",            run(0, PAGE, Data),        run(PAGE, PAGE, Data),          true),
            ("a gap does not",             run(0, PAGE, Data),        run(2 * PAGE, PAGE, Data),      false),
            ("backwards does not",         run(PAGE, PAGE, Data),     run(0, PAGE, Data),             false),
            ("the chunk's end cuts",       run(0xf_f000, PAGE, Data), run(0x10_0000, PAGE, Data),     false),
            ("zeros pass the chunk's end", run(0xf_f000, PAGE, Zero), run(0x10_0000, PAGE, Zero),     true),
            ("zeros have a limit",         run(0, MAX_ZERO_BYTES, Zero), run(MAX_ZERO_BYTES, PAGE, Zero), false),
            ("few zeros join data",        run(0, PAGE, Data),        run(PAGE, PAGE, Zero),          true),
            ("many zeros do not",          run(0, PAGE, Data),        run(PAGE, 16 * PAGE, Zero),     false),
            ("data never joins zeros",     run(0, PAGE, Zero),        run(PAGE, PAGE, Data),          false),
        ];
        for (what, first, second, join) in cases {
            let mut merger = Merger::default();
            assert_eq!(merger.push(first.clone(), 16 * PAGE), None);
            let out = merger.push(second.clone(), 16 * PAGE);
            assert_eq!(out, (!join).then_some(first.clone()), "{what}");
            let left = merger.take().unwrap();
            assert_eq!(left.range.end, second.range.end, "{what}");
        }
        let mut merger = Merger::default();
        merger.push(run(0, PAGE, Data), 0);
        let elsewhere = Run { block: 1, ..run(PAGE, PAGE, Data) };
        assert!(merger.push(elsewhere, 0).is_some(), "another block");
    }

    #[test]
    fn r30_a_walk_takes_longer_spans_that_never_overlap() {
        let mut table = SpanTable::new([40 * CHUNK_BYTES + PAGE], 16, None);
        let mut spans = Vec::new();
        let mut chunk = 0;
        table.insert(0, 20, 1, 1, 0, ());
        table.blocks[0].next = u64::MAX;
        while chunk < 41 {
            if table.find(0, chunk).is_some() {
                chunk += 1;
                continue;
            }
            let count = table.plan(0, chunk);
            table.insert(0, chunk, count, 1, 0, ());
            spans.push((chunk, count));
            chunk += count;
        }
        assert_eq!(
            spans,
            [(0, 1), (1, 2), (3, 4), (7, 8), (15, 5), (21, 1), (22, 2), (24, 4), (28, 8), (36, 5)]
        );
        assert_eq!(table.pinned_bytes(), 40 * CHUNK_BYTES + PAGE);
        assert_eq!(table.plan(0, 7), 1, "a jump starts again");
    }

    #[test]
    fn r36_the_budget_gives_back_the_longest_unused_span_without_writes() {
        let mut table = SpanTable::new([8 * CHUNK_BYTES], 64, Some(4 * CHUNK_BYTES));
        let ids: Vec<_> = (0..4).map(|chunk| table.insert(0, chunk * 2, 1, 1, 0, ())).collect();
        table.posted(ids[0]);
        table.posted(ids[1]);
        table.retired(ids[1]);
        assert_eq!(table.victim(CHUNK_BYTES), Ok(Some(ids[2])));
        assert!(table.remove(ids[0]).is_none(), "a write is using it");
        table.remove(ids[2]).unwrap();
        assert_eq!(table.victim(CHUNK_BYTES), Ok(None));
        for &id in &ids[1..] {
            table.posted(id);
        }
        assert_eq!(table.victim(2 * CHUNK_BYTES), Err(AllBusy));
        table.retired(ids[0]);
        assert_eq!(table.victim(2 * CHUNK_BYTES), Ok(Some(ids[0])));
        assert_eq!(table.find(0, 4), None);
        assert_eq!(table.len(), 3);
    }

    proptest! {
        /// Merging changes where runs are cut, never which bytes are sent or in which order.
        #[test]
        fn merging_keeps_every_byte(pages in prop::collection::vec((0u64..600, any::<bool>()), 1..200)) {
            let mut merger = Merger::default();
            let mut out = Vec::new();
            for &(page, zero) in &pages {
                let content = if zero { Content::Zero } else { Content::Data };
                out.extend(merger.push(run(page * PAGE, PAGE, content), 2 * PAGE));
            }
            out.extend(merger.take());
            for run in out.iter().filter(|run| run.content == Content::Data) {
                prop_assert_eq!(chunk_of(run.range.start), chunk_of(run.range.end - 1));
            }
            let seen: Vec<u64> = out.iter().flat_map(|run| run.range.clone().step_by(PAGE as usize)).collect();
            prop_assert_eq!(seen, pages.iter().map(|(page, _)| page * PAGE).collect::<Vec<_>>());
        }
    }
}
