//! RDMA READs over a real verbs device: soft-RoCE or better.
//!
//! Run in ci/rxe-guest, or on a host with a device by `cargo test --test reads -- --ignored`.

#![cfg(feature = "verbs")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::device::address;
use common::mapped::Mapped;
use common::{MIB, PAGE, Random, TestMemory};
use rdma_hooks::fabric::{
    Access, AddressBase, Completion, CompletionStatus, ConnectParams, Endpoint, Operation, ReadDepth,
    ReadPiece, ReadRequest, Registration,
};
use rdma_hooks::verbs::VerbsFabric;
use rdma_hooks::{Cancel, Fabric, FabricError, HostRegion, RegionMemory, Stop};

/// Longer than anything takes.
const LONG: Duration = Duration::from_secs(60);

type End = Box<dyn Endpoint>;

fn params(own: u8, served: u8) -> ConnectParams {
    ConnectParams {
        private_data: vec![1; 8],
        receives: 2,
        receive_bytes: 4096,
        send_depth: 64,
        reads: ReadDepth { own, served },
        read_pieces: 4,
    }
}

/// Ends of queue pairs to one peer, all of one fabric object at each side: those that connect, those that accept.
fn pairs(count: usize, connects: &ConnectParams, accepts: &ConnectParams) -> (Vec<End>, Vec<End>) {
    let address = address().expect("a device");
    let (from, to) = (VerbsFabric::open().unwrap(), VerbsFabric::open().unwrap());
    let mut listener = to.listen(&address, 0).unwrap();
    let port = listener.port();
    let stop = Stop::new(Some(Instant::now() + LONG), Cancel::default());
    std::thread::scope(|scope| {
        let accepted = scope.spawn(|| {
            let accept = |_| listener.next_request(&stop).unwrap().accept(accepts, &stop).unwrap();
            (0..count).map(accept).collect()
        });
        let connect = |_| from.connect(&address, port, connects, &stop).unwrap();
        ((0..count).map(connect).collect(), accepted.join().unwrap())
    })
}

