//! The source's link over several channels.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded, unbounded};

use super::counter::PageCounter;
use super::numa::Placement;
use super::page_channel::{PageChannel, Tally};
use super::sender::{Done, PageSender, Work};
use super::{ChannelOptions, default_active};
use crate::guest::GuestMemory;
use crate::observe::{Caught, PageCounts, SpliceCounts, ZeroCopyCounts};
use crate::ram::{Fingerprints, MoverAbilities, PageBatch, RoundKind, Verdict};
use crate::stream::qemu::ram::Record;
use crate::stream::qemu::style::{BarrierStyle, PeerStyle, ZeroPageStyle};
use crate::sys::{CancelToken, SendPart, Stop};
use crate::transport::open::OpenError;
use crate::transport::stream::Queue;
use crate::transport::{
    ByteSink, ChannelError, InlinePages, MoveError, Offer, Receipt, Returned, SourceLink, StreamChannel,
    Ticket,
};

/// Pages of one batch: four packets of 4 KiB pages.
const BATCH_PAGES: u32 = 512;
/// Batches that wait for one channel, in addition to the one that it sends.
const QUEUED: usize = 2;
/// Longest time between two checks of the caller's [`Stop`].
const POLL_INTERVAL: Duration = Duration::from_millis(50);

const SENDING: &str = "sending pages on the channels";

/// Pages on channels, everything else in the stream.
pub struct MultifdLink {
    main: Box<dyn ByteSink>,
    records: InlinePages,
    threads: Threads,
    /// The peer's, once it is known.
    style: Option<PeerStyle>,
    bytes: Arc<AtomicU64>,
    /// Takes the channels' fingerprints of pages, once they are needed.
    prints: Arc<OnceLock<Arc<Fingerprints>>>,
    /// Pages of each channel so far.
    counters: Vec<Arc<PageCounter>>,
    tally: Tally,
    /// Batches on their way back to the caller.
    finished: Vec<Returned>,
    unsent: Vec<PageBatch>,
    zeros: PageBatch,
    turn: Turn,
    tickets: u64,
}

/// The channels' threads, and what is exchanged with them.
struct Threads {
    queues: Vec<Sender<Work>>,
    /// The other ends of the queues: what a thread that has ended left there is the guest's again.
    left: Vec<Receiver<Work>>,
    handles: Vec<JoinHandle<()>>,
    done: Receiver<Done>,
    /// Batches and SYNCs that were not answered.
    out: usize,
    /// Stops the threads, which outlive the caller's own waits.
    cancel: CancelToken,
}

/// Which channel gets the next batch.
struct Turn {
    next: usize,
    /// Number of channels that get any.
    active: usize,
    /// What waits in the channels' sockets.
    waiting: Vec<Queue>,
}

/// Connects `options.count` channels by `open`, which has connected the main one before.
pub(in crate::transport) fn connect(
    main: Box<dyn ByteSink>,
    memory: Arc<dyn GuestMemory>,
    options: &ChannelOptions,
    mut open: impl FnMut() -> Result<StreamChannel, OpenError>,
) -> Result<MultifdLink, OpenError> {
    // All are connected before the first thread starts: a failure leaves no thread running.
    let channels = (0..options.count).map(|_| open()).collect::<Result<Vec<_>, _>>()?;
    let placement = Placement::of_source(&options.numa, &channels, &*memory);
    let (give, done) = unbounded();
    let mut link = MultifdLink {
        main,
        records: InlinePages::new(Arc::clone(&memory)),
        threads: Threads {
            queues: Vec::new(),
            left: Vec::new(),
            handles: Vec::new(),
            done,
            out: 0,
            cancel: CancelToken::default(),
        },
        style: None,
        bytes: Arc::default(),
        prints: Arc::default(),
        counters: channels.iter().map(|_| Arc::default()).collect(),
        tally: Tally::of(options.sending),
        finished: Vec::new(),
        unsent: Vec::new(),
        zeros: PageBatch::default(),
        turn: Turn {
            next: 0,
            active: options
                .active
                .unwrap_or_else(|| default_active(&channels))
                .clamp(1, channels.len().max(1)),
            waiting: channels.iter().map(StreamChannel::queue).collect(),
        },
        tickets: 0,
    };
    let packets = Arc::new(AtomicU64::new(0));
    let prints = Arc::clone(&link.prints);
    for (id, (channel, counter)) in (0..=u8::MAX).zip(channels.into_iter().zip(link.counters.clone())) {
        let (queue, work) = bounded(QUEUED);
        let peer = channel.peer().to_owned();
        let sender = PageSender {
            id,
            channel: PageChannel::new(channel, &link.tally),
            lent: VecDeque::new(),
            guest: Arc::clone(&memory),
            compression: options.compression,
            uuid: options.uuid,
            packets: Arc::clone(&packets),
            bytes: Arc::clone(&link.bytes),
            counter,
            prints: Arc::clone(&prints),
            work: work.clone(),
            done: give.clone(),
            stop: Stop::on(&link.threads.cancel),
        };
        let job = placement.keep(id.into(), Box::new(move || sender.run()));
        let started = (options.spawn)("ramwire-chan-tx", job);
        let doing = "starting the thread of a page channel";
        let started = started.map_err(|source| ChannelError::Io { peer, doing, source });
        link.threads.handles.push(started.map_err(OpenError::Channel)?);
        link.threads.queues.push(queue);
        link.threads.left.push(work);
    }
    Ok(link)
}

