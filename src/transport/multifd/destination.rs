//! The destination's link over several channels.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use super::ChannelOptions;
use super::counter::PageCounter;
use super::numa::Placement;
use super::receiver::{ChannelEvent, Common, PageReceiver};
use crate::error::Chain;
use crate::guest::{PageWriter, Placer};
use crate::observe::PageCounts;
use crate::stream::qemu::channel::Channel;
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::stream::qemu::packet_numbers::MissingPackets;
use crate::stream::qemu::page_compression::PacketInflater;
use crate::stream::{Corrupt, DecodeError, Fault};
use crate::sys::{CancelToken, Lock as _, RecvPart, Stop, StopReason};
use crate::transport::{
    ByteSource, ChannelError, DestinationAbilities, DestinationLink, LiveBytes, MoveError, ReadHints,
    StreamChannel,
};

/// Longest time between two checks of the other channels.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

const RECEIVING: &str = "waiting for the stream";
const AT_BARRIER: &str = "waiting for the page channels";

/// The main channel, and the threads of the page channels once there is memory to fill.
pub struct MultifdDestination {
    main: StreamChannel,
    waiting: Vec<StreamChannel>,
    options: ChannelOptions,
    placement: Placement,
    stall: Option<Duration>,
    /// The source may be silent: it is between two rounds.
    may_be_silent: bool,
    running: Option<Running>,
    /// Bytes that arrived on page channels.
    bytes: Arc<AtomicU64>,
}

struct Running {
    common: Arc<Common>,
    events: Receiver<ChannelEvent>,
    releases: Vec<Sender<()>>,
    threads: Vec<JoinHandle<()>>,
    cancel: CancelToken,
    at_barrier: usize,
    closed: usize,
}

/// When a byte last moved on any channel: main may be silent for long while the others receive, and so may one of them
/// while another receives everything.
struct Progress {
    bytes: u64,
    since: Instant,
}

impl MultifdDestination {
    /// `main` and the page channels of the same source; `stall` is the longest time without a byte on any.
    pub fn new(
        mut main: StreamChannel,
        mut pages: Vec<StreamChannel>,
        options: ChannelOptions,
        stall: Option<Duration>,
    ) -> Self {
        main.set_stall(None);
        pages.iter_mut().for_each(|channel| channel.set_stall(None));
        // Here, where files may be read: the threads of a session may be under a filter.
        let placement = Placement::of_destination(&options.numa, &pages);
        Self {
            main,
            waiting: pages,
            options,
            placement,
            stall,
            may_be_silent: false,
            running: None,
            bytes: Arc::default(),
        }
    }

    fn check_progress(&self, progress: &mut Progress, doing: &'static str) -> Result<(), ChannelError> {
        let (bytes, now) = (self.channel_bytes(), Instant::now());
        if bytes != progress.bytes {
            *progress = Progress { bytes, since: now };
        }
        // A source that has sent packets that don't arrive waits for a channel that is not read.
        match self.stall.filter(|_| !self.may_be_silent || self.missing_packets().is_some()) {
            Some(after) if now.duration_since(progress.since) >= after => {
                Err(ChannelError::Stalled { peer: self.main.peer().to_owned(), doing, after })
            }
            _ => Ok(()),
        }
    }
}

impl Running {
    fn take(&mut self, event: ChannelEvent) -> Result<(), MoveError> {
        match event {
            ChannelEvent::AtBarrier => self.at_barrier += 1,
            ChannelEvent::Closed => self.closed += 1,
            ChannelEvent::Failed(error) => return Err(error),
        }
        Ok(())
    }

    /// Takes the reports that the channels have sent meanwhile.
    fn take_reports(&mut self) -> Result<(), MoveError> {
        while let Ok(event) = self.events.try_recv() {
            self.take(event)?;
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.cancel.cancel();
        self.releases.clear();
        for thread in self.threads.drain(..) {
            // A panic there left its page unplaced; nothing relies on that page any more.
            let _ = thread.join();
        }
    }
}

impl crate::transport::Sealed for MultifdDestination {}

impl ByteSource for MultifdDestination {
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        let mut progress = Progress { bytes: self.channel_bytes(), since: Instant::now() };
        loop {
            if let Some(running) = &mut self.running {
                running.take_reports().map_err(as_channel)?;
            }
            match self.main.recv(into, &stop.within(POLL_INTERVAL)) {
                Err(ChannelError::Stopped { reason: StopReason::Deadline, .. })
                    if stop.reason().is_none() =>
                {
                    self.check_progress(&mut progress, RECEIVING)?;
                }
                received => return received,
            }
        }
    }

    fn set_hints(&mut self, hints: ReadHints) {
        self.may_be_silent = hints.may_be_silent;
    }

    fn want_descriptors(&mut self, wanted: bool) -> bool {
        self.main.want_descriptors(wanted)
    }

    fn next_descriptor(&mut self) -> Option<OwnedFd> {
        self.main.next_descriptor()
    }

    fn tolerate_outage(&mut self, limit: Duration) {
        self.stall = None;
        ByteSource::tolerate_outage(&mut self.main, limit);
    }

