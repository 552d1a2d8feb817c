//! Checkpoints of a QEMU (COLO): `ramwire receive --colo` keeps those of a running guest, and the guest goes on from the
//! last whole one.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
mod recorder;
mod secondary;

use std::fs;
use std::path::Path;

use common::{
    Deadline,
    qemu::{Machine, Qemu, Version, kvm_present, peers_present},
    qmp::Qmp,
    ramwire::Ramwire,
    scratch, scribbler,
};
use recorder::{Cut, Known, Recorder};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Between two checkpoints, in milliseconds.
const DELAY: u64 = 20;

/// Under the emulator QEMU 7.2 locks itself up in its first checkpoint, in Debian's build.
fn can_run() -> bool {
    peers_present() && kvm_present()
}

fn signal(pid: u32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), signal);
}

/// The newest QEMU takes x-colo with return-path only, the others only without.
fn capabilities(version: Version) -> &'static [&'static str] {
    if version == Version::Newest { &["return-path", "x-colo"] } else { &["x-colo"] }
}

/// What happens to the primary at the cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Killed,
    /// Its connection stays.
    Stopped,
}

/// Begins a protection: `more` are further options of the standby.
fn protect(
    (primary, version): (&mut Qemu, Version),
    dir: &Path,
    (cut, fate): (Cut, Fate),
    more: &[&str],
) -> (Ramwire, Recorder) {
    let mut arguments = vec!["receive", "tcp:127.0.0.1:0", "--colo", "--json"];
    arguments.extend(more);
    arguments.push("--dir");
    let mut standby = Ramwire::start(dir, &arguments, dir.join("guest"));
    let pid = primary.pid();
    let recorder = Recorder::start(&standby.listening(), cut, move || {
        signal(pid, if fate == Fate::Killed { Signal::KILL } else { Signal::STOP });
        fate == Fate::Killed
    });
    primary.set_capabilities(capabilities(version));
    primary.set_parameters(json!({"x-checkpoint-delay": DELAY, "max-bandwidth": 0}));
    primary.migrate(&recorder.uri);
    (standby, recorder)
}

fn manifest(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("guest/manifest.json")).unwrap()).unwrap()
}

/// The folder has exactly the last whole checkpoint.
fn assert_holds(dir: &Path, known: &Known, what: &str) {
    let manifest = manifest(dir);
    let blocks = manifest["blocks"].as_array().unwrap();
    assert_eq!(blocks.len(), known.blocks.len(), "{what}: {manifest}");
    for (block, (name, ram)) in blocks.iter().zip(&known.blocks) {
        assert_eq!(block["name"], **name, "{what}");
        let stored = fs::read(dir.join("guest").join(block["file"].as_str().unwrap())).unwrap();
        let differs = stored.chunks(4096).zip(ram.chunks(4096)).position(|(stored, due)| stored != due);
        assert_eq!((stored.len(), differs), (ram.len(), None), "{what}: {name}: a page of another moment");
    }
    let stored = fs::read(dir.join("guest/tail.bin")).unwrap();
    // Behind it comes the VM description.
    assert!(stored.starts_with(&known.state), "{what}: device state of another moment");
}

/// Gives the folder's guest to `next`.
fn send_on(next: &mut Qemu, dir: &Path, more: &[&str]) {
    let uri = next.listen_tcp();
    let mut arguments = vec!["send", &uri, "--json"];
    arguments.extend(more);
    arguments.push("--dir");
    Ramwire::start(dir, &arguments, dir.join("guest")).finished(Deadline::seconds(60), 0);
    next.wait_completed(Deadline::seconds(20));
}

/// The smallest guest that writes.
fn writing(version: Version, dir: &Path) -> Qemu {
    let guest = scribbler::guest(version, Machine::Pc, dir, "primary");
    let primary = guest.running().on_kvm().start(dir, "primary");
    scribbler::wait_until_it_writes(&primary.ram.clone(), Deadline::seconds(60));
    primary
}

/// The same, protected until the cut: returns what the standby must have.
fn scribbles(version: Version, dir: &Path, cut: Cut) -> (Value, Known) {
    let mut primary = writing(version, dir);
    let (mut standby, recorder) = protect((&mut primary, version), dir, (cut, Fate::Killed), &[]);
    let status = if matches!(cut, Cut::First(_)) { 3 } else { 5 };
    let out = standby.finished(Deadline::seconds(120), status);
    (out, recorder.end())
}

/// At each kind of place.
#[test]
fn a_standby_has_the_last_whole_checkpoint_wherever_its_primary_is_killed() {
    if !can_run() {
        return;
    }
    let cuts = [
        (Cut::Whole(1), 1),
        (Cut::Request(2), 1),
        (Cut::Request(5), 4),
        (Cut::Page(2, 1), 1),
        (Cut::Page(4, 100), 3),
        (Cut::Page(3, u64::MAX), 2),
        (Cut::State(3, 1), 2),
        (Cut::State(4, 2000), 3),
        (Cut::Whole(6), 6),
    ];
    for (cut, last) in cuts {
        let dir = scratch();
        let dir = dir.path();
        let (out, known) = scribbles(Version::Qemu72, dir, cut);
        assert_eq!((known.whole, &out["checkpoints"]), (last, &last.into()), "{cut:?}: {out}");
        assert_eq!(
            (&out["outcome"], &out["state"]),
            (&"in-doubt".into(), &"in-doubt".into()),
            "{cut:?}: {out}"
        );
        assert_eq!(manifest(dir)["state"], "in-doubt", "{cut:?}");
        assert_holds(dir, &known, &format!("{cut:?}"));
    }
}

