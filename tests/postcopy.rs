//! A guest that runs here before its memory has come: postcopy from stock QEMUs into a process whose threads touch every
//! page in an order of their own, and wait for those that are missing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use common::{
    Deadline,
    memory::{Pattern, Random, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    scratch,
};
use ramwire::engine::Ending;
use ramwire::guest::{GuestControl, GuestMemory, MappedGuest};
use ramwire::session::{
    DestinationReport, DestinationSession, DestinationSettings, Error, Incoming, MemoryProvider,
};
use ramwire::sys::{Mapping, Stop};
use ramwire::transport::{Address, AllowList, Listener, StreamOptions};
use ramwire::units::PageSize;
use serde_json::json;

const RAM_MIB: usize = 64;
const PAGE: usize = 4096;

/// Memory of any list of blocks, made when it is announced.
#[derive(Clone, Default)]
struct Memory(Arc<OnceLock<Arc<MappedGuest>>>);

impl MemoryProvider for Memory {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
        for block in &incoming.blocks {
            let mapping = Mapping::memfd(block.name.as_str(), block.used_length).unwrap();
            builder = builder.mapping(block.clone(), &mapping);
        }
        let guest = self.0.get_or_init(|| Arc::new(builder.build().unwrap()));
        Ok(Arc::clone(guest) as Arc<dyn GuestMemory>)
    }
}

/// A page of block `m0`, as a thread that runs in the guest reads it.
fn page_of(guest: &MappedGuest, page: usize) -> [u8; PAGE] {
    let index = guest.table().find("m0").unwrap();
    let mut bytes = [0; PAGE];
    guest.region(index).unwrap().span((page * PAGE) as u64, PAGE as u64).unwrap().copy_to(&mut bytes);
    bytes
}

/// "vCPUs": threads that begin when the guest is started and touch all pages. Each gives the pages that were wrong.
#[derive(Clone)]
struct Vcpus {
    memory: Memory,
    expected: Arc<Vec<u8>>,
    threads: usize,
    running: Arc<Mutex<Vec<JoinHandle<Vec<usize>>>>>,
    state: Arc<Mutex<Vec<u8>>>,
}

impl GuestControl for Vcpus {
    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        for seed in 0..self.threads {
            let (memory, expected) = (Arc::clone(self.memory.0.get().unwrap()), Arc::clone(&self.expected));
            let touch = move || {
                let mut order: Vec<usize> = (0..RAM_MIB << 8).collect();
                let mut random = Random(seed as u64);
                for at in (1..order.len()).rev() {
                    order.swap(at, (random.draw() % (at as u64 + 1)) as usize);
                }
                let wrong = |page: &usize| page_of(&memory, *page)[..] != expected[page * PAGE..][..PAGE];
                order.into_iter().filter(wrong).collect()
            };
            self.running.lock().unwrap().push(std::thread::spawn(touch));
        }
        Ok(())
    }

    fn save_devices(&mut self, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }

    fn load_devices(&mut self, from: &mut dyn Read) -> io::Result<()> {
        from.read_to_end(&mut self.state.lock().unwrap()).map(drop)
    }
}

struct Destination {
    uri: String,
    vcpus: Vcpus,
    session: JoinHandle<DestinationReport>,
}

impl Destination {
    /// Listens, and receives what comes.
    fn start(expected: Vec<u8>, threads: usize) -> Self {
        let address: Address = "tcp:127.0.0.1:0".parse().unwrap();
        let mut listener = Listener::bind(&address, AllowList::default(), &Stop::never()).unwrap();
        let uri = listener.address().to_string();
        let memory = Memory::default();
        let (running, state) = (Arc::default(), Arc::default());
        let vcpus = Vcpus { memory: memory.clone(), expected: Arc::new(expected), threads, running, state };
        let control = vcpus.clone();
        let session = std::thread::spawn(move || {
            let channel = listener.accept(&StreamOptions::default(), &Stop::never()).unwrap();
            let settings = DestinationSettings { postcopy: true, ..DestinationSettings::default() };
            DestinationSession::over(channel, Box::new(memory), Box::new(control), settings).run()
        });
        Self { uri, vcpus, session }
    }

    /// Waits for the end of the migration and of the threads; no page may be wrong.
    fn finish(self, what: &str) -> DestinationReport {
        let report = self.session.join().unwrap();
        let Vcpus { running, .. } = self.vcpus;
        for thread in running.lock().unwrap().drain(..) {
            let wrong = thread.join().unwrap();
            assert!(wrong.is_empty(), "{what}: {} pages are wrong, first {:?}", wrong.len(), wrong.first());
        }
        report
    }
}

/// A QEMU whose paused guest has patterned memory, sending slowly until it switches over.
fn source(version: Version, dir: &std::path::Path) -> (Qemu, Vec<u8>) {
    let ram = dir.join("sent");
    fill(&ram, RAM_MIB, Pattern::Mixed { seed: 11 });
    let expected = std::fs::read(&ram).unwrap();
    let mut source = Guest::new(version, Machine::PcI440fx72, &ram, RAM_MIB).start(dir, "source");
    source.set_capabilities(&["postcopy-ram"]);
    source.set_parameters(json!({"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 8 << 20}));
    (source, expected)
}

#[test]
fn p2_p5_a_guest_runs_here_before_its_memory_has_come_from_any_qemu() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        let dir = scratch();
        let (mut source, expected) = source(version, dir.path());
        let destination = Destination::start(expected, 4);
        source.migrate(&destination.uri);
        let deadline = Deadline::seconds(60);
        while source.query_migrate()["ram"]["transferred"].as_u64().unwrap_or(0) < 1 << 20 {
            assert!(!deadline.is_over(), "{version}: no pages leave\n{}", source.stderr());
            std::thread::yield_now();
        }
        source.execute("migrate-start-postcopy", json!({}));
        let what = format!("{version} to a process of this test");
        let report = destination.finish(&what);
        assert!(report.error.is_none(), "{what}: {:?}\n{}", report.error, source.stderr());
        assert_eq!(report.ending, Ending::Running, "{what}");
        let info = source.wait_completed(Deadline::seconds(60));
        let missing = report.missing_pages.expect("it switched to postcopy");
        println!("{what}: {missing:?}");
        assert!(missing.faults > 0 && missing.requests > 0, "{what}: nobody had to wait: {missing:?}");
        assert!(info["ram"]["postcopy-requests"].as_u64().unwrap() > 0, "{what}: {info}");
    }
}
