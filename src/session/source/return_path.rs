//! Messages from the destination.

use crate::stream::DecodeError;
use crate::stream::native::{Answer, Hello};
use crate::stream::qemu::return_path::{Message, bitmap_len, decode_bitmap, decode_message};
use crate::sys::{RecvPart, Stop, StopReason};
use crate::transport::{ByteSource, ChannelError, ReadHints};

use crate::session::Error;

use std::os::fd::BorrowedFd;
use std::time::Duration;

/// Pages that a thread at the destination waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PageRequest {
    /// Name of their block; `None`: that of the last request.
    pub(super) block: Option<String>,
    /// First byte.
    pub(super) start: u64,
    /// Length in bytes.
    pub(super) length: u32,
}

/// A message, in the form that the source needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PeerMessage {
    Pong(u32),
    Shut(u32),
    SwitchoverAck,
    Hello(Hello),
    Ready,
    Running,
    Working,
    Refused(String),
    Request(PageRequest),
    /// The bitmap of this block follows: see [`ReturnPath::bitmap`].
    Received(String),
    /// RESUME_ACK.
    Resumed,
    /// All in front of the fence of this number is in place.
    Fenced(u64),
    /// The pages behind the key of this number are there.
    ReadWhole(u32),
    /// The answer to RESUME.
    Holds {
        secret: [u8; 16],
        fence: u64,
    },
}

/// The return path with what has arrived of the next message.
pub(crate) struct ReturnPath {
    source: Box<dyn ByteSource>,
    buffer: [u8; 1024],
    filled: usize,
    at: u64,
}

impl ReturnPath {
    pub(crate) fn new(source: Box<dyn ByteSource>) -> Self {
        Self { source, buffer: [0; 1024], filled: 0, at: 0 }
    }

    /// Acknowledges received messages to the peer immediately: a peer that delays a second small message until the
    /// first is acknowledged can then send its requests without a wait.
    pub(super) fn acknowledge_at_once(&mut self) {
        self.source.set_hints(ReadHints { small_messages: true, ..ReadHints::default() });
    }

    /// Its descriptor; bytes that were read of it may hold more messages.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.source.descriptor()
    }

    /// The next message if it has already arrived.
    pub(super) fn poll(&mut self) -> Result<Option<PeerMessage>, Error> {
        let now = Stop::never().within(Duration::ZERO);
        match self.next(&now) {
            Ok(word) => Ok(Some(word)),
            Err(Error::Channel(ChannelError::Stopped { reason: StopReason::Deadline, .. })) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// The channel's, [`ChannelError::Closed`] if the peer closes; [`Error::Decode`] and [`Error::OutOfTurn`]. A close
    /// is not a message: it does not show that the guest does not run there.
    pub(super) fn next(&mut self, stop: &Stop) -> Result<PeerMessage, Error> {
        loop {
            match decode_message(&self.buffer[..self.filled]) {
                Ok((message, used)) => {
                    let word = peer_message(message);
                    self.buffer.copy_within(used..self.filled, 0);
                    self.filled -= used;
                    self.at += used as u64;
                    return Ok(word);
                }
                Err(error) if !error.is_truncated() => return Err(error.based(self.at).into()),
                Err(_) => {}
            }
            // A message has at most 516 bytes: there is always room for more.
            let room = &mut self.buffer[self.filled..];
            let got = self.source.recv(&mut [RecvPart::Own(room)], stop)?;
            if got == 0 {
                return Err(closed().into());
            }
            self.filled += got;
        }
    }

    /// The bitmap after [`PeerMessage::Received`], for a block of `pages` pages: bit i of byte i / 8 is page i.
    ///
    /// # Errors
    /// As [`next`](Self::next); a bitmap of another size is refused at its first bytes.
    pub(super) fn bitmap(&mut self, pages: u64, stop: &Stop) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        self.fill(&mut bytes, 8, stop)?;
        let whole = match decode_bitmap(&bytes, pages) {
            Err(DecodeError::Truncated { .. }) => 16 + bitmap_len(pages) as usize,
            Ok(_) => bytes.len(),
            Err(error) => return Err(error.based(self.at).into()),
        };
        self.fill(&mut bytes, whole, stop)?;
        let bits = decode_bitmap(&bytes, pages).map_err(|error| error.based(self.at))?.0.to_vec();
        self.at += bytes.len() as u64;
        Ok(bits)
    }

    /// Reads until `bytes` has `len` bytes.
    fn fill(&mut self, bytes: &mut Vec<u8>, len: usize, stop: &Stop) -> Result<(), Error> {
        let here = self.filled.min(len.saturating_sub(bytes.len()));
        bytes.extend_from_slice(&self.buffer[..here]);
        self.buffer.copy_within(here..self.filled, 0);
        self.filled -= here;
        let mut have = bytes.len();
        bytes.resize(len, 0);
        while have < len {
            have += match self.source.recv(&mut [RecvPart::Own(&mut bytes[have..])], stop)? {
                0 => return Err(closed().into()),
                got => got,
            };
            if have < len {
                check_deadline(stop)?;
            }
        }
        Ok(())
    }

    /// Waits for a message, skipping PONGs and acks, which may arrive at any time. These alone do not extend the wait.
    pub(super) fn next_verdict(&mut self, stop: &Stop) -> Result<PeerMessage, Error> {
        loop {
            match self.next(stop)? {
                PeerMessage::Pong(_) | PeerMessage::SwitchoverAck => check_deadline(stop)?,
                word => return Ok(word),
            }
        }
    }
}

