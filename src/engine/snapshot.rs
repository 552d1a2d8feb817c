//! A snapshot of a running guest: which page is copied next, and what comes before and after.
//!
//! # Orders that hold
//!
//! Every page is protected before the guest runs on, and copied once, before its protection is lifted. Whatever ends the
//! snapshot, all protection is lifted before the guest is resumed or anything is waited for.

use std::collections::VecDeque;
use std::time::Duration;

use crate::observe::Latency;
use crate::ram::{PageRun, PageSet};
use crate::units::{BlockIndex, PageIndex};

/// Where a copy lies until it has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Room for one target page.
    Slot,
    /// Room for as many neighbours as [`SnapshotConfig::tray_pages`].
    Tray,
}

/// What a snapshot is given.
#[derive(Clone, Debug)]
pub struct SnapshotConfig {
    /// Places for single pages that the guest waits to write.
    pub slots: u64,
    /// Places for runs.
    pub trays: u64,
    /// Target pages of a tray: a power of two, no less than the largest host page.
    pub tray_pages: u64,
    /// Without a free place for so long, while pages are to be copied, the snapshot fails.
    pub stall_timeout: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotAction {
    /// Write what comes before the pages. The guest runs.
    Open,
    /// Take the guest's promise to keep its memory, and get ready to protect it. Nothing is protected yet.
    Arm,
    /// Pause the guest.
    Pause,
    /// Save its device state.
    SaveState,
    /// Protect all memory that may hold something: [`SnapshotEvent::Protected`] tells which.
    Protect,
    /// Let the guest run, on a thread of its own as long as anything is protected: [`SnapshotEvent::Resumed`] comes later.
    Resume,
    /// Copy these pages and hand the copy over.
    Copy {
        /// In whole host pages.
        run: PageRun,
        /// Where to.
        place: Place,
    },
    /// Lift the protection of these pages; whoever waits for them runs on.
    Lift {
        /// In whole host pages.
        run: PageRun,
    },
    /// Lift all protection.
    Disarm,
    /// Write what comes behind the pages, and make it last.
    Close,
    /// Leave nothing that claims to be whole.
    Abandon,
    /// It is over.
    Finish(SnapshotOutcome),
}

/// What has happened.
#[derive(Clone, Debug)]
pub enum SnapshotEvent {
    /// Start.
    Begin,
    /// The action is done.
    Done,
    /// The action [`SnapshotAction::Protect`] is done: pages that may hold something, in whole host pages.
    Protected(PageSet),
    /// The action could not be done.
    Failed,
    /// The guest runs, or could not be let run.
    Resumed {
        /// It runs.
        runs: bool,
    },
    /// A thread waits to write this host page.
    Fault(PageRun),
    /// A copy has left.
    Freed(Place),
    /// What takes the copies takes no more.
    Lost,
    /// Somebody asks for the end.
    Cancel,
    /// Nothing but time has passed.
    Time,
}

/// How a snapshot ended. The guest runs on, whatever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotOutcome {
    /// It is whole where it was written to.
    Taken,
    /// It could not be taken.
    Failed,
    /// Somebody asked for the end.
    Cancelled,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Opening,
    Arming,
    Pausing,
    Saving,
    Protecting,
    Resuming,
    Copying,
    Disarming,
    /// All is copied; the guest's resume has not returned.
    Waiting,
    Closing,
    Ended,
}

/// Whether the paused guest has been let run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resume {
    NotAsked,
    UnderWay,
    Over,
}

/// Orders that a test leaves out.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum SnapshotBreakage {
    #[default]
    None,
    /// Protection is lifted before the page is copied.
    LiftFirst,
    /// A page that was copied for its writer is copied again in its turn.
    CopyTwice,
    /// The guest runs on before its memory is protected.
    ResumeUnprotected,
    /// A failure leaves the protection on.
    StayProtected,
    /// A failure leaves the guest paused.
    StayPaused,
    /// What was written is made last while the guest's resume may still fail.
    CloseUnresumed,
}

/// The state of a snapshot.
#[derive(Debug)]
pub struct SnapshotEngine {
    config: SnapshotConfig,
    phase: Phase,
    /// What was asked for and not answered.
    doing: Option<SnapshotAction>,
    ending: Option<SnapshotOutcome>,
    armed: bool,
    paused: bool,
    resume: Resume,
    abandoned: bool,
    /// Protected, and not copied.
    pending: PageSet,
    cursor: (u32, u64),
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

/// What has been counted.
#[derive(Clone, Debug, Default)]
pub struct SnapshotFigures {
    /// Writes that had to wait.
    pub faults: u64,
    /// From the moment that a write was known of until it could go on.
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
            resume: Resume::NotAsked,
            abandoned: false,
            pending: PageSet::default(),
            cursor: (0, 0),
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

