//! TCP: names, connecting, listening, and detection of a dead peer.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc;
use std::time::Duration;

use rustix::event::PollFlags;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};

use crate::sys::{Stop, StopReason};
use crate::transport::open::{
    Listening, Scheme, SchemeAbilities, Sockets, TlsCover, open_stream, parse_host,
};
use crate::transport::{Address, AllowList, ChannelError, OpenError, StreamChannel, StreamOptions};

pub(in crate::transport) static SCHEME: Scheme = Scheme {
    name: "tcp",
    form: "tcp:HOST:PORT",
    hint: "tcp:HOST:PORT, an IPv6 address as tcp:[::1]:4444",
    parse: parse_host,
    abilities: SchemeAbilities {
        page_channels: true,
        pages_in_stream: true,
        answers: true,
        tls: TlsCover::Everything,
        decides_late: false,
    },
    open: open_stream,
    connect: |address, options, stop| {
        let (host, port) = address.host();
        connect(host, port, options, stop)
    },
    listen: |address, allow, stop| Ok(Box::new(Sockets::of_tcp(address, allow, stop, Address::tcp)?)),
};

impl Sockets<TcpListener> {
    /// Listens at the host and port of `address`, with its TLS settings. `named` makes the addresses that sources use.
    ///
    /// # Errors
    /// [`OpenError`].
    pub(in crate::transport) fn of_tcp(
        address: &Address,
        allow: AllowList,
        stop: &Stop,
        named: fn(String, u16) -> Address,
    ) -> Result<Self, OpenError> {
        let (host, port) = address.host();
        let listening = TcpListener::bind(host, port, allow, stop)?;
        let here = |local: SocketAddr| named(host_of(local), local.port()).with_tls_of(address);
        let addresses = listening.locals().map(here).collect();
        let open_to_network = !listening.is_loopback();
        Ok(Self { listening, addresses, open_to_network, tls: address.tls().cloned() })
    }
}

/// Number of unanswered keepalive probes after which the peer counts as dead.
const PROBES: u32 = 5;

/// Longest interval between two probes that a kernel accepts (MAX_TCP_KEEPIDLE, MAX_TCP_KEEPINTVL).
const MAX_IDLE: Duration = Duration::from_secs(32767);

/// Congestion control within a host: every kernel has it and lets every process choose it. It sends as much as there is
/// room for. BBR, which many hosts have as their default, waits for a timer between the segments.
const WITHIN_HOST: &[u8] = b"reno";

/// Connections that may wait to be accepted: a main channel and its page channels.
const BACKLOG: i32 = 256;

/// How often another port is tried if any port will do and a host has several addresses.
const FREE_PORT_TRIES: u32 = 16;

/// Sends written bytes immediately, and lets the kernel probe an idle connection so that a peer that answers nothing
/// counts as dead after `dead_peer`: half of it idle, then probes. The waits themselves watch bytes that wait for an
/// acknowledgement. Buffer sizes are left to the kernel, which adapts them to the path; a fixed size would switch that
/// off (tcp(7)) and gained nothing over loopback. The congestion control of a network is also left to the kernel;
/// within this host none is needed.
pub(crate) fn tune(fd: BorrowedFd<'_>, dead_peer: Duration) -> io::Result<()> {
    let socket = SockRef::from(&fd);
    socket.set_tcp_nodelay(true)?;
    if is_within_host(&socket) {
        // If the kernel does not allow it, the connection is slower but still correct.
        let _ = socket.set_tcp_congestion(WITHIN_HOST);
    }
    keep_alive(&socket, dead_peer)
}

