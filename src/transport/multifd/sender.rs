//! The source's thread of one channel: batches become packets.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::channel::{Receiver, Sender};

use super::link::gone;
use crate::guest::{GuestError, GuestMemory};
use crate::ram::{PageBatch, PageRun, Piece, Verdict};
use crate::stream::qemu::multifd::{
    Init, MAX_COMPRESSED, Method, NewPacket, encode_init, encode_packet, encode_sync, packet_pages,
};
use crate::stream::qemu::packed::{PacketDeflater, Packing};
use crate::sys::{HostSpan, MAX_PARTS, SendPart, Stop, is_zero};
use crate::transport::{ByteSink, ChannelError, MoveError, Receipt, Returned, StreamChannel, Ticket};
use crate::units::{BlockIndex, BlockOffset, PageIndex, PageSize};

/// What a channel is given to do.
#[derive(Debug)]
pub(super) enum Work {
    /// Send these pages.
    Batch(Ticket, PageBatch),
    /// Send a SYNC.
    Sync,
}

/// What a channel answers.
#[derive(Debug)]
pub(super) enum Done {
    /// The pages have been handed to the kernel. Those that were not looked at have a verdict now.
    Sent(Returned),
    /// The SYNC has.
    Synced,
    /// They have not, and will not be.
    Unsent(PageBatch),
    /// The channel is of no more use.
    Failed(MoveError),
}

/// Tells the link of a thread that ends by a panic, so that nobody waits for its answers.
struct LastWord(Sender<Done>);

impl Drop for LastWord {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.0.send(Done::Failed(gone()));
        }
    }
}

/// One channel and what its thread needs.
pub(super) struct PageSender {
    pub(super) id: u8,
    pub(super) channel: StreamChannel,
    pub(super) guest: Arc<dyn GuestMemory>,
    pub(super) packing: Packing,
    pub(super) uuid: [u8; 16],
    /// Packets of all channels so far.
    pub(super) packets: Arc<AtomicU64>,
    /// Bytes of all channels so far.
    pub(super) bytes: Arc<AtomicU64>,
    pub(super) work: Receiver<Work>,
    pub(super) done: Sender<Done>,
    pub(super) stop: Stop,
}

impl PageSender {
    /// Works until the queue is closed or something fails. Nobody listens to `done` only when the link is gone.
    pub(super) fn run(mut self) {
        let _told = LastWord(self.done.clone());
        let deflater = PacketDeflater::new(self.packing).map_err(|source| self.failed("compressing", source));
        let begun = deflater.and_then(|deflater| {
            let mut init = Vec::new();
            encode_init(&Init { uuid: self.uuid, id: self.id }, &mut init);
            self.send(&[SendPart::Own(&init)])?;
            Ok(deflater)
        });
        let ended = begun.and_then(|mut deflater| self.serve(&mut deflater));
        if let Err(error) = ended {
            let _ = self.done.send(Done::Failed(error));
        }
    }

    fn serve(&mut self, deflater: &mut PacketDeflater) -> Result<(), MoveError> {
        let page = self.guest.table().page();
        let mut spare = PageBatch::default();
        let mut packet = Packet::new(page);
        while let Ok(work) = self.work.recv() {
            match work {
                Work::Batch(ticket, batch) => {
                    spare.clear();
                    let sent = self.send_batch(&batch, &mut packet, deflater, &mut spare);
                    if let Err(error) = sent {
                        let _ = self.done.send(Done::Unsent(batch));
                        return Err(error);
                    }
                    let looked_at = std::mem::replace(&mut spare, batch);
                    let returned = Returned { ticket, receipt: Receipt::Released, batch: looked_at };
                    let _ = self.done.send(Done::Sent(returned));
                }
                Work::Sync => {
                    let mut sync = Vec::new();
                    encode_sync(self.packets.fetch_add(1, Ordering::Relaxed), page, &mut sync);
                    self.send(&[SendPart::Own(&sync)])?;
                    let _ = self.done.send(Done::Synced);
                }
            }
        }
        Ok(())
    }

