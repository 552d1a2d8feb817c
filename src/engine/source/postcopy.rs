//! The switch to postcopy: when it is due, and what follows it.

use std::time::Duration;

use super::{Action, OnTimeout, Phase, PostcopyRule, SourceEngine};
use crate::engine::Handover;

/// How far a switch has come.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Switch {
    /// Asked for by command.
    pub(super) wanted: bool,
    /// The guest is paused for it.
    pub(super) begun: bool,
    /// The peer has loaded the device state and says that it takes the guest.
    pub(super) taken: bool,
}

impl SourceEngine {
    /// Asks for the switch. `false` if it was not announced to the peer, or the guest is paused already.
    pub fn start_postcopy(&mut self) -> bool {
        let running = matches!(
            self.phase,
            Phase::New
                | Phase::Starting
                | Phase::SettingUp
                | Phase::Syncing
                | Phase::Opening(crate::ram::RoundKind::Live)
                | Phase::Sending(crate::ram::RoundKind::Live)
                | Phase::Closing(crate::ram::RoundKind::Live)
                | Phase::Waiting
        );
        self.postcopy.wanted |= running && self.config.postcopy.is_some();
        self.postcopy.wanted
    }

    /// True from the pause for postcopy on.
    pub fn is_postcopy(&self) -> bool {
        self.postcopy.begun
    }

    /// True if the rule says so; what converges is not switched.
    pub(super) fn switch_is_due(&self, now: Duration) -> bool {
        match self.config.postcopy {
            None => false,
            Some(PostcopyRule::AfterRounds(rounds)) if self.round >= rounds => true,
            Some(_) => self.switches_within_round(now),
        }
    }

    /// What need not wait for the end of a round.
    pub(super) fn switches_within_round(&self, now: Duration) -> bool {
        let timed_out = self.is_late(now) && matches!(self.config.timeout, Some((_, OnTimeout::Postcopy)));
        match self.config.postcopy {
            None => false,
            Some(PostcopyRule::AfterTime(time)) if now >= time => true,
            Some(_) => self.postcopy.wanted || timed_out,
        }
    }

    pub(super) fn switch_to_postcopy(&mut self) -> Action {
        self.postcopy.begun = true;
        self.pause()
    }

    pub(super) fn send_missing(&mut self, now: Duration) -> Action {
        self.go(Phase::Filling, Action::SendMissing { until: now + self.config.slice })
    }

    /// The end may be said once nothing is left and the guest was taken: until then the peer may still give it back.
    pub(super) fn filled(&mut self, now: Duration, pages_left: u64, taken: bool) -> Action {
        self.postcopy.taken |= taken;
        match (pages_left, self.postcopy.taken) {
            (0, true) => self.go(Phase::EndingPostcopy, Action::EndPostcopy),
            (0, false) => self.go(Phase::AwaitingTaken, Action::AwaitTaken),
            _ => self.send_missing(now),
        }
    }

    /// True if a peer that says that it failed has not started the guest.
    pub(super) fn refusal_gives_back(&self) -> bool {
        match self.postcopy {
            Switch { begun: true, taken, .. } => !taken,
            _ => self.config.handover == Handover::Shut,
        }
    }
}
