//! Registration: ahead of a walk, in batches, of everything, of memory that is not resident; and what native words save.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::pair::{both, open, ram, seconds, serve, span};
use common::{MIB, PAGE, PORT};
use rdma_hooks::sim::{OnDemand, Sim, SimConfig};
use rdma_hooks::{
    Counters, DestinationConfig, DestinationHooks, ExtensionOffer, Fabric, FabricError, Features, HooksError,
    MigrationId, PageContent, RamControl, RegionMemory, SourceConfig, SourceHooks, Ticket,
};

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
            let config = DestinationConfig {
                data_queues: 0,
                window,
                features: theirs,
                ..DestinationConfig::default()
            };
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
    let sim = SimConfig { registration_takes: [minutes; 2], ..SimConfig::default() };
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
