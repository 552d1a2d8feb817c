use super::*;

/// Every path of a native migration after the pause, with a failure and a cancel at each step.
#[test]
fn before_commit_the_guest_stays_after_it_never_resumes() {
    let steps = [
        (E::Done, Does(A::Sync { last: true })),
        (E::Synced { dirty_pages: 1 }, Does(A::OpenRound { kind: RoundKind::Final, number: 2 })),
        (E::Done, Does(A::Send)),
        (sent(0, PAGE), Does(A::CloseRound { kind: RoundKind::Final })),
        (E::Done, Does(A::Drain)),
        (E::Done, Does(A::SendState)),
        (E::Done, Does(A::SendDigest)),
        (E::Done, Waits(Waiting::Ready)),
        (E::Ready, Does(A::Commit)),
        (E::Done, Waits(Waiting::Running)),
        (E::Running, Does(A::Release)),
        (E::Done, Does(A::Finish(Outcome::Completed))),
    ];
    let committed = 8;
    for fault_at in 0..=steps.len() {
        for cancel in [false, true] {
            let mut config = SourceConfig::new(PAGE, Handover::Native);
            config.digest = true;
            let mut engine = started(SourceEngine::new(config));
            one_round(&mut engine, 0, 100, 0);
            engine.step(Duration::ZERO, E::Synced { dirty_pages: 0 });
            for (input, action) in &steps[..fault_at] {
                assert_eq!(engine.step(Duration::ZERO, *input), *action);
            }
            if fault_at == steps.len() {
                assert_eq!(engine.step(Duration::ZERO, E::Cancel), end_of(Outcome::Completed));
                continue;
            }
            if cancel && fault_at > committed {
                assert!(!engine.cancel_at_once(), "step {fault_at}");
                continue;
            }
            if fault_at > committed + 2 {
                continue;
            }
            let input = if cancel { E::Cancel } else { E::Failed };
            let reason = if cancel { Reason::Cancelled } else { Reason::Failed };
            let action = engine.step(Duration::ZERO, input);
            if fault_at > committed {
                assert_eq!(action, end_of(Outcome::InDoubt), "step {fault_at}");
                continue;
            }
            assert_eq!(action, Does(A::RollBack), "step {fault_at}");
            let end = end_of(Outcome::StaysHere(reason));
            assert_eq!(engine.step(Duration::ZERO, E::Done), end);
            assert_eq!(engine.step(Duration::ZERO, E::Running), end);
        }
    }
}

/// Memory is compared only where the guest is known to run elsewhere, and nothing that happens then is a failure.
#[test]
fn memory_is_compared_once_the_guest_runs_there() {
    for (at_release, at_check) in
        [(E::Done, E::Done), (E::Failed, E::Done), (E::Done, E::Failed), (E::Done, E::Lost)]
    {
        let mut config = SourceConfig::new(PAGE, Handover::Native);
        config.memory_check = true;
        let mut engine = started(SourceEngine::new(config));
        one_round(&mut engine, 0, 100, 0);
        engine.step(Duration::ZERO, E::Synced { dirty_pages: 0 });
        let to_ready =
            [E::Done, E::Synced { dirty_pages: 0 }, E::Done, sent(0, PAGE), E::Done, E::Done, E::Done];
        for event in to_ready {
            engine.step(Duration::ZERO, event);
        }
        assert_eq!(engine.step(Duration::ZERO, E::Ready), Does(A::Commit));
        assert_eq!(engine.step(Duration::ZERO, E::Done), Waits(Waiting::Running));
        assert_eq!(engine.step(Duration::ZERO, E::Running), Does(A::Release));
        assert_eq!(engine.step(Duration::ZERO, at_release), Does(A::CheckMemory));
        assert!(!engine.cancel_at_once(), "the guest is given away");
        assert_eq!(engine.step(Duration::ZERO, at_check), end_of(Outcome::Completed));
    }
}

#[test]
fn a_step_that_fails_after_a_cancel_was_cancelled() {
    let mut engine = started(engine());
    engine.handle(Duration::ZERO, E::Cancel);
    assert_eq!(engine.step(Duration::ZERO, E::Failed), Does(A::RollBack));
    let end = Does(A::Finish(Outcome::StaysHere(Reason::Cancelled)));
    assert_eq!(engine.step(Duration::ZERO, E::Done), end);
}

#[test]
fn a_relay_waits_for_its_source_and_pauses_only_then() {
    let mut config = SourceConfig::new(PAGE, Handover::Shut);
    config.switchover = Switchover::WhenUpstreamStops;
    let mut engine = started(SourceEngine::new(config));
    let nothing = E::Synced { dirty_pages: 0 };
    assert!(matches!(engine.step(Duration::ZERO, nothing), Waits(Waiting::Moment)));
    assert_eq!(engine.step(Duration::ZERO, E::Woken), Does(A::Sync { last: false }));
    one_round(&mut engine, 0, 10, 10);
    assert!(matches!(engine.step(Duration::ZERO, nothing), Waits(Waiting::Moment)));
    let stopped = engine.step(Duration::ZERO, E::UpstreamStopped);
    assert_eq!(stopped, Does(A::Sync { last: false }));
    assert_eq!(engine.step(Duration::ZERO, E::Synced { dirty_pages: 5 }), Does(A::PauseGuest));
}

