//! One end of a connected queue pair, with its message buffers.

use std::collections::VecDeque;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_sys::{
    bind_mw_tso_union_t, ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wc, ibv_wc_status, ibv_wr_opcode,
    imm_data_invalidated_rkey_union_t, qp_type_t, rdma_cm_event_type, rdma_t, tso_t, wr_t, xrc_t,
};

use super::cm::{Id, wait_readable};
use super::domain::{Buffer, Domain};
use super::queue::Queue;
use super::{device, reads};
use crate::channel::SENDS_OUT;
use crate::control::{HEADER_BYTES, STREAM_PAYLOAD_BYTES};
use crate::fabric::{
    Access, AddressBase, Completion, CompletionStatus, ConnectParams, Endpoint, FabricError, Limits,
    LinkState, Operation, ReadDepth, ReadRequest, Reads, Registration, WriteRequest,
};
use crate::region::HostRegion;

/// Marks the ids of receive requests.
const RECEIVE: u64 = 1 << 63;
/// Room in a send buffer for what a fabric around this one adds to a message when it encrypts.
const TAG_BYTES: usize = 16;
/// Bytes of a send buffer: a full piece of the stream. Longer messages (large block tables) get one of their own.
const SEND_BYTES: usize = STREAM_PAYLOAD_BYTES + HEADER_BYTES + TAG_BYTES;
/// Send buffers: one more than the maximum number outstanding, for a final ERROR.
const SEND_SLOTS: usize = SENDS_OUT + 1;

/// What a send in flight occupies.
#[derive(Debug)]
enum SendBuffer {
    Inline,
    Slot(usize),
    Own(#[allow(dead_code, reason = "kept until the send completes")] Buffer),
}

/// The receive buffers, in one.
struct Receives {
    buffer: Buffer,
    /// Bytes of each.
    bytes: usize,
    /// Bytes received in each.
    lengths: Vec<usize>,
}

/// A queue pair with everything it needs. Field order is drop order: the queue first, what it uses later.
pub(super) struct VerbsEndpoint {
    queue: Queue,
    receives: Receives,
    sends: Buffer,
    free_sends: Vec<usize>,
    sending: VecDeque<(u64, SendBuffer)>,
    pub(super) reads: Reads,
    /// Completions found while going to sleep.
    found: Vec<Completion>,
    work: Vec<ibv_wc>,
    link: LinkState,
    pub(super) private_data: Vec<u8>,
    spin: Duration,
}

impl VerbsEndpoint {
    /// Makes the queue pair on `id` and posts all receive buffers. READs are allowed once they are agreed.
    pub(super) fn new(
        id: &Arc<Id>,
        domain: &Arc<Domain>,
        params: &ConnectParams,
        spin: Duration,
    ) -> Result<Self, FabricError> {
        let buffers = params.receives * params.receive_bytes + SEND_SLOTS * SEND_BYTES;
        super::memory_lock::memory_lock().check(buffers as u64)?;
        let queue = Queue::new(id, domain, params.send_depth, params.receives, params.read_pieces)?;
        let read_bytes = match params.reads.own {
            0 => 0,
            _ => u64::from(device::query_port(id.verbs()?, id.port())?.max_msg_sz),
        };
        let receives = Receives {
            buffer: Buffer::new(domain, params.receives * params.receive_bytes)?,
            bytes: params.receive_bytes,
            lengths: vec![0; params.receives],
        };
        let endpoint = Self {
            receives,
            sends: Buffer::new(domain, SEND_SLOTS * SEND_BYTES)?,
            free_sends: (0..SEND_SLOTS).collect(),
            sending: VecDeque::new(),
            reads: Reads::new(ReadDepth::NONE, queue.pieces, read_bytes),
            found: Vec::new(),
            work: Vec::new(),
            link: LinkState::Up,
            private_data: Vec::new(),
            spin,
            queue,
        };
        for slot in 0..params.receives {
            endpoint.post_receive(slot)?;
        }
        Ok(endpoint)
    }

    pub(super) fn id(&self) -> &Id {
        self.queue.id()
    }

    fn post_receive(&self, slot: usize) -> Result<(), FabricError> {
        let Receives { buffer, bytes, .. } = &self.receives;
        let address = buffer.address() + (slot * bytes) as u64;
        self.queue.post_receive(RECEIVE | slot as u64, address, *bytes as u32, buffer.lkey())
    }

    fn free_sends_up_to(&mut self, id: u64) {
        while self.sending.front().is_some_and(|(sent, _)| *sent <= id) {
            if let Some((_, SendBuffer::Slot(slot))) = self.sending.pop_front() {
                self.free_sends.push(slot);
            }
        }
    }

    fn poll_queues(&mut self) -> Result<(), FabricError> {
        let mut work = std::mem::take(&mut self.work);
        let (found, lengths) = (&mut self.found, &mut self.receives.lengths);
        let (sending, reads) = (&self.sending, &self.reads);
        let operation = |id| match sending.iter().any(|(sent, _)| *sent == id) {
            true => Operation::Send,
            false if reads.contains(id) => Operation::Read,
            false => Operation::Write,
        };
        let polled = self.queue.poll(&mut work, |wc| found.push(translate(wc, lengths, operation)));
        self.work = work;
        polled
    }

