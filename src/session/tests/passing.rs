//! Memory that is passed as descriptors between two sessions of one host.
#![allow(clippy::unwrap_used)]

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::streams::native_start;
use super::{Machine, bytes};
use crate::engine::{Ending, Outcome, Reason};
use crate::error::Chain;
use crate::guest::{DeviceState, GuestControl, GuestError, GuestMemory, MappedGuest};
use crate::ram::{BlockName, Landing, RamBlock, RamBlockTable};
use crate::session::*;
use crate::stream::native::{Hello, Order};
use crate::stream::qemu::command::Command;
use crate::sys::{HostRegion, HostSpan, Mapping, send_with_descriptor};
use crate::transport::{StreamChannel, StreamOptions};
use crate::units::{BlockIndex, PageSize};

const PAGES: u64 = 100;
const LEN: u64 = PAGES * 4096;

/// A guest with a block of a memfd and one of private memory.
fn from() -> Arc<MappedGuest> {
    let shared = Mapping::memfd("ram", LEN + 4096).unwrap();
    let part = Mapping::file(shared.backing().unwrap().0.try_clone_to_owned().unwrap(), 4096, LEN).unwrap();
    let own = Mapping::anonymous(LEN).unwrap();
    let block = |name| RamBlock::new(BlockName::new(name).unwrap(), LEN);
    let guest = MappedGuest::builder(PageSize::SIZE_4K)
        .mapping(block("ram"), &part)
        .mapping(block("rom"), &own)
        .build()
        .unwrap();
    for page in (0..PAGES).filter(|page| page % 3 != 0) {
        for index in 0..2 {
            let span = guest.region(BlockIndex(index)).unwrap().span(page * 4096, 4096).unwrap();
            span.copy_from(&[(page as u8) << 1 | 1; 4096]);
        }
    }
    Arc::new(guest)
}

/// The memory that the source's session sees, and whether it accesses a block after it was handed over.
struct Seen {
    inner: Arc<MappedGuest>,
    given: Arc<AtomicBool>,
    touched: AtomicU64,
}

impl GuestMemory for Seen {
    fn table(&self) -> &RamBlockTable {
        self.inner.table()
    }
    fn span(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
        let given = self.given.load(Ordering::SeqCst) && landing.block() == BlockIndex(0);
        self.touched.fetch_add(u64::from(given), Ordering::SeqCst);
        self.inner.span(landing)
    }
    fn region(&self, block: BlockIndex) -> Option<HostRegion> {
        self.touched.fetch_add(u64::from(self.given.load(Ordering::SeqCst)), Ordering::SeqCst);
        self.inner.region(block).cloned()
    }
    fn discard(&self, _: Landing) -> Result<(), GuestError> {
        unreachable!("nothing is discarded at a source")
    }
}

/// What a VMM at the destination does with the memory.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Does {
    Nothing,
    FailsToProvide,
    ProvidesItsOwn,
    FailsToLoad,
}

/// What happens while memory is provided.
pub(super) type Act = Box<dyn FnOnce() + Send>;

/// A VMM at the destination: it maps the memory that arrives, and writes to it whenever permitted.
#[derive(Clone)]
pub(super) struct Vmm {
    pub(super) machine: Machine,
    does: Does,
    guest: Arc<Mutex<Option<Arc<MappedGuest>>>>,
    passed: Arc<Mutex<Vec<String>>>,
    given: Arc<AtomicBool>,
    pub(super) during_provide: Arc<Mutex<Option<Act>>>,
}

impl Vmm {
    pub(super) fn new(does: Does) -> Self {
        Self {
            machine: Machine::default(),
            does,
            guest: Arc::default(),
            passed: Arc::default(),
            given: Arc::default(),
            during_provide: Arc::default(),
        }
    }

    pub(super) fn guest(&self) -> Arc<MappedGuest> {
        self.guest.lock().unwrap().clone().unwrap()
    }
}

