//! The guardian's own process.

use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ramwire::stream::native::Answer;
use ramwire::stream::qemu::package::{PING_LOADED, PING_TAKEN};
use ramwire::stream::qemu::return_path::{Message, decode_message};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, Shutdown, recvmsg};
use rustix::process::{Signal, getppid, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};

use super::words::{advice, say};
use super::{HOLD, HOLDS, MAX_HELD, RELEASE, UP};

/// Longest time between two checks for signals, which may come just before a wait.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// How long the source may take to read the message.
const REPORT_TIMEOUT: Duration = Duration::from_secs(60);

/// The held connections.
struct Connections {
    source: OwnedFd,
    /// The source's others, of which one is for urgent pages. They only stay open.
    _urgent: Vec<OwnedFd>,
    source_is_native: bool,
    /// Nothing can be told to it.
    source_is_encrypted: bool,
    far_end: Option<OwnedFd>,
    far_end_is_native: bool,
    /// The source has switched to postcopy.
    switched: bool,
    /// Bytes of an incomplete answer.
    answer: Vec<u8>,
}

/// What ends a guardian.
enum End {
    SourceGone,
    Runs,
    /// Postcopy: the far end has taken the guest, and pages are missing there.
    Taken,
    DoesNotRun(&'static str),
}

/// The hidden mode: standard input is the connection to the relay.
pub(in crate::cli) fn run() -> ExitCode {
    match guard() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("the guardian of the source's connection failed: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn guard() -> io::Result<()> {
    // Its own session, so that neither a closing terminal nor a signal to the relay's group ends it.
    let _ = rustix::process::setsid();
    let (ignored, decided) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
        signal_hook::flag::register(signal, Arc::clone(&ignored))?;
    }
    signal_hook::flag::register(SIGUSR1, Arc::clone(&decided))?;
    let mut relay = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    relay.write_all(&[UP])?;
    let Some(mut held) = receive(&mut relay)? else { return Ok(()) };
    relay.write_all(&[HOLDS])?;
    if !outlives(&mut relay, &decided)? {
        return Ok(());
    }
    // The far end must see the end of the relay's stream: bytes that have not left the relay by now never will.
    if let Some(far_end) = &held.far_end {
        let _ = rustix::net::shutdown(far_end, Shutdown::Write);
    }
    let waits = match held.far_end {
        Some(_) => "waits for the far end's answer",
        None => "can't read the far end's answer, which comes encrypted or by RDMA",
    };
    say(&format!(
        "in doubt: the relay ended after it had given the guest to the far end, which has not reported that it runs. \
         This process holds the source's connection, so that the guest can't run twice, and {waits}. {}",
        advice(held.switched, std::process::id())
    ));
    let end = held.wait(&decided)?;
    if held.source_is_encrypted {
        return held.end_encrypted(end);
    }
    held.tell(&end);
    Ok(())
}

/// Waits for the connections; `None` if they need not be held.
fn receive(relay: &mut UnixStream) -> io::Result<Option<Connections>> {
    let mut words = [0; 6];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_HELD))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        match recvmsg(&*relay, &mut [IoSliceMut::new(&mut words)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => break message.bytes,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    let mut connections = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            connections.extend(descriptors);
        }
    }
    let mut connections = connections.into_iter();
    match (got, words, connections.next()) {
        (6, [HOLD, source_is_native, far_end_is_native, switched, urgent, encrypted], Some(source)) => {
            Ok(Some(Connections {
                source,
                _urgent: connections.by_ref().take(urgent.into()).collect(),
                source_is_native: source_is_native == 1,
                source_is_encrypted: encrypted == 1,
                far_end: connections.next(),
                far_end_is_native: far_end_is_native == 1,
                switched: switched == 1,
                answer: Vec::new(),
            }))
        }
        (6, [HOLD, ..], None) => Err(io::Error::other("no descriptor came with the relay's message")),
        _ => Ok(None),
    }
}

/// Waits for the relay's end; true if it ended without reporting that there is no doubt.
fn outlives(relay: &mut UnixStream, decided: &AtomicBool) -> io::Result<bool> {
    loop {
        if decided.swap(false, Ordering::Relaxed)
            && let Some(parent) = getppid()
        {
            // The relay is alive, and has more information.
            let _ = kill_process(parent, Signal::USR1);
        }
        if ready(&[(relay.as_fd(), PollFlags::IN)])?[0].is_empty() {
            continue;
        }
        let mut word = [0];
        match relay.read(&mut word) {
            Ok(0) => return Ok(true),
            Ok(_) if word[0] == RELEASE => return Ok(false),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A reset: as its end.
            Err(_) => return Ok(true),
        }
    }
}