/// Lets the kernel probe an idle connection, so that it breaks once the peer has answered nothing for `dead_peer`.
pub(super) fn keep_alive(socket: &SockRef<'_>, dead_peer: Duration) -> io::Result<()> {
    let second = Duration::from_secs(1);
    let idle = (dead_peer / 2).clamp(second, MAX_IDLE);
    let interval = (dead_peer / 2 / PROBES).clamp(second, MAX_IDLE);
    let keepalive = TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

/// True if both ends are this host: the kernel gives a connection to one of its own addresses the same address at both
/// ends.
pub(crate) fn is_within_host(socket: &SockRef<'_>) -> bool {
    let ip = |address: io::Result<SockAddr>| Some(address.ok()?.as_socket()?.ip().to_canonical());
    let (near, far) = (ip(socket.local_addr()), ip(socket.peer_addr()));
    near.zip(far).is_some_and(|(near, far)| near == far || near.is_loopback() && far.is_loopback())
}

/// Addresses of a host. Empty: loopback. The system's resolver can't be interrupted, so it runs on a thread of its own,
/// which is detached when the caller stops; a literal address needs none.
fn resolve(host: &str, port: u16, stop: &Stop) -> Result<Vec<SocketAddr>, OpenError> {
    let failed = |source| OpenError::Resolve { host: host.to_owned(), source };
    if host.is_empty() {
        return Ok(vec![(Ipv4Addr::LOCALHOST, port).into()]);
    }
    if let Ok(literal) = host.parse::<IpAddr>() {
        return Ok(vec![(literal, port).into()]);
    }
    let (done, ended) = io::pipe().map_err(failed)?;
    let (sender, answer) = mpsc::channel();
    let name = host.to_owned();
    let look_up = move || {
        let _open_until_done = ended;
        // The receiver is gone if the caller was stopped.
        let _ = sender.send((name.as_str(), port).to_socket_addrs().map(Vec::from_iter));
    };
    std::thread::Builder::new().name("resolve".into()).spawn(look_up).map_err(failed)?;
    if let Some(reason) = stop.wait(done.as_fd(), PollFlags::IN).map_err(failed)? {
        return Err(ChannelError::Stopped { reason, doing: "looking up the host's name" }.into());
    }
    match answer.recv() {
        Ok(Ok(found)) if found.is_empty() => Err(failed(io::Error::other("no address"))),
        Ok(found) => found.map_err(failed),
        Err(_) => Err(failed(io::Error::other("the resolver gave no answer"))),
    }
}

/// Connects to the first address of `host` that answers.
fn connect(host: &str, port: u16, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
    let mut last = None;
    for address in resolve(host, port, stop)? {
        match connect_one(address, options, stop) {
            Err(error @ ChannelError::Stopped { .. }) => return Err(error.into()),
            Err(error) => last = Some(error),
            Ok(channel) => return Ok(channel),
        }
    }
    let nothing = || ChannelError::Closed { peer: format!("tcp:{host}:{port}"), doing: CONNECTING };
    Err(last.unwrap_or_else(nothing).into())
}

const CONNECTING: &str = "connecting";

fn connect_one(
    address: SocketAddr,
    options: &StreamOptions,
    stop: &Stop,
) -> Result<StreamChannel, ChannelError> {
    let peer = format!("tcp:{address}");
    let broken = |source| ChannelError::Io { peer: peer.clone(), doing: CONNECTING, source };
    let socket =
        Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).map_err(broken)?;
    socket.set_nonblocking(true).map_err(broken)?;
    if address.ip().to_canonical().is_loopback() {
        // Set before connecting: after BBR has started on a socket, the socket stays paced, whatever congestion control
        // follows.
        let _ = socket.set_tcp_congestion(WITHIN_HOST);
    }
    match socket.connect(&address.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            let limit = stop.within(options.dead_peer);
            match limit.wait(socket.as_fd(), PollFlags::OUT).map_err(broken)? {
                None => {}
                Some(StopReason::Deadline) if stop.reason().is_none() => {
                    return Err(ChannelError::Silent { peer, doing: CONNECTING, after: options.dead_peer });
                }
                Some(reason) => return Err(ChannelError::Stopped { reason, doing: CONNECTING }),
            }
            if let Some(error) = socket.take_error().map_err(broken)? {
                return Err(broken(error));
            }
        }
        Err(error) => return Err(broken(error)),
    }
    StreamChannel::from_fd(socket.into(), peer.clone(), options).map_err(broken)
}

/// Listening TCP sockets, one for each address of a host.
#[derive(Debug)]
pub(crate) struct TcpListener {
    sockets: Vec<(Socket, SocketAddr)>,
    allow: AllowList,
}

