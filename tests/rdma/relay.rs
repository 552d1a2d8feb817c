//! A guest that never stops writing goes through a relay that has RDMA on one side.

use std::path::Path;

use serde_json::{Value, json};

use crate::common::{
    Deadline, RXE_ADDRESS,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch, scribbler,
};

/// The side with RDMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Near,
    Far,
}

#[derive(Clone, Copy, Debug)]
struct Way {
    side: Side,
    pin_all: bool,
    return_path: bool,
}

impl Way {
    /// For a version's QEMU at the RDMA end: 7.2 has no return path over RDMA.
    fn of(version: Version) -> [Self; 4] {
        let both = [false, true].map(|pin_all| {
            let return_path = version != Version::Qemu72 && !pin_all;
            [Side::Near, Side::Far].map(|side| Self { side, pin_all, return_path })
        });
        [both[0][0], both[0][1], both[1][0], both[1][1]]
    }

    fn capabilities(self, side: Side) -> Vec<(&'static str, bool)> {
        let by_rdma = side == self.side;
        vec![
            ("rdma-pin-all", self.pin_all && by_rdma),
            // Over TCP every version has one.
            ("return-path", self.return_path || (!by_rdma && side == Side::Near)),
        ]
    }
}

fn set(qemu: &mut Qemu, capabilities: Vec<(&'static str, bool)>) {
    let list = capabilities.iter().map(|(name, on)| json!({"capability": name, "state": on}));
    let list: Vec<Value> = list.collect();
    qemu.execute("migrate-set-capabilities", json!({ "capabilities": list }));
}

/// Returns the relay's report. The guest is then paused at the far end, and its memory equals that of the source.
fn relay(way: Way, dir: &Path, source: &mut Qemu, far: &Guest, port: u16) -> Value {
    let mut destination = far.start(dir, "far");
    set(&mut destination, way.capabilities(Side::Far));
    let (near_uri, far_uri) = match way.side {
        Side::Near => (format!("rdma:{RXE_ADDRESS}:0"), destination.listen_tcp()),
        Side::Far => ("tcp:127.0.0.1:0".to_owned(), format!("rdma:{RXE_ADDRESS}:{port}")),
    };
    if way.side == Side::Far {
        destination.listen(&far_uri);
    }
    let mut arguments = vec!["relay", "--json", "--listen", &near_uri];
    if way.side == Side::Far {
        arguments.extend(way.pin_all.then_some("--pin-all"));
        arguments.extend(way.return_path.then_some("--return-path"));
    }
    arguments.push("--connect");
    let mut relay = Ramwire::start(dir, &arguments, &far_uri);
    set(source, way.capabilities(Side::Near));
    source.migrate(&relay.listening());
    let info = source.wait_migration_within(20, Deadline::seconds(30));
    assert_eq!(info["status"], "completed", "{way:?}: {info}\n{}\n{}", relay.errors(), destination.stderr());
    let report = relay.finished(Deadline::seconds(20), 0);
    assert_eq!(report["completed"], true, "{way:?}: {report}");
    destination.wait_status("paused", Deadline::seconds(10));
    compare(&source.ram, &far.ram).unwrap_or_else(|difference| panic!("{way:?}: {difference:?}: {report}"));
    assert!(scribbler::count(&far.ram) > 0);
    destination.execute("cont", json!({}));
    scribbler::wait_until_it_writes(&far.ram, Deadline::seconds(10));
    report
}

/// A guest is sent by every way of its version, one after the other, from `port` on.
fn every_way(version: Version, port: u16) {
    assert!(peers_present(), "nothing is skipped in the guest");
    let dir = scratch();
    let guest = |name| scribbler::guest(version, Machine::Q35, dir.path(), name);
    let mut source = guest("source").running().start(dir.path(), "source");
    scribbler::wait_until_it_writes(&source.ram, Deadline::seconds(20));
    for (port, way) in (port..).zip(Way::of(version)) {
        let began = std::time::Instant::now();
        let far = guest("far").incoming();
        let report = relay(way, dir.path(), &mut source, &far, port);
        let rounds = report["far"]["rounds"].as_array().unwrap();
        let dirty = rounds.iter().filter(|round| round["dirty_pages"].as_u64() > Some(0)).count();
        assert!(dirty >= 1, "{report}");
        if way.side == Side::Near {
            let number = |field: &str| report["scan"][field].as_f64().unwrap();
            // One for each round of the source: at least the first, and the last after its pause. The number in between
            // depends on the source's own estimate of the downtime.
            assert!(number("scans") >= 2.0 && number("last_ms") > 0.0, "{report}");
            assert_eq!(report["far"]["downtime-parts"]["scan_ms"], report["scan"]["last_ms"]);
            let pages = number("memory_bytes") / 16.0;
            assert!(number("found") > pages, "every page once, some again in a later round: {report}");
        }
        let (scan, took) = (&report["scan"], began.elapsed());
        println!("{version} {way:?}: {dirty} rounds with dirty pages, scans {scan}, {took:?}");
        // The same guest continues at its source, and is sent by another way.
        source.execute("cont", json!({}));
    }
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_guest_that_never_stops_writing_goes_through_a_relay_by_rdma_72() {
    every_way(Version::Qemu72, 4480);
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_guest_that_never_stops_writing_goes_through_a_relay_by_rdma_100() {
    every_way(Version::Qemu100, 4484);
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_guest_that_never_stops_writing_goes_through_a_relay_by_rdma_newest() {
    every_way(Version::Newest, 4488);
}

/// Between ramwires: `auto:` is RDMA on both sides of the relay.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_relay_between_ramwires_takes_rdma_on_both_sides() {
    for more in [&["--queue-pairs", "4"][..], &["--pin-all"]] {
        let dir = scratch();
        let (ram, folder) = (dir.path().join("ram"), dir.path().join("guest"));
        fill(&ram, 8, Pattern::Mixed { seed: 51 });
        let address = format!("auto:{RXE_ADDRESS}:0");
        let mut receiver = Ramwire::start(dir.path(), &["receive", &address, "--json", "--dir"], &folder);
        let arguments = [&["relay", "--json", "--listen", &address], more, &["--connect"]].concat();
        let mut relay = Ramwire::start(dir.path(), &arguments, receiver.listening());
        let (uri, block) = (relay.listening(), format!("m0={}", ram.display()));
        let arguments = [&["send", &uri, "--json", "--digest"], more, &["--ram"]].concat();
        let sent = Ramwire::start(dir.path(), &arguments, block).finished(Deadline::seconds(20), 0);
        let passed = relay.finished(Deadline::seconds(20), 0);
        let received = receiver.finished(Deadline::seconds(20), 0);
        assert_eq!((&sent["transport"], &received["transport"]), (&json!("rdma"), &json!("rdma")), "{sent}");
        let ways = ["listen", "connect"].map(|side| passed[side]["transport"].as_str().unwrap());
        assert_eq!((&passed["completed"], ways), (&json!(true), ["rdma"; 2]), "{passed}");
        compare(&ram, &folder.join("ram-000.bin")).unwrap_or_else(|difference| panic!("{difference:?}"));
    }
}
