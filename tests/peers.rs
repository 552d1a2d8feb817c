//! The control of every test with a QEMU: two QEMUs alone. A failure here is not ramwire's.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{
    Deadline, RXE_ADDRESS,
    memory::{Difference, Pattern, compare, fill},
    qemu::{Guest, Machine, Version, peers_present},
    scratch,
};
use serde_json::json;

const RAM_MIB: usize = 64;

/// Sends a paused guest with patterned memory and compares the two files of memory.
fn migrate_paused(from: Version, to: Version, machine: Machine) {
    let dir = scratch();
    let (sent, arrived) = (dir.path().join("sent"), dir.path().join("arrived"));
    fill(&sent, RAM_MIB, Pattern::Mixed { seed: 7 });
    fill(&arrived, RAM_MIB, Pattern::Zero);
    let mut destination =
        Guest::new(to, machine, &arrived, RAM_MIB).incoming().start(dir.path(), "destination");
    let mut source = Guest::new(from, machine, &sent, RAM_MIB).start(dir.path(), "source");
    let uri = destination.listen_tcp();
    source.set_parameters(json!({"max-bandwidth": 0}));
    source.migrate(&uri);
    let info = source.wait_completed(Deadline::seconds(60));
    destination.wait_completed(Deadline::seconds(10));
    assert_eq!(destination.status(), "prelaunch", "a guest that was paused stays paused");
    let filled = compare(&sent, &arrived)
        .unwrap_or_else(|difference| panic!("{from} to {to}, {}: {difference:?}", machine.name()));
    assert!(filled > RAM_MIB * 256 / 2, "the pattern fills 5 pages of 8, here {filled}");
    assert!(info["ram"]["normal"].as_u64().unwrap() >= RAM_MIB as u64 * 256 / 4, "{info}");
}

#[test]
fn a_paused_guest_goes_from_qemu_to_the_same_qemu() {
    if peers_present() {
        for version in Version::ALL {
            for machine in Machine::ALL {
                migrate_paused(version, version, machine);
            }
        }
    }
}

#[test]
fn a_paused_guest_goes_from_each_qemu_to_each_other() {
    if peers_present() {
        for (from, to) in Version::pairs() {
            migrate_paused(from, to, Machine::PcI440fx72);
        }
    }
}

#[test]
fn a_refused_destination_fails_the_source_and_leaves_it_whole() {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    for version in Version::ALL {
        let ram = dir.path().join("ram");
        fill(&ram, 16, Pattern::Random { seed: 1 });
        let mut source = Guest::new(version, Machine::Q35, &ram, 16).start(dir.path(), "source");
        source.migrate("tcp:127.0.0.1:1");
        let info = source.wait_migration(Deadline::seconds(20));
        assert_eq!(info["status"], "failed", "{info}");
        assert!(source.try_execute("migrate", json!({"uri": "nonsense"})).is_err(), "refusals are seen");
        assert_eq!(source.status(), "prelaunch");
    }
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_paused_guest_goes_over_rdma_from_qemu_to_the_same_qemu() {
    assert!(peers_present(), "nothing is skipped in the guest");
    for (version, pin_all) in [
        (Version::Qemu72, false),
        (Version::Qemu100, false),
        (Version::Qemu100, true),
        (Version::Newest, false),
        (Version::Newest, true),
    ] {
        let dir = scratch();
        let (sent, arrived) = (dir.path().join("sent"), dir.path().join("arrived"));
        fill(&sent, 16, Pattern::Mixed { seed: 11 });
        fill(&arrived, 16, Pattern::Zero);
        let mut destination =
            Guest::new(version, Machine::Q35, &arrived, 16).incoming().start(dir.path(), "destination");
        let mut source = Guest::new(version, Machine::Q35, &sent, 16).start(dir.path(), "source");
        if pin_all {
            source.set_capabilities(&["rdma-pin-all"]);
            destination.set_capabilities(&["rdma-pin-all"]);
        }
        let uri = format!("rdma:{RXE_ADDRESS}:4444");
        destination.listen(&uri);
        source.migrate(&uri);
        source.wait_completed(Deadline::seconds(20));
        destination.wait_status("prelaunch", Deadline::seconds(5));
        compare(&sent, &arrived).unwrap_or_else(|difference| panic!("{version} over RDMA: {difference:?}"));
    }
}

#[test]
fn the_comparison_finds_a_changed_byte() {
    let dir = scratch();
    let (left, right) = (dir.path().join("left"), dir.path().join("right"));
    for path in [&left, &right] {
        fill(path, 2, Pattern::Mixed { seed: 3 });
    }
    assert!(compare(&left, &right).is_ok());
    let mut bytes = std::fs::read(&right).unwrap();
    for at in [5 * 4096, 6 * 4096 + 4095, 9 * 4096] {
        bytes[at] ^= 1;
    }
    std::fs::write(&right, bytes).unwrap();
    let lengths = (2 << 20, 2 << 20);
    let expected = Difference { lengths, page_runs: vec![5..7, 9..10], pages: 3 };
    assert_eq!(compare(&left, &right), Err(expected));
}
