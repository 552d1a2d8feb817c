//! The source of a migration: rounds while the guest runs, one round while it stands still, and the one moment at which
//! ownership passes.
//!
//! ```text
//! start logs -> setup -> sync -> [ open round -> send slices -> close round -> sync ]*
//!   -> pause -> (hold) -> last sync -> last round -> drain -> state -> digest -> READY -> COMMIT -> RUNNING -> release
//! postcopy, from the last sync on:
//!   -> discards -> package without RUN -> COMMIT (RUN) -> [ send missing pages ]* -> taken -> end -> SHUT -> release
//! ```
//!
//! A relay waits in front of COMMIT until the guest's own source has given the guest to it.
//!
//! # Orders that must hold
//!
//! A failure or a cancel before COMMIT leads to [`Action::RollBack`], which gives unsent pages back to the
//! dirty map, takes logs and throttle off and lets the guest run on. After COMMIT there is no way back:
//! the guest never resumes here by itself, and a cancel is refused. Only a peer that says that it has not started the
//! guest gives it back.
//!
//! In postcopy what is dirty is discarded before RUN, and the end is said when nothing is dirty and the peer has said that
//! it took the guest.

mod config;
mod estimate;
mod postcopy;
mod steps;

use std::time::Duration;

use super::{Outcome, PageCost, Progress, RateWindow, Reason, Sent};
use crate::ram::RoundKind;
use crate::units::Rate;

pub use config::{OnTimeout, PostcopyRule, SourceConfig, Switchover};
pub use steps::{Action, Input};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    New,
    Starting,
    SettingUp,
    Syncing,
    Opening(RoundKind),
    Sending(RoundKind),
    Closing(RoundKind),
    Waiting,
    Pausing,
    Holding,
    LastSync,
    Draining,
    SendingState,
    Digesting,
    Discarding,
    Packaging,
    Filling,
    AwaitingTaken,
    EndingPostcopy,
    AwaitingReady,
    AwaitingGuest,
    Committing,
    AwaitingRunning,
    Releasing,
    RollingBack(Reason),
    Finished(Outcome),
}

/// The source's state machine.
#[derive(Debug)]
pub struct SourceEngine {
    config: SourceConfig,
    phase: Phase,
    round: u32,
    rate: RateWindow,
    cancelled: bool,
    upstream_stopped: bool,
    progress: Progress,
    round_began: Duration,
    /// Pages that the round began with, and bytes that left in it.
    round_pages: u64,
    round_bytes: u64,
    page_cost: PageCost,
    deltas: bool,
    under_way: u64,
    /// What was sent behind the last slice of the round.
    sent_at_fence: Sent,
    gave_up: bool,
    postcopy: postcopy::Switch,
}

impl SourceEngine {
    /// Nothing has begun.
    pub fn new(config: SourceConfig) -> Self {
        Self {
            config,
            phase: Phase::New,
            round: 0,
            rate: RateWindow::default(),
            cancelled: false,
            upstream_stopped: false,
            progress: Progress::default(),
            round_began: Duration::ZERO,
            round_pages: 0,
            round_bytes: 0,
            page_cost: PageCost::default(),
            deltas: false,
            under_way: 0,
            sent_at_fence: Sent::default(),
            gave_up: false,
            postcopy: postcopy::Switch::default(),
        }
    }

    /// Says when the guest is paused; before [`Input::Begin`].
    pub fn set_switchover(&mut self, switchover: Switchover) {
        self.config.switchover = switchover;
    }

    /// Says how long the guest may stand still; may change while it runs, and counts from the next sync on.
    pub fn set_downtime_limit(&mut self, limit: Duration) {
        self.config.downtime_limit = limit;
    }

    /// Says when a round behind the first is cut; may change while it runs.
    pub fn set_longest_round(&mut self, time: Option<Duration>) {
        self.config.longest_round = time;
    }

