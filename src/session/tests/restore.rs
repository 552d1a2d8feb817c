//! A guest that is started from a mapped-ram file, before or after its memory is read.
#![allow(clippy::unwrap_used)]

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Machine, bytes, guest};
use crate::engine::{Ending, Outcome};
use crate::guest::{DeviceState, DirtySource, GuestControl, GuestMemory, MappedGuest, SoftwareBitmap};
use crate::ram::{BlockName, PageRun, RamBlock};
use crate::session::*;
use crate::stream::qemu::file::Configuration;
use crate::sys::Mapping;
use crate::transport::{MappedDestination, MappedLink, PageSupply, SourceConnection};
use crate::units::{BlockIndex, PageIndex, PageSize};

const PAGES: u64 = 900;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// The first eight bytes of a page hold its number; every fifth page is zero.
fn written(guest: &MappedGuest, pages: u64) {
    for page in (0..pages).filter(|page| page % 5 != 0) {
        let mut bytes = [page as u8 | 1; 4096];
        bytes[..8].copy_from_slice(&page.to_le_bytes());
        guest.region(BlockIndex(0)).unwrap().span(page * 4096, 4096).unwrap().copy_from(&bytes);
    }
}

fn save(from: &Arc<MappedGuest>, path: &Path) {
    save_by(Machine::running(b""), Vec::new(), from, path);
}

/// A guest that wrote to a few pages of its first block before it was paused, and touched no others.
struct Wrote {
    machine: Machine,
    log: Arc<SoftwareBitmap>,
    pages: Vec<u64>,
}

impl GuestControl for Wrote {
    fn pause(&mut self) -> io::Result<()> {
        for page in &self.pages {
            self.log.mark_run(PageRun { block: BlockIndex(0), first: PageIndex(*page), pages: 1 });
        }
        self.machine.pause()
    }

    fn resume(&mut self) -> io::Result<()> {
        self.machine.resume()
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        self.machine.devices()
    }
}

fn save_by(
    control: impl GuestControl + 'static,
    dirty: Vec<Arc<dyn DirtySource>>,
    from: &Arc<MappedGuest>,
    path: &Path,
) {
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.guest_is_paused = dirty.is_empty();
    settings.all_dirty_at_start = dirty.is_empty();
    let sent = SourceGuest { memory: from.clone(), dirty, control: Box::new(control) };
    let link = MappedLink::create(path, from.clone());
    let report = SourceSession::new(sent, SourceConnection::new(Box::new(link), None), settings).run();
    assert_eq!(report.outcome, Outcome::Completed, "{:?}", report.error);
}

