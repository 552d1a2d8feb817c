//! A switch to postcopy between two ramwires.
#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Machine, bytes, ends_with, guest};
use crate::engine::{Ending, Outcome, PostcopyRule};
use crate::guest::MappedGuest;
use crate::observe::Status;
use crate::session::*;
use crate::stream::native::Answer;
use crate::stream::qemu::file::Configuration;
use crate::stream::qemu::return_path::Message;
use crate::sys::{SendPart, Stop};
use crate::transport::{
    Address, AllowList, ByteSink, ChannelError, Listener, OpenError, Sealed, StreamBreaker, StreamChannel,
    StreamOptions, connect,
};
use crate::units::{BlockIndex, Rate};

#[test]
fn p2_a_guest_switches_to_postcopy_between_two_ramwires() {
    for command in [false, true] {
        let rule = if command { PostcopyRule::OnCommand } else { PostcopyRule::AfterRounds(0) };
        let postcopy = PostcopySettings::new(rule);
        let mut ends = ends_with(|settings| {
            settings.verify = Verify::Off;
            settings.postcopy = Some(postcopy);
        });
        ends.destination.settings_mut().postcopy = true;
        if command {
            ends.source.control().start_postcopy().unwrap();
        }
        let thread = std::thread::spawn(move || ends.destination.run());
        let sent = ends.source.run();
        let arrived = thread.join().unwrap();
        assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
        assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
        assert!(arrived.native && arrived.missing_pages.is_some() && sent.statistics.postcopy_bytes > 0);
        for block in 0..2 {
            assert!(bytes(&ends.from, block) == bytes(&ends.to, block), "block {block} differs");
        }
        assert!(!ends.source_machine.runs() && ends.destination_machine.runs());
        assert_eq!(ends.destination_machine.state(), b"devices");
    }
}

/// A destination that may not is asked before a page is sent, and what can't be switched is refused before a byte is.
#[test]
fn p3_a_switch_that_can_not_be_is_refused_and_the_guest_runs_on() {
    let postcopy = || Some(PostcopySettings::new(PostcopyRule::AfterRounds(0)));
    let ends = ends_with(|settings| (settings.verify, settings.postcopy) = (Verify::Off, postcopy()));
    let thread = std::thread::spawn(move || ends.destination.run());
    let sent = ends.source.run();
    assert_eq!(thread.join().unwrap().ending, Ending::Discarded);
    assert!(sent.guest_is_safe_here() && ends.source_machine.runs(), "{:?}", sent.error);
    assert_eq!(sent.statistics.pages.normal, 0);

    let ends = ends_with(|settings| settings.postcopy = postcopy());
    let sent = ends.source.run();
    let text = sent.error.as_ref().map(ToString::to_string).unwrap_or_default();
    assert!(text.contains("digest"), "{text}");
    assert_eq!((sent.guest_is_safe_here(), sent.statistics.transferred), (true, 0));
}

/// Listens at two addresses, and gives the connections of both, which `breakers` break.
fn listen(breakers: &Arc<Mutex<Vec<StreamBreaker>>>) -> ([Address; 2], impl NextConnection + use<>) {
    let mut listeners = [0, 1].map(|_| {
        let any: Address = "tcp:127.0.0.1:0".parse().unwrap();
        Listener::bind(&any, AllowList::default(), &Stop::never()).unwrap()
    });
    let addresses = [0, 1].map(|at: usize| listeners[at].address().clone());
    let holder = Arc::clone(breakers);
    let next = move |stop: &Stop| loop {
        for listener in &mut listeners {
            match listener.accept(&StreamOptions::default(), &stop.within(Duration::from_millis(2))) {
                Ok(channel) => {
                    holder.lock().unwrap().push(channel.breaker());
                    return Ok(channel);
                }
                Err(error) if stop.reason().is_some() => return Err(error),
                Err(_) => {}
            }
        }
    };
    (addresses, next)
}

