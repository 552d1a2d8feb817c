//! A ramwire as the source of checkpoints: its own messages.

use std::time::Duration;

use super::{Arrivals, Kept, STATE_PIECE, ended, out_of_turn, provided};
use crate::engine::StandbyEvent;
use crate::error::Remedy;
use crate::guest::GuestMemory;
use crate::ram::{BlockName, MAX_BLOCKS, PageRun, RamBlock};
use crate::session::checkpoint::{StandbySettings, refuse_ignored};
use crate::session::destination::same_blocks;
use crate::session::{DestinationGuest, Error, Incoming};
use crate::stream::checkpoints::{CheckpointMessage, HEAD_LEN, StandbyMessage};
use crate::sys::{RecvPart, SendPart, Stop};
use crate::transport::{ByteSink, ByteSource, StreamChannel};
use crate::units::{BlockIndex, PageIndex};

/// What has come of the checkpoint that arrives.
#[derive(Default)]
struct Arriving {
    pages: u64,
    has_state: bool,
}

/// The connection to a ramwire.
pub(super) struct FromRamwire {
    channel: StreamChannel,
    max_ram: u64,
    max_state: u64,
    /// Announced position to position in the guest's own table.
    blocks: Vec<BlockIndex>,
    arriving: Arriving,
}

impl FromRamwire {
    pub(super) fn new(channel: StreamChannel, settings: &StandbySettings) -> Self {
        let StandbySettings { max_ram, max_state, .. } = *settings;
        Self { channel, max_ram, max_state, blocks: Vec::new(), arriving: Arriving::default() }
    }

    fn message(&mut self, stop: &Stop) -> Result<CheckpointMessage, Error> {
        let mut head = [0; HEAD_LEN];
        fill(&mut self.channel, &mut head, stop)?;
        CheckpointMessage::decode(&head).map_err(|error| Error::PeerFailed { why: error.to_string() })
    }

    fn announced(&mut self, stop: &Stop) -> Result<RamBlock, Error> {
        let CheckpointMessage::Block { len, name } = self.message(stop)? else {
            return Err(out_of_turn("a message before all blocks", "waiting for the source's blocks"));
        };
        let mut bytes = vec![0; name as usize];
        fill(&mut self.channel, &mut bytes, stop)?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let name = BlockName::new(&text).map_err(|error| Error::Guest(error.into()))?;
        Ok(RamBlock::new(name, len))
    }

    fn run_of(&self, block: BlockIndex, first: u64, pages: u64) -> PageRun {
        let block = self.blocks.get(block.as_usize()).copied().unwrap_or(BlockIndex(u32::MAX));
        PageRun { block, first: PageIndex(first), pages }
    }

    fn pages(&mut self, kept: &mut Kept, run: PageRun, stop: &Stop) -> Result<(), Error> {
        let landing = kept.admit(run)?;
        let span = kept.target(landing)?;
        let mut at = 0;
        while let Some(rest) = span.part(at, span.len() - at).filter(|rest| !rest.is_empty()) {
            match self.channel.recv(&mut [RecvPart::Guest(rest)], stop)? {
                0 => return Err(ended(&self.channel)),
                got => at += got,
            }
        }
        kept.commit(landing);
        self.arriving.pages = self.arriving.pages.saturating_add(run.pages);
        Ok(())
    }

    fn zeros(&mut self, kept: &mut Kept, run: PageRun) -> Result<(), Error> {
        let landing = kept.admit(run)?;
        kept.zero(landing);
        self.arriving.pages = self.arriving.pages.saturating_add(run.pages);
        Ok(())
    }

    fn state(&mut self, kept: &mut Kept, len: u64, stop: &Stop) -> Result<(), Error> {
        if len > self.max_state {
            return Err(out_of_turn("more device state than is accepted", "keeping checkpoints"));
        }
        let mut state = Vec::new();
        while (state.len() as u64) < len {
            let have = state.len();
            state.resize(have + (len - have as u64).min(STATE_PIECE) as usize, 0);
            fill(&mut self.channel, &mut state[have..], stop)?;
        }
        kept.set_state(state);
        self.arriving.has_state = true;
        Ok(())
    }

