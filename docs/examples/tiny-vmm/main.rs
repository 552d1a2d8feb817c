//! A whole VMM around ramwire: a KVM guest that moves back and forth between two processes.
//!
//!     cargo run --release --example tiny-vmm -- --memory 256M --vcpus 2 --rate 50M --log ring --migrations 20
//!
//! The guest's vCPUs write pages at the given rate and check each before they write it again. The guest starts in this
//! process, moves to a second one that this one starts, returns, and so on. Wherever it arrives it continues, and then
//! its new process checks every page from outside, too. `vm/` is the VM; this file is what its VMM does to move it.
//!
//! With `--snapshot FILE` it stays: a snapshot of it is written while it runs, and another VM is made from that and
//! checked; with `--incremental` each holds what has changed since the one before. `--restore FILE` starts one from such a file, with `--lazy` before its memory is read.
//!
//! With `--postcopy` it continues there as soon as its vCPUs' registers have arrived, and a vCPU that touches a missing
//! page waits.
//!
//! With `--protect` a second process runs it and is killed, and it goes on here from its last whole checkpoint; with
//! `--lease` by itself.

mod files;
mod protect;
mod vm;

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use ramwire::guest::{GuestControl, MappedGuest};
use ramwire::ram::BlockName;
use ramwire::session::{
    Configuration, DestinationGuest, DestinationSession, DestinationSettings, Ending, MissingPages, Outcome,
    PostcopyRule, PostcopySettings, SourceGuest, SourceReport, SourceSession, SourceSettings, ThrottlePolicy,
    Verify,
};
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::{Address, AllowList, ConnectionOptions, Listener, open_source};
use ramwire::units::{PageSize, Rate};
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use vm::{Found, Log, Shape, TinyVm};

/// The second half of the RAM begins here: the guest has a hole in its memory, as a PC has.
const SECOND_HALF: u64 = 3 << 29;
/// How long an arrived guest runs before it is checked.
const RUNS: Duration = Duration::from_millis(50);

type Failure = Box<dyn Error + Send + Sync>;

/// Moves a small KVM guest back and forth between two processes.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// RAM of the guest, all of which it writes
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = bytes)]
    memory: u64,
    /// Its vCPUs
    #[arg(long, value_name = "N", default_value = "2")]
    vcpus: u32,
    /// Bytes a second that they write; 0 for as fast as they can
    #[arg(long, value_name = "SIZE", default_value = "50M", value_parser = bytes)]
    rate: u64,
    /// Bytes of a page that a write changes. A KVM that emulates this guest, as a nested one may, takes a microsecond for
    /// every four of them
    #[arg(long, value_name = "SIZE", default_value = "64", value_parser = bytes)]
    write_size: u64,
    /// How KVM tells what they wrote
    #[arg(long, default_value = "ring")]
    log: LogKind,
    /// How often it moves
    #[arg(long, value_name = "N", default_value = "20")]
    migrations: u32,
    /// Longest time it may stand still, in milliseconds
    #[arg(long, value_name = "MS", default_value = "300")]
    downtime_ms: u64,
    /// Most bytes a second while the guest runs; 0 for no limit
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = bytes)]
    max_bandwidth: u64,
    /// What slows the guest down while it writes too much
    #[arg(long, default_value = "nothing")]
    throttle: ThrottleMode,
    /// With --throttle dirty-limit: bytes a second that a vCPU may write
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = bytes)]
    vcpu_dirty_limit: u64,
    /// Switch to postcopy after so many rounds, unless what is left fits the downtime first
    #[arg(long, value_name = "ROUNDS", num_args = 0..=1, default_missing_value = "1")]
    postcopy: Option<u32>,
    /// Instead of moving it: as often, write the running guest to this file as it is at one moment, make another VM of the
    /// file, and look at that
    #[arg(long, value_name = "FILE", conflicts_with_all = ["postcopy", "throttle", "max_bandwidth", "downtime_ms"])]
    snapshot: Option<PathBuf>,
    /// With --snapshot: each in a file of its own, FILE.1 and so on, and behind the first only what has changed since the one
    /// before
    #[arg(long, requires = "snapshot")]
    incremental: bool,
    /// Start the guest from such a file; --memory and --log as they were
    #[arg(long, value_name = "FILE", conflicts_with_all = ["snapshot", "postcopy", "throttle", "max_bandwidth", "downtime_ms"])]
    restore: Option<PathBuf>,
    /// With --restore: let it run at once, and read its memory behind it
    #[arg(long, requires = "restore")]
    lazy: bool,
    /// Instead of moving it: as often, let a second process run it with this one as its standby, a checkpoint every so many
    /// milliseconds, kill that process and go on here
    #[arg(long, value_name = "MS", num_args = 0..=1, default_missing_value = "20", conflicts_with_all = ["snapshot", "restore", "postcopy", "throttle", "max_bandwidth", "downtime_ms"])]
    protect: Option<u64>,
    /// With --protect: of the second process a lease of so many milliseconds. It is killed or stopped, the guest goes on here by
    /// itself, and must not run there any more
    #[arg(long, value_name = "MS", requires = "protect")]
    lease: Option<u64>,
    /// The second process is this program with this option
    #[arg(long, hide = true)]
    second: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogKind {
    Log,
    Ring,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ThrottleMode {
    Nothing,
    AutoConverge,
    DirtyLimit,
}

fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(['K', 'M', 'G']);
    let shift = [("K", 10), ("M", 20), ("G", 30)].iter().find(|unit| unit.0 == &text[digits.len()..]);
    let number =
        digits.parse::<u64>().map_err(|_| format!("{text:?} is not a size; write 64K, 200M or 1G"))?;
    number.checked_mul(1 << shift.map_or(0, |unit| unit.1)).ok_or_else(|| format!("{text:?} is too much"))
}

