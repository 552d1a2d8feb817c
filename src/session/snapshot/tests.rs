//! Snapshots of guests whose threads write numbered pages: the number identifies the write.
#![allow(clippy::unwrap_used)]

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::engine::Ending;
use crate::guest::synthetic::{SyntheticConfig, SyntheticGuest};
use crate::guest::{MappedGuest, TestMachine};
use crate::ram::{BlockName, RamBlock};
use crate::session::tests::{guest, plain};
use crate::session::{DestinationConnection, DestinationGuest, DestinationSession, DestinationSettings};
use crate::sys::testing::huge_pages;
use crate::sys::{Mapping, Stop};
use crate::transport::{
    AllowList, ConnectionOptions, InlineLink, Listener, MappedLink, OpenError, StreamChannel, StreamOptions,
};
use crate::units::PageSize;

const MIB: u64 = 1 << 20;

fn memory_of(mapping: &Mapping) -> Arc<MappedGuest> {
    let block = RamBlock::new(BlockName::new("ram").unwrap(), mapping.region().len());
    Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, mapping).build().unwrap())
}

/// Runs, and writes most of its memory as fast as it can.
pub(super) fn writing(mapping: &Mapping) -> SyntheticGuest {
    let config = SyntheticConfig {
        working_set: mapping.region().len() / 2,
        rate: None,
        writers: 3,
        ..SyntheticConfig::default()
    };
    let mut guest = SyntheticGuest::filled(memory_of(mapping), config).unwrap();
    guest.resume().unwrap();
    guest
}

pub(super) fn settings() -> SnapshotSettings {
    let mut settings = SnapshotSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    // This guest's threads write in user mode, and these tests need no privilege.
    settings.user_mode_only = true;
    settings.buffer = MIB;
    settings
}

pub(super) fn session_of(guest: &SyntheticGuest) -> SnapshotSession {
    let memory = guest.memory().clone();
    let control = Box::new(guest.clone());
    SnapshotSession::new(SnapshotGuest { memory, control, other_writers: Vec::new() }, settings()).unwrap()
}

pub(super) fn to_file(session: SnapshotSession, path: &Path) -> SnapshotReport {
    let link = MappedLink::create(path, session.memory());
    session.run(SourceConnection::new(Box::new(link), None))
}

/// What came, let run: the guest itself knows whether all of it is of one moment.
pub(super) fn arrived(connection: DestinationConnection, len: u64) -> SyntheticGuest {
    let guest = SyntheticGuest::empty(memory_of(&Mapping::anonymous(len).unwrap()));
    let memory = Box::new(guest.memory().clone());
    let arriving = DestinationGuest { memory, control: Box::new(guest.clone()) };
    let report = DestinationSession::new(arriving, connection, DestinationSettings::default()).run();
    assert_eq!(report.ending, Ending::Running, "{:?}", report.error);
    guest
}

pub(super) fn loaded(path: &Path) -> Option<DestinationConnection> {
    let stop = Stop::never();
    let address = format!("mapped:{}", path.display()).parse().unwrap();
    let mut listener = Listener::bind(&address, AllowList::default(), &stop).unwrap();
    match listener.accept_connection(&ConnectionOptions::default(), &stop) {
        Err(OpenError::Unreadable { .. }) => None,
        opened => Some(opened.unwrap_or_else(|error| panic!("{error}"))),
    }
}

pub(super) fn assert_whole(mut guest: SyntheticGuest) {
    guest.pause().unwrap();
    let found = guest.verify().unwrap();
    assert!(found.is_whole(), "{found:?}");
}

/// It runs: each of its threads goes on, whatever it waited for.
pub(super) fn assert_writes(guest: &mut SyntheticGuest) {
    let before = guest.vcpu_dirty_pages();
    let began = std::time::Instant::now();
    while guest.vcpu_dirty_pages().iter().zip(&before).any(|(now, before)| now <= before) {
        assert!(began.elapsed() < Duration::from_secs(60), "a writer stands still");
        std::thread::yield_now();
    }
}

pub(super) fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

