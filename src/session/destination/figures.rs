//! The figures of a destination. Threads that place pages only count; reading the figures updates them, so that they
//! are correct in a silent stream, too.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::engine::Pager;
use crate::guest::Placer;
use crate::observe::{SharedStatistics, Statistics, Status};
use crate::sys::Lock as _;
use crate::transport::LiveBytes;

/// Shortest time over which a rate is measured, as at the source.
const WINDOW: Duration = Duration::from_millis(100);

/// The destination's part in the shared figures.
pub(super) struct Figures {
    shared: SharedStatistics,
    counts: Arc<Counts>,
}

/// Counters of the threads that receive.
#[derive(Default)]
struct Counts {
    /// Bytes read of the stream.
    stream: AtomicU64,
    /// The last page has been received.
    ram_complete: AtomicBool,
    /// Bytes that a NIC has written for the first time, in rounds whose pages are marked as received.
    nic_marked: AtomicU64,
    guest: OnceLock<IncomingGuest>,
    /// The threads that wait for missing pages, from a switch to postcopy on.
    pager: OnceLock<Arc<Mutex<Pager>>>,
}

/// The guest, once its blocks are known.
struct IncomingGuest {
    placer: Arc<Placer>,
    total: u64,
    since: Duration,
    live: LiveBytes,
}

/// Bytes and pages at a moment.
#[derive(Clone, Copy, Default)]
struct Moment {
    at: Duration,
    bytes: u64,
    pages: u64,
}

impl Figures {
    pub(super) fn new(shared: SharedStatistics) -> Self {
        Self { shared, counts: Arc::default() }
    }

    /// The figures that others read.
    pub(super) fn shared(&self) -> SharedStatistics {
        self.shared.clone()
    }

    /// The migration begins. Figures are updated from now on.
    pub(super) fn begin(&self) {
        self.shared.update(|s| s.status = Status::Setup);
        let (counts, began, mut window) = (Arc::clone(&self.counts), Instant::now(), None);
        self.shared.refresh_by(move |s| counts.refresh(s, &mut window, began.elapsed()));
    }

    /// Bytes of the stream so far.
    pub(super) fn stream(&self, bytes: u64) {
        self.counts.stream.store(bytes, Ordering::Relaxed);
    }

    /// The guest's memory exists, and `total` bytes of it are migrated; `live` counts bytes outside the stream.
    pub(super) fn arriving(&self, placer: &Arc<Placer>, total: u64, live: LiveBytes) {
        let since = Duration::from_secs_f64(self.shared.snapshot().total_time / 1e3);
        let guest = IncomingGuest { placer: Arc::clone(placer), total, since, live };
        let page_size = guest.placer.page_bytes();
        // Set once, by the first list of blocks.
        let _ = self.counts.guest.set(guest);
        self.shared.update(|s| {
            s.status = Status::Active;
            s.setup_time = millis(since);
            (s.total, s.remaining, s.page_size) = (total, total, page_size);
        });
    }

    /// The guest may run here while pages are missing: `pager` counts the threads that wait.
    pub(super) fn waiting(&self, pager: &Arc<Mutex<Pager>>) {
        // Set once, by the one package.
        let _ = self.counts.pager.set(Arc::clone(pager));
    }

    /// An RDMA round is over, and the pages that it wrote are marked as received.
    pub(super) fn round_marked(&self) {
        let nic = self.counts.guest.get().map_or(0, IncomingGuest::by_nic);
        self.counts.nic_marked.store(nic, Ordering::Relaxed);
    }

    /// The last page has been received. Pages that have not been received by now are not needed.
    pub(super) fn ram_complete(&self) {
        self.counts.ram_complete.store(true, Ordering::Relaxed);
    }

    /// More pages follow nevertheless: the source has lost the connection behind its last page.
    pub(super) fn ram_continues(&self) {
        self.counts.ram_complete.store(false, Ordering::Relaxed);
    }

    /// The end: the figures no longer follow the counters.
    pub(super) fn end(&self, completed: bool) {
        self.shared.refresh_no_more();
        self.shared.update(|s| {
            if completed {
                s.remaining = 0;
                let took = Duration::from_secs_f64((s.total_time - s.setup_time).max(0.0) / 1e3);
                let bytes = self.counts.path_bytes();
                s.throughput = per_second(bytes, took).unwrap_or(s.throughput);
            }
        });
    }
}

impl IncomingGuest {
    fn by_nic(&self) -> u64 {
        self.live.rounds.as_ref().map_or(0, |bytes| bytes.load(Ordering::Relaxed))
    }

    fn by_channels(&self) -> u64 {
        self.live.channels.as_ref().map_or(0, |bytes| bytes.load(Ordering::Relaxed))
    }
}

