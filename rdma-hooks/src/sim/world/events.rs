//! Events, and what happens when one is due.

use std::time::Duration;

use super::connection::{REQUEST_BYTES, padded};
use super::reads::{Part, PostedRead};
use super::{EndpointId, Queued, RETRIES_TAKE, World};
use crate::fabric::{Access, Completion, CompletionStatus, LinkState, Operation, ReadPiece, WriteRequest};
use crate::sim::Host;

#[derive(Debug)]
pub(super) enum Event {
    Request {
        port: u16,
        from: EndpointId,
    },
    Answer {
        to: EndpointId,
        answer: Option<(EndpointId, Vec<u8>)>,
    },
    Message {
        to: EndpointId,
        from: EndpointId,
        id: u64,
        bytes: Vec<u8>,
    },
    Write {
        to: EndpointId,
        from: EndpointId,
        request: WriteRequest,
    },
    Ack {
        to: EndpointId,
        id: u64,
    },
    /// `from` reads, `to` answers.
    Read {
        to: EndpointId,
        from: EndpointId,
        read: PostedRead,
    },
    ReadPart {
        to: EndpointId,
        from: EndpointId,
        part: Part,
    },
    StorePart {
        to: EndpointId,
        id: u64,
        into: ReadPiece,
        bytes: Vec<u8>,
    },
    ReadDone {
        to: EndpointId,
        by: EndpointId,
        id: u64,
    },
    Fail {
        to: EndpointId,
        id: u64,
        operation: Operation,
        status: CompletionStatus,
    },
    LinkDown {
        to: EndpointId,
    },
}

#[derive(Debug)]
pub(super) struct Timed {
    pub(super) at: Duration,
    pub(super) host: Host,
    pub(super) seq: u64,
    pub(super) event: Event,
}

impl Timed {
    fn key(&self) -> (Duration, Host, u64) {
        (self.at, self.host, self.seq)
    }
}

impl PartialEq for Timed {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Timed {}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl World {
    pub(super) fn happen(&mut self, event: Event) {
        match event {
            Event::Request { port, from } => {
                let private_data = padded(&self.endpoints[from].private_data, REQUEST_BYTES);
                match self.ports.get_mut(&port) {
                    Some(requests) => requests.push_back((from, private_data)),
                    None => self.reject(from),
                }
            }
            Event::Answer { to, answer } => {
                self.endpoints[to].news = true;
                self.endpoints[to].answer = Some(match answer {
                    Some((peer, private_data)) => {
                        self.endpoints[to].peer = Some(peer);
                        self.agree_on_reads(to, self.endpoints[peer].reads.depth);
                        Ok(private_data)
                    }
                    None => Err(CompletionStatus::RemoteInvalid),
                });
            }
            Event::Message { to, from, id, bytes } => {
                if self.reaches(to, from, id, Operation::Send) {
                    self.arrive(to, from, id, bytes);
                }
            }
            Event::Write { to, from, request } => {
                if self.reaches(to, from, request.id, Operation::Write) {
                    self.place(to, from, request);
                }
            }
            Event::Ack { to, id } => self.acknowledge(to, id),
            Event::Read { to, from, read } => {
                if self.reaches(to, from, read.id(), Operation::Read) {
                    self.serve_read(to, from, read);
                }
            }
            Event::ReadPart { to, from, part } => self.read_part(to, from, part),
            Event::StorePart { to, id, into, bytes } => self.store_part(to, id, into, &bytes),
            Event::ReadDone { to, by, id } => self.end_read(to, by, id),
            Event::Fail { to, id, operation, status } => self.fail(to, id, operation, status),
            Event::LinkDown { to } => {
                let endpoint = &mut self.endpoints[to];
                if endpoint.link == LinkState::Up {
                    endpoint.link = LinkState::Disconnected;
                    self.flush(to);
                }
            }
        }
    }

