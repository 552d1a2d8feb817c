//! A link that reads pages late and lets them overtake each other, as far as the trait allows.
//!
//! A batch waits in its channel, is read from guest memory (from then on its bytes are fixed), and is
//! placed at the destination, past the byte stream. Channels know nothing of each other but the fences: the world holds
//! them there until all have come, or, for channels as those of multifd, the destination's session does.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::channel::SimSink;
use super::guest::PAGE;
use super::plan::{Barrier, Fault, LateLink, LinkKind, Plan, Side};
use super::world::{Mark, Sim, World};
use crate::guest::MappedGuest;
use crate::observe::PageCounts;
use crate::ram::{MoverAbilities, PageBatch, PageBitmap, Piece, RoundKind, Verdict};
use crate::stream::qemu::ram::Record;
use crate::sys::{SendPart, Stop};
use crate::transport::{
    ByteSink, ChannelError, InlineLink, MoveError, Offer, Receipt, Returned, SourceLink, Ticket,
};
use crate::units::{BlockIndex, PageIndex};

/// Steps after which a link that moves nothing has stalled.
pub(super) const STALL_STEPS: u32 = 5000;

fn cannot_carry(batch: &PageBatch) -> bool {
    batch.pieces().first().is_some_and(|piece| piece.run.first.0 % 4 == 1)
}

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

impl World {
    /// Some batch may be read or placed.
    pub(super) fn link_moves(&mut self) {
        if self.link.channels.is_empty() {
            return;
        }
        if self.link.has_barriers() {
            for (channel, passes) in self.link.channels.iter_mut().zip(&mut self.link.passes) {
                if *passes > 0 && matches!(channel.front(), Some(Item::Fence)) {
                    channel.pop_front();
                    *passes -= 1;
                }
            }
        } else if self.link.channels.iter().all(|channel| matches!(channel.front(), Some(Item::Fence))) {
            self.link.channels.iter_mut().for_each(|channel| drop(channel.pop_front()));
        }
        let slowness = self.link.kind.map_or(1, |link| link.slowness);
        for _ in 0..3 {
            if !self.rng.one_in(slowness) {
                continue;
            }
            let channel = self.rng.below(self.link.channels.len() as u64) as usize;
            if self.rng.one_in(2) {
                self.read_one(channel);
            } else if !self.link.refers() || self.rng.one_in(8) {
                // A queue that nobody has to wait for is a long one.
                self.place_one(channel);
            }
        }
    }

    /// Reads the first batch of a channel that was not read yet and stands before the fence; a fence that the
    /// destination keeps is none for the source.
    fn read_one(&mut self, channel: usize) {
        let (releases, passes) = (!self.link.confirms(), self.link.has_barriers());
        let items = self.link.channels[channel].iter_mut();
        let mut before_fence = items.take_while(|item| passes || matches!(item, Item::Batch(_)));
        let unread = before_fence.find_map(|item| match item {
            Item::Batch(batch) if batch.bytes.is_none() => Some(batch),
            _ => None,
        });
        let Some(batch) = unread else { return };
        let mut bytes = bytes_of(&self.guest.memory[Side::Source as usize], &batch.pieces);
        let mut from = 0;
        for piece in batch.pieces.iter().filter(|piece| piece.verdict != Verdict::Zero) {
            for page in 0..piece.run.pages {
                let at = (piece.run.block.0, piece.run.first.0 + page);
                if let Some(old) = self.link.old_pages.get(&at) {
                    let from = from + page as usize * PAGE;
                    bytes[from..from + PAGE].copy_from_slice(old);
                }
            }
            from += piece.run.pages as usize * PAGE;
        }
        batch.bytes = Some(bytes);
        let ticket = batch.ticket;
        if let Some(batch) = batch.batch.take_if(|_| releases) {
            self.link.finished.push(Returned { ticket, receipt: Receipt::Released, batch });
        }
    }

