//! What a lease changes about a source: when the guest is paused for want of one, and when it may run on.

use std::time::Duration;

#[cfg(test)]
use super::CheckpointBreakage;
use super::{CheckpointAction, CheckpointCause, CheckpointEngine, CheckpointOutcome, Phase};

/// What the lease says about the next step.
pub(super) enum Step {
    Go,
    Wait,
    First(CheckpointAction),
}

impl CheckpointEngine {
    /// The number of the lease to ask for now, if it is time: to be sent at once, before anything else and between the
    /// pages of a checkpoint. The time is read before that.
    pub fn renewal(&mut self, now: Duration) -> Option<u64> {
        if !self.asks() {
            return None;
        }
        self.lease.as_mut()?.ask(now)
    }

    /// Until when the guest may run, and what it has sent may be let out; `None`: without a limit.
    pub fn may_run_until(&self) -> Option<Duration> {
        match self.ending {
            Some(CheckpointOutcome::Taken | CheckpointOutcome::Fenced) => Some(Duration::ZERO),
            Some(CheckpointOutcome::Stopped | CheckpointOutcome::Unprotected) => None,
            None => self.lease.as_ref()?.until(),
        }
    }

    fn asks(&self) -> bool {
        let is_silent = matches!(
            self.phase,
            Phase::Idle | Phase::Starting | Phase::Greeting | Phase::Releasing | Phase::Ended
        );
        !is_silent && self.ending.is_none()
    }

    pub(super) fn is_bound(&self) -> bool {
        self.lease.as_ref().is_some_and(|lease| lease.binds())
    }

    fn holds(&self) -> bool {
        self.lease.as_ref().is_none_or(|lease| lease.holds(self.times.now))
    }

    pub(super) fn is_fenced(&self) -> bool {
        self.lease.as_ref().is_some_and(|lease| lease.is_fenced())
    }

    pub(super) fn set_fenced(&mut self, is_fenced: bool) {
        if let Some(lease) = &mut self.lease {
            lease.set_fenced(is_fenced);
        }
    }

    /// Before any other step.
    pub(super) fn by_lease(&self) -> Step {
        #[cfg(test)]
        match self.breakage {
            CheckpointBreakage::RunPastLease => return Step::Go,
            CheckpointBreakage::ResumePastLease if self.phase == Phase::Resuming => return Step::Go,
            CheckpointBreakage::OutputPastLease if self.phase == Phase::Awaiting && self.is_safe() => {
                return Step::Go;
            }
            _ => {}
        }
        match (self.guest.paused, self.is_fenced()) {
            (false, _) if !self.holds() => Step::First(CheckpointAction::Fence),
            (true, true) if self.holds() => Step::First(CheckpointAction::Unfence),
            // Its answer makes a lease needless.
            (true, true) if self.phase == Phase::Resting && self.asked.stopping => Step::Go,
            (true, true) => Step::Wait,
            (true, false) if self.phase == Phase::Resuming && !self.holds() => Step::Wait,
            _ => Step::Go,
        }
    }

    /// The guest waits for a lease.
    pub(super) fn lacks_lease(&self) -> Option<CheckpointCause> {
        let lacks = self.is_fenced() || self.phase == Phase::Resuming && !self.holds();
        lacks.then_some(CheckpointCause::NoLease)
    }

    /// When something is to be done for the lease.
    pub(super) fn lease_wake(&self) -> Option<Duration> {
        let next = self.lease.as_ref().filter(|_| self.asks())?.next();
        earlier(next, self.fence_at())
    }

    /// When the guest, which runs, is to be paused.
    pub(super) fn fence_at(&self) -> Option<Duration> {
        let runs = !self.guest.paused && self.ending.is_none();
        #[cfg(test)]
        let runs = runs && self.breakage != CheckpointBreakage::RunPastLease;
        self.lease.as_ref().filter(|_| runs)?.fence_at()
    }

    pub(super) fn granted(&mut self, number: u64) {
        #[cfg(test)]
        if self.breakage == CheckpointBreakage::LeaseFromReceipt
            && let Some(lease) = &mut self.lease
        {
            lease.count_from(self.times.now);
        }
        if !self.lease.as_mut().is_some_and(|lease| lease.granted(number)) {
            self.end_for(CheckpointCause::NeverAsked(number));
        }
    }

    /// The standby never starts the guest: it may run here, whatever has happened.
    pub(super) fn discarded(&mut self) {
        #[cfg(test)]
        if self.breakage == CheckpointBreakage::StayFenced {
            return self.end_for(CheckpointCause::Discarded);
        }
        self.free();
        match &mut self.ending {
            Some(ending @ CheckpointOutcome::Fenced) => *ending = CheckpointOutcome::Unprotected,
            Some(_) => {}
            None => self.end_for(CheckpointCause::Discarded),
        }
    }

    /// The same, as it was told to.
    pub(super) fn released(&mut self) {
        if self.phase != Phase::Releasing {
            return self.end_for(CheckpointCause::NeverReleased);
        }
        self.free();
        if self.ending != Some(CheckpointOutcome::Taken) {
            self.ending = Some(CheckpointOutcome::Stopped);
        }
    }

    pub(super) fn free(&mut self) {
        if let Some(lease) = &mut self.lease {
            lease.free();
        }
    }
}

pub(super) fn earlier(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    one.into_iter().chain(other).min()
}
