//! The figures as OpenMetrics text; docs/statistics.md lists the names.

use std::fmt::Error;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use ramwire::observe::{LatencySummary, PageWaits, Statistics, Status};

/// The content type that a Prometheus server prefers.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All families, with their end mark.
pub(super) fn text(now: &Statistics) -> Result<String, Error> {
    encoded(Box::new(Figures(now.clone())))
}

/// The families of a collector, with their end mark.
pub(in crate::cli) fn encoded(figures: Box<dyn Collector>) -> Result<String, Error> {
    let mut registry = Registry::with_prefix("ramwire");
    registry.register_collector(figures);
    let mut out = String::new();
    encode(&mut out, &registry)?;
    Ok(out)
}

#[derive(Debug)]
struct Figures(Statistics);

/// Label values and their numbers.
type Parts<T> = [(&'static str, T)];

/// Writes families.
pub(in crate::cli) struct Out<'a>(DescriptorEncoder<'a>);

impl<'a> Out<'a> {
    pub(in crate::cli) fn new(encoder: DescriptorEncoder<'a>) -> Self {
        Self(encoder)
    }

    pub(in crate::cli) fn counter(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        value: u64,
    ) -> Result<(), Error> {
        let mut encoder = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        encoder.encode_counter::<NoLabelSet, _, u64>(&value, None)
    }

    pub(in crate::cli) fn counters(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        parts: &Parts<u64>,
    ) -> Result<(), Error> {
        let mut encoder = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (part, value) in parts {
            encoder.encode_family(&[(label, *part)])?.encode_counter::<NoLabelSet, _, u64>(value, None)?;
        }
        Ok(())
    }

    pub(in crate::cli) fn gauge(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        value: f64,
    ) -> Result<(), Error> {
        let mut encoder = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        encoder.encode_gauge(&value)
    }

    fn gauges(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        label: &str,
        parts: &Parts<f64>,
    ) -> Result<(), Error> {
        let mut encoder = self.0.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        for (part, value) in parts {
            encoder.encode_family(&[(label, *part)])?.encode_gauge(value)?;
        }
        Ok(())
    }

    /// Waits for missing pages, and of each vCPU.
    fn waits(&mut self, waits: &PageWaits) -> Result<(), Error> {
        let seconds = |nanos: u64| nanos as f64 / 1e9;
        let (unit, all) = (Some(Unit::Seconds), waits.all);
        self.counter("page_waits", "Times that a thread waited for a missing page", None, all.count)?;
        let text = "Of all threads together, waiting for missing pages";
        self.gauge("page_waited", text, unit.clone(), seconds(all.total_ns))?;
        let text = "All vCPUs waited for missing pages";
        self.gauge("vcpus_blocked", text, unit.clone(), seconds(waits.all_blocked_ns))?;
        let text = "A vCPU waited for missing pages";
        let mut encoder = self.0.encode_descriptor("vcpu_blocked", text, unit.as_ref(), MetricType::Gauge)?;
        for vcpu in &waits.vcpus {
            encoder.encode_family(&[("vcpu", vcpu.vcpu)])?.encode_gauge(&seconds(vcpu.blocked_ns))?;
        }
        Ok(())
    }

    /// Quantiles as a gauge each: the histograms are kept with more digits than buckets would show.
    fn latency(&mut self, name: &str, help: &str, latency: &LatencySummary) -> Result<(), Error> {
        let LatencySummary { p50_us, p90_us, p99_us, p999_us, max_us, .. } = *latency;
        let parts = [("0.5", p50_us), ("0.9", p90_us), ("0.99", p99_us), ("0.999", p999_us), ("1", max_us)];
        let seconds = parts.map(|(quantile, micros)| (quantile, micros as f64 / 1e6));
        self.gauges(name, help, Some(Unit::Seconds), "quantile", &seconds)
    }
}

fn status(now: Status) -> [(&'static str, f64); 13] {
    [
        ("none", Status::None),
        ("setup", Status::Setup),
        ("active", Status::Active),
        ("pre-switchover", Status::PreSwitchover),
        ("device", Status::Device),
        ("handing-over", Status::HandingOver),
        ("postcopy-active", Status::PostcopyActive),
        ("postcopy-paused", Status::PostcopyPaused),
        ("postcopy-recover", Status::PostcopyRecover),
        ("completed", Status::Completed),
        ("failed", Status::Failed),
        ("cancelled", Status::Cancelled),
        ("in-doubt", Status::InDoubt),
    ]
    .map(|(name, status)| (name, f64::from(u8::from(status == now))))
}

impl Collector for Figures {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let s = &self.0;
        let mut out = Out(encoder);
        let (bytes, seconds) = (Some(Unit::Bytes), Some(Unit::Seconds));
        out.gauges(
            "status",
            "State of the migration: 1 for the current one",
            None,
            "status",
            &status(s.status),
        )?;
        out.counter("transferred", "Written to the peer, or read from it", bytes.clone(), s.transferred)?;
        out.counter("channel", "Of them, on page channels", bytes.clone(), s.multifd_bytes)?;
        out.gauge("remaining", "Dirty and to be sent", bytes.clone(), s.remaining as f64)?;
        out.gauge("ram", "RAM to be migrated", bytes.clone(), s.total as f64)?;
        out.gauge("passed", "RAM passed to the other end as it is", bytes.clone(), s.passed.bytes as f64)?;
        let kinds = [("normal", s.pages.normal), ("zero", s.pages.zero), ("delta", s.pages.delta)];
        out.counters("pages", "Pages sent or received, by kind", "kind", &kinds)?;
        let skipped = [("hint", s.skipped.hinted), ("unplugged", s.skipped.discarded)];
        out.counters("skipped_pages", "Pages left out, by why nobody needs them", "why", &skipped)?;
        out.counter(
            "lost_connections",
            "Connections that were lost and could be replaced",
            None,
            s.lost.count,
        )?;
        out.counter("sent_again", "Pages sent again for them", bytes.clone(), s.lost.bytes_again)?;
        out.counter("rounds", "Rounds that were closed", None, s.round_count().into())?;
        out.counter("dirty_syncs", "Merges of the dirty logs", None, s.dirty_sync_count)?;
        out.gauge("dirty_pages_per_second", "Pages the guest wrote", None, s.dirty_pages_rate as f64)?;
        out.gauge("throughput_bytes_per_second", "On the page path", None, s.throughput as f64)?;
        out.gauge(
            "cpu_throttle_ratio",
            "Share of its time for which the guest is throttled",
            None,
            f64::from(s.throttle_percent) / 100.0,
        )?;
        out.gauge("total", "Since the start", seconds.clone(), s.total_time / 1e3)?;
        out.gauge("setup", "Until the first sync", seconds.clone(), s.setup_time / 1e3)?;
        out.gauge(
            "expected_downtime",
            "What the downtime would be now; NaN before a rate is known",
            seconds.clone(),
            s.expected_downtime.map_or(f64::NAN, |expected| expected / 1e3),
        )?;
        out.gauge("downtime", "Time for which the guest was paused", seconds.clone(), s.downtime / 1e3)?;
        let parts = s.downtime_parts.named().map(|(name, ms)| (name, ms / 1e3));
        out.gauges("downtime_part", "Parts of the downtime", seconds, "part", &parts)?;
        out.latency("batch", "Handing a batch to the transport", &s.batch_latency)?;
        out.latency("fence", "Closing a round", &s.fence_latency)?;
        out.latency("write", "A write to the peer's memory (RDMA)", &s.write_latency)?;
        out.waits(s.page_waits.as_ref().unwrap_or(&PageWaits::default()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use ramwire::observe::{PageCounts, SkippedPages, VcpuWaits};

    #[test]
    fn figures_come_with_units_kinds_and_an_end() {
        let mut now = Statistics::default();
        now.status = Status::Active;
        now.transferred = 12345;
        now.remaining = 4096;
        now.pages = PageCounts { normal: 3, zero: 5, delta: 1 };
        now.skipped = SkippedPages { hinted: 7, discarded: 2 };
        now.downtime = 1.5;
        let mut waits = PageWaits::default();
        waits.all.count = 4;
        waits.vcpus = vec![VcpuWaits { vcpu: 3, blocked_ns: 2_500_000, ..VcpuWaits::default() }];
        now.page_waits = Some(waits);
        let text = text(&now).unwrap();
        for line in [
            "ramwire_page_waits_total 4",
            "ramwire_vcpu_blocked_seconds{vcpu=\"3\"} 0.0025",
            "ramwire_vcpus_blocked_seconds 0.0",
            "# TYPE ramwire_transferred_bytes counter",
            "# UNIT ramwire_transferred_bytes bytes",
            "ramwire_transferred_bytes_total 12345",
            "ramwire_remaining_bytes 4096.0",
            "ramwire_pages_total{kind=\"zero\"} 5",
            "ramwire_skipped_pages_total{why=\"hint\"} 7",
            "ramwire_skipped_pages_total{why=\"unplugged\"} 2",
            "ramwire_status{status=\"active\"} 1.0",
            "ramwire_status{status=\"failed\"} 0.0",
            "ramwire_downtime_seconds 0.0015",
            "ramwire_batch_seconds{quantile=\"0.99\"} 0.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    /// Names in `expr` that begin like ours, each with the labels that stand in its braces.
    fn selectors(expr: &str) -> Vec<(String, Vec<String>)> {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let mut found = Vec::new();
        for (at, _) in expr.match_indices("ramwire_") {
            let name: String = expr[at..].chars().take_while(|c| is_name(*c)).collect();
            let braces = expr[at + name.len()..].strip_prefix('{').and_then(|rest| rest.split('}').next());
            let labels = braces.unwrap_or_default().split(',').filter(|label| !label.is_empty());
            found.push((
                name,
                labels.map(|label| label.chars().take_while(|c| is_name(*c)).collect()).collect(),
            ));
        }
        found
    }

    fn texts<'a>(key: &str, value: &'a serde_json::Value, out: &mut Vec<&'a str>) {
        match value {
            serde_json::Value::Object(fields) => {
                out.extend(fields.get(key).and_then(serde_json::Value::as_str));
                fields.values().for_each(|value| texts(key, value, out));
            }
            serde_json::Value::Array(items) => items.iter().for_each(|value| texts(key, value, out)),
            _ => {}
        }
    }

    /// Every sample that the dashboard shows exists, with the labels that it asks for and names; and it shows every family.
    #[test]
    fn the_dashboard_shows_what_there_is_and_nothing_else() {
        let dashboard = serde_json::from_str(include_str!("../../../docs/grafana.json")).unwrap();
        let mut statistics = Statistics::default();
        let mut waits = PageWaits::default();
        waits.vcpus = vec![VcpuWaits::default()];
        statistics.page_waits = Some(waits);
        let all = text(&statistics).unwrap() + &super::super::super::pager::figures_at_first();
        let samples: Vec<&str> = all.lines().filter(|line| !line.starts_with('#')).collect();
        let (mut shown, mut expressions) = (Vec::new(), Vec::new());
        texts("expr", &dashboard, &mut expressions);
        assert!(expressions.len() > 20, "{}", expressions.len());
        for expr in expressions {
            for (name, labels) in selectors(expr) {
                let sample = samples.iter().find(|sample| sample.split(['{', ' ']).next() == Some(&name));
                let sample =
                    sample.unwrap_or_else(|| panic!("the dashboard shows {name}, which there is not"));
                for label in labels.iter().filter(|label| *label != "instance") {
                    assert!(sample.contains(&format!("{label}=\"")), "{name} has no label {label}");
                }
                shown.push(name);
            }
        }
        for sample in samples {
            let name = sample.split(['{', ' ']).next().unwrap();
            assert!(shown.iter().any(|shown| shown == name), "the dashboard does not show {name}");
        }
    }
}
