//! A relay between a guest's source and a far end: whom it asks for the guest, to whom it gives it, and what it tells the
//! source.
//!
//! ```text
//! receiving -> RAM complete -> device state here -> far end ready -> source asked -> guest given to us
//!   -> guarded -> given away -> [in doubt] -> source told
//! ```
//!
//! # Orders that must hold
//!
//! - The source is asked for the guest only after the far end could take it.
//! - The far end is given the guest only after the source gave it to us, and after a guard holds the source's connection:
//!   a source whose connection closes behind its own COMMIT resumes its guest.
//! - The source is told that the guest runs only after the far end has said so. It is told that the migration failed only
//!   if the guest was not given away, the far end has said that it does not run there, or the operator has.
//! - In doubt the source is told nothing. Only the far end, the operator or the end of the source ends the doubt.

mod flow;

use std::collections::VecDeque;
use std::time::Duration;

pub use flow::{RelayFlow, Traffic};

/// What a relay is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayEvent {
    /// The guest's last page has come: it stands still at its source.
    RamComplete,
    /// The device state has come.
    StateArrived,
    /// The far end has everything and could take the guest.
    FarReady,
    /// The source gave the guest to us. `waits`: it waits for what becomes of it, and can be told.
    GuestGiven {
        /// See above.
        waits: bool,
    },
    /// The source's connection is held, whatever becomes of this process.
    Guarded,
    /// It can't be held.
    NotGuarded,
    /// The far end was given the guest and has said nothing in time; its connection stands.
    FarSilent,
    /// The side towards the far end has ended.
    FarEnded(FarEnd),
    /// The source's connection has ended, or the side towards it has.
    SourceGone,
    /// The operator asks for the end.
    Cancel,
    /// The operator has seen that the guest does not run at the far end.
    NotThere,
    /// The source has been told, as far as it could be.
    Told,
    /// What has come and what has left.
    Moved(Traffic),
}

/// What the side towards the far end ended as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FarEnd {
    /// The guest runs there.
    Runs,
    /// It does not: it was not given away, or the far end has said so.
    DoesNotRun,
    /// The connection broke after the guest was given away.
    Unknown,
}

/// What is to be done next, by the side that waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayAction {
    /// Towards the far end: the last round, since the guest stands still.
    SendLastRound,
    /// Towards the far end: the device state.
    SendState,
    /// Towards the source: the guest may come.
    AskForGuest,
    /// Hold the source's connection beyond the end of this process; answer with [`RelayEvent::Guarded`].
    Guard,
    /// Towards the far end: the guest is theirs.
    GiveAway,
    /// Tell the operator that nobody knows where the guest runs.
    ReportDoubt,
    /// Towards the source: the guest runs.
    TellRunning,
    /// Towards the source: the migration failed, the guest does not run at the far end.
    TellFailed,
    /// Towards the source: nothing, and nobody is there to be told.
    TellNothing,
    /// Towards the far end: end, or stop waiting for its answer.
    Abandon,
    /// Nothing more to do; the guard is not needed any more.
    Finish(RelayEnding),
}

/// How a relay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayEnding {
    /// The guest runs at the far end.
    Running,
    /// The guest does not run at the far end.
    Failed,
    /// The guest was given away and nobody has said that it runs.
    InDoubt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Receiving,
    RamComplete,
    StateHere,
    Asked,
    Guarding,
    GivenAway,
    InDoubt,
    Telling(RelayEnding),
    Ended(RelayEnding),
}

/// A relay's state machine.
#[derive(Debug)]
pub struct RelayEngine {
    phase: Phase,
    /// The source waits for what becomes of the guest.
    source_waits: bool,
    far_ended: bool,
    outbox: VecDeque<RelayAction>,
    flow: RelayFlow,
}

impl RelayEngine {
    /// Nothing has come. `downtime_limit`: see [`RelayFlow::new`].
    pub fn new(downtime_limit: Duration) -> Self {
        Self {
            phase: Phase::Receiving,
            source_waits: false,
            far_ended: false,
            outbox: VecDeque::new(),
            flow: RelayFlow::new(downtime_limit),
        }
    }

    /// See [`RelayFlow::new`]; before the first page.
    pub fn set_downtime_limit(&mut self, limit: Duration) {
        self.flow = RelayFlow::new(limit);
    }

    /// True from the moment at which the far end may have the guest, until it is known where the guest is.
    pub fn is_given_away(&self) -> bool {
        matches!(self.phase, Phase::GivenAway | Phase::InDoubt)
    }

    /// True while nobody knows where the guest runs.
    pub fn is_in_doubt(&self) -> bool {
        self.phase == Phase::InDoubt
    }

