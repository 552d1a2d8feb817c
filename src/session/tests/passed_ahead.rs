//! Memory that is passed ahead of a migration, as QEMU's cpr-transfer does it, with a ramwire at each end.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::passing::{Does, Vmm, channel};
use super::{Machine, bytes};
use crate::engine::{Ending, Outcome, Reason};
use crate::error::Chain;
use crate::guest::MappedGuest;
use crate::ram::{BlockName, RamBlock};
use crate::session::*;
use crate::sys::{Mapping, SharedFile};
use crate::units::{BlockIndex, PageSize};

const PAGES: u64 = 50;
const LEN: u64 = PAGES * 4096;

fn name(text: &str) -> BlockName {
    BlockName::new(text).unwrap()
}

/// A guest whose blocks are the first [`LEN`] bytes of these files.
fn guest_of(files: &[(&str, File)]) -> Arc<MappedGuest> {
    let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
    for (block, file) in files {
        file.set_len(LEN).unwrap();
        let ram = Mapping::file(file.try_clone().unwrap().into(), 0, LEN).unwrap();
        ram.region().span(4096, 5).unwrap().copy_from(b"bytes");
        builder = builder.mapping(RamBlock::new(name(block), LEN), &ram);
    }
    Arc::new(builder.build().unwrap())
}

fn from() -> Arc<MappedGuest> {
    guest_of(&[("r0", tempfile::tempfile().unwrap()), ("pc.bios", tempfile::tempfile().unwrap())])
}

/// What a process gets that takes this memory.
fn taken(memory: Vec<(BlockName, SharedFile)>) -> Vec<PassedBlock> {
    let take = |(name, file): (BlockName, SharedFile)| {
        PassedBlock::of_file(name, file.descriptor().try_clone_to_owned().unwrap()).unwrap()
    };
    memory.into_iter().map(take).collect()
}

struct Moved {
    sent: SourceReport,
    arrived: DestinationReport,
    source: Machine,
    vmm: Vmm,
}

fn moves(from: &Arc<MappedGuest>, passed: Vec<PassedBlock>, vmm: Vmm) -> Moved {
    moves_to(from, Some(passed), vmm)
}

/// To a destination that has `passed`, or to one that was passed nothing.
fn moves_to(from: &Arc<MappedGuest>, passed: Option<Vec<PassedBlock>>, vmm: Vmm) -> Moved {
    let (near, far) = UnixStream::pair().unwrap();
    let source = Machine::running(b"devices");
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.guest_is_paused = true;
    let guest = SourceGuest { memory: from.clone(), dirty: Vec::new(), control: Box::new(source.clone()) };
    let connection = SourceConnection::over(channel(near), from.clone());
    let arriving = DestinationGuest { memory: Box::new(vmm.clone()), control: Box::new(vmm.clone()) };
    let connection_there = DestinationConnection::over(channel(far));
    let destination = DestinationSession::new(arriving, connection_there, DestinationSettings::default());
    let destination = match passed {
        Some(passed) => destination.with_memory(passed),
        None => destination,
    };
    let thread = std::thread::spawn(move || destination.run());
    let sent = SourceSession::new(guest, connection, settings).with_memory_passed().run();
    Moved { sent, arrived: thread.join().unwrap(), source, vmm }
}

/// The source's guest runs, and nothing of its memory is other than before.
fn refused(moved: &Moved, from: &MappedGuest, before: &[Vec<u8>; 2], due: &str) {
    let text = Chain(moved.arrived.error.as_ref().unwrap()).to_string();
    assert!(text.contains(due), "{due}: {text}");
    assert_eq!(moved.sent.outcome, Outcome::StaysHere(Reason::Failed), "{text}");
    assert!(moved.source.runs() && !moved.vmm.machine.runs(), "{text}");
    assert_eq!(moved.arrived.ending, Ending::Discarded, "{text}");
    assert!([bytes(from, 0), bytes(from, 1)] == *before, "{text}");
    assert_eq!(moved.sent.dirty.count(), 2 * PAGES, "nothing counts as given away: {text}");
    assert!(moved.sent.passed.is_empty(), "{text}");
}

#[test]
fn no_page_of_memory_that_was_passed_ahead_is_sent() {
    let from = from();
    let moved = moves(&from, taken(memory_to_pass(&*from).unwrap()), Vmm::new(Does::Nothing));
    assert_eq!((moved.sent.outcome, moved.arrived.ending), (Outcome::Completed, Ending::Running));
    let statistics = &moved.sent.statistics;
    assert_eq!((statistics.passed.blocks, statistics.passed.bytes), (2, 2 * LEN));
    assert_eq!((statistics.pages.normal, statistics.pages.zero, statistics.total), (0, 0, 0));
    assert_eq!(moved.sent.passed, [name("r0"), name("pc.bios")]);
    let to = moved.vmm.guest();
    let file = |guest: &MappedGuest, index| guest.region(BlockIndex(index)).unwrap().shared_file().unwrap();
    assert!((0..2).all(|index| file(&from, index).is_same(&file(&to, index))));
    assert_eq!(&bytes(&from, 0)[8192..8200], b"it runs ", "the guest that runs writes to it");
    assert!(!moved.source.runs() && moved.vmm.machine.runs());
}

