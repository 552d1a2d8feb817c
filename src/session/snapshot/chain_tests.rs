//! Snapshots that hold only the changes since another one.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::tests::{
    arrived, assert_whole, assert_writes, folder, loaded, session_of, settings, to_file, writing,
};
use super::*;
use crate::engine::Ending;
use crate::guest::{DirtyError, MappedGuest, SoftwareBitmap, TestMachine};
use crate::ram::{PageBitmap, PageRun};
use crate::session::tests::{bytes, guest, plain};
use crate::session::{DestinationGuest, RestoreSession, RestoreSettings, RestoreWay};
use crate::stream::snapshot_note::{BaseNote, INCREMENTAL, SnapshotId, SnapshotNote};
use crate::sys::Mapping;
use crate::transport::{Address, InlineLink, MappedDestination, PageSupply};
use crate::units::{BlockIndex, PageIndex};

const PAGES: [u64; 2] = [40, 7];

fn address(path: &Path) -> Address {
    format!("mapped:{}", path.display()).parse().unwrap()
}

/// Why the file can't be read.
fn refused(path: &Path) -> String {
    Chain(&MappedDestination::open(&address(path)).err().unwrap()).to_string()
}

/// A guest whose pages are written by hand.
struct ByHand {
    memory: Arc<MappedGuest>,
    log: Arc<SoftwareBitmap>,
    base: Option<SnapshotBase>,
}

impl ByHand {
    fn new() -> Self {
        let memory = guest(&PAGES);
        let log = Arc::new(SoftwareBitmap::new(memory.table()));
        Self { memory, log, base: None }
    }

    fn write(&self, page: u64, byte: u8) {
        let region = self.memory.region(BlockIndex(0)).unwrap();
        region.span(page * 4096, 4096).unwrap().copy_from(&[byte; 4096]);
        self.log.mark_run(PageRun { block: BlockIndex(0), first: PageIndex(page), pages: 1 });
    }

    fn session(&mut self) -> SnapshotSession {
        let machine = TestMachine::running(b"devices").keeping_memory();
        let memory = self.memory.clone();
        let given = SnapshotGuest { memory, control: Box::new(machine), other_writers: Vec::new() };
        let session = SnapshotSession::new(given, settings()).unwrap();
        match self.base.take() {
            Some(base) => session.since(base).unwrap(),
            None => session.tracked(vec![self.log.clone()]),
        }
    }

    fn taken(&mut self, path: &Path) {
        let session = self.session();
        let report = to_file(session, path);
        assert_eq!(report.outcome, SnapshotOutcome::Taken, "{:?}", report.error);
        self.base = report.base;
    }

    fn contents(&self) -> [Vec<u8>; 2] {
        [bytes(&self.memory, 0), bytes(&self.memory, 1)]
    }
}

fn restored(path: &Path, way: RestoreWay) -> [Vec<u8>; 2] {
    let mut settings = RestoreSettings::default();
    (settings.way, settings.user_mode_only) = (way, true);
    let to = guest(&PAGES);
    let control = Box::new(TestMachine::default());
    let arriving = DestinationGuest { memory: Box::new(to.clone()), control };
    let restored = RestoreSession::open(arriving, &address(path), settings).unwrap().run().unwrap();
    assert_eq!(restored.report.ending, Ending::Running, "{:?}", restored.report.error);
    restored.pages.iter().for_each(|pages| pages.wait().unwrap());
    [bytes(&to, 0), bytes(&to, 1)]
}

/// By each way to read it.
fn assert_holds(path: &Path, contents: &[Vec<u8>; 2]) {
    for way in [RestoreWay::Eager, RestoreWay::Lazy] {
        assert!(restored(path, way) == *contents, "{way:?}, {}", path.display());
    }
    let file = MappedDestination::open(&address(path)).unwrap();
    for (block, contents) in (0..).zip(contents) {
        let mapping = file.map(block as usize).unwrap().unwrap();
        let mut found = vec![1; contents.len()];
        mapping.region().span(0, contents.len() as u64).unwrap().copy_to(&mut found);
        assert!(found == *contents, "mapped, {}", path.display());
        let mut found = vec![1; contents.len() - 100];
        file.own_pages().read(BlockIndex(block), 100, &mut found).unwrap();
        assert!(found == contents[100..], "read, {}", path.display());
    }
}

