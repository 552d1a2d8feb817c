//! The source of a precopy migration: rounds while the guest runs, one round while it stands still, and
//! the one moment at which ownership passes.
//!
//! ```text
//! start logs -> setup -> sync -> [ open round -> send slices -> close round -> sync ]*
//!   -> pause -> last sync -> last round -> drain -> state -> digest -> READY -> COMMIT -> RUNNING -> release
//! ```
//!
//! A relay waits in front of COMMIT until the guest's own source has given the guest to it.
//!
//! # Orders that must hold
//!
//! A failure or a cancel before COMMIT leads to [`Action::Recover`], which gives unsent pages back to the
//! dirty map, takes logs and throttle off and lets the guest run on. After COMMIT there is no way back:
//! the guest never resumes here by itself, and a cancel is refused.

use std::time::Duration;

use super::{Handover, Outcome, RateWindow, Reason};
use crate::ram::RoundKind;
use crate::units::Rate;

/// When the guest is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switchover {
    /// When what is left fits the downtime limit at the measured rate.
    WhenItFits,
    /// When the guest's own source says that it stopped (a relay).
    WhenUpstreamStops,
}

/// What the source may do, and how long it may take.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Longest time the guest may stand still.
    pub downtime_limit: Duration,
    /// Part of it that is spent whatever is dirty: pause, device state, digest.
    pub fixed_downtime: Duration,
    /// Bytes of one target page.
    pub page_bytes: u64,
    /// Longest time between two looks at the clock, cancel and the peer.
    pub slice: Duration,
    /// When the guest is paused.
    pub switchover: Switchover,
    /// How ownership passes.
    pub handover: Handover,
    /// Whether a digest of RAM and state is compared before READY.
    pub digest: bool,
}

impl SourceConfig {
    /// 300 ms of downtime, slices of 50 ms, no digest.
    pub fn new(page_bytes: u64, handover: Handover) -> Self {
        Self {
            downtime_limit: Duration::from_millis(300),
            fixed_downtime: Duration::ZERO,
            page_bytes,
            slice: Duration::from_millis(50),
            switchover: Switchover::WhenItFits,
            handover,
            digest: false,
        }
    }
}

/// A fact told to the engine: the answer to its last [`Action`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Start.
    Begin,
    /// The action is done.
    Done,
    /// The setup is done; the peer turned out to be of this kind.
    SetUp {
        /// How ownership will pass.
        handover: Handover,
    },
    /// The dirty logs were merged.
    Synced {
        /// Pages dirty now.
        dirty_pages: u64,
    },
    /// A slice was sent.
    Sent {
        /// Pages still dirty in the map.
        pages_left: u64,
        /// Bytes that left in this slice.
        bytes: u64,
    },
    /// A wait ended.
    Woken {
        /// A relay's source has stopped its guest and sent its last page.
        upstream_stopped: bool,
    },
    /// The peer has everything, and it is equal.
    Ready,
    /// The guest runs at the peer.
    Running,
    /// The action failed, or the peer did.
    Failed,
    /// The peer says that it failed and that the guest does not run there.
    Refused,
}

