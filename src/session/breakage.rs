//! Orders of the design switched off, so that a test can prove that each is needed.

/// What a session leaves out. Sessions that ship leave out nothing: [`is`](Self::is) is then always false.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
pub(super) enum Breakage {
    /// Nothing.
    #[default]
    None,
    /// Order 1: the bytes are read before the log is armed again.
    ReadBeforeProtect,
    /// Order 2: rounds are not fenced.
    SkipFence,
    /// Order 2: the destination lets page channels pass a barrier that others have not reached.
    SkipBarrier,
    /// Order 3: the migration ends while tickets are out.
    SkipDrain,
    /// Order 4: unsent pages are forgotten after a failure.
    ForgetUnsent,
    /// Order 4: the logs stay on after a failure.
    LeaveLogsOn,
    /// Order 4: throttling stays on after a failure.
    LeaveThrottleOn,
    /// Order 6: a failure before COMMIT leaves the guest paused.
    StayPaused,
    /// Order 6: the source does not wait for READY.
    CommitBeforeReady,
    /// Order 6: the source resumes the guest after COMMIT.
    ResumeAfterCommit,
    /// Order 6: a cancel breaks the wait for RUNNING.
    BreakOffAfterCommit,
    /// Orders 3 and 6: the source reports that it is done, and its memory free for other uses, when it has sent COMMIT.
    CompleteAtCommit,
    /// Order 4: a panic of a callback ends the session.
    DieOfPanic,
    /// Order 6: a guest whose start panicked is assumed to be paused.
    TrustPanickedStart,
    /// Order 6: the destination does not wait for COMMIT.
    ResumeBeforeCommit,
    /// Order 6: a source without a return path is taken for one that keeps its guest until it is answered.
    TrustUnasked,
    /// Order 6: the destination sends READY whatever the digests are.
    SkipComparing,
    /// Order 6: the destination sends READY whatever was sent and not placed.
    SkipCounting,
    /// Order 12: the device state is loaded into memory that was passed before it is handed over.
    LoadBeforeCommit,
    /// Orders 4 and 12: after a failure memory that was passed is taken for the destination's.
    ForgetPassed,
    /// Order 6: the destination sends READY whatever the fingerprints are.
    SkipFingerprints,
    /// Order 2: the destination places an older copy of a page after a newer one.
    PlaceStale,
    /// The destination counts a page that it does not place.
    SkipPage,
    /// A dirty source loses a write.
    LoseDirtyBit,
    /// Order 5: pages that are dirty at a switch to postcopy are not discarded.
    SkipDiscard,
    /// Order 5: the source ends a postcopy while pages are missing.
    EndEarly,
    /// In postcopy the source sends background pages as long as the connection takes them.
    FillUnbounded,
    /// Order 5: the end of a postcopy does not wait for pages on page channels.
    SkipLastBarrier,
    /// Order 5: page channels carry missing pages before the destination serves faults.
    SpreadEarly,
    /// A host page that was sent in part on the main connection continues as urgent.
    SplitHostPage,
    /// The connection for urgent pages of a peer that reads nothing before is made as later peers want it.
    OpenUrgentLate,
    /// After a lost connection there is none for urgent pages.
    SkipUrgentAgain,
    /// A lost connection to a QEMU that has one for urgent pages is replaced without a command.
    ReconnectUntold,
    /// Memory is given back when its pages have been sent.
    ReleaseSent,
    /// Memory is given back before the peer has taken the guest.
    ReleaseUntaken,
    /// The connection for urgent pages ends without its mark.
    SkipUrgentEnd,
    /// Order 5: after a lost connection the source takes the pages it has sent for received.
    SkipBitmaps,
    /// After a lost connection the first page continues in the block of the last.
    KeepCurrentBlock,
    /// Order 6: a destination that compares what it has received counts as one that has taken the guest.
    TakenByBitmap,
    /// The loss of the connection at the end, before the report that all has arrived, ends the migration.
    EndUnheard,
    /// Order 6: the source resumes the guest when the connection is lost after the switch.
    ResumeAfterLoss,
    /// After a lost connection before COMMIT the source takes the pages it has sent for received.
    TrustUnconfirmed,
    /// After a lost connection before COMMIT the source takes a page for received that it has sent in two rounds.
    TrustLastRound,
    /// The destination ends before the source's host has received the report that the guest runs.
    EndUnacknowledged,
    /// The source takes pages for received when their round ends, and not when the destination has confirmed it.
    TrustFence,
    /// The guest stays throttled while there is no connection.
    ThrottleWithoutConnection,
    /// A source that keeps its guest says nothing to a destination that waits for another connection.
    GiveUpSilently,
    /// After a lost connection before COMMIT no fence stands in front of the first page.
    SkipResumeFence,
    /// The destination places a page of the old connection after it has gone on over another.
    PlaceFromOld,
    /// What a fence confirms is not counted, only what was sent since the last connection began.
    CountAtEnd,
    /// Order 14: page channels of the old connection place pages after the destination has gone on over another.
    KeepOldChannels,
    /// After a lost connection the source takes pages for received that a NIC was to write, and has not confirmed.
    TrustPosted,
    /// After a lost connection the source takes pages for received whose writes its NIC has completed.
    TrustCompleted,
    /// Order 8: the destination goes on over another connection while the old one's keys are valid.
    KeepOldKeys,
    /// The destination keeps the device state that came before a lost connection.
    KeepOldState,
    /// The destination starts the guest when the source connects again behind READY.
    StartWhenResumed,
    /// A relay over RDMA looks for the pages of the last round before it.
    ScanBeforeFinish,
    /// Order 7: memory is registered without the guest's promise not to discard it.
    RegisterUnpromised,
    /// The destination takes memory for which no page has arrived for zero, whatever it held before.
    TrustMemory,
    /// Bytes are to be copied, then marked: the destination reports a page before it is there.
    MarkBeforeCopy,
    /// A hint leaves the log of its pages as it is.
    HintUnprotected,
    /// Hints that arrived before a sync have their effect after it.
    HintAcrossSync,
    /// Hints are taken whenever they arrive.
    HintOfAnyEpoch,
    /// Pages that were left out are clean after a failure.
    ForgetSkipped,
    /// Memory that is plugged again is not dirty.
    ForgetPlugged,
    /// The digest covers pages that were left out.
    CompareSkipped,
    /// A relay reports to the source that the guest runs when it hands the guest over.
    TellBeforeFarEnd,
    /// A relay takes a silent far end for one that has failed.
    DoubtIsFailure,
    /// A relay requests the guest before its far end could take it.
    AskBeforeFarEnd,
    /// A relay gives the guest away before it has it.
    GiveBeforeGiven,
    /// A relay takes all that its source has to give.
    ReadWithoutBound,
    /// Nothing holds the source's connection when a relay dies.
    LeaveUnguarded,
    /// A relay reports to the source that the guest was taken when it passes on its start.
    TakenBeforeFarEnd,
    /// A relay gives up its hold of the source's connection before the source knows that the guest was taken.
    UnguardEarly,
    /// A relay reports a failure to the source when a connection is lost after the guest was taken.
    LossIsFailure,
    /// A relay in postcopy sends pages on that its source has discarded, as if they were there.
    ForgetOwed,
    /// A relay in postcopy does not ask its source for what its far end waits for.
    AskNobody,
    /// A relay in postcopy ends when it has sent what is here.
    EndWithoutSource,
    /// A relay gives the guest away although its source has gone.
    GiveToGone,
    /// Nothing holds the source's connection for urgent pages when a relay dies.
    LeaveUrgentUnguarded,
    /// A relay reports a page on the source's connection for urgent pages before it is in place.
    ReportUrgentEarly,
    /// A relay ends the far end's stream with its source's, though urgent pages are under way.
    EndWithMain,
    /// A relay takes pages that are not there at the end of its source's stream for ones that do not come.
    EndBeforeUrgent,
    /// A relay whose source's connection for urgent pages is lost ends without a word though the guest has moved.
    PartWhenMoved,
    /// A page that is requested while it waits to be sent on leaves neither with the others nor as urgent.
    LoseRequested,
}

