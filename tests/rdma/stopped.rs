//! An end that is stopped (SIGSTOP) in an open round: its NIC still answers for it.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::memory_file;
use crate::common::{
    Deadline, RXE_ADDRESS,
    memory::{Pattern, compare, fill},
    qemu::{Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch, scribbler,
};

/// Seconds.
const STALL: &str = "2";

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

/// Registrations that the kernel lists, of one process or of all.
fn registrations(of: Option<u32>) -> usize {
    let listed = Command::new("rdma").args(["resource", "show", "mr"]).output().expect("rdma").stdout;
    let theirs = of.map_or(String::new(), |pid| format!(" pid {pid} "));
    String::from_utf8_lossy(&listed)
        .lines()
        .filter(|line| line.contains("mrn") && line.contains(&theirs))
        .count()
}

fn receiver(dir: &Path, folder: &Path) -> Ramwire {
    let address = format!("rdma:{RXE_ADDRESS}:0");
    Ramwire::start(dir, &["receive", &address, "--stall-timeout", STALL, "--dir"], folder)
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_ramwire_that_is_stopped_in_a_round_ends_the_other_end_in_seconds() {
    for source_stops in [true, false] {
        let dir = scratch();
        let (ram, folder) = (dir.path().join("ram"), dir.path().join("guest"));
        let before = dir.path().join("before");
        fill(&ram, 8, Pattern::Mixed { seed: 61 });
        std::fs::copy(&ram, &before).unwrap();
        let mut receiver = receiver(dir.path(), &folder);
        let (uri, block) = (receiver.listening(), format!("m0={}", ram.display()));
        // The first round stays open for seconds.
        let arguments = ["send", &uri, "--max-bandwidth", "1M", "--stall-timeout", STALL, "--ram"];
        let mut sender = Ramwire::start(dir.path(), &arguments, block);
        // The buffers of the connection and of the return path are four; guest memory is additional.
        let registered = || (registrations(Some(receiver.pid())) > 4).then_some(());
        Deadline::seconds(20).poll("pages travel", || sender.errors(), registered);
        let (stopped, lives) =
            if source_stops { (&mut sender, &mut receiver) } else { (&mut receiver, &mut sender) };
        signal(stopped.pid(), Signal::STOP);
        let (status, text) = lives.ended(Deadline::seconds(12));
        println!("source stopped: {source_stops}: {text}");
        let doing = if source_stops { "serving a round of pages" } else { "writing pages" };
        assert!(text.contains(doing) && text.contains("--stall-timeout") && status == 3, "{status}: {text}");
        assert_eq!(registrations(Some(lives.pid())), 0);
        signal(stopped.pid(), Signal::CONT);
        let (status, text) = stopped.ended(Deadline::seconds(10));
        assert_eq!(status, 3, "{text}");
        assert_eq!(registrations(None), 0, "nothing is left");
        compare(&before, &ram).unwrap_or_else(|difference| panic!("the source's memory: {difference:?}"));
    }
}

/// Its first pass takes seconds, in rounds without a pause between them. With pin-all they have no message except their
/// end, so it will be stopped in one of them.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_qemu_that_is_stopped_in_a_round_ends_its_destination_in_seconds() {
    assert!(peers_present(), "nothing is skipped in the guest");
    let dir = scratch();
    let mut guest = scribbler::guest(Version::Qemu100, Machine::Q35, dir.path(), "source").running();
    // With pin-all a QEMU writes zero pages too.
    guest.ram_kib = 128 << 10;
    fill(&guest.ram, 128, Pattern::Zero);
    let mut source = guest.start(dir.path(), "source");
    scribbler::wait_until_it_writes(&source.ram, Deadline::seconds(20));
    source.set_capabilities(&["rdma-pin-all"]);
    source.set_parameters(json!({"max-bandwidth": 0}));
    let in_a_round = (0..8).any(|attempt| {
        let folder = dir.path().join(format!("guest-{attempt}"));
        let mut receiver = receiver(dir.path(), &folder);
        source.migrate(&receiver.listening());
        // Guest memory, in addition to the buffers of the connection.
        let registered = || (registrations(Some(receiver.pid())) > 2).then_some(());
        Deadline::seconds(20).poll("pages travel", || receiver.errors(), registered);
        std::thread::sleep(Duration::from_millis(300 + 70 * attempt));
        signal(source.pid(), Signal::STOP);
        let text = receiver.failed(Deadline::seconds(12), 5);
        println!("QEMU stopped: {text}");
        assert!(text.contains("--stall-timeout"), "{text}");
        assert_eq!(registrations(Some(receiver.pid())), 0);
        signal(source.pid(), Signal::CONT);
        assert_eq!(source.wait_migration(Deadline::seconds(20))["status"], "failed");
        source.wait_status("running", Deadline::seconds(10));
        scribbler::wait_until_it_writes(&source.ram, Deadline::seconds(10));
        // It reports its failure before it has released everything.
        let count = || registrations(None).to_string();
        let none = || (registrations(None) == 0).then_some(());
        Deadline::seconds(10).poll("nothing is registered", count, none);
        text.contains("serving a round of pages")
    });
    assert!(in_a_round, "never stopped in an open round");
    is_waited_for_in_a_long_round(&mut source, dir.path());
}

/// The last round alone takes longer than the stall timeout, and with pin-all it contains no message.
fn is_waited_for_in_a_long_round(source: &mut Qemu, dir: &Path) {
    let (folder, address) = (dir.join("whole"), format!("rdma:{RXE_ADDRESS}:0"));
    let arguments = ["receive", &address, "--stall-timeout", "1", "--json", "--dir"];
    let mut receiver = Ramwire::start(dir, &arguments, &folder);
    source.set_parameters(json!({"downtime-limit": 60_000}));
    source.migrate(&receiver.listening());
    let info = source.wait_completed(Deadline::seconds(40));
    let report = receiver.finished(Deadline::seconds(20), 0);
    println!("a last round of {} ms, which shows nothing below 1000", info["downtime"]);
    assert_eq!(report["arrived"], true, "{report}");
    compare(&source.ram, &memory_file(&folder)).unwrap_or_else(|difference| panic!("{difference:?}"));
}

/// A QEMU that waits for its operator between the pause of its guest and its last pages is silent for longer than the
/// stall time, outside of any round.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_qemu_that_holds_its_switchover_is_not_taken_for_a_stalled_one() {
    assert!(peers_present(), "nothing is skipped in the guest");
    let dir = scratch();
    let mut guest = scribbler::guest(Version::Qemu100, Machine::Q35, dir.path(), "source").running();
    guest.ram_kib = 16 << 10;
    fill(&guest.ram, 16, Pattern::Zero);
    let mut source = guest.start(dir.path(), "source");
    scribbler::wait_until_it_writes(&source.ram, Deadline::seconds(20));
    source.set_capabilities(&["pause-before-switchover", "return-path"]);
    source.set_parameters(json!({"max-bandwidth": 0, "downtime-limit": 10_000}));
    let (folder, address) = (dir.path().join("guest"), format!("rdma:{RXE_ADDRESS}:0"));
    let arguments = ["receive", &address, "--stall-timeout", "1", "--json", "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &arguments, &folder);
    source.migrate(&receiver.listening());
    Deadline::seconds(60).poll(
        "the switchover",
        || receiver.errors(),
        || (source.query_migrate()["status"] == "pre-switchover").then_some(()),
    );
    // Three times the stall time, and more than ten times the interval between checks of the connection.
    std::thread::sleep(Duration::from_secs(3));
    source.execute("migrate-continue", json!({"state": "pre-switchover"}));
    source.wait_completed(Deadline::seconds(60));
    let report = receiver.finished(Deadline::seconds(30), 0);
    assert_eq!(report["arrived"], true, "{report}");
    compare(&source.ram, &memory_file(&folder)).unwrap_or_else(|difference| panic!("{difference:?}"));
}
