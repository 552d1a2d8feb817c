//! `ramwire-bench postcopy`: how long a thread waits for a missing page, beside a bare handler, and how fast the rest
//! follows, beside precopy.
//!
//! Both ends are threads of this process, over TCP on the loopback; so are both ends of the bare handler, which asks for
//! a page over such a connection, and places it, without an engine. The memory at the destination is new in each run.
//!
//! Over RDMA the ends are two processes, since the source's processor time counts, and the others are perftest's READs.

mod bare;
mod ours;
#[cfg(feature = "rdma")]
mod rdma;
#[cfg(feature = "rdma")]
pub mod source;

use ramwire::observe::LatencySummary;
use ramwire::sys::{CancelToken, Mapping};
use ramwire::units::Rate;
use serde::Serialize;

use crate::BenchError;
use crate::interval::{Median, shown};
use crate::output::result_line;
use crate::sizes::bytes;
use ours::Way;

/// Share of the drain rate that the background takes while faults are measured.
const BACKGROUND: f64 = 0.9;

/// What the ends are connected by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Transport {
    /// TCP over the loopback
    Tcp,
    /// RDMA, with both ends at one device
    Rdma,
}

/// Arguments of `ramwire-bench postcopy`.
#[derive(Clone, Debug, clap::Args)]
pub struct PostcopyArgs {
    /// Over RDMA the destination reads the pages of its source, which sends none
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    transport: Transport,
    /// IP address of the device; without it that of the first usable one
    #[arg(long, value_name = "ADDRESS")]
    host: Option<String>,
    /// Memory of the guest
    #[arg(long, default_value = "64M", value_parser = bytes, value_name = "SIZE")]
    ram: u64,
    /// Over RDMA: memory of the guest whose faults are measured
    #[arg(long, default_value = "16M", value_parser = bytes, value_name = "SIZE")]
    fault_ram: u64,
    /// Threads that touch missing pages, with commas between
    #[arg(long, value_delimiter = ',', default_value = "1,4,16", value_name = "NUMBERS")]
    threads: Vec<usize>,
    /// Page channels for pages that nobody waits for; 0: they go in the stream
    #[arg(long, default_value_t = 0)]
    channels: u8,
    /// Requested pages have a connection of their own, as with `ramwire send --postcopy-preempt`
    #[arg(long)]
    preempt: bool,
    /// Turns
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..1000))]
    pairs: u32,
    /// One JSON object on standard output instead of text
    #[arg(long)]
    json: bool,
}

/// Faults of one number of threads, in microseconds from the report of a fault to its page in place.
#[derive(Clone, Copy, Debug, Serialize)]
struct Faults {
    threads: usize,
    /// Nothing but requested pages is sent.
    p50_us: Option<Median>,
    p99_us: Option<Median>,
    bare_p50_us: Option<Median>,
    bare_p99_us: Option<Median>,
    /// Ours over the bare handler's, of the same turn.
    p50_ratio: Option<Median>,
    p99_ratio: Option<Median>,
    /// While other pages follow at 0.9 of the drain rate.
    loaded_p50_us: Option<Median>,
    loaded_p99_us: Option<Median>,
}

/// Everything that was measured.
#[derive(Clone, Debug, Serialize)]
struct Report {
    version: u32,
    ram_bytes: u64,
    channels: u8,
    preempt: bool,
    pairs: u32,
    /// Bytes a second of a whole guest, by precopy and after a switch before the first page.
    precopy_gb_per_s: Option<Median>,
    drain_gb_per_s: Option<Median>,
    drain_ratio: Option<Median>,
    /// From the package's last byte to the start of the guest.
    time_to_run_ms: Option<Median>,
    faults: Vec<Faults>,
}

/// One turn of one number of threads.
struct Turn {
    ours: LatencySummary,
    bare: LatencySummary,
    loaded: LatencySummary,
}

impl Faults {
    fn of(threads: usize, turns: &[Turn]) -> Self {
        let median = |of: fn(&Turn) -> f64| Median::of(turns.iter().map(of));
        Self {
            threads,
            p50_us: median(|turn| turn.ours.p50_us as f64),
            p99_us: median(|turn| turn.ours.p99_us as f64),
            bare_p50_us: median(|turn| turn.bare.p50_us as f64),
            bare_p99_us: median(|turn| turn.bare.p99_us as f64),
            p50_ratio: median(|turn| turn.ours.p50_us as f64 / turn.bare.p50_us as f64),
            p99_ratio: median(|turn| turn.ours.p99_us as f64 / turn.bare.p99_us as f64),
            loaded_p50_us: median(|turn| turn.loaded.p50_us as f64),
            loaded_p99_us: median(|turn| turn.loaded.p99_us as f64),
        }
    }

    fn text(&self) -> String {
        format!(
            "{} threads, us: p50 {}  p99 {}; bare: p50 {}  p99 {}; ours over its: p50 {}  p99 {}; with the rest behind: \
             p50 {}  p99 {}",
            self.threads,
            shown(self.p50_us, 0),
            shown(self.p99_us, 0),
            shown(self.bare_p50_us, 0),
            shown(self.bare_p99_us, 0),
            shown(self.p50_ratio, 2),
            shown(self.p99_ratio, 2),
            shown(self.loaded_p50_us, 0),
            shown(self.loaded_p99_us, 0)
        )
    }
}

