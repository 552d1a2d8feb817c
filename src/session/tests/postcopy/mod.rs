//! A switch to postcopy between two ramwires.
#![allow(clippy::unwrap_used)]

mod channels;
mod doubt;
mod urgent;

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Machine, bytes, ends_with, guest};
use crate::engine::{Ending, Outcome, PostcopyRule};
use crate::guest::MappedGuest;
use crate::observe::Status;
use crate::session::*;
use crate::stream::qemu::file::Configuration;
use crate::sys::Stop;
use crate::transport::{
    Address, AllowList, ByteSink, Listener, OpenError, StreamBreaker, StreamChannel, StreamOptions, connect,
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
        (settings.guest_is_paused, settings.postcopy) = (true, Some(postcopy));
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

/// The embedder has made the descriptor before it gave up its rights.
#[test]
fn a_descriptor_that_is_handed_in_serves_a_process_without_rights() {
    let postcopy = Some(PostcopySettings::new(PostcopyRule::AfterRounds(0)));
    let mut ends = ends_with(|settings| (settings.verify, settings.postcopy) = (Verify::Off, postcopy));
    ends.destination.settings_mut().postcopy = true;
    let made = userfaultfd::UffdBuilder::new()
        .user_mode_only(true)
        .require_features(userfaultfd::FeatureFlags::MISSING_SHMEM)
        .create()
        .unwrap();
    let faults = crate::sys::MissingFaults::adopt(crate::sys::duplicate(&made).unwrap()).unwrap();
    let destination = ends.destination.with_missing_faults(faults);
    let thread = std::thread::spawn(move || {
        let _ = rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(65534));
        destination.run()
    });
    let sent = ends.source.run();
    let arrived = thread.join().unwrap();
    assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running), "{:?}", arrived.error);
    assert!(!ends.source_machine.runs());
}

/// Reads pages of a guest that runs where they are missing, as its vCPU would.
fn touch(to: &MappedGuest, pages: std::ops::Range<u64>) {
    for page in pages {
        let mut bytes = [0; 4096];
        to.region(BlockIndex(0)).unwrap().span(page * 4096, 4096).unwrap().copy_to(&mut bytes);
        assert_eq!(bytes, [page as u8 | 1; 4096], "page {page}");
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
