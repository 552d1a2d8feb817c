//! A link with page channels to the modelled destination. A batch lies in its channel until the destination takes it, in
//! any order between channels.

use std::sync::Arc;

use super::model::Shared;
use super::number;
use crate::guest::MappedGuest;
use crate::observe::PageCounts;
use crate::ram::{MoverAbilities, PageBatch, RoundKind};
use crate::stream::qemu::ram::Record;
use crate::sys::{SendPart, Stop};
use crate::transport::{
    ByteSink, ChannelError, InlineLink, MoveError, Offer, Receipt, Returned, SourceLink, Ticket,
};

/// Page channels.
pub(super) const CHANNELS: usize = 2;
/// Batches that lie in one.
const ROOM: usize = 2;

/// A page in a channel: its block, its number there, and its contents' number.
pub(super) type PageInChannel = (usize, u64, u64);

pub(super) struct ChannelLink {
    main: InlineLink,
    memory: Arc<MappedGuest>,
    shared: Shared,
    tickets: u64,
    finished: Vec<Returned>,
}

impl ChannelLink {
    pub(super) fn new(main: InlineLink, memory: &Arc<MappedGuest>, shared: &Shared) -> Self {
        let (memory, shared) = (Arc::clone(memory), Arc::clone(shared));
        Self { main, memory, shared, tickets: 0, finished: Vec::new() }
    }
}

impl crate::transport::Sealed for ChannelLink {}

impl SourceLink for ChannelLink {
    fn abilities(&self) -> MoverAbilities {
        MoverAbilities { classifies: true, takes_deltas: false, ordered: false, ..self.main.abilities() }
    }

    fn sink(&mut self) -> &mut dyn ByteSink {
        self.main.sink()
    }

    fn page_channels(&self) -> u8 {
        CHANNELS as u8
    }

    fn has_room(&self) -> bool {
        self.shared.lock().unwrap().channels.iter().any(|channel| channel.len() < ROOM)
    }

    fn sent_pages(&self) -> Vec<PageCounts> {
        vec![PageCounts::default(); 1 + CHANNELS]
    }

    fn open_round(&mut self, kind: RoundKind, stop: &Stop) -> Result<(), MoveError> {
        self.main.open_round(kind, stop)
    }

    fn offer(&mut self, batch: PageBatch, _stop: &Stop) -> Result<Offer, MoveError> {
        let mut there = self.shared.lock().unwrap();
        if there.cut {
            return Err(ChannelError::Closed { peer: "the model".into(), doing: "the simulation" }.into());
        }
        let mut pages: Vec<PageInChannel> = Vec::new();
        for piece in batch.pieces() {
            let block = piece.run.block;
            let all = piece.run.first.0..piece.run.end().0;
            pages.extend(all.map(|page| (block.as_usize(), page, number(&self.memory, block.0, page))));
        }
        there.offered(pages, ROOM);
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        self.finished.push(Returned { ticket, receipt: Receipt::Released, batch });
        Ok(Offer::Taken(ticket))
    }

    fn collect(&mut self, out: &mut Vec<Returned>) -> Result<(), MoveError> {
        out.append(&mut self.finished);
        Ok(())
    }

    fn close_round(&mut self, _kind: RoundKind, stop: &Stop) -> Result<(), MoveError> {
        let mut flush = Vec::new();
        Record::MultifdFlush.encode(&mut flush);
        Ok(self.main.sink().send(&[SendPart::Own(&flush)], stop)?)
    }

    fn drain(&mut self, _stop: &Stop) -> Result<(), MoveError> {
        Ok(())
    }

    fn reclaim(&mut self) -> Vec<PageBatch> {
        self.main.reclaim()
    }
}
