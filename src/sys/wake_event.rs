//! A descriptor that is readable while an item waits to be taken, for loops of poll(2) or epoll(7).
//!
//! # Source
//! eventfd(2).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

/// Readable from [`raise`](Self::raise) until [`clear`](Self::clear).
#[derive(Debug)]
pub(crate) struct WakeEvent(OwnedFd);

impl WakeEvent {
    /// Not raised.
    ///
    /// # Errors
    /// No descriptor left (EMFILE, ENFILE), or no memory.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Never blocks; safe to call twice.
    pub(crate) fn raise(&self) {
        // A full counter means that it is already readable.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Never blocks; safe to call twice.
    pub(crate) fn clear(&self) {
        // EAGAIN means that it was not raised.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for WakeEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
