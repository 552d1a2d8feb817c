//! What a seed means: a guest, a peer, a link, and the faults.

use std::collections::BTreeSet;

mod faults;
mod rng;

use self::faults::{draw_fault, draw_second};
use super::device::{Drawn, Page};
use crate::session::Verify;
use crate::units::PageSize;
pub(super) use rng::Rng;

/// An end of the migration, also the direction of the bytes that it sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Target,
}

impl Side {
    pub(super) fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

/// How a dirty log behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LogKind {
    /// A sync reads and re-arms in one step, as PAGEMAP_SCAN does.
    AtSync,
    /// A sync reads; the pages it has read are cleared and armed again chunk by chunk, as with KVM's manual protection.
    ByChunk {
        /// Every page counts as written from the start.
        all_set: bool,
    },
    /// The log of all blocks is taken when a sync begins.
    Snapshot,
}

/// The start of a fault's count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    /// The source's guest was paused.
    Pause,
}

/// What happens to a direction of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wire {
    /// It ends in order. `both`: the other direction too; `grace`: bytes the sender loses before it gets the error.
    Cut {
        both: bool,
        grace: u64,
    },
    Reset,
    /// No byte passes any more.
    Stall,
    Flip(u8),
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Wire {
        from: Side,
        anchor: Anchor,
        at: u64,
        wire: Wire,
    },
    Cancel {
        side: Side,
        anchor: Anchor,
        at: u64,
    },
    Kill {
        anchor: Anchor,
        at: u64,
    },
    Log {
        call: u64,
    },
    Pause {
        stands: bool,
    },
    Save,
    Load,
    /// The destination's guest can't be started.
    Start,
    Link {
        call: u64,
    },
}

/// How a connection is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Loss {
    pub(super) from: Side,
    pub(super) anchor: Anchor,
    pub(super) at: u64,
    pub(super) wire: Wire,
}

/// The link of the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkKind {
    /// The real one: pages inside the byte stream.
    Inline { batch_pages: u32 },
    /// Pages go by channels of their own, are read late and overtake each other between two fences.
    Late(LateLink),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LateLink {
    pub(super) channels: usize,
    pub(super) depth: usize,
    pub(super) batch_pages: u32,
    /// Batches are returned when they are placed, not when they have been read.
    pub(super) confirms: bool,
    /// It can't carry one in four pages.
    pub(super) declines: bool,
    pub(super) exclusive: bool,
    /// One in so many chances to move a batch is taken.
    pub(super) slowness: u64,
    /// A fence waits until the pages are placed, instead of only ordering them.
    pub(super) fence_waits: bool,
    /// Page channels as those of multifd: the destination's session holds them at each fence.
    pub(super) barrier: Option<Barrier>,
    /// Batches are returned before their bytes are read: the pages are read when they are delivered (splice(2)).
    pub(super) by_reference: bool,
    /// A NIC reads the pages: those that were at the addresses when it received the request.
    pub(super) registers: bool,
}

/// How the stream shows where the channels have a fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Barrier {
    /// By a record.
    Record,
    /// By the end of each section.
    SectionEnd,
}

/// All that a seed decides before the first step.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    /// Pages of each block and the size of its host pages.
    pub(super) blocks: Vec<(u64, PageSize)>,
    /// A call that is to fail panics instead.
    pub(super) panics: bool,
    /// What a start that panics leaves.
    pub(super) started: Started,
    /// Of so many pages of the destination's memory one holds old bytes; 0: none does.
    pub(super) used_every: u64,
    /// Of so many pages one is zero at the start.
    pub(super) zero_every: u64,
    /// Pages the guest writes to.
    pub(super) working_set: Vec<(u32, u64)>,
    /// The guest writes in one of so many steps.
    pub(super) write_every: u64,
    /// Writes before it becomes idle, so that every migration converges.
    pub(super) writes: u64,
    pub(super) logs: Vec<LogKind>,
    pub(super) clear_shift: u8,
    pub(super) peer: PeerKind,
    pub(super) verify: Verify,
    pub(super) link: LinkKind,
    /// The pages are observed as they arrive, as by a relay.
    pub(super) watched: bool,
    pub(super) state_bytes: u64,
    pub(super) capacity: usize,
    /// Maximum number of bytes that a read returns.
    pub(super) piece: u64,
    /// Chance of the other side's turn: one in so many steps.
    pub(super) switch_every: u64,
    pub(super) bytes_per_ms: u64,
    pub(super) downtime_pages: u64,
    pub(super) fault: Option<Fault>,
    /// How each connection is lost, where the source connects again; none: it does not.
    pub(super) losses: Vec<Loss>,
    /// The last loss comes again on each further connection.
    pub(super) lost_for_ever: bool,
    /// Pages of the source's cache, against which it sends differences; 0: it sends none.
    pub(super) delta_pages: u64,
    /// A second fault, on the wire, where the first may be of any kind: which direction, at which byte, what.
    pub(super) also: Option<(Side, u64, Wire)>,
    /// A page channel loses a page of its batch of this number, towards a ramwire.
    pub(super) drops: Option<u64>,
    /// The source's guest can't be resumed when it should be.
    pub(super) not_resumed: bool,
    /// A balloon reports free pages at one of so many chances; 0: there is none.
    pub(super) hint_every: u64,
    /// Pages that may be plugged and unplugged, and those that are unplugged at the start.
    pub(super) plugs: Vec<Page>,
    pub(super) unplugged: BTreeSet<Page>,
    /// A block whose memory both ends map.
    pub(super) ignored: Option<u32>,
    /// Blocks whose memory is passed as descriptors, to a ramwire.
    pub(super) passed: BTreeSet<u32>,
}

