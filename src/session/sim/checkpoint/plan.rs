//! What a seed means, and what the two sides say to each other.

use std::time::Duration;

use super::super::plan::Rng;
use crate::engine::CheckpointConfig;

/// Steps after which nothing moves any more.
pub(super) const STEPS: u64 = 20_000;
/// A step, as the engine's clock counts.
pub(super) const STEP: Duration = Duration::from_millis(1);
/// Steps in which the guest may be paused, and a checkpoint may be unconfirmed.
pub(super) const CONFIRM_TIMEOUT: u64 = 800;
/// Steps until the embedder ends the protection.
pub(super) const LIFE: u64 = 3000;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
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
    /// From this step on the standby takes bytes once in so many steps; 0: never.
    Slow(u64, u64),
    /// The protection is ended at this step, and the standby's embedder is wrong about it.
    Ended(u64),
}

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) blocks: Vec<u64>,
    pub(super) config: CheckpointConfig,
    /// One step in so many is a write.
    pub(super) writes_every: u64,
    /// One step in so many is a demand for a checkpoint.
    pub(super) demands_every: u64,
    pub(super) fault: Fault,
    /// The standby's memory can't be written to in the so manyth part of a checkpoint that is applied.
    pub(super) apply_fails: Option<u64>,
    /// The standby's VMM does not take the device state.
    pub(super) load_fails: bool,
}

impl Plan {
    pub(super) fn of(rng: &mut Rng) -> Self {
        let blocks = (0..1 + rng.below(3)).map(|_| 1 + rng.below(6)).collect();
        let at = |rng: &mut Rng| 1 + rng.below(LIFE / 2);
        let fault = match rng.below(14) {
            0 => Fault::Action(rng.below(60)),
            1..=4 => Fault::KillSource(at(rng), rng.below(60)),
            5 => Fault::KillStandby(at(rng)),
            6 => Fault::Cut(at(rng)),
            7 => Fault::Hole(at(rng)),
            8 => Fault::FalseDeath(at(rng)),
            9 => Fault::Ended(at(rng)),
            10 | 11 => Fault::Slow(at(rng), rng.pick(&[0, 300])),
            _ => Fault::None,
        };
        let config = CheckpointConfig {
            interval: if rng.one_in(4) { None } else { Some(STEP * rng.below(60) as u32) },
            live_rounds: rng.below(4) as u32,
            live_pages: rng.below(6),
            confirm_timeout: STEP * CONFIRM_TIMEOUT as u32,
        };
        let (writes_every, demands_every) = (rng.pick(&[2, 5, 20]), rng.pick(&[50, 300]));
        let apply_fails = if rng.one_in(8) { Some(1 + rng.below(40)) } else { None };
        let load_fails = rng.one_in(8);
        Self { blocks, config, writes_every, demands_every, fault, apply_fails, load_fails }
    }
}

pub(super) type Page = (usize, u64);

/// A message of the source.
#[derive(Clone, Copy, Debug)]
pub(super) enum Sent {
    Open(u64),
    Page(Page, u64),
    State(u64),
    Close(u64, u64),
    Release,
}

/// A message of the standby.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    Confirm(u64),
    Taken,
    Released,
}
