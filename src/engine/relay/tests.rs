//! What a relay decides, in order and after each loss.

use super::*;
use RelayAction as A;
use RelayEvent as E;

/// The actions that follow from `events`, in order.
fn after(events: &[RelayEvent]) -> (RelayEngine, Vec<RelayAction>) {
    let mut engine = RelayEngine::new(Duration::from_millis(300));
    events.iter().for_each(|event| engine.handle(Duration::ZERO, *event));
    let actions = std::iter::from_fn(|| engine.poll()).collect();
    (engine, actions)
}

/// A switch to postcopy up to the last page.
const SWITCH: [RelayEvent; 5] =
    [E::Switched { waits: true }, E::FarReady, E::Guarded, E::FarTook, E::SourceKnows];
const DECIDED: [RelayAction; 5] = [A::SendSwitch, A::Guard, A::GiveAway, A::TellTaken, A::Unguard];

#[test]
fn a_switch_to_postcopy_is_passed_on_in_order() {
    let whole = [&SWITCH[..], &[E::FarEnded(FarEnd::Runs), E::Told]].concat();
    let (engine, actions) = after(&whole);
    let end = [A::TellRunning, A::Finish(RelayEnding::Running)];
    assert_eq!(actions, [&DECIDED[..], &end].concat());
    assert!(engine.has_switched() && engine.may_read());
}

/// Before RUN the source is told of a failure, between RUN and the far end's answer the relay is in doubt, and from
/// the answer on the guest is the far end's.
#[test]
fn what_is_lost_in_postcopy_gives_the_guest_to_one_end() {
    let lost = [E::FarEnded(FarEnd::Unknown), E::SourceGone];
    for (step, loss) in (1..=5).flat_map(|step| lost.map(|loss| (step, loss))) {
        let (engine, actions) = after(&[&SWITCH[..step], &[loss]].concat());
        let (_, before) = after(&SWITCH[..step]);
        let decided = &actions[before.len()..];
        let expected: &[RelayAction] = match (step, loss) {
            (1 | 2, _) => &[A::Abandon, A::TellFailed],
            // The source may not know, and resumes its guest then.
            (3 | 4, E::SourceGone) => &[A::Abandon, A::TellNothing],
            (3 | 4, _) => &[A::ReportDoubt],
            _ => &[A::Abandon, A::Part],
        };
        assert_eq!(decided, expected, "{loss:?} after {step} steps");
        let ending = match expected {
            [_, A::TellFailed] => RelayEnding::Failed,
            [_, A::Part] => RelayEnding::Incomplete,
            _ => RelayEnding::InDoubt,
        };
        assert_eq!(engine.ending(), ending, "{loss:?} after {step} steps");
    }
}

/// A source that never takes its guest back need not be kept in doubt: both ends keep what they have.
#[test]
fn a_source_that_waits_for_no_answer_is_held_by_nobody() {
    let switch = [E::Switched { waits: false }, E::FarReady, E::FarTook, E::SourceKnows];
    for (step, ending) in
        [RelayEnding::Failed, RelayEnding::Incomplete, RelayEnding::Incomplete].into_iter().enumerate()
    {
        for lost in [E::FarEnded(FarEnd::Unknown), E::SourceGone] {
            let (engine, actions) = after(&[&switch[..=step], &[lost]].concat());
            assert_eq!(engine.ending(), ending, "{lost:?} after {switch:?}");
            assert!(!actions.contains(&A::Guard) && !actions.contains(&A::ReportDoubt));
        }
    }
}

#[test]
fn a_doubt_in_postcopy_ends_with_the_far_ends_answer() {
    let doubt = [E::Switched { waits: true }, E::FarReady, E::Guarded, E::FarSilent];
    let (engine, _) = after(&doubt);
    assert!(engine.is_in_doubt());
    let (engine, actions) = after(&[&doubt[..], &[E::FarTook, E::SourceKnows]].concat());
    assert!(!engine.is_in_doubt() && actions.ends_with(&[A::TellTaken, A::Unguard]));
    let (_, actions) = after(&[&doubt[..], &[E::FarEnded(FarEnd::DoesNotRun)]].concat());
    assert_eq!(actions.last(), Some(&A::TellFailed));
}

/// The side towards the source then learns why, and nothing here is taken for the whole guest.
#[test]
fn a_switch_that_comes_after_the_far_end_has_failed_is_a_switch() {
    let (engine, actions) = after(&[E::FarEnded(FarEnd::DoesNotRun), E::Switched { waits: true }, E::Told]);
    assert!(engine.has_switched());
    assert_eq!(actions, [A::Abandon, A::TellFailed, A::Finish(RelayEnding::Failed)]);
}

/// The far end had taken the guest when it was lost: what the source has heard by then, or later, decides.
#[test]
fn a_far_end_that_is_lost_after_it_took_the_guest_leaves_a_doubt_until_the_source_is_known_to_know() {
    let lost = [&SWITCH[..4], &[E::FarEnded(FarEnd::Unknown)]].concat();
    let (engine, actions) = after(&lost);
    assert!(engine.is_in_doubt() && engine.is_given_away() && actions.ends_with(&[A::ReportDoubt]));
    for (event, decided, ending) in [
        (E::SourceKnows, [A::Abandon, A::Part], RelayEnding::Incomplete),
        (E::SourceGone, [A::Abandon, A::TellNothing], RelayEnding::InDoubt),
        (E::NotThere, [A::Abandon, A::TellFailed], RelayEnding::Failed),
    ] {
        let (engine, actions) = after(&[&lost[..], &[event]].concat());
        assert!(actions.ends_with(&decided) && engine.ending() == ending, "{event:?}: {actions:?}");
    }
}

#[test]
fn no_cancel_is_in_time_after_a_switch_to_postcopy() {
    for step in 1..=SWITCH.len() {
        let (engine, actions) = after(&[&SWITCH[..step], &[E::Cancel]].concat());
        let (_, before) = after(&SWITCH[..step]);
        assert!(!engine.may_cancel() && actions == before, "after {step} steps: {actions:?}");
    }
}

/// A source without a return path may have written its last byte whenever the far end fails or a cancel comes.
#[test]
fn a_guest_that_may_be_given_unasked_is_not_said_to_be_at_its_source() {
    let steps = [E::RamComplete, E::StateArrived, E::FarReady, E::GuestGiven { waits: false }];
    for (step, end) in
        (0..=4).flat_map(|step| [E::FarEnded(FarEnd::DoesNotRun), E::Cancel].map(|end| (step, end)))
    {
        if step > 2 && end == E::Cancel {
            continue;
        }
        for (first, ending) in
            [(E::GivesUnasked, RelayEnding::Unanswered), (E::SourceKept, RelayEnding::Failed)]
        {
            let (engine, actions) = after(&[&[first], &steps[..step], &[end]].concat());
            assert_eq!(engine.ending(), ending, "{end:?} after {step} steps");
            assert!(engine.has_failed() && actions.ends_with(&[A::TellFailed]));
        }
    }
    let (engine, _) = after(&[E::Cancel, E::GivesUnasked]);
    assert_eq!(engine.ending(), RelayEnding::Unanswered, "the cancel was first");
    let (engine, _) = after(&[E::GivesUnasked, E::Cancel, E::SourceKept]);
    assert_eq!(engine.ending(), RelayEnding::Failed, "it closed before its last byte");
    let (engine, _) = after(&[&[E::GivesUnasked], &steps[..], &[E::FarEnded(FarEnd::Runs)]].concat());
    assert_eq!(engine.ending(), RelayEnding::Running);
}
