//! The doors against real sockets, pipes, commands and files.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use ramwire::sys::{CancelToken, RecvPart, SendPart, Stop, StopReason};
use ramwire::transport::{
    Address, AllowList, ByteSink, ByteSource, ChannelError, Fault, FaultKind, Faulty, Listener, OpenError,
    StreamChannel, StreamOptions, connect,
};

const SECOND: Duration = Duration::from_secs(1);

fn stop() -> Stop {
    Stop::on(&CancelToken::default()).within(30 * SECOND)
}

fn impatient(stall_ms: u64) -> StreamOptions {
    StreamOptions { stall: Some(Duration::from_millis(stall_ms)), ..StreamOptions::default() }
}

fn address(text: &str) -> Address {
    text.parse().unwrap()
}

fn listen(text: &str) -> Listener {
    Listener::bind(&address(text), AllowList::default(), &stop()).unwrap()
}

/// Both ends of a connection by way of `text`, which is listened on.
fn pair(text: &str, options: &StreamOptions) -> (StreamChannel, StreamChannel) {
    let mut listener = listen(text);
    let near = connect(listener.address(), options, &stop()).unwrap();
    (near, listener.accept(options, &stop()).unwrap())
}

fn send(channel: &mut StreamChannel, bytes: &[u8]) -> Result<(), ChannelError> {
    channel.send(&[SendPart::Own(bytes)], &stop())
}

fn recv(channel: &mut StreamChannel, room: &mut [u8]) -> Result<usize, ChannelError> {
    channel.recv(&mut [RecvPart::Own(room)], &stop())
}

fn read_all(source: &mut impl ByteSource) -> Result<Vec<u8>, ChannelError> {
    let (mut got, mut room) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        match source.recv(&mut [RecvPart::Own(&mut room)], &stop())? {
            0 => return Ok(got),
            count => got.extend(&room[..count]),
        }
    }
}

/// Bytes that repeat only after 251.
fn pattern(len: usize) -> Vec<u8> {
    let mut bytes = (0..251u8).collect::<Vec<_>>().repeat(len / 251 + 1);
    bytes.truncate(len);
    bytes
}

#[test]
fn bytes_go_both_ways_by_every_kind_of_socket() {
    let dir = tempfile::tempdir().unwrap();
    let unix = format!("unix:{}/a.sock", dir.path().display());
    for text in ["tcp::0", "tcp:127.0.0.1:0", "tcp:[::1]:0", "tcp:localhost:0", &unix] {
        let (near, far) = pair(text, &StreamOptions::default());
        let bytes = pattern(5_000_000);
        let (mut near_in, mut near_out) = near.split();
        let (mut far_in, mut far_out) = far.split();
        std::thread::scope(|scope| {
            for (sink, source) in [(&mut near_out, &mut far_in), (&mut far_out, &mut near_in)] {
                let bytes = &bytes;
                scope.spawn(move || {
                    send(sink, bytes).unwrap();
                    sink.finish(&stop()).unwrap();
                    assert_eq!(sink.position(), 5_000_000);
                });
                scope.spawn(move || assert!(read_all(source).unwrap() == *bytes, "{text}"));
            }
        });
    }
    assert!(!dir.path().join("a.sock").exists(), "the socket's path goes with its listener");
}

#[test]
fn an_empty_host_is_loopback_and_any_other_address_warns() {
    assert_eq!(listen("tcp::0").warning(), None);
    assert_eq!(listen("tcp:[::1]:0").warning(), None);
    for text in ["tcp:0.0.0.0:0", "tcp:[::]:0", "tcp:0:0"] {
        let warning = listen(text).warning().unwrap();
        assert!(warning.contains("unencrypted") && warning.contains("--allow"), "{warning}");
    }
}

