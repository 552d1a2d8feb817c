//! A guest is handed to another process of this host without a copy, and that process is killed at every step.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{BufRead, BufReader, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ramwire::guest::synthetic::{SyntheticConfig, SyntheticGuest};
use ramwire::guest::{GuestControl, MappedGuest};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    Configuration, Outcome, SourceConnection, SourceGuest, SourceReport, SourceSession, SourceSettings,
};
use ramwire::sys::Mapping;
use ramwire::transport::{StreamChannel, StreamOptions};
use ramwire::units::{PageSize, Rate};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde_json::Value;

use common::{Deadline, ramwire::Ramwire, scratch};

const RAM: u64 = 4 << 20;

/// The other process: the demo's.
struct Destination {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Destination {
    fn start(socket: &str) -> Self {
        let arguments = ["demo-destination", socket, "--guest", "synthetic", "--same-host"];
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(env!("CARGO_BIN_EXE_ramwire"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("cannot start setpriv (util-linux)");
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Bytes that passed, from the source and from the destination.
type Passed = Arc<[AtomicU64; 2]>;

/// When the destination is killed: when so many bytes have passed, from the source (0) or from the destination (1).
type KillAt = Option<(usize, u64)>;

/// Passes bytes and descriptors on, up to those that are the last.
fn pass_on(from: &UnixStream, to: &UnixStream, direction: usize, passed: &Passed, at: KillAt) -> Option<()> {
    let mut buffer = [0; 4096];
    loop {
        let done = passed[direction].load(Ordering::SeqCst);
        let left = at.filter(|at| at.0 == direction).map_or(u64::MAX, |at| at.1 - done);
        if left == 0 {
            return None;
        }
        let room = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut buffer[..room])];
        let message = recvmsg(from, parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC).ok()?;
        if message.bytes == 0 {
            return Some(());
        }
        let mut descriptors: Vec<OwnedFd> = Vec::new();
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(more) = part {
                descriptors.extend(more);
            }
        }
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)));
        }
        let mut sent = 0;
        while sent < message.bytes {
            let parts = &[IoSlice::new(&buffer[sent..message.bytes])];
            sent += sendmsg(to, parts, &mut ancillary, SendFlags::NOSIGNAL).ok()?;
            ancillary.clear();
        }
        passed[direction].fetch_add(message.bytes as u64, Ordering::SeqCst);
    }
}

/// The connection between the source and the process, which is killed at the point `at`.
fn between(near: UnixStream, destination: &Arc<Mutex<Destination>>, socket: &str, at: KillAt) -> Passed {
    let passed = Passed::default();
    let far = UnixStream::connect(socket.strip_prefix("unix:").unwrap()).unwrap();
    for direction in 0..2 {
        let ends = [near.try_clone().unwrap(), far.try_clone().unwrap()];
        let (destination, passed) = (Arc::clone(destination), Arc::clone(&passed));
        std::thread::spawn(move || {
            let (from, to) = (&ends[direction], &ends[1 - direction]);
            if pass_on(from, to, direction, &passed, at).is_none() {
                let _ = destination.lock().unwrap().child.kill();
                let _ = destination.lock().unwrap().child.wait();
            }
            let _ = from.shutdown(std::net::Shutdown::Both);
            let _ = to.shutdown(std::net::Shutdown::Both);
        });
    }
    passed
}

fn guest() -> SyntheticGuest {
    let ram = Mapping::memfd("same-host", RAM).unwrap();
    let block = RamBlock::new(BlockName::new("demo.ram0").unwrap(), RAM);
    let memory = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &ram).build().unwrap();
    let config = SyntheticConfig { working_set: 1 << 20, rate: Some(Rate(20 << 20)), ..Default::default() };
    SyntheticGuest::filled(Arc::new(memory), config).unwrap()
}

struct Handed {
    report: SourceReport,
    guest: SyntheticGuest,
    destination: Arc<Mutex<Destination>>,
    passed: Passed,
}

