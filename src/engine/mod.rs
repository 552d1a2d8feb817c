//! Decides what happens next in a migration.
//!
//! Nothing here has a socket, a clock or a thread. A state machine has an inbox and an outbox: `handle(now, event)`
//! takes an event at any time, `poll()` returns the next action, `wake_at()` returns when to call it again. Time is an
//! argument. The session performs the actions, so a whole migration, with faults, runs in a unit test under a seed.

mod background;
mod blocktime;
mod checkpoint;
pub mod destination;
mod fill;
mod loss;
mod outcome;
mod ownership;
mod pace;
mod page_cost;
mod pager;
mod progress;
mod rate;
mod read_keys;
mod reconnect;
mod relay;
mod release;
mod snapshot;
mod source;
mod throttle;

pub use crate::stream::channel_count::{ChannelMismatch, agree_on_channels};
pub use background::{Background, NextMissing};
#[cfg(test)]
pub(crate) use background::{FIRST_ROOM, is_mark};
#[cfg(test)]
pub(crate) use checkpoint::CheckpointBreakage;
pub use checkpoint::{
    CheckpointAction, CheckpointCause, CheckpointConfig, CheckpointEngine, CheckpointEvent,
    CheckpointOutcome, LeaseConfig, StandbyAction, StandbyDoubt, StandbyEnding, StandbyEngine, StandbyEvent,
};
pub use destination::{DestinationAction, DestinationEngine, DestinationEvent, Ending};
#[cfg(test)]
pub(crate) use fill::FillBreakage;
pub use fill::{BlockToFill, Fill, FillCounts};
pub use loss::{LostPages, compare_counts};
pub use outcome::{Handover, Outcome, Reason};
pub(crate) use ownership::Ownership;
pub use pace::{BandwidthLimit, Pace};
pub use page_cost::PageCost;
pub use pager::{FaultAnswer, HostPage, Pager, Waiter};
pub use progress::Progress;
pub use rate::{RateWindow, Sent};
#[cfg(test)]
pub(crate) use read_keys::KeyBreakage;
pub(crate) use read_keys::{PulledKeys, ServedKeys};
pub(crate) use reconnect::{Agreement, Unconfirmed, is_equal};
pub use relay::{FarEnd, RelayAction, RelayEnding, RelayEngine, RelayEvent, RelayFlow, Traffic};
pub(crate) use release::Release;
#[cfg(test)]
pub(crate) use snapshot::SnapshotBreakage;
pub use snapshot::{
    ChangedPages, NextBase, Place, SnapshotAction, SnapshotConfig, SnapshotEngine, SnapshotEvent,
    SnapshotFigures, SnapshotOutcome,
};
pub use source::{
    AnswerTimeouts, Lost, OnTimeout, Overdue, PostcopyRule, SourceAction, SourceConfig, SourceEngine,
    SourceEvent, Switchover, UrgentChannel, Waiting,
};
pub use throttle::{Change, ThrottlePolicy, Throttler};
