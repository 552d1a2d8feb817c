//! Memory that is filled while it is used: threads that serve its faults, and threads that read the rest.

mod handed;
mod memory;
mod reading;
mod served;

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::engine::{BandwidthLimit, Fill, Pace, PulledKeys};
use crate::error::Chain;
use crate::observe::LatencySummary;
use crate::ram::PageRun;
use crate::sys::{CancelToken, Lock as _, PageContents};
use crate::transport::{OneByOne, PageReader, PageSupply};
use crate::units::{PageSize, Rate};
pub use handed::{HandedError, HandedRegion};
pub(super) use memory::{GuestPages, PagedMemory, PlaceError};

pub(super) use reading::News;
pub(super) use served::holes;
pub use served::{ServeSettings, ServedMemory};

/// Bytes that are placed at a time: no fault is resolved meanwhile.
const PLACE: u64 = 64 << 10;

/// A page that could not be read or placed. A thread that touches it waits until a retry has placed it; no page is
/// lost.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the page at {offset:#x} of RAM block {block} could not be had from {file} ({why}); threads that touch it \
    wait; remove what keeps it from being read, then try again"
)]
#[non_exhaustive]
pub struct PageFailure {
    /// The RAM block.
    pub block: String,
    /// Offset of the page in it, in bytes.
    pub offset: u64,
    /// Where it was read from.
    pub file: String,
    /// The kernel's error.
    pub why: String,
}

/// Progress of a memory that is filled while it is used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LazyProgress {
    /// Target pages that are still missing.
    pub missing: u64,
    /// Of these, those that could not be read.
    pub failed: u64,
    /// Faults: threads that had to wait for a page.
    pub faults: u64,
    /// Target pages that were read for these faults.
    pub urgent: u64,
    /// Time from the fault until the page is placed.
    pub latency: LatencySummary,
}

/// State shared by the threads of a memory.
pub(super) struct Filling {
    memory: Box<dyn PagedMemory>,
    supply: Arc<dyn PageReader>,
    page: PageSize,
    state: Mutex<State>,
    /// Notified at each change of [`state`](Self::state) that a thread may wait for.
    changed: Condvar,
    began: Instant,
    over: CancelToken,
}

/// What changes.
pub(super) struct State {
    pub(super) fill: Fill,
    /// Of memory that is read by keys.
    pub(super) keys: PulledKeys,
    /// When pages may be read that no thread waits for.
    pub(super) pace: Pace,
    /// The first page that could not be read or placed, since the last retry.
    pub(super) failure: Option<PageFailure>,
    /// Faults are no longer served: all pages are placed, or there is no process to serve any more.
    pub(super) is_over: bool,
    /// Its owner has declared that no thread uses it any more.
    pub(super) is_abandoned: bool,
}

impl fmt::Debug for Filling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filling").field("supply", &self.supply.name()).finish_non_exhaustive()
    }
}

impl Filling {
    pub(super) fn new(
        memory: Box<dyn PagedMemory>,
        supply: Arc<dyn PageSupply>,
        page: PageSize,
        fill: Fill,
    ) -> Self {
        Self::by(memory, Arc::new(OneByOne(supply)), page, fill)
    }

    pub(super) fn by(
        memory: Box<dyn PagedMemory>,
        supply: Arc<dyn PageReader>,
        page: PageSize,
        fill: Fill,
    ) -> Self {
        let (keys, pace) = (PulledKeys::default(), Pace::default());
        let state =
            Mutex::new(State { fill, keys, pace, failure: None, is_over: false, is_abandoned: false });
        let (changed, began, over) = (Condvar::new(), Instant::now(), CancelToken::default());
        Self { memory, supply, page, state, changed, began, over }
    }

    /// At most so many bytes a second are read that no thread waits for.
    pub(super) fn limited(self, limit: Option<Rate>) -> Self {
        let limit = BandwidthLimit::new(limit.map_or(0, |rate| rate.0));
        self.state().pace = Pace::new(limit);
        self
    }

    /// Its times count from there.
    pub(super) fn since(self, began: Instant) -> Self {
        Self { began, ..self }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.locked()
    }

    /// Waits for a change of the state.
    pub(super) fn changed<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`changed`](Self::changed), at most so long; without a limit if that is zero.
    fn changed_within<'a>(&self, state: MutexGuard<'a, State>, at_most: Duration) -> MutexGuard<'a, State> {
        if at_most.is_zero() {
            return self.changed(state);
        }
        self.changed.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Changes the state, and notifies the waiting threads.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let answer = change(&mut self.state());
        self.changed.notify_all();
        answer
    }

    /// Ends the threads that serve faults.
    pub(super) fn stop_serving(&self) {
        self.over.cancel();
    }

    /// Ends all threads.
    pub(super) fn end(&self) {
        self.stop_serving();
        self.change(|state| state.is_over = true);
    }

    fn place(&self, run: PageRun, host: u64, contents: PageContents<'_>) {
        let at_once = (PLACE / self.page.bytes()).max(1).next_multiple_of(host);
        let (mut rest, mut at) = (Some(run), 0);
        while let Some(run) = rest {
            let (part, behind) = run.split_at(at_once);
            rest = behind;
            let len = usize::try_from(part.pages * self.page.bytes()).unwrap_or(usize::MAX);
            let Some(contents) = contents.part(at, len) else { break };
            at += len;
            match self.memory.place(part, contents) {
                Ok(()) => {
                    let now = self.began.elapsed();
                    let mut state = self.state();
                    let fresh = state.fill.placed(now, part);
                    state.keys.placed(part, fresh);
                    if state.fill.is_whole() || state.failure.is_some() {
                        self.changed.notify_all();
                    }
                }
                Err(error) => self.failed(part, error),
            }
        }
    }

    fn failed(&self, run: PageRun, error: PlaceError) {
        let why = match error {
            PlaceError::Gone => return self.end(),
            PlaceError::Failed(why) => why,
        };
        let failure = PageFailure {
            block: self.memory.block_name(run.block),
            offset: run.offset(self.page).map_or(u64::MAX, |offset| offset.0),
            file: self.supply.name(),
            why,
        };
        tracing::warn!(error = %Chain(&failure), "a page is missing");
        self.change(|state| {
            let _ = state.fill.ended(run, false);
            state.failure.get_or_insert(failure);
        });
    }

    /// How far it is.
    pub(super) fn progress(&self) -> LazyProgress {
        let state = self.state();
        let counts = state.fill.counts();
        LazyProgress {
            missing: counts.missing,
            failed: counts.failed,
            faults: counts.faults,
            urgent: counts.urgent,
            latency: state.fill.latency().summary(),
        }
    }

    /// The first page that could not be read, since the last retry.
    pub(super) fn failure(&self) -> Option<PageFailure> {
        self.state().failure.clone()
    }

    /// Retries pages that could not be read or placed. Returns the number of these target pages.
    pub(super) fn retry(&self) -> u64 {
        self.change(|state| {
            state.failure = None;
            state.fill.retry()
        })
    }

    /// The memory is no longer served: accesses no longer wait. To be called after the last thread that serves faults
    /// has ended.
    pub(super) fn let_go(&self) {
        self.memory.let_go();
    }
}
