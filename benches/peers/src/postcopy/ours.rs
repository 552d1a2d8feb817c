//! ramwire's run: two sessions that switch before the first page, and threads that touch the arriving guest's pages.

use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ramwire::engine::{Ending, Outcome, PostcopyRule};
use ramwire::error::Chain;
use ramwire::guest::{DeviceState, GuestControl};
use ramwire::observe::LatencySummary;
use ramwire::session::{
    DestinationGuest, DestinationReport, DestinationSession, DestinationSettings, PostcopySettings, Redial,
    SourceGuest, SourceSession, SourceSettings,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::{CancelToken, Mapping, Stop};
use ramwire::transport::{
    Address, AllowList, ChannelOptions, ConnectionOptions, Listener, StreamOptions, open_source,
};
use ramwire::units::Rate;

use super::{bare, memory};
use crate::BenchError;
use crate::migrate::own::{guest, standing_still};

/// How a guest moves, and who touches it.
#[derive(Clone, Copy, Debug)]
pub struct Way {
    /// Page channels.
    pub channels: u8,
    /// Threads that touch its pages.
    pub threads: usize,
    /// Bytes a second of pages that nobody waits for; `None`: no limit.
    pub background: Option<Rate>,
    /// It is switched before the first page; else it moves whole.
    pub postcopy: bool,
    /// Requested pages have a connection of their own.
    pub preempt: bool,
}

impl Default for Way {
    fn default() -> Self {
        Self { channels: 0, threads: 0, background: None, postcopy: true, preempt: false }
    }
}

/// A run.
pub struct Run {
    /// From the start until every page is in place.
    pub seconds: f64,
    /// From the package's last byte to the start of the guest; 0 without a switch.
    pub time_to_run: Duration,
    /// From the report of a fault to its page in place.
    pub latency: LatencySummary,
}

/// Its threads begin when the guest is started.
#[derive(Clone)]
struct Touched {
    memory: Arc<Mapping>,
    threads: usize,
    running: Arc<Mutex<Vec<JoinHandle<()>>>>,
    /// When that was.
    since: Arc<OnceLock<Instant>>,
}

impl Touched {
    fn new(memory: Arc<Mapping>, threads: usize) -> Self {
        Self { memory, threads, running: Arc::default(), since: Arc::default() }
    }

    /// Waits for its threads.
    fn join(&self) {
        for thread in self.running.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = thread.join();
        }
    }
}

impl GuestControl for Touched {
    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        let _ = self.since.set(Instant::now());
        let pages = self.memory.region().len() / 4096;
        for thread in 0..self.threads {
            let (memory, threads) = (Arc::clone(&self.memory), self.threads);
            let job = move || bare::touch(&memory, pages, threads, thread);
            let started = std::thread::Builder::new().name("touches".into()).spawn(job)?;
            self.running.lock().unwrap_or_else(PoisonError::into_inner).push(started);
        }
        Ok(())
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }

    /// Nothing of its memory is freed while it runs.
    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        true
    }
}

impl DeviceState for Touched {
    fn save(&mut self, _out: &mut dyn io::Write) -> io::Result<()> {
        Ok(())
    }

    fn load(&mut self, _from: &mut dyn io::Read) -> io::Result<()> {
        Ok(())
    }
}

fn options(way: Way) -> ConnectionOptions {
    let mut options = ConnectionOptions::default();
    let mut channels = ChannelOptions::default();
    channels.count = way.channels;
    options.channels = channels;
    options.rdma.postcopy = way.postcopy;
    options
}

/// What a destination in this process has seen, with its source in another.
#[cfg(feature = "rdma")]
pub struct Arrived {
    /// From the start of the guest until the migration has ended, all pages in place.
    pub seconds: f64,
    /// From the report of a fault to its page in place.
    pub latency: LatencySummary,
}

/// Receives a guest of `bytes` of memory at `any`, from the source that `start` starts with the address that it is to
/// connect to.
///
/// # Errors
/// [`BenchError`].
#[cfg(feature = "rdma")]
pub fn arrive<T>(
    any: &Address,
    bytes: u64,
    way: Way,
    cancel: &CancelToken,
    start: impl FnOnce(&Address) -> Result<T, BenchError>,
) -> Result<(Arrived, T), BenchError> {
    if cancel.is_cancelled() {
        return Err(BenchError::Cancelled);
    }
    let there = Arc::new(memory(bytes)?);
    let stop = Stop::on(cancel);
    let listener = Listener::bind(any, AllowList::default(), &stop)?;
    let source = start(listener.address())?;
    let touched = Touched::new(there, way.threads);
    let report = receive(listener, &touched, way, &stop)?;
    let ended = Instant::now();
    touched.join();
    if report.ending != Ending::Running {
        return Err(refused("to receive", report.error.map(|e| Chain(&e).to_string()).unwrap_or_default()));
    }
    let began = touched.since.get().copied().unwrap_or(ended);
    let latency = report.missing_pages.map_or_else(LatencySummary::default, |missing| missing.latency);
    Ok((Arrived { seconds: (ended - began).as_secs_f64(), latency }, source))
}

