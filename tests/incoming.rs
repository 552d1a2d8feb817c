//! Guests of QEMUs whose streams hold more, or less, than that of a new machine: through a folder, and through a relay.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{
    Deadline,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch, skip,
};
use serde_json::{Value, json};

const MIB: usize = 32;

/// The two paths from a QEMU to a QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Folder,
    Relay,
}

/// Both ends of a guest's path and the folder between them.
struct Ends {
    source: Qemu,
    destination: Qemu,
    folder: PathBuf,
}

/// Moves the guest by `way`, with a return path, and compares its memory.
fn moved(dir: &Path, way: Way, ends: &mut Ends, what: &str) {
    let Ends { source, destination, folder } = ends;
    source.set_parameters(json!({"max-bandwidth": 0}));
    let far = destination.listen_tcp();
    match way {
        Way::Folder => {
            let arguments = ["receive", "tcp:127.0.0.1:0", "--json", "--dir"];
            let mut receiver = Ramwire::start(dir, &arguments, &*folder);
            source.migrate(&receiver.listening());
            source.wait_completed(Deadline::seconds(60));
            let report = receiver.finished(Deadline::seconds(30), 0);
            assert_eq!(report["state"], "whole", "{what}: {report}");
            let mut sender = Ramwire::start(dir, &["send", &far, "--json", "--dir"], &*folder);
            let report = sender.finished(Deadline::seconds(60), 0);
            assert_eq!(report["status"], "completed", "{what}: {report}");
        }
        Way::Relay => {
            let arguments = ["relay", "--json", "--listen", "tcp:127.0.0.1:0", "--connect"];
            let mut relay = Ramwire::start(dir, &arguments, &far);
            source.migrate(&relay.listening());
            source.wait_completed(Deadline::seconds(60));
            relay.finished(Deadline::seconds(30), 0);
        }
    }
    destination.wait_completed(Deadline::seconds(20));
    compare(&source.ram, &destination.ram).unwrap_or_else(|d| panic!("{what}: {d:?}"));
}

/// Two QEMUs of the same version and machine; `extra` are arguments for the source and for the destination.
fn ends(dir: &Path, version: Version, machine: Machine, extra: [&[String]; 2]) -> Ends {
    let (sent, arrived) = (dir.join("sent"), dir.join("arrived"));
    fill(&sent, MIB, Pattern::Mixed { seed: 21 });
    fill(&arrived, MIB, Pattern::Zero);
    let guest = |ram: &Path, extra: &[String]| Guest::new(version, machine, ram, MIB).with(extra);
    let mut source = guest(&sent, extra[0]).start(dir, "source");
    source.set_capabilities(&["return-path"]);
    let destination = guest(&arrived, extra[1]).incoming().start(dir, "destination");
    Ends { source, destination, folder: dir.join("guest") }
}

/// A disk image, and the arguments that attach it to a guest.
fn disk(path: &Path) -> Vec<String> {
    qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "64M"]);
    [
        "-blockdev",
        &format!("driver=file,filename={},node-name=file0", path.display()),
        "-blockdev",
        "driver=qcow2,file=file0,node-name=disk0",
        "-device",
        "virtio-blk-pci,drive=disk0",
    ]
    .map(String::from)
    .to_vec()
}

fn qemu_img(arguments: &[&str]) {
    run("qemu-img", arguments);
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}

/// The dirty bitmaps of the guest's disk, as its QEMU reports them.
fn bitmaps(qemu: &mut Qemu) -> Value {
    let nodes = qemu.execute("query-named-block-nodes", json!({}));
    let disk = nodes.as_array().unwrap().iter().find(|node| node["node-name"] == "disk0").unwrap();
    disk["dirty-bitmaps"].clone()
}

/// The input of an incremental backup: the bitmap of a disk, with 3 MiB that were written.
#[test]
fn s20_a_persistent_dirty_bitmap_goes_with_its_guest() {
    if !peers_present() {
        return;
    }
    if Command::new("qemu-img").arg("--version").output().is_err() {
        return skip("there is no qemu-img; run ci/setup");
    }
    for version in Version::ALL {
        for way in [Way::Folder, Way::Relay] {
            let what = format!("{version}, {way:?}");
            let dir = scratch();
            let (here, there) = (dir.path().join("here.qcow2"), dir.path().join("there.qcow2"));
            let extra = [disk(&here), disk(&there)];
            qemu_img(&["bitmap", "--add", "-g", "65536", here.to_str().unwrap(), "backup0"]);
            run("qemu-io", &["-f", "qcow2", "-c", "write 5M 3M", here.to_str().unwrap()]);
            let mut ends = ends(dir.path(), version, Machine::Q35, [&extra[0], &extra[1]]);
            ends.source.set_capabilities(&["dirty-bitmaps"]);
            ends.destination.set_capabilities(&["dirty-bitmaps"]);
            let sent = bitmaps(&mut ends.source);
            moved(dir.path(), way, &mut ends, &what);
            let arrived = bitmaps(&mut ends.destination);
            let facts = |bitmaps: &Value| {
                ["name", "granularity", "count", "persistent"].map(|fact| bitmaps[0][fact].clone())
            };
            assert_eq!(facts(&arrived), facts(&sent), "{what}");
            assert_eq!(
                facts(&arrived),
                [json!("backup0"), json!(65536), json!(3 << 20), json!(true)],
                "{what}: {arrived}"
            );
            if way == Way::Folder {
                let early = fs::read(ends.folder.join("early.bin")).unwrap();
                assert!(early.len() < 100, "{what}: {} bytes, START alone", early.len());
            }
        }
    }
}

