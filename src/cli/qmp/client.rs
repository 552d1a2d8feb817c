//! A client's connection: its commands that are not answered yet, and the output that it has not read.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::PollFlags;

use super::conversation::Conversation;
use super::subject::Subject;

/// Maximum number of bytes that wait for a client which does not read. A client for which more events arrive is
/// dropped.
const MAX_WAITING: usize = 1 << 20;

/// While more than this waits for it, a client's commands are not read.
const ENOUGH_WAITING: usize = 64 << 10;

/// Maximum number of bytes that are read at a time.
const READ: usize = 4 << 10;

/// Why a connection ended that its client has not ended.
#[derive(Debug)]
pub(super) enum Dropped {
    /// It reads nothing.
    Stalled,
    Broken(io::Error),
}

impl Dropped {
    /// The client has gone, with or without having read all.
    pub(super) fn is_disconnect(&self) -> bool {
        let kinds = [io::ErrorKind::BrokenPipe, io::ErrorKind::ConnectionReset];
        matches!(self, Self::Broken(error) if kinds.contains(&error.kind()))
    }
}

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stalled => {
                write!(f, "it was not reading, and more than {MAX_WAITING} bytes of events waited")
            }
            Self::Broken(error) => error.fmt(f),
        }
    }
}

/// A connection. None of its calls waits.
pub(super) struct Client {
    socket: OwnedFd,
    pub(super) name: String,
    conversation: Conversation,
    /// Read, and not parsed.
    input: Vec<u8>,
    output: Vec<u8>,
    /// The client will send nothing more.
    input_ended: bool,
}

impl Client {
    /// Greets. The socket does not block.
    pub(super) fn new(socket: OwnedFd, name: String) -> Self {
        let output = Conversation::greeting().into_bytes();
        let conversation = Conversation::default();
        Self { socket, name, conversation, input: Vec::new(), output, input_ended: false }
    }

    /// The events to wait for.
    pub(super) fn wants(&self) -> PollFlags {
        let mut wants = PollFlags::empty();
        wants.set(PollFlags::IN, !self.input_ended && self.output.len() < ENOUGH_WAITING);
        wants.set(PollFlags::OUT, !self.output.is_empty());
        wants
    }

    /// Reads, answers and writes what can be without a wait. False: the client has left, and has all answers.
    ///
    /// # Errors
    /// The connection is to be dropped.
    pub(super) fn serve(&mut self, ready: PollFlags, subject: &Subject) -> Result<bool, Dropped> {
        self.write()?;
        if ready.intersects(PollFlags::IN | PollFlags::HUP) && !self.input_ended && self.input.is_empty() {
            self.read()?;
        }
        loop {
            self.answer(subject);
            self.write()?;
            // The rest waits until the client reads.
            if self.input.is_empty() || !self.output.is_empty() {
                break;
            }
        }
        if ready.contains(PollFlags::ERR) {
            return Err(Dropped::Broken(io::ErrorKind::BrokenPipe.into()));
        }
        Ok(!(self.input_ended && self.input.is_empty() && self.output.is_empty()))
    }

    /// Sends an event, if the client takes events.
    ///
    /// # Errors
    /// It reads nothing.
    pub(super) fn tell(&mut self, line: &str) -> Result<(), Dropped> {
        if !self.conversation.takes_events() {
            return Ok(());
        }
        if self.output.len() + line.len() > MAX_WAITING {
            return Err(Dropped::Stalled);
        }
        self.output.extend_from_slice(line.as_bytes());
        Ok(())
    }

    /// True if nothing is to be written.
    pub(super) fn has_read_all(&self) -> bool {
        self.output.is_empty()
    }

    fn answer(&mut self, subject: &Subject) {
        let mut left = &self.input[..];
        while self.output.len() < ENOUGH_WAITING
            && let Some(line) = self.conversation.next(&mut left, subject)
        {
            self.output.extend_from_slice(line.as_bytes());
        }
        let taken = self.input.len() - left.len();
        self.input.drain(..taken);
        // It receives the answer with the reason.
        self.input_ended |= self.conversation.is_not_qmp();
    }

    fn read(&mut self) -> Result<(), Dropped> {
        let mut part = [0; READ];
        match rustix::io::read(&self.socket, &mut part) {
            Ok(0) => self.input_ended = true,
            Ok(got) => self.input.extend_from_slice(&part[..got]),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Dropped::Broken(errno.into())),
        }
        Ok(())
    }

    fn write(&mut self) -> Result<(), Dropped> {
        while !self.output.is_empty() {
            match rustix::io::write(&self.socket, &self.output) {
                Ok(written) => drop(self.output.drain(..written)),
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(Dropped::Broken(errno.into())),
            }
        }
        Ok(())
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
