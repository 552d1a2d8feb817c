//! The source's host: its engine, and a guest that writes.

use std::collections::{BTreeMap, BTreeSet};

use super::plan::{Answer, CONFIRM_TIMEOUT, Fault, Page, Plan, STEP, Sent};
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
    /// Since when it waits for the standby to take bytes.
    pub(super) waits_since: Option<u64>,
    pub(super) paused_at: u64,
    pub(super) logs_are_on: bool,
    /// It has an error to report.
    pub(super) has_error: bool,
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
            waits_since: None,
            paused_at: 0,
            logs_are_on: false,
            has_error: false,
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
        self.tell_beside(event);
    }

    /// An event that is no answer to an action.
    pub(super) fn tell_beside(&mut self, event: CheckpointEvent) {
        self.source.has_error |= event == CheckpointEvent::Lost;
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
                    // Every log is stopped, even if one refuses.
                    self.source.logs_are_on &= action != CheckpointAction::StopLogs;
                    return self.fails();
                }
            }
            return self.perform(action);
        }
        if self.source.engine.wake_at().is_some_and(|at| STEP * self.now as u32 >= at) {
            self.tell_beside(CheckpointEvent::Time);
        }
    }

    fn fails(&mut self) {
        self.source.has_error = true;
        self.tell(CheckpointEvent::Failed);
    }

    /// True while a slow standby takes nothing. A wait that has a limit ends by itself, as a failure without an error of its
    /// own.
    fn waits_for_room(&mut self, action: CheckpointAction) -> bool {
        use CheckpointAction::{Close, Open, SaveState, Send};
        let Fault::Slow(at, period) = self.plan.fault else { return false };
        let sends = matches!(action, Open(_) | Send | SaveState(_) | Close(_));
        let takes = self.now < at || self.now.is_multiple_of(period);
        if takes || !sends {
            self.source.waits_since = None;
            return false;
        }
        if self.source.engine.is_ending() {
            self.fails();
            return true;
        }
        let now = STEP * self.now as u32;
        let since = *self.source.waits_since.get_or_insert(self.now);
        match self.source.engine.give_up_at() {
            Some(at) if now >= at => {
                self.findings.saw("paused for too long");
                self.tell(CheckpointEvent::Failed);
            }
            None if !self.source.runs => {}
            None if self.now > since + CONFIRM_TIMEOUT => self.fails(),
            _ => {}
        }
        true
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
        if self.waits_for_room(action) {
            return;
        }
        match action {
            CheckpointAction::StartLogs => {
                self.source.logs_are_on = true;
                self.source.log.clear();
                self.source.dirty = self.source.memory.keys().copied().collect();
            }
            CheckpointAction::Open(number) => {
                self.source.in_checkpoint = 0;
                if !self.sends(Sent::Open(number)) {
                    return self.fails();
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
                if !self.sends(Sent::Page(page, self.source.memory[&page])) {
                    return self.fails();
                }
                self.tell_beside(CheckpointEvent::Time);
                if self.source.engine.is_ending() {
                    self.tell(CheckpointEvent::Done);
                }
                return;
            }
            CheckpointAction::Pause => (self.source.runs, self.source.paused_at) = (false, self.now),
            CheckpointAction::StopLogs => self.source.logs_are_on = false,
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
                    return self.fails();
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
            CheckpointAction::Send | CheckpointAction::Greet => {}
        }
        if action == CheckpointAction::Pause {
            let number = self.moments.keys().next_back().map_or(1, |last| last + 1);
            self.moments.insert(number, (self.source.memory.clone(), self.source.device));
        }
        self.tell(CheckpointEvent::Done);
    }
}
