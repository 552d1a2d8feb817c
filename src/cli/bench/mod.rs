//! `ramwire bench`: ramwire beside other programs, on the same memory, in turns.

mod bed;
mod floors;
mod interval;
mod iperf;
mod own;
mod peer;
mod qemu;
mod qmp;
mod report;

use std::io;
use std::path::PathBuf;
use std::str::FromStr;

use ramwire::sys::CancelToken;
use ramwire::transport::{ChannelError, OpenError};
use serde::Serialize;

use bed::{Bed, Fill};
use floors::Pattern;
use peer::PeerArgs;
use qemu::Qemu;
use report::Report;

use super::args::Exit;
use super::common;

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A program to compare with is not here.
    #[error("{program} was not found; {remedy}")]
    Missing {
        /// The program.
        program: String,
        /// What would help.
        remedy: String,
    },
    /// The memory could not be had.
    #[error("{}: {source}; --ram is needed twice over in --memory-dir", path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A contestant said no.
    #[error("{who} refused {what}: {answer}")]
    Refused {
        /// Who.
        who: String,
        /// What it was asked.
        what: String,
        /// What it said.
        answer: String,
    },
    /// The memory that arrived is not the memory that left.
    #[error("{who} moved other bytes than there were, from byte {at:#x} on; no figures of it count")]
    Differs {
        /// Who.
        who: String,
        /// First byte that differs.
        at: u64,
    },
    /// Somebody gave a signal.
    #[error("cancelled")]
    Cancelled,
    /// A call failed.
    #[error("{who}: {doing}: {source}")]
    Io {
        /// Who.
        who: String,
        /// What it was doing.
        doing: &'static str,
        /// The answer.
        source: io::Error,
    },
    /// A connection could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A connection failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
}

/// Figures of one run.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Run {
    /// Wall time in seconds.
    pub seconds: f64,
    /// Processor time of both processes in seconds, where it could be read.
    pub cpu_seconds: Option<f64>,
    /// Downtime in ms, where there is such a thing.
    pub downtime_ms: Option<f64>,
}

/// Arguments of `ramwire bench`.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum What {
    /// Whole migrations over TCP on this machine, paired with other programs'
    Migrate(MigrateArgs),
    /// The other process of a run
    #[command(hide = true)]
    Peer(PeerArgs),
}

/// Arguments of `ramwire bench migrate`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ramwire bench migrate --against qemu10,floor --ram 4G --pairs 15
  ramwire bench migrate --against qemu10:4,memcpy --fill mixed:70 --json > figures.json

Peers:
  ramwire, ramwire:4   ramwire once more, with so many page channels
  qemu72, qemu10       QEMU 7.2 or 10.0 to the same, plain stream; qemu10:4 with 4 multifd channels
  floor                bare loop of the plain stream's pattern: header and page, 512 pages a call
  floor-packet         bare loop of packets of 512 KiB received straight into RAM
  floor-direct         bare loop of buffers of 1 MiB received straight into RAM
  memcpy               one process copies the memory
  iperf3               one buffer of 1 MiB, again and again

Each round runs ramwire and every peer once on the same memory; every other round goes backwards. Ratios are
of the same round, so that a machine that gets slower or faster meanwhile does not count for one of them.
RAM is needed twice over.")]
pub struct MigrateArgs {
    /// Whom to compare with, with commas between
    #[arg(long, value_delimiter = ',', default_value = "qemu10,floor", value_name = "PEERS")]
    against: Vec<Against>,
    /// Guest RAM that each run moves; a multiple of 2M, larger than the caches to mean anything
    #[arg(long, default_value = "4G", value_parser = parse_size, value_name = "SIZE")]
    ram: u64,
    /// Page channels of ramwire's migration; 0: pages in the stream
    #[arg(long, default_value_t = 0, value_name = "N")]
    channels: u8,
    /// What the memory holds: random, zero, or mixed:PERCENT random
    #[arg(long, default_value = "random")]
    fill: Fill,
    /// What the memory is before a run
    #[arg(long, value_enum, default_value_t = Populated::Yes)]
    populated: Populated,
    /// Rounds; 15 and more for an interval that means something
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..10_000))]
    pairs: u32,
    /// One JSON object on standard output instead of a table
    #[arg(long)]
    json: bool,
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

