//! A running Linux guest is migrated QEMU -> `ramwire relay` -> QEMU and keeps writing and checking its memory.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::process::Command;

use common::{
    Deadline,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Version, peers_present},
    ramwire::Ramwire,
    scratch,
    writer::{self, Console, Images, Load, assert_unbroken},
};
use serde_json::{Value, json};

const LOAD: Load = Load { mib: 32, pages_per_second: 2000, small: false };

/// More than a relay's first backlog, written faster: the pages that a relay reads ahead of its far end would show.
const MEASURED: Load = Load { mib: 96, pages_per_second: 3000, small: false };

/// QEMU's default downtime limit.
const LIMIT_MS: u64 = 300;

/// What a relay may add to the median: its backlog of 20 ms and the queues of two more sockets.
const ADDED_MS: u64 = 60;

fn load() -> Load {
    if runs() > 1 { MEASURED } else { LOAD }
}

/// Migrates a writing guest, directly or through a relay; returns the source's figures and the relay's.
fn migrate_live(
    images: &Images,
    from: Version,
    to: Version,
    machine: Machine,
    relayed: bool,
) -> (Value, Value) {
    let dir = scratch();
    let consoles =
        ["source", "destination"].map(|name| Console::new(dir.path().join(name).with_extension("console")));
    let guest = |version, name: &str, console| -> Guest {
        writer::guest(images, version, machine, load(), &dir.path().join(name).with_extension("ram"), console)
    };
    let mut source = guest(from, "source", &consoles[0]).start(dir.path(), "source");
    let mut destination = guest(to, "destination", &consoles[1]).incoming().start(dir.path(), "destination");
    consoles[0].wait_tick("boot", Deadline::seconds(300), |tick| tick.number >= 3);

    source.set_capabilities(&["return-path"]);
    let far = destination.listen_tcp();
    let arguments = ["relay", "--json", "--listen", "tcp:127.0.0.1:0", "--connect"];
    let mut relay = relayed.then(|| Ramwire::start(dir.path(), &arguments, &far));
    let uri = relay.as_mut().map_or(far, Ramwire::listening);
    source.migrate(&uri);
    let info = source.wait_completed_within(12, Deadline::seconds(90));
    let report = relay.as_mut().map_or(Value::Null, |relay| relay.finished(Deadline::seconds(20), 0));
    assert_eq!(source.status(), "postmigrate");
    destination.wait_status("running", Deadline::seconds(10));

    let left = consoles[0].ticks().last().copied().unwrap();
    consoles[1].wait_tick("two passes over the memory that arrived", Deadline::seconds(60), |tick| {
        tick.passes >= left.passes + 3
    });
    let last = assert_unbroken(&[&consoles[0], &consoles[1]]);
    assert!(last.sequence > left.sequence);
    (info, report)
}

/// How often each pair runs. More than once to measure: `RAMWIRE_LIVE_RUNS=30 cargo test --release --test relay a_live
/// -- --nocapture --test-threads 1` prints medians, and compares them with the limits.
fn runs() -> usize {
    std::env::var("RAMWIRE_LIVE_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(1)
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

/// The direct run is the control: pages lost there too are QEMU's own bug.
fn through_the_relay(images: &Images, from: Version, to: Version, machine: Machine) {
    let downtime = |info: &Value| info["downtime"].as_u64().unwrap();
    let (mut direct, mut relayed) = (Vec::new(), Vec::new());
    for _ in 0..runs() {
        direct.push(downtime(&migrate_live(images, from, to, machine, false).0));
        let (info, report) = migrate_live(images, from, to, machine, true);
        relayed.push(downtime(&info));
        assert_eq!(report["completed"], true, "{report}");
        let first = report["first_page_sent_ms"].as_f64().unwrap();
        let complete = report["ram_complete_ms"].as_f64().unwrap();
        assert!(first < complete, "pages are forwarded as they come: first {first}, last {complete}");
        let rounds = report["far"]["rounds"].as_array().unwrap();
        let dirty = rounds.iter().filter(|round| round["dirty_pages"].as_u64() > Some(0)).count();
        assert!(dirty >= 3, "{report}");
        println!("{dirty} rounds with dirty pages, its far side's parts {}", report["far"]["downtime-parts"]);
    }
    println!(
        "{from} to {to}, {}: downtime {direct:?} ms direct, {relayed:?} ms through the relay; medians {} and {}",
        machine.name(),
        median(direct.clone()),
        median(relayed.clone()),
    );
    // The figure of a single run means nothing, and one of a busy machine little: the limits are checked only in
    // measurements.
    if runs() > 1 && direct.iter().all(|ms| *ms <= LIMIT_MS) {
        assert!(relayed.iter().all(|ms| *ms <= LIMIT_MS), "{relayed:?} ms through the relay");
        let (direct, relayed) = (median(direct), median(relayed));
        assert!(relayed <= direct + ADDED_MS, "medians {direct} and {relayed} ms");
    }
}

#[test]
fn a_live_guest_goes_through_a_relay_between_two_qemu_72() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    through_the_relay(&images, Version::Qemu72, Version::Qemu72, Machine::PcI440fx72);
}

#[test]
fn a_live_guest_goes_through_a_relay_between_two_qemu_100() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    through_the_relay(&images, Version::Qemu100, Version::Qemu100, Machine::Q35);
}