#[test]
fn a_host_that_is_not_allowed_is_closed_and_the_next_one_served() {
    let allow: AllowList = "127.0.0.2".parse().unwrap();
    let mut listener = Listener::bind(&address("tcp:127.0.0.1:0"), allow, &stop()).unwrap();
    let mut refused = connect(listener.address(), &StreamOptions::default(), &stop()).unwrap();
    let Address::Tcp { port, .. } = *listener.address() else { panic!("a TCP address") };
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 2], 0)).into()).unwrap();
    socket.connect(&std::net::SocketAddr::from(([127, 0, 0, 1], port)).into()).unwrap();
    let served = listener.accept(&StreamOptions::default(), &stop()).unwrap();
    assert!(served.peer().starts_with("tcp:127.0.0.2:"), "{}", served.peer());
    assert!(matches!(recv(&mut refused, &mut [0]), Ok(0) | Err(ChannelError::Io { .. })));
}

#[test]
fn what_cannot_be_opened_says_what_would_help() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().display();
    let busy = listen("tcp:127.0.0.1:0");
    let left = format!("unix:{path}/left.sock");
    drop(std::os::unix::net::UnixListener::bind(format!("{path}/left.sock")).unwrap());
    std::fs::write(format!("{path}/file"), b"kept").unwrap();
    let held = listen(&left);
    for (text, remedy) in [
        (busy.address().to_string(), "choose another port"),
        ("tcp:192.0.2.1:0".into(), "address of this host"),
        (format!("unix:{path}/none/a.sock"), "directory"),
        (left, "choose another path"),
        (format!("unix:{path}/file"), "choose another path"),
    ] {
        let error = Listener::bind(&address(&text), AllowList::default(), &stop()).unwrap_err();
        assert!(error.to_string().contains(remedy), "{text}: {error}");
    }
    assert_eq!(std::fs::read(format!("{path}/file")).unwrap(), b"kept");
    let mode = std::fs::metadata(format!("{path}/left.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "only its owner connects");
    drop(held);
    for (text, words) in [
        (format!("unix:{path}/left.sock"), "connecting"),
        (format!("file:{path}/none/stream"), "check that the path"),
        ("fd:9999".into(), "pass an open stream socket"),
        ("tcp:no-such-host.invalid:1".into(), "check the name"),
    ] {
        let error = connect(&address(&text), &StreamOptions::default(), &stop()).unwrap_err();
        assert!(error.to_string().contains(words), "{text}: {error}");
    }
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let refused =
        connect(&address(&format!("tcp:{unused}")), &StreamOptions::default(), &stop()).unwrap_err();
    assert!(refused.to_string().contains("refused"), "{refused}");
}

#[test]
fn a_file_holds_the_stream_and_only_its_owner_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("file:{}/stream", dir.path().display());
    for len in [3_000_000, 10] {
        let mut out = connect(&address(&text), &StreamOptions::default(), &stop()).unwrap();
        send(&mut out, &pattern(len)).unwrap();
        out.finish(&stop()).unwrap();
        let mut listener = listen(&text);
        let mut back = listener.accept(&StreamOptions::default(), &stop()).unwrap();
        assert!(read_all(&mut back).unwrap() == pattern(len));
        let again = listener.accept(&StreamOptions::default(), &stop());
        assert!(matches!(again, Err(OpenError::OnlyOne { .. })));
    }
    let mode = std::fs::metadata(dir.path().join("stream")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_command_carries_the_stream_and_its_failure_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    let text = format!("exec:cat > '{}'", path.display());
    let options = StreamOptions::default();
    let mut out = connect(&address(&text), &options, &stop()).unwrap();
    send(&mut out, &pattern(1_000_000)).unwrap();
    out.finish(&stop()).unwrap();
    assert!(std::fs::read(&path).unwrap() == pattern(1_000_000));
    let text = format!("exec:cat '{}'", path.display());
    let mut back = listen(&text).accept(&options, &stop()).unwrap();
    assert!(read_all(&mut back).unwrap() == pattern(1_000_000));
    back.finish(&stop()).unwrap();

    let mut out = connect(&address("exec:cat > /dev/null; exit 3"), &options, &stop()).unwrap();
    send(&mut out, b"bytes").unwrap();
    let error = out.finish(&stop()).unwrap_err().to_string();
    assert!(error.contains("exit 3") && error.contains("exit status: 3"), "{error}");
    let mut back = listen("exec:echo half; kill -9 $$").accept(&options, &stop()).unwrap();
    let error = read_all(&mut back).unwrap_err();
    assert!(matches!(&error, ChannelError::CommandFailed { status, .. } if status.contains("9")), "{error}");
    let mut back = listen("exec:no-such-command 2>/dev/null").accept(&options, &stop()).unwrap();
    assert!(read_all(&mut back).unwrap_err().to_string().contains("command not found"));
    // A command that leaves early is an error of the write, not a signal.
    let mut out = connect(&address("exec:exec true"), &options, &stop()).unwrap();
    assert!(matches!(
        send(&mut out, &pattern(10_000_000)),
        Err(ChannelError::Closed { .. } | ChannelError::Io { .. })
    ));
}

#[test]
fn nothing_a_command_started_is_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let note = dir.path().join("pid");
    let text = format!("exec:sleep 1000 & echo $! > '{}'; wait", note.display());
    let channel = connect(&address(&text), &StreamOptions::default(), &stop()).unwrap();
    let begun = Instant::now();
    let pid = loop {
        match std::fs::read_to_string(&note) {
            Ok(pid) if pid.ends_with('\n') => break pid.trim().to_owned(),
            _ => assert!(begun.elapsed() < 10 * SECOND),
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    drop(channel);
    let alive = || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        !status.is_empty() && !status.contains("State:\tZ")
    };
    while alive() {
        assert!(begun.elapsed() < 10 * SECOND, "process {pid} lives");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_stream_that_moves_slowly_never_counts_as_stalled() {
    std::thread::scope(|scope| {
        for text in ["tcp", "unix"] {
            scope.spawn(move || slow_but_moving(text, slow_pair(text, 800)));
        }
        // A large send buffer: poll(2) says writable only when a third of it is free, far later than bytes move.
        scope.spawn(move || {
            let (near, far) = tcp_sockets(Some(64 << 10), None);
            let take = |fd| StreamChannel::from_fd(fd, "the other end", &impatient(800)).unwrap();
            slow_but_moving("tcp with a large buffer", (take(near), take(far)));
        });
    });
}

fn slow_but_moving(name: &str, (mut near, mut far): (StreamChannel, StreamChannel)) {
    let total = 4 << 20;
    let reader = std::thread::spawn(move || {
        let (mut got, mut room) = (0, vec![0; 64 << 10]);
        while got < total {
            got += recv(&mut far, &mut room).unwrap();
            std::thread::sleep(Duration::from_millis(60));
        }
    });
    let begun = Instant::now();
    send(&mut near, &pattern(total)).unwrap();
    near.finish(&stop()).unwrap();
    assert!(begun.elapsed() > Duration::from_millis(1600), "{name}: the reader was not slow");
    reader.join().unwrap();
}

/// A connection with little room in the kernel, so that a slow reader is felt.
fn slow_pair(text: &str, stall_ms: u64) -> (StreamChannel, StreamChannel) {
    let options = impatient(stall_ms);
    let (near, far): (OwnedFd, OwnedFd) = if text == "unix" {
        let (near, far) = UnixStream::pair().unwrap();
        socket2::SockRef::from(&near).set_send_buffer_size(64 << 10).unwrap();
        (near.into(), far.into())
    } else {
        tcp_sockets(Some(128 << 10), Some(128 << 10))
    };
    let take = |fd| StreamChannel::from_fd(fd, "the other end", &options).unwrap();
    (take(near), take(far))
}

/// Connected sockets with so much room in the kernel for what far receives and near sends.
fn tcp_sockets(receive: Option<usize>, send: Option<usize>) -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    if let Some(receive) = receive {
        socket2::SockRef::from(&listener).set_recv_buffer_size(receive).unwrap();
    }
    let near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    if let Some(send) = send {
        socket2::SockRef::from(&near).set_send_buffer_size(send).unwrap();
    }
    let (far, _) = listener.accept().unwrap();
    (near.into(), far.into())
}

#[test]
fn a_half_open_peer_is_noticed_on_each_side_within_the_stall_time() {
    for text in ["tcp::0", "unix"] {
        let (mut near, mut far) = slow_pair(text, 300);
        let begun = Instant::now();
        // Nobody reads what near sends, and nobody sends what far waits for.
        let error = send(&mut near, &pattern(20 << 20)).unwrap_err();
        let took = begun.elapsed();
        assert!(matches!(error, ChannelError::Stalled { .. }), "{text}: {error}");
        assert!(error.to_string().contains("--stall-timeout"));
        assert!((300..2000).contains(&took.as_millis()), "{text}: {took:?}");
        drain(&mut far);
        let begun = Instant::now();
        assert!(matches!(recv(&mut far, &mut [0]), Err(ChannelError::Stalled { .. })));
        assert!((300..2000).contains(&begun.elapsed().as_millis()), "{text}");
    }
}

/// Takes what is there until nothing comes for a moment.
fn drain(channel: &mut StreamChannel) {
    let mut room = vec![0; 1 << 16];
    loop {
        let short = stop().within(Duration::from_millis(50));
        if channel.recv(&mut [RecvPart::Own(&mut room)], &short).is_err() {
            return;
        }
    }
}

#[test]
fn a_hanging_reader_is_noticed_by_the_sender() {
    let (mut near, far) = pair("tcp::0", &impatient(300));
    let mut far = Faulty::new(far, [Fault { at: 100_000, kind: FaultKind::Hang }], None);
    let cancel = CancelToken::default();
    let reader_stop = Stop::on(&cancel);
    let reader = std::thread::spawn(move || {
        let mut room = vec![0; 1 << 16];
        while far.recv(&mut [RecvPart::Own(&mut room)], &reader_stop).is_ok() {}
    });
    let error = send(&mut near, &pattern(64 << 20)).unwrap_err();
    assert!(matches!(error, ChannelError::Stalled { .. }), "{error}");
    cancel.cancel();
    reader.join().unwrap();
}

/// A socket that takes no packet any more: its host is gone as far as the peer can tell.
fn cut_off(fd: &OwnedFd) {
    let drop_all = socket2::SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0);
    socket2::SockRef::from(fd).attach_filter(&[drop_all]).unwrap();
}

#[test]
fn a_dead_host_is_noticed_by_a_sender_and_by_a_waiting_receiver() {
    let options = StreamOptions { stall: None, dead_peer: 2 * SECOND, ..StreamOptions::default() };
    std::thread::scope(|scope| {
        // Little and much data under way, a full window, and only keepalive.
        for amount in [10, 32 << 20, 0] {
            scope.spawn(move || {
                let (near, far) = tcp_sockets(Some(1 << 20), Some(1 << 20));
                let mut near = StreamChannel::from_fd(near, "the dead one", &options).unwrap();
                cut_off(&far);
                let begun = Instant::now();
                let error = match send(&mut near, &pattern(amount)) {
                    Ok(()) => recv(&mut near, &mut [0]).unwrap_err(),
                    Err(error) => error,
                };
                let took = begun.elapsed();
                assert!(matches!(error, ChannelError::Silent { .. }), "{amount}: {error}");
                assert!((1..7).contains(&took.as_secs()), "{amount}: {took:?}");
            });
        }
        // The window was closed before the host died.
        scope.spawn(move || {
            let (near, far) = tcp_sockets(Some(64 << 10), Some(64 << 10));
            let mut near = StreamChannel::from_fd(near, "the dead one", &options).unwrap();
            let short = stop().within(SECOND);
            let bytes = pattern(8 << 20);
            let full = near.send(&[SendPart::Own(&bytes)], &short);
            assert!(matches!(full, Err(ChannelError::Stopped { .. })));
            cut_off(&far);
            let begun = Instant::now();
            let error = send(&mut near, &bytes).unwrap_err();
            assert!(matches!(error, ChannelError::Silent { .. }), "{error}");
            assert!((1..9).contains(&begun.elapsed().as_secs()));
        });
    });
}

#[test]
fn a_host_without_room_that_answers_is_not_dead() {
    let options = StreamOptions { stall: Some(20 * SECOND), dead_peer: SECOND, ..StreamOptions::default() };
    let (near, far) = tcp_sockets(Some(64 << 10), Some(64 << 10));
    let mut near = StreamChannel::from_fd(near, "the slow one", &options).unwrap();
    let mut far = StreamChannel::from_fd(far, "the sender", &options).unwrap();
    let reader = std::thread::spawn(move || {
        std::thread::sleep(5 * SECOND);
        let got = read_all(&mut far).unwrap();
        assert!(got == pattern(8 << 20));
    });
    send(&mut near, &pattern(8 << 20)).unwrap();
    near.finish(&stop()).unwrap();
    reader.join().unwrap();
}

#[test]
fn a_deadline_of_zero_takes_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let unix = format!("unix:{}/a.sock", dir.path().display());
    for text in ["tcp::0", &unix] {
        let (mut near, mut far) = pair(text, &StreamOptions::default());
        let now = stop().within(Duration::ZERO);
        let mut room = [0; 3];
        let nothing = far.recv(&mut [RecvPart::Own(&mut room)], &now);
        assert!(matches!(nothing, Err(ChannelError::Stopped { .. })), "{nothing:?}");
        send(&mut near, &[7]).unwrap();
        // What was sent takes its way through the kernel.
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(far.recv(&mut [RecvPart::Own(&mut room)], &now).unwrap(), 1);
    }
}

