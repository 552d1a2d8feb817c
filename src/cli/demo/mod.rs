//! `ramwire demo`: a whole live migration on one machine, checked page by page.

mod blocks;
mod checks;
mod cuts;
mod destination;
mod guest;
mod report;
mod restore;
mod same_host;
mod scratch;
mod snapshot;
// The example's VM is the demo's KVM guest: both are users of the library, and the example uses more of it.
#[cfg(feature = "kvm")]
#[allow(dead_code)]
#[path = "../../../docs/examples/tiny-vmm/vm/mod.rs"]
mod tiny_vm;
mod way;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ramwire::engine::{Outcome, ThrottlePolicy};
use ramwire::guest::GuestMemory;
use ramwire::observe::{RunDescription, SharedStatistics};
use ramwire::ram::RamBlockTable;
use ramwire::session::{Redial, SourceGuest, SourceReport, SourceSession, SourceSettings, Verify};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::{CancelToken, Stop};
use ramwire::units::Percent;

use self::blocks::BlockSpec;
use self::checks::{check_room, of_both_ends, refuse_cuts, refuse_postcopy};
pub(super) use self::destination::Args as DestinationArgs;
pub(super) use self::destination::run as run_destination;
use self::guest::GuestKind;
use self::way::{Transport, Way};
use super::args::Exit;
use super::common::{
    RdmaArgs, SourceChannelArgs, Usage, bytes, complain, failed_in, is_same_file, local_options,
};
use super::converge::{ConvergeArgs, REMEDIES, print_remedies, warn_if_not_converging};
use super::limits::LimitArgs;
use super::output::{note, result_line, result_text};
use super::postcopy::PostcopyArgs;
use super::progress::Progress;
use super::signals::{SignalWatch, cancel_on_signal};
use super::tls::OwnTlsArgs;
use super::verify::{VerifyBy, word_of};
use super::watch::{WatchArgs, describe};

/// Migrates a guest whose threads keep writing self-describing pages, from this process to another one that it starts.
/// There the guest checks every page.
#[derive(Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    ramwire demo
    ramwire demo --ram 4G --working-set 256M --dirty-rate 500M --transport tcp
    ramwire demo --postcopy --link-rate 125M --transport tcp
    ramwire demo --cut 5
    ramwire demo --cut 5 --channels 2
    ramwire demo --postcopy --cut 5
    ramwire demo --same-host
    ramwire demo --tls-dir certificates --channels 2
    ramwire demo --guest kvm --ram 256M --dirty-rate 20M --write-size 64
    ramwire demo --snapshot demo.save --ram 512M
    ramwire demo --restore demo.save --ram 512M --lazy
    ramwire demo --ram 256M --block 12K --block 5M --hugetlb 2M --json")]
