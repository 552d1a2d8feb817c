//! The engine, its clock, and the embedder's commands.

use std::time::{Duration, Instant};

use crate::engine::{SourceEngine, SourceEvent};
use crate::session::control::Control;

/// Time for the engine.
pub(crate) trait Clock: Send {
    /// Since the start of the migration.
    fn now(&self) -> Duration;
}

/// The machine's own clock.
pub(crate) struct WallClock(Instant);

impl Default for WallClock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for WallClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// The engine and its inbox, with the embedder's commands.
pub(super) struct Driver {
    pub(super) engine: SourceEngine,
    pub(super) clock: Box<dyn Clock>,
    pub(super) control: Control,
}

impl Driver {
    /// Reports to the engine the result of its last action, or of the wait for an event.
    pub(super) fn tell(&mut self, event: SourceEvent) {
        let canceller = self.control.canceller();
        // A cancel comes before this step or after it, never in between: the step may be COMMIT.
        canceller.decide(|| {
            let now = self.clock.now();
            self.tell_commands(now);
            self.engine.handle(now, event);
            ((), self.engine.is_committed())
        });
    }

    /// Passes the embedder's commands to the engine.
    fn tell_commands(&mut self, now: Duration) {
        if self.control.wants_postcopy() {
            self.engine.handle(now, SourceEvent::StartPostcopy);
        }
        if self.control.canceller().token().is_cancelled() {
            self.engine.handle(now, SourceEvent::Cancel);
        }
    }

    /// True if the engine has another action by now, or the time of its slice is over.
    pub(super) fn is_called(&mut self) -> bool {
        let now = self.clock.now();
        self.tell_commands(now);
        self.engine.wake_at().is_some_and(|at| now >= at)
    }
}
