//! The phases of a migration at its source.

use std::time::Duration;

use crate::engine::{Outcome, Reason, Sent};
use crate::ram::RoundKind;

/// State of a migration: an action of the session that is to be answered, or a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    New,
    Starting,
    Greeting,
    SettingUp,
    /// The connection for urgent pages.
    OpeningUrgent(BehindUrgent),
    Syncing,
    Opening(RoundKind),
    Sending(RoundKind),
    Closing(RoundKind),
    Waiting,
    Pausing,
    Holding,
    LastSync,
    Draining,
    SendingState,
    Digesting,
    Discarding,
    Packaging,
    Filling,
    AwaitingTaken,
    EndingPostcopy,
    /// The connection was lost while the guest was paused: it runs on here.
    LettingRun,
    Reconnecting(Lost),
    AskingReceived(Lost),
    ComparingReceived(Lost),
    ResumingPages,
    AwaitingReady {
        /// Whatever the peer sends meanwhile.
        by: Duration,
    },
    AwaitingGuest,
    Committing,
    AwaitingRunning,
    Reporting,
    Listening,
    Releasing,
    CheckingMemory,
    RollingBack(Reason),
    Finished(Outcome),
}

/// When the connection was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// The guest is here.
    BeforeCommit,
    /// COMMIT was sent, and the guest's start has not been reported.
    BehindCommit,
    /// The guest runs at the peer, or may, and pages are missing there.
    Postcopy,
}

/// What follows the connection for urgent pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BehindUrgent {
    SetUp,
    Pause,
    Compare,
    Resume,
}

impl Phase {
    /// COMMIT may have left.
    pub(super) fn is_committed(self) -> bool {
        matches!(
            self,
            Self::Committing
                | Self::Filling
                | Self::AwaitingTaken
                | Self::EndingPostcopy
                | Self::Reconnecting(Lost::BehindCommit | Lost::Postcopy)
                | Self::AskingReceived(Lost::BehindCommit | Lost::Postcopy)
                | Self::OpeningUrgent(BehindUrgent::Compare | BehindUrgent::Resume)
                | Self::ComparingReceived(Lost::BehindCommit | Lost::Postcopy)
                | Self::ResumingPages
                | Self::AwaitingRunning
                | Self::Reporting
                | Self::Listening
                | Self::Releasing
                | Self::CheckingMemory
                | Self::Finished(Outcome::Completed | Outcome::InDoubt | Outcome::Incomplete)
        )
    }

    /// In the round that is sent while the guest is paused.
    pub(super) fn is_last_round(self) -> bool {
        use RoundKind::Final;
        matches!(self, Self::Opening(Final) | Self::Sending(Final) | Self::Closing(Final))
    }
}

/// State of a cancel that came too late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LateCancel {
    None,
    /// To be refused.
    Due,
    Refused,
}

/// A round.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Round {
    /// 0 before the first.
    pub(super) number: u32,
    pub(super) began: Duration,
    /// Pages that it began with, and bytes that left in it.
    pub(super) pages: u64,
    pub(super) bytes: u64,
    /// Bytes and pages sent after its last slice.
    pub(super) at_fence: Sent,
}