#[test]
fn a_file_holds_one_moment_of_a_guest_that_writes_on_whatever_its_memory_is() {
    huge_pages(PageSize::SIZE_2M, 16);
    let dir = folder();
    let path = dir.path().join("guest");
    for (what, mapping) in [
        ("anonymous", Mapping::anonymous(8 * MIB).unwrap()),
        ("memfd", Mapping::memfd("ram", 8 * MIB).unwrap()),
        ("huge anonymous", Mapping::anonymous_huge(8 * MIB, PageSize::SIZE_2M).unwrap()),
        ("huge memfd", Mapping::memfd_huge("ram", 8 * MIB, PageSize::SIZE_2M).unwrap()),
    ] {
        let mut guest = writing(&mapping);
        for _ in 0..2 {
            assert_writes(&mut guest);
            let report = to_file(session_of(&guest), &path);
            assert_eq!(report.outcome, SnapshotOutcome::Taken, "{what}: {:?}", report.error);
            assert_eq!(report.pages.normal + report.pages.zero, 8 * MIB / 4096, "{what}: each page once");
            assert!(!report.not_resumed && report.error.is_none());
            assert_writes(&mut guest);
            assert_whole(arrived(loaded(&path).unwrap(), 8 * MIB));
        }
        assert_whole(guest);
    }
}

#[test]
fn a_stream_brings_one_moment_of_a_guest_that_writes_on() {
    let mut guest = writing(&Mapping::memfd("ram", 8 * MIB).unwrap());
    let (near, far) = UnixStream::pair().unwrap();
    let session = session_of(&guest);
    let connection = SourceConnection::over(
        StreamChannel::from_fd(near.into(), "peer", &StreamOptions::default()).unwrap(),
        session.memory(),
    );
    let handle = session.spawn(connection).unwrap();
    let far = StreamChannel::from_fd(far.into(), "peer", &StreamOptions::default()).unwrap();
    let there = arrived(DestinationConnection::over(far), 8 * MIB);
    let report = handle.wait().unwrap();
    assert_eq!(report.outcome, SnapshotOutcome::Taken, "{:?}", report.error);
    assert_writes(&mut guest);
    assert_whole(there);
    assert_whole(guest);
}

/// Memory that was never used is neither read nor allocated, and memory that is used later is not in the snapshot.
#[test]
fn unused_memory_is_zero_and_stays_unused() {
    for mapping in [Mapping::anonymous(64 * MIB).unwrap(), Mapping::memfd("ram", 64 * MIB).unwrap()] {
        mapping.region().span(32 * MIB, 4096).unwrap().copy_from(&[7; 4096]);
        let memory = memory_of(&mapping);
        let machine = TestMachine::running(b"devices").keeping_memory();
        let given = SnapshotGuest { memory, control: Box::new(machine.clone()), other_writers: Vec::new() };
        let session = SnapshotSession::new(given, settings()).unwrap();
        let dir = folder();
        let report = to_file(session, &dir.path().join("guest"));
        assert_eq!(report.outcome, SnapshotOutcome::Taken, "{:?}", report.error);
        assert_eq!((report.pages.normal, report.pages.zero), (1, 64 * 256 - 1));
        assert!(machine.runs());
        let mut used = 0;
        mapping.region().touched(|range| used += range.end - range.start);
        assert!(used <= 4 * MIB, "{used} bytes are in use");
    }
}

/// Each action fails in turn, and each operation on the file.
#[test]
fn a_snapshot_that_fails_leaves_its_guest_running_and_no_file_that_says_it_is_whole_and_is_not() {
    let dir = folder();
    let path = dir.path().join("guest");
    let mut guest = writing(&Mapping::memfd("ram", 2 * MIB).unwrap());
    for by_file in [false, true] {
        let mut failures = 0;
        for at in 0..u32::MAX {
            let session = session_of(&guest);
            let session = if by_file { session } else { session.failing_at(at) };
            let link = MappedLink::create(&path, session.memory());
            if by_file {
                link.break_at(at.into());
            }
            let report = session.run(SourceConnection::new(Box::new(link), None));
            if report.not_resumed {
                // The failure was that it could not resume.
                guest.resume().unwrap();
            }
            assert_writes(&mut guest);
            match report.outcome {
                SnapshotOutcome::Taken => {
                    assert_whole(arrived(loaded(&path).unwrap(), 2 * MIB));
                    break;
                }
                SnapshotOutcome::Failed => {
                    assert!(report.error.is_some());
                    if let Some(there) = loaded(&path) {
                        // It is only unknown whether the last word of the stream is on the disk.
                        assert!(by_file, "failure {at}: the file says that it is whole");
                        assert_whole(arrived(there, 2 * MIB));
                    }
                    failures += 1;
                }
                SnapshotOutcome::Cancelled => panic!("nobody has cancelled"),
            }
        }
        assert!(failures >= 8, "{failures}");
    }
    assert_whole(guest);
}

