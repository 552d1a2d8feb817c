//! Rates that are measured over a time: the guest's writes, the sent bytes, the savings of deltas.

use std::time::Duration;

use crate::observe::{DeltaCounts, DeltaRates};

/// Shortest time over which the rates of deltas are measured.
const PERIOD: Duration = Duration::from_secs(1);

/// Shortest time over which pages a second are counted, as in QEMU.
const WINDOW: Duration = Duration::from_millis(100);

/// The rates of a migration.
#[derive(Default)]
pub(super) struct Rates {
    written: Written,
    sent: Window,
    deltas: Period,
}

/// Pages that the guest writes.
#[derive(Default)]
struct Written {
    last_sync: Option<Duration>,
    /// Pages found dirty since then.
    fresh: u64,
    known: bool,
}

/// Where the period of the delta rates began.
#[derive(Default)]
struct Period {
    began: Duration,
    deltas: DeltaCounts,
    pages: u64,
}

/// Pages of every kind that were sent, a window at a time.
#[derive(Default)]
struct Window {
    began: Option<(Duration, u64)>,
    any: bool,
}

impl Rates {
    /// A sync found `fresh` more pages: returns the pages a second that the guest wrote, if enough time has passed.
    /// Between the two syncs around the pause there are only microseconds. A shorter time is used only while there is
    /// no better measurement.
    pub(super) fn written(&mut self, now: Duration, fresh: u64) -> Option<u64> {
        let written = &mut self.written;
        let Some(last) = written.last_sync else {
            written.last_sync = Some(now);
            return None;
        };
        written.fresh += fresh;
        let took = now.saturating_sub(last);
        if took.is_zero() || (took < WINDOW && written.known) {
            return None;
        }
        written.known = true;
        written.last_sync = Some(now);
        Some((std::mem::take(&mut written.fresh) as f64 / took.as_secs_f64()) as u64)
    }

    /// `pages` were sent by now. Returns the rate of the window that ends now, if one does; the first window ends at
    /// the first call.
    pub(super) fn sent(&mut self, now: Duration, pages: u64) -> Option<u64> {
        let window = &mut self.sent;
        let (since, before) = *window.began.get_or_insert((now, 0));
        let took = now.saturating_sub(since);
        if took.is_zero() || (took < WINDOW && window.any) {
            return None;
        }
        (window.began, window.any) = (Some((now, pages)), true);
        Some((pages.saturating_sub(before) as f64 / took.as_secs_f64()) as u64)
    }

    /// The savings of deltas, if a period is over; `pages` of `page_bytes` were checked by now.
    pub(super) fn deltas(
        &mut self,
        now: Duration,
        deltas: DeltaCounts,
        pages: u64,
        page_bytes: u64,
    ) -> Option<DeltaRates> {
        if deltas.cache_size == 0 || now.saturating_sub(self.deltas.began) < PERIOD {
            return None;
        }
        let rates = deltas.rates_since(&self.deltas.deltas, pages - self.deltas.pages, page_bytes);
        self.deltas = Period { began: now, deltas, pages };
        Some(rates)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(time: u64) -> Duration {
        Duration::from_millis(time)
    }

    #[test]
    fn what_the_guest_writes_is_counted_from_sync_to_sync() {
        let mut rates = Rates::default();
        assert_eq!(rates.written(ms(0), 1000), None, "the first sync finds what there is");
        assert_eq!(rates.written(ms(50), 5), Some(100), "a short time counts while there is no better");
        assert_eq!(rates.written(ms(51), 5), None);
        assert_eq!(rates.written(ms(150), 15), Some(200), "with what the short time found");
        assert_eq!(rates.written(ms(150), 9), None, "no time, no rate");
    }

    #[test]
    fn what_is_sent_is_counted_in_windows() {
        let mut rates = Rates::default();
        assert_eq!(rates.sent(ms(0), 0), None);
        assert_eq!(rates.sent(ms(10), 10), Some(1000));
        assert_eq!(rates.sent(ms(100), 500), None, "within the window");
        assert_eq!(rates.sent(ms(110), 510), Some(5000));
    }

    #[test]
    fn deltas_have_rates_only_where_there_is_a_cache_and_a_period_is_over() {
        let mut rates = Rates::default();
        let none = DeltaCounts::default();
        let some = DeltaCounts { cache_size: 1 << 20, ..none };
        assert!(rates.deltas(ms(5000), none, 7, 4096).is_none());
        assert!(rates.deltas(ms(5000), some, 7, 4096).is_some());
        assert!(rates.deltas(ms(5999), some, 9, 4096).is_none());
        assert!(rates.deltas(ms(6000), some, 9, 4096).is_some());
    }
}
