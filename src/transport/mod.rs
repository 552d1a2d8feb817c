//! The doors: how bytes and pages leave this host and enter it.
//!
//! One owner of bytes and pages per connection, because on some doors bytes must flush pages first, and on
//! some no byte may pass while a round is open. A new transport is one file here, one line in
//! `address` and one row in the README's table.

mod inline;
mod multifd;
mod open;
#[cfg(feature = "rdma")]
pub mod rdma;
mod stream;
mod testing;

pub use inline::{DeltaCacheSize, InlineLink, InlinePages};
pub use multifd::{ChannelOptions, MultifdLink, MultifdSource, Numa, PageSending};
pub use open::{
    Address, AddressError, AllowError, AllowList, DECISION_TIMEOUT, DestinationDoor, DoorOptions, Listener,
    Obstacle, OpenError, RdmaOptions, SourceDoor, Way, WhyNoRdma, connect, open_source, rdma_address,
    why_no_rdma,
};
pub use stream::{StreamBreaker, StreamChannel, StreamOptions};
pub use testing::{Fault, FaultKind, Faulty, Loopback, LoopbackSink, LoopbackSource, loopback};

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use crate::error::Remedy;
use crate::guest::{GuestError, GuestMemory, Placer};
use crate::observe::{DeltaCounts, PageCounts, SpliceCounts, ZeroCopyCounts};
use crate::ram::{MoverAbilities, PageBatch, PageRun, RamBlock, RoundKind};
use crate::stream::DecodeError;
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::stream::qemu::packet_numbers::MissingPackets;
use crate::stream::qemu::style::PeerStyle;
use crate::sys::{RecvPart, SendPart, Stop, StopReason};
use crate::units::PageSize;

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
    #[error("{peer} did not move a byte for {} s while {doing}; {}", after.as_secs(), Remedy::RaiseStallTimeout)]
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
    /// The command behind `exec:` was stopped by the kernel, since it wants to use the terminal.
    #[error(
        "`{command}` stands still: it asks something at the terminal, which it can't use from here; have it ask nothing \
         (ssh: a key, a known host, -o BatchMode=yes), or start it by hand and use unix: or fd:"
    )]
    CommandAsks {
        /// The command line.
        command: String,
    },
    /// The caller's own deadline or cancel.
    #[error("stopped while {doing}: {reason}")]
    Stopped {
        /// Which.
        reason: StopReason,
        /// What this end was doing.
        doing: &'static str,
    },
    /// A page channel whose bytes make no sense.
    #[error("{channel} is not understood")]
    Packet {
        /// Which.
        channel: String,
        /// What and where, from the channel's start.
        source: DecodeError,
    },
    /// The RDMA device, or the protocol spoken over it.
    #[error("{peer}: {doing}")]
    Rdma {
        /// Who.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// Whose doing it is.
        side: Side,
        /// What happened, with the remedy.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The kernel's answer.
    #[error("{peer}: {doing}")]
    Io {
        /// Who.
        peer: String,
        /// What this end was doing.
        doing: &'static str,
        /// The answer.
        source: io::Error,
    },
}

impl ChannelError {
    /// What would help, where a setting does.
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::Stalled { .. } => Some(Remedy::RaiseStallTimeout),
            Self::Packet { source, .. } => source.remedy(),
            _ => None,
        }
    }
}

/// On which side a fault lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// This host.
    Here,
    /// The peer.
    Peer,
    /// What lies between.
    Between,
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

    /// Waits until a command at the other end has read all that was sent: nothing else shows that it is at work. Elsewhere
    /// there is nothing to wait for.
    ///
    /// # Errors
    /// [`ChannelError`].
    fn await_read(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }

    /// As [`ByteSource::outlast`], for both directions of the connection.
    fn outlast(&mut self, _limit: Duration) {}

    /// Bytes sent so far.
    fn position(&self) -> u64;

    /// Of them, those that the peer's host does not have yet, where the kernel tells: what is sent next waits for them.
    fn under_way(&self) -> u64 {
        0
    }
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

    /// Whether more of the same follows the last bytes, as pages follow pages. Where it does and they came at a great pace,
    /// a read may wait for less than a millisecond, so that it takes much at once. `false` at first, and to be said where
    /// somebody waits for what comes of the next bytes.
    fn set_bulk(&mut self, _bulk: bool) {}

    /// The last byte of the stream has come: whether what wrote it ended well. Where a command did, its exit status says so,
    /// and what it writes behind the stream is passed over; elsewhere there is nothing to ask.
    ///
    /// # Errors
    /// [`ChannelError`]: what came is not to be counted on.
    fn ended_well(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }

    /// Whether the peer has nothing to send by its protocol, for as long as it likes. Then its silence is no stall as long as
    /// the connection answers; a pipe has nothing that answers, there the stall time goes on. `false` at first.
    fn set_quiet(&mut self, _quiet: bool) {}

    /// From here on the caller's [`Stop`] alone ends a wait: neither the stall time does, nor an outage of up to `limit`.
    fn outlast(&mut self, _limit: Duration) {}

    /// The descriptor behind it, where closing it is what tells the peer that this end has gone.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The door beside the stream, where pages come by one of their own. `None`: all pages are in the stream.
    fn rounds(&mut self) -> Option<&mut dyn DestinationLink> {
        None
    }

    /// Page channels beside the stream. `None`: there are none.
    fn channels(&mut self) -> Option<&mut dyn PageChannels> {
        None
    }
}

/// The destination's page channels, whose packets are placed by threads of their own.
///
/// # Orders that hold
///
/// Between [`wait_barrier`](Self::wait_barrier) and [`release`](Self::release) no thread places anything: all that came
/// before the barrier is in place, nothing that comes after it.
pub trait PageChannels: Send {
    /// There is memory now: starts to read. Once.
    ///
    /// # Errors
    /// [`MoveError`]: no thread could be started.
    fn begin(
        &mut self,
        placer: Arc<Placer>,
        blocks: AnnouncedBlocks,
        page: PageSize,
    ) -> Result<(), MoveError>;

