//! Migrations as threads run them: a session does what the [engine](crate::engine) decides.

pub mod config;
mod destination;
pub mod digest;
mod error;
mod figures;
mod finish;
mod greeting;
mod placing;
mod return_path;
mod slice;
mod source;
#[cfg(test)]
mod tests;
pub mod workers;

pub use config::{DestinationSettings, SourceSettings};
pub use destination::{Arrival, DestinationReport, DestinationSession, Incoming, MemoryProvider};
pub use error::{Error, ErrorKind};
pub use source::{Clock, SourceConnection, SourceGuest, SourceReport, SourceSession, Upstream, WallClock};
pub use workers::Spawner;

/// What the other end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A QEMU: its own words only.
    Qemu,
    /// A ramwire: READY, COMMIT, RUNNING.
    Ramwire,
}

/// An order of the design switched off, so that a test can prove that it is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Breakage {
    /// As it ships.
    #[default]
    None,
    /// Order 1: the bytes are read before the log is armed again.
    #[cfg_attr(not(test), allow(dead_code))]
    ReadBeforeProtect,
    /// Order 2: rounds are not fenced.
    #[cfg_attr(not(test), allow(dead_code))]
    SkipFence,
    /// Order 3: the migration ends while tickets are out.
    #[cfg_attr(not(test), allow(dead_code))]
    SkipDrain,
    /// Order 4: unsent pages are forgotten after a failure.
    #[cfg_attr(not(test), allow(dead_code))]
    ForgetUnsent,
    /// Order 6: the source lets the guest run after COMMIT.
    #[cfg_attr(not(test), allow(dead_code))]
    ResumeAfterCommit,
}
