//! The destination's hooks: keys are granted, ranges zeroed, the byte stream arrives.

mod silence;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::blocks::{BlockError, DestinationBlocks, RamBlock};
use crate::capabilities::{Capabilities, Extension, Features, MigrationId, Role};
use crate::channel::{Channel, connect_params};
use crate::chunk::{CHUNK_BYTES, chunk_of, chunk_range, chunks_in};
use crate::control::{
    CONTROL_BUFFER_BYTES, Compress, Kind, Message, NATIVE_MESSAGE_BYTES, RegisterRecord, RegisterResult,
    WORD_BYTES,
};
use crate::counters::Counters;
use crate::exchange::Receiver;
use crate::fabric::chain;
use crate::fabric::{Access, AddressBase, FabricError, Listener, Registration};
use crate::hooks::HooksError;
use crate::region::HostRegion;
use crate::stop::Stop;
use crate::stream::StreamReceiver;

/// How long the source may take for its additional queue pairs.
const QUEUES_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the connection is kept for the source's last acknowledgement.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Registered bytes a source may hold keys for, as a multiple of the announced RAM. Spans that grow into each other
/// cost at most twice the RAM; a source beyond this is asking for the same memory again and again.
const REGISTERED_FACTOR: u64 = 4;

/// Decides about a peer by its address.
pub type PeerFilter = Arc<dyn Fn(SocketAddr) -> bool + Send + Sync>;

/// What the destination offers.
#[derive(Clone, Default)]
pub struct DestinationConfig {
    /// Additional queue pairs a source of this crate may have.
    pub data_queues: u16,
    /// Messages a source of this crate may have on the way; 0 and 1 mean one.
    pub window: u16,
    /// Messages of a source of this crate that may hold more than QEMU's.
    pub features: Features,
    /// Longest silence of a source in an open round; `None` waits as long as its NIC answers. Messages break it, and
    /// writes too where this end's device keeps count of what it receives ([`Endpoint::received_mark`]). Where it does
    /// not, a source that says that it is alive ([`Features::says_alive`]) has 8 s more, and one that does not, as a
    /// QEMU, ten times as long.
    ///
    /// [`Endpoint::received_mark`]: crate::fabric::Endpoint::received_mark
    pub silence: Option<Duration>,
    /// Which peers may connect; `None` admits all.
    pub admit: Option<PeerFilter>,
}

/// What happened in a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundSummary {
    /// The block tables were exchanged.
    pub blocks_exchanged: bool,
    /// Registration requests answered.
    pub registrations: u32,
    /// Bytes newly registered for them.
    pub registered_bytes: u64,
    /// Keys taken back.
    pub unregistrations: u32,
    /// Zero ranges.
    pub zero_ranges: u64,
    /// Bytes in them.
    pub zero_bytes: u64,
}

/// A key granted for some chunks.
#[derive(Clone, Debug)]
struct Grant {
    chunks: u64,
    block_base: u64,
    registration: Arc<Registration>,
}

/// Keys granted for one block.
#[derive(Debug, Default)]
struct Grants {
    /// By first chunk.
    spans: BTreeMap<u64, Grant>,
    /// The whole block, with pin-all.
    whole: Option<Registration>,
    /// One bit per chunk that was ever granted or zeroed.
    touched: Vec<u64>,
}

/// The destination's end of a migration over RDMA.
///
/// One thread drives it. The NIC writes guest memory between the hooks at any time; when
/// [`registration_handle`](Self::registration_handle) returns, everything saved in the round is in memory.
pub struct DestinationHooks {
    /// Its queue pairs beside the main one receive writes, and the ends of rounds. Declared before the registrations, which
    /// hold their domain themselves: given up, the last word leaves before the peer's writes fail for want of a key.
    stream: StreamReceiver,
    grants: Vec<Grants>,
    granted: Capabilities,
    blocks: DestinationBlocks,
    registered_bytes: u64,
    exchanged: bool,
    touched_bytes: Arc<AtomicU64>,
    rounds: u32,
    silence: Option<Duration>,
    /// The devices' count of what they received, before the source could send.
    mark: Option<u64>,
}

