//! Ends that fall silent, are stopped, close late, or send too much.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::pair::{both, open, ram, seconds, serve, span};
use common::{MIB, PAGE, PORT};
use rdma_hooks::capabilities::Capabilities;
use rdma_hooks::control::{Kind, header};
use rdma_hooks::fabric::{Completion, CompletionStatus, ConnectParams, Endpoint, ReadDepth};
use rdma_hooks::sim::{Fault, Host, SimConfig, SimFabric, SparseMemory};
use rdma_hooks::{
    DestinationConfig, DestinationHooks, ExtensionOffer, Fabric, FabricError, Features, HooksError,
    HostRegion, MigrationId, PageContent, RamBlock, RamControl, RegionMemory, SourceConfig, SourceHooks,
    Stop,
};

#[test]
fn a_peer_that_falls_silent_between_rounds_is_noticed_in_seconds() {
    let faults = vec![(Host::A, Fault::PowerLoss { message: 2 })];
    let (_, waited, _) = both(
        SimConfig { faults, ..SimConfig::default() },
        |fabric| {
            let stop = seconds(&fabric, 60);
            let mut hooks =
                SourceHooks::connect(&fabric, "sim", PORT, SourceConfig::default(), &stop).unwrap();
            hooks.set_blocks(vec![ram(MIB).1]).unwrap();
            open(&mut hooks, RamControl::Setup, &stop);
            assert!(hooks.registration_stop(RamControl::Setup, &stop).is_err(), "dead");
        },
        |fabric, mut listener| {
            let stop = seconds(&fabric, 60);
            let started = fabric.now();
            let mut hooks =
                DestinationHooks::accept(listener.as_mut(), &DestinationConfig::default(), &stop).unwrap();
            let ended = serve(&mut hooks, ram(MIB).1, 2, &stop);
            assert!(matches!(ended, Err(HooksError::Fabric(FabricError::Completion { .. }))), "{ended:?}");
            fabric.now() - started
        },
    );
    assert!(waited < Duration::from_secs(5), "{waited:?}");
}

/// Neither end closes first and cuts the other off; neither waits for ever.
#[test]
fn r38_r39_the_source_waits_10_s_for_the_close_and_the_destination_2_s() {
    let (waited_here, waited_there, _) = both(
        SimConfig::default(),
        |fabric| {
            let stop = seconds(&fabric, 60);
            let mut hooks =
                SourceHooks::connect(&fabric, "sim", PORT, SourceConfig::default(), &stop).unwrap();
            hooks.write_stream(b"all", &stop).unwrap();
            hooks.flush_stream(&stop).unwrap();
            let started = fabric.now();
            assert!(hooks.finish(&stop).unwrap(), "the destination closes");
            fabric.now() - started
        },
        |fabric, mut listener| {
            let stop = seconds(&fabric, 60);
            let mut hooks =
                DestinationHooks::accept(listener.as_mut(), &DestinationConfig::default(), &stop).unwrap();
            hooks.read_stream(&mut [0; 3], &stop).unwrap();
            let started = fabric.now();
            assert!(!hooks.finish(&stop).unwrap(), "the source does not close");
            fabric.now() - started
        },
    );
    assert!((2000..2200).contains(&waited_there.as_millis()), "{waited_there:?}");
    assert!((1900..2300).contains(&waited_here.as_millis()), "{waited_here:?}");

    let (waited_here, (), _) = both(
        SimConfig::default(),
        |fabric| {
            let stop = seconds(&fabric, 60);
            let hooks = SourceHooks::connect(&fabric, "sim", PORT, SourceConfig::default(), &stop).unwrap();
            let started = fabric.now();
            assert!(!hooks.finish(&stop).unwrap(), "nobody closes");
            fabric.now() - started
        },
        |fabric, mut listener| {
            let stop = seconds(&fabric, 60);
            let mut hooks =
                DestinationHooks::accept(listener.as_mut(), &DestinationConfig::default(), &stop).unwrap();
            // Sits there until the source has gone.
            assert!(hooks.read_stream(&mut [0], &stop).is_err());
        },
    );
    assert!((10_000..10_500).contains(&waited_here.as_millis()), "{waited_here:?}");
}

fn native(data_queues: u16) -> SourceConfig {
    let (features, migration) = (Features::ALL, MigrationId([7; 16]));
    let extension = Some(ExtensionOffer { data_queues, window: 2, features, migration });
    SourceConfig { extension, ..SourceConfig::default() }
}

