//! TCP: names, connecting, listening, and how soon a dead peer is noticed.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc;
use std::time::Duration;

use rustix::event::PollFlags;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, TcpKeepalive, Type};

use crate::sys::{Stop, StopReason};
use crate::transport::open::OpenError;
use crate::transport::{AllowList, ChannelError, StreamChannel, StreamOptions};

/// Keepalive probes without an answer after which the peer is dead.
const PROBES: u32 = 5;

/// Congestion control within a host: every kernel has it and lets everyone choose it. It sends what there is room for,
/// where BBR, which many hosts have as their default, waits for a timer between the segments.
const WITHIN_HOST: &[u8] = b"reno";

/// Connections that may wait to be accepted: a main channel and its page channels.
const BACKLOG: i32 = 256;

/// Sends at once what is written, and lets the kernel probe an idle connection so that a peer that answers
/// nothing is dead after `dead_peer`: half of it idle, then probes. What waits for an acknowledgement is
/// watched by the waits themselves. Buffer sizes are left to the kernel, which fits them to the path;
/// a fixed size would switch that off (tcp(7)) and gained nothing over loopback. So is the congestion control of a network;
/// within this host there is none to be careful of.
pub(crate) fn tune(fd: BorrowedFd<'_>, dead_peer: Duration) -> io::Result<()> {
    let second = Duration::from_secs(1);
    let idle = (dead_peer / 2).max(second);
    let interval = (dead_peer / 2 / PROBES).max(second);
    let keepalive = TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(PROBES);
    let socket = SockRef::from(&fd);
    socket.set_tcp_nodelay(true)?;
    if is_within_host(&socket) {
        // A kernel that does not let us is slower, and no less right.
        let _ = socket.set_tcp_congestion(WITHIN_HOST);
    }
    socket.set_tcp_keepalive(&keepalive)
}

/// True if both ends are this host: the kernel gives a connection to one of its own addresses the same address at both
/// ends.
pub(crate) fn is_within_host(socket: &SockRef<'_>) -> bool {
    let ip = |address: io::Result<SockAddr>| Some(address.ok()?.as_socket()?.ip().to_canonical());
    let (near, far) = (ip(socket.local_addr()), ip(socket.peer_addr()));
    near.zip(far).is_some_and(|(near, far)| near == far || near.is_loopback() && far.is_loopback())
}

/// Addresses of a host. Empty: loopback. The system's resolver can't be stopped, so it runs on a thread of
/// its own that is left to itself when the caller stops; a literal address needs none.
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
        // Nobody listens any more if the caller was stopped.
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
pub(crate) fn connect(
    host: &str,
    port: u16,
    options: &StreamOptions,
    stop: &Stop,
) -> Result<StreamChannel, OpenError> {
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
        // Before it is connected: a socket that BBR has once begun on is paced from then on, whatever sends by it.
        let _ = socket.set_tcp_congestion(WITHIN_HOST);
    }
    match socket.connect(&address.into()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
            let patience = stop.within(options.dead_peer);
            match patience.wait(socket.as_fd(), PollFlags::OUT).map_err(broken)? {
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

/// A listening TCP socket.
#[derive(Debug)]
pub(crate) struct TcpListener {
    socket: Socket,
    local: SocketAddr,
    allow: AllowList,
}

impl TcpListener {
    /// Listens on the first address of `host` that can be bound.
    pub(crate) fn bind(host: &str, port: u16, allow: AllowList, stop: &Stop) -> Result<Self, OpenError> {
        let mut last = io::Error::other("no address");
        for address in resolve(host, port, stop)? {
            match Self::bind_one(address) {
                Ok((socket, local)) => return Ok(Self { socket, local, allow }),
                Err(error) => last = error,
            }
        }
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

    fn bind_one(address: SocketAddr) -> io::Result<(Socket, SocketAddr)> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        // The port of a migration that has just ended may be used again at once.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        let local = socket.local_addr()?.as_socket();
        Ok((socket, local.ok_or_else(|| io::Error::other("the socket has no address"))?))
    }

    pub(crate) fn local(&self) -> SocketAddr {
        self.local
    }

    /// Waits for a connection from an allowed host; others are closed at once.
    pub(crate) fn accept(&self, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
        const ACCEPTING: &str = "waiting for a connection";
        let own = || format!("tcp:{}", self.local);
        let broken = |source| ChannelError::Io { peer: own(), doing: ACCEPTING, source };
        loop {
            if let Some(reason) = stop.wait(self.socket.as_fd(), PollFlags::IN).map_err(broken)? {
                return Err(ChannelError::Stopped { reason, doing: ACCEPTING }.into());
            }
            let (socket, from) = match self.socket.accept() {
                Ok((socket, from)) => (socket, from.as_socket()),
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(broken(error).into()),
            };
            match from {
                Some(from) if self.allow.allows(from.ip()) => {
                    let peer = format!("tcp:{from}");
                    return Ok(StreamChannel::from_fd(socket.into(), peer, options).map_err(broken)?);
                }
                from => tracing::warn!(?from, "closed a connection from a host that --allow does not name"),
            }
        }
    }
}

/// True if the connection went away before it was accepted (accept(2)).
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
            // IPv4 to a socket of both kinds: its address is then a mapped one.
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
}
