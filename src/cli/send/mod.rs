//! `ramwire send`.

mod controlled;
mod cpr;
mod ending;

use std::path::{Path, PathBuf};

use ramwire::guest::GuestMemory;
use ramwire::observe::RunDescription;
use ramwire::page::ZeroDetection;
use ramwire::ram::{BlockName, RamBlockTable};
use ramwire::session::{
    CancelReply, MemoryCheck, Peer, Redial, SourceGuest, SourceSession, SourceSettings, Verify,
};
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::{Address, ChosenTransport, ConnectionOptions, open_source};
use ramwire::units::Rate;

use clap::ValueEnum as _;

use super::args::Exit;
use super::common::{
    PeerOption, RdmaArgs, SourceChannelArgs, SourceTimeouts, Usage, ended_early, exit_of, failed_in,
    unix_path, uri_help,
};
use super::converge::{TimeoutArgs, warn_if_not_converging};
use super::limits::LimitArgs;
use super::output::note;
use super::postcopy::{PostcopyArgs, ReconnectArgs, warn_if_not_replaceable};
use super::progress::Progress;
use super::qmp::{Plan, QmpArgs};
use super::remedies::in_words;
use super::signals::{SignalWatch, cancel_on_signal};
use super::store::{Block, Overrides, StoredGuest};
use super::tls::{SourceTlsArgs, warn_if_unencrypted};
use super::verify::{VerifyBy, word_of};
use super::watch::{WatchArgs, describe};
use controlled::Controlled;
use ending::{left_behind, settle, tell};

/// Sends a stored guest. The folder's manifest says `sent` once the other end runs it, and `in-doubt` if that is not known.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    # Give a received guest to a QEMU started with -incoming tcp:0.0.0.0:4444
    ramwire send tcp:10.0.0.7:4444 --dir guest

    # The same on four page channels (QEMU: multifd on, multifd-channels 4)
    ramwire send tcp:10.0.0.7:4444 --dir guest --channels 4

    # Let the guest run there at once, its memory follows (QEMU: postcopy-ram on)
    ramwire send tcp:10.0.0.7:4444 --dir guest --postcopy

    # Write it as a file that QEMU reads with mapped-ram and `migrate-incoming file:FILE`
    ramwire send mapped:FILE --dir guest

    # Send a guest from a file that QEMU wrote with mapped-ram, without a folder in between
    ramwire send tcp:10.0.0.7:4444 --from mapped:FILE

    # Only RAM, to another ramwire
    ramwire send unix:/run/guest.sock --ram pc.ram=ram.bin

    # Let a QEMU on this host map the folder's RAM files (its second -incoming has channel type cpr): no page is copied
    ramwire send unix:main.sock --cpr unix:cpr.sock --dir guest

    # Wait for `migrate` from a tool that uses QEMU's monitor protocol, and end at its `quit`
    ramwire send --dir guest --qmp unix:/run/guest.qmp")]