pub(super) struct Args {
    /// What writes to the memory: `kvm` needs /dev/kvm
    #[arg(long, value_name = "GUEST", default_value = "synthetic")]
    guest: GuestKind,
    /// RAM of the guest's first block
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = bytes)]
    ram: u64,
    /// A further block of this size; repeat for more
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    block: Vec<u64>,
    /// Page size of the memory behind the first block: 4K, 2M or 1G; huge ones must be reserved in /sys/kernel/mm/hugepages
    #[arg(long = "hugetlb", alias = "hugepages", value_name = "SIZE", default_value = "4K", value_parser = bytes)]
    hugepages: u64,
    /// Request huge pages (MADV_HUGEPAGE) for the guest's memory at both ends, which is private then: first touches are
    /// faster, and zero pages inside a huge page take memory
    #[arg(long = "thp", alias = "huge-pages", conflicts_with = "hugepages")]
    huge_pages: bool,
    /// Memory that the guest keeps writing
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = bytes)]
    working_set: u64,
    /// Bytes a second that it writes; 0 for an idle guest. If the link carries less, the guest is throttled, unless you
    /// choose otherwise (--auto-converge, --dirty-limit, --xbzrle-cache-size) or set an end (--timeout)
    #[arg(long, value_name = "SIZE", default_value = "200M", value_parser = bytes)]
    dirty_rate: u64,
    /// Bytes of a page that a write changes, in addition to the 40 of its header
    #[arg(long, value_name = "SIZE", default_value = "4K", value_parser = bytes)]
    write_size: u64,
    /// Share of the pages that are zero
    #[arg(long, value_name = "PERCENT", default_value = "25", value_parser = percent)]
    zero: Percent,
    /// Threads that write; with --guest kvm: vCPUs
    #[arg(long, value_name = "N", default_value = "2")]
    writers: u32,
    /// Transport of the migration
    #[arg(long, value_name = "TRANSPORT", default_value = "auto")]
    transport: Transport,
    /// Copy nothing: pass the guest's memory to the other process as file descriptors (memfds over a UNIX socket), like
    /// a VMM that is replaced by a newer version
    #[arg(long, conflicts_with_all = SENDING)]
    #[arg(conflicts_with_all = ["huge_pages", "snapshot", "restore", "avail_switchover_bandwidth"])]
    #[arg(conflicts_with_all = ["base", "lazy", "release_ram"])]
    same_host: bool,
    #[command(flatten)]
    limits: LimitArgs,
    /// Limit the connection itself to this many bytes a second, also in the last round, like a slow network; with
    /// --transport tcp; 0: as fast as the loopback
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = bytes)]
    link_rate: u64,
    /// Populate the destination's memory before the migration, so that its allocation is not part of the measured time
    #[arg(long, overrides_with = "populate")]
    populate: bool,
    /// What the ends compare: only the numbers of pages (off); a fingerprint of each page that is sent, and the
    /// source's memory once the guest runs (fast); a digest of RAM and device state while the guest is paused (full). A
    /// migration that may switch to postcopy compares none of these
    #[arg(long, value_name = "HOW", default_value = "full")]
    verify: VerifyBy,
    /// As --verify off
    #[arg(long, hide = true, conflicts_with = "verify")]
    no_digest: bool,
    /// Seed of what the synthetic guest writes
    #[arg(long, default_value = "1")]
    seed: u64,
    /// Do not migrate: write the guest as it is at one moment to this file (mapped:) while it runs, then start another
    /// guest from the file, which checks its memory
    #[arg(long, value_name = "FILE", conflicts_with_all = SENDING, conflicts_with_all = REPORTING)]
    #[arg(conflicts_with = "lazy")]
    snapshot: Option<PathBuf>,
    /// With --snapshot: write a snapshot to this file first and let the guest run on; the other file then holds only
    /// what has changed since
    #[arg(long, value_name = "FILE", requires = "snapshot")]
    base: Option<PathBuf>,
    /// Start a guest from such a file, with --ram and --block as they were; it runs and checks its memory
    #[arg(long, value_name = "FILE", conflicts_with_all = SENDING, conflicts_with_all = REPORTING)]
    #[arg(conflicts_with_all = ["snapshot", "base"])]
    restore: Option<PathBuf>,
    /// With --restore: start the guest at once and read its memory in the background
    #[arg(long, requires = "restore")]
    lazy: bool,
    /// Print one JSON object instead of a report
    #[arg(long)]
    pub(in crate::cli) json: bool,
    #[command(flatten)]
    watch: WatchArgs,
    #[command(flatten)]
    postcopy: PostcopyArgs,
    /// Cut the connection so many times while memory arrives, each time after the same number of pages; both ends go on over
    /// another connection, which has no page channels. With --postcopy: while the guest runs at the destination
    #[arg(long, value_name = "N", default_value = "0")]
    cut: u32,
    /// With --postcopy: free the guest's memory at the source as soon as the destination has proved that it has
    /// received it
    #[arg(long, requires = "postcopy")]
    release_ram: bool,
    #[command(flatten)]
    converge: ConvergeArgs,
    #[command(flatten)]
    channels: SourceChannelArgs,
    #[command(flatten)]
    rdma: RdmaArgs,
    #[command(flatten)]
    tls: OwnTlsArgs,
}

/// Options about pages that are sent, of no use where memory is passed or saved. A group has the name of its struct.
const SENDING: [&str; 11] = [
    "tls_dir",
    "cut",
    "transport",
    "link_rate",
    "populate",
    "xbzrle_cache_size",
    "max_bandwidth",
    "SourceChannelArgs",
    "ChannelArgs",
    "RdmaArgs",
    "PostcopyArgs",
];

/// Options about the downtime, and about what is reported, of a migration only.
const REPORTING: [&str; 9] = [
    "downtime_ms",
    "verify",
    "no_digest",
    "json",
    "WatchArgs",
    "MetricsArgs",
    "ConvergeArgs",
    "TimeoutArgs",
    "release_ram",
];

fn percent(text: &str) -> Result<Percent, String> {
    let number = text.parse().ok().and_then(Percent::new);
    number.ok_or_else(|| format!("{text:?} is not a number from 0 to 100"))
}