/// Measures the drain rate, then each number of threads in turns.
///
/// # Errors
/// [`BenchError`].
pub fn run(args: &PostcopyArgs, cancel: &CancelToken) -> Result<(), BenchError> {
    match args.transport {
        Transport::Tcp => over_tcp(args, cancel),
        #[cfg(feature = "rdma")]
        Transport::Rdma => rdma::run(args, cancel),
        #[cfg(not(feature = "rdma"))]
        Transport::Rdma => Err(BenchError::NoRdma(Box::new(ramwire::transport::WhyNoRdma::NotBuilt))),
    }
}

fn over_tcp(args: &PostcopyArgs, cancel: &CancelToken) -> Result<(), BenchError> {
    let source = filled(args.ram)?;
    let way = Way { channels: args.channels, preempt: args.preempt, ..Way::default() };
    let (mut precopy, mut drained, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..args.pairs {
        let whole = || ours::run(&source, Way { postcopy: false, ..way }, cancel);
        let first = (turn % 2 == 0).then(whole).transpose()?;
        let drain = ours::run(&source, way, cancel)?;
        let whole = first.map_or_else(whole, Ok)?;
        precopy.push(args.ram as f64 / whole.seconds / 1e9);
        drained.push(args.ram as f64 / drain.seconds / 1e9);
        starts.push(drain.time_to_run.as_secs_f64() * 1e3);
    }
    let ratios = drained.iter().zip(&precopy).map(|(drain, whole)| drain / whole);
    let mut report = Report {
        version: 1,
        ram_bytes: args.ram,
        channels: args.channels,
        preempt: args.preempt,
        pairs: args.pairs,
        drain_ratio: Median::of(ratios),
        precopy_gb_per_s: Median::of(precopy.iter().copied()),
        drain_gb_per_s: Median::of(drained.iter().copied()),
        time_to_run_ms: Median::of(starts),
        faults: Vec::new(),
    };
    if !args.json {
        result_line!(
            "precopy {} GB/s, drain {} GB/s, ratio {}; the guest is started {} ms after its state has come",
            shown(report.precopy_gb_per_s, 2),
            shown(report.drain_gb_per_s, 2),
            shown(report.drain_ratio, 2),
            shown(report.time_to_run_ms, 2)
        );
    }
    let rate = report.drain_gb_per_s.map_or(0.0, |rate| rate.median) * 1e9 * BACKGROUND;
    for threads in &args.threads {
        let turns = turns(args, &source, *threads, Rate(rate as u64), cancel)?;
        let faults = Faults::of(*threads, &turns);
        if !args.json {
            result_line!("{}", faults.text());
        }
        report.faults.push(faults);
    }
    if args.json {
        result_line!("{}", serde_json::to_string(&report).unwrap_or_default());
    }
    Ok(())
}

fn turns(
    args: &PostcopyArgs,
    source: &Mapping,
    threads: usize,
    background: Rate,
    cancel: &CancelToken,
) -> Result<Vec<Turn>, BenchError> {
    let mut turns = Vec::new();
    for turn in 0..args.pairs {
        let asked = Way {
            channels: args.channels,
            preempt: args.preempt,
            threads,
            background: Some(Rate(64 << 10)),
            ..Way::default()
        };
        let loaded = Way { background: Some(background), ..asked };
        // Each is first in every second turn.
        let first = (turn % 2 == 1).then(|| bare::run(source, threads)).transpose()?;
        let ours = ours::run(source, asked, cancel)?.latency;
        let bare = first.map_or_else(|| bare::run(source, threads), Ok)?;
        let loaded = ours::run(source, loaded, cancel)?.latency;
        turns.push(Turn { ours, bare, loaded });
    }
    Ok(turns)
}

/// Memory whose pages all differ, and none of which is zero.
fn filled(bytes: u64) -> Result<Mapping, BenchError> {
    let mapping = memory(bytes)?;
    let mut state = 1u64;
    for page in 0..bytes / 4096 {
        let mut contents = [0; 4096];
        for word in contents.chunks_exact_mut(8) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&state.to_le_bytes());
        }
        if let Ok(span) = mapping.region().span(page * 4096, 4096) {
            span.copy_from(&contents);
        }
    }
    Ok(mapping)
}

/// New memory of whole pages.
fn memory(bytes: u64) -> Result<Mapping, BenchError> {
    Mapping::memfd("bench", bytes.next_multiple_of(4096)).map_err(|error| BenchError::Refused {
        who: "this host".into(),
        what: "memory".into(),
        answer: error.to_string(),
    })
}

/// The page that thread `thread` of `threads` touches at `step`, in an order without neighbours; `None` behind the last.
fn page_at(pages: u64, threads: usize, thread: usize, step: u64) -> Option<u64> {
    let at = step * threads as u64 + thread as u64;
    // A prime: it divides no number of pages that is measured.
    (at < pages).then(|| (u128::from(at) * 1_000_003 % u128::from(pages)) as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn threads_touch_each_page_once() {
        let touched = |thread| (0..).map_while(move |step| page_at(1000, 3, thread, step));
        let mut pages: Vec<u64> = (0..3).flat_map(touched).collect();
        pages.sort_unstable();
        assert_eq!(pages, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn both_handlers_bring_every_page() {
        let source = filled(4 << 20).unwrap();
        let cancel = CancelToken::default();
        assert!(bare::run(&source, 2).unwrap().count > 0);
        for (threads, channels, preempt) in [(0, 0, false), (2, 0, false), (2, 2, false), (2, 0, true)] {
            let way = Way { threads, channels, preempt, ..Way::default() };
            let run = ours::run(&source, way, &cancel).unwrap();
            assert!(run.seconds > 0.0, "{threads}");
        }
    }
}
