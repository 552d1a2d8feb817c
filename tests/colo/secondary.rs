//! A ramwire as the primary: its checkpoints are kept by a QEMU, which runs the guest when it is told that the primary is
//! dead.

use std::fs::{self, File};
use std::io::Read;
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};

use ramwire::guest::{GuestMemory, MappedGuest, SoftwareBitmap, TestMachine};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    CheckpointObserver, CheckpointOutcome, CheckpointSession, CheckpointSettings, ColoPeer, Configuration,
    SourceGuest,
};
use ramwire::sys::Mapping;
use ramwire::transport::{StreamChannel, StreamOptions};
use ramwire::units::{BlockIndex, BlockOffset, PageSize};
use serde_json::{Value, json};

use crate::common::{
    Deadline,
    memory::Random,
    qemu::{Machine, Version, peers_present},
    ramwire::Ramwire,
    scratch, scribbler,
};
use crate::{capabilities, manifest};

const CHECKPOINTS: u64 = 100;
/// Pages of the guest that its program does not use, from 4 MiB on.
const FIRST: u64 = 1024;
const PAGES: u64 = 2048;

/// A guest in memory: that of a folder, which nobody runs. The test writes to it.
struct Stored {
    memory: Arc<MappedGuest>,
    written: Arc<SoftwareBitmap>,
    machine: TestMachine,
    configuration: Configuration,
    main: BlockIndex,
}

impl Stored {
    fn of(dir: &Path) -> Self {
        let manifest: Value = manifest(dir);
        let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
        let mut main = BlockIndex(0);
        for (at, block) in manifest["blocks"].as_array().unwrap().iter().enumerate() {
            let (name, len) = (block["name"].as_str().unwrap(), block["used_length"].as_u64().unwrap());
            let bytes = fs::read(dir.join("guest").join(block["file"].as_str().unwrap())).unwrap();
            let mapping = Mapping::anonymous(len).unwrap();
            mapping.region().span(0, len).unwrap().copy_from(&bytes[..len as usize]);
            builder = builder.mapping(RamBlock::new(BlockName::new(name).unwrap(), len), &mapping);
            if name == "m0" {
                main = BlockIndex(at as u32);
            }
        }
        let memory = Arc::new(builder.build().unwrap());
        let state = fs::read(dir.join("guest/tail.bin")).unwrap();
        let machine = manifest["machine"].as_str().unwrap().to_owned();
        Self {
            written: Arc::new(SoftwareBitmap::new(memory.table())),
            memory,
            machine: TestMachine::running(&state),
            configuration: Configuration { machine, ..Configuration::default() },
            main,
        }
    }

    /// A page of one repeated word; 0 makes it zero.
    fn write(&self, page: u64, word: u64) {
        let landing = self.memory.table().admit(self.main, BlockOffset(page * 4096), 4096).unwrap();
        let bytes: Vec<u8> = word.to_le_bytes().repeat(512);
        self.memory.span(landing).unwrap().copy_from(&bytes);
        self.written.mark(landing);
    }

    fn ram(&self) -> Vec<u8> {
        let region = self.memory.region(self.main).unwrap();
        let mut out = vec![0; region.len() as usize];
        region.span(0, region.len()).unwrap().copy_to(&mut out);
        out
    }
}

/// Tells of safe checkpoints.
struct Watch(Mutex<mpsc::Sender<u64>>);

impl CheckpointObserver for Watch {
    fn taken(&mut self, _number: u64) {}

    fn safe(&mut self, number: u64) {
        let _ = self.0.lock().unwrap().send(number);
    }
}