#[test]
fn each_snapshot_of_a_chain_holds_one_moment_of_a_guest_that_writes_on() {
    const LEN: u64 = 8 << 20;
    let dir = folder();
    let mut guest = writing(&Mapping::memfd("ram", LEN).unwrap());
    let names: Vec<PathBuf> = (0..4).map(|number| PathBuf::from(format!("snapshot-{number}"))).collect();
    let mut base: Option<SnapshotBase> = None;
    for (number, name) in names.iter().enumerate() {
        assert_writes(&mut guest);
        let session = session_of(&guest);
        let session = match base.take() {
            Some(base) => session.since(base).unwrap(),
            None => session.tracked(vec![guest.software()]),
        };
        let path = dir.path().join(name);
        let report = to_file(session, &path);
        assert_eq!(report.outcome, SnapshotOutcome::Taken, "{number}: {:?}", report.error);
        base = report.base;
        // Half of the memory is written to.
        assert!(
            number == 0 || report.pages.normal + report.pages.zero <= LEN / 4096 / 2 + 1,
            "{:?}",
            report.pages
        );
        assert_eq!(MappedDestination::open(&address(&path)).unwrap().files().len(), number + 1);
        assert_whole(arrived(loaded(&path).unwrap(), LEN));
    }
    assert_writes(&mut guest);
    drop(base);
    // Those in front are as they were, also when all have moved.
    let moved = dir.path().join("moved");
    std::fs::create_dir(&moved).unwrap();
    names.iter().for_each(|name| std::fs::rename(dir.path().join(name), moved.join(name)).unwrap());
    names.iter().for_each(|name| assert_whole(arrived(loaded(&moved.join(name)).unwrap(), LEN)));
    assert_whole(guest);
}

#[test]
fn only_what_has_changed_is_written_and_all_is_read() {
    let dir = folder();
    let [first, second, third, fourth] = ["1", "2", "3", "4"].map(|name| dir.path().join(name));
    let mut guest = ByHand::new();
    (0..30).for_each(|page| guest.write(page, 7));
    guest.taken(&first);
    let one = guest.contents();
    // Changed, made zero, used for the first time.
    guest.write(5, 9);
    guest.write(6, 0);
    guest.write(35, 8);
    guest.taken(&second);
    let two = guest.contents();
    guest.write(6, 4);
    guest.write(7, 0);
    guest.taken(&third);
    let three = guest.contents();
    guest.taken(&fourth);
    for (path, contents) in [(&first, &one), (&second, &two), (&third, &three), (&fourth, &three)] {
        assert_holds(path, contents);
    }
    let file = MappedDestination::open(&address(&third)).unwrap();
    assert_eq!(
        file.files(),
        [&third, &second, &first].map(|path| path.canonicalize().unwrap_or(path.clone()))
    );
    let length = |path: &Path| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(path).unwrap().blocks() * 512
    };
    assert!(length(&fourth) + 30 * 4096 <= length(&first), "nothing has changed");
    let base = guest.base.as_ref().unwrap();
    assert_eq!(
        file.note().unwrap().base.as_ref().unwrap().path,
        "2",
        "its name, since it is in the same folder"
    );
    // While it is a base nothing writes to its file.
    let link = crate::transport::open_source(
        &address(&fourth),
        guest.memory.clone(),
        &Default::default(),
        &crate::sys::Stop::never(),
    );
    assert!(link.is_err() && base.id().len() == 32);
}

