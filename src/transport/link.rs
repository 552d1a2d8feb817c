//! How pages are sent: a link at the source, and its counterpart at the destination.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use crate::guest::Placer;
use crate::observe::{DeltaCounts, PageCounts, SpliceCounts, ZeroCopyCounts};
use crate::ram::{Fingerprints, Landing, MoverAbilities, PageBatch, PageRun, RoundKind};
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::stream::qemu::packet_numbers::MissingPackets;
use crate::stream::qemu::style::PeerStyle;
use crate::stream::snapshot_note::SnapshotNote;
use crate::sys::Stop;
use crate::transport::{
    ByteSink, ByteSource, ChannelError, DeltaCacheSize, MoveError, PulledPages, Sealed, SnapshotFile,
};

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

/// A batch that was returned.
#[derive(Debug)]
pub struct Returned {
    /// The ticket [`SourceLink::offer`] gave.
    pub ticket: Ticket,
    /// How far it got.
    pub receipt: Receipt,
    /// The batch, for its pages and its room.
    pub batch: PageBatch,
}

/// The source's link. Implemented by this library only.
///
/// # Orders that hold
///
/// A batch offered after [`close_round`](Self::close_round) never overtakes one offered before it. After
/// [`drain`](Self::drain) no ticket is out.
pub trait SourceLink: Send + Sealed {
    /// What this link can do.
    fn abilities(&self) -> MoverAbilities;

    /// The byte stream of the same connection; pending pages go first.
    fn sink(&mut self) -> &mut dyn ByteSink;

    /// Bytes that went on other channels than the stream's.
    fn channel_bytes(&self) -> u64 {
        0
    }

    /// Bytes that were sent, on any channel, and have not left this host, as far as it reports them.
    fn unacknowledged(&mut self) -> u64 {
        self.sink().unacknowledged()
    }

    /// Number of page channels.
    fn page_channels(&self) -> u8 {
        0
    }

    /// True if a batch that is offered now is taken without a wait.
    fn has_room(&self) -> bool {
        true
    }

    /// Pages sent so far, each time that a page was sent: in the stream, then on each page channel in the order of
    /// their ids. The destination's count of placed pages is compared with it before the guest is handed over, so pages
    /// are counted where they are sent. Pages that a NIC writes are not included: each is confirmed by its completion.
    fn sent_pages(&self) -> Vec<PageCounts>;

    /// Figures of the deltas so far, if pages may be sent as deltas.
    fn deltas(&self) -> DeltaCounts {
        DeltaCounts::default()
    }

    /// The size of the cache of sent pages, which may be changed; `None` if no page can be sent as a difference.
    fn delta_cache_size(&self) -> Option<DeltaCacheSize> {
        None
    }

    /// Figures of lending pages to the kernel, if that was requested.
    fn zero_copy(&self) -> Option<ZeroCopyCounts> {
        None
    }

    /// The output is the snapshot of this note, and is identified by it later: called before the first page. Returns
    /// the file; `None` if no file keeps a note.
    ///
    /// # Errors
    /// The file can't name its base.
    fn keep_note(&mut self, _note: &SnapshotNote) -> Result<Option<SnapshotFile>, MoveError> {
        Ok(None)
    }

    /// Figures of sending pages by reference, if that was requested.
    fn spliced(&self) -> Option<SpliceCounts> {
        None
    }

    /// Moves out how long writes to the peer's memory took from their post to their completion, where there are such.
    fn take_latencies(&mut self, _out: &mut Vec<Duration>) {}

    /// The peer is known now, or is not: sets the style of the parts that only some links write.
    ///
    /// # Errors
    /// [`MoveError::UnknownStyle`] from a link that must know.
    fn set_peer_style(&mut self, _style: Option<PeerStyle>) -> Result<(), MoveError> {
        Ok(())
    }