#[test]
fn every_wait_ends_soon_after_a_cancel() {
    let options = StreamOptions::default();
    let no_room = |text| {
        let (mut near, far) = slow_pair(text, 60_000);
        move |stop: &Stop| {
            let _far = &far;
            near.send(&[SendPart::Own(&pattern(32 << 20))], stop).map_err(OpenError::from)
        }
    };
    let (_quiet, mut waiting) = pair("tcp::0", &options);
    let mut listener = listen("tcp::0");
    let dir = tempfile::tempdir().unwrap();
    let text = format!("unix:{}/a.sock", dir.path().display());
    let mut unix_listener = listen(&text);
    let full = full_queue();
    let full_address = address(&format!("tcp:{}", full.0.local_addr().unwrap()));
    let mut command = connect(&address("exec:sleep 1000"), &options, &stop()).unwrap();
    let mut printer = listen("exec:sleep 1000").accept(&options, &stop()).unwrap();
    let (unread, unread_far) = tcp_sockets(Some(64 << 10), Some(64 << 10));
    let mut unread = StreamChannel::from_fd(unread, "unread", &options).unwrap();
    cut_off(&unread_far);
    send(&mut unread, b"never acknowledged").unwrap();

    type Wait<'a> = Box<dyn FnOnce(&Stop) -> Result<(), OpenError> + Send + 'a>;
    let waits: Vec<(&str, Wait<'_>)> = vec![
        ("send to tcp", Box::new(no_room("tcp"))),
        ("send to unix", Box::new(no_room("unix"))),
        ("recv", Box::new(|stop| Ok(waiting.recv(&mut [RecvPart::Own(&mut [0])], stop).map(drop)?))),
        ("accept", Box::new(|stop| listener.accept(&options, stop).map(drop))),
        ("accept of unix", Box::new(|stop| unix_listener.accept(&options, stop).map(drop))),
        ("connect", Box::new(|stop| connect(&full_address, &options, stop).map(drop))),
        ("end of a command", Box::new(|stop| Ok(command.finish(stop)?))),
        (
            "output of a command",
            Box::new(|stop| Ok(printer.recv(&mut [RecvPart::Own(&mut [0])], stop).map(drop)?)),
        ),
        ("last acknowledgement", Box::new(|stop| Ok(unread.finish(stop)?))),
    ];
    for (name, wait) in waits {
        let cancel = CancelToken::default();
        let stop = Stop::on(&cancel);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(move || (wait(&stop), Instant::now()));
            std::thread::sleep(Duration::from_millis(150));
            assert!(!waiter.is_finished(), "{name}: did not wait");
            let asked = Instant::now();
            cancel.cancel();
            let (result, ended) = waiter.join().unwrap();
            let took = ended - asked;
            let stopped = matches!(
                result,
                Err(OpenError::Channel(ChannelError::Stopped { reason: StopReason::Cancelled, .. }))
            );
            assert!(stopped, "{name}: {result:?}");
            assert!(took < Duration::from_millis(100), "{name}: {took:?}");
        });
    }
}

