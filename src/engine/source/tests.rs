use super::*;
use crate::engine::Handover;
use crate::units::Rate;

const PAGE: u64 = 4096;

fn engine() -> SourceEngine {
    SourceEngine::new(SourceConfig::new(PAGE, Handover::Native))
}

/// Pages that travel whole.
fn sent(pages_left: u64, bytes: u64) -> Input {
    Input::Sent { pages_left, sent: Sent { guest: bytes, wire: bytes } }
}

/// Walks an engine to its first sync, at time zero.
fn started(mut engine: SourceEngine) -> SourceEngine {
    assert_eq!(engine.handle(Duration::ZERO, Input::Begin), Action::StartLogs);
    assert_eq!(engine.handle(Duration::ZERO, Input::Done), Action::SendSetup);
    let set_up = Input::SetUp { handover: engine.config.handover };
    assert_eq!(engine.handle(Duration::ZERO, set_up), Action::Sync { last: false });
    engine
}

fn one_round(engine: &mut SourceEngine, from_ms: u64, pages: u64, took_ms: u64) {
    round_of(engine, from_ms, (pages, pages * PAGE), took_ms);
}

fn round_of(engine: &mut SourceEngine, from_ms: u64, (pages, bytes): (u64, u64), took_ms: u64) {
    let ms = Duration::from_millis;
    let open = engine.handle(ms(from_ms), Input::Synced { dirty_pages: pages });
    assert!(matches!(open, Action::OpenRound { kind: RoundKind::Live, .. }), "{open:?}");
    assert!(matches!(engine.handle(ms(from_ms), Input::Done), Action::Send { .. }));
    let sent = Input::Sent { pages_left: 0, sent: Sent { guest: pages * PAGE, wire: bytes } };
    let close = engine.handle(ms(from_ms + took_ms), sent);
    assert_eq!(close, Action::CloseRound { kind: RoundKind::Live });
    assert_eq!(engine.handle(ms(from_ms + took_ms), Input::Done), Action::Sync { last: false });
}

#[test]
fn pauses_when_the_rest_fits_the_downtime() {
    let mut engine = started(engine());
    one_round(&mut engine, 0, 100_000, 1000);
    one_round(&mut engine, 1000, 30_001, 1000 * 30_001 / 100_000);
    assert_eq!(
        engine.handle(Duration::from_secs(2), Input::Synced { dirty_pages: 29_000 }),
        Action::PauseGuest
    );
}

/// A guest that makes all its pages dirty again in any round, however short: 400 MB of them, or 10 MB of differences.
#[test]
fn differences_are_reckoned_as_what_they_take() {
    let mut engine = started(engine());
    engine.set_deltas(true);
    one_round(&mut engine, 0, 100_000, 4000);
    one_round(&mut engine, 4000, 100_000, 4000);
    round_of(&mut engine, 8000, (100_000, 10_000_000), 100);
    round_of(&mut engine, 8100, (100_000, 10_000_000), 100);
    let again = engine.handle(Duration::from_millis(8200), Input::Synced { dirty_pages: 100_000 });
    assert_eq!(again, Action::PauseGuest);
}

/// What waits in the kernel delays the last pages: the guest runs on until it has left, and no round is made of nothing.
#[test]
fn what_is_under_way_is_waited_for() {
    let mut engine = started(engine());
    one_round(&mut engine, 0, 100_000, 4000);
    let at = Duration::from_secs(4);
    engine.set_under_way(40 << 20);
    for dirty_pages in [0, 100] {
        let wait = engine.handle(at, Input::Synced { dirty_pages });
        assert!(matches!(wait, Action::Wait { until } if until > at), "{wait:?}");
        let woken = engine.handle(at, Input::Woken { upstream_stopped: false });
        assert_eq!(woken, Action::Sync { last: false });
    }
    assert!(!engine.progress().is_stalled() && engine.progress().rounds_without() == 0);
    engine.set_under_way(1 << 20);
    assert_eq!(engine.handle(at, Input::Synced { dirty_pages: 100 }), Action::PauseGuest);
}

