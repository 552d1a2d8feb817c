//! A relay from a QEMU that switches to postcopy to a QEMU, both played by the test.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::doubt_tests::Noting;
use crate::engine::{Outcome, RelayEnding};
use crate::guest::GuestMemory;
use crate::observe::SharedStatistics;
use crate::session::tests::plain;
use crate::session::tests::qemu_peer::{encoded, page_of_block0, page_of_postcopy, start_with};
use crate::session::{
    DestinationConnection, DestinationSettings, Peer, Relay, RelayControl, RelayReport, SourceConnection,
    SourceSettings,
};
use crate::stream::qemu::command::{Command, encode_discards};
use crate::stream::qemu::file::Configuration;
use crate::stream::qemu::package::encode_package;
use crate::stream::qemu::ram;
use crate::stream::qemu::return_path::Message;
use crate::stream::qemu::section::{encode_end, encode_eof, encode_footer};
use crate::sys::CancelToken;
use crate::transport::InlineLink;

/// Longest wait of any kind; exceeding it is a failure.
const WAIT: Duration = Duration::from_secs(60);

struct Running {
    source: UnixStream,
    far: UnixStream,
    control: RelayControl,
    guard: Arc<Mutex<Vec<&'static str>>>,
    relay: JoinHandle<RelayReport>,
}

fn command(command: Command<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    command.encode(&mut out);
    out
}

/// The end of the section of pages, and of the stream.
fn end() -> Vec<u8> {
    let mut out = Vec::new();
    encode_end(2, &mut out);
    out.extend_from_slice(&ram::EOS_RECORD);
    encode_footer(2, &mut out);
    encode_eof(&mut out);
    out
}

/// What the source has discarded: a page that it has sent before, and two that it has not.
fn discards() -> Vec<u8> {
    let mut out = Vec::new();
    encode_discards("block0", &[(4096, 4096)], &mut out);
    encode_discards("block1", &[(0, 8192)], &mut out);
    out
}

impl Running {
    /// The source has sent a page, has discarded it, and has switched over.
    fn begin() -> Self {
        let [(source, upstream), (downstream, far)] = [(); 2].map(|()| UnixStream::pair().unwrap());
        let connect = {
            let downstream = downstream.try_clone().unwrap();
            move |memory: Arc<dyn GuestMemory>| {
                let link = Box::new(InlineLink::new(plain(&downstream), memory));
                Ok(SourceConnection::new(link, Some(plain(&downstream))))
            }
        };
        let (mut incoming, mut outgoing) =
            (DestinationSettings::default(), SourceSettings::new(Configuration::default()));
        incoming.postcopy = true;
        outgoing.peer = Some(Peer::Qemu);
        let (guard, control) = (Arc::default(), RelayControl::default());
        let relay = Relay {
            connection: DestinationConnection::of_stream(plain(&upstream), Some(plain(&upstream))),
            connect: Box::new(connect),
            incoming,
            outgoing,
            urgent_came: false,
            huge_pages: false,
            cancel: CancelToken::default(),
            control: control.clone(),
            guard: Some(Box::new(Noting(Arc::clone(&guard), true))),
            notice: Arc::new(|_| ()),
            statistics: SharedStatistics::default(),
        };
        drop((upstream, downstream));
        let relay = std::thread::spawn(move || relay.run());
        for end in [&source, &far] {
            end.set_read_timeout(Some(WAIT)).unwrap();
        }
        let advise = Command::PostcopyAdvise { host_pages: 4096, target_page: 4096 };
        let mut package = Vec::new();
        encode_package(b"devices", true, &mut package);
        let size = package.len() as u32;
        let parts = [
            start_with(&[advise]),
            page_of_block0(),
            discards(),
            command(Command::Ping(2)),
            command(Command::Packaged { size }),
            package,
            command(Command::Ping(4)),
        ];
        (&source).write_all(&parts.concat()).unwrap();
        let mut running = Self { source, far, control, guard, relay };
        running.source_is_told(&[Message::Pong(1), Message::Pong(2)]);
        running
    }

    /// The far end has the package, has discarded what is missing, and is given the guest.
    fn given() -> Self {
        let mut running = Self::begin();
        let mut end = b"devices".to_vec();
        end.extend([command(Command::Ping(3)), command(Command::Ping(0x42))].concat());
        let got = running.far_gets(&end);
        let behind = [discards(), command(Command::Ping(2))].concat();
        assert!(
            got.windows(behind.len()).any(|part| part == behind),
            "not discarded in front of the package"
        );
        assert!(running.guard.lock().unwrap().is_empty(), "held before the far end was ready");
        running.far_says(&[Message::Pong(2)]);
        let run = [command(Command::PostcopyRun), command(Command::Ping(4))].concat();
        assert_eq!(running.far_gets(&run), run);
        assert_eq!(*running.guard.lock().unwrap(), ["held"]);
        running.source_is_told(&[Message::Pong(4)]);
        running
    }

    /// The far end has taken the guest, which the source knows.
    fn taken() -> Self {
        let mut running = Self::given();
        running.far_says(&[Message::Pong(3), Message::Pong(0x42)]);
        running.source_is_told(&[Message::Pong(3), Message::Pong(0x42)]);
        running
    }

