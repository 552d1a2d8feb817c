//! A stored guest that starts immediately at an unmodified QEMU: its memory follows on demand.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;

use common::{
    Deadline,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch,
    writer::{self, Console, Load, assert_unbroken},
};
use serde_json::json;

const MACHINE: Machine = Machine::PcI440fx72;

/// Migrates a guest into a folder.
fn store(source: &mut Qemu, dir: &Path, folder: &Path) {
    let mut receiver = Ramwire::start(dir, &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], folder);
    source.set_capabilities(&["return-path"]);
    source.set_parameters(json!({"max-bandwidth": 0}));
    source.migrate(&receiver.listening());
    source.wait_completed_within(10, Deadline::seconds(120));
    receiver.finished(Deadline::seconds(60), 0);
}

fn waiting(guest: Guest, dir: &Path, name: &str) -> (Qemu, String) {
    waiting_with(guest, dir, name, capabilities(false))
}

fn capabilities(preempt: bool) -> &'static [&'static str] {
    const BOTH: [&str; 2] = ["postcopy-ram", "postcopy-preempt"];
    if preempt { &BOTH } else { &BOTH[..1] }
}

fn waiting_with(guest: Guest, dir: &Path, name: &str, capabilities: &[&str]) -> (Qemu, String) {
    let mut destination = guest.incoming().start(dir, name);
    destination.set_capabilities(capabilities);
    let uri = destination.listen_tcp();
    (destination, uri)
}

/// Every page of a paused guest is sent after the switch, or before none: after a round all of it fits.
#[test]
fn p1_p13_a_stored_guest_goes_to_any_qemu_in_postcopy() {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let (sent, folder) = (dir.path().join("sent"), dir.path().join("guest"));
    fill(&sent, 64, Pattern::Mixed { seed: 11 });
    let mut source = Guest::new(Version::Qemu72, MACHINE, &sent, 64).start(dir.path(), "source");
    store(&mut source, dir.path(), &folder);
    source.kill();
    for version in Version::ALL {
        for (after, switches) in [("0", true), ("1", false)] {
            let what = format!("to {version} after {after} rounds");
            let arrived = dir.path().join("arrived");
            fill(&arrived, 64, Pattern::Random { seed: 3 });
            let guest = Guest::new(version, MACHINE, &arrived, 64);
            let (mut destination, uri) = waiting(guest, dir.path(), "destination");
            let send =
                ["send", &uri, "--json", "--again", "--postcopy", "--release-ram", "--postcopy-after", after];
            let send = [&send[..], &["--dir"]].concat();
            let mut sender = Ramwire::start(dir.path(), &send, &folder);
            let report = sender.finished(Deadline::seconds(60), 0);
            assert_eq!(report["status"], "completed", "{what}: {report}");
            destination.wait_completed(Deadline::seconds(20));
            compare(&sent, &arrived).unwrap_or_else(|d| panic!("{what}: {d:?}"));
            destination.execute("cont", json!({}));
            assert_eq!(destination.status(), "running", "{what}");
            let behind = report["ram"]["postcopy-bytes"].as_u64().unwrap();
            assert_eq!(behind > 32 << 20, switches, "{what}: {report}");
            // The folder keeps what its memory is given back for: it is sent again.
            let released = report["released-pages"].as_u64().unwrap();
            assert_eq!(released > 64 << 8, switches, "{what}: {report}");
            destination.kill();
        }
    }
}

/// The connection is lost repeatedly after the switch, by either end: the source connects again, no page is lost.
#[test]
fn p9_p11_p24_a_lost_connection_to_any_qemu_loses_no_page() {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let (sent, folder) = (dir.path().join("sent"), dir.path().join("guest"));
    fill(&sent, 64, Pattern::Mixed { seed: 17 });
    let mut source = Guest::new(Version::Qemu72, MACHINE, &sent, 64).start(dir.path(), "source");
    store(&mut source, dir.path(), &folder);
    source.kill();
    for version in Version::ALL {
        let what = format!("to {version}");
        let arrived = dir.path().join("arrived");
        fill(&arrived, 64, Pattern::Random { seed: 3 });
        let (mut destination, uri) =
            waiting(Guest::new(version, MACHINE, &arrived, 64), dir.path(), "destination");
        let limits = ["--max-postcopy-bandwidth", "4M", "--reconnect", "100"];
        let send = [&["send", &uri, "--json", "--again", "--postcopy"], &limits[..], &["--dir"]].concat();
        let mut sender = Ramwire::start(dir.path(), &send, &folder);
        for lost in 1..=3 {
            lose_and_recover(&mut destination, lost, &uri, &what);
        }
        let report = sender.finished(Deadline::seconds(120), 0);
        assert_eq!(report["status"], "completed", "{what}: {report}");
        destination.wait_completed(Deadline::seconds(20));
        compare(&sent, &arrived).unwrap_or_else(|d| panic!("{what}: {d:?}"));
        destination.execute("cont", json!({}));
        assert_eq!(destination.status(), "running", "{what}");
        destination.kill();
    }
}

