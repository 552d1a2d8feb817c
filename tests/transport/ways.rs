//! Bytes by each kind of address, and addresses that can't be opened.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use proptest::prelude::*;
use ramwire::error::Chain;
use ramwire::transport::OpenError;

use super::*;

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
        assert!(warning.contains("unencrypted") && warning.contains("who may connect"), "{warning}");
    }
}

#[test]
fn a_host_that_is_not_allowed_is_closed_and_the_next_one_served() {
    let allow: AllowList = "127.0.0.2".parse().unwrap();
    let mut listener = Listener::bind(&address("tcp:127.0.0.1:0"), allow, &stop()).unwrap();
    let mut refused = connect(listener.address(), &StreamOptions::default(), &stop()).unwrap();
    let (_, port) = listener.address().host_and_port().unwrap();
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
        let error = Chain(&error).to_string();
        assert!(error.contains(remedy), "{text}: {error}");
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
        let error = Chain(&error).to_string();
        assert!(error.contains(words), "{text}: {error}");
    }
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let refused =
        connect(&address(&format!("tcp:{unused}")), &StreamOptions::default(), &stop()).unwrap_err();
    assert!(Chain(&refused).to_string().contains("refused"), "{refused}");
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
    let error = Chain(&out.finish(&stop()).unwrap_err()).to_string();
    assert!(error.contains("exit 3") && error.contains("exit status: 3"), "{error}");
    let mut back = listen("exec:echo half; kill -9 $$").accept(&options, &stop()).unwrap();
    let error = read_all(&mut back).unwrap_err();
    assert!(matches!(&error, ChannelError::CommandFailed { status, .. } if status.contains("9")), "{error}");
    let mut back = listen("exec:no-such-command 2>/dev/null").accept(&options, &stop()).unwrap();
    assert!(Chain(&read_all(&mut back).unwrap_err()).to_string().contains("command not found"));
    // One that fails before it has read everything is named with its status by the write that it fails.
    let mut out = connect(&address("exec:exit 7"), &options, &stop()).unwrap();
    let error = send(&mut out, &pattern(10_000_000)).unwrap_err();
    assert!(matches!(&error, ChannelError::CommandFailed { status, .. } if status.contains("7")), "{error}");
    // If a command ends early, the write fails with an error, not a signal.
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

    /// For any sizes of the parts and of the kernel's buffer, the bytes arrive in order and once.
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
