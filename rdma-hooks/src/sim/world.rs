//! The simulated network's state and clock.

mod connection;
mod device;
mod events;
mod reads;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Fault, Host, SimConfig, lock};
use crate::fabric::{Access, Completion, CompletionStatus, FabricError, LinkState, Operation, Reads};
use crate::region::HostRegion;
use events::{Event, Timed};
pub(super) use reads::Breakage;

/// The transport gives up on a silent peer after this long.
const RETRIES_TAKE: Duration = Duration::from_secs(2);
/// A lost packet is sent again after this long.
const RETRANSMIT: Duration = Duration::from_millis(4);
/// The thread that should advance time may have died: another thread does so after this long by the real clock.
const STALL: Duration = Duration::from_secs(3);
pub(super) type EndpointId = usize;

/// Where a thread waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Endpoint(EndpointId),
    Port(u16),
    /// Only time passes.
    Nowhere,
}

pub(super) struct Shared {
    world: Mutex<World>,
    pub(super) changed: Condvar,
}

impl Shared {
    pub(super) fn new(world: World) -> Self {
        Self { world: Mutex::new(world), changed: Condvar::new() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, World> {
        lock(&self.world)
    }

    /// Waits until something happens at `place` or virtual time reaches `until`.
    pub(super) fn wait<'a>(
        &'a self,
        mut world: MutexGuard<'a, World>,
        place: Place,
        until: Duration,
    ) -> MutexGuard<'a, World> {
        if world.has_input(place) {
            return world;
        }
        let ticket = world.start_waiting(place, until);
        loop {
            if world.woken(ticket) {
                return world;
            }
            if world.all_wait() {
                world.advance();
                self.changed.notify_all();
                continue;
            }
            let (next, timeout) =
                self.changed.wait_timeout(world, STALL).unwrap_or_else(PoisonError::into_inner);
            world = next;
            if timeout.timed_out() {
                world.advance();
                self.changed.notify_all();
            }
        }
    }
}

#[derive(Debug)]
struct Waiter {
    ticket: u64,
    place: Place,
    until: Duration,
    woken: bool,
}

/// A request that is not yet completed.
#[derive(Clone, Copy, Debug)]
struct Queued {
    id: u64,
    signalled: bool,
    operation: Operation,
    /// How it will end.
    failed: Option<CompletionStatus>,
}

#[derive(Debug)]
pub(super) struct EndpointState {
    host: Host,
    peer: Option<EndpointId>,
    pub(super) link: LinkState,
    pub(super) send_depth: usize,
    answer: Option<Result<Vec<u8>, CompletionStatus>>,
    private_data: Vec<u8>,
    free_slots: VecDeque<usize>,
    /// Bytes in each receive buffer.
    receive_bytes: usize,
    /// Messages that found no buffer; the transport tries again.
    unready: VecDeque<(EndpointId, u64, Vec<u8>)>,
    received: VecDeque<(usize, Vec<u8>)>,
    completions: VecDeque<Completion>,
    /// Oldest first.
    queue: VecDeque<Queued>,
    reads: Reads,
    /// READs of the peer that are being answered.
    served: usize,
    /// The transport will give this request up: nothing after it completes.
    gives_up: Option<u64>,
    broken: bool,
    /// Messages and writes that have arrived.
    arrivals: u64,
    last_arrival: Duration,
    last_ack: Duration,
    random: u64,
    news: bool,
}

#[derive(Debug)]
struct Region {
    host: Host,
    region: HostRegion,
    access: Vec<Access>,
    address: u64,
}

#[derive(Debug, Default)]
struct HostState {
    endpoints: u64,
    events: u64,
    messages: u64,
    requests: u64,
    registrations: u64,
    dead: bool,
    silent: bool,
}

