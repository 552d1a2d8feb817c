//! The destination's end.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use rdma_hooks::fabric::Listener;
use rdma_hooks::{
    DestinationConfig, DestinationHooks, Fabric, FabricError, Features, HooksError, RamBlock as NicBlock,
    ReturnWriter, Stopped,
};

use super::reads::RdmaPages;
use super::source::own_room;
use super::{End, MAX_DATA_QUEUES, WINDOW, misused};
use crate::guest::{GuestError, Placer};
use crate::ram::PageRun;
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::sys::{RecvPart, SendPart, Stop};
use crate::transport::{
    Address, AllowList, ByteSink, ByteSource, ChannelError, ChosenTransport, DestinationAbilities,
    DestinationConnection, DestinationLink, LiveBytes, MoveError, PulledPages, RdmaOptions, ReadHints,
    RoundReceived, StreamOptions,
};
use crate::units::BlockIndex;

const ACCEPTING: &str = "waiting for the source to connect";
const RECEIVING: &str = "waiting for the stream";
const ANNOUNCING: &str = "offering memory to the source";
const SERVING: &str = "serving a round of pages";
const ANSWERING: &str = "answering the source";
const PARTING: &str = "closing the connection";

/// How long it waits for one event before it checks the other: the stream's first bytes, or a return path.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// How long a ramwire source may take to open its return path.
const RETURN_PATH_TIMEOUT: Duration = Duration::from_secs(10);
/// The unit in which a source requests keys.
const CHUNK_BYTES: u64 = rdma_hooks::chunk::CHUNK_BYTES;
/// First bytes that are read while a return path may still be opened: one message of the stream.
const AHEAD_BYTES: usize = 32 << 10;

/// Waits for a source.
pub struct RdmaListener {
    listener: Box<dyn Listener>,
    fabric: Arc<dyn Fabric>,
    allow: AllowList,
    address: Address,
}

impl std::fmt::Debug for RdmaListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RdmaListener({})", self.address)
    }
}

impl RdmaListener {
    /// Listens at `host:port` of `fabric`. Port 0 takes any.
    ///
    /// # Errors
    /// The fabric's: no device at this address, or the port is taken.
    pub fn bind(
        fabric: Arc<dyn Fabric>,
        host: &str,
        port: u16,
        allow: AllowList,
    ) -> Result<Self, FabricError> {
        let listener = fabric.listen(host, port)?;
        let address = Address::rdma(host, listener.port());
        Ok(Self { listener, fabric, allow, address })
    }

    /// The address it listens on, with the chosen port.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// The port listened on.
    pub fn port(&self) -> u16 {
        self.listener.port()
    }

    /// Waits for a source, and for its return path if it has one: a ramwire has one, a QEMU opens it before its first
    /// stream byte or never.
    ///
    /// # Errors
    /// [`ChannelError`].
    pub fn accept(
        &mut self,
        options: &StreamOptions,
        rdma: &RdmaOptions,
        stop: &Stop,
    ) -> Result<DestinationConnection, ChannelError> {
        let (listener, accepting) = self.parts();
        accepting.accept(listener, options, rdma, stop)
    }

    /// The listener, and what else an accept needs: for an accept by a listener around this one.
    pub(super) fn parts(&mut self) -> (&mut dyn Listener, Accepting) {
        let end = End { fabric: Arc::clone(&self.fabric), peer: self.address.to_string(), stall: None };
        (&mut *self.listener, Accepting { end, allow: self.allow.clone() })
    }
}

/// What an accept needs besides a listener.
pub(super) struct Accepting {
    end: End,
    allow: AllowList,
}

impl Accepting {
    /// See [`RdmaListener::accept`].
    pub(super) fn accept(
        self,
        listener: &mut dyn Listener,
        options: &StreamOptions,
        rdma: &RdmaOptions,
        stop: &Stop,
    ) -> Result<DestinationConnection, ChannelError> {
        let Self { mut end, allow } = self;
        let config = DestinationConfig {
            data_queues: MAX_DATA_QUEUES,
            // With one credit at a time the source has to wait for the next one, which it gets when the destination
            // continues to read.
            window: if rdma.wait_after_round { 1 } else { WINDOW },
            features: Features::ALL,
            silence: options.stall,
            admit: Some(Arc::new(move |peer| allow.admits(peer.ip()))),
        };
        let bounds = end.stall_bounds(stop);
        let accepted = DestinationHooks::accept(listener, &config, &bounds.hooks);
        let mut hooks = accepted.map_err(|error| bounds.error(ACCEPTING, error))?;
        end.stall = options.stall;
        let (writer, ahead) = Self::await_return_path(listener, &mut hooks, &end, stop)?;
        let back = writer.map(|writer| RdmaReturnSink { writer: Some(writer), end: end.clone(), sent: 0 });
        let source = RdmaDestination {
            hooks: Some(hooks),
            end,
            may_be_silent: false,
            ahead,
            blocks: Vec::new(),
            page_bytes: 1,
            touched: HashSet::new(),
        };
        let way = ChosenTransport { transport: "rdma", why: "the source connected by RDMA".into() };
        Ok(DestinationConnection::new(Box::new(source), back.map(|back| Box::new(back) as Box<_>)).by(way))
    }