impl DestinationHooks {
    /// Waits for a source. Connections that are no migration, or not admitted, are rejected, and the wait goes on.
    ///
    /// # Errors
    ///
    /// The fabric's.
    pub fn accept(
        listener: &mut dyn Listener,
        config: &DestinationConfig,
        stop: &Stop,
    ) -> Result<Self, HooksError> {
        let able = Extension {
            role: Role::Main,
            data_queues: config.data_queues,
            window: config.window.max(1),
            features: config.features,
            migration: MigrationId::default(),
        };
        loop {
            let incoming = listener.next_request(stop)?;
            let peer = incoming.peer();
            if let (Some(admit), Some(peer)) = (&config.admit, peer)
                && !admit(peer)
            {
                tracing::warn!(%peer, "connection rejected: peer is not admitted");
                continue;
            }
            let asked = match Capabilities::decode(incoming.private_data()) {
                Ok(asked) => asked,
                Err(error) => {
                    tracing::warn!(?peer, error = chain(&error), "connection rejected");
                    continue;
                }
            };
            if asked.extension.is_some_and(|extension| extension.role != Role::Main) {
                tracing::warn!(?peer, "connection rejected: belongs to another migration");
                continue;
            }
            let granted = asked.grant(Some(&able));
            let window = granted.extension.map_or(1, |extension| extension.window);
            let longest = granted.extension.map_or(CONTROL_BUFFER_BYTES, |_| NATIVE_MESSAGE_BYTES);
            let params = connect_params(granted.encode(), window, longest);
            let endpoint = match incoming.accept(&params, stop) {
                Ok(endpoint) => endpoint,
                // Whoever knocks and goes away must not end the wait for the source.
                Err(error @ FabricError::Event { .. }) => {
                    tracing::warn!(?peer, error = chain(&error), "connection given up");
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let mut hooks = Self {
                grants: Vec::new(),
                stream: StreamReceiver::new(Channel::new(endpoint), Receiver::new(window)),
                silence: config.silence,
                granted,
                blocks: DestinationBlocks::default(),
                registered_bytes: 0,
                exchanged: false,
                touched_bytes: Arc::default(),
                rounds: 0,
                mark: None,
            };
            let within = stop.within(hooks.stream.channel.now(), QUEUES_TIMEOUT);
            hooks.accept_data_queues(listener, &within)?;
            hooks.mark = hooks.received_mark();
            return Ok(hooks);
        }
    }

    fn accept_data_queues(&mut self, listener: &mut dyn Listener, stop: &Stop) -> Result<(), HooksError> {
        let Some(main) = self.granted.extension else { return Ok(()) };
        while self.stream.data_queues.len() < usize::from(main.data_queues) {
            let incoming = listener.next_request(stop)?;
            let Ok(asked) = Capabilities::decode(incoming.private_data()) else { continue };
            let next = Role::Data(self.stream.data_queues.len() as u16 + 1);
            let fits = |theirs: Extension| theirs.migration == main.migration && theirs.role == next;
            if !asked.extension.is_some_and(fits) {
                tracing::warn!(peer = ?incoming.peer(), "connection rejected: not this migration's queue pair");
                continue;
            }
            let endpoint = incoming.accept(&connect_params(asked.encode(), 1, WORD_BYTES), stop)?;
            self.stream.data_queues.push(Channel::new(endpoint));
        }
        Ok(())
    }

    /// What was agreed with the source.
    pub fn granted(&self) -> &Capabilities {
        &self.granted
    }

    /// Offers memory under a block's name. Before that block is announced.
    ///
    /// # Errors
    ///
    /// [`HooksError::Block`] for a name offered twice.
    pub fn add_block(&mut self, block: RamBlock) -> Result<(), HooksError> {
        Ok(self.blocks.add(block)?)
    }

    /// Hook: the stream announced its next block. Returns the block's index.
    ///
    /// # Errors
    ///
    /// [`HooksError::Block`]: no memory of that name, less than `used_length` bytes of it, announced twice, or after
    /// the setup round.
    pub fn block_notification(&mut self, name: &str, used_length: u64) -> Result<u32, HooksError> {
        Ok(self.blocks.announce(name, used_length)?)
    }

    /// Reads at least one byte of the stream, at most what fits. Not between a round's mark and
    /// [`registration_handle`](Self::registration_handle): there are no bytes then.
    ///
    /// # Errors
    ///
    /// What the connection met; [`FabricError::Disconnected`] once the source is gone and everything is read.
    pub fn read_stream(&mut self, into: &mut [u8], stop: &Stop) -> Result<usize, HooksError> {
        self.stream.read(into, stop)
    }

    /// Hook: the stream's parser met the mark. Serves the source until it ends the round.
    ///
    /// # Errors
    ///
    /// Anything: the migration is over, and memory is in an undefined state.
    pub fn registration_handle(&mut self, stop: &Stop) -> Result<RoundSummary, HooksError> {
        let mut summary = RoundSummary::default();
        self.rounds += 1;
        loop {
            let (slot, request) = self.next_request(stop)?;
            let reply = match request {
                Message::RegisterFinished => {
                    self.stream.done(slot, None, stop)?;
                    self.wait_for_fences(stop)?;
                    return Ok(summary);
                }
                Message::RamBlocksRequest => {
                    summary.blocks_exchanged = true;
                    Some(self.exchange_blocks()?)
                }
                Message::RegisterRequest(records) => {
                    let results = records
                        .iter()
                        .map(|record| self.grant(record, &mut summary))
                        .collect::<Result<Vec<_>, _>>()?;
                    Some(Message::RegisterResult { repeat: results.len() as u32, results })
                }
                Message::UnregisterRequest(records) => {
                    records.iter().try_for_each(|record| self.revoke(record, &mut summary))?;
                    Some(Message::UnregisterFinished { repeat: records.len() as u32 })
                }
                Message::Compress(range) => {
                    self.zero(&range, &mut summary)?;
                    None
                }
                Message::ZeroRuns(ranges) if self.takes_lists() => {
                    ranges.iter().try_for_each(|range| self.zero(range, &mut summary))?;
                    None
                }
                Message::Alive if self.hears_alive() => None,
                other => return Err(HooksError::unexpected(other.kind(), "a round was open")),
            };
            self.stream.done(slot, reply.as_ref(), stop)?;
        }
    }

    fn hears_alive(&self) -> bool {
        self.granted.extension.is_some_and(|extension| extension.features.says_alive)
    }

    fn takes_lists(&self) -> bool {
        self.granted.extension.is_some_and(|extension| extension.features.zero_runs)
    }

    /// The end of the round on every additional queue pair: what was written there is in memory.
    fn wait_for_fences(&mut self, stop: &Stop) -> Result<(), HooksError> {
        for (index, channel) in self.stream.data_queues.iter_mut().enumerate() {
            channel.wait_for(stop, |channel| Ok(channel.has_arrived().then_some(())))?;
            let Some(slot) = channel.take_arrived() else { continue };
            match Message::decode(channel.received(slot))? {
                Message::Fence { round } if round == self.rounds => {}
                Message::Fence { round } => {
                    return Err(HooksError::Fence { queue: index + 1, got: round, want: self.rounds });
                }
                other => return Err(HooksError::unexpected(other.kind(), "the end of a round was due")),
            }
            channel.repost(slot)?;
        }
        Ok(())
    }

    fn exchange_blocks(&mut self) -> Result<Message<'static>, HooksError> {
        if std::mem::replace(&mut self.exchanged, true) {
            return Err(HooksError::unexpected(Kind::RamBlocksRequest, "the block tables are known"));
        }
        let count = self.blocks.announced().len();
        self.grants.resize_with(count, Grants::default);
        let bytes = self.blocks.announced().iter().map(|block| block.region.len()).sum();
        match self.stream.channel.endpoint().check_memory_lock(bytes) {
            Err(error) if self.granted.pin_all => return Err(error.into()),
            // The source registers what has data, perhaps within a pin budget of its own: it may fit.
            Err(error) => {
                tracing::warn!(error = chain(&error), "the source may meet the limit in mid-migration")
            }
            Ok(()) => {}
        }
        if self.granted.pin_all {
            for index in 0..count {
                let region = self.blocks.announced()[index].region.clone();
                let whole = self.register(&region, 0)?;
                self.grants[index].whole = Some(whole);
                let chunks = chunks_in(region.len());
                mark(&mut self.grants[index].touched, 0, chunks);
            }
        }
        let grants = &self.grants;
        let key =
            |index: usize| grants[index].whole.as_ref().map_or((0, 0), |whole| (whole.rkey, whole.address));
        Ok(Message::RamBlocksResult(self.blocks.records(key)))
    }

    /// Registers memory for the source to write to; the wire's addresses are offsets in the block.
    fn register(&mut self, region: &HostRegion, offset: u64) -> Result<Registration, HooksError> {
        let announced: u64 = self.blocks.announced().iter().map(|block| block.region.len()).sum();
        let (asked, limit) =
            (self.registered_bytes.saturating_add(region.len()), announced.saturating_mul(REGISTERED_FACTOR));
        if asked > limit {
            return Err(HooksError::TooMuchRegistered { asked, limit });
        }
        let register = || {
            let endpoint = self.stream.channel.endpoint();
            endpoint.register(region, Access::RemoteWrite, AddressBase::At(offset))
        };
        // Key 0 means "no key" on the wire: should a device ever give it out, hold it and take the next one.
        let first = register()?;
        let registration = if first.rkey == 0 { register()? } else { first };
        if registration.rkey == 0 {
            return Err(FabricError::Unavailable {
                what: "the device gives out only key 0",
                remedy: "use another device",
                source: std::io::ErrorKind::InvalidData.into(),
            }
            .into());
        }
        self.registered_bytes = asked;
        self.stream.channel.counters.registered(&registration);
        Ok(registration)
    }

    /// The block's position among the grants, which exist only once the tables are exchanged.
    fn granted_block(&self, index: u32) -> Result<&RamBlock, HooksError> {
        let block = self.blocks.get(index)?;
        match self.grants.get(index as usize) {
            Some(_) => Ok(block),
            None => Err(HooksError::unexpected(Kind::RegisterRequest, "the block tables were due")),
        }
    }

    fn grant(
        &mut self,
        record: &RegisterRecord,
        summary: &mut RoundSummary,
    ) -> Result<RegisterResult, HooksError> {
        let block = self.granted_block(record.block)?;
        let length = block.region.len();
        block.range(record.key, 1)?;
        let first = chunk_of(record.key);
        let out_of_block = || BlockError::OutOfBlock {
            block: block.name.clone(),
            offset: record.key,
            len: record.extra_chunks.saturating_mul(crate::chunk::CHUNK_BYTES),
            length,
        };
        // A span that reaches past the block is cut at its end; one whose size makes no sense is refused.
        let count = record.extra_chunks.checked_add(1).ok_or_else(out_of_block)?;
        let range = chunk_range(length, first, count).ok_or_else(out_of_block)?;
        let count = chunks_in(range.end) - first;
        let region = block.part(range.clone())?;
        summary.registrations += 1;
        let index = record.block as usize;
        if let Some(existing) = self.existing_key(index, first, count) {
            return Ok(existing);
        }
        let registration = self.register(&region, range.start)?;
        summary.registered_bytes += region.len();
        // A device that cannot take an address of our choice names the bytes by their own.
        let block_base = registration.address.wrapping_sub(range.start);
        let rkey = registration.rkey;
        self.touch(index, length, first, count);
        let granted = Grant { chunks: count, block_base, registration: Arc::new(registration) };
        self.grants[index].spans.insert(first, granted);
        Ok(RegisterResult { rkey, block_base })
    }

    /// A key that covers the chunks already, or was given out for the same first chunk before.
    fn existing_key(&mut self, index: usize, first: u64, count: u64) -> Option<RegisterResult> {
        let grants = self.grants.get_mut(index)?;
        if let Some(whole) = &grants.whole {
            return Some(RegisterResult { rkey: whole.rkey, block_base: whole.address });
        }
        let (&start, grant) = grants.spans.range(..=first).next_back()?;
        let result = RegisterResult { rkey: grant.registration.rkey, block_base: grant.block_base };
        if start == first {
            return Some(result);
        }
        if start + grant.chunks < first.checked_add(count)? {
            return None;
        }
        let rest = Grant { chunks: start + grant.chunks - first, ..grant.clone() };
        grants.spans.insert(first, rest);
        Some(result)
    }

    fn revoke(&mut self, record: &RegisterRecord, summary: &mut RoundSummary) -> Result<(), HooksError> {
        let name = self.granted_block(record.block)?.name.clone();
        let missing = HooksError::NotRegistered { block: name, chunk: record.key };
        let spans = &mut self.grants[record.block as usize].spans;
        let grant = spans.remove(&record.key).ok_or(missing)?;
        summary.unregistrations += 1;
        self.stream.channel.counters.unregistrations += 1;
        if let Ok(last) = Arc::try_unwrap(grant.registration) {
            self.registered_bytes -= last.len;
        }
        Ok(())
    }

    fn zero(&mut self, range: &Compress, summary: &mut RoundSummary) -> Result<(), HooksError> {
        let block = self.granted_block(range.block)?;
        let bytes = block.range(range.key, range.length)?;
        let (region, length) = (block.part(bytes.clone())?, block.region.len());
        // In range: the region was cut to it just now.
        let _ = region.zero(0, range.length);
        if !bytes.is_empty() {
            let first = chunk_of(bytes.start);
            let chunks = chunk_of(bytes.end - 1) - first + 1;
            self.touch(range.block as usize, length, first, chunks);
        }
        summary.zero_ranges += 1;
        summary.zero_bytes += range.length;
        self.stream.channel.counters.zero_ranges += 1;
        self.stream.channel.counters.zero_bytes += range.length;
        Ok(())
    }

    /// Chunks of a block of `length` bytes may change from now on.
    fn touch(&mut self, index: usize, length: u64, first: u64, count: u64) {
        let fresh = mark(&mut self.grants[index].touched, first, count);
        let last = first + count == chunks_in(length);
        let cut = if last && fresh > 0 { chunks_in(length) * CHUNK_BYTES - length } else { 0 };
        self.touched_bytes.fetch_add((fresh * CHUNK_BYTES).saturating_sub(cut), Ordering::Relaxed);
    }

    /// Bytes of the chunks that were granted or zeroed for the first time while rounds were served, for a thread that looks
    /// on: so far is a first round. Without chunks that were granted with the block tables (pin-all).
    pub fn touched_bytes(&self) -> &Arc<AtomicU64> {
        &self.touched_bytes
    }

    /// Chunks of a block that were ever granted for writing or zeroed: nothing else can have changed.
    pub fn touched_chunks(&self, block: u32) -> impl Iterator<Item = u64> + '_ {
        let words = self.grants.get(block as usize).map_or(&[][..], |grants| &grants.touched);
        let bits = |(word, bits): (usize, &u64)| {
            let bits = *bits;
            (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| word as u64 * 64 + bit)
        };
        words.iter().enumerate().flat_map(bits)
    }

