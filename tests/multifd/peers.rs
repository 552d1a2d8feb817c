//! Page channels (`multifd`) between QEMU and ramwire, in both directions and with every version.
//!
//! By default each value of version, channels, compression and zero pages occurs at least once; `RAMWIRE_MULTIFD=all`
//! (`ci/test --all`) runs every one, and through a relay every two values together.
use std::path::Path;

use crate::common::{
    Deadline,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch,
    writer::{self, Console, Images, Load, assert_unbroken},
};
use serde_json::{Value, json};

const METHODS: [&str; 3] = ["none", "zlib", "zstd"];
const COUNTS: [u8; 4] = [1, 2, 4, 8];
const MIB: usize = 48;

/// One configuration for sending: QEMU's parameters and ramwire's options alike.
#[derive(Clone, Copy, Debug)]
struct Way {
    channels: u8,
    method: &'static str,
    /// QEMU 9.0's `zero-page-detection`, and ramwire's `--zero-page`.
    zero: &'static str,
}

impl Way {
    fn set(self, qemu: &mut Qemu, version: Version) {
        qemu.set_capabilities(&["multifd"]);
        let mut parameters = json!({"multifd-channels": self.channels, "multifd-compression": self.method});
        if version != Version::Qemu72 {
            parameters["zero-page-detection"] = json!(self.zero);
        }
        qemu.set_parameters(parameters);
    }

    fn options(self) -> [String; 2] {
        [format!("--channels={}", self.channels), format!("--compression={}", self.method)]
    }
}

fn is_all() -> bool {
    std::env::var("RAMWIRE_MULTIFD").is_ok_and(|value| value == "all")
}

/// Every combination, or a few in which each value occurs.
fn ways() -> Vec<Way> {
    let mut ways = Vec::new();
    for (at, channels) in COUNTS.into_iter().enumerate() {
        for (which, method) in METHODS.into_iter().enumerate() {
            for (kind, zero) in ["multifd", "legacy", "none"].into_iter().enumerate() {
                // Without compression all of them; of the rest those that a Latin square picks.
                let picked = (method == "none" && kind == at % 3) || (at + which + kind) % 6 == 5;
                if is_all() || picked {
                    ways.push(Way { channels, method, zero });
                }
            }
        }
    }
    ways
}

fn ram_file(folder: &Path) -> std::path::PathBuf {
    let text = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(manifest["state"], "whole", "{manifest}");
    let blocks = manifest["blocks"].as_array().unwrap();
    let block = blocks.iter().find(|block| block["name"] == "m0").expect("the block is in the manifest");
    folder.join(block["file"].as_str().unwrap())
}