    /// Pages get fingerprints from here on. True if this link makes them itself, of all pages that are offered as other than
    /// zero, before the round is closed; before the first page.
    fn keep_fingerprints(&mut self, _prints: &Arc<Fingerprints>) -> bool {
        false
    }

    /// Opens a round for pages.
    ///
    /// # Errors
    /// [`MoveError`].
    fn open_round(&mut self, kind: RoundKind, stop: &Stop) -> Result<(), MoveError>;

    /// Hands a batch over.
    ///
    /// # Errors
    /// [`MoveError`]; the batch then counts as unsent and is returned by [`reclaim`](Self::reclaim).
    fn offer(&mut self, batch: PageBatch, stop: &Stop) -> Result<Offer, MoveError>;

    /// Takes back the batches that are finished, without waiting.
    ///
    /// # Errors
    /// [`MoveError`].
    fn collect(&mut self, out: &mut Vec<Returned>) -> Result<(), MoveError>;

    /// Closes the round: nothing later overtakes the offered batches.
    ///
    /// # Errors
    /// [`MoveError`].
    fn close_round(&mut self, kind: RoundKind, stop: &Stop) -> Result<(), MoveError>;

    /// Waits until no ticket is out.
    ///
    /// # Errors
    /// [`MoveError`].
    fn drain(&mut self, stop: &Stop) -> Result<(), MoveError>;

    /// After a switch to postcopy: no page is offered any more, since the peer reads the missing ones itself
    /// ([`MoverAbilities::serves_reads`]).
    ///
    /// # Errors
    /// [`MoveError`].
    fn begin_reads(&mut self, _stop: &Stop) -> Result<(), MoveError> {
        Ok(())
    }

    /// Lets the peer read this memory. Returns address and key; `None` from a link whose peer reads nothing.
    ///
    /// # Errors
    /// [`MoveError`]: it can't be registered.
    fn let_read(&mut self, _landing: Landing) -> Result<Option<(u64, u32)>, MoveError> {
        Ok(None)
    }

    /// The peer reads this memory no more: its key is revoked when this returns.
    fn forbid_read(&mut self, _landing: Landing) {}

    /// The peer has reported that the guest runs there: closes the connection in order.
    ///
    /// # Errors
    /// [`MoveError`]; the migration is complete nevertheless.
    fn close(&mut self, _stop: &Stop) -> Result<(), MoveError> {
        Ok(())
    }

    /// After a failure: the batches that were never returned. The link is of no more use.
    fn reclaim(&mut self) -> Vec<PageBatch>;
}

/// Abilities of a destination's link, and how pages arrive by it. Policy reads these; no code asks which link it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DestinationAbilities {
    /// Page channels next to the stream, whose pages are placed by threads of their own; the stream's barriers are
    /// theirs, too.
    pub page_channels: u8,
    /// Marks in the stream open rounds, in which the peer writes to guest memory itself. That memory is registered: none of
    /// it may be discarded.
    pub has_rounds: bool,
    /// The peer writes nothing between a round's end and the next byte that is read of the stream, so that a round's
    /// pages can be searched for while nothing changes.
    pub waits_after_round: bool,
    /// After a switch to postcopy the missing pages can be read from the source's memory.
    pub reads_missing: bool,
    /// Pages come when they are touched, and the guest runs before they have: its memory is emptied before the first one.
    pub on_demand: bool,
}

/// What a round brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RoundReceived {
    /// Pages that may have been written for the first time, by the guest's own table.
    pub touched: Vec<PageRun>,
    /// Bytes that the source reported as zero.
    pub zero_bytes: u64,
}

/// Bytes on page channels, as their threads count them, for a reader of the figures. `None`: they can't be counted, or
/// there are none.
#[derive(Clone, Debug, Default)]
pub struct LiveBytes {
    /// Bytes received on page channels.
    pub channels: Option<Arc<AtomicU64>>,
    /// Bytes that the peer could write to for the first time, or reported as zero, counted while a round is served.
    pub rounds: Option<Arc<AtomicU64>>,
}

