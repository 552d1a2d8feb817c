//! UNIX stream sockets (`unix:`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};

use super::tcp::is_gone;
use crate::sys::Stop;
use crate::transport::open::{
    Listening, Scheme, SchemeAbilities, Sockets, TlsCover, open_stream, parse_path,
};
use crate::transport::{ChannelError, OpenError, StreamChannel, StreamOptions};

pub(in crate::transport) static SCHEME: Scheme = Scheme {
    name: "unix",
    form: "unix:PATH",
    hint: "unix:/run/guest.sock",
    parse: parse_path,
    abilities: SchemeAbilities {
        page_channels: true,
        pages_in_stream: true,
        answers: true,
        tls: TlsCover::Everything,
        decides_late: false,
    },
    open: open_stream,
    connect: |address, options, stop| connect(address.file(), options, stop),
    listen: |address, _, _| {
        let listening = UnixListener::bind(address.file())?;
        let tls = address.tls().cloned();
        Ok(Box::new(Sockets { listening, addresses: vec![address.clone()], open_to_network: false, tls }))
    },
};

/// Connects to the socket at `path`.
fn connect(path: &Path, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
    const CONNECTING: &str = "connecting";
    /// Time after which a connection to a listener with a full queue is retried: there is no event when it has room.
    const AGAIN: Duration = Duration::from_millis(10);
    let peer = format!("unix:{}", path.display());
    let broken = |source| ChannelError::Io { peer: peer.clone(), doing: CONNECTING, source };
    let address = SockAddr::unix(path).map_err(broken)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(broken)?;
    socket.set_nonblocking(true).map_err(broken)?;
    loop {
        match socket.connect(&address) {
            Ok(()) => break,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if let Some(reason) = stop.sleep(AGAIN) {
                    return Err(ChannelError::Stopped { reason, doing: CONNECTING }.into());
                }
            }
            Err(error) => return Err(broken(error).into()),
        }
    }
    Ok(StreamChannel::from_fd(socket.into(), peer.clone(), options).map_err(broken)?)
}

/// A listening UNIX socket; a path that was made here is removed with it.
#[derive(Debug)]
pub(crate) struct UnixListener {
    socket: Socket,
    path: PathBuf,
    /// Device and inode of the path, if this process created it.
    identity: Option<(u64, u64)>,
}

impl UnixListener {
    /// Listens at `path`, to which only its owner may connect. A socket left there by a program that has ended is
    /// replaced; any other file is left alone.
    pub(crate) fn bind(path: &Path) -> Result<Self, OpenError> {
        let address = || format!("unix:{}", path.display());
        Self::try_bind(path).map_err(|source| {
            let remedy = match source.kind() {
                io::ErrorKind::AddrInUse => {
                    "another program listens there, or it is no socket: choose another path"
                }
                io::ErrorKind::NotFound => "make its directory first",
                _ => "choose another path",
            };
            OpenError::Open { address: address(), doing: "listening", remedy, source }
        })
    }

    fn try_bind(path: &Path) -> io::Result<Self> {
        let address = SockAddr::unix(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        match socket.bind(&address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_over(path, &address) => {
                std::fs::remove_file(path)?;
                socket.bind(&address)?;
            }
            bound => bound?,
        }
        // No process can connect before listen, so other users never can.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        let made = std::fs::symlink_metadata(path)?;
        socket.listen(16)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, path: path.to_owned(), identity: Some((made.dev(), made.ino())) })
    }

    /// A socket that listens already, at a path of another program's; it is non-blocking.
    pub(super) fn handed_over(socket: Socket, path: &Path) -> Self {
        Self { socket, path: path.to_owned(), identity: None }
    }
}

impl Listening for UnixListener {
    fn sockets(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.socket.as_fd()]
    }

    fn place(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    fn take(&self, options: &StreamOptions) -> Result<Option<StreamChannel>, ChannelError> {
        let broken =
            |source| ChannelError::Io { peer: self.place(), doing: "accepting a connection", source };
        match self.socket.accept() {
            Ok((socket, _)) => {
                StreamChannel::from_fd(socket.into(), self.place(), options).map(Some).map_err(broken)
            }
            Err(error) if is_gone(&error) => Ok(None),
            Err(error) => Err(broken(error)),
        }
    }
}

/// True if `path` is a socket that no program uses any more.
///
/// The check uses a socket of another type. If a program uses the path, the kernel refuses it because of the type
/// (EPROTOTYPE), and that program does not notice. A connection would take the place of the source that the program
/// waits for.
fn is_left_over(path: &Path, address: &SockAddr) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    let refused = || Socket::new(Domain::UNIX, Type::DGRAM, None)?.connect(address);
    is_socket && refused().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

impl Drop for UnixListener {
    fn drop(&mut self) {
        let now = std::fs::symlink_metadata(&self.path).map(|meta| (meta.dev(), meta.ino()));
        if self.identity.is_some() && now.ok() == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
