//! Estimate of the guest's downtime.

use std::time::Duration;

use super::SourceEngine;
use crate::engine::{PageCost, RateWindow};
use crate::units::Rate;

/// Measurements of the path that pages take.
#[derive(Debug, Default)]
pub(super) struct PagePath {
    pub(super) rate: RateWindow,
    pub(super) page_cost: PageCost,
    /// Pages are sent as differences: a dirty page need not take its whole length.
    pub(super) deltas: bool,
    /// Bytes that were sent but have not left this host.
    pub(super) unacknowledged: u64,
}

impl SourceEngine {
    /// Expected downtime if the guest were paused with `dirty_pages`; `None` before a rate is known.
    pub fn expected_downtime(&self, dirty_pages: u64) -> Option<Duration> {
        self.downtime_after(self.path.unacknowledged, dirty_pages)
    }

    pub(super) fn downtime_after(&self, unacknowledged: u64, dirty_pages: u64) -> Option<Duration> {
        let pages = self.time_of_pages(dirty_pages)?;
        let waiting =
            if unacknowledged > 0 { self.wire_rate()?.time_for(unacknowledged)? } else { Duration::ZERO };
        Some(self.unavoidable().saturating_add(pages).saturating_add(waiting))
    }

    /// Pages count by their own length, and so does their rate, which includes their compression. Differences count by
    /// the bytes they took on the wire.
    fn time_of_pages(&self, dirty_pages: u64) -> Option<Duration> {
        let page = self.config.page_bytes;
        match dirty_pages {
            0 => Some(Duration::ZERO),
            _ if self.path.deltas => self.wire_rate()?.time_for(self.path.page_cost.bytes(dirty_pages, page)),
            _ => {
                let rate = self.config.switchover_rate.or(self.path.rate.guest()).or(self.path.rate.wire());
                rate?.time_for(dirty_pages.saturating_mul(page))
            }
        }
    }

    /// The part that no round shortens: the fixed part, and the device state at the rate of the wire. Device state is
    /// not compressed, so with compressed pages this may be too long, but never too short.
    fn unavoidable(&self) -> Duration {
        let state = self.config.state_bytes;
        let state = self.wire_rate().filter(|_| state > 0).and_then(|rate| rate.time_for(state));
        self.config.fixed_downtime.saturating_add(state.unwrap_or_default())
    }

    fn wire_rate(&self) -> Option<Rate> {
        self.config.switchover_rate.or(self.path.rate.wire())
    }

    /// True if a pause now would keep the limit. Before the first round nothing has been sent, so the result is false.
    ///
    /// If the part that no round shortens (the fixed part, the device state) exceeds the limit alone, more rounds do
    /// not help. A tenth of the limit is then left for pages, and the report contains by how much the limit was missed.
    pub(super) fn fits(&self, downtime: Option<Duration>) -> bool {
        let limit = self.config.downtime_limit;
        let limit = limit.max(self.unavoidable().saturating_add(limit / 10));
        self.round.number > 0 && downtime.is_some_and(|expected| expected <= limit)
    }
}