impl Counts {
    /// Bytes on every way.
    fn path_bytes(&self) -> u64 {
        let channel_bytes = self.guest.get().map_or(0, |guest| guest.by_channels() + guest.by_nic());
        self.stream.load(Ordering::Relaxed) + channel_bytes
    }

    fn refresh(&self, s: &mut Statistics, window: &mut Option<Moment>, now: Duration) {
        s.total_time = millis(now);
        let stream = self.stream.load(Ordering::Relaxed);
        s.transferred = stream;
        s.page_waits = self.pager.get().map(|pager| pager.locked().waits());
        let Some(guest) = self.guest.get() else { return };
        let channel_bytes = guest.by_channels();
        (s.transferred, s.multifd_bytes, s.pages) =
            (stream + channel_bytes, channel_bytes, guest.placer.counts());
        let in_round = guest.by_nic().saturating_sub(self.nic_marked.load(Ordering::Relaxed));
        let received = guest.placer.received_pages() * guest.placer.page_bytes() + in_round;
        let complete = self.ram_complete.load(Ordering::Relaxed);
        s.remaining = if complete { 0 } else { guest.total.saturating_sub(received) };

        let pages = s.pages.normal + s.pages.zero + s.pages.delta;
        let moment = Moment { at: now, bytes: self.path_bytes(), pages };
        let before = *window.get_or_insert(Moment { at: guest.since, ..Moment::default() });
        let took = now.saturating_sub(before.at);
        if took < WINDOW {
            return;
        }
        s.throughput = per_second(moment.bytes.saturating_sub(before.bytes), took).unwrap_or(0);
        s.pages_per_second = per_second(moment.pages.saturating_sub(before.pages), took).unwrap_or(0);
        *window = Some(moment);
    }
}

fn per_second(count: u64, took: Duration) -> Option<u64> {
    (!took.is_zero()).then(|| (count as f64 / took.as_secs_f64()) as u64)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::guest::MappedGuest;
    use crate::ram::{BlockName, RamBlock};
    use crate::sys::Mapping;
    use crate::units::{BlockIndex, BlockOffset, PageSize};

    const PAGES: u64 = 64;

    fn placer(mapping: &Mapping) -> Arc<Placer> {
        let block = RamBlock::new(BlockName::new("ram").unwrap(), PAGES * 4096);
        let guest = MappedGuest::builder(PageSize::SIZE_4K).mapping(block.clone(), mapping).build().unwrap();
        Arc::new(Placer::new(Arc::new(guest), &[block], None).unwrap())
    }

    fn counts(placer: &Arc<Placer>, nic: &Arc<AtomicU64>) -> Counts {
        let counts = Counts::default();
        let guest = IncomingGuest {
            placer: Arc::clone(placer),
            total: PAGES * 4096,
            since: Duration::from_millis(50),
            live: LiveBytes { channels: Some(Arc::new(AtomicU64::new(1000))), rounds: Some(Arc::clone(nic)) },
        };
        assert!(counts.guest.set(guest).is_ok());
        counts
    }

    #[test]
    fn what_is_left_and_the_rate_follow_what_comes_on_every_way() {
        let mapping = Mapping::anonymous(PAGES * 4096).unwrap();
        let (placer, nic) = (placer(&mapping), Arc::new(AtomicU64::new(0)));
        let counts = counts(&placer, &nic);
        let (mut s, mut window) = (Statistics::default(), None);
        let mut look = |ms| {
            counts.refresh(&mut s, &mut window, Duration::from_millis(ms));
            (s.remaining, s.throughput, s.transferred)
        };
        counts.stream.store(500, Ordering::Relaxed);
        assert_eq!(look(100), (PAGES * 4096, 0, 1500), "no rate before a window is over");
        let page = |at: u64| placer.admit(BlockIndex(0), BlockOffset(at * 4096), 4096).unwrap();
        (0..16).chain(0..16).for_each(|at| placer.commit(page(at)));
        counts.stream.store(100_000, Ordering::Relaxed);
        assert_eq!(
            look(150),
            ((PAGES - 16) * 4096, 1_010_000, 101_000),
            "a page that comes twice is left once"
        );
        // An RDMA round is open: its pages are not marked yet.
        nic.store(8 * 4096, Ordering::Relaxed);
        assert_eq!(look(250), ((PAGES - 24) * 4096, 8 * 4096 * 10, 101_000));
        (16..24).for_each(|at| placer.written(placer.run(page(at))));
        counts.nic_marked.store(8 * 4096, Ordering::Relaxed);
        // Nothing has arrived for a second: the rate reflects that.
        assert_eq!(look(1250), ((PAGES - 24) * 4096, 0, 101_000));
        counts.ram_complete.store(true, Ordering::Relaxed);
        assert_eq!(look(1300), (0, 0, 101_000), "pages that were left out are not waited for");
    }
}