pub(super) struct World {
    config: SimConfig,
    epoch: Instant,
    pub(super) now: Duration,
    entered: usize,
    left: usize,
    waiters: Vec<Waiter>,
    next_ticket: u64,
    events: BinaryHeap<Reverse<Timed>>,
    hosts: BTreeMap<Host, HostState>,
    endpoints: Vec<EndpointState>,
    ports: HashMap<u16, VecDeque<(EndpointId, Vec<u8>)>>,
    pub(super) regions: HashMap<u32, RegionEntry>,
    next_key: u32,
    /// Messages that found no receive buffer: the peer broke the credit protocol.
    pub(super) unready_messages: u64,
    pub(super) on_demand_registrations: u64,
    pub(super) breakage: Breakage,
}

/// Kept opaque to the fabric above.
pub(super) struct RegionEntry(Region);

impl World {
    pub(super) fn new(config: SimConfig) -> Self {
        Self {
            config,
            epoch: Instant::now(),
            now: Duration::ZERO,
            entered: 0,
            left: 0,
            waiters: Vec::new(),
            next_ticket: 0,
            events: BinaryHeap::new(),
            hosts: BTreeMap::new(),
            endpoints: Vec::new(),
            ports: HashMap::new(),
            regions: HashMap::new(),
            next_key: 0x100,
            unready_messages: 0,
            on_demand_registrations: 0,
            breakage: Breakage::None,
        }
    }

    // --- time and threads -------------------------------------------------------------------------------------------

    pub(super) fn instant(&self) -> Instant {
        self.epoch + self.now
    }

    pub(super) fn enter(&mut self) {
        self.entered += 1;
    }

    pub(super) fn leave(&mut self) {
        self.left += 1;
    }

    fn start_waiting(&mut self, place: Place, until: Duration) -> u64 {
        self.next_ticket += 1;
        self.waiters.push(Waiter { ticket: self.next_ticket, place, until, woken: false });
        self.next_ticket
    }

    fn woken(&mut self, ticket: u64) -> bool {
        let Some(index) = self.waiters.iter().position(|waiter| waiter.ticket == ticket) else { return true };
        let woken = self.waiters[index].woken;
        if woken {
            self.waiters.swap_remove(index);
        }
        woken
    }

    fn all_wait(&self) -> bool {
        let all_here = self.entered >= self.config.threads;
        let asleep = self.waiters.iter().filter(|waiter| !waiter.woken).count();
        all_here && asleep == self.waiters.len() && asleep >= self.entered - self.left
    }

    /// Advances time to the next event or deadline, processes all events of that moment, and wakes the waiting threads
    /// that they concern.
    fn advance(&mut self) {
        let deadline = self.waiters.iter().map(|waiter| waiter.until).min();
        let event = self.events.peek().map(|Reverse(timed)| timed.at);
        let Some(next) = deadline.into_iter().chain(event).min() else { return };
        self.now = self.now.max(next);
        while self.events.peek().is_some_and(|Reverse(timed)| timed.at <= self.now) {
            if let Some(Reverse(timed)) = self.events.pop() {
                self.happen(timed.event);
            }
        }
        for index in 0..self.waiters.len() {
            let due = self.waiters[index].until <= self.now;
            let news = self.has_input(self.waiters[index].place);
            self.waiters[index].woken |= due || news;
        }
    }

    fn has_input(&self, place: Place) -> bool {
        match place {
            Place::Endpoint(id) => self.endpoints[id].news,
            Place::Nowhere => false,
            Place::Port(port) => self.ports.get(&port).is_some_and(|requests| !requests.is_empty()),
        }
    }

    fn schedule(&mut self, host: Host, at: Duration, event: Event) {
        let state = self.hosts.entry(host).or_default();
        state.events += 1;
        let seq = state.events;
        self.events.push(Reverse(Timed { at, host, seq, event }));
    }

    /// When a delivery from `from` arrives, in order after what it sent before. `None`: lost permanently.
    fn arrival(&mut self, from: EndpointId, ack: bool) -> Option<Duration> {
        let (loss, span) = (self.config.loss_per_mille, self.config.max_delay.as_nanos() as u64 + 1);
        let now = self.now;
        let endpoint = &mut self.endpoints[from];
        let mut delay = Duration::from_nanos(next_random(&mut endpoint.random) % span);
        let mut tries = 0;
        while next_random(&mut endpoint.random) % 1000 < loss {
            delay += RETRANSMIT;
            tries += 1;
            if tries > 7 {
                return None;
            }
        }
        let last = if ack { &mut endpoint.last_ack } else { &mut endpoint.last_arrival };
        *last = (now + delay).max(*last + Duration::from_nanos(1));
        Some(*last)
    }

