//! The destination of a precopy migration, from the end of the stream to the running guest.
//!
//! ```text
//! a ramwire source:  STATE_SENT -> load -> [digests compared] -> READY -> COMMIT -> resume -> RUNNING
//!                    [-> result of the source's memory check]
//! memory is passed:  STATE_SENT -> [digests compared] -> READY -> COMMIT -> load -> resume -> RUNNING
//! a QEMU source:     end of the device state -> load -> resume -> SHUT(0)
//! postcopy:          package -> serve faults, load and resume meanwhile -> last page -> SHUT(0), received
//! the connection lost, and the source may connect again:
//!   before COMMIT:   wait -> RESUME -> receive again; the device state that came is of no use any more
//!   behind READY:    wait -> RESUME, COMMIT was sent -> resume -> RUNNING
//!   behind COMMIT:   wait -> RESUME, COMMIT was sent -> RUNNING
//! ```
//!
//! # Orders that must hold
//!
//! The guest never runs here before the source has handed it over: without COMMIT (towards a QEMU: without the last
//! byte of its device state) every end discards what arrived.
//!
//! A source without a return path waits for no answer: it has given its guest away when it has written its last byte,
//! which may still be under way to here. Only a source that has closed its connection before its last byte is known to
//! have kept the guest. Every other end is a doubt, and after the last byte this is kept as the only copy.
//!
//! Where memory was passed it is the source's until COMMIT, and loading device state may write to it: it is loaded after
//! COMMIT.

mod event;

use std::time::Duration;

pub use event::{DestinationAction, DestinationEvent, Ending};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Receiving,
    Digesting,
    AwaitingDigests,
    Comparing,
    Loading,
    Listening,
    Filling,
    Recovering,
    /// Without a connection, before the guest was reported to run here.
    AwaitingSource,
    AwaitingGuest,
    SendingReady,
    AwaitingCommit,
    Resuming,
    SendingRunning,
    AwaitingMemoryCheck,
    Keeping,
    Failing(Ending),
    Ended(Ending),
}

/// What the source is, and wants.
#[derive(Debug, Default)]
struct Source {
    native: bool,
    digest: bool,
    memory_check: bool,
    /// It waits for no answer.
    unasked: bool,
}

/// How far it has come.
#[derive(Debug, Default)]
struct Reached {
    digests_here: bool,
    committed: bool,
    /// READY was sent, and the source has not taken back its guest since.
    ready: bool,
    /// The guest runs here, and came without postcopy.
    runs: bool,
    /// All pages of a guest that runs here since a switch to postcopy have arrived.
    whole: bool,
    /// All missing pages were read from the source's memory, which is not needed any more.
    read_all: bool,
}

/// The destination's state machine.
#[derive(Debug)]
pub struct DestinationEngine {
    phase: Phase,
    /// What to do next, until it is taken.
    outbox: Option<DestinationAction>,
    /// An action was taken and not answered.
    busy: bool,
    wake_at: Option<Duration>,
    commit_timeout: Duration,
    source: Source,
    recoverable: bool,
    resumable: bool,
    reached: Reached,
    late_load: bool,
}

impl DestinationEngine {
    /// The stream begins. From READY on COMMIT is waited for at most `commit_timeout`.
    pub fn new(commit_timeout: Duration) -> Self {
        Self {
            phase: Phase::Receiving,
            outbox: Some(DestinationAction::Receive),
            busy: false,
            wake_at: None,
            commit_timeout,
            source: Source::default(),
            recoverable: false,
            resumable: false,
            reached: Reached::default(),
            late_load: false,
        }
    }

    /// The source has no return path: it gives its guest away with its last byte, unasked. Before the first page.
    pub fn source_gives_unasked(&mut self) {
        self.source.unasked = true;
    }

    /// Whether a lost connection may be followed by another, once the guest runs here among missing pages. May change.
    pub fn set_recoverable(&mut self, recoverable: bool) {
        self.recoverable = recoverable;
    }

    /// Whether a connection that is lost before the source knows that the guest runs here may be followed by another. May
    /// change.
    pub fn set_resumable(&mut self, resumable: bool) {
        self.resumable = resumable;
    }

    /// Memory was passed by a ramwire source, and nothing may be written to it before COMMIT: the device state is loaded after
    /// it. Before STATE_SENT.
    pub fn load_after_commit(&mut self) {
        self.late_load = true;
    }

    /// True once the source sends ramwire's messages.
    pub fn is_native(&self) -> bool {
        self.source.native
    }

    /// True once the source has handed over the guest.
    pub fn is_committed(&self) -> bool {
        self.reached.committed
    }

    /// No page of a guest that the source has handed over is missing: the connection is no longer needed for them.
    pub fn all_pages_came(&mut self) {
        self.reached.read_all = true;
    }

    /// True once a guest that was started among missing pages misses none.
    pub fn is_whole(&self) -> bool {
        self.reached.whole
    }

    /// True while the source alone decides: READY was sent, or the guest was handed over.
    pub fn is_bound(&self) -> bool {
        self.reached.committed || self.reached.ready && !self.has_failed()
    }

