//! Missing pages that a destination reads from its source's memory, with faults and losses, under a seed.
//!
//! Real are both engines of the keys and the one that decides what is read. Both memories, the connection with its READs,
//! the guest's threads and the sessions are machines that take a step at a time, in an order that follows from the seed:
//!
//! ```text
//! RAMWIRE_SIM_SEED=1234 cargo test --lib session::sim::reads -- --nocapture
//! ```

mod world;

use self::world::World;
use super::findings::{finds_each, survey};
use super::plan::Rng;
use crate::engine::{FillBreakage, KeyBreakage};

/// Seeds of an ordinary test run.
const SEEDS: u64 = 1000;
/// Seeds among which each order that is switched off must be found.
const MUTANT_SEEDS: u64 = 300;

/// An order that is left out.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Orders {
    pub(super) fill: FillBreakage,
    pub(super) keys: KeyBreakage,
}

fn run(seed: u64, orders: Orders) -> World {
    let mut world = World::new(Rng::new(seed), orders);
    world.run();
    world
}

#[test]
fn a_guest_gets_every_page_once_and_no_key_outlives_its_memory() {
    let describe = |world: &World| format!("{world:?}");
    let all = [
        "all pages are read",
        "the connection is lost while pages are missing",
        "what is missing comes over another connection",
        "a thread waits for a page from one connection to the next",
        "memory was given back before the connection was lost",
        "the connection is lost when none is missing",
        "a READ fails although part of its bytes has come",
        "a thread waits for a page whose key has not come",
        "its key is granted before others",
        "a key can't be made before another is revoked",
        "a page is read for a thread while it is read with others",
        "a span is whole while others are read",
        "memory is given back while pages are missing",
        "host pages of several pages",
        "the source is stopped, and the destination goes on",
    ];
    survey(SEEDS, |seed| run(seed, Orders::default()), |world| world.findings, describe, &all);
}

#[test]
fn each_order_of_reading_is_needed() {
    let fill = |fill| Orders { fill, ..Orders::default() };
    let keys = |keys| Orders { keys, ..Orders::default() };
    let orders = [
        (fill(FillBreakage::PlaceFailed), ["a page has other contents"]),
        (fill(FillBreakage::GiveTwice), ["a page is read twice"]),
        (fill(FillBreakage::WholeWhenRead), ["does not end"]),
        (fill(FillBreakage::PassWithheld), ["does not end"]),
        (fill(FillBreakage::ForgetWithheld), ["a page that a thread waits for is read behind others"]),
        (fill(FillBreakage::ForgetOutstanding), ["a thread waits for a page that nobody asks for"]),
        (keys(KeyBreakage::RevokeEarly), ["a READ fails although nothing is lost"]),
        (keys(KeyBreakage::RevokeLate), ["memory is given back while its key lives"]),
        (keys(KeyBreakage::EndWhenGranted), ["the end comes before all pages are placed"]),
        (keys(KeyBreakage::ForgetPutOff), ["does not end"]),
        (keys(KeyBreakage::ReportEarly), ["a READ fails although nothing is lost"]),
        (keys(KeyBreakage::ReportWhileRead), ["a READ fails although nothing is lost"]),
    ];
    finds_each(MUTANT_SEEDS, orders, |seed, orders| run(seed, orders).findings.violations());
}
