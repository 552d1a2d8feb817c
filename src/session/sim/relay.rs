//! A relay between a source and a far end, with faults, under a seed.
//!
//! The relay's engine, the hub that performs its decisions, and the bitmap of received pages are real. The two
//! sessions, the source and the far end are state machines that take one step at a time, in an order that follows from
//! the seed:
//!
//! ```text
//! RAMWIRE_SIM_SEED=1234 cargo test --lib session::sim::relay -- --nocapture
//! ```

mod ends;
mod plan;
mod postcopy;
mod sides;
mod urgent;

use self::ends::{Far, Source};
use self::plan::{FarKind, Fault, Plan};
use self::sides::Relay;
use super::findings::{Findings, finds_each, survey};
use super::plan::Rng;
use crate::engine::RelayAction;
use crate::session::Breakage;

/// Seeds of an ordinary test run.
const SEEDS: u64 = 3000;
/// Seeds among which the violation of each switched-off order must be found.
const MUTANT_SEEDS: u64 = 1000;
/// Steps after which there is no more progress.
const STEPS: u64 = 8000;
/// Pages of the guest.
const PAGES: usize = 40;
/// Pages that a relay may have read ahead: its first backlog, and what the fastest far end takes in its time.
const MAX_AHEAD: u64 = 4 + 20 + 4;

/// The whole simulated world.
struct World {
    plan: Plan,
    rng: Rng,
    now: u64,
    given_at: Option<u64>,
    source: Source,
    relay: Option<Relay>,
    /// Another process holds the source's connection, and listens to the far end.
    guarded: bool,
    /// The source has taken its guest back, cut off after the far end was given it: no relay prevents that.
    taken_back: bool,
    far: Far,
    findings: Findings,
}

impl World {
    fn new(plan: Plan, breakage: Breakage) -> Self {
        Self {
            rng: Rng::new(plan.seed ^ 0x9e1a),
            now: 0,
            given_at: None,
            source: Source::new(&plan),
            relay: Some(Relay::new(breakage)),
            guarded: false,
            taken_back: false,
            far: Far::new(&plan),
            findings: Findings::default(),
            plan,
        }
    }

    fn saw(&mut self, what: &'static str) {
        self.findings.saw(what);
    }

    fn must(&mut self, holds: bool, what: &str) {
        self.findings.must(holds, what);
    }

    fn run(&mut self) {
        for now in 0..STEPS {
            self.now = now;
            if self.fault_at() == Some(now) {
                self.fault();
            }
            match self.rng.below(4) {
                0 => self.source_steps(),
                1 => {
                    self.near_steps();
                    if self.plan.preempt && self.rng.one_in(2) {
                        self.urgent_steps();
                    }
                }
                2 => self.far_side_steps(),
                _ => self.far_steps(),
            }
            self.guard_steps();
            if now % 64 == 0 {
                self.operator_looks();
            }
            let twice = self.source.runs && self.far.runs && !self.taken_back;
            self.must(!twice, "the guest runs twice");
        }
        self.check();
    }

    /// When the fault happens: counted from the start, or from the moment at which the source has handed over the
    /// guest.
    fn fault_at(&mut self) -> Option<u64> {
        if self.source.gave_away {
            self.given_at.get_or_insert(self.now);
        }
        let from = if self.plan.counts_from_giving { self.given_at? } else { 0 };
        Some(from + self.plan.at)
    }

    fn fault(&mut self) {
        match self.plan.fault {
            None => {}
            Some(Fault::RelayDies) => {
                let doubt = self.relay.as_ref().is_some_and(Relay::is_given_away);
                self.saw(if doubt { "relay killed in doubt" } else { "relay killed" });
                self.relay_ends();
            }
            Some(Fault::Cancel) => {
                let refused = self.relay.as_ref().is_some_and(|relay| !relay.cancel());
                self.saw(if refused { "cancel too late" } else { "cancelled" });
            }
            Some(Fault::FarDies) => {
                self.saw("far end killed");
                self.far.dies();
            }
            Some(Fault::FarCut) => self.far_is_cut(),
            Some(Fault::SourceDies) => {
                self.saw("source killed");
                self.source.dies();
            }
            Some(Fault::SourceCut) => self.source_is_cut(),
            Some(Fault::UrgentCut) => self.urgent_is_cut(),
        }
    }

