//! What a standby is told, in the words of a ramwire or of a QEMU.

use super::*;

/// What is said to a standby, and what it answers. All but [`greet`](Self::greet) and [`open`](Self::open) wait only for
/// the connection.
pub(super) trait Standby: Send {
    /// Says what guest it is, and waits for memory; returns an answer that says something else.
    fn greet(&mut self, memory: &dyn GuestMemory, limit: &Limit) -> Result<Option<StandbyMessage>, Error>;

    /// A checkpoint begins.
    fn open(&mut self, number: u64, limit: &Limit) -> Result<(), Error>;

    /// Pages of it.
    fn pages(&mut self, memory: &dyn GuestMemory, batch: &PageBatch, limit: &Limit) -> Result<(), Error>;

    /// Its device state, behind its last page.
    fn state(&mut self, number: u64, state: &[u8], limit: &Limit) -> Result<(), Error>;

    /// All of it has been sent.
    fn close(&mut self, number: u64, pages: u64, limit: &Limit) -> Result<(), Error>;

    /// Asks for a lease.
    fn renew(&mut self, number: u64, time: Duration, limit: &Limit) -> Result<(), Error>;

    /// The protection ends.
    fn release(&mut self, limit: &Limit) -> Result<(), Error>;

    /// The next answer; `None` if the wait was stopped.
    fn next(&mut self, stop: &Stop) -> Result<Option<StandbyMessage>, Error>;

    /// No answer can come, or none is waited for any more.
    fn is_silent(&self) -> bool;

    fn forget_answers(&mut self);

    /// Bytes sent.
    fn position(&self) -> u64;
}