    fn take_cm_events(&mut self) -> Result<(), FabricError> {
        while let Some(event) = self.id().next_event()? {
            match event.kind {
                rdma_cm_event_type::RDMA_CM_EVENT_DISCONNECTED if self.link == LinkState::Up => {
                    self.link = LinkState::Disconnected;
                }
                rdma_cm_event_type::RDMA_CM_EVENT_DEVICE_REMOVAL => self.link = LinkState::DeviceRemoved,
                _ => {}
            }
        }
        Ok(())
    }
}

/// `operation` says what a request of the send queue is.
fn translate(wc: &ibv_wc, received: &mut [usize], operation: impl Fn(u64) -> Operation) -> Completion {
    let slot = (wc.wr_id & !RECEIVE) as usize;
    let is_receive = wc.wr_id & RECEIVE != 0;
    if wc.status == ibv_wc_status::IBV_WC_SUCCESS {
        return if is_receive {
            if let Some(len) = received.get_mut(slot) {
                *len = wc.byte_len as usize;
            }
            Completion::Received { slot }
        } else {
            Completion::Done { id: wc.wr_id }
        };
    }
    let operation = if is_receive { Operation::Receive } else { operation(wc.wr_id) };
    Completion::Failed { operation, status: status(wc.status), vendor: wc.vendor_err }
}

pub(super) fn status(number: ibv_wc_status::Type) -> CompletionStatus {
    match number {
        ibv_wc_status::IBV_WC_LOC_LEN_ERR => CompletionStatus::LocalLength,
        ibv_wc_status::IBV_WC_LOC_QP_OP_ERR => CompletionStatus::LocalQueuePair,
        ibv_wc_status::IBV_WC_LOC_PROT_ERR => CompletionStatus::LocalProtection,
        ibv_wc_status::IBV_WC_WR_FLUSH_ERR => CompletionStatus::Flushed,
        ibv_wc_status::IBV_WC_REM_INV_REQ_ERR => CompletionStatus::RemoteInvalid,
        ibv_wc_status::IBV_WC_REM_ACCESS_ERR => CompletionStatus::RemoteAccess,
        ibv_wc_status::IBV_WC_REM_OP_ERR => CompletionStatus::RemoteOperation,
        ibv_wc_status::IBV_WC_RETRY_EXC_ERR => CompletionStatus::RetryExceeded,
        ibv_wc_status::IBV_WC_RNR_RETRY_EXC_ERR => CompletionStatus::ReceiverNotReady,
        ibv_wc_status::IBV_WC_FATAL_ERR => CompletionStatus::Fatal,
        other => CompletionStatus::Other(other),
    }
}

/// A request with nothing but its id; the caller fills in what it does.
pub(super) fn blank_request(wr_id: u64, opcode: ibv_wr_opcode::Type) -> ibv_send_wr {
    ibv_send_wr {
        wr_id,
        next: ptr::null_mut(),
        sg_list: ptr::null_mut(),
        num_sge: 0,
        opcode,
        send_flags: 0,
        imm_data_invalidated_rkey_union: imm_data_invalidated_rkey_union_t { imm_data: 0 },
        wr: wr_t { rdma: rdma_t { remote_addr: 0, rkey: 0 } },
        qp_type: qp_type_t { xrc: xrc_t { remote_srqn: 0 } },
        bind_mw_tso_union: bind_mw_tso_union_t { tso: tso_t { hdr: ptr::null_mut(), hdr_sz: 0, mss: 0 } },
    }
}

impl Endpoint for VerbsEndpoint {
    fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    fn limits(&self) -> Limits {
        Limits {
            send_depth: self.queue.send_depth,
            inline_bytes: self.queue.inline_bytes,
            max_registration_bytes: self.queue.domain.max_registration_bytes,
            on_demand: self.queue.domain.on_demand,
            reads: self.reads.depth,
            read_pieces: self.reads.pieces,
            read_bytes: self.reads.bytes,
        }
    }

    fn now(&self) -> Instant {
        Instant::now()
    }

    fn check_memory_lock(&self, bytes: u64) -> Result<(), FabricError> {
        super::memory_lock::memory_lock().check(bytes)
    }

    fn register(
        &self,
        region: &HostRegion,
        access: &[Access],
        base: AddressBase,
    ) -> Result<Registration, FabricError> {
        self.queue.domain.register(region, access, base)
    }

