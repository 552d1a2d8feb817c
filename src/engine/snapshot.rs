//! A snapshot of a running guest: which page is copied next, and which actions precede and follow the copying.
//!
//! # Orders that hold
//!
//! Every page is protected before the guest continues, and copied once, before its protection is lifted. Whatever ends
//! the snapshot, all protection is lifted before the guest is resumed or anything is waited for.
//!
//! Most of the memory is protected while the guest still runs. A write before the snapshot's moment is let through at
//! once, and the piece of memory that it falls in is protected again. The moment is when the guest is paused and its
//! device state is saved: from there on nothing is let through that was not copied.

mod ahead;
mod events;

use std::collections::VecDeque;
use std::time::Duration;

use crate::observe::Latency;
use crate::ram::{PageRun, PageSet};
use crate::units::PageIndex;
use ahead::{Ahead, Cursor, Next};
#[cfg(test)]
pub(crate) use events::SnapshotBreakage;
pub use events::{Place, SnapshotAction, SnapshotConfig, SnapshotEvent, SnapshotOutcome};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Opening,
    Arming,
    /// The guest runs, and memory is protected.
    Ahead,
    Pausing,
    Saving,
    /// The guest is paused, in the state that the snapshot keeps.
    Looking,
    Protecting,
    Resuming,
    Copying,
    Disarming,
    /// All is copied; the guest's resume has not returned.
    Waiting,
    Closing,
    Ended,
}

/// What the guest does at our request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Pause,
    SaveState,
    Resume,
}

/// Whether the paused guest has been let run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resume {
    NotAsked,
    UnderWay,
    Over,
}

/// The state of a snapshot.
#[derive(Debug)]
pub struct SnapshotEngine {
    config: SnapshotConfig,
    phase: Phase,
    /// The requested action that is not answered yet.
    doing: Option<SnapshotAction>,
    ending: Option<SnapshotOutcome>,
    armed: bool,
    paused: bool,
    calling: Option<Call>,
    resume: Resume,
    abandoned: bool,
    /// To be copied.
    pending: PageSet,
    cursor: Cursor,
    ahead: Ahead,
    /// Host pages that threads wait for, since when.
    faults: VecDeque<(Duration, PageRun)>,
    /// Copied, and still protected.
    copied: Option<PageRun>,
    slots: u64,
    trays: u64,
    starved_since: Option<Duration>,
    now: Duration,
    figures: SnapshotFigures,
    #[cfg(test)]
    breakage: SnapshotBreakage,
}

/// Counters.
#[derive(Clone, Debug, Default)]
pub struct SnapshotFigures {
    /// Writes that had to wait for a copy.
    pub faults: u64,
    /// Writes before the moment that hit a protected page.
    pub early: u64,
    /// From the moment that a write was known until it could continue.
    pub latency: Latency,
}

impl SnapshotEngine {
    /// A snapshot that has not begun.
    pub fn new(config: SnapshotConfig) -> Self {
        Self {
            phase: Phase::Idle,
            doing: None,
            ending: None,
            armed: false,
            paused: false,
            calling: None,
            resume: Resume::NotAsked,
            abandoned: false,
            pending: PageSet::default(),
            cursor: Cursor::default(),
            ahead: Ahead::default(),
            faults: VecDeque::new(),
            copied: None,
            slots: config.slots,
            trays: config.trays,
            starved_since: None,
            now: Duration::ZERO,
            figures: SnapshotFigures::default(),
            config,
            #[cfg(test)]
            breakage: SnapshotBreakage::None,
        }
    }

    #[cfg(test)]
    pub(crate) fn break_order(&mut self, breakage: SnapshotBreakage) {
        self.breakage = breakage;
    }

    #[cfg(test)]
    fn is_broken(&self, breakage: SnapshotBreakage) -> bool {
        self.breakage == breakage
    }

    /// The counters.
    pub fn figures(&self) -> &SnapshotFigures {
        &self.figures
    }

    /// True once only the end of the output is left to write: a cancel is too late.
    pub fn is_closing(&self) -> bool {
        matches!(self.phase, Phase::Closing | Phase::Ended) && self.ending.is_none()
    }

