//! `ramwire relay`.

mod doubt;
mod passage;
mod report;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ramwire::engine::OnTimeout;
use ramwire::error::Remedy;
use ramwire::guest::GuestMemory;
use ramwire::observe::{RunDescription, SharedStatistics};
use ramwire::session::{
    CancelReply, DestinationSettings, Error, Redial, Relay, RelayControl, SourceSettings, UrgentConnections,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::stream::qemu::page_compression::PageCompression;
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::{
    Address, AllowList, ChannelOptions, ConnectionOptions, Listener, RdmaOptions, open_source,
};

use self::doubt::{decide_on_signal, left_behind, left_in_doubt, tell_notice};
use self::report::tell;
use super::args::Exit;
use super::common::{
    PeerOption, RdmaArgs, SourceChannelArgs, SourceTimeouts, Usage, bytes, failed_in, seconds, uri_help,
};
use super::converge::warn_if_not_converging;
use super::guardian::Guardian;
use super::limits::LimitArgs;
use super::output::note;
use super::qmp::{Monitor, Plan, QmpArgs, Role, Subject};
use super::remedies::{hint, in_words};
use super::service::{self, StatusLine};
use super::signals::cancel_on_signal;
use super::store::{has_room, may_keep};
use super::tls::{ListenTlsArgs, SourceTlsArgs, warn_if_unencrypted};
use super::watch::{Log, WatchArgs, describe};

/// Receives the stream of a running guest and forwards it at once. The guest runs at its source until the source
/// switches over, and then at the far end.
#[derive(Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    # From a QEMU told to migrate to this host on port 4444, to a QEMU started with -incoming on port 5555
    ramwire relay --listen tcp:0.0.0.0:4444 --connect tcp:10.0.0.7:5555
    # The same with TLS on both sides, with the certificates of one folder
    ramwire relay --listen tcp:0.0.0.0:4444 --listen-tls-dir /etc/pki/qemu --connect tcp:10.0.0.7:5555 --tls-dir /etc/pki/qemu")]
#[command(mut_arg("downtime_ms", |arg| arg.help(DOWNTIME)))]
pub(super) struct Args {
    #[arg(long, value_name = "URI", help = uri_help("Where the guest's source connects"))]
    listen: Address,
    /// Where the far end listens: as --listen
    #[arg(long, value_name = "URI")]
    connect: Address,
    /// Who may connect by TCP, for instance 10.0.0.0/8; repeat for more
    #[arg(long, value_name = "CIDR")]
    allow: Vec<AllowList>,
    /// What the far end is, if it can't be detected: qemu-7.2, qemu-10.0 or ramwire
    #[arg(long, value_name = "PEER")]
    peer: Option<PeerOption>,
    /// Of the connection to the far end
    #[command(flatten)]
    limits: LimitArgs,
    /// Folder for RAM and device state if the guest was given away by its source and the far end did not take it; not
    /// after a switch to postcopy, since the source then has pages that the relay has not
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Refuse a guest with more RAM than this; the relay holds all of it
    #[arg(long, value_name = "SIZE", default_value = "64T", value_parser = bytes)]
    max_ram: u64,
    /// Request huge pages for the guest's RAM: first touches are faster, and zero pages inside a huge page take memory
    #[arg(long = "thp", alias = "huge-pages")]
    huge_pages: bool,
    /// Print one JSON object instead of a report
    #[arg(long)]
    pub(in crate::cli) json: bool,
    /// Page channels on which the guest's source sends (QEMU: multifd on, multifd-channels N)
    #[arg(long, value_name = "N", default_value = "0")]
    listen_channels: u8,
    /// How the source compresses pages on its channels: none, zlib or zstd
    #[arg(long, value_name = "HOW", default_value = "none")]
    listen_compression: PageCompression,
    #[command(flatten)]
    watch: WatchArgs,
    #[command(flatten)]
    qmp: QmpArgs,
    /// Pages that a thread waits for after a switch to postcopy travel on connections of their own, from the source and to
    /// the far end (QEMU: capability postcopy-preempt at both ends). Nothing shows whether a QEMU at the far end has it:
    /// without it the guest there never gets what it waits for. Not with --listen-tls-dir: a source that waits for the
    /// handshake of its second connection would wait for ever
    #[arg(long, conflicts_with = "listen_tls_dir")]
    postcopy_preempt: bool,
    /// A postcopy that was paused goes on through here, after the relay or a connection was lost: what both ends say to
    /// each other is passed on unchanged, urgent pages too. `migrate-recover` at the far end, then at the source `migrate`
    /// to this relay with `resume`
    #[arg(long, conflicts_with_all = PASSED_UNCHANGED)]
    recover: bool,
    /// Of the connection to the far end
    #[command(flatten)]
    channels: SourceChannelArgs,
    #[command(flatten)]
    rdma: RdmaArgs,
    #[command(flatten)]
    listen_tls: ListenTlsArgs,
    /// Of the connection to the far end
    #[command(flatten)]
    tls: SourceTlsArgs,
    /// Time by which the guest's source must have switched over; after it the relay ends, and the guest stays at its
    /// source
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    #[command(flatten)]
    timeouts: SourceTimeouts,
}

/// Options without effect where all bytes are passed on unchanged.
const PASSED_UNCHANGED: [&str; 18] = [
    "peer",
    "downtime_ms",
    "max_bandwidth",
    "xbzrle_cache_size",
    "keep",
    "max_ram",
    "huge_pages",
    "listen_channels",
    "listen_compression",
    "run_log",
    "metrics",
    "qmp",
    "postcopy_preempt",
    "channels",
    "compression",
    "pin_all",
    "pin_budget",
    "timeout",
];

const DOWNTIME: &str = "The far end's part of the downtime, in milliseconds; it limits how much data may wait to be \
                        forwarded";

/// What helps if the guest's source does not reach its switchover.
const REMEDIES: &str = "its source decides when to switch over: raise its downtime limit or bandwidth there, have it slow \
                        the guest down (auto-converge), or give the relay more time (--timeout)";

pub(super) fn run(args: &Args) -> Exit {
    let done = if args.recover { passage::run(args) } else { run_relay(args) };
    done.unwrap_or_else(|error| failed_in("relay", args.json, &*error))
}

/// Where the source connects. Says so.
fn listen_at(args: &Args, address: &Address, stop: &Stop) -> Result<Listener, Box<dyn std::error::Error>> {
    let mut allow = AllowList::default();
    args.allow.iter().cloned().for_each(|list| allow.extend(list));
    let mut listener = Listener::bind(address, allow, stop)?;
    if let Some(warning) = listener.warning() {
        note!("ramwire relay: {warning}{}", hint(Some(Remedy::AllowPeers)));
    }
    listener.on_stranger(|why| note!("ramwire relay: {why}"));
    for address in listener.addresses() {
        note!("listening on {address}");
    }
    service::ready(&format!("listening on {}", listener.address()));
    Ok(listener)
}

fn run_relay(args: &Args) -> Result<Exit, Box<dyn std::error::Error>> {
    let channels = args.channels.options()?;
    let (listen, far) = (args.listen_tls.at(&args.listen, &args.tls)?, args.tls.at(&args.connect)?);
    if let Some(dir) = &args.keep {
        // Once the guest was given away it is too late to find out.
        may_keep(dir).map_err(|error| Usage(format!("--keep: {}", in_words(&error))))?;
    }
    let cancel = CancelToken::default();
    let signals = cancel_on_signal(vec![cancel.clone()]);
    let statistics = SharedStatistics::default();
    signals.follow(statistics.clone());
    // A port that is in use is told before anything listens.
    let metrics = args.watch.metrics.serve("relay", statistics.clone())?;
    let control = RelayControl::default();
    let (asked, called_off) = (control.clone(), Arc::new(Mutex::new(false)));
    let by_signal = Arc::clone(&called_off);
    let cancels = move || {
        // Locked before the relay may end by the request: who reads the answer afterwards waits for it.
        let mut called_off = by_signal.lock().unwrap_or_else(PoisonError::into_inner);
        let reply = asked.cancel();
        *called_off |= reply == CancelReply::Accepted;
        reply
    };
    signals.ask_by(cancels.clone());
    // Dropped last: its clients are told how it ended.
    let _monitor = args.monitor(&statistics, &control, &cancel, cancels)?;
    let stop = Stop::on(&cancel);
    let file = args.watch.create_log()?;
    warn_if_unencrypted("relay", &far, "use a network you trust, or --tls-dir DIR");
    let mut listener = listen_at(args, &listen, &stop)?;
    let options = args.timeouts.both.stream_options();
    let (count, compression) = (args.listen_channels, args.listen_compression);
    let mut near = ChannelOptions::default();
    near.count = count;
    near.compression = compression;
    near.numa = channels.numa.clone();
    let mut quiet = RdmaOptions::default();
    quiet.wait_after_round = true;
    let mut listening = ConnectionOptions::of_stream(options);
    listening.channels = near;
    listening.rdma = quiet;
    let connection = listener.accept_connection(&listening, &stop)?;
    // A QEMU 7.2 with postcopy-preempt connects twice before it sends anything. A later one, which connects when it
    // switches, then gets no answer, and its guest stays.
    let urgent_came = !args.postcopy_preempt && args.listen_channels == 0 && listener.has_others();
    let urgent = args.postcopy_preempt.then(|| {
        let from_source = move |stop: &Stop| listener.accept(&options, stop);
        let to_far_end = Redial::new(far.clone(), options);
        UrgentConnections { from_source: Box::new(from_source), to_far_end: Box::new(to_far_end) }
    });
    let guardian = Guardian::start().map_err(|error| NoGuardian { source: error })?;
    let (pid, doubted) = (guardian.pid(), control.clone());
    signals.in_doubt(move || doubted.is_in_doubt().then(|| left_in_doubt(&doubted, pid)));
    let decided = control.clone();
    signals.leaves(move |reply| left_behind(&decided, pid, reply));
    decide_on_signal(control.clone());
    if args.listen.decides_late() {
        note!("ramwire relay: source: {}: {}", connection.chosen.transport, connection.chosen.why);
    }
    let delta_cache = args.limits.delta_cache();
    let retry = args.timeouts.retry;
    let mut connecting = ConnectionOptions::of_stream(options);
    connecting.rdma = args.rdma.options();
    connecting.channels = channels;
    connecting.delta_cache = delta_cache;
    connecting.retry = retry;
    let (far_stop, timeouts) = (stop.clone(), args.timeouts.clone());
    let chosen = far.decides_late();
    let far_way = Arc::new(OnceLock::new());
    let taken = Arc::clone(&far_way);
    let log = Arc::new(Mutex::new(Log::default()));
    let (begun, far_statistics, settings) = (Arc::clone(&log), statistics.clone(), args.settings());
    let keep = args.keep.clone();
    let open = move |memory: Arc<dyn GuestMemory>| {
        // The guest is still its source's.
        if let Some(dir) = &keep {
            has_room(dir, memory.table().total()).map_err(|error| Error::Config {
                what: format!("--keep: {}", in_words(&error)),
                remedy: Remedy::Advice("free some, or name another folder"),
            })?;
        }
        timeouts.tell_retry("relay", &far);
        let connection = open_source(&far, Arc::clone(&memory), &connecting, &far_stop);
        if let Ok(connection) = &connection {
            if chosen {
                note!("ramwire relay: far end: {}: {}", connection.chosen.transport, connection.chosen.why);
            }
            let mut run =
                describe("relay", connection.chosen.transport, &connection.chosen.why, memory.table());
            run.settings = settings;
            *begun.lock().unwrap_or_else(PoisonError::into_inner) = file.follow(far_statistics, run);
            // Called once.
            let _ = taken.set(connection.chosen.clone());
        }
        connection.map_err(|error| Error::Config {
            what: format!("the far end can't be reached: {}", in_words(&error)),
            remedy: Remedy::Advice("start it first, with -incoming or ramwire receive"),
        })
    };
    let mut incoming = DestinationSettings::default();
    incoming.raw_device_state = true;
    incoming.stall_timeout = args.timeouts.both.stall_timeout;
    incoming.finish_timeout = args.timeouts.both.finish_timeout;
    incoming.max_ram = args.max_ram;
    incoming.accept_missing_description = true;
    incoming.postcopy = true;
    let mut outgoing = SourceSettings::new(Configuration::default());
    args.limits.apply(&mut outgoing);
    args.timeouts.set(&mut outgoing);
    outgoing.timeout = args.timeout.map(|time| (time, OnTimeout::Cancel));
    if let Some(option) = args.peer {
        (outgoing.peer, outgoing.style) = (Some(option.peer), Some(option.style));
    }
    warn_if_not_converging("relay", &statistics, REMEDIES);
    let service = StatusLine::follow(statistics.clone());
    let near_way = connection.chosen.clone();
    let relay = Relay {
        connection,
        connect: Box::new(open),
        incoming,
        outgoing,
        urgent_came,
        urgent,
        huge_pages: args.huge_pages,
        cancel,
        control,
        guard: Some(Box::new(guardian)),
        notice: Arc::new(tell_notice),
        statistics,
    };
    let report = relay.run();
    std::mem::take(&mut *log.lock().unwrap_or_else(PoisonError::into_inner)).finish();
    drop((metrics, service));
    let called_off = *called_off.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(tell(args, &near_way, far_way.get(), &report, called_off))
}

impl Args {
    /// Refuses options that don't go together.
    pub(super) fn check(&self) -> Result<(), Usage> {
        self.channels.options()?;
        self.channels.check()?;
        if self.listen_channels == 0 && self.listen_compression != PageCompression::Plain {
            return Err(Usage(
                "--listen-compression is for page channels: give --listen-channels too".into(),
            ));
        }
        // A setting of the connection to the far end; where the source comes by RDMA it is no mistake.
        if matches!(self.listen.scheme(), "rdma" | "auto") {
            Ok(())
        } else {
            self.rdma.check_at(&self.connect)
        }
    }

    /// A monitor, if one was asked for. It cancels as a signal does: by `cancels`, and what is no session by `token`.
    fn monitor(
        &self,
        statistics: &SharedStatistics,
        control: &RelayControl,
        token: &CancelToken,
        cancels: impl Fn() -> CancelReply + Send + Sync + 'static,
    ) -> Result<Option<Monitor>, String> {
        let plan = self.channels.plan(self.rdma.plan(self.limits.plan(Plan::default())));
        let (token, control) = (token.clone(), control.clone());
        let cancels = move || {
            let reply = cancels();
            if reply == CancelReply::Accepted {
                token.cancel();
            }
            reply
        };
        let subject = Subject::new(Role::Relay, statistics.clone(), plan, cancels);
        let subject = subject.controlled(move || control.outgoing());
        self.qmp.serve("relay", &Arc::new(subject))
    }

    fn settings(&self) -> BTreeMap<String, serde_json::Value> {
        let run = self.limits.describe(RunDescription::default());
        run.with("channels", self.channels.count()).settings
    }
}

/// Without the process that holds the source's connection the relay takes no guest.
#[derive(Debug, thiserror::Error)]
#[error(
    "no process can be started to hold the source's connection, should this one end while the guest is in doubt \
     ({source}); raise the limit of processes, or let this program be executed from where it lies"
)]
struct NoGuardian {
    source: std::io::Error,
}
