//! A QEMU hands its guest to a `ramwire` on the same host in mode cpr-transfer: its memory as descriptors, and no page.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

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
};
use serde_json::json;

const RAM_MIB: usize = 32;

/// A guest whose memory can be passed: all of it is in memfds.
fn guest(version: Version, dir: &Path) -> Guest {
    let unused = dir.join("unused");
    let backend = format!("memory-backend-memfd,id=r0,size={RAM_MIB}M,share=on");
    let machine = "memory-backend=r0,aux-ram-share=on";
    Guest::new(version, Machine::Pc, unused, RAM_MIB).with(["-object", &backend, "-machine", machine])
}

/// The memfd of the guest's RAM, by the process that has it open.
fn ram_of(qemu: &Qemu) -> PathBuf {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", qemu.pid())).unwrap();
    let mut paths = descriptors.map(|entry| entry.unwrap().path());
    let is_ram = |path: &PathBuf| {
        let target = fs::read_link(path).map(|target| target.display().to_string()).unwrap_or_default();
        target.starts_with("/memfd:")
            && fs::metadata(path).is_ok_and(|meta| meta.len() == (RAM_MIB * MIB) as u64)
    };
    paths.find(is_ram).expect("a memfd as long as the RAM")
}

fn transfer(qemu: &mut Qemu, main: &Path, cpr: &Path) {
    qemu.set_parameters(json!({ "mode": "cpr-transfer" }));
    let channel = |kind: &str, path: &Path| {
        json!({
            "channel-type": kind,
            "addr": { "transport": "socket", "type": "unix", "path": path.display().to_string() },
        })
    };
    qemu.execute("migrate", json!({ "channels": [channel("main", main), channel("cpr", cpr)] }));
}

/// The memory stays where it is, the folder's contents equal it, and another QEMU continues from there.
#[test]
fn a_qemu_passes_its_memory_and_the_guest_runs_on_elsewhere() {
    if !peers_present() {
        return;
    }
    for version in [Version::Qemu100, Version::Newest] {
        let dir = scratch();
        let mut qemu = guest(version, dir.path()).start(dir.path(), "source");
        let ram = ram_of(&qemu);
        let inode = fs::metadata(&ram).unwrap().ino();
        let pattern = dir.path().join("pattern");
        fill(&pattern, RAM_MIB, Pattern::Mixed { seed: 7 });
        // It is sealed: it can be written to, and not be made anew.
        fs::File::options().write(true).open(&ram).unwrap().write_all(&fs::read(&pattern).unwrap()).unwrap();
        let [main, cpr, folder] = ["main.sock", "cpr.sock", "guest"].map(|name| dir.path().join(name));
        let [main_uri, cpr_uri] = [&main, &cpr].map(|path| format!("unix:{}", path.display()));
        let arguments = ["receive", &main_uri, "--cpr", &cpr_uri, "--json", "--dir"];
        let mut ramwire = Ramwire::start(dir.path(), &arguments, &folder);
        ramwire.listening();
        Deadline::seconds(20).poll("the cpr channel", || ramwire.errors(), || cpr.exists().then_some(()));
        transfer(&mut qemu, &main, &cpr);
        let out = ramwire.finished(Deadline::seconds(60), 0);
        qemu.wait_completed(Deadline::seconds(20));
        assert_eq!((&out["arrived"], &out["source"]), (&true.into(), &"qemu".into()), "{version}: {out}");
        assert!(out["passed"]["bytes"].as_u64() >= Some((RAM_MIB * MIB) as u64), "{version}: {out}");
        for kind in ["normal", "zero", "delta"] {
            assert_eq!(out["pages"][kind], 0, "{version}: {out}");
        }
        assert_eq!(fs::metadata(&ram).unwrap().ino(), inode, "{version}: the same memory");
        let blocks = out["blocks"].as_array().unwrap();
        let file =
            blocks.iter().find(|block| block["name"] == "r0").map(|block| block["file"].as_str().unwrap());
        let stored = fs::read(folder.join(file.expect("block r0"))).unwrap();
        assert!(stored == fs::read(&pattern).unwrap(), "{version}: the folder holds other memory");
        assert!(stored == fs::read(&ram).unwrap(), "{version}");
        drop(qemu);
        let mut next = guest(version, dir.path()).incoming().start(dir.path(), "next");
        let uri = next.listen_unix();
        Ramwire::start(dir.path(), &["send", &uri, "--dir"], &folder).ended(Deadline::seconds(60));
        next.wait_completed(Deadline::seconds(20));
        assert!(fs::read(ram_of(&next)).unwrap() == stored, "{version}: another guest arrived");
        next.execute("cont", json!({}));
        next.wait_status("running", Deadline::seconds(20));
    }
}
