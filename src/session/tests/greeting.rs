//! The kind of the peer is found out, whenever it answers.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Machine, bytes, guest, plain};
use crate::engine::{Ending, Outcome};
use crate::guest::MappedGuest;
use crate::session::*;
use crate::stream::native::{GREETING, channels_ping};
use crate::stream::qemu::file::Configuration;
use crate::stream::qemu::return_path::Message;
use crate::sys::Stop;
use crate::transport::{
    Address, AllowList, ChannelOptions, ConnectionOptions, InlineLink, Listener, open_source,
};
use crate::units::BlockIndex;

/// Blocks of the guests here, in pages.
const PAGES: [u64; 2] = [300, 7];

/// How long a destination here lets its source wait. No limit of the source that is not given may be shorter.
const LATE: Duration = Duration::from_millis(2500);

struct Sender {
    handle: MigrationHandle<SourceReport>,
    memory: Arc<MappedGuest>,
    machine: Machine,
}

/// A source whose guest has pages and device state, on its way to `address`.
fn send(
    address: &Address,
    channels: u8,
    state: &[u8],
    set: impl FnOnce(&mut SourceSettings),
) -> JoinHandle<Sender> {
    let memory = guest(&PAGES);
    for page in 0..PAGES[0] {
        let span = memory.region(BlockIndex(0)).unwrap().span(page * 4096, 4096).unwrap();
        span.copy_from(&[page as u8 | 1; 4096]);
    }
    let machine = Machine::running(state);
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.guest_is_paused = true;
    set(&mut settings);
    let address = address.clone();
    std::thread::spawn(move || {
        let connection =
            open_source(&address, memory.clone(), &connection_options(channels), &Stop::never()).unwrap();
        let control = Box::new(machine.clone());
        let source = SourceGuest { memory: memory.clone(), dirty: Vec::new(), control };
        let handle = SourceSession::new(source, connection, settings).spawn().unwrap();
        Sender { handle, memory, machine }
    })
}

fn connection_options(count: u8) -> ConnectionOptions {
    ConnectionOptions { channels: ChannelOptions { count, ..Default::default() }, ..Default::default() }
}

/// Lets the source wait until it has lost patience: it sends what follows the greeting, or ends.
fn keep_waiting(sender: &Sender) {
    let (begun, mut greeting) = (Instant::now(), 0);
    while begun.elapsed() < LATE && !sender.handle.is_finished() {
        std::thread::sleep(Duration::from_millis(5));
        let sent = sender.handle.progress().transferred;
        match greeting {
            0 => greeting = sent,
            _ if sent > greeting => return,
            _ => {}
        }
    }
}

/// A VMM accepts, makes its VM, and only then begins to read.
fn arrives_late(what: &str, channels: u8, state: &[u8], set: impl FnOnce(&mut SourceSettings)) {
    let address = "tcp:127.0.0.1:0".parse().unwrap();
    let mut listener = Listener::bind(&address, AllowList::default(), &Stop::never()).unwrap();
    let sending = send(listener.address(), channels, state, set);
    let connection = listener.accept_connection(&connection_options(channels), &Stop::never()).unwrap();
    let sender = sending.join().unwrap();
    keep_waiting(&sender);
    let (memory, machine) = (guest(&PAGES), Machine::default());
    let (provider, control) = (Box::new(memory.clone()), Box::new(machine.clone()));
    let settings = DestinationSettings::default();
    let arrived =
        DestinationSession::new(DestinationGuest { memory: provider, control }, connection, settings).run();
    let sent = sender.handle.wait().unwrap();
    assert_eq!(
        (sent.outcome, arrived.ending, arrived.native),
        (Outcome::Completed, Ending::Running, true),
        "{what}: {:?} {:?}",
        sent.error,
        arrived.error
    );
    assert!(!sender.machine.runs() && machine.runs(), "{what}");
    assert_eq!(machine.state(), state, "{what}");
    for block in 0..2 {
        assert!(bytes(&sender.memory, block) == bytes(&memory, block), "{what}: block {block} differs");
    }
    assert_eq!(arrived.verified, ["digest", "fingerprints"].contains(&what), "{what}");
}

#[test]
fn a_ramwire_that_begins_to_read_late_is_still_a_ramwire() {
    type Set = fn(&mut SourceSettings);
    let cases: [(&str, u8, &[u8], Set); 7] = [
        ("plain", 0, b"devices", |_| {}),
        ("state of zeros", 0, &[0; 64], |_| {}),
        ("no state", 0, b"", |_| {}),
        ("page channels", 2, b"devices", |_| {}),
        ("digest", 0, b"devices", |settings| settings.verify = Verify::Full),
        ("fingerprints", 0, b"devices", |settings| settings.verify = Verify::Fast),
        ("peer given", 0, b"devices", |settings| settings.peer = Some(Peer::Ramwire)),
    ];
    std::thread::scope(|scope| {
        for (what, channels, state, set) in cases {
            scope.spawn(move || arrives_late(what, channels, state, set));
        }
    });
}

