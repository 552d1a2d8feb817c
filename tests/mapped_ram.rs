//! Files with a fixed offset for every page (mapped-ram), from QEMUs and to them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::{
    Deadline,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch,
    writer::{self, Console, Load, assert_unbroken},
};
use ramwire::engine::Ending;
use ramwire::guest::{DeviceState, GuestControl, GuestMemory, MappedGuest};
use ramwire::session::{
    Configuration, DestinationGuest, Incoming, MemoryProvider, RestoreSession, RestoreSettings,
    SnapshotGuest, SnapshotOutcome, SnapshotSession, SnapshotSettings,
};
use ramwire::sys::{Mapping, Stop};
use ramwire::transport::{Address, ConnectionOptions, open_source};
use ramwire::units::PageSize;
use serde_json::{Value, json};

/// QEMUs that support the format; 7.2 does not.
const VERSIONS: [Version; 2] = [Version::Qemu100, Version::Newest];

const MIB: usize = 24;

/// How a QEMU writes or reads the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Plain,
    Multifd,
    DirectIo,
}

impl How {
    const ALL: [Self; 3] = [Self::Plain, Self::Multifd, Self::DirectIo];

    fn set(self, qemu: &mut Qemu) {
        qemu.set_capabilities(&["mapped-ram"]);
        if self != Self::Plain {
            qemu.set_capabilities(&["multifd"]);
            qemu.set_parameters(json!({"multifd-channels": 3}));
        }
        if self == Self::DirectIo {
            qemu.set_parameters(json!({"direct-io": true}));
        }
    }
}

/// A paused guest of `version` with patterned memory saves itself to `file`.
fn save(version: Version, how: How, dir: &Path, ram: &Path, file: &str) {
    let mut source = Guest::new(version, Machine::Q35, ram, MIB).start(dir, "source");
    how.set(&mut source);
    source.set_parameters(json!({"max-bandwidth": 0}));
    source.migrate(&format!("file:{file}"));
    source.wait_completed(Deadline::seconds(60));
    source.kill();
}

/// A guest of `version` loads itself from `file`, and continues.
fn load(version: Version, how: How, dir: &Path, file: &str) -> PathBuf {
    let ram = dir.join("loaded");
    fill(&ram, MIB, Pattern::Zero);
    let mut destination = Guest::new(version, Machine::Q35, &ram, MIB).incoming().start(dir, "destination");
    how.set(&mut destination);
    destination.listen(&format!("file:{file}"));
    destination.wait_completed(Deadline::seconds(60));
    let loaded = dir.join("loaded-copy");
    std::fs::copy(&ram, &loaded).unwrap();
    destination.execute("cont", json!({}));
    assert_eq!(destination.status(), "running", "{version} {how:?}");
    destination.kill();
    loaded
}

/// The file of RAM block `m0` in the folder.
fn ram_file(folder: &Path) -> PathBuf {
    let text = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(manifest["state"], "whole", "{manifest}");
    assert_eq!(manifest["capabilities"], json!([]), "it is no matter of the guest how it was stored");
    let blocks = manifest["blocks"].as_array().unwrap();
    let block = blocks.iter().find(|block| block["name"] == "m0").expect("the block is in the manifest");
    folder.join(block["file"].as_str().unwrap())
}

fn inspect(dir: &Path, address: &str) -> Value {
    Ramwire::start(dir, &["inspect", "--json"], address).finished(Deadline::seconds(60), 0)
}

fn same(what: &str, left: &Path, right: &Path) {
    compare(left, right).unwrap_or_else(|difference| panic!("{what}: {difference:?}"));
}

