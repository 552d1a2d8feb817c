//! The demo's report: for people, and as JSON whose fields docs/demo-json.md describes.

use std::fmt::Write;

use ramwire::observe::Status;
use ramwire::session::SourceReport;
use serde_json::{Value, json};

use super::cuts::Recovery;
use super::destination::{Postcopy, Verdict};
use crate::cli::common::human_bytes;
use crate::cli::render;
use crate::cli::verify::in_json;

/// One run of the demo.
pub(super) struct Run<'a> {
    pub(super) transport: &'static str,
    pub(super) why: &'a str,
    pub(super) dirty_source: &'a str,
    pub(super) report: &'a SourceReport,
    /// Bytes that the guest wrote while the migration ran at its source.
    pub(super) wrote: u64,
    /// Bytes of the source's process in memory, before the migration and after it.
    pub(super) resident: [u64; 2],
    pub(super) arrived: &'a Verdict,
    /// The destination's memory was touched before the guest arrived.
    pub(super) populated: bool,
}

impl Run<'_> {
    pub(super) fn json(&self) -> Value {
        let s = &self.report.statistics;
        let ran = (s.total_time - s.downtime).max(1.0) / 1e3;
        json!({
            "guest_bytes_per_s": (self.wrote as f64 / ran) as u64,
            "throttle_percent_most": s.rounds.iter().map(|round| round.throttle_percent).max().unwrap_or(0),
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
            "lost": s.lost,
            "bytes_sent": s.transferred,
            "pages": s.pages,
            "passed": s.passed,
            "throughput_bytes_per_s": s.throughput,
            "dirty_source": self.dirty_source,
            "digest_compared": self.arrived.digest_compared,
            "memory_check": in_json(self.report.memory_check.as_ref()),
            "pages_checked": self.arrived.pages,
            "pages_wrong": self.arrived.wrong,
            "faults": self.arrived.faults,
            "round_log": s.rounds,
            "batch_latency": s.batch_latency,
            "fence_latency": s.fence_latency,
            "write_latency": s.write_latency,
            "zero_copy": s.zero_copy.clone().unwrap_or_default(),
            "splice": s.splice.clone().unwrap_or_default(),
            "postcopy": self.postcopy(),
            "status": s.status,
            "error": s.error.as_ref().or(self.arrived.error.as_ref()),
        })
    }

    /// Zeros where the guest moved whole.
    fn postcopy(&self) -> Value {
        let came = self.arrived.postcopy.clone().unwrap_or_default();
        json!({
            "switched": self.arrived.postcopy.is_some(),
            "time_to_run_ms": came.time_to_run_ms,
            "all_came_ms": came.all_came_ms,
            "faults": came.faults,
            "requests": came.requests,
            "fault_latency": came.fault_latency,
            "vcpu_blocked_ms": came.vcpu_blocked_ms,
            "all_blocked_ms": came.all_blocked_ms,
            "bytes": self.report.statistics.postcopy_bytes,
            "pages_read": self.arrived.pages_read,
            "recoveries": came.recoveries,
            "released_pages": self.report.released_pages,
            "resident_before": self.resident[0],
            "resident_after": self.resident[1],
        })
    }

    /// The most important figures first, then the parts.
    pub(super) fn text(&self) -> String {
        let mut out = String::new();
        let s = &self.report.statistics;
        let pages = s.pages.normal + s.pages.zero + s.pages.delta;
        if s.passed.blocks > 0 {
            let passed = human_bytes(s.passed.bytes);
            let _ = writeln!(out, "passed {passed} of guest memory as it is; {pages} pages were sent");
        }
        // The check goes through all of RAM at both ends and moves nothing: the destination's part is in `ready`, beside
        // which loading this guest's devices is nothing.
        let parts = &s.downtime_parts;
        let check = if parts.digest_ms > 0.0 { parts.digest_ms + parts.ready_ms } else { 0.0 };
        let moving = (s.total_time - s.setup_time - check).max(1.0) / 1e3;
        let a_second = |count: u64| (count as f64 / moving) as u64;
        // Writing to a string does not fail.
        if s.passed.blocks == 0 {
            let _ = writeln!(
                out,
                "moved {} of guest memory in {moving:.2} s: {} pages/s, {}/s; {}",
                human_bytes(pages * s.page_size),
                a_second(pages),
                human_bytes(a_second(pages * s.page_size)),
                if self.populated {
                    "the destination had its memory before"
                } else {
                    "the destination's kernel made its memory meanwhile (--populate: before)"
                },
            );
        }
        let _ = match s.status == Status::Completed {
            true if check > 0.0 => writeln!(
                out,
                "the guest was paused for {:.1} ms: {:.1} ms to switch over, {check:.1} ms to check all of RAM \
                at both \
                 ends (--verify fast: not)",
                s.downtime,
                s.downtime - check,
            ),
            true => writeln!(out, "the guest was paused for {:.1} ms", s.downtime),
            false => Ok(()),
        };
        let _ = writeln!(out, "by {}: {}; dirty pages by {}", self.transport, self.why, self.dirty_source);
        out.push_str(&render::statistics(s));
        let Verdict { ran, verified, pages, wrong, faults, .. } = self.arrived;
        if let Some(came) = &self.arrived.postcopy {
            let Postcopy { time_to_run_ms, all_came_ms, faults, requests, fault_latency, .. } = came;
            let (recoveries, all_blocked_ms) = (&came.recoveries, came.all_blocked_ms);
            let most = came.vcpu_blocked_ms.iter().copied().fold(0.0, f64::max);
            let read = self.arrived.pages_read;
            let _ = writeln!(
                out,
                "postcopy: it ran there {time_to_run_ms:.1} ms after its device state had come, and all of its memory was there \
                 {all_came_ms:.1} ms later"
            );
            let _ = writeln!(
                out,
                "{faults} faults of missing pages, {requests} requests; its threads read {read} pages while it ran"
            );
            let _ = writeln!(out, "fault  {}", render::latency(fault_latency));
            let _ = writeln!(
                out,
                "a thread waited for pages for {most:.1} ms at most, all of them at once for {all_blocked_ms:.1} ms"
            );
            if self.report.released_pages > 0 {
                let [before, after] = self.resident.map(human_bytes);
                let released = self.report.released_pages;
                let _ = writeln!(
                    out,
                    "{released} pages given back at the source: {before} in memory before, {after} after"
                );
            }
            for (number, Recovery { pages_there, took_ms }) in (1..).zip(recoveries) {
                let _ = writeln!(
                    out,
                    "cut {number}: the connection was lost when {pages_there} pages were there, and pages came again \
                     {took_ms:.1} ms later"
                );
            }
        }
        let _ = match (ran, verified) {
            (true, true) => writeln!(out, "verified: the guest ran on and checked all {pages} pages"),
            (true, false) => writeln!(out, "NOT VERIFIED: {wrong} of {pages} pages are wrong"),
            (false, _) => writeln!(out, "the guest did not run at the destination"),
        };
        if let Some(check) = &self.report.memory_check {
            let _ = writeln!(out, "{check}");
        }
        for fault in faults {
            let _ = writeln!(out, "  {fault}");
        }
        out
    }
}
