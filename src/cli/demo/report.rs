//! What the demo tells: for people, and as JSON whose fields docs/demo-json.md describes.

use std::fmt::Write;

use ramwire::session::SourceReport;
use serde_json::{Value, json};

use super::destination::Verdict;
use crate::cli::render;

/// One run of the demo.
pub(super) struct Run<'a> {
    pub(super) transport: &'static str,
    pub(super) why: &'a str,
    pub(super) dirty_source: &'a str,
    pub(super) report: &'a SourceReport,
    /// Bytes that the guest wrote while the migration ran at its source.
    pub(super) wrote: u64,
    pub(super) arrived: &'a Verdict,
}

impl Run<'_> {
    pub(super) fn json(&self) -> Value {
        let s = &self.report.statistics;
        let ran = (s.total_time - s.downtime).max(1.0) / 1e3;
        json!({
            "guest_bytes_per_s": (self.wrote as f64 / ran) as u64,
            "throttle_percent_most": s.rounds.iter().map(|round| round.throttle_percent).max(),
            "vcpu_rest_percent": s.vcpu_rest_percentage,
            "stalled": s.stalled,
            "deltas": s.deltas,
            "transport": self.transport,
            "why": self.why,
            "verified": self.arrived.verified,
            "rounds": s.round_count(),
            "total_ms": s.total_time,
            "setup_ms": s.setup_time,
            "downtime_ms": s.downtime,
            "downtime_parts": s.downtime_parts,
            "bytes_sent": s.transferred,
            "pages": s.pages,
            "throughput_bytes_per_s": s.throughput,
            "dirty_source": self.dirty_source,
            "digest_compared": self.arrived.digest_compared,
            "pages_checked": self.arrived.pages,
            "pages_wrong": self.arrived.wrong,
            "faults": self.arrived.faults,
            "round_log": s.rounds,
            "batch_latency": s.batch_latency,
            "fence_latency": s.fence_latency,
            "write_latency": s.write_latency,
            "zero_copy": s.zero_copy.clone().unwrap_or_default(),
            "splice": s.splice.clone().unwrap_or_default(),
            "status": s.status,
            "error": s.error.as_ref().or(self.arrived.error.as_ref()),
        })
    }

    pub(super) fn text(&self) -> String {
        let mut out = format!("{}: {}; dirty pages by {}\n", self.transport, self.why, self.dirty_source);
        out.push_str(&render::statistics(&self.report.statistics));
        let Verdict { ran, verified, pages, wrong, faults, .. } = self.arrived;
        // Writing to a string does not fail.
        let _ = match (ran, verified) {
            (true, true) => writeln!(out, "verified: the guest ran on and checked all {pages} pages"),
            (true, false) => writeln!(out, "NOT VERIFIED: {wrong} of {pages} pages are wrong"),
            (false, _) => writeln!(out, "the guest did not run at the destination"),
        };
        for fault in faults {
            let _ = writeln!(out, "  {fault}");
        }
        out
    }
}