/// QEMU -> folder -> QEMU, with channels on both legs.
fn through_a_folder(from: Version, to: Version, machine: Machine, way: Way, return_path: bool) {
    let what = format!("{from} to {to}, {}, {way:?}", machine.name());
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let (sent, arrived, folder) = (path("sent"), path("arrived"), path("guest"));
    fill(&sent, MIB, Pattern::Mixed { seed: u64::from(way.channels) });
    fill(&arrived, MIB, Pattern::Zero);
    let options = way.options();
    let receive = ["receive", "tcp:127.0.0.1:0", "--json", &options[0], &options[1], "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &receive, &folder);
    let mut source = Guest::new(from, machine, &sent, MIB).start(dir.path(), "source");
    if return_path {
        source.set_capabilities(&["return-path"]);
    }
    way.set(&mut source, from);
    source.set_parameters(json!({"max-bandwidth": 0}));
    source.migrate(&receiver.listening());
    source.wait_completed(Deadline::seconds(60));
    let report = receiver.finished(Deadline::seconds(30), 0);
    assert_eq!(report["arrived"], true, "{what}: {report}");
    compare(&sent, &ram_file(&folder)).unwrap_or_else(|d| panic!("{what}: in the folder: {d:?}"));
    source.kill();

    let mut destination = Guest::new(to, machine, &arrived, MIB).incoming().start(dir.path(), "destination");
    way.set(&mut destination, to);
    let uri = destination.listen_tcp();
    let zero = format!("--zero-page={}", way.zero);
    let send = ["send", &uri, "--json", &options[0], &options[1], &zero, "--dir"];
    let report = Ramwire::start(dir.path(), &send, &folder).finished(Deadline::seconds(60), 0);
    assert_eq!(report["status"], "completed", "{what}: {report}");
    assert!(report["ram"]["multifd-bytes"].as_u64() > Some(1 << 20), "{what}: {report}");
    destination.wait_completed(Deadline::seconds(10));
    compare(&sent, &arrived).unwrap_or_else(|d| panic!("{what}: at the destination: {d:?}"));
    destination.execute("cont", json!({}));
    assert_eq!(destination.status(), "running", "{what}");
}

#[test]
fn s38_to_s49_every_way_into_a_folder_and_out_of_it_72() {
    if peers_present() {
        for way in ways() {
            through_a_folder(Version::Qemu72, Version::Qemu72, Machine::PcI440fx72, way, way.channels == 2);
        }
    }
}

#[test]
fn s38_to_s49_every_way_into_a_folder_and_out_of_it_100() {
    if peers_present() {
        for way in ways() {
            through_a_folder(Version::Qemu100, Version::Qemu100, Machine::Q35, way, way.channels == 4);
        }
    }
}

#[test]
fn s38_to_s49_every_way_into_a_folder_and_out_of_it_newest() {
    if peers_present() {
        for way in ways() {
            through_a_folder(Version::Newest, Version::Newest, Machine::Q35, way, way.channels == 4);
        }
    }
}

#[test]
fn versions_and_unversioned_machines_understand_each_other() {
    if peers_present() {
        let way = Way { channels: 3, method: "none", zero: "legacy" };
        for (from, to) in Version::pairs() {
            through_a_folder(from, to, Machine::PcI440fx72, way, true);
        }
        let way = Way { zero: "multifd", ..way };
        for version in [Version::Qemu100, Version::Newest] {
            through_a_folder(version, version, Machine::Microvm, way, true);
        }
    }
}

/// A running guest through a relay that has `near` channels towards the source and `far` towards the far end.
fn live_through_a_relay(
    images: &Images,
    version: Version,
    machine: Machine,
    near: Option<Way>,
    far: Option<Way>,
) {
    let what = format!("{version}, {}, {near:?} to {far:?}", machine.name());
    let dir = scratch();
    let path = |name: &str, kind: &str| dir.path().join(format!("{name}.{kind}"));
    let load = Load { mib: 32, pages_per_second: 2000, small: false };
    let guest = |name: &str| {
        let console = Console::new(path(name, "console"));
        (writer::guest(images, version, machine, load, &path(name, "ram"), &console), console)
    };
    let (here, there) = (guest("source"), guest("destination"));
    let mut source = here.0.start(dir.path(), "source");
    let mut destination = there.0.incoming().start(dir.path(), "destination");
    here.1.wait_tick("boot", Deadline::seconds(300), |tick| tick.number >= 3);
    source.set_capabilities(&["return-path"]);
    let mut arguments: Vec<String> = ["relay", "--json"].map(String::from).to_vec();
    if let Some(way) = near {
        way.set(&mut source, version);
        arguments.push(format!("--listen-channels={}", way.channels));
        arguments.push(format!("--listen-compression={}", way.method));
    }
    if let Some(way) = far {
        way.set(&mut destination, version);
        arguments.extend(way.options());
        if way.method == "none" {
            arguments.push("--send-pages=splice".into());
        }
    }
    arguments.extend(["--listen", "tcp:127.0.0.1:0", "--connect"].map(String::from));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut relay = Ramwire::start(dir.path(), &arguments, destination.listen_tcp());
    source.migrate(&relay.listening());
    source.wait_completed_within(12, Deadline::seconds(90));
    let report = relay.finished(Deadline::seconds(20), 0);
    assert_eq!(report["completed"], true, "{what}: {report}");
    let channel_bytes = report["far"]["ram"]["multifd-bytes"].as_u64().unwrap();
    assert_eq!(channel_bytes > 0, far.is_some(), "{what}: {report}");
    let by_reference = report["far"]["splice"]["bytes"].as_u64().unwrap_or(0);
    assert_eq!(by_reference > 0, far.is_some_and(|way| way.method == "none"), "{what}: {report}");
    destination.wait_status("running", Deadline::seconds(10));
    let left = here.1.ticks().last().copied().unwrap();
    there.1.wait_tick("two passes over the memory that arrived", Deadline::seconds(60), |tick| {
        tick.passes >= left.passes + 3
    });
    let last = assert_unbroken(&[&here.1, &there.1]);
    assert!(last.sequence > left.sequence, "{what}");
}

/// The relay's configurations on both sides: `few`, or sixteen in which every pair of values occurs.
fn around_a_relay(
    few: [(Option<Way>, Option<Way>); 3],
    zero: &'static str,
) -> Vec<(Option<Way>, Option<Way>)> {
    if !is_all() {
        return few.to_vec();
    }
    let mut pairs = vec![(few[1].0, None), (None, few[2].1)];
    for (a, near) in COUNTS.into_iter().enumerate() {
        for (b, far) in COUNTS.into_iter().enumerate() {
            // Any two of a, b, a + b and a + 2b determine the other two.
            let way = |channels, method: usize| Some(Way { channels, method: METHODS[method % 3], zero });
            pairs.push((way(near, a + b), way(far, a + 2 * b)));
        }
    }
    pairs
}

const TWO: Way = Way { channels: 2, method: "none", zero: "multifd" };
const FOUR: Way = Way { channels: 4, method: "zstd", zero: "multifd" };

#[test]
fn a_live_guest_goes_through_a_relay_with_channels_on_either_side_72() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    let few = [(Some(TWO), Some(FOUR)), (Some(TWO), None), (None, Some(TWO))];
    for (near, far) in around_a_relay(few, "legacy") {
        live_through_a_relay(&images, Version::Qemu72, Machine::PcI440fx72, near, far);
    }
}

