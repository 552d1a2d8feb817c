//! What a source is told, and what it is to do.

use std::time::Duration;

use crate::engine::{Handover, Outcome, Sent};
use crate::ram::RoundKind;

/// A fact told to the engine: the answer to its last [`Action`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Start.
    Begin,
    /// The action is done.
    Done,
    /// The setup is done; the peer turned out to be of this kind.
    SetUp {
        /// How ownership will pass.
        handover: Handover,
    },
    /// The dirty logs were merged.
    Synced {
        /// Pages dirty now.
        dirty_pages: u64,
    },
    /// A slice was sent.
    Sent {
        /// Pages still dirty in the map.
        pages_left: u64,
        /// What was handed to the connection in this slice.
        sent: Sent,
    },
    /// A slice of missing pages was sent.
    Filled {
        /// Pages that the peer does not have.
        pages_left: u64,
        /// The peer has said that it takes the guest.
        taken: bool,
    },
    /// A wait ended.
    Woken {
        /// A relay's source has stopped its guest and sent its last page.
        upstream_stopped: bool,
    },
    /// The peer has everything, and it is equal.
    Ready,
    /// The guest runs at the peer; in postcopy: the peer takes it, or has everything.
    Running,
    /// The action failed, or the peer did.
    Failed,
    /// The peer says that it failed and that the guest does not run there.
    Refused,
}

/// What the session is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start the dirty logs; every page is dirty.
    StartLogs,
    /// Greet the peer, announce the blocks.
    SendSetup,
    /// Merge the dirty logs into the map.
    Sync {
        /// The guest is paused: nothing may be dirty after this but what the map says.
        last: bool,
    },
    /// Begin a round.
    OpenRound {
        /// Live or final.
        kind: RoundKind,
        /// 1 for the first.
        number: u32,
    },
    /// Send dirty pages until none is left or the time is there.
    Send {
        /// By the engine's clock.
        until: Duration,
    },
    /// End the round: nothing later overtakes it.
    CloseRound {
        /// Live or final.
        kind: RoundKind,
    },
    /// Nothing to send: wait for the guest's source, or for what is under way to leave.
    Wait {
        /// By the engine's clock.
        until: Duration,
    },
    /// Stop the guest.
    PauseGuest,
    /// The guest stands still: wait until the embedder lets the migration go on.
    Hold,
    /// Wait until no page is lent to kernel or NIC.
    Drain,
    /// Send the device state, all but the byte that commits.
    SendState,
    /// Postcopy: tell the peer which pages it is to forget.
    SendDiscards,
    /// Postcopy: send the package with the device state, all but the command that starts the guest.
    SendPackage,
    /// Postcopy: send missing pages, those first that somebody waits for.
    SendMissing {
        /// By the engine's clock.
        until: Duration,
    },
    /// Postcopy: all pages were sent; wait until the peer says that it takes the guest.
    AwaitTaken,
    /// Postcopy: nothing is left; end the stream.
    EndPostcopy,
    /// Make the digest and send it.
    SendDigest,
    /// Wait for the peer's READY.
    AwaitReady,
    /// A relay: the peer could take the guest; wait until the guest's own source gives it away.
    AwaitGuest,
    /// Give the guest away. From here on it is not ours.
    Commit,
    /// Wait for the peer's RUNNING.
    AwaitRunning,
    /// Success: logs off, memory may go.
    Release,
    /// Failure before COMMIT: unsent pages back into the map, logs off, guest runs.
    RollBack,
    /// Nothing more to do.
    Finish(Outcome),
}