/// Report of the process that handed the guest over.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Left {
    completed: bool,
    rounds: usize,
    bytes: u64,
    total_ms: f64,
    downtime_ms: f64,
    /// The largest share of all vCPUs' time that was taken, and how a vCPU rested at the end for the time it ran.
    throttle_percent: u8,
    rest_percent: u16,
    error: Option<String>,
}

/// Report of the process that took it.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Arrived {
    running: bool,
    pages: u64,
    wrong: u64,
    faults: Vec<String>,
    /// Pages that the guest checked itself and wrote before the check from outside.
    wrote: u64,
    postcopy: Option<Followed>,
    error: Option<String>,
}

/// How the guest ran while its pages followed.
#[derive(Debug, Serialize, Deserialize)]
struct Followed {
    /// Pages that it checked and wrote before the last one had come, or soon after.
    wrote: u64,
    faults: u64,
    /// From a vCPU's fault to the page in place.
    p50_us: u64,
    p99_us: u64,
    /// How long the vCPU that waited longest waited for pages, and how long all vCPUs did at once.
    blocked_ms: f64,
    all_blocked_ms: f64,
    /// From the last byte of the registers to the start of the vCPUs.
    start_ms: f64,
}

impl Followed {
    fn new(missing: &MissingPages, wrote: u64) -> Self {
        let (p50_us, p99_us) = (missing.latency.p50_us, missing.latency.p99_us);
        let start_ms = missing.time_to_run.as_secs_f64() * 1e3;
        let most = missing.waits.vcpus.iter().map(|vcpu| vcpu.blocked_ns).max().unwrap_or(0);
        let [blocked_ms, all_blocked_ms] =
            [most, missing.waits.all_blocked_ns].map(|nanos| nanos as f64 / 1e6);
        Self { wrote, faults: missing.faults, p50_us, p99_us, blocked_ms, all_blocked_ms, start_ms }
    }
}

impl std::fmt::Display for Followed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { wrote, faults, p50_us, p99_us, blocked_ms, all_blocked_ms, start_ms } = self;
        write!(
            f,
            ", started after {start_ms:.1} ms, {wrote} written while pages followed, {faults} faults "
        )?;
        write!(f, "(p50 {p50_us} us, p99 {p99_us} us), a vCPU blocked for {blocked_ms:.1} ms at most, ")?;
        write!(f, "all at once for {all_blocked_ms:.1} ms")
    }
}

impl Args {
    fn log(&self) -> Log {
        match self.log {
            LogKind::Log => Log::Bitmap,
            LogKind::Ring => Log::Ring,
        }
    }

    /// RAM as `vm-memory` maps it, and RAM blocks over it.
    fn memory(&self) -> Result<Arc<MappedGuest>, Failure> {
        let half = (self.memory / 2).next_multiple_of(4096) as usize;
        let ranges = [(GuestAddress(0), half), (GuestAddress(SECOND_HALF), half)];
        let memory = GuestMemoryMmap::<()>::from_ranges(&ranges)?;
        let name = |index| BlockName::new(&format!("ram{index}"));
        Ok(Arc::new(MappedGuest::of_vm_memory(&memory, PageSize::SIZE_4K, name)?))
    }

