//! The peer is a process of its own that is killed or stopped, or that resets its connection, at a chosen stage.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ramwire::engine::{Ending, Outcome};
use ramwire::guest::{DeviceState, GuestControl, GuestMemory};
use ramwire::session::{
    DestinationConnection, DestinationGuest, DestinationReport, DestinationSession, Error, Incoming,
    MemoryProvider, SourceReport,
};
use ramwire::sys::{CancelToken, RecvPart, SendPart, Stop};
use ramwire::transport::{
    Address, AllowList, ByteSink, ByteSource, ChannelError, Listener, StreamBreaker, StreamChannel, connect,
};

use crate::common::{Deadline, scratch};
use crate::live::{
    Live, PAGE, PAGES, PATIENT, assert_stayed, destination, destination_settings, migrate_cleanly, options,
    settings, source,
};

/// Stall and finish timeouts of the end that survives.
const IMPATIENT: Duration = Duration::from_secs(3);
/// The latest time at which it must have given up, on a busy machine.
const GIVEN_UP: Duration = Duration::from_secs(30);
const JOB: &str = "RAMWIRE_TEST_PEER";

/// What happens to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// SIGKILL.
    Die,
    /// SIGSTOP: the process neither reads nor writes any more, but its kernel still answers.
    Freeze,
    /// The connection is reset, the process ends.
    Reset,
}

/// The stage. A prefix names the peer's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The connection is established, no message was sent.
    Connected,
    /// The blocks are announced (destination) or about to be (source).
    Setup,
    /// Half of the pages have been sent.
    MidRound,
    /// The source has paused its guest; the destination has received everything.
    Switchover,
    /// The source has saved its device state; the destination has loaded it.
    State,
    /// READY was sent; the source has not received it yet.
    Ready,
    /// The source is about to send COMMIT; the destination has read it.
    Commit,
    /// The source has sent COMMIT; the destination runs and is about to report it.
    Committed,
    /// All messages were sent.
    LastByte,
}

use Stage::{Commit, Committed, Connected, LastByte, MidRound, Ready, Setup, State, Switchover};

const STAGES: [Stage; 9] =
    [Connected, Setup, MidRound, Switchover, State, Ready, Commit, Committed, LastByte];
const ACTS: [Act; 3] = [Act::Die, Act::Freeze, Act::Reset];

/// The moment at which this process ends.
#[derive(Clone)]
struct Doom {
    stage: Stage,
    act: Act,
    breaker: StreamBreaker,
}

impl Doom {
    fn reached(&self, stage: Stage) {
        if stage != self.stage {
            return;
        }
        let own = rustix::process::getpid();
        match self.act {
            Act::Die => drop(rustix::process::kill_process(own, rustix::process::Signal::KILL)),
            Act::Freeze => drop(rustix::process::kill_process(own, rustix::process::Signal::STOP)),
            Act::Reset => self.breaker.reset(),
        }
        if self.act == Act::Reset {
            std::process::exit(0);
        }
        // The signal may be slightly late; nothing may happen after it.
        std::thread::sleep(PATIENT);
    }
}

/// Wraps the connection of the doomed end and counts what it sends and receives.
struct Doomed<T> {
    inner: T,
    doom: Doom,
    passed: u64,
    /// Answers sent since the device state was loaded.
    answers: u64,
    state_done: Arc<AtomicU64>,
}

impl<T> Doomed<T> {
    fn new(inner: T, doom: &Doom, state_done: &Arc<AtomicU64>) -> Self {
        Self { inner, doom: doom.clone(), passed: 0, answers: 0, state_done: Arc::clone(state_done) }
    }

    fn count(&mut self, bytes: u64) {
        let half = PAGES * PAGE / 2;
        let before = self.passed;
        self.passed += bytes;
        if before < half && self.passed >= half {
            self.doom.reached(MidRound);
        }
    }
}

