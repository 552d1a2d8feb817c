//! A relay between a guest's source and a far end: when it requests the guest, when it hands the guest over, and what
//! it reports to the source.
//!
//! ```text
//! receiving -> RAM complete -> device state here -> far end ready -> source asked -> guest given to us
//!   -> guarded -> given away -> [in doubt] -> source told
//! ```
//!
//! # Required orders
//!
//! - The relay requests the guest from the source only after the far end is ready to take it over.
//! - The relay hands the guest to the far end only after the source handed it to the relay, and after a guard process
//!   holds the source's connection: a source whose connection closes after its own COMMIT resumes its guest.
//! - The relay reports to the source that the guest runs only after the far end has reported it. It reports a failure
//!   only if the guest was not handed over, or if the far end or the operator has confirmed that it does not run there.
//! - In doubt the relay reports nothing to the source. Only the far end, the operator or the end of the source ends the
//!   doubt.

mod flow;

use std::collections::VecDeque;
use std::time::Duration;

pub use flow::{RelayFlow, Traffic};

/// An event for a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayEvent {
    /// The guest's last page has arrived: the guest is stopped at its source.
    RamComplete,
    /// The device state has arrived.
    StateArrived,
    /// The far end has received everything and is ready to take over the guest.
    FarReady,
    /// The source handed the guest to the relay. `waits`: the source waits for the outcome, and can be sent a report.
    GuestGiven {
        /// See above.
        waits: bool,
    },
    /// A guard process holds the source's connection, even if this process ends.
    Guarded,
    /// It can't be held.
    NotGuarded,
    /// The guest was handed to the far end, which has not answered in time; its connection is still open.
    FarSilent,
    /// The session with the far end has ended.
    FarEnded(FarEnd),
    /// The source's connection has ended, or the relay's session with it.
    SourceGone,
    /// The operator requests the end.
    Cancel,
    /// The operator has confirmed that the guest does not run at the far end.
    NotThere,
    /// The source has received the report, as far as possible.
    Told,
    /// Pages that arrived and that were sent.
    Moved(Traffic),
}

/// How the session with the far end ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FarEnd {
    /// The guest runs there.
    Runs,
    /// The guest does not run there: it was not handed over, or the far end has reported this.
    DoesNotRun,
    /// The connection broke after the guest was handed over.
    Unknown,
}

/// The next action, for the side that waits for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayAction {
    /// To the far end: the last round, since the guest is stopped.
    SendLastRound,
    /// To the far end: the device state.
    SendState,
    /// To the source: request the guest.
    AskForGuest,
    /// Hold the source's connection beyond the end of this process; answer with [`RelayEvent::Guarded`].
    Guard,
    /// To the far end: hand over the guest.
    GiveAway,
    /// Report to the operator that it is unknown where the guest runs.
    ReportDoubt,
    /// To the source: the guest runs.
    TellRunning,
    /// To the source: the migration failed, the guest does not run at the far end.
    TellFailed,
    /// To the source: no report, since there is no source to receive it.
    TellNothing,
    /// To the far end: end, or stop waiting for its answer.
    Abandon,
    /// Everything is done; the guard is no longer needed.
    Finish(RelayEnding),
}

/// How a relay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayEnding {
    /// The guest runs at the far end.
    Running,
    /// The guest does not run at the far end.
    Failed,
    /// The guest was handed over, and no message confirmed that it runs.
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
    /// The source waits for the outcome.
    source_waits: bool,
    far_ended: bool,
    outbox: VecDeque<RelayAction>,
    flow: RelayFlow,
}

impl RelayEngine {
    /// Nothing has arrived. `downtime_limit`: see [`RelayFlow::new`].
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

    /// True from the moment at which the far end may own the guest, until it is known where the guest runs.
    pub fn is_given_away(&self) -> bool {
        matches!(self.phase, Phase::GivenAway | Phase::InDoubt)
    }

    /// True while it is unknown where the guest runs.
    pub fn is_in_doubt(&self) -> bool {
        self.phase == Phase::InDoubt
    }

    /// True while a cancel is in time: the guest was not requested yet. After the request the source may hand it over
    /// at any moment.
    pub fn may_cancel(&self) -> bool {
        matches!(self.phase, Phase::Receiving | Phase::RamComplete | Phase::StateHere)
    }

    /// True after a failure: the guest does not run at the far end, and never will.
    pub fn has_failed(&self) -> bool {
        matches!(self.phase, Phase::Telling(RelayEnding::Failed) | Phase::Ended(RelayEnding::Failed))
    }

    /// How it ended, or how it would end now.
    pub fn ending(&self) -> RelayEnding {
        match self.phase {
            Phase::Telling(ending) | Phase::Ended(ending) => ending,
            Phase::GivenAway | Phase::InDoubt => RelayEnding::InDoubt,
            _ => RelayEnding::Failed,
        }
    }

    /// True while more may be read from the source.
    pub fn may_read(&self) -> bool {
        // Bytes that the source has already sent must be kept, whatever happened at the far end.
        self.far_ended || self.flow.may_read()
    }

    /// The next thing to do.
    pub fn poll(&mut self) -> Option<RelayAction> {
        self.outbox.pop_front()
    }

    /// Takes an event at any time. An event out of turn fails the migration if the guest can stay at the source, and
    /// changes nothing if it was handed over.
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
                    // This source does not evaluate its connection: there is nothing to hold.
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
            // The far end answers, or the doubt is reported; the relay decides neither.
            (Phase::GivenAway | Phase::InDoubt, _) => {}
            (Phase::Telling(ending), E::Told) => self.go(Phase::Ended(ending), RelayAction::Finish(ending)),
            (Phase::Telling(_) | Phase::Ended(_), _) => {}
            // The source may have handed over the guest: only the source decides.
            (Phase::Asked | Phase::Guarding, E::Cancel) => {}
            // The far end can't decide before the guest was handed to it, and only the relay hands it over.
            (_, E::Guarded | E::Told | E::NotThere | E::FarSilent) => {}
            (_, E::FarEnded(_) | E::Cancel | E::SourceGone | E::NotGuarded) => self.fail(),
            (_, E::RamComplete | E::StateArrived | E::FarReady | E::GuestGiven { .. }) => self.fail(),
        }
    }

    /// The guest was not handed over: it stays at the source.
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