impl MemoryProvider for Vmm {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        *self.passed.lock().unwrap() = incoming.passed.iter().map(|block| block.name().to_string()).collect();
        if self.does == Does::FailsToProvide {
            return Err(io::Error::other("no memory"))
                .map_err(|source| Error::Control { what: "start", source });
        }
        let own = |block: &RamBlock| Ok(Mapping::memfd("own", block.used_length).unwrap().region().clone());
        let other = Incoming { passed: Vec::new(), ..incoming.clone() };
        let incoming = if self.does == Does::ProvidesItsOwn { &other } else { incoming };
        let guest = incoming.map(PageSize::SIZE_4K, own)?;
        *self.guest.lock().unwrap() = Some(Arc::clone(&guest));
        if let Some(act) = self.during_provide.lock().unwrap().take() {
            act();
        }
        Ok(guest)
    }
}

impl GuestControl for Vmm {
    fn pause(&mut self) -> io::Result<()> {
        self.machine.pause()
    }
    fn resume(&mut self) -> io::Result<()> {
        self.guest().region(BlockIndex(0)).unwrap().span(8192, 8).unwrap().copy_from(b"it runs ");
        self.machine.resume()
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for Vmm {
    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        self.given.store(true, Ordering::SeqCst);
        self.guest().region(BlockIndex(0)).unwrap().span(4096, 8).unwrap().copy_from(b"a device");
        if self.does == Does::FailsToLoad {
            return Err(io::Error::other("another version"));
        }
        self.machine.load(from)
    }
}

struct Moved {
    sent: SourceReport,
    arrived: DestinationReport,
    source: Machine,
    vmm: Vmm,
    from: Arc<MappedGuest>,
    touched: u64,
}

pub(super) fn channel(socket: UnixStream) -> StreamChannel {
    StreamChannel::from_fd(socket.into(), "peer", &StreamOptions::default()).unwrap()
}

fn moves(from: &Arc<MappedGuest>, vmm: Vmm, passes: bool, takes: bool) -> Moved {
    let (near, far) = UnixStream::pair().unwrap();
    moves_over(channel(near), channel(far), from, vmm, |settings| settings.pass_memory = passes, takes)
}

fn moves_over(
    near: StreamChannel,
    far: StreamChannel,
    from: &Arc<MappedGuest>,
    vmm: Vmm,
    set: impl FnOnce(&mut SourceSettings),
    takes: bool,
) -> Moved {
    let source = Machine::running(b"devices");
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.guest_is_paused = true;
    settings.verify = Verify::Full;
    set(&mut settings);
    let given = Arc::clone(&vmm.given);
    let seen = Arc::new(Seen { inner: Arc::clone(from), given, touched: AtomicU64::new(0) });
    let guest = SourceGuest { memory: seen.clone(), dirty: Vec::new(), control: Box::new(source.clone()) };
    let connection = SourceConnection::over(near, seen.clone());
    let arriving = DestinationGuest { memory: Box::new(vmm.clone()), control: Box::new(vmm.clone()) };
    let settings_there = DestinationSettings { take_memory: takes, ..Default::default() };
    let destination = DestinationSession::new(arriving, DestinationConnection::over(far), settings_there);
    let thread = std::thread::spawn(move || destination.run());
    let sent = SourceSession::new(guest, connection, settings).run();
    let arrived = thread.join().unwrap();
    let touched = seen.touched.load(Ordering::SeqCst);
    Moved { sent, arrived, source, vmm, from: Arc::clone(from), touched }
}

fn inode(guest: &MappedGuest, block: u32) -> Option<u64> {
    let file = guest.region(BlockIndex(block)).unwrap().shared_file()?;
    Some(rustix::fs::fstat(file.descriptor()).unwrap().st_ino)
}

#[test]
fn memory_with_a_file_is_passed_and_private_memory_travels_page_by_page() {
    let from = from();
    let before = bytes(&from, 1);
    let moved = moves(&from, Vmm::new(Does::Nothing), true, true);
    assert_eq!((moved.sent.outcome, moved.arrived.ending), (Outcome::Completed, Ending::Running));
    let to = moved.vmm.guest();
    assert_eq!(inode(&from, 0), inode(&to, 0), "the same file");
    assert!(
        inode(&from, 0).is_some() && from.region(BlockIndex(0)).unwrap().shared_file().unwrap().is_sealed()
    );
    assert!(bytes(&to, 1) == before && moved.arrived.verified);
    assert_eq!(&bytes(&from, 0)[8192..8200], b"it runs ", "both map the same memory");
    assert_eq!(moved.sent.passed, [BlockName::new("ram").unwrap()]);
    assert_eq!(*moved.vmm.passed.lock().unwrap(), ["ram"]);
    let statistics = &moved.sent.statistics;
    assert_eq!((statistics.passed.blocks, statistics.passed.bytes), (1, LEN));
    assert_eq!((statistics.pages.normal + statistics.pages.zero, statistics.total), (PAGES, LEN));
    assert_eq!(moved.arrived.pages, statistics.pages);
    assert_eq!(moved.touched, 0, "after COMMIT the source does not touch what it has given away");
    assert!(!moved.source.runs() && moved.vmm.machine.runs());
    assert_eq!(moved.vmm.machine.state(), b"devices");
}

/// Unless both ends agree and the connection can carry descriptors, all memory is sent.
#[test]
fn memory_is_passed_only_where_both_ends_say_so() {
    for (passes, takes, tcp) in [(true, false, false), (false, true, false), (true, true, true)] {
        let from = from();
        let before = [bytes(&from, 0), bytes(&from, 1)];
        let vmm = Vmm::new(Does::Nothing);
        let moved = if tcp {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let [near, far] = [near, listener.accept().unwrap().0]
                .map(|end| StreamChannel::from_fd(end.into(), "peer", &StreamOptions::default()).unwrap());
            moves_over(near, far, &from, vmm, |settings| settings.pass_memory = true, true)
        } else {
            moves(&from, vmm, passes, takes)
        };
        assert_eq!((moved.sent.outcome, moved.arrived.ending), (Outcome::Completed, Ending::Running));
        assert!(moved.sent.passed.is_empty() && moved.vmm.passed.lock().unwrap().is_empty());
        let to = moved.vmm.guest();
        assert_eq!(moved.sent.statistics.pages.normal + moved.sent.statistics.pages.zero, 2 * PAGES);
        assert!(inode(&from, 0) != inode(&to, 0) && bytes(&from, 0) == before[0]);
        assert!(bytes(&to, 1) == before[1]);
        assert!(!from.region(BlockIndex(0)).unwrap().shared_file().unwrap().is_sealed());
    }
}

/// Whatever fails before COMMIT: the guest continues at the source and finds its memory unchanged.
#[test]
fn a_handover_that_fails_before_commit_leaves_memory_as_it_was() {
    for does in [Does::FailsToProvide, Does::ProvidesItsOwn] {
        let from = from();
        let before = [bytes(&from, 0), bytes(&from, 1)];
        let moved = moves(&from, Vmm::new(does), true, true);
        let text = Chain(moved.arrived.error.as_ref().unwrap()).to_string();
        assert_eq!(moved.sent.outcome, Outcome::StaysHere(Reason::Failed), "{text}");
        assert!(moved.arrived.ending == Ending::Discarded && moved.source.runs());
        assert!(!moved.vmm.machine.runs());
        let why = if does == Does::FailsToProvide { "no memory" } else { "not a mapping of the descriptor" };
        assert!(text.contains(why), "{text}");
        assert!([bytes(&from, 0), bytes(&from, 1)] == before, "{text}");
        assert!(moved.sent.passed.is_empty());
        assert_eq!(moved.sent.dirty.count(), 2 * PAGES, "nothing of it is at the destination");
        // And it can go again.
        let again = moves(&from, Vmm::new(Does::Nothing), true, true);
        assert_eq!((again.sent.outcome, again.arrived.ending), (Outcome::Completed, Ending::Running));
    }
}

/// The device state is loaded after COMMIT: the guest is in doubt then, never in two places.
#[test]
fn device_state_that_can_not_be_loaded_strands_a_guest_that_was_passed() {
    let moved = moves(&from(), Vmm::new(Does::FailsToLoad), true, true);
    assert_eq!((moved.sent.outcome, moved.arrived.ending), (Outcome::InDoubt, Ending::Stranded));
    assert!(!moved.source.runs() && !moved.vmm.machine.runs());
    let text = Chain(moved.sent.error.as_ref().unwrap()).to_string();
    assert!(text.contains("another version"), "{text}");
    assert_eq!(moved.sent.passed.len(), 1, "and the source knows what it may not touch");
    // Memory that is not passed is the destination's own: the state is loaded before READY.
    let moved = moves(&from(), Vmm::new(Does::FailsToLoad), true, false);
    assert_eq!(moved.sent.outcome, Outcome::StaysHere(Reason::Failed));
    assert!(moved.source.runs());
}

/// A file that can't be sealed becomes shorter in the middle: the guest stays where it is.
#[test]
fn a_file_that_shrinks_before_commit_ends_the_handover() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap());
    let path = dir.path().join("ram");
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    file.set_len(LEN).unwrap();
    let ram = Mapping::file(file.try_clone().unwrap().into(), 0, LEN).unwrap();
    let block = RamBlock::new(BlockName::new("ram").unwrap(), LEN);
    let from = Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &ram).build().unwrap());
    let vmm = Vmm::new(Does::Nothing);
    *vmm.during_provide.lock().unwrap() = Some(Box::new(move || file.set_len(LEN - 4096).unwrap()));
    let moved = moves(&from, vmm, true, true);
    let text = Chain(moved.arrived.error.as_ref().unwrap()).to_string();
    assert!(text.contains("RAM block ram") && text.contains("ends after"), "{text}");
    assert_eq!(moved.sent.outcome, Outcome::StaysHere(Reason::Failed), "{text}");
    assert!(moved.source.runs() && !moved.vmm.machine.runs() && moved.from.region(BlockIndex(0)).is_some());
}

