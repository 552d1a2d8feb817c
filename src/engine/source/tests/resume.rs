use super::*;

/// A migration up to READY, with what follows each event.
fn steps() -> Vec<(E, Next)> {
    let kind = RoundKind::Final;
    vec![
        (E::Synced { dirty_pages: 9 }, Does(A::OpenRound { kind: RoundKind::Live, number: 1 })),
        (E::Done, Does(A::Send)),
        (sent(0, PAGE), Does(A::CloseRound { kind: RoundKind::Live })),
        (E::Done, Does(A::Sync { last: false })),
        (E::Synced { dirty_pages: 0 }, Does(A::PauseGuest)),
        (E::Done, Does(A::Sync { last: true })),
        (E::Synced { dirty_pages: 1 }, Does(A::OpenRound { kind, number: 2 })),
        (E::Done, Does(A::Send)),
        (sent(0, PAGE), Does(A::CloseRound { kind })),
        (E::Done, Does(A::Drain)),
        (E::Done, Does(A::SendState)),
        (E::Done, Waits(Waiting::Ready)),
    ]
}

/// The guest is paused from here on.
const PAUSED: usize = 5;

fn after(count: usize) -> SourceEngine {
    let mut engine = started(engine());
    engine.set_resumable(true);
    for (event, next) in &steps()[..count] {
        assert_eq!(engine.step(Duration::ZERO, *event), *next);
    }
    engine
}

fn step(engine: &mut SourceEngine, event: E) -> Next {
    engine.step(Duration::ZERO, event)
}

/// Before COMMIT the guest runs on here while there is no connection, and the rounds begin again with a sync.
#[test]
fn a_loss_before_commit_is_a_pause_and_the_guest_runs_on() {
    for at in 0..=steps().len() {
        let mut engine = after(at);
        for _ in 0..3 {
            let mut next = step(&mut engine, E::Lost);
            if next == Does(A::ResumeGuest) {
                assert!(at >= PAUSED, "after {at} steps");
                next = step(&mut engine, E::Done);
            }
            assert_eq!(next, Does(A::Reconnect), "after {at} steps");
            assert_eq!(engine.lost(), Some(Lost::BeforeCommit));
            assert!(!engine.is_committed());
            assert_eq!(step(&mut engine, E::Done), Does(A::AskReceived));
            assert_eq!(step(&mut engine, E::Lost), Does(A::Reconnect), "again");
            assert_eq!(step(&mut engine, E::Done), Does(A::AskReceived));
            assert_eq!(step(&mut engine, E::Done), Does(A::CompareReceived));
            assert_eq!(step(&mut engine, E::Done), Does(A::Sync { last: false }), "after {at} steps");
        }
        let open = step(&mut engine, E::Synced { dirty_pages: 1 << 30 });
        assert!(matches!(open, Does(A::OpenRound { kind: RoundKind::Live, .. })), "{open:?}");
    }
}

/// A cancel, or a destination that is not reached again, leaves the guest here.
#[test]
fn a_loss_without_another_connection_ends_as_any_failure_before_commit() {
    for at in 0..=steps().len() {
        for (event, reason) in [
            (E::Cancel, Reason::Cancelled),
            (E::Lost, Reason::Failed),
            (E::Failed, Reason::Failed),
            (E::Refused, Reason::Failed),
        ] {
            let mut engine = after(at);
            if step(&mut engine, E::Lost) == Does(A::ResumeGuest) {
                step(&mut engine, E::Done);
            }
            assert_eq!(step(&mut engine, event), Does(A::RollBack), "{event:?} after {at} steps");
            assert_eq!(step(&mut engine, E::Done), end_of(Outcome::StaysHere(reason)));
        }
        let mut engine = after(at);
        engine.set_resumable(false);
        assert_eq!(step(&mut engine, E::Lost), Does(A::RollBack), "after {at} steps");
    }
}

/// A network that swallows everything ends no connection: silence is a loss, a peer that works is not.
#[test]
fn a_silent_peer_is_a_lost_one() {
    let secs = Duration::from_secs;
    let mut engine = after(steps().len() - 1);
    engine.config.answers.ready = secs(100);
    assert_eq!(step(&mut engine, E::Done), Waits(Waiting::Ready));
    engine.handle(secs(20), E::Working);
    assert_eq!(engine.wake_at(), Some(secs(50)));
    assert_eq!(engine.step(secs(50), E::Woken), Does(A::ResumeGuest));
    assert_eq!(engine.step(secs(50), E::Done), Does(A::Reconnect));
    let mut busy = after(steps().len());
    assert_eq!(busy.step(secs(30), E::Woken), Does(A::RollBack), "it has had all the time for READY");
    let mut committed = after(steps().len());
    step(&mut committed, E::Ready);
    for _ in 0..3 {
        assert_eq!(step(&mut committed, E::Done), Waits(Waiting::Running));
        assert_eq!(committed.step(secs(30), E::Woken), Does(A::Reconnect), "it is asked");
        step(&mut committed, E::Done);
        step(&mut committed, E::Done);
    }
    assert_eq!(step(&mut committed, E::Done), Waits(Waiting::Running));
    assert_eq!(committed.step(secs(30), E::Woken), end_of(Outcome::InDoubt), "not for ever");
}

/// Behind COMMIT the guest never resumes here: it is asked for.
#[test]
fn a_loss_behind_commit_is_resolved_by_asking() {
    for sent in [false, true] {
        let mut engine = after(steps().len());
        assert_eq!(step(&mut engine, E::Ready), Does(A::Commit));
        if sent {
            assert_eq!(step(&mut engine, E::Done), Waits(Waiting::Running));
        }
        for _ in 0..3 {
            assert_eq!(step(&mut engine, E::Lost), Does(A::Reconnect));
            assert!(engine.is_committed() && engine.lost() == Some(Lost::BehindCommit));
            engine.handle(Duration::ZERO, E::Cancel);
            assert!(matches!(engine.poll(), Some(A::RefuseCancel | A::Reconnect) | None));
            assert_eq!(step(&mut engine, E::Done), Does(A::AskReceived));
            assert_eq!(step(&mut engine, E::Lost), Does(A::Reconnect));
            assert_eq!(step(&mut engine, E::Done), Does(A::AskReceived));
            assert_eq!(step(&mut engine, E::Done), Does(A::CompareReceived));
            assert_eq!(step(&mut engine, E::Done), Waits(Waiting::Running));
        }
        let mut doubt = after(steps().len());
        step(&mut doubt, E::Ready);
        step(&mut doubt, E::Lost);
        assert_eq!(step(&mut doubt, E::Lost), end_of(Outcome::InDoubt), "nobody is there to be asked");
        assert_eq!(step(&mut engine, E::Running), Does(A::Release));
        assert_eq!(step(&mut engine, E::Done), end_of(Outcome::Completed));
    }
}
