//! The output of a bench: a table as text, or one JSON object.

use std::fmt::Write;

use serde::Serialize;

use super::Run;
use crate::interval::{Median, shown};
use crate::plot::{self, Axis, Bar, PlotError};

const GB: f64 = 1e9;

/// The memory of two destinations is not comparable if populating one took this many times as long.
const UNLIKE: f64 = 1.2;

/// Common settings of all runs.
#[derive(Clone, Debug, Serialize)]
pub struct Setting {
    /// Bytes of guest RAM that each run moves.
    pub ram_bytes: u64,
    /// What the memory holds.
    pub fill: String,
    /// The state of the memory before each run, as given by `--populated`.
    pub populated: String,
    /// The kind of the destination's memory, as given by `--memory`.
    pub memory: String,
    /// Whether the migrations of ramwire and of QEMUs were encrypted.
    pub tls: bool,
    /// Whether the destination's memory was compared after each contestant's first run.
    pub verified: bool,
}

/// One contestant's figures over all rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Contestant {
    /// Its name in `--against`, followed by a bare loop's buffer; ramwire's first.
    pub name: String,
    /// Bytes of guest RAM a second, in GB (10^9).
    pub gb_per_s: Option<Median>,
    /// Processor seconds per GB of guest RAM, both processes together.
    pub cpu_s_per_gb: Option<Median>,
    /// The same of the sending process.
    pub source_cpu_s_per_gb: Option<Median>,
    /// The same of the receiving process.
    pub destination_cpu_s_per_gb: Option<Median>,
    /// Page faults per GB of guest RAM, both processes together.
    pub page_faults_per_gb: Option<Median>,
    /// Downtime in ms, if there is one.
    pub downtime_ms: Option<Median>,
    /// GB a second of a bare populate before each run, if the destination has no memory yet.
    pub populate_gb_per_s: Option<Median>,
    /// ramwire's throughput divided by this contestant's in the same round.
    pub throughput_ratio: Option<Median>,
    /// ramwire's processor time divided by this contestant's in the same round.
    pub cpu_ratio: Option<Median>,
    /// The same of the sending processes alone.
    pub source_cpu_ratio: Option<Median>,
    /// Rounds that are excluded from the ratios, since the populates before the two runs differ by more than 20 %.
    pub pairs_dropped: usize,
    /// Every round, so that other figures can be computed.
    pub runs: Vec<Run>,
}

impl Contestant {
    fn new(name: &str, gigabytes: f64, own: Option<&[Run]>, runs: Vec<Run>) -> Self {
        let alike = |(own, run): &(&Run, &Run)| match (own.populate_seconds, run.populate_seconds) {
            (Some(a), Some(b)) => a.max(b) <= UNLIKE * a.min(b),
            _ => true,
        };
        let pairs: Vec<(&Run, &Run)> = own.unwrap_or_default().iter().zip(&runs).filter(alike).collect();
        let ratio =
            |of: fn(&Run, &Run) -> Option<f64>| Median::of(pairs.iter().filter_map(|(a, b)| of(a, b)));
        let median = |of: &dyn Fn(&Run) -> Option<f64>| Median::of(runs.iter().filter_map(of));
        let cpu = |cost: Option<super::Cost>| Some(cost?.cpu_seconds / gigabytes);
        Self {
            name: name.to_owned(),
            gb_per_s: median(&|run| Some(gigabytes / run.seconds)),
            cpu_s_per_gb: median(&|run| cpu(run.cost())),
            source_cpu_s_per_gb: median(&|run| cpu(run.source)),
            destination_cpu_s_per_gb: median(&|run| cpu(run.destination)),
            page_faults_per_gb: median(&|run| Some(run.cost()?.page_faults as f64 / gigabytes)),
            downtime_ms: median(&|run| run.downtime_ms),
            populate_gb_per_s: median(&|run| Some(gigabytes / run.populate_seconds?)),
            throughput_ratio: ratio(|own, run| Some(run.seconds / own.seconds)),
            cpu_ratio: ratio(|own, run| Some(own.cost()?.cpu_seconds / run.cost()?.cpu_seconds)),
            source_cpu_ratio: ratio(|own, run| Some(own.source?.cpu_seconds / run.source?.cpu_seconds)),
            pairs_dropped: own.map_or(0, |own| own.len().min(runs.len()) - pairs.len()),
            runs,
        }
    }
}

/// The result of a bench.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this object's layout.
    pub version: u32,
    /// Common settings of all runs.
    #[serde(flatten)]
    pub setting: Setting,
    /// Processors this process may use.
    pub cpus: usize,
    /// Kernel release.
    pub kernel: String,
    /// ramwire first, then the others as given.
    pub contestants: Vec<Contestant>,
}

impl Report {
    /// Combines the runs: `runs` has one column per name and one row per round, ramwire's first.
    pub fn new(setting: Setting, names: &[String], rounds: &[Vec<Run>]) -> Self {
        let column = |at: usize| rounds.iter().filter_map(|round| round.get(at).copied()).collect::<Vec<_>>();
        let gigabytes = setting.ram_bytes as f64 / GB;
        let own = column(0);
        let contestant = |(at, name): (usize, &String)| {
            Contestant::new(name, gigabytes, (at > 0).then_some(&own[..]), column(at))
        };
        Self {
            version: 2,
            setting,
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: kernel(),
            contestants: names.iter().enumerate().map(contestant).collect(),
        }
    }

