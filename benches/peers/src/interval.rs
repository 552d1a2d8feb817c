//! Medians with an interval that makes no assumption about the distribution.

use serde::Serialize;

/// A median and the order statistics around it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Median {
    /// The middle value; the mean of the two middle ones of an even number.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Chance in percent that the interval contains the true median. 95 or more from 6 values on; with fewer, the
    /// interval covers all values.
    pub confidence: f64,
    /// Values it is made of.
    pub count: usize,
}

impl Median {
    /// The median of `values`; `None` without any. Values that are not numbers are ignored.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let (low_middle, high_middle) = (sorted.get((count.max(1) - 1) / 2)?, sorted.get(count / 2)?);
        let (skipped, confidence) = skipped(count);
        Some(Self {
            median: (low_middle + high_middle) / 2.0,
            low: sorted[skipped],
            high: sorted[count - 1 - skipped],
            confidence,
            count,
        })
    }
}

/// How many values at each end may be left out while the confidence is at least 95 %, and the confidence in percent:
/// the median lies below the k-th smallest value with the chance of fewer than k heads in `count` throws.
fn skipped(count: usize) -> (usize, f64) {
    let tail_allowed = 0.025;
    let mut heads = 0.5f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
    let mut tail = heads;
    let mut skipped = 0;
    while (skipped + 1) * 2 < count {
        heads *= (count - skipped) as f64 / (skipped + 1) as f64;
        if tail + heads > tail_allowed {
            break;
        }
        tail += heads;
        skipped += 1;
    }
    (skipped, (1.0 - 2.0 * tail).max(0.0) * 100.0)
}

/// A median with its interval, for a table.
pub fn shown(median: Option<Median>, digits: usize) -> String {
    match median {
        Some(Median { median, low, high, .. }) => {
            format!("{median:.digits$} [{low:.digits$}, {high:.digits$}]")
        }
        None => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_interval_is_that_of_the_sign_test() {
        // Tables of the sign test: number of values, values left out at each end, confidence.
        for (count, left_out, confidence) in
            [(1, 0, 0.0), (5, 0, 93.75), (6, 0, 96.875), (9, 1, 96.09), (15, 3, 96.48), (20, 5, 95.86)]
        {
            let median = Median::of((0..count).map(f64::from)).unwrap();
            assert_eq!(median.low, f64::from(left_out), "{count}");
            assert_eq!(median.high, f64::from(count - 1 - left_out), "{count}");
            assert!((median.confidence - confidence).abs() < 0.01, "{count}: {}", median.confidence);
        }
    }

    #[test]
    fn the_order_of_the_values_does_not_matter_and_none_is_none() {
        assert_eq!(Median::of([]), None);
        let median = Median::of([3.0, 1.0, f64::NAN, 2.0, 10.0]).unwrap();
        assert_eq!((median.median, median.low, median.high, median.count), (2.5, 1.0, 10.0, 4));
    }

    /// The interval must contain the true median about as often as its confidence states.
    #[test]
    fn the_interval_holds_the_true_median_as_often_as_it_says() {
        let mut state = 1u64;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        let mut held = 0;
        for _ in 0..2000 {
            let median = Median::of((0..15).map(|_| draw().powi(3))).unwrap();
            held += u32::from((median.low..=median.high).contains(&0.125));
        }
        assert!((1890..1970).contains(&held), "{held} of 2000");
    }
}
