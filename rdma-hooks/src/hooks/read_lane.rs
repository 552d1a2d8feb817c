//! A queue pair on which the destination reads the source's memory, into buffers of its own.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::fabric::{
    Access, AddressBase, Completion, CompletionStatus, Endpoint, FabricError, LinkState, Operation,
    ReadPiece, ReadRequest, Registration,
};
use crate::hooks::HooksError;
use crate::region::HostRegion;
use crate::stop::Stop;

/// Queue pairs for READs of a migration: the first for pages that a thread waits for, the second for all others. A READ
/// does not wait for those on the other one.
pub const READ_QUEUES: u16 = 2;

/// Longest time for which a lane on which threads wait looks for the end of its READs before it sleeps. A READ of a page
/// takes some microseconds; one that takes longer is slow enough to sleep for it.
const LOOK: Duration = Duration::from_micros(500);

/// What the source tells the destination about memory that it may read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadKey {
    /// The key.
    pub rkey: u32,
    /// Address of the memory's first byte.
    pub address: u64,
}

/// How a READ ended.
#[derive(Debug)]
pub struct ReadDone {
    /// The buffer that it was to fill.
    pub slot: usize,
    /// Whether the buffer holds the bytes. After a failure of any READ all READs of this queue pair fail.
    pub is_read: bool,
}

/// The destination's end of a queue pair for READs, with its buffers. Field order is drop order: nothing is stored any
/// more when the buffers are deregistered.
pub struct ReadLane {
    endpoint: Box<dyn Endpoint>,
    registration: Registration,
    slot_bytes: u64,
    free: Vec<usize>,
    /// READs under way, oldest first: id, buffer, and when it was posted.
    flights: VecDeque<(u64, usize, Instant)>,
    /// How long a READ takes lately, where threads wait for it.
    typical: Option<Duration>,
    next_id: u64,
    depth: usize,
    scratch: Vec<Completion>,
    failure: Option<FabricError>,
    is_told: bool,
}

impl ReadLane {
    /// `room` is divided into buffers of `slot_bytes` bytes: number n begins at n times that. `urgent`: threads wait for
    /// what is read.
    pub(crate) fn new(
        endpoint: Box<dyn Endpoint>,
        room: &HostRegion,
        slot_bytes: u64,
        urgent: bool,
    ) -> Result<Self, HooksError> {
        let limits = endpoint.limits();
        let slots = room.len() / slot_bytes.max(1);
        if limits.reads.own == 0 || limits.read_bytes < slot_bytes || slots == 0 {
            return Err(HooksError::OutOfOrder("a queue pair that reads nothing"));
        }
        let registration = endpoint.register(room, &[Access::LocalWrite], AddressBase::Host)?;
        let depth = usize::from(limits.reads.own);
        let free = (0..usize::try_from(slots).unwrap_or(usize::MAX)).rev().collect();
        Ok(Self {
            endpoint,
            registration,
            slot_bytes,
            free,
            flights: VecDeque::new(),
            typical: urgent.then_some(Duration::ZERO),
            next_id: 0,
            depth,
            scratch: Vec::new(),
            failure: None,
            is_told: false,
        })
    }

    /// True if one more READ can be posted now.
    pub fn has_room(&self) -> bool {
        self.failure.is_none() && !self.free.is_empty() && self.flights.len() < self.depth
    }

    /// READs under way.
    pub fn under_way(&self) -> usize {
        self.flights.len()
    }

    /// Bytes of the longest READ.
    pub fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// The fabric's clock.
    pub fn now(&self) -> Instant {
        self.endpoint.now()
    }

    /// See [`Endpoint::take_part`].
    pub fn take_part(&self) -> Box<dyn std::any::Any + Send> {
        self.endpoint.take_part()
    }

    /// Posts a READ of `len` bytes from `address` of the peer on; returns the buffer that it fills.
    ///
    /// # Errors
    ///
    /// [`HooksError::OutOfOrder`] without [room](Self::has_room), or for more bytes than a buffer has; the connection's
    /// error.
    pub fn post(&mut self, rkey: u32, address: u64, len: u32) -> Result<usize, HooksError> {
        if !self.has_room() || u64::from(len) > self.slot_bytes {
            return Err(HooksError::OutOfOrder("a READ that no buffer is free for"));
        }
        let Some(slot) = self.free.pop() else {
            return Err(HooksError::OutOfOrder("a READ that no buffer is free for"));
        };
        self.next_id += 1;
        let to = self.registration.address + slot as u64 * self.slot_bytes;
        let into = [ReadPiece { lkey: self.registration.lkey, to, len }];
        let request = ReadRequest { id: self.next_id, rkey, from: address, into: &into };
        if let Err(error) = self.endpoint.post_reads(&[request]) {
            self.free.push(slot);
            self.fail(error);
            return Err(self.take_failure_once().unwrap_or(HooksError::Fabric(FabricError::Disconnected)));
        }
        self.flights.push_back((self.next_id, slot, self.endpoint.now()));
        Ok(slot)
    }