    fn far_says(&mut self, words: &[Message<'_>]) {
        words.iter().for_each(|word| self.far.write_all(&encoded(*word)).unwrap());
    }

    fn source_is_told(&mut self, words: &[Message<'_>]) {
        let expected: Vec<u8> = words.iter().flat_map(|word| encoded(*word)).collect();
        let mut told = vec![0; expected.len()];
        self.source.read_exact(&mut told).unwrap();
        assert_eq!(told, expected, "{words:?}");
    }

    fn source_sends(&mut self, bytes: &[u8]) {
        self.source.write_all(bytes).unwrap();
    }

    /// Reads what the far end receives, up to `end`.
    fn far_gets(&mut self, end: &[u8]) -> Vec<u8> {
        let (mut read, mut byte) = (Vec::new(), [0]);
        while !read.ends_with(end) {
            self.far.read_exact(&mut byte).unwrap();
            read.push(byte[0]);
        }
        read
    }

    /// What the source has received when the relay has ended, and its report.
    fn ended(mut self) -> (Vec<u8>, RelayReport) {
        let report = self.relay.join().unwrap();
        let mut told = Vec::new();
        self.source.read_to_end(&mut told).unwrap();
        assert!(report.switched && report.kept.is_none(), "what is here is older than what was discarded");
        assert_eq!(*self.guard.lock().unwrap(), ["held", "released"]);
        (told, report)
    }
}

#[test]
fn p5_what_the_relay_does_not_have_is_asked_for_and_comes_once_before_and_after_the_start() {
    let mut running = Running::given();
    // While it loads the device state.
    let request = Message::RequestPagesOf { block: "block1", start: 4096, length: 4096 };
    running.far_says(&[request, request]);
    running.source_is_told(&[request]);
    running.source_sends(&page_of_postcopy("block1", 4096, 9));
    running.far_gets(&[9; 4096]);
    running.far_says(&[Message::Pong(3), Message::Pong(0x42)]);
    running.source_is_told(&[Message::Pong(3), Message::Pong(0x42)]);
    // The guest runs. What was sent before the discard is not here.
    let request = Message::RequestPagesOf { block: "block0", start: 4096, length: 4096 };
    running.far_says(&[request, Message::RequestPages { start: 0, length: 4096 }]);
    running.source_is_told(&[request]);
    running.source_sends(&page_of_postcopy("block1", 0, 8));
    running.far_gets(&[8; 4096]);
    running.source_sends(&page_of_postcopy("block0", 4096, 6));
    running.source_sends(&end());
    let last = running.far_gets(&end());
    let pages = |byte: u8| last.windows(4096).filter(|part| **part == [byte; 4096]).count();
    assert_eq!([7, 6, 8, 9].map(pages), [0, 1, 0, 0]);
    running.far_says(&[Message::Shut { status: 0 }]);
    let (told, report) = running.ended();
    assert_eq!(told, encoded(Message::Shut { status: 0 }));
    assert_eq!((report.ending, report.sent.unwrap().outcome), (RelayEnding::Running, Outcome::Completed));
}

#[test]
fn p8_a_far_end_that_is_lost_before_it_was_given_the_guest_leaves_it_at_the_source() {
    let mut running = Running::begin();
    running.far_gets(b"devices");
    running.far.shutdown(Shutdown::Both).unwrap();
    let report = running.relay.join().unwrap();
    assert_eq!(report.ending, RelayEnding::Failed);
    assert!(report.switched && report.kept.is_none());
    let mut told = Vec::new();
    running.source.read_to_end(&mut told).unwrap();
    assert_eq!(told, [encoded(Message::Shut { status: 1 })].concat());
    assert!(!running.guard.lock().unwrap().contains(&"held"));
}

#[test]
fn p21_a_far_end_that_could_not_load_the_guest_gives_it_back() {
    let mut running = Running::given();
    running.far_says(&[Message::Shut { status: 1 }]);
    let (told, report) = running.ended();
    assert_eq!((told, report.ending), (encoded(Message::Shut { status: 1 }), RelayEnding::Failed));
}

/// Whatever the source sends, and however long the doubt lasts: it is told nothing, and its connection stays.
#[test]
fn while_it_is_not_known_who_has_the_guest_nothing_is_told_to_the_source() {
    let mut running = Running::given();
    running.far.shutdown(Shutdown::Both).unwrap();
    let deadline = std::time::Instant::now() + WAIT;
    while !running.control.is_in_doubt() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
    running.source_sends(&page_of_postcopy("block1", 4096, 9));
    running.source_sends(b"this is no stream");
    running.source.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let silence = running.source.read(&mut [0]).unwrap_err();
    assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock);
    assert!(running.control.is_in_doubt());
    assert!(running.control.far_end_is_dead());
    running.source.set_read_timeout(Some(WAIT)).unwrap();
    let (told, report) = running.ended();
    assert_eq!((told, report.ending), (encoded(Message::Shut { status: 1 }), RelayEnding::Failed));
}

/// From the far end's answer on the guest is there: a loss on either side ends both connections without a report.
#[test]
fn a_connection_that_is_lost_after_the_guest_was_taken_leaves_both_ends_as_they_are() {
    for lost in ["far end", "source", "stream"] {
        let mut running = Running::taken();
        match lost {
            "far end" => running.far.shutdown(Shutdown::Both).unwrap(),
            "source" => running.source.shutdown(Shutdown::Write).unwrap(),
            _ => running.source_sends(b"this is no stream"),
        }
        let far = running.far.try_clone().unwrap();
        let (told, report) = running.ended();
        assert_eq!((told, report.ending), (Vec::new(), RelayEnding::Incomplete), "{lost}");
        assert_eq!(report.sent.unwrap().outcome, Outcome::Incomplete, "{lost}");
        let mut rest = Vec::new();
        (&far).read_to_end(&mut rest).unwrap();
        assert!(!rest.ends_with(&end()), "{lost}: the far end takes it for whole");
    }
}
