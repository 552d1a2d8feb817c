//! The guardian of a relay: a small process that holds the source's connection while the guest may run at the far end.
//!
//! A QEMU that has handed over its guest resumes it when its connection closes without an answer. So if a relay is
//! killed between COMMIT and the far end's answer, that connection must stay open. This command starts itself again in
//! a hidden mode before it takes a guest. Before COMMIT it passes duplicates of both connections to that process. The
//! process ends with the relay, unless the relay ends in doubt: then it continues until the far end answers, the source
//! has disconnected, or an operator decides.
//!
//! The keys of an encrypted connection end with the relay. So the guardian reads no answer of a far end with TLS, and can
//! tell a source with TLS nothing: that source gets its guest back by the end of its connection, or keeps waiting.

mod process;
mod words;

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ramwire::session::{Guard, Held};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

pub(super) use process::run;
pub(super) use words::advice;

/// The hidden first argument that makes this command a guardian.
pub(super) const ARGUMENT: &str = "relay-guardian";

/// From the relay: this message carries the source's connections and the far end's, the kinds of their peers, whether the
/// source has switched to postcopy, how many of the descriptors are the source's others, for urgent pages, and whether the
/// source's are encrypted.
const HOLD: u8 = b'h';
/// From the relay: the connections need not be held any more.
const RELEASE: u8 = b'r';
/// From the guardian: it runs, and ignores the signals that end other processes.
const UP: u8 = b'u';
/// From the guardian: it has the connections.
const HOLDS: u8 = b'k';

/// Most connections of the source that are held beside the first.
const MAX_URGENT: usize = 16;
/// Descriptors of a message.
const MAX_HELD: usize = MAX_URGENT + 2;

/// Longest time in which the process must start: before a guest is taken.
const START: Duration = Duration::from_secs(30);

/// Longest time for its answer while the guest is paused.
const ANSWER: Duration = Duration::from_secs(5);

/// The relay's handle for the guardian.
pub(super) struct Guardian {
    control: UnixStream,
    child: Child,
}

impl Guardian {
    /// Starts the process and waits until it runs.
    ///
    /// # Errors
    /// The error of starting a process, or that it ended immediately.
    pub(super) fn start() -> io::Result<Self> {
        let (mut control, theirs) = UnixStream::pair()?;
        // The running program, even if its file has been replaced since; or, without /proc, the file.
        let program = match std::fs::metadata("/proc/self/exe") {
            Ok(_) => "/proc/self/exe".into(),
            Err(_) => std::env::current_exe()?,
        };
        let child = Command::new(program)
            .arg(ARGUMENT)
            .env_clear()
            .current_dir("/")
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        control.set_read_timeout(Some(START))?;
        let mut guardian = Self { control: control.try_clone()?, child };
        expect(&mut control, UP).inspect_err(|_| guardian.end())?;
        control.set_read_timeout(Some(ANSWER))?;
        Ok(guardian)
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn end(&mut self) {
        // It ends when it reads this, or the end of the connection.
        let _ = self.control.write_all(&[RELEASE]);
        let _ = self.control.shutdown(std::net::Shutdown::Write);
        let _ = self.child.wait();
    }
}

fn expect(control: &mut UnixStream, due: u8) -> io::Result<()> {
    let mut answer = [0];
    control.read_exact(&mut answer)?;
    if answer[0] == due { Ok(()) } else { Err(io::Error::other("it answers something else")) }
}

impl Guard for Guardian {
    fn hold(&mut self, held: &Held<'_>) -> io::Result<()> {
        let [native, far_native, switched, encrypted] =
            [held.source_is_native, held.far_end_is_native, held.switched, held.source_is_encrypted]
                .map(u8::from);
        let urgent = u8::try_from(held.urgent.len()).unwrap_or(u8::MAX);
        let words = [HOLD, native, far_native, switched, urgent, encrypted];
        let connections: Vec<_> =
            std::iter::once(held.source).chain(held.urgent.iter().copied()).chain(held.far_end).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_HELD))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&connections)) {
            return Err(io::Error::other(format!("there is no room for {} descriptors", connections.len())));
        }
        sendmsg(self.control.as_fd(), &[IoSlice::new(&words)], &mut ancillary, SendFlags::NOSIGNAL)?;
        expect(&mut self.control, HOLDS).map_err(|error| {
            io::Error::new(error.kind(), format!("process {} does not answer: {error}", self.pid()))
        })
    }

    fn release(&mut self) {
        self.end();
    }
}

impl Drop for Guardian {
    /// No effect after [`release`](Guard::release): the process has ended.
    fn drop(&mut self) {
        self.end();
    }
}