pub(super) fn run(args: &Args) -> Exit {
    let done = match (&args.snapshot, &args.restore) {
        (Some(path), _) => snapshot::run(args, path),
        (_, Some(path)) => restore::run(args, path),
        _ => demo(args),
    };
    done.unwrap_or_else(|error| failed_in("demo", args.json, &*error))
}

/// A demo without options about how to converge or when to end throttles its guest if the link is slow: in larger steps
/// than QEMU's, so that it ends soon.
fn default_throttling() -> ThrottlePolicy {
    let percent = |value| Percent::new(value).unwrap_or_default();
    ThrottlePolicy::AutoConverge {
        initial: percent(50),
        increment: percent(20),
        tailslow: false,
        max: percent(99),
    }
}

/// How long a connection that was cut (`--cut`) may take to be followed by another.
const RECONNECT: Duration = Duration::from_secs(60);
/// How long the guest at the destination may check itself.
const VERDICT: Duration = Duration::from_secs(300);
/// How long a destination that did not get the guest may take to report the reason.
const FAILED_VERDICT_TIMEOUT: Duration = Duration::from_secs(2);

type Failure = Box<dyn std::error::Error>;

fn demo(args: &Args) -> Result<Exit, Failure> {
    let mut settings = settings(args)?;
    let postcopy = settings.postcopy.is_some();
    let blocks = BlockSpec::list(args.ram, args.hugepages, &args.block).map_err(Usage)?;
    check_room(args, &blocks)?;
    let memory =
        Arc::new(BlockSpec::memory(&blocks, args.huge_pages).map_err(|error| of_both_ends(args, error))?);
    let (guest, choice) = args.guest.filled(args, Arc::clone(&memory))?;
    let statistics = SharedStatistics::default();
    let metrics = args.watch.metrics.serve("demo", statistics.clone())?;
    let log = args.watch.create_log()?;
    let cancel = CancelToken::default();
    let signals = cancel_on_signal(vec![cancel.clone()]);
    let (way, connection) = Way::open(args, &blocks, &memory, postcopy, &Stop::on(&cancel))?;
    guest.control().resume()?;
    let run = args.description(&way, memory.table());
    let source = SourceGuest { memory, dirty: vec![choice.source.clone()], control: guest.control() };
    let again = Redial::new(way.address.clone(), local_options()).with_fallbacks(way.fallback.clone());
    if way.fallback.is_some() {
        settings.reconnect_timeout = RECONNECT;
        if let Some(postcopy) = &mut settings.postcopy {
            postcopy.reconnect_timeout = RECONNECT;
        }
    }
    let session = SourceSession::new(source, connection, settings)
        .with_statistics(statistics)
        .with_cancel(cancel)
        .with_reconnect(Box::new(again));
    signals.ask(session.canceller());
    signals.follow(session.statistics());
    warn_if_not_converging("demo", &session.statistics(), REMEDIES);
    let progress = Progress::follow(session.statistics());
    let log = log.follow(session.statistics(), run);
    let written = || guest.control().vcpu_dirty_pages().iter().sum::<u64>();
    let before = written();
    let resident = resident_memory();
    let report = session.run();
    let resident = [resident, resident_memory()];
    let wrote = written().saturating_sub(before) * report.statistics.page_size;
    log.finish();
    drop((progress, metrics));
    finish(args, &report, (wrote, resident), way, &choice.to_string(), &signals)
}

fn settings(args: &Args) -> Result<SourceSettings, Usage> {
    let mut settings =
        SourceSettings::new(Configuration { machine: "ramwire-demo".into(), ..Configuration::default() });
    args.limits.apply(&mut settings);
    settings.same_host = true;
    args.converge.apply(&mut settings)?;
    args.postcopy.apply(&mut settings);
    settings.reconnect_timeout = if args.cut > 0 { RECONNECT } else { Duration::ZERO };
    if let Some(postcopy) = &mut settings.postcopy {
        postcopy.reconnect_timeout = settings.reconnect_timeout;
        postcopy.release_ram = args.release_ram;
    }
    let postcopy = settings.postcopy.is_some();
    settings.verify = args.verify();
    settings.pass_memory = args.same_host;
    if args.converge.is_empty() && args.limits.delta_cache() == 0 && !postcopy {
        settings.throttling = Some(default_throttling());
    }
    Ok(settings)
}