impl TcpListener {
    /// Listens on all addresses of `host`, at one port. An address that this host does not have (such as `::1` from
    /// `/etc/hosts` with IPv6 off) is left out if there is another. An address whose port is in use is an error, since
    /// a source would connect to the other program.
    pub(crate) fn bind(host: &str, port: u16, allow: AllowList, stop: &Stop) -> Result<Self, OpenError> {
        let mut addresses = resolve(host, port, stop)?;
        let mut seen = HashSet::new();
        addresses.retain(|address| seen.insert(*address));
        let mut bound = Self::bind_all(&addresses);
        for _ in 1..FREE_PORT_TRIES {
            match &bound {
                // The port that was free at the first address is in use at another.
                Err(error) if port == 0 && error.kind() == io::ErrorKind::AddrInUse => {
                    bound = Self::bind_all(&addresses);
                }
                _ => break,
            }
        }
        let last = match bound {
            Ok(sockets) => return Ok(Self { sockets, allow }),
            Err(error) => error,
        };
        let remedy = match last.kind() {
            io::ErrorKind::AddrInUse => "another program listens there: choose another port",
            io::ErrorKind::AddrNotAvailable => "name an address of this host (see `ip address`)",
            io::ErrorKind::PermissionDenied => "choose a port from 1024 on",
            _ => "choose another address",
        };
        Err(OpenError::Open {
            address: format!("tcp:{host}:{port}"),
            doing: "listening",
            remedy,
            source: last,
        })
    }

    /// A socket that listens at `local` already; it is non-blocking.
    pub(super) fn handed_over(socket: Socket, local: SocketAddr, allow: AllowList) -> Self {
        Self { sockets: vec![(socket, local)], allow }
    }

    fn bind_all(addresses: &[SocketAddr]) -> io::Result<Vec<(Socket, SocketAddr)>> {
        let mut sockets: Vec<(Socket, SocketAddr)> = Vec::new();
        let mut missing = io::Error::other("no address");
        for address in addresses {
            let mut address = *address;
            if let Some((_, first)) = sockets.first() {
                address.set_port(first.port());
            }
            match Self::bind_one(address, addresses.len() > 1) {
                Ok(bound) => sockets.push(bound),
                Err(error) if is_not_here(&error) => {
                    if addresses.len() > 1 {
                        tracing::warn!(%address, %error, "an address of the host is not listened on");
                    }
                    missing = error;
                }
                Err(error) => return Err(error),
            }
        }
        if sockets.is_empty() { Err(missing) } else { Ok(sockets) }
    }

    /// `one_of_several`: an IPv6 socket leaves IPv4 to the other sockets.
    fn bind_one(address: SocketAddr, one_of_several: bool) -> io::Result<(Socket, SocketAddr)> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if one_of_several && address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        // The port of a migration that has just ended may be reused immediately.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        let local = socket.local_addr()?.as_socket();
        Ok((socket, local.ok_or_else(|| io::Error::other("the socket has no address"))?))
    }

    /// The addresses it listens on; never empty.
    pub(crate) fn locals(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.sockets.iter().map(|(_, local)| *local)
    }

    /// The port, the same at all addresses.
    #[cfg(feature = "rdma")]
    pub(crate) fn port(&self) -> u16 {
        self.locals().next().map_or(0, |local| local.port())
    }

    /// True if only this machine can connect.
    pub(crate) fn is_loopback(&self) -> bool {
        self.locals().all(|local| local.ip().to_canonical().is_loopback())
    }
}

impl Listening for TcpListener {
    fn sockets(&self) -> Vec<BorrowedFd<'_>> {
        self.sockets.iter().map(|(socket, _)| socket.as_fd()).collect()
    }

    fn place(&self) -> String {
        self.locals().map(|local| format!("tcp:{local}")).collect::<Vec<_>>().join(", ")
    }

    /// Connections from hosts that are not allowed are closed.
    fn take(&self, options: &StreamOptions) -> Result<Option<StreamChannel>, ChannelError> {
        let broken =
            |source| ChannelError::Io { peer: self.place(), doing: "accepting a connection", source };
        for (listening, _) in &self.sockets {
            let (socket, from) = match listening.accept() {
                Ok((socket, from)) => (socket, from.as_socket()),
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(broken(error)),
            };
            match from {
                Some(from) if self.allow.admits(from.ip()) => {
                    let peer = format!("tcp:{from}");
                    return StreamChannel::from_fd(socket.into(), peer, options).map(Some).map_err(broken);
                }
                // Closed, and reported.
                _ => {}
            }
        }
        Ok(None)
    }
}

