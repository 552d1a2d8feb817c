//! Encrypted streams: with real QEMUs, and against peers that should not come in.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::{Path, PathBuf};

use common::{
    Deadline,
    certificates::Authority,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch,
};
use serde_json::{Value, json};

const MIB: usize = 32;

fn ram_file(folder: &Path) -> PathBuf {
    let text = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&text).unwrap();
    let blocks = manifest["blocks"].as_array().unwrap();
    let block = blocks.iter().find(|block| block["name"] == "m0").expect("the block is in the manifest");
    folder.join(block["file"].as_str().unwrap())
}

/// A QEMU that encrypts its migration with the certificates of a folder.
fn encrypting(guest: Guest, dir: &Path, certificates: &Path) -> Qemu {
    let (endpoint, name) = if guest.incoming { ("server", "destination") } else { ("client", "source") };
    let object = format!("tls-creds-x509,id=tls0,dir={},endpoint={endpoint}", certificates.display());
    let mut qemu = guest.with(["-object", &object]).start(dir, name);
    qemu.set_parameters(json!({"tls-creds": "tls0", "max-bandwidth": 0}));
    qemu
}

fn multifd(qemu: &mut Qemu, channels: u8) {
    if channels > 0 {
        qemu.set_capabilities(&["multifd"]);
        qemu.set_parameters(json!({"multifd-channels": channels}));
    }
}

/// QEMU -> folder -> QEMU, encrypted on both legs, the first with a return path.
fn there_and_back(version: Version, channels: u8, unix: bool) {
    let what = format!("{version}, {channels} channels, unix: {unix}");
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let (sent, arrived, folder) = (path("sent"), path("arrived"), path("guest"));
    let certificates = Authority::new("the authority").folder(path("certificates"));
    let tls = format!("--tls-dir={}", certificates.display());
    fill(&sent, MIB, Pattern::Mixed { seed: 7 });
    fill(&arrived, MIB, Pattern::Zero);
    let count = format!("--channels={channels}");

    let near = if unix { format!("unix:{}", path("near").display()) } else { "tcp:127.0.0.1:0".into() };
    let receive = ["receive", &near, "--json", &tls, &count, "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &receive, &folder);
    let guest = Guest::new(version, Machine::Q35, &sent, MIB);
    let mut source = encrypting(guest, dir.path(), &certificates);
    source.set_capabilities(&["return-path"]);
    multifd(&mut source, channels);
    if unix {
        source.set_parameters(json!({"tls-hostname": "localhost"}));
    }
    source.migrate(&receiver.listening());
    source.wait_completed(Deadline::seconds(60));
    let report = receiver.finished(Deadline::seconds(30), 0);
    assert_eq!(report["arrived"], true, "{what}: {report}");
    compare(&sent, &ram_file(&folder)).unwrap_or_else(|d| panic!("{what}: in the folder: {d:?}"));
    source.kill();

    let guest = Guest::new(version, Machine::Q35, &arrived, MIB).incoming();
    let mut destination = encrypting(guest, dir.path(), &certificates);
    multifd(&mut destination, channels);
    let far = if unix { destination.listen_unix() } else { destination.listen_tcp() };
    let mut send = vec!["send", &far, "--json", &tls, &count];
    if unix {
        send.push("--tls-hostname=localhost");
    }
    send.push("--dir");
    let report = Ramwire::start(dir.path(), &send, &folder).finished(Deadline::seconds(60), 0);
    assert_eq!(report["status"], "completed", "{what}: {report}");
    destination.wait_completed(Deadline::seconds(10));
    compare(&sent, &arrived).unwrap_or_else(|d| panic!("{what}: at the destination: {d:?}"));
}

#[test]
fn a_guest_goes_encrypted_from_every_qemu_and_to_it() {
    if peers_present() {
        for version in Version::ALL {
            there_and_back(version, 0, version == Version::Qemu100);
        }
    }
}

#[test]
fn page_channels_are_encrypted_each_from_every_qemu_and_to_it() {
    if peers_present() {
        for version in Version::ALL {
            there_and_back(version, 2, version == Version::Newest);
        }
    }
}
