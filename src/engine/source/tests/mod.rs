mod handover;
mod postcopy;
mod precopy;
mod resume;

use super::{SourceAction as A, SourceEvent as E, *};
use Next::{Does, Waits};

const PAGE: u64 = 4096;

/// What follows an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Does(A),
    Waits(Waiting),
    /// The current action continues.
    GoesOn,
}

trait Step {
    fn step(&mut self, now: Duration, event: E) -> Next;
    /// True if it is in time.
    fn cancel_at_once(&mut self) -> bool;
}

impl Step for SourceEngine {
    fn step(&mut self, now: Duration, event: E) -> Next {
        self.handle(now, event);
        match (self.poll(), self.waits_for()) {
            (Some(action), _) => Does(action),
            (None, Some(waiting)) => Waits(waiting),
            (None, None) => Next::GoesOn,
        }
    }

    fn cancel_at_once(&mut self) -> bool {
        let refused = Does(A::RefuseCancel);
        let answer = self.step(Duration::ZERO, E::Cancel);
        assert!(answer == Does(A::RollBack) || answer == refused, "{answer:?}");
        answer != refused
    }
}

fn engine() -> SourceEngine {
    SourceEngine::new(SourceConfig::new(PAGE, Handover::Native))
}

/// Pages that travel whole.
fn sent(pages_left: u64, bytes: u64) -> E {
    E::Sent { pages_left, sent: Sent { guest: bytes, wire: bytes } }
}

/// Walks an engine to its first sync, at time zero.
fn started(mut engine: SourceEngine) -> SourceEngine {
    assert_eq!(engine.step(Duration::ZERO, E::Begin), Does(A::StartLogs));
    assert_eq!(engine.step(Duration::ZERO, E::Done), Does(A::SendHeader));
    assert_eq!(engine.step(Duration::ZERO, E::Done), Does(A::SendSetup));
    let set_up = E::SetUp { handover: engine.config.handover };
    assert_eq!(engine.step(Duration::ZERO, set_up), Does(A::Sync { last: false }));
    engine
}

fn one_round(engine: &mut SourceEngine, from_ms: u64, pages: u64, took_ms: u64) {
    round_of(engine, from_ms, (pages, pages * PAGE), took_ms);
}

fn round_of(engine: &mut SourceEngine, from_ms: u64, (pages, bytes): (u64, u64), took_ms: u64) {
    let ms = Duration::from_millis;
    let open = engine.step(ms(from_ms), E::Synced { dirty_pages: pages });
    assert!(matches!(open, Does(A::OpenRound { kind: RoundKind::Live, .. })), "{open:?}");
    assert!(matches!(engine.step(ms(from_ms), E::Done), Does(A::Send)));
    let sent = E::Sent { pages_left: 0, sent: Sent { guest: pages * PAGE, wire: bytes } };
    let close = engine.step(ms(from_ms + took_ms), sent);
    assert_eq!(close, Does(A::CloseRound { kind: RoundKind::Live }));
    assert_eq!(engine.step(ms(from_ms + took_ms), E::Done), Does(A::Sync { last: false }));
}

fn end_of(outcome: Outcome) -> Next {
    Does(A::Finish(outcome))
}

/// No event at the wrong moment, from a peer, a fault or a user, does more than fail the migration. It never hands over
/// the guest or takes it back.
#[test]
fn any_event_at_any_moment_keeps_the_guest_on_one_side() {
    let all = [
        E::Begin,
        E::Done,
        E::SetUp { handover: Handover::Native },
        E::Synced { dirty_pages: 3 },
        sent(3, PAGE),
        E::Filled { pages_left: 3 },
        E::Failed,
        E::Lost,
        E::Woken,
        E::Working,
        E::Ready,
        E::Running,
        E::Taken,
        E::Requested,
        E::Refused,
        E::Cancel,
        E::StartPostcopy,
        E::Continue,
        E::UpstreamStopped,
        E::GuestGiven,
    ];
    // Any two events after every prefix of a migration, polled or not.
    let walk = [
        E::Begin,
        E::Done,
        E::Done,
        E::SetUp { handover: Handover::Native },
        E::Synced { dirty_pages: 0 },
        E::Done,
        sent(0, 0),
    ];
    let walk = walk.into_iter().chain([
        E::Done,
        E::Synced { dirty_pages: 0 },
        E::Done,
        E::Synced { dirty_pages: 0 },
        E::Done,
    ]);
    let walk: Vec<E> =
        walk.chain([sent(0, 0), E::Done, E::Done, E::Done, E::Ready, E::Done, E::Running, E::Done]).collect();
    for (length, polls) in (0..=walk.len()).flat_map(|length| [(length, true), (length, false)]) {
        for (first, second) in all.into_iter().flat_map(|first| all.map(|second| (first, second))) {
            let mut engine = SourceEngine::new(SourceConfig::new(PAGE, Handover::Native));
            for event in &walk[..length] {
                engine.step(Duration::ZERO, *event);
            }
            let mut given = engine.is_committed();
            for event in [first, second] {
                engine.handle(Duration::ZERO, event);
                let action = if polls { engine.poll() } else { None };
                let what = format!("{first:?}, {second:?} after {:?}", &walk[..length]);
                assert!(!given || engine.is_committed(), "taken back: {what}");
                assert!(!given || action != Some(A::RollBack), "rolled back: {what}");
                assert!(given || action != Some(A::Release), "released before COMMIT: {what}");
                given = engine.is_committed();
            }
        }
    }
}
