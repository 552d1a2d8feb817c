//! Hints and unplugged memory with real threads and real memory.
#![allow(clippy::unwrap_used)]

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::engine::{Ending, Outcome};
use crate::guest::{
    DirtySource, GuestControl, GuestMemory, Hinted, MappedGuest, PageHints, PlugMap, WrittenPages,
};
use crate::ram::{BlockName, PageRun, RamBlock};
use crate::session::tests::{Machine, bytes, guest, plain};
use crate::session::*;
use crate::stream::qemu::file::Configuration;
use crate::sys::Mapping;
use crate::transport::InlineLink;
use crate::units::{BlockIndex, GuestAddr, PageIndex, PageSize, Rate};

const PAGES: u64 = 4096;

/// Moves `from` to `to`; `prepare` may ask the source for more.
pub(crate) fn moved<T: Send>(
    (from, to): (&Arc<MappedGuest>, &Arc<MappedGuest>),
    dirty: Vec<Arc<dyn DirtySource>>,
    control: Box<dyn GuestControl>,
    rate: u64,
    prepare: impl FnOnce(SourceSession) -> (SourceSession, T),
) -> (SourceReport, DestinationReport, T) {
    let (near, far) = UnixStream::pair().unwrap();
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.verify = Verify::Full;
    settings.guest_is_paused = dirty.is_empty();
    settings.max_bandwidth = Rate::limit(rate);
    let link = Box::new(InlineLink::new(plain(&near), from.clone()));
    let connection = SourceConnection::new(link, Some(plain(&near)));
    let source = SourceGuest { memory: from.clone(), dirty, control };
    let (source, kept) = prepare(SourceSession::new(source, connection, settings));
    let memory = Box::new(to.clone());
    let (back, machine) = (Some(plain(&far) as Box<_>), Box::new(Machine::default()));
    let destination = DestinationSession::new(
        DestinationGuest { memory, control: machine },
        DestinationConnection::of_stream(plain(&far), back),
        DestinationSettings::default(),
    );
    // Only the sessions hold the ends: the destination notices a source that closes.
    drop((near, far));
    let (sent, arrived) = std::thread::scope(|scope| {
        let far = scope.spawn(|| destination.run());
        (source.run(), far.join().unwrap())
    });
    (sent, arrived, kept)
}

/// A vCPU that frees pages, reports that, and takes them again; it is stopped while its lock is held.
struct Vcpu {
    memory: Arc<MappedGuest>,
    /// What each page holds; 0: it is free.
    truth: Mutex<Vec<u8>>,
    paused: Mutex<bool>,
    stop: AtomicBool,
}

impl Vcpu {
    fn write(&self, page: u64, stamp: u8) {
        let region = self.memory.region(BlockIndex(0)).unwrap();
        region.span(page * 4096, 4096).unwrap().copy_from(&[stamp; 4096]);
        self.truth.lock().unwrap()[page as usize] = stamp;
    }

    fn run(&self, hints: &PageHints) -> [u64; 3] {
        let mut answers = [0; 3];
        let mut step = 1u64;
        while !self.stop.load(Ordering::Relaxed) {
            let paused = self.paused.lock().unwrap();
            if *paused {
                continue;
            }
            step = step.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let page = (step >> 33) % PAGES;
            if let Some(epoch) = hints.epoch() {
                self.truth.lock().unwrap()[page as usize] = 0;
                let run = PageRun { block: BlockIndex(0), first: PageIndex(page), pages: 1 };
                answers[match hints.free(epoch, run).unwrap() {
                    Hinted::Taken => 0,
                    Hinted::TooLate => 1,
                    Hinted::Full => 2,
                }] += 1;
                // Half of them are used again at once, and the bytes written then must arrive.
                if step >> 32 & 1 == 0 {
                    self.write(page, (step >> 40) as u8 | 1);
                }
            }
            drop(paused);
            std::thread::yield_now();
        }
        answers
    }
}

struct Control(Arc<Vcpu>);

impl GuestControl for Control {
    fn pause(&mut self) -> io::Result<()> {
        *self.0.paused.lock().unwrap() = true;
        Ok(())
    }
    fn resume(&mut self) -> io::Result<()> {
        *self.0.paused.lock().unwrap() = false;
        Ok(())
    }
}