    /// The next thing to do. There is always one until the last was taken and not answered.
    pub fn poll(&mut self) -> Option<DestinationAction> {
        if let Phase::Ended(ending) = self.phase {
            return Some(DestinationAction::Finish(ending));
        }
        let action = self.outbox.take();
        self.busy |= action.is_some();
        action
    }

    /// Time at which the current action is to be broken off, with [`DestinationEvent::Woken`].
    pub fn wake_at(&self) -> Option<Duration> {
        if self.outbox.is_some() { Some(Duration::ZERO) } else { self.wake_at }
    }

    /// Takes an event at any time. `now` counts from the start of the migration. A message of the source that is out of
    /// turn is a failure.
    pub fn handle(&mut self, now: Duration, event: DestinationEvent) {
        use DestinationEvent as E;
        match event {
            // Bound, the source alone decides.
            E::Cancel if self.is_bound() || self.has_failed() => {}
            E::Cancel => self.fail(),
            E::Woken if self.wake_at.is_none_or(|at| now < at) => {}
            E::SourceLeft => {
                (self.busy, self.source.unasked) = (false, false);
                self.answered(now, event);
            }
            E::Failed | E::Lost | E::Woken => {
                self.busy = false;
                self.answered(now, event);
            }
            // The cancel met the last byte: the source has given the guest away, and all of it is here.
            E::Tail if self.phase == Phase::Failing(Ending::Unanswered) && self.outbox.is_some() => {
                self.reached.committed = true;
                self.go(Phase::Loading, DestinationAction::LoadState);
            }
            // Without a current action this is no answer: another event has ended the action.
            _ if !std::mem::take(&mut self.busy) => {}
            _ => self.answered(now, event),
        }
    }

    /// True while the failure of the migration is to be reported to the source.
    pub fn is_failing(&self) -> bool {
        matches!(self.phase, Phase::Failing(_))
    }

    fn has_failed(&self) -> bool {
        matches!(self.phase, Phase::Failing(_) | Phase::Ended(_))
    }

    /// The current action is done, or was ended.
    fn answered(&mut self, now: Duration, event: DestinationEvent) {
        use {DestinationAction as A, DestinationEvent as E};
        match (self.phase, event) {
            (Phase::Failing(Ending::Unanswered), E::SourceLeft) => self.end(Ending::Discarded),
            (Phase::Failing(ending), _) => self.end(ending),
            (Phase::Ended(_), _) => {}
            (Phase::Receiving, E::Hello { digest, memory_check }) => {
                (self.source.native, self.source.digest, self.source.memory_check) =
                    (true, digest, memory_check);
                self.read_on();
            }
            (Phase::Receiving, E::Tail) if !self.source.native => {
                // The source has sent the byte that commits: from here on it does not resume by itself.
                self.reached.committed = true;
                self.go(Phase::Loading, A::LoadState);
            }
            (Phase::Receiving, E::Package) => {
                self.reached.committed = true;
                self.go(Phase::Listening, A::Listen);
            }
            (Phase::Listening, E::Done) => self.go(Phase::Filling, A::Receive),
            (Phase::Filling, E::Tail) => self.go(Phase::AwaitingGuest, A::AwaitGuest),
            (Phase::AwaitingGuest, E::Done) => {
                self.reached.whole = true;
                self.go(Phase::SendingRunning, A::SendRunning);
            }
            // The source never resumes after it has handed over the guest, and the guest runs here: no failure is
            // reported.
            (Phase::Filling | Phase::Recovering, E::Lost) if self.recoverable => {
                self.go(Phase::Recovering, A::AwaitRecovery);
            }
            // The source has not received the report that all pages have arrived: it connects again to receive it.
            (Phase::SendingRunning, E::Lost) if self.reached.whole && self.recoverable => {
                self.go(Phase::Recovering, A::AwaitRecovery);
            }
            (Phase::Recovering, E::Done) => self.go(Phase::Filling, A::Receive),
            // The guest may not have been started yet.
            (Phase::Filling, E::Lost) if self.reached.read_all => {
                self.go(Phase::AwaitingGuest, A::AwaitGuest)
            }
            (Phase::Filling | Phase::Recovering | Phase::AwaitingGuest, E::Lost) => {
                self.end(if self.reached.whole { Ending::Running } else { Ending::Incomplete });
            }
            (Phase::Receiving, E::StateSent) if self.source.native && self.source.digest => {
                self.go(Phase::Digesting, A::MakeDigest);
            }
            (Phase::Receiving, E::StateSent) if self.source.native => self.load_or_wait(),
            (Phase::Receiving | Phase::Digesting, E::Digests) if self.source.digest => {
                self.reached.digests_here = true;
                self.read_on();
            }
            (Phase::Digesting, E::Done) if self.reached.digests_here => {
                self.go(Phase::Comparing, A::CompareDigest)
            }
            (Phase::Digesting, E::Done) => self.go(Phase::AwaitingDigests, A::Receive),
            (Phase::AwaitingDigests, E::Digests) => self.go(Phase::Comparing, A::CompareDigest),
            (Phase::Comparing, E::Done) => self.load_or_wait(),
            (phase, E::Lost) if self.survives_disconnect(phase) => {
                self.go(Phase::AwaitingSource, A::AwaitRecovery)
            }
            (Phase::AwaitingSource, E::Resumed { committed }) => self.resumed(committed),
            // The source may never learn it.
            (Phase::AwaitingSource, _) if self.reached.runs => self.end(Ending::Running),
            (Phase::Loading, E::Done) if self.source.native && !self.reached.committed => self.send_ready(),
            (Phase::Loading, E::Done) => self.go(Phase::Resuming, A::Resume),
            (Phase::SendingReady, E::Done) => {
                self.go(Phase::AwaitingCommit, A::Receive);
                self.wake_at = Some(now + self.commit_timeout);
            }
            (Phase::AwaitingCommit, E::Commit) => {
                self.reached.committed = true;
                match self.late_load {
                    true => self.go(Phase::Loading, A::LoadState),
                    false => self.go(Phase::Resuming, A::Resume),
                }
            }
            // A QEMU that receives a failure resumes its guest, and ours may run: report that the guest is here.
            (Phase::Resuming, E::MayRun) if !self.source.native => self.go(Phase::Keeping, A::SendRunning),
            (Phase::Keeping, _) => self.end(Ending::Stranded),
            (Phase::Resuming, E::Done) => {
                self.reached.runs = true;
                self.go(Phase::SendingRunning, A::SendRunning);
            }
            (Phase::SendingRunning, E::Done) if self.source.memory_check && self.source.native => {
                self.go(Phase::AwaitingMemoryCheck, A::AwaitMemoryCheck);
            }
            // The guest runs here. A report that the source did not receive, or the result of its memory check, changes
            // nothing about that.
            (Phase::SendingRunning | Phase::AwaitingMemoryCheck, _) => self.end(Ending::Running),
            _ => self.fail(),
        }
    }