/// What a start of the destination's guest that panics leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Started {
    /// The guest is paused.
    Not,
    /// It runs, and can be stopped.
    Runs,
    /// It runs, and can't.
    RunsOn,
}

/// The kind of peer that the source is set to, and the kind that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PeerKind {
    /// A ramwire that is found by the greeting.
    Greeted,
    /// A ramwire, and the source knows.
    Ramwire,
    /// Addressed as a QEMU: only its own messages.
    Qemu,
}

impl Plan {
    pub(super) fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let blocks = draw_blocks(&mut rng);
        let total: u64 = blocks.iter().map(|(pages, _)| pages).sum();
        let hot = 1 + rng.below_one_of(&[total, total / 4, total / 16]);
        let working_set = (0..hot).map(|_| page_at(&blocks, rng.below(total))).collect();
        let peer = rng.pick(&[PeerKind::Greeted, PeerKind::Ramwire, PeerKind::Qemu]);
        let link = draw_references(seed, draw_link(&mut rng));
        let fault = draw_fault(&mut rng, total, link);
        // Towards a QEMU and without a digest a flipped bit in a page can't be seen.
        let flips = matches!(fault, Some(Fault::Wire { wire: Wire::Flip(_), .. }));
        let peer = if flips && peer == PeerKind::Qemu { PeerKind::Ramwire } else { peer };
        let Drawn { hint_every, plugs, unplugged, ignored } = Drawn::of(seed, &blocks);
        let passed = draw_passed(seed, peer, &blocks, |block| {
            ignored == Some(block) || plugs.iter().any(|page| page.0 == block)
        });
        Self {
            hint_every,
            plugs,
            unplugged,
            ignored,
            passed,
            losses: Vec::new(),
            lost_for_ever: false,
            delta_pages: 0,
            used_every: draw_used(seed),
            panics: Rng::new(seed ^ 0xdead).one_in(2),
            started: Rng::new(seed ^ 0xbeef).pick(&[Started::Not, Started::Runs, Started::RunsOn]),
            seed,
            drops: draw_drop(seed, link, peer),
            zero_every: rng.pick(&[2, 5, 1000]),
            working_set,
            write_every: rng.pick(&[1, 2, 8]),
            writes: rng.below_one_of(&[1, 60, 600]),
            logs: draw_logs(&mut rng),
            clear_shift: rng.pick(&[6, 6, 7, 18]),
            peer,
            verify: draw_verify(seed, flips || rng.one_in(2)),
            watched: matches!(link, LinkKind::Inline { .. }) && rng.one_in(3),
            link,
            state_bytes: rng.below(400),
            capacity: rng.pick(&[3000, 20_000, 1 << 20]),
            piece: rng.pick(&[700, 9000, 1 << 20]),
            switch_every: rng.pick(&[4, 16, 64]),
            bytes_per_ms: rng.pick(&[400, 4096, 100_000]),
            downtime_pages: rng.below(12),
            fault,
            also: draw_second(&mut rng, total).filter(|_| fault.is_some() && !flips),
            not_resumed: rng.one_in(25),
            blocks,
        }
    }

    /// A seed's guest that gives hints all the time and takes the pages again, and nothing fails. What only hints show is rare
    /// among all plans.
    pub(super) fn full_of_hints(seed: u64) -> Self {
        let plan = Self::of(seed);
        let hot = plan.working_set.iter().take(4).copied().collect();
        Self {
            hint_every: 1,
            working_set: hot,
            write_every: 1,
            writes: 600,
            fault: None,
            also: None,
            drops: None,
            not_resumed: false,
            ..plan
        }
    }

    /// The same guest towards a ramwire, with fingerprints and no other fault. After a refusal it stays paused, so that
    /// its memory can be examined.
    pub(super) fn verified_by_fingerprints(self) -> Self {
        Self {
            verify: Verify::Fast,
            peer: PeerKind::Ramwire,
            fault: None,
            also: None,
            drops: None,
            not_resumed: true,
            hint_every: 0,
            plugs: Vec::new(),
            unplugged: BTreeSet::new(),
            ..self
        }
    }

    pub(super) fn total_pages(&self) -> u64 {
        self.blocks.iter().map(|(pages, _)| pages).sum()
    }
}

