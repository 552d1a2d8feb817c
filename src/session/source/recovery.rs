//! Another connection after one was lost.
//!
//! After the switch to postcopy:
//!
//! ```text
//! S->D  RECV_BITMAP(block) for each block          D->S  RECV_BITMAP(block), bitmap
//! S->D  RESUME                                     D->S  RESUME_ACK, then all requests that are outstanding
//! S->D  pages as before
//! ```
//!
//! # Required order
//!
//! A page that the destination has not received is dirty, even if it was sent: no page in flight is lost. The guest
//! never runs here again. Before the switch, and without one, `resume` has what the ends say to each other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::{Handover, Lost, SourceEvent};
use crate::error::{Chain, Remedy};
use crate::observe::Status;
use crate::stream::qemu::command::Command;
use crate::sys::{SendPart, Stop};
use crate::transport::{Address, ByteSink, ChannelError, InlineLink, OpenError};

use super::SourceSession;
use super::outage::{FIRST_RETRY_INTERVAL, Loss};
use super::peer::refuse_verdict;
use super::redial::{NewConnection, Reconnect};
use super::resume::Resumption;
use super::return_path::{PeerMessage, ReturnPath, check_deadline};
use crate::session::callback::{named, quietly};
use crate::session::connection::Attempt;
use crate::session::{Breakage, Error, ErrorKind};

/// Shortest time in which a new connection has to show that it leads to the destination.
const SHORTEST_ANSWER_TIME: Duration = Duration::from_secs(3);

/// State of the connections after the first.
#[derive(Default)]
pub(super) struct Recovery {
    reconnect: Option<Box<dyn Reconnect>>,
    /// Set from the loss of a connection until a round was confirmed since, or RESUME_ACK after the switch.
    pub(super) loss: Option<Loss>,
    /// The ends have not agreed yet to continue on the connection that was made last.
    pub(super) unproven: bool,
    pub(super) resumption: Resumption,
    /// Why it was lost, before the guest ran at the destination.
    lost_by: Option<Error>,
}

impl Recovery {
    /// The ends have agreed to continue, before the guest runs at the destination. This fence was sent first.
    pub(super) fn replaced(&mut self, first_fence: Option<u64>) {
        self.unproven = false;
        if let Some(loss) = &mut self.loss {
            loss.replaced(Instant::now(), first_fence);
        }
    }

    /// The destination has confirmed a fence.
    pub(super) fn confirmed(&mut self, fence: u64) {
        let now = Instant::now();
        if self.loss.as_mut().is_some_and(|loss| loss.confirmed(now, fence)) {
            self.loss = None;
        }
    }

    /// How long the destination may take to answer on a new connection, of `after` for all attempts: there is time for
    /// another one, which may go to another address.
    pub(super) fn answer_time(&self, after: Duration, stall_timeout: Duration) -> Duration {
        let spent = self.loss.as_ref().map_or(Duration::ZERO, |loss| loss.time(Instant::now()));
        match after.saturating_sub(spent) {
            // The last attempt.
            Duration::ZERO => stall_timeout,
            left => (left / 2).max(SHORTEST_ANSWER_TIME).min(stall_timeout),
        }
    }

    /// The embedder has said how further connections come about.
    pub(super) fn is_asked_for(&self) -> bool {
        self.reconnect.is_some()
    }

    pub(super) fn can_connect(&self) -> bool {
        self.reconnect.as_ref().is_some_and(|reconnect| reconnect.may_connect())
    }

    /// If the connection that was made last led nowhere, the next may go elsewhere.
    fn leave_useless(&mut self) {
        if let Some(reconnect) = self.reconnect.as_mut().filter(|_| std::mem::take(&mut self.unproven)) {
            named("calling Reconnect::led_nowhere", || reconnect.led_nowhere());
        }
    }

    /// Opens one more connection to the destination.
    pub(super) fn connect(&mut self, to: Option<&Address>, stop: &Stop) -> Result<NewConnection, OpenError> {
        match &mut self.reconnect {
            Some(reconnect) => named("calling Reconnect::connect", || reconnect.connect(to, stop)),
            None => Err(OpenError::OnlyOne { address: "the connection that was handed in".into() }),
        }
    }
}

/// Placeholder for a connection that is gone.
struct Gone;

impl crate::transport::Sealed for Gone {}

