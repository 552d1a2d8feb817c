//! A relay: a destination whose received pages are the dirty source of a source.
//!
//! ```text
//! upstream guest --stream--> destination session --pages--> memory --pages--> source session --stream--> far end
//!                               marks what came  ----------> sync takes it
//! ```
//!
//! The guest runs on at its source until the source switches over by itself; then the relay sends what is
//! left, the device state, and passes back what the far end says.
//!
//! Pages that come by RDMA are seen by nobody as they come; they are found by their content when a round is over
//! (`scan`).
//!
//! # Order that must hold
//!
//! The upstream is asked for the guest (READY) only after the far end could take it, and told `complete` only after the
//! far end has said so. The bytes of a page are in place
//! before it is marked, and the mark is taken before the bytes are read again.

mod content_scan;
mod forward;
#[cfg(test)]
mod handover_tests;
#[cfg(test)]
mod session_tests;

use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

use crate::engine::Outcome;
use crate::guest::{DirtySource, GuestControl, GuestMemory, MappedGuest, PageObserver};
use crate::observe::{SharedStatistics, Status};
use crate::ram::RamBlock;
use crate::sys::{CancelToken, Mapping, Stop, memory_room};
use crate::transport::{ByteSink, ByteSource};
use crate::units::{PageSize, Rate};

use crate::session::callback::quietly;
use crate::session::destination::{Arrival, DestinationReport, DestinationSession, Incoming, MemoryProvider};
use crate::session::source::{SourceConnection, SourceGuest, SourceReport, SourceSession, Upstream};
use crate::session::{Breakage, DestinationSettings, Error, SourceSettings};
pub(super) use content_scan::ContentScan;
pub use content_scan::ScanReport;
use forward::Arrivals;

/// How often a relay that holds back looks whether it may read on.
const LOOK: Duration = Duration::from_millis(2);

/// Longest time the outgoing connection may need for what is pending: it adds to the guest's downtime.
const MOST_BACKLOG: Duration = Duration::from_millis(50);

/// Pages for which an idle far side begins a round at once; fewer wait for more, a slice at most.
const WORTH_A_ROUND: u64 = 256;

/// What may be pending before the outgoing rate is known.
const FIRST_BACKLOG: u64 = 64 << 20;

/// Makes the way to the far end once the guest's memory is there.
pub type ConnectFn = dyn FnOnce(Arc<dyn GuestMemory>) -> Result<SourceConnection, Error> + Send;

/// What an operator must know while a relay runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The source opened no return path: it can't be told whether its guest arrived.
    NoReturnPath,
    /// The far end was given the guest and fell silent. The source is told nothing, since either word may let
    /// the guest run twice; a cancel tells it that the migration failed, and it resumes.
    InDoubt {
        /// What happened.
        why: String,
    },
}

/// Told of a [`Notice`] the moment it is due.
pub type NoticeFn = dyn Fn(&Notice) + Send + Sync;

/// How a relay ended.
#[derive(Debug)]
pub struct RelayReport {
    /// The side towards the guest's source.
    pub received: DestinationReport,
    /// The side towards the far end; `None` if it came to nothing before.
    pub sent: Option<SourceReport>,
    /// When the first page reached the far end's connection, since the relay began.
    pub first_page_sent: Option<Duration>,
    /// When the last page of the guest's first round had come, since the relay began.
    pub ram_complete: Option<Duration>,
    /// The guest as it stood, for keeping it where neither side has it for certain.
    pub kept: Option<Kept>,
}

/// RAM and device state that a relay holds.
pub struct Kept {
    /// What the source announced.
    pub incoming: Incoming,
    /// The pages.
    pub memory: Arc<dyn GuestMemory>,
    /// The device state, if it has come.
    pub state: Option<Vec<u8>>,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").field("incoming", &self.incoming).finish_non_exhaustive()
    }
}

/// What the two sides of a relay know of each other.
#[derive(Default)]
struct Shared {
    state: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Default)]
