//! How fast pages may leave.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::units::Rate;

/// What may be sent at once without waiting, as time at the limit.
const BURST: Duration = Duration::from_micros(1500);
/// What one batch may hold, as time at the limit: a larger one would be a burst of its own.
const BATCH: Duration = Duration::from_millis(2);
/// How much an interrupted sender may catch up, as time at the limit.
const MADE_UP: Duration = Duration::from_millis(200);
/// Rate of catching up, in percent of the limit. Together with a burst and a batch it is less than 1.1 of the limit in
/// any 100 ms.
const FASTER: u32 = 106;

/// Maximum number of bytes a second; may be changed while a migration runs. Clones share the limit.
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

/// Spreads the sent bytes evenly over time. `paid_until` is the moment up to which the bytes so far use the limit. It
/// is ahead of the clock by at most the last batch. If it falls behind the clock, because the sender had no time or the
/// connection no room, the sender catches up at a little more than the limit.
#[derive(Debug, Default)]
pub struct Pace {
    limit: BandwidthLimit,
    paid_until: Duration,
    /// The same at exactly the limit: if it is behind the clock, there is something to catch up.
    even: Duration,
    /// The limit that was used for both.
    by: Option<Rate>,
}

impl Pace {
    /// Nothing sent yet.
    pub fn new(limit: BandwidthLimit) -> Self {
        Self { limit, paid_until: Duration::ZERO, even: Duration::ZERO, by: None }
    }

    /// How long to wait before the next batch.
    pub fn delay(&self, now: Duration) -> Duration {
        let ahead = self.paid_until.saturating_sub(now);
        match (self.by, self.limit.get()) {
            (_, None) => Duration::ZERO,
            // The time ahead of the clock represents a number of bytes: at another limit they take another time.
            (Some(by), Some(limit)) if by != limit => {
                limit.time_for(by.bytes_in(ahead)).unwrap_or(Duration::ZERO)
            }
            _ => ahead,
        }
    }

    /// Pages of `page_bytes` that the next batch may hold, at least one; `None` without a limit.
    pub fn batch_pages(&self, page_bytes: u64) -> Option<u64> {
        let limit = self.limit.get()?;
        Some((limit.bytes_in(BATCH) / page_bytes.max(1)).max(1))
    }

    /// `bytes` leave now.
    pub fn charge(&mut self, now: Duration, bytes: u64) {
        let limit = self.limit.get();
        let Some(took) = limit.and_then(|limit| limit.time_for(bytes)) else { return };
        if self.by != limit {
            let until = now.saturating_add(self.delay(now));
            (self.by, self.paid_until, self.even) = (limit, until, until);
        }
        let faster = self.even < now;
        self.even = self.even.max(now.saturating_sub(MADE_UP)).saturating_add(took);
        let took = if faster { took * 100 / FASTER } else { took };
        self.paid_until = self.paid_until.max(now.saturating_sub(BURST)).saturating_add(took);
    }

    /// `bytes` that were charged were not sent: their pages were found to be zero.
    pub fn refund(&mut self, bytes: u64) {
        let Some(took) = self.limit.get().and_then(|limit| limit.time_for(bytes)) else { return };
        self.paid_until = self.paid_until.saturating_sub(took);
        self.even = self.even.saturating_sub(took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sender that only waits and sends for `seconds`; returns how much it sent in each millisecond. In each second
    /// it is interrupted for `away`.
    fn run(pace: &mut Pace, page_bytes: u64, seconds: u64, away: Duration) -> Vec<u64> {
        let mut sent = vec![0; seconds as usize * 1000];
        let mut now = Duration::ZERO;
        while (now.as_millis() as usize) < sent.len() {
            let delay = pace.delay(now);
            if delay > Duration::ZERO {
                now += delay;
                continue;
            }
            if now.subsec_nanos() < away.subsec_nanos() {
                now += away;
            }
            if (now.as_millis() as usize) >= sent.len() {
                break;
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
        let limits = [1 << 20, 10_000_000, 125_000_000, 3_000_000_000];
        let away = [0, 50].map(Duration::from_millis);
        for (limit, away) in limits.into_iter().flat_map(|limit| away.map(|away| (limit, away))) {
            let mut pace = Pace::new(BandwidthLimit::new(limit));
            let sent = run(&mut pace, 4096, 10, away);
            let all: u64 = sent.iter().sum();
            assert!(all.abs_diff(10 * limit) * 100 <= 10 * limit, "{limit}, {away:?}: {all} in 10 s");
            let most = sent.windows(100).map(|window| window.iter().sum::<u64>()).max().unwrap_or(0);
            // A page can't be divided.
            assert!(most <= limit / 10 * 11 / 10 + 4096, "{limit}, {away:?}: {most} in 100 ms");
        }
    }

    #[test]
    fn a_pause_is_made_up_for_slowly_and_for_a_fifth_of_a_second_at_most() {
        let mut pace = Pace::new(BandwidthLimit::new(1_000_000));
        pace.charge(Duration::ZERO, 1000);
        let mut now = Duration::from_secs(5);
        assert_eq!(pace.delay(now), Duration::ZERO);
        pace.charge(now, 10_600);
        assert_eq!(
            pace.delay(now),
            Duration::from_micros(8500),
            "10.6 ms of bytes as 10, 1.5 ms of them at once"
        );
        pace.refund(4000);
        assert_eq!(pace.delay(now), Duration::from_micros(4500));
        let mut sent = 6600;
        for _ in 0..10_000 {
            now += pace.delay(now);
            pace.charge(now, 1000);
            sent += 1000;
        }
        let made_up = Duration::from_micros(sent) - (now - Duration::from_secs(5));
        assert!((198..=203).contains(&made_up.as_millis()), "{made_up:?} of bytes in the time of none");
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
        limit.set(8192);
        assert_eq!(
            pace.delay(Duration::ZERO),
            Duration::from_millis(500),
            "the same bytes at twice the rate"
        );
        pace.charge(Duration::ZERO, 8192);
        assert_eq!(pace.delay(Duration::ZERO), Duration::from_millis(1500));
        limit.set(0);
        assert_eq!(pace.delay(Duration::ZERO), Duration::ZERO);
    }
}
