//! Recording of latencies: histograms of nanoseconds, overall and by the second.
//!
//! Without a rate the next message starts when the one before has ended: a slow one delays those after it, which are
//! then not counted as slow ("coordinated omission"). With a rate every message has a scheduled start. Then each
//! latency is recorded twice: from its actual start (uncorrected), and from its scheduled start (corrected).

use std::time::{Duration, SystemTime};

use hdrhistogram::Histogram;
use serde::Serialize;

/// Longest latency that is distinguished, in nanoseconds; longer ones count as this.
const MAX_NANOS: u64 = 60_000_000_000;
/// Most intervals kept.
const MAX_INTERVALS: u32 = 600;

/// A value recorded in both ways.
#[derive(Clone, Debug)]
pub struct Interval {
    /// Time from the start of the measurement.
    pub start: Duration,
    /// How long.
    pub length: Duration,
    /// Uncorrected latencies.
    pub latencies: Histogram<u64>,
}

/// The figures of a histogram in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Samples.
    pub count: u64,
    /// The shortest.
    pub min_us: f64,
    /// Half are at most this.
    pub p50_us: f64,
    /// 9 of 10 are.
    pub p90_us: f64,
    /// 99 of 100 are.
    pub p99_us: f64,
    /// 999 of 1000 are.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
}

/// Figures of `histogram`.
pub fn summary(histogram: &Histogram<u64>) -> Summary {
    let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
    Summary {
        count: histogram.len(),
        min_us: histogram.min() as f64 / 1e3,
        p50_us: at(0.5),
        p90_us: at(0.9),
        p99_us: at(0.99),
        p999_us: at(0.999),
        max_us: histogram.max() as f64 / 1e3,
    }
}

/// Everything that a measurement recorded.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// When it began.
    pub began: SystemTime,
    /// How long it took.
    pub length: Duration,
    /// From each message's actual start.
    pub uncorrected: Histogram<u64>,
    /// From each message's scheduled start; `None` without a rate.
    pub corrected: Option<Histogram<u64>>,
    /// One for each second, or longer ones if there would be too many.
    pub intervals: Vec<Interval>,
}

impl Recorded {
    /// Nothing recorded yet; `paced` if messages have a scheduled start.
    pub fn new(paced: bool) -> Self {
        Self {
            began: SystemTime::now(),
            length: Duration::ZERO,
            uncorrected: empty(),
            corrected: paced.then(empty),
            intervals: Vec::new(),
        }
    }

    /// Counts a message that ended `at` after the start of the measurement and took `took`; it started `late` after its
    /// scheduled time.
    pub fn record(&mut self, at: Duration, took: Duration, late: Duration) {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(MAX_NANOS).clamp(1, MAX_NANOS);
        self.length = self.length.max(at);
        self.uncorrected.saturating_record(nanos(took));
        if let Some(corrected) = &mut self.corrected {
            corrected.saturating_record(nanos(took + late));
        }
        self.interval(at).saturating_record(nanos(took));
    }

    fn interval(&mut self, at: Duration) -> &mut Histogram<u64> {
        let number = u32::try_from(at.as_secs()).unwrap_or(MAX_INTERVALS).min(MAX_INTERVALS - 1) as usize;
        while self.intervals.len() <= number {
            let start = Duration::from_secs(self.intervals.len() as u64);
            self.intervals.push(Interval { start, length: Duration::from_secs(1), latencies: empty() });
        }
        if let Some(interval) = self.intervals.get_mut(number) {
            interval.length = interval.length.max(at.saturating_sub(interval.start));
        }
        &mut self.intervals[number].latencies
    }
}

/// Limits and digits are constants that the histogram accepts, as the test below shows.
#[allow(clippy::expect_used)]
fn empty() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_NANOS, 3).expect("bounds that a histogram takes")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn counts_match_and_percentiles_ascend() {
        let mut recorded = Recorded::new(true);
        for number in 1..=3000u64 {
            let took = Duration::from_micros(100 + number % 700);
            recorded.record(Duration::from_millis(number), took, Duration::from_micros(number % 50));
        }
        let figures = summary(&recorded.uncorrected);
        assert_eq!(figures.count, 3000);
        let ordered =
            [figures.min_us, figures.p50_us, figures.p90_us, figures.p99_us, figures.p999_us, figures.max_us];
        assert!(ordered.is_sorted() && ordered[0] >= 99.9, "{figures:?}");
        let corrected = summary(recorded.corrected.as_ref().unwrap());
        assert!(corrected.count == 3000 && corrected.p50_us > figures.p50_us, "{corrected:?}");
        let by_second: u64 = recorded.intervals.iter().map(|interval| interval.latencies.len()).sum();
        assert_eq!((by_second, recorded.intervals.len()), (3000, 4));
        recorded.record(Duration::from_secs(1 << 40), Duration::from_secs(1 << 40), Duration::ZERO);
        assert_eq!(recorded.intervals.len(), 600);
    }

    /// A pause of 100 ms at 1000 messages a second: the uncorrected figures show one slow message, the corrected ones
    /// all delayed messages.
    #[test]
    fn what_a_pause_delays_counts_as_late() {
        let mut recorded = Recorded::new(true);
        let mut free = 0u64;
        for number in 0..1000u64 {
            let due = number * 1000;
            let begun = due.max(free);
            let took = if number == 500 { 100_000 } else { 100 };
            free = begun + took;
            let time = Duration::from_micros;
            recorded.record(time(free), time(took), time(begun - due));
        }
        let (plain, corrected) =
            (summary(&recorded.uncorrected), summary(recorded.corrected.as_ref().unwrap()));
        assert!(plain.p99_us < 110.0 && corrected.p99_us > 80_000.0, "{plain:?} {corrected:?}");
    }
}
