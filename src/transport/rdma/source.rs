//! The source's end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use rdma_hooks::{
    BlockSpan, ExtensionOffer, Fabric, FabricError, Features, HooksError, MigrationId, PageContent,
    RamControl, ReturnReader, SaveDisposition, SourceConfig, SourceHooks, Ticket as Save,
};

use super::{End, MAX_DATA_QUEUES, WINDOW, misused};
use crate::guest::{GuestError, GuestMemory};
use crate::observe::PageCounts;
use crate::ram::{Landing, MoverAbilities, PageBatch, RoundKind, Verdict};
use crate::sys::{RecvPart, SendPart, Stop, random_id};
use crate::transport::RdmaOptions;
use crate::transport::{
    Address, ByteSink, ByteSource, ChannelError, ChosenTransport, MoveError, Offer, Receipt, Returned,
    SourceConnection, SourceLink, StreamOptions, Ticket,
};
use crate::units::BlockIndex;

const CONNECTING: &str = "connecting";
const SENDING: &str = "sending the stream";
const WRITING: &str = "writing pages";
const SERVING: &str = "letting the destination read missing pages";
const FINISHING: &str = "finishing the stream";
const LISTENING: &str = "waiting for an answer";

/// Maximum number of bytes of pages in flight. More would not use a link better, and would hide the real rate of the
/// pages from the page loop: 8 MiB are in flight for 0.7 ms on a link of 100 Gb/s.
const IN_FLIGHT_BYTES: u64 = 8 << 20;
/// Pages in a batch: two chunks.
const BATCH_PAGES: u32 = 512;
/// Rate of the slowest device that still counts as moving, for limits on waits for many bytes.
const SLOWEST_BYTES_PER_SECOND: u64 = 1 << 20;
/// Guest pages that RDMA declines are copied through a buffer of this size: messages carry only own bytes.
const COPY_BYTES: usize = 32 << 10;

/// Connects to `rdma:HOST:PORT` over `fabric`, for the pages of `memory`.
///
/// There is a return path if the destination is a ramwire, or if `rdma` requests it from a QEMU.
///
/// # Errors
/// [`ChannelError`]: [`ChannelError::Rdma`] with the reason, for instance the limit on locked memory.
pub fn connect_over(
    fabric: Arc<dyn Fabric>,
    host: &str,
    port: u16,
    memory: Arc<dyn GuestMemory>,
    options: &StreamOptions,
    rdma: &RdmaOptions,
    stop: &Stop,
) -> Result<SourceConnection, ChannelError> {
    let peer = Address::rdma(host, port).to_string();
    let end = End { fabric: Arc::clone(&fabric), peer, stall: options.stall };
    let bounds = end.bounds_of(stop, Some(options.dead_peer));
    let failed = |error| bounds.error(CONNECTING, error);
    let config = SourceConfig {
        pin_all: rdma.pin_all,
        pin_budget_bytes: rdma.pin_budget,
        page_bytes: memory.table().page().bytes(),
        extension: Some(ExtensionOffer {
            data_queues: rdma.queue_pairs.saturating_sub(1).min(MAX_DATA_QUEUES),
            window: WINDOW,
            features: Features { reads: rdma.postcopy, ..Features::ALL },
            migration: MigrationId(random_id()),
        }),
        most_blocks: memory.table().blocks().len().max(1024),
        record_latencies: true,
        ..SourceConfig::default()
    };
    let mut hooks = SourceHooks::connect(&*fabric, host, port, config, &bounds.hooks).map_err(failed)?;
    let native = hooks.granted().extension.is_some();
    let back = match native || rdma.return_path {
        true => Some(hooks.open_return_path(&*fabric, &bounds.hooks).map_err(failed)?),
        false => None,
    };
    hooks.set_blocks(blocks_of(&*memory).map_err(failed)?).map_err(failed)?;
    let back = back.map(|reader| RdmaReturnSource { reader, end: end.clone() });
    let link = RdmaLink {
        page_bytes: memory.table().page().bytes(),
        total_bytes: memory.table().total(),
        wire: Wire { hooks: Some(hooks), end, round_open: false, sent: 0, scratch: Vec::new() },
        memory,
        flights: VecDeque::new(),
        in_flight: 0,
        finished: Vec::new(),
        failed: Vec::new(),
        spans: Vec::new(),
        tickets: 0,
    };
    let way = ChosenTransport { transport: "rdma", why: "the address says so".into() };
    Ok(SourceConnection::new(Box::new(link), back.map(|back| Box::new(back) as Box<_>)).by(way))
}

