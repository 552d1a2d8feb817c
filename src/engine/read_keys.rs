//! The keys with which a destination reads missing pages from its source's memory (RDMA READ), after a switch to
//! postcopy.
//!
//! The source cuts what is missing into spans, and grants a key for each. The destination reports a span as received
//! when all its missing pages are placed, and the source then revokes that key:
//!
//! ```text
//! source        waiting -> granted ------------------------> received -> revoked   all revoked: END
//! destination              granted -> read, placed -> whole -> reported
//! ```
//!
//! # Orders that must hold
//!
//! A key is revoked when the destination has reported its span, not before: a READ with a revoked key fails, and with it
//! all others of its queue pair. A page may be read twice at a time, once because a thread waits for it; so a span is
//! reported when all its pages are placed and none of it is being read. A key is
//! revoked before the span's memory is given back: registered memory stays where it is (order 7). The end is sent when
//! every span was reported and every key revoked. A span that has no missing page has no key.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::ram::{DirtyMap, PageRun, RamBlockTable};
use crate::units::{BlockIndex, PageIndex};

/// Shortest span, in bytes; a longer one if a block is so large that it would have more than [`MAX_OF_BLOCK`].
const SPAN: u64 = 16 << 20;
/// Maximum number of spans of one block.
const MAX_OF_BLOCK: u64 = 4096;
/// Maximum number of keys that a destination keeps.
const MAX_KEYS: usize = 1 << 16;

/// Where a span is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SpanState {
    Waiting,
    Granted,
    Received,
    Revoked,
}

#[derive(Clone, Debug)]
struct Span {
    run: PageRun,
    /// Missing pages in it.
    pages: u64,
    state: SpanState,
}

/// Orders that tests leave out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) enum KeyBreakage {
    #[default]
    None,
    /// A key is revoked while the destination reads.
    RevokeEarly,
    /// Memory is given back before its key is revoked.
    RevokeLate,
    /// The end is sent when all keys are granted.
    EndWhenGranted,
    /// A span counts as whole when its first page is placed.
    ReportEarly,
    /// A span is reported while a part of it is read.
    ReportWhileRead,
    /// A span whose key could not be made is not tried again.
    ForgetPutOff,
}

impl KeyBreakage {
    fn is(self, order: Self) -> bool {
        cfg!(test) && self == order
    }
}

/// The source's side. Spans are numbered from 0.
#[derive(Debug, Default)]
pub(crate) struct ServedKeys {
    spans: Vec<Span>,
    /// Without a key, the next one first.
    waiting: VecDeque<u32>,
    /// Received, and their keys not revoked.
    received: VecDeque<u32>,
    /// No key can be made until one is revoked.
    is_full: bool,
    breakage: KeyBreakage,
}

impl ServedKeys {
    /// Spans of the pages that are `dirty`, which are whole host pages.
    pub(crate) fn new(table: &RamBlockTable, dirty: &DirtyMap) -> Self {
        Self::in_spans_of(SPAN, table, dirty)
    }

    pub(crate) fn in_spans_of(shortest: u64, table: &RamBlockTable, dirty: &DirtyMap) -> Self {
        let mut spans = Vec::new();
        for (index, block) in (0..).map(BlockIndex).zip(table.blocks()) {
            let Some(map) = dirty.block(index) else { continue };
            let bytes = (block.used_length / MAX_OF_BLOCK).max(shortest).next_multiple_of(shortest);
            let bytes = bytes.next_multiple_of(block.host_page.bytes());
            let length = (bytes / table.page().bytes()).max(1);
            let mut from = PageIndex(0);
            while let Some(next) = map.next_run(from, u64::MAX) {
                let end = (next.start / length + 1) * length;
                let (mut at, mut pages, mut last) = (next.start, 0, next.start);
                while let Some(run) = map.next_run(PageIndex(at), u64::MAX).filter(|run| run.start < end) {
                    (at, last) = (run.end.min(end), run.end.min(end));
                    pages += last - run.start;
                }
                let run = PageRun { block: index, first: PageIndex(next.start), pages: last - next.start };
                spans.push(Span { run, pages, state: SpanState::Waiting });
                from = PageIndex(last);
            }
        }
        let waiting = (0..spans.len() as u32).collect();
        Self { spans, waiting, ..Self::default() }
    }