    fn is_stored(&self) -> bool {
        ByteSource::is_stored(&self.main)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.main.descriptor()
    }
}

/// Guest memory that could not be accessed is reported as a fault of this host's connection here: a byte stream has no
/// other errors.
fn as_channel(error: MoveError) -> ChannelError {
    match error {
        MoveError::Channel(error) => error,
        other => ChannelError::Io {
            peer: "page channels".into(),
            doing: "placing pages",
            source: std::io::Error::other(Chain(&other).to_string()),
        },
    }
}

impl DestinationLink for MultifdDestination {
    fn abilities(&self) -> DestinationAbilities {
        DestinationAbilities { page_channels: self.options.count, ..DestinationAbilities::default() }
    }

    fn stream(&mut self) -> &mut dyn ByteSource {
        self
    }

    /// There is memory now: starts to read.
    fn announce(&mut self, placer: &Arc<Placer>, blocks: &AnnouncedBlocks) -> Result<(), MoveError> {
        let page = placer.memory().table().page();
        let (sender, events) = unbounded();
        let method = self.options.compression.method();
        let count = self.options.count;
        let common = Common {
            placer: Arc::clone(placer),
            blocks: blocks.clone(),
            page,
            ids: Mutex::default(),
            uuid: Mutex::default(),
            numbers: Mutex::default(),
            missing: RwLock::default(),
            bytes: Arc::clone(&self.bytes),
            counters: (0..count).map(|_| PageCounter::default()).collect(),
        };
        let common = Arc::new(common);
        let mut running = Running {
            common: Arc::clone(&common),
            events,
            releases: Vec::new(),
            threads: Vec::new(),
            cancel: CancelToken::default(),
            at_barrier: 0,
            closed: 0,
        };
        for (at, channel) in self.waiting.drain(..).enumerate() {
            let (release, released) = bounded(1);
            let peer = channel.peer().to_owned();
            let failed =
                |source| ChannelError::Io { peer, doing: "starting the thread of a page channel", source };
            let inflater = PacketInflater::new(method);
            let receiver = PageReceiver {
                common: Arc::clone(&common),
                channel,
                machine: Channel::new(page, method, None, count),
                inflater: match inflater {
                    Ok(inflater) => inflater,
                    Err(source) => return Err(failed(source).into()),
                },
                events: sender.clone(),
                release: released,
                stop: Stop::on(&running.cancel),
                head: Vec::new(),
                filled: 0,
                payload: Vec::new(),
                pages: Vec::new(),
                writer: PageWriter::default(),
            };
            let job = self.placement.keep(at, Box::new(move || receiver.run()));
            let started = (self.options.spawn)("ramwire-chan-rx", job);
            running.threads.push(started.map_err(failed)?);
            running.releases.push(release);
        }
        self.running = Some(running);
        Ok(())
    }

    fn barrier(&mut self, stop: &Stop) -> Result<(), MoveError> {
        let mut progress = Progress { bytes: self.channel_bytes(), since: Instant::now() };
        loop {
            let Some(running) = &mut self.running else { return Ok(()) };
            running.take_reports()?;
            if running.at_barrier == running.releases.len() {
                return Ok(());
            }
            if running.closed > 0 {
                let peer = format!("a page channel of {}", self.main.peer());
                return Err(ChannelError::Closed { peer, doing: AT_BARRIER }.into());
            }
            match running.events.recv_timeout(POLL_INTERVAL) {
                Ok(event) => running.take(event)?,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    self.check_progress(&mut progress, AT_BARRIER)?;
                }
            }
            if let Some(reason) = stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: AT_BARRIER }.into());
            }
        }
    }

    fn missing_packets(&self) -> Option<MissingPackets> {
        let running = self.running.as_ref()?;
        running.common.numbers.locked().check().err()
    }

    fn release(&mut self) {
        let Some(running) = &mut self.running else { return };
        running.at_barrier = 0;
        // A thread that has ended reports that itself.
        for release in &running.releases {
            let _ = release.try_send(());
        }
    }

    fn begin_missing(&mut self, expected: bool, begin: &mut dyn FnMut()) -> Result<(), MoveError> {
        let Some(running) = &self.running else {
            begin();
            return Ok(());
        };
        // A thread that waits for the rest of a packet would place it over newer pages.
        let mut missing = match running.common.missing.try_write() {
            Ok(missing) => missing,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let fault = Fault::Multifd("the guest is handed over in the middle of a packet");
                let source = DecodeError::Corrupt(Corrupt { at: 0, fault });
                return Err(ChannelError::Packet { channel: "a page channel".into(), source }.into());
            }
        };
        *missing = Some(expected);
        begin();
        Ok(())
    }

    fn channel_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn live_bytes(&self) -> LiveBytes {
        LiveBytes { channels: Some(Arc::clone(&self.bytes)), ..LiveBytes::default() }
    }

    fn placed_pages(&self) -> Vec<PageCounts> {
        let counters = self.running.as_ref().map(|running| &running.common.counters);
        counters.into_iter().flatten().map(PageCounter::counts).collect()
    }

    /// Closes the channels and ends their threads.
    fn revoke(&mut self) {
        self.running = None;
    }

    fn close(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }
}
