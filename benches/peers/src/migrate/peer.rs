//! The other process of a run: another process of this program, which reports on its standard output.
//!
//! It maps its memory, listens, prints `ready ADDRESS`, serves one connection and prints its cost as a JSON line. Its
//! processor time counts from ready on, so that starting and populating are left out.

use std::io;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ramwire::sys::{Mapping, RecvPart, Stop};
use ramwire::transport::{Address, AllowList, ByteSource, Listener, StreamChannel, StreamOptions, Tls};

use super::bed::{self, Bed, Memory};
use super::cost::Cost;
use super::floors::{self, Floor, Pattern};
use super::own::{self, Way};
use crate::BenchError;
use crate::output::result_line;

/// Longest time until a run prints something: enough to populate and move far more memory than a machine has.
const RUN_TIMEOUT: Duration = Duration::from_secs(600);

/// What the other process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// Receives a bare loop's big buffers.
    FloorDirect,
    /// Receives a bare loop's headers and pages.
    FloorStream,
    /// Receives a bare loop's packets.
    FloorPacket,
    /// Receives a migration.
    Ramwire,
}

/// Arguments of the other process.
#[derive(Clone, Debug, clap::Args)]
pub struct PeerArgs {
    /// What to do.
    role: Role,
    /// File of the memory.
    #[arg(long)]
    ram: PathBuf,
    /// Its length.
    #[arg(long)]
    bytes: u64,
    /// Map every page before saying ready.
    #[arg(long)]
    populated: bool,
    /// What the memory is.
    #[arg(long, value_enum, default_value_t = Memory::Shared)]
    memory: Memory,
    /// Leave what has arrived in the file, if it is not there already.
    #[arg(long)]
    copy_back: bool,
    /// How the migration goes.
    #[command(flatten)]
    way: Way,
    /// Take encrypted connections, with the certificates of this folder.
    #[arg(long)]
    tls_dir: Option<PathBuf>,
    /// Receive buffer of a bare loop.
    #[arg(long, default_value_t = 256 << 10)]
    buffer: usize,
    /// Take a migration over RDMA, at this address of a device.
    #[arg(long)]
    rdma: Option<String>,
}

/// Runs the other process's side to its end.
///
/// # Errors
/// [`BenchError`].
pub fn serve(args: &PeerArgs) -> Result<(), BenchError> {
    let mut mapping = args.memory.map(&args.ram, args.bytes, args.populated)?;
    let floor = |pattern| Floor { pattern, buffer: args.buffer };
    let before = match args.role {
        Role::FloorDirect => serve_loop(floor(Pattern::Direct), &mut mapping)?,
        Role::FloorStream => serve_loop(floor(Pattern::Stream), &mut mapping)?,
        Role::FloorPacket => serve_loop(floor(Pattern::Packet), &mut mapping)?,
        Role::Ramwire => serve_migration(&mapping, args)?,
    };
    let cost = cost()?.since(before);
    if args.copy_back {
        let address = mapping.region().address() as u64;
        bed::copy_back(std::process::id(), address, args.bytes, &args.ram)?;
    }
    result_line!("{}", serde_json::to_string(&cost).map_err(|error| failed("reporting")(error.into()))?);
    Ok(())
}

fn cost() -> Result<Cost, BenchError> {
    Cost::own().map_err(failed("counting its cost"))
}

/// Serves a bare loop; returns this process's cost when it was ready.
fn serve_loop(floor: Floor, mapping: &mut Mapping) -> Result<Cost, BenchError> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(failed("listening"))?;
    let port = listener.local_addr().map_err(failed("listening"))?.port();
    result_line!("ready tcp:127.0.0.1:{port}");
    let before = cost()?;
    let (socket, _) = listener.accept().map_err(failed("accepting"))?;
    floors::receive(floor, socket, mapping)?;
    Ok(before)
}