    /// True while a cancel is in time: the source was not asked for the guest yet, which it may give at any moment then.
    pub fn may_cancel(&self) -> bool {
        matches!(self.phase, Phase::Receiving | Phase::RamComplete | Phase::StateHere)
    }

    /// True if it has failed: the guest does not run at the far end, and never will.
    pub fn has_failed(&self) -> bool {
        matches!(self.phase, Phase::Telling(RelayEnding::Failed) | Phase::Ended(RelayEnding::Failed))
    }

    /// How it ended, or what is true until it has.
    pub fn ending(&self) -> RelayEnding {
        match self.phase {
            Phase::Telling(ending) | Phase::Ended(ending) => ending,
            Phase::GivenAway | Phase::InDoubt => RelayEnding::InDoubt,
            _ => RelayEnding::Failed,
        }
    }

    /// True while more may be read from the source.
    pub fn may_read(&self) -> bool {
        // What has left the source's hands is to be kept, whatever became of the far end.
        self.far_ended || self.flow.may_read()
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<RelayAction> {
        self.outbox.pop_front()
    }

    /// Takes an event at any time. What is out of turn fails the migration where the guest can stay, and changes nothing
    /// where it was given away.
    pub fn handle(&mut self, now: Duration, event: RelayEvent) {
        use RelayEvent as E;
        self.far_ended |= matches!(event, E::FarEnded(_));
        match (self.phase, event) {
            (_, E::Moved(traffic)) => self.flow.moved(now, traffic),
            (Phase::Receiving, E::RamComplete) => self.go(Phase::RamComplete, RelayAction::SendLastRound),
            (Phase::RamComplete, E::StateArrived) => self.go(Phase::StateHere, RelayAction::SendState),
            (Phase::StateHere, E::FarReady) => self.go(Phase::Asked, RelayAction::AskForGuest),
            (Phase::Asked, E::GuestGiven { waits }) => {
                self.source_waits = waits;
                match waits {
                    true => self.go(Phase::Guarding, RelayAction::Guard),
                    // Its connection tells it nothing: there is nothing to hold.
                    false => self.go(Phase::GivenAway, RelayAction::GiveAway),
                }
            }
            (Phase::Guarding, E::Guarded) => self.go(Phase::GivenAway, RelayAction::GiveAway),
            (Phase::GivenAway | Phase::InDoubt, E::FarEnded(FarEnd::Runs)) => self.tell(RelayEnding::Running),
            (Phase::GivenAway | Phase::InDoubt, E::FarEnded(FarEnd::DoesNotRun)) => {
                self.tell(RelayEnding::Failed);
            }
            (Phase::GivenAway, E::FarEnded(FarEnd::Unknown)) if !self.source_waits => {
                self.tell(RelayEnding::InDoubt);
            }
            (Phase::GivenAway, E::FarSilent | E::FarEnded(FarEnd::Unknown)) => {
                self.go(Phase::InDoubt, RelayAction::ReportDoubt);
            }
            (Phase::InDoubt, E::NotThere) => {
                self.outbox.push_back(RelayAction::Abandon);
                self.tell(RelayEnding::Failed);
            }
            (Phase::InDoubt, E::SourceGone) => {
                self.outbox.push_back(RelayAction::Abandon);
                self.tell(RelayEnding::InDoubt);
            }
            // The far end answers, or the doubt is told; neither is for us to decide.
            (Phase::GivenAway | Phase::InDoubt, _) => {}
            (Phase::Telling(ending), E::Told) => self.go(Phase::Ended(ending), RelayAction::Finish(ending)),
            (Phase::Telling(_) | Phase::Ended(_), _) => {}
            // The source may have given the guest away: it alone decides.
            (Phase::Asked | Phase::Guarding, E::Cancel) => {}
            // The far end can't decide before it was given the guest, and nobody else gives it away.
            (_, E::Guarded | E::Told | E::NotThere | E::FarSilent) => {}
            (_, E::FarEnded(_) | E::Cancel | E::SourceGone | E::NotGuarded) => self.fail(),
            (_, E::RamComplete | E::StateArrived | E::FarReady | E::GuestGiven { .. }) => self.fail(),
        }
    }

    /// The guest was not given away: it stays.
    fn fail(&mut self) {
        self.outbox.push_back(RelayAction::Abandon);
        self.tell(RelayEnding::Failed);
    }

    fn tell(&mut self, ending: RelayEnding) {
        self.go(
            Phase::Telling(ending),
            match ending {
                RelayEnding::Running => RelayAction::TellRunning,
                RelayEnding::Failed => RelayAction::TellFailed,
                RelayEnding::InDoubt => RelayAction::TellNothing,
            },
        );
    }

    fn go(&mut self, phase: Phase, action: RelayAction) {
        self.phase = phase;
        self.outbox.push_back(action);
    }
}