/// Migrates the memory of `source` to another end in this process.
///
/// # Errors
/// [`BenchError`].
pub fn run(source: &Mapping, way: Way, cancel: &CancelToken) -> Result<Run, BenchError> {
    if cancel.is_cancelled() {
        return Err(BenchError::Cancelled);
    }
    let there = Arc::new(memory(source.region().len())?);
    let any = Address::tcp("127.0.0.1", 0);
    let stop = Stop::on(cancel);
    let listener = Listener::bind(&any, AllowList::default(), &stop)?;
    let address = listener.address().clone();
    let touched = Touched::new(there, way.threads);
    let began = Instant::now();
    let (sent, arrived) = std::thread::scope(|scope| {
        let arriving = scope.spawn(|| receive(listener, &touched, way, &stop));
        let sent = send(source, &address, way, &stop).map(SourceSession::run);
        (sent, arriving.join())
    });
    let seconds = began.elapsed().as_secs_f64();
    let (sent, arrived) = (sent?, arrived.map_err(|_| refused("to receive", "a thread panicked".into()))??);
    touched.join();
    match (sent.outcome, arrived.ending) {
        (Outcome::Completed, Ending::Running) => {}
        _ => {
            let error = sent.error.or(arrived.error).map(|error| Chain(&error).to_string());
            return Err(refused("to migrate", error.unwrap_or_default()));
        }
    }
    let missing = arrived.missing_pages.as_ref();
    Ok(Run {
        seconds,
        time_to_run: missing.map_or(Duration::ZERO, |missing| missing.time_to_run),
        latency: missing.map_or_else(LatencySummary::default, |missing| missing.latency),
    })
}

fn refused(what: &str, answer: String) -> BenchError {
    BenchError::Refused { who: "ramwire".into(), what: what.into(), answer }
}

/// The source's end.
///
/// # Errors
/// [`BenchError`].
pub fn send(source: &Mapping, address: &Address, way: Way, stop: &Stop) -> Result<SourceSession, BenchError> {
    let memory = guest(source)?;
    let connection = open_source(address, memory.clone(), &options(way), stop)?;
    let guest = SourceGuest { memory, dirty: Vec::new(), control: Box::new(standing_still()) };
    let mut settings =
        SourceSettings::new(Configuration { machine: "none".into(), ..Configuration::default() });
    settings.guest_is_paused = true;
    settings.same_host = true;
    settings.postcopy = way.postcopy.then(|| {
        let mut postcopy = PostcopySettings::new(PostcopyRule::AfterRounds(0));
        // Over RDMA the destination has the limit.
        postcopy.max_bandwidth = way.background.filter(|_| address.scheme() != "rdma");
        postcopy.preempt = way.preempt;
        postcopy
    });
    // Nothing fits it: the switch comes before the first page.
    settings.downtime_limit = if way.postcopy { Duration::ZERO } else { settings.downtime_limit };
    let again = Redial::new(address.clone(), StreamOptions::default());
    Ok(SourceSession::new(guest, connection, settings).with_reconnect(Box::new(again)))
}

fn receive(
    mut listener: Listener,
    touched: &Touched,
    way: Way,
    stop: &Stop,
) -> Result<DestinationReport, BenchError> {
    let connection = listener.accept_connection(&options(way), stop)?;
    let memory = Box::new(guest(&touched.memory)?);
    let mut settings = DestinationSettings::default();
    settings.postcopy = way.postcopy;
    settings.max_read_bandwidth = way.background;
    let guest = DestinationGuest { memory, control: Box::new(touched.clone()) };
    let session = DestinationSession::new(guest, connection, settings);
    if listener.address().scheme() == "rdma" {
        return Ok(session.run());
    }
    let next = move |stop: &Stop| listener.accept(&StreamOptions::default(), stop);
    Ok(session.with_next_connection(Box::new(next)).run())
}