impl GuestControl for Doomed<Live> {
    fn pause(&mut self) -> io::Result<()> {
        self.inner.pause()?;
        self.doom.reached(Switchover);
        Ok(())
    }
    fn resume(&mut self) -> io::Result<()> {
        self.doom.reached(Commit);
        self.inner.resume()
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for Doomed<Live> {
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        self.inner.guest.save(out)?;
        self.state_done.store(1, Ordering::Release);
        self.doom.reached(State);
        Ok(())
    }
    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        self.inner.guest.load(from)?;
        self.state_done.store(1, Ordering::Release);
        self.doom.reached(State);
        Ok(())
    }
}

/// The destination's memory.
struct DoomedProvider(Live, Doom);

impl MemoryProvider for DoomedProvider {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        self.1.reached(Setup);
        self.0.memory.provide(incoming)
    }
    fn arrived(&mut self, _incoming: &Incoming, _native: bool) {
        self.1.reached(Switchover);
    }
}

/// The source's way out.
struct DoomedOut(Doomed<StreamChannel>);

impl ramwire::transport::Sealed for DoomedOut {}

impl ByteSink for DoomedOut {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        let commit = matches!(parts, [SendPart::Own([8, 0x52, 4, ..])]);
        if commit {
            self.0.doom.reached(Commit);
        }
        self.0.inner.send(parts, stop)?;
        self.0.doom.reached(Setup);
        if commit {
            self.0.doom.reached(Committed);
        }
        self.0.count(parts.iter().map(|part| part.len() as u64).sum());
        Ok(())
    }
    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.0.inner.flush(stop)
    }
    fn position(&self) -> u64 {
        self.0.inner.position()
    }
}

/// The destination's answers.
struct DoomedAnswers(Doomed<StreamChannel>);

impl ramwire::transport::Sealed for DoomedAnswers {}

impl ByteSink for DoomedAnswers {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        self.0.answers += self.0.state_done.load(Ordering::Acquire);
        if self.0.answers == 2 {
            self.0.doom.reached(Committed);
        }
        self.0.inner.send(parts, stop)?;
        if self.0.answers == 1 {
            self.0.doom.reached(Ready);
        }
        Ok(())
    }
    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.0.inner.flush(stop)
    }
    fn position(&self) -> u64 {
        self.0.inner.position()
    }
}

impl ramwire::transport::Sealed for Doomed<StreamChannel> {}

impl ByteSource for Doomed<StreamChannel> {
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        // Only the source receives messages after its state is saved.
        if self.state_done.load(Ordering::Acquire) == 1 {
            self.doom.reached(Ready);
        }
        let got = self.inner.recv(into, stop)?;
        self.count(got as u64);
        Ok(got)
    }
}

/// The other end of the tests below, which start it. By itself it does nothing.
#[test]
#[ignore = "started by the tests that need a peer"]
fn peer() {
    let Ok(job) = std::env::var(JOB) else { return };
    let words: Vec<&str> = job.splitn(4, ' ').collect();
    let [role, stage, act, address] = words[..] else { panic!("{job}") };
    let stage = STAGES.into_iter().find(|known| format!("{known:?}") == stage).unwrap();
    let act = ACTS.into_iter().find(|known| format!("{known:?}") == act).unwrap();
    let state_done = Arc::default();
    let stop = Stop::on(&CancelToken::default()).within(PATIENT);
    if role == "source" {
        let channel = connect(&address.parse().unwrap(), &options(PATIENT), &stop).unwrap();
        let doom = Doom { stage, act, breaker: channel.breaker() };
        doom.reached(Connected);
        let live = Live::running(7, 500);
        let (sink, back) = channel.split();
        let sink = Box::new(DoomedOut(Doomed::new(sink, &doom, &state_done)));
        let back = Box::new(Doomed::new(back, &doom, &state_done));
        let control = Box::new(Doomed::new(live.clone(), &doom, &state_done));
        source(&live, control, sink, back, settings(PATIENT)).run();
        doom.reached(LastByte);
        return;
    }
    let mut listener =
        Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), AllowList::default(), &stop).unwrap();
    fs::write(format!("{address}.new"), listener.address().to_string()).unwrap();
    fs::rename(format!("{address}.new"), address).unwrap();
    let channel = listener.accept(&options(PATIENT), &stop).unwrap();
    let doom = Doom { stage, act, breaker: channel.breaker() };
    doom.reached(Connected);
    let live = Live::empty();
    let (from, back) = channel.split();
    // The source's reader counts answers as well as pages; here only pages count.
    let from = Box::new(Doomed::new(from, &doom, &Arc::default()));
    let back = Box::new(DoomedAnswers(Doomed::new(back, &doom, &state_done)));
    let provider = Box::new(DoomedProvider(live.clone(), doom.clone()));
    let control = Box::new(Doomed::new(live, &doom, &state_done));
    DestinationSession::new(
        DestinationGuest { memory: provider, control },
        DestinationConnection::of_stream(from, Some(back)),
        destination_settings(PATIENT),
    )
    .run();
    doom.reached(LastByte);
}