    /// Sends the pages that are not known to be zero: those went as records on main. `looked_at` gets every page with
    /// what it travelled as.
    fn send_batch(
        &mut self,
        batch: &PageBatch,
        packet: &mut Packet,
        deflater: &mut PacketDeflater,
        looked_at: &mut PageBatch,
    ) -> Result<(), MoveError> {
        let guest = Arc::clone(&self.guest);
        let page = guest.table().page();
        for piece in batch.pieces() {
            if piece.verdict == Verdict::Zero {
                looked_at.push(piece.run, Verdict::Zero);
                continue;
            }
            let landing = guest.table().admit_run(piece.run).map_err(GuestError::from)?;
            let span = guest.span(landing)?;
            for index in 0..piece.run.pages {
                let at = PageIndex(piece.run.first.0 + index);
                let bytes = span.part((index * page.bytes()) as usize, page.bytes() as usize);
                let (Some(offset), Some(bytes)) = (page.offset_of(at), bytes) else { break };
                if packet.is_full() || packet.block.is_some_and(|block| block != piece.run.block) {
                    self.send_packet(packet, deflater)?;
                }
                packet.block = Some(piece.run.block);
                let verdict = packet.add(piece, offset, bytes);
                looked_at.push(PageRun { first: at, pages: 1, ..piece.run }, verdict);
            }
        }
        self.send_packet(packet, deflater)
    }

    fn send_packet(&mut self, packet: &mut Packet, deflater: &mut PacketDeflater) -> Result<(), MoveError> {
        let guest = Arc::clone(&self.guest);
        let block = packet.block.take().and_then(|block| Some((block, guest.table().get(block)?)));
        let Some((index, block)) = block.filter(|_| !packet.is_empty()) else { return Ok(()) };
        let page = guest.table().page();
        let mut spans = Vec::with_capacity(packet.normal.len());
        for run in packet.runs() {
            let landing = guest.table().admit(index, run.0, run.1).map_err(GuestError::from)?;
            spans.push(guest.span(landing)?);
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
        let mut parts = [SendPart::Own(&[]); MAX_PARTS];
        parts[0] = SendPart::Own(&packet.header);
        let mut used = 1;
        if deflater.is_plain() {
            for (slot, span) in parts[1..].iter_mut().zip(&spans) {
                *slot = SendPart::Guest(*span);
                used += 1;
            }
        } else {
            parts[1] = SendPart::Own(&packet.payload);
            used = 2;
        }
        self.send(&parts[..used])?;
        packet.clear();
        Ok(())
    }

    fn method(&self) -> Method {
        self.packing.method()
    }

    fn send(&mut self, parts: &[SendPart<'_>]) -> Result<(), MoveError> {
        let before = self.channel.position();
        let sent = self.channel.send(parts, &self.stop);
        self.bytes.fetch_add(self.channel.position() - before, Ordering::Relaxed);
        Ok(sent?)
    }

    fn failed(&self, doing: &'static str, source: std::io::Error) -> MoveError {
        ChannelError::Io { peer: self.channel.peer().to_owned(), doing, source }.into()
    }
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

    /// Takes a page; a run that nobody has looked at is looked at here.
    fn add(&mut self, piece: &Piece, offset: BlockOffset, bytes: HostSpan<'_>) -> Verdict {
        if piece.verdict == Verdict::Unknown && is_zero(bytes) {
            self.zero.push(offset);
            return Verdict::Zero;
        }
        self.normal.push(offset);
        Verdict::Whole
    }

    /// The normal pages as offset and length of what lies together.
    fn runs(&self) -> Vec<(BlockOffset, u64)> {
        let mut runs: Vec<(BlockOffset, u64)> = Vec::new();
        for offset in &self.normal {
            match runs.last_mut() {
                Some((first, len)) if first.0 + *len == offset.0 => *len += self.page.bytes(),
                _ => runs.push((*offset, self.page.bytes())),
            }
        }
        runs
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
