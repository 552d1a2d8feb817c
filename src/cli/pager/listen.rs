//! The socket that VMMs connect to, and which processes may connect.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use ramwire::sys::{Stop, peer_process};
use rustix::event::PollFlags;
use rustix::process::{Pid, PidfdFlags, geteuid, pidfd_open};

use super::super::local_socket::LocalSocket;
use super::super::output::{Repeated, note};
use super::super::remedies::in_words;

/// Rest after a failed accept, for example if no descriptor is left.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The socket. Its file is removed at the end.
pub(super) struct Listening {
    socket: LocalSocket,
    allowed: Vec<u32>,
}

/// A connected process that is allowed.
pub(super) struct Stranger {
    pub(super) connection: UnixStream,
    /// Readable when the process has ended; `None` if that can't be watched.
    pub(super) process: Option<OwnedFd>,
    pub(super) name: String,
}

impl Listening {
    /// Listens at `path`. A socket without a listener is replaced.
    pub(super) fn at(path: &Path, allow: &[u32]) -> Result<Self, String> {
        // The peer's credentials decide; the file's mode keeps other users out if only this process's own user may
        // connect.
        let mode = if allow.is_empty() { 0o600 } else { 0o666 };
        let socket = LocalSocket::at(path, mode).map_err(|error| {
            let hint = if error.kind() == io::ErrorKind::AddrInUse {
                "; end the process that listens there, or name another path"
            } else {
                ""
            };
            format!("--listen unix:{}: {error}{hint}", path.display())
        })?;
        Ok(Self { socket, allowed: [&[0, geteuid().as_raw()], allow].concat() })
    }

    /// The next allowed process; `None` when it is time to stop.
    ///
    /// # Errors
    /// The error of poll(2).
    pub(super) fn next(&self, stop: &Stop) -> io::Result<Option<Stranger>> {
        let mut failing = Repeated::default();
        while stop.wait(self.socket.as_fd(), PollFlags::IN)?.is_none() {
            let connection = match self.socket.accept() {
                Ok((connection, _)) => UnixStream::from(connection),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => {
                    failing.note(format!("ramwire pager: a VMM could not be accepted: {}", in_words(&error)));
                    let _ = stop.sleep(RETRY_INTERVAL);
                    continue;
                }
            };
            match self.checked(connection) {
                Ok(stranger) => return Ok(Some(stranger)),
                Err(why) => note!("ramwire pager: {why}"),
            }
        }
        Ok(None)
    }

    fn checked(&self, connection: UnixStream) -> Result<Stranger, String> {
        let who = peer_process(connection.as_fd())
            .map_err(|error| format!("a VMM was refused: its user is not known: {error}"))?;
        let uid = who.uid;
        let name = match who.pid {
            Some(pid) => format!("process {pid} of user {uid}"),
            None => format!("a process of user {uid}"),
        };
        if !self.allowed.contains(&uid) {
            return Err(format!("{name} was refused; --allow-uid {uid} lets it in"));
        }
        let pid = who.pid.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let process = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Ok(Stranger { connection, process, name })
    }
}