    fn source_is_cut(&mut self) {
        self.saw("source cut off");
        let ran = self.source.runs;
        self.source.is_cut();
        self.took_back(ran);
    }

    /// The source has lost a connection; before that it `ran` the guest or not.
    fn took_back(&mut self, ran: bool) {
        let given = self.relay.as_ref().is_some_and(|relay| relay.has(RelayAction::GiveAway));
        let back = self.source.runs && !ran;
        self.taken_back = given && back;
        if given && back && self.source.post.switched {
            self.saw("source took its guest back from postcopy");
        }
        if back && !given {
            self.saw("source went before its guest was given away");
        }
    }

    /// The relay's process is gone: its connections close, except for those held elsewhere.
    fn relay_ends(&mut self) {
        let Some(relay) = self.relay.take() else { return };
        self.guarded = relay.is_held();
        self.source.post.urgent.is_held = self.guarded && relay.holds_urgent();
        self.far.stream_ends();
        if !self.guarded {
            self.source.connection_ends();
            self.far.answers_close();
        }
    }

    /// Another process holds the source's connection and receives the far end's answer there.
    fn guard_steps(&mut self) {
        if !self.guarded {
            return;
        }
        if self.source.is_gone() {
            self.guarded = false;
        } else if std::mem::take(&mut self.far.post.took) {
            self.saw("taken told by the guard");
            self.guarded = false;
            self.tell_taken();
            self.source.post.hears();
            self.source.connection_ends();
        } else if let Some(runs) = self.far.answer() {
            match (runs, self.plan.far) {
                (true, _) => self.tell_source(true),
                (false, _) if self.far.post.switched => self.tell_source(false),
                (false, FarKind::Qemu) => self.tell_source(false),
                // A ramwire's refusal after COMMIT proves nothing.
                (false, FarKind::Ramwire) => return,
            }
            self.saw("answer told by the guard");
            self.guarded = false;
        }
    }

    /// An operator checks the far end while the guest is in doubt.
    fn operator_looks(&mut self) {
        let in_doubt = self.relay.as_ref().map_or(self.guarded, Relay::is_in_doubt);
        if !in_doubt || !self.plan.operator {
            return;
        }
        if self.far.runs && self.source.post.switched {
            // Its source has what it misses.
            self.saw("in doubt in postcopy, and it runs");
        } else if self.far.runs {
            self.saw("operator ended the source");
            self.source.dies();
        } else if self.far.is_dead() {
            self.saw("operator let the source go on");
            match &self.relay {
                Some(relay) => relay.not_there(),
                None => {
                    self.guarded = false;
                    self.tell_source(false);
                }
            }
        }
    }

    fn tell_source(&mut self, runs: bool) {
        let true_word = !runs || self.far.runs || self.far.ran;
        self.must(true_word, "the source was told that the guest runs before it did");
        self.must(runs || !self.far.runs, "the source was told of a failure while the guest runs");
        self.source.told(runs);
    }

    fn check(&mut self) {
        let (here, there) = (self.source.runs, self.far.runs);
        let given = self.source.gave_away;
        let doubt = self.relay.as_ref().map_or(self.guarded, Relay::is_in_doubt);
        if doubt {
            self.saw("in doubt to the end");
            let known = there || self.far.is_dead() || self.far.post.is_stuck();
            self.must(known, "in doubt although the far end has neither answered nor died");
            let heard = self.relay.is_some() && self.source.post.taken;
            self.must(!heard, "in doubt although the source knows that its guest was taken");
        }
        let lost = given && !self.source.has_return_path() && !self.source.dead && !there && !self.far.ran;
        let at_source = self.relay.as_ref().is_some_and(Relay::says_at_source);
        self.must(!(lost && at_source), "a guest that runs nowhere is said to be at its source");
        if lost && self.relay.as_ref().is_some_and(Relay::is_unanswered) {
            self.saw("given away unasked, and runs nowhere");
        }
        let each_keeps = self.relay.as_ref().is_some_and(Relay::is_incomplete);
        self.must(
            !(self.taken_back && each_keeps),
            "a source that took its guest back is taken for one that waits",
        );
        if self.plan.fault.is_none() && !self.plan.far_refuses {
            self.must(there, "nothing was wrong and the guest did not move");
            let whole = !self.far.post.switched || self.far.post.complete && self.source.is_gone();
            self.must(whole, "nothing was wrong and the guest is not whole at the far end");
        }
        // A guest whose host dies while it runs there is lost in any case.
        let source_whole = !self.source.dead || !given;
        let relay_whole = self.relay.is_some() && given;
        self.must(there || self.far.ran || source_whole || relay_whole, "the guest is whole nowhere");
        // A guest that was not handed over continues; a refused one resumes if its source can do so.
        if !given && !self.source.dead {
            self.must(here, "the guest was not given away and does not run");
        }
        if there {
            self.saw("runs at the far end");
        }
        if here {
            self.saw("runs at the source");
        }
    }
}

