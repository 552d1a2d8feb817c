//! What does the page loop cost in addition to the send? Heads of records, and batches made from a dirty map: the walk,
//! the zero test and the batch together, for memory that is all zero, random, or sparsely dirty.
#![allow(missing_docs, clippy::unwrap_used)]

mod reading;

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use ramwire::guest::{GuestMemory, MappedGuest};
use ramwire::page::{PageSearch, ZeroDetection, classify};
use ramwire::ram::{BlockName, ClearShift, DirtyMap, PageBatch, PageRun, RamBlock};
use ramwire::stream::qemu::ram::{PageAt, Record, continued_page};
use ramwire::sys::{Mapping, populate};
use ramwire::units::{BlockIndex, BlockOffset, PageIndex, PageSize};

const PAGE: u64 = 4096;
/// Larger than the caches.
const RAM: u64 = 256 << 20;
const PAGES: u64 = RAM / PAGE;
/// Pages of a batch, as on one channel.
const FULL: u64 = 512;

fn heads(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("heads");
    group.throughput(Throughput::Elements(FULL));
    let mut out = Vec::with_capacity(FULL as usize * 16);
    group.bench_function("continued", |b| {
        b.iter(|| {
            out.clear();
            (0..FULL).for_each(|page| out.extend_from_slice(&continued_page(BlockOffset(page * PAGE))));
            black_box(&out).len()
        })
    });
    group.bench_function("named", |b| {
        b.iter(|| {
            out.clear();
            for page in 0..FULL {
                let at = PageAt { block: Some("pc.ram"), offset: BlockOffset(page * PAGE) };
                Record::Page(at).encode(&mut out);
            }
            black_box(&out).len()
        })
    });
    group.finish();
}

/// Every batch of a round, as the source's session gathers them; returns the numbers of pages and zero pages.
fn gather(guest: &MappedGuest, dirty: &mut DirtyMap, detection: ZeroDetection) -> (u64, u64) {
    let (mut search, mut batch) = (PageSearch::default(), PageBatch::default());
    let (mut pages, mut zero) = (0, 0);
    loop {
        batch.clear();
        while batch.whole_pages() < FULL && batch.pages() < 8 * FULL {
            let Some(run) = search.next_run(dirty, FULL - batch.whole_pages()) else { break };
            classify(guest, run, detection, &mut batch).unwrap();
        }
        if batch.is_empty() {
            return (pages, zero);
        }
        pages += batch.pages();
        zero += batch.zero_pages();
        black_box(batch.pieces());
    }
}

fn batches(criterion: &mut Criterion) {
    let memory = Mapping::memfd("ram", RAM).unwrap();
    let span = memory.region().span(0, RAM).unwrap();
    populate(span).unwrap();
    let block = RamBlock::new(BlockName::new("ram").unwrap(), RAM);
    let guest = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &memory).build().unwrap();

    let mut group = criterion.benchmark_group("batches");
    group.throughput(Throughput::Bytes(RAM)).sample_size(10);
    for (fill, is_zero) in [("zero", true), ("random", false)] {
        if !is_zero {
            let page: Vec<u8> = (0..PAGE).map(|at| (at * 193 + 7) as u8 | 1).collect();
            (0..PAGES).for_each(|at| {
                memory.region().span(at * PAGE, PAGE).unwrap().copy_from(&page);
            });
        }
        for (what, step, detection) in [
            ("all_dirty", 1, ZeroDetection::Legacy),
            ("all_dirty_not_looked_at", 1, ZeroDetection::None),
            ("every_second_page", 2, ZeroDetection::Legacy),
        ] {
            let fresh = || {
                let mut dirty = DirtyMap::new(guest.table(), ClearShift::default());
                for first in (0..PAGES).step_by(step) {
                    dirty.set_run(PageRun { block: BlockIndex(0), first: PageIndex(first), pages: 1 });
                }
                dirty
            };
            let looked_at = is_zero && detection == ZeroDetection::Legacy;
            let expected = PAGES / step as u64;
            assert_eq!(
                gather(&guest, &mut fresh(), detection),
                (expected, if looked_at { expected } else { 0 }),
                "wrong answers are not worth timing"
            );
            group.bench_function(format!("{fill}/{what}"), |b| {
                b.iter_batched(
                    fresh,
                    |mut dirty| gather(&guest, &mut dirty, detection),
                    criterion::BatchSize::PerIteration,
                )
            });
        }
    }
    // The limit that memory sets, with the same bytes.
    group.bench_function("sweep", |b| b.iter(|| reading::a_word_a_line(black_box(span))));
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    heads(&mut criterion);
    batches(&mut criterion);
    criterion.final_summary();
}
