//! A truncated stream, and a stream with one flipped bit, at every byte outside of pages and at samples of the pages'
//! bytes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ramwire::engine::{Ending, Outcome};
use ramwire::guest::GuestControl;
use ramwire::session::Mismatch;
use ramwire::session::{DestinationReport, Error, SourceReport};
use ramwire::stream::native::Order;
use ramwire::stream::qemu::command::Command;
use ramwire::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, Step};
use ramwire::transport::{Fault, FaultKind, Faulty};

use crate::live::{
    BLOCKS, Live, PAGE, PATIENT, Recorder, assert_moved, assert_stayed, destination, migrate_cleanly, pair,
    settings, source,
};

/// How long the ends wait for bytes that a changed length has announced.
const IMPATIENT: Duration = Duration::from_millis(400);
/// Bytes between two samples of a page.
const SAMPLE: usize = 389;
const WORKERS: usize = 4;
/// Where a flipped bit may have no effect, so that the guest arrives intact and is compared: the ordinary PING's value,
/// which is only echoed; the PING that announces no page channels, which older sources do not send; the newest version
/// of a HELLO; the bits of an end record that QEMU ignores (S-27); the offset of a zero page, if the page that it
/// should have named is zero or is sent again.
const HARMLESS: [&str; 6] = [
    "Command(Ping(1))",
    "Command(Ping(1381450496))",
    "Command(Native(Hello(",
    "RecordsEnd",
    "SectionEnd { ",
    "Zero { ",
];

/// The positions in the stream.
struct Map {
    len: u64,
    /// Bytes of pages: their ranges in the stream, and their positions in RAM.
    pages: Vec<(Range<u64>, u32, u64)>,
    /// The first byte of COMMIT.
    commit: u64,
    /// The event of each byte, for messages.
    events: Vec<(Range<u64>, String)>,
}

impl Map {
    fn of(stream: &[u8]) -> Self {
        let mut parser = IncomingStream::new(IncomingConfig::default());
        let mut map = Self { len: stream.len() as u64, pages: Vec::new(), commit: 0, events: Vec::new() };
        let mut at = 0;
        while at < stream.len() {
            let Step::Event { consumed, event } = parser.next(&stream[at..]).unwrap() else { break };
            let (begin, end) = (at as u64, (at + consumed) as u64);
            map.events.push((begin..end, format!("{event:?}").chars().take(60).collect()));
            match event {
                Event::Page { block, offset, bytes } => {
                    map.pages.push((end - bytes.len() as u64..end, block.0, offset.0));
                }
                Event::Command(Command::Native(Order::Commit { .. })) => map.commit = begin,
                _ => {}
            }
            at += consumed;
        }
        assert_eq!(at, stream.len(), "the recorded stream is whole");
        map
    }

    /// The position in RAM of the byte at `position`, if it is a page's.
    fn page_at(&self, position: u64) -> Option<(u32, u64)> {
        let found = self.pages.iter().find(|(range, ..)| range.contains(&position))?;
        Some((found.1, found.2 + position - found.0.start))
    }

    /// All positions outside of pages, and samples inside.
    fn positions(&self) -> (Vec<u64>, Vec<u64>) {
        let frame = (0..self.len).filter(|at| self.page_at(*at).is_none()).collect();
        let data = self.pages.iter().flat_map(|(range, ..)| range.clone().step_by(SAMPLE)).collect();
        (frame, data)
    }
}

struct Run {
    sent: SourceReport,
    arrived: DestinationReport,
    there: Live,
}

/// One migration with faults in both directions; `seen` records the sent bytes, if given.
fn migrate(
    live: &Live,
    there: &[Fault],
    back: &[Fault],
    patience: Duration,
    seen: Option<&[Arc<Mutex<Vec<u8>>>; 2]>,
) -> Run {
    let (near, far) = pair(patience);
    let arrival = Live::empty();
    let (sink, ear) = near.split();
    let (from, answer) = far.split();
    let (breakers, [forth_bytes, back_bytes]) =
        ((sink.breaker(), answer.breaker()), seen.cloned().unwrap_or_default());
    let sink = Recorder { inner: sink, bytes: forth_bytes };
    let answer = Recorder { inner: answer, bytes: back_bytes };
    let sink = Box::new(Faulty::new(sink, there.iter().copied(), Some(breakers.0)));
    let answer = Box::new(Faulty::new(answer, back.iter().copied(), Some(breakers.1)));
    let target = destination(&arrival, Box::new(from), answer, patience);
    let thread = std::thread::spawn(move || target.run());
    let sent = source(live, Box::new(live.clone()), sink, Box::new(ear), settings(patience)).run();
    Run { sent, arrived: thread.join().unwrap(), there: arrival }
}

