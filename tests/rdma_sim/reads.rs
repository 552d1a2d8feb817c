//! A switch to postcopy over RDMA: the destination reads the missing pages from its source's memory, for real faults of
//! a guest's thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ramwire::engine::{Ending, Outcome, PostcopyRule};
use ramwire::guest::{DirtyError, DirtySource, MappedGuest, TestMachine, VcpuThreads};
use ramwire::ram::PageBitmap;
use ramwire::session::{
    DestinationGuest, DestinationReport, DestinationSession, DestinationSettings, NewConnection, Peer,
    PostcopySettings, Reconnect, Redial, SourceGuest, SourceReport, SourceSession, SourceSettings,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::rdma::{RdmaListener, connect_over};
use ramwire::transport::{Address, AllowList, Listener, OpenError, RdmaOptions, StreamOptions};
use ramwire::units::BlockIndex;
use rdma_hooks::sim::{Fault, Host, Part, Sim, SimConfig};

use super::{BLOCKS, PAGE, bytes, filled, memory};

/// Virtual time goes by while real threads wait for a page.
const LONG: Duration = Duration::from_secs(1 << 20);
/// However slow the machine is, a page comes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Every second page of the first block is written between any two syncs.
struct Writes {
    memory: Arc<MappedGuest>,
    machine: TestMachine,
    syncs: AtomicU64,
}

impl DirtySource for Writes {
    fn name(&self) -> &'static str {
        "test"
    }

    fn probe(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn start(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        if block != BlockIndex(0) || !self.machine.runs() {
            return Ok(());
        }
        let sync = self.syncs.fetch_add(1, Ordering::Relaxed);
        let region = self.memory.region(block).unwrap();
        for page in (0..into.len()).step_by(2) {
            into.set_range(page..page + 1);
            region.span(page * PAGE + 8, 8).unwrap().copy_from(&(sync << 32 | page).to_le_bytes());
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

struct Run {
    source: Option<SourceReport>,
    destination: Option<DestinationReport>,
    from: Arc<MappedGuest>,
    to: Arc<MappedGuest>,
    /// The guest's memory as its thread at the destination has seen it, in an order of its own.
    seen: Receiver<Vec<u8>>,
    runs_there: bool,
    sim: Sim,
}

/// The guest's thread at the destination: from the start on it reads all memory, last block and last page first.
fn touch(memory: Arc<MappedGuest>, machine: TestMachine, vcpus: VcpuThreads) -> Receiver<Vec<u8>> {
    let (tell, told) = channel();
    std::thread::spawn(move || {
        vcpus.enter(0);
        while !machine.runs() {
            std::thread::sleep(Duration::from_micros(50));
        }
        let mut all = Vec::new();
        for (index, (_, length)) in BLOCKS.iter().enumerate().rev() {
            let region = memory.region(BlockIndex(index as u32)).unwrap();
            let mut block = vec![0; *length as usize];
            for page in (0..length / PAGE).rev() {
                let at = (page * PAGE) as usize;
                region.span(page * PAGE, PAGE).unwrap().copy_to(&mut block[at..at + PAGE as usize]);
            }
            all.splice(0..0, block);
        }
        let _ = tell.send(all);
    });
    told
}

/// An end's part in the simulation. Over a real connection it has none: virtual time goes by without it.
type TakesPart = Arc<Mutex<Option<Part>>>;

/// Another connection, a real one.
struct Again {
    part: TakesPart,
    redial: Redial,
}

impl Reconnect for Again {
    fn connect(&mut self, address: Option<&Address>, stop: &Stop) -> Result<NewConnection, OpenError> {
        drop(self.part.lock().unwrap().take());
        self.redial.connect(address, stop)
    }
}

fn migrate(config: SimConfig, rdma: RdmaOptions, rounds: u32, release: bool) -> Run {
    migrate_on(config, rdma, rounds, release, false)
}

/// `goes_on`: a connection that is lost is followed by one over TCP.
fn migrate_on(config: SimConfig, rdma: RdmaOptions, rounds: u32, release: bool, goes_on: bool) -> Run {
    let sim = Sim::new(config);
    let (here, there) = (sim.fabric(Host::A), sim.fabric(Host::B));
    let (from, to) = (filled(), memory());
    let mut options = StreamOptions::default();
    options.stall = None;
    let stop = Stop::on(&CancelToken::default());
    let part: TakesPart = Arc::new(Mutex::new(Some(there.enter())));
    let tcp = Listener::bind(&Address::tcp("127.0.0.1", 0), AllowList::default(), &Stop::never()).unwrap();
    let redial = Redial::new(tcp.address().clone(), StreamOptions::default());
    let arrived = TestMachine::default().keeping_memory();
    let vcpus = VcpuThreads::default();
    let seen = touch(Arc::clone(&to), arrived.clone(), vcpus.clone());
    let (arriving, far_stop, machine) = (Arc::clone(&to), stop.clone(), arrived.clone());
    let mut listener = RdmaListener::bind(Arc::new(there), "10.0.0.2", 4444, AllowList::default()).unwrap();
    let destination = std::thread::spawn(move || {
        let (part, ends) = (Arc::clone(&part), part);
        let connection = listener.accept(&options, &RdmaOptions::default(), &far_stop).ok()?;
        let mut settings = DestinationSettings::default();
        (settings.postcopy, settings.stall_timeout) = (true, LONG);
        settings.vcpu_threads = vcpus;
        let guest = DestinationGuest { memory: Box::new(arriving), control: Box::new(machine) };
        let mut session = DestinationSession::new(guest, connection, settings);
        if goes_on {
            let mut tcp = tcp;
            session = session.with_next_connection(Box::new(move |stop: &Stop| {
                drop(part.lock().unwrap().take());
                tcp.accept(&StreamOptions::default(), stop)
            }));
        }
        let report = session.run();
        drop(ends.lock().unwrap().take());
        Some(report)
    });
    let part: TakesPart = Arc::new(Mutex::new(Some(here.enter())));
    let connection = connect_over(Arc::new(here), "10.0.0.2", 4444, from.clone(), &options, &rdma, &stop);
    let source = connection.ok().map(|connection| {
        let mut settings = SourceSettings::new(Configuration { machine: "sim".into(), ..Default::default() });
        let mut postcopy = PostcopySettings::new(PostcopyRule::AfterRounds(rounds));
        postcopy.release_ram = release;
        postcopy.reconnect_timeout = if goes_on { PATIENCE } else { Duration::ZERO };
        settings.postcopy = Some(postcopy);
        settings.downtime_limit = Duration::ZERO;
        settings.stall_timeout = LONG;
        settings.peer = Some(Peer::Ramwire);
        let machine = TestMachine::running(b"state").keeping_memory();
        let dirty = Writes { memory: from.clone(), machine: machine.clone(), syncs: AtomicU64::new(1) };
        let control = Box::new(machine);
        let guest = SourceGuest { memory: from.clone(), dirty: vec![Arc::new(dirty)], control };
        let session = SourceSession::new(guest, connection, settings);
        match goes_on {
            true => session.with_reconnect(Box::new(Again { part: Arc::clone(&part), redial })).run(),
            false => session.run(),
        }
    });
    drop(part.lock().unwrap().take());
    let destination = destination.join().unwrap();
    Run { source, destination, from, to, seen, runs_there: arrived.runs(), sim }
}

fn options() -> RdmaOptions {
    let mut rdma = RdmaOptions::default();
    rdma.postcopy = true;
    rdma
}

#[test]
fn missing_pages_are_read_from_the_source_and_every_byte_is_there() {
    for (seed, rounds) in (0..6).flat_map(|seed| [0, 1, 3].map(|rounds| (seed, rounds))) {
        let what = format!("seed {seed}, {rounds} rounds before the switch");
        let config = SimConfig { seed, loss_per_mille: 20, ..SimConfig::default() };
        let mut rdma = options();
        rdma.pin_all = seed % 2 == 1;
        let run = migrate(config, rdma, rounds, false);
        let (source, destination) = (run.source.unwrap(), run.destination.unwrap());
        assert_eq!(source.outcome, Outcome::Completed, "{what}: {source:?} {destination:?}");
        assert_eq!(destination.ending, Ending::Running, "{what}: {destination:?}");
        assert!(bytes(&run.from) == bytes(&run.to), "{what}");
        assert!(run.seen.recv_timeout(PATIENCE).unwrap() == bytes(&run.from), "{what}: as its thread saw it");
        let missing = destination.missing_pages.unwrap();
        println!("{what}: {} faults, {:?}", missing.faults, missing.latency);
        let waits: u64 = missing.waits.vcpus.iter().map(|vcpu| vcpu.waits.count).sum();
        assert!(
            missing.faults == 0 || waits > 0,
            "{what}: the thread is known as a vCPU: {:?}",
            missing.waits
        );
        let written = source.statistics.pages.normal;
        assert_eq!(written > 0, rounds > 0, "{what}: {written} pages were written by RDMA before the switch");
        assert_eq!((run.sim.live_registrations(), run.sim.unready_messages()), (0, 0), "{what}");
    }
}

#[test]
fn the_source_gives_back_what_the_destination_has_and_only_then() {
    let run = migrate(SimConfig::default(), options(), 1, true);
    let (source, destination) = (run.source.unwrap(), run.destination.unwrap());
    assert_eq!(source.outcome, Outcome::Completed, "{source:?} {destination:?}");
    let total: u64 = BLOCKS.iter().map(|(_, length)| length / PAGE).sum();
    assert_eq!(source.released_pages, total);
    let seen = run.seen.recv_timeout(PATIENCE).unwrap();
    assert!(seen == bytes(&run.to) && seen.iter().any(|byte| *byte != 0));
    assert!(bytes(&run.from).iter().all(|byte| *byte == 0), "it reads as zero at the source");
    assert_eq!(run.sim.live_registrations(), 0);
}

#[test]
fn whatever_fails_after_the_switch_no_page_has_other_bytes_and_the_guest_is_at_one_side() {
    let (mut whole, mut incomplete, mut stayed) = (0, 0, 0);
    let killed = (0..14).map(|at| (Host::A, Fault::Killed { message: 2 * at }));
    let cut = (0..10).map(|at| (Host::B, Fault::AnswerCut { request: 4 + 3 * at }));
    let removed = (0..6).map(|at| (Host::B, Fault::DeviceRemoved { request: 5 * at }));
    for (host, fault) in killed.chain(cut).chain(removed) {
        let what = format!("{host:?}: {fault:?}");
        let config = SimConfig { faults: vec![(host, fault)], ..SimConfig::default() };
        let run = migrate(config, options(), 0, false);
        assert_eq!(run.sim.live_registrations(), 0, "{what}");
        let Some(destination) = run.destination else { continue };
        match destination.ending {
            Ending::Running => {
                assert!(run.seen.recv_timeout(PATIENCE).unwrap() == bytes(&run.from), "{what}");
                whole += 1;
            }
            // The thread waits for a page that does not come; it never sees another one in its place.
            Ending::Incomplete => {
                let error = ramwire::error::Chain(destination.error.as_ref().unwrap()).to_string();
                println!("{what}: {error}");
                assert!(run.runs_there, "{what}");
                incomplete += 1;
            }
            _ => {
                assert!(!run.runs_there, "{what}: {destination:?}");
                stayed += 1;
            }
        }
        let kept = run.source.is_some_and(|source| matches!(source.outcome, Outcome::StaysHere(_)));
        assert!(!(kept && run.runs_there), "{what}: at both sides");
    }
    println!("{whole} whole, {incomplete} incomplete, {stayed} stayed");
    assert!(
        whole > 0 && incomplete > 2 && stayed > 2,
        "{whole} whole, {incomplete} incomplete, {stayed} stayed"
    );
}

#[test]
fn without_queue_pairs_for_it_a_switch_is_refused_before_anything_travels() {
    let run = migrate(SimConfig::default(), RdmaOptions::default(), 0, false);
    let source = run.source.unwrap();
    assert!(matches!(source.outcome, Outcome::StaysHere(_)), "{source:?}");
    let error = ramwire::error::Chain(&source.error.unwrap()).to_string();
    assert!(error.contains("RdmaOptions::postcopy") && error.contains("tcp:"), "{error}");
    assert!(!run.runs_there);
}

/// A device that is removed after the switch: what is missing is sent over TCP, and the guest runs on meanwhile.
#[test]
fn a_connection_that_is_lost_while_pages_are_read_is_followed_by_another_one() {
    let (mut went_on, mut without) = (0, 0);
    for (request, release) in (14..44).zip([false, true].into_iter().cycle()) {
        let what = format!("request {request}, {release}");
        let fault = (Host::B, Fault::DeviceRemoved { request });
        let config = SimConfig { faults: vec![fault], ..SimConfig::default() };
        let run = migrate_on(config, options(), 0, release, true);
        assert_eq!(run.sim.live_registrations(), 0, "{what}");
        let (Some(source), Some(destination)) = (run.source, run.destination) else { continue };
        if !run.runs_there {
            // Before the switch such a loss is the end.
            assert!(matches!(source.outcome, Outcome::StaysHere(_)), "{what}: {source:?}");
            without += 1;
            continue;
        }
        assert_eq!(source.outcome, Outcome::Completed, "{what}: {source:?} {destination:?}");
        assert_eq!(destination.ending, Ending::Running, "{what}: {destination:?}");
        let seen = run.seen.recv_timeout(PATIENCE).unwrap();
        assert!(seen == bytes(&run.to) && seen.iter().any(|byte| *byte != 0), "{what}");
        assert!(release || seen == bytes(&run.from), "{what}: as its thread saw it");
        let sent = source.statistics.pages.normal + source.statistics.pages.zero;
        println!("{what}: {sent} pages were sent");
        went_on += u64::from(sent > 0);
    }
    println!("{went_on} went on over TCP, {without} ended before the switch");
    assert!(went_on > 3, "{went_on}");
}
