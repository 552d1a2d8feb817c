//! `ramwire serve`: memory at rest for pagers on other hosts.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use ramwire::error::Chain;
use ramwire::session::Spawner;
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::{Address, AllowList, Listener, PageServer, StreamChannel, StreamOptions};

use super::args::Exit;
use super::common::{failed, human_bytes};
use super::output::note;
use super::pager::Stored;
use super::signals::cancel_on_signal;

/// Rest after an accept that failed, as where no descriptor is left.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Serves the memory of a snapshot to `ramwire pager --from` on other hosts: it is read there when a guest touches it
#[derive(Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    # Where the memory file of the snapshot lies
    ramwire serve --from vm.mem --listen tcp:10.0.0.7:4445 --allow 10.0.0.0/8

    # Where the guest is started from it
    ramwire pager --listen unix:/run/vm.uffd --from tcp:10.0.0.7:4445

Memory travels unencrypted. Whoever may connect reads all of it; nothing can be written.")]
pub(super) struct Args {
    /// The memory: a file of nothing else (Firecracker's mem_file), or mapped:PATH. It must not change meanwhile
    #[arg(long, value_name = "FILE|mapped:PATH")]
    from: Stored,
    /// Where pagers connect: tcp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "URI")]
    listen: Address,
    /// Who may connect: addresses or networks, separated by commas; repeat for more. Without it everybody who reaches it may
    #[arg(long, value_name = "ADDRESS[/BITS]")]
    allow: Vec<AllowList>,
    /// Most clients that are served at a time; another one is hung up on
    #[arg(long, value_name = "N", default_value = "64", value_parser = clap::value_parser!(u16).range(1..=4096))]
    max_clients: u16,
}

pub(super) fn run(args: &Args) -> Exit {
    match serve(args) {
        Ok(()) => Exit::Done,
        Err(error) => failed("serve", &*error),
    }
}

fn serve(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    if !["tcp", "unix"].contains(&args.listen.scheme()) {
        return Err(format!("--listen {}: pagers connect by tcp:HOST:PORT or unix:PATH", args.listen).into());
    }
    let memory = Arc::new(args.from.open()?);
    let cancel = CancelToken::default();
    let stop = Stop::on(&cancel);
    let _signals = cancel_on_signal(vec![cancel.clone()]);
    let mut allow = AllowList::default();
    args.allow.iter().cloned().for_each(|list| allow.extend(list));
    let mut listener = Listener::bind(&args.listen, allow, &stop)?;
    if let Some(warning) = listener.warning() {
        note!("ramwire serve: {warning} (--allow)");
    }
    note!("ramwire serve: {} of memory from {}", human_bytes(memory.len()), memory.name());
    for address in listener.addresses() {
        note!("listening on {address}");
    }
    let (server, spawner) = (PageServer::new(memory), Spawner::default());
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    loop {
        let channel = match listener.accept(&StreamOptions::default(), &stop) {
            Ok(channel) => channel,
            Err(_) if cancel.is_cancelled() => break,
            Err(error) => {
                note!("ramwire serve: a client could not be taken: {}", Chain(&error));
                let _ = stop.sleep(RETRY_INTERVAL);
                continue;
            }
        };
        threads.retain(|thread| !thread.is_finished());
        let name = channel.peer().to_owned();
        if threads.len() >= usize::from(args.max_clients) {
            let most = args.max_clients;
            note!(
                "ramwire serve: {name} was refused: {most} clients are served, which is the most (--max-clients)"
            );
            continue;
        }
        let (server, stop) = (server.clone(), stop.clone());
        match spawner.spawn("ramwire-serve", Box::new(move || serve_one(&server, channel, &stop))) {
            Ok(thread) => threads.push(thread),
            Err(error) => note!("ramwire serve: {name} was refused: {}", Chain(&error)),
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
        Err(_) if stop.reason().is_some() => note!("ramwire serve: {name} is served no more"),
        Err(error) => note!("ramwire serve: {name} is served no more: {}", Chain(&error)),
    }
}
