//! A connection lost before the guest runs at the destination, towards a ramwire.
//!
//! ```text
//! S->D  RESUME                                     D->S  HOLDS: the last fence that has come
//! S->D  RECV_BITMAP(block) for each block          D->S  RECV_BITMAP(block), bitmap: pages that came since that fence
//! S->D  rounds as before
//! ```
//!
//! Behind COMMIT: RESUME, HOLDS, RUNNING.
//!
//! # Required order
//!
//! A page that the destination has not confirmed is dirty again, even if it was sent. The guest runs on here from the loss
//! to the next pause, unless it was handed over.

use std::time::Duration;

use crate::engine::{Handover, Lost, Outcome, SourceEvent, Unconfirmed, is_equal};
use crate::error::Chain;
use crate::observe::EventKind;
use crate::ram::{PageRun, PageSet};
use crate::stream::native::{Order, Purpose, Resume};
use crate::stream::qemu::command::Command;
use crate::sys::{SendPart, Stop, random_id};
use crate::units::PageIndex;

use super::SourceSession;
use super::peer::refuse_verdict;
use super::received::bit_runs;
use super::return_path::{PeerMessage, check_deadline};
use crate::session::callback::named;
use crate::session::{Breakage, Error};

/// How long a source whose guest stays here tries to tell the destination so, and how often.
const FAREWELL_TIME: Duration = Duration::from_secs(3);
const FAREWELL_ATTEMPTS: u32 = 4;

/// What both ends have said in HELLO, and the connections since.
#[derive(Default)]
pub(super) struct Resumption {
    ours: Option<[u8; 16]>,
    theirs: Option<[u8; 16]>,
    attempts: u32,
}

impl SourceSession {
    /// Our secret, if a lost connection may be followed by another. That one is a plain stream.
    pub(super) fn resumption_secret(&mut self) -> Option<[u8; 16]> {
        let allowed = self.settings.reconnect_timeout > Duration::ZERO && self.missing.recovery.can_connect();
        let other = self.settings.postcopy.is_some() || self.upstream.is_some() || self.may_pass_memory();
        let secret = (allowed && !other).then(random_id);
        self.missing.recovery.resumption.ours = secret;
        secret
    }

    /// The destination's secret, if it waits for further connections.
    pub(super) fn agree_on_resumption(&mut self, theirs: Option<[u8; 16]>) {
        let resumption = &mut self.missing.recovery.resumption;
        resumption.theirs = theirs;
        if resumption.ours.is_some() && theirs.is_some() {
            self.pages.unconfirmed = Some(Unconfirmed::new(self.guest.memory.table()));
        }
    }

    /// Further connections were asked for, and it is known now that there are none before a switch to postcopy.
    pub(super) fn tell_if_not_replaceable(&mut self, handover: Handover) {
        let asked = self.settings.reconnect_timeout > Duration::ZERO && self.missing.recovery.is_asked_for();
        let Resumption { ours, theirs, .. } = &self.missing.recovery.resumption;
        let why = match () {
            // Behind the switch a lost connection is replaced all the same.
            () if !asked || self.settings.postcopy.is_some() || theirs.is_some() => return,
            () if self.wire.back.is_none() => "this connection carries no answers",
            () if !self.missing.recovery.can_connect() => {
                "no address is known at which a byte stream leads to the destination"
            }
            () if handover != Handover::Native => "the destination is a QEMU",
            () if ours.is_some() => "the destination waits for no other connection: it was not asked to",
            () if self.may_pass_memory() => "this guest's memory is passed",
            () => "this connection is no plain stream",
        };
        tracing::warn!("the loss of this connection ends the migration: {why}");
        self.figures.shared().tell(EventKind::NotReplaceable { why: why.into() });
    }

    /// All that was sent so far is to be confirmed. Its count goes first: what is confirmed is not counted again on another
    /// connection.
    pub(super) fn send_fence(&mut self) -> Result<(), Error> {
        let Some(unconfirmed) = &mut self.pages.unconfirmed else { return Ok(()) };
        let (number, mut out) = (unconfirmed.fence(self.driver.clock.now()), Vec::new());
        if self.breakage.is(Breakage::TrustFence) {
            let _ = unconfirmed.confirmed(number);
        }
        self.encode_counts(&mut out);
        Command::Native(Order::Fence { number }).encode(&mut out);
        self.wire.send(&out)?;
        Ok(self.wire.flush()?)
    }

