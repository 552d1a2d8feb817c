//! Which missing pages are requested: once for each host page, immediately, and again after the connection was lost.
//!
//! The pager knows no memory, no socket and no clock. Its inputs are faults and placed pages, and it returns what to do
//! about each.

use std::collections::BTreeMap;
use std::time::Duration;

use super::blocktime::Blocktime;
use crate::observe::{Latency, PageWaits};
use crate::units::BlockIndex;

/// A host page, by its block in the guest's own table and its offset in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPage {
    /// The block.
    pub block: BlockIndex,
    /// Offset of its first byte.
    pub offset: u64,
}

/// A thread that waits for a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiter {
    /// Its number in the kernel; 0: not known.
    pub thread: u32,
    /// The vCPU that it runs, if it is known to run one.
    pub vcpu: Option<u32>,
}

/// What to do for a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultAnswer {
    /// Request the page from the source.
    Ask,
    /// The page was already requested.
    Wait,
    /// The page has been received: resolve the fault here.
    Received,
}

/// The pages that threads wait for.
#[derive(Debug, Default)]
pub struct Pager {
    outstanding: BTreeMap<HostPage, Wanted>,
    faults: u64,
    requests: u64,
    latency: Latency,
    blocktime: Blocktime,
}

/// A page that was requested.
#[derive(Debug)]
struct Wanted {
    since: Duration,
    /// Each thread once: no more than there are threads.
    waiters: Vec<(Waiter, Duration)>,
}

impl Pager {
    /// The threads of these vCPUs are known from here on.
    pub fn know(&mut self, now: Duration, vcpus: impl IntoIterator<Item = u32>) {
        self.blocktime.know(now, vcpus);
    }

    /// A thread waits for `page` since `now`. `received` is called after the page counts as outstanding, so that a page
    /// that is placed at the same moment is noticed by one of the two threads.
    pub fn fault(
        &mut self,
        now: Duration,
        page: HostPage,
        who: Waiter,
        received: impl FnOnce() -> bool,
    ) -> FaultAnswer {
        self.faults += 1;
        let known = self.outstanding.contains_key(&page);
        let wanted =
            self.outstanding.entry(page).or_insert_with(|| Wanted { since: now, waiters: Vec::new() });
        if wanted.waiters.iter().all(|(waiter, _)| *waiter != who) {
            wanted.waiters.push((who, now));
            self.blocktime.blocked(now, who.vcpu);
        }
        if received() {
            self.go_on(now, page);
            return FaultAnswer::Received;
        }
        if known {
            return FaultAnswer::Wait;
        }
        self.requests += 1;
        FaultAnswer::Ask
    }

    /// A page is placed. Returns the time since it was requested, if it was.
    pub fn placed(&mut self, now: Duration, page: HostPage) -> Option<Duration> {
        let took = now.saturating_sub(self.go_on(now, page)?);
        self.latency.record(took);
        Some(took)
    }

    /// Nobody waits for a page any more. Returns since when it was wanted.
    fn go_on(&mut self, now: Duration, page: HostPage) -> Option<Duration> {
        let Wanted { since, waiters } = self.outstanding.remove(&page)?;
        for (waiter, since) in waiters {
            self.blocktime.goes_on(now, since, waiter.vcpu);
        }
        Some(since)
    }

    /// Pages to request again on a new connection, ascending.
    pub fn outstanding(&self) -> impl Iterator<Item = HostPage> + '_ {
        self.outstanding.keys().copied()
    }

    /// Faults, and requests sent for them.
    pub fn counts(&self) -> (u64, u64) {
        (self.faults, self.requests)
    }

    /// How long threads waited.
    pub fn waits(&self) -> PageWaits {
        self.blocktime.figures()
    }

    /// Time from a page's request to its placement.
    pub fn latency(&self) -> &Latency {
        &self.latency
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn page(number: u64) -> HostPage {
        HostPage { block: BlockIndex(0), offset: number * 4096 }
    }

    fn thread(thread: u32) -> Waiter {
        Waiter { thread, vcpu: thread.checked_sub(1) }
    }

    #[test]
    fn a_page_is_asked_for_once_however_many_threads_wait_for_it() {
        let mut pager = Pager::default();
        let at = Duration::from_millis;
        pager.know(at(0), [0, 1]);
        assert_eq!(pager.fault(at(1), page(3), thread(1), || false), FaultAnswer::Ask);
        assert_eq!(pager.fault(at(2), page(3), thread(2), || false), FaultAnswer::Wait);
        assert_eq!(pager.fault(at(3), page(3), thread(2), || false), FaultAnswer::Wait);
        assert_eq!(pager.placed(at(5), page(3)), Some(at(4)), "since the first fault");
        assert_eq!(pager.placed(at(6), page(3)), None);
        assert_eq!(pager.fault(at(7), page(3), thread(1), || true), FaultAnswer::Received);
        assert_eq!((pager.counts(), pager.outstanding().count()), ((4, 1), 0));
        let waits = pager.waits();
        let blocked: Vec<_> = waits.vcpus.iter().map(|vcpu| vcpu.blocked_ns / 1_000_000).collect();
        assert_eq!((blocked, waits.all_blocked_ns / 1_000_000, waits.all.count), (vec![4, 3], 3, 3));
    }

    /// Faults, placements and lost connections in any order: every page that a thread waits for is either received or
    /// requested on the present connection.
    #[test]
    fn no_thread_waits_for_a_page_that_nobody_was_asked_for() {
        for seed in 0..2000u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut draw = |most: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) % most
            };
            let (mut pager, mut received, mut waiting) = (Pager::default(), BTreeSet::new(), BTreeSet::new());
            let mut asked = BTreeSet::new();
            for step in 0..200 {
                let (now, number) = (Duration::from_micros(step), draw(16));
                match draw(8) {
                    0..4 => match pager.fault(now, page(number), thread(0), || received.contains(&number)) {
                        FaultAnswer::Ask => {
                            waiting.insert(number);
                            asked.insert(number);
                        }
                        FaultAnswer::Wait => {
                            waiting.insert(number);
                        }
                        FaultAnswer::Received => assert!(received.contains(&number)),
                    },
                    4..7 => {
                        received.insert(number);
                        pager.placed(now, page(number));
                        waiting.remove(&number);
                    }
                    _ => asked = pager.outstanding().map(|page| page.offset / 4096).collect(),
                }
                assert!(waiting.iter().all(|number| asked.contains(number)), "seed {seed}, step {step}");
            }
        }
    }
}
