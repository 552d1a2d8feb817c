//! What a destination is told, what it does, and how it ends.

/// Events for a destination. All but the answers may arrive at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DestinationEvent {
    /// The source sent HELLO.
    Hello {
        /// It will send a digest.
        digest: bool,
        /// It will compare its memory with what it has sent, once the guest runs here, and report the result.
        memory_check: bool,
    },
    /// A QEMU's device state is complete, the byte that commits included.
    Tail,
    /// The package of a switchover to postcopy is here: the source has handed the guest over, pages are missing.
    Package,
    /// A ramwire's RAM and device state are complete.
    StateSent,
    /// The last digest has arrived.
    Digests,
    /// The guest is ours.
    Commit,

    /// Answer: the current action is done.
    Done,
    /// Answer: the source has connected again before the guest ran here.
    Resumed {
        /// It has handed the guest over, and asks whether it runs.
        committed: bool,
    },
    /// Answer: whether the guest runs here is not known. Its start broke off, and it could not be stopped again.
    MayRun,

    /// The source closed its connection before its last byte: it has kept its guest.
    SourceLeft,
    /// The current action failed, or the stream did.
    Failed,
    /// The connection, or after the guest was started among missing pages a page, is lost.
    Lost,
    /// The time of [`wake_at`](super::DestinationEngine::wake_at) is there.
    Woken,
    /// The embedder requests the end.
    Cancel,
}

/// What the session is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DestinationAction {
    /// Read on.
    Receive,
    /// Make our own digest of RAM and state; the source makes its own at the same time.
    MakeDigest,
    /// Compare it with the source's.
    CompareDigest,
    /// Give the device state to the VMM.
    LoadState,
    /// Serve missing pages from here on, and let a thread load the device state and start the guest.
    Listen,
    /// Wait for the source's next connection, and continue with it.
    AwaitRecovery,
    /// All pages are here: wait until that thread has started the guest.
    AwaitGuest,
    /// Tell the source, by READY, that it may send COMMIT.
    SendReady,
    /// Let the guest run.
    Resume,
    /// Report to the source that the guest runs: RUNNING or SHUT(0).
    SendRunning,
    /// The guest runs here. Wait for what the source finds in its memory.
    AwaitMemoryCheck,
    /// Report the failure to the source, as far as that is possible.
    SendFailed,
    /// Nothing more to do.
    Finish(Ending),
}

/// How a migration ended, as the destination knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest runs here.
    Running,
    /// The guest does not run here, and everything that arrived is discarded.
    Discarded,
    /// The guest runs here, but the connection was lost while pages were missing that only the source has.
    Incomplete,
    /// The source handed the guest over, but it could not be started: this is the only copy. RAM is whole and the
    /// device state is loaded, so that the VMM may start the guest itself, at any time; if it can't, an operator
    /// resumes the guest at the source, which keeps it paused. Never both. Where memory was passed the device state may
    /// not be loaded, or in part, and the same memory is the source's guest. From a source without a return path it may
    /// not be loaded either: it was given away whether it could be loaded or not.
    Stranded,
    /// The source has no return path, and may have given the guest away: its last byte may have been under way when this
    /// end failed or was cancelled. What arrived is discarded. The guest runs on at its source, or runs nowhere and is
    /// whole only there: an operator looks, and lets it run there.
    Unanswered,
}
