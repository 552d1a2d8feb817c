//! What a bench prints: a table for people, one object for programs.

use std::fmt::Write;

use serde::Serialize;

use super::Run;
use super::interval::Median;

const GB: f64 = 1e9;

/// One contestant's figures over all rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Contestant {
    /// Its name in `--against`; `ramwire` for our own.
    pub name: String,
    /// Bytes of guest RAM a second, in GB (10^9).
    pub gb_per_s: Option<Median>,
    /// Processor seconds per GB of guest RAM, both processes together.
    pub cpu_s_per_gb: Option<Median>,
    /// Downtime in ms, where there is such a thing.
    pub downtime_ms: Option<Median>,
    /// ramwire's throughput over this contestant's, of the same round.
    pub throughput_ratio: Option<Median>,
    /// ramwire's processor time over this contestant's, of the same round.
    pub cpu_ratio: Option<Median>,
    /// Every round: seconds and processor seconds, so that others can compute what they like.
    pub runs: Vec<Run>,
}

/// The result of a bench.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this object's layout.
    pub version: u32,
    /// Bytes of guest RAM that each run moves.
    pub ram_bytes: u64,
    /// What the memory holds.
    pub fill: String,
    /// What the memory was before each run, as `--populated` says it.
    pub populated: String,
    /// Whether the destination's memory was compared after each contestant's first run.
    pub verified: bool,
    /// Processors this process may use.
    pub cpus: usize,
    /// Kernel release.
    pub kernel: String,
    /// ramwire first, then the others as given.
    pub contestants: Vec<Contestant>,
}

impl Report {
    /// Puts the runs together: `runs` has one column per name and one row per round, ramwire's first.
    pub fn new(
        ram_bytes: u64,
        fill: String,
        populated: String,
        verified: bool,
        names: &[String],
        rounds: &[Vec<Run>],
    ) -> Self {
        let column = |at: usize| rounds.iter().filter_map(move |round| round.get(at));
        let gigabytes = ram_bytes as f64 / GB;
        let contestant = |(at, name): (usize, &String)| Contestant {
            name: name.clone(),
            gb_per_s: Median::of(column(at).map(|run| gigabytes / run.seconds)),
            cpu_s_per_gb: Median::of(column(at).filter_map(|run| Some(run.cpu_seconds? / gigabytes))),
            downtime_ms: Median::of(column(at).filter_map(|run| run.downtime_ms)),
            throughput_ratio: Median::of(
                column(0).zip(column(at)).map(|(own, run)| run.seconds / own.seconds),
            )
            .filter(|_| at > 0),
            cpu_ratio: Median::of(
                column(0).zip(column(at)).filter_map(|(own, run)| Some(own.cpu_seconds? / run.cpu_seconds?)),
            )
            .filter(|_| at > 0),
            runs: column(at).copied().collect(),
        };
        Self {
            version: 1,
            ram_bytes,
            fill,
            populated,
            verified,
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap_or_default()
                .trim()
                .to_owned(),
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
            "{:.2} GB of {} memory, populated: {}, tcp over loopback, {rounds} rounds, {} CPUs, Linux {}",
            self.ram_bytes as f64 / GB,
            self.fill,
            self.populated,
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
            "{:<16}{:>20}{:>22}{:>16}{:>24}{:>24}",
            "", "GB/s", "CPU s per GB", "downtime ms", "times as fast", "times the CPU"
        );
        for contestant in &self.contestants {
            let _ = writeln!(
                out,
                "{:<16}{:>20}{:>22}{:>16}{:>24}{:>24}",
                contestant.name,
                shown(contestant.gb_per_s, 2),
                shown(contestant.cpu_s_per_gb, 2),
                contestant.downtime_ms.map_or_else(|| "-".into(), |median| format!("{:.1}", median.median)),
                shown(contestant.throughput_ratio, 3),
                shown(contestant.cpu_ratio, 3),
            );
        }
        out
    }
}

fn shown(median: Option<Median>, digits: usize) -> String {
    match median {
        Some(Median { median, low, high, .. }) => {
            format!("{median:.digits$} [{low:.digits$}, {high:.digits$}]")
        }
        None => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ratios_are_paired_by_round() {
        let run = |seconds, cpu| Run { seconds, cpu_seconds: Some(cpu), downtime_ms: None };
        let rounds: Vec<_> = (1..=7)
            .map(|round| {
                // The machine gets slower every round; the ratio does not change.
                let slow = f64::from(round);
                vec![run(slow, slow), run(2.0 * slow, 4.0 * slow)]
            })
            .collect();
        let names = ["ramwire".to_owned(), "other".to_owned()];
        let report = Report::new(1_000_000_000, "random".into(), "yes".into(), true, &names, &rounds);
        let other = &report.contestants[1];
        let ratio = other.throughput_ratio.unwrap();
        assert_eq!((ratio.low, ratio.median, ratio.high), (2.0, 2.0, 2.0));
        assert_eq!(other.cpu_ratio.unwrap().median, 0.25);
        assert_eq!(report.contestants[0].gb_per_s.unwrap().median, 0.25);
        assert!(report.contestants[0].throughput_ratio.is_none());
        assert!(report.table().contains("2.000 [2.000, 2.000]"), "{}", report.table());
    }
}
