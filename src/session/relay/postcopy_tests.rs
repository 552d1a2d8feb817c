//! A relay from a QEMU that switches to postcopy to a QEMU, both played by the test.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::doubt_tests::Noting;
use crate::engine::{Ending, Outcome, RelayEnding};
use crate::guest::GuestMemory;
use crate::observe::SharedStatistics;
use crate::session::tests::plain;
use crate::session::tests::qemu_peer::{encoded, page_of_block0, page_of_postcopy, start_with};
use crate::session::{
    DestinationConnection, DestinationSettings, Notice, Peer, Relay, RelayControl, RelayReport,
    SourceConnection, SourceSettings, UrgentConnections,
};
use crate::stream::qemu::command::{Command, encode_discards};
use crate::stream::qemu::file::Configuration;
use crate::stream::qemu::package::encode_package;
use crate::stream::qemu::ram;
use crate::stream::qemu::return_path::Message;
use crate::stream::qemu::section::{encode_end, encode_eof, encode_footer};
use crate::sys::{CancelToken, RecvPart, Stop};
use crate::transport::{ByteSource, ChannelError, InlineLink, ReadHints};

/// Longest wait of any kind; exceeding it is a failure.
pub(super) const WAIT: Duration = Duration::from_secs(60);

/// The connection from the source, and whether its silence is allowed.
struct Hinted(Box<dyn ByteSource>, Arc<AtomicBool>);

impl crate::transport::Sealed for Hinted {}

impl ByteSource for Hinted {
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        self.0.recv(into, stop)
    }
    fn set_hints(&mut self, hints: ReadHints) {
        self.1.store(hints.may_be_silent, Ordering::Relaxed);
    }
    fn descriptor(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.0.descriptor()
    }
}

pub(super) struct Running {
    pub(super) source: UnixStream,
    pub(super) far: UnixStream,
    control: RelayControl,
    pub(super) guard: Arc<Mutex<Vec<&'static str>>>,
    may_be_silent: Arc<AtomicBool>,
    notices: Arc<Mutex<Vec<Notice>>>,
    relay: JoinHandle<RelayReport>,
}

fn command(command: Command<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    command.encode(&mut out);
    out
}

