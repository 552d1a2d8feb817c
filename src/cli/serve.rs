//! `ramwire serve`: memory at rest for pagers on other hosts.

use std::fmt::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Unit;
use ramwire::error::Chain;
use ramwire::observe::SharedStatistics;
use ramwire::session::{CancelReply, Spawner};
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::{
    Address, AllowList, Listener, OpenError, PageServer, ServedPages, StreamChannel, StreamOptions,
};

use super::args::Exit;
use super::common::{Usage, failed, human_bytes};
use super::metrics::{MetricsArgs, Out, encoded};
use super::output::{Repeated, note};
use super::pager::Stored;
use super::qmp::{Plan, QmpArgs, Role, Subject};
use super::remedies::in_words;
use super::service;
use super::signals::cancel_on_signal;
use super::tls::DestinationTlsArgs;

/// Rest after an accept that failed, as where no descriptor is left.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Serves the memory of a snapshot to `ramwire pager --from` on other hosts: it is read there when a guest touches it
#[derive(Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    # Where the memory file of the snapshot lies
    ramwire serve --from vm.mem --listen tcp:10.0.0.7:4445 --allow 10.0.0.0/8

    # Where the guest is started from it
    ramwire pager --listen unix:/run/vm.uffd --from tcp:10.0.0.7:4445

    # The same, encrypted, for pagers that have a certificate of the same authority
    ramwire serve --from vm.mem --listen tcp:10.0.0.7:4445 --tls-dir /etc/ramwire/tls
    ramwire pager --listen unix:/run/vm.uffd --from tcp:10.0.0.7:4445 --tls-dir /etc/ramwire/tls

Whoever may connect reads all of it; nothing can be written. Without --tls-dir memory travels unencrypted.")]
pub(super) struct Args {
    /// The memory: a file that holds nothing else (Firecracker's mem_file), or mapped:PATH. It must not change while it
    /// is served
    #[arg(long, value_name = "FILE|mapped:PATH")]
    from: Stored,
    /// Where pagers connect: tcp:HOST:PORT, unix:PATH, or fd:N of a socket that listens
    #[arg(long, value_name = "URI")]
    listen: Address,
    /// Who may connect: addresses or networks, separated by commas; repeat for more. Without it every host that can
    /// reach the address may
    #[arg(long, value_name = "ADDRESS[/BITS]")]
    allow: Vec<AllowList>,
    /// Maximum number of clients that are served at a time; further ones are disconnected
    #[arg(long, value_name = "N", default_value = "64", value_parser = clap::value_parser!(u16).range(1..=4096))]
    max_clients: u16,
    #[command(flatten)]
    metrics: MetricsArgs,
    #[command(flatten)]
    qmp: QmpArgs,
    #[command(flatten)]
    tls: DestinationTlsArgs,
}

/// The clients so far.
#[derive(Debug, Default)]
struct Clients {
    now: AtomicU64,
    served: AtomicU64,
    refused: AtomicU64,
}

/// A client that is being served.
struct Served(Arc<Clients>);

impl Served {
    fn begins(clients: &Arc<Clients>) -> Self {
        clients.now.fetch_add(1, Ordering::Relaxed);
        clients.served.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(clients))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The figures as they are at one time.
#[derive(Clone, Copy, Debug)]
struct Figures {
    now: u64,
    served: u64,
    refused: u64,
    pages: ServedPages,
}

impl Figures {
    fn of(clients: &Clients, server: &PageServer) -> Self {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Self {
            now: read(&clients.now),
            served: read(&clients.served),
            refused: read(&clients.refused),
            pages: server.served(),
        }
    }
}

impl Collector for Figures {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut out = Out::new(encoder);
        out.gauge("serve_clients", "Pagers that are connected", None, self.now as f64)?;
        let clients = [("served", self.served), ("refused", self.refused)];
        out.counters("serve_connections", "Pagers that connected, by what became of them", "how", &clients)?;
        out.counter("serve_reads", "Reads of memory that were answered", None, self.pages.reads)?;
        let (read, bytes) = ("Memory in their answers", Some(Unit::Bytes));
        out.counter("serve_read", read, bytes, self.pages.bytes)?;
        out.counter("serve_failed_reads", "Reads that failed here", None, self.pages.failed)
    }
}

pub(super) fn run(args: &Args) -> Exit {
    match serve(args) {
        Ok(()) => Exit::Done,
        Err(error) => failed("serve", &*error),
    }
}

