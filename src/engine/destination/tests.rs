use super::{DestinationAction as Action, DestinationEvent as Input, *};

fn engine() -> DestinationEngine {
    let mut engine = DestinationEngine::new(Duration::from_secs(30));
    assert_eq!(engine.poll(), Some(Action::Receive));
    engine
}

trait Step {
    fn step(&mut self, event: Input) -> Action;
}

impl Step for DestinationEngine {
    fn step(&mut self, event: Input) -> Action {
        self.handle(Duration::ZERO, event);
        self.poll().unwrap_or_else(|| panic!("nothing follows {event:?}"))
    }
}

const NATIVE: [(Input, Action); 10] = [
    (Input::Hello { digest: true, memory_check: false }, Action::Receive),
    (Input::StateSent, Action::MakeDigest),
    (Input::Done, Action::Receive),
    (Input::Digests, Action::CompareDigest),
    (Input::Done, Action::LoadState),
    (Input::Done, Action::SendReady),
    (Input::Done, Action::Receive),
    (Input::Commit, Action::Resume),
    (Input::Done, Action::SendRunning),
    (Input::Done, Action::Finish(Ending::Running)),
];

#[test]
fn the_guest_runs_here_only_after_commit() {
    for fault_at in 0..NATIVE.len() {
        let mut engine = self::engine();
        for (input, action) in &NATIVE[..fault_at] {
            assert_eq!(engine.step(*input), *action);
        }
        let ended = if fault_at == 9 {
            assert_eq!(engine.step(Input::Failed), Action::Finish(Ending::Running));
            Action::Finish(Ending::Running)
        } else {
            assert_eq!(engine.step(Input::Failed), Action::SendFailed, "step {fault_at}");
            let ending = if fault_at > 7 { Ending::Stranded } else { Ending::Discarded };
            assert_eq!(engine.step(Input::Done), Action::Finish(ending), "step {fault_at}");
            Action::Finish(ending)
        };
        assert_eq!(engine.step(Input::Commit), ended, "nothing starts it afterwards");
    }
}

/// The result of the source's memory check, or its absence, changes nothing about who has the guest.
#[test]
fn the_sources_memory_is_heard_of_only_once_the_guest_runs_here() {
    let steps = [
        (Input::Hello { digest: false, memory_check: true }, Action::Receive),
        (Input::StateSent, Action::LoadState),
        (Input::Done, Action::SendReady),
        (Input::Done, Action::Receive),
        (Input::Commit, Action::Resume),
        (Input::Done, Action::SendRunning),
        (Input::Done, Action::AwaitMemoryCheck),
    ];
    for end in [Input::Done, Input::Failed, Input::Lost] {
        let mut engine = self::engine();
        steps.iter().for_each(|(input, action)| assert_eq!(engine.step(*input), *action));
        engine.handle(Duration::ZERO, Input::Cancel);
        assert_eq!(engine.poll(), None, "the guest is ours");
        assert_eq!(engine.step(end), Action::Finish(Ending::Running), "{end:?}");
    }
    let mut untold = self::engine();
    steps[..6].iter().for_each(|(input, action)| assert_eq!(untold.step(*input), *action));
    assert_eq!(
        untold.step(Input::Failed),
        Action::Finish(Ending::Running),
        "a source that is gone says nothing"
    );
}

#[test]
fn a_guest_that_may_run_here_is_not_let_run_at_the_source() {
    let mut qemu = engine();
    assert_eq!(qemu.step(Input::Tail), Action::LoadState);
    assert_eq!(qemu.step(Input::Done), Action::Resume);
    assert_eq!(qemu.step(Input::MayRun), Action::SendRunning, "no SHUT(1)");
    assert_eq!(qemu.step(Input::Failed), Action::Finish(Ending::Stranded));
    let mut native = engine();
    NATIVE[..8].iter().for_each(|(input, action)| assert_eq!(native.step(*input), *action));
    assert_eq!(native.step(Input::MayRun), Action::SendFailed, "a ramwire never resumes after COMMIT");
    assert_eq!(native.step(Input::Done), Action::Finish(Ending::Stranded));
}