    /// When to call again with [`SnapshotEvent::Time`], if nothing else happens.
    pub fn wake_at(&self) -> Option<Duration> {
        Some(self.starved_since? + self.config.stall_timeout)
    }

    /// Takes an event, at any time.
    pub fn handle(&mut self, now: Duration, event: SnapshotEvent) {
        self.now = now;
        match event {
            SnapshotEvent::Begin if self.phase == Phase::Idle => self.phase = Phase::Opening,
            SnapshotEvent::Begin => {}
            SnapshotEvent::Fault(run) => {
                match self.is_before_the_moment() {
                    true => self.figures.early += 1,
                    false => self.figures.faults += 1,
                }
                self.faults.push_back((now, run));
            }
            SnapshotEvent::Freed(place) => {
                self.starved_since = None;
                match place {
                    Place::Slot => self.slots = self.config.slots.min(self.slots + 1),
                    Place::Tray => self.trays = self.config.trays.min(self.trays + 1),
                }
            }
            SnapshotEvent::Returned { done } => self.returned(done),
            SnapshotEvent::Cancel => {
                if !self.is_closing() {
                    self.end(SnapshotOutcome::Cancelled);
                }
            }
            SnapshotEvent::Lost => self.end(SnapshotOutcome::Failed),
            SnapshotEvent::Time => {}
            SnapshotEvent::Done => self.answered(true),
            SnapshotEvent::Found(pages) => {
                if self.doing == Some(SnapshotAction::Look) {
                    self.found(&pages);
                }
                self.answered(true);
            }
            SnapshotEvent::Failed => self.answered(false),
        }
        if self.wake_at().is_some_and(|at| now >= at) {
            self.end(SnapshotOutcome::Failed);
        }
    }

    /// What to do next; `None` while an answer is due, or nothing can be done before something happens.
    pub fn poll(&mut self) -> Option<SnapshotAction> {
        if self.doing.is_some() {
            return None;
        }
        let action = match self.ending {
            Some(outcome) => self.undo(outcome)?,
            None => self.next()?,
        };
        match action {
            // From here on, whether it succeeds or not.
            SnapshotAction::Arm => self.armed = true,
            SnapshotAction::Pause => self.paused = true,
            SnapshotAction::Resume => self.resume = Resume::UnderWay,
            SnapshotAction::Copy { place: Place::Slot, .. } => self.slots -= 1,
            SnapshotAction::Copy { place: Place::Tray, .. } => self.trays -= 1,
            // This action gets no answer.
            SnapshotAction::Finish(_) => return Some(action),
            _ => {}
        }
        self.doing = Some(action);
        Some(action)
    }

    /// The first reason counts.
    fn end(&mut self, outcome: SnapshotOutcome) {
        if self.phase != Phase::Ended {
            self.ending.get_or_insert(outcome);
            self.starved_since = None;
        }
    }

