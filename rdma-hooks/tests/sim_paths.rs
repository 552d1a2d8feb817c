//! What whole migrations do not reach by themselves: the return path, postcopy, hooks out of order, latencies.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{MIB, PAGE};
use rdma_hooks::sim::{Fault, Host, OnDemand, Sim, SimConfig, SimFabric, SparseMemory};
use rdma_hooks::{
    BlockSpan, Cancel, Counters, DestinationConfig, DestinationHooks, ExtensionOffer, Fabric, FabricError,
    Features, HooksError, HostRegion, MigrationId, PageContent, RamBlock, RamControl, Reason, RegionMemory,
    ReturnWriter, SaveDisposition, SourceConfig, SourceHooks, Stop, Stopped, Ticket,
};

const PORT: u16 = 1;

fn seconds(fabric: &SimFabric, seconds: u64) -> Stop {
    Stop::new(Some(fabric.now() + Duration::from_secs(seconds)), Cancel::default())
}

/// Runs both ends, each in a thread, on a fresh network.
fn both<S: Send, D: Send>(
    config: SimConfig,
    source: impl FnOnce(SimFabric) -> S + Send,
    destination: impl FnOnce(SimFabric, Box<dyn rdma_hooks::fabric::Listener>) -> D + Send,
) -> (S, D, Sim) {
    let sim = Sim::new(config);
    let (from, to) = (sim.fabric(Host::A), sim.fabric(Host::B));
    let listener = to.listen("sim", PORT).unwrap();
    std::thread::scope(|scope| {
        let part = to.enter();
        let there = scope.spawn(move || {
            let _part = part;
            destination(to, listener)
        });
        let part = from.enter();
        let here = scope.spawn(move || {
            let _part = part;
            source(from)
        });
        (here.join().expect("source"), there.join().expect("destination"), sim.clone())
    })
}

fn ram(len: u64) -> (Arc<SparseMemory>, RamBlock) {
    let memory = Arc::new(SparseMemory::new(len));
    (memory.clone(), RamBlock::new("ram", HostRegion::new(memory)))
}

fn open(hooks: &mut SourceHooks, kind: RamControl, stop: &Stop) {
    let mark = hooks.registration_start(kind).unwrap().unwrap();
    hooks.write_stream(&mark.to_bytes(), stop).unwrap();
}

fn span(offset: u64, len: u64, content: PageContent) -> BlockSpan {
    BlockSpan { block: 0, offset, len, content }
}

/// Serves rounds of a source that sends nothing but marks; `rounds` with the setup.
fn serve(
    hooks: &mut DestinationHooks,
    block: RamBlock,
    rounds: usize,
    stop: &Stop,
) -> Result<(), HooksError> {
    let length = block.region.len();
    hooks.add_block(block)?;
    hooks.block_notification("ram", length)?;
    for _ in 0..rounds {
        let mut mark = [0; 8];
        let mut done = 0;
        while done < 8 {
            done += hooks.read_stream(&mut mark[done..], stop)?;
        }
        hooks.registration_handle(stop)?;
    }
    Ok(())
}

#[test]
fn r42_to_r46_the_return_path_carries_bytes_both_with_and_without_the_extension() {
    for extended in [false, true] {
        let extension = extended.then_some(ExtensionOffer {
            data_queues: 1,
            window: 2,
            features: Features::ALL,
            migration: MigrationId([3; 16]),
        });
        let config = SourceConfig { extension, ..SourceConfig::default() };
        let said: Vec<u8> = (0..100_000_u32).map(|i| i as u8).collect();
        let expected = said.clone();
        let (heard, closed, sim) = both(
            SimConfig::default(),
            move |fabric| {
                let stop = seconds(&fabric, 30);
                let hooks = SourceHooks::connect(&fabric, "sim", PORT, config, &stop).unwrap();
                let mut back = hooks.open_return_path(&fabric, &stop).unwrap();
                let mut heard = vec![0; 100_000];
                let mut done = 0;
                while done < heard.len() {
                    done += back.read(&mut heard[done..], &stop).unwrap();
                }
                heard
            },
            move |fabric, mut listener| {
                let stop = seconds(&fabric, 30);
                let config = DestinationConfig { data_queues: 1, window: 2, ..DestinationConfig::default() };
                let hooks = DestinationHooks::accept(listener.as_mut(), &config, &stop).unwrap();
                let mut back = ReturnWriter::accept(listener.as_mut(), hooks.granted(), &stop).unwrap();
                back.write(&said, &stop).unwrap();
                back.finish(&stop)
            },
        );
        assert_eq!(heard, expected);
        assert!(closed.is_ok(), "{closed:?}");
        assert_eq!(sim.unready_messages(), 0);
    }
}

