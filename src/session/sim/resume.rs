//! Connections that are lost before the source knows that the guest runs at the destination, and replaced.
//!
//! ```text
//! RAMWIRE_SIM_SEED=1234 cargo test --lib session::sim::resume -- --nocapture
//! RAMWIRE_SIM_SEEDS=100000 cargo test --lib session::sim::resume
//! ```

use std::collections::BTreeMap;
use std::time::Duration;

use super::channel::{SimSink, SimSource};
use super::findings::finds_each;
use super::guest::Guest;
use super::plan::{Plan, Side};
use super::run::{Run, run, run_plan};
use super::world::{Mark, Sim, World};
use super::{number_from, spread};
use crate::engine::{Ending, Outcome};
use crate::session::destination::{BothWays, Further};
use crate::session::{Breakage, Error, NewConnection, Reconnect};
use crate::sys::{Stop, StopReason};
use crate::transport::{Address, ChannelError, OpenError};

/// Seeds of an ordinary test run.
const SEEDS: u64 = 2000;
/// Seeds among which each order that is switched off must be found.
const MUTANT_SEEDS: u64 = 3000;
/// A look for a connection takes less than this, a wait more.
const LOOK: Duration = Duration::from_millis(10);

fn nobody() -> OpenError {
    ChannelError::Closed { peer: "sim".into(), doing: "connecting again" }.into()
}

/// The source connects again, as often as it wants while the destination lives.
pub(super) struct Again(pub(super) Sim);

impl Again {
    /// Real time, in which only a destination that is gone is tried again and again.
    pub(super) const TIMEOUT: Duration = Duration::from_millis(30);
}

impl Reconnect for Again {
    fn connect(&mut self, _address: Option<&Address>, _stop: &Stop) -> Result<NewConnection, OpenError> {
        let mut turn = self.0.enter();
        if turn.world.killed || turn.world.is_done(Side::Target) || turn.world.is_endless() {
            turn.world.mark(Mark::Unreachable);
            return Err(nobody());
        }
        if turn.world.throttle != 0 && turn.world.commit.is_none() {
            turn.world.violation("the guest is throttled while there is no connection");
        }
        let generation = turn.world.connect_again();
        drop(turn.may_pass());
        let sim = || self.0.clone();
        Ok(NewConnection {
            sink: Box::new(SimSink { sim: sim(), side: Side::Source, generation }),
            back: Box::new(SimSource { sim: sim(), from: Side::Target, generation }),
        })
    }
}

/// The destination takes the connections of the source, in any order.
pub(super) struct Takes(pub(super) Sim);

impl Further for Takes {
    fn next(&mut self, stop: &Stop) -> Result<BothWays, OpenError> {
        let looks = stop.left().is_some_and(|left| left < LOOK);
        let ready = |world: &mut World| {
            let over = world.killed || world.is_endless() || stop.reason() == Some(StopReason::Cancelled);
            match world.offered.len() as u64 {
                _ if over => Some(None),
                0 if looks || world.is_done(Side::Source) => Some(None),
                0 => None,
                count => {
                    let at = world.rng.below(count) as usize;
                    if at > 0 {
                        world.mark(Mark::Overtook);
                    }
                    Some(Some(world.offered.remove(at)))
                }
            }
        };
        let (turn, generation) = self.0.enter().wait_for(ready);
        drop(turn);
        let Some(generation) = generation.flatten() else { return Err(nobody()) };
        let sim = || self.0.clone();
        Ok((
            Box::new(SimSource { sim: sim(), from: Side::Source, generation }),
            Box::new(SimSink { sim: sim(), side: Side::Target, generation }),
        ))
    }
}

/// What a run reached.
fn facts(run: &Run) -> Vec<(&'static str, bool)> {
    let (sent, world) = (&run.sent, &run.world);
    let lost = &sent.statistics.lost;
    let marked = |mark| world.marks.contains(&mark);
    let completed = sent.outcome == Outcome::Completed;
    let channels = world.link.has_barriers();
    // Of the last connection's cache.
    let deltas_go_on = lost.count > 0 && sent.statistics.deltas.cache_size > 0;
    let gave_up = marked(Mark::GaveUp);
    // The setup is one more.
    let rounds_opened = 1 + sent.statistics.rounds.len() as u64;
    let paused_twice = sent.statistics.rounds.iter().filter(|round| round.paused).count() > 1;
    vec![
        ("completed after a loss", completed && lost.count > 0),
        ("completed after three losses or more", completed && lost.count > 2),
        ("completed after five losses", completed && lost.count > 4),
        ("completed after two last rounds", completed && paused_twice),
        ("completed, asked behind COMMIT", completed && marked(Mark::AskedBehindCommit)),
        ("completed, and nothing went twice", completed && lost.count > 0 && lost.pages_again == 0),
        ("completed, and pages went twice", completed && lost.pages_again > 0),
        ("completed after a stall", completed && marked(Mark::Stalled)),
        ("completed, verified", completed && lost.count > 0 && run.arrived.verified),
        ("an older connection is taken later", completed && marked(Mark::Overtook)),
        ("stayed: lost too early", matches!(sent.outcome, Outcome::StaysHere(_)) && lost.count == 0),
        ("stayed: killed after a loss", world.killed && lost.count > 1),
        ("in doubt: killed", sent.outcome == Outcome::InDoubt && world.killed),
        ("cancelled after a loss", marked(Mark::CancelRaised) && lost.count > 0 && !completed),
        ("discarded there", run.arrived.ending == Ending::Discarded),
        ("completed with differences behind a loss", completed && deltas_go_on),
        ("completed, and began with page channels", completed && lost.count > 0 && channels),
        ("completed, and began by RDMA", completed && lost.count > 0 && world.link.has_keys()),
        ("a fence within a round", world.link.has_keys() && world.link.opened > rounds_opened),
        ("completed, and a NIC lost what it had acknowledged", completed && marked(Mark::LostAcknowledged)),
        ("completed, and page channels or a NIC were lost alone", completed && marked(Mark::CallFailed)),
        ("a lost page was counted at a fence", matches!(run.arrived.error, Some(Error::LostPages(_)))),
        ("completed, and a lost page was sent again", completed && marked(Mark::Dropped)),
        ("told that the guest stays", gave_up && matches!(run.arrived.error, Some(Error::PeerFailed { .. }))),
        ("told without an outage", gave_up && lost.count == 0),
    ]
}

