//! `ramwire-bench migrate`: whole migrations compared with other programs' on the same memory, alternately.

pub mod bed;
mod contestant;
pub mod cost;
mod floors;
mod iperf;
mod kernel;
mod openssl;
pub mod own;
pub mod peer;
#[cfg(feature = "rdma")]
mod rdma;
mod report;
#[cfg(feature = "rdma")]
mod strace;
pub mod watch;

use std::io;
use std::path::PathBuf;

use ramwire::sys::CancelToken;
use serde::Serialize;

use bed::{Bed, Fill, Memory};
use contestant::{Against, Mover};
use cost::Cost;
use floors::Pattern;
use own::Way;
use report::{Report, Setting};

use crate::BenchError;
use crate::output::{note, result_line, result_text};
use crate::plot::PlotError;
use crate::sizes;

/// Figures of one run.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Run {
    /// Wall time in seconds.
    pub seconds: f64,
    /// Part of it before the first page: connecting, registering memory. Reported where it matters, over RDMA.
    pub setup_seconds: Option<f64>,
    /// Cost of the sending process, if it could be read.
    pub source: Option<Cost>,
    /// Cost of the receiving process, if there is one and it could be read.
    pub destination: Option<Cost>,
    /// Downtime in ms, if there is one.
    pub downtime_ms: Option<f64>,
    /// Seconds that a bare populate of the same memory took directly before, if the destination has no pages.
    pub populate_seconds: Option<f64>,
}

impl Run {
    /// Both processes together.
    pub fn cost(&self) -> Option<Cost> {
        let there = self.destination.unwrap_or_default();
        self.source.map(|here| Cost {
            cpu_seconds: here.cpu_seconds + there.cpu_seconds,
            user_seconds: here.user_seconds + there.user_seconds,
            page_faults: here.page_faults + there.page_faults,
        })
    }
}

/// Arguments of `ramwire-bench migrate`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ramwire-bench migrate --against qemu10,floor --ram 4G --pairs 15
  ramwire-bench migrate --against qemu10:4,memcpy --fill mixed:70 --json > figures.json
  ramwire-bench migrate --against qemu10,qemu10:4 --ram 1G --populated no --memory huge
  ramwire-bench migrate --tls-dir certificates --channels 2 --against qemu10:4,openssl,qemu10,ramwire --ram 1G
  ramwire-bench migrate --transport rdma --against qemu10,qemu72,ib_write_bw --ram 128M --pairs 5 --pin-all

Peers over RDMA:
  qemu72, qemu10       QEMU 7.2 or 10.0 to the same, registering memory in the same way
  ib_write_bw          bare RDMA WRITEs of 1 MiB (perftest)

Peers over sockets:
  ramwire, ramwire:4   ramwire once more, with so many page channels; +unix: over a UNIX socket;
                       +whole: without looking for zero pages; +fast: with --verify fast;
                       +splice, +zerocopy: how pages on channels are sent
  qemu72, qemu10       QEMU 7.2 or 10.0 to the same, plain stream; qemu10:4 with 4 multifd channels
  floor                bare loop of the plain stream's pattern: header and page, 512 pages a call
  floor-packet         bare loop of packets received straight into RAM
  floor-direct         bare loop of buffers received straight into RAM
  sweep                one process reads the memory
  memcpy               one process copies the memory
  iperf3               one buffer of 1 MiB, again and again
  openssl              what TLS takes at best: the processor time of floor-packet, and that of encrypting and
                       decrypting the memory once by openssl speed, on two cores without a wait

