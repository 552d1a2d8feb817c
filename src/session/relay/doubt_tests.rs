//! A relay from a QEMU to a QEMU whose far end takes the guest and sends nothing in time.
#![allow(clippy::unwrap_used)]

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::engine::{Ending, Outcome};
use crate::guest::GuestMemory;
use crate::observe::SharedStatistics;
use crate::session::tests::plain;
use crate::session::tests::qemu_peer::{encoded, rest, start};
use crate::session::{
    CancelReply, DestinationConnection, DestinationSettings, Guard, Held, Notice, Peer, Relay, RelayControl,
    RelayReport, SourceConnection, SourceSettings,
};
use crate::stream::qemu::file::Configuration;
use crate::stream::qemu::return_path::Message;
use crate::sys::CancelToken;
use crate::transport::InlineLink;

/// Longest wait of any kind; exceeding it is a failure.
const WAIT: Duration = Duration::from_secs(60);

/// Records the calls.
pub(super) struct Noting(pub(super) Arc<Mutex<Vec<&'static str>>>, pub(super) bool);

impl Guard for Noting {
    fn hold(&mut self, held: &Held<'_>) -> io::Result<()> {
        assert!(held.far_end.is_some() && !held.source_is_native && !held.far_end_is_native);
        self.0.lock().unwrap().push(match (held.switched, held.urgent.len()) {
            (false, 0) => "held",
            (true, 0) => "held after the switch",
            _ => "held after the switch, with another",
        });
        if self.1 { Ok(()) } else { Err(io::Error::other("no process can be started")) }
    }
    fn release(&mut self) {
        self.0.lock().unwrap().push("released");
    }
}

struct Running {
    source: UnixStream,
    far: UnixStream,
    cancel: CancelToken,
    control: RelayControl,
    guard: Arc<Mutex<Vec<&'static str>>>,
    notices: Receiver<Notice>,
    relay: JoinHandle<RelayReport>,
}

impl Running {
    /// The source has sent everything; the far end answers only the first PING.
    fn begin(guard_holds: bool) -> Self {
        let [(source, upstream), (downstream, far)] = [(); 2].map(|()| UnixStream::pair().unwrap());
        let connect = {
            let downstream = downstream.try_clone().unwrap();
            move |memory: Arc<dyn GuestMemory>| {
                let link = Box::new(InlineLink::new(plain(&downstream), memory));
                Ok(SourceConnection::new(link, Some(plain(&downstream))))
            }
        };
        let mut outgoing = SourceSettings::new(Configuration::default());
        outgoing.peer = Some(Peer::Qemu);
        outgoing.finish_timeout = Duration::from_millis(50);
        let (guard, cancel, control) = (Arc::default(), CancelToken::default(), RelayControl::default());
        let (tell, notices) = channel();
        let tell = Mutex::new(tell);
        let relay = Relay {
            connection: DestinationConnection::of_stream(plain(&upstream), Some(plain(&upstream))),
            connect: Box::new(connect),
            incoming: DestinationSettings::default(),
            outgoing,
            urgent_came: false,
            urgent: None,
            huge_pages: false,
            cancel: cancel.clone(),
            control: control.clone(),
            guard: Some(Box::new(Noting(Arc::clone(&guard), guard_holds))),
            notice: Arc::new(move |notice: &Notice| tell.lock().unwrap().send(notice.clone()).unwrap()),
            statistics: SharedStatistics::default(),
        };
        drop((upstream, downstream));
        let relay = std::thread::spawn(move || relay.run());
        for end in [&source, &far] {
            end.set_read_timeout(Some(WAIT)).unwrap();
        }
        (&source).write_all(&[start(), rest()].concat()).unwrap();
        let mut pong = vec![0; encoded(Message::Pong(1)).len()];
        (&source).read_exact(&mut pong).unwrap();
        Self { source, far, cancel, control, guard, notices, relay }
    }

    /// In doubt: the far end has read everything.
    fn in_doubt() -> Self {
        let mut running = Self::begin(true);
        running.read_far("\"fields\": []}]}");
        let notice = running.notices.recv_timeout(WAIT).unwrap();
        assert!(
            matches!(&notice, Notice::InDoubt { why, switched: false, source_waits: true } if why.contains("that the guest runs")),
            "{notice:?}"
        );
        assert!(running.control.is_in_doubt() && running.control.is_given_away());
        assert_eq!(*running.guard.lock().unwrap(), ["held"]);
        running
    }

    /// Reads what the far end receives, up to `end` or the end of the connection.
    fn read_far(&mut self, end: &str) -> Vec<u8> {
        let (mut read, mut buffer) = (Vec::new(), [0; 4096]);
        while !read.ends_with(end.as_bytes()) {
            match self.far.read(&mut buffer).unwrap() {
                0 => break,
                got => read.extend_from_slice(&buffer[..got]),
            }
        }
        read
    }

    fn far_says(&mut self, status: u32) {
        self.far.write_all(&encoded(Message::Shut { status })).unwrap();
    }

    /// What the source has received when the relay has ended, and its report.
    fn ended(self) -> (Vec<u8>, RelayReport) {
        let report = self.relay.join().unwrap();
        let mut told = Vec::new();
        (&self.source).read_to_end(&mut told).unwrap();
        assert_eq!(*self.guard.lock().unwrap(), ["held", "released"]);
        (told, report)
    }
}

#[test]
fn a_late_answer_of_the_far_end_ends_the_doubt_and_reaches_the_source() {
    for (status, ending, outcome) in
        [(0, Ending::Running, Outcome::Completed), (1, Ending::Discarded, Outcome::InDoubt)]
    {
        let mut running = Running::in_doubt();
        // A cancel decides nothing, however it arrives.
        assert_eq!(running.control.cancel(), CancelReply::TooLate);
        running.cancel.cancel();
        running.far_says(status);
        let (told, report) = running.ended();
        assert_eq!(told, encoded(Message::Shut { status }));
        assert_eq!(report.received.ending, ending, "{report:?}");
        let sent = report.sent.unwrap().outcome;
        assert!(sent == outcome || matches!(sent, Outcome::StaysHere(_)) && status == 1, "{sent:?}");
    }
}

#[test]
fn a_source_that_has_gone_ends_the_relay_and_is_told_nothing() {
    let running = Running::in_doubt();
    // It still reads, so that any message is seen.
    running.source.shutdown(Shutdown::Write).unwrap();
    let (told, report) = running.ended();
    assert_eq!(told, [0u8; 0]);
    assert_eq!(report.received.ending, Ending::Discarded);
    assert_eq!(report.sent.unwrap().outcome, Outcome::InDoubt);
    assert!(report.kept.is_some_and(|kept| kept.state.is_some()));
}

#[test]
fn an_operator_who_has_seen_the_far_end_dead_lets_the_source_go_on() {
    let running = Running::in_doubt();
    assert!(running.control.far_end_is_dead());
    let (told, report) = running.ended();
    assert_eq!(told, encoded(Message::Shut { status: 1 }));
    assert_eq!(report.sent.unwrap().outcome, Outcome::InDoubt);
}

#[test]
fn nobody_decides_before_there_is_a_doubt_and_a_connection_that_breaks_in_doubt_decides_nothing() {
    let mut running = Running::in_doubt();
    running.far.shutdown(Shutdown::Both).unwrap();
    // Until the far side has noticed it; then it has ended, and the doubt continues.
    let mut rest = Vec::new();
    running.far.read_to_end(&mut rest).unwrap();
    assert!(running.control.is_in_doubt());
    assert!(running.control.far_end_is_dead());
    let control = running.control.clone();
    // A second signal of an operator requests it again.
    assert_eq!(control.cancel(), CancelReply::Accepted, "the guest is the source's");
    assert_eq!(running.ended().0, encoded(Message::Shut { status: 1 }));
    assert!(!control.far_end_is_dead());
}

#[test]
fn what_can_not_be_held_is_not_given_away() {
    let mut running = Running::begin(false);
    let arrived = running.read_far("\"fields\": []}]}");
    // The byte that ends the sections commits: it was not sent.
    assert!(!arrived.ends_with(b"]}"), "{} bytes", arrived.len());
    let report = running.relay.join().unwrap();
    assert!(matches!(report.sent.unwrap().outcome, Outcome::StaysHere(_)));
    let error = crate::error::Chain(&report.received.error.unwrap()).to_string();
    assert!(error.contains("no process can be started"), "{error}");
    let mut told = Vec::new();
    running.source.read_to_end(&mut told).unwrap();
    assert_eq!(told, encoded(Message::Shut { status: 1 }));
    assert_eq!(*running.guard.lock().unwrap(), ["held", "released"]);
}
