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

use self::guest::Guest;
use self::plan::Plan;
use self::world::World;
use super::findings::{finds_each, survey};
use super::plan::Rng;
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
    let describe =
        |world: &World| format!("{:#?}\n{:?} after {} steps", world.plan, world.outcome, world.now);
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
    survey(SEEDS, |seed| run(seed, SnapshotBreakage::None), |world| world.findings, describe, &all);
}

#[test]
fn each_order_of_a_snapshot_is_needed() {
    let orders = [
        (SnapshotBreakage::LiftFirst, ["not of one moment"]),
        (SnapshotBreakage::CopyTwice, ["not of one moment"]),
        (SnapshotBreakage::ResumeUnprotected, ["not of one moment"]),
        (SnapshotBreakage::StayProtected, ["protection is left on"]),
        (SnapshotBreakage::StayPaused, ["does not run on"]),
        (SnapshotBreakage::CloseUnresumed, ["taken, and the guest does not run"]),
        (SnapshotBreakage::LeaveOpen, ["not of one moment"]),
        (SnapshotBreakage::LookOnce, ["not of one moment"]),
        (SnapshotBreakage::DeafWhilePausing, ["it does not end"]),
    ];
    finds_each(MUTANT_SEEDS, orders, |seed, order| run(seed, order).findings.violations());
}
