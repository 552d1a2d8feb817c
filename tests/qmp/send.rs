//! `send --qmp`.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use super::common::{
    Deadline,
    memory::compare,
    qemu::{Version, peers_present},
    qmp::Qmp,
    ramwire::Ramwire,
};
use super::{Bed, connect};

/// The states of a migration that were reported.
fn states(client: &Qmp) -> Vec<&str> {
    let states = client.events.iter().filter(|event| event["event"] == "MIGRATION");
    states.filter_map(|event| event["data"]["status"].as_str()).collect()
}

fn execute(client: &mut Qmp, command: &str, arguments: Value) -> Value {
    client.execute(command, arguments).unwrap()
}

#[test]
fn a_migration_to_any_qemu_is_watched_and_hurried() {
    if !peers_present() {
        return;
    }
    let bed = Bed::new();
    for version in Version::ALL {
        let what = format!("to {version}");
        let (mut destination, uri) = bed.waiting(version, &[]);
        let (mut sender, mut client) = bed.send(&uri, &["--max-bandwidth", "1M"]);
        let mode = bed.socket().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "only its owner may connect");
        let parameters = execute(&mut client, "query-migrate-parameters", json!({}));
        assert_eq!(parameters["max-bandwidth"], 1 << 20, "{what}");
        let deadline = Deadline::seconds(60);
        let active = deadline.poll(
            &what,
            || sender.errors(),
            || {
                let info = execute(&mut client, "query-migrate", json!({}));
                (info["status"] == "active" && info["ram"]["transferred"].as_u64() > Some(0)).then_some(info)
            },
        );
        assert_eq!(active["ram"]["total"].as_u64().map(|total| total >= 64 << 20), Some(true), "{active}");
        execute(&mut client, "migrate-set-parameters", json!({"max-bandwidth": 0}));
        client.wait_event("MIGRATION", |data| data["status"] == "completed").unwrap();
        let passes = client.wait_event("MIGRATION_PASS", |data| data["pass"] == 2);
        assert!(passes.is_ok(), "{what}: {:?}", client.events);
        let states = states(&client);
        assert!(states.ends_with(&["device", "completed"]), "{what}: {states:?}");
        let report = sender.finished(Deadline::seconds(60), 0);
        assert_eq!(report["status"], "completed", "{what}: {report}");
        destination.wait_completed(Deadline::seconds(20));
        compare(&bed.ram, &destination.ram).unwrap_or_else(|d| panic!("{what}: {d:?}"));
        assert!(!bed.socket().exists(), "its path goes with it");
    }
}

#[test]
fn a_cancel_leaves_the_guest_where_it_is() {
    if !peers_present() {
        return;
    }
    let bed = Bed::new();
    for command in ["migrate_cancel", "quit"] {
        let (_destination, uri) = bed.waiting(Version::Qemu100, &[]);
        let (mut sender, mut client) = bed.send(&uri, &["--max-bandwidth", "1M"]);
        client.execute(command, json!({})).unwrap();
        client.wait_event("MIGRATION", |data| data["status"] == "cancelled").unwrap();
        assert_eq!(sender.ended(Deadline::seconds(20)).0, 4, "{command}: {}", sender.errors());
    }
}

/// A client may still cancel a `migrate` that is connecting, and is informed of the end.
#[test]
fn a_cancel_while_nobody_listens_yet_is_told() {
    if !peers_present() {
        return;
    }
    let bed = Bed::new();
    let place = format!("unix:{}", bed.socket().display());
    let start = ["send", "--again", "--retry", "1000", "--qmp", &place, "--dir"];
    let mut sender = Ramwire::start(bed.path(), &start, &bed.folder);
    let mut client = connect(&mut sender, &bed.socket());
    assert_eq!(execute(&mut client, "query-migrate", json!({})), json!({}));
    execute(&mut client, "migrate", json!({"uri": "tcp:127.0.0.1:1"}));
    client.wait_event("MIGRATION", |data| data["status"] == "setup").unwrap();
    execute(&mut client, "migrate_cancel", json!({}));
    client.wait_event("MIGRATION", |data| data["status"] == "cancelled").unwrap();
    assert_eq!(execute(&mut client, "query-migrate", json!({}))["status"], "cancelled");
    assert!(client.execute("migrate", json!({"uri": "tcp:127.0.0.1:1"})).is_err(), "once");
    // It stays for a client that looks later.
    drop(client);
    let mut client = connect(&mut sender, &bed.socket());
    assert_eq!(execute(&mut client, "query-migrate", json!({}))["status"], "cancelled");
    execute(&mut client, "quit", json!({}));
    assert_eq!(sender.ended(Deadline::seconds(20)).0, 4, "{}", sender.errors());
}

/// A monitor that other users reach takes no address that is a command or a file of this host.
#[test]
fn a_monitor_at_a_port_takes_addresses_of_the_network_only() {
    if !peers_present() {
        return;
    }
    let bed = Bed::new();
    let mut sender =
        Ramwire::start(bed.path(), &["send", "--again", "--qmp", "tcp:127.0.0.1:0", "--dir"], &bed.folder);
    let place = Deadline::seconds(20).poll(
        "the monitor",
        || sender.errors(),
        || {
            let errors = sender.errors();
            let (_, rest) = errors.split_once("QMP at ")?;
            rest.split_once('\n').map(|(place, _)| place.to_owned())
        },
    );
    let marker = bed.path().join("made");
    let command = format!("exec:touch {}; cat >/dev/null", marker.display());
    let run = |arguments: &[&str]| {
        let mut ctl = std::process::Command::new(env!("CARGO_BIN_EXE_ramwire"));
        ctl.arg("ctl").arg(&place).args(arguments).output().unwrap()
    };
    assert!(run(&["status"]).status.success());
    let mut socket = std::net::TcpStream::connect(place.strip_prefix("tcp:").unwrap()).unwrap();
    let ask = json!({"execute": "migrate", "arguments": {"uri": command}});
    socket.write_all(format!("{{\"execute\": \"qmp_capabilities\"}}{ask}").as_bytes()).unwrap();
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    let mut said = String::new();
    socket.read_to_string(&mut said).unwrap();
    assert!(said.contains("exec: is taken only by a monitor at a unix: path"), "{said}");
    assert!(!marker.exists());
    sender.terminate();
    assert_eq!(sender.ended(Deadline::seconds(20)).0, 4, "{}", sender.errors());
}