/// Old machine types, and what they write on a new one.
#[test]
fn s02_s08_a_guest_without_configuration_section_or_footers_goes_its_way() {
    if !peers_present() {
        return;
    }
    let off = |properties: &[&str]| -> Vec<String> {
        properties.iter().flat_map(|off| ["-global".to_owned(), format!("migration.{off}=off")]).collect()
    };
    let neither = off(&["send-configuration", "send-section-footer"]);
    // QEMU 10.0 can't send without a configuration section: it aborts where it describes its devices.
    let cases: [(Version, Machine, Vec<String>, [bool; 2]); 4] = [
        (Version::Qemu72, Machine::PcI440fx23, Vec::new(), [false, false]),
        (Version::Qemu72, Machine::Q35, off(&["send-configuration"]), [false, true]),
        (Version::Qemu72, Machine::Q35, neither, [false, false]),
        (Version::Qemu100, Machine::Q35, off(&["send-section-footer"]), [true, false]),
    ];
    for (version, machine, extra, framing) in cases {
        for way in [Way::Folder, Way::Relay] {
            let what = format!("{version}, {}, {extra:?}, {way:?}", machine.name());
            let dir = scratch();
            let mut ends = ends(dir.path(), version, machine, [&extra, &extra]);
            moved(dir.path(), way, &mut ends, &what);
            ends.destination.execute("cont", json!({}));
            assert_eq!(ends.destination.status(), "running", "{what}");
            if way == Way::Folder {
                let manifest = fs::read(ends.folder.join("manifest.json")).unwrap();
                let manifest: Value = serde_json::from_slice(&manifest).unwrap();
                assert_eq!(
                    [&manifest["configuration"], &manifest["footers"]],
                    framing.map(Value::from).each_ref()
                );
            }
        }
        let dir = scratch();
        let capture = dir.path().join("capture");
        let mut ends = ends(dir.path(), version, machine, [&extra, &extra]);
        ends.source.execute(
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": "return-path", "state": false}]}),
        );
        ends.source.migrate(&format!("exec:cat >{}", capture.display()));
        ends.source.wait_completed(Deadline::seconds(60));
        let mut inspect = Ramwire::start(dir.path(), &["inspect", "--json"], &capture);
        let report = inspect.finished(Deadline::seconds(30), 0);
        assert_eq!([&report["configuration"], &report["footers"]], framing.map(Value::from).each_ref());
        assert_eq!(report["device_state"]["exact"], true, "{version}, {}: {report}", machine.name());
    }
}

/// A destination without postcopy refuses before the source can switch over to it: the guest continues at its source,
/// and can be migrated without the capability.
#[test]
fn a_source_that_may_switch_to_postcopy_is_refused_at_once_and_its_guest_runs_on() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        let what = version.to_string();
        let dir = scratch();
        let ram = dir.path().join("ram");
        fill(&ram, MIB, Pattern::Mixed { seed: 22 });
        let mut source = Guest::new(version, Machine::Q35, &ram, MIB).running().start(dir.path(), "source");
        source.wait_status("running", Deadline::seconds(20));
        source.set_capabilities(&["return-path", "postcopy-ram"]);
        let folder = dir.path().join("guest");
        let arguments = ["receive", "tcp:127.0.0.1:0", "--json", "--dir"];
        let mut ramwire = Ramwire::start(dir.path(), &arguments, &folder);
        source.migrate(&ramwire.listening());
        let info = source.wait_migration(Deadline::seconds(30));
        assert_eq!(info["status"], "failed", "{what}: {info}");
        assert_eq!(source.status(), "running", "{what}: {info}");
        let (status, said) = ramwire.ended(Deadline::seconds(20));
        assert_eq!(status, 3, "{what}: {said}");
        assert!(said.contains("turn postcopy-ram off at the source"), "{what}: {said}");

        source.execute(
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": "postcopy-ram", "state": false}]}),
        );
        let arguments = ["receive", "tcp:127.0.0.1:0", "--json", "--dir"];
        let mut receiver = Ramwire::start(dir.path(), &arguments, &folder);
        source.set_parameters(json!({"max-bandwidth": 0}));
        source.migrate(&receiver.listening());
        source.wait_completed(Deadline::seconds(60));
        let report = receiver.finished(Deadline::seconds(30), 0);
        assert_eq!(report["state"], "whole", "{what}: {report}");
    }
}