    fn place_one(&mut self, channel: usize) {
        let apart = self.link.has_barriers();
        if apart && !self.link.receives {
            return;
        }
        let queue = &mut self.link.channels[channel];
        let taken = self.pipes[Side::Source as usize].taken;
        match queue.front() {
            Some(Item::Batch(Batch { bytes: Some(_), behind, .. })) if apart || *behind <= taken => {}
            _ => return,
        }
        let Some(Item::Batch(batch)) = queue.pop_front() else { return };
        if batch.order < self.link.last_placed {
            self.mark(Mark::Overtaken);
        }
        self.link.last_placed = self.link.last_placed.max(batch.order);
        let mut bytes = batch.bytes.unwrap_or_default();
        if self.link.refers() {
            let now = bytes_of(&self.guest.memory[Side::Source as usize], &batch.pieces);
            if now != bytes {
                self.mark(Mark::Newer);
            }
            // Each line of a page is as old as it happens to be: read between the send and now.
            for (old, new) in bytes.chunks_mut(64).zip(now.chunks(64)) {
                if !self.rng.one_in(4) {
                    old.copy_from_slice(new);
                }
            }
        }
        let mut bytes = &bytes[..];
        let drops = self.link.drops.take_if(|order| *order == batch.order).is_some();
        for (at, piece) in batch.pieces.iter().enumerate() {
            if drops && at == 0 {
                self.mark(Mark::Dropped);
                if piece.verdict != Verdict::Zero {
                    bytes = &bytes[piece.run.pages as usize * PAGE..];
                }
                continue;
            }
            count(&mut self.link.placed[channel], piece);
            let region = self.guest.memory[1].region(piece.run.block).unwrap();
            let (start, len) = (piece.run.first.0 * PAGE as u64, piece.run.pages * PAGE as u64);
            let span = region.span(start, len).unwrap();
            if piece.verdict == Verdict::Zero {
                span.fill_zero();
                continue;
            }
            let (own, rest) = bytes.split_at(len as usize);
            span.copy_from(own);
            bytes = rest;
        }
        if let Some(returned) = batch.batch {
            let ticket = batch.ticket;
            self.link.finished.push(Returned { ticket, receipt: Receipt::Placed, batch: returned });
        }
    }

    /// Bytes leave on the stream while a round may be open.
    pub(super) fn link_sees_bytes(&mut self) {
        if self.link.open && self.link.kind.is_some_and(|link| link.exclusive) {
            self.violation("bytes were sent while a round of an exclusive link was open");
        }
    }
}

fn count(counts: &mut PageCounts, piece: &Piece) {
    let pages = piece.run.pages;
    *if piece.verdict == Verdict::Zero { &mut counts.zero } else { &mut counts.normal } += pages;
}

/// What the whole pages of `pieces` hold, one behind the other.
fn bytes_of(memory: &MappedGuest, pieces: &[Piece]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in pieces.iter().filter(|piece| piece.verdict != Verdict::Zero) {
        let region = memory.region(piece.run.block).unwrap();
        let (start, len) = (piece.run.first.0 * PAGE as u64, piece.run.pages * PAGE as u64);
        let from = bytes.len();
        bytes.resize(from + len as usize, 0);
        region.span(start, len).unwrap().copy_to(&mut bytes[from..]);
    }
    bytes
}

/// The handle of the late link.
pub(super) struct SimLink {
    sim: Sim,
    sink: SimSink,
    link: LateLink,
}

impl SimLink {
    pub(super) fn new(sim: &Sim, link: LateLink) -> Self {
        Self { sim: sim.clone(), sink: SimSink { sim: sim.clone(), side: Side::Source }, link }
    }

    /// A call, which is a step; it fails from the moment the plan says so, or the destination is gone.
    fn call<T>(&self, act: impl FnOnce(&mut World) -> T) -> Result<T, MoveError> {
        let mut turn = self.sim.enter();
        let calls = turn.world.link.calls;
        turn.world.link.calls += 1;
        let gone = turn.world.killed || turn.world.is_done(Side::Target) || turn.world.is_endless();
        turn.world.link.failed |= gone;
        if turn.world.fails(|fault| matches!(fault, Fault::Link { call } if *call <= calls)) {
            turn.world.link.failed = true;
        }
        if turn.world.link.failed {
            return Err(ChannelError::Closed { peer: "sim".into(), doing: "moving pages" }.into());
        }
        Ok(act(&mut turn.world))
    }

