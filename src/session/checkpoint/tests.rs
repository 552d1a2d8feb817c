//! A guest with a standby, as threads run them, over a socket.
#![allow(clippy::unwrap_used)]

mod lease;
mod qemu;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};

use super::*;
use crate::error::Chain;
use crate::guest::{MappedGuest, SoftwareBitmap, TestMachine};
use crate::ram::{BlockName, RamBlock};
use crate::session::{DestinationGuest, SourceGuest};
use crate::stream::checkpoints::{CheckpointMessage, HEAD_LEN, StandbyMessage};
use crate::sys::Mapping;
use crate::transport::{StreamChannel, StreamOptions};
use crate::units::{BlockIndex, BlockOffset, PageSize};

const PAGES: u64 = 3000;

/// A guest whose memory the test writes.
struct Vm {
    memory: Arc<MappedGuest>,
    written: Arc<SoftwareBitmap>,
    machine: TestMachine,
}

fn memory(pages: u64) -> Arc<MappedGuest> {
    let block = |name, pages: u64| RamBlock::new(BlockName::new(name).unwrap(), pages * 4096);
    let [ram, rom] = [pages, 3].map(|pages| Mapping::anonymous(pages * 4096).unwrap());
    let builder = MappedGuest::builder(PageSize::SIZE_4K);
    Arc::new(builder.mapping(block("ram", pages), &ram).mapping(block("rom", 3), &rom).build().unwrap())
}

impl Vm {
    fn new() -> Self {
        let memory = memory(PAGES);
        let written = Arc::new(SoftwareBitmap::new(memory.table()));
        Self { memory, written, machine: TestMachine::running(b"devices") }
    }

    fn write(&self, page: u64, value: u64) {
        let landing = self.memory.table().admit(BlockIndex(0), BlockOffset(page * 4096), 8).unwrap();
        self.memory.span(landing).unwrap().copy_from(&value.to_le_bytes());
        self.written.mark(landing);
    }

    fn guest(&self) -> SourceGuest {
        let control = Box::new(self.machine.clone());
        SourceGuest { memory: self.memory.clone(), dirty: vec![self.written.clone()], control }
    }
}

fn bytes(memory: &MappedGuest) -> Vec<u8> {
    let region = memory.region(BlockIndex(0)).unwrap();
    let mut out = vec![0; region.len() as usize];
    region.span(0, region.len()).unwrap().copy_to(&mut out);
    out
}