#[test]
fn pages_that_are_freed_and_used_again_on_another_thread_arrive() {
    let (from, to) = (guest(&[PAGES]), guest(&[PAGES]));
    let truth = Mutex::new(vec![0; PAGES as usize]);
    let vcpu = Arc::new(Vcpu { memory: from.clone(), truth, paused: Mutex::new(false), stop: false.into() });
    (0..PAGES).for_each(|page| vcpu.write(page, page as u8 | 1));
    let log = Arc::new(WrittenPages::new(&*from));
    if let Err(error) = log.probe() {
        eprintln!("skipped: {error}");
        return;
    }
    let control = Box::new(Control(Arc::clone(&vcpu)));
    // Slow enough for many hints in each round.
    let rate = 60 << 20;
    let (sent, arrived, thread) = moved((&from, &to), vec![log], control, rate, |mut source| {
        let (hints, vcpu) = (source.page_hints(), Arc::clone(&vcpu));
        (source, std::thread::spawn(move || vcpu.run(&hints)))
    });
    vcpu.stop.store(true, Ordering::Relaxed);
    let answers = thread.join().unwrap();
    assert_eq!(sent.outcome, Outcome::Completed, "{:?} {:?}", sent.error, arrived.error);
    assert!(arrived.verified, "what the guest needs is compared, and nothing else");
    let skipped = sent.statistics.skipped;
    assert!(answers[0] > 0 && skipped.hinted > 0 && skipped.hinted <= answers[0], "{answers:?} {skipped:?}");
    let there = bytes(&to, 0);
    let truth = vcpu.truth.lock().unwrap();
    for (page, stamp) in truth.iter().enumerate().filter(|(_, stamp)| **stamp != 0) {
        let page_there = &there[page * 4096..][..4096];
        assert!(page_there.iter().all(|byte| byte == stamp), "page {page} is lost");
    }
}

/// A sparse memfd of `PAGES` pages; the kernel reports how many of them have memory.
fn sparse(name: &str) -> (Arc<MappedGuest>, Mapping) {
    let mapping = Mapping::memfd(name, PAGES * 4096).unwrap();
    let block = RamBlock::new(BlockName::new("ram").unwrap(), PAGES * 4096);
    let guest = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &mapping).build().unwrap();
    (Arc::new(guest), mapping)
}

fn taken(mapping: &Mapping) -> u64 {
    let (fd, _) = mapping.backing().unwrap();
    u64::try_from(rustix::fs::fstat(fd).unwrap().st_blocks).unwrap() * 512 / 4096
}

#[test]
fn unplugged_memory_is_not_read_and_takes_no_memory_at_either_end() {
    let ((from, near), (to, far)) = (sparse("near"), sparse("far"));
    let run = |first, pages| PageRun { block: BlockIndex(0), first: PageIndex(first), pages };
    let plugs = Arc::new(PlugMap::new(from.table()));
    plugs.unplug(run(1000, 3096));
    near.region().span(0, 1000 * 4096).unwrap().copy_from(&vec![7; 1000 * 4096]);
    assert_eq!(taken(&near), 1000);
    let dirty = vec![Arc::clone(&plugs) as Arc<dyn DirtySource>];
    let machine = Machine::default();
    let (sent, arrived, ()) =
        moved((&from, &to), dirty, Box::new(machine), 0, |source| (source.with_discards(plugs), ()));
    assert_eq!(arrived.ending, Ending::Running, "{:?} {:?}", sent.error, arrived.error);
    assert!(arrived.verified);
    let statistics = &sent.statistics;
    assert_eq!((statistics.pages.normal, statistics.pages.zero), (1000, 0));
    assert_eq!((statistics.skipped.discarded, statistics.skipped.hinted), (3096, 0));
    assert_eq!((taken(&near), taken(&far)), (1000, 1000), "pages with memory behind them, here and there");
}

