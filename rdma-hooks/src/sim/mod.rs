//! A fabric inside one process for tests, with virtual time, seeded delays and seeded faults.
//!
//! Two (or more) threads run real hooks over simulated queue pairs. Virtual time stops while any of them runs and moves
//! to the next event when all of them wait, so a seed gives the same history every time. Deliveries keep their order on
//! a queue pair and overtake each other across queue pairs, as on a network. The simulated device checks what a NIC
//! checks: keys, ranges, access, receive buffers, queue depth; it reads memory when a write is delivered, not when it
//! is posted.
//!
//! # Example
//!
//! See the [crate's front page](crate).

mod memory;
#[cfg(test)]
mod read_tests;
mod world;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use memory::SparseMemory;

use crate::fabric::{
    Access, AddressBase, Completion, ConnectParams, Endpoint, Fabric, FabricError, Incoming, Limits,
    LinkState, Listener, ReadDepth, ReadRequest, Registration, WriteRequest, register_resident_or_on_demand,
};
use crate::region::HostRegion;
use crate::stop::Stop;
use world::{EndpointId, Shared, World};

/// Which of the simulation's hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Host {
    /// The first one.
    A,
    /// The second one.
    B,
}

/// Something that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The process dies when it sends its `message`-th message (from 0); the kernel of its host disconnects.
    Killed {
        /// Messages sent before.
        message: u64,
    },
    /// The host loses power when it sends its `message`-th message; the peer receives no disconnect.
    PowerLoss {
        /// Messages sent before.
        message: u64,
    },
    /// The device goes away at the `request`-th request (send, write or READ).
    DeviceRemoved {
        /// Requests posted before.
        request: u64,
    },
    /// The `request`-th request completes with an error.
    BadCompletion {
        /// Requests posted before.
        request: u64,
    },
    /// The `request`-th request is an RDMA READ whose answer loses its end for good: most of its bytes are stored, and
    /// the transport gives up.
    AnswerCut {
        /// Requests posted before.
        request: u64,
    },
    /// The `registration`-th registration is refused.
    RegistrationRefused {
        /// Registrations made before.
        registration: u64,
    },
}

/// How the simulated network behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SimConfig {
    /// The seed of all random decisions.
    pub seed: u64,
    /// Threads that take part; time stops until all have called [`SimFabric::enter`].
    pub threads: usize,
    /// Longest delay of a delivery.
    pub max_delay: Duration,
    /// How many of 1000 deliveries are lost and sent again by the transport.
    pub loss_per_mille: u64,
    /// What goes wrong where.
    pub faults: Vec<(Host, Fault)>,
    /// Requests a queue pair takes at a time, at most.
    pub send_depth: usize,
    /// READs that the devices of the first and the second host offer, at a time for each queue pair.
    pub reads: [ReadDepth; 2],
    /// Pieces of memory that a READ may fill, at most.
    pub read_pieces: usize,
    /// How long a registration takes, at the first host and at the second.
    pub registration_takes: [Duration; 2],
    /// The devices count what they receive ([`Endpoint::received_mark`]).
    pub counts_received: bool,
    /// Memory of the second host that cannot be made resident, such as that of a file system with DAX: registering it
    /// fails unless it is on demand, which the device may or may not offer.
    pub on_demand: OnDemand,
}

/// Whether memory needs on-demand registration, and whether the device offers it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnDemand {
    /// No memory needs them.
    #[default]
    Unneeded,
    /// The second host's memory needs them, and its device offers them.
    Offered,
    /// The second host's memory needs them, and its device does not offer them.
    Missing,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            threads: 2,
            max_delay: Duration::from_micros(200),
            loss_per_mille: 0,
            faults: Vec::new(),
            send_depth: 512,
            reads: [ReadDepth { own: 16, served: 16 }; 2],
            read_pieces: 16,
            registration_takes: [Duration::ZERO; 2],
            counts_received: true,
            on_demand: OnDemand::Unneeded,
        }
    }
}

/// The network between the hosts.
#[derive(Clone)]
pub struct Sim(Arc<Shared>);

