//! The standby: which checkpoint is whole, and when the guest starts here.

use std::time::Duration;

#[cfg(test)]
use super::CheckpointBreakage;
use super::lease::StandbyLease;

/// What has happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandbyEvent {
    /// It begins.
    Begin,
    /// The action was performed.
    Done,
    /// [`StandbyAction::Receive`] was performed: checkpoint n has begun.
    Opened(u64),
    /// The same: all of checkpoint n is here.
    Whole(u64),
    /// The same: the source has ended the protection.
    Released,
    /// The same: the source asks for a lease.
    Asked {
        /// Its number.
        number: u64,
        /// How long the source runs its guest with it, from when it asked.
        time: Duration,
    },
    /// The action could not be performed, or what came makes no sense.
    Failed,
    /// The connection is lost.
    Lost,
    /// The embedder says that the source is dead: the guest is to start here.
    Activate,
    /// The embedder wants no guest here any more.
    Discard,
    /// It is the time of [`StandbyEngine::wake_at`], or later, and nothing has come until then.
    Time,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandbyAction {
    /// Learn what guest it is, and get memory for it.
    Greet,
    /// Receive some of what comes, until something of [`StandbyEvent`] has happened or a command is there.
    Receive,
    /// Apply checkpoint n to the guest's memory and state.
    Apply(u64),
    /// Tell the source that checkpoint n is here.
    Confirm(u64),
    /// Grant the source the lease with this number.
    Grant(u64),
    /// Tell the source that its guest starts here, from the last checkpoint that was applied, and close the connection.
    TellTaken,
    /// Load the device state of the last checkpoint.
    Load,
    /// Let the guest run.
    Start,
    /// Answer the end of the protection.
    AnswerRelease,
    /// Tell the source that no guest starts here: it may run its own without a lease.
    TellDiscarded,
    /// It is over.
    Finish(StandbyEnding),
}

/// How protection ended at the standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandbyEnding {
    /// The guest runs here, from this checkpoint.
    Active(u64),
    /// The source has ended the protection: its guest runs there.
    Released,
    /// The guest was to start here, and no checkpoint had come whole.
    Nothing,
    /// The guest could not be started here from this checkpoint. Its memory is here.
    Stranded(u64),
    /// There is no guest here: the embedder wanted none, the source was lost before it had told of its guest, or memory
    /// could not be provided or written to.
    Discarded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Greeting,
    Receiving,
    Applying,
    Confirming,
    Granting(u64),
    /// The connection is lost: the embedder decides.
    Orphaned,
    Taking,
    Loading,
    Starting,
    Releasing,
    Ended,
}

/// What the embedder wants: the first command counts. A guest that is to start is not given up by a later one, which may
/// be the drop of a handle; and one that was given up does not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Activate,
    Discard,
}

/// What a source has said that can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandbyDoubt {
    /// It began checkpoint `number`, and `due` comes next.
    Opened {
        /// What it began.
        number: u64,
        /// What comes next.
        due: u64,
    },
    /// It ended checkpoint `number`, and `due` has begun, if one has.
    Closed {
        /// What it ended.
        number: u64,
        /// What has begun.
        due: Option<u64>,
    },
}

/// The state of a standby.
#[derive(Debug)]
pub struct StandbyEngine {
    phase: Phase,
    /// The requested action that is not answered yet.
    doing: Option<StandbyAction>,
    /// The last checkpoint that was applied; 0 before the first.
    applied: u64,
    /// The one behind it arrives.
    is_open: bool,
    is_lost: bool,
    doubt: Option<StandbyDoubt>,
    command: Option<Command>,
    /// The source has been told that no guest starts here.
    has_told: bool,
    lease: StandbyLease,
    ending: Option<StandbyEnding>,
    #[cfg(test)]
    breakage: CheckpointBreakage,
}

impl StandbyEngine {
    /// A standby before it begins. With `starts_by_lease` nobody needs to say that the source is dead.
    pub fn new(starts_by_lease: bool) -> Self {
        Self {
            phase: Phase::Idle,
            doing: None,
            applied: 0,
            is_open: false,
            is_lost: false,
            doubt: None,
            command: None,
            has_told: false,
            lease: StandbyLease::new(starts_by_lease),
            ending: None,
            #[cfg(test)]
            breakage: CheckpointBreakage::None,
        }
    }

    #[cfg(test)]
    pub(crate) fn break_order(&mut self, breakage: CheckpointBreakage) {
        self.lease.break_order(breakage);
        self.breakage = breakage;
    }

    /// True while a checkpoint is applied, a part at a time.
    #[cfg(test)]
    pub(crate) fn is_applying(&self) -> bool {
        matches!(self.doing, Some(StandbyAction::Apply(_)))
    }

