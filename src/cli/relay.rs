//! `ramwire relay`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ramwire::engine::{Ending, OnTimeout, RelayEnding};
use ramwire::error::Remedy;
use ramwire::guest::GuestMemory;
use ramwire::observe::{RunDescription, SharedStatistics};
use ramwire::session::{
    CancelReply, DestinationSettings, Error, Notice, Relay, RelayControl, RelayReport, SourceSettings,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::stream::qemu::page_compression::PageCompression;
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::{
    Address, AllowList, ChannelOptions, ChosenTransport, ConnectionOptions, Listener, RdmaOptions,
    open_source,
};
use serde_json::json;
use signal_hook::consts::SIGUSR1;
use signal_hook::iterator::Signals;

use super::args::Exit;
use super::common::{
    PeerOption, RdmaArgs, SourceChannelArgs, SourceTimeouts, Usage, bytes, complain, failed_in, seconds,
    uri_help,
};
use super::converge::{print_remedies, warn_if_not_converging};
use super::guardian::{Guardian, advice};
use super::limits::LimitArgs;
use super::output::{note, result_line, result_text};
use super::qmp::{Monitor, Plan, QmpArgs, Role, Subject};
use super::remedies::{hint, in_words};
use super::render;
use super::service::{self, StatusLine};
use super::signals::cancel_on_signal;
use super::store::{keep, may_keep};
use super::tls::warn_if_unencrypted;
use super::watch::{Log, WatchArgs, describe};

/// Receives the stream of a running guest and forwards it at once. The guest runs at its source until the source
/// switches over, and then at the far end.
#[derive(Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    # From a QEMU told to migrate to this host on port 4444, to a QEMU started with -incoming on port 5555
    ramwire relay --listen tcp:0.0.0.0:4444 --connect tcp:10.0.0.7:5555")]
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
    /// Of the connection to the far end
    #[command(flatten)]
    channels: SourceChannelArgs,
    #[command(flatten)]
    rdma: RdmaArgs,
    /// Time by which the guest's source must have switched over; after it the relay ends, and the guest stays at its
    /// source
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    #[command(flatten)]
    timeouts: SourceTimeouts,
}

const DOWNTIME: &str = "The far end's part of the downtime, in milliseconds; it limits how much data may wait to be \
                        forwarded";

/// What helps if the guest's source does not reach its switchover.
const REMEDIES: &str = "its source decides when to switch over: raise its downtime limit or bandwidth there, have it slow \
                        the guest down (auto-converge), or give the relay more time (--timeout)";

/// What an operator does when a connection was lost in postcopy.
const GO_ON_WITHOUT: &str = "the guest was given to the far end, and what it misses there is at its source: keep both. \
                             They go on without this relay: `migrate-recover` at the far end, then at the source \
                             `migrate` to that address with `resume`";

/// What an operator does when a switch to postcopy has failed, or is in doubt at the end.
const AT_ITS_SOURCE: &str = "the guest's source had switched to postcopy, and only there is the guest whole: keep the \
                             source. Nothing of it is kept here (--keep). Before you let it go on there, make sure that \
                             it does not run at the far end";

/// What an operator does where the source waits for no answer, in doubt.
const LOOK_THERE: &str = "Look at the far end: if the guest runs there, it has arrived, and its source may be ended. If it \
                          does not and never will, it runs nowhere: it is whole at its source until that ends (`cont` lets \
                          it go on there), or in the file that it came from";

/// Where the guest may be that a source without a return path has sent, and what an operator does.
const UNANSWERED: &str = "in doubt: the guest does not run at the far end. Its source has no return path, and gives it away \
                          with its last byte without an answer. Look at the source (`query-migrate` of a QEMU): if it has \
                          completed, the guest runs nowhere, and is whole there: `cont` lets it go on. If not, it runs on \
                          there. With QEMU's capability `return-path` the source waits for an answer";

pub(super) fn run(args: &Args) -> Exit {
    run_relay(args).unwrap_or_else(|error| failed_in("relay", args.json, &*error))
}

