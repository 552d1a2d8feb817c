//! Connection manager ids and their events.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::time::{Duration, Instant};

use rdma_sys::{
    rdma_ack_cm_event, rdma_bind_addr, rdma_cm_event, rdma_cm_event_type, rdma_cm_id, rdma_conn_param,
    rdma_create_event_channel, rdma_create_id, rdma_destroy_event_channel, rdma_destroy_id, rdma_disconnect,
    rdma_event_channel, rdma_get_cm_event, rdma_listen, rdma_migrate_id, rdma_port_space, rdma_reject,
    rdma_resolve_addr, rdma_resolve_route, rdma_set_option,
};

use super::call::{check, check_ptr};
use crate::fabric::{FabricError, ReadDepth};
use crate::stop::Stop;

/// Connections that may wait to be taken.
const BACKLOG: i32 = 8;
/// How long the kernel tries to resolve an address or a route.
const RESOLVE_MS: i32 = 5_000;
/// `RDMA_OPTION_ID` and `RDMA_OPTION_ID_REUSEADDR` of rdma_cma.h.
const OPTION_ID: i32 = 0;
const OPTION_ID_REUSEADDR: i32 = 1;

/// Where events of one id arrive.
#[derive(Debug)]
struct EventChannel(NonNull<rdma_event_channel>);

// SAFETY: the library locks the channel itself; the pointer is owned.
unsafe impl Send for EventChannel {}
// SAFETY: as above; all calls take the channel by pointer and are thread safe.
unsafe impl Sync for EventChannel {}

impl EventChannel {
    fn new() -> Result<Self, FabricError> {
        // SAFETY: no arguments; the result is null or a channel we destroy in `Drop`.
        let channel = check_ptr(unsafe { rdma_create_event_channel() }, "rdma_create_event_channel")?;
        let channel = Self(channel);
        set_nonblocking(channel.fd())?;
        Ok(channel)
    }

    fn fd(&self) -> RawFd {
        // SAFETY: the channel is alive until `Drop`.
        unsafe { self.0.as_ref().fd }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: made by rdma_create_event_channel, destroyed once, after its id (field order in `Id`).
        unsafe { rdma_destroy_event_channel(self.0.as_ptr()) }
    }
}

/// A connection manager id with an event channel of its own.
///
/// One channel per id: no id's event can be taken by another's reader.
#[derive(Debug)]
pub(super) struct Id {
    id: NonNull<rdma_cm_id>,
    channel: EventChannel,
}

// SAFETY: the library locks ids itself; the pointer is owned.
unsafe impl Send for Id {}
// SAFETY: as above. Fields read through the pointer (verbs, qp) change only under calls of the owner.
unsafe impl Sync for Id {}

/// What happened to an id.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) kind: rdma_cm_event_type::Type,
    pub(super) status: i32,
    pub(super) private_data: Vec<u8>,
    /// READs that the peer leaves to this end: of a connection request, and of its answer.
    pub(super) reads: ReadDepth,
    /// The new id of a connection request, still on the listener's channel.
    pub(super) request: Option<NonNull<rdma_cm_id>>,
}

impl Id {
    pub(super) fn new() -> Result<Self, FabricError> {
        let channel = EventChannel::new()?;
        let mut id = ptr::null_mut();
        // SAFETY: the channel is alive; `id` outlives the call and is destroyed in `Drop`.
        let made = unsafe {
            rdma_create_id(channel.0.as_ptr(), &mut id, ptr::null_mut(), rdma_port_space::RDMA_PS_TCP)
        };
        check(made, "rdma_create_id")?;
        Ok(Self { id: check_ptr(id, "rdma_create_id")?, channel })
    }

    /// Takes over the id of a connection request, onto a channel of its own.
    pub(super) fn adopt(request: NonNull<rdma_cm_id>) -> Result<Self, FabricError> {
        let channel = EventChannel::new();
        let migrated = channel.and_then(|channel| {
            // SAFETY: both are alive; the request's event was acknowledged, so the call does not block.
            check(unsafe { rdma_migrate_id(request.as_ptr(), channel.0.as_ptr()) }, "rdma_migrate_id")?;
            Ok(Self { id: request, channel })
        });
        if migrated.is_err() {
            // SAFETY: no other code has the id; it is destroyed once.
            let _ = unsafe { rdma_destroy_id(request.as_ptr()) };
        }
        migrated
    }

