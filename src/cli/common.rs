//! What several commands share: options, numbers with units, errors as text.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ramwire::engine::{Outcome, Reason};
use ramwire::session::{ErrorKind, Peer, SourceReport, SourceSettings};
use ramwire::stream::qemu::page_compression::PageCompression;
use ramwire::stream::qemu::style::PeerStyle;
use ramwire::sys::StopReason;
use ramwire::transport::{
    Address, ChannelError, ChannelOptions, Numa, OpenError, PageSending, RdmaOptions, StreamOptions,
};

use serde_json::json;

use super::args::Exit;
use super::output::{note, note_line, priority, result_line};
use super::qmp::Plan;
use super::remedies::{hint, in_words};
pub(super) use super::sizes::{bytes, seconds};
use super::store::StoreError;

/// The help text of an address.
pub(super) fn uri_help(what: &str) -> String {
    format!("{what}: {}", Address::forms())
}

/// Options of every connection.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Timeouts {
    /// Give up when no byte moves for this long before the guest is handed over
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub(super) stall_timeout: Duration,
    /// Give up when the other end's host acknowledges nothing over TCP for this long before the guest is handed over
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    dead_peer_timeout: Duration,
    /// After the guest is handed over, wait this long for the other end to report that it runs
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    pub(super) finish_timeout: Duration,
}

/// Of a command that sends.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct SourceTimeouts {
    #[command(flatten)]
    pub(super) both: Timeouts,
    /// Wait this long for a connected destination to answer the greeting, which shows whether it is a ramwire or a QEMU
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    greeting_timeout: Duration,
    /// While no process listens at the destination, try again for this long; a file, descriptor or command is opened
    /// only once
    #[arg(long, value_name = "SECONDS", default_value = "0", value_parser = seconds)]
    pub(super) retry: Duration,
}

impl SourceTimeouts {
    /// Before the connection is opened.
    pub(super) fn tell_retry(&self, command: &str, address: &Address) {
        if !self.retry.is_zero() {
            note!("ramwire {command}: connecting to {address} within {} s", self.retry.as_secs_f64());
        }
    }

    pub(super) fn set(&self, settings: &mut SourceSettings) {
        settings.greeting_timeout = self.greeting_timeout;
        settings.stall_timeout = self.both.stall_timeout;
        settings.finish_timeout = self.both.finish_timeout;
    }
}

impl Timeouts {
    pub(super) fn stream_options(&self) -> StreamOptions {
        let mut options = StreamOptions::default();
        options.stall = Some(self.stall_timeout);
        options.dead_peer = self.dead_peer_timeout;
        options
    }
}

/// Options of `rdma:` connections.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct RdmaArgs {
    /// Over RDMA: register all of RAM at both ends before the first page; faster, but all of it is resident
    #[arg(long)]
    pin_all: bool,
    /// Over RDMA without --pin-all: register at most this much of RAM at a time
    #[arg(long, value_name = "SIZE", value_parser = bytes, conflicts_with = "pin_all")]
    pin_budget: Option<u64>,
    /// Over RDMA: queue pairs for pages, more than one only between two ramwires
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=16))]
    queue_pairs: u16,
    /// Over RDMA, to a QEMU with its return-path capability (10.0): open the return path, so that it can report the
    /// outcome
    #[arg(long)]
    return_path: bool,
}

impl RdmaArgs {
    /// Refuses options of RDMA for a connection that is none; `way` is how it is written.
    pub(super) fn check(&self, way: &str, is_rdma: bool) -> Result<(), Usage> {
        let given = match () {
            () if is_rdma => None,
            () if self.pin_all => Some("--pin-all"),
            () if self.pin_budget.is_some() => Some("--pin-budget"),
            () if self.queue_pairs > 1 => Some("--queue-pairs"),
            () if self.return_path => Some("--return-path"),
            () => None,
        };
        given.map_or(Ok(()), |option| {
            Err(Usage(format!(
                "{option} is of RDMA, and {way} is not: give an address of RDMA, or leave {option} out"
            )))
        })
    }

