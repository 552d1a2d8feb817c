//! The hooks over a real verbs device: soft-RoCE or better.
//!
//! Run in ci/rxe-guest, or on a host with a device by `cargo test --test verbs -- --ignored`.

#![cfg(feature = "verbs")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::time::{Duration, Instant};

use common::device::address;
use common::mapped::Mapped;
use common::{Guest, Plan, Ram, TestMemory, receive, send};
use rdma_hooks::fabric::{
    Access, AddressBase, Completion, CompletionStatus, ConnectParams, Operation, ReadDepth, WriteRequest,
};
use rdma_hooks::verbs::{VerbsFabric, devices};
use rdma_hooks::{
    Cancel, Counters, DestinationConfig, DestinationHooks, ExtensionOffer, Fabric, FabricError, Features,
    HooksError, HostRegion, MigrationId, SourceConfig, SourceHooks, Stop, Stopped,
};

fn seconds(fabric: &dyn Fabric, seconds: u64) -> Stop {
    Stop::new(Some(fabric.now() + Duration::from_secs(seconds)), Cancel::default())
}

fn migrate(address: &str, plan: &Plan) -> Counters {
    let (from, to) = (VerbsFabric::open().unwrap(), VerbsFabric::open().unwrap());
    let mut guest = Guest::<Mapped>::new(plan.sim.seed);
    let (source, target) = (guest.ram.clone(), Ram::<Mapped>::zeros());
    for _ in 0..3 {
        guest.run(60);
    }
    let listener = to.listen(address, 0).unwrap();
    let port = listener.port();
    let mut counters = Counters::default();
    std::thread::scope(|scope| {
        let destination = scope.spawn(|| receive(&to, listener, &target, plan));
        send(&from, address, port, &mut guest, plan, &mut counters).expect("source");
        destination.join().unwrap().expect("destination");
    });
    assert_eq!(source.first_difference(&target), None);
    counters
}

mod in_rxe_guest {
    use super::*;

    #[test]
    #[ignore = "runs in ci/rxe-guest"]
    fn r51_r52_own_to_own_leaves_equal_memory_in_every_mode() {
        let address = address().expect("a device");
        let base = SourceConfig::default;
        let extension = |data_queues, window| {
            Some(ExtensionOffer {
                data_queues,
                window,
                features: Features::ALL,
                migration: MigrationId([9; 16]),
            })
        };
        let qemus_words = extension(0, 1).map(|offer| ExtensionOffer { features: Features::NONE, ..offer });
        let plans = [
            ("dynamic", base()),
            ("pin-all", SourceConfig { pin_all: true, ..base() }),
            ("pin budget of 3 MiB", SourceConfig { pin_budget_bytes: Some(3 << 20), ..base() }),
            ("four queue pairs", SourceConfig { extension: extension(3, 1), ..base() }),
            (
                "four queue pairs, pin-all",
                SourceConfig { extension: extension(3, 4), pin_all: true, ..base() },
            ),
            ("QEMU's messages between native ends", SourceConfig { extension: qemus_words, ..base() }),
            ("window of four", SourceConfig { extension: extension(0, 4), record_latencies: true, ..base() }),
        ];
        for (seed, (name, source)) in plans.into_iter().enumerate() {
            let mut plan = Plan { source, data_queues: 3, window: 4, rounds: 3, ..Plan::default() };
            plan.sim.seed = seed as u64;
            let started = Instant::now();
            let counters = migrate(&address, &plan);
            println!("{name}: {:?}, {counters:?}", started.elapsed());
            assert!(counters.writes_posted > 0 && counters.zero_ranges > 0, "{name}");
            assert!(counters.writes_signalled < counters.writes_posted, "{name}: no chains");
        }
    }