/// A folder with the guest of a QEMU of this version that waits with interrupts off.
fn folder(version: Version, dir: &Path) {
    let source = scribbler::waiting_guest(version, Machine::Pc, dir, "source");
    let mut source = source.running().start(dir, "source");
    // Its program runs: the firmware has loaded it.
    let ram = source.ram.clone();
    Deadline::seconds(60).poll(
        "the program is loaded",
        || source.stderr(),
        || {
            let mut bytes = Vec::new();
            File::open(&ram).unwrap().read_to_end(&mut bytes).unwrap();
            (bytes[0x10_0020..0x10_0024] == [0xfa, 0xf4, 0xeb, 0xfd]).then_some(())
        },
    );
    let mut receiver =
        Ramwire::start(dir, &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], dir.join("guest"));
    source.set_parameters(json!({"max-bandwidth": 0}));
    source.migrate(&receiver.listening());
    source.wait_completed(Deadline::seconds(60));
    receiver.finished(Deadline::seconds(30), 0);
}

fn a_qemu_keeps_checkpoints(version: Version) {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    folder(version, dir);
    let guest = Stored::of(dir);
    let secondary = scribbler::waiting_guest(version, Machine::Pc, dir, "secondary");
    let mut secondary = secondary.incoming().start(dir, "secondary");
    secondary.set_capabilities(capabilities(version));
    let uri = secondary.listen_tcp();
    let socket = TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
    let channel = StreamChannel::from_fd(socket.into(), "secondary", &StreamOptions::default()).unwrap();
    let source = SourceGuest {
        memory: guest.memory.clone(),
        dirty: vec![guest.written.clone()],
        control: Box::new(guest.machine.clone()),
    };
    let mut settings = CheckpointSettings::default();
    settings.interval = None;
    let mut peer = ColoPeer::default();
    peer.configuration = guest.configuration.clone();
    peer.has_return_path = version == Version::Newest;
    let (tell, told) = mpsc::channel();
    let watch = Box::new(Watch(Mutex::new(tell)));
    let session =
        CheckpointSession::to_qemu(source, channel, watch, settings, peer).unwrap().spawn().unwrap();
    let mut random = Random(7);
    for number in 1..=CHECKPOINTS {
        let safe = told
            .recv()
            .unwrap_or_else(|_| panic!("{version}: no checkpoint {number}: {}", secondary.stderr()));
        assert_eq!(safe, number);
        if number < CHECKPOINTS {
            for _ in 0..200 {
                let word = if random.draw().is_multiple_of(4) { 0 } else { random.draw() };
                guest.write(FIRST + random.draw() % PAGES, word);
            }
            session.checkpoint();
        }
    }
    let last = guest.ram();
    // What comes behind it is not to be there.
    (FIRST..FIRST + PAGES).for_each(|page| guest.write(page, 77));
    session.stop();
    let report = session.wait().unwrap();
    assert_eq!(
        (report.outcome, report.safe),
        (CheckpointOutcome::Stopped, CHECKPOINTS),
        "{:?}",
        report.error
    );
    secondary.execute("x-colo-lost-heartbeat", json!({}));
    secondary.wait_status("running", Deadline::seconds(20));
    let exits = || {
        secondary.query_migrate();
        secondary.events().iter().any(|event| event["event"] == "COLO_EXIT").then_some(())
    };
    let mut exits = exits;
    Deadline::seconds(20).poll("COLO_EXIT", String::new, &mut exits);
    let there = fs::read(&secondary.ram).unwrap();
    let differs: Vec<usize> = there
        .chunks(4096)
        .zip(last.chunks(4096))
        .enumerate()
        .filter_map(|(page, (there, here))| (there != here).then_some(page))
        .collect();
    assert!(
        differs.is_empty(),
        "{version}: {} pages differ, first {:?}",
        differs.len(),
        &differs[..differs.len().min(8)]
    );
    println!("{version}: {CHECKPOINTS} checkpoints, {} pages, pauses {:?}", report.pages, report.pauses);
}

#[test]
fn a_qemu_72_runs_on_from_the_last_of_a_hundred_checkpoints_of_a_ramwire() {
    a_qemu_keeps_checkpoints(Version::Qemu72);
}

#[test]
fn the_newest_qemu_runs_on_from_the_last_of_a_hundred_checkpoints_of_a_ramwire() {
    a_qemu_keeps_checkpoints(Version::Newest);
}
