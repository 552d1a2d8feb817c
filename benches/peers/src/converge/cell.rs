//! Results of the runs of a rate with one method: the table and the charts.

use serde::Serialize;
use serde_json::Value;

use super::{ConvergeArgs, Means};
use crate::interval::Median;
use crate::plot::{self, Axis, Bar, Line, PlotError};

/// How much of the limit a single downtime may exceed.
const SLACK: f64 = 1.2;

/// Seconds since the start, and the remaining MiB at that time.
pub(super) type Point = (f64, f64);

/// One migration.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Run {
    pub(super) converged: bool,
    pub(super) verified: bool,
    /// It reported that its rounds did not converge, or ended by its time limit.
    pub(super) said_so: bool,
    pub(super) total_ms: f64,
    pub(super) downtime_ms: f64,
    /// The expected downtime when the guest was paused, if it is reported.
    pub(super) expected_ms: Option<f64>,
    pub(super) downtime_parts: Value,
    pub(super) rounds: u64,
    /// What the guest wrote until its pause, as a share of what it would have written without a migration.
    pub(super) speed: f64,
    /// What it wrote before the migration, as a multiple of the bandwidth, if it may not have reached its rate.
    pub(super) reached: Option<f64>,
    pub(super) throttle_percent_most: u64,
    pub(super) vcpu_rest_percent: u64,
    /// It is not available here: the peer's error.
    pub(super) refused: Option<String>,
    #[serde(skip)]
    pub(super) remaining: Vec<Point>,
}

/// All migrations of a rate with one method.
#[derive(Debug, Serialize)]
pub(super) struct Cell {
    who: &'static str,
    /// Multiple of the bandwidth.
    rate: f64,
    means: Means,
    runs: usize,
    converged: usize,
    /// Every one arrived intact, or stayed with a reason.
    sound: bool,
    refused: Option<String>,
    total_ms: Option<Median>,
    rounds: Option<Median>,
    downtime_ms: Option<Median>,
    downtime_ms_most: f64,
    /// Median within the limit, the longest within 1.2 of it; for converged runs.
    downtime_kept: bool,
    guest_speed: Option<Median>,
    throttle_percent_most: u64,
    vcpu_rest_percent_most: u64,
    each: Vec<Run>,
}

impl Cell {
    pub(super) fn new(
        args: &ConvergeArgs,
        who: &'static str,
        rate: f64,
        means: Means,
        each: Vec<Run>,
    ) -> Self {
        let arrived = || each.iter().filter(|run| run.converged);
        let downtime_ms = Median::of(arrived().map(|run| run.downtime_ms));
        let most = arrived().map(|run| run.downtime_ms).fold(0.0, f64::max);
        let limit = f64::from(args.downtime_ms);
        let largest = |of: fn(&Run) -> u64| each.iter().map(of).max().unwrap_or(0);
        Self {
            who,
            rate,
            means,
            runs: each.len(),
            converged: arrived().count(),
            sound: each.iter().all(|run| if run.converged { run.verified } else { run.said_so }),
            refused: each.iter().find_map(|run| run.refused.clone()),
            total_ms: Median::of(each.iter().map(|run| run.total_ms)),
            rounds: Median::of(each.iter().map(|run| run.rounds as f64)),
            downtime_kept: downtime_ms.is_none_or(|median| median.median <= limit) && most <= limit * SLACK,
            downtime_ms,
            downtime_ms_most: most,
            guest_speed: Median::of(each.iter().map(|run| run.speed)),
            throttle_percent_most: largest(|run| run.throttle_percent_most),
            vcpu_rest_percent_most: largest(|run| run.vcpu_rest_percent),
            each,
        }
    }

    /// A QEMU's figures are only reported; ours must be sound, and keep the downtime if a method is used.
    pub(super) fn is_good(&self) -> bool {
        let helped = self.means != Means::None;
        let kept = self.downtime_kept && (!helped || self.converged == self.runs);
        self.who != "ramwire" || (self.sound && kept)
    }

    fn row(&self) -> String {
        let Self { who, rate, converged, runs, .. } = self;
        let reached = Median::of(self.each.iter().filter_map(|run| run.reached));
        let reached =
            reached.map_or_else(String::new, |reached| format!(" ({:.1} x reached)", reached.median));
        let head = format!("| {who} | {rate} x{reached} | {} |", self.means.name());
        if let Some(why) = &self.refused {
            return format!("{head} refused: {why} | | | | | | |");
        }
        let median = |median: &Option<Median>| median.as_ref().map_or(f64::NAN, |median| median.median);
        let kept = match (self.converged, self.downtime_kept) {
            (0, _) => "-",
            (_, true) => "yes",
            (_, false) => "NO",
        };
        let downtime = match &self.downtime_ms {
            Some(downtime) => format!("{:.0}, {:.0}", downtime.median, self.downtime_ms_most),
            None => "-".into(),
        };
        format!(
            "{head} {converged} of {runs}{} | {:.1} | {:.0} | {downtime} | {kept} | {:.0} % | {} |",
            if self.sound { "" } else { ", UNSOUND" },
            median(&self.total_ms) / 1e3,
            median(&self.rounds),
            median(&self.guest_speed) * 100.0,
            self.taken(),
        )
    }

