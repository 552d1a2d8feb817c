//! `rdma:` on a soft-RoCE device: the demo, real QEMUs at either end, and what `auto` does where RDMA does not work.
#![cfg(feature = "rdma")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;
use std::process::Command;

use common::{
    Deadline, RXE_ADDRESS,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Version, peers_present},
    ramwire::Ramwire,
    scratch,
};
use serde_json::{Value, json};

const RAM_MIB: usize = 16;
const DEMO: [&str; 8] = ["demo", "--json", "--ram", "16M", "--working-set", "2M", "--dirty-rate", "1M"];

/// Runs the demo to its end, perhaps behind a shell that changes its limits first; its report.
fn demo(shell: &str, arguments: &[&str]) -> Value {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{shell} exec \"$@\""), "demo", env!("CARGO_BIN_EXE_ramwire")]);
    let output = command.args(DEMO).args(arguments).output().unwrap();
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {out}{errors}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&report["verified"], &report["pages_wrong"], &report["digest_compared"]),
        (&json!(true), &json!(0), &json!(true)),
        "{report}"
    );
    report
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_the_demo_goes_over_rdma_and_every_page_arrives() {
    for more in [&[][..], &["--pin-all"], &["--queue-pairs", "4"], &["--pin-all", "--queue-pairs", "4"]] {
        let report = demo("", &[&["--transport", "rdma"], more].concat());
        assert_eq!(report["transport"], "rdma", "{report}");
        assert!(report["pages"]["zero"].as_u64().unwrap() > 0, "a quarter of the pages is zero: {report}");
    }
}

/// A QEMU's way over RDMA.
#[derive(Clone, Copy, Debug)]
struct Way {
    version: Version,
    pin_all: bool,
    return_path: bool,
}

const WAYS: [Way; 5] = [
    Way { version: Version::Qemu72, pin_all: false, return_path: false },
    Way { version: Version::Qemu72, pin_all: true, return_path: false },
    Way { version: Version::Qemu100, pin_all: false, return_path: false },
    Way { version: Version::Qemu100, pin_all: true, return_path: false },
    Way { version: Version::Qemu100, pin_all: false, return_path: true },
];

impl Way {
    fn capabilities(self) -> Vec<&'static str> {
        let wanted = [(self.pin_all, "rdma-pin-all"), (self.return_path, "return-path")];
        wanted.into_iter().filter_map(|(wanted, name)| wanted.then_some(name)).collect()
    }
}

fn memory_file(folder: &Path) -> std::path::PathBuf {
    let manifest: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["state"], "whole", "{manifest}");
    let block = manifest["blocks"].as_array().unwrap().iter().find(|block| block["name"] == "m0").unwrap();
    folder.join(block["file"].as_str().unwrap())
}

fn receive_from_qemu(way: Way, dir: &Path, sent: &Path, folder: &Path) {
    let mut receiver =
        Ramwire::start(dir, &["receive", &format!("rdma:{RXE_ADDRESS}:0"), "--json", "--dir"], folder);
    let mut source = Guest::new(way.version, Machine::Q35, sent, RAM_MIB).start(dir, "source");
    source.set_capabilities(&way.capabilities());
    source.migrate(&receiver.listening());
    source.wait_completed(Deadline::seconds(30));
    let report = receiver.finished(Deadline::seconds(20), 0);
    assert_eq!((&report["arrived"], &report["source"]), (&json!(true), &json!("qemu")), "{way:?}: {report}");
    compare(sent, &memory_file(folder)).unwrap_or_else(|d| panic!("{way:?}: in the folder: {d:?}"));
}