/// What a destination that never reads costs is the greeting's bytes: no page was sent, no guest is in doubt.
#[test]
fn a_destination_that_stays_silent_ends_the_migration_before_a_page_is_sent() {
    for peer in [None, Some(Peer::Ramwire)] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
        let sender = send(&address, 0, b"devices", |settings| {
            (settings.peer, settings.greeting_timeout) = (peer, Duration::from_millis(200));
        });
        let _silent = listener.accept().unwrap();
        let sender = sender.join().unwrap();
        let sent = sender.handle.wait().unwrap();
        let text = sent.error.as_ref().unwrap().to_string();
        assert!(text.contains("did not report what it is within 0.2 s"), "{text}");
        assert_eq!(sent.error.as_ref().unwrap().kind(), ErrorKind::Channel);
        assert!(sent.guest_is_safe_here() && sender.machine.runs());
        assert_eq!((sent.statistics.pages.normal, sent.statistics.pages.zero), (0, 0));
    }
}

/// Answers as a QEMU does, `after` it has been let wait, until its source closes.
fn qemu(mut stream: TcpStream) {
    let (mut seen, mut answered) = (Vec::new(), 0);
    let mut buffer = [0; 1 << 16];
    while let Ok(got @ 1..) = stream.read(&mut buffer) {
        seen.extend_from_slice(&buffer[..got]);
        // QEMU_VM_COMMAND, PING, four bytes.
        let pings: Vec<u32> = seen
            .windows(9)
            .filter(|bytes| bytes[..5] == [8, 0, 2, 0, 4])
            .map(|bytes| u32::from_be_bytes(bytes[5..].try_into().unwrap()))
            .collect();
        for value in &pings[answered..] {
            let mut pong = Vec::new();
            Message::Pong(*value).encode(&mut pong);
            if stream.write_all(&pong).is_err() {
                return;
            }
        }
        answered = pings.len();
        assert!(pings.iter().all(|value| [1, GREETING, channels_ping(0)].contains(value)), "{pings:?}");
    }
}

/// The answer to the ordinary PING shows that it is none, however late it arrives.
#[test]
fn a_slow_qemu_is_a_qemu_and_compares_no_digest() {
    let cases =
        [(Verify::Full, None), (Verify::Fast, None), (Verify::Off, Some(Peer::Ramwire)), (Verify::Off, None)];
    for (verify, peer) in cases {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
        let sender = send(&address, 0, b"devices", |settings| {
            (settings.verify, settings.peer) = (verify, peer);
            settings.finish_timeout = Duration::from_millis(100);
        });
        let (stream, _) = listener.accept().unwrap();
        let sender = sender.join().unwrap();
        keep_waiting(&sender);
        assert!(!sender.handle.is_finished());
        let far = std::thread::spawn(move || qemu(stream));
        let sent = sender.handle.wait().unwrap();
        far.join().unwrap();
        let text = sent.error.as_ref().unwrap().to_string();
        let says = match (verify, peer) {
            (Verify::Full, _) => "only two ramwires compare one",
            (Verify::Fast, _) => "only two ramwires do",
            (_, Some(_)) => "answered the greeting like a QEMU",
            // All pages were sent, and no report arrived that the guest runs.
            _ => "did not report that the guest runs",
        };
        assert!(text.contains(says), "{text}");
        let goes = (verify, peer) == (Verify::Off, None);
        assert_eq!(sent.outcome == Outcome::InDoubt, goes);
        assert_eq!((sent.statistics.pages.normal > 0, sender.machine.runs()), (goes, !goes));
    }
}

#[test]
fn a_digest_that_nobody_can_compare_is_refused_before_the_first_byte() {
    let peers = [(Some(Peer::Qemu), true), (None, false), (Some(Peer::Ramwire), false)];
    let ways = [(Verify::Full, "digest"), (Verify::Fast, "fingerprints")];
    for ((peer, answers), (verify, says)) in peers.into_iter().flat_map(|peer| ways.map(|way| (peer, way))) {
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let (memory, machine) = (guest(&PAGES), Machine::running(b""));
        let mut settings = SourceSettings::new(Configuration::default());
        (settings.verify, settings.peer, settings.guest_is_paused) = (verify, peer, true);
        let link = Box::new(InlineLink::new(plain(&near), memory.clone()));
        let back = answers.then(|| plain(&near) as Box<_>);
        let source = SourceGuest { memory, dirty: Vec::new(), control: Box::new(machine.clone()) };
        let sent = SourceSession::new(source, SourceConnection::new(link, back), settings).run();
        let error = sent.error.as_ref().unwrap();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().contains(says), "{error}");
        assert!(sent.guest_is_safe_here() && machine.runs());
        assert_eq!(sent.statistics.transferred, 0);
    }
}
