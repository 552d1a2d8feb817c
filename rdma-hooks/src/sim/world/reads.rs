//! RDMA READs: what the peer's device answers, and when the answer's parts are in place.
//!
//! A READ is cut into parts. Each is read from the peer's memory at a time of its own after the request has arrived,
//! and stored in own memory at a time of its own after that, so that parts come in any order, and a write that arrived
//! after the READ may be in some of them. Completions keep the order of the requests.

use std::time::Duration;

use super::{EndpointId, Event, RETRIES_TAKE, World, next_random};
use crate::fabric::{
    Access, Completion, CompletionStatus, FabricError, Limits, LinkState, Operation, ReadDepth, ReadPiece,
    ReadRequest,
};
use crate::sim::Fault;

/// Parts of one piece, at most.
const PARTS: u64 = 4;

/// A READ as the device keeps it.
#[derive(Clone, Debug)]
pub(super) struct PostedRead {
    id: u64,
    rkey: u32,
    from: u64,
    into: Vec<ReadPiece>,
    /// The end of the answer is lost for good.
    is_cut: bool,
}

impl PostedRead {
    pub(super) fn id(&self) -> u64 {
        self.id
    }
}

/// A part of a READ's bytes.
#[derive(Clone, Debug)]
pub(super) struct Part {
    id: u64,
    rkey: u32,
    /// At the peer.
    from: u64,
    into: ReadPiece,
    /// When it is stored.
    stored_at: Duration,
}

/// Rules that tests break.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
pub(in crate::sim) enum Breakage {
    #[default]
    None,
    /// A completion does not wait for the bytes.
    CompleteEarly,
    /// Completions do not wait for those of earlier requests.
    CompleteInAnyOrder,
    /// A READ may go beyond its region; what is there reads as zeros.
    ReadBeyond,
    /// Memory that was not registered for it is read.
    ReadWithoutRight,
    /// A key lives on when its memory is deregistered.
    ReadWithDeadKey,
    /// Own memory is written to that was not registered for it.
    StoreWithoutRight,
    /// Any number of READs may be posted.
    IgnoreDepth,
    /// An end posts as many READs as it asked for, whatever the peer allows.
    DepthAsAsked,
    /// After a failure later READs complete.
    GoOnAfterFailure,
    /// An answer that was cut short counts as whole.
    CutIsWhole,
    /// Bytes are stored when the own device is gone.
    StoreWhenGone,
}

impl Breakage {
    #[cfg(test)]
    pub(in crate::sim) const ALL: [Self; 11] = [
        Self::CompleteEarly,
        Self::CompleteInAnyOrder,
        Self::ReadBeyond,
        Self::ReadWithoutRight,
        Self::ReadWithDeadKey,
        Self::StoreWithoutRight,
        Self::IgnoreDepth,
        Self::DepthAsAsked,
        Self::GoOnAfterFailure,
        Self::CutIsWhole,
        Self::StoreWhenGone,
    ];

    pub(in crate::sim) fn is(self, rule: Self) -> bool {
        cfg!(test) && self == rule
    }
}

impl World {
    /// What was agreed with the peer, and what the device takes.
    pub(in crate::sim) fn limits(&self, id: EndpointId) -> Limits {
        let (endpoint, reads) = (&self.endpoints[id], &self.endpoints[id].reads);
        Limits {
            send_depth: endpoint.send_depth,
            inline_bytes: 0,
            max_registration_bytes: u64::MAX,
            on_demand: self.config.on_demand == crate::sim::OnDemand::Offered,
            reads: reads.depth,
            read_pieces: reads.pieces,
            read_bytes: reads.bytes,
        }
    }

    /// What `id` may do from now on, given what its peer asks for or agreed to.
    pub(super) fn agree_on_reads(&mut self, id: EndpointId, peer: ReadDepth) {
        let reads = &mut self.endpoints[id].reads;
        if !self.breakage.is(Breakage::DepthAsAsked) {
            reads.depth = reads.depth.agreed_with(peer);
        }
    }