    pub(super) fn as_ptr(&self) -> *mut rdma_cm_id {
        self.id.as_ptr()
    }

    pub(super) fn fd(&self) -> RawFd {
        self.channel.fd()
    }

    /// The device the id is bound to.
    pub(super) fn verbs(&self) -> Result<NonNull<rdma_sys::ibv_context>, FabricError> {
        // SAFETY: the id is alive.
        check_ptr(unsafe { self.id.as_ref().verbs }, "rdma_cm_id without a device")
    }

    /// The port of that device, counted from 1; 0 if the id is bound to none.
    pub(super) fn port(&self) -> u8 {
        // SAFETY: the id is alive.
        unsafe { self.id.as_ref().port_num }
    }

    /// Binds the id to an address of this host, and to the device that has it.
    pub(super) fn bind(&self, address: SocketAddr) -> Result<(), FabricError> {
        let mut sockaddr = SockAddr::new(address);
        // SAFETY: the id is alive; the address outlives the call and is as long as its family requires.
        check(unsafe { rdma_bind_addr(self.as_ptr(), sockaddr.as_ptr()) }, "rdma_bind_addr")
    }

    pub(super) fn bind_and_listen(&self, address: SocketAddr) -> Result<u16, FabricError> {
        let mut yes: i32 = 1;
        let option = (&raw mut yes).cast();
        // SAFETY: the id is alive; the option outlives the call and has the size given.
        let set = unsafe { rdma_set_option(self.as_ptr(), OPTION_ID, OPTION_ID_REUSEADDR, option, 4) };
        check(set, "rdma_set_option")?;
        self.bind(address)?;
        // SAFETY: the id is alive and bound.
        check(unsafe { rdma_listen(self.as_ptr(), BACKLOG) }, "rdma_listen")?;
        // SAFETY: the id is alive; binding filled the union with its own address, and the storage member is as large
        // as any address.
        let storage = unsafe { self.id.as_ref().route.addr.src_addr_union.src_storage };
        Ok(socket_addr(&storage).map_or(address.port(), |bound| bound.port()))
    }

    /// Finds the device and the route to an address.
    pub(super) fn resolve(&self, address: SocketAddr, stop: &Stop) -> Result<(), FabricError> {
        let mut sockaddr = SockAddr::new(address);
        // SAFETY: the id is alive; the address outlives the call; no source address is allowed.
        let asked =
            unsafe { rdma_resolve_addr(self.as_ptr(), ptr::null_mut(), sockaddr.as_ptr(), RESOLVE_MS) };
        check(asked, "rdma_resolve_addr")?;
        self.wait_for(rdma_cm_event_type::RDMA_CM_EVENT_ADDR_RESOLVED, stop)?;
        // SAFETY: the id is alive and its address is resolved.
        check(unsafe { rdma_resolve_route(self.as_ptr(), RESOLVE_MS) }, "rdma_resolve_route")?;
        self.wait_for(rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_RESOLVED, stop)?;
        Ok(())
    }

    /// Waits for the event that is due; any other one is an error.
    pub(super) fn wait_for(&self, kind: rdma_cm_event_type::Type, stop: &Stop) -> Result<Event, FabricError> {
        loop {
            if let Some(event) = self.next_event()? {
                if event.kind == kind {
                    return Ok(event);
                }
                return Err(FabricError::Event {
                    wanted: event_name(kind),
                    got: event_name(event.kind),
                    status: event.status,
                    remedy: event_remedy(event.kind),
                });
            }
            let now = Instant::now();
            stop.check(now)?;
            wait_readable(&[self.fd()], stop.slice(now))?;
        }
    }