impl ByteSink for Gone {
    fn send(&mut self, _parts: &[SendPart<'_>], _stop: &Stop) -> Result<(), ChannelError> {
        Err(ChannelError::Closed { peer: "the destination".into(), doing: "sending the stream" })
    }

    fn flush(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }

    fn position(&self) -> u64 {
        0
    }
}

impl SourceSession {
    /// How to reach the destination again if the connection is lost: after a switch to postcopy for as long as
    /// [`PostcopySettings::reconnect_timeout`](crate::session::PostcopySettings::reconnect_timeout) allows, otherwise as
    /// [`SourceSettings::reconnect_timeout`](crate::session::SourceSettings::reconnect_timeout) does.
    pub fn with_reconnect(mut self, reconnect: Box<dyn Reconnect>) -> Self {
        let allowed = self.settings.postcopy.as_ref().is_some_and(|p| p.reconnect_timeout > Duration::ZERO);
        self.driver.engine.set_recoverable(allowed);
        self.missing.recovery.reconnect = Some(reconnect);
        self
    }

    /// True if an error only means that the present connection is unusable.
    pub(super) fn is_lost(&self, error: &Error) -> bool {
        let agreeing = self.driver.engine.is_recovering();
        let no_answer = matches!(error, Error::NoAnswer { .. });
        self.driver.engine.may_recover()
            && match error.kind() {
                // A device that failed, too.
                _ if error.is_of_connection() => agreeing || !no_answer,
                ErrorKind::Channel => agreeing || !no_answer,
                // An operator closed it: nothing else cancels a wait after the switch.
                ErrorKind::Cancelled => self.driver.engine.is_postcopy(),
                // Its bitmaps can't be trusted; the next connection may be to another peer.
                ErrorKind::Peer => agreeing && !matches!(error, Error::PeerFailed { .. }),
                ErrorKind::Config | ErrorKind::Local => false,
            }
    }

    /// Drops the old connection and opens another.
    ///
    /// # Errors
    /// The time limit was reached.
    pub(super) fn reconnect(&mut self) -> Result<SourceEvent, Error> {
        let lost = self.driver.engine.lost().unwrap_or(Lost::Postcopy);
        self.drop_connection(lost);
        if self.breakage.is(Breakage::ResumeAfterLoss) {
            let _ = self.guest.control.resume();
        }
        let NewConnection { sink, back } = self.next_connection(lost)?;
        let mut link = InlineLink::new(sink, Arc::clone(&self.guest.memory));
        if let Some(size) = self.driver.control.delta_cache_size().filter(|_| lost == Lost::BeforeCommit) {
            // Empty: what was sent before may not have arrived.
            link = link.with_deltas(size);
        }
        let mut back = ReturnPath::new(back);
        back.acknowledge_at_once();
        self.wire.replace(Box::new(link), Some(back));
        self.wire.stop = match lost {
            Lost::Postcopy => self.driver.control.connection().connected(),
            Lost::BeforeCommit => Stop::on(&self.cancel_token()),
            Lost::BehindCommit => Stop::never().within(self.settings.finish_timeout),
        };
        if lost == Lost::Postcopy {
            self.figures.shared().update(|s| s.status = Status::PostcopyRecover);
        }
        Ok(SourceEvent::Done)
    }

    /// Tries until an attempt succeeds or the time is over.
    fn next_connection(&mut self, lost: Lost) -> Result<NewConnection, Error> {
        let after = match (lost, &self.settings.postcopy) {
            (Lost::Postcopy, Some(postcopy)) => postcopy.reconnect_timeout,
            _ => self.settings.reconnect_timeout,
        };
        let mut needs_recover_command = self.needs_recover_command();
        let (driver, recovery) = (&self.driver, &mut self.missing.recovery);
        recovery.loss.get_or_insert_with(|| Loss::new(Instant::now())).again(Instant::now());
        recovery.leave_useless();
        let mut tried = false;
        while let Some(loss) = &mut recovery.loss {
            let left = after.saturating_sub(loss.time(Instant::now()));
            let late = left == Duration::ZERO;
            // Each loss gets one attempt, however late.
            if late && (tried || !loss.takes_late_attempt()) {
                break;
            }
            let left = left.max(FIRST_RETRY_INTERVAL);
            let attempt = match lost {
                Lost::Postcopy => driver.control.connection().next(),
                Lost::BeforeCommit => Attempt::until(Stop::on(&driver.control.canceller().token())),
                Lost::BehindCommit => Attempt::until(Stop::never()),
            };
            if lost == Lost::BeforeCommit && attempt.stop.reason().is_some() {
                return Err(Error::Cancelled);
            }
            needs_recover_command &= attempt.address.is_none();
            if attempt.held || needs_recover_command {
                attempt.stop.sleep(left);
                continue;
            }
            let stop = attempt.stop.within(left);
            let at_once = late || attempt.address.is_some();
            // Another command ends it, or the end of the time.
            if !at_once && stop.sleep(loss.next_pause()).is_some() {
                continue;
            }
            tried = true;
            match recovery.connect(attempt.address.as_ref(), &stop) {
                Ok(connection) => {
                    recovery.unproven = true;
                    return Ok(connection);
                }
                Err(error) => {
                    tracing::debug!(error = %Chain(&error), "no new connection to the destination yet")
                }
            }
        }
        let found = recovery.lost_by.take().filter(|_| lost != Lost::Postcopy);
        if found.is_some() {
            tracing::warn!(seconds = after.as_secs_f32(), "the destination was not reached again");
        }
        Err(found.unwrap_or_else(|| unreachable_again(after)))
    }

