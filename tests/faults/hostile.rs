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

/// The first message of a hostile destination.
fn greeting() -> Vec<u8> {
    let hello = Hello::ours(ID, true);
    let answers = [
        Message::Pong(GREETING),
        Message::Pong(hello_pong(MAX_VERSION)),
        Message::Pong(1),
        Message::Native(Answer::Hello(hello)),
    ];
    made(|out| answers.iter().for_each(|answer| answer.encode(out)))
}

fn said(message: &Message<'_>) -> Vec<u8> {
    made(|out| message.encode(out))
}

/// A source that receives `head` at once, then `again` without end; all it sends is discarded.
fn answer(live: &Live, head: Vec<u8>, again: Vec<u8>) -> SourceReport {
    let (near, far) = UnixStream::pair().unwrap();
    let (mut reader, mut writer) = (far.try_clone().unwrap(), far);
    let reading = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
    let writing = std::thread::spawn(move || {
        let mut went = writer.write_all(&head);
        while went.is_ok() && !again.is_empty() {
            went = writer.write_all(&again);
        }
        writer
    });
    let (sink, back) = channel(near, IMPATIENT).split();
    let session = source(live, Box::new(live.clone()), Box::new(sink), Box::new(back), settings(IMPATIENT));
    let begun = Instant::now();
    let report = session.run();
    assert!(begun.elapsed() < SOON, "{:?} after {:?}", report.error, begun.elapsed());
    drop(writing.join().unwrap().shutdown(Shutdown::Both));
    drop(reading.join());
    report
}

#[test]
fn a_destination_that_lies_is_refused_and_the_guest_runs_on() {
    let live = Live::running(11, 500);
    let g = greeting();
    let hello = |max_version, migration_id, digest| {
        let hello = Hello { min_version: 1, max_version, ..Hello::ours(migration_id, digest) };
        let pongs = &g[..g.len() - said(&Message::Native(Answer::Hello(hello))).len()];
        stream(&[pongs, &said(&Message::Native(Answer::Hello(hello)))])
    };
    let long = "x".repeat(400);
    let cases: [Case<'_>; 14] = [
        ("noise", vec![0xff; 64], &["at byte"]),
        ("message of 64 KiB", stream(&[&g, &[0, 2, 0xff, 0xff]]), &["at byte"]),
        ("message of no kind", stream(&[&g, &[0, 99, 0, 0]]), &["at byte", "99"]),
        ("HELLO of version 7", hello(7, ID, true), &["version 7"]),
        ("HELLO of version 0", hello(0, ID, true), &["version 0"]),
        ("HELLO of another migration", hello(MAX_VERSION, [0; 16], true), &["HELLO"]),
        ("HELLO without the digest", hello(MAX_VERSION, ID, false), &["HELLO"]),
        ("success before anything was sent", said(&Message::Shut { status: 0 }), &["Shut"]),
        ("failure", stream(&[&g, &said(&Message::Shut { status: 3 })]), &["status 3"]),
        ("RUNNING before COMMIT", stream(&[&g, &said(&Message::Native(Answer::Running))]), &["Running"]),
        ("READY before the state", stream(&[&g, &said(&Message::Native(Answer::Ready))]), &["Ready"]),
        (
            "a page request",
            stream(&[&g, &said(&Message::RequestPages { start: 0, length: 1 })]),
            &["PageRequest"],
        ),
        ("a long refusal", stream(&[&g, &said(&Message::Native(Answer::Refused { why: &long }))]), &["xxx"]),
        ("no RAMWIRE", said(&Message::Pong(1)), &["greeting"]),
    ];
    for (what, bytes, says) in cases {
        let sent = answer(&live, bytes, Vec::new());
        let text =
            sent.error.as_ref().map(|error| ramwire::error::Chain(error).to_string()).unwrap_or_default();
        println!("{what}: {text}");
        assert_stayed(what, &live, &sent);
        for word in says {
            assert!(text.contains(word), "{what}: {text:?} does not say {word:?}");
        }
        live.assert_runs_on(what);
    }
    migrate_cleanly(&live, "after all lies");
}