fn run_relay(args: &Args) -> Result<Exit, Box<dyn std::error::Error>> {
    let channels = args.channels.options()?;
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
    warn_if_unencrypted("relay", &args.connect, "use a network you trust or a tunnel");
    let mut allow = AllowList::default();
    args.allow.iter().cloned().for_each(|list| allow.extend(list));
    let mut listener = Listener::bind(&args.listen, allow, &stop)?;
    if let Some(warning) = listener.warning() {
        note!("ramwire relay: {warning}{}", hint(Some(Remedy::AllowPeers)));
    }
    listener.on_stranger(|why| note!("ramwire relay: {why}"));
    for address in listener.addresses() {
        note!("listening on {address}");
    }
    service::ready(&format!("listening on {}", listener.address()));
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
    // switches, then finds nobody, and its guest stays.
    let urgent_came = args.listen_channels == 0 && listener.has_others();
    drop(listener);
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
    let (far, far_stop, timeouts) = (args.connect.clone(), stop.clone(), args.timeouts.clone());
    let chosen = far.decides_late();
    let far_way = Arc::new(OnceLock::new());
    let taken = Arc::clone(&far_way);
    let log = Arc::new(Mutex::new(Log::default()));
    let (begun, far_statistics, settings) = (Arc::clone(&log), statistics.clone(), args.settings());
    let open = move |memory: Arc<dyn GuestMemory>| {
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

/// The message if this process ends while the guest is in doubt. `guardian` is the process that holds the connection of
/// a source that waits for the outcome.
fn left_in_doubt(control: &RelayControl, guardian: u32) -> String {
    let then = if control.has_switched() { AT_ITS_SOURCE } else { LOOK_THERE };
    match control.source_waits() {
        true => format!(
            "ramwire relay: in doubt, and this process ends: process {guardian} keeps the source's connection open and \
             waits for the far end's answer"
        ),
        false => format!(
            "ramwire relay: in doubt, and this process ends, as does the wait for the far end's answer. {then}"
        ),
    }
}

/// What a second signal leaves behind.
fn left_behind(control: &RelayControl, guardian: u32, reply: CancelReply) -> Option<String> {
    match (control.ending(), reply) {
        (RelayEnding::Unanswered, _) => Some(format!("ramwire relay: {UNANSWERED}")),
        (_, CancelReply::Accepted) => None,
        (RelayEnding::Incomplete, _) => Some(format!("ramwire relay: {GO_ON_WITHOUT}")),
        _ if control.is_given_away() => Some(left_in_doubt(control, guardian)),
        _ if control.has_switched() => Some(format!("ramwire relay: {AT_ITS_SOURCE}")),
        _ => Some(
            "ramwire relay: in doubt: the source may have given its guest to this relay, which ends: the far end was not \
             given it. Look whether it runs at its source"
                .into(),
        ),
    }
}

/// SIGUSR1 means that the guest does not run at the far end.
fn decide_on_signal(control: RelayControl) {
    let Ok(mut signals) = Signals::new([SIGUSR1]) else {
        tracing::warn!("no signal handler for SIGUSR1: a guest in doubt is decided by ending its source");
        return;
    };
    let decide = move || {
        for _ in signals.forever() {
            match control.far_end_is_dead() {
                true if !control.source_waits() => {
                    note!("ramwire relay: the far end is waited for no longer");
                }
                true => note!(
                    "ramwire relay: the source gets the report that the migration failed, and continues"
                ),
                false => note!("ramwire relay: SIGUSR1 has no effect: no guest is in doubt"),
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("ramwire-decides".into()).spawn(decide) {
        tracing::warn!(%error, "no thread for SIGUSR1");
    }
}

fn tell_notice(notice: &Notice) {
    match notice {
        Notice::NoReturnPath => note!(
            "ramwire relay: the source opened no return path, so it can't be informed of the outcome: check \
            the far end before you end the source, or set its return-path capability"
        ),
        Notice::InDoubt { why, switched: false, source_waits: false } => note!(
            "ramwire relay: in doubt: the far end was given the guest and fell silent ({why}). This relay waits for its \
             answer, and can't tell it to the source. {LOOK_THERE}. `kill -USR1 {}` ends the wait, and this relay keeps \
             the guest if it has --keep DIR",
            std::process::id()
        ),
        Notice::InDoubt { why, switched, .. } => note!(
            "ramwire relay: in doubt: the far end was given the guest and fell silent ({why}). The source waits, and \
             this relay for the far end's answer. {}",
            advice(*switched, std::process::id())
        ),
        Notice::NotGuarded => note!(
            "ramwire relay: the source's connection is none that another process can hold: should this one be killed \
             before the far end has answered, the source may let the guest run again"
        ),
    }
}

fn tell(
    args: &Args,
    near: &ChosenTransport,
    far: Option<&ChosenTransport>,
    report: &RelayReport,
    called_off: bool,
) -> Exit {
    let errors = [report.received.error.as_ref(), report.sent.as_ref().and_then(|sent| sent.error.as_ref())];
    for error in errors.into_iter().flatten() {
        complain("relay", error);
        print_remedies("relay", Some(error), REMEDIES);
    }
    let exit = exit_of(report, called_off);
    if args.json {
        let way = |way: &ChosenTransport| json!({ "transport": way.transport, "why": way.why });
        let connect = far.map(way);
        let far = report.sent.as_ref().map(|sent| {
            let mut out = sent.statistics.query_migrate();
            out["rounds"] = json!(sent.statistics.rounds);
            out["downtime-parts"] = json!(sent.statistics.downtime_parts);
            out["zero-copy"] = json!(sent.statistics.zero_copy);
            out["splice"] = json!(sent.statistics.splice);
            out
        });
        let scan = report.received.scan.map(|scan| {
            json!({
                "scans": scan.scans,
                "pages": scan.pages,
                "found": scan.found,
                "took_ms": scan.took.as_secs_f64() * 1e3,
                "last_ms": scan.last.as_secs_f64() * 1e3,
                "memory_bytes": scan.memory,
            })
        });
        let error = errors.into_iter().flatten().next().map(|error| in_words(error));
        let out = json!({
            "outcome": exit.word(),
            "error": error,
            "completed": report.received.ending == Ending::Running,
            "received_pages": report.received.pages,
            "received_bytes": report.received.bytes,
            "first_page_sent_ms": report.first_page_sent.map(|time| time.as_secs_f64() * 1e3),
            "ram_complete_ms": report.ram_complete.map(|time| time.as_secs_f64() * 1e3),
            "listen": way(near),
            "connect": connect,
            "scan": scan,
            "far": far,
        });
        result_line!("{out}");
    } else if let (Ending::Running, Some(sent)) = (report.received.ending, &report.sent) {
        result_text!("{}", render::statistics(&sent.statistics));
        if let Some(scan) = &report.received.scan {
            result_line!(
                "{} scans for what came by RDMA: {:.0} ms in all, {} of {} scanned pages had changed",
                scan.scans,
                scan.took.as_secs_f64() * 1e3,
                scan.found,
                scan.pages
            );
        }
    }
    match report.ending {
        RelayEnding::Running => {}
        RelayEnding::Incomplete => note!("ramwire relay: {GO_ON_WITHOUT}"),
        RelayEnding::Failed | RelayEnding::InDoubt if report.switched => {
            note!("ramwire relay: {AT_ITS_SOURCE}")
        }
        RelayEnding::Failed | RelayEnding::InDoubt => keep_guest(args, report),
        RelayEnding::Unanswered => {
            note!("ramwire relay: {UNANSWERED}");
            keep_guest(args, report);
        }
    }
    exit
}

fn exit_of(report: &RelayReport, called_off: bool) -> Exit {
    match report.ending {
        RelayEnding::Running => Exit::Done,
        // A ramwire that has handed over its guest never resumes it by itself.
        RelayEnding::Failed if report.received.ending == Ending::Stranded => Exit::InDoubt,
        RelayEnding::InDoubt | RelayEnding::Incomplete | RelayEnding::Unanswered => Exit::InDoubt,
        // Either end may notice first that the other has gone: the request decides, not the error.
        RelayEnding::Failed if called_off => Exit::Cancelled,
        RelayEnding::Failed => Exit::Failed,
    }
}

/// Saves a guest whose device state has arrived and whose source may have released it.
fn keep_guest(args: &Args, report: &RelayReport) {
    let Some(kept) = &report.kept else { return };
    let Some(state) = &kept.state else { return };
    // A source that received the failure resumes the guest.
    let told = kept.incoming.has_return_path && report.received.ending != Ending::Stranded;
    let may_run = told || report.ending == RelayEnding::InDoubt;
    let Some(dir) = &args.keep else {
        if report.ending == RelayEnding::InDoubt && !told {
            note!("ramwire relay: {LOOK_THERE}. --keep DIR would have kept it here as well");
        } else if report.ending == RelayEnding::Unanswered {
            note!("ramwire relay: --keep DIR would have kept the guest here as well");
        }
        return;
    };
    match keep(dir, &kept.incoming, &*kept.memory, state, may_run) {
        Ok(()) if report.ending == RelayEnding::InDoubt => note!(
            "ramwire relay: the guest is in {0}, in doubt: look at the far end and at the source; if it runs at neither, \
             `ramwire send URI --dir {0} --destination-is-dead` sends it on",
            dir.display()
        ),
        Ok(()) if may_run => note!(
            "ramwire relay: the guest is in {0}, in doubt, since its source lets it run again; if it does not run there, \
             `ramwire send URI --dir {0} --destination-is-dead` sends it on",
            dir.display()
        ),
        Ok(()) => note!(
            "ramwire relay: the guest is in {0}; if it does not run at its source, `ramwire send URI --dir {0}` \
             sends it on",
            dir.display()
        ),
        Err(error) => complain("relay", &error),
    }
}