/// Each action fails in turn: the changed pages are in the next snapshot nevertheless.
#[test]
fn a_snapshot_that_fails_leaves_its_base_with_all_that_has_changed() {
    let dir = folder();
    let [first, second, third] = ["1", "2", "3"].map(|name| dir.path().join(name));
    let mut guest = ByHand::new();
    (0..30).for_each(|page| guest.write(page, 7));
    guest.taken(&first);
    let mut failures = 0;
    for at in 0..u32::MAX {
        guest.write(u64::from(at % 40), 100 + at as u8);
        let report = to_file(guest.session().failing_at(at), &second);
        guest.base = report.base;
        assert!(guest.base.is_some(), "failure {at}");
        if report.outcome == SnapshotOutcome::Taken {
            break;
        }
        failures += 1;
    }
    assert!(failures >= 8, "{failures}");
    let two = guest.contents();
    guest.write(1, 1);
    guest.taken(&third);
    assert_holds(&second, &two);
    assert_holds(&third, &guest.contents());
}

/// A log that loses what it has read when it is to fail.
struct Forgetful {
    log: Arc<SoftwareBitmap>,
    fails: AtomicBool,
}

impl DirtySource for Forgetful {
    fn name(&self) -> &'static str {
        "forgetful"
    }
    fn probe(&self) -> Result<(), DirtyError> {
        self.log.probe()
    }
    fn start(&self) -> Result<(), DirtyError> {
        self.log.start()
    }
    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        self.log.sync_into(block, into)?;
        if !self.fails.load(Ordering::Relaxed) {
            return Ok(());
        }
        let source = std::io::Error::other("a test");
        Err(DirtyError::Kernel { source_name: "forgetful", what: "reading it", source })
    }
    fn stop(&self) -> Result<(), DirtyError> {
        self.log.stop()
    }
}

/// What it has read and lost would be missing in every later snapshot.
#[test]
fn after_a_dirty_source_has_failed_there_is_no_base_and_a_whole_snapshot_can_be_taken() {
    let dir = folder();
    let [first, second, third] = ["1", "2", "3"].map(|name| dir.path().join(name));
    let mut guest = ByHand::new();
    guest.write(3, 3);
    let log = Arc::new(Forgetful { log: guest.log.clone(), fails: AtomicBool::new(false) });
    let report = to_file(guest.session().tracked(vec![log.clone()]), &first);
    assert_eq!(report.outcome, SnapshotOutcome::Taken, "{:?}", report.error);
    guest.base = report.base;
    guest.write(4, 4);
    log.fails.store(true, Ordering::Relaxed);
    let report = to_file(guest.session(), &second);
    assert_eq!(
        (report.outcome, report.base.is_none()),
        (SnapshotOutcome::Failed, true),
        "{:?}",
        report.error
    );
    guest.taken(&third);
    assert_holds(&third, &guest.contents());
}

#[test]
fn what_is_written_where_no_note_is_kept_has_no_base() {
    let dir = folder();
    let mut guest = ByHand::new();
    guest.taken(&dir.path().join("1"));
    let (near, _far) = UnixStream::pair().unwrap();
    let session = guest.session();
    let link = Box::new(InlineLink::new(plain(&near), session.memory()));
    let report = session.run(SourceConnection::new(link, None));
    assert_eq!(report.outcome, SnapshotOutcome::Failed);
    let error = report.error.unwrap().to_string();
    assert!(error.contains("write it to a mapped: file") && report.base.is_some(), "{error}");
}

#[test]
fn a_base_that_is_missing_or_another_one_is_named() {
    let dir = folder();
    let [first, second, other] = ["1", "2", "other"].map(|name| dir.path().join(name));
    let mut guest = ByHand::new();
    guest.write(1, 1);
    guest.taken(&first);
    guest.taken(&second);
    guest.base = None;
    guest.taken(&other);
    guest.base = None;
    let whole = std::fs::read(&first).unwrap();
    // No other program takes it for a whole guest.
    assert_eq!(std::fs::read(&second).unwrap()[..8], INCREMENTAL);
    std::fs::remove_file(&first).unwrap();
    let error = refused(&second);
    assert!(error.contains("put that one there again") && error.contains(first.to_str().unwrap()), "{error}");
    std::fs::copy(&other, &first).unwrap();
    let error = refused(&second);
    assert!(error.contains("is another one") && error.contains(first.to_str().unwrap()), "{error}");
    std::fs::write(&first, &whole[..whole.len() - 1]).unwrap();
    assert!(refused(&second).contains("is another one (none)"), "without its note");
    let mut torn = whole.clone();
    torn[..8].fill(0);
    std::fs::write(&first, &torn).unwrap();
    assert!(refused(&second).contains("which can't be read: "), "{}", refused(&second));
    // A block of another length: the last length in the list is that of the second block.
    std::fs::write(&first, &whole).unwrap();
    assert!(MappedDestination::open(&address(&second)).is_ok());
}

