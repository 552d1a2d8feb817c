//! Checkpoints of a writing guest at a standby, with faults, under a seed.
//!
//! Real are both engines, and the standby's cache with memory of its own. The source's guest, the connection and the
//! embedders are machines that take a step at a time, in an order that follows from the seed; pages are sent and applied
//! one by one, so that writes and commands come in between:
//!
//! ```text
//! RAMWIRE_SIM_SEED=1234 cargo test --lib session::sim::checkpoint -- --nocapture
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::plan::Rng;
use super::{number_from, spread};
use crate::engine::{
    CheckpointAction, CheckpointBreakage, CheckpointConfig, CheckpointEngine, CheckpointEvent,
    CheckpointOutcome, StandbyAction, StandbyEnding, StandbyEngine, StandbyEvent,
};
use crate::guest::{CheckpointCache, MappedGuest};
use crate::ram::{BlockName, PageRun, RamBlock};
use crate::sys::Mapping;
use crate::units::{BlockIndex, PageIndex, PageSize};

/// Seeds of an ordinary test run.
const SEEDS: u64 = 2000;
/// Seeds among which each order that is switched off must be found.
const MUTANT_SEEDS: u64 = 1000;
/// Steps after which nothing moves any more.
const STEPS: u64 = 20_000;
/// A step, as the engine's clock counts.
const STEP: Duration = Duration::from_millis(1);
/// Steps until the embedder ends the protection.
const LIFE: u64 = 3000;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// The so manyth action of the source can't be done.
    Action(u64),
    /// The source's process is killed at this step, and the standby's embedder learns of it so many steps later.
    KillSource(u64, u64),
    KillStandby(u64),
    /// The connection is cut at this step.
    Cut(u64),
    /// From this step on nothing comes through.
    Hole(u64),
    /// The standby's embedder is wrong: the source lives.
    FalseDeath(u64),
    /// The protection is ended at this step, and the standby's embedder is wrong about it.
    Ended(u64),
}

#[derive(Clone, Debug)]
struct Plan {
    blocks: Vec<u64>,
    config: CheckpointConfig,
    /// One step in so many is a write.
    writes_every: u64,
    /// One step in so many is a demand for a checkpoint.
    demands_every: u64,
    fault: Fault,
}

impl Plan {
    fn of(rng: &mut Rng) -> Self {
        let blocks = (0..1 + rng.below(3)).map(|_| 1 + rng.below(6)).collect();
        let at = |rng: &mut Rng| 1 + rng.below(LIFE / 2);
        let fault = match rng.below(12) {
            0 => Fault::Action(rng.below(60)),
            1..=4 => Fault::KillSource(at(rng), rng.below(60)),
            5 => Fault::KillStandby(at(rng)),
            6 => Fault::Cut(at(rng)),
            7 => Fault::Hole(at(rng)),
            8 => Fault::FalseDeath(at(rng)),
            9 => Fault::Ended(at(rng)),
            _ => Fault::None,
        };
        let config = CheckpointConfig {
            interval: if rng.one_in(4) { None } else { Some(STEP * rng.below(60) as u32) },
            live_rounds: rng.below(4) as u32,
            live_pages: rng.below(6),
            confirm_timeout: STEP * 800,
        };
        let (writes_every, demands_every) = (rng.pick(&[2, 5, 20]), rng.pick(&[50, 300]));
        Self { blocks, config, writes_every, demands_every, fault }
    }
}

type Page = (usize, u64);

/// A message of the source.
#[derive(Clone, Copy, Debug)]
enum Sent {
    Open(u64),
    Page(Page, u64),
    State(u64),
    Close(u64, u64),
    Release,
}

/// A message of the standby.
#[derive(Clone, Copy, Debug)]
enum Answer {
    Confirm(u64),
    Taken,
    Released,
}

/// The source's host.
struct Source {
    engine: CheckpointEngine,
    memory: BTreeMap<Page, u64>,
    device: u64,
    log: BTreeSet<Page>,
    dirty: BTreeSet<Page>,
    in_checkpoint: u64,
    /// Since when it waits for the answer to the end.
    released_at: Option<u64>,
    doing: Option<CheckpointAction>,
    actions: u64,
    runs: bool,
    lives: bool,
    outcome: Option<CheckpointOutcome>,
    safe: u64,
}

/// The standby's host.
struct Standby {
    engine: StandbyEngine,
    guest: Arc<MappedGuest>,
    cache: CheckpointCache,
    doing: Option<StandbyAction>,
    come: u64,
    device: u64,
    was_released: bool,
    runs: bool,
    lives: bool,
    ending: Option<StandbyEnding>,
}

