//! A link that reads pages late and lets them overtake each other, as far as the trait allows.
//!
//! A batch waits in its channel, is read from guest memory (from then on its bytes are fixed), and is placed at the
//! destination, outside the byte stream. Channels are synchronized only by fences: there the world stops them until all
//! have arrived, or, for channels like those of multifd, the destination's session does.

mod handles;
mod moves;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};

use super::plan::{Barrier, LateLink, LinkKind, Plan};
use crate::guest::Placer;
use crate::observe::PageCounts;
use crate::ram::{PageBatch, PageBitmap, Piece};
use crate::transport::{Returned, Ticket};
use crate::units::{BlockIndex, PageIndex};

pub(super) use handles::{SimLink, SmallBatches};

/// Number of steps after which a link without progress counts as stalled.
pub(super) const STALL_STEPS: u32 = 5000;

#[derive(Debug)]
enum Item {
    Batch(Batch),
    Fence,
}

#[derive(Debug)]
struct Batch {
    order: u64,
    /// Bytes of the stream that the destination must have read before it accepts the page.
    behind: u64,
    ticket: Ticket,
    /// Gone once it was returned.
    batch: Option<PageBatch>,
    pieces: Vec<Piece>,
    bytes: Option<Vec<u8>>,
}

/// A page that the destination's NIC has acknowledged, and loses if it fails.
#[derive(Debug)]
struct Acknowledged {
    block: u32,
    page: u64,
    /// What memory holds without it.
    before: Vec<u8>,
    /// Bytes of the stream that were sent before it.
    behind: u64,
}

/// The late link's inside.
#[derive(Debug)]
pub(super) struct LinkState {
    kind: Option<LateLink>,
    channels: Vec<VecDeque<Item>>,
    /// Fences that each channel may pass; the destination's session sets it.
    passes: Vec<u32>,
    /// The destination's threads are running.
    pub(super) receives: bool,
    /// Where they report what they have placed.
    placer: Weak<Placer>,
    /// The source may go on over another connection: what has left when it lets go of this one may arrive all the same.
    lingers: bool,
    /// It has let go, and the network is slow.
    let_go: bool,
    /// The destination's keys are gone.
    revoked: bool,
    /// Writes that the destination's NIC has acknowledged: they are in memory once its host has read a later message.
    acknowledged: VecDeque<Acknowledged>,
    finished: Vec<Returned>,
    tickets: u64,
    open: bool,
    /// Number of rounds that the source has opened.
    pub(super) opened: u64,
    calls: u64,
    failed: bool,
    last_placed: u64,
    pub(super) pages_offered: u64,
    /// Pages by channel, as the source and the destination count them.
    pub(super) sent: Vec<PageCounts>,
    pub(super) placed: Vec<PageCounts>,
    /// The batch with this number loses a page.
    drops: Option<u64>,
    /// The guest's memory is registered with the NIC.
    pub(super) registered: bool,
    /// Pages that were freed since: the NIC continues to use the old ones, which hold this.
    old_pages: BTreeMap<(u32, u64), Vec<u8>>,
    /// Pages whose last offered bytes are certainly at the destination, and which were not reported written since.
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
            placer: Weak::new(),
            lingers: !plan.losses.is_empty(),
            let_go: false,
            revoked: false,
            acknowledged: VecDeque::new(),
            finished: Vec::new(),
            tickets: 0,
            open: false,
            opened: 0,
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

    /// The destination's threads begin.
    pub(super) fn receives_by(&mut self, placer: &Arc<Placer>) {
        (self.receives, self.placer) = (true, Arc::downgrade(placer));
    }

    /// The destination's keys are destroyed, and its queue pairs: no write lands any more, and the source's fail.
    pub(super) fn revoke(&mut self) {
        (self.failed, self.revoked) = (true, true);
    }

    /// A NIC writes with keys that the destination's session takes back. Elsewhere they last until everything has ended.
    pub(super) fn has_keys(&self) -> bool {
        self.lingers && self.registers()
    }

    /// The channels' connections are reset.
    pub(super) fn reset(&mut self) {
        (self.failed, self.receives) = (true, false);
    }

    /// True if the guest's memory may be registered with a NIC.
    pub(super) fn registers(&self) -> bool {
        self.kind.is_some_and(|link| link.registers)
    }

    /// The guest frees a page that holds `bytes`.
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

    /// The destination's session stops the channels at fences, and nothing else does.
    pub(super) fn has_barriers(&self) -> bool {
        self.barrier().is_some()
    }

    /// True if every channel is at a fence. `None`: the channels are closed.
    pub(super) fn is_at_barrier(&self) -> Option<bool> {
        let stands = |channel: &VecDeque<Item>| matches!(channel.front(), Some(Item::Fence));
        (!self.failed).then(|| self.channels.iter().all(stands))
    }

    /// Each channel may pass its next fence, whether it has reached it or not.
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

    /// Number of batches that the source waits for.
    fn inside(&self) -> usize {
        if self.has_barriers() { self.tickets_out() } else { self.under_way() }
    }

    /// Number of batches that must not outlive the source's link. What a network still has may.
    fn must_be_back(&self) -> usize {
        if self.lingers { self.tickets_out() } else { self.inside() }
    }

    /// Pages of `block` that were reported written no longer count as at the destination.
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