    /// Says what part of the downtime is spent whatever is dirty; may change while it runs.
    pub fn set_fixed_downtime(&mut self, time: Duration) {
        self.config.fixed_downtime = time;
    }

    /// Says how much device state there will be; may change while it runs.
    pub fn set_state_bytes(&mut self, bytes: u64) {
        self.config.state_bytes = bytes;
    }

    /// Says whether pages travel as differences: a dirty one then need not take its whole length.
    pub fn set_deltas(&mut self, deltas: bool) {
        self.deltas = deltas;
    }

    /// Says how many bytes have been sent and not left this host: pages that are sent next wait for them.
    pub fn set_under_way(&mut self, bytes: u64) {
        self.under_way = bytes;
    }

    /// Says what was sent while the round was closed: on links with threads of their own often all of it.
    pub fn set_sent_at_fence(&mut self, sent: Sent) {
        self.sent_at_fence = sent;
    }

    /// What the rounds so far brought.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// The time that was given, if the migration ended because it was over.
    pub fn gave_up_after(&self) -> Option<Duration> {
        self.config.timeout.filter(|_| self.gave_up).map(|(time, _)| time)
    }

    /// Asks for the end. `false` if ownership has passed: then the migration runs to its end.
    pub fn cancel(&mut self) -> bool {
        if self.is_committed() {
            return false;
        }
        self.cancelled = true;
        true
    }

    /// True from the moment COMMIT may have left.
    pub fn is_committed(&self) -> bool {
        matches!(
            self.phase,
            Phase::Committing
                | Phase::Filling
                | Phase::AwaitingTaken
                | Phase::EndingPostcopy
                | Phase::AwaitingRunning
                | Phase::Releasing
                | Phase::Finished(Outcome::Completed | Outcome::InDoubt | Outcome::Incomplete)
        )
    }

    /// The round under way, 0 before the first.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// The measured rate of the page path, in bytes on the wire.
    pub fn rate(&self) -> Option<Rate> {
        self.rate.wire()
    }