#[test]
fn lost_connections_lose_no_page_and_no_guest() {
    if let Some(seed) = number_from("RAMWIRE_SIM_SEED") {
        let plan = Plan::lossy(seed);
        println!("{plan:#?}");
        let run = run_plan(&plan, Breakage::None).unwrap_or_else(|broken| panic!("seed {seed}: {broken:#?}"));
        println!("{:?} {:?} {:#?}", run.sent.outcome, run.sent.error, run.sent.statistics.lost);
        println!("{:?} {:?} {:?}", run.arrived.ending, run.arrived.error, run.world.marks);
        return;
    }
    let seeds = number_from("RAMWIRE_SIM_SEEDS").unwrap_or(SEEDS);
    let runs = spread(0..seeds, |seed| match run_plan(&Plan::lossy(seed), Breakage::None) {
        Ok(run) => Ok(facts(&run)),
        Err(broken) => Err((seed, broken)),
    });
    let mut coverage = BTreeMap::new();
    let mut failed = Vec::new();
    for run in runs {
        match run {
            Ok(facts) => facts.into_iter().for_each(|(name, is_so)| {
                *coverage.entry(name).or_insert(0) += u64::from(is_so);
            }),
            Err(broken) => failed.push(broken),
        }
    }
    println!("of {seeds} seeds: {coverage:#?}");
    for (seed, broken) in failed.iter().take(5) {
        println!("seed {seed} failed; replay it with RAMWIRE_SIM_SEED={seed}: {broken:#?}");
    }
    assert!(failed.is_empty(), "{} of {seeds} seeds failed", failed.len());
    if seeds >= SEEDS {
        assert!(coverage.values().all(|seeds| *seeds > 0), "never reached: {coverage:#?}");
    }
}

/// A connection that is agreed on and lost again, for ever, is no progress: the time to connect again ends the migration.
#[test]
fn connections_that_lead_to_nothing_end_the_migration() {
    const SEEDS: u64 = 20;
    let runs = spread(0..SEEDS, |seed| {
        let plan = Plan::lost_for_ever(seed);
        let guest = Guest::new(&plan);
        run(plan, guest, Breakage::None).unwrap_or_else(|broken| panic!("seed {seed}: {broken:#?}"))
    });
    let mut again = 0;
    for run in runs {
        let (seed, world) = (run.world.plan.seed, &run.world);
        let found = (run.sent.outcome, &run.sent.error, run.arrived.ending, &world.violations);
        assert!(
            matches!(run.sent.outcome, Outcome::StaysHere(_)) && run.arrived.ending == Ending::Discarded,
            "seed {seed}: {found:?}"
        );
        assert!(!world.is_endless() && world.guest.running[0], "seed {seed}: {found:?}");
        again += run.sent.statistics.lost.count;
    }
    assert!(again > 3 * SEEDS, "the source went on for a while: {again}");
}

#[test]
fn each_order_of_a_loss_is_needed() {
    let symptoms = |order| match order {
        Breakage::KeepOldState => &["another device state", "the guest did not move"][..],
        Breakage::StartWhenResumed => &["before COMMIT was received", "runs on the other side"],
        Breakage::EndUnacknowledged => &["in doubt although both ends live"],
        Breakage::ThrottleWithoutConnection => &["throttled while there is no connection"],
        Breakage::GiveUpSilently => &["was not told that the guest stays"],
        Breakage::ResumeAfterLoss => &["was resumed after COMMIT", "runs on the other side"],
        _ => &["started with other memory", "differs from the source's", "the guest did not move"],
    };
    let orders = Breakage::OF_LOSSES.map(|order| (order, symptoms(order)));
    finds_each(MUTANT_SEEDS, orders, |seed, order| {
        run_plan(&Plan::lossy(seed), order).err().unwrap_or_default()
    });
}
