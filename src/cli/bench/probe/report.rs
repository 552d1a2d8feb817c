//! The output of a measurement: text and charts.

use std::fmt::Write;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::messages::{Kind, Request};
use super::record::{Recorded, Summary, summary};
use crate::cli::common::human_bytes;
use crate::cli::plot::{self, Axis, Line};

const MB: f64 = 1e6;
/// Maximum number of rows of the chart, and the longest bar.
const ROWS: usize = 14;
const BAR: usize = 50;

/// One measurement's figures.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// The measured request.
    #[serde(flatten)]
    pub request: Request,
    /// Whether latencies are half of round trips.
    pub half_round_trip: bool,
    /// Seconds.
    pub seconds: f64,
    /// MB (10^6) a second, of the messages' bytes in one direction.
    pub mb_per_s: f64,
    /// Messages a second, each way.
    pub messages_per_s: f64,
    /// From each message's actual start: not corrected for coordinated omission.
    pub uncorrected: Summary,
    /// From each message's scheduled start, if a rate was given: corrected for coordinated omission.
    pub corrected: Option<Summary>,
    #[serde(skip)]
    recorded: Recorded,
}

impl Case {
    /// Puts figures together.
    pub fn new(request: Request, recorded: Recorded) -> Self {
        let seconds = recorded.length.max(Duration::from_nanos(1)).as_secs_f64();
        let count = recorded.uncorrected.len() as f64;
        Self {
            half_round_trip: request.is_echo(),
            seconds,
            mb_per_s: count * request.size as f64 / seconds / MB,
            messages_per_s: count / seconds,
            uncorrected: summary(&recorded.uncorrected),
            corrected: recorded.corrected.as_ref().map(summary),
            request,
            recorded,
        }
    }

    /// The recorded latencies.
    pub fn recorded(&self) -> &Recorded {
        &self.recorded
    }

    /// A short name without spaces, for files and legends.
    pub fn name(&self) -> String {
        let op = clap::ValueEnum::to_possible_value(&self.request.op);
        let op = op.map_or_else(String::new, |value| value.get_name().to_owned());
        let carrier = clap::ValueEnum::to_possible_value(&self.request.carrier);
        let carrier = carrier.map_or_else(String::new, |value| value.get_name().to_owned());
        let size = self.request.size;
        let size = match size {
            _ if size.is_multiple_of(1 << 20) => format!("{}M", size >> 20),
            _ if size.is_multiple_of(1 << 10) => format!("{}K", size >> 10),
            _ => size.to_string(),
        };
        format!("{carrier}-{op}-{size}")
    }

    /// A few lines and a chart.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String can't fail.
        let what = if self.half_round_trip { "half the round trip" } else { "begin to completion" };
        let _ = writeln!(
            out,
            "{}: {what}, depth {}, {:.1} s, {:.1} messages/s of {}, {:.2} MB/s",
            self.name(),
            self.request.depth,
            self.seconds,
            self.messages_per_s,
            human_bytes(self.request.size as u64),
            self.mb_per_s
        );
        let mut line = |what: &str, s: &Summary| {
            let _ = writeln!(
                out,
                "  {what:<12} {} samples, us: min {:.1}  p50 {:.1}  p90 {:.1}  p99 {:.1}  p99.9 {:.1}  max {:.1}",
                s.count, s.min_us, s.p50_us, s.p90_us, s.p99_us, s.p999_us, s.max_us
            );
        };
        line("uncorrected", &self.uncorrected);
        match &self.corrected {
            Some(corrected) => line("corrected", corrected),
            None => {
                let _ = writeln!(
                    out,
                    "  (each message began when the one before had ended; with --rate figures are also corrected for \
                     coordinated omission)"
                );
            }
        }
        out.push_str(&picture(&self.recorded.uncorrected));
        out
    }
}

/// Rows of equal ratio from the shortest to the longest, each with its share as a bar.
fn picture(histogram: &Histogram<u64>) -> String {
    let mut out = String::new();
    if histogram.is_empty() {
        return out;
    }
    let (low, high) = (histogram.min().max(1) as f64, histogram.max().max(1) as f64);
    // Not finer than the histogram's resolution.
    let step = (high / low).powf(1.0 / ROWS as f64).max(1.01);
    let mut rows: Vec<(f64, u64)> = Vec::new();
    for value in histogram.iter_recorded() {
        let row = ((value.value_iterated_to() as f64 / low).ln() / step.ln()).floor().max(0.0) as usize;
        let row = row.min(ROWS - 1);
        while rows.len() <= row {
            rows.push((low * step.powi(rows.len() as i32 + 1), 0));
        }
        rows[row].1 += value.count_at_value();
    }
    let most = rows.iter().map(|(_, count)| *count).max().unwrap_or(1).max(1);
    for (end, count) in rows {
        let bar = "#".repeat((count as f64 / most as f64 * BAR as f64).ceil() as usize);
        let share = count as f64 * 100.0 / histogram.len() as f64;
        let _ = writeln!(out, "  <= {:>12.1} us {share:>7.3} % {bar}", end / 1e3);
    }
    out
}

