//! A switch to postcopy between two ramwires.
#![allow(clippy::unwrap_used)]

use super::{bytes, ends_with};
use crate::engine::{Ending, Outcome, PostcopyRule};
use crate::session::*;

#[test]
fn p2_a_guest_switches_to_postcopy_between_two_ramwires() {
    for command in [false, true] {
        let rule = if command { PostcopyRule::OnCommand } else { PostcopyRule::AfterRounds(0) };
        let postcopy = PostcopySettings::new(rule);
        let mut ends = ends_with(|settings| {
            settings.digest = false;
            settings.postcopy = Some(postcopy);
        });
        ends.destination.settings_mut().postcopy = true;
        if command {
            ends.source.control().start_postcopy().unwrap();
        }
        let thread = std::thread::spawn(move || ends.destination.run());
        let sent = ends.source.run();
        let arrived = thread.join().unwrap();
        assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
        assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
        assert!(arrived.native && arrived.missing_pages.is_some() && sent.statistics.postcopy_bytes > 0);
        for block in 0..2 {
            assert!(bytes(&ends.from, block) == bytes(&ends.to, block), "block {block} differs");
        }
        assert!(!ends.source_machine.runs() && ends.destination_machine.runs());
        assert_eq!(ends.destination_machine.0.lock().unwrap().1, b"devices");
    }
}

/// A destination that may not is asked before a page is sent, and what can't be switched is refused before a byte is.
#[test]
fn p3_a_switch_that_can_not_be_is_refused_and_the_guest_runs_on() {
    let postcopy = || Some(PostcopySettings::new(PostcopyRule::AfterRounds(0)));
    let ends = ends_with(|settings| (settings.digest, settings.postcopy) = (false, postcopy()));
    let thread = std::thread::spawn(move || ends.destination.run());
    let sent = ends.source.run();
    assert_eq!(thread.join().unwrap().ending, Ending::Discarded);
    assert!(sent.guest_is_safe_here() && ends.source_machine.runs(), "{:?}", sent.error);
    assert_eq!(sent.statistics.pages.normal, 0);

    let ends = ends_with(|settings| settings.postcopy = postcopy());
    let sent = ends.source.run();
    let text = sent.error.as_ref().map(ToString::to_string).unwrap_or_default();
    assert!(text.contains("digest"), "{text}");
    assert_eq!((sent.guest_is_safe_here(), sent.statistics.transferred), (true, 0));
}
