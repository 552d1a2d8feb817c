//! RDMA READs: how many a connection allows, what one is, and which are under way.
//!
//! # Source
//!
//! Manual pages `ibv_post_send(3)`, `rdma_connect(3)`, `rdma_accept(3)`, `rdma_get_cm_event(3)`, `ibv_query_device(3)`.

use std::collections::VecDeque;

use super::{Completion, FabricError};

/// How many RDMA READs one end may have under way, and how many of the peer's its device serves, at a time.
///
/// Each end asks for a depth ([`ConnectParams::reads`](super::ConnectParams::reads)); what holds is the least of what
/// both ends ask for and both devices offer ([`Limits::reads`](super::Limits::reads)). A READ has one pair of ends:
/// one end's `own` is never more than the other's `served`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadDepth {
    /// READs of this end under way at a time: `initiator_depth` of `rdma_connect(3)`, at most the device's
    /// `max_qp_init_rd_atom`.
    pub own: u8,
    /// READs of the peer that this end's device serves at a time: `responder_resources` of `rdma_connect(3)`, at most
    /// the device's `max_qp_rd_atom`.
    pub served: u8,
}

impl ReadDepth {
    /// No READs in either direction.
    pub const NONE: Self = Self { own: 0, served: 0 };

    /// What of this a device offers.
    pub(crate) fn within(self, device: Self) -> Self {
        Self { own: self.own.min(device.own), served: self.served.min(device.served) }
    }

    /// What of this the peer allows, given its depth as the peer sees it.
    pub(crate) fn agreed_with(self, peer: Self) -> Self {
        Self { own: self.own.min(peer.served), served: self.served.min(peer.own) }
    }
}

/// An entry of a READ's scatter list: own memory that bytes of the peer go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadPiece {
    /// [`Registration::lkey`](super::Registration::lkey) of memory registered with
    /// [`Access::LocalWrite`](super::Access::LocalWrite) or [`Access::RemoteWrite`](super::Access::RemoteWrite).
    pub lkey: u32,
    /// Where the bytes go, in terms of [`Registration::address`](super::Registration::address).
    pub to: u64,
    /// How many; not 0.
    pub len: u32,
}

/// One RDMA READ: adjacent bytes of the peer into one or more pieces of own memory, in order. It always asks for a
/// completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadRequest<'a> {
    /// Given back by the completion. Ids of an endpoint ascend, those of writes and messages included.
    pub id: u64,
    /// The peer's key, of memory registered with [`Access::RemoteRead`](super::Access::RemoteRead).
    pub rkey: u32,
    /// The peer's address of the first byte.
    pub from: u64,
    /// Where the bytes go: 1 to [`Limits::read_pieces`](super::Limits::read_pieces) pieces, of together at most
    /// [`Limits::read_bytes`](super::Limits::read_bytes).
    pub into: &'a [ReadPiece],
}

impl ReadRequest<'_> {
    /// Bytes to be read.
    pub fn bytes(&self) -> u64 {
        self.into.iter().map(|piece| u64::from(piece.len)).sum()
    }
}

/// The READs of one end that are under way, and what it may post.
#[derive(Debug)]
pub(crate) struct Reads {
    pub(crate) depth: ReadDepth,
    /// Entries of a scatter list, at most.
    pub(crate) pieces: usize,
    /// Bytes of one READ, at most.
    pub(crate) bytes: u64,
    /// Ids, oldest first.
    under_way: VecDeque<u64>,
}

impl Reads {
    pub(crate) fn new(depth: ReadDepth, pieces: usize, bytes: u64) -> Self {
        Self { depth, pieces, bytes, under_way: VecDeque::new() }
    }