    fn state(&self, number: u32) -> Option<SpanState> {
        self.spans.get(number as usize).map(|span| span.state)
    }

    fn set(&mut self, number: u32, state: SpanState) {
        if let Some(span) = self.spans.get_mut(number as usize) {
            span.state = state;
        }
    }

    /// The span that gets its key next: memory is registered, and the key sent. [`granted`](Self::granted) follows.
    pub(crate) fn next_grant(&mut self) -> Option<(u32, PageRun)> {
        if self.is_full {
            return None;
        }
        let number = self.waiting.pop_front()?;
        self.spans.get(number as usize).map(|span| (number, span.run))
    }

    /// The key of a span could not be made, while there are others: it is tried again when one of those is revoked.
    pub(crate) fn put_off(&mut self, number: u32) {
        if !self.breakage.is(KeyBreakage::ForgetPutOff) {
            self.waiting.push_front(number);
        }
        self.is_full = true;
    }

    /// Its key exists, and is about to be sent.
    pub(crate) fn granted(&mut self, number: u32) {
        debug_assert_eq!(self.state(number), Some(SpanState::Waiting));
        self.set(number, SpanState::Granted);
    }

    /// A thread at the destination waits for a page of which it has no key yet: that span is next.
    pub(crate) fn want(&mut self, page: PageRun) {
        let holds = |number: &&u32| {
            self.spans.get(**number as usize).is_some_and(|Span { run, .. }| {
                run.block == page.block && (run.first..run.end()).contains(&page.first)
            })
        };
        let Some(number) = self.waiting.iter().find(holds).copied() else { return };
        self.waiting.retain(|waiting| *waiting != number);
        self.waiting.push_front(number);
    }

    /// The destination reports that it has all of a span. False if that is no span whose key it has.
    #[must_use = "a report out of turn is the peer's failure"]
    pub(crate) fn received(&mut self, number: u32) -> bool {
        let early =
            self.breakage.is(KeyBreakage::RevokeEarly) && self.state(number) == Some(SpanState::Received);
        if self.state(number) != Some(SpanState::Granted) {
            return early;
        }
        self.set(number, SpanState::Received);
        self.received.push_back(number);
        true
    }

    /// A key that is to be revoked now. [`revoked`](Self::revoked) follows.
    pub(crate) fn next_revocation(&mut self) -> Option<(u32, PageRun)> {
        let granted = |span: &Span| span.state == SpanState::Granted;
        if self.breakage.is(KeyBreakage::RevokeEarly)
            && let Some(at) = self.spans.iter().position(granted)
        {
            self.set(at as u32, SpanState::Received);
            return Some((at as u32, self.spans[at].run));
        }
        let number = self.received.pop_front()?;
        self.spans.get(number as usize).map(|span| (number, span.run))
    }

    /// A key is revoked: the destination has these pages, and nothing reads them here any more. The memory may be given
    /// back.
    pub(crate) fn revoked(&mut self, number: u32) {
        self.is_full = false;
        self.set(number, SpanState::Revoked);
    }

    /// Spans whose memory may be given back; in tests also those of an order that is switched off.
    #[cfg(test)]
    pub(crate) fn may_be_given_back(&self) -> impl Iterator<Item = PageRun> + '_ {
        let late = self.breakage.is(KeyBreakage::RevokeLate);
        let gone =
            move |span: &&Span| span.state == SpanState::Revoked || late && span.state == SpanState::Received;
        self.spans.iter().filter(gone).map(|span| span.run)
    }

    /// Pages whose keys are not revoked: the end is sent when there are none.
    pub(crate) fn pages_left(&self) -> u64 {
        let counts = |span: &&Span| match span.state {
            SpanState::Waiting => true,
            SpanState::Granted => !self.breakage.is(KeyBreakage::EndWhenGranted),
            SpanState::Received => true,
            SpanState::Revoked => false,
        };
        self.spans.iter().filter(counts).map(|span| span.pages).sum()
    }

    /// True while a span waits for its key, which can be tried now.
    pub(crate) fn is_granting(&self) -> bool {
        !self.waiting.is_empty() && !self.is_full
    }

    /// True if the destination has a key.
    pub(crate) fn has_keys_out(&self) -> bool {
        self.spans.iter().any(|span| matches!(span.state, SpanState::Granted | SpanState::Received))
    }

    #[cfg(test)]
    pub(crate) fn break_order(&mut self, breakage: KeyBreakage) {
        self.breakage = breakage;
    }
}