/// A listener that answers no further connection, and the connections that fill its queue.
fn full_queue() -> (TcpListener, Vec<socket2::Socket>) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let local = socket.local_addr().unwrap();
    let fill = |_| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let _ = socket.connect(&local);
        socket
    };
    (socket.into(), (0..4).map(fill).collect())
}

#[test]
fn an_unanswered_connect_ends_with_the_dead_peer_time_and_by_deadline() {
    let full = full_queue();
    let target = address(&format!("tcp:{}", full.0.local_addr().unwrap()));
    let options = StreamOptions { dead_peer: Duration::from_millis(200), ..StreamOptions::default() };
    let error = connect(&target, &options, &stop()).unwrap_err();
    assert!(matches!(error, OpenError::Channel(ChannelError::Silent { .. })), "{error}");
    let error = connect(&target, &options, &stop().within(Duration::from_millis(20))).unwrap_err();
    let deadline = ChannelError::Stopped { reason: StopReason::Deadline, doing: "connecting" };
    assert_eq!(error.to_string(), deadline.to_string());
}

#[test]
fn a_peer_that_dies_amid_a_write_is_an_error_on_each_kind() {
    for text in ["tcp::0", "unix"] {
        let (mut near, mut far) = slow_pair(text, 10_000);
        let killer = std::thread::spawn(move || {
            recv(&mut far, &mut [0; 1000]).unwrap();
            drop(far);
        });
        let error = send(&mut near, &pattern(64 << 20)).unwrap_err();
        assert!(matches!(error, ChannelError::Closed { .. } | ChannelError::Io { .. }), "{text}: {error}");
        killer.join().unwrap();
    }
    let (mut near, mut far) = pair("tcp::0", &StreamOptions::default());
    near.breaker().reset();
    let error = recv(&mut far, &mut [0]).unwrap_err();
    assert!(error.to_string().contains("reset"), "{error}");
    assert!(send(&mut near, b"x").is_err());
}