/// On page channels a short round leaves as a whole while it is closed.
#[test]
fn what_leaves_at_the_fence_makes_the_rate() {
    for left in [0, 100_000_000] {
        let mut engine = started(engine());
        engine.set_state_bytes(1000);
        let ms = Duration::from_millis;
        engine.handle(ms(0), Input::Synced { dirty_pages: 100_000 });
        engine.handle(ms(0), Input::Done);
        engine.handle(ms(1), sent(0, 0));
        engine.set_sent_at_fence(Sent { guest: left, wire: left });
        engine.handle(ms(1000), Input::Done);
        assert_eq!(engine.rate(), (left > 0).then_some(Rate(left)));
        // Whether a rate is known or not: no round of nothing follows another for ever.
        assert_eq!(engine.handle(ms(1000), Input::Synced { dirty_pages: 0 }), Action::PauseGuest);
    }
}

#[test]
fn the_fixed_part_counts_and_never_blocks_for_ever() {
    let mut config = SourceConfig::new(PAGE, Handover::Native);
    config.fixed_downtime = Duration::from_millis(200);
    let mut engine = started(SourceEngine::new(config));
    one_round(&mut engine, 0, 100_000, 1000);
    one_round(&mut engine, 1000, 10_500, 105);
    let rest = Input::Synced { dirty_pages: 9_900 };
    assert_eq!(engine.handle(Duration::from_secs(2), rest), Action::PauseGuest);

    let mut config = SourceConfig::new(PAGE, Handover::Native);
    config.fixed_downtime = Duration::from_secs(9);
    let mut engine = started(SourceEngine::new(config));
    one_round(&mut engine, 0, 100_000, 1000);
    one_round(&mut engine, 1000, 3_500, 35);
    let rest = Input::Synced { dirty_pages: 2_900 };
    assert_eq!(engine.handle(Duration::from_secs(2), rest), Action::PauseGuest);
}

/// Every path of a native migration after the pause, with a failure and a cancel at each step.
#[test]
fn before_commit_the_guest_stays_after_it_never_resumes() {
    let steps = [
        (Input::Done, Action::Sync { last: true }),
        (Input::Synced { dirty_pages: 1 }, Action::OpenRound { kind: RoundKind::Final, number: 2 }),
        (Input::Done, Action::Send { until: Duration::from_millis(50) }),
        (sent(0, PAGE), Action::CloseRound { kind: RoundKind::Final }),
        (Input::Done, Action::Drain),
        (Input::Done, Action::SendState),
        (Input::Done, Action::SendDigest),
        (Input::Done, Action::AwaitReady),
        (Input::Ready, Action::Commit),
        (Input::Done, Action::AwaitRunning),
        (Input::Running, Action::Release),
        (Input::Done, Action::Finish(Outcome::Completed)),
    ];
    let committed = 8;
    for fault_at in 0..=steps.len() {
        for cancel in [false, true] {
            let mut config = SourceConfig::new(PAGE, Handover::Native);
            config.digest = true;
            let mut engine = started(SourceEngine::new(config));
            one_round(&mut engine, 0, 100, 0);
            engine.handle(Duration::ZERO, Input::Synced { dirty_pages: 0 });
            for (input, action) in &steps[..fault_at] {
                assert_eq!(engine.handle(Duration::ZERO, *input), *action);
            }
            let refused = cancel && !engine.cancel();
            assert_eq!(refused, cancel && fault_at > committed, "step {fault_at}");
            if refused || fault_at > committed + 2 {
                continue;
            }
            let input = if cancel { Input::Done } else { Input::Failed };
            let reason = if cancel { Reason::Cancelled } else { Reason::Failed };
            let action = engine.handle(Duration::ZERO, input);
            if fault_at > committed {
                assert_eq!(action, Action::Finish(Outcome::InDoubt), "step {fault_at}");
                continue;
            }
            assert_eq!(action, Action::RollBack, "step {fault_at}");
            let end = Action::Finish(Outcome::StaysHere(reason));
            assert_eq!(engine.handle(Duration::ZERO, Input::Done), end);
            assert_eq!(engine.handle(Duration::ZERO, Input::Running), end);
        }
    }
}