/// Hands a running guest over.
fn hand_over(at: KillAt) -> Handed {
    let dir = scratch();
    let folder = dir.path().join("socket");
    let mut destination = Destination::start(&format!("unix:{}/guest.sock", folder.display()));
    let socket = destination.line();
    let destination = Arc::new(Mutex::new(destination));
    let (near, far) = UnixStream::pair().unwrap();
    let passed = between(far, &destination, &socket, at);
    let guest = guest();
    guest.clone().resume().unwrap();
    let options = StreamOptions::default();
    let channel = StreamChannel::from_fd(near.into(), "destination", &options).unwrap();
    let connection = SourceConnection::over(channel, guest.memory().clone());
    let mut settings =
        SourceSettings::new(Configuration { machine: "ramwire-demo".into(), ..Configuration::default() });
    settings.pass_memory = true;
    let memory = guest.memory().clone();
    let source = SourceGuest { memory, dirty: vec![guest.software()], control: Box::new(guest.clone()) };
    let report = SourceSession::new(source, connection, settings).run();
    Handed { report, guest, destination, passed }
}

fn verified(guest: &SyntheticGuest) {
    guest.clone().pause().unwrap();
    let found = guest.verify().unwrap();
    assert_eq!((found.wrong, found.pages), (0, RAM / 4096), "{:?}", found.faults);
}

/// The process is killed after each so many bytes that it received, and after each so many that it sent.
#[test]
fn a_destination_that_dies_at_any_step_leaves_the_guest_running_and_whole() {
    let whole = hand_over(None);
    assert_eq!(whole.report.outcome, Outcome::Completed, "{:?}", whole.report.error);
    let verdict: Value = serde_json::from_str(&whole.destination.lock().unwrap().line()).unwrap();
    assert_eq!((&verdict["verified"], &verdict["pages"]), (&true.into(), &(RAM / 4096).into()), "{verdict}");
    let pages = whole.report.statistics.pages;
    assert_eq!((pages.normal, pages.zero, pages.delta), (0, 0, 0), "no page travels");
    let lengths = [0, 1].map(|direction| whole.passed[direction].load(Ordering::SeqCst));
    assert!(lengths[0] < 16 << 10, "{lengths:?}");

    let (mut stayed, mut stayed_paused, mut in_doubt) = (0, 0, 0);
    for direction in 0..2 {
        let step = (lengths[direction] / 24).max(1) as usize;
        // From the first byte to the last but one; the source's last are COMMIT.
        let positions = (0..lengths[direction]).step_by(step).chain([lengths[direction] - 1]);
        for at in positions {
            let handed = hand_over(Some((direction, at)));
            let what = format!("killed after {at} of {lengths:?}: {:?}", handed.report.error);
            match handed.report.outcome {
                Outcome::StaysHere(_) => {
                    assert!(handed.report.guest_is_safe_here() && handed.report.passed.is_empty(), "{what}");
                    let before = handed.guest.pages_written();
                    Deadline::seconds(60)
                        .poll(&what, String::new, || (handed.guest.pages_written() > before).then_some(()));
                    stayed += 1;
                    stayed_paused += usize::from(handed.report.statistics.downtime > 0.0);
                }
                Outcome::InDoubt => {
                    // COMMIT was sent, and no RUNNING arrived: only an operator can know that the process is dead.
                    assert!(handed.report.not_resumed && handed.report.passed.len() == 1, "{what}");
                    in_doubt += 1;
                }
                // Fewer keepalives than in the first run: it was over before.
                Outcome::Completed if handed.passed[direction].load(Ordering::SeqCst) <= at => continue,
                other => panic!("{other:?}: {what}"),
            }
            let ran_there = handed.report.outcome == Outcome::InDoubt && direction == 1;
            if !ran_there {
                verified(&handed.guest);
            }
        }
    }
    println!("{stayed} stayed, {stayed_paused} of them were paused, {in_doubt} in doubt");
    assert!(stayed > 20 && stayed_paused > 0 && in_doubt > 0, "{stayed} {stayed_paused} {in_doubt}");
}

