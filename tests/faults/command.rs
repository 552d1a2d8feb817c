//! The command's signals, options and folders.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::common::{
    Deadline,
    memory::{Pattern, compare, fill},
    ramwire::Ramwire,
    scratch,
};

pub(crate) fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

#[test]
fn bad_options_exit_2_and_name_the_remedy() {
    for (arguments, says) in [
        (&["receive", "tcp:here:1"][..], "--dir"),
        (&["receive", "carrier-pigeon:coop", "--dir", "d"], "tcp:"),
        (&["receive", "tcp:127.0.0.1:0", "--dir", "d", "--max-ram", "1X"], "units are K, M, G and T"),
        (&["receive", "tcp:127.0.0.1:0", "--dir", "d", "--stall-timeout", "soon"], "number of seconds"),
        (&["receive", "tcp:127.0.0.1:0", "--dir", "d", "--allow", "10.0.0.0/99"], "10.0.0.0/99"),
        (&["send", "tcp:127.0.0.1:1"], "--dir"),
        (&["send", "tcp:127.0.0.1:1", "--ram", "nothing"], "NAME=PATH"),
        (&["send", "tcp:127.0.0.1:1", "--dir", "d", "--peer", "xen"], "qemu"),
        (&["demo", "--zero", "101"], "0 to 100"),
        (&["demo", "--ram", "1000000"], "4 KiB pages"),
        (&["demo", "--link-rate", "1M", "--transport", "unix"], "--transport tcp"),
        (
            &["demo", "--ram", "1M", "--channels", "2", "--xbzrle-cache-size", "1M"],
            "(--xbzrle-cache-size, --channels)",
        ),
        (&["demo", "--ram", "1M", "--auto-converge", "--max-cpu-throttle", "10"], "--cpu-throttle-initial"),
        (&["relay", "--listen", "tcp:127.0.0.1:0"], "--connect"),
        (&["--log", "a=b=c", "demo"], "--log debug"),
        (&["teleport"], "--help"),
    ] {
        let ended = Command::new(env!("CARGO_BIN_EXE_ramwire")).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(2), "{arguments:?}: {text}");
        assert!(text.contains(says), "{arguments:?}: {text:?} does not say {says:?}");
    }
}

/// Runs the command; its status and both outputs.
fn ended(arguments: &[&str], input: Stdio) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ramwire"));
    let ended = command.args(arguments).stdin(input).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (ended.status.code(), text(&ended.stdout), text(&ended.stderr))
}

/// A monitor reads one object, whatever goes wrong.
#[test]
fn with_json_every_end_has_an_object_with_its_reason() {
    let dir = scratch();
    let (nothing, guest) = (dir.path().join("nothing"), dir.path().join("guest"));
    let (nothing, guest) = (nothing.to_str().unwrap(), guest.to_str().unwrap());
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (arguments, status, outcome) in [
        (&["send", "tcp:127.0.0.1:1", "--dir", nothing][..], 3, "failed"),
        (&["send", "tcp:127.0.0.1:1", "--dir", nothing, "--compression", "zlib"], 2, "refused"),
        (&["receive", "tcp:127.0.0.1:0", "--dir", guest, "--metrics", &port], 3, "failed"),
        (&["receive", "exec:false", "--dir", guest], 3, "failed"),
        (
            &["relay", "--listen", "tcp:127.0.0.1:0", "--connect", "tcp:127.0.0.1:1", "--metrics", &port],
            3,
            "failed",
        ),
        (&["demo", "--ram", "1M", "--metrics", &port], 3, "failed"),
    ] {
        let arguments = [arguments, &["--json"]].concat();
        let (found, out, errors) = ended(&arguments, Stdio::null());
        assert_eq!(found, Some(status), "{arguments:?}: {errors}");
        let out: serde_json::Value =
            serde_json::from_str(&out).unwrap_or_else(|_| panic!("{arguments:?}: {out}"));
        assert!(out["outcome"] == outcome && out["error"].is_string(), "{arguments:?}: {out}");
        let bound = !arguments.contains(&&*port) || !errors.contains("listening on");
        assert!(bound, "{arguments:?}: {errors}");
    }
    assert!(!Path::new(nothing).exists(), "a folder that was to be read was made");
}

