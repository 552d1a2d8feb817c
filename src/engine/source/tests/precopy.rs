use super::*;

#[test]
fn pauses_when_the_rest_fits_the_downtime() {
    let mut engine = started(engine());
    one_round(&mut engine, 0, 100_000, 1000);
    one_round(&mut engine, 1000, 30_001, 1000 * 30_001 / 100_000);
    assert_eq!(engine.step(Duration::from_secs(2), E::Synced { dirty_pages: 29_000 }), Does(A::PauseGuest));
}

/// A guest that dirties all its pages again in any round, however short: 400 MB of them, or 10 MB of differences.
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

/// Bytes in the kernel's queue delay the last pages: the guest continues until they have left, and there are no empty
/// rounds.
#[test]
fn what_is_under_way_is_waited_for() {
    let mut engine = started(engine());
    one_round(&mut engine, 0, 100_000, 4000);
    let at = Duration::from_secs(4);
    engine.set_unacknowledged(40 << 20);
    for dirty_pages in [0, 100] {
        let wait = engine.step(at, E::Synced { dirty_pages });
        assert_eq!(wait, Waits(Waiting::Moment));
        assert!(engine.wake_at().is_some_and(|until| until > at));
        let woken = engine.step(at, E::Woken);
        assert_eq!(woken, Does(A::Sync { last: false }));
    }
    assert!(!engine.progress().is_stalled() && engine.progress().rounds_without_progress() == 0);
    engine.set_unacknowledged(1 << 20);
    assert_eq!(engine.step(at, E::Synced { dirty_pages: 100 }), Does(A::PauseGuest));
}

/// On page channels a short round leaves this host as a whole while it is closed.
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
        // Whether a rate is known or not: empty rounds do not follow each other for ever.
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

/// Bytes that are sent while the guest is stopped count, and an assumed rate replaces the measured one.
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
fn rounds_that_bring_nothing_are_counted() {
    let mut engine = started(engine());
    one_round(&mut engine, 0, 100_000, 1000);
    for second in 1..10 {
        one_round(&mut engine, second * 1000, 90_000, 1000);
    }
    assert!(engine.progress().is_stalled());
    assert_eq!(engine.progress().rounds_without_progress(), 8);
}

/// A stored guest: one round, then no page is dirty. It arrives whatever the estimate is.
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

/// 128 MiB that compress to 1 MiB: the wire's rate does not show how fast pages are sent, and at that rate the
/// uncompressed device state takes longer than the limit. 400 more pages take only a moment.
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

/// A first round at a rate that is far too low (load, many zero pages), then rounds of a millisecond: together they
/// correct the rate, although each alone is too short for it.
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