fn serve_migration(mapping: &Mapping, args: &PeerArgs) -> Result<Cost, BenchError> {
    let address = match (&args.rdma, args.way.unix) {
        (Some(host), _) => Address::rdma(host, 0),
        (None, true) => Address::unix(args.ram.with_extension("socket")),
        (None, false) => Address::tcp("127.0.0.1", 0),
    };
    let address = match &args.tls_dir {
        Some(folder) => {
            let tls = Tls::of_destination(&own::certificates(folder)).map_err(own::no_tls)?;
            address.with_tls(tls)
        }
        None => address,
    };
    let mut listener = Listener::bind(&address, AllowList::default(), &Stop::never())?;
    result_line!("ready {}", listener.address());
    let before = cost()?;
    own::receive(&mut listener, mapping, args.way)?;
    Ok(before)
}

fn failed(doing: &'static str) -> impl Fn(io::Error) -> BenchError {
    move |source| BenchError::Io { who: "the other process".into(), doing, source }
}

/// The other process, as seen from this one; killed if it was not awaited.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    words: StreamChannel,
    /// Where it listens.
    pub address: Address,
}

impl Peer {
    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn start(role: Role, bed: &Bed, way: Way, buffer: Option<usize>) -> Result<Self, BenchError> {
        let mut more = vec![format!("--channels={}", way.channels)];
        more.extend(way.unix.then(|| "--unix".to_owned()));
        if let (Role::Ramwire, Some(folder)) = (role, bed.tls()) {
            more.push(format!("--tls-dir={}", folder.display()));
        }
        more.extend(buffer.map(|buffer| format!("--buffer={buffer}")));
        Self::start_with(role, bed, &more)
    }

    /// Starts one that receives a migration over RDMA, at the address `host` of a device.
    ///
    /// # Errors
    /// [`BenchError`].
    #[cfg(feature = "rdma")]
    pub fn start_rdma(bed: &Bed, host: &str) -> Result<Self, BenchError> {
        Self::start_with(Role::Ramwire, bed, &[format!("--rdma={host}")])
    }

    fn start_with(role: Role, bed: &Bed, more: &[String]) -> Result<Self, BenchError> {
        let role = clap::ValueEnum::to_possible_value(&role).map(|value| value.get_name().to_owned());
        let program = std::env::current_exe().map_err(failed("starting"))?;
        let mut command = Command::new(program);
        command.args(["peer"]).args(role).arg("--ram").arg(bed.destination());
        command.args(["--bytes", &bed.bytes().to_string()]).args(more);
        command.args(bed.populated().mapped(true).then_some("--populated"));
        command.args(["--memory", &super::name_of(&bed.memory())]);
        command.args(bed.copies_back().then_some("--copy-back"));
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut child = child.map_err(failed("starting"))?;
        let Some(stdout) = child.stdout.take() else {
            return Err(failed("starting")(io::Error::other("it has no standard output")));
        };
        let mut options = StreamOptions::default();
        options.stall = Some(RUN_TIMEOUT);
        let words = StreamChannel::from_fd(stdout.into(), "the other process", &options);
        let address = Address::tcp("", 0);
        let mut peer = Self { child, words: words.map_err(failed("starting"))?, address };
        let line = peer.line()?;
        let address = line.strip_prefix("ready ").and_then(|address| address.parse().ok());
        peer.address =
            address.ok_or_else(|| failed("starting")(io::Error::other(format!("it said `{line}`"))))?;
        Ok(peer)
    }

    /// Its process id.
    #[cfg(feature = "rdma")]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end and reads its cost.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn finish(mut self) -> Result<Cost, BenchError> {
        let line = self.line()?;
        let status = self.child.wait().map_err(failed("waiting"))?;
        if !status.success() {
            return Err(failed("waiting")(io::Error::other(status.to_string())));
        }
        serde_json::from_str(&line).map_err(|error| failed("reporting")(error.into()))
    }

    fn line(&mut self) -> Result<String, BenchError> {
        let stop = Stop::never();
        let mut line = Vec::new();
        loop {
            let mut byte = [0];
            if self.words.recv(&mut [RecvPart::Own(&mut byte)], &stop)? == 0 {
                return Err(failed("waiting for its report")(io::Error::other(
                    "it ended; see what it printed above",
                )));
            }
            match byte[0] {
                b'\n' => return Ok(String::from_utf8_lossy(&line).into_owned()),
                byte => line.push(byte),
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Both calls fail for a process that was already reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
