//! An encrypted byte stream: the same waits as for a plain one, around [`TlsSession`].

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::event::PollFlags;

use super::stall_timer::StallTimer;
use super::{End, StreamChannel};
use crate::sys::{RecvPart, SendPart, Stop, StopReason};
use crate::transport::tls::{Tls, TlsError, TlsSession};
use crate::transport::{ChannelError, OpenError};

/// Bytes that are read from guest RAM, encrypted and sent at a time: records of 16 KiB.
const OUTBOX: usize = 128 << 10;

const SHAKING: &str = "making a TLS connection";

/// The own state of one half of an encrypted stream, and the state that both share.
#[derive(Debug)]
pub(super) struct Secured {
    session: Arc<TlsSession>,
    /// The bytes to encrypt next.
    outbox: Vec<u8>,
}

impl Secured {
    pub(super) fn other_half(&self) -> Self {
        Self { session: Arc::clone(&self.session), outbox: Vec::new() }
    }
}

impl StreamChannel {
    /// Uses TLS on a connected socket; the handshake happens when bytes are first needed. `host`: as it is named in the
    /// address, at the end that connects.
    pub(in crate::transport) fn over_tls(mut self, tls: &Tls, host: &str) -> Result<Self, TlsError> {
        let session = Arc::new(tls.session(host)?);
        // A mark counts bytes of the socket, and it is unknown how many of them a page takes.
        self.low_water.switch_off();
        self.tls = Some(Secured { session, outbox: Vec::new() });
        Ok(self)
    }

    /// True if it is encrypted.
    pub(in crate::transport) fn is_secured(&self) -> bool {
        self.tls.is_some()
    }

    /// Makes the handshake, if it is not over. The end that connects makes it immediately, so its errors are errors of
    /// opening.
    pub(in crate::transport) fn shaken(self, stop: &Stop) -> Result<Self, OpenError> {
        if let Some(Secured { session, .. }) = &self.tls {
            shake_hands(session, &self.end, self.stall, stop)?;
        }
        Ok(self)
    }

    pub(super) fn send_secured(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        const SENDING: &str = "sending the stream";
        let Some(Secured { session, outbox }) = &mut self.tls else { return Ok(()) };
        let (end, stall) = (&*self.end, self.stall);
        shake_hands(session, end, stall, stop)?;
        let mut send = |outbox: &mut Vec<u8>| {
            session.encrypt(outbox).map_err(|error| end.broken(SENDING, error))?;
            push(session, end, stall, stop, SENDING)?;
            self.sent += outbox.len() as u64;
            outbox.clear();
            Ok(())
        };
        for part in parts {
            let mut at = 0;
            while at < part.len() {
                let before = outbox.len();
                let count = (part.len() - at).min(OUTBOX - before);
                match part {
                    SendPart::Own(bytes) => outbox.extend_from_slice(&bytes[at..at + count]),
                    SendPart::Guest(span) => {
                        outbox.resize(before + count, 0);
                        span.part(at, count).map(|span| span.copy_to(&mut outbox[before..]));
                    }
                }
                at += count;
                if outbox.len() == OUTBOX {
                    send(outbox)?;
                }
            }
        }
        if outbox.is_empty() { Ok(()) } else { send(outbox) }
    }

    pub(super) fn recv_secured(
        &mut self,
        into: &mut [RecvPart<'_>],
        stop: &Stop,
    ) -> Result<usize, ChannelError> {
        const RECEIVING: &str = "waiting for the stream";
        let stall = self.stall_in_recv();
        let Some(Secured { session, .. }) = &self.tls else { return Ok(0) };
        let end = &*self.end;
        let mut timer = StallTimer::new(end, RECEIVING, stall);
        loop {
            let reason = stop.reason();
            if let Some(reason @ StopReason::Cancelled) = reason {
                return Err(ChannelError::Stopped { reason, doing: RECEIVING });
            }
            match session.recv(end.fd.as_fd(), into) {
                Ok(count) => {
                    if self.hints.small_messages {
                        self.acknowledge_at_once();
                    }
                    return Ok(count);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(end.broken(RECEIVING, error)),
            }
            if let Some(reason) = reason {
                return Err(ChannelError::Stopped { reason, doing: RECEIVING });
            }
            timer.wait(PollFlags::IN, stop)?;
        }
    }

    pub(super) fn peek_secured(&self, session: &Secured, into: &mut [u8]) -> std::io::Result<usize> {
        session.session.peek(self.end.fd.as_fd(), into)
    }

    /// True while the peer of an encrypted stream has not finished its handshake.
    pub(in crate::transport) fn is_shaking_hands(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| !tls.session.is_open())
    }

    /// # Errors
    /// The reason that the peer has sent for ending the connection.
    pub(super) fn check_refusal(&self, doing: &'static str) -> Result<(), ChannelError> {
        let why = self.tls.as_ref().and_then(|tls| tls.session.why_broken(self.end.fd.as_fd()));
        why.map_or(Ok(()), |error| Err(self.end.broken(doing, error)))
    }

    /// As [`send_end`](Self::send_end), but only if there is room for it.
    pub(in crate::transport) fn say_end_at_once(&self) {
        let Some(Secured { session, .. }) = &self.tls else { return };
        if session.is_open() {
            session.close();
            // A peer that does not receive this treats the stream as truncated.
            let _ = session.push(self.end.fd.as_fd());
        }
    }

    /// Announces that no byte follows, if TLS is used: with it, a peer distinguishes a stream that has ended from a
    /// truncated one.
    pub(in crate::transport) fn send_end(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        const ENDING: &str = "ending the TLS connection";
        let Some(Secured { session, .. }) = &self.tls else { return Ok(()) };
        session.close();
        push(session, &self.end, self.stall, stop, ENDING)
    }
}

fn shake_hands(
    session: &TlsSession,
    end: &End,
    stall: Option<std::time::Duration>,
    stop: &Stop,
) -> Result<(), ChannelError> {
    if session.is_open() {
        return Ok(());
    }
    let mut timer = StallTimer::new(end, SHAKING, stall);
    loop {
        let awaited = match session.shake_hands(end.fd.as_fd()) {
            Ok(true) => return Ok(()),
            Ok(false) => PollFlags::OUT,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => PollFlags::IN,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(end.broken(SHAKING, error)),
        };
        timer.wait(awaited, stop)?;
    }
}

/// Sends all that is encrypted.
fn push(
    session: &TlsSession,
    end: &End,
    stall: Option<std::time::Duration>,
    stop: &Stop,
    doing: &'static str,
) -> Result<(), ChannelError> {
    let fd = end.fd.as_fd();
    let mut timer = None;
    loop {
        if let Some(reason) = stop.reason() {
            return Err(ChannelError::Stopped { reason, doing });
        }
        match session.push(fd) {
            Ok(true) => return Ok(()),
            Ok(false) => {
                timer.get_or_insert_with(|| StallTimer::new(end, doing, stall)).wait(PollFlags::OUT, stop)?;
            }
            // The peer may have sent the reason before it closed.
            Err(error) => return Err(end.broken(doing, session.why_broken(fd).unwrap_or(error))),
        }
    }
}