#[test]
fn memory_is_not_passed_and_emptied_for_postcopy_at_once() {
    let (near, far) = UnixStream::pair().unwrap();
    let set = |settings: &mut SourceSettings| {
        (settings.pass_memory, settings.verify) = (true, Verify::Off);
        settings.postcopy = Some(PostcopySettings::new(PostcopyRule::OnCommand));
    };
    let moved = moves_over(channel(near), channel(far), &from(), Vmm::new(Does::Nothing), set, true);
    let error = moved.sent.error.unwrap();
    assert_eq!((error.kind(), moved.sent.statistics.transferred), (ErrorKind::Config, 0), "{error}");
    assert!(moved.source.runs());
}

/// The refusal that a destination sends to a source that passes `parts`, each with descriptors.
fn refused(passes: bool, takes: bool, parts: &[(&str, u64, u64, Vec<OwnedFd>)], then: &[u8]) -> String {
    let (near, far) = UnixStream::pair().unwrap();
    let vmm = Vmm::new(Does::Nothing);
    let arriving = DestinationGuest { memory: Box::new(vmm.clone()), control: Box::new(vmm.clone()) };
    let settings = DestinationSettings { take_memory: takes, ..Default::default() };
    let session = DestinationSession::new(arriving, DestinationConnection::over(channel(far)), settings);
    let start = native_start(&[("ram", PAGES)]);
    // Our HELLO in place of the one that is there.
    let (mut plain, mut hello) = (Vec::new(), Vec::new());
    let ours = Hello::ours([1; 16], false);
    Command::Native(Order::Hello(ours)).encode(&mut plain);
    Command::Native(Order::Hello(Hello { passes, ..ours })).encode(&mut hello);
    let at = start.windows(plain.len()).position(|window| window == plain).unwrap();
    let thread = std::thread::spawn(move || session.run());
    (&near).write_all(&start[..at]).unwrap();
    (&near).write_all(&hello).unwrap();
    for (block, start, len, descriptors) in parts {
        let mut order = Vec::new();
        Command::Native(Order::Memory { start: *start, len: *len, block }).encode(&mut order);
        let mut rest = &order[..];
        for descriptor in descriptors {
            send_with_descriptor(near.as_fd(), &rest[..1], descriptor.as_fd()).unwrap();
            rest = &rest[1..];
        }
        (&near).write_all(rest).unwrap();
    }
    // It may have refused already.
    let _ = (&near).write_all(&start[at + plain.len()..]);
    let _ = (&near).write_all(then);
    near.shutdown(std::net::Shutdown::Write).unwrap();
    let report = thread.join().unwrap();
    assert!(report.ending == Ending::Discarded && !vmm.machine.runs());
    Chain(&report.error.unwrap()).to_string()
}