    /// The next event, if one is there; never waits.
    pub(super) fn next_event(&self) -> Result<Option<Event>, FabricError> {
        let mut event: *mut rdma_cm_event = ptr::null_mut();
        // SAFETY: the channel is alive; `event` outlives the call.
        if unsafe { rdma_get_cm_event(self.channel.0.as_ptr(), &mut event) } != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(FabricError::Verb { verb: "rdma_get_cm_event", remedy: "", source: error }),
            };
        }
        let event = check_ptr(event, "rdma_get_cm_event")?;
        // SAFETY: the event is ours until it is acknowledged below; nothing borrows from it afterwards.
        let copy = unsafe { copy_event(event.as_ref()) };
        // SAFETY: acknowledged exactly once; an event not acknowledged would make destroying its id block.
        check(unsafe { rdma_ack_cm_event(event.as_ptr()) }, "rdma_ack_cm_event")?;
        Ok(Some(copy))
    }

    pub(super) fn peer(&self) -> Option<SocketAddr> {
        // SAFETY: the id is alive; the library fills the union with the peer's address, its family first, and the
        // storage member is as large as any address.
        let storage = unsafe { self.id.as_ref().route.addr.dst_addr_union.dst_storage };
        socket_addr(&storage)
    }

    pub(super) fn disconnect(&self) {
        // SAFETY: the id is alive. It fails if there is no connection, which is fine.
        let _ = unsafe { rdma_disconnect(self.as_ptr()) };
    }

    pub(super) fn reject(&self) {
        // SAFETY: the id is alive; no private data is sent. It fails if there is nothing to reject.
        let _ = unsafe { rdma_reject(self.as_ptr(), ptr::null(), 0) };
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        // SAFETY: destroyed once, before its channel; every event was acknowledged when it was read, so this does not
        // block; its queue pair was destroyed by `Queue`, which keeps this id alive for that.
        let _ = unsafe { rdma_destroy_id(self.as_ptr()) };
    }
}

/// # Safety
///
/// `event` was returned by rdma_get_cm_event and is not acknowledged yet; its id is a connected one (RDMA_PS_TCP), so
/// that `param.conn` is the member in use.
unsafe fn copy_event(event: &rdma_cm_event) -> Event {
    use rdma_cm_event_type::{
        RDMA_CM_EVENT_CONNECT_REQUEST, RDMA_CM_EVENT_ESTABLISHED, RDMA_CM_EVENT_REJECTED,
    };
    let carries_data = matches!(
        event.event,
        RDMA_CM_EVENT_CONNECT_REQUEST | RDMA_CM_EVENT_ESTABLISHED | RDMA_CM_EVENT_REJECTED
    );
    // SAFETY: the caller's promise.
    let conn: rdma_conn_param = unsafe { event.param.conn };
    let private_data = if carries_data && !conn.private_data.is_null() {
        // SAFETY: the library keeps `private_data_len` bytes there until the event is acknowledged.
        unsafe { std::slice::from_raw_parts(conn.private_data.cast(), usize::from(conn.private_data_len)) }
            .to_vec()
    } else {
        Vec::new()
    };
    let request = match event.event {
        RDMA_CM_EVENT_CONNECT_REQUEST => NonNull::new(event.id),
        _ => None,
    };
    // Seen from this end: what the peer serves is what this end may have under way (rdma_get_cm_event(3)).
    let reads = match carries_data {
        true => ReadDepth { own: conn.initiator_depth, served: conn.responder_resources },
        false => ReadDepth::NONE,
    };
    Event { kind: event.event, status: event.status, private_data, reads, request }
}

pub(super) fn set_nonblocking(fd: RawFd) -> Result<(), FabricError> {
    // SAFETY: plain system calls on a file descriptor the caller owns.
    let set = unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 { flags } else { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) }
    };
    check(set.min(0), "fcntl")
}

/// Sleeps until a descriptor is readable, at most `at_most`, rounded up to a millisecond. Returns which are readable.
pub(super) fn wait_readable<const N: usize>(
    fds: &[RawFd; N],
    at_most: Duration,
) -> Result<[bool; N], FabricError> {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    let millis = at_most.as_micros().div_ceil(1000).min(1000) as i32;
    // SAFETY: `polled` has N entries and outlives the call.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, millis) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        return match error.kind() {
            io::ErrorKind::Interrupted => Ok([false; N]),
            _ => Err(FabricError::Verb { verb: "poll", remedy: "", source: error }),
        };
    }
    Ok(polled.map(|entry| entry.revents != 0))
}

