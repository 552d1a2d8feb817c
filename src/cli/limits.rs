//! Options of every command that sends a guest: its downtime, its bandwidth, the cache of sent pages.

use std::time::Duration;

use ramwire::observe::RunDescription;
use ramwire::session::SourceSettings;
use ramwire::units::Rate;

use super::common::bytes;
use super::qmp::Plan;

/// What a migration may take.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct LimitArgs {
    /// Longest time for which the guest may be paused, in milliseconds
    #[arg(long, value_name = "MS", default_value = "300")]
    downtime_ms: u64,
    /// Maximum bytes a second while the guest runs, for instance 125M; 0 is no limit
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = bytes)]
    max_bandwidth: u64,
    /// Send changed pages as differences (XBZRLE) to copies kept in this much memory, for instance 64M; 0: never
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = bytes)]
    xbzrle_cache_size: u64,
}

impl LimitArgs {
    /// Bytes of the cache of sent pages; 0 without differences.
    pub(super) fn delta_cache(&self) -> u64 {
        self.xbzrle_cache_size
    }

    pub(super) fn apply(&self, settings: &mut SourceSettings) {
        settings.downtime_limit = Duration::from_millis(self.downtime_ms);
        settings.max_bandwidth = Rate::limit(self.max_bandwidth);
    }

    /// Under QEMU's names.
    pub(super) fn plan(&self, plan: Plan) -> Plan {
        let plan = plan.with("max-bandwidth", self.max_bandwidth).with("downtime-limit", self.downtime_ms);
        match self.xbzrle_cache_size {
            0 => plan,
            size => plan.having("xbzrle", true).with("xbzrle-cache-size", size),
        }
    }

    /// As a client of the monitor has planned it.
    pub(super) fn follow(&mut self, plan: &Plan) {
        self.max_bandwidth = plan.number("max-bandwidth");
        self.downtime_ms = plan.number("downtime-limit");
        self.xbzrle_cache_size = if plan.has("xbzrle") { plan.number("xbzrle-cache-size") } else { 0 };
    }

    /// Into the first line of a log.
    pub(super) fn describe(&self, run: RunDescription) -> RunDescription {
        run.with("downtime_ms", self.downtime_ms)
            .with("max_bandwidth", self.max_bandwidth)
            .with("xbzrle_cache_size", self.xbzrle_cache_size)
    }
}
