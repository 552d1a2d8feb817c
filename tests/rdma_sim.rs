//! Whole migrations over a simulated RDMA network inside one process: sessions at both ends, virtual time in between.
#![cfg(feature = "rdma")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::Duration;

use ramwire::engine::{Ending, Outcome};
use ramwire::guest::{MappedGuest, TestMachine};
use ramwire::ram::{BlockName, RamBlock, RoundKind};
use ramwire::session::{
    DestinationGuest, DestinationReport, DestinationSession, DestinationSettings, Peer, SourceGuest,
    SourceReport, SourceSession, SourceSettings, Verify,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::{CancelToken, Mapping, RecvPart, SendPart, Stop};
use ramwire::transport::rdma::{RdmaListener, connect_over};
use ramwire::transport::{AllowList, ChannelError, RdmaOptions, ReadHints, StreamOptions};
use ramwire::units::{BlockIndex, PageSize};
use rdma_hooks::Fabric;
use rdma_hooks::fabric::{ConnectParams, FabricError, ReadDepth};
use rdma_hooks::sim::{Fault, Host, Sim, SimConfig};

const BLOCKS: [(&str, u64); 3] = [("pc.ram", 6 << 20), ("pc.bios", 256 << 10), ("odd", (1 << 20) + 4096)];
const PAGE: u64 = 4096;

fn memory() -> Arc<MappedGuest> {
    let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
    for (name, length) in BLOCKS {
        let mapping = Mapping::anonymous(length).unwrap();
        builder = builder.mapping(RamBlock::new(BlockName::new(name).unwrap(), length), &mapping);
    }
    Arc::new(builder.build().unwrap())
}

/// Two pages of three hold their own number, in runs that cross chunks; the others are zero.
fn filled() -> Arc<MappedGuest> {
    let guest = memory();
    for (block, (_, length)) in BLOCKS.iter().enumerate() {
        for page in (0..length / PAGE).filter(|page| page / 50 % 3 != 1) {
            let span = guest.region(BlockIndex(block as u32)).unwrap().span(page * PAGE, PAGE).unwrap();
            let word = ((block as u64) << 32 | page | 1 << 63).to_le_bytes();
            span.copy_from(&word.repeat(PAGE as usize / 8));
        }
    }
    guest
}

fn bytes(guest: &MappedGuest) -> Vec<u8> {
    let mut all = Vec::new();
    for (_, block, region) in guest.regions() {
        let mut bytes = vec![0; block.used_length as usize];
        region.span(0, block.used_length).unwrap().copy_to(&mut bytes);
        all.extend(bytes);
    }
    all
}

struct Run {
    source: Option<SourceReport>,
    destination: Option<DestinationReport>,
    equal: bool,
    sim: Sim,
}

/// One migration; the source's report is missing if it did not get as far as a session.
fn migrate(config: SimConfig, rdma: RdmaOptions, digest: bool, keeps_memory: bool) -> Run {
    let sim = Sim::new(config);
    let (here, there) = (sim.fabric(Host::A), sim.fabric(Host::B));
    let (from, to) = (filled(), memory());
    let options = StreamOptions::default();
    let stop = Stop::on(&CancelToken::default());
    let part = there.enter();
    let machine = TestMachine::default().keeping_memory();
    let arrived = machine.clone();
    let (arriving, far_stop, offered) = (Arc::clone(&to), stop.clone(), rdma.clone());
    let mut listener = RdmaListener::bind(Arc::new(there), "10.0.0.2", 4444, AllowList::default()).unwrap();
    let destination = std::thread::spawn(move || {
        let _part = part;
        let connection = listener.accept(&options, &offered, &far_stop).ok()?;
        let settings = DestinationSettings::default();
        let control = Box::new(arrived);
        Some(
            DestinationSession::new(
                DestinationGuest { memory: Box::new(arriving), control },
                connection,
                settings,
            )
            .run(),
        )
    });
    let part = here.enter();
    let connection = connect_over(Arc::new(here), "10.0.0.2", 4444, from.clone(), &options, &rdma, &stop);
    let source = connection.ok().map(|connection| {
        let mut settings = SourceSettings::new(Configuration { machine: "sim".into(), ..Default::default() });
        settings.verify = if digest { Verify::Full } else { Verify::Off };
        settings.guest_is_paused = true;
        settings.peer = Some(Peer::Ramwire);
        let machine = TestMachine::running(b"state");
        let control = Box::new(if keeps_memory { machine.keeping_memory() } else { machine });
        let guest = SourceGuest { memory: from.clone(), dirty: Vec::new(), control };
        SourceSession::new(guest, connection, settings).run()
    });
    drop(part);
    let destination = destination.join().unwrap();
    if machine.runs() {
        assert_eq!(machine.state(), b"state");
    }
    Run { equal: bytes(&from) == bytes(&to), source, destination, sim }
}

#[test]
fn a_guest_goes_over_rdma_between_two_sessions() {
    let ways = [(false, 1), (true, 1), (false, 4), (true, 4)];
    for (seed, (pin_all, queue_pairs)) in (0..8).flat_map(|seed| ways.map(|way| (seed, way))) {
        // As a relay does it: one message in flight at a time.
        let wait_after_round = seed % 2 == 1;
        let what = format!("seed {seed}, pin-all {pin_all}, {queue_pairs} queue pairs");
        let config = SimConfig { seed, loss_per_mille: 20, ..SimConfig::default() };
        let mut rdma = RdmaOptions::default();
        rdma.pin_all = pin_all;
        rdma.queue_pairs = queue_pairs;
        rdma.wait_after_round = wait_after_round;
        let run = migrate(config, rdma, true, true);
        let (source, destination) = (run.source.unwrap(), run.destination.unwrap());
        assert_eq!(source.outcome, Outcome::Completed, "{what}: {source:?} {destination:?}");
        assert_eq!(destination.ending, Ending::Running, "{what}: {destination:?}");
        assert!(destination.native && destination.verified && run.equal, "{what}");
        assert!(source.statistics.pages.zero > 0 && destination.pages.zero > 0, "{what}");
        // Every key is returned, and no message reached an end that was not ready.
        assert_eq!((run.sim.live_registrations(), run.sim.unready_messages()), (0, 0), "{what}");
    }
}

#[test]
fn a_budget_below_the_guest_s_size_lets_all_of_it_through() {
    for seed in 0..4 {
        let config = SimConfig { seed, ..SimConfig::default() };
        let mut rdma = RdmaOptions::default();
        rdma.pin_budget = Some(2 << 20);
        let run = migrate(config, rdma, true, true);
        let (source, destination) = (run.source.unwrap(), run.destination.unwrap());
        assert_eq!(source.outcome, Outcome::Completed, "seed {seed}: {:?}", source.error);
        assert!(destination.verified && run.equal, "seed {seed}");
    }
}

#[test]
fn r41_whatever_fails_leaves_the_guest_at_one_side_and_nothing_registered() {
    let (mut completed, mut stayed) = (0, 0);
    for at in [0, 3, 6, 9, 12, 15] {
        for fault in [
            Fault::Killed { message: at },
            Fault::DeviceRemoved { request: at * 4 },
            Fault::BadCompletion { request: at * 4 },
            Fault::RegistrationRefused { registration: at },
        ] {
            for host in [Host::A, Host::B] {
                let what = format!("{host:?}: {fault:?}");
                let config = SimConfig { faults: vec![(host, fault)], ..SimConfig::default() };
                let run = migrate(config, RdmaOptions::default(), false, true);
                assert_eq!(run.sim.live_registrations(), 0, "{what}");
                let running = run.destination.is_some_and(|report| report.ending == Ending::Running);
                let Some(source) = run.source else {
                    assert!(!running, "{what}: without a session at the source");
                    continue;
                };
                match source.outcome {
                    // The fault lay beyond the migration's end.
                    Outcome::Completed => {
                        assert!(running, "{what}");
                        completed += 1;
                    }
                    Outcome::StaysHere(_) => {
                        assert!(!running, "{what}: {source:?}");
                        assert!(source.error.is_some(), "{what}");
                        stayed += 1;
                    }
                    // COMMIT was in flight when the fault came: neither side may guess.
                    Outcome::InDoubt | Outcome::Incomplete => {}
                }
            }
        }
    }
    assert!(completed >= 2 && stayed >= 16, "{completed} completed, {stayed} stayed: both must be seen");
}

#[test]
fn a_guest_that_may_discard_memory_is_refused_before_anything_travels() {
    let run = migrate(SimConfig::default(), RdmaOptions::default(), false, false);
    let source = run.source.unwrap();
    assert!(matches!(source.outcome, Outcome::StaysHere(_)), "{source:?}");
    let error = ramwire::error::Chain(&source.error.unwrap()).to_string();
    assert!(error.contains("may discard memory") && error.contains("tcp:"), "{error}");
    assert_ne!(run.destination.unwrap().ending, Ending::Running);
    assert_eq!(run.sim.live_registrations(), 0);
}

#[test]
fn no_stream_byte_passes_while_a_round_is_open() {
    let sim = Sim::new(SimConfig::default());
    let (here, there) = (sim.fabric(Host::A), sim.fabric(Host::B));
    let (options, stop) = (StreamOptions::default(), Stop::on(&CancelToken::default()));
    let part = there.enter();
    let far_stop = stop.clone();
    let mut listener = RdmaListener::bind(Arc::new(there), "10.0.0.2", 4444, AllowList::default()).unwrap();
    let destination = std::thread::spawn(move || {
        let _part = part;
        listener.accept(&options, &RdmaOptions::default(), &far_stop).is_ok()
    });
    let part = here.enter();
    let rdma = RdmaOptions::default();
    let mut connection =
        connect_over(Arc::new(here), "10.0.0.2", 4444, filled(), &options, &rdma, &stop).unwrap();
    assert!(connection.link.abilities().exclusive_round);
    connection.link.sink().send(&[SendPart::Own(b"head")], &stop).unwrap();
    connection.link.open_round(RoundKind::Setup, &stop).unwrap();
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        connection.link.sink().send(&[SendPart::Own(b"too early")], &stop)
    }));
    // An assertion where those are on, else an error.
    assert!(refused.map_or(true, |sent| sent.is_err()));
    drop((connection, part));
    assert!(destination.join().unwrap());
}