fn draw_blocks(rng: &mut Rng) -> Vec<(u64, PageSize)> {
    let sizes = [PageSize::SIZE_4K, PageSize::SIZE_2M, PageSize::SIZE_1G];
    // Larger than one chunk of the clear map, a middle one, and small ones.
    let mut blocks = vec![(65 + rng.below(20), rng.pick(&sizes)), (10 + rng.below(20), rng.pick(&sizes))];
    for _ in 0..1 + rng.below(3) {
        blocks.insert(rng.below(3) as usize, (1 + rng.below(6), rng.pick(&sizes)));
    }
    blocks
}

pub(super) fn page_at(blocks: &[(u64, PageSize)], mut page: u64) -> (u32, u64) {
    for (block, (pages, _)) in blocks.iter().enumerate() {
        if page < *pages {
            return (block as u32, page);
        }
        page -= pages;
    }
    (0, 0)
}

fn draw_logs(rng: &mut Rng) -> Vec<LogKind> {
    let kinds = [
        LogKind::AtSync,
        LogKind::ByChunk { all_set: false },
        LogKind::ByChunk { all_set: true },
        LogKind::Snapshot,
    ];
    (0..1 + rng.below(2)).map(|_| rng.pick(&kinds)).collect()
}

fn draw_link(rng: &mut Rng) -> LinkKind {
    if rng.one_in(2) {
        return LinkKind::Inline { batch_pages: rng.pick(&[1, 7, 64, 512]) };
    }
    let link = LateLink {
        channels: 1 + rng.below(4) as usize,
        depth: 1 + rng.below(12) as usize,
        batch_pages: 1 + rng.below(12) as u32,
        confirms: rng.one_in(2),
        declines: rng.one_in(3),
        exclusive: rng.one_in(2),
        slowness: rng.pick(&[1, 6, 40]),
        fence_waits: rng.one_in(3),
        barrier: None,
        by_reference: false,
        registers: false,
    };
    let barrier = rng.pick(&[Barrier::Record, Barrier::SectionEnd]);
    let registers = !rng.one_in(3);
    LinkKind::Late(match rng.one_in(2) {
        false => LateLink { registers, ..link },
        true => LateLink {
            confirms: false,
            declines: false,
            exclusive: false,
            slowness: link.slowness.min(6),
            fence_waits: false,
            barrier: Some(barrier),
            ..link
        },
    })
}

/// Half of the page channels send by reference; drawn apart, so that the rest of a seed is as it was without.
fn draw_references(seed: u64, link: LinkKind) -> LinkKind {
    match link {
        LinkKind::Late(link) if link.barrier.is_some() => {
            LinkKind::Late(LateLink { by_reference: Rng::new(seed ^ 0x5911_ce00).one_in(2), ..link })
        }
        other => other,
    }
}

/// Half of the destinations have memory that was used before; drawn apart as well.
fn draw_used(seed: u64) -> u64 {
    Rng::new(seed ^ 0x01d_0000).pick(&[0, 0, 1, 3])
}

/// Half of those that verify do it by fingerprints; drawn apart as well.
fn draw_verify(seed: u64, verifies: bool) -> Verify {
    match (verifies, Rng::new(seed ^ 0xf157).one_in(2)) {
        (false, _) => Verify::Off,
        (true, true) => Verify::Fast,
        (true, false) => Verify::Full,
    }
}

/// Drawn apart, as references are. Towards a QEMU nothing counts pages.
fn draw_drop(seed: u64, link: LinkKind, peer: PeerKind) -> Option<u64> {
    let mut rng = Rng::new(seed ^ 0xd509_9ed0);
    let batch = 1 + rng.below_one_of(&[4, 40]);
    let counted = matches!(link, LinkKind::Late(link) if link.barrier.is_some()) && peer != PeerKind::Qemu;
    (counted && rng.one_in(8)).then_some(batch)
}

/// A third of the ramwires are on the same host: drawn apart, too.
fn draw_passed(
    seed: u64,
    peer: PeerKind,
    blocks: &[(u64, PageSize)],
    travels_otherwise: impl Fn(u32) -> bool,
) -> BTreeSet<u32> {
    let mut rng = Rng::new(seed ^ 0x9a55_ed00);
    if peer == PeerKind::Qemu || !rng.one_in(3) {
        return BTreeSet::new();
    }
    let most = rng.one_in(2);
    let blocks = 0..blocks.len() as u32;
    blocks.filter(|block| (most || rng.one_in(2)) && !travels_otherwise(*block)).collect()
}