/// A key at the destination.
#[derive(Clone, Debug)]
struct Pulled {
    number: u32,
    run: PageRun,
    left: u64,
    /// Reads under way.
    reads: u32,
    is_reported: bool,
}

/// The destination's side: which spans are whole.
#[derive(Debug, Default)]
pub(crate) struct PulledKeys {
    /// By block and first page.
    keys: BTreeMap<(BlockIndex, PageIndex), Pulled>,
    numbers: BTreeSet<u32>,
    /// To be reported.
    whole: VecDeque<u32>,
    /// Keys that are neither reported nor to be reported.
    open: usize,
    breakage: KeyBreakage,
}

impl PulledKeys {
    /// True if a key of this number for `run` is possible: neither the number nor a page is that of another key.
    pub(crate) fn may_add(&self, number: u32, run: PageRun) -> bool {
        let before = self.keys.range(..(run.block, run.end())).next_back();
        let clashes =
            before.is_some_and(|((block, _), key)| *block == run.block && key.run.end() > run.first);
        self.keys.len() < MAX_KEYS && !clashes && !self.numbers.contains(&number)
    }

    /// A key for `run`, of which `missing` pages are missing.
    pub(crate) fn add(&mut self, number: u32, run: PageRun, missing: u64) {
        self.numbers.insert(number);
        let key = Pulled { number, run, left: missing, reads: 0, is_reported: missing == 0 };
        if key.is_reported {
            self.whole.push_back(number);
        } else {
            self.open += 1;
        }
        self.keys.insert((run.block, run.first), key);
    }

    /// A run of one span is taken to be read.
    pub(crate) fn reading(&mut self, run: PageRun) {
        if let Some(key) = self.key_of(run) {
            key.reads += 1;
        }
    }

    /// Pages of one span are placed, `fresh` of which were missing.
    pub(crate) fn placed(&mut self, run: PageRun, fresh: u64) {
        let early = self.breakage.is(KeyBreakage::ReportEarly) && fresh > 0;
        if let Some(key) = self.key_of(run) {
            key.left = if early { 0 } else { key.left.saturating_sub(fresh) };
        }
        if early || self.breakage.is(KeyBreakage::ReportWhileRead) {
            self.report(run, false);
        }
    }

    /// The read of a run has ended, and what it brought is placed.
    pub(crate) fn ended(&mut self, run: PageRun) {
        if let Some(key) = self.key_of(run) {
            key.reads = key.reads.saturating_sub(1);
        }
        self.report(run, true);
    }

    fn report(&mut self, run: PageRun, waits: bool) {
        let Some(key) = self.key_of(run) else { return };
        if key.left == 0 && !key.is_reported && (key.reads == 0 || !waits) {
            key.is_reported = true;
            let number = key.number;
            self.open = self.open.saturating_sub(1);
            self.whole.push_back(number);
        }
    }

    fn key_of(&mut self, run: PageRun) -> Option<&mut Pulled> {
        let found = self.keys.range_mut(..=(run.block, run.first)).next_back();
        found.filter(|((block, _), _)| *block == run.block).map(|(_, key)| key)
    }

    /// A span that is whole, to be reported to the source; each once.
    pub(crate) fn next_whole(&mut self) -> Option<u32> {
        self.whole.pop_front()
    }

    /// True if a span may still become whole.
    pub(crate) fn has_open(&self) -> bool {
        self.open > 0
    }

    /// True if there is one.
    pub(crate) fn has_whole(&self) -> bool {
        !self.whole.is_empty()
    }

    #[cfg(test)]
    pub(crate) fn break_order(&mut self, breakage: KeyBreakage) {
        self.breakage = breakage;
    }
}
