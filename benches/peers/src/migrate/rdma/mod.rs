//! `ramwire-bench migrate --transport rdma`: ours and QEMU's migrations over one device, compared with bare RDMA
//! WRITEs.
//!
//! All contestants run alternately on the same memory, as over TCP. The cost of the device itself is the same for all
//! and hides that of a program, so the programs' own costs are counted too: processor time outside of the kernel in
//! every run, system calls and requests in one more run each that is not timed.

mod ours;
mod report;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ramwire::sys::CancelToken;
use ramwire::transport::{RdmaOptions, rdma_address};

use super::bed::Bed;
use super::contestant::Against;
use super::own;
use super::strace::Strace;
use super::watch::{Unwatched, Watcher};
use super::{MigrateArgs, Run, turns, verified};
use crate::BenchError;
use crate::perftest;
use crate::qemu::{Qemu, Way};
use ours::Ours;
use report::Counted;

pub use report::Report;

/// A program that migrates the memory over RDMA.
enum Mover {
    Ours(Ours),
    Qemu(Qemu),
    /// Bare WRITEs of 1 MiB, as many bytes as the RAM has.
    IbWriteBw(perftest::Device),
}

impl Mover {
    fn of(against: Against, host: &str, args: &MigrateArgs) -> Result<Self, BenchError> {
        match against {
            Against::Ramwire(way) if way == own::Way::default() => {
                let queue_pairs = args.rdma.queue_pairs;
                let mut options = RdmaOptions::default();
                options.pin_all = args.rdma.pin_all;
                options.queue_pairs = queue_pairs;
                Ok(Self::Ours(Ours { host: host.to_owned(), options }))
            }
            Against::Qemu { version, channels: 0 } => {
                let given = if version == "7.2" { &args.qemu72 } else { &args.qemu100 };
                let way = Way::Rdma { host: host.to_owned(), pin_all: args.rdma.pin_all };
                Ok(Self::Qemu(Qemu::find(&against.to_string(), version, given.as_deref(), way)?))
            }
            Against::IbWriteBw => Ok(Self::IbWriteBw(perftest::Device::at(host)?)),
            _ => Err(BenchError::NotThisWay {
                who: against.to_string(),
                known: "qemu72, qemu10 and ib_write_bw",
            }),
        }
    }

    fn fills_destination(&self) -> bool {
        !matches!(self, Self::IbWriteBw(_))
    }

    fn run(&self, bed: &Bed, watcher: &mut dyn Watcher) -> Result<Run, BenchError> {
        bed.renew()?;
        match self {
            Self::Ours(ours) => ours.run(bed, watcher, None),
            Self::Qemu(qemu) => qemu.run_watched(bed, watcher),
            Self::IbWriteBw(device) => device.bandwidth(bed.bytes()),
        }
    }

    /// One more run, without timing.
    fn count(&self, bed: &Bed) -> Result<Option<Counted>, BenchError> {
        bed.renew()?;
        let mut strace = Strace::new(bed.folder().to_owned())?;
        let posted = Arc::new(AtomicU64::new(0));
        match self {
            Self::Ours(ours) => ours.run(bed, &mut strace, Some(Arc::clone(&posted)))?,
            Self::Qemu(qemu) => qemu.run_watched(bed, &mut strace)?,
            Self::IbWriteBw(_) => return Ok(None),
        };
        let requests = matches!(self, Self::Ours(_)).then(|| posted.load(Ordering::Relaxed));
        Ok(Counted::new(strace.into_calls(), requests))
    }
}

/// Runs all contestants alternately.
///
/// # Errors
/// [`BenchError`].
pub fn migrate(args: &MigrateArgs, cancel: &CancelToken) -> Result<Report, BenchError> {
    args.check()?;
    let host = match &args.rdma.host {
        Some(host) => host.clone(),
        None => rdma_address(args.ram).map_err(|why| BenchError::NoRdma(Box::new(why)))?.to_string(),
    };
    let against = args
        .against
        .clone()
        .unwrap_or_else(|| vec![Against::Qemu { version: "10.0", channels: 0 }, Against::IbWriteBw]);
    let all = [vec![Against::Ramwire(own::Way::default())], against].concat();
    let names: Vec<String> = all.iter().map(|against| against.to_string()).collect();
    let movers: Result<Vec<Mover>, _> = all.iter().map(|against| Mover::of(*against, &host, args)).collect();
    let movers = movers?;
    let bed = Bed::make(&args.memory_dir, args.ram, args.fill, args.populated, args.memory)?;
    let rounds = turns(args.pairs, movers.len(), cancel, |round, at| {
        let run = || movers[at].run(&bed, &mut Unwatched);
        let verify = round == 0 && !args.no_verify && movers[at].fills_destination();
        let run = if verify { verified(&names[at], &bed, run) } else { run() }?;
        tracing::info!(round, who = %names[at], seconds = run.seconds, cost = ?run.cost(), "run");
        Ok(run)
    })?;
    let mut counted = Vec::new();
    for mover in movers.iter().filter(|_| !args.rdma.no_count) {
        if cancel.is_cancelled() {
            return Err(BenchError::Cancelled);
        }
        counted.push(mover.count(&bed)?);
    }
    Ok(Report::new(args, &host, &names, &rounds, counted))
}
