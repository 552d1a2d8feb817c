//! Latency histograms: fixed memory, 3 significant digits, 1 microsecond to 1 minute.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Longest latency that is distinguished; longer ones count as this.
const MAX_MICROS: u64 = 60_000_000;

/// A distribution of durations.
#[derive(Clone, Debug)]
pub struct Latency {
    /// `None` only if the histogram's own bounds were refused, which the test below rules out.
    histogram: Option<Histogram<u64>>,
}

impl Default for Latency {
    fn default() -> Self {
        Self { histogram: Histogram::new_with_bounds(1, MAX_MICROS, 3).ok() }
    }
}

/// The figures of a histogram, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatencySummary {
    /// Samples.
    pub count: u64,
    /// Half of all samples are at most this.
    pub p50_us: u64,
    /// 9 of 10 samples are at most this.
    pub p90_us: u64,
    /// 99 of 100 samples are at most this.
    pub p99_us: u64,
    /// 999 of 1000 samples are at most this.
    pub p999_us: u64,
    /// The longest.
    pub max_us: u64,
}

impl Latency {
    /// Counts one sample.
    pub fn record(&mut self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(MAX_MICROS);
        if let Some(histogram) = &mut self.histogram {
            histogram.saturating_record(micros.clamp(1, MAX_MICROS));
        }
    }

    /// Count, median, percentiles and maximum.
    pub fn summary(&self) -> LatencySummary {
        self.histogram.as_ref().map_or_else(LatencySummary::default, |histogram| LatencySummary {
            count: histogram.len(),
            p50_us: histogram.value_at_quantile(0.5),
            p90_us: histogram.value_at_quantile(0.9),
            p99_us: histogram.value_at_quantile(0.99),
            p999_us: histogram.value_at_quantile(0.999),
            max_us: histogram.max(),
        })
    }

    /// Samples in intervals that double: upper end in microseconds, number of samples. Empty intervals are left out.
    pub fn steps(&self) -> Vec<(u64, u64)> {
        let Some(histogram) = &self.histogram else { return Vec::new() };
        let steps = histogram.iter_log(1, 2.0);
        steps
            .map(|step| (step.value_iterated_to(), step.count_since_last_iteration()))
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_again_in_figures_and_steps() {
        let mut latency = Latency::default();
        for micros in [3, 3, 3, 900] {
            latency.record(Duration::from_micros(micros));
        }
        latency.record(Duration::from_secs(3600));
        let summary = latency.summary();
        assert_eq!((summary.count, summary.p50_us), (5, 3));
        assert!(summary.max_us >= MAX_MICROS && summary.p99_us >= 900, "{summary:?}");
        assert_eq!(latency.steps().iter().map(|(_, count)| count).sum::<u64>(), 5);
    }
}
