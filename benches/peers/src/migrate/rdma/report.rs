//! The output of a bench over RDMA.

use std::fmt::Write;

use serde::Serialize;

use crate::interval::{Median, shown};
use crate::migrate::cost::Cost;
use crate::migrate::report::kernel;
use crate::migrate::strace::Calls;
use crate::migrate::{MigrateArgs, Run};
use crate::plot::{self, Axis, Bar, PlotError};

const GB: f64 = 1e9;
const MB: f64 = 1e6;

/// Calls and posted requests of one run without timing.
#[derive(Clone, Debug, Serialize)]
pub struct Counted {
    /// The source's system calls.
    pub source: Calls,
    /// The destination's.
    pub destination: Calls,
    /// Requests that the source posted, if its program reports them. A QEMU posts one for each doorbell.
    pub requests: Option<u64>,
}

impl Counted {
    /// For two processes; `None` unless there are two.
    pub fn new(calls: Vec<Calls>, requests: Option<u64>) -> Option<Self> {
        let [source, destination] = <[Calls; 2]>::try_from(calls).ok()?;
        Some(Self { source, destination, requests })
    }
}

/// One contestant's figures over all rounds.
#[derive(Clone, Debug, Serialize)]
pub struct Contestant {
    /// Its name in `--against`; `ramwire` for our own.
    pub name: String,
    /// Bytes of guest RAM a second, in MB (10^6), from the first page to the end: without connecting and registering
    /// ahead.
    pub mb_per_s: Option<Median>,
    /// The same over the whole migration.
    pub whole_mb_per_s: Option<Median>,
    /// Time before the first page in ms.
    pub setup_ms: Option<Median>,
    /// Downtime in ms.
    pub downtime_ms: Option<Median>,
    /// Processor seconds in the program per GB of guest RAM: source, destination.
    pub user_s_per_gb: [Option<Median>; 2],
    /// Processor seconds in the kernel per GB, which for a software device include the device's own work.
    pub system_s_per_gb: [Option<Median>; 2],
    /// ramwire's throughput divided by this contestant's in the same round: of whole migrations; if the contestant has
    /// no setup, ramwire's from its first page on.
    pub throughput_ratio: Option<Median>,
    /// ramwire's processor time in the program, both ends, divided by this contestant's in the same round.
    pub user_ratio: Option<Median>,
    /// System calls and requests of one more run.
    pub counted: Option<Counted>,
}

/// The result of a bench over RDMA.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this object's layout.
    pub version: u32,
    /// `rdma`.
    pub transport: &'static str,
    /// The device's address.
    pub host: String,
    /// Whether both ends registered all of RAM ahead.
    pub pin_all: bool,
    /// Queue pairs of ours.
    pub queue_pairs: u16,
    /// Bytes of guest RAM that each run moves.
    pub ram_bytes: u64,
    /// What the memory holds.
    pub fill: String,
    /// Whether the destination's memory was compared after each contestant's first run.
    pub verified: bool,
    /// Rounds.
    pub rounds: usize,
    /// Processors this process may use.
    pub cpus: usize,
    /// Kernel release.
    pub kernel: String,
    /// ramwire first, then the others as given.
    pub contestants: Vec<Contestant>,
}

impl Report {
    /// Combines the runs: `rounds` has one row per round with one run per name, ramwire's first.
    pub fn new(
        args: &MigrateArgs,
        host: &str,
        names: &[String],
        rounds: &[Vec<Run>],
        counted: Vec<Option<Counted>>,
    ) -> Self {
        let mut counted = counted.into_iter();
        let contestants = names.iter().enumerate();
        let contestants =
            contestants.map(|(at, name)| contestant(args.ram, name, at, rounds, counted.next()));
        Self {
            version: 1,
            transport: "rdma",
            host: host.to_owned(),
            pin_all: args.rdma.pin_all,
            queue_pairs: args.rdma.queue_pairs,
            ram_bytes: args.ram,
            fill: args.fill.to_string(),
            verified: !args.no_verify,
            rounds: rounds.len(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: kernel(),
            contestants: contestants.collect(),
        }
    }

    /// The tables.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let mode = if self.pin_all { "pin-all" } else { "dynamic registration" };
        // Writing to a String can't fail.
        let _ = writeln!(
            out,
            "{:.1} MB of {} memory over RDMA at {}, {mode}, {} rounds, {} CPUs, Linux {}",
            self.ram_bytes as f64 / MB,
            self.fill,
            self.host,
            self.rounds,
            self.cpus,
            self.kernel
        );
        if let Some(Median { confidence, .. }) = self.contestants.first().and_then(|first| first.mb_per_s) {
            let _ = writeln!(
                out,
                "median [interval with {confidence:.0} % confidence]; ratios are ramwire's to the other's, paired\n"
            );
        }
        let _ = writeln!(
            out,
            "{:<14}{:>22}{:>10}{:>22}{:>10}{:>10}{:>22}{:>22}",
            "",
            "MB/s after setup",
            "setup ms",
            "whole MB/s",
            "user src",
            "user dst",
            "times as fast",
            "times the user CPU"
        );
        for contestant in &self.contestants {
            let _ = writeln!(
                out,
                "{:<14}{:>22}{:>10}{:>22}{:>10}{:>10}{:>22}{:>22}",
                contestant.name,
                shown(contestant.mb_per_s, 1),
                middle(contestant.setup_ms, 0),
                shown(contestant.whole_mb_per_s, 1),
                middle(contestant.user_s_per_gb[0], 2),
                middle(contestant.user_s_per_gb[1], 2),
                shown(contestant.throughput_ratio, 3),
                shown(contestant.user_ratio, 3),
            );
        }
        self.counts(&mut out);
        out
    }

