//! A guest that runs here before its memory has arrived: postcopy from unmodified QEMUs into a process whose threads
//! touch every page in different orders, and wait for missing ones.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use common::{
    Deadline,
    huge_pages::HugePages,
    memory::{Pattern, Random, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    scratch,
};
use ramwire::engine::Ending;
use ramwire::guest::{DeviceState, GuestControl, GuestMemory, MappedGuest};
use ramwire::observe::{SharedStatistics, Statistics, Status};
use ramwire::session::{
    DestinationConnection, DestinationGuest, DestinationReport, DestinationSession, DestinationSettings,
    Error, Incoming, MemoryProvider, MissingPages,
};
use ramwire::sys::{Mapping, Stop};
use ramwire::transport::{
    Address, AllowList, ConnectionOptions, Listener, OpenError, StreamBreaker, StreamChannel, StreamOptions,
};
use ramwire::units::PageSize;
use serde_json::{Value, json};

const RAM_MIB: usize = 64;
const PAGE: usize = 4096;

/// The kind of memory that the guest is received into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Memfd,
    Anonymous,
    /// `m0` of pages of 2 MiB, the other blocks of base pages.
    Huge,
}

/// Memory for any list of blocks, created when it is announced.
#[derive(Clone, Default)]
struct Memory(Arc<OnceLock<Arc<MappedGuest>>>, Kind);

impl MemoryProvider for Memory {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
        for block in &incoming.blocks {
            let (name, length) = (block.name.as_str(), block.used_length);
            let mapping = match self.1 {
                Kind::Huge if name == "m0" => Mapping::memfd_huge(name, length, PageSize::SIZE_2M),
                Kind::Anonymous => Mapping::anonymous(length),
                _ => Mapping::memfd(name, length),
            };
            let mapping = mapping.unwrap();
            builder = builder.mapping(block.clone(), &mapping);
        }
        let guest = self.0.get_or_init(|| Arc::new(builder.build().unwrap()));
        Ok(Arc::clone(guest) as Arc<dyn GuestMemory>)
    }
}

/// A page of block `m0`, as a thread of the guest reads it.
fn page_of(guest: &MappedGuest, page: usize) -> [u8; PAGE] {
    let index = guest.table().find("m0").unwrap();
    let mut bytes = [0; PAGE];
    guest.region(index).unwrap().span((page * PAGE) as u64, PAGE as u64).unwrap().copy_to(&mut bytes);
    bytes
}

/// "vCPUs": threads that begin when the guest is started and touch all pages. Each returns the wrong pages.
#[derive(Clone)]
struct Vcpus {
    memory: Memory,
    expected: Arc<Vec<u8>>,
    threads: usize,
    running: Arc<Mutex<Vec<JoinHandle<Vec<usize>>>>>,
    state: Arc<Mutex<Vec<u8>>>,
    /// It takes the device state.
    loads: bool,
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

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for Vcpus {
    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        from.read_to_end(&mut self.state.lock().unwrap())?;
        if self.loads { Ok(()) } else { Err(io::Error::other("these devices are unknown")) }
    }
}

enum Figures {
    Awaited(std::sync::mpsc::Receiver<SharedStatistics>),
    Here(SharedStatistics),
}

struct Destination {
    uri: String,
    vcpus: Vcpus,
    session: JoinHandle<DestinationReport>,
    figures: Figures,
    /// Breaks the connections.
    breakers: Arc<Mutex<Vec<StreamBreaker>>>,
}

impl Destination {
    /// Listens, and receives a guest.
    fn start(expected: Vec<u8>, threads: usize) -> Self {
        Self::in_memory(Kind::Memfd, expected, threads)
    }

    fn in_memory(kind: Kind, expected: Vec<u8>, threads: usize) -> Self {
        Self::with(kind, expected, threads, 0, true)
    }

