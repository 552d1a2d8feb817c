//! How fast pages are sent, measured only over time in which something was sent.

use std::time::Duration;

use crate::units::Rate;

/// Shortest time a rate is measured over; the seed's window.
const WINDOW: Duration = Duration::from_millis(100);

/// What was passed to the connection: guest memory by its own length, and all bytes on the wire. Compressed pages and
/// differences take fewer bytes on the wire; headers and device state are not guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes of the sent pages, without zero pages.
    pub guest: u64,
    /// Bytes on the wire.
    pub wire: u64,
}

/// Rates of the bytes that have left this host, a window at a time, so that one slow call does not decide a switchover.
/// Many short rounds make a window as one long round does: no sample is dropped, otherwise short rounds would never
/// correct an outdated rate.
///
/// Bytes in a socket's buffer have not left: they count when they do.
#[derive(Debug, Default)]
pub struct RateWindow {
    /// The time up to which the window was counted, while sending continues or the link is busy.
    counted: Option<Duration>,
    took: Duration,
    sent: Sent,
    left: u64,
    unacknowledged: u64,
    guest: Option<Rate>,
    wire: Option<Rate>,
    whole: bool,
}

impl RateWindow {
    /// A round begins, with `unacknowledged` bytes that were sent but have not left this host. If there are some, the link
    /// has been busy since the last round, and that time counts.
    pub fn resume(&mut self, unacknowledged: u64, now: Duration) {
        match self.counted {
            Some(counted) if unacknowledged > 0 => {
                self.took += now.saturating_sub(counted);
                self.left += self.unacknowledged.saturating_sub(unacknowledged);
            }
            _ => {}
        }
        (self.counted, self.unacknowledged) = (Some(now), unacknowledged);
    }

    /// By `now` a further `sent` was sent; `unacknowledged` of all sent bytes have not left this host yet.
    pub fn add(&mut self, sent: Sent, unacknowledged: u64, now: Duration) {
        let counted = self.counted.replace(now).unwrap_or(now);
        self.took += now.saturating_sub(counted);
        self.sent.guest += sent.guest;
        self.sent.wire += sent.wire;
        self.left += (sent.wire + self.unacknowledged).saturating_sub(unacknowledged);
        self.unacknowledged = unacknowledged;
        let is_whole = self.took >= WINDOW;
        // A shorter time is used only while there is no better measurement.
        if is_whole || !self.whole {
            self.measure();
        }
        if is_whole {
            self.whole = true;
            (self.took, self.sent, self.left) = (Duration::ZERO, Sent::default(), 0);
        }
    }

    /// If all bytes left between the rounds, the link is faster than the sending.
    fn measure(&mut self) {
        let Sent { guest, wire } = self.sent;
        let left = if self.left > 0 { self.left } else { wire };
        let scaled = u128::from(guest) * u128::from(left) / u128::from(wire.max(1));
        let rate = |bytes: u64| Rate::of(bytes, self.took).filter(|rate| rate.0 > 0);
        let guest = rate(u64::try_from(scaled).unwrap_or(u64::MAX)).or(self.guest);
        (self.wire, self.guest) = (rate(left).or(self.wire), guest);
    }

    /// Rate of the pages, by their own length; `None` before one was sent.
    pub fn guest(&self) -> Option<Rate> {
        self.guest
    }

    /// Rate of the bytes on the wire; `None` before any was sent.
    pub fn wire(&self) -> Option<Rate> {
        self.wire
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(time: u64) -> Duration {
        Duration::from_millis(time)
    }

    fn pages(bytes: u64) -> Sent {
        Sent { guest: bytes, wire: bytes }
    }

    #[test]
    fn a_rate_needs_a_window_and_idle_time_does_not_count() {
        let mut window = RateWindow::default();
        assert_eq!((window.guest(), window.wire()), (None, None));
        window.resume(0, ms(0));
        window.add(pages(1000), 0, ms(10));
        assert_eq!(window.wire(), Some(Rate(100_000)), "better than nothing");
        window.resume(0, ms(1000));
        window.add(pages(500), 0, ms(1990));
        assert_eq!(window.wire(), Some(Rate(1500)));
        window.resume(0, ms(5000));
        window.add(pages(100), 0, ms(5010));
        assert_eq!(window.wire(), Some(Rate(1500)), "10 ms do not replace a whole window");
    }

    /// Otherwise the rate of a moment under load would be kept for ever.
    #[test]
    fn short_rounds_come_to_a_window() {
        let mut window = RateWindow::default();
        window.resume(0, ms(0));
        window.add(pages(1000), 0, ms(1000));
        for round in 0..100 {
            window.resume(0, ms(2000 + 2 * round));
            window.add(pages(1000), 0, ms(2001 + 2 * round));
        }
        assert_eq!((window.guest(), window.wire()), (Some(Rate(1_000_000)), Some(Rate(1_000_000))));
    }

    #[test]
    fn pages_that_compress_are_counted_by_their_length() {
        let mut window = RateWindow::default();
        window.resume(0, ms(0));
        window.add(Sent { guest: 100_000, wire: 1000 }, 0, ms(100));
        assert_eq!((window.guest(), window.wire()), (Some(Rate(1_000_000)), Some(Rate(10_000))));
        // Headers alone are no measurement of pages.
        window.resume(0, ms(100));
        window.add(Sent { guest: 0, wire: 100 }, 0, ms(1100));
        assert_eq!((window.guest(), window.wire()), (Some(Rate(1_000_000)), Some(Rate(100))));
    }

    /// A link of 1000 bytes a millisecond after a buffer that takes 4000 at once.
    #[test]
    fn what_a_buffer_takes_has_not_left() {
        let mut window = RateWindow::default();
        let mut queue = 0;
        for round in 0..200 {
            window.resume(queue, ms(4 * round));
            queue += 4000;
            window.add(pages(4000), queue, ms(4 * round));
            queue -= 3999;
        }
        let rate = window.guest().map_or(0, |rate| rate.0);
        assert!((950_000..=1_050_000).contains(&rate), "{rate}");
    }

    /// All bytes of each round leave before the next round: a rate is known nevertheless.
    #[test]
    fn a_link_that_is_always_done_in_between_has_a_rate() {
        let mut window = RateWindow::default();
        for round in 0..200 {
            window.resume(0, ms(4 * round));
            window.add(pages(4000), 4000, ms(4 * round + 1));
        }
        assert_eq!(window.guest(), Some(Rate(4_000_000)));
    }
}
