//! Pages that threads wait for: on a connection of their own, counted, and their memory at the source.

use super::super::bytes;
use super::{SocketEnds, touch, until};
use crate::engine::{Ending, Outcome, PostcopyRule};
use crate::guest::MappedGuest;
use crate::session::tests::ends_with;
use crate::session::*;
use crate::transport::StreamOptions;
use crate::units::BlockIndex;

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

/// Two vCPUs wait for pages, one of them for most, and so does a thread that runs no vCPU.
#[test]
fn the_time_that_vcpus_wait_for_pages_is_told_apart() {
    const PAGES: u64 = 2000;
    let mut ends = SocketEnds::new(&[PAGES], true, |_| {});
    let vcpus = ends.destination.settings_mut().vcpu_threads.clone();
    let SocketEnds { source, destination, to, far, .. } = ends;
    let control = source.control();
    let (destination, source) = (destination.spawn().unwrap(), source.spawn().unwrap());
    until("it runs there", || far.runs());
    touch(&to, PAGES - 5..PAGES);
    // As long as only one vCPU is known, its waits are those of all.
    let both_are_known = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        for vcpu in 0..2 {
            let (to, vcpus, both_are_known) = (&to, vcpus.clone(), &both_are_known);
            scope.spawn(move || {
                vcpus.enter(vcpu);
                both_are_known.wait();
                touch(to, if vcpu == 0 { PAGES - 60..PAGES - 20 } else { PAGES - 20..PAGES - 10 });
            });
        }
    });
    let now = destination.progress();
    assert_eq!(now.page_waits.as_ref().map(|waits| waits.vcpus.len()), Some(2), "while it runs");
    assert!(now.query_migrate()["postcopy-vcpu-blocktime"].is_array());
    control.set_postcopy_bandwidth(None);
    let (sent, arrived) = (source.wait().unwrap(), destination.wait().unwrap());
    assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
    let waits = arrived.missing_pages.unwrap().waits;
    assert_eq!(Some(&waits), arrived.statistics.page_waits.as_ref());
    let counts: Vec<_> = waits.vcpus.iter().map(|vcpu| (vcpu.vcpu, vcpu.waits.count)).collect();
    // A page that came just before needs no wait.
    assert!(matches!(counts[..], [(0, 1..=40), (1, 1..=10)]), "{counts:?}");
    assert!((1..=5).contains(&waits.others.count), "{waits:?}");
    let blocked = waits.vcpus.iter().map(|vcpu| vcpu.blocked_ns);
    assert!(blocked.clone().all(|time| time >= waits.all_blocked_ns && time > 0), "{waits:?}");
    assert_eq!(waits.all.count, waits.others.count + counts[0].1 + counts[1].1);
    assert_eq!(waits.distribution.iter().sum::<u64>(), waits.all.count);
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