#[test]
fn a_step_that_fails_after_a_cancel_was_cancelled() {
    let mut engine = started(engine());
    assert!(engine.cancel());
    assert_eq!(engine.handle(Duration::ZERO, Input::Failed), Action::RollBack);
    let end = Action::Finish(Outcome::StaysHere(Reason::Cancelled));
    assert_eq!(engine.handle(Duration::ZERO, Input::Done), end);
}

#[test]
fn a_relay_waits_for_its_source_and_pauses_only_then() {
    let mut config = SourceConfig::new(PAGE, Handover::Shut);
    config.switchover = Switchover::WhenUpstreamStops;
    let mut engine = started(SourceEngine::new(config));
    let nothing = Input::Synced { dirty_pages: 0 };
    assert!(matches!(engine.handle(Duration::ZERO, nothing), Action::Wait { .. }));
    let woken = Input::Woken { upstream_stopped: false };
    assert_eq!(engine.handle(Duration::ZERO, woken), Action::Sync { last: false });
    one_round(&mut engine, 0, 10, 10);
    assert!(matches!(engine.handle(Duration::ZERO, nothing), Action::Wait { .. }));
    engine.handle(Duration::ZERO, Input::Woken { upstream_stopped: true });
    assert_eq!(engine.handle(Duration::ZERO, Input::Synced { dirty_pages: 5 }), Action::PauseGuest);
}

#[test]
fn a_qemu_gets_no_ready_and_its_last_byte_commits() {
    let mut engine = started(SourceEngine::new(SourceConfig::new(PAGE, Handover::Shut)));
    one_round(&mut engine, 0, 100, 10);
    let mut inputs = vec![Input::Synced { dirty_pages: 0 }, Input::Done];
    inputs.extend([Input::Synced { dirty_pages: 0 }, Input::Done]);
    inputs.extend([sent(0, 0), Input::Done, Input::Done]);
    for input in inputs {
        engine.handle(Duration::ZERO, input);
    }
    assert!(!engine.is_committed());
    assert_eq!(engine.handle(Duration::ZERO, Input::Done), Action::Commit);
    assert!(engine.is_committed());
    assert_eq!(engine.handle(Duration::ZERO, Input::Done), Action::AwaitRunning);
    assert_eq!(engine.handle(Duration::ZERO, Input::Refused), Action::RollBack, "it has not started");
}

/// What is sent while the guest stands still counts, and an assumed rate replaces the measured one.
#[test]
fn device_state_and_an_assumed_rate_count() {
    let mut engine = started(engine());
    engine.set_state_bytes(10_000 * PAGE);
    one_round(&mut engine, 0, 100_000, 1000);
    assert_eq!(engine.expected_downtime(20_000), Some(Duration::from_millis(300)));
    assert_eq!(engine.expected_downtime(0), Some(Duration::from_millis(100)));
    engine.config.switchover_rate = Some(Rate(1_000_000 * PAGE));
    assert_eq!(engine.expected_downtime(20_000), Some(Duration::from_millis(30)));
}

fn late(on_timeout: OnTimeout) -> SourceEngine {
    let mut config = SourceConfig::new(PAGE, Handover::Native);
    config.timeout = Some((Duration::from_secs(5), on_timeout));
    let mut engine = started(SourceEngine::new(config));
    one_round(&mut engine, 0, 100_000, 1000);
    one_round(&mut engine, 1000, 100_000, 1000);
    engine
}

#[test]
fn a_migration_that_is_late_ends_and_the_guest_stays() {
    let ms = Duration::from_millis;
    let mut engine = late(OnTimeout::Cancel);
    assert!(matches!(
        engine.handle(ms(4999), Input::Synced { dirty_pages: 100_000 }),
        Action::OpenRound { .. }
    ));
    engine.handle(ms(4999), Input::Done);
    assert_eq!(engine.gave_up_after(), None);
    assert_eq!(engine.handle(ms(5000), sent(9, 1)), Action::RollBack);
    assert_eq!(engine.gave_up_after(), Some(ms(5000)));
    assert_eq!(engine.handle(ms(5001), Input::Done), Action::Finish(Outcome::StaysHere(Reason::Failed)));

    let mut engine = late(OnTimeout::Cancel);
    assert_eq!(engine.handle(ms(5000), Input::Synced { dirty_pages: 100_000 }), Action::RollBack);
}