/// A size that both a QEMU and huge pages take.
fn parse_size(text: &str) -> Result<u64, String> {
    let bytes = common::bytes(text)?;
    let whole = bytes > 0 && bytes.is_multiple_of(2 << 20);
    if whole { Ok(bytes) } else { Err("write a multiple of 2 MiB, like 512M or 4G".into()) }
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
    fn mapped(self, arriving: bool) -> bool {
        match self {
            Self::Yes => true,
            Self::Backed => false,
            Self::No => !arriving,
        }
    }
}

/// A contestant's name as given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Against {
    Ramwire { channels: u8 },
    Qemu { version: &'static str, channels: u8 },
    Floor(Pattern),
    Memcpy,
    Iperf3,
}

impl FromStr for Against {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = "write ramwire:CHANNELS, qemu72, qemu10 (with :CHANNELS perhaps), floor, floor-packet, floor-direct, memcpy or iperf3";
        let (name, channels) = match text.split_once(':') {
            Some((name, channels)) => (name, channels.parse().ok().filter(|channels| *channels > 0)),
            None => (text, Some(0)),
        };
        let channels = channels.ok_or("write 1 to 255 channels")?;
        match (name, channels) {
            ("ramwire", _) => Ok(Self::Ramwire { channels }),
            ("qemu72", _) => Ok(Self::Qemu { version: "7.2", channels }),
            ("qemu10", _) => Ok(Self::Qemu { version: "10.0", channels }),
            ("floor", 0) => Ok(Self::Floor(Pattern::Stream)),
            ("floor-packet", 0) => Ok(Self::Floor(Pattern::Packet)),
            ("floor-direct", 0) => Ok(Self::Floor(Pattern::Direct)),
            ("memcpy", 0) => Ok(Self::Memcpy),
            ("iperf3", 0) => Ok(Self::Iperf3),
            _ => Err(known.into()),
        }
    }
}

impl Against {
    fn name(self) -> String {
        match self {
            Self::Ramwire { channels: 0 } => "ramwire".into(),
            Self::Ramwire { channels } => format!("ramwire:{channels}"),
            Self::Qemu { version: "7.2", channels: 0 } => "qemu72".into(),
            Self::Qemu { version: "7.2", channels } => format!("qemu72:{channels}"),
            Self::Qemu { channels: 0, .. } => "qemu10".into(),
            Self::Qemu { channels, .. } => format!("qemu10:{channels}"),
            Self::Floor(Pattern::Stream) => "floor".into(),
            Self::Floor(Pattern::Packet) => "floor-packet".into(),
            Self::Floor(Pattern::Direct) => "floor-direct".into(),
            Self::Memcpy => "memcpy".into(),
            Self::Iperf3 => "iperf3".into(),
        }
    }
}

/// Somebody who moves the memory.
enum Mover {
    Ramwire { channels: u8 },
    Qemu(Qemu),
    Floor(Pattern),
    Memcpy,
    Iperf3,
}

impl Mover {
    fn of(against: Against, args: &MigrateArgs) -> Result<Self, BenchError> {
        Ok(match against {
            Against::Ramwire { channels } => Self::Ramwire { channels },
            Against::Qemu { version, channels } => {
                let given = if version == "7.2" { &args.qemu72 } else { &args.qemu100 };
                Self::Qemu(Qemu::find(&against.name(), version, given.as_deref(), channels)?)
            }
            Against::Floor(pattern) => Self::Floor(pattern),
            Against::Memcpy => Self::Memcpy,
            Against::Iperf3 => Self::Iperf3,
        })
    }

    /// True if the memory arrives in the bed's other file.
    fn fills_destination(&self) -> bool {
        !matches!(self, Self::Memcpy | Self::Iperf3)
    }

    fn run(&self, bed: &Bed) -> Result<Run, BenchError> {
        bed.renew()?;
        match self {
            Self::Ramwire { channels } => own::run(bed, *channels),
            Self::Qemu(qemu) => qemu.run(bed),
            Self::Floor(pattern) => floors::run(*pattern, bed),
            Self::Memcpy => floors::copy(bed),
            Self::Iperf3 => iperf::run(bed),
        }
    }
}

