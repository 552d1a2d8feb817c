//! The source: when the next checkpoint is taken, and when the guest runs.

mod events;
mod leased;

use std::time::Duration;

#[cfg(test)]
use super::CheckpointBreakage;
use super::lease::SourceLease;

pub use self::events::{
    CheckpointAction, CheckpointCause, CheckpointConfig, CheckpointEvent, CheckpointOutcome,
};
use self::leased::{Step, earlier};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Starting,
    Greeting,
    Opening,
    /// Of the first checkpoint: the guest runs.
    LiveSync,
    LiveSend,
    Pausing,
    LastSync,
    LastSend,
    Saving,
    Closing,
    Resuming,
    /// The guest runs, and the standby has not confirmed.
    Awaiting,
    /// The guest runs until the next checkpoint.
    Resting,
    /// The standby knows of the end, and has not answered.
    Releasing,
    Ended,
}

/// What was done to the guest.
#[derive(Debug, Default)]
struct Guest {
    paused: bool,
    has_logs: bool,
}

/// What the embedder wants.
#[derive(Debug, Default)]
struct Requests {
    demanded: bool,
    stopping: bool,
}

#[derive(Debug, Default)]
struct Times {
    now: Duration,
    /// When the next checkpoint is taken.
    due: Option<Duration>,
    /// When the guest has been paused for too long; from the end of a checkpoint on, when the wait for the standby's
    /// answer is over.
    overdue: Option<Duration>,
}

/// The state of a source.
#[derive(Debug)]
pub struct CheckpointEngine {
    config: CheckpointConfig,
    phase: Phase,
    /// The requested action that is not answered yet.
    doing: Option<CheckpointAction>,
    ending: Option<CheckpointOutcome>,
    cause: Option<CheckpointCause>,
    /// The checkpoint that is taken, or was taken last; from 1.
    number: u64,
    rounds: u32,
    confirmed: u64,
    guest: Guest,
    asked: Requests,
    times: Times,
    lease: Option<SourceLease>,
    #[cfg(test)]
    breakage: CheckpointBreakage,
}

impl CheckpointEngine {
    /// A protection that has not begun.
    pub fn new(config: CheckpointConfig) -> Self {
        Self {
            lease: config.lease.map(SourceLease::new),
            config,
            phase: Phase::Idle,
            doing: None,
            ending: None,
            cause: None,
            number: 0,
            rounds: 0,
            confirmed: 0,
            guest: Guest::default(),
            asked: Requests::default(),
            times: Times::default(),
            #[cfg(test)]
            breakage: CheckpointBreakage::None,
        }
    }

    #[cfg(test)]
    pub(crate) fn break_order(&mut self, breakage: CheckpointBreakage) {
        self.breakage = breakage;
    }

    /// True once nothing more is sent.
    pub fn is_ending(&self) -> bool {
        self.ending.is_some()
    }

    /// Why it ended, if nothing else says so.
    pub fn cause(&self) -> Option<CheckpointCause> {
        self.cause
    }

    /// When to call again with [`CheckpointEvent::Time`], if nothing else happens.
    pub fn wake_at(&self) -> Option<Duration> {
        let due = match self.phase {
            Phase::Resting if self.ending.is_none() && !self.is_fenced() => self.times.due,
            _ => None,
        };
        earlier(earlier(due, self.give_up_at()), self.lease_wake())
    }

    /// When to give up an action that waits for the standby: the guest is paused for it, or runs without a lease from
    /// then on.
    pub fn give_up_at(&self) -> Option<Duration> {
        earlier(self.waited().and(self.times.overdue), self.fence_at())
    }

    /// What is waited for with a limit.
    fn waited(&self) -> Option<CheckpointCause> {
        let waits = match self.phase {
            _ if self.ending.is_some() => None,
            Phase::Releasing => Some(CheckpointCause::Unreleased),
            _ if self.lacks_lease().is_some() => self.lacks_lease(),
            Phase::LastSync | Phase::LastSend | Phase::Saving | Phase::Closing => {
                Some(CheckpointCause::PausedTooLong(self.number))
            }
            Phase::Awaiting if !self.is_safe() => Some(CheckpointCause::Unconfirmed(self.number)),
            _ => None,
        };
        #[cfg(test)]
        let waits = match (self.breakage, waits) {
            (CheckpointBreakage::WaitPaused, Some(CheckpointCause::PausedTooLong(_)))
            | (CheckpointBreakage::WaitUnconfirmed, Some(CheckpointCause::Unconfirmed(_))) => None,
            _ => waits,
        };
        waits
    }