/// Reports what the session says, and keeps the memory at each checkpoint.
struct Watch {
    tell: mpsc::Sender<(&'static str, u64)>,
    memory: Arc<MappedGuest>,
    kept: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl CheckpointObserver for Watch {
    fn taken(&mut self, number: u64) {
        self.kept.lock().unwrap().push(bytes(&self.memory));
        let _ = self.tell.send(("taken", number));
    }
    fn safe(&mut self, number: u64) {
        let _ = self.tell.send(("safe", number));
    }
}

fn channel(socket: UnixStream) -> StreamChannel {
    StreamChannel::from_fd(socket.into(), "peer", &StreamOptions::default()).unwrap()
}

struct Protected {
    vm: Vm,
    source: CheckpointHandle,
    standby: StandbyHandle,
    told: mpsc::Receiver<(&'static str, u64)>,
    kept: Arc<Mutex<Vec<Vec<u8>>>>,
    there: Arc<MappedGuest>,
    machine: TestMachine,
    near: UnixStream,
}

/// Checkpoints are taken when the test demands them.
fn protected() -> Protected {
    let (near, far) = UnixStream::pair().unwrap();
    protected_over(near, far, None, &Lease::default())
}

/// The source at one connection and the standby at another, which may be the same.
fn protected_over(
    near: UnixStream,
    far: UnixStream,
    config: Option<LeaseConfig>,
    lease: &Lease,
) -> Protected {
    let vm = Vm::new();
    (0..PAGES).filter(|page| page % 3 > 0).for_each(|page| vm.write(page, page));
    let (there, machine) = (memory(PAGES), TestMachine::default());
    // What was there before is gone.
    there.region(BlockIndex(0)).unwrap().span(0, 100).unwrap().copy_from(&[9; 100]);
    let guest = DestinationGuest { memory: Box::new(there.clone()), control: Box::new(machine.clone()) };
    let settings = StandbySettings { starts_by_lease: config.is_some(), ..StandbySettings::default() };
    let standby = StandbySession::new(guest, channel(far), settings).spawn().unwrap();
    let (tell, told) = mpsc::channel();
    let kept = Arc::default();
    let watch = Watch { tell, memory: vm.memory.clone(), kept: Arc::clone(&kept) };
    let settings = CheckpointSettings { interval: None, lease: config, ..CheckpointSettings::default() };
    let again = near.try_clone().unwrap();
    let source = CheckpointSession::new(vm.guest(), channel(near), Box::new(watch), settings).unwrap();
    let source = source.with_lease(lease.clone()).spawn().unwrap();
    Protected { vm, source, standby, told, kept, there, machine, near: again }
}

impl Protected {
    fn hears(&self, what: &'static str, number: u64) {
        assert_eq!(self.told.recv().unwrap(), (what, number));
    }

    fn checkpoint(&self, number: u64) {
        self.source.checkpoint();
        self.hears("taken", number);
        self.hears("safe", number);
    }
}

#[test]
fn the_guest_starts_at_the_standby_from_the_last_whole_checkpoint() {
    let protected = protected();
    protected.hears("taken", 1);
    protected.hears("safe", 1);
    for number in 2..6 {
        for page in 0..200 {
            protected.vm.write(page * 7 % PAGES, if page % 5 == 0 { 0 } else { number << 32 | page });
        }
        protected.checkpoint(number);
        assert!(protected.vm.machine.runs() && !protected.machine.runs());
    }
    // What comes after it is lost with the source.
    (0..500).for_each(|page| protected.vm.write(page, 77));
    let Protected { near, source, standby, kept, there, machine, .. } = protected;
    near.shutdown(std::net::Shutdown::Both).unwrap();
    let left = source.wait().unwrap();
    assert_eq!((left.outcome, left.safe, left.not_resumed), (CheckpointOutcome::Unprotected, 5, false));
    assert!(left.error.is_some() && left.pauses.count == 5, "{left:?}");
    assert!(!machine.runs(), "a lost connection starts nothing");
    standby.activate();
    let arrived = standby.wait().unwrap();
    assert_eq!((arrived.ending, arrived.last), (StandbyEnding::Active(5), 5), "{:?}", arrived.error);
    assert!(machine.runs() && machine.state() == b"devices");
    assert!(bytes(&there) == *kept.lock().unwrap()[4], "memory of another moment");
}

#[test]
fn a_protection_that_is_ended_leaves_the_guest_at_the_source() {
    let protected = protected();
    protected.hears("taken", 1);
    protected.hears("safe", 1);
    protected.source.stop();
    let left = protected.source.wait().unwrap();
    assert_eq!((left.outcome, left.safe), (CheckpointOutcome::Stopped, 1), "{:?}", left.error);
    let arrived = protected.standby.wait().unwrap();
    assert_eq!(arrived.ending, StandbyEnding::Released, "{:?}", arrived.error);
    assert!(protected.vm.machine.runs() && !protected.machine.runs());
}

/// The embedder of the standby is wrong: the source that still runs learns of it, and its guest is paused.
#[test]
fn a_source_that_lives_pauses_its_guest_when_it_is_taken() {
    let protected = protected();
    protected.hears("taken", 1);
    protected.hears("safe", 1);
    protected.standby.activate();
    let arrived = protected.standby.wait().unwrap();
    assert_eq!(arrived.ending, StandbyEnding::Active(1), "{:?}", arrived.error);
    let left = protected.source.wait().unwrap();
    assert_eq!((left.outcome, left.not_resumed), (CheckpointOutcome::Taken, false), "{:?}", left.error);
    assert!(!protected.vm.machine.runs() && protected.machine.runs());
    assert!(bytes(&protected.there) == *protected.kept.lock().unwrap()[0]);
}

#[test]
fn a_standby_without_a_checkpoint_starts_nothing() {
    for activates in [true, false] {
        let (near, far) = UnixStream::pair().unwrap();
        let machine = TestMachine::default();
        let guest = DestinationGuest { memory: Box::new(memory(PAGES)), control: Box::new(machine.clone()) };
        let standby = StandbySession::new(guest, channel(far), StandbySettings::default()).spawn().unwrap();
        if activates {
            standby.activate();
        } else {
            drop(near);
        }
        let arrived = standby.wait().unwrap();
        let due = if activates { StandbyEnding::Nothing } else { StandbyEnding::Discarded };
        assert_eq!(arrived.ending, due, "{:?}", arrived.error);
        assert!(!machine.runs());
    }
}

/// What a standby says to a source that sends `messages` after its greeting, and how it ends when it is told to start.
fn refused(messages: &[u8]) -> (StandbyReport, TestMachine) {
    let (near, far) = UnixStream::pair().unwrap();
    let machine = TestMachine::default();
    let guest = DestinationGuest { memory: Box::new(memory(8)), control: Box::new(machine.clone()) };
    let standby = StandbySession::new(guest, channel(far), StandbySettings::default()).spawn().unwrap();
    // It may have refused already.
    let _ = (&near).write_all(messages);
    near.shutdown(std::net::Shutdown::Write).unwrap();
    let _ = (&near).read_to_end(&mut Vec::new());
    standby.activate();
    (standby.wait().unwrap(), machine)
}

fn greeting(blocks: &[(&str, u64)]) -> Vec<u8> {
    let mut out = CheckpointMessage::Hello { page: 4096, blocks: blocks.len() as u64 }.encode().to_vec();
    for (name, pages) in blocks {
        let head = CheckpointMessage::Block { len: pages * 4096, name: name.len() as u64 };
        out.extend_from_slice(&head.encode());
        out.extend_from_slice(name.as_bytes());
    }
    out
}

#[test]
fn what_is_no_checkpoint_starts_no_guest() {
    use CheckpointMessage::{Close, Open, Pages, Release, State, Zeros};
    let block = BlockIndex(0);
    let good = greeting(&[("ram", 8), ("rom", 3)]);
    let after = |messages: &[CheckpointMessage]| {
        let bytes = messages.iter().flat_map(|message| message.encode());
        good.iter().copied().chain(bytes).collect::<Vec<_>>()
    };
    let cases = [
        (greeting(&[("ram", 8)]), "the source has none of this name"),
        (greeting(&[("ram", 9), ("rom", 3)]), "this guest"),
        (greeting(&[("ram", 8), ("other", 3)]), "no RAM block is called"),
        (b"QEVM\0\0\0\x03 a stream of another kind..".to_vec(), "speaks no checkpoints"),
        (after(&[Open(2)]), "the beginning of checkpoint 2"),
        (after(&[Pages { block, first: 0, pages: 1 }]), "Pages"),
        (after(&[Open(1), Zeros { block, first: 7, pages: 2 }]), "end beyond the block"),
        (after(&[Open(1), Zeros { block: BlockIndex(9), first: 0, pages: 1 }]), "no RAM block"),
        (after(&[Open(1), Zeros { block, first: u64::MAX, pages: u64::MAX }]), "block"),
        (after(&[Open(1), State(u64::MAX)]), "more device state"),
        (after(&[Open(1), State(0), Close { number: 1, pages: 1 }]), "of which 0 came"),
        (after(&[Open(1), Close { number: 1, pages: 0 }]), "the end of a checkpoint"),
        (after(&[Open(1), State(0), Close { number: 2, pages: 0 }]), "where 1 had begun"),
        (after(&[Open(1), Open(1)]), "the beginning of checkpoint 1"),
        (after(&[Open(1), Release]), "Release"),
        (after(&[Open(1), Pages { block, first: 0, pages: 3 }]), "closed the connection"),
    ];
    for (bytes, due) in cases {
        let (report, machine) = refused(&bytes);
        let text = report.error.map(|error| Chain(&error).to_string()).unwrap_or_default();
        assert!(text.contains(due), "{due}: {text}");
        assert!(matches!(report.ending, StandbyEnding::Nothing | StandbyEnding::Discarded), "{text}");
        assert!(!machine.runs() && report.last == 0, "{text}");
    }
}

/// The bytes of a whole checkpoint of one page.
fn checkpoint_bytes(number: u64) -> Vec<u8> {
    use CheckpointMessage::{Close, Open, Pages, State};
    let block = BlockIndex(0);
    let parts = [
        (Open(number), &[][..]),
        (Pages { block, first: number, pages: 1 }, &[7; 4096]),
        (State(7), b"devices"),
        (Close { number, pages: 1 }, &[]),
    ];
    parts.iter().flat_map(|(head, body)| head.encode().into_iter().chain(body.iter().copied())).collect()
}

/// A standby whose source has sent `bytes` behind its greeting, all of which were read, and its answers so far.
fn standby_that_has_read(bytes: &[u8], answers: usize) -> (StandbyHandle, TestMachine, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    let unread = far.try_clone().unwrap();
    let machine = TestMachine::default();
    let guest = DestinationGuest { memory: Box::new(memory(8)), control: Box::new(machine.clone()) };
    let standby = StandbySession::new(guest, channel(far), StandbySettings::default()).spawn().unwrap();
    (&near).write_all(&greeting(&[("ram", 8), ("rom", 3)])).unwrap();
    (&near).write_all(bytes).unwrap();
    (&near).read_exact(&mut vec![0; answers * HEAD_LEN]).unwrap();
    while rustix::io::ioctl_fionread(&unread).unwrap() > 0 {
        std::thread::yield_now();
    }
    (standby, machine, near)
}

/// Wherever the bytes of a source end when the embedder takes its guest: the source is told.
#[test]
fn a_source_is_told_that_its_guest_was_taken_whatever_was_arriving() {
    let (first, second) = (checkpoint_bytes(1), checkpoint_bytes(2));
    let page = 32 + 32;
    let state = page + 4096;
    let cuts =
        [0, 1, 31, 32, 33, page - 1, page, page + 1, page + 4095, state, state + 31, state + 32, state + 35]
            .into_iter()
            .chain([state + 32 + 7, second.len() - 1]);
    for cut in cuts {
        let bytes = [&first[..], &second[..cut]].concat();
        // READY and the confirmation of the first.
        let (standby, machine, mut near) = standby_that_has_read(&bytes, 2);
        standby.activate();
        let mut told = Vec::new();
        let _ = near.read_to_end(&mut told);
        let head = told.first_chunk().unwrap_or_else(|| panic!("after {cut} bytes nothing was said"));
        assert_eq!(StandbyMessage::decode(head), Ok(StandbyMessage::Taken(1)), "after {cut} bytes");
        let report = standby.wait().unwrap();
        assert_eq!((report.ending, report.last), (StandbyEnding::Active(1), 1), "after {cut} bytes");
        assert!(machine.runs());
    }
}

/// A handle that is dropped says that there is to be no guest, and comes too late.
#[test]
fn a_standby_that_was_told_to_start_does_not_discard_its_guest() {
    let (standby, machine, _near) = standby_that_has_read(&checkpoint_bytes(1), 2);
    standby.activate();
    standby.discard();
    let report = standby.wait().unwrap();
    assert_eq!(report.ending, StandbyEnding::Active(1), "{:?}", report.error);
    assert!(machine.runs());
}

/// A standby that does not take the bytes of a checkpoint: its guest runs on, and nothing protects it.
#[test]
fn a_standby_that_takes_nothing_keeps_the_guest_paused_for_a_limited_time() {
    let vm = Vm::new();
    let (near, far) = UnixStream::pair().unwrap();
    let (tell, told) = mpsc::channel();
    let watch = Watch { tell, memory: vm.memory.clone(), kept: Arc::default() };
    let settings = CheckpointSettings {
        interval: None,
        confirm_timeout: std::time::Duration::from_millis(200),
        ..CheckpointSettings::default()
    };
    let source = CheckpointSession::new(vm.guest(), channel(near), Box::new(watch), settings).unwrap();
    let source = source.spawn().unwrap();
    let head = |len: usize| (&far).read_exact(&mut vec![0; len]).unwrap();
    head(greeting(&[("ram", PAGES), ("rom", 3)]).len());
    (&far).write_all(&StandbyMessage::Ready.encode()).unwrap();
    // All memory is zero: a few messages. Then the device state, and CLOSE.
    let mut number = 0;
    while number != 1 {
        let mut bytes = [0; HEAD_LEN];
        (&far).read_exact(&mut bytes).unwrap();
        match CheckpointMessage::decode(&bytes).unwrap() {
            CheckpointMessage::State(len) => head(len as usize),
            CheckpointMessage::Close { number: closed, .. } => number = closed,
            _ => {}
        }
    }
    (&far).write_all(&StandbyMessage::Confirm(1).encode()).unwrap();
    assert_eq!((told.recv(), told.recv()), (Ok(("taken", 1)), Ok(("safe", 1))));
    // More than a socket holds, and nobody reads.
    (0..PAGES).for_each(|page| vm.write(page, page | 1));
    source.checkpoint();
    let report = source.wait().unwrap();
    assert_eq!((report.outcome, report.not_resumed, report.safe), (CheckpointOutcome::Unprotected, false, 1));
    assert!(vm.machine.runs());
    let text = report.error.map(|error| Chain(&error).to_string()).unwrap_or_default();
    assert!(text.contains("has not taken all bytes") && text.contains("0.2 s"), "{text}");
}

/// A protection that ends by itself says why.
#[test]
fn a_checkpoint_that_is_not_confirmed_is_the_reason() {
    let vm = Vm::new();
    let (near, far) = UnixStream::pair().unwrap();
    let (tell, _told) = mpsc::channel();
    let watch = Watch { tell, memory: vm.memory.clone(), kept: Arc::default() };
    let settings = CheckpointSettings {
        confirm_timeout: std::time::Duration::from_millis(200),
        ..CheckpointSettings::default()
    };
    let source = CheckpointSession::new(vm.guest(), channel(near), Box::new(watch), settings).unwrap();
    (&far).write_all(&StandbyMessage::Ready.encode()).unwrap();
    let report = source.spawn().unwrap().wait().unwrap();
    assert_eq!((report.outcome, report.safe), (CheckpointOutcome::Unprotected, 0));
    let text = report.error.map(|error| Chain(&error).to_string()).unwrap_or_default();
    assert!(text.contains("that it has a checkpoint within"), "{text}");
    assert!(vm.machine.runs());
}

/// A provider that has more blocks than the source: nothing would fill them.
#[test]
fn a_standby_has_no_block_that_the_source_has_not() {
    struct More(Arc<MappedGuest>);
    impl crate::session::MemoryProvider for More {
        fn provide(&mut self, _: &crate::session::Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
            Ok(self.0.clone())
        }
    }
    let (near, far) = UnixStream::pair().unwrap();
    let machine = TestMachine::default();
    let guest = DestinationGuest { memory: Box::new(More(memory(8))), control: Box::new(machine.clone()) };
    let standby = StandbySession::new(guest, channel(far), StandbySettings::default()).spawn().unwrap();
    (&near).write_all(&greeting(&[("ram", 8)])).unwrap();
    assert_eq!((&near).read_to_end(&mut Vec::new()).unwrap(), 0, "it is not ready");
    let report = standby.wait().unwrap();
    let text = report.error.map(|error| Chain(&error).to_string()).unwrap_or_default();
    assert!(text.contains("RAM block rom: the source has none of this name"), "{text}");
    assert_eq!(report.ending, StandbyEnding::Discarded);
}

#[test]
fn a_guest_without_a_dirty_source_is_not_protected() {
    let (near, _far) = UnixStream::pair().unwrap();
    let mut guest = Vm::new().guest();
    guest.dirty.clear();
    let (tell, _told) = mpsc::channel();
    let watch = Watch { tell, memory: memory(1), kept: Arc::default() };
    let refused =
        CheckpointSession::new(guest, channel(near), Box::new(watch), CheckpointSettings::default());
    assert!(matches!(refused, Err(Error::Config { .. })));
}
