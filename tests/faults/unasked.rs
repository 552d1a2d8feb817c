//! A QEMU without a return path, which is its default: it gives its guest away with the last byte that it writes, and
//! nobody can take that back. No status may then say that the guest runs on at its source.

use std::path::Path;

use rustix::process::Signal;
use serde_json::json;

use crate::command::{received, signal};
use crate::common::{
    Deadline,
    memory::{Pattern, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch,
};
use crate::qemu::state_or_none;

const MIB: usize = 32;

/// A QEMU whose whole stream fits into the queues of its socket.
fn small(dir: &Path) -> Qemu {
    let ram = dir.join("ram");
    fill(&ram, MIB, Pattern::Zero);
    Guest::new(Version::Qemu100, Machine::Q35, &ram, MIB).start(dir, "source")
}

#[test]
fn a_relay_whose_far_end_takes_nothing_does_not_say_that_the_guest_runs_on() {
    if !peers_present() {
        return;
    }
    for (far, cancels) in [("exec:exec sleep 600", true), ("exec:exec head -c 1000 >/dev/null", false)] {
        let dir = scratch();
        let mut source = small(dir.path());
        let listen = ["relay", "--listen", "tcp:127.0.0.1:0", "--connect"];
        let mut relay = Ramwire::start(dir.path(), &listen, far);
        source.migrate(&relay.listening());
        source.wait_completed(Deadline::seconds(60));
        if cancels {
            // Before its block list is read nothing is known of a source.
            let warned = || relay.errors().contains("opened no return path").then_some(());
            Deadline::seconds(60).poll("the notice", || relay.errors(), warned);
            signal(relay.pid(), Signal::INT);
        }
        let said = relay.failed(Deadline::seconds(120), 5);
        assert_eq!(source.status(), "postmigrate");
        assert!(said.contains("no return path") && said.contains("`cont`"), "{far}: {said}");
        assert!(
            !said.contains("runs on at the source") && !said.contains("load its device state"),
            "{far}: {said}"
        );
        // What it says to do is possible.
        source.execute("cont", json!({}));
        source.wait_status("running", Deadline::seconds(60));
    }
}

/// The end of the stream may be in the receiver's socket, and is after the QEMU has completed.
#[test]
fn a_receiver_that_is_cancelled_when_the_source_has_completed_has_the_guest_or_is_in_doubt() {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let folder = dir.path().join("guest");
    let mut source = small(dir.path());
    // So slow that the receiver has warned before the stream ends.
    source.set_parameters(json!({"max-bandwidth": 1}));
    let mut receiver = Ramwire::start(dir.path(), &["receive", "tcp:127.0.0.1:0", "--dir"], &folder);
    source.migrate(&receiver.listening());
    let warned = || receiver.errors().contains("opened no return path").then_some(());
    Deadline::seconds(60).poll("the warning", || receiver.errors(), warned);
    signal(receiver.pid(), Signal::STOP);
    source.set_parameters(json!({"max-bandwidth": 0}));
    source.wait_completed(Deadline::seconds(60));
    signal(receiver.pid(), Signal::TERM);
    signal(receiver.pid(), Signal::CONT);
    let (status, said) = receiver.ended(Deadline::seconds(60));
    match status {
        // All of it was read before the signal was.
        0 => assert_eq!(state_or_none(&folder), "whole", "{said}"),
        5 => assert!(said.contains("no return path") && said.contains("`cont`"), "{said}"),
        other => panic!("status {other}: {said}"),
    }
}

/// A source that cancels closes before its last byte: its guest runs on, for certain.
#[test]
fn a_source_that_cancels_has_kept_its_guest() {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let folder = dir.path().join("guest");
    let mut source = small(dir.path());
    source.set_parameters(json!({"max-bandwidth": 1}));
    let mut receiver = Ramwire::start(dir.path(), &["receive", "tcp:127.0.0.1:0", "--dir"], &folder);
    source.migrate(&receiver.listening());
    let warned = || receiver.errors().contains("opened no return path").then_some(());
    Deadline::seconds(60).poll("the warning", || receiver.errors(), warned);
    source.execute("migrate_cancel", json!({}));
    let said = receiver.failed(Deadline::seconds(60), 3);
    assert!(said.contains("the stream ended after"), "{said}");
    assert_eq!(state_or_none(&folder), "none");
}

/// Pages are missing at the destination, where the guest runs: only the folder has them.
#[test]
fn a_second_signal_in_postcopy_says_that_the_folder_must_be_kept() {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let (ram, folder) = (dir.path().join("ram"), dir.path().join("guest"));
    fill(&ram, 64, Pattern::Random { seed: 5 });
    let mut source = Guest::new(Version::Qemu100, Machine::Q35, &ram, 64).start(dir.path(), "source");
    let mut receiver =
        Ramwire::start(dir.path(), &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], &folder);
    source.set_capabilities(&["return-path"]);
    source.set_parameters(json!({"max-bandwidth": 0}));
    source.migrate(&receiver.listening());
    source.wait_completed_within(10, Deadline::seconds(120));
    receiver.finished(Deadline::seconds(60), 0);
    source.kill();
    let arrived = dir.path().join("arrived");
    fill(&arrived, 64, Pattern::Zero);
    let guest = Guest::new(Version::Qemu100, Machine::Q35, &arrived, 64).incoming();
    let mut destination = guest.start(dir.path(), "destination");
    destination.set_capabilities(&["postcopy-ram"]);
    let uri = destination.listen_tcp();
    let send = ["send", &uri, "--postcopy", "--max-postcopy-bandwidth", "1M", "--dir"];
    let mut sender = Ramwire::start(dir.path(), &send, &folder);
    let switched =
        |destination: &mut Qemu| (destination.query_migrate()["status"] == "postcopy-active").then_some(());
    Deadline::seconds(60).poll("the switch", || sender.errors(), || switched(&mut destination));
    signal(sender.pid(), Signal::INT);
    let refused = || sender.errors().contains("too late to cancel").then_some(());
    Deadline::seconds(60).poll("the first signal", || sender.errors(), refused);
    signal(sender.pid(), Signal::INT);
    let said = sender.failed(Deadline::seconds(60), 5);
    assert!(said.contains("memory was missing there") && said.contains("Keep "), "{said}");
    assert!(!said.contains("delete") && !said.contains("check the destination"), "{said}");
    assert_eq!(state_or_none(&folder), "in-doubt");
}

