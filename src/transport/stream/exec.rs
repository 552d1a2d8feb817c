//! A shell command at the other end of a stream (`exec:`).
//!
//! The source writes to the command's standard input, the destination reads its standard output; the other stream of
//! the two is not used, and further output of the command goes to standard error. The command gets a process group of
//! its own, so that all its processes are killed on failure. The terminal stays ours: the kernel stops a command that
//! reads from it (ssh, for a password), which is an error here.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid,
};

use super::opened;
use crate::sys::{Lock as _, Stop, StopReason};
use crate::transport::open::{OneStream, Scheme, SchemeAbilities, TlsCover, open_stream, parse_command};
use crate::transport::{ChannelError, StreamChannel, StreamOptions};

const DOING: &str = "waiting for the command to end";

/// Longest time between two checks of a running command: there is no event for a stopped one.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

pub(in crate::transport) static SCHEME: Scheme = Scheme {
    name: "exec",
    form: "exec:COMMAND",
    hint: "exec:COMMAND",
    parse: parse_command,
    abilities: SchemeAbilities {
        page_channels: false,
        pages_in_stream: true,
        answers: false,
        tls: TlsCover::Nothing,
        decides_late: false,
    },
    open: open_stream,
    connect: |address, options, _| opened(address, REMEDY, write_to(address.command(), options)),
    listen: |address, _, _| {
        Ok(OneStream::at(address, |address, options| {
            opened(address, REMEDY, read_from(address.command(), options))
        }))
    },
};

const REMEDY: &str = "the command needs a shell `sh` on the PATH";

/// A running command; killed with everything it started, unless its end was awaited.
#[derive(Debug)]
pub(crate) struct ChildCommand {
    command: String,
    running: Mutex<Running>,
    /// Readable once the command has ended.
    ended: OwnedFd,
}

#[derive(Debug)]
struct Running {
    child: Child,
    /// Reaped: its id may belong to another process by now.
    reaped: bool,
}

impl Running {
    fn kill(&mut self) {
        if let (false, Some(group)) = (self.reaped, Pid::from_raw(self.child.id().cast_signed())) {
            let _ = kill_process_group(group, Signal::KILL);
            let _ = self.child.wait();
            self.reaped = true;
        }
    }
}

/// Starts `command` and writes the stream to its standard input, a socket: writing to a command that has ended is then
/// an error instead of a signal.
fn write_to(command: &str, options: &StreamOptions) -> io::Result<StreamChannel> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let stderr = Stdio::from(io::stderr().as_fd().try_clone_to_owned()?);
    let child = ChildCommand::spawn(command, Stdio::from(theirs), stderr)?;
    StreamChannel::of_command(ours, child, options)
}

/// Starts `command` and reads the stream from its standard output.
fn read_from(command: &str, options: &StreamOptions) -> io::Result<StreamChannel> {
    let (ours, theirs) = io::pipe()?;
    let child = ChildCommand::spawn(command, Stdio::null(), Stdio::from(OwnedFd::from(theirs)))?;
    StreamChannel::of_command(ours.into(), child, options)
}

impl ChildCommand {
    fn spawn(command: &str, stdin: Stdio, stdout: Stdio) -> io::Result<Self> {
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(command).stdin(stdin).stdout(stdout).process_group(0);
        let mut running = Running { child: shell.spawn()?, reaped: false };
        let pidfd = Pid::from_raw(running.child.id().cast_signed())
            .ok_or_else(|| io::Error::other("the command has no process id"))
            .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
        match pidfd {
            Ok(ended) => Ok(Self { command: command.to_owned(), running: Mutex::new(running), ended }),
            Err(error) => {
                running.kill();
                Err(error)
            }
        }
    }

    pub(crate) fn command(&self) -> &str {
        &self.command
    }

    /// Checks that the command still runs.
    ///
    /// # Errors
    /// [`ChannelError::CommandAsks`] if the kernel has stopped it because it tried to use the terminal.
    pub(crate) fn check(&self) -> Result<(), ChannelError> {
        // Its status is left for the caller that waits for it; an operator may continue a stopped command.
        let options = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let found = waitid(WaitId::PidFd(self.ended.as_fd()), options).ok().flatten();
        let signal = found.and_then(|found| found.stopping_signal());
        let by_terminal = [Signal::TTIN, Signal::TTOU].map(Signal::as_raw);
        if signal.is_some_and(|signal| by_terminal.contains(&signal)) {
            return Err(ChannelError::CommandAsks { command: self.command.clone() });
        }
        Ok(())
    }

    /// Waits until the command has ended.
    ///
    /// # Errors
    /// [`ChannelError::CommandFailed`] unless its status is 0; `CommandAsks`; `Stalled` after `limit`; `Stopped`.
    pub(crate) fn wait(&self, limit: Option<Duration>, stop: &Stop) -> Result<(), ChannelError> {
        let bounded = limit.map_or_else(|| stop.clone(), |limit| stop.within(limit));
        let peer = || format!("exec:{}", self.command);
        let broken = |source| ChannelError::Io { peer: peer(), doing: DOING, source };
        let ended = || bounded.within(POLL_INTERVAL).wait(self.ended.as_fd(), PollFlags::IN);
        while ended().map_err(broken)?.is_some() {
            self.check()?;
            match (bounded.reason(), limit) {
                (None, _) => {}
                (Some(StopReason::Deadline), Some(after)) if stop.reason().is_none() => {
                    return Err(ChannelError::Stalled { peer: peer(), doing: DOING, after });
                }
                (Some(reason), _) => return Err(ChannelError::Stopped { reason, doing: DOING }),
            }
        }
        let mut running = self.running.locked();
        let status = running.child.wait().map_err(broken)?;
        running.reaped = true;
        if status.success() {
            return Ok(());
        }
        Err(ChannelError::CommandFailed { command: self.command.clone(), status: in_words(status) })
    }
}

fn in_words(status: ExitStatus) -> String {
    // A shell that does not find the command exits with 127, which the error mentions.
    match status.code() {
        Some(127) => "exit status 127, command not found".to_owned(),
        _ => status.to_string(),
    }
}

impl Drop for ChildCommand {
    fn drop(&mut self) {
        self.running.get_mut().unwrap_or_else(PoisonError::into_inner).kill();
    }
}
