//! `ramwire receive` and `ramwire send` between QEMUs: a guest is stored in a folder on its way.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;

use common::{
    Deadline,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Version, peers_present},
    ramwire::Ramwire,
    scratch,
};
use serde_json::json;

/// File in the folder that holds RAM block `name`.
fn ram_file(folder: &Path, name: &str) -> std::path::PathBuf {
    let text = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(manifest["state"], "whole", "{manifest}");
    let blocks = manifest["blocks"].as_array().unwrap();
    let block = blocks.iter().find(|block| block["name"] == name).expect("the block is in the manifest");
    folder.join(block["file"].as_str().unwrap())
}

/// QEMU `from` -> folder -> QEMU `to`: the bytes are equal at each step, and both sides complete.
fn through_a_folder(from: Version, to: Version, machine: Machine, mib: usize, pattern: Pattern, rp: bool) {
    let what = format!("{from} to {to}, {}, {mib} MiB, return path {rp}", machine.name());
    let dir = scratch();
    let (sent, arrived, folder) =
        (dir.path().join("sent"), dir.path().join("arrived"), dir.path().join("guest"));
    fill(&sent, mib, pattern);
    fill(&arrived, mib, Pattern::Zero);

    let mut receiver =
        Ramwire::start(dir.path(), &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], &folder);
    let mut source = Guest::new(from, machine, &sent, mib).start(dir.path(), "source");
    if rp {
        source.set_capabilities(&["return-path"]);
    }
    source.set_parameters(json!({"max-bandwidth": 0}));
    source.migrate(&receiver.listening());
    source.wait_completed(Deadline::seconds(60));
    let report = receiver.finished(Deadline::seconds(30), 0);
    assert_eq!((&report["arrived"], &report["source"]), (&json!(true), &json!("qemu")), "{what}: {report}");
    compare(&sent, &ram_file(&folder, "m0")).unwrap_or_else(|d| panic!("{what}: in the folder: {d:?}"));
    let manifest = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
    let shown = from != Version::Qemu72 && machine == Machine::Microvm;
    assert_eq!(manifest.contains("\"peer_style\": \"qemu-10.0\""), shown, "{what}: {manifest}");
    source.kill();

    let mut destination = Guest::new(to, machine, &arrived, mib).incoming().start(dir.path(), "destination");
    let uri = destination.listen_tcp();
    let mut sender = Ramwire::start(dir.path(), &["send", &uri, "--json", "--dir"], &folder);
    let report = sender.finished(Deadline::seconds(60), 0);
    assert_eq!(report["status"], "completed", "{what}: {report}");
    destination.wait_completed(Deadline::seconds(10));
    compare(&sent, &arrived).unwrap_or_else(|d| panic!("{what}: at the destination: {d:?}"));
    destination.execute("cont", json!({}));
    assert_eq!(destination.status(), "running", "{what}");

    let mut again = Ramwire::start(dir.path(), &["send", &uri, "--json", "--dir"], &folder);
    let refusal = again.failed(Deadline::seconds(10), 3);
    assert!(refusal.contains("--resend"), "{what}: {refusal}");
}

#[test]
fn every_machine_rests_in_a_folder_and_goes_on() {
    if peers_present() {
        for version in Version::ALL {
            for machine in Machine::ALL {
                through_a_folder(version, version, machine, 64, Pattern::Mixed { seed: 11 }, false);
            }
        }
    }
}

