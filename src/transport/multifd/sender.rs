//! The source's thread of one channel: batches become packets.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crossbeam::channel::{Receiver, Sender, TryRecvError};

use super::counter::PageCounter;
use super::page_channel::PageChannel;
use super::source::{gone, panicked};
use crate::guest::{GuestError, GuestMemory, span_of};
use crate::observe::caught;
use crate::ram::{Fingerprints, PageBatch, PageRun, Piece, Verdict};
use crate::stream::qemu::multifd::{
    Init, MAX_COMPRESSED, Method, NewPacket, encode_init, encode_packet, encode_sync, packet_pages,
};
use crate::stream::qemu::page_compression::{PacketDeflater, PageCompression};
use crate::sys::{HostSpan, MAX_PARTS, SendPart, Stop, is_zero, look_ahead};
use crate::transport::{ChannelError, MoveError, Receipt, Returned, Ticket};
use crate::units::{BlockIndex, BlockOffset, PageIndex, PageSize};

/// Work for a channel.
#[derive(Debug)]
pub(super) enum Work {
    /// Send these pages.
    Batch(Ticket, PageBatch),
    /// Send a SYNC.
    Sync,
    /// Nothing follows.
    End,
}

/// What a channel answers.
#[derive(Debug)]
pub(super) enum Done {
    /// The pages have been handed to the kernel, and it reads them no more. Those that were not examined have a verdict
    /// now.
    Sent(Returned),
    /// The SYNC has.
    Synced,
    /// They have not, and will not be.
    Unsent(PageBatch),
    /// The channel is of no more use.
    Failed(MoveError),
}

/// Informs the link that a thread ends by a panic, so that its answers are not waited for.
struct ReportAtEnd(Sender<Done>);

impl Drop for ReportAtEnd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.0.send(Done::Failed(gone()));
        }
    }
}

/// One channel and what its thread needs.
pub(super) struct PageSender {
    pub(super) id: u8,
    pub(super) channel: PageChannel,
    /// Batches that the kernel may still read, each with the mark up to which they are lent.
    pub(super) lent: VecDeque<(u64, Returned)>,
    pub(super) guest: Arc<dyn GuestMemory>,
    pub(super) compression: PageCompression,
    pub(super) uuid: [u8; 16],
    /// Packets of all channels so far.
    pub(super) packets: Arc<AtomicU64>,
    /// Bytes of all channels so far.
    pub(super) bytes: Arc<AtomicU64>,
    /// Pages of this one so far.
    pub(super) counter: Arc<PageCounter>,
    /// Takes the fingerprints of pages, once they are needed.
    pub(super) prints: Arc<OnceLock<Arc<Fingerprints>>>,
    pub(super) work: Receiver<Work>,
    pub(super) done: Sender<Done>,
    pub(super) stop: Stop,
}

impl PageSender {
    /// Works until the queue is closed or something fails. `done` has no receiver only when the link is gone.
    pub(super) fn run(mut self) {
        let _told = ReportAtEnd(self.done.clone());
        let deflater =
            PacketDeflater::new(self.compression).map_err(|source| self.failed("compressing", source));
        let begun = deflater.and_then(|deflater| {
            let mut init = Vec::new();
            encode_init(&Init { uuid: self.uuid, id: self.id }, &mut init);
            self.send(&[SendPart::Own(&init)])?;
            Ok(deflater)
        });
        let ended = begun.and_then(|mut deflater| self.serve(&mut deflater));
        for (_, returned) in self.lent.drain(..) {
            let _ = self.done.send(Done::Unsent(returned.batch));
        }
        if let Err(error) = ended {
            let _ = self.done.send(Done::Failed(error));
        }
    }

    fn serve(&mut self, deflater: &mut PacketDeflater) -> Result<(), MoveError> {
        let page = self.guest.table().page();
        let mut spare = PageBatch::default();
        let mut packet = Packet::new(page);
        while let Some(work) = self.next_work()? {
            match work {
                Work::Batch(ticket, batch) => {
                    spare.clear();
                    // The batch outlives a panic of the embedder's memory: its pages are not sent.
                    let sent = caught("sending pages on a page channel", || {
                        self.send_batch(&batch, &mut packet, deflater, &mut spare)
                    });
                    let mark = match sent.unwrap_or_else(|panic| Err(panicked(panic))) {
                        Ok(mark) => mark,
                        Err(error) => {
                            let _ = self.done.send(Done::Unsent(batch));
                            return Err(error);
                        }
                    };
                    let looked_at = std::mem::replace(&mut spare, batch);
                    let returned = Returned { ticket, receipt: Receipt::Released, batch: looked_at };
                    self.lent.push_back((mark, returned));
                }
                Work::Sync => {
                    let mut sync = Vec::new();
                    encode_sync(self.packets.fetch_add(1, Ordering::Relaxed), page, &mut sync);
                    self.send(&[SendPart::Own(&sync)])?;
                    let _ = self.done.send(Done::Synced);
                }
                Work::End => self.channel.send_end(),
            }
        }
        Ok(())
    }

