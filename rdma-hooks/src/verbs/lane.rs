//! A connected queue pair with one registered buffer at each end, to measure a device with.
//!
//! The migration's own [`Endpoint`](crate::fabric::Endpoint) is made for guest memory, and its waits sleep. A measurement needs the bare verbs: WRITE, READ and SEND between two buffers, completions by polling,
//! and a read of a byte that the peer's NIC writes. A lane offers only these. Both ends trust each other: each may read
//! and write all of the other's buffer.
//!
//! # Source
//!
//! Manual pages `ibv_post_send(3)`, `ibv_poll_cq(3)`, `rdma_connect(3)`.

use std::ptr;
use std::sync::Arc;

use rdma_sys::{
    ibv_access_flags, ibv_send_flags, ibv_sge, ibv_wc_status, ibv_wr_opcode, rdma_accept, rdma_cm_event_type,
    rdma_connect, rdma_t, wr_t,
};

use super::call::{check, check_ptr};
use super::cm::{Event, Id};
use super::domain::{Buffer, Domain};
use super::endpoint::{blank_request, status};
use super::fabric::{conn_param, no_address, resolve_name};
use super::queue::Queue;
use crate::fabric::{ConnectParams, FabricError, Operation, ReadDepth};
use crate::stop::Stop;

/// Maximum number of READs of one end in flight.
const READS: u8 = 16;
/// Marks the ids of receive requests.
const RECEIVE: u64 = 1 << 63;
/// Bytes that describe a buffer to the peer: address, key, length.
const DESCRIPTION: usize = 20;

/// Parameters of a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneParams {
    /// Bytes of the buffer.
    pub bytes: usize,
    /// Maximum number of requests outstanding.
    pub depth: usize,
    /// Receives that may be posted at a time.
    pub receives: usize,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneOp {
    /// RDMA WRITE of own bytes into the peer's buffer.
    Write,
    /// RDMA READ of the peer's bytes into the own buffer.
    Read,
    /// A message into the peer's next receive.
    Send,
}

/// Completed requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Polled {
    /// Requests.
    pub requests: usize,
    /// Messages received.
    pub received: usize,
}

/// The peer's buffer.
#[derive(Clone, Copy, Debug)]
struct PeerBuffer {
    address: u64,
    rkey: u32,
    bytes: u64,
}

/// One end. Dropping it disconnects. Field order is drop order: the queue first, what it uses later.
pub struct Lane {
    queue: Queue,
    buffer: Buffer,
    bytes: usize,
    peer: PeerBuffer,
    work: Vec<rdma_sys::ibv_wc>,
}

impl Lane {
    /// Connects to a [`LaneListener`].
    ///
    /// # Errors
    ///
    /// The reason why the connection could not be made, with the step's name.
    pub fn connect(host: &str, port: u16, params: &LaneParams, stop: &Stop) -> Result<Self, FabricError> {
        let mut last = None;
        for address in resolve_name(host, port, stop)? {
            let id = Arc::new(Id::new()?);
            if let Err(error) = id.resolve(address, stop) {
                last = Some(error);
                continue;
            }
            let (queue, buffer) = Self::make(&id, params)?;
            let with = connect_params(&buffer, params);
            let mut conn = conn_param(&with, ReadDepth { own: READS, served: 0 });
            // SAFETY: the id is alive and has its route and queue pair; `conn` and the private data outlive the call.
            check(unsafe { rdma_connect(id.as_ptr(), &mut conn) }, "rdma_connect")?;
            let event = id.wait_for(rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED, stop)?;
            return Self::with_peer(queue, buffer, params, &event);
        }
        Err(last.unwrap_or_else(|| no_address(std::io::ErrorKind::NotFound.into())))
    }

    fn make(id: &Arc<Id>, params: &LaneParams) -> Result<(Queue, Buffer), FabricError> {
        let domain = Arc::new(Domain::new(id)?);
        let queue = Queue::new(id, &domain, params.depth, params.receives, 1)?;
        let flags = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0
            | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0
            | ibv_access_flags::IBV_ACCESS_REMOTE_READ.0;
        Ok((queue, Buffer::with_access(&domain, params.bytes, flags)?))
    }

