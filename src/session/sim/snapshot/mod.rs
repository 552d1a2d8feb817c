//! Snapshots of a writing guest, with faults, under a seed.
//!
//! Real are the snapshot's engine, its list of changed pages, and the chain that a reader follows. Memory, its protection,
//! its dirty log, the writers, and what takes the copies are machines that take a step at a time, in an order that follows
//! from the seed; a run of pages is copied page by page, so that writers come in between:
//!
//! ```text
//! RAMWIRE_SIM_SEED=1234 cargo test --lib session::sim::snapshot -- --nocapture
//! ```
//!
//! `world` is one snapshot; `series` takes one after the other of the same guest, each against the one before, and reads
//! their files.

mod guest;
mod plan;
mod series;
mod world;

use std::collections::BTreeMap;

use self::guest::Guest;
use self::plan::Plan;
use self::world::World;
use super::plan::Rng;
use super::{number_from, spread};
use crate::engine::{ChangedPages, SnapshotBreakage};

/// Seeds of an ordinary test run.
const SEEDS: u64 = 2000;
/// Seeds among which each order that is switched off must be found.
const MUTANT_SEEDS: u64 = 1000;

fn run(seed: u64, breakage: SnapshotBreakage) -> World {
    let mut rng = Rng::new(seed ^ 0x54a9);
    let plan = Plan::of(&mut rng);
    let guest = Guest::new(&plan, &mut rng);
    let mut world = World::new(plan, rng, guest, ChangedPages::of_all(), breakage);
    world.run();
    world
}

#[test]
fn a_snapshot_is_of_one_moment_and_its_guest_runs_on() {
    if let Some(seed) = number_from("RAMWIRE_SIM_SEED") {
        let world = run(seed, SnapshotBreakage::None);
        println!("{:#?}\n{:?} after {} steps: {:?}", world.plan, world.outcome, world.now, world.seen);
        assert!(world.violations.is_empty(), "{:#?}", world.violations);
        return;
    }
    let seeds = number_from("RAMWIRE_SIM_SEEDS").unwrap_or(SEEDS);
    let runs = spread(0..seeds, |seed| {
        let world = run(seed, SnapshotBreakage::None);
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
        "taken",
        "failed",
        "cancelled",
        "cancel too late",
        "stalled",
        "an action failed",
        "a writer waits",
        "a callback failed",
        "a writer is let through before the moment",
        "a writer gives up",
        "protected again",
    ];
    let missing: Vec<_> = all.iter().filter(|what| !coverage.contains_key(**what)).collect();
    assert!(seeds < SEEDS || missing.is_empty(), "never reached: {missing:?}");
}

#[test]
fn each_order_of_a_snapshot_is_needed() {
    for (order, symptom) in [
        (SnapshotBreakage::LiftFirst, "not of one moment"),
        (SnapshotBreakage::CopyTwice, "not of one moment"),
        (SnapshotBreakage::ResumeUnprotected, "not of one moment"),
        (SnapshotBreakage::StayProtected, "protection is left on"),
        (SnapshotBreakage::StayPaused, "does not run on"),
        (SnapshotBreakage::CloseUnresumed, "taken, and the guest does not run"),
        (SnapshotBreakage::LeaveOpen, "not of one moment"),
        (SnapshotBreakage::LookOnce, "not of one moment"),
        (SnapshotBreakage::DeafWhilePausing, "it does not end"),
    ] {
        let sees = |seed: &u64| run(*seed, order).violations.iter().any(|what| what.contains(symptom));
        let found = (0..MUTANT_SEEDS).find(sees);
        println!("{order:?}: found by seed {found:?}");
        assert!(found.is_some(), "no seed below {MUTANT_SEEDS} finds {order:?}");
    }
}