/// As the host part of an address: a link-local address includes its interface, without which no peer can connect to
/// it.
pub(crate) fn host_of(local: SocketAddr) -> String {
    match local {
        SocketAddr::V6(local) if local.scope_id() != 0 => format!("{}%{}", local.ip(), local.scope_id()),
        local => local.ip().to_string(),
    }
}

/// True if this host does not have the address, or its address family.
fn is_not_here(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

/// True if the connection was closed before it was accepted (accept(2)).
pub(crate) fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::net::TcpStream;

    #[test]
    fn only_a_connection_within_this_host_leaves_the_hosts_own_congestion_control() {
        let limit = Duration::from_secs(10);
        for host in ["127.0.0.1", "::1", "::"] {
            let Ok(listener) = std::net::TcpListener::bind((host, 0)) else {
                eprintln!("skipped {host}: this host has no IPv6");
                continue;
            };
            let port = listener.local_addr().unwrap().port();
            // IPv4 to a socket of both families: its address is then a mapped one.
            let near = TcpStream::connect((if host == "::" { "127.0.0.2" } else { host }, port)).unwrap();
            let (far, _) = listener.accept().unwrap();
            for end in [&near, &far] {
                tune(end.as_fd(), limit).unwrap();
                let chosen = SockRef::from(end).tcp_congestion().unwrap();
                assert!(chosen.starts_with(WITHIN_HOST), "{host}: {chosen:?}");
            }
        }
        let alone = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
        let before = alone.tcp_congestion().unwrap();
        tune(alone.as_fd(), limit).unwrap();
        assert_eq!(alone.tcp_congestion().unwrap(), before);
    }

    fn locals_of(bound: &[(Socket, SocketAddr)]) -> Vec<SocketAddr> {
        bound.iter().map(|(_, local)| *local).collect()
    }

    #[test]
    fn all_addresses_of_a_host_are_listened_on_at_one_port() {
        let any = |host: &str| SocketAddr::new(host.parse().unwrap(), 0);
        let hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3"].map(any);
        let bound = TcpListener::bind_all(&hosts).unwrap();
        let locals = locals_of(&bound);
        assert_eq!(locals.len(), 3);
        assert!(locals.iter().all(|local| local.port() == locals[0].port() && local.port() != 0));
        let listener = TcpListener { sockets: bound, allow: AllowList::default() };
        for local in locals.iter().rev() {
            let near = TcpStream::connect(local).unwrap();
            let stop = Stop::never().within(Duration::from_secs(20));
            let options = StreamOptions::default();
            let served = crate::transport::open::candidates::accept(&listener, &options, &stop).unwrap();
            assert_eq!(served.peer(), format!("tcp:{}", near.local_addr().unwrap()));
        }
        // An address that is not this host's is left out if there are others, and is an error if it is the only one;
        // one that is in use always is an error.
        let foreign = any("192.0.2.1");
        assert_eq!(TcpListener::bind_all(&[foreign, any("127.0.0.1")]).unwrap().len(), 1);
        let error = TcpListener::bind_all(&[foreign]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
        let taken = [locals[1], SocketAddr::new(any("127.0.0.9").ip(), locals[1].port())];
        for order in [[taken[0], taken[1]], [taken[1], taken[0]]] {
            let error = TcpListener::bind_all(&order).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        }
    }

    #[test]
    fn a_link_local_address_is_written_with_its_interface() {
        let link_local = SocketAddr::V6("[fe80::1%3]:9".parse().unwrap());
        assert_eq!(host_of(link_local), "fe80::1%3");
        assert_eq!(host_of("[::1]:9".parse().unwrap()), "::1");
        assert_eq!(host_of("10.0.0.1:9".parse().unwrap()), "10.0.0.1");
    }
}
