//! `--protect`: a second process runs the guest and is killed; this one is its standby, and goes on from the last whole
//! checkpoint. With `--lease` nobody says that the other process is dead, and each second time it is only stopped: when it
//! continues, its vCPUs stand still.

use std::io::{BufRead, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use ramwire::guest::GuestControl;
use ramwire::session::{
    CheckpointObserver, CheckpointSession, CheckpointSettings, DestinationGuest, LeaseConfig, SourceGuest,
    StandbyEnding, StandbyHandle, StandbyReport, StandbySession, StandbySettings,
};
use ramwire::transport::{StreamChannel, StreamOptions};
use rustix::process::{Pid, Signal, kill_process};

use super::vm::{Found, TinyVm};
use super::{Args, Failure, Folder, RUNS, Second};

/// What the source says in the end: pages that its vCPUs have written without a lease.
const LATE: &str = "late ";
/// The source lives at most this long after the checkpoint that is waited for, in milliseconds.
const LIFE: u64 = 40;
/// Checkpoints that are waited for: from none to one less.
const CHECKPOINTS: u64 = 6;

/// What the guest sends to the network would be held in a VMM, and let out here. This one has no network: it tells how
/// far it would be out.
struct Output;

impl CheckpointObserver for Output {
    fn taken(&mut self, _number: u64) {}

    fn safe(&mut self, number: u64) {
        println!("{number}");
    }
}

/// The second process: runs the guest until it is killed, with a standby that listens at `path`.
pub(super) fn source(args: &Args, path: &Path) -> Result<(), Failure> {
    let mut vm = TinyVm::filled(args.memory()?, args.log(), args.shape())?;
    vm.resume()?;
    let dirty = vm.dirty_source()?;
    dirty.probe()?;
    let control = Box::new(vm.clone());
    let guest = SourceGuest { memory: vm.memory().clone(), dirty: vec![dirty], control };
    let mut settings = CheckpointSettings::default();
    settings.interval = args.protect.map(Duration::from_millis);
    settings.lease = args.lease.map(Duration::from_millis).map(|time| LeaseConfig { time, stop: time / 4 });
    let channel = channel(UnixStream::connect(path)?)?;
    let session = CheckpointSession::new(guest, channel, Box::new(Output), settings)?;
    let report = session.with_lease(vm.lease()).spawn()?.wait()?;
    if args.lease.is_some() {
        // Longer than a vCPU rests when it has no lease.
        std::thread::sleep(RUNS);
        println!("{LATE}{}", vm.pages_written_late());
        return Ok(());
    }
    Err(format!("the protection ended: {:?} {:?}", report.outcome, report.error).into())
}

fn channel(socket: UnixStream) -> Result<StreamChannel, Failure> {
    Ok(StreamChannel::from_fd(socket.into(), "the other process", &StreamOptions::default())?)
}

fn is_only_stopped(args: &Args, number: u64) -> bool {
    args.lease.is_some() && number.is_multiple_of(2)
}

/// Ends the second process, or with a lease each second time only stops it, and waits for its guest to start here. What
/// it took from then is in the second place; what it has said behind that in the last: the last checkpoint that was safe.
fn take_over(
    args: &Args,
    standby: StandbyHandle,
    second: &mut Second,
    number: u64,
) -> Result<(StandbyReport, Duration, Option<u64>), Failure> {
    let began = Instant::now();
    let is_stopped = is_only_stopped(args, number);
    let process = Pid::from_child(&second.child);
    if is_stopped {
        kill_process(process, Signal::STOP)?;
    } else {
        second.child.kill()?;
        second.child.wait()?;
    }
    if args.lease.is_none() {
        // It is dead for certain: only so may its guest start here.
        standby.activate();
    }
    let report = standby.wait()?;
    let took = began.elapsed();
    if is_stopped {
        kill_process(process, Signal::CONT)?;
    }
    let (mut safe, mut late) = (None, None);
    for line in second.answers.by_ref().lines().map_while(Result::ok) {
        match line.strip_prefix(LATE) {
            Some(pages) => late = Some(pages.parse::<u64>()?),
            None => safe = Some(line.parse()?),
        }
    }
    match late {
        Some(pages) if pages > u64::from(args.vcpus) => {
            Err(format!("a process that was stopped has let its guest write {pages} pages since").into())
        }
        None if is_stopped => Err("a process that was stopped did not end when it continued".into()),
        _ => Ok((report, took, safe)),
    }
}

/// Ends the second process at a moment that follows from `number`, and has its guest here.
fn kill_and_go_on(args: &Args, folder: &Folder, number: u64) -> Result<String, Failure> {
    let path = folder.0.join(format!("{number}.sock"));
    let listener = UnixListener::bind(&path)?;
    let mut second = Second::start()?;
    second.order("protect", &path)?;
    let channel = channel(listener.accept()?.0)?;
    let memory = args.memory()?;
    let mut vm = TinyVm::empty(memory.clone(), args.log())?;
    let guest = DestinationGuest { memory: Box::new(memory), control: Box::new(vm.clone()) };
    let mut settings = StandbySettings::default();
    settings.starts_by_lease = args.lease.is_some();
    let standby = StandbySession::new(guest, channel, settings).spawn()?;
    // Without a checkpoint nothing starts by itself.
    let first = u64::from(args.lease.is_some());
    let (checkpoints, lives) =
        (first + number % CHECKPOINTS, number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % LIFE);
    let mut safe = 0;
    for _ in 0..checkpoints {
        safe = second.answer()?.parse()?;
    }
    std::thread::sleep(Duration::from_millis(lives));
    let (report, took, last) = take_over(args, standby, &mut second, number)?;
    let took = took.as_secs_f64() * 1e3;
    safe = last.unwrap_or(safe);
    let StandbyEnding::Active(from) = report.ending else {
        return match (report.ending, safe) {
            (StandbyEnding::Nothing | StandbyEnding::Discarded, 0) => {
                Ok(format!("killed after {lives} ms, before the first checkpoint"))
            }
            (ending, _) => {
                Err(format!("{ending:?} after checkpoint {safe} was safe: {:?}", report.error).into())
            }
        };
    };
    if from < safe {
        return Err(format!("checkpoint {safe} was safe, and the guest went on from {from}").into());
    }
    std::thread::sleep(RUNS);
    vm.pause()?;
    let (Found { pages, wrong, faults }, wrote) = (vm.verify()?, vm.pages_written());
    if wrong > 0 {
        return Err(format!("checkpoint {from} is not the whole guest: {faults:?}").into());
    }
    let ended = if is_only_stopped(args, number) { "stopped" } else { "killed" };
    Ok(format!(
        "{ended} {lives} ms after checkpoint {checkpoints}, went on from checkpoint {from} ({safe} were safe) in {took:.1} ms; {pages} pages verified, 0 wrong; {wrote} written since"
    ))
}

/// As often as it would move: a guest is protected, its process killed, and the guest checked here.
pub(super) fn protect(args: &Args) -> Result<(), Failure> {
    let folder = Folder::new()?;
    for number in 1..=u64::from(args.migrations) {
        writeln!(std::io::stdout(), "{number}: {}", kill_and_go_on(args, &folder, number)?)?;
    }
    println!("{} kills, nothing contradicted", args.migrations);
    Ok(())
}