fn run_seed(seed: u64, breakage: Breakage) -> World {
    let mut world = World::new(Plan::of(seed), breakage);
    world.run();
    world
}

/// What the seeds of a test run must reach.
const ALL: [&str; 29] = [
    "runs at the far end",
    "runs at the source",
    "relay killed",
    "relay killed in doubt",
    "answer told by the guard",
    "cancelled",
    "cancel too late",
    "far end killed",
    "source killed",
    "operator ended the source",
    "operator let the source go on",
    "in doubt",
    "late answer",
    "source held back",
    "switched to postcopy",
    "asked for what the relay did not have",
    "whole in postcopy",
    "the ends were left to each other",
    "connection lost in postcopy",
    "taken told by the guard",
    "source went before its guest was given away",
    "source took its guest back from postcopy",
    "given away unasked, and runs nowhere",
    "source kept its guest unasked",
    "urgent page placed",
    "the end came before urgent pages",
    "an urgent page left as such",
    "connection for urgent pages lost",
    "an urgent page was sent to the guard",
];

#[test]
fn simulated_relays_give_the_guest_to_one_side() {
    let describe = |world: &World| format!("{:#?}", world.plan);
    survey(SEEDS, |seed| run_seed(seed, Breakage::None), |world| world.findings, describe, &ALL);
}

/// Symptoms of a switched-off order: one of these.
fn symptoms(order: Breakage) -> &'static [&'static str] {
    match order {
        Breakage::TellBeforeFarEnd => &["was told that the guest runs before it did"],
        Breakage::DoubtIsFailure | Breakage::LeaveUnguarded => &["runs twice"],
        Breakage::AskBeforeFarEnd => &["asked for its guest before the far end could take it"],
        Breakage::GiveBeforeGiven => &["runs twice", "before its source gave it"],
        Breakage::ReadWithoutBound => &["pages wait to be sent on"],
        Breakage::MarkBeforeCopy => &["started with other memory", "a page that is older"],
        Breakage::TakenBeforeFarEnd => &["told that its guest was taken before it was", "runs twice"],
        Breakage::UnguardEarly => &["runs twice"],
        Breakage::LossIsFailure => &["told of a failure while the guest runs"],
        Breakage::ForgetOwed => &["a page that is older"],
        Breakage::AskNobody => &["waits for a page that nobody was asked for"],
        Breakage::GiveToGone => &["runs twice"],
        Breakage::TrustUnasked => &["runs nowhere is said to be at its source"],
        Breakage::EndWithoutSource | Breakage::EndWithMain => &["ended while pages were missing"],
        Breakage::LeaveUrgentUnguarded | Breakage::PartWhenMoved => &["runs twice"],
        Breakage::ReportUrgentEarly => &["a page that is older"],
        Breakage::EndBeforeUrgent => &["the guest is not whole at the far end"],
        Breakage::LoseRequested => {
            &["waits for a page that nobody was asked for", "is not whole at the far end"]
        }
        _ => &[],
    }
}

#[test]
fn each_order_of_a_relay_switched_off_is_found() {
    let orders = Breakage::OF_RELAYS.map(|order| (order, symptoms(order)));
    finds_each(MUTANT_SEEDS, orders, |seed, order| run_seed(seed, order).findings.violations());
}
