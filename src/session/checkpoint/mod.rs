//! Checkpoints of a running guest at a standby, which starts the guest from the last whole one if its source is dead.
//!
//! ```text
//! source                                   standby
//! all memory, the guest runs         ->    kept beside the guest's memory
//! pause, what is dirty, device state ->
//! the guest runs on                        it is whole: applied to the guest's memory
//! CheckpointObserver::safe           <-    CONFIRM
//! after the interval: the next one         ... StandbyHandle::activate, or the lease has run out
//! ```

mod inbox;
mod lease;
mod source;
mod standby;
#[cfg(test)]
mod tests;

use std::time::Duration;

use crate::error::Remedy;
use crate::guest::GuestMemory;
use crate::observe::LatencySummary;
use crate::session::workers::Spawner;
use crate::session::{CheckpointOutcome, Error, LeaseConfig, StandbyEnding};

pub use lease::Lease;
pub use source::{CheckpointHandle, CheckpointSession, ColoPeer};
#[cfg(test)]
pub(in crate::session) use standby::{ColoIntake, Taken};
pub use standby::{StandbyControl, StandbyHandle, StandbyObserver, StandbySession, WhenLost};

/// Settings of a source.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CheckpointSettings {
    /// From the end of one pause to the beginning of the next; 100 ms. `None`: only when
    /// [`CheckpointHandle::checkpoint`] is called.
    pub interval: Option<Duration>,
    /// The first checkpoint holds all memory: most rounds that are sent of it while the guest runs; 10.
    pub live_rounds: u32,
    /// Bytes of dirty memory that the guest is paused for in the first checkpoint; 16 MiB.
    pub live_bytes: u64,
    /// Longest wait for the standby to have memory, to take the bytes of a checkpoint and to confirm it; also how long the
    /// guest is paused for one at most; 30 s. Then the guest runs on, and nothing protects it any more.
    pub confirm_timeout: Duration,
    /// The standby may start the guest by itself when nothing has come from here for long enough
    /// ([`StandbySettings::starts_by_lease`]), and the guest runs here only while the standby is heard of; none. See
    /// [`Lease`] for what the VMM's threads must do.
    pub lease: Option<LeaseConfig>,
    /// How threads are started.
    pub spawner: Spawner,
}

impl Default for CheckpointSettings {
    fn default() -> Self {
        Self {
            interval: Some(Duration::from_millis(100)),
            live_rounds: 10,
            live_bytes: 16 << 20,
            confirm_timeout: Duration::from_secs(30),
            lease: None,
            spawner: Spawner::default(),
        }
    }
}

/// Settings of a standby.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StandbySettings {
    /// Most bytes of device state; 64 MiB.
    pub max_state: u64,
    /// Most bytes of RAM; 64 TiB.
    pub max_ram: u64,
    /// How long one checkpoint of a QEMU may take, from its request until all of it is here, with a second more for each
    /// 64 MiB of RAM: its guest is paused meanwhile; 60 s.
    pub checkpoint_timeout: Duration,
    /// The guest starts here when the lease that the source was granted last has run out
    /// ([`CheckpointSettings::lease`]): false.
    pub starts_by_lease: bool,
    /// How threads are started.
    pub spawner: Spawner,
}

impl Default for StandbySettings {
    fn default() -> Self {
        Self {
            max_state: 64 << 20,
            max_ram: 64 << 40,
            checkpoint_timeout: Duration::from_secs(60),
            starts_by_lease: false,
            spawner: Spawner::default(),
        }
    }
}

/// Learns at the source which checkpoints are safe: output commit.
///
/// What a guest sends to the network after checkpoint n may show what a standby that starts from n never did. So an
/// embedder holds it until the next checkpoint is safe. Both calls come on the session's thread, in order.
pub trait CheckpointObserver: Send {
    /// The guest is paused, and checkpoint `number` has its state: what it has sent until now may leave when this
    /// checkpoint is safe.
    fn taken(&mut self, number: u64);

    /// The standby has all of checkpoint `number`: it starts from this one or a later one, whatever happens here.
    fn safe(&mut self, number: u64);
}

/// How protection ended at the source, and its figures.
#[derive(Debug)]
#[non_exhaustive]
pub struct CheckpointReport {
    /// Where the guest runs.
    pub outcome: CheckpointOutcome,
    /// Why it ended, unless the embedder has ended it.
    pub error: Option<Error>,
    /// The last checkpoint that was safe; 0: none.
    pub safe: u64,
    /// Pages that were sent, whole ones and zero ones, of all checkpoints.
    pub pages: u64,
    /// Bytes that were sent.
    pub bytes: u64,
    /// Of these, bytes of the first checkpoint, which holds all memory.
    pub first_bytes: u64,
    /// How long the guest was paused for each checkpoint.
    pub pauses: LatencySummary,
    /// How often the guest was paused because the lease had run out.
    pub fences: u64,
    /// The guest was paused and could not be resumed.
    pub not_resumed: bool,
}

/// How protection ended at the standby.
#[derive(Debug)]
#[non_exhaustive]
pub struct StandbyReport {
    /// Where the guest runs, as far as it is known here.
    pub ending: StandbyEnding,
    /// Why the connection was lost, or what failed.
    pub error: Option<Error>,
    /// The last checkpoint that was applied; 0: none.
    pub last: u64,
    /// The guest was to start here because the source's lease had run out.
    pub by_lease: bool,
}

/// Leases of which nothing is left when the guest begins to be paused.
fn refuse_short(lease: Option<LeaseConfig>) -> Result<(), Error> {
    match lease {
        Some(LeaseConfig { time, stop }) if time.is_zero() || stop > time / 2 => Err(Error::Config {
            what: format!(
                "a lease of {:.3} s, of which {:.3} s are for pausing the guest",
                time.as_secs_f64(),
                stop.as_secs_f64()
            ),
            remedy: Remedy::Advice(
                "give it twice the time that a pause may take (LeaseConfig::stop), or more",
            ),
        }),
        _ => Ok(()),
    }
}

/// Memory that both ends do not see alike can't be kept at a standby.
fn refuse_ignored(memory: &dyn GuestMemory) -> Result<(), Error> {
    match memory.table().blocks().iter().find(|block| block.flags.ignored) {
        None => Ok(()),
        Some(block) => Err(Error::Config {
            what: format!(
                "RAM block {} is left out as shared, so that no checkpoint would hold it",
                block.name
            ),
            remedy: Remedy::Advice("leave no block out (BlockFlags::ignored)"),
        }),
    }
}
