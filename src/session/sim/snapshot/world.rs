//! One snapshot of a writing guest: memory, its protection, the writers, the VMM, and what takes the copies.

use std::collections::{BTreeMap, VecDeque};

use super::super::findings::Findings;
use super::super::plan::Rng;
use super::guest::{Guest, Page};
use super::plan::{Fault, Plan, STEP};
use crate::engine::{
    ChangedPages, Place, SnapshotAction, SnapshotBreakage, SnapshotEngine, SnapshotEvent, SnapshotOutcome,
};
use crate::ram::{PageRun, PageSet};

/// Steps after which nothing moves any more.
const STEPS: u64 = 20_000;

/// Pages with what they held, and where the copy lies.
type Copied = (Vec<(Page, u64)>, Place);

pub(super) fn pages_of(run: PageRun) -> impl Iterator<Item = Page> {
    (run.first.0..run.end().0).map(move |page| (run.block.as_usize(), page))
}

/// What the VMM is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Pause,
    SaveState,
    Resume,
}

pub(super) struct World {
    pub(super) plan: Plan,
    rng: Rng,
    pub(super) now: u64,
    engine: SnapshotEngine,
    pub(super) guest: Guest,
    pub(super) changes: ChangedPages,
    protected: BTreeMap<Page, bool>,
    /// What every page held when the guest was paused last.
    pub(super) moment: BTreeMap<Page, u64>,
    /// Writes of the guest before it.
    pub(super) moment_at: usize,
    runs: bool,
    /// Where each writer waits, and the value that it writes there.
    waiting: Vec<Option<(Page, u64)>>,
    /// The copy that is being made: pages to go, and values so far.
    copying: Option<(VecDeque<Page>, Copied)>,
    /// Pages that were reported to the engine as found.
    found: PageSet,
    /// The current callback, and when it returns.
    calling: Option<(Call, u64)>,
    /// Copies on their way.
    out: Vec<Copied>,
    pub(super) written: BTreeMap<Page, u64>,
    actions: u64,
    log_reads: u64,
    lost: bool,
    closed: bool,
    pub(super) outcome: Option<SnapshotOutcome>,
    pub(super) findings: Findings,
}

impl World {
    pub(super) fn new(
        plan: Plan,
        rng: Rng,
        guest: Guest,
        changes: ChangedPages,
        breakage: SnapshotBreakage,
    ) -> Self {
        let mut engine = SnapshotEngine::new(plan.config.clone());
        engine.break_order(breakage);
        let mut changes = changes;
        changes.break_order(breakage);
        Self {
            rng,
            now: 0,
            engine,
            guest,
            changes,
            protected: BTreeMap::new(),
            moment: BTreeMap::new(),
            moment_at: 0,
            runs: true,
            waiting: vec![None; plan.writers],
            copying: None,
            found: PageSet::new(&plan.table()),
            calling: None,
            out: Vec::new(),
            written: BTreeMap::new(),
            actions: 0,
            log_reads: 0,
            lost: false,
            closed: false,
            outcome: None,
            findings: Findings::default(),
            plan,
        }
    }

    fn tell(&mut self, event: SnapshotEvent) {
        self.engine.handle(STEP * self.now as u32, event);
    }

    pub(super) fn run(&mut self) {
        self.tell(SnapshotEvent::Begin);
        while self.now < STEPS && self.outcome.is_none() {
            self.now += 1;
            self.fault();
            match self.rng.below(6) {
                0 | 1 => self.writer_steps(),
                2 => self.target_steps(),
                3 => self.call_steps(),
                _ => self.engine_steps(),
            }
            if self.engine.wake_at().is_some_and(|at| STEP * self.now as u32 >= at) {
                self.findings.saw("stalled");
                self.tell(SnapshotEvent::Time);
            }
        }
        self.check();
    }

    fn fault(&mut self) {
        match self.plan.fault {
            Fault::Lost(at) if at == self.now => {
                self.lost = true;
                self.tell(SnapshotEvent::Lost);
            }
            Fault::Cancel(at) if at == self.now => {
                if self.engine.is_closing() {
                    self.findings.saw("cancel too late");
                }
                self.tell(SnapshotEvent::Cancel);
            }
            _ => {}
        }
    }