/// The output is not read, until the guest's threads wait too.
#[test]
fn a_cancel_lets_threads_that_wait_run_on() {
    let mut guest = writing(&Mapping::anonymous(32 * MIB).unwrap());
    let (near, _far) = UnixStream::pair().unwrap();
    let session = session_of(&guest);
    let link = Box::new(InlineLink::new(plain(&near), session.memory()));
    let handle = session.spawn(SourceConnection::new(link, None)).unwrap();
    // As soon as no thread writes any more.
    let mut seen = Vec::new();
    while seen.len() < 300 || seen[seen.len() - 300..].iter().any(|n| n != seen.last().unwrap()) {
        seen.push(guest.pages_written());
        std::thread::sleep(Duration::from_millis(1));
        assert!(seen.len() < 60_000, "the guest writes on");
    }
    assert_eq!(handle.cancel(), CancelReply::Accepted);
    let report = handle.wait().unwrap();
    assert_eq!(report.outcome, SnapshotOutcome::Cancelled);
    assert!(matches!(report.error, Some(Error::Cancelled)) && report.faults > 0, "{report:?}");
    assert_writes(&mut guest);
    assert_whole(guest);
}

#[test]
fn a_target_that_takes_nothing_fails_the_snapshot_in_time() {
    let mut guest = writing(&Mapping::anonymous(32 * MIB).unwrap());
    let (near, _far) = UnixStream::pair().unwrap();
    let mut session = session_of(&guest);
    session.settings.stall_timeout = Duration::from_millis(200);
    let link = Box::new(InlineLink::new(plain(&near), session.memory()));
    let report = session.run(SourceConnection::new(link, None));
    assert_eq!(report.outcome, SnapshotOutcome::Failed);
    assert!(report.error.unwrap().to_string().contains("raise the stall timeout"));
    assert_writes(&mut guest);
    assert_whole(guest);
}

#[test]
fn what_there_can_be_no_snapshot_of_is_refused_with_the_reason() {
    let machine = || TestMachine::running(b"devices").keeping_memory();
    let of = |memory: Arc<MappedGuest>, machine: TestMachine, others: &[&str]| {
        let other_writers = others.iter().map(|name| (*name).to_owned()).collect();
        SnapshotSession::new(SnapshotGuest { memory, control: Box::new(machine), other_writers }, settings())
    };
    let error = of(guest(&[4]), machine(), &["vhost-user net0"]).err().unwrap();
    assert!(error.to_string().contains("vhost-user net0 writes to the guest's memory"), "{error}");
    let on_disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let on_disk = memory_of(&Mapping::file_grown(on_disk.into(), 0, MIB, true).unwrap());
    let dir = folder();
    for (memory, machine, why) in [
        (on_disk, machine(), "a file on a disk can't be protected"),
        (guest(&[4]), TestMachine::running(b"devices"), "balloon"),
    ] {
        let report = to_file(of(memory, machine.clone(), &[]).unwrap(), &dir.path().join("guest"));
        assert_eq!(report.outcome, SnapshotOutcome::Failed);
        let error = report.error.unwrap();
        assert!(Chain(&error).to_string().contains(why), "{}", Chain(&error));
        assert!(machine.runs());
    }
}

/// A callback that writes to guest memory itself, like a paravirtual clock's: it waits like any writer.
#[test]
fn a_resume_that_writes_to_guest_memory_does_not_wait_for_itself() {
    struct Clock(TestMachine, Arc<MappedGuest>);
    impl GuestControl for Clock {
        fn pause(&mut self) -> io::Result<()> {
            self.0.pause()
        }
        fn resume(&mut self) -> io::Result<()> {
            let region = self.1.region(crate::units::BlockIndex(0)).unwrap();
            (0..4).for_each(|page| _ = region.span(page * 4096, 8).unwrap().copy_from(&[9; 8]));
            self.0.resume()
        }
        fn forbid_discard(&mut self, _forbid: bool) -> bool {
            true
        }
    }
    let memory = guest(&[4]);
    let region = memory.region(crate::units::BlockIndex(0)).unwrap();
    region.span(0, 4 * 4096).unwrap().copy_from(&[7; 4 * 4096]);
    let machine = TestMachine::running(b"");
    let control = Box::new(Clock(machine.clone(), memory.clone()));
    let given = SnapshotGuest { memory: memory.clone(), control, other_writers: Vec::new() };
    let dir = folder();
    let path = dir.path().join("guest");
    let report = to_file(SnapshotSession::new(given, settings()).unwrap(), &path);
    assert_eq!(report.outcome, SnapshotOutcome::Taken, "{:?}", report.error);
    assert!(machine.runs());
    let file = std::fs::read(&path).unwrap();
    assert!(!file.windows(8).any(|bytes| bytes == [9; 8]), "written after the moment");
}