#[test]
fn both_halves_end_when_the_connection_is_broken_from_elsewhere() {
    let (near, mut far) = pair("tcp::0", &StreamOptions::default());
    let breaker = near.breaker();
    let (mut source, mut sink) = near.split();
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || recv(&mut source, &mut [0; 10]));
        let writer = scope.spawn(move || send(&mut sink, &pattern(64 << 20)));
        std::thread::sleep(Duration::from_millis(50));
        breaker.close();
        assert!(matches!(reader.join().unwrap(), Ok(0)));
        assert!(matches!(writer.join().unwrap(), Err(ChannelError::Closed { .. })));
    });
    assert!(read_all(&mut far).is_ok(), "what was sent still arrives, then the end");
}

#[test]
fn only_a_socket_has_a_return_path_and_it_waits_as_long_as_the_peer_lives() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let pipe = StreamChannel::from_fd(reader.into(), "a pipe", &impatient(20)).unwrap();
    assert!(pipe.with_return_path().1.is_none());
    let command = connect(&address("exec:cat > /dev/null"), &impatient(20), &stop()).unwrap();
    assert!(command.with_return_path().1.is_none());
    let (near, _far) = pair("tcp::0", &impatient(20));
    let (mut stream, back) = near.with_return_path();
    let quiet =
        back.unwrap().recv(&mut [RecvPart::Own(&mut [0])], &stop().within(Duration::from_millis(300)));
    assert!(matches!(quiet, Err(ChannelError::Stopped { reason: StopReason::Deadline, .. })), "{quiet:?}");
    assert!(matches!(recv(&mut stream, &mut [0]), Err(ChannelError::Stalled { .. })));
}

