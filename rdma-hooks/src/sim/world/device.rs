//! The simulated devices: registration, posting, delivery, placement and completion.

use std::time::Duration;

use super::{Breakage, EndpointId, Event, Queued, RETRIES_TAKE, Region, RegionEntry, World};
use crate::fabric::{
    Access, AddressBase, Completion, CompletionStatus, FabricError, Operation, WriteRequest,
};
use crate::region::HostRegion;
use crate::sim::{Fault, Host, OnDemand};

impl World {
    pub(in crate::sim) fn registration_takes(&self, id: EndpointId) -> Duration {
        self.config.registration_takes[self.endpoints[id].host as usize]
    }

    /// The number of a device that does not count stays constant, as with some devices that still answer the query.
    pub(in crate::sim) fn received_mark(&self, id: EndpointId) -> Option<u64> {
        Some(if self.config.counts_received { self.endpoints[id].arrivals } else { 0 })
    }

    pub(in crate::sim) fn register(
        &mut self,
        id: EndpointId,
        region: &HostRegion,
        access: &[Access],
        base: AddressBase,
        on_demand: bool,
    ) -> Result<(u32, u64), FabricError> {
        let host = self.endpoints[id].host;
        self.alive(host)?;
        if host == Host::B && self.config.on_demand != OnDemand::Unneeded && !on_demand {
            return Err(FabricError::Registration {
                bytes: region.len(),
                registered: 0,
                remedy: "this memory cannot be made resident",
                source: std::io::Error::from_raw_os_error(libc::EOPNOTSUPP),
            });
        }
        self.on_demand_registrations += u64::from(on_demand);
        let state = self.hosts.entry(host).or_default();
        let number = state.registrations;
        state.registrations += 1;
        let refused = |fault: Fault| matches!(fault, Fault::RegistrationRefused { registration } if registration == number);
        if self.faults(host).any(refused) {
            return Err(FabricError::Registration {
                bytes: region.len(),
                registered: 0,
                remedy: "this is a simulated refusal",
                source: std::io::Error::from_raw_os_error(libc::ENOMEM),
            });
        }
        self.next_key += 1;
        let key = self.next_key;
        let address = match base {
            AddressBase::At(address) => address,
            AddressBase::Host => u64::from(key) << 40,
        };
        self.regions.insert(
            key,
            RegionEntry(Region { host, region: region.clone(), access: access.to_vec(), address }),
        );
        Ok((key, address))
    }

    pub(in crate::sim) fn deregister(&mut self, key: u32) {
        if !self.breakage.is(Breakage::ReadWithDeadKey) {
            self.regions.remove(&key);
        }
    }

    pub(super) fn find_region(&self, host: Host, key: u32, at: u64, len: u64) -> Option<(&Region, u64)> {
        let region = &self.regions.get(&key)?.0;
        let offset = at.checked_sub(region.address)?;
        let fits = offset.checked_add(len)? <= region.region.len();
        (fits && region.host == host).then_some((region, offset))
    }

    pub(in crate::sim) fn post_send(
        &mut self,
        from: EndpointId,
        id: u64,
        bytes: Vec<u8>,
    ) -> Result<(), FabricError> {
        let bad = self.count_request(from, true)?;
        self.enqueue(from, id, true, Operation::Send)?;
        match self.endpoints[from].peer {
            Some(to) => self.deliver(from, id, Operation::Send, bad, Event::Message { to, from, id, bytes }),
            None => self.flush(from),
        }
        Ok(())
    }

    pub(in crate::sim) fn post_writes(
        &mut self,
        from: EndpointId,
        chain: &[WriteRequest],
    ) -> Result<(), FabricError> {
        for &request in chain {
            let bad = self.count_request(from, false)?;
            self.enqueue(from, request.id, request.signalled, Operation::Write)?;
            match self.endpoints[from].peer {
                Some(to) => {
                    let event = Event::Write { to, from, request };
                    self.deliver(from, request.id, Operation::Write, bad, event);
                }
                None => self.flush(from),
            }
        }
        Ok(())
    }

    pub(super) fn enqueue(
        &mut self,
        from: EndpointId,
        id: u64,
        signalled: bool,
        operation: Operation,
    ) -> Result<(), FabricError> {
        let endpoint = &mut self.endpoints[from];
        if endpoint.queue.len() >= endpoint.send_depth {
            return Err(FabricError::QueueFull);
        }
        endpoint.queue.push_back(Queued { id, signalled, operation, failed: None });
        Ok(())
    }

    pub(super) fn deliver(
        &mut self,
        from: EndpointId,
        id: u64,
        operation: Operation,
        bad: bool,
        event: Event,
    ) {
        let host = self.endpoints[from].host;
        if self.endpoints[from].broken {
            self.flush(from);
            return;
        }
        let fail = |status| Event::Fail { to: from, id, operation, status };
        match self.arrival(from, false) {
            Some(at) if bad => self.schedule(host, at, fail(CompletionStatus::RemoteOperation)),
            Some(at) => self.schedule(host, at, event),
            None => {
                self.endpoints[from].gives_up.get_or_insert(id);
                self.schedule(host, self.now + RETRIES_TAKE, fail(CompletionStatus::RetryExceeded));
            }
        }
    }

    pub(in crate::sim) fn poll(
        &mut self,
        id: EndpointId,
        out: &mut Vec<Completion>,
        mut store: impl FnMut(usize, Vec<u8>),
    ) {
        let endpoint = &mut self.endpoints[id];
        endpoint.news = false;
        let first = out.len();
        out.extend(endpoint.completions.drain(..));
        endpoint.reads.completed(&out[first..]);
        for (slot, bytes) in endpoint.received.drain(..) {
            store(slot, bytes);
            out.push(Completion::Received { slot });
        }
    }

    pub(in crate::sim) fn repost(&mut self, id: EndpointId, slot: usize) {
        self.endpoints[id].free_slots.push_back(slot);
        if let Some((from, message, bytes)) = self.endpoints[id].unready.pop_front() {
            self.arrive(id, from, message, bytes);
        }
    }
}
