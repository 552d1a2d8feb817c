//! One queue pair and its accounting: requests in flight, received messages, and whether the peer still answers.
//!
//! Writes gather in a chain that is posted with one doorbell. Only the last write of a chain is signalled: its
//! completion covers all writes before it. Messages are posted after the chain, so the order of calls is the order on
//! the wire.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::chunk::SpanId;
use crate::control::{Kind, WORD_BYTES, header};
use crate::counters::Counters;
use crate::fabric::{
    Completion, CompletionStatus, ConnectParams, Endpoint, FabricError, LinkState, Operation, ReadDepth,
    WriteRequest,
};
use crate::hooks::HooksError;
use crate::stop::{Stop, Stopped};

/// Interval between probes of a peer that sends nothing.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// A chain goes out at this many writes...
const CHAIN_WRITES: usize = 16;
/// ...or this many bytes, whichever comes first.
const CHAIN_BYTES: u64 = 256 * 1024;
/// Longest wait for the final ERROR to be sent.
const FAREWELL: Duration = Duration::from_millis(100);
/// Most latencies kept until they are collected.
const MAX_LATENCIES: usize = 1 << 16;

/// READs at a time that a QEMU source asks for and a QEMU destination offers.
const QEMUS_READS: u8 = 2;

/// Connection parameters of this crate: room for a deep queue of page writes and for a few messages of at most
/// `receive_bytes`. The buffers are populated and registered before the connection is established, so they are no
/// longer than the longest message. This end connects: it asks for the READs that a QEMU asks for, and posts none.
pub(crate) fn connect_params(private_data: Vec<u8>, window: u16, receive_bytes: usize) -> ConnectParams {
    let receives = usize::from(window) + 3;
    let reads = ReadDepth { own: QEMUS_READS, served: 0 };
    ConnectParams { private_data, receives, receive_bytes, send_depth: 512, reads, read_pieces: 1 }
}

/// The same for an end that accepts.
pub(crate) fn accept_params(private_data: Vec<u8>, window: u16, receive_bytes: usize) -> ConnectParams {
    let reads = ReadDepth { own: 0, served: QEMUS_READS };
    ConnectParams { reads, ..connect_params(private_data, window, receive_bytes) }
}

/// READs at a time that an end asks for on a queue pair on which the destination reads.
const READS: u8 = 16;

/// Parameters of a queue pair for the destination's READs, at the end that connects and lets itself be read.
pub(crate) fn read_params(private_data: Vec<u8>) -> ConnectParams {
    let reads = ReadDepth { own: 0, served: READS };
    ConnectParams { reads, ..connect_params(private_data, 1, WORD_BYTES) }
}

/// The same for the destination, which accepts and reads.
pub(crate) fn reading_params(private_data: Vec<u8>) -> ConnectParams {
    let reads = ReadDepth { own: READS, served: 0 };
    ConnectParams { reads, ..connect_params(private_data, 1, WORD_BYTES) }
}

/// What a write was for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WriteNote {
    pub(crate) span: Option<SpanId>,
    pub(crate) block: u32,
    pub(crate) chunk: u64,
    pub(crate) ticket: u64,
}

#[derive(Debug)]
struct Flight {
    id: u64,
    note: Option<WriteNote>,
    posted_at: Option<Instant>,
}

pub(crate) struct Channel {
    endpoint: Box<dyn Endpoint>,
    next_id: u64,
    chain: Vec<WriteRequest>,
    chain_bytes: u64,
    flights: VecDeque<Flight>,
    sends_out: usize,
    probe: Option<u64>,
    received_at: Instant,
    /// When the last message was sent.
    last_sent_at: Instant,
    /// When the clock was last read.
    clock_read_at: Instant,
    inbox: VecDeque<usize>,
    scratch: Vec<Completion>,
    /// Writes that took effect, for the owner to collect.
    pub(crate) retired: Vec<WriteNote>,
    pub(crate) latencies: Option<Vec<Duration>>,
    pub(crate) counters: Counters,
    broken: bool,
    disconnect_sent: bool,
}

