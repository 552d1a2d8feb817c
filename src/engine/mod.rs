//! Decides what happens next in a migration.
//!
//! Nothing here has a socket, a clock or a thread. A state machine is told facts ([`Input`]) and answers
//! with one thing to do ([`Action`]); time is an argument. Who does it is the session's business, so that a
//! whole migration, with faults, runs in a unit test under a seed.

pub mod destination;
mod handover;
mod loss;
mod pace;
mod page_cost;
mod pager;
mod progress;
mod rate;
mod relay;
mod source;
mod throttle;

pub use crate::stream::channel_count::{ChannelMismatch, agree_on_channels};
pub use destination::{DestinationEngine, Ending};
pub use handover::{Handover, Outcome, Reason};
pub use loss::{LostPages, compare_counts};
pub use pace::{BandwidthLimit, Pace};
pub use page_cost::PageCost;
pub use pager::{FaultAnswer, HostPage, Pager};
pub use progress::Progress;
pub use rate::{RateWindow, Sent};
pub use relay::{FarEnd, RelayAction, RelayEnding, RelayEngine, RelayEvent, RelayFlow, Traffic};
pub use source::{Action, Input, OnTimeout, PostcopyRule, SourceConfig, SourceEngine, Switchover};
pub use throttle::{Change, ThrottlePolicy, Throttler};
