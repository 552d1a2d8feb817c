//! Connections: asked for, answered, ended.

use std::collections::VecDeque;

use super::{EndpointId, EndpointState, Event, World, next_random};
use crate::fabric::{ConnectParams, FabricError, LinkState, Reads};
use crate::sim::Host;

/// Private data is padded to these sizes, as on a real fabric.
pub(super) const REQUEST_BYTES: usize = 56;
const REPLY_BYTES: usize = 196;
/// Longest READ.
const READ_BYTES: u64 = 1 << 30;

impl World {
    fn new_endpoint(&mut self, host: Host, params: &ConnectParams) -> EndpointId {
        let state = self.hosts.entry(host).or_default();
        state.endpoints += 1;
        let mut random = self.config.seed ^ (state.endpoints << 32) ^ ((host as u64 + 1) << 56);
        next_random(&mut random);
        let depth = params.reads.within(self.config.reads[host as usize]);
        let reads = Reads::new(depth, params.read_pieces.min(self.config.read_pieces), READ_BYTES);
        self.endpoints.push(EndpointState {
            host,
            peer: None,
            link: LinkState::Up,
            send_depth: params.send_depth.min(self.config.send_depth),
            answer: None,
            private_data: params.private_data.clone(),
            free_slots: (0..params.receives).collect(),
            receive_bytes: params.receive_bytes,
            unready: VecDeque::new(),
            received: VecDeque::new(),
            completions: VecDeque::new(),
            queue: VecDeque::new(),
            reads,
            served: 0,
            gives_up: None,
            broken: false,
            arrivals: 0,
            last_arrival: self.now,
            last_ack: self.now,
            random,
            news: false,
        });
        self.endpoints.len() - 1
    }

    pub(in crate::sim) fn endpoint(&self, id: EndpointId) -> &EndpointState {
        &self.endpoints[id]
    }

    pub(in crate::sim) fn connect(&mut self, host: Host, port: u16, params: &ConnectParams) -> EndpointId {
        let from = self.new_endpoint(host, params);
        if let Some(at) = self.arrival(from, false) {
            self.schedule(host, at, Event::Request { port, from });
        }
        from
    }

    pub(in crate::sim) fn connected(&mut self, id: EndpointId) -> Option<Result<Vec<u8>, FabricError>> {
        let host = self.endpoints[id].host;
        let endpoint = &mut self.endpoints[id];
        endpoint.news = false;
        match (endpoint.answer.take(), self.alive(host)) {
            (_, Err(dead)) => Some(Err(dead)),
            (Some(Ok(private_data)), _) => Some(Ok(private_data)),
            (Some(Err(_)), _) => Some(Err(FabricError::Event {
                wanted: "ESTABLISHED",
                got: "REJECTED",
                status: 0,
                remedy: "no process listens there, or the peer does not accept this connection",
            })),
            (None, _) => None,
        }
    }

    pub(in crate::sim) fn listen(&mut self, port: u16) {
        self.ports.entry(port).or_default();
    }

    pub(in crate::sim) fn next_request(&mut self, port: u16) -> Option<(EndpointId, Vec<u8>)> {
        self.ports.get_mut(&port)?.pop_front()
    }

    pub(in crate::sim) fn accept(
        &mut self,
        host: Host,
        from: EndpointId,
        params: &ConnectParams,
    ) -> Result<EndpointId, FabricError> {
        self.alive(host)?;
        let id = self.new_endpoint(host, params);
        self.endpoints[id].peer = Some(from);
        self.agree_on_reads(id, self.endpoints[from].reads.depth);
        let answer = Some((id, padded(&params.private_data, REPLY_BYTES)));
        if let Some(at) = self.arrival(id, false) {
            self.schedule(host, at, Event::Answer { to: from, answer });
        }
        Ok(id)
    }

    pub(in crate::sim) fn reject(&mut self, from: EndpointId) {
        let (host, at) = (self.endpoints[from].host, self.now);
        self.schedule(host, at, Event::Answer { to: from, answer: None });
    }

    pub(in crate::sim) fn disconnect(&mut self, id: EndpointId) {
        let silent = self.hosts.get(&self.endpoints[id].host).is_some_and(|state| state.silent);
        self.tear_down(id, LinkState::Disconnected, silent);
        self.endpoints[id].broken = true;
    }
}

pub(super) fn padded(bytes: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(len.max(bytes.len()), 0);
    bytes
}
