//! `ramwire receive`.

mod colo;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ramwire::engine::Ending;
use ramwire::error::Remedy;
use ramwire::guest::GuestMemory;
use ramwire::observe::SharedStatistics;
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    CancelReply, Canceller, DestinationGuest, DestinationReport, DestinationSession, DestinationSettings,
    Error, ErrorKind, Incoming, MemoryCheck, MemoryProvider, PassedBlock,
};
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::{
    Address, AllowList, ChosenTransport, ConnectionOptions, CprListener, Listener, StreamOptions,
};
use serde_json::json;

use crate::cli::args::Exit;
use crate::cli::common::{
    ChannelArgs, Timeouts, Usage, bytes, complain, failed_in, human_bytes, seconds, unix_path, uri_help,
};
use crate::cli::metrics::MetricsArgs;
use crate::cli::output::{note, result_line};
use crate::cli::progress::Progress;
use crate::cli::qmp::{Plan, QmpArgs, Role, Subject};
use crate::cli::remedies::{hint, in_words};
use crate::cli::service;
use crate::cli::signals::cancel_on_signal;
use crate::cli::store::{IncomingGuest, State, Store};
use crate::cli::tls::DestinationTlsArgs;
use crate::cli::verify::in_json;

/// Receives one migration, then stops listening. Success is reported to the source only after everything is on the
/// disk.
#[derive(Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    # Take a guest from another host, then give it to a QEMU that waits with -incoming
    ramwire receive tcp:0.0.0.0:4444 --allow 10.0.0.0/8 --dir guest
    ramwire send tcp:10.0.0.7:4444 --dir guest

    # The same of a QEMU with x-ignore-shared, whose RAM m0 is a file that the next QEMU opens too
    ramwire receive tcp:0.0.0.0:4444 --allow 10.0.0.0/8 --dir guest --ignore-shared m0

    # Take the memory of a QEMU on this host without a stream of pages (mode cpr-transfer: a main channel and one of type cpr)
    ramwire receive unix:main.sock --cpr unix:cpr.sock --dir guest

    # As a service that systemd starts at the first connection: the listening socket is descriptor 3 (see ramwire-receive@.socket)
    ramwire receive fd:3 --tls-dir /etc/ramwire/tls --dir guest

    # Protect a running QEMU's guest by checkpoints (COLO: x-colo on there, x-checkpoint-delay 100), and end at `quit`
    ramwire receive tcp:0.0.0.0:4444 --allow 10.0.0.0/8 --dir guest --colo --qmp unix:/run/guest.qmp

    # Read a stream that QEMU wrote with `migrate exec:cat>FILE`
    ramwire receive file:FILE --dir guest

    # Read a file that QEMU wrote with mapped-ram and `migrate file:FILE`
    ramwire receive mapped:FILE --dir guest")]
pub(super) struct Args {
    #[arg(help = uri_help("Where to listen or read"))]
    uri: Address,
    /// Folder for RAM blocks, device state and manifest; created with mode 0700, or changed to it
    #[arg(long)]
    dir: PathBuf,
    /// Who may connect by TCP or RDMA, for instance 10.0.0.0/8; repeat for more
    #[arg(long, value_name = "CIDR")]
    allow: Vec<AllowList>,
    /// A RAM block that source and destination share, if the source has x-ignore-shared: none of its pages is sent.
    /// Repeat for more
    #[arg(long, value_name = "BLOCK", value_parser = block_name)]
    ignore_shared: Vec<BlockName>,
    /// The source is a QEMU on this host that passes its memory (mode cpr-transfer): where to listen for its channel of
    /// type cpr. The folder gets a copy of that memory, made while the guest is paused
    #[arg(long, value_name = "unix:PATH", value_parser = unix_path, conflicts_with_all = ["ignore_shared", "channels"])]
    cpr: Option<PathBuf>,
    /// Keep checkpoints of a QEMU that runs on (capability x-colo on, return-path off), until it is lost or the monitor
    /// (--qmp) is told x-colo-lost-heartbeat: the folder then holds the guest as it was at the last checkpoint
    #[arg(long, conflicts_with_all = ["ignore_shared", "channels", "cpr", "reconnect", "metrics"])]
    colo: bool,
    /// Refuse a guest with more RAM than this
    #[arg(long, value_name = "SIZE", default_value = "64T", value_parser = bytes)]
    max_ram: u64,
    /// When the connection is lost, keep what has arrived and wait so long for the source to connect again (a ramwire with
    /// --reconnect). 0: the loss is the end
    #[arg(long, value_name = "SECONDS", default_value = "0", value_parser = seconds)]
    reconnect: Duration,
    /// With --reconnect: where to listen besides for the connections after the first, for instance tcp:HOST:PORT for a source
    /// that comes by rdma: and goes on by TCP. An auto: address needs none
    #[arg(long, value_name = "URI", requires = "reconnect")]
    fallback: Option<Address>,
    /// Print one JSON object instead of a report
    #[arg(long)]
    pub(in crate::cli) json: bool,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    qmp: QmpArgs,
    #[command(flatten)]
    channels: ChannelArgs,
    #[command(flatten)]
    tls: DestinationTlsArgs,
    #[command(flatten)]
    timeouts: Timeouts,
}

