//! `ramwire-bench restore`: how fast a guest's memory is read from its file, beside threads that only read the file, and how
//! soon a guest runs whose memory is read behind it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ramwire::guest::GuestControl as _;
use ramwire::guest::synthetic::{SyntheticConfig, SyntheticGuest};
use ramwire::session::{DestinationGuest, Ending, RestoreSession, RestoreSettings, RestoreWay, Zeroed};
use ramwire::sys::{CancelToken, Mapping};
use ramwire::units::Rate;
use rustix::fs::{Advice, fadvise};
use serde::Serialize;

use crate::interval::{Median, shown};
use crate::output::result_line;
use crate::sizes::bytes;
use crate::snapshot::{address, failed, memory, take};
use crate::{BenchError, Exit};

/// Arguments of `ramwire-bench restore`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ramwire-bench restore --ram 4G --dir /srv/images
  ramwire-bench restore --ram 1G --sparse 64G --dir /dev/shm")]
pub struct RestoreArgs {
    /// Memory of the guest; three quarters of it hold something
    #[arg(long, default_value = "1G", value_parser = bytes, value_name = "SIZE")]
    ram: u64,
    /// Memory of a guest of which nearly nothing is used: how soon does it run?
    #[arg(long, default_value = "64G", value_parser = bytes, value_name = "SIZE")]
    sparse: u64,
    /// Turns
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..1000))]
    pairs: u32,
    /// Where the files are written
    #[arg(long, default_value = ".", value_name = "DIR")]
    dir: PathBuf,
    /// Leave the file in the page cache; without it, it is dropped from there before each run
    #[arg(long)]
    cached: bool,
    /// One JSON object on standard output instead of text
    #[arg(long)]
    json: bool,
}

/// Threads of the bare loop; ours are as many, or as many as there are cores.
const THREADS: u64 = 4;
/// Bytes of a read of the bare loop.
const PART: u64 = 1 << 20;
/// A guest whose memory is read behind it runs within this time.
const START: Duration = Duration::from_millis(10);

#[derive(Debug, Serialize)]
struct Report {
    ram: u64,
    cached: bool,
    eager_gb_per_s: Option<Median>,
    bare_gb_per_s: Option<Median>,
    /// Ours over the bare loop's, of the same turn.
    eager_ratio: Option<Median>,
    lazy_start_ms: Option<Median>,
    sparse: u64,
    sparse_start_ms: Option<Median>,
    holds: bool,
}

/// A file that is removed in the end.
struct Saved(PathBuf);

