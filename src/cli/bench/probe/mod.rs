//! `ramwire bench latency` and `ramwire bench bandwidth`: messages between two processes or hosts.

mod answer;
mod files;
mod measure;
mod messages;
mod record;
mod report;
mod sockets;
#[cfg(feature = "rdma")]
mod verbs;

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ramwire::sys::CancelToken;

use super::BenchError;
use crate::cli::common;
use crate::cli::output::{result_line, result_text};
use answer::ToAnswer;
use measure::Pace;
use messages::{Kind, MessageStream, Op, ProbeTransport, Reply, Request, failed};
use record::Recorded;
use report::{Case, Report};
use sockets::Sockets;

/// Arguments of `ramwire bench latency` and `ramwire bench bandwidth`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  ramwire bench latency --transport tcp --size 4K --duration 2s --output /tmp/tcp
  ramwire bench latency --transport rdma --op write --size 4K
  ramwire bench bandwidth --transport rdma --size 64K,1M --depth 64
  ramwire bench latency --listen 192.0.2.1:7000            (on one host)
  ramwire bench latency --connect 192.0.2.1:7000 --rate 1000   (on another)

Without --listen or --connect the other end is a process on this host. With --output PREFIX each measurement writes
PREFIX.NAME.hgrm (percentiles) and PREFIX.NAME.hlog (histograms by the second) in HdrHistogram's formats, with --rate
PREFIX.NAME.corrected.hgrm too, and all together PREFIX.svg and PREFIX.json.")]
pub struct ProbeArgs {
    /// Transport of the messages
    #[arg(long, value_enum, default_value_t = ProbeTransport::Tcp)]
    transport: ProbeTransport,
    /// What to measure, with commas between; over sockets always send [default over RDMA: all]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "OPS")]
    op: Vec<Op>,
    /// Bytes of a message, with commas between
    #[arg(long, value_delimiter = ',', default_value = "4K,64K,1M", value_parser = message_size, value_name = "SIZES")]
    size: Vec<usize>,
    /// Outstanding requests; always 1 for messages there and back [default: 1; of bandwidth: 16]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=messages::MAX_REQUESTS as i64), value_name = "N")]
    depth: Option<u16>,
    /// How long each measurement takes
    #[arg(long, default_value = "5s", value_parser = duration)]
    duration: Duration,
    /// Start this many messages a second, on time even if earlier ones are slow; without it as many as possible
    #[arg(long, value_parser = rate, value_name = "PER_SECOND")]
    rate: Option<f64>,
    /// Be the answering end: listen at HOST:PORT for one measuring end
    #[arg(long, value_name = "HOST:PORT", value_parser = place, conflicts_with = "connect")]
    listen: Option<String>,
    /// The answering end listens at HOST:PORT
    #[arg(long, value_name = "HOST:PORT", value_parser = place)]
    connect: Option<String>,
    /// At the answering end, over RDMA: IP address of the device; otherwise the one of the first usable device
    #[arg(long, value_name = "ADDRESS")]
    host: Option<String>,
    /// Prefix of the files to write
    #[arg(long, value_name = "PREFIX")]
    output: Option<PathBuf>,
    /// One JSON object on standard output instead of text
    #[arg(long)]
    json: bool,
}

fn place(text: &str) -> Result<String, String> {
    let port =
        text.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
    match port {
        Some(Ok(_)) => Ok(text.to_owned()),
        _ => Err(format!("{text:?} is not HOST:PORT")),
    }
}

fn message_size(text: &str) -> Result<usize, String> {
    let bytes = common::bytes(text)?;
    let fits = usize::try_from(bytes).ok().filter(|bytes| (1..=messages::MAX_BYTES).contains(bytes));
    fits.ok_or_else(|| "write 1 byte to 64M".into())
}

fn duration(text: &str) -> Result<Duration, String> {
    let longest = Duration::from_secs(600);
    let time = common::seconds(text.strip_suffix('s').unwrap_or(text))?;
    let fits = Some(time).filter(|time| !time.is_zero() && *time <= longest);
    fits.ok_or_else(|| "write seconds up to 600, like 5s".into())
}

