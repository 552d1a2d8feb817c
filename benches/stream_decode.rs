//! What does parsing the stream cost a receiver, in addition to moving the bytes?

#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use ramwire::ram::BlockName;
use ramwire::stream::qemu::blocks::{BlockAnnouncement, encode_block_list};
use ramwire::stream::qemu::file::{Configuration, encode_configuration, encode_header};
use ramwire::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, Step};
use ramwire::stream::qemu::ram::{self, EOS_RECORD, PageAt, Record, continued_page, continued_zero};
use ramwire::stream::qemu::section::{SectionName, encode_footer, encode_part, encode_start};
use ramwire::units::BlockOffset;

const PAGE: usize = 4096;
const PAGES: u64 = 4096;

/// A stream up to its first page; the block is 16 MiB.
fn prefix() -> Vec<u8> {
    let mut out = Vec::new();
    encode_header(&mut out);
    encode_configuration(&Configuration { machine: "none".into(), ..Configuration::default() }, &mut out);
    encode_start(&SectionName { id: 2, idstr: ram::IDSTR, instance: 0, version: ram::VERSION }, &mut out);
    if let Ok(name) = BlockName::new("pc.ram") {
        let used_length = PAGES * PAGE as u64;
        encode_block_list(
            &[BlockAnnouncement { name, used_length, host_page: None, guest_addr: None }],
            &mut out,
        );
    }
    out.extend_from_slice(&EOS_RECORD);
    encode_footer(2, &mut out);
    encode_part(2, &mut out);
    Record::Zero { at: PageAt { block: Some("pc.ram"), offset: BlockOffset(0) }, fill: 0 }.encode(&mut out);
    out
}

/// Parses `stream` through a window of 256 KiB, like a receiver with such a buffer; counts pages.
fn follow(machine: &mut IncomingStream, stream: &[u8]) -> u64 {
    const WINDOW: usize = 256 << 10;
    let (mut at, mut pages) = (0, 0);
    let mut end = WINDOW.min(stream.len());
    loop {
        match machine.next(&stream[at..end]) {
            Ok(Step::Event { consumed, event }) => {
                at += consumed;
                match black_box(event) {
                    Event::Page { .. } | Event::Zero { .. } => pages += 1,
                    _ => {}
                }
            }
            Ok(Step::NeedMore { consumed, .. }) => {
                at += consumed;
                if end == stream.len() {
                    return pages;
                }
                end = (at + WINDOW).min(stream.len());
            }
            Err(error) => {
                eprintln!("{error}");
                return 0;
            }
        }
    }
}

fn main() {
    let mut machine = IncomingStream::new(IncomingConfig::default());
    assert_eq!(follow(&mut machine, &prefix()), 1, "the prefix holds one page");

    let (mut whole, mut zero) = (Vec::new(), Vec::new());
    for page in 0..PAGES {
        let offset = BlockOffset(page * PAGE as u64);
        whole.extend_from_slice(&continued_page(offset));
        whole.extend_from_slice(&[page as u8; PAGE]);
        zero.extend_from_slice(&continued_zero(offset));
    }
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("follow_stream");
    group.throughput(Throughput::Elements(PAGES));
    for (name, records) in [("whole_pages", &whole), ("zero_pages", &zero)] {
        assert_eq!(follow(&mut machine.clone(), records), PAGES, "wrong answers are not worth timing");
        group.bench_function(name, |b| b.iter(|| follow(&mut machine, black_box(records))));
    }
    group.finish();
    criterion.final_summary();
}