#[test]
fn a_migration_that_is_late_and_to_finish_cuts_its_round_and_pauses() {
    let ms = Duration::from_millis;
    let mut engine = late(OnTimeout::Finish);
    engine.handle(ms(4000), Input::Synced { dirty_pages: 100_000 });
    engine.handle(ms(4000), Input::Done);
    let more = |engine: &mut SourceEngine, at| engine.handle(ms(at), sent(9, 1));
    assert!(matches!(more(&mut engine, 4500), Action::Send { .. }));
    assert_eq!(more(&mut engine, 5000), Action::CloseRound { kind: RoundKind::Live });
    engine.handle(ms(5000), Input::Done);
    assert_eq!(engine.handle(ms(5000), Input::Synced { dirty_pages: 100_000 }), Action::PauseGuest);
    assert_eq!(engine.gave_up_after(), None);
}

#[test]
fn a_long_round_is_cut_but_for_the_first() {
    let ms = Duration::from_millis;
    let mut config = SourceConfig::new(PAGE, Handover::Native);
    config.longest_round = Some(ms(5000));
    let mut engine = started(SourceEngine::new(config));
    engine.handle(ms(0), Input::Synced { dirty_pages: 100_000 });
    engine.handle(ms(0), Input::Done);
    let more = sent(9, 1);
    assert!(matches!(engine.handle(ms(60_000), more), Action::Send { .. }));
    engine.handle(ms(60_000), sent(0, 1));
    engine.handle(ms(60_000), Input::Done);
    engine.handle(ms(60_000), Input::Synced { dirty_pages: 100_000 });
    engine.handle(ms(60_000), Input::Done);
    assert!(matches!(engine.handle(ms(64_999), more), Action::Send { .. }));
    assert_eq!(engine.handle(ms(65_000), more), Action::CloseRound { kind: RoundKind::Live });
    assert_eq!(engine.handle(ms(65_000), Input::Done), Action::Sync { last: false });
}

#[test]
fn a_held_switchover_waits_between_the_pause_and_the_last_sync() {
    let mut config = SourceConfig::new(PAGE, Handover::Native);
    config.holds = true;
    let mut engine = started(SourceEngine::new(config));
    one_round(&mut engine, 0, 100, 10);
    let at = Duration::from_secs(1);
    assert_eq!(engine.handle(at, Input::Synced { dirty_pages: 0 }), Action::PauseGuest);
    assert_eq!(engine.handle(at, Input::Done), Action::Hold);
    assert_eq!(engine.handle(at, Input::Done), Action::Sync { last: true });
}

#[test]
fn rounds_that_bring_nothing_are_counted() {
    let mut engine = started(engine());
    one_round(&mut engine, 0, 100_000, 1000);
    for second in 1..10 {
        one_round(&mut engine, second * 1000, 90_000, 1000);
    }
    assert!(engine.progress().is_stalled());
    assert_eq!(engine.progress().rounds_without(), 8);
}

/// A stored guest: one round, and then nothing is dirty. Whatever is wrong with the estimate, it arrives.
#[test]
fn nothing_dirty_is_never_followed_by_a_round() {
    for (downtime, state, fixed, wire) in [
        (0, 1 << 20, 5, 1 << 30),
        (300, 1 << 20, 0, 1000),
        (300, 1 << 40, 9000, 1),
        (0, 0, 0, 1 << 30),
        (1, u64::MAX, 0, 1),
    ] {
        let mut config = SourceConfig::new(PAGE, Handover::Native);
        config.downtime_limit = Duration::from_millis(downtime);
        config.state_bytes = state;
        config.fixed_downtime = Duration::from_millis(fixed);
        let mut engine = started(SourceEngine::new(config));
        round_of(&mut engine, 0, (1000, wire), 1000);
        let next = engine.handle(Duration::from_secs(1), Input::Synced { dirty_pages: 0 });
        assert_eq!(next, Action::PauseGuest, "{downtime} ms, {state} bytes of state, {wire} on the wire");
    }
}

