//! A relay between a guest's source and a far end: when it requests the guest, when it hands the guest over, and what
//! it reports to the source.
//!
//! ```text
//! receiving -> RAM complete -> device state here -> far end ready -> source asked -> guest given to us
//!   -> guarded -> given away -> [in doubt] -> source told
//! postcopy:
//! receiving -> package here -> far end has discarded and has the package, but RUN -> guarded -> given away (RUN)
//!   -> [in doubt] -> far end has taken the guest -> source knows -> pages and requests -> source told
//! ```
//!
//! # Required orders
//!
//! - The relay requests the guest from the source only after the far end is ready to take it over.
//! - The relay hands the guest to the far end only after the source handed it to the relay, and after a guard process
//!   holds the source's connection: a source whose connection closes after its own COMMIT resumes its guest. So it looks
//!   at that connection last: the guest of a source that has gone is not given away.
//! - The relay reports to the source that the guest runs only after the far end has reported it. It reports a failure
//!   only if the guest was not handed over, or if the far end or the operator has confirmed that it does not run there.
//! - In doubt the relay reports nothing to the source. Only the far end, the operator or the end of the source ends the
//!   doubt.
//! - Postcopy: the source's package hands the guest over, RUN to the far end hands it on. The relay answers the source
//!   that the guest was taken only after the far end has. From then on the guest runs there, and no loss gives it back:
//!   both connections end without a report, and each end keeps what it has. The guard holds the source's connection
//!   until the source has that answer, since before that some QEMUs resume their guest when the connection closes: if
//!   such a source is lost before it has the answer, the relay is in doubt.

mod flow;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

pub use flow::{RelayFlow, Traffic};

/// An event for a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelayEvent {
    /// The source has no return path: it gives its guest away with its last byte, unasked. Before the first page.
    GivesUnasked,
    /// Such a source has closed its connection before its last byte: it has kept its guest.
    SourceKept,
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
    /// A guard process holds the source's connection, even if this process ends, and the source has not closed it.
    Guarded,
    /// It can't be held.
    NotGuarded,
    /// The guest was handed to the far end, which has not answered in time; its connection is still open.
    FarSilent,
    /// The source has switched to postcopy: its package is here, with which it has handed the guest to the relay.
    Switched {
        /// It takes its guest back if its connection closes before it knows that the guest was taken (QEMU from 10.2
        /// on), or waits for that. Otherwise it pauses, as later, and can go on with the far end.
        waits: bool,
    },
    /// Postcopy: the far end reports that it takes the guest.
    FarTook,
    /// Postcopy: the source's host has the report that the guest was taken.
    SourceKnows,
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
    /// To the far end, postcopy: what it is to discard, and the package, but for RUN.
    SendSwitch,
    /// To the source: request the guest.
    AskForGuest,
    /// Hold the source's connection beyond the end of this process; answer with [`RelayEvent::Guarded`], or with
    /// [`RelayEvent::SourceGone`] if the source has closed it.
    Guard,
    /// To the far end: hand over the guest.
    GiveAway,
    /// To the source, postcopy: the guest was taken. Answered by [`RelayEvent::SourceKnows`].
    TellTaken,
    /// Postcopy: the source's connection may end with this process again.
    Unguard,
    /// Report to the operator that it is unknown where the guest runs.
    ReportDoubt,
    /// To the source: the guest runs.
    TellRunning,
    /// To the source: the migration failed, the guest does not run at the far end.
    TellFailed,
    /// To the source: no report, since there is no source to receive it.
    TellNothing,
    /// To the source, postcopy: end the connection without a report. The guest runs at the far end, and each end keeps
    /// what it has for the other.
    Part,
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
    /// Postcopy: the far end was given the guest and has taken it, or the source takes it back in no case; and a
    /// connection was lost while pages were missing there. Each end keeps what it has.
    Incomplete,
    /// The guest does not run at the far end. Its source has no return path and may have given it away, or has: it runs
    /// there, or nowhere.
    Unanswered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Receiving,
    RamComplete,
    StateHere,
    /// Postcopy: the package is here.
    Switching,
    Asked,
    Guarding,
    GivenAway,
    InDoubt,
    /// Postcopy: the far end has taken the guest, and the source may not know.
    Taken,
    /// Postcopy: the far end has taken the guest and its connection has ended, and the source may not know. In doubt.
    Untold,
    /// Postcopy: pages are missing at the far end.
    Serving,
    /// The source is told the ending.
    Reporting(RelayEnding),
    /// Neither holds [`RelayEnding::Unanswered`]: what the source may do unasked is known apart.
    Ended(RelayEnding),
}

