//! The source's host: its engine, and a guest that writes.

use std::collections::{BTreeMap, BTreeSet};

use super::plan::{Answer, Fault, Page, Plan, STEP, Sent};
use super::world::World;
use crate::engine::{
    CheckpointAction, CheckpointBreakage, CheckpointEngine, CheckpointEvent, CheckpointOutcome,
};

/// The source's host.
pub(super) struct Source {
    pub(super) engine: CheckpointEngine,
    pub(super) memory: BTreeMap<Page, u64>,
    pub(super) device: u64,
    pub(super) log: BTreeSet<Page>,
    pub(super) dirty: BTreeSet<Page>,
    pub(super) in_checkpoint: u64,
    /// Since when it waits for the answer to the end.
    pub(super) released_at: Option<u64>,
    pub(super) doing: Option<CheckpointAction>,
    pub(super) actions: u64,
    pub(super) runs: bool,
    pub(super) lives: bool,
    pub(super) outcome: Option<CheckpointOutcome>,
    pub(super) safe: u64,
}

impl Source {
    pub(super) fn new(plan: &Plan, memory: BTreeMap<Page, u64>, breakage: CheckpointBreakage) -> Self {
        let mut engine = CheckpointEngine::new(plan.config);
        engine.break_order(breakage);
        Self {
            engine,
            memory,
            device: 0,
            log: BTreeSet::new(),
            dirty: BTreeSet::new(),
            in_checkpoint: 0,
            released_at: None,
            doing: None,
            actions: 0,
            runs: true,
            lives: true,
            outcome: None,
            safe: 0,
        }
    }

    pub(super) fn runs_elsewhere(&self) -> bool {
        !self.lives || self.outcome == Some(CheckpointOutcome::Taken)
    }
}

impl World {
    pub(super) fn tell(&mut self, event: CheckpointEvent) {
        self.source.doing = None;
        self.source.engine.handle(STEP * self.now as u32, event);
    }

    /// An event that is no answer to an action.
    pub(super) fn tell_beside(&mut self, event: CheckpointEvent) {
        self.source.engine.handle(STEP * self.now as u32, event);
    }

    pub(super) fn guest_steps(&mut self) {
        if !self.source.runs {
            return;
        }
        self.source.device += 1;
        if self.rng.one_in(self.plan.writes_every) {
            let block = self.rng.below(self.plan.blocks.len() as u64) as usize;
            let page = (block, self.rng.below(self.plan.blocks[block]));
            let value = if self.rng.one_in(5) { 0 } else { self.rng.next() | 1 };
            self.source.memory.insert(page, value);
            self.source.log.insert(page);
        }
    }

    fn sends(&mut self, message: Sent) -> bool {
        if self.is_connected && !self.is_hole {
            self.forward.push_back(message);
        }
        self.is_connected
    }

    pub(super) fn source_steps(&mut self) {
        if self.source.outcome.is_some() {
            return;
        }
        self.source_hears();
        if let Some(action) = self.source.doing.or_else(|| self.source.engine.poll()) {
            if self.source.doing.replace(action).is_none() {
                self.source.actions += 1;
                let may_fail = !matches!(action, CheckpointAction::Finish(_) | CheckpointAction::Resume);
                if self.plan.fault == Fault::Action(self.source.actions) && may_fail {
                    self.findings.saw("an action failed");
                    return self.tell(CheckpointEvent::Failed);
                }
            }
            return self.perform(action);
        }
        if self.source.engine.wake_at().is_some_and(|at| STEP * self.now as u32 >= at) {
            self.tell_beside(CheckpointEvent::Time);
        }
    }

    fn source_hears(&mut self) {
        match self.back.pop_front() {
            _ if self.is_hole => {}
            Some(Answer::Confirm(number)) => self.tell_beside(CheckpointEvent::Confirmed(number)),
            Some(Answer::Taken) => {
                self.findings.saw("the source learns that its guest was taken");
                self.tell_beside(CheckpointEvent::Taken);
            }
            Some(Answer::Released) if self.source.doing == Some(CheckpointAction::Release) => {
                self.tell(CheckpointEvent::Done);
            }
            Some(Answer::Released) => self.findings.must(false, "an answer to nothing"),
            None if !self.is_connected => self.tell_beside(CheckpointEvent::Lost),
            None => {}
        }
    }

    fn perform(&mut self, action: CheckpointAction) {
        match action {
            CheckpointAction::StartLogs => {
                self.source.log.clear();
                self.source.dirty = self.source.memory.keys().copied().collect();
            }
            CheckpointAction::Open(number) => {
                self.source.in_checkpoint = 0;
                if !self.sends(Sent::Open(number)) {
                    return self.tell(CheckpointEvent::Failed);
                }
            }
            CheckpointAction::Sync => {
                let log = std::mem::take(&mut self.source.log);
                self.source.dirty.extend(log);
                let dirty_pages = self.source.dirty.len() as u64;
                return self.tell(CheckpointEvent::Synced { dirty_pages });
            }
            // A page a step: this action is not over.
            CheckpointAction::Send if !self.source.dirty.is_empty() => {
                let Some(page) = self.source.dirty.pop_first() else { return };
                self.source.in_checkpoint += 1;
                if !self.sends(Sent::Page(page, self.source.memory[&page])) || self.source.engine.is_ending()
                {
                    return self.tell(CheckpointEvent::Failed);
                }
                return;
            }
            CheckpointAction::Pause => self.source.runs = false,
            CheckpointAction::SaveState(_) => drop(self.sends(Sent::State(self.source.device))),
            CheckpointAction::Close(number) => {
                let pages = self.source.in_checkpoint;
                self.sends(Sent::Close(number, pages));
            }
            CheckpointAction::Resume => self.source.runs = true,
            CheckpointAction::ReportSafe(number) => {
                self.findings.must(number == self.source.safe + 1, "safe checkpoints out of order");
                self.source.safe = number;
                self.findings.saw("safe");
            }
            CheckpointAction::Release => {
                // The answer comes by itself, or the connection is lost, or it takes too long.
                let is_late = self.source.released_at.is_some_and(|at| self.now > at + 2000);
                if self.source.engine.is_ending() || is_late {
                    return self.tell(CheckpointEvent::Failed);
                }
                if self.source.released_at.is_none() {
                    self.source.released_at = Some(self.now);
                    self.sends(Sent::Release);
                }
                return;
            }
            CheckpointAction::Finish(outcome) => {
                self.source.outcome = Some(outcome);
                self.is_connected &= outcome == CheckpointOutcome::Stopped;
                return;
            }
            CheckpointAction::Send | CheckpointAction::Greet | CheckpointAction::StopLogs => {}
        }
        if action == CheckpointAction::Pause {
            let number = self.moments.keys().next_back().map_or(1, |last| last + 1);
            self.moments.insert(number, (self.source.memory.clone(), self.source.device));
        }
        self.tell(CheckpointEvent::Done);
    }
}
