//! What the source is told.

use crate::capabilities::{Extension, Features, MigrationId, Role};

/// Configuration of the source.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Register all of RAM at both ends before the first page. Faster per page, slower to start, and all of RAM is
    /// resident at both ends.
    pub pin_all: bool,
    /// Without pin-all: maximum number of bytes registered at a time; the least recently used spans are unregistered.
    pub pin_budget_bytes: Option<u64>,
    /// Without pin-all: most chunks (of 1 MiB) per registration. A walk in address order reaches it by doubling.
    pub max_span_chunks: u64,
    /// Zero runs of at least this many bytes are sent as messages instead of written, even if a key is at hand. Towards
    /// a peer that takes lists of zero ranges the minimum is at most two pages.
    pub zero_floor_bytes: u64,
    /// Unit in which [`PageContent::Unknown`](crate::hooks::PageContent::Unknown) is checked for zeros.
    pub page_bytes: u64,
    /// Offer this crate's extension: additional queue pairs and a window of credits. A QEMU ignores it.
    pub extension: Option<ExtensionOffer>,
    /// Maximum number of RAM blocks: the destination's table of them must fit a buffer that is allocated before they
    /// are known. Up to 1024 blocks need no larger buffer.
    pub most_blocks: usize,
    /// Keep the time each signalled write took, for [`SourceHooks::drain_latencies`](super::SourceHooks::drain_latencies).
    pub record_latencies: bool,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            pin_all: false,
            pin_budget_bytes: None,
            max_span_chunks: 64,
            zero_floor_bytes: 64 * 1024,
            page_bytes: 4096,
            extension: None,
            most_blocks: 1024,
            record_latencies: false,
        }
    }
}

/// The extension that the source offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtensionOffer {
    /// Additional queue pairs for writes.
    pub data_queues: u16,
    /// Maximum number of messages in flight.
    pub window: u16,
    /// Messages beyond QEMU's.
    pub features: Features,
    /// Random; binds the connections of this migration to each other.
    pub migration: MigrationId,
}

pub(super) fn offer(config: &SourceConfig, role: Role) -> Option<Extension> {
    let ExtensionOffer { data_queues, window, features, migration } = config.extension?;
    Some(Extension { role, data_queues, window, features, migration })
}