    fn shape(&self) -> Shape {
        let write_size = u32::try_from(self.write_size).unwrap_or(u32::MAX);
        let rate = (self.rate > 0).then_some(self.rate);
        Shape { vcpus: self.vcpus, working_set: self.memory, rate, write_size, zero: 0 }
    }
}

/// Sends the guest to the process that listens at `path`.
fn send(args: &Args, vm: TinyVm, path: &Path) -> Result<SourceReport, Failure> {
    let memory = vm.memory().clone();
    let options = ConnectionOptions::default();
    let stop = Stop::on(&CancelToken::default()).within(Duration::from_secs(10));
    let connection = open_source(&Address::unix(path), memory.clone(), &options, &stop)?;
    // The probe writes nothing: it finds out whether the kernel tracks this guest, and returns the reason if not.
    let dirty = vm.dirty_source()?;
    dirty.probe()?;
    let guest = SourceGuest { memory, dirty: vec![dirty], control: Box::new(vm) };
    let mut settings =
        SourceSettings::new(Configuration { machine: "tiny-vmm".into(), ..Configuration::default() });
    settings.downtime_limit = Duration::from_millis(args.downtime_ms);
    // Memory that arrives while the guest writes it has no digest.
    settings.verify = if args.postcopy.is_none() { Verify::Full } else { Verify::Off };
    settings.postcopy = args.postcopy.map(|rounds| {
        let mut postcopy = PostcopySettings::new(PostcopyRule::AfterRounds(rounds));
        postcopy.max_bandwidth = Rate::limit(args.max_bandwidth);
        postcopy
    });
    settings.same_host = true;
    settings.max_bandwidth = Rate::limit(args.max_bandwidth);
    settings.throttling = match args.throttle {
        ThrottleMode::Nothing => None,
        ThrottleMode::AutoConverge => Some(ThrottlePolicy::auto_converge()),
        ThrottleMode::DirtyLimit => Some(ThrottlePolicy::DirtyLimit { quota: Rate(args.vcpu_dirty_limit) }),
    };
    Ok(SourceSession::new(guest, connection, settings).run())
}

fn left(report: &SourceReport) -> Left {
    let figures = &report.statistics;
    Left {
        completed: report.outcome == Outcome::Completed,
        rounds: figures.rounds.len(),
        bytes: figures.transferred,
        total_ms: figures.total_time,
        downtime_ms: figures.downtime,
        throttle_percent: figures.rounds.iter().map(|round| round.throttle_percent).max().unwrap_or(0),
        rest_percent: figures.vcpu_rest_percentage,
        error: report.error.as_ref().map(ToString::to_string),
    }
}

/// Takes a guest that arrives through `listener` into fresh memory, lets it run and checks every page.
fn receive(args: &Args, mut listener: Listener) -> Result<(TinyVm, Arrived), Failure> {
    let memory = args.memory()?;
    let mut vm = TinyVm::empty(memory.clone(), args.log())?;
    let stop = Stop::on(&CancelToken::default()).within(Duration::from_secs(10));
    let connection = listener.accept_connection(&ConnectionOptions::default(), &stop)?;
    let control = Box::new(vm.clone());
    let mut settings = DestinationSettings::default();
    settings.postcopy = args.postcopy.is_some();
    settings.vcpu_threads = vm.vcpu_threads();
    let report =
        DestinationSession::new(DestinationGuest { memory: Box::new(memory), control }, connection, settings)
            .run();
    // After a switch the vCPUs have been running since `resume`, and no page is missing any more.
    let postcopy = report.missing_pages.as_ref().map(|missing| Followed::new(missing, vm.pages_written()));
    let mut arrived = Arrived {
        running: report.ending == Ending::Running,
        postcopy,
        error: report.error.as_ref().map(ToString::to_string),
        ..Arrived::default()
    };
    if arrived.running {
        std::thread::sleep(RUNS);
        vm.pause()?;
        let Found { pages, wrong, faults } = vm.verify()?;
        arrived = Arrived { pages, wrong, faults, wrote: vm.pages_written(), ..arrived };
        vm.resume()?;
    }
    Ok((vm, arrived))
}