impl MultifdLink {
    fn style(&self) -> PeerStyle {
        self.style.unwrap_or(PeerStyle::QEMU_7_2)
    }

    /// Takes an answer of a channel.
    fn take(&mut self, done: Done) -> Result<(), MoveError> {
        match done {
            Done::Sent(returned) => {
                self.threads.out -= 1;
                self.finished.push(returned);
                Ok(())
            }
            Done::Synced => {
                self.threads.out -= 1;
                Ok(())
            }
            Done::Unsent(batch) => {
                self.threads.out -= 1;
                self.unsent.push(batch);
                Ok(())
            }
            Done::Failed(error) => Err(error),
        }
    }

    /// Waits for the next answer, and not beyond `stop`.
    fn wait(&mut self, stop: &Stop) -> Result<(), MoveError> {
        loop {
            match self.threads.done.recv_timeout(POLL_INTERVAL) {
                Ok(done) => return self.take(done),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(gone()),
            }
            if let Some(reason) = stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: SENDING }.into());
            }
        }
    }

    /// Puts a SYNC at the end of the queue of `channel`; waits for room.
    fn sync(&mut self, channel: usize, stop: &Stop) -> Result<(), MoveError> {
        loop {
            match self.threads.queues[channel].try_send(Work::Sync) {
                Ok(()) => {
                    self.threads.out += 1;
                    return Ok(());
                }
                Err(TrySendError::Full(_)) => self.wait(stop)?,
                Err(TrySendError::Disconnected(_)) => return Err(gone()),
            }
        }
    }

    /// Gives the batch to the first channel with room, in turn. Channels beyond the active ones get none.
    fn distribute(&mut self, ticket: Ticket, batch: PageBatch, stop: &Stop) -> Result<(), MoveError> {
        let mut work = Work::Batch(ticket, batch);
        loop {
            for step in 0..self.turn.active {
                let channel = (self.turn.next + step) % self.turn.active;
                match self.threads.queues[channel].try_send(work) {
                    Ok(()) => {
                        self.turn.next = (channel + 1) % self.turn.active;
                        self.threads.out += 1;
                        return Ok(());
                    }
                    Err(TrySendError::Full(back)) => work = back,
                    Err(TrySendError::Disconnected(back)) => {
                        self.keep(back);
                        return Err(gone());
                    }
                }
            }
            if let Err(error) = self.wait(stop) {
                self.keep(work);
                return Err(error);
            }
        }
    }

    fn keep(&mut self, work: Work) {
        if let Work::Batch(_, batch) = work {
            self.unsent.push(batch);
        }
    }

    /// The pages known to be zero go as records on main.
    fn send_zeros(&mut self, batch: &PageBatch, stop: &Stop) -> Result<(), MoveError> {
        self.zeros.clear();
        let zeros = batch.pieces().iter().filter(|piece| piece.verdict == Verdict::Zero);
        zeros.for_each(|piece| self.zeros.push(piece.run, Verdict::Zero));
        self.records.write(&self.zeros, &mut *self.main, stop)
    }

    fn stop_threads(&mut self) {
        self.threads.cancel.cancel();
        self.threads.queues.clear();
        for thread in self.threads.handles.drain(..) {
            // A panic there has closed its connection, which the peer notices.
            let _ = thread.join();
        }
        while let Ok(done) = self.threads.done.try_recv() {
            // Why one failed was reported when it did, or is no longer of interest.
            let _ = self.take(done);
        }
        for work in std::mem::take(&mut self.threads.left).iter().flat_map(Receiver::try_iter) {
            self.keep(work);
        }
    }
}

/// The embedder's code ended the work of a channel's thread.
pub(super) fn panicked(Caught { during, text }: Caught) -> MoveError {
    MoveError::Panicked { during, text }
}

