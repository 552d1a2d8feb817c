//! `ramwire-bench`: ramwire compared with other programs. It measures the project; operators do not need it.
//!
//! | command | question |
//! |---|---|
//! | `migrate` | how fast is a whole migration compared with QEMU's, bare loops, iperf3, memcpy and bare RDMA WRITEs? |
//! | `converge` | does a guest that writes as fast as the link carries, or faster, still arrive? |
//! | `limit` | does `--max-bandwidth` hold, over all of a run and over each tenth of a second? |
//! | `snapshot` | how long does a running guest stand still for a snapshot, and how long do its writes wait? |
//! | `checkpoint` | how long does a guest with a standby stand still for each checkpoint, and how much does it still write? |
//! | `restore` | how fast is a guest read from its file, and how soon does one run whose memory is read behind it? |
//! | `postcopy` | how long does a thread wait for a missing page, beside a bare handler or a bare RDMA READ; how fast does the rest follow? |
//! | `latency` | how long does an RDMA WRITE take compared with perftest's? |
//!
//! `converge`, `limit` and `latency` run the command `ramwire`, which is next to this program after `cargo build
//! --release`.
#![allow(unreachable_pub)]

mod checkpoint;
mod converge;
mod error;
mod interval;
#[cfg(feature = "rdma")]
mod latency;
mod limit;
mod migrate;
mod output;
#[cfg(feature = "rdma")]
mod perftest;
#[path = "../../../src/cli/plot.rs"]
#[allow(dead_code, reason = "the command draws more")]
mod plot;
mod postcopy;
mod program;
mod qemu;
mod qmp;
mod restore;
mod signal;
#[path = "../../../src/cli/sizes.rs"]
#[allow(dead_code, reason = "the command reads more")]
mod sizes;
#[path = "../../../src/cli/slow_link.rs"]
mod slow_link;
mod snapshot;

use std::process::ExitCode;

use clap::Parser;
use ramwire::error::Chain;
use ramwire::sys::CancelToken;

pub use error::BenchError;

/// Measures ramwire beside other programs, on the same memory, in turns.
#[derive(Debug, Parser)]
#[command(name = "ramwire-bench", version, about, max_term_width = 100)]
struct Cli {
    /// What to log to standard error: error, warn, info, debug, trace, or tracing's filter syntax
    #[arg(long, global = true, default_value = "error", value_name = "FILTER")]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Whole migrations on this machine, over sockets or RDMA, paired with other programs'
    Migrate(migrate::MigrateArgs),
    /// Whether a guest that writes as fast as the link carries, or faster, still arrives
    Converge(converge::ConvergeArgs),
    /// Whether a bandwidth limit holds, over all of a run and over each tenth of a second
    Limit(limit::LimitArgs),
    /// How long a running guest stands still for a snapshot, how long its writes wait, and how many are left meanwhile
    Snapshot(snapshot::SnapshotArgs),
    /// How long a guest with a standby stands still for each checkpoint, and how many of its writes are left
    Checkpoint(checkpoint::CheckpointArgs),
    /// How fast a guest is read from its file, and how soon one runs whose memory is read behind it
    Restore(restore::RestoreArgs),
    /// How long a thread waits for a missing page, and how fast the rest follows, paired with a bare handler and precopy,
    /// or over RDMA with perftest's READs
    Postcopy(postcopy::PostcopyArgs),
    /// How long an RDMA WRITE takes, paired with perftest's ib_write_lat
    #[cfg(feature = "rdma")]
    Latency(latency::LatencyArgs),
    /// The other process of a run
    #[command(hide = true)]
    Peer(migrate::peer::PeerArgs),
    /// The process of a source
    #[cfg(feature = "rdma")]
    #[command(hide = true)]
    Source(postcopy::source::SourceArgs),
}

impl Command {
    /// True for the process that another one of this program has started.
    fn is_of_another(&self) -> bool {
        match self {
            Self::Peer(_) => true,
            #[cfg(feature = "rdma")]
            Self::Source(_) => true,
            _ => false,
        }
    }
}

/// How a run ended: 0, 3 or 4, as with the command `ramwire`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It measured, and the tested limits hold.
    Done,
    /// It could not measure, or the tested limits do not hold.
    Failed,
    /// A signal ended it.
    Cancelled,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::Failed => 3,
            Exit::Cancelled => 4,
        })
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match tracing_subscriber::EnvFilter::try_new(&cli.log) {
        Ok(filter) => tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init(),
        Err(error) => {
            output::note!("ramwire-bench: --log {}: {error}; try --log debug", cli.log);
            return ExitCode::from(2);
        }
    }
    let cancel = CancelToken::default();
    // The other process ends with the one that started it, through its connection or the terminal's signal.
    if !cli.command.is_of_another() {
        signal::cancel(cancel.clone());
    }
    let done = match &cli.command {
        Command::Migrate(args) => migrate::run(args, &cancel).map(|()| Exit::Done),
        Command::Converge(args) => converge::run(args, &cancel),
        Command::Limit(args) => limit::run(args),
        Command::Restore(args) => restore::run(args, &cancel),
        Command::Snapshot(args) => snapshot::run(args, &cancel),
        Command::Checkpoint(args) => checkpoint::run(args, &cancel),
        Command::Postcopy(args) => postcopy::run(args, &cancel).map(|()| Exit::Done),
        #[cfg(feature = "rdma")]
        Command::Latency(args) => latency::run(args, &cancel).map(|()| Exit::Done),
        Command::Peer(args) => migrate::peer::serve(args).map(|()| Exit::Done),
        #[cfg(feature = "rdma")]
        Command::Source(args) => postcopy::source::serve(args).map(|()| Exit::Done),
    };
    match done {
        Ok(exit) => exit,
        // A run that the signal interrupted returns whatever error that caused.
        Err(_) if cancel.is_cancelled() => Exit::Cancelled,
        Err(error) => {
            output::note!("ramwire-bench: {}", Chain(&error));
            Exit::Failed
        }
    }
    .into()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