    /// What has been counted.
    pub fn figures(&self) -> &SnapshotFigures {
        &self.figures
    }

    /// True once nothing but the end of what is written is left: a cancel is too late.
    pub fn is_closing(&self) -> bool {
        matches!(self.phase, Phase::Closing | Phase::Ended) && self.ending.is_none()
    }

    /// When to come back with [`SnapshotEvent::Time`], if nothing else happens.
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
                self.figures.faults += 1;
                self.faults.push_back((now, run));
            }
            SnapshotEvent::Freed(place) => {
                self.starved_since = None;
                match place {
                    Place::Slot => self.slots = self.config.slots.min(self.slots + 1),
                    Place::Tray => self.trays = self.config.trays.min(self.trays + 1),
                }
            }
            SnapshotEvent::Resumed { runs } => {
                self.resume = Resume::Over;
                if runs {
                    self.paused = false;
                } else {
                    self.end(SnapshotOutcome::Failed);
                }
                if self.phase == Phase::Waiting {
                    self.phase = Phase::Closing;
                }
            }
            SnapshotEvent::Cancel => {
                if !self.is_closing() {
                    self.end(SnapshotOutcome::Cancelled);
                }
            }
            SnapshotEvent::Lost => self.end(SnapshotOutcome::Failed),
            SnapshotEvent::Time => {}
            SnapshotEvent::Done => self.answered(true, PageSet::default()),
            SnapshotEvent::Protected(pages) => self.answered(true, pages),
            SnapshotEvent::Failed => self.answered(false, PageSet::default()),
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
            // From here on, whatever comes of it.
            SnapshotAction::Arm => self.armed = true,
            SnapshotAction::Pause => self.paused = true,
            SnapshotAction::Resume => self.resume = Resume::UnderWay,
            SnapshotAction::Copy { place: Place::Slot, .. } => self.slots -= 1,
            SnapshotAction::Copy { place: Place::Tray, .. } => self.trays -= 1,
            // Nobody answers it.
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

    fn answered(&mut self, done: bool, protected: PageSet) {
        let Some(action) = self.doing.take() else { return };
        match action {
            SnapshotAction::Disarm => {
                self.armed = false;
                self.faults.clear();
            }
            SnapshotAction::Abandon => self.abandoned = true,
            // Where no thread could be had: without protection none is needed.
            SnapshotAction::Resume if !done && self.armed => self.resume = Resume::NotAsked,
            SnapshotAction::Resume if !done => self.resume = Resume::Over,
            _ => {}
        }
        if !done {
            return self.end(SnapshotOutcome::Failed);
        }
        self.phase = match action {
            SnapshotAction::Open => Phase::Arming,
            SnapshotAction::Arm => Phase::Pausing,
            SnapshotAction::Pause => Phase::Saving,
            SnapshotAction::SaveState => self.behind_the_state(),
            SnapshotAction::Protect => {
                self.pending = protected;
                self.behind_the_protection()
            }
            SnapshotAction::Resume if self.phase == Phase::Resuming => self.behind_the_resume(),
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

    fn behind_the_state(&self) -> Phase {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::ResumeUnprotected) {
            return Phase::Resuming;
        }
        Phase::Protecting
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
            return Phase::Protecting;
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

    /// Order: only what is copied is lifted.
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
            Phase::Pausing => Some(SnapshotAction::Pause),
            Phase::Saving => Some(SnapshotAction::SaveState),
            Phase::Protecting => Some(SnapshotAction::Protect),
            Phase::Resuming => Some(SnapshotAction::Resume),
            Phase::Copying => self.next_page(),
            Phase::Disarming => Some(SnapshotAction::Disarm),
            Phase::Closing => Some(SnapshotAction::Close),
            Phase::Ended => Some(SnapshotAction::Finish(SnapshotOutcome::Taken)),
        }
    }

    /// What was copied is lifted, then comes what threads wait for, then the next in order.
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
        let Some(run) = self.next_run() else {
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

    /// The next pages in the order of their addresses, at most a tray full; trays are aligned.
    fn next_run(&mut self) -> Option<PageRun> {
        while (self.cursor.0 as usize) < self.pending.blocks() {
            let block = BlockIndex(self.cursor.0);
            let from = PageIndex(self.cursor.1);
            let found =
                self.pending.block(block).and_then(|pages| pages.next_run(from, self.config.tray_pages));
            if let Some(found) = found {
                let aligned = (found.start / self.config.tray_pages + 1) * self.config.tray_pages;
                let end = found.end.min(aligned);
                self.cursor.1 = found.start;
                return Some(PageRun { block, first: PageIndex(found.start), pages: end - found.start });
            }
            self.cursor = (self.cursor.0 + 1, 0);
        }
        None
    }

    /// All protection is lifted first: nobody waits for what comes after.
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
        if self.resume == Resume::UnderWay {
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
