//! The links that a source's session uses: the late one, and the real one with small batches.

use std::time::Duration;

use super::moves::count;
use super::{Batch, Item, STALL_STEPS};
use crate::observe::{DeltaCounts, PageCounts};
use crate::ram::{MoverAbilities, PageBatch, RoundKind};
use crate::session::sim::channel::SimSink;
use crate::session::sim::guest::PAGE;
use crate::session::sim::plan::{Barrier, Fault, LateLink, Side};
use crate::session::sim::world::{Mark, Sim, World};
use crate::stream::qemu::ram::Record;
use crate::sys::{SendPart, Stop};
use crate::transport::{
    ByteSink, ChannelError, DeltaCacheSize, InlineLink, MoveError, Offer, Receipt, Returned, SourceLink,
    Ticket,
};

fn cannot_carry(batch: &PageBatch) -> bool {
    batch.pieces().first().is_some_and(|piece| piece.run.first.0 % 4 == 1)
}

/// The handle of the late link.
pub(in crate::session::sim) struct SimLink {
    sim: Sim,
    sink: SimSink,
    link: LateLink,
}

impl SimLink {
    pub(in crate::session::sim) fn new(sim: &Sim, link: LateLink) -> Self {
        Self { sim: sim.clone(), sink: SimSink { sim: sim.clone(), side: Side::Source, generation: 0 }, link }
    }

    /// A call, which is a step; it fails from the planned moment on, or if the destination is gone.
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

    /// Waits until the link is empty or, if the destination keeps the fences, until all batches are in flight.
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
        if world.plan.fault.is_none() && world.plan.losses.is_empty() {
            world.violation("the link waits for ever");
        }
        let after = Duration::from_secs(30);
        Err(ChannelError::Stalled { peer: "sim".into(), doing: DOING, after }.into())
    }
}

impl crate::transport::Sealed for SimLink {}

impl SourceLink for SimLink {
    fn abilities(&self) -> MoverAbilities {
        MoverAbilities {
            classifies: self.link.barrier.is_some(),
            takes_deltas: false,
            exclusive_round: self.link.exclusive,
            confirms_placement: self.link.confirms,
            ordered: false,
            registers_memory: self.link.registers,
            serves_reads: false,
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

    /// The destination does not count a NIC's writes.
    fn sent_pages(&self) -> Vec<PageCounts> {
        let channels = self.sim.world().link.sent.clone();
        let counted = channels.into_iter().filter(|_| self.link.barrier.is_some());
        std::iter::once(PageCounts::default()).chain(counted).collect()
    }

    fn open_round(&mut self, _kind: RoundKind, _stop: &Stop) -> Result<(), MoveError> {
        self.call(|world| {
            world.link.open = true;
            world.link.opened += 1;
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
        (link.failed, link.let_go) = (true, link.lingers);
        link.registered = false;
        let is_unread = |item: &Item| matches!(item, Item::Batch(Batch { bytes: None, .. }));
        let mut lost = Vec::new();
        for channel in &mut link.channels {
            let left = channel.iter().position(is_unread).unwrap_or(channel.len());
            let unread = channel.split_off(if link.lingers { left } else { 0 });
            let batches = channel.iter_mut().filter_map(|item| match item {
                Item::Batch(batch) => batch.batch.take(),
                Item::Fence => None,
            });
            lost.extend(batches);
            lost.extend(unread.into_iter().filter_map(|item| match item {
                Item::Batch(batch) => batch.batch,
                Item::Fence => None,
            }));
        }
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
        let (out, under_way) = (world.link.tickets_out(), world.link.must_be_back());
        if out + under_way > 0 {
            world.violation(format!(
                "the link was dropped with {out} tickets out, {under_way} batches under way"
            ));
        }
    }
}

/// The real link with batches as small as the plan requires.
pub(in crate::session::sim) struct SmallBatches {
    pub(in crate::session::sim) sim: Sim,
    pub(in crate::session::sim) link: InlineLink,
    pub(in crate::session::sim) pages: u32,
}

impl crate::transport::Sealed for SmallBatches {}

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

    fn deltas(&self) -> DeltaCounts {
        self.link.deltas()
    }

    fn delta_cache_size(&self) -> Option<DeltaCacheSize> {
        self.link.delta_cache_size()
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
