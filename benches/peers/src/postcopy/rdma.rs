//! `ramwire-bench postcopy --transport rdma`: missing pages that the destination reads from its source's memory, beside
//! perftest's READs of the same device and a bare UFFDIO_COPY, and what the source pays, beside a switch over TCP.

use std::fmt::Write as _;
use std::time::Instant;

use ramwire::observe::LatencySummary;
use ramwire::sys::{CancelToken, Mapping, MissingFaults};
use ramwire::transport::{Address, rdma_address};
use ramwire::units::{PageSize, Rate};
use serde::Serialize;

use super::ours::{Arrived, Way, arrive};
use super::source::Source;
use super::{PostcopyArgs, filled, memory, page_at};
use crate::BenchError;
use crate::interval::{Median, shown};
use crate::migrate::cost::Cost;
use crate::output::{result_line, result_text};
use crate::perftest::Device;

/// Pages that are read and placed to measure a bare read and a bare UFFDIO_COPY.
const PAGES: u64 = 2000;

/// Median and 99th percentile in microseconds.
#[derive(Clone, Copy, Debug)]
struct Times {
    p50: f64,
    p99: f64,
}

impl Times {
    fn of(latency: LatencySummary) -> Self {
        Self { p50: latency.p50_us as f64, p99: latency.p99_us as f64 }
    }

    fn and(self, other: Self) -> Self {
        Self { p50: self.p50 + other.p50, p99: self.p99 + other.p99 }
    }
}

/// One turn.
struct Turn {
    /// Bytes a second.
    rate: f64,
    their_rate: f64,
    /// Faults while few other pages are read, and while all others are.
    alone: Times,
    loaded: Times,
    /// A READ by `ib_read_lat` and a bare UFFDIO_COPY.
    floor: Times,
    /// The source's, over RDMA and over TCP.
    cost: Slope,
    tcp_cost: Slope,
}

/// What a source's process pays for more memory: a run costs something however small it is, most of all on an emulated
/// machine, which translates each instruction once.
#[derive(Clone, Copy, Debug)]
struct Slope {
    /// Seconds of two runs, and what one has more, in GB.
    user: f64,
    all: f64,
    gb: f64,
}

impl Slope {
    fn between(small: (u64, Cost), large: (u64, Cost)) -> Self {
        let more = large.1.since(small.1);
        Self {
            user: more.user_seconds.max(0.0),
            all: more.cpu_seconds.max(0.0),
            gb: large.0.saturating_sub(small.0) as f64 / 1e9,
        }
    }
}

/// Everything that was measured; ratios are ours over theirs, of the same turn.
#[derive(Clone, Debug, Serialize)]
struct Report {
    version: u32,
    transport: &'static str,
    host: String,
    ram_bytes: u64,
    fault_ram_bytes: u64,
    pairs: u32,
    /// From the start of the guest until all pages are in place.
    read_mb_per_s: Option<Median>,
    ib_read_bw_mb_per_s: Option<Median>,
    rate_ratio: Option<Median>,
    /// From the report of a fault to its page in place; one thread touches pages.
    p50_us: Option<Median>,
    p99_us: Option<Median>,
    /// `ib_read_lat` of 4 KiB, and the UFFDIO_COPY of a page.
    floor_p50_us: Option<Median>,
    floor_p99_us: Option<Median>,
    p50_ratio: Option<Median>,
    p99_ratio: Option<Median>,
    /// While all other pages are read as fast as they can be.
    loaded_p50_us: Option<Median>,
    loaded_p99_us: Option<Median>,
    loaded_p50_ratio: Option<Median>,
    loaded_p99_ratio: Option<Median>,
    /// Processor time of the source in the program, per GB that `ram_bytes` has more than `fault_ram_bytes`.
    source_user_s_per_gb: Option<Median>,
    tcp_source_user_s_per_gb: Option<Median>,
    user_ratio: Option<Median>,
    /// Of the sums of all turns, since the kernel counts in steps of 10 ms.
    user_ratio_of_sums: f64,
    /// The same with the kernel's time, in which a software device works.
    source_s_per_gb: Option<Median>,
    tcp_source_s_per_gb: Option<Median>,
}

