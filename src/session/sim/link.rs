//! A link that reads pages late and lets them overtake each other, as far as the trait allows.
//!
//! A batch waits in its channel, is read from guest memory (from then on its bytes are fixed), and is
//! placed at the destination, past the byte stream. Channels know nothing of each other but the fences: the world holds
//! them there until all have come, or, for channels as those of multifd, the destination's session does.

mod handles;
mod moves;

use std::collections::{BTreeMap, VecDeque};

use super::plan::{Barrier, LateLink, LinkKind, Plan};
use crate::observe::PageCounts;
use crate::ram::{PageBatch, PageBitmap, Piece};
use crate::transport::{Returned, Ticket};
use crate::units::{BlockIndex, PageIndex};

pub(super) use handles::{SimLink, SmallBatches};

/// Steps after which a link that moves nothing has stalled.
pub(super) const STALL_STEPS: u32 = 5000;

#[derive(Debug)]
enum Item {
    Batch(Batch),
    Fence,
}

#[derive(Debug)]
struct Batch {
    order: u64,
    /// Bytes of the stream that the destination has taken before it lets the page in.
    behind: u64,
    ticket: Ticket,
    /// Gone once it was returned.
    batch: Option<PageBatch>,
    pieces: Vec<Piece>,
    bytes: Option<Vec<u8>>,
}

/// The late link's inside.
#[derive(Debug)]
pub(super) struct LinkState {
    kind: Option<LateLink>,
    channels: Vec<VecDeque<Item>>,
    /// Fences that each channel may pass; the destination's session says so.
    passes: Vec<u32>,
    /// The destination's threads are at work.
    pub(super) receives: bool,
    finished: Vec<Returned>,
    tickets: u64,
    open: bool,
    calls: u64,
    failed: bool,
    last_placed: u64,
    pub(super) pages_offered: u64,
    /// Pages by channel, as the source and as the destination count them.
    pub(super) sent: Vec<PageCounts>,
    pub(super) placed: Vec<PageCounts>,
    /// The batch of this number loses a page on its way.
    drops: Option<u64>,
    /// The NIC knows the guest's memory.
    pub(super) registered: bool,
    /// Pages that were given back since: the NIC goes on with the old ones, which hold this.
    old_pages: BTreeMap<(u32, u64), Vec<u8>>,
    /// Pages whose last offered bytes are at the destination for certain, and not reported written since.
    pub(super) confirmed: Vec<PageBitmap>,
}

impl LinkState {
    pub(super) fn new(plan: &Plan) -> Self {
        let kind = match plan.link {
            LinkKind::Late(link) => Some(link),
            LinkKind::Inline { .. } => None,
        };
        let channels = kind.map_or(0, |link| link.channels);
        Self {
            kind,
            channels: (0..channels).map(|_| VecDeque::new()).collect(),
            passes: vec![0; channels],
            receives: false,
            finished: Vec::new(),
            tickets: 0,
            open: false,
            calls: 0,
            failed: false,
            last_placed: 0,
            pages_offered: 0,
            sent: vec![PageCounts::default(); channels],
            placed: vec![PageCounts::default(); channels],
            drops: plan.drops,
            registered: false,
            old_pages: BTreeMap::new(),
            confirmed: plan.blocks.iter().map(|(pages, _)| PageBitmap::new(*pages)).collect(),
        }
    }

    /// True if a NIC may come to know the guest's memory.
    pub(super) fn registers(&self) -> bool {
        self.kind.is_some_and(|link| link.registers)
    }

    /// The guest gives back a page that holds `bytes`.
    pub(super) fn given_back(&mut self, block: u32, page: u64, bytes: Vec<u8>) {
        if self.registered {
            self.old_pages.entry((block, page)).or_insert(bytes);
        }
    }

    fn confirms(&self) -> bool {
        self.kind.is_some_and(|link| link.confirms)
    }

    fn barrier(&self) -> Option<Barrier> {
        self.kind.and_then(|link| link.barrier)
    }

    /// Pages are read when they are delivered.
    pub(super) fn refers(&self) -> bool {
        self.kind.is_some_and(|link| link.by_reference)
    }

    /// The destination's session holds the channels at fences, and that is all that does.
    pub(super) fn has_barriers(&self) -> bool {
        self.barrier().is_some()
    }

    /// True if every channel stands at a fence. `None`: the channels are closed.
    pub(super) fn is_at_barrier(&self) -> Option<bool> {
        let stands = |channel: &VecDeque<Item>| matches!(channel.front(), Some(Item::Fence));
        (!self.failed).then(|| self.channels.iter().all(stands))
    }

    /// Each channel may pass its next fence, whether it has come to it or not.
    pub(super) fn release(&mut self) {
        self.passes.iter_mut().for_each(|passes| *passes += 1);
    }

    /// Batches inside, fences not counted.
    fn under_way(&self) -> usize {
        self.channels.iter().flatten().filter(|item| matches!(item, Item::Batch(_))).count()
    }

    pub(super) fn tickets_out(&self) -> usize {
        let held = |item: &&Item| matches!(item, Item::Batch(Batch { batch: Some(_), .. }));
        self.channels.iter().flatten().filter(held).count()
    }

    /// Batches that the source waits for.
    fn inside(&self) -> usize {
        if self.has_barriers() { self.tickets_out() } else { self.under_way() }
    }

    /// Pages of `block` that were reported written are not at the destination any more.
    pub(super) fn unconfirm(&mut self, block: BlockIndex, written: &PageBitmap) {
        let mut from = PageIndex(0);
        while let Some(run) = written.next_run(from, u64::MAX) {
            from = PageIndex(run.end);
            self.confirmed[block.as_usize()].clear_range(run);
        }
    }

    fn confirm(&mut self, batch: &PageBatch, confirmed: bool) {
        for piece in batch.pieces() {
            let map = &mut self.confirmed[piece.run.block.as_usize()];
            let run = piece.run.first.0..piece.run.end().0;
            if confirmed {
                map.set_range(run)
            } else {
                map.clear_range(run)
            };
        }
    }
}
