//! Reports for people.

use std::fmt::Write;

use ramwire::observe::{LatencySummary, SpliceCounts, Statistics, ZeroCopyCounts};

use super::common::human_bytes;

/// A few lines about a migration: rounds, rate, downtime and its parts, latencies.
pub(super) fn statistics(now: &Statistics) -> String {
    let mut out = String::new();
    let parts = &now.downtime_parts;
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "{} in {:.0} ms: {} sent at {}/s, {} pages whole, {} zero",
        match now.round_count() {
            // The guest ran at the destination at once.
            0 => "no round".to_owned(),
            1 => "1 round".to_owned(),
            rounds => format!("{rounds} rounds"),
        },
        now.total_time,
        human_bytes(now.transferred),
        human_bytes(now.throughput),
        now.pages.normal,
        now.pages.zero,
    );
    let scan = if parts.scan_ms > 0.0 { format!("scan {:.1} + ", parts.scan_ms) } else { String::new() };
    let _ = writeln!(
        out,
        "downtime {:.1} ms = {scan}pause {:.1} + hold {:.1} + sync {:.1} + pages {:.1} + state {:.1} + digest {:.1} + ready {:.1} \
         + handover {:.1}",
        now.downtime,
        parts.pause_ms,
        parts.hold_ms,
        parts.sync_ms,
        parts.pages_ms,
        parts.state_ms,
        parts.digest_ms,
        parts.ready_ms,
        parts.handover_ms,
    );
    if now.lost.count > 0 {
        let _ = writeln!(
            out,
            "{} lost connections were replaced, or were to be; {} of pages ({} pages) went again for them",
            now.lost.count,
            human_bytes(now.lost.bytes_again),
            now.lost.pages_again,
        );
        for lost in &now.lost.last {
            let then =
                lost.took_ms.map_or("not replaced".into(), |took| format!("replaced {took:.0} ms later"));
            let _ = writeln!(out, "  at {:.0} ms, round {}: {}; {then}", lost.at_ms, lost.round, lost.why);
        }
    }
    let share = now.rounds.iter().map(|round| round.throttle_percent).max().unwrap_or(0);
    let rest = now.vcpu_rest_percentage;
    if share > 0 {
        let _ = writeln!(out, "slowed down: {share} % of all vCPUs' time was taken at most");
    }
    if rest > 0 {
        let _ = writeln!(out, "slowed down: a vCPU rested {rest} % of the time that it ran at the end");
    }
    if now.deltas.cache_size > 0 {
        let deltas = &now.deltas;
        let _ = writeln!(
            out,
            "{} pages as differences in {}, {} unchanged, {} too different, {} not in the cache of {}",
            deltas.pages,
            human_bytes(deltas.bytes),
            deltas.unchanged,
            deltas.overflows,
            deltas.cache_misses,
            human_bytes(deltas.cache_size),
        );
    }
    let _ = writeln!(out, "batch  {}", latency(&now.batch_latency));
    let _ = writeln!(out, "fence  {}", latency(&now.fence_latency));
    if now.write_latency.count > 0 {
        let _ = writeln!(out, "write  {}", latency(&now.write_latency));
    }
    if let Some(zero_copy) = &now.zero_copy {
        let ZeroCopyCounts { sends, released, copied, forbidden, off } = zero_copy;
        let _ = write!(
            out,
            "zero copy: {sends} sends, {released} released, {copied} of them copied by the kernel anyway, \
             {forbidden} not allowed"
        );
        let _ = match off {
            None => writeln!(out),
            Some(why) => writeln!(out, "; turned off: {why}"),
        };
    }
    if let Some(SpliceCounts { bytes, copied, off }) = &now.splice {
        let _ = write!(out, "by reference: {} of pages", human_bytes(*bytes));
        let _ = if *copied > 0 { write!(out, ", {} copied anyway", human_bytes(*copied)) } else { Ok(()) };
        let _ = match off {
            None => writeln!(out),
            Some(why) => writeln!(out, "; turned off: {why}"),
        };
    }
    out
}

/// A histogram's figures.
pub(super) fn latency(summary: &LatencySummary) -> String {
    let LatencySummary { count, p50_us, p99_us, max_us, .. } = summary;
    format!("{count:>7}   p50 <= {p50_us} us   p99 <= {p99_us} us   max {max_us} us")
}
