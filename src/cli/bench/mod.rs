//! `ramwire bench`: the latency and the rate of messages between two hosts.

mod probe;

use std::io;

use ramwire::sys::CancelToken;

use probe::{ProbeArgs, ProbeKind};

use super::args::Exit;
use super::common;
use super::signals::cancel_on_signal;

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The other end refused.
    #[error("{who} refused {what}: {answer}")]
    Refused {
        /// The other end.
        who: String,
        /// What it was asked.
        what: String,
        /// Its answer.
        answer: String,
    },
    /// RDMA can't be used.
    #[error(transparent)]
    NoRdma(Box<dyn std::error::Error + Send + Sync>),
    /// A signal arrived.
    #[error("cancelled")]
    Cancelled,
    /// A call failed.
    #[error("{who}: {doing}")]
    Io {
        /// The other end.
        who: String,
        /// What it was doing.
        doing: &'static str,
        /// The answer.
        source: io::Error,
    },
}

/// Arguments of `ramwire bench`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    ramwire bench latency --transport tcp --size 4K --duration 2s
    ramwire bench bandwidth --listen 192.0.2.1:7000     # on one host
    ramwire bench bandwidth --connect 192.0.2.1:7000    # on another")]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum What {
    /// Measure how long messages take: RDMA WRITE, READ and SEND, TCP, UNIX sockets
    Latency(ProbeArgs),
    /// Measure how many messages a second get through
    Bandwidth(ProbeArgs),
}

/// Runs `ramwire bench`.
pub(super) fn run(args: &BenchArgs) -> Exit {
    let cancel = CancelToken::default();
    cancel_on_signal(vec![cancel.clone()]);
    let done = match &args.what {
        What::Latency(args) => probe::run(args, ProbeKind::Latency, &cancel),
        What::Bandwidth(args) => probe::run(args, ProbeKind::Bandwidth, &cancel),
    };
    match done {
        Ok(()) => Exit::Done,
        // A measurement that the signal interrupted returns whatever error that caused.
        Err(_) if cancel.is_cancelled() => Exit::Cancelled,
        Err(error) => {
            common::complain("bench", &error);
            Exit::Failed
        }
    }
}