/// QEMU -> file -> folder -> file -> QEMU: the bytes are equal at each step.
fn there_and_back(version: Version, how: How) {
    let what = format!("{version}, {how:?}");
    // Direct I/O wants a disk.
    let dir = tempfile::tempdir_in(common::project_root().join("target")).unwrap();
    let path = dir.path();
    let (sent, folder) = (path.join("sent"), path.join("guest"));
    fill(&sent, MIB, Pattern::Mixed { seed: 14 });
    let file = path.join("by-qemu").display().to_string();
    save(version, how, path, &sent, &file);

    let report = inspect(path, &format!("mapped:{file}"));
    assert_eq!(report["end"], "whole", "{what}: {report:#}");
    let blocks = report["blocks"].as_array().unwrap();
    let block = blocks.iter().find(|block| block["name"] == "m0").unwrap();
    let in_file = block["pages_present"].as_u64().unwrap();
    assert!(in_file > 0 && block["holes"].as_u64().unwrap() > 0, "{what}: {block}");

    let mut receiver =
        Ramwire::start(path, &["receive", &format!("mapped:{file}"), "--json", "--dir"], &folder);
    let report = receiver.finished(Deadline::seconds(60), 0);
    assert_eq!(report["transport"], "mapped", "{what}: {report}");
    same(&format!("{what}: in the folder"), &sent, &ram_file(&folder));

    let ours = path.join("by-ramwire");
    let uri = format!("mapped:{}", ours.display());
    let report =
        Ramwire::start(path, &["send", &uri, "--json", "--dir"], &folder).finished(Deadline::seconds(60), 0);
    assert_eq!(report["status"], "completed", "{what}: {report}");
    assert!(
        std::fs::metadata(&ours).unwrap().blocks() * 512 < (MIB as u64) << 20,
        "{what}: zero pages are holes"
    );
    let report = inspect(path, &uri);
    assert_eq!((&report["end"], &report["anomalies"]), (&json!("whole"), &json!([])), "{what}: {report:#}");
    let loaded = load(version, how, path, &ours.display().to_string());
    same(&format!("{what}: loaded"), &sent, &loaded);
}

#[test]
fn s69_s70_s72_a_guest_goes_from_qemu_100_by_files_to_a_folder_and_back() {
    if peers_present() {
        How::ALL.into_iter().for_each(|how| there_and_back(Version::Qemu100, how));
    }
}

#[test]
fn s69_s70_s72_a_guest_goes_from_the_newest_qemu_by_files_to_a_folder_and_back() {
    if peers_present() {
        How::ALL.into_iter().for_each(|how| there_and_back(Version::Newest, how));
    }
}

/// As libvirt writes it: after a header of its own.
#[test]
fn s69_streams_begin_behind_what_stands_in_front() {
    if !peers_present() {
        return;
    }
    for version in VERSIONS {
        let dir = scratch();
        let path = dir.path();
        let (sent, folder) = (path.join("sent"), path.join("guest"));
        fill(&sent, MIB, Pattern::Mixed { seed: 15 });
        let file = path.join("by-qemu");
        std::fs::write(&file, [b'v'; 4096]).unwrap();
        let file = file.display().to_string();
        save(version, How::Plain, path, &sent, &format!("{file},offset=4096"));
        let uri = format!("mapped:{file},offset=4096");
        Ramwire::start(path, &["receive", &uri, "--json", "--dir"], &folder)
            .finished(Deadline::seconds(60), 0);
        same(&format!("{version}: in the folder"), &sent, &ram_file(&folder));

        // Where it begins is found.
        let report = inspect(path, &format!("mapped:{file}"));
        assert_eq!(report["end"], "whole", "{version}: {report:#}");
        let (uri, found) = (format!("mapped:{file}"), path.join("found"));
        let copied = format!("mapped:{}", path.join("copied").display());
        Ramwire::start(path, &["send", &copied, "--json", "--from"], &uri).finished(Deadline::seconds(60), 0);
        Ramwire::start(path, &["receive", &copied, "--json", "--dir"], &found)
            .finished(Deadline::seconds(60), 0);
        same(&format!("{version}: found and sent on"), &sent, &ram_file(&found));

        let ours = path.join("by-ramwire");
        std::fs::write(&ours, [b'v'; 8192]).unwrap();
        let uri = format!("mapped:{},offset=4096", ours.display());
        Ramwire::start(path, &["send", &uri, "--json", "--dir"], &folder).finished(Deadline::seconds(60), 0);
        assert!(std::fs::read(&ours).unwrap().starts_with(&[b'v'; 4096]));
        let loaded = load(version, How::Plain, path, &format!("{},offset=4096", ours.display()));
        same(&format!("{version}: loaded"), &sent, &loaded);
    }
}

