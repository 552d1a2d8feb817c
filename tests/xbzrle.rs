//! Pages as differences (XBZRLE) between QEMU and ramwire, in both directions, with a running guest that checks itself.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{
    Deadline,
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch,
    writer::{self, Console, Images, Load, assert_unbroken},
};
use serde_json::{Value, json};

/// Every page of 24 MiB is written again within a second or two, and each write changes little of it.
const LOAD: Load = Load { mib: 24, pages_per_second: 5000, small: true };
const CACHE: &str = "--xbzrle-cache-size=256M";

struct Bed {
    dir: tempfile::TempDir,
    images: Images,
}

impl Bed {
    fn new() -> Option<Self> {
        let images = peers_present().then(writer::images).flatten()?;
        Some(Self { dir: scratch(), images })
    }

    fn console(&self, name: &str) -> Console {
        Console::new(self.dir.path().join(name).with_extension("console"))
    }

    fn guest(&self, version: Version, machine: Machine, name: &str) -> Guest {
        let ram = self.dir.path().join(name).with_extension("ram");
        writer::guest(&self.images, version, machine, LOAD, &ram, &self.console(name))
    }

    /// A guest that has written for a while on a QEMU that is configured to send deltas, in several rounds.
    fn source(&self, version: Version, machine: Machine) -> Qemu {
        let mut source = self.guest(version, machine, "source").start(self.dir.path(), "source");
        self.console("source").wait_tick("boot", Deadline::seconds(300), |tick| tick.number >= 3);
        source.set_capabilities(&["return-path", "xbzrle"]);
        source.set_parameters(json!({
            "xbzrle-cache-size": 256 << 20, "max-bandwidth": 48 << 20, "downtime-limit": 20,
        }));
        source
    }

    /// The guest continues where it was, and all its checks succeed.
    fn goes_on(&self, destination: &mut Qemu) {
        let consoles = [self.console("source"), self.console("destination")];
        destination.wait_status("running", Deadline::seconds(10));
        let left = consoles[0].ticks().last().copied().unwrap();
        consoles[1].wait_tick("two passes over the memory that arrived", Deadline::seconds(60), |tick| {
            tick.passes >= left.passes + 3
        });
        let last = assert_unbroken(&[&consoles[0], &consoles[1]]);
        assert!(last.sequence > left.sequence);
    }
}

fn counted(cache: &Value, name: &str) -> u64 {
    cache[name].as_u64().unwrap_or_else(|| panic!("{name} is no count: {cache}"))
}

/// Deltas in, deltas out: the relay's memory, its own cache and the far end must agree, otherwise the guest would
/// detect it.
fn through_a_relay(from: Version, to: Version, machine: Machine) {
    let Some(bed) = Bed::new() else { return };
    let mut source = bed.source(from, machine);
    let mut destination =
        bed.guest(to, machine, "destination").incoming().start(bed.dir.path(), "destination");
    let far = destination.listen_tcp();
    let arguments = ["relay", "--json", CACHE, "--listen", "tcp:127.0.0.1:0", "--connect"];
    let mut relay = Ramwire::start(bed.dir.path(), &arguments, &far);
    source.migrate(&relay.listening());
    let info = source.wait_completed_within(12, Deadline::seconds(120));
    let report = relay.finished(Deadline::seconds(20), 0);
    bed.goes_on(&mut destination);

    let (theirs, ours) = (&info["xbzrle-cache"], &report["far"]["xbzrle-cache"]);
    println!("{from} -> relay: {theirs}\nrelay -> {to}: {ours}\n{}", report["received_pages"]);
    let came = report["received_pages"]["delta"].as_u64().unwrap();
    assert!(came > 0 && came <= counted(theirs, "pages"), "{info} {report}");
    let left: u64 = report["far"]["rounds"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|round| round["pages"]["delta"].as_u64())
        .sum();
    assert!(left > 0 && left <= counted(ours, "pages"), "{report}");
    assert!(counted(ours, "bytes") > left * 3 && counted(ours, "cache-size") <= 256 << 20, "{ours}");
}

#[test]
fn s34_to_s37_deltas_go_through_a_relay_between_two_qemu_72() {
    through_a_relay(Version::Qemu72, Version::Qemu72, Machine::PcI440fx72);
}

#[test]
fn s34_to_s37_deltas_go_through_a_relay_between_two_qemu_100() {
    through_a_relay(Version::Qemu100, Version::Qemu100, Machine::Q35);
}

#[test]
fn s34_to_s37_deltas_go_through_a_relay_between_two_of_the_newest_qemu() {
    through_a_relay(Version::Newest, Version::Newest, Machine::Q35);
}

/// A running guest is received into a folder by deltas, and continues from there on another QEMU.
fn through_a_folder(from: Version, to: Version) {
    let Some(bed) = Bed::new() else { return };
    let machine = Machine::PcI440fx72;
    let mut source = bed.source(from, machine);
    let folder = bed.dir.path().join("guest");
    let mut receiver =
        Ramwire::start(bed.dir.path(), &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], &folder);
    source.migrate(&receiver.listening());
    let info = source.wait_completed_within(12, Deadline::seconds(120));
    let report = receiver.finished(Deadline::seconds(60), 0);
    let came = report["pages"]["delta"].as_u64().unwrap();
    println!("{from} -> folder: {} {}", info["xbzrle-cache"], report["pages"]);
    assert!(came > 0 && came <= counted(&info["xbzrle-cache"], "pages"), "{info} {report}");

    let mut destination =
        bed.guest(to, machine, "destination").incoming().start(bed.dir.path(), "destination");
    let uri = destination.listen_tcp();
    Ramwire::start(bed.dir.path(), &["send", &uri, "--json", CACHE, "--dir"], &folder)
        .finished(Deadline::seconds(60), 0);
    bed.goes_on(&mut destination);
}

#[test]
fn s34_a_live_guest_arrives_by_deltas_of_qemu_72_and_goes_on_at_100() {
    through_a_folder(Version::Qemu72, Version::Qemu100);
}

#[test]
fn s34_a_live_guest_arrives_by_deltas_of_qemu_100_and_goes_on_at_72() {
    through_a_folder(Version::Qemu100, Version::Qemu72);
}

#[test]
fn s34_a_live_guest_arrives_by_deltas_of_each_older_qemu_and_goes_on_at_the_newest_and_back() {
    for older in [Version::Qemu72, Version::Qemu100] {
        through_a_folder(older, Version::Newest);
        through_a_folder(Version::Newest, older);
    }
}
