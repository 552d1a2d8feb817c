//! A QEMU as a contestant: two of them with the bed's files as their RAM, the source stopped before its
//! first instruction.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::migrate::bed::{self, Bed, Memory};
use crate::migrate::cost::Cost;
use crate::migrate::watch::{Unwatched, Watcher};
use crate::qmp::Monitor;
use crate::{BenchError, migrate::Run};

/// Longest wait for a migration.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(600);
/// Bytes a second, higher than any real limit.
const NO_LIMIT: u64 = 1 << 40;

/// A QEMU program and how it migrates.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// Name in the report.
    pub name: String,
    program: PathBuf,
    way: Way,
}

/// How a QEMU's pages travel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// TCP over loopback.
    Stream {
        /// Page channels; 0 for the plain stream.
        channels: u8,
    },
    /// RDMA.
    #[cfg_attr(not(feature = "rdma"), allow(dead_code, reason = "built without RDMA"))]
    Rdma {
        /// An address of the device.
        host: String,
        /// Register all of RAM ahead.
        pin_all: bool,
    },
}

impl Qemu {
    /// Finds the program of `version` (`7.2`, `10.0`): the given one, otherwise the launcher that `ci/setup` writes,
    /// otherwise one on the PATH that reports that version.
    ///
    /// # Errors
    /// [`BenchError::Missing`] with the remedy.
    pub fn find(name: &str, version: &str, given: Option<&Path>, way: Way) -> Result<Self, BenchError> {
        let launcher = PathBuf::from("target/peers").join(format!("qemu-{version}"));
        let on_path = PathBuf::from("qemu-system-x86_64");
        let candidates = match given {
            Some(given) => vec![given.to_owned()],
            None => vec![launcher, on_path],
        };
        let fits = |program: &PathBuf| version_of(program).is_some_and(|said| said.starts_with(version));
        match candidates.into_iter().find(fits) {
            Some(program) => Ok(Self { name: name.to_owned(), program, way }),
            None => Err(BenchError::Missing {
                program: format!("QEMU {version}"),
                remedy: format!(
                    "run ci/setup here, or name the program with --qemu{}",
                    version.replace('.', "")
                ),
            }),
        }
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Migrates the bed's memory from one QEMU to another.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn run(&self, bed: &Bed) -> Result<Run, BenchError> {
        self.run_watched(bed, &mut Unwatched)
    }