/// The end of the section of pages, and of the stream.
pub(super) fn end() -> Vec<u8> {
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

pub(super) fn wait_until(holds: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + WAIT;
    while !holds() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Running {
    /// The source has sent a page, has discarded it, and has switched over.
    fn begin() -> Self {
        Self::begin_with(true)
    }

    /// `waits`: the source waits for the answer that its guest was taken.
    fn begin_with(waits: bool) -> Self {
        Self::begin_over(waits, None)
    }

    fn begin_over(waits: bool, urgent: Option<UrgentConnections>) -> Self {
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
        let (guard, control, may_be_silent) = (Arc::default(), RelayControl::default(), Arc::default());
        let stream = Box::new(Hinted(plain(&upstream), Arc::clone(&may_be_silent)));
        let notices = Arc::<Mutex<Vec<Notice>>>::default();
        let told = Arc::clone(&notices);
        let relay = Relay {
            connection: DestinationConnection::of_stream(stream, Some(plain(&upstream))),
            connect: Box::new(connect),
            incoming,
            outgoing,
            urgent_came: false,
            urgent,
            huge_pages: false,
            cancel: CancelToken::default(),
            control: control.clone(),
            guard: Some(Box::new(Noting(Arc::clone(&guard), true))),
            notice: Arc::new(move |notice| told.lock().unwrap().push(notice.clone())),
            statistics: SharedStatistics::default(),
        };
        drop((upstream, downstream));
        let relay = std::thread::spawn(move || relay.run());
        for end in [&source, &far] {
            end.set_read_timeout(Some(WAIT)).unwrap();
        }
        let advise = Command::PostcopyAdvise { host_pages: 4096, target_page: 4096 };
        let mut package = Vec::new();
        encode_package(b"devices", waits, &mut package);
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
        let mut running = Self { source, far, control, guard, may_be_silent, notices, relay };
        running.source_is_told(&[Message::Pong(1), Message::Pong(2)]);
        running
    }

    /// The far end has the package, has discarded what is missing, and is given the guest.
    fn given() -> Self {
        Self::given_by(true)
    }

    fn given_by(waits: bool) -> Self {
        Self::given_over(waits, None)
    }

    pub(super) fn given_over(waits: bool, urgent: Option<UrgentConnections>) -> Self {
        let held =
            if urgent.is_some() { "held after the switch, with another" } else { "held after the switch" };
        let mut running = Self::begin_over(waits, urgent);
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
        let calls = if waits { vec![held] } else { Vec::new() };
        assert_eq!(*running.guard.lock().unwrap(), calls);
        running.source_is_told(&[Message::Pong(4)]);
        running
    }

    /// The far end has taken the guest, which the source knows.
    fn taken() -> Self {
        Self::given().takes()
    }

    pub(super) fn takes(mut self) -> Self {
        self.far_says(&[Message::Pong(3), Message::Pong(0x42)]);
        self.source_is_told(&[Message::Pong(3), Message::Pong(0x42)]);
        wait_until(|| self.guard.lock().unwrap().contains(&"released"));
        self
    }

    pub(super) fn far_says(&mut self, words: &[Message<'_>]) {
        words.iter().for_each(|word| self.far.write_all(&encoded(*word)).unwrap());
    }

    pub(super) fn source_is_told(&mut self, words: &[Message<'_>]) {
        let expected: Vec<u8> = words.iter().flat_map(|word| encoded(*word)).collect();
        let mut told = vec![0; expected.len()];
        self.source.read_exact(&mut told).unwrap();
        assert_eq!(told, expected, "{words:?}");
    }

    pub(super) fn source_sends(&mut self, bytes: &[u8]) {
        self.source.write_all(bytes).unwrap();
    }

    /// Reads what the far end receives, up to `end`.
    pub(super) fn far_gets(&mut self, end: &[u8]) -> Vec<u8> {
        let (mut read, mut byte) = (Vec::new(), [0]);
        while !read.ends_with(end) {
            self.far.read_exact(&mut byte).unwrap();
            read.push(byte[0]);
        }
        read
    }

    /// What the source has received when the relay has ended, and its report.
    pub(super) fn ended(mut self) -> (Vec<u8>, RelayReport) {
        let report = self.relay.join().unwrap();
        let mut told = Vec::new();
        self.source.read_to_end(&mut told).unwrap();
        assert!(report.switched && report.kept.is_none(), "what is here is older than what was discarded");
        assert_eq!(self.guard.lock().unwrap().last(), Some(&"released"));
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
    assert!(!running.guard.lock().unwrap().iter().any(|call| call.starts_with("held")));
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
    wait_until(|| running.control.is_in_doubt());
    // An operator who ended the source would end what the far end misses.
    let warned = || matches!(running.notices.lock().unwrap()[..], [Notice::InDoubt { switched: true, .. }]);
    wait_until(warned);
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

/// The far end has all pages, and has reported it: what the source's stream holds behind its last page, a fault too, does
/// not keep that report from the source, which may take its guest back without it.
#[test]
fn a_source_whose_stream_breaks_after_its_last_page_is_told_that_the_guest_has_moved() {
    let mut running = Running::taken();
    running.source_sends(&page_of_postcopy("block0", 4096, 6));
    running.source_sends(&page_of_postcopy("block1", 0, 8));
    running.source_sends(&page_of_postcopy("block1", 4096, 9));
    running.far_gets(&end());
    running.far_says(&[Message::Shut { status: 0 }]);
    wait_until(|| running.control.ending() == RelayEnding::Running);
    running.source_sends(b"this is no stream");
    let (told, report) = running.ended();
    assert_eq!((told, report.ending), (encoded(Message::Shut { status: 0 }), RelayEnding::Running));
    assert!(report.received.error.is_none() && report.received.ending == Ending::Running);
}

/// A source that has gone may have taken its guest back: RUN is not passed on, however ready the far end is.
#[test]
fn the_guest_of_a_source_that_has_gone_is_not_given_away() {
    for waits in [true, false] {
        let mut running = Running::begin_with(waits);
        running.far_gets(&[command(Command::Ping(3)), command(Command::Ping(0x42))].concat());
        running.source.shutdown(Shutdown::Write).unwrap();
        // The relay may have ended this connection by now.
        let _ = running.far.write_all(&encoded(Message::Pong(2)));
        let far = running.far.try_clone().unwrap();
        let report = running.relay.join().unwrap();
        assert_eq!(report.ending, RelayEnding::Failed, "waits: {waits}");
        let mut rest = Vec::new();
        (&far).read_to_end(&mut rest).unwrap();
        let run = command(Command::PostcopyRun);
        assert!(!rest.windows(run.len()).any(|part| part == run), "waits: {waits}");
    }
}

/// It may have taken its guest back, and the far end may run it.
#[test]
fn a_source_that_waits_and_is_lost_after_run_is_a_doubt() {
    let running = Running::given();
    running.source.shutdown(Shutdown::Write).unwrap();
    let far = running.far.try_clone().unwrap();
    let (told, report) = running.ended();
    assert_eq!((told, report.ending), (Vec::new(), RelayEnding::InDoubt));
    let sent = report.sent.unwrap();
    assert_eq!(sent.outcome, Outcome::InDoubt);
    let why = crate::error::Chain(&sent.error.unwrap()).to_string();
    assert!(why.contains("source has closed its connection") && !why.contains("runs on there"), "{why}");
    let mut rest = Vec::new();
    (&far).read_to_end(&mut rest).unwrap();
    assert!(!rest.ends_with(&end()), "the far end takes it for whole");
}

/// It may have sent everything, and waits for the answer; once it has that, it has something to send.
#[test]
fn a_source_may_be_silent_until_it_knows_that_its_guest_was_taken() {
    let mut running = Running::given();
    wait_until(|| running.may_be_silent.load(Ordering::Relaxed));
    running.far_says(&[Message::Pong(3), Message::Pong(0x42)]);
    // Also where it sends nothing that would end a read.
    wait_until(|| !running.may_be_silent.load(Ordering::Relaxed));
    running.source.shutdown(Shutdown::Write).unwrap();
    assert_eq!(running.relay.join().unwrap().ending, RelayEnding::Incomplete);
    // A source that waits for no answer sends on at once.
    let mut running = Running::given_by(false);
    running.source_sends(&page_of_postcopy("block1", 4096, 9));
    running.far_gets(&[9; 4096]);
    assert!(!running.may_be_silent.load(Ordering::Relaxed));
    running.source.shutdown(Shutdown::Write).unwrap();
    assert_eq!(running.relay.join().unwrap().ending, RelayEnding::Incomplete);
}

/// A QEMU before 10.2 has given its guest away with its package: a failure that it is told would be none.
#[test]
fn an_older_source_is_told_nothing_when_the_far_end_is_lost_after_run() {
    let running = Running::given_by(false);
    running.far.shutdown(Shutdown::Both).unwrap();
    let (told, report) = running.ended();
    assert_eq!((told, report.ending), (Vec::new(), RelayEnding::Incomplete));
}
