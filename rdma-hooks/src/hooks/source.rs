//! The source's hooks: they send pages and the byte stream.

mod config;
mod keys;
mod pages;
mod queues;
mod served;
mod zeros;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use crate::blocks::{RamBlock, check_announceable};
use crate::capabilities::{Capabilities, Role};
use crate::channel::{Channel, connect_params};
use crate::chunk::{CHUNK_BYTES, Merger, SpanTable};
use crate::control::{BlockRecord, Message, STREAM_MESSAGE_BYTES, WORD_BYTES, answer_bytes};
use crate::counters::Counters;
use crate::fabric::{Fabric, FabricError, Registration};
use crate::hooks::return_path::return_window;
use crate::hooks::{HookMark, HooksError, RamControl, ReturnReader, Ticket};
use crate::stop::Stop;
use crate::stream::StreamSender;
use config::offer;
pub use config::{ExtensionOffer, SourceConfig};
use keys::{Asked, Pinned};
use zeros::Zeros;

/// How long the destination may take to close the connection once it has the last byte.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the destination may take to answer the second connection.
const RETURN_PATH_TIMEOUT: Duration = Duration::from_secs(5);

/// Interval at which the source sends keepalives in an open round.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    Closed,
    /// The mark was given to the embedder, which writes it into the stream.
    Marked(RamControl),
    Open(RamControl),
}

/// The source's end of a migration over RDMA.
///
/// One thread drives it. It also owns the byte stream, because no stream byte may be sent while a round is open.
/// Dropping it before [`finish`](Self::finish) sends ERROR to the peer.
pub struct SourceHooks {
    /// The additional queue pairs are for writes only. They are declared before the registrations, which keep their
    /// domain alive themselves: a migration that fails has writes in flight, and these must end with their queue pair,
    /// after ERROR has been sent, not with the memory that they read.
    main: StreamSender,
    /// The destination reads on them.
    read_queues: Vec<Channel>,
    /// What it may read, by block and first byte.
    served: BTreeMap<(u32, u64), Registration>,
    spans: SpanTable<Registration>,
    pinned: Vec<Pinned>,
    asked: Option<Asked>,
    config: SourceConfig,
    granted: Capabilities,
    address: (String, u16),
    blocks: Vec<RamBlock>,
    remote: Vec<BlockRecord>,
    merger: Merger,
    zeros: Zeros,
    /// Writes in flight by block and chunk; kept only with several queue pairs.
    chunk_flights: HashMap<(u32, u64), u32>,
    round: Round,
    rounds: u32,
    postcopy: bool,
    tail: [u8; 8],
    ticket: u64,
}

impl SourceHooks {
    /// Connects to a destination.
    ///
    /// # Errors
    ///
    /// The fabric's, and [`HooksError::Capability`] if the peer's answer is invalid.
    pub fn connect(
        fabric: &dyn Fabric,
        host: &str,
        port: u16,
        config: SourceConfig,
        stop: &Stop,
    ) -> Result<Self, HooksError> {
        let asked = Capabilities { pin_all: config.pin_all, extension: offer(&config, Role::Main) };
        let window = config.extension.map_or(1, |extension| extension.window.max(1));
        let params = connect_params(asked.encode(), window, answer_bytes(config.most_blocks));
        let endpoint = fabric.connect(host, port, &params, stop)?;
        let granted = asked.confirm(endpoint.private_data())?;
        let window = granted.extension.map_or(1, |extension| extension.window);
        let mut main = Channel::new(endpoint);
        main.latencies = config.record_latencies.then(Vec::new);
        let mut hooks = Self {
            read_queues: Vec::new(),
            served: BTreeMap::new(),
            spans: SpanTable::new([], 1, None),
            pinned: Vec::new(),
            asked: None,
            main: StreamSender::new(main, window),
            config,
            granted,
            address: (host.to_owned(), port),
            blocks: Vec::new(),
            remote: Vec::new(),
            merger: Merger::default(),
            zeros: Zeros::default(),
            chunk_flights: HashMap::new(),
            round: Round::Closed,
            rounds: 0,
            postcopy: false,
            tail: [0; 8],
            ticket: 0,
        };
        hooks.connect_data_queues(fabric, stop)?;
        hooks.connect_read_queues(fabric, stop)?;
        Ok(hooks)
    }

