#![allow(clippy::unwrap_used)]
use std::sync::mpsc;

use super::*;
use crate::guest::MappedGuest;
use crate::ram::{ADMISSIONS, BlockName};
use crate::sys::testing::has_userfaultfd;
use crate::sys::{FaultAt, Mapping, MissingFaults};
use crate::units::PageSize;

const PAGES: u64 = 64;

fn placer(mapping: &Mapping) -> Placer {
    let block = RamBlock::new(BlockName::new("ram").unwrap(), PAGES * 4096);
    let guest = MappedGuest::builder(PageSize::SIZE_4K).mapping(block.clone(), mapping).build().unwrap();
    Placer::new(Arc::new(guest), &[block], None).unwrap()
}

fn bytes_of(placer: &Placer, landing: Landing) -> Vec<u8> {
    let mut bytes = vec![0; landing.len() as usize];
    placer.target(landing).unwrap().copy_to(&mut bytes);
    bytes
}

/// After one check of bounds a run passes through the choice of the method, the store, the mark and the counters.
#[test]
fn bounds_are_checked_once_a_run_on_every_way_into_memory() {
    for mapping in [Mapping::memfd("once", PAGES * 4096).unwrap(), Mapping::anonymous(PAGES * 4096).unwrap()]
    {
        let placer = placer(&mapping);
        for unmapped in [false, true] {
            let mut writer = PageWriter::default();
            writer.assume_unmapped(unmapped);
            let before = ADMISSIONS.get();
            let page = [7; 4096];
            let run = placer.admit(BlockIndex(0), BlockOffset(4096), 3 * 4096).unwrap();
            writer.write(&placer, run, 0, [&page[..]; 3].into_iter()).unwrap();
            placer.commit(run);
            let zero = placer.admit(BlockIndex(0), BlockOffset(9 * 4096), 4096).unwrap();
            placer.zero(zero).unwrap();
            assert_eq!(ADMISSIONS.get() - before, 2, "unmapped: {unmapped}");
            assert!(bytes_of(&placer, run).iter().all(|byte| *byte == 7));
        }
        assert_eq!(placer.counts(), PageCounts { normal: 6, zero: 2, delta: 0 });
    }
}

/// No page comes to it: its file is not written to, and nobody looks for pages of it that are to be mapped.
#[test]
fn an_ignored_block_has_no_file_and_no_map_of_pages() {
    let block = |name, ignored| {
        let mut block = RamBlock::new(BlockName::new(name).unwrap(), PAGES * 4096);
        block.flags.ignored = ignored;
        block
    };
    let blocks = [block("passed", true), block("ram", false)];
    let mapping = Mapping::memfd("passed", PAGES * 4096).unwrap();
    let builder = MappedGuest::builder(PageSize::SIZE_4K);
    let guest =
        builder.mapping(blocks[0].clone(), &mapping).mapping(blocks[1].clone(), &mapping).build().unwrap();
    let placer = Placer::new(Arc::new(guest), &blocks, None).unwrap();
    let lengths: Vec<u64> = placer.unmapped().iter().map(AtomicBitmap::len).collect();
    assert_eq!((lengths, placer.has_files()), (vec![0, PAGES], true));
}

#[test]
fn what_was_written_in_parts_lands_in_order_on_every_way() {
    for unmapped in [false, true] {
        let mapping = Mapping::memfd("parts", PAGES * 4096).unwrap();
        let placer = placer(&mapping);
        let mut writer = PageWriter::default();
        writer.assume_unmapped(unmapped);
        let run = placer.admit(BlockIndex(0), BlockOffset(0), PAGES * 4096).unwrap();
        for page in 0..PAGES {
            writer.write(&placer, run, page * 4096, std::iter::once(&[page as u8; 4096][..])).unwrap();
        }
        assert!(!placer.is_received(run), "written is not yet received");
        placer.commit(run);
        let bytes = bytes_of(&placer, run);
        assert!(bytes.chunks(4096).enumerate().all(|(page, bytes)| bytes.iter().all(|b| *b == page as u8)));
        assert_eq!(placer.by_file(), if unmapped { PAGES } else { 0 });
    }
}

#[test]
fn a_zero_page_clears_what_came_before_and_touches_nothing_else() {
    let mapping = Mapping::memfd("zero", PAGES * 4096).unwrap();
    let placer = placer(&mapping);
    let at = |page: u64| placer.admit(BlockIndex(0), BlockOffset(page * 4096), 4096).unwrap();
    PageWriter::default().write(&placer, at(1), 0, std::iter::once(&[7; 4096][..])).unwrap();
    placer.commit(at(1));
    (0..3).for_each(|page| placer.zero(at(page)).unwrap());
    assert!(bytes_of(&placer, at(1)).iter().all(|byte| *byte == 0));
    let blocks = rustix::fs::fstat(mapping.backing().unwrap().0).unwrap().st_blocks;
    assert_eq!(blocks, 8, "memory was taken for the one page that held something");
}

/// Memory that begins at a host page, as huge pages require. Its unaligned edges are zeroed by stores, and are present
/// afterwards.
fn aligned(host_page: usize) -> Mapping {
    let mut between = Vec::new();
    loop {
        let mapping = Mapping::anonymous(PAGES * 4096).unwrap();
        if mapping.region().address().is_multiple_of(host_page) {
            return mapping;
        }
        between.extend([mapping, Mapping::anonymous(4096).unwrap()]);
    }
}

