//! How fast pages may leave.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::units::Rate;

/// What may leave at once without waiting, as time at the limit.
const BURST: Duration = Duration::from_millis(5);
/// What one batch may hold, as time at the limit: a larger one would be a burst of its own.
const BATCH: Duration = Duration::from_millis(4);

/// Most bytes a second; may be changed while a migration runs. Clones share the limit.
#[derive(Clone, Debug, Default)]
pub struct BandwidthLimit(Arc<AtomicU64>);

impl BandwidthLimit {
    /// `bytes` a second; 0 is no limit.
    pub fn new(bytes: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes)))
    }

    /// From the next batch on: `bytes` a second; 0 is no limit.
    pub fn set(&self, bytes: u64) {
        self.0.store(bytes, Ordering::Relaxed);
    }

    /// The limit; `None` without one.
    pub fn get(&self) -> Option<Rate> {
        let bytes = self.0.load(Ordering::Relaxed);
        (bytes > 0).then_some(Rate(bytes))
    }
}

/// Spreads what is sent evenly over time. The moment up to which the bytes so far are paid for runs ahead of the clock
/// by no more than what was sent last, and falls behind by no more than 5 ms.
#[derive(Debug, Default)]
pub struct Pace {
    limit: BandwidthLimit,
    paid_until: Duration,
}

impl Pace {
    /// Nothing sent yet.
    pub fn new(limit: BandwidthLimit) -> Self {
        Self { limit, paid_until: Duration::ZERO }
    }

    /// How long to wait before the next batch.
    pub fn delay(&self, now: Duration) -> Duration {
        if self.limit.get().is_some() { self.paid_until.saturating_sub(now) } else { Duration::ZERO }
    }

    /// Pages of `page_bytes` that the next batch may hold, at least one; `None` without a limit.
    pub fn batch_pages(&self, page_bytes: u64) -> Option<u64> {
        let limit = self.limit.get()?;
        Some((limit.bytes_in(BATCH) / page_bytes.max(1)).max(1))
    }

    /// `bytes` leave now.
    pub fn charge(&mut self, now: Duration, bytes: u64) {
        let Some(took) = self.limit.get().and_then(|limit| limit.time_for(bytes)) else { return };
        self.paid_until = self.paid_until.max(now.saturating_sub(BURST)).saturating_add(took);
    }

    /// `bytes` that were charged did not leave: their pages were found to be zero.
    pub fn refund(&mut self, bytes: u64) {
        let Some(took) = self.limit.get().and_then(|limit| limit.time_for(bytes)) else { return };
        self.paid_until = self.paid_until.saturating_sub(took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sender that does nothing but wait and send for `seconds`; how much left in each millisecond.
    fn run(pace: &mut Pace, page_bytes: u64, seconds: u64) -> Vec<u64> {
        let mut sent = vec![0; seconds as usize * 1000];
        let mut now = Duration::ZERO;
        while (now.as_millis() as usize) < sent.len() {
            let delay = pace.delay(now);
            if delay > Duration::ZERO {
                now += delay;
                continue;
            }
            let bytes = pace.batch_pages(page_bytes).unwrap_or(512) * page_bytes;
            pace.charge(now, bytes);
            sent[now.as_millis() as usize] += bytes;
            now += Duration::from_micros(20);
        }
        sent
    }

    #[test]
    fn the_limit_is_held_over_seconds_and_over_any_tenth_of_one() {
        for limit in [1 << 20, 10_000_000, 125_000_000, 3_000_000_000] {
            let mut pace = Pace::new(BandwidthLimit::new(limit));
            let sent = run(&mut pace, 4096, 10);
            let all: u64 = sent.iter().sum();
            assert!(all.abs_diff(10 * limit) * 100 <= 10 * limit, "{limit}: {all} in 10 s");
            let most = sent.windows(100).map(|window| window.iter().sum::<u64>()).max().unwrap_or(0);
            // A page is what can't be divided.
            assert!(most <= limit / 10 * 11 / 10 + 4096, "{limit}: {most} in 100 ms");
        }
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let mut pace = Pace::new(BandwidthLimit::new(1_000_000));
        pace.charge(Duration::ZERO, 1000);
        let late = Duration::from_secs(5);
        assert_eq!(pace.delay(late), Duration::ZERO);
        pace.charge(late, 10_000);
        assert_eq!(pace.delay(late), Duration::from_millis(5), "10 ms of bytes, 5 ms of them allowed ahead");
        pace.refund(4000);
        assert_eq!(pace.delay(late), Duration::from_millis(1));
    }

    #[test]
    fn a_limit_changes_while_it_holds_and_none_holds_nothing_back() {
        let limit = BandwidthLimit::default();
        let mut pace = Pace::new(limit.clone());
        pace.charge(Duration::ZERO, 1 << 40);
        assert_eq!((pace.delay(Duration::ZERO), pace.batch_pages(4096)), (Duration::ZERO, None));
        limit.set(4096);
        assert_eq!(pace.batch_pages(4096), Some(1));
        pace.charge(Duration::ZERO, 4096);
        assert_eq!(pace.delay(Duration::ZERO), Duration::from_secs(1));
        limit.set(0);
        assert_eq!(pace.delay(Duration::ZERO), Duration::ZERO);
    }
}
