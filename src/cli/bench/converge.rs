//! `ramwire bench converge`: whether a guest that writes as fast as the link carries, or faster, still arrives.
//!
//! Each run is a `ramwire demo` of its own, with a guest that checks every page on arrival.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde::Serialize;
use serde_json::Value;

use super::BenchError;
use super::interval::Median;
use crate::cli::args::Exit;
use crate::cli::common::bytes;
use crate::cli::plot::{self, Axis, Line, PlotError};

/// Arguments of `ramwire bench converge`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ramwire bench converge --runs 50 --json > converge.json
  ramwire bench converge --rates 3 --means xbzrle,dirty-limit --pictures docs/pictures")]
pub(super) struct ConvergeArgs {
    /// Bytes a second that the link carries
    #[arg(long, value_name = "SIZE", default_value = "100M", value_parser = bytes)]
    bandwidth: u64,
    /// What the guest writes, as multiples of that
    #[arg(long, value_name = "LIST", default_value = "0.5,1,1.5,3", value_delimiter = ',')]
    rates: Vec<f64>,
    /// What is done about it
    #[arg(
        long,
        value_name = "LIST",
        default_value = "none,xbzrle,auto-converge,dirty-limit",
        value_delimiter = ','
    )]
    means: Vec<Means>,
    /// Runs of each pair
    #[arg(long, value_name = "N", default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// RAM of the guest
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = bytes)]
    ram: u64,
    /// Memory that it keeps writing
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = bytes)]
    working_set: u64,
    /// Longest time that it may stand still, in milliseconds
    #[arg(long, value_name = "MS", default_value = "300")]
    downtime_ms: u32,
    /// Time after which a migration without help counts as one that does not converge, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "10")]
    patience: u32,
    /// Folder for the pictures: remaining memory over time for each rate
    #[arg(long, value_name = "DIR")]
    pictures: Option<PathBuf>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// What is done about a guest that writes fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Means {
    /// Nothing
    None,
    /// Differences to what was sent; the guest changes 64 bytes of a page, beside its header
    Xbzrle,
    /// A share of all vCPUs' time
    AutoConverge,
    /// A quota for each vCPU: a quarter of the link
    DirtyLimit,
}

/// How long a migration with help may take, in seconds.
const WITH_HELP: u32 = 120;
/// vCPUs of the guest.
const WRITERS: u64 = 2;
/// How much of the limit a single downtime may exceed.
const SLACK: f64 = 1.2;

impl Means {
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Xbzrle => "xbzrle",
            Self::AutoConverge => "auto-converge",
            Self::DirtyLimit => "dirty-limit",
        }
    }

    fn arguments(self, args: &ConvergeArgs) -> Vec<String> {
        let words: &[&str] = match self {
            Self::None => &[],
            // Twice what is written: two pages that share a place take it from each other.
            Self::Xbzrle => &["--write-size=64", "--xbzrle-cache-size"],
            Self::AutoConverge => &["--auto-converge"],
            Self::DirtyLimit => &["--dirty-limit", "--vcpu-dirty-limit"],
        };
        let size = match self {
            Self::Xbzrle => Some(args.working_set * 2),
            Self::DirtyLimit => Some(args.bandwidth / 4 / WRITERS),
            _ => None,
        };
        let words = words.iter().map(ToString::to_string);
        let timeout = if self == Self::None { args.patience } else { WITH_HELP };
        words.chain(size.map(|size| size.to_string())).chain([format!("--timeout={timeout}")]).collect()
    }
}

/// One migration.
#[derive(Clone, Debug, Serialize)]
struct Run {
    converged: bool,
    verified: bool,
    /// It said that its rounds led nowhere, or ended by its time.
    said_so: bool,
    total_ms: f64,
    downtime_ms: f64,
    rounds: u64,
    guest_bytes_per_s: u64,
    throttle_percent_most: u64,
    vcpu_rest_percent: u64,
    #[serde(skip)]
    remaining: Vec<(f64, f64)>,
}

