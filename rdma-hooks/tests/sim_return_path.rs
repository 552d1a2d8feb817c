//! The way back, which whole migrations do not open.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::PORT;
use common::pair::{both, seconds};
use rdma_hooks::sim::SimConfig;
use rdma_hooks::{
    DestinationConfig, DestinationHooks, ExtensionOffer, Fabric, Features, HooksError, MigrationId,
    ReturnWriter, SourceConfig, SourceHooks, Stopped,
};

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
