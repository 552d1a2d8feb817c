//! The source of a precopy migration: rounds while the guest runs, one round while it stands still, and
//! the one moment at which ownership passes.
//!
//! ```text
//! start logs -> setup -> sync -> [ open round -> send slices -> close round -> sync ]*
//!   -> pause -> (hold) -> last sync -> last round -> drain -> state -> digest -> READY -> COMMIT -> RUNNING -> release
//! ```
//!
//! A relay waits in front of COMMIT until the guest's own source has given the guest to it.
//!
//! # Orders that must hold
//!
//! A failure or a cancel before COMMIT leads to [`Action::RollBack`], which gives unsent pages back to the
//! dirty map, takes logs and throttle off and lets the guest run on. After COMMIT there is no way back:
//! the guest never resumes here by itself, and a cancel is refused.

use std::time::Duration;

use super::{Handover, Outcome, PageCost, Progress, RateWindow, Reason, Sent};
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

/// What becomes of a migration that has not come to its switchover in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// It ends; the guest stays.
    #[default]
    Cancel,
    /// The guest is paused and moves, however long it then stands still.
    Finish,
}

/// What the source may do, and how long it may take.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Longest time the guest may stand still.
    pub downtime_limit: Duration,
    /// Part of it that is spent whatever is dirty: the last sync, the digest, the peer's answers.
    pub fixed_downtime: Duration,
    /// Bytes of device state, about, that are sent while the guest stands still.
    pub state_bytes: u64,
    /// What the link will carry while the guest stands still; `None`: what was measured.
    pub switchover_rate: Option<Rate>,
    /// When the guest must have been paused, from the start, and what becomes of the migration else.
    pub timeout: Option<(Duration, OnTimeout)>,
    /// A round behind the first that lasts longer is cut, so that the guest's writing is seen.
    pub longest_round: Option<Duration>,
    /// The paused guest waits for its embedder before its last pages are sent.
    pub holds: bool,
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
            state_bytes: 0,
            switchover_rate: None,
            timeout: None,
            longest_round: None,
            holds: false,
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
        /// What was handed to the connection in this slice.
        sent: Sent,
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
    /// Nothing to send: wait for the guest's source, or for what is under way to leave.
    Wait {
        /// By the engine's clock.
        until: Duration,
    },
    /// Stop the guest.
    PauseGuest,
    /// The guest stands still: wait until the embedder lets the migration go on.
    Hold,
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
    RollBack,
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
    Holding,
    LastSync,
    Draining,
    SendingState,
    Digesting,
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

    /// Says what was sent while the round was closed: on doors with threads of their own often all of it.
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
                | Phase::AwaitingRunning
                | Phase::Releasing
                | Phase::Finished(Outcome::Completed | Outcome::InDoubt)
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

    /// How long the guest would stand still if it were paused with `dirty_pages`; `None` before a rate is
    /// known.
    pub fn expected_downtime(&self, dirty_pages: u64) -> Option<Duration> {
        self.downtime_behind(self.under_way, dirty_pages)
    }

    fn downtime_behind(&self, under_way: u64, dirty_pages: u64) -> Option<Duration> {
        let pages = self.time_of_pages(dirty_pages)?;
        let waiting = if under_way > 0 { self.wire_rate()?.time_for(under_way)? } else { Duration::ZERO };
        Some(self.unavoidable().saturating_add(pages).saturating_add(waiting))
    }

    /// Pages are reckoned by their own length, and so is their rate: whether they compress is part of it. Differences are
    /// reckoned by what they took on the wire.
    fn time_of_pages(&self, dirty_pages: u64) -> Option<Duration> {
        let page = self.config.page_bytes;
        match dirty_pages {
            0 => Some(Duration::ZERO),
            _ if self.deltas => self.wire_rate()?.time_for(self.page_cost.bytes(dirty_pages, page)),
            _ => {
                let rate = self.config.switchover_rate.or(self.rate.guest()).or(self.rate.wire());
                rate?.time_for(dirty_pages.saturating_mul(page))
            }
        }
    }

    /// What no round makes shorter: the fixed part, and the device state at the rate of the wire. It is not compressed, so
    /// where pages are that may be too long, and never too short.
    fn unavoidable(&self) -> Duration {
        let state = self.config.state_bytes;
        let state = self.wire_rate().filter(|_| state > 0).and_then(|rate| rate.time_for(state));
        self.config.fixed_downtime.saturating_add(state.unwrap_or_default())
    }

    fn wire_rate(&self) -> Option<Rate> {
        self.config.switchover_rate.or(self.rate.wire())
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
            // A QEMU that answers the last byte with an error status has not started the guest: nothing is
            // in doubt. A ramwire said READY before COMMIT, so its refusal after it proves nothing.
            _ if input == Input::Refused && self.config.handover == Handover::Shut => {
                Some(self.go(Phase::RollingBack(Reason::Failed), Action::RollBack))
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
        self.go(Phase::RollingBack(reason), Action::RollBack)
    }

    fn is_late(&self, now: Duration) -> bool {
        self.config.timeout.is_some_and(|(time, _)| now >= time)
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
        kind == RoundKind::Live && (is_long || self.is_late(now))
    }

    fn round_or_pause(&mut self, now: Duration, dirty_pages: u64) -> Action {
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
            Switchover::WhenItFits if self.is_late(now) && self.round > 0 => self.pause(),
            Switchover::WhenUpstreamStops if self.upstream_stopped => self.pause(),
            Switchover::WhenUpstreamStops if dirty_pages == 0 => {
                let until = now + self.config.slice;
                self.go(Phase::Waiting, Action::Wait { until })
            }
            Switchover::WhenItFits if fits(self, self.under_way) => self.pause(),
            // A round of nothing gains nothing, whatever the estimate is.
            Switchover::WhenItFits if dirty_pages == 0 && self.under_way == 0 && self.round > 0 => {
                self.pause()
            }
            _ => self.open(RoundKind::Live),
        }
    }

    /// True if pausing now keeps the limit. Before the first round nothing has been sent: never.
    ///
    /// Where what no round makes shorter (the fixed part, the device state) exceeds the limit alone, no amount of rounds
    /// helps; a tenth of the limit is then left for pages, and the report tells by how much the limit was missed.
    fn fits(&self, downtime: Option<Duration>) -> bool {
        let limit = self.config.downtime_limit;
        let limit = limit.max(self.unavoidable().saturating_add(limit / 10));
        self.round > 0 && downtime.is_some_and(|expected| expected <= limit)
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
