//! A ramwire as the standby: its own messages.

use std::time::Duration;

use super::Standby;
use super::sending::{Limit, no_answer, one_way, out_of_turn, put};
use crate::guest::{GuestError, GuestMemory, span_of};
use crate::ram::{PageBatch, PageRun, Verdict};
use crate::session::Error;
use crate::stream::checkpoints::{CheckpointMessage, HEAD_LEN, MAX_RUN, StandbyMessage};
use crate::sys::{RecvPart, SendPart, Stop};
use crate::transport::{ByteSink as _, ByteSource as _, ChannelError, StreamChannel};
use crate::units::PageIndex;

/// The messages of the standby.
struct Answers {
    channel: StreamChannel,
    head: [u8; HEAD_LEN],
    have: usize,
}

impl Answers {
    fn of(channel: StreamChannel) -> Self {
        Self { channel, head: [0; HEAD_LEN], have: 0 }
    }

    /// The next message; `None` if the wait was stopped.
    fn next(&mut self, stop: &Stop) -> Result<Option<StandbyMessage>, Error> {
        while self.have < HEAD_LEN {
            match self.channel.recv(&mut [RecvPart::Own(&mut self.head[self.have..])], stop) {
                Ok(0) => {
                    let peer = self.channel.peer().to_owned();
                    return Err(ChannelError::Closed { peer, doing: "waiting for the standby" }.into());
                }
                Ok(got) => self.have += got,
                Err(ChannelError::Stopped { .. }) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        self.have = 0;
        let message = StandbyMessage::decode(&self.head);
        Ok(Some(message.map_err(|error| Error::PeerFailed { why: error.to_string() })?))
    }
}

/// The connection to a ramwire.
pub(super) struct ToRamwire {
    sink: StreamChannel,
    answers: Option<Answers>,
}

impl ToRamwire {
    pub(super) fn new(channel: StreamChannel) -> Self {
        let (sink, back) = channel.with_return_path();
        Self { sink, answers: back.map(Answers::of) }
    }

    fn send(&mut self, bytes: &[u8], limit: &Limit) -> Result<(), Error> {
        put(&mut self.sink, &[SendPart::Own(bytes)], limit)
    }
}

impl Standby for ToRamwire {
    fn greet(&mut self, memory: &dyn GuestMemory, limit: &Limit) -> Result<Option<StandbyMessage>, Error> {
        let table = memory.table();
        let (page, blocks) = (table.page().bytes() as u32, table.blocks().len() as u64);
        let mut out = CheckpointMessage::Hello { page, blocks }.encode().to_vec();
        for block in table.blocks() {
            let name = block.name.as_str().as_bytes();
            let head = CheckpointMessage::Block { len: block.used_length, name: name.len() as u64 };
            out.extend_from_slice(&head.encode());
            out.extend_from_slice(name);
        }
        self.send(&out, limit)?;
        let stop = Stop::never().within(limit.after);
        match self.answers.as_mut().ok_or_else(one_way)?.next(&stop)? {
            Some(StandbyMessage::Ready) => Ok(None),
            Some(taken @ StandbyMessage::Taken(_)) => Ok(Some(taken)),
            Some(_) => Err(out_of_turn()),
            None => Err(no_answer("that it has memory", limit.after)),
        }
    }

    fn open(&mut self, number: u64, limit: &Limit) -> Result<(), Error> {
        self.send(&CheckpointMessage::Open(number).encode(), limit)
    }

    fn pages(&mut self, memory: &dyn GuestMemory, batch: &PageBatch, limit: &Limit) -> Result<(), Error> {
        let mut messages = Vec::new();
        for piece in batch.pieces() {
            let PageRun { block, first, pages } = piece.run;
            match piece.verdict {
                Verdict::Zero => {
                    let head = CheckpointMessage::Zeros { block, first: first.0, pages };
                    messages.push((head.encode(), None));
                }
                _ => {
                    for at in (0..pages).step_by(MAX_RUN as usize) {
                        let (first, pages) = (first.0 + at, MAX_RUN.min(pages - at));
                        let run = PageRun { block, first: PageIndex(first), pages };
                        let landing = memory.table().admit_run(run).map_err(GuestError::from)?;
                        let head = CheckpointMessage::Pages { block, first, pages };
                        messages.push((head.encode(), Some(span_of(memory, landing)?)));
                    }
                }
            }
        }
        let parts = messages
            .iter()
            .flat_map(|(head, span)| std::iter::once(SendPart::Own(head)).chain(span.map(SendPart::Guest)));
        put(&mut self.sink, &parts.collect::<Vec<_>>(), limit)
    }

    fn state(&mut self, _number: u64, state: &[u8], limit: &Limit) -> Result<(), Error> {
        let head = CheckpointMessage::State(state.len() as u64).encode();
        put(&mut self.sink, &[SendPart::Own(&head), SendPart::Own(state)], limit)
    }

    fn close(&mut self, number: u64, pages: u64, limit: &Limit) -> Result<(), Error> {
        self.send(&CheckpointMessage::Close { number, pages }.encode(), limit)
    }

    fn renew(&mut self, number: u64, time: Duration, limit: &Limit) -> Result<(), Error> {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.send(&CheckpointMessage::Renew { number, nanos }.encode(), limit)
    }

    fn release(&mut self, limit: &Limit) -> Result<(), Error> {
        self.send(&CheckpointMessage::Release.encode(), limit)
    }

    fn next(&mut self, stop: &Stop) -> Result<Option<StandbyMessage>, Error> {
        self.answers.as_mut().ok_or_else(one_way)?.next(stop)
    }

    fn is_silent(&self) -> bool {
        self.answers.is_none()
    }

    fn forget_answers(&mut self) {
        self.answers = None;
    }

    fn position(&self) -> u64 {
        self.sink.position()
    }
}
