//! Checkpoints: a source sends its guest's state again and again while the guest runs, and a standby holds the last whole
//! one, from which the guest starts if the source dies.
//!
//! # Orders that hold
//!
//! A checkpoint is of one moment: its last pages and its device state are read while the guest is paused. The standby
//! keeps what arrives apart from the guest's memory, and applies a checkpoint when it has all of it: whole or not at all.
//! The source calls a checkpoint safe when the standby has confirmed it: from then on what the guest has sent to the
//! network before that moment may leave. The guest starts at the standby only when the embedder says that the source is
//! dead, and a source that learns of that does not let its guest run any more: it is told before the guest starts, whatever
//! was arriving. The embedder's first command counts. Memory that a checkpoint was applied to in part starts no guest.
//!
//! With a lease ([`lease`]) nobody needs to say that the source is dead: from the first checkpoint that the standby can have
//! on, the source's guest runs, and what it has sent is let out, only while a lease holds, and the standby starts it only
//! when the lease must have run out. A source that does not know whether its standby starts the guest leaves it paused.
//! Only a standby's word that it starts none, or the answer to the end of the protection, lets it run on without.
//!
//! The source's guest is paused for a limited time: a standby that takes too long ends the protection. In the end the
//! dirty logs are off, and whoever ended it has a reason.

mod lease;
mod source;
mod standby;

pub use lease::LeaseConfig;
pub use source::{
    CheckpointAction, CheckpointCause, CheckpointConfig, CheckpointEngine, CheckpointEvent, CheckpointOutcome,
};
pub use standby::{StandbyAction, StandbyDoubt, StandbyEnding, StandbyEngine, StandbyEvent};

/// Orders switched off, so that the simulation can prove that each is needed.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum CheckpointBreakage {
    /// Nothing.
    #[default]
    None,
    /// The guest runs on before its last pages were sent.
    ResumeFirst,
    /// The guest runs on before its device state was saved.
    SaveRunning,
    /// A checkpoint is called safe when it was sent.
    SafeUnconfirmed,
    /// A source whose guest was taken lets it run.
    ResumeTaken,
    /// After a failure the guest stays paused.
    StayPaused,
    /// The standby confirms a checkpoint that has begun to arrive, and the source believes it.
    ConfirmEarly,
    /// The standby starts in the middle of applying a checkpoint.
    ActivateHalfApplied,
    /// The standby starts as soon as the connection is lost.
    ActivateOnLoss,
    /// The standby starts although the source has ended the protection.
    ActivateReleased,
    /// A page that arrives goes straight to the guest's memory.
    PlaceEarly,
    /// The device state that arrives replaces the one before at once.
    StateEarly,
    /// A checkpoint is called whole before its device state has come.
    WholeWithoutState,
    /// The dirty logs stay on.
    LeaveLogsOn,
    /// A standby that takes nothing is waited for, with the guest paused.
    WaitPaused,
    /// A confirmation that does not come is waited for.
    WaitUnconfirmed,
    /// A guest that is to start at the standby is given up by a later command.
    DiscardActivated,
    /// The guest starts at the standby and the source is not told.
    StartUntold,
    /// The guest starts at the standby before the first checkpoint.
    StartFromNothing,
    /// The guest starts in memory that a checkpoint was applied to in part.
    StartTorn,
    /// The guest starts without the device state, which could not be loaded.
    StartUnloaded,
    /// A lease counts from when it was granted.
    LeaseFromReceipt,
    /// The guest is not paused when the lease runs out.
    RunPastLease,
    /// The guest runs on after a checkpoint although the lease has run out.
    ResumePastLease,
    /// What the guest has sent is let out after the lease has run out.
    OutputPastLease,
    /// A source that has a lease lets its guest run when the connection is lost.
    LostRunsOn,
    /// The guest runs without a lease as soon as the standby was sent the end.
    FreeUnanswered,
    /// A guest stays paused although its standby has said that it starts none.
    StayFenced,
    /// The standby waits for half of the lease.
    WaitLess,
    /// The standby waits as long as the lease by its own clock, which may be faster.
    WaitWithoutMargin,
    /// The standby grants further leases, and counts from the first.
    GrantUncounted,
    /// The standby says that it starts no guest, and starts one.
    StartDiscarded,
    /// The vCPUs of a stopped process enter the guest without a look at the lease.
    VcpusUnchecked,
    /// A stopped process lets out without a look at the lease.
    OutputUnchecked,
}