/// The RAM of both QEMUs is one file (`share=on`): it is not sent, and everything else is.
#[test]
fn shared_ram_stays_where_it_is_under_ignore_shared() {
    if !peers_present() {
        return;
    }
    for (from, to) in Version::pairs() {
        let what = format!("{from} to {to}");
        let dir = scratch();
        let (ram, before, folder) =
            (dir.path().join("ram"), dir.path().join("before"), dir.path().join("guest"));
        fill(&ram, 64, Pattern::Random { seed: 9 });
        std::fs::copy(&ram, &before).unwrap();
        let machine = Machine::PcI440fx72;
        let start = |name| {
            let mut source = Guest::new(from, machine, &ram, 64).start(dir.path(), name);
            source.set_capabilities(&["x-ignore-shared"]);
            source
        };

        let receive = ["receive", "tcp:127.0.0.1:0", "--json", "--dir"];
        let mut unaware = Ramwire::start(dir.path(), &receive, dir.path().join("unaware"));
        let mut source = start("refused");
        source.migrate(&unaware.listening());
        let refusal = unaware.failed(Deadline::seconds(20), 5);
        assert!(refusal.contains("say which of") && refusal.contains("m0"), "{what}: {refusal}");
        source.kill();

        let mut source = start("source");
        let shared = ["receive", "tcp:127.0.0.1:0", "--json", "--ignore-shared", "m0", "--dir"];
        let mut receiver = Ramwire::start(dir.path(), &shared, &folder);
        source.migrate(&receiver.listening());
        source.wait_completed(Deadline::seconds(60));
        let report = receiver.finished(Deadline::seconds(30), 0);
        assert_eq!(report["arrived"], true, "{what}: {report}");
        assert!(
            report["bytes_received"].as_u64().unwrap() < 16 << 20,
            "{what}: 64 MiB did not travel: {report}"
        );
        let block = report["blocks"].as_array().unwrap().iter().find(|block| block["name"] == "m0").unwrap();
        assert_eq!((&block["ignored"], &block["file"]), (&json!(true), &json!("")), "{what}: {block}");
        source.kill();

        // The same through a relay, which needs no option for it: blocks that are not received are not sent.
        let mut far = Guest::new(to, machine, &ram, 64).incoming().start(dir.path(), "far");
        far.set_capabilities(&["x-ignore-shared"]);
        let relay = ["relay", "--json", "--listen", "tcp:127.0.0.1:0", "--connect"];
        let mut relay = Ramwire::start(dir.path(), &relay, far.listen_tcp());
        let mut near = start("near");
        near.set_capabilities(&["return-path"]);
        near.migrate(&relay.listening());
        near.wait_completed(Deadline::seconds(60));
        assert_eq!(relay.finished(Deadline::seconds(30), 0)["completed"], true, "{what}: through a relay");
        far.wait_completed(Deadline::seconds(10));
        compare(&before, &ram).unwrap_or_else(|d| panic!("{what}: through a relay: {d:?}"));
        near.kill();
        far.kill();

        let mut destination = Guest::new(to, machine, &ram, 64).incoming().start(dir.path(), "destination");
        destination.set_capabilities(&["x-ignore-shared"]);
        let uri = destination.listen_tcp();
        let mut sender = Ramwire::start(dir.path(), &["send", &uri, "--json", "--dir"], &folder);
        let report = sender.finished(Deadline::seconds(60), 0);
        assert_eq!(report["status"], "completed", "{what}: {report}");
        destination.wait_completed(Deadline::seconds(10));
        compare(&before, &ram).unwrap_or_else(|d| panic!("{what}: {d:?}"));
        destination.execute("cont", json!({}));
        assert_eq!(destination.status(), "running", "{what}");
    }
}

#[test]
fn a_folder_carries_a_guest_between_versions() {
    if peers_present() {
        for (from, to) in Version::pairs() {
            through_a_folder(from, to, Machine::PcI440fx72, 32, Pattern::Random { seed: 5 }, false);
        }
    }
}

#[test]
fn sizes_from_16_to_512_mib_zero_and_filled() {
    if peers_present() {
        for version in Version::ALL {
            through_a_folder(version, version, Machine::Q35, 16, Pattern::Random { seed: 1 }, false);
            through_a_folder(version, version, Machine::Q35, 512, Pattern::Zero, false);
        }
        for version in [Version::Qemu100, Version::Newest] {
            through_a_folder(version, version, Machine::Pc, 512, Pattern::Mixed { seed: 2 }, true);
        }
    }
}