    pub(in crate::sim) fn post_reads(
        &mut self,
        from: EndpointId,
        chain: &[ReadRequest<'_>],
    ) -> Result<(), FabricError> {
        let checked = self.endpoints[from].reads.check(chain);
        if !matches!(checked, Err(FabricError::ReadDepth { .. })) || !self.breakage.is(Breakage::IgnoreDepth)
        {
            checked?;
        }
        self.endpoints[from].reads.posted(chain);
        for request in chain {
            let host = self.endpoints[from].host;
            let number = self.hosts.get(&host).map_or(0, |state| state.requests);
            let is_cut = self.faults(host).any(|fault| fault == Fault::AnswerCut { request: number });
            let bad = self.count_request(from, false)?;
            self.enqueue(from, request.id, true, Operation::Read)?;
            let (id, rkey, at) = (request.id, request.rkey, request.from);
            let read = PostedRead { id, rkey, from: at, into: request.into.to_vec(), is_cut };
            match self.endpoints[from].peer {
                Some(to) => self.deliver(from, id, Operation::Read, bad, Event::Read { to, from, read }),
                None => self.flush(from),
            }
        }
        Ok(())
    }

    /// A READ arrives at the peer's device.
    pub(super) fn serve_read(&mut self, to: EndpointId, from: EndpointId, read: PostedRead) {
        self.endpoints[to].served += 1;
        let (served, most) = (self.endpoints[to].served, self.endpoints[to].reads.depth.served);
        if served > usize::from(most) {
            return self.refuse_read(to, from, read.id, CompletionStatus::RemoteInvalid);
        }
        let len = read.into.iter().map(|piece| u64::from(piece.len)).sum();
        if !self.may_read(to, read.rkey, read.from, len) {
            return self.refuse_read(to, from, read.id, CompletionStatus::RemoteAccess);
        }
        let (id, mut done) = (read.id, self.now);
        let mut parts = self.parts_of(to, &read);
        if read.is_cut {
            parts.pop();
        }
        for part in parts {
            done = done.max(part.stored_at);
            self.answer(to, from, part);
        }
        let host = self.endpoints[to].host;
        let Some(at) = self.arrival(to, true).filter(|_| !read.is_cut) else {
            if self.breakage.is(Breakage::CutIsWhole) {
                let at = done + Duration::from_nanos(1);
                return self.schedule(host, at, Event::ReadDone { to: from, by: to, id });
            }
            self.endpoints[from].gives_up.get_or_insert(id);
            let (operation, status) = (Operation::Read, CompletionStatus::RetryExceeded);
            let fail = Event::Fail { to: from, id, operation, status };
            return self.schedule(host, self.now + RETRIES_TAKE, fail);
        };
        let in_place = if self.breakage.is(Breakage::CompleteEarly) { at } else { at.max(done) };
        let at = in_place + Duration::from_nanos(1);
        if self.breakage.is(Breakage::CompleteInAnyOrder) {
            let early = self.now + (at - self.now) / 64;
            return self.schedule(host, early.max(done), Event::ReadDone { to: from, by: to, id });
        }
        self.endpoints[to].last_ack = at;
        self.schedule(host, at, Event::ReadDone { to: from, by: to, id });
    }

    /// Whether a key of the endpoint's host lets its peer read a range.
    fn may_read(&self, to: EndpointId, rkey: u32, at: u64, len: u64) -> bool {
        let region = match self.breakage.is(Breakage::ReadBeyond) {
            true => self.regions.get(&rkey).map(|entry| &entry.0),
            false => self.find_region(self.endpoints[to].host, rkey, at, len).map(|(region, _)| region),
        };
        region.is_some_and(|region| {
            region.access.contains(&Access::RemoteRead) || self.breakage.is(Breakage::ReadWithoutRight)
        })
    }

    /// The queue pairs of both ends break: the peer's now, and this one's when the answers before have come.
    fn refuse_read(&mut self, to: EndpointId, from: EndpointId, id: u64, status: CompletionStatus) {
        self.flush(to);
        let host = self.endpoints[to].host;
        let at = self.arrival(to, true).unwrap_or(self.now + RETRIES_TAKE);
        let operation = Operation::Read;
        self.schedule(host, at, Event::Fail { to: from, id, operation, status });
    }

    /// Cuts a READ into parts and says when each is stored. `to` is the end that answers.
    fn parts_of(&mut self, to: EndpointId, read: &PostedRead) -> Vec<Part> {
        let span = self.config.max_delay.as_nanos() as u64 + 1;
        let now = self.now;
        let random = &mut self.endpoints[to].random;
        let (mut from, mut parts) = (read.from, Vec::new());
        for piece in &read.into {
            let mut rest = *piece;
            for left in (1..=PARTS).rev() {
                let cut = match left {
                    1 => rest.len,
                    _ => (next_random(random) % (u64::from(rest.len) + 1)) as u32,
                };
                let stored_at = now + Duration::from_nanos(2 * (next_random(random) % span));
                let (id, rkey, into) = (read.id, read.rkey, ReadPiece { len: cut, ..rest });
                if cut > 0 {
                    parts.push(Part { id, rkey, from, into, stored_at });
                }
                from += u64::from(cut);
                (rest.to, rest.len) = (rest.to + u64::from(cut), rest.len - cut);
            }
        }
        parts
    }

    /// Schedules when a part is read: before it is stored. Where packets are lost, a part may be read and stored, and
    /// then again, since the transport repeats what comes after a lost packet.
    fn answer(&mut self, to: EndpointId, from: EndpointId, part: Part) {
        let host = self.endpoints[to].host;
        let random = &mut self.endpoints[to].random;
        let wait = (part.stored_at - self.now).as_nanos() as u64;
        let read_at = self.now + Duration::from_nanos(next_random(random) % (wait + 1));
        if next_random(random) % 1000 < self.config.loss_per_mille {
            let first = Part { stored_at: read_at, ..part.clone() };
            self.schedule(host, self.now, Event::ReadPart { to, from, part: first });
        }
        self.schedule(host, read_at, Event::ReadPart { to, from, part });
    }

    /// The peer's device reads a part. A key that is dead by now fails the READ; a device that is gone does not answer.
    pub(super) fn read_part(&mut self, to: EndpointId, from: EndpointId, part: Part) {
        if self.endpoints[to].link != LinkState::Up {
            return self.fail_read(from, part.id, CompletionStatus::RetryExceeded);
        }
        let len = u64::from(part.into.len);
        let mut bytes = vec![0; part.into.len as usize];
        let may = self.may_read(to, part.rkey, part.from, len);
        let read = self
            .find_region(self.endpoints[to].host, part.rkey, part.from, len)
            .filter(|_| may)
            .and_then(|(region, offset)| region.region.read(offset, &mut bytes).ok());
        if read.is_none() && !(may && self.breakage.is(Breakage::ReadBeyond)) {
            return self.fail_read(from, part.id, CompletionStatus::RemoteAccess);
        }
        let (id, into, host) = (part.id, part.into, self.endpoints[to].host);
        self.schedule(host, part.stored_at, Event::StorePart { to: from, id, into, bytes });
    }

    /// This end's device stores a part.
    pub(super) fn store_part(&mut self, to: EndpointId, id: u64, into: ReadPiece, bytes: &[u8]) {
        if self.endpoints[to].broken && !self.breakage.is(Breakage::StoreWhenGone) {
            return;
        }
        let any = self.breakage.is(Breakage::StoreWithoutRight);
        let stored = self
            .find_region(self.endpoints[to].host, into.lkey, into.to, u64::from(into.len))
            .filter(|(region, _)| any || Access::writes_locally(&region.access))
            .and_then(|(region, offset)| region.region.write(offset, bytes).ok());
        if stored.is_none() {
            self.fail_read(to, id, CompletionStatus::LocalProtection);
        }
    }

    fn fail_read(&mut self, of: EndpointId, id: u64, status: CompletionStatus) {
        if let Some(read) = self.endpoints[of].queue.iter_mut().find(|read| read.id == id) {
            read.failed.get_or_insert(status);
        }
    }

    /// All of a READ was answered: it completes, or fails where a part of it failed.
    pub(super) fn end_read(&mut self, to: EndpointId, by: EndpointId, id: u64) {
        self.endpoints[by].served = self.endpoints[by].served.saturating_sub(1);
        let failed = self.endpoints[to].queue.iter().find(|read| read.id == id).and_then(|read| read.failed);
        match failed {
            Some(status @ CompletionStatus::RetryExceeded) => {
                self.endpoints[to].gives_up.get_or_insert(id);
                let (host, at) = (self.endpoints[by].host, self.now + RETRIES_TAKE);
                self.schedule(host, at, Event::Fail { to, id, operation: Operation::Read, status });
            }
            Some(status) => {
                self.flush(by);
                self.fail(to, id, Operation::Read, status);
            }
            None if self.breakage.is(Breakage::GoOnAfterFailure) && self.endpoints[to].broken => {
                self.endpoints[to].completions.push_back(Completion::Done { id });
                self.endpoints[to].news = true;
            }
            None => self.acknowledge(to, id),
        }
    }
}
