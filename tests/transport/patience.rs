//! An end waits for a slow peer as long as bytes move; it does not wait for one that is silent, hangs or is dead.

use std::time::Instant;

use ramwire::transport::{Fault, FaultKind, Faulty, ReadHints};

use super::*;

#[test]
fn a_stream_that_moves_slowly_never_counts_as_stalled() {
    std::thread::scope(|scope| {
        for text in ["tcp", "unix"] {
            scope.spawn(move || slow_but_moving(text, slow_pair(text, 800)));
        }
        // A large send buffer: poll(2) reports writable only when a third of it is free, far later than bytes move.
        scope.spawn(move || {
            let (near, far) = tcp_sockets(Some(64 << 10), None);
            let take = |fd| StreamChannel::from_fd(fd, "the other end", &impatient(800)).unwrap();
            slow_but_moving("tcp with a large buffer", (take(near), take(far)));
        });
    });
}

fn silence(may_be_silent: bool) -> ReadHints {
    let mut hints = ReadHints::default();
    hints.may_be_silent = may_be_silent;
    hints
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

#[test]
fn a_half_open_peer_is_noticed_on_each_side_within_the_stall_time() {
    for text in ["tcp::0", "unix"] {
        let (mut near, mut far) = slow_pair(text, 300);
        let begun = Instant::now();
        // The far end does not read what near sends, and near does not send what far waits for.
        let error = send(&mut near, &pattern(20 << 20)).unwrap_err();
        let took = begun.elapsed();
        assert!(matches!(error, ChannelError::Stalled { .. }), "{text}: {error}");
        assert!(error.to_string().contains("raise the stall timeout"));
        assert!((Duration::from_millis(300)..SOON).contains(&took), "{text}: {took:?}");
        drain(&mut far, near.position());
        let begun = Instant::now();
        assert!(matches!(recv(&mut far, &mut [0]), Err(ChannelError::Stalled { .. })));
        assert!((Duration::from_millis(300)..SOON).contains(&begun.elapsed()), "{text}");
    }
}

/// Takes all that was sent.
fn drain(channel: &mut StreamChannel, sent: u64) {
    let (mut got, mut room) = (0, vec![0; 1 << 16]);
    while got < sent {
        got += recv(channel, &mut room).unwrap() as u64;
    }
}

#[test]
fn a_hanging_reader_is_noticed_by_the_sender() {
    let (mut near, mut far) = pair("tcp::0", &impatient(300));
    // It waits for the first byte as long as the sender takes to produce it.
    far.set_stall(None);
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

#[test]
fn a_dead_host_is_noticed_by_a_sender_and_by_a_waiting_receiver() {
    let mut options = StreamOptions::default();
    options.stall = None;
    options.dead_peer = 2 * SECOND;
    std::thread::scope(|scope| {
        // Few and many bytes in flight, a full window, and only keepalive.
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
                assert!((SECOND..SOON).contains(&took), "{amount}: {took:?}");
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
            assert!((SECOND..SOON).contains(&begun.elapsed()));
        });
    });
}

#[test]
fn a_host_without_room_that_answers_is_not_dead() {
    let mut options = StreamOptions::default();
    options.stall = Some(20 * SECOND);
    options.dead_peer = SECOND;
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

/// After the guest is handed over only the caller's time limit counts, whatever the network does meanwhile.
#[test]
fn an_outage_that_ends_in_time_is_waited_out_where_only_the_callers_time_counts() {
    let mut options = StreamOptions::default();
    options.stall = Some(SECOND);
    options.dead_peer = SECOND;
    std::thread::scope(|scope| {
        // Bytes in flight, and only keepalive.
        for amount in [10, 0] {
            scope.spawn(move || {
                let (near, far) = tcp_sockets(None, None);
                let filtered = far.try_clone().unwrap();
                let mut near = StreamChannel::from_fd(near, "the lost one", &options).unwrap();
                let mut far =
                    StreamChannel::from_fd(far, "the other one", &StreamOptions::default()).unwrap();
                ByteSink::tolerate_outage(&mut near, 60 * SECOND);
                cut_off(&filtered);
                send(&mut near, &pattern(amount)).unwrap();
                let back = std::thread::spawn(move || {
                    // A kernel with a timeout of one second gives up after six.
                    std::thread::sleep(8 * SECOND);
                    socket2::SockRef::from(&filtered).detach_filter().unwrap();
                    send(&mut far, b"here").unwrap();
                    far
                });
                let mut room = [0; 4];
                assert_eq!(recv(&mut near, &mut room).unwrap(), 4, "{amount}");
                drop(back.join().unwrap());
            });
        }
    });
}

#[test]
fn a_peer_that_may_be_silent_is_waited_for_while_its_connection_answers() {
    let mut options = StreamOptions::default();
    options.stall = Some(SECOND);
    options.dead_peer = SECOND;
    std::thread::scope(|scope| {
        for text in ["tcp::0", "unix"] {
            scope.spawn(move || {
                let (mut near, mut far) = slow_pair(text, 300);
                near.set_hints(silence(true));
                let late = std::thread::spawn(move || {
                    std::thread::sleep(2 * SECOND);
                    send(&mut far, b"x").unwrap();
                    far
                });
                assert_eq!(recv(&mut near, &mut [0]).unwrap(), 1, "{text}");
                let _far = late.join().unwrap();
                // In the middle of an item it may not be silent.
                near.set_hints(silence(false));
                let error = recv(&mut near, &mut [0]).unwrap_err();
                assert!(matches!(error, ChannelError::Stalled { .. }), "{text}: {error}");
            });
        }
        scope.spawn(move || {
            let (near, far) = tcp_sockets(None, None);
            let mut near = StreamChannel::from_fd(near, "the dead one", &options).unwrap();
            near.set_hints(silence(true));
            cut_off(&far);
            let error = recv(&mut near, &mut [0]).unwrap_err();
            assert!(matches!(error, ChannelError::Silent { .. }), "{error}");
        });
    });
}