#[test]
fn what_can_not_be_read_or_served_is_named() {
    let dir = scratch();
    let file = dir.path().join("memory");
    fs::write(&file, [0; 4096]).unwrap();
    let (file, folder) = (file.to_str().unwrap(), dir.path().to_str().unwrap());
    for (arguments, status, says) in [
        (&["inspect", "no-such-file"][..], 3, "no-such-file"),
        (&["inspect", folder], 3, folder),
        (&["report", file, "-o", file], 2, "the log itself"),
        (&["bench", "latency", "--output", "no/such/folder"], 3, "no/such/folder"),
        (&["serve", "--from", file, "--listen", "fd:0"], 2, "a socket that listens"),
        (&["send", "mapped:x", "--dir", "d", "--channels", "2", "--compression", "zlib"], 3, "manifest.json"),
    ] {
        let (found, _, errors) = ended(arguments, Stdio::null());
        assert_eq!(found, Some(status), "{arguments:?}: {errors}");
        assert!(errors.contains(says) && errors.lines().count() == 1, "{arguments:?}: {errors}");
    }
    assert_eq!(fs::read(file).unwrap(), [0; 4096], "it was written over");
}

#[test]
fn a_signal_cancels_whoever_waits() {
    for (sent, arguments) in [
        (Signal::INT, &["receive", "tcp:127.0.0.1:0", "--dir"][..]),
        (Signal::TERM, &["receive", "tcp:127.0.0.1:0", "--dir"]),
        (Signal::INT, &["relay", "--connect", "tcp:127.0.0.1:1", "--listen", "tcp:127.0.0.1:0", "--keep"]),
    ] {
        let dir = scratch();
        let mut waiting = Ramwire::start(dir.path(), arguments, dir.path().join("guest"));
        waiting.listening();
        signal(waiting.pid(), sent);
        waiting.failed(Deadline::seconds(10), 4);
    }
}

/// A demo with a long first round.
const LONG: [&str; 5] = ["demo", "--ram", "384M", "--zero", "0"];

/// Waits until the demo's destination has received some pages; returns that process.
fn destination_of(demo: &Ramwire) -> u32 {
    let children = format!("/proc/{0}/task/{0}/children", demo.pid());
    Deadline::seconds(40).poll(
        "the demo's destination",
        || demo.errors(),
        || {
            let child = fs::read_to_string(&children).ok()?.split_whitespace().next()?.parse().ok()?;
            // Until it has executed the new program it has the demo's own files.
            let words = |pid: u32| fs::read(format!("/proc/{pid}/cmdline")).ok();
            if words(child)? == words(demo.pid())? {
                return None;
            }
            // Its memory, mapped or not: pages of the backing file, in blocks of 512 bytes.
            let mut files =
                fs::read_dir(format!("/proc/{child}/fd")).ok()?.flatten().map(|entry| entry.path());
            let is_memory = |file: &PathBuf| {
                fs::read_link(file).is_ok_and(|link| link.to_string_lossy().contains("memfd:demo.ram0"))
            };
            let there = fs::metadata(files.find(is_memory)?).ok()?.blocks() * 512;
            (there > 16 << 20).then_some(child)
        },
    )
}

#[test]
fn a_signal_cancels_a_migration_under_way_and_no_process_is_left() {
    let dir = scratch();
    let mut demo = Ramwire::start(dir.path(), &LONG, "--json");
    let child = destination_of(&demo);
    signal(demo.pid(), Signal::INT);
    let report = demo.finished(Deadline::seconds(15), 4);
    assert_eq!(report["status"], "cancelled", "{report}");
    assert_eq!(report["verified"], false, "{report}");
    assert!(!Path::new(&format!("/proc/{child}")).exists(), "the destination process is left");
}

#[test]
fn a_demo_whose_destination_is_killed_says_so_and_the_guest_stays() {
    let dir = scratch();
    let mut demo = Ramwire::start(dir.path(), &LONG, "--json");
    let child = destination_of(&demo);
    signal(child, Signal::KILL);
    // It may have died before it listened, or in the middle of the migration: the status is the same.
    let said = demo.failed(Deadline::seconds(15), 3);
    assert!(said.contains("ramwire demo: "), "{said}");
}

/// Processes that the demo has started.
fn children_of(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|child| child.parse().ok()).collect()
}