/// The reason to stop, if there is one by now: a wait that always finds bytes does not check it.
pub(super) fn check_deadline(stop: &Stop) -> Result<(), ChannelError> {
    match stop.reason() {
        Some(reason) => {
            Err(ChannelError::Stopped { reason, doing: "waiting for a message of the destination" })
        }
        None => Ok(()),
    }
}

fn closed() -> ChannelError {
    ChannelError::Closed { peer: "the destination".into(), doing: "its answer was due" }
}

fn peer_message(message: Message<'_>) -> PeerMessage {
    match message {
        Message::Pong(value) => PeerMessage::Pong(value),
        Message::Shut { status } => PeerMessage::Shut(status),
        Message::SwitchoverAck => PeerMessage::SwitchoverAck,
        Message::RequestPagesOf { block, start, length } => {
            PeerMessage::Request(PageRequest { block: Some(block.to_owned()), start, length })
        }
        Message::RequestPages { start, length } => {
            PeerMessage::Request(PageRequest { block: None, start, length })
        }
        Message::Native(Answer::Hello(hello)) => PeerMessage::Hello(hello),
        Message::Native(Answer::Ready) => PeerMessage::Ready,
        Message::Native(Answer::Running) => PeerMessage::Running,
        Message::Native(Answer::Working) => PeerMessage::Working,
        Message::Native(Answer::Refused { why }) => PeerMessage::Refused(why.to_owned()),
        Message::Native(Answer::Fenced { number }) => PeerMessage::Fenced(number),
        Message::Native(Answer::ReadWhole { number }) => PeerMessage::ReadWhole(number),
        Message::Native(Answer::Holds { secret, fence }) => PeerMessage::Holds { secret, fence },
        Message::ReceivedBitmap { block } => PeerMessage::Received(block.to_owned()),
        Message::ResumeAck(_) => PeerMessage::Resumed,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::{TcpListener, TcpStream};
    use std::time::Instant;

    use super::*;
    use crate::transport::{StreamChannel, StreamOptions};

    /// Prints the cost of checking for a message of the peer, which is done after each batch.
    #[test]
    #[ignore = "measures"]
    fn a_look_at_a_silent_peer_costs_one_system_call() {
        const LOOKS: u32 = 200_000;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _far = listener.accept().unwrap();
        let channel = StreamChannel::from_fd(near.into(), "peer", &StreamOptions::default()).unwrap();
        let (_sink, back) = channel.with_return_path();
        let mut back = ReturnPath::new(Box::new(back.unwrap()));
        let began = Instant::now();
        for _ in 0..LOOKS {
            assert_eq!(back.poll().unwrap(), None);
        }
        println!("{:?} a look", began.elapsed() / LOOKS);
    }
}
