//! Whole migrations over the simulated fabric: memory is equal, or both ends say why not.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Outcome, Plan, Random, migrate};
use rdma_hooks::sim::{Fault, Host};

/// Seeds run by default, and under `RDMA_HOOKS_SEEDS=N`.
fn seeds(default: u64) -> u64 {
    std::env::var("RDMA_HOOKS_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn assert_whole(seed: u64, outcome: &Outcome) {
    if let Err(error) = &outcome.source {
        panic!("seed {seed}: source: {error}");
    }
    if let Err(error) = &outcome.destination {
        panic!("seed {seed}: destination: {error}");
    }
    assert_eq!(outcome.from.first_difference(&outcome.to), None, "seed {seed}");
    assert_books(seed, outcome);
}

/// True however a migration ends.
fn assert_books(seed: u64, outcome: &Outcome) {
    assert_eq!(outcome.sim.live_registrations(), 0, "seed {seed}: registrations leak");
    assert_eq!(outcome.sim.unready_messages(), 0, "seed {seed}: a message without credit");
}

#[test]
fn whole_migrations_under_seeds_leave_equal_memory() {
    for seed in 0..seeds(1000) {
        let outcome = migrate(&Plan::from_seed(seed));
        assert_whole(seed, &outcome);
    }
}

#[test]
fn the_same_seed_gives_the_same_history() {
    for seed in 0..20 {
        let (first, second) = (migrate(&Plan::from_seed(seed)), migrate(&Plan::from_seed(seed)));
        assert_eq!(first.sim.elapsed(), second.sim.elapsed(), "seed {seed}");
        assert_eq!(first.counters, second.counters, "seed {seed}");
    }
}

#[test]
fn r54_a_peer_killed_at_every_message_ends_both_sides_in_seconds() {
    let mut ended = 0;
    for seed in [3, 8] {
        let plan = Plan::from_seed(seed);
        let whole = migrate(&plan);
        assert_whole(seed, &whole);
        for host in [Host::A, Host::B] {
            for message in 0..whole.sim.messages_sent(host) {
                for fault in [Fault::Killed { message }, Fault::PowerLoss { message }] {
                    let outcome = migrate(&plan.clone().with_fault(host, fault));
                    let (victim, peer) = match host {
                        Host::A => (&outcome.source, &outcome.destination),
                        Host::B => (&outcome.destination, &outcome.source),
                    };
                    if victim.is_ok() || peer.is_ok() {
                        // Only who has everything may not notice: the end died in its farewell.
                        assert_eq!(
                            outcome.from.first_difference(&outcome.to),
                            None,
                            "seed {seed}: {host:?} {fault:?}"
                        );
                    } else {
                        ended += 1;
                    }
                    assert_books(seed, &outcome);
                    let limit = if matches!(fault, Fault::Killed { .. }) { 3 } else { 8 };
                    let took = outcome.sim.elapsed().saturating_sub(whole.sim.elapsed());
                    assert!(took.as_secs() <= limit, "seed {seed}: {host:?} {fault:?}: {took:?} more");
                }
            }
        }
    }
    assert!(ended > 100, "only {ended} migrations met their fault");
}

#[test]
fn faults_anywhere_end_in_an_error_and_never_in_a_wrong_success() {
    let mut failed = 0;
    let total = seeds(10_000);
    for seed in 0..total {
        let mut random = Random(seed ^ 0xfa017);
        let host = if random.chance(500) { Host::A } else { Host::B };
        let fault = match random.below(5) {
            0 => Fault::Killed { message: random.below(40) },
            1 => Fault::PowerLoss { message: random.below(40) },
            2 => Fault::DeviceRemoved { request: random.below(120) },
            3 => Fault::BadCompletion { request: random.below(120) },
            _ => Fault::RegistrationRefused { registration: random.below(6) },
        };
        let outcome = migrate(&Plan::from_seed(seed).with_fault(host, fault));
        match (&outcome.source, &outcome.destination) {
            (Ok(()), Ok(())) => assert_whole(seed, &outcome),
            (Ok(()), Err(_)) => panic!("seed {seed}: {host:?} {fault:?}: only the source is content"),
            // The destination has everything; that the source does not know is what a return path is for.
            (Err(_), Ok(())) => assert_eq!(outcome.from.first_difference(&outcome.to), None, "seed {seed}"),
            (Err(_), Err(_)) => failed += 1,
        }
        assert_books(seed, &outcome);
    }
    assert!(failed > total / 4, "only {failed} of {total} migrations met their fault");
}
