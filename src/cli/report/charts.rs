//! The charts of a report: each is drawn twice, for a wide and a narrow page, in the page's own colours.

use super::read::Run;
use crate::cli::plot::{Axis, Canvas, Line, PlotError, bars_across, groups, lines_on, plain, themed};

/// Maximum number of points of a line: more than a screen has columns.
const MAX_POINTS: usize = 1200;

/// Rounds that are drawn, the first and the last ones; the file has all of them.
const FIRST_ROUNDS: usize = 15;
const LAST_ROUNDS: usize = 25;

/// Heights of a chart on a wide and on a narrow page; the widths are those of the pages.
const WIDE: u32 = 1040;
const NARROW: u32 = 372;

/// One picture in both sizes.
pub(super) struct Picture {
    pub(super) title: &'static str,
    /// The meaning of the colours, in their order; empty for one colour.
    pub(super) legend: Vec<&'static str>,
    /// A sentence that describes the chart.
    pub(super) says: String,
    pub(super) wide: String,
    pub(super) narrow: String,
}

fn axis(label: &str) -> Axis<'_> {
    Axis { label, logarithmic: false, tick: plain }
}

/// 1500000 as 1.5 M, for ticks.
fn short(value: f64) -> String {
    let (unit, name) = match value.abs() {
        size if size >= 1e12 => (1e12, " T"),
        size if size >= 1e9 => (1e9, " G"),
        size if size >= 1e6 => (1e6, " M"),
        size if size >= 1e3 => (1e3, " k"),
        _ => (1.0, ""),
    };
    format!("{}{name}", plain(value / unit))
}

fn micros(value: f64) -> String {
    match value {
        size if size >= 1e6 => format!("{} s", plain(value / 1e6)),
        size if size >= 1e3 => format!("{} ms", plain(value / 1e3)),
        _ => format!("{} µs", plain(value)),
    }
}

/// Draws for both widths, with these heights.
fn both(
    heights: (u32, u32),
    canvas: &Canvas,
    draw: impl Fn(&Canvas) -> Result<String, PlotError>,
) -> Result<(String, String), PlotError> {
    let on = |size| Ok(themed(&draw(&Canvas { size, ..canvas.clone() })?));
    Ok((on((WIDE, heights.0))?, on((NARROW, heights.1))?))
}

/// The canvas of a chart whose labels are on the page.
fn bare() -> Canvas {
    Canvas { legend: false, ..Canvas::default() }
}

/// At most [`MAX_POINTS`]: the lowest and the highest of each section, so that no peak is lost.
fn thinned(points: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points;
    }
    let stretch = points.len().div_ceil(MAX_POINTS / 2);
    let ends = points.chunks(stretch).flat_map(|part| {
        let by_height = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let (low, high) = (part.iter().min_by(by_height), part.iter().max_by(by_height));
        let mut ends: Vec<_> = low.into_iter().chain(high).copied().collect();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        ends
    });
    ends.collect()
}

/// The charts for which this run has data.
pub(super) fn pictures(run: &Run) -> Result<Vec<Picture>, PlotError> {
    let mut out = vec![remaining(run)?, rates(run)?, throttle(run)?];
    out.extend(pages(run)?);
    out.extend(downtime(run)?);
    out.extend(latency(run)?);
    Ok(out)
}

/// When the guest stood still.
fn band(run: &Run) -> Option<std::ops::Range<f64>> {
    let pause = run.events.iter().find(|event| event.event == "switchover")?.at_ms;
    Some(pause / 1e3..run.last_ms() / 1e3)
}

fn over_time(
    run: &Run,
    label: &'static str,
    tick: fn(f64) -> String,
    lines: &[Line],
) -> Result<(String, String), PlotError> {
    // A run without a line still has an axis.
    let empty = [Line { name: String::new(), points: vec![(0.0, 0.0)] }];
    let lines = if lines.iter().all(|line| line.points.is_empty()) { &empty } else { lines };
    both((300, 240), &Canvas { band: band(run), ..bare() }, |canvas| {
        let y = Axis { tick, ..axis(label) };
        lines_on(canvas, "", axis("seconds since the start"), y, lines)
    })
}

fn line(name: &str, points: Vec<(f64, f64)>) -> Line {
    Line { name: name.into(), points: thinned(points) }
}

