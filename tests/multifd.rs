//! Page channels (`multifd`) between QEMU and ramwire, every way and version.
//!
//! By default each combination of version, channels, compression and zero pages is met once somewhere;
//! `RAMWIRE_MULTIFD=all` runs every one.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;

use common::{
    Deadline,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch,
};
use serde_json::{Value, json};

const METHODS: [&str; 3] = ["none", "zlib", "zstd"];
const COUNTS: [u8; 4] = [1, 2, 4, 8];
const MIB: usize = 48;

/// One way to send: QEMU's parameters and ramwire's options alike.
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
        if version == Version::Qemu100 {
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

/// Every combination, or a few in which each value comes up.
fn ways() -> Vec<Way> {
    let mut ways = Vec::new();
    for (at, channels) in COUNTS.into_iter().enumerate() {
        for (which, method) in METHODS.into_iter().enumerate() {
            for (kind, zero) in ["multifd", "legacy", "none"].into_iter().enumerate() {
                // Without compression everything; of the rest what a Latin square picks.
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
fn versions_and_unversioned_machines_understand_each_other() {
    if peers_present() {
        let way = Way { channels: 3, method: "none", zero: "legacy" };
        through_a_folder(Version::Qemu72, Version::Qemu100, Machine::PcI440fx72, way, true);
        through_a_folder(Version::Qemu100, Version::Qemu72, Machine::PcI440fx72, way, true);
        let way = Way { zero: "multifd", ..way };
        through_a_folder(Version::Qemu100, Version::Qemu100, Machine::Microvm, way, true);
    }
}
