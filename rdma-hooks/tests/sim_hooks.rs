//! Hooks in and out of order, and what they answer: postcopy, zeros beside data, tickets, latencies.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::time::Duration;

use common::pair::{both, open, ram, seconds, serve, span};
use common::{MIB, PAGE, PORT};
use rdma_hooks::sim::SimConfig;
use rdma_hooks::{
    DestinationConfig, DestinationHooks, ExtensionOffer, Features, HooksError, MigrationId, PageContent,
    RamControl, Reason, RegionMemory, SaveDisposition, SourceConfig, SourceHooks, Ticket,
};

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
