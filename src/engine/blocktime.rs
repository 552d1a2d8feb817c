//! How long vCPUs and other threads are blocked by missing pages.
//!
//! A vCPU is blocked from a fault until the page is in place. All are blocked while each vCPU whose thread is known is:
//! then the guest stands still as a whole. A thread that is not known to run a vCPU counts apart.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::observe::{PageWaits, VcpuWaits, WaitSum};

/// The waits of a guest's threads.
#[derive(Debug, Default)]
pub(super) struct Blocktime {
    vcpus: BTreeMap<u32, Vcpu>,
    /// The last moment at which one vCPU more was blocked, while all are.
    all_since: Option<Duration>,
    all_blocked: Duration,
    /// But for what is kept for each vCPU.
    waits: PageWaits,
}

#[derive(Clone, Copy, Debug, Default)]
struct Vcpu {
    /// Pages that it waits for; more than one only if it left a wait for another (a signal).
    pages: u32,
    since: Duration,
    blocked: Duration,
    waits: WaitSum,
}

impl Blocktime {
    /// These vCPUs are known from here on; one that is not among them any more keeps its figures.
    pub(super) fn know(&mut self, now: Duration, vcpus: impl IntoIterator<Item = u32>) {
        for vcpu in vcpus {
            self.vcpus.entry(vcpu).or_default();
        }
        self.look(now);
    }

    /// A thread waits for a page, for this vCPU if it runs one.
    pub(super) fn blocked(&mut self, now: Duration, vcpu: Option<u32>) {
        if let Some(vcpu) = vcpu.and_then(|vcpu| self.vcpus.get_mut(&vcpu)) {
            if vcpu.pages == 0 {
                vcpu.since = now;
            }
            vcpu.pages += 1;
        }
        self.look(now);
    }

    /// It has waited since `since`, and waits no more.
    pub(super) fn goes_on(&mut self, now: Duration, since: Duration, vcpu: Option<u32>) {
        let took = now.saturating_sub(since);
        self.waits.add(took);
        match vcpu.and_then(|vcpu| self.vcpus.get_mut(&vcpu)) {
            Some(vcpu) => {
                vcpu.waits.add(took);
                vcpu.pages = vcpu.pages.saturating_sub(1);
                if vcpu.pages == 0 {
                    vcpu.blocked += now.saturating_sub(vcpu.since);
                }
            }
            None => self.waits.others.add(took),
        }
        self.look(now);
    }

    /// Whether all are blocked may have changed.
    fn look(&mut self, now: Duration) {
        let all = !self.vcpus.is_empty() && self.vcpus.values().all(|vcpu| vcpu.pages > 0);
        match self.all_since {
            None if all => self.all_since = Some(now),
            Some(since) if !all => {
                self.all_blocked += now.saturating_sub(since);
                self.all_since = None;
            }
            _ => {}
        }
    }

    /// The figures of all waits that have ended.
    pub(super) fn figures(&self) -> PageWaits {
        let nanos = crate::observe::nanos;
        let vcpus = self.vcpus.iter().map(|(vcpu, known)| VcpuWaits {
            vcpu: *vcpu,
            waits: known.waits,
            blocked_ns: nanos(known.blocked),
        });
        let mut figures = self.waits.clone();
        (figures.vcpus, figures.all_blocked_ns) = (vcpus.collect(), nanos(self.all_blocked));
        figures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(time: u64) -> Duration {
        Duration::from_millis(time)
    }

    fn blocked(blocktime: &Blocktime) -> (Vec<u64>, u64) {
        let figures = blocktime.figures();
        (
            figures.vcpus.iter().map(|vcpu| vcpu.blocked_ns / 1_000_000).collect(),
            figures.all_blocked_ns / 1_000_000,
        )
    }

    #[test]
    fn all_are_blocked_only_while_each_is() {
        let mut blocktime = Blocktime::default();
        blocktime.know(ms(0), [0, 1]);
        blocktime.blocked(ms(1), Some(0));
        blocktime.blocked(ms(2), None);
        blocktime.goes_on(ms(3), ms(2), None);
        assert_eq!(blocked(&blocktime), (vec![0, 0], 0), "what waits still is not counted");
        blocktime.blocked(ms(5), Some(1));
        blocktime.goes_on(ms(9), ms(1), Some(0));
        blocktime.goes_on(ms(12), ms(5), Some(1));
        assert_eq!(blocked(&blocktime), (vec![8, 7], 4));
        let figures = blocktime.figures();
        assert_eq!((figures.all.count, figures.others.count, figures.others.mean_ns()), (3, 1, 1_000_000));
        assert_eq!(figures.vcpus[0].waits.mean_ns(), 8_000_000);
    }

    #[test]
    fn a_vcpu_that_is_known_later_runs_until_it_waits() {
        let mut blocktime = Blocktime::default();
        blocktime.know(ms(0), [3]);
        blocktime.blocked(ms(0), Some(3));
        blocktime.know(ms(2), [3, 4]);
        blocktime.goes_on(ms(6), ms(0), Some(3));
        assert_eq!(blocked(&blocktime), (vec![6, 0], 2));
        blocktime.blocked(ms(6), Some(9));
        blocktime.goes_on(ms(7), ms(6), Some(9));
        assert_eq!(blocktime.figures().others.count, 1, "a vCPU that nobody named");
    }

    #[test]
    fn a_vcpu_that_waits_for_two_pages_goes_on_with_the_second() {
        let mut blocktime = Blocktime::default();
        blocktime.know(ms(0), [0]);
        blocktime.blocked(ms(0), Some(0));
        blocktime.blocked(ms(1), Some(0));
        blocktime.goes_on(ms(4), ms(0), Some(0));
        assert_eq!(blocked(&blocktime), (vec![0], 0));
        blocktime.goes_on(ms(6), ms(1), Some(0));
        assert_eq!(blocked(&blocktime), (vec![6], 6));
    }
}
