//! Events that a source receives, actions that it is to perform, and what it waits for.

use std::time::Duration;

use crate::engine::{Handover, Outcome, Sent};
use crate::ram::RoundKind;

/// Events for a source. All but the answers may arrive at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceEvent {
    /// Start.
    Begin,

    /// Answer: the current action is done.
    Done,
    /// Answer: the setup is done; the peer turned out to be of this kind.
    SetUp {
        /// How ownership will pass.
        handover: Handover,
    },
    /// Answer: the dirty logs were merged.
    Synced {
        /// Pages dirty now.
        dirty_pages: u64,
    },
    /// Answer: a slice was sent.
    Sent {
        /// Pages still dirty in the map.
        pages_left: u64,
        /// Bytes and pages that were handed to the connection in this slice.
        sent: Sent,
    },
    /// Answer: a slice of missing pages was sent.
    Filled {
        /// Pages that the peer does not have.
        pages_left: u64,
    },

    /// The current action failed, or the awaited event can't occur.
    Failed,
    /// The connection is lost.
    Lost,
    /// The time of [`wake_at`](super::SourceEngine::wake_at) is there.
    Woken,

    /// The peer reports that it is busy.
    Working,
    /// The peer has everything, and it is equal.
    Ready,
    /// The guest runs at the peer, or in postcopy: the peer has everything.
    Running,
    /// Postcopy: the peer reports that it takes the guest.
    Taken,
    /// Postcopy: a thread at the peer waits for pages.
    Requested,
    /// The peer reports that it failed and that the guest does not run there.
    Refused,

    /// The embedder requests the end.
    Cancel,
    /// The embedder requests the switch to postcopy.
    StartPostcopy,
    /// The embedder continues a migration that waits with its paused guest.
    Continue,
    /// A relay's source has stopped its guest and sent its last page.
    UpstreamStopped,
    /// A relay's source has handed the guest over to us.
    GuestGiven,
}

/// What the session is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceAction {
    /// Start the dirty logs; every page is dirty.
    StartLogs,
    /// Begin the stream, and greet the peer.
    SendHeader,
    /// Find out what the peer is, announce the blocks.
    SendSetup,
    /// Postcopy: make the connection for urgent pages.
    OpenUrgent,
    /// Merge the dirty logs into the map.
    Sync {
        /// The guest is paused: from here on only pages in the map may be dirty.
        last: bool,
    },
    /// Begin a round.
    OpenRound {
        /// Live or final.
        kind: RoundKind,
        /// 1 for the first.
        number: u32,
    },
    /// Send dirty pages until none is left, or until [`wake_at`](super::SourceEngine::wake_at).
    Send,
    /// End the round: nothing later overtakes it.
    CloseRound {
        /// Live or final.
        kind: RoundKind,
    },
    /// Stop the guest.
    PauseGuest,
    /// Wait until no page is lent to kernel or NIC.
    Drain,
    /// Send the device state, all but the byte that commits.
    SendState,
    /// Postcopy: send the peer the pages that it is to discard.
    SendDiscards,
    /// Postcopy: send the package with the device state, all but the command that starts the guest.
    SendPackage,
    /// Postcopy: send missing pages, requested ones first, until [`wake_at`](super::SourceEngine::wake_at).
    SendMissing,
    /// Postcopy: nothing is left; end the stream.
    EndPostcopy,
    /// The connection is lost before COMMIT, and the guest is paused: let it run on here.
    ResumeGuest,
    /// The connection is lost; connect to the peer again.
    Reconnect,
    /// The first bytes on a new connection.
    AskReceived,
    /// On a new connection: find out which pages the peer has; the others are dirty. Behind COMMIT: only that it is the same
    /// peer.
    CompareReceived,
    /// Postcopy, on a new connection: have the peer continue.
    ResumePages,
    /// Make the digest and send it.
    SendDigest,
    /// Give the guest away. From here on it is not ours.
    Commit,
    /// A relay's peer was given the guest and has sent nothing in time: report it to the operator.
    ReportSilence,
    /// A cancel arrived when the guest was already handed over. Reported once; no answer is due.
    RefuseCancel,
    /// Success: logs off, memory may go.
    Release,
    /// The guest runs at the peer, and memory here no longer changes: compare it with what was sent, and report the
    /// result to the peer.
    CheckMemory,
    /// Failure before COMMIT: unsent pages back into the map, logs off, guest runs.
    RollBack,
    /// Nothing more to do.
    Finish(Outcome),
}

/// What the source waits for while it has no action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Waiting {
    /// Bytes in flight to leave, or a relay's source to stop its guest.
    Moment,
    /// The guest is paused: the embedder to continue the migration.
    Embedder,
    /// The peer has everything.
    Ready,
    /// A relay: the guest's own source gives it away.
    Guest,
    /// Postcopy: the peer takes the guest.
    Taken,
    /// The peer's report that the guest runs.
    Running,
    /// A relay in doubt: a late answer of the peer, as long as it is of use.
    LateAnswer,
}

/// What did not come in time, and in which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Overdue {
    /// The switchover.
    Switchover(Duration),
    /// READY, though the peer went on reporting that it is busy.
    Ready(Duration),
    /// READY, and the peer was silent.
    Keepalive(Duration),
    /// That the peer takes the guest.
    Taken(Duration),
    /// RUNNING.
    Running(Duration),
}
