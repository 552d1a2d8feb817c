//! Checkpoints of a writing guest at a standby, with faults, under a seed.
//!
//! Real are both engines, and the standby's cache with memory of its own. The source's guest, the connection and the
//! embedders are machines that take a step at a time, in an order that follows from the seed; pages are sent and applied
//! one by one, so that writes and commands come in between:
//!
//! ```text
//! RAMWIRE_SIM_SEED=1234 cargo test --lib session::sim::checkpoint -- --nocapture
//! ```

mod plan;
mod source;
mod standby;
mod world;

use self::world::World;
use super::findings::{finds_each, survey};
use crate::engine::CheckpointBreakage;

/// Seeds of an ordinary test run.
const SEEDS: u64 = 3000;
/// Seeds among which each order that is switched off must be found.
const MUTANT_SEEDS: u64 = 6000;

fn run(seed: u64, breakage: CheckpointBreakage) -> World {
    let mut world = World::new(seed, breakage);
    world.run();
    world
}

#[test]
fn a_guest_starts_from_a_whole_checkpoint_and_runs_once() {
    let describe = |world: &World| {
        let (source, standby) = (world.source.outcome, world.standby.ending);
        format!("{:#?}\n{source:?} {standby:?} after {} steps", world.plan, world.now)
    };
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
        "paused for too long",
        "not confirmed in time",
        "memory could not be written to",
        "the device state could not be loaded",
        "the lease has run out at the standby",
        "the guest is paused for want of a lease",
        "the guest runs on when the lease is renewed",
        "the source learns that its standby has no guest",
        "the source's process is stopped",
        "the lease has run out before an action",
        "fenced",
    ];
    survey(SEEDS, |seed| run(seed, CheckpointBreakage::None), |world| world.findings, describe, &all);
}

#[test]
fn each_order_of_a_checkpoint_is_needed() {
    let orders = [
        (CheckpointBreakage::ResumeFirst, ["memory is of no moment"]),
        (CheckpointBreakage::SaveRunning, ["device state is of another moment"]),
        (CheckpointBreakage::SafeUnconfirmed, ["let out is contradicted"]),
        (CheckpointBreakage::ResumeTaken, ["a guest that was taken runs"]),
        (CheckpointBreakage::StayPaused, ["does not run on"]),
        (CheckpointBreakage::ConfirmEarly, ["let out is contradicted"]),
        (CheckpointBreakage::ActivateHalfApplied, ["memory is of no moment"]),
        (CheckpointBreakage::ActivateOnLoss, ["both sides run"]),
        (CheckpointBreakage::ActivateReleased, ["both sides run"]),
        (CheckpointBreakage::PlaceEarly, ["memory is of no moment"]),
        (CheckpointBreakage::StateEarly, ["device state is of another moment"]),
        (CheckpointBreakage::LeaveLogsOn, ["a log is left on"]),
        (CheckpointBreakage::WaitPaused, ["stands still for too long"]),
        (CheckpointBreakage::WaitUnconfirmed, ["the source does not end"]),
        (CheckpointBreakage::DiscardActivated, ["was to start is given up"]),
        (CheckpointBreakage::StartUntold, ["a guest that was taken runs"]),
        (CheckpointBreakage::StartFromNothing, ["starts from no checkpoint"]),
        (CheckpointBreakage::StartTorn, ["memory is of no moment"]),
        (CheckpointBreakage::StartUnloaded, ["device state is of another moment"]),
        (CheckpointBreakage::LeaseFromReceipt, ["both sides run"]),
        (CheckpointBreakage::RunPastLease, ["both sides run"]),
        (CheckpointBreakage::ResumePastLease, ["both sides run"]),
        (CheckpointBreakage::OutputPastLease, ["let out beside"]),
        (CheckpointBreakage::LostRunsOn, ["both sides run"]),
        (CheckpointBreakage::FreeUnanswered, ["both sides run"]),
        (CheckpointBreakage::StayFenced, ["its standby has given up"]),
        (CheckpointBreakage::WaitLess, ["both sides run"]),
        (CheckpointBreakage::WaitWithoutMargin, ["both sides run"]),
        (CheckpointBreakage::GrantUncounted, ["both sides run"]),
        (CheckpointBreakage::StartDiscarded, ["both sides run"]),
        (CheckpointBreakage::VcpusUnchecked, ["both sides run"]),
        (CheckpointBreakage::OutputUnchecked, ["let out beside"]),
    ];
    finds_each(MUTANT_SEEDS, orders, |seed, order| run(seed, order).findings.violations());
}
