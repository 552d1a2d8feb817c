//! How fast pages are encoded as differences, and decoded: bytes of pages a second on one core.
//!
//! The pages are 16 MiB, old and new, more than the second-level cache holds.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use ramwire::stream::xbzrle::{Encoded, decode, encode};

const PAGE: usize = 4096;
const PAGES: usize = 4096;

/// Changes `changes` groups of eight bytes in every page, spread evenly.
fn changed(old: &[u8], changes: usize) -> Vec<u8> {
    let mut new = old.to_vec();
    for page in new.chunks_mut(PAGE) {
        for change in 0..changes {
            let at = change * PAGE / changes + 24;
            page[at..at + 8].iter_mut().for_each(|byte| *byte = !*byte);
        }
    }
    new
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("xbzrle");
    group.throughput(Throughput::Bytes((PAGES * PAGE) as u64));
    let old: Vec<u8> = (0..PAGES * PAGE).map(|at| ((at * 31) >> 3) as u8).collect();
    for changes in [0, 1, 4, 16, 64] {
        let new = changed(&old, changes);
        let mut out = [0; PAGE];
        group.bench_function(BenchmarkId::new("encode", changes), |b| {
            b.iter(|| {
                for (old, new) in old.chunks(PAGE).zip(new.chunks(PAGE)) {
                    black_box(encode(black_box(old), black_box(new), &mut out));
                }
            });
        });
        let Encoded::Delta(len) = encode(&old[..PAGE], &new[..PAGE], &mut out) else { continue };
        let mut pages = old.clone();
        group.bench_function(BenchmarkId::new("decode", changes), |b| {
            b.iter(|| {
                for page in pages.chunks_mut(PAGE) {
                    decode(black_box(&out[..len]), page).unwrap();
                }
            });
        });
    }
    group.finish();
    criterion.final_summary();
}
