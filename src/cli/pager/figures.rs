//! What the pager has done so far, for `--metrics`.

use std::collections::BTreeMap;
use std::fmt::Error;
use std::sync::{Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Unit;
use ramwire::session::LazyProgress;

use super::super::metrics::{Out, encoded};

/// The figures of all VMMs. Those of one that is served are as old as their last update, at most a second.
#[derive(Debug, Default)]
pub(super) struct Figures(Mutex<Counts>);

#[derive(Clone, Debug, Default)]
struct Counts {
    /// By the number of the VMM.
    served: BTreeMap<u64, LazyProgress>,
    begun: u64,
    refused: u64,
    /// Of those that have ended.
    faults: u64,
    urgent: u64,
}

impl Figures {
    fn change<T>(&self, change: impl FnOnce(&mut Counts) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Another VMM is served; its number.
    pub(super) fn begun(&self) -> u64 {
        self.change(|counts| {
            counts.begun += 1;
            counts.served.insert(counts.begun, LazyProgress::default());
            counts.begun
        })
    }

    pub(super) fn refused(&self) {
        self.change(|counts| counts.refused += 1);
    }

    /// How far it is.
    pub(super) fn is_at(&self, number: u64, progress: LazyProgress) {
        self.change(|counts| _ = counts.served.insert(number, progress));
    }

    pub(super) fn ended(&self, number: u64, progress: &LazyProgress) {
        self.change(|counts| {
            counts.served.remove(&number);
            counts.faults += progress.faults;
            counts.urgent += progress.urgent;
        });
    }

    /// As OpenMetrics text.
    pub(super) fn text(&self) -> Result<String, Error> {
        encoded(Box::new(self.change(|counts| counts.clone())))
    }
}

impl Collector for Counts {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut out = Out::new(encoder);
        let sum = |of: fn(&LazyProgress) -> u64| self.served.values().map(of).sum::<u64>();
        out.gauge("pager_vmms", "VMMs that are served", None, self.served.len() as f64)?;
        let vmms = [("served", self.begun), ("refused", self.refused)];
        out.counters("pager_connections", "VMMs that connected, by what became of them", "how", &vmms)?;
        let faults = self.faults + sum(|progress| progress.faults);
        out.counter("pager_faults", "Faults: threads that had to wait for a page", None, faults)?;
        let urgent = self.urgent + sum(|progress| progress.urgent);
        out.counter("pager_urgent_pages", "Pages of 4 KiB that were read for them", None, urgent)?;
        let missing = sum(|progress| progress.missing) as f64;
        out.gauge("pager_missing_pages", "Pages of 4 KiB that are still to come", None, missing)?;
        let failed = sum(|progress| progress.failed) as f64;
        out.gauge("pager_failed_pages", "Of them, those that could not be read", None, failed)?;
        let worst = self.served.values().map(|progress| progress.latency.p99_us).max().unwrap_or(0);
        out.gauge(
            "pager_fault_worst_p99",
            "From the fault to the page in place: the longest of the VMMs' 99th percentiles",
            Some(Unit::Seconds),
            worst as f64 / 1e6,
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn figures_are_of_all_vmms_and_counters_never_fall() {
        let figures = Figures::default();
        let (first, second) = (figures.begun(), figures.begun());
        figures.refused();
        let mut progress = LazyProgress::default();
        (progress.faults, progress.missing, progress.urgent) = (5, 100, 7);
        figures.is_at(first, progress.clone());
        figures.is_at(second, progress.clone());
        progress.faults = 6;
        figures.ended(first, &progress);
        let text = figures.text().unwrap();
        for line in [
            "ramwire_pager_vmms 1.0",
            "ramwire_pager_connections_total{how=\"served\"} 2",
            "ramwire_pager_connections_total{how=\"refused\"} 1",
            "ramwire_pager_faults_total 11",
            "ramwire_pager_urgent_pages_total 14",
            "ramwire_pager_missing_pages 100.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
    }
}
