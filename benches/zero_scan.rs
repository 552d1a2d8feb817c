//! Which zero test? The library's `is_zero` against loops of our own, on memory that comes from DRAM (the
//! case of a migration) and on one page that stays in the cache.
//!
//! Compare the cases of one run; absolute figures depend on the machine.
#![allow(unsafe_code, missing_docs, clippy::unwrap_used)]

mod reading;

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use ramwire::sys::{HostRegion, Mapping, is_zero, populate};

const PAGE: u64 = 4096;
const COLD: u64 = 256 << 20;

type Test = fn(&HostRegion, u64) -> bool;

fn by_is_zero(region: &HostRegion, page: u64) -> bool {
    is_zero(region.span(page * PAGE, PAGE).unwrap())
}

fn by_scalar(region: &HostRegion, page: u64) -> bool {
    let start = region.span(page * PAGE, PAGE).unwrap().address() as *const u64;
    // SAFETY: the page is mapped and no thread writes it during the bench.
    (0..64)
        .all(|line| (0..8).fold(0, |all, at| all | unsafe { start.add(line * 8 + at).read_volatile() }) == 0)
}

#[cfg(not(target_arch = "x86_64"))]
mod simd {
    pub(super) fn candidates() -> [(&'static str, super::Test); 0] {
        []
    }
}

#[cfg(target_arch = "x86_64")]
mod simd {
    use super::*;
    use std::arch::x86_64::*;

    pub(super) fn candidates() -> Vec<(&'static str, Test)> {
        let mut tests: Vec<(&'static str, Test)> = vec![("sse2", by_sse2)];
        if is_x86_feature_detected!("avx2") {
            tests.push(("avx2", by_avx2));
        }
        tests
    }

    fn by_sse2(region: &HostRegion, page: u64) -> bool {
        let start = region.span(page * PAGE, PAGE).unwrap().address() as *const __m128i;
        // SAFETY: SSE2 is part of x86-64; the page is mapped, aligned and unchanging.
        (0..64).all(|line| unsafe {
            let at = start.add(line * 4);
            let low = _mm_or_si128(_mm_load_si128(at), _mm_load_si128(at.add(1)));
            let high = _mm_or_si128(_mm_load_si128(at.add(2)), _mm_load_si128(at.add(3)));
            _mm_movemask_epi8(_mm_cmpeq_epi8(_mm_or_si128(low, high), _mm_setzero_si128())) == 0xffff
        })
    }

    fn by_avx2(region: &HostRegion, page: u64) -> bool {
        // SAFETY: only run where the CPU has AVX2.
        unsafe { avx2(region.span(page * PAGE, PAGE).unwrap().address() as *const __m256i) }
    }

    #[target_feature(enable = "avx2")]
    unsafe fn avx2(start: *const __m256i) -> bool {
        for step in 0..32 {
            // SAFETY: 32 steps of 128 bytes are the page, which is mapped, aligned and unchanging.
            let any = unsafe {
                let at = start.add(step * 4);
                let low = _mm256_or_si256(_mm256_load_si256(at), _mm256_load_si256(at.add(1)));
                let high = _mm256_or_si256(_mm256_load_si256(at.add(2)), _mm256_load_si256(at.add(3)));
                _mm256_or_si256(low, high)
            };
            if _mm256_testz_si256(any, any) == 0 {
                return false;
            }
        }
        true
    }
}

fn candidates() -> Vec<(&'static str, Test)> {
    let plain: [(&'static str, Test); 2] = [("is_zero", by_is_zero), ("scalar", by_scalar)];
    plain.into_iter().chain(simd::candidates()).collect()
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let memory = Mapping::anonymous(COLD).unwrap();
    populate(memory.region().span(0, COLD).unwrap()).unwrap();

    let mut group = criterion.benchmark_group("zero_scan_dram");
    group.throughput(Throughput::Bytes(COLD)).sample_size(10);
    for (name, test) in candidates() {
        assert!(test(memory.region(), 0), "wrong answers are not worth timing");
        group.bench_function(name, |b| {
            b.iter(|| (0..COLD / PAGE).filter(|p| test(memory.region(), *p)).count())
        });
    }
    // The minimum cost of reading the memory: a word of every line.
    let all = memory.region().span(0, COLD).unwrap();
    group.bench_function("sweep", |b| b.iter(|| reading::a_word_a_line(black_box(all))));
    group.finish();

    let mut group = criterion.benchmark_group("zero_scan_cached_page");
    group.throughput(Throughput::Bytes(PAGE)).sample_size(20);
    let random: Vec<u8> = (0..PAGE).map(|at| (at * 193 + 7) as u8 | 1).collect();
    let mut last = vec![0; PAGE as usize];
    last[PAGE as usize - 1] = 1;
    let mut first = vec![0; PAGE as usize];
    first[0] = 1;
    let cases = [("all_zero", vec![0; 4096]), ("first_byte", first), ("last_byte", last), ("random", random)];
    for (case, bytes) in cases {
        memory.region().span(0, PAGE).unwrap().copy_from(&bytes);
        for (name, test) in candidates() {
            assert_eq!(test(memory.region(), 0), case == "all_zero", "{name} on {case}");
            group
                .bench_function(format!("{case}/{name}"), |b| b.iter(|| test(black_box(memory.region()), 0)));
        }
    }
    group.finish();
    criterion.final_summary();
}