/// Two ends over sockets that switch to postcopy at once, at a rate at which all pages would take ten times as long as
/// needed.
struct SocketEnds {
    source: SourceSession,
    destination: DestinationSession,
    from: Arc<MappedGuest>,
    to: Arc<MappedGuest>,
    near: Machine,
    far: Machine,
    breakers: Arc<Mutex<Vec<StreamBreaker>>>,
    /// The destination listens there as well.
    elsewhere: Address,
}

impl SocketEnds {
    /// Guests of blocks of these pages, none of the first block's zero. `set` changes the source's settings.
    fn new(pages: &[u64], goes_on: bool, set: impl FnOnce(&mut PostcopySettings)) -> Self {
        Self::with_back(pages, goes_on, set, |back| back)
    }

    /// The same; the destination's first return path is what `wrap` makes of it.
    fn with_back(
        pages: &[u64],
        goes_on: bool,
        set: impl FnOnce(&mut PostcopySettings),
        wrap: impl FnOnce(Box<dyn ByteSink>) -> Box<dyn ByteSink>,
    ) -> Self {
        let (from, to) = (guest(pages), guest(pages));
        for page in 0..pages[0] {
            let span = from.region(BlockIndex(0)).unwrap().span(page * 4096, 4096).unwrap();
            span.copy_from(&[page as u8 | 1; 4096]);
        }
        let breakers = Arc::new(Mutex::new(Vec::new()));
        let ([here, elsewhere], mut next) = listen(&breakers);
        let mut postcopy = PostcopySettings::new(PostcopyRule::AfterRounds(0));
        (postcopy.max_bandwidth, postcopy.reconnect_timeout) =
            (Rate::limit(200 << 10), Duration::from_secs(100));
        set(&mut postcopy);
        let mut settings =
            SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
        (settings.guest_stands_still, settings.postcopy) = (true, Some(postcopy));
        let channel = connect(&here, &StreamOptions::default(), &Stop::never()).unwrap();
        let connection = SourceConnection::over(channel, from.clone());
        let [near, far] = [Machine::running(b"devices"), Machine::default()];
        let source = SourceGuest { memory: from.clone(), dirty: Vec::new(), control: Box::new(near.clone()) };
        let mut source = SourceSession::new(source, connection, settings);
        let channel = next.next(&Stop::never()).unwrap();
        let settings = DestinationSettings { postcopy: true, ..Default::default() };
        let arriving = DestinationGuest { memory: Box::new(to.clone()), control: Box::new(far.clone()) };
        let mut connection = DestinationConnection::over(channel);
        connection.back = connection.back.map(wrap);
        let mut destination = DestinationSession::new(arriving, connection, settings);
        if goes_on {
            source = source.with_reconnect(Box::new(Redial::new(here, StreamOptions::default())));
            destination = destination.with_next_connection(Box::new(next));
        }
        Self { source, destination, from, to, near, far, breakers, elsewhere }
    }
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(100);
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// The connection breaks five times and is replaced; it is closed by command, and continues at another address by
/// command.
#[test]
fn p9_p11_two_ramwires_go_on_over_other_connections() {
    let ends = SocketEnds::new(&[2000, 7], true, |_| {});
    let SocketEnds { source, destination, from, to, near, far, breakers, elsewhere } = ends;
    let control = source.control();
    assert!(control.pause().is_err() && control.recover(elsewhere.clone()).is_err(), "not switched yet");
    let (destination, source) = (destination.spawn().unwrap(), source.spawn().unwrap());
    let both = |status| source.progress().status == status && destination.progress().status == status;
    for cut in 0..6 {
        until("they go on", || both(Status::PostcopyActive));
        let pages = destination.progress().pages.normal;
        until("pages come", || destination.progress().pages.normal > pages + 4);
        if cut < 5 {
            breakers.lock().unwrap().drain(..).for_each(|breaker| breaker.reset());
            // The status may be the old one again before it is read.
            until("another comes", || !breakers.lock().unwrap().is_empty());
            continue;
        }
        control.pause().unwrap();
        until("both wait", || both(Status::PostcopyPaused));
        assert!(!source.is_finished() && matches!(source.cancel(), CancelReply::TooLate));
        control.recover(elsewhere.clone()).unwrap();
        until("they go on elsewhere", || both(Status::PostcopyActive));
        // A working connection is replaced as well.
        control.recover(elsewhere.clone()).unwrap();
    }
    control.set_postcopy_bandwidth(None);
    let (sent, arrived) = (source.wait().unwrap(), destination.wait().unwrap());
    assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
    assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
    assert!(!near.runs() && far.runs());
    for block in 0..2 {
        assert!(bytes(&from, block) == bytes(&to, block), "block {block} differs");
    }
    assert!(control.pause().is_err(), "it is over");
}

/// Loses the report that all pages have arrived, with the connection that it is written to.
struct LosesLastWord {
    sink: Box<dyn ByteSink>,
    lost: bool,
    breakers: Arc<Mutex<Vec<StreamBreaker>>>,
}

impl Sealed for LosesLastWord {}

impl ByteSink for LosesLastWord {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        let mut running = Vec::new();
        Message::Native(Answer::Running).encode(&mut running);
        if matches!(parts, [SendPart::Own(bytes)] if **bytes == *running) {
            // The peer has it in no buffer, and this end has sent it.
            self.breakers.lock().unwrap().drain(..).for_each(|breaker| breaker.reset());
            self.lost = true;
            return Ok(());
        }
        self.sink.send(parts, stop)
    }

    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        if self.lost { Ok(()) } else { self.sink.flush(stop) }
    }

    fn position(&self) -> u64 {
        self.sink.position()
    }

    fn under_way(&self) -> u64 {
        if self.lost { 1 } else { self.sink.under_way() }
    }
}