impl Channel {
    pub(crate) fn new(endpoint: Box<dyn Endpoint>) -> Self {
        let received_at = endpoint.now();
        Self {
            endpoint,
            next_id: 0,
            chain: Vec::new(),
            chain_bytes: 0,
            flights: VecDeque::new(),
            sends_out: 0,
            probe: None,
            received_at,
            last_sent_at: received_at,
            clock_read_at: received_at,
            inbox: VecDeque::new(),
            scratch: Vec::new(),
            retired: Vec::new(),
            latencies: None,
            counters: Counters::default(),
            broken: false,
            disconnect_sent: false,
        }
    }

    pub(crate) fn endpoint(&self) -> &dyn Endpoint {
        self.endpoint.as_ref()
    }

    pub(crate) fn now(&self) -> Instant {
        self.endpoint.now()
    }

    /// Requests that may still be posted.
    pub(crate) fn room(&self) -> usize {
        self.endpoint.limits().send_depth.saturating_sub(self.flights.len() + self.chain.len() + 1)
    }

    /// True if every posted request has completed.
    pub(crate) fn is_idle(&self) -> bool {
        self.flights.is_empty() && self.chain.is_empty()
    }

    /// Oldest save whose bytes have not taken effect; `None` if all have.
    pub(crate) fn oldest_ticket(&self) -> Option<u64> {
        self.flights.iter().find_map(|flight| flight.note.map(|note| note.ticket))
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Adds a write to the chain; the caller has checked that there is [`room`](Self::room).
    pub(crate) fn write(&mut self, mut request: WriteRequest, note: WriteNote) -> Result<(), HooksError> {
        request.id = self.id();
        request.signalled = false;
        let posted_at = self.latencies.as_ref().map(|_| self.endpoint.now());
        self.flights.push_back(Flight { id: request.id, note: Some(note), posted_at });
        self.chain.push(request);
        self.chain_bytes += u64::from(request.len);
        self.counters.writes_posted += 1;
        self.counters.bytes_written += u64::from(request.len);
        if self.chain.len() >= CHAIN_WRITES || self.chain_bytes >= CHAIN_BYTES { self.ring() } else { Ok(()) }
    }

    /// Posts the chain.
    pub(crate) fn ring(&mut self) -> Result<(), HooksError> {
        let Some(last) = self.chain.last_mut() else { return Ok(()) };
        last.signalled = true;
        let posted = self.endpoint.post_writes(&self.chain);
        self.chain.clear();
        self.chain_bytes = 0;
        self.counters.writes_signalled += 1;
        self.counters.doorbells += 1;
        posted.map_err(|error| self.fail(error))
    }

    /// True if a message can be posted without waiting.
    pub(crate) fn can_send_now(&self) -> bool {
        self.room() > 0 && self.sends_out < SENDS_OUT
    }

    /// Sends a message, after all writes; waits for room in the queue, not for the completion.
    pub(crate) fn send(&mut self, parts: &[&[u8]], stop: &Stop) -> Result<(), HooksError> {
        self.ring()?;
        self.wait_for(stop, |channel| Ok(channel.can_send_now().then_some(())))?;
        let id = self.id();
        self.flights.push_back(Flight { id, note: None, posted_at: None });
        self.sends_out += 1;
        self.last_sent_at = self.endpoint.now();
        self.counters.messages_sent += 1;
        self.counters.doorbells += 1;
        self.endpoint.post_send(id, parts).map_err(|error| self.fail(error))
    }

    /// Processes completions and received messages; true if there were any.
    pub(crate) fn pump(&mut self) -> Result<bool, HooksError> {
        let mut done = std::mem::take(&mut self.scratch);
        let polled = self.endpoint.poll(&mut done);
        self.counters.polls += 1;
        let any = !done.is_empty();
        if any {
            self.received_at = self.endpoint.now();
            self.clock_read_at = self.received_at;
        }
        let mut failure = polled.err();
        for completion in done.drain(..) {
            match completion {
                Completion::Done { id } => self.retire(id),
                Completion::Received { slot } => self.inbox.push_back(slot),
                // After any failure the receives are flushed: their errors carry no information of their own.
                Completion::Failed {
                    operation: Operation::Receive,
                    status: CompletionStatus::Flushed,
                    ..
                } => {}
                Completion::Failed { operation, status, vendor } => {
                    failure.get_or_insert(FabricError::Completion { operation, status, vendor });
                }
            }
        }
        self.scratch = done;
        match failure {
            Some(error) => {
                let error = self.blame_link(error);
                Err(self.fail(error))
            }
            None => Ok(any),
        }
    }

    /// If the link went down, reports that instead of the failed request.
    fn blame_link(&mut self, error: FabricError) -> FabricError {
        match (&error, self.endpoint.link()) {
            (
                FabricError::Completion { status: CompletionStatus::Flushed, .. },
                Ok(LinkState::Disconnected),
            ) => FabricError::Disconnected,
            (FabricError::Completion { .. }, Ok(LinkState::DeviceRemoved)) => FabricError::DeviceRemoved,
            _ => error,
        }
    }

    fn retire(&mut self, id: u64) {
        let now = self.latencies.is_some().then(|| self.endpoint.now());
        while self.flights.front().is_some_and(|flight| flight.id <= id) {
            let Some(flight) = self.flights.pop_front() else { break };
            match flight.note {
                Some(note) => self.retired.push(note),
                None if self.probe == Some(flight.id) => self.probe = None,
                None => self.sends_out -= 1,
            }
            // Only a signalled write has a completion of its own, so only its time is known.
            if let (true, Some(list), Some(now), Some(posted)) =
                (flight.id == id, &mut self.latencies, now, flight.posted_at)
                && list.len() < MAX_LATENCIES
            {
                list.push(now.saturating_duration_since(posted));
            }
        }
    }

    /// The oldest message that has arrived: its buffer, to be read and reposted.
    pub(crate) fn take_arrived(&mut self) -> Option<usize> {
        let slot = self.inbox.pop_front()?;
        self.counters.messages_received += 1;
        Some(slot)
    }

    pub(crate) fn has_arrived(&self) -> bool {
        !self.inbox.is_empty()
    }

    pub(crate) fn received(&self, slot: usize) -> &[u8] {
        self.endpoint.received(slot)
    }

    pub(crate) fn repost(&mut self, slot: usize) -> Result<(), HooksError> {
        self.endpoint.repost(slot).map_err(|error| self.fail(error))
    }

    /// Pumps until `ready` has an answer.
    pub(crate) fn wait_for<T>(
        &mut self,
        stop: &Stop,
        mut ready: impl FnMut(&mut Self) -> Result<Option<T>, HooksError>,
    ) -> Result<T, HooksError> {
        loop {
            let news = self.pump()?;
            if let Some(answer) = ready(self)? {
                return Ok(answer);
            }
            if !news {
                self.rest(stop)?;
            }
        }
    }

    /// When this end last read the clock; does not read it again.
    pub(crate) fn clock_read_at(&self) -> Instant {
        self.clock_read_at
    }

    pub(crate) fn read_clock(&mut self) {
        self.clock_read_at = self.endpoint.now();
    }

    /// When the last message was sent.
    pub(crate) fn last_sent_at(&self) -> Instant {
        self.last_sent_at
    }

    /// Processes completions of a queue pair that no caller is waiting on. It is no failure if the peer has closed an
    /// unused one: a destination that has received everything closes them all.
    pub(crate) fn pump_data(&mut self) -> Result<bool, HooksError> {
        match self.pump() {
            Err(HooksError::Fabric(FabricError::Disconnected)) if self.oldest_ticket().is_none() => Ok(false),
            pumped => pumped,
        }
    }

    /// Polls a queue pair that no caller is waiting on, and probes a quiet peer.
    pub(crate) fn watch(&mut self, now: Instant) -> Result<(), HooksError> {
        self.pump_data()?;
        if self.broken { Ok(()) } else { self.probe_quiet_peer(now) }
    }

    /// Sleeps briefly, unless the link is down or the wait is over.
    pub(crate) fn rest(&mut self, stop: &Stop) -> Result<(), HooksError> {
        self.ring()?;
        let link = self.endpoint.link().map_err(|error| self.fail(error))?;
        if link != LinkState::Up {
            // Messages that arrived before the link went down can still be read: poll once more before failing.
            if self.pump()? {
                return Ok(());
            }
            return Err(self.fail(match link {
                LinkState::DeviceRemoved => FabricError::DeviceRemoved,
                LinkState::Up | LinkState::Disconnected => FabricError::Disconnected,
            }));
        }
        let now = self.endpoint.now();
        self.clock_read_at = now;
        stop.check(now)?;
        self.probe_quiet_peer(now)?;
        self.counters.waits += 1;
        self.endpoint.wait(stop.slice(now)).map_err(|error| self.fail(error))
    }

    /// The peer's NIC acknowledges a write without bytes, whatever the peer's software does. If the peer is gone, the
    /// write fails after the transport's retries, so an idle wait ends.
    fn probe_quiet_peer(&mut self, now: Instant) -> Result<(), HooksError> {
        let quiet = now.saturating_duration_since(self.received_at) >= PROBE_EVERY;
        if !quiet || !self.flights.is_empty() || self.room() == 0 {
            return Ok(());
        }
        let id = self.id();
        self.probe = Some(id);
        self.flights.push_back(Flight { id, note: None, posted_at: None });
        self.counters.probes += 1;
        let probe = WriteRequest { id, lkey: 0, from: 0, len: 0, rkey: 0, to: 0, signalled: true };
        self.endpoint.post_writes(&[probe]).map_err(|error| self.fail(error))
    }

    fn fail(&mut self, error: FabricError) -> HooksError {
        self.broken = true;
        error.into()
    }

    /// Sends ERROR to the peer, waits at most [`FAREWELL`] for it to leave, and disconnects.
    pub(crate) fn abort(&mut self) {
        if !std::mem::replace(&mut self.disconnect_sent, true) {
            let link_up = matches!(self.endpoint.link(), Ok(LinkState::Up));
            if !self.broken && link_up && self.room() > 0 {
                let id = self.id();
                let stop = Stop::default().within(self.now(), FAREWELL);
                let said = self.endpoint.post_send(id, &[&header(Kind::Error, 0, 1)]).is_ok();
                self.flights.push_back(Flight { id, note: None, posted_at: None });
                self.sends_out += 1;
                if said {
                    let _ = self.wait_for(&stop, |channel| Ok(channel.is_idle().then_some(())));
                }
            }
            self.endpoint.disconnect();
        }
    }

    /// Disconnects in peace.
    pub(crate) fn leave(&mut self) {
        self.disconnect_sent = true;
        self.endpoint.disconnect();
    }

    /// Waits until the peer disconnects, at most until `stop`; then disconnects too. True if the peer disconnected.
    pub(crate) fn part(&mut self, stop: &Stop) -> Result<bool, HooksError> {
        self.disconnect_sent = true;
        let parted = loop {
            // The peer may disconnect before it acknowledges our last message: it has what it needs.
            match self.rest(stop).and_then(|()| self.pump()) {
                Ok(_) => {}
                Err(HooksError::Fabric(FabricError::Disconnected)) => break true,
                Err(HooksError::Stopped(Stopped::Deadline)) => break false,
                Err(error) => {
                    self.endpoint.disconnect();
                    return Err(error);
                }
            }
        };
        self.endpoint.disconnect();
        Ok(parted)
    }
}

/// Maximum number of messages without completion; the endpoint has a buffer for each.
pub(crate) const SENDS_OUT: usize = 4;

impl Drop for Channel {
    fn drop(&mut self) {
        self.abort();
    }
}