/// Before the guest is started a failure leaves it intact at the source; afterwards no failure is reported to the
/// source.
#[test]
fn p8_a_postcopy_that_fails_before_the_start_is_given_back_and_never_after_it() {
    let mut native = engine();
    native.step(Input::Hello { digest: false, memory_check: false });
    assert_eq!(native.step(Input::Package), Action::Listen);
    assert_eq!(native.step(Input::Failed), Action::SendFailed);
    assert_eq!(native.step(Input::Done), Action::Finish(Ending::Discarded));
    let steps = [
        (Input::Package, Action::Listen),
        (Input::Done, Action::Receive),
        (Input::Tail, Action::AwaitGuest),
        (Input::Done, Action::SendRunning),
        (Input::Done, Action::Finish(Ending::Running)),
    ];
    let after = |count: usize| {
        let mut engine = self::engine();
        steps[..count].iter().for_each(|(input, action)| assert_eq!(engine.step(*input), *action));
        engine
    };
    assert_eq!(after(5).step(Input::Failed), Action::Finish(Ending::Running));
    for count in 0..4 {
        let mut engine = after(count);
        assert_eq!(engine.is_committed(), count > 0);
        assert_eq!(engine.step(Input::Failed), Action::SendFailed, "after {count} steps");
        assert_eq!(engine.step(Input::Done), Action::Finish(Ending::Discarded));
    }
    let mut engine = after(2);
    engine.set_recoverable(true);
    for _ in 0..3 {
        assert_eq!(engine.step(Input::Lost), Action::AwaitRecovery, "again and again");
        assert_eq!(engine.step(Input::Lost), Action::AwaitRecovery, "while it waits, too");
        assert_eq!(engine.step(Input::Done), Action::Receive);
    }
    engine.set_recoverable(false);
    assert_eq!(engine.step(Input::Lost), Action::Finish(Ending::Incomplete));
    for count in 2..4 {
        assert_eq!(after(count).step(Input::Lost), Action::Finish(Ending::Incomplete), "after {count} steps");
    }
}

/// A source that has not received the report that all pages have arrived connects again and receives it. Whether it
/// does changes nothing about the guest.
#[test]
fn p11_a_loss_of_the_last_word_is_no_end_and_never_takes_the_guest_back() {
    let steps = [
        (Input::Package, Action::Listen),
        (Input::Done, Action::Receive),
        (Input::Tail, Action::AwaitGuest),
        (Input::Done, Action::SendRunning),
        (Input::Lost, Action::AwaitRecovery),
        (Input::Done, Action::Receive),
        (Input::Tail, Action::AwaitGuest),
        (Input::Done, Action::SendRunning),
        (Input::Lost, Action::AwaitRecovery),
    ];
    let after = |count: usize| {
        let mut engine = self::engine();
        engine.set_recoverable(true);
        steps[..count].iter().for_each(|(input, action)| assert_eq!(engine.step(*input), *action));
        engine
    };
    for count in 4..=steps.len() {
        let mut engine = after(count);
        engine.set_recoverable(false);
        for event in [Input::Lost, Input::Failed] {
            assert!(engine.is_whole());
            assert_eq!(engine.step(event), Action::Finish(Ending::Running), "after {count} steps: {event:?}");
        }
    }
    assert_eq!(after(8).step(Input::Done), Action::Finish(Ending::Running));
}

/// Memory that was passed is the source's until COMMIT, and loading device state may write to it.
#[test]
fn device_state_is_loaded_after_commit_where_memory_was_passed() {
    let late = [
        (Input::Hello { digest: true, memory_check: false }, Action::Receive),
        (Input::StateSent, Action::MakeDigest),
        (Input::Done, Action::Receive),
        (Input::Digests, Action::CompareDigest),
        (Input::Done, Action::SendReady),
        (Input::Done, Action::Receive),
        (Input::Commit, Action::LoadState),
        (Input::Done, Action::Resume),
        (Input::Done, Action::SendRunning),
        (Input::Done, Action::Finish(Ending::Running)),
    ];
    let after = |count: usize| {
        let mut engine = self::engine();
        engine.load_after_commit();
        late[..count].iter().for_each(|(input, action)| assert_eq!(engine.step(*input), *action));
        engine
    };
    after(late.len());
    for failed_at in 1..9 {
        let mut engine = after(failed_at);
        assert_eq!(engine.is_committed(), failed_at > 6);
        assert_eq!(engine.step(Input::Failed), Action::SendFailed, "after {failed_at} steps");
        let ending = if failed_at > 6 { Ending::Stranded } else { Ending::Discarded };
        assert_eq!(engine.step(Input::Done), Action::Finish(ending), "after {failed_at} steps");
    }
    let mut plain = engine();
    plain.load_after_commit();
    plain.step(Input::Hello { digest: false, memory_check: false });
    assert_eq!(plain.step(Input::StateSent), Action::SendReady, "without a digest as well");
}