/// All pages are there, and the source does not receive the report: it connects again, sends only the end, and receives
/// the report then.
#[test]
fn p11_a_connection_lost_with_the_last_word_is_replaced_and_the_word_said_again() {
    let breakers = Arc::new(Mutex::new(Vec::new()));
    let holder = Arc::clone(&breakers);
    let lose =
        move |sink| Box::new(LosesLastWord { sink, lost: false, breakers: holder }) as Box<dyn ByteSink>;
    let ends = SocketEnds::with_back(&[300, 7], true, |postcopy| postcopy.max_bandwidth = None, lose);
    breakers.lock().unwrap().append(&mut ends.breakers.lock().unwrap());
    let SocketEnds { source, destination, from, to, near, far, .. } = ends;
    let (destination, source) = (destination.spawn().unwrap(), source.spawn().unwrap());
    let (sent, arrived) = (source.wait().unwrap(), destination.wait().unwrap());
    assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
    assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
    assert!(!near.runs() && far.runs());
    assert!(breakers.lock().unwrap().is_empty(), "the first connection was lost");
    for block in 0..2 {
        assert!(bytes(&from, block) == bytes(&to, block), "block {block} differs");
    }
}

/// No other connection arrives: a thread that touches a missing page waits, and never sees zeros in its place.
#[test]
fn what_is_missing_for_good_never_reads_as_zero() {
    const PAGES: u64 = 2000;
    let ends = SocketEnds::new(&[PAGES], false, |postcopy| postcopy.reconnect_timeout = Duration::ZERO);
    let SocketEnds { source, destination, to, near, far, breakers, .. } = ends;
    let (destination, source) = (destination.spawn().unwrap(), source.spawn().unwrap());
    until("it runs there", || far.runs() && destination.progress().pages.normal > 0);
    breakers.lock().unwrap().drain(..).for_each(|breaker| breaker.reset());
    let (sent, arrived) = (source.wait().unwrap(), destination.wait().unwrap());
    assert_eq!((sent.outcome, arrived.ending), (Outcome::Incomplete, Ending::Incomplete));
    assert!(!near.runs() && far.runs());
    let (tell, told) = std::sync::mpsc::channel();
    // Ends with the process.
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        to.region(BlockIndex(0)).unwrap().span((PAGES - 1) * 4096, 4096).unwrap().copy_to(&mut bytes);
        tell.send(bytes[0])
    });
    let read = told.recv_timeout(Duration::from_millis(300));
    assert!(read.is_err(), "a page that never came reads as {read:?}");
}