    /// Waits until nothing is inside, or, where the destination keeps the fences, until all is on its way.
    fn wait_until_empty(&self, stop: &Stop) -> Result<(), MoveError> {
        const DOING: &str = "waiting for pages";
        for _ in 0..STALL_STEPS {
            if self.call(|world| world.link.inside())? == 0 {
                return Ok(());
            }
            if let Some(reason) = stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: DOING }.into());
            }
        }
        let mut world = self.sim.world();
        if world.plan.fault.is_none() {
            world.violation("the link waits for ever");
        }
        let after = Duration::from_secs(30);
        Err(ChannelError::Stalled { peer: "sim".into(), doing: DOING, after }.into())
    }
}

impl SourceLink for SimLink {
    fn abilities(&self) -> MoverAbilities {
        MoverAbilities {
            classifies: self.link.barrier.is_some(),
            takes_deltas: false,
            exclusive_round: self.link.exclusive,
            confirms_placement: self.link.confirms,
            ordered: false,
            registers_memory: self.link.registers,
            batches_in_flight: self.link.depth as u32,
            batch_pages: self.link.batch_pages,
        }
    }

    fn sink(&mut self) -> &mut dyn ByteSink {
        &mut self.sink
    }

    fn page_channels(&self) -> u8 {
        if self.link.barrier.is_some() { self.link.channels as u8 } else { 0 }
    }

    /// What a NIC writes is not counted by the destination.
    fn sent_pages(&self) -> Vec<PageCounts> {
        let channels = self.sim.world().link.sent.clone();
        let counted = channels.into_iter().filter(|_| self.link.barrier.is_some());
        std::iter::once(PageCounts::default()).chain(counted).collect()
    }

    fn open_round(&mut self, _kind: RoundKind, _stop: &Stop) -> Result<(), MoveError> {
        self.call(|world| {
            world.link.open = true;
            if world.link.registers() {
                world.link.registered = true;
                world.mark(Mark::Registered);
            }
        })
    }

    fn offer(&mut self, batch: PageBatch, _stop: &Stop) -> Result<Offer, MoveError> {
        self.sim.world().offered(&batch);
        let link = self.link;
        let mut kept = Some(batch);
        let offer = self.call(|world| {
            let batch = kept.take()?;
            if !world.link.open {
                world.violation("pages were offered outside a round");
            }
            if world.link.inside() >= link.depth || world.rng.one_in(12) && world.link.inside() > 0 {
                world.mark(Mark::Full);
                return Some(Offer::Full(batch));
            }
            // A zero page inside the stream is for memory that only the stream fills.
            if link.declines && batch.zero_pages() == 0 && cannot_carry(&batch) {
                world.mark(Mark::Declined);
                world.link.confirm(&batch, false);
                return Some(Offer::Declined(batch));
            }
            let ticket = Ticket(world.link.tickets);
            world.link.tickets += 1;
            world.link.pages_offered += batch.whole_pages();
            world.bytes_leave(batch.whole_pages() * PAGE as u64);
            world.link.confirm(&batch, false);
            let pieces = batch.pieces().to_vec();
            let order = ticket.0 + 1;
            let channel = world.rng.below(link.channels as u64) as usize;
            pieces.iter().for_each(|piece| count(&mut world.link.sent[channel], piece));
            let behind = world.pipes[Side::Source as usize].sent;
            let item = Item::Batch(Batch { order, behind, ticket, batch: Some(batch), pieces, bytes: None });
            world.link.channels[channel].push_back(item);
            Some(Offer::Taken(ticket))
        });
        match (offer, kept) {
            (Ok(Some(offer @ Offer::Full(_))), _) => Ok(offer),
            (Ok(Some(offer)), _) => {
                self.sim.world().batch_is_gone();
                self.sim.device_acts(Side::Source);
                Ok(offer)
            }
            (Err(error), Some(batch)) => {
                let returned = Returned { ticket: Ticket(u64::MAX), receipt: Receipt::Released, batch };
                self.sim.world().link.finished.push(returned);
                Err(error)
            }
            (Err(error), None) => Err(error),
            (Ok(None), _) => unreachable!("a batch was kept"),
        }
    }

