//! Every wait ends: by a cancel, by a deadline, by the peer's end.

use std::sync::mpsc;
use std::time::Instant;

use ramwire::sys::StopReason;
use ramwire::transport::OpenError;

use super::blocked::{own_thread, until_blocked};
use super::*;

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
        // The bytes pass through the kernel.
        let begun = Instant::now();
        let got = loop {
            match far.recv(&mut [RecvPart::Own(&mut room)], &now) {
                Err(ChannelError::Stopped { .. }) => assert!(begun.elapsed() < SOON, "{text}: nothing comes"),
                got => break got.unwrap(),
            }
        };
        assert_eq!(got, 1);
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
            let (tell, told) = mpsc::channel();
            let waiter = scope.spawn(move || {
                tell.send(own_thread()).unwrap();
                (wait(&stop), Instant::now())
            });
            until_blocked(told.recv().unwrap());
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
            assert!(took < SOON, "{name}: {took:?}");
        });
    }
}

#[test]
fn an_unanswered_connect_ends_with_the_dead_peer_time_and_by_deadline() {
    let full = full_queue();
    let target = address(&format!("tcp:{}", full.0.local_addr().unwrap()));
    let mut options = StreamOptions::default();
    options.dead_peer = Duration::from_millis(200);
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
    assert!(ramwire::error::Chain(&error).to_string().contains("reset"), "{error}");
    assert!(send(&mut near, b"x").is_err());
}

#[test]
fn both_halves_end_when_the_connection_is_broken_from_elsewhere() {
    let (near, mut far) = pair("tcp::0", &StreamOptions::default());
    let breaker = near.breaker();
    let (mut source, mut sink) = near.split();
    std::thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let also = tell.clone();
        let reader = scope.spawn(move || {
            tell.send(own_thread()).unwrap();
            recv(&mut source, &mut [0; 10])
        });
        let writer = scope.spawn(move || {
            also.send(own_thread()).unwrap();
            send(&mut sink, &pattern(64 << 20))
        });
        told.iter().take(2).for_each(until_blocked);
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
