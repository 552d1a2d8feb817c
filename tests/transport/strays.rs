//! A listener whose first connections are not the source's.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use ramwire::stream::qemu::multifd::{Init, encode_init};
use ramwire::transport::{ChannelOptions, ConnectionOptions, DestinationConnection, OpenError};

use super::*;

/// Far more than any of these waits takes.
const LIMIT: Duration = Duration::from_secs(30);

/// A connection of a test, of either kind.
trait Caller: Read + Write + Send {}
impl Caller for TcpStream {}
impl Caller for UnixStream {}

fn call(address: &Address) -> Box<dyn Caller> {
    try_call(address).unwrap()
}

fn try_call(address: &Address) -> std::io::Result<Box<dyn Caller>> {
    if let Some((host, port)) = address.host_and_port() {
        let socket = TcpStream::connect((host, port))?;
        socket.set_read_timeout(Some(LIMIT))?;
        return Ok(Box::new(socket));
    }
    let socket = UnixStream::connect(address.path().unwrap())?;
    socket.set_read_timeout(Some(LIMIT))?;
    Ok(Box::new(socket))
}

/// The bytes that a destination reads from a source that sends `QEVM` and 8 more bytes.
fn first_bytes(connection: &mut DestinationConnection) -> Vec<u8> {
    let mut got = Vec::new();
    while got.len() < 12 {
        let mut room = [0; 12];
        match connection.link.stream().recv(&mut [RecvPart::Own(&mut room)], &stop()).unwrap() {
            0 => break,
            count => got.extend_from_slice(&room[..count]),
        }
    }
    got
}

/// True if the other end has closed it, in an orderly way or not.
fn is_closed(caller: &mut dyn Caller) -> bool {
    match caller.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

fn every_kind(dir: &Path) -> [String; 3] {
    ["tcp:127.0.0.1:0".into(), "auto:127.0.0.1:0".into(), format!("unix:{}/a b.sock", dir.display())]
}

#[test]
fn strangers_neither_take_the_place_of_the_source_nor_make_it_wait() {
    let dir = tempfile::tempdir().unwrap();
    for text in every_kind(dir.path()) {
        let mut listener = listen(&text);
        let place = listener.address().clone();
        // A port check, a silent connection that stays, a browser, one that stops inside a word, a page channel.
        drop(call(&place));
        let mut silent = call(&place);
        let mut browser = call(&place);
        browser.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut halting = call(&place);
        halting.write_all(b"QEV").unwrap();
        let mut page_channel = call(&place);
        page_channel.write_all(&[0x11, 0x22, 0x33, 0x44]).unwrap();
        let waiting = std::thread::spawn(move || {
            let connection = listener.accept_connection(&ConnectionOptions::default(), &stop()).unwrap();
            (connection, listener)
        });
        // They are closed while the listener keeps waiting: nothing else can have closed them.
        assert!(is_closed(&mut *browser) && is_closed(&mut *page_channel), "{text}");
        let mut source = call(&place);
        for piece in [&b"Q"[..], b"EVM", b"12345678"] {
            source.write_all(piece).unwrap();
        }
        let (mut connection, listener) = waiting.join().unwrap();
        assert_eq!(first_bytes(&mut connection), b"QEVM12345678", "{text}");
        drop(listener);
        assert!(is_closed(&mut *silent) && is_closed(&mut *halting), "{text}");
    }
}

#[test]
fn a_crowd_of_silent_ones_is_bounded_and_each_is_silent_for_the_stall_time_at_most() {
    let dir = tempfile::tempdir().unwrap();
    for text in every_kind(dir.path()) {
        let mut listener = listen(&text);
        let place = listener.address().clone();
        let options = ConnectionOptions::of_stream(impatient(200));
        let waiting = std::thread::spawn(move || listener.accept_connection(&options, &stop()).map(drop));
        let mut crowd: Vec<_> = (0..100).map(|_| call(&place)).collect();
        // Without a source that replaces them, only time or number can have closed them.
        for silent in &mut crowd {
            assert!(is_closed(&mut **silent), "{text}");
        }
        // On a busy machine a source may take longer than the stall time between its connection and its first word; the
        // next one does not.
        let mut sources = Vec::new();
        while !waiting.is_finished() {
            let mut source = try_call(&place).ok();
            source.iter_mut().for_each(|source| drop(source.write_all(b"QEVM")));
            sources.extend(source);
            std::thread::sleep(Duration::from_millis(10));
        }
        waiting.join().unwrap().unwrap();
    }
}

#[test]
fn strangers_between_page_channels_are_closed_too() {
    let mut listener = listen("tcp:127.0.0.1:0");
    let place = listener.address().clone();
    let mut channels = ChannelOptions::default();
    channels.count = 2;
    let mut options = ConnectionOptions::default();
    options.channels = channels;
    let waiting = std::thread::spawn(move || listener.accept_connection(&options, &stop()));
    let mut callers = Vec::new();
    let mut strangers = Vec::new();
    for id in 0..2 {
        let mut stranger = call(&place);
        stranger.write_all(b"SSH-2.0-x\r\n").unwrap();
        strangers.push(stranger);
        callers.push(call(&place));
        let mut init = Vec::new();
        encode_init(&Init { uuid: [0; 16], id }, &mut init);
        callers[usize::from(id)].write_all(&init).unwrap();
    }
    callers.push(call(&place));
    callers[2].write_all(b"QEVM12345678").unwrap();
    let mut connection = waiting.join().unwrap().unwrap();
    assert_eq!(first_bytes(&mut connection), b"QEVM12345678");
    assert!(strangers.iter_mut().all(|stranger| is_closed(&mut **stranger)));
}

#[test]
fn a_second_listener_at_a_path_is_refused_and_takes_nothing_from_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("unix:{}/guest.sock", dir.path().display());
    let mut first = listen(&text);
    let error = Listener::bind(&address(&text), AllowList::default(), &stop()).unwrap_err();
    assert!(matches!(error, OpenError::Open { .. }), "{error}");
    assert!(error.to_string().contains("another program listens there"), "{error}");
    // Nothing has arrived at the first listener: it sees only the source.
    let none = first.accept(&StreamOptions::default(), &stop().within(Duration::ZERO)).map(drop);
    assert!(matches!(none, Err(OpenError::Channel(ChannelError::Stopped { .. }))), "{none:?}");
    let mut source = call(first.address());
    source.write_all(b"x").unwrap();
    let mut served = first.accept(&StreamOptions::default(), &stop()).unwrap();
    let mut byte = [0];
    assert_eq!(recv(&mut served, &mut byte).unwrap(), 1);
    assert_eq!(&byte, b"x");
}

