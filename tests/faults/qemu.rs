//! QEMUs as the peer that dies, in both roles.

use std::path::Path;
use std::time::Duration;

use ramwire::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, SectionKind, Step};
use ramwire::stream::qemu::section::Phase;
use rustix::process::Signal;
use serde_json::json;

use crate::command::signal;
use crate::common::{
    Deadline,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch,
};

mod proxy;

pub(crate) use proxy::{Place, Proxy, When};

const MIB: usize = 32;
const MACHINE: Machine = Machine::Q35;

/// A folder with a guest received from a QEMU; returns its RAM.
pub(crate) fn folder(dir: &Path, version: Version) -> std::path::PathBuf {
    let (ram, folder) = (dir.join("ram"), dir.join("guest"));
    fill(&ram, MIB, Pattern::Mixed { seed: 21 });
    let mut receiver = Ramwire::start(dir, &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], &folder);
    let mut source = Guest::new(version, MACHINE, &ram, MIB).start(dir, "source");
    source.set_parameters(json!({"max-bandwidth": 0}));
    source.migrate(&receiver.listening());
    source.wait_completed(Deadline::seconds(60));
    receiver.finished(Deadline::seconds(30), 0);
    folder
}

fn manifest(folder: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).unwrap()).unwrap()
}

pub(crate) fn state_of(folder: &Path) -> String {
    manifest(folder)["state"].as_str().unwrap().to_owned()
}

/// The folder's state if the guest that is now sent stays: for one in doubt, `--destination-is-dead` has declared that
/// it does not run at its last destination, and its previous state is restored.
pub(crate) fn kept(folder: &Path) -> String {
    let manifest = manifest(folder);
    let before = match manifest["state"].as_str().unwrap() {
        "in-doubt" | "sending" => manifest["otherwise"].as_str().unwrap_or("whole"),
        state => state,
    };
    before.to_owned()
}

pub(crate) fn waiting(dir: &Path, version: Version, name: &str) -> (Qemu, String) {
    let ram = dir.join(name).with_extension("ram");
    fill(&ram, MIB, Pattern::Zero);
    let mut qemu = Guest::new(version, MACHINE, &ram, MIB).incoming().start(dir, name);
    let uri = qemu.listen_tcp();
    (qemu, uri)
}

pub(crate) fn kill_pid(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

#[test]
fn a_qemu_destination_that_dies_before_the_end_leaves_the_guest_to_send_again() {
    if !peers_present() {
        return;
    }
    let version = Version::Qemu100;
    let dir = scratch();
    let folder = folder(dir.path(), version);
    for (at, bytes) in [("connect", 0), ("setup", 60), ("mid-round", 5 << 20)] {
        let (destination, uri) = waiting(dir.path(), version, at);
        let pid = destination.pid();
        let proxy = Proxy::start(&uri, When::Bytes(bytes), move || kill_pid(pid));
        let text = Ramwire::start(dir.path(), &["send", &proxy.uri, "--dir"], &folder)
            .failed(Deadline::seconds(20), 3);
        proxy.end();
        assert!(text.contains("ramwire send: "), "{at}: {text}");
        assert_eq!(state_of(&folder), "whole", "{at}: {text}");
    }
    let (mut destination, uri) = waiting(dir.path(), version, "again");
    Ramwire::start(dir.path(), &["send", &uri, "--json", "--dir"], &folder)
        .finished(Deadline::seconds(30), 0);
    destination.wait_completed(Deadline::seconds(10));
    compare(&dir.path().join("ram"), &destination.ram).unwrap_or_else(|difference| panic!("{difference:?}"));
}

/// Offsets of the last section of RAM and of the byte that commits in the stream that `send` sends to a QEMU.
fn last_places(folder: &Path) -> (u64, u64) {
    let mut last_section = 0;
    let commit = for_each_event(folder, |at, event| {
        if let Event::SectionStart { kind: SectionKind::Ram, phase: Phase::End, .. } = event {
            last_section = at;
        }
    });
    (last_section, commit)
}

/// Around COMMIT the result depends on what had been sent when the destination died; the report matches the folder in
/// any case.
#[test]
fn a_qemu_destination_that_dies_around_commit_leaves_the_guest_or_a_doubt() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        let dir = scratch();
        let folder = folder(dir.path(), version);
        let (switchover, commit) = last_places(&folder);
        assert!(0 < switchover && switchover < commit);
        for (at, bytes) in
            [("switchover", switchover), ("before-commit", commit), ("after-commit", commit + 1)]
        {
            let (destination, uri) = waiting(dir.path(), version, at);
            let pid = destination.pid();
            let proxy = Proxy::start(&uri, When::Bytes(bytes), move || kill_pid(pid));
            let arguments = ["send", &proxy.uri, "--again", "--destination-is-dead", "--dir"];
            let kept = kept(&folder);
            let mut sender = Ramwire::start(dir.path(), &arguments, &folder);
            let (status, text) = sender.ended(Deadline::seconds(20));
            proxy.end();
            let expected = match status {
                3 => kept.as_str(),
                5 => "in-doubt",
                other => panic!("{version}: {at}: status {other}: {text}"),
            };
            println!("{version}: killed at {at} (byte {bytes}): status {status}");
            assert_eq!(state_of(&folder), expected, "{version}: {at}: {text}");
        }
        let (mut destination, uri) = waiting(dir.path(), version, "again");
        let again = ["send", &uri, "--again", "--destination-is-dead", "--json", "--dir"];
        Ramwire::start(dir.path(), &again, &folder).finished(Deadline::seconds(30), 0);
        destination.wait_completed(Deadline::seconds(10));
        compare(&dir.path().join("ram"), &destination.ram).unwrap_or_else(|found| panic!("{found:?}"));
    }
}

