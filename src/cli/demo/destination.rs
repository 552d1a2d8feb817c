//! The demo's other end: a process of its own that takes the guest, runs it, and lets it check itself.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ramwire::engine::Ending;
use ramwire::guest::GuestMemory;
use ramwire::observe::{EventKind, LatencySummary};
use ramwire::session::{DestinationGuest, DestinationSession, DestinationSettings, MemoryProvider, Zeroed};
use ramwire::sys::{CancelToken, Stop, populate};
use ramwire::transport::{
    Address, AllowList, ConnectionOptions, DestinationConnection, Listener, OpenError, StreamChannel,
};
use ramwire::units::BlockIndex;
use rustix::event::PollFlags;
use serde::{Deserialize, Serialize};

use super::Failure;
use super::blocks::BlockSpec;
use super::cuts::{CutMemory, Cuts, Recovery};
use super::guest::{DemoGuest, GuestKind};
use super::same_host::Arriving;
use super::scratch::Scratch;
use crate::cli::args::Exit;
use crate::cli::common::{ChannelArgs, complain, local_options};
use crate::cli::output::result_line;
use crate::cli::remedies::in_words;
use crate::cli::signals::cancel_on_signal;
use crate::cli::tls::OwnTlsArgs;

/// How long the guest runs at the destination before it checks itself.
const RUN: Duration = Duration::from_millis(200);

/// Longest time in which its threads may read all memory, once it is there; less than the demo waits for the verdict.
const READS: Duration = Duration::from_secs(200);

/// How long the process may take until it listens; with --populate it touches all RAM before.
const STARTS: Duration = Duration::from_secs(120);

/// The destination's report to the demo when it ends.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Verdict {
    /// The guest ran here.
    pub(super) ran: bool,
    /// Every page had the expected contents.
    pub(super) verified: bool,
    /// Pages checked.
    pub(super) pages: u64,
    /// Wrong ones.
    pub(super) wrong: u64,
    /// The first wrong pages as text.
    pub(super) faults: Vec<String>,
    /// A digest was compared.
    pub(super) digest_compared: bool,
    /// The guest ran here before its memory had come.
    pub(super) postcopy: Option<Postcopy>,
    /// Pages that the guest's own threads read while it ran here.
    pub(super) pages_read: u64,
    /// What went wrong.
    pub(super) error: Option<String>,
}

/// The figures of a switch to postcopy here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Postcopy {
    /// Milliseconds from the device state's last byte until the guest was started.
    pub(super) time_to_run_ms: f64,
    /// Milliseconds from that start until all memory was there.
    pub(super) all_came_ms: f64,
    /// Faults of missing pages.
    pub(super) faults: u64,
    /// Requests that were sent for them.
    pub(super) requests: u64,
    /// From a fault to its page in place.
    pub(super) fault_latency: LatencySummary,
    /// Milliseconds in which each of the guest's threads waited for pages, and in which all did.
    pub(super) vcpu_blocked_ms: Vec<f64>,
    pub(super) all_blocked_ms: f64,
    /// The connection was cut, and another took its place.
    pub(super) recoveries: Vec<Recovery>,
}

/// The hidden command that the demo starts.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    uri: Address,
    #[arg(long)]
    guest: GuestKind,
    #[arg(long)]
    block: Vec<BlockSpec>,
    #[arg(long = "thp", alias = "huge-pages")]
    huge_pages: bool,
    #[arg(long)]
    populate: bool,
    #[arg(long)]
    postcopy: bool,
    #[arg(long, default_value = "0")]
    cut: u32,
    #[arg(long)]
    same_host: bool,
    #[command(flatten)]
    channels: ChannelArgs,
    #[command(flatten)]
    tls: OwnTlsArgs,
}

/// The process, as the demo uses it. Dropping it ends it.
pub(super) struct Process {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Process {
    pub(super) fn start(
        address: &Address,
        demo: &super::Args,
        blocks: &[BlockSpec],
        postcopy: bool,
    ) -> Result<Self, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("demo-destination").arg(address.to_string()).args(["--guest", demo.guest.name()]);
        // Memory that is passed has its own length.
        for block in blocks.iter().filter(|_| !demo.same_host) {
            command.arg("--block").arg(block.to_string());
        }
        command.args(demo.populate.then_some("--populate")).args(demo.huge_pages.then_some("--thp"));
        command.args(postcopy.then_some("--postcopy")).arg(format!("--cut={}", demo.cut));
        command.args(demo.same_host.then_some("--same-host"));
        command.args(demo.channels.both().arguments()).args(demo.tls.argument());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let out = child.stdout.take().ok_or_else(|| io::Error::other("the destination has no output"))?;
        Ok(Self { child, out: BufReader::new(out) })
    }