impl Sim {
    /// A network at time zero.
    pub fn new(config: SimConfig) -> Self {
        Self(Arc::new(Shared::new(World::new(config))))
    }

    /// The fabric as one host sees it.
    pub fn fabric(&self, host: Host) -> SimFabric {
        SimFabric { shared: Arc::clone(&self.0), host }
    }

    /// Registrations that exist now, on all hosts. A number above zero after a migration is a leak.
    pub fn live_registrations(&self) -> usize {
        self.0.lock().regions.len()
    }

    /// Messages a host has sent so far.
    pub fn messages_sent(&self, host: Host) -> u64 {
        self.0.lock().messages_sent(host)
    }

    /// Messages that found no receive buffer posted. A number above zero means that one end broke the credit protocol.
    pub fn unready_messages(&self) -> u64 {
        self.0.lock().unready_messages
    }

    /// Registrations made so far that need not be resident.
    pub fn on_demand_registrations(&self) -> u64 {
        self.0.lock().on_demand_registrations
    }

    /// Time since the network was made.
    pub fn elapsed(&self) -> Duration {
        self.0.lock().now
    }
}

/// One host's fabric.
#[derive(Clone)]
pub struct SimFabric {
    shared: Arc<Shared>,
    host: Host,
}

/// A thread's participation in the simulation; when it is dropped, time advances without the thread.
#[must_use = "the thread takes part while this lives"]
pub struct Part {
    shared: Arc<Shared>,
}

impl SimFabric {
    /// The calling thread takes part from now on.
    pub fn enter(&self) -> Part {
        self.shared.lock().enter();
        self.shared.changed.notify_all();
        Part { shared: Arc::clone(&self.shared) }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.shared.lock().leave();
        self.shared.changed.notify_all();
    }
}

impl Fabric for SimFabric {
    fn connect(
        &self,
        _host: &str,
        port: u16,
        params: &ConnectParams,
        stop: &Stop,
    ) -> Result<Box<dyn Endpoint>, FabricError> {
        let id = self.shared.lock().connect(self.host, port, params);
        let endpoint =
            SimEndpoint { shared: Arc::clone(&self.shared), id, private_data: Vec::new(), slots: Vec::new() };
        loop {
            let mut world = self.shared.lock();
            match world.connected(id) {
                Some(answer) => {
                    drop(world);
                    return Ok(Box::new(endpoint.with_private_data(answer?)));
                }
                None => {
                    stop.check(world.instant())?;
                    let until = world.now + stop.slice(world.instant());
                    world = self.shared.wait(world, world::Place::Endpoint(id), until);
                    drop(world);
                }
            }
        }
    }

    fn listen(&self, _host: &str, port: u16) -> Result<Box<dyn Listener>, FabricError> {
        self.shared.lock().listen(port);
        Ok(Box::new(SimListener { shared: Arc::clone(&self.shared), host: self.host, port }))
    }

    fn now(&self) -> Instant {
        self.shared.lock().instant()
    }
}

struct SimListener {
    shared: Arc<Shared>,
    host: Host,
    port: u16,
}

impl Listener for SimListener {
    fn port(&self) -> u16 {
        self.port
    }

    fn next_request(&mut self, stop: &Stop) -> Result<Box<dyn Incoming>, FabricError> {
        loop {
            let mut world = self.shared.lock();
            if let Some((from, private_data)) = world.next_request(self.port) {
                let (shared, host) = (Arc::clone(&self.shared), self.host);
                return Ok(Box::new(SimIncoming { shared, host, from, private_data, answered: false }));
            }
            world.alive(self.host)?;
            stop.check(world.instant())?;
            let until = world.now + stop.slice(world.instant());
            drop(self.shared.wait(world, world::Place::Port(self.port), until));
        }
    }
}

struct SimIncoming {
    shared: Arc<Shared>,
    host: Host,
    from: EndpointId,
    private_data: Vec<u8>,
    answered: bool,
}

impl Incoming for SimIncoming {
    fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    fn peer(&self) -> Option<SocketAddr> {
        None
    }

