//! What does a sync of 1 GiB with 1000 dirty pages cost over the bare kernel call?
//!
//! `source` is `WrittenPages::sync_into`, which also sets the bits of a map (and here clears them); `bare` is
//! PAGEMAP_SCAN with a buffer for all regions, whose result is not used. Each iteration writes the pages first,
//! untimed. Then both run alternately, each first every other time. It prints the ratio's median and its 95 % interval.
#![allow(unsafe_code, missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use ramwire::guest::{DirtySource, MappedGuest, WrittenPages};
use ramwire::ram::{BlockName, PageBitmap, RamBlock};
use ramwire::sys::{HostRegion, Mapping, populate};
use ramwire::units::{BlockIndex, PageSize};

const GIB: u64 = 1 << 30;
const PAGES: u64 = GIB / 4096;
const DIRTY: u64 = 1000;

fn write_pages(region: &HostRegion) {
    for page in (0..PAGES).step_by((PAGES / DIRTY) as usize).take(DIRTY as usize) {
        region.span(page * 4096, 1).unwrap().copy_from(&[1]);
    }
}

fn bare_scan(pagemap: &File, region: &HostRegion, regions: &mut [[u64; 3]]) -> u64 {
    let (start, end) = (region.address() as u64, region.address() as u64 + GIB);
    // struct pm_scan_arg: size, flags (protect and check), start, end, walk_end, vec, vec_len, max_pages,
    // category_inverted, category_mask (written), category_anyof_mask, return_mask.
    let mut arg: [u64; 12] =
        [96, 3, start, end, 0, regions.as_mut_ptr() as u64, regions.len() as u64, 0, 0, 2, 0, 2];
    // SAFETY: the kernel reads and writes the argument's 96 bytes and at most vec_len regions.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), 0xc060_6610, &mut arg) };
    u64::try_from(found).unwrap()
}

/// Writes the pages, untimed, and times the sync.
fn timed(iterations: u64, region: &HostRegion, mut sync: impl FnMut() -> u64) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..iterations {
        write_pages(region);
        let start = Instant::now();
        let found = sync();
        total += start.elapsed();
        assert_eq!(found, DIRTY, "wrong answers are not worth timing");
    }
    total
}

/// The source's time divided by the bare call's, one of each alternately; prints the median and the order statistics
/// around it.
fn ratio(backing: &str, mut source: impl FnMut() -> Duration, mut bare: impl FnMut() -> Duration) {
    const PAIRS: usize = 1000;
    let one_pair = |pair: usize| {
        let (source, bare) = if pair.is_multiple_of(2) {
            let source = source();
            (source, bare())
        } else {
            let bare = bare();
            (source(), bare)
        };
        source.as_secs_f64() / bare.as_secs_f64()
    };
    let mut ratios: Vec<f64> = (0..PAIRS).map(one_pair).collect();
    ratios.sort_by(f64::total_cmp);
    // 1.96 standard deviations of the number of heads in PAIRS throws, to either side.
    let aside = (0.98 * (PAIRS as f64).sqrt()) as usize;
    let [low, median, high] = [PAIRS / 2 - aside, PAIRS / 2, PAIRS / 2 + aside].map(|at| ratios[at]);
    println!("{backing}: source / bare {median:.3} [{low:.3}, {high:.3}], {PAIRS} pairs");
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("sync_1_gib_1000_dirty");
    group.throughput(Throughput::Elements(PAGES)).sample_size(30);
    for (backing, memory) in [("anonymous", Mapping::anonymous(GIB)), ("memfd", Mapping::memfd("ram", GIB))] {
        let memory = memory.unwrap();
        let region = memory.region();
        populate(region.span(0, GIB).unwrap()).unwrap();
        let block = RamBlock::new(BlockName::new("ram").unwrap(), GIB);
        let guest = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &memory).build().unwrap();
        let source = WrittenPages::new(&guest);
        source.start().unwrap();
        let mut map = PageBitmap::new(PAGES);
        let mut source_arm = |iterations| {
            timed(iterations, region, || {
                source.sync_into(BlockIndex(0), &mut map).unwrap();
                map.clear_range(0..PAGES)
            })
        };
        group.bench_function(format!("{backing}/source"), |b| b.iter_custom(&mut source_arm));
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let mut regions = vec![[0; 3]; 2 * DIRTY as usize];
        let mut bare_arm =
            |iterations| timed(iterations, region, || bare_scan(&pagemap, region, &mut regions));
        group.bench_function(format!("{backing}/bare"), |b| b.iter_custom(&mut bare_arm));
        ratio(backing, || source_arm(1), || bare_arm(1));
        source.stop().unwrap();
    }
    group.finish();
    criterion.final_summary();
}
