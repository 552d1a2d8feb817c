//! Sources that break the rules of page channels, replayed from captured streams: each is refused with a reason, in
//! time, and no guest is accepted.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use flate2::read::GzDecoder;

use crate::common::{Deadline, project_root, ramwire::Ramwire, scratch};

/// Longest time of a refusal; the stall time of these runs is 2 s.
const IN_TIME: Duration = Duration::from_secs(16);

/// A captured migration over two channels.
#[derive(Clone)]
struct Capture {
    main: Vec<u8>,
    channels: Vec<Vec<u8>>,
}

impl Capture {
    fn of(name: &str) -> Self {
        let read = |part: &str| {
            let path = project_root().join(format!("tests/vectors/{name}-{part}.gz"));
            let mut bytes = Vec::new();
            GzDecoder::new(std::fs::File::open(path).unwrap()).read_to_end(&mut bytes).unwrap();
            bytes
        };
        Self { main: read("main"), channels: vec![read("ch0"), read("ch1")] }
    }
}

/// The bytes to send on a connection, and whether it stays open afterwards.
struct Played {
    bytes: Vec<u8>,
    stays: bool,
}

/// Replays connections into `ramwire receive` with two channels; returns its exit status and its output.
fn play(method: &str, connections: Vec<Played>) -> (i32, String, Duration) {
    let dir = scratch();
    let compression = format!("--compression={method}");
    let receive = ["receive", "tcp:127.0.0.1:0", "--channels=2", &compression, "--stall-timeout=2", "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &receive, dir.path().join("guest"));
    let address = receiver.listening();
    let began = Instant::now();
    let address = address.strip_prefix("tcp:").unwrap();
    let streams: Vec<_> = connections.iter().map(|_| TcpStream::connect(address).unwrap()).collect();
    // Each on a thread of its own: a barrier may make one wait for another.
    std::thread::scope(|scope| {
        for (played, mut stream) in connections.iter().zip(streams) {
            scope.spawn(move || {
                // A receiver that has given up closes the connection.
                let sent = stream.write_all(&played.bytes);
                let mut answer = [0; 64];
                if played.stays && sent.is_ok() {
                    stream.set_read_timeout(Some(IN_TIME)).unwrap();
                    while stream.read(&mut answer).is_ok_and(|count| count > 0) {}
                }
            });
        }
    });
    let (status, said) = receiver.ended(Deadline::seconds(40));
    let whole = manifest(dir.path()).contains("\"whole\"");
    assert_eq!(whole, status == 0, "{said}");
    (status, said, began.elapsed())
}

/// The captured source has no return path. So behind its block list its last byte may have been under way when it was
/// refused, and the guest is in doubt.
fn refused(status: i32, said: &str) {
    let expected = if said.contains("in doubt: the source has no return path") { 5 } else { 3 };
    assert_eq!(status, expected, "{said}");
}

fn manifest(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("guest/manifest.json")).unwrap_or_default()
}

fn connections(capture: &Capture) -> Vec<Played> {
    let all = std::iter::once(&capture.main).chain(&capture.channels);
    all.map(|bytes| Played { bytes: bytes.clone(), stays: true }).collect()
}

#[test]
fn s38_to_s49_captured_migrations_arrive_whatever_the_order_of_connections() {
    for (name, method) in [
        ("q100-microvm-multifd-none", "none"),
        ("q100-microvm-multifd-zlib", "zlib"),
        ("q100-microvm-multifd-zstd", "zstd"),
        ("q72-microvm-multifd-none", "none"),
        ("q72-microvm-multifd-zlib", "zlib"),
        ("q72-microvm-multifd-zstd", "zstd"),
    ] {
        let mut connections = connections(&Capture::of(name));
        if name.starts_with("q100") {
            connections.reverse();
        }
        let (status, said, _) = play(method, connections);
        assert_eq!(status, 0, "{name}: {said}");
    }
}

/// Offset of the first packet with pages on a channel: after the initial packet and SYNCs.
fn first_pages(channel: &[u8]) -> usize {
    let count = |at: usize| u32::from_be_bytes(channel[at + 16..at + 20].try_into().unwrap());
    let mut at = 64;
    while count(at) == 0 {
        at += 1344;
    }
    at
}

