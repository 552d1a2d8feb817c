//! Processing of an event that is due.

use super::connection::{REQUEST_BYTES, padded};
use super::{EndpointId, Event, RETRIES_TAKE, World};
use crate::fabric::{Access, Completion, CompletionStatus, LinkState, Operation, WriteRequest};

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
                let endpoint = &mut self.endpoints[to];
                endpoint.news = true;
                endpoint.answer = Some(match answer {
                    Some((peer, private_data)) => {
                        endpoint.peer = Some(peer);
                        Ok(private_data)
                    }
                    None => Err(CompletionStatus::RemoteInvalid),
                });
            }
            Event::Message { to, from, id, bytes } => {
                if self.reaches(to, from, Operation::Send) {
                    self.arrive(to, from, id, bytes);
                }
            }
            Event::Write { to, from, request } => {
                if self.reaches(to, from, Operation::Write) {
                    self.place(to, from, request);
                }
            }
            Event::Ack { to, id } => self.acknowledge(to, id),
            Event::Fail { to, operation, status } => {
                if !self.endpoints[to].broken {
                    let failed = Completion::Failed { operation, status, vendor: 0 };
                    self.endpoints[to].completions.push_back(failed);
                    self.flush(to);
                }
            }
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
    fn reaches(&mut self, to: EndpointId, from: EndpointId, operation: Operation) -> bool {
        if self.endpoints[from].broken
            && self.hosts.get(&self.endpoints[from].host).is_some_and(|host| host.dead)
        {
            return false;
        }
        if self.endpoints[to].broken {
            let (host, at) = (self.endpoints[from].host, self.now + RETRIES_TAKE);
            let status = CompletionStatus::RetryExceeded;
            self.schedule(host, at, Event::Fail { to: from, operation, status });
            return false;
        }
        self.endpoints[to].arrivals += 1;
        true
    }

    pub(super) fn arrive(&mut self, to: EndpointId, from: EndpointId, id: u64, bytes: Vec<u8>) {
        let endpoint = &mut self.endpoints[to];
        match endpoint.free_slots.pop_front() {
            Some(_) if bytes.len() > endpoint.receive_bytes => self.refuse_long(to, from),
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
    fn refuse_long(&mut self, to: EndpointId, from: EndpointId) {
        let (operation, status) = (Operation::Receive, CompletionStatus::LocalLength);
        self.endpoints[to].completions.push_back(Completion::Failed { operation, status, vendor: 0 });
        self.flush(to);
        let (host, at) = (self.endpoints[from].host, self.now);
        let fail =
            Event::Fail { to: from, operation: Operation::Send, status: CompletionStatus::RemoteInvalid };
        self.schedule(host, at, fail);
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
        let fail = |status| Event::Fail { to: from, operation: Operation::Write, status };
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
                .filter(|(region, _)| region.access == Access::RemoteWrite)
                .and_then(|(region, offset)| region.region.write(offset, &bytes).ok());
            if written.is_none() {
                self.schedule(source, self.now, fail(CompletionStatus::RemoteAccess));
                self.flush(to);
                return;
            }
        }
        self.ack(to, from, request.id);
    }

    fn acknowledge(&mut self, to: EndpointId, id: u64) {
        let endpoint = &mut self.endpoints[to];
        let Some(&(_, signalled, _)) = endpoint.queue.iter().find(|(queued, _, _)| *queued == id) else {
            return;
        };
        if signalled {
            while endpoint.queue.front().is_some_and(|(queued, _, _)| *queued <= id) {
                endpoint.queue.pop_front();
            }
            endpoint.completions.push_back(Completion::Done { id });
            endpoint.news = true;
        }
    }
}