#[test]
fn r42_a_destination_without_a_return_path_is_given_up_after_5_s() {
    let (waited, _, _) = both(
        SimConfig::default(),
        |fabric| {
            let stop = seconds(&fabric, 60);
            let hooks = SourceHooks::connect(&fabric, "sim", PORT, SourceConfig::default(), &stop).unwrap();
            let started = fabric.now();
            let ended = hooks.open_return_path(&fabric, &stop).map(|_| ());
            assert!(matches!(ended, Err(HooksError::Stopped(Stopped::Deadline))), "{ended:?}");
            fabric.now() - started
        },
        |fabric, mut listener| {
            let stop = seconds(&fabric, 60);
            let mut hooks =
                DestinationHooks::accept(listener.as_mut(), &DestinationConfig::default(), &stop).unwrap();
            let ended = hooks.read_stream(&mut [0], &stop);
            assert!(matches!(ended, Err(HooksError::Fabric(_) | HooksError::Exchange(_))), "{ended:?}");
        },
    );
    assert!((5..7).contains(&waited.as_secs()), "{waited:?}");
}

#[test]
fn r47_after_postcopy_has_begun_pages_go_by_the_stream_and_rounds_are_none() {
    let ((), (), _) = both(
        SimConfig::default(),
        |fabric| {
            let stop = seconds(&fabric, 30);
            let mut hooks =
                SourceHooks::connect(&fabric, "sim", PORT, SourceConfig::default(), &stop).unwrap();
            hooks.set_blocks(vec![ram(MIB).1]).unwrap();
            open(&mut hooks, RamControl::Setup, &stop);
            hooks.registration_stop(RamControl::Setup, &stop).unwrap();
            open(&mut hooks, RamControl::Round, &stop);
            hooks.control_save_page(span(0, MIB, PageContent::Data), &stop).unwrap();
            assert!(matches!(hooks.begin_postcopy(&stop), Err(HooksError::OutOfOrder(_))));
            hooks.registration_stop(RamControl::Round, &stop).unwrap();
            hooks.begin_postcopy(&stop).unwrap();
            assert_eq!(hooks.collect().unwrap(), Ticket(1), "all writes are over");
            assert_eq!(hooks.registration_start(RamControl::Round).unwrap(), None);
            let saved = hooks.control_save_page(span(0, PAGE, PageContent::Data), &stop).unwrap();
            assert_eq!(saved, SaveDisposition::NotSupported(Reason::Postcopy));
            hooks.registration_stop(RamControl::Round, &stop).unwrap();
            hooks.write_stream(b"page", &stop).unwrap();
            hooks.finish(&stop).unwrap();
        },
        |fabric, mut listener| {
            let stop = seconds(&fabric, 30);
            let mut hooks =
                DestinationHooks::accept(listener.as_mut(), &DestinationConfig::default(), &stop).unwrap();
            serve(&mut hooks, ram(MIB).1, 2, &stop).unwrap();
            let mut page = [0; 4];
            assert_eq!(hooks.read_stream(&mut page, &stop).unwrap(), 4);
            assert_eq!(&page, b"page");
            hooks.finish(&stop).unwrap();
        },
    );
}