    /// Pages that may hold something: to be protected, and to be copied.
    fn found(&mut self, pages: &PageSet) {
        if self.pending.blocks() == 0 {
            self.pending = pages.clone();
            self.ahead.open = pages.clone();
            return;
        }
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::LookOnce) {
            return;
        }
        for run in pages.runs() {
            self.pending.add(run);
            self.ahead.open.add(run);
        }
    }

    fn is_before_the_moment(&self) -> bool {
        matches!(self.phase, Phase::Ahead | Phase::Pausing | Phase::Saving)
    }

    /// A call of the guest is over.
    fn returned(&mut self, done: bool) {
        let Some(call) = self.calling.take() else { return };
        if call == Call::Resume {
            self.resume = Resume::Over;
            self.paused &= !done;
        }
        if !done {
            self.end(SnapshotOutcome::Failed);
        }
        self.phase = match (call, self.phase) {
            (Call::Pause, Phase::Pausing) if done => Phase::Saving,
            (Call::SaveState, Phase::Saving) if done => self.behind_the_state(),
            (Call::Resume, Phase::Waiting) => Phase::Closing,
            (_, phase) => phase,
        };
    }

    fn answered(&mut self, done: bool) {
        let Some(action) = self.doing.take() else { return };
        match action {
            SnapshotAction::Disarm => {
                self.armed = false;
                self.faults.clear();
            }
            SnapshotAction::Abandon => self.abandoned = true,
            SnapshotAction::Resume if !done => self.resume = Resume::Over,
            _ => {}
        }
        if !done {
            return self.end(SnapshotOutcome::Failed);
        }
        self.phase = match action {
            SnapshotAction::Open => Phase::Arming,
            SnapshotAction::Arm => {
                self.ahead.begin(self.now);
                Phase::Ahead
            }
            SnapshotAction::Pause => self.calls(Call::Pause),
            SnapshotAction::SaveState => self.calls(Call::SaveState),
            SnapshotAction::Look if self.phase == Phase::Looking => {
                self.ahead.rewind();
                Phase::Protecting
            }
            SnapshotAction::Look => {
                self.ahead.looked();
                self.phase
            }
            SnapshotAction::Protect { run } => {
                self.ahead.protected(run);
                self.phase
            }
            SnapshotAction::Resume => {
                self.calls(Call::Resume);
                if self.phase == Phase::Resuming { self.behind_the_resume() } else { self.phase }
            }
            SnapshotAction::Copy { run, .. } => {
                self.copied(run);
                self.phase
            }
            SnapshotAction::Lift { run } => {
                self.lifted(run);
                self.phase
            }
            SnapshotAction::Disarm if self.phase == Phase::Disarming => self.behind_the_pages(),
            SnapshotAction::Close => Phase::Ended,
            _ => self.phase,
        };
    }

    fn calls(&mut self, call: Call) -> Phase {
        self.calling = Some(call);
        self.phase
    }

    fn behind_the_state(&self) -> Phase {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::ResumeUnprotected) {
            return Phase::Resuming;
        }
        Phase::Looking
    }

    fn behind_the_protection(&self) -> Phase {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::ResumeUnprotected) {
            return Phase::Copying;
        }
        Phase::Resuming
    }

    fn behind_the_resume(&self) -> Phase {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::ResumeUnprotected) {
            return Phase::Looking;
        }
        Phase::Copying
    }

    fn behind_the_pages(&self) -> Phase {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::CloseUnresumed) {
            return Phase::Closing;
        }
        if self.resume == Resume::Over { Phase::Closing } else { Phase::Waiting }
    }

    /// Order: protection is lifted only from pages that are copied.
    fn copied(&mut self, run: PageRun) {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::CopyTwice) && self.faults.iter().any(|(_, waited)| *waited == run)
        {
            self.copied = Some(run);
            return;
        }
        self.pending.remove(run);
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::LiftFirst) {
            return;
        }
        self.copied = Some(run);
    }

    fn lifted(&mut self, run: PageRun) {
        if self.copied == Some(run) {
            self.copied = None;
        }
        if self.is_before_the_moment() {
            self.ahead.opened(&self.pending, run);
            #[cfg(test)]
            if self.is_broken(SnapshotBreakage::LeaveOpen) {
                self.ahead.open.remove(run);
            }
        }
        let (now, latency) = (self.now, &mut self.figures.latency);
        self.faults.retain(|(since, waited)| {
            let inside = waited.block == run.block && run.first <= waited.first && waited.end() <= run.end();
            if inside {
                latency.record(now.saturating_sub(*since));
            }
            !inside
        });
    }

    fn next(&mut self) -> Option<SnapshotAction> {
        match self.phase {
            Phase::Idle | Phase::Waiting => None,
            Phase::Opening => Some(SnapshotAction::Open),
            Phase::Arming => Some(SnapshotAction::Arm),
            Phase::Ahead => self.next_ahead(),
            Phase::Pausing => self.let_through().or_else(|| self.unless_called(SnapshotAction::Pause)),
            Phase::Saving => self.let_through().or_else(|| self.unless_called(SnapshotAction::SaveState)),
            Phase::Looking => Some(SnapshotAction::Look),
            Phase::Protecting => match self.ahead.next_open(&self.config) {
                Some(run) => Some(SnapshotAction::Protect { run }),
                None => {
                    self.phase = self.behind_the_protection();
                    self.next()
                }
            },
            Phase::Resuming => Some(SnapshotAction::Resume),
            Phase::Copying => self.next_page(),
            Phase::Disarming => Some(SnapshotAction::Disarm),
            Phase::Closing => Some(SnapshotAction::Close),
            Phase::Ended => Some(SnapshotAction::Finish(SnapshotOutcome::Taken)),
        }
    }

    /// Waiting threads are let through first; then pages are protected.
    fn next_ahead(&mut self) -> Option<SnapshotAction> {
        if let Some(lift) = self.let_through() {
            return Some(lift);
        }
        match self.ahead.next(self.now, &self.config) {
            Next::Look => Some(SnapshotAction::Look),
            Next::Protect(run) => Some(SnapshotAction::Protect { run }),
            Next::Pause => {
                self.phase = Phase::Pausing;
                self.next()
            }
        }
    }

    /// Before the moment: the piece that a thread waits to write in.
    fn let_through(&self) -> Option<SnapshotAction> {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::DeafWhilePausing) && self.phase != Phase::Ahead {
            return None;
        }
        let (_, waited) = self.faults.front()?;
        let size = self.config.lift_pages;
        let first = waited.first.0 / size * size;
        let pages = match self.pending.block(waited.block) {
            Some(block) if waited.end().0 <= block.len() => block.len().min(first + size) - first,
            _ => return Some(SnapshotAction::Lift { run: *waited }),
        };
        Some(SnapshotAction::Lift { run: PageRun { first: PageIndex(first), pages, ..*waited } })
    }

    fn unless_called(&self, action: SnapshotAction) -> Option<SnapshotAction> {
        self.calling.is_none().then_some(action)
    }

    /// Protection of the copied pages is lifted first; next are the pages that threads wait for, then the next in
    /// order.
    fn next_page(&mut self) -> Option<SnapshotAction> {
        if let Some(run) = self.copied {
            return Some(SnapshotAction::Lift { run });
        }
        if let Some((_, run)) = self.faults.front().copied() {
            if !self.pending.touches(run) {
                return Some(SnapshotAction::Lift { run });
            }
            #[cfg(test)]
            if self.is_broken(SnapshotBreakage::LiftFirst) {
                return Some(SnapshotAction::Lift { run });
            }
            let place = match run.pages {
                1 if self.slots > 0 => Some(Place::Slot),
                _ => (self.trays > 0).then_some(Place::Tray),
            };
            return self.unless_starved(place.map(|place| SnapshotAction::Copy { run, place }));
        }
        let Some(run) = self.cursor.next(&self.pending, self.config.tray_pages) else {
            self.phase = Phase::Disarming;
            return Some(SnapshotAction::Disarm);
        };
        // A quarter of the trays is left to writers.
        let free = self.trays > self.config.trays / 4;
        self.unless_starved(free.then_some(SnapshotAction::Copy { run, place: Place::Tray }))
    }

    fn unless_starved(&mut self, action: Option<SnapshotAction>) -> Option<SnapshotAction> {
        match action {
            Some(_) => self.starved_since = None,
            None => _ = self.starved_since.get_or_insert(self.now),
        }
        action
    }

    /// All protection is lifted first: no thread waits for the steps that follow.
    fn undo(&mut self, outcome: SnapshotOutcome) -> Option<SnapshotAction> {
        #[cfg(test)]
        if self.armed && self.is_broken(SnapshotBreakage::StayProtected) {
            self.armed = false;
        }
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::StayPaused) && self.resume == Resume::NotAsked {
            self.paused = false;
        }
        if self.armed {
            return Some(SnapshotAction::Disarm);
        }
        if self.calling.is_some() {
            return None;
        }
        if self.paused && self.resume == Resume::NotAsked {
            return Some(SnapshotAction::Resume);
        }
        if !self.abandoned {
            return Some(SnapshotAction::Abandon);
        }
        Some(SnapshotAction::Finish(outcome))
    }
}

#[cfg(test)]
mod tests;