impl Args {
    /// Refuses addresses at which no pager connects.
    pub(super) fn check(&self) -> Result<(), Usage> {
        if ["tcp", "unix", "fd"].contains(&self.listen.scheme()) {
            return Ok(());
        }
        Err(Usage(format!("--listen {}: pagers connect by tcp:HOST:PORT or unix:PATH", self.listen)))
    }
}

/// False for an error with which every further accept would end too.
fn may_pass(error: &OpenError) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let number = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
        if matches!(number, Some(libc::EBADF | libc::EINVAL | libc::ENOTSOCK | libc::EOPNOTSUPP)) {
            return false;
        }
        cause = error.source();
    }
    !matches!(error, OpenError::OnlyOne { .. } | OpenError::NotAStream { .. })
}

fn serve(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    let listen = args.tls.at(&args.listen)?;
    let memory = Arc::new(args.from.open()?);
    let cancel = CancelToken::default();
    let stop = Stop::on(&cancel);
    let _signals = cancel_on_signal(vec![cancel.clone()]);
    let mut allow = AllowList::default();
    args.allow.iter().cloned().for_each(|list| allow.extend(list));
    let mut listener = Listener::bind(&listen, allow, &stop)?;
    // A socket that listens has an address of its own.
    if listener.address().scheme() == "fd" {
        return Err(Usage(format!("--listen {}: hand over a socket that listens", args.listen)).into());
    }
    listener.on_stranger(|why| note!("ramwire serve: {why}"));
    if let Some(warning) = listener.warning() {
        note!("ramwire serve: {warning} (--allow) or encrypt it (--tls-dir DIR)");
    }
    let told = format!("{} of memory", human_bytes(memory.len()));
    note!("ramwire serve: {told} from {}", memory.name());
    let (server, spawner, clients) = (PageServer::new(memory), Spawner::default(), Arc::<Clients>::default());
    let (of, by) = (Arc::clone(&clients), server.clone());
    let figures = Box::new(move || encoded(Box::new(Figures::of(&of, &by))));
    let _metrics = args.metrics.serve_text("serve", figures)?;
    let quits = cancel.clone();
    let ends = move || {
        quits.cancel();
        CancelReply::Accepted
    };
    let subject = Subject::new(Role::Server, SharedStatistics::default(), Plan::default(), ends);
    let _monitor = args.qmp.serve("serve", &Arc::new(subject))?;
    for address in listener.addresses() {
        note!("listening on {address}");
    }
    service::ready(&format!("{told} at {}", listener.address()));
    let mut failing = Repeated::default();
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    loop {
        let channel = match listener.accept(&StreamOptions::default(), &stop) {
            Ok(channel) => channel,
            Err(_) if cancel.is_cancelled() => break,
            Err(error) if !may_pass(&error) => return Err(error.into()),
            Err(error) => {
                failing.note(format!("ramwire serve: a client could not be accepted: {}", in_words(&error)));
                let _ = stop.sleep(RETRY_INTERVAL);
                continue;
            }
        };
        failing.passed();
        threads.retain(|thread| !thread.is_finished());
        let name = channel.peer().to_owned();
        if threads.len() >= usize::from(args.max_clients) {
            let most = args.max_clients;
            clients.refused.fetch_add(1, Ordering::Relaxed);
            note!(
                "ramwire serve: {name} was refused: {most} clients are served, the maximum (--max-clients)"
            );
            continue;
        }
        let (server, stop, served) = (server.clone(), stop.clone(), Served::begins(&clients));
        let job = move || {
            serve_one(&server, channel, &stop);
            drop(served);
        };
        match spawner.spawn("ramwire-serve", Box::new(job)) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                clients.refused.fetch_add(1, Ordering::Relaxed);
                note!("ramwire serve: {name} was refused: {}", Chain(&error));
            }
        }
    }
    for thread in threads {
        // A panic there was reported where it happened.
        let _ = thread.join();
    }
    Ok(())
}

fn serve_one(server: &PageServer, channel: StreamChannel, stop: &Stop) {
    let name = channel.peer().to_owned();
    note!("ramwire serve: {name} has connected");
    match server.serve(channel, stop) {
        Ok(served) => {
            let failed = match served.failed {
                0 => String::new(),
                failed => format!("; {failed} could not be read"),
            };
            note!(
                "ramwire serve: {name} has left: {} in {} reads{failed}",
                human_bytes(served.bytes),
                served.reads
            );
        }
        Err(_) if stop.reason().is_some() => note!("ramwire serve: {name} is no longer served"),
        Err(error) => note!("ramwire serve: {name} is no longer served: {}", Chain(&error)),
    }
}