/// Nothing of it can be started: it runs at its primary, or is lost with it, as in any migration that fails.
#[test]
fn a_primary_that_is_killed_before_its_first_checkpoint_leaves_nothing() {
    if !can_run() {
        return;
    }
    let dir = scratch();
    let (out, known) = scribbles(Version::Qemu72, dir.path(), Cut::First(100));
    assert_eq!((known.whole, &out["checkpoints"], &out["arrived"]), (0, &0.into(), &false.into()), "{out}");
    assert!(!dir.path().join("guest/manifest.json").exists());
}

/// The counters of a guest that stands still are of one moment: the first of them are ahead by one.
fn assert_one_moment(ram: &Path, what: &str) -> u32 {
    let counters = scribbler::counters(ram);
    let (first, last) = (counters[0], counters[counters.len() - 1]);
    let ahead = counters.iter().take_while(|count| **count == first).count();
    let is_step = counters[ahead..].iter().all(|count| *count == last) && first - last <= 1;
    assert!(is_step, "{what}: counters of several moments: {counters:?}");
    last
}

/// The guest of the folder goes on, and counts where it was: its memory and its processor are of the same moment.
fn goes_on(version: Version, dir: &Path, more: &[&str]) {
    let manifest = manifest(dir);
    let blocks = manifest["blocks"].as_array().unwrap();
    let main = blocks.iter().find(|block| block["name"] == "m0").expect("block m0");
    let stored = dir.join("guest").join(main["file"].as_str().unwrap());
    let before = assert_one_moment(&stored, "the folder");
    let next = scribbler::guest(version, Machine::Pc, dir, "next").running().incoming().on_kvm();
    let mut next = next.start(dir, "next");
    send_on(&mut next, dir, more);
    next.wait_status("running", Deadline::seconds(20));
    let ram = next.ram.clone();
    for _ in 0..3 {
        let passes = scribbler::count(&ram);
        let state = || format!("{passes} passes");
        Deadline::seconds(60)
            .poll("the guest goes on", state, || (scribbler::count(&ram) > passes + 1).then_some(()));
        next.execute("stop", json!({}));
        let count = assert_one_moment(&ram, "the guest that goes on");
        assert!(count > before, "{version}: it counts {count}, and had counted {before}");
        next.execute("cont", json!({}));
    }
}

/// Killed behind a hundred checkpoints, in the middle of one.
fn a_guest_goes_on(version: Version, cut: Cut, last: u64) {
    if !can_run() {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let (out, known) = scribbles(version, dir, cut);
    assert_eq!((known.whole, &out["checkpoints"]), (last, &last.into()), "{version}: {out}");
    assert!(known.pages > last, "{version}: it did not write: {} pages", known.pages);
    println!("{version}: {last} checkpoints, {} pages behind the first", known.pages);
    assert_holds(dir, &known, &version.to_string());
    goes_on(version, dir, &["--destination-is-dead"]);
}

#[test]
fn a_guest_of_qemu_72_goes_on_after_a_hundred_checkpoints() {
    a_guest_goes_on(Version::Qemu72, Cut::Page(102, 50), 101);
}

#[test]
fn a_guest_of_the_newest_qemu_goes_on_after_a_hundred_checkpoints() {
    a_guest_goes_on(Version::Newest, Cut::State(102, 100), 101);
}

/// The operator says that the primary is dead, which here it is not: it is stopped, and then killed.
#[test]
fn a_guest_is_whole_once_the_operator_says_that_its_primary_is_dead() {
    if !can_run() {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let version = Version::Qemu72;
    let monitor = dir.join("standby.qmp");
    let mut primary = writing(version, dir);
    let place = format!("unix:{}", monitor.display());
    let fate = (Cut::Page(11, 3), Fate::Stopped);
    let (mut standby, recorder) = protect((&mut primary, version), dir, fate, &["--qmp", &place]);
    let enough = || (recorder.loaded() >= 10).then_some(());
    Deadline::seconds(120).poll("ten checkpoints", || standby.errors(), enough);
    let mut qmp = Qmp::connect(&monitor).unwrap();
    qmp.execute("x-colo-lost-heartbeat", json!({})).unwrap();
    let out = standby.finished(Deadline::seconds(60), 0);
    assert_eq!((&out["state"], &out["arrived"]), (&"whole".into(), &true.into()), "{out}");
    primary.kill();
    let known = recorder.end();
    assert_eq!((known.whole, &out["checkpoints"]), (10, &10.into()), "{out}");
    assert_holds(dir, &known, "told");
    goes_on(version, dir, &[]);
}

/// It is refused before its first page, and the guest stays where it runs.
#[test]
fn a_qemu_72_with_a_return_path_is_refused_and_its_guest_runs_on() {
    if !can_run() {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let mut primary = writing(Version::Qemu72, dir);
    let arguments = ["receive", "tcp:127.0.0.1:0", "--colo", "--json", "--dir"];
    let mut standby = Ramwire::start(dir, &arguments, dir.join("guest"));
    primary.set_capabilities(&["x-colo", "return-path"]);
    primary.migrate(&standby.listening());
    let text = standby.failed(Deadline::seconds(60), 3);
    assert!(text.contains("capability return-path"), "{text}");
    scribbler::wait_until_it_writes(&primary.ram.clone(), Deadline::seconds(60));
}