    fn close(&mut self, number: u64, pages: u64) -> Result<StandbyEvent, Error> {
        let arriving = std::mem::take(&mut self.arriving);
        if arriving.pages != pages || !arriving.has_state {
            let what = format!("the end of a checkpoint of {pages} pages, of which {} came", arriving.pages);
            return Err(out_of_turn(&what, "keeping checkpoints"));
        }
        Ok(StandbyEvent::Whole(number))
    }
}

impl Arrivals for FromRamwire {
    fn greet(&mut self, guest: &mut DestinationGuest, stop: &Stop) -> Result<Kept, Error> {
        let CheckpointMessage::Hello { page, blocks } = self.message(stop)? else {
            return Err(out_of_turn("a message before HELLO", "waiting for a source of checkpoints"));
        };
        let mut announced = Vec::new();
        for _ in 0..blocks.min(MAX_BLOCKS as u64) {
            announced.push(self.announced(stop)?);
        }
        let incoming = Incoming::of_blocks(announced);
        let memory = provided(guest, &incoming, self.max_ram)?;
        self.blocks = found(&incoming, &*memory, page)?;
        Ok(Kept::new(memory)?)
    }

    /// Messages until one of them is the engine's to know.
    fn receive(
        &mut self,
        kept: &mut Kept,
        _guest: &mut DestinationGuest,
        is_open: bool,
        stop: &Stop,
    ) -> Result<StandbyEvent, Error> {
        loop {
            match self.message(stop)? {
                CheckpointMessage::Open(number) => {
                    self.arriving = Arriving::default();
                    return Ok(StandbyEvent::Opened(number));
                }
                CheckpointMessage::Pages { block, first, pages } if is_open => {
                    self.pages(kept, self.run_of(block, first, pages), stop)?;
                }
                CheckpointMessage::Zeros { block, first, pages } if is_open => {
                    self.zeros(kept, self.run_of(block, first, pages))?;
                }
                CheckpointMessage::State(len) if is_open => self.state(kept, len, stop)?,
                CheckpointMessage::Close { number, pages } if is_open => return self.close(number, pages),
                CheckpointMessage::Renew { number, nanos } => {
                    return Ok(StandbyEvent::Asked { number, time: Duration::from_nanos(nanos) });
                }
                CheckpointMessage::Release if !is_open => return Ok(StandbyEvent::Released),
                other => return Err(out_of_turn(&format!("{other:?}"), "keeping checkpoints")),
            }
        }
    }

    fn say(&mut self, message: StandbyMessage, limit: Duration) -> Result<(), Error> {
        let stop = Stop::never().within(limit);
        Ok(self.channel.send(&[SendPart::Own(&message.encode())], &stop)?)
    }

    fn hang_up(&self) {
        self.channel.breaker().close();
    }
}

/// Where the announced blocks are in the guest's own table.
fn found(incoming: &Incoming, memory: &dyn GuestMemory, page: u32) -> Result<Vec<BlockIndex>, Error> {
    refuse_ignored(memory)?;
    let table = memory.table();
    if table.page().bytes() != u64::from(page) {
        let what = format!("the source has pages of {page} bytes, this guest of {}", table.page().bytes());
        return Err(Error::Config { what, remedy: Remedy::Advice("start both ends with the same machine") });
    }
    same_blocks(&incoming.blocks, table)
}

fn fill(channel: &mut StreamChannel, mut into: &mut [u8], stop: &Stop) -> Result<(), Error> {
    while !into.is_empty() {
        match channel.recv(&mut [RecvPart::Own(into)], stop)? {
            0 => return Err(ended(channel)),
            got => into = &mut into[got..],
        }
    }
    Ok(())
}
