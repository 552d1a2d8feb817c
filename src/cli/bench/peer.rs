//! The other process of a run: this program once more, told over its standard output.
//!
//! It maps its memory, listens, says `ready PORT`, serves one connection and says what it cost as a JSON
//! line. Its processor time counts from ready on, so that starting and populating are left out.

use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ramwire::sys::{CancelToken, Mapping, RecvPart, Stop};
use ramwire::transport::{Address, AllowList, ByteSource, Listener, StreamChannel, StreamOptions};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::floors::{self, Pattern};
use super::{BenchError, bed, own};

/// Longest time a run may take to say anything: populating and moving far more memory than a machine has.
const PATIENCE: Duration = Duration::from_secs(600);

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
    /// Page channels of a migration.
    #[arg(long, default_value = "0")]
    channels: u8,
}

/// What a run cost the other process.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct PeerCost {
    /// Processor time in seconds, all threads.
    pub cpu_seconds: f64,
}

/// Runs the other process's side to its end.
///
/// # Errors
/// [`BenchError`].
pub fn serve(args: &PeerArgs) -> Result<(), BenchError> {
    let mapping = bed::map(&args.ram, args.bytes, args.populated)?;
    let before = match args.role {
        Role::FloorDirect => serve_loop(Pattern::Direct, &mapping)?,
        Role::FloorStream => serve_loop(Pattern::Stream, &mapping)?,
        Role::FloorPacket => serve_loop(Pattern::Packet, &mapping)?,
        Role::Ramwire => serve_migration(&mapping, args.channels)?,
    };
    let cost = PeerCost { cpu_seconds: own_cpu_seconds() - before };
    println!("{}", serde_json::to_string(&cost).map_err(|error| failed("reporting")(error.into()))?);
    Ok(())
}

/// Serves a bare loop; the processor time when it was ready.
fn serve_loop(pattern: Pattern, mapping: &Mapping) -> Result<f64, BenchError> {
    let listener = TcpListener::bind("127.0.0.1:0").map_err(failed("listening"))?;
    let port = listener.local_addr().map_err(failed("listening"))?.port();
    println!("ready {port}");
    let before = own_cpu_seconds();
    let (socket, _) = listener.accept().map_err(failed("accepting"))?;
    floors::receive(pattern, socket, mapping)?;
    Ok(before)
}

fn serve_migration(mapping: &Mapping, channels: u8) -> Result<f64, BenchError> {
    let address = Address::Tcp { host: "127.0.0.1".into(), port: 0 };
    let mut listener = Listener::bind(&address, AllowList::default(), &Stop::on(&CancelToken::default()))?;
    if let Address::Tcp { port, .. } = listener.address() {
        println!("ready {port}");
    }
    let before = own_cpu_seconds();
    own::receive(&mut listener, mapping, channels)?;
    Ok(before)
}

fn failed(doing: &'static str) -> impl Fn(io::Error) -> BenchError {
    move |source| BenchError::Io { who: "the other process".into(), doing, source }
}

/// Processor time of this process so far, in seconds, all threads.
pub fn own_cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The other process, seen from this one; killed if it was not waited for.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    words: StreamChannel,
    /// Where it listens on loopback.
    pub port: u16,
}

impl Peer {
    /// Starts it and waits until it is ready.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn start(
        role: Role,
        ram: &Path,
        bytes: u64,
        populated: bool,
        channels: u8,
    ) -> Result<Self, BenchError> {
        let role = clap::ValueEnum::to_possible_value(&role).map(|value| value.get_name().to_owned());
        let program = std::env::current_exe().map_err(failed("starting"))?;
        let mut command = Command::new(program);
        command.args(["bench", "peer"]).args(role).arg("--ram").arg(ram);
        command.args(["--bytes", &bytes.to_string()]).args(populated.then_some("--populated"));
        command.args(["--channels", &channels.to_string()]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut child = child.map_err(failed("starting"))?;
        let Some(stdout) = child.stdout.take() else {
            return Err(failed("starting")(io::Error::other("it has no standard output")));
        };
        let options = StreamOptions { stall: Some(PATIENCE), ..StreamOptions::default() };
        let words = StreamChannel::from_fd(stdout.into(), "the other process", &options);
        let mut peer = Self { child, words: words.map_err(failed("starting"))?, port: 0 };
        let line = peer.line()?;
        let port = line.strip_prefix("ready ").and_then(|port| port.parse().ok());
        peer.port = port.ok_or_else(|| failed("starting")(io::Error::other(format!("it said `{line}`"))))?;
        Ok(peer)
    }

    /// Waits for its end and hears what it cost.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn finish(mut self) -> Result<PeerCost, BenchError> {
        let line = self.line()?;
        let status = self.child.wait().map_err(failed("waiting"))?;
        if !status.success() {
            return Err(failed("waiting")(io::Error::other(status.to_string())));
        }
        serde_json::from_str(&line).map_err(|error| failed("reporting")(error.into()))
    }

    fn line(&mut self) -> Result<String, BenchError> {
        let stop = Stop::on(&CancelToken::default());
        let mut line = Vec::new();
        loop {
            let mut byte = [0];
            if self.words.recv(&mut [RecvPart::Own(&mut byte)], &stop)? == 0 {
                return Err(failed("hearing")(io::Error::other("it ended; see what it printed above")));
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
        // Both fail for a process that was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
