use super::*;

/// A postcopy from its pause on, towards either kind of peer.
const POSTCOPY: [(E, Next); 10] = [
    (E::Done, Does(A::Sync { last: true })),
    (E::Synced { dirty_pages: 7 }, Does(A::SendDiscards)),
    (E::Done, Does(A::SendPackage)),
    (E::Done, Does(A::Commit)),
    (E::Done, Does(A::SendMissing)),
    (E::Filled { pages_left: 3 }, Does(A::SendMissing)),
    (E::Filled { pages_left: 0 }, Waits(Waiting::Taken)),
    (E::Taken, Does(A::EndPostcopy)),
    (E::Done, Waits(Waiting::Running)),
    (E::Running, Does(A::Release)),
];

fn switching(handover: Handover, rule: PostcopyRule) -> SourceEngine {
    let mut config = SourceConfig::new(PAGE, handover);
    config.postcopy = Some(rule);
    started(SourceEngine::new(config))
}

/// Each step fails, is refused, or is cancelled. RUN commits, and after the peer has reported that it takes over the
/// guest, a refusal no longer returns it.
#[test]
fn p8_p12_a_switch_gives_the_guest_away_once() {
    let (committed, taken) = (4, 8);
    for handover in [Handover::Native, Handover::Shut] {
        for fault_at in 0..POSTCOPY.len() {
            for input in [E::Failed, E::Refused, E::Done] {
                let mut engine = switching(handover, PostcopyRule::AfterRounds(0));
                let paused = engine.step(Duration::ZERO, E::Synced { dirty_pages: 7 });
                assert_eq!(paused, Does(A::PauseGuest));
                for (input, action) in &POSTCOPY[..fault_at] {
                    assert_eq!(engine.step(Duration::ZERO, *input), *action, "{handover:?}");
                }
                let what = format!("{handover:?}, {input:?} at step {fault_at}");
                assert_eq!(engine.is_committed(), fault_at >= committed, "{what}");
                if input == E::Done {
                    assert_eq!(engine.cancel_at_once(), fault_at < committed, "{what}");
                    continue;
                }
                let action = engine.step(Duration::ZERO, input);
                let refused = input == E::Refused && fault_at < taken;
                let expected = match fault_at {
                    at if at < committed || refused => Does(A::RollBack),
                    at if at < taken => Does(A::Finish(Outcome::InDoubt)),
                    _ => Does(A::Finish(Outcome::Incomplete)),
                };
                assert_eq!(action, expected, "{what}");
            }
        }
    }
}

#[test]
fn a_switch_comes_by_rule_or_by_command_unless_all_fits() {
    let secs = Duration::from_secs;
    // Many pages are dirty, and stay so.
    let much = E::Synced { dirty_pages: 1_000_000 };
    let mut engine = switching(Handover::Shut, PostcopyRule::AfterRounds(2));
    one_round(&mut engine, 0, 1_000_000, 1000);
    one_round(&mut engine, 1000, 1_000_000, 1000);
    assert_eq!(engine.step(secs(2), much), Does(A::PauseGuest));
    assert!(engine.is_postcopy());

    let mut engine = switching(Handover::Shut, PostcopyRule::AfterTime(secs(3)));
    one_round(&mut engine, 0, 1_000_000, 1000);
    assert!(matches!(engine.step(secs(1), much), Does(A::OpenRound { .. })));
    engine.step(secs(1), E::Done);
    // In the middle of a round.
    assert_eq!(engine.step(secs(3), sent(900_000, 0)), Does(A::CloseRound { kind: RoundKind::Live }));
    engine.step(secs(3), E::Done);
    assert_eq!(engine.step(secs(3), much), Does(A::PauseGuest));
    engine.handle(secs(3), E::StartPostcopy);
    assert!(engine.is_postcopy() && engine.poll().is_none(), "it is paused already");

    let mut engine = switching(Handover::Shut, PostcopyRule::OnCommand);
    assert!(matches!(engine.step(secs(9), much), Does(A::OpenRound { .. })));
    engine.step(secs(9), E::Done);
    engine.handle(secs(9), E::StartPostcopy);
    assert_eq!(engine.wake_at(), Some(Duration::ZERO), "the slice under way ends");
    assert_eq!(engine.step(secs(9), sent(999_999, 0)), Does(A::CloseRound { kind: RoundKind::Live }));
    engine.step(secs(9), E::Done);
    assert_eq!(engine.step(secs(9), E::Synced { dirty_pages: 0 }), Does(A::PauseGuest));
    assert!(engine.is_postcopy(), "what was asked for comes, whatever fits");

    let mut config = SourceConfig::new(PAGE, Handover::Shut);
    config.postcopy = Some(PostcopyRule::OnCommand);
    config.timeout = Some((secs(5), OnTimeout::Postcopy));
    let mut engine = started(SourceEngine::new(config));
    one_round(&mut engine, 0, 1_000_000, 6000);
    assert_eq!(engine.step(secs(6), much), Does(A::PauseGuest));
    assert!(engine.is_postcopy());

    let mut engine = switching(Handover::Shut, PostcopyRule::AfterRounds(1));
    one_round(&mut engine, 0, 1_000_000, 1000);
    assert_eq!(engine.step(secs(1), E::Synced { dirty_pages: 1 }), Does(A::PauseGuest));
    assert!(!engine.is_postcopy(), "what fits moves whole");
    let mut engine = started(SourceEngine::new(SourceConfig::new(PAGE, Handover::Shut)));
    engine.handle(secs(1), E::StartPostcopy);
    assert_eq!(
        engine.step(secs(1), E::Synced { dirty_pages: 1 }),
        Does(A::OpenRound { kind: RoundKind::Live, number: 1 })
    );
}