fn rate(text: &str) -> Result<f64, String> {
    let number: Option<f64> = text.trim_end_matches("/s").parse().ok();
    number
        .filter(|rate| (0.1..=10e6).contains(rate))
        .ok_or_else(|| "write 0.1 to 10000000 messages a second".into())
}

/// Runs one of the two.
///
/// # Errors
/// [`BenchError`].
pub fn run(args: &ProbeArgs, kind: Kind, cancel: &CancelToken) -> Result<(), BenchError> {
    if let Some(address) = &args.listen {
        return answer::serve(address, args.host.as_deref());
    }
    // Written last, and reported before anything is measured.
    let svg = args.output.as_deref().map(|prefix| file_of(prefix, ".svg")).transpose()?;
    drop(svg);
    // Killed at the end, also after an error.
    let mut _other = None;
    let address = match &args.connect {
        Some(address) => address.clone(),
        None => {
            let other = Other::start(args.host.as_deref())?;
            let address = other.address.clone();
            _other = Some(other);
            address
        }
    };
    let socket = TcpStream::connect(&address).map_err(failed("connecting to the other end"))?;
    let mut messages = MessageStream::new(socket).map_err(failed("connecting to the other end"))?;
    let pace =
        Pace { duration: args.duration, every: args.rate.map(|rate| Duration::from_secs_f64(1.0 / rate)) };
    let mut cases = Vec::new();
    for op in ops(args, kind) {
        for size in &args.size {
            let request = request(args, kind, op, *size);
            let recorded = measure(&mut messages, &request, pace, cancel)?;
            let case = Case::new(request, recorded);
            if !args.json {
                result_text!("{}", case.text());
            }
            cases.push(case);
        }
    }
    let report = Report::new(kind, args.rate, cases);
    if args.json {
        result_line!("{}", serde_json::json!(report));
    }
    args.output.as_ref().map_or(Ok(()), |prefix| write_files(prefix, &report))
}

pub use messages::Kind as ProbeKind;

fn ops(args: &ProbeArgs, kind: Kind) -> Vec<Op> {
    match (args.transport, kind) {
        (ProbeTransport::Tcp | ProbeTransport::Unix, _) => vec![Op::Send],
        (ProbeTransport::Rdma, _) if !args.op.is_empty() => args.op.clone(),
        (ProbeTransport::Rdma, Kind::Latency) => vec![Op::Write, Op::WriteComplete, Op::Read, Op::Send],
        (ProbeTransport::Rdma, Kind::Bandwidth) => vec![Op::WriteComplete, Op::Read, Op::Send],
    }
}

fn request(args: &ProbeArgs, kind: Kind, op: Op, size: usize) -> Request {
    let default = if kind == Kind::Bandwidth { 16 } else { 1 };
    let mut request = Request { carrier: args.transport, op, kind, size, depth: 1 };
    if !request.is_echo() {
        request.depth = args.depth.map_or(default, usize::from);
    }
    request
}

fn measure(
    messages: &mut MessageStream,
    request: &Request,
    pace: Pace,
    cancel: &CancelToken,
) -> Result<Recorded, BenchError> {
    messages.say(&ToAnswer::Measure(request.clone()))?;
    let (host, port) = match messages.receive()? {
        Some(Reply::At(host, port)) => (host, port),
        other => return Err(refused(other)),
    };
    let recorded = match request.carrier {
        #[cfg(feature = "rdma")]
        ProbeTransport::Rdma => {
            let mut line = verbs::Verbs::connect(request, &host, port)?;
            ready(messages)?;
            run_loop(&mut line, request, pace, cancel)
        }
        #[cfg(not(feature = "rdma"))]
        ProbeTransport::Rdma => Err(BenchError::NoRdma(Box::new(ramwire::transport::WhyNoRdma::NotBuilt))),
        ProbeTransport::Tcp | ProbeTransport::Unix => {
            let mut line = Sockets::connect(request, &host, port)?;
            ready(messages)?;
            run_loop(&mut line, request, pace, cancel)
        }
    };
    messages.say(&ToAnswer::Done)?;
    recorded
}

