//! Saves and loads of a file: complete, interrupted at each step, and damaged.

#![allow(clippy::unwrap_used)]

use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::guest::{GuestMemory, MappedGuest, Placer};
use crate::ram::{BlockName, PageBatch, PageRun, RamBlock, RoundKind, Verdict};
use crate::stream::qemu::blocks::{BlockAnnouncement, encode_block_list};
use crate::stream::qemu::file::{Configuration, encode_configuration, encode_header};
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::stream::qemu::mapped_stream::MappedReadError;
use crate::stream::qemu::ram::{EOS_RECORD, IDSTR};
use crate::stream::qemu::section::{self, SectionName};
use crate::stream::qemu::tail::without_devices;
use crate::sys::{Mapping, SendPart, Stop, cached_bytes, spawn_thread};
use crate::transport::{ByteSource, ChannelError, DestinationLink, MoveError, OpenError, Random, SourceLink};
use crate::units::{BlockIndex, PageIndex, PageSize};

const PAGES: u64 = 700;
const RAM: u32 = 7;

struct Guest {
    memory: Arc<MappedGuest>,
    ram: Mapping,
}

impl Guest {
    fn new() -> Self {
        let (ram, rom) = (Mapping::anonymous(PAGES * 4096).unwrap(), Mapping::anonymous(3 * 4096).unwrap());
        let block = |name, pages| RamBlock::new(BlockName::new(name).unwrap(), pages * 4096);
        let builder = MappedGuest::builder(PageSize::SIZE_4K);
        let builder = builder.mapping(block("ram", PAGES), &ram).mapping(block("rom", 3), &rom);
        Self { memory: Arc::new(builder.build().unwrap()), ram }
    }

    fn write(&self, page: u64, byte: u8) {
        self.ram.region().span(page * 4096, 4096).unwrap().copy_from(&[byte; 4096]);
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = vec![0; (PAGES * 4096) as usize];
        self.ram.region().span(0, PAGES * 4096).unwrap().copy_to(&mut out);
        out
    }

    /// Every seventh page is zero.
    fn fill(&self) {
        (0..PAGES).filter(|page| page % 7 != 0).for_each(|page| self.write(page, (page % 250) as u8 + 1));
    }
}

fn run(first: u64, pages: u64) -> PageRun {
    PageRun { block: BlockIndex(0), first: PageIndex(first), pages }
}

/// A save, as a session makes it.
struct Save {
    link: MappedLink,
}

impl Save {
    fn create(path: &Path, starts_at: u64, guest: &Guest) -> Self {
        let memory: Arc<dyn GuestMemory> = guest.memory.clone();
        Self { link: create(path, starts_at, memory, 2, &(Arc::new(spawn_thread) as _)).unwrap() }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), MoveError> {
        Ok(self.link.sink().send(&[SendPart::Own(bytes)], &Stop::never())?)
    }

    fn set_up(&mut self, guest: &Guest) -> Result<(), MoveError> {
        let mut out = Vec::new();
        encode_header(&mut out);
        let configuration = Configuration { machine: "none".into(), ..Configuration::default() };
        encode_configuration(&configuration, &mut out);
        section::encode_start(&SectionName { id: RAM, idstr: IDSTR, instance: 0, version: 4 }, &mut out);
        encode_block_list(&announced(guest), &mut out);
        self.send(&out)?;
        self.close(RoundKind::Setup)
    }

    fn round(&mut self, kind: RoundKind, batches: &[&[(PageRun, Verdict)]]) -> Result<(), MoveError> {
        let mut head = Vec::new();
        match kind {
            RoundKind::Final => section::encode_end(RAM, &mut head),
            _ => section::encode_part(RAM, &mut head),
        }
        self.send(&head)?;
        self.link.open_round(kind, &Stop::never())?;
        for pieces in batches {
            let mut batch = PageBatch::default();
            pieces.iter().for_each(|(run, verdict)| batch.push(*run, *verdict));
            self.link.offer(batch, &Stop::never())?;
        }
        self.close(kind)
    }

    fn close(&mut self, kind: RoundKind) -> Result<(), MoveError> {
        self.link.close_round(kind, &Stop::never())?;
        let mut end = EOS_RECORD.to_vec();
        section::encode_footer(RAM, &mut end);
        self.send(&end)?;
        Ok(self.link.sink().flush(&Stop::never())?)
    }

    fn finish(&mut self) -> Result<(), MoveError> {
        let tail = without_devices(4096);
        self.send(&tail[..1])?;
        self.link.sink().flush(&Stop::never())?;
        self.send(&tail[1..])?;
        Ok(self.link.sink().finish(&Stop::never())?)
    }

