//! A process with a running guest is killed, and its standby goes on from the last whole checkpoint: when it is told, or by
//! itself when the lease has run out. A standby is killed, and the guest at its source is whole.
//!
//! The process that is killed is this program again: an ignored test with its task in the environment. The connection passes
//! through this process, which kills it when a seeded number of bytes has passed.
//!
//! ```text
//! RAMWIRE_KILLS=200 cargo test --all-features --test checkpoints -- --nocapture
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ramwire::guest::synthetic::{SyntheticConfig, SyntheticGuest};
use ramwire::guest::{GuestControl, MappedGuest};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    CheckpointObserver, CheckpointOutcome, CheckpointSession, CheckpointSettings, DestinationGuest, Lease,
    LeaseConfig, SourceGuest, StandbyEnding, StandbyReport, StandbySession, StandbySettings,
};
use ramwire::sys::Mapping;
use ramwire::transport::{StreamChannel, StreamOptions};
use ramwire::units::{PageSize, Rate};

use rustix::process::{Pid, Signal, kill_process};

use common::{Deadline, scratch};

/// Socket of the connection, and file of what the guest has let out.
const SOCKET: &str = "RAMWIRE_CHECKPOINT_SOCKET";
const LET_OUT: &str = "RAMWIRE_CHECKPOINT_LET_OUT";
/// Set: with a lease.
const LEASED: &str = "RAMWIRE_CHECKPOINT_LEASED";
const LEASE: LeaseConfig = LeaseConfig { time: Duration::from_secs(1), stop: Duration::from_millis(250) };
/// How often the source is killed, unless `RAMWIRE_KILLS` says otherwise.
const KILLS: u64 = 40;
const RAM: u64 = 2 << 20;
/// The first checkpoint, and about thirty more.
const BYTES: u64 = 3 * RAM;

fn memory() -> Arc<MappedGuest> {
    let ram = Mapping::memfd("checkpoints", RAM).unwrap();
    let block = RamBlock::new(BlockName::new("ram").unwrap(), RAM);
    Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &ram).build().unwrap())
}

fn channel(socket: UnixStream) -> StreamChannel {
    StreamChannel::from_fd(socket.into(), "peer", &StreamOptions::default()).unwrap()
}

/// What a guest says to the network: how many pages it has written. It leaves when it is safe, as a line of a file.
struct Output {
    guest: SyntheticGuest,
    held: u64,
    let_out: fs::File,
}

impl CheckpointObserver for Output {
    fn taken(&mut self, _number: u64) {
        self.held = self.guest.pages_written();
    }
    fn safe(&mut self, number: u64) {
        self.let_out.write_all(format!("{number} {}\n", self.held).as_bytes()).unwrap();
    }
}

fn running_guest() -> SyntheticGuest {
    let config = SyntheticConfig { working_set: 256 << 10, rate: Some(Rate(8 << 20)), ..Default::default() };
    let guest = SyntheticGuest::filled(memory(), config).unwrap();
    guest.clone().resume().unwrap();
    guest
}

fn protection(guest: &SyntheticGuest, socket: UnixStream, path: &Path, leased: bool) -> CheckpointSession {
    let output = Output { guest: guest.clone(), held: 0, let_out: fs::File::create(path).unwrap() };
    let source = SourceGuest {
        memory: guest.memory().clone(),
        dirty: vec![guest.software()],
        control: Box::new(guest.clone()),
    };
    let mut settings = CheckpointSettings::default();
    settings.interval = Some(Duration::from_millis(5));
    settings.lease = leased.then_some(LEASE);
    CheckpointSession::new(source, channel(socket), Box::new(output), settings).unwrap()
}

fn keeping(guest: &SyntheticGuest, socket: UnixStream, leased: bool) -> StandbySession {
    let arriving =
        DestinationGuest { memory: Box::new(guest.memory().clone()), control: Box::new(guest.clone()) };
    let mut settings = StandbySettings::default();
    settings.starts_by_lease = leased;
    StandbySession::new(arriving, channel(socket), settings)
}

fn is_leased() -> bool {
    std::env::var_os(LEASED).is_some()
}

#[test]
#[ignore = "a process of the other tests"]
fn source_process() {
    let (Ok(socket), Ok(path)) = (std::env::var(SOCKET), std::env::var(LET_OUT)) else { return };
    let near = UnixStream::connect(socket).unwrap();
    let session = protection(&running_guest(), near, Path::new(&path), is_leased());
    println!("{:?}", session.spawn().unwrap().wait().unwrap());
}

#[test]
#[ignore = "a process of the other tests"]
fn standby_process() {
    let Ok(socket) = std::env::var(SOCKET) else { return };
    let near = UnixStream::connect(socket).unwrap();
    let standby = keeping(&SyntheticGuest::empty(memory()), near, is_leased()).spawn().unwrap();
    println!("{:?}", standby.wait().unwrap());
}

