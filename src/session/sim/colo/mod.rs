//! Checkpoints of a QEMU (COLO) at a standby, with faults, under a seed.
//!
//! Real are the standby's engine, its parser and its cache with memory of its own; they are given bytes, as many at a time
//! as the seed says. The primary is a machine that does as QEMU does, a step at a time:
//!
//! ```text
//! RAMWIRE_SIM_SEED=1234 cargo test --lib session::sim::colo -- --nocapture
//! ```

mod primary;
mod secondary;
mod world;

use self::world::World;
use super::findings::{finds_each, survey};
use crate::engine::CheckpointBreakage;

/// Seeds of an ordinary test run.
const SEEDS: u64 = 2000;
/// Seeds among which each order that is switched off must be found.
const MUTANT_SEEDS: u64 = 4000;

fn run(seed: u64, breakage: CheckpointBreakage) -> World {
    let mut world = World::new(seed, breakage);
    world.run();
    world
}

#[test]
fn a_guest_of_a_qemu_starts_from_a_whole_checkpoint_and_runs_once() {
    let describe = |world: &World| {
        let (safe, ending) = (world.primary.safe, world.secondary.ending);
        format!("{:#?}\nsafe {safe}, {ending:?} after {} steps", world.plan, world.now)
    };
    let all = [
        "safe",
        "the guest starts at the standby",
        "killed between checkpoints",
        "killed in a checkpoint",
        "killed before the first checkpoint",
        "a part of the next checkpoint is dropped",
        "activated while a checkpoint is applied",
        "the connection is cut in a checkpoint",
        "memory could not be written to",
        "the device state could not be loaded",
    ];
    survey(SEEDS, |seed| run(seed, CheckpointBreakage::None), |world| world.findings, describe, &all);
}

#[test]
fn each_order_of_a_checkpoint_of_a_qemu_is_needed() {
    let orders = [
        (CheckpointBreakage::ActivateHalfApplied, ["memory is of no moment"]),
        (CheckpointBreakage::StartTorn, ["memory is of no moment"]),
        (CheckpointBreakage::PlaceEarly, ["memory is of no moment"]),
        (CheckpointBreakage::WholeWithoutState, ["device state is of another moment"]),
        (CheckpointBreakage::ActivateOnLoss, ["both sides run"]),
        (CheckpointBreakage::StartFromNothing, ["starts from no checkpoint"]),
        (CheckpointBreakage::StartUnloaded, ["device state is of another moment"]),
        (CheckpointBreakage::DiscardActivated, ["the guest runs nowhere"]),
    ];
    finds_each(MUTANT_SEEDS, orders, |seed, order| run(seed, order).findings.violations());
}
