//! How fast pages leave, measured over windows.

use std::time::Duration;

use crate::units::Rate;

/// Shortest time a rate is measured over; the seed's window.
const WINDOW: Duration = Duration::from_millis(100);

/// Bytes over time, taken a window at a time, so that one slow call does not decide a switchover.
#[derive(Debug, Default)]
pub struct RateWindow {
    started: Option<Duration>,
    bytes: u64,
    last: Option<Rate>,
}

impl RateWindow {
    /// Time without sending (a sync, a pause) is not counted: the window begins anew.
    pub fn restart(&mut self, now: Duration) {
        if self.bytes > 0 {
            self.close(now);
        }
        self.started = Some(now);
        self.bytes = 0;
    }

    /// `bytes` more have left by `now`.
    pub fn add(&mut self, bytes: u64, now: Duration) {
        let started = *self.started.get_or_insert(now);
        self.bytes += bytes;
        if now.saturating_sub(started) >= WINDOW {
            self.close(now);
            self.started = Some(now);
            self.bytes = 0;
        }
    }

    /// The rate of the last window; `None` before anything was sent.
    pub fn rate(&self) -> Option<Rate> {
        self.last
    }

    /// A window shorter than [`WINDOW`] counts only while there is no better one: buffers swallow it whole.
    fn close(&mut self, now: Duration) {
        let took = now.saturating_sub(self.started.unwrap_or(now));
        if took >= WINDOW || self.last.is_none() {
            self.last = Rate::of(self.bytes, took).or(self.last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_needs_a_window_and_idle_time_does_not_count() {
        let ms = Duration::from_millis;
        let mut window = RateWindow::default();
        assert_eq!(window.rate(), None);
        window.restart(ms(0));
        window.add(1000, ms(10));
        window.restart(ms(20));
        assert_eq!(window.rate(), Some(Rate(50_000)), "better than nothing");
        window.add(500, ms(1000 + 20));
        assert_eq!(window.rate(), Some(Rate(500)));
        window.restart(ms(5000));
        window.add(100, ms(5010));
        window.restart(ms(5020));
        assert_eq!(window.rate(), Some(Rate(500)), "10 ms do not replace a whole window");
    }
}
