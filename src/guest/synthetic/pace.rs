//! Keeps a writer at its rate and within its throttle limits.

use std::time::{Duration, Instant};

use crate::guest::vcpu_gate::{VcpuGate, WHOLE};
use crate::units::Rate;

/// A writer that fell behind its rate catches up at most this much.
const BURST: Duration = Duration::from_millis(20);
/// Shorter sleeps cost more than they save.
const NAP: Duration = Duration::from_millis(1);
/// A throttled writer runs and rests within this time.
const PERIOD: Duration = Duration::from_millis(10);

/// Keeps one writer at its rate and within its throttle. A writer with a rate models a vCPU that is always busy: the
/// throttle's share of its time is also taken from its rate.
#[derive(Debug)]
pub(super) struct Pace {
    writer: u32,
    rate: Option<Rate>,
    next: Instant,
    period: Instant,
}

impl Pace {
    /// `rate` is this writer's own.
    pub(super) fn new(writer: u32, rate: Option<Rate>) -> Self {
        let now = Instant::now();
        Self { writer, rate, next: now, period: now }
    }

    /// The writer was paused; it does not catch up.
    pub(super) fn restart(&mut self) {
        (self.next, self.period) = (Instant::now(), Instant::now());
    }

    /// True if an idle guest's writer must not write at all.
    pub(super) fn is_idle(&self) -> bool {
        self.rate == Some(Rate(0))
    }

    /// Sleeps as long as the rate and the throttle require after `bytes` were written.
    pub(super) fn wrote(&mut self, bytes: u64, gate: &VcpuGate) {
        let share = gate.run_share(self.writer as usize);
        let now = Instant::now();
        let Some(rate) = self.rate else {
            let Some(share) = share else { return };
            let run = PERIOD * share / WHOLE;
            if now.duration_since(self.period) >= run {
                gate.nap(PERIOD - run);
                self.period = Instant::now();
            }
            return;
        };
        let rate = share.map_or(rate, |share| Rate((rate.0 * u64::from(share) / u64::from(WHOLE)).max(1)));
        let cost = rate.time_for(bytes).unwrap_or(PERIOD);
        self.next = self.next.max(now.checked_sub(BURST).unwrap_or(now)) + cost;
        if let Some(early) = self.next.checked_duration_since(now).filter(|early| *early >= NAP) {
            gate.nap(early);
        }
    }

    /// Sleeps until the gate changes.
    pub(super) fn rest(&self, gate: &VcpuGate) {
        gate.nap(Duration::from_secs(3600));
    }
}
