//! An observer of two migrating processes.

use crate::BenchError;

/// Called when a migration between two processes begins and when it has ended.
pub trait Watcher {
    /// Source and destination are ready, and the migration is about to begin.
    ///
    /// # Errors
    /// [`BenchError`]; the migration does not begin.
    fn begin(&mut self, source: u32, destination: u32) -> Result<(), BenchError>;

    /// It has ended.
    ///
    /// # Errors
    /// [`BenchError`].
    fn end(&mut self) -> Result<(), BenchError>;
}

/// No observer: for timing.
pub struct Unwatched;

impl Watcher for Unwatched {
    fn begin(&mut self, _source: u32, _destination: u32) -> Result<(), BenchError> {
        Ok(())
    }

    fn end(&mut self) -> Result<(), BenchError> {
        Ok(())
    }
}