/// The process that is killed; it ends with the calling thread.
struct Doomed(Child);

impl Doomed {
    /// `what`: the ignored test that it runs.
    fn start(what: &str, socket: &Path, let_out: &Path, leased: bool) -> Self {
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", what, "--ignored", "--nocapture"])
            .env(SOCKET, socket)
            .env(LET_OUT, let_out)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if leased {
            command.env(LEASED, "1");
        }
        Self(command.spawn().expect("cannot start setpriv (util-linux)"))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Passes bytes on; ends the process when `last` of them have passed.
fn pass_on(mut from: UnixStream, mut to: UnixStream, last: u64, end: impl FnOnce()) {
    let mut buffer = [0; 8192];
    let mut left = last;
    while left > 0 {
        let room = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let Ok(got @ 1..) = from.read(&mut buffer[..room]) else { break };
        if to.write_all(&buffer[..got]).is_err() {
            break;
        }
        left -= got as u64;
    }
    if left == 0 {
        end();
    }
    let _ = from.shutdown(std::net::Shutdown::Both);
    let _ = to.shutdown(std::net::Shutdown::Both);
}

struct Ended {
    report: StandbyReport,
    guest: SyntheticGuest,
    /// The last checkpoint that was safe, and what the guest had said by then.
    let_out: (u64, u64),
}

/// The last line of what was let out.
fn let_out_in(path: &Path) -> (u64, u64) {
    let said = fs::read_to_string(path).unwrap_or_default();
    let last = said.lines().last().and_then(|line| line.split_once(' '));
    last.map_or((0, 0), |(number, pages)| (number.parse().unwrap(), pages.parse().unwrap()))
}

fn killed_after(bytes: u64, leased: bool) -> Ended {
    let dir = scratch();
    let [socket, let_out] = ["socket", "let-out"].map(|name| dir.path().join(name));
    let listener = UnixListener::bind(&socket).unwrap();
    let source = Arc::new(Mutex::new(Doomed::start("source_process", &socket, &let_out, leased)));
    let near = listener.accept().unwrap().0;
    let (far, standby) = UnixStream::pair().unwrap();
    let guest = SyntheticGuest::empty(memory());
    let standby = keeping(&guest, standby, leased).spawn().unwrap();
    let ends = [near.try_clone().unwrap(), far.try_clone().unwrap()];
    let answers = std::thread::spawn(move || pass_on(far, near, u64::MAX, || {}));
    let [near, far] = ends;
    pass_on(near, far, bytes, || source.lock().unwrap().kill());
    answers.join().unwrap();
    // It is dead: only now may the guest start here. With a lease and a checkpoint it starts by itself.
    source.lock().unwrap().kill();
    let let_out = let_out_in(&let_out);
    if !leased || let_out.0 == 0 {
        standby.activate();
    }
    let report = standby.wait().unwrap();
    Ended { report, guest, let_out }
}

/// What holds after each kill: the guest that runs is whole, and has done all that was let out.
fn check(bytes: u64, leased: bool) -> u64 {
    let Ended { report, guest, let_out: (safe, said) } = killed_after(bytes, leased);
    let what = format!("killed after {bytes} bytes: safe {safe}, {report:?}");
    match report.ending {
        StandbyEnding::Nothing | StandbyEnding::Discarded => {
            assert!(safe == 0 && report.last == 0, "{what}");
            0
        }
        StandbyEnding::Active(number) => {
            assert!(number >= safe, "{what}");
            assert!(guest.pages_written() >= said, "{what}: {said} pages were told of");
            runs_on(&guest, &what);
            guest.clone().pause().unwrap();
            is_whole(&guest, &what);
            number
        }
        other => panic!("{other:?}: {what}"),
    }
}

fn runs_on(guest: &SyntheticGuest, what: &str) {
    let before = guest.pages_written();
    Deadline::seconds(60).poll(what, String::new, || (guest.pages_written() > before).then_some(()));
}

/// The guest is paused.
fn is_whole(guest: &SyntheticGuest, what: &str) {
    let found = guest.verify().unwrap();
    assert_eq!((found.wrong, found.pages), (0, RAM / 4096), "{what}: {:?}", found.faults);
}

/// Seeded numbers of bytes, among them the very first ones.
fn moments(kills: u64) -> Vec<u64> {
    let mut draw = 0x9e37_79b9_7f4a_7c15_u64;
    let moment = |kill| {
        draw ^= draw << 13;
        draw ^= draw >> 7;
        draw ^= draw << 17;
        match kill {
            0..4 => 1 + kill * 30,
            _ => 1 + draw % BYTES,
        }
    };
    (0..kills).map(moment).collect()
}

fn kills() -> u64 {
    std::env::var("RAMWIRE_KILLS").map_or(KILLS, |text| text.parse().unwrap())
}

fn kill_sources(kills: u64, leased: bool) {
    let went_on: Vec<u64> = moments(kills).into_iter().map(|bytes| check(bytes, leased)).collect();
    let nothing = went_on.iter().filter(|number| **number == 0).count();
    let started = went_on.len() - nothing;
    println!("{kills} kills: {started} guests went on, {nothing} had no checkpoint yet");
    assert!(started > 0 && nothing > 0);
}

#[test]
fn a_standby_goes_on_from_a_whole_checkpoint_wherever_its_source_is_killed() {
    kill_sources(kills(), false);
}

/// Nobody says that the source is dead. Each takes longer than its lease.
#[test]
fn a_standby_goes_on_by_itself_wherever_its_source_is_killed() {
    kill_sources((kills() / 4).max(8), true);
}

/// The guest of the source whose standby is killed after so many bytes: true if it stands still for want of a lease.
fn standby_killed_after(bytes: u64, leased: bool) -> bool {
    let dir = scratch();
    let [socket, let_out] = ["socket", "let-out"].map(|name| dir.path().join(name));
    let listener = UnixListener::bind(&socket).unwrap();
    let standby = Mutex::new(Doomed::start("standby_process", &socket, &let_out, leased));
    let far = listener.accept().unwrap().0;
    let (near, there) = UnixStream::pair().unwrap();
    let guest = running_guest();
    let lease = Lease::default();
    let session = protection(&guest, near, &let_out, leased).with_lease(lease.clone());
    let protected = session.spawn().unwrap();
    let (from, to) = (far.try_clone().unwrap(), there.try_clone().unwrap());
    let answers = std::thread::spawn(move || pass_on(from, to, u64::MAX, || {}));
    pass_on(there, far, bytes, || standby.lock().unwrap().kill());
    answers.join().unwrap();
    let report = protected.wait().unwrap();
    let what = format!("standby killed after {bytes} bytes: {report:?}");
    assert!(!report.not_resumed && report.error.is_some(), "{what}");
    let is_fenced = report.outcome == CheckpointOutcome::Fenced;
    match report.outcome {
        CheckpointOutcome::Fenced => {
            assert!(leased && !lease.holds(), "{what}");
            let wrote = guest.pages_written();
            is_whole(&guest, &what);
            assert_eq!(guest.pages_written(), wrote, "{what}");
            // It is dead for certain.
            lease.overrule();
            guest.clone().resume().unwrap();
        }
        CheckpointOutcome::Unprotected => assert!(!leased || report.safe == 0, "{what}"),
        _ => panic!("{what}"),
    }
    runs_on(&guest, &what);
    guest.clone().pause().unwrap();
    is_whole(&guest, &what);
    is_fenced
}

/// Without a lease the guest runs on, as it can run nowhere else. With one it stands still, whole, until somebody knows.
#[test]
fn the_guest_is_whole_at_its_source_wherever_its_standby_is_killed() {
    for leased in [false, true] {
        let fenced = moments(kills() / 2).into_iter().filter(|bytes| standby_killed_after(*bytes, leased));
        let fenced = fenced.count();
        println!("{} kills of a standby: {fenced} guests stood still", kills() / 2);
        assert_eq!(fenced > 0, leased);
    }
}

/// A source that is stopped for longer than its lease lets nothing out when it continues, and ends.
#[test]
fn a_source_that_was_stopped_lets_nothing_out_beside_its_standby() {
    let dir = scratch();
    let [socket, let_out] = ["socket", "let-out"].map(|name| dir.path().join(name));
    let listener = UnixListener::bind(&socket).unwrap();
    let mut source = Doomed::start("source_process", &socket, &let_out, true);
    let guest = SyntheticGuest::empty(memory());
    let standby = keeping(&guest, listener.accept().unwrap().0, true).spawn().unwrap();
    let has_some = || (let_out_in(&let_out).0 >= 3).then_some(());
    Deadline::seconds(60).poll("checkpoints", String::new, has_some);
    source.signal(Signal::STOP);
    let report = standby.wait().unwrap();
    let (safe, said) = let_out_in(&let_out);
    let StandbyEnding::Active(number) = report.ending else { panic!("{report:?}") };
    assert!(
        report.by_lease && number >= safe && guest.pages_written() >= said,
        "{report:?}, {safe} were safe"
    );
    source.signal(Signal::CONT);
    assert!(source.0.wait().unwrap().success());
    assert_eq!(let_out_in(&let_out), (safe, said), "something was let out beside the guest at the standby");
    runs_on(&guest, "the guest at the standby");
    guest.clone().pause().unwrap();
    is_whole(&guest, "the guest at the standby");
}