    /// Takes a fact, answers with what to do. `now` counts from the start of the migration.
    ///
    /// After [`Action::Finish`] every input is answered with the same outcome.
    pub fn handle(&mut self, now: Duration, input: Input) -> Action {
        if let Some(action) = self.interrupted(input) {
            return action;
        }
        match (self.phase, input) {
            (Phase::New, Input::Begin) => self.go(Phase::Starting, Action::StartLogs),
            (Phase::Starting, Input::Done) => self.go(Phase::SettingUp, Action::SendSetup),
            (Phase::SettingUp, Input::SetUp { handover }) => {
                self.config.handover = handover;
                self.go(Phase::Syncing, Action::Sync { last: false })
            }
            (Phase::Syncing, Input::Synced { dirty_pages }) => self.round_or_pause(now, dirty_pages),
            (Phase::Opening(kind), Input::Done) => {
                self.round_began = now;
                self.rate.resume(self.under_way, now);
                self.send(kind, now)
            }
            (Phase::Sending(kind), Input::Sent { pages_left, sent }) => {
                self.rate.add(sent, self.under_way, now);
                self.round_bytes += sent.wire;
                if kind == RoundKind::Live && self.must_give_up(now) {
                    return self.give_up();
                }
                if pages_left > 0 && !self.is_cut(kind, now) {
                    return self.send(kind, now);
                }
                if self.round > 1 {
                    self.page_cost.round(self.round_pages.saturating_sub(pages_left), self.round_bytes);
                }
                self.go(Phase::Closing(kind), Action::CloseRound { kind })
            }
            (Phase::Closing(RoundKind::Final), Input::Done) => self.go(Phase::Draining, Action::Drain),
            (Phase::Closing(_), Input::Done) => {
                self.rate.add(std::mem::take(&mut self.sent_at_fence), self.under_way, now);
                self.go(Phase::Syncing, Action::Sync { last: false })
            }
            (Phase::Waiting, Input::Woken { upstream_stopped }) => {
                self.upstream_stopped |= upstream_stopped;
                self.go(Phase::Syncing, Action::Sync { last: false })
            }
            (Phase::Pausing, Input::Done) if self.config.holds => self.go(Phase::Holding, Action::Hold),
            (Phase::Pausing | Phase::Holding, Input::Done) => {
                self.go(Phase::LastSync, Action::Sync { last: true })
            }
            (Phase::LastSync, Input::Synced { .. }) if self.postcopy.begun => {
                self.go(Phase::Discarding, Action::SendDiscards)
            }
            (Phase::LastSync, Input::Synced { .. }) => self.open(RoundKind::Final),
            (Phase::Discarding, Input::Done) => self.go(Phase::Packaging, Action::SendPackage),
            (Phase::Packaging, Input::Done) => self.commit(),
            (Phase::Committing, Input::Done) if self.postcopy.begun => self.send_missing(now),
            (Phase::Filling, Input::Filled { pages_left, taken }) => self.filled(now, pages_left, taken),
            (Phase::AwaitingTaken, Input::Running) => self.filled(now, 0, true),
            (Phase::EndingPostcopy, Input::Done) => self.go(Phase::AwaitingRunning, Action::AwaitRunning),
            (Phase::Draining, Input::Done) => self.go(Phase::SendingState, Action::SendState),
            (Phase::SendingState, Input::Done) if self.config.digest && self.config.handover.has_ready() => {
                self.go(Phase::Digesting, Action::SendDigest)
            }
            (Phase::SendingState | Phase::Digesting, Input::Done) => self.ready_or_commit(),
            (Phase::AwaitingReady, Input::Ready) => self.commit(),
            (Phase::AwaitingGuest, Input::Done) => self.go(Phase::Committing, Action::Commit),
            (Phase::Committing, Input::Done) => self.go(Phase::AwaitingRunning, Action::AwaitRunning),
            (Phase::AwaitingRunning, Input::Running) => self.go(Phase::Releasing, Action::Release),
            (Phase::Releasing, Input::Done | Input::Failed) => self.finish(Outcome::Completed),
            (Phase::RollingBack(reason), Input::Done | Input::Failed) => {
                self.finish(Outcome::StaysHere(reason))
            }
            (Phase::Finished(outcome), _) => Action::Finish(outcome),
            // Only our own driver can say something out of turn; what a peer sends is refused before.
            (phase, input) => {
                debug_assert!(false, "driver bug: {input:?} while {phase:?}");
                self.abandon(Reason::Failed)
            }
        }
    }

    /// Failures and cancels, which may come in any phase.
    fn interrupted(&mut self, input: Input) -> Option<Action> {
        match self.phase {
            Phase::RollingBack(_) | Phase::Releasing | Phase::Finished(_) => None,
            // A peer that answers the last byte, or the package, with an error status has not started the guest: nothing is
            // in doubt. In precopy a ramwire said READY before COMMIT, so its refusal after it proves nothing. Once a guest
            // was taken among missing pages nobody can give it back.
            _ if input == Input::Refused && self.refusal_gives_back() => {
                Some(self.go(Phase::RollingBack(Reason::Failed), Action::RollBack))
            }
            _ if self.cancelled && !self.is_committed() => Some(self.abandon(Reason::Cancelled)),
            _ if matches!(input, Input::Failed | Input::Refused) => Some(self.abandon(Reason::Failed)),
            _ => None,
        }
    }

    fn abandon(&mut self, reason: Reason) -> Action {
        if self.is_committed() {
            return self.finish(if self.postcopy.taken { Outcome::Incomplete } else { Outcome::InDoubt });
        }
        self.go(Phase::RollingBack(reason), Action::RollBack)
    }

    fn is_late(&self, now: Duration) -> bool {
        self.config.timeout.is_some_and(|(time, _)| now >= time)
    }

