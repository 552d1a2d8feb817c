//! The client qemu.qmp, by which QEMU's own tests drive it, gets the same messages from ramwire's monitor as from a
//! QEMU's.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::common::{
    self, Deadline,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Version, peers_present},
    ramwire::Ramwire,
};
use super::{Bed, MACHINE, MIB, connect};

/// Where the client is, or a word that the test is skipped.
fn library() -> Option<PathBuf> {
    let made = || common::project_root().join("target/peers/qemu.qmp");
    let path = std::env::var_os("RAMWIRE_QEMU_QMP").map_or_else(made, PathBuf::from);
    if !path.exists() {
        common::skip("there is no qemu.qmp; run ci/setup");
    }
    path.exists().then_some(path)
}

fn drive(library: &Path, socket: &Path, uri: &str, scenario: &str) -> Value {
    let script = common::project_root().join("tests/qmp/drive.py");
    let mut python = Command::new("/usr/bin/python3");
    python.env("PYTHONPATH", library).arg(script).arg(socket).args([uri, scenario]);
    let Output { status, stdout, stderr } = python.output().unwrap();
    let (out, errors) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{scenario}: {status}\n{out}\n{errors}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{scenario}: {error}: {out}"))
}

/// Fields of our answer that have another type than theirs, or are not in theirs.
fn differences(path: &str, ours: &Value, theirs: &Value) -> Vec<String> {
    let kind = |value: &Value| match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        // Whether a rate has a fraction is a matter of the moment.
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            let inner = |(name, value): (&String, &Value)| match theirs.get(name) {
                Some(their) => differences(&format!("{path}.{name}"), value, their),
                None => vec![format!("{path}.{name} is only ours")],
            };
            ours.iter().flat_map(inner).collect()
        }
        _ if kind(ours) == kind(theirs) => vec![],
        _ => vec![format!("{path} is {ours}, theirs {theirs}")],
    }
}

/// The names that libvirt needs where `ram` is.
fn assert_complete(status: &str, now: &Value) {
    for name in ["transferred", "remaining", "total"] {
        assert!(now["ram"][name].is_u64(), "{status}: {now}");
    }
    assert!(now["total-time"].is_u64() && now["setup-time"].is_u64(), "{status}: {now}");
    if status == "completed" {
        assert!(now["downtime"].is_u64(), "{now}");
    }
}

#[test]
fn the_same_script_drives_a_qemu_and_a_ramwire() {
    let (true, Some(library)) = (peers_present(), library()) else { return };
    let bed = Bed::new();
    for (scenario, capabilities) in [
        ("plain", &[][..]),
        ("multifd", &["multifd"]),
        ("cancelled", &[]),
        ("failed", &[]),
        ("postcopy", &["postcopy-ram"]),
    ] {
        let theirs = by_qemu(&bed, &library, scenario, capabilities);
        let ours = by_ramwire(&bed, &library, scenario, capabilities);
        println!("{scenario}: theirs {:?}, ours {:?}", theirs["seen"], ours["seen"]);
        assert_eq!(ours["seen"], theirs["seen"], "{scenario}: the states in order");
        for (status, now) in ours["states"].as_object().unwrap() {
            let their = &theirs["states"][status];
            let found = differences(status, now, their);
            assert!(found.is_empty(), "{scenario}: {found:#?}\nours {now}\ntheirs {their}");
            if !["failed", "cancelled"].contains(&status.as_str()) {
                assert_complete(status, now);
            }
        }
        for answer in ["parameters", "status", "version", "greeting"] {
            let found = differences(answer, &ours[answer], &theirs[answer]);
            assert!(found.is_empty(), "{scenario}: {found:#?}");
        }
        let listed: Vec<_> = theirs["capabilities"].as_array().unwrap().iter().collect();
        for row in ours["capabilities"].as_array().unwrap() {
            let same = |theirs: &&&Value| theirs["capability"] == row["capability"];
            let their = listed.iter().find(same).unwrap_or_else(|| panic!("{row} is only ours"));
            // Those are as the script has switched them, or fixed.
            assert_eq!(&row["state"], &their["state"], "{scenario}: {row}");
        }
    }
}

fn far_end(bed: &Bed, scenario: &str, capabilities: &[&str]) -> (Option<common::qemu::Qemu>, String) {
    if scenario == "failed" {
        // There is no listener at port 1.
        return (None, "tcp:127.0.0.1:1".into());
    }
    let (qemu, uri) = bed.waiting(Version::Qemu100, capabilities);
    (Some(qemu), uri)
}

fn by_qemu(bed: &Bed, library: &Path, scenario: &str, capabilities: &[&str]) -> Value {
    let (_destination, uri) = far_end(bed, scenario, capabilities);
    let ram = bed.path().join("theirs");
    fill(&ram, MIB, Pattern::Mixed { seed: 23 });
    let monitor = bed.path().join("theirs.monitor");
    let option = format!("unix:{},server=on,wait=off", monitor.display());
    let guest = Guest::new(Version::Qemu100, MACHINE, &ram, MIB).with(["-qmp", &option]);
    let mut source = guest.start(bed.path(), "theirs");
    let told = drive(library, &monitor, &uri, scenario);
    source.wait_exit(Deadline::seconds(20));
    told
}

fn by_ramwire(bed: &Bed, library: &Path, scenario: &str, capabilities: &[&str]) -> Value {
    let (destination, uri) = far_end(bed, scenario, capabilities);
    let place = format!("unix:{}", bed.socket().display());
    let start = ["send", "--again", "--qmp", &place, "--dir"];
    let mut sender = Ramwire::start(bed.path(), &start, &bed.folder);
    drop(connect(&mut sender, &bed.socket()));
    let told = drive(library, &bed.socket(), &uri, scenario);
    let status = match scenario {
        "cancelled" => 4,
        "failed" => 3,
        _ => 0,
    };
    let (ended, errors) = sender.ended(Deadline::seconds(20));
    assert_eq!(ended, status, "{scenario}: {errors}");
    if let (0, Some(mut destination)) = (status, destination) {
        destination.wait_completed(Deadline::seconds(20));
        compare(&bed.ram, &destination.ram).unwrap_or_else(|d| panic!("{scenario}: {d:?}"));
    }
    told
}

/// The shell that is shipped with it: a person's lines, and answers as JSON.
#[test]
fn its_shell_looks_at_a_migration_and_cancels_it() {
    let (true, Some(library)) = (peers_present(), library()) else { return };
    let bed = Bed::new();
    let (_destination, uri) = bed.waiting(Version::Qemu100, &[]);
    let (mut sender, client) = bed.send(&uri, &["--max-bandwidth", "1M"]);
    drop(client);
    let mut python = Command::new("/usr/bin/python3");
    python.env("PYTHONPATH", library).env("HOME", bed.path()).args(["-m", "qemu.qmp.qmp_shell"]);
    let mut shell = python.arg(bed.socket()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let lines = b"migrate-set-parameters downtime-limit=77\nquery-migrate-parameters\nmigrate_cancel\n";
    shell.stdin.take().unwrap().write_all(lines).unwrap();
    let out = shell.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(said.contains("\"downtime-limit\": 77") && !said.contains("\"error\""), "{said}");
    assert_eq!(sender.ended(Deadline::seconds(20)).0, 4, "{}", sender.errors());
}
