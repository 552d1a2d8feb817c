//! The source of a migration: rounds while the guest runs, one round while it is paused, and the one moment at which
//! ownership passes.
//!
//! ```text
//! start logs -> header -> setup -> sync -> [ open round -> send slices -> close round -> sync ]*
//!   -> pause -> (hold) -> last sync -> last round -> drain -> state -> digest -> READY -> COMMIT -> RUNNING -> release
//!   [ -> memory compared with what was sent ]
//! postcopy, from the last sync on:
//!   -> discards -> package without RUN -> COMMIT (RUN) -> [ send missing pages ]* -> taken -> end -> SHUT -> release
//! the connection lost after RUN:
//!   -> reconnect -> compare what was received -> resume -> [ send missing pages ]* ...
//! the connection lost before COMMIT, between two ramwires:
//!   [ -> guest runs on ] -> reconnect -> compare what was received -> sync -> ...
//! the connection lost between COMMIT and RUNNING, between two ramwires:
//!   -> reconnect -> ask -> RUNNING -> release
//! ```
//!
//! A connection for urgent pages is made after the header and the first bytes of each further connection, or before the
//! pause and before more pages are sent: that depends on the peer.
//!
//! A relay waits before COMMIT until the guest's own source has handed the guest over to it.
//!
//! # Orders that must hold
//!
//! A failure or a cancel before COMMIT leads to [`SourceAction::RollBack`], which gives unsent pages back to the dirty
//! map, stops logs and throttling and lets the guest continue. After COMMIT there is no way back: the guest never
//! resumes here by itself, and a cancel is refused. Only a peer that reports that it has not started the guest gives it
//! back. A connection that is lost before COMMIT and may be followed by another lets the guest continue as well, with its
//! logs on.
//!
//! In postcopy the dirty pages are discarded before RUN, and the end is sent when no page is dirty and the peer has
//! reported that it took the guest.
//!
//! # Inbox and outbox
//!
//! Events may arrive at any time, in any order: [`SourceEngine::handle`] takes each. One action at a time is taken from
//! [`SourceEngine::poll`] and answered by one event. An event that ends a migration does so at once: the answer that
//! the current action still gets is ignored, and [`SourceEngine::wake_at`] calls the session back from that action.

mod config;
mod estimate;
mod phase;
mod postcopy;
mod recovery;
mod steps;
mod urgent;
mod waiting;

use std::time::Duration;

use super::{Handover, Outcome, Progress, Reason, Sent};
use crate::ram::RoundKind;
use crate::units::Rate;

pub use config::{AnswerTimeouts, OnTimeout, PostcopyRule, SourceConfig, Switchover, UrgentChannel};
use estimate::PagePath;
pub use phase::Lost;
use phase::{BehindUrgent, LateCancel, Phase, Round};
pub use steps::{Overdue, SourceAction, SourceEvent, Waiting};

/// How often a peer is asked on another connection whether the guest runs, because it did not say so in time.
const MAX_ASKS: u32 = 3;

/// The source's state machine.
#[derive(Debug)]
pub struct SourceEngine {
    config: SourceConfig,
    phase: Phase,
    /// What to do next, until it is taken.
    outbox: Option<SourceAction>,
    /// An action was taken and not answered.
    busy: bool,
    wake_at: Option<Duration>,
    late_cancel: LateCancel,
    upstream_stopped: bool,
    round: Round,
    path: PagePath,
    progress: Progress,
    overdue: Option<Overdue>,
    postcopy: postcopy::Switch,
    /// The guest was asked to pause, and was not let run since.
    paused: bool,
    /// The peer waits for another connection where this one is lost.
    resumable: bool,
    /// How often a peer that does not say in time that the guest runs is asked on another connection.
    asks: u32,
}

impl SourceEngine {
    /// Nothing has begun.
    pub fn new(config: SourceConfig) -> Self {
        Self {
            config,
            phase: Phase::New,
            outbox: None,
            busy: false,
            wake_at: None,
            late_cancel: LateCancel::None,
            upstream_stopped: false,
            round: Round::default(),
            path: PagePath::default(),
            progress: Progress::default(),
            overdue: None,
            postcopy: postcopy::Switch::default(),
            paused: false,
            resumable: false,
            asks: MAX_ASKS,
        }
    }

    /// Sets when the guest is paused; before [`SourceEvent::Begin`].
    pub fn set_switchover(&mut self, switchover: Switchover) {
        self.config.switchover = switchover;
    }

    /// Sets the longest permitted downtime; may change while the guest runs, and applies from the next sync on.
    pub fn set_downtime_limit(&mut self, limit: Duration) {
        self.config.downtime_limit = limit;
    }