    /// The last checkpoint that was applied, from which the guest can start; 0 before the first.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// True if the guest starts here because the source's lease has run out.
    pub fn starts_by_lease(&self) -> bool {
        self.lease.has_run_out()
    }

    /// True while a checkpoint arrives.
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// What the source has said that can't be, if that is why nothing it says counts any more.
    pub fn doubt(&self) -> Option<StandbyDoubt> {
        self.doubt
    }

    /// True once nothing that comes from the source counts any more, and nothing is to be said to it either. A source
    /// whose guest starts here is told so first, if it can still be reached.
    pub fn gives_source_up(&self) -> bool {
        self.is_lost && self.command != Some(Command::Activate)
    }

    /// True while what comes from the source is read: an error then costs the source, and not what is here.
    pub fn receives(&self) -> bool {
        self.phase == Phase::Receiving
    }

    /// When to call again with [`StandbyEvent::Time`], if nothing comes: the lease of a source that is silent has run out
    /// then, and its guest is to start here.
    pub fn wake_at(&self) -> Option<Duration> {
        let waits = matches!(self.phase, Phase::Receiving | Phase::Orphaned);
        self.lease.starts_at().filter(|_| waits && self.command.is_none() && self.applied > 0)
    }

    /// Takes an event, at any time.
    pub fn handle(&mut self, now: Duration, event: StandbyEvent) {
        match event {
            StandbyEvent::Begin if self.phase == Phase::Idle => self.phase = Phase::Greeting,
            StandbyEvent::Begin => {}
            StandbyEvent::Done => self.answered(true),
            StandbyEvent::Failed => self.answered(false),
            StandbyEvent::Opened(number) => self.opened(number),
            StandbyEvent::Whole(number) => self.came(number),
            StandbyEvent::Released => {
                if self.took(StandbyAction::Receive) {
                    self.phase = Phase::Releasing;
                }
            }
            StandbyEvent::Asked { number, time } => {
                if self.took(StandbyAction::Receive) {
                    self.lease.renew(now, time);
                    self.phase = Phase::Granting(number);
                }
            }
            StandbyEvent::Lost => self.lost(),
            StandbyEvent::Activate => self.commanded(Command::Activate),
            StandbyEvent::Discard => self.commanded(Command::Discard),
            StandbyEvent::Time => {
                if self.wake_at().is_some_and(|at| now >= at) {
                    self.lease.run_out();
                    self.commanded(Command::Activate);
                }
            }
        }
    }

    /// What to do next; `None` while an answer is due, or nothing is to be done before something happens.
    pub fn poll(&mut self) -> Option<StandbyAction> {
        if self.doing.is_some() || self.phase == Phase::Ended {
            return None;
        }
        let action = self.next()?;
        if let StandbyAction::Finish(_) = action {
            self.phase = Phase::Ended;
            return Some(action);
        }
        self.doing = Some(action);
        Some(action)
    }

    /// The requested action is over, if it is this one.
    fn took(&mut self, action: StandbyAction) -> bool {
        self.doing.take_if(|doing| *doing == action).is_some()
    }

    fn next(&mut self) -> Option<StandbyAction> {
        let is_open = matches!(
            self.phase,
            Phase::Idle | Phase::Greeting | Phase::Receiving | Phase::Granting(_) | Phase::Orphaned
        );
        #[cfg(test)]
        let is_open = is_open
            || self.breakage == CheckpointBreakage::ActivateReleased && self.phase == Phase::Releasing;
        match self.command.filter(|_| is_open) {
            Some(Command::Discard) => self.ending = Some(StandbyEnding::Discarded),
            Some(Command::Activate) => self.phase = self.taking(),
            None => {}
        }
        if let Some(ending) = self.ending {
            // A source that has no READY runs its guest anyway.
            let is_ready = !matches!(self.phase, Phase::Idle | Phase::Greeting);
            let tells = ending == StandbyEnding::Discarded && is_ready;
            return Some(match tells && !self.is_lost && !self.has_told {
                true => StandbyAction::TellDiscarded,
                false => StandbyAction::Finish(ending),
            });
        }
        Some(match self.phase {
            Phase::Idle | Phase::Orphaned | Phase::Ended => return None,
            Phase::Greeting => StandbyAction::Greet,
            Phase::Receiving => StandbyAction::Receive,
            Phase::Confirming => StandbyAction::Confirm(self.applied + u64::from(self.is_open)),
            Phase::Granting(number) => StandbyAction::Grant(number),
            Phase::Applying => StandbyAction::Apply(self.applied + 1),
            Phase::Taking => StandbyAction::TellTaken,
            Phase::Loading if self.has_none() => StandbyAction::Finish(StandbyEnding::Nothing),
            Phase::Loading => StandbyAction::Load,
            Phase::Starting => StandbyAction::Start,
            Phase::Releasing => StandbyAction::AnswerRelease,
        })
    }

