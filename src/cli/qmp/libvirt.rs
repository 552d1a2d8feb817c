//! What libvirt 9.0 makes of `query-migrate`: its own client and parser ask a monitor.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use ramwire::observe::{SharedStatistics, Status};
use ramwire::session::CancelReply;
use serde_json::{Value, json};

use super::listener::{Listener, Place};
use super::{Monitor, Plan, Role, Subject};

/// Its libraries, unpacked by ci/setup.
fn libraries() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = root.join("target/peers/libvirt-9.0");
    let path = std::env::var_os("RAMWIRE_LIBVIRT").map_or(made, PathBuf::from);
    if path.join("libvirt.so.0").exists() {
        return Some(path);
    }
    assert!(std::env::var("CI").as_deref() != Ok("true"), "there is no libvirt 9.0; run ci/setup");
    println!("SKIPPED: there is no libvirt 9.0; run ci/setup");
    None
}

#[test]
fn libvirt_reads_every_state_and_refuses_the_one_that_no_qemu_has() {
    let Some(libraries) = libraries() else { return };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("monitor");
    let statistics = SharedStatistics::default();
    let subject = Subject::new(Role::Source, statistics.clone(), Plan::default(), || CancelReply::Accepted);
    let subject = Arc::new(subject);
    let listener = Listener::at(&Place::Unix(socket.clone())).unwrap();
    let monitor = Monitor::start(listener, Arc::clone(&subject)).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/qmp/libvirt.py");
    let mut asks = Command::new("/usr/bin/python3")
        .arg(script)
        .args([&libraries, &socket])
        .env("LD_LIBRARY_PATH", &libraries)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut order, mut answers) =
        (asks.stdin.take().unwrap(), BufReader::new(asks.stdout.take().unwrap()).lines());
    let mut ask = |status: Status| -> Value {
        statistics.update(|now| {
            (now.status, now.error) = (status, (status == Status::Failed).then(|| "the reason".to_owned()));
            (now.total_time, now.setup_time, now.downtime) = (111_222.0, 3.0, 456.0);
            (now.transferred, now.remaining, now.total) = (123_456_789, 9_876_000, 333_333_000);
            (now.page_size, now.dirty_sync_count) = (4096, 17);
            (now.pages.normal, now.pages.zero) = (30_141, 27_182);
        });
        order.write_all(b"\n").unwrap();
        serde_json::from_str(&answers.next().unwrap().unwrap()).unwrap()
    };
    let refused = ask(Status::None);
    assert!(refused["refused"].as_str().unwrap().contains("missing return status"), "as a QEMU's: {refused}");
    for (status, name) in [
        (Status::Active, "active"),
        (Status::PreSwitchover, "pre-switchover"),
        (Status::Device, "device"),
        (Status::HandingOver, "device"),
        (Status::PostcopyActive, "postcopy-active"),
        (Status::PostcopyPaused, "postcopy-paused"),
        (Status::PostcopyRecover, "postcopy-recover"),
        (Status::Completed, "completed"),
    ] {
        let got = ask(status);
        assert_eq!(got["status"], name, "{got}");
        let mut wanted = vec![111_222, 3, 123_456_789, 9_876_000, 333_333_000, 4096, 17, 30_141, 27_182];
        wanted.extend((status == Status::Completed).then_some(456));
        let numbers = got["numbers"].as_array().unwrap();
        assert!(wanted.iter().all(|wanted| numbers.contains(&json!(wanted))), "{name}: {wanted:?} in {got}");
    }
    for (status, name, error) in [
        (Status::Setup, "setup", ""),
        (Status::Failed, "failed", "the reason"),
        (Status::Cancelled, "cancelled", ""),
    ] {
        let got = ask(status);
        assert_eq!((&got["status"], &got["error"]), (&json!(name), &json!(error)), "{got}");
    }
    let refused = ask(Status::InDoubt);
    assert!(
        refused["refused"].as_str().unwrap().contains("unexpected migration status in in-doubt"),
        "{refused}"
    );
    subject.cancel().unwrap();
    assert_eq!(ask(Status::Active)["status"], "cancelling");
    drop((order, monitor));
    assert!(asks.wait().unwrap().success());
}