    #[test]
    #[ignore = "runs in ci/rxe-guest"]
    fn r49_waits_end_soon_after_a_cancel() {
        /// Waits look for a cancel every 40 ms; an emulated machine that is busy is late by more.
        const SOON: Duration = Duration::from_secs(2);
        let address = address().expect("a device");
        let fabric = VerbsFabric::open().unwrap();
        let took = |wait: &mut dyn FnMut(&Stop)| {
            let cancel = Cancel::default();
            let stop = Stop::new(None, cancel.clone());
            std::thread::scope(|scope| {
                let cancelled = scope.spawn(move || {
                    std::thread::sleep(Duration::from_millis(300));
                    cancel.cancel();
                    Instant::now()
                });
                wait(&stop);
                let ended = Instant::now();
                ended.saturating_duration_since(cancelled.join().unwrap())
            })
        };

        let mut listener = fabric.listen(&address, 0).unwrap();
        let waited = took(&mut |stop| {
            let ended = listener.next_request(stop).map(|_| ());
            assert!(matches!(ended, Err(FabricError::Stopped(Stopped::Cancelled))));
        });
        assert!(waited < SOON, "listening: {waited:?}");

        // Nobody accepts: the connection request stays open.
        let port = listener.port();
        let waited = took(&mut |stop| {
            let ended =
                SourceHooks::connect(&fabric, &address, port, SourceConfig::default(), stop).map(|_| ());
            assert!(matches!(ended, Err(HooksError::Stopped(Stopped::Cancelled))), "{ended:?}");
        });
        assert!(waited < SOON, "connecting: {waited:?}");

        let mut listener = fabric.listen(&address, 0).unwrap();
        let port = listener.port();
        let (mut source, mut destination) = std::thread::scope(|scope| {
            let stop = seconds(&fabric, 20);
            let destination = scope.spawn(move || {
                DestinationHooks::accept(listener.as_mut(), &DestinationConfig::default(), &stop).unwrap()
            });
            let stop = seconds(&fabric, 20);
            let source =
                SourceHooks::connect(&fabric, &address, port, SourceConfig::default(), &stop).unwrap();
            (source, destination.join().unwrap())
        });
        let waited = took(&mut |stop| {
            let ended = destination.read_stream(&mut [0; 8], stop);
            assert!(matches!(ended, Err(HooksError::Stopped(Stopped::Cancelled))), "{ended:?}");
        });
        assert!(waited < SOON, "reading: {waited:?}");
        let waited = took(&mut |stop| {
            source.write_stream(&[1; 40_000], &seconds(&fabric, 20)).unwrap();
            let ended = source.write_stream(&[1; 400_000], stop);
            assert!(matches!(ended, Err(HooksError::Stopped(Stopped::Cancelled))), "{ended:?}");
        });
        assert!(waited < SOON, "writing: {waited:?}");
    }

    #[test]
    #[ignore = "runs in ci/rxe-guest"]
    fn nobody_listening_is_an_error_that_says_so() {
        let address = address().expect("a device");
        let fabric = VerbsFabric::open().unwrap();
        let refused =
            SourceHooks::connect(&fabric, &address, 9, SourceConfig::default(), &seconds(&fabric, 20));
        let Err(HooksError::Fabric(FabricError::Event { got: "REJECTED", .. })) = refused.map(|_| ()) else {
            panic!("a connection to nobody");
        };
        let elsewhere = fabric.listen("192.0.2.1", 0).map(|_| ());
        assert!(matches!(elsewhere, Err(FabricError::Verb { verb: "rdma_bind_addr", .. })), "{elsewhere:?}");
    }

    #[test]
    #[ignore = "runs in ci/rxe-guest"]
    fn a_write_without_a_key_fails_with_its_status_and_the_other_end_learns_of_it() {
        let address = address().expect("a device");
        let fabric = VerbsFabric::open().unwrap();
        let params = ConnectParams {
            private_data: vec![1; 8],
            receives: 2,
            receive_bytes: 4096,
            send_depth: 16,
            reads: ReadDepth::NONE,
            read_pieces: 1,
        };
        let mut listener = fabric.listen(&address, 0).unwrap();
        let port = listener.port();
        let stop = seconds(&fabric, 20);
        let (mut here, mut there) = std::thread::scope(|scope| {
            let accepted = scope.spawn(|| {
                let incoming = listener.next_request(&stop).unwrap();
                assert!(incoming.private_data().starts_with(&[1; 8]));
                assert_eq!(incoming.peer().unwrap().ip().to_string(), address);
                incoming.accept(&params, &stop).unwrap()
            });
            let here = fabric.connect(&address, port, &params, &stop).unwrap();
            (here, accepted.join().unwrap())
        });

        let region = HostRegion::new(std::sync::Arc::new(Mapped::zeros(1 << 20)));
        let local = here.register(&region, &[Access::Read], AddressBase::Host).unwrap();
        let target = there.register(&region, &[Access::RemoteWrite], AddressBase::At(0)).unwrap();
        assert_eq!(target.address, 0, "host addresses stay hidden");
        let write = |id, rkey, to| WriteRequest {
            id,
            lkey: local.lkey,
            from: local.address,
            len: 4096,
            rkey,
            to,
            signalled: true,
        };
        let next = |endpoint: &mut Box<dyn rdma_hooks::fabric::Endpoint>| {
            let until = Instant::now() + Duration::from_secs(20);
            let flushed_receive = |found: &Completion| {
                matches!(
                    found,
                    Completion::Failed {
                        operation: Operation::Receive,
                        status: CompletionStatus::Flushed,
                        ..
                    }
                )
            };
            let mut found = Vec::new();
            while found.iter().all(flushed_receive) && Instant::now() < until {
                endpoint.poll(&mut found).unwrap();
                endpoint.wait(Duration::from_millis(10)).unwrap();
            }
            found.into_iter().find(|found| !flushed_receive(found))
        };
        // A probe needs no key at all.
        let probe = WriteRequest { id: 1, lkey: 0, from: 0, len: 0, rkey: 0, to: 0, signalled: true };
        here.post_writes(&[probe]).unwrap();
        assert_eq!(next(&mut here), Some(Completion::Done { id: 1 }));
        there.post_writes(&[probe]).unwrap();
        assert_eq!(next(&mut there), Some(Completion::Done { id: 1 }), "the other way too");
        here.post_writes(&[write(2, target.rkey, (1 << 20) - 4096)]).unwrap();
        assert_eq!(next(&mut here), Some(Completion::Done { id: 2 }));
        here.post_writes(&[write(3, target.rkey, (1 << 20) - 4095)]).unwrap();
        let Some(Completion::Failed { operation: Operation::Write, status, .. }) = next(&mut here) else {
            panic!()
        };
        assert_eq!(status, CompletionStatus::RemoteAccess);
    }

