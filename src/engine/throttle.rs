//! Throttling of a guest that writes faster than its pages are sent.
//!
//! Two methods, as in QEMU. *Auto-converge* takes a share of the time of all vCPUs, which grows each time it is not
//! enough. *Dirty limit* gives each vCPU a quota of bytes that it may write, and makes vCPUs that write more rest.
//! Throttling begins when, for the second time, the bytes written in a period exceed a share of the bytes sent in it.

use std::time::Duration;

use crate::units::{Percent, Rate, RestShare};

/// Shortest period over which written and sent bytes are compared.
const PERIOD: Duration = Duration::from_secs(1);
/// How often the limit must be exceeded before throttling begins or increases.
const TIMES: u32 = 2;
/// Interval between two readings of the vCPUs' writes.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// A vCPU whose rate is this close to its quota is not changed.
const NEAR: u64 = 25 << 20;
/// A vCPU that is further off than this share is corrected in one step, otherwise in small steps.
const FAR: u64 = 50;
/// A small step: a tenth of the time that the vCPU runs.
const STEP: u64 = 10;

/// Throttling methods, with the names and the defaults of QEMU's parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThrottlePolicy {
    /// A share of all vCPUs' time.
    AutoConverge {
        /// `cpu-throttle-initial`: the initial share; 20.
        initial: Percent,
        /// `cpu-throttle-increment`: the increment of the share; 10.
        increment: Percent,
        /// `cpu-throttle-tailslow`: do not add more than would be enough if the writes were proportional to the
        /// remaining time; false.
        tailslow: bool,
        /// `max-cpu-throttle`: the largest share; 99.
        max: Percent,
    },
    /// A quota for each vCPU.
    DirtyLimit {
        /// `vcpu-dirty-limit`: what a vCPU may write; 1 MiB/s.
        quota: Rate,
    },
}

impl ThrottlePolicy {
    /// Auto-converge with QEMU's defaults.
    pub fn auto_converge() -> Self {
        let percent = |value| Percent::new(value).unwrap_or_default();
        Self::AutoConverge { initial: percent(20), increment: percent(10), tailslow: false, max: percent(99) }
    }

    /// A dirty limit with QEMU's default.
    pub fn dirty_limit() -> Self {
        Self::DirtyLimit { quota: Rate(1 << 20) }
    }
}

/// Decides how much to throttle a guest. Its inputs are the written and the sent bytes; time is an argument.
#[derive(Debug)]
pub struct Throttler {
    means: Option<ThrottlePolicy>,
    threshold: Percent,
    began: Duration,
    dirtied: u64,
    sent_before: u64,
    exceeded: u32,
    /// The next sync begins the first period.
    begins_anew: bool,
    share: u8,
    vcpus: Option<Vcpus>,
}

/// What happens to a guest when the throttling method changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It stays throttled as it is, or this share of all vCPUs' time is taken.
    Goes(Option<Percent>),
    /// Throttling ends: for all vCPUs' time, and the rests of this many vCPUs.
    LetGo {
        /// vCPUs that may have a rest set.
        vcpus: usize,
    },
}

/// The vCPUs under their quota.
#[derive(Debug, Default)]
struct Vcpus {
    checked_at: Duration,
    pages: Vec<u64>,
    rests: Vec<u16>,
}

impl Throttler {
    /// No throttling yet. `threshold` is QEMU's `throttle-trigger-threshold`: written bytes as a share of sent bytes.
    pub fn new(means: Option<ThrottlePolicy>, threshold: Percent) -> Self {
        Self {
            means,
            threshold,
            began: Duration::ZERO,
            dirtied: 0,
            sent_before: 0,
            exceeded: 0,
            begins_anew: false,
            share: 0,
            vcpus: None,
        }
    }

    /// The throttling method; `None`: no throttling.
    pub fn means(&self) -> Option<ThrottlePolicy> {
        self.means
    }