#[test]
fn r20_r23_hooks_out_of_order_are_refused_and_harmless() {
    let ((), (), _) = both(
        SimConfig::default(),
        |fabric| {
            let stop = seconds(&fabric, 30);
            let mut hooks =
                SourceHooks::connect(&fabric, "sim", PORT, SourceConfig::default(), &stop).unwrap();
            hooks.set_blocks(vec![ram(MIB).1]).unwrap();
            let out_of_order = |result: Result<(), HooksError>, what: &str| {
                assert!(matches!(result, Err(HooksError::OutOfOrder(_))), "{what}: {result:?}");
            };
            out_of_order(hooks.set_blocks(Vec::new()), "blocks twice");
            out_of_order(hooks.registration_start(RamControl::Round).map(|_| ()), "a round before setup");
            out_of_order(hooks.registration_stop(RamControl::Setup, &stop), "a stop without a start");
            let page = span(0, PAGE, PageContent::Data);
            out_of_order(hooks.control_save_page(page, &stop).map(|_| ()), "a page without a round");
            let mark = hooks.registration_start(RamControl::Setup).unwrap().unwrap();
            out_of_order(hooks.registration_start(RamControl::Setup).map(|_| ()), "two rounds at once");
            out_of_order(hooks.registration_stop(RamControl::Setup, &stop), "R-20 the mark is missing");
            hooks.write_stream(&mark.to_bytes(), &stop).unwrap();
            out_of_order(hooks.control_save_page(page, &stop).map(|_| ()), "a page in the setup round");
            out_of_order(hooks.write_stream(b"x", &stop), "R-20 bytes in an open round");
            out_of_order(hooks.registration_stop(RamControl::Finish, &stop), "another round's stop");
            hooks.registration_stop(RamControl::Setup, &stop).unwrap();
            out_of_order(hooks.registration_start(RamControl::Setup).map(|_| ()), "R-23 setup twice");
            open(&mut hooks, RamControl::Finish, &stop);
            let past = hooks.control_save_page(span(MIB, PAGE, PageContent::Zero), &stop).map(|_| ());
            assert!(matches!(past, Err(HooksError::Block(_))), "{past:?}");
            hooks.registration_stop(RamControl::Finish, &stop).unwrap();
            hooks.finish(&stop).unwrap();
        },
        |fabric, mut listener| {
            let stop = seconds(&fabric, 30);
            let mut hooks =
                DestinationHooks::accept(listener.as_mut(), &DestinationConfig::default(), &stop).unwrap();
            serve(&mut hooks, ram(MIB).1, 2, &stop).unwrap();
            let late = hooks.block_notification("late", 1);
            assert!(matches!(late, Err(HooksError::Block(_))), "{late:?}");
            hooks.finish(&stop).unwrap();
        },
    );
}

/// A page that is told zero, then has data, then is zero again, all within one round, ends as it was last.
#[test]
fn r33_zeros_and_data_of_one_page_keep_their_order() {
    for data_queues in [0, 3] {
        for seed in 0..20 {
            let extension = Some(ExtensionOffer {
                data_queues,
                window: 4,
                features: Features::ALL,
                migration: MigrationId([1; 16]),
            });
            let (target, block) = ram(4 * MIB);
            let (source, from_block) = ram(4 * MIB);
            let sim = SimConfig { seed, max_delay: Duration::from_millis(5), ..SimConfig::default() };
            let ((), (), _) = both(
                sim,
                move |fabric| {
                    let stop = seconds(&fabric, 30);
                    let config =
                        SourceConfig { extension, pin_all: seed % 2 == 0, ..SourceConfig::default() };
                    let mut hooks = SourceHooks::connect(&fabric, "sim", PORT, config, &stop).unwrap();
                    hooks.set_blocks(vec![from_block]).unwrap();
                    open(&mut hooks, RamControl::Setup, &stop);
                    hooks.registration_stop(RamControl::Setup, &stop).unwrap();
                    open(&mut hooks, RamControl::Finish, &stop);
                    // All chunks at once, so that several queue pairs are under way.
                    source.zero(0, 4 * MIB);
                    hooks.control_save_page(span(0, 4 * MIB, PageContent::Zero), &stop).unwrap();
                    for chunk in 0..4 {
                        source.write(chunk * MIB, &[7; 70_000]);
                    }
                    hooks.control_save_page(span(0, 4 * MIB, PageContent::Data), &stop).unwrap();
                    for chunk in [1, 3] {
                        hooks.control_save_page(span(chunk * MIB, MIB, PageContent::Zero), &stop).unwrap();
                    }
                    hooks.registration_stop(RamControl::Finish, &stop).unwrap();
                    hooks.finish(&stop).unwrap();
                },
                move |fabric, mut listener| {
                    let stop = seconds(&fabric, 30);
                    let config =
                        DestinationConfig { data_queues: 3, window: 4, ..DestinationConfig::default() };
                    let mut hooks = DestinationHooks::accept(listener.as_mut(), &config, &stop).unwrap();
                    serve(&mut hooks, block, 2, &stop).unwrap();
                    let _ = hooks.finish(&stop);
                },
            );
            for chunk in 0..4 {
                let is_zero = target.is_zero(chunk * MIB, MIB);
                assert_eq!(is_zero, chunk % 2 == 1, "seed {seed}, {data_queues} more queues, chunk {chunk}");
            }
        }
    }
}