#[test]
fn a_live_guest_goes_through_a_relay_between_versions() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    for (from, to) in Version::pairs() {
        through_the_relay(&images, from, to, Machine::PcI440fx72);
    }
}

#[test]
fn a_live_guest_goes_through_a_relay_between_two_of_the_newest_qemu() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    through_the_relay(&images, Version::Newest, Version::Newest, Machine::Q35);
}

#[test]
fn a_far_end_that_is_not_there_fails_the_source_which_keeps_its_guest() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        let dir = scratch();
        let ram = dir.path().join("ram");
        fill(&ram, 32, Pattern::Mixed { seed: 3 });
        let mut source = Guest::new(version, Machine::Q35, &ram, 32).start(dir.path(), "source");
        source.set_capabilities(&["return-path"]);
        let arguments = ["relay", "--json", "--listen", "tcp:127.0.0.1:0", "--connect"];
        let mut relay = Ramwire::start(dir.path(), &arguments, "tcp:127.0.0.1:1");
        source.migrate(&relay.listening());
        let info = source.wait_migration(Deadline::seconds(30));
        assert_eq!(info["status"], "failed", "{info}");
        let said = relay.failed(Deadline::seconds(20), 3);
        assert!(said.contains("the far end can't be reached"), "{said}");
        source.execute("cont", json!({}));
        assert_eq!(source.status(), "running");
    }
}

#[test]
fn a_source_without_a_return_path_is_told_of_and_kept_when_the_far_end_fails() {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let (ram, keep) = (dir.path().join("ram"), dir.path().join("kept"));
    fill(&ram, 32, Pattern::Mixed { seed: 4 });
    // The far end has different memory: it refuses the guest when it receives the block list.
    let wrong = dir.path().join("wrong");
    fill(&wrong, 16, Pattern::Zero);
    let machine = Machine::Q35;
    let version = Version::Qemu100;
    let mut destination = Guest::new(version, machine, &wrong, 16).incoming().start(dir.path(), "far");
    let mut source = Guest::new(version, machine, &ram, 32).start(dir.path(), "source");
    let far = destination.listen_tcp();
    let keep_text = keep.display().to_string();
    let arguments = ["relay", "--keep", &keep_text, "--listen", "tcp:127.0.0.1:0", "--connect"];
    let mut relay = Ramwire::start(dir.path(), &arguments, &far);
    source.migrate(&relay.listening());
    source.wait_migration(Deadline::seconds(30));
    let said = relay.failed(Deadline::seconds(30), 5);
    assert!(said.contains("opened no return path"), "{said}");
    assert!(said.contains("ramwire send"), "{said}");
    compare(&ram, &keep.join("ram-000.bin")).unwrap_or_else(|d| panic!("{d:?}"));
}