impl Args {
    /// Refuses options that don't go together.
    pub(in crate::cli) fn check(&self) -> Result<(), Usage> {
        if let (Some(path), Some(base)) = (&self.snapshot, &self.base)
            && is_same_file(path, base)
        {
            return Err(Usage(
                "--base and --snapshot are one file: the changes need a file of their own".into(),
            ));
        }
        if self.snapshot.is_some() || self.restore.is_some() {
            return Ok(());
        }
        self.channels.options()?;
        self.channels.check()?;
        self.check_transport()?;
        settings(self)?;
        self.postcopy.check(false, self.converge.timeout.may_switch())?;
        if self.may_switch() {
            refuse_postcopy(self)?;
        }
        if self.cut > 0 { refuse_cuts(self) } else { Ok(()) }
    }

    fn check_transport(&self) -> Result<(), Usage> {
        if self.link_rate > 0 && self.transport != Transport::Tcp {
            return Err(Usage(
                "--link-rate holds back a TCP connection: give --transport tcp as well".into(),
            ));
        }
        let (way, is_rdma) = match self.transport {
            Transport::Tcp => ("--transport tcp", false),
            Transport::Unix => ("--transport unix", false),
            Transport::Auto | Transport::Rdma => ("", true),
        };
        self.rdma.check(way, is_rdma)
    }

    /// The guest may run at the destination before its memory has arrived.
    fn may_switch(&self) -> bool {
        self.postcopy.postcopy || self.converge.timeout.may_switch()
    }

    /// Missing pages can't be compared; the guest checks them where it runs.
    fn verify(&self) -> Verify {
        // Memory that is passed is not compared; the guest checks it where it runs.
        let passed = self.same_host;
        if self.no_digest || self.may_switch() || passed { Verify::Off } else { self.verify.into() }
    }

    fn description(&self, way: &Way, table: &RamBlockTable) -> RunDescription {
        let run = describe("demo", way.transport, &way.why, table);
        let run = self.limits.describe(run);
        run.with("working_set", self.working_set)
            .with("dirty_rate", self.dirty_rate)
            .with("write_size", self.write_size)
            .with("writers", self.writers)
            .with("link_rate", self.link_rate)
            .with("channels", self.channels.count())
            .with("verify", word_of(self.verify()))
            .with("tls", self.tls.is_given())
            .with("postcopy", self.may_switch())
            .with("cut", self.cut)
            .with("release_ram", self.release_ram)
    }
}

/// Bytes of this process that are in memory, by /proc; 0 if it does not report them.
fn resident_memory() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}

/// `wrote`: bytes that the guest wrote at the source meanwhile; `resident`: bytes of the source in memory, before and after.
fn finish(
    args: &Args,
    report: &SourceReport,
    (wrote, resident): (u64, [u64; 2]),
    way: Way,
    dirty_source: &str,
    signals: &SignalWatch,
) -> Result<Exit, Failure> {
    let Way { transport, why, destination, .. } = way;
    // A destination that failed, was killed or hangs has little or nothing to report.
    let patience = if report.outcome == Outcome::Completed { VERDICT } else { FAILED_VERDICT_TIMEOUT };
    let arrived = destination.verdict(patience);
    let exit = super::common::exit_of(report);
    let exit = if exit == Exit::Done && !arrived.verified { Exit::NotVerified } else { exit };
    signals.ended(exit);
    let populated = args.populate;
    let run = report::Run {
        transport,
        why: &why,
        dirty_source,
        report,
        wrote,
        resident,
        arrived: &arrived,
        populated,
    };
    if args.json {
        result_line!("{}", run.json());
    } else {
        result_text!("{}", run.text());
    }
    if let Some(error) = &report.error {
        complain("demo", error);
        print_remedies("demo", Some(error), REMEDIES);
    }
    let cut = arrived.postcopy.as_ref().map_or(0, |postcopy| postcopy.recoveries.len() as u64);
    let cut = cut + report.statistics.lost.count;
    if exit == Exit::Done && cut < args.cut.into() {
        note!("the connection was cut {cut} of {} times: there were no more pages to wait for", args.cut);
    }
    if report.outcome == Outcome::Incomplete {
        note!(
            "the guest ran at the destination, and the connection was lost while memory was missing there: what had not come \
             is lost with this process"
        );
    }
    if report.outcome == Outcome::InDoubt {
        note!(
            "in doubt: the guest was given away, and no report came that it runs. Between hosts: if it runs at the \
             destination, drop the source; if it does not, resume the source (--destination-is-dead)"
        );
    }
    Ok(exit)
}
