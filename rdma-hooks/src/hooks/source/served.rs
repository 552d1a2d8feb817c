//! Memory that the destination reads by itself after a switch to postcopy.
//!
//! # Order that must hold
//!
//! A key is revoked, by deregistering its memory, before that memory is let go. A READ with a revoked key fails at the
//! destination, and its queue pair breaks: nothing is read that is no longer the guest's.

use std::ops::Range;

use super::{SourceHooks, offer};
use crate::capabilities::{Capabilities, Role};
use crate::channel::{Channel, read_params};
use crate::chunk::SpanTable;
use crate::fabric::{Access, AddressBase, Fabric};
use crate::hooks::{HooksError, READ_QUEUES, ReadKey};
use crate::stop::Stop;

impl SourceHooks {
    /// The queue pairs on which the destination reads, if both ends agreed to them.
    pub(super) fn connect_read_queues(&mut self, fabric: &dyn Fabric, stop: &Stop) -> Result<(), HooksError> {
        if !self.granted.extension.is_some_and(|extension| extension.features.reads) {
            return Ok(());
        }
        for index in 0..READ_QUEUES {
            let caps = Capabilities { pin_all: false, extension: offer(&self.config, Role::Read(index)) };
            let params = read_params(caps.encode());
            let endpoint = fabric.connect(&self.address.0, self.address.1, &params, stop)?;
            self.read_queues.push(Channel::new(endpoint));
        }
        Ok(())
    }

    /// True if the destination can read memory of this end: both ends agreed to it, and the devices do READs.
    pub fn serves_reads(&self) -> bool {
        let serves = |channel: &Channel| channel.endpoint().limits().reads.served > 0;
        !self.read_queues.is_empty() && self.read_queues.iter().all(serves)
    }

    /// The destination reads the rest: no page is written any more. Waits until all writes have completed, and
    /// deregisters the memory that they were made from.
    ///
    /// # Errors
    ///
    /// As [`begin_postcopy`](Self::begin_postcopy).
    pub fn begin_reads(&mut self, stop: &Stop) -> Result<(), HooksError> {
        self.begin_postcopy(stop)?;
        self.wait_for_keys_ahead(stop)?;
        self.spans = SpanTable::new([], 1, None);
        self.pinned.clear();
        Ok(())
    }

    /// Registers a part of a block for the destination to read; returns what it needs for that.
    ///
    /// # Errors
    ///
    /// [`HooksError::OutOfOrder`] before [`begin_reads`](Self::begin_reads); [`HooksError::Block`] for a part that the
    /// block does not have; the registration's error.
    pub fn let_read(&mut self, block: u32, bytes: Range<u64>) -> Result<ReadKey, HooksError> {
        if !self.postcopy || !self.serves_reads() {
            return Err(HooksError::OutOfOrder("memory to be read, and reading was not agreed or not begun"));
        }
        let Some(ram) = self.blocks.get(block as usize) else {
            return Err(HooksError::OutOfOrder("memory of a block that does not exist"));
        };
        let (start, region) = (bytes.start, ram.part(bytes)?);
        let endpoint = self.main.channel.endpoint();
        // No address of this process leaves it, where the device can do that.
        let served = endpoint.register(&region, &[Access::RemoteRead], AddressBase::At(start))?;
        self.main.channel.counters.registered(&served);
        let key = ReadKey { rkey: served.rkey, address: served.address };
        self.served.insert((block, start), served);
        Ok(key)
    }

    /// Revokes the key of the part of a block that begins at `start`. Returns false if there is none.
    pub fn forbid_read(&mut self, block: u32, start: u64) -> bool {
        self.served.remove(&(block, start)).is_some()
    }

    /// Keys that the destination has.
    pub fn keys_for_reads(&self) -> usize {
        self.served.len()
    }
}