    /// Takes an event, at any time.
    pub fn handle(&mut self, now: Duration, event: CheckpointEvent) {
        self.times.now = self.times.now.max(now);
        match event {
            CheckpointEvent::Begin if self.phase == Phase::Idle => self.phase = Phase::Starting,
            CheckpointEvent::Begin | CheckpointEvent::Time => {}
            CheckpointEvent::Done => self.answered(true, 0),
            CheckpointEvent::Synced { dirty_pages } => self.answered(true, dirty_pages),
            CheckpointEvent::TooLate => self.doing = None,
            CheckpointEvent::Failed => {
                // An action that was given up in time failed for that reason.
                self.look_at_time();
                if self.fence_at().is_some_and(|at| self.times.now >= at) {
                    self.end_for(CheckpointCause::NoLease);
                }
                self.end(CheckpointOutcome::Unprotected);
                self.answered(false, 0);
            }
            CheckpointEvent::Lost => self.end(CheckpointOutcome::Unprotected),
            // Nobody can have what was not sent.
            CheckpointEvent::Confirmed(number) if self.is_unsent(number) => {
                self.end_for(CheckpointCause::NeverSent(number));
            }
            CheckpointEvent::Confirmed(number) => self.confirmed = self.confirmed.max(number),
            CheckpointEvent::Granted(number) => self.granted(number),
            // Whatever else has happened: the guest runs there.
            CheckpointEvent::Taken if self.phase != Phase::Ended => {
                self.ending = Some(CheckpointOutcome::Taken);
            }
            CheckpointEvent::Taken => {}
            CheckpointEvent::Discarded => self.discarded(),
            CheckpointEvent::Released => self.released(),
            CheckpointEvent::Demand => self.asked.demanded = true,
            CheckpointEvent::Stop => self.asked.stopping = true,
        }
        self.look_at_time();
    }

    fn look_at_time(&mut self) {
        if let Some(cause) = self.waited()
            && self.times.overdue.is_some_and(|at| self.times.now >= at)
        {
            self.end_for(cause);
        }
    }

    /// What to do next; `None` while an answer is due, or nothing is to be done before something happens.
    pub fn poll(&mut self) -> Option<CheckpointAction> {
        if self.doing.is_some() || self.phase == Phase::Ended {
            return None;
        }
        let action = match self.ending {
            Some(outcome) => self.undo(outcome),
            None => self.next()?,
        };
        match action {
            // From here on, whether it succeeds or not.
            CheckpointAction::Pause => {
                self.guest.paused = true;
                self.wait_from_now();
            }
            CheckpointAction::Fence => {
                self.guest.paused = true;
                self.set_fenced(true);
                if self.phase != Phase::Releasing {
                    self.wait_from_now();
                }
            }
            // The standby may have all of it before that is answered.
            CheckpointAction::Close(_) => self.bind(),
            CheckpointAction::StartLogs => self.guest.has_logs = true,
            CheckpointAction::Open(number) => self.number = number,
            // This action gets no answer.
            CheckpointAction::Finish(_) => {
                self.phase = Phase::Ended;
                return Some(action);
            }
            _ => {}
        }
        self.doing = Some(action);
        Some(action)
    }

    fn wait_from_now(&mut self) {
        self.times.overdue = Some(self.times.now.saturating_add(self.config.confirm_timeout));
    }

    fn bind(&mut self) {
        if let Some(lease) = &mut self.lease {
            lease.bind();
        }
    }

    /// True for a checkpoint that the standby can't have all of.
    fn is_unsent(&self, number: u64) -> bool {
        #[cfg(test)]
        if self.breakage == CheckpointBreakage::ConfirmEarly {
            return false;
        }
        let is_taken = matches!(
            self.phase,
            Phase::Opening
                | Phase::LiveSync
                | Phase::LiveSend
                | Phase::Pausing
                | Phase::LastSync
                | Phase::LastSend
                | Phase::Saving
        );
        number > self.number.saturating_sub(u64::from(is_taken))
    }

    /// The first reason counts.
    fn end(&mut self, outcome: CheckpointOutcome) {
        let may_start_there = self.is_bound();
        #[cfg(test)]
        let may_start_there = may_start_there && self.breakage != CheckpointBreakage::LostRunsOn;
        let outcome = match outcome {
            CheckpointOutcome::Unprotected if may_start_there => CheckpointOutcome::Fenced,
            _ => outcome,
        };
        if self.phase != Phase::Ended {
            self.ending.get_or_insert(outcome);
        }
    }

    fn end_for(&mut self, cause: CheckpointCause) {
        if self.ending.is_none() {
            self.cause = Some(cause);
        }
        self.end(CheckpointOutcome::Unprotected);
    }

    fn undo(&mut self, outcome: CheckpointOutcome) -> CheckpointAction {
        let stays = matches!(outcome, CheckpointOutcome::Taken | CheckpointOutcome::Fenced);
        #[cfg(test)]
        let stays = stays && self.breakage != CheckpointBreakage::ResumeTaken;
        let resumes = self.guest.paused && !stays;
        #[cfg(test)]
        let resumes = resumes && self.breakage != CheckpointBreakage::StayPaused;
        let has_logs = self.guest.has_logs;
        #[cfg(test)]
        let has_logs = has_logs && self.breakage != CheckpointBreakage::LeaveLogsOn;
        match () {
            () if stays && !self.guest.paused => CheckpointAction::Fence,
            () if resumes => CheckpointAction::Resume,
            () if has_logs => CheckpointAction::StopLogs,
            () => CheckpointAction::Finish(outcome),
        }
    }

