//! What a source of checkpoints says to its standby, and how it hears of it. Each wait for the standby has a limit.

use std::time::Duration;

use super::{Pages, Running};
use crate::engine::{CheckpointCause, CheckpointEvent};
use crate::error::Remedy;
use crate::guest::save_state;
use crate::page::ZeroDetection;
use crate::session::callback::named;
use crate::session::{Error, dirty_run};
use crate::sys::{SendPart, Stop};
use crate::transport::{ByteSink, StreamChannel};

/// Whole pages that are sent by one call.
const BATCH: u64 = 512;

/// How long a wait for the standby may take.
pub(super) struct Limit {
    pub(super) stop: Stop,
    /// From the beginning of the wait.
    pub(super) after: Duration,
}

impl Running {
    /// How long the standby may take nothing: while the guest is paused, until that has taken too long; while it runs with a
    /// lease, until it is to be paused.
    pub(super) fn limit(&self) -> Limit {
        let confirm = self.settings.confirm_timeout;
        let lease = self.settings.lease.filter(|_| self.lease.left().is_some() && !self.figures.not_resumed);
        let after = lease.map_or(confirm, |lease| confirm.min(lease.time));
        let left = self.engine.give_up_at().map_or(after, |at| at.saturating_sub(self.now()));
        Limit { stop: Stop::never().within(left), after }
    }

    pub(super) fn greet(&mut self) -> Result<(), Error> {
        let limit = self.limit();
        if let Some(message) = self.standby.greet(&*self.guest.memory, &limit)? {
            self.answered(message);
        }
        Ok(())
    }

    /// Asks for a lease, if it is time.
    pub(super) fn renew(&mut self) -> Result<(), Error> {
        // Read before it is sent: the lease counts from here.
        let now = self.now();
        match (self.engine.renewal(now), self.settings.lease) {
            (Some(number), Some(lease)) => {
                let limit = self.limit();
                self.standby.renew(number, lease.time, &limit)
            }
            _ => Ok(()),
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
        let limit = self.limit();
        self.standby.pages(&*self.guest.memory, &self.pages.batch, &limit)?;
        self.figures.in_checkpoint += self.pages.batch.pages();
        self.figures.pages += self.pages.batch.pages();
        Ok(())
    }

    pub(super) fn save_state(&mut self, number: u64) -> Result<(), Error> {
        let saved = save_state(self.guest.control.as_mut());
        let state = saved.map_err(|source| Error::Control { what: "save its device state", source })?;
        named("calling CheckpointObserver::taken", || self.observer.taken(number));
        let limit = self.limit();
        self.standby.state(number, &state, &limit)
    }
}

/// Sends to a standby that takes it in time.
pub(super) fn put(sink: &mut StreamChannel, parts: &[SendPart<'_>], limit: &Limit) -> Result<(), Error> {
    in_time(sink.send(parts, &limit.stop), limit)
}

/// What a standby that has not taken it in time has failed to do.
pub(super) fn in_time<E: Into<Error>>(sent: Result<(), E>, limit: &Limit) -> Result<(), Error> {
    sent.map_err(Into::into).map_err(|error| match error.is_deadline() {
        true => no_answer(TAKES_NOTHING, limit.after),
        false => error,
    })
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

pub(super) fn no_answer(what: &'static str, after: Duration) -> Error {
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
