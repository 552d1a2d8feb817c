//! Checkpoints of a QEMU (COLO): `ramwire receive --colo` keeps those of a running guest, and the guest goes on from the
//! last whole one.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
mod recorder;
mod secondary;

use std::fs;
use std::path::{Path, PathBuf};

use common::{
    Deadline,
    qemu::{Guest, Machine, Qemu, Version, kvm_present, peers_present},
    qmp::Qmp,
    ramwire::Ramwire,
    scratch, scribbler,
    writer::{self, Console, Images, Load, Tick},
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
    assert!(stored == known.state, "{what}: device state of another moment");
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

/// The smallest guest that writes, protected until the cut: returns what the standby must have.
fn scribbles(version: Version, dir: &Path, cut: Cut) -> (Value, Known) {
    let mut primary =
        scribbler::guest(version, Machine::Pc, dir, "primary").running().on_kvm().start(dir, "primary");
    scribbler::wait_until_it_writes(&primary.ram.clone(), Deadline::seconds(60));
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

const LOAD: Load = Load { mib: 32, pages_per_second: 2000, small: false };

struct Live {
    images: Images,
    version: Version,
}

impl Live {
    fn guest(&self, dir: &Path, name: &str) -> (Guest, Console) {
        let console = Console::new(dir.join(name).with_extension("console"));
        let ram: PathBuf = dir.join(name).with_extension("ram");
        (writer::guest(&self.images, self.version, Machine::Pc, LOAD, &ram, &console).on_kvm(), console)
    }

    fn booted(&self, dir: &Path) -> (Qemu, Console) {
        let (guest, console) = self.guest(dir, "primary");
        let primary = guest.start(dir, "primary");
        console.wait_tick("boot", Deadline::seconds(300), |tick| tick.number >= 3);
        (primary, console)
    }

    /// The guest of the folder goes on, and finds its memory right.
    fn goes_on(&self, dir: &Path, before: &Console, more: &[&str]) {
        let (guest, console) = self.guest(dir, "next");
        let mut next = guest.incoming().start(dir, "next");
        send_on(&mut next, dir, more);
        next.wait_status("running", Deadline::seconds(20));
        let first = console.wait_tick("the first tick", Deadline::seconds(60), |_| true);
        console.wait_tick("two passes over the memory", Deadline::seconds(120), |tick| {
            tick.passes >= first.passes + 3
        });
        assert!(!console.text().contains("CORRUPT"), "{}", console.text());
        let ticks = console.ticks();
        // The line that was being printed may be of two moments.
        let whole: Vec<&Tick> = ticks.iter().skip(1).collect();
        let unbroken = whole.windows(2).all(|pair| pair[1].number == pair[0].number + 1);
        assert!(unbroken && whole.iter().all(|tick| tick.bad == 0), "{}", console.text());
        let left = before.ticks().last().map_or(0, |tick| tick.number);
        assert!(whole[0].number <= left + 2, "it goes on before {left}, where it was killed: {:?}", whole[0]);
    }
}

/// A Linux guest that checks its memory: killed behind a hundred checkpoints, in the middle of one.
fn a_live_guest_goes_on(version: Version, cut: Cut, last: u64) {
    let Some(images) = can_run().then(writer::images).flatten() else { return };
    let live = Live { images, version };
    let dir = scratch();
    let dir = dir.path();
    let (mut primary, console) = live.booted(dir);
    let (mut standby, recorder) = protect((&mut primary, version), dir, (cut, Fate::Killed), &[]);
    let out = standby.finished(Deadline::seconds(600), 5);
    let known = recorder.end();
    assert_eq!((known.whole, &out["checkpoints"]), (last, &last.into()), "{version}: {out}");
    assert!(known.pages > last, "{version}: it did not write: {} pages", known.pages);
    println!("{version}: {last} checkpoints, {} pages behind the first", known.pages);
    assert_holds(dir, &known, &version.to_string());
    live.goes_on(dir, &console, &["--destination-is-dead"]);
}

#[test]
fn a_live_guest_of_qemu_72_goes_on_after_a_hundred_checkpoints() {
    a_live_guest_goes_on(Version::Qemu72, Cut::Page(102, 50), 101);
}

#[test]
fn a_live_guest_of_the_newest_qemu_goes_on_after_a_hundred_checkpoints() {
    a_live_guest_goes_on(Version::Newest, Cut::State(102, 100), 101);
}

/// The operator says that the primary is dead, which here it is not: it is stopped, and then killed.
#[test]
fn a_guest_is_whole_once_the_operator_says_that_its_primary_is_dead() {
    let Some(images) = can_run().then(writer::images).flatten() else { return };
    let live = Live { images, version: Version::Qemu72 };
    let dir = scratch();
    let dir = dir.path();
    let monitor = dir.join("standby.qmp");
    let (mut primary, console) = live.booted(dir);
    let place = format!("unix:{}", monitor.display());
    let (mut standby, recorder) =
        protect((&mut primary, Version::Qemu72), dir, (Cut::Page(11, 3), Fate::Stopped), &["--qmp", &place]);
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
    live.goes_on(dir, &console, &[]);
}