fn listen(path: &Path) -> Result<Listener, Failure> {
    let stop = Stop::on(&CancelToken::default());
    Ok(Listener::bind(&Address::unix(path), AllowList::default(), &stop)?)
}

/// The second process: executes the lines on its standard input, and answers each in JSON.
fn second(args: &Args) -> Result<(), Failure> {
    let mut here = None;
    for line in std::io::stdin().lines() {
        let line = line?;
        let answer = match line.split_once(' ') {
            Some(("receive", path)) => {
                let listener = listen(Path::new(path))?;
                println!("listening");
                let (vm, arrived) = receive(args, listener)?;
                here = Some(vm);
                serde_json::to_string(&arrived)?
            }
            Some(("send", path)) => {
                let vm = here.take().ok_or("the guest is not here")?;
                serde_json::to_string(&left(&send(args, vm, Path::new(path))?))?
            }
            Some(("protect", path)) => return protect::source(args, Path::new(path)),
            _ => return Err(format!("{line:?} is no order").into()),
        };
        println!("{answer}");
    }
    Ok(())
}

/// The second process as this one sees it; dropping it ends it.
struct Second {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Second {
    fn start() -> Result<Self, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::env::args_os().skip(1)).arg("--second");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let answers = BufReader::new(child.stdout.take().ok_or("no output")?);
        Ok(Self { child, answers })
    }

    fn order(&mut self, what: &str, path: &Path) -> Result<(), Failure> {
        let mut orders = self.child.stdin.as_ref().ok_or("no input")?;
        Ok(writeln!(orders, "{what} {}", path.display())?)
    }

    fn answer(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        match self.answers.read_line(&mut line)? {
            0 => Err("the second process ended; its last output is above".into()),
            _ => Ok(line.trim_end().to_owned()),
        }
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A folder for the sockets.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self, Failure> {
        let path = std::env::temp_dir().join(format!("tiny-vmm-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

fn first(args: &Args) -> Result<(), Failure> {
    let mut vm = TinyVm::filled(args.memory()?, args.log(), args.shape())?;
    vm.resume()?;
    let mut here = Some(vm);
    let folder = Folder::new()?;
    let mut second = Second::start()?;
    let (began, mut worst) = (Instant::now(), 0f64);
    for number in 1..=args.migrations {
        let path = folder.0.join(format!("{number}.sock"));
        let (left, arrived): (Left, Arrived) = if let Some(vm) = here.take() {
            second.order("receive", &path)?;
            second.answer()?;
            let left = left(&send(args, vm, &path)?);
            (left, serde_json::from_str(&second.answer()?)?)
        } else {
            let listener = listen(&path)?;
            second.order("send", &path)?;
            let (vm, arrived) = receive(args, listener)?;
            here = Some(vm);
            (serde_json::from_str(&second.answer()?)?, arrived)
        };
        let throttled = match args.throttle {
            ThrottleMode::Nothing => String::new(),
            ThrottleMode::AutoConverge => format!(", {} % taken", left.throttle_percent),
            ThrottleMode::DirtyLimit => format!(", a rest of {} %", left.rest_percent),
        };
        let followed = arrived.postcopy.as_ref().map(ToString::to_string).unwrap_or_default();
        println!(
            "{number}: {} rounds, {:.0} MB in {:.0} ms, downtime {:.1} ms{throttled}{followed}; {} pages verified, {} wrong; {} written since",
            left.rounds,
            left.bytes as f64 / 1e6,
            left.total_ms,
            left.downtime_ms,
            arrived.pages,
            arrived.wrong,
            arrived.wrote
        );
        arrived.faults.iter().for_each(|fault| println!("  {fault}"));
        if let Some(error) = left.error.or(arrived.error) {
            return Err(error.into());
        }
        if !left.completed || !arrived.running || arrived.wrong > 0 {
            return Err(format!("migration {number} did not bring the whole guest").into());
        }
        worst = worst.max(left.downtime_ms);
    }
    let took = began.elapsed().as_secs_f64();
    println!("{} migrations in {took:.1} s, longest downtime {worst:.1} ms, nothing lost", args.migrations);
    Ok(())
}

fn main() -> Result<(), Failure> {
    let args = Args::parse();
    match (&args.snapshot, &args.restore) {
        (Some(path), _) => files::stay(&args, path),
        (None, Some(path)) => files::restore(&args, path),
        _ if args.second => second(&args),
        _ if args.protect.is_some() => protect::protect(&args),
        _ => first(&args),
    }
}
