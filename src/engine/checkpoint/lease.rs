//! The lease of a source: until when its guest may run, and when its standby may start it.
//!
//! ```text
//! source                                          standby
//! asks at s                                  ->   gets it at r, which is not before s
//!                                                 starts no guest before r + wait
//! may run until s + time                     <-   grants it
//! ```
//!
//! Each side counts on its own clock, and only intervals. The standby waits longer than the source may run, by more than
//! two clocks differ: a grant that comes late, comes twice or does not come changes nothing about that.

use std::time::Duration;

#[cfg(test)]
use super::CheckpointBreakage;

/// The standby waits longer than the lease by this part of it: clocks may differ by 5 %, each from true time.
const RATE_PART: u32 = 8;
/// A lease is asked for again after this part of its time.
const RENEWAL_PART: u32 = 4;

/// How long a source may run its guest without hearing of its standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseConfig {
    /// From when it asks.
    pub time: Duration,
    /// The part of that in which the guest is paused: it begins to be paused so long before the lease has run out.
    pub stop: Duration,
}

/// The lease as the source has it.
#[derive(Debug)]
pub(super) struct SourceLease {
    config: LeaseConfig,
    /// The one that was asked for last; from 1.
    number: u64,
    /// When it was asked for, while nothing has come.
    asked: Option<Duration>,
    next: Duration,
    until: Duration,
    /// The standby may have a checkpoint from which it could start.
    is_bound: bool,
    /// The guest is paused because there was no lease.
    is_fenced: bool,
    /// The standby never starts the guest.
    is_void: bool,
}

impl SourceLease {
    pub(super) fn new(config: LeaseConfig) -> Self {
        Self {
            config,
            number: 0,
            asked: None,
            next: Duration::ZERO,
            until: Duration::ZERO,
            is_bound: false,
            is_fenced: false,
            is_void: false,
        }
    }

    /// The number of the lease to ask for now, if it is time.
    pub(super) fn ask(&mut self, now: Duration) -> Option<u64> {
        if self.asked.is_some() || now < self.next {
            return None;
        }
        self.number += 1;
        self.asked = Some(now);
        self.next = now.saturating_add(self.config.time / RENEWAL_PART);
        Some(self.number)
    }

    /// When to ask again; `None` while nothing has come.
    pub(super) fn next(&self) -> Option<Duration> {
        self.asked.is_none().then_some(self.next)
    }

    /// The standby grants this one. False if it was not asked for.
    pub(super) fn granted(&mut self, number: u64) -> bool {
        let Some(asked) = self.asked.take_if(|_| number == self.number) else { return false };
        self.until = self.until.max(asked.saturating_add(self.config.time));
        true
    }

    /// Counts from the receipt of a grant.
    #[cfg(test)]
    pub(super) fn count_from(&mut self, now: Duration) {
        if let Some(asked) = &mut self.asked {
            *asked = now;
        }
    }

    /// From here on the standby may have a checkpoint.
    pub(super) fn bind(&mut self) {
        self.is_bound = true;
    }

    /// The standby never starts the guest.
    pub(super) fn free(&mut self) {
        self.is_void = true;
    }

    /// The guest may run only while the lease holds.
    pub(super) fn binds(&self) -> bool {
        self.is_bound && !self.is_void
    }

    /// When the lease has run out; `None`: the guest may run without it.
    pub(super) fn until(&self) -> Option<Duration> {
        self.binds().then_some(self.until)
    }

    /// When the guest begins to be paused.
    pub(super) fn fence_at(&self) -> Option<Duration> {
        self.until().map(|until| until.saturating_sub(self.config.stop))
    }

    /// The guest may run, and what it has sent may be let out.
    pub(super) fn holds(&self, now: Duration) -> bool {
        self.fence_at().is_none_or(|at| now < at)
    }

    pub(super) fn set_fenced(&mut self, is_fenced: bool) {
        self.is_fenced = is_fenced;
    }

    pub(super) fn is_fenced(&self) -> bool {
        self.is_fenced
    }
}

/// The lease as the standby has granted it.
#[derive(Debug, Default)]
pub(super) struct StandbyLease {
    /// The guest is to start here when it has run out.
    starts: bool,
    /// No guest starts here before, unless somebody says that the source is dead.
    until: Option<Duration>,
    has_run_out: bool,
    #[cfg(test)]
    breakage: CheckpointBreakage,
}

impl StandbyLease {
    pub(super) fn new(starts: bool) -> Self {
        Self { starts, ..Self::default() }
    }

    #[cfg(test)]
    pub(super) fn break_order(&mut self, breakage: CheckpointBreakage) {
        self.breakage = breakage;
    }

    /// The source asks for a lease of this `time`.
    pub(super) fn renew(&mut self, now: Duration, time: Duration) {
        let wait = time.saturating_add(time / RATE_PART);
        #[cfg(test)]
        let wait = match self.breakage {
            CheckpointBreakage::WaitLess => time / 2,
            CheckpointBreakage::WaitWithoutMargin => time,
            CheckpointBreakage::GrantUncounted if self.until.is_some() => return,
            _ => wait,
        };
        let until = now.saturating_add(wait);
        // One that was granted before may be longer.
        self.until = Some(self.until.map_or(until, |old| old.max(until)));
    }

    /// The guest is to start here for that.
    pub(super) fn run_out(&mut self) {
        self.has_run_out = true;
    }

    pub(super) fn has_run_out(&self) -> bool {
        self.has_run_out
    }

    /// When the guest is to start here, if nothing comes.
    pub(super) fn starts_at(&self) -> Option<Duration> {
        self.until.filter(|_| self.starts)
    }
}
