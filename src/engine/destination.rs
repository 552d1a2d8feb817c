//! The destination of a precopy migration, from the end of the stream to the running guest.
//!
//! ```text
//! a ramwire source:  STATE_SENT -> load -> [digests compared] -> READY -> COMMIT -> resume -> RUNNING
//! a QEMU source:     end of the device state -> load -> resume -> SHUT(0)
//! postcopy:          package -> serve faults, load and resume meanwhile -> last page -> SHUT(0)
//! ```
//!
//! # Orders that must hold
//!
//! The guest never runs here before the source gave it away: without COMMIT (towards a QEMU: without the
//! last byte of its device state) every end discards what arrived.

/// An input told to the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// The source said HELLO.
    Hello {
        /// It will send a digest.
        digest: bool,
    },
    /// A QEMU's device state is complete, the byte that commits included.
    Tail,
    /// The package of a switchover to postcopy is here: the source has given the guest away, pages are missing.
    Package,
    /// The connection, or a page, is lost after the guest was started among missing pages.
    Lost,
    /// A ramwire's RAM and device state are complete.
    StateSent,
    /// The last digest has come.
    Digests,
    /// The guest is ours.
    Commit,
    /// The last [`Action`] is done.
    Done,
    /// It failed, or the stream did.
    Failed,
    /// Whether the guest runs here is not known: its start broke off, and it could not be stopped again.
    MayRun,
}

/// What the session is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read on.
    Receive,
    /// Make our own digest of RAM and state; the source makes its own at the same time.
    MakeDigest,
    /// Compare it with the source's.
    CompareDigest,
    /// Give the device state to the VMM.
    LoadState,
    /// Serve missing pages from here on, and let a thread load the device state and start the guest.
    Listen,
    /// Wait for the source's next connection, and go on with it.
    AwaitRecovery,
    /// All pages are here: wait until that thread has started the guest.
    AwaitGuest,
    /// Tell the source that COMMIT may come.
    SendReady,
    /// Let the guest run.
    Resume,
    /// Tell the source that the guest runs: RUNNING or SHUT(0).
    SendRunning,
    /// Tell the source that it failed, as far as it can be told.
    SendFailed,
    /// Nothing more to do.
    Finish(Ending),
}

/// What a migration ended as, seen from the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest runs here.
    Running,
    /// The guest does not run here, and nothing of it is kept.
    Discarded,
    /// The guest runs here, but the connection was lost while pages were missing that only the source has.
    Incomplete,
    /// The source gave the guest away, but it could not be started: this is the only copy. RAM is whole and the device
    /// state is loaded, so that the VMM may start the guest itself, at any time; if it can't, an operator lets the guest
    /// run at the source, which keeps it paused. Never both.
    Stranded,
}

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
    AwaitingGuest,
    SendingReady,
    AwaitingCommit,
    Resuming,
    SendingRunning,
    Keeping,
    Failing(Ending),
    Ended(Ending),
}

/// The destination's state machine.
#[derive(Debug)]
pub struct DestinationEngine {
    phase: Phase,
    native: bool,
    digest: bool,
    digests_here: bool,
    committed: bool,
    recoverable: bool,
}

impl Default for DestinationEngine {
    fn default() -> Self {
        Self {
            phase: Phase::Receiving,
            native: false,
            digest: false,
            digests_here: false,
            committed: false,
            recoverable: false,
        }
    }
}

impl DestinationEngine {
    /// Whether a lost connection may be followed by another, once the guest runs here among missing pages. May change.
    pub fn set_recoverable(&mut self, recoverable: bool) {
        self.recoverable = recoverable;
    }

    /// True once the source speaks ramwire's words.
    pub fn is_native(&self) -> bool {
        self.native
    }

    /// True once the guest was given away by the source.
    pub fn is_committed(&self) -> bool {
        self.committed
    }

    /// True while the source alone decides: READY was said, or the guest was given away.
    pub fn is_bound(&self) -> bool {
        self.committed || matches!(self.phase, Phase::SendingReady | Phase::AwaitingCommit)
    }

    /// True if `input` binds: the last moment for a cancel is in front of it.
    pub fn binds(&self, input: Input) -> bool {
        match input {
            Input::Tail | Input::Package => self.phase == Phase::Receiving,
            Input::Done => self.phase == Phase::Loading && self.native,
            _ => false,
        }
    }