    /// The maximum throttling of the guest, in the terms of the method.
    fn taken(&self) -> String {
        match self.means {
            Means::AutoConverge => format!("{} % of its time", self.throttle_percent_most),
            Means::DirtyLimit => format!("rest of {} % of what it ran", self.vcpu_rest_percent_most),
            Means::None | Means::Xbzrle => "-".into(),
        }
    }
}

const HEAD: &str = "\
| who | writes | means | converged | time, s | rounds | downtime, ms: median, most | kept | guest's speed | most taken |
|---|---|---|---|---|---|---|---|---|---|
";

pub(super) fn table(cells: &[Cell]) -> String {
    let rows = cells.iter().map(|cell| cell.row() + "\n");
    [HEAD.to_owned()].into_iter().chain(rows).collect()
}

/// A line about the run that ended last.
pub(super) fn progress(args: &ConvergeArgs, (rate, means): (f64, Means), done: &[(usize, Run)]) -> String {
    let Some((_, run)) = done.last() else { return String::new() };
    let head = format!("{rate} x, {}", means.name());
    if let Some(why) = &run.refused {
        return format!("{head}: refused: {why}");
    }
    if !run.converged {
        return format!("{head}: did not converge in {:.1} s", run.total_ms / 1e3);
    }
    let over = if run.downtime_ms > f64::from(args.downtime_ms) {
        format!(
            " OVER the limit; expected {:.0?}, {}",
            run.expected_ms.unwrap_or(f64::NAN),
            run.downtime_parts
        )
    } else {
        String::new()
    };
    let wrong = if run.verified { "" } else { ", NOT VERIFIED" };
    format!("{head}: {:.1} s, downtime {:.0} ms{over}{wrong}", run.total_ms / 1e3, run.downtime_ms)
}

/// For each rate the remaining memory over time, in the first run of each method; and the downtimes of all.
pub(super) fn pictures(args: &ConvergeArgs, cells: &[Cell]) -> Result<Vec<(String, String)>, PlotError> {
    let axis = |label| Axis { label, logarithmic: false, tick: plot::plain };
    let mut pictures = Vec::new();
    for (who, suffix) in [("ramwire", ""), ("QEMU 10.0", "-qemu")] {
        let of_who = || cells.iter().filter(|cell| cell.who == who && cell.refused.is_none());
        for rate in &args.rates {
            let line = |cell: &Cell| {
                let points = cell.each.first().map(|run| run.remaining.clone()).unwrap_or_default();
                Line { name: cell.means.name().into(), points }
            };
            let of_rate = of_who().filter(|cell| cell.rate == *rate);
            let lines: Vec<Line> = of_rate.map(line).filter(|line| !line.points.is_empty()).collect();
            if lines.is_empty() {
                continue;
            }
            let title = format!("{who}: a guest that writes {rate} times what the link carries");
            let svg = plot::lines(&title, axis("seconds"), axis("MiB that remain"), &lines)?;
            pictures.push((format!("converge-{rate}{suffix}.svg"), svg));
        }
        let bar = |cell: &Cell| {
            let (value, shortest) =
                (cell.downtime_ms?.median, |low: f64, run: &Run| low.min(run.downtime_ms));
            let low = cell.each.iter().filter(|run| run.converged).fold(value, shortest);
            let short = match cell.means {
                Means::None => "none",
                Means::Xbzrle => "xbzrle",
                Means::AutoConverge => "auto",
                Means::DirtyLimit => "limit",
            };
            Some(Bar { name: format!("{} {short}", cell.rate), value, low, high: cell.downtime_ms_most })
        };
        let bars: Vec<Bar> = of_who().filter_map(bar).collect();
        if !bars.is_empty() {
            let limit = args.downtime_ms;
            let title = format!(
                "{who}: downtime at multiples of the link, median and range; the limit is {limit} ms"
            );
            let svg = plot::bars(&title, axis("downtime, ms"), &bars)?;
            pictures.push((format!("converge-downtime{suffix}.svg"), svg));
        }
    }
    Ok(pictures)
}