    /// Sets when a round after the first is cut; may change while the guest runs.
    pub fn set_longest_round(&mut self, time: Option<Duration>) {
        self.config.longest_round = time;
    }

    /// Sets the part of the downtime that does not depend on the dirty pages; may change while the guest runs.
    pub fn set_fixed_downtime(&mut self, time: Duration) {
        self.config.fixed_downtime = time;
    }

    /// Sets the size of the device state; may change while the guest runs.
    pub fn set_state_bytes(&mut self, bytes: u64) {
        self.config.state_bytes = bytes;
    }

    /// Sets whether pages are sent as differences: a dirty one then need not take its whole length.
    pub fn set_deltas(&mut self, deltas: bool) {
        self.path.deltas = deltas;
    }

    /// Sets how many bytes have been sent and not left this host: pages that are sent next wait for them.
    pub fn set_unacknowledged(&mut self, bytes: u64) {
        self.path.unacknowledged = bytes;
    }

    /// Sets how much was sent while the round was closed: on links with threads of their own often all of it.
    pub fn set_sent_at_fence(&mut self, sent: Sent) {
        self.round.at_fence = sent;
    }

    /// What the rounds so far brought.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// How ownership passes.
    pub fn handover(&self) -> Handover {
        self.config.handover
    }

    /// True from the moment COMMIT may have left.
    pub fn is_committed(&self) -> bool {
        self.phase.is_committed()
    }

    /// True in the round that is sent while the guest is paused.
    pub fn is_last_round(&self) -> bool {
        self.phase.is_last_round()
    }

    /// The current round, 0 before the first.
    pub fn round(&self) -> u32 {
        self.round.number
    }

    /// The measured rate of the page path, in bytes on the wire.
    pub fn rate(&self) -> Option<Rate> {
        self.path.rate.wire()
    }

    /// The next thing to do. `None`: the session waits for an event, until [`wake_at`](Self::wake_at).
    pub fn poll(&mut self) -> Option<SourceAction> {
        if self.late_cancel == LateCancel::Due {
            self.late_cancel = LateCancel::Refused;
            return Some(SourceAction::RefuseCancel);
        }
        if let Phase::Finished(outcome) = self.phase {
            return Some(SourceAction::Finish(outcome));
        }
        let action = self.outbox.take();
        self.busy |= action.is_some();
        action
    }

    /// True if [`poll`](Self::poll) has something that the session has not taken yet.
    fn has_news(&self) -> bool {
        let finished = matches!(self.phase, Phase::Finished(_));
        finished || self.outbox.is_some() || self.late_cancel == LateCancel::Due
    }

    /// Takes an event at any time. `now` counts from the start of the migration.
    pub fn handle(&mut self, now: Duration, event: SourceEvent) {
        use SourceEvent as E;
        match event {
            E::Begin if self.phase == Phase::New => self.go(Phase::Starting, SourceAction::StartLogs),
            E::Begin => {}
            E::Cancel => self.cancel(),
            E::StartPostcopy => self.start_postcopy(),
            E::Failed | E::Lost | E::Refused => self.failed(event),
            E::Working | E::Ready | E::Running | E::Taken | E::Requested => self.received(now, event),
            E::Woken | E::Continue | E::UpstreamStopped | E::GuestGiven => self.handle_waiting(event),
            E::Done | E::SetUp { .. } | E::Synced { .. } | E::Sent { .. } | E::Filled { .. } => {
                // Without a current action this is no answer: another event has ended the action.
                if std::mem::take(&mut self.busy) {
                    self.answered(now, event);
                }
            }
        }
    }