/// Where the guest may be that a source without a return path has sent, and what an operator does.
const UNANSWERED: &str = "in doubt: the source has no return path, and gives its guest away with its last byte without \
                          an answer. Look at the source (`query-migrate` of a QEMU): if it has completed, the guest runs \
                          nowhere, and is whole there: `cont` lets it go on. If not, it runs on there. Nothing of it is \
                          kept here; with QEMU's capability `return-path` the source waits for an answer";

/// The folder as the provider of memory, which tells of a source that will not wait for an answer.
struct Told(IncomingGuest);

impl MemoryProvider for Told {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        if incoming.gives_unasked {
            note!(
                "ramwire receive: the source opened no return path, so it can't be informed of the outcome: check this \
                 end before you end the source, or set its return-path capability"
            );
        }
        self.0.provide(incoming)
    }

    fn is_zeroed(&self, block: &RamBlock) -> bool {
        self.0.is_zeroed(block)
    }

    fn arrived(&mut self, incoming: &Incoming, native: bool) {
        self.0.arrived(incoming, native);
    }
}

/// What a second signal leaves behind.
fn left_behind(guest: &IncomingGuest, reply: CancelReply) -> Option<String> {
    match reply {
        _ if guest.comes_unasked() => Some(format!("ramwire receive: {UNANSWERED}")),
        CancelReply::Accepted => None,
        CancelReply::TooLate => Some(
            "ramwire receive: in doubt: the source may have given its guest away, and this process ends: look whether it \
             runs at its source"
                .into(),
        ),
    }
}

fn block_name(text: &str) -> Result<BlockName, String> {
    BlockName::new(text).map_err(|error| error.to_string())
}

/// Listens for memory of a QEMU on this host and waits until it has arrived.
fn passed_memory(
    path: &Path,
    options: &StreamOptions,
    stop: &Stop,
) -> Result<Vec<PassedBlock>, Box<dyn std::error::Error>> {
    let mut listener = CprListener::bind(path, options)?;
    listener.on_stranger(|why| note!("ramwire receive: cpr: {why}"));
    note!("listening on unix:{} for memory (cpr)", path.display());
    let memory = listener.accept(stop)?.hang_up();
    let blocks = memory.into_iter().map(|(name, descriptor)| PassedBlock::of_file(name, descriptor));
    Ok(blocks.collect::<Result<_, _>>()?)
}

pub(super) fn run(args: &Args) -> Exit {
    match receive(args) {
        Ok(exit) => exit,
        Err(error) => failed_in("receive", args.json, &*error),
    }
}

impl Args {
    /// Refuses options that don't go together.
    pub(super) fn check(&self) -> Result<(), Usage> {
        if self.colo && !(self.uri.carries_answers() && matches!(self.uri.scheme(), "tcp" | "unix" | "fd")) {
            return Err(Usage(format!(
                "checkpoints (--colo) come by tcp:, unix: or fd:, not by {}",
                self.uri
            )));
        }
        self.channels.options().map(drop)
    }
}

