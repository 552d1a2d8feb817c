//! A connection that is lost after the switch to postcopy: both ends keep their state, and the source connects again.
//!
//! ```text
//! [lost] -> reconnect -> compare what was received -> resume -> missing pages as before
//! ```
//!
//! After a loss in any of these steps the recovery begins again with the first. The guest was handed over: it never
//! runs here again, whatever the result.

use std::time::Duration;

use super::{BehindUrgent, Phase, SourceAction, SourceEngine, UrgentChannel};
use crate::engine::Handover;

impl SourceEngine {
    /// Sets whether a lost connection may be followed by another.
    pub fn set_recoverable(&mut self, recoverable: bool) {
        self.postcopy.recoverable = recoverable;
    }

    /// True while the ends determine, on a new connection, which pages are missing.
    pub fn is_recovering(&self) -> bool {
        matches!(
            self.phase,
            Phase::AskingReceived
                | Phase::OpeningUrgent(BehindUrgent::Compare | BehindUrgent::Resume)
                | Phase::ComparingReceived
                | Phase::ResumingPages
        )
    }

    /// True if a peer that reports what it has received has taken over the guest: a QEMU. A ramwire may still be loading
    /// the device state, and reports that it takes the guest afterwards, or that it could not.
    pub fn has_taken_who_compares(&self) -> bool {
        self.config.handover == Handover::Shut
    }

    /// True if the loss of the connection does not end the migration: RUN may have been sent, and the peer may wait for
    /// another connection.
    pub fn may_recover(&self) -> bool {
        let lives = matches!(
            self.phase,
            Phase::Committing
                | Phase::Filling
                | Phase::AwaitingTaken
                | Phase::EndingPostcopy
                | Phase::AwaitingRunning
        );
        self.postcopy.begun && self.postcopy.recoverable && (lives || self.is_recovering())
    }

    pub(super) fn reconnect(&mut self) {
        self.go(Phase::Reconnecting, SourceAction::Reconnect);
    }

    /// A step of the recovery is done.
    pub(super) fn recovered(&mut self, now: Duration) {
        match self.phase {
            Phase::Reconnecting => self.go(Phase::AskingReceived, SourceAction::AskReceived),
            Phase::AskingReceived => self.open_urgent(UrgentChannel::Early, BehindUrgent::Compare),
            Phase::ComparingReceived => {
                self.postcopy.taken |= self.has_taken_who_compares();
                self.open_urgent(UrgentChannel::Late, BehindUrgent::Resume);
            }
            _ => self.send_missing(now),
        }
    }
}