#[test]
fn w02_a_walk_has_its_next_keys_before_it_needs_them() {
    let ((), (), _) = both(
        SimConfig::default(),
        |fabric| {
            let stop = seconds(&fabric, 30);
            let mut hooks =
                SourceHooks::connect(&fabric, "sim", PORT, SourceConfig::default(), &stop).unwrap();
            hooks.set_blocks(vec![ram(40 * MIB).1]).unwrap();
            open(&mut hooks, RamControl::Setup, &stop);
            hooks.registration_stop(RamControl::Setup, &stop).unwrap();
            open(&mut hooks, RamControl::Finish, &stop);
            let mut registered = Vec::new();
            for chunk in 0..9 {
                hooks.control_save_page(span(chunk * MIB, MIB, PageContent::Data), &stop).unwrap();
                hooks.drain(&stop).unwrap();
                registered.push(hooks.registered_bytes() / MIB);
            }
            // Spans of 1, 2, 4 and 8 chunks; from the second on, the next one is asked for in the middle of the last.
            assert_eq!(registered, [1, 3, 7, 7, 7, 7, 15, 15, 15]);
            hooks.registration_stop(RamControl::Finish, &stop).unwrap();
            hooks.finish(&stop).unwrap();
        },
        |fabric, mut listener| {
            let stop = seconds(&fabric, 30);
            let mut hooks =
                DestinationHooks::accept(listener.as_mut(), &DestinationConfig::default(), &stop).unwrap();
            serve(&mut hooks, ram(40 * MIB).1, 2, &stop).unwrap();
            hooks.finish(&stop).unwrap();
        },
    );
}

#[test]
fn latencies_are_kept_when_asked_for_and_tickets_say_what_has_arrived() {
    let ((), (), _) = both(
        SimConfig::default(),
        |fabric| {
            let stop = seconds(&fabric, 30);
            let config = SourceConfig { record_latencies: true, ..SourceConfig::default() };
            let mut hooks = SourceHooks::connect(&fabric, "sim", PORT, config, &stop).unwrap();
            let (memory, block) = ram(8 * MIB);
            memory.write(0, &vec![1; 8 << 20]);
            hooks.set_blocks(vec![block]).unwrap();
            open(&mut hooks, RamControl::Setup, &stop);
            hooks.registration_stop(RamControl::Setup, &stop).unwrap();
            open(&mut hooks, RamControl::Finish, &stop);
            for page in 0..64 {
                let saved =
                    hooks.control_save_page(span(page * 2 * PAGE, PAGE, PageContent::Data), &stop).unwrap();
                assert!(matches!(saved, SaveDisposition::Delayed { ticket: Ticket(t), .. } if t == page + 1));
            }
            assert!(hooks.collect().unwrap() < Ticket(64), "the last page waits for a neighbour");
            hooks.drain(&stop).unwrap();
            assert_eq!(hooks.collect().unwrap(), Ticket(64));
            let mut latencies = Vec::new();
            hooks.drain_latencies(&mut latencies);
            let counters = hooks.counters();
            assert_eq!(latencies.len() as u64, counters.writes_signalled);
            assert!(counters.writes_signalled * 4 < counters.writes_posted, "{counters:?}");
            assert!(latencies.iter().all(|took| *took <= Duration::from_millis(2) && !took.is_zero()));
            hooks.registration_stop(RamControl::Finish, &stop).unwrap();
            hooks.finish(&stop).unwrap();
        },
        |fabric, mut listener| {
            let stop = seconds(&fabric, 30);
            let mut hooks =
                DestinationHooks::accept(listener.as_mut(), &DestinationConfig::default(), &stop).unwrap();
            serve(&mut hooks, ram(8 * MIB).1, 2, &stop).unwrap();
            assert_eq!(hooks.touched_chunks(0).collect::<Vec<_>>(), [0]);
            hooks.finish(&stop).unwrap();
        },
    );
}

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