    /// Gives back what the kernel is done with, and takes the next thing to do. While there is none, waits for either.
    fn next_work(&mut self) -> Result<Option<Work>, MoveError> {
        loop {
            while let Some((mark, _)) = self.lent.front()
                && self.channel.is_done(*mark)?
                && let Some((_, returned)) = self.lent.pop_front()
            {
                let _ = self.done.send(Done::Sent(returned));
            }
            if self.lent.is_empty() {
                return Ok(self.work.recv().ok());
            }
            match self.work.try_recv() {
                Ok(work) => return Ok(Some(work)),
                Err(TryRecvError::Empty) => self.channel.await_some(&self.stop)?,
                Err(TryRecvError::Disconnected) => return Ok(None),
            }
        }
    }

    /// Sends the pages that are not known to be zero: those were sent as records on main. `looked_at` gets every page
    /// with the form in which it was sent. Pages may be lent up to the mark that is returned.
    fn send_batch(
        &mut self,
        batch: &PageBatch,
        packet: &mut Packet,
        deflater: &mut PacketDeflater,
        looked_at: &mut PageBatch,
    ) -> Result<u64, MoveError> {
        let guest = Arc::clone(&self.guest);
        let page = guest.table().page();
        let mut mark = 0;
        for piece in batch.pieces() {
            if piece.verdict == Verdict::Zero {
                looked_at.push(piece.run, Verdict::Zero);
                continue;
            }
            let landing = guest.table().admit_run(piece.run).map_err(GuestError::from)?;
            let span = span_of(&*guest, landing)?;
            for index in 0..piece.run.pages {
                let at = PageIndex(piece.run.first.0 + index);
                if piece.verdict == Verdict::Unknown {
                    look_ahead(span, index as usize, page.bytes() as usize);
                }
                let bytes = span.part((index * page.bytes()) as usize, page.bytes() as usize);
                let (Some(offset), Some(bytes)) = (page.offset_of(at), bytes) else { break };
                if packet.is_full() || packet.block.is_some_and(|block| block != piece.run.block) {
                    mark = self.send_packet(packet, deflater)?.max(mark);
                }
                packet.block = Some(piece.run.block);
                let verdict = packet.add(piece, offset, bytes);
                if let Some(prints) = self.prints.get() {
                    packet.print(prints, (piece.run.block, at), verdict, bytes);
                }
                looked_at.push(PageRun { first: at, pages: 1, ..piece.run }, verdict);
            }
        }
        Ok(self.send_packet(packet, deflater)?.max(mark))
    }

    fn send_packet(&mut self, packet: &mut Packet, deflater: &mut PacketDeflater) -> Result<u64, MoveError> {
        let guest = Arc::clone(&self.guest);
        let block = packet.block.take().and_then(|block| Some((block, guest.table().get(block)?)));
        let Some((index, block)) = block.filter(|_| !packet.is_empty()) else { return Ok(0) };
        let page = guest.table().page();
        let mut spans = Vec::with_capacity(packet.normal.len());
        for run in super::runs_of(&packet.normal, packet.page) {
            let landing = guest.table().admit(index, run.0, run.1).map_err(GuestError::from)?;
            spans.push(span_of(&*guest, landing)?);
        }
        packet.payload.clear();
        if !deflater.is_plain() && !spans.is_empty() {
            packet.deflate(&spans, deflater).map_err(|source| self.failed("compressing", source))?;
        }
        let plain = u64::from(page.shift()).min(63);
        let payload = match deflater.is_plain() {
            true => (packet.normal.len() as u64) << plain,
            false => packet.payload.len() as u64,
        };
        packet.header.clear();
        let new = NewPacket {
            number: self.packets.fetch_add(1, Ordering::Relaxed),
            method: self.method(),
            block: block.name.as_str(),
            normal: &packet.normal,
            zero: &packet.zero,
            payload: payload as u32,
        };
        encode_packet(&new, page, &mut packet.header);
        let mark = if deflater.is_plain() && self.channel.sends_apart() {
            // Apart: the header's bytes are others by the time that the kernel reads pages.
            let (header, more) = ([SendPart::Own(&packet.header)], !spans.is_empty());
            self.counted(|channel, stop| channel.send(&header, more, stop))?;
            let mut parts = [SendPart::Own(&[]); MAX_PARTS];
            let used = fill(&mut parts, &spans);
            self.counted(|channel, stop| channel.send_pages(&parts[..used], stop))?
        } else {
            let mut parts = [SendPart::Own(&[]); MAX_PARTS];
            parts[0] = SendPart::Own(&packet.header);
            let used = match deflater.is_plain() {
                true => 1 + fill(&mut parts[1..], &spans),
                false => {
                    parts[1] = SendPart::Own(&packet.payload);
                    2
                }
            };
            self.send(&parts[..used])?;
            0
        };
        self.counter.add(packet.normal.len() as u64, packet.zero.len() as u64);
        packet.clear();
        Ok(mark)
    }