pub(super) struct Args {
    #[arg(help = uri_help("Where the destination listens; with --qmp it may be left out: then `migrate` gives it"))]
    #[arg(required_unless_present = "qmp")]
    uri: Option<Address>,
    /// Folder that `ramwire receive` has filled
    #[arg(long, required_unless_present_any = ["ram", "from"])]
    dir: Option<PathBuf>,
    /// Instead of a folder, mapped:PATH[,offset=N]: a file with mapped-ram pages, from which the guest is sent. No
    /// state is recorded in it: it can be sent any number of times
    #[arg(long, value_name = "URI", conflicts_with_all = ["dir", "ram"])]
    from: Option<Address>,
    /// A RAM block in a file; with --dir it replaces the block of that name. Repeat for more
    #[arg(long, value_name = "NAME=PATH", value_parser = block)]
    ram: Vec<Block>,
    /// The destination is a QEMU 10.0 or newer on this host with a second -incoming of channel type cpr, at this address: it
    /// maps the RAM files instead of receiving pages, and its guest changes them. The folder can't be sent again then
    #[arg(long, value_name = "unix:PATH", value_parser = unix_path, conflicts_with_all = cpr::EXCLUDES)]
    cpr: Option<PathBuf>,
    /// What the destination is, if it can't be detected: qemu-7.2, qemu-10.0 or ramwire
    #[arg(long, value_name = "PEER")]
    peer: Option<PeerOption>,
    /// Where zero pages are detected: none sends them whole
    #[arg(long, value_name = "WHERE", default_value = "multifd")]
    zero_page: ZeroPage,
    /// What the ends compare in addition to the numbers of pages: nothing (off); a fingerprint of each page that is
    /// sent, and this memory once the guest runs there (fast); a digest of RAM and device state before the guest is
    /// handed over (full). Only a ramwire can; any other destination is refused
    #[arg(long, value_name = "HOW", default_value = "off")]
    verify: VerifyBy,
    /// As --verify full
    #[arg(long, hide = true, conflicts_with = "verify")]
    digest: bool,
    #[command(flatten)]
    limits: LimitArgs,
    /// Pause the migration before its last pages, until `migrate-continue`
    #[arg(long, requires = "qmp")]
    pause_before_switchover: bool,
    /// Send a guest that was sent before
    #[arg(long, alias = "again")]
    resend: bool,
    /// Send a guest in doubt: you have checked that neither its destination nor the source it came from runs it
    #[arg(long)]
    destination_is_dead: bool,
    /// Send device state that has no VM description to prove it complete
    #[arg(long)]
    no_vmdesc: bool,
    /// Bytes a second that the link will carry while the guest is paused; 0: as measured. Set by
    /// `migrate-set-parameters`
    #[arg(skip)]
    switchover_bandwidth: u64,
    /// Print one JSON object instead of a report
    #[arg(long)]
    pub(in crate::cli) json: bool,
    #[command(flatten)]
    watch: WatchArgs,
    #[command(flatten)]
    qmp: QmpArgs,
    #[command(flatten)]
    channels: SourceChannelArgs,
    #[command(flatten)]
    tls: SourceTlsArgs,
    #[command(flatten)]
    rdma: RdmaArgs,
    #[command(flatten)]
    timeouts: SourceTimeouts,
    #[command(flatten)]
    timeout: TimeoutArgs,
    #[command(flatten)]
    postcopy: PostcopyArgs,
    #[command(flatten)]
    reconnect: ReconnectArgs,
}

/// What helps where the time was over.
const REMEDIES: &str = "raise --max-bandwidth, --downtime-ms or --timeout";

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum ZeroPage {
    /// Nowhere: every page is sent whole
    None,
    /// In the page loop
    Legacy,
    /// On the threads of the page channels, where there are any and the peer understands it; else in the page loop
    Multifd,
}

impl ZeroPage {
    fn named(name: &str) -> Self {
        Self::from_str(name, false).unwrap_or(Self::Multifd)
    }

    /// As it is written.
    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Legacy => "legacy",
            Self::Multifd => "multifd",
        }
    }
}

impl From<ZeroPage> for ZeroDetection {
    fn from(option: ZeroPage) -> Self {
        match option {
            ZeroPage::None => Self::None,
            ZeroPage::Legacy => Self::Legacy,
            ZeroPage::Multifd => Self::Channels,
        }
    }
}

fn block(text: &str) -> Result<Block, String> {
    let (name, path) = text.split_once('=').ok_or("write NAME=PATH")?;
    let name = BlockName::new(name).map_err(|error| error.to_string())?;
    Ok(Block { name, path: PathBuf::from(path) })
}

pub(super) fn run(args: &Args) -> Exit {
    let opened = match &args.dir {
        Some(dir) => StoredGuest::open(dir, &args.ram, overrides(args)).map_err(Into::into),
        None => match &args.from {
            Some(file) => StoredGuest::of_file(file, args.no_vmdesc),
            None => StoredGuest::of_blocks(&args.ram).map_err(Into::into),
        },
    };
    let sent = opened.and_then(|guest| serve(args, guest));
    sent.unwrap_or_else(|error: Box<dyn std::error::Error>| failed_in("send", args.json, &*error))
}

fn overrides(args: &Args) -> Overrides {
    Overrides {
        resend: args.resend,
        destination_is_dead: args.destination_is_dead,
        no_vmdesc: args.no_vmdesc,
    }
}

