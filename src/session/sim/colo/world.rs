//! Both sides, the bytes between them, faults, and what must hold.

use std::collections::{BTreeMap, VecDeque};

use super::super::findings::Findings;
use super::super::plan::Rng;
use super::primary::Primary;
use super::secondary::Secondary;
use crate::engine::{CheckpointBreakage, StandbyAction, StandbyEnding, StandbyEvent};

/// Steps after which nothing moves any more.
const STEPS: u64 = 20_000;
/// Steps until the standby's operator ends it.
const LIFE: u64 = 2500;

pub(super) type Page = (usize, u64);

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// The primary is killed at this step, and the standby's operator learns of it so many steps later.
    Kill(u64, u64),
    /// The connection is cut at this step: the primary lives.
    Cut(u64),
}

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) blocks: Vec<u64>,
    /// One step in so many is a write.
    pub(super) writes_every: u64,
    /// Most steps between two checkpoints.
    pub(super) delay: u64,
    /// The stream has ENABLE_COLO.
    pub(super) says_colo: bool,
    fault: Fault,
    /// The standby's memory can't be written to in the so manyth part of a checkpoint that is applied.
    pub(super) apply_fails: Option<u64>,
    pub(super) load_fails: bool,
}

impl Plan {
    fn of(rng: &mut Rng) -> Self {
        let at = 1 + rng.below(LIFE / 2);
        let fault = match rng.below(8) {
            0 => Fault::None,
            1..=5 => Fault::Kill(at, rng.below(60)),
            _ => Fault::Cut(at),
        };
        Self {
            blocks: (0..1 + rng.below(3)).map(|_| 1 + rng.below(6)).collect(),
            writes_every: rng.pick(&[2, 5, 20]),
            delay: rng.pick(&[1, 40, 200]),
            says_colo: rng.one_in(2),
            fault,
            apply_fails: if rng.one_in(8) { Some(1 + rng.below(40)) } else { None },
            load_fails: rng.one_in(8),
        }
    }
}

pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) rng: Rng,
    pub(super) now: u64,
    pub(super) primary: Primary,
    pub(super) secondary: Secondary,
    pub(super) forward: VecDeque<u8>,
    pub(super) back: VecDeque<u8>,
    pub(super) is_connected: bool,
    /// What each checkpoint is of: memory and device state when the guest was paused for it.
    pub(super) moments: BTreeMap<u64, (BTreeMap<Page, u64>, u64)>,
    pub(super) findings: Findings,
}

impl World {
    pub(super) fn new(seed: u64, breakage: CheckpointBreakage) -> Self {
        let mut rng = Rng::new(seed ^ 0xc010);
        let plan = Plan::of(&mut rng);
        let blocks = plan.blocks.iter().enumerate();
        let pages = blocks.flat_map(|(block, pages)| (0..*pages).map(move |page| (block, page)));
        let memory = pages.map(|page| (page, if rng.one_in(3) { 0 } else { rng.next() | 1 })).collect();
        let secondary = Secondary::new(&plan, breakage);
        Self {
            plan,
            rng,
            now: 0,
            primary: Primary::new(memory),
            secondary,
            forward: VecDeque::new(),
            back: VecDeque::new(),
            is_connected: true,
            moments: BTreeMap::new(),
            findings: Findings::default(),
        }
    }

    pub(super) fn run(&mut self) {
        while self.now < STEPS && self.secondary.ending.is_none() {
            self.now += 1;
            self.fault();
            match self.rng.below(5) {
                0 => self.guest_steps(),
                1 | 2 if self.primary.lives => self.primary_steps(),
                3 | 4 => self.secondary_steps(),
                _ => {}
            }
            let both = self.primary.runs && self.secondary.runs;
            self.findings.must(!both, "both sides run the guest");
        }
        self.check();
    }

    /// A part of what is on its way may be lost.
    fn cut(&mut self) {
        self.is_connected = false;
        let left = self.rng.below(self.forward.len() as u64 + 1) as usize;
        self.forward.truncate(left);
    }

    fn fault(&mut self) {
        let now = self.now;
        match self.plan.fault {
            Fault::Kill(at, _) if at == now => {
                let moment = match () {
                    () if self.primary.safe == 0 => "killed before the first checkpoint",
                    () if self.primary.is_in_checkpoint() => "killed in a checkpoint",
                    () => "killed between checkpoints",
                };
                self.findings.saw(moment);
                (self.primary.lives, self.primary.runs) = (false, false);
                self.cut();
            }
            Fault::Kill(at, after) if at + after + 1 == now => self.activates(),
            Fault::Cut(at) if at == now => {
                if self.primary.is_in_checkpoint() {
                    self.findings.saw("the connection is cut in a checkpoint");
                }
                self.cut();
            }
            _ => {}
        }
        // The primary lives, as its operator finds.
        if now == LIFE && self.primary.lives {
            self.secondary_hears(StandbyEvent::Discard);
        }
    }

    fn activates(&mut self) {
        if matches!(self.secondary.doing, Some(StandbyAction::Apply(_))) {
            self.findings.saw("activated while a checkpoint is applied");
        }
        self.secondary_hears(StandbyEvent::Activate);
        if self.rng.one_in(3) {
            // The handle is dropped.
            self.secondary_hears(StandbyEvent::Discard);
        }
    }

    /// What must hold after any run.
    fn check(&mut self) {
        let is_usable = !self.secondary.is_torn && !self.plan.load_fails;
        match self.plan.fault {
            Fault::Kill(..) if self.primary.safe > 0 && is_usable => {
                self.findings.must(self.secondary.runs, "the guest runs nowhere");
            }
            Fault::None if is_usable => {
                self.findings.must(self.primary.safe > 1, "nothing was wrong and nothing was protected");
            }
            _ => {}
        }
        let is_given_up = self.secondary.ending == Some(StandbyEnding::Discarded);
        if self.primary.lives && is_usable {
            self.findings.must(is_given_up, "a guest that runs at its primary starts at the standby");
        }
    }
}