/// All migrations of a rate with one means.
#[derive(Debug, Serialize)]
struct Cell {
    /// Multiple of the bandwidth.
    rate: f64,
    means: Means,
    runs: u32,
    converged: u32,
    /// Every one arrived whole, or stayed and said why.
    sound: bool,
    total_ms: Option<Median>,
    rounds: Option<Median>,
    downtime_ms: Option<Median>,
    downtime_ms_most: f64,
    /// Median within the limit, the longest within 1.2 of it; for those that converged.
    downtime_kept: bool,
    /// What the guest wrote, of what it would have.
    guest_speed: Option<Median>,
    throttle_percent_most: u64,
    each: Vec<Run>,
}

pub(super) fn run(args: &ConvergeArgs) -> Result<Exit, BenchError> {
    let mut cells = Vec::new();
    for &rate in &args.rates {
        for &means in &args.means {
            let written = (args.bandwidth as f64 * rate) as u64;
            let runs = (1..=args.runs).map(|seed| demo(args, written, means, seed));
            let cell = cell(args, rate, means, runs.collect::<Result<_, _>>()?);
            eprintln!("{}", row(&cell));
            cells.push(cell);
        }
    }
    if let Some(folder) = &args.pictures {
        let drawn = pictures(args, &cells).map_err(std::io::Error::other);
        let written = drawn.and_then(|pictures| {
            std::fs::create_dir_all(folder)?;
            pictures.iter().try_for_each(|(name, svg)| std::fs::write(folder.join(name), svg))
        });
        written.map_err(|source| BenchError::Memory { path: folder.clone(), source })?;
    }
    if args.json {
        println!("{}", serde_json::to_string(&cells).unwrap_or_default());
    } else {
        print!("{HEAD}");
        cells.iter().for_each(|cell| println!("{}", row(cell)));
    }
    let helped = |cell: &&Cell| cell.means != Means::None;
    let arrived = cells.iter().filter(helped).all(|cell| cell.converged == cell.runs);
    Ok(if arrived && cells.iter().all(|cell| cell.sound) { Exit::Done } else { Exit::Failed })
}

fn demo(args: &ConvergeArgs, written: u64, means: Means, seed: u32) -> Result<Run, BenchError> {
    let failed = |answer: String| BenchError::Refused {
        who: "ramwire demo".into(),
        what: means.name().into(),
        answer,
    };
    let program = std::env::current_exe().map_err(|error| failed(error.to_string()))?;
    let out = Command::new(program)
        .args(["demo", "--json", "--transport=tcp", "--no-digest"])
        .arg(format!("--ram={}", args.ram))
        .arg(format!("--working-set={}", args.working_set))
        .arg(format!("--max-bandwidth={}", args.bandwidth))
        .arg(format!("--downtime-ms={}", args.downtime_ms))
        .arg(format!("--dirty-rate={written}"))
        .arg(format!("--writers={WRITERS}"))
        .arg(format!("--seed={seed}"))
        .args(means.arguments(args))
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(error.to_string()))?;
    let errors = String::from_utf8_lossy(&out.stderr);
    let told: Value =
        serde_json::from_slice(&out.stdout).map_err(|error| failed(format!("{error}: {errors}")))?;
    let number = |name: &str| told[name].as_u64().unwrap_or(0);
    let time = |name: &str| told[name].as_f64().unwrap_or(0.0);
    Ok(Run {
        converged: told["status"] == "completed",
        verified: told["verified"] == true,
        said_so: told["stalled"] == true || errors.contains("did not converge"),
        total_ms: time("total_ms"),
        downtime_ms: time("downtime_ms"),
        rounds: number("rounds"),
        guest_bytes_per_s: number("guest_bytes_per_s"),
        throttle_percent_most: number("throttle_percent_most"),
        vcpu_rest_percent: number("vcpu_rest_percent"),
        remaining: remaining(&told),
    })
}