fn settings(args: &Args, guest: &StoredGuest) -> SourceSettings {
    let mut settings = SourceSettings::new(guest.configuration().clone());
    settings.early_sections = guest.early_sections().to_vec();
    settings.framing = guest.framing();
    args.limits.apply(&mut settings);
    settings.switchover_bandwidth = Rate::limit(args.switchover_bandwidth);
    settings.pause_before_switchover = args.pause_before_switchover;
    settings.zero_detection = args.zero_page.into();
    settings.verify = args.verify();
    settings.guest_is_paused = true;
    args.timeouts.set(&mut settings);
    args.timeout.apply(&mut settings);
    args.postcopy.apply(&mut settings);
    args.reconnect.apply(&mut settings);
    // Without device state only a ramwire can take the guest.
    settings.peer = (!guest.has_state()).then_some(Peer::Ramwire);
    settings.style = guest.peer_style().or(settings.style);
    if let Some(option) = args.peer {
        settings.peer = Some(option.peer);
        settings.style = Some(option.style);
    }
    settings
}

/// Sends it at once, or when a client of the monitor says so.
fn serve(args: &Args, guest: StoredGuest) -> Result<Exit, Box<dyn std::error::Error>> {
    let cancel = CancelToken::default();
    let stopped = CancelToken::default();
    let signals = cancel_on_signal(vec![cancel.clone(), stopped.clone()]);
    let controlled = Controlled::new(args, &cancel, stopped);
    // A port that is in use is told before the destination is asked.
    let _metrics = args.watch.metrics.serve("send", controlled.statistics.clone())?;
    // Dropped last: its clients are told how it ended.
    let monitor = args.qmp.serve("send", &controlled.subject)?;
    let Some(uri) = &args.uri else {
        let Some((uri, planned)) = controlled.wait_for_migrate(args) else {
            if args.json {
                ended_early(Exit::Cancelled, None);
            }
            return Ok(Exit::Cancelled);
        };
        let sent = send(&planned, &uri, guest, &cancel, &signals, &controlled);
        let exit = sent.unwrap_or_else(|error| {
            controlled.failed(&*error, &cancel);
            let exit = failed_in("send", args.json, &*error);
            signals.ended(exit);
            exit
        });
        controlled.wait_for_quit();
        return Ok(exit);
    };
    let sent = send(args, uri, guest, &cancel, &signals, &controlled);
    if let Err(error) = &sent {
        controlled.failed(&**error, &cancel);
    }
    drop(monitor);
    sent
}