fn session(
    path: &Path,
    to: &Arc<MappedGuest>,
    control: Box<dyn GuestControl>,
    way: RestoreWay,
) -> RestoreSession {
    let mut settings = RestoreSettings::default();
    (settings.way, settings.user_mode_only) = (way, true);
    let address = format!("mapped:{}", path.display()).parse().unwrap();
    RestoreSession::open(DestinationGuest { memory: Box::new(to.clone()), control }, &address, settings)
        .unwrap()
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(100);
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn number(guest: &MappedGuest, page: u64) -> u64 {
    let mut bytes = [1; 8];
    guest.region(BlockIndex(0)).unwrap().span(page * 4096, 8).unwrap().copy_to(&mut bytes);
    u64::from_le_bytes(bytes)
}

fn expected(page: u64) -> u64 {
    if page.is_multiple_of(5) { 0 } else { page }
}

#[test]
fn a_guest_runs_with_all_its_memory_whichever_way_it_is_restored() {
    let folder = folder();
    let path = folder.path().join("guest");
    let from = guest(&[PAGES, 7]);
    written(&from, PAGES);
    save(&from, &path);
    for way in [RestoreWay::Eager, RestoreWay::Lazy] {
        // The previous content of the memory is gone.
        let (to, machine) = (guest(&[PAGES, 7]), Machine::default());
        to.region(BlockIndex(0))
            .unwrap()
            .span(0, PAGES * 4096)
            .unwrap()
            .copy_from(&[9; PAGES as usize * 4096]);
        let restored = session(&path, &to, Box::new(machine.clone()), way).run().unwrap();
        assert_eq!(restored.report.ending, Ending::Running, "{:?}", restored.report.error);
        assert!(machine.runs() && !machine.state().is_empty());
        assert_eq!(restored.pages.is_some(), way == RestoreWay::Lazy);
        if let Some(pages) = restored.pages {
            // Threads touch pages while they arrive, each in a different order.
            std::thread::scope(|scope| {
                for thread in 0..4u64 {
                    let to = &to;
                    scope.spawn(move || {
                        for step in 0..PAGES {
                            let page = (step * (2 * thread + 7) + thread * 31) % PAGES;
                            assert_eq!(number(to, page), expected(page), "page {page}");
                        }
                    });
                }
            });
            pages.wait().unwrap();
            let progress = pages.progress();
            assert_eq!((progress.missing, progress.failed), (0, 0));
            assert_eq!(pages.failure(), None);
        }
        assert!([0, 1].iter().all(|block| bytes(&to, *block) == bytes(&from, *block)), "{way:?}");
    }
}

/// Reads of a file, counted; some of its pages can't be read while the disk is broken.
struct Counted {
    pages: crate::transport::MappedPages,
    reads: Arc<AtomicU64>,
    broken: Arc<AtomicBool>,
    bad: std::ops::Range<u64>,
}

impl PageSupply for Counted {
    fn read(&self, block: BlockIndex, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let touches = offset < self.bad.end && offset + into.len() as u64 > self.bad.start;
        if block.0 == 0 && touches && self.broken.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.pages.read(block, offset, into)
    }

    fn name(&self) -> String {
        self.pages.name()
    }
}

#[derive(Clone)]
struct Stand {
    reads: Arc<AtomicU64>,
    broken: Arc<AtomicBool>,
}

impl Stand {
    fn in_front_of(&self, path: &Path, bad: std::ops::Range<u64>) -> Arc<Counted> {
        let address = format!("mapped:{}", path.display()).parse().unwrap();
        let pages = MappedDestination::open(&address).unwrap().own_pages();
        Arc::new(Counted { pages, reads: Arc::clone(&self.reads), broken: Arc::clone(&self.broken), bad })
    }
}

/// A thread that touches an unreadable page waits; all other pages arrive; an error names block, page and file; no page
/// is lost.
#[test]
fn a_page_that_can_not_be_read_is_waited_for_until_it_can() {
    let folder = folder();
    let path = folder.path().join("guest");
    let from = guest(&[PAGES, 7]);
    written(&from, PAGES);
    save(&from, &path);
    let (to, machine) = (guest(&[PAGES, 7]), Machine::default());
    let stand = Stand { reads: Arc::default(), broken: Arc::new(AtomicBool::new(true)) };
    let supply = stand.in_front_of(&path, 301 * 4096..303 * 4096);
    let session = session(&path, &to, Box::new(machine.clone()), RestoreWay::Lazy).with_supply(supply);
    let pages = session.run().unwrap().pages.unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let reader = Arc::clone(&to);
    std::thread::spawn(move || tell.send([301, 302, 303].map(|page| number(&reader, page))).unwrap());
    let failure = pages.wait().unwrap_err();
    let text = failure.to_string();
    assert_eq!(failure.block, "block0");
    assert!([301 * 4096, 302 * 4096].contains(&failure.offset), "{text}");
    assert!(text.contains("Input/output error") && text.contains(&path.display().to_string()), "{text}");
    assert_eq!((pages.progress().missing, pages.progress().failed), (2, 2), "all others are there");
    assert!(told.try_recv().is_err(), "who touches it waits");
    // It is still broken: the same result.
    assert_eq!(pages.retry(), 2);
    assert_eq!(pages.wait().unwrap_err().block, "block0");
    assert!(told.try_recv().is_err());
    stand.broken.store(false, Ordering::SeqCst);
    assert_eq!(pages.retry(), 2);
    pages.wait().unwrap();
    assert_eq!(told.recv_timeout(Duration::from_secs(100)).unwrap(), [301, 302, 303]);
    assert!(bytes(&to, 0) == bytes(&from, 0));
}

/// Pages that a guest waited for are not read after its end.
#[test]
fn a_restore_that_is_abandoned_ends_its_threads() {
    let folder = folder();
    let path = folder.path().join("guest");
    let from = guest(&[PAGES]);
    written(&from, PAGES);
    save(&from, &path);
    let to = guest(&[PAGES]);
    let stand = Stand { reads: Arc::default(), broken: Arc::new(AtomicBool::new(true)) };
    let supply = stand.in_front_of(&path, 0..PAGES * 4096);
    let weak = Arc::downgrade(&supply);
    let session = session(&path, &to, Box::new(Machine::default()), RestoreWay::Lazy).with_supply(supply);
    let pages = session.run().unwrap().pages.unwrap();
    assert_eq!(pages.wait().unwrap_err().why, "Input/output error (os error 5)");
    pages.end();
    assert!(weak.upgrade().is_none(), "nobody reads any more");
    assert_eq!(number(&to, 1), 0, "and nobody waits");
}

/// Records what had been done when the guest was started.
struct Starts {
    machine: Machine,
    reads: Arc<AtomicU64>,
    before: Arc<AtomicU64>,
}

impl GuestControl for Starts {
    fn pause(&mut self) -> io::Result<()> {
        self.machine.pause()
    }

    fn resume(&mut self) -> io::Result<()> {
        self.before.store(self.reads.load(Ordering::SeqCst), Ordering::SeqCst);
        self.machine.resume()
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        self.machine.devices()
    }
}

/// For any size: of 64 GiB, of which a few pages hold data, none is read before the guest runs, and none without data
/// takes memory.
#[test]
fn a_large_guest_runs_before_a_page_of_it_is_read() {
    const LARGE: u64 = (64 << 30) / 4096;
    let folder = folder();
    let path = folder.path().join("guest");
    let large = || {
        let mapping = Mapping::memfd("large", LARGE * 4096).unwrap();
        let block = RamBlock::new(BlockName::new("ram").unwrap(), LARGE * 4096);
        let guest = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &mapping).build().unwrap();
        (Arc::new(guest), mapping)
    };
    {
        let (from, _mapping) = large();
        for page in [1, 77_777, LARGE - 1] {
            let span = from.region(BlockIndex(0)).unwrap().span(page * 4096, 8).unwrap();
            span.copy_from(&page.to_le_bytes());
        }
        let (log, pages) = (Arc::new(SoftwareBitmap::new(from.table())), vec![1, 77_777, LARGE - 1]);
        let wrote = Wrote { machine: Machine::running(b""), log: Arc::clone(&log), pages };
        save_by(wrote, vec![log], &from, &path);
    }
    let (to, mapping) = large();
    let stand = Stand { reads: Arc::default(), broken: Arc::default() };
    let before = Arc::new(AtomicU64::new(u64::MAX));
    let starts =
        Starts { machine: Machine::default(), reads: Arc::clone(&stand.reads), before: Arc::clone(&before) };
    let supply = stand.in_front_of(&path, 0..0);
    let restored = session(&path, &to, Box::new(starts), RestoreWay::Lazy).with_supply(supply).run().unwrap();
    assert_eq!(restored.report.ending, Ending::Running, "{:?}", restored.report.error);
    assert_eq!(before.load(Ordering::SeqCst), 0, "pages were read before the guest was started");
    let numbers = [1, 2, 77_777, 5_000_000, LARGE - 1].map(|page| number(&to, page));
    assert_eq!(numbers, [1, 0, 77_777, 0, LARGE - 1]);
    restored.pages.unwrap().wait().unwrap();
    let blocks = rustix::fs::fstat(mapping.backing().unwrap().0).unwrap().st_blocks;
    assert!(blocks <= 5 * 8, "{blocks} blocks for three pages and two that were looked at");
}

