//! What runs under seeds showed; and the search for the seed that shows that an order is needed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use super::{number_from, spread};

/// What one run reached, and what it violated.
#[derive(Debug, Default)]
pub(super) struct Findings {
    seen: BTreeSet<&'static str>,
    violations: Vec<String>,
}

impl Findings {
    pub(super) fn saw(&mut self, what: &'static str) {
        self.seen.insert(what);
    }

    pub(super) fn must(&mut self, holds: bool, what: &str) {
        if !holds && !self.violations.iter().any(|known| known == what) {
            self.violations.push(what.to_owned());
        }
    }

    /// Those of a part of the run.
    pub(super) fn join(&mut self, part: Self) {
        self.seen.extend(part.seen);
        self.violations.extend(part.violations);
    }

    pub(super) fn violations(self) -> Vec<String> {
        self.violations
    }
}

/// Runs `seeds` seeds, or as many as RAMWIRE_SIM_SEEDS says: none may violate anything, and together they must reach
/// `all`. With RAMWIRE_SIM_SEED only that one, with a `description` of its run.
pub(super) fn survey<W>(
    seeds: u64,
    run: impl Fn(u64) -> W + Sync,
    findings: impl Fn(W) -> Findings + Sync,
    describe: impl Fn(&W) -> String,
    all: &[&str],
) {
    if let Some(seed) = number_from("RAMWIRE_SIM_SEED") {
        let run = run(seed);
        println!("{}", describe(&run));
        let findings = findings(run);
        println!("{:#?}", findings.seen);
        assert!(findings.violations.is_empty(), "{:#?}", findings.violations);
        return;
    }
    let wanted = number_from("RAMWIRE_SIM_SEEDS").unwrap_or(seeds);
    let runs = spread(0..wanted, |seed| (seed, findings(run(seed))));
    let mut coverage: BTreeMap<&str, u64> = BTreeMap::new();
    let seen = runs.iter().flat_map(|(_, findings)| &findings.seen);
    seen.for_each(|what| *coverage.entry(what).or_default() += 1);
    println!("of {wanted} seeds: {coverage:#?}");
    let broken: Vec<_> =
        runs.iter().filter(|(_, findings)| !findings.violations.is_empty()).take(5).collect();
    assert!(broken.is_empty(), "replay a seed with RAMWIRE_SIM_SEED: {broken:#?}");
    let missing: Vec<_> = all.iter().filter(|what| !coverage.contains_key(**what)).collect();
    assert!(wanted < seeds || missing.is_empty(), "never reached: {missing:?}");
}

/// Each order of `orders`, switched off, must be found by one of `seeds` seeds: by a violation with one of its symptoms.
pub(super) fn finds_each<B: Copy + Debug + Send, S: AsRef<[&'static str]> + Send>(
    seeds: u64,
    orders: impl IntoIterator<Item = (B, S)>,
    violations: impl Fn(u64, B) -> Vec<String> + Sync,
) {
    let orders: Vec<_> = orders.into_iter().collect();
    let found = spread(orders.into_iter(), |(order, symptoms)| {
        let shows = |what: &String| symptoms.as_ref().iter().any(|symptom| what.contains(symptom));
        let find = |seed| violations(seed, order).into_iter().find(shows).map(|why| (seed, why));
        (order, (0..seeds).find_map(find))
    });
    for (order, found) in &found {
        match found {
            Some((seed, why)) => println!("{order:?}: found by seed {seed}: {why}"),
            None => println!("{order:?}: not found"),
        }
    }
    let missed: Vec<_> = found.iter().filter(|(_, found)| found.is_none()).map(|(order, _)| order).collect();
    assert!(missed.is_empty(), "no seed below {seeds} finds {missed:?}");
}