fn remaining(run: &Run) -> Result<Picture, PlotError> {
    let samples = run.samples.iter().filter(|sample| sample.status != ramwire::observe::Status::None);
    let mut points: Vec<_> = samples.map(|sample| (sample.at_ms / 1e3, sample.remaining as f64)).collect();
    for round in &run.rounds {
        let began = (round.at_ms - round.report.took_ms).max(0.0) / 1e3;
        points.extend([(began, round.remaining as f64), (round.at_ms / 1e3, 0.0)]);
    }
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (wide, narrow) = over_time(run, "bytes", short, &[line("", points)])?;
    let says = "What was left to send. Each round begins with what the guest wrote during the one before it. The \
                shaded part is the downtime.";
    Ok(Picture { title: "Remaining", legend: vec![], says: says.into(), wide, narrow })
}

fn rates(run: &Run) -> Result<Picture, PlotError> {
    let page = run.description.page_bytes as f64;
    let of = |rate: &dyn Fn(&ramwire::observe::Sample) -> f64| -> Vec<(f64, f64)> {
        run.samples.iter().map(|sample| (sample.at_ms / 1e3, rate(sample))).collect()
    };
    let (mut sent, mut written) = (of(&|s| s.throughput as f64), of(&|s| s.dirty_pages_rate as f64 * page));
    // A run that ended before a few samples were taken has only its rounds.
    if sent.len() < 4 {
        for round in run.rounds.iter().filter(|round| round.report.took_ms >= 1.0) {
            let (end, took) = (round.at_ms / 1e3, round.report.took_ms / 1e3);
            let at = [(end - took).max(0.0), end];
            sent.extend(at.map(|at| (at, round.report.throughput as f64)));
            written.extend(at.map(|at| (at, round.report.dirty_pages_rate as f64 * page)));
        }
        for points in [&mut sent, &mut written] {
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
        }
    }
    let lines = [line("sent", sent), line("written by the guest", written)];
    let (wide, narrow) = over_time(run, "bytes a second", short, &lines)?;
    let says = "While the guest writes faster than pages leave, rounds do not get shorter.";
    Ok(Picture {
        title: "Rate and dirty rate",
        legend: vec!["sent", "written by the guest"],
        says: says.into(),
        wide,
        narrow,
    })
}

fn throttle(run: &Run) -> Result<Picture, PlotError> {
    let mut points: Vec<_> =
        run.samples.iter().map(|sample| (sample.at_ms / 1e3, f64::from(sample.throttle_percent))).collect();
    points.extend(run.rounds.iter().map(|round| {
        let began = (round.at_ms - round.report.took_ms).max(0.0) / 1e3;
        (began, f64::from(round.report.throttle_percent))
    }));
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let most = points.iter().map(|point| point.1).fold(0.0, f64::max);
    let says = match most {
        most if most > 0.0 => format!("The guest was throttled by up to {most} % of its time."),
        _ => "The guest was never throttled.".into(),
    };
    let empty = [Line { name: String::new(), points: vec![(0.0, 0.0)] }];
    let lines = if points.is_empty() { empty } else { [line("", points)] };
    let heights = if most > 0.0 { (260, 220) } else { (170, 170) };
    let (wide, narrow) = both(heights, &Canvas { band: band(run), up_to: 100.0, ..bare() }, |canvas| {
        lines_on(canvas, "", axis("seconds since the start"), axis("percent"), &lines)
    })?;
    Ok(Picture { title: "Throttle", legend: vec![], says, wide, narrow })
}

