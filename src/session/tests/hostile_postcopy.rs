//! A source that switches to postcopy and sends what no source may send: it is refused, with a specific error, and the
//! guest does not start.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::{Machine, bytes, guest, plain};
use crate::engine::Ending;
use crate::error::Chain;
use crate::guest::MappedGuest;
use crate::ram::BlockName;
use crate::session::*;
use crate::stream::qemu::blocks::{BlockAnnouncement, encode_block_list};
use crate::stream::qemu::command::{Command, encode_discards};
use crate::stream::qemu::file::{self, Configuration};
use crate::stream::qemu::package::encode_package;
use crate::stream::qemu::ram::{self, PageAt, Record};
use crate::stream::qemu::return_path::Message;
use crate::stream::qemu::section::{
    SectionName, encode_end, encode_eof, encode_footer, encode_part, encode_start,
};
use crate::transport::StreamChannel;
use crate::units::{BlockIndex, BlockOffset, PageSize};

const PAGE: u64 = 4096;

fn command(command: Command<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    command.encode(&mut out);
    out
}

/// The stream up to the end of the `ram` START of two blocks of 3 and 2 pages.
fn start(advise: Option<Command<'_>>) -> Vec<u8> {
    let mut out = Vec::new();
    file::encode_header(&mut out);
    let machine = "pc-i440fx-7.2".into();
    file::encode_configuration(&Configuration { machine, ..Default::default() }, &mut out);
    Command::OpenReturnPath.encode(&mut out);
    Command::Ping(1).encode(&mut out);
    let host_page = advise.is_some().then_some(PageSize::SIZE_4K);
    advise.iter().for_each(|advise| advise.encode(&mut out));
    encode_start(&SectionName { id: 2, idstr: ram::IDSTR, instance: 0, version: ram::VERSION }, &mut out);
    let block = |name: &str, pages: u64| {
        let name = BlockName::new(name).unwrap();
        BlockAnnouncement { name, used_length: pages * PAGE, host_page, guest_addr: None }
    };
    encode_block_list(&[block("block0", 3), block("block1", 2)], &mut out);
    end_section(&mut out);
    out
}

fn end_section(out: &mut Vec<u8>) {
    out.extend_from_slice(&ram::EOS_RECORD);
    encode_footer(2, out);
}

fn advised() -> Vec<u8> {
    start(Some(Command::PostcopyAdvise { host_pages: PAGE, target_page: PAGE }))
}

/// A section with whole pages of `block0`, each full of `byte`.
fn pages(at: &[u64], byte: u8) -> Vec<u8> {
    let mut out = Vec::new();
    encode_part(2, &mut out);
    for page in at {
        let at = PageAt { block: Some("block0"), offset: BlockOffset(page * PAGE) };
        Record::Page(at).encode(&mut out);
        out.extend_from_slice(&[byte; PAGE as usize]);
    }
    end_section(&mut out);
    out
}

fn discard(block: &str, ranges: &[(u64, u64)]) -> Vec<u8> {
    let mut out = Vec::new();
    encode_discards(block, ranges, &mut out);
    out
}

fn packaged(inner: &[u8]) -> Vec<u8> {
    [&command(Command::Packaged { size: inner.len() as u32 }), inner].concat()
}

fn package() -> Vec<u8> {
    let mut inner = Vec::new();
    encode_package(b"devices", false, &mut inner);
    packaged(&inner)
}

fn end() -> Vec<u8> {
    let mut out = Vec::new();
    encode_end(2, &mut out);
    end_section(&mut out);
    encode_eof(&mut out);
    out
}

/// Sends these bytes to a destination, and closes.
fn received(stream: &[u8]) -> (DestinationReport, Machine, Arc<MappedGuest>) {
    let (mut near, far) = UnixStream::pair().unwrap();
    let (machine, memory) = (Machine::default(), guest(&[3, 2]));
    let settings = DestinationSettings { postcopy: true, max_state: 1 << 20, ..Default::default() };
    let (provider, control) = (Box::new(Arc::clone(&memory)), Box::new(machine.clone()));
    let session = DestinationSession::new(
        DestinationGuest { memory: provider, control },
        DestinationConnection::of_stream(plain(&far), Some(plain(&far))),
        settings,
    );
    drop(far);
    let session = std::thread::spawn(move || session.run());
    // It may refuse, and close, before all bytes are written.
    let _ = near.write_all(stream);
    let _ = near.shutdown(std::net::Shutdown::Write);
    let _ = near.read_to_end(&mut Vec::new());
    (session.join().unwrap(), machine, memory)
}

