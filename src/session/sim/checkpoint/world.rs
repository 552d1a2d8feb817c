//! Both sides, the connection between them, faults, and what must hold at the end.

use std::collections::{BTreeMap, VecDeque};

use super::super::findings::Findings;
use super::super::plan::Rng;
use super::plan::{Answer, CONFIRM_TIMEOUT, Fault, LIFE, Page, Plan, STEPS, Sent, StopIn, Way};
use super::source::Source;
use super::standby::Standby;
use crate::engine::{
    CheckpointBreakage, CheckpointCause, CheckpointEvent, CheckpointOutcome, StandbyAction, StandbyEnding,
    StandbyEvent,
};

pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) rng: Rng,
    pub(super) now: u64,
    pub(super) source: Source,
    pub(super) standby: Standby,
    pub(super) forward: VecDeque<Sent>,
    pub(super) back: VecDeque<Answer>,
    pub(super) is_connected: bool,
    pub(super) breakage: CheckpointBreakage,
    /// What each checkpoint is of: memory and device state when the guest was paused for it.
    pub(super) moments: BTreeMap<u64, (BTreeMap<Page, u64>, u64)>,
    pub(super) findings: Findings,
}

impl World {
    pub(super) fn new(seed: u64, breakage: CheckpointBreakage) -> Self {
        let mut rng = Rng::new(seed ^ 0xc4ec);
        let plan = Plan::of(&mut rng);
        let pages = plan
            .blocks
            .iter()
            .enumerate()
            .flat_map(|(block, pages)| (0..*pages).map(move |page| (block, page)));
        let memory = pages.map(|page| (page, if rng.one_in(3) { 0 } else { rng.next() | 1 })).collect();
        let source = Source::new(&plan, memory, breakage);
        let standby = Standby::new(&plan, breakage);
        Self {
            plan,
            rng,
            now: 0,
            source,
            standby,
            forward: VecDeque::new(),
            back: VecDeque::new(),
            is_connected: true,
            breakage,
            moments: BTreeMap::new(),
            findings: Findings::default(),
        }
    }

    pub(super) fn run(&mut self) {
        self.tell(CheckpointEvent::Begin);
        self.answer(StandbyEvent::Begin);
        while self.now < STEPS && !self.is_over() {
            self.now += 1;
            self.fault();
            match self.rng.below(5) {
                0 => self.guest_steps(),
                1 | 2 if self.source.lives && !self.source.is_stopped(self.now) => self.source_steps(),
                3 | 4 if self.standby.lives && !self.is_standby_stopped() => self.standby_steps(),
                _ => {}
            }
            let both = self.source_runs() && self.standby.runs;
            self.findings.must(!both || self.is_word_false(), "both sides run the guest");
            self.check_pause();
        }
        self.check();
    }

    /// The guest waits for its standby for a limited time. What is done when that is over takes steps, too.
    fn check_pause(&mut self) {
        let source = &self.source;
        let stands_still = source.lives && !source.runs && source.outcome.is_none();
        let was_stopped = matches!(self.plan.fault, Fault::StopSource(..));
        let is_long = stands_still && !was_stopped && self.now > source.paused_at + CONFIRM_TIMEOUT + 200;
        self.findings.must(!is_long, "the guest stands still for too long");
    }

    /// The standby's embedder is wrong.
    pub(super) fn is_word_false(&self) -> bool {
        matches!(self.plan.fault, Fault::FalseDeath(_))
    }

    /// From this step on nothing comes in this direction.
    pub(super) fn is_hole(&self, way: Way) -> bool {
        match self.plan.fault {
            Fault::Hole(at, which) => self.now >= at && which.is_none_or(|which| which == way),
            Fault::EndedLost(at, which) => self.now >= at && which == way,
            Fault::Stall(at, steps, which, true) => self.now >= at + steps && which.other() == way,
            _ => false,
        }
    }

    /// What comes in this direction comes later.
    pub(super) fn is_stalled(&self, way: Way) -> bool {
        match self.plan.fault {
            Fault::Stall(at, steps, which, _) => (at..at + steps).contains(&self.now) && which == way,
            _ => false,
        }
    }

    fn is_standby_stopped(&self) -> bool {
        match self.plan.fault {
            Fault::StopStandby(at, steps) => (at..at + steps).contains(&self.now),
            _ => false,
        }
    }

    fn is_over(&self) -> bool {
        let source = !self.source.lives || self.source.outcome.is_some();
        source && (!self.standby.lives || self.standby.ending.is_some())
    }

    /// A part of what is on its way may be lost.
    fn cut(&mut self) {
        self.is_connected = false;
        let (forward, back) = (self.forward.len() as u64, self.back.len() as u64);
        self.forward.truncate(self.rng.below(forward + 1) as usize);
        self.back.truncate(self.rng.below(back + 1) as usize);
    }

