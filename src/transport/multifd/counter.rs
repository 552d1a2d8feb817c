//! Pages of one channel: counted by its thread, read by the session.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::observe::PageCounts;

/// Pages that a channel has sent or placed. At a barrier, whose message orders the two threads, the numbers are
/// consistent.
#[derive(Debug, Default)]
pub(super) struct PageCounter {
    normal: AtomicU64,
    zero: AtomicU64,
}

impl PageCounter {
    /// A packet with this many pages was sent, or placed.
    pub(super) fn add(&self, normal: u64, zero: u64) {
        self.normal.fetch_add(normal, Ordering::Relaxed);
        self.zero.fetch_add(zero, Ordering::Relaxed);
    }

    pub(super) fn counts(&self) -> PageCounts {
        let [normal, zero] = [&self.normal, &self.zero].map(|count| count.load(Ordering::Relaxed));
        PageCounts { normal, zero, delta: 0 }
    }
}
