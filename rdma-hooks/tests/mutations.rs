//! Conversations that were right once, then damaged: what a fuzzer would try, from a corpus and under a seed.
//!
//! `RDMA_HOOKS_MUTATIONS` says how many conversations there are, instead of 30,000; `RDMA_HOOKS_SEED` where to begin.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::fuzz_bodies::{Mode, control, destination, exchange, source};
use common::{MIB, PAGE, Random};
use rdma_hooks::control::{
    BlockRecord, Compress, HEADER_BYTES, Kind, Message, RegisterRecord, RegisterResult,
};

/// Numbers at which something changes.
const EDGES: [u64; 12] =
    [0, 1, 2, 0xff, 0x1000, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 20, 12 << 20, u64::MAX - 1, u64::MAX];

fn encoded(message: &Message<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

/// What a source says in a round, from the tables to the end: every kind of request.
fn requests() -> Vec<Vec<u8>> {
    let register = |block, chunk: u64, extra_chunks| RegisterRecord { key: chunk * MIB, block, extra_chunks };
    let chunk = |key| RegisterRecord { key, block: 0, extra_chunks: 0 };
    let zero = |block, key, length| Compress { block, key, length };
    let all = [
        Message::RamBlocksRequest,
        Message::RegisterRequest(vec![register(0, 0, 3)]),
        Message::Compress(zero(0, 5 * MIB, MIB)),
        Message::RegisterRequest(vec![register(0, 6, 0), register(0, 8, 1), register(1, 0, 0)]),
        Message::ZeroRuns(vec![zero(0, 9 * MIB, PAGE), zero(1, 0, PAGE)]),
        Message::Alive,
        Message::UnregisterRequest(vec![chunk(0), chunk(6)]),
        Message::RegisterRequest(vec![register(0, 0, 0)]),
        Message::RegisterFinished,
    ];
    all.iter().map(encoded).collect()
}

/// What a destination says to a source that writes and zeroes.
fn answers(pinned: bool) -> Vec<Vec<u8>> {
    let key = |rkey| RegisterResult { rkey, block_base: 0 };
    let table = BlockRecord { base: 0, label: 0, length: 3 * MIB, rkey: u32::from(pinned) };
    let all = [
        Message::Ready,
        Message::Ready,
        Message::RamBlocksResult(vec![table]),
        Message::Ready,
        Message::Ready,
        Message::Ready,
        Message::RegisterResult { results: vec![key(7)], repeat: 1 },
        Message::Ready,
        Message::RegisterResult { results: vec![key(8), key(9)], repeat: 2 },
        Message::Ready,
        Message::UnregisterFinished { repeat: 1 },
        Message::Ready,
        Message::Done,
        Message::Error,
    ];
    all.iter().map(encoded).collect()
}

/// Damages one message in place.
fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    let at = |random: &mut Random, len: usize| random.below(len.max(1) as u64) as usize;
    match random.below(8) {
        0 if !bytes.is_empty() => {
            let at = at(random, bytes.len());
            bytes[at] ^= 1 << random.below(8);
        }
        // A number of the header: length, type, repeat.
        1 if bytes.len() >= HEADER_BYTES => {
            let field = at(random, 3) * 4;
            let value = EDGES[at(random, EDGES.len())] as u32;
            bytes[field..field + 4].copy_from_slice(&value.to_be_bytes());
        }
        // A number of a record.
        2 | 3 if bytes.len() >= HEADER_BYTES + 8 => {
            let field = HEADER_BYTES + at(random, (bytes.len() - HEADER_BYTES) / 8) * 8;
            let value = EDGES[at(random, EDGES.len())].wrapping_add(random.below(3));
            bytes[field..field + 8].copy_from_slice(&value.to_be_bytes());
        }
        4 => bytes.truncate(at(random, bytes.len())),
        5 => bytes.extend((0..random.below(40)).map(|_| random.next() as u8)),
        // A record more, with or without a header that fits.
        6 if bytes.len() >= HEADER_BYTES => {
            let tail = bytes[HEADER_BYTES..].to_vec();
            bytes.extend(tail);
            if random.chance(700) {
                let len = (bytes.len() - HEADER_BYTES) as u32;
                bytes[..4].copy_from_slice(&len.to_be_bytes());
            }
        }
        _ if bytes.len() >= HEADER_BYTES => {
            let kind = random.below(0x110) as u32;
            bytes[4..8].copy_from_slice(&kind.to_be_bytes());
        }
        _ => {}
    }
}

/// Damages a conversation: messages, their order, their number.
fn damage_all(says: &mut Vec<Vec<u8>>, random: &mut Random) {
    for _ in 0..1 + random.below(3) {
        let [at, other] = [(); 2].map(|()| random.below(says.len() as u64) as usize);
        match random.below(7) {
            0 => says.swap(at, other),
            1 => says.insert(at, says[other].clone()),
            2 if says.len() > 1 => drop(says.remove(at)),
            _ => damage(&mut says[at], random),
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect(name))
}

#[test]
fn damaged_conversations_never_crash_either_end() {
    let first = number("RDMA_HOOKS_SEED").unwrap_or(0);
    let count = number("RDMA_HOOKS_MUTATIONS").unwrap_or(30_000);
    let (mut served, mut sent) = (0, 0);
    for seed in first..first + count {
        let mut random = Random(seed ^ 0x6d75_7461_7465);
        let mode = Mode { pin_all: random.chance(300), native: random.chance(500) };
        let mut says = requests();
        damage_all(&mut says, &mut random);
        for message in &says {
            control(message);
        }
        exchange(&says.concat());
        served += u64::from(destination(mode, says).is_err());

        let mut says = answers(mode.pin_all);
        damage_all(&mut says, &mut random);
        sent += u64::from(source(mode, says).is_err());
    }
    // Every script ends in an error, if only its end.
    assert_eq!((served, sent), (count, count));
}

/// The corpus itself is no nonsense: whole, it is taken to its end.
#[test]
fn the_corpus_is_right_before_it_is_damaged() {
    for (index, message) in requests().iter().chain(&answers(true)).enumerate() {
        assert!(Message::decode(message).is_ok(), "{index}");
    }
    let native = Mode { pin_all: false, native: true };
    let ended = destination(native, requests()).unwrap_err();
    assert!(ended.to_string().contains("disconnected"), "{ended}");
    let kinds: Vec<Kind> =
        requests().iter().map(|message| Message::decode(message).unwrap().kind()).collect();
    assert!(kinds.contains(&Kind::Alive) && kinds.contains(&Kind::ZeroRuns));
}