    fn fault(&mut self) {
        let now = self.now;
        if self.source.lives && self.rng.one_in(self.plan.demands_every) {
            self.tell_beside(CheckpointEvent::Demand);
        }
        match self.plan.fault {
            Fault::KillSource(at, _) if at == now => {
                (self.source.lives, self.source.runs) = (false, false);
                self.cut();
            }
            // With a lease nobody needs to say it.
            Fault::KillSource(at, after) if at + after + 1 == now && self.plan.leasing.is_none() => {
                self.activate();
            }
            Fault::StopSource(at, steps, StopIn::Anything) if at == now && self.source.lives => {
                self.source.stopped_until = Some(now + steps);
            }
            Fault::Discard(at) if at == now => self.command(StandbyEvent::Discard),
            Fault::KillStandby(at) if at == now => {
                (self.standby.lives, self.standby.runs) = (false, false);
                self.cut();
            }
            Fault::Cut(at) if at == now => self.cut(),
            Fault::Hole(at, _) if at == now && self.is_hole(Way::Forward) => self.forward.clear(),
            Fault::FalseDeath(at) if at == now => self.activate(),
            Fault::Ended(at) | Fault::EndedLost(at, _) if at == now => {
                self.tell_beside(CheckpointEvent::Stop)
            }
            Fault::Ended(_) if self.standby.was_released => self.activate(),
            _ => {}
        }
        if now == LIFE {
            self.tell_beside(CheckpointEvent::Stop);
        }
        // In the end the embedder knows that the source has not died.
        // A standby that has nothing to start waits for its embedder, with a lease too.
        let nothing_starts = self.plan.leasing.is_some() && self.standby.engine.wake_at().is_none();
        if now > LIFE && !self.source.lives && nothing_starts {
            self.command(StandbyEvent::Discard);
        }
        let starts_itself = self.plan.leasing.is_some() && self.standby.engine.wake_at().is_some();
        if now > LIFE && self.source.outcome.is_some() && !self.source.runs_elsewhere() && !starts_itself {
            self.command(StandbyEvent::Discard);
        }
    }

    fn activate(&mut self) {
        if matches!(self.standby.doing, Some(StandbyAction::Apply(_))) {
            self.findings.saw("activated while a checkpoint is applied");
        }
        self.command(StandbyEvent::Activate);
        if self.standby.engine.applied() == 0 {
            self.findings.saw("activated before the first checkpoint");
        }
        if self.rng.one_in(3) {
            // The handle is dropped.
            self.command(StandbyEvent::Discard);
        }
    }

    fn command(&mut self, command: StandbyEvent) {
        self.standby.is_to_start.get_or_insert(command == StandbyEvent::Activate);
        self.standby_hears(command);
    }

    /// What must hold after any run.
    fn check(&mut self) {
        if self.source.lives {
            self.check_source();
        }
        if self.standby.lives {
            self.check_standby();
        }
        // These have ends of their own.
        let is_usable = !self.standby.is_torn && !self.plan.load_fails;
        if matches!(self.plan.fault, Fault::FalseDeath(_)) {
            self.findings.must(!(self.source.runs && self.standby.runs), "a guest that was taken runs");
        }
        if self.plan.fault == Fault::None && is_usable {
            let stopped = self.source.outcome == Some(CheckpointOutcome::Stopped);
            self.findings
                .must(stopped && self.source.safe > 0, "nothing was wrong and nothing was protected");
        }
        if matches!(self.plan.fault, Fault::KillSource(..)) && self.source.safe > 0 && is_usable {
            self.findings.must(self.standby.runs, "the guest runs nowhere");
        }
    }

    fn check_source(&mut self) {
        let Some(outcome) = self.source.outcome else {
            return self.findings.must(false, "the source does not end");
        };
        self.findings.must(!self.source.logs_are_on, "a log is left on");
        if outcome == CheckpointOutcome::Taken {
            let runs = self.source_runs();
            return self.findings.must(!runs, "a guest that was taken runs");
        }
        let cause = self.source.engine.cause();
        if outcome == CheckpointOutcome::Fenced {
            self.findings.saw("fenced");
            self.findings.must(self.plan.leasing.is_some(), "a guest is fenced that needs no lease");
            let runs = self.source_runs();
            self.findings.must(!runs, "a guest that may be started elsewhere runs");
            self.findings.must(self.source.has_error || cause.is_some(), "nobody says why it ended");
            let fault = matches!(self.plan.fault, Fault::None | Fault::Discard(_));
            let given_up = self.standby.ending == Some(StandbyEnding::Discarded) && fault;
            return self.findings.must(!given_up, "a guest stands still that its standby has given up");
        }
        self.findings.must(self.source.runs, "the guest does not run on");
        match outcome {
            CheckpointOutcome::Stopped => self.findings.saw("stopped"),
            _ => {
                self.findings.saw("unprotected");
                self.findings.must(self.source.has_error || cause.is_some(), "nobody says why it ended");
            }
        }
        if let Some(CheckpointCause::Unconfirmed(_)) = cause {
            self.findings.saw("not confirmed in time");
        }
    }

    fn check_standby(&mut self) {
        match self.standby.ending {
            None => self.findings.must(false, "the standby does not end"),
            Some(StandbyEnding::Released) => self.findings.saw("released"),
            Some(StandbyEnding::Nothing) => {
                let safe = self.source.safe;
                self.findings.must(safe == 0, "a checkpoint that was safe is lost");
            }
            Some(StandbyEnding::Discarded) => {
                let was_to_start = self.standby.is_to_start == Some(true) && !self.standby.is_torn;
                self.findings.must(!was_to_start, "a guest that was to start is given up");
            }
            Some(_) => {}
        }
    }
}