    fn commanded(&mut self, command: Command) {
        self.command.get_or_insert(command);
        #[cfg(test)]
        match (self.breakage, command) {
            (CheckpointBreakage::DiscardActivated, Command::Discard) => self.command = Some(command),
            (CheckpointBreakage::ActivateHalfApplied, Command::Activate) if self.phase == Phase::Applying => {
                (self.doing, self.phase) = (None, Phase::Taking);
            }
            _ => {}
        }
    }

    /// A source that lives is told first.
    fn taking(&self) -> Phase {
        #[cfg(test)]
        if self.breakage == CheckpointBreakage::StartUntold {
            return Phase::Loading;
        }
        Phase::Taking
    }

    /// There is no checkpoint to start from.
    fn has_none(&self) -> bool {
        #[cfg(test)]
        if self.breakage == CheckpointBreakage::StartFromNothing {
            return false;
        }
        self.applied == 0
    }

    fn lost(&mut self) {
        self.is_lost = true;
        match self.phase {
            Phase::Greeting => (self.doing, self.ending) = (None, Some(self.without_guest())),
            Phase::Receiving => (self.doing, self.phase) = (None, Phase::Orphaned),
            // What is here already is dealt with all the same.
            _ => {}
        }
        #[cfg(test)]
        if self.breakage == CheckpointBreakage::ActivateOnLoss {
            self.commanded(Command::Activate);
        }
    }

    /// Nothing that follows can be believed.
    fn doubted(&mut self, doubt: StandbyDoubt) {
        self.doubt.get_or_insert(doubt);
        self.lost();
    }

    /// The ending where no memory was provided.
    fn without_guest(&self) -> StandbyEnding {
        match self.command {
            Some(Command::Activate) => StandbyEnding::Nothing,
            _ => StandbyEnding::Discarded,
        }
    }

    fn opened(&mut self, number: u64) {
        if !self.took(StandbyAction::Receive) {
            return;
        }
        let due = self.applied + 1;
        if self.is_open || number != due {
            return self.doubted(StandbyDoubt::Opened { number, due });
        }
        self.is_open = true;
        #[cfg(test)]
        if self.breakage == CheckpointBreakage::ConfirmEarly {
            self.phase = Phase::Confirming;
        }
    }

    fn came(&mut self, number: u64) {
        if !self.took(StandbyAction::Receive) {
            return;
        }
        let due = Some(self.applied + 1).filter(|_| self.is_open);
        self.is_open = false;
        if due != Some(number) {
            return self.doubted(StandbyDoubt::Closed { number, due });
        }
        // Confirmed after it is applied: the next one would only wait, with its guest paused, until then.
        self.phase = Phase::Applying;
    }

    fn answered(&mut self, done: bool) {
        let Some(action) = self.doing.take() else { return };
        match action {
            StandbyAction::Greet if done => self.phase = Phase::Receiving,
            StandbyAction::Receive if !done => self.lost(),
            StandbyAction::Confirm(_) | StandbyAction::Grant(_) => {
                self.is_lost |= !done;
                self.phase = if self.is_lost { Phase::Orphaned } else { Phase::Receiving };
            }
            StandbyAction::Apply(number) if done => {
                self.applied = number;
                self.phase = if self.is_lost { Phase::Orphaned } else { Phase::Confirming };
            }
            StandbyAction::Greet => self.ending = Some(self.without_guest()),
            StandbyAction::Apply(_) => self.torn(),
            // Nobody may be there any more.
            StandbyAction::TellTaken => self.phase = Phase::Loading,
            StandbyAction::Load if done => self.phase = Phase::Starting,
            StandbyAction::Start if done => self.ending = Some(StandbyEnding::Active(self.applied)),
            #[cfg(test)]
            StandbyAction::Load if self.breakage == CheckpointBreakage::StartUnloaded => {
                self.phase = Phase::Starting;
            }
            StandbyAction::Load | StandbyAction::Start => {
                self.ending = Some(StandbyEnding::Stranded(self.applied));
            }
            StandbyAction::TellDiscarded => self.told_discarded(),
            StandbyAction::AnswerRelease => self.ending = Some(StandbyEnding::Released),
            StandbyAction::Receive | StandbyAction::Finish(_) => {}
        }
    }

    fn told_discarded(&mut self) {
        self.has_told = true;
        #[cfg(test)]
        if self.breakage == CheckpointBreakage::StartDiscarded && self.applied > 0 {
            (self.ending, self.phase, self.command) = (None, Phase::Orphaned, None);
        }
    }

    /// The memory is of no checkpoint any more.
    fn torn(&mut self) {
        #[cfg(test)]
        if self.breakage == CheckpointBreakage::StartTorn {
            self.phase = Phase::Orphaned;
            return;
        }
        self.ending = Some(StandbyEnding::Discarded);
    }
}
