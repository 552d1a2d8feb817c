//! `ramwire-bench limit`: whether `--max-bandwidth` holds, over all of a run and over each tenth of a second.
//!
//! A `ramwire demo` whose guest writes at that rate is ended after some seconds; the log of its run shows how much was
//! sent when ([`RunLog`](ramwire::session::RunLog)).

use std::path::Path;
use std::process::Stdio;

use ramwire::observe::{Record, Sample, Status};
use serde::Serialize;

use crate::BenchError;
use crate::Exit;
use crate::output::result_line;
use crate::program::Program;
use crate::sizes::bytes;

/// Arguments of `ramwire-bench limit`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ramwire-bench limit --limit 100M
  ramwire-bench limit --channels 4 --limit 100M
  ci/rxe-guest target/release/ramwire-bench limit --transport rdma --limit 8M")]
pub struct LimitArgs {
    /// How the guest travels: tcp, unix or rdma
    #[arg(long, value_name = "TRANSPORT", default_value = "tcp")]
    transport: String,
    /// Page channels beside the stream
    #[arg(long, value_name = "N", default_value = "0")]
    channels: u8,
    /// Memory for copies of sent pages, which lets changed ones travel as differences; 0: never
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = bytes)]
    xbzrle_cache_size: u64,
    /// Most bytes a second
    #[arg(long, value_name = "SIZE", default_value = "24M", value_parser = bytes)]
    limit: u64,
    /// How long
    #[arg(long, value_name = "SECONDS", default_value = "11")]
    seconds: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    program: Program,
}

/// Permitted deviation of the rate over a whole run.
const OFF: f64 = 0.05;
/// Maximum in a tenth of a second, as a multiple of the limit.
const BURST: f64 = 1.1;
/// Memory that the guest keeps writing at the rate of the limit, in seconds of it: no round gets near its end within
/// the downtime, and the guest uses as little of the machine as possible.
const WRITES: u64 = 2;

#[derive(Debug, Serialize)]
struct Held {
    transport: String,
    channels: u8,
    limit: u64,
    seconds: f64,
    /// Bytes sent in a second, as a share of the limit.
    rate: f64,
    /// The same in the busiest and the idlest tenth of a second.
    most: f64,
    least: f64,
    windows: usize,
    holds: bool,
}

pub fn run(args: &LimitArgs) -> Result<Exit, BenchError> {
    let log = std::env::temp_dir().join(format!("ramwire-limit-{}.jsonl", std::process::id()));
    let ran = demo(args, &log);
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    drop(std::fs::remove_file(&log));
    ran?;
    let records = text.lines().filter_map(|line| serde_json::from_str(line).ok());
    let samples: Vec<Sample> = records
        .filter_map(|record| match record {
            Record::Sample(sample) if sample.status == Status::Active && sample.transferred > 0 => {
                Some(sample)
            }
            _ => None,
        })
        .collect();
    let Some(held) = held(args, &samples) else {
        return Err(failed(args, "its log has too few samples of a migration under way".into()));
    };
    if args.json {
        result_line!("{}", serde_json::json!(held));
    } else {
        result_line!(
            "{} {}: {:.1} s at {:.4} of {} bytes/s; a tenth of a second at {:.3} to {:.3}, of {}: {}",
            held.transport,
            if args.channels > 0 { format!("with {} channels", args.channels) } else { "alone".into() },
            held.seconds,
            held.rate,
            held.limit,
            held.least,
            held.most,
            held.windows,
            if held.holds { "held" } else { "NOT held" },
        );
    }
    Ok(if held.holds { Exit::Done } else { Exit::Failed })
}

fn failed(args: &LimitArgs, answer: String) -> BenchError {
    BenchError::Refused {
        who: "ramwire demo".into(),
        what: format!("--transport {}", args.transport),
        answer,
    }
}

fn demo(args: &LimitArgs, log: &Path) -> Result<(), BenchError> {
    let written = args.limit * WRITES;
    let out = args
        .program
        .command()?
        .args(["demo", "--json", "--no-digest", "--zero=0", "--writers=1", "--downtime-ms=50"])
        .arg(format!("--transport={}", args.transport))
        .arg(format!("--ram={written}"))
        .arg(format!("--working-set={written}"))
        .arg(format!("--dirty-rate={}", args.limit))
        .arg(format!("--max-bandwidth={}", args.limit))
        .arg(format!("--xbzrle-cache-size={}", args.xbzrle_cache_size))
        .args((args.channels > 0).then(|| format!("--channels={}", args.channels)))
        .arg(format!("--timeout={}", args.seconds))
        .arg("--run-log")
        .arg(log)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(args, error.to_string()))?;
    // Its time limit ends it, which counts as failed with the guest intact.
    match out.status.code() {
        Some(0 | 3) if log.exists() => Ok(()),
        _ => Err(failed(args, String::from_utf8_lossy(&out.stderr).into_owned())),
    }
}

/// `None` with fewer than two samples.
fn held(args: &LimitArgs, samples: &[Sample]) -> Option<Held> {
    let rate = |from: &Sample, to: &Sample| {
        let seconds = (to.at_ms - from.at_ms) / 1e3;
        to.transferred.saturating_sub(from.transferred) as f64 / seconds / args.limit as f64
    };
    let (first, last) = (samples.first()?, samples.last()?);
    let windows: Vec<f64> = samples.windows(2).map(|pair| rate(&pair[0], &pair[1])).collect();
    let most = windows.iter().copied().reduce(f64::max)?;
    let least = windows.iter().copied().reduce(f64::min)?;
    let over_all = rate(first, last);
    Some(Held {
        transport: args.transport.clone(),
        channels: args.channels,
        limit: args.limit,
        seconds: (last.at_ms - first.at_ms) / 1e3,
        rate: over_all,
        most,
        least,
        windows: windows.len(),
        holds: (over_all - 1.0).abs() <= OFF && most <= BURST,
    })
}