    /// The stream has reached a barrier: waits until every channel has.
    ///
    /// # Errors
    /// [`MoveError`]: a channel failed, closed, or is not understood.
    fn wait_barrier(&mut self, stop: &Stop) -> Result<(), MoveError>;

    /// At a barrier: whether all packets have come that the source has sent before it, on whatever channel.
    ///
    /// # Errors
    /// [`MissingPackets`]: the source has a channel that is not read here.
    fn check_packets(&self) -> Result<(), MissingPackets> {
        Ok(())
    }

    /// Lets the channels go on behind the barrier.
    fn release(&mut self);

    /// Bytes that have come on them.
    fn bytes(&self) -> u64;

    /// The same as their threads count it, for whoever looks on. `None`: nobody can.
    fn live_bytes(&self) -> Option<Arc<AtomicU64>> {
        None
    }

    /// How many there are.
    fn count(&self) -> u8;

    /// Pages that came on each, in the order of their ids, each time that a page came. Whole at a barrier.
    fn placed(&self) -> Vec<PageCounts>;

    /// No page is taken any more: closes the channels and ends their threads.
    fn end(&mut self);
}

/// What a round brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoundReceived {
    /// Pages that may have been written for the first time, by the guest's own table.
    pub touched: Vec<PageRun>,
    /// Bytes the source told to be zero.
    pub zero_bytes: u64,
}

/// The destination's door where pages do not come in the stream: a mark in the stream opens a round, and the peer's
/// writes land in guest memory until it says that the round is over.
pub trait DestinationLink: Send {
    /// The source's block list, in its order, and the memory behind it. Once, before the first round.
    ///
    /// # Errors
    /// [`MoveError`]: a block that can't be written to from outside.
    fn announce(&mut self, memory: &Arc<dyn GuestMemory>, blocks: &[RamBlock]) -> Result<(), MoveError>;

    /// The mark has been read: serves the peer until the round is over. All its pages are in memory then.
    ///
    /// # Errors
    /// [`MoveError`].
    fn receive_round(&mut self, stop: &Stop) -> Result<RoundReceived, MoveError>;

    /// Bytes that the peer could write to for the first time, or said to be zero, counted while a round is served: for
    /// whoever looks on. `None`: nobody can.
    fn live_bytes(&self) -> Option<Arc<AtomicU64>> {
        None
    }

    /// True if the peer writes nothing between a round's end and the next byte that is read of the stream, so that what
    /// a round brought can be looked for in quiet.
    fn waits_after_round(&self) -> bool;

    /// From here on the peer can't write to guest memory any more. Before the guest runs.
    fn revoke(&mut self);

    /// Everything was read: closes the connection so that the peer's last message is acknowledged first.
    ///
    /// # Errors
    /// [`ChannelError`]; everything was read all the same.
    fn part(&mut self, stop: &Stop) -> Result<(), ChannelError>;
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
    /// Page channels are written in another way for each version of QEMU, and nothing tells which it is.
    #[error("nothing tells how the peer wants its page channels; {}", Remedy::NamePeer)]
    UnknownStyle,
}

impl MoveError {
    /// What would help, where a setting does.
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::Channel(error) => error.remedy(),
            Self::Guest(_) => None,
            Self::UnknownStyle => Some(Remedy::NamePeer),
        }
    }
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

    /// Bytes that went on other channels than the stream's.
    fn channel_bytes(&self) -> u64 {
        0
    }

    /// Bytes that were sent, on whatever channel, and have not left this host, as far as it tells.
    fn under_way(&mut self) -> u64 {
        self.sink().under_way()
    }

    /// How many page channels there are beside the stream.
    fn page_channels(&self) -> u8 {
        0
    }

    /// Pages sent so far, each time that a page was sent: in the stream, then on each page channel in the order of their
    /// ids. What the destination counts where it places them is compared with it before the guest is handed over, so they
    /// are counted where they leave. Pages that a NIC writes are not in it: their completion tells of each.
    fn sent_pages(&self) -> Vec<PageCounts>;

    /// What deltas did so far, where pages may travel as such.
    fn deltas(&self) -> DeltaCounts {
        DeltaCounts::default()
    }

    /// The size of the cache of sent pages, which may be changed; `None` where no page can travel as a difference.
    fn delta_cache_size(&self) -> Option<DeltaCacheSize> {
        None
    }

    /// What lending pages to the kernel came to, where that was asked for.
    fn zero_copy(&self) -> Option<ZeroCopyCounts> {
        None
    }

    /// What sending pages by reference came to, where that was asked for.
    fn spliced(&self) -> Option<SpliceCounts> {
        None
    }

    /// Moves out how long writes to the peer's memory took from their post to their completion, where there are such.
    fn take_latencies(&mut self, _out: &mut Vec<Duration>) {}

    /// The peer is known now, or is not: in what style it wants what only some doors write.
    ///
    /// # Errors
    /// [`MoveError::UnknownStyle`] from a door that must know.
    fn write_for(&mut self, _style: Option<PeerStyle>) -> Result<(), MoveError> {
        Ok(())
    }

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

    /// The peer has said that the guest runs there: closes the connection in good order.
    ///
    /// # Errors
    /// [`MoveError`]; the migration is complete all the same.
    fn part(&mut self, _stop: &Stop) -> Result<(), MoveError> {
        Ok(())
    }

    /// After a failure: the batches that never came back. The link is of no more use.
    fn reclaim(&mut self) -> Vec<PageBatch>;
}
