//! Throttling of the guest, changes by the embedder, and the wait before the switchover.

use std::time::Duration;

use crate::engine::{Change, Throttler};
use crate::error::Remedy;
use crate::guest::state_size;
use crate::observe::{EventKind, NotConverging};
use crate::units::{Percent, RestShare};

use super::{ROUND_TIMEOUT, SourceSession};
use crate::session::callback::{named, quietly};
use crate::session::{Breakage, Error};

/// A relay's rounds never end by themselves; when the guest's RAM was sent this many times, its source does not
/// converge.
const RELAYED_TIMES: u64 = 4;

/// The part of the downtime that does not depend on dirty pages.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct FixedCosts {
    /// Both ends' digests.
    pub(super) digest: Duration,
    /// Time from a question to the peer's answer.
    pub(super) round_trip: Duration,
    /// The last live sync.
    pub(super) sync: Duration,
}

/// Whether the rounds converge, and the reaction.
pub(super) struct Convergence {
    pub(super) throttle: Throttler,
    pub(super) fixed: FixedCosts,
    /// It was reported that they do not.
    told: bool,
}

impl Convergence {
    pub(super) fn new(throttle: Throttler) -> Self {
        Self { throttle, fixed: FixedCosts::default(), told: false }
    }
}

impl SourceSession {
    /// A block list that was sent is valid to the end: a guest whose memory has changed since can't arrive.
    pub(super) fn check_layout(&self) -> Result<(), Error> {
        self.guest.memory.layout_change().map_or(Ok(()), |change| Err(change.into()))
    }

    /// Passes the known part of the downtime that does not depend on dirty pages to the engine's estimate.
    pub(super) fn estimate_fixed(&mut self) {
        let FixedCosts { digest, round_trip, sync } = self.convergence.fixed;
        // READY answers the digest, RUNNING answers COMMIT; a QEMU's SHUT answers the last byte.
        let answers = if self.driver.engine.handover().has_ready() {
            2
        } else {
            u32::from(self.driver.engine.handover().has_running())
        };
        self.driver.engine.set_fixed_downtime(digest + sync + round_trip * answers);
        self.driver.engine.set_deltas(self.wire.link.deltas().cache_size > 0);
        self.driver.engine.set_state_bytes(state_size(self.guest.control.as_mut()));
        self.driver.engine.set_unacknowledged(self.wire.link.unacknowledged());
    }

    /// Reports once that the rounds do not converge, with a remedy.
    pub(super) fn check_progress(&mut self) {
        let progress = self.driver.engine.progress();
        let travelling = self.guest.memory.table().travelling();
        let relayed = self.upstream.is_some() && self.figures.whole_bytes() / RELAYED_TIMES >= travelling;
        let stalled = progress.is_stalled() || relayed;
        self.figures.progress(progress.rounds_without_progress(), stalled);
        if stalled
            && !self.driver.engine.is_last_round()
            && !std::mem::replace(&mut self.convergence.told, true)
        {
            let now = self.figures.shared().snapshot();
            let figures = NotConverging {
                rounds: now.round_count(),
                remaining: now.remaining,
                written_per_second: now.dirty_pages_rate * now.page_size,
                sent_per_second: self.driver.engine.rate().map_or(0, |rate| rate.0),
                expected_downtime_ms: now.expected_downtime.filter(|_| !relayed),
                downtime_limit_ms: self.driver.control.downtime_limit().as_secs_f64() * 1e3,
            };
            tracing::warn!("the migration does not converge: {figures}; {}", Remedy::HelpConvergence);
            self.figures.shared().tell(EventKind::NotConverging(figures));
        }
    }

    /// Applies the embedder's changes. Called once a slice, and before the decision whether to pause the guest.
    pub(super) fn follow_control(&mut self) {
        self.driver.engine.set_downtime_limit(self.driver.control.downtime_limit());
        let means = self.driver.control.throttling();
        if self.driver.engine.is_last_round() || means == self.convergence.throttle.means() {
            return;
        }
        tracing::info!(?means, "the guest is slowed down by other means");
        self.driver.engine.set_longest_round(means.map(|_| ROUND_TIMEOUT));
        let (now, sent) = (self.driver.clock.now(), self.wire.position());
        match self.convergence.throttle.change(now, sent, means) {
            Change::Goes(Some(share)) => self.guest.control.throttle(share),
            Change::Goes(None) => {}
            Change::LetGo { vcpus } => {
                self.guest.control.throttle(Percent::default());
                for vcpu in 0..vcpus {
                    self.guest.control.throttle_vcpu(vcpu, RestShare::default());
                }
            }
        }
        self.figures.throttled(&self.convergence.throttle);
    }

    /// After a live sync that found `fresh` more pages: throttles the guest if it writes too much.
    pub(super) fn throttle(&mut self, fresh: u64) {
        let page = self.guest.memory.table().page().bytes();
        let (now, sent) = (self.driver.clock.now(), self.wire.position());
        if let Some(share) = self.convergence.throttle.synced(now, fresh * page, sent) {
            tracing::info!(percent = share.get(), "the guest writes too much: its vCPUs are slowed down");
            named("calling GuestControl::throttle", || self.guest.control.throttle(share));
        }
        self.figures.throttled(&self.convergence.throttle);
    }

    /// Keeps each vCPU near its quota, if there is one. Called once a slice.
    pub(super) fn throttle_vcpus(&mut self) {
        let now = self.driver.clock.now();
        if self.driver.engine.is_last_round() || !self.convergence.throttle.wants_vcpus(now) {
            return;
        }
        let page = self.guest.memory.table().page().bytes();
        let pages = self.guest.control.vcpu_dirty_pages();
        for (vcpu, rest) in self.convergence.throttle.vcpus(now, &pages, page) {
            self.guest.control.throttle_vcpu(vcpu, rest);
        }
        self.figures.throttled(&self.convergence.throttle);
    }

    /// Without a connection nothing is sent, however slowly the guest writes: it runs freely meanwhile.
    pub(super) fn lift_throttling(&mut self) {
        if self.breakage.is(Breakage::ThrottleWithoutConnection) {
            return;
        }
        self.unthrottle();
        self.figures.shared().update(|s| (s.throttle_percent, s.vcpu_rest_percentage) = (0, 0));
    }

    /// There is a connection again: the guest is throttled as it was.
    pub(super) fn take_up_throttling(&mut self) {
        self.convergence.throttle.resumed();
        let (share, rests) = (self.convergence.throttle.share(), self.convergence.throttle.rests());
        named("calling GuestControl::throttle", || {
            self.guest.control.throttle(share);
            rests.for_each(|(vcpu, rest)| self.guest.control.throttle_vcpu(vcpu, rest));
        });
        self.figures.throttled(&self.convergence.throttle);
    }

    /// Order 4: whatever the result, no throttling remains.
    pub(super) fn end_throttling(&mut self) {
        self.unthrottle();
        self.convergence.throttle = Throttler::new(None, self.settings.throttle_trigger_threshold);
    }

    fn unthrottle(&mut self) {
        let control = &mut self.guest.control;
        quietly("ending the throttling", || control.throttle(Percent::default()));
        for vcpu in 0..self.convergence.throttle.vcpu_count() {
            quietly("ending the throttling", || control.throttle_vcpu(vcpu, RestShare::default()));
        }
    }
}
