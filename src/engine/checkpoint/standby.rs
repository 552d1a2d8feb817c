//! The standby: which checkpoint is whole, and when the guest starts here.

#[cfg(test)]
use super::CheckpointBreakage;

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
    /// The action could not be performed, or what came makes no sense.
    Failed,
    /// The connection is lost.
    Lost,
    /// The embedder says that the source is dead: the guest is to start here.
    Activate,
    /// The embedder wants no guest here any more.
    Discard,
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
    /// Tell the source that its guest starts here, and close the connection.
    TellTaken(u64),
    /// Load the device state of the last checkpoint.
    Load,
    /// Let the guest run.
    Start,
    /// Answer the end of the protection.
    AnswerRelease,
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
    /// The connection is lost: the embedder decides.
    Orphaned,
    Taking,
    Loading,
    Starting,
    Releasing,
    Ended,
}

/// The state of a standby.
#[derive(Debug)]
pub struct StandbyEngine {
    phase: Phase,
    /// The requested action that is not answered yet.
    doing: Option<StandbyAction>,
    /// The last checkpoint that was applied; 0 before the first.
    applied: u64,
    /// The checkpoint that is whole, and not applied.
    whole: Option<u64>,
    opened: Option<u64>,
    is_lost: bool,
    activates: bool,
    discards: bool,
    ending: Option<StandbyEnding>,
    #[cfg(test)]
    breakage: CheckpointBreakage,
}

impl Default for StandbyEngine {
    fn default() -> Self {
        Self {
            phase: Phase::Idle,
            doing: None,
            applied: 0,
            whole: None,
            opened: None,
            is_lost: false,
            activates: false,
            discards: false,
            ending: None,
            #[cfg(test)]
            breakage: CheckpointBreakage::None,
        }
    }
}

impl StandbyEngine {
    #[cfg(test)]
    pub(crate) fn break_order(&mut self, breakage: CheckpointBreakage) {
        self.breakage = breakage;
    }

    /// True while a checkpoint is applied, a part at a time.
    #[cfg(test)]
    pub(crate) fn is_applying(&self) -> bool {
        matches!(self.doing, Some(StandbyAction::Apply(_)))
    }

    /// The last checkpoint that the guest could start from.
    pub fn last(&self) -> u64 {
        self.whole.unwrap_or(self.applied)
    }

    /// The last checkpoint that was applied; 0 before the first.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    /// True once nothing that comes from the source counts any more.
    pub fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// True while what comes from the source is read: an error then costs the source, and not what is here.
    pub fn receives(&self) -> bool {
        self.phase == Phase::Receiving
    }

    /// Takes an event, at any time.
    pub fn handle(&mut self, event: StandbyEvent) {
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
            StandbyEvent::Lost => self.lost(),
            StandbyEvent::Activate => self.activate(),
            StandbyEvent::Discard => self.discards = true,
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
        let is_open =
            matches!(self.phase, Phase::Idle | Phase::Greeting | Phase::Receiving | Phase::Orphaned);
        #[cfg(test)]
        let is_open = is_open
            || self.breakage == CheckpointBreakage::ActivateReleased && self.phase == Phase::Releasing;
        if is_open && self.discards {
            self.ending = Some(StandbyEnding::Discarded);
        } else if is_open && self.activates {
            self.phase = Phase::Taking;
        }
        if let Some(ending) = self.ending {
            return Some(StandbyAction::Finish(ending));
        }
        Some(match self.phase {
            Phase::Idle | Phase::Orphaned | Phase::Ended => return None,
            Phase::Greeting => StandbyAction::Greet,
            Phase::Receiving => StandbyAction::Receive,
            Phase::Confirming => StandbyAction::Confirm(self.opened.unwrap_or(self.applied)),
            Phase::Applying => StandbyAction::Apply(self.last()),
            Phase::Taking => StandbyAction::TellTaken(self.last()),
            Phase::Loading if self.last() == 0 => StandbyAction::Finish(StandbyEnding::Nothing),
            Phase::Loading => StandbyAction::Load,
            Phase::Starting => StandbyAction::Start,
            Phase::Releasing => StandbyAction::AnswerRelease,
        })
    }

    fn activate(&mut self) {
        self.activates = true;
        #[cfg(test)]
        if self.breakage == CheckpointBreakage::ActivateHalfApplied && self.phase == Phase::Applying {
            (self.doing, self.phase) = (None, Phase::Taking);
        }
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
            self.activates = true;
        }
    }

    /// The ending where no memory was provided.
    fn without_guest(&self) -> StandbyEnding {
        if self.activates { StandbyEnding::Nothing } else { StandbyEnding::Discarded }
    }

    fn opened(&mut self, number: u64) {
        if !self.took(StandbyAction::Receive) {
            return;
        }
        if self.opened.is_some() || number != self.applied + 1 {
            // Not the next one: nothing that follows can be believed.
            return self.lost();
        }
        self.opened = Some(number);
        #[cfg(test)]
        if self.breakage == CheckpointBreakage::ConfirmEarly {
            self.phase = Phase::Confirming;
        }
    }

    fn came(&mut self, number: u64) {
        if !self.took(StandbyAction::Receive) {
            return;
        }
        if self.opened.take() != Some(number) {
            return self.lost();
        }
        // Confirmed after it is applied: the next one would only wait, with its guest paused, until then.
        (self.whole, self.phase) = (Some(number), Phase::Applying);
    }

    fn answered(&mut self, done: bool) {
        let Some(action) = self.doing.take() else { return };
        match action {
            StandbyAction::Greet if done => self.phase = Phase::Receiving,
            StandbyAction::Receive if !done => self.lost(),
            StandbyAction::Confirm(_) => {
                self.is_lost |= !done;
                self.phase = if self.is_lost { Phase::Orphaned } else { Phase::Receiving };
            }
            StandbyAction::Apply(number) if done => {
                (self.applied, self.whole) = (number, None);
                self.phase = if self.is_lost { Phase::Orphaned } else { Phase::Confirming };
            }
            StandbyAction::Greet => self.ending = Some(self.without_guest()),
            StandbyAction::Apply(_) => self.ending = Some(StandbyEnding::Discarded),
            // Nobody may be there any more.
            StandbyAction::TellTaken(_) => self.phase = Phase::Loading,
            StandbyAction::Load if done => self.phase = Phase::Starting,
            StandbyAction::Start if done => self.ending = Some(StandbyEnding::Active(self.last())),
            StandbyAction::Load | StandbyAction::Start => {
                self.ending = Some(StandbyEnding::Stranded(self.last()));
            }
            StandbyAction::AnswerRelease => self.ending = Some(StandbyEnding::Released),
            StandbyAction::Receive | StandbyAction::Finish(_) => {}
        }
    }
}
