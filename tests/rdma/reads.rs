//! A switch to postcopy: the destination reads the missing pages from its source's memory, also while the source's process
//! is stopped.

use std::path::Path;
use std::process::{Child, Command};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::common::{Deadline, ramwire::Ramwire, scratch};
use crate::failover::Restored;

const DEMO: [&str; 9] =
    ["demo", "--json", "--transport", "rdma", "--postcopy", "--downtime-ms", "0", "--working-set", "2M"];

fn demo(dir: &Path, more: &[&str], ram: &str) -> Ramwire {
    let arguments = [&DEMO[..], more, &["--dirty-rate", "1M", "--ram"]].concat();
    Ramwire::start(dir, &arguments, ram)
}

fn whole(report: &Value) {
    assert_eq!((&report["verified"], &report["pages_wrong"]), (&json!(true), &json!(0)), "{report}");
    assert_eq!(
        (&report["transport"], &report["postcopy"]["switched"]),
        (&json!("rdma"), &json!(true)),
        "{report}"
    );
}

/// The process of the demo's destination.
fn destination(of: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// True while a process has a thread of this name.
fn has_thread(pid: u32, name: &str) -> bool {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let names = tasks.flatten().map(|task| std::fs::read_to_string(task.path().join("comm")));
    names.flatten().any(|found| found.trim_end() == name)
}

fn registrations(of: Option<u32>) -> usize {
    let listed = Command::new("rdma").args(["resource", "show", "mr"]).output().expect("rdma").stdout;
    let theirs = of.map_or(String::new(), |pid| format!(" pid {pid} "));
    let lines = String::from_utf8_lossy(&listed).into_owned();
    lines.lines().filter(|line| line.contains("mrn") && line.contains(&theirs)).count()
}

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_missing_pages_are_read_from_the_source_and_every_page_is_there() {
    for more in [
        &[][..],
        &["--postcopy-after", "1"],
        &["--postcopy-after", "1", "--pin-all", "--release-ram"],
        &["--queue-pairs", "4"],
    ] {
        let dir = scratch();
        let report = demo(dir.path(), more, "32M").finished(Deadline::seconds(60), 0);
        whole(&report);
        println!("{more:?}: {}", report["postcopy"]);
        let written = report["pages"]["normal"].as_u64().unwrap();
        assert_eq!(written > 0, more.contains(&"--postcopy-after"), "{report}");
        assert!(report["postcopy"]["faults"].as_u64().unwrap() > 0, "{report}");
        assert_eq!(registrations(None), 0, "nothing is left");
    }
}

/// The source's threads are stopped when its keys are out: its memory is read all the same.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_source_that_is_stopped_holds_no_page_back() {
    let caught = (0..8).any(|attempt| {
        let dir = scratch();
        let mut source = demo(dir.path(), &[], "96M");
        let pid = source.pid();
        let before = || destination(pid).filter(|destination| has_thread(*destination, "ramwire-reads"));
        let reads = Deadline::seconds(30).poll("the switch", || source.errors(), before);
        // Two buffers for each of four queue pairs, and all of six spans.
        let keys_are_out =
            || (!has_thread(reads, "ramwire-reads") || registrations(Some(pid)) >= 14).then_some(());
        Deadline::seconds(20).poll("all keys", || format!("{}", registrations(Some(pid))), keys_are_out);
        signal(pid, Signal::STOP);
        let in_the_middle = has_thread(reads, "ramwire-reads");
        // The thread ends with the last missing page; it does not if a key was not out yet.
        let over = Deadline::seconds(5);
        while has_thread(reads, "ramwire-reads") && !over.is_over() {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let all_came = !has_thread(reads, "ramwire-reads");
        println!("attempt {attempt}: in the middle {in_the_middle}, all came {all_came}");
        signal(pid, Signal::CONT);
        whole(&source.finished(Deadline::seconds(60), 0));
        in_the_middle && all_came
    });
    assert!(caught, "never stopped while pages were read");
}

/// The guest waits for what only the dead source had; both ends are gone from the device.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_source_that_is_killed_ends_the_migration_at_the_other_end() {
    let caught = (0..8).any(|attempt| {
        let dir = scratch();
        let source = demo(dir.path(), &[], "96M");
        let pid = source.pid();
        let before = || destination(pid).filter(|destination| has_thread(*destination, "ramwire-reads"));
        let reads = Deadline::seconds(30).poll("the switch", || source.errors(), before);
        std::thread::sleep(std::time::Duration::from_millis(5 * attempt));
        signal(pid, Signal::KILL);
        let in_the_middle = has_thread(reads, "ramwire-reads");
        let text = || format!("attempt {attempt}: {}", source.errors());
        let ended = || (!has_thread(reads, "ramwire-reads")).then_some(());
        Deadline::seconds(20).poll("the end of the reads", text, ended);
        let gone = || (registrations(None) == 0).then_some(());
        Deadline::seconds(20).poll("nothing is registered", text, gone);
        println!("{}", text());
        in_the_middle
    });
    assert!(caught, "never killed while pages were read");
}

/// Pages are being read when this breaks RDMA: the missing ones are sent over TCP, and the guest's threads get them.
fn goes_on_over_tcp(lose: fn() -> Option<Child>) {
    let caught = (0..8).any(|attempt| {
        let dir = scratch();
        let mut source = demo(dir.path(), &[], "96M");
        let pid = source.pid();
        let before = || destination(pid).filter(|destination| has_thread(*destination, "ramwire-reads"));
        let reads = Deadline::seconds(30).poll("the switch", || source.errors(), before);
        let restored = Restored;
        let removal = lose();
        // Faults are served by another thread, which asks the source; or all pages were here before.
        let ended = || !Path::new(&format!("/proc/{reads}/task")).exists();
        let asks = || match has_thread(reads, "ramwire-faults") {
            true => Some(true),
            false => (ended() || destination(pid).is_none()).then_some(false),
        };
        let asks = Deadline::seconds(100).poll("pages over TCP", || source.errors(), asks);
        whole(&source.finished(Deadline::seconds(100), 0));
        if let Some(mut removal) = removal {
            let removed = || removal.try_wait().unwrap();
            let status = Deadline::seconds(60).poll("rdma link delete: end", String::new, removed);
            assert!(status.success(), "{status}");
        }
        drop(restored);
        println!("attempt {attempt}: over TCP: {asks}");
        asks
    });
    assert!(caught, "nothing was lost while pages were read");
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_reading_goes_on_over_tcp_when_the_device_is_removed() {
    goes_on_over_tcp(|| Some(Command::new("rdma").args(["link", "delete", "rxe0"]).spawn().unwrap()));
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_reading_goes_on_over_tcp_when_the_link_is_down() {
    goes_on_over_tcp(|| {
        let down = Command::new("ip").args(["link", "set", "dummy0", "down"]).status();
        assert!(down.unwrap().success());
        None
    });
}

/// The source may not lock all of its memory at a time: a part is registered when another was read.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_memory_of_which_only_a_part_may_be_locked_is_read_part_by_part() {
    let limited = "ulimit -l 32768; exec setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", limited, "demo", env!("CARGO_BIN_EXE_ramwire")]).args(DEMO);
    command.args(["--dirty-rate", "1M", "--pin-budget", "8M", "--zero", "0", "--ram", "72M"]);
    let output = command.output().unwrap();
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}{errors}");
    whole(&serde_json::from_str(&out).unwrap());
}