    /// Sends all of memory; then, while the guest is stopped, a page becomes zero and another is written again.
    fn whole(&mut self, guest: &Guest) -> Result<(), MoveError> {
        self.set_up(guest)?;
        let half = run(0, PAGES / 2);
        let rest = run(PAGES / 2, PAGES - PAGES / 2);
        self.round(RoundKind::Live, &[&[(half, Verdict::Unknown)], &[(rest, Verdict::Unknown)]])?;
        guest.write(8, 0);
        guest.write(9, 77);
        guest.write(7, 78);
        self.round(RoundKind::Final, &[&[(run(7, 3), Verdict::Unknown)]])?;
        self.finish()
    }
}

fn announced(guest: &Guest) -> Vec<BlockAnnouncement> {
    let announce = |block: &RamBlock| BlockAnnouncement {
        name: block.name.clone(),
        used_length: block.used_length,
        host_page: None,
        guest_addr: None,
    };
    guest.memory.table().blocks().iter().map(announce).collect()
}

fn opened(path: &Path, starts_at: u64) -> Result<MappedDestination, OpenError> {
    open(path, starts_at, 3, &(Arc::new(spawn_thread) as _))
}

/// Reads the pages of `source` into `guest`.
fn load(mut source: MappedDestination, guest: &Guest) -> Result<Arc<Placer>, MoveError> {
    let blocks = guest.memory.table().blocks().to_vec();
    let memory: Arc<dyn GuestMemory> = guest.memory.clone();
    let mut placer = Placer::new(memory, &blocks, None)?;
    placer.find_used(|_| false);
    let placer = Arc::new(placer);
    let list = AnnouncedBlocks::new(announced(guest)).unwrap();
    source.announce(&placer, &list)?;
    source.barrier(&Stop::never())?;
    source.barrier(&Stop::never())?;
    source.revoke();
    Ok(placer)
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// On a file system in memory, if there is one: a sync costs nothing there.
fn scratch_in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| scratch())
}

#[test]
fn s69_s70_s72_a_guest_is_saved_in_rounds_and_loaded_over_old_memory() {
    for starts_at in [0, 5000] {
        let dir = scratch();
        let path = dir.path().join("guest");
        std::fs::write(&path, vec![9; 3 << 20]).unwrap();
        let guest = Guest::new();
        guest.fill();
        let mut save = Save::create(&path, starts_at, &guest);
        save.whole(&guest).unwrap();
        let counts = save.link.sent_pages();
        let busy = opened(&path, starts_at);
        assert!(crate::error::Chain(&busy.err().unwrap()).to_string().contains("another process"));
        drop(save);
        let file = std::fs::File::open(&path).unwrap();
        let meta = file.metadata().unwrap();
        assert!(meta.blocks() * 512 < (PAGES + 3) * 4096, "zero pages are holes");
        let mut front = vec![0; starts_at as usize];
        file.read_exact_at(&mut front, 0).unwrap();
        assert!(front.iter().all(|byte| *byte == 9), "what is in front stays");

        let source = opened(&path, starts_at).unwrap();
        let present = source.present()[0].count();
        assert_eq!(present, PAGES - PAGES / 7, "page 8 is zero now, page 7 no more");
        assert_eq!(source.present()[1].count(), 0);
        assert_eq!(counts[0].normal, PAGES - PAGES / 7 + 2);
        let there = Guest::new();
        let mapped = source.map(0).unwrap().unwrap();
        let mut bytes = vec![0; (PAGES * 4096) as usize];
        mapped.region().span(0, PAGES * 4096).unwrap().copy_to(&mut bytes);
        assert!(bytes == guest.bytes(), "mapped where it lies");
        mapped.region().span(0, 4096).unwrap().copy_from(&[5; 4096]);
        assert!(source.map(2).unwrap().is_none());
        // Memory of an earlier guest.
        (0..PAGES).for_each(|page| there.write(page, 0xee));
        let placer = load(source, &there).unwrap();
        assert!(there.bytes() == guest.bytes(), "from {starts_at}");
        assert_eq!((placer.counts().normal, placer.counts().zero), (present, PAGES + 3 - present));
        assert_eq!(placer.missing_pages(), 0);
    }
}

