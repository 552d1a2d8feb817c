//! How far a relay reads ahead of its far end.
//!
//! A source decides when to pause its guest by the rate at which its bytes are sent. If a relay reads faster than its
//! far end does, that rate is wrong, and the pages that it has read ahead add to the downtime. So it reads ahead only
//! as much as the far end takes in a few milliseconds. This uses the rate at which the far end's host has acknowledged
//! bytes while there was something to send. Bytes in the sockets' buffers do not count as taken: the buffers accept
//! gigabytes a second.

use std::time::Duration;

use crate::units::Rate;

/// Longest time that the far end may need for the waiting pages: it adds to the guest's downtime.
const MAX_BACKLOG_TIME: Duration = Duration::from_millis(20);

/// The part of the downtime limit that the backlog may take.
const SHARE_OF_DOWNTIME: u32 = 10;

/// Bytes that may wait before the far end's rate is known.
const FIRST_BACKLOG: u64 = 4 << 20;

/// Bytes that may wait at any rate: with fewer, rounds would consist only of headers.
const MIN_BACKLOG: u64 = 256 << 10;

/// Busy time over which the rate is measured.
const WINDOW: Duration = Duration::from_millis(50);

/// Approximate number of bytes that a zero page takes on the wire.
const ZERO_PAGE_BYTES: u64 = 16;

/// Pages and bytes that arrived and were sent; all but `waiting` are totals since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of a page.
    pub page_bytes: u64,
    /// Pages that have arrived and were not sent on since.
    pub waiting: u64,
    /// Pages that arrived with their bytes, including repeats.
    pub whole_came: u64,
    /// Pages that were sent on with their bytes, including repeats.
    pub whole_left: u64,
    /// Bytes that the far end's host has acknowledged.
    pub acknowledged: u64,
}

/// Decides whether to read more from the source.
#[derive(Debug)]
pub struct RelayFlow {
    max_time: Duration,
    rate: Option<Rate>,
    allowed: u64,
    /// Waiting bytes, by their size on the wire.
    backlog: u64,
    last: Option<(Duration, Traffic)>,
    /// Whole pages that arrived again before they were sent: they wait only once.
    merged: u64,
    busy_time: Duration,
    busy_bytes: u64,
}

impl RelayFlow {
    /// The backlog's time is at most 20 ms, and a tenth of `downtime_limit`.
    pub fn new(downtime_limit: Duration) -> Self {
        Self {
            max_time: (downtime_limit / SHARE_OF_DOWNTIME).min(MAX_BACKLOG_TIME),
            rate: None,
            allowed: FIRST_BACKLOG,
            backlog: 0,
            last: None,
            merged: 0,
            busy_time: Duration::ZERO,
            busy_bytes: 0,
        }
    }

    /// Records what has arrived and was sent by `now`.
    pub fn moved(&mut self, now: Duration, traffic: Traffic) {
        self.backlog = self.wire_bytes(&traffic);
        let before = self.last.replace((now, traffic));
        // If the far end was idle, the result would be the source's rate instead of its own.
        let Some((since, before)) = before.filter(|(_, before)| before.waiting > 0) else { return };
        self.busy_time += now.saturating_sub(since);
        self.busy_bytes += traffic.acknowledged.saturating_sub(before.acknowledged);
        if self.busy_time >= WINDOW {
            self.measured(Rate::of(self.busy_bytes, self.busy_time).unwrap_or(Rate(0)));
            (self.busy_time, self.busy_bytes) = (Duration::ZERO, 0);
        }
    }

    /// True while the backlog is at most what the far end takes in the allowed time.
    pub fn may_read(&self) -> bool {
        self.backlog <= self.allowed
    }

    /// Bytes that may wait.
    pub fn allowed(&self) -> u64 {
        self.allowed
    }

    /// The far end's measured rate; `None` before a window is full.
    pub fn rate(&self) -> Option<Rate> {
        self.rate
    }

    fn measured(&mut self, rate: Rate) {
        self.rate = Some(rate);
        // At most twice as much as before: a single window may have found an empty buffer.
        let most = self.allowed.saturating_mul(2);
        self.allowed = rate.bytes_in(self.max_time).min(most).max(MIN_BACKLOG);
    }