/// Refused before anything is opened: what is in the file stays there.
#[test]
fn a_file_is_not_emptied_by_options_that_need_answers() {
    let dir = scratch();
    let (_, folder) = received(dir.path());
    let file = dir.path().join("v.save");
    for (scheme, options, why) in [
        ("mapped", &["--verify", "full"][..], "answers"),
        ("mapped", &["--verify", "fast"], "answers"),
        ("mapped", &["--postcopy"], "answers"),
        ("file", &["--verify", "full"], "answers"),
        ("file", &["--verify", "fast"], "answers"),
        ("file", &["--postcopy"], "answers"),
        ("file", &["--cpr", "unix:nowhere"], "its memory would not be there"),
    ] {
        std::fs::write(&file, "another guest").unwrap();
        let uri = format!("{scheme}:{}", file.display());
        let send = [&["send", &uri], options, &["--dir"]].concat();
        let said = Ramwire::start(dir.path(), &send, &folder).failed(Deadline::seconds(60), 2);
        assert!(said.contains(why), "{send:?}: {said}");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "another guest", "{send:?}");
    }
}

#[test]
fn a_file_for_a_block_that_the_folder_does_not_have_is_refused() {
    let dir = scratch();
    let (ram, folder) = received(dir.path());
    let [other, own] = ["nosuch", "m0"].map(|name| format!("{name}={}", ram.display()));
    for (blocks, says) in [
        (&["--ram", &other][..], "no RAM block has this name"),
        (&["--ram", &own, "--ram", &own], "given twice"),
    ] {
        let send = [&["send", "tcp:127.0.0.1:1"], blocks, &["--dir"]].concat();
        let said = Ramwire::start(dir.path(), &send, &folder).failed(Deadline::seconds(60), 2);
        assert!(said.contains(says) && said.contains("the folder has m0"), "{said}");
    }
}

/// Found out before the guest is given away, not afterwards.
#[test]
fn a_relay_that_could_not_keep_the_guest_does_not_begin() {
    let dir = scratch();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (_, occupied) = received(dir.path());
    let relay = ["relay", "--listen", "tcp:127.0.0.1:0", "--connect", "tcp:127.0.0.1:1", "--keep"];
    for (place, says) in
        [(file.as_path(), "file"), (Path::new("/proc/nope"), "/proc/nope"), (&occupied, "holds a guest")]
    {
        let said = Ramwire::start(dir.path(), &relay, place).failed(Deadline::seconds(60), 2);
        assert!(said.contains("--keep") && said.contains(says) && !said.contains("listening"), "{said}");
    }
}
