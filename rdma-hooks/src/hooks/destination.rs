//! The destination's hooks: they grant keys, zero ranges and receive the byte stream.

mod grants;
mod reading;
mod silence;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use crate::blocks::{DestinationBlocks, RamBlock};
use crate::capabilities::{Capabilities, Extension, Features, MigrationId, Role};
use crate::channel::{Channel, accept_params};
use crate::chunk::chunks_in;
use crate::control::{CONTROL_BUFFER_BYTES, Kind, Message, NATIVE_MESSAGE_BYTES, WORD_BYTES};
use crate::counters::Counters;
use crate::exchange::Receiver;
use crate::fabric::{Endpoint, FabricError, Listener, chain};
use crate::hooks::HooksError;
use crate::stop::Stop;
use crate::stream::StreamReceiver;
use grants::{Grants, mark};

/// How long the source may take to open its additional queue pairs.
const QUEUES_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the connection is kept for the source's last acknowledgement.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Registered bytes a source may hold keys for, as a multiple of the announced RAM. Spans that grow into each other
/// cost at most twice the RAM; a source that exceeds this requests the same memory repeatedly.
const REGISTERED_FACTOR: u64 = 4;

/// Decides about a peer by its address.
pub type PeerFilter = Arc<dyn Fn(SocketAddr) -> bool + Send + Sync>;

/// What the destination offers.
#[derive(Clone, Default)]
pub struct DestinationConfig {
    /// Additional queue pairs a source of this crate may have.
    pub data_queues: u16,
    /// Messages that a source of this crate may have in flight; 0 and 1 mean one.
    pub window: u16,
    /// Messages beyond QEMU's that a source of this crate may send.
    pub features: Features,
    /// Longest silence of a source in an open round; `None` waits as long as its NIC answers. A message ends the
    /// silence, and so does a write if this end's device counts what it receives ([`Endpoint::received_mark`]). If the
    /// device does not, a source that sends keepalives ([`Features::keepalives`]) has 8 s more, and a source that does
    /// not, such as a QEMU, has ten times as long.
    ///
    /// [`Endpoint::received_mark`]: crate::fabric::Endpoint::received_mark
    pub silence: Option<Duration>,
    /// Which peers may connect; `None` admits all.
    pub admit: Option<PeerFilter>,
}

