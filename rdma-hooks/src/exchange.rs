//! Which end may send: READY credits and replies, without I/O.
//!
//! The receiver of the byte stream sends a READY when it can take one more message. A message of the sender costs one
//! READY; an answer costs none. With QEMU there is at most one READY unused (the *window* is 1): a message without
//! credit would overwrite the buffer the peer is parsing, so the peer's memory safety depends on the credits. Two ends
//! of this crate may agree on a larger window, so that messages need not wait for each other.
//!
//! [`Sender`] is the source's end of the main queue pair and the destination's end of the return path; [`Receiver`] is
//! the opposite end. Both check received messages and refuse one that is out of turn; neither sends anything itself.
//!
//! # When a message is finished
//!
//! The receiver grants `window` credits at first and then one for each message that it has processed. So message number
//! `m` (from 1) is finished once `m + window` READYs have arrived. A range that was COMPRESSed may be written again
//! only then.

use std::collections::VecDeque;

use crate::control::Kind;

/// A message that is out of turn. The peer is broken or hostile, so the connection is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    /// ERROR: the peer gave up; the message carries no reason.
    #[error("the peer reported an error and gave up; its log says why")]
    PeerFailed,
    /// More READYs than the window allows.
    #[error("peer sent READY with {unused} of {window} credits unused")]
    TooManyReady {
        /// Credits not yet used.
        unused: u64,
        /// Most credits unused at a time.
        window: u64,
    },
    /// READY before the answer that is due.
    #[error("peer sent READY before its {missing:?}")]
    ReadyBeforeReply {
        /// The expected answer.
        missing: Kind,
    },
    /// A message that is not allowed in this state.
    #[error("peer sent {got:?} while {doing}")]
    Unexpected {
        /// What arrived.
        got: Kind,
        /// What this end was doing.
        doing: &'static str,
    },
    /// A message for which no READY was sent.
    #[error("peer sent {got:?} without credit")]
    NoCredit {
        /// What arrived.
        got: Kind,
    },
}

/// The end that sends the byte stream and the requests.
#[derive(Debug)]
pub struct Sender {
    window: u64,
    readies: u64,
    sent: u64,
    replies: VecDeque<(u64, Kind)>,
}

/// What an arrived message means to a [`Sender`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SenderEvent {
    /// One more message may be sent.
    Ready,
    /// The answer to the oldest open request.
    Reply(Kind),
    /// The peer has read the whole stream.
    Done,
}

impl Sender {
    /// No credit yet; at most `window` unused ones at a time (1 towards QEMU).
    pub fn new(window: u16) -> Self {
        Self { window: u64::from(window.max(1)), readies: 0, sent: 0, replies: VecDeque::new() }
    }

    /// True if a message may be sent now.
    pub fn has_credit(&self) -> bool {
        self.readies > self.sent
    }

    /// Notes that a message of this kind is sent; returns its number, from 1.
    ///
    /// `None`: there is no credit, and the message must not be sent.
    pub fn send(&mut self, kind: Kind) -> Option<u64> {
        if !self.has_credit() {
            return None;
        }
        self.sent += 1;
        self.replies.extend(kind.reply().map(|reply| (self.sent, reply)));
        Some(self.sent)
    }

    /// True if the peer has processed message number `message`.
    pub fn is_finished(&self, message: u64) -> bool {
        self.readies >= message.saturating_add(self.window)
    }

    /// Checks a received message.
    ///
    /// # Errors
    ///
    /// Any message other than a READY or the expected answer.
    pub fn on_arrival(&mut self, kind: Kind) -> Result<SenderEvent, ExchangeError> {
        match kind {
            Kind::Error => Err(ExchangeError::PeerFailed),
            Kind::Ready => self.on_ready(),
            Kind::Done => Ok(SenderEvent::Done),
            _ => match self.replies.front() {
                Some(&(_, due)) if due == kind => {
                    self.replies.pop_front();
                    Ok(SenderEvent::Reply(kind))
                }
                Some(_) => Err(ExchangeError::Unexpected { got: kind, doing: "another answer was due" }),
                None => Err(ExchangeError::Unexpected { got: kind, doing: "no request was open" }),
            },
        }
    }