/// Opens the first round with pages, and saves one.
fn begin_round(fabric: &SimFabric, config: SourceConfig, stop: &Stop) -> (SourceHooks, Arc<SparseMemory>) {
    let mut hooks = SourceHooks::connect(fabric, "sim", PORT, config, stop).unwrap();
    let (memory, block) = ram(2 * MIB);
    memory.write(0, b"page");
    hooks.set_blocks(vec![block]).unwrap();
    open(&mut hooks, RamControl::Setup, stop);
    hooks.registration_stop(RamControl::Setup, stop).unwrap();
    open(&mut hooks, RamControl::Round, stop);
    hooks.control_save_page(span(0, PAGE, PageContent::Data), stop).unwrap();
    hooks.drain(stop).unwrap();
    (hooks, memory)
}

fn listening(data_queues: u16) -> DestinationConfig {
    let silence = Some(Duration::from_secs(10));
    DestinationConfig { data_queues, window: 2, silence, ..DestinationConfig::default() }
}

/// As a process that is stopped (SIGSTOP): its NIC goes on answering, its hooks are called no more. A ramwire or a QEMU,
/// and a device that counts what it receives or one that does not.
#[test]
fn a_source_that_is_stopped_in_an_open_round_ends_its_destination() {
    let qemu = SourceConfig::default;
    for (config, data_queues, counts_received, seconds_long) in [
        (native(1), 1, true, 10..12),
        (native(1), 1, false, 18..20),
        (qemu(), 0, true, 10..12),
        (qemu(), 0, false, 100..102),
    ] {
        let (_stopped, (ended, waited), _) = both(
            SimConfig { counts_received, ..SimConfig::default() },
            move |fabric| begin_round(&fabric, config, &seconds(&fabric, 60)),
            move |fabric, mut listener| {
                let stop = seconds(&fabric, 300);
                let listening = listening(data_queues);
                let mut hooks = DestinationHooks::accept(listener.as_mut(), &listening, &stop).unwrap();
                let started = fabric.now();
                (serve(&mut hooks, ram(2 * MIB).1, 2, &stop), fabric.now() - started)
            },
        );
        let ended = ended.unwrap_err();
        assert!(matches!(ended, HooksError::Silent { .. }), "{ended:?}");
        assert_eq!(ended.blame(), rdma_hooks::Blame::Peer);
        assert!(seconds_long.contains(&waited.as_secs()), "{waited:?}, not {seconds_long:?}");
    }
}

/// With pin-all a source registers all its memory in the setup round, and says nothing meanwhile: minutes, if it is large.
#[test]
fn r37_a_source_that_registers_everything_is_given_the_time_for_it() {
    for (mib, served) in [(64 << 10, true), (2, false)] {
        let takes = [100, 1].map(Duration::from_secs);
        let (_, ended, _) = both(
            SimConfig { registration_takes: takes, ..SimConfig::default() },
            move |fabric| {
                let stop = seconds(&fabric, 300);
                let config = SourceConfig { pin_all: true, ..SourceConfig::default() };
                let mut hooks = SourceHooks::connect(&fabric, "sim", PORT, config, &stop).unwrap();
                hooks.set_blocks(vec![ram(mib * MIB).1]).unwrap();
                open(&mut hooks, RamControl::Setup, &stop);
                (hooks.registration_stop(RamControl::Setup, &stop), hooks)
            },
            move |fabric, mut listener| {
                let stop = seconds(&fabric, 300);
                let mut hooks = DestinationHooks::accept(listener.as_mut(), &listening(0), &stop).unwrap();
                serve(&mut hooks, ram(mib * MIB).1, 1, &stop)
            },
        );
        let silent = matches!(ended, Err(HooksError::Silent { .. }));
        assert!(if served { ended.is_ok() } else { silent }, "{mib} MiB: {ended:?}");
    }
}

/// A QEMU says nothing in a round, and may be long about it: its writes are signs enough where the device counts them.
#[test]
fn a_source_that_says_nothing_but_writes_is_waited_for() {
    let (_, served, _) = both(
        SimConfig::default(),
        |fabric| {
            let stop = seconds(&fabric, 300);
            let (mut hooks, _memory) = begin_round(&fabric, SourceConfig::default(), &stop);
            let mut nobody = fabric.listen("sim", PORT + 1).unwrap();
            let said = hooks.counters().messages_sent;
            for _ in 0..10 {
                let moment = Stop::default().within(fabric.now(), Duration::from_secs(7));
                assert!(nobody.next_request(&moment).is_err());
                hooks.control_save_page(span(0, PAGE, PageContent::Data), &stop).unwrap();
                hooks.drain(&stop).unwrap();
            }
            assert_eq!(hooks.counters().messages_sent, said, "70 s of writes alone");
            hooks.registration_stop(RamControl::Round, &stop).unwrap();
            hooks
        },
        |fabric, mut listener| {
            let stop = seconds(&fabric, 300);
            let mut hooks = DestinationHooks::accept(listener.as_mut(), &listening(0), &stop).unwrap();
            serve(&mut hooks, ram(2 * MIB).1, 2, &stop)
        },
    );
    served.unwrap();
}