/// By direct I/O if the file system supports it; the content of the file is the same.
#[test]
fn pages_go_past_the_page_cache_where_that_can_be() {
    let dir = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/target")).unwrap();
    let path = dir.path().join("guest");
    let guest = Guest::new();
    guest.fill();
    let mut save = Save::create(&path, 100, &guest);
    save.whole(&guest).unwrap();
    if save.link.is_direct().is_none() {
        eprintln!(
            "nothing is shown: the file system of target/ has no direct I/O, or an older kernel does not tell"
        );
    }
    assert_ne!(save.link.is_direct(), Some(false), "it was refused");
    drop(save);
    let there = Guest::new();
    load(opened(&path, 100).unwrap(), &there).unwrap();
    assert!(there.bytes() == guest.bytes());
}

/// A long run that is not in the page cache is not there afterwards either; one that is there is read from it. What comes
/// is the same.
#[test]
fn pages_that_no_cache_holds_are_read_past_it() {
    let dir = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/target")).unwrap();
    let path = dir.path().join("guest");
    let guest = Guest::new();
    (0..PAGES).filter(|page| *page != 300).for_each(|page| guest.write(page, (page % 250) as u8 + 1));
    Save::create(&path, 0, &guest).whole(&guest).unwrap();
    let source = opened(&path, 0).unwrap();
    let (at, len) = (source.stream().places[0].header.pages_offset, PAGES * 4096);
    let file = std::fs::File::open(&path).unwrap();
    let cached = || cached_bytes(file.as_fd(), at, len);
    match (source.is_direct(), cached()) {
        (Some(true), Ok(cached)) if cached < len / 2 => {}
        unknown => {
            eprintln!("SKIPPED: no direct I/O in target/, or cachestat(2) does not answer: {unknown:?}");
            return;
        }
    }
    let there = Guest::new();
    load(source, &there).unwrap();
    assert!(there.bytes() == guest.bytes());
    assert!(cached().unwrap() < len / 2, "{:?} of {len} bytes are cached", cached());

    std::fs::read(&path).unwrap();
    let there = Guest::new();
    load(opened(&path, 0).unwrap(), &there).unwrap();
    assert!(there.bytes() == guest.bytes());
}

/// The process is killed, the disk is full or gone: at every step the file is complete or recognizably incomplete, and
/// it is complete only if all of it was written.
#[test]
fn a_save_that_breaks_off_at_any_step_leaves_no_file_that_claims_to_be_whole() {
    let dir = scratch_in_memory();
    let path = dir.path().join("guest");
    let mut broken = 0;
    for step in 0.. {
        let guest = Guest::new();
        guest.fill();
        let mut save = Save::create(&path, 0, &guest);
        save.link.break_at(step);
        let saved = save.whole(&guest);
        let unsent = save.link.reclaim();
        drop(save);
        let claims = match opened(&path, 0) {
            Ok(source) => Some(source),
            Err(OpenError::Unreadable { source, .. }) => {
                let torn = matches!(source, MappedReadError::NotEnded | MappedReadError::Truncated { .. });
                assert!(torn, "step {step}: {source}");
                None
            }
            Err(error) => panic!("step {step}: {error}"),
        };
        match (saved, claims) {
            (Ok(()), Some(source)) => {
                let there = Guest::new();
                load(source, &there).unwrap();
                assert!(there.bytes() == guest.bytes());
                assert!(unsent.is_empty());
                break;
            }
            (Ok(()), None) => panic!("step {step}: success was told, and nothing is there"),
            // Only after the first word: all of it was on the disk before.
            (Err(_), Some(source)) => {
                let there = Guest::new();
                load(source, &there).unwrap();
                assert!(there.bytes() == guest.bytes(), "step {step}");
            }
            (Err(error), None) => {
                let text = crate::error::Chain(&error).to_string();
                assert!(text.contains("mapped:") && text.contains("os error 5"), "{text}");
                broken += 1;
            }
        }
    }
    assert!(broken > 10, "{broken} steps");
}

