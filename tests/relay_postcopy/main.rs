//! A guest that switches to postcopy on its way QEMU -> `ramwire relay` -> QEMU: it runs at the far end while its memory
//! is missing there, and what the relay does not have comes from its source.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
mod preempt;
mod recovery;

use std::path::Path;
use std::time::Duration;

use common::{
    Deadline,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch,
    writer::{self, Console, Images, Load, assert_unbroken},
};
use serde_json::{Value, json};

const MACHINE: Machine = Machine::PcI440fx72;
const LOAD: Load = Load { mib: 32, pages_per_second: 2000, small: false };
const RAM_MIB: usize = 64;

const POSTCOPY: [&str; 1] = ["postcopy-ram"];
const PREEMPT: [&str; 2] = ["postcopy-ram", "postcopy-preempt"];

fn relay(dir: &Path, far: &str) -> Ramwire {
    relay_with(dir, &[], far)
}

fn relay_with(dir: &Path, options: &[&str], far: &str) -> Ramwire {
    let arguments = ["relay", "--json", "--listen", "tcp:127.0.0.1:0"];
    Ramwire::start(dir, &[&arguments[..], options, &["--connect"]].concat(), far)
}

/// So slow that a switch finds most memory at the source, and the guest waits for it after the switch.
fn slow(source: &mut Qemu, bytes_a_second: u64) {
    source.set_parameters(json!({"max-bandwidth": bytes_a_second, "max-postcopy-bandwidth": bytes_a_second}));
}

/// Migrates and switches over when some pages have left.
fn switch(source: &mut Qemu, uri: &str) {
    source.migrate(uri);
    let deadline = Deadline::seconds(60);
    while source.query_migrate()["ram"]["transferred"].as_u64().unwrap_or(0) < 2 << 20 {
        assert!(!deadline.is_over(), "no pages leave: {}\n{}", source.query_migrate(), source.stderr());
        std::thread::yield_now();
    }
    source.execute("migrate-start-postcopy", json!({}));
}

fn wait_migration_status(qemu: &mut Qemu, wanted: &str) {
    let deadline = Deadline::seconds(60);
    loop {
        let info = qemu.query_migrate();
        if info["status"] == wanted {
            return;
        }
        assert!(!deadline.is_over(), "not {wanted}: {info}\n{}", qemu.stderr());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A live guest's source and destination, which may switch.
struct Live {
    dir: tempfile::TempDir,
    consoles: [Console; 2],
    source: Qemu,
    destination: Qemu,
    far: String,
}

impl Live {
    fn start(
        images: &Images,
        machine: Machine,
        (from, to): (Version, Version),
        capabilities: &[&str],
    ) -> Self {
        let dir = scratch();
        let consoles = ["source", "destination"]
            .map(|name| Console::new(dir.path().join(name).with_extension("console")));
        let guest = |version, name: &str, console| -> Guest {
            let ram = dir.path().join(name).with_extension("ram");
            writer::guest(images, version, machine, LOAD, &ram, console)
        };
        let mut source = guest(from, "source", &consoles[0]).start(dir.path(), "source");
        let mut destination =
            guest(to, "destination", &consoles[1]).incoming().start(dir.path(), "destination");
        consoles[0].wait_tick("boot", Deadline::seconds(300), |tick| tick.number >= 3);
        source.set_capabilities(capabilities);
        destination.set_capabilities(capabilities);
        slow(&mut source, 24 << 20);
        let far = destination.listen_tcp();
        Self { dir, consoles, source, destination, far }
    }

    /// The source has switched: waits until the guest runs at the destination.
    fn runs_there(&self, what: &str) {
        let left = self.consoles[0].ticks().last().copied().unwrap();
        self.consoles[1].wait_tick(what, Deadline::seconds(120), |tick| tick.number > left.number + 1);
    }

    /// All memory has come: the guest finds what it has written.
    fn is_unbroken(&self, what: &str) {
        let moved = self.consoles[1].ticks().last().copied().unwrap();
        self.consoles[1].wait_tick(what, Deadline::seconds(120), |tick| tick.passes >= moved.passes + 2);
        assert_unbroken(&[&self.consoles[0], &self.consoles[1]]);
    }
}

/// A live guest switches to postcopy, directly or through a relay; returns the source's figures and the relay's.
fn migrate_live(images: &Images, from: Version, to: Version, relayed: bool) -> (Value, Value) {
    let what = format!("{from} to {to}, {}", if relayed { "through the relay" } else { "direct" });
    let mut live = Live::start(images, MACHINE, (from, to), &POSTCOPY);
    let mut through = relayed.then(|| relay(live.dir.path(), &live.far));
    let uri = through.as_mut().map_or_else(|| live.far.clone(), Ramwire::listening);
    switch(&mut live.source, &uri);
    live.runs_there(&what);
    let info = live.source.wait_completed(Deadline::seconds(120));
    let report = through.as_mut().map_or(Value::Null, |relay| relay.finished(Deadline::seconds(30), 0));
    live.destination.wait_completed(Deadline::seconds(30));
    live.is_unbroken(&what);
    println!(
        "{what}: downtime {} ms, {} requests to the source, {} to the relay",
        info["downtime"], info["ram"]["postcopy-requests"], report["far"]["ram"]["postcopy-requests"]
    );
    (info, report)
}

/// The direct run is the control.
fn through_the_relay(images: &Images, from: Version, to: Version) {
    migrate_live(images, from, to, false);
    let (info, report) = migrate_live(images, from, to, true);
    assert_eq!(report["completed"], true, "{report}");
    let asked = |figures: &Value| figures["ram"]["postcopy-requests"].as_u64().unwrap();
    assert!(asked(&report["far"]) > 0, "the guest never waited: {report}");
    assert!(asked(&info) > 0, "the relay never asked for what it did not have: {info}");
    assert!(asked(&info) <= asked(&report["far"]), "{info}\n{report}");
}

#[test]
fn a_live_guest_switches_to_postcopy_through_a_relay_between_two_qemu_72() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    through_the_relay(&images, Version::Qemu72, Version::Qemu72);
}

#[test]
fn a_live_guest_switches_to_postcopy_through_a_relay_between_two_qemu_100() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    through_the_relay(&images, Version::Qemu100, Version::Qemu100);
}

