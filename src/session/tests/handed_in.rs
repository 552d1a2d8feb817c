//! Page channels over sockets that the VMM connected.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::{Machine, bytes, guest};
use crate::engine::{Ending, Outcome};
use crate::session::*;
use crate::stream::qemu::file::Configuration;
use crate::sys::Stop;
use crate::transport::{
    ChannelOptions, ConnectionOptions, DestinationConnection, OpenError, PageSending, SourceConnection,
    StreamChannel, StreamOptions,
};
use crate::units::BlockIndex;

fn channel(socket: UnixStream) -> StreamChannel {
    StreamChannel::from_fd(socket.into(), "peer", &StreamOptions::default()).unwrap()
}

/// Connected sockets, the main one first: here and there.
fn sockets(count: usize) -> (Vec<StreamChannel>, Vec<StreamChannel>) {
    (0..count).map(|_| UnixStream::pair().unwrap()).map(|(near, far)| (channel(near), channel(far))).unzip()
}

#[test]
fn pages_travel_on_channels_that_were_handed_in_whatever_their_order() {
    for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
        let (mut near, far) = sockets(3);
        let mut far: Vec<_> = far.into_iter().map(Some).collect();
        let far = order.map(|at| far[at].take().unwrap()).into_iter().collect();
        let (from, to) = (guest(&[300, 7]), guest(&[300, 7]));
        for page in 0..300 {
            let span = from.region(BlockIndex(0)).unwrap().span(page * 4096, 4096).unwrap();
            span.copy_from(&[page as u8 | 1; 4096]);
        }
        let main = near.remove(0);
        let connection =
            SourceConnection::over_channels(main, near, from.clone(), &ChannelOptions::default()).unwrap();
        let here = Machine::running(b"devices");
        let control = Box::new(here.clone());
        let source = SourceGuest { memory: from.clone(), dirty: Vec::new(), control };
        let mut settings =
            SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
        settings.guest_is_paused = true;
        settings.verify = Verify::Full;
        let sending = SourceSession::new(source, connection, settings).spawn().unwrap();

        let stop = Stop::never().within(Duration::from_secs(60));
        let connection =
            DestinationConnection::over_channels(far, &ConnectionOptions::default(), &stop).unwrap();
        let there = Machine::default();
        let arriving = DestinationGuest { memory: Box::new(to.clone()), control: Box::new(there.clone()) };
        let arrived = DestinationSession::new(arriving, connection, DestinationSettings::default()).run();
        let sent = sending.wait().unwrap();
        assert_eq!(
            (sent.outcome, arrived.ending),
            (Outcome::Completed, Ending::Running),
            "{order:?}: {:?} {:?}",
            sent.error,
            arrived.error
        );
        assert!(arrived.verified && there.runs() && !here.runs());
        assert!(sent.statistics.multifd_bytes > 300 * 4096, "{order:?}: {}", sent.statistics.multifd_bytes);
        assert!((0..2).all(|block| bytes(&from, block) == bytes(&to, block)), "{order:?}");
    }
}

#[test]
fn connections_that_are_not_those_of_a_source_are_refused() {
    let stop = Stop::never().within(Duration::from_secs(60));
    let mut options = ConnectionOptions::default();
    options.stream.dead_peer = Duration::from_secs(1);
    let main = b"QEVM\0\0\0\x03";
    let page = b"\x11\x22\x33\x44\0\0\0\x01";
    let cases: [(&str, &[&[u8]]); 5] = [
        ("0 of them are for pages", &[main]),
        ("none of them is the main one", &[page, page]),
        ("two connections begin as main channels do", &[main, main]),
        ("as no channel does", &[main, b"GET / HTTP/1.1"]),
        ("closed the connection", &[main, b""]),
    ];
    let mut open = Vec::new();
    for (due, begin) in cases {
        let far = begin.iter().map(|first| {
            let (mut near, far) = UnixStream::pair().unwrap();
            near.write_all(first).unwrap();
            // The one that sends nothing closes.
            open.extend((!first.is_empty()).then_some(near));
            channel(far)
        });
        let refused = DestinationConnection::over_channels(far.collect(), &options, &stop).err().unwrap();
        assert!(refused.to_string().contains(due), "{due}: {refused}");
    }
}

#[test]
fn a_source_without_page_channels_or_with_a_sending_it_cant_have_is_refused() {
    let memory = guest(&[4]);
    let source = |pages: usize, options: &ChannelOptions| {
        let (mut near, _far) = sockets(pages + 1);
        let main = near.remove(0);
        SourceConnection::over_channels(main, near, memory.clone(), options).err().unwrap()
    };
    let none = source(0, &ChannelOptions::default());
    assert!(matches!(none, OpenError::Channels { .. }), "{none}");
    let compressed = ChannelOptions {
        compression: crate::stream::qemu::page_compression::PageCompression::Zlib(1),
        sending: PageSending::Splice,
        ..ChannelOptions::default()
    };
    let refused = source(1, &compressed);
    assert!(matches!(refused, OpenError::NoSuchSending { .. }), "{refused}");
}
