//! What a seed decides.

use std::time::Duration;

use crate::common::memory::Random;

/// Pages of the guest's two blocks.
pub(crate) const PAGES: [u64; 2] = [900, 37];

/// Of them, pages that the guest writes.
pub(crate) const WORKING_SET: u64 = 200;

/// A fault of the migration when so many pages have arrived, repeats included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The connections break.
    Cut,
    /// `kill -9` of the destination.
    KillDestination,
    /// `kill -9` of the source.
    KillSource,
}

/// All that a seed decides.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// Rounds before the switch.
    pub(crate) rounds: u32,
    /// Requested pages are sent on a connection of their own.
    pub(crate) preempt: bool,
    /// The source gives memory back that the destination has.
    pub(crate) release: bool,
    /// Bytes a second of background pages.
    pub(crate) bandwidth: Option<u64>,
    /// Bytes a second that the guest writes.
    pub(crate) writes: u64,
    /// Faults by the number of pages that have arrived, ascending.
    pub(crate) faults: Vec<(u64, Fault)>,
    /// Faults when the connection of this number after the first is accepted: before anything is read from it.
    pub(crate) at_accept: Vec<(u32, Fault)>,
}

impl Plan {
    /// How long a source tries to reach a destination that may be gone; one that is there listens all the time.
    pub(crate) const RECONNECT: Duration = Duration::from_millis(400);

    pub(crate) fn of(seed: u64) -> Self {
        let mut random = Random(seed ^ 0x6b69_6c6c);
        let mut below = |count: u64| random.draw() % count;
        let all: u64 = PAGES.iter().sum();
        let rounds = [0, 0, 1, 2][below(4) as usize];
        // A round sends all pages once; pages written meanwhile are sent again.
        let (first, span) = match (rounds, below(4)) {
            (0, _) => (0, all),
            (_, 0) => (0, all + WORKING_SET),
            _ => (all, WORKING_SET),
        };
        let mut faults: Vec<_> = (0..below(6)).map(|_| (first + below(span), Fault::Cut)).collect();
        let kill = [Fault::KillDestination, Fault::KillSource, Fault::Cut][below(3) as usize];
        faults.push((first + below(span), kill));
        faults.sort_by_key(|(pages, _)| *pages);
        // The last fault is the kill: what would follow it can't.
        let end = faults.iter().position(|(_, fault)| *fault != Fault::Cut).map_or(faults.len(), |at| at + 1);
        faults.truncate(end);
        let at_accept = (0..below(3))
            .map(|_| (below(4) as u32, [Fault::Cut, Fault::Cut, Fault::Cut, kill][below(4) as usize]))
            .collect();
        Self {
            seed,
            rounds,
            preempt: below(3) == 0,
            release: below(2) == 0,
            bandwidth: [None, Some(2 << 20), Some(20 << 20)][below(3) as usize],
            writes: [0, 5 << 20, 40 << 20][below(3) as usize],
            faults,
            at_accept,
        }
    }
}
