//! A running Linux guest whose destination dies at each stage: it continues, intact, on one side only.

use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::common::{
    Deadline,
    qemu::{Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch,
    writer::{self, Console, Images, Load, assert_unbroken},
};
use crate::qemu::{Place, Proxy, When, kill_pid, state_or_none};

const LOAD: Load = Load { mib: 16, pages_per_second: 500, small: false };
const STAGES: [(&str, When); 5] = [
    ("connect", When::Bytes(0)),
    ("setup", When::Reaches(Place::Setup)),
    ("mid-round", When::Reaches(Place::MidRound)),
    ("switchover", When::Reaches(Place::Switchover)),
    ("device state", When::Reaches(Place::State(1))),
];

struct Writer {
    images: Images,
    version: Version,
    machine: Machine,
}

impl Writer {
    fn guest(&self, dir: &Path, name: &str) -> (crate::common::qemu::Guest, Console) {
        let console = Console::new(dir.join(format!("{name}.console")));
        let ram = dir.join(format!("{name}.ram"));
        (writer::guest(&self.images, self.version, self.machine, LOAD, &ram, &console), console)
    }

    fn booted(&self, dir: &Path) -> (Qemu, Console) {
        let (guest, console) = self.guest(dir, "source");
        let mut source = guest.start(dir, "source");
        console.wait_tick("boot", Deadline::seconds(300), |tick| tick.number >= 3);
        source.set_capabilities(&["return-path"]);
        source.set_parameters(json!({"max-bandwidth": 0}));
        (source, console)
    }
}

/// It runs here, and finds its memory correct twice more.
fn runs_on(what: &str, source: &mut Qemu, here: &Console) {
    source.wait_status("running", Deadline::seconds(20));
    let left = here.ticks().last().copied().unwrap();
    here.wait_tick(what, Deadline::seconds(60), |tick| tick.passes >= left.passes + 2);
    assert_unbroken(&[here]);
}

fn failed(what: &str, source: &mut Qemu) {
    let info: Value = source.wait_migration(Deadline::seconds(30));
    assert_eq!(info["status"], "failed", "{what}: {info}");
}

/// QEMU -> relay -> QEMU, and the far end dies.
#[test]
fn a_running_guest_goes_on_at_its_source_whenever_the_far_end_of_a_relay_dies() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    let writer = Writer { images, version: Version::Qemu100, machine: Machine::Q35 };
    let dir = scratch();
    let (mut source, here) = writer.booted(dir.path());
    // Silence: all bytes have passed, and the far end's guest runs until it is killed.
    for (at, when) in STAGES.into_iter().chain([("after the last byte", When::Silence)]) {
        let mut far = writer.guest(dir.path(), &format!("far-{at}")).0.incoming().start(dir.path(), "far");
        let uri = far.listen_tcp();
        let pid = far.pid();
        let proxy = Proxy::start(&uri, when, move || kill_pid(pid));
        let arguments = ["relay", "--json", "--listen", "tcp:127.0.0.1:0", "--connect"];
        let mut relay = Ramwire::start(dir.path(), &arguments, &proxy.uri);
        source.migrate(&relay.listening());
        // Around COMMIT the result depends on what had been sent when the far end died.
        let ends = || {
            let failed = source.query_migrate()["status"] == "failed";
            (failed || relay.errors().contains("in doubt")).then_some(failed)
        };
        let told = Deadline::seconds(60).poll("the source or an operator is told", || relay.errors(), ends);
        assert!(told || !matches!(at, "connect" | "setup" | "mid-round"), "{at}: {}", relay.errors());
        if !told {
            // Only an operator can know: one who has confirmed that the far end is dead reports it to the relay.
            assert_ne!(source.status(), "running", "{at}: the source waits");
            kill_process(Pid::from_raw(relay.pid() as i32).unwrap(), Signal::USR1).unwrap();
        }
        failed(at, &mut source);
        let (status, text) = relay.ended(Deadline::seconds(20));
        proxy.end();
        println!("far end killed at {at}: status {status}: {}", text.trim());
        assert_eq!(status, 3, "{at}: {text}");
        runs_on(at, &mut source, &here);
        drop(far);
    }
}

