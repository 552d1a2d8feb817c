//! What a seed means, and what the two sides say to each other.

use std::time::Duration;

use super::super::plan::Rng;
use crate::engine::{CheckpointConfig, LeaseConfig};

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
    /// From this step on nothing comes through, in both directions or in one.
    Hole(u64, Option<Way>),
    /// From this step on nothing comes in this direction for so many steps, and then all of it; with `true`, nothing comes
    /// in the other direction any more from then on.
    Stall(u64, u64, Way, bool),
    /// The source's process is stopped for so many steps: at this step, or behind it before it performs such an action.
    StopSource(u64, u64, StopIn),
    StopStandby(u64, u64),
    /// The standby's embedder gives the guest up at this step.
    Discard(u64),
    /// The protection is ended at this step, and from then on nothing comes in this direction.
    EndedLost(u64, Way),
    /// The standby's embedder is wrong: the source lives.
    FalseDeath(u64),
    /// From this step on the standby takes bytes once in so many steps; 0: never.
    Slow(u64, u64),
    /// The protection is ended at this step, and the standby's embedder is wrong about it.
    Ended(u64),
}

/// A direction of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Forward,
    Back,
}

/// What a process that is stopped was about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopIn {
    Anything,
    Report,
    Resume,
}

/// A lease, and the clocks by which it is counted: in thousandths of true time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leasing {
    pub(super) config: LeaseConfig,
    pub(super) rates: [u32; 2],
    /// The vCPUs look at the lease before they enter the guest.
    pub(super) vcpus_check: bool,
    /// Steps in which the guest is paused for want of a lease.
    pub(super) pause_steps: u64,
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
    pub(super) leasing: Option<Leasing>,
}

impl Way {
    pub(super) fn other(self) -> Self {
        match self {
            Self::Forward => Self::Back,
            Self::Back => Self::Forward,
        }
    }
}

impl Plan {
    pub(super) fn of(rng: &mut Rng) -> Self {
        let blocks = (0..1 + rng.below(3)).map(|_| 1 + rng.below(6)).collect();
        let at = |rng: &mut Rng| 1 + rng.below(LIFE / 2);
        let leasing = rng.one_in(2).then(|| leasing(rng));
        let fault = match rng.below(if leasing.is_some() { 23 } else { 14 }) {
            0 => Fault::Action(rng.below(60)),
            1..=4 => Fault::KillSource(at(rng), rng.below(60)),
            5 => Fault::KillStandby(at(rng)),
            6 => Fault::Cut(at(rng)),
            7 => Fault::Hole(at(rng), rng.pick(&[None, Some(Way::Forward), Some(Way::Back)])),
            8 => Fault::FalseDeath(at(rng)),
            9 => Fault::Ended(at(rng)),
            10 | 11 => Fault::Slow(at(rng), rng.pick(&[0, 300])),
            14..=16 => {
                let within = rng.pick(&[StopIn::Anything, StopIn::Report, StopIn::Resume]);
                Fault::StopSource(at(rng), rng.pick(&[40, 300, 2000]), within)
            }
            17 => Fault::StopStandby(at(rng), rng.pick(&[40, 300, 2000])),
            18..=20 => {
                let (way, lost) = (rng.pick(&[Way::Forward, Way::Back]), rng.one_in(2));
                Fault::Stall(at(rng), rng.pick(&[150, 290, 400]), way, lost)
            }
            22 => Fault::EndedLost(at(rng), rng.pick(&[Way::Forward, Way::Back])),
            21 => Fault::Discard(at(rng)),
            _ => Fault::None,
        };
        let config = CheckpointConfig {
            interval: if rng.one_in(4) { None } else { Some(STEP * rng.below(60) as u32) },
            live_rounds: rng.below(4) as u32,
            live_pages: rng.below(6),
            confirm_timeout: STEP * CONFIRM_TIMEOUT as u32,
            lease: leasing.map(|leasing| leasing.config),
        };
        // A guest that could not be paused, or that ran when its process was stopped, is kept from running by the look at
        // the lease alone.
        let was_running = matches!(fault, Fault::StopSource(_, _, StopIn::Anything | StopIn::Report));
        let must_check = was_running || matches!(fault, Fault::Action(_));
        let leasing =
            leasing.map(|leasing| Leasing { vcpus_check: leasing.vcpus_check || must_check, ..leasing });
        let (writes_every, demands_every) = (rng.pick(&[2, 5, 20]), rng.pick(&[50, 300]));
        let apply_fails = if rng.one_in(8) { Some(1 + rng.below(40)) } else { None };
        let load_fails = rng.one_in(8);
        Self { blocks, config, writes_every, demands_every, fault, apply_fails, load_fails, leasing }
    }

    /// The clock of the source or of the standby at this step.
    pub(super) fn clock(&self, now: u64, side: usize) -> Duration {
        let rate = self.leasing.map_or(1000, |leasing| leasing.rates[side]);
        STEP * now as u32 * rate / 1000
    }
}

fn leasing(rng: &mut Rng) -> Leasing {
    // With little time for the pause the look at the lease counts.
    let stop = rng.pick(&[20, 60]);
    Leasing {
        config: LeaseConfig { time: STEP * rng.pick(&[320, 600]), stop: STEP * stop },
        rates: [rng.pick(&[950, 1000, 1050]), rng.pick(&[950, 1000, 1050])],
        vcpus_check: stop == 20 || rng.one_in(2),
        pause_steps: rng.below(10),
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
    /// For a lease.
    Renew(u64),
}

/// A message of the standby.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    Confirm(u64),
    Taken,
    Released,
    Grant(u64),
    Discarded,
}