    /// Another method from now on, `sent` bytes after the start; returns what to do to the guest immediately.
    pub fn change(&mut self, now: Duration, sent: u64, means: Option<ThrottlePolicy>) -> Change {
        let before = std::mem::replace(&mut self.means, means);
        match (before, means) {
            (Some(ThrottlePolicy::AutoConverge { .. }), Some(ThrottlePolicy::AutoConverge { max, .. })) => {
                let lower = self.share > max.get();
                self.share = self.share.min(max.get());
                Change::Goes(lower.then_some(max))
            }
            (Some(ThrottlePolicy::DirtyLimit { .. }), Some(ThrottlePolicy::DirtyLimit { .. })) => {
                Change::Goes(None)
            }
            _ => {
                let vcpus = self.vcpu_count();
                let fresh = Self::new(means, self.threshold);
                *self = Self { began: now, sent_before: sent, ..fresh };
                if before.is_none() { Change::Goes(None) } else { Change::LetGo { vcpus } }
            }
        }
    }

    /// The guest wrote `dirtied` bytes of pages since the last call, and `sent` bytes have been sent since the start.
    /// Returns the share of all vCPUs' time to take from now on, if it changes.
    pub fn synced(&mut self, now: Duration, dirtied: u64, sent: u64) -> Option<Percent> {
        self.dirtied += dirtied;
        if std::mem::take(&mut self.begins_anew) {
            (self.began, self.sent_before, self.dirtied) = (now, sent, 0);
        }
        let means = self.means?;
        if now.saturating_sub(self.began) < PERIOD {
            return None;
        }
        let dirtied = std::mem::take(&mut self.dirtied);
        let limit = scaled(sent.saturating_sub(self.sent_before), self.threshold.get().into(), 100);
        (self.began, self.sent_before) = (now, sent);
        if dirtied <= limit {
            return None;
        }
        self.exceeded += 1;
        if self.exceeded < TIMES {
            return None;
        }
        self.exceeded = 0;
        match means {
            ThrottlePolicy::AutoConverge { initial, increment, tailslow, max } => {
                let left = 100 - u64::from(self.share);
                // The remaining share that would be enough.
                let ideal = if tailslow { scaled(left, limit, dirtied) } else { 0 };
                let step = (left - ideal.min(left)).min(increment.get().into()) as u8;
                let share = if self.share == 0 { initial.get() } else { self.share.saturating_add(step) };
                let share = share.min(max.get());
                (std::mem::replace(&mut self.share, share) != share).then(|| Percent::new(share)).flatten()
            }
            ThrottlePolicy::DirtyLimit { .. } => {
                self.vcpus.get_or_insert_with(Vcpus::default);
                None
            }
        }
    }

    /// True if [`vcpus`](Self::vcpus) has to be called: at intervals while the guest runs.
    pub fn wants_vcpus(&self, now: Duration) -> bool {
        self.vcpus
            .as_ref()
            .is_some_and(|vcpus| vcpus.pages.is_empty() || now >= vcpus.checked_at + POLL_INTERVAL)
    }

    /// `pages`: the number of pages that each vCPU has written so far. Returns the new rest of each vCPU for which it
    /// changes.
    pub fn vcpus(&mut self, now: Duration, pages: &[u64], page_bytes: u64) -> Vec<(usize, RestShare)> {
        let (Some(ThrottlePolicy::DirtyLimit { quota }), Some(vcpus)) = (self.means, &mut self.vcpus) else {
            return Vec::new();
        };
        let took = now.saturating_sub(vcpus.checked_at);
        let before = std::mem::replace(&mut vcpus.pages, pages.to_vec());
        vcpus.checked_at = now;
        vcpus.rests.resize(pages.len(), 0);
        let mut changed = Vec::new();
        for (vcpu, (now, before)) in pages.iter().zip(&before).enumerate() {
            let wrote = now.saturating_sub(*before).saturating_mul(page_bytes);
            let Some(rate) = Rate::of(wrote, took) else { continue };
            let rest = rest(quota, rate, vcpus.rests[vcpu]);
            if std::mem::replace(&mut vcpus.rests[vcpu], rest) != rest {
                changed.push((vcpu, RestShare::new(rest)));
            }
        }
        changed
    }