#[test]
fn a_qemu_destination_that_dies_after_the_last_byte_is_in_doubt_until_seen_dead() {
    if !peers_present() {
        return;
    }
    let version = Version::Qemu72;
    let dir = scratch();
    let folder = folder(dir.path(), version);
    let (destination, uri) = waiting(dir.path(), version, "late");
    let pid = destination.pid();
    let proxy = Proxy::start(&uri, When::Silence, move || kill_pid(pid));
    let text =
        Ramwire::start(dir.path(), &["send", &proxy.uri, "--dir"], &folder).failed(Deadline::seconds(30), 5);
    proxy.end();
    assert!(text.contains("delete") && text.contains("--destination-is-dead"), "both remedies: {text}");
    assert_eq!(state_of(&folder), "in-doubt", "{text}");
    let (mut destination, uri) = waiting(dir.path(), version, "again");
    let refused =
        Ramwire::start(dir.path(), &["send", &uri, "--dir"], &folder).failed(Deadline::seconds(10), 3);
    assert!(refused.contains("--destination-is-dead"), "{refused}");
    let again = ["send", &uri, "--destination-is-dead", "--json", "--dir"];
    Ramwire::start(dir.path(), &again, &folder).finished(Deadline::seconds(30), 0);
    destination.wait_completed(Deadline::seconds(10));
    compare(&dir.path().join("ram"), &destination.ram).unwrap_or_else(|difference| panic!("{difference:?}"));
}

#[test]
fn a_receiver_that_dies_fails_a_qemu_source_which_migrates_again_at_once() {
    if !peers_present() {
        return;
    }
    let version = Version::Qemu100;
    let dir = scratch();
    let ram = dir.path().join("ram");
    fill(&ram, MIB, Pattern::Mixed { seed: 22 });
    let mut source = Guest::new(version, MACHINE, &ram, MIB).start(dir.path(), "source");
    source.set_capabilities(&["return-path"]);
    source.set_parameters(json!({"max-bandwidth": 0}));
    for (at, bytes) in [("setup", 60), ("mid-round", 5 << 20)] {
        let arguments = ["receive", "tcp:127.0.0.1:0", "--json", "--dir"];
        let mut receiver = Ramwire::start(dir.path(), &arguments, dir.path().join(at));
        let pid = receiver.pid();
        let proxy = Proxy::start(&receiver.listening(), When::Bytes(bytes), move || kill_pid(pid));
        source.migrate(&proxy.uri);
        let info = source.wait_migration(Deadline::seconds(20));
        proxy.end();
        assert_eq!(info["status"], "failed", "{at}: {info}");
        assert_ne!(source.status(), "postmigrate", "{at}");
        assert_eq!(
            state_or_none(&dir.path().join(at)),
            if bytes > 100 { "arriving" } else { "none" },
            "{at}"
        );
    }
    // A folder in which a guest never arrived can be used again.
    let arguments = ["receive", "tcp:127.0.0.1:0", "--json", "--dir"];
    let folder = dir.path().join("mid-round");
    let mut receiver = Ramwire::start(dir.path(), &arguments, &folder);
    source.migrate(&receiver.listening());
    source.wait_completed(Deadline::seconds(30));
    receiver.finished(Deadline::seconds(30), 0);
    compare(&ram, &folder.join("ram-000.bin")).unwrap_or_else(|difference| panic!("{difference:?}"));
}