/// QEMU -> folder, and the receiver dies.
#[test]
fn a_running_guest_goes_on_at_its_source_whenever_its_receiver_dies() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    let writer = Writer { images, version: Version::Qemu72, machine: Machine::PcI440fx72 };
    let dir = scratch();
    let (mut source, here) = writer.booted(dir.path());
    for (at, when) in STAGES {
        let folder = dir.path().join(at);
        let mut receiver = Ramwire::start(dir.path(), &["receive", "tcp:127.0.0.1:0", "--dir"], &folder);
        let pid = receiver.pid();
        let proxy = Proxy::start(&receiver.listening(), when, move || kill_pid(pid));
        source.migrate(&proxy.uri);
        failed(at, &mut source);
        proxy.end();
        let state = state_or_none(&folder);
        println!("receiver killed at {at}: folder {state}");
        assert_ne!(state, "whole", "{at}");
        runs_on(at, &mut source, &here);
    }
    // None of this affects a migration without faults.
    let folder = dir.path().join("whole");
    let mut receiver =
        Ramwire::start(dir.path(), &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], &folder);
    source.migrate(&receiver.listening());
    source.wait_completed_within(10, Deadline::seconds(60));
    receiver.finished(Deadline::seconds(20), 0);
    assert_eq!(state_or_none(&folder), "whole");
}

/// The source's host dies with its guest: nothing is started from a partial guest, and a completely received one runs.
fn source_dies(version: Version, machine: Machine) {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    let writer = Writer { images, version, machine };
    // Silence: all bytes have passed, including COMMIT, and the source waits for an answer.
    for (at, when) in STAGES[1..4].iter().copied().chain([("after COMMIT", When::Silence)]) {
        let dir = scratch();
        let (mut source, here) = writer.booted(dir.path());
        let (guest, there) = writer.guest(dir.path(), "far");
        let mut far = guest.incoming().start(dir.path(), "far");
        let arguments = ["relay", "--listen", "tcp:127.0.0.1:0", "--connect"];
        let mut relay = Ramwire::start(dir.path(), &arguments, far.listen_tcp());
        let pid = source.pid();
        let proxy = Proxy::start(&relay.listening(), when, move || kill_pid(pid));
        source.migrate(&proxy.uri);
        let (status, text) = relay.ended(Deadline::seconds(60));
        proxy.end();
        println!("{version}: source killed at {at}: status {status}: {}", text.trim());
        if when == When::Silence {
            assert_eq!(status, 0, "{at}: {text}");
            far.wait_status("running", Deadline::seconds(10));
            let left = here.ticks().last().copied().unwrap();
            let passes = left.passes + 2;
            there.wait_tick(at, Deadline::seconds(60), |tick| tick.passes >= passes);
            assert_unbroken(&[&here, &there]);
            continue;
        }
        assert_eq!(status, 3, "{at}: {text}");
        assert!(text.contains("the stream ended after"), "{at}: {text}");
        // A QEMU whose migration fails ends; one that received nothing keeps waiting. Neither has run a guest.
        match far.try_execute("query-status", json!({})) {
            Ok(status) if at == "setup" => assert_eq!(status["status"], "inmigrate", "{at}: {status}"),
            _ => drop(far.wait_exit(Deadline::seconds(20))),
        }
        assert!(there.ticks().is_empty(), "{at}: {}", there.text());
    }
}

#[test]
fn what_a_dead_source_has_sent_runs_only_if_it_is_a_whole_guest_72() {
    source_dies(Version::Qemu72, Machine::PcI440fx72);
}

#[test]
fn what_a_dead_source_has_sent_runs_only_if_it_is_a_whole_guest_100() {
    source_dies(Version::Qemu100, Machine::Q35);
}

#[test]
fn what_a_dead_source_has_sent_runs_only_if_it_is_a_whole_guest_newest() {
    source_dies(Version::Newest, Machine::Q35);
}
