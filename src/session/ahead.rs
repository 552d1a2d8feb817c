//! Takes memory for a run of arriving pages at once, where each would else be met by a fault of its own.
//!
//! Only pages whose bytes have begun to arrive are taken, so a page that travels as zero never costs memory.
//! Whether it is worth the call is seen from the faults of the bytes before: memory that is mapped already
//! has none, and then nothing is asked of the kernel but their count.

use crate::sys::FaultWatch;
use crate::units::{BlockIndex, BlockOffset};

/// What is known of the memory that fills.
#[derive(Debug, Default)]
pub(super) struct PopulateAhead {
    faults: FaultWatch,
    wanted: bool,
    /// Where the last run that was taken ends.
    taken: Option<(BlockIndex, u64)>,
}

impl PopulateAhead {
    /// Before each read of the stream: looks how its predecessor's bytes fared.
    pub(super) fn between_reads(&mut self) {
        self.wanted = self.faults.look();
    }

    /// True if the page here belongs to no run that was taken and taking runs pays.
    #[inline]
    pub(super) fn is_due(&self, block: BlockIndex, offset: BlockOffset) -> bool {
        self.wanted && self.taken.is_none_or(|(of, end)| of != block || offset.0 >= end)
    }

    /// A run of `bytes` was taken.
    pub(super) fn taken(&mut self, block: BlockIndex, offset: BlockOffset, bytes: u64) {
        self.taken = Some((block, offset.0.saturating_add(bytes)));
    }
}
