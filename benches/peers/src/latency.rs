//! `ramwire-bench latency`: half the round trip of RDMA WRITEs, ours and that of perftest's `ib_write_lat` alternately.

use std::process::Stdio;

use ramwire::sys::CancelToken;
use ramwire::transport::rdma_address;
use serde::Serialize;
use serde_json::Value;

use crate::BenchError;
use crate::interval::{Median, shown};
use crate::output::result_line;
use crate::perftest::Device;
use crate::program::Program;
use crate::sizes::{bytes, seconds};

/// Arguments of `ramwire-bench latency`.
#[derive(Clone, Debug, clap::Args)]
pub struct LatencyArgs {
    /// IP address of the device; without it that of the first usable one
    #[arg(long, value_name = "ADDRESS")]
    host: Option<String>,
    /// Bytes of a message, with commas between
    #[arg(long, value_delimiter = ',', default_value = "4K", value_parser = bytes, value_name = "SIZES")]
    size: Vec<u64>,
    /// How long each measurement of ours takes
    #[arg(long, default_value = "2", value_name = "SECONDS", value_parser = seconds)]
    duration: std::time::Duration,
    /// Turns
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..1000))]
    pairs: u32,
    /// One JSON object on standard output instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    program: Program,
}

/// The figures of one size of message, in microseconds; ratios are ours over theirs, of the same turn.
#[derive(Clone, Copy, Debug, Serialize)]
struct Case {
    size: u64,
    p50_us: Option<Median>,
    p99_us: Option<Median>,
    their_p50_us: Option<Median>,
    their_p99_us: Option<Median>,
    p50_ratio: Option<Median>,
    p99_ratio: Option<Median>,
}

/// One measurement: median, 99th percentile, and its number of messages.
struct Measured {
    p50: f64,
    p99: f64,
    count: u64,
}

impl Case {
    fn of(size: u64, turns: &[(Measured, Measured)]) -> Self {
        let median =
            |of: fn(&Measured, &Measured) -> f64| Median::of(turns.iter().map(|(own, their)| of(own, their)));
        Self {
            size,
            p50_us: median(|own, _| own.p50),
            p99_us: median(|own, _| own.p99),
            their_p50_us: median(|_, their| their.p50),
            their_p99_us: median(|_, their| their.p99),
            p50_ratio: median(|own, their| own.p50 / their.p50),
            p99_ratio: median(|own, their| own.p99 / their.p99),
        }
    }

    fn text(&self) -> String {
        format!(
            "{} bytes, us: p50 {}  p99 {}; ib_write_lat: p50 {}  p99 {}; ours over its: p50 {}  p99 {}",
            self.size,
            shown(self.p50_us, 1),
            shown(self.p99_us, 1),
            shown(self.their_p50_us, 1),
            shown(self.their_p99_us, 1),
            shown(self.p50_ratio, 3),
            shown(self.p99_ratio, 3)
        )
    }
}

/// Measures each size in turns.
///
/// # Errors
/// [`BenchError`].
pub fn run(args: &LatencyArgs, cancel: &CancelToken) -> Result<(), BenchError> {
    let host = match &args.host {
        Some(host) => host.clone(),
        None => rdma_address(0).map_err(|why| BenchError::NoRdma(Box::new(why)))?.to_string(),
    };
    let device = Device::at(&host)?;
    let theirs = |size: u64, count| {
        let (p50, p99) = device.latency(size as usize, count)?;
        Ok::<_, BenchError>(Measured { p50, p99, count })
    };
    let mut cases = Vec::new();
    for size in &args.size {
        // One of ours first: it shows how many messages are possible in that time.
        let mut last = ours(args, &host, *size)?;
        let mut turns = Vec::new();
        for turn in 0..args.pairs {
            if cancel.is_cancelled() {
                return Err(BenchError::Cancelled);
            }
            let count = last.count;
            let pair = match turn % 2 {
                0 => (ours(args, &host, *size)?, theirs(*size, count)?),
                _ => {
                    let their = theirs(*size, count)?;
                    (ours(args, &host, *size)?, their)
                }
            };
            last = Measured { count: pair.0.count, ..last };
            turns.push(pair);
        }
        let case = Case::of(*size, &turns);
        if !args.json {
            result_line!("{}", case.text());
        }
        cases.push(case);
    }
    if args.json {
        result_line!("{}", serde_json::json!({ "version": 1, "host": host, "cases": cases }));
    }
    Ok(())
}

fn ours(args: &LatencyArgs, host: &str, size: u64) -> Result<Measured, BenchError> {
    let failed = |answer: String| BenchError::Refused {
        who: "ramwire bench latency".into(),
        what: "to measure".into(),
        answer,
    };
    let out = args
        .program
        .command()?
        .args(["bench", "latency", "--transport=rdma", "--op=write", "--json", "--host", host])
        .arg(format!("--size={size}"))
        .arg(format!("--duration={}", args.duration.as_secs_f64()))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    let errors = String::from_utf8_lossy(&out.stderr);
    let report: Value =
        serde_json::from_slice(&out.stdout).map_err(|error| failed(format!("{error}: {errors}")))?;
    let figures = &report["cases"][0]["uncorrected"];
    let number = |name: &str| figures[name].as_f64().ok_or_else(|| failed(format!("no {name} in {report}")));
    Ok(Measured { p50: number("p50_us")?, p99: number("p99_us")?, count: number("count")? as u64 })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ratios_are_of_the_same_turn() {
        // The device gets slower every turn; the ratio does not change.
        let measured = |p50: f64| Measured { p50, p99: 3.0 * p50, count: 100 };
        let turns: Vec<_> =
            (1..=7).map(f64::from).map(|slow| (measured(slow), measured(2.0 * slow))).collect();
        let case = Case::of(4096, &turns);
        let ratio = case.p50_ratio.unwrap();
        assert_eq!((ratio.low, ratio.median, ratio.high), (0.5, 0.5, 0.5));
        assert_eq!((case.p99_us.unwrap().median, case.their_p50_us.unwrap().median), (12.0, 8.0));
        assert!(case.text().contains("4096 bytes") && case.text().contains("0.500"), "{}", case.text());
    }
}
