//! One suite for every link: the same cases for both ends of every kind of connection.
//!
//! A new transport is a row in [`kinds`]; a test checks that each scheme has one.

#![allow(clippy::unwrap_used)]

mod ends;
mod kinds;

use std::sync::Arc;
use std::time::Duration;

use ends::{Ended, PAGES, Reader, Sender, fill, memory, page, run};
pub(in crate::transport) use kinds::Ends;
use kinds::{KINDS, Kind};

use crate::error::Chain;
use crate::guest::MappedGuest;
use crate::observe::PageCounts;
use crate::ram::{PageRun, RoundKind, Verdict};
use crate::sys::{CancelToken, RecvPart, Stop, StopReason};
use crate::transport::{Address, ChannelError, OpenError, Target};

/// Ten times what any case needs on a busy machine.
const LIMIT: Duration = Duration::from_secs(300);

fn stop() -> Stop {
    Stop::on(&CancelToken::default()).within(LIMIT)
}

/// Runs `source` and `destination` on the two ends of a connection of `kind`.
fn connect<S: Send, D: Send>(
    kind: &Kind,
    (from, to): (&Arc<MappedGuest>, &Arc<MappedGuest>),
    source: impl FnOnce(Sender) -> S + Send,
    destination: impl FnOnce(Result<Reader, OpenError>) -> D + Send,
) -> (S, D) {
    let Ends { source: make_source, destination: make_destination } = (kind.make)(from.clone());
    let to = to.clone();
    let at_source = move || {
        let (connection, held) = make_source().unwrap();
        let done = source(Sender::new(connection));
        drop(held);
        done
    };
    let at_destination = move || match make_destination() {
        Ok((connection, held)) => {
            let done = destination(Ok(Reader::new(connection, to)));
            drop(held);
            done
        }
        Err(error) => destination(Err(error)),
    };
    std::thread::scope(|scope| {
        if !kind.both_at_once {
            let sent = scope.spawn(at_source).join().unwrap();
            return (sent, scope.spawn(at_destination).join().unwrap());
        }
        let arrives = scope.spawn(at_destination);
        let sends = scope.spawn(at_source);
        (sends.join().unwrap(), arrives.join().unwrap())
    })
}

fn for_each_kind(case: impl Fn(&Kind)) {
    for kind in KINDS {
        println!("{}", kind.name);
        case(kind);
    }
}

/// Every third page from the second one on is zero, in runs of seven; the others hold their number.
fn mixed() -> (Arc<MappedGuest>, Vec<(PageRun, Verdict)>) {
    let memory = memory(0);
    let mut runs: Vec<(PageRun, Verdict)> = Vec::new();
    for at in (0..PAGES).step_by(7) {
        let verdict = if at / 7 % 3 == 1 { Verdict::Zero } else { Verdict::Whole };
        let pages = 7.min(PAGES - at);
        if verdict == Verdict::Whole {
            (at..at + pages).for_each(|page| fill(&memory, page, 1 + (page % 255) as u8));
        }
        runs.push((run(at, pages), verdict));
    }
    (memory, runs)
}

#[test]
fn every_scheme_of_the_table_is_in_the_suite() {
    let of_rdma = cfg!(feature = "rdma");
    for form in Address::forms().split([' ', ',']).filter(|form| form.contains(':')) {
        let (scheme, _) = form.split_once(':').unwrap();
        let covered = KINDS.iter().any(|kind| kind.scheme == scheme);
        assert!(covered || scheme == "rdma" && !of_rdma, "{scheme}: is in no case; add a row to kinds.rs");
    }
    for kind in KINDS {
        let known = Address::forms().contains(&format!("{}:", kind.scheme));
        assert!(known, "{}: there is no such scheme", kind.scheme);
    }
}