/// What a source and its destination want beyond QEMU, and what a sparse guest's pages cost in messages then.
fn sparse_guest(ours: Option<Features>, theirs: Features, window: u16) -> Counters {
    let extension = ours.map(|features| ExtensionOffer {
        data_queues: 0,
        window,
        features,
        migration: MigrationId([2; 16]),
    });
    let (target, block) = ram(200 * MIB);
    target.write(3 * MIB, b"left over");
    let (source, from_block) = ram(200 * MIB);
    // A page with data in every other chunk, zeros between.
    let data: Vec<_> = (0..100).map(|index| span(index * 2 * MIB, PAGE, PageContent::Data)).collect();
    data.iter().for_each(|span| source.write(span.offset, b"data"));
    let memory = Arc::clone(&source);
    let (counters, (), sim) = both(
        SimConfig::default(),
        move |fabric| {
            let stop = seconds(&fabric, 30);
            let config = SourceConfig { extension, ..SourceConfig::default() };
            let mut hooks = SourceHooks::connect(&fabric, "sim", PORT, config, &stop).unwrap();
            hooks.set_blocks(vec![from_block]).unwrap();
            open(&mut hooks, RamControl::Setup, &stop);
            hooks.registration_stop(RamControl::Setup, &stop).unwrap();
            open(&mut hooks, RamControl::Finish, &stop);
            let before = hooks.counters().messages_sent;
            hooks.expect_pages(&data, &stop).unwrap();
            for &page in &data {
                hooks.control_save_page(page, &stop).unwrap();
                let zeros = span(page.offset + PAGE, 2 * MIB - PAGE, PageContent::Zero);
                hooks.control_save_page(zeros, &stop).unwrap();
            }
            hooks.registration_stop(RamControl::Finish, &stop).unwrap();
            let mut counters = hooks.counters();
            counters.messages_sent -= before;
            hooks.finish(&stop).unwrap();
            counters
        },
        move |fabric, mut listener| {
            let stop = seconds(&fabric, 30);
            let config = DestinationConfig { data_queues: 0, window, features: theirs, admit: None };
            let mut hooks = DestinationHooks::accept(listener.as_mut(), &config, &stop).unwrap();
            serve(&mut hooks, block, 2, &stop).unwrap();
            let _ = hooks.finish(&stop);
        },
    );
    assert_eq!(memory.first_difference(&target), None);
    assert_eq!(sim.unready_messages(), 0);
    assert_eq!(counters.zero_ranges, 100);
    counters
}

#[test]
fn r55_keys_come_in_batches_and_zeros_in_lists_only_if_both_ends_want_it() {
    let batches = Features { zero_runs: false, ..Features::ALL };
    let lists = Features { key_batches: false, ..Features::ALL };
    // Messages for 100 keys, 100 zero ranges, the mark and the end of the round.
    for (ours, theirs, at_least, at_most) in [
        (None, Features::ALL, 202, 202),
        (Some(Features::NONE), Features::ALL, 202, 202),
        (Some(Features::ALL), Features::NONE, 202, 202),
        (Some(Features::ALL), batches, 103, 103),
        (Some(lists), Features::ALL, 103, 202),
        (Some(Features::ALL), Features::ALL, 4, 40),
    ] {
        for window in [1, 8] {
            let counters = sparse_guest(ours, theirs, window);
            let messages = counters.messages_sent;
            println!("{ours:?} {theirs:?} window {window}: {messages} messages");
            assert!(
                (at_least..=at_most).contains(&messages),
                "{ours:?}, {theirs:?}, window {window}: {messages} messages"
            );
            assert_eq!(counters.registrations, 100);
        }
    }
}

