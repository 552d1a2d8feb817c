//! `ramwire-bench snapshot`: how long a running guest stands still for a snapshot, how long its writes wait, and how much
//! of them is left meanwhile.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramwire::error::Chain;
use ramwire::guest::synthetic::{SyntheticConfig, SyntheticGuest};
use ramwire::guest::{GuestControl as _, MappedGuest};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    Configuration, SnapshotGuest, SnapshotOutcome, SnapshotReport, SnapshotSession, SnapshotSettings,
};
use ramwire::sys::{CancelToken, Mapping, Stop};
use ramwire::transport::{Address, ConnectionOptions, open_source};
use ramwire::units::{PageSize, Rate};
use serde::Serialize;

use crate::interval::{Median, shown};
use crate::output::result_line;
use crate::sizes::bytes;
use crate::{BenchError, Exit};

/// Arguments of `ramwire-bench snapshot`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ramwire-bench snapshot --ram 1G,4G --pairs 15
  ramwire-bench snapshot --ram 4G --dir /srv/images --dirty-rate 0")]
pub struct SnapshotArgs {
    /// Memory of the guests, with commas between; in each turn one of each, in alternating order
    #[arg(long, value_delimiter = ',', default_value = "1G,4G", value_parser = bytes, value_name = "SIZES")]
    ram: Vec<u64>,
    /// Turns
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..1000))]
    pairs: u32,
    /// Where the file is written
    #[arg(long, default_value = "/dev/shm", value_name = "DIR")]
    dir: PathBuf,
    /// Memory that the guest keeps writing
    #[arg(long, default_value = "64M", value_parser = bytes, value_name = "SIZE")]
    working_set: u64,
    /// Bytes that it writes in a second; 0: as many as it can
    #[arg(long, default_value = "200M", value_parser = bytes, value_name = "SIZE")]
    dirty_rate: u64,
    /// Threads that write
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    writers: u32,
    /// One JSON object on standard output instead of text
    #[arg(long)]
    json: bool,
}

/// The guest stands still for its device state and at most so long beside it.
const PAUSE: Duration = Duration::from_millis(5);
/// So long waits the slowest of a hundred writes, at most.
const WRITE_P99: Duration = Duration::from_micros(500);
/// How long the guest is watched before its snapshot.
const BEFORE: Duration = Duration::from_millis(500);

/// One snapshot.
#[derive(Clone, Copy, Debug, Serialize)]
struct Run {
    pause_ms: f64,
    state_ms: f64,
    protect_ms: f64,
    ahead_ms: f64,
    total_ms: f64,
    early_faults: u64,
    faults: u64,
    fault_p50_us: u64,
    fault_p99_us: u64,
    /// Writes in a second while it was taken, as a share of those before.
    writes_kept: f64,
}

/// The figures of one size.
#[derive(Clone, Debug, Serialize)]
struct Case {
    ram: u64,
    pause_ms: Option<Median>,
    /// Without the device state.
    own_pause_ms: Option<Median>,
    protect_ms: Option<Median>,
    ahead_ms: Option<Median>,
    total_ms: Option<Median>,
    fault_p99_us: Option<Median>,
    writes_kept: Option<Median>,
    holds: bool,
    runs: Vec<Run>,
}

impl Run {
    fn own_pause_ms(&self) -> f64 {
        self.pause_ms - self.state_ms
    }
}

impl Case {
    fn of(ram: u64, runs: Vec<Run>) -> Self {
        let median = |of: fn(&Run) -> f64| Median::of(runs.iter().map(of));
        let own_pause_ms = median(Run::own_pause_ms);
        let fault_p99_us = median(|run| run.fault_p99_us as f64);
        let within = |found: Option<Median>, limit: f64| found.is_some_and(|found| found.median <= limit);
        Self {
            ram,
            pause_ms: median(|run| run.pause_ms),
            own_pause_ms,
            protect_ms: median(|run| run.protect_ms),
            ahead_ms: median(|run| run.ahead_ms),
            total_ms: median(|run| run.total_ms),
            fault_p99_us,
            writes_kept: median(|run| run.writes_kept),
            holds: within(own_pause_ms, ms(PAUSE)) && within(fault_p99_us, WRITE_P99.as_secs_f64() * 1e6),
            runs,
        }
    }