/// 128 MiB that compress to 1 MiB: the wire's rate says nothing of how fast pages leave, and the device state, which is
/// not compressed, takes longer at it than the limit. 400 pages more are a moment's work.
#[test]
fn pages_that_compress_are_reckoned_by_their_length_and_device_state_never_blocks() {
    let mut config = SourceConfig::new(PAGE, Handover::Native);
    config.downtime_limit = Duration::from_millis(50);
    config.state_bytes = 1 << 20;
    let mut engine = started(SourceEngine::new(config));
    round_of(&mut engine, 0, (32 << 10, 1 << 20), 1000);
    let (expected, unavoidable) = (engine.expected_downtime(400), engine.expected_downtime(0));
    assert_eq!(unavoidable, Some(Duration::from_secs(1)));
    assert!(expected.zip(unavoidable).is_some_and(|(all, state)| all - state < Duration::from_millis(13)));
    let busy = engine.handle(Duration::from_secs(1), Input::Synced { dirty_pages: 400 });
    assert!(matches!(busy, Action::OpenRound { .. }), "5 ms are left for pages: {busy:?}");
    let mut engine = started(SourceEngine::new(engine.config));
    round_of(&mut engine, 0, (32 << 10, 1 << 20), 1000);
    assert_eq!(engine.handle(Duration::from_secs(1), Input::Synced { dirty_pages: 100 }), Action::PauseGuest);
}

/// A first round at a rate that is far too low (a loaded moment, many zero pages), then rounds of a millisecond: they
/// correct it, although each alone is too short to.
#[test]
fn short_rounds_correct_a_rate() {
    let mut engine = started(engine());
    round_of(&mut engine, 0, (100, 100 * PAGE), 1000);
    let mut rounds = 0;
    for round in 0..200 {
        let at = Duration::from_millis(1000 + round);
        match engine.handle(at, Input::Synced { dirty_pages: 400 }) {
            Action::PauseGuest => break,
            Action::OpenRound { .. } => {}
            other => panic!("{other:?}"),
        }
        engine.handle(at, Input::Done);
        engine.handle(at + Duration::from_millis(1), sent(0, 400 * PAGE));
        engine.handle(at + Duration::from_millis(1), Input::Done);
        rounds += 1;
    }
    assert_eq!(rounds, 100, "a window's worth");
}

/// A postcopy from its pause on, towards either kind of peer.
const POSTCOPY: [(Input, Action); 10] = [
    (Input::Done, Action::Sync { last: true }),
    (Input::Synced { dirty_pages: 7 }, Action::SendDiscards),
    (Input::Done, Action::SendPackage),
    (Input::Done, Action::Commit),
    (Input::Done, Action::SendMissing { until: Duration::from_millis(50) }),
    (Input::Filled { pages_left: 3, taken: false }, Action::SendMissing { until: Duration::from_millis(50) }),
    (Input::Filled { pages_left: 0, taken: false }, Action::AwaitTaken),
    (Input::Running, Action::EndPostcopy),
    (Input::Done, Action::AwaitRunning),
    (Input::Running, Action::Release),
];

fn switching(handover: Handover, rule: PostcopyRule) -> SourceEngine {
    let mut config = SourceConfig::new(PAGE, handover);
    config.postcopy = Some(rule);
    started(SourceEngine::new(config))
}