    fn with_peer(
        queue: Queue,
        buffer: Buffer,
        params: &LaneParams,
        event: &Event,
    ) -> Result<Self, FabricError> {
        let peer = parse(&event.private_data).ok_or(FabricError::Event {
            wanted: "a description of the peer's buffer",
            got: "something else",
            status: event.status,
            remedy: "the other end must be the same program",
        })?;
        Ok(Self { queue, buffer, bytes: params.bytes, peer, work: Vec::new() })
    }

    /// Posts one signalled request: `len` bytes between `at` in the own buffer and `there` in the peer's.
    ///
    /// # Errors
    ///
    /// [`FabricError::QueueFull`], [`FabricError::Verb`].
    ///
    /// # Panics
    ///
    /// If the bytes are not inside both buffers: that is an error of the caller.
    pub fn post(&mut self, op: LaneOp, at: usize, there: usize, len: usize) -> Result<(), FabricError> {
        self.assert_inside(at, len);
        let end = there as u64 + len as u64;
        assert!(op == LaneOp::Send || end <= self.peer.bytes, "inside the peer's buffer");
        let opcode = match op {
            LaneOp::Write => ibv_wr_opcode::IBV_WR_RDMA_WRITE,
            LaneOp::Read => ibv_wr_opcode::IBV_WR_RDMA_READ,
            LaneOp::Send => ibv_wr_opcode::IBV_WR_SEND,
        };
        let address = self.buffer.address() + at as u64;
        let mut list = ibv_sge { addr: address, length: len as u32, lkey: self.buffer.lkey() };
        let mut request = blank_request(op as u64, opcode);
        request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        if op != LaneOp::Read && len <= self.queue.inline_bytes {
            request.send_flags |= ibv_send_flags::IBV_SEND_INLINE.0;
        }
        request.wr =
            wr_t { rdma: rdma_t { remote_addr: self.peer.address + there as u64, rkey: self.peer.rkey } };
        (request.sg_list, request.num_sge) = (&mut list, 1);
        // SAFETY: request and list outlive the call; the bytes are inside the buffer, as asserted, which lives longer
        // than the queue (field order). There is no reference into it, so the device may write to it.
        unsafe { self.queue.post_send(&mut request) }
    }

    /// Posts a receive for a message of at most `len` bytes at `at`.
    ///
    /// # Errors
    ///
    /// [`FabricError::Verb`].
    ///
    /// # Panics
    ///
    /// If the bytes are not inside the buffer.
    pub fn post_receive(&mut self, at: usize, len: usize) -> Result<(), FabricError> {
        self.assert_inside(at, len);
        let address = self.buffer.address() + at as u64;
        self.queue.post_receive(RECEIVE, address, len as u32, self.buffer.lkey())
    }

    /// Takes the completions; never waits.
    ///
    /// # Errors
    ///
    /// [`FabricError::Completion`] of the first request that failed.
    pub fn poll(&mut self) -> Result<Polled, FabricError> {
        let mut polled = Polled::default();
        let mut failed = None;
        let mut work = std::mem::take(&mut self.work);
        let taken = self.queue.poll(&mut work, |wc| {
            let is_receive = wc.wr_id & RECEIVE != 0;
            if wc.status != ibv_wc_status::IBV_WC_SUCCESS {
                let operation = match wc.wr_id {
                    _ if is_receive => Operation::Receive,
                    id if id == LaneOp::Send as u64 => Operation::Send,
                    id if id == LaneOp::Read as u64 => Operation::Read,
                    _ => Operation::Write,
                };
                let (status, vendor) = (status(wc.status), wc.vendor_err);
                failed.get_or_insert(FabricError::Completion { operation, status, vendor });
            } else if is_receive {
                polled.received += 1;
            } else {
                polled.requests += 1;
            }
        });
        self.work = work;
        taken?;
        failed.map_or(Ok(polled), Err)
    }

    /// The byte at `at` as it is now; the peer's device may be writing it.
    ///
    /// # Panics
    ///
    /// If it is not inside the buffer.
    pub fn byte(&self, at: usize) -> u8 {
        self.assert_inside(at, 1);
        // SAFETY: inside the buffer, as asserted. A volatile read, since the device writes the byte at any time; there
        // is no reference into the buffer.
        unsafe { ptr::read_volatile((self.buffer.address() as *const u8).add(at)) }
    }