/// The machine crashes at every operation: what was not synced yet may be on the disk or not, in any order, also in parts. A
/// file that is read is the whole guest all the same, over a new file and over that of an earlier guest.
#[test]
fn a_machine_that_crashes_at_any_write_leaves_no_file_that_claims_to_be_whole_and_is_not() {
    let dir = scratch_in_memory();
    let old = {
        let (path, guest) = (dir.path().join("old"), Guest::new());
        guest.write(3, 5);
        Save::create(&path, 0, &guest).whole(&guest).unwrap();
        std::fs::read(&path).unwrap()
    };
    let guest = Guest::new();
    guest.fill();
    let path = dir.path().join("guest");
    std::fs::write(&path, &old).unwrap();
    journal::want(true);
    let mut save = Save::create(&path, 0, &guest);
    journal::want(false);
    save.whole(&guest).unwrap();
    let ops = save.link.journal();
    drop(save);
    let syncs = ops.iter().filter(|op| matches!(op, journal::Op::Synced)).count();
    assert!(ops.len() > 10 && syncs >= 4, "{} operations, {syncs} syncs", ops.len());
    let (mut whole, mut refused) = (0, 0);
    for (seed, at) in (0..8).flat_map(|seed| (0..=ops.len()).map(move |at| (seed, at))) {
        let left = dir.path().join("left");
        std::fs::write(&left, &old).unwrap();
        let file = std::fs::File::options().write(true).open(&left).unwrap();
        journal::crash(&file, &ops, at, &mut Random(seed * 1000 + at as u64 + 1));
        match opened(&left, 0) {
            Ok(source) => {
                let there = Guest::new();
                load(source, &there).unwrap();
                // Nothing was done yet, or all.
                let (is_old, is_new) = (there.bytes()[3 * 4096] == 5, there.bytes() == guest.bytes());
                assert!(is_new || is_old && at < 2, "crash at {at} of {}, seed {seed}", ops.len());
                whole += usize::from(is_new);
            }
            Err(OpenError::Unreadable { .. }) => refused += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(whole >= 8 && refused > whole, "{whole} whole, {refused} refused");
}

#[test]
fn what_is_no_whole_mapped_file_is_refused_by_name() {
    let dir = scratch();
    let path = dir.path().join("guest");
    let said = |starts_at| {
        let error = opened(&path, starts_at).err().unwrap();
        crate::error::Chain(&error).to_string()
    };
    assert!(said(0).contains("os error 2"));
    std::fs::write(&path, b"hello, world").unwrap();
    assert!(said(0).contains("magic"), "{}", said(0));
    assert!(said(1000).contains("ends inside"), "{}", said(1000));
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    let folder = opened(&dir.path().join("folder"), 0).err().unwrap();
    assert!(crate::error::Chain(&folder).to_string().contains("plain file"));
}

/// The disk or another process truncates the file while pages are read.
#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error_with_its_place() {
    let dir = scratch();
    let path = dir.path().join("guest");
    let guest = Guest::new();
    guest.fill();
    Save::create(&path, 0, &guest).whole(&guest).unwrap();
    let source = opened(&path, 0).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len((1 << 20) + 8192).unwrap();
    let error = load(source, &Guest::new()).err().unwrap();
    let MoveError::Channel(error @ ChannelError::Io { .. }) = error else { panic!("{error}") };
    let text = crate::error::Chain(&error).to_string();
    assert!(text.contains("offset 0x") && text.contains("shorter"), "{text}");
}

/// As QEMU leaves such pages: a page that became zero is cleared in the bitmap, and its bytes stay.
#[test]
fn s70_old_bytes_of_pages_that_are_not_in_the_file_are_not_seen() {
    let dir = scratch();
    let path = dir.path().join("guest");
    let guest = Guest::new();
    guest.fill();
    Save::create(&path, 0, &guest).whole(&guest).unwrap();
    let places = opened(&path, 0).unwrap().stream().places[0].header;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, places.bitmap_offset + 2).unwrap();
    file.write_all_at(&[byte[0] & !4], places.bitmap_offset + 2).unwrap();
    guest.write(18, 0);
    let source = opened(&path, 0).unwrap();
    let mapped = source.map(0).unwrap().unwrap();
    let mut bytes = vec![0; (PAGES * 4096) as usize];
    mapped.region().span(0, PAGES * 4096).unwrap().copy_to(&mut bytes);
    assert!(byte[0] & 4 != 0 && bytes == guest.bytes(), "mapped");
    let there = Guest::new();
    load(source, &there).unwrap();
    assert!(there.bytes() == guest.bytes(), "read");
}

#[test]
fn the_stream_is_given_out_in_whatever_pieces_there_is_room_for() {
    let dir = scratch();
    let path = dir.path().join("guest");
    let guest = Guest::new();
    Save::create(&path, 0, &guest).whole(&guest).unwrap();
    let mut source = opened(&path, 0).unwrap();
    let mut bytes = Vec::new();
    loop {
        let mut room = [0; 7];
        let got = source.recv(&mut [crate::sys::RecvPart::Own(&mut room)], &Stop::never()).unwrap();
        bytes.extend_from_slice(&room[..got]);
        if got == 0 {
            break;
        }
    }
    assert!(bytes == source.stream().bytes);
}