    /// Takes every key back: no write of the source lands any more. Before the guest runs here.
    pub fn revoke_all(&mut self) {
        for grants in &mut self.grants {
            grants.spans.clear();
            grants.whole = None;
        }
        self.registered_bytes = 0;
    }

    /// Everything is read: takes the keys back and keeps the connection until the source closes it, at most 2 s, so
    /// that its last message is acknowledged. True if the source closed it.
    ///
    /// # Errors
    ///
    /// What the connection met; everything was read all the same.
    pub fn finish(mut self, stop: &Stop) -> Result<bool, HooksError> {
        self.revoke_all();
        self.stream.data_queues.iter_mut().for_each(Channel::leave);
        let stop = stop.within(self.stream.channel.now(), CLOSE_TIMEOUT);
        if self.granted.extension.is_some() {
            self.stream.say_done(&stop)?;
        }
        let parted = self.stream.channel.part(&stop)?;
        tracing::debug!(parted, "destination connection closed");
        Ok(parted)
    }

    /// What this end did so far.
    pub fn counters(&self) -> Counters {
        let mut sum = self.stream.channel.counters;
        self.stream.data_queues.iter().for_each(|channel| sum += channel.counters);
        sum
    }

    /// Bytes the source holds keys for.
    pub fn registered_bytes(&self) -> u64 {
        self.registered_bytes
    }
}

/// Returns how many were not marked before.
fn mark(words: &mut Vec<u64>, first: u64, count: u64) -> u64 {
    let end = (first + count) as usize;
    if words.len() * 64 < end {
        words.resize(end.div_ceil(64), 0);
    }
    let mut fresh = 0;
    for chunk in first as usize..end {
        let (word, bit) = (&mut words[chunk / 64], 1 << (chunk % 64));
        fresh += u64::from(*word & bit == 0);
        *word |= bit;
    }
    fresh
}
