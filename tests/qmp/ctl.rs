//! `ramwire ctl`, with the monitors of ramwire and of QEMU.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use super::common::{
    Deadline,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Version, peers_present},
    ramwire::Ramwire,
};
use super::{Bed, MACHINE, MIB};
use serde_json::{Value, json};

/// Runs it: status, standard output, standard error.
fn ctl(monitor: &Path, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ramwire"));
    let Output { status, stdout, stderr } = command.arg("ctl").arg(monitor).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim_end().to_owned();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

/// Its output if it succeeds.
fn done(monitor: &Path, arguments: &[&str]) -> String {
    let (status, out, errors) = ctl(monitor, arguments);
    assert_eq!(status, 0, "{arguments:?}: {out}\n{errors}");
    out
}

/// A `watch` that has printed its first line, and so looks on.
struct Watch {
    child: Child,
    out: BufReader<ChildStdout>,
    told: String,
}

impl Watch {
    fn start(monitor: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ramwire"));
        let command = command.arg("ctl").arg(monitor).args(arguments).arg("watch");
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut told = String::new();
        out.read_line(&mut told).unwrap();
        Self { child, out, told }
    }

    /// Its status and all that it has printed.
    fn end(mut self) -> (i32, String) {
        self.out.read_to_string(&mut self.told).unwrap();
        (self.child.wait().unwrap().code().unwrap_or(-1), self.told)
    }
}

fn status(monitor: &Path) -> Value {
    serde_json::from_str(&done(monitor, &["--json", "status"])).unwrap()
}

/// Looks, changes and cancels what `monitor` runs at 1 MiB a second.
fn look_change_and_cancel(what: &str, monitor: &Path) {
    Deadline::seconds(60).poll(what, String::new, || (status(monitor)["status"] == "active").then_some(()));
    let told = done(monitor, &["status"]);
    assert!(told.contains("status    active") && told.contains("left"), "{what}: {told}");
    assert_eq!(done(monitor, &["set", "bandwidth", "2M"]), "max-bandwidth is 2097152", "{what}");
    assert_eq!(done(monitor, &["set", "downtime", "0.01s"]), "downtime-limit is 10", "{what}");
    let (refused, _, errors) = ctl(monitor, &["set", "downtime", "3000s"]);
    assert!(refused == 3 && errors.contains("migrate-set-parameters was refused"), "{what}: {errors}");
    assert_eq!(ctl(monitor, &["set", "downtime", "100"]).0, 2, "{what}: a time without a unit");
    let (refused, _, errors) = ctl(monitor, &["pause"]);
    assert!(refused == 3 && errors.contains("migrate-pause was refused"), "{what}: {errors}");
    assert_eq!(done(monitor, &["cancel"]), "cancelled", "{what}");
}

#[test]
fn any_qemu_is_looked_at_changed_and_cancelled() {
    if !peers_present() {
        return;
    }
    let bed = Bed::new();
    let ram = bed.path().join("theirs");
    fill(&ram, MIB, Pattern::Mixed { seed: 23 });
    for version in Version::ALL {
        let (_destination, uri) = bed.waiting(version, &[]);
        let monitor = bed.path().join("theirs.monitor");
        let option = format!("unix:{},server=on,wait=off", monitor.display());
        let guest = Guest::new(version, MACHINE, &ram, MIB).with(["-qmp", &option]);
        let mut source = guest.start(bed.path(), "theirs");
        assert_eq!(done(&monitor, &["status"]), "status    none", "{version}");
        source.set_parameters(json!({"max-bandwidth": 1 << 20}));
        source.migrate(&uri);
        look_change_and_cancel(&version.to_string(), &monitor);
    }
}

#[test]
fn a_ramwire_is_looked_at_changed_and_cancelled() {
    if !peers_present() {
        return;
    }
    let bed = Bed::new();
    let (_destination, uri) = bed.waiting(Version::Qemu100, &[]);
    let (mut sender, client) = bed.send(&uri, &["--max-bandwidth", "1M"]);
    drop(client);
    look_change_and_cancel("ramwire", &bed.socket());
    assert_eq!(sender.ended(Deadline::seconds(20)).0, 4, "{}", sender.errors());
    let (gone, _, errors) = ctl(&bed.socket(), &["status"]);
    assert!(gone == 3 && errors.contains("can't be reached"), "{errors}");
}

/// Switched by command, paused, continued over another connection, and watched to its end.
#[test]
fn a_postcopy_is_begun_paused_and_recovered_by_command() {
    if !peers_present() {
        return;
    }
    let bed = Bed::new();
    for version in Version::ALL {
        let what = format!("to {version}");
        let (mut destination, uri) = bed.waiting(version, &["postcopy-ram"]);
        let options =
            ["--postcopy", "--postcopy-after", "command", "--reconnect", "100", "--max-bandwidth", "1M"];
        let (mut sender, client) =
            bed.send(&uri, &[&options[..], &["--max-postcopy-bandwidth", "1M"]].concat());
        drop(client);
        let monitor = bed.socket();
        let in_state = |wanted: &str| (status(&monitor)["status"] == wanted).then_some(());
        let wait = |wanted: &str, sender: &Ramwire| {
            Deadline::seconds(100).poll(
                &format!("{what}: {wanted}"),
                || sender.errors(),
                || in_state(wanted),
            );
        };
        wait("active", &sender);
        done(&monitor, &["postcopy"]);
        wait("postcopy-active", &sender);
        done(&monitor, &["pause"]);
        wait("postcopy-paused", &sender);
        let lost = |qemu: &mut super::Qemu| qemu.query_migrate()["status"] == "postcopy-paused";
        Deadline::seconds(100).poll(&what, String::new, || lost(&mut destination).then_some(()));
        let listening = format!("unix:{}", bed.path().join("again").display());
        destination.execute("migrate-recover", json!({"uri": listening}));
        done(&monitor, &["recover", &listening]);
        wait("postcopy-active", &sender);
        let watch = Watch::start(&monitor, &[]);
        done(&monitor, &["set", "postcopy-bandwidth", "0"]);
        let (watched, told) = watch.end();
        assert!(watched == 0 && told.contains("completed"), "{what}: {told}");
        let report = sender.finished(Deadline::seconds(60), 0);
        assert_eq!(report["status"], "completed", "{what}");
        destination.wait_completed(Deadline::seconds(20));
        compare(&bed.ram, &destination.ram).unwrap_or_else(|d| panic!("{what}: {d:?}"));
    }
}

/// A relay's far side is throttled and released, and the guest that it passes on is watched where it arrives.
#[test]
fn a_relay_and_a_destination_are_watched() {
    if !peers_present() {
        return;
    }
    let bed = Bed::new();
    let ram = bed.path().join("theirs");
    fill(&ram, MIB, Pattern::Mixed { seed: 23 });
    let (near, far) = (bed.path().join("relay.qmp"), bed.path().join("receive.qmp"));
    let (near_place, far_place) = (format!("unix:{}", near.display()), format!("unix:{}", far.display()));
    let folder = bed.path().join("arrives");
    let receive = ["receive", "tcp:127.0.0.1:0", "--json", "--qmp", &far_place, "--dir"];
    let mut receiver = Ramwire::start(bed.path(), &receive, &folder);
    let to = receiver.listening();
    let relay =
        ["relay", "--json", "--max-bandwidth", "1M", "--qmp", &near_place, "--listen", "tcp:127.0.0.1:0"];
    let mut relay = Ramwire::start(bed.path(), &[&relay[..], &["--connect"]].concat(), &to);
    let at = relay.listening();
    assert_eq!(status(&far), json!({}), "nothing has begun");
    let mut source = Guest::new(Version::Qemu100, MACHINE, &ram, MIB).start(bed.path(), "source");
    source.set_capabilities(&["return-path"]);
    source.set_parameters(json!({"max-bandwidth": 0}));
    source.migrate(&at);
    for monitor in [&near, &far] {
        Deadline::seconds(60)
            .poll("active", String::new, || (status(monitor)["status"] == "active").then_some(()));
    }
    let (refused, _, errors) = ctl(&near, &["set", "downtime", "1s"]);
    assert!(refused == 3 && errors.contains("downtime-limit"), "{errors}");
    let (refused, _, errors) = ctl(&far, &["set", "bandwidth", "1M"]);
    assert!(refused == 3 && errors.contains("no command"), "{errors}");
    let watch = Watch::start(&far, &["--json"]);
    done(&near, &["set", "bandwidth", "0"]);
    source.wait_completed(Deadline::seconds(60));
    relay.finished(Deadline::seconds(60), 0);
    receiver.finished(Deadline::seconds(60), 0);
    let (watched, told) = watch.end();
    assert_eq!(watched, 0, "{told}");
    assert!(told.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{told}");
}

/// Two stock QEMUs: the destination listens again by the same command by which the source connects again.
#[test]
fn a_postcopy_between_two_qemus_is_paused_and_recovered() {
    if !peers_present() {
        return;
    }
    let bed = Bed::new();
    let monitor = |name: &str| bed.path().join(name).with_extension("monitor");
    let start = |name: &str, seed: Pattern, incoming: bool| {
        let ram = bed.path().join(name).with_extension("ram");
        fill(&ram, MIB, seed);
        let option = format!("unix:{},server=on,wait=off", monitor(name).display());
        let guest = Guest::new(Version::Qemu100, MACHINE, &ram, MIB).with(["-qmp", &option]);
        let guest = if incoming { guest.incoming() } else { guest };
        let mut qemu = guest.start(bed.path(), name);
        qemu.set_capabilities(&["postcopy-ram"]);
        qemu
    };
    let mut destination = start("there", Pattern::Random { seed: 3 }, true);
    let mut source = start("here", Pattern::Mixed { seed: 23 }, false);
    source.set_parameters(json!({"max-bandwidth": 1 << 20, "max-postcopy-bandwidth": 1 << 20}));
    let uri = destination.listen_tcp();
    source.migrate(&uri);
    let (here, there) = (monitor("here"), monitor("there"));
    let wait = |which: &Path, wanted: &str| {
        let what = format!("{}: {wanted}", which.display());
        let is_there = || (status(which)["status"] == wanted).then_some(());
        Deadline::seconds(100).poll(&what, || status(which).to_string(), is_there);
    };
    wait(&here, "active");
    done(&here, &["postcopy"]);
    wait(&here, "postcopy-active");
    done(&here, &["pause"]);
    for which in [&here, &there] {
        wait(which, "postcopy-paused");
    }
    let again = format!("unix:{}", bed.path().join("again").display());
    done(&there, &["recover", &again]);
    done(&here, &["recover", &again]);
    wait(&here, "postcopy-active");
    done(&here, &["set", "postcopy-bandwidth", "0"]);
    // A QEMU's monitor has one client at a time.
    let (watched, told) = Watch::start(&here, &[]).end();
    assert!(watched == 0 && told.contains("completed"), "{told}");
    destination.wait_completed(Deadline::seconds(20));
    compare(&source.ram, &destination.ram).unwrap();
}