#[test]
fn descriptors_that_are_not_what_was_said_start_no_guest() {
    let memfd = || -> OwnedFd {
        let memory = Mapping::memfd("ram", LEN).unwrap();
        memory.backing().unwrap().0.try_clone_to_owned().unwrap()
    };
    let pipe: OwnedFd = io::pipe().unwrap().0.into();
    let cases = [
        (vec![("ram", 0, LEN, vec![])], "no descriptor"),
        (vec![("ram", 0, LEN, vec![pipe])], "a pipe"),
        (vec![("ram", 0, LEN, vec![std::fs::File::open("/dev/null").unwrap().into()])], "a device"),
        (vec![("ram", 4096, LEN, vec![memfd()])], "its file only"),
        (vec![("ram", u64::MAX, LEN, vec![memfd()])], "its file only"),
        (vec![("ram", 0, 4096, vec![memfd()])], "4096 of them were passed"),
        (vec![("other", 0, LEN, vec![memfd()])], "no block of this name"),
        (vec![("ram", 0, LEN, vec![memfd()]), ("ram", 0, LEN, vec![memfd()])], "twice"),
        (vec![("ram", 0, LEN, (0..17).map(|_| memfd()).collect())], "descriptors arrived"),
    ];
    for (parts, due) in cases {
        let text = refused(true, true, &parts, &[]);
        assert!(text.contains(due), "{due}: {text}");
    }
    for (passes, takes) in [(true, false), (false, true), (false, false)] {
        let text = refused(passes, takes, &[("ram", 0, LEN, vec![memfd()])], &[]);
        assert!(text.contains("MEMORY"), "{text}");
    }
    let mut late = Vec::new();
    Command::Native(Order::Memory { start: 0, len: LEN, block: "ram" }).encode(&mut late);
    let text = refused(true, true, &[("ram", 0, LEN, vec![memfd()])], &late);
    assert!(text.contains("MEMORY"), "{text}");
}

/// A page of memory that was passed is refused: it would be written before the guest is handed over.
#[test]
fn a_page_of_memory_that_was_passed_is_not_placed() {
    use crate::stream::qemu::ram::EOS_RECORD;
    use crate::stream::qemu::section::{encode_footer, encode_part};
    let memory = Mapping::memfd("ram", LEN).unwrap();
    let file: OwnedFd = memory.backing().unwrap().0.try_clone_to_owned().unwrap();
    let mut page = Vec::new();
    encode_part(2, &mut page);
    // A whole page at offset 0, with its block's name: RAM_SAVE_FLAG_PAGE.
    page.extend_from_slice(&0x08u64.to_be_bytes());
    page.extend_from_slice(b"\x03ram");
    page.extend_from_slice(&[9; 4096]);
    page.extend_from_slice(&EOS_RECORD);
    encode_footer(2, &mut page);
    let text = refused(true, true, &[("ram", 0, LEN, vec![file])], &page);
    assert!(text.contains("received a page at"), "{text}");
    let mut byte = [0; 1];
    memory.region().span(0, 1).unwrap().copy_to(&mut byte);
    assert_eq!(byte, [0], "nothing was written");
}
