//! What follows from the answer to an action, and from a call of the guest that has returned.

#[cfg(test)]
use super::SnapshotBreakage;
use super::{Call, Phase, Resume, SnapshotAction, SnapshotEngine, SnapshotOutcome};
use crate::ram::PageRun;

impl SnapshotEngine {
    /// A call of the guest is over.
    pub(super) fn returned(&mut self, done: bool) {
        let Some(call) = self.asked.calling.take() else { return };
        if call == Call::Resume {
            self.asked.resume = Resume::Over;
            self.guest.paused &= !done;
        }
        if !done {
            self.end(SnapshotOutcome::Failed);
        }
        self.phase = match (call, self.phase) {
            (Call::Pause, Phase::Pausing) if done => Phase::Saving,
            (Call::SaveState, Phase::Saving) if done => self.phase_after_state(),
            (Call::Resume, Phase::Waiting) => Phase::Closing,
            (_, phase) => phase,
        };
    }

    pub(super) fn answered(&mut self, done: bool) {
        let Some(action) = self.doing.take() else { return };
        match action {
            SnapshotAction::Disarm => {
                self.guest.armed = false;
                self.faults.clear();
            }
            SnapshotAction::Abandon => self.asked.abandoned = true,
            SnapshotAction::Resume if !done => self.asked.resume = Resume::Over,
            _ => {}
        }
        if !done {
            return self.end(SnapshotOutcome::Failed);
        }
        self.phase = match action {
            SnapshotAction::Open => self.phase_after_opening(),
            SnapshotAction::Track if self.asked.resume == Resume::NotAsked => Phase::Arming,
            SnapshotAction::Track => self.behind_everything(),
            SnapshotAction::Arm => {
                self.ahead.begin(self.now);
                Phase::Ahead
            }
            SnapshotAction::Pause => self.calls(Call::Pause),
            SnapshotAction::SaveState => self.calls(Call::SaveState),
            SnapshotAction::Look if self.phase == Phase::Looking => {
                self.ahead.rewind();
                Phase::Protecting
            }
            SnapshotAction::Look => {
                self.ahead.searched();
                self.phase
            }
            SnapshotAction::Protect { run } => {
                self.ahead.protected(run);
                self.phase
            }
            SnapshotAction::Resume => {
                self.calls(Call::Resume);
                if self.phase == Phase::Resuming { self.phase_after_resume() } else { self.phase }
            }
            SnapshotAction::Copy { run, .. } => {
                self.copied(run);
                self.phase
            }
            SnapshotAction::Lift { run } => {
                self.lifted(run);
                self.phase
            }
            SnapshotAction::Disarm if self.phase == Phase::Disarming => self.phase_after_pages(),
            SnapshotAction::Close => Phase::Ended,
            _ => self.phase,
        };
    }

    fn calls(&mut self, call: Call) -> Phase {
        self.asked.calling = Some(call);
        self.phase
    }

    /// Order: changes are logged before the snapshot's moment.
    fn phase_after_opening(&self) -> Phase {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::TrackLate) {
            return Phase::Arming;
        }
        Phase::Tracking
    }

    fn phase_after_state(&self) -> Phase {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::ResumeUnprotected) {
            return Phase::Resuming;
        }
        Phase::Looking
    }

    pub(super) fn phase_after_protection(&self) -> Phase {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::ResumeUnprotected) {
            return Phase::Copying;
        }
        Phase::Resuming
    }

    fn phase_after_resume(&self) -> Phase {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::ResumeUnprotected) {
            return Phase::Looking;
        }
        Phase::Copying
    }

    fn phase_after_pages(&self) -> Phase {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::TrackLate) {
            return Phase::Tracking;
        }
        self.behind_everything()
    }

    /// Only the end of the output is left, once the guest's resume has returned.
    fn behind_everything(&self) -> Phase {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::CloseUnresumed) {
            return Phase::Closing;
        }
        if self.asked.resume == Resume::Over { Phase::Closing } else { Phase::Waiting }
    }

    /// Order: protection is lifted only from pages that are copied.
    fn copied(&mut self, run: PageRun) {
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::CopyTwice) && self.faults.iter().any(|(_, waited)| *waited == run)
        {
            self.copies.copied = Some(run);
            return;
        }
        self.copies.pending.remove(run);
        #[cfg(test)]
        if self.is_broken(SnapshotBreakage::LiftFirst) {
            return;
        }
        self.copies.copied = Some(run);
    }

    fn lifted(&mut self, run: PageRun) {
        if self.copies.copied == Some(run) {
            self.copies.copied = None;
        }
        if self.is_before_the_moment() {
            self.ahead.opened(&self.copies.pending, run);
            #[cfg(test)]
            if self.is_broken(SnapshotBreakage::LeaveOpen) {
                self.ahead.open.remove(run);
            }
        }
        let (now, latency) = (self.now, &mut self.figures.latency);
        self.faults.retain(|(since, waited)| {
            let inside = waited.block == run.block && run.first <= waited.first && waited.end() <= run.end();
            if inside {
                latency.record(now.saturating_sub(*since));
            }
            !inside
        });
    }
}