    /// With so many page channels in precopy. Without `loads` the device state is refused.
    fn with(kind: Kind, expected: Vec<u8>, threads: usize, channels: u8, loads: bool) -> Self {
        let address: Address = "tcp:127.0.0.1:0".parse().unwrap();
        let mut listener = Listener::bind(&address, AllowList::default(), &Stop::never()).unwrap();
        let uri = listener.address().to_string();
        let memory = Memory(Arc::default(), kind);
        let (running, state) = (Arc::default(), Arc::default());
        let expected = Arc::new(expected);
        let vcpus = Vcpus { memory: memory.clone(), expected, threads, running, state, loads };
        let (control, breakers) = (vcpus.clone(), Arc::new(Mutex::new(Vec::new())));
        let (tell, figures) = std::sync::mpsc::channel();
        let holder = Arc::clone(&breakers);
        let session = std::thread::spawn(move || {
            let mut options = ConnectionOptions::default();
            options.channels.count = channels;
            let several =
                (channels > 0).then(|| listener.accept_connection(&options, &Stop::never()).unwrap());
            let mut accept = move |stop: &Stop| -> Result<StreamChannel, OpenError> {
                let channel = listener.accept(&StreamOptions::default(), stop)?;
                holder.lock().unwrap().push(channel.breaker());
                Ok(channel)
            };
            let first =
                several.unwrap_or_else(|| DestinationConnection::over(accept(&Stop::never()).unwrap()));
            let mut settings = DestinationSettings::default();
            settings.postcopy = true;
            let session = DestinationSession::new(
                DestinationGuest { memory: Box::new(memory), control: Box::new(control) },
                first,
                settings,
            )
            .with_next_connection(Box::new(accept));
            tell.send(session.statistics()).unwrap();
            session.run()
        });
        // The session's figures exist once the source has connected.
        let figures = Figures::Awaited(figures);
        Self { uri, vcpus, session, figures, breakers }
    }

    /// Breaks all connections, like a network outage.
    fn cut(&self) {
        self.breakers.lock().unwrap().drain(..).for_each(|breaker| breaker.reset());
    }

    fn figures(&mut self) -> Statistics {
        if let Figures::Awaited(figures) = &self.figures {
            self.figures = Figures::Here(figures.recv().unwrap());
        }
        match &self.figures {
            Figures::Here(figures) => figures.snapshot(),
            Figures::Awaited(_) => unreachable!(),
        }
    }