Each round runs ramwire and every peer once on the same memory; every other round goes backwards. Ratios are
of the same round, so that a machine that gets slower or faster meanwhile does not count for one of them.
A floor uses the best of buffers from 64 KiB to 4 MiB, tried first. With --populated no each run is preceded
by a bare populate of the same memory, which is timed and undone; a pair whose two populates differ by more than
20 % does not count for ratios. RAM is needed twice over.")]
pub struct MigrateArgs {
    /// Whom to compare with, with commas between [default: qemu10,floor; over RDMA: qemu10,ib_write_bw]
    #[arg(long, value_delimiter = ',', value_name = "PEERS")]
    against: Option<Vec<Against>>,
    /// Guest RAM that each run moves; a multiple of 2M, larger than the caches to mean anything
    #[arg(long, default_value = "4G", value_parser = parse_size, value_name = "SIZE")]
    ram: u64,
    /// Page channels of ramwire's migration; 0: pages in the stream
    #[arg(long, default_value_t = 0, value_name = "N")]
    channels: u8,
    /// Connection of ramwire's migration
    #[arg(long, value_enum, default_value_t = Connection::Tcp)]
    transport: Connection,
    #[command(flatten)]
    rdma: RdmaArgs,
    /// What the memory holds: random, zero, or mixed:PERCENT random
    #[arg(long, default_value = "random")]
    fill: Fill,
    /// What the memory is before a run
    #[arg(long, value_enum, default_value_t = Populated::Yes)]
    populated: Populated,
    /// What a destination's memory is
    #[arg(long, value_enum, default_value_t = Memory::Shared)]
    memory: Memory,
    /// Encrypt the migrations of ramwire and of QEMUs, with the certificates of both ends in this folder, as for `ramwire demo`;
    /// the others stay as they are
    #[arg(long, value_name = "DIR", conflicts_with = "host")]
    tls_dir: Option<PathBuf>,
    /// Rounds; 15 and more for an interval that means something
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..10_000))]
    pairs: u32,
    /// One JSON object on standard output instead of a table
    #[arg(long)]
    json: bool,
    /// Draw everybody's GB a second as bars into this file, too
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Folder in memory for the guest's RAM
    #[arg(long, default_value = "/dev/shm")]
    memory_dir: PathBuf,
    /// Program of QEMU 7.2
    #[arg(long)]
    qemu72: Option<PathBuf>,
    /// Program of QEMU 10.0
    #[arg(long)]
    qemu100: Option<PathBuf>,
    /// Skip comparing the memory after each contestant's first run
    #[arg(long)]
    no_verify: bool,
}

/// A size that is valid for both a QEMU and huge pages.
fn parse_size(text: &str) -> Result<u64, String> {
    let bytes = sizes::bytes(text)?;
    let whole = bytes > 0 && bytes.is_multiple_of(2 << 20);
    if whole { Ok(bytes) } else { Err("write a multiple of 2 MiB, like 512M or 4G".into()) }
}

impl MigrateArgs {
    /// Memory that only its process has is either in the page tables or not present.
    fn check(&self) -> Result<(), BenchError> {
        match (self.memory, self.populated) {
            (Memory::Huge, Populated::Backed) => Err(BenchError::NotBacked),
            _ => Ok(()),
        }
    }
}

/// What ramwire's migration runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Connection {
    /// TCP over the loopback
    Tcp,
    /// A UNIX socket
    Unix,
    /// A verbs device, to itself; the QEMUs' too
    Rdma,
}

/// What is asked of migrations over RDMA.
#[derive(Clone, Debug, clap::Args)]
#[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "built without RDMA"))]
struct RdmaArgs {
    /// Over RDMA: IP address of the device; without it that of the first usable one
    #[arg(long, value_name = "ADDRESS")]
    host: Option<String>,
    /// Over RDMA: all contestants register all of RAM ahead
    #[arg(long)]
    pin_all: bool,
    /// Over RDMA: queue pairs of ramwire's migration
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=16))]
    queue_pairs: u16,
    /// Over RDMA: leave out the runs that count system calls and requests
    #[arg(long)]
    no_count: bool,
}

/// What the memory is before the clock starts, for every contestant alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Populated {
    /// Backed by the host, and in the page tables of every process
    Yes,
    /// Backed by the host; each process meets it by faults
    Backed,
    /// The destination's pages don't exist yet
    No,
}

impl Populated {
    /// Whether a process maps every page ahead; `arriving` for a destination's.
    pub fn mapped(self, arriving: bool) -> bool {
        match self {
            Self::Yes => true,
            Self::Backed => false,
            Self::No => !arriving,
        }
    }
}

/// Runs `ramwire-bench migrate`.
///
/// # Errors
/// [`BenchError`].
pub fn run(args: &MigrateArgs, cancel: &CancelToken) -> Result<(), BenchError> {
    match args.transport {
        Connection::Rdma => over_rdma(args, cancel),
        _ => migrate(args, cancel)
            .and_then(|report| publish(args, &report, report.table(), || report.picture())),
    }
}