#[test]
fn an_input_out_of_turn_is_a_failure() {
    let all = [Input::Tail, Input::StateSent, Input::Digests, Input::Commit, Input::Done];
    for input in all.into_iter().filter(|input| *input != Input::Tail) {
        assert_eq!(engine().step(input), Action::SendFailed, "{input:?}");
    }
    let mut native = engine();
    native.step(Input::Hello { digest: false, memory_check: false });
    assert_eq!(native.step(Input::Tail), Action::SendFailed);
}

#[test]
fn a_qemu_commits_with_its_last_byte() {
    let mut engine = self::engine();
    assert_eq!(engine.step(Input::Tail), Action::LoadState);
    assert!(engine.is_committed());
    assert_eq!(engine.step(Input::Done), Action::Resume);
    assert_eq!(engine.step(Input::Done), Action::SendRunning);
    assert_eq!(engine.step(Input::Failed), Action::Finish(Ending::Running));
}

/// Whatever event arrives, and at any time: the guest becomes ours only once, and a cancel never discards it after it
/// was handed over.
#[test]
fn any_event_at_any_moment_starts_no_guest_that_is_not_ours() {
    let all = [
        Input::Hello { digest: true, memory_check: false },
        Input::Tail,
        Input::Package,
        Input::StateSent,
        Input::Digests,
        Input::Commit,
        Input::Done,
        Input::MayRun,
        Input::Resumed { committed: false },
        Input::Resumed { committed: true },
        Input::Failed,
        Input::Lost,
        Input::Woken,
        Input::Cancel,
    ];
    for (length, polls) in (0..=NATIVE.len()).flat_map(|length| [(length, true), (length, false)]) {
        for (first, second) in all.into_iter().flat_map(|first| all.map(|second| (first, second))) {
            let mut engine = self::engine();
            for (event, _) in &NATIVE[..length] {
                engine.step(*event);
            }
            for event in [first, second] {
                let committed = engine.is_committed();
                engine.handle(Duration::ZERO, event);
                let action = if polls { engine.poll() } else { None };
                let what = format!("{first:?}, {second:?} after {length} steps: {action:?}");
                let starts = matches!(action, Some(Action::Resume | Action::Listen));
                assert!(!starts || engine.is_committed(), "{what}");
                assert!(!committed || engine.is_committed(), "{what}");
                let discarded = action == Some(Action::Finish(Ending::Discarded));
                assert!(!discarded || length < 8, "{what}");
                if event == Input::Cancel && committed {
                    assert!(action != Some(Action::SendFailed), "{what}");
                }
            }
        }
    }
}

#[test]
fn commit_is_waited_for_until_the_time_is_over_and_no_cancel_ends_the_wait() {
    let mut engine = self::engine();
    for (event, action) in &NATIVE[..7] {
        assert_eq!(engine.step(*event), *action);
    }
    let secs = Duration::from_secs;
    assert_eq!(engine.wake_at(), Some(secs(30)));
    for event in [Input::Cancel, Input::Woken] {
        engine.handle(secs(29), event);
        assert_eq!(engine.poll(), None, "{event:?} before its time");
    }
    engine.handle(secs(30), Input::Woken);
    assert_eq!(engine.poll(), Some(Action::SendFailed));
}