    /// A QEMU from 10.1 on with postcopy-preempt keeps listening. If a connection arrives before it has noticed the
    /// loss, it treats it as a stranger's and ends, together with the guest. So an operator must first check that it
    /// waits.
    fn needs_recover_command(&self) -> bool {
        self.driver.engine.handover() == Handover::Shut
            && self.driver.engine.urgent().is_some()
            && !self.breakage.is(Breakage::ReconnectUntold)
    }

    /// Lets go of the connection.
    pub(super) fn close_connection(&mut self) {
        let gone = InlineLink::new(Box::new(Gone), Arc::clone(&self.guest.memory));
        self.wire.replace(Box::new(gone), None);
    }

    fn drop_connection(&mut self, lost: Lost) {
        self.note_ways_of_sending();
        let registered = self.wire.link.abilities().registers_memory;
        // Order 3. What is not confirmed is for the destination to say.
        drop(self.wire.link.reclaim());
        self.close_connection();
        // Order 7.
        if registered {
            quietly("allowing discards", || _ = self.guest.control.forbid_discard(false));
        }
        self.missing.forget_connection(&self.guest.memory, self.breakage);
        self.pages.forget_connection();
        if lost == Lost::BeforeCommit {
            self.lift_throttling();
        }
        if lost == Lost::Postcopy {
            self.figures.shared().update(|s| s.status = Status::PostcopyPaused);
        }
        let error = self.error.as_ref().map(|error| Chain(error).to_string()).unwrap_or_default();
        let guest = match lost {
            Lost::Postcopy => "the guest runs at the destination",
            Lost::BehindCommit => "the guest was handed over",
            Lost::BeforeCommit => "the guest runs on here",
        };
        tracing::warn!(error = error.as_str(), guest, "the connection is lost");
        if lost != Lost::Postcopy {
            let committed = lost == Lost::BehindCommit;
            let position = self.wire.position();
            self.figures.lost(self.driver.clock.now(), position, committed, error);
            // The next loss has a reason of its own.
            self.missing.recovery.lost_by = self.error.take();
        }
    }

    /// Announces to the peer that pages follow, and waits for its acknowledgement.
    pub(super) fn resume_pages(&mut self) -> Result<SourceEvent, Error> {
        let mut out = Vec::new();
        Command::PostcopyResume.encode(&mut out);
        self.wire.send(&out)?;
        self.wire.link.sink().flush(&self.wire.stop)?;
        let after = self.settings.stall_timeout;
        let stop = self.wire.stop.within(after);
        loop {
            let Some(back) = &mut self.wire.back else { return Err(silent("that it goes on", after)) };
            match back.next(&stop)? {
                PeerMessage::Resumed => break,
                PeerMessage::Working => {}
                taken @ PeerMessage::Pong(_) => self.take_message(taken)?,
                word => refuse_verdict(word)?,
            }
            check_deadline(&stop)?;
        }
        self.missing.recovery.loss = None;
        self.missing.recovery.unproven = false;
        self.error = None;
        let status = if self.driver.engine.is_taken() { Status::PostcopyActive } else { Status::Device };
        self.figures.shared().update(|s| s.status = status);
        Ok(SourceEvent::Done)
    }
}

pub(super) fn silent(what: &'static str, after: Duration) -> Error {
    Error::NoAnswer { what, after, remedy: Remedy::RaiseStallTimeout }
}

fn unreachable_again(after: Duration) -> Error {
    let remedy = "the guest runs there, and waits where it touches a page that is missing: see whether its host lives and \
                  listens again";
    Error::NoAnswer { what: "that it continues", after, remedy: Remedy::Advice(remedy) }
}