    fn text(&self) -> String {
        format!(
            "{} MiB: pause {} ms, without device state {} ms, of that protecting {} ms; protected within {} ms before; \
             write p99 {} us; {} of the writes kept; all of it {} ms: {} (at most {} ms beside the state, p99 {} us)",
            self.ram >> 20,
            shown(self.pause_ms, 2),
            shown(self.own_pause_ms, 2),
            shown(self.protect_ms, 3),
            shown(self.ahead_ms, 0),
            shown(self.fault_p99_us, 0),
            shown(self.writes_kept, 2),
            shown(self.total_ms, 0),
            if self.holds { "held" } else { "NOT held" },
            PAUSE.as_millis(),
            WRITE_P99.as_micros(),
        )
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Takes the snapshots in turns.
///
/// # Errors
/// [`BenchError`].
pub fn run(args: &SnapshotArgs, cancel: &CancelToken) -> Result<Exit, BenchError> {
    let mut runs: Vec<Vec<Run>> = vec![Vec::new(); args.ram.len()];
    for turn in 0..args.pairs {
        let mut order: Vec<usize> = (0..args.ram.len()).collect();
        if turn % 2 == 1 {
            order.reverse();
        }
        for which in order {
            if cancel.is_cancelled() {
                return Err(BenchError::Cancelled);
            }
            let path = args.dir.join(format!("ramwire-snapshot-{}", std::process::id()));
            let taken = one(args, args.ram[which], &path, cancel);
            drop(std::fs::remove_file(&path));
            runs[which].push(taken?);
        }
    }
    let cases: Vec<Case> = args.ram.iter().zip(runs).map(|(ram, runs)| Case::of(*ram, runs)).collect();
    if args.json {
        result_line!("{}", serde_json::json!({ "version": 1, "cases": cases }));
    } else {
        cases.iter().for_each(|case| result_line!("{}", case.text()));
    }
    Ok(if cases.iter().all(|case| case.holds) { Exit::Done } else { Exit::Failed })
}

/// What failed, as an error of this program.
pub fn failed(what: &str, error: &(dyn std::error::Error + 'static)) -> BenchError {
    let (who, answer) = ("ramwire".into(), Chain(error).to_string());
    BenchError::Refused { who, what: what.into(), answer }
}

/// Memory of `ram` bytes in one RAM block.
///
/// # Errors
/// [`BenchError`].
pub fn memory(mapping: &Mapping) -> Result<Arc<MappedGuest>, BenchError> {
    let name = BlockName::new("ram").map_err(|error| failed("a name", &error))?;
    let block = RamBlock::new(name, mapping.region().len());
    let memory = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, mapping).build();
    Ok(Arc::new(memory.map_err(|error| failed("a RAM block", &error))?))
}

/// Takes a snapshot of `guest` into the file at `path`; it runs on.
///
/// # Errors
/// [`BenchError`].
pub fn take(
    guest: &SyntheticGuest,
    path: &std::path::Path,
    cancel: &CancelToken,
) -> Result<SnapshotReport, BenchError> {
    let mut settings = SnapshotSettings::new(Configuration { machine: "bench".into(), ..Default::default() });
    settings.user_mode_only = true;
    let given = SnapshotGuest {
        memory: guest.memory().clone(),
        control: Box::new(guest.clone()),
        other_writers: Vec::new(),
    };
    let session =
        SnapshotSession::new(given, settings).map_err(|error| failed("a snapshot of it", &error))?;
    let session = session.with_cancel(cancel.clone());
    let options = ConnectionOptions::default();
    let connection = open_source(&address(path)?, session.memory(), &options, &Stop::on(cancel))?;
    let report = session.run(connection);
    match report.error.as_ref().filter(|_| report.outcome != SnapshotOutcome::Taken) {
        Some(error) => Err(failed("a snapshot of it", error)),
        None => Ok(report),
    }
}

/// The `mapped:` address of a file.
///
/// # Errors
/// [`BenchError`].
pub fn address(path: &std::path::Path) -> Result<Address, BenchError> {
    format!("mapped:{}", path.display()).parse().map_err(|error| failed("the file", &error))
}

/// A guest of its own, a snapshot of it, and whether it is whole behind it.
fn one(
    args: &SnapshotArgs,
    ram: u64,
    path: &std::path::Path,
    cancel: &CancelToken,
) -> Result<Run, BenchError> {
    let mapping = Mapping::memfd("ram", ram).map_err(|error| failed("to map memory", &error))?;
    let config = SyntheticConfig {
        working_set: args.working_set,
        rate: (args.dirty_rate > 0).then_some(Rate(args.dirty_rate)),
        writers: args.writers,
        ..SyntheticConfig::default()
    };
    let mut guest = SyntheticGuest::filled(memory(&mapping)?, config)
        .map_err(|error| failed("to fill memory", &error))?;
    guest.resume().map_err(|error| failed("to run", &error))?;
    let before = written_in(&guest, BEFORE);
    let (at, began) = (guest.pages_written(), Instant::now());
    let report = take(&guest, path, cancel)?;
    let meanwhile = (guest.pages_written() - at) as f64 / began.elapsed().as_secs_f64();
    guest.pause().map_err(|error| failed("to pause", &error))?;
    let found = guest.verify().map_err(|error| failed("to be verified", &error))?;
    if !found.is_whole() {
        let (who, what) = ("the guest".into(), "to be whole".into());
        return Err(BenchError::Refused { who, what, answer: format!("{found:?}") });
    }
    Ok(measured(&report, meanwhile / before))
}

/// Pages that the guest writes in a second.
fn written_in(guest: &SyntheticGuest, time: Duration) -> f64 {
    let (at, began) = (guest.pages_written(), Instant::now());
    std::thread::sleep(time);
    (guest.pages_written() - at) as f64 / began.elapsed().as_secs_f64()
}

fn measured(report: &SnapshotReport, writes_kept: f64) -> Run {
    Run {
        pause_ms: ms(report.pause),
        state_ms: ms(report.state),
        protect_ms: ms(report.protect),
        ahead_ms: ms(report.ahead),
        total_ms: ms(report.total),
        early_faults: report.early_faults,
        faults: report.faults,
        fault_p50_us: report.fault_latency.p50_us,
        fault_p99_us: report.fault_latency.p99_us,
        writes_kept,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_limits_are_those_of_the_medians() {
        let run = |pause_ms, fault_p99_us| Run {
            pause_ms,
            state_ms: 1.0,
            protect_ms: 0.1,
            ahead_ms: 50.0,
            total_ms: 900.0,
            early_faults: 0,
            faults: 9,
            fault_p50_us: 40,
            fault_p99_us,
            writes_kept: 0.9,
        };
        let case =
            |runs: &[(f64, u64)]| Case::of(1 << 30, runs.iter().map(|(ms, us)| run(*ms, *us)).collect());
        assert!(case(&[(2.0, 90), (6.0, 400), (90.0, 9000)]).holds, "one slow run of three");
        assert!(!case(&[(2.0, 90), (6.1, 90), (7.0, 90)]).holds);
        assert!(!case(&[(2.0, 501), (2.0, 501), (2.0, 90)]).holds);
        let text = case(&[(2.0, 90)]).text();
        assert!(
            text.starts_with("1024 MiB: pause 2.00 [2.00, 2.00] ms") && text.contains(": held"),
            "{text}"
        );
    }
}