    fn accept(
        mut self: Box<Self>,
        params: &ConnectParams,
        _: &Stop,
    ) -> Result<Box<dyn Endpoint>, FabricError> {
        self.answered = true;
        let id = self.shared.lock().accept(self.host, self.from, params)?;
        let shared = Arc::clone(&self.shared);
        Ok(Box::new(SimEndpoint { shared, id, private_data: Vec::new(), slots: Vec::new() }))
    }
}

impl Drop for SimIncoming {
    fn drop(&mut self) {
        if !self.answered {
            self.shared.lock().reject(self.from);
        }
    }
}

struct SimEndpoint {
    shared: Arc<Shared>,
    id: EndpointId,
    private_data: Vec<u8>,
    /// Received messages by buffer, moved out of the world when reported.
    slots: Vec<Vec<u8>>,
}

impl SimEndpoint {
    fn with_private_data(mut self, private_data: Vec<u8>) -> Self {
        self.private_data = private_data;
        self
    }
}

impl Endpoint for SimEndpoint {
    fn take_part(&self) -> Box<dyn std::any::Any + Send> {
        let fabric = SimFabric { shared: Arc::clone(&self.shared), host: Host::A };
        Box::new(fabric.enter())
    }

    fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    fn limits(&self) -> Limits {
        self.shared.lock().limits(self.id)
    }

    fn now(&self) -> Instant {
        self.shared.lock().instant()
    }

    fn register(
        &self,
        region: &HostRegion,
        access: &[Access],
        base: AddressBase,
    ) -> Result<Registration, FabricError> {
        let takes = self.shared.lock().registration_takes(self.id);
        if !takes.is_zero() {
            let world = self.shared.lock();
            let until = world.now + takes;
            drop(self.shared.wait(world, world::Place::Nowhere, until));
        }
        let offered = self.limits().on_demand;
        let ((key, address), on_demand) = register_resident_or_on_demand(offered, |on_demand| {
            self.shared.lock().register(self.id, region, access, base, on_demand)
        })?;
        let guard = Guard { shared: Arc::clone(&self.shared), key };
        let len = region.len();
        Ok(Registration { lkey: key, rkey: key, address, len, on_demand, guard: Box::new(guard) })
    }

    fn post_writes(&mut self, chain: &[WriteRequest]) -> Result<(), FabricError> {
        self.shared.lock().post_writes(self.id, chain)
    }

    fn post_reads(&mut self, chain: &[ReadRequest<'_>]) -> Result<(), FabricError> {
        self.shared.lock().post_reads(self.id, chain)
    }

    fn post_send(&mut self, id: u64, parts: &[&[u8]]) -> Result<(), FabricError> {
        self.shared.lock().post_send(self.id, id, parts.concat())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), FabricError> {
        let (slots, shared) = (&mut self.slots, &self.shared);
        shared.lock().poll(self.id, out, |slot, bytes| {
            if slots.len() <= slot {
                slots.resize(slot + 1, Vec::new());
            }
            slots[slot] = bytes;
        });
        Ok(())
    }

    fn received(&self, slot: usize) -> &[u8] {
        self.slots.get(slot).map_or(&[], Vec::as_slice)
    }

    fn repost(&mut self, slot: usize) -> Result<(), FabricError> {
        self.shared.lock().repost(self.id, slot);
        Ok(())
    }

    fn wait(&mut self, at_most: Duration) -> Result<(), FabricError> {
        let world = self.shared.lock();
        let until = world.now + at_most;
        drop(self.shared.wait(world, world::Place::Endpoint(self.id), until));
        Ok(())
    }

    fn received_mark(&self) -> Option<u64> {
        self.shared.lock().received_mark(self.id)
    }

    fn link(&mut self) -> Result<LinkState, FabricError> {
        Ok(self.shared.lock().endpoint(self.id).link)
    }

    fn disconnect(&mut self) {
        self.shared.lock().disconnect(self.id);
    }
}

impl Drop for SimEndpoint {
    fn drop(&mut self) {
        self.disconnect();
    }
}

struct Guard {
    shared: Arc<Shared>,
    key: u32,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.shared.lock().deregister(self.key);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
