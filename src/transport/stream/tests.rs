//! Waits for more than one byte: they end by bytes that arrive, by the end, by a stop, and by time.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::*;
use crate::sys::{
    CancelToken,
    blocked::{own_thread, until_blocked},
};
use crate::sys::{RecvPart, SendPart, Stop, StopReason};
use crate::transport::{ByteSink as _, ByteSource, ChannelError, ReadHints};
use rustix::event::PollFlags;
use std::os::fd::{AsFd, OwnedFd};

/// Far more than any of these waits takes, far less than the stall time.
const SOON: Duration = Duration::from_secs(10);
const DUE: usize = 300 << 10;
const MARK: usize = 1 << 20;

fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

fn channel(fd: impl Into<OwnedFd>, stall: Duration) -> StreamChannel {
    let options = StreamOptions { stall: Some(stall), ..StreamOptions::default() };
    StreamChannel::from_fd(fd.into(), "the peer", &options).unwrap()
}

fn soon() -> Stop {
    Stop::on(&CancelToken::default()).within(SOON)
}

/// The result of a read that waits for `DUE` bytes and has room for everything that the test sends.
fn take(channel: &mut StreamChannel, due: usize) -> Result<usize, ChannelError> {
    channel.recv_due(&mut [RecvPart::Own(&mut vec![0; 2 * MARK])], due, &soon())
}

fn bulk(bulk: bool) -> ReadHints {
    ReadHints { bulk, ..ReadHints::default() }
}

fn take_all(channel: &mut StreamChannel, mut due: usize) {
    while due > 0 {
        due -= take(channel, due).unwrap();
    }
}

#[test]
fn a_peer_that_stops_a_byte_short_of_what_is_due_is_read_soon() {
    let (mut near, far) = tcp();
    let mut far = channel(far, 60 * SOON);
    near.write_all(&[1]).unwrap();
    assert_eq!(take(&mut far, DUE).unwrap(), 1);
    near.write_all(&vec![1; DUE - 2]).unwrap();
    let first = take(&mut far, DUE - 2).unwrap();
    assert!(far.low_water.mark() > 1, "the wait was for a byte");
    take_all(&mut far, DUE - 2 - first);
    near.write_all(&[1]).unwrap();
    assert_eq!(take(&mut far, 1).unwrap(), 1);
    // The socket is empty: the wait before this read is again for its first byte.
    let reader = own_thread();
    let writer = std::thread::spawn(move || {
        until_blocked(reader);
        near.write_all(&[1]).unwrap();
        near
    });
    assert_eq!(take(&mut far, 1).unwrap(), 1);
    assert_eq!(far.low_water.mark(), 1);
    drop(writer.join().unwrap());
    assert_eq!(take(&mut far, DUE).unwrap(), 0, "the end");
}

#[test]
fn a_burst_that_ends_a_byte_short_of_a_mark_goes_on_within_a_moment() {
    let (mut near, far) = tcp();
    let mut far = channel(far, 60 * SOON);
    far.set_hints(bulk(true));
    // A data rate at which it waits for any mark.
    far.low_water.took(1, 2);
    assert!(!far.low_water.waits_briefly(far.end.fd.as_fd()));
    far.low_water.took(1 << 40, 1 << 41);
    assert!(far.low_water.waits_briefly(far.end.fd.as_fd()));
    assert_eq!(far.low_water.mark(), MARK);
    far.low_water.took(1 << 40, 1 << 41);
    let writer = std::thread::spawn(move || {
        near.write_all(&vec![1; MARK - 1]).unwrap();
        near
    });
    let mut left = MARK - 1;
    let begun = Instant::now();
    left -= take(&mut far, 1).unwrap();
    assert!(begun.elapsed() < SOON);
    while left > 0 {
        left -= take(&mut far, 1).unwrap();
    }
    let mut near = writer.join().unwrap();
    far.set_hints(bulk(false));
    let reader = own_thread();
    let writer = std::thread::spawn(move || {
        until_blocked(reader);
        near.write_all(&[1]).unwrap();
    });
    assert_eq!(take(&mut far, 1).unwrap(), 1);
    assert_eq!(far.low_water.mark(), 1, "an answer is not waited for in bulk");
    writer.join().unwrap();
}