    fn connect_data_queues(&mut self, fabric: &dyn Fabric, stop: &Stop) -> Result<(), HooksError> {
        let queues = self.granted.extension.map_or(0, |extension| extension.data_queues);
        for index in 1..=queues {
            let caps = Capabilities { pin_all: false, extension: offer(&self.config, Role::Data(index)) };
            let params = connect_params(caps.encode(), 1, WORD_BYTES);
            let endpoint = fabric.connect(&self.address.0, self.address.1, &params, stop)?;
            let mut channel = Channel::new(endpoint);
            channel.latencies = self.config.record_latencies.then(Vec::new);
            self.main.data_queues.push(channel);
        }
        Ok(())
    }

    /// What the peer agreed to.
    pub fn granted(&self) -> &Capabilities {
        &self.granted
    }

    /// Queue pairs that carry writes.
    pub fn queue_pairs(&self) -> usize {
        1 + self.main.data_queues.len()
    }

    /// Opens the return path: a second connection that carries the destination's byte stream.
    ///
    /// # Errors
    ///
    /// The fabric's; [`HooksError::Stopped`] if the destination does not answer within 5 s, which happens if it is not
    /// configured for a return path.
    pub fn open_return_path(&self, fabric: &dyn Fabric, stop: &Stop) -> Result<ReturnReader, HooksError> {
        let extension = self.granted.extension.and_then(|_| offer(&self.config, Role::ReturnPath));
        let caps = Capabilities { pin_all: self.config.pin_all, extension };
        let stop = stop.within(fabric.now(), RETURN_PATH_TIMEOUT);
        let is_qemu = extension.is_none();
        let params = connect_params(caps.encode(), return_window(is_qemu), STREAM_MESSAGE_BYTES);
        let endpoint = fabric.connect(&self.address.0, self.address.1, &params, &stop)?;
        ReturnReader::new(Channel::new(endpoint), is_qemu, &stop)
    }

    /// Sets the blocks that migrate, in the order in which the stream announces them. To be called once, before the
    /// setup round.
    ///
    /// # Errors
    ///
    /// [`HooksError::Block`] for two blocks of one name, or too many; [`HooksError::OutOfOrder`];
    /// [`FabricError::MemoryLock`](crate::FabricError::MemoryLock) if they (or the pin budget) cannot be locked.
    pub fn set_blocks(&mut self, blocks: Vec<RamBlock>) -> Result<(), HooksError> {
        if !self.remote.is_empty() || !self.blocks.is_empty() {
            return Err(HooksError::OutOfOrder("the blocks are known already"));
        }
        check_announceable(&blocks)?;
        if blocks.len() > self.config.most_blocks {
            return Err(HooksError::OutOfOrder("more blocks than the configuration says there will be"));
        }
        let total: u64 = blocks.iter().map(|block| block.region.len()).sum();
        let budget = self.config.pin_budget_bytes.filter(|_| !self.granted.pin_all).unwrap_or(total);
        self.main.channel.endpoint().check_memory_lock(budget.min(total))?;
        let limit = self.main.channel.endpoint().limits().max_registration_bytes / CHUNK_BYTES;
        let spans = self.config.max_span_chunks.min(limit);
        let lengths = blocks.iter().map(|block| block.region.len());
        self.spans = SpanTable::new(lengths, spans, self.config.pin_budget_bytes);
        self.blocks = blocks;
        Ok(())
    }

    /// Appends bytes to the stream. They are sent when 32 KiB have gathered, or at a flush or a round.
    ///
    /// # Errors
    ///
    /// [`HooksError::OutOfOrder`] while a round is open; the connection's error.
    pub fn write_stream(&mut self, bytes: &[u8], stop: &Stop) -> Result<(), HooksError> {
        if matches!(self.round, Round::Open(_)) {
            return Err(HooksError::OutOfOrder("stream bytes while a round is open"));
        }
        let keep = self.tail.len().saturating_sub(bytes.len());
        let new = bytes.len().min(self.tail.len());
        self.tail.copy_within(new.., 0);
        self.tail[keep..].copy_from_slice(&bytes[bytes.len() - new..]);
        self.main.write(bytes, stop)
    }