    /// Waits until the figures are as wanted.
    fn wait(&mut self, source: &mut Qemu, what: &str, wanted: impl Fn(&Statistics) -> bool) {
        let deadline = Deadline::seconds(100);
        loop {
            let figures = self.figures();
            if wanted(&figures) {
                return;
            }
            if deadline.is_over() || figures.ended {
                let (status, pages, error) = (figures.status, figures.pages, figures.error);
                let info = source.query_migrate();
                panic!("{what}: {status:?}, {pages:?}, {error:?}; the source: {info}\n{}", source.stderr());
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
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
fn source(version: Version, dir: &Path) -> (Qemu, Vec<u8>) {
    let ram = dir.join("sent");
    fill(&ram, RAM_MIB, Pattern::Mixed { seed: 11 });
    let expected = std::fs::read(&ram).unwrap();
    (source_of(version, dir, &ram, &["postcopy-ram"]), expected)
}

fn source_of(version: Version, dir: &Path, ram: &Path, capabilities: &[&str]) -> Qemu {
    let mut source = Guest::new(version, Machine::PcI440fx72, ram, RAM_MIB).start(dir, "source");
    source.set_capabilities(capabilities);
    source.set_parameters(json!({"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": 8 << 20}));
    source
}

/// Migrates, switches over after some pages were sent, and waits for the end: no page is wrong.
fn switch_over(source: &mut Qemu, destination: Destination, what: &str) -> (MissingPages, Statistics) {
    source.migrate(&destination.uri);
    let deadline = Deadline::seconds(60);
    while source.query_migrate()["ram"]["transferred"].as_u64().unwrap_or(0) < 1 << 20 {
        assert!(!deadline.is_over(), "{what}: no pages leave\n{}", source.stderr());
        std::thread::yield_now();
    }
    source.execute("migrate-start-postcopy", json!({}));
    let report = destination.finish(what);
    assert!(report.error.is_none(), "{what}: {:?}\n{}", report.error, source.stderr());
    assert_eq!(report.ending, Ending::Running, "{what}");
    let info = source.wait_completed(Deadline::seconds(60));
    let (missing, statistics) = (report.missing_pages.expect("it switched to postcopy"), report.statistics);
    println!("{what}: {missing:?}");
    assert!(missing.faults > 0 && missing.requests > 0, "{what}: nobody had to wait: {missing:?}");
    assert!(info["ram"]["postcopy-requests"].as_u64().unwrap() > 0, "{what}: {info}");
    (missing, statistics)
}

#[test]
fn p2_p5_a_guest_runs_here_before_its_memory_has_come_from_any_qemu() {
    if !peers_present() {
        return;
    }
    for (version, kind) in Version::ALL.into_iter().zip([Kind::Memfd, Kind::Anonymous, Kind::Memfd]) {
        let dir = scratch();
        let (mut source, expected) = source(version, dir.path());
        let destination = Destination::in_memory(kind, expected, 4);
        switch_over(&mut source, destination, &format!("{version} to {kind:?}"));
    }
}

/// Urgent pages arrive on their own connection, which the source opens immediately (7.2) or when it switches over.
#[test]
fn p4_p14_urgent_pages_come_beside_the_others() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        let latency = [&["postcopy-ram"][..], &["postcopy-ram", "postcopy-preempt"]].map(|capabilities| {
            let dir = scratch();
            let ram = dir.path().join("sent");
            fill(&ram, RAM_MIB, Pattern::Mixed { seed: 12 });
            let destination = Destination::start(std::fs::read(&ram).unwrap(), 4);
            let mut source = source_of(version, dir.path(), &ram, capabilities);
            let (missing, _) = switch_over(&mut source, destination, &format!("{version}, {capabilities:?}"));
            assert_eq!(missing.preempt_pages > 0, capabilities.len() == 2, "{version}: {missing:?}");
            missing.latency
        });
        let [without, with] = latency.map(|l| (l.p50_us, l.p99_us));
        println!("{version}: p50 and p99 {without:?} us, with preempt {with:?} us");
    }
}

/// Zero pages that come on page channels before the switch take no memory. Threads that touch them after it get zeros, and
/// nobody is asked for them.
#[test]
fn p13_p25_a_zero_page_that_came_on_a_page_channel_is_there_for_a_fault() {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let ram = dir.path().join("sent");
    fill(&ram, RAM_MIB, Pattern::Mixed { seed: 14 });
    for kind in [Kind::Memfd, Kind::Anonymous] {
        let destination = Destination::with(kind, std::fs::read(&ram).unwrap(), 4, 2, true);
        let what = format!("page channels, to {kind:?}");
        let mut source = source_of(Version::Newest, dir.path(), &ram, &["postcopy-ram", "multifd"]);
        source.set_parameters(json!({"multifd-channels": 2, "zero-page-detection": "multifd"}));
        let statistics = switch_over(&mut source, destination, &what).1;
        assert!(statistics.multifd_bytes > 1 << 19 && statistics.pages.zero > 0, "{what}: {statistics:?}");
    }
}

/// A QEMU 11 whose destination can't load the device state is `failing` before it has `failed`, and keeps its guest.
#[test]
fn p21_p26_a_newest_qemu_that_is_failing_has_its_guest_back() {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let (mut source, expected) = source(Version::Newest, dir.path());
    source.set_capabilities(&["events"]);
    let mut destination = Destination::with(Kind::Memfd, expected, 1, 0, false);
    source.migrate(&destination.uri.clone());
    destination.wait(&mut source, "a destination that refuses", |figures| figures.transferred > 1 << 20);
    source.execute("migrate-start-postcopy", json!({}));
    let report = destination.finish("a destination that refuses");
    assert_eq!(report.ending, Ending::Discarded, "{:?}", report.error);
    let info = source.wait_migration(Deadline::seconds(60));
    assert_eq!(info["status"], "failed", "{info}\n{}", source.stderr());
    assert_ne!(source.status(), "postmigrate", "it is not the destination's");
    let failing = |event: &Value| event["event"] == "MIGRATION" && event["data"]["status"] == "failing";
    assert!(source.events().iter().any(failing), "{:?}", source.events());
    source.execute("cont", json!({}));
    assert_eq!(source.status(), "running");
}

/// Host pages of 2 MiB arrive in 512 records each, on either connection, and are placed whole.
#[test]
fn p15_p16_p23_huge_pages_are_placed_whole() {
    let Some(_pages) = peers_present().then(|| HugePages::reserve(2048, 2 * RAM_MIB as u64)).flatten() else {
        return;
    };
    for version in Version::ALL {
        for capabilities in [&["postcopy-ram"][..], &["postcopy-ram", "postcopy-preempt"]] {
            let dir = scratch();
            let patterned = dir.path().join("pattern");
            fill(&patterned, RAM_MIB, Pattern::Mixed { seed: 13 });
            let expected = std::fs::read(&patterned).unwrap();
            // The QEMU opens this process's descriptor, and finds the page size by it.
            let Ok(ram) = Mapping::memfd_huge("sent", expected.len() as u64, PageSize::SIZE_2M) else {
                // Not a missing privilege: a test can't change it.
                let lacks = "the machine's memory has too few free stretches of 2 MiB";
                let _ = writeln!(io::stderr(), "SKIPPED: postcopy of huge pages: {lacks}");
                return;
            };
            ram.region().span(0, expected.len() as u64).unwrap().copy_from(&expected);
            let fd = ram.backing().unwrap().0.as_raw_fd();
            let path = PathBuf::from(format!("/proc/{}/fd/{fd}", std::process::id()));
            let destination = Destination::in_memory(Kind::Huge, expected, 4);
            let mut source = source_of(version, dir.path(), &path, capabilities);
            switch_over(&mut source, destination, &format!("{version}, 2 MiB, {capabilities:?}"));
        }
    }
}

/// The connection is cut repeatedly while pages follow, also while the ends compare which pages are missing. The guest
/// keeps running and no page is lost.
#[test]
fn p9_p11_a_connection_that_is_lost_in_postcopy_loses_nothing() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        let dir = scratch();
        let (mut source, expected) = source(version, dir.path());
        let mut destination = Destination::start(expected, 4);
        source.migrate(&destination.uri.clone());
        let what = format!("{version} to a process of this test");
        destination.wait(&mut source, &what, |figures| figures.transferred > 1 << 20);
        source.execute("migrate-start-postcopy", json!({}));
        for cut in 0..6_u64 {
            destination.wait(&mut source, &what, |figures| figures.status == Status::PostcopyActive);
            // A QEMU that has not yet read the answer to its package, or is still in the step that sends it, treats a
            // lost connection as a failed migration.
            wait_status(&mut source, "postcopy-active");
            let placed = destination.figures().pages;
            let wanted = placed.normal + 1 + 150 * cut;
            destination.wait(&mut source, &what, |figures| figures.pages.normal >= wanted);
            destination.cut();
            destination.wait(&mut source, &what, |figures| figures.status == Status::PostcopyPaused);
            wait_paused(&mut source);
            // Lost again before the ends have compared. A QEMU 7.2 then waits for bitmaps for ever, and can't be
            // paused.
            if cut % 2 == 1 && version != Version::Qemu72 {
                source.execute("migrate", json!({"uri": destination.uri, "resume": true}));
                destination.wait(&mut source, &what, |figures| figures.status != Status::PostcopyPaused);
                destination.cut();
                destination.wait(&mut source, &what, |figures| figures.status == Status::PostcopyPaused);
                wait_paused(&mut source);
            }
            source.execute("migrate", json!({"uri": destination.uri, "resume": true}));
            destination.wait(&mut source, &what, |figures| figures.status == Status::PostcopyActive);
        }
        let report = destination.finish(&what);
        assert!(report.error.is_none(), "{what}: {:?}\n{}", report.error, source.stderr());
        assert_eq!(report.ending, Ending::Running, "{what}");
        source.wait_completed(Deadline::seconds(60));
        println!("{what}: {:?}", report.missing_pages);
    }
}

fn wait_status(source: &mut Qemu, status: &str) {
    let deadline = Deadline::seconds(60);
    loop {
        let info = source.query_migrate();
        if info["status"] == status {
            return;
        }
        assert!(!deadline.is_over(), "the source is not {status}: {info}\n{}", source.stderr());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

fn wait_paused(source: &mut Qemu) {
    let deadline = Deadline::seconds(60);
    loop {
        let info = source.query_migrate();
        match info["status"].as_str() {
            Some("postcopy-paused") => return,
            // A QEMU that waits for bitmaps does not notice the lost connection until it is told to pause.
            Some("postcopy-recover") => drop(source.try_execute("migrate-pause", json!({}))),
            _ => {}
        }
        assert!(!deadline.is_over(), "the source is not paused: {info}\n{}", source.stderr());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}