#[test]
fn s38_s40_s43_s48_s50_hostile_channels_are_refused_with_the_reason() {
    type Spoil = fn(&mut Capture);
    #[rustfmt::skip]
    let cases: &[(&str, Spoil, &str)] = &[
        ("two channels with one number",   |c| c.channels[1][24] = c.channels[0][24],            "same number"),
        ("a number too high",              |c| c.channels[1][24] = 2,                            "exceeds the number of channels"),
        ("another VM",                     |c| c.channels[1][8] = 1,                             "different UUIDs"),
        ("a version of the future",        |c| c.channels[0][7] = 2,                             "unknown version"),
        ("no channel at all",              |c| c.channels[0][0] = 0x99,                          "2 of 3 connections"),
        ("no main channel",                |c| c.main = c.channels[0].clone(),                   "none the main one"),
        ("two main channels",              |c| c.channels[0] = c.main.clone(),                   "main channels"),
        ("garbage for a packet",           |c| { let at = first_pages(&c.channels[0]); c.channels[0][at] = 0; },         "no packet begins here"),
        ("an unknown block",               |c| { let at = first_pages(&c.channels[0]); c.channels[0][at + 64] = b'?'; }, "?icrovm.ram"),
        ("an offset outside",              |c| { let at = first_pages(&c.channels[0]); c.channels[0][at + 320] = 0x7f; }, "0x7f"),
        ("an offset inside a page",        |c| { let at = first_pages(&c.channels[0]); c.channels[0][at + 327] = 1; },    "microvm.ram"),
        ("more pages than room",           |c| { let at = first_pages(&c.channels[0]); c.channels[0][at + 18] = 1; },     "more pages"),
        ("2^31 pages",                     |c| { let at = first_pages(&c.channels[0]); c.channels[0][at + 16] = 0x80; },  "more pages"),
        ("2^31 zero pages",                |c| { let at = first_pages(&c.channels[0]); c.channels[0][at + 32] = 0x80; },  "more pages"),
        ("a payload of another length",    |c| { let at = first_pages(&c.channels[0]); c.channels[0][at + 20] = 0x7f; },  "not the length of its pages"),
        ("no block name",                  |c| { let at = first_pages(&c.channels[0]); c.channels[0][at + 64..at + 320].fill(0); },    "block name"),
        ("a block name without an end",    |c| { let at = first_pages(&c.channels[0]); c.channels[0][at + 64..at + 320].fill(b'a'); }, "aaaaaaaa"),
        ("a compressed packet",            |c| { let at = first_pages(&c.channels[0]); c.channels[0][at + 11] = 2; },     "by zlib, and this end expects none: set multifd-compression"),
        ("device state",                   |c| { let at = first_pages(&c.channels[0]); c.channels[0][at + 11] = 0x40; },  "device state"),
        ("pages before the first barrier", |c| { let at = first_pages(&c.channels[0]); c.channels[0].drain(64..at); },    "before the first barrier"),
        ("cut inside a packet",            |c| { let at = first_pages(&c.channels[0]); c.channels[0].truncate(at + 700); }, "closed the connection"),
        ("cut inside pages",               |c| { let at = first_pages(&c.channels[0]); c.channels[0].truncate(at + 1344 + 100); }, "closed the connection"),
        ("closed between packets",         |c| { let at = first_pages(&c.channels[0]); c.channels[0].truncate(at); },     "page channel"),
    ];
    let capture = Capture::of("q100-microvm-multifd-none");
    for (what, spoil, reason) in cases {
        let mut spoilt = capture.clone();
        spoil(&mut spoilt);
        let mut connections = connections(&spoilt);
        // A truncated source closes; otherwise it waits for an answer.
        let cut = spoilt.channels[0].len() < capture.channels[0].len() && !what.starts_with("pages before");
        connections[1].stays = !cut;
        let (status, said, took) = play("none", connections);
        refused(status, &format!("{what}: {said}"));
        assert!(said.contains(reason), "{what}: {said}");
        assert!(took < IN_TIME, "{what}: {took:?}");
    }
}

/// A channel without its SYNC, a silent one, and one that never connects.
#[test]
fn s44_s50_a_channel_that_does_not_come_on_ends_the_wait() {
    let capture = Capture::of("q100-microvm-multifd-none");
    let silent = |keep: usize| {
        let mut connections = connections(&capture);
        connections[2].bytes.truncate(keep);
        connections
    };
    let mut missing = connections(&capture);
    missing.pop();
    for (what, connections, reason) in [
        ("says nothing", silent(0), "2 of 3 connections"),
        ("only its number", silent(64), "no byte moved"),
        ("half a SYNC", silent(64 + 700), "no byte moved"),
        ("never comes", missing, "2 of 3 connections"),
    ] {
        let (status, said, took) = play("none", connections);
        refused(status, &format!("{what}: {said}"));
        assert!(said.contains(reason), "{what}: {said}");
        assert!(took < IN_TIME, "{what}: {took:?}");
    }
}

/// A payload that would grow beyond its pages, and an invalid one.
#[test]
fn s47_s48_hostile_payloads_are_refused() {
    use ramwire::stream::qemu::page_compression::{PacketDeflater, PageCompression};
    for (name, compression) in [
        ("q100-microvm-multifd-zlib", PageCompression::Zlib(9)),
        ("q100-microvm-multifd-zstd", PageCompression::Zstd(19)),
    ] {
        let capture = Capture::of(name);
        let mut bomb = Vec::new();
        PacketDeflater::new(compression).unwrap().deflate(&vec![0; 32 << 20], &mut bomb).unwrap();
        for (what, payload, reason) in [
            ("a bomb", bomb, "does not give exactly its pages"),
            ("noise", vec![0xa5; 5000], "does not inflate"),
            (
                "a length above every limit",
                vec![0; (1 << 20) + 1],
                "the length of a compressed multifd packet",
            ),
        ] {
            let mut spoilt = capture.clone();
            let channel = &mut spoilt.channels[0];
            let at = first_pages(channel);
            channel[at + 20..at + 24].copy_from_slice(&(payload.len() as u32).to_be_bytes());
            channel.truncate(at + 1344);
            channel.extend(payload);
            let method = compression.to_string();
            let (status, said, _) = play(&method, connections(&spoilt));
            refused(status, &format!("{method} {what}: {said}"));
            assert!(said.contains(reason), "{method} {what}: {said}");
        }
    }
}