/// Conditions that must hold after every run. Leaves the guest running at the source.
fn judge(what: &str, live: &Live, run: &Run) {
    let Run { sent, arrived, there } = run;
    let errors = format!("{what}: source {:?}, destination {:?}", sent.error, arrived.error);
    assert!(!(live.runs() && there.runs()), "{errors}: the guest runs on both sides");
    assert_eq!(there.runs(), arrived.ending == Ending::Running, "{errors}");
    if there.runs() {
        there.assert_whole(what);
    }
    match sent.outcome {
        Outcome::Completed => assert_moved(what, live, there, sent, arrived),
        Outcome::StaysHere(_) => {
            assert_stayed(what, live, sent);
            assert!(arrived.error.is_some(), "{errors}");
        }
        Outcome::Incomplete => panic!("{errors}: no page is missing in precopy"),
        Outcome::InDoubt => {
            assert!(!live.runs() && sent.error.is_some(), "{errors}: the source keeps it still");
            assert!(there.runs() || arrived.error.is_some(), "{errors}");
        }
    }
    live.assert_whole(what);
    live.clone().resume().unwrap();
}

/// Runs `jobs` on several threads, each with a guest of its own that is used for all of its faults.
fn in_parallel<J: Sync>(jobs: &[J], work: impl Fn(&Live, &J) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let live = Live::running(7, 0);
                let mut done = 0;
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(&live, job);
                    done += 1;
                    if done % 50 == 0 {
                        migrate_cleanly(&live, "a clean migration right after a fault");
                    }
                }
                migrate_cleanly(&live, "a clean migration after all faults");
            });
        }
    });
}

/// The bytes of a run without faults in both directions.
fn recorded() -> (Vec<u8>, Vec<u8>) {
    let live = Live::running(7, 0);
    let seen: [Arc<Mutex<Vec<u8>>>; 2] = Default::default();
    let run = migrate(&live, &[], &[], PATIENT, Some(&seen));
    assert_moved("clean", &live, &run.there, &run.sent, &run.arrived);
    let [there, back] = seen.map(|bytes| std::mem::take(&mut *bytes.lock().unwrap()));
    (there, back)
}

/// A bit that differs from byte to byte, so that flags and lengths are flipped at different bits.
fn bit_of(position: u64) -> u8 {
    (position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61) as u8
}

#[test]
fn a_cut_at_any_byte_fails_both_ends_and_the_guest_runs_on() {
    let map = Map::of(&recorded().0);
    let (frame, data) = map.positions();
    let positions: Vec<u64> = frame.iter().chain(&data).copied().chain([map.len]).collect();
    assert!(positions.len() >= 500, "{}", positions.len());
    in_parallel(&positions, |live, at| {
        let what = format!("cut at byte {at} of {}", map.len);
        let run = migrate(live, &[Fault { at: *at, kind: FaultKind::Cut }], &[], IMPATIENT * 10, None);
        let stays = matches!(run.sent.outcome, Outcome::StaysHere(_));
        assert_eq!(stays, *at <= map.commit, "{what}: {:?}: {:?}", run.sent.outcome, run.sent.error);
        let runs_there = *at == map.len;
        assert_eq!(run.arrived.ending == Ending::Running, runs_there, "{what}: {:?}", run.arrived.error);
        judge(&what, live, &run);
    });
    println!("{} cuts, {} of them inside pages", positions.len(), data.len());
}

#[test]
fn a_flipped_bit_at_any_byte_is_refused_and_never_runs() {
    let map = Map::of(&recorded().0);
    let (frame, data) = map.positions();
    let positions: Vec<u64> = frame.iter().chain(&data).copied().collect();
    assert!(positions.len() >= 500, "{}", positions.len());
    let reasons: Mutex<BTreeMap<&'static str, u32>> = Mutex::default();
    let harmless: Mutex<Vec<u64>> = Mutex::default();
    in_parallel(&positions, |live, at| {
        let kind = FaultKind::FlipBit(bit_of(*at));
        let what = format!("bit {} of byte {at} of {} flipped", bit_of(*at), map.len);
        // A page's byte changes no length: no end waits in vain, and the digest must detect it.
        let patience = if map.page_at(*at).is_some() { PATIENT } else { IMPATIENT };
        let run = migrate(live, &[Fault { at: *at, kind }], &[], patience, None);
        match run.sent.outcome {
            Outcome::Completed => harmless.lock().unwrap().push(*at),
            Outcome::StaysHere(_) => assert!(*at < map.commit, "{what}"),
            Outcome::InDoubt => assert!(*at >= map.commit, "{what}: {:?}", run.sent.error),
            Outcome::Incomplete => panic!("{what}: no page is missing in precopy"),
        }
        if let Some((block, offset)) = map.page_at(*at) {
            let Some(Error::Digest(Mismatch::Ram { block: name, from, to })) = &run.arrived.error else {
                panic!("{what}: {:?}", run.arrived.error)
            };
            assert_eq!(name.as_str(), format!("block{block}"), "{what}");
            assert!((from.0..*to).contains(&offset), "{what}: {from:?} to {to}");
            assert!(*to <= BLOCKS[block as usize] * PAGE, "{what}");
        }
        *reasons.lock().unwrap().entry(reason(run.arrived.error.as_ref())).or_default() += 1;
        judge(&what, live, &run);
    });
    println!("{} flips: {:?}", positions.len(), reasons.into_inner().unwrap());
    let mut harmless = harmless.into_inner().unwrap();
    harmless.sort_unstable();
    for at in &harmless {
        let (_, found) = map.events.iter().find(|(range, _)| range.contains(at)).unwrap();
        println!("harmless: bit {} of byte {at} in {found}", bit_of(*at));
        assert!(HARMLESS.iter().any(|known| found.starts_with(known)), "byte {at} in {found}");
    }
}

