//! How long threads of a guest waited for pages that were missing, with the meanings QEMU gives them
//! (`postcopy-blocktime` and its like).

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Intervals of [`PageWaits::distribution`], as in QEMU.
pub const WAIT_INTERVALS: usize = 24;

/// Waits of some threads: how many, and how long all of them together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitSum {
    /// Waits that have ended.
    pub count: u64,
    /// Nanoseconds of all of them.
    pub total_ns: u64,
}

impl WaitSum {
    /// Adds one.
    pub fn add(&mut self, took: Duration) {
        self.count += 1;
        self.total_ns = self.total_ns.saturating_add(nanos(took));
    }

    /// Nanoseconds of one, on average; 0 if there was none.
    pub fn mean_ns(&self) -> u64 {
        self.total_ns.checked_div(self.count).unwrap_or(0)
    }
}

/// The waits of one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuWaits {
    /// The number that the embedder gave it.
    pub vcpu: u32,
    /// Its waits.
    pub waits: WaitSum,
    /// Nanoseconds in which it did not run because of them.
    pub blocked_ns: u64,
}

/// Waits for missing pages that have ended: from the report of a fault to the page in place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PageWaits {
    /// All of them.
    pub all: WaitSum,
    /// Those of threads that run no vCPU, as far as it is known.
    pub others: WaitSum,
    /// Each vCPU whose thread is known, ascending.
    pub vcpus: Vec<VcpuWaits>,
    /// Nanoseconds in which every vCPU waited.
    pub all_blocked_ns: u64,
    /// Number `n` counts waits of 2^n to 2^(n+1) microseconds. The first has the shorter ones too, the last the
    /// longer ones.
    pub distribution: [u64; WAIT_INTERVALS],
}

impl PageWaits {
    /// Counts a wait in the distribution, and among all.
    pub fn add(&mut self, took: Duration) {
        self.all.add(took);
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let interval = micros.max(1).ilog2() as usize;
        if let Some(count) = self.distribution.get_mut(interval.min(WAIT_INTERVALS - 1)) {
            *count += 1;
        }
    }
}

/// A duration as a number of nanoseconds; more than 584 years count as those.
pub(crate) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_in_the_interval_of_its_length() {
        let mut waits = PageWaits::default();
        for (took, interval) in
            [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (1023, 9), (1024, 10), (u64::MAX, WAIT_INTERVALS - 1)]
        {
            let before = waits.distribution;
            waits.add(Duration::from_micros(took));
            let changed: Vec<_> =
                (0..WAIT_INTERVALS).filter(|at| waits.distribution[*at] != before[*at]).collect();
            assert_eq!(changed, [interval], "{took} us");
        }
        assert_eq!((waits.all.count, WaitSum::default().mean_ns()), (8, 0));
    }
}
