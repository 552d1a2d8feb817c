use super::{SourceAction as A, SourceEvent as E, *};
use Next::{Does, Waits};

const PAGE: u64 = 4096;

/// What follows an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Does(A),
    Waits(Waiting),
    /// The action under way goes on.
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

#[test]
fn pauses_when_the_rest_fits_the_downtime() {
    let mut engine = started(engine());
    one_round(&mut engine, 0, 100_000, 1000);
    one_round(&mut engine, 1000, 30_001, 1000 * 30_001 / 100_000);
    assert_eq!(engine.step(Duration::from_secs(2), E::Synced { dirty_pages: 29_000 }), Does(A::PauseGuest));
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
    let again = engine.step(Duration::from_millis(8200), E::Synced { dirty_pages: 100_000 });
    assert_eq!(again, Does(A::PauseGuest));
}

/// What waits in the kernel delays the last pages: the guest runs on until it has left, and no round is made of nothing.
#[test]
fn what_is_under_way_is_waited_for() {
    let mut engine = started(engine());
    one_round(&mut engine, 0, 100_000, 4000);
    let at = Duration::from_secs(4);
    engine.set_under_way(40 << 20);
    for dirty_pages in [0, 100] {
        let wait = engine.step(at, E::Synced { dirty_pages });
        assert_eq!(wait, Waits(Waiting::Moment));
        assert!(engine.wake_at().is_some_and(|until| until > at));
        let woken = engine.step(at, E::Woken);
        assert_eq!(woken, Does(A::Sync { last: false }));
    }
    assert!(!engine.progress().is_stalled() && engine.progress().rounds_without() == 0);
    engine.set_under_way(1 << 20);
    assert_eq!(engine.step(at, E::Synced { dirty_pages: 100 }), Does(A::PauseGuest));
}

/// On page channels a short round leaves as a whole while it is closed.
#[test]
fn what_leaves_at_the_fence_makes_the_rate() {
    for left in [0, 100_000_000] {
        let mut engine = started(engine());
        engine.set_state_bytes(1000);
        let ms = Duration::from_millis;
        engine.step(ms(0), E::Synced { dirty_pages: 100_000 });
        engine.step(ms(0), E::Done);
        engine.step(ms(1), sent(0, 0));
        engine.set_sent_at_fence(Sent { guest: left, wire: left });
        engine.step(ms(1000), E::Done);
        assert_eq!(engine.rate(), (left > 0).then_some(Rate(left)));
        // Whether a rate is known or not: no round of nothing follows another for ever.
        assert_eq!(engine.step(ms(1000), E::Synced { dirty_pages: 0 }), Does(A::PauseGuest));
    }
}

#[test]
fn the_fixed_part_counts_and_never_blocks_for_ever() {
    let mut config = SourceConfig::new(PAGE, Handover::Native);
    config.fixed_downtime = Duration::from_millis(200);
    let mut engine = started(SourceEngine::new(config));
    one_round(&mut engine, 0, 100_000, 1000);
    one_round(&mut engine, 1000, 10_500, 105);
    let rest = E::Synced { dirty_pages: 9_900 };
    assert_eq!(engine.step(Duration::from_secs(2), rest), Does(A::PauseGuest));

    let mut config = SourceConfig::new(PAGE, Handover::Native);
    config.fixed_downtime = Duration::from_secs(9);
    let mut engine = started(SourceEngine::new(config));
    one_round(&mut engine, 0, 100_000, 1000);
    one_round(&mut engine, 1000, 3_500, 35);
    let rest = E::Synced { dirty_pages: 2_900 };
    assert_eq!(engine.step(Duration::from_secs(2), rest), Does(A::PauseGuest));
}

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

fn end_of(outcome: Outcome) -> Next {
    Does(A::Finish(outcome))
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
    assert!(matches!(engine.step(ms(4999), E::Synced { dirty_pages: 100_000 }), Does(A::OpenRound { .. })));
    engine.step(ms(4999), E::Done);
    assert_eq!(engine.overdue(), None);
    assert_eq!(engine.step(ms(5000), sent(9, 1)), Does(A::RollBack));
    assert_eq!(engine.overdue(), Some(Overdue::Switchover(ms(5000))));
    assert_eq!(engine.step(ms(5001), E::Done), Does(A::Finish(Outcome::StaysHere(Reason::Failed))));

    let mut engine = late(OnTimeout::Cancel);
    assert_eq!(engine.step(ms(5000), E::Synced { dirty_pages: 100_000 }), Does(A::RollBack));
}