/// The check that detected it.
fn reason(error: Option<&Error>) -> &'static str {
    match error {
        None => "not at all: the guest arrived whole",
        Some(Error::Decode(_)) => "framing",
        Some(Error::Digest(_)) => "digest",
        Some(Error::OutOfTurn { .. }) => "order",
        Some(Error::Config { .. } | Error::Guest(_)) => "the guest's own blocks",
        Some(Error::Truncated { .. }) => "the source, which broke off",
        Some(Error::Channel(_)) => "a length that was waited for in vain",
        Some(_) => "something else",
    }
}

#[test]
fn answers_cut_or_changed_at_any_byte_leave_one_guest() {
    let (_, back) = recorded();
    let cut = |at| Fault { at, kind: FaultKind::Cut };
    let flip = |at| Fault { at, kind: FaultKind::FlipBit(bit_of(at)) };
    let faults: Vec<Fault> = (0..back.len() as u64).flat_map(|at| [cut(at), flip(at)]).collect();
    in_parallel(&faults, |live, fault| {
        let what = format!("{fault:?} of {} answered bytes", back.len());
        let run = migrate(live, &[], &[*fault], IMPATIENT * 2, None);
        if fault.kind == FaultKind::Cut {
            assert_ne!(run.sent.outcome, Outcome::Completed, "{what}");
        }
        judge(&what, live, &run);
    });
    println!("{} faults on the return path", faults.len());
}

#[test]
fn a_hang_at_either_end_is_ended_by_the_stall_timeout() {
    let map = Map::of(&recorded().0);
    let ats: Vec<u64> = (0..12).map(|part| map.len * part / 12).chain([map.commit, map.commit + 3]).collect();
    in_parallel(&ats, |live, at| {
        let what = format!("nothing is read or written after byte {at}");
        let (near, far) = pair(IMPATIENT);
        let arrival = Live::empty();
        let (sink, ear) = near.split();
        let (from, answer) = far.split();
        let hang = [Fault { at: *at, kind: FaultKind::Hang }];
        let target =
            destination(&arrival, Box::new(Faulty::new(from, hang, None)), Box::new(answer), IMPATIENT);
        let wake = target.cancel_token();
        let thread = std::thread::spawn(move || target.run());
        let begun = std::time::Instant::now();
        let sent =
            source(live, Box::new(live.clone()), Box::new(sink), Box::new(ear), settings(IMPATIENT)).run();
        assert!(begun.elapsed() < PATIENT, "{what}");
        wake.cancel();
        let run = Run { sent, arrived: thread.join().unwrap(), there: arrival };
        assert_ne!(run.sent.outcome, Outcome::Completed, "{what}");
        judge(&what, live, &run);
    });
}

#[test]
fn a_writing_guest_survives_seeded_faults_and_moves_at_last() {
    let len = recorded().0.len() as u64;
    let seeds: Vec<u64> = (0..60).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for worker in 0..WORKERS as u64 {
            let (seeds, next) = (&seeds, &next);
            scope.spawn(move || {
                let live = Live::running(worker, 2000);
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut fault = Fault::seeded(*seed, len);
                    if fault.kind == FaultKind::Hang {
                        // A wrapper that hangs has no stall timeout; the test above covers hangs.
                        fault.kind = FaultKind::Cut;
                    }
                    let what = format!("seed {seed}: {fault:?}");
                    judge(&what, &live, &migrate(&live, &[fault], &[], IMPATIENT, None));
                    live.assert_runs_on(&what);
                }
                migrate_cleanly(&live, "after all seeds");
            });
        }
    });
}
