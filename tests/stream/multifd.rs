//! The multifd captures, main and channels together, replayed epoch by epoch.

use std::collections::BTreeMap;

use ramwire::stream::qemu::channel::{Channel, ChannelStep};
use ramwire::stream::qemu::incoming::{AnnouncedBlocks, Event, IncomingConfig, IncomingStream, Step};
use ramwire::stream::qemu::multifd::Method;
use ramwire::stream::qemu::packet_numbers::PacketNumbers;
use ramwire::stream::qemu::page_compression::PacketInflater;
use ramwire::units::{BlockIndex, BlockOffset, PageSize};

use super::captures::{self, Promise, sha256};

const PAGE: usize = 4096;

/// One channel of a capture and its counters.
struct Peer {
    bytes: Vec<u8>,
    at: usize,
    channel: Channel,
    inflater: Option<PacketInflater>,
    counts: BTreeMap<&'static str, u64>,
}

impl Peer {
    fn new(bytes: Vec<u8>, method: Method) -> Self {
        let channel = Channel::new(PageSize::SIZE_4K, method, Some([0; 16]), 2);
        let inflater = PacketInflater::new(method).unwrap();
        Self { bytes, at: 0, channel, inflater, counts: BTreeMap::new() }
    }

    fn count(&mut self, what: &'static str, by: usize) {
        *self.counts.entry(what).or_default() += by as u64;
    }

    /// Applies all packets up to the next barrier; false if the channel ends first.
    fn epoch(&mut self, blocks: &AnnouncedBlocks, memory: &mut [Vec<u8>]) -> bool {
        loop {
            match self.channel.next(&self.bytes[self.at..], blocks).unwrap() {
                ChannelStep::Opened { consumed, .. } => self.at += consumed,
                ChannelStep::Packet { consumed } => {
                    self.at += consumed;
                    self.apply(memory);
                    self.channel.payload_taken();
                }
                ChannelStep::Barrier { consumed } => {
                    self.at += consumed;
                    self.count("sync", 1);
                    return true;
                }
                ChannelStep::NeedMore { consumed, .. } => {
                    self.at += consumed;
                    assert!(self.at == self.bytes.len() && self.channel.may_end_here());
                    return false;
                }
            }
        }
    }

    fn apply(&mut self, memory: &mut [Vec<u8>]) {
        let plan = self.channel.packet().clone();
        self.count("normal", plan.normal.len());
        self.count("zero", plan.zero.len());
        let block = &mut memory[plan.block.unwrap().as_usize()];
        let payload = &self.bytes[self.at..self.at + plan.payload as usize];
        let mut pages = vec![0; plan.normal.len() * PAGE];
        match &mut self.inflater {
            None => pages.copy_from_slice(payload),
            Some(_) if plan.normal.is_empty() => {}
            Some(inflater) => inflater.inflate(payload, &mut pages).unwrap(),
        }
        for (offset, bytes) in plan.normal.iter().zip(pages.chunks(PAGE)) {
            block[offset.0 as usize..][..PAGE].copy_from_slice(bytes);
        }
        for offset in &plan.zero {
            block[offset.0 as usize..][..PAGE].fill(0);
        }
        self.at += plan.payload as usize;
    }
}

struct Result {
    memory: Vec<Vec<u8>>,
    blocks: AnnouncedBlocks,
    peers: Vec<Peer>,
    barriers: u64,
    /// Number of barriers at which the packets of the first channel alone, or the second, are detected as incomplete.
    half_seen: [u64; 2],
}

/// Replays a capture; `per_round` determines which record of main is the barrier.
fn replay(promise: &Promise, method: Method, per_round: bool) -> Result {
    let main = captures::read(promise.file.as_deref().unwrap());
    let mut peers: Vec<Peer> =
        promise.channels.iter().map(|part| Peer::new(captures::read(&part.file), method)).collect();
    let mut stream = IncomingStream::new(IncomingConfig::default());
    let mut memory: Vec<Vec<u8>> = Vec::new();
    let (mut at, mut barriers, mut half_seen) = (0, 0, [0; 2]);
    let mut numbers = [PacketNumbers::default(); 2];
    loop {
        let Step::Event { consumed, event } = stream.next(&main[at..]).unwrap() else {
            panic!("cut at {at}")
        };
        at += consumed;
        let page = |memory: &mut Vec<Vec<u8>>, block: BlockIndex, offset: BlockOffset, bytes: &[u8]| {
            memory[block.as_usize()][offset.0 as usize..][..PAGE].copy_from_slice(bytes);
        };
        let barrier = match event {
            Event::Blocks(blocks) => {
                memory = blocks.iter().map(|block| vec![0; block.used_length as usize]).collect();
                false
            }
            Event::Zero { block, offset } => {
                page(&mut memory, block, offset, &[0; PAGE]);
                false
            }
            Event::Page { block, offset, bytes } => {
                page(&mut memory, block, offset, bytes);
                false
            }
            Event::MultifdFlush => per_round,
            Event::RecordsEnd => !per_round,
            Event::Done => break,
            _ => false,
        };
        if barrier {
            barriers += 1;
            for peer in &mut peers {
                assert!(peer.epoch(stream.blocks(), &mut memory), "a channel lacks a SYNC");
            }
            for (numbers, peer) in numbers.iter_mut().zip(&mut peers) {
                numbers.add(peer.channel.take_numbers());
            }
            let mut all = numbers[0];
            all.add(numbers[1]);
            assert_eq!(all.check(), Ok(()), "at barrier {barriers} nothing is missing");
            for (seen, numbers) in half_seen.iter_mut().zip(numbers) {
                *seen += u64::from(numbers.check().is_err());
            }
            peers.iter_mut().for_each(|peer| peer.channel.release());
        }
    }
    for peer in &mut peers {
        assert!(!peer.epoch(stream.blocks(), &mut memory), "a channel has a SYNC too many");
    }
    assert_eq!(stream.seen().barrier_in_start, Some(per_round), "the mode shows in START");
    Result { memory, blocks: stream.blocks().clone(), peers, barriers, half_seen }
}

#[test]
fn s39_to_s47_main_and_channels_give_the_promised_memory() {
    let mut seen = 0;
    for (name, promise) in captures::manifest().iter().filter(|(name, _)| name.contains("multifd")) {
        let method = match name.rsplit('-').next().unwrap() {
            "zlib" => Method::Zlib,
            "zstd" => Method::Zstd,
            _ => Method::Plain,
        };
        let replayed = replay(promise, method, name.starts_with("q100"));
        for seen in replayed.half_seen {
            assert!(seen + 1 >= replayed.barriers, "{name}: a channel that is not read: {seen}");
        }
        if let Some(barriers) = promise.barriers {
            assert_eq!(replayed.barriers, barriers, "{name}");
        }
        for summary in &promise.channel_summary {
            let peer = replayed.peers.iter().find(|peer| peer.channel.id() == Some(summary.id)).unwrap();
            let found = ["normal", "zero", "sync"].map(|what| peer.counts.get(what).copied().unwrap_or(0));
            assert_eq!(found, [summary.normal, summary.zero, summary.sync], "{name} channel {}", summary.id);
        }
        for (block, promised) in promise.blocks.iter().flatten() {
            let memory = &replayed.memory[replayed.blocks.find(block).unwrap().as_usize()];
            assert_eq!(sha256(memory), promised.sha256, "{name}: {block}");
            seen += 1;
        }
    }
    assert_eq!(seen, 4 * 5, "four captures of five blocks have hashes");
}