/// Pages sent before their memory was unplugged have no memory at the destination; pages plugged again arrive.
#[test]
fn memory_that_is_unplugged_and_plugged_while_it_moves_is_as_it_is_at_the_end() {
    if !crate::sys::testing::has_holes() {
        return;
    }
    struct Plugger(Arc<PlugMap>, Mapping);
    impl GuestControl for Plugger {
        /// The device is stopped last: all its actions before the pause count.
        fn pause(&mut self) -> io::Result<()> {
            let run = |first, pages| PageRun { block: BlockIndex(0), first: PageIndex(first), pages };
            self.0.unplug(run(0, 256));
            self.0.plug(run(2000, 100));
            self.1.region().span(2000 * 4096, 4096).map_err(io::Error::other)?.copy_from(&[9; 4096]);
            self.0.unplug(run(300, 10));
            self.0.plug(run(300, 10));
            self.1.region().span(300 * 4096, 4096).map_err(io::Error::other)?.copy_from(&[9; 4096]);
            Ok(())
        }
        fn resume(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let ((from, near), (to, _)) = (sparse("near"), sparse("far"));
    let plugs = Arc::new(PlugMap::new(from.table()));
    plugs.unplug(PageRun { block: BlockIndex(0), first: PageIndex(1000), pages: 3096 });
    near.region().span(0, 1000 * 4096).unwrap().copy_from(&vec![7; 1000 * 4096]);
    let control = Box::new(Plugger(Arc::clone(&plugs), near.clone()));
    let dirty = vec![Arc::clone(&plugs) as Arc<dyn DirtySource>];
    let (sent, arrived, ()) =
        moved((&from, &to), dirty, control, 0, |source| (source.with_discards(plugs), ()));
    assert_eq!(arrived.ending, Ending::Running, "{:?} {:?}", sent.error, arrived.error);
    assert!(arrived.verified);
    let there = bytes(&to, 0);
    assert!(there[..256 * 4096].iter().all(|byte| *byte == 0), "an earlier state of unplugged memory");
    assert!(there[300 * 4096..301 * 4096].iter().all(|byte| *byte == 9));
    assert!(there[301 * 4096..1000 * 4096].iter().all(|byte| *byte == 7));
    assert!(there[2000 * 4096..2001 * 4096].iter().all(|byte| *byte == 9), "plugged again");
}

/// Two guests over one memfd, whose block is at `addr` in each.
fn sharing(shared: &Mapping, own: &Mapping, addr: u64, ignored: bool) -> Arc<MappedGuest> {
    let named = |name, len| RamBlock::new(BlockName::new(name).unwrap(), len);
    let mut block = named("shared", shared.region().len());
    block.guest_addr = Some(GuestAddr(addr));
    block.flags.ignored = ignored;
    let builder = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, shared);
    Arc::new(builder.mapping(named("own", own.region().len()), own).build().unwrap())
}

#[test]
fn blocks_that_both_ends_map_do_not_travel_and_must_be_the_same_ones() {
    let shared = Mapping::memfd("shared", 64 * 4096).unwrap();
    let own = || Mapping::anonymous(8 * 4096).unwrap();
    shared.region().span(0, 4096).unwrap().copy_from(&[3; 4096]);
    let filled = own();
    filled.region().span(0, 4096).unwrap().copy_from(&[4; 4096]);
    let from = sharing(&shared, &filled, 0x1000, true);
    let to = |addr, ignored| sharing(&shared, &own(), addr, ignored);
    let go = |from: &Arc<MappedGuest>, to: &Arc<MappedGuest>| {
        moved((from, to), Vec::new(), Box::new(Machine::default()), 0, |source| (source, ()))
    };

    let arrives = to(0x1000, true);
    let (sent, arrived, ()) = go(&from, &arrives);
    assert_eq!(arrived.ending, Ending::Running, "{:?} {:?}", sent.error, arrived.error);
    assert!(arrived.verified && sent.statistics.total == 8 * 4096);
    assert_eq!((sent.statistics.pages.normal, sent.statistics.pages.zero), (1, 7));
    assert_eq!((bytes(&arrives, 1)[0], bytes(&arrives, 0)[0]), (4, 3));

    let refused = [
        (&from, to(0x2000, true), "is at 0x1000 in the source's guest but at 0x2000"),
        (&from, to(0x1000, false), "none is shared here"),
        (&to(0x1000, false), to(0x1000, true), "and the source sends it"),
    ];
    for (from, to, why) in refused {
        let (sent, arrived, ()) = go(from, &to);
        assert!(sent.guest_is_safe_here() && arrived.ending == Ending::Discarded);
        let error = crate::error::Chain(&arrived.error.unwrap()).to_string();
        assert!(error.contains(why), "{error}");
    }
}
