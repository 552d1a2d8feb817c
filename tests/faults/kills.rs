//! The peer is a process of its own that is killed or stopped, or that resets its connection, at a chosen stage.

mod doomed;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramwire::engine::{Ending, Outcome};
use ramwire::guest::GuestControl;
use ramwire::session::{
    DestinationConnection, DestinationGuest, DestinationReport, DestinationSession, SourceReport,
};
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::{Address, AllowList, Listener, connect};

use crate::common::{Deadline, scratch};
use crate::live::{
    Live, PATIENT, assert_stayed, destination, destination_settings, migrate_cleanly, options, settings,
    source,
};
use doomed::{
    ACTS, Act, Doom, Doomed, DoomedAnswers, DoomedOut, DoomedProvider, STAGES, Stage,
    Stage::{Commit, Committed, Connected, LastByte, MidRound, Ready, Setup, State, Switchover},
};

/// Stall and finish timeouts of the end that survives.
const IMPATIENT: Duration = Duration::from_secs(3);
/// The latest time at which it must have given up, on a busy machine.
const GIVEN_UP: Duration = Duration::from_secs(30);
const JOB: &str = "RAMWIRE_TEST_PEER";

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
