//! The source's host: its engine, and a guest that writes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::plan::{Answer, CONFIRM_TIMEOUT, Fault, Page, Plan, Sent, StopIn, Way};
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
    /// Its process is stopped until this step.
    pub(super) stopped_until: Option<u64>,
    /// Since when the guest is being paused for want of a lease.
    pub(super) fences_since: Option<u64>,
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
            doing: None,
            actions: 0,
            waits_since: None,
            paused_at: 0,
            logs_are_on: false,
            has_error: false,
            runs: true,
            lives: true,
            stopped_until: None,
            fences_since: None,
            outcome: None,
            safe: 0,
        }
    }

    pub(super) fn runs_elsewhere(&self) -> bool {
        !self.lives || self.outcome == Some(CheckpointOutcome::Taken)
    }

    pub(super) fn is_stopped(&self, now: u64) -> bool {
        self.stopped_until.is_some_and(|until| now < until)
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
        self.source.engine.handle(self.source_clock(), event);
    }

    fn source_clock(&self) -> Duration {
        self.plan.clock(self.now, 0)
    }

    /// By the clock of now.
    fn lease_holds(&self) -> bool {
        self.source.engine.may_run_until().is_none_or(|until| self.source_clock() < until)
    }

    /// The source's vCPUs run.
    pub(super) fn source_runs(&self) -> bool {
        let checks = self.plan.leasing.is_some_and(|leasing| leasing.vcpus_check)
            && self.breakage != CheckpointBreakage::VcpusUnchecked;
        let source = &self.source;
        source.lives && source.runs && !source.is_stopped(self.now) && (!checks || self.lease_holds())
    }

    pub(super) fn guest_steps(&mut self) {
        if !self.source_runs() {
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
        if self.is_connected && !self.is_hole(Way::Forward) {
            self.forward.push_back(message);
        }
        self.is_connected
    }

    pub(super) fn source_steps(&mut self) {
        if self.source.outcome.is_some() {
            return;
        }
        self.source_hears();
        self.renews();
        if let Some(action) = self.source.doing.or_else(|| self.source.engine.poll()) {
            if self.source.doing.replace(action).is_none() {
                self.source.actions += 1;
                if self.is_stopped_in(action) {
                    return;
                }
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
        if self.source.engine.wake_at().is_some_and(|at| self.source_clock() >= at) {
            self.tell_beside(CheckpointEvent::Time);
        }
    }

    /// Between other steps, and between the pages of a checkpoint.
    fn renews(&mut self) {
        if self.source.waits_since.is_some() {
            return;
        }
        if let Some(number) = self.source.engine.renewal(self.source_clock()) {
            self.sends(Sent::Renew(number));
        }
    }

    fn is_stopped_in(&mut self, action: CheckpointAction) -> bool {
        let Fault::StopSource(at, steps, within) = self.plan.fault else { return false };
        let stops = match within {
            StopIn::Anything => true,
            StopIn::Report => matches!(action, CheckpointAction::ReportSafe(_)),
            StopIn::Resume => action == CheckpointAction::Resume,
        };
        if !stops || self.now < at || self.source.stopped_until.is_some() {
            return false;
        }
        self.findings.saw("the source's process is stopped");
        self.source.stopped_until = Some(self.now + steps);
        true
    }

    /// The action was decided when the lease still held.
    fn comes_too_late(&mut self, action: CheckpointAction) -> bool {
        use CheckpointAction::{ReportSafe, Resume, Unfence};
        let needs_lease = matches!(action, ReportSafe(_) | Resume | Unfence);
        let is_unchecked = match self.breakage {
            CheckpointBreakage::OutputUnchecked | CheckpointBreakage::OutputPastLease => {
                matches!(action, ReportSafe(_))
            }
            CheckpointBreakage::ResumePastLease => action == Resume,
            _ => false,
        };
        if needs_lease && !is_unchecked && !self.lease_holds() {
            self.findings.saw("the lease has run out before an action");
            self.tell(CheckpointEvent::TooLate);
            return true;
        }
        false
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
        let now = self.source_clock();
        let since = *self.source.waits_since.get_or_insert(self.now);
        match self.source.engine.give_up_at() {
            Some(at) if now >= at => {
                if !self.source.runs {
                    self.findings.saw("paused for too long");
                }
                self.tell(CheckpointEvent::Failed);
            }
            None if !self.source.runs => {}
            None if self.now > since + CONFIRM_TIMEOUT => self.fails(),
            _ => {}
        }
        true
    }

    fn source_hears(&mut self) {
        if self.is_stalled(Way::Back) {
            return;
        }
        match self.back.pop_front() {
            _ if self.is_hole(Way::Back) => {}
            Some(Answer::Confirm(number)) => self.tell_beside(CheckpointEvent::Confirmed(number)),
            Some(Answer::Taken) => {
                self.findings.saw("the source learns that its guest was taken");
                self.tell_beside(CheckpointEvent::Taken);
            }
            Some(Answer::Released) => self.tell_beside(CheckpointEvent::Released),
            Some(Answer::Grant(number)) => self.tell_beside(CheckpointEvent::Granted(number)),
            Some(Answer::Discarded) => {
                self.findings.saw("the source learns that its standby has no guest");
                self.tell_beside(CheckpointEvent::Discarded);
            }
            None if !self.is_connected => self.tell_beside(CheckpointEvent::Lost),
            None => {}
        }
    }

    fn perform(&mut self, action: CheckpointAction) {
        if self.waits_for_room(action) || self.comes_too_late(action) {
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
            CheckpointAction::Fence if self.source.runs && self.is_fencing() => return,
            CheckpointAction::Fence => {
                if self.source.runs {
                    self.source.paused_at = self.now;
                }
                (self.source.runs, self.source.fences_since) = (false, None);
            }
            CheckpointAction::Unfence => {
                self.findings.saw("the guest runs on when the lease is renewed");
                self.source.runs = true;
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
                let is_beside = self.standby.runs && self.plan.leasing.is_some() && !self.is_word_false();
                self.findings.must(!is_beside, "output is let out beside the guest at the standby");
                self.source.safe = number;
                self.findings.saw("safe");
            }
            CheckpointAction::Release => {
                if !self.sends(Sent::Release) {
                    return self.fails();
                }
            }
            CheckpointAction::Finish(outcome) => {
                self.source.outcome = Some(outcome);
                self.is_connected &= outcome == CheckpointOutcome::Stopped;
                return;
            }
            // READY has not come.
            CheckpointAction::Greet if self.is_connected && !self.standby.has_greeted => return,
            CheckpointAction::Send | CheckpointAction::Greet => {}
        }
        if action == CheckpointAction::Pause {
            let number = self.moments.keys().next_back().map_or(1, |last| last + 1);
            self.moments.insert(number, (self.source.memory.clone(), self.source.device));
        }
        self.tell(CheckpointEvent::Done);
    }

    /// Pausing takes some steps.
    fn is_fencing(&mut self) -> bool {
        self.findings.saw("the guest is paused for want of a lease");
        let steps = self.plan.leasing.map_or(0, |leasing| leasing.pause_steps);
        let since = *self.source.fences_since.get_or_insert(self.now);
        self.now < since + steps
    }
}