#[test]
fn a_folder_to_keep_the_guest_in_without_room_is_found_while_the_guest_is_at_its_source() {
    let dir = scratch();
    let (ram, small) = (dir.path().join("ram"), dir.path().join("small"));
    fill(&ram, 32, Pattern::Mixed { seed: 5 });
    std::fs::create_dir(&small).unwrap();
    let in_small = |command: &[&str]| {
        let mut shell = Command::new("setpriv");
        shell.args(["--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c"]);
        shell.arg("mount -t tmpfs -o size=8M,mode=700 small \"$0\" && exec \"$@\"").arg(&small).args(command);
        shell
    };
    if !in_small(&["true"]).status().is_ok_and(|status| status.success()) {
        return common::skip("the right to mount a file system");
    }
    let socket = dir.path().join("socket");
    let (listen, errors) = (format!("unix:{}", socket.display()), dir.path().join("relay.err"));
    let (program, keep) = (env!("CARGO_BIN_EXE_ramwire"), small.to_str().unwrap());
    let arguments = [program, "relay", "--keep", keep, "--listen", &listen, "--connect", "tcp:127.0.0.1:1"];
    let mut relay = in_small(&arguments).stderr(std::fs::File::create(&errors).unwrap()).spawn().unwrap();
    let said = || std::fs::read_to_string(&errors).unwrap();
    Deadline::seconds(20).poll("the relay listens", said, || socket.exists().then_some(()));
    let block = format!("m0={}", ram.display());
    let mut source = Ramwire::start(dir.path(), &["send", &listen, "--ram"], block);
    let status = Deadline::seconds(30).poll("the relay ends", said, || relay.try_wait().unwrap());
    let (status, said) = (status.code(), said());
    let found =
        said.contains("--keep") && said.contains("32.00 MiB of RAM") && said.contains("8.00 MiB are free");
    assert!(found && status == Some(3), "{status:?}: {said}");
    source.failed(Deadline::seconds(20), 3);
}

/// The far end or the relay itself dies in the middle of a round: the guest continues at its source, intact, and can be
/// migrated to another destination immediately.
#[test]
fn a_running_guest_stays_at_its_source_when_the_far_end_or_the_relay_dies() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    let (version, machine) = (Version::Qemu100, Machine::Q35);
    let dir = scratch();
    let path = |name: &str, kind: &str| dir.path().join(format!("{name}.{kind}"));
    let guest = |name: &str| {
        let console = Console::new(path(name, "console"));
        let guest = writer::guest(&images, version, machine, LOAD, &path(name, "ram"), &console);
        (guest, console)
    };
    let (running, here) = guest("source");
    let mut source = running.start(dir.path(), "source");
    here.wait_tick("boot", Deadline::seconds(300), |tick| tick.number >= 3);
    source.set_capabilities(&["return-path"]);
    for dying in ["far", "relay"] {
        // Slow enough that it dies in the middle.
        source.set_parameters(json!({"max-bandwidth": 16 << 20}));
        let mut far = guest(dying).0.incoming().start(dir.path(), dying);
        let arguments = ["relay", "--json", "--listen", "tcp:127.0.0.1:0", "--connect"];
        let mut relay = Some(Ramwire::start(dir.path(), &arguments, far.listen_tcp()));
        source.migrate(&relay.as_mut().unwrap().listening());
        let mut info = Value::Null;
        Deadline::seconds(30).poll("a megabyte", String::new, || {
            info = source.query_migrate();
            (info["ram"]["transferred"].as_u64() > Some(1 << 20)).then_some(())
        });
        assert_eq!(info["status"], "active", "{info}");
        if dying == "far" {
            far.kill();
            let said = relay.take().unwrap().failed(Deadline::seconds(20), 3);
            assert!(said.contains("far end"), "{said}");
        } else {
            drop(relay.take());
        }
        let info = source.wait_migration(Deadline::seconds(20));
        assert_eq!(info["status"], "failed", "{dying}: {info}");
        assert_eq!(source.status(), "running", "{dying}");
        let left = here.ticks().last().copied().unwrap();
        here.wait_tick("it checks its memory again", Deadline::seconds(60), |tick| {
            tick.passes >= left.passes + 2
        });
        assert_unbroken(&[&here]);
    }
    source.set_parameters(json!({"max-bandwidth": 0}));
    let (incoming, there) = guest("destination");
    let mut destination = incoming.incoming().start(dir.path(), "destination");
    source.migrate(&destination.listen_tcp());
    source.wait_completed_within(10, Deadline::seconds(60));
    destination.wait_status("running", Deadline::seconds(10));
    let left = here.ticks().last().copied().unwrap();
    there.wait_tick("it continues", Deadline::seconds(60), |tick| tick.passes >= left.passes + 2);
    assert_unbroken(&[&here, &there]);
}