/// A command outputs the whole stream and then reports that it was damaged, as gunzip does for a checksum at the end of
/// its input, or fails, or never ends.
#[test]
fn what_a_command_says_at_its_end_decides_whether_its_guest_arrived() {
    let vector = common::project_root().join("tests/vectors/q72-none.gz");
    let dir = scratch();
    let damaged = dir.path().join("damaged.gz");
    let mut bytes = fs::read(&vector).unwrap();
    let checksum = bytes.len() - 8;
    bytes[checksum] ^= 1;
    fs::write(&damaged, bytes).unwrap();
    let (vector, damaged) = (vector.display(), damaged.display());
    let cases = [
        (format!("exec:gunzip -c {damaged} 2>/dev/null"), 3, "exit status: 1"),
        (format!("exec:gunzip -c {vector}; exit 7"), 3, "exit status: 7"),
        (format!("exec:gunzip -c {vector}; kill -9 $$"), 3, "signal: 9"),
        (format!("exec:gunzip -c {vector}; exec sleep 1000"), 3, "--stall-timeout"),
        (format!("exec:gunzip -c {vector}; echo and more"), 0, ""),
        (format!("exec:gunzip -c {vector}"), 0, ""),
    ];
    for (at, (command, status, says)) in cases.iter().enumerate() {
        let folder = dir.path().join(format!("guest{at}"));
        let arguments = ["receive", command, "--stall-timeout", "2", "--json", "--dir"];
        let mut receiver = Ramwire::start(dir.path(), &arguments, &folder);
        let (found, said) = receiver.ended(Deadline::seconds(60));
        assert_eq!(found, *status, "{command}: {said}");
        assert!(said.contains(says), "{command}: {said}");
        // A partly received guest is removed.
        let state = fs::read(folder.join("manifest.json")).ok().map(|manifest| {
            let manifest: Value = serde_json::from_slice(&manifest).unwrap();
            manifest["state"].as_str().unwrap().to_owned()
        });
        assert_eq!(state.as_deref(), (*status == 0).then_some("whole"), "{command}");
    }
}

/// A health probe and a silent scanner connect before the source.
#[test]
fn a_destination_waits_on_when_strangers_connect() {
    let vector = fs::File::open(common::project_root().join("tests/vectors/q72-none.gz")).unwrap();
    let mut stream = Vec::new();
    flate2::read::GzDecoder::new(vector).read_to_end(&mut stream).unwrap();
    let dir = scratch();
    let folder = dir.path().join("guest");
    let arguments = ["receive", "tcp:127.0.0.1:0", "--json", "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &arguments, &folder);
    let place = receiver.listening();
    let call = || TcpStream::connect(place.strip_prefix("tcp:").unwrap()).unwrap();
    drop(call());
    let _silent = call();
    let mut browser = call();
    browser.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let mut source = call();
    source.write_all(&stream).unwrap();
    drop(source);
    let report = receiver.finished(Deadline::seconds(30), 0);
    assert_eq!(report["state"], "whole", "{report}");
    let said = receiver.errors();
    assert!(said.contains("it closed without a byte"), "{said}");
    assert!(said.contains("begins with \"GET \""), "{said}");
}

/// QEMU's own snapshot of a running guest: a stream without the end of RAM, after which the guest continues at its
/// source. The firmware writes at both ends of the memory; between them it is as it was filled.
#[test]
fn s76_a_background_snapshot_of_a_running_qemu_goes_by_a_folder_to_another_qemu() {
    if !peers_present() {
        return;
    }
    for version in [Version::Qemu100, Version::Newest] {
        let dir = scratch();
        // Where pages can be protected.
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let (sent, arrived) = (memory.path().join("sent"), memory.path().join("arrived"));
        fill(&sent, MIB, Pattern::Mixed { seed: 76 });
        fill(&arrived, MIB, Pattern::Zero);
        let guest = |ram: &Path| Guest::new(version, Machine::Pc, ram, MIB);
        let mut source = guest(&sent).running().start(dir.path(), "source");
        let mut destination = guest(&arrived).incoming().start(dir.path(), "destination");
        source.set_capabilities(&["background-snapshot"]);
        let folder = dir.path().join("guest");
        let arguments = ["receive", "tcp:127.0.0.1:0", "--json", "--dir"];
        let mut receiver = Ramwire::start(dir.path(), &arguments, &folder);
        source.migrate(&receiver.listening());
        source.wait_completed(Deadline::seconds(60));
        let report = receiver.finished(Deadline::seconds(30), 0);
        assert_eq!(report["state"], "whole", "{version:?}: {report}");
        assert_eq!(source.status(), "running", "{version:?}: it runs on");
        let far = destination.listen_tcp();
        let mut sender = Ramwire::start(dir.path(), &["send", &far, "--json", "--dir"], &folder);
        let report = sender.finished(Deadline::seconds(60), 0);
        assert_eq!(report["status"], "completed", "{version:?}: {report}");
        destination.wait_completed(Deadline::seconds(20));
        let middle = |path: &Path| fs::read(path).unwrap()[8 << 20..24 << 20].to_vec();
        assert!(middle(&sent) == middle(&arrived), "{version:?}");
    }
}