    /// Everything has arrived, as it was sent.
    fn load_or_wait(&mut self) {
        match self.late_load {
            true => self.send_ready(),
            false => self.go(Phase::Loading, DestinationAction::LoadState),
        }
    }

    /// From here on the source alone decides.
    fn send_ready(&mut self) {
        self.reached.ready = true;
        self.go(Phase::SendingReady, DestinationAction::SendReady);
    }

    /// True if the source may connect again after the connection was lost in this phase.
    fn survives_disconnect(&self, phase: Phase) -> bool {
        let lives = matches!(
            phase,
            Phase::Receiving
                | Phase::Digesting
                | Phase::AwaitingDigests
                | Phase::SendingReady
                | Phase::AwaitingCommit
                | Phase::SendingRunning
                | Phase::AwaitingSource
        );
        self.resumable && self.source.native && lives && !self.reached.whole
    }

    /// The source has connected again. Without COMMIT its guest runs on there, and what follows is newer than the device
    /// state here. With it the guest is ours, whether COMMIT itself came or not: only the newest connection is asked.
    fn resumed(&mut self, committed: bool) {
        match committed {
            true if self.reached.runs => self.go(Phase::SendingRunning, DestinationAction::SendRunning),
            // A source that takes back what it has handed over.
            false if self.reached.runs => self.end(Ending::Running),
            false if !self.reached.committed => {
                (self.reached.ready, self.reached.digests_here) = (false, false);
                self.go(Phase::Receiving, DestinationAction::Receive);
            }
            true if self.reached.ready && !self.reached.committed => {
                self.reached.committed = true;
                self.go(Phase::Resuming, DestinationAction::Resume);
            }
            _ => self.fail(),
        }
    }

    /// After the package, and before the guest was started.
    fn misses_pages(&self) -> bool {
        matches!(self.phase, Phase::Listening | Phase::Filling | Phase::Recovering | Phase::AwaitingGuest)
    }

    /// A QEMU receives SHUT(1) and resumes its guest, so what arrived is discarded although its last byte has arrived.
    /// A ramwire never resumes after COMMIT, nor a QEMU without a return path after its last byte: then the only copy may
    /// be ours. Where pages are missing it can't be, and a ramwire resumes as a QEMU does.
    fn fail(&mut self) {
        if self.reached.whole {
            return self.end(Ending::Running);
        }
        let kept = self.source.native || self.source.unasked;
        let ending = match () {
            () if kept && self.reached.committed && !self.misses_pages() => Ending::Stranded,
            () if self.source.unasked => Ending::Unanswered,
            () => Ending::Discarded,
        };
        self.go(Phase::Failing(ending), DestinationAction::SendFailed);
    }

    fn read_on(&mut self) {
        self.go(self.phase, DestinationAction::Receive);
    }

    fn end(&mut self, ending: Ending) {
        (self.phase, self.outbox, self.busy) = (Phase::Ended(ending), None, false);
    }

    /// An action that was decided before and has not begun is dropped.
    fn go(&mut self, phase: Phase, action: DestinationAction) {
        (self.phase, self.outbox, self.busy, self.wake_at) = (phase, Some(action), false, None);
    }
}

#[cfg(test)]
mod tests;