    // --- hosts and faults -------------------------------------------------------------------------------------------

    pub(super) fn messages_sent(&self, host: Host) -> u64 {
        self.hosts.get(&host).map_or(0, |state| state.messages)
    }

    pub(super) fn alive(&self, host: Host) -> Result<(), FabricError> {
        if self.hosts.get(&host).is_some_and(|state| state.dead) {
            Err(FabricError::DeviceRemoved)
        } else {
            Ok(())
        }
    }

    fn faults(&self, host: Host) -> impl Iterator<Item = Fault> + '_ {
        self.config.faults.iter().filter(move |(at, _)| *at == host).map(|&(_, fault)| fault)
    }

    /// Everything of a host ends; its peers receive a disconnect unless it ended silently.
    fn end_host(&mut self, host: Host, silent: bool) {
        let state = self.hosts.entry(host).or_default();
        (state.dead, state.silent) = (true, silent);
        for id in 0..self.endpoints.len() {
            if self.endpoints[id].host == host {
                self.tear_down(id, LinkState::DeviceRemoved, silent);
            }
        }
    }

    fn tear_down(&mut self, id: EndpointId, link: LinkState, silent: bool) {
        let endpoint = &mut self.endpoints[id];
        let (peer, host) = (endpoint.peer, endpoint.host);
        if endpoint.link == LinkState::Up {
            endpoint.link = link;
            endpoint.news = true;
            self.flush(id);
            if let Some(peer) = peer
                && !silent
                && let Some(at) = self.arrival(id, false)
            {
                self.schedule(host, at, Event::LinkDown { to: peer });
            }
        }
    }

    /// A request fails, and everything after it is flushed.
    fn fail(&mut self, of: EndpointId, id: u64, operation: Operation, status: CompletionStatus) {
        let endpoint = &mut self.endpoints[of];
        if !endpoint.broken {
            endpoint.queue.retain(|queued| queued.id != id);
            endpoint.completions.push_back(Completion::Failed { operation, status, vendor: 0 });
            self.flush(of);
        }
    }

    fn flush(&mut self, id: EndpointId) {
        let endpoint = &mut self.endpoints[id];
        endpoint.broken = true;
        endpoint.news = true;
        for _ in endpoint.free_slots.drain(..) {
            let (operation, status) = (Operation::Receive, CompletionStatus::Flushed);
            endpoint.completions.push_front(Completion::Failed { operation, status, vendor: 0 });
        }
        for Queued { operation, .. } in endpoint.queue.drain(..) {
            let flushed = Completion::Failed { operation, status: CompletionStatus::Flushed, vendor: 0 };
            endpoint.completions.push_back(flushed);
        }
    }

    /// Counts a request and applies the faults due. Err: the host is dead. Ok(true): the request shall fail.
    fn count_request(&mut self, id: EndpointId, message: bool) -> Result<bool, FabricError> {
        let host = self.endpoints[id].host;
        self.alive(host)?;
        let state = self.hosts.entry(host).or_default();
        let (requests, messages) = (state.requests, state.messages);
        state.requests += 1;
        state.messages += u64::from(message);
        let mut bad = false;
        let faults: Vec<Fault> = self.faults(host).collect();
        for fault in faults {
            match fault {
                Fault::Killed { message: at } if message && at == messages => self.end_host(host, false),
                Fault::PowerLoss { message: at } if message && at == messages => self.end_host(host, true),
                Fault::DeviceRemoved { request } if request == requests => self.end_host(host, false),
                Fault::BadCompletion { request } => bad |= request == requests,
                _ => {}
            }
        }
        self.alive(host)?;
        Ok(bad)
    }
}

/// The splitmix64 generator.
pub(super) fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
