//! Migrations as threads run them: a session does what the [engine](crate::engine) decides.

mod answers;
mod arrivals;
mod breakage;
mod callback;
pub mod config;
mod destination;
pub mod digest;
mod error;
mod figures;
mod finish;
mod greeting;
mod handle;
mod hearing;
#[cfg(test)]
mod hook_tests;
mod mapper;
#[cfg(test)]
mod panic_tests;
mod places;
mod placing;
#[cfg(test)]
mod qemu_peer_tests;
mod reader;
mod relay;
#[cfg(test)]
mod relay_handover_tests;
#[cfg(test)]
mod relay_tests;
mod return_path;
#[cfg(test)]
mod reuse_tests;
mod rounds;
mod run_log;
mod scan;
mod shared;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod skip_tests;
mod skips;
mod slice;
mod source;
mod switchover;
#[cfg(test)]
mod tests;
mod unsent;
pub mod workers;
mod working;

use breakage::Breakage;
pub use config::{DestinationSettings, SourceSettings};
pub use destination::{Arrival, DestinationReport, DestinationSession, Incoming, MemoryProvider, Zeroed};
pub use error::{Error, ErrorKind};
pub use handle::{CancelReply, Canceller, MigrationHandle};
pub use places::Placed;
pub use relay::{ConnectFn, Kept, Notice, NoticeFn, Relay, RelayReport};
pub use run_log::RunLog;
pub use scan::ScanReport;
pub use source::{Clock, SourceConnection, SourceGuest, SourceReport, SourceSession, Upstream, WallClock};
pub use switchover::SwitchoverGate;
pub use workers::Spawner;

/// What the other end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A QEMU: its own words only.
    Qemu,
    /// A ramwire: READY, COMMIT, RUNNING.
    Ramwire,
}
