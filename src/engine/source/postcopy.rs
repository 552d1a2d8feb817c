//! The switch to postcopy: when it is due, and what follows.

use std::time::Duration;

use super::{
    BehindUrgent, OnTimeout, Phase, PostcopyRule, SourceAction, SourceEngine, Switchover, UrgentChannel,
};
use crate::engine::Handover;
use crate::ram::RoundKind;

/// Progress of a switch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Switch {
    /// Asked for by command.
    pub(super) wanted: bool,
    /// The guest is paused for it.
    pub(super) begun: bool,
    /// The peer has loaded the device state and reported that it takes over the guest.
    pub(super) taken: bool,
    /// A lost connection may be followed by another.
    pub(super) recoverable: bool,
}

impl SourceEngine {
    /// The switch is requested. No effect if postcopy was not announced to the peer, or if the guest is already paused.
    /// A slice in progress ends with its batch.
    pub(super) fn start_postcopy(&mut self) {
        let announced = self.config.postcopy.is_some();
        let runs = matches!(
            self.phase,
            Phase::New
                | Phase::Starting
                | Phase::Greeting
                | Phase::OpeningUrgent(BehindUrgent::SetUp)
                | Phase::SettingUp
                | Phase::Syncing
                | Phase::Opening(RoundKind::Live)
                | Phase::Sending(RoundKind::Live)
                | Phase::Closing(RoundKind::Live)
                | Phase::Waiting
        );
        self.postcopy.wanted |= runs && announced;
        match self.phase {
            _ if !self.postcopy.wanted => {}
            Phase::Waiting => self.go(Phase::Syncing, SourceAction::Sync { last: false }),
            Phase::Sending(RoundKind::Live) => self.wake_at = Some(Duration::ZERO),
            _ => {}
        }
    }

    /// True from the pause for postcopy on.
    pub fn is_postcopy(&self) -> bool {
        self.postcopy.begun
    }

    /// True if the rule requires the switch; a migration that converges is not switched.
    pub(super) fn switch_is_due(&self, now: Duration) -> bool {
        match self.config.postcopy {
            None => false,
            Some(PostcopyRule::AfterRounds(rounds)) if self.round.number >= rounds => true,
            Some(_) => self.switches_within_round(now),
        }
    }

    /// Conditions that need not wait for the end of a round.
    pub(super) fn switches_within_round(&self, now: Duration) -> bool {
        let timed_out = self.is_late(now) && matches!(self.config.timeout, Some((_, OnTimeout::Postcopy)));
        match self.config.postcopy {
            None => false,
            Some(PostcopyRule::AfterTime(time)) if now >= time => true,
            Some(_) => self.postcopy.wanted || timed_out,
        }
    }

    pub(super) fn switch_to_postcopy(&mut self) {
        self.open_urgent(UrgentChannel::Late, BehindUrgent::Pause);
    }

    pub(super) fn send_missing(&mut self, now: Duration) {
        self.go(Phase::Filling, SourceAction::SendMissing);
        self.wake_at = Some(now + self.config.slice);
    }

    /// The end may be sent once no page is left and the peer took over the guest: until then the peer may still return
    /// it.
    pub(super) fn filled(&mut self, now: Duration, pages_left: u64) {
        // A relay's session waits for pages and for the peer at once, and in doubt as long as an answer is of use.
        let relays = self.config.switchover == Switchover::WhenUpstreamStops;
        match (pages_left, self.postcopy.taken) {
            (0, true) => self.go(Phase::EndingPostcopy, SourceAction::EndPostcopy),
            (0, false) if !relays => self.wait(Phase::AwaitingTaken, Some(now + self.config.answers.running)),
            _ => self.send_missing(now),
        }
    }

    /// The peer has taken over the guest.
    pub(super) fn taken(&mut self) {
        self.postcopy.taken = true;
        if self.phase == Phase::AwaitingTaken {
            self.go(Phase::EndingPostcopy, SourceAction::EndPostcopy);
        }
    }

    /// True once the peer has reported that it takes over the guest.
    pub fn is_taken(&self) -> bool {
        self.postcopy.taken
    }

    /// True if a failure that the peer reports means that it has not started the guest.
    pub(super) fn refusal_gives_back(&self) -> bool {
        match self.postcopy {
            Switch { begun: true, taken, .. } => !taken,
            _ => self.config.handover == Handover::Shut,
        }
    }
}
