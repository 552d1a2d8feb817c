#![allow(clippy::unwrap_used)]

use super::*;
use crate::ram::{BlockName, RamBlock, RamBlockTable};
use crate::units::PageSize;

fn table(pages: u64) -> RamBlockTable {
    let block = RamBlock::new(BlockName::new("ram").unwrap(), pages * 4096);
    RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap()
}

fn run(first: u64, pages: u64) -> PageRun {
    PageRun { block: BlockIndex(0), first: PageIndex(first), pages }
}

fn all(pages: u64) -> PageSet {
    let mut set = PageSet::new(&table(pages));
    set.add(run(0, pages));
    set
}

fn config() -> SnapshotConfig {
    SnapshotConfig { slots: 2, trays: 4, tray_pages: 4, stall_timeout: Duration::from_secs(30) }
}

const NOW: Duration = Duration::ZERO;

/// Up to the first page, of 16 pages all of which hold something.
fn copying() -> SnapshotEngine {
    let mut engine = SnapshotEngine::new(config());
    engine.handle(NOW, SnapshotEvent::Begin);
    use SnapshotAction::{Arm, Open, Pause, Protect, Resume, SaveState};
    for action in [Open, Arm, Pause, SaveState, Protect, Resume] {
        assert_eq!(engine.poll(), Some(action));
        assert_eq!(engine.poll(), None, "an answer is due");
        engine.handle(
            NOW,
            if action == Protect { SnapshotEvent::Protected(all(16)) } else { SnapshotEvent::Done },
        );
    }
    engine
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
    engine.handle(late, SnapshotEvent::Resumed { runs: true });
    assert_eq!(engine.poll(), Some(SnapshotAction::Abandon));
    engine.handle(late, SnapshotEvent::Done);
    assert_eq!(engine.poll(), Some(SnapshotAction::Finish(SnapshotOutcome::Failed)));
}

/// Any two events at any moment: no panic, no order broken, and the end comes.
#[test]
fn any_events_at_any_moment_come_to_an_end() {
    let events = |at: usize| {
        [
            SnapshotEvent::Begin,
            SnapshotEvent::Done,
            SnapshotEvent::Failed,
            SnapshotEvent::Protected(all(16)),
            SnapshotEvent::Resumed { runs: false },
            SnapshotEvent::Resumed { runs: true },
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
        (0..30).flat_map(|m| (0..13).flat_map(move |a| (0..13).map(move |b| (m, a, b))))
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
                Some(SnapshotAction::Protect) => engine.handle(NOW, SnapshotEvent::Protected(all(16))),
                Some(SnapshotAction::Copy { place, .. }) => {
                    engine.handle(NOW, SnapshotEvent::Done);
                    engine.handle(NOW, SnapshotEvent::Freed(place));
                }
                Some(_) => engine.handle(NOW, SnapshotEvent::Done),
                None => engine.handle(NOW, SnapshotEvent::Resumed { runs: true }),
            }
        }
        assert!(outcome.is_some(), "{moment}: {:?}, {:?}", events(first), events(second));
    }
}