#[test]
fn what_is_no_byte_stream_is_refused() {
    let datagrams = std::os::unix::net::UnixDatagram::unbound().unwrap();
    let directory = std::fs::File::open("/").unwrap();
    for fd in [OwnedFd::from(datagrams), OwnedFd::from(directory)] {
        let error = StreamChannel::from_fd(fd, "x", &StreamOptions::default()).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    }
}

#[test]
fn a_pipe_handed_in_keeps_its_flags_for_its_next_user() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let kept = writer.try_clone().unwrap();
    let mut channel = StreamChannel::from_fd(writer.into(), "a pipe", &impatient(100)).unwrap();
    send(&mut channel, b"through").unwrap();
    let full = send(&mut channel, &pattern(1 << 20)).unwrap_err();
    assert!(matches!(full, ChannelError::Stalled { .. }), "{full}");
    drop(channel);
    let flags = rustix::fs::fcntl_getfl(kept.as_fd()).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
    let mut first = [0; 7];
    reader.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"through");
    let mut kept = kept;
    drop(reader);
    assert!(kept.write(b"x").is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the sizes of the parts and of the kernel's buffer, the bytes arrive in order and once.
    #[test]
    fn odd_parts_arrive_as_their_concatenation(
        sizes in proptest::collection::vec(prop_oneof![3 => 0usize..40, 2 => 4000usize..4100, 1 => 60_000usize..140_000], 0..200),
        many in 0usize..2500,
        room in 1usize..60_000,
        read in 1usize..100_000,
    ) {
        let (near, far) = UnixStream::pair().unwrap();
        socket2::SockRef::from(&near).set_send_buffer_size(room).unwrap();
        let take = |fd: OwnedFd| StreamChannel::from_fd(fd, "pair", &StreamOptions::default()).unwrap();
        let (mut near, mut far) = (take(near.into()), take(far.into()));
        let total: usize = sizes.iter().sum::<usize>() + many * 3;
        let bytes = pattern(total);
        let reader = std::thread::spawn(move || {
            let mut got: Vec<u8> = Vec::new();
            let (mut one, mut two) = (vec![0; read], vec![0; 17]);
            loop {
                let count = far.recv(&mut [RecvPart::Own(&mut one), RecvPart::Own(&mut two)], &stop()).unwrap();
                got.extend(one.iter().chain(&two).take(count));
                if count == 0 {
                    return got;
                }
            }
        });
        let mut rest = &bytes[..];
        let mut parts = Vec::new();
        for size in sizes.iter().copied().chain(std::iter::repeat_n(3, many)) {
            let (part, later) = rest.split_at(size);
            parts.push(SendPart::Own(part));
            rest = later;
        }
        near.send(&parts, &stop()).unwrap();
        prop_assert_eq!(near.position(), total as u64);
        near.finish(&stop()).unwrap();
        drop(near);
        prop_assert!(reader.join().unwrap() == bytes);
    }
}
