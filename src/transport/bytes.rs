//! A stream of bytes, in one direction each.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::sys::{RecvPart, SendPart, Stop};
use crate::transport::{ChannelError, Sealed};

/// The sending side of a byte stream. Implemented by this library only.
pub trait ByteSink: Send + Sealed {
    /// Sends all parts, in order. Guest spans are read by the kernel in place.
    ///
    /// # Errors
    /// [`ChannelError`]; how much went out is then unknown, and the channel is of no more use.
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError>;

    /// Pushes out what the sink holds back.
    ///
    /// # Errors
    /// [`ChannelError`].
    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError>;

    /// The stream ends here in good order: no byte follows, and bytes that were buffered or in flight to a disk have
    /// arrived there. The default is [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`ChannelError`].
    fn finish(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.flush(stop)
    }

    /// Waits until a command at the other end has read all that was sent: nothing else shows that it is at work. Elsewhere
    /// there is nothing to wait for.
    ///
    /// # Errors
    /// [`ChannelError`].
    fn await_read(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }

    /// True if a descriptor can be sent with its bytes: to a process of this host, by a UNIX socket.
    fn carries_descriptors(&self) -> bool {
        false
    }

    /// Sends `bytes`, not none, and `descriptor` with the first of them.
    ///
    /// # Errors
    /// [`ChannelError`], as of [`send`](Self::send); always where it [carries none](Self::carries_descriptors).
    fn send_descriptor(
        &mut self,
        _bytes: &[u8],
        _descriptor: BorrowedFd<'_>,
        _stop: &Stop,
    ) -> Result<(), ChannelError> {
        let source = std::io::ErrorKind::Unsupported.into();
        Err(ChannelError::Io { peer: "destination".into(), doing: "sending a descriptor", source })
    }

    /// As [`ByteSource::tolerate_outage`], for both directions of the connection.
    fn tolerate_outage(&mut self, _limit: Duration) {}

    /// Bytes sent so far.
    fn position(&self) -> u64;

    /// Of them, those that the peer's host does not have yet, if the kernel reports it: bytes sent next wait for them.
    fn unacknowledged(&self) -> u64 {
        0
    }
}

/// What a reader of a byte stream expects of the bytes that follow. All `false` at first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReadHints {
    /// Bulk data follows, as pages follow pages. While it arrives fast a read may wait for less than a millisecond, so
    /// that it takes more at once. Not to be set where the peer waits for what the next bytes cause.
    pub bulk: bool,
    /// The peer may hold a small message back until the one before is acknowledged (Nagle's algorithm): received bytes are
    /// acknowledged at once, where the connection can.
    pub small_messages: bool,
    /// The protocol allows the peer to be silent without limit. Its silence is no stall then, as long as its kernel
    /// answers; nothing answers for a pipe, where the stall timeout counts.
    pub may_be_silent: bool,
}

/// The receiving side of a byte stream. Implemented by this library only.
pub trait ByteSource: Send + Sealed {
    /// Fills the parts in order with the bytes that are there, waiting for the first byte. 0 is the end of the stream.
    ///
    /// A deadline ends the wait, not the reading: bytes that are there after it are still taken. With a deadline of
    /// zero it polls.
    ///
    /// # Errors
    /// [`ChannelError`].
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError>;

    /// What the caller expects of the bytes that it reads next. It changes how a transport waits, and no byte that it
    /// returns.
    fn set_hints(&mut self, _hints: ReadHints) {}

    /// Whether descriptors that come with the bytes are kept until they are [taken](Self::next_descriptor), from the next
    /// read on; else they are closed unseen. Returns whether some may come here. `false` at first.
    fn want_descriptors(&mut self, _wanted: bool) -> bool {
        false
    }

    /// The next descriptor that has arrived: with a byte that has been read, or with one before it.
    fn next_descriptor(&mut self) -> Option<OwnedFd> {
        None
    }

    /// The last byte of the stream has arrived: checks that its writer has not failed. The exit status of a command shows
    /// it, and its output after the stream is skipped; other sources have nothing to check.
    ///
    /// # Errors
    /// [`ChannelError`]: the received bytes are not to be relied on.
    fn check_writer(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }

    /// True if the bytes lie in a file, or are the output of a command or pipe: no guest is given away by them.
    fn is_stored(&self) -> bool {
        false
    }

    /// From here on the caller's [`Stop`] alone ends a wait: neither the stall timeout does, nor an outage of up to `limit`.
    fn tolerate_outage(&mut self, _limit: Duration) {}

    /// Its descriptor, if closing that informs the peer that this end has gone.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// True if its bytes are encrypted by this process: another one that has the descriptor understands none of them, and can
    /// say nothing to the peer.
    fn is_encrypted(&self) -> bool {
        false
    }
}