    /// The current action is done.
    fn answered(&mut self, now: Duration, answer: SourceEvent) {
        use {SourceAction as A, SourceEvent as E};
        match (self.phase, answer) {
            (Phase::Starting, E::Done) => self.go(Phase::Greeting, A::SendHeader),
            (Phase::Greeting, E::Done) => self.open_urgent(UrgentChannel::Early, BehindUrgent::SetUp),
            (Phase::OpeningUrgent(next), E::Done) => self.behind_urgent(next),
            (Phase::SettingUp, E::SetUp { handover }) => {
                self.config.handover = handover;
                self.go(Phase::Syncing, A::Sync { last: false });
            }
            (Phase::Syncing, E::Synced { dirty_pages }) => self.round_or_pause(now, dirty_pages),
            (Phase::Opening(kind), E::Done) => {
                self.round.began = now;
                self.path.rate.resume(self.path.unacknowledged, now);
                self.send(kind, now);
            }
            (Phase::Sending(kind), E::Sent { pages_left, sent }) => self.sent(kind, now, pages_left, sent),
            (Phase::Closing(RoundKind::Final), E::Done) => self.go(Phase::Draining, A::Drain),
            (Phase::Closing(_), E::Done) => {
                self.path.rate.add(std::mem::take(&mut self.round.at_fence), self.path.unacknowledged, now);
                self.go(Phase::Syncing, A::Sync { last: false });
            }
            (Phase::Pausing, E::Done) if self.config.holds => self.wait(Phase::Holding, None),
            (Phase::Pausing, E::Done) => self.go(Phase::LastSync, A::Sync { last: true }),
            (Phase::LastSync, E::Synced { .. }) if self.postcopy.begun => {
                self.go(Phase::Discarding, A::SendDiscards);
            }
            (Phase::LastSync, E::Synced { .. }) => self.open(RoundKind::Final),
            (Phase::Discarding, E::Done) => self.go(Phase::Packaging, A::SendPackage),
            (Phase::Packaging, E::Done) => self.commit(),
            (Phase::Committing, E::Done) if self.postcopy.begun => self.send_missing(now),
            (Phase::Filling, E::Filled { pages_left }) => self.filled(now, pages_left),
            (Phase::EndingPostcopy, E::Done) => self.await_running(now),
            (
                Phase::LettingRun
                | Phase::Reconnecting(_)
                | Phase::AskingReceived(_)
                | Phase::ComparingReceived(_)
                | Phase::ResumingPages,
                E::Done,
            ) => self.recovered(now),
            (Phase::Draining, E::Done) => self.go(Phase::SendingState, A::SendState),
            (Phase::SendingState, E::Done) if self.config.digest && self.config.handover.has_ready() => {
                self.go(Phase::Digesting, A::SendDigest);
            }
            (Phase::SendingState | Phase::Digesting, E::Done) if self.config.handover.has_ready() => {
                self.await_ready(now);
            }
            (Phase::SendingState | Phase::Digesting, E::Done) => self.commit(),
            (Phase::Committing, E::Done) => self.await_running(now),
            (Phase::Reporting, E::Done) => self.wait(Phase::Listening, None),
            (Phase::Releasing, E::Done) => self.released(),
            (Phase::CheckingMemory, _) => self.finish(Outcome::Completed),
            (Phase::RollingBack(reason), E::Done) => self.finish(Outcome::StaysHere(reason)),
            // The answer to something else: whether that was done is not known.
            _ => self.abandon(Reason::Failed),
        }
    }

    fn cancel(&mut self) {
        match self.phase {
            Phase::RollingBack(_) | Phase::Finished(_) => {}
            _ if !self.is_committed() => self.abandon(Reason::Cancelled),
            _ if self.late_cancel == LateCancel::None => self.late_cancel = LateCancel::Due,
            _ => {}
        }
    }

    /// The current action failed, or the peer did.
    fn failed(&mut self, event: SourceEvent) {
        let was_busy = std::mem::take(&mut self.busy);
        match self.phase {
            Phase::New | Phase::Finished(_) => {}
            // They are done as far as they can be, and not once more.
            Phase::Releasing if was_busy => self.released(),
            Phase::CheckingMemory if was_busy => self.finish(Outcome::Completed),
            Phase::RollingBack(reason) if was_busy => self.finish(Outcome::StaysHere(reason)),
            Phase::Releasing | Phase::CheckingMemory | Phase::RollingBack(_) => {}
            // A peer that answers the last byte, or the package, with an error status has not started the guest:
            // nothing is in doubt. In precopy a ramwire sent READY before COMMIT, so its refusal after COMMIT proves
            // nothing. Once a guest was taken among missing pages it can't be given back.
            _ if event == SourceEvent::Refused && self.refusal_gives_back() => {
                self.go(Phase::RollingBack(Reason::Failed), SourceAction::RollBack);
            }
            _ => {
                let goes_on = event == SourceEvent::Lost && self.lose_connection();
                if !goes_on {
                    self.abandon(Reason::Failed);
                }
            }
        }
    }

    /// The guest runs at the peer, and memory here is unchanged. The result of its check changes nothing about who has
    /// the guest.
    fn released(&mut self) {
        if self.config.memory_check && self.config.handover.has_ready() && !self.postcopy.begun {
            return self.go(Phase::CheckingMemory, SourceAction::CheckMemory);
        }
        self.finish(Outcome::Completed);
    }

    fn abandon(&mut self, reason: Reason) {
        match self.postcopy.taken {
            _ if !self.is_committed() => self.go(Phase::RollingBack(reason), SourceAction::RollBack),
            true => self.finish(Outcome::Incomplete),
            false => self.finish(Outcome::InDoubt),
        }
    }

    fn is_late(&self, now: Duration) -> bool {
        self.config.timeout.is_some_and(|(time, _)| now >= time)
    }

