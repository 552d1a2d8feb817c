//! The destination's link: its session decides when page channels may pass a fence.

use std::sync::Arc;
use std::time::Duration;

use super::channel::SimSource;
use super::link::STALL_STEPS;
use crate::guest::Placer;
use crate::observe::PageCounts;
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::sys::{Stop, StopReason};
use crate::transport::{ByteSource, ChannelError, DestinationAbilities, DestinationLink, MoveError};

const DOING: &str = "waiting for the page channels";

impl DestinationLink for SimSource {
    fn abilities(&self) -> DestinationAbilities {
        let world = self.sim.world();
        // Only the first connection has some.
        let has_channels = self.generation == 0 && world.link.has_barriers();
        let page_channels = if has_channels { world.link.placed.len() as u8 } else { 0 };
        let has_rounds = self.generation == 0 && world.link.has_keys();
        DestinationAbilities { page_channels, has_rounds, ..DestinationAbilities::default() }
    }

    fn stream(&mut self) -> &mut dyn ByteSource {
        self
    }

    /// The world places pages, as the threads of a real link do while the session is busy.
    fn announce(&mut self, placer: &Arc<Placer>, _: &AnnouncedBlocks) -> Result<(), MoveError> {
        if self.abilities().page_channels > 0 {
            self.sim.enter().world.link.receives_by(placer);
        }
        Ok(())
    }

    fn barrier(&mut self, stop: &Stop) -> Result<(), MoveError> {
        for _ in 0..STALL_STEPS {
            let turn = self.sim.enter();
            let gone = turn.world.killed || turn.world.is_endless();
            match turn.world.link.is_at_barrier().filter(|_| !gone) {
                Some(true) => return Ok(()),
                Some(false) => {}
                None => return Err(ChannelError::Closed { peer: "sim".into(), doing: DOING }.into()),
            }
            if let Some(reason @ StopReason::Cancelled) = stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: DOING }.into());
            }
        }
        let after = Duration::from_secs(30);
        Err(ChannelError::Stalled { peer: "sim".into(), doing: DOING, after }.into())
    }

    fn release(&mut self) {
        self.sim.enter().world.link.release();
    }

    fn placed_pages(&self) -> Vec<PageCounts> {
        let channels = usize::from(self.abilities().page_channels);
        self.sim.world().link.placed.iter().take(channels).copied().collect()
    }

    fn revoke(&mut self) {
        let able = self.abilities();
        if able.page_channels > 0 {
            self.sim.enter().world.link.receives = false;
        }
        if able.has_rounds {
            self.sim.enter().world.revoke();
        }
    }

    fn close(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }
}
