//! What a source of checkpoints says to its standby, and how it hears of it. Each wait for the standby has a limit.

use std::time::Duration;

use super::{Pages, Running};
use crate::engine::{CheckpointCause, CheckpointEvent};
use crate::error::Remedy;
use crate::guest::{GuestError, save_state, span_of};
use crate::page::ZeroDetection;
use crate::ram::{PageRun, Verdict};
use crate::session::callback::named;
use crate::session::{Error, dirty_run};
use crate::stream::checkpoints::{CheckpointMessage, HEAD_LEN, MAX_RUN, StandbyMessage};
use crate::sys::{RecvPart, SendPart, Stop};
use crate::transport::{ByteSink, ByteSource, ChannelError, StreamChannel};
use crate::units::PageIndex;

/// Whole pages that are sent by one call.
const BATCH: u64 = 512;

/// The messages of the standby.
pub(super) struct Answers {
    channel: StreamChannel,
    head: [u8; HEAD_LEN],
    have: usize,
}

impl Answers {
    pub(super) fn of(channel: StreamChannel) -> Self {
        Self { channel, head: [0; HEAD_LEN], have: 0 }
    }

    /// The next message; `None` if the wait was stopped.
    pub(super) fn next(&mut self, stop: &Stop) -> Result<Option<StandbyMessage>, Error> {
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

impl Running {
    pub(super) fn send(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let (limit, after) = self.limit();
        put(&mut self.sink, &[SendPart::Own(bytes)], &limit, after)
    }

    /// How long the standby may take nothing: while the guest is paused, until that has taken too long; while it runs with a
    /// lease, until it is to be paused.
    fn limit(&self) -> (Stop, Duration) {
        let confirm = self.settings.confirm_timeout;
        let lease = self.settings.lease.filter(|_| self.lease.left().is_some() && !self.figures.not_resumed);
        let after = lease.map_or(confirm, |lease| confirm.min(lease.time));
        let left = self.engine.give_up_at().map_or(after, |at| at.saturating_sub(self.now()));
        (Stop::never().within(left), after)
    }

    pub(super) fn greet(&mut self) -> Result<(), Error> {
        let table = self.guest.memory.table();
        let (page, blocks) = (table.page().bytes() as u32, table.blocks().len() as u64);
        let mut out = CheckpointMessage::Hello { page, blocks }.encode().to_vec();
        for block in table.blocks() {
            let name = block.name.as_str().as_bytes();
            let head = CheckpointMessage::Block { len: block.used_length, name: name.len() as u64 };
            out.extend_from_slice(&head.encode());
            out.extend_from_slice(name);
        }
        self.send(&out)?;
        self.await_answer(StandbyMessage::Ready, "that it has memory")
    }

    /// Asks for a lease, if it is time.
    pub(super) fn renew(&mut self) -> Result<(), Error> {
        // Read before it is sent: the lease counts from here.
        let now = self.now();
        match (self.engine.renewal(now), self.settings.lease) {
            (Some(number), Some(lease)) => {
                let nanos = u64::try_from(lease.time.as_nanos()).unwrap_or(u64::MAX);
                self.send(&CheckpointMessage::Renew { number, nanos }.encode())
            }
            _ => Ok(()),
        }
    }

    fn await_answer(&mut self, due: StandbyMessage, what: &'static str) -> Result<(), Error> {
        let after = self.settings.confirm_timeout;
        let stop = Stop::never().within(after);
        let answers = self.answers.as_mut().ok_or_else(one_way)?;
        match answers.next(&stop)? {
            Some(message) if message == due => Ok(()),
            Some(StandbyMessage::Taken(number)) => {
                self.answered(StandbyMessage::Taken(number));
                Ok(())
            }
            Some(_) => Err(out_of_turn()),
            None => Err(no_answer(what, after)),
        }
    }

    /// Sends all dirty pages, a batch at a time.
    pub(super) fn send_dirty(&mut self) -> Result<(), Error> {
        loop {
            // Not later: a standby that starts the guest is not sent all that is left first, and one that takes pages
            // slowly keeps the guest paused for a limited time.
            self.listen(&Stop::never().within(Duration::ZERO));
            self.tell(CheckpointEvent::Time);
            if self.engine.is_ending() {
                return Ok(());
            }
            self.renew()?;
            self.pages.batch.clear();
            while self.pages.batch.whole_pages() < BATCH {
                let room = BATCH - self.pages.batch.whole_pages();
                let Some(run) = self.pages.search.next_run(&mut self.pages.dirty, room) else { break };
                let guest = (&*self.guest.memory, self.guest.dirty.as_slice());
                let Pages { dirty, batch, .. } = &mut self.pages;
                dirty_run::read(guest, dirty, run, ZeroDetection::Legacy, batch)?;
            }
            if self.pages.batch.is_empty() {
                return Ok(());
            }
            self.send_batch()?;
        }
    }

    fn send_batch(&mut self) -> Result<(), Error> {
        let (limit, after) = self.limit();
        let memory = &*self.guest.memory;
        let mut messages = Vec::new();
        for piece in self.pages.batch.pieces() {
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
        put(&mut self.sink, &parts.collect::<Vec<_>>(), &limit, after)?;
        self.figures.in_checkpoint += self.pages.batch.pages();
        self.figures.pages += self.pages.batch.pages();
        Ok(())
    }

    pub(super) fn save_state(&mut self, number: u64) -> Result<(), Error> {
        let saved = save_state(self.guest.control.as_mut());
        let state = saved.map_err(|source| Error::Control { what: "save its device state", source })?;
        named("calling CheckpointObserver::taken", || self.observer.taken(number));
        let head = CheckpointMessage::State(state.len() as u64).encode();
        let (limit, after) = self.limit();
        put(&mut self.sink, &[SendPart::Own(&head), SendPart::Own(&state)], &limit, after)
    }
}

/// Sends to a standby that takes it before `limit`, which was `after` from the beginning of its wait.
fn put(sink: &mut StreamChannel, parts: &[SendPart<'_>], limit: &Stop, after: Duration) -> Result<(), Error> {
    let sent = sink.send(parts, limit).map_err(Error::from);
    sent.map_err(|error| if error.is_deadline() { no_answer(TAKES_NOTHING, after) } else { error })
}

const TAKES_NOTHING: &str = "that it has a checkpoint, of which it has not taken all bytes,";

/// Why protection ended, where no step has failed.
pub(super) fn error_of(cause: CheckpointCause, after: Duration) -> Error {
    match cause {
        CheckpointCause::PausedTooLong(_) => no_answer(TAKES_NOTHING, after),
        CheckpointCause::Unconfirmed(_) => no_answer("that it has a checkpoint", after),
        CheckpointCause::NeverSent(number) => {
            out_of_place(format!("the confirmation of checkpoint {number}, which was not sent"))
        }
        CheckpointCause::NoLease => no_answer("that the guest may run on", after),
        CheckpointCause::NeverAsked(number) => {
            out_of_place(format!("lease {number}, which was not asked for"))
        }
        CheckpointCause::Discarded => {
            Error::PeerFailed { why: "it has given the guest up, and starts none".into() }
        }
        CheckpointCause::Unreleased => no_answer("that it has forgotten the guest", after),
        CheckpointCause::NeverReleased => {
            out_of_place("the answer to an end of the protection, which it was not told".into())
        }
    }
}

fn out_of_place(what: String) -> Error {
    Error::OutOfTurn { what, at: None, while_doing: "checkpoints are taken" }
}

fn no_answer(what: &'static str, after: Duration) -> Error {
    let remedy = Remedy::Advice("see whether its host is overloaded, or raise the confirm timeout");
    Error::NoAnswer { what, after, remedy }
}

pub(super) fn out_of_turn() -> Error {
    out_of_place("a message that was not due".into())
}

pub(super) fn one_way() -> Error {
    Error::Config {
        what: "a standby's answers can't come on this connection".into(),
        remedy: Remedy::Advice("use a connection of both directions"),
    }
}