fn receive(args: &Args) -> Result<Exit, Box<dyn std::error::Error>> {
    let channels = args.channels.options()?;
    let statistics = SharedStatistics::default();
    // A port that is in use is told before anything listens.
    let metrics = args.metrics.serve("receive", statistics.clone())?;
    let mut guest = IncomingGuest::new(Store::open(&args.dir)?)?.sharing(&args.ignore_shared);
    let cancel = CancelToken::default();
    let stop = Stop::on(&cancel);
    // A process that reads the printed address may send a signal.
    let signals = cancel_on_signal(vec![cancel.clone()]);
    let canceller = Arc::new(OnceLock::<Canceller>::new());
    let (early, late) = (cancel.clone(), Arc::clone(&canceller));
    let protects = args.colo.then(colo::Running::default);
    let (standby, gives_up) = (protects.clone(), protects.clone());
    let cancels = move || match late.get() {
        None if gives_up.as_ref().is_some_and(|running| running.get().is_some()) => {
            gives_up.as_ref().map_or(CancelReply::Accepted, colo::give_up)
        }
        Some(canceller) => canceller.cancel(),
        None => {
            early.cancel();
            CancelReply::Accepted
        }
    };
    let subject = Subject::new(Role::Destination, statistics.clone(), Plan::default(), cancels);
    let subject = match standby {
        Some(running) => subject.with_failover(move || colo::failover(&running)),
        None => subject,
    };
    // Dropped last: its clients receive the result.
    let _monitor = args.qmp.serve("receive", &Arc::new(subject))?;
    let mut allow = AllowList::default();
    args.allow.iter().cloned().for_each(|list| allow.extend(list));
    let mut listener = Listener::bind(&args.tls.at(&args.uri)?, allow.clone(), &stop)?;
    let fallback = args.fallback.as_ref().map(|uri| {
        let listener = Listener::bind(&args.tls.at(uri)?, allow, &stop)?;
        Ok::<_, Box<dyn std::error::Error>>(listener)
    });
    let fallback = fallback.transpose()?;
    if let Some(warning) = listener.warning() {
        let remedy = match (listener.address().tls(), listener.address().scheme()) {
            (Some(_), _) => String::new(),
            (None, "tcp") => hint(Some(Remedy::AllowPeers)) + " or encrypt it (--tls-dir DIR)",
            (None, _) => hint(Some(Remedy::AllowPeers)),
        };
        note!("ramwire receive: {warning}{remedy}");
    }
    if let Some(why) = listener.why_no_rdma() {
        note!("ramwire receive: TCP only: {why}");
    }
    listener.on_stranger(|why| note!("ramwire receive: {why}"));
    for address in fallback.iter().flat_map(Listener::addresses) {
        note!("listening for connections after the first on {address}");
    }
    for address in listener.addresses() {
        note!("listening on {address}");
    }
    service::ready(&format!("listening on {}", listener.address()));
    if let Some(running) = protects {
        let channel = listener.accept(&args.timeouts.stream_options(), &stop)?;
        return colo::keep(args, &guest.in_checkpoints(), channel, &running, &signals);
    }
    let mut options = ConnectionOptions::of_stream(args.timeouts.stream_options());
    options.channels = channels;
    let passed = args.cpr.as_deref().map(|path| passed_memory(path, &options.stream, &stop)).transpose()?;
    let connection = listener.accept_connection(&options, &stop)?;
    // Only one migration: no other connection is accepted but further ones of its source.
    let listener = fallback.or(Some(listener).filter(|listener| listener.address().scheme() != "rdma"));
    let listener = listener.filter(|_| !args.reconnect.is_zero());
    if connection.chosen.transport == "rdma" {
        guest = guest.written_by_nic()?;
    }
    let way = connection.chosen.clone();
    let mut settings = DestinationSettings::default();
    settings.raw_device_state = true;
    // No guest runs here: its pages will not be touched.
    settings.map_in_background = false;
    settings.stall_timeout = args.timeouts.stall_timeout;
    settings.finish_timeout = args.timeouts.finish_timeout;
    settings.reconnect_timeout = args.reconnect;
    settings.max_ram = args.max_ram;
    settings.accept_missing_description = true;
    let session = DestinationSession::new(
        DestinationGuest { memory: Box::new(Told(guest.clone())), control: Box::new(guest.clone()) },
        connection,
        settings,
    )
    .with_statistics(statistics)
    .with_cancel(cancel);
    let session = match listener {
        Some(mut listener) => {
            let options = options.stream;
            session.with_next_connection(Box::new(move |stop: &Stop| listener.accept(&options, stop)))
        }
        None => session,
    };
    // One session a process.
    let _ = canceller.set(session.canceller());
    let session = match passed {
        Some(passed) => session.with_memory(passed),
        None => session,
    };
    signals.ask(session.canceller());
    let left = guest.clone();
    signals.leaves(move |reply| left_behind(&left, reply));
    let left = guest.clone();
    signals.before_leaving(move |exit| {
        if exit == Exit::Cancelled {
            left.discard();
        }
    });
    let progress = Progress::follow_destination(session.statistics());
    let report = session.run();
    drop((progress, metrics));
    let exit = settled(&guest, &report);
    match report.ending {
        Ending::Running => {
            // Not inside the macro, which evaluates nothing while the level is off.
            let bytes = guest.release();
            tracing::info!(bytes, "room of pages that stayed zero was given back");
        }
        Ending::Discarded | Ending::Unanswered => guest.discard(),
        // It may be all that is left of the guest.
        Ending::Stranded | Ending::Incomplete => {}
    }
    signals.ended(exit);
    // The guest is here in either case.
    let differs = matches!(report.memory_check, Some(MemoryCheck::Differs { .. }));
    let exit = if differs && exit == Exit::Done { Exit::NotVerified } else { exit };
    tell(args, &way, &guest, (&report, exit));
    Ok(exit)
}