/// A process that receives only faults of user mode would give a KVM guest zeros, or none of its memory, after RUN.
#[test]
fn a_destination_that_sees_no_fault_of_the_kernel_refuses_before_a_page_comes() {
    let postcopy = Some(PostcopySettings::new(PostcopyRule::AfterRounds(0)));
    let mut ends = ends_with(|settings| (settings.verify, settings.postcopy) = (Verify::Off, postcopy));
    ends.destination.settings_mut().postcopy = true;
    let destination = ends.destination;
    let thread = std::thread::spawn(move || {
        // Of this thread alone; it may fail where the tests have no rights to begin with.
        let _ = rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(65534));
        let has_rights = crate::sys::MissingFaults::new().is_ok();
        (has_rights, destination.run())
    });
    let sent = ends.source.run();
    let (has_rights, arrived) = thread.join().unwrap();
    if has_rights {
        // vm.unprivileged_userfaultfd is 1: any process receives them.
        assert_eq!(arrived.ending, Ending::Running);
        return;
    }
    let text = arrived.error.as_ref().map(ToString::to_string).unwrap_or_default();
    assert!(text.contains("userfaultfd") && text.contains("vm.unprivileged_userfaultfd"), "{text}");
    assert_eq!(arrived.ending, Ending::Discarded);
    assert!(sent.guest_is_safe_here() && ends.source_machine.runs(), "{:?}", sent.error);
    assert_eq!(sent.statistics.pages.normal, 0);
}

/// Reads pages of a guest that runs where they are missing, as its vCPU would.
fn touch(to: &MappedGuest, pages: std::ops::Range<u64>) {
    for page in pages {
        let mut bytes = [0; 4096];
        to.region(BlockIndex(0)).unwrap().span(page * 4096, 4096).unwrap().copy_to(&mut bytes);
        assert_eq!(bytes, [page as u8 | 1; 4096], "page {page}");
    }
}

/// Requested pages arrive on a connection of their own, and after it was lost on another one.
#[test]
fn p4_p14_urgent_pages_go_on_a_connection_of_their_own() {
    const PAGES: u64 = 2000;
    for cuts in [false, true] {
        let ends = SocketEnds::new(&[PAGES], true, |postcopy| postcopy.preempt = true);
        let SocketEnds { source, destination, from, to, near, far, breakers, .. } = ends;
        let control = source.control();
        let (destination, source) = (destination.spawn().unwrap(), source.spawn().unwrap());
        until("it runs there", || far.runs());
        touch(&to, PAGES - 30..PAGES);
        if cuts {
            breakers.lock().unwrap().drain(..).for_each(|breaker| breaker.reset());
            until("another comes", || !breakers.lock().unwrap().is_empty());
            touch(&to, PAGES - 60..PAGES - 30);
        }
        control.set_postcopy_bandwidth(None);
        let (sent, arrived) = (source.wait().unwrap(), destination.wait().unwrap());
        assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
        assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
        assert!(!near.runs() && far.runs());
        assert!(bytes(&from, 0) == bytes(&to, 0));
        // Pages that were in flight when a connection was lost were sent and have not arrived.
        let came = arrived.missing_pages.unwrap().preempt_pages;
        assert!(
            came >= if cuts { 2 } else { 1 } && sent.urgent_pages >= came,
            "{} {came}",
            sent.urgent_pages
        );
        assert!(cuts || sent.urgent_pages == came, "{} {came}", sent.urgent_pages);
    }
}

/// Pages of a block that have memory.
fn resident(guest: &MappedGuest, block: u32, pages: u64) -> u64 {
    let region = guest.region(BlockIndex(block)).unwrap();
    let is_there = |page: &u64| crate::sys::is_there(region.span(page * 4096, 4096).unwrap()).unwrap();
    (0..pages).filter(is_there).count() as u64
}