/// A note of `file` in place of the one that it has.
fn noted(file: &Path, first_word: Option<&[u8; 8]>, change: impl FnOnce(&mut SnapshotNote)) {
    let bytes = std::fs::read(file).unwrap();
    let find = |at: u64, into: &mut [u8]| {
        into.copy_from_slice(&bytes[at as usize..at as usize + into.len()]);
        Ok(())
    };
    let (mut note, len) = SnapshotNote::find(bytes.len() as u64, find).unwrap().unwrap();
    change(&mut note);
    let mut changed = bytes[..bytes.len() - len as usize].to_vec();
    note.encode(&mut changed);
    if let Some(word) = first_word {
        changed[..8].copy_from_slice(word);
    }
    std::fs::write(file, changed).unwrap();
}

#[test]
fn files_that_are_made_up_are_refused() {
    let dir = folder();
    let path = dir.path().join("1");
    let mut guest = ByHand::new();
    guest.write(1, 1);
    guest.taken(&path);
    guest.base = None;
    let whole = std::fs::read(&path).unwrap();
    noted(&path, Some(&INCREMENTAL), |_| {});
    assert!(refused(&path).contains("is missing"), "{}", refused(&path));
    std::fs::write(&path, &whole).unwrap();
    let own = BaseNote { id: SnapshotId([3; 16]), path: "1".into(), starts_at: 0 };
    noted(&path, None, |note| note.base = Some(own.clone()));
    assert!(refused(&path).contains("its first word does not"), "{}", refused(&path));
    // It is its own base.
    noted(&path, Some(&INCREMENTAL), |note| *note = SnapshotNote { id: own.id, base: Some(own.clone()) });
    assert!(refused(&path).contains("more than 64 snapshots need each other"), "{}", refused(&path));
    noted(&path, None, |note| note.base.as_mut().unwrap().starts_at = u64::MAX);
    assert!(!refused(&path).is_empty());
    noted(&path, None, |note| note.base.as_mut().unwrap().path = "/dev/zero".into());
    assert!(refused(&path).contains("it is no regular file"), "{}", refused(&path));
    // Each byte of the note is wrong in turn; a note that is none leaves a file that names a base without one.
    let good = std::fs::read(&path).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    for at in good.len() - 100..good.len() {
        file.write_all_at(&[!good[at]], at as u64).unwrap();
        assert!(MappedDestination::open(&address(&path)).is_err(), "byte {at}");
        file.write_all_at(&good[at..=at], at as u64).unwrap();
    }
    // A base of another guest.
    std::fs::write(&path, &whole).unwrap();
    let memory = crate::session::tests::guest(&[41, 7]);
    let machine = TestMachine::running(b"devices").keeping_memory();
    let given = SnapshotGuest { memory, control: Box::new(machine), other_writers: Vec::new() };
    let alien = dir.path().join("alien");
    let report = to_file(SnapshotSession::new(given, settings()).unwrap(), &alien);
    assert_eq!(report.outcome, SnapshotOutcome::Taken);
    let id = MappedDestination::open(&address(&path)).unwrap().note().unwrap().id;
    noted(&alien, Some(&INCREMENTAL), |note| {
        note.base = Some(BaseNote { id, path: "1".into(), starts_at: 0 })
    });
    assert!(refused(&alien).contains("RAM block block0 is not the same"), "{}", refused(&alien));
}
