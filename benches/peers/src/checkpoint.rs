//! `ramwire-bench checkpoint`: how long a guest with a standby stands still for each checkpoint, and how much of its writes
//! is left.
//!
//! Source and standby are threads of this process, with memory of their own, and a socket between them.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ramwire::guest::GuestControl as _;
use ramwire::guest::synthetic::{SyntheticConfig, SyntheticGuest};
use ramwire::session::{
    CheckpointObserver, CheckpointOutcome, CheckpointReport, CheckpointSession, CheckpointSettings,
    DestinationGuest, LeaseConfig, SourceGuest, StandbyEnding, StandbySession, StandbySettings,
};
use ramwire::sys::{CancelToken, Mapping, Stop};
use ramwire::transport::{StreamChannel, StreamOptions};
use ramwire::units::Rate;
use serde::Serialize;

use crate::interval::{Median, shown};
use crate::output::result_line;
use crate::sizes::bytes;
use crate::snapshot::{failed, memory};
use crate::{BenchError, Exit};

/// Arguments of `ramwire-bench checkpoint`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ramwire-bench checkpoint
  ramwire-bench checkpoint --ram 1G --every 25 --dirty-rate 200M --turns 9 --json
  ramwire-bench checkpoint --lease 2000")]
pub struct CheckpointArgs {
    /// Memory of the guest; the standby has as much again
    #[arg(long, default_value = "256M", value_parser = bytes, value_name = "SIZE")]
    ram: u64,
    /// Milliseconds between two checkpoints, with commas between
    #[arg(long, value_delimiter = ',', default_value = "25,100,500", value_name = "MS")]
    every: Vec<u64>,
    /// Bytes that the guest writes in a second, with commas between; 0: as many as it can
    #[arg(long, value_delimiter = ',', default_value = "10M,50M,200M", value_parser = bytes, value_name = "SIZES")]
    dirty_rate: Vec<u64>,
    /// Memory that the guest keeps writing
    #[arg(long, default_value = "64M", value_parser = bytes, value_name = "SIZE")]
    working_set: u64,
    /// Threads that write
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    writers: u32,
    /// How long the guest is watched without a standby, and then with one
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600), value_name = "SECONDS")]
    seconds: u64,
    /// Turns, in each of which every case is measured once
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..1000))]
    turns: u32,
    /// With a lease of so many milliseconds
    #[arg(long, value_name = "MS")]
    lease: Option<u64>,
    /// One JSON object on standard output instead of text
    #[arg(long)]
    json: bool,
}

/// One protection.
#[derive(Clone, Copy, Debug, Serialize)]
struct Run {
    checkpoints: u64,
    pause_p50_ms: f64,
    pause_p99_ms: f64,
    /// The longest; as a rule of the first checkpoint, which holds all memory.
    pause_max_ms: f64,
    /// Writes in a second, as a share of those without a standby.
    writes_kept: f64,
    mb_per_checkpoint: f64,
    fences: u64,
}

/// The figures of one interval and one rate.
#[derive(Clone, Debug, Serialize)]
struct Case {
    every_ms: u64,
    dirty_rate: u64,
    pause_p50_ms: Option<Median>,
    pause_p99_ms: Option<Median>,
    writes_kept: Option<Median>,
    mb_per_checkpoint: Option<Median>,
    runs: Vec<Run>,
}

impl Case {
    fn of(every_ms: u64, dirty_rate: u64, runs: Vec<Run>) -> Self {
        let median = |of: fn(&Run) -> f64| Median::of(runs.iter().map(of));
        Self {
            every_ms,
            dirty_rate,
            pause_p50_ms: median(|run| run.pause_p50_ms),
            pause_p99_ms: median(|run| run.pause_p99_ms),
            writes_kept: median(|run| run.writes_kept),
            mb_per_checkpoint: median(|run| run.mb_per_checkpoint),
            runs,
        }
    }

    fn text(&self) -> String {
        format!(
            "{} MiB/s, every {} ms: paused p50 {} ms, p99 {} ms; {} of the writes kept; {} MB a checkpoint",
            self.dirty_rate >> 20,
            self.every_ms,
            shown(self.pause_p50_ms, 2),
            shown(self.pause_p99_ms, 2),
            shown(self.writes_kept, 3),
            shown(self.mb_per_checkpoint, 2),
        )
    }
}

/// Measures all cases in turns.
///
/// # Errors
/// [`BenchError`].
pub fn run(args: &CheckpointArgs, cancel: &CancelToken) -> Result<Exit, BenchError> {
    let rates = args.dirty_rate.iter();
    let cases: Vec<_> = rates.flat_map(|rate| args.every.iter().map(|every| (*every, *rate))).collect();
    let mut runs: Vec<Vec<Run>> = vec![Vec::new(); cases.len()];
    for turn in 0..args.turns {
        let mut order: Vec<usize> = (0..cases.len()).collect();
        if turn % 2 == 1 {
            order.reverse();
        }
        for which in order {
            let (every, rate) = cases[which];
            runs[which].push(one(args, every, rate, cancel)?);
        }
    }
    let cases: Vec<_> =
        cases.into_iter().zip(runs).map(|((every, rate), runs)| Case::of(every, rate, runs)).collect();
    if args.json {
        result_line!("{}", serde_json::json!({ "version": 1, "cases": cases }));
    } else {
        cases.iter().for_each(|case| result_line!("{}", case.text()));
    }
    Ok(Exit::Done)
}

