//! A process with a running guest is killed, and its standby goes on from the last whole checkpoint.
//!
//! The source is this program again: one ignored test with its task in the environment. The connection passes through
//! this process, which kills the source when a seeded number of bytes has passed.
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
    CheckpointObserver, CheckpointSession, CheckpointSettings, DestinationGuest, SourceGuest, StandbyEnding,
    StandbyReport, StandbySession, StandbySettings,
};
use ramwire::sys::Mapping;
use ramwire::transport::{StreamChannel, StreamOptions};
use ramwire::units::{PageSize, Rate};

use common::{Deadline, scratch};

/// Socket of the connection, and file of what the guest has let out.
const SOCKET: &str = "RAMWIRE_CHECKPOINT_SOCKET";
const LET_OUT: &str = "RAMWIRE_CHECKPOINT_LET_OUT";
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

#[test]
#[ignore = "a process of the other tests"]
fn child() {
    let (Ok(socket), Ok(path)) = (std::env::var(SOCKET), std::env::var(LET_OUT)) else { return };
    let config = SyntheticConfig { working_set: 256 << 10, rate: Some(Rate(8 << 20)), ..Default::default() };
    let guest = SyntheticGuest::filled(memory(), config).unwrap();
    guest.clone().resume().unwrap();
    let output = Output { guest: guest.clone(), held: 0, let_out: fs::File::create(path).unwrap() };
    let source = SourceGuest {
        memory: guest.memory().clone(),
        dirty: vec![guest.software()],
        control: Box::new(guest.clone()),
    };
    let mut settings = CheckpointSettings::default();
    settings.interval = Some(Duration::from_millis(5));
    let near = channel(UnixStream::connect(socket).unwrap());
    let session = CheckpointSession::new(source, near, Box::new(output), settings).unwrap();
    let report = session.spawn().unwrap().wait().unwrap();
    println!("{report:?}");
}

/// The source; it ends with the calling thread.
struct Source(Child);