#[test]
fn a_demo_that_is_killed_leaves_no_process_no_folder_and_no_panic() {
    for listens in [false, true] {
        let dir = scratch();
        let (temporary, errors) = (dir.path().join("temporary"), dir.path().join("errors"));
        fs::create_dir(&temporary).unwrap();
        let mut demo = Command::new(env!("CARGO_BIN_EXE_ramwire"))
            .args(["demo", "--transport", "unix", "--ram", "64M", "--max-bandwidth", "1M"])
            .env("TMPDIR", &temporary)
            .stderr(File::create(&errors).unwrap())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let read = || fs::read_to_string(&errors).unwrap_or_default();
        let folder = || fs::read_dir(&temporary).unwrap().next();
        let child = Deadline::seconds(60).poll("its destination", read, || {
            let child = children_of(demo.id()).first().copied()?;
            // Its socket's folder exists only for a moment.
            let far_enough = !listens || folder().is_some() || mapped(child) > 1 << 20;
            far_enough.then_some(child)
        });
        demo.kill().unwrap();
        demo.wait().unwrap();
        let gone = || (!Path::new(&format!("/proc/{child}/fd/0")).exists()).then_some(());
        Deadline::seconds(60).poll("the destination's end", read, gone);
        assert!(folder().is_none(), "{:?} is left", folder());
        assert!(!read().contains("panicked"), "{}", read());
    }
}

/// Resident bytes of a process that belong to shared files.
fn mapped(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0) * 1024
}

/// A folder that holds a guest of 2 MiB, and the file that it came from.
pub(crate) fn received(dir: &Path) -> (PathBuf, PathBuf) {
    let (ram, folder) = (dir.join("ram"), dir.join("guest"));
    fill(&ram, 2, Pattern::Mixed { seed: 8 });
    let mut receiver = Ramwire::start(dir, &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], &folder);
    let uri = receiver.listening();
    let block = format!("m0={}", ram.display());
    Ramwire::start(dir, &["send", &uri, "--digest", "--json", "--ram"], &block)
        .finished(Deadline::seconds(20), 0);
    let report = receiver.finished(Deadline::seconds(20), 0);
    assert_eq!((&report["arrived"], &report["verified"]), (&true.into(), &true.into()), "{report}");
    compare(&ram, &folder.join("ram-000.bin")).unwrap_or_else(|difference| panic!("{difference:?}"));
    (ram, folder)
}

