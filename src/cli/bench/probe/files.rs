//! HdrHistogram's own file formats: percentiles as text (.hgrm) and histograms by the second (.hlog).

use std::fmt::Write;

use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::IntervalLogWriterBuilder;

use super::super::BenchError;
use super::messages::failed;
use super::record::Recorded;

/// Lines between two halvings of the distance to 100 %, as in the format's own tools.
const TICKS: u32 = 5;
/// Histograms hold nanoseconds; the files show microseconds, the log's maxima milliseconds.
const NANOS_PER_MICRO: f64 = 1e3;
const NANOS_PER_MILLI: f64 = 1e6;

/// The percentile distribution in microseconds, in the text format of HdrHistogram's `outputPercentileDistribution`.
pub fn hgrm(histogram: &Histogram<u64>) -> String {
    let mut out =
        format!("{:>12} {:>14} {:>10} {:>14}\n\n", "Value", "Percentile", "TotalCount", "1/(1-Percentile)");
    // Writing to a String can't fail.
    let mut total = 0;
    for step in histogram.iter_quantiles(TICKS) {
        total += step.count_since_last_iteration();
        let (value, quantile) =
            (step.value_iterated_to() as f64 / NANOS_PER_MICRO, step.quantile_iterated_to());
        let _ = match quantile < 1.0 {
            true => writeln!(out, "{value:12.3} {quantile:2.12} {total:10} {:14.2}", 1.0 / (1.0 - quantile)),
            false => writeln!(out, "{value:12.3} {quantile:2.12} {total:10}"),
        };
    }
    let (mean, deviation) = (histogram.mean() / NANOS_PER_MICRO, histogram.stdev() / NANOS_PER_MICRO);
    let _ = writeln!(out, "#[Mean    = {mean:12.3}, StdDeviation   = {deviation:12.3}]");
    let (max, count) = (histogram.max() as f64 / NANOS_PER_MICRO, histogram.len());
    let _ = writeln!(out, "#[Max     = {max:12.3}, Total count    = {count:12}]");
    let sub_buckets = 2048;
    let _ = writeln!(out, "#[Buckets = {:12}, SubBuckets     = {sub_buckets:12}]", histogram.buckets());
    out
}

/// The histograms by the second, in the interval log format 1.3 that HdrHistogram's tools read.
///
/// # Errors
/// [`BenchError::Io`].
pub fn hlog(recorded: &Recorded) -> Result<Vec<u8>, BenchError> {
    let mut out = Vec::new();
    let mut serializer = V2DeflateSerializer::new();
    let other =
        |error: &dyn std::fmt::Debug| failed("writing a log")(std::io::Error::other(format!("{error:?}")));
    let mut builder = IntervalLogWriterBuilder::new();
    builder.add_comment("[Latencies in nanoseconds, not corrected for coordinated omission]");
    builder.with_start_time(recorded.began).with_base_time(recorded.began);
    builder.with_max_value_divisor(NANOS_PER_MILLI);
    let mut writer = builder.begin_log_with(&mut out, &mut serializer).map_err(failed("writing a log"))?;
    for interval in &recorded.intervals {
        writer
            .write_histogram(&interval.latencies, interval.start, interval.length, None)
            .map_err(|error| other(&error))?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    fn recorded() -> Recorded {
        let mut recorded = Recorded::new(false);
        for number in 0..2500u64 {
            recorded.record(
                Duration::from_millis(number),
                Duration::from_micros(50 + number % 999),
                Duration::ZERO,
            );
        }
        recorded
    }

    #[test]
    fn percentiles_ascend_to_one_and_counts_to_the_total() {
        let text = hgrm(&recorded().uncorrected);
        let lines: Vec<Vec<f64>> = text
            .lines()
            .skip(2)
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split_whitespace().map(|word| word.parse().unwrap()).collect())
            .collect();
        for column in 0..3 {
            assert!(lines.iter().map(|line| line[column]).is_sorted(), "{text}");
        }
        let last = lines.last().unwrap();
        assert_eq!((last[1], last[2], last.len()), (1.0, 2500.0, 3));
        assert!(lines[0].len() == 4 && text.starts_with("       Value     Percentile TotalCount"), "{text}");
        assert!(text.contains("#[Max     =") && text.contains("Total count    =         2500]"), "{text}");
    }

    #[test]
    fn a_log_is_read_back_with_every_sample() {
        let log = hlog(&recorded()).unwrap();
        let mut deserializer = Deserializer::new();
        let (mut intervals, mut samples, mut at) = (0, 0, None);
        for entry in IntervalLogIterator::new(&log) {
            if let LogEntry::Interval(interval) = entry.unwrap() {
                use base64_of_the_log as decode;
                samples += deserializer
                    .deserialize::<u64, _>(&mut &decode(interval.encoded_histogram())[..])
                    .unwrap()
                    .len();
                intervals += 1;
                assert!(at.is_none_or(|at| at < interval.start_timestamp()));
                at = Some(interval.start_timestamp());
            }
        }
        assert_eq!((intervals, samples), (3, 2500));
    }

    /// Decodes standard base64; the log's own alphabet, and short.
    fn base64_of_the_log(text: &str) -> Vec<u8> {
        let digit = |byte: u8| match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            _ => 63,
        };
        let bits = text.bytes().filter(|byte| *byte != b'=');
        let (mut out, mut have, mut count) = (Vec::new(), 0u32, 0);
        for byte in bits {
            have = have << 6 | u32::from(digit(byte));
            count += 6;
            if count >= 8 {
                count -= 8;
                out.push((have >> count) as u8);
            }
        }
        out
    }
}