/// Breaks the connection for the `lost`th time, and makes the QEMU listen again.
fn lose_and_recover(qemu: &mut Qemu, lost: usize, uri: &str, what: &str) {
    let deadline = Deadline::seconds(100);
    let mut is_lost = false;
    loop {
        let info = qemu.query_migrate();
        is_lost |= qemu.stderr().matches("Migration paused").count() >= lost;
        match info["status"].as_str() {
            Some("postcopy-active") if is_lost => return,
            // A QEMU that has just resumed sometimes ignores a pause.
            Some("postcopy-active") => drop(qemu.try_execute("migrate-pause", json!({}))),
            // A QEMU 7.2 may still listen from the last time, and the source may already be connected.
            Some("postcopy-paused") => drop(qemu.try_execute("migrate-recover", json!({"uri": uri}))),
            _ => {}
        }
        assert!(!deadline.is_over(), "{what}: {info}\n{}", qemu.stderr());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// A guest that checks its memory runs while nearly all of it is missing, and keeps checking until all pages have
/// arrived.
#[test]
fn p2_p4_p6_a_stored_live_guest_starts_at_once_at_any_qemu() {
    if !peers_present() {
        return;
    }
    let Some(images) = writer::images() else { return };
    let dir = scratch();
    let load = Load { mib: 32, pages_per_second: 2000, small: false };
    let (before, folder) = (Console::new(dir.path().join("before")), dir.path().join("guest"));
    let ram = dir.path().join("source.ram");
    let mut source =
        writer::guest(&images, Version::Qemu72, MACHINE, load, &ram, &before).start(dir.path(), "source");
    before.wait_tick("boot", Deadline::seconds(300), |tick| tick.number >= 3);
    store(&mut source, dir.path(), &folder);
    source.kill();
    let left = before.ticks().last().copied().unwrap();
    let ways = Version::ALL.into_iter().flat_map(|version| [(version, false), (version, true)]);
    for (version, preempt) in ways {
        let what = format!("to {version}, preempt: {preempt}");
        let after = Console::new(dir.path().join("after"));
        let ram = dir.path().join("destination.ram");
        let guest = writer::guest(&images, version, MACHINE, load, &ram, &after);
        let (mut destination, uri) = waiting_with(guest, dir.path(), "destination", capabilities(preempt));
        let mut send =
            vec!["send", &uri, "--json", "--again", "--postcopy", "--max-postcopy-bandwidth", "4M"];
        if preempt {
            // The machine's version is 7.2, which is the style for every QEMU; a later QEMU also gets its own style.
            let peer = if version == Version::Newest { "qemu-10.0" } else { "qemu-7.2" };
            send.extend(["--postcopy-preempt", "--peer", peer]);
        }
        send.push("--dir");
        let mut sender = Ramwire::start(dir.path(), &send, &folder);
        after.wait_tick(&what, Deadline::seconds(120), |tick| tick.number > left.number + 1);
        let info = destination.query_migrate();
        assert_eq!(info["status"], "postcopy-active", "{what}: it ticks before its memory has come: {info}");
        let report = sender.finished(Deadline::seconds(300), 0);
        assert_eq!(report["status"], "completed", "{what}: {report}");
        assert!(report["ram"]["postcopy-requests"].as_u64().unwrap() > 0, "{what}: {report}");
        assert_eq!(report["urgent-pages"].as_u64().unwrap() > 0, preempt, "{what}: {report}");
        let moved = after.ticks().last().copied().unwrap();
        after.wait_tick(&what, Deadline::seconds(120), |tick| tick.passes >= moved.passes + 2);
        assert_unbroken(&[&before, &after]);
        destination.kill();
    }
}