    /// Throughput after setup as bars, as SVG.
    ///
    /// # Errors
    /// [`PlotError`].
    pub fn picture(&self) -> Result<String, PlotError> {
        let bar = |contestant: &Contestant| {
            let Median { median, low, high, .. } = contestant.mb_per_s?;
            Some(Bar { name: contestant.name.clone(), value: median, low, high })
        };
        let bars: Vec<Bar> = self.contestants.iter().filter_map(bar).collect();
        let mode = if self.pin_all { "pin-all" } else { "dynamic registration" };
        let title = format!("{} memory over RDMA, {mode}", self.fill);
        plot::bars(&title, Axis { label: "MB/s", logarithmic: false, tick: plot::plain }, &bars)
    }

    /// The counts, per GB of guest RAM.
    fn counts(&self, out: &mut String) {
        let counted =
            |contestant: &'_ Contestant| Some((contestant.name.clone(), contestant.counted.clone()?));
        let counted: Vec<(String, Counted)> = self.contestants.iter().filter_map(counted).collect();
        if counted.is_empty() {
            return;
        }
        let _ = writeln!(out, "\nper GB, in one more run that was not timed (source / destination)\n");
        let _ = writeln!(out, "{:<14}{:>22}{:>22}{:>12}", "", "system calls", "doorbells", "requests");
        let per_gb = |count: u64| count as f64 * GB / self.ram_bytes as f64;
        for (name, counted) in &counted {
            let both = |one: u64, other: u64| format!("{:.0} / {:.0}", per_gb(one), per_gb(other));
            let _ = writeln!(
                out,
                "{:<14}{:>22}{:>22}{:>12}",
                name,
                both(counted.source.total, counted.destination.total),
                both(counted.source.doorbells, counted.destination.doorbells),
                counted.requests.map_or_else(|| "-".into(), |count| format!("{:.0}", per_gb(count))),
            );
        }
        for (name, counted) in &counted {
            for (side, calls) in [("source", &counted.source), ("destination", &counted.destination)] {
                let mut calls: Vec<_> = calls.by_name.iter().collect();
                calls.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
                let most: Vec<String> =
                    calls.iter().take(6).map(|(name, count)| format!("{name} {count}")).collect();
                let _ = writeln!(out, "  {name} {side}: {}", most.join(", "));
            }
        }
    }
}

fn contestant(
    ram_bytes: u64,
    name: &str,
    at: usize,
    rounds: &[Vec<Run>],
    counted: Option<Option<Counted>>,
) -> Contestant {
    let column = |at: usize| rounds.iter().filter_map(move |round| round.get(at));
    let bytes = ram_bytes as f64;
    let moving = |run: &Run| run.seconds - run.setup_seconds.unwrap_or(0.0);
    let sides: [fn(&Run) -> Option<Cost>; 2] = [|run| run.source, |run| run.destination];
    let of_sides = |part: fn(Cost) -> f64| {
        sides.map(|side| Median::of(column(at).filter_map(|run| Some(part(side(run)?) / (bytes / GB)))))
    };
    let user = |run: &Run| run.cost().map(|cost| cost.user_seconds);
    let pairs = || column(0).zip(column(at)).filter(|_| at > 0);
    Contestant {
        name: name.to_owned(),
        mb_per_s: Median::of(column(at).map(|run| bytes / MB / moving(run))),
        whole_mb_per_s: Median::of(column(at).map(|run| bytes / MB / run.seconds)),
        setup_ms: Median::of(column(at).filter_map(|run| Some(run.setup_seconds? * 1e3))),
        downtime_ms: Median::of(column(at).filter_map(|run| run.downtime_ms)),
        user_s_per_gb: of_sides(|cost| cost.user_seconds),
        system_s_per_gb: of_sides(|cost| cost.cpu_seconds - cost.user_seconds),
        throughput_ratio: Median::of(pairs().map(|(own, run)| match run.setup_seconds {
            Some(_) => run.seconds / own.seconds,
            None => run.seconds / moving(own),
        })),
        user_ratio: Median::of(pairs().filter_map(|(own, run)| Some(user(own)? / user(run)?))),
        counted: counted.flatten(),
    }
}

fn middle(median: Option<Median>, digits: usize) -> String {
    median.map_or_else(|| "-".into(), |median| format!("{:.digits$}", median.median))
}
