//! What do the pieces between a dirty page and a posted WRITE cost without a device? Control messages to bytes and
//! back, pages merged within their chunks, and a page's whole way to address, key and length.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use rdma_hooks::chunk::{CHUNK_SHIFT, Content, Merger, Run, SpanTable};
use rdma_hooks::control::{Message, RegisterRecord, RegisterResult};

const PAGE: u64 = 4096;
/// Pages of the block: 256 MiB.
const PAGES: u64 = 1 << 16;

fn control(criterion: &mut Criterion) {
    let record = |chunk: u64| RegisterRecord { key: chunk << CHUNK_SHIFT, block: 1, extra_chunks: 0 };
    let result = |key: u64| RegisterResult { rkey: key as u32 + 1, block_base: 1 << 40 };
    let messages = [
        ("one_register_request", Message::RegisterRequest(vec![record(3)])),
        ("256_register_requests", Message::RegisterRequest((0..256).map(record).collect())),
        ("256_keys", Message::RegisterResult { results: (0..256).map(result).collect(), repeat: 256 }),
    ];
    let mut group = criterion.benchmark_group("control");
    let mut out = Vec::with_capacity(16 << 10);
    for (name, message) in &messages {
        out.clear();
        message.encode(&mut out);
        let bytes = out.clone();
        assert_eq!(Message::decode(&bytes).as_ref(), Ok(message), "wrong answers are not worth timing");
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(format!("encode/{name}"), |b| {
            b.iter(|| {
                out.clear();
                black_box(message).encode(&mut out);
                black_box(&out).len()
            })
        });
        group.bench_function(format!("decode/{name}"), |b| {
            b.iter(|| Message::decode(black_box(&bytes)).is_ok())
        });
    }
    group.finish();
}

fn page(index: u64, zero_every: u64) -> Run {
    let content = if index % zero_every == zero_every - 1 { Content::Zero } else { Content::Data };
    Run { block: 0, range: index * PAGE..(index + 1) * PAGE, content, ticket: index }
}

/// Every page of the block through the merger; each run that comes out goes to `each`. Their number.
fn merged(zero_every: u64, mut each: impl FnMut(Run)) -> u64 {
    let mut merger = Merger::default();
    let mut runs = 0;
    let mut hand_out = |run: Option<Run>| {
        if let Some(run) = run {
            runs += 1;
            each(run);
        }
    };
    for index in 0..PAGES {
        hand_out(merger.push(page(index, zero_every), PAGE));
    }
    hand_out(merger.take());
    runs
}

fn pages(criterion: &mut Criterion) {
    const CHUNKS: u64 = (PAGES * PAGE) >> CHUNK_SHIFT;
    let mut group = criterion.benchmark_group("pages");
    group.throughput(Throughput::Elements(PAGES));
    for (name, zero_every, runs) in [("all_data", u64::MAX, CHUNKS), ("every_16th_zero", 16, PAGES / 8)] {
        assert_eq!(merged(zero_every, |_| ()), runs, "wrong answers are not worth timing");
        group.bench_function(format!("merge/{name}"), |b| {
            b.iter(|| {
                merged(zero_every, |run| {
                    black_box(run);
                })
            })
        });
        let mut spans = SpanTable::new([PAGES * PAGE], 1, None);
        for chunk in 0..CHUNKS {
            spans.insert(0, chunk, 1, chunk as u32 + 1, 1 << 40, ());
        }
        // Remote address, key and length: what a work request says.
        let mut requests = || {
            let mut bytes = 0;
            merged(zero_every, |run| {
                let id = spans.find(0, run.range.start >> CHUNK_SHIFT).unwrap();
                spans.posted(id);
                let span = spans.get(id).unwrap();
                black_box((span.base + run.range.start, span.rkey, run.len()));
                spans.retired(id);
                bytes += run.len();
            });
            bytes
        };
        assert_eq!(requests(), PAGES * PAGE, "no page is left out");
        group.bench_function(format!("to_work_request/{name}"), |b| b.iter(&mut requests));
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    control(&mut criterion);
    pages(&mut criterion);
    criterion.final_summary();
}