/// Output of the guest: there is none. It tells that the first checkpoint, of all memory, is over.
struct Begun(CancelToken);

impl CheckpointObserver for Begun {
    fn taken(&mut self, _number: u64) {}
    fn safe(&mut self, _number: u64) {
        self.0.cancel();
    }
}

/// A guest of its own, alone and then with a standby.
fn one(args: &CheckpointArgs, every: u64, rate: u64, cancel: &CancelToken) -> Result<Run, BenchError> {
    let map = || Mapping::memfd("ram", args.ram).map_err(|error| failed("to map memory", &error));
    let (here, there) = (map()?, map()?);
    let config = SyntheticConfig {
        working_set: args.working_set,
        rate: (rate > 0).then_some(Rate(rate)),
        writers: args.writers,
        ..SyntheticConfig::default()
    };
    let mut guest =
        SyntheticGuest::filled(memory(&here)?, config).map_err(|error| failed("to fill memory", &error))?;
    let kept = SyntheticGuest::empty(memory(&there)?);
    guest.resume().map_err(|error| failed("to run", &error))?;
    let alone = written_in(args, &guest, cancel)?;
    let (report, writes) = protect(args, every, &guest, &kept, cancel)?;
    guest.pause().map_err(|error| failed("to pause", &error))?;
    let found = guest.verify().map_err(|error| failed("to be verified", &error))?;
    if !found.is_whole() {
        return Err(refused("the guest", "to be whole", format!("{found:?}")));
    }
    let (count, pauses) = (report.safe.max(1) as f64, report.pauses);
    Ok(Run {
        checkpoints: report.safe,
        pause_p50_ms: pauses.p50_us as f64 / 1e3,
        pause_p99_ms: pauses.p99_us as f64 / 1e3,
        pause_max_ms: pauses.max_us as f64 / 1e3,
        writes_kept: writes / alone,
        mb_per_checkpoint: (report.bytes - report.first_bytes) as f64 / 1e6 / (count - 1.0).max(1.0),
        fences: report.fences,
    })
}

/// The report, and the guest's writes in a second while it had a standby.
fn protect(
    args: &CheckpointArgs,
    every: u64,
    guest: &SyntheticGuest,
    kept: &SyntheticGuest,
    cancel: &CancelToken,
) -> Result<(CheckpointReport, f64), BenchError> {
    let (near, far) = UnixStream::pair().map_err(|error| failed("a socket", &error))?;
    let channel = |socket: UnixStream| {
        let channel = StreamChannel::from_fd(socket.into(), "peer", &StreamOptions::default());
        channel.map_err(|error| failed("the connection", &error))
    };
    let arriving =
        DestinationGuest { memory: Box::new(kept.memory().clone()), control: Box::new(kept.clone()) };
    let standby = StandbySession::new(arriving, channel(far)?, StandbySettings::default());
    let standby = standby.spawn().map_err(|error| failed("a standby", &error))?;
    let source = SourceGuest {
        memory: guest.memory().clone(),
        dirty: vec![guest.software()],
        control: Box::new(guest.clone()),
    };
    let mut settings = CheckpointSettings::default();
    settings.interval = Some(Duration::from_millis(every));
    settings.lease = args.lease.map(Duration::from_millis).map(|time| LeaseConfig { time, stop: time / 4 });
    let begun = CancelToken::default();
    let observer = Box::new(Begun(begun.clone()));
    let session = CheckpointSession::new(source, channel(near)?, observer, settings);
    let protected = session.and_then(CheckpointSession::spawn).map_err(|error| failed("a source", &error))?;
    while !begun.is_cancelled() && !protected.is_finished() && !cancel.is_cancelled() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let writes = written_in(args, guest, cancel);
    protected.stop();
    let report = protected.wait().map_err(|error| failed("a source", &error))?;
    if report.outcome != CheckpointOutcome::Stopped {
        return Err(refused("ramwire", "a protection", format!("{report:?}")));
    }
    let there = standby.wait().map_err(|error| failed("a standby", &error))?;
    if there.ending != StandbyEnding::Released {
        return Err(refused("ramwire", "a standby", format!("{there:?}")));
    }
    Ok((report, writes?))
}

fn refused(who: &str, what: &str, answer: String) -> BenchError {
    BenchError::Refused { who: who.into(), what: what.into(), answer }
}

/// Pages that the guest writes in a second.
fn written_in(
    args: &CheckpointArgs,
    guest: &SyntheticGuest,
    cancel: &CancelToken,
) -> Result<f64, BenchError> {
    let (at, began) = (guest.pages_written(), Instant::now());
    match Stop::on(cancel).sleep(Duration::from_secs(args.seconds)) {
        Some(_) => Err(BenchError::Cancelled),
        None => Ok((guest.pages_written() - at) as f64 / began.elapsed().as_secs_f64()),
    }
}
