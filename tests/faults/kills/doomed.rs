//! An end that is killed, stopped or disconnected at its stage.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ramwire::guest::{DeviceState, GuestControl, GuestMemory};
use ramwire::session::{Error, Incoming, MemoryProvider};
use ramwire::sys::{RecvPart, SendPart, Stop};
use ramwire::transport::{ByteSink, ByteSource, ChannelError, StreamBreaker, StreamChannel};

use crate::live::{Live, PAGE, PAGES, PATIENT};

/// What happens to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// SIGKILL.
    Die,
    /// SIGSTOP: the process neither reads nor writes any more, but its kernel still answers.
    Freeze,
    /// The connection is reset, the process ends.
    Reset,
}

/// The stage. A prefix names the peer's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The connection is established, no message was sent.
    Connected,
    /// The blocks are announced (destination) or about to be (source).
    Setup,
    /// Half of the pages have been sent.
    MidRound,
    /// The source has paused its guest; the destination has received everything.
    Switchover,
    /// The source has saved its device state; the destination has loaded it.
    State,
    /// READY was sent; the source has not received it yet.
    Ready,
    /// The source is about to send COMMIT; the destination has read it.
    Commit,
    /// The source has sent COMMIT; the destination runs and is about to report it.
    Committed,
    /// All messages were sent.
    LastByte,
}

pub(super) use Stage::{Commit, Committed, Connected, LastByte, MidRound, Ready, Setup, State, Switchover};

pub(super) const STAGES: [Stage; 9] =
    [Connected, Setup, MidRound, Switchover, State, Ready, Commit, Committed, LastByte];
pub(super) const ACTS: [Act; 3] = [Act::Die, Act::Freeze, Act::Reset];

/// The moment at which this process ends.
#[derive(Clone)]
pub(super) struct Doom {
    pub(super) stage: Stage,
    pub(super) act: Act,
    pub(super) breaker: StreamBreaker,
}

impl Doom {
    pub(super) fn reached(&self, stage: Stage) {
        if stage != self.stage {
            return;
        }
        let own = rustix::process::getpid();
        match self.act {
            Act::Die => drop(rustix::process::kill_process(own, rustix::process::Signal::KILL)),
            Act::Freeze => drop(rustix::process::kill_process(own, rustix::process::Signal::STOP)),
            Act::Reset => self.breaker.reset(),
        }
        if self.act == Act::Reset {
            std::process::exit(0);
        }
        // The signal may be slightly late; nothing may happen after it.
        std::thread::sleep(PATIENT);
    }
}

/// Wraps the connection of the doomed end and counts what it sends and receives.
pub(super) struct Doomed<T> {
    inner: T,
    doom: Doom,
    passed: u64,
    /// Answers sent since the device state was loaded.
    answers: u64,
    state_done: Arc<AtomicU64>,
}

impl<T> Doomed<T> {
    pub(super) fn new(inner: T, doom: &Doom, state_done: &Arc<AtomicU64>) -> Self {
        Self { inner, doom: doom.clone(), passed: 0, answers: 0, state_done: Arc::clone(state_done) }
    }

    fn count(&mut self, bytes: u64) {
        let half = PAGES * PAGE / 2;
        let before = self.passed;
        self.passed += bytes;
        if before < half && self.passed >= half {
            self.doom.reached(MidRound);
        }
    }
}

impl GuestControl for Doomed<Live> {
    fn pause(&mut self) -> io::Result<()> {
        self.inner.pause()?;
        self.doom.reached(Switchover);
        Ok(())
    }
    fn resume(&mut self) -> io::Result<()> {
        self.doom.reached(Commit);
        self.inner.resume()
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for Doomed<Live> {
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        self.inner.guest.save(out)?;
        self.state_done.store(1, Ordering::Release);
        self.doom.reached(State);
        Ok(())
    }
    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        self.inner.guest.load(from)?;
        self.state_done.store(1, Ordering::Release);
        self.doom.reached(State);
        Ok(())
    }
}

/// The destination's memory.
pub(super) struct DoomedProvider(pub(super) Live, pub(super) Doom);

impl MemoryProvider for DoomedProvider {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        self.1.reached(Setup);
        self.0.memory.provide(incoming)
    }
    fn arrived(&mut self, _incoming: &Incoming, _native: bool) {
        self.1.reached(Switchover);
    }
}

/// The source's way out.
pub(super) struct DoomedOut(pub(super) Doomed<StreamChannel>);

impl ramwire::transport::Sealed for DoomedOut {}

impl ByteSink for DoomedOut {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        let commit = matches!(parts, [SendPart::Own([8, 0x52, 4, ..])]);
        if commit {
            self.0.doom.reached(Commit);
        }
        self.0.inner.send(parts, stop)?;
        self.0.doom.reached(Setup);
        if commit {
            self.0.doom.reached(Committed);
        }
        self.0.count(parts.iter().map(|part| part.len() as u64).sum());
        Ok(())
    }
    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.0.inner.flush(stop)
    }
    fn position(&self) -> u64 {
        self.0.inner.position()
    }
}

/// The destination's answers.
pub(super) struct DoomedAnswers(pub(super) Doomed<StreamChannel>);

impl ramwire::transport::Sealed for DoomedAnswers {}

impl ByteSink for DoomedAnswers {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        self.0.answers += self.0.state_done.load(Ordering::Acquire);
        if self.0.answers == 2 {
            self.0.doom.reached(Committed);
        }
        self.0.inner.send(parts, stop)?;
        if self.0.answers == 1 {
            self.0.doom.reached(Ready);
        }
        Ok(())
    }
    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.0.inner.flush(stop)
    }
    fn position(&self) -> u64 {
        self.0.inner.position()
    }
}

impl ramwire::transport::Sealed for Doomed<StreamChannel> {}

impl ByteSource for Doomed<StreamChannel> {
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        // Only the source receives messages after its state is saved.
        if self.state_done.load(Ordering::Acquire) == 1 {
            self.doom.reached(Ready);
        }
        let got = self.inner.recv(into, stop)?;
        self.count(got as u64);
        Ok(got)
    }
}