    fn await_return_path(
        listener: &mut dyn Listener,
        hooks: &mut DestinationHooks,
        end: &End,
        stop: &Stop,
    ) -> Result<(Option<ReturnWriter>, Vec<u8>), ChannelError> {
        let granted = *hooks.granted();
        if granted.extension.is_some() {
            let bounds = end.bounds_of(stop, Some(RETURN_PATH_TIMEOUT));
            let writer = ReturnWriter::accept(listener, &granted, &bounds.hooks);
            return Ok((Some(writer.map_err(|error| bounds.error(ACCEPTING, error))?), Vec::new()));
        }
        let bounds = end.bounds(stop, Duration::ZERO);
        let failed = |error| bounds.error(RECEIVING, error);
        let mut ahead = vec![0; AHEAD_BYTES];
        loop {
            let slice = bounds.hooks.within(end.fabric.now(), POLL_INTERVAL);
            match hooks.read_stream(&mut ahead, &slice) {
                Ok(count) => {
                    ahead.truncate(count);
                    return Ok((None, ahead));
                }
                Err(HooksError::Stopped(Stopped::Deadline)) => {}
                Err(error) => return Err(failed(error)),
            }
            bounds.hooks.check(end.fabric.now()).map_err(|stopped| failed(stopped.into()))?;
            let slice = bounds.hooks.within(end.fabric.now(), POLL_INTERVAL);
            let writer = ReturnWriter::accept_within(listener, &granted, &slice, &bounds.hooks);
            if let Some(writer) = writer.map_err(failed)? {
                return Ok((Some(writer), Vec::new()));
            }
        }
    }
}

/// A block of the source's list.
struct Announced {
    index: BlockIndex,
    bytes: u64,
}

/// The stream, and the rounds between its parts.
pub struct RdmaDestination {
    /// `None` once the connection has ended.
    hooks: Option<DestinationHooks>,
    end: End,
    /// The peer may be silent for now: its NIC answers probes as long as its host is alive.
    may_be_silent: bool,
    /// Stream bytes that were read before the session began.
    ahead: Vec<u8>,
    blocks: Vec<Announced>,
    page_bytes: u64,
    /// Chunks that were already reported to the session: block and chunk.
    touched: HashSet<(u32, u64)>,
}

impl RdmaDestination {
    /// Chunks that a round was the first to touch.
    fn newly_touched(&mut self) -> Vec<PageRun> {
        let mut runs = Vec::new();
        let Some(hooks) = &self.hooks else { return runs };
        for (index, block) in (0u32..).zip(&self.blocks) {
            for chunk in hooks.touched_chunks(index) {
                let start = chunk * CHUNK_BYTES;
                if start >= block.bytes || !self.touched.insert((index, chunk)) {
                    continue;
                }
                let pages = CHUNK_BYTES.min(block.bytes - start).div_ceil(self.page_bytes);
                let first = crate::units::PageIndex(start / self.page_bytes);
                runs.push(PageRun { block: block.index, first, pages });
            }
        }
        runs
    }
}

impl crate::transport::Sealed for RdmaDestination {}

impl ByteSource for RdmaDestination {
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        let Some(room) = own_room(into) else { return Ok(0) };
        if !self.ahead.is_empty() {
            let count = room.len().min(self.ahead.len());
            room[..count].copy_from_slice(&self.ahead[..count]);
            self.ahead.drain(..count);
            return Ok(count);
        }
        let bounds = if self.may_be_silent {
            self.end.stall_bounds(stop)
        } else {
            self.end.bounds(stop, Duration::ZERO)
        };
        let Some(hooks) = &mut self.hooks else { return Ok(0) };
        match hooks.read_stream(room, &bounds.hooks) {
            Err(HooksError::Fabric(FabricError::Disconnected)) => Ok(0),
            read => read.map_err(|error| bounds.error(RECEIVING, error)),
        }
    }

    fn set_hints(&mut self, hints: ReadHints) {
        self.may_be_silent = hints.may_be_silent;
    }

    /// An outage longer than the NIC's retries still ends the connection.
    fn tolerate_outage(&mut self, _limit: Duration) {
        self.end.stall = None;
    }
}

