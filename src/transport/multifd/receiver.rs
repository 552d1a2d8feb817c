//! The destination's thread of one channel: packets become pages.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crossbeam::channel::{Receiver, Sender};

use super::counter::PageCounter;
use super::source::{gone, panicked};
use crate::guest::{PageWriter, Placer};
use crate::observe::caught;
use crate::ram::Landing;
use crate::stream::DecodeError;
use crate::stream::qemu::channel::{Channel, ChannelStep};
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::stream::qemu::multifd::{INIT_LEN, header_len};
use crate::stream::qemu::packet_numbers::PacketNumbers;
use crate::stream::qemu::page_compression::PacketInflater;
use crate::stream::{Corrupt, Fault};
use crate::sys::{HostSpan, Lock as _, RecvPart, Stop};
use crate::transport::{ByteSource, ChannelError, MoveError, StreamChannel};
use crate::units::PageSize;

/// Spans of guest memory that one read fills at most.
const SPANS: usize = 32;

/// Bytes that are received at once for memory that is not mapped: they stay in the second-level cache until they are
/// written on.
const BUFFER: usize = 128 << 10;

/// A report of a channel's thread.
#[derive(Debug)]
pub(super) enum ChannelEvent {
    /// It has reached a SYNC.
    AtBarrier,
    /// The peer closed it between two packets.
    Closed,
    /// It is of no more use.
    Failed(MoveError),
}

/// Informs the session that a thread ends by a panic: main waits for no barrier that can't come.
struct ReportAtEnd(Sender<ChannelEvent>);

impl Drop for ReportAtEnd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.0.send(ChannelEvent::Failed(gone()));
        }
    }
}

/// What all channels of a migration share.
pub(super) struct Common {
    pub(super) placer: Arc<Placer>,
    pub(super) blocks: AnnouncedBlocks,
    pub(super) page: PageSize,
    /// Numbers that channels have chosen.
    pub(super) ids: Mutex<Vec<u8>>,
    /// UUID that the first channel sent.
    pub(super) uuid: Mutex<Option<[u8; 16]>>,
    /// Numbers of the packets of all channels.
    pub(super) numbers: Mutex<PacketNumbers>,
    /// Pages are missing at a guest that may run: whether packets with such pages are expected. Read while a packet is
    /// placed.
    pub(super) missing: RwLock<Option<bool>>,
    /// Bytes of all channels.
    pub(super) bytes: Arc<AtomicU64>,
    /// Pages of each channel, by its id.
    pub(super) counters: Vec<PageCounter>,
}

/// One channel and what its thread needs.
pub(super) struct PageReceiver {
    pub(super) common: Arc<Common>,
    pub(super) channel: StreamChannel,
    pub(super) machine: Channel,
    pub(super) inflater: Option<PacketInflater>,
    pub(super) events: Sender<ChannelEvent>,
    pub(super) release: Receiver<()>,
    pub(super) stop: Stop,
    /// A packet's header, as far as it has arrived.
    pub(super) head: Vec<u8>,
    pub(super) filled: usize,
    pub(super) payload: Vec<u8>,
    pub(super) pages: Vec<u8>,
    pub(super) writer: PageWriter,
}

impl PageReceiver {
    /// Works until the peer closes, something fails, or its reports have no receiver.
    pub(super) fn run(mut self) {
        let report = ReportAtEnd(self.events.clone());
        let ended = caught("placing pages of a page channel", || self.serve());
        let ended = ended.unwrap_or_else(|panic| Err(panicked(panic)));
        drop(report);
        let last = match ended {
            Ok(()) => ChannelEvent::Closed,
            Err(error) => ChannelEvent::Failed(error),
        };
        // The receiver is gone after the migration.
        let _ = self.events.send(last);
    }