    /// The same for an address.
    pub(super) fn check_at(&self, address: &Address) -> Result<(), Usage> {
        self.check(&address.to_string(), matches!(address.scheme(), "rdma" | "auto"))
    }

    /// Under QEMU's names.
    pub(super) fn plan(&self, plan: Plan) -> Plan {
        plan.having("rdma-pin-all", self.pin_all)
    }

    /// As a client of the monitor has planned it.
    pub(super) fn follow(&mut self, plan: &Plan) {
        self.pin_all = plan.has("rdma-pin-all");
    }

    pub(super) fn options(&self) -> RdmaOptions {
        let mut options = RdmaOptions::default();
        options.pin_all = self.pin_all;
        options.pin_budget = self.pin_budget;
        options.return_path = self.return_path;
        options.queue_pairs = self.queue_pairs;
        options
    }
}

/// Options that don't go together.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Usage(pub(super) String);

/// Page channels beside the stream, alike at both ends.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ChannelArgs {
    /// Page channels in addition to the main connection, 0 to 255: QEMU's multifd-channels with its multifd on; the
    /// same at both ends
    #[arg(long, value_name = "N", default_value = "0")]
    channels: u8,
    /// How pages on channels are compressed: none, zlib[:0-9] or zstd[:0-20]; the same kind at both ends
    #[arg(long, value_name = "HOW", default_value = "none")]
    compression: PageCompression,
    /// UUID of the VM, if it has one (QEMU's -uuid): it is in the first packet of each channel
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    uuid: Option<[u8; 16]>,
    /// NUMA nodes for the threads of page channels: auto, off, or a list like 0,2-3. Each thread is bound to the
    /// processors of one node; nothing is done on a host with a single node
    #[arg(long, value_name = "NODES", default_value = "auto")]
    numa: Numa,
}

impl ChannelArgs {
    pub(super) fn options(&self) -> Result<ChannelOptions, Usage> {
        if self.channels == 0 && self.compression != PageCompression::Plain {
            return Err(Usage("--compression is for page channels: give --channels too".into()));
        }
        if let Some((node, here)) = self.numa.missing() {
            return Err(Usage(format!(
                "--numa {}: there is no node {node}; the nodes are {here:?}",
                self.numa
            )));
        }
        let uuid = self.uuid.unwrap_or_default();
        let mut options = ChannelOptions::default();
        options.count = self.channels;
        options.compression = self.compression;
        options.uuid = uuid;
        options.numa = self.numa.clone();
        Ok(options)
    }

    /// How many channels.
    pub(super) fn count(&self) -> u8 {
        self.channels
    }

    /// As a client of the monitor has planned it.
    pub(super) fn follow(&mut self, plan: &Plan) {
        self.channels = if plan.has("multifd") { byte(plan, "multifd-channels") } else { 0 };
        self.compression = match plan.text("multifd-compression") {
            "zlib" if plan.has("multifd") => PageCompression::Zlib(byte(plan, "multifd-zlib-level")),
            "zstd" if plan.has("multifd") => PageCompression::Zstd(byte(plan, "multifd-zstd-level")),
            _ => PageCompression::Plain,
        };
    }

    /// Under QEMU's names.
    pub(super) fn plan(&self, mut plan: Plan) -> Plan {
        if self.channels > 0 {
            plan = plan.having("multifd", true).with("multifd-channels", self.channels);
        }
        match self.compression {
            PageCompression::Plain => plan,
            PageCompression::Zlib(level) => {
                plan.with("multifd-compression", "zlib").with("multifd-zlib-level", level)
            }
            PageCompression::Zstd(level) => {
                plan.with("multifd-compression", "zstd").with("multifd-zstd-level", level)
            }
        }
    }

    /// The same options for another process.
    pub(super) fn arguments(&self) -> [String; 3] {
        let Self { channels, compression, numa, .. } = self;
        [format!("--channels={channels}"), format!("--compression={compression}"), format!("--numa={numa}")]
    }
}