    /// The guest ran without throttling for a while, since nothing could be sent, and is throttled as before from now on.
    /// What it wrote meanwhile counts for nothing.
    pub fn resumed(&mut self) {
        self.begins_anew = true;
        if let Some(vcpus) = &mut self.vcpus {
            // Their next reading is one to begin with.
            vcpus.pages.clear();
        }
    }

    /// The rest of each vCPU that may have one set.
    pub fn rests(&self) -> impl Iterator<Item = (usize, RestShare)> + '_ {
        let rests = self.vcpus.as_ref().map_or(&[][..], |vcpus| &vcpus.rests);
        rests.iter().map(|rest| RestShare::new(*rest)).enumerate()
    }

    /// The share of all vCPUs' time that is taken, in percent.
    pub fn share(&self) -> Percent {
        Percent::new(self.share).unwrap_or_default()
    }

    /// The longest rest of a vCPU.
    pub fn longest_rest(&self) -> RestShare {
        let rests = self.vcpus.as_ref().map_or(&[][..], |vcpus| &vcpus.rests);
        RestShare::new(rests.iter().copied().max().unwrap_or(0))
    }

    /// vCPUs that may have a rest set.
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.as_ref().map_or(0, |vcpus| vcpus.rests.len())
    }
}

/// The new rest of a vCPU that writes at `rate` and rests for `rest` percent of the time it runs.
fn rest(quota: Rate, rate: Rate, rest: u16) -> u16 {
    let off = quota.0.abs_diff(rate.0);
    if off <= NEAR {
        return rest;
    }
    // A vCPU that writes nothing would be infinitely far off.
    let share = scaled(off, 100, quota.0.max(rate.0)).min(99);
    let step = if share > FAR { share * 100 / (100 - share) } else { STEP };
    let step = u16::try_from(step).unwrap_or(u16::MAX);
    let rest = if rate > quota { rest.saturating_add(step) } else { rest.saturating_sub(step) };
    rest.min(RestShare::MAX.percent_of_run())
}

