//! Messages of the peer and commands of the embedder are processed during a slice: at most one more batch is sent
//! before. Counted in batches and pages, not in time; a slice of 50 ms holds them all.
#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Machine, Plain, guest, plain};
use crate::engine::{Ending, Outcome, PostcopyRule, Reason};
use crate::observe::PageCounts;
use crate::ram::{MoverAbilities, PageBatch, RoundKind};
use crate::session::*;
use crate::stream::native::Answer;
use crate::stream::qemu::file::Configuration;
use crate::stream::qemu::return_path::Message;
use crate::sys::{RecvPart, SendPart, Stop};
use crate::transport::{
    ByteSink, ByteSource, ChannelError, InlineLink, MoveError, Offer, Returned, SourceLink,
};
use crate::units::BlockIndex;

/// Enough for many slices.
const PAGES: u64 = 20_000;
/// Background pages of a batch, after a switch to postcopy.
const BACKGROUND: u64 = 16;

/// The return path, with messages in addition to the peer's.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<VecDeque<u8>>>);

impl Said {
    fn say(&self, message: Message<'_>) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.0.lock().unwrap().extend(bytes);
    }
}

struct Back {
    inner: Box<Plain>,
    said: Said,
}

impl crate::transport::Sealed for Back {}

impl ByteSource for Back {
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        if let (Some(RecvPart::Own(room)), mut said) = (into.first_mut(), self.said.0.lock().unwrap())
            && !said.is_empty()
        {
            let count = said.len().min(room.len());
            for (to, byte) in room.iter_mut().zip(said.drain(..count)) {
                *to = byte;
            }
            return Ok(count);
        }
        self.inner.recv(into, stop)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.inner.descriptor()
    }
}

/// Called with the number of each batch.
type AtBatch = Box<dyn FnMut(u64) + Send>;

/// A link whose batches hold one page.
struct Counted {
    inner: InlineLink,
    offered: Arc<AtomicU64>,
    at_batch: AtBatch,
}

impl crate::transport::Sealed for Counted {}

impl SourceLink for Counted {
    fn abilities(&self) -> MoverAbilities {
        MoverAbilities { batch_pages: 1, ..self.inner.abilities() }
    }
    fn sink(&mut self) -> &mut dyn ByteSink {
        self.inner.sink()
    }
    fn sent_pages(&self) -> Vec<PageCounts> {
        self.inner.sent_pages()
    }
    fn open_round(&mut self, kind: RoundKind, stop: &Stop) -> Result<(), MoveError> {
        self.inner.open_round(kind, stop)
    }
    fn offer(&mut self, batch: PageBatch, stop: &Stop) -> Result<Offer, MoveError> {
        (self.at_batch)(self.offered.fetch_add(1, Ordering::Relaxed) + 1);
        self.inner.offer(batch, stop)
    }
    fn collect(&mut self, out: &mut Vec<Returned>) -> Result<(), MoveError> {
        self.inner.collect(out)
    }
    fn close_round(&mut self, kind: RoundKind, stop: &Stop) -> Result<(), MoveError> {
        self.inner.close_round(kind, stop)
    }
    fn drain(&mut self, stop: &Stop) -> Result<(), MoveError> {
        self.inner.drain(stop)
    }
    fn reclaim(&mut self) -> Vec<PageBatch> {
        self.inner.reclaim()
    }
}

/// Calls back with the number of each page that is sent, which is in its first bytes.
struct Watched {
    inner: Box<Plain>,
    at_page: Box<dyn FnMut(u64) + Send>,
}

impl crate::transport::Sealed for Watched {}

impl ByteSink for Watched {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        for part in parts {
            let SendPart::Guest(span) = part else { continue };
            for page in 0..span.len() / 4096 {
                let mut number = [0; 8];
                span.part(page * 4096, 8).unwrap().copy_to(&mut number);
                (self.at_page)(u64::from_ne_bytes(number) - 1);
            }
        }
        self.inner.send(parts, stop)
    }
    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.inner.flush(stop)
    }
    fn position(&self) -> u64 {
        self.inner.position()
    }
}

struct Setup {
    offered: Arc<AtomicU64>,
    machine: Machine,
    source: SourceSession,
    destination: DestinationSession,
}

/// A guest whose pages hold their number. `at_batch` and `at_page` receive the object that controls the migration.
fn setup(
    pages: u64,
    at_batch: impl FnOnce(Said) -> AtBatch,
    at_page: impl FnOnce(Said) -> Box<dyn FnMut(u64) + Send>,
) -> Setup {
    let (near, far) = UnixStream::pair().unwrap();
    let (from, to) = (guest(&[pages]), guest(&[pages]));
    for page in 0..pages {
        let span = from.region(BlockIndex(0)).unwrap().span(page * 4096, 8).unwrap();
        span.copy_from(&(page + 1).to_ne_bytes());
    }
    let said = Said::default();
    let sink = Watched { inner: plain(&near), at_page: at_page(said.clone()) };
    let offered = Arc::new(AtomicU64::new(0));
    let link = Counted {
        inner: InlineLink::new(Box::new(sink), from.clone()),
        offered: Arc::clone(&offered),
        at_batch: at_batch(said.clone()),
    };
    let back = Box::new(Back { inner: plain(&near), said: said.clone() });
    let machine = Machine::running(b"devices");
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.guest_is_paused = true;
    settings.postcopy = Some(PostcopySettings::new(PostcopyRule::OnCommand));
    let guest = SourceGuest { memory: from, dirty: Vec::new(), control: Box::new(machine.clone()) };
    let connection = SourceConnection::new(Box::new(link), Some(back));
    let mut destination = DestinationSession::new(
        DestinationGuest { memory: Box::new(to), control: Box::new(Machine::default()) },
        DestinationConnection::of_stream(plain(&far), Some(plain(&far))),
        DestinationSettings::default(),
    );
    destination.settings_mut().postcopy = true;
    Setup { offered, machine, source: SourceSession::new(guest, connection, settings), destination }
}

