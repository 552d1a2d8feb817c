//! `ramwire pager`: the memory of other VMMs' guests, read from a snapshot when it is touched.

mod figures;
mod firecracker;
mod handoff;
mod listen;
mod vmm;

use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use ramwire::session::Spawner;
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::{Address, MappedDestination, RemoteMemory, StoredMemory, Target};

use super::args::Exit;
use super::common::{Usage, failed, human_bytes};
use super::metrics::MetricsArgs;
use super::output::note;
use super::service;
use super::signals::cancel_on_signal;
use super::tls::{SourceTlsArgs, warn_if_unencrypted};
use figures::Figures;
use firecracker::Firecracker;
use handoff::HandOff;
use listen::Listening;
use vmm::Vmm;

/// Serves the memory of Firecracker guests that are restored from a snapshot with a userfaultfd (`mem_backend` of type Uffd):
/// pages that a guest touches are read at once, the others in the background.
#[derive(Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    # Serve the memory file of a snapshot to all Firecracker processes of this user
    ramwire pager --listen unix:/run/vm.uffd --from vm.mem
    # then load it: PUT /snapshot/load with
    # \"mem_backend\": {\"backend_type\": \"Uffd\", \"backend_path\": \"/run/vm.uffd\"}

    # The same of a file of QEMU's mapped-ram format, whose RAM blocks follow one another
    ramwire pager --listen unix:/run/vm.uffd --from mapped:vm.save

    # The same of memory on another host, where `ramwire serve` runs
    ramwire pager --listen unix:/run/vm.uffd --from tcp:10.0.0.7:4445

A guest waits when it touches missing memory. If this process ends before all memory is read, it waits forever: restart
the VMM from its snapshot then.")]
pub(super) struct Args {
    /// Where VMMs connect: unix:PATH
    #[arg(long, value_name = "unix:PATH")]
    listen: Address,
    /// The memory: a file that holds nothing else (Firecracker's mem_file), mapped:PATH, or the address of a `ramwire
    /// serve`. It must not change while it is served
    #[arg(long, value_name = "FILE|mapped:PATH|tcp:HOST:PORT")]
    from: Stored,
    /// User ids whose VMMs may connect, in addition to root's and this process's own; repeat for more
    #[arg(long, value_name = "UID")]
    allow_uid: Vec<u32>,
    /// Maximum number of VMMs that are served at a time; further ones are refused
    #[arg(long, value_name = "N", default_value = "64", value_parser = clap::value_parser!(u16).range(1..=4096))]
    max_vmms: u16,
    #[command(flatten)]
    metrics: MetricsArgs,
    /// Of the connection to a `ramwire serve`
    #[command(flatten)]
    tls: SourceTlsArgs,
}

/// A memory to serve.
#[derive(Clone, Debug)]
pub(super) enum Stored {
    Plain(String),
    Mapped(Address),
    Remote(Address),
}

impl FromStr for Stored {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kind = match text.split_once(':') {
            Some(("mapped", _)) => Self::Mapped,
            Some(("tcp" | "unix", _)) => Self::Remote,
            _ => return Ok(Self::Plain(text.to_owned())),
        };
        text.parse().map(kind).map_err(|error: ramwire::transport::AddressError| error.to_string())
    }
}

impl Args {
    /// Refuses options that don't go together.
    pub(super) fn check(&self) -> Result<(), Usage> {
        if self.listen.scheme() != "unix" {
            return Err(Usage(format!(
                "--listen {}: VMMs connect to a UNIX socket; give unix:PATH",
                self.listen
            )));
        }
        if self.tls.is_given() && !matches!(self.from, Stored::Remote(_)) {
            return Err(Usage(
                "--tls-dir encrypts the connection to a `ramwire serve`: give its address with --from, or leave \
                 --tls-dir out"
                    .into(),
            ));
        }
        Ok(())
    }
}

impl Stored {
    /// The address of another host's memory with the configured TLS settings.
    fn secured(&self, tls: &SourceTlsArgs) -> Result<Self, Box<dyn std::error::Error>> {
        Ok(match self {
            Self::Remote(address) => Self::Remote(tls.at(address)?),
            here => here.clone(),
        })
    }

    pub(super) fn open(&self) -> Result<StoredMemory, Box<dyn std::error::Error>> {
        match self {
            Self::Mapped(address) => Ok(StoredMemory::mapped(&MappedDestination::open(address)?)),
            Self::Remote(address) => {
                Ok(StoredMemory::remote(RemoteMemory::connect(address, Spawner::default().callback())?))
            }
            Self::Plain(path) => Ok(StoredMemory::plain(Path::new(path))
                .map_err(|error| format!("{path}: {error}; give the memory file of a snapshot"))?),
        }
    }
}

/// The figures of a pager that has served nobody.
#[cfg(test)]
pub(super) fn figures_at_first() -> String {
    Figures::default().text().unwrap_or_default()
}

pub(super) fn run(args: &Args) -> Exit {
    match serve(args) {
        Ok(()) => Exit::Done,
        Err(error) => failed("pager", &*error),
    }
}

fn serve(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    let Target::Path(path) = args.listen.target() else {
        return Err(format!("--listen {}: VMMs connect to a UNIX socket; give unix:PATH", args.listen).into());
    };
    let from = args.from.secured(&args.tls)?;
    if let Stored::Remote(address) = &from {
        warn_if_unencrypted("pager", address, "encrypt it (--tls-dir DIR)");
    }
    let memory = Arc::new(from.open()?);
    let listening = Listening::at(path, &args.allow_uid)?;
    let cancel = CancelToken::default();
    let _signals = cancel_on_signal(vec![cancel.clone()]);
    note!("ramwire pager: {} of memory from {}", human_bytes(memory.len()), memory.name());
    let (stop, spawner, figures) = (Stop::on(&cancel), Spawner::default(), Arc::new(Figures::default()));
    let asked = Arc::clone(&figures);
    let _metrics = args.metrics.serve_text("pager", Box::new(move || asked.text()))?;
    note!("listening on {}", args.listen);
    service::ready(&format!("{} of memory at {}", human_bytes(memory.len()), args.listen));
    let mut threads = Vec::new();
    while let Some(stranger) = listening.next(&stop)? {
        threads.retain(|thread: &std::thread::JoinHandle<()>| !thread.is_finished());
        let name = stranger.name.clone();
        if threads.len() >= usize::from(args.max_vmms) {
            figures.refused();
            note!(
                "ramwire pager: {name} was refused: {} VMMs are served, the maximum (--max-vmms)",
                args.max_vmms
            );
            continue;
        }
        let vmm = Vmm {
            stranger,
            memory: Arc::clone(&memory),
            spawner: spawner.clone(),
            figures: Arc::clone(&figures),
            stop: stop.clone(),
        };
        let protocol: &'static dyn HandOff = &Firecracker;
        match spawner.spawn("ramwire-vmm", Box::new(move || vmm.serve(protocol))) {
            Ok(thread) => threads.push(thread),
            Err(error) => {
                figures.refused();
                note!("ramwire pager: {name} was refused: {error}");
            }
        }
    }
    let left = threads.iter().filter(|thread| !thread.is_finished()).count();
    if left > 0 {
        note!("ramwire pager: {left} VMMs are no longer served; their guests wait where memory is missing");
    }
    for thread in threads {
        // A panic there was reported where it happened.
        let _ = thread.join();
    }
    Ok(())
}