impl DestinationLink for RdmaDestination {
    /// The end of a round uses a credit. The next one is granted when the destination waits for the next message, and
    /// without it the source can't open another round.
    fn abilities(&self) -> DestinationAbilities {
        let window = |hooks: &DestinationHooks| hooks.granted().extension.map_or(1, |more| more.window);
        DestinationAbilities {
            has_rounds: true,
            reads_missing: self.hooks.as_ref().is_some_and(DestinationHooks::can_read),
            waits_after_round: self.hooks.as_ref().is_none_or(|hooks| window(hooks) == 1),
            ..DestinationAbilities::default()
        }
    }

    fn stream(&mut self) -> &mut dyn ByteSource {
        self
    }

    fn announce(&mut self, placer: &Arc<Placer>, blocks: &AnnouncedBlocks) -> Result<(), MoveError> {
        let memory = placer.memory();
        let peer = self.end.peer.clone();
        let Some(hooks) = &mut self.hooks else {
            return Err(misused(&peer, ANNOUNCING, "the connection has ended").into());
        };
        let never = Stop::never();
        let bounds = self.end.stall_bounds(&never);
        let failed = |error: HooksError| MoveError::from(bounds.error(ANNOUNCING, error));
        self.page_bytes = memory.table().page().bytes();
        for block in blocks.as_slice() {
            let index = memory.table().find(block.name.as_str()).map_err(GuestError::from)?;
            let bytes = block.used_length;
            let region = memory.region(index).and_then(|region| region.for_nic(bytes));
            let region = region.ok_or_else(|| failed(FabricError::NotPinned { bytes }.into()))?;
            hooks.add_block(NicBlock::new(block.name.as_str(), region)).map_err(failed)?;
            hooks.block_notification(block.name.as_str(), bytes).map_err(failed)?;
            self.blocks.push(Announced { index, bytes });
        }
        Ok(())
    }

    /// May last as long as data arrives. RDMA WRITEs are not visible here, and the NIC's answers to probes do not show
    /// that the source's process runs. So the hooks check whether the queue pair receives anything, and fail after the
    /// stall time without.
    fn receive_round(&mut self, stop: &Stop, pause: Duration) -> Result<Option<RoundReceived>, MoveError> {
        let bounds = self.end.stall_bounds(stop);
        let Some(hooks) = &mut self.hooks else {
            return Err(misused(&self.end.peer, SERVING, "the connection has ended").into());
        };
        let summary =
            hooks.serve_round(&bounds.hooks, pause).map_err(|error| bounds.error(SERVING, error))?;
        let Some(summary) = summary else { return Ok(None) };
        Ok(Some(RoundReceived { touched: self.newly_touched(), zero_bytes: summary.zero_bytes }))
    }

    fn read_missing(&mut self, host_page: u64) -> Result<Option<Arc<dyn PulledPages>>, MoveError> {
        let Some(hooks) = self.hooks.as_mut().filter(|hooks| hooks.can_read()) else { return Ok(None) };
        Ok(Some(Arc::new(RdmaPages::new(hooks, self.end.clone(), host_page)?)))
    }

    fn live_bytes(&self) -> LiveBytes {
        let rounds = self.hooks.as_ref().map(|hooks| Arc::clone(hooks.touched_bytes()));
        LiveBytes { rounds, ..LiveBytes::default() }
    }

    fn revoke(&mut self) {
        if let Some(hooks) = &mut self.hooks {
            hooks.revoke_all();
        }
    }

    fn close(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        let Some(hooks) = self.hooks.take() else { return Ok(()) };
        let bounds = self.end.stall_bounds(stop);
        hooks.finish(&bounds.hooks).map(drop).map_err(|error| bounds.error(PARTING, error))
    }
}

/// Messages to the source, on a queue pair of their own.
pub struct RdmaReturnSink {
    writer: Option<ReturnWriter>,
    end: End,
    sent: u64,
}

impl crate::transport::Sealed for RdmaReturnSink {}

impl ByteSink for RdmaReturnSink {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        let bounds = self.end.bounds(stop, Duration::ZERO);
        let Some(writer) = &mut self.writer else {
            return Err(misused(&self.end.peer, ANSWERING, "the connection has ended"));
        };
        for part in parts {
            let SendPart::Own(bytes) = part else {
                return Err(misused(&self.end.peer, ANSWERING, "guest memory on the way back"));
            };
            writer.write(bytes, &bounds.hooks).map_err(|error| bounds.error(ANSWERING, error))?;
            self.sent += bytes.len() as u64;
        }
        Ok(())
    }

    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        let bounds = self.end.bounds(stop, Duration::ZERO);
        let Some(writer) = &mut self.writer else { return Ok(()) };
        writer.flush(&bounds.hooks).map_err(|error| bounds.error(ANSWERING, error))
    }

    fn finish(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        let bounds = self.end.bounds(stop, Duration::ZERO);
        let Some(writer) = self.writer.take() else { return Ok(()) };
        writer.finish(&bounds.hooks).map(drop).map_err(|error| bounds.error(ANSWERING, error))
    }

    fn position(&self) -> u64 {
        self.sent
    }
}
