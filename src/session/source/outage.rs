//! How long a source goes on without a connection that carries anything.
//!
//! # Required order
//!
//! The time runs from the loss until something that was sent over the next connection is confirmed, and times add up until
//! a round is: connections that are agreed on and lost again for ever end the migration.

use std::time::{Duration, Instant};

/// Shortest and longest interval between two attempts to connect.
pub(super) const FIRST_RETRY_INTERVAL: Duration = Duration::from_millis(5);
const MAX_RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// Each of this many lost connections is followed by one attempt, even after the timeout.
const LATE_ATTEMPTS: u32 = 8;

/// A connection was lost, and possibly others after it, and no round was confirmed since.
pub(super) struct Loss {
    /// Since when nothing is confirmed; `None`: the present connection carries something.
    since: Option<Instant>,
    /// Time of the outages before.
    before: Duration,
    /// Pause before the next attempt. It grows with each attempt, even if one succeeds and the connection is lost again
    /// immediately: a listener that accepts and closes does not keep the source busy.
    pause: Duration,
    /// Number of attempts that may still be made after the timeout.
    late: u32,
    /// The fence with which the present connection began.
    first_fence: Option<u64>,
}

impl Loss {
    /// The first.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            since: Some(now),
            before: Duration::ZERO,
            pause: Duration::ZERO,
            late: LATE_ATTEMPTS,
            first_fence: None,
        }
    }

    /// Another connection was lost, or the same wait goes on.
    pub(super) fn again(&mut self, now: Instant) {
        self.since.get_or_insert(now);
    }

    /// How long nothing was confirmed, in all.
    pub(super) fn time(&self, now: Instant) -> Duration {
        self.before + self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// The ends go on over another connection. This fence was sent first on it; `None`: none is, and the connection counts as
    /// one that carries something.
    pub(super) fn replaced(&mut self, now: Instant, first_fence: Option<u64>) {
        self.first_fence = first_fence;
        if first_fence.is_none() {
            self.carries(now);
        }
    }

    /// The destination has confirmed a fence. True: a round is through, and what was before counts no more.
    pub(super) fn confirmed(&mut self, now: Instant, fence: u64) -> bool {
        let Some(first) = self.first_fence else { return false };
        if fence >= first {
            self.carries(now);
        }
        fence > first
    }

    fn carries(&mut self, now: Instant) {
        self.before = self.time(now);
        self.since = None;
    }

    /// How long to wait before the next attempt. The first attempt is immediate.
    pub(super) fn next_pause(&mut self) -> Duration {
        let longer = (self.pause * 2).clamp(FIRST_RETRY_INTERVAL, MAX_RETRY_INTERVAL);
        std::mem::replace(&mut self.pause, longer)
    }

    /// True if one more attempt may be made although the time is over.
    pub(super) fn takes_late_attempt(&mut self) -> bool {
        let may = self.late > 0;
        self.late = self.late.saturating_sub(1);
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn outages_add_up_until_a_round_is_confirmed() {
        let start = Instant::now();
        let at = |seconds| start + SECOND * seconds;
        let mut loss = Loss::new(start);
        assert_eq!(loss.time(at(2)), SECOND * 2);
        loss.replaced(at(2), Some(7));
        assert_eq!(loss.time(at(3)), SECOND * 3, "an agreement proves nothing");
        assert!(!loss.confirmed(at(3), 6) && !loss.confirmed(at(3), 7));
        assert_eq!(loss.time(at(60)), SECOND * 3, "it carries pages meanwhile");
        loss.again(at(60));
        assert_eq!(loss.time(at(64)), SECOND * 7);
        loss.replaced(at(64), Some(8));
        loss.again(at(66));
        assert_eq!(loss.time(at(66)), SECOND * 9, "agreed, and cut at once");
        loss.replaced(at(66), Some(9));
        assert!(loss.confirmed(at(67), 10), "a round is through");
    }

    #[test]
    fn behind_commit_an_agreement_is_all_there_is() {
        let start = Instant::now();
        let mut loss = Loss::new(start);
        loss.replaced(start + SECOND, None);
        assert_eq!(loss.time(start + SECOND * 9), SECOND);
        assert!(!loss.confirmed(start + SECOND, 3));
    }

    #[test]
    fn pauses_grow_and_late_attempts_end() {
        let mut loss = Loss::new(Instant::now());
        let pauses: Vec<_> = (0..9).map(|_| loss.next_pause().as_millis()).collect();
        assert_eq!(pauses, [0, 5, 10, 20, 40, 80, 160, 320, 500]);
        assert_eq!((0..20).filter(|_| loss.takes_late_attempt()).count(), LATE_ATTEMPTS as usize);
    }
}
