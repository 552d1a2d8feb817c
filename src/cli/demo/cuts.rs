//! Cuts of the connection while memory arrives: in precopy from the first page on, in postcopy while the guest runs at the
//! destination.
//!
//! A cut depends on how many pages are there, not on time: the thread that is about to place the next page cuts, so no page
//! passes a cut unseen, however fast the machine is.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ramwire::guest::{GuestError, GuestMemory, LayoutChange, MappedGuest};
use ramwire::observe::{Event, EventKind, SharedStatistics};
use ramwire::ram::{Landing, RamBlockTable};
use ramwire::sys::{HostRegion, HostSpan};
use ramwire::transport::StreamBreaker;
use ramwire::units::BlockIndex;
use serde::{Deserialize, Serialize};

/// How long pages may wait for the guest's start, so that the first cut finds it running. Its state loads without a page.
const STARTS: Duration = Duration::from_secs(60);

/// One cut, and how it went on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Recovery {
    /// Pages of the guest that were there.
    pub(super) pages_there: u64,
    /// Milliseconds until the ends had agreed on the missing pages, over another connection.
    pub(super) took_ms: f64,
}

/// Cuts that are due, and those that were made; clones are the same.
#[derive(Clone)]
pub(super) struct Cuts(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
    pages: u64,
}

struct State {
    left: u32,
    stage: Stage,
    postcopy: bool,
    /// Of the present connection, and of its page channels.
    breakers: Vec<StreamBreaker>,
    figures: Option<SharedStatistics>,
    made: Vec<Recovery>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    /// The guest runs at its source.
    There,
    /// Its state is being loaded.
    Starts,
    /// The connection is cut when so many pages are there.
    Due(u64),
    /// It was cut then.
    Cut { pages_there: u64, at: Instant },
}

impl Cuts {
    /// So many cuts while this memory fills; `postcopy`: from the guest's start on.
    pub(super) fn new(count: u32, memory: &MappedGuest, postcopy: bool) -> Self {
        let table = memory.table();
        let pages = table.blocks().iter().map(|block| table.pages_of(block)).sum::<u64>();
        let stage = if postcopy { Stage::There } else { Stage::Due(pages / (u64::from(count) + 1)) };
        let state =
            State { left: count, stage, postcopy, breakers: Vec::new(), figures: None, made: Vec::new() };
        Self(Arc::new(Inner { state: Mutex::new(state), changed: Condvar::new(), pages }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection that is in use from now on.
    pub(super) fn connected(&self, breaker: StreamBreaker) {
        self.state().breakers.push(breaker);
    }

    /// Follows what happens to the guest.
    pub(super) fn follow(&self, figures: &SharedStatistics) {
        self.state().figures = Some(figures.clone());
        let cuts = self.clone();
        figures.listen(move |event| cuts.happened(event));
    }

    fn happened(&self, event: &Event) {
        let mut state = self.state();
        match event.kind {
            _ if !state.postcopy => return,
            EventKind::Switchover => state.stage = Stage::Starts,
            EventKind::PostcopyActive => self.goes_on(&mut state),
            _ => return,
        }
        self.0.changed.notify_all();
    }

    /// Pages arrive, for the first time or again.
    fn goes_on(&self, state: &mut State) {
        if let Stage::Cut { pages_there, at } = state.stage {
            let took_ms = at.elapsed().as_secs_f64() * 1e3;
            state.made.push(Recovery { pages_there, took_ms });
        }
        // The missing pages are divided into parts of the same size.
        let there = self.there(state);
        let missing = self.0.pages.saturating_sub(there);
        state.stage = Stage::Due(there + missing / (u64::from(state.left) + 1));
    }

    /// Pages that are there.
    fn there(&self, state: &State) -> u64 {
        let figures = state.figures.as_ref().map(SharedStatistics::snapshot).unwrap_or_default();
        self.0.pages.saturating_sub(figures.remaining / figures.page_size.max(1))
    }

    /// A page is about to be placed.
    fn placing(&self) {
        let mut state = self.state();
        if state.left == 0 {
            return;
        }
        let starts = |state: &mut State| state.stage == Stage::Starts;
        if starts(&mut state) {
            let waited = self.0.changed.wait_timeout_while(state, STARTS, starts);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        // In precopy the first page on another connection shows that the ends go on.
        if !state.postcopy && matches!(state.stage, Stage::Cut { .. }) && !state.breakers.is_empty() {
            self.goes_on(&mut state);
        }
        let Stage::Due(pages) = state.stage else { return };
        let pages_there = self.there(&state);
        if pages_there >= pages && !state.breakers.is_empty() {
            state.left -= 1;
            state.stage = Stage::Cut { pages_there, at: Instant::now() };
            state.breakers.drain(..).for_each(|breaker| breaker.reset());
        }
    }

    /// Those that were made.
    pub(super) fn made(&self) -> Vec<Recovery> {
        self.state().made.clone()
    }
}

/// Guest memory that checks at each page whether a cut is due.
pub(super) struct CutMemory {
    memory: Arc<MappedGuest>,
    cuts: Cuts,
}

impl CutMemory {
    pub(super) fn new(memory: Arc<MappedGuest>, cuts: Cuts) -> Self {
        Self { memory, cuts }
    }
}

impl GuestMemory for CutMemory {
    fn table(&self) -> &RamBlockTable {
        self.memory.table()
    }

    fn span(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
        self.cuts.placing();
        self.memory.span(landing)
    }

    fn region(&self, block: BlockIndex) -> Option<HostRegion> {
        // In precopy pages may be written through the file instead, which no cut would see.
        GuestMemory::region(&*self.memory, block).filter(|_| self.cuts.state().postcopy)
    }

    fn layout_change(&self) -> Option<LayoutChange> {
        self.memory.layout_change()
    }

    fn discard(&self, landing: Landing) -> Result<(), GuestError> {
        self.memory.discard(landing)
    }
}