fn pages(run: &Run) -> Result<Option<Picture>, PlotError> {
    if run.rounds.is_empty() {
        return Ok(None);
    }
    let all = run.rounds.len();
    let is_drawn = |index: usize| {
        all <= FIRST_ROUNDS + LAST_ROUNDS || index < FIRST_ROUNDS || index >= all - LAST_ROUNDS
    };
    let drawn: Vec<_> = (0..all).filter(|index| is_drawn(*index)).collect();
    let rows: Vec<(String, Vec<f64>)> = drawn
        .iter()
        .map(|index| {
            let report = &run.rounds[*index].report;
            let pages = report.pages;
            let kinds = [pages.normal, pages.zero, pages.delta].map(|count| count as f64);
            (report.round.to_string(), kinds.to_vec())
        })
        .collect();
    let up = Axis { label: "pages (each line ten times the one below)", logarithmic: true, tick: short };
    let (wide, narrow) = both((320, 260), &bare(), |canvas| {
        let y = Axis { label: if canvas.size.0 == WIDE { up.label } else { "pages" }, ..up };
        groups(canvas, "round", y, &rows)
    })?;
    let left_out = all - drawn.len();
    let says = match left_out {
        0 => "How many pages travelled in each round, and as what. The scale is logarithmic.".into(),
        _ => format!(
            "The first {FIRST_ROUNDS} and the last {LAST_ROUNDS} rounds of {all}. The scale is logarithmic."
        ),
    };
    Ok(Some(Picture {
        title: "Pages by kind",
        legend: vec!["whole", "zero", "difference"],
        says,
        wide,
        narrow,
    }))
}

fn downtime(run: &Run) -> Result<Option<Picture>, PlotError> {
    let Some(end) = run.end.as_ref().filter(|end| end.downtime_ms > 0.0) else { return Ok(None) };
    let parts = end.downtime_parts.named();
    let (wide, narrow) =
        both((320, 300), &bare(), |canvas| bars_across(canvas, axis("milliseconds"), &parts))?;
    let says = format!("The guest was paused for {:.1} ms.", end.downtime_ms);
    Ok(Some(Picture { title: "Downtime by parts", legend: vec![], says, wide, narrow }))
}

fn percentile(at: f64) -> String {
    let names = ["p50", "p90", "p99", "p99.9", "max"];
    let index = at.round();
    let name = (index >= 0.0 && (at - index).abs() < 1e-6).then(|| names.get(index as usize)).flatten();
    name.map_or_else(String::new, |name| (*name).into())
}

fn latency(run: &Run) -> Result<Option<Picture>, PlotError> {
    let Some(end) = &run.end else { return Ok(None) };
    let all = [
        ("batch handed over", end.batch_latency),
        ("round closed", end.fence_latency),
        ("write completed (RDMA)", end.write_latency),
    ];
    let known: Vec<_> = all.iter().filter(|(_, latency)| latency.count > 0).collect();
    if known.is_empty() {
        return Ok(None);
    }
    let lines: Vec<Line> = known
        .iter()
        .map(|(name, l)| {
            let steps = [l.p50_us, l.p90_us, l.p99_us, l.p999_us, l.max_us];
            let points = steps.iter().enumerate().map(|(at, us)| (at as f64, (*us).max(1) as f64));
            Line { name: (*name).into(), points: points.collect() }
        })
        .collect();
    let x = Axis { label: "share of all that took at most so long", logarithmic: false, tick: percentile };
    let y = Axis { label: "time", logarithmic: true, tick: micros };
    let (wide, narrow) =
        both((300, 260), &Canvas { ticks: Some(5), ..bare() }, |canvas| lines_on(canvas, "", x, y, &lines))?;
    let counts: Vec<String> =
        known.iter().map(|(name, latency)| format!("{name}: {}", latency.count)).collect();
    let says = format!("How often each was measured: {}. The scale is logarithmic.", counts.join(", "));
    Ok(Some(Picture {
        title: "Latency",
        legend: known.iter().map(|(name, _)| *name).collect(),
        says,
        wide,
        narrow,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_peaks_and_order() {
        let mut points: Vec<_> = (0..100_000).map(|x| (f64::from(x), 1.0)).collect();
        points[77_777].1 = 900.0;
        let thin = thinned(points);
        assert!(thin.len() <= MAX_POINTS && thin.iter().any(|point| point.1 == 900.0));
        assert!(thin.windows(2).all(|pair| pair[0].0 <= pair[1].0));
    }

    #[test]
    fn ticks_have_units() {
        assert_eq!([0.0, 950.0, 1.5e6, 2e9].map(short), ["0", "950", "1.5 M", "2 G"]);
        assert_eq!([7.0, 1500.0, 2e6].map(micros), ["7 µs", "1.5 ms", "2 s"]);
        assert_eq!([0.0, 3.0, 0.5, 9.0].map(percentile), ["p50", "p99.9", "", ""]);
    }
}
