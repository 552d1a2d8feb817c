//! What the threads of a VMM see of a lease.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::sys::since_boot;

/// Without a limit.
const FOREVER: u64 = u64::MAX;

/// Until when a protected guest may run at its source, and until when what it has sent to the network may be let out.
///
/// A VMM makes one for a VM and gives clones of it to the VM's threads and to each session that protects it
/// ([`CheckpointSession::with_lease`](super::CheckpointSession::with_lease)). A new one holds without a limit. Without [`CheckpointSettings::lease`](super::CheckpointSettings::lease) it holds until
/// the guest was taken. With it, a vCPU's thread looks at it each time before it enters the guest, and whoever lets
/// packets out before each: a process that was stopped for longer than the lease lasts must not run its guest when it
/// continues.
#[derive(Clone, Debug)]
pub struct Lease(Arc<AtomicU64>);

impl Default for Lease {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(FOREVER)))
    }
}

impl Lease {
    /// `until` counts from the machine's start.
    pub(super) fn set(&self, until: Option<Duration>) {
        let nanos = until.map_or(FOREVER, |until| u64::try_from(until.as_nanos()).unwrap_or(FOREVER - 1));
        self.0.store(nanos, Ordering::Release);
    }

    /// True while the guest may run. The check costs reading a clock.
    pub fn holds(&self) -> bool {
        self.left().is_none_or(|left| !left.is_zero())
    }

    /// How long it holds, unless it is renewed; `None`: without a limit. For a timer that kicks a vCPU out of the guest.
    pub fn left(&self) -> Option<Duration> {
        match self.0.load(Ordering::Acquire) {
            FOREVER => None,
            until => Some(Duration::from_nanos(until).saturating_sub(since_boot())),
        }
    }

    /// After a report of [`CheckpointOutcome::Fenced`](crate::session::CheckpointOutcome::Fenced): **the standby is known
    /// not to run the guest, and never will.** The guest may run here again, and the embedder resumes it.
    pub fn overrule(&self) {
        self.set(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_until_its_time_and_without_one_forever() {
        let lease = Lease::default();
        assert!(lease.holds() && lease.left().is_none());
        lease.set(Some(Duration::ZERO));
        assert!(!lease.holds() && lease.left() == Some(Duration::ZERO));
        lease.set(Some(since_boot() + Duration::from_secs(60)));
        assert!(lease.holds() && lease.left().is_some_and(|left| left <= Duration::from_secs(60)));
        let other = lease.clone();
        lease.set(Some(since_boot()));
        assert!(!other.holds());
        other.overrule();
        assert!(lease.holds() && lease.left().is_none());
    }
}
