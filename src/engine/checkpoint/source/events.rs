//! Actions that the engine of a source requests, and events that it receives.

use std::time::Duration;

use super::super::lease::LeaseConfig;

/// When checkpoints are taken.
#[derive(Clone, Copy, Debug)]
pub struct CheckpointConfig {
    /// From the end of one pause to the beginning of the next. `None`: only when the embedder demands it.
    pub interval: Option<Duration>,
    /// Of the first checkpoint, which holds all memory: most rounds while the guest runs.
    pub live_rounds: u32,
    /// Of the first checkpoint: few enough dirty pages to pause the guest for.
    pub live_pages: u64,
    /// Longest time in which the guest is paused for a checkpoint, and longest wait for the standby to confirm one that was
    /// sent.
    pub confirm_timeout: Duration,
    /// The guest runs only while the standby has granted a lease.
    pub lease: Option<LeaseConfig>,
}

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointEvent {
    /// It begins.
    Begin,
    /// The action was performed.
    Done,
    /// [`CheckpointAction::Sync`] was performed, and so many pages are dirty.
    Synced {
        /// Dirty pages of all blocks.
        dirty_pages: u64,
    },
    /// The action was not performed: by the clock the lease has run out since it was requested.
    TooLate,
    /// The action could not be performed.
    Failed,
    /// The connection is lost.
    Lost,
    /// The standby has all of this checkpoint.
    Confirmed(u64),
    /// The standby has granted the lease with this number.
    Granted(u64),
    /// The standby starts the guest from its last checkpoint.
    Taken,
    /// The standby has no guest any more, and starts none.
    Discarded,
    /// The standby knows that the protection ends.
    Released,
    /// The embedder wants a checkpoint now.
    Demand,
    /// The embedder ends the protection.
    Stop,
    /// It is the time of [`CheckpointEngine::wake_at`](super::CheckpointEngine::wake_at), or later.
    Time,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointAction {
    /// Start the dirty logs; all pages are dirty.
    StartLogs,
    /// Tell the standby what guest this is, and wait until it has memory for it.
    Greet,
    /// Begin checkpoint number n.
    Open(u64),
    /// Read the dirty logs.
    Sync,
    /// Send all dirty pages.
    Send,
    /// Pause the guest.
    Pause,
    /// Save and send the device state. What the guest sent to the network until here belongs to this checkpoint.
    SaveState(u64),
    /// Say that this is all of checkpoint n.
    Close(u64),
    /// Let the guest run, unless the lease has run out.
    Resume,
    /// Pause the guest: the lease runs out, or it may not run any more.
    Fence,
    /// Let the guest run, unless the lease has run out again.
    Unfence,
    /// Tell the embedder that checkpoint n is safe, unless the lease has run out.
    ReportSafe(u64),
    /// Tell the standby that the protection ends.
    Release,
    /// Stop the dirty logs.
    StopLogs,
    /// It is over.
    Finish(CheckpointOutcome),
}

/// How protection ended at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointOutcome {
    /// The embedder has ended it, and the standby knows. The guest runs.
    Stopped,
    /// Something failed, or the connection was lost. The guest runs, and nothing protects it.
    Unprotected,
    /// The guest was started at the standby. It is paused here, and must not run again.
    Taken,
    /// The guest is paused here, whole, and may have been started at the standby, which could not be asked: by a lease. It
    /// must not run again before it is known that it does not run there and never will.
    Fenced,
}

/// Why protection ended, where no action has failed and no connection was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointCause {
    /// The guest was paused for longer than it may be: the standby took too long to take checkpoint n.
    PausedTooLong(u64),
    /// The standby has not confirmed checkpoint n in time.
    Unconfirmed(u64),
    /// The standby has confirmed checkpoint n, which it can't have.
    NeverSent(u64),
    /// The standby has not granted a lease in time: the guest was paused for as long as it may be, or the standby took
    /// nothing until the guest was to be paused.
    NoLease,
    /// The standby has granted a lease that it was not asked for.
    NeverAsked(u64),
    /// The standby says that it has no guest any more.
    Discarded,
    /// The standby has not answered the end of the protection in time.
    Unreleased,
    /// The standby has answered the end of the protection, which it was not told.
    NeverReleased,
}
