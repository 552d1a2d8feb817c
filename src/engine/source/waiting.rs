//! Waits while there is no action: what the source waits for, until when, and what its arrival means.

use std::time::Duration;

use super::{Overdue, Phase, SourceAction, SourceEngine, SourceEvent, Switchover, Waiting};
use crate::engine::Reason;

impl SourceEngine {
    /// What the source waits for; `None` while there is an action, begun or not.
    pub fn waits_for(&self) -> Option<Waiting> {
        match self.phase {
            Phase::Waiting => Some(Waiting::Moment),
            Phase::Holding => Some(Waiting::Embedder),
            Phase::AwaitingReady { .. } => Some(Waiting::Ready),
            Phase::AwaitingGuest => Some(Waiting::Guest),
            Phase::AwaitingTaken => Some(Waiting::Taken),
            Phase::AwaitingRunning => Some(Waiting::Running),
            Phase::Listening => Some(Waiting::LateAnswer),
            _ => None,
        }
    }

    /// When the session is to return, by the engine's clock: from the current action, to the next [`poll`](Self::poll),
    /// or from its wait, with [`SourceEvent::Woken`]. `None`: when the action is done, or with the next event.
    pub fn wake_at(&self) -> Option<Duration> {
        if self.has_news() { Some(Duration::ZERO) } else { self.wake_at }
    }

    /// True if it is the peer's turn to send `event`. A message out of turn fails the migration.
    pub fn expects(&self, event: SourceEvent) -> bool {
        match event {
            SourceEvent::Ready => matches!(self.phase, Phase::AwaitingReady { .. }),
            SourceEvent::Running => matches!(self.phase, Phase::AwaitingRunning | Phase::Listening),
            SourceEvent::Taken | SourceEvent::Requested => self.postcopy.begun && self.is_committed(),
            _ => true,
        }
    }

    /// What did not come in time, if that is why the migration ended.
    pub fn overdue(&self) -> Option<Overdue> {
        self.overdue
    }

    /// The peer sent a message.
    pub(super) fn received(&mut self, now: Duration, event: SourceEvent) {
        match (self.phase, event) {
            (
                Phase::New
                | Phase::RollingBack(_)
                | Phase::Releasing
                | Phase::CheckingMemory
                | Phase::Finished(_),
                _,
            ) => {}
            _ if !self.expects(event) => self.abandon(Reason::Failed),
            (Phase::AwaitingReady { by }, SourceEvent::Working) => self.await_keepalive(now, by),
            (_, SourceEvent::Ready) => self.commit(),
            (_, SourceEvent::Running) => {
                self.overdue = None;
                self.go(Phase::Releasing, SourceAction::Release);
            }
            (_, SourceEvent::Taken) => self.taken(),
            _ => {}
        }
    }

    /// Another event has arrived that the source waits for, or may wait for later.
    pub(super) fn handle_waiting(&mut self, event: SourceEvent) {
        self.upstream_stopped |= event == SourceEvent::UpstreamStopped;
        match (self.phase, event) {
            (Phase::Waiting, SourceEvent::UpstreamStopped | SourceEvent::Woken) => {
                self.go(Phase::Syncing, SourceAction::Sync { last: false });
            }
            (Phase::Holding, SourceEvent::Continue) => {
                self.go(Phase::LastSync, SourceAction::Sync { last: true });
            }
            (Phase::AwaitingGuest, SourceEvent::GuestGiven) => {
                self.go(Phase::Committing, SourceAction::Commit);
            }
            (_, SourceEvent::Woken) => self.is_overdue(),
            _ => {}
        }
    }

    /// An answer of the peer did not come in time.
    fn is_overdue(&mut self) {
        let answers = self.config.answers;
        let overdue = match self.phase {
            Phase::AwaitingReady { by } if self.wake_at == Some(by) => Overdue::Ready(answers.ready),
            Phase::AwaitingReady { .. } => Overdue::Keepalive(answers.silence),
            Phase::AwaitingTaken => Overdue::Taken(answers.running),
            Phase::AwaitingRunning => Overdue::Running(answers.running),
            _ => return,
        };
        // A network that swallows what is sent tells nobody that it does.
        let silent = match overdue {
            Overdue::Keepalive(_) => true,
            Overdue::Running(_) if self.asks > 0 => {
                self.asks -= 1;
                true
            }
            _ => false,
        };
        if silent && !self.postcopy.begun && self.lose_connection() {
            return;
        }
        self.overdue = Some(overdue);
        let relays = self.config.switchover == Switchover::WhenUpstreamStops;
        if relays && matches!(overdue, Overdue::Running(_)) {
            // Its far end may only have been stalled.
            return self.go(Phase::Reporting, SourceAction::ReportSilence);
        }
        self.abandon(Reason::Failed);
    }

    pub(super) fn await_ready(&mut self, now: Duration) {
        let by = now + self.config.answers.ready;
        self.phase = Phase::AwaitingReady { by };
        self.await_keepalive(now, by);
    }

    fn await_keepalive(&mut self, now: Duration, by: Duration) {
        self.wake_at = Some(by.min(now + self.config.answers.silence));
    }

    /// Where the peer sends no RUNNING, the guest is taken to run.
    pub(super) fn await_running(&mut self, now: Duration) {
        if !self.config.handover.has_running() {
            return self.go(Phase::Releasing, SourceAction::Release);
        }
        self.wait(Phase::AwaitingRunning, Some(now + self.config.answers.running));
    }

    /// Nothing is to be done before an event.
    pub(super) fn wait(&mut self, phase: Phase, wake_at: Option<Duration>) {
        (self.phase, self.wake_at) = (phase, wake_at);
    }
}