    fn method(&self) -> Method {
        self.compression.method()
    }

    fn send(&mut self, parts: &[SendPart<'_>]) -> Result<(), MoveError> {
        self.counted(|channel, stop| channel.send(parts, false, stop))
    }

    fn counted<T>(
        &mut self,
        send: impl FnOnce(&mut PageChannel, &Stop) -> Result<T, ChannelError>,
    ) -> Result<T, MoveError> {
        let before = self.channel.position();
        let sent = send(&mut self.channel, &self.stop);
        self.bytes.fetch_add(self.channel.position() - before, Ordering::Relaxed);
        Ok(sent?)
    }

    fn failed(&self, doing: &'static str, source: std::io::Error) -> MoveError {
        ChannelError::Io { peer: self.channel.peer().to_owned(), doing, source }.into()
    }
}

/// The spans as parts; how many.
fn fill<'a>(parts: &mut [SendPart<'a>], spans: &[HostSpan<'a>]) -> usize {
    parts.iter_mut().zip(spans).map(|(part, span)| *part = SendPart::Guest(*span)).count()
}

/// A packet that fills.
struct Packet {
    room: usize,
    page: PageSize,
    block: Option<BlockIndex>,
    normal: Vec<BlockOffset>,
    zero: Vec<BlockOffset>,
    header: Vec<u8>,
    payload: Vec<u8>,
    copy: Vec<u8>,
    /// One page, for its fingerprint.
    window: Vec<u8>,
}

impl Packet {
    fn new(page: PageSize) -> Self {
        let room = packet_pages(page) as usize;
        let (normal, zero) = (Vec::with_capacity(room), Vec::with_capacity(room));
        Self {
            room,
            page,
            block: None,
            normal,
            zero,
            header: Vec::new(),
            payload: Vec::new(),
            copy: Vec::new(),
            window: Vec::new(),
        }
    }

    fn is_empty(&self) -> bool {
        self.normal.is_empty() && self.zero.is_empty()
    }

    fn is_full(&self) -> bool {
        self.normal.len() + self.zero.len() >= self.room
    }

    fn clear(&mut self) {
        self.block = None;
        self.normal.clear();
        self.zero.clear();
    }

    /// Takes a page; one that was not examined yet is examined here.
    fn add(&mut self, piece: &Piece, offset: BlockOffset, bytes: HostSpan<'_>) -> Verdict {
        if piece.verdict == Verdict::Unknown && is_zero(bytes) {
            self.zero.push(offset);
            return Verdict::Zero;
        }
        self.normal.push(offset);
        Verdict::Whole
    }

    /// Keeps the fingerprint of a page that was just taken. A write of the guest meanwhile marks the page dirty, and it is sent
    /// and fingerprinted again.
    fn print(
        &mut self,
        prints: &Fingerprints,
        (block, first): (BlockIndex, PageIndex),
        verdict: Verdict,
        bytes: HostSpan<'_>,
    ) {
        if verdict == Verdict::Zero {
            return prints.set_zero(PageRun { block, first, pages: 1 });
        }
        self.window.resize(bytes.len(), 0);
        bytes.copy_to(&mut self.window);
        prints.set(block, first, prints.of(&self.window));
    }

    /// A copy is compressed: the guest may write while the compressor looks back, and what it looks back at must be
    /// what it has sent.
    fn deflate(&mut self, spans: &[HostSpan<'_>], deflater: &mut PacketDeflater) -> std::io::Result<()> {
        let bytes = self.normal.len() * self.page.bytes() as usize;
        self.copy.resize(bytes, 0);
        let mut at = 0;
        for span in spans {
            at += span.copy_to(&mut self.copy[at..]);
        }
        deflater.deflate(&self.copy[..at], &mut self.payload)?;
        if self.payload.len() > MAX_COMPRESSED as usize {
            return Err(std::io::Error::other("a packet grew beyond what any receiver takes"));
        }
        Ok(())
    }
}