#[test]
fn a_live_guest_goes_through_a_relay_with_channels_on_either_side_100() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    let few = [(Some(FOUR), Some(TWO)), (Some(FOUR), None), (None, Some(TWO))];
    for zero in if is_all() { ["multifd", "legacy", "none"].as_slice() } else { &["multifd"] } {
        for (near, far) in around_a_relay(few, zero) {
            live_through_a_relay(&images, Version::Qemu100, Machine::Q35, near, far);
        }
    }
    live_through_a_relay(&images, Version::Qemu100, Machine::Microvm, Some(TWO), Some(TWO));
}

#[test]
fn a_live_guest_goes_through_a_relay_with_channels_on_either_side_newest() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    let few = [(Some(FOUR), Some(TWO)), (Some(TWO), None), (None, Some(FOUR))];
    for (near, far) in around_a_relay(few, "multifd") {
        live_through_a_relay(&images, Version::Newest, Machine::Q35, near, far);
    }
}

/// A QEMU with channels towards a `receive` that is not configured for them: both ends fail, and no guest is accepted.
#[test]
fn channels_that_one_end_does_not_have_fail_both() {
    if !peers_present() {
        return;
    }
    // Most of the time is waiting, so all cases run in parallel.
    std::thread::scope(|scope| {
        for version in Version::ALL {
            for (theirs, ours) in [(2, 0), (0, 2), (2, 3), (3, 2)] {
                scope.spawn(move || channels_do_not_fit(version, theirs, ours));
            }
        }
    });
}

/// A folder sent with more channels than a QEMU has, or with fewer: it does not arrive, it stays whole, and can be sent
/// with the same number.
#[test]
fn a_folder_sent_by_other_channels_than_a_qemu_has_stays_here() {
    if !peers_present() {
        return;
    }
    std::thread::scope(|scope| {
        for version in Version::ALL {
            for ours in [3, 1] {
                scope.spawn(move || sent_by_other_channels(version, ours));
            }
        }
    });
}

fn sent_by_other_channels(version: Version, ours: u8) {
    let what = format!("{version}: {ours} channels here, 2 there");
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let (sent, arrived, folder) = (path("sent"), path("arrived"), path("guest"));
    fill(&sent, 16, Pattern::Random { seed: 12 });
    fill(&arrived, 16, Pattern::Zero);
    let mut receiver =
        Ramwire::start(dir.path(), &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], &folder);
    let mut source = Guest::new(version, Machine::Q35, &sent, 16).start(dir.path(), "source");
    source.set_capabilities(&["return-path"]);
    source.migrate(&receiver.listening());
    source.wait_completed(Deadline::seconds(60));
    receiver.finished(Deadline::seconds(30), 0);
    source.kill();
    for (at, (channels, status)) in [(ours, 3), (2, 0)].into_iter().enumerate() {
        let name = format!("destination{at}");
        let mut destination =
            Guest::new(version, Machine::Q35, &arrived, 16).incoming().start(dir.path(), &name);
        TWO.set(&mut destination, version);
        let channels = format!("--channels={channels}");
        let send = ["send", &destination.listen_tcp(), "--json", &channels, "--stall-timeout=2", "--dir"];
        let mut sender = Ramwire::start(dir.path(), &send, &folder);
        let (found, said) = sender.ended(Deadline::seconds(100));
        println!("{what}: {said}");
        assert_eq!(found, status, "{what}, {channels}: {said}");
        if status == 0 {
            destination.wait_completed(Deadline::seconds(10));
            compare(&sent, &arrived).unwrap_or_else(|d| panic!("{what}: at the destination: {d:?}"));
        } else {
            ram_file(&folder);
            let why = format!(
                "the first round, with {ours} page channels; the destination may have another number"
            );
            assert!(said.contains(&why) && said.contains("(--channels)"), "{what}: {said}");
        }
    }
}

fn channels_do_not_fit(version: Version, theirs: u8, ours: u8) {
    let what = format!("{version}: {theirs} channels there, {ours} here");
    let dir = scratch();
    let ram = dir.path().join("ram");
    fill(&ram, 16, Pattern::Random { seed: 9 });
    let channels = format!("--channels={ours}");
    let receive = ["receive", "tcp:127.0.0.1:0", &channels, "--stall-timeout", "2", "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &receive, dir.path().join("guest"));
    let mut source = Guest::new(version, Machine::Q35, &ram, 16).start(dir.path(), "source");
    source.set_capabilities(&["return-path"]);
    if theirs > 0 {
        Way { channels: theirs, ..TWO }.set(&mut source, version);
    }
    source.migrate(&receiver.listening());
    let said = receiver.failed(Deadline::seconds(60), 3);
    // A QEMU 7.2 whose channel is refused may crash, or not notice it.
    if version != Version::Qemu72 || theirs <= ours {
        let info = source.wait_migration(Deadline::seconds(60));
        assert_eq!(info["status"], "failed", "{what}: {info}; {said}");
    }
    let manifest = std::fs::read_to_string(dir.path().join("guest/manifest.json")).unwrap_or_default();
    assert!(!manifest.contains("\"whole\""), "{what}: {manifest}");
}
