#![allow(clippy::unwrap_used)]

use super::*;
use crate::ram::{BlockName, RamBlock, RamBlockTable};
use crate::units::{BlockIndex, PageIndex, PageSize};

pub(super) fn table(pages: u64) -> RamBlockTable {
    let block = RamBlock::new(BlockName::new("ram").unwrap(), pages * 4096);
    RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap()
}

pub(super) fn run(first: u64, pages: u64) -> PageRun {
    PageRun { block: BlockIndex(0), first: PageIndex(first), pages }
}

fn all(pages: u64) -> PageSet {
    let mut set = PageSet::new(&table(pages));
    set.add(run(0, pages));
    set
}

fn config() -> SnapshotConfig {
    SnapshotConfig {
        slots: 2,
        trays: 4,
        tray_pages: 4,
        protect_pages: 8,
        lift_pages: 4,
        pause_goal: Duration::from_millis(1),
        stall_timeout: Duration::from_secs(30),
    }
}

const NOW: Duration = Duration::ZERO;

/// Performs the requested actions, up to the action `until`, which is then in progress.
fn up_to(engine: &mut SnapshotEngine, until: SnapshotAction) {
    for _ in 0..100 {
        let action = engine.poll();
        if action == Some(until) {
            return;
        }
        engine.handle(NOW, answer_to(action));
    }
    panic!("it does not come to {until:?}");
}

/// Pages that are reported once.
fn answer_to(action: Option<SnapshotAction>) -> SnapshotEvent {
    match action {
        Some(SnapshotAction::Look) => SnapshotEvent::Found(all(16)),
        Some(_) => SnapshotEvent::Done,
        None => SnapshotEvent::Returned { done: true },
    }
}

/// Up to the first page, of 16 pages all of which hold something.
fn copying() -> SnapshotEngine {
    let mut engine = SnapshotEngine::new(config());
    engine.handle(NOW, SnapshotEvent::Begin);
    up_to(&mut engine, SnapshotAction::Resume);
    engine.handle(NOW, SnapshotEvent::Done);
    engine
}

#[test]
fn memory_is_protected_while_the_guest_runs_and_what_it_writes_again_while_it_stands_still() {
    use SnapshotAction::{Arm, Lift, Look, Open, Pause, Protect, Resume, SaveState, Track};
    let mut engine = SnapshotEngine::new(config());
    engine.handle(NOW, SnapshotEvent::Begin);
    let none = || SnapshotEvent::Found(PageSet::new(&table(16)));
    let step = |engine: &mut SnapshotEngine, action, event| {
        assert_eq!(engine.poll(), Some(action));
        assert_eq!(engine.poll(), None, "an answer is due");
        engine.handle(NOW, event);
    };
    let done = || SnapshotEvent::Done;
    step(&mut engine, Open, done());
    step(&mut engine, Track, done());
    step(&mut engine, Arm, done());
    let mut first = PageSet::new(&table(16));
    first.add(run(0, 12));
    step(&mut engine, Look, SnapshotEvent::Found(first));
    step(&mut engine, Protect { run: run(0, 8) }, done());
    engine.handle(NOW, SnapshotEvent::Fault(run(2, 1)));
    step(&mut engine, Lift { run: run(0, 4) }, done());
    step(&mut engine, Protect { run: run(8, 4) }, done());
    step(&mut engine, Look, none());
    step(&mut engine, Protect { run: run(0, 4) }, done());
    step(&mut engine, Pause, done());
    engine.handle(NOW, SnapshotEvent::Fault(run(9, 1)));
    step(&mut engine, Lift { run: run(8, 4) }, done());
    assert_eq!(engine.poll(), None, "the guest does not stand still yet");
    engine.handle(NOW, SnapshotEvent::Returned { done: true });
    step(&mut engine, SaveState, done());
    engine.handle(NOW, SnapshotEvent::Fault(run(5, 1)));
    step(&mut engine, Lift { run: run(4, 4) }, done());
    engine.handle(NOW, SnapshotEvent::Returned { done: true });
    let mut late = PageSet::new(&table(16));
    late.add(run(14, 1));
    step(&mut engine, Look, SnapshotEvent::Found(late));
    step(&mut engine, Protect { run: run(4, 4) }, done());
    step(&mut engine, Protect { run: run(8, 4) }, done());
    step(&mut engine, Protect { run: run(14, 1) }, done());
    step(&mut engine, Resume, done());
    assert_eq!((engine.figures().early, engine.figures().faults), (3, 0));
}

/// A guest that opens as much as is protected is paused nevertheless; one that opens less and less, when little is
/// left.
#[test]
fn passes_end_when_little_is_left_or_no_less() {
    for (opens, passes) in [([4, 4, 4, 4], 2), ([8, 4, 2, 1], 4)] {
        let mut engine = SnapshotEngine::new(SnapshotConfig { lift_pages: 1, protect_pages: 1, ..config() });
        let (mut now, mut looks) = (NOW, 0);
        engine.handle(now, SnapshotEvent::Begin);
        for _ in 0..200 {
            let action = engine.poll().unwrap();
            let event = match action {
                SnapshotAction::Pause => break,
                SnapshotAction::Look if looks == 0 => SnapshotEvent::Found(all(16)),
                SnapshotAction::Look => SnapshotEvent::Found(PageSet::new(&table(16))),
                _ => SnapshotEvent::Done,
            };
            looks += usize::from(action == SnapshotAction::Look);
            let SnapshotAction::Protect { run } = action else {
                engine.handle(now, event);
                continue;
            };
            now += Duration::from_millis(1);
            engine.handle(now, event);
            // Every other page, so that no two are protected by one action.
            if run.first.0 % 2 == 0 && run.first.0 / 2 < opens[looks - 1] {
                engine.handle(now, SnapshotEvent::Fault(run));
            }
        }
        assert_eq!(looks, passes, "{opens:?}");
    }
}

