//! What the source hears of its destination, and how long it waits for it.

use std::time::Duration;

use crate::engine::{Handover, Input};
use crate::error::Remedy;
use crate::observe::Status;
use crate::stream::qemu::command::Command;
use crate::sys::Stop;

use super::SourceSession;
use super::return_path::{PeerMessage, check_deadline};
use super::setup;
use crate::session::{Breakage, Error};

/// Longest time in which a source with nothing to send is silent.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// Time between two looks at the peer while a guest is waited for.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Bytes of RAM a second that a destination compares and puts away at the least: what bounds the wait for one that
/// goes on saying that it is at it.
const SLOWEST_LOAD: u64 = 64 << 20;

/// Messages heard in one look at the return path.
const MAX_MESSAGES: usize = 64;

impl SourceSession {
    /// A source that has nothing to send says so: a ramwire takes long silence for a dead peer. Both kinds of peer
    /// answer a PING between sections.
    pub(super) fn send_keepalive(&mut self) -> Result<(), Error> {
        let now = self.clock.now();
        let every = (self.settings.stall_timeout / 4).min(KEEPALIVE_INTERVAL);
        if self.back.is_none() || now.saturating_sub(self.last_sign) < every {
            return Ok(());
        }
        self.last_sign = now;
        let mut ping = Vec::new();
        Command::Ping(setup::ORDINARY_PING).encode(&mut ping);
        self.send_bytes(&ping)?;
        Ok(self.link.sink().flush(&self.stop)?)
    }

    /// Sees whether the peer failed meanwhile.
    pub(super) fn poll_return_path(&mut self) -> Result<(), Error> {
        if self.engine.is_postcopy() && self.engine.is_committed() {
            return self.hear_requests();
        }
        let Some(back) = &mut self.back else { return Ok(()) };
        // The rest is heard at the next look: a peer that talks on must not keep us from our pages.
        for _ in 0..MAX_MESSAGES {
            match back.poll()? {
                Some(PeerMessage::Working) => {}
                Some(word) => refuse_verdict(word)?,
                None => break,
            }
        }
        Ok(())
    }

    /// Why the peer failed, if it said so before the connection broke.
    pub(super) fn peer_failure(&mut self) -> Option<Error> {
        match self.poll_return_path() {
            Err(error @ Error::PeerFailed { .. }) => Some(error),
            _ => None,
        }
    }

    pub(super) fn await_ready(&mut self) -> Result<Input, Error> {
        if self.breakage.is(Breakage::CommitBeforeReady) {
            return Ok(Input::Ready);
        }
        // It makes its own digest before, and puts RAM on a disk perhaps: as long as it says so, a cancel apart.
        let work = Duration::from_secs(self.guest.memory.table().travelling() / SLOWEST_LOAD);
        let longest = self.settings.finish_timeout.saturating_add(work);
        let stop = self.stop.within(longest);
        let silence = self.settings.stall_timeout;
        let unheard = || {
            let (after, remedy) = match stop.reason() {
                Some(_) => (longest, Remedy::RaiseFinishTimeout),
                None => (silence, Remedy::RaiseStallTimeout),
            };
            Error::NoAnswer { what: "that it has loaded the guest", after, remedy }
        };
        let or_unheard = |error| match Error::from(error) {
            error if error.is_deadline() => unheard(),
            error => error,
        };
        loop {
            match self.verdict(&stop.within(silence), unheard)? {
                // What is always there already is never waited for: the wait's own end must be looked at.
                PeerMessage::Working => check_deadline(&stop).map_err(or_unheard)?,
                PeerMessage::Ready => return Ok(Input::Ready),
                word => return refuse_verdict(word).map(|()| Input::Failed),
            }
        }
    }

    /// Before COMMIT, so that a failure on either side leaves the guest at its source.
    pub(super) fn await_guest(&mut self) -> Result<Input, Error> {
        while let Some(upstream) = &mut self.upstream
            && !upstream.wait_given(self.handover, POLL_INTERVAL)?
        {
            self.poll_return_path()?;
            if self.stop.reason().is_some() {
                return Err(Error::Cancelled);
            }
        }
        Ok(Input::Done)
    }

    pub(super) fn await_running(&mut self) -> Result<Input, Error> {
        if !self.handover.has_running() || self.breakage.is(Breakage::CompleteAtCommit) {
            return Ok(Input::Running);
        }
        let after = self.settings.finish_timeout;
        let silent =
            || Error::NoAnswer { what: "that the guest runs", after, remedy: Remedy::RaiseFinishTimeout };
        let stop = self.stop.within(after);
        let verdict = loop {
            match self.verdict(&stop, silent) {
                Err(error @ Error::NoAnswer { .. }) => break self.await_answer(error)?,
                // Of pages that are on their way.
                Ok(word @ PeerMessage::Request(_)) if self.engine.is_postcopy() => {
                    self.take_postcopy_word(word)?;
                    check_deadline(&stop)?;
                }
                verdict => break verdict?,
            }
        };
        match verdict {
            PeerMessage::Running if self.handover == Handover::Native => Ok(Input::Running),
            PeerMessage::Shut(0) if self.handover == Handover::Shut => Ok(Input::Running),
            word => refuse_verdict(word).map(|()| Input::Failed),
        }
    }

    /// In doubt a relay goes on listening: its far end may only have stood still. `silence` is what brought it here.
    fn await_answer(&mut self, silence: Error) -> Result<PeerMessage, Error> {
        if let Some(upstream) = &mut self.upstream {
            self.figures.shared().update(|s| s.status = Status::InDoubt);
            upstream.far_end_is_silent(&silence);
        }
        while let Some(upstream) = &mut self.upstream
            && upstream.goes_on_listening()
        {
            let due = || Error::NoAnswer {
                what: "that the guest runs",
                after: POLL_INTERVAL,
                remedy: Remedy::RaiseFinishTimeout,
            };
            match self.verdict(&Stop::never().within(POLL_INTERVAL), due) {
                Err(Error::NoAnswer { .. }) => {}
                verdict => return verdict,
            }
        }
        Err(silence)
    }

    /// Waits until `stop`, whose deadline means `silent`.
    pub(super) fn verdict(
        &mut self,
        stop: &Stop,
        silent: impl FnOnce() -> Error,
    ) -> Result<PeerMessage, Error> {
        let Some(back) = &mut self.back else {
            return Err(Error::PeerFailed { why: "there is no return path to hear it on".into() });
        };
        back.next_verdict(stop).map_err(|error| if error.is_deadline() { silent() } else { error })
    }
}

/// A word that says the peer failed, or that is out of turn, as an error; harmless ones pass.
pub(super) fn refuse_verdict(word: PeerMessage) -> Result<(), Error> {
    match word {
        PeerMessage::Pong(_) | PeerMessage::SwitchoverAck => Ok(()),
        PeerMessage::Refused(why) => Err(Error::PeerFailed { why }),
        PeerMessage::Shut(status) if status != 0 => {
            Err(Error::PeerFailed { why: format!("it ended the migration with status {status}") })
        }
        word => Err(Error::OutOfTurn { what: format!("{word:?}"), at: None, while_doing: "sending RAM" }),
    }
}