#[test]
fn a_window_of_credits_saves_round_trips() {
    let took = |window| {
        let extension = ExtensionOffer {
            data_queues: 0,
            window,
            features: Features::NONE,
            migration: MigrationId([4; 16]),
        };
        let config = SourceConfig { extension: Some(extension), ..SourceConfig::default() };
        let (took, (), _) = both(
            SimConfig::default(),
            |fabric| {
                let stop = seconds(&fabric, 60);
                let mut hooks = SourceHooks::connect(&fabric, "sim", PORT, config, &stop).unwrap();
                let started = fabric.now();
                hooks.write_stream(&vec![7; 4 << 20], &stop).unwrap();
                hooks.finish(&stop).unwrap();
                fabric.now() - started
            },
            |fabric, mut listener| {
                let stop = seconds(&fabric, 60);
                let config = DestinationConfig { window: 8, ..DestinationConfig::default() };
                let mut hooks = DestinationHooks::accept(listener.as_mut(), &config, &stop).unwrap();
                let (mut bytes, mut read) = (vec![0; 1 << 16], 0);
                while read < 4 << 20 {
                    read += hooks.read_stream(&mut bytes, &stop).unwrap();
                }
                let _ = hooks.finish(&stop);
            },
        );
        took
    };
    let (one, eight) = (took(1), took(8));
    println!("4 MiB of stream: one credit {one:?}, eight {eight:?}");
    assert!(eight * 2 < one, "virtual time: {one:?} with one credit, {eight:?} with eight");
}

/// One migration of 4 MiB of data with pin-all or without.
fn simple(sim: SimConfig, pin_all: bool) -> (Result<Duration, HooksError>, Result<(), HooksError>, Sim) {
    let (memory, block) = ram(4 * MIB);
    memory.write(0, &vec![3; 4 << 20]);
    let (target, there) = ram(4 * MIB);
    let (source, destination, sim) = both(
        sim,
        move |fabric| {
            let stop = seconds(&fabric, 600);
            let config = SourceConfig { pin_all, ..SourceConfig::default() };
            let mut hooks = SourceHooks::connect(&fabric, "sim", PORT, config, &stop)?;
            hooks.set_blocks(vec![block])?;
            let started = fabric.now();
            open(&mut hooks, RamControl::Setup, &stop);
            hooks.registration_stop(RamControl::Setup, &stop)?;
            let setup = fabric.now() - started;
            open(&mut hooks, RamControl::Finish, &stop);
            hooks.control_save_page(span(0, 4 * MIB, PageContent::Data), &stop)?;
            hooks.registration_stop(RamControl::Finish, &stop)?;
            // nothing is on its way any more, though the destination has yet to be told so.
            assert_eq!(hooks.collect()?, Ticket(1));
            assert_eq!(memory.first_difference(&target), None);
            hooks.finish(&stop)?;
            Ok(setup)
        },
        move |fabric, mut listener| {
            let stop = seconds(&fabric, 600);
            let mut hooks =
                DestinationHooks::accept(listener.as_mut(), &DestinationConfig::default(), &stop)?;
            serve(&mut hooks, there, 2, &stop)?;
            hooks.finish(&stop).map(drop)
        },
    );
    assert_eq!(sim.live_registrations(), 0);
    (source, destination, sim)
}

#[test]
fn r37_registering_everything_may_take_long_and_both_ends_do_it_at_once() {
    let minutes = Duration::from_secs(120);
    let sim = SimConfig { registration_takes: minutes, ..SimConfig::default() };
    let (source, destination, _) = simple(sim, true);
    destination.unwrap();
    let setup = source.unwrap();
    assert!(setup >= minutes && setup < minutes * 2, "not one after the other: {setup:?}");
}

#[test]
fn r48_at_the_end_of_the_last_round_every_completion_is_reaped() {
    for pin_all in [false, true] {
        for seed in 0..20 {
            let sim = SimConfig { seed, max_delay: Duration::from_millis(50), ..SimConfig::default() };
            let (source, destination, _) = simple(sim, pin_all);
            source.unwrap();
            destination.unwrap();
        }
    }
}

#[test]
fn memory_that_cannot_be_resident_is_registered_on_demand_or_refused() {
    for pin_all in [false, true] {
        let with = |on_demand| simple(SimConfig { on_demand, ..SimConfig::default() }, pin_all);
        let (source, destination, sim) = with(OnDemand::Unneeded);
        assert!(source.is_ok() && destination.is_ok());
        assert_eq!(sim.on_demand_registrations(), 0, "resident where that is possible");
        let (source, destination, sim) = with(OnDemand::Offered);
        assert!(source.is_ok() && destination.is_ok());
        assert!(sim.on_demand_registrations() > 0);
        let (source, destination, _) = with(OnDemand::Missing);
        assert!(source.is_err());
        let refused = destination.unwrap_err();
        assert!(matches!(refused, HooksError::Fabric(FabricError::Registration { .. })), "{refused:?}");
    }
}
