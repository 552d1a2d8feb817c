//! Queue pairs with their completion queues.

use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rdma_sys::{
    ibv_ack_cq_events, ibv_comp_channel, ibv_cq, ibv_create_comp_channel, ibv_create_cq,
    ibv_destroy_comp_channel, ibv_destroy_cq, ibv_get_cq_event, ibv_poll_cq, ibv_post_recv, ibv_post_send,
    ibv_qp, ibv_qp_attr, ibv_qp_attr_mask, ibv_qp_init_attr, ibv_qp_type, ibv_query_qp, ibv_recv_wr,
    ibv_req_notify_cq, ibv_send_wr, ibv_sge, ibv_wc, rdma_create_qp, rdma_destroy_qp,
};

use super::call::{check, check_ptr};
use super::cm::{Id, set_nonblocking};
use super::domain::Domain;
use crate::fabric::FabricError;

/// Requested inline capacity in bytes: enough for a control message, too little for stream bytes.
pub(super) const INLINE_BYTES: u32 = 220;
/// Completions taken at a time.
pub(super) const BATCH: usize = 32;

/// A channel for completion events.
#[derive(Debug)]
struct CompletionChannel(NonNull<ibv_comp_channel>);

impl Drop for CompletionChannel {
    fn drop(&mut self) {
        // SAFETY: made by us, destroyed once, after its completion queues (field order in `Queue`).
        let _ = unsafe { ibv_destroy_comp_channel(self.0.as_ptr()) };
    }
}

/// A completion queue.
#[derive(Debug)]
struct CompletionQueue {
    cq: NonNull<ibv_cq>,
    armed: bool,
}

impl CompletionQueue {
    fn new(id: &Id, channel: &CompletionChannel, depth: usize) -> Result<Self, FabricError> {
        let context = id.verbs()?;
        let depth = i32::try_from(depth).unwrap_or(i32::MAX);
        // SAFETY: context and channel are alive; the queue is destroyed in `Drop`, before the channel.
        let cq = unsafe { ibv_create_cq(context.as_ptr(), depth, ptr::null_mut(), channel.0.as_ptr(), 0) };
        Ok(Self { cq: check_ptr(cq, "ibv_create_cq")?, armed: false })
    }

    fn poll(&self, into: &mut Vec<ibv_wc>) -> Result<(), FabricError> {
        into.clear();
        into.reserve(BATCH);
        // SAFETY: the queue is alive; `into` has room for BATCH entries.
        let count = unsafe { ibv_poll_cq(self.cq.as_ptr(), BATCH as i32, into.as_mut_ptr()) };
        let filled = usize::try_from(count).map_err(|_| FabricError::Verb {
            verb: "ibv_poll_cq",
            remedy: "the device is broken",
            source: std::io::Error::from_raw_os_error(libc::EIO),
        })?;
        // SAFETY: the library filled `filled` entries, at most BATCH.
        unsafe { into.set_len(filled.min(BATCH)) };
        Ok(())
    }

    fn arm(&mut self) -> Result<(), FabricError> {
        if !self.armed {
            // SAFETY: the queue is alive.
            check(unsafe { ibv_req_notify_cq(self.cq.as_ptr(), 0) }, "ibv_req_notify_cq")?;
            self.armed = true;
        }
        Ok(())
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: made by us, destroyed once, after its queue pair; every event was acknowledged when it was read, so
        // this does not block.
        let _ = unsafe { ibv_destroy_cq(self.cq.as_ptr()) };
    }
}

/// Destroys an id's queue pair when dropped.
#[derive(Debug)]
struct QueuePair(Arc<Id>);

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: made on this id by rdma_create_qp, destroyed once, before its completion queues (field order).
        unsafe { rdma_destroy_qp(self.0.as_ptr()) }
    }
}

/// A reliable queue pair on a connection manager id.
#[derive(Debug)]
pub(super) struct Queue {
    pair: QueuePair,
    send: CompletionQueue,
    receive: CompletionQueue,
    channel: CompletionChannel,
    pub(super) domain: Arc<Domain>,
    pub(super) send_depth: usize,
    pub(super) inline_bytes: usize,
    /// Entries of a request's scatter list, at most.
    pub(super) pieces: usize,
}

// SAFETY: libibverbs locks its objects; the pointers are owned.
unsafe impl Send for Queue {}

