//! The return path: the destination's byte stream to the source, on a connection of its own.

use std::time::{Duration, Instant};

use crate::capabilities::{Capabilities, Role};
use crate::channel::{Channel, accept_params};
use crate::control::WORD_BYTES;
use crate::exchange::Receiver;
use crate::fabric::{FabricError, Incoming, Listener};
use crate::hooks::HooksError;
use crate::stop::{Stop, Stopped};
use crate::stream::{StreamReceiver, StreamSender};

/// A QEMU posts its first receive buffer shortly after the connection is established, and tolerates no retry. So the
/// first READY is sent this much later, or when the QEMU's first message shows that the buffer is posted.
const QEMU_SETTLES: Duration = Duration::from_millis(200);

/// The source's end: reads.
pub struct ReturnReader {
    stream: StreamReceiver,
    grant_from: Instant,
}

/// Messages that the destination may have in flight on the return path before the source reads any. A QEMU reads all
/// the time, on a thread of its own. A source of this crate may be waiting for a credit to send, which the destination
/// grants only after it has sent its own messages.
pub(crate) fn return_window(is_qemu: bool) -> u16 {
    if is_qemu { 1 } else { 8 }
}

impl ReturnReader {
    /// `is_qemu`: the peer may not have a receive buffer posted yet.
    pub(crate) fn new(channel: Channel, is_qemu: bool, stop: &Stop) -> Result<Self, HooksError> {
        let grant_from = if is_qemu { channel.now() + QEMU_SETTLES } else { channel.now() };
        let exchange = Receiver::one_ahead(return_window(is_qemu));
        let mut reader = Self { stream: StreamReceiver::new(channel, exchange), grant_from };
        if !is_qemu {
            reader.stream.grant(stop)?;
        }
        Ok(reader)
    }

    /// Reads at least one byte, at most what fits.
    ///
    /// # Errors
    ///
    /// The connection's errors; [`FabricError::Disconnected`](crate::FabricError::Disconnected) once the destination
    /// closed it and everything is read.
    pub fn read(&mut self, into: &mut [u8], stop: &Stop) -> Result<usize, HooksError> {
        while !self.stream.has_input()? && self.stream.channel.now() < self.grant_from {
            self.stream.channel.rest(stop)?;
        }
        self.stream.read(into, stop)
    }
}

impl Drop for ReturnReader {
    /// The main connection reports how the migration ended; this one is just closed.
    fn drop(&mut self) {
        self.stream.channel.leave();
    }
}

/// The destination's end: writes.
pub struct ReturnWriter {
    stream: StreamSender,
}

impl ReturnWriter {
    /// Waits for the source to open the return path. `main` holds the capabilities agreed on the main connection.
    ///
    /// # Errors
    ///
    /// The fabric's. Other peers' connections are rejected.
    pub fn accept(listener: &mut dyn Listener, main: &Capabilities, stop: &Stop) -> Result<Self, HooksError> {
        loop {
            if let Some(writer) = Self::answer(listener.next_request(stop)?, main, stop)? {
                return Ok(writer);
            }
        }
    }

    /// Waits for the source's return path until `look` at the latest, for an embedder that reads the stream meanwhile:
    /// a QEMU opens it before its first stream byte or never. `None` if no peer, or another one, asked to connect.
    ///
    /// # Errors
    ///
    /// The fabric's error.
    pub fn accept_within(
        listener: &mut dyn Listener,
        main: &Capabilities,
        slice: &Stop,
        stop: &Stop,
    ) -> Result<Option<Self>, HooksError> {
        match listener.next_request(slice) {
            Ok(incoming) => Self::answer(incoming, main, stop),
            Err(FabricError::Stopped(Stopped::Deadline)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Accepts a peer that asks for this migration's return path; rejects any other peer.
    fn answer(
        incoming: Box<dyn Incoming>,
        main: &Capabilities,
        stop: &Stop,
    ) -> Result<Option<Self>, HooksError> {
        let Ok(asked) = Capabilities::decode(incoming.private_data()) else { return Ok(None) };
        let fits = match (main.extension, asked.extension) {
            (Some(ours), Some(theirs)) => {
                theirs.role == Role::ReturnPath && theirs.migration == ours.migration
            }
            (None, None) => true,
            _ => false,
        };
        if !fits {
            tracing::warn!(peer = ?incoming.peer(), "connection rejected: not this migration's return path");
            return Ok(None);
        }
        let reply = Capabilities { pin_all: asked.pin_all, extension: None };
        let window = return_window(main.extension.is_none());
        let endpoint = incoming.accept(&accept_params(reply.encode(), window, WORD_BYTES), stop)?;
        Ok(Some(Self { stream: StreamSender::new(Channel::new(endpoint), window) }))
    }

    /// Appends bytes; they are sent at the flush, or when 32 KiB have gathered.
    ///
    /// # Errors
    ///
    /// The connection's error.
    pub fn write(&mut self, bytes: &[u8], stop: &Stop) -> Result<(), HooksError> {
        self.stream.write(bytes, stop)
    }

    /// Sends the gathered bytes.
    ///
    /// # Errors
    ///
    /// The connection's error.
    pub fn flush(&mut self, stop: &Stop) -> Result<(), HooksError> {
        self.stream.flush(stop)
    }

    /// Sends the last bytes, waits until they have arrived, then for the source to close, until `stop`. True if both
    /// happened. A source that closes immediately after the last byte may lose its acknowledgement: then the outcome is
    /// unknown, and the result is false.
    ///
    /// # Errors
    ///
    /// Any other error of the connection.
    pub fn finish(mut self, stop: &Stop) -> Result<bool, HooksError> {
        self.stream.flush(stop)?;
        match self.stream.wait_for(stop, |stream| stream.channel.is_idle().then_some(())) {
            Ok(()) => self.stream.channel.part(stop),
            Err(HooksError::Fabric(FabricError::Disconnected)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
