//! Chains of RDMA READs, as the device takes them.
//!
//! # Source
//!
//! Manual page `ibv_post_send(3)`.

use std::ptr;

use rdma_sys::{ibv_send_flags, ibv_send_wr, ibv_sge, ibv_wr_opcode, rdma_t, wr_t};

use super::endpoint::blank_request;
use super::queue::Queue;
use crate::fabric::{FabricError, ReadRequest};

/// Posts a chain with one doorbell, each READ signalled. That it fits the queue pair was checked.
pub(super) fn post(queue: &Queue, chain: &[ReadRequest<'_>]) -> Result<(), FabricError> {
    let list = |read: &ReadRequest<'_>| {
        let pieces = read.into.iter();
        pieces
            .map(|piece| ibv_sge { addr: piece.to, length: piece.len, lkey: piece.lkey })
            .collect::<Vec<_>>()
    };
    let mut lists: Vec<Vec<ibv_sge>> = chain.iter().map(list).collect();
    let request = |(read, list): (&ReadRequest<'_>, &mut Vec<ibv_sge>)| {
        let mut request = blank_request(read.id, ibv_wr_opcode::IBV_WR_RDMA_READ);
        request.wr = wr_t { rdma: rdma_t { remote_addr: read.from, rkey: read.rkey } };
        request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        (request.sg_list, request.num_sge) = (list.as_mut_ptr(), list.len() as i32);
        request
    };
    let mut requests: Vec<ibv_send_wr> = chain.iter().zip(&mut lists).map(request).collect();
    let mut next: *mut ibv_send_wr = ptr::null_mut();
    for request in requests.iter_mut().rev() {
        request.next = next;
        next = request;
    }
    match requests.first_mut() {
        // SAFETY: the requests are linked among themselves and to `lists`; all vectors stay where they are until the
        // call returns. Memory that the device writes to is registered for that (`IBV_ACCESS_LOCAL_WRITE`), or the
        // device refuses the key: it keeps the promise of `PinnedSpan`, and no reference into it exists.
        Some(first) => unsafe { queue.post_send(first) },
        None => Ok(()),
    }
}