    /// False if the target is gone: the transport tries for a while, then fails the request.
    fn reaches(&mut self, to: EndpointId, from: EndpointId, id: u64, operation: Operation) -> bool {
        if self.endpoints[from].broken
            && self.hosts.get(&self.endpoints[from].host).is_some_and(|host| host.dead)
        {
            return false;
        }
        if self.endpoints[to].broken {
            let (host, at) = (self.endpoints[from].host, self.now + RETRIES_TAKE);
            let status = CompletionStatus::RetryExceeded;
            self.schedule(host, at, Event::Fail { to: from, id, operation, status });
            return false;
        }
        self.endpoints[to].arrivals += 1;
        true
    }

    pub(super) fn arrive(&mut self, to: EndpointId, from: EndpointId, id: u64, bytes: Vec<u8>) {
        let endpoint = &mut self.endpoints[to];
        match endpoint.free_slots.pop_front() {
            Some(_) if bytes.len() > endpoint.receive_bytes => self.refuse_long(to, from, id),
            Some(slot) if endpoint.unready.is_empty() => {
                endpoint.received.push_back((slot, bytes));
                endpoint.news = true;
                self.ack(to, from, id);
            }
            slot => {
                endpoint.free_slots.extend(slot);
                endpoint.unready.push_back((from, id, bytes));
                self.unready_messages += 1;
            }
        }
    }

    /// A message that is longer than its receive buffer ends the queue pairs of both ends.
    fn refuse_long(&mut self, to: EndpointId, from: EndpointId, id: u64) {
        let (operation, status) = (Operation::Receive, CompletionStatus::LocalLength);
        self.endpoints[to].completions.push_back(Completion::Failed { operation, status, vendor: 0 });
        self.flush(to);
        let (host, at) = (self.endpoints[from].host, self.now);
        let (operation, status) = (Operation::Send, CompletionStatus::RemoteInvalid);
        self.schedule(host, at, Event::Fail { to: from, id, operation, status });
    }

    fn ack(&mut self, by: EndpointId, to: EndpointId, id: u64) {
        let host = self.endpoints[by].host;
        if let Some(at) = self.arrival(by, true) {
            self.schedule(host, at, Event::Ack { to, id });
        }
    }

    fn place(&mut self, to: EndpointId, from: EndpointId, request: WriteRequest) {
        let (source, target) = (self.endpoints[from].host, self.endpoints[to].host);
        let len = u64::from(request.len);
        let (id, operation) = (request.id, Operation::Write);
        let fail = |status| Event::Fail { to: from, id, operation, status };
        if len > 0 {
            let mut bytes = vec![0; request.len as usize];
            let read = self
                .find_region(source, request.lkey, request.from, len)
                .and_then(|(region, offset)| region.region.read(offset, &mut bytes).ok());
            if read.is_none() {
                self.schedule(source, self.now, fail(CompletionStatus::LocalProtection));
                return;
            }
            let written = self
                .find_region(target, request.rkey, request.to, len)
                .filter(|(region, _)| region.access.contains(&Access::RemoteWrite))
                .and_then(|(region, offset)| region.region.write(offset, &bytes).ok());
            if written.is_none() {
                self.schedule(source, self.now, fail(CompletionStatus::RemoteAccess));
                self.flush(to);
                return;
            }
        }
        self.ack(to, from, request.id);
    }

    pub(super) fn acknowledge(&mut self, to: EndpointId, id: u64) {
        let endpoint = &mut self.endpoints[to];
        if endpoint.gives_up.is_some_and(|given_up| id >= given_up) {
            return;
        }
        let Some(&Queued { signalled, .. }) = endpoint.queue.iter().find(|queued| queued.id == id) else {
            return;
        };
        if signalled {
            while endpoint.queue.front().is_some_and(|queued| queued.id <= id) {
                endpoint.queue.pop_front();
            }
            endpoint.completions.push_back(Completion::Done { id });
            endpoint.news = true;
        }
    }
}