fn put_state(folder: &Path, state: &str) {
    let path = folder.join("manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    manifest["state"] = state.into();
    fs::write(&path, manifest.to_string()).unwrap();
}

#[test]
fn a_folder_is_sent_only_when_it_may_be() {
    let dir = scratch();
    let (_, folder) = received(dir.path());
    let occupied = ["receive", "tcp:127.0.0.1:0", "--dir"];
    let text = Ramwire::start(dir.path(), &occupied, &folder).failed(Deadline::seconds(10), 3);
    assert!(text.contains("holds a guest already") && text.contains("empty folder"), "{text}");

    for (state, says) in [
        ("sent", "--resend"),
        ("in-doubt", "--destination-is-dead"),
        ("in-doubt", "delete this folder"),
        ("sending", "--destination-is-dead"),
        ("incomplete", "--no-vmdesc"),
        ("arriving", "receive it again"),
    ] {
        put_state(&folder, state);
        let send = ["send", "tcp:127.0.0.1:1", "--dir"];
        let text = Ramwire::start(dir.path(), &send, &folder).failed(Deadline::seconds(10), 3);
        assert!(text.contains(says), "{state}: {text}");
    }

    put_state(&folder, "whole");
    let lock = File::options().write(true).open(folder.join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let text = Ramwire::start(dir.path(), &["send", "tcp:127.0.0.1:1", "--dir"], &folder)
        .failed(Deadline::seconds(10), 3);
    assert!(text.contains("in use by another ramwire"), "{text}");
    drop(lock);

    // Without a listener the folder stays as it was, and its guest can immediately be sent to another destination.
    let text = Ramwire::start(dir.path(), &["send", "tcp:127.0.0.1:1", "--dir"], &folder)
        .failed(Deadline::seconds(10), 3);
    assert!(text.contains("127.0.0.1:1"), "{text}");
    let next = dir.path().join("next");
    let mut receiver = Ramwire::start(dir.path(), &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], &next);
    let uri = receiver.listening();
    Ramwire::start(dir.path(), &["send", &uri, "--json", "--dir"], &folder)
        .finished(Deadline::seconds(20), 0);
    receiver.finished(Deadline::seconds(20), 0);
    compare(&folder.join("ram-000.bin"), &next.join("ram-000.bin")).unwrap();
}

#[test]
fn a_full_disk_refuses_the_guest_and_says_what_is_missing() {
    let dir = scratch();
    let (ram, disk) = (dir.path().join("ram"), dir.path().join("disk"));
    fill(&ram, 4, Pattern::Random { seed: 1 });
    fs::create_dir(&disk).unwrap();
    // A file system of its own, in a namespace of its own: it is removed with the process.
    let script =
        r#"mount -t tmpfs -o size=1M none "$1" && exec "$2" receive "unix:$3" --dir "$1/guest" 2> "$4""#;
    let (socket, errors) = (dir.path().join("socket"), dir.path().join("errors"));
    // Root needs no user namespace, which a container may forbid.
    let alone: &[&str] = if rustix::process::geteuid().is_root() {
        &["--mount"]
    } else {
        &["--user", "--map-root-user", "--mount"]
    };
    let mut receiver = Command::new("unshare")
        .args(alone)
        .args(["sh", "-c", script, "sh"])
        .arg(&disk)
        .arg(env!("CARGO_BIN_EXE_ramwire"))
        .args([&socket, &errors])
        .spawn()
        .expect("cannot start unshare (util-linux)");
    let read = || fs::read_to_string(&errors).unwrap_or_default();
    let listening = || socket.exists().then_some(()).or_else(|| receiver.try_wait().unwrap().map(drop));
    Deadline::seconds(20).poll("the receiver listens", read, listening);
    let uri = format!("unix:{}", socket.display());
    let block = format!("m0={}", ram.display());
    let text = Ramwire::start(dir.path(), &["send", &uri, "--ram"], &block).failed(Deadline::seconds(20), 3);
    assert!(text.contains("No space left") || text.contains("room"), "the source is told: {text}");
    let status = receiver.wait().unwrap();
    assert_eq!(status.code(), Some(3), "{}", read());
    assert!(read().contains("room"), "{}", read());
}

#[test]
fn a_guest_without_its_description_is_kept_as_incomplete_and_told_by_the_status() {
    let dir = scratch();
    let mut stream = Vec::new();
    let captured = include_bytes!("../vectors/q72-microvm-compress.gz");
    flate2::read::GzDecoder::new(&captured[..]).read_to_end(&mut stream).unwrap();
    // The description is a byte 6, its length in four bytes, and JSON to the end.
    let json = br#"{"page_size""#;
    let at = stream.windows(json.len()).rposition(|window| window == json).unwrap() - 5;
    assert_eq!(stream[at], 6);
    for (name, bytes, status) in [("whole", &stream[..], 0), ("cut", &stream[..at], 6)] {
        let (file, folder) = (dir.path().join(name), dir.path().join(format!("{name}-guest")));
        fs::write(&file, bytes).unwrap();
        let uri = format!("file:{}", file.display());
        let receive = ["receive", &uri, "--json", "--dir"];
        let report = Ramwire::start(dir.path(), &receive, &folder).finished(Deadline::seconds(20), status);
        let state = if status == 0 { "whole" } else { "incomplete" };
        assert_eq!((&report["arrived"], &report["state"]), (&true.into(), &state.into()), "{report}");
    }
}

#[test]
fn ram_alone_sent_to_a_file_can_be_received_from_it() {
    let dir = scratch();
    let (ram, file) = (dir.path().join("ram"), dir.path().join("stream"));
    fill(&ram, 4, Pattern::Random { seed: 1 });
    let (uri, block) = (format!("file:{}", file.display()), format!("m0={}", ram.display()));
    Ramwire::start(dir.path(), &["send", &uri, "--json", "--ram"], &block).finished(Deadline::seconds(20), 0);
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let receiver =
        |uri: &str, into: &Path| Ramwire::start(dir.path(), &["receive", uri, "--json", "--dir"], into);
    let report = receiver(&uri, &first).finished(Deadline::seconds(20), 0);
    assert_eq!(report["state"], "whole");
    compare(&ram, &first.join("ram-000.bin")).unwrap();
    // This guest still needs a ramwire as destination.
    let mut receiver = receiver("tcp:127.0.0.1:0", &second);
    let uri = receiver.listening();
    Ramwire::start(dir.path(), &["send", &uri, "--json", "--dir"], &first).finished(Deadline::seconds(20), 0);
    receiver.finished(Deadline::seconds(20), 0);
    compare(&ram, &second.join("ram-000.bin")).unwrap();
}
