//! Is a bitmap walked at memory speed? 1 TiB of 4 KiB pages (32 MiB of bits) with few pages set, a map with
//! every second page set, and the OR of two maps.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput};
use ramwire::ram::PageBitmap;
use ramwire::units::PageIndex;

/// 1 TiB of 4 KiB pages.
const TIB: u64 = 1 << 28;
/// 1 GiB of 4 KiB pages.
const GIB: u64 = 1 << 18;

fn every(step: u64, pages: u64) -> PageBitmap {
    let mut map = PageBitmap::new(pages);
    for page in (0..pages).step_by(step as usize) {
        map.set_range(page..page + 1);
    }
    map
}

/// Number of runs and pages of a whole walk.
fn walk(map: &PageBitmap) -> (u64, u64) {
    let (mut runs, mut pages, mut from) = (0, 0, PageIndex(0));
    while let Some(run) = map.next_run(from, u64::MAX) {
        runs += 1;
        pages += run.end - run.start;
        from = PageIndex(run.end);
    }
    (runs, pages)
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();

    let mut group = criterion.benchmark_group("walk_1_tib");
    group.throughput(Throughput::Bytes(TIB / 8)).sample_size(10);
    for (name, step) in [("one_page", TIB), ("page_a_gib", GIB), ("1000_pages_a_gib", GIB / 1000)] {
        let map = every(step, TIB);
        assert_eq!(walk(&map).1, map.count(), "wrong answers are not worth timing");
        group.bench_function(name, |b| b.iter(|| walk(black_box(&map))));
    }
    // Memory speed, with the same bytes.
    let map = every(TIB, TIB);
    group.bench_function("sum_of_words", |b| {
        b.iter(|| black_box(&map).words().iter().fold(0u64, |sum, word| sum.wrapping_add(*word)))
    });
    group.finish();

    let mut group = criterion.benchmark_group("walk_1_gib");
    group.throughput(Throughput::Elements(GIB));
    for (name, step, runs) in [("every_second_page", 2, GIB / 2), ("every_page", 1, 1)] {
        let map = every(step, GIB);
        assert_eq!(walk(&map).0, runs);
        group.bench_function(name, |b| b.iter(|| walk(black_box(&map))));
    }
    group.finish();

    let mut group = criterion.benchmark_group("merge_1_tib");
    group.throughput(Throughput::Bytes(TIB / 8)).sample_size(10);
    for (name, step) in [("sparse", GIB), ("dense", 2)] {
        let from = every(step, TIB);
        let fresh = || PageBitmap::new(TIB);
        group.bench_function(name, |b| {
            b.iter_batched(
                fresh,
                |mut into| (into.merge_words(0, from.words()), into),
                BatchSize::PerIteration,
            )
        });
    }
    group.finish();
    criterion.final_summary();
}