fn event_name(kind: rdma_cm_event_type::Type) -> &'static str {
    match kind {
        rdma_cm_event_type::RDMA_CM_EVENT_ADDR_RESOLVED => "ADDR_RESOLVED",
        rdma_cm_event_type::RDMA_CM_EVENT_ADDR_ERROR => "ADDR_ERROR",
        rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_RESOLVED => "ROUTE_RESOLVED",
        rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_ERROR => "ROUTE_ERROR",
        rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST => "CONNECT_REQUEST",
        rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_ERROR => "CONNECT_ERROR",
        rdma_cm_event_type::RDMA_CM_EVENT_UNREACHABLE => "UNREACHABLE",
        rdma_cm_event_type::RDMA_CM_EVENT_REJECTED => "REJECTED",
        rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED => "ESTABLISHED",
        rdma_cm_event_type::RDMA_CM_EVENT_DISCONNECTED => "DISCONNECTED",
        rdma_cm_event_type::RDMA_CM_EVENT_DEVICE_REMOVAL => "DEVICE_REMOVAL",
        rdma_cm_event_type::RDMA_CM_EVENT_ADDR_CHANGE => "ADDR_CHANGE",
        rdma_cm_event_type::RDMA_CM_EVENT_TIMEWAIT_EXIT => "TIMEWAIT_EXIT",
        _ => "an event without meaning here",
    }
}

fn event_remedy(kind: rdma_cm_event_type::Type) -> &'static str {
    match kind {
        rdma_cm_event_type::RDMA_CM_EVENT_ADDR_ERROR => "no RDMA device here reaches that address",
        rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_ERROR | rdma_cm_event_type::RDMA_CM_EVENT_UNREACHABLE => {
            "the peer has no RDMA device at that address, or the network drops its packets"
        }
        rdma_cm_event_type::RDMA_CM_EVENT_REJECTED => {
            "no process listens there, or the peer does not accept this connection"
        }
        rdma_cm_event_type::RDMA_CM_EVENT_DISCONNECTED => "the peer gave up; its log says why",
        _ => "try again; the kernel's log may say more",
    }
}

/// A socket address in C's form.
struct SockAddr(libc::sockaddr_storage);

impl SockAddr {
    fn new(address: SocketAddr) -> Self {
        // SAFETY: sockaddr_storage is plain numbers, for which zeros are valid.
        let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        match address {
            SocketAddr::V4(v4) => {
                let address = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from(*v4.ip()).to_be() },
                    sin_zero: [0; 8],
                };
                // SAFETY: sockaddr_storage is large and aligned enough for every address family.
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(address) };
            }
            SocketAddr::V6(v6) => {
                let address = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: v6.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                    sin6_scope_id: v6.scope_id(),
                };
                // SAFETY: sockaddr_storage is large and aligned enough for every address family.
                unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(address) };
            }
        }
        Self(storage)
    }

    fn as_ptr<T>(&mut self) -> *mut T {
        (&raw mut self.0).cast()
    }
}

fn socket_addr(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let start: *const libc::sockaddr_storage = storage;
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says which type is stored; the storage is large and aligned enough.
            let v4 = unsafe { start.cast::<libc::sockaddr_in>().read() };
            let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            Some(SocketAddr::new(IpAddr::V4(ip), u16::from_be(v4.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let v6 = unsafe { start.cast::<libc::sockaddr_in6>().read() };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            Some(SocketAddr::new(IpAddr::V6(ip), u16::from_be(v6.sin6_port)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn socket_addresses_survive_the_way_to_c_and_back() {
        for text in ["10.9.0.1:4444", "[fe80::1]:1", "0.0.0.0:0"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(socket_addr(&SockAddr::new(address).0), Some(address));
        }
    }
}