    /// Sends the stream bytes that have gathered.
    ///
    /// # Errors
    ///
    /// The connection's error.
    pub fn flush_stream(&mut self, stop: &Stop) -> Result<(), HooksError> {
        self.main.flush(stop)
    }

    /// Hook: a round begins. The embedder writes the mark as the next bytes of the stream and the last before the
    /// round; they are sent with the first page, or at [`registration_stop`](Self::registration_stop). `None` once
    /// postcopy has begun: no round.
    ///
    /// # Errors
    ///
    /// [`HooksError::OutOfOrder`] if a round is open, or Setup is not the first round and the only one.
    pub fn registration_start(&mut self, kind: RamControl) -> Result<Option<HookMark>, HooksError> {
        if self.round != Round::Closed {
            return Err(HooksError::OutOfOrder("a round is open already"));
        }
        if self.postcopy {
            return Ok(None);
        }
        if (kind == RamControl::Setup) != (self.rounds == 0) {
            return Err(HooksError::OutOfOrder("the setup round comes first and once"));
        }
        self.round = Round::Marked(kind);
        Ok(Some(HookMark(())))
    }

    /// Makes sure that the mark is sent before anything else of the round.
    fn enter_round(&mut self, stop: &Stop) -> Result<RamControl, HooksError> {
        match self.round {
            Round::Open(kind) => Ok(kind),
            Round::Closed => Err(HooksError::OutOfOrder("no round is open")),
            Round::Marked(kind) => {
                if self.tail != HookMark(()).to_bytes() {
                    return Err(HooksError::OutOfOrder("the stream continues after the mark of the round"));
                }
                self.main.flush(stop)?;
                self.tail = [0; 8];
                self.round = Round::Open(kind);
                self.rounds += 1;
                Ok(kind)
            }
        }
    }

    /// Hook: the round ends. All pages saved in it reach the destination's memory before anything that follows. In the
    /// setup round the block tables are exchanged (and with pin-all everything is registered, at both ends at once). At
    /// the end of the last round all writes have taken effect.
    ///
    /// # Errors
    ///
    /// [`HooksError::OutOfOrder`] if `kind` is not the open round's; anything else ends the migration.
    pub fn registration_stop(&mut self, kind: RamControl, stop: &Stop) -> Result<(), HooksError> {
        if self.postcopy {
            return Ok(());
        }
        if self.enter_round(stop)? != kind {
            return Err(HooksError::OutOfOrder("another round is open"));
        }
        self.flush_pages(stop)?;
        match kind {
            RamControl::Setup => self.exchange_blocks(stop)?,
            RamControl::Round => {}
            RamControl::Finish => self.drain(stop)?,
        }
        let mut fence = Vec::new();
        Message::Fence { round: self.rounds }.encode(&mut fence);
        for channel in &mut self.main.data_queues {
            channel.send(&[&fence], stop)?;
        }
        self.main.send(&Message::RegisterFinished, stop)?;
        self.settle();
        self.round = Round::Closed;
        Ok(())
    }

    /// Returns the ticket up to which all saves have arrived at the destination; does not wait.
    ///
    /// # Errors
    ///
    /// The connection's error: pages after the last ticket reported may not have arrived.
    pub fn collect(&mut self) -> Result<Ticket, HooksError> {
        self.ring()?;
        if !self.pump()? {
            // An embedder that holds pages back calls this repeatedly, and nothing else reads the clock meanwhile.
            self.main.channel.read_clock();
            self.send_keepalive()?;
        }
        let channels = std::iter::once(&self.main.channel).chain(&self.main.data_queues);
        let waiting = channels.filter_map(Channel::oldest_ticket);
        let merging = self.merger.pending().map(|run| run.ticket);
        let zeroing = self.zeros.oldest_ticket();
        let oldest = waiting.chain(merging).chain(zeroing).min();
        Ok(Ticket(oldest.map_or(self.ticket, |oldest| oldest - 1)))
    }