impl Queue {
    pub(super) fn new(
        id: &Arc<Id>,
        domain: &Arc<Domain>,
        send_depth: usize,
        receives: usize,
        pieces: usize,
    ) -> Result<Self, FabricError> {
        let context = id.verbs()?;
        // SAFETY: the context is open as long as `id` lives; destroyed in `Drop`.
        let channel = unsafe { ibv_create_comp_channel(context.as_ptr()) };
        let channel = CompletionChannel(check_ptr(channel, "ibv_create_comp_channel")?);
        // SAFETY: the channel is alive.
        set_nonblocking(unsafe { channel.0.as_ref().fd })?;
        let send_depth = send_depth.min(domain.max_requests);
        let pieces = pieces.min(domain.read_pieces).max(1);
        let send = CompletionQueue::new(id, &channel, send_depth + 1)?;
        let receive = CompletionQueue::new(id, &channel, receives + 1)?;
        let mut attr = ibv_qp_init_attr {
            qp_context: ptr::null_mut(),
            send_cq: send.cq.as_ptr(),
            recv_cq: receive.cq.as_ptr(),
            srq: ptr::null_mut(),
            cap: rdma_sys::ibv_qp_cap {
                max_send_wr: send_depth as u32,
                max_recv_wr: receives as u32,
                max_send_sge: pieces as u32,
                max_recv_sge: 1,
                max_inline_data: INLINE_BYTES,
            },
            qp_type: ibv_qp_type::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: id and domain are alive and on the same device; `attr` outlives the calls; the queue pair is
        // destroyed by `QueuePair`. A device that takes no inline data is asked again without.
        let inline_bytes = unsafe {
            if check(rdma_create_qp(id.as_ptr(), domain.as_ptr(), &mut attr), "rdma_create_qp").is_ok() {
                attr.cap.max_inline_data as usize
            } else {
                attr.cap.max_inline_data = 0;
                check(rdma_create_qp(id.as_ptr(), domain.as_ptr(), &mut attr), "rdma_create_qp")?;
                0
            }
        };
        let pair = QueuePair(Arc::clone(id));
        let domain = Arc::clone(domain);
        Ok(Self { pair, send, receive, channel, domain, send_depth, inline_bytes, pieces })
    }

    pub(super) fn id(&self) -> &Id {
        &self.pair.0
    }

    fn qp(&self) -> *mut ibv_qp {
        // SAFETY: the id is alive, and has its queue pair until `QueuePair` drops.
        unsafe { (*self.pair.0.as_ptr()).qp }
    }

    /// Sequence number of the packet that is due from the peer, 24 bits (`ibv_query_qp(3)`). Not every device keeps it
    /// up to date.
    pub(super) fn expected_packet(&self) -> Option<u32> {
        // SAFETY: both are plain numbers and pointers that may be null, for which zeros are valid.
        let (mut attr, mut init): (ibv_qp_attr, ibv_qp_init_attr) = unsafe { std::mem::zeroed() };
        let wanted = ibv_qp_attr_mask::IBV_QP_RQ_PSN.0 as i32;
        // SAFETY: the queue pair is alive; both arguments outlive the call.
        let asked = unsafe { ibv_query_qp(self.qp(), &mut attr, wanted, &mut init) };
        (asked == 0).then_some(attr.rq_psn)
    }

    /// Posts a chain of requests that are linked by `next`, with one doorbell.
    ///
    /// # Safety
    ///
    /// The requests and what they point to (`next`, `sg_list`) are valid for the call. Buffers named in scatter lists
    /// are checked by the device against their keys, not here; inline data is read during the call.
    pub(super) unsafe fn post_send(&self, first: &mut ibv_send_wr) -> Result<(), FabricError> {
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive; the caller's promise for the requests.
        let posted = unsafe { ibv_post_send(self.qp(), first, &mut bad) };
        if posted == libc::ENOMEM { Err(FabricError::QueueFull) } else { check(posted, "ibv_post_send") }
    }

    /// Posts a receive buffer.
    pub(super) fn post_receive(
        &self,
        wr_id: u64,
        address: u64,
        len: u32,
        lkey: u32,
    ) -> Result<(), FabricError> {
        let mut sge = ibv_sge { addr: address, length: len, lkey };
        let mut request = ibv_recv_wr { wr_id, next: ptr::null_mut(), sg_list: &mut sge, num_sge: 1 };
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is alive; request and list outlive the call; the device checks the key.
        check(unsafe { ibv_post_recv(self.qp(), &mut request, &mut bad) }, "ibv_post_recv")
    }

    /// Takes completions of both queues, at most [`BATCH`] of each, receives first: they explain failed sends.
    pub(super) fn poll(
        &self,
        work: &mut Vec<ibv_wc>,
        mut each: impl FnMut(&ibv_wc),
    ) -> Result<(), FabricError> {
        for queue in [&self.receive, &self.send] {
            queue.poll(work)?;
            work.iter().for_each(&mut each);
        }
        Ok(())
    }

    /// Asks for an event at the next completion. Completions from before must be polled after this call.
    pub(super) fn arm(&mut self) -> Result<(), FabricError> {
        self.send.arm()?;
        self.receive.arm()
    }

    /// Readable when an event is there.
    pub(super) fn fd(&self) -> RawFd {
        // SAFETY: the channel is alive.
        unsafe { self.channel.0.as_ref().fd }
    }

    /// Takes the events that are there.
    pub(super) fn take_events(&mut self) {
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel is alive and does not block; each event is acknowledged at once.
        while unsafe { ibv_get_cq_event(self.channel.0.as_ptr(), &mut cq, &mut context) } == 0 {
            // SAFETY: `cq` is one of our two queues, which are alive.
            unsafe { ibv_ack_cq_events(cq, 1) };
            for queue in [&mut self.send, &mut self.receive] {
                queue.armed &= queue.cq.as_ptr() != cq;
            }
        }
    }
}