#[test]
fn a_destination_that_talks_without_end_is_left_and_takes_no_memory() {
    let live = Live::running(12, 500);
    let before = reset_peak();
    for (what, again) in [
        ("PONGs", said(&Message::Pong(7)).repeat(1000)),
        ("acks", said(&Message::SwitchoverAck).repeat(1000)),
        ("greetings", greeting()),
        // Until the source's own bound: its amount of RAM explains no longer wait.
        ("work", said(&Message::Native(Answer::Working)).repeat(1000)),
    ] {
        let sent = answer(&live, greeting(), again);
        println!("endless {what}: {:?}", sent.error);
        assert_stayed(what, &live, &sent);
        live.assert_runs_on(what);
    }
    assert_bounded("floods from a destination", before);
    migrate_cleanly(&live, "after all floods");
}

/// Answers that are always there already, `most` bytes of them: reading them never waits.
struct Flood {
    head: Vec<u8>,
    again: Vec<u8>,
    at: usize,
    most: usize,
}

impl ramwire::transport::Sealed for Flood {}

impl ByteSource for Flood {
    fn recv(&mut self, into: &mut [RecvPart<'_>], _: &Stop) -> Result<usize, ChannelError> {
        let Some(RecvPart::Own(room)) = into.first_mut() else { return Ok(0) };
        if self.at >= self.most {
            return Ok(0);
        }
        for byte in room.iter_mut() {
            let past = self.at.checked_sub(self.head.len());
            *byte = past.map_or_else(|| self.head[self.at], |past| self.again[past % self.again.len()]);
            self.at += 1;
        }
        Ok(room.len())
    }
}

#[test]
fn answers_that_are_always_there_already_do_not_put_off_the_end_of_a_wait() {
    let live = Live::running(14, 500);
    for (what, word) in [
        ("PONG", Message::Pong(7)),
        ("ack", Message::SwitchoverAck),
        ("work", Message::Native(Answer::Working)),
    ] {
        // More than can be read within the timeouts on any machine, less than keeps a broken build for hours.
        let most = 8 << 30;
        let flood = Flood { head: greeting(), again: said(&word), at: 0, most };
        let (near, far) = UnixStream::pair().unwrap();
        let reading = std::thread::spawn(move || std::io::copy(&mut &far, &mut std::io::sink()));
        let (sink, _) = channel(near, IMPATIENT).split();
        let control = Box::new(live.clone());
        let sent = source(&live, control, Box::new(sink), Box::new(flood), settings(IMPATIENT)).run();
        assert!(matches!(sent.error, Some(Error::NoAnswer { .. })), "{what}: {:?}", sent.error);
        assert_stayed(what, &live, &sent);
        drop(sent);
        drop(reading.join());
    }
}

#[test]
fn a_destination_that_falls_silent_after_commit_leaves_the_guest_in_doubt() {
    let live = Live::running(13, 500);
    let (near, far) = UnixStream::pair().unwrap();
    // READY is sent when it is due: after STATE_SENT, which the digests follow.
    let mut far_writer = far.try_clone().unwrap();
    let listening = std::thread::spawn(move || {
        let (mut far, mut heard, mut said_ready) = (far, Vec::new(), false);
        let mut buffer = [0; 4096];
        far_writer.write_all(&greeting()).unwrap();
        while let Ok(got @ 1..) = far.read(&mut buffer) {
            heard.extend_from_slice(&buffer[..got]);
            if !said_ready && heard.windows(5).any(|at| at == [8, 0x52, 3, 0, 36]) {
                far_writer.write_all(&said(&Message::Native(Answer::Ready))).unwrap();
                said_ready = true;
            }
        }
        heard.windows(3).any(|at| at == [8, 0x52, 4])
    });
    let (sink, back) = channel(near, IMPATIENT).split();
    let session = source(&live, Box::new(live.clone()), Box::new(sink), Box::new(back), settings(IMPATIENT));
    let cancel = session.cancel_token();
    let sent = session.run();
    assert_eq!(sent.outcome, Outcome::InDoubt, "{:?}", sent.error);
    assert!(!live.runs() && !sent.guest_is_safe_here() && !cancel.is_cancelled());
    assert!(listening.join().unwrap(), "COMMIT was said");
    let text = ramwire::error::Chain(&sent.error.unwrap()).to_string();
    assert!(text.contains("that the guest runs") || text.contains("no byte moved"), "{text}");
    live.assert_whole("in doubt");
}