fn blocks_of(memory: &dyn GuestMemory) -> Result<Vec<rdma_hooks::RamBlock>, HooksError> {
    let blocks = memory.table().blocks().iter().enumerate();
    let nic = blocks.map(|(index, block)| {
        let region = memory.region(BlockIndex(index as u32));
        let region = region.and_then(|region| region.for_nic(block.used_length));
        let region = region.ok_or(FabricError::NotPinned { bytes: block.used_length })?;
        Ok(rdma_hooks::RamBlock::new(block.name.as_str(), region))
    });
    nic.collect()
}

/// A batch whose pages are in flight.
struct Flight {
    ticket: Ticket,
    last: Save,
    bytes: u64,
    batch: PageBatch,
}

/// The source's link: pages by RDMA WRITE, zero runs as a message, the stream between the rounds.
pub struct RdmaLink {
    wire: Wire,
    memory: Arc<dyn GuestMemory>,
    page_bytes: u64,
    total_bytes: u64,
    flights: VecDeque<Flight>,
    /// Bytes in `flights`.
    in_flight: u64,
    finished: Vec<Returned>,
    failed: Vec<PageBatch>,
    /// The batch being saved.
    spans: Vec<BlockSpan>,
    tickets: u64,
}

/// The byte stream of the connection.
struct Wire {
    /// `None` once the connection has ended.
    hooks: Option<SourceHooks>,
    end: End,
    round_open: bool,
    /// Bytes of the stream and of pages.
    sent: u64,
    scratch: Vec<u8>,
}

impl Wire {
    fn hooks<'a>(
        hooks: &'a mut Option<SourceHooks>,
        end: &End,
        doing: &'static str,
    ) -> Result<&'a mut SourceHooks, ChannelError> {
        hooks.as_mut().ok_or_else(|| misused(&end.peer, doing, "the connection has ended"))
    }
}

impl crate::transport::Sealed for Wire {}

impl ByteSink for Wire {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        debug_assert!(!self.round_open, "stream bytes while a round is open");
        if self.round_open {
            return Err(misused(&self.end.peer, SENDING, "stream bytes while a round is open"));
        }
        let hooks = Self::hooks(&mut self.hooks, &self.end, SENDING)?;
        let bounds = self.end.bounds(stop, Duration::ZERO);
        let failed = |error| bounds.error(SENDING, error);
        for part in parts {
            match part {
                SendPart::Own(bytes) => hooks.write_stream(bytes, &bounds.hooks).map_err(failed)?,
                SendPart::Guest(span) => {
                    self.scratch.resize(COPY_BYTES, 0);
                    let mut at = 0;
                    while let Some(piece) = span.part(at, COPY_BYTES.min(span.len() - at)) {
                        let got = piece.copy_to(&mut self.scratch);
                        if got == 0 {
                            break;
                        }
                        hooks.write_stream(&self.scratch[..got], &bounds.hooks).map_err(failed)?;
                        at += got;
                    }
                }
            }
            self.sent += part.len() as u64;
        }
        Ok(())
    }

    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        let hooks = Self::hooks(&mut self.hooks, &self.end, SENDING)?;
        let bounds = self.end.bounds(stop, Duration::ZERO);
        hooks.flush_stream(&bounds.hooks).map_err(|error| bounds.error(SENDING, error))
    }

    /// Waits until the destination closes: without a return path, nothing else shows that it has received everything.
    fn finish(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        let Some(hooks) = self.hooks.take() else { return Ok(()) };
        let bounds = self.end.stall_bounds(stop);
        let began = self.end.fabric.now();
        match hooks.finish(&bounds.hooks) {
            Ok(true) => Ok(()),
            Ok(false) => {
                let after = self.end.fabric.now().saturating_duration_since(began);
                Err(ChannelError::Stalled { peer: self.end.peer.clone(), doing: FINISHING, after })
            }
            Err(error) => Err(bounds.error(FINISHING, error)),
        }
    }

    fn position(&self) -> u64 {
        self.sent
    }
}

fn control(kind: RoundKind) -> RamControl {
    match kind {
        RoundKind::Setup => RamControl::Setup,
        RoundKind::Live => RamControl::Round,
        RoundKind::Final => RamControl::Finish,
    }
}

/// More time for a wait until `bytes` have moved.
fn time_for(bytes: u64) -> Duration {
    Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND)
}

