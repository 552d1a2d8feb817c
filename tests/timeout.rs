//! `--timeout` and `--retry` on every command that sends, and the guest's state afterwards.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Deadline, ramwire::Ramwire, scratch};

/// Far more than can be sent within the given time.
const RAM: usize = 48 << 20;
const SLOW: [&str; 3] = ["--json", "--max-bandwidth=1M", "--timeout=1"];

fn ram(dir: &Path) -> PathBuf {
    let path = dir.join("ram");
    fs::write(&path, (0..RAM).map(|at| (at / 4096 + at) as u8 | 1).collect::<Vec<_>>()).unwrap();
    path
}

fn receiver(dir: &Path) -> Ramwire {
    Ramwire::start(dir, &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], dir.join("guest"))
}

#[test]
fn a_send_that_is_late_keeps_its_guest_and_says_what_helps() {
    let dir = scratch();
    let block = format!("--ram=m0={}", ram(dir.path()).display());
    let mut receiver = receiver(dir.path());
    let at = receiver.listening();
    let send = [&["send", &at, &block], &SLOW[..]].concat();
    let mut sender = Ramwire::start(dir.path(), &send, "--peer=ramwire");
    assert_eq!(sender.finished(Deadline::seconds(60), 3)["status"], "failed");
    let errors = sender.errors();
    assert!(errors.contains("within 1 s") && errors.contains("raise --max-bandwidth"), "{errors}");
    receiver.failed(Deadline::seconds(60), 3);
}

#[test]
fn a_send_that_is_late_and_to_finish_arrives() {
    let dir = scratch();
    let path = ram(dir.path());
    let block = format!("--ram=m0={}", path.display());
    let mut receiver = receiver(dir.path());
    let at = receiver.listening();
    let send = [&["send", &at, &block, "--timeout-action=finish"], &SLOW[..]].concat();
    let mut sender = Ramwire::start(dir.path(), &send, "--peer=ramwire");
    let out = sender.finished(Deadline::seconds(60), 0);
    assert_eq!(out["rounds"].as_array().map(Vec::len), Some(2), "the first is cut: {out}");
    receiver.finished(Deadline::seconds(60), 0);
    let arrived = fs::read(dir.path().join("guest/ram-000.bin")).unwrap();
    assert!(arrived == fs::read(path).unwrap(), "the guest has changed on its way");
}

#[test]
fn a_relay_that_is_late_leaves_the_guest_at_its_source() {
    let dir = scratch();
    let block = format!("--ram=m0={}", ram(dir.path()).display());
    let mut receiver = receiver(dir.path());
    let relay = ["relay", "--json", "--timeout=1", "--listen=tcp:127.0.0.1:0", "--connect"];
    let mut relay = Ramwire::start(dir.path(), &relay, receiver.listening());
    let at = relay.listening();
    let send = ["send", &at, &block, "--json", "--max-bandwidth=1M"];
    let mut sender = Ramwire::start(dir.path(), &send, "--peer=ramwire");
    assert_eq!(relay.finished(Deadline::seconds(60), 3)["completed"], false);
    let errors = relay.errors();
    assert!(errors.contains("within 1 s") && errors.contains("its source decides"), "{errors}");
    assert_eq!(sender.finished(Deadline::seconds(60), 3)["status"], "failed");
    receiver.failed(Deadline::seconds(60), 3);
}

/// A sender or a relay that has been refused once, and retries.
fn tries(command: &Ramwire, what: &str) {
    let errors = || command.errors();
    Deadline::seconds(60).poll(what, errors, || errors().contains("trying again for 600 s").then_some(()));
}

#[test]
fn a_send_with_retry_waits_until_its_destination_listens() {
    let dir = scratch();
    let path = dir.path().join("ram");
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    let at = format!("unix:{}", dir.path().join("late").display());
    let send = ["send", &at, &format!("--ram=m0={}", path.display()), "--json", "--log=warn", "--retry=600"];
    let mut sender = Ramwire::start(dir.path(), &send, "--peer=ramwire");
    tries(&sender, "a refused send");
    let mut receiver =
        Ramwire::start(dir.path(), &["receive", &at, "--json", "--dir"], dir.path().join("guest"));
    assert_eq!(sender.finished(Deadline::seconds(60), 0)["status"], "completed");
    receiver.finished(Deadline::seconds(60), 0);
    assert!(fs::read(dir.path().join("guest/ram-000.bin")).unwrap() == fs::read(path).unwrap());
}

#[test]
fn a_relay_with_retry_waits_until_its_far_end_listens() {
    let dir = scratch();
    let path = dir.path().join("ram");
    fs::write(&path, vec![7; 1 << 20]).unwrap();
    let far = format!("unix:{}", dir.path().join("late").display());
    let relay =
        ["relay", "--json", "--log=warn", "--retry=600", "--listen=tcp:127.0.0.1:0", "--connect", &far];
    let mut relay = Ramwire::start(dir.path(), &relay, "--peer=ramwire");
    let at = relay.listening();
    let send = ["send", &at, &format!("--ram=m0={}", path.display()), "--json"];
    let mut sender = Ramwire::start(dir.path(), &send, "--peer=ramwire");
    tries(&relay, "a relay whose far end is refused");
    let mut receiver =
        Ramwire::start(dir.path(), &["receive", &far, "--json", "--dir"], dir.path().join("guest"));
    receiver.finished(Deadline::seconds(60), 0);
    assert_eq!(relay.finished(Deadline::seconds(60), 0)["completed"], true);
    assert_eq!(sender.finished(Deadline::seconds(60), 0)["status"], "completed");
    assert!(fs::read(dir.path().join("guest/ram-000.bin")).unwrap() == fs::read(path).unwrap());
}