fn run_loop<L: measure::Echo + measure::Flow>(
    line: &mut L,
    request: &Request,
    pace: Pace,
    cancel: &CancelToken,
) -> Result<Recorded, BenchError> {
    match request.is_echo() {
        true => measure::echoes(line, pace, cancel),
        false => measure::requests(line, request.depth, pace, cancel),
    }
}

fn ready(messages: &mut MessageStream) -> Result<(), BenchError> {
    match messages.receive()? {
        Some(Reply::Ready) => Ok(()),
        other => Err(refused(other)),
    }
}

fn refused(reply: Option<Reply>) -> BenchError {
    let answer = match reply {
        Some(Reply::No(why)) => why,
        Some(other) => format!("it answered {other:?}"),
        None => "it closed the connection; see what it printed".into(),
    };
    BenchError::Refused { who: "the other end".into(), what: "to measure".into(), answer }
}

/// One of the files of `--output`, with what it has.
fn file_of(prefix: &std::path::Path, suffix: &str) -> Result<std::fs::File, BenchError> {
    let mut path = prefix.as_os_str().to_owned();
    path.push(suffix);
    let opened = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(&path);
    let who = || format!("--output {}", std::path::Path::new(&path).display());
    opened.map_err(|source| BenchError::Io { who: who(), doing: "making the file", source })
}

fn write_files(prefix: &std::path::Path, report: &Report) -> Result<(), BenchError> {
    let write = |suffix: &str, bytes: &[u8]| {
        let mut path = prefix.as_os_str().to_owned();
        path.push(suffix);
        std::fs::write(path, bytes).map_err(failed("writing a file of --output"))
    };
    for case in &report.cases {
        let (name, recorded) = (case.name(), case.recorded());
        write(&format!(".{name}.hgrm"), files::hgrm(&recorded.uncorrected).as_bytes())?;
        write(&format!(".{name}.hlog"), &files::hlog(recorded)?)?;
        if let Some(corrected) = &recorded.corrected {
            write(&format!(".{name}.corrected.hgrm"), files::hgrm(corrected).as_bytes())?;
        }
    }
    let svg = report.svg().map_err(|error| failed("drawing")(std::io::Error::other(error.to_string())))?;
    write(".svg", svg.as_bytes())?;
    write(".json", serde_json::json!(report).to_string().as_bytes())
}

/// The answering end on this host: another process of this program.
struct Other {
    child: Child,
    address: String,
}

impl Other {
    fn start(host: Option<&str>) -> Result<Self, BenchError> {
        let program = std::env::current_exe().map_err(failed("starting the other end"))?;
        let mut command = Command::new(program);
        command.args(["bench", "latency", "--listen", "127.0.0.1:0"]);
        command.args(host.into_iter().flat_map(|host| ["--host", host]));
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut other =
            Self { child: child.map_err(failed("starting the other end"))?, address: String::new() };
        let mut line = String::new();
        if let Some(stdout) = other.child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line).map_err(failed("starting the other end"))?;
        }
        other.address = line.trim().strip_prefix("listening ").map(str::to_owned).ok_or_else(|| {
            failed("starting the other end")(std::io::Error::other(format!("it answered {line:?}")))
        })?;
        Ok(other)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // Both calls fail for a process that was already reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_times_and_rates_are_read_as_written() {
        assert_eq!((message_size("4K"), message_size("64M")), (Ok(4096), Ok(64 << 20)));
        assert!(message_size("0").is_err() && message_size("65M").is_err());
        assert_eq!(
            (duration("5s"), duration("0.5")),
            (Ok(Duration::from_secs(5)), Ok(Duration::from_millis(500)))
        );
        assert!(duration("0s").is_err() && duration("601").is_err() && duration("x").is_err());
        assert_eq!((rate("1000"), rate("2.5/s")), (Ok(1000.0), Ok(2.5)));
        assert!(rate("0").is_err() && rate("-1").is_err() && rate("NaN").is_err());
    }
}