    /// Whether all of a chain may be posted now.
    ///
    /// # Errors
    ///
    /// [`FabricError::ReadShape`], [`FabricError::ReadDepth`].
    pub(crate) fn check(&self, chain: &[ReadRequest<'_>]) -> Result<(), FabricError> {
        for read in chain {
            let (pieces, bytes) = (read.into.len(), read.bytes());
            let is_shaped = (1..=self.pieces).contains(&pieces) && bytes <= self.bytes;
            if !is_shaped || read.into.iter().any(|piece| piece.len == 0) {
                let (most_pieces, most_bytes) = (self.pieces, self.bytes);
                return Err(FabricError::ReadShape { pieces, bytes, most_pieces, most_bytes });
            }
        }
        let (asked, under_way, depth) = (chain.len(), self.under_way.len(), self.depth.own);
        if asked + under_way > usize::from(depth) {
            return Err(FabricError::ReadDepth { asked, under_way, depth });
        }
        Ok(())
    }

    pub(crate) fn posted(&mut self, chain: &[ReadRequest<'_>]) {
        self.under_way.extend(chain.iter().map(|read| read.id));
    }

    /// Takes note of completions that are given to the owner: a READ is under way until then.
    pub(crate) fn completed(&mut self, found: &[Completion]) {
        for completion in found {
            if let &Completion::Done { id } = completion {
                while self.under_way.front().is_some_and(|oldest| *oldest <= id) {
                    self.under_way.pop_front();
                }
            }
        }
    }

    /// Whether a request is a READ that is under way.
    #[cfg(feature = "verbs")]
    pub(crate) fn contains(&self, id: u64) -> bool {
        self.under_way.contains(&id)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const PIECE: ReadPiece = ReadPiece { lkey: 1, to: 0, len: 4096 };

    fn read(id: u64, into: &[ReadPiece]) -> ReadRequest<'_> {
        ReadRequest { id, rkey: 7, from: 0, into }
    }

    #[test]
    fn the_least_of_both_ends_and_both_devices_is_agreed() {
        let depth = |own, served| ReadDepth { own, served };
        // Asked for here, this device, asked for there, that device; agreed here.
        let cases = [
            (depth(8, 0), depth(16, 16), depth(0, 8), depth(16, 16), depth(8, 0)),
            (depth(8, 0), depth(4, 16), depth(0, 8), depth(16, 16), depth(4, 0)),
            (depth(8, 0), depth(16, 16), depth(0, 8), depth(16, 2), depth(2, 0)),
            (depth(8, 0), depth(16, 16), depth(8, 0), depth(16, 16), ReadDepth::NONE),
            (depth(8, 3), depth(16, 16), depth(5, 6), depth(16, 16), depth(6, 3)),
            (depth(255, 255), depth(16, 16), depth(255, 255), depth(1, 32), depth(16, 1)),
        ];
        for (here, device, there, other, agreed) in cases {
            let (here, there) = (here.within(device), there.within(other));
            assert_eq!(here.agreed_with(there), agreed);
            let theirs = there.agreed_with(here);
            assert_eq!((theirs.served, theirs.own), (agreed.own, agreed.served));
        }
    }

    #[test]
    fn more_than_the_depth_is_refused_until_completions_are_given() {
        let mut reads = Reads::new(ReadDepth { own: 2, served: 0 }, 1, 8192);
        let into = [PIECE];
        assert!(matches!(
            reads.check(&[read(1, &into), read(2, &into), read(3, &into)]),
            Err(FabricError::ReadDepth { asked: 3, under_way: 0, depth: 2 })
        ));
        let chain = [read(1, &into), read(2, &into)];
        reads.check(&chain).unwrap();
        reads.posted(&chain);
        assert!(reads.check(&[read(3, &into)]).is_err());
        reads.completed(&[Completion::Received { slot: 0 }, Completion::Done { id: 1 }]);
        reads.check(&[read(3, &into)]).unwrap();
        // A later completion covers everything before it.
        reads.completed(&[Completion::Done { id: 9 }]);
        reads.check(&chain).unwrap();
        assert!(Reads::new(ReadDepth::NONE, 1, 8192).check(&[read(1, &into)]).is_err());
    }

    #[test]
    fn lists_that_a_device_does_not_take_are_refused() {
        let reads = Reads::new(ReadDepth { own: 9, served: 0 }, 2, 3 * 4096);
        let long = ReadPiece { len: 8193, ..PIECE };
        let empty = ReadPiece { len: 0, ..PIECE };
        for into in [&[][..], &[PIECE; 3], &[PIECE, long], &[PIECE, empty]] {
            let refused = reads.check(&[read(1, &[PIECE]), read(2, into)]);
            assert!(matches!(refused, Err(FabricError::ReadShape { most_pieces: 2, .. })), "{into:?}");
        }
        reads.check(&[read(1, &[PIECE, ReadPiece { len: 8192, ..PIECE }])]).unwrap();
    }
}
