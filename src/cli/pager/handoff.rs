//! How a VMM hands its memory over: each kind of VMM has its own protocol.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use ramwire::session::HandedRegion;
use ramwire::sys::Stop;

/// The memory that was handed over.
#[derive(Debug)]
pub(super) struct Handed {
    /// The memory, in pieces.
    pub(super) regions: Vec<HandedRegion>,
    /// The descriptor that reports its faults.
    pub(super) faults: OwnedFd,
}

/// Why nothing was handed over.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandOffError {
    #[error("its message did not come whole: {0}")]
    Unfinished(String),
    #[error("its message is no array of memory regions: {0}")]
    Message(String),
    #[error("its message is longer than {0} bytes")]
    Long(usize),
    #[error("it sent {0} descriptors with its message; one is needed, a userfaultfd")]
    Descriptors(usize),
    #[error("its connection failed")]
    Connection(#[from] io::Error),
}

/// A VMM's protocol.
pub(super) trait HandOff: Send + Sync {
    /// Receives the VMM's hand-off on `connection`.
    ///
    /// # Errors
    /// [`HandOffError`].
    fn receive(&self, connection: &UnixStream, stop: &Stop) -> Result<Handed, HandOffError>;
}