/// The source's memory is released as the destination proves that it has it, also after lost connections, and none of
/// it earlier.
#[test]
fn the_sources_memory_is_given_back_as_its_pages_have_come() {
    const PAGES: u64 = 2000;
    for preempt in [false, true] {
        let ends = SocketEnds::new(&[PAGES, 7], true, |postcopy| {
            (postcopy.release_ram, postcopy.preempt) = (true, preempt);
        });
        let SocketEnds { source, destination, from, to, near, far, breakers, .. } = ends;
        let expected = [bytes(&from, 0), bytes(&from, 1)];
        assert_eq!(resident(&from, 0, PAGES), PAGES);
        let control = source.control();
        let (destination, source) = (destination.spawn().unwrap(), source.spawn().unwrap());
        until("it runs there", || far.runs());
        for _ in 0..2 {
            let came = destination.progress().pages.normal;
            until("memory goes while pages follow", || {
                let (resident, placed) = (resident(&from, 0, PAGES), destination.progress().pages.normal);
                assert!(PAGES - resident <= placed, "{resident} are left, and {placed} have come");
                placed > came + 70 && resident < PAGES - came
            });
            breakers.lock().unwrap().drain(..).for_each(|breaker| breaker.reset());
            until("another comes", || !breakers.lock().unwrap().is_empty());
        }
        control.set_postcopy_bandwidth(None);
        let (sent, arrived) = (source.wait().unwrap(), destination.wait().unwrap());
        assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
        assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
        assert!(!near.runs() && far.runs());
        assert_eq!((resident(&from, 0, PAGES), sent.released_pages), (0, PAGES + 7), "all of it is gone");
        assert!(bytes(&to, 0) == expected[0] && bytes(&to, 1) == expected[1]);
    }
}

/// A destination that can accept no other connection reports that before a page is sent, and so does a source that
/// can't make one.
#[test]
fn a_connection_for_urgent_pages_that_can_not_be_is_refused_and_the_guest_runs_on() {
    let mut postcopy = PostcopySettings::new(PostcopyRule::AfterRounds(0));
    postcopy.preempt = true;
    for can_connect in [true, false] {
        let mut ends = ends_with(|settings| {
            (settings.verify, settings.postcopy) = (Verify::Off, Some(postcopy.clone()));
        });
        ends.destination.settings_mut().postcopy = true;
        let again = Redial::new("tcp:127.0.0.1:1".parse().unwrap(), StreamOptions::default());
        let source = match can_connect {
            true => ends.source.with_reconnect(Box::new(again)),
            false => ends.source,
        };
        let destination = ends.destination;
        let thread = std::thread::spawn(move || destination.run());
        let sent = source.run();
        assert_eq!(thread.join().unwrap().ending, Ending::Discarded);
        let text = sent.error.as_ref().map(ToString::to_string).unwrap_or_default();
        assert!(text.contains("urgent pages"), "{text}");
        assert!(sent.guest_is_safe_here() && ends.source_machine.runs(), "{:?}", sent.error);
        assert_eq!((sent.statistics.pages.normal, sent.urgent_pages), (0, 0));
    }
}

/// Accepts connections, counted, and closes each at once.
#[derive(Default)]
struct Closes(Arc<AtomicU32>);

impl Reconnect for Closes {
    fn connect(&mut self, _address: Option<&Address>, _stop: &Stop) -> Result<NewConnection, OpenError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        let (near, _) = UnixStream::pair().unwrap();
        let channel = StreamChannel::from_fd(near.into(), "a closing listener", &StreamOptions::default());
        Ok(NewConnection::over(channel.unwrap()).unwrap())
    }
}