    fn on_ready(&mut self) -> Result<SenderEvent, ExchangeError> {
        let unused = self.readies - self.sent;
        if unused >= self.window {
            return Err(ExchangeError::TooManyReady { unused, window: self.window });
        }
        match self.replies.front() {
            Some(&(request, missing)) if self.readies + 1 >= request + self.window => {
                Err(ExchangeError::ReadyBeforeReply { missing })
            }
            _ => {
                self.readies += 1;
                Ok(SenderEvent::Ready)
            }
        }
    }
}

/// What a [`Receiver`] is ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Bytes of the stream.
    Stream,
    /// Requests of a round, between the mark in the stream and REGISTER FINISHED.
    Round,
}

/// The end that receives the byte stream and answers requests.
#[derive(Debug)]
pub struct Receiver {
    window: u64,
    granted: u64,
    arrived: u64,
    finished: u64,
    /// Number of messages by which the sender may exceed its credits.
    ahead: u64,
}

impl Receiver {
    /// Nothing granted yet; at most `window` messages in flight at a time (1 towards QEMU).
    pub fn new(window: u16) -> Self {
        Self { window: u64::from(window.max(1)), granted: 0, arrived: 0, finished: 0, ahead: 0 }
    }

    /// For the return path: a QEMU sends its first message there without waiting for a credit, and stays one message
    /// ahead of its credits. So there must be one more receive buffer than credits.
    pub fn one_ahead(window: u16) -> Self {
        Self { ahead: 1, ..Self::new(window) }
    }

    /// True if a READY may be sent: every buffer it promises is free.
    pub fn may_grant(&self) -> bool {
        self.granted.saturating_sub(self.finished) < self.window
    }

    /// Notes that a READY is sent; false (and nothing noted) if it must not be.
    pub fn grant(&mut self) -> bool {
        let may = self.may_grant();
        self.granted += u64::from(may);
        may
    }

    /// Checks that the sender had a credit for a message.
    ///
    /// # Errors
    ///
    /// [`ExchangeError::PeerFailed`], [`ExchangeError::NoCredit`].
    pub fn on_arrival(&mut self, kind: Kind) -> Result<(), ExchangeError> {
        if kind == Kind::Error {
            return Err(ExchangeError::PeerFailed);
        }
        if self.arrived >= self.granted + self.ahead {
            return Err(ExchangeError::NoCredit { got: kind });
        }
        self.arrived += 1;
        Ok(())
    }

    /// Checks whether a message is allowed in this state.
    ///
    /// # Errors
    ///
    /// [`ExchangeError::Unexpected`].
    pub fn judge(kind: Kind, turn: Turn) -> Result<(), ExchangeError> {
        let (fits, doing) = match turn {
            Turn::Stream => (kind == Kind::Stream, "bytes of the stream were due"),
            Turn::Round => (kind.needs_credit() && kind != Kind::Stream, "a round was open"),
        };
        if fits { Ok(()) } else { Err(ExchangeError::Unexpected { got: kind, doing }) }
    }