    fn post_writes(&mut self, chain: &[WriteRequest]) -> Result<(), FabricError> {
        let mut lists: Vec<ibv_sge> = chain
            .iter()
            .map(|write| ibv_sge { addr: write.from, length: write.len, lkey: write.lkey })
            .collect();
        let mut requests: Vec<ibv_send_wr> = chain
            .iter()
            .zip(&mut lists)
            .map(|(write, list)| {
                let mut request = blank_request(write.id, ibv_wr_opcode::IBV_WR_RDMA_WRITE);
                request.wr = wr_t { rdma: rdma_t { remote_addr: write.to, rkey: write.rkey } };
                if write.signalled {
                    request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
                }
                if write.len > 0 {
                    (request.sg_list, request.num_sge) = (list, 1);
                }
                request
            })
            .collect();
        let mut next: *mut ibv_send_wr = ptr::null_mut();
        for request in requests.iter_mut().rev() {
            request.next = next;
            next = request;
        }
        match requests.first_mut() {
            // SAFETY: the requests are linked among themselves and to `lists`; both vectors stay where they are until
            // the call returns.
            Some(first) => unsafe { self.queue.post_send(first) },
            None => Ok(()),
        }
    }

    fn post_reads(&mut self, chain: &[ReadRequest<'_>]) -> Result<(), FabricError> {
        self.reads.check(chain)?;
        reads::post(&self.queue, chain)?;
        self.reads.posted(chain);
        Ok(())
    }

    fn post_send(&mut self, id: u64, parts: &[&[u8]]) -> Result<(), FabricError> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let mut request = blank_request(id, ibv_wr_opcode::IBV_WR_SEND);
        request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        let mut list = ibv_sge { addr: 0, length: len as u32, lkey: 0 };
        let gathered;
        let occupied = if len <= self.queue.inline_bytes {
            gathered = parts.concat();
            list.addr = gathered.as_ptr() as u64;
            request.send_flags |= ibv_send_flags::IBV_SEND_INLINE.0;
            SendBuffer::Inline
        } else if len <= SEND_BYTES {
            let slot = self.free_sends.pop().ok_or(FabricError::QueueFull)?;
            // SAFETY: a slot on the free list is used by no posted request.
            unsafe { self.sends.fill(slot * SEND_BYTES, parts) };
            (list.addr, list.lkey) = (self.sends.address() + (slot * SEND_BYTES) as u64, self.sends.lkey());
            SendBuffer::Slot(slot)
        } else {
            let mut buffer = Buffer::new(&self.queue.domain, len)?;
            // SAFETY: nothing is posted on a new buffer.
            unsafe { buffer.fill(0, parts) };
            (list.addr, list.lkey) = (buffer.address(), buffer.lkey());
            SendBuffer::Own(buffer)
        };
        (request.sg_list, request.num_sge) = (&mut list, 1);
        self.sending.push_back((id, occupied));
        // SAFETY: request, list and inline bytes outlive the call; the send buffer is kept in `sending`.
        unsafe { self.queue.post_send(&mut request) }
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), FabricError> {
        self.poll_queues()?;
        let done = self.found.iter().filter_map(|found| match found {
            Completion::Done { id } => Some(*id),
            _ => None,
        });
        if let Some(last) = done.max() {
            self.free_sends_up_to(last);
        }
        self.reads.completed(&self.found);
        out.append(&mut self.found);
        Ok(())
    }

    fn received(&self, slot: usize) -> &[u8] {
        let Receives { buffer, bytes, lengths } = &self.receives;
        let Some(&len) = lengths.get(slot) else { return &[] };
        // SAFETY: the owner reads a slot only between its completion and its repost, when it is not posted: `repost`
        // takes `&mut self`, so the result is gone by then.
        unsafe { buffer.bytes(slot * bytes, len.min(*bytes)) }
    }

    fn repost(&mut self, slot: usize) -> Result<(), FabricError> {
        if let Some(len) = self.receives.lengths.get_mut(slot) {
            *len = 0;
            self.post_receive(slot)?;
        }
        Ok(())
    }

    fn wait(&mut self, at_most: Duration) -> Result<(), FabricError> {
        if self.look(self.spin)? {
            return Ok(());
        }
        self.queue.arm()?;
        // Completions from before the queues were armed raise no event.
        self.poll_queues()?;
        if !self.found.is_empty() {
            return Ok(());
        }
        let [completed, _] = wait_readable(&[self.queue.fd(), self.id().fd()], at_most)?;
        if completed {
            self.queue.take_events();
        }
        Ok(())
    }

    fn look(&mut self, at_most: Duration) -> Result<bool, FabricError> {
        let start = Instant::now();
        loop {
            self.poll_queues()?;
            if !self.found.is_empty() {
                return Ok(true);
            }
            if start.elapsed() >= at_most {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    /// The packet sequence number that is expected next: acknowledgements of this end's sends and probes do not change
    /// it.
    fn received_mark(&self) -> Option<u64> {
        self.queue.expected_packet().map(u64::from)
    }

    fn link(&mut self) -> Result<LinkState, FabricError> {
        self.take_cm_events()?;
        Ok(self.link)
    }

    fn disconnect(&mut self) {
        self.id().disconnect();
    }
}

impl Drop for VerbsEndpoint {
    fn drop(&mut self) {
        self.disconnect();
    }
}