/// What the session is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start the dirty logs; every page is dirty.
    StartLogs,
    /// Greet the peer, announce the blocks.
    SendSetup,
    /// Merge the dirty logs into the map.
    Sync {
        /// The guest is paused: nothing may be dirty after this but what the map says.
        last: bool,
    },
    /// Begin a round.
    OpenRound {
        /// Live or final.
        kind: RoundKind,
        /// 1 for the first.
        number: u32,
    },
    /// Send dirty pages until none is left or the time is there.
    Send {
        /// By the engine's clock.
        until: Duration,
    },
    /// End the round: nothing later overtakes it.
    CloseRound {
        /// Live or final.
        kind: RoundKind,
    },
    /// Nothing to send: wait for the guest's source.
    Wait {
        /// By the engine's clock.
        until: Duration,
    },
    /// Stop the guest.
    PauseGuest,
    /// Wait until no page is lent to kernel or NIC.
    Drain,
    /// Send the device state, all but the byte that commits.
    SendState,
    /// Make the digest and send it.
    SendDigest,
    /// Wait for the peer's READY.
    AwaitReady,
    /// A relay: the peer could take the guest; wait until the guest's own source gives it away.
    AwaitGuest,
    /// Give the guest away. From here on it is not ours.
    Commit,
    /// Wait for the peer's RUNNING.
    AwaitRunning,
    /// Success: logs off, memory may go.
    Release,
    /// Failure before COMMIT: unsent pages back into the map, logs off, guest runs.
    Recover,
    /// Nothing more to do.
    Finish(Outcome),
}

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
    LastSync,
    Draining,
    SendingState,
    Digesting,
    AwaitingReady,
    AwaitingGuest,
    Committing,
    AwaitingRunning,
    Releasing,
    Recovering(Reason),
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
        }
    }

    /// Says when the guest is paused; before [`Input::Begin`].
    pub fn set_switchover(&mut self, switchover: Switchover) {
        self.config.switchover = switchover;
    }

    /// Says what part of the downtime is spent whatever is dirty; may change while it runs.
    pub fn set_fixed_downtime(&mut self, time: Duration) {
        self.config.fixed_downtime = time;
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
                | Phase::AwaitingRunning
                | Phase::Releasing
                | Phase::Finished(Outcome::Completed | Outcome::InDoubt)
        )
    }

    /// The round under way, 0 before the first.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// The measured rate of the page path.
    pub fn rate(&self) -> Option<Rate> {
        self.rate.rate()
    }

    /// How long the guest would stand still if it were paused with `dirty_pages`; `None` before a rate is
    /// known.
    pub fn expected_downtime(&self, dirty_pages: u64) -> Option<Duration> {
        let bytes = dirty_pages.saturating_mul(self.config.page_bytes);
        let sending = if bytes == 0 { Duration::ZERO } else { self.rate()?.time_for(bytes)? };
        Some(self.config.fixed_downtime.saturating_add(sending))
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
                self.rate.restart(now);
                self.send(kind, now)
            }
            (Phase::Sending(kind), Input::Sent { pages_left, bytes }) => {
                self.rate.add(bytes, now);
                if pages_left > 0 {
                    return self.send(kind, now);
                }
                self.go(Phase::Closing(kind), Action::CloseRound { kind })
            }
            (Phase::Closing(RoundKind::Final), Input::Done) => self.go(Phase::Draining, Action::Drain),
            (Phase::Closing(_), Input::Done) => {
                self.rate.restart(now);
                self.go(Phase::Syncing, Action::Sync { last: false })
            }
            (Phase::Waiting, Input::Woken { upstream_stopped }) => {
                self.upstream_stopped |= upstream_stopped;
                self.go(Phase::Syncing, Action::Sync { last: false })
            }
            (Phase::Pausing, Input::Done) => self.go(Phase::LastSync, Action::Sync { last: true }),
            (Phase::LastSync, Input::Synced { .. }) => self.open(RoundKind::Final),
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
            (Phase::Recovering(reason), Input::Done | Input::Failed) => {
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
            Phase::Recovering(_) | Phase::Releasing | Phase::Finished(_) => None,
            // A QEMU that answers the last byte with an error status has not started the guest: nothing is
            // in doubt. A ramwire said READY before COMMIT, so its refusal after it proves nothing.
            _ if input == Input::Refused && self.config.handover == Handover::Shut => {
                Some(self.go(Phase::Recovering(Reason::Failed), Action::Recover))
            }
            _ if self.cancelled && !self.is_committed() => Some(self.abandon(Reason::Cancelled)),
            _ if matches!(input, Input::Failed | Input::Refused) => Some(self.abandon(Reason::Failed)),
            _ => None,
        }
    }

    fn abandon(&mut self, reason: Reason) -> Action {
        if self.is_committed() {
            return self.finish(Outcome::InDoubt);
        }
        self.go(Phase::Recovering(reason), Action::Recover)
    }

    fn round_or_pause(&mut self, now: Duration, dirty_pages: u64) -> Action {
        match self.config.switchover {
            Switchover::WhenUpstreamStops if self.upstream_stopped => self.pause(),
            Switchover::WhenUpstreamStops if dirty_pages == 0 => {
                let until = now + self.config.slice;
                self.go(Phase::Waiting, Action::Wait { until })
            }
            Switchover::WhenItFits if self.fits(dirty_pages) => self.pause(),
            _ => self.open(RoundKind::Live),
        }
    }

    /// True if pausing now keeps the limit. Before the first round nothing has been sent: never.
    ///
    /// Where the fixed part alone exceeds the limit no amount of rounds helps; a tenth of the limit is then
    /// left for pages, and the report tells by how much the limit was missed.
    fn fits(&self, dirty_pages: u64) -> bool {
        let limit = self.config.downtime_limit;
        let limit = limit.max(self.config.fixed_downtime.saturating_add(limit / 10));
        self.round > 0 && self.expected_downtime(dirty_pages).is_some_and(|expected| expected <= limit)
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
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    fn engine() -> SourceEngine {
        SourceEngine::new(SourceConfig::new(PAGE, Handover::Native))
    }

    /// Walks an engine to its first sync, at time zero.
    fn started(mut engine: SourceEngine) -> SourceEngine {
        assert_eq!(engine.handle(Duration::ZERO, Input::Begin), Action::StartLogs);
        assert_eq!(engine.handle(Duration::ZERO, Input::Done), Action::SendSetup);
        let set_up = Input::SetUp { handover: engine.config.handover };
        assert_eq!(engine.handle(Duration::ZERO, set_up), Action::Sync { last: false });
        engine
    }

    fn one_round(engine: &mut SourceEngine, from_ms: u64, pages: u64, took_ms: u64) {
        let ms = Duration::from_millis;
        let open = engine.handle(ms(from_ms), Input::Synced { dirty_pages: pages });
        assert!(matches!(open, Action::OpenRound { kind: RoundKind::Live, .. }), "{open:?}");
        assert!(matches!(engine.handle(ms(from_ms), Input::Done), Action::Send { .. }));
        let sent = Input::Sent { pages_left: 0, bytes: pages * PAGE };
        let close = engine.handle(ms(from_ms + took_ms), sent);
        assert_eq!(close, Action::CloseRound { kind: RoundKind::Live });
        assert_eq!(engine.handle(ms(from_ms + took_ms), Input::Done), Action::Sync { last: false });
    }

    #[test]
    fn pauses_when_the_rest_fits_the_downtime() {
        let mut engine = started(engine());
        one_round(&mut engine, 0, 100_000, 1000);
        one_round(&mut engine, 1000, 30_001, 1000 * 30_001 / 100_000);
        assert_eq!(
            engine.handle(Duration::from_secs(2), Input::Synced { dirty_pages: 29_000 }),
            Action::PauseGuest
        );
    }

    #[test]
    fn the_fixed_part_counts_and_never_blocks_for_ever() {
        let mut config = SourceConfig::new(PAGE, Handover::Native);
        config.fixed_downtime = Duration::from_millis(200);
        let mut engine = started(SourceEngine::new(config));
        one_round(&mut engine, 0, 100_000, 1000);
        one_round(&mut engine, 1000, 10_500, 105);
        let rest = Input::Synced { dirty_pages: 9_900 };
        assert_eq!(engine.handle(Duration::from_secs(2), rest), Action::PauseGuest);

        let mut config = SourceConfig::new(PAGE, Handover::Native);
        config.fixed_downtime = Duration::from_secs(9);
        let mut engine = started(SourceEngine::new(config));
        one_round(&mut engine, 0, 100_000, 1000);
        one_round(&mut engine, 1000, 3_500, 35);
        let rest = Input::Synced { dirty_pages: 2_900 };
        assert_eq!(engine.handle(Duration::from_secs(2), rest), Action::PauseGuest);
    }

    /// Every path of a native migration after the pause, with a failure and a cancel at each step.
    #[test]
    fn before_commit_the_guest_stays_after_it_never_resumes() {
        let steps = [
            (Input::Done, Action::Sync { last: true }),
            (Input::Synced { dirty_pages: 1 }, Action::OpenRound { kind: RoundKind::Final, number: 2 }),
            (Input::Done, Action::Send { until: Duration::from_millis(50) }),
            (Input::Sent { pages_left: 0, bytes: PAGE }, Action::CloseRound { kind: RoundKind::Final }),
            (Input::Done, Action::Drain),
            (Input::Done, Action::SendState),
            (Input::Done, Action::SendDigest),
            (Input::Done, Action::AwaitReady),
            (Input::Ready, Action::Commit),
            (Input::Done, Action::AwaitRunning),
            (Input::Running, Action::Release),
            (Input::Done, Action::Finish(Outcome::Completed)),
        ];
        let committed = 8;
        for fault_at in 0..=steps.len() {
            for cancel in [false, true] {
                let mut config = SourceConfig::new(PAGE, Handover::Native);
                config.digest = true;
                let mut engine = started(SourceEngine::new(config));
                one_round(&mut engine, 0, 100, 0);
                engine.handle(Duration::ZERO, Input::Synced { dirty_pages: 0 });
                for (input, action) in &steps[..fault_at] {
                    assert_eq!(engine.handle(Duration::ZERO, *input), *action);
                }
                let refused = cancel && !engine.cancel();
                assert_eq!(refused, cancel && fault_at > committed, "step {fault_at}");
                if refused || fault_at > committed + 2 {
                    continue;
                }
                let input = if cancel { Input::Done } else { Input::Failed };
                let reason = if cancel { Reason::Cancelled } else { Reason::Failed };
                let action = engine.handle(Duration::ZERO, input);
                if fault_at > committed {
                    assert_eq!(action, Action::Finish(Outcome::InDoubt), "step {fault_at}");
                    continue;
                }
                assert_eq!(action, Action::Recover, "step {fault_at}");
                let end = Action::Finish(Outcome::StaysHere(reason));
                assert_eq!(engine.handle(Duration::ZERO, Input::Done), end);
                assert_eq!(engine.handle(Duration::ZERO, Input::Running), end);
            }
        }
    }

    #[test]
    fn a_step_that_fails_after_a_cancel_was_cancelled() {
        let mut engine = started(engine());
        assert!(engine.cancel());
        assert_eq!(engine.handle(Duration::ZERO, Input::Failed), Action::Recover);
        let end = Action::Finish(Outcome::StaysHere(Reason::Cancelled));
        assert_eq!(engine.handle(Duration::ZERO, Input::Done), end);
    }

    #[test]
    fn a_relay_waits_for_its_source_and_pauses_only_then() {
        let mut config = SourceConfig::new(PAGE, Handover::Shut);
        config.switchover = Switchover::WhenUpstreamStops;
        let mut engine = started(SourceEngine::new(config));
        let nothing = Input::Synced { dirty_pages: 0 };
        assert!(matches!(engine.handle(Duration::ZERO, nothing), Action::Wait { .. }));
        let woken = Input::Woken { upstream_stopped: false };
        assert_eq!(engine.handle(Duration::ZERO, woken), Action::Sync { last: false });
        one_round(&mut engine, 0, 10, 10);
        assert!(matches!(engine.handle(Duration::ZERO, nothing), Action::Wait { .. }));
        engine.handle(Duration::ZERO, Input::Woken { upstream_stopped: true });
        assert_eq!(engine.handle(Duration::ZERO, Input::Synced { dirty_pages: 5 }), Action::PauseGuest);
    }

    #[test]
    fn a_qemu_gets_no_ready_and_its_last_byte_commits() {
        let mut engine = started(SourceEngine::new(SourceConfig::new(PAGE, Handover::Shut)));
        one_round(&mut engine, 0, 100, 10);
        let mut inputs = vec![Input::Synced { dirty_pages: 0 }, Input::Done];
        inputs.extend([Input::Synced { dirty_pages: 0 }, Input::Done]);
        inputs.extend([Input::Sent { pages_left: 0, bytes: 0 }, Input::Done, Input::Done]);
        for input in inputs {
            engine.handle(Duration::ZERO, input);
        }
        assert!(!engine.is_committed());
        assert_eq!(engine.handle(Duration::ZERO, Input::Done), Action::Commit);
        assert!(engine.is_committed());
        assert_eq!(engine.handle(Duration::ZERO, Input::Done), Action::AwaitRunning);
        assert_eq!(engine.handle(Duration::ZERO, Input::Refused), Action::Recover, "it has not started");
    }
}
