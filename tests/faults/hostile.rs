//! Hostile peers: bytes made by hand, in both directions. Each is refused with place and reason, soon, and without
//! taking more memory than the limits allow.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ramwire::engine::{Ending, Outcome};
use ramwire::session::{DestinationReport, Error, SourceReport};
use ramwire::stream::native::{Answer, GREETING, Hello, MAX_VERSION, Order, Range, Unsent, hello_pong};
use ramwire::stream::qemu::command::Command;
use ramwire::stream::qemu::file::{Configuration, encode_configuration, encode_header};
use ramwire::stream::qemu::return_path::Message;
use ramwire::stream::qemu::section::{
    SectionName, encode_end, encode_footer, encode_full, encode_part, encode_start,
};
use ramwire::sys::{CancelToken, RecvPart, Stop};
use ramwire::transport::{ByteSource, ChannelError};

use crate::live::{
    BLOCKS, Live, PAGE, assert_stayed, channel, destination, migrate_cleanly, settings, source,
};

mod destination;

/// Stall and finish timeouts.
const IMPATIENT: Duration = Duration::from_secs(2);
/// No refusal may take longer, on however busy a machine.
const SOON: Duration = Duration::from_secs(20);
/// What all cases of one test together may add to this process's memory at its peak.
const MEMORY_KIB: u64 = 48 << 10;
const ID: [u8; 16] = *b"the one and only";
const RAM_ID: u32 = 2;

fn words(name: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Resets the peak; returns the resident memory now, in KiB.
fn reset_peak() -> u64 {
    let _ = fs::write("/proc/self/clear_refs", "5");
    words("VmRSS:")
}

fn assert_bounded(what: &str, before: u64) {
    let peak = words("VmHWM:");
    assert!(peak < before + MEMORY_KIB, "{what}: {before} KiB before, {peak} KiB at the peak");
    println!("{what}: {before} KiB before, {peak} KiB at the peak");
}

fn stream(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn made(make: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    make(&mut out);
    out
}

fn head() -> Vec<u8> {
    made(|out| {
        encode_header(out);
        let machine = "ramwire-test".into();
        encode_configuration(&Configuration { machine, ..Configuration::default() }, out);
        Command::OpenReturnPath.encode(out);
    })
}

fn command(command: &Command<'_>) -> Vec<u8> {
    made(|out| command.encode(out))
}

fn order(order: Order<'_>) -> Vec<u8> {
    command(&Command::Native(order))
}

fn hello() -> Vec<u8> {
    order(Order::Hello(Hello::ours(ID, true)))
}

fn be64(value: u64) -> [u8; 8] {
    value.to_be_bytes()
}

/// The list of blocks, true or not.
fn list<'a>(total: u64, blocks: impl IntoIterator<Item = (&'a str, u64)>) -> Vec<u8> {
    made(|out| {
        encode_start(&SectionName { id: RAM_ID, idstr: "ram", instance: 0, version: 4 }, out);
        out.extend(be64(total | 4));
        for (name, length) in blocks {
            out.push(name.len() as u8);
            out.extend(name.as_bytes());
            out.extend(be64(length));
        }
        out.extend(be64(0x10));
        encode_footer(RAM_ID, out);
    })
}

fn our_blocks() -> Vec<u8> {
    let lengths = BLOCKS.map(|pages| pages * PAGE);
    list(lengths.iter().sum(), ["block0", "block1", "block2"].into_iter().zip(lengths))
}

/// A section of pages with these records.
fn part(records: &[u8]) -> Vec<u8> {
    made(|out| {
        encode_part(RAM_ID, out);
        out.extend(records);
        out.extend(be64(0x10));
        encode_footer(RAM_ID, out);
    })
}

/// A zero page of `block`; `word` is offset and flags.
fn zero_of(block: &str, word: u64) -> Vec<u8> {
    made(|out| {
        out.extend(be64(word | 2));
        out.push(block.len() as u8);
        out.extend(block.as_bytes());
        out.push(0);
    })
}

fn last_part() -> Vec<u8> {
    made(|out| {
        encode_end(RAM_ID, out);
        out.extend(be64(0x10));
        encode_footer(RAM_ID, out);
    })
}

fn state(announced: u64, bytes: &[u8]) -> Vec<u8> {
    made(|out| {
        let idstr = ramwire::stream::native::STATE_SECTION;
        encode_full(&SectionName { id: 9, idstr, instance: 0, version: 1 }, out);
        out.extend(be64(announced));
        out.extend(bytes);
        encode_footer(9, out);
    })
}