/// The connection is lost at each step after RUN, again in each step of the recovery, and permanently. The guest never
/// runs here again, and pages continue only after the ends have compared their bitmaps.
#[test]
fn p9_p11_a_lost_connection_is_followed_by_another_as_often_as_it_is_lost() {
    let (committed, taken) = (4, 8);
    let recovery = [
        (E::Lost, Does(A::Reconnect)),
        (E::Done, Does(A::AskReceived)),
        (E::Done, Does(A::CompareReceived)),
        (E::Done, Does(A::ResumePages)),
        (E::Done, Does(A::SendMissing)),
    ];
    let rest = [
        (E::Filled { pages_left: 0 }, Does(A::EndPostcopy)),
        (E::Done, Waits(Waiting::Running)),
        (E::Running, Does(A::Release)),
    ];
    for lost_at in committed..POSTCOPY.len() {
        let lost = || {
            let mut engine = switching(Handover::Shut, PostcopyRule::AfterRounds(0));
            engine.step(Duration::ZERO, E::Synced { dirty_pages: 7 });
            engine.set_recoverable(true);
            POSTCOPY[..lost_at].iter().for_each(|(event, _)| _ = engine.step(Duration::ZERO, *event));
            engine
        };
        let mut engine = lost();
        // The session retries connecting, and its failure is the end.
        for lost_again_at in 2..recovery.len() {
            for (event, next) in &recovery[..=lost_again_at] {
                assert_eq!(engine.step(Duration::ZERO, *event), *next, "lost at {lost_at}");
                assert!(engine.is_committed());
            }
        }
        for (event, next) in recovery.into_iter().chain(rest) {
            assert_eq!(engine.step(Duration::ZERO, event), next, "who answers has taken the guest");
        }
        let ending = if lost_at < taken { Outcome::InDoubt } else { Outcome::Incomplete };
        let mut engine = lost();
        assert_eq!(engine.step(Duration::ZERO, E::Lost), Does(A::Reconnect));
        assert_eq!(engine.step(Duration::ZERO, E::Failed), Does(A::Finish(ending)), "for good");
        let mut engine = lost();
        engine.set_recoverable(false);
        assert_eq!(engine.step(Duration::ZERO, E::Lost), Does(A::Finish(ending)), "there is no other");
    }
}

/// The connection for urgent pages is opened after the first bytes of each main connection, or before the pause and
/// before pages continue. If it fails before RUN, the guest continues here; after RUN, another connection follows.
#[test]
fn the_connection_for_urgent_pages_is_made_when_the_peer_takes_it() {
    let now = Duration::ZERO;
    for time in [UrgentChannel::Early, UrgentChannel::Late] {
        let early = time == UrgentChannel::Early;
        let engine = || {
            let mut config = SourceConfig::new(PAGE, Handover::Shut);
            (config.postcopy, config.urgent) = (Some(PostcopyRule::AfterRounds(0)), Some(time));
            let mut engine = SourceEngine::new(config);
            engine.set_recoverable(true);
            engine
        };
        let opens = |at_this_time: bool| at_this_time.then_some((E::Done, Does(A::OpenUrgent)));
        let begin = [(E::Begin, Does(A::StartLogs)), (E::Done, Does(A::SendHeader))];
        let set_up = [(E::Done, Does(A::SendSetup))];
        let sync = [(E::SetUp { handover: Handover::Shut }, Does(A::Sync { last: false }))];
        let dirty = E::Synced { dirty_pages: 7 };
        let late = [(dirty, Does(A::OpenUrgent)), (E::Done, Does(A::PauseGuest))];
        let pause = if early { &[(dirty, Does(A::PauseGuest))][..] } else { &late };
        let lost = [(E::Lost, Does(A::Reconnect)), (E::Done, Does(A::AskReceived))];
        let compare = [(E::Done, Does(A::CompareReceived))];
        let resume = [(E::Done, Does(A::ResumePages)), (E::Done, Does(A::SendMissing))];
        let steps: Vec<(E, Next)> = (begin.into_iter().chain(opens(early)).chain(set_up).chain(sync))
            .chain(pause.iter().copied())
            .chain(POSTCOPY[..6].iter().copied())
            .chain(lost.into_iter().chain(opens(early)).chain(compare))
            .chain(opens(!early).into_iter().chain(resume))
            .collect();
        assert_eq!(steps.iter().filter(|(_, next)| *next == Does(A::OpenUrgent)).count(), 2);
        let mut whole = engine();
        for (at, (event, next)) in steps.iter().enumerate() {
            assert_eq!(whole.step(now, *event), *next, "{time:?} at {at}");
            if *next != Does(A::OpenUrgent) {
                continue;
            }
            let mut fails = engine();
            steps[..=at].iter().for_each(|(event, _)| _ = fails.step(now, *event));
            let then = if fails.is_committed() { A::Reconnect } else { A::RollBack };
            assert_eq!(fails.step(now, E::Lost), Does(then), "{time:?} at {at}");
        }
    }
}