    /// A writer writes a page, or waits for one.
    fn writer_steps(&mut self) {
        if !self.runs {
            return;
        }
        self.write();
    }

    /// By a vCPU, or by the VMM itself.
    fn write(&mut self) {
        let writer = self.rng.below(self.waiting.len() as u64) as usize;
        if self.waiting[writer].is_some() {
            return;
        }
        let (page, value) = self.guest.draw(&mut self.rng);
        if self.protected.get(&page) == Some(&true) {
            self.findings.saw("a writer waits");
            self.waiting[writer] = Some((page, value));
            let fault = SnapshotEvent::Fault(self.plan.host_page(page.0, page.1));
            return self.tell(fault);
        }
        self.guest.write(page, value);
    }

    fn lift(&mut self, pages: impl Iterator<Item = Page>) {
        for page in pages {
            self.protected.insert(page, false);
            for writer in 0..self.waiting.len() {
                if let Some((_, value)) = self.waiting[writer].take_if(|(waited, _)| *waited == page) {
                    self.guest.write(page, value);
                }
            }
        }
    }

    fn target_steps(&mut self) {
        let stalls = matches!(self.plan.fault, Fault::Stalls(at) if self.now >= at);
        if self.out.is_empty() || self.lost || stalls || !self.rng.one_in(self.plan.takes_every) {
            return;
        }
        let which = self.rng.below(self.out.len() as u64) as usize;
        let (pages, place) = self.out.swap_remove(which);
        self.arrive(pages);
        self.tell(SnapshotEvent::Freed(place));
    }

    fn arrive(&mut self, pages: Vec<(Page, u64)>) {
        for (page, value) in pages {
            let before = self.written.insert(page, value);
            self.findings.must(before.is_none(), "a page was written twice");
        }
    }

    /// The VMM takes a step of its current callback.
    fn call_steps(&mut self) {
        let Some((call, at)) = self.calling else { return };
        let over = self.now >= at;
        let fails = match (call, self.plan.fault) {
            (Call::Pause, Fault::Pause) | (Call::SaveState, Fault::State) => over,
            (Call::Resume, Fault::Resume(after)) if self.now < at + after => return,
            (Call::Resume, Fault::Resume(_)) => true,
            _ => false,
        };
        let waits = self.waiting.iter().any(Option::is_some);
        match call {
            _ if fails => self.findings.saw("a callback failed"),
            // A thread that waits for a page either gives up, and writes when it runs again, or is waited for.
            Call::Pause if over && waits && self.rng.one_in(2) => {
                self.findings.saw("a writer gives up");
                self.waiting.iter_mut().for_each(|waiting| *waiting = None);
                self.runs = false;
            }
            Call::Pause if !over || waits => return,
            Call::Pause => self.runs = false,
            Call::SaveState if !over => return self.write(),
            Call::SaveState if waits => return,
            Call::SaveState => {
                self.moment = self.guest.memory.clone();
                self.moment_at = self.guest.writes.len();
            }
            Call::Resume => {
                self.runs = true;
                if !over {
                    return;
                }
            }
        }
        self.calling = None;
        self.tell(SnapshotEvent::Returned { done: !fails });
    }

    fn calls(&mut self, call: Call) {
        let at = self.now + self.rng.below(self.plan.call_takes + 1);
        let alone = self.calling.replace((call, at)).is_none();
        self.findings.must(alone, "a callback is called while another one is under way");
    }

    fn engine_steps(&mut self) {
        if let Some((left, (done, place))) = &mut self.copying {
            if let Some(page) = left.pop_front() {
                done.push((page, self.guest.memory[&page]));
                return;
            }
            let (done, place) = (std::mem::take(done), *place);
            self.copying = None;
            self.tell(SnapshotEvent::Done);
            if done.iter().all(|(_, value)| *value == 0) {
                self.arrive(done);
                return self.tell(SnapshotEvent::Freed(place));
            }
            return self.out.push((done, place));
        }
        let Some(action) = self.engine.poll() else { return };
        self.actions += 1;
        if self.plan.fault == Fault::Action(self.actions)
            && !matches!(action, SnapshotAction::Disarm | SnapshotAction::Finish(_))
        {
            self.findings.saw("an action failed");
            return self.tell(SnapshotEvent::Failed);
        }
        self.perform(action);
    }