    /// Sets the byte at `at`.
    ///
    /// # Panics
    ///
    /// If it is not inside the buffer.
    pub fn set_byte(&mut self, at: usize, value: u8) {
        self.assert_inside(at, 1);
        // SAFETY: as for `byte`; the device may read the byte meanwhile, which is what the caller measures.
        unsafe { ptr::write_volatile((self.buffer.address() as *mut u8).add(at), value) }
    }

    fn assert_inside(&self, at: usize, len: usize) {
        assert!(at.checked_add(len).is_some_and(|end| end <= self.bytes), "inside the buffer");
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.queue.id().disconnect();
    }
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane").field("bytes", &self.bytes).field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// Waits for lanes.
#[derive(Debug)]
pub struct LaneListener {
    id: Id,
    port: u16,
}

impl LaneListener {
    /// Listens at an address of a device; port 0 takes any.
    ///
    /// # Errors
    ///
    /// No device, or the address is taken or not one of an RDMA device.
    pub fn bind(host: &str, port: u16) -> Result<Self, FabricError> {
        let mut last = None;
        for address in resolve_name(host, port, &Stop::default())? {
            let id = Id::new()?;
            match id.bind_and_listen(address) {
                Ok(port) => return Ok(Self { id, port }),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| no_address(std::io::ErrorKind::NotFound.into())))
    }

    /// The port listened on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The next peer's lane. `prepare` may post receives before the peer can send.
    ///
    /// # Errors
    ///
    /// [`FabricError::Stopped`], or the reason why the connection could not be made.
    pub fn accept(&mut self, params: &LaneParams, stop: &Stop) -> Result<Lane, FabricError> {
        let event = self.id.wait_for(rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST, stop)?;
        let request =
            check_ptr(event.request.map_or(ptr::null_mut(), ptr::NonNull::as_ptr), "connection request")?;
        let id = Arc::new(Id::adopt(request)?);
        let made = Lane::make(&id, params).and_then(|(queue, buffer)| {
            let with = connect_params(&buffer, params);
            Ok((Lane::with_peer(queue, buffer, params, &event)?, with))
        });
        let (lane, with) = match made {
            Ok(made) => made,
            Err(error) => {
                id.reject();
                return Err(error);
            }
        };
        let mut conn = conn_param(&with, ReadDepth { own: 0, served: READS });
        // SAFETY: the id is alive and has its queue pair; `conn` and the private data outlive the call.
        check(unsafe { rdma_accept(id.as_ptr(), &mut conn) }, "rdma_accept")?;
        id.wait_for(rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED, stop)?;
        Ok(lane)
    }
}

fn connect_params(buffer: &Buffer, params: &LaneParams) -> ConnectParams {
    let mut private_data = Vec::with_capacity(DESCRIPTION);
    private_data.extend_from_slice(&buffer.address().to_be_bytes());
    private_data.extend_from_slice(&buffer.rkey().to_be_bytes());
    private_data.extend_from_slice(&(params.bytes as u64).to_be_bytes());
    ConnectParams {
        private_data,
        receives: params.receives,
        receive_bytes: params.bytes,
        send_depth: params.depth,
        reads: ReadDepth { own: READS, served: READS },
        read_pieces: 1,
    }
}

fn parse(data: &[u8]) -> Option<PeerBuffer> {
    let (address, rest) = data.split_first_chunk()?;
    let (rkey, rest) = rest.split_first_chunk()?;
    let (bytes, _) = rest.split_first_chunk()?;
    Some(PeerBuffer {
        address: u64::from_be_bytes(*address),
        rkey: u32::from_be_bytes(*rkey),
        bytes: u64::from_be_bytes(*bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_that_is_cut_short_is_none() {
        let mut data = vec![0; 56];
        data[..DESCRIPTION]
            .copy_from_slice(&[0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0x20, 0]);
        let peer = parse(&data);
        assert!(peer.is_some_and(|peer| (peer.address, peer.rkey, peer.bytes) == (0x1000, 7, 0x2000)));
        assert!(parse(&data[..DESCRIPTION - 1]).is_none() && parse(&[]).is_none());
    }
}
