//! What a seed decides before the first step.

use crate::engine::{PostcopyRule, UrgentChannel};
use crate::session::sim::plan::Rng;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// The connection breaks at this byte of what the source sends, and no other connection follows.
    Cut(u64),
    /// It breaks in this way, and each later connection after this many bytes, this many times. Other connections
    /// follow.
    Cuts {
        at: u64,
        next: u64,
        times: u32,
    },
    /// The destination can't load the device state.
    Load,
    /// The source is cancelled when it has sent this many bytes.
    Cancel(u64),
    /// The destination requests pages that do not exist.
    Hostile,
}

/// All decisions of a seed before the first step.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Pages of each block, and target pages per host page.
    pub(super) blocks: Vec<(u64, u64)>,
    pub(super) rule: PostcopyRule,
    pub(super) native: bool,
    /// The guest writes in one of this many readings of the clock; 0: never.
    pub(super) write_every: u64,
    /// A thread there waits for a page in one of this many steps.
    pub(super) fault_every: u64,
    pub(super) fault: Fault,
    pub(super) limit: u64,
    /// The destination requires a connection for urgent pages.
    pub(super) urgent: Option<UrgentChannel>,
    /// The source gives memory back that the destination has.
    pub(super) release: bool,
    /// A ramwire whose first connection was lost proves unable to load the device state.
    pub(super) loads_badly: bool,
    /// A ramwire's report that all has arrived is lost with its connection, once.
    pub(super) loses_last_word: bool,
    /// Background pages go on page channels.
    pub(super) channels: bool,
}

impl Plan {
    pub(super) fn of(rng: &mut Rng) -> Self {
        let block = |rng: &mut Rng| {
            let host = rng.pick(&[1, 1, 4, 16, 64]);
            let most = if rng.one_in(6) { 400 / host } else { 12.min(200 / host) };
            ((1 + rng.below(most)) * host, host)
        };
        let blocks = (0..1 + rng.below(3)).map(|_| block(rng)).collect();
        let fault = match rng.below(9) {
            0 | 1 => Fault::None,
            2 => Fault::Cut(rng.below_one_of(&[2000, 400_000])),
            3 => Fault::Load,
            6..=8 => Fault::Cuts {
                at: rng.below_one_of(&[2000, 400_000]),
                next: rng.pick(&[3, 12, 20, 30, 6000, 100_000]),
                times: 1 + rng.below(4) as u32,
            },
            4 => Fault::Cancel(rng.below_one_of(&[2000, 400_000])),
            _ => Fault::Hostile,
        };
        let native = rng.one_in(2);
        let early = if native { UrgentChannel::Late } else { UrgentChannel::Early };
        Self {
            blocks,
            rule: PostcopyRule::AfterRounds(rng.below(3) as u32),
            native,
            write_every: rng.pick(&[0, 1, 3]),
            fault_every: rng.pick(&[1, 3, 20]),
            fault,
            limit: rng.pick(&[0, 0, 100_000_000]),
            urgent: rng.pick(&[None, Some(early), Some(UrgentChannel::Late)]),
            release: rng.one_in(2),
            loads_badly: native && rng.one_in(4),
            loses_last_word: native && rng.one_in(4),
            channels: native && rng.one_in(2),
        }
    }
}