/// A destination that receives `head`, then `again` until it refuses more; its answers are read unless `deaf`.
fn hear(head: Vec<u8>, again: Vec<u8>, deaf: bool, cancel: Option<&CancelToken>) -> DestinationReport {
    let (near, far) = UnixStream::pair().unwrap();
    let (mut reader, mut writer) = (near.try_clone().unwrap(), near);
    let reading =
        (!deaf).then(|| std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink())));
    let writing = std::thread::spawn(move || {
        let mut went = writer.write_all(&head);
        while went.is_ok() && !again.is_empty() {
            went = writer.write_all(&again);
        }
        writer
    });
    let there = Live::empty();
    let (from, back) = channel(far, IMPATIENT).split();
    let session = destination(&there, Box::new(from), Box::new(back), IMPATIENT);
    let session = match cancel {
        Some(cancel) => session.with_cancel(cancel.clone()),
        None => session,
    };
    let begun = Instant::now();
    let report = session.run();
    assert!(begun.elapsed() < SOON, "{:?} after {:?}", report.error, begun.elapsed());
    drop(writing.join().unwrap().shutdown(Shutdown::Both));
    reading.map(std::thread::JoinHandle::join);
    assert_eq!(report.ending, Ending::Discarded, "{:?}", report.error);
    assert!(!there.runs(), "{:?}", report.error);
    report
}

/// A name, the bytes sent, and the texts in the refusal.
type Case<'a> = (&'a str, Vec<u8>, &'a [&'a str]);

