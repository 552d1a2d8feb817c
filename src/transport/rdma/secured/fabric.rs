//! A fabric around another whose connections carry a proof and whose messages are encrypted. RDMA WRITEs and READs pass as
//! they are: a device does not encrypt.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_hooks::fabric::{
    Access, AddressBase, Completion, ConnectParams, Endpoint, Incoming, Limits, LinkState, Listener,
    ReadRequest, Registration, WriteRequest,
};
use rdma_hooks::{Fabric, FabricError, HostRegion, Stop};

use super::keys::{COVERED_BYTES, Cipher, Covered, From, PROOF_BYTES, Secret, TAG_BYTES, same};

/// The covered part of private data, which may be shorter, and the proof behind it.
fn split(private_data: &[u8]) -> (Covered, &[u8]) {
    let mut covered = [0; COVERED_BYTES];
    let (data, proof) = private_data.split_at(COVERED_BYTES.min(private_data.len()));
    covered[..data.len()].copy_from_slice(data);
    // Received private data is padded.
    (covered, &proof[..PROOF_BYTES.min(proof.len())])
}

/// The parameters of a connection with room for encrypted messages.
fn widened(params: &ConnectParams, covered: &Covered, proof: &[u8; PROOF_BYTES]) -> ConnectParams {
    let private_data = [covered.as_slice(), proof].concat();
    ConnectParams { private_data, receive_bytes: params.receive_bytes + TAG_BYTES, ..params.clone() }
}

/// The source's fabric.
pub(super) struct SecuredFabric {
    pub(super) inner: Arc<dyn Fabric>,
    pub(super) secret: Secret,
}

impl Fabric for SecuredFabric {
    fn connect(
        &self,
        host: &str,
        port: u16,
        params: &ConnectParams,
        stop: &Stop,
    ) -> Result<Box<dyn Endpoint>, FabricError> {
        let (request, _) = split(&params.private_data);
        let params = widened(params, &request, &self.secret.of_request(&request));
        let inner = self.inner.connect(host, port, &params, stop)?;
        let (reply, proof) = split(inner.private_data());
        if !same(&self.secret.of_reply(&request, &reply), proof) {
            return Err(FabricError::NotAuthentic { what: "the answer to a connection" });
        }
        let (sends, receives) = (From::Source, From::Destination);
        SecuredEndpoint::boxed(inner, &self.secret, (sends, receives), &request)
    }

    fn listen(&self, host: &str, port: u16) -> Result<Box<dyn Listener>, FabricError> {
        self.inner.listen(host, port)
    }

    fn now(&self) -> Instant {
        self.inner.now()
    }
}

/// The destination's listener, for the connections of one source.
pub(super) struct SecuredListener<'a> {
    inner: &'a mut dyn Listener,
    secret: Secret,
    /// Requests that were passed on. One that comes again was copied from the network.
    seen: Vec<Covered>,
}

impl<'a> SecuredListener<'a> {
    pub(super) fn new(inner: &'a mut dyn Listener, secret: Secret) -> Self {
        Self { inner, secret, seen: Vec::new() }
    }
}

impl Listener for SecuredListener<'_> {
    fn port(&self) -> u16 {
        self.inner.port()
    }

    /// Rejects the requests without a proof.
    fn next_request(&mut self, stop: &Stop) -> Result<Box<dyn Incoming>, FabricError> {
        loop {
            let inner = self.inner.next_request(stop)?;
            let (request, proof) = split(inner.private_data());
            if same(&self.secret.of_request(&request), proof) && !self.seen.contains(&request) {
                self.seen.push(request);
                return Ok(Box::new(SecuredIncoming { inner, secret: self.secret.clone(), request }));
            }
            tracing::warn!(peer = ?inner.peer(), "connection rejected: it is not of the source that came by TLS");
        }
    }
}

struct SecuredIncoming {
    inner: Box<dyn Incoming>,
    secret: Secret,
    request: Covered,
}

impl Incoming for SecuredIncoming {
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
        let Self { inner, secret, request } = *self;
        let (reply, _) = split(&params.private_data);
        let params = widened(params, &reply, &secret.of_reply(&request, &reply));
        let inner = inner.accept(&params, stop)?;
        SecuredEndpoint::boxed(inner, &secret, (From::Destination, From::Source), &request)
    }
}

struct SecuredEndpoint {
    inner: Box<dyn Endpoint>,
    sends: Cipher,
    receives: Cipher,
    /// Decrypted messages, by their buffer's number.
    opened: Vec<Vec<u8>>,
    scratch: Vec<u8>,
}

impl SecuredEndpoint {
    fn boxed(
        inner: Box<dyn Endpoint>,
        secret: &Secret,
        (sends, receives): (From, From),
        request: &Covered,
    ) -> Result<Box<dyn Endpoint>, FabricError> {
        let (sends, receives) = (secret.cipher(sends, request)?, secret.cipher(receives, request)?);
        Ok(Box::new(Self { inner, sends, receives, opened: Vec::new(), scratch: Vec::new() }))
    }

    fn open(&mut self, slot: usize) -> Result<(), FabricError> {
        if self.opened.len() <= slot {
            self.opened.resize(slot + 1, Vec::new());
        }
        let message = &mut self.opened[slot];
        message.clear();
        message.extend_from_slice(self.inner.received(slot));
        self.receives.open(message)
    }
}

impl Endpoint for SecuredEndpoint {
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
        self.inner.post_writes(chain)
    }

    fn post_reads(&mut self, chain: &[ReadRequest<'_>]) -> Result<(), FabricError> {
        self.inner.post_reads(chain)
    }

    fn post_send(&mut self, id: u64, parts: &[&[u8]]) -> Result<(), FabricError> {
        self.scratch.clear();
        parts.iter().for_each(|part| self.scratch.extend_from_slice(part));
        self.sends.seal(&mut self.scratch)?;
        self.inner.post_send(id, &[&self.scratch])
    }

    /// Messages up to one that is not the peer's are given; the connection ends with it.
    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), FabricError> {
        let mut at = out.len();
        self.inner.poll(out)?;
        while let Some(completion) = out.get(at) {
            if let &Completion::Received { slot } = completion
                && let Err(error) = self.open(slot)
            {
                out.truncate(at);
                return Err(error);
            }
            at += 1;
        }
        Ok(())
    }

    fn received(&self, slot: usize) -> &[u8] {
        self.opened.get(slot).map_or(&[], Vec::as_slice)
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