    /// Pages that go beside the stream may be there before the destination has read the first fence in it, and a connection
    /// that is lost before that is the end: no page leaves before the fence is confirmed.
    pub(super) fn await_first_fence(&mut self) -> Result<(), Error> {
        let beside = self.wire.link.page_channels() > 0 || self.wire.link.abilities().registers_memory;
        let stop = self.wire.stop.within(self.settings.stall_timeout);
        while beside && self.pages.unconfirmed.as_ref().is_some_and(|sent| !sent.is_any_confirmed()) {
            let Some(back) = &mut self.wire.back else { return Ok(()) };
            let message = back.next(&stop)?;
            self.take_message(message)?;
            check_deadline(&stop)?;
        }
        Ok(())
    }

    /// FENCED has come.
    pub(super) fn fence_confirmed(&mut self, number: u64) -> Result<(), Error> {
        let Some(unconfirmed) = &mut self.pages.unconfirmed else { return Err(not_sent("FENCED", number)) };
        if !unconfirmed.confirmed(number) {
            return Err(not_sent("FENCED", number));
        }
        self.missing.recovery.confirmed(number);
        // It has all that it needs to go on over another connection.
        self.driver.engine.set_resumable(unconfirmed.is_any_confirmed());
        Ok(())
    }

    /// The connection is lost, and the guest is paused: no end of the migration is near.
    pub(super) fn let_guest_run(&mut self) -> Result<SourceEvent, Error> {
        let resumed = named("calling GuestControl::resume", || self.guest.control.resume());
        resumed.map_err(|source| Error::Control { what: "resume", source })?;
        self.departure.paused = false;
        // What was done for this switchover is of no use for the next one.
        self.driver.control.gate().close();
        self.figures.runs_on(self.driver.clock.now());
        Ok(SourceEvent::Done)
    }

    /// The first bytes of another connection.
    pub(super) fn send_resume(&mut self) -> Result<SourceEvent, Error> {
        let purpose = match self.driver.engine.lost() {
            Some(Lost::BehindCommit) => Purpose::AskForGuest,
            _ => Purpose::GoOn,
        };
        let resume = self.resume_for(purpose);
        self.wire.send(&resume)?;
        self.wire.flush()?;
        Ok(SourceEvent::Done)
    }

    /// RESUME of the next connection.
    fn resume_for(&mut self, purpose: Purpose) -> Vec<u8> {
        let resumption = &mut self.missing.recovery.resumption;
        resumption.attempts += 1;
        let attempt = resumption.attempts;
        let secret = resumption.theirs.unwrap_or_default();
        let migration_id = self.settings.migration_id;
        let mut out = Vec::new();
        Command::Native(Order::Resume(Resume { migration_id, secret, attempt, purpose })).encode(&mut out);
        out
    }

    /// The migration has ended, and the guest runs on here: a destination that takes the end of the connection for a loss
    /// would wait for another one as long as it may. It is told on a connection of its own, since the old one may be gone,
    /// or in the middle of a page.
    pub(super) fn tell_given_up(&mut self, outcome: Outcome) {
        let waits = self.pages.unconfirmed.as_ref().is_some_and(|unconfirmed| unconfirmed.last_fence() > 0);
        let has_ended = matches!(self.error, Some(Error::PeerFailed { .. }));
        let stays = matches!(outcome, Outcome::StaysHere(_)) && !self.driver.engine.is_postcopy();
        if !waits || has_ended || !stays || self.breakage.is(Breakage::GiveUpSilently) {
            return;
        }
        self.close_connection();
        let resume = self.resume_for(Purpose::GiveUp);
        let stop = Stop::never().within(FAREWELL_TIME);
        for _ in 0..FAREWELL_ATTEMPTS {
            match self.missing.recovery.connect(None, &stop) {
                Ok(mut connection) => {
                    let told = connection.sink.send(&[SendPart::Own(&resume)], &stop);
                    let told = told.and_then(|()| connection.sink.flush(&stop));
                    let told = told.and_then(|()| connection.sink.finish(&stop));
                    tracing::info!(
                        is_told = told.is_ok(),
                        "the destination is told that the guest stays here"
                    );
                    return;
                }
                Err(error) => {
                    tracing::debug!(error = %Chain(&error), "the destination can't be told that the guest stays here");
                }
            }
            if stop.reason().is_some() {
                return;
            }
        }
    }