/// Without COMMIT everything begins again with pages; with it the guest is started once, and reported as often as it is
/// asked for.
#[test]
fn a_source_that_connects_again_gets_what_it_is_due() {
    let after = |count: usize| {
        let mut engine = self::engine();
        engine.set_resumable(true);
        NATIVE[..count].iter().for_each(|(input, action)| assert_eq!(engine.step(*input), *action));
        engine
    };
    // Without the steps in which nothing is sent or received.
    for count in [1, 2, 3, 6, 7] {
        let mut engine = after(count);
        for _ in 0..3 {
            assert_eq!(engine.step(Input::Lost), Action::AwaitRecovery, "after {count} steps");
            assert_eq!(engine.step(Input::Lost), Action::AwaitRecovery, "while it waits, too");
            assert_eq!(engine.is_bound(), count >= 6 && !engine.is_committed());
            engine = after(count);
        }
        engine.step(Input::Lost);
        assert_eq!(engine.step(Input::Resumed { committed: false }), Action::Receive);
        assert!(!engine.is_bound());
        for (input, action) in &NATIVE[1..] {
            assert_eq!(engine.step(*input), *action, "after {count} steps, and again");
        }
        let mut gone = after(count);
        gone.step(Input::Lost);
        assert_eq!(gone.step(Input::Failed), Action::SendFailed, "nobody has come");
        assert_eq!(gone.step(Input::Done), Action::Finish(Ending::Discarded));
        let mut asked = after(count);
        asked.step(Input::Lost);
        let starts = asked.step(Input::Resumed { committed: true });
        // COMMIT follows READY only.
        assert_eq!(
            starts,
            if count >= 6 { Action::Resume } else { Action::SendFailed },
            "after {count} steps"
        );
    }
    let mut runs = after(9);
    for _ in 0..3 {
        assert_eq!(runs.step(Input::Lost), Action::AwaitRecovery);
        assert_eq!(
            runs.step(Input::Resumed { committed: true }),
            Action::SendRunning,
            "it is not started again"
        );
    }
    for end in [Input::Resumed { committed: false }, Input::Failed] {
        let mut runs = after(9);
        runs.step(Input::Lost);
        assert_eq!(runs.step(end), Action::Finish(Ending::Running), "{end:?}");
    }
    let mut alone = after(7);
    alone.set_resumable(false);
    assert_eq!(alone.step(Input::Lost), Action::SendFailed, "no other connection can come");
}

/// A source without a return path gives its guest away unasked: only one that closes before its last byte has kept it.
#[test]
fn a_source_that_waits_for_no_answer_is_in_doubt_unless_it_has_left() {
    let unasked = || {
        let mut engine = engine();
        engine.source_gives_unasked();
        engine
    };
    for (event, ending) in [
        (Input::Failed, Ending::Unanswered),
        (Input::Lost, Ending::Unanswered),
        (Input::Cancel, Ending::Unanswered),
        (Input::SourceLeft, Ending::Discarded),
    ] {
        let mut engine = unasked();
        assert_eq!(engine.step(event), Action::SendFailed, "{event:?}");
        assert_eq!(engine.step(Input::Done), Action::Finish(ending), "{event:?}");
    }
    // Behind its last byte this is the only copy.
    for steps in 1..=2 {
        let mut engine = unasked();
        engine.step(Input::Tail);
        (1..steps).for_each(|_| _ = engine.step(Input::Done));
        assert_eq!(engine.step(Input::Failed), Action::SendFailed);
        assert_eq!(engine.step(Input::Done), Action::Finish(Ending::Stranded), "{steps}");
    }
    // The same of a source that is told of the failure.
    let mut asked = engine();
    asked.step(Input::Tail);
    assert_eq!(asked.step(Input::Failed), Action::SendFailed);
    assert_eq!(asked.step(Input::Done), Action::Finish(Ending::Discarded));
}

/// A cancel and the end of the stream meet: the guest is here, and nowhere else.
#[test]
fn a_cancel_that_meets_the_last_byte_of_a_source_without_a_return_path_is_too_late() {
    let mut engine = engine();
    engine.source_gives_unasked();
    engine.handle(Duration::ZERO, Input::Cancel);
    engine.handle(Duration::ZERO, Input::Tail);
    assert_eq!(engine.poll(), Some(Action::LoadState));
    assert!(engine.is_committed());
    let mut left = self::engine();
    left.source_gives_unasked();
    left.handle(Duration::ZERO, Input::Cancel);
    left.handle(Duration::ZERO, Input::SourceLeft);
    assert_eq!(left.poll(), Some(Action::Finish(Ending::Discarded)));
}