/// Page channels at a source.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct SourceChannelArgs {
    #[command(flatten)]
    both: ChannelArgs,
    /// How many of the channels carry pages, the others only take part in barriers; unless given, one for each core within
    /// a host and four for each core over a network
    #[arg(long, alias = "carriers", value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    active_channels: Option<u8>,
    /// How pages on channels get into the sockets' queues: copied, by reference (splice: less work for this end, more for
    /// a receiver on the same host), or lent with receipts (zerocopy: MSG_ZEROCOPY); only copied with --compression
    #[arg(long, value_name = "copy|splice|zerocopy", default_value_t)]
    send_pages: PageSending,
}

impl SourceChannelArgs {
    /// Refuses what has no effect.
    pub(super) fn check(&self) -> Result<(), Usage> {
        let count = self.count();
        match self.active_channels {
            Some(active) if active > count => Err(Usage(format!(
                "--active-channels {active}: there are {count} page channels; give --channels {active} or more"
            ))),
            _ => Ok(()),
        }
    }

    pub(super) fn options(&self) -> Result<ChannelOptions, Usage> {
        let mut options = self.both.options()?;
        options.sending = self.send_pages;
        options.active = self.active_channels.map(usize::from);
        match options.no_such_sending() {
            Some((why, remedy)) => {
                let way = options.sending;
                Err(Usage(format!("--send-pages {way} {why}; {remedy}{}", hint(Some(remedy)))))
            }
            None => Ok(options),
        }
    }

    /// How many channels.
    pub(super) fn count(&self) -> u8 {
        self.both.count()
    }

    /// Under QEMU's names.
    pub(super) fn plan(&self, plan: Plan) -> Plan {
        self.both.plan(plan).having("zero-copy-send", self.send_pages == PageSending::ZeroCopy)
    }

    /// As a client of the monitor has planned it.
    pub(super) fn follow(&mut self, plan: &Plan) {
        self.both.follow(plan);
        match (plan.has("zero-copy-send"), self.send_pages) {
            (true, _) => self.send_pages = PageSending::ZeroCopy,
            (false, PageSending::ZeroCopy) => self.send_pages = PageSending::Copy,
            (false, _) => {}
        }
    }

    /// The options that the other end needs as well.
    pub(super) fn both(&self) -> &ChannelArgs {
        &self.both
    }
}

/// A parameter whose bounds fit a byte.
fn byte(plan: &Plan, name: &str) -> u8 {
    u8::try_from(plan.number(name)).unwrap_or(u8::MAX)
}

/// 32 hexadecimal digits, with or without dashes.
fn uuid(text: &str) -> Result<[u8; 16], String> {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let value = u128::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 32);
    Ok(value.ok_or_else(|| format!("{text:?} is not a UUID of 32 hexadecimal digits"))?.to_be_bytes())
}

/// Connections between two processes of this host.
pub(super) fn local_options() -> StreamOptions {
    StreamOptions::default()
}

/// The value of `--peer`.
#[derive(Clone, Copy, Debug)]
pub(super) struct PeerOption {
    pub(super) peer: Peer,
    pub(super) style: PeerStyle,
}

impl std::str::FromStr for PeerOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let style: PeerStyle = text.parse().map_err(|error| format!("{error}"))?;
        let peer = if text == "ramwire" { Peer::Ramwire } else { Peer::Qemu };
        Ok(Self { peer, style })
    }
}

/// `1.5 GiB`.
pub(super) fn human_bytes(bytes: u64) -> String {
    indicatif::HumanBytes(bytes).to_string()
}

/// The path in `unix:PATH`.
pub(super) fn unix_path(text: &str) -> Result<PathBuf, String> {
    let path = text.strip_prefix("unix:").filter(|path| !path.is_empty());
    path.map(PathBuf::from).ok_or_else(|| format!("{text:?} is no UNIX socket; write unix:PATH"))
}

