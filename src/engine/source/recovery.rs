//! A lost connection that is no end: both ends keep their state, and the source connects again.
//!
//! ```text
//! postcopy:       [lost] -> reconnect -> compare what was received -> resume -> missing pages as before
//! before COMMIT:  [lost] -> (let the guest run) -> reconnect -> compare what was received -> sync -> rounds as before
//! behind COMMIT:  [lost] -> reconnect -> ask -> RUNNING
//! ```
//!
//! After a loss in any of these steps the recovery begins again with the first. A guest that was handed over never runs
//! here again, whatever the result; one that was not runs on here, its writes tracked, while there is no connection.

use std::time::Duration;

use super::{BehindUrgent, Lost, Phase, SourceAction, SourceEngine, UrgentChannel};
use crate::engine::Handover;

impl SourceEngine {
    /// Sets whether a connection that is lost after the switch to postcopy may be followed by another.
    pub fn set_recoverable(&mut self, recoverable: bool) {
        self.postcopy.recoverable = recoverable;
    }

    /// Sets whether a connection that is lost before the guest runs at the peer may be followed by another: the peer
    /// waits for it.
    pub fn set_resumable(&mut self, resumable: bool) {
        self.resumable = resumable;
    }

    /// True while the ends determine, on a new connection, which pages are missing.
    pub fn is_recovering(&self) -> bool {
        matches!(
            self.phase,
            Phase::AskingReceived(_)
                | Phase::OpeningUrgent(BehindUrgent::Compare | BehindUrgent::Resume)
                | Phase::ComparingReceived(_)
                | Phase::ResumingPages
        )
    }

    /// True if a peer that reports what it has received has taken over the guest: a QEMU. A ramwire may still be loading
    /// the device state, and reports that it takes the guest afterwards, or that it could not.
    pub fn has_taken_who_compares(&self) -> bool {
        self.config.handover == Handover::Shut
    }

    /// How the connection was lost that is being replaced now.
    pub fn lost(&self) -> Option<Lost> {
        match self.phase {
            Phase::Reconnecting(lost) | Phase::AskingReceived(lost) | Phase::ComparingReceived(lost) => {
                Some(lost)
            }
            Phase::LettingRun => Some(Lost::BeforeCommit),
            _ => None,
        }
    }

    /// True if the loss of the connection does not end the migration: the peer may wait for another connection.
    pub fn may_recover(&self) -> bool {
        self.loss().is_some()
    }

    /// What the loss of the connection would be now; `None`: the end.
    fn loss(&self) -> Option<Lost> {
        if self.postcopy.begun {
            return self.is_postcopy_recoverable().then_some(Lost::Postcopy);
        }
        if !self.resumable || self.config.handover != Handover::Native {
            return None;
        }
        match self.phase {
            Phase::Syncing
            | Phase::Opening(_)
            | Phase::Sending(_)
            | Phase::Closing(_)
            | Phase::Waiting
            | Phase::Pausing
            | Phase::Holding
            | Phase::LastSync
            | Phase::Draining
            | Phase::SendingState
            | Phase::Digesting
            | Phase::AwaitingReady { .. }
            | Phase::LettingRun => Some(Lost::BeforeCommit),
            Phase::Committing | Phase::AwaitingRunning => Some(Lost::BehindCommit),
            Phase::AskingReceived(lost) | Phase::ComparingReceived(lost) => Some(lost),
            // Nothing is agreed yet, it is a postcopy, or it is over; also where no other connection was made in time. A new
            // phase is to be decided here.
            Phase::New
            | Phase::Starting
            | Phase::Greeting
            | Phase::SettingUp
            | Phase::OpeningUrgent(_)
            | Phase::Discarding
            | Phase::Packaging
            | Phase::Filling
            | Phase::AwaitingTaken
            | Phase::EndingPostcopy
            | Phase::Reconnecting(_)
            | Phase::ResumingPages
            | Phase::AwaitingGuest
            | Phase::Reporting
            | Phase::Listening
            | Phase::Releasing
            | Phase::CheckingMemory
            | Phase::RollingBack(_)
            | Phase::Finished(_) => None,
        }
    }

    /// RUN may have been sent.
    fn is_postcopy_recoverable(&self) -> bool {
        let lives = matches!(
            self.phase,
            Phase::Committing
                | Phase::Filling
                | Phase::AwaitingTaken
                | Phase::EndingPostcopy
                | Phase::AwaitingRunning
        );
        self.postcopy.recoverable && (lives || self.is_recovering())
    }

    /// The connection is lost. False: that is the end.
    pub(super) fn lose_connection(&mut self) -> bool {
        match self.loss() {
            Some(Lost::BeforeCommit) if self.paused => self.go(Phase::LettingRun, SourceAction::ResumeGuest),
            Some(lost) => self.go(Phase::Reconnecting(lost), SourceAction::Reconnect),
            None => return false,
        }
        true
    }

    /// A step of the recovery is done.
    pub(super) fn recovered(&mut self, now: Duration) {
        match self.phase {
            Phase::LettingRun => {
                self.paused = false;
                self.go(Phase::Reconnecting(Lost::BeforeCommit), SourceAction::Reconnect);
            }
            Phase::Reconnecting(lost) => self.go(Phase::AskingReceived(lost), SourceAction::AskReceived),
            Phase::AskingReceived(Lost::Postcopy) => {
                self.open_urgent(UrgentChannel::Early, BehindUrgent::Compare);
            }
            Phase::AskingReceived(lost) => {
                self.go(Phase::ComparingReceived(lost), SourceAction::CompareReceived);
            }
            Phase::ComparingReceived(Lost::Postcopy) => {
                self.postcopy.taken |= self.has_taken_who_compares();
                self.open_urgent(UrgentChannel::Late, BehindUrgent::Resume);
            }
            Phase::ComparingReceived(Lost::BeforeCommit) => {
                self.path.unacknowledged = 0;
                self.go(Phase::Syncing, SourceAction::Sync { last: false });
            }
            Phase::ComparingReceived(Lost::BehindCommit) => self.await_running(now),
            _ => self.send_missing(now),
        }
    }
}