impl Breakage {
    /// What the simulation of a relay switches off.
    #[cfg(test)]
    pub(super) const OF_RELAYS: [Self; 21] = [
        Self::TellBeforeFarEnd,
        Self::DoubtIsFailure,
        Self::AskBeforeFarEnd,
        Self::GiveBeforeGiven,
        Self::ReadWithoutBound,
        Self::LeaveUnguarded,
        Self::MarkBeforeCopy,
        Self::TakenBeforeFarEnd,
        Self::UnguardEarly,
        Self::LossIsFailure,
        Self::ForgetOwed,
        Self::AskNobody,
        Self::EndWithoutSource,
        Self::GiveToGone,
        Self::TrustUnasked,
        Self::LeaveUrgentUnguarded,
        Self::ReportUrgentEarly,
        Self::EndWithMain,
        Self::EndBeforeUrgent,
        Self::LoseRequested,
        Self::PartWhenMoved,
    ];

    /// What the simulation of lost connections switches off.
    #[cfg(test)]
    pub(super) const OF_LOSSES: [Self; 16] = [
        Self::EndUnacknowledged,
        Self::TrustFence,
        Self::ThrottleWithoutConnection,
        Self::GiveUpSilently,
        Self::TrustUnconfirmed,
        Self::TrustLastRound,
        Self::SkipResumeFence,
        Self::PlaceFromOld,
        Self::KeepOldState,
        Self::StartWhenResumed,
        Self::ResumeAfterLoss,
        Self::KeepOldChannels,
        Self::KeepOldKeys,
        Self::TrustPosted,
        Self::TrustCompleted,
        Self::CountAtEnd,
    ];

    /// All but `None` and what only a relay, or a lost connection, does.
    #[cfg(test)]
    pub(super) const ALL: [Self; 32] = [
        Self::ReadBeforeProtect,
        Self::SkipFence,
        Self::SkipBarrier,
        Self::SkipDrain,
        Self::ForgetUnsent,
        Self::LeaveLogsOn,
        Self::LeaveThrottleOn,
        Self::StayPaused,
        Self::CommitBeforeReady,
        Self::ResumeAfterCommit,
        Self::BreakOffAfterCommit,
        Self::CompleteAtCommit,
        Self::DieOfPanic,
        Self::TrustPanickedStart,
        Self::ResumeBeforeCommit,
        Self::LoadBeforeCommit,
        Self::ForgetPassed,
        Self::SkipComparing,
        Self::SkipCounting,
        Self::SkipFingerprints,
        Self::PlaceStale,
        Self::SkipPage,
        Self::LoseDirtyBit,
        Self::RegisterUnpromised,
        Self::TrustMemory,
        Self::MarkBeforeCopy,
        Self::HintUnprotected,
        Self::HintAcrossSync,
        Self::HintOfAnyEpoch,
        Self::ForgetSkipped,
        Self::ForgetPlugged,
        Self::CompareSkipped,
    ];

    /// True if only a guest that gives hints can find it.
    #[cfg(test)]
    pub(super) fn is_about_hints(self) -> bool {
        matches!(self, Self::HintUnprotected | Self::HintAcrossSync | Self::HintOfAnyEpoch)
    }

    /// True if `order` is switched off; known to be false where this is not a test.
    #[inline]
    pub(super) fn is(self, order: Self) -> bool {
        cfg!(test) && self == order
    }
}