#[test]
fn bytes_that_trickle_in_below_a_mark_never_count_as_stalled() {
    let (mut near, far) = tcp();
    let mut far = channel(far, Duration::from_millis(600));
    let writer = std::thread::spawn(move || {
        for _ in 0..30 {
            near.write_all(&[1]).unwrap();
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let mut got = 0;
    loop {
        match take(&mut far, DUE).unwrap() {
            0 => break,
            count => got += count,
        }
    }
    assert_eq!(got, 30);
    writer.join().unwrap();
}

#[test]
fn a_silent_peer_is_given_up_below_a_mark_too() {
    let (mut near, far) = tcp();
    let mut far = channel(far, Duration::from_millis(300));
    near.write_all(&[1]).unwrap();
    assert_eq!(take(&mut far, DUE).unwrap(), 1);
    let begun = Instant::now();
    assert!(matches!(take(&mut far, DUE), Err(ChannelError::Stalled { .. })));
    assert!((Duration::from_millis(300)..SOON).contains(&begun.elapsed()));
}

#[test]
fn a_deadline_takes_what_is_there_below_a_mark() {
    let (mut near, far) = tcp();
    let mut far = channel(far, 60 * SOON);
    near.write_all(&[1; 8]).unwrap();
    let mut room = vec![0; DUE];
    let mut take = |due| {
        let stop = Stop::on(&CancelToken::default()).within(Duration::from_millis(20));
        far.recv_due(&mut [RecvPart::Own(&mut room)], due, &stop)
    };
    assert_eq!(take(DUE).unwrap(), 8);
    near.write_all(&[1; 9]).unwrap();
    assert_eq!(take(DUE).unwrap(), 9);
    assert!(matches!(take(DUE), Err(ChannelError::Stopped { reason: StopReason::Deadline, .. })));
}

#[test]
fn a_close_and_a_cancel_end_a_wait_for_much() {
    let (mut near, far) = tcp();
    let mut far = channel(far, 60 * SOON);
    near.write_all(&[1; 5]).unwrap();
    take_all(&mut far, 5);
    assert!(far.low_water.before_wait(far.end.fd.as_fd(), DUE));
    let reader = own_thread();
    let closer = std::thread::spawn(move || {
        until_blocked(reader);
        near.write_all(&[1; 3]).unwrap();
    });
    assert_eq!(take(&mut far, DUE).unwrap(), 3);
    assert_eq!(take(&mut far, DUE).unwrap(), 0);
    closer.join().unwrap();

    let (_near, far) = tcp();
    let mut far = channel(far, 60 * SOON);
    let cancel = CancelToken::default();
    let stop = Stop::on(&cancel);
    let (tell, told) = std::sync::mpsc::channel();
    let waiter = std::thread::spawn(move || {
        tell.send(own_thread()).unwrap();
        far.recv_due(&mut [RecvPart::Own(&mut vec![0; DUE])], DUE, &stop)
    });
    until_blocked(told.recv().unwrap());
    cancel.cancel();
    let ended = waiter.join().unwrap();
    assert!(matches!(ended, Err(ChannelError::Stopped { reason: StopReason::Cancelled, .. })));
}

#[test]
fn the_socket_is_left_as_it_was_found() {
    let (mut near, far) = tcp();
    let mut kept = far.try_clone().unwrap();
    let mut far = channel(far, 60 * SOON);
    assert!(far.low_water.before_wait(far.end.fd.as_fd(), DUE));
    drop(far);
    near.write_all(&[7]).unwrap();
    let ended = soon().wait(kept.as_fd(), PollFlags::IN).unwrap();
    assert_eq!(ended, None, "nobody waits for more than a byte any more");
    let mut byte = [0];
    kept.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [7]);
}

#[test]
fn a_unix_socket_waits_for_its_first_byte() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut far = channel(far, 60 * SOON);
    far.set_hints(bulk(true));
    for _ in 0..3 {
        near.write_all(&[1; 10]).unwrap();
        assert_eq!(take(&mut far, DUE).unwrap(), 10);
        assert_eq!(far.low_water.mark(), 1);
    }
}

/// A migration may be refused after the file was opened.
#[test]
fn a_file_keeps_what_it_holds_until_the_first_byte_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    std::fs::write(&path, "another guest").unwrap();
    let address: crate::transport::Address = format!("file:{}", path.display()).parse().unwrap();
    let stop = Stop::never();
    let open = || crate::transport::connect(&address, &StreamOptions::default(), &stop).unwrap();
    drop(open());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "another guest");
    let mut channel = open();
    channel.send(&[SendPart::Own(b"new")], &stop).unwrap();
    channel.send(&[SendPart::Own(b"er")], &stop).unwrap();
    channel.finish(&stop).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "newer");
}