    fn next(&mut self) -> Option<CheckpointAction> {
        match self.by_lease() {
            Step::Go => {}
            Step::Wait => return None,
            Step::First(action) => return Some(action),
        }
        Some(match self.phase {
            Phase::Idle | Phase::Ended => return None,
            Phase::Starting => CheckpointAction::StartLogs,
            Phase::Greeting => CheckpointAction::Greet,
            Phase::Opening => CheckpointAction::Open(self.number + 1),
            Phase::LiveSync | Phase::LastSync => CheckpointAction::Sync,
            Phase::LiveSend | Phase::LastSend => CheckpointAction::Send,
            Phase::Pausing => CheckpointAction::Pause,
            Phase::Saving => CheckpointAction::SaveState(self.number),
            Phase::Closing => CheckpointAction::Close(self.number),
            Phase::Resuming => CheckpointAction::Resume,
            Phase::Awaiting if !self.is_safe() => return None,
            Phase::Awaiting => CheckpointAction::ReportSafe(self.number),
            Phase::Resting if self.asked.stopping => CheckpointAction::Release,
            Phase::Resting if self.is_due() => {
                (self.asked.demanded, self.phase) = (false, Phase::Opening);
                CheckpointAction::Open(self.number + 1)
            }
            Phase::Resting | Phase::Releasing => return None,
        })
    }

    fn is_safe(&self) -> bool {
        #[cfg(test)]
        if self.breakage == CheckpointBreakage::SafeUnconfirmed {
            return true;
        }
        self.confirmed == self.number
    }

    fn is_due(&self) -> bool {
        self.asked.demanded || self.times.due.is_some_and(|at| self.times.now >= at)
    }

    fn answered(&mut self, done: bool, dirty_pages: u64) {
        let Some(action) = self.doing.take() else { return };
        match action {
            CheckpointAction::StopLogs => self.guest.has_logs = false,
            // One that failed is not tried again: the report says that the guest stands still.
            CheckpointAction::Resume => {
                self.guest.paused = false;
                self.times.due = self.config.interval.map(|interval| self.times.now.saturating_add(interval));
                self.wait_from_now();
            }
            CheckpointAction::Unfence => {
                self.guest.paused = false;
                self.set_fenced(false);
                self.wait_from_now();
            }
            _ => {}
        }
        if !done || self.ending.is_some() {
            return;
        }
        self.phase = match action {
            CheckpointAction::StartLogs => Phase::Greeting,
            CheckpointAction::Greet => Phase::Opening,
            CheckpointAction::Open(1) => Phase::LiveSync,
            CheckpointAction::Open(_) => Phase::Pausing,
            CheckpointAction::Sync if self.phase == Phase::LiveSync => self.behind_live_sync(dirty_pages),
            CheckpointAction::Send if self.phase == Phase::LiveSend => Phase::LiveSync,
            CheckpointAction::ReportSafe(_) => Phase::Resting,
            CheckpointAction::Release => {
                self.wait_from_now();
                #[cfg(test)]
                if self.breakage == CheckpointBreakage::FreeUnanswered {
                    self.free();
                    self.end(CheckpointOutcome::Stopped);
                }
                Phase::Releasing
            }
            CheckpointAction::Fence | CheckpointAction::Unfence | CheckpointAction::Finish(_) => self.phase,
            _ => self.step_behind(self.phase),
        };
    }

    /// Of the first checkpoint.
    fn behind_live_sync(&mut self, dirty_pages: u64) -> Phase {
        if dirty_pages <= self.config.live_pages || self.rounds >= self.config.live_rounds {
            return Phase::Pausing;
        }
        self.rounds += 1;
        Phase::LiveSend
    }

    /// The steps from the pause on, in their order.
    fn step_behind(&self, step: Phase) -> Phase {
        use Phase::{Awaiting, Closing, LastSend, LastSync, Pausing, Resuming, Saving};
        let steps = [Pausing, LastSync, LastSend, Saving, Closing, Resuming, Awaiting];
        #[cfg(test)]
        let steps = match self.breakage {
            CheckpointBreakage::ResumeFirst => {
                [Pausing, LastSync, Resuming, LastSend, Saving, Closing, Awaiting]
            }
            CheckpointBreakage::SaveRunning => {
                [Pausing, LastSync, LastSend, Resuming, Saving, Closing, Awaiting]
            }
            _ => steps,
        };
        let at = steps.iter().position(|one| *one == step);
        at.and_then(|at| steps.get(at + 1)).copied().unwrap_or(step)
    }
}
