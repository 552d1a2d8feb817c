//! An endpoint whose peer is a script: messages lie ready, everything posted takes effect at once.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdma_hooks::fabric::{
    Access, AddressBase, Completion, ConnectParams, Endpoint, Fabric, FabricError, Incoming, Limits,
    LinkState, Listener, ReadDepth, ReadRequest, Registration, WriteRequest,
};
use rdma_hooks::{HostRegion, Stop};

/// What the hooks did, and what the peer says next.
#[derive(Default)]
pub struct Script {
    /// Messages of the peer, oldest first.
    pub says: VecDeque<Vec<u8>>,
    /// Private data the peer sends along.
    pub private_data: Vec<u8>,
    /// Messages of the hooks.
    pub sent: Vec<Vec<u8>>,
    /// Writes of the hooks.
    pub writes: Vec<WriteRequest>,
    /// Kinds of messages and lengths of writes, in the order in which they were posted.
    pub order: Vec<Posted>,
    /// Receive buffers that were posted with the connection.
    pub receives: usize,
    /// Registered bytes now.
    pub registered: u64,
    next_key: u32,
}

/// Something the hooks posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    Message(u32),
    Write(u32),
}

pub type Shared = Arc<Mutex<Script>>;

/// Fabric, listener, request and endpoint in one.
#[derive(Clone)]
pub struct Scripted {
    pub script: Shared,
    free: Vec<usize>,
    slots: Vec<Vec<u8>>,
    done: Vec<Completion>,
    private_data: Vec<u8>,
    /// The hooks have nothing left to do but wait: only then the peer speaks, so that causes come before effects.
    waiting: bool,
    clock: Arc<Mutex<Instant>>,
}

impl Scripted {
    pub fn new(private_data: Vec<u8>, says: Vec<Vec<u8>>) -> Self {
        let script = Script { says: says.into(), private_data: private_data.clone(), ..Script::default() };
        Self {
            script: Arc::new(Mutex::new(script)),
            free: Vec::new(),
            slots: Vec::new(),
            done: Vec::new(),
            private_data,
            waiting: false,
            clock: Arc::new(Mutex::new(Instant::now())),
        }
    }

    fn connected(&self, params: &ConnectParams) -> Box<dyn Endpoint> {
        let free = (0..params.receives).collect();
        self.script.lock().unwrap().receives = params.receives;
        Box::new(Self { free, slots: vec![Vec::new(); params.receives], ..self.clone() })
    }
}

struct Held {
    script: Shared,
    bytes: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.script.lock().unwrap().registered -= self.bytes;
    }
}

impl Endpoint for Scripted {
    fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    fn limits(&self) -> Limits {
        Limits {
            send_depth: 64,
            inline_bytes: 0,
            max_registration_bytes: u64::MAX,
            on_demand: false,
            reads: ReadDepth::NONE,
            read_pieces: 1,
            read_bytes: 0,
        }
    }

    fn now(&self) -> Instant {
        *self.clock.lock().unwrap()
    }

    fn register(
        &self,
        region: &HostRegion,
        _: &[Access],
        base: AddressBase,
    ) -> Result<Registration, FabricError> {
        let mut script = self.script.lock().unwrap();
        script.registered += region.len();
        script.next_key += 1;
        let key = script.next_key;
        let address = match base {
            AddressBase::At(at) => at,
            AddressBase::Host => 0x7000_0000_0000,
        };
        let held = Held { script: Arc::clone(&self.script), bytes: region.len() };
        let (len, on_demand) = (region.len(), false);
        Ok(Registration { lkey: key, rkey: key, address, len, on_demand, guard: Box::new(held) })
    }

    fn post_writes(&mut self, chain: &[WriteRequest]) -> Result<(), FabricError> {
        let mut script = self.script.lock().unwrap();
        script.writes.extend_from_slice(chain);
        script.order.extend(chain.iter().map(|write| Posted::Write(write.len)));
        let signalled = chain.iter().filter(|write| write.signalled);
        self.done.extend(signalled.map(|write| Completion::Done { id: write.id }));
        Ok(())
    }

    fn post_reads(&mut self, chain: &[ReadRequest<'_>]) -> Result<(), FabricError> {
        panic!("the hooks read nothing: {chain:?}")
    }

    fn post_send(&mut self, id: u64, parts: &[&[u8]]) -> Result<(), FabricError> {
        let message = parts.concat();
        let mut script = self.script.lock().unwrap();
        script.order.push(Posted::Message(u32::from_be_bytes(message[4..8].try_into().unwrap())));
        script.sent.push(message);
        self.done.push(Completion::Done { id });
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), FabricError> {
        out.append(&mut self.done);
        if std::mem::take(&mut self.waiting)
            && let (Some(&slot), Some(message)) =
                (self.free.first(), self.script.lock().unwrap().says.pop_front())
        {
            self.free.remove(0);
            self.slots[slot] = message;
            out.push(Completion::Received { slot });
        }
        Ok(())
    }

    fn received(&self, slot: usize) -> &[u8] {
        &self.slots[slot]
    }

    fn repost(&mut self, slot: usize) -> Result<(), FabricError> {
        self.free.push(slot);
        Ok(())
    }

    fn wait(&mut self, at_most: Duration) -> Result<(), FabricError> {
        *self.clock.lock().unwrap() += at_most / 1000;
        self.waiting = true;
        Ok(())
    }

    fn received_mark(&self) -> Option<u64> {
        None
    }

    fn link(&mut self) -> Result<LinkState, FabricError> {
        // The script is over: the peer is gone.
        let over = self.script.lock().unwrap().says.is_empty();
        Ok(if over { LinkState::Disconnected } else { LinkState::Up })
    }

    fn disconnect(&mut self) {}
}

impl Fabric for Scripted {
    fn connect(
        &self,
        _: &str,
        _: u16,
        params: &ConnectParams,
        _: &Stop,
    ) -> Result<Box<dyn Endpoint>, FabricError> {
        Ok(self.connected(params))
    }

    fn listen(&self, _: &str, _: u16) -> Result<Box<dyn Listener>, FabricError> {
        Ok(Box::new(self.clone()))
    }

    fn now(&self) -> Instant {
        *self.clock.lock().unwrap()
    }
}

impl Listener for Scripted {
    fn port(&self) -> u16 {
        0
    }

    fn next_request(&mut self, _: &Stop) -> Result<Box<dyn Incoming>, FabricError> {
        if self.private_data.is_empty() {
            return Err(FabricError::Disconnected);
        }
        let request = self.clone();
        self.private_data.clear();
        Ok(Box::new(request))
    }
}

impl Incoming for Scripted {
    fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    fn peer(&self) -> Option<SocketAddr> {
        None
    }

    fn accept(self: Box<Self>, params: &ConnectParams, _: &Stop) -> Result<Box<dyn Endpoint>, FabricError> {
        Ok(self.connected(params))
    }
}