#[test]
fn a_qemu_gets_no_ready_and_its_last_byte_commits() {
    let mut engine = started(SourceEngine::new(SourceConfig::new(PAGE, Handover::Shut)));
    one_round(&mut engine, 0, 100, 10);
    let mut inputs = vec![E::Synced { dirty_pages: 0 }, E::Done];
    inputs.extend([E::Synced { dirty_pages: 0 }, E::Done]);
    inputs.extend([sent(0, 0), E::Done, E::Done]);
    for input in inputs {
        engine.step(Duration::ZERO, input);
    }
    assert!(!engine.is_committed());
    assert_eq!(engine.step(Duration::ZERO, E::Done), Does(A::Commit));
    assert!(engine.is_committed());
    assert_eq!(engine.step(Duration::ZERO, E::Done), Waits(Waiting::Running));
    assert_eq!(engine.step(Duration::ZERO, E::Refused), Does(A::RollBack), "it has not started");
}

#[test]
fn a_held_switchover_waits_between_the_pause_and_the_last_sync() {
    let mut config = SourceConfig::new(PAGE, Handover::Native);
    config.holds = true;
    let mut engine = started(SourceEngine::new(config));
    one_round(&mut engine, 0, 100, 10);
    let at = Duration::from_secs(1);
    assert_eq!(engine.step(at, E::Synced { dirty_pages: 0 }), Does(A::PauseGuest));
    assert_eq!(engine.step(at, E::Done), Waits(Waiting::Embedder));
    assert_eq!(engine.step(at, E::Continue), Does(A::Sync { last: true }));
}

/// The waits for READY: of a peer that reports that it is busy, and of a silent one.
#[test]
fn an_answer_that_does_not_come_ends_the_wait() {
    let secs = Duration::from_secs;
    let waiting = || {
        let mut config = SourceConfig::new(PAGE, Handover::Native);
        config.answers = AnswerTimeouts { ready: secs(60), silence: secs(10), running: secs(20) };
        let mut engine = started(SourceEngine::new(config));
        one_round(&mut engine, 0, 100, 0);
        let answers = [E::Synced { dirty_pages: 0 }, E::Done, E::Synced { dirty_pages: 0 }, E::Done];
        answers.into_iter().chain([sent(0, 0), E::Done, E::Done]).for_each(|answer| {
            engine.step(secs(1), answer);
        });
        assert_eq!(engine.step(secs(1), E::Done), Waits(Waiting::Ready));
        assert_eq!(engine.wake_at(), Some(secs(11)));
        engine
    };
    let mut silent = waiting();
    assert_eq!(silent.step(secs(11), E::Woken), Does(A::RollBack));
    assert_eq!(silent.overdue(), Some(Overdue::Keepalive(secs(10))));

    let mut busy = waiting();
    for at in [5, 14, 23, 32, 41, 50, 59] {
        assert_eq!(busy.step(secs(at), E::Working), Waits(Waiting::Ready));
        assert_eq!(busy.wake_at(), Some(secs(at + 10).min(secs(61))));
    }
    assert_eq!(busy.step(secs(61), E::Woken), Does(A::RollBack));
    assert_eq!(busy.overdue(), Some(Overdue::Ready(secs(60))));

    let mut given = waiting();
    assert_eq!(given.step(secs(5), E::Ready), Does(A::Commit));
    assert_eq!(given.step(secs(5), E::Done), Waits(Waiting::Running));
    assert_eq!(given.step(secs(25), E::Woken), end_of(Outcome::InDoubt));
    assert_eq!(given.overdue(), Some(Overdue::Running(secs(20))));
}

/// A relay in doubt continues to wait for messages, and a late answer ends the doubt.
#[test]
fn a_relay_whose_far_end_is_silent_reports_it_and_listens_on() {
    for (late, end) in [(E::Running, Does(A::Release)), (E::Failed, end_of(Outcome::InDoubt))] {
        let mut config = SourceConfig::new(PAGE, Handover::Native);
        config.switchover = Switchover::WhenUpstreamStops;
        let mut engine = started(SourceEngine::new(config));
        engine.handle(Duration::ZERO, E::UpstreamStopped);
        let nothing = E::Synced { dirty_pages: 0 };
        for answer in [nothing, E::Done, nothing, E::Done, sent(0, 0), E::Done, E::Done, E::Done] {
            engine.step(Duration::ZERO, answer);
        }
        assert_eq!(engine.step(Duration::ZERO, E::Ready), Waits(Waiting::Guest));
        assert!(!engine.is_committed(), "nobody gives away what is not theirs");
        assert_eq!(engine.step(Duration::ZERO, E::GuestGiven), Does(A::Commit));
        assert_eq!(engine.step(Duration::ZERO, E::Done), Waits(Waiting::Running));
        assert_eq!(engine.step(Duration::ZERO, E::Woken), Does(A::ReportSilence));
        assert_eq!(engine.step(Duration::ZERO, E::Done), Waits(Waiting::LateAnswer));
        assert_eq!(engine.step(Duration::ZERO, late), end);
        assert_eq!(engine.overdue().is_some(), late == E::Failed);
    }
}