/// The minimum that a source may send: no page discarded (P-0), no page sent.
#[test]
fn p0_p2_p6_a_switchover_without_a_discard_is_accepted_and_pages_come_again_behind_one() {
    let (report, machine, memory) = received(&[advised(), pages(&[0, 1], 7), package(), end()].concat());
    assert_eq!((report.ending, machine.runs()), (Ending::Running, true), "{:?}", report.error);
    assert_eq!(bytes(&memory, 0), [[7; 4096], [7; 4096], [0; 4096]].concat());
    let again = discard("block0", &[(0, PAGE), (2 * PAGE, PAGE)]);
    let stream = [advised(), pages(&[0, 1], 7), again, package(), pages(&[2, 0], 9), end()].concat();
    let (report, machine, memory) = received(&stream);
    assert_eq!((report.ending, machine.runs()), (Ending::Running, true), "{:?}", report.error);
    assert_eq!(bytes(&memory, 0), [[9; 4096], [7; 4096], [9; 4096]].concat());
    assert_eq!(report.bytes, stream.len() as u64);
}

#[test]
fn p12_p17_what_no_source_may_say_in_front_of_the_package_is_refused_and_the_guest_does_not_start() {
    let d = |start: u64, length: u64| discard("block0", &[(start, length)]);
    let long_name = |len: u16, name_len: u8| {
        // The command ends inside the name, or before the ranges.
        [&b"\x08\0\x06"[..], &len.to_be_bytes(), &[0, name_len], &[b'a'; 300][..usize::from(len) - 2]]
            .concat()
    };
    let one = |inner: &[u8]| packaged(inner);
    let listen = command(Command::PostcopyListen);
    let run = command(Command::PostcopyRun);
    let mut trailing = Vec::new();
    encode_package(b"devices", false, &mut trailing);
    trailing.extend_from_slice(b"more");
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("past the end", d(2 * PAGE, 2 * PAGE), "block0"),
        ("behind the end", d(3 * PAGE, PAGE), "block0"),
        ("an overflow", d(u64::MAX - PAGE + 1, 2 * PAGE), "block0"),
        ("an overflow to inside", d(PAGE, u64::MAX - PAGE + 1), "block0"),
        ("an unaligned start", d(1, PAGE), "whole pages"),
        ("an unaligned length", d(0, PAGE + 1), "whole pages"),
        ("nothing", d(0, 0), "whole pages"),
        ("a bad range behind a good one", discard("block0", &[(0, PAGE), (3 * PAGE, PAGE)]), "block0"),
        ("an unknown block", discard("vga", &[(0, PAGE)]), "vga"),
        ("a name longer than the command", long_name(20, 200), "POSTCOPY_RAM_DISCARD"),
        ("a name that leaves no room for a range", long_name(20, 17), "POSTCOPY_RAM_DISCARD"),
        ("a body of two bytes", b"\x08\0\x06\0\x02\0\x01".to_vec(), "POSTCOPY_RAM_DISCARD"),
        ("4 GiB of package", command(Command::Packaged { size: u32::MAX }), "package"),
        ("more package than state is accepted", command(Command::Packaged { size: 2 << 20 }), "package"),
        ("an empty package", one(&[]), "package"),
        ("a package without LISTEN", one(&[b"devices", &run[..]].concat()), "package"),
        ("a package without RUN", one(&[&listen[..], b"devices"].concat()), "package"),
        ("a package with bytes behind RUN", one(&trailing), "package"),
        ("a package in a package", one(&package()), "package"),
        ("LISTEN outside", listen.clone(), "PostcopyListen"),
        ("RUN outside", run.clone(), "PostcopyRun"),
        ("RECV_BITMAP before", command(Command::RecvBitmap { block: "block0" }), "RecvBitmap"),
        ("RESUME before", command(Command::PostcopyResume), "PostcopyResume"),
        ("COLO", command(Command::EnableColo), "EnableColo"),
    ];
    for (what, bytes, named) in cases {
        // Everything that would start the guest follows.
        let (report, machine, _) = received(&[advised(), pages(&[0], 7), bytes, package(), end()].concat());
        let error = Chain(report.error.as_ref().expect(what)).to_string();
        assert_eq!((report.ending, machine.runs()), (Ending::Discarded, false), "{what}: {error}");
        assert!(error.contains(named), "{what}: {error}");
    }
}