#[test]
fn pages_arrive_as_sent_and_zero_pages_take_old_bytes_away() {
    for_each_kind(|kind| {
        let (from, runs) = mixed();
        let to = memory(0xee);
        let sends = |mut sender: Sender| {
            let stop = stop();
            sender.set_up(&stop).unwrap();
            sender.round(RoundKind::Live, &runs, &stop).unwrap();
            sender.round(RoundKind::Final, &[], &stop).unwrap();
            assert_eq!(sender.come_back(), PAGES, "{}: all batches come back", kind.name);
            let sent = sender.link.sent_pages();
            sender.finish(&stop).unwrap();
            (sent, sender.link.page_channels(), sender.link.abilities().confirms_placement)
        };
        let arrives = |reader: Result<Reader, OpenError>| {
            let mut reader = reader.unwrap();
            let stop = stop();
            let ended = reader.read(&stop, |_| true);
            let counts = reader.placer.as_ref().map(|placer| placer.counts());
            let channels = (reader.link.placed_pages(), reader.link.abilities().page_channels);
            reader.end(&stop);
            (ended, counts, channels)
        };
        let ((sent, its_channels, confirms), (ended, counts, (placed, channels))) =
            connect(kind, (&from, &to), sends, arrives);
        assert!(matches!(ended, Ended::Whole), "{}: {ended:?}", kind.name);
        for at in 0..PAGES {
            assert!(page(&from, at) == page(&to, at), "{}: page {at} is another", kind.name);
        }
        if kind.both_at_once {
            assert_eq!(its_channels, channels, "{}: both ends tell as many channels", kind.name);
            assert_eq!(sent[1..], placed[..], "{}: page channels", kind.name);
        }
        if !confirms {
            let total = |counts: &[PageCounts]| counts.iter().map(|c| c.normal + c.zero).sum::<u64>();
            assert_eq!(total(&sent), PAGES, "{}: sent", kind.name);
            assert_eq!(counts.map(|counts| counts.normal + counts.zero), Some(PAGES), "{}", kind.name);
        }
    });
}

#[test]
fn no_page_of_a_later_round_is_there_when_a_round_is_over() {
    const ROUNDS: u8 = 12;
    const MOVED: u64 = 300;
    for kind in KINDS.iter().filter(|kind| kind.keeps_rounds) {
        let (from, to) = (memory(0), memory(0));
        let memory = from.clone();
        let sends = |mut sender: Sender| {
            let stop = stop();
            sender.set_up(&stop).unwrap();
            for round in 1..=ROUNDS {
                (0..MOVED).for_each(|page| fill(&memory, page, round));
                sender.round(RoundKind::Live, &[(run(0, MOVED), Verdict::Whole)], &stop).unwrap();
            }
            sender.round(RoundKind::Final, &[], &stop).unwrap();
            sender.finish(&stop).unwrap();
        };
        let arrives = |reader: Result<Reader, OpenError>| {
            let mut reader = reader.unwrap();
            let (stop, mut round) = (stop(), 0);
            let ended = reader.read(&stop, |memory| {
                round += 1;
                for at in 0..MOVED {
                    let first = page(memory, at)[0];
                    assert_eq!(first, round, "{}: page {at} after round {round}", kind.name);
                }
                true
            });
            reader.end(&stop);
            (ended, round)
        };
        let ((), (ended, rounds)) = connect(kind, (&from, &to), sends, arrives);
        assert!(matches!(ended, Ended::Whole), "{}: {ended:?}", kind.name);
        assert_eq!(rounds, ROUNDS, "{}: each round was seen", kind.name);
    }
}

