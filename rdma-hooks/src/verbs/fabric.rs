//! Makes connections through librdmacm.

use std::collections::HashMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use rdma_sys::{rdma_accept, rdma_cm_event_type, rdma_conn_param, rdma_connect};

use super::call::check;
use super::cm::Id;
use super::domain::Domain;
use super::endpoint::VerbsEndpoint;
use super::{MemoryLock, device, memory_lock};
use crate::fabric::{ConnectParams, Endpoint, Fabric, FabricError, Incoming, Listener, ReadDepth};
use crate::stop::{Cancel, Stop};

/// Times the transport repeats what the peer does not acknowledge.
const RETRY_COUNT: u8 = 7;
/// Times the peer's transport may repeat towards us while no receive is posted; 7 means for ever.
const RNR_RETRY_COUNT: u8 = 7;
/// How long the kernel may take to find the device of an own address.
const LOOPBACK_RESOLVES: Duration = Duration::from_secs(5);
/// How long the completion queues are polled before going to sleep; waking up takes longer.
const SPIN: Duration = Duration::from_micros(20);

type Domains = Arc<Mutex<HashMap<usize, Weak<Domain>>>>;

/// Connections over this host's verbs devices.
///
/// One object per migration: connections made by it through the same device share a protection domain, and no other's.
#[derive(Clone, Debug, Default)]
pub struct VerbsFabric {
    domains: Domains,
}

impl VerbsFabric {
    /// # Errors
    ///
    /// [`FabricError::Unavailable`] with the reason and the remedy if there is no library or no device.
    pub fn open() -> Result<Self, FabricError> {
        device::any_device()?;
        Ok(Self::default())
    }

    /// How much memory this process may lock.
    pub fn memory_lock(&self) -> MemoryLock {
        memory_lock()
    }
}

fn domain_of(domains: &Domains, id: &Arc<Id>) -> Result<Arc<Domain>, FabricError> {
    let device = id.verbs()?.as_ptr() as usize;
    let mut domains = domains.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(domain) = domains.get(&device).and_then(Weak::upgrade) {
        return Ok(domain);
    }
    let domain = Arc::new(Domain::new(id)?);
    domains.insert(device, Arc::downgrade(&domain));
    Ok(domain)
}

impl Fabric for VerbsFabric {
    fn connect(
        &self,
        host: &str,
        port: u16,
        params: &ConnectParams,
        stop: &Stop,
    ) -> Result<Box<dyn Endpoint>, FabricError> {
        let mut last = None;
        for address in resolve_name(host, port, stop)? {
            match self.connect_to(address, params, stop) {
                Ok(endpoint) => return Ok(Box::new(endpoint)),
                Err(FabricError::Stopped(stopped)) => return Err(stopped.into()),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| no_address(std::io::ErrorKind::NotFound.into())))
    }