impl Source {
    fn start(socket: &Path, let_out: &Path) -> Self {
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture"])
            .env(SOCKET, socket)
            .env(LET_OUT, let_out)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("cannot start setpriv (util-linux)");
        Self(child)
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Passes bytes on; kills the source when `last` of them have passed.
fn pass_on(mut from: UnixStream, mut to: UnixStream, last: u64, source: &Mutex<Source>) {
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
        source.lock().unwrap().kill();
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

fn killed_after(bytes: u64) -> Ended {
    let dir = scratch();
    let [socket, let_out] = ["socket", "let-out"].map(|name| dir.path().join(name));
    let listener = UnixListener::bind(&socket).unwrap();
    let source = Arc::new(Mutex::new(Source::start(&socket, &let_out)));
    let near = listener.accept().unwrap().0;
    let (far, standby) = UnixStream::pair().unwrap();
    let guest = SyntheticGuest::empty(memory());
    let arriving =
        DestinationGuest { memory: Box::new(guest.memory().clone()), control: Box::new(guest.clone()) };
    let standby =
        StandbySession::new(arriving, channel(standby), StandbySettings::default()).spawn().unwrap();
    let ends = [near.try_clone().unwrap(), far.try_clone().unwrap()];
    let doomed = Arc::clone(&source);
    let answers = std::thread::spawn(move || pass_on(far, near, u64::MAX, &doomed));
    let [near, far] = ends;
    pass_on(near, far, bytes, &source);
    answers.join().unwrap();
    // It is dead: only now may the guest start here.
    source.lock().unwrap().kill();
    standby.activate();
    let report = standby.wait().unwrap();
    let said = fs::read_to_string(let_out).unwrap_or_default();
    let last = said.lines().last().and_then(|line| line.split_once(' '));
    let let_out = last.map_or((0, 0), |(number, pages)| (number.parse().unwrap(), pages.parse().unwrap()));
    Ended { report, guest, let_out }
}

/// What holds after each kill: the guest that runs is whole, and has done all that was let out.
fn check(bytes: u64) -> u64 {
    let Ended { report, guest, let_out: (safe, said) } = killed_after(bytes);
    let what = format!("killed after {bytes} bytes: safe {safe}, {report:?}");
    match report.ending {
        StandbyEnding::Nothing | StandbyEnding::Discarded => {
            assert!(safe == 0 && report.last == 0, "{what}");
            0
        }
        StandbyEnding::Active(number) => {
            assert!(number >= safe, "{what}");
            let before = guest.pages_written();
            assert!(before >= said, "{what}: {said} pages were told of");
            Deadline::seconds(60).poll(&what, String::new, || (guest.pages_written() > before).then_some(()));
            guest.clone().pause().unwrap();
            let found = guest.verify().unwrap();
            assert_eq!((found.wrong, found.pages), (0, RAM / 4096), "{what}: {:?}", found.faults);
            number
        }
        other => panic!("{other:?}: {what}"),
    }
}

/// Killed at seeded numbers of bytes, among them the very first ones.
#[test]
fn a_standby_goes_on_from_a_whole_checkpoint_wherever_its_source_is_killed() {
    let kills = std::env::var("RAMWIRE_KILLS").map_or(KILLS, |text| text.parse().unwrap());
    let (mut draw, mut started, mut nothing) = (0x9e37_79b9_7f4a_7c15_u64, 0, 0);
    for kill in 0..kills {
        draw ^= draw << 13;
        draw ^= draw >> 7;
        draw ^= draw << 17;
        let bytes = match kill {
            0..4 => 1 + kill * 30,
            _ => 1 + draw % BYTES,
        };
        match check(bytes) {
            0 => nothing += 1,
            _ => started += 1,
        }
    }
    println!("{kills} kills: {started} guests went on, {nothing} had no checkpoint yet");
    assert!(started > 0 && nothing > 0);
}

struct Nothing;

impl CheckpointObserver for Nothing {
    fn taken(&mut self, _number: u64) {}
    fn safe(&mut self, _number: u64) {}
}

/// Measures pauses, and what is left of the guest's writes. Not a test: it prints.
#[test]
#[ignore = "measures; run it with --ignored --nocapture"]
fn pauses_of_checkpoints() {
    const TIME: Duration = Duration::from_secs(5);
    let blocks = |ram: u64| {
        let mapping = Mapping::memfd("checkpoints", ram).unwrap();
        let block = RamBlock::new(BlockName::new("ram").unwrap(), ram);
        Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &mapping).build().unwrap())
    };
    for rate in [10_u64 << 20, 50 << 20, 200 << 20] {
        let config = SyntheticConfig { working_set: 64 << 20, rate: Some(Rate(rate)), ..Default::default() };
        let guest = SyntheticGuest::filled(blocks(256 << 20), config).unwrap();
        guest.clone().resume().unwrap();
        let writes = |guest: &SyntheticGuest| {
            let before = guest.pages_written();
            std::thread::sleep(TIME);
            (guest.pages_written() - before) as f64 / TIME.as_secs_f64()
        };
        let alone = writes(&guest);
        for interval in [25, 100, 500] {
            let (near, far) = UnixStream::pair().unwrap();
            let there = SyntheticGuest::empty(blocks(256 << 20));
            let arriving = DestinationGuest {
                memory: Box::new(there.memory().clone()),
                control: Box::new(there.clone()),
            };
            let standby =
                StandbySession::new(arriving, channel(far), StandbySettings::default()).spawn().unwrap();
            let memory = guest.memory().clone();
            let source =
                SourceGuest { memory, dirty: vec![guest.software()], control: Box::new(guest.clone()) };
            let mut settings = CheckpointSettings::default();
            settings.interval = Some(Duration::from_millis(interval));
            let session = CheckpointSession::new(source, channel(near), Box::new(Nothing), settings).unwrap();
            let protected = session.spawn().unwrap();
            // The first checkpoint holds all memory.
            std::thread::sleep(TIME / 2);
            let left = writes(&guest) / alone;
            protected.stop();
            let report = protected.wait().unwrap();
            assert_eq!(standby.wait().unwrap().ending, StandbyEnding::Released);
            let pauses = report.pauses;
            println!(
                "{} MiB/s, every {interval} ms: {} checkpoints, paused p50 {:.1} ms p99 {:.1} ms, {:.0} MB sent, {:.0} % of the writes left",
                rate >> 20,
                report.safe,
                pauses.p50_us as f64 / 1e3,
                pauses.p99_us as f64 / 1e3,
                report.bytes as f64 / 1e6,
                left * 100.0
            );
        }
        guest.clone().pause().unwrap();
    }
}