/// A VMM of ours that runs a QEMU's guest: its memory, and its devices as QEMU has saved them.
#[derive(Clone, Default)]
struct Adopted(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    configuration: Configuration,
    memory: Option<Arc<MappedGuest>>,
    devices: Vec<u8>,
}

impl MemoryProvider for Adopted {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, ramwire::session::Error> {
        assert!(incoming.early_sections.is_empty(), "they would be missing in the snapshot");
        let memory = incoming.map(PageSize::SIZE_4K, |block| {
            Ok(Mapping::memfd("qemu", block.used_length).unwrap().region().clone())
        })?;
        let mut kept = self.0.lock().unwrap();
        kept.configuration = incoming.configuration.clone();
        kept.memory = Some(memory.clone());
        Ok(memory)
    }
}

impl GuestControl for Adopted {
    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn resume(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        true
    }
}

impl DeviceState for Adopted {
    fn save(&mut self, out: &mut dyn io::Write) -> io::Result<()> {
        out.write_all(&self.0.lock().unwrap().devices)
    }
    fn load(&mut self, from: &mut dyn io::Read) -> io::Result<()> {
        from.read_to_end(&mut self.0.lock().unwrap().devices).map(drop)
    }
}

/// QEMU reads a snapshot's stream to its end and never sees the note behind it: plain, by several threads and past the
/// page cache.
#[test]
fn s69_a_snapshot_with_its_note_behind_the_stream_is_a_file_for_qemu() {
    if !peers_present() {
        return;
    }
    for (version, how) in VERSIONS.into_iter().flat_map(|version| How::ALL.map(|how| (version, how))) {
        let what = format!("{version}, {how:?}");
        let dir = tempfile::tempdir_in(common::project_root().join("target")).unwrap();
        let path = dir.path();
        let sent = path.join("sent");
        fill(&sent, MIB, Pattern::Mixed { seed: 16 });
        let [by_qemu, ours] = ["by-qemu", "by-ramwire"].map(|name| path.join(name).display().to_string());
        save(version, How::Plain, path, &sent, &by_qemu);

        let adopted = Adopted::default();
        let arriving =
            DestinationGuest { memory: Box::new(adopted.clone()), control: Box::new(adopted.clone()) };
        let address = format!("mapped:{by_qemu}").parse().unwrap();
        let restored =
            RestoreSession::open(arriving, &address, RestoreSettings::default()).unwrap().run().unwrap();
        assert_eq!(restored.report.ending, Ending::Running, "{what}: {:?}", restored.report.error);

        let (configuration, memory) = {
            let kept = adopted.0.lock().unwrap();
            (kept.configuration.clone(), kept.memory.clone().unwrap())
        };
        let mut settings = SnapshotSettings::new(configuration);
        settings.user_mode_only = true;
        let guest = SnapshotGuest { memory, control: Box::new(adopted), other_writers: Vec::new() };
        let session = SnapshotSession::new(guest, settings).unwrap();
        let address: Address = format!("mapped:{ours}").parse().unwrap();
        let options = ConnectionOptions::default();
        let connection = open_source(&address, session.memory(), &options, &Stop::never()).unwrap();
        let report = session.run(connection);
        assert_eq!(report.outcome, SnapshotOutcome::Taken, "{what}: {:?}", report.error);
        assert!(std::fs::read(&ours).unwrap().ends_with(b"RWNOTE\r\n"), "{what}: the note is at its end");

        let loaded = load(version, how, path, &ours);
        same(&format!("{what}: loaded"), &sent, &loaded);
    }
}