/// Less memory than the guest has, more of it, or what is no memory.
#[test]
fn memory_that_is_not_the_guests_starts_no_guest() {
    let memfd = |len| -> OwnedFd {
        Mapping::memfd("ram", len).unwrap().backing().unwrap().0.try_clone_to_owned().unwrap()
    };
    let from = from();
    let before = [bytes(&from, 0), bytes(&from, 1)];
    let all = || taken(memory_to_pass(&*from).unwrap());
    let part = |len| PassedBlock::of_file(name("r0"), memfd(len)).unwrap();
    let other = PassedBlock::of_file(name("r1"), memfd(LEN)).unwrap();
    let cases = [
        (all().into_iter().take(1).collect::<Vec<_>>(), "no descriptor came"),
        (Vec::new(), "no descriptor came"),
        (vec![part(LEN - 4096), all().remove(1)], "of them were passed"),
        (all().into_iter().chain([other]).collect(), "no block of this name"),
    ];
    for (passed, due) in cases {
        refused(&moves(&from, passed, Vmm::new(Does::Nothing)), &from, &before, due);
    }
    let pipe: OwnedFd = std::io::pipe().unwrap().0.into();
    let reading = tempfile::NamedTempFile::new().unwrap();
    for (descriptor, due) in [(pipe, "pipe"), (File::open(reading.path()).unwrap().into(), "reading only")] {
        let text = Chain(&PassedBlock::of_file(name("r0"), descriptor).unwrap_err()).to_string();
        assert!(text.contains(due), "{text}");
    }
    let again = moves(&from, all(), Vmm::new(Does::Nothing));
    assert_eq!((again.sent.outcome, again.arrived.ending), (Outcome::Completed, Ending::Running));
}

/// The memory went to one process, the migration goes to another: a ramwire says that it has nothing.
#[test]
fn a_destination_without_the_memory_is_not_given_the_guest() {
    let from = from();
    let before = [bytes(&from, 0), bytes(&from, 1)];
    let moved = moves_to(&from, None, Vmm::new(Does::Nothing));
    let text = Chain(moved.sent.error.as_ref().unwrap()).to_string();
    assert!(text.contains("has none of it"), "{text}");
    assert_eq!(moved.sent.outcome, Outcome::StaysHere(Reason::Failed), "{text}");
    assert_eq!(moved.arrived.ending, Ending::Discarded, "{text}");
    assert!(moved.source.runs() && !moved.vmm.machine.runs(), "{text}");
    assert!([bytes(&from, 0), bytes(&from, 1)] == before);
    assert_eq!(moved.sent.dirty.count(), 2 * PAGES, "nothing counts as given away");
}

/// A stream that nobody answers may end in a file, which the memory is not in.
#[test]
fn memory_that_was_passed_ahead_needs_a_destination_that_answers() {
    let from = from();
    let (near, far) = std::io::pipe().unwrap();
    let source = Machine::running(b"devices");
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.guest_is_paused = true;
    let guest = SourceGuest { memory: from.clone(), dirty: Vec::new(), control: Box::new(source.clone()) };
    let channel = crate::transport::StreamChannel::from_fd(far.into(), "pipe", &Default::default()).unwrap();
    let connection = SourceConnection::over(channel, from.clone());
    let sent = SourceSession::new(guest, connection, settings).with_memory_passed().run();
    let text = Chain(sent.error.as_ref().unwrap()).to_string();
    assert!(text.contains("carries no answers"), "{text}");
    assert_eq!(sent.outcome, Outcome::StaysHere(Reason::Failed));
    assert_eq!(std::io::Read::read_to_end(&mut { near }, &mut Vec::new()).unwrap(), 0, "nothing was sent");
}

#[test]
fn a_file_that_shrinks_after_it_was_passed_starts_no_guest() {
    let file = tempfile::tempfile().unwrap();
    let from = guest_of(&[("r0", file.try_clone().unwrap()), ("pc.bios", tempfile::tempfile().unwrap())]);
    let before = [bytes(&from, 0), bytes(&from, 1)];
    let vmm = Vmm::new(Does::Nothing);
    let again = file.try_clone().unwrap();
    *vmm.during_provide.lock().unwrap() = Some(Box::new(move || file.set_len(LEN - 4096).unwrap()));
    let moved = moves(&from, taken(memory_to_pass(&*from).unwrap()), vmm);
    // For the comparison: the last page was zero.
    again.set_len(LEN).unwrap();
    refused(&moved, &from, &before, "RAM block r0");
}

/// A guest of which only a part can be mapped elsewhere is not passed at all.
#[test]
fn private_memory_is_not_passed_ahead() {
    let own = Mapping::anonymous(LEN).unwrap();
    let shared = Mapping::memfd("ram", LEN).unwrap();
    let guest = |ignored| {
        let mut second = RamBlock::new(name("second"), LEN);
        second.flags.ignored = ignored;
        let builder = MappedGuest::builder(PageSize::SIZE_4K);
        let memory = if ignored { &shared } else { &own };
        builder.mapping(RamBlock::new(name("first"), LEN), &shared).mapping(second, memory).build().unwrap()
    };
    for (ignored, due) in [(false, "private memory"), (true, "left out as shared")] {
        let error = memory_to_pass(&guest(ignored)).unwrap_err();
        let text = Chain(&error).to_string();
        assert!(text.contains("second") && text.contains(due), "{text}");
        assert_eq!(error.kind(), ErrorKind::Local);
    }
}
