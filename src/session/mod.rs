//! Migrations as threads run them: a session does what the [engine](crate::engine) decides.

mod breakage;
mod callback;
pub mod config;
mod control;
mod destination;
pub mod digest;
mod error;
mod handle;
mod relay;
mod run_log;
mod shared_blocks;
#[cfg(test)]
mod sim;
mod source;
#[cfg(test)]
mod tests;
pub mod workers;

use breakage::Breakage;
pub use config::{DestinationSettings, PostcopySettings, SourceSettings};
pub use control::Control;
pub use destination::{
    Arrival, DestinationGuest, DestinationReport, DestinationSession, Incoming, MemoryProvider, MissingPages,
    NextConnection, Zeroed,
};
pub use error::{Error, ErrorKind};
pub use handle::{CancelReply, Canceller, MigrationHandle};
pub use relay::{
    ConnectFn, Guard, Held, Kept, Notice, NoticeFn, Relay, RelayControl, RelayReport, ScanReport,
};
pub use run_log::RunLog;
pub use source::{Clock, SourceGuest, SourceReport, SourceSession, Upstream, WallClock};
pub use workers::Spawner;

pub use crate::transport::{DestinationConnection, SourceConnection};

/// What the other end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A QEMU: its own words only.
    Qemu,
    /// A ramwire: READY, COMMIT, RUNNING.
    Ramwire,
}
