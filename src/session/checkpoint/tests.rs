//! A guest with a standby, as threads run them, over a socket.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};

use super::*;
use crate::error::Chain;
use crate::guest::{MappedGuest, SoftwareBitmap, TestMachine};
use crate::ram::{BlockName, RamBlock};
use crate::session::{DestinationGuest, SourceGuest};
use crate::stream::checkpoints::CheckpointMessage;
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
    let vm = Vm::new();
    (0..PAGES).filter(|page| page % 3 > 0).for_each(|page| vm.write(page, page));
    let (near, far) = UnixStream::pair().unwrap();
    let (there, machine) = (memory(PAGES), TestMachine::default());
    // What was there before is gone.
    there.region(BlockIndex(0)).unwrap().span(0, 100).unwrap().copy_from(&[9; 100]);
    let guest = DestinationGuest { memory: Box::new(there.clone()), control: Box::new(machine.clone()) };
    let standby = StandbySession::new(guest, channel(far), StandbySettings::default()).spawn().unwrap();
    let (tell, told) = mpsc::channel();
    let kept = Arc::default();
    let watch = Watch { tell, memory: vm.memory.clone(), kept: Arc::clone(&kept) };
    let settings = CheckpointSettings { interval: None, ..CheckpointSettings::default() };
    let again = near.try_clone().unwrap();
    let source = CheckpointSession::new(vm.guest(), channel(near), Box::new(watch), settings).unwrap();
    let source = source.spawn().unwrap();
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
        (after(&[Open(2)]), ""),
        (after(&[Pages { block, first: 0, pages: 1 }]), "Pages"),
        (after(&[Open(1), Zeros { block, first: 7, pages: 2 }]), "end beyond the block"),
        (after(&[Open(1), Zeros { block: BlockIndex(9), first: 0, pages: 1 }]), "no RAM block"),
        (after(&[Open(1), Zeros { block, first: u64::MAX, pages: u64::MAX }]), "block"),
        (after(&[Open(1), State(u64::MAX)]), "more device state"),
        (after(&[Open(1), State(0), Close { number: 1, pages: 1 }]), "of which 0 came"),
        (after(&[Open(1), Close { number: 1, pages: 0 }]), "the end of a checkpoint"),
        (after(&[Open(1), State(0), Close { number: 2, pages: 0 }]), ""),
        (after(&[Open(1), Open(1)]), "Open"),
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
