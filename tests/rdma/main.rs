//! `rdma:` on a soft-RoCE device: the demo, real QEMUs at either end, relays, ends that are stopped, and what `auto` does
//! where RDMA does not work.
#![cfg(feature = "rdma")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;

mod auto;
mod failover;
mod network;
mod one_side;
mod reads;
mod relay;
mod stopped;
#[cfg(feature = "tls")]
mod tls;

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
/// However slow the emulated machine is, the guest arrives.
const DEMO: [&str; 10] = [
    "demo",
    "--json",
    "--working-set",
    "2M",
    "--dirty-rate",
    "1M",
    "--timeout",
    "30",
    "--timeout-action",
    "finish",
];

/// Runs the demo to its end, optionally through a shell that changes its limits first; returns its report.
fn demo(shell: &str, arguments: &[&str]) -> Value {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{shell} exec \"$@\""), "demo", env!("CARGO_BIN_EXE_ramwire")]);
    command.args(DEMO).args(arguments);
    if !arguments.contains(&"--ram") {
        command.args(["--ram", "16M"]);
    }
    let output = command.output().unwrap();
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
        // Every round uses the same loop and figures as over TCP, and writes have a histogram of their own.
        assert_eq!(report["dirty_source"].as_str().map(str::is_empty), Some(false), "{report}");
        let rounds = report["round_log"].as_array().unwrap().len() as u64;
        assert_eq!(
            (report["rounds"].as_u64(), report["fence_latency"]["count"].as_u64()),
            (Some(rounds), Some(rounds))
        );
        let writes = &report["write_latency"];
        let figure = |name: &str| writes[name].as_u64().unwrap();
        assert!(figure("count") > 0 && figure("p50_us") > 0, "{report}");
        assert!(
            figure("p50_us") <= figure("p99_us") && figure("p99_us") <= figure("max_us").max(1) * 2,
            "{report}"
        );
    }
    let output = Command::new(env!("CARGO_BIN_EXE_ramwire"))
        // The emulated device is slow: the guest writes faster, but is paused nevertheless.
        .args(["demo", "--ram", "8M", "--transport", "rdma", "--downtime-ms", "2000"])
        .output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    assert!(text.contains("\nwrite ") && text.contains("verified: "), "{text}");
}

/// 48 MiB of RAM, although either end may lock only 32 MiB, including the message buffers.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_budget_for_locked_memory_lets_a_larger_guest_through() {
    let limited = "ulimit -l 32768; set -- setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock \"$@\";";
    let large = ["--transport", "auto", "--ram", "48M", "--zero", "0"];
    let report = demo(limited, &large);
    assert_eq!(report["transport"], "tcp", "without a budget all of RAM is to be locked: {report}");
    let report = demo(limited, &[&large[..], &["--pin-budget", "8M"]].concat());
    assert_eq!(report["transport"], "rdma", "{report}");
}

/// A QEMU's way over RDMA.
#[derive(Clone, Copy, Debug)]
struct Way {
    version: Version,
    pin_all: bool,
    return_path: bool,
}

const WAYS: [Way; 8] = [
    Way { version: Version::Qemu72, pin_all: false, return_path: false },
    Way { version: Version::Qemu72, pin_all: true, return_path: false },
    Way { version: Version::Qemu100, pin_all: false, return_path: false },
    Way { version: Version::Qemu100, pin_all: true, return_path: false },
    Way { version: Version::Qemu100, pin_all: false, return_path: true },
    Way { version: Version::Newest, pin_all: false, return_path: false },
    Way { version: Version::Newest, pin_all: true, return_path: false },
    Way { version: Version::Newest, pin_all: false, return_path: true },
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

/// Memory that can't be registered resident (a file system with DAX) on a device that registers on demand: received
/// from a QEMU and sent to a QEMU.
#[test]
#[ignore = "runs in ci/rxe-guest --kernel odp"]
fn in_odp_guest_a_guest_goes_over_rdma_into_a_folder_with_dax_and_on_to_qemu() {
    assert!(peers_present(), "nothing is skipped in the guest");
    let output = Command::new(env!("CARGO_BIN_EXE_ramwire")).arg("devices").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("on-demand paging: yes"), "{text}");
    for (number, way) in (0u16..).zip([WAYS[0], WAYS[2]]) {
        println!("{way:?}");
        let (dir, dax) = (scratch(), tempfile::tempdir_in("/run/dax").unwrap());
        let (sent, folder) = (dir.path().join("sent"), dax.path().join("guest"));
        fill(&sent, RAM_MIB, Pattern::Mixed { seed: 31 + u64::from(number) });
        receive_from_qemu(way, dir.path(), &sent, &folder);
        send_to_qemu(way, dir.path(), &sent, &folder, 4490 + number);
    }
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