pub(crate) fn state_or_none(folder: &Path) -> String {
    if folder.join("manifest.json").exists() { state_of(folder) } else { "none".into() }
}

/// Bytes of device state before the byte that commits. For a paused guest they are the same each time; rounds are not.
fn state_before_commit(version: Version, ram: &Path, dir: &Path) -> u64 {
    let file = dir.join("stream");
    let mut source = Guest::new(version, MACHINE, ram, MIB).start(dir, "recorded");
    source.set_parameters(json!({"max-bandwidth": 0}));
    source.migrate(&format!("exec:cat>{}", file.display()));
    source.wait_completed(Deadline::seconds(30));
    let stream = std::fs::read(&file).unwrap();
    let mut parser = IncomingStream::new(IncomingConfig::default());
    let mut at = 0;
    while let Step::Event { consumed, event } = parser.next(&stream[at..]).unwrap() {
        at += consumed;
        if matches!(event, Event::Done) {
            break;
        }
    }
    parser.tail().description().unwrap().eof_at as u64
}

/// The folder's state is whole only for a completely received guest, and incomplete for one without its description.
#[test]
fn a_qemu_source_that_dies_at_any_stage_leaves_a_folder_that_says_how_much_came() {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let ram = dir.path().join("ram");
    fill(&ram, MIB, Pattern::Mixed { seed: 23 });
    for version in Version::ALL {
        let state = state_before_commit(version, &ram, dir.path());
        for (at, when) in [
            ("connect", When::Bytes(0)),
            ("setup", When::Bytes(60)),
            ("mid-round", When::Reaches(Place::MidRound)),
            ("switchover", When::Reaches(Place::Switchover)),
            ("device state", When::Reaches(Place::State(1))),
            ("before COMMIT", When::Reaches(Place::State(state))),
            ("after COMMIT", When::Reaches(Place::State(state + 1))),
            ("after the last byte", When::Bytes(u64::MAX)),
        ] {
            let stage_dir = tempfile::tempdir_in(dir.path()).unwrap();
            let mut source = Guest::new(version, MACHINE, &ram, MIB).start(stage_dir.path(), "source");
            source.set_parameters(json!({"max-bandwidth": 0}));
            let folder = stage_dir.path().join("guest");
            let mut receiver =
                Ramwire::start(stage_dir.path(), &["receive", "tcp:127.0.0.1:0", "--dir"], &folder);
            let pid = source.pid();
            let proxy = Proxy::start(&receiver.listening(), when, move || kill_pid(pid));
            source.migrate(&proxy.uri);
            if at == "connect" {
                // A connection that closes without a byte was no source: the receiver keeps waiting for one.
                let closed = || receiver.errors().contains("it closed without a byte").then_some(());
                Deadline::seconds(60).poll(at, || receiver.errors(), closed);
                signal(receiver.pid(), Signal::TERM);
            }
            let (status, text) = receiver.ended(Deadline::seconds(60));
            proxy.end();
            let state = state_or_none(&folder);
            println!("{version}: source killed at {at}: status {status}, folder {state}: {}", text.trim());
            let expected = match at {
                "connect" => (4, "none"),
                "setup" => (3, "none"),
                "after COMMIT" => (6, "incomplete"),
                "after the last byte" => (0, "whole"),
                // The guest continues at its source or is lost with it: the received part is useless.
                _ => (3, "none"),
            };
            assert_eq!((status, &*state), expected, "{version}: {at}: {text}");
            assert!(status != 3 || text.contains("the stream ended after"), "{version}: {at}: {text}");
            if matches!(status, 0 | 6) {
                compare(&ram, &folder.join("ram-000.bin")).unwrap_or_else(|found| panic!("{at}: {found:?}"));
            }
        }
    }
}