fn send_to_qemu(way: Way, dir: &Path, sent: &Path, folder: &Path, port: u16) {
    let arrived = dir.join("arrived");
    fill(&arrived, RAM_MIB, Pattern::Zero);
    let mut destination =
        Guest::new(way.version, Machine::Q35, &arrived, RAM_MIB).incoming().start(dir, "destination");
    destination.set_capabilities(&way.capabilities());
    let uri = format!("rdma:{RXE_ADDRESS}:{port}");
    destination.listen(&uri);
    let mut arguments = vec!["send", &uri, "--json"];
    arguments.extend(way.pin_all.then_some("--pin-all"));
    arguments.extend(way.return_path.then_some("--return-path"));
    arguments.push("--dir");
    let mut sender = Ramwire::start(dir, &arguments, folder);
    let report = sender.finished(Deadline::seconds(30), 0);
    assert_eq!(report["status"], "completed", "{way:?}: {report}");
    destination.wait_status("prelaunch", Deadline::seconds(10));
    compare(sent, &arrived).unwrap_or_else(|d| panic!("{way:?}: at the destination: {d:?}"));
    destination.execute("cont", json!({}));
    assert_eq!(destination.status(), "running", "{way:?}");
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_r51_r52_a_guest_goes_over_rdma_from_qemu_into_a_folder_and_on_to_qemu() {
    assert!(peers_present(), "nothing is skipped in the guest");
    for (number, way) in (0u16..).zip(WAYS) {
        println!("{way:?}");
        let dir = scratch();
        let (sent, folder) = (dir.path().join("sent"), dir.path().join("guest"));
        fill(&sent, RAM_MIB, Pattern::Mixed { seed: 21 + u64::from(number) });
        receive_from_qemu(way, dir.path(), &sent, &folder);
        send_to_qemu(way, dir.path(), &sent, &folder, 4460 + number);
    }
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_relay_passes_a_guest_on_over_rdma() {
    assert!(peers_present(), "nothing is skipped in the guest");
    let dir = scratch();
    let (sent, arrived) = (dir.path().join("sent"), dir.path().join("arrived"));
    fill(&sent, RAM_MIB, Pattern::Mixed { seed: 31 });
    fill(&arrived, RAM_MIB, Pattern::Zero);
    let version = Version::Qemu100;
    let mut destination =
        Guest::new(version, Machine::Q35, &arrived, RAM_MIB).incoming().start(dir.path(), "destination");
    let uri = format!("rdma:{RXE_ADDRESS}:4480");
    destination.listen(&uri);
    let arguments = ["relay", "--json", "--listen", "tcp:127.0.0.1:0", "--connect"];
    let mut relay = Ramwire::start(dir.path(), &arguments, &uri);
    let mut source = Guest::new(version, Machine::Q35, &sent, RAM_MIB).start(dir.path(), "source");
    source.set_capabilities(&["return-path"]);
    source.migrate(&relay.listening());
    source.wait_completed(Deadline::seconds(30));
    let report = relay.finished(Deadline::seconds(20), 0);
    assert_eq!(report["completed"], true, "{report}");
    destination.wait_status("prelaunch", Deadline::seconds(10));
    compare(&sent, &arrived).unwrap_or_else(|difference| panic!("at the far end: {difference:?}"));

    let refused = Ramwire::start(dir.path(), &["relay", "--listen", &uri, "--connect"], "tcp:127.0.0.1:1")
        .failed(Deadline::seconds(10), 3);
    assert!(refused.contains("NIC") && refused.contains("tcp:"), "{refused}");
}

fn devices() -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_ramwire")).args(["devices", "--json"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn rdma_link(arguments: &str) {
    let status = Command::new("rdma").arg("link").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "rdma link {arguments}");
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_auto_takes_rdma_where_it_works_and_says_why_it_does_not() {
    let report = demo("", &["--transport", "auto"]);
    assert_eq!(report["transport"], "rdma", "{report}");
    let found = devices();
    assert_eq!((&found["usable"], &found["address"]), (&json!(true), &json!(RXE_ADDRESS)), "{found}");
    assert_eq!(found["devices"][0]["ports"][0]["usable"], true, "{found}");

    let limited = "ulimit -l 64; set -- setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock \"$@\";";
    let report = demo(limited, &["--transport", "auto"]);
    let why = report["why"].as_str().unwrap();
    assert!(report["transport"] == "unix" && why.contains("limit is 65536"), "{report}");

    rdma_link("delete rxe0");
    let report = demo("", &["--transport", "auto"]);
    let found = devices();
    rdma_link("add rxe0 type rxe netdev dummy0");
    let why = report["why"].as_str().unwrap();
    assert!(report["transport"] == "unix" && why.contains("no RDMA device"), "{report}");
    assert!(found["usable"] == false && found["why_not"].as_str().unwrap().contains("rxe"), "{found}");
}

/// A small guest by `auto:` from a `send` to a `receive`; what each of them reports.
fn send_by_auto(host: &str, prepare: &str) -> (Value, Value) {
    let dir = scratch();
    let (ram, folder) = (dir.path().join("ram"), dir.path().join("guest"));
    fill(&ram, 8, Pattern::Mixed { seed: 41 });
    let receive = ["receive", &format!("auto:{host}:0"), "--json", "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &receive, &folder);
    let uri = receiver.listening();
    let block = format!("m0={}", ram.display());
    let script = format!("{prepare} \"$0\" send {uri} --json --digest --ram {block}");
    let output = Command::new("sh").args(["-c", &script, env!("CARGO_BIN_EXE_ramwire")]).output().unwrap();
    assert!(output.status.success(), "{output:?}\n{}", receiver.errors());
    let sent = serde_json::from_slice(&output.stdout).unwrap();
    let received = receiver.finished(Deadline::seconds(20), 0);
    compare(&ram, &folder.join("ram-000.bin")).unwrap_or_else(|difference| panic!("{difference:?}"));
    (sent, received)
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_an_auto_address_takes_rdma_where_both_ends_have_it() {
    let (sent, received) = send_by_auto(RXE_ADDRESS, "");
    assert_eq!((&sent["transport"], &received["transport"]), (&json!("rdma"), &json!("rdma")), "{sent}");

    // A source that may lock no memory says so, and comes by TCP to the same listener.
    let limited = "ulimit -l 64; exec setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock";
    let (sent, received) = send_by_auto(RXE_ADDRESS, limited);
    assert_eq!((&sent["transport"], &received["transport"]), (&json!("tcp"), &json!("tcp")), "{sent}");
    assert!(sent["why"].as_str().unwrap().contains("limit is 65536"), "{sent}");

    rdma_link("delete rxe0");
    let (sent, received) = send_by_auto(RXE_ADDRESS, "");
    rdma_link("add rxe0 type rxe netdev dummy0");
    assert_eq!((&sent["transport"], &received["transport"]), (&json!("tcp"), &json!("tcp")), "{sent}");
    for report in [sent, received] {
        assert!(report["why"].as_str().unwrap().contains("no RDMA device"), "{report}");
    }
}

/// With a device this host reaches only others by it, never its loopback.
#[test]
fn an_auto_address_falls_back_to_tcp_and_says_why() {
    let (sent, received) = send_by_auto("127.0.0.1", "");
    assert_eq!((&sent["transport"], &received["transport"]), (&json!("tcp"), &json!("tcp")), "{sent}");
    assert!(sent["why"].as_str().unwrap().starts_with("RDMA did not work: "), "{sent}");
    assert!(!received["why"].as_str().unwrap().is_empty(), "{received}");
}

/// On a machine without a device; with one the other tests say more.
#[test]
fn a_host_says_what_it_has_for_rdma() {
    let found = devices();
    assert!(
        found["usable"] == true || found["why_not"].as_str().is_some_and(|why| !why.is_empty()),
        "{found}"
    );
}
