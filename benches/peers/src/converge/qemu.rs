//! The same between two QEMUs: an emulated Linux guest whose only process writes pages in turn at a set rate and checks
//! them (ci/guest/init.c), migrated over the same link under QEMU's own limit.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ramwire::units::Rate;
use serde_json::{Value, json};

use super::cell::{Point, Run};
use super::{BenchError, ConvergeArgs, Means, SlowLink};
use crate::qemu::{Qemu, Running, Way, free_port};
use crate::qmp::Monitor;

/// Memory of the guest in addition to the written part: that of its kernel.
const BESIDE: u64 = 128 << 20;
/// How long a guest may take to boot, and to check all its memory on arrival.
const GUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// Time between two looks.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How long the guest writes before it is migrated: this rate is the reference for its slowdown.
const WRITES: Duration = Duration::from_secs(2);

/// The QEMUs to start, and the files that their guest boots from.
pub(super) struct Pair {
    program: PathBuf,
    kernel: PathBuf,
    disk: PathBuf,
}

/// The last line of a guest's console.
#[derive(Clone, Copy, Default)]
struct Tick {
    /// Writes so far, and how often all memory was checked.
    writes: u64,
    passes: u64,
    wrong: bool,
}

/// One QEMU that runs.
struct Side {
    monitor: Monitor,
    console: PathBuf,
    _running: Running,
}

fn failed(doing: &'static str) -> impl Fn(io::Error) -> BenchError {
    move |source| BenchError::Io { who: "QEMU 10.0".into(), doing, source }
}

impl Pair {
    pub(super) fn new(args: &ConvergeArgs) -> Result<Self, BenchError> {
        let found = Qemu::find("QEMU 10.0", "10.0", args.qemu100.as_deref(), Way::Stream { channels: 0 })?;
        let program = found.program().to_owned();
        match args.qemu_guest.as_slice() {
            [kernel, disk] => Ok(Self { program, kernel: kernel.clone(), disk: disk.clone() }),
            _ => Err(BenchError::Missing {
                program: "QEMU's guest".into(),
                remedy: "give --qemu-guest $(ci/linux-guest writer)".into(),
            }),
        }
    }

    pub(super) fn run(&self, args: &ConvergeArgs, rate: f64, means: Means) -> Result<Run, BenchError> {
        let folder = Folder::new().map_err(failed("making a folder"))?;
        let mut source = self.start(args, rate, means, &folder.0, "source")?;
        if let Some(refused) = help(args, means, &mut source.monitor)? {
            return Ok(Run { refused: Some(refused), said_so: true, ..Run::default() });
        }
        let mut target = self.start(args, rate, means, &folder.0, "destination")?;
        source.wait("booting", |tick| tick.passes >= 1)?;
        let (first, began) = (source.tick(), Instant::now());
        std::thread::sleep(WRITES);
        let port = free_port().map_err(failed("choosing a port"))?;
        let far = ([127, 0, 0, 1], port).into();
        target.monitor.call("migrate-incoming", json!({ "uri": format!("tcp:{far}") }))?;
        let link = SlowLink::to(far, Rate(args.bandwidth)).map_err(failed("making a link"))?;
        let before = source.tick();
        let wrote = before.writes.saturating_sub(first.writes) as f64;
        let unhindered = (wrote / began.elapsed().as_secs_f64()).max(1.0);
        source.monitor.call("migrate", json!({ "uri": format!("tcp:{}", link.address()) }))?;
        let mut run = follow(&mut source.monitor, Duration::from_secs(args.timeout(means).into()))?;
        let left = source.tick();
        let ran = (run.total_ms - run.downtime_ms).max(1.0) / 1e3;
        run.speed = left.writes.saturating_sub(before.writes) as f64 / ran / unhindered;
        run.reached = Some(unhindered * 4096.0 / args.bandwidth as f64);
        // Wherever it runs now, it checks all its memory once more.
        let here = if run.converged { &target } else { &source };
        let last = here.wait("checking its memory", |tick| tick.passes >= left.passes + 2)?;
        run.verified = !last.wrong && last.writes > left.writes;
        Ok(run)
    }