    /// Notes that the oldest message is processed and its buffer free.
    pub fn finish(&mut self) {
        self.finished = (self.finished + 1).min(self.arrived);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn r12_one_message_per_ready_never_two() {
        let mut sender = Sender::new(1);
        assert_eq!(sender.send(Kind::Stream), None);
        assert_eq!(sender.on_arrival(Kind::Ready), Ok(SenderEvent::Ready));
        assert_eq!(sender.send(Kind::Stream), Some(1));
        assert_eq!(sender.send(Kind::Stream), None);
    }

    #[test]
    fn r13_a_second_ready_is_refused() {
        let mut sender = Sender::new(1);
        sender.on_arrival(Kind::Ready).unwrap();
        let twice = ExchangeError::TooManyReady { unused: 1, window: 1 };
        assert_eq!(sender.on_arrival(Kind::Ready), Err(twice));

        let mut receiver = Receiver::new(1);
        assert!(receiver.grant());
        assert!(!receiver.grant(), "one READY until a message is finished");
        receiver.on_arrival(Kind::Stream).unwrap();
        assert!(!receiver.grant(), "the message is still in its buffer");
        receiver.finish();
        assert!(receiver.grant());
    }

    #[test]
    fn r14_a_ready_before_the_reply_is_refused() {
        for window in [1, 4] {
            let mut sender = Sender::new(window);
            for _ in 0..window {
                sender.on_arrival(Kind::Ready).unwrap();
            }
            sender.send(Kind::RegisterRequest).unwrap();
            let early = ExchangeError::ReadyBeforeReply { missing: Kind::RegisterResult };
            assert_eq!(sender.on_arrival(Kind::Ready), Err(early), "{window}");
            assert_eq!(sender.on_arrival(Kind::RegisterResult), Ok(SenderEvent::Reply(Kind::RegisterResult)));
            assert_eq!(sender.on_arrival(Kind::Ready), Ok(SenderEvent::Ready));
        }
    }

    #[test]
    fn r33_a_message_is_finished_by_the_next_ready_and_with_a_window_that_much_later() {
        for window in [1u16, 3] {
            let mut sender = Sender::new(window);
            for _ in 0..window {
                sender.on_arrival(Kind::Ready).unwrap();
            }
            let first = sender.send(Kind::Compress).unwrap();
            assert!(!sender.is_finished(first));
            sender.on_arrival(Kind::Ready).unwrap();
            assert!(sender.is_finished(first), "{window}");
        }
    }

    #[test]
    fn r43_on_the_return_path_one_message_may_come_before_its_credit() {
        let mut receiver = Receiver::one_ahead(1);
        receiver.on_arrival(Kind::Stream).unwrap();
        receiver.finish();
        assert!(receiver.grant());
        receiver.on_arrival(Kind::Stream).unwrap();
        assert_eq!(receiver.on_arrival(Kind::Stream), Err(ExchangeError::NoCredit { got: Kind::Stream }));
    }

    #[test]
    fn r22_r40_messages_out_of_turn_are_refused() {
        let unexpected = |got, doing| Err(ExchangeError::Unexpected { got, doing });
        let mut sender = Sender::new(1);
        assert_eq!(
            sender.on_arrival(Kind::RegisterResult),
            unexpected(Kind::RegisterResult, "no request was open")
        );
        assert_eq!(sender.on_arrival(Kind::Stream), unexpected(Kind::Stream, "no request was open"));
        assert_eq!(sender.on_arrival(Kind::Error), Err(ExchangeError::PeerFailed));
        sender.on_arrival(Kind::Ready).unwrap();
        sender.send(Kind::RegisterRequest).unwrap();
        assert_eq!(
            sender.on_arrival(Kind::RamBlocksResult),
            unexpected(Kind::RamBlocksResult, "another answer was due")
        );

        let mut receiver = Receiver::new(1);
        assert_eq!(receiver.on_arrival(Kind::Stream), Err(ExchangeError::NoCredit { got: Kind::Stream }));
        receiver.grant();
        assert_eq!(receiver.on_arrival(Kind::Error), Err(ExchangeError::PeerFailed));
        for number in 0..=0x103 {
            let Some(kind) = Kind::from_wire(number) else { continue };
            let stream = Receiver::judge(kind, Turn::Stream).is_ok();
            let round = Receiver::judge(kind, Turn::Round).is_ok();
            assert_eq!(stream, kind == Kind::Stream, "{kind:?}");
            assert_eq!(round, matches!(number, 4 | 6 | 7 | 9 | 10 | 0x102 | 0x103), "{kind:?}");
        }
    }
}