#[test]
fn p17_advises_that_do_not_fit_and_switchovers_without_one_are_refused() {
    let advise = |host_pages, target_page| start(Some(Command::PostcopyAdvise { host_pages, target_page }));
    for (what, front, named) in [
        ("huge pages that this guest has not", advise(0x20_1000, PAGE), "0x201000"),
        ("another target page", advise(PAGE, 2 * PAGE), "page"),
        ("a package without ADVISE", start(None), "PACKAGED"),
    ] {
        let (report, machine, _) = received(&[front, pages(&[0], 7), package(), end()].concat());
        let error = Chain(report.error.as_ref().expect(what)).to_string();
        assert_eq!((report.ending, machine.runs()), (Ending::Discarded, false), "{what}: {error}");
        assert!(error.contains(named), "{what}: {error}");
    }
    let (report, machine, _) =
        received(&[start(None), discard("block0", &[(0, PAGE)]), package(), end()].concat());
    let error = Chain(report.error.as_ref().unwrap()).to_string();
    assert_eq!((report.ending, machine.runs()), (Ending::Discarded, false), "{error}");
    assert!(error.contains("without ADVISE"), "{error}");
}

/// The guest has moved: it runs here, and later errors can only end the connection.
#[test]
fn p12_p20_what_no_source_may_say_behind_the_package_ends_the_connection_and_changes_no_page() {
    let mut outside = Vec::new();
    encode_part(2, &mut outside);
    let at = PageAt { block: Some("block0"), offset: BlockOffset(3 * PAGE) };
    Record::Page(at).encode(&mut outside);
    outside.extend_from_slice(&[9; PAGE as usize]);
    let mut fill = Vec::new();
    encode_part(2, &mut fill);
    let at = PageAt { block: Some("block0"), offset: BlockOffset(2 * PAGE) };
    Record::Zero { at, fill: 5 }.encode(&mut fill);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("P-20: a page of another byte than zero", fill, "0x05"),
        ("a second package", package(), "PACKAGED"),
        ("a discard", discard("block0", &[(0, PAGE)]), "after the package"),
        ("RECV_BITMAP without a loss", command(Command::RecvBitmap { block: "block0" }), "RECV_BITMAP"),
        ("RECV_BITMAP of an unknown block", command(Command::RecvBitmap { block: "vga" }), "RECV_BITMAP"),
        ("RESUME without a loss", command(Command::PostcopyResume), "RESUME"),
        ("LISTEN again", command(Command::PostcopyListen), "PostcopyListen"),
        ("a page outside", outside, "block0"),
        ("the end, and a page that was discarded is not here", end(), "0x2000"),
    ];
    for (what, bytes, named) in cases {
        let again = discard("block0", &[(2 * PAGE, PAGE)]);
        let stream = [advised(), pages(&[0], 7), again, package(), bytes, pages(&[2], 9), end()].concat();
        let (report, _, memory) = received(&stream);
        let error = Chain(report.error.as_ref().expect(what)).to_string();
        assert_eq!(report.ending, Ending::Incomplete, "{what}: {error}");
        assert!(error.contains(named), "{what}: {error}");
        // The other pages were never received: reading them would wait for ever.
        let mut first = [0; 4096];
        memory.region(BlockIndex(0)).unwrap().span(0, PAGE).unwrap().copy_to(&mut first);
        assert_eq!(first, [7; 4096], "{what}");
    }
    let (report, ..) = received(&[advised(), pages(&[0], 7), package()].concat());
    assert!(matches!(report.error, Some(Error::Truncated { .. })), "{:?}", report.error);
    assert_eq!(report.ending, Ending::Incomplete, "a connection that ends");
}

/// The guest may have written a received page since: it is left unchanged.
#[test]
fn a_page_for_a_page_that_has_come_changes_nothing() {
    let again = discard("block0", &[(2 * PAGE, PAGE)]);
    let late = pages(&[0, 0, 2, 2], 9);
    let (report, machine, memory) =
        received(&[advised(), pages(&[0], 7), again, package(), late, end()].concat());
    assert_eq!((report.ending, machine.runs()), (Ending::Running, true), "{:?}", report.error);
    assert_eq!(bytes(&memory, 0), [[7; 4096], [0; 4096], [9; 4096]].concat());
    assert_eq!(report.pages.normal, 2);
}

