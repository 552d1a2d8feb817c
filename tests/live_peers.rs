//! A running Linux guest between two QEMUs alone: the control of every live migration, and a test of the guest's own
//! check.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::{fs::OpenOptions, os::unix::fs::FileExt};

use common::{
    Deadline,
    qemu::{Guest, Machine, Version, peers_present},
    scratch,
    writer::{self, Console, Images, Load, WRITER_RAM_KIB, assert_unbroken},
};

const LOAD: Load = Load { mib: 32, pages_per_second: 2000, small: false };
const BOOT: u64 = 300;

fn images() -> Option<Images> {
    if peers_present() { writer::images() } else { None }
}

/// Migrates a guest while it writes, and checks that it continues, intact, at the other end.
fn migrate_live(images: &Images, from: Version, to: Version, machine: Machine) {
    let dir = scratch();
    let consoles =
        ["source", "destination"].map(|name| Console::new(dir.path().join(name).with_extension("console")));
    let guest = |version, name: &str, console| -> Guest {
        writer::guest(images, version, machine, LOAD, &dir.path().join(name).with_extension("ram"), console)
    };
    let mut source = guest(from, "source", &consoles[0]).start(dir.path(), "source");
    let mut destination = guest(to, "destination", &consoles[1]).incoming().start(dir.path(), "destination");
    consoles[0].wait_tick("boot", Deadline::seconds(BOOT), |tick| tick.number >= 3);

    source.migrate(&destination.listen_tcp());
    let info = source.wait_completed_within(10, Deadline::seconds(60));
    assert_eq!(source.status(), "postmigrate");
    destination.wait_status("running", Deadline::seconds(10));
    assert!(info["ram"]["dirty-sync-count"].as_u64().unwrap() >= 2, "no second round: {info}");

    let left = consoles[0].ticks().last().copied().unwrap();
    consoles[1].wait_tick("two passes over the memory that arrived", Deadline::seconds(60), |tick| {
        tick.passes >= left.passes + 3
    });
    let last = assert_unbroken(&[&consoles[0], &consoles[1]]);
    assert!(last.sequence > left.sequence);
}

#[test]
fn a_live_guest_goes_from_qemu_72_to_qemu_72() {
    let Some(images) = images() else { return };
    migrate_live(&images, Version::Qemu72, Version::Qemu72, Machine::PcI440fx72);
    migrate_live(&images, Version::Qemu72, Version::Qemu72, Machine::Microvm);
}

#[test]
fn a_live_guest_goes_from_qemu_100_to_qemu_100() {
    let Some(images) = images() else { return };
    migrate_live(&images, Version::Qemu100, Version::Qemu100, Machine::Q35);
    migrate_live(&images, Version::Qemu100, Version::Qemu100, Machine::Microvm);
}

#[test]
fn a_live_guest_goes_from_the_newest_qemu_to_the_newest() {
    let Some(images) = images() else { return };
    migrate_live(&images, Version::Newest, Version::Newest, Machine::Q35);
    migrate_live(&images, Version::Newest, Version::Newest, Machine::Microvm);
}

#[test]
fn a_live_guest_goes_from_each_qemu_to_each_other() {
    let Some(images) = images() else { return };
    for (from, to) in Version::pairs() {
        migrate_live(&images, from, to, Machine::PcI440fx72);
    }
}

/// The guest detects the effect of a lossy migration: here the test itself corrupts its pages.
#[test]
fn a_spoiled_page_is_found_by_the_guest() {
    let Some(images) = images() else { return };
    let dir = scratch();
    let (console, ram) = (Console::new(dir.path().join("console")), dir.path().join("ram"));
    let load = Load { mib: 32, pages_per_second: 0, small: false };
    let guest = writer::guest(&images, Version::Qemu100, Machine::Q35, load, &ram, &console);
    let _running = guest.start(dir.path(), "guest");
    console.wait_tick("boot", Deadline::seconds(BOOT), |tick| tick.passes >= 1 && tick.bad == 0);

    let memory = OpenOptions::new().read(true).write(true).open(&ram).unwrap();
    // Page 7 of the guest was its eighth write.
    let pages = (0..(WRITER_RAM_KIB as u64) / 4).filter(|page| {
        let mut head = [0; 16];
        memory.read_exact_at(&mut head, page * 4096).unwrap();
        head == *[7_u64.to_le_bytes(), 8_u64.to_le_bytes()].as_flattened()
    });
    let found: Vec<u64> = pages.collect();
    assert_eq!(found.len(), 1, "page 7 is in guest memory once: {found:?}");
    memory.write_all_at(&[0xff], found[0] * 4096 + 4000).unwrap();
    console.wait_tick("the spoiled page", Deadline::seconds(30), |tick| tick.bad > 0);
    assert!(
        console.text().contains("CORRUPT page 7 says index 7 seq 8, expected seq 8; checksum does not fit")
    );
    assert!(std::panic::catch_unwind(|| assert_unbroken(&[&console])).is_err());
}