#[test]
fn what_is_listened_on_is_taken_back_as_it_is_printed() {
    let dir = tempfile::tempdir().unwrap();
    let mut texts = every_kind(dir.path()).to_vec();
    let odd = dir.path().join("[o,d:d]%2 \u{e9}\\n.sock");
    texts.push(format!("unix:{}", odd.display()));
    texts.push("tcp::0".into());
    texts.push("tcp:localhost:0".into());
    if std::net::TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
        texts.push("tcp:[::1]:0".into());
    }
    texts.extend(link_local().map(|host| format!("tcp:[{host}]:0")));
    for text in texts {
        let mut listener = listen(&text);
        for printed in listener.addresses().iter().map(ToString::to_string).collect::<Vec<_>>() {
            let back = address(&printed);
            let near = match back.host_and_port() {
                Some((host, port)) => Address::tcp(host, port),
                None => back,
            };
            let mut near = connect(&near, &StreamOptions::default(), &stop()).unwrap();
            send(&mut near, b"QEVM12345678").unwrap();
            let mut connection = listener.accept_connection(&ConnectionOptions::default(), &stop()).unwrap();
            assert_eq!(first_bytes(&mut connection), b"QEVM12345678", "{text}: {printed}");
        }
    }
}

/// A link-local address of this host with its interface, if there is one.
fn link_local() -> Option<String> {
    let table = std::fs::read_to_string("/proc/net/if_inet6").ok()?;
    let line = table.lines().find(|line| line.starts_with("fe80"))?;
    let bits = u128::from_str_radix(line.get(..32)?, 16).ok()?;
    let interface = line.split_whitespace().last()?;
    let host = format!("{}%{interface}", Ipv6Addr::from_bits(bits));
    // An address that is still being checked can't be used yet.
    let probe = std::net::ToSocketAddrs::to_socket_addrs(&(host.as_str(), 0)).ok()?.next()?;
    std::net::TcpListener::bind(probe).is_ok().then_some(host)
}

#[test]
fn without_a_host_auto_is_this_machine_alone() {
    let listener = listen("auto::0");
    assert!(listener.address().to_string().starts_with("auto:127.0.0.1:"), "{}", listener.address());
    assert_eq!(listener.warning(), None);
    let why = listener.why_no_rdma().unwrap();
    assert!(why.contains("loopback") || why.contains("not built in"), "{why}");
}