    fn perform(&mut self, action: SnapshotAction) {
        match action {
            SnapshotAction::Pause => self.calls(Call::Pause),
            SnapshotAction::SaveState => self.calls(Call::SaveState),
            SnapshotAction::Resume => self.calls(Call::Resume),
            SnapshotAction::Look => {
                let answer = self.look().map_or(SnapshotEvent::Failed, SnapshotEvent::Found);
                return self.tell(answer);
            }
            SnapshotAction::Protect { run } => {
                for page in pages_of(run) {
                    if self.protected.insert(page, true) == Some(false) && !self.moment.is_empty() {
                        self.findings.saw("protected again");
                    }
                }
            }
            SnapshotAction::Copy { run, place } => {
                return self.copying = Some((pages_of(run).collect(), (Vec::new(), place)));
            }
            SnapshotAction::Lift { run } => {
                if self.moment.is_empty() {
                    self.findings.saw("a writer is let through before the moment");
                }
                self.lift(pages_of(run));
            }
            SnapshotAction::Disarm => {
                let all: Vec<_> = self.protected.keys().copied().collect();
                self.lift(all.into_iter());
            }
            SnapshotAction::Close => {
                for (pages, _) in std::mem::take(&mut self.out) {
                    self.arrive(pages);
                }
                if self.lost || matches!(self.plan.fault, Fault::Stalls(at) if self.now >= at) {
                    return self.tell(SnapshotEvent::Failed);
                }
                self.closed = true;
            }
            SnapshotAction::Finish(outcome) => return self.outcome = Some(outcome),
            SnapshotAction::Track if self.plan.tracked => {
                self.guest.log.start();
                self.changes.logged();
            }
            SnapshotAction::Track | SnapshotAction::Open | SnapshotAction::Arm | SnapshotAction::Abandon => {}
        }
        self.tell(SnapshotEvent::Done);
    }

    /// Pages that are to be written and were not reported before; `None` if that can't be found out.
    fn look(&mut self) -> Option<PageSet> {
        let table = self.plan.table();
        if self.plan.tracked {
            self.log_reads += 1;
            let fresh = self.guest.log.read(&self.plan);
            if self.plan.fault == Fault::Log(self.log_reads) {
                self.findings.saw("a log is lost");
                self.changes.lost();
                return None;
            }
            if let Some(changed) = self.changes.read(&fresh) {
                return Some(changed);
            }
        }
        let mut new = PageSet::new(&table);
        for (&(block, page), &value) in &self.guest.memory {
            let run = self.plan.host_page(block, page);
            // Memory that holds nothing is taken for used only by chance, as its neighbours are.
            if !self.found.touches(run) && (value != 0 || self.rng.one_in(8)) {
                new.add(run);
            }
        }
        new.runs().for_each(|run| _ = self.found.add(run));
        Some(new)
    }

    /// What must hold after any run.
    fn check(&mut self) {
        let Some(outcome) = self.outcome else {
            return self.findings.must(false, "it does not end");
        };
        let stuck = self.waiting.iter().any(Option::is_some) || self.protected.values().any(|on| *on);
        self.findings.must(!stuck, "protection is left on");
        self.findings.must(self.closed == (outcome == SnapshotOutcome::Taken), "a failed snapshot is whole");
        let could_run = !matches!(self.plan.fault, Fault::Resume(_) | Fault::Action(_));
        self.findings.must(self.runs || !could_run, "the guest does not run on");
        if outcome == SnapshotOutcome::Taken {
            self.findings.saw("taken");
            self.findings.must(self.runs, "taken, and the guest does not run");
            // Of one with a base the pages that are not in it are as they were.
            let changes_only = self.changes.has_base();
            let same = changes_only
                || self.moment.iter().all(|(page, value)| self.written.get(page).unwrap_or(&0) == value);
            self.findings.must(same, "it is not of one moment");
        }
        if self.plan.fault == Fault::None {
            self.findings.must(outcome == SnapshotOutcome::Taken, "nothing was wrong and it was not taken");
        }
        match outcome {
            SnapshotOutcome::Cancelled => self.findings.saw("cancelled"),
            SnapshotOutcome::Failed => self.findings.saw("failed"),
            SnapshotOutcome::Taken => {}
        }
    }
}