fn publish(
    args: &MigrateArgs,
    report: &impl Serialize,
    table: String,
    picture: impl FnOnce() -> Result<String, PlotError>,
) -> Result<(), BenchError> {
    if let Some(path) = &args.svg {
        let drawn = picture().map_err(io::Error::other).and_then(|svg| std::fs::write(path, svg));
        drawn.map_err(|source| BenchError::Io {
            who: path.display().to_string(),
            doing: "drawing",
            source,
        })?;
    }
    match args.json {
        true => result_line!("{}", serde_json::json!(report)),
        false => result_text!("{table}"),
    }
    Ok(())
}

#[cfg(feature = "rdma")]
fn over_rdma(args: &MigrateArgs, cancel: &CancelToken) -> Result<(), BenchError> {
    rdma::migrate(args, cancel).and_then(|report| publish(args, &report, report.table(), || report.picture()))
}

#[cfg(not(feature = "rdma"))]
fn over_rdma(_args: &MigrateArgs, _cancel: &CancelToken) -> Result<(), BenchError> {
    Err(BenchError::NoRdma(Box::new(ramwire::transport::WhyNoRdma::NotBuilt)))
}

fn migrate(args: &MigrateArgs, cancel: &CancelToken) -> Result<Report, BenchError> {
    args.check()?;
    let way = Way { channels: args.channels, unix: args.transport == Connection::Unix, ..Way::default() };
    let default = [Against::Qemu { version: "10.0", channels: 0 }, Against::Floor(Pattern::Stream)];
    let given = args.against.as_deref().unwrap_or(&default);
    let against = || std::iter::once(Against::Ramwire(way)).chain(given.iter().copied());
    // Checked before the memory is filled.
    let found = against().map(|one| Mover::of(one, args)).collect::<Result<Vec<_>, _>>()?;
    let bed = Bed::make(&args.memory_dir, args.ram, args.fill, args.populated, args.memory)?;
    let bed = bed.encrypted(args.tls_dir.clone());
    let mut movers = Vec::new();
    for mover in found {
        movers.push(mover.settled(&bed, cancel)?);
    }
    let names: Vec<String> = against().zip(&movers).map(|(one, mover)| mover.name(one)).collect();
    let rounds = turns(args.pairs, movers.len(), cancel, |round, at| {
        let run = || movers[at].run(&bed);
        let verify = round == 0 && !args.no_verify && movers[at].fills_destination();
        let run = if verify { verified(&names[at], &bed, run) } else { run() }?;
        tracing::info!(round, who = %names[at], seconds = run.seconds, cost = ?run.cost(), "run");
        Ok(run)
    })?;
    let setting = Setting {
        ram_bytes: args.ram,
        fill: args.fill.to_string(),
        populated: name_of(&args.populated),
        memory: name_of(&args.memory),
        tls: args.tls_dir.is_some(),
        verified: !args.no_verify,
    };
    Ok(Report::new(setting, &names, &rounds))
}

fn name_of(value: &impl clap::ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// `pairs` rounds in which every one of `movers` runs once; every other round has the reverse order. One row per round.
fn turns(
    pairs: u32,
    movers: usize,
    cancel: &CancelToken,
    mut run: impl FnMut(u32, usize) -> Result<Run, BenchError>,
) -> Result<Vec<Vec<Run>>, BenchError> {
    let mut rounds = Vec::new();
    for round in 0..pairs {
        let mut runs = vec![None; movers];
        let forwards: Vec<usize> = (0..movers).collect();
        let backwards = forwards.iter().rev().copied().collect();
        for at in if round % 2 == 0 { forwards } else { backwards } {
            if cancel.is_cancelled() {
                return Err(BenchError::Cancelled);
            }
            runs[at] = Some(run(round, at)?);
        }
        rounds.push(runs.into_iter().flatten().collect());
        note!("round {} of {pairs}", round + 1);
    }
    Ok(rounds)
}

/// A run into zeroed memory that is compared afterwards.
fn verified(name: &str, bed: &Bed, run: impl FnOnce() -> Result<Run, BenchError>) -> Result<Run, BenchError> {
    match bed.compared(run)? {
        (run, None) => Ok(run),
        (_, Some(at)) => Err(BenchError::Differs { who: name.to_owned(), at }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes_are_read_as_written() {
        assert_eq!(parse_size("4G"), Ok(4 << 30));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2048k"), Ok(2 << 20));
        for wrong in ["", "0", "G", "1M", "3000000", "-4G", "99999999999G"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }
}