/// Bytes come three times the stall time after the ones before. If the peer may be silent, or only the caller's own
/// timeout counts, they are waited for.
#[test]
fn silence_is_a_stall_only_where_the_peer_may_not_be_silent() {
    for (quiet, waits_out) in [(false, false), (true, false), (false, true)] {
        let sim = Sim::new(SimConfig::default());
        let (here, there) = (sim.fabric(Host::A), sim.fabric(Host::B));
        let (mut options, stop) = (StreamOptions::default(), Stop::on(&CancelToken::default()));
        options.stall = Some(Duration::from_secs(1));
        let part = there.enter();
        let far_stop = stop.clone();
        let mut listener =
            RdmaListener::bind(Arc::new(there), "10.0.0.2", 4444, AllowList::default()).unwrap();
        let destination = std::thread::spawn(move || {
            let _part = part;
            let mut accepted = listener.accept(&options, &RdmaOptions::default(), &far_stop).unwrap();
            let (stream, mut room) = (accepted.link.stream(), [0; 64]);
            assert_eq!(stream.recv(&mut [RecvPart::Own(&mut room)], &far_stop).unwrap(), 4);
            let mut hints = ReadHints::default();
            hints.may_be_silent = quiet;
            stream.set_hints(hints);
            if waits_out {
                stream.tolerate_outage(Duration::from_secs(60));
            }
            stream.recv(&mut [RecvPart::Own(&mut room)], &far_stop)
        });
        let part = here.enter();
        let rdma = RdmaOptions::default();
        let mut connection =
            connect_over(Arc::new(here), "10.0.0.2", 4444, filled(), &options, &rdma, &stop).unwrap();
        connection.link.sink().send(&[SendPart::Own(b"head")], &stop).unwrap();
        connection.link.sink().flush(&stop).unwrap();
        // Time passes while it waits for an answer that never arrives.
        let back = connection.back.as_mut().unwrap();
        let answer = back.recv(&mut [RecvPart::Own(&mut [0; 64])], &stop.within(Duration::from_secs(3)));
        let _ = connection.link.sink().send(&[SendPart::Own(b"tail!")], &stop);
        let _ = connection.link.sink().flush(&stop);
        drop((connection, part));
        match destination.join().unwrap() {
            Ok(count) => assert!((quiet || waits_out) && count == 5, "{count} bytes"),
            Err(ChannelError::Stalled { .. }) => assert!(!quiet && !waits_out),
            Err(error) => panic!("{error}"),
        }
        assert!(!matches!(answer, Ok(1..)), "{answer:?}");
    }
}