/// `value * by / of`, without overflow; 0 if `of` is.
fn scaled(value: u64, by: u64, of: u64) -> u64 {
    let scaled = (u128::from(value) * u128::from(by)).checked_div(of.into()).unwrap_or(0);
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn percent(value: u8) -> Percent {
        Percent::new(value).unwrap_or_default()
    }

    /// Syncs a second apart, with `dirtied` bytes written and `sent` bytes sent in each; returns the requested shares.
    fn shares(means: ThrottlePolicy, dirtied: u64, sent: u64, seconds: u64) -> Vec<u8> {
        let mut throttle = Throttler::new(Some(means), percent(50));
        let sync = |second| throttle.synced(Duration::from_secs(second), dirtied, second * sent);
        (1..=seconds).filter_map(sync).map(Percent::get).collect()
    }

    #[test]
    fn a_guest_that_writes_too_much_twice_is_slowed_down_step_by_step() {
        let auto = ThrottlePolicy::auto_converge();
        assert_eq!(shares(auto, 51, 100, 8), [20, 30, 40, 50]);
        assert_eq!(shares(auto, 50, 100, 8), [0; 0], "no more than half of what is sent");
        let few = ThrottlePolicy::AutoConverge {
            initial: percent(70),
            increment: percent(20),
            tailslow: false,
            max: percent(95),
        };
        assert_eq!(shares(few, 1000, 100, 12), [70, 90, 95], "and then no more");
    }

    #[test]
    fn a_calm_period_between_two_lost_ones_changes_nothing() {
        let mut throttle = Throttler::new(Some(ThrottlePolicy::auto_converge()), percent(50));
        let mut sync = |second, dirtied| throttle.synced(Duration::from_secs(second), dirtied, second * 100);
        assert_eq!([sync(1, 90), sync(2, 10)], [None, None]);
        assert_eq!(sync(3, 90), Some(percent(20)), "the second time");
        assert_eq!([sync(4, 90), sync(5, 90)], [None, Some(percent(30))], "counted anew");
    }

    #[test]
    fn syncs_within_a_second_are_of_one_period() {
        let mut throttle = Throttler::new(Some(ThrottlePolicy::auto_converge()), percent(50));
        let half = Duration::from_millis(500);
        let mut sync = |at: u32, dirtied, sent| throttle.synced(half * at, dirtied, sent);
        assert_eq!([sync(1, 40, 50), sync(2, 40, 100)], [None, None]);
        assert_eq!([sync(3, 20, 150), sync(4, 20, 200)], [None, None], "40 of 100: calm");
        assert_eq!([sync(5, 51, 250), sync(6, 0, 300)], [None, Some(percent(20))]);
    }

    #[test]
    fn the_tail_is_slow_where_little_is_missing() {
        let slow = |initial, increment| ThrottlePolicy::AutoConverge {
            initial: percent(initial),
            increment: percent(increment),
            tailslow: true,
            max: percent(99),
        };
        // At 20 % the guest writes 60 where 50 are allowed: of the remaining 80, 66 would be enough, so 14 more are
        // taken.
        assert_eq!(shares(slow(20, 30), 60, 100, 4), [20, 34]);
        assert_eq!(shares(slow(20, 10), 60, 100, 4), [20, 30], "never more than the increment");
        assert_eq!(shares(slow(20, 30), 500, 100, 4), [20, 50]);
    }

    #[test]
    fn other_means_let_the_guest_go_and_other_figures_go_on() {
        let second = Duration::from_secs;
        let auto = |max| ThrottlePolicy::AutoConverge {
            initial: percent(20),
            increment: percent(10),
            tailslow: false,
            max: percent(max),
        };
        let mut throttle = Throttler::new(Some(auto(99)), percent(50));
        for at in 1..=6 {
            throttle.synced(second(at), 90, at * 100);
        }
        assert_eq!(throttle.share(), percent(40));
        assert_eq!(throttle.change(second(7), 700, Some(auto(50))), Change::Goes(None));
        assert_eq!(throttle.change(second(7), 700, Some(auto(30))), Change::Goes(Some(percent(30))));
        let quota = |rate| Some(ThrottlePolicy::DirtyLimit { quota: Rate(rate * MIB) });
        assert_eq!(throttle.change(second(7), 700, quota(1)), Change::LetGo { vcpus: 0 });
        assert_eq!(throttle.share(), percent(0));
        assert_eq!(throttle.synced(second(8), 90, 800), None, "what was sent before counts no more");
        assert_eq!(throttle.synced(second(9), 90, 900), None);
        assert!(throttle.wants_vcpus(second(9)));
        throttle.vcpus(second(9), &[0, 0], 4096);
        assert!(!throttle.vcpus(second(10), &[1 << 20, 0], 4096).is_empty());
        assert_eq!(throttle.change(second(10), 1000, quota(9)), Change::Goes(None));
        assert_eq!(throttle.vcpu_count(), 2, "they rest on");
        assert_eq!(throttle.change(second(10), 1000, None), Change::LetGo { vcpus: 2 });
        assert!(throttle.means().is_none() && !throttle.wants_vcpus(second(99)));
        assert_eq!(throttle.change(second(11), 1100, quota(9)), Change::Goes(None), "nothing holds it");
    }

    /// What a guest writes while there is no connection says nothing about how fast it may write when there is one.
    #[test]
    fn behind_a_pause_the_guest_is_slowed_down_as_before_and_what_it_wrote_does_not_count() {
        let second = Duration::from_secs;
        let mut throttle = Throttler::new(Some(ThrottlePolicy::auto_converge()), percent(50));
        for at in 1..=4 {
            throttle.synced(second(at), 90, at * 100);
        }
        assert_eq!(throttle.share(), percent(30));
        throttle.synced(second(5), 90, 500);
        throttle.resumed();
        assert_eq!(throttle.share(), percent(30), "it stays known");
        assert_eq!(
            throttle.synced(second(60), 1 << 30, 500),
            None,
            "the first sync finds what was written meanwhile"
        );
        assert_eq!(
            [throttle.synced(second(61), 10, 600), throttle.synced(second(62), 10, 700)],
            [None, None]
        );

        let mut throttle = Throttler::new(Some(ThrottlePolicy::dirty_limit()), percent(50));
        for at in 1..=2 {
            throttle.synced(second(at), 90, at * 100);
        }
        throttle.vcpus(second(2), &[0, 0], 4096);
        throttle.vcpus(second(3), &[1 << 20, 0], 4096);
        let rests: Vec<_> = throttle.rests().collect();
        assert!(rests.len() == 2 && rests[0].1 > RestShare::default(), "{rests:?}");
        throttle.resumed();
        assert!(
            throttle.wants_vcpus(second(60)) && throttle.vcpus(second(60), &[1 << 40, 0], 4096).is_empty()
        );
        assert_eq!(throttle.rests().collect::<Vec<_>>(), rests, "they rest as before");
    }

    #[test]
    fn without_means_nothing_happens() {
        let mut throttle = Throttler::new(None, percent(50));
        for second in 1..10 {
            assert_eq!(throttle.synced(Duration::from_secs(second), 1 << 40, second), None);
        }
        assert!(throttle.means().is_none() && !throttle.wants_vcpus(Duration::from_secs(100)));
        assert!(throttle.vcpus(Duration::from_secs(100), &[1 << 40], 4096).is_empty());
    }

    #[test]
    fn a_vcpu_far_off_its_quota_is_brought_near_at_once_and_then_in_small_steps() {
        let quota = Rate(100 * MIB);
        assert_eq!(rest(quota, Rate(125 * MIB), 7), 7, "near enough");
        assert_eq!(rest(quota, Rate(75 * MIB), 7), 7);
        assert_eq!(rest(quota, Rate(126 * MIB), 7), 17);
        assert_eq!(rest(quota, Rate(74 * MIB), 7), 0);
        // 75 % too much: it rests three times as long as it runs.
        assert_eq!(rest(quota, Rate(400 * MIB), 0), 300);
        assert_eq!(rest(quota, Rate(20 * MIB), 1000), 600);
        assert_eq!(rest(quota, Rate(0), 9900), 0, "it writes nothing");
        assert_eq!(rest(Rate(MIB), Rate(u64::MAX), 1), 9900, "never more");
    }

    /// A guest whose vCPUs write as fast as allowed reaches its quota and stays there.
    #[test]
    fn a_dirty_limit_holds_each_vcpu_near_its_quota() {
        let quota = 40;
        let mut throttle =
            Throttler::new(Some(ThrottlePolicy::DirtyLimit { quota: Rate(quota * MIB) }), percent(50));
        for second in 1..=2 {
            throttle.synced(Duration::from_secs(second), 100, second * 100);
        }
        let full = [1000 * MIB, 30 * MIB, 150 * MIB];
        let (mut pages, mut rests) = ([0; 3], [RestShare::default(); 3]);
        let mut wrote = [0; 3];
        for second in 2..40 {
            let now = Duration::from_secs(second);
            assert!(throttle.wants_vcpus(now));
            throttle.vcpus(now, &pages, 4096).into_iter().for_each(|(vcpu, rest)| rests[vcpu] = rest);
            assert!(!throttle.wants_vcpus(now + Duration::from_millis(999)));
            for vcpu in 0..3 {
                wrote[vcpu] = full[vcpu] * 100 / (100 + u64::from(rests[vcpu].percent_of_run()));
                pages[vcpu] += wrote[vcpu] / 4096;
            }
        }
        for (vcpu, wrote) in wrote.iter().enumerate() {
            assert!(*wrote <= (quota + 26) * MIB, "vCPU {vcpu} writes {wrote}");
        }
        assert_eq!(rests[1], RestShare::default(), "one below its quota is left alone");
        assert!(throttle.longest_rest() > RestShare::new(300));
    }
}
