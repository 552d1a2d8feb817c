//! A migration by ramwire: a `ramwire demo` of its own.

use std::process::Stdio;

use serde_json::Value;

use super::cell::{Point, Run};
use super::{BenchError, ConvergeArgs, Means};

impl Means {
    fn arguments(self, args: &ConvergeArgs) -> Vec<String> {
        let words: &[&str] = match self {
            Self::None => &[],
            Self::Xbzrle => &["--write-size=64", "--xbzrle-cache-size"],
            Self::AutoConverge => &["--auto-converge"],
            Self::DirtyLimit => &["--dirty-limit", "--vcpu-dirty-limit"],
        };
        let size = match self {
            Self::Xbzrle => Some(args.cache()),
            Self::DirtyLimit => Some(args.quota()),
            _ => None,
        };
        words.iter().map(ToString::to_string).chain(size.map(|size| size.to_string())).collect()
    }
}

pub(super) fn run(args: &ConvergeArgs, rate: f64, means: Means, seed: u32) -> Result<Run, BenchError> {
    let failed = |answer: String| BenchError::Refused {
        who: "ramwire demo".into(),
        what: means.name().into(),
        answer,
    };
    let written = args.written(rate);
    let out = args
        .program
        .command()?
        .args(["demo", "--json", "--transport=tcp", "--no-digest", "--writers=1", "--populate"])
        .arg(format!("--ram={}", args.ram))
        .arg(format!("--working-set={}", args.working_set))
        .arg(format!("--max-bandwidth={}", args.bandwidth))
        .arg(format!("--link-rate={}", args.bandwidth))
        .arg(format!("--downtime-ms={}", args.downtime_ms))
        .arg(format!("--dirty-rate={written}"))
        .arg(format!("--seed={seed}"))
        .arg(format!("--timeout={}", args.timeout(means)))
        .args(means.arguments(args))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    let errors = String::from_utf8_lossy(&out.stderr);
    let told: Value =
        serde_json::from_slice(&out.stdout).map_err(|error| failed(format!("{error}: {errors}")))?;
    let number = |name: &str| told[name].as_u64().unwrap_or(0);
    let time = |name: &str| told[name].as_f64().unwrap_or(0.0);
    let rounds = told["round_log"].as_array().map_or(&[][..], Vec::as_slice);
    Ok(Run {
        converged: told["status"] == "completed",
        verified: told["verified"] == true,
        said_so: told["stalled"] == true || errors.contains("did not converge"),
        total_ms: time("total_ms"),
        downtime_ms: time("downtime_ms"),
        expected_ms: rounds.last().and_then(|round| round["expected_downtime_ms"].as_f64()),
        downtime_parts: told["downtime_parts"].clone(),
        rounds: number("rounds"),
        speed: number("guest_bytes_per_s") as f64 / written.max(1) as f64,
        throttle_percent_most: number("throttle_percent_most"),
        vcpu_rest_percent: number("vcpu_rest_percent"),
        reached: None,
        refused: None,
        remaining: remaining(&told, rounds),
    })
}

/// The remaining memory when each round began.
fn remaining(told: &Value, rounds: &[Value]) -> Vec<Point> {
    let mut at = told["setup_ms"].as_f64().unwrap_or(0.0);
    let point = |round: &Value| {
        let began = at / 1e3;
        at += round["took_ms"].as_f64().unwrap_or(0.0);
        (began, round["dirty_pages"].as_f64().unwrap_or(0.0) / 256.0)
    };
    rounds.iter().map(point).collect()
}