/// Memory full of bytes that belong to a seed.
fn filled(len: u64, seed: u64) -> Arc<Mapped> {
    let memory = Mapped::zeros(len);
    let mut random = Random(seed);
    for at in (0..len).step_by(PAGE as usize) {
        let page: Vec<u8> = (0..PAGE / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        memory.write(at, &page);
    }
    Arc::new(memory)
}

fn register(end: &End, memory: &Arc<Mapped>, rights: &[Access], base: AddressBase) -> Registration {
    end.register(&HostRegion::new(memory.clone()), rights, base).unwrap()
}

/// Completions of the send queue, once there is one.
fn completions(end: &mut End) -> Vec<Completion> {
    let until = Instant::now() + LONG;
    let mut found = Vec::new();
    while found.is_empty() && Instant::now() < until {
        end.poll(&mut found).unwrap();
        found.retain(|found| !matches!(found, Completion::Failed { operation: Operation::Receive, .. }));
        if found.is_empty() {
            end.wait(Duration::from_millis(10)).unwrap();
        }
    }
    found
}

/// Posts one READ and tells how it ended.
fn read(end: &mut End, id: u64, (rkey, from): (u32, u64), into: &[ReadPiece]) -> Completion {
    end.post_reads(&[ReadRequest { id, rkey, from, into }]).unwrap();
    completions(end)[0]
}

fn failed_with(completion: Completion) -> CompletionStatus {
    let Completion::Failed { operation: Operation::Read, status, .. } = completion else {
        panic!("{completion:?}");
    };
    status
}

mod in_rxe_guest {
    use super::*;

    #[test]
    #[ignore = "runs in ci/rxe-guest"]
    fn a_read_of_several_mib_is_byte_identical_in_both_directions_and_its_pieces_lie_where_they_should() {
        const LEN: u64 = 6 * MIB;
        // The end that accepts reads, then the end that connects.
        for accepts_reads in [true, false] {
            let (here, there) = match accepts_reads {
                true => (params(0, 4), params(4, 0)),
                false => (params(4, 0), params(0, 4)),
            };
            let (connected, accepted) = pairs(1, &here, &there);
            let (mut servers, mut readers) =
                if accepts_reads { (connected, accepted) } else { (accepted, connected) };
            let (server, reader) = (servers.remove(0), &mut readers[0]);
            let limits = reader.limits();
            println!("{limits:?}");
            assert_eq!(
                (limits.reads, server.limits().reads),
                (ReadDepth { own: 4, served: 0 }, ReadDepth { own: 0, served: 4 })
            );
            assert!(limits.read_pieces == 4 && limits.read_bytes >= LEN);
            let (ram, copy) = (filled(LEN, 7), Arc::new(Mapped::zeros(LEN)));
            // No host address of the server leaves its process.
            let served = register(&server, &ram, &[Access::RemoteRead], AddressBase::At(0));
            assert_eq!(served.address, 0);
            let target = register(reader, &copy, &[Access::LocalWrite], AddressBase::Host);
            // Pieces of lengths that no page and no packet has.
            let cuts = [0, 4097, MIB + 3, 5 * MIB, LEN];
            let pieces: Vec<ReadPiece> = cuts
                .windows(2)
                .map(|cut| {
                    let (to, len) = (target.address + cut[0], (cut[1] - cut[0]) as u32);
                    ReadPiece { lkey: target.lkey, to, len }
                })
                .collect();
            assert_eq!(read(reader, 1, (served.rkey, 0), &pieces), Completion::Done { id: 1 });
            assert_eq!(ram.difference(&copy), None);
            // Pieces in another order than their memory.
            let swapped = [1, 0].map(|page| ReadPiece {
                lkey: target.lkey,
                to: target.address + page * PAGE,
                len: PAGE as u32,
            });
            assert_eq!(read(reader, 2, (served.rkey, 0), &swapped), Completion::Done { id: 2 });
            let [mut first, mut second] = [[0; PAGE as usize]; 2];
            ram.read(0, &mut first);
            copy.read(PAGE, &mut second);
            assert_eq!(first, second);
        }
    }

    #[test]
    #[ignore = "runs in ci/rxe-guest"]
    fn more_reads_than_the_depth_are_refused_and_all_come_in_turn_over_two_queue_pairs_of_one_peer() {
        const LEN: u64 = 4 * MIB;
        let (servers, mut readers) = pairs(2, &params(0, 3), &params(8, 8));
        for reader in &readers {
            assert_eq!(reader.limits().reads, ReadDepth { own: 3, served: 0 }, "the least of both");
        }
        let (ram, copy) = (filled(LEN, 9), Arc::new(Mapped::zeros(LEN)));
        // One registration at each end serves both queue pairs.
        let served =
            register(&servers[0], &ram, &[Access::RemoteRead, Access::RemoteWrite], AddressBase::Host);
        let target = register(&readers[1], &copy, &[Access::RemoteWrite], AddressBase::Host);
        let piece =
            |offset: u64| ReadPiece { lkey: target.lkey, to: target.address + offset, len: PAGE as u32 };
        let (mut at, mut id, mut refused) = (0, 0, 0);
        let mut under_way = [Vec::new(), Vec::new()];
        while at < LEN || under_way.iter().any(|ids| !ids.is_empty()) {
            for (reader, under_way) in readers.iter_mut().zip(&mut under_way) {
                while at < LEN {
                    id += 1;
                    let into = [piece(at)];
                    let from = served.address + at;
                    let posted =
                        reader.post_reads(&[ReadRequest { id, rkey: served.rkey, from, into: &into }]);
                    match posted {
                        Ok(()) => {
                            under_way.push(id);
                            at += PAGE;
                        }
                        Err(FabricError::ReadDepth { asked: 1, under_way: 3, depth: 3 }) => {
                            refused += 1;
                            break;
                        }
                        Err(error) => panic!("{error}"),
                    }
                }
                if under_way.is_empty() {
                    continue;
                }
                for completion in completions(reader) {
                    assert_eq!(completion, Completion::Done { id: under_way.remove(0) });
                }
            }
        }
        println!("{id} posts, {refused} of them refused");
        assert!(refused > 0);
        assert_eq!(ram.difference(&copy), None);
    }

    #[test]
    #[ignore = "runs in ci/rxe-guest"]
    fn a_device_gives_no_more_reads_than_it_has_and_none_where_the_peer_allows_none() {
        let (servers, readers) = pairs(1, &params(0, 255), &params(255, 0));
        let (own, served) = (readers[0].limits().reads, servers[0].limits().reads);
        println!("asked for 255: {own:?}, {served:?}");
        assert!(own.own > 0 && own.own < 255 && own.own == served.served, "{own:?}");

        let (servers, mut readers) = pairs(1, &params(0, 0), &params(8, 0));
        assert_eq!(
            (readers[0].limits().reads, servers[0].limits().reads),
            (ReadDepth::NONE, ReadDepth::NONE)
        );
        let copy = Arc::new(Mapped::zeros(PAGE));
        let target = register(&readers[0], &copy, &[Access::LocalWrite], AddressBase::Host);
        let into = [ReadPiece { lkey: target.lkey, to: target.address, len: PAGE as u32 }];
        let refused = readers[0].post_reads(&[ReadRequest { id: 1, rkey: 1, from: 0, into: &into }]);
        assert!(matches!(refused, Err(FabricError::ReadDepth { depth: 0, .. })), "{refused:?}");
        let too_many = [into[0]; 5];
        let refused = readers[0].post_reads(&[ReadRequest { id: 1, rkey: 1, from: 0, into: &too_many }]);
        assert!(matches!(refused, Err(FabricError::ReadShape { most_pieces: 4, .. })), "{refused:?}");
    }

    #[test]
    #[ignore = "runs in ci/rxe-guest"]
    fn what_a_key_does_not_allow_fails_with_its_status_and_flushes_what_was_posted_after_it() {
        const LEN: u64 = MIB;
        use CompletionStatus::{LocalProtection, RemoteAccess};
        // Rights of the peer's memory and of own memory, how the READ goes wrong, how it fails.
        let both: &[Access] = &[Access::RemoteRead, Access::RemoteWrite];
        let cases: [(&str, &[Access], &[Access], CompletionStatus); 6] = [
            ("the peer's memory may only be written to", &[Access::RemoteWrite], both, RemoteAccess),
            ("the peer's memory is local", &[Access::Read], both, RemoteAccess),
            ("own memory may not be written to", both, &[Access::RemoteRead], LocalProtection),
            ("beyond the end", both, both, RemoteAccess),
            ("beyond the end of own memory", both, both, LocalProtection),
            ("deregistered", both, both, RemoteAccess),
        ];
        for (case, rights, own_rights, expected) in cases {
            let (mut servers, mut readers) = pairs(1, &params(0, 4), &params(4, 0));
            let (server, reader) = (&mut servers[0], &mut readers[0]);
            let (ram, copy) = (filled(LEN, 3), Arc::new(Mapped::zeros(LEN)));
            // Always readable: the connection works before and after.
            let good = register(server, &ram, both, AddressBase::Host);
            let target = register(reader, &copy, &[Access::LocalWrite], AddressBase::Host);
            let bad = register(server, &ram, rights, AddressBase::Host);
            let bad_target = register(reader, &copy, own_rights, AddressBase::Host);
            let (key, mut from) = (bad.rkey, bad.address);
            let mut piece = ReadPiece { lkey: bad_target.lkey, to: bad_target.address, len: PAGE as u32 };
            match case {
                "beyond the end" => from += LEN - PAGE + 1,
                "beyond the end of own memory" => piece.to += LEN - PAGE + 1,
                "deregistered" => {
                    // It is readable until then.
                    assert_eq!(read(reader, 1, (key, from), &[piece]), Completion::Done { id: 1 });
                    drop(bad);
                }
                _ => {}
            }
            let fine = [ReadPiece { lkey: target.lkey, to: target.address + PAGE, len: PAGE as u32 }];
            let right = |id| ReadRequest { id, rkey: good.rkey, from: good.address + PAGE, into: &fine };
            let wrong = ReadRequest { id: 11, rkey: key, from, into: &[piece] };
            reader.post_reads(&[right(10), wrong, right(12)]).unwrap();
            let mut ended = Vec::new();
            while ended.len() < 3 {
                let found = completions(reader);
                assert!(!found.is_empty(), "{case}: {ended:?}");
                ended.extend(found);
            }
            println!("{case}: {ended:?}");
            assert_eq!(ended[0], Completion::Done { id: 10 }, "{case}");
            assert_eq!(failed_with(ended[1]), expected, "{case}");
            assert_eq!(failed_with(ended[2]), CompletionStatus::Flushed, "{case}");
            let [mut wanted, mut got] = [[0; PAGE as usize]; 2];
            ram.read(PAGE, &mut wanted);
            copy.read(PAGE, &mut got);
            assert_eq!(wanted, got, "{case}: the READ before it");
        }
    }
}

/// In `ci/rxe-guest --kernel odp`.
mod in_odp_guest {
    use super::*;

    #[test]
    #[ignore = "runs in ci/rxe-guest --kernel odp"]
    fn memory_on_a_file_system_with_dax_is_read_and_filled_on_demand() {
        const LEN: u64 = 4 * MIB;
        common::mapped::FOLDER.set("/run/dax".into()).unwrap();
        let (servers, mut readers) = pairs(1, &params(0, 4), &params(4, 0));
        let (ram, copy) = (filled(LEN, 5), Arc::new(Mapped::zeros(LEN)));
        let served = register(&servers[0], &ram, &[Access::RemoteRead], AddressBase::Host);
        let target = register(&readers[0], &copy, &[Access::LocalWrite], AddressBase::Host);
        assert!(served.on_demand && target.on_demand);
        let into = [ReadPiece { lkey: target.lkey, to: target.address, len: LEN as u32 }];
        let done = read(&mut readers[0], 1, (served.rkey, served.address), &into);
        assert_eq!(done, Completion::Done { id: 1 });
        assert_eq!(ram.difference(&copy), None);
    }
}
