//! `ramwire-bench converge`: whether a guest that writes as fast as the link carries, or faster, still arrives.
//!
//! Each run is a migration of its own through a link that carries no more than the limit ([`SlowLink`]), so that the
//! last round takes as long as between two hosts. The guest checks every page on arrival. For comparison, a QEMU
//! migrates a guest with the same writes over the same link.

mod cell;
mod ours;
mod qemu;

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use ramwire::sys::CancelToken;
use serde::Serialize;

use self::cell::{Cell, Run};
use crate::BenchError;
use crate::Exit;
use crate::output::{note, result_line, result_text};
use crate::program::Program;
use crate::sizes::bytes;
use crate::slow_link::SlowLink;

/// Arguments of `ramwire-bench converge`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ramwire-bench converge --runs 50 --pictures docs/pictures
  ramwire-bench converge --rates 3 --means xbzrle,dirty-limit --json
  ramwire-bench converge --runs 0 --qemu-runs 3 --qemu-guest $(ci/linux-guest writer)")]
pub struct ConvergeArgs {
    /// Bytes a second that the link carries, and that the migration is limited to
    #[arg(long, value_name = "SIZE", default_value = "48M", value_parser = bytes)]
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
    #[arg(long, value_name = "N", default_value = "3")]
    runs: u32,
    /// How many run at a time; the pairs take turns
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u32).range(1..=64))]
    jobs: u32,
    /// RAM of the guest
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = bytes)]
    ram: u64,
    /// Memory that it keeps writing, page after page and round again
    #[arg(long, value_name = "SIZE", default_value = "32M", value_parser = bytes)]
    working_set: u64,
    /// Longest time that it may stand still, in milliseconds
    #[arg(long, value_name = "MS", default_value = "300")]
    downtime_ms: u32,
    /// Time after which a migration without help counts as one that does not converge, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "4")]
    patience: u32,
    /// Runs of each pair between two QEMU 10.0, one at a time
    #[arg(long, value_name = "N", default_value = "0", requires = "qemu_guest")]
    qemu_runs: u32,
    /// What QEMU's guest boots from, as `ci/linux-guest writer` prints it
    #[arg(long, value_names = ["KERNEL", "DISK"], num_args = 2)]
    qemu_guest: Vec<PathBuf>,
    /// The QEMU 10.0 program; otherwise the one made by ci/setup, or on the PATH
    #[arg(long, value_name = "PATH")]
    qemu100: Option<PathBuf>,
    /// Folder for the pictures: remaining memory over time for each rate, and the downtimes
    #[arg(long, value_name = "DIR")]
    pictures: Option<PathBuf>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    program: Program,
}

/// What is done about a guest that writes fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Means {
    /// Nothing
    None,
    /// Differences to what was sent; the guest changes little of a page
    Xbzrle,
    /// A share of all vCPUs' time
    AutoConverge,
    /// A quota for each vCPU: a quarter of the link
    DirtyLimit,
}

impl Means {
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Xbzrle => "xbzrle",
            Self::AutoConverge => "auto-converge",
            Self::DirtyLimit => "dirty-limit",
        }
    }
}

/// How long a migration with help may take, in seconds.
const WITH_HELP: u32 = 120;

impl ConvergeArgs {
    /// Bytes a second that a guest at `rate` writes.
    fn written(&self, rate: f64) -> u64 {
        (self.bandwidth as f64 * rate) as u64
    }

    /// The quota of a vCPU under a dirty limit; the guest has one vCPU.
    fn quota(&self) -> u64 {
        self.bandwidth / 4
    }

    /// A cache of twice the written memory, since two pages that share a slot evict each other.
    fn cache(&self) -> u64 {
        self.working_set * 2
    }

    fn timeout(&self, means: Means) -> u32 {
        if means == Means::None { self.patience } else { WITH_HELP }
    }

    /// Every pair of a rate and a method.
    fn pairs(&self) -> impl Iterator<Item = (f64, Means)> {
        self.rates.iter().flat_map(|rate| self.means.iter().map(|means| (*rate, *means)))
    }
}

pub fn run(args: &ConvergeArgs, cancel: &CancelToken) -> Result<Exit, BenchError> {
    let qemu = (args.qemu_runs > 0).then(|| qemu::Pair::new(args)).transpose()?;
    let ours = |(rate, means), seed| ours::run(args, rate, means, seed);
    let mut cells = measure(args, "ramwire", (args.runs, args.jobs), cancel, &ours)?;
    if let Some(qemu) = qemu {
        let theirs = |(rate, means), _| qemu.run(args, rate, means);
        cells.extend(measure(args, "QEMU 10.0", (args.qemu_runs, 1), cancel, &theirs)?);
    }
    if let Some(folder) = &args.pictures {
        let drawn = cell::pictures(args, &cells).map_err(std::io::Error::other);
        let written = drawn.and_then(|pictures| {
            std::fs::create_dir_all(folder)?;
            pictures.iter().try_for_each(|(name, svg)| std::fs::write(folder.join(name), svg))
        });
        written.map_err(|source| BenchError::Io {
            who: folder.display().to_string(),
            doing: "drawing",
            source,
        })?;
    }
    if args.json {
        result_line!("{}", serde_json::to_string(&cells).unwrap_or_default());
    } else {
        result_text!("{}", cell::table(&cells));
    }
    Ok(if cells.iter().all(Cell::is_good) { Exit::Done } else { Exit::Failed })
}

/// `runs` of each pair, `jobs` at a time; every pair runs once before any runs again.
fn measure(
    args: &ConvergeArgs,
    who: &'static str,
    (runs, jobs): (u32, u32),
    cancel: &CancelToken,
    one: &(dyn Fn((f64, Means), u32) -> Result<Run, BenchError> + Sync),
) -> Result<Vec<Cell>, BenchError> {
    let pairs: Vec<_> = args.pairs().collect();
    let all = pairs.len() * runs as usize;
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || -> Result<(), BenchError> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= all {
                return Ok(());
            }
            if cancel.is_cancelled() {
                return Err(BenchError::Cancelled);
            }
            let (pair, seed) = (number % pairs.len(), (number / pairs.len()) as u32 + 1);
            let run = one(pairs[pair], seed);
            if run.is_err() {
                next.store(all, Ordering::Relaxed);
            }
            let run = run?;
            let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
            done.push((pair, run));
            note!("{who}: {} of {all}: {}", done.len(), cell::progress(args, pairs[pair], &done));
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        let ended = workers.into_iter().map(|worker| worker.join());
        // All have ended before the first error is returned.
        let ended: Vec<_> = ended.collect();
        ended.into_iter().try_for_each(|ended| ended.unwrap_or(Err(BenchError::Cancelled)))
    })?;
    let mut each = vec![Vec::new(); pairs.len()];
    for (pair, run) in done.into_inner().unwrap_or_else(PoisonError::into_inner) {
        each[pair].push(run);
    }
    let cells = pairs.into_iter().zip(each).filter(|(_, each)| !each.is_empty());
    Ok(cells.map(|((rate, means), each)| Cell::new(args, who, rate, means, each)).collect())
}