/// A thread has ended and has reported nothing.
pub(super) fn gone() -> MoveError {
    let source = std::io::Error::other("the thread of a page channel has ended");
    ChannelError::Io { peer: "page channels".into(), doing: SENDING, source }.into()
}

impl crate::transport::Sealed for MultifdLink {}

impl SourceLink for MultifdLink {
    fn abilities(&self) -> MoverAbilities {
        MoverAbilities {
            classifies: self.style().zero_pages == ZeroPageStyle::Multifd,
            takes_deltas: false,
            exclusive_round: false,
            confirms_placement: false,
            ordered: false,
            registers_memory: false,
            serves_reads: false,
            batches_in_flight: (self.turn.active * (QUEUED + 1)) as u32,
            batch_pages: BATCH_PAGES,
        }
    }

    fn sink(&mut self) -> &mut dyn ByteSink {
        &mut *self.main
    }

    fn channel_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn unacknowledged(&mut self) -> u64 {
        self.main.unacknowledged() + self.turn.waiting.iter().map(Queue::bytes).sum::<u64>()
    }

    fn page_channels(&self) -> u8 {
        self.counters.len() as u8
    }

    fn has_room(&self) -> bool {
        self.threads.queues.iter().take(self.turn.active).any(|queue| !queue.is_full())
    }

    fn sent_pages(&self) -> Vec<PageCounts> {
        let channels = self.counters.iter().map(|counter| counter.counts());
        std::iter::once(self.records.counts()).chain(channels).collect()
    }

    fn zero_copy(&self) -> Option<ZeroCopyCounts> {
        self.tally.zero_copy()
    }

    fn spliced(&self) -> Option<SpliceCounts> {
        self.tally.spliced()
    }

    fn set_peer_style(&mut self, style: Option<PeerStyle>) -> Result<(), MoveError> {
        let Some(style) = style else { return Err(MoveError::UnknownStyle) };
        self.style = Some(style);
        Ok(())
    }

    fn keep_fingerprints(&mut self, prints: &Arc<Fingerprints>) -> bool {
        self.prints.set(Arc::clone(prints)).is_ok()
    }

    fn open_round(&mut self, _kind: RoundKind, _stop: &Stop) -> Result<(), MoveError> {
        if self.style.is_some() { Ok(()) } else { Err(MoveError::UnknownStyle) }
    }

    fn offer(&mut self, batch: PageBatch, stop: &Stop) -> Result<Offer, MoveError> {
        if batch.zero_pages() > 0
            && let Err(error) = self.send_zeros(&batch, stop)
        {
            self.unsent.push(batch);
            return Err(error);
        }
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        if batch.whole_pages() == 0 {
            self.finished.push(Returned { ticket, receipt: Receipt::Released, batch });
        } else {
            self.distribute(ticket, batch, stop)?;
        }
        Ok(Offer::Taken(ticket))
    }

    fn collect(&mut self, out: &mut Vec<Returned>) -> Result<(), MoveError> {
        while let Ok(done) = self.threads.done.try_recv() {
            self.take(done)?;
        }
        out.append(&mut self.finished);
        Ok(())
    }

    /// A SYNC is sent after everything else on each channel; the barrier on main is a record of its own or, for older
    /// peers, the end of the section that the session writes next.
    fn close_round(&mut self, _kind: RoundKind, stop: &Stop) -> Result<(), MoveError> {
        for channel in 0..self.threads.queues.len() {
            self.sync(channel, stop)?;
        }
        if self.style().barrier == BarrierStyle::PerRound {
            let mut flush = Vec::new();
            Record::MultifdFlush.encode(&mut flush);
            self.main.send(&[SendPart::Own(&flush)], stop)?;
        }
        // Not for the order, which the barrier keeps: a round's figures are its own, and no page stays lent.
        while self.threads.out > 0 {
            self.wait(stop)?;
        }
        Ok(())
    }

    fn drain(&mut self, stop: &Stop) -> Result<(), MoveError> {
        while self.threads.out > 0 {
            self.wait(stop)?;
        }
        Ok(self.main.flush(stop)?)
    }

    /// A QEMU from 10.0 on must be able to check that an encrypted channel was not cut off.
    fn close(&mut self, _stop: &Stop) -> Result<(), MoveError> {
        for queue in &self.threads.queues {
            // One that has no room has not sent all, and one that has ended nothing to end.
            let _ = queue.try_send(Work::End);
        }
        self.stop_threads();
        Ok(())
    }

    fn reclaim(&mut self) -> Vec<PageBatch> {
        self.stop_threads();
        std::mem::take(&mut self.unsent)
    }
}

impl Drop for MultifdLink {
    fn drop(&mut self) {
        self.stop_threads();
    }
}