impl Report {
    fn of(args: &PostcopyArgs, host: String, turns: &[Turn]) -> Self {
        let median = |of: &dyn Fn(&Turn) -> f64| Median::of(turns.iter().map(of));
        let sum = |of: fn(&Turn) -> Slope| turns.iter().map(|turn| of(turn).user).sum::<f64>();
        Self {
            version: 1,
            transport: "rdma",
            host,
            ram_bytes: args.ram,
            fault_ram_bytes: args.fault_ram,
            pairs: args.pairs,
            read_mb_per_s: median(&|turn| turn.rate / 1e6),
            ib_read_bw_mb_per_s: median(&|turn| turn.their_rate / 1e6),
            rate_ratio: median(&|turn| turn.rate / turn.their_rate),
            p50_us: median(&|turn| turn.alone.p50),
            p99_us: median(&|turn| turn.alone.p99),
            floor_p50_us: median(&|turn| turn.floor.p50),
            floor_p99_us: median(&|turn| turn.floor.p99),
            p50_ratio: median(&|turn| turn.alone.p50 / turn.floor.p50),
            p99_ratio: median(&|turn| turn.alone.p99 / turn.floor.p99),
            loaded_p50_us: median(&|turn| turn.loaded.p50),
            loaded_p99_us: median(&|turn| turn.loaded.p99),
            loaded_p50_ratio: median(&|turn| turn.loaded.p50 / turn.floor.p50),
            loaded_p99_ratio: median(&|turn| turn.loaded.p99 / turn.floor.p99),
            source_user_s_per_gb: median(&|turn| turn.cost.user / turn.cost.gb),
            tcp_source_user_s_per_gb: median(&|turn| turn.tcp_cost.user / turn.tcp_cost.gb),
            user_ratio: median(&|turn| turn.cost.user / turn.tcp_cost.user),
            user_ratio_of_sums: sum(|turn| turn.cost) / sum(|turn| turn.tcp_cost),
            source_s_per_gb: median(&|turn| turn.cost.all / turn.cost.gb),
            tcp_source_s_per_gb: median(&|turn| turn.tcp_cost.all / turn.tcp_cost.gb),
        }
    }

    fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a String can't fail.
        let _ = writeln!(
            out,
            "all pages: {} MB/s; ib_read_bw: {} MB/s; ours over its: {}",
            shown(self.read_mb_per_s, 1),
            shown(self.ib_read_bw_mb_per_s, 1),
            shown(self.rate_ratio, 3)
        );
        let _ = writeln!(
            out,
            "faults, us: p50 {}  p99 {}; ib_read_lat and UFFDIO_COPY: p50 {}  p99 {}; ours over their sum: p50 {}  p99 {}",
            shown(self.p50_us, 0),
            shown(self.p99_us, 0),
            shown(self.floor_p50_us, 0),
            shown(self.floor_p99_us, 0),
            shown(self.p50_ratio, 2),
            shown(self.p99_ratio, 2)
        );
        let _ = writeln!(
            out,
            "faults with all other pages behind, us: p50 {}  p99 {}; over that sum: p50 {}  p99 {}",
            shown(self.loaded_p50_us, 0),
            shown(self.loaded_p99_us, 0),
            shown(self.loaded_p50_ratio, 2),
            shown(self.loaded_p99_ratio, 2)
        );
        let _ = writeln!(
            out,
            "the source's user time, s per GB: {}; over TCP: {}; ratio {}, of the sums {:.3}; with the kernel's: {} and {}",
            shown(self.source_user_s_per_gb, 3),
            shown(self.tcp_source_user_s_per_gb, 3),
            shown(self.user_ratio, 3),
            self.user_ratio_of_sums,
            shown(self.source_s_per_gb, 2),
            shown(self.tcp_source_s_per_gb, 2)
        );
        out
    }
}

/// Measures in turns.
///
/// # Errors
/// [`BenchError`].
pub fn run(args: &PostcopyArgs, cancel: &CancelToken) -> Result<(), BenchError> {
    let host = match &args.host {
        Some(host) => host.clone(),
        None => rdma_address(args.ram).map_err(|why| BenchError::NoRdma(Box::new(why)))?.to_string(),
    };
    let device = Device::at(&host)?;
    let mut turns = Vec::new();
    for number in 0..args.pairs {
        let turn = turn(args, &host, &device, number % 2 == 1, cancel)?;
        tracing::info!(number, rate = turn.rate, theirs = turn.their_rate, cost = ?turn.cost, tcp = ?turn.tcp_cost, "turn");
        turns.push(turn);
    }
    let report = Report::of(args, host, &turns);
    if args.json {
        result_line!("{}", serde_json::to_string(&report).unwrap_or_default());
    } else {
        result_text!("{}", report.text());
    }
    Ok(())
}