fn tell(
    args: &Args,
    way: &ChosenTransport,
    guest: &IncomingGuest,
    (report, exit): (&DestinationReport, Exit),
) {
    let state = guest.manifest().map_or(State::Arriving, |manifest| manifest.state);
    if let Some(error) = &report.error {
        complain("receive", error);
    }
    if let Some(check) = &report.memory_check {
        note!("ramwire receive: {check}");
    }
    match report.ending {
        Ending::Unanswered => note!("ramwire receive: {UNANSWERED}"),
        Ending::Stranded if guest.comes_unasked() => note!(
            "ramwire receive: in doubt: the source has given its guest away with its last byte, without an answer, and the \
             guest could not be stored whole: it runs nowhere. It is whole at its source until that ends: `cont` lets it go \
             on there. Then delete {}",
            args.dir.display()
        ),
        _ => {}
    }
    let arrived = report.ending == Ending::Running;
    if args.json {
        let blocks = guest.manifest().map(|manifest| manifest.blocks);
        let out = json!({
            "outcome": exit.word(),
            "arrived": arrived,
            "state": if arrived { state } else { State::Arriving },
            "transport": way.transport,
            "why": way.why,
            "source": if report.native { "ramwire" } else { "qemu" },
            "verified": report.verified,
            "memory_check": in_json(report.memory_check.as_ref()),
            "bytes_received": report.bytes,
            "ram_bytes": report.statistics.total,
            "took_ms": report.statistics.total_time,
            "throughput": report.statistics.throughput,
            "pages": report.pages,
            "passed": report.statistics.passed,
            "pages_by_file": report.pages_by_file,
            "blocks": blocks,
            "error": report.error.as_ref().map(|error| in_words(error)),
        });
        result_line!("{out}");
    } else if arrived {
        let pages = report.pages;
        result_line!(
            "arrived in {}: {} of RAM, {} received in {:.1} s ({}/s), {} pages whole, {} zero{}",
            args.dir.display(),
            human_bytes(report.statistics.total + report.statistics.passed.bytes),
            human_bytes(report.bytes),
            report.statistics.total_time / 1e3,
            human_bytes(report.statistics.throughput),
            pages.normal,
            pages.zero,
            if state == State::Incomplete {
                " (device state without VM description: incomplete)"
            } else {
                ""
            },
        );
    }
}

/// The status, with the manifest in the matching state.
fn settled(guest: &IncomingGuest, report: &DestinationReport) -> Exit {
    let exit = exit_of(guest, report);
    if report.ending != Ending::Running {
        return exit;
    }
    let doubt = match &report.error {
        // The report did not reach the source, which may resume its guest.
        Some(error) if !report.native => Some(error.to_string()),
        _ => guest.settle().err().map(|error| error.to_string()),
    };
    let Some(why) = doubt else { return exit };
    guest.doubt();
    note!(
        "ramwire receive: the guest is here, but in doubt ({why}): look at its source; if it runs there, delete the \
         folder; if it does not, `ramwire send` sends it on with --destination-is-dead"
    );
    Exit::InDoubt
}

fn exit_of(guest: &IncomingGuest, report: &DestinationReport) -> Exit {
    let state = guest.manifest().map_or(State::Arriving, |manifest| manifest.state);
    match (report.ending, report.error.as_ref().map(ramwire::session::Error::kind)) {
        // Nothing proves that it is all of the guest.
        (Ending::Running, _) if state == State::Incomplete => Exit::NotVerified,
        (Ending::Running, _) => Exit::Done,
        (Ending::Stranded | Ending::Incomplete | Ending::Unanswered, _) => Exit::InDoubt,
        (Ending::Discarded, Some(ErrorKind::Cancelled)) => Exit::Cancelled,
        (Ending::Discarded, _) => Exit::Failed,
    }
}