struct World {
    plan: Plan,
    rng: Rng,
    now: u64,
    source: Source,
    standby: Standby,
    forward: VecDeque<Sent>,
    back: VecDeque<Answer>,
    is_connected: bool,
    is_hole: bool,
    /// What each checkpoint is of: memory and device state when the guest was paused for it.
    moments: BTreeMap<u64, (BTreeMap<Page, u64>, u64)>,
    violations: Vec<String>,
    seen: Vec<&'static str>,
}

impl World {
    fn new(seed: u64, breakage: CheckpointBreakage) -> Self {
        let mut rng = Rng::new(seed ^ 0xc4ec);
        let plan = Plan::of(&mut rng);
        let pages = plan
            .blocks
            .iter()
            .enumerate()
            .flat_map(|(block, pages)| (0..*pages).map(move |page| (block, page)));
        let memory = pages.map(|page| (page, if rng.one_in(3) { 0 } else { rng.next() | 1 })).collect();
        let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
        for (index, pages) in plan.blocks.iter().enumerate() {
            let name = BlockName::new(&format!("b{index}")).unwrap();
            let mapping = Mapping::anonymous(pages * 4096).unwrap();
            builder = builder.mapping(RamBlock::new(name, pages * 4096), &mapping);
        }
        let guest = Arc::new(builder.build().unwrap());
        let mut cache = CheckpointCache::new(guest.clone()).unwrap();
        cache.break_order(
            breakage == CheckpointBreakage::PlaceEarly,
            breakage == CheckpointBreakage::StateEarly,
        );
        let (mut engine, mut far) = (CheckpointEngine::new(plan.config), StandbyEngine::default());
        engine.break_order(breakage);
        far.break_order(breakage);
        let source = Source {
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
        };
        let standby = Standby {
            engine: far,
            guest,
            cache,
            doing: None,
            come: 0,
            device: 0,
            was_released: false,
            runs: false,
            lives: true,
            ending: None,
        };
        Self {
            plan,
            rng,
            now: 0,
            source,
            standby,
            forward: VecDeque::new(),
            back: VecDeque::new(),
            is_connected: true,
            is_hole: false,
            moments: BTreeMap::new(),
            violations: Vec::new(),
            seen: Vec::new(),
        }
    }

    fn must(&mut self, holds: bool, what: &str) {
        if !holds && !self.violations.iter().any(|known| known == what) {
            self.violations.push(what.to_owned());
        }
    }

    fn saw(&mut self, what: &'static str) {
        if !self.seen.contains(&what) {
            self.seen.push(what);
        }
    }

    fn tell(&mut self, event: CheckpointEvent) {
        self.source.doing = None;
        self.source.engine.handle(STEP * self.now as u32, event);
    }

    /// An event that is no answer to an action.
    fn tell_beside(&mut self, event: CheckpointEvent) {
        self.source.engine.handle(STEP * self.now as u32, event);
    }

    fn answer(&mut self, event: StandbyEvent) {
        self.standby.doing = None;
        self.standby.engine.handle(event);
    }

