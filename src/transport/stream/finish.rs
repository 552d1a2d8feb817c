//! The orderly end of a stream.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::Shutdown;

use super::stall_timer::StallTimer;
use super::{StreamChannel, StreamKind};
use crate::sys::{FdKind, RecvPart, Stop, queued_bytes};
use crate::transport::{ByteSource, ChannelError};

const FINISHING: &str = "finishing the stream";

/// Bytes after the stream's end that a command may still print.
const MAX_TRAILING: usize = 1 << 20;

impl StreamChannel {
    /// Ends the stream in an orderly way: announces that no byte follows, then waits until the peer's kernel has all
    /// bytes (TCP), the bytes are on the disk (files, if configured) or the command has ended.
    ///
    /// # Errors
    /// [`ChannelError`]; what was sent may then not have arrived. Syncing a file can't be stopped.
    pub fn finish(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        if !self.is_secured() {
            return self.end_stream(stop);
        }
        if self.end.stream_kind == StreamKind::Tcp {
            self.await_acknowledged(stop)?;
        }
        // The peer has the stream. One that closes without reading that no byte follows resets the connection.
        match self.end_stream(stop) {
            Err(ChannelError::Io { source, .. }) if is_broken_off(&source) => self.check_refusal(FINISHING),
            Err(ChannelError::Closed { .. }) => self.check_refusal(FINISHING),
            ended => ended,
        }
    }

    fn end_stream(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.send_end(stop)?;
        match self.end.stream_kind {
            StreamKind::Tcp => {
                self.close_sending()?;
                self.await_acknowledged(stop)?;
            }
            StreamKind::Socket => self.close_sending()?,
            StreamKind::File if self.end.sync_file => self.sync_file()?,
            StreamKind::Pipe if self.end.child.is_some() => return self.read_out(stop),
            StreamKind::File | StreamKind::Pipe => {}
        }
        self.await_child(stop)
    }

    fn close_sending(&self) -> Result<(), ChannelError> {
        match rustix::net::shutdown(&self.end.fd, Shutdown::Write) {
            // The peer closed first: it has received everything that it needs.
            Ok(()) | Err(Errno::NOTCONN) => Ok(()),
            Err(errno) => Err(self.end.broken(FINISHING, errno.into())),
        }
    }

    fn await_acknowledged(&self, stop: &Stop) -> Result<(), ChannelError> {
        const RETRY_INTERVAL: Duration = Duration::from_millis(2);
        let fd = self.end.fd.as_fd();
        let mut timer = StallTimer::new(&self.end, FINISHING, self.stall);
        loop {
            let waiting = queued_bytes(fd, FdKind::Socket);
            if waiting.map_err(|source| self.end.broken(FINISHING, source))? == 0 {
                return Ok(());
            }
            if let Ok(Some(error)) = socket2::SockRef::from(&fd).take_error() {
                return Err(self.end.broken(FINISHING, error));
            }
            // There is no event for the last acknowledgement.
            timer.rest(RETRY_INTERVAL, stop)?;
        }
    }

    /// A command may be stopped, or have ended: it has not read the bytes that are still in its socket.
    pub(super) fn await_read_by_command(&self, stop: &Stop) -> Result<(), ChannelError> {
        const READING: &str = "waiting for the command to read the stream";
        const RETRY_INTERVAL: Duration = Duration::from_millis(2);
        let Some(child) = &self.end.child else { return Ok(()) };
        let fd = self.end.fd.as_fd();
        let mut timer = StallTimer::new(&self.end, READING, self.stall);
        loop {
            child.check()?;
            if self.has_been_closed() {
                return Err(ChannelError::Closed { peer: self.end.peer.clone(), doing: READING });
            }
            let waiting = queued_bytes(fd, FdKind::Socket);
            if waiting.map_err(|source| self.end.broken(READING, source))? == 0 {
                return Ok(());
            }
            timer.rest(RETRY_INTERVAL, stop)?;
        }
    }

    fn sync_file(&self) -> Result<(), ChannelError> {
        match rustix::fs::fsync(&self.end.fd) {
            // Opened for reading, or a device without sync.
            Ok(()) | Err(Errno::INVAL | Errno::ROFS) => Ok(()),
            Err(errno) => Err(self.end.broken(FINISHING, errno.into())),
        }
    }

    /// Reads the output of a command after the stream's end, so that the command does not die of a closed pipe.
    pub(super) fn read_out(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        let mut scratch = vec![0; 1 << 16];
        let mut taken = 0;
        while taken <= MAX_TRAILING {
            match self.recv(&mut [RecvPart::Own(&mut scratch)], stop)? {
                0 => return Ok(()),
                count => taken += count,
            }
        }
        let source = std::io::Error::new(std::io::ErrorKind::InvalidData, "continues after the stream's end");
        Err(self.end.broken(FINISHING, source))
    }

    pub(super) fn await_child(&self, stop: &Stop) -> Result<(), ChannelError> {
        match &self.end.child {
            Some(child) => child.wait(self.stall, stop),
            None => Ok(()),
        }
    }
}

fn is_broken_off(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected)
}