    /// As [`run`](Self::run), with an observer.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn run_watched(&self, bed: &Bed, watcher: &mut dyn Watcher) -> Result<Run, BenchError> {
        let mut target = self.start(bed, "destination", bed.populated().mapped(true))?;
        let mut source = self.start(bed, "source", bed.populated().mapped(false))?;
        for monitor in [&mut target.monitor, &mut source.monitor] {
            let mut parameters = json!({ "max-bandwidth": NO_LIMIT });
            if bed.tls().is_some() {
                parameters["tls-creds"] = "tls0".into();
            }
            let capability = match self.way {
                Way::Stream { channels: 0 } | Way::Rdma { pin_all: false, .. } => None,
                Way::Stream { channels } => {
                    parameters["multifd-channels"] = channels.into();
                    Some("multifd")
                }
                Way::Rdma { .. } => Some("rdma-pin-all"),
            };
            if let Some(capability) = capability {
                let on = json!([{ "capability": capability, "state": true }]);
                monitor.call("migrate-set-capabilities", json!({ "capabilities": on }))?;
            }
            monitor.call("migrate-set-parameters", parameters)?;
        }
        // A port that was free a moment ago; a QEMU does not report which one it chose for `tcp::0`.
        let port = free_port().map_err(self.failed("choosing a port"))?;
        let uri = match &self.way {
            Way::Stream { .. } => format!("tcp:127.0.0.1:{port}"),
            Way::Rdma { host, .. } => format!("rdma:{host}:{port}"),
        };
        target.monitor.call("migrate-incoming", json!({ "uri": uri }))?;
        let cost = |process: &Process| Cost::of_process(process.running.0.id());
        watcher.begin(source.running.0.id(), target.running.0.id())?;
        let before = [&source, &target].map(cost);
        source.monitor.call("migrate", json!({ "uri": uri }))?;
        source.monitor.await_migration(MIGRATION_TIMEOUT)?;
        target.monitor.await_migration(MIGRATION_TIMEOUT)?;
        let after = [&source, &target].map(cost);
        watcher.end()?;
        if bed.copies_back() {
            let pid = target.running.0.id();
            let address = private_memory(pid, bed.bytes()).map_err(self.failed("finding its memory"))?;
            bed::copy_back(pid, address, bed.bytes(), &bed.destination())?;
        }
        // QEMU 7.2 reports completion shortly before its figures are complete.
        let state = source.monitor.call("query-migrate", json!({}))?;
        let [near, far] = [0, 1].map(|at| Some(after[at]?.since(before[at]?)));
        let total_ms = state["total-time"].as_f64();
        let missing = || self.failed("reading its figures")(io::ErrorKind::InvalidData.into());
        Ok(Run {
            seconds: total_ms.ok_or_else(missing)? / 1e3,
            setup_seconds: state["setup-time"].as_f64().map(|ms| ms / 1e3),
            source: near,
            destination: far,
            downtime_ms: state["downtime"].as_f64(),
            ..Run::default()
        })
    }

    fn failed(&self, doing: &'static str) -> impl Fn(io::Error) -> BenchError {
        let who = self.name.clone();
        move |source| BenchError::Io { who: who.clone(), doing, source }
    }

    fn start(&self, bed: &Bed, side: &str, populated: bool) -> Result<Process, BenchError> {
        let ram = if side == "source" { bed.source() } else { bed.destination() };
        let socket = bed.folder().join(format!("{side}.qmp"));
        let _ = std::fs::remove_file(&socket);
        let log = File::create(bed.folder().join(format!("{side}.log"))).map_err(self.failed("starting"))?;
        let megabytes = bed.bytes() >> 20;
        let prealloc = if populated { "on" } else { "off" };
        let backend = match bed.memory() {
            Memory::Huge if side == "destination" => "memory-backend-ram".to_owned(),
            _ => format!("memory-backend-file,mem-path={},share=on", ram.display()),
        };
        let backend = format!("{backend},id=m0,size={megabytes}M,prealloc={prealloc}");
        let mut command = Command::new(&self.program);
        command.args(["-accel", "tcg", "-machine", "q35,memory-backend=m0", "-m", &format!("{megabytes}M")]);
        command.args(["-object", &backend, "-nodefaults", "-display", "none", "-S"]);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())]);
        if side == "destination" {
            command.args(["-incoming", "defer"]);
        }
        if let Some(folder) = bed.tls() {
            let endpoint = if side == "destination" { "server" } else { "client" };
            let object = format!("tls-creds-x509,id=tls0,dir={},endpoint={endpoint}", folder.display());
            command.args(["-object", &object]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut running = Running(command.spawn().map_err(self.failed("starting"))?);
        let who = format!("{} ({side})", self.name);
        let monitor = Monitor::open(&socket, &who, || matches!(running.0.try_wait(), Ok(None)));
        if monitor.is_err() {
            let log = std::fs::read_to_string(bed.folder().join(format!("{side}.log"))).unwrap_or_default();
            tracing::error!(%log, "{who} did not start");
        }
        Ok(Process { monitor: monitor?, running })
    }
}

/// Address of a mapping of `bytes` bytes without a backing file in process `pid` (proc_pid_maps(5)).
fn private_memory(pid: u32, bytes: u64) -> io::Result<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let found = maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let [start, end] = [start, end].map(|hex| u64::from_str_radix(hex, 16).unwrap_or_default());
        let inode = rest.split_whitespace().nth(3)?;
        (end.checked_sub(start) == Some(bytes) && inode == "0").then_some(start)
    });
    found.ok_or_else(|| io::Error::other(format!("no private mapping of {bytes} bytes")))
}

/// The version that a QEMU program reports, like `10.0.2`.
fn version_of(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Some(text.strip_prefix("QEMU emulator version ")?.split([' ', '\n']).next()?.to_owned())
}

/// A TCP port that is free now.
///
/// # Errors
/// The kernel's error.
pub fn free_port() -> io::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A running QEMU; killed when dropped.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Process {
    monitor: Monitor,
    running: Running,
}
