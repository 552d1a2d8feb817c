//! Bytes out of parts and into parts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::PollFlags;

use super::descriptors;
use super::low_watermark::BURST_TIMEOUT;
use super::stall_timer::StallTimer;
use super::{End, StreamChannel, StreamKind};
use crate::sys::{MAX_PARTS, RecvPart, SendPart, Stop, StopReason, queued_bytes, send_parts};
use crate::transport::{ByteSink, ByteSource, ChannelError, ReadHints};

const SENDING: &str = "sending the stream";
const RECEIVING: &str = "waiting for the stream";

/// How parts are handed to the kernel.
pub(in crate::transport) trait SendBackend {
    /// Hands over as many bytes as there is room for; returns their number.
    fn send(&mut self, end: &End, parts: &[SendPart<'_>], skip: usize) -> std::io::Result<usize>;

    /// There is no room: before a wait until there is.
    fn before_wait(&mut self, _end: &End) -> Result<(), ChannelError> {
        Ok(())
    }
}

/// The kernel copies the bytes.
struct Copying;

impl SendBackend for Copying {
    fn send(&mut self, end: &End, parts: &[SendPart<'_>], skip: usize) -> std::io::Result<usize> {
        send_parts(end.fd.as_fd(), end.kind(), parts, skip)
    }
}

impl StreamChannel {
    /// Sends all parts, in order.
    pub(in crate::transport) fn send_by(
        &mut self,
        backend: &mut impl SendBackend,
        parts: &[SendPart<'_>],
        stop: &Stop,
    ) -> Result<(), ChannelError> {
        let end = &*self.end;
        let (mut first, mut skip) = (0, 0);
        let mut timer: Option<StallTimer<'_>> = None;
        loop {
            while parts.get(first).is_some_and(|part| skip >= part.len()) {
                skip -= parts[first].len();
                first += 1;
            }
            if first == parts.len() {
                return Ok(());
            }
            if let Some(reason) = stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: SENDING });
            }
            end.empty().map_err(|error| end.broken(SENDING, error))?;
            let window = &parts[first..parts.len().min(first + MAX_PARTS)];
            match backend.send(end, window, skip) {
                Ok(count) => {
                    skip += count;
                    self.sent += count as u64;
                    timer = None;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    backend.before_wait(end)?;
                    timer
                        .get_or_insert_with(|| StallTimer::new(end, SENDING, self.stall))
                        .wait(PollFlags::OUT, stop)?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(end.broken(SENDING, error)),
            }
        }
    }
}

impl crate::transport::Sealed for StreamChannel {}

impl ByteSink for StreamChannel {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        match self.is_secured() {
            true => self.send_secured(parts, stop),
            false => self.send_by(&mut Copying, parts, stop),
        }
    }

    /// Nothing is held back here.
    fn flush(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }

    fn finish(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        Self::finish(self, stop)
    }

    fn await_read(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.await_read_by_command(stop)
    }

    fn carries_descriptors(&self) -> bool {
        self.may_carry_descriptors()
    }

    fn send_descriptor(
        &mut self,
        bytes: &[u8],
        descriptor: BorrowedFd<'_>,
        stop: &Stop,
    ) -> Result<(), ChannelError> {
        self.send_carrying(bytes, descriptor, stop)
    }

    fn tolerate_outage(&mut self, limit: Duration) {
        self.wait_out_outage(limit);
    }

    fn position(&self) -> u64 {
        self.sent
    }

    fn unacknowledged(&self) -> u64 {
        // If the kernel does not report it, as for a file, no waiting bytes are known.
        queued_bytes(self.end.fd.as_fd(), self.end.kind()).unwrap_or(0)
    }
}

impl StreamChannel {
    /// As [`recv`](ByteSource::recv), if `due` bytes are sure to arrive unless the stream ends: a wait may last until
    /// all or many of them are there.
    pub(in crate::transport) fn recv_due(
        &mut self,
        into: &mut [RecvPart<'_>],
        due: usize,
        stop: &Stop,
    ) -> Result<usize, ChannelError> {
        let room = into.iter().map(RecvPart::len).sum();
        if room == 0 {
            return Ok(0);
        }
        if self.is_secured() {
            return self.recv_secured(into, stop);
        }
        let (end, stall) = (&*self.end, self.stall_in_recv());
        let fd = end.fd.as_fd();
        let mut timer: Option<StallTimer<'_>> = None;
        let mut wait_first = self.low_water.waits_first(due);
        if stop.reason().is_none() && self.low_water.waits_briefly(fd) {
            let waited = stop.wait_briefly(fd, PollFlags::IN, BURST_TIMEOUT);
            waited.map_err(|source| end.broken(RECEIVING, source))?;
        }
        loop {
            let reason = stop.reason();
            if let Some(reason @ StopReason::Cancelled) = reason {
                return Err(ChannelError::Stopped { reason, doing: RECEIVING });
            }
            // Once the time is over there is only a look.
            if !std::mem::take(&mut wait_first) || reason.is_some() {
                match descriptors::recv(fd, into, self.waiting.as_mut()) {
                    Ok(0) => return self.await_child(stop).map(|()| 0),
                    Ok(count) => {
                        self.low_water.took(count, room);
                        if self.hints.small_messages {
                            // The kernel forgets it with the next bytes.
                            self.acknowledge_at_once();
                        }
                        return Ok(count);
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                        if let Some(reason) = reason {
                            return Err(ChannelError::Stopped { reason, doing: RECEIVING });
                        }
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(end.broken(RECEIVING, error)),
                }
            }
            let timer = timer.get_or_insert_with(|| StallTimer::new(end, RECEIVING, stall));
            match self.low_water.before_wait(fd, due) {
                true => timer.wait_for_mark(stop)?,
                false => timer.wait(PollFlags::IN, stop)?,
            }
        }
    }
}

impl ByteSource for StreamChannel {
    /// At the end of a command's output its exit status decides between 0 and an error. Without room it returns 0, too.
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        self.recv_due(into, 1, stop)
    }

    fn set_hints(&mut self, hints: ReadHints) {
        self.low_water.set_bulk(hints.bulk);
        self.hints = hints;
    }

    fn check_writer(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        match self.end.stream_kind {
            StreamKind::Pipe if self.end.child.is_some() => self.read_out(stop),
            _ => Ok(()),
        }
    }

    fn want_descriptors(&mut self, wanted: bool) -> bool {
        self.keep_descriptors(wanted)
    }

    fn next_descriptor(&mut self) -> Option<OwnedFd> {
        self.take_descriptor()
    }

    fn tolerate_outage(&mut self, limit: Duration) {
        self.wait_out_outage(limit);
    }

    fn is_stored(&self) -> bool {
        matches!(self.end.stream_kind, StreamKind::Pipe | StreamKind::File)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        matches!(self.end.stream_kind, StreamKind::Tcp | StreamKind::Socket).then(|| self.end.fd.as_fd())
    }

    fn is_encrypted(&self) -> bool {
        self.is_secured()
    }
}