    fn must_pause(&self, now: Duration) -> bool {
        self.round > 0 && self.is_late(now) && matches!(self.config.timeout, Some((_, OnTimeout::Finish)))
    }

    fn must_give_up(&self, now: Duration) -> bool {
        self.is_late(now) && matches!(self.config.timeout, Some((_, OnTimeout::Cancel)))
    }

    fn give_up(&mut self) -> Action {
        self.gave_up = true;
        self.abandon(Reason::Failed)
    }

    /// True if a live round ends although pages are left. The first one goes on: it is what there is to move.
    fn is_cut(&self, kind: RoundKind, now: Duration) -> bool {
        let took = now.saturating_sub(self.round_began);
        let is_long = self.round > 1 && self.config.longest_round.is_some_and(|most| took >= most);
        kind == RoundKind::Live && (is_long || self.is_late(now) || self.switches_within_round(now))
    }

    fn round_or_pause(&mut self, now: Duration, dirty_pages: u64) -> Action {
        if self.postcopy.wanted {
            return self.switch_to_postcopy();
        }
        let fits = |engine: &Self, behind| engine.fits(engine.downtime_behind(behind, dirty_pages));
        let waits = self.config.switchover == Switchover::WhenItFits
            && !self.is_late(now)
            && !fits(self, self.under_way)
            && fits(self, 0);
        if waits {
            // The link is busy all the same; what is sent now would be written again before it leaves.
            return self.go(Phase::Waiting, Action::Wait { until: now + self.config.slice });
        }
        // A relay's rounds end when its guest's source says so.
        if self.round > 0 && self.config.switchover == Switchover::WhenItFits {
            self.progress.round(dirty_pages);
        }
        (self.round_pages, self.round_bytes) = (dirty_pages, 0);
        match self.config.switchover {
            _ if self.must_give_up(now) => self.give_up(),
            Switchover::WhenItFits if self.must_pause(now) => self.pause(),
            Switchover::WhenUpstreamStops if self.upstream_stopped => self.pause(),
            Switchover::WhenUpstreamStops if dirty_pages == 0 => {
                let until = now + self.config.slice;
                self.go(Phase::Waiting, Action::Wait { until })
            }
            Switchover::WhenItFits if fits(self, self.under_way) => self.pause(),
            Switchover::WhenItFits if self.switch_is_due(now) => self.switch_to_postcopy(),
            // A round of nothing gains nothing, whatever the estimate is.
            Switchover::WhenItFits if dirty_pages == 0 && self.under_way == 0 && self.round > 0 => {
                self.pause()
            }
            _ => self.open(RoundKind::Live),
        }
    }

    fn pause(&mut self) -> Action {
        self.go(Phase::Pausing, Action::PauseGuest)
    }

    fn open(&mut self, kind: RoundKind) -> Action {
        self.round += 1;
        self.go(Phase::Opening(kind), Action::OpenRound { kind, number: self.round })
    }

    fn send(&mut self, kind: RoundKind, now: Duration) -> Action {
        self.go(Phase::Sending(kind), Action::Send { until: now + self.config.slice })
    }

    fn ready_or_commit(&mut self) -> Action {
        if self.config.handover.has_ready() {
            return self.go(Phase::AwaitingReady, Action::AwaitReady);
        }
        self.commit()
    }

    /// Nobody gives away what is not theirs: a relay's guest first.
    fn commit(&mut self) -> Action {
        if self.config.switchover == Switchover::WhenUpstreamStops {
            return self.go(Phase::AwaitingGuest, Action::AwaitGuest);
        }
        self.go(Phase::Committing, Action::Commit)
    }

    fn finish(&mut self, outcome: Outcome) -> Action {
        self.go(Phase::Finished(outcome), Action::Finish(outcome))
    }

    fn go(&mut self, phase: Phase, action: Action) -> Action {
        self.phase = phase;
        action
    }
}

#[cfg(test)]
mod tests;