/// What accepts connections and closes them is asked again at the pace of attempts that fail, and not beyond the time.
#[test]
fn a_listener_that_closes_each_connection_at_once_does_not_keep_the_source_busy() {
    let ends =
        SocketEnds::new(&[2000], false, |postcopy| postcopy.reconnect_timeout = Duration::from_millis(300));
    let attempts = Arc::new(AtomicU32::new(0));
    let source = ends.source.with_reconnect(Box::new(Closes(attempts.clone())));
    let (destination, source) = (ends.destination.spawn().unwrap(), source.spawn().unwrap());
    until("it runs there", || ends.far.runs() && destination.progress().pages.normal > 0);
    ends.breakers.lock().unwrap().drain(..).for_each(|breaker| breaker.reset());
    let (sent, arrived) = (source.wait().unwrap(), destination.wait().unwrap());
    assert_eq!((sent.outcome, arrived.ending), (Outcome::Incomplete, Ending::Incomplete));
    assert!(!ends.near.runs() && ends.far.runs());
    // At once, after 5, 10, 20, 40, 80 and 160 ms, and eight after the end of the time.
    let attempts = attempts.load(Ordering::Relaxed);
    assert!((1..=15).contains(&attempts), "{attempts}");
}

/// Bytes that are sent arrive, and are not acknowledged.
struct Unacknowledged(Box<dyn ByteSink>);

impl Sealed for Unacknowledged {}

impl ByteSink for Unacknowledged {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        self.0.send(parts, stop)
    }

    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.0.flush(stop)
    }

    fn position(&self) -> u64 {
        self.0.position()
    }

    fn under_way(&self) -> u64 {
        1
    }
}

fn unacknowledged(back: Box<dyn ByteSink>) -> Box<dyn ByteSink> {
    Box::new(Unacknowledged(back))
}

/// The connection is lost while the destination can't know whether its answer has made the guest its own: it neither
/// starts nor discards it until the source connects again.
#[test]
fn a_loss_between_the_answer_and_its_acknowledgement_leaves_no_guest_that_runs_nowhere() {
    for round in 0..3 {
        let set = |postcopy: &mut PostcopySettings| postcopy.preempt = round == 1;
        let ends = SocketEnds::with_back(&[2000, 7], true, set, unacknowledged);
        let SocketEnds { source, destination, from, to, near, far, breakers, .. } = ends;
        let control = source.control();
        let (destination, source) = (destination.spawn().unwrap(), source.spawn().unwrap());
        until("the source has the answer", || source.progress().status == Status::PostcopyActive);
        assert!(!far.runs() && !near.runs(), "not known there yet");
        breakers.lock().unwrap().drain(..).for_each(|breaker| breaker.reset());
        until("it runs there", || far.runs());
        control.set_postcopy_bandwidth(None);
        let (sent, arrived) = (source.wait().unwrap(), destination.wait().unwrap());
        assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
        assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
        assert!(!near.runs() && far.runs());
        for block in 0..2 {
            assert!(bytes(&from, block) == bytes(&to, block), "block {block} differs");
        }
    }
}

/// The source does not connect again: the received pages are discarded, and the guest is never started.
#[test]
fn a_guest_that_its_source_may_have_is_not_started_where_no_other_connection_comes() {
    for closes in [true, false] {
        let set = |postcopy: &mut PostcopySettings| postcopy.reconnect_timeout = Duration::from_secs(1);
        let mut ends = SocketEnds::with_back(&[2000], true, set, unacknowledged);
        ends.destination.settings_mut().finish_timeout = Duration::from_millis(300);
        let source = if closes { ends.source.with_reconnect(Box::<Closes>::default()) } else { ends.source };
        let control = source.control();
        let (destination, source) = (ends.destination.spawn().unwrap(), source.spawn().unwrap());
        until("the source has the answer", || source.progress().status == Status::PostcopyActive);
        if !closes {
            // It does not try.
            control.pause().unwrap();
        }
        ends.breakers.lock().unwrap().drain(..).for_each(|breaker| breaker.reset());
        let (arrived, sent) = (destination.wait().unwrap(), source.wait().unwrap());
        assert_eq!((sent.outcome, arrived.ending), (Outcome::Incomplete, Ending::Discarded));
        assert!(!ends.near.runs() && !ends.far.runs());
        let text = arrived.error.as_ref().map(ToString::to_string).unwrap_or_default();
        assert!(text.contains("no other connection") && text.contains("at its source"), "{text}");
    }
}
