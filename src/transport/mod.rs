//! The doors: how bytes and pages leave this host and enter it.
//!
//! One owner of bytes and pages per connection, because on some doors bytes must flush pages first, and on
//! some no byte may pass while a round is open. A new transport is one file here, one line in
//! `address` and one row in the README's table.

mod address;
mod allow;
mod door;
mod exec;
mod fault;
mod file;
mod loopback;
mod patience;
mod stream;
mod tcp;
mod unix;

pub use address::{Address, AddressError};
pub use allow::{AllowError, AllowList};
pub use door::{Listener, OpenError, connect};
pub use fault::{Fault, FaultKind, Faulty};
pub use loopback::{Loopback, LoopbackSink, LoopbackSource, loopback};
pub use stream::{StreamBreaker, StreamChannel, StreamOptions};

mod inline;

use std::io;
use std::time::Duration;

use crate::guest::GuestError;
use crate::ram::{MoverAbilities, PageBatch, RoundKind};
use crate::sys::{RecvPart, SendPart, Stop, StopReason};

pub use inline::{InlineLink, InlinePages};

/// Why a channel did not carry bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The other end closed where more was expected.
    #[error("{peer} closed the connection while {doing}")]
    Closed {
        /// Who.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
    },
    /// No byte moved for the stall time.
    #[error("{peer} did not move a byte for {} s while {doing}; raise --stall-timeout if it is only slow", after.as_secs())]
    Stalled {
        /// Who.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// The stall time.
        after: Duration,
    },
    /// The peer's host no longer answers: dead, cut off, or its network is down.
    #[error("{peer} has not answered for {} s while {doing}; see whether its host and the network are up", after.as_secs())]
    Silent {
        /// Who.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// How long a silence was borne.
        after: Duration,
    },
    /// The command behind `exec:` failed.
    #[error("`{command}` failed: {status}; run it by hand to see why")]
    CommandFailed {
        /// The command line.
        command: String,
        /// Its exit status in words.
        status: String,
    },
    /// The caller's own deadline or cancel.
    #[error("stopped ({reason:?}) while {doing}")]
    Stopped {
        /// Which.
        reason: StopReason,
        /// What this end was doing.
        doing: &'static str,
    },
    /// The kernel's answer.
    #[error("{peer}: {doing}: {source}")]
    Io {
        /// Who.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// The answer.
        source: io::Error,
    },
}

/// Where a byte stream goes.
pub trait ByteSink: Send {
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

    /// The stream ends here in good order: no byte follows, and what is buffered or on its way to a disk
    /// has arrived there. The default is [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`ChannelError`].
    fn finish(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.flush(stop)
    }

    /// Bytes sent so far.
    fn position(&self) -> u64;
}

/// Where a byte stream comes from.
pub trait ByteSource: Send {
    /// Fills the parts in order with what is there, waiting for the first byte. 0 is the end of the stream.
    ///
    /// A deadline ends the wait, not the reading: what is there when it has passed is taken all the same, so
    /// that a deadline of zero looks without waiting.
    ///
    /// # Errors
    /// [`ChannelError`].
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError>;
}

/// Why pages did not move.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MoveError {
    /// The byte channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// Guest memory could not be reached.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

/// Names a batch handed to a link and not yet returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// A link's answer to an offered batch. The batch moves: a page has one owner at a time.
#[derive(Debug)]
pub enum Offer {
    /// The link owns the batch until a receipt returns it.
    Taken(Ticket),
    /// No room now: collect receipts, then offer again.
    Full(PageBatch),
    /// The link can't carry these pages: they go inline after the round closes.
    Declined(PageBatch),
}

/// How far a batch got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// The link reads the pages no more; whether the peer has them is not known.
    Released,
    /// The pages are in the peer's RAM.
    Placed,
}

/// A batch that came back.
#[derive(Debug)]
pub struct Returned {
    /// The ticket [`SourceLink::offer`] gave.
    pub ticket: Ticket,
    /// How far it got.
    pub receipt: Receipt,
    /// The batch, for its pages and its room.
    pub batch: PageBatch,
}

/// The source's door.
///
/// # Orders that hold
///
/// A batch offered after [`close_round`](Self::close_round) never overtakes one offered before it. After
/// [`drain`](Self::drain) no ticket is out.
pub trait SourceLink: Send {
    /// What this door can do.
    fn abilities(&self) -> MoverAbilities;

    /// The byte stream of the same connection; pending pages go first.
    fn sink(&mut self) -> &mut dyn ByteSink;

    /// Opens a round for pages.
    ///
    /// # Errors
    /// [`MoveError`].
    fn open_round(&mut self, kind: RoundKind, stop: &Stop) -> Result<(), MoveError>;

    /// Hands a batch over.
    ///
    /// # Errors
    /// [`MoveError`]; the batch then counts as unsent and comes back by [`reclaim`](Self::reclaim).
    fn offer(&mut self, batch: PageBatch, stop: &Stop) -> Result<Offer, MoveError>;

    /// Takes back the batches that are finished, without waiting.
    ///
    /// # Errors
    /// [`MoveError`].
    fn collect(&mut self, out: &mut Vec<Returned>) -> Result<(), MoveError>;

    /// Closes the round: nothing later overtakes what was offered.
    ///
    /// # Errors
    /// [`MoveError`].
    fn close_round(&mut self, kind: RoundKind, stop: &Stop) -> Result<(), MoveError>;

    /// Waits until no ticket is out.
    ///
    /// # Errors
    /// [`MoveError`].
    fn drain(&mut self, stop: &Stop) -> Result<(), MoveError>;

    /// After a failure: the batches that never came back. The link is of no more use.
    fn reclaim(&mut self) -> Vec<PageBatch>;
}