/// Which events each descriptor is ready for, after at most one poll interval.
fn ready(of: &[(std::os::fd::BorrowedFd<'_>, PollFlags)]) -> io::Result<Vec<PollFlags>> {
    let mut fds: Vec<_> = of.iter().map(|(fd, what)| PollFd::from_borrowed_fd(*fd, *what)).collect();
    let time = Timespec::try_from(POLL_INTERVAL).map_err(io::Error::other)?;
    match poll(&mut fds, Some(&time)) {
        Ok(_) => Ok(fds.iter().map(PollFd::revents).collect()),
        Err(rustix::io::Errno::INTR) => Ok(vec![PollFlags::empty(); of.len()]),
        Err(errno) => Err(errno.into()),
    }
}

impl Connections {
    /// Waits until the doubt is over.
    fn wait(&mut self, decided: &AtomicBool) -> io::Result<End> {
        loop {
            if decided.load(Ordering::Relaxed) {
                return Ok(End::DoesNotRun(
                    "the operator has confirmed that the guest does not run at the far end",
                ));
            }
            let mut watched = vec![(self.source.as_fd(), PollFlags::RDHUP)];
            watched.extend(self.far_end.as_ref().map(|far_end| (far_end.as_fd(), PollFlags::IN)));
            let found = ready(&watched)?;
            if found[0].intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR) {
                return Ok(End::SourceGone);
            }
            if found.get(1).is_some_and(|found| !found.is_empty())
                && let Some(end) = self.read_end()
            {
                return Ok(end);
            }
        }
    }

    /// Reads the far end's answer.
    fn read_end(&mut self) -> Option<End> {
        let mut buffer = [0; 1024];
        let far_end = self.far_end.as_ref()?;
        match rustix::io::read(far_end, &mut buffer) {
            Ok(got @ 1..) => self.answer.extend_from_slice(&buffer[..got]),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return None,
            Ok(0) | Err(_) => {
                say("the far end has ended its connection without saying whether the guest runs there");
                self.far_end = None;
                return None;
            }
        }
        self.decode()
    }

    fn decode(&mut self) -> Option<End> {
        loop {
            let (used, end) = match decode_message(&self.answer) {
                Ok((message, used)) => (used, self.meaning(message)),
                Err(error) if error.is_truncated() => return None,
                Err(error) => {
                    say(&format!("the far end's answer is not understood: {error}"));
                    self.far_end = None;
                    return None;
                }
            };
            if end.is_some() {
                return end;
            }
            self.answer.drain(..used);
        }
    }

    fn meaning(&self, message: Message<'_>) -> Option<End> {
        match message {
            Message::Shut { status: 0 } if !self.far_end_is_native => Some(End::Runs),
            Message::Native(Answer::Running) if self.far_end_is_native => Some(End::Runs),
            Message::Shut { .. } if !self.far_end_is_native => {
                Some(End::DoesNotRun("the far end reports that it has not started the guest"))
            }
            // Both ends then wait, and go on without the relay.
            Message::Pong(PING_TAKEN) => Some(End::Taken),
            // After COMMIT a ramwire's refusal proves nothing.
            Message::Native(Answer::Refused { why }) => {
                say(&format!("the far end reports: {why}; check whether the guest runs there"));
                None
            }
            _ => None,
        }
    }

    /// The result for a source to which nothing can be told: if its guest runs, it must not see its connection end, and if the
    /// guest does not, only that end frees it.
    fn end_encrypted(&mut self, end: End) -> io::Result<()> {
        match end {
            End::DoesNotRun(why) => {
                let then = match self.source_is_native {
                    true => "the source, a ramwire, ends in doubt: its operator resumes the guest there",
                    false => "the source, a QEMU, goes on",
                };
                say(&format!(
                    "{why}; the source's connection is encrypted, and ends without a report: {then}"
                ));
                return Ok(());
            }
            End::Runs | End::Taken => {
                say(
                    "the guest runs at the far end, which can't be told to the source, since its connection is encrypted: end \
                     the source, which is held until then",
                );
                // An answer that has come decides against a later signal.
                self.far_end = None;
                while !matches!(self.wait(&AtomicBool::new(false))?, End::SourceGone) {}
            }
            End::SourceGone => {}
        }
        self.tell(&End::SourceGone);
        Ok(())
    }

    /// Sends the result to the source, and makes sure that the source can read it.
    fn tell(&self, end: &End) {
        let (text, messages) = match end {
            End::SourceGone if self.switched => {
                return say(
                    "the source has gone before it was told that its guest was taken: it may have taken it back. Look at \
                     both ends; what the guest misses at the far end is only at its source. Nothing is held any more",
                );
            }
            End::SourceGone => {
                return say(
                    "the source has gone: if the guest runs, it runs at the far end; nothing is held any more",
                );
            }
            End::Runs if self.source_is_native => (
                "the guest runs at the far end; this is reported to the source",
                vec![Message::Native(Answer::Running)],
            ),
            End::Runs => (
                "the guest runs at the far end; this is reported to the source",
                vec![Message::Shut { status: 0 }],
            ),
            End::Taken => (
                "the guest runs at the far end, and what it misses is at its source, which gets this report: keep both. They go \
                 on without the relay: `migrate-recover` at the far end, then at the source `migrate` to that address \
                 with `resume`",
                vec![Message::Pong(PING_LOADED), Message::Pong(PING_TAKEN)],
            ),
            End::DoesNotRun(why) if self.source_is_native => {
                (*why, vec![Message::Native(Answer::Refused { why })])
            }
            End::DoesNotRun(why) => (*why, vec![Message::Shut { status: 1 }]),
        };
        say(text);
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| message.encode(&mut bytes));
        let until = Instant::now() + REPORT_TIMEOUT;
        let mut left = &bytes[..];
        while !left.is_empty() && Instant::now() < until {
            match rustix::io::write(&self.source, left) {
                Ok(count) => left = &left[count..],
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    if ready(&[(self.source.as_fd(), PollFlags::OUT)]).is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
        self.let_go(until);
    }

    /// A connection that closes with unread bytes sends a reset, which discards bytes that the source has not read yet.
    fn let_go(&self, until: Instant) {
        let _ = rustix::net::shutdown(&self.source, Shutdown::Write);
        let mut buffer = [0; 4096];
        while Instant::now() < until {
            match rustix::io::read(&self.source, &mut buffer) {
                Ok(1..) | Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    if ready(&[(self.source.as_fd(), PollFlags::IN)]).is_err() {
                        return;
                    }
                }
                Ok(0) | Err(_) => return,
            }
        }
    }
}