/// True if the text names the peer of `kind`.
fn names_peer(kind: &Kind, error: &(dyn std::error::Error + 'static)) -> bool {
    let text = Chain(error).to_string();
    kind.peer.iter().any(|peer| text.contains(peer))
}

#[test]
fn a_destination_that_leaves_is_an_error_that_names_it_and_every_batch_comes_back() {
    for kind in KINDS.iter().filter(|kind| kind.both_at_once) {
        let (from, to) = (memory(7), memory(0));
        let sends = |mut sender: Sender| {
            let stop = stop();
            let error = (|| {
                sender.set_up(&stop)?;
                loop {
                    sender.round(RoundKind::Live, &[(run(0, PAGES), Verdict::Whole)], &stop)?;
                }
            })();
            let error: crate::transport::MoveError = match error {
                Ok(never) => never,
                Err(error) => error,
            };
            assert!(names_peer(kind, &error), "{}: {}", kind.name, Chain(&error));
            assert_eq!(sender.given_back(), sender.offered, "{}: each batch comes back once", kind.name);
        };
        let leaves = |reader: Result<Reader, OpenError>| {
            let mut reader = reader.unwrap();
            let ended = reader.read(&stop(), |_| false);
            assert!(matches!(ended, Ended::Cut), "{}: {ended:?}", kind.name);
            reader.link.revoke();
        };
        connect(kind, (&from, &to), sends, leaves);
        assert_eq!(Arc::strong_count(&from), 1, "{}: nothing of the source's memory is lent", kind.name);
        assert_eq!(Arc::strong_count(&to), 1, "{}: nobody has the destination's memory", kind.name);
    }
}

#[test]
fn a_source_that_leaves_in_a_round_is_no_end_of_ram() {
    for_each_kind(|kind| {
        let (from, to) = (memory(7), memory(0));
        let leaves = |mut sender: Sender| {
            let stop = stop();
            sender.set_up(&stop).unwrap();
            sender.round(RoundKind::Live, &[(run(0, PAGES), Verdict::Whole)], &stop).unwrap();
            sender.open(RoundKind::Live, &stop).unwrap();
            sender.offer(&[(run(0, PAGES / 2), Verdict::Whole)], &stop).unwrap();
        };
        let arrives = |reader: Result<Reader, OpenError>| {
            let mut reader = match reader {
                Ok(reader) => reader,
                // Some notice immediately that it is incomplete.
                Err(error) if names_peer(kind, &error) => return,
                Err(error) => panic!("{}: {}", kind.name, Chain(&error)),
            };
            let ended = reader.read(&stop(), |_| true);
            match &ended {
                Ended::Cut => {}
                Ended::Failed(error) if names_peer(kind, &**error) => {}
                other => panic!("{}: {other:?}", kind.name),
            }
            reader.link.revoke();
        };
        connect(kind, (&from, &to), leaves, arrives);
        assert_eq!(Arc::strong_count(&from), 1, "{}: nothing of the source's memory is lent", kind.name);
        assert_eq!(Arc::strong_count(&to), 1, "{}: nobody has the destination's memory", kind.name);
    });
}

#[test]
fn a_cancel_ends_a_wait_at_the_destination() {
    for kind in KINDS.iter().filter(|kind| kind.both_at_once) {
        let (from, to) = (memory(7), memory(0));
        let sends = |mut sender: Sender| {
            // It fails when the other end has disconnected.
            let _ = sender.set_up(&stop());
        };
        let waits = |reader: Result<Reader, OpenError>| {
            let mut reader = reader.unwrap();
            let cancel = CancelToken::default();
            let stop = Stop::on(&cancel);
            cancel.cancel();
            let waited = reader.link.stream().recv(&mut [RecvPart::Own(&mut [0; 8])], &stop);
            let stopped = matches!(waited, Err(ChannelError::Stopped { reason: StopReason::Cancelled, .. }));
            assert!(stopped, "{}: {waited:?}", kind.name);
        };
        connect(kind, (&from, &to), sends, waits);
    }
}

#[test]
fn an_address_gives_back_what_it_was_made_of() {
    assert_eq!(Address::tcp("::1", 4).target(), &Target::Host { host: "::1".into(), port: 4 });
    assert_eq!(Address::unix("/a").path(), Some(std::path::Path::new("/a")));
    assert!(Address::auto("h", 1).decides_late() && !Address::rdma("h", 1).decides_late());
}