/// Prints an error with its causes and the options that help.
pub(super) fn complain(command: &str, error: &(dyn std::error::Error + 'static)) {
    note_line(priority::ERROR, format_args!("ramwire {command}: {}", in_words(error)));
}

/// Prints why a command ended before its session began, and gives its status: 4 if a signal ended it, 2 if its options
/// don't go together.
pub(super) fn failed(command: &str, error: &(dyn std::error::Error + 'static)) -> Exit {
    complain(command, error);
    if error.is::<Usage>() {
        return Exit::Usage;
    }
    if matches!(error.downcast_ref(), Some(StoreError::NotReplaced { .. })) {
        return Exit::Usage;
    }
    match error.downcast_ref() {
        Some(OpenError::Channel(ChannelError::Stopped { reason: StopReason::Cancelled, .. })) => {
            Exit::Cancelled
        }
        // No peer was asked: this address never takes these options.
        Some(
            OpenError::NoDeltas { .. }
            | OpenError::NoChannels { .. }
            | OpenError::NoSuchSending { .. }
            | OpenError::NotAStream { .. }
            | OpenError::Compressed { .. }
            | OpenError::NoTls { .. },
        ) => Exit::Usage,
        _ => Exit::Failed,
    }
}

/// As [`failed`]; with `--json` an object as well, since nothing else comes on standard output.
pub(super) fn failed_in(command: &str, json: bool, error: &(dyn std::error::Error + 'static)) -> Exit {
    let exit = failed(command, error);
    if json {
        ended_early(exit, Some(error));
    }
    exit
}

/// The object of a command that ended before it was a migration.
pub(super) fn ended_early(exit: Exit, error: Option<&(dyn std::error::Error + 'static)>) {
    result_line!("{}", json!({ "outcome": exit.word(), "error": error.map(in_words) }));
}

/// True if both paths lead to one file, which need not exist yet.
pub(super) fn is_same_file(one: &Path, other: &Path) -> bool {
    let whole = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new(".")).canonicalize().ok()?;
        path.canonicalize().ok().or_else(|| Some(folder.join(path.file_name()?)))
    };
    let number = |path: &Path| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let (same_path, same_number) = (whole(one) == whole(other), number(one) == number(other));
    one == other || same_path && whole(one).is_some() || same_number && number(one).is_some()
}

/// The status of a source's run.
pub(super) fn exit_of(report: &SourceReport) -> Exit {
    match report.outcome {
        Outcome::Completed => Exit::Done,
        Outcome::InDoubt | Outcome::Incomplete => Exit::InDoubt,
        Outcome::StaysHere(Reason::Cancelled) => Exit::Cancelled,
        Outcome::StaysHere(Reason::Failed) => {
            let kind = report.error.as_ref().map(ramwire::session::Error::kind);
            if kind == Some(ErrorKind::Cancelled) { Exit::Cancelled } else { Exit::Failed }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn uuids_are_read_as_they_are_written() {
        let value = uuid("00112233-4455-6677-8899-aabbccddeeff");
        assert!(value.is_ok_and(|value| value[..3] == [0, 0x11, 0x22] && value[15] == 0xff));
        for wrong in ["", "0011", "+0112233445566778899aabbccddeef", "00112233-4455-6677-8899-aabbccddeeffg"]
        {
            assert!(uuid(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_file_is_the_same_by_every_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("one"), "").unwrap();
        std::fs::write(path("two"), "").unwrap();
        std::fs::hard_link(path("one"), path("hard")).unwrap();
        std::os::unix::fs::symlink(path("one"), path("soft")).unwrap();
        for name in ["one", "./one", "hard", "soft"] {
            assert!(is_same_file(&path("one"), &path(name)), "{name}");
        }
        assert!(is_same_file(&path("new"), &path("./new")) && !is_same_file(&path("new"), &path("newer")));
        assert!(!is_same_file(&path("one"), &path("two")) && !is_same_file(&path("no/a"), &path("no/b")));
    }

    #[test]
    fn peers_have_names() {
        assert!("qemu-7.2".parse::<PeerOption>().is_ok_and(|option| option.peer == Peer::Qemu));
        assert!("ramwire".parse::<PeerOption>().is_ok_and(|option| option.peer == Peer::Ramwire));
        assert!("xen".parse::<PeerOption>().is_err());
    }
}
