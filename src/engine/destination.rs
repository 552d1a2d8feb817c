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

/// A fact told to the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrived {
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
    /// The last [`Deed`] is done.
    Done,
    /// It failed, or the stream did.
    Failed,
    /// Whether the guest runs here is not known: its start broke off, and it could not be stopped again.
    MayRun,
}

/// What the session is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
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
    SayReady,
    /// Let the guest run.
    Resume,
    /// Tell the source that the guest runs: RUNNING or SHUT(0).
    SayRunning,
    /// Tell the source that it failed, as far as it can be told.
    SayFailed,
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
enum Stage {
    Receiving,
    Digesting,
    AwaitingDigests,
    Comparing,
    Loading,
    Listening,
    Filling,
    Recovering,
    AwaitingGuest,
    SayingReady,
    AwaitingCommit,
    Resuming,
    SayingRunning,
    Keeping,
    Failing(Ending),
    Ended(Ending),
}

/// The destination's state machine.
#[derive(Debug)]
pub struct DestinationEngine {
    stage: Stage,
    native: bool,
    digest: bool,
    digests_here: bool,
    committed: bool,
    recoverable: bool,
}

impl Default for DestinationEngine {
    fn default() -> Self {
        Self {
            stage: Stage::Receiving,
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
        self.committed || matches!(self.stage, Stage::SayingReady | Stage::AwaitingCommit)
    }

    /// True if `fact` binds: the last moment for a cancel is in front of it.
    pub fn binds(&self, fact: Arrived) -> bool {
        match fact {
            Arrived::Tail | Arrived::Package => self.stage == Stage::Receiving,
            Arrived::Done => self.stage == Stage::Loading && self.native,
            _ => false,
        }
    }

    /// Takes a fact, answers with what to do. A fact out of turn (a peer's doing) is a failure.
    pub fn handle(&mut self, fact: Arrived) -> Deed {
        match (self.stage, fact) {
            (Stage::Failing(ending), _) => self.go(Stage::Ended(ending), Deed::Finish(ending)),
            (Stage::Ended(ending), _) => Deed::Finish(ending),
            (Stage::Receiving, Arrived::Hello { digest }) => {
                (self.native, self.digest) = (true, digest);
                Deed::Receive
            }
            (Stage::Receiving, Arrived::Tail) if !self.native => {
                // The source has sent the byte that commits: from here on it does not resume by itself.
                self.committed = true;
                self.go(Stage::Loading, Deed::LoadState)
            }
            (Stage::Receiving, Arrived::Package) => {
                self.committed = true;
                self.go(Stage::Listening, Deed::Listen)
            }
            (Stage::Listening, Arrived::Done) => self.go(Stage::Filling, Deed::Receive),
            (Stage::Filling, Arrived::Tail) => self.go(Stage::AwaitingGuest, Deed::AwaitGuest),
            (Stage::AwaitingGuest, Arrived::Done) => self.go(Stage::SayingRunning, Deed::SayRunning),
            // The source never resumes after it gave the guest away, and the guest runs here: nobody is told of a failure.
            (Stage::Filling | Stage::Recovering, Arrived::Lost) if self.recoverable => {
                self.go(Stage::Recovering, Deed::AwaitRecovery)
            }
            (Stage::Recovering, Arrived::Done) => self.go(Stage::Filling, Deed::Receive),
            (Stage::Filling | Stage::Recovering | Stage::AwaitingGuest, Arrived::Lost) => {
                self.go(Stage::Ended(Ending::Incomplete), Deed::Finish(Ending::Incomplete))
            }
            (Stage::Receiving, Arrived::StateSent) if self.native && self.digest => {
                self.go(Stage::Digesting, Deed::MakeDigest)
            }
            (Stage::Receiving, Arrived::StateSent) if self.native => self.go(Stage::Loading, Deed::LoadState),
            (Stage::Receiving | Stage::Digesting, Arrived::Digests) if self.digest => {
                self.digests_here = true;
                Deed::Receive
            }
            (Stage::Digesting, Arrived::Done) if self.digests_here => {
                self.go(Stage::Comparing, Deed::CompareDigest)
            }
            (Stage::Digesting, Arrived::Done) => self.go(Stage::AwaitingDigests, Deed::Receive),
            (Stage::AwaitingDigests, Arrived::Digests) => self.go(Stage::Comparing, Deed::CompareDigest),
            (Stage::Comparing, Arrived::Done) => self.go(Stage::Loading, Deed::LoadState),
            (Stage::Loading, Arrived::Done) if self.native => self.go(Stage::SayingReady, Deed::SayReady),
            (Stage::Loading, Arrived::Done) => self.go(Stage::Resuming, Deed::Resume),
            (Stage::SayingReady, Arrived::Done) => self.go(Stage::AwaitingCommit, Deed::Receive),
            (Stage::AwaitingCommit, Arrived::Commit) => {
                self.committed = true;
                self.go(Stage::Resuming, Deed::Resume)
            }
            // A QEMU that is told of a failure lets its guest run, and ours may: it is told that the guest is here.
            (Stage::Resuming, Arrived::MayRun) if !self.native => self.go(Stage::Keeping, Deed::SayRunning),
            (Stage::Keeping, _) => self.go(Stage::Ended(Ending::Stranded), Deed::Finish(Ending::Stranded)),
            (Stage::Resuming, Arrived::Done) => self.go(Stage::SayingRunning, Deed::SayRunning),
            // The guest runs here: that the source could not be told changes nothing about it.
            (Stage::SayingRunning, _) => {
                self.go(Stage::Ended(Ending::Running), Deed::Finish(Ending::Running))
            }
            _ => self.fail(),
        }
    }

    /// After the package, and before the guest was started.
    fn misses_pages(&self) -> bool {
        matches!(self.stage, Stage::Listening | Stage::Filling | Stage::AwaitingGuest)
    }

    /// A QEMU is told by SHUT(1) and resumes its guest, so what arrived is discarded although its last byte
    /// came. A ramwire never resumes after COMMIT: then the only copy may be ours. Where pages are missing it can't be, and
    /// a ramwire resumes as a QEMU does.
    fn fail(&mut self) -> Deed {
        let stranded = self.native && self.committed && !self.misses_pages();
        let ending = if stranded { Ending::Stranded } else { Ending::Discarded };
        self.go(Stage::Failing(ending), Deed::SayFailed)
    }

    fn go(&mut self, stage: Stage, deed: Deed) -> Deed {
        self.stage = stage;
        deed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NATIVE: [(Arrived, Deed); 10] = [
        (Arrived::Hello { digest: true }, Deed::Receive),
        (Arrived::StateSent, Deed::MakeDigest),
        (Arrived::Done, Deed::Receive),
        (Arrived::Digests, Deed::CompareDigest),
        (Arrived::Done, Deed::LoadState),
        (Arrived::Done, Deed::SayReady),
        (Arrived::Done, Deed::Receive),
        (Arrived::Commit, Deed::Resume),
        (Arrived::Done, Deed::SayRunning),
        (Arrived::Done, Deed::Finish(Ending::Running)),
    ];

    #[test]
    fn the_guest_runs_here_only_after_commit() {
        for fault_at in 0..NATIVE.len() {
            let mut engine = DestinationEngine::default();
            for (fact, deed) in &NATIVE[..fault_at] {
                assert_eq!(engine.handle(*fact), *deed);
            }
            let ended = if fault_at == 9 {
                assert_eq!(engine.handle(Arrived::Failed), Deed::Finish(Ending::Running));
                Deed::Finish(Ending::Running)
            } else {
                assert_eq!(engine.handle(Arrived::Failed), Deed::SayFailed, "step {fault_at}");
                let ending = if fault_at > 7 { Ending::Stranded } else { Ending::Discarded };
                assert_eq!(engine.handle(Arrived::Done), Deed::Finish(ending), "step {fault_at}");
                Deed::Finish(ending)
            };
            assert_eq!(engine.handle(Arrived::Commit), ended, "nothing starts it afterwards");
        }
    }

    #[test]
    fn a_guest_that_may_run_here_is_not_let_run_at_the_source() {
        let mut qemu = DestinationEngine::default();
        assert_eq!(qemu.handle(Arrived::Tail), Deed::LoadState);
        assert_eq!(qemu.handle(Arrived::Done), Deed::Resume);
        assert_eq!(qemu.handle(Arrived::MayRun), Deed::SayRunning, "no SHUT(1)");
        assert_eq!(qemu.handle(Arrived::Failed), Deed::Finish(Ending::Stranded));
        let mut native = DestinationEngine::default();
        NATIVE[..8].iter().for_each(|(fact, deed)| assert_eq!(native.handle(*fact), *deed));
        assert_eq!(native.handle(Arrived::MayRun), Deed::SayFailed, "a ramwire never resumes after COMMIT");
        assert_eq!(native.handle(Arrived::Done), Deed::Finish(Ending::Stranded));
    }

    /// Before the guest is started a failure leaves it whole at the source; afterwards nobody is told to go on.
    #[test]
    fn p8_a_postcopy_that_fails_before_the_start_is_given_back_and_never_after_it() {
        let mut native = DestinationEngine::default();
        native.handle(Arrived::Hello { digest: false });
        assert_eq!(native.handle(Arrived::Package), Deed::Listen);
        assert_eq!(native.handle(Arrived::Failed), Deed::SayFailed);
        assert_eq!(native.handle(Arrived::Done), Deed::Finish(Ending::Discarded));
        let steps = [
            (Arrived::Package, Deed::Listen),
            (Arrived::Done, Deed::Receive),
            (Arrived::Tail, Deed::AwaitGuest),
            (Arrived::Done, Deed::SayRunning),
            (Arrived::Done, Deed::Finish(Ending::Running)),
        ];
        let after = |count: usize| {
            let mut engine = DestinationEngine::default();
            steps[..count].iter().for_each(|(fact, deed)| assert_eq!(engine.handle(*fact), *deed));
            engine
        };
        assert_eq!(after(5).handle(Arrived::Failed), Deed::Finish(Ending::Running));
        for count in 0..4 {
            let mut engine = after(count);
            assert_eq!(engine.is_committed(), count > 0);
            assert_eq!(engine.handle(Arrived::Failed), Deed::SayFailed, "after {count} steps");
            assert_eq!(engine.handle(Arrived::Done), Deed::Finish(Ending::Discarded));
        }
        let mut engine = after(2);
        engine.set_recoverable(true);
        for _ in 0..3 {
            assert_eq!(engine.handle(Arrived::Lost), Deed::AwaitRecovery, "again and again");
            assert_eq!(engine.handle(Arrived::Lost), Deed::AwaitRecovery, "while it waits, too");
            assert_eq!(engine.handle(Arrived::Done), Deed::Receive);
        }
        engine.set_recoverable(false);
        assert_eq!(engine.handle(Arrived::Lost), Deed::Finish(Ending::Incomplete));
        for count in 2..4 {
            assert_eq!(
                after(count).handle(Arrived::Lost),
                Deed::Finish(Ending::Incomplete),
                "after {count} steps"
            );
        }
    }

    #[test]
    fn a_fact_out_of_turn_is_a_failure() {
        let all = [Arrived::Tail, Arrived::StateSent, Arrived::Digests, Arrived::Commit, Arrived::Done];
        for fact in all.into_iter().filter(|fact| *fact != Arrived::Tail) {
            assert_eq!(DestinationEngine::default().handle(fact), Deed::SayFailed, "{fact:?}");
        }
        let mut native = DestinationEngine::default();
        native.handle(Arrived::Hello { digest: false });
        assert_eq!(native.handle(Arrived::Tail), Deed::SayFailed);
    }

    #[test]
    fn a_qemu_commits_with_its_last_byte() {
        let mut engine = DestinationEngine::default();
        assert_eq!(engine.handle(Arrived::Tail), Deed::LoadState);
        assert!(engine.is_committed());
        assert_eq!(engine.handle(Arrived::Done), Deed::Resume);
        assert_eq!(engine.handle(Arrived::Done), Deed::SayRunning);
        assert_eq!(engine.handle(Arrived::Failed), Deed::Finish(Ending::Running));
    }
}