/// The command: nothing of RAM is sent, and the guest finds every page where it was.
#[test]
fn the_demo_hands_its_guest_over_without_a_copy() {
    let dir = scratch();
    let memory = ["--ram", "64M", "--block", "12K", "--working-set", "8M", "--dirty-rate", "30M"];
    let run = |arguments: &[&str], last: &str| {
        let arguments: Vec<&str> = ["demo"].iter().chain(&memory).chain(arguments).copied().collect();
        Ramwire::start(dir.path(), &arguments, last).finished(Deadline::seconds(120), 0)
    };
    let out = run(&["--json"], "--same-host");
    assert_eq!((&out["verified"], &out["transport"]), (&true.into(), &"unix".into()), "{out}");
    assert_eq!(
        (&out["passed"]["blocks"], &out["passed"]["bytes"]),
        (&2.into(), &((64 << 20) + 12288).into())
    );
    for kind in ["normal", "zero", "delta"] {
        assert_eq!(out["pages"][kind], 0, "{out}");
    }
    assert!(out["bytes_sent"].as_u64() < Some(64 << 10), "{out}");
    assert_eq!(out["pages_checked"], 64 * 256 + 3);
}

/// Measures the downtime of a guest of sparse memory. Not a test: it prints.
#[test]
#[ignore = "measures; run it with --ignored --nocapture"]
fn handovers_of_sparse_memory() {
    use ramwire::guest::{GuestMemory, TestMachine};
    use ramwire::ram::RamBlock as Block;
    use ramwire::session::{
        DestinationConnection, DestinationGuest, DestinationSession, DestinationSettings, Error, Incoming,
        MemoryProvider,
    };

    struct Maps;
    impl MemoryProvider for Maps {
        fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
            let none = |block: &Block| panic!("{} was not passed", block.name);
            Ok(incoming.map(PageSize::SIZE_4K, none)?)
        }
    }

    for gib in [1, 16, 256] {
        let mut downtimes = Vec::new();
        for _ in 0..11 {
            let ram = Mapping::memfd("sparse", gib << 30).unwrap();
            let block = RamBlock::new(BlockName::new("ram").unwrap(), gib << 30);
            let memory = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &ram).build().unwrap();
            let memory = Arc::new(memory);
            let channel = |end: UnixStream| {
                StreamChannel::from_fd(end.into(), "peer", &StreamOptions::default()).unwrap()
            };
            let (near, far) = UnixStream::pair().unwrap();
            let mut settings = SourceSettings::new(Configuration::default());
            (settings.pass_memory, settings.guest_is_paused) = (true, true);
            let mut taking = DestinationSettings::default();
            taking.take_memory = true;
            let guest =
                DestinationGuest { memory: Box::new(Maps), control: Box::new(TestMachine::default()) };
            let destination =
                DestinationSession::new(guest, DestinationConnection::over(channel(far)), taking);
            let control = Box::new(TestMachine::running(b"devices"));
            let source = SourceGuest { memory: memory.clone(), dirty: Vec::new(), control };
            let connection = SourceConnection::over(channel(near), memory);
            let destination = destination.spawn().unwrap();
            let report = SourceSession::new(source, connection, settings).run();
            assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
            assert_eq!(report.statistics.passed.bytes, gib << 30);
            drop(destination.wait().unwrap());
            downtimes.push((
                report.statistics.downtime,
                report.statistics.total_time,
                report.statistics.transferred,
            ));
        }
        downtimes.sort_by(|one, other| one.0.total_cmp(&other.0));
        let (least, median, most) = (downtimes[0], downtimes[5], downtimes[10]);
        println!(
            "{gib} GiB: downtime {:.2} ms ({:.2} to {:.2}), {:.1} ms in all, {} bytes sent",
            median.0, least.0, most.0, median.1, median.2
        );
    }
}