    /// The next line that it prints, which must begin within `patience`.
    fn line(&mut self, patience: Duration) -> Result<String, Failure> {
        let mut line = String::new();
        let out = self.out.get_ref().as_fd();
        let silent = || format!("the destination process printed nothing for {} s", patience.as_secs());
        let stop = Stop::never().within(patience);
        if self.out.buffer().is_empty() && stop.wait(out, PollFlags::IN)?.is_some() {
            return Err(silent().into());
        }
        if self.out.read_line(&mut line)? == 0 {
            let status = self.child.wait()?;
            return Err(format!("the destination process ended early: {status}").into());
        }
        Ok(line.trim_end().to_owned())
    }

    /// The address at which it listens.
    pub(super) fn address(&mut self) -> Result<Address, Failure> {
        let line = self.line(STARTS)?;
        match serde_json::from_str(&line) {
            Ok(Verdict { error: Some(error), .. }) => Err(format!("the destination process: {error}").into()),
            _ => Ok(line.parse()?),
        }
    }

    /// Returns its result.
    pub(super) fn verdict(mut self, patience: Duration) -> Verdict {
        let read = self.line(patience).and_then(|line| Ok(serde_json::from_str(&line)?));
        read.unwrap_or_else(|error| Verdict { error: Some(in_words(&*error)), ..Verdict::default() })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the hidden command.
pub(in crate::cli) fn run(args: &Args) -> Exit {
    let listens = Cell::new(false);
    let verdict = receive(args, &listens).unwrap_or_else(|error| {
        // Until then the demo waits for the address, and prints what it gets instead.
        if listens.get() {
            complain("demo (destination)", &*error);
        }
        Verdict { error: Some(in_words(&*error)), ..Verdict::default() }
    });
    let verified = verdict.verified;
    result_line!("{}", serde_json::to_string(&verdict).unwrap_or_default());
    if verified { Exit::Done } else { Exit::NotVerified }
}

/// Cancels when the demo is gone, which reads what this process prints.
fn cancel_with_reader(cancel: CancelToken) -> io::Result<()> {
    let watch = move || {
        // Without a requested event the wait ends only when the pipe breaks.
        if let Ok(None) = Stop::never().wait(io::stdout().as_fd(), PollFlags::empty()) {
            cancel.cancel();
        }
    };
    std::thread::Builder::new().name("ramwire-reader".into()).spawn(watch).map(drop)
}

/// Waits until the guest's threads have read all memory, which has arrived by now: that takes as long as reading it.
fn await_readers(guest: &dyn DemoGuest, stop: &Stop) {
    let stop = stop.within(READS);
    while !guest.read_so_far().1 && stop.sleep(Duration::from_millis(1)).is_none() {}
}

/// Takes each connection, and returns which one a cut is to hit.
fn accept_cut(
    mut listener: Listener,
    scratch: Option<Scratch>,
    cuts: Cuts,
) -> impl FnMut(&Stop) -> Result<StreamChannel, OpenError> + Send {
    move |stop| {
        // The folder of a UNIX socket stays as long as connections come.
        let _held = &scratch;
        let channel = listener.accept(&local_options(), stop)?;
        cuts.connected(channel.breaker());
        Ok(channel)
    }
}

/// The first connection, and its page channels.
fn first_connection(
    accept: &mut impl FnMut(&Stop) -> Result<StreamChannel, OpenError>,
    options: &ConnectionOptions,
    stop: &Stop,
) -> Result<DestinationConnection, OpenError> {
    let main = accept(stop)?;
    let pages = (0..options.channels.count).map(|_| accept(stop)).collect::<Result<Vec<_>, _>>()?;
    if pages.is_empty() {
        return Ok(DestinationConnection::over(main));
    }
    DestinationConnection::over_channels(std::iter::once(main).chain(pages).collect(), options, stop)
}

fn arriving(memory: impl MemoryProvider + 'static, guest: &dyn DemoGuest) -> DestinationGuest {
    DestinationGuest { memory: Box::new(memory), control: guest.control() }
}

/// `listens` is set once it has printed its address.
fn receive(args: &Args, listens: &Cell<bool>) -> Result<Verdict, Failure> {
    let memory = Arc::new(BlockSpec::memory(&args.block, args.huge_pages)?);
    if args.populate {
        for index in 0..args.block.len() as u32 {
            let table = memory.table();
            let Some(run) = table.whole(BlockIndex(index)) else { continue };
            populate(memory.span(table.admit_run(run)?)?)?;
        }
    }
    let passed = args.same_host.then(|| Arriving::new(args.guest));
    let guest: Box<dyn DemoGuest> = match &passed {
        Some(passed) => Box::new(passed.clone()),
        None => args.guest.empty(Arc::clone(&memory), args.postcopy)?,
    };
    let cancel = CancelToken::default();
    let stop = Stop::on(&cancel);
    cancel_on_signal(vec![cancel.clone()]);
    cancel_with_reader(cancel.clone())?;
    let scratch = args.uri.path().map(Scratch::make).transpose()?;
    let mut listener = Listener::bind(&args.tls.of_destination(&args.uri)?, AllowList::default(), &stop)?;
    result_line!("{}", listener.address());
    // If the device fails, the migration goes on by TCP.
    let host = args.uri.host_and_port().filter(|_| args.uri.scheme() == "rdma").map(|(host, _)| host);
    let fallback = host.map(|host| args.tls.of_destination(&Address::tcp(host, 0))).transpose()?;
    let fallback =
        fallback.map(|address| Listener::bind(&address, AllowList::default(), &stop)).transpose()?;
    if let Some(fallback) = &fallback {
        result_line!("{}", fallback.address());
    }
    listens.set(true);
    let stop_waiting = stop.within(Duration::from_secs(60));
    let mut settings = DestinationSettings::default();
    settings.postcopy = args.postcopy;
    settings.take_memory = args.same_host;
    settings.vcpu_threads = guest.vcpu_threads();
    if (args.cut > 0 || fallback.is_some()) && !args.postcopy {
        settings.reconnect_timeout = super::RECONNECT;
    }
    let cuts = Cuts::new(args.cut, &memory, args.postcopy);
    let mut options = ConnectionOptions::of_stream(local_options());
    options.channels = args.channels.options()?;
    let session = if args.cut > 0 {
        let mut accept = accept_cut(listener, scratch, cuts.clone());
        let connection = first_connection(&mut accept, &options, &stop_waiting)?;
        let memory = Zeroed(Arc::new(CutMemory::new(memory, cuts.clone())));
        DestinationSession::new(arriving(memory, &*guest), connection, settings)
            .with_next_connection(Box::new(accept))
    } else {
        let connection = listener.accept_connection(&options, &stop_waiting)?;
        drop((listener, scratch));
        let arriving = match passed {
            Some(passed) => arriving(passed, &*guest),
            None => arriving(Zeroed(memory), &*guest),
        };
        let session = DestinationSession::new(arriving, connection, settings);
        match fallback {
            Some(mut fallback) => {
                let next = move |stop: &Stop| fallback.accept(&local_options(), stop);
                session.with_next_connection(Box::new(next))
            }
            None => session,
        }
    };
    cuts.follow(&session.statistics());
    let runs_since = Arc::new(OnceLock::new());
    let since = Arc::clone(&runs_since);
    session.statistics().listen(move |event| {
        if event.kind == EventKind::PostcopyActive {
            let _ = since.set(Instant::now());
        }
    });
    let report = session.with_cancel(cancel).run();
    let all_came = runs_since.get().map_or(Duration::ZERO, Instant::elapsed);
    let mut verdict = Verdict {
        ran: report.ending == Ending::Running,
        digest_compared: report.verified,
        postcopy: report.missing_pages.as_ref().map(|missing| Postcopy {
            time_to_run_ms: missing.time_to_run.as_secs_f64() * 1e3,
            all_came_ms: all_came.as_secs_f64() * 1e3,
            faults: missing.faults,
            requests: missing.requests,
            fault_latency: missing.latency,
            vcpu_blocked_ms: missing.waits.vcpus.iter().map(|vcpu| vcpu.blocked_ns as f64 / 1e6).collect(),
            all_blocked_ms: missing.waits.all_blocked_ns as f64 / 1e6,
            recoveries: cuts.made(),
        }),
        error: report.error.as_ref().map(|error| in_words(error)),
        ..Verdict::default()
    };
    if verdict.ran {
        std::thread::sleep(RUN);
        await_readers(&*guest, &stop);
        guest.control().pause()?;
        let (read, all) = guest.read_so_far();
        let found = guest.verify()?;
        verdict.pages_read = read;
        verdict.verified = found.wrong == 0 && all;
        (verdict.pages, verdict.wrong, verdict.faults) = (found.pages, found.wrong, found.faults);
    } else if report.ending == Ending::Incomplete {
        // Its threads wait for pages that never come, and end with the process.
        std::mem::forget(guest);
    }
    Ok(verdict)
}
