//! The relay's clock, and the process that holds connections.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::session::{Clock, Guard, Held};

/// A millisecond a step.
pub(super) struct Steps(pub(super) Arc<AtomicU64>);

impl Clock for Steps {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// Another process, which holds the passed connections.
pub(super) struct Holding {
    pub(super) source: Arc<AtomicBool>,
    pub(super) urgent: Arc<AtomicBool>,
}

impl Guard for Holding {
    fn hold(&mut self, held: &Held<'_>) -> io::Result<()> {
        self.source.store(true, Ordering::Relaxed);
        self.urgent.store(!held.urgent.is_empty(), Ordering::Relaxed);
        Ok(())
    }
    fn release(&mut self) {
        self.source.store(false, Ordering::Relaxed);
    }
}