    /// Appends the READs that have ended; never waits. After a failure these are all that were under way.
    pub fn poll(&mut self, out: &mut Vec<ReadDone>) {
        let mut found = std::mem::take(&mut self.scratch);
        if let Err(error) = self.endpoint.poll(&mut found) {
            self.failure.get_or_insert(error);
        }
        for completion in found.drain(..) {
            match completion {
                Completion::Done { id } if self.failure.is_none() => self.done(id, out),
                Completion::Done { .. } | Completion::Received { .. } => {}
                // The receives are flushed after any failure, and tell nothing.
                Completion::Failed { operation: Operation::Receive, .. } => {}
                Completion::Failed { operation, status, vendor } => {
                    let error = FabricError::Completion { operation, status, vendor };
                    let error = self.blame_link(error, status);
                    self.fail(error);
                }
            }
        }
        self.scratch = found;
        if self.failure.is_some() {
            let ended = self.flights.drain(..).map(|(_, slot, _)| ReadDone { slot, is_read: false });
            out.extend(ended);
        }
    }

    fn done(&mut self, id: u64, out: &mut Vec<ReadDone>) {
        while self.flights.front().is_some_and(|(oldest, ..)| *oldest <= id) {
            let Some((_, slot, posted)) = self.flights.pop_front() else { break };
            if let Some(typical) = &mut self.typical {
                let took = self.endpoint.now().saturating_duration_since(posted);
                *typical = if typical.is_zero() { took } else { (*typical * 7 + took) / 8 };
            }
            out.push(ReadDone { slot, is_read: true });
        }
    }

    /// If the link went down, that is the reason.
    fn blame_link(&mut self, error: FabricError, status: CompletionStatus) -> FabricError {
        match self.endpoint.link() {
            Ok(LinkState::Disconnected) if status == CompletionStatus::Flushed => FabricError::Disconnected,
            Ok(LinkState::DeviceRemoved) => FabricError::DeviceRemoved,
            _ => error,
        }
    }

    /// The buffer may be filled again: what the READ has brought is no longer needed.
    pub fn release(&mut self, slot: usize) {
        self.free.push(slot);
    }

    /// True if a READ has ended within about the time that one takes; false at once where that is long.
    fn look(&mut self) -> Result<bool, FabricError> {
        match self.typical.filter(|typical| *typical < LOOK) {
            Some(Duration::ZERO) => self.endpoint.look(LOOK),
            Some(typical) => self.endpoint.look((typical * 2).min(LOOK)),
            None => Ok(false),
        }
    }

    /// Waits until a READ may have ended; less if the connection is lost or `stop` is reached.
    ///
    /// # Errors
    ///
    /// [`HooksError::Stopped`]. A lost connection is a failure of the READs.
    pub fn wait(&mut self, stop: &Stop) -> Result<(), HooksError> {
        let now = self.endpoint.now();
        stop.check(now)?;
        match self.look() {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => {
                self.fail(error);
                return Ok(());
            }
        }
        let slept = match self.endpoint.link() {
            Ok(LinkState::Up) => self.endpoint.wait(stop.slice(now)),
            Ok(LinkState::Disconnected) => Err(FabricError::Disconnected),
            Ok(LinkState::DeviceRemoved) => Err(FabricError::DeviceRemoved),
            Err(error) => Err(error),
        };
        slept.unwrap_or_else(|error| self.fail(error));
        Ok(())
    }

    fn fail(&mut self, error: FabricError) {
        self.failure.get_or_insert(error);
    }

    /// Why a READ or the connection has failed, told once. Nothing is read any more.
    pub fn take_failure_once(&mut self) -> Option<HooksError> {
        if self.is_told {
            return None;
        }
        let why = self.failure.take()?;
        (self.failure, self.is_told) = (Some(FabricError::Disconnected), true);
        Some(why.into())
    }
}
