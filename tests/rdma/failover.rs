//! A device that fails while a migration runs: it goes on over TCP.

use std::process::Command;

use serde_json::{Value, json};

use crate::common::{
    Deadline, RXE_ADDRESS,
    memory::{MIB, Pattern, compare, fill},
    ramwire::Ramwire,
    scratch,
};
use crate::memory_file;

const RAM_MIB: usize = 16;

fn run(command: &[&str]) -> bool {
    Command::new(command[0]).args(&command[1..]).status().is_ok_and(|status| status.success())
}

/// The device is there again when this is dropped.
pub(crate) struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        // A link that was down leaves the device without its addresses: it is made anew.
        run(&["rdma", "link", "delete", "rxe0"]);
        run(&["ip", "link", "set", "dummy0", "up"]);
        run(&["rdma", "link", "add", "rxe0", "type", "rxe", "netdev", "dummy0"]);
        Deadline::seconds(20).poll("the device's address", String::new, || has_address().then_some(()));
    }
}

/// The device has the GID of [`RXE_ADDRESS`]; before that nobody connects to it.
fn has_address() -> bool {
    let gids = std::fs::read_dir("/sys/class/infiniband/rxe0/ports/1/gids").into_iter().flatten().flatten();
    let mut gids = gids.filter_map(|gid| std::fs::read_to_string(gid.path()).ok());
    gids.any(|gid| gid.trim().ends_with("ffff:0a09:0001"))
}

/// Packets that the device has sent: one for each page, and their acknowledgements, as both ends use it.
fn packets() -> u64 {
    let count = std::fs::read_to_string("/sys/class/infiniband/rxe0/ports/1/hw_counters/sent_pkts").unwrap();
    count.trim().parse().unwrap()
}

/// Waits until so many packets were sent since there were `before`: far more than for the setup, so pages travel.
fn pages_travel(source: &Ramwire, before: u64, sent: u64) {
    let told = || format!("{} packets; {}", packets() - before, source.errors());
    Deadline::seconds(60).poll("pages travel", told, || (packets() - before >= sent).then_some(()));
}

/// No more went twice than had been sent, and the report says why.
fn lost_once(lost: &Value) {
    println!("{lost}");
    let again = lost["pages_again"].as_u64().unwrap();
    assert!(lost["count"] == json!(1) && again < (RAM_MIB * MIB / 4096) as u64, "{lost}");
    assert_eq!(lost["bytes_again"], json!(again * 4096), "{lost}");
    assert!(lost["last"][0]["why"].as_str().is_some_and(|why| !why.is_empty()), "{lost}");
}

/// Packets after which the device is removed; RAMWIRE_LOSSES: how many such moments, from the first page to the last round.
fn moments() -> Vec<u64> {
    match std::env::var("RAMWIRE_LOSSES").map(|losses| losses.parse::<u64>()) {
        Ok(losses) => (0..losses.unwrap()).map(|loss| 100 + loss * 280).collect(),
        Err(_) => vec![300, 900],
    }
}

/// A guest that writes, and checks itself where it arrives.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_guest_that_writes_goes_on_over_tcp_when_the_device_is_removed() {
    for sent in moments() {
        let (dir, before) = (scratch(), packets());
        let limits = ["--max-bandwidth", "4M", "--timeout", "60", "--timeout-action", "finish"];
        let guest = ["--working-set", "2M", "--dirty-rate", "1M", "--ram", "16M", "--json"];
        let arguments = [&["demo", "--transport", "rdma"], &limits[..], &guest[..], &["--verify"]].concat();
        let mut demo = Ramwire::start(dir.path(), &arguments, "full");
        pages_travel(&demo, before, sent);
        let _restored = Restored;
        // The kernel may wait until nobody uses the device.
        let mut removal = Command::new("rdma").args(["link", "delete", "rxe0"]).spawn().unwrap();
        let report = demo.finished(Deadline::seconds(100), 0);
        assert_eq!((&report["verified"], &report["pages_wrong"]), (&json!(true), &json!(0)), "{report}");
        assert_eq!((&report["transport"], &report["digest_compared"]), (&json!("rdma"), &json!(true)));
        lost_once(&report["lost"]);
        let removed = || removal.try_wait().unwrap();
        let status = Deadline::seconds(60).poll("rdma link delete: end", String::new, removed);
        assert!(status.success(), "{status}");
    }
}

/// Nothing tells either end: the writes are not acknowledged any more.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_guest_whose_link_is_down_goes_on_over_tcp() {
    let (dir, before) = (scratch(), packets());
    let (ram, folder) = (dir.path().join("ram"), dir.path().join("guest"));
    fill(&ram, RAM_MIB, Pattern::Mixed { seed: 62 });
    let address = format!("rdma:{RXE_ADDRESS}:0");
    let arguments =
        ["receive", &address, "--reconnect", "60", "--fallback", "tcp:127.0.0.1:0", "--json", "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &arguments, &folder);
    let (uri, block) = (receiver.listening(), format!("m0={}", ram.display()));
    let told = receiver.errors();
    let fallback =
        told.lines().find_map(|line| line.strip_prefix("listening for connections after the first on "));
    let arguments =
        ["send", &uri, "--reconnect", "60", "--fallback", fallback.unwrap(), "--max-bandwidth", "2M"];
    let more = ["--verify", "fast", "--json", "--ram"];
    let mut sender = Ramwire::start(dir.path(), &[&arguments[..], &more].concat(), block);
    pages_travel(&sender, before, 600);
    let restored = Restored;
    assert!(run(&["ip", "link", "set", "dummy0", "down"]));
    let sent = sender.finished(Deadline::seconds(100), 0);
    let arrived = receiver.finished(Deadline::seconds(60), 0);
    drop(restored);
    assert_eq!((&sent["status"], &arrived["arrived"]), (&json!("completed"), &json!(true)), "{sent}");
    assert_eq!(arrived["verified"], json!(true), "{arrived}");
    compare(&ram, &memory_file(&folder)).unwrap_or_else(|found| panic!("{found:?}"));
    lost_once(&sent["lost-connections"]);
}