/// Pages that were touched in one restore are read before the rest in the next one, in that order.
#[test]
fn a_working_set_is_recorded_and_read_first() {
    let folder = folder();
    let (path, set) = (folder.path().join("guest"), folder.path().join("guest.working-set"));
    let from = guest(&[PAGES]);
    written(&from, PAGES);
    save(&from, &path);
    let touched = [801, 3, 404, 402];
    for round in 0..2 {
        let to = guest(&[PAGES]);
        let stand = Stand { reads: Arc::default(), broken: Arc::default() };
        let mut session = session(&path, &to, Box::new(Machine::default()), RestoreWay::Lazy);
        session.settings_mut().working_set = Some(set.clone());
        session.settings_mut().threads = 1;
        // The rest can't be read before the pages were touched: then each has a fault, or was read from the working
        // set.
        stand.broken.store(true, Ordering::SeqCst);
        let supply = stand.in_front_of(&path, if round == 0 { 0..PAGES * 4096 } else { 0..0 });
        let session = session.with_supply(supply);
        let pages = session.run().unwrap().pages.unwrap();
        if round == 0 {
            // Nothing can be read yet. Each page is touched by a thread of its own, the next after the previous fault
            // is known.
            let threads: Vec<_> = (0..)
                .zip(touched)
                .map(|(before, page)| {
                    let to = Arc::clone(&to);
                    let thread = std::thread::spawn(move || number(&to, page));
                    until("the fault is seen", || pages.progress().faults > before);
                    thread
                })
                .collect();
            let _ = pages.wait().unwrap_err();
            stand.broken.store(false, Ordering::SeqCst);
            pages.retry();
            pages.wait().unwrap();
            let read: Vec<u64> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
            assert_eq!(read, touched);
        } else {
            pages.wait().unwrap();
        }
        assert!(bytes(&to, 0) == bytes(&from, 0));
        let text = std::fs::read_to_string(&set).unwrap();
        let runs = r#"[["block0",801,1],["block0",3,1],["block0",404,1],["block0",402,1]]"#;
        assert!(text.contains(runs), "{text}");
    }
}