/// When each round began, in seconds, and what then remained, in MiB.
fn remaining(told: &Value) -> Vec<(f64, f64)> {
    let mut at = told["setup_ms"].as_f64().unwrap_or(0.0);
    let rounds = told["round_log"].as_array().map_or(&[][..], Vec::as_slice);
    let point = |round: &Value| {
        let began = at / 1e3;
        at += round["took_ms"].as_f64().unwrap_or(0.0);
        (began, round["dirty_pages"].as_f64().unwrap_or(0.0) / 256.0)
    };
    rounds.iter().map(point).collect()
}

fn cell(args: &ConvergeArgs, rate: f64, means: Means, each: Vec<Run>) -> Cell {
    let arrived = || each.iter().filter(|run| run.converged);
    let written = args.bandwidth as f64 * rate;
    let downtime_ms = Median::of(arrived().map(|run| run.downtime_ms));
    let most = arrived().map(|run| run.downtime_ms).fold(0.0, f64::max);
    let limit = f64::from(args.downtime_ms);
    Cell {
        rate,
        means,
        runs: args.runs,
        converged: arrived().count() as u32,
        sound: each.iter().all(|run| if run.converged { run.verified } else { run.said_so }),
        total_ms: Median::of(each.iter().map(|run| run.total_ms)),
        rounds: Median::of(each.iter().map(|run| run.rounds as f64)),
        downtime_kept: downtime_ms.is_none_or(|median| median.median <= limit) && most <= limit * SLACK,
        downtime_ms,
        downtime_ms_most: most,
        guest_speed: Median::of(each.iter().map(|run| run.guest_bytes_per_s as f64 / written)),
        throttle_percent_most: each.iter().map(|run| run.throttle_percent_most).max().unwrap_or(0),
        each,
    }
}

const HEAD: &str = "\
| writes | means | converged | time, s | rounds | downtime, ms: median, most | kept | guest's speed | most taken |
|---|---|---|---|---|---|---|---|---|
";

fn row(cell: &Cell) -> String {
    let median = |median: &Option<Median>| median.as_ref().map_or(f64::NAN, |median| median.median);
    let kept = if cell.converged == 0 {
        "-"
    } else if cell.downtime_kept {
        "yes"
    } else {
        "NO"
    };
    let downtime = match &cell.downtime_ms {
        Some(downtime) => format!("{:.1}, {:.1}", downtime.median, cell.downtime_ms_most),
        None => "-".into(),
    };
    format!(
        "| {} x | {} | {} of {}{} | {:.1} | {:.0} | {downtime} | {kept} | {:.0} % | {} |",
        cell.rate,
        cell.means.name(),
        cell.converged,
        cell.runs,
        if cell.sound { "" } else { ", UNSOUND" },
        median(&cell.total_ms) / 1e3,
        median(&cell.rounds),
        median(&cell.guest_speed) * 100.0,
        taken(cell),
    )
}

/// What was taken from the guest at most, in the words of the means.
fn taken(cell: &Cell) -> String {
    let rest = cell.each.iter().map(|run| run.vcpu_rest_percent).max().unwrap_or(0);
    match cell.means {
        Means::AutoConverge => format!("{} % of its time", cell.throttle_percent_most),
        Means::DirtyLimit => format!("rest of {rest} % of what it ran"),
        Means::None | Means::Xbzrle => "-".into(),
    }
}

/// For each rate: what remained when each round began, in the first run of each means.
fn pictures(args: &ConvergeArgs, cells: &[Cell]) -> Result<Vec<(String, String)>, PlotError> {
    let axis = |label| Axis { label, logarithmic: false, tick: plot::plain };
    let mut pictures = Vec::new();
    for rate in &args.rates {
        let of_rate = cells.iter().filter(|cell| cell.rate == *rate);
        let line = |cell: &Cell| {
            let points = cell.each.first().map(|run| run.remaining.clone()).unwrap_or_default();
            Line { name: cell.means.name().into(), points }
        };
        let lines: Vec<Line> = of_rate.map(line).filter(|line| !line.points.is_empty()).collect();
        let title = format!("A guest that writes {rate} times what the link carries");
        let svg = plot::lines(&title, axis("seconds"), axis("MiB dirty when a round begins"), &lines)?;
        pictures.push((format!("converge-{rate}.svg"), svg));
    }
    Ok(pictures)
}