impl RdmaLink {
    /// Passes the pages of `batch` to the hooks; returns the number of the last save, or `None` if the link does not
    /// take them.
    fn save(&mut self, batch: &PageBatch, stop: &Stop) -> Result<Option<Save>, MoveError> {
        let hooks = Wire::hooks(&mut self.wire.hooks, &self.wire.end, WRITING)?;
        let bounds = self.wire.end.bounds(stop, time_for(self.in_flight));
        self.spans.clear();
        for piece in batch.pieces() {
            let landing = self.memory.table().admit_run(piece.run).map_err(GuestError::from)?;
            let content = match piece.verdict {
                Verdict::Zero => PageContent::Zero,
                Verdict::Whole => PageContent::Data,
                Verdict::Unknown => PageContent::Unknown,
            };
            let (block, offset) = (piece.run.block.0, landing.offset().0);
            self.spans.push(BlockSpan { block, offset, len: landing.len(), content });
        }
        let failed = |error| bounds.error(WRITING, error);
        hooks.expect_pages(&self.spans, &bounds.hooks).map_err(failed)?;
        let mut last = None;
        for &span in &self.spans {
            match hooks.control_save_page(span, &bounds.hooks).map_err(failed)? {
                SaveDisposition::Delayed { ticket, .. } => last = Some(ticket),
                SaveDisposition::NotSupported(_) => return Ok(None),
            }
        }
        Ok(last)
    }

    /// Returns the batches up to save `done`.
    fn retire(&mut self, done: Save) {
        while self.flights.front().is_some_and(|flight| flight.last <= done) {
            let Some(flight) = self.flights.pop_front() else { break };
            self.in_flight -= flight.bytes;
            let Flight { ticket, batch, .. } = flight;
            self.finished.push(Returned { ticket, receipt: Receipt::Placed, batch });
        }
    }

    /// Waits until less than [`IN_FLIGHT_BYTES`] are in flight.
    fn make_room(&mut self, stop: &Stop) -> Result<(), MoveError> {
        while self.in_flight > IN_FLIGHT_BYTES {
            let Some(oldest) = self.flights.front().map(|flight| flight.last) else { break };
            let hooks = Wire::hooks(&mut self.wire.hooks, &self.wire.end, WRITING)?;
            let bounds = self.wire.end.bounds(stop, time_for(self.in_flight));
            hooks.wait_for(oldest, &bounds.hooks).map_err(|error| bounds.error(WRITING, error))?;
            self.retire(oldest);
        }
        Ok(())
    }
}

impl crate::transport::Sealed for RdmaLink {}

impl SourceLink for RdmaLink {
    fn abilities(&self) -> MoverAbilities {
        MoverAbilities {
            // The hooks could; but their result would not come back with the batch.
            classifies: false,
            takes_deltas: false,
            exclusive_round: true,
            confirms_placement: true,
            ordered: true,
            registers_memory: true,
            serves_reads: self.wire.hooks.as_ref().is_some_and(SourceHooks::serves_reads),
            batches_in_flight: (IN_FLIGHT_BYTES / self.page_bytes / u64::from(BATCH_PAGES)) as u32,
            batch_pages: BATCH_PAGES,
        }
    }

    fn sink(&mut self) -> &mut dyn ByteSink {
        &mut self.wire
    }

    /// Counts only zero pages, which are sent as messages. The NIC writes whole pages, and its completion confirms that
    /// they are placed.
    fn sent_pages(&self) -> Vec<PageCounts> {
        let zero_bytes = self.wire.hooks.as_ref().map_or(0, |hooks| hooks.counters().zero_bytes);
        vec![PageCounts { zero: zero_bytes / self.page_bytes, ..PageCounts::default() }]
    }

    fn take_latencies(&mut self, out: &mut Vec<Duration>) {
        if let Some(hooks) = &mut self.wire.hooks {
            hooks.drain_latencies(out);
        }
    }

    fn open_round(&mut self, kind: RoundKind, stop: &Stop) -> Result<(), MoveError> {
        let hooks = Wire::hooks(&mut self.wire.hooks, &self.wire.end, WRITING)?;
        let bounds = self.wire.end.bounds(stop, Duration::ZERO);
        let failed = |error| bounds.error(WRITING, error);
        if let Some(mark) = hooks.registration_start(control(kind)).map_err(failed)? {
            let mark = mark.to_bytes();
            hooks.write_stream(&mark, &bounds.hooks).map_err(failed)?;
            self.wire.sent += mark.len() as u64;
            self.wire.round_open = true;
        }
        Ok(())
    }

    fn offer(&mut self, batch: PageBatch, stop: &Stop) -> Result<Offer, MoveError> {
        let last = match self.save(&batch, stop) {
            Ok(Some(last)) => last,
            Ok(None) => return Ok(Offer::Declined(batch)),
            Err(error) => {
                self.failed.push(batch);
                return Err(error);
            }
        };
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        let bytes = batch.whole_pages() * self.page_bytes;
        self.wire.sent += bytes;
        self.in_flight += bytes;
        self.flights.push_back(Flight { ticket, last, bytes, batch });
        self.make_room(stop)?;
        Ok(Offer::Taken(ticket))
    }