    /// Takes an input, answers with what to do. An input out of turn (a peer's doing) is a failure.
    pub fn handle(&mut self, input: Input) -> Action {
        match (self.phase, input) {
            (Phase::Failing(ending), _) => self.go(Phase::Ended(ending), Action::Finish(ending)),
            (Phase::Ended(ending), _) => Action::Finish(ending),
            (Phase::Receiving, Input::Hello { digest }) => {
                (self.native, self.digest) = (true, digest);
                Action::Receive
            }
            (Phase::Receiving, Input::Tail) if !self.native => {
                // The source has sent the byte that commits: from here on it does not resume by itself.
                self.committed = true;
                self.go(Phase::Loading, Action::LoadState)
            }
            (Phase::Receiving, Input::Package) => {
                self.committed = true;
                self.go(Phase::Listening, Action::Listen)
            }
            (Phase::Listening, Input::Done) => self.go(Phase::Filling, Action::Receive),
            (Phase::Filling, Input::Tail) => self.go(Phase::AwaitingGuest, Action::AwaitGuest),
            (Phase::AwaitingGuest, Input::Done) => self.go(Phase::SendingRunning, Action::SendRunning),
            // The source never resumes after it gave the guest away, and the guest runs here: nobody is told of a failure.
            (Phase::Filling | Phase::Recovering, Input::Lost) if self.recoverable => {
                self.go(Phase::Recovering, Action::AwaitRecovery)
            }
            (Phase::Recovering, Input::Done) => self.go(Phase::Filling, Action::Receive),
            (Phase::Filling | Phase::Recovering | Phase::AwaitingGuest, Input::Lost) => {
                self.go(Phase::Ended(Ending::Incomplete), Action::Finish(Ending::Incomplete))
            }
            (Phase::Receiving, Input::StateSent) if self.native && self.digest => {
                self.go(Phase::Digesting, Action::MakeDigest)
            }
            (Phase::Receiving, Input::StateSent) if self.native => self.go(Phase::Loading, Action::LoadState),
            (Phase::Receiving | Phase::Digesting, Input::Digests) if self.digest => {
                self.digests_here = true;
                Action::Receive
            }
            (Phase::Digesting, Input::Done) if self.digests_here => {
                self.go(Phase::Comparing, Action::CompareDigest)
            }
            (Phase::Digesting, Input::Done) => self.go(Phase::AwaitingDigests, Action::Receive),
            (Phase::AwaitingDigests, Input::Digests) => self.go(Phase::Comparing, Action::CompareDigest),
            (Phase::Comparing, Input::Done) => self.go(Phase::Loading, Action::LoadState),
            (Phase::Loading, Input::Done) if self.native => self.go(Phase::SendingReady, Action::SendReady),
            (Phase::Loading, Input::Done) => self.go(Phase::Resuming, Action::Resume),
            (Phase::SendingReady, Input::Done) => self.go(Phase::AwaitingCommit, Action::Receive),
            (Phase::AwaitingCommit, Input::Commit) => {
                self.committed = true;
                self.go(Phase::Resuming, Action::Resume)
            }
            // A QEMU that is told of a failure lets its guest run, and ours may: it is told that the guest is here.
            (Phase::Resuming, Input::MayRun) if !self.native => self.go(Phase::Keeping, Action::SendRunning),
            (Phase::Keeping, _) => self.go(Phase::Ended(Ending::Stranded), Action::Finish(Ending::Stranded)),
            (Phase::Resuming, Input::Done) => self.go(Phase::SendingRunning, Action::SendRunning),
            // The guest runs here: that the source could not be told changes nothing about it.
            (Phase::SendingRunning, _) => {
                self.go(Phase::Ended(Ending::Running), Action::Finish(Ending::Running))
            }
            _ => self.fail(),
        }
    }

    /// After the package, and before the guest was started.
    fn misses_pages(&self) -> bool {
        matches!(self.phase, Phase::Listening | Phase::Filling | Phase::AwaitingGuest)
    }

    /// A QEMU is told by SHUT(1) and resumes its guest, so what arrived is discarded although its last byte
    /// came. A ramwire never resumes after COMMIT: then the only copy may be ours. Where pages are missing it can't be, and
    /// a ramwire resumes as a QEMU does.
    fn fail(&mut self) -> Action {
        let stranded = self.native && self.committed && !self.misses_pages();
        let ending = if stranded { Ending::Stranded } else { Ending::Discarded };
        self.go(Phase::Failing(ending), Action::SendFailed)
    }