/// A peer process; dropping it kills and reaps it.
struct Peer(Child);

impl Peer {
    fn start(role: &str, stage: Stage, act: Act, address: &str) -> Self {
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "kills::peer", "--ignored", "--nocapture"])
            .env(JOB, format!("{role} {stage:?} {act:?} {address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("cannot start setpriv (util-linux)");
        Self(child)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn address_in(file: &Path) -> Address {
    Deadline::seconds(20)
        .poll("the peer's address", String::new, || fs::read_to_string(file).ok())
        .parse()
        .unwrap()
}

/// The guest is sent to a destination that ends at `stage`.
fn destination_ends(dir: &Path, live: &Live, stage: Stage, act: Act) {
    let what = format!("destination, {act:?} at {stage:?}");
    let file: PathBuf = dir.join(format!("{stage:?}-{act:?}"));
    let _ = fs::remove_file(&file);
    let peer = Peer::start("destination", stage, act, file.to_str().unwrap());
    let stop = Stop::on(&CancelToken::default()).within(PATIENT);
    let channel = match connect(&address_in(&file), &options(IMPATIENT), &stop) {
        Ok(channel) => channel,
        // It may be gone before connecting has ended; the guest was not touched then.
        Err(error) => {
            assert!(stage == Connected, "{what}: {error}");
            live.assert_runs_on(&what);
            return migrate_cleanly(live, &format!("{what}: at once again"));
        }
    };
    let (sink, back) = channel.split();
    let session = source(live, Box::new(live.clone()), Box::new(sink), Box::new(back), settings(IMPATIENT));
    let begun = Instant::now();
    let sent = session.run();
    assert!(begun.elapsed() < GIVEN_UP, "{what}: {:?}", begun.elapsed());
    drop(peer);
    judge_source(&what, live, &sent, stage);
    migrate_cleanly(live, &format!("{what}: at once again"));
}

fn judge_source(what: &str, live: &Live, sent: &SourceReport, stage: Stage) {
    let error = &sent.error;
    match stage {
        Connected | Setup | MidRound | Switchover | State => {
            assert_stayed(what, live, sent);
            live.assert_runs_on(what);
        }
        // READY was sent, and perhaps received: the source may have handed over the guest.
        Ready if !sent.outcome.eq(&Outcome::InDoubt) => assert_stayed(what, live, sent),
        Ready | Commit | Committed => {
            assert_eq!(sent.outcome, Outcome::InDoubt, "{what}: {error:?}");
            assert!(!live.runs() && error.is_some(), "{what}: {error:?}");
            // An operator has confirmed that the destination is dead: the guest continues here, intact.
            live.assert_whole(what);
            live.clone().resume().unwrap();
            live.assert_runs_on(what);
        }
        LastByte => {
            assert_eq!(sent.outcome, Outcome::Completed, "{what}: {error:?}");
            assert!(!live.runs(), "{what}");
            live.clone().resume().unwrap();
        }
    }
}

/// A guest is received from a source that ends at `stage`.
fn source_ends(stage: Stage, act: Act) {
    let what = format!("source, {act:?} at {stage:?}");
    let stop = Stop::on(&CancelToken::default()).within(PATIENT);
    let mut listener =
        Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), AllowList::default(), &stop).unwrap();
    let peer = Peer::start("source", stage, act, &listener.address().to_string());
    let channel = listener.accept(&options(IMPATIENT), &stop).unwrap();
    let there = Live::empty();
    let (from, back) = channel.split();
    let begun = Instant::now();
    let arrived = destination(&there, Box::new(from), Box::new(back), IMPATIENT).run();
    assert!(begun.elapsed() < GIVEN_UP, "{what}: {:?}", begun.elapsed());
    drop(peer);
    judge_destination(&what, &there, &arrived, stage, act);
}