/// A file gets the same stream as a QEMU, except for the return path's commands: OPEN_RETURN_PATH, the greeting's three
/// PINGs, and the one that measures the round trip.
pub(crate) const COMMANDS: u64 = 5 + 4 * 9;

/// The stream that `send` sends, as written to a file.
pub(crate) fn recorded(folder: &Path) -> Vec<u8> {
    let file = folder.with_extension("stream");
    let uri = format!("file:{}", file.display());
    Ramwire::start(folder.parent().unwrap(), &["send", &uri, "--again", "--dir"], folder)
        .failed(Deadline::seconds(30), 0);
    std::fs::read(&file).unwrap()
}

/// Calls `each` for every event of the stream that `send` sends to a QEMU, with its offset. Returns the offset of the
/// byte that ends the sections.
fn for_each_event(folder: &Path, mut each: impl FnMut(u64, &Event<'_>)) -> u64 {
    let stream = recorded(folder);
    let mut parser = IncomingStream::new(IncomingConfig::default());
    let (mut at, mut tail) = (0, None);
    while let Step::Event { consumed, event } = parser.next(&stream[at..]).unwrap() {
        if matches!(event, Event::TailBytes(_)) {
            tail.get_or_insert(at as u64 + COMMANDS);
        }
        each(at as u64 + COMMANDS, &event);
        at += consumed;
        if matches!(event, Event::Done) {
            break;
        }
    }
    let eof = parser.tail().description().unwrap().eof_at as u64;
    tail.unwrap() + eof
}

/// A QEMU that waits for its operator between the pause of its guest and its last pages (for a disk job, for example)
/// sends nothing, for longer than the stall time here.
#[test]
fn a_source_that_holds_its_switchover_is_not_taken_for_a_stalled_one() {
    if !peers_present() {
        return;
    }
    std::thread::scope(|scope| {
        for version in Version::ALL {
            for channels in [0, 2] {
                scope.spawn(move || hold_switchover(version, channels, false));
            }
            scope.spawn(move || hold_switchover(version, 0, true));
        }
    });
}

fn hold_switchover(version: Version, channels: u8, relayed: bool) {
    let what = format!("{version}, {channels} channels, relayed: {relayed}");
    let dir = scratch();
    let (ram, folder) = (dir.path().join("ram"), dir.path().join("guest"));
    fill(&ram, MIB, Pattern::Mixed { seed: 3 });
    let ours = format!("--channels={channels}");
    let arguments = ["receive", "tcp:127.0.0.1:0", &ours, "--stall-timeout", "1", "--json", "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &arguments, &folder);
    let mut place = receiver.listening();
    let mut relay = relayed.then(|| {
        let arguments =
            ["relay", "--stall-timeout", "1", "--json", "--listen", "tcp:127.0.0.1:0", "--connect"];
        let mut relay = Ramwire::start(dir.path(), &arguments, &place);
        place = relay.listening();
        relay
    });
    let mut source = Guest::new(version, MACHINE, &ram, MIB).start(dir.path(), "source");
    source.set_capabilities(&["pause-before-switchover", "return-path"]);
    if channels > 0 {
        source.set_capabilities(&["multifd"]);
        source.set_parameters(json!({"multifd-channels": channels}));
    }
    source.set_parameters(json!({"max-bandwidth": 0}));
    source.migrate(&place);
    Deadline::seconds(60).poll(
        &format!("{what}: the switchover"),
        || receiver.errors(),
        || (source.query_migrate()["status"] == "pre-switchover").then_some(()),
    );
    std::thread::sleep(Duration::from_secs(3));
    source.execute("migrate-continue", json!({"state": "pre-switchover"}));
    source.wait_completed(Deadline::seconds(60));
    relay.as_mut().map(|relay| relay.finished(Deadline::seconds(30), 0));
    let report = receiver.finished(Deadline::seconds(30), 0);
    assert_eq!(report["arrived"], true, "{what}: {report}");
    compare(&ram, &folder.join("ram-000.bin")).unwrap_or_else(|found| panic!("{what}: {found:?}"));
}