/// True if a peer asks for this queue pair of a migration.
fn is_of(asked: &Capabilities, main: Extension, role: Role) -> bool {
    asked.extension.is_some_and(|theirs| theirs.migration == main.migration && theirs.role == role)
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

/// The destination's end of a migration over RDMA.
///
/// One thread drives it. The NIC writes guest memory between the hooks at any time; when
/// [`registration_handle`](Self::registration_handle) returns, everything saved in the round is in memory.
pub struct DestinationHooks {
    /// The additional queue pairs receive writes and the ends of rounds. They are declared before the registrations,
    /// which keep their domain alive themselves: when the migration fails, the final ERROR is sent before the peer's
    /// writes fail for lack of a key.
    stream: StreamReceiver,
    /// To be read on, until they are taken.
    read_queues: Vec<Box<dyn Endpoint>>,
    grants: Vec<Grants>,
    granted: Capabilities,
    blocks: DestinationBlocks,
    registered_bytes: u64,
    exchanged: bool,
    touched_bytes: Arc<AtomicU64>,
    rounds: u32,
    /// The round that is open, while it is not served.
    open: Option<RoundSummary>,
    silence: Option<Duration>,
    /// What the devices had received, and when, when the source fell silent.
    quiet: Option<(Option<u64>, Instant)>,
    /// The devices' count of what they had received before the source could send.
    mark: Option<u64>,
}

impl DestinationHooks {
    /// Waits for a source. A connection that is no migration, or is not admitted, is rejected, and the wait continues.
    ///
    /// # Errors
    ///
    /// The fabric's error.
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
            let params = accept_params(granted.encode(), window, longest);
            let endpoint = match incoming.accept(&params, stop) {
                Ok(endpoint) => endpoint,
                // A stray connection that closes must not end the wait for the source.
                Err(error @ FabricError::Event { .. }) => {
                    tracing::warn!(?peer, error = chain(&error), "connection given up");
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let mut hooks = Self {
                read_queues: Vec::new(),
                grants: Vec::new(),
                stream: StreamReceiver::new(Channel::new(endpoint), Receiver::new(window)),
                silence: config.silence,
                granted,
                blocks: DestinationBlocks::default(),
                registered_bytes: 0,
                exchanged: false,
                touched_bytes: Arc::default(),
                rounds: 0,
                open: None,
                quiet: None,
                mark: None,
            };
            let within = stop.within(hooks.stream.channel.now(), QUEUES_TIMEOUT);
            hooks.accept_data_queues(listener, &within)?;
            hooks.accept_read_queues(listener, &within)?;
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
            if !is_of(&asked, main, next) {
                tracing::warn!(peer = ?incoming.peer(), "connection rejected: not this migration's queue pair");
                continue;
            }
            let endpoint = incoming.accept(&accept_params(asked.encode(), 1, WORD_BYTES), stop)?;
            self.stream.data_queues.push(Channel::new(endpoint));
        }
        Ok(())
    }

    /// The capabilities agreed with the source.
    pub fn granted(&self) -> &Capabilities {
        &self.granted
    }

    /// Registers memory under a block's name, to be called before that block is announced.
    ///
    /// # Errors
    ///
    /// [`HooksError::Block`] for a duplicate name.
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
    /// [`registration_handle`](Self::registration_handle): there are no bytes in between.
    ///
    /// # Errors
    ///
    /// The connection's error; [`FabricError::Disconnected`] once the source is gone and everything is read.
    pub fn read_stream(&mut self, into: &mut [u8], stop: &Stop) -> Result<usize, HooksError> {
        self.stream.read(into, stop)
    }

    /// Hook: the stream's parser met the mark. Serves the source until it ends the round.
    ///
    /// # Errors
    ///
    /// Anything: the migration is over, and memory is in an undefined state.
    pub fn registration_handle(&mut self, stop: &Stop) -> Result<RoundSummary, HooksError> {
        loop {
            if let Some(summary) = self.serve_round(stop, Duration::MAX)? {
                return Ok(summary);
            }
        }
    }

    /// As [`registration_handle`](Self::registration_handle); returns `None` after `pause` without a message, for a caller
    /// that has something else to look after. The next call goes on with the round.
    ///
    /// # Errors
    ///
    /// As [`registration_handle`](Self::registration_handle).
    pub fn serve_round(&mut self, stop: &Stop, pause: Duration) -> Result<Option<RoundSummary>, HooksError> {
        let mut summary = self.open.take().unwrap_or_else(|| {
            self.rounds += 1;
            RoundSummary::default()
        });
        loop {
            let Some((slot, request)) = self.next_request(stop, pause)? else {
                self.open = Some(summary);
                return Ok(None);
            };
            let reply = match request {
                Message::RegisterFinished => {
                    self.stream.done(slot, None, stop)?;
                    self.wait_for_fences(stop)?;
                    return Ok(Some(summary));
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
                Message::Alive if self.expects_keepalives() => None,
                other => return Err(HooksError::unexpected(other.kind(), "a round was open")),
            };
            self.stream.done(slot, reply.as_ref(), stop)?;
        }
    }

    fn expects_keepalives(&self) -> bool {
        self.granted.extension.is_some_and(|extension| extension.features.keepalives)
    }

    fn takes_lists(&self) -> bool {
        self.granted.extension.is_some_and(|extension| extension.features.zero_runs)
    }

    /// Waits for the end of the round on every additional queue pair: then all their writes are in memory.
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
            // The source registers only chunks that have data, perhaps within a pin budget of its own: this may fit.
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

    /// Bytes of the chunks that were granted or zeroed for the first time in the rounds so far. Another thread reads it
    /// to see how far the first round is. Chunks that were granted with the block tables (pin-all) are not counted.
    pub fn touched_bytes(&self) -> &Arc<AtomicU64> {
        &self.touched_bytes
    }

    /// Chunks of a block that were ever granted for writing or zeroed: no other chunk can have changed.
    pub fn touched_chunks(&self, block: u32) -> impl Iterator<Item = u64> + '_ {
        let words = self.grants.get(block as usize).map_or(&[][..], |grants| &grants.touched);
        let bits = |(word, bits): (usize, &u64)| {
            let bits = *bits;
            (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| word as u64 * 64 + bit)
        };
        words.iter().enumerate().flat_map(bits)
    }

    /// Revokes every key, so that no further write of the source lands. To be called before the guest runs here.
    pub fn revoke_all(&mut self) {
        for grants in &mut self.grants {
            grants.spans.clear();
            grants.whole = None;
        }
        self.registered_bytes = 0;
    }

    /// Ends the connection after everything was read: revokes the keys and waits until the source closes the
    /// connection, at most 2 s, so that its last message is acknowledged. True if the source closed it.
    ///
    /// # Errors
    ///
    /// The connection's error; everything was still read.
    pub fn finish(mut self, stop: &Stop) -> Result<bool, HooksError> {
        self.revoke_all();
        self.stream.data_queues.iter_mut().for_each(Channel::leave);
        let stop = stop.within(self.stream.channel.now(), CLOSE_TIMEOUT);
        if self.granted.extension.is_some() {
            self.stream.send_done(&stop)?;
        }
        let parted = self.stream.channel.part(&stop)?;
        tracing::debug!(parted, "destination connection closed");
        Ok(parted)
    }

    /// Counters of this end.
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
