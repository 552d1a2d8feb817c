//! The socket that the monitor's clients connect to.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};

use super::super::local_socket::LocalSocket;

/// When a client's host that answers nothing is asked, and how often.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// The address of a monitor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Place {
    Unix(PathBuf),
    Tcp(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(place) => write!(f, "tcp:{place}"),
        }
    }
}

impl FromStr for Place {
    type Err = String;

    /// `unix:PATH` or `tcp:HOST:PORT`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", place))
                if place.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) =>
            {
                Ok(Self::Tcp(place.to_owned()))
            }
            _ => Err(format!("{text:?} is neither unix:PATH nor tcp:HOST:PORT")),
        }
    }
}

/// A socket that listens. The path of a UNIX one goes with it.
pub(super) enum Listener {
    Unix(LocalSocket),
    Tcp(Socket),
}

impl Listener {
    /// Listens. Only its owner may connect to a path.
    pub(super) fn at(place: &Place) -> io::Result<Self> {
        match place {
            Place::Unix(path) => LocalSocket::at(path, 0o600).map(Self::Unix),
            Place::Tcp(place) => {
                let mut last = io::ErrorKind::AddrNotAvailable.into();
                for address in place.to_socket_addrs()? {
                    match listen(address) {
                        Ok(socket) => return Ok(Self::Tcp(socket)),
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    /// The address at which it listens, as text.
    pub(super) fn place(&self) -> String {
        match self {
            Self::Unix(socket) => Place::Unix(socket.path().to_owned()).to_string(),
            Self::Tcp(socket) => {
                let address = socket.local_addr().ok().and_then(|address| address.as_socket());
                address.map_or_else(|| "tcp:?".into(), |address| format!("tcp:{address}"))
            }
        }
    }

    /// Others than this host's programs can reach it.
    pub(super) fn is_open_to_the_network(&self) -> bool {
        let Self::Tcp(socket) = self else { return false };
        let address = socket.local_addr().ok().and_then(|address| address.as_socket());
        !address.is_some_and(|address| address.ip().is_loopback())
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.as_fd(),
            Self::Tcp(socket) => socket.as_fd(),
        }
    }

    /// The next client with its name; `None` if it has left already.
    pub(super) fn accept(&self) -> io::Result<Option<(OwnedFd, String)>> {
        let accepted = match self {
            Self::Unix(socket) => socket.accept(),
            Self::Tcp(socket) => socket.accept(),
        };
        let (socket, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        socket.set_nonblocking(true)?;
        let name = match (self, from.as_socket()) {
            (Self::Tcp(_), Some(address)) => {
                let often = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
                socket.set_tcp_keepalive(&often)?;
                format!("the client at {address}")
            }
            _ => format!("a client of {}", self.place()),
        };
        Ok(Some((socket.into(), name)))
    }
}

fn listen(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(16)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