/// Four target pages make a host page; faults of this process are served.
fn missing() -> (Arc<Placer>, Arc<MissingFaults>, mpsc::Receiver<Landing>) {
    missing_of(4)
}

/// The same with so many target pages in a host page.
fn missing_of(pages: u64) -> (Arc<Placer>, Arc<MissingFaults>, mpsc::Receiver<Landing>) {
    let mapping = aligned(pages as usize * 4096);
    let mut block = RamBlock::new(BlockName::new("ram").unwrap(), PAGES * 4096);
    block.host_page = PageSize::from_bytes(pages * 4096).unwrap();
    let region = mapping.region().clone().with_page(block.host_page);
    let guest = MappedGuest::builder(PageSize::SIZE_4K).region(block.clone(), region).build().unwrap();
    assert_eq!(guest.table().get(BlockIndex(0)).unwrap().host_page, block.host_page);
    let mut placer = Placer::new(Arc::new(guest), &[block], None).unwrap();
    placer.empty().unwrap();
    // In the first rounds: received as zero, and never touched.
    let zero = placer.admit(BlockIndex(0), BlockOffset(60 * 4096), 4 * 4096).unwrap();
    placer.zero(zero).unwrap();
    let (tell, placed) = mpsc::channel();
    let faults = Arc::new(MissingFaults::user_mode_only().unwrap());
    placer.serve_missing(Arc::clone(&faults), Box::new(move |landing| tell.send(landing).unwrap())).unwrap();
    (Arc::new(placer), faults, placed)
}

fn target_page(placer: &Placer, page: u64) -> Landing {
    placer.admit(BlockIndex(0), BlockOffset(page * 4096), 4096).unwrap()
}

/// Neighbours are placed by one call, and a page between them that the guest has already is left to it.
#[test]
fn neighbours_are_placed_together_but_for_pages_that_are_here() {
    if !has_userfaultfd() {
        return;
    }
    let (placer, _faults, placed) = missing_of(1);
    let mut writer = PageWriter::default();
    writer.place(&placer, target_page(&placer, 3), [&[3; 4096][..]].into_iter()).unwrap();
    placer.target(target_page(&placer, 3)).unwrap().copy_from(&[33; 4096]);
    let pages: Vec<_> = (0..40).map(|page| [100 + page; 4096]).collect();
    let run = placer.admit(BlockIndex(0), BlockOffset(0), 40 * 4096).unwrap();
    writer.place(&placer, run, pages.iter().map(|page| &page[..])).unwrap();
    let held = (0..40).map(|page| bytes_of(&placer, target_page(&placer, page)));
    assert!(held.zip(0..).all(|(bytes, page)| bytes == [if page == 3 { 33 } else { 100 + page }; 4096]));
    // First page and number of pages of each call.
    let calls: Vec<_> =
        placed.try_iter().map(|part| (placer.run(part).first.0, placer.run(part).pages)).collect();
    assert_eq!(calls, [(3, 1), (0, 3), (4, 16), (20, 16), (36, 4)]);
    assert_eq!(placer.counts().normal, 40);
}

/// A source that begins one host page after the other and completes none gets no memory for them.
#[test]
fn host_pages_that_are_begun_and_not_finished_are_limited() {
    if !has_userfaultfd() {
        return;
    }
    let (placer, _faults, _placed) = missing();
    let mut writer = PageWriter::default();
    let mut put = |page| writer.place_zero(&placer, target_page(&placer, page));
    (0..4).for_each(|host_page| put(4 * host_page).unwrap());
    let error = put(16).unwrap_err();
    assert!(matches!(error, GuestError::Unfinished { offset: 0x10000, .. }), "{error}");
    // One of them may be completed, and another begun.
    (1..4).for_each(|page| put(page).unwrap());
    put(16).unwrap();
    // A lost connection drops them all.
    writer.forget_parts();
    (0..4)
        .for_each(|host_page| writer.place_zero(&placer, target_page(&placer, 32 + 4 * host_page)).unwrap());
}

/// A thread touches a page that was received as zero before memory was served: only this end has the page.
#[test]
fn a_fault_on_a_page_that_came_as_zero_is_answered_here() {
    if !has_userfaultfd() {
        return;
    }
    let (placer, faults, _placed) = missing();
    let reader = Arc::clone(&placer);
    let reads = std::thread::spawn(move || bytes_of(&reader, target_page(&reader, 61)));
    let fault = loop {
        if let Some(fault) = faults.next().unwrap() {
            break fault;
        }
        std::thread::yield_now();
    };
    let landing = placer.host_page_at(fault.at).unwrap();
    assert_eq!(placer.run(landing).first, PageIndex(60), "the whole host page");
    assert!(placer.has_all(landing) && !placer.has_all(target_page(&placer, 0)));
    placer.answer_received(landing).unwrap();
    assert_eq!(reads.join().unwrap(), [0; 4096]);
    assert_eq!(placer.host_page_at(FaultAt(placer.target(landing).unwrap().address() + 4 * 4096)), None);
}