#[test]
fn a_migration_that_is_late_and_to_finish_cuts_its_round_and_pauses() {
    let ms = Duration::from_millis;
    let mut engine = late(OnTimeout::Finish);
    engine.step(ms(4000), E::Synced { dirty_pages: 100_000 });
    engine.step(ms(4000), E::Done);
    let more = |engine: &mut SourceEngine, at| engine.step(ms(at), sent(9, 1));
    assert!(matches!(more(&mut engine, 4500), Does(A::Send)));
    assert_eq!(more(&mut engine, 5000), Does(A::CloseRound { kind: RoundKind::Live }));
    engine.step(ms(5000), E::Done);
    assert_eq!(engine.step(ms(5000), E::Synced { dirty_pages: 100_000 }), Does(A::PauseGuest));
    assert_eq!(engine.overdue(), None);
}

#[test]
fn a_long_round_is_cut_but_for_the_first() {
    let ms = Duration::from_millis;
    let mut config = SourceConfig::new(PAGE, Handover::Native);
    config.longest_round = Some(ms(5000));
    let mut engine = started(SourceEngine::new(config));
    engine.step(ms(0), E::Synced { dirty_pages: 100_000 });
    engine.step(ms(0), E::Done);
    let more = sent(9, 1);
    assert!(matches!(engine.step(ms(60_000), more), Does(A::Send)));
    engine.step(ms(60_000), sent(0, 1));
    engine.step(ms(60_000), E::Done);
    engine.step(ms(60_000), E::Synced { dirty_pages: 100_000 });
    engine.step(ms(60_000), E::Done);
    assert!(matches!(engine.step(ms(64_999), more), Does(A::Send)));
    assert_eq!(engine.step(ms(65_000), more), Does(A::CloseRound { kind: RoundKind::Live }));
    assert_eq!(engine.step(ms(65_000), E::Done), Does(A::Sync { last: false }));
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
        let next = engine.step(Duration::from_secs(1), E::Synced { dirty_pages: 0 });
        assert_eq!(next, Does(A::PauseGuest), "{downtime} ms, {state} bytes of state, {wire} on the wire");
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
    let busy = engine.step(Duration::from_secs(1), E::Synced { dirty_pages: 400 });
    assert!(matches!(busy, Does(A::OpenRound { .. })), "5 ms are left for pages: {busy:?}");
    let mut engine = started(SourceEngine::new(engine.config));
    round_of(&mut engine, 0, (32 << 10, 1 << 20), 1000);
    assert_eq!(engine.step(Duration::from_secs(1), E::Synced { dirty_pages: 100 }), Does(A::PauseGuest));
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
        match engine.step(at, E::Synced { dirty_pages: 400 }) {
            Does(A::PauseGuest) => break,
            Does(A::OpenRound { .. }) => {}
            other => panic!("{other:?}"),
        }
        engine.step(at, E::Done);
        engine.step(at + Duration::from_millis(1), sent(0, 400 * PAGE));
        engine.step(at + Duration::from_millis(1), E::Done);
        rounds += 1;
    }
    assert_eq!(rounds, 100, "a window's worth");
}

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

/// Each step fails, is refused, or is cancelled. RUN commits, and the peer's word that it takes the guest ends what a
/// refusal can give back.
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
    // Much is dirty, and stays so.
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

/// The waits for READY: of a peer that says that it is at work, and of one that says nothing.
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
    assert_eq!(silent.overdue(), Some(Overdue::Sign(secs(10))));

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

/// A relay in doubt goes on listening, and a late answer ends the doubt.
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

/// Nothing that a peer, a fault or a user does at the wrong moment is more than a failure, and never gives the guest away or
/// takes it back.
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
    // Any two events behind every prefix of a migration, polled or not.
    let walk = [
        E::Begin,
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

/// The connection is lost at each step behind RUN, again in each step of the recovery, and for good. The guest never runs here
/// again, and pages go on only after the ends have compared.
#[test]
fn p9_p11_a_lost_connection_is_followed_by_another_as_often_as_it_is_lost() {
    let (committed, taken) = (4, 8);
    let recovery = [
        (E::Lost, Does(A::Reconnect)),
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
        // Connecting is tried again by whoever does it, and its failure is the end.
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