/// A running QEMU's guest is saved while it runs, loaded by another QEMU, and continues writing and checking its
/// memory.
#[test]
fn s72_a_live_guest_is_saved_through_a_relay_and_runs_on_elsewhere() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    const LOAD: Load = Load { mib: 32, pages_per_second: 2000, small: false };
    for version in VERSIONS {
        let dir = scratch();
        let path = dir.path();
        let consoles =
            ["source", "destination"].map(|name| Console::new(path.join(name).with_extension("console")));
        let guest = |name: &str, console| {
            let ram = path.join(name).with_extension("ram");
            writer::guest(&images, version, Machine::Q35, LOAD, &ram, console)
        };
        let mut source = guest("source", &consoles[0]).start(path, "source");
        let mut destination = guest("destination", &consoles[1]).incoming().start(path, "destination");
        consoles[0].wait_tick("boot", Deadline::seconds(300), |tick| tick.number >= 3);

        let file = path.join("saved").display().to_string();
        source.set_capabilities(&["return-path"]);
        let arguments = ["relay", "--json", "--listen", "tcp:127.0.0.1:0", "--connect"];
        let mut relay = Ramwire::start(path, &arguments, format!("mapped:{file}"));
        source.migrate(&relay.listening());
        source.wait_completed_within(12, Deadline::seconds(120));
        let report = relay.finished(Deadline::seconds(60), 0);
        assert_eq!(report["completed"], true, "{version}: {report}");
        let rounds = report["far"]["rounds"].as_array().unwrap();
        let dirty = rounds.iter().filter(|round| round["dirty_pages"].as_u64() > Some(0)).count();
        assert!(dirty >= 2, "pages are written again in place: {report}");
        assert_eq!(source.status(), "postmigrate");

        How::Multifd.set(&mut destination);
        destination.listen(&format!("file:{file}"));
        destination.wait_status("running", Deadline::seconds(60));
        let left = consoles[0].ticks().last().copied().unwrap();
        consoles[1].wait_tick("two passes over the memory that arrived", Deadline::seconds(120), |tick| {
            tick.passes >= left.passes + 3
        });
        let last = assert_unbroken(&[&consoles[0], &consoles[1]]);
        assert!(last.sequence > left.sequence, "{version}");
    }
}

/// A relay sends a file to a QEMU of any version, without a folder in between.
#[test]
fn s70_a_file_goes_straight_to_another_qemu() {
    if !peers_present() {
        return;
    }
    for (from, to) in [(Version::Qemu100, Version::Qemu72), (Version::Newest, Version::Qemu100)] {
        let dir = scratch();
        let path = dir.path();
        let (sent, arrived) = (path.join("sent"), path.join("arrived"));
        fill(&sent, MIB, Pattern::Mixed { seed: 16 });
        fill(&arrived, MIB, Pattern::Zero);
        let machine = Machine::PcI440fx72;
        let file = path.join("by-qemu").display().to_string();
        let mut source = Guest::new(from, machine, &sent, MIB).start(path, "source");
        How::Plain.set(&mut source);
        source.migrate(&format!("file:{file}"));
        source.wait_completed(Deadline::seconds(60));
        source.kill();
        let mut destination = Guest::new(to, machine, &arrived, MIB).incoming().start(path, "destination");
        let uri = destination.listen_tcp();
        let arguments = ["relay", "--json", "--listen", &format!("mapped:{file}"), "--connect"];
        let report = Ramwire::start(path, &arguments, &uri).finished(Deadline::seconds(60), 0);
        assert_eq!(report["completed"], true, "{from} to {to}: {report}");
        destination.wait_completed(Deadline::seconds(10));
        same(&format!("{from} to {to}"), &sent, &arrived);
        destination.kill();

        // The same directly from the pages in the file, by page channels if the QEMU supports ours; the file stays
        // unchanged.
        let before = std::fs::read(&file).unwrap();
        let again = path.join("again");
        fill(&again, MIB, Pattern::Zero);
        let mut destination = Guest::new(to, machine, &again, MIB).incoming().start(path, "again");
        destination.set_capabilities(&["multifd"]);
        let uri = destination.listen_tcp();
        let from_file = format!("mapped:{file}");
        let arguments = ["send", &uri, "--json", "--channels", "2", "--from"];
        let report = Ramwire::start(path, &arguments, &from_file).finished(Deadline::seconds(60), 0);
        assert_eq!(report["status"], "completed", "{from} to {to}: {report}");
        destination.wait_completed(Deadline::seconds(10));
        same(&format!("{from} to {to}, from its places"), &sent, &again);
        assert!(std::fs::read(&file).unwrap() == before);
        let refused = Ramwire::start(path, &["send", &from_file, "--from"], &from_file)
            .failed(Deadline::seconds(20), 3);
        assert!(refused.contains("another process"), "onto itself: {refused}");
    }
}