/// Zero pages sent as whole pages, as QEMUs from 10.1 on with multifd do after the package: they are placed, and no old
/// byte remains.
#[test]
fn p25_zero_pages_may_come_as_whole_ones() {
    let again = discard("block0", &[(0, 3 * PAGE)]);
    let stream = [advised(), pages(&[0, 1, 2], 7), again, package(), pages(&[2, 0, 1], 0), end()].concat();
    let (report, machine, memory) = received(&stream);
    assert_eq!((report.ending, machine.runs()), (Ending::Running, true), "{:?}", report.error);
    assert_eq!(bytes(&memory, 0), [0; 3 * 4096]);
    assert_eq!((report.pages.normal, report.pages.zero), (6, 0));
}

/// P-23: a dozen ranges, and one more.
#[test]
fn p23_discards_of_12_and_13_ranges_are_taken() {
    for count in [12, 13] {
        let range = |at: u64| (at % 3 * PAGE, PAGE);
        let ranges: Vec<(u64, u64)> = (0..count).map(range).collect();
        let again = discard("block0", &ranges);
        let stream =
            [advised(), pages(&[0, 1, 2], 7), again, package(), pages(&[0, 1, 2], 9), end()].concat();
        let (report, machine, memory) = received(&stream);
        assert_eq!((report.ending, machine.runs()), (Ending::Running, true), "{:?}", report.error);
        assert_eq!(bytes(&memory, 0), [9; 3 * 4096]);
    }
}

/// Strangers on the listener: a silent connection, one that closes, and one that sends other bytes do not keep the
/// destination from reading the source's connection.
#[test]
fn p14_connections_of_strangers_keep_no_urgent_page_away() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let (machine, memory) = (Machine::default(), guest(&[3, 2]));
    let settings = DestinationSettings { postcopy: true, ..Default::default() };
    let (provider, control) = (Box::new(Arc::clone(&memory)), Box::new(machine.clone()));
    let (connect, connections) = std::sync::mpsc::channel::<UnixStream>();
    let next = move |stop: &crate::sys::Stop| loop {
        if let Ok(socket) = connections.try_recv() {
            break Ok(StreamChannel::from_fd(socket.into(), "a peer", &Default::default()).unwrap());
        }
        if stop.sleep(std::time::Duration::from_millis(1)).is_some() {
            break Err(crate::transport::OpenError::from(crate::transport::ChannelError::Closed {
                peer: "peers".into(),
                doing: "waiting",
            }));
        }
    };
    let session = DestinationSession::new(
        DestinationGuest { memory: provider, control },
        DestinationConnection::of_stream(plain(&far), Some(plain(&far))),
        settings,
    )
    .with_next_connection(Box::new(next));
    drop(far);
    let session = std::thread::spawn(move || session.run());
    let mut others = Vec::new();
    let mut open = |says: &[u8]| {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        ours.write_all(says).unwrap();
        connect.send(theirs).unwrap();
        others.push(ours.try_clone().unwrap());
        ours
    };
    open(&[]);
    open(b"GET / HTTP/1.1");
    open(&[0; 64]);
    open(&[]).shutdown(std::net::Shutdown::Both).unwrap();
    let mut urgent = open(&[]);
    let again = discard("block0", &[(0, 3 * PAGE)]);
    near.write_all(&[advised(), pages(&[0], 7), again, package(), pages(&[0, 1], 9)].concat()).unwrap();
    near.write_all(&end()).unwrap();
    // The last page arrives here, after the end of the others.
    let at = PageAt { block: Some("block0"), offset: BlockOffset(2 * PAGE) };
    let mut record = Vec::new();
    Record::Page(at).encode(&mut record);
    record.extend_from_slice(&[9; PAGE as usize]);
    record.extend_from_slice(&ram::EOS_RECORD);
    urgent.write_all(&record).unwrap();
    // Like a source, it stays open until the destination has reported its end: if it closed earlier, it would count as
    // lost.
    let (mut answers, mut shut, mut byte) = (Vec::new(), Vec::new(), [0]);
    Message::Shut { status: 0 }.encode(&mut shut);
    while !answers.ends_with(&shut) {
        near.read_exact(&mut byte).unwrap();
        answers.extend_from_slice(&byte);
    }
    drop((urgent, others));
    near.read_to_end(&mut Vec::new()).unwrap();
    let report = session.join().unwrap();
    assert_eq!((report.ending, machine.runs()), (Ending::Running, true), "{:?}", report.error);
    assert_eq!(bytes(&memory, 0), [9; 3 * 4096]);
    assert_eq!(report.missing_pages.unwrap().preempt_pages, 1);
}