#[test]
fn a_live_guest_switches_to_postcopy_through_a_relay_between_two_of_the_newest_qemu() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    through_the_relay(&images, Version::Newest, Version::Newest);
}

#[test]
fn a_live_guest_switches_to_postcopy_through_a_relay_between_versions() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    for (from, to) in Version::pairs() {
        through_the_relay(&images, from, to);
    }
}

/// A paused guest's source and destination, with patterned memory.
struct Ends {
    dir: tempfile::TempDir,
    source: Qemu,
    destination: Qemu,
    far: String,
}

impl Ends {
    fn start(version: Version, there: &[&str]) -> Self {
        Self::of(MACHINE, version, there)
    }

    fn of(machine: Machine, version: Version, there: &[&str]) -> Self {
        let dir = scratch();
        let (sent, arrived) = (dir.path().join("sent"), dir.path().join("arrived"));
        fill(&sent, RAM_MIB, Pattern::Mixed { seed: 21 });
        fill(&arrived, RAM_MIB, Pattern::Random { seed: 22 });
        let mut source = Guest::new(version, machine, &sent, RAM_MIB).start(dir.path(), "source");
        let mut destination =
            Guest::new(version, machine, &arrived, RAM_MIB).incoming().start(dir.path(), "destination");
        destination.set_capabilities(there);
        source.set_capabilities(&POSTCOPY);
        slow(&mut source, 8 << 20);
        let far = destination.listen_tcp();
        Self { dir, source, destination, far }
    }

    /// The memory at the far end is that of the source.
    fn compare(&self, what: &str) {
        compare(&self.dir.path().join("sent"), &self.dir.path().join("arrived"))
            .unwrap_or_else(|d| panic!("{what}: {d:?}"));
    }
}

#[test]
fn all_memory_comes_through_a_relay_in_postcopy() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        let mut ends = Ends::start(version, &POSTCOPY);
        let mut relay = relay(ends.dir.path(), &ends.far);
        switch(&mut ends.source, &relay.listening());
        ends.source.wait_completed(Deadline::seconds(120));
        let report = relay.finished(Deadline::seconds(30), 0);
        ends.destination.wait_completed(Deadline::seconds(30));
        ends.compare(&version.to_string());
        let behind = report["far"]["ram"]["postcopy-bytes"].as_u64().unwrap();
        assert!(behind > 16 << 20, "{version}: nearly nothing came behind the switch: {report}");
    }
}