fn refused(cases: &[Case<'_>]) {
    for (what, bytes, says) in cases {
        let begun = Instant::now();
        let report = hear(bytes.clone(), Vec::new(), false, None);
        let text =
            report.error.as_ref().map(|error| ramwire::error::Chain(error).to_string()).unwrap_or_default();
        println!("{what}: {text} ({:?})", begun.elapsed());
        assert!(!matches!(report.error, Some(Error::Channel(_))), "{what}: was waited for: {text}");
        for word in *says {
            assert!(text.contains(word), "{what}: {text:?} does not say {word:?}");
        }
    }
}

#[test]
fn a_source_that_lies_about_the_stream_is_refused_with_place_and_reason() {
    let h = head();
    let many: Vec<String> = (0..5000).map(|at| format!("b{at}")).collect();
    let many = list(5000 * PAGE, many.iter().map(|name| (name.as_str(), PAGE)));
    let magic = stream(&[b"QEVX", &h[4..]]);
    let version = stream(&[&h[..4], &2u32.to_be_bytes(), &h[8..]]);
    let page = |block: &str, word| stream(&[&h, &our_blocks(), &part(&zero_of(block, word))]);
    let total = BLOCKS.iter().sum::<u64>() * PAGE;
    let delta_of = |len: u16, encoding: u8, bytes: &[u8]| {
        let record = made(|out| {
            out.extend(be64(0x40));
            out.extend(b"\x06block0");
            out.push(encoding);
            out.extend(len.to_be_bytes());
            out.extend(bytes);
        });
        stream(&[&h, &our_blocks(), &part(&record)])
    };
    let delta = |encoding, bytes: &[u8]| delta_of(bytes.len() as u16, encoding, bytes);
    refused(&[
        ("magic", magic, &["at byte 0", "QEVM"]),
        ("version", version, &["at byte 4", "version 2"]),
        ("no header at all", vec![0; 4096], &["at byte 0"]),
        ("command of no meaning", stream(&[&h, &[8, 0, 99, 0, 0]]), &["at byte", "command 99"]),
        (
            "command with a wrong length",
            stream(&[&h, &[8, 0, 2, 0xff, 0xff], &[0; 70_000]]),
            &["at byte", "65535"],
        ),
        ("block of another guest", stream(&[&h, &list(PAGE, [("pc.ram", PAGE)])]), &["pc.ram"]),
        (
            "block longer than ours",
            stream(&[&h, &list(25 * PAGE, [("block0", 25 * PAGE)])]),
            &["block0", "102400", "98304", "same memory"],
        ),
        ("list longer than its total", stream(&[&h, &list(PAGE, [("block0", 24 * PAGE)])]), &["at byte"]),
        ("list of 2^63 bytes", stream(&[&h, &list(1 << 63, [("block0", 1 << 63)])]), &["at byte", "limit"]),
        ("list over --max-ram", stream(&[&h, &list(2 << 30, [("block0", 2 << 30)])]), &["at byte", "limit"]),
        ("list of 5000 blocks", stream(&[&h, &many]), &["at byte", "RAM blocks"]),
        ("block twice", stream(&[&h, &list(2 * PAGE, [("b", PAGE), ("b", PAGE)])]), &["at byte", "\"b\""]),
        ("page before the list", stream(&[&h, &part(&zero_of("block0", 0))]), &["at byte", "never started"]),
        ("page of an unknown block", page("blockX", 0), &["at byte", "blockX"]),
        ("page behind its block", page("block1", 5 * PAGE), &["at byte", "block1"]),
        ("page at 2^63", page("block1", 1 << 63), &["at byte", "block1"]),
        (
            "page without a block",
            stream(&[&h, &our_blocks(), &part(&[&be64(0x22)[..], &[0]].concat())]),
            &["at byte"],
        ),
        ("record of no kind", stream(&[&h, &our_blocks(), &part(&be64(0))]), &["at byte"]),
        ("delta of another encoding", delta(2, &[0, 1, 0x41]), &["at byte", "encoding 2"]),
        ("delta longer than a page", delta_of(4097, 1, &[0; 4097]), &["at byte", "4097"]),
        ("delta of half a length", delta(1, &[0]), &["at byte", "inside a run"]),
        ("delta that skips nothing twice", delta(1, &[0, 1, 0x41, 0, 1, 0x42]), &["at byte", "empty"]),
        ("delta behind the page", delta(1, &[0xff, 0x1f, 2, 0x41, 0x42]), &["at byte", "leaves the page"]),
        ("delta with a length of three bytes", delta(1, &[0x80, 0x80, 1]), &["at byte", "two bytes"]),
        ("section that never started", stream(&[&h, &our_blocks(), &[2, 0, 0, 0, 77]]), &["at byte", "77"]),
        (
            "footer of another section",
            stream(&[&h, &our_blocks()[..our_blocks().len() - 1], &[9]]),
            &["at byte", "9"],
        ),
        ("total that nobody keeps", stream(&[&h, &list(total + PAGE, [("block0", total)])]), &[]),
    ]);
}

#[test]
fn a_source_that_speaks_out_of_turn_is_refused_with_place_and_reason() {
    let (h, hello, blocks, end) = (head(), hello(), our_blocks(), last_part());
    let odd = |min_version, max_version| {
        stream(&[&h, &order(Order::Hello(Hello { min_version, max_version, ..Hello::ours(ID, true) }))])
    };
    let commit = |migration_id| order(Order::Commit { migration_id });
    let sent = order(Order::StateSent);
    let digests = |first, count: usize| order(Order::Digest { first, values: &vec![7; count * 8] });
    let unsent = |block, first, pages| {
        let range = Range { first, pages }.encode();
        order(Order::Unsent { block, why: Unsent::Unplugged, ranges: &range })
    };
    let left_out = |unsent: &[u8]| stream(&[&h, &hello, &blocks, &end, unsent]);
    let counted = |normal: u64| {
        let counts = [be64(normal), be64(0), be64(0)].concat();
        order(Order::Sent { counts: &counts })
    };
    let loaded =
        |orders: &[&[u8]]| stream(&[&h, &hello, &blocks, &end, &state(4, b"abcd"), &orders.concat()]);
    let full = |digests: &[u8]| loaded(&[&counted(0), &sent, digests]);
    refused(&[
        ("HELLO for no version", odd(0, 0), &["at byte", "HELLO", "0 to 0"]),
        ("HELLO upside down", odd(9, 3), &["at byte", "HELLO", "9 to 3"]),
        ("HELLO from the far future", odd(0xffff, 0xffff), &["at byte", "HELLO", "65535"]),
        (
            "PING before OPEN_RETURN_PATH",
            stream(&[&h[..h.len() - 5], &command(&Command::Ping(1))]),
            &["at byte", "PING"],
        ),
        ("COMMIT at once", stream(&[&h, &hello, &commit(ID)]), &["at byte", "Commit"]),
        ("COMMIT without HELLO", stream(&[&h, &commit(ID)]), &["at byte", "COMMIT of another"]),
        (
            "COMMIT of another migration",
            stream(&[&h, &hello, &commit([1; 16])]),
            &["at byte", "COMMIT of another"],
        ),
        ("COMMIT before READY", stream(&[&h, &hello, &blocks, &end, &commit(ID)]), &["at byte", "Commit"]),
        ("STATE_SENT before RAM", stream(&[&h, &hello, &sent]), &["at byte", "STATE_SENT"]),
        ("UNSENT before RAM", stream(&[&h, &hello, &blocks, &unsent(0, 0, 1)]), &["at byte", "UNSENT"]),
        ("UNSENT without HELLO", stream(&[&h, &blocks, &end, &unsent(0, 0, 1)]), &["at byte", "UNSENT"]),
        ("UNSENT of no block", left_out(&unsent(99, 0, 1)), &["at byte", "UNSENT", "RAM block number"]),
        ("UNSENT of no page", left_out(&unsent(0, 3, 0)), &["at byte", "UNSENT", "0 pages"]),
        ("UNSENT behind its block", left_out(&unsent(0, 23, 2)), &["at byte", "UNSENT", "block0", "beyond"]),
        ("UNSENT at 2^64", left_out(&unsent(0, u64::MAX, u64::MAX)), &["at byte", "UNSENT"]),
        ("UNSENT that goes around", left_out(&unsent(0, 1 << 51, 1 << 51)), &["at byte", "UNSENT"]),
        ("SENT without HELLO", stream(&[&h, &blocks, &end, &counted(0)]), &["at byte", "SENT"]),
        ("SENT before RAM", stream(&[&h, &hello, &blocks, &counted(0)]), &["at byte", "SENT"]),
        ("SENT of a page that never came", loaded(&[&counted(1), &sent]), &["lost pages", "sent 1 whole"]),
        ("STATE_SENT without SENT", loaded(&[&sent]), &["at byte", "STATE_SENT", "counts"]),
        ("digests before RAM", stream(&[&h, &hello, &digests(0, 4)]), &["RAM blocks"]),
        ("digests beyond the last", full(&digests(0, 4096)), &["at byte", "digests"]),
        ("digests from the middle", full(&digests(1, 1)), &["at byte", "digests"]),
        ("digests that differ", full(&digests(0, 4)), &["block0", "0x0", "differs"]),
        (
            "state of 2^64 bytes",
            stream(&[&h, &hello, &blocks, &end, &state(u64::MAX, &[])]),
            &["at byte", "limit"],
        ),
        (
            "state over its limit",
            stream(&[&h, &hello, &blocks, &end, &state(2 << 20, &[])]),
            &["at byte", "limit"],
        ),
        (
            "postcopy package",
            stream(&[&h, &blocks, &command(&Command::Packaged { size: u32::MAX })]),
            &["at byte"],
        ),
        ("checkpointing", stream(&[&h, &command(&Command::EnableColo)]), &["at byte", "EnableColo"]),
    ]);
}

#[test]
fn floods_end_and_take_no_memory() {
    let before = reset_peak();
    let (h, blocks) = (head(), our_blocks());
    let pings = command(&Command::Ping(7)).repeat(1000);
    let told = |report: DestinationReport| {
        report.error.map(|error| ramwire::error::Chain(&error).to_string()).unwrap_or_default()
    };

    let text = told(hear(h.clone(), pings.clone(), true, None));
    assert!(text.contains("no byte moved") || text.contains("stopped"), "deaf and asking: {text}");

    let mut tail = stream(&[&h, &blocks, &last_part()]);
    encode_full(&SectionName { id: 3, idstr: "timer", instance: 0, version: 2 }, &mut tail);
    let text = told(hear(tail, vec![0xa5; 1 << 16], false, None));
    assert!(text.contains("at byte") && text.contains("limit"), "device state without end: {text}");

    // Input that a guest that never rests or an idle source may also send ends only by a cancel.
    let endless = [
        ("PINGs", h.clone(), pings),
        ("rounds without a page", stream(&[&h, &blocks]), part(&[]).repeat(500)),
        ("the same page", stream(&[&h, &blocks]), part(&zero_of("block1", 0)).repeat(500)),
        ("block lists", h.clone(), blocks.repeat(100)),
    ];
    for (what, head, again) in endless {
        let cancel = CancelToken::default();
        let later = cancel.clone();
        let canceller = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(1500));
            later.cancel();
        });
        let begun = Instant::now();
        let report = hear(head, again, false, Some(&cancel));
        println!("endless {what}: {:?} after {:?}, {} bytes", report.error, begun.elapsed(), report.bytes);
        assert!(report.error.is_some(), "endless {what}");
        canceller.join().unwrap();
    }
    assert_bounded("floods from a source", before);
}