#[test]
fn r45_a_qemu_is_asked_for_a_return_path_only_if_the_operator_says_so() {
    for return_path in [false, true] {
        let sim = Sim::new(SimConfig::default());
        let (here, there) = (sim.fabric(Host::A), sim.fabric(Host::B));
        let part = there.enter();
        let mut listener = there.listen("10.0.0.2", 4444).unwrap();
        // A QEMU: version 1, and none of the later features. It answers the first connection and waits for a second.
        let qemu = std::thread::spawn(move || {
            let _part = part;
            let deadline = there.now() + Duration::from_secs(8);
            let stop = rdma_hooks::Stop::new(Some(deadline), rdma_hooks::Cancel::default());
            let private_data = vec![0, 0, 0, 1, 0, 0, 0, 0];
            let params = ConnectParams {
                private_data,
                receives: 3,
                receive_bytes: 1 << 19,
                send_depth: 8,
                reads: ReadDepth { own: 0, served: 2 },
                read_pieces: 1,
            };
            let _main = listener.next_request(&stop).unwrap().accept(&params, &stop).unwrap();
            match listener.next_request(&stop) {
                Ok(_) => true,
                Err(FabricError::Stopped(_)) => false,
                Err(error) => panic!("{error}"),
            }
        });
        let part = here.enter();
        let mut rdma = RdmaOptions::default();
        rdma.return_path = return_path;
        let (options, stop) = (StreamOptions::default(), Stop::on(&CancelToken::default()));
        let connection = connect_over(Arc::new(here), "10.0.0.2", 4444, filled(), &options, &rdma, &stop);
        assert!(
            !connection.is_ok_and(|connection| connection.back.is_some()),
            "this QEMU accepts no second connection"
        );
        drop(part);
        assert_eq!(qemu.join().unwrap(), return_path);
    }
}

#[path = "rdma_sim/reads.rs"]
mod reads;