    fn listen(&self, host: &str, port: u16) -> Result<Box<dyn Listener>, FabricError> {
        let host = if host.is_empty() { "0.0.0.0" } else { host };
        let mut last = None;
        for address in resolve_name(host, port, &Stop::default())? {
            let id = Id::new()?;
            match self_reachable(address).and_then(|()| id.bind_and_listen(address)) {
                Ok(port) => {
                    return Ok(Box::new(VerbsListener { id, port, domains: Arc::clone(&self.domains) }));
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| no_address(std::io::ErrorKind::NotFound.into())))
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}

impl VerbsFabric {
    fn connect_to(
        &self,
        address: SocketAddr,
        params: &ConnectParams,
        stop: &Stop,
    ) -> Result<VerbsEndpoint, FabricError> {
        let id = Arc::new(Id::new()?);
        id.resolve(address, stop)?;
        let domain = domain_of(&self.domains, &id)?;
        let mut endpoint = VerbsEndpoint::new(&id, &domain, params, SPIN)?;
        let asked = params.reads.within(domain.reads);
        let mut conn = conn_param(params, asked);
        // SAFETY: the id is alive and has its route and queue pair; `conn` and the private data outlive the call.
        check(unsafe { rdma_connect(id.as_ptr(), &mut conn) }, "rdma_connect")?;
        let established = id.wait_for(rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED, stop)?;
        endpoint.private_data = established.private_data;
        endpoint.reads.depth = asked.within(established.reads);
        Ok(endpoint)
    }
}

/// The kernel allows listening at a loopback address although no device has it, so that no peer could ever connect.
/// Some devices do have one (siw on the loopback interface), so this resolves the address to find out.
fn self_reachable(address: SocketAddr) -> Result<(), FabricError> {
    if !address.ip().to_canonical().is_loopback() {
        return Ok(());
    }
    let stop = Stop::new(Some(Instant::now() + LOOPBACK_RESOLVES), Cancel::default());
    let somewhere = SocketAddr::new(address.ip(), address.port().max(1));
    Id::new()?.resolve(somewhere, &stop)
}

/// Both depths must be within the device's: librdmacm refuses others.
pub(super) fn conn_param(params: &ConnectParams, reads: ReadDepth) -> rdma_conn_param {
    let private_data = params.private_data.get(..56).unwrap_or(&params.private_data);
    rdma_conn_param {
        private_data: private_data.as_ptr().cast(),
        private_data_len: private_data.len() as u8,
        responder_resources: reads.served,
        initiator_depth: reads.own,
        flow_control: 0,
        retry_count: RETRY_COUNT,
        rnr_retry_count: RNR_RETRY_COUNT,
        srq: 0,
        qp_num: 0,
    }
}

/// Looks a name up. A lookup may take long and cannot be interrupted, so a thread of its own does it.
pub(super) fn resolve_name(host: &str, port: u16, stop: &Stop) -> Result<Vec<SocketAddr>, FabricError> {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(ip) = host.parse() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let (answer, answered) = channel();
    let name = host.to_owned();
    let lookup = move || {
        // The receiver is gone if the wait ended early.
        let _ = answer.send((name.as_str(), port).to_socket_addrs().map(Iterator::collect::<Vec<_>>));
    };
    std::thread::Builder::new().name("rdma-lookup".into()).spawn(lookup).map_err(no_address)?;
    loop {
        let now = Instant::now();
        stop.check(now)?;
        match answered.recv_timeout(stop.slice(now)) {
            Ok(addresses) => {
                return Ok(ipv4_first(addresses.map_err(no_address)?));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(no_address(std::io::ErrorKind::NotFound.into()));
            }
        }
    }
}

/// Moves IPv4 addresses to the front: a QEMU on Ethernet accepts no IPv6 connection.
fn ipv4_first(mut addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    addresses.sort_by_key(SocketAddr::is_ipv6);
    addresses
}

pub(super) fn no_address(source: std::io::Error) -> FabricError {
    FabricError::Verb { verb: "looking up the host's name", remedy: "give a numeric address", source }
}

struct VerbsListener {
    id: Id,
    port: u16,
    domains: Domains,
}

impl Listener for VerbsListener {
    fn port(&self) -> u16 {
        self.port
    }

    fn next_request(&mut self, stop: &Stop) -> Result<Box<dyn Incoming>, FabricError> {
        let event = self.id.wait_for(rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST, stop)?;
        let request = super::call::check_ptr(
            event.request.map_or(std::ptr::null_mut(), std::ptr::NonNull::as_ptr),
            "connection request",
        )?;
        let id = Arc::new(Id::adopt(request)?);
        let (private_data, domains) = (event.private_data, Arc::clone(&self.domains));
        Ok(Box::new(VerbsIncoming { id, private_data, reads: event.reads, domains, answered: false }))
    }
}

struct VerbsIncoming {
    id: Arc<Id>,
    private_data: Vec<u8>,
    /// What the peer asks for, seen from this end.
    reads: ReadDepth,
    domains: Domains,
    answered: bool,
}

impl Incoming for VerbsIncoming {
    fn private_data(&self) -> &[u8] {
        &self.private_data
    }

    fn peer(&self) -> Option<SocketAddr> {
        self.id.peer()
    }

    fn accept(
        mut self: Box<Self>,
        params: &ConnectParams,
        stop: &Stop,
    ) -> Result<Box<dyn Endpoint>, FabricError> {
        let domain = domain_of(&self.domains, &self.id)?;
        let mut endpoint = VerbsEndpoint::new(&self.id, &domain, params, SPIN)?;
        endpoint.reads.depth = params.reads.within(domain.reads).within(self.reads);
        let mut conn = conn_param(params, endpoint.reads.depth);
        // SAFETY: the id is alive and has its queue pair; `conn` and the private data outlive the call.
        check(unsafe { rdma_accept(self.id.as_ptr(), &mut conn) }, "rdma_accept")?;
        self.answered = true;
        endpoint.id().wait_for(rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED, stop)?;
        Ok(Box::new(endpoint))
    }
}

impl Drop for VerbsIncoming {
    fn drop(&mut self) {
        if !self.answered {
            self.id.reject();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r11_ipv4_addresses_are_tried_first() {
        let [v6, first, second] = ["[2001:db8::1]:1", "192.0.2.1:1", "192.0.2.2:1"].map(|text| text.parse());
        let (Ok(v6), Ok(first), Ok(second)) = (v6, first, second) else { panic!("addresses") };
        assert_eq!(ipv4_first(vec![v6, first, second]), [first, second, v6]);
    }

    #[test]
    fn r10_the_peer_may_try_for_ever_towards_us_and_we_try_seven_times() {
        let reads = ReadDepth { own: 2, served: 9 };
        let params = ConnectParams {
            private_data: vec![7; 80],
            receives: 1,
            receive_bytes: 1,
            send_depth: 1,
            reads,
            read_pieces: 1,
        };
        let conn = conn_param(&params, reads);
        assert_eq!((conn.initiator_depth, conn.responder_resources), (2, 9));
        assert_eq!((conn.retry_count, conn.rnr_retry_count, conn.flow_control), (7, 7, 0));
        assert_eq!(conn.private_data_len, 56, "no more than a request carries");
    }
}
