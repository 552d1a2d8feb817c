//! When a wait ends early: at a deadline, by a cancel flag, or both.
//!
//! Every wait of this crate takes a [`Stop`] and checks it at least every [`TICK`], so a cancel is noticed in well
//! under 100 ms whatever the peer or the device does.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest uninterrupted wait.
pub const TICK: Duration = Duration::from_millis(40);

/// A flag that ends waits in other threads. Clones share it.
#[derive(Clone, Default)]
pub struct Cancel {
    flag: Arc<AtomicBool>,
    watched: Option<Arc<dyn Fn() -> bool + Send + Sync>>,
}

impl fmt::Debug for Cancel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cancel({})", self.is_cancelled())
    }
}

impl Cancel {
    /// Also counts as cancelled once `watched` returns true; for an embedder with a cancel flag of its own. `watched`
    /// is called at least every [`TICK`] of a wait.
    pub fn watching(watched: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self { flag: Arc::default(), watched: Some(Arc::new(watched)) }
    }

    /// Ends every wait that checks this flag.
    pub fn cancel(&self) {
        self.flag.store(true, Ordering::Release);
    }

    /// True once [`cancel`](Self::cancel) was called, or the watched function returned true.
    pub fn is_cancelled(&self) -> bool {
        self.flag.load(Ordering::Acquire) || self.watched.as_ref().is_some_and(|watched| watched())
    }
}

impl From<Arc<AtomicBool>> for Cancel {
    /// Shares a flag the embedder already has; `true` means cancelled.
    fn from(flag: Arc<AtomicBool>) -> Self {
        Self { flag, watched: None }
    }
}

/// Why a wait ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stopped {
    /// The embedder asked for it.
    #[error("cancelled")]
    Cancelled,
    /// Time ran out.
    #[error("the deadline passed")]
    Deadline,
}

/// The bounds of a wait.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    deadline: Option<Instant>,
    cancel: Cancel,
}

impl Stop {
    /// Waits until `deadline` by the fabric's clock, or for ever if `None`, unless `cancel` is raised.
    pub fn new(deadline: Option<Instant>, cancel: Cancel) -> Self {
        Self { deadline, cancel }
    }

    /// The same cancel flag with a deadline `after` from `now`, unless this one's is sooner.
    pub fn within(&self, now: Instant, after: Duration) -> Self {
        let sooner = match (self.deadline, now.checked_add(after)) {
            (Some(ours), Some(theirs)) => Some(ours.min(theirs)),
            (ours, theirs) => ours.or(theirs),
        };
        Self { deadline: sooner, cancel: self.cancel.clone() }
    }

    /// # Errors
    ///
    /// The reason why the wait ended. A cancel outranks a deadline.
    pub fn check(&self, now: Instant) -> Result<(), Stopped> {
        if self.cancel.is_cancelled() {
            return Err(Stopped::Cancelled);
        }
        match self.deadline {
            Some(deadline) if now >= deadline => Err(Stopped::Deadline),
            _ => Ok(()),
        }
    }

    /// How long to sleep before the next check: at most [`TICK`], and not beyond the deadline.
    pub fn slice(&self, now: Instant) -> Duration {
        self.deadline.map_or(TICK, |deadline| deadline.saturating_duration_since(now).min(TICK))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r49_a_wait_ends_by_flag_or_by_time_and_never_sleeps_longer_than_a_tick() {
        let now = Instant::now();
        let cancel = Cancel::default();
        let stop = Stop::new(Some(now + Duration::from_secs(5)), cancel.clone());
        assert_eq!(stop.check(now), Ok(()));
        assert_eq!(stop.slice(now), TICK);
        assert_eq!(stop.slice(now + Duration::from_millis(4990)), Duration::from_millis(10));
        assert_eq!(stop.check(now + Duration::from_secs(5)), Err(Stopped::Deadline));
        let sooner = stop.within(now, Duration::from_secs(1));
        assert_eq!(sooner.check(now + Duration::from_secs(1)), Err(Stopped::Deadline));
        cancel.cancel();
        assert_eq!(sooner.check(now), Err(Stopped::Cancelled));
        assert!(TICK < Duration::from_millis(100));
    }

    #[test]
    fn a_flag_of_the_embedder_counts_too() {
        let theirs = Arc::new(AtomicBool::new(false));
        let watched = Arc::clone(&theirs);
        for cancel in
            [Cancel::from(Arc::clone(&theirs)), Cancel::watching(move || watched.load(Ordering::Relaxed))]
        {
            theirs.store(false, Ordering::Relaxed);
            assert!(!cancel.is_cancelled());
            theirs.store(true, Ordering::Relaxed);
            assert!(cancel.is_cancelled());
        }
    }
}