    fn collect(&mut self, out: &mut Vec<Returned>) -> Result<(), MoveError> {
        let due = !self.flights.is_empty() || self.wire.round_open;
        if let Some(hooks) = self.wire.hooks.as_mut().filter(|_| due) {
            let never = Stop::never();
            let bounds = self.wire.end.stall_bounds(&never);
            let done = hooks.collect().map_err(|error| bounds.error(WRITING, error))?;
            self.retire(done);
        }
        out.append(&mut self.finished);
        Ok(())
    }

    fn close_round(&mut self, kind: RoundKind, stop: &Stop) -> Result<(), MoveError> {
        if !self.wire.round_open {
            return Ok(());
        }
        // The setup round may register all of RAM at both ends.
        let moving = if kind == RoundKind::Setup { self.total_bytes } else { self.in_flight };
        let hooks = Wire::hooks(&mut self.wire.hooks, &self.wire.end, WRITING)?;
        let bounds = self.wire.end.bounds(stop, time_for(moving));
        hooks
            .registration_stop(control(kind), &bounds.hooks)
            .map_err(|error| bounds.error(WRITING, error))?;
        self.wire.round_open = false;
        Ok(())
    }

    fn drain(&mut self, stop: &Stop) -> Result<(), MoveError> {
        let Some(last) = self.flights.back().map(|flight| flight.last) else { return Ok(()) };
        let hooks = Wire::hooks(&mut self.wire.hooks, &self.wire.end, WRITING)?;
        let bounds = self.wire.end.bounds(stop, time_for(self.in_flight));
        hooks.drain(&bounds.hooks).map_err(|error| bounds.error(WRITING, error))?;
        self.retire(last);
        Ok(())
    }

    fn begin_reads(&mut self, stop: &Stop) -> Result<(), MoveError> {
        let hooks = Wire::hooks(&mut self.wire.hooks, &self.wire.end, SERVING)?;
        let bounds = self.wire.end.bounds(stop, time_for(self.in_flight));
        Ok(hooks.begin_reads(&bounds.hooks).map_err(|error| bounds.error(SERVING, error))?)
    }

    fn let_read(&mut self, landing: Landing) -> Result<Option<(u64, u32)>, MoveError> {
        let hooks = Wire::hooks(&mut self.wire.hooks, &self.wire.end, SERVING)?;
        let never = Stop::never();
        let bounds = self.wire.end.stall_bounds(&never);
        let start = landing.offset().0;
        let key = hooks.let_read(landing.block().0, start..start + landing.len());
        let key = key.map_err(|error| bounds.error(SERVING, error))?;
        Ok(Some((key.address, key.rkey)))
    }

    fn forbid_read(&mut self, landing: Landing) {
        if let Some(hooks) = &mut self.wire.hooks {
            hooks.forbid_read(landing.block().0, landing.offset().0);
        }
    }

    fn close(&mut self, stop: &Stop) -> Result<(), MoveError> {
        Ok(self.wire.finish(stop)?)
    }

    /// The connection is dropped first: none of our writes is in flight any more, and no memory is registered.
    fn reclaim(&mut self) -> Vec<PageBatch> {
        drop(self.wire.hooks.take());
        let flights = self.flights.drain(..).map(|flight| flight.batch);
        let batches = flights.chain(self.failed.drain(..)).collect();
        self.in_flight = 0;
        batches
    }
}

/// The destination's messages, on a queue pair of their own.
pub struct RdmaReturnSource {
    reader: ReturnReader,
    end: End,
}

impl crate::transport::Sealed for RdmaReturnSource {}

impl ByteSource for RdmaReturnSource {
    /// No stall time: the destination sends only when it has a message.
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        let Some(room) = own_room(into) else { return Ok(0) };
        let bounds = self.end.stall_bounds(stop);
        match self.reader.read(room, &bounds.hooks) {
            Err(HooksError::Fabric(FabricError::Disconnected)) => Ok(0),
            read => read.map_err(|error| bounds.error(LISTENING, error)),
        }
    }
}

/// The first room that is ours; messages are never received into guest memory.
pub(super) fn own_room<'a>(into: &'a mut [RecvPart<'_>]) -> Option<&'a mut [u8]> {
    into.iter_mut().find_map(|part| match part {
        RecvPart::Own(room) if !room.is_empty() => Some(&mut **room),
        _ => None,
    })
}