impl Drop for Saved {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

/// Restores in turns.
///
/// # Errors
/// [`BenchError`].
pub fn run(args: &RestoreArgs, cancel: &CancelToken) -> Result<Exit, BenchError> {
    let used = saved(args, "used", args.ram, args.ram, cancel)?;
    let sparse = saved(args, "sparse", args.sparse, 0, cancel)?;
    let len = std::fs::metadata(&used.0).map_err(|source| io("its length", source))?.len();
    let (mut eager, mut bare, mut lazy, mut far) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let rate = |time: Duration| len as f64 / 1e9 / time.as_secs_f64();
    for turn in 0..args.pairs {
        if cancel.is_cancelled() {
            return Err(BenchError::Cancelled);
        }
        for first in [turn % 2 == 0, turn % 2 == 1] {
            forget(args, &used.0)?;
            match first {
                true => eager.push(rate(restored(&used.0, args.ram, false, RestoreWay::Eager)?)),
                false => bare.push(rate(read(&used.0, len)?)),
            }
        }
        forget(args, &used.0)?;
        lazy.push(restored(&used.0, args.ram, false, RestoreWay::Lazy)?.as_secs_f64() * 1e3);
        forget(args, &sparse.0)?;
        far.push(restored(&sparse.0, args.sparse, true, RestoreWay::Lazy)?.as_secs_f64() * 1e3);
    }
    let ratios = eager.iter().zip(&bare).map(|(ours, bare)| ours / bare);
    let (eager_ratio, lazy, far) = (Median::of(ratios), Median::of(lazy), Median::of(far));
    let within = |found: &Option<Median>| found.is_some_and(|m| m.median <= START.as_secs_f64() * 1e3);
    let report = Report {
        ram: args.ram,
        cached: args.cached,
        eager_gb_per_s: Median::of(eager),
        bare_gb_per_s: Median::of(bare),
        eager_ratio,
        holds: within(&lazy) && within(&far) && eager_ratio.is_some_and(|ratio| ratio.median >= 0.9),
        lazy_start_ms: lazy,
        sparse: args.sparse,
        sparse_start_ms: far,
    };
    if args.json {
        result_line!("{}", serde_json::json!(report));
    } else {
        result_line!(
            "{} MiB, {}: eager {} GB/s; {THREADS} threads that only read {} GB/s; ours over theirs {}; lazy: runs after {} ms; \
             {} MiB, nearly unused: after {} ms: {} (0.9 of bare reads, {} ms)",
            args.ram >> 20,
            if args.cached { "in the page cache" } else { "not in the page cache" },
            shown(report.eager_gb_per_s, 2),
            shown(report.bare_gb_per_s, 2),
            shown(report.eager_ratio, 2),
            shown(report.lazy_start_ms, 2),
            args.sparse >> 20,
            shown(report.sparse_start_ms, 2),
            if report.holds { "held" } else { "NOT held" },
            START.as_millis(),
        );
    }
    Ok(if report.holds { Exit::Done } else { Exit::Failed })
}

fn io(doing: &'static str, source: std::io::Error) -> BenchError {
    BenchError::Io { who: "the file".into(), doing, source }
}

/// A guest larger than this host has memory in a file: of private memory the kernel must be able to give all.
fn mapped(ram: u64, in_file: bool) -> Result<Mapping, BenchError> {
    let mapping = if in_file { Mapping::memfd("restored", ram) } else { Mapping::anonymous(ram) };
    mapping.map_err(|error| failed("to map memory", &error))
}

/// The file of a guest that was filled, or of one that has used 1 MiB.
fn saved(
    args: &RestoreArgs,
    name: &str,
    ram: u64,
    filled: u64,
    cancel: &CancelToken,
) -> Result<Saved, BenchError> {
    let saved = Saved(args.dir.join(format!("ramwire-restore-{name}-{}", std::process::id())));
    let mapping = mapped(ram, filled == 0)?;
    // One that is not filled is all zero, which is not written.
    let zero = if filled > 0 { 25 } else { 100 };
    let config = SyntheticConfig {
        zero: ramwire::units::Percent::new(zero).unwrap_or_default(),
        working_set: 1 << 20,
        rate: Some(Rate(0)),
        ..SyntheticConfig::default()
    };
    let guest = SyntheticGuest::filled(memory(&mapping)?, config)
        .map_err(|error| failed("to fill memory", &error))?;
    take(&guest, &saved.0, cancel)?;
    Ok(saved)
}

fn forget(args: &RestoreArgs, path: &Path) -> Result<(), BenchError> {
    let file = File::open(path).map_err(|source| io("opening it", source))?;
    if args.cached {
        return Ok(());
    }
    fadvise(&file, 0, None, Advice::DontNeed)
        .map_err(|errno| io("dropping it from the page cache", errno.into()))
}

/// From the opening of the file until the guest runs.
fn restored(path: &Path, ram: u64, in_file: bool, way: RestoreWay) -> Result<Duration, BenchError> {
    let memory = memory(&mapped(ram, in_file)?)?;
    let mut guest = SyntheticGuest::empty(memory.clone());
    let mut settings = RestoreSettings::default();
    (settings.way, settings.user_mode_only) = (way, true);
    let arriving = DestinationGuest { memory: Box::new(Zeroed(memory)), control: Box::new(guest.clone()) };
    let began = Instant::now();
    let restored = RestoreSession::open(arriving, &address(path)?, settings)?
        .run()
        .map_err(|error| failed("a restore", &error))?;
    let took = began.elapsed();
    if let Some(error) = restored.report.error.as_ref().filter(|_| restored.report.ending != Ending::Running)
    {
        return Err(failed("a restore", error));
    }
    guest.pause().map_err(|error| failed("to pause", &error))?;
    if let Some(pages) = restored.pages {
        pages.end();
    }
    Ok(took)
}

/// Threads that read the file and do nothing else with it.
fn read(path: &Path, len: u64) -> Result<Duration, BenchError> {
    let file = File::open(path).map_err(|source| io("opening it", source))?;
    let next = AtomicU64::new(0);
    let began = Instant::now();
    std::thread::scope(|scope| {
        let reader = || {
            // Into memory of its own, all of it, as a guest's would be.
            let mut all = vec![0; (len / THREADS + PART) as usize];
            let mut done = 0;
            loop {
                let at = next.fetch_add(PART, Ordering::Relaxed);
                if at >= len {
                    return Ok(());
                }
                let part = PART.min(len - at) as usize;
                let from = done % (all.len() - part + 1);
                file.read_exact_at(&mut all[from..from + part], at)?;
                done += part;
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(reader)).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread has ended")))
        })
    })
    .map_err(|source| io("reading it", source))?;
    Ok(began.elapsed())
}
