//! Where the guest is, or may be, when a relay does not know or ends: what an operator is told and can do.

use ramwire::engine::RelayEnding;
use ramwire::session::{CancelReply, Notice, RelayControl};
use signal_hook::consts::SIGUSR1;
use signal_hook::iterator::Signals;

use super::super::guardian::advice;
use super::super::output::note;

/// What an operator does when a connection was lost in postcopy.
pub(super) const GO_ON_WITHOUT: &str = "the guest was given to the far end, and what it misses there is at its source: keep both. \
                             They go on without this relay: `migrate-recover` at the far end, then at the source \
                             `migrate` to that address with `resume`, or through \
                             `relay --recover` where they can't reach each other";

/// What an operator does when `--recover` has ended early.
pub(super) const GO_ON_AGAIN: &str = "the connection ended before all memory had come: keep both ends, which pause again. They go on as \
                           before: `migrate-recover` at the far end, then at the source `migrate` with `resume`, to the far \
                           end or to another `relay --recover`";

/// What an operator does when a switch to postcopy has failed, or is in doubt at the end.
pub(super) const AT_ITS_SOURCE: &str = "the guest's source had switched to postcopy, and only there is the guest whole: keep the \
                             source. Nothing of it is kept here (--keep). Before you let it go on there, make sure that \
                             it does not run at the far end";

/// What an operator does where the source waits for no answer, in doubt.
pub(super) const LOOK_THERE: &str = "Look at the far end: if the guest runs there, it has arrived, and its source may be ended. If it \
                          does not and never will, it runs nowhere: it is whole at its source until that ends (`cont` lets \
                          it go on there), or in the file that it came from";

/// Where the guest may be that a source without a return path has sent, and what an operator does.
pub(super) const UNANSWERED: &str = "in doubt: the guest does not run at the far end. Its source has no return path, and gives it away \
                          with its last byte without an answer. Look at the source (`query-migrate` of a QEMU): if it has \
                          completed, the guest runs nowhere, and is whole there: `cont` lets it go on. If not, it runs on \
                          there. With QEMU's capability `return-path` the source waits for an answer";

/// The message if this process ends while the guest is in doubt. `guardian` is the process that holds the connection of
/// a source that waits for the outcome.
pub(super) fn left_in_doubt(control: &RelayControl, guardian: u32) -> String {
    let then = if control.has_switched() { AT_ITS_SOURCE } else { LOOK_THERE };
    match control.source_waits() {
        true => format!(
            "ramwire relay: in doubt, and this process ends: process {guardian} keeps the source's connection open and \
             waits for the far end's answer, where it can read it"
        ),
        false => format!(
            "ramwire relay: in doubt, and this process ends, as does the wait for the far end's answer. {then}"
        ),
    }
}

/// What a second signal leaves behind.
pub(super) fn left_behind(control: &RelayControl, guardian: u32, reply: CancelReply) -> Option<String> {
    match (control.ending(), reply) {
        (RelayEnding::Unanswered, _) => Some(format!("ramwire relay: {UNANSWERED}")),
        (_, CancelReply::Accepted) => None,
        (RelayEnding::Incomplete, _) => Some(format!("ramwire relay: {GO_ON_WITHOUT}")),
        _ if control.is_given_away() => Some(left_in_doubt(control, guardian)),
        _ if control.has_switched() => Some(format!("ramwire relay: {AT_ITS_SOURCE}")),
        _ => Some(
            "ramwire relay: in doubt: the source may have given its guest to this relay, which ends: the far end was not \
             given it. Look whether it runs at its source"
                .into(),
        ),
    }
}

/// SIGUSR1 means that the guest does not run at the far end.
pub(super) fn decide_on_signal(control: RelayControl) {
    let Ok(mut signals) = Signals::new([SIGUSR1]) else {
        tracing::warn!("no signal handler for SIGUSR1: a guest in doubt is decided by ending its source");
        return;
    };
    let decide = move || {
        for _ in signals.forever() {
            match control.far_end_is_dead() {
                true if !control.source_waits() => {
                    note!("ramwire relay: the far end is waited for no longer");
                }
                true => note!(
                    "ramwire relay: the source gets the report that the migration failed, and continues"
                ),
                false => note!("ramwire relay: SIGUSR1 has no effect: no guest is in doubt"),
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("ramwire-decides".into()).spawn(decide) {
        tracing::warn!(%error, "no thread for SIGUSR1");
    }
}

pub(super) fn tell_notice(notice: &Notice) {
    match notice {
        Notice::NoReturnPath => note!(
            "ramwire relay: the source opened no return path, so it can't be informed of the outcome: check \
            the far end before you end the source, or set its return-path capability"
        ),
        Notice::InDoubt { why, switched: false, source_waits: false } => note!(
            "ramwire relay: in doubt: the far end was given the guest and fell silent ({why}). This relay waits for its \
             answer, and can't tell it to the source. {LOOK_THERE}. `kill -USR1 {}` ends the wait, and this relay keeps \
             the guest if it has --keep DIR",
            std::process::id()
        ),
        Notice::InDoubt { why, switched, .. } => note!(
            "ramwire relay: in doubt: the far end was given the guest and fell silent ({why}). The source waits, and \
             this relay for the far end's answer. {}",
            advice(*switched, std::process::id())
        ),
        Notice::NotGuarded => note!(
            "ramwire relay: the source's connection is none that another process can hold: should this one be killed \
             before the far end has answered, the source may let the guest run again"
        ),
    }
}