/// The destination's link: the counterpart of a [`SourceLink`].
///
/// Methods that only links with [rounds](DestinationAbilities::has_rounds) or
/// [channels](DestinationAbilities::page_channels) need have a body for the others, which a session never calls there.
///
/// # Orders that hold
///
/// Between [`barrier`](Self::barrier) and [`release`](Self::release) no page channel places anything: all that arrived
/// before the barrier is in place, and nothing that arrives after it. Outside of [`receive_round`](Self::receive_round)
/// the peer writes nothing. After [`revoke`](Self::revoke) pages arrive only by the stream.
pub trait DestinationLink: Send + Sealed {
    /// What this link can do.
    fn abilities(&self) -> DestinationAbilities;

    /// The byte stream of the same connection.
    fn stream(&mut self) -> &mut dyn ByteSource;

    /// The source's block list, in its order, and where its pages go. Once, before the first page.
    ///
    /// # Errors
    /// [`MoveError`]: a block that the peer can't write to, or no thread could be started.
    fn announce(&mut self, placer: &Arc<Placer>, blocks: &AnnouncedBlocks) -> Result<(), MoveError>;

    /// The mark of a round has been read: serves the peer until the round is over. All its pages are in memory then. `None`:
    /// the peer has sent no message for `pause`; the next call goes on with the round.
    ///
    /// # Errors
    /// [`MoveError`].
    fn receive_round(&mut self, _stop: &Stop, _pause: Duration) -> Result<Option<RoundReceived>, MoveError> {
        Ok(Some(RoundReceived::default()))
    }

    /// The stream has reached a barrier: waits until every page channel has.
    ///
    /// # Errors
    /// [`MoveError`]: a channel failed, closed, or is not understood.
    fn barrier(&mut self, _stop: &Stop) -> Result<(), MoveError> {
        Ok(())
    }

    /// After a switch to postcopy: what reads the missing pages, of host pages of at most `host_page` bytes. `None` from a
    /// link that [can't](DestinationAbilities::reads_missing).
    ///
    /// # Errors
    /// [`MoveError`]: there is no memory for it.
    fn read_missing(&mut self, _host_page: u64) -> Result<Option<Arc<dyn PulledPages>>, MoveError> {
        Ok(None)
    }

    /// Packets of page channels that the source has sent, on any channel, and that have not arrived. Except at a
    /// barrier some may be in flight.
    fn missing_packets(&self) -> Option<MissingPackets> {
        None
    }

    /// Lets the page channels continue after the barrier.
    fn release(&mut self) {}

    /// The guest may run here from now on while pages are missing: calls `begin`, which makes that so, while no page
    /// channel places anything. Later packets bring missing pages, if such are `expected`; otherwise they are refused.
    ///
    /// # Errors
    /// A packet has come in part; `begin` was not called.
    fn begin_missing(&mut self, _expected: bool, begin: &mut dyn FnMut()) -> Result<(), MoveError> {
        begin();
        Ok(())
    }

    /// Bytes that have arrived on page channels.
    fn channel_bytes(&self) -> u64 {
        0
    }

    /// Counters to read while the migration runs.
    fn live_bytes(&self) -> LiveBytes {
        LiveBytes::default()
    }

    /// Pages that arrived on each page channel, in the order of their ids, each time that a page arrived. Complete at a
    /// barrier.
    fn placed_pages(&self) -> Vec<PageCounts> {
        Vec::new()
    }

    /// From here on no page is placed and the peer can't write to guest memory any more. Before the guest runs, and at the
    /// end of every migration. Again without effect.
    fn revoke(&mut self);

    /// Everything was read: closes the connection so that the peer's last message is acknowledged first. Again without
    /// effect.
    ///
    /// # Errors
    /// [`ChannelError`]; everything was read even so.
    fn close(&mut self, stop: &Stop) -> Result<(), ChannelError>;
}
