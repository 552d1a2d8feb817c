//! A UNIX socket that listens at a path.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};

/// The socket. Its path is taken away at the end, if it is still this one's.
pub(super) struct LocalSocket {
    socket: Socket,
    path: PathBuf,
    /// Device and inode of the path.
    identity: (u64, u64),
}

impl LocalSocket {
    /// Listens at `path`; users with write permission by `mode` may connect. A socket that no program has open any more
    /// is replaced. Its calls don't block.
    pub(super) fn at(path: &Path, mode: u32) -> io::Result<Self> {
        let address = SockAddr::unix(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        match socket.bind(&address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_over(path, &address) => {
                fs::remove_file(path)?;
                socket.bind(&address)?;
            }
            bound => bound?,
        }
        // No connection is possible before listen, so there is no moment at which others may connect.
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        let made = fs::symlink_metadata(path)?;
        socket.listen(16)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, path: path.to_owned(), identity: (made.dev(), made.ino()) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The next connection.
    pub(super) fn accept(&self) -> io::Result<(Socket, SockAddr)> {
        self.socket.accept()
    }
}

impl AsFd for LocalSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for LocalSocket {
    fn drop(&mut self) {
        let now = fs::symlink_metadata(&self.path).map(|now| (now.dev(), now.ino()));
        if now.is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Checked with a socket of another type: a program that listens at the path does not notice it.
fn is_left_over(path: &Path, address: &SockAddr) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|about| about.file_type().is_socket());
    let refused = || Socket::new(Domain::UNIX, Type::DGRAM, None)?.connect(address);
    is_socket && refused().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}