struct Progress {
    ram_complete: bool,
    upstream_ended: bool,
    device_state: Option<Vec<u8>>,
    /// The far end has everything and could take the guest.
    far_is_ready: bool,
    /// The far side's session is over.
    far_ended: bool,
    /// The guest was given to us: hand it on.
    handed_over: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until `ready`, the upstream's end, or `time` from now.
    fn wait(&self, time: Duration, ready: impl Fn(&Progress) -> bool) -> MutexGuard<'_, Progress> {
        // Far away: as long as it takes.
        let until = Instant::now() + time.min(Duration::from_secs(1 << 30));
        let mut progress = self.lock();
        while !ready(&progress) && !progress.upstream_ended {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            progress = self.changed.wait_timeout(progress, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        progress
    }
}

/// A relay before it runs.
pub struct Relay {
    /// Where the upstream's stream comes from.
    pub source: Box<dyn ByteSource>,
    /// Where the upstream is answered; `None` for files and pipes.
    pub back: Option<Box<dyn ByteSink>>,
    /// Makes the way to the far end.
    pub connect: Box<ConnectFn>,
    /// For the side towards the upstream.
    pub incoming: DestinationSettings,
    /// For the far side; completed with what the upstream announces.
    pub outgoing: SourceSettings,
    /// Ask for huge pages for the guest's RAM ([`Mapping::advise_huge_pages`]).
    pub huge_pages: bool,
    /// Ends the relay; the guest then stays at its source.
    pub cancel: CancelToken,
    /// Told what an operator must know.
    pub notice: Arc<NoticeFn>,
    /// The far side's figures while it runs.
    pub statistics: SharedStatistics,
}

impl Relay {
    /// Runs it to its end.
    pub fn run(self) -> RelayReport {
        run(self, Breakage::None)
    }
}

pub(super) fn run(relay: Relay, breakage: Breakage) -> RelayReport {
    let Relay { source, back, connect, incoming, outgoing, huge_pages, cancel, notice, statistics } = relay;
    let shared = Arc::new(Shared::default());
    let (give, far_end) = bounded(1);
    let began = Instant::now();
    let middle = Middle {
        shared: Arc::clone(&shared),
        connect: Some(connect),
        outgoing: Some(outgoing),
        cancel: cancel.clone(),
        bitmap: None,
        memory: None,
        backlog: None,
        give: Some(give),
        began,
        ram_complete: Arc::default(),
        notice: Arc::clone(&notice),
        statistics,
    };
    let ram_complete = Arc::clone(&middle.ram_complete);
    let memory = RelayMemory { huge_pages, ..RelayMemory::default() };
    let held = Arc::clone(&memory.made);
    let control = Box::new(Forwarder {
        shared: Arc::clone(&shared),
        far_end: far_end.clone(),
        sent: Arc::default(),
        cancel: cancel.clone(),
        notice: Arc::clone(&notice),
    });
    let sent = Arc::clone(&control.sent);
    let mut session = DestinationSession::new(source, back, Box::new(memory), control, incoming)
        .with_arrival(Box::new(middle))
        .with_cancel(cancel.clone());
    session.breakage = breakage;
    let received = session.run();
    // Whatever happened: the far side must not wait for us any more.
    shared.change(|progress| progress.upstream_ended = true);
    let report = lock(&sent).take().or_else(|| far_end.recv().ok());
    let first_page_sent = report.as_ref().and_then(|report| report.first_page_sent);
    let (sent, delay) = match report {
        Some(far) => (Some(far.report), far.began.saturating_duration_since(began)),
        None => (None, Duration::ZERO),
    };
    let kept = lock(&held).take().zip(received.incoming.clone()).map(|(memory, incoming)| Kept {
        incoming,
        memory,
        state: shared.lock().device_state.take(),
    });
    RelayReport {
        received,
        first_page_sent: first_page_sent.map(|time| time + delay),
        ram_complete: *lock(&ram_complete),
        sent,
        kept,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Anonymous memory for whatever is announced.
#[derive(Default)]
struct RelayMemory {
    made: Arc<Mutex<Option<Arc<dyn GuestMemory>>>>,
    huge_pages: bool,
}

impl MemoryProvider for RelayMemory {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        let page = incoming.configuration.page_size.unwrap_or(PageSize::SIZE_4K);
        let ram: u64 = incoming.blocks.iter().map(|block| block.used_length).sum();
        if let Some(room) = memory_room().filter(|room| room.bytes < ram) {
            let (needed, there) = (ram >> 20, room.bytes >> 20);
            return Err(Error::Config {
                what: format!("the guest has {needed} MiB of RAM, and {there} MiB are free {}", room.bound),
                remedy: "a relay holds all of the guest's RAM; run it where there is room",
            });
        }
        let mut builder = MappedGuest::builder(page);
        for block in &incoming.blocks {
            let mapping = Mapping::private(block.used_length, self.huge_pages);
            let mapping = mapping.map_err(|error| Error::Config {
                what: error.to_string(),
                remedy: "a relay holds all of the guest's RAM; run it where there is room",
            })?;
            builder = builder.mapping(block.clone(), &mapping);
        }
        let memory: Arc<dyn GuestMemory> = Arc::new(builder.build()?);
        *lock(&self.made) = Some(Arc::clone(&memory));
        Ok(memory)
    }

    /// Mapped for this guest.
    fn is_zeroed(&self, _block: &RamBlock) -> bool {
        true
    }
}

/// The far side's session as it ended.
struct FarEnd {
    report: SourceReport,
    began: Instant,
    first_page_sent: Option<Duration>,
}

/// Sees pages arrive, and starts the far side with the first of them.
struct Middle {
    shared: Arc<Shared>,
    connect: Option<Box<ConnectFn>>,
    outgoing: Option<SourceSettings>,
    cancel: CancelToken,
    bitmap: Option<Arc<Arrivals>>,
    memory: Option<Arc<dyn GuestMemory>>,
    backlog: Option<Backlog>,
    give: Option<Sender<FarEnd>>,
    began: Instant,
    ram_complete: Arc<Mutex<Option<Duration>>>,
    notice: Arc<NoticeFn>,
    statistics: SharedStatistics,
}

/// How much has come and not gone.
struct Backlog {
    bitmap: Arc<Arrivals>,
    statistics: SharedStatistics,
    page_bytes: u64,
    downtime_limit: Duration,
    looked: Instant,
    /// The source has a return path.
    source_can_be_told: bool,
}

impl Backlog {
    /// True if more is pending than the far side's connection moves in half the downtime limit, or in
    /// [`MOST_BACKLOG`].
    ///
    /// # Errors
    /// The far side has ended: nothing that still comes can be handed on, and the source can be told.
    fn is_full(&mut self) -> Result<bool, Error> {
        let now = Instant::now();
        if now.duration_since(self.looked) < LOOK {
            return Ok(false);
        }
        self.looked = now;
        let far = self.statistics.snapshot();
        if matches!(far.status, Status::Failed | Status::Cancelled | Status::InDoubt) {
            if !self.source_can_be_told {
                // The source may have written its last byte already and let go: what comes is to be kept.
                return Ok(false);
            }
            let why = far.error.unwrap_or_else(|| "it was cancelled".into());
            return Err(Error::PeerFailed { why: format!("the far end of the relay: {why}") });
        }
        let pending = self.bitmap.pending() * self.page_bytes + far.remaining;
        let time = (self.downtime_limit / 2).min(MOST_BACKLOG);
        let allowed = if far.throughput == 0 { FIRST_BACKLOG } else { Rate(far.throughput).bytes_in(time) };
        Ok(pending > allowed.max(1 << 20))
    }
}

impl Arrival for Middle {
    fn began(&mut self, incoming: &Incoming, memory: &Arc<dyn GuestMemory>) -> Result<(), Error> {
        let (Some(connect), Some(mut settings), Some(give)) =
            (self.connect.take(), self.outgoing.take(), self.give.take())
        else {
            return Ok(());
        };
        if !incoming.has_return_path {
            (self.notice)(&Notice::NoReturnPath);
        }
        settings.adopt(incoming);
        settings.all_dirty_at_start = false;
        let Some(bitmap) = self.bitmap.clone() else { return Ok(()) };
        let connection = connect(Arc::clone(memory))?;
        let guest = SourceGuest {
            memory: Arc::clone(memory),
            dirty: vec![Arc::clone(&bitmap) as Arc<dyn DirtySource>],
            control: Box::new(StoppedUpstream(Arc::clone(&self.shared))),
        };
        let (spawner, downtime_limit) = (settings.spawner.clone(), settings.downtime_limit);
        let session = SourceSession::new(guest, connection, settings)
            .with_upstream(Box::new(WaitForUpstream {
                shared: Arc::clone(&self.shared),
                arrivals: Arc::clone(&bitmap),
            }))
            .with_cancel(self.cancel.clone())
            .with_statistics(self.statistics.clone());
        let statistics = session.statistics();
        self.backlog = Some(Backlog {
            bitmap: Arc::clone(&bitmap),
            statistics,
            page_bytes: memory.table().page().bytes(),
            downtime_limit,
            looked: Instant::now(),
            source_can_be_told: incoming.has_return_path,
        });
        self.memory = Some(Arc::clone(memory));
        let shared = Arc::clone(&self.shared);
        let far_side = move || {
            let began = Instant::now();
            let report = session.run();
            shared.change(|progress| progress.far_ended = true);
            let first_page_sent = report.first_page_sent;
            // The receiver is gone only if the relay itself is.
            let _ = give.send(FarEnd { report, began, first_page_sent });
        };
        spawner.spawn("ramwire-far", Box::new(far_side))?;
        Ok(())
    }

    fn watch(&mut self, memory: &Arc<dyn GuestMemory>) -> Arc<dyn PageObserver> {
        let bitmap = Arc::new(Arrivals::new(memory.table()));
        self.bitmap = Some(Arc::clone(&bitmap));
        bitmap
    }

    fn between_reads(&mut self) -> Result<(), Error> {
        if self.bitmap.as_ref().is_some_and(|bitmap| bitmap.pending() >= WORTH_A_ROUND) {
            self.shared.change(|_| ());
        }
        while let Some(backlog) = &mut self.backlog
            && backlog.is_full()?
        {
            if self.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn ram_complete(&mut self, scan: Option<Duration>) -> Result<(), Error> {
        *lock(&self.ram_complete) = Some(self.began.elapsed());
        if let Some(took) = scan {
            self.statistics.update(|s| s.downtime_parts.scan_ms = took.as_secs_f64() * 1e3);
        }
        self.shared.change(|progress| progress.ram_complete = true);
        Ok(())
    }
}

/// The far side's question: has the guest stopped, and has its last page come? It goes on as soon as there is
/// enough to send, so that the last pages leave while their successors still come.
struct WaitForUpstream {
    shared: Arc<Shared>,
    arrivals: Arc<Arrivals>,
}

impl Upstream for WaitForUpstream {
    fn wait(&mut self, time: Duration) -> Result<bool, Error> {
        let worth_it = || self.arrivals.pending() >= WORTH_A_ROUND;
        let progress = self.shared.wait(time, |progress| progress.ram_complete || worth_it());
        if progress.upstream_ended && !progress.ram_complete {
            return Err(upstream_lost());
        }
        Ok(progress.ram_complete)
    }

    fn wait_given(&mut self, time: Duration) -> Result<bool, Error> {
        self.shared.change(|progress| progress.far_is_ready = true);
        let progress = self.shared.wait(time, |progress| progress.handed_over);
        match (progress.handed_over, progress.upstream_ended) {
            (false, true) => Err(upstream_lost()),
            (given, _) => Ok(given),
        }
    }
}

fn upstream_lost() -> Error {
    Error::PeerFailed { why: "the guest's source ended its migration; the guest runs on there".into() }
}

/// The far side's guest: it stood still before it got here.
struct StoppedUpstream(Arc<Shared>);

impl GuestControl for StoppedUpstream {
    /// The relay's own memory stays as it is.
    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        true
    }

    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Waits for the upstream's device state; the upstream's own session bounds the wait.
    fn save_devices(&mut self, out: &mut dyn Write) -> io::Result<()> {
        let progress = self.0.wait(Duration::MAX, |progress| progress.device_state.is_some());
        match &progress.device_state {
            Some(state) => out.write_all(state),
            None => Err(io::Error::other(upstream_lost())),
        }
    }

    fn load_devices(&mut self, _from: &mut dyn Read) -> io::Result<()> {
        Err(io::Error::other("the far side of a relay only sends"))
    }
}

/// The near side's guest: it "runs" when the far end says so.
struct Forwarder {
    shared: Arc<Shared>,
    far_end: Receiver<FarEnd>,
    sent: Arc<Mutex<Option<FarEnd>>>,
    cancel: CancelToken,
    notice: Arc<NoticeFn>,
}

impl GuestControl for Forwarder {
    /// The relay's own memory stays as it is.
    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        true
    }

    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// The guest is ours: hand it on, and come back with the far end's word.
    fn resume(&mut self) -> io::Result<()> {
        self.shared.change(|progress| progress.handed_over = true);
        let far = self.far_end.recv().map_err(|_| io::Error::other("the far side never began"))?;
        let outcome = far.report.outcome;
        let why = far.report.error.as_ref().map(ToString::to_string).unwrap_or_default();
        *lock(&self.sent) = Some(far);
        match outcome {
            Outcome::Completed => Ok(()),
            Outcome::StaysHere(_) => Err(io::Error::other(format!("the far end did not take it: {why}"))),
            Outcome::InDoubt => {
                // Whatever becomes of the notice: the source must hear nothing.
                quietly("telling that the guest is in doubt", || {
                    (self.notice)(&Notice::InDoubt { why: why.clone() });
                });
                // Silence is the only word that can't let the guest run twice.
                Stop::on(&self.cancel).sleep(Duration::MAX);
                Err(io::Error::other(format!("the far end was given the guest and fell silent: {why}")))
            }
        }
    }

    fn save_devices(&mut self, _out: &mut dyn Write) -> io::Result<()> {
        Err(io::Error::other("the near side of a relay only receives"))
    }

    fn load_devices(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let mut state = Vec::new();
        from.read_to_end(&mut state)?;
        if !self.shared.lock().ram_complete {
            return Err(io::Error::other("the device state came before the end of RAM"));
        }
        self.shared.change(|progress| progress.device_state = Some(state));
        // Only then may the guest be asked for: the far side's own timeouts bound the wait.
        let progress =
            self.shared.wait(Duration::MAX, |progress| progress.far_is_ready || progress.far_ended);
        if progress.far_is_ready && !progress.far_ended {
            return Ok(());
        }
        drop(progress);
        let far = self.far_end.recv().map_err(|_| io::Error::other("the far side never began"))?;
        let why = far.report.error.as_ref().map_or_else(|| "it was cancelled".into(), ToString::to_string);
        *lock(&self.sent) = Some(far);
        Err(io::Error::other(format!("the far end could not take the guest: {why}")))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::PageRun;
    use crate::ram::{BlockName, RamBlock, RamBlockTable};
    use crate::units::{BlockIndex, PageIndex};

    #[test]
    fn an_idle_far_side_goes_on_as_soon_as_pages_have_come() {
        let block = RamBlock::new(BlockName::new("ram").unwrap(), 100 << 20);
        let table = RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap();
        let (shared, arrivals) = (Arc::new(Shared::default()), Arc::new(Arrivals::new(&table)));
        let mut upstream = WaitForUpstream { shared: Arc::clone(&shared), arrivals: Arc::clone(&arrivals) };
        // A wait that missed them would take an hour.
        let waiting = std::thread::spawn(move || upstream.wait(Duration::from_secs(3600)).unwrap());
        arrivals.mark(PageRun { block: BlockIndex(0), first: PageIndex(0), pages: WORTH_A_ROUND });
        shared.change(|_| ());
        assert!(!waiting.join().unwrap(), "pages are no end");
    }

    #[test]
    fn a_far_end_that_failed_ends_the_reading_instead_of_holding_it_back() {
        let block = RamBlock::new(BlockName::new("ram").unwrap(), 100 << 20);
        let table = RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap();
        let bitmap = Arc::new(Arrivals::new(&table));
        bitmap.mark(PageRun { block: BlockIndex(0), first: PageIndex(0), pages: 25_000 });
        let statistics = SharedStatistics::default();
        let mut backlog = Backlog {
            source_can_be_told: true,
            bitmap,
            statistics: statistics.clone(),
            page_bytes: 4096,
            downtime_limit: Duration::from_millis(300),
            looked: Instant::now(),
        };
        std::thread::sleep(LOOK);
        assert!(backlog.is_full().unwrap());
        statistics.update(|s| (s.status, s.error) = (Status::Failed, Some("the connection broke".into())));
        std::thread::sleep(LOOK);
        let error = backlog.is_full().unwrap_err().to_string();
        assert!(error.contains("the connection broke"), "{error}");
    }
}