    fn start(
        &self,
        args: &ConvergeArgs,
        rate: f64,
        means: Means,
        folder: &Path,
        side: &str,
    ) -> Result<Side, BenchError> {
        let file = |end: &str| folder.join(format!("{side}.{end}"));
        let (socket, console) = (file("qmp"), file("console"));
        let log = File::create(file("log")).map_err(failed("starting"))?;
        let options = format!(
            "console=ttyS0 quiet panic=-1 nokaslr mitigations=off random.trust_cpu=on no_timer_check WRITER_MIB={} WRITER_RATE={} WRITER_IN_TURN=1 WRITER_SMALL={}",
            args.working_set >> 20,
            args.written(rate) / 4096,
            u8::from(means == Means::Xbzrle),
        );
        let mut command = Command::new(&self.program);
        command.args([
            "-accel",
            "tcg",
            "-machine",
            "q35",
            "-cpu",
            "qemu64",
            "-nodefaults",
            "-no-user-config",
        ]);
        command.args(["-display", "none", "-no-reboot", "-m"]);
        command.arg(format!("{}M", (args.working_set + BESIDE) >> 20));
        command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.disk).args(["-append", &options]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        if side == "destination" {
            command.args(["-incoming", "defer"]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut running = Running(command.spawn().map_err(failed("starting"))?);
        let monitor = Monitor::open(&socket, &format!("QEMU 10.0 ({side})"), || {
            matches!(running.0.try_wait(), Ok(None))
        })?;
        Ok(Side { monitor, console, _running: running })
    }
}

/// Configures the method for the guest; returns QEMU's error if it is not possible.
fn help(args: &ConvergeArgs, means: Means, monitor: &mut Monitor) -> Result<Option<String>, BenchError> {
    let limits = json!({ "max-bandwidth": args.bandwidth, "downtime-limit": args.downtime_ms });
    monitor.call("migrate-set-parameters", limits)?;
    let parameters = match means {
        Means::None => return Ok(None),
        Means::Xbzrle => json!({ "xbzrle-cache-size": args.cache() }),
        Means::AutoConverge => json!({}),
        Means::DirtyLimit => json!({ "vcpu-dirty-limit": args.quota() >> 20 }),
    };
    let on = json!([{ "capability": means.name(), "state": true }]);
    let set = monitor.call("migrate-set-parameters", parameters);
    match set.and_then(|_| monitor.call("migrate-set-capabilities", json!({ "capabilities": on }))) {
        Ok(_) => Ok(None),
        Err(BenchError::Refused { answer, .. }) => Ok(Some(answer)),
        Err(error) => Err(error),
    }
}

/// Polls the migration until it has ended, or cancels it after `limit`.
fn follow(monitor: &mut Monitor, limit: Duration) -> Result<Run, BenchError> {
    let began = Instant::now();
    let (mut remaining, mut throttle, mut rounds) = (Vec::<Point>::new(), 0, 0);
    loop {
        let state = monitor.call("query-migrate", json!({}))?;
        let status = state["status"].as_str().unwrap_or_default();
        throttle = throttle.max(state["cpu-throttle-percentage"].as_u64().unwrap_or(0));
        if let Some(left) = state["ram"]["remaining"].as_f64() {
            remaining.push((began.elapsed().as_secs_f64(), left / f64::from(1 << 20)));
        }
        rounds = rounds.max(state["ram"]["dirty-sync-count"].as_u64().unwrap_or(0));
        let number = |value: &Value| value.as_f64().unwrap_or(0.0);
        match status {
            "completed" | "cancelled" | "failed" => {
                return Ok(Run {
                    converged: status == "completed",
                    // QEMU has no time limit of its own: the caller ends it.
                    said_so: status == "cancelled",
                    total_ms: began.elapsed().as_secs_f64() * 1e3,
                    downtime_ms: number(&state["downtime"]),
                    rounds,
                    throttle_percent_most: throttle,
                    remaining,
                    ..Run::default()
                });
            }
            "active" if began.elapsed() >= limit => {
                monitor.call("migrate_cancel", json!({}))?;
            }
            _ => {}
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

impl Side {
    fn tick(&self) -> Tick {
        let text = std::fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        // tick N seq WRITES passes PASSES ok
        let parse = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [_, _, _, writes, _, passes, state, ..] = words[..] else { return None };
            let (writes, passes) = (writes.parse().ok()?, passes.parse().ok()?);
            Some(Tick { writes, passes, wrong: state != "ok" })
        };
        let mut ticks = text.lines().filter(|line| line.starts_with("tick ")).filter_map(parse);
        ticks.next_back().unwrap_or_default()
    }

    fn wait(&self, doing: &'static str, wanted: impl Fn(&Tick) -> bool) -> Result<Tick, BenchError> {
        let began = Instant::now();
        loop {
            let tick = self.tick();
            if wanted(&tick) {
                return Ok(tick);
            }
            if began.elapsed() > GUEST_TIMEOUT {
                return Err(failed(doing)(io::ErrorKind::TimedOut.into()));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

/// A folder for this run.
struct Folder(PathBuf);

impl Folder {
    fn new() -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("ramwire-converge-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}
