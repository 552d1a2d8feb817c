//! Migrations as threads run them: a session does what the engine decides.

mod breakage;
mod callback;
mod checkpoint;
mod config;
mod connection;
mod control;
mod destination;
mod digest;
mod dirty_run;
mod error;
mod fingerprints;
mod handle;
mod pager;
mod passage;
mod passed;
mod relay;
mod restore;
mod run_log;
mod shared_blocks;
#[cfg(test)]
mod sim;
mod snapshot;
mod source;
#[cfg(test)]
mod tests;
mod workers;

use breakage::Breakage;
pub use checkpoint::{
    CheckpointHandle, CheckpointObserver, CheckpointReport, CheckpointSession, CheckpointSettings, ColoPeer,
    Lease, StandbyControl, StandbyHandle, StandbyObserver, StandbyReport, StandbySession, StandbySettings,
    WhenLost,
};
pub use config::{DestinationSettings, PostcopySettings, SourceSettings, Verify};
pub use control::Control;
#[cfg(test)]
pub(crate) use destination::IncomingObserver;
pub use destination::{
    DestinationGuest, DestinationReport, DestinationSession, Incoming, MemoryProvider, MissingPages,
    NextConnection, Zeroed,
};
pub use digest::Mismatch;
pub use error::{Error, ErrorKind};
pub use fingerprints::MemoryCheck;
pub use handle::{CancelReply, Canceller, MigrationHandle};
pub use pager::{HandedError, HandedRegion, LazyProgress, PageFailure, ServeSettings, ServedMemory};
pub use passage::{ConnectAgainFn, Passage, PassageReport};
pub use passed::{NotPassed, PassedBlock, memory_to_pass};
pub use relay::{
    ConnectFn, Guard, Held, Kept, Notice, NoticeFn, Relay, RelayControl, RelayReport, ScanReport,
    UrgentConnections,
};
pub use restore::{LazyPages, RestoreSession, RestoreSettings, RestoreWay, Restored};
pub use run_log::RunLog;
pub use snapshot::{
    SnapshotBase, SnapshotGuest, SnapshotHandle, SnapshotReport, SnapshotSession, SnapshotSettings,
};
pub(crate) use source::{Clock, WallClock};
pub use source::{NewConnection, Reconnect, Redial, SourceGuest, SourceReport, SourceSession};
pub use workers::{Job, SpawnFn, Spawner};

#[cfg(test)]
use source::{News, Upstream};

pub use crate::engine::{
    ChannelMismatch, CheckpointOutcome, Ending, Handover, LeaseConfig, LostPages, OnTimeout, Outcome,
    PostcopyRule, Reason, RelayEnding, SnapshotOutcome, StandbyEnding, ThrottlePolicy,
};
pub use crate::page::ZeroDetection;
pub use crate::stream::qemu::file::Configuration;
pub use crate::stream::qemu::incoming::Seen;
pub use crate::stream::qemu::section::Framing;
pub use crate::stream::qemu::style::PeerStyle;
pub use crate::stream::{Corrupt, DecodeError, Fault};
pub use crate::transport::{DestinationConnection, SourceConnection};

/// What the other end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A QEMU: only its own messages.
    Qemu,
    /// A ramwire: READY, COMMIT, RUNNING.
    Ramwire,
}