    /// What the destination has for certain; all else that was sent is dirty.
    pub(super) fn compare_held(&mut self) -> Result<SourceEvent, Error> {
        let (after, stall_timeout) = (self.settings.reconnect_timeout, self.settings.stall_timeout);
        let answers_by = self.missing.recovery.answer_time(after, stall_timeout);
        let fence = self.last_fence(&self.wire.stop.within(answers_by))?;
        let stop = self.wire.stop.within(stall_timeout);
        let mut pages_again = 0;
        let is_here = self.driver.engine.lost() != Some(Lost::BehindCommit);
        if is_here {
            let known =
                self.pages.unconfirmed.as_mut().is_some_and(|unconfirmed| unconfirmed.confirmed(fence));
            if !known {
                return Err(not_sent("HOLDS", fence));
            }
            self.missing.recovery.confirmed(fence);
            pages_again = self.mark_unconfirmed(&stop)?;
        }
        if is_here {
            self.take_up_throttling();
        }
        // What came before this is no answer to what is sent from here on.
        if is_here && !self.breakage.is(Breakage::SkipResumeFence) {
            self.send_fence()?;
        }
        let first_fence = self.pages.unconfirmed.as_ref().filter(|_| is_here).map(Unconfirmed::last_fence);
        self.missing.recovery.replaced(first_fence);
        self.error = None;
        self.figures.replaced(self.driver.clock.now(), pages_again);
        tracing::info!(fence, pages_again, "the migration goes on over another connection");
        Ok(SourceEvent::Done)
    }

    /// HOLDS, from the destination that was lost.
    fn last_fence(&mut self, stop: &Stop) -> Result<u64, Error> {
        let ours = self.missing.recovery.resumption.ours.unwrap_or_default();
        let Some(back) = &mut self.wire.back else {
            return Err(Error::PeerFailed { why: "there is no return path for its answer".into() });
        };
        loop {
            match back.next(stop)? {
                PeerMessage::Holds { secret, fence } if is_equal(&secret, &ours) => return Ok(fence),
                PeerMessage::Holds { .. } => {
                    let what = "HOLDS of another migration".into();
                    return Err(Error::OutOfTurn { what, at: None, while_doing: "its proof was due" });
                }
                word => refuse_verdict(word)?,
            }
            check_deadline(stop)?;
        }
    }

    /// Finds out which unconfirmed pages have come since the last fence, and marks the others dirty. Returns how many.
    fn mark_unconfirmed(&mut self, stop: &Stop) -> Result<u64, Error> {
        let mut received = PageSet::new(self.guest.memory.table());
        let page = self.guest.memory.table().page();
        self.bitmaps(0, stop, |index, block, bits| {
            let pages = block.used_length / page.bytes();
            for (first, pages) in bit_runs(bits, pages, true) {
                received.add(PageRun { block: index, first: PageIndex(first), pages });
            }
        })?;
        let Some(unconfirmed) = &mut self.pages.unconfirmed else { return Ok(0) };
        let mut again = unconfirmed.replaced(&received);
        if self.breakage.is(Breakage::TrustLastRound) {
            received.runs().for_each(|run| again.missing.remove(run));
        }
        self.pages.prints.replaced(&again.held);
        if !self.breakage.is(Breakage::TrustUnconfirmed) {
            for run in again.missing.runs() {
                self.pages.dirty.set_run(run);
            }
        }
        Ok(again.missing.count())
    }
}

fn not_sent(what: &str, fence: u64) -> Error {
    let what = format!("{what} of fence {fence}, which was not sent");
    Error::OutOfTurn { what, at: None, while_doing: "sending RAM" }
}