    /// True if a page can be posted without waiting for the device.
    pub fn has_room(&self) -> bool {
        self.main.channel.room() > 1 && self.main.data_queues.iter().all(|channel| channel.room() > 1)
    }

    /// Waits until all saves up to `ticket` have arrived; later saves stay in flight. An embedder that bounds the bytes
    /// in flight this way measures the real rate of the pages.
    ///
    /// # Errors
    ///
    /// The connection's error.
    pub fn wait_for(&mut self, ticket: Ticket, stop: &Stop) -> Result<(), HooksError> {
        let held = [self.merger.pending().map(|run| run.ticket), self.zeros.oldest_gathered()];
        if held.into_iter().flatten().any(|held| held <= ticket.0) {
            self.flush_pages(stop)?;
        }
        while self.collect()? < ticket {
            let queue = self.busiest();
            self.rest(queue, stop)?;
        }
        Ok(())
    }

    /// Waits until everything saved has arrived.
    ///
    /// # Errors
    ///
    /// The connection's error.
    pub fn drain(&mut self, stop: &Stop) -> Result<(), HooksError> {
        self.flush_pages(stop)?;
        while self.collect()? < Ticket(self.ticket) {
            let queue = self.busiest();
            self.rest(queue, stop)?;
        }
        Ok(())
    }

    /// From now on pages travel in the stream.
    ///
    /// # Errors
    ///
    /// [`HooksError::OutOfOrder`] while a round is open; draining's errors: a write that arrived after the destination
    /// discarded pages would land in memory that is no longer the guest's.
    pub fn begin_postcopy(&mut self, stop: &Stop) -> Result<(), HooksError> {
        if self.round != Round::Closed {
            return Err(HooksError::OutOfOrder("postcopy begins between rounds"));
        }
        self.drain(stop)?;
        self.postcopy = true;
        Ok(())
    }

    /// Ends the stream: sends the last bytes and waits for the destination to close the connection, so that no unread
    /// byte is lost. True if it closed within 10 s; without a return path nothing else shows that it has read
    /// everything.
    ///
    /// # Errors
    ///
    /// The connection's error; the destination may or may not have everything.
    pub fn finish(mut self, stop: &Stop) -> Result<bool, HooksError> {
        self.drain(stop)?;
        self.read_queues.drain(..).for_each(|mut channel| channel.leave());
        // The destination closes its ends after the last byte: our writes have completed by then.
        for mut channel in std::mem::take(&mut self.main.data_queues) {
            match channel.wait_for(stop, |channel| Ok(channel.is_idle().then_some(()))) {
                Ok(()) | Err(HooksError::Fabric(FabricError::Disconnected)) => channel.leave(),
                Err(error) => return Err(error),
            }
        }
        self.main.flush(stop)?;
        self.main.wait_for(stop, |main| main.channel.is_idle().then_some(()))?;
        let stop = stop.within(self.main.channel.now(), CLOSE_TIMEOUT);
        if self.granted.extension.is_some() {
            // A peer of this crate sends Done when it has read everything; a QEMU only closes.
            self.main.wait_for(&stop, |main| main.peer_is_done().then_some(()))?;
            self.main.channel.leave();
            return Ok(true);
        }
        let parted = self.main.channel.part(&stop)?;
        tracing::debug!(parted, "source connection closed");
        Ok(parted)
    }

    /// Counters of this end.
    pub fn counters(&self) -> Counters {
        let mut sum = self.main.channel.counters;
        self.main.data_queues.iter().for_each(|channel| sum += channel.counters);
        sum
    }

    /// Bytes registered now.
    pub fn registered_bytes(&self) -> u64 {
        self.spans.pinned_bytes() + self.pinned.iter().map(|pinned| pinned.local.len).sum::<u64>()
    }

    /// Moves out how long signalled writes took from post to completion; see
    /// [`SourceConfig::record_latencies`]. At most 65536 are kept per queue pair in between.
    pub fn drain_latencies(&mut self, into: &mut Vec<Duration>) {
        let channels = std::iter::once(&mut self.main.channel).chain(&mut self.main.data_queues);
        for list in channels.filter_map(|channel| channel.latencies.as_mut()) {
            into.append(list);
        }
    }
}