fn run(setup: Setup) -> (SourceReport, DestinationReport, u64) {
    let Setup { offered, source, destination, .. } = setup;
    let far = std::thread::spawn(move || destination.run());
    let sent = source.run();
    (sent, far.join().unwrap(), offered.load(Ordering::Relaxed))
}

#[test]
fn a_destination_that_fails_is_heard_at_the_next_batch() {
    let refuse = |said: Said| -> AtBatch {
        Box::new(move |batch| {
            if batch == 5 {
                said.say(Message::Native(Answer::Refused { why: "no more room" }));
            }
        })
    };
    let setup = setup(PAGES, refuse, |_| Box::new(|_| {}));
    let machine = setup.machine.clone();
    let (sent, arrived, offered) = run(setup);
    assert_eq!(offered, 5, "batches sent until it was heard");
    assert_eq!(sent.outcome, Outcome::StaysHere(Reason::Failed));
    assert!(sent.error.is_some_and(|error| error.to_string().contains("no more room")));
    assert_eq!(arrived.ending, Ending::Discarded);
    assert!(machine.runs());
}

/// The control exists before the link that gives the command: a slot connects them.
fn commanded(command: impl Fn(&Control) + Send + 'static) -> (SourceReport, DestinationReport, u64) {
    let slot: Arc<Mutex<Option<Control>>> = Arc::default();
    let taken = Arc::clone(&slot);
    let at_batch = move |_| -> AtBatch {
        Box::new(move |batch| {
            if batch == 5 {
                command(taken.lock().unwrap().as_ref().unwrap());
            }
        })
    };
    let setup = setup(PAGES, at_batch, |_| Box::new(|_| {}));
    *slot.lock().unwrap() = Some(setup.source.control());
    run(setup)
}

#[test]
fn a_command_is_followed_at_the_next_batch() {
    let (sent, arrived, offered) = commanded(|control| control.start_postcopy().unwrap());
    assert_eq!(offered, 5, "batches sent until the guest was paused for postcopy");
    assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running), "{:?}", sent.error);
    assert!(arrived.missing_pages.is_some());

    let (sent, _, offered) = commanded(|control| assert_eq!(control.cancel(), CancelReply::Accepted));
    assert_eq!(offered, 5, "batches sent after the cancel");
    assert_eq!(sent.outcome, Outcome::StaysHere(Reason::Cancelled));
}

fn ask(said: &Said, page: u64) {
    said.say(Message::RequestPagesOf { block: "block0", start: page * 4096, length: 4096 });
}

#[test]
fn a_request_is_answered_behind_the_batch_under_way() {
    let at: Arc<Mutex<Vec<u64>>> = Arc::default();
    let seen = Arc::clone(&at);
    let watch = move |said: Said| -> Box<dyn FnMut(u64) + Send> {
        Box::new(move |page| {
            let mut seen = seen.lock().unwrap();
            seen.push(page);
            if seen.len() == 100 {
                ask(&said, PAGES - 7);
            }
        })
    };
    let setup = setup(PAGES, |_| Box::new(|_| {}), watch);
    setup.source.control().start_postcopy().unwrap();
    let (sent, arrived, _) = run(setup);
    assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running), "{:?}", sent.error);
    let seen = at.lock().unwrap();
    let answered = seen.iter().position(|page| *page == PAGES - 7).unwrap() as u64;
    // Only those of the current batch, no more.
    assert!(answered < 100 + BACKGROUND, "the {answered}th page");
}

/// Prints how long a request waits at the source: from its arrival until its page is sent.
///
/// ```text
/// cargo test --release --lib session::tests::promptness -- --ignored --nocapture
/// ```
#[test]
#[ignore = "measures"]
fn requests_are_answered_within_a_millisecond() {
    const EVERY: u64 = 50;
    let asked: Arc<Mutex<Option<(u64, Instant)>>> = Arc::default();
    let waits: Arc<Mutex<Vec<Duration>>> = Arc::default();
    let (left, all) = (Arc::clone(&waits), Arc::clone(&asked));
    let watch = move |said: Said| -> Box<dyn FnMut(u64) + Send> {
        let mut count = 0;
        Box::new(move |page| {
            count += 1;
            let mut asked = all.lock().unwrap();
            if let Some((_, at)) = asked.take_if(|(awaited, _)| *awaited == page) {
                left.lock().unwrap().push(at.elapsed());
            }
            let next = PAGES - 1 - count / EVERY;
            if asked.is_none() && count % EVERY == 0 && next > count + EVERY {
                ask(&said, next);
                *asked = Some((next, Instant::now()));
            }
        })
    };
    let setup = setup(PAGES, |_| Box::new(|_| {}), watch);
    setup.source.control().start_postcopy().unwrap();
    let (sent, ..) = run(setup);
    assert_eq!(sent.outcome, Outcome::Completed);
    let mut waits = waits.lock().unwrap();
    waits.sort();
    let within = waits.iter().filter(|wait| **wait <= Duration::from_millis(1)).count();
    let at = |share: usize| waits[(waits.len() - 1) * share / 100];
    println!(
        "{} requests: median {:?}, 99 % {:?}, longest {:?}; {within} within 1 ms",
        waits.len(),
        at(50),
        at(99),
        at(100)
    );
}