    fn serve(&mut self) -> Result<(), MoveError> {
        self.head.resize(header_len(self.common.page).max(INIT_LEN), 0);
        let common = Arc::clone(&self.common);
        loop {
            let next = self.machine.next(&self.head[..self.filled], &common.blocks);
            match next.map_err(|error| self.not_understood(error))? {
                ChannelStep::Opened { consumed, id } => {
                    self.consumed(consumed);
                    self.claim(id)?;
                }
                ChannelStep::Packet { consumed } => {
                    self.consumed(consumed);
                    self.take_packet()?;
                    self.machine.payload_taken();
                    self.tell_numbers();
                }
                ChannelStep::Barrier { consumed } => {
                    self.consumed(consumed);
                    self.tell_numbers();
                    if self.events.send(ChannelEvent::AtBarrier).is_err() || self.release.recv().is_err() {
                        return Ok(());
                    }
                    self.machine.release();
                }
                ChannelStep::NeedMore { consumed, .. } => {
                    self.consumed(consumed);
                    if !self.read_header()? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Reports the numbers of the packets that have arrived since the last call.
    fn tell_numbers(&mut self) {
        let mut all = self.common.numbers.locked();
        all.add(self.machine.take_numbers());
    }

    fn consumed(&mut self, count: usize) {
        self.head.copy_within(count..self.filled, 0);
        self.filled -= count;
    }

    /// Bytes of the thing that begins here: never beyond it, since a payload goes elsewhere.
    fn due(&self) -> usize {
        if self.machine.id().is_none() { INIT_LEN } else { header_len(self.common.page) }
    }

    /// Reads on; false if the peer closed between two packets.
    fn read_header(&mut self) -> Result<bool, MoveError> {
        let due = self.due();
        let room = &mut self.head[self.filled..due];
        let got = self.channel.recv(&mut [RecvPart::Own(room)], &self.stop)?;
        if got > 0 {
            self.filled += got;
            self.count(got);
            return Ok(true);
        }
        if self.filled == 0 && self.machine.may_end_here() {
            return Ok(false);
        }
        Err(self.closed("waiting for the rest of a packet").into())
    }

    fn count(&self, bytes: usize) {
        self.common.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn claim(&self, id: u8) -> Result<(), MoveError> {
        let mut ids = self.common.ids.locked();
        if ids.contains(&id) {
            let fault = Fault::Multifd("two channels have the same number");
            return Err(self.not_understood(DecodeError::Corrupt(Corrupt { at: 24, fault })));
        }
        ids.push(id);
        drop(ids);
        let mut uuid = self.common.uuid.locked();
        let first = *uuid.get_or_insert(self.machine.uuid());
        if first != self.machine.uuid() {
            let fault = Fault::Multifd("the channels belong to VMs of different UUIDs");
            return Err(self.not_understood(DecodeError::Corrupt(Corrupt { at: 8, fault })));
        }
        Ok(())
    }

    fn take_packet(&mut self) -> Result<(), MoveError> {
        let plan = self.machine.packet().clone();
        let Some(block) = plan.block else { return Ok(()) };
        let common = Arc::clone(&self.common);
        let missing = common.missing.read().unwrap_or_else(PoisonError::into_inner);
        if *missing == Some(false) {
            let fault = Fault::Multifd("a packet of pages comes after the guest was handed over");
            return Err(self.not_understood(DecodeError::Corrupt(Corrupt { at: 0, fault })));
        }
        let missing = missing.is_some();
        let placer = &common.placer;
        let admit = |(offset, bytes)| placer.admit(block, offset, bytes);
        let runs = super::runs_of(&plan.normal, common.page)
            .into_iter()
            .map(admit)
            .collect::<Result<Vec<_>, _>>()?;
        self.writer.check_faults();
        let buffered = missing || self.writer.prepare(placer, &runs);
        match self.inflater.is_some() {
            true if runs.is_empty() => {}
            true => self.expand_into(plan.payload as usize, placer, &runs)?,
            false if buffered => self.receive_by_buffer(placer, &runs)?,
            false => {
                let spans = runs.iter().map(|run| placer.target(*run)).collect::<Result<Vec<_>, _>>()?;
                self.receive_into(&spans)?;
                runs.iter().try_for_each(|run| placer.print_placed(*run, &mut self.pages))?;
            }
        }
        if !missing {
            runs.into_iter().for_each(|run| placer.commit(run));
        }
        let page = placer.page_bytes();
        for offset in &plan.zero {
            self.writer.place_zero(placer, placer.admit(block, *offset, page)?)?;
        }
        // The parser has refused an id that is none of ours.
        if let Some(counter) = self.machine.id().and_then(|id| common.counters.get(usize::from(id))) {
            counter.add(plan.normal.len() as u64, plan.zero.len() as u64);
        }
        Ok(())
    }

    /// Payload straight into guest memory; the bytes after it are the next header.
    fn receive_into(&mut self, spans: &[HostSpan<'_>]) -> Result<(), MoveError> {
        let (mut first, mut skip) = (0, 0);
        while let Some(span) = spans.get(first) {
            let mut parts = Vec::with_capacity(SPANS + 1);
            parts.extend(span.part(skip, span.len() - skip).map(RecvPart::Guest));
            parts.extend(spans[first + 1..].iter().take(SPANS - 1).map(|span| RecvPart::Guest(*span)));
            let last = first + parts.len() == spans.len();
            let due = spans[first..].iter().map(|span| span.len()).sum::<usize>() - skip;
            if last {
                let header = header_len(self.common.page);
                parts.push(RecvPart::Own(&mut self.head[..header]));
            }
            let mut got = self.channel.recv_due(&mut parts, due, &self.stop)?;
            if got == 0 {
                return Err(self.closed("waiting for the pages of a packet").into());
            }
            self.count(got);
            while let Some(span) = spans.get(first) {
                let left = span.len() - skip;
                if got < left {
                    skip += got;
                    got = 0;
                    break;
                }
                got -= left;
                (first, skip) = (first + 1, 0);
            }
            self.filled = got;
        }
        Ok(())
    }

    /// Payload into a buffer that stays in the cache, and from there into memory that is not mapped.
    fn receive_by_buffer(&mut self, placer: &Placer, runs: &[Landing]) -> Result<(), MoveError> {
        let total: usize = runs.iter().map(|run| run.len() as usize).sum();
        let due = header_len(self.common.page);
        self.pages.resize(BUFFER, 0);
        let mut at = 0;
        while at < total {
            let want = (total - at).min(BUFFER);
            let mut filled = 0;
            while filled < want {
                let room = RecvPart::Own(&mut self.pages[filled..want]);
                // The bytes after the payload are the next header.
                let header = RecvPart::Own(&mut self.head[..if at + want == total { due } else { 0 }]);
                let missing = total - at - filled;
                let got = self.channel.recv_due(&mut [room, header], missing, &self.stop)?;
                if got == 0 {
                    return Err(self.closed("waiting for the pages of a packet").into());
                }
                self.count(got);
                self.filled = got.saturating_sub(want - filled);
                filled += got - self.filled;
            }
            put(&mut self.writer, placer, runs, at, &self.pages[..want])?;
            at += want;
        }
        Ok(())
    }

    fn expand_into(&mut self, payload: usize, placer: &Placer, runs: &[Landing]) -> Result<(), MoveError> {
        self.payload.resize(payload, 0);
        let mut filled = 0;
        while filled < payload {
            let room = &mut self.payload[filled..];
            let due = room.len();
            let got = self.channel.recv_due(&mut [RecvPart::Own(room)], due, &self.stop)?;
            if got == 0 {
                return Err(self.closed("waiting for the pages of a packet").into());
            }
            self.count(got);
            filled += got;
        }
        self.pages.resize(runs.iter().map(|run| run.len() as usize).sum(), 0);
        if let Some(inflater) = &mut self.inflater {
            let expanded = inflater.inflate(&self.payload, &mut self.pages);
            expanded.map_err(|fault| self.not_understood(DecodeError::Corrupt(Corrupt { at: 0, fault })))?;
        }
        put(&mut self.writer, placer, runs, 0, &self.pages)
    }

    fn closed(&self, doing: &'static str) -> ChannelError {
        ChannelError::Closed { peer: self.name(), doing }
    }

    fn name(&self) -> String {
        match self.machine.id() {
            Some(id) => format!("page channel {id} of {}", self.channel.peer()),
            None => format!("a page channel of {}", self.channel.peer()),
        }
    }

    fn not_understood(&self, source: DecodeError) -> MoveError {
        ChannelError::Packet { channel: self.name(), source }.into()
    }
}

/// Writes `bytes`, which begin `at` bytes after the first byte of a packet's pages, to the places in `runs`. Where
/// missing pages are served they are whole pages, and are placed and committed.
fn put(
    writer: &mut PageWriter,
    placer: &Placer,
    runs: &[Landing],
    at: usize,
    mut bytes: &[u8],
) -> Result<(), MoveError> {
    let mut skip = at as u64;
    for run in runs {
        let Some(room) = run.len().checked_sub(skip).filter(|room| *room > 0) else {
            skip -= run.len();
            continue;
        };
        let (now, rest) = bytes.split_at(bytes.len().min(room as usize));
        match run.part(skip, now.len() as u64).filter(|_| placer.serves_missing()) {
            Some(part) => writer.place(placer, part, now.chunks(placer.page_bytes() as usize))?,
            None => writer.write(placer, *run, skip, std::iter::once(now))?,
        }
        (bytes, skip) = (rest, 0);
        if bytes.is_empty() {
            break;
        }
    }
    Ok(())
}