fn judge_destination(what: &str, there: &Live, arrived: &DestinationReport, stage: Stage, act: Act) {
    let error = &arrived.error;
    match stage {
        Connected | Setup | MidRound | Switchover | State | Ready | Commit => {
            assert_eq!(arrived.ending, Ending::Discarded, "{what}: {error:?}");
            assert!(!there.runs() && error.is_some(), "{what}");
        }
        // A reset discards unread bytes, perhaps COMMIT.
        Committed if act == Act::Reset && arrived.ending == Ending::Discarded => {
            assert!(!there.runs() && error.is_some(), "{what}");
        }
        Committed | LastByte => {
            assert_eq!(arrived.ending, Ending::Running, "{what}: {error:?}");
            there.assert_runs_on(what);
        }
    }
}

#[test]
fn a_destination_that_dies_at_any_stage_leaves_the_guest_whole() {
    let dir = scratch();
    let live = Live::running(3, 500);
    STAGES.iter().for_each(|stage| destination_ends(dir.path(), &live, *stage, Act::Die));
}

#[test]
fn a_destination_that_freezes_at_any_stage_leaves_the_guest_whole() {
    let dir = scratch();
    let live = Live::running(4, 500);
    STAGES.iter().for_each(|stage| destination_ends(dir.path(), &live, *stage, Act::Freeze));
}

#[test]
fn a_destination_that_resets_at_any_stage_leaves_the_guest_whole() {
    let dir = scratch();
    let live = Live::running(5, 500);
    STAGES.iter().for_each(|stage| destination_ends(dir.path(), &live, *stage, Act::Reset));
}

#[test]
fn a_source_that_dies_at_any_stage_starts_no_second_guest() {
    STAGES.iter().for_each(|stage| source_ends(*stage, Act::Die));
}

#[test]
fn a_source_that_freezes_at_any_stage_starts_no_second_guest() {
    STAGES.iter().for_each(|stage| source_ends(*stage, Act::Freeze));
}

#[test]
fn a_source_that_resets_at_any_stage_starts_no_second_guest() {
    STAGES.iter().for_each(|stage| source_ends(*stage, Act::Reset));
}

/// Descriptors and threads of this process.
fn belongings() -> (usize, usize) {
    let count = |what| fs::read_dir(format!("/proc/self/{what}")).unwrap().count();
    (count("fd"), count("task"))
}

/// Runs alone in its process, because it counts.
#[test]
#[ignore = "started by the test below"]
fn leak() {
    let dir = scratch();
    let rounds = |live: &Live| {
        for stage in [Setup, MidRound, State, Commit] {
            destination_ends(dir.path(), live, stage, Act::Die);
            source_ends(stage, Act::Die);
        }
    };
    let live = Live::running(9, 500);
    rounds(&live);
    let before = belongings();
    rounds(&live);
    assert_eq!(belongings(), before, "descriptors and threads");
}

#[test]
fn faults_leave_no_descriptor_and_no_thread() {
    let ended = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kills::leak", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
}
