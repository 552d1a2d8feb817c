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
mod answers;
mod changes;
mod events;
mod steps;

use std::collections::VecDeque;
use std::time::Duration;

use crate::observe::Latency;
use crate::ram::{PageRun, PageSet};
use ahead::{Ahead, Cursor};
pub use changes::{ChangedPages, NextBase};
#[cfg(test)]
pub(crate) use events::SnapshotBreakage;
pub use events::{Place, SnapshotAction, SnapshotConfig, SnapshotEvent, SnapshotOutcome};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Opening,
    Tracking,
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

/// What was done to the guest.
#[derive(Debug, Default)]
struct Guest {
    armed: bool,
    paused: bool,
}

/// What the embedder wants.
#[derive(Debug)]
struct Requests {
    calling: Option<Call>,
    resume: Resume,
    abandoned: bool,
}

/// The pages of the moment.
#[derive(Debug, Default)]
struct Copies {
    /// To be copied.
    pending: PageSet,
    cursor: Cursor,
    /// Copied, and still protected.
    copied: Option<PageRun>,
}

/// Where copies go.
#[derive(Debug)]
struct Room {
    slots: u64,
    trays: u64,
    starved_since: Option<Duration>,
}

/// The state of a snapshot.
#[derive(Debug)]
pub struct SnapshotEngine {
    config: SnapshotConfig,
    phase: Phase,
    /// The requested action that is not answered yet.
    doing: Option<SnapshotAction>,
    ending: Option<SnapshotOutcome>,
    guest: Guest,
    asked: Requests,
    copies: Copies,
    ahead: Ahead,
    /// Host pages that threads wait for, since when.
    faults: VecDeque<(Duration, PageRun)>,
    room: Room,
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
            guest: Guest::default(),
            asked: Requests { calling: None, resume: Resume::NotAsked, abandoned: false },
            copies: Copies::default(),
            ahead: Ahead::default(),
            faults: VecDeque::new(),
            room: Room { slots: config.slots, trays: config.trays, starved_since: None },
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
        Some(self.room.starved_since? + self.config.stall_timeout)
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
                self.room.starved_since = None;
                match place {
                    Place::Slot => self.room.slots = self.config.slots.min(self.room.slots + 1),
                    Place::Tray => self.room.trays = self.config.trays.min(self.room.trays + 1),
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
            SnapshotAction::Arm => self.guest.armed = true,
            SnapshotAction::Pause => self.guest.paused = true,
            SnapshotAction::Resume => self.asked.resume = Resume::UnderWay,
            SnapshotAction::Copy { place: Place::Slot, .. } => self.room.slots -= 1,
            SnapshotAction::Copy { place: Place::Tray, .. } => self.room.trays -= 1,
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
            self.room.starved_since = None;
        }
    }

    /// Pages that may hold something: to be protected, and to be copied.
    fn found(&mut self, pages: &PageSet) {
        if self.copies.pending.blocks() == 0 {
            self.copies.pending = pages.clone();
            self.ahead.open = pages.clone();
            return;
        }
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::LookOnce) {
            return;
        }
        for run in pages.runs() {
            self.copies.pending.add(run);
            self.ahead.open.add(run);
        }
    }

    fn is_before_the_moment(&self) -> bool {
        matches!(self.phase, Phase::Ahead | Phase::Pausing | Phase::Saving)
    }
}

#[cfg(test)]
mod tests;