/// Runs `ramwire bench`.
pub(super) fn run(args: &BenchArgs) -> Exit {
    let cancel = CancelToken::default();
    let done = match &args.what {
        What::Migrate(args) => {
            common::cancel_on_signal(vec![cancel.clone()]);
            migrate(args, &cancel).map(|report| match args.json {
                true => println!("{}", serde_json::json!(report)),
                false => print!("{}", report.table()),
            })
        }
        // Ends with the process that started it, by its connection or by the terminal's signal.
        What::Peer(args) => peer::serve(args),
    };
    match done {
        Ok(()) => Exit::Done,
        // A run that the signal broke reports whatever it broke on.
        Err(_) if cancel.is_cancelled() => Exit::Cancelled,
        Err(error) => {
            common::complain("bench", &error);
            Exit::Failed
        }
    }
}

fn migrate(args: &MigrateArgs, cancel: &CancelToken) -> Result<Report, BenchError> {
    let own = Against::Ramwire { channels: args.channels };
    let mut names = vec![own.name()];
    let mut movers = vec![Mover::of(own, args)?];
    for against in &args.against {
        names.push(against.name());
        movers.push(Mover::of(*against, args)?);
    }
    let bed = Bed::make(&args.memory_dir, args.ram, args.fill, args.populated)?;
    let mut rounds = Vec::new();
    for round in 0..args.pairs {
        let mut runs = vec![None; movers.len()];
        let forwards: Vec<usize> = (0..movers.len()).collect();
        let backwards = forwards.iter().rev().copied().collect();
        for at in if round % 2 == 0 { forwards } else { backwards } {
            if cancel.is_cancelled() {
                return Err(BenchError::Cancelled);
            }
            let verify = round == 0 && !args.no_verify && movers[at].fills_destination();
            let run = if verify { verified(&movers[at], &names[at], &bed)? } else { movers[at].run(&bed)? };
            tracing::info!(round, who = %names[at], seconds = run.seconds, cpu = ?run.cpu_seconds, "run");
            runs[at] = Some(run);
        }
        rounds.push(runs.into_iter().flatten().collect());
        eprintln!("round {} of {}", round + 1, args.pairs);
    }
    let fill = match args.fill {
        Fill::Random => "random".to_owned(),
        Fill::Zero => "zero".to_owned(),
        Fill::Mixed(percent) => format!("mixed:{percent}"),
    };
    let populated = clap::ValueEnum::to_possible_value(&args.populated);
    let populated = populated.map_or_else(String::new, |value| value.get_name().to_owned());
    Ok(Report::new(args.ram, fill, populated, !args.no_verify, &names, &rounds))
}

/// A run into zeroed memory that is compared afterwards.
fn verified(mover: &Mover, name: &str, bed: &Bed) -> Result<Run, BenchError> {
    bed.clear_destination()?;
    let run = mover.run(bed)?;
    match bed.difference()? {
        None => Ok(run),
        Some(at) => Err(BenchError::Differs { who: name.to_owned(), at }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_and_sizes_are_read_as_written() {
        for name in [
            "ramwire",
            "ramwire:8",
            "qemu72",
            "qemu10",
            "qemu10:4",
            "floor",
            "floor-packet",
            "floor-direct",
            "memcpy",
            "iperf3",
        ] {
            assert_eq!(name.parse::<Against>().unwrap().name(), name);
        }
        for wrong in ["qemu11", "floor:2", "qemu10:0", "qemu10:256", "qemu10:", ""] {
            assert!(wrong.parse::<Against>().is_err(), "{wrong}");
        }
        assert_eq!(parse_size("4G"), Ok(4 << 30));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("2048k"), Ok(2 << 20));
        for wrong in ["", "0", "G", "1M", "3000000", "-4G", "99999999999G"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_missing_program_is_named_with_what_would_help() {
        let none = PathBuf::from("/none");
        let error = Qemu::find("qemu10", "10.0", Some(&none), 0).unwrap_err();
        assert!(error.to_string().contains("ci/setup") && error.to_string().contains("--qemu100"), "{error}");
    }
}
