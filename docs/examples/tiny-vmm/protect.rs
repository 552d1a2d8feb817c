//! `--protect`: a second process runs the guest and is killed; this one is its standby, and goes on from the last whole
//! checkpoint.

use std::io::{BufRead, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use ramwire::guest::GuestControl;
use ramwire::session::{
    CheckpointObserver, CheckpointSession, CheckpointSettings, DestinationGuest, SourceGuest, StandbyEnding,
    StandbySession, StandbySettings,
};
use ramwire::transport::{StreamChannel, StreamOptions};

use super::vm::{Found, TinyVm};
use super::{Args, Failure, Folder, RUNS, Second};

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
    let guest = SourceGuest { memory: vm.memory().clone(), dirty: vec![dirty], control: Box::new(vm) };
    let mut settings = CheckpointSettings::default();
    settings.interval = args.protect.map(Duration::from_millis);
    let channel = channel(UnixStream::connect(path)?)?;
    let report = CheckpointSession::new(guest, channel, Box::new(Output), settings)?.spawn()?.wait()?;
    Err(format!("the protection ended: {:?} {:?}", report.outcome, report.error).into())
}

fn channel(socket: UnixStream) -> Result<StreamChannel, Failure> {
    Ok(StreamChannel::from_fd(socket.into(), "the other process", &StreamOptions::default())?)
}

/// Kills the second process at a moment that follows from `number`, and starts its guest here.
fn kill_and_go_on(args: &Args, folder: &Folder, number: u64) -> Result<String, Failure> {
    let path = folder.0.join(format!("{number}.sock"));
    let listener = UnixListener::bind(&path)?;
    let mut second = Second::start()?;
    second.order("protect", &path)?;
    let channel = channel(listener.accept()?.0)?;
    let memory = args.memory()?;
    let mut vm = TinyVm::empty(memory.clone(), args.log())?;
    let guest = DestinationGuest { memory: Box::new(memory), control: Box::new(vm.clone()) };
    let standby = StandbySession::new(guest, channel, StandbySettings::default()).spawn()?;
    let (checkpoints, lives) = (number % CHECKPOINTS, number.wrapping_mul(0x9e37_79b9_7f4a_7c15) % LIFE);
    let mut safe = 0;
    for _ in 0..checkpoints {
        safe = second.answer()?.parse()?;
    }
    std::thread::sleep(Duration::from_millis(lives));
    second.child.kill()?;
    second.child.wait()?;
    // It is dead for certain: only so may its guest start here.
    let began = Instant::now();
    standby.activate();
    let report = standby.wait()?;
    let took = began.elapsed().as_secs_f64() * 1e3;
    for line in second.answers.by_ref().lines().map_while(Result::ok) {
        safe = line.parse::<u64>()?;
    }
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
    Ok(format!(
        "killed {lives} ms after checkpoint {checkpoints}, went on from checkpoint {from} ({safe} were safe) in {took:.1} ms; {pages} pages verified, 0 wrong; {wrote} written since"
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
