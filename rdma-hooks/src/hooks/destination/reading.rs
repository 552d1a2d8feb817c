//! The queue pairs on which the destination reads missing pages after a switch to postcopy.

use super::{DestinationHooks, is_of};
use crate::capabilities::{Capabilities, Role};
use crate::channel::reading_params;
use crate::fabric::Listener;
use crate::hooks::{HooksError, READ_QUEUES, ReadLane};
use crate::region::HostRegion;
use crate::stop::Stop;

impl DestinationHooks {
    pub(super) fn accept_read_queues(
        &mut self,
        listener: &mut dyn Listener,
        stop: &Stop,
    ) -> Result<(), HooksError> {
        let Some(main) = self.granted.extension.filter(|extension| extension.features.reads) else {
            return Ok(());
        };
        while self.read_queues.len() < usize::from(READ_QUEUES) {
            let incoming = listener.next_request(stop)?;
            let Ok(asked) = Capabilities::decode(incoming.private_data()) else { continue };
            if !is_of(&asked, main, Role::Read(self.read_queues.len() as u16)) {
                tracing::warn!(peer = ?incoming.peer(), "connection rejected: not this migration's queue pair");
                continue;
            }
            self.read_queues.push(incoming.accept(&reading_params(asked.encode()), stop)?);
        }
        Ok(())
    }

    /// True if the source's memory can be read: both ends agreed to it, and the devices do READs.
    pub fn can_read(&self) -> bool {
        let limits = self.read_queues.iter().map(|endpoint| endpoint.limits().reads.own);
        !self.read_queues.is_empty() && limits.min() > Some(0)
    }

    /// Moves the queue pairs out, each with memory for its buffers, one after the other, and the bytes of one: first that for pages
    /// that a thread waits for, then that for all others. Each is used by one thread.
    ///
    /// # Errors
    ///
    /// [`HooksError::OutOfOrder`] if there are none; the registration's error.
    pub fn read_lanes(
        &mut self,
        rooms: [(HostRegion, u64); READ_QUEUES as usize],
    ) -> Result<[ReadLane; READ_QUEUES as usize], HooksError> {
        let mut queues = std::mem::take(&mut self.read_queues).into_iter().zip(rooms);
        let mut lane = |urgent| {
            let (endpoint, (room, bytes)) = queues.next().ok_or(HooksError::OutOfOrder("no queue pairs"))?;
            ReadLane::new(endpoint, &room, bytes, urgent)
        };
        Ok([lane(true)?, lane(false)?])
    }
}
