//! `--send-pages zerocopy` when the kernel refuses: on the loopback, beyond the limit on locked memory, with
//! compression. (When it works: `ci/zero-copy`.)

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::{
    Deadline,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Version, peers_present},
    ramwire::Ramwire,
    scratch,
};

const MIB: usize = 16;

/// Sends a file to a waiting QEMU, with `through` before the command; returns the zero-copy part of the report.
fn send(dir: &Path, version: Version, through: &[&str]) -> Value {
    send_by("zerocopy", dir, version, through)["zero-copy"].take()
}

/// The same for any method of sending pages; returns the report.
pub(crate) fn send_by(sending: &str, dir: &Path, version: Version, through: &[&str]) -> Value {
    let (sent, arrived) = (dir.join("sent"), dir.join("arrived"));
    fill(&sent, MIB, Pattern::Mixed { seed: 4 });
    fill(&arrived, MIB, Pattern::Zero);
    let folder = dir.join("guest");
    let receive = ["receive", "tcp:127.0.0.1:0", "--json", "--dir"];
    let mut receiver = Ramwire::start(dir, &receive, &folder);
    let mut source = Guest::new(version, Machine::Microvm, &sent, MIB).start(dir, "source");
    source.migrate(&receiver.listening());
    source.wait_completed(Deadline::seconds(60));
    receiver.finished(Deadline::seconds(30), 0);
    let mut destination =
        Guest::new(version, Machine::Microvm, &arrived, MIB).incoming().start(dir, "destination");
    destination.set_capabilities(&["multifd"]);
    destination.set_parameters(serde_json::json!({"multifd-channels": 2}));
    let uri = destination.listen_tcp();
    let output = Command::new(through[0])
        .args(&through[1..])
        .arg(env!("CARGO_BIN_EXE_ramwire"))
        .args([
            "send",
            &uri,
            "--json",
            "--channels=2",
            "--send-pages",
            sending,
            "--peer",
            version.peer(),
            "--dir",
        ])
        .arg(&folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    destination.wait_completed(Deadline::seconds(10));
    compare(&sent, &arrived).unwrap_or_else(|difference| panic!("{version}: {difference:?}"));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_loopback_copies_so_it_is_given_up_and_said() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        let dir = scratch();
        let found = send(dir.path(), version, &["env"]);
        assert!(found["copied"].as_u64() > Some(0), "{found}");
        assert_eq!(found["released"], found["sends"], "{found}");
        assert!(found["off"].as_str().is_some_and(|why| why.contains("loopback")), "{found}");
    }
}

/// A process that may lock no memory: all pages are sent by copies, and the report names the limit.
#[test]
fn without_memory_to_lock_it_is_given_up_and_said() {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let poor =
        ["prlimit", "--memlock=4096:4096", "setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"];
    let may_drop = Command::new(poor[0]).args(&poor[1..]).arg("true").status();
    if !may_drop.is_ok_and(|status| status.success()) {
        return crate::common::skip("this user can't give up CAP_IPC_LOCK");
    }
    let found = send(dir.path(), Version::Qemu100, &poor);
    assert_eq!((found["sends"].as_u64(), found["copied"].as_u64()), (Some(0), Some(0)), "{found}");
    assert!(found["forbidden"].as_u64() > Some(0), "{found}");
    assert!(found["off"].as_str().is_some_and(|why| why.contains("ulimit -l")), "{found}");
}

#[test]
fn options_that_do_not_go_together_are_bad_usage() {
    for (options, reason) in [
        (["--channels=2", "--compression=zlib"].as_slice(), "not compressed"),
        (&["--channels=2", "--compression=zstd:3"], "not compressed"),
        (&[], "--channels"),
    ] {
        for command in [["send", "tcp:127.0.0.1:1", "--ram=a=/dev/null"].as_slice(), &["demo", "--ram=4M"]] {
            let output = Command::new(env!("CARGO_BIN_EXE_ramwire"))
                .args(command)
                .arg("--send-pages=zerocopy")
                .args(options)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{command:?} {options:?}: {said}");
            assert!(said.contains(reason), "{command:?} {options:?}: {said}");
        }
    }
}