/// The relay is killed while pages are missing at the far end: both QEMUs pause, and go on without it. No page is lost.
#[test]
fn the_ends_go_on_without_a_relay_that_was_killed_in_postcopy() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        let mut ends = Ends::start(version, &POSTCOPY);
        let mut relay = Some(relay(ends.dir.path(), &ends.far));
        switch(&mut ends.source, &relay.as_mut().unwrap().listening());
        wait_migration_status(&mut ends.source, "postcopy-active");
        wait_migration_status(&mut ends.destination, "postcopy-active");
        drop(relay.take());
        go_on_without(&mut ends, &version.to_string());
    }
}

/// The far end's side of the connection is lost: the relay says what is to be done, and both QEMUs go on without it.
#[test]
fn the_ends_go_on_without_a_relay_whose_connection_was_lost_in_postcopy() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        let mut ends = Ends::start(version, &POSTCOPY);
        let mut relay = relay(ends.dir.path(), &ends.far);
        switch(&mut ends.source, &relay.listening());
        wait_migration_status(&mut ends.source, "postcopy-active");
        wait_migration_status(&mut ends.destination, "postcopy-active");
        ends.destination.execute("migrate-pause", json!({}));
        let said = relay.failed(Deadline::seconds(60), 5);
        assert!(said.contains("migrate-recover"), "{version}: {said}");
        go_on_without(&mut ends, &version.to_string());
    }
}

fn go_on_without(ends: &mut Ends, what: &str) {
    recover(&mut ends.source, &mut ends.destination, ends.dir.path());
    ends.compare(what);
}

/// The ends go on by themselves.
fn recover(source: &mut Qemu, destination: &mut Qemu, dir: &Path) {
    wait_migration_status(destination, "postcopy-paused");
    wait_migration_status(source, "postcopy-paused");
    let uri = format!("unix:{}", dir.join("again").display());
    destination.execute("migrate-recover", json!({ "uri": uri }));
    source.execute("migrate", json!({ "uri": uri, "resume": true }));
    source.wait_completed(Deadline::seconds(120));
    destination.wait_completed(Deadline::seconds(30));
}

/// What a relay or its far end can't do is refused before the switch: the guest runs on at its source.
#[test]
fn what_a_relay_can_not_do_leaves_the_guest_at_its_source() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        // The far end does not allow it.
        let mut ends = Ends::start(version, &["return-path"]);
        let mut through = relay(ends.dir.path(), &ends.far);
        ends.source.migrate(&through.listening());
        let info = ends.source.wait_migration(Deadline::seconds(60));
        assert_eq!(info["status"], "failed", "{version}: {info}");
        let said = through.failed(Deadline::seconds(30), 3);
        assert!(said.contains("far end"), "{version}: {said}");
        ends.source.execute("cont", json!({}));
        assert_eq!(ends.source.status(), "running", "{version}");
        // Urgent pages on a connection of their own, which is made right behind the first, or at the switch.
        for machine in [MACHINE, Machine::Q35] {
            if version == Version::Qemu72 && machine != MACHINE {
                continue;
            }
            let what = format!("{version}, {}", machine.name());
            let mut ends = Ends::of(machine, version, &PREEMPT);
            ends.source.set_capabilities(&PREEMPT);
            let mut through = relay(ends.dir.path(), &ends.far);
            match machine == MACHINE {
                true => ends.source.migrate(&through.listening()),
                false => switch(&mut ends.source, &through.listening()),
            }
            let (_, said) = through.ended(Deadline::seconds(60));
            // On a busy host the second connection may come so late that it finds nobody, as the one at a switch does.
            let told = said.contains("--postcopy-preempt");
            let alone = said.contains("source has closed its connection");
            assert!(told || alone || machine != MACHINE, "{what}: {said}");
            assert!(!told || machine == MACHINE, "{what}: {said}");
            let info = ends.source.wait_migration(Deadline::seconds(60));
            assert_eq!(info["status"], "failed", "{what}: {info}");
            ends.source.execute("cont", json!({}));
            assert_eq!(ends.source.status(), "running", "{what}");
        }
    }
}
