//! What decides, when, and what may end it: the engine, its clock, and the embedder's cancel.

use std::time::Duration;

use crate::engine::{DestinationEngine, DestinationEvent};
use crate::session::handle::Canceller;
use crate::session::{Clock, WallClock};
use crate::sys::CancelToken;

/// The engine, and the events for it other than the answers to its actions.
pub(super) struct Driver {
    pub(super) engine: DestinationEngine,
    clock: WallClock,
    canceller: Canceller,
}

impl Driver {
    pub(super) fn new(engine: DestinationEngine) -> Self {
        Self { engine, clock: WallClock::default(), canceller: Canceller::default() }
    }

    /// A token that the caller has already.
    pub(super) fn cancelled_by(&mut self, cancel: CancelToken) {
        self.canceller = Canceller::over(cancel);
    }

    pub(super) fn cancel_token(&self) -> CancelToken {
        self.canceller.token()
    }

    /// Asks for the end, from any thread.
    pub(super) fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// Reports the result of the last action to the engine. True if it was cancelled before that, and in time.
    pub(super) fn tell(&mut self, event: DestinationEvent) -> bool {
        // A cancel comes before this step or after it, never in between: the step may bind us.
        self.canceller.decide(|| {
            let now = self.clock.now();
            let cancelled = self.canceller.token().is_cancelled() && !self.engine.is_bound();
            if cancelled {
                self.engine.handle(now, DestinationEvent::Cancel);
            }
            self.engine.handle(now, event);
            (cancelled && !self.engine.is_committed(), self.engine.is_bound())
        })
    }

    /// Time until the engine wants to end the current action.
    pub(super) fn time_left(&self) -> Option<Duration> {
        let now = self.clock.now();
        self.engine.wake_at().map(|at| at.saturating_sub(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::DestinationAction;
    use crate::session::handle::CancelReply;

    /// A driver whose engine performs an action, after it received each of `events`.
    fn driver(events: impl IntoIterator<Item = DestinationEvent>) -> Driver {
        let mut driver = Driver::new(DestinationEngine::new(Duration::from_secs(60)));
        let _ = driver.engine.poll();
        for event in events {
            assert!(!driver.tell(event));
            let _ = driver.engine.poll();
        }
        driver
    }

    #[test]
    fn a_cancel_counts_before_the_step_that_it_met() {
        let mut driver = driver([]);
        driver.cancel_token().cancel();
        assert!(driver.tell(DestinationEvent::Tail), "it was cancelled first");
        assert!(!driver.engine.is_committed());
        assert_eq!(driver.engine.poll(), Some(DestinationAction::SendFailed));
    }

    #[test]
    fn behind_ready_a_cancel_comes_too_late() {
        use DestinationEvent::{Commit, Done, Hello, StateSent};
        let mut driver = driver([Hello { digest: false, memory_check: false }, StateSent, Done, Done]);
        assert_eq!(driver.canceller().cancel(), CancelReply::TooLate);
        assert!(driver.time_left().is_some_and(|left| left <= Duration::from_secs(60)), "COMMIT is due");
        // The bare token can be raised even so.
        driver.cancel_token().cancel();
        assert!(!driver.tell(Commit));
        assert_eq!(driver.engine.poll(), Some(DestinationAction::Resume));
    }
}
