//! The figures in the format of QEMU's `query-migrate`; docs/statistics.md describes where each is counted.

use serde_json::{Value, json};

use super::{DeltaCounts, PageWaits, Statistics, Status, VcpuWaits};

impl Statistics {
    /// The same figures in the format of QEMU's `query-migrate`: its names, its JSON types, its units.
    pub fn query_migrate(&self) -> Value {
        // QEMU has no name of its own for this state.
        let status = if self.status == Status::HandingOver { Status::Device } else { self.status };
        let mut out = json!({
            "status": status,
            "total-time": self.total_time as u64,
            "setup-time": self.setup_time as u64,
            "ram": self.ram(),
        });
        if self.deltas.cache_size > 0 {
            out["xbzrle-cache"] = self.xbzrle();
        }
        let stood_still = [Status::Completed, Status::HandingOver, Status::PostcopyActive, Status::InDoubt];
        if stood_still.contains(&self.status) {
            out["downtime"] = json!(self.downtime as u64);
        } else if let Some(expected) = self.expected_downtime {
            out["expected-downtime"] = json!(expected as u64);
        }
        if self.throttle_percent > 0 {
            out["cpu-throttle-percentage"] = json!(self.throttle_percent);
        }
        if let Some(waits) = &self.page_waits {
            Self::blocktime(waits, &mut out);
        }
        if let Some(error) = &self.error {
            out["error-desc"] = json!(error);
        }
        out
    }

    /// What QEMU's destination tells with postcopy-blocktime: milliseconds that vCPUs were blocked, and nanoseconds
    /// that faults took.
    fn blocktime(waits: &PageWaits, out: &mut Value) {
        out["postcopy-latency"] = json!(waits.all.mean_ns());
        out["postcopy-latency-dist"] = json!(waits.distribution);
        out["postcopy-non-vcpu-latency"] = json!(waits.others.mean_ns());
        if waits.vcpus.is_empty() {
            return;
        }
        let each = |value: fn(&VcpuWaits) -> u64| json!(waits.vcpus.iter().map(value).collect::<Vec<_>>());
        out["postcopy-blocktime"] = json!(waits.all_blocked_ns / 1_000_000);
        out["postcopy-vcpu-blocktime"] = each(|vcpu| vcpu.blocked_ns / 1_000_000);
        out["postcopy-vcpu-latency"] = each(|vcpu| vcpu.waits.mean_ns());
    }

    fn ram(&self) -> Value {
        json!({
            "transferred": self.transferred,
            "remaining": self.remaining,
            "total": self.total,
            "duplicate": self.pages.zero,
            "normal": self.pages.normal,
            "normal-bytes": self.pages.normal * self.page_size,
            "dirty-pages-rate": self.dirty_pages_rate,
            "mbps": self.throughput as f64 * 8.0 / 1e6,
            "dirty-sync-count": self.dirty_sync_count,
            "dirty-sync-missed-zero-copy": self.missed_zero_copy,
            "page-size": self.page_size,
            "pages-per-second": self.pages_per_second,
            "precopy-bytes": self.precopy_bytes,
            "downtime-bytes": self.downtime_bytes,
            "postcopy-bytes": self.postcopy_bytes,
            "postcopy-requests": self.postcopy_requests,
            "multifd-bytes": self.multifd_bytes,
        })
    }

    /// `xbzrle-cache`: QEMU counts every page that was found in the cache, whatever was sent for it. Rates of the last
    /// period.
    fn xbzrle(&self) -> Value {
        let DeltaCounts { cache_size, bytes, cache_misses, overflows, .. } = self.deltas;
        json!({
            "cache-size": cache_size,
            "pages": self.deltas.hits(),
            "bytes": bytes,
            "cache-miss": cache_misses,
            "cache-miss-rate": self.delta_rates.cache_miss,
            "encoding-rate": self.delta_rates.encoding,
            "overflow": overflows,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::PageCounts;
    use super::*;

    #[test]
    fn a_snapshot_has_the_fields_of_query_migrate() {
        let mut statistics = Statistics {
            status: Status::Completed,
            pages: PageCounts { normal: 3, zero: 5, delta: 0 },
            page_size: 4096,
            downtime: 12.7,
            ..Statistics::default()
        };
        let out = statistics.query_migrate();
        assert_eq!(out["status"], "completed");
        assert_eq!(out["ram"]["normal-bytes"], 3 * 4096);
        assert_eq!(out["ram"]["duplicate"], 5);
        assert_eq!(out["downtime"], 12);
        for absent in ["xbzrle-cache", "expected-downtime", "error-desc", "cpu-throttle-percentage"] {
            assert!(out.get(absent).is_none(), "{absent}");
        }
        statistics.throttle_percent = 20;
        assert_eq!(statistics.query_migrate()["cpu-throttle-percentage"], 20);
    }

    #[test]
    fn waits_for_missing_pages_have_qemus_names_and_units() {
        let mut waits = PageWaits::default();
        waits.add(std::time::Duration::from_micros(5));
        waits.others.add(std::time::Duration::from_micros(3));
        waits.all_blocked_ns = 2_900_000;
        let mut statistics = Statistics { page_waits: Some(waits.clone()), ..Statistics::default() };
        let out = statistics.query_migrate();
        assert_eq!(
            (&out["postcopy-latency"], &out["postcopy-non-vcpu-latency"]),
            (&json!(5000), &json!(3000))
        );
        assert_eq!(out["postcopy-latency-dist"].as_array().map(Vec::len), Some(24));
        assert_eq!(out["postcopy-latency-dist"][2], 1);
        for absent in ["postcopy-blocktime", "postcopy-vcpu-blocktime", "postcopy-vcpu-latency"] {
            assert!(out.get(absent).is_none(), "{absent}: no vCPU is known");
        }
        let sum = super::super::WaitSum { count: 2, total_ns: 3000 };
        waits.vcpus = vec![VcpuWaits { vcpu: 0, waits: sum, blocked_ns: 7_100_000 }, VcpuWaits::default()];
        statistics.page_waits = Some(waits);
        let out = statistics.query_migrate();
        assert_eq!(
            (&out["postcopy-blocktime"], &out["postcopy-vcpu-blocktime"]),
            (&json!(2), &json!([7, 0]))
        );
        assert_eq!(out["postcopy-vcpu-latency"], json!([1500, 0]));
    }

    #[test]
    fn deltas_are_counted_as_qemu_counts_them() {
        let deltas = DeltaCounts {
            cache_size: 1 << 20,
            pages: 4,
            bytes: 4 * 1003 + 2 * 4096,
            unchanged: 1,
            cache_misses: 3,
            overflows: 2,
        };
        let delta_rates = deltas.rates_since(&DeltaCounts::default(), 10, 4096);
        let statistics = Statistics { deltas, delta_rates, page_size: 4096, ..Statistics::default() };
        let cache = &statistics.query_migrate()["xbzrle-cache"];
        assert_eq!((&cache["pages"], &cache["bytes"]), (&json!(7), &json!(4 * 1003 + 2 * 4096)));
        assert_eq!((&cache["cache-miss-rate"], &cache["overflow"]), (&json!(0.3), &json!(2)));
        assert_eq!(cache["encoding-rate"], json!(7.0 * 4096.0 / 12204.0));
    }
}
