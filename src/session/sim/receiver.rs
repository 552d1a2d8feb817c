//! The destination's page channels: its session says when they may pass a fence.

use std::sync::Arc;
use std::time::Duration;

use super::channel::SimSource;
use super::door::STALL_STEPS;
use crate::guest::Placer;
use crate::observe::PageCounts;
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::sys::{Stop, StopReason};
use crate::transport::{ChannelError, MoveError, PageChannels};
use crate::units::PageSize;

const DOING: &str = "waiting for the page channels";

impl PageChannels for SimSource {
    /// Pages are placed by the world, as the threads of a real door do it while the session does something else.
    fn begin(&mut self, _: Arc<Placer>, _: AnnouncedBlocks, _: PageSize) -> Result<(), MoveError> {
        self.sim.enter().world.door.receives = true;
        Ok(())
    }

    fn wait_barrier(&mut self, stop: &Stop) -> Result<(), MoveError> {
        for _ in 0..STALL_STEPS {
            let turn = self.sim.enter();
            let gone = turn.world.killed || turn.world.is_endless();
            match turn.world.door.is_at_barrier().filter(|_| !gone) {
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
        self.sim.enter().world.door.release();
    }

    /// The simulation counts pages.
    fn bytes(&self) -> u64 {
        0
    }

    fn count(&self) -> u8 {
        self.sim.world().door.placed.len() as u8
    }

    fn placed(&self) -> Vec<PageCounts> {
        self.sim.world().door.placed.clone()
    }

    fn end(&mut self) {
        self.sim.enter().world.door.receives = false;
    }
}