    fn run(&mut self) {
        self.tell(CheckpointEvent::Begin);
        self.answer(StandbyEvent::Begin);
        while self.now < STEPS && !self.is_over() {
            self.now += 1;
            self.fault();
            match self.rng.below(5) {
                0 => self.guest_steps(),
                1 | 2 if self.source.lives => self.source_steps(),
                3 | 4 if self.standby.lives => self.standby_steps(),
                _ => {}
            }
            let is_false = matches!(self.plan.fault, Fault::FalseDeath(_));
            self.must(is_false || !(self.source.runs && self.standby.runs), "both sides run the guest");
        }
        self.check();
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
            Fault::KillSource(at, after) if at + after + 1 == now => self.activate(),
            Fault::KillStandby(at) if at == now => {
                (self.standby.lives, self.standby.runs) = (false, false);
                self.cut();
            }
            Fault::Cut(at) if at == now => self.cut(),
            Fault::Hole(at) if at == now => self.is_hole = true,
            Fault::FalseDeath(at) if at == now => self.activate(),
            Fault::Ended(at) if at == now => self.tell_beside(CheckpointEvent::Stop),
            Fault::Ended(_) if self.standby.was_released => self.activate(),
            _ => {}
        }
        if now == LIFE {
            self.tell_beside(CheckpointEvent::Stop);
        }
        // In the end the embedder knows that the source has not died.
        if now > LIFE && self.source.outcome.is_some() && !self.source.runs_elsewhere() {
            self.standby.engine.handle(StandbyEvent::Discard);
        }
    }

    fn activate(&mut self) {
        if matches!(self.standby.doing, Some(StandbyAction::Apply(_))) {
            self.saw("activated while a checkpoint is applied");
        }
        self.standby.engine.handle(StandbyEvent::Activate);
        if self.standby.engine.last() == 0 {
            self.saw("activated before the first checkpoint");
        }
    }

    fn guest_steps(&mut self) {
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

    fn source_steps(&mut self) {
        if self.source.outcome.is_some() {
            return;
        }
        self.source_hears();
        if let Some(action) = self.source.doing.or_else(|| self.source.engine.poll()) {
            if self.source.doing.replace(action).is_none() {
                self.source.actions += 1;
                let may_fail = !matches!(action, CheckpointAction::Finish(_) | CheckpointAction::Resume);
                if self.plan.fault == Fault::Action(self.source.actions) && may_fail {
                    self.saw("an action failed");
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
                self.saw("the source learns that its guest was taken");
                self.tell_beside(CheckpointEvent::Taken);
            }
            Some(Answer::Released) if self.source.doing == Some(CheckpointAction::Release) => {
                self.tell(CheckpointEvent::Done);
            }
            Some(Answer::Released) => self.must(false, "an answer to nothing"),
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
                self.must(number == self.source.safe + 1, "safe checkpoints out of order");
                self.source.safe = number;
                self.saw("safe");
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

    fn standby_steps(&mut self) {
        if self.standby.ending.is_some() {
            return;
        }
        let Some(action) = self.standby.doing.or_else(|| self.standby.engine.poll()) else { return };
        self.standby.doing = Some(action);
        match action {
            StandbyAction::Receive => return self.receive(),
            StandbyAction::Confirm(number) => self.answers(Answer::Confirm(number)),
            // A page a step.
            StandbyAction::Apply(_) if !self.standby.cache.apply(1).unwrap() => {
                // A command may have ended it.
                self.standby.doing = None;
                if self.standby.engine.is_applying() {
                    self.standby.doing = Some(action);
                }
                return;
            }
            StandbyAction::TellTaken(_) => {
                self.answers(Answer::Taken);
                self.is_connected = false;
            }
            StandbyAction::Load => {
                let state = self.standby.cache.state();
                self.standby.device = state.try_into().map_or(0, u64::from_be_bytes);
            }
            StandbyAction::Start => self.starts(),
            StandbyAction::AnswerRelease => self.answers(Answer::Released),
            StandbyAction::Finish(ending) => {
                self.standby.ending = Some(ending);
                return;
            }
            StandbyAction::Greet | StandbyAction::Apply(_) => {}
        }
        self.answer(StandbyEvent::Done);
    }

    fn answers(&mut self, answer: Answer) {
        if self.is_connected && !self.is_hole {
            self.back.push_back(answer);
        }
    }

    fn receive(&mut self) {
        let message = match self.forward.pop_front() {
            Some(message) => message,
            None if !self.is_connected => return self.answer(StandbyEvent::Lost),
            // A command ends the wait.
            None => return self.answer(StandbyEvent::Done),
        };
        let event = match message {
            Sent::Open(number) => {
                self.standby.come = 0;
                StandbyEvent::Opened(number)
            }
            Sent::Page((block, page), value) => {
                let run = PageRun { block: BlockIndex(block as u32), first: PageIndex(page), pages: 1 };
                let landing = self.standby.cache.admit(run).unwrap();
                if value == 0 {
                    self.standby.cache.zero(landing);
                } else {
                    let span = self.standby.cache.target(landing).unwrap();
                    span.part(0, 8).unwrap().copy_from(&value.to_be_bytes());
                    self.standby.cache.commit(landing);
                }
                self.standby.come += 1;
                StandbyEvent::Done
            }
            Sent::State(device) => {
                self.standby.cache.set_state(device.to_be_bytes().into());
                StandbyEvent::Done
            }
            Sent::Close(number, pages) if pages == self.standby.come => StandbyEvent::Whole(number),
            Sent::Close(..) => StandbyEvent::Failed,
            Sent::Release => {
                self.standby.was_released = true;
                StandbyEvent::Released
            }
        };
        self.answer(event);
    }

    /// The guest starts at the standby: it must be the one of a checkpoint, and no earlier than what was let out.
    fn starts(&mut self) {
        self.saw("the guest starts at the standby");
        self.standby.runs = true;
        let number = self.standby.engine.applied();
        if self.standby.cache.pages() > 0 {
            self.saw("a part of the next checkpoint is dropped");
        }
        let safe = self.source.safe;
        self.must(number >= safe, "what was let out is contradicted");
        let Some((memory, device)) = self.moments.get(&number).cloned() else {
            return self.must(false, "the guest starts from no checkpoint");
        };
        let same = memory.iter().all(|(page, value)| self.page_at_standby(*page) == *value);
        self.must(same, "memory is of no moment");
        self.must(self.standby.device == device, "the device state is of another moment");
    }

    fn page_at_standby(&self, (block, page): Page) -> u64 {
        let region = self.standby.guest.region(BlockIndex(block as u32)).unwrap();
        let mut bytes = [0; 8];
        region.span(page * 4096, 8).unwrap().copy_to(&mut bytes);
        u64::from_be_bytes(bytes)
    }

    /// What must hold after any run.
    fn check(&mut self) {
        if self.source.lives {
            match self.source.outcome {
                None => self.must(false, "the source does not end"),
                Some(CheckpointOutcome::Taken) => self.must(!self.source.runs, "a guest that was taken runs"),
                Some(outcome) => {
                    self.must(self.source.runs, "the guest does not run on");
                    self.saw(if outcome == CheckpointOutcome::Stopped { "stopped" } else { "unprotected" });
                }
            }
        }
        if self.standby.lives {
            match self.standby.ending {
                None => self.must(false, "the standby does not end"),
                Some(StandbyEnding::Released) => self.saw("released"),
                Some(StandbyEnding::Nothing) => {
                    let safe = self.source.safe;
                    self.must(safe == 0, "a checkpoint that was safe is lost");
                }
                Some(_) => {}
            }
        }
        if matches!(self.plan.fault, Fault::FalseDeath(_)) {
            self.must(!(self.source.runs && self.standby.runs), "a guest that was taken runs");
        }
        if self.plan.fault == Fault::None {
            let stopped = self.source.outcome == Some(CheckpointOutcome::Stopped);
            self.must(stopped && self.source.safe > 0, "nothing was wrong and nothing was protected");
        }
        if matches!(self.plan.fault, Fault::KillSource(..)) && self.source.safe > 0 {
            self.must(self.standby.runs, "the guest runs nowhere");
        }
    }
}

impl Source {
    fn runs_elsewhere(&self) -> bool {
        !self.lives || self.outcome == Some(CheckpointOutcome::Taken)
    }
}

fn run(seed: u64, breakage: CheckpointBreakage) -> World {
    let mut world = World::new(seed, breakage);
    world.run();
    world
}

#[test]
fn a_guest_starts_from_a_whole_checkpoint_and_runs_once() {
    if let Some(seed) = number_from("RAMWIRE_SIM_SEED") {
        let world = run(seed, CheckpointBreakage::None);
        println!(
            "{:#?}\n{:?} {:?} after {} steps: {:?}",
            world.plan, world.source.outcome, world.standby.ending, world.now, world.seen
        );
        assert!(world.violations.is_empty(), "{:#?}", world.violations);
        return;
    }
    let seeds = number_from("RAMWIRE_SIM_SEEDS").unwrap_or(SEEDS);
    let runs = spread(0..seeds, |seed| {
        let world = run(seed, CheckpointBreakage::None);
        (seed, world.seen, world.violations)
    });
    let mut coverage: BTreeMap<&str, u64> = BTreeMap::new();
    for (_, seen, _) in &runs {
        seen.iter().for_each(|what| *coverage.entry(what).or_default() += 1);
    }
    println!("of {seeds} seeds: {coverage:#?}");
    let broken: Vec<_> = runs.iter().filter(|(_, _, violations)| !violations.is_empty()).take(5).collect();
    assert!(broken.is_empty(), "replay a seed with RAMWIRE_SIM_SEED: {broken:#?}");
    let all = [
        "safe",
        "stopped",
        "released",
        "unprotected",
        "an action failed",
        "the guest starts at the standby",
        "a part of the next checkpoint is dropped",
        "activated while a checkpoint is applied",
        "activated before the first checkpoint",
        "the source learns that its guest was taken",
    ];
    let missing: Vec<_> = all.iter().filter(|what| !coverage.contains_key(**what)).collect();
    assert!(seeds < SEEDS || missing.is_empty(), "never reached: {missing:?}");
}

#[test]
fn each_order_of_a_checkpoint_is_needed() {
    for (order, symptom) in [
        (CheckpointBreakage::ResumeFirst, "memory is of no moment"),
        (CheckpointBreakage::SaveRunning, "device state is of another moment"),
        (CheckpointBreakage::SafeUnconfirmed, "let out is contradicted"),
        (CheckpointBreakage::ResumeTaken, "a guest that was taken runs"),
        (CheckpointBreakage::StayPaused, "does not run on"),
        (CheckpointBreakage::ConfirmEarly, "let out is contradicted"),
        (CheckpointBreakage::ActivateHalfApplied, "memory is of no moment"),
        (CheckpointBreakage::ActivateOnLoss, "both sides run"),
        (CheckpointBreakage::ActivateReleased, "both sides run"),
        (CheckpointBreakage::PlaceEarly, "memory is of no moment"),
        (CheckpointBreakage::StateEarly, "device state is of another moment"),
    ] {
        let sees = |seed: &u64| run(*seed, order).violations.iter().any(|what| what.contains(symptom));
        let found = (0..MUTANT_SEEDS).find(sees);
        println!("{order:?}: found by seed {found:?}");
        assert!(found.is_some(), "no seed below {MUTANT_SEEDS} finds {order:?}");
    }
}
