//! Activity of the late link: batches are read and placed at a time and in an order determined by the seed.

use super::{Acknowledged, Batch, Item, LinkState};
use crate::guest::MappedGuest;
use crate::observe::PageCounts;
use crate::ram::{PageRun, Piece, Verdict};
use crate::session::sim::channel::Pipe;
use crate::session::sim::guest::PAGE;
use crate::session::sim::plan::Side;
use crate::session::sim::world::{Mark, World};
use crate::transport::{Receipt, Returned};
use crate::units::{BlockIndex, BlockOffset};

impl World {
    /// A batch may be read or placed.
    pub(in crate::session::sim) fn link_moves(&mut self) {
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
        self.settle_acknowledged();
        // What a network still has comes late: behind what is sent over the next connection.
        let slowness = if self.link.let_go { 100 } else { self.link.kind.map_or(1, |link| link.slowness) };
        for _ in 0..3 {
            if !self.rng.one_in(slowness) {
                continue;
            }
            let channel = self.rng.below(self.link.channels.len() as u64) as usize;
            if self.rng.one_in(2) {
                self.read_one(channel);
            } else if !self.link.refers() || self.rng.one_in(8) {
                // A queue that the source need not wait for becomes long.
                self.place_one(channel);
            }
        }
    }

    /// Reads the first unread batch of a channel that is before the fence; a fence that the destination keeps does not
    /// count for the source.
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
        if apart && !self.link.receives || self.link.revoked {
            return;
        }
        let Pipe { taken, sent, .. } = *self.pipe(0, Side::Source);
        let queue = &mut self.link.channels[channel];
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
            // Each cache line of a page has any age between the send and now.
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
            self.link.report_placed(piece.run);
            let region = self.guest.memory[1].region(piece.run.block).unwrap();
            let (start, len) = (piece.run.first.0 * PAGE as u64, piece.run.pages * PAGE as u64);
            let span = region.span(start, len).unwrap();
            let mut before = vec![0; len as usize];
            span.copy_to(&mut before);
            if piece.verdict == Verdict::Zero {
                span.fill_zero();
                continue;
            }
            let (own, rest) = bytes.split_at(len as usize);
            span.copy_from(own);
            bytes = rest;
            if self.link.has_keys() {
                self.link.acknowledge(piece.run, &before, sent);
            }
        }
        if let Some(returned) = batch.batch {
            let ticket = batch.ticket;
            self.link.finished.push(Returned { ticket, receipt: Receipt::Placed, batch: returned });
        }
    }

    /// Bytes are sent on the stream while a round may be open.
    pub(in crate::session::sim) fn link_sees_bytes(&mut self) {
        if self.link.open && self.link.kind.is_some_and(|link| link.exclusive) {
            self.violation("bytes were sent while a round of an exclusive link was open");
        }
    }
}

impl World {
    /// The destination destroys its keys. A NIC that works has written all that it has acknowledged; one that has failed
    /// for good has lost what no message followed that the host has read.
    pub(in crate::session::sim) fn revoke(&mut self) {
        self.settle_acknowledged();
        self.link.revoke();
        let lost = std::mem::take(&mut self.link.acknowledged);
        // A seed in which nothing can be lost goes as before.
        let has_failed = !lost.is_empty() && self.rng.one_in(2);
        for Acknowledged { block, page, before, .. } in lost.into_iter().rev().filter(|_| has_failed) {
            self.mark(Mark::LostAcknowledged);
            let region = self.guest.memory[Side::Target as usize].region(BlockIndex(block)).unwrap();
            region.span(page * PAGE as u64, PAGE as u64).unwrap().copy_from(&before);
        }
    }

    /// The host has read a message that came behind these.
    fn settle_acknowledged(&mut self) {
        let read = self.pipe(0, Side::Source).read;
        while self.link.acknowledged.front().is_some_and(|write| write.behind < read) {
            self.link.acknowledged.pop_front();
        }
    }
}

impl LinkState {
    fn acknowledge(&mut self, run: PageRun, before: &[u8], behind: u64) {
        for (page, before) in run.each().zip(before.chunks(PAGE)) {
            let (block, page) = (page.block.0, page.first.0);
            self.acknowledged.push_back(Acknowledged { block, page, before: before.to_vec(), behind });
        }
    }

    /// As the thread of a page channel does behind the bytes, in the same step.
    fn report_placed(&self, run: PageRun) {
        let Some(placer) = self.placer.upgrade() else { return };
        let (offset, bytes) = (BlockOffset(run.first.0 * PAGE as u64), run.pages * PAGE as u64);
        placer.commit(placer.admit(run.block, offset, bytes).unwrap());
    }
}

pub(super) fn count(counts: &mut PageCounts, piece: &Piece) {
    let pages = piece.run.pages;
    *if piece.verdict == Verdict::Zero { &mut counts.zero } else { &mut counts.normal } += pages;
}

/// The content of the whole pages of `pieces`, one after the other.
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
