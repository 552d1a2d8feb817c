//! A QEMU hands its guest to a `ramwire` on the same host in mode cpr-transfer, or takes one: its memory goes as
//! descriptors, and no page travels.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
mod kills;

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::{
    Deadline,
    memory::{MIB, Pattern, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch,
    writer::{self, Console, Load, WRITER_RAM_KIB, assert_unbroken},
};
use serde_json::{Value, json};

const RAM_MIB: usize = 32;
const VERSIONS: [Version; 2] = [Version::Qemu100, Version::Newest];

/// Memory that can be passed: all of it is in memfds.
fn in_memfds(guest: Guest) -> Guest {
    let backend = format!("memory-backend-memfd,id=r0,size={}K,share=on", guest.ram_kib);
    guest.with(["-object", &backend, "-machine", "memory-backend=r0,aux-ram-share=on"])
}

fn guest(version: Version, dir: &Path) -> Guest {
    in_memfds(Guest::new(version, Machine::Pc, dir.join("unused"), RAM_MIB))
}

/// The same, as it waits for its memory and its migration.
fn waiting(guest: Guest, [main, cpr]: &[PathBuf; 2]) -> Guest {
    let cpr = channel("cpr", cpr).to_string();
    guest.with(["-incoming", &format!("unix:{}", main.display()), "-incoming", &cpr])
}

fn channel(kind: &str, path: &Path) -> Value {
    json!({
        "channel-type": kind,
        "addr": { "transport": "socket", "type": "unix", "path": path.display().to_string() },
    })
}

/// Paths for a main channel and one of type cpr.
fn channels(dir: &Path, name: &str) -> [PathBuf; 2] {
    ["main", "cpr"].map(|kind| dir.join(format!("{name}.{kind}")))
}

fn uri(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// Device and inode.
fn identity(path: &Path) -> (u64, u64) {
    let meta = fs::metadata(path).unwrap();
    (meta.dev(), meta.ino())
}

/// The descriptors of a process, by their paths in /proc.
fn descriptors(pid: u32) -> Vec<PathBuf> {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// The memfd of the guest's RAM, by the process that has it open.
fn ram_of(qemu: &Qemu, bytes: usize) -> PathBuf {
    let is_ram = |path: &PathBuf| {
        let target = fs::read_link(path).map(|target| target.display().to_string()).unwrap_or_default();
        target.starts_with("/memfd:") && fs::metadata(path).is_ok_and(|meta| meta.len() == bytes as u64)
    };
    descriptors(qemu.pid()).into_iter().find(is_ram).expect("a memfd as long as the RAM")
}

/// True if the process maps the file for all to see, and writable.
fn maps(qemu: &Qemu, file: &Path) -> bool {
    let inode = identity(file).1.to_string();
    let maps = fs::read_to_string(format!("/proc/{}/maps", qemu.pid())).unwrap();
    maps.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words[1] == "rw-s" && words[4] == inode
    })
}

fn transfer(qemu: &mut Qemu, [main, cpr]: &[PathBuf; 2]) {
    qemu.set_parameters(json!({ "mode": "cpr-transfer" }));
    qemu.execute("migrate", json!({ "channels": [channel("main", main), channel("cpr", cpr)] }));
}

/// A `ramwire` takes the guest of `qemu` into the folder `guest` of `dir`: its report.
fn taken(qemu: &mut Qemu, dir: &Path) -> Value {
    let places = channels(dir, "taken");
    let [main_uri, cpr_uri] = [uri(&places[0]), uri(&places[1])];
    let arguments = ["receive", &main_uri, "--cpr", &cpr_uri, "--json", "--dir"];
    let mut ramwire = Ramwire::start(dir, &arguments, dir.join("guest"));
    ramwire.listening();
    Deadline::seconds(20).poll("the cpr channel", || ramwire.errors(), || places[1].exists().then_some(()));
    transfer(qemu, &places);
    let out = ramwire.finished(Deadline::seconds(60), 0);
    qemu.wait_completed(Deadline::seconds(20));
    out
}

/// A `ramwire` that gives the folder's guest to a QEMU that will listen at `places`.
fn giving(dir: &Path, places: &[PathBuf; 2], more: &[&str]) -> Ramwire {
    let [main_uri, cpr_uri] = [uri(&places[0]), uri(&places[1])];
    let mut arguments = vec!["send", &main_uri, "--cpr", &cpr_uri, "--json"];
    arguments.extend(more);
    if !more.contains(&"--retry") {
        arguments.extend(["--retry", "60"]);
    }
    arguments.push("--dir");
    Ramwire::start(dir, &arguments, dir.join("guest"))
}

/// The file of the guest's RAM in the folder.
fn ram_file(dir: &Path, out: &Value) -> PathBuf {
    let block = out["blocks"].as_array().unwrap().iter().find(|block| block["name"] == "r0");
    dir.join("guest").join(block.expect("block r0")["file"].as_str().unwrap())
}

/// Fills the guest's RAM; returns the pattern.
fn filled(qemu: &Qemu, dir: &Path) -> Vec<u8> {
    let pattern = dir.join("pattern");
    fill(&pattern, RAM_MIB, Pattern::Mixed { seed: 7 });
    let pattern = fs::read(&pattern).unwrap();
    // It is sealed: it can be written to, and not be made anew.
    let ram = ram_of(qemu, RAM_MIB * MIB);
    fs::File::options().write(true).open(ram).unwrap().write_all(&pattern).unwrap();
    pattern
}

fn assert_no_page_sent(out: &Value, version: Version) {
    assert!(out["passed"]["bytes"].as_u64() >= Some((RAM_MIB * MIB) as u64), "{version}: {out}");
    assert_eq!((&out["ram"]["normal"], &out["ram"]["duplicate"]), (&0.into(), &0.into()), "{version}: {out}");
}

/// The memory stays where it is, the folder's contents equal it, and another QEMU continues from there.
#[test]
fn a_qemu_passes_its_memory_and_the_guest_runs_on_elsewhere() {
    if !peers_present() {
        return;
    }
    for version in VERSIONS {
        let dir = scratch();
        let dir = dir.path();
        let mut qemu = guest(version, dir).start(dir, "source");
        let ram = ram_of(&qemu, RAM_MIB * MIB);
        let before = identity(&ram);
        let pattern = filled(&qemu, dir);
        let out = taken(&mut qemu, dir);
        assert_eq!((&out["arrived"], &out["source"]), (&true.into(), &"qemu".into()), "{version}: {out}");
        assert!(out["passed"]["bytes"].as_u64() >= Some((RAM_MIB * MIB) as u64), "{version}: {out}");
        for kind in ["normal", "zero", "delta"] {
            assert_eq!(out["pages"][kind], 0, "{version}: {out}");
        }
        assert_eq!(identity(&ram), before, "{version}: the same memory");
        let stored = fs::read(ram_file(dir, &out)).unwrap();
        assert!(stored == pattern, "{version}: the folder holds other memory");
        assert!(stored == fs::read(&ram).unwrap(), "{version}");
        drop(qemu);
        let mut next = guest(version, dir).incoming().start(dir, "next");
        let uri = next.listen_unix();
        Ramwire::start(dir, &["send", &uri, "--dir"], dir.join("guest")).ended(Deadline::seconds(60));
        next.wait_completed(Deadline::seconds(20));
        assert!(
            fs::read(ram_of(&next, RAM_MIB * MIB)).unwrap() == stored,
            "{version}: another guest arrived"
        );
        next.execute("cont", json!({}));
        next.wait_status("running", Deadline::seconds(20));
    }
}

/// The files of a folder become a QEMU's memory, and the folder is not sent a second time.
#[test]
fn a_qemu_maps_the_files_of_a_folder_and_the_guest_runs_on_in_them() {
    if !peers_present() {
        return;
    }
    for version in VERSIONS {
        let dir = scratch();
        let dir = dir.path();
        let mut qemu = guest(version, dir).start(dir, "source");
        let pattern = filled(&qemu, dir);
        let ram = ram_file(dir, &taken(&mut qemu, dir));
        drop(qemu);
        let before = identity(&ram);
        let places = channels(dir, "next");
        let mut ramwire = giving(dir, &places, &[]);
        // Its monitor appears when it has its memory.
        let mut next = waiting(guest(version, dir), &places).start(dir, "next");
        let sent = ramwire.finished(Deadline::seconds(60), 0);
        assert_no_page_sent(&sent, version);
        next.wait_completed(Deadline::seconds(20));
        assert!(identity(&ram) == before && maps(&next, &ram), "{version}: {}", next.stderr());
        assert!(fs::read(&ram).unwrap() == pattern, "{version}: its memory has changed on the way");
        next.execute("cont", json!({}));
        next.wait_status("running", Deadline::seconds(20));
        let manifest: Value =
            serde_json::from_slice(&fs::read(dir.join("guest/manifest.json")).unwrap()).unwrap();
        assert_eq!((&manifest["state"], &manifest["passed"]), (&"sent".into(), &true.into()));
        let (status, text) = giving(dir, &places, &["--again"]).ended(Deadline::seconds(60));
        assert!(status == 3 && text.contains("in the RAM files of this folder"), "{status}: {text}");
    }
}

/// A memfd by its path in /proc: the second QEMU maps the memory of the first, and nothing was copied on the way.
#[test]
fn a_qemu_maps_the_memfd_of_the_one_before() {
    if !peers_present() {
        return;
    }
    for version in VERSIONS {
        let dir = scratch();
        let dir = dir.path();
        let mut qemu = guest(version, dir).start(dir, "source");
        let pattern = filled(&qemu, dir);
        let ram = ram_of(&qemu, RAM_MIB * MIB);
        taken(&mut qemu, dir);
        let places = channels(dir, "next");
        let of_the_first = format!("--ram=r0={}", ram.display());
        let mut ramwire = giving(dir, &places, &[&of_the_first]);
        let mut next = waiting(guest(version, dir), &places).start(dir, "next");
        assert_no_page_sent(&ramwire.finished(Deadline::seconds(60), 0), version);
        next.wait_completed(Deadline::seconds(20));
        assert!(maps(&next, &ram), "{version}: {}", next.stderr());
        drop(qemu);
        let of_the_next = ram_of(&next, RAM_MIB * MIB);
        assert!(fs::read(of_the_next).unwrap() == pattern, "{version}");
        next.execute("cont", json!({}));
        next.wait_status("running", Deadline::seconds(20));
    }
}

/// A Linux guest that checks its memory: from a QEMU to a ramwire and on to a QEMU, no page in a stream.
#[test]
fn a_live_guest_goes_on_in_memory_that_was_passed_both_ways() {
    let Some(images) = Some(()).filter(|()| peers_present()).and_then(|()| writer::images()) else { return };
    let load = Load { mib: 32, pages_per_second: 2000, small: false };
    for version in VERSIONS {
        let dir = scratch();
        let dir = dir.path();
        let consoles = ["source", "next"].map(|name| Console::new(dir.join(name).with_extension("console")));
        let guest = |console: &Console| {
            in_memfds(writer::guest(&images, version, Machine::Q35, load, &dir.join("unused"), console))
        };
        let mut source = guest(&consoles[0]).start(dir, "source");
        consoles[0].wait_tick("boot", Deadline::seconds(300), |tick| tick.number >= 3);
        let ram = ram_file(dir, &taken(&mut source, dir));
        assert_eq!(source.status(), "postmigrate");
        assert_eq!(fs::metadata(&ram).unwrap().len(), WRITER_RAM_KIB as u64 * 1024);
        let places = channels(dir, "next");
        let mut ramwire = giving(dir, &places, &[]);
        let mut next = waiting(guest(&consoles[1]), &places).start(dir, "next");
        assert_no_page_sent(&ramwire.finished(Deadline::seconds(60), 0), version);
        next.wait_status("running", Deadline::seconds(20));
        assert!(maps(&next, &ram), "{version}: {}", next.stderr());
        let left = consoles[0].ticks().last().copied().unwrap();
        consoles[1].wait_tick("two passes over the memory", Deadline::seconds(60), |tick| {
            tick.passes >= left.passes + 3
        });
        let last = assert_unbroken(&[&consoles[0], &consoles[1]]);
        assert!(last.sequence > left.sequence, "{version}");
    }
}

/// A QEMU with other memory refuses, and the folder can be given to the right one.
#[test]
fn a_qemu_with_more_memory_takes_none_and_the_folder_stays_whole() {
    if !peers_present() {
        return;
    }
    for version in VERSIONS {
        let dir = scratch();
        let dir = dir.path();
        let mut qemu = guest(version, dir).start(dir, "source");
        taken(&mut qemu, dir);
        drop(qemu);
        let places = channels(dir, "larger");
        let mut ramwire = giving(dir, &places, &["--retry", "5"]);
        let larger = in_memfds(Guest::new(version, Machine::Pc, dir.join("unused"), 2 * RAM_MIB));
        let started = std::panic::catch_unwind(|| waiting(larger, &places).start(dir, "larger"));
        let (status, text) = ramwire.ended(Deadline::seconds(100));
        assert_eq!(status, 3, "{version}: {text}");
        drop(started);
        let places = channels(dir, "next");
        let mut ramwire = giving(dir, &places, &[]);
        let mut next = waiting(guest(version, dir), &places).start(dir, "next");
        assert_no_page_sent(&ramwire.finished(Deadline::seconds(60), 0), version);
        next.wait_completed(Deadline::seconds(20));
    }
}

/// Between two ramwires the destination says whether it has the memory, and is given the guest only then.
#[test]
fn a_ramwire_takes_a_guest_only_with_its_memory() {
    let dir = scratch();
    let dir = dir.path();
    let (ram, pattern) = (dir.join("ram"), dir.join("pattern"));
    fill(&pattern, RAM_MIB, Pattern::Mixed { seed: 9 });
    let pattern = fs::read(&pattern).unwrap();
    fs::write(&ram, &pattern).unwrap();
    let block = format!("--ram=pc.ram={}", ram.display());
    for has_memory in [false, true] {
        let places = channels(dir, &format!("{has_memory}"));
        let [main, cpr] = [uri(&places[0]), uri(&places[1])];
        let arguments = ["receive", &main, "--cpr", &cpr, "--json", "--dir"];
        let mut taker = Ramwire::start(dir, &arguments, dir.join(format!("taker-{has_memory}")));
        let waits = || places[1].exists().then_some(());
        Deadline::seconds(20).poll("the cpr channel", || taker.errors(), waits);
        let other = uri(&dir.join(format!("{has_memory}.other")));
        let mut without = Ramwire::start(dir, &["receive", &other, "--json", "--dir"], dir.join("other"));
        without.listening();
        let to = if has_memory { &main } else { &other };
        let mut giver = Ramwire::start(dir, &["send", to, "--cpr", &cpr, "--json", "--retry", "20"], &block);
        let (status, text) = giver.ended(Deadline::seconds(60));
        assert!(fs::read(&ram).unwrap() == pattern, "{text}");
        if has_memory {
            assert_eq!(status, 0, "{text}{}", taker.errors());
            let out = taker.finished(Deadline::seconds(60), 0);
            let file = out["blocks"][0]["file"].as_str().unwrap();
            assert!(fs::read(dir.join("taker-true").join(file)).unwrap() == pattern, "{out}");
        } else {
            assert!(status == 3 && text.contains("has none of it"), "{status}: {text}");
            assert_ne!(without.ended(Deadline::seconds(60)).0, 0, "it has no guest");
            fs::remove_dir_all(dir.join("other")).unwrap();
        }
    }
}
