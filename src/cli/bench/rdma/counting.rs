//! Counts what a source posts: a fabric around the real one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rdma_hooks::fabric::{
    Access, AddressBase, Completion, ConnectParams, Endpoint, Limits, LinkState, Listener, Registration,
    WriteRequest,
};
use rdma_hooks::verbs::VerbsFabric;
use rdma_hooks::{Fabric, FabricError, HostRegion, Stop};

/// Requests posted so far.
#[derive(Debug, Default)]
pub struct Posted {
    requests: AtomicU64,
}

impl Posted {
    /// Sends and writes.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

/// This host's verbs devices, with every request counted.
pub struct Counting {
    verbs: VerbsFabric,
    posted: Arc<Posted>,
}

impl Counting {
    /// # Errors
    /// No library or no device.
    pub fn open(posted: Arc<Posted>) -> Result<Self, FabricError> {
        Ok(Self { verbs: VerbsFabric::open()?, posted })
    }
}

impl Fabric for Counting {
    fn connect(
        &self,
        host: &str,
        port: u16,
        params: &ConnectParams,
        stop: &Stop,
    ) -> Result<Box<dyn Endpoint>, FabricError> {
        let endpoint = self.verbs.connect(host, port, params, stop)?;
        Ok(Box::new(Counted { endpoint, posted: Arc::clone(&self.posted) }))
    }

    fn listen(&self, host: &str, port: u16) -> Result<Box<dyn Listener>, FabricError> {
        self.verbs.listen(host, port)
    }

    fn now(&self) -> Instant {
        self.verbs.now()
    }
}

struct Counted {
    endpoint: Box<dyn Endpoint>,
    posted: Arc<Posted>,
}

impl Endpoint for Counted {
    fn private_data(&self) -> &[u8] {
        self.endpoint.private_data()
    }

    fn limits(&self) -> Limits {
        self.endpoint.limits()
    }

    fn now(&self) -> Instant {
        self.endpoint.now()
    }

    fn check_memory_lock(&self, bytes: u64) -> Result<(), FabricError> {
        self.endpoint.check_memory_lock(bytes)
    }

    fn register(
        &self,
        region: &HostRegion,
        access: Access,
        base: AddressBase,
    ) -> Result<Registration, FabricError> {
        self.endpoint.register(region, access, base)
    }

    fn post_writes(&mut self, chain: &[WriteRequest]) -> Result<(), FabricError> {
        self.posted.requests.fetch_add(chain.len() as u64, Ordering::Relaxed);
        self.endpoint.post_writes(chain)
    }

    fn post_send(&mut self, id: u64, parts: &[&[u8]]) -> Result<(), FabricError> {
        self.posted.requests.fetch_add(1, Ordering::Relaxed);
        self.endpoint.post_send(id, parts)
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), FabricError> {
        self.endpoint.poll(out)
    }

    fn received(&self, slot: usize) -> &[u8] {
        self.endpoint.received(slot)
    }

    fn repost(&mut self, slot: usize) -> Result<(), FabricError> {
        self.endpoint.repost(slot)
    }

    fn wait(&mut self, at_most: Duration) -> Result<(), FabricError> {
        self.endpoint.wait(at_most)
    }

    fn link(&mut self) -> Result<LinkState, FabricError> {
        self.endpoint.link()
    }

    fn disconnect(&mut self) {
        self.endpoint.disconnect();
    }
}