/// An embedder that holds its pages back, for a limit perhaps, looks in and no more.
#[test]
fn a_source_that_keeps_a_round_open_says_that_it_is_alive() {
    for data_queues in [0, 2] {
        let (messages, served, sim) = both(
            SimConfig::default(),
            move |fabric| {
                let stop = seconds(&fabric, 120);
                let (mut hooks, _memory) = begin_round(&fabric, native(data_queues), &stop);
                let mut nobody = fabric.listen("sim", PORT + 1).unwrap();
                let said = hooks.counters().messages_sent;
                for _ in 0..300 {
                    hooks.collect().unwrap();
                    let moment = Stop::default().within(fabric.now(), Duration::from_millis(100));
                    assert!(nobody.next_request(&moment).is_err());
                }
                let said = hooks.counters().messages_sent - said;
                hooks.registration_stop(RamControl::Round, &stop).unwrap();
                let probes = hooks.counters().probes;
                (said, probes, hooks)
            },
            move |fabric, mut listener| {
                let stop = seconds(&fabric, 120);
                let mut hooks =
                    DestinationHooks::accept(listener.as_mut(), &listening(data_queues), &stop).unwrap();
                let served = serve(&mut hooks, ram(2 * MIB).1, 2, &stop);
                (served, hooks.counters().probes)
            },
        );
        let (said, _, _hooks) = messages;
        let (served, probes) = served;
        served.unwrap();
        assert!((25..=31).contains(&said), "{said} messages in 30 s");
        // Each of the additional queue pairs is probed about once a second; the main one hears enough.
        let expected = u64::from(data_queues) * 25;
        assert!(probes >= expected, "{probes} probes with {data_queues} additional queue pairs");
        assert!(sim.elapsed() > Duration::from_secs(29));
    }
}

/// A message that does not fit ends the connection with an error, as on a device.
#[test]
fn r15_a_message_longer_than_its_buffer_ends_both_ends_and_more_blocks_than_said_are_refused() {
    let (sent, got, _) = both(
        SimConfig::default(),
        |fabric| {
            let stop = seconds(&fabric, 10);
            let small = SourceConfig { most_blocks: 1, ..SourceConfig::default() };
            let mut hooks = SourceHooks::connect(&fabric, "sim", PORT, small, &stop).unwrap();
            let two = ["one", "two"]
                .map(|name| RamBlock::new(name, HostRegion::new(Arc::new(SparseMemory::new(MIB)))));
            assert!(matches!(hooks.set_blocks(two.into()), Err(HooksError::OutOfOrder(_))));
            hooks.set_blocks(vec![ram(MIB).1]).unwrap();
            open(&mut hooks, RamControl::Setup, &stop);
            hooks.registration_stop(RamControl::Setup, &stop)
        },
        |fabric, mut listener| {
            let stop = seconds(&fabric, 10);
            let incoming = listener.next_request(&stop).unwrap();
            let private_data = Capabilities::default().encode();
            let params = ConnectParams {
                private_data,
                receives: 4,
                receive_bytes: 1024,
                send_depth: 16,
                reads: ReadDepth::NONE,
                read_pieces: 1,
            };
            let mut endpoint = incoming.accept(&params, &stop).unwrap();
            let wait = |endpoint: &mut dyn Endpoint| {
                let mut found = Vec::new();
                while found.is_empty() {
                    endpoint.wait(Duration::from_millis(10)).unwrap();
                    endpoint.poll(&mut found).unwrap();
                }
                found
            };
            // Two messages of the source are taken, then comes an answer that is longer than any can be.
            for id in [1, 3] {
                endpoint.post_send(id, &[&header(Kind::Ready, 0, 1)]).unwrap();
                while !wait(&mut *endpoint).iter().any(|found| matches!(found, Completion::Received { .. })) {
                }
            }
            endpoint.post_send(5, &[&header(Kind::RamBlocksResult, 40_000, 1), &[0; 40_000]]).unwrap();
            wait(&mut *endpoint)
        },
    );
    let too_long = |error: &HooksError| {
        matches!(
            error,
            HooksError::Fabric(FabricError::Completion { status: CompletionStatus::LocalLength, .. })
        )
    };
    assert!(sent.as_ref().is_err_and(too_long), "{sent:?}");
    let refused = |found: &Completion| {
        matches!(found, Completion::Failed { status: CompletionStatus::RemoteInvalid, .. })
    };
    assert!(got.iter().any(refused), "{got:?}");
}