    fn collect(&mut self, out: &mut Vec<Returned>) -> Result<(), MoveError> {
        let confirms = self.link.confirms;
        self.call(|world| {
            let finished = std::mem::take(&mut world.link.finished);
            for returned in finished.iter().filter(|_| confirms) {
                world.link.confirm(&returned.batch, true);
            }
            out.extend(finished);
        })
    }

    fn close_round(&mut self, _kind: RoundKind, stop: &Stop) -> Result<(), MoveError> {
        self.call(|world| {
            world.link.open = false;
            world.link.channels.iter_mut().for_each(|channel| channel.push_back(Item::Fence));
        })?;
        if self.link.barrier == Some(Barrier::Record) {
            let mut flush = Vec::new();
            Record::MultifdFlush.encode(&mut flush);
            self.sink.send(&[SendPart::Own(&flush)], stop)?;
        }
        if self.link.fence_waits { self.wait_until_empty(stop) } else { Ok(()) }
    }

    fn drain(&mut self, stop: &Stop) -> Result<(), MoveError> {
        self.wait_until_empty(stop)
    }

    fn reclaim(&mut self) -> Vec<PageBatch> {
        let mut turn = self.sim.enter();
        let link = &mut turn.world.link;
        link.failed = true;
        link.registered = false;
        let inside = std::mem::take(&mut link.channels).into_iter().flatten().filter_map(|item| match item {
            Item::Batch(batch) => batch.batch,
            Item::Fence => None,
        });
        let mut lost: Vec<_> = inside.collect();
        lost.extend(link.finished.drain(..).map(|returned| returned.batch));
        if !lost.is_empty() {
            turn.world.mark(Mark::Reclaimed);
        }
        lost
    }
}

impl Drop for SimLink {
    fn drop(&mut self) {
        let mut world = self.sim.world();
        let (out, under_way) = (world.link.tickets_out(), world.link.inside());
        if out + under_way > 0 {
            world.violation(format!(
                "the link was dropped with {out} tickets out, {under_way} batches under way"
            ));
        }
    }
}

/// The real link with batches as small as the plan wants them.
pub(super) struct SmallBatches {
    pub(super) sim: Sim,
    pub(super) link: InlineLink,
    pub(super) pages: u32,
}

impl SourceLink for SmallBatches {
    fn abilities(&self) -> MoverAbilities {
        MoverAbilities { batch_pages: self.pages, ..self.link.abilities() }
    }

    fn sink(&mut self) -> &mut dyn ByteSink {
        self.link.sink()
    }

    fn sent_pages(&self) -> Vec<PageCounts> {
        self.link.sent_pages()
    }

    fn open_round(&mut self, kind: RoundKind, stop: &Stop) -> Result<(), MoveError> {
        self.link.open_round(kind, stop)
    }

    fn offer(&mut self, batch: PageBatch, stop: &Stop) -> Result<Offer, MoveError> {
        self.sim.world().offered(&batch);
        let offer = self.link.offer(batch, stop)?;
        self.sim.world().batch_is_gone();
        self.sim.device_acts(Side::Source);
        Ok(offer)
    }

    fn collect(&mut self, out: &mut Vec<Returned>) -> Result<(), MoveError> {
        self.link.collect(out)
    }

    fn close_round(&mut self, kind: RoundKind, stop: &Stop) -> Result<(), MoveError> {
        self.link.close_round(kind, stop)
    }

    fn drain(&mut self, stop: &Stop) -> Result<(), MoveError> {
        self.link.drain(stop)
    }

    fn reclaim(&mut self) -> Vec<PageBatch> {
        self.link.reclaim()
    }
}
