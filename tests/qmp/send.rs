//! `send --qmp`.

use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use super::Bed;
use super::common::{
    Deadline,
    memory::compare,
    qemu::{Version, peers_present},
    qmp::Qmp,
};

/// The states that a migration was said to be in.
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