fn send(
    args: &Args,
    uri: &Address,
    guest: StoredGuest,
    cancel: &CancelToken,
    signals: &SignalWatch,
    controlled: &Controlled,
) -> Result<Exit, Box<dyn std::error::Error>> {
    let memory = guest.memory();
    let settings = settings(args, &guest);
    let mut options = ConnectionOptions::default();
    options.stream = args.timeouts.both.stream_options();
    options.rdma = args.rdma.options();
    options.rdma.postcopy = args.postcopy.postcopy || args.timeout.may_switch();
    options.channels = args.channels.options()?;
    options.delta_cache = args.limits.delta_cache();
    options.retry = args.timeouts.retry;
    // Before anything is opened: an output file keeps what it holds.
    if args.cpr.is_some() {
        cpr::check(uri, &settings, &options)?;
    }
    settings.check(uri.carries_answers()).map_err(|error| Usage(in_words(&error)))?;
    let log = args.watch.create_log()?;
    args.timeouts.tell_retry("send", uri);
    let address = args.tls.at(uri)?;
    let remedy = match address.scheme() {
        "tcp" => "use a network you trust, or TLS (--tls-dir DIR)",
        _ => "use a network you trust",
    };
    warn_if_unencrypted("send", &address, remedy);
    if let Some(path) = &args.cpr {
        cpr::pass_memory(path, &guest, &options, &Stop::on(cancel))?;
    }
    let connection =
        open_source(&address, memory.clone(), &options, &Stop::on(cancel)).inspect_err(|_| {
            if args.cpr.is_some() {
                note!("ramwire send: the QEMU closed its cpr channel; if it has ended, its output has the reason");
            }
        })?;
    let way = connection.chosen.clone();
    if uri.decides_late() {
        note!("ramwire send: {}: {}", way.transport, way.why);
    }
    let run = args.description(&way, memory.table());
    let source = SourceGuest { memory, dirty: Vec::new(), control: guest.control() };
    let fallbacks =
        args.reconnect.fallback.iter().map(|uri| args.tls.at(uri)).collect::<Result<Vec<_>, _>>()?;
    let again = Redial::new(address, options.stream).with_fallbacks(fallbacks);
    let session = SourceSession::new(source, connection, settings)
        .with_statistics(controlled.statistics.clone())
        .with_cancel(cancel.clone())
        .with_reconnect(Box::new(again));
    let session = if args.cpr.is_some() { session.with_memory_passed() } else { session };
    warn_if_not_converging("send", &session.statistics(), REMEDIES);
    warn_if_not_replaceable("send", &session.statistics());
    let custody = guest.custody();
    controlled.follow(session.control());
    signals.ask(session.canceller());
    signals.follow(session.statistics());
    let (figures, place, passed) = (session.statistics(), args.place().to_owned(), args.cpr.is_some());
    signals.leaves(move |reply| {
        (reply == CancelReply::TooLate).then(|| left_behind(figures.snapshot().status, &place, passed))
    });
    let left = custody.clone();
    signals.before_leaving(move |exit| settle(left.as_deref(), exit));
    let progress = Progress::follow(session.statistics());
    let log = log.follow(session.statistics(), run);
    let report = session.run();
    log.finish();
    drop(progress);
    let exit = exit_of(&report);
    settle(custody.as_deref(), exit);
    signals.ended(exit);
    // The guest is gone all the same.
    let differs = matches!(report.memory_check, Some(MemoryCheck::Differs { .. }));
    let exit = if differs { Exit::NotVerified } else { exit };
    tell(args, &way, &report, exit);
    Ok(exit)
}

impl Args {
    /// Refuses options that don't go together. Where a client of the monitor gives the destination, it may also set
    /// what an option needs.
    pub(super) fn check(&self) -> Result<(), Usage> {
        self.channels.options()?;
        let postcopy = self.postcopy.postcopy || self.timeout.may_switch();
        self.postcopy.check(self.qmp.is_given(), self.timeout.may_switch())?;
        if postcopy && self.verify() != Verify::Off {
            return Err(Usage(
                "what is missing after a switch to postcopy can't be compared: leave --verify or the switch out".into(),
            ));
        }
        let Some(uri) = &self.uri else { return Ok(()) };
        self.channels.check()?;
        self.rdma.check_at(uri)
    }

    /// The options under QEMU's names.
    fn plan(&self) -> Plan {
        let plan = Plan::default()
            .with("zero-page-detection", self.zero_page.name())
            .having("pause-before-switchover", self.pause_before_switchover);
        let plan = self.postcopy.plan(self.reconnect.plan(self.rdma.plan(plan)));
        self.channels.plan(self.limits.plan(plan))
    }

    /// The same with what a client of the monitor has planned.
    fn following(&self, plan: &Plan) -> Self {
        let mut planned = self.clone();
        planned.limits.follow(plan);
        planned.zero_page = ZeroPage::named(plan.text("zero-page-detection"));
        planned.pause_before_switchover = plan.has("pause-before-switchover");
        planned.switchover_bandwidth = plan.number("avail-switchover-bandwidth");
        planned.channels.follow(plan);
        planned.postcopy.follow(plan);
        planned.reconnect.follow(plan);
        planned.rdma.follow(plan);
        planned
    }

    /// What is sent, for messages.
    fn place(&self) -> &Path {
        let other = if self.from.is_some() { "the file" } else { "the RAM files" };
        self.dir.as_deref().unwrap_or(Path::new(other))
    }

    fn verify(&self) -> Verify {
        if self.digest { Verify::Full } else { self.verify.into() }
    }

    fn description(&self, way: &ChosenTransport, table: &RamBlockTable) -> RunDescription {
        let run = self.limits.describe(describe("send", way.transport, &way.why, table));
        run.with("channels", self.channels.count())
            .with("postcopy", self.postcopy.postcopy)
            .with("verify", word_of(self.verify()))
            .with("cpr", self.cpr.is_some())
    }
}
