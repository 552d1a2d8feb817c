//! A relay whose source and far end have connections for urgent pages, all played by the test.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::postcopy_tests::{Running, WAIT, end};
use crate::engine::{Outcome, RelayEnding};
use crate::error::Chain;
use crate::session::tests::qemu_peer::page_of_postcopy;
use crate::session::{NewConnection, Reconnect, UrgentConnections};
use crate::stream::qemu::ram;
use crate::stream::qemu::return_path::Message;
use crate::sys::Stop;
use crate::transport::{Address, OpenError, StreamChannel, StreamOptions};

fn channel(socket: UnixStream) -> StreamChannel {
    StreamChannel::from_fd(socket.into(), "peer", &StreamOptions::default()).unwrap()
}

fn no_other() -> OpenError {
    OpenError::OnlyOne { address: "the connection for urgent pages".into() }
}

/// Connects once.
struct Once(Option<UnixStream>);

impl Reconnect for Once {
    fn connect(&mut self, _: Option<&Address>, _: &Stop) -> Result<NewConnection, OpenError> {
        let socket = self.0.take().ok_or_else(no_other)?;
        Ok(NewConnection::over(channel(socket)).unwrap())
    }
}

/// A relay that has given the guest away, and the ends of its connections for urgent pages at the source and at the far
/// end.
fn given() -> (Running, UnixStream, UnixStream) {
    let [(source, ours), (theirs, far)] = [(); 2].map(|()| UnixStream::pair().unwrap());
    let mut from_source = Some(ours);
    let next = move |stop: &Stop| match from_source.take() {
        Some(socket) => Ok(channel(socket)),
        None => {
            // Nobody else connects.
            stop.sleep(WAIT);
            Err(no_other())
        }
    };
    let urgent = UrgentConnections { from_source: Box::new(next), to_far_end: Box::new(Once(Some(theirs))) };
    far.set_read_timeout(Some(WAIT)).unwrap();
    (Running::given_over(true, Some(urgent)), source, far)
}

/// A page without a section around it.
fn urgent_page(block: &str, offset: u64, fill: u8) -> Vec<u8> {
    let mut out = (offset | ram::PAGE).to_be_bytes().to_vec();
    out.push(block.len() as u8);
    out.extend_from_slice(block.as_bytes());
    out.extend_from_slice(&[fill; 4096]);
    out
}

fn read(mut from: &UnixStream, bytes: usize) -> Vec<u8> {
    let mut read = vec![0; bytes];
    from.read_exact(&mut read).unwrap();
    read
}

#[test]
fn urgent_pages_leave_as_they_came_and_the_end_waits_for_those_under_way() {
    let (running, mut source, far) = given();
    let mut running = running.takes();
    let request = Message::RequestPagesOf { block: "block1", start: 4096, length: 4096 };
    running.far_says(&[request]);
    running.source_is_told(&[request]);
    let asked = urgent_page("block1", 4096, 9);
    source.write_all(&asked).unwrap();
    assert_eq!(read(&far, asked.len()), asked);
    // The source's stream ends; two pages are under way on the other connection, and one of them comes in pieces.
    running.source_sends(&page_of_postcopy("block1", 0, 8));
    running.far_gets(&[8; 4096]);
    running.source_sends(&end());
    let last = urgent_page("block0", 4096, 6);
    let (first, rest) = last.split_at(2000);
    source.write_all(first).unwrap();
    running.far.set_read_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
    let mut early = Vec::new();
    let silence = running.far.read_to_end(&mut early).unwrap_err();
    assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock);
    assert!(!early.ends_with(&end()), "the end came before the last page");
    running.far.set_read_timeout(Some(WAIT)).unwrap();
    source.write_all(rest).unwrap();
    let got = running.far_gets(&end());
    assert!(
        got.windows(4096).any(|part| part == [6; 4096]),
        "nobody asked for it: it leaves with the others"
    );
    running.far_says(&[Message::Shut { status: 0 }]);
    drop(source);
    let (_, report) = running.ended();
    let sent = report.sent.unwrap();
    assert_eq!((report.ending, sent.outcome), (RelayEnding::Running, Outcome::Completed));
    assert_eq!((report.received.missing_pages.unwrap().preempt_pages, sent.urgent_pages), (2, 1));
}

/// The guest runs at the far end: whichever connection is lost, both ends keep what they have, and say so to nobody.
#[test]
fn a_connection_for_urgent_pages_that_is_lost_ends_all_of_them() {
    for of_source in [true, false] {
        let (running, mut source, far) = given();
        let mut running = running.takes();
        source.write_all(&urgent_page("block1", 0, 9)).unwrap();
        running.far_gets(&[9; 4096]);
        if of_source {
            source.shutdown(Shutdown::Write).unwrap();
        } else {
            far.shutdown(Shutdown::Both).unwrap();
            let request = Message::RequestPagesOf { block: "block1", start: 4096, length: 4096 };
            running.far_says(&[request]);
            running.source_is_told(&[request]);
            source.write_all(&urgent_page("block1", 4096, 7)).unwrap();
        }
        let (told, report) = running.ended();
        assert_eq!((told, report.ending), (Vec::new(), RelayEnding::Incomplete), "{of_source}");
        let error = if of_source { report.received.error } else { report.sent.unwrap().error };
        let why = Chain(&error.unwrap()).to_string();
        assert!(!of_source || why.contains("urgent pages"), "{why}");
        let mut rest = Vec::new();
        (&far).read_to_end(&mut rest).unwrap_or_default();
    }
}

/// What the source has promised comes on neither connection.
#[test]
fn a_source_that_ends_with_its_connection_for_urgent_pages_closed_owes_a_page() {
    let (running, source, _far) = given();
    let mut running = running.takes();
    running.source_sends(&page_of_postcopy("block1", 0, 8));
    running.source_sends(&end());
    let mut source = source;
    source.write_all(&urgent_page("block1", 4096, 7)).unwrap();
    drop(source);
    let (told, report) = running.ended();
    assert_eq!((told, report.ending), (Vec::new(), RelayEnding::Incomplete));
    let why = Chain(&report.received.error.unwrap()).to_string();
    assert!(why.contains("discarded"), "{why}");
}