/// A relay's state machine.
#[derive(Debug)]
pub struct RelayEngine {
    phase: Phase,
    /// The source waits for the outcome.
    source_waits: bool,
    /// The source may have given its guest away without a question.
    unasked: bool,
    far_ended: bool,
    /// The source has switched to postcopy.
    switched: bool,
    outbox: VecDeque<RelayAction>,
    flow: RelayFlow,
}

impl RelayEngine {
    /// Nothing has arrived. `downtime_limit`: see [`RelayFlow::new`].
    pub fn new(downtime_limit: Duration) -> Self {
        Self {
            phase: Phase::Receiving,
            source_waits: false,
            unasked: false,
            far_ended: false,
            switched: false,
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
        matches!(self.phase, Phase::GivenAway | Phase::InDoubt | Phase::Untold)
    }

    /// True while it is unknown where the guest runs.
    pub fn is_in_doubt(&self) -> bool {
        matches!(self.phase, Phase::InDoubt | Phase::Untold)
    }

    /// True while a cancel is in time: the guest was not requested yet. After the request the source may hand it over
    /// at any moment.
    pub fn may_cancel(&self) -> bool {
        matches!(self.phase, Phase::Receiving | Phase::RamComplete | Phase::StateHere)
    }

    /// True after a failure: the guest does not run at the far end, and never will.
    pub fn has_failed(&self) -> bool {
        use RelayEnding::Failed;
        matches!(self.phase, Phase::Reporting(Failed) | Phase::Ended(Failed))
    }

    /// True if the source waits for the outcome, and can be sent a report. Known once the guest was given to us.
    pub fn source_waits(&self) -> bool {
        self.source_waits
    }

    /// How it ended, or how it would end now.
    pub fn ending(&self) -> RelayEnding {
        let ending = match self.phase {
            Phase::Reporting(ending) | Phase::Ended(ending) => ending,
            Phase::GivenAway | Phase::InDoubt | Phase::Untold => RelayEnding::InDoubt,
            Phase::Taken | Phase::Serving => RelayEnding::Incomplete,
            _ => RelayEnding::Failed,
        };
        match ending {
            RelayEnding::Failed if self.unasked => RelayEnding::Unanswered,
            ending => ending,
        }
    }

    /// True once the source has switched to postcopy.
    pub fn has_switched(&self) -> bool {
        self.switched
    }

    /// True while the source may have sent everything, and waits for the answer that its guest was taken: its silence
    /// is none then.
    pub fn source_may_be_silent(&self) -> bool {
        self.source_waits
            && matches!(self.phase, Phase::GivenAway | Phase::InDoubt | Phase::Taken | Phase::Untold)
    }

    /// True while more may be read from the source.
    pub fn may_read(&self) -> bool {
        // Bytes that the source has already sent must be kept, whatever happened at the far end. In postcopy a page
        // that the far end waits for may be behind any others, and leaves before them.
        self.far_ended || self.switched || self.flow.may_read()
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
        if let E::Switched { waits } = event {
            // Also if it has failed meanwhile: what is here is older than what the source keeps.
            (self.switched, self.source_waits) = (true, waits);
        }
        match (self.phase, event) {
            (_, E::Moved(traffic)) => self.flow.moved(now, traffic),
            // It may come behind a cancel, whose ending it changes.
            (_, E::GivesUnasked) => self.unasked = true,
            (_, E::SourceKept) => self.unasked = false,
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
            (Phase::Receiving, E::Switched { .. }) => self.go(Phase::Switching, RelayAction::SendSwitch),
            (Phase::Switching, E::FarReady) if self.source_waits => {
                self.go(Phase::Guarding, RelayAction::Guard);
            }
            (Phase::Switching, E::FarReady) => self.go(Phase::GivenAway, RelayAction::GiveAway),
            (Phase::Guarding, E::Guarded) => self.go(Phase::GivenAway, RelayAction::GiveAway),
            (Phase::GivenAway | Phase::InDoubt, E::FarTook) if self.switched => {
                self.go(Phase::Taken, RelayAction::TellTaken);
            }
            (Phase::Taken, E::SourceKnows) => self.go(Phase::Serving, RelayAction::Unguard),
            (Phase::Taken | Phase::Serving, E::FarEnded(FarEnd::Runs)) => self.tell(RelayEnding::Running),
            // No source takes the guest back.
            (Phase::GivenAway, E::FarEnded(FarEnd::Unknown) | E::SourceGone)
                if self.switched && !self.source_waits =>
            {
                self.part();
            }
            (Phase::Taken, E::FarEnded(_) | E::SourceGone) if !self.source_waits => self.part(),
            // It takes its guest back unless it had the answer, and the far end may run it.
            (Phase::GivenAway, E::SourceGone) if self.switched => self.give_up(),
            (Phase::Taken | Phase::Untold, E::SourceGone) => self.give_up(),
            // Its connection must not close before it knows.
            (Phase::Taken, E::FarEnded(_)) => self.go(Phase::Untold, RelayAction::ReportDoubt),
            (Phase::Untold, E::SourceKnows) => self.part(),
            (Phase::Serving, E::FarEnded(_) | E::FarSilent | E::SourceGone) => self.part(),
            (Phase::Taken | Phase::Serving, _) => {}
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
            (Phase::InDoubt | Phase::Untold, E::NotThere) => {
                self.outbox.push_back(RelayAction::Abandon);
                self.tell(RelayEnding::Failed);
            }
            (Phase::InDoubt, E::SourceGone) => self.give_up(),
            // The far end answers, or the doubt is reported; the relay decides neither.
            (Phase::GivenAway | Phase::InDoubt | Phase::Untold, _) => {}
            (Phase::Reporting(ending), E::Told) => {
                let known = self.ending();
                self.go(Phase::Ended(ending), RelayAction::Finish(known));
            }
            (Phase::Reporting(_) | Phase::Ended(_), _) => {}
            // The source may have handed over the guest: only the source decides.
            (Phase::Asked | Phase::Guarding | Phase::Switching, E::Cancel) => {}
            // The far end can't decide before the guest was handed to it, and only the relay hands it over.
            (_, E::Guarded | E::Told | E::NotThere | E::FarSilent | E::FarTook | E::SourceKnows) => {}
            (_, E::FarEnded(_) | E::Cancel | E::SourceGone | E::NotGuarded) => self.fail(),
            (
                _,
                E::RamComplete | E::StateArrived | E::FarReady | E::GuestGiven { .. } | E::Switched { .. },
            ) => {
                self.fail();
            }
        }
    }

    /// The guest was not handed over: it stays at the source.
    fn fail(&mut self) {
        self.outbox.push_back(RelayAction::Abandon);
        self.tell(RelayEnding::Failed);
    }

    /// The guest runs at the far end among missing pages, and stays there.
    fn part(&mut self) {
        self.outbox.push_back(RelayAction::Abandon);
        self.tell(RelayEnding::Incomplete);
    }

    /// The source is lost while the far end may have the guest: nobody can be told anything.
    fn give_up(&mut self) {
        self.outbox.push_back(RelayAction::Abandon);
        self.tell(RelayEnding::InDoubt);
    }

    fn tell(&mut self, ending: RelayEnding) {
        self.go(
            Phase::Reporting(ending),
            match ending {
                RelayEnding::Running => RelayAction::TellRunning,
                RelayEnding::Failed | RelayEnding::Unanswered => RelayAction::TellFailed,
                RelayEnding::InDoubt => RelayAction::TellNothing,
                RelayEnding::Incomplete => RelayAction::Part,
            },
        );
    }

    fn go(&mut self, phase: Phase, action: RelayAction) {
        self.phase = phase;
        self.outbox.push_back(action);
    }
}
