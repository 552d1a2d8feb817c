//! A fabric around another that reports each request before it is posted, to count requests or to end a program at one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::fabric::{
    Access, AddressBase, Completion, ConnectParams, Endpoint, Fabric, FabricError, Incoming, Limits,
    LinkState, Listener, ReadRequest, Registration, WriteRequest,
};
use crate::region::HostRegion;
use crate::stop::Stop;

/// What is about to be posted, by either end of any connection of the fabric.
#[derive(Clone, Copy, Debug)]
pub enum Posting<'a> {
    /// A chain of RDMA WRITEs, including probes of a quiet peer.
    Writes(&'a [WriteRequest]),
    /// A chain of RDMA READs.
    Reads(&'a [ReadRequest<'a>]),
    /// A message, in its parts. The first begins with its header.
    Message(&'a [&'a [u8]]),
}

impl Posting<'_> {
    /// How many requests it is.
    pub fn requests(&self) -> usize {
        match self {
            Self::Writes(chain) => chain.len(),
            Self::Reads(chain) => chain.len(),
            Self::Message(_) => 1,
        }
    }
}

type Tap = Arc<dyn Fn(Posting<'_>) + Send + Sync>;

/// Connects through another fabric. See the [module](self).
#[derive(Clone)]
pub struct Tapped<F> {
    inner: F,
    tap: Tap,
}

impl<F: Fabric> Tapped<F> {
    /// `tap` is called on the thread that posts, before the post: its run time adds to that of the migration.
    pub fn new(inner: F, tap: impl Fn(Posting<'_>) + Send + Sync + 'static) -> Self {
        Self { inner, tap: Arc::new(tap) }
    }
}

impl<F: Fabric> Fabric for Tapped<F> {
    fn connect(
        &self,
        host: &str,
        port: u16,
        params: &ConnectParams,
        stop: &Stop,
    ) -> Result<Box<dyn Endpoint>, FabricError> {
        Ok(tapped(self.inner.connect(host, port, params, stop)?, &self.tap))
    }

    fn listen(&self, host: &str, port: u16) -> Result<Box<dyn Listener>, FabricError> {
        let inner = self.inner.listen(host, port)?;
        Ok(Box::new(Connections { inner, tap: Arc::clone(&self.tap) }))
    }

    fn now(&self) -> Instant {
        self.inner.now()
    }
}

/// A listener, or a peer that wants to connect.
struct Connections<T: ?Sized> {
    tap: Tap,
    inner: Box<T>,
}

impl Listener for Connections<dyn Listener> {
    fn port(&self) -> u16 {
        self.inner.port()
    }

    fn next_request(&mut self, stop: &Stop) -> Result<Box<dyn Incoming>, FabricError> {
        let inner = self.inner.next_request(stop)?;
        Ok(Box::new(Connections { inner, tap: Arc::clone(&self.tap) }))
    }
}

impl Incoming for Connections<dyn Incoming> {
    fn private_data(&self) -> &[u8] {
        self.inner.private_data()
    }

    fn peer(&self) -> Option<SocketAddr> {
        self.inner.peer()
    }

    fn accept(
        self: Box<Self>,
        params: &ConnectParams,
        stop: &Stop,
    ) -> Result<Box<dyn Endpoint>, FabricError> {
        Ok(tapped(self.inner.accept(params, stop)?, &self.tap))
    }
}

struct TappedEndpoint {
    inner: Box<dyn Endpoint>,
    tap: Tap,
}

fn tapped(inner: Box<dyn Endpoint>, tap: &Tap) -> Box<dyn Endpoint> {
    Box::new(TappedEndpoint { inner, tap: Arc::clone(tap) })
}

impl Endpoint for TappedEndpoint {
    fn private_data(&self) -> &[u8] {
        self.inner.private_data()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn now(&self) -> Instant {
        self.inner.now()
    }

    fn check_memory_lock(&self, bytes: u64) -> Result<(), FabricError> {
        self.inner.check_memory_lock(bytes)
    }

    fn register(
        &self,
        region: &HostRegion,
        access: &[Access],
        base: AddressBase,
    ) -> Result<Registration, FabricError> {
        self.inner.register(region, access, base)
    }

    fn post_writes(&mut self, chain: &[WriteRequest]) -> Result<(), FabricError> {
        (self.tap)(Posting::Writes(chain));
        self.inner.post_writes(chain)
    }

    fn post_reads(&mut self, chain: &[ReadRequest<'_>]) -> Result<(), FabricError> {
        (self.tap)(Posting::Reads(chain));
        self.inner.post_reads(chain)
    }

    fn post_send(&mut self, id: u64, parts: &[&[u8]]) -> Result<(), FabricError> {
        (self.tap)(Posting::Message(parts));
        self.inner.post_send(id, parts)
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), FabricError> {
        self.inner.poll(out)
    }

    fn received(&self, slot: usize) -> &[u8] {
        self.inner.received(slot)
    }

    fn repost(&mut self, slot: usize) -> Result<(), FabricError> {
        self.inner.repost(slot)
    }

    fn wait(&mut self, at_most: Duration) -> Result<(), FabricError> {
        self.inner.wait(at_most)
    }

    fn look(&mut self, at_most: Duration) -> Result<bool, FabricError> {
        self.inner.look(at_most)
    }

    fn received_mark(&self) -> Option<u64> {
        self.inner.received_mark()
    }

    fn link(&mut self) -> Result<LinkState, FabricError> {
        self.inner.link()
    }

    fn disconnect(&mut self) {
        self.inner.disconnect();
    }
}