    fn wire_bytes(&mut self, traffic: &Traffic) -> u64 {
        let ahead = traffic.whole_came.saturating_sub(traffic.whole_left);
        // More than are waiting: some were replaced by newer ones while they waited.
        self.merged = self.merged.max(ahead.saturating_sub(traffic.waiting));
        let whole = ahead.saturating_sub(self.merged).min(traffic.waiting);
        whole * traffic.page_bytes + (traffic.waiting - whole) * ZERO_PAGE_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;
    const TICK: Duration = Duration::from_millis(2);

    /// A far end that takes `rate` bytes a second, after a socket that buffers `buffer` at once.
    struct FarEnd {
        rate: u64,
        buffer: u64,
        swallowed: u64,
        sent: u64,
    }

    impl FarEnd {
        fn new(rate: u64, buffer: u64) -> Self {
            Self { rate, buffer, swallowed: 0, sent: 0 }
        }

        /// Takes for a tick, and buffers as many of the `waiting` pages as there is room for; returns how many remain.
        fn tick(&mut self, waiting: u64) -> u64 {
            self.swallowed -= (self.rate / 500).min(self.swallowed);
            let pages = ((self.buffer - self.swallowed) / PAGE).min(waiting);
            self.swallowed += pages * PAGE;
            self.sent += pages * PAGE;
            waiting - pages
        }
    }

    /// A source that sends `pages_a_tick` while the relay reads; returns the maximum number of bytes that waited from
    /// `settled` on.
    fn most_waiting(rate: u64, pages_a_tick: u64, settled: u64) -> (u64, RelayFlow) {
        let mut flow = RelayFlow::new(Duration::from_millis(300));
        let mut far = FarEnd::new(rate, 2 << 20);
        let (mut waiting, mut came, mut most) = (0, 0, 0);
        for tick in 0..2000 {
            if flow.may_read() {
                came += pages_a_tick;
                waiting += pages_a_tick;
            }
            waiting = far.tick(waiting);
            if tick >= settled {
                most = most.max(waiting * PAGE);
            }
            let traffic = Traffic {
                page_bytes: PAGE,
                waiting,
                whole_came: came,
                whole_left: came - waiting,
                acknowledged: far.sent - far.swallowed,
            };
            flow.moved(TICK * tick as u32, traffic);
        }
        (most, flow)
    }

    #[test]
    fn a_fast_source_gets_no_further_ahead_than_the_far_end_takes_in_a_few_milliseconds() {
        for rate in [10_000_000, 300_000_000, 1_200_000_000] {
            // 5 GB/s, at which a socket's buffer accepts them.
            let a_read = 2441;
            let (ever, flow) = most_waiting(rate, a_read, 0);
            let (settled, _) = most_waiting(rate, a_read, 500);
            let allowed = (rate / 50).max(MIN_BACKLOG);
            assert!(settled <= allowed * 5 / 4 + a_read * PAGE, "{rate}: {settled} bytes wait");
            assert!(
                ever <= FIRST_BACKLOG.max(allowed * 5 / 4) + a_read * PAGE,
                "{rate}: {ever} from the start"
            );
            let measured = flow.rate().unwrap_or(Rate(0)).0;
            assert!(measured.abs_diff(rate) <= rate / 5, "{rate}: measured {measured}");
        }
    }

    #[test]
    fn a_slow_source_is_never_held_back() {
        let mut flow = RelayFlow::new(Duration::from_millis(300));
        for tick in 0..1000 {
            let sent = tick * 100;
            let traffic = Traffic {
                page_bytes: PAGE,
                waiting: if tick % 3 == 0 { 60 } else { 0 },
                whole_came: sent,
                whole_left: sent,
                acknowledged: sent * PAGE,
            };
            flow.moved(TICK * tick as u32, traffic);
            assert!(flow.may_read(), "tick {tick}: {flow:?}");
        }
    }

    #[test]
    fn zero_pages_count_as_what_they_take_on_the_wire_and_pages_that_came_twice_wait_once() {
        let mut flow = RelayFlow::new(Duration::from_millis(300));
        let of = |waiting, whole_came, whole_left| Traffic {
            page_bytes: PAGE,
            waiting,
            whole_came,
            whole_left,
            acknowledged: 0,
        };
        flow.moved(TICK, of(200_000, 0, 0));
        assert!(flow.may_read(), "200,000 zero pages are 3 MiB");
        flow.moved(TICK, of(2000, 2000, 0));
        assert!(!flow.may_read());
        // 500 pages, each written ten times before it was sent.
        flow.moved(TICK, of(500, 7000, 2000));
        assert!(flow.may_read());
        flow.moved(TICK, of(0, 7000, 2500));
        flow.moved(TICK, of(2000, 9000, 2500));
        assert!(!flow.may_read(), "and later ones are counted again: {flow:?}");
    }
}
