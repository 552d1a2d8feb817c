//! One step of a TLS connection, on the caller's buffers: received records are decrypted where they lie, and what is to
//! be sent is appended to a queue.

use std::fmt;
use std::io;

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};

use super::refusal::refused;

/// A connection of either end.
pub(super) struct Records {
    end: End,
    /// Why it has failed: it takes nothing more.
    failed: Option<rustls::Error>,
}

enum End {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Records").field("failed", &self.failed).finish_non_exhaustive()
    }
}

/// What to do once the connection is open.
#[derive(Clone, Copy, Debug)]
pub(super) enum Job<'a> {
    /// Only read.
    None,
    /// Encrypt these bytes.
    Encrypt(&'a [u8]),
    /// Announce that no byte follows.
    Close,
}

/// The result of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Something has happened, and more may follow without another byte of the peer.
    Again,
    /// The job is done.
    Done,
    /// Only bytes of the peer, or a job, lead further.
    Idle,
    /// The peer has announced that no byte follows.
    Ended,
}

/// Bytes to send, in their order.
#[derive(Debug, Default)]
pub(super) struct Queue {
    bytes: Vec<u8>,
    from: usize,
    to: usize,
}

impl Queue {
    pub(super) fn waiting(&self) -> &[u8] {
        &self.bytes[self.from..self.to]
    }

    /// Removes the first `count` bytes.
    pub(super) fn sent(&mut self, count: usize) {
        self.from += count;
        if self.from == self.to {
            (self.from, self.to) = (0, 0);
        }
    }

    /// Room for at least `count` bytes behind the last one.
    fn room(&mut self, count: usize) -> &mut [u8] {
        if self.bytes.len() < self.to + count {
            self.bytes.resize(self.to + count, 0);
        }
        &mut self.bytes[self.to..]
    }
}

impl Records {
    pub(super) fn of_client(tls: UnbufferedClientConnection) -> Self {
        Self { end: End::Client(tls), failed: None }
    }

    pub(super) fn of_server(tls: UnbufferedServerConnection) -> Self {
        Self { end: End::Server(tls), failed: None }
    }

    /// True until both ends are known and agree on the keys.
    pub(super) fn is_handshaking(&self) -> bool {
        match &self.end {
            End::Client(tls) => tls.is_handshaking(),
            End::Server(tls) => tls.is_handshaking(),
        }
    }

    /// Something is to be encoded.
    fn wants_write(&self) -> bool {
        match &self.end {
            End::Client(tls) => tls.wants_write(),
            End::Server(tls) => tls.wants_write(),
        }
    }

    /// Takes at most one record from the beginning of `come`; returns how many bytes of it are done with. `take` receives
    /// decrypted bytes.
    ///
    /// # Errors
    /// A [`TlsError`](super::TlsError) inside, the same from then on. The peer is told why by what is then in `out`.
    pub(super) fn step(
        &mut self,
        come: &mut [u8],
        out: &mut Queue,
        job: Job<'_>,
        take: &mut dyn FnMut(&[u8]),
    ) -> io::Result<(usize, Step)> {
        let told = |error: &rustls::Error| io::Error::new(io::ErrorKind::InvalidData, refused(error));
        if let Some(error) = &self.failed {
            return Err(told(error));
        }
        let (discard, step) = self.step_once(come, out, job, take);
        let error = match step {
            Ok(step) => return Ok((discard, step)),
            Err(Failed::Keys) => {
                return Err(io::Error::other(
                    "the keys of this connection may encrypt no more, and TLS 1.2 has no others",
                ));
            }
            Err(Failed::Tls(error)) => error,
        };
        // The alert for the peer, without a look at what has come.
        while self.wants_write() && matches!(self.step_once(&mut [], out, Job::None, take).1, Ok(Step::Again))
        {
        }
        let text = told(&error);
        self.failed = Some(error);
        Err(text)
    }

    fn step_once(
        &mut self,
        come: &mut [u8],
        out: &mut Queue,
        job: Job<'_>,
        take: &mut dyn FnMut(&[u8]),
    ) -> (usize, Result<Step, Failed>) {
        match &mut self.end {
            End::Client(tls) => obey(tls.process_tls_records(come), out, job, take),
            End::Server(tls) => obey(tls.process_tls_records(come), out, job, take),
        }
    }
}

enum Failed {
    Tls(rustls::Error),
    /// They have encrypted as much as they may.
    Keys,
}

impl From<rustls::Error> for Failed {
    fn from(error: rustls::Error) -> Self {
        Self::Tls(error)
    }
}

fn obey<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    out: &mut Queue,
    job: Job<'_>,
    take: &mut dyn FnMut(&[u8]),
) -> (usize, Result<Step, Failed>) {
    let mut discard = status.discard;
    let obey = || -> Result<Step, Failed> {
        Ok(match status.state? {
            ConnectionState::ReadTraffic(mut traffic) => {
                while let Some(record) = traffic.next_record() {
                    let record = record?;
                    discard += record.discard;
                    take(record.payload);
                }
                Step::Again
            }
            ConnectionState::EncodeTlsData(mut message) => {
                out.append(0, |room| match message.encode(room) {
                    Ok(written) => Ok(written),
                    Err(EncodeError::InsufficientSize(short)) => Err(Some(short.required_size)),
                    Err(EncodeError::AlreadyEncoded) => Ok(0),
                })?;
                Step::Again
            }
            ConnectionState::TransmitTlsData(message) => {
                // It is in the queue, before all that follows.
                message.done();
                Step::Again
            }
            ConnectionState::WriteTraffic(mut traffic) => {
                let exhausted = |error| match error {
                    EncryptError::InsufficientSize(short) => Some(short.required_size),
                    EncryptError::EncryptExhausted => None,
                };
                match job {
                    Job::None => return Ok(Step::Idle),
                    Job::Encrypt(plain) => {
                        out.append(with_records(plain.len()), |room| {
                            traffic.encrypt(plain, room).map_err(exhausted)
                        })?;
                    }
                    Job::Close => {
                        out.append(0, |room| traffic.queue_close_notify(room).map_err(exhausted))?;
                    }
                }
                Step::Done
            }
            ConnectionState::BlockedHandshake => Step::Idle,
            ConnectionState::PeerClosed | ConnectionState::Closed => Step::Ended,
            // Only a server that has allowed it gets data before the handshake.
            other => return Err(rustls::Error::General(format!("{other:?}")).into()),
        })
    };
    let step = obey();
    (discard, step)
}

/// Bytes that so many take when they are encrypted: at most 256 more for each record, of which one more may begin.
fn with_records(plain: usize) -> usize {
    const RECORD: usize = 16 << 10;
    plain + (plain / RECORD + 2) * 256
}

impl Queue {
    /// Appends what `write` writes. It is called again if it says that it needs more room.
    fn append(
        &mut self,
        room: usize,
        mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<usize>>,
    ) -> Result<(), Failed> {
        let written = match write(self.room(room)) {
            Ok(written) => written,
            Err(Some(needed)) => write(self.room(needed)).map_err(|_| Failed::Keys)?,
            Err(None) => return Err(Failed::Keys),
        };
        self.to += written;
        Ok(())
    }
}