    #[test]
    #[ignore = "runs in ci/rxe-guest"]
    fn devices_are_listed_with_their_limits() {
        let devices = devices().unwrap();
        println!("{devices:#?}");
        let device = &devices[0];
        assert!(device.max_registration_bytes > 0 && device.max_requests > 0 && !device.ports.is_empty());
        let expected = [std::net::IpAddr::from([10, 9, 0, 1])];
        assert_eq!(device.ports[0].addresses, expected);
    }

    #[test]
    #[ignore = "runs in ci/rxe-guest"]
    fn r11_a_connection_is_a_reliable_queue_pair_in_the_tcp_port_space() {
        let address = address().expect("a device");
        let fabric = VerbsFabric::open().unwrap();
        let mut listener = fabric.listen(&address, 0).unwrap();
        let port = listener.port();
        let (here, there) = std::thread::scope(|scope| {
            let stop = seconds(&fabric, 20);
            let there = scope.spawn(move || {
                DestinationHooks::accept(listener.as_mut(), &DestinationConfig::default(), &stop).unwrap()
            });
            let stop = seconds(&fabric, 20);
            let here = SourceHooks::connect(&fabric, &address, port, SourceConfig::default(), &stop).unwrap();
            (here, there.join().unwrap())
        });
        let shown = |kind: &str| {
            let shown = std::process::Command::new("rdma").args(["resource", "show", kind]).output();
            String::from_utf8_lossy(&shown.expect("rdma").stdout).into_owned()
        };
        let (pairs, ids) = (shown("qp"), shown("cm_id"));
        println!("{pairs}\n{ids}");
        // The kernel's own have no process.
        let ours =
            |text: &str| text.lines().filter(|line| line.contains("pid ")).map(str::to_owned).collect();
        let (pairs, ids): (Vec<String>, Vec<String>) = (ours(&pairs), ours(&ids));
        assert!(!pairs.is_empty() && pairs.iter().all(|pair| pair.contains("type RC")), "{pairs:?}");
        let fits = |id: &String| id.contains("qp-type RC") && id.contains("ps TCP");
        assert!(ids.len() >= 2 && ids.iter().all(fits), "{ids:?}");
        drop((here, there));
    }
}

/// In `ci/rxe-guest --kernel odp`.
mod in_odp_guest {
    use super::*;

    #[test]
    #[ignore = "runs in ci/rxe-guest --kernel odp"]
    fn memory_on_a_file_system_with_dax_is_registered_on_demand_at_both_ends() {
        let address = address().expect("a device");
        common::mapped::FOLDER.set("/run/dax".into()).unwrap();
        for pin_all in [false, true] {
            let source = SourceConfig { pin_all, ..SourceConfig::default() };
            let counters = migrate(&address, &Plan { source, rounds: 3, ..Plan::default() });
            println!("pin-all: {pin_all}: {counters:?}");
            assert!(counters.registrations > 0 && counters.writes_posted > 0);
            assert_eq!(counters.on_demand_registrations, counters.registrations);
        }
    }
}