    /// The table.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let rounds = self.contestants.first().map_or(0, |first| first.runs.len());
        // Writing to a String can't fail.
        let _ = writeln!(
            out,
            "{:.2} GB of {} memory, populated: {}, memory: {}, loopback, {rounds} rounds, {} CPUs, Linux {}",
            self.setting.ram_bytes as f64 / GB,
            self.setting.fill,
            self.setting.populated,
            self.setting.memory,
            self.cpus,
            self.kernel
        );
        let confidence = self.contestants.first().and_then(|first| first.gb_per_s);
        if let Some(Median { confidence, .. }) = confidence {
            let _ = writeln!(
                out,
                "median [interval with {confidence:.0} % confidence]; ratios are ramwire's to the other's, paired\n"
            );
        }
        let _ = writeln!(
            out,
            "{:<20}{:>19}{:>19}{:>15}{:>11}{:>10}{:>22}{:>22}",
            "",
            "GB/s",
            "CPU s per GB",
            "here + there",
            "faults/GB",
            "down ms",
            "times as fast",
            "times the CPU"
        );
        for one in &self.contestants {
            let middle = |median: Option<Median>, digits: usize| {
                median.map_or_else(|| "-".into(), |median| format!("{:.digits$}", median.median))
            };
            let _ = writeln!(
                out,
                "{:<20}{:>19}{:>19}{:>15}{:>11}{:>10}{:>22}{:>22}",
                one.name,
                shown(one.gb_per_s, 2),
                shown(one.cpu_s_per_gb, 2),
                format!(
                    "{} + {}",
                    middle(one.source_cpu_s_per_gb, 2),
                    middle(one.destination_cpu_s_per_gb, 2)
                ),
                middle(one.page_faults_per_gb, 0),
                middle(one.downtime_ms, 1),
                shown(one.throughput_ratio, 3),
                shown(one.cpu_ratio, 3),
            );
        }
        self.add_populates(&mut out);
        out
    }

    /// Throughput as bars.
    ///
    /// # Errors
    /// [`PlotError`] without any figure.
    pub fn picture(&self) -> Result<String, PlotError> {
        let bar = |one: &Contestant| {
            let Median { median, low, high, .. } = one.gb_per_s?;
            Some(Bar { name: one.name.clone(), value: median, low, high })
        };
        let bars: Vec<Bar> = self.contestants.iter().filter_map(bar).collect();
        let Setting { ram_bytes, fill, populated, memory, .. } = &self.setting;
        let title = format!(
            "{:.2} GB of {fill} memory, populated: {populated}, memory: {memory}",
            *ram_bytes as f64 / GB
        );
        plot::bars(&title, Axis { label: "GB/s", logarithmic: false, tick: plot::plain }, &bars)
    }

    /// How fast the host supplied memory before each run: figures of an unpopulated destination mean little without it.
    fn add_populates(&self, out: &mut String) {
        for one in &self.contestants {
            if let Some(populate) = one.populate_gb_per_s {
                let dropped = match one.pairs_dropped {
                    0 => String::new(),
                    pairs => format!(
                        "; {pairs} pairs count for no ratio, their populates differ by more than 20 %"
                    ),
                };
                let _ = writeln!(
                    out,
                    "{:<20}bare populate before each run: {} GB/s{dropped}",
                    one.name,
                    shown(Some(populate), 2)
                );
            }
        }
    }
}

/// Release of the running kernel.
pub fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::migrate::Cost;

    #[test]
    fn ratios_are_paired_by_round() {
        let run = |seconds, cpu_seconds, populate| Run {
            seconds,
            source: Some(Cost { cpu_seconds, user_seconds: 0.0, page_faults: 10 }),
            destination: Some(Cost { cpu_seconds, user_seconds: 0.0, page_faults: 5 }),
            populate_seconds: populate,
            ..Run::default()
        };
        let rounds: Vec<_> = (1..=7)
            .map(|round| {
                // The machine gets slower every round; the ratio does not change.
                let slow = f64::from(round);
                vec![
                    run(slow, slow, Some(1.0)),
                    run(2.0 * slow, 4.0 * slow, Some(if round == 3 { 1.3 } else { 1.1 })),
                ]
            })
            .collect();
        let names = ["ramwire".to_owned(), "other".to_owned()];
        let (fill, populated, memory) = ("random".into(), "no".into(), "shared".into());
        let setting =
            Setting { ram_bytes: 1_000_000_000, fill, populated, memory, tls: false, verified: true };
        let report = Report::new(setting, &names, &rounds);
        let other = &report.contestants[1];
        let ratio = other.throughput_ratio.unwrap();
        assert_eq!((ratio.low, ratio.median, ratio.high, ratio.count), (2.0, 2.0, 2.0, 6));
        assert_eq!((other.cpu_ratio.unwrap().median, other.source_cpu_ratio.unwrap().median), (0.25, 0.25));
        assert_eq!((other.pairs_dropped, other.page_faults_per_gb.unwrap().median), (1, 15.0));
        assert_eq!(report.contestants[0].gb_per_s.unwrap().median, 0.25);
        assert!(report.contestants[0].throughput_ratio.is_none());
        assert!(report.picture().unwrap().contains("other"));
        assert!(report.table().contains("1 pairs count for no ratio"), "{}", report.table());
        assert!(report.table().contains("2.000 [2.000, 2.000]"), "{}", report.table());
    }
}