/// Each step fails, is refused, or is cancelled. RUN commits, and the peer's word that it takes the guest ends what a
/// refusal can give back.
#[test]
fn p8_p12_a_switch_gives_the_guest_away_once() {
    let (committed, taken) = (4, 8);
    for handover in [Handover::Native, Handover::Shut] {
        for fault_at in 0..POSTCOPY.len() {
            for input in [Input::Failed, Input::Refused, Input::Done] {
                let mut engine = switching(handover, PostcopyRule::AfterRounds(0));
                let paused = engine.handle(Duration::ZERO, Input::Synced { dirty_pages: 7 });
                assert_eq!(paused, Action::PauseGuest);
                for (input, action) in &POSTCOPY[..fault_at] {
                    assert_eq!(engine.handle(Duration::ZERO, *input), *action, "{handover:?}");
                }
                let what = format!("{handover:?}, {input:?} at step {fault_at}");
                assert_eq!(engine.is_committed(), fault_at >= committed, "{what}");
                if input == Input::Done {
                    assert_eq!(engine.cancel(), fault_at < committed, "{what}");
                    if fault_at < committed {
                        assert_eq!(engine.handle(Duration::ZERO, input), Action::RollBack, "{what}");
                    }
                    continue;
                }
                let action = engine.handle(Duration::ZERO, input);
                let refused = input == Input::Refused && fault_at < taken;
                let expected = match fault_at {
                    at if at < committed || refused => Action::RollBack,
                    at if at < taken => Action::Finish(Outcome::InDoubt),
                    _ => Action::Finish(Outcome::Incomplete),
                };
                assert_eq!(action, expected, "{what}");
            }
        }
    }
}

#[test]
fn a_switch_comes_by_rule_or_by_command_unless_all_fits() {
    let secs = Duration::from_secs;
    // Much is dirty, and stays so.
    let much = Input::Synced { dirty_pages: 1_000_000 };
    let mut engine = switching(Handover::Shut, PostcopyRule::AfterRounds(2));
    one_round(&mut engine, 0, 1_000_000, 1000);
    one_round(&mut engine, 1000, 1_000_000, 1000);
    assert_eq!(engine.handle(secs(2), much), Action::PauseGuest);
    assert!(engine.is_postcopy());

    let mut engine = switching(Handover::Shut, PostcopyRule::AfterTime(secs(3)));
    one_round(&mut engine, 0, 1_000_000, 1000);
    assert!(matches!(engine.handle(secs(1), much), Action::OpenRound { .. }));
    engine.handle(secs(1), Input::Done);
    // In the middle of a round.
    assert_eq!(engine.handle(secs(3), sent(900_000, 0)), Action::CloseRound { kind: RoundKind::Live });
    engine.handle(secs(3), Input::Done);
    assert_eq!(engine.handle(secs(3), much), Action::PauseGuest);
    assert!(engine.is_postcopy() && !engine.start_postcopy(), "it is paused already");

    let mut engine = switching(Handover::Shut, PostcopyRule::OnCommand);
    assert!(matches!(engine.handle(secs(9), much), Action::OpenRound { .. }));
    engine.handle(secs(9), Input::Done);
    assert!(engine.start_postcopy());
    assert_eq!(engine.handle(secs(9), sent(999_999, 0)), Action::CloseRound { kind: RoundKind::Live });
    engine.handle(secs(9), Input::Done);
    assert_eq!(engine.handle(secs(9), Input::Synced { dirty_pages: 0 }), Action::PauseGuest);
    assert!(engine.is_postcopy(), "what was asked for comes, whatever fits");

    let mut config = SourceConfig::new(PAGE, Handover::Shut);
    config.postcopy = Some(PostcopyRule::OnCommand);
    config.timeout = Some((secs(5), OnTimeout::Postcopy));
    let mut engine = started(SourceEngine::new(config));
    one_round(&mut engine, 0, 1_000_000, 6000);
    assert_eq!(engine.handle(secs(6), much), Action::PauseGuest);
    assert!(engine.is_postcopy());

    let mut engine = switching(Handover::Shut, PostcopyRule::AfterRounds(1));
    one_round(&mut engine, 0, 1_000_000, 1000);
    assert_eq!(engine.handle(secs(1), Input::Synced { dirty_pages: 1 }), Action::PauseGuest);
    assert!(!engine.is_postcopy(), "what fits moves whole");
    assert!(!started(SourceEngine::new(SourceConfig::new(PAGE, Handover::Shut))).start_postcopy());
}