#[test]
fn what_a_thread_waits_for_comes_first_and_is_lifted_behind_its_copy() {
    let mut engine = copying();
    let copy = |first, pages, place| Some(SnapshotAction::Copy { run: run(first, pages), place });
    assert_eq!(engine.poll(), copy(0, 4, Place::Tray));
    engine.handle(NOW, SnapshotEvent::Fault(run(9, 1)));
    engine.handle(NOW, SnapshotEvent::Fault(run(2, 1)));
    engine.handle(NOW, SnapshotEvent::Done);
    assert_eq!(engine.poll(), Some(SnapshotAction::Lift { run: run(0, 4) }));
    engine.handle(NOW, SnapshotEvent::Done);
    assert_eq!(engine.poll(), copy(9, 1, Place::Slot), "page 2 was lifted with its neighbours");
    engine.handle(NOW, SnapshotEvent::Done);
    assert_eq!(engine.poll(), Some(SnapshotAction::Lift { run: run(9, 1) }));
    engine.handle(NOW, SnapshotEvent::Done);
    for (first, pages) in [(4, 4), (8, 1)] {
        assert_eq!(engine.poll(), copy(first, pages, Place::Tray));
        engine.handle(NOW, SnapshotEvent::Done);
        engine.poll();
        engine.handle(NOW, SnapshotEvent::Done);
    }
    assert_eq!(engine.poll(), None, "the last tray is left to writers");
    assert_eq!((engine.figures().faults, engine.figures().latency.summary().count), (2, 2));
    engine.handle(NOW, SnapshotEvent::Freed(Place::Tray));
    assert_eq!(engine.poll(), copy(10, 2, Place::Tray));
}

#[test]
fn a_target_that_takes_nothing_more_fails_the_snapshot_and_no_thread_waits_on() {
    let mut engine = copying();
    while let Some(action) = engine.poll() {
        assert!(matches!(action, SnapshotAction::Copy { .. } | SnapshotAction::Lift { .. }));
        engine.handle(NOW, SnapshotEvent::Done);
    }
    let late = engine.wake_at().unwrap();
    engine.handle(late / 2, SnapshotEvent::Time);
    assert_eq!(engine.poll(), None);
    engine.handle(late, SnapshotEvent::Time);
    assert_eq!(engine.poll(), Some(SnapshotAction::Disarm));
    engine.handle(late, SnapshotEvent::Done);
    assert_eq!(engine.poll(), None, "the resume has not returned");
    engine.handle(late, SnapshotEvent::Returned { done: true });
    assert_eq!(engine.poll(), Some(SnapshotAction::Abandon));
    engine.handle(late, SnapshotEvent::Done);
    assert_eq!(engine.poll(), Some(SnapshotAction::Finish(SnapshotOutcome::Failed)));
}

/// Any two events at any moment: no panic, no order broken, and the engine ends.
#[test]
fn any_events_at_any_moment_come_to_an_end() {
    let events = |at: usize| {
        [
            SnapshotEvent::Begin,
            SnapshotEvent::Done,
            SnapshotEvent::Failed,
            SnapshotEvent::Found(all(16)),
            SnapshotEvent::Returned { done: false },
            SnapshotEvent::Returned { done: true },
            SnapshotEvent::Fault(run(3, 1)),
            SnapshotEvent::Fault(PageRun { block: BlockIndex(9), first: PageIndex(3), pages: 1 }),
            SnapshotEvent::Freed(Place::Slot),
            SnapshotEvent::Freed(Place::Tray),
            SnapshotEvent::Lost,
            SnapshotEvent::Cancel,
            SnapshotEvent::Time,
        ][at]
            .clone()
    };
    for (moment, first, second) in
        (0..40).flat_map(|m| (0..13).flat_map(move |a| (0..13).map(move |b| (m, a, b))))
    {
        let mut engine = SnapshotEngine::new(config());
        engine.handle(NOW, SnapshotEvent::Begin);
        let mut outcome = None;
        for step in 0..200 {
            if step == moment {
                engine.handle(NOW, events(first));
                engine.handle(NOW, events(second));
            }
            match engine.poll() {
                Some(SnapshotAction::Finish(how)) => {
                    outcome = Some(how);
                    break;
                }
                Some(SnapshotAction::Copy { place, .. }) => {
                    engine.handle(NOW, SnapshotEvent::Done);
                    engine.handle(NOW, SnapshotEvent::Freed(place));
                }
                action => engine.handle(NOW, answer_to(action)),
            }
        }
        assert!(outcome.is_some(), "{moment}: {:?}, {:?}", events(first), events(second));
    }
}