/// Theirs come first in every second turn.
fn turn(
    args: &PostcopyArgs,
    host: &str,
    device: &Device,
    theirs_first: bool,
    cancel: &CancelToken,
) -> Result<Turn, BenchError> {
    let (rdma, tcp) = (Address::rdma(host, 0), Address::tcp("127.0.0.1", 0));
    let whole = |at: &Address| migrate(at, args.ram, Way::default(), cancel);
    let faults = |background| {
        let way = Way { threads: 1, background, ..Way::default() };
        let (arrived, _) = migrate(&rdma, args.fault_ram, way, cancel)?;
        Ok::<_, BenchError>(Times::of(arrived.latency))
    };
    let theirs = || {
        let (p50, p99) = device.read_latency(4096, PAGES)?;
        let floor = Times { p50, p99 }.and(bare_copies()?);
        Ok::<_, BenchError>((device.read_rate(args.ram)?, floor))
    };
    let first = theirs_first.then(theirs).transpose()?;
    let cost = |at: &Address, large: Cost| {
        let (_, small) = migrate(at, args.fault_ram, Way::default(), cancel)?;
        Ok::<_, BenchError>(Slope::between((args.fault_ram, small), (args.ram, large)))
    };
    let (arrived, large) = whole(&rdma)?;
    let rdma_cost = cost(&rdma, large)?;
    let (alone, loaded) = (faults(Some(Rate(64 << 10)))?, faults(None)?);
    let (their_rate, floor) = first.map_or_else(theirs, Ok)?;
    let (_, large) = whole(&tcp)?;
    let (cost, tcp_cost) = (rdma_cost, cost(&tcp, large)?);
    Ok(Turn { rate: args.ram as f64 / arrived.seconds, their_rate, alone, loaded, floor, cost, tcp_cost })
}

/// A guest of `bytes` of memory, from another process to this one.
fn migrate(at: &Address, bytes: u64, way: Way, cancel: &CancelToken) -> Result<(Arrived, Cost), BenchError> {
    let (arrived, source) = arrive(at, bytes, way, cancel, |address| Source::start(address, bytes))?;
    Ok((arrived, source.finish()?))
}

/// Pages that are placed in new memory, and nobody waits for.
fn bare_copies() -> Result<Times, BenchError> {
    let failed =
        |source| BenchError::Io { who: "a bare UFFDIO_COPY".into(), doing: "placing a page", source };
    let other = |error: &dyn std::fmt::Display| failed(std::io::Error::other(error.to_string()));
    let (from, to): (Mapping, Mapping) = (filled(PAGES * 4096)?, memory(PAGES * 4096)?);
    let missing = MissingFaults::new().map_err(|error| other(&error))?;
    let whole = to.region().span(0, PAGES * 4096).map_err(|error| other(&error))?;
    missing.register(whole).map_err(|error| other(&error))?;
    let (mut times, mut bytes) = (Vec::new(), [0; 4096]);
    for page in (0..).map_while(|step| page_at(PAGES, 1, 0, step)) {
        from.region().span(page * 4096, 4096).map_err(|error| other(&error))?.copy_to(&mut bytes);
        let to = to.region().span(page * 4096, 4096).map_err(|error| other(&error))?;
        let began = Instant::now();
        missing.place(to, &bytes, PageSize::SIZE_4K).and_then(|_| missing.wake(to)).map_err(failed)?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
    }
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or_default();
    Ok(Times { p50: at(50), p99: at(99) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ratios_are_of_the_same_turn() {
        let used = |user_seconds| Cost { user_seconds, ..Cost::default() };
        let turn = |slow: f64| Turn {
            rate: 90e6 / slow,
            their_rate: 100e6 / slow,
            alone: Times { p50: 11.0 * slow, p99: 20.0 * slow },
            loaded: Times { p50: 15.0 * slow, p99: 60.0 * slow },
            floor: Times { p50: 7.0 * slow, p99: 20.0 * slow }
                .and(Times { p50: 3.0 * slow, p99: 20.0 * slow }),
            cost: Slope::between((1 << 20, used(0.1)), (2 << 20, used(0.11))),
            tcp_cost: Slope::between((1 << 20, used(0.1)), (2 << 20, used(0.1 + 0.1 * slow))),
        };
        let turns: Vec<_> = [1.0, 2.0, 4.0].map(turn).into();
        let cli = <crate::Cli as clap::Parser>::parse_from(["bench", "postcopy", "--ram", "1000M"]);
        let crate::Command::Postcopy(args) = cli.command else { unreachable!() };
        let report = Report::of(&args, "10.9.0.1".into(), &turns);
        for (ratio, is) in [
            (report.rate_ratio, 0.9),
            (report.p50_ratio, 1.1),
            (report.p99_ratio, 0.5),
            (report.loaded_p50_ratio, 1.5),
            (report.loaded_p99_ratio, 1.5),
        ] {
            let ratio = ratio.unwrap();
            assert!((ratio.median - is).abs() < 1e-9 && ratio.high - ratio.low < 1e-9, "{ratio:?}");
        }
        assert!((report.user_ratio_of_sums - 0.03 / 0.7).abs() < 1e-9);
        assert!(report.text().contains("ours over its: 0.900"), "{}", report.text());
    }

    #[test]
    fn a_page_takes_time_to_be_placed() {
        let times = bare_copies().unwrap();
        assert!(times.p50 > 0.0 && times.p99 >= times.p50, "{times:?}");
    }
}