/// All measurements of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this object's layout.
    pub version: u32,
    /// Latency or bandwidth.
    pub kind: Kind,
    /// Requested messages a second.
    pub rate: Option<f64>,
    /// Processors this process may use.
    pub cpus: usize,
    /// Kernel release.
    pub kernel: String,
    /// In the order measured.
    pub cases: Vec<Case>,
}

impl Report {
    /// Of these.
    pub fn new(kind: Kind, rate: Option<f64>, cases: Vec<Case>) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self { version: 1, kind, rate, cpus, kernel: kernel.trim().to_owned(), cases }
    }

    /// Latencies over percentiles, one line for each measurement; a second one for corrected latencies.
    ///
    /// # Errors
    /// [`plot::PlotError`].
    pub fn svg(&self) -> Result<String, plot::PlotError> {
        let x = Axis { label: "percentile", logarithmic: true, tick: percentile };
        let y = Axis { label: "latency, us", logarithmic: true, tick: plot::plain };
        let mut lines = Vec::new();
        for case in &self.cases {
            lines.push(Line { name: case.name(), points: points(&case.recorded.uncorrected) });
            if let Some(corrected) = &case.recorded.corrected {
                let name = format!("{}, corrected", case.name());
                lines.push(Line { name, points: points(corrected) });
            }
        }
        plot::lines("latency by percentile", x, y, &lines)
    }
}

/// x is 1 / (1 - quantile), so that every further nine takes the same width.
fn points(histogram: &Histogram<u64>) -> Vec<(f64, f64)> {
    let steps = histogram.iter_quantiles(5).filter(|step| step.quantile_iterated_to() < 1.0);
    steps
        .map(|step| (1.0 / (1.0 - step.quantile_iterated_to()), step.value_iterated_to() as f64 / 1e3))
        .collect()
}

fn percentile(x: f64) -> String {
    let text = format!("{:.5}", (1.0 - 1.0 / x) * 100.0);
    format!("{} %", text.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cli::bench::probe::messages::{Op, ProbeTransport};

    fn case(paced: bool) -> Case {
        let mut recorded = Recorded::new(paced);
        for number in 0..1000u64 {
            let took = Duration::from_nanos(40_000 + number * number);
            recorded.record(Duration::from_millis(number), took, Duration::from_micros(number % 9));
        }
        let request = Request {
            carrier: ProbeTransport::Rdma,
            op: Op::Write,
            kind: Kind::Latency,
            size: 4096,
            depth: 1,
        };
        Case::new(request, recorded)
    }

    #[test]
    fn text_json_and_picture_hold_every_sample() {
        let report = Report::new(Kind::Latency, Some(1000.0), vec![case(true), case(false)]);
        let text = report.cases[0].text();
        assert!(text.contains("rdma-write-4K") && text.contains("  corrected "), "{text}");
        assert!(report.cases[1].text().contains("--rate"));
        let shares = text.lines().filter(|line| line.contains('%'));
        let sum: f64 =
            shares.map(|line| line.split_whitespace().nth(3).unwrap().parse::<f64>().unwrap()).sum();
        assert!((sum - 100.0).abs() < 0.1, "{text}");
        let json = serde_json::json!(report);
        assert_eq!(json["cases"][0]["uncorrected"]["count"], 1000);
        assert_eq!(json["cases"][0]["op"], "write");
        assert!(json["cases"][1]["corrected"].is_null());
        let svg = report.svg().unwrap();
        assert!(svg.contains("rdma-write-4K, corrected") && svg.contains("99 %"), "{svg}");
    }

    #[test]
    fn percentiles_are_written_without_needless_digits() {
        let written = [1.0, 2.0, 10.0, 1000.0, 100_000.0].map(percentile);
        assert_eq!(written, ["0 %", "50 %", "90 %", "99.9 %", "99.999 %"]);
    }
}
