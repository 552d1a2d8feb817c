//! The next action of a snapshot, and which page is copied next.

#[cfg(test)]
use super::SnapshotBreakage;
use super::ahead::Next;
use super::{Phase, Place, Resume, SnapshotAction, SnapshotEngine, SnapshotOutcome};
use crate::ram::PageRun;
use crate::units::PageIndex;

impl SnapshotEngine {
    pub(super) fn next(&mut self) -> Option<SnapshotAction> {
        match self.phase {
            Phase::Idle | Phase::Waiting => None,
            Phase::Opening => Some(SnapshotAction::Open),
            Phase::Tracking => Some(SnapshotAction::Track),
            Phase::Arming => Some(SnapshotAction::Arm),
            Phase::Ahead => self.next_ahead(),
            Phase::Pausing => self.let_through().or_else(|| self.unless_called(SnapshotAction::Pause)),
            Phase::Saving => self.let_through().or_else(|| self.unless_called(SnapshotAction::SaveState)),
            Phase::Looking => Some(SnapshotAction::Look),
            Phase::Protecting => match self.ahead.next_open(&self.config) {
                Some(run) => Some(SnapshotAction::Protect { run }),
                None => {
                    self.phase = self.phase_after_protection();
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
        let pages = match self.copies.pending.block(waited.block) {
            Some(block) if waited.end().0 <= block.len() => block.len().min(first + size) - first,
            _ => return Some(SnapshotAction::Lift { run: *waited }),
        };
        Some(SnapshotAction::Lift { run: PageRun { first: PageIndex(first), pages, ..*waited } })
    }

    fn unless_called(&self, action: SnapshotAction) -> Option<SnapshotAction> {
        self.asked.calling.is_none().then_some(action)
    }

    /// Protection of the copied pages is lifted first; next are the pages that threads wait for, then the next in
    /// order.
    fn next_page(&mut self) -> Option<SnapshotAction> {
        if let Some(run) = self.copies.copied {
            return Some(SnapshotAction::Lift { run });
        }
        if let Some((_, run)) = self.faults.front().copied() {
            if !self.copies.pending.touches(run) {
                return Some(SnapshotAction::Lift { run });
            }
            #[cfg(test)]
            if self.is_broken(SnapshotBreakage::LiftFirst) {
                return Some(SnapshotAction::Lift { run });
            }
            let place = match run.pages {
                1 if self.room.slots > 0 => Some(Place::Slot),
                _ => (self.room.trays > 0).then_some(Place::Tray),
            };
            return self.unless_starved(place.map(|place| SnapshotAction::Copy { run, place }));
        }
        let Some(run) = self.copies.cursor.next(&self.copies.pending, self.config.tray_pages) else {
            self.phase = Phase::Disarming;
            return Some(SnapshotAction::Disarm);
        };
        // A quarter of the trays is left to writers.
        let free = self.room.trays > self.config.trays / 4;
        self.unless_starved(free.then_some(SnapshotAction::Copy { run, place: Place::Tray }))
    }

    fn unless_starved(&mut self, action: Option<SnapshotAction>) -> Option<SnapshotAction> {
        match action {
            Some(_) => self.room.starved_since = None,
            None => _ = self.room.starved_since.get_or_insert(self.now),
        }
        action
    }

    /// All protection is lifted first: no thread waits for the steps that follow.
    pub(super) fn undo(&mut self, outcome: SnapshotOutcome) -> Option<SnapshotAction> {
        #[cfg(test)]
        if self.guest.armed && self.is_broken(SnapshotBreakage::StayProtected) {
            self.guest.armed = false;
        }
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::StayPaused) && self.asked.resume == Resume::NotAsked {
            self.guest.paused = false;
        }
        if self.guest.armed {
            return Some(SnapshotAction::Disarm);
        }
        if self.asked.calling.is_some() {
            return None;
        }
        if self.guest.paused && self.asked.resume == Resume::NotAsked {
            return Some(SnapshotAction::Resume);
        }
        if !self.asked.abandoned {
            return Some(SnapshotAction::Abandon);
        }
        Some(SnapshotAction::Finish(outcome))
    }
}