    fn go(&mut self, phase: Phase, action: Action) -> Action {
        self.phase = phase;
        action
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NATIVE: [(Input, Action); 10] = [
        (Input::Hello { digest: true }, Action::Receive),
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
            let mut engine = DestinationEngine::default();
            for (input, action) in &NATIVE[..fault_at] {
                assert_eq!(engine.handle(*input), *action);
            }
            let ended = if fault_at == 9 {
                assert_eq!(engine.handle(Input::Failed), Action::Finish(Ending::Running));
                Action::Finish(Ending::Running)
            } else {
                assert_eq!(engine.handle(Input::Failed), Action::SendFailed, "step {fault_at}");
                let ending = if fault_at > 7 { Ending::Stranded } else { Ending::Discarded };
                assert_eq!(engine.handle(Input::Done), Action::Finish(ending), "step {fault_at}");
                Action::Finish(ending)
            };
            assert_eq!(engine.handle(Input::Commit), ended, "nothing starts it afterwards");
        }
    }

    #[test]
    fn a_guest_that_may_run_here_is_not_let_run_at_the_source() {
        let mut qemu = DestinationEngine::default();
        assert_eq!(qemu.handle(Input::Tail), Action::LoadState);
        assert_eq!(qemu.handle(Input::Done), Action::Resume);
        assert_eq!(qemu.handle(Input::MayRun), Action::SendRunning, "no SHUT(1)");
        assert_eq!(qemu.handle(Input::Failed), Action::Finish(Ending::Stranded));
        let mut native = DestinationEngine::default();
        NATIVE[..8].iter().for_each(|(input, action)| assert_eq!(native.handle(*input), *action));
        assert_eq!(native.handle(Input::MayRun), Action::SendFailed, "a ramwire never resumes after COMMIT");
        assert_eq!(native.handle(Input::Done), Action::Finish(Ending::Stranded));
    }

    /// Before the guest is started a failure leaves it whole at the source; afterwards nobody is told to go on.
    #[test]
    fn p8_a_postcopy_that_fails_before_the_start_is_given_back_and_never_after_it() {
        let mut native = DestinationEngine::default();
        native.handle(Input::Hello { digest: false });
        assert_eq!(native.handle(Input::Package), Action::Listen);
        assert_eq!(native.handle(Input::Failed), Action::SendFailed);
        assert_eq!(native.handle(Input::Done), Action::Finish(Ending::Discarded));
        let steps = [
            (Input::Package, Action::Listen),
            (Input::Done, Action::Receive),
            (Input::Tail, Action::AwaitGuest),
            (Input::Done, Action::SendRunning),
            (Input::Done, Action::Finish(Ending::Running)),
        ];
        let after = |count: usize| {
            let mut engine = DestinationEngine::default();
            steps[..count].iter().for_each(|(input, action)| assert_eq!(engine.handle(*input), *action));
            engine
        };
        assert_eq!(after(5).handle(Input::Failed), Action::Finish(Ending::Running));
        for count in 0..4 {
            let mut engine = after(count);
            assert_eq!(engine.is_committed(), count > 0);
            assert_eq!(engine.handle(Input::Failed), Action::SendFailed, "after {count} steps");
            assert_eq!(engine.handle(Input::Done), Action::Finish(Ending::Discarded));
        }
        let mut engine = after(2);
        engine.set_recoverable(true);
        for _ in 0..3 {
            assert_eq!(engine.handle(Input::Lost), Action::AwaitRecovery, "again and again");
            assert_eq!(engine.handle(Input::Lost), Action::AwaitRecovery, "while it waits, too");
            assert_eq!(engine.handle(Input::Done), Action::Receive);
        }
        engine.set_recoverable(false);
        assert_eq!(engine.handle(Input::Lost), Action::Finish(Ending::Incomplete));
        for count in 2..4 {
            assert_eq!(
                after(count).handle(Input::Lost),
                Action::Finish(Ending::Incomplete),
                "after {count} steps"
            );
        }
    }

    #[test]
    fn an_input_out_of_turn_is_a_failure() {
        let all = [Input::Tail, Input::StateSent, Input::Digests, Input::Commit, Input::Done];
        for input in all.into_iter().filter(|input| *input != Input::Tail) {
            assert_eq!(DestinationEngine::default().handle(input), Action::SendFailed, "{input:?}");
        }
        let mut native = DestinationEngine::default();
        native.handle(Input::Hello { digest: false });
        assert_eq!(native.handle(Input::Tail), Action::SendFailed);
    }

    #[test]
    fn a_qemu_commits_with_its_last_byte() {
        let mut engine = DestinationEngine::default();
        assert_eq!(engine.handle(Input::Tail), Action::LoadState);
        assert!(engine.is_committed());
        assert_eq!(engine.handle(Input::Done), Action::Resume);
        assert_eq!(engine.handle(Input::Done), Action::SendRunning);
        assert_eq!(engine.handle(Input::Failed), Action::Finish(Ending::Running));
    }
}