    fn must_pause(&self, now: Duration) -> bool {
        self.round.number > 0
            && self.is_late(now)
            && matches!(self.config.timeout, Some((_, OnTimeout::Finish)))
    }

    fn must_give_up(&self, now: Duration) -> bool {
        self.is_late(now) && matches!(self.config.timeout, Some((_, OnTimeout::Cancel)))
    }

    fn give_up(&mut self) {
        self.overdue = self.config.timeout.map(|(time, _)| Overdue::Switchover(time));
        self.abandon(Reason::Failed);
    }

    /// True if a live round ends although pages are left. The first round is never cut: it has all the pages to be
    /// sent.
    fn is_cut(&self, kind: RoundKind, now: Duration) -> bool {
        let took = now.saturating_sub(self.round.began);
        let is_long = self.round.number > 1 && self.config.longest_round.is_some_and(|most| took >= most);
        kind == RoundKind::Live && (is_long || self.is_late(now) || self.switches_within_round(now))
    }

    /// A slice was sent.
    fn sent(&mut self, kind: RoundKind, now: Duration, pages_left: u64, sent: Sent) {
        self.path.rate.add(sent, self.path.unacknowledged, now);
        self.round.bytes += sent.wire;
        if kind == RoundKind::Live && self.must_give_up(now) {
            return self.give_up();
        }
        if pages_left > 0 && !self.is_cut(kind, now) {
            return self.send(kind, now);
        }
        if self.round.number > 1 {
            self.path.page_cost.round(self.round.pages.saturating_sub(pages_left), self.round.bytes);
        }
        self.go(Phase::Closing(kind), SourceAction::CloseRound { kind });
    }

    fn round_or_pause(&mut self, now: Duration, dirty_pages: u64) {
        if self.postcopy.wanted {
            return self.switch_to_postcopy();
        }
        let fits = |engine: &Self, behind| engine.fits(engine.downtime_after(behind, dirty_pages));
        let until = Some(now + self.config.slice);
        let waits = self.config.switchover == Switchover::WhenItFits
            && !self.is_late(now)
            && !fits(self, self.path.unacknowledged)
            && fits(self, 0);
        if waits {
            // The link is busy in any case; pages sent now would be written again before they leave.
            return self.wait(Phase::Waiting, until);
        }
        // A relay's rounds end when its guest's source reports that it stopped the guest.
        if self.round.number > 0 && self.config.switchover == Switchover::WhenItFits {
            self.progress.round(dirty_pages);
        }
        (self.round.pages, self.round.bytes) = (dirty_pages, 0);
        match self.config.switchover {
            _ if self.must_give_up(now) => self.give_up(),
            Switchover::WhenItFits if self.must_pause(now) => self.pause(),
            Switchover::WhenUpstreamStops if self.upstream_stopped => self.pause(),
            Switchover::WhenUpstreamStops if dirty_pages == 0 => self.wait(Phase::Waiting, until),
            Switchover::WhenItFits if fits(self, self.path.unacknowledged) => self.pause(),
            Switchover::WhenItFits if self.switch_is_due(now) => self.switch_to_postcopy(),
            // A round without pages gains nothing, however the estimate is.
            Switchover::WhenItFits
                if dirty_pages == 0 && self.path.unacknowledged == 0 && self.round.number > 0 =>
            {
                self.pause();
            }
            _ => self.open(RoundKind::Live),
        }
    }

    fn pause(&mut self) {
        self.paused = true;
        self.go(Phase::Pausing, SourceAction::PauseGuest);
    }

    fn open(&mut self, kind: RoundKind) {
        self.round.number += 1;
        self.go(Phase::Opening(kind), SourceAction::OpenRound { kind, number: self.round.number });
    }

    fn send(&mut self, kind: RoundKind, now: Duration) {
        self.go(Phase::Sending(kind), SourceAction::Send);
        self.wake_at = Some(now + self.config.slice);
    }

    /// A guest must be owned before it is handed over: a relay first takes it from its source.
    fn commit(&mut self) {
        if self.config.switchover == Switchover::WhenUpstreamStops {
            return self.wait(Phase::AwaitingGuest, None);
        }
        self.go(Phase::Committing, SourceAction::Commit);
    }

    fn finish(&mut self, outcome: Outcome) {
        (self.phase, self.outbox, self.busy) = (Phase::Finished(outcome), None, false);
    }

    /// An action that was decided before and has not begun is dropped.
    fn go(&mut self, phase: Phase, action: SourceAction) {
        (self.phase, self.outbox, self.busy, self.wake_at) = (phase, Some(action), false, None);
    }
}

#[cfg(test)]
mod tests;
