//! Peers that break the protocol: refused with an error that says what they did, never a crash.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::fuzz_bodies::{Mode, control, destination, exchange, messages, source};
use common::{MIB, PAGE, Random};
use rdma_hooks::control::{BlockRecord, Compress, Kind, Message, RegisterRecord, RegisterResult, WireError};
use rdma_hooks::exchange::ExchangeError;
use rdma_hooks::{BlockError, FabricError, HooksError};

const QEMU: Mode = Mode { pin_all: false, native: false };
const PINNED: Mode = Mode { pin_all: true, native: false };
const NATIVE: Mode = Mode { pin_all: false, native: true };

fn bytes(message: &Message<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    bytes
}

fn register(block: u32, key: u64, extra_chunks: u64) -> Message<'static> {
    Message::RegisterRequest(vec![RegisterRecord { key, block, extra_chunks }])
}

fn unregister(block: u32, chunk: u64) -> Message<'static> {
    Message::UnregisterRequest(vec![RegisterRecord { key: chunk, block, extra_chunks: 0 }])
}

fn compress(block: u32, key: u64, length: u64) -> Message<'static> {
    Message::Compress(Compress { block, key, length })
}

fn zeros(ranges: &[(u32, u64, u64)]) -> Message<'static> {
    Message::ZeroRuns(ranges.iter().map(|&(block, key, length)| Compress { block, key, length }).collect())
}

/// Says what a destination with blocks of 12 MiB and a page, and of a page, makes of the messages after the tables.
fn serve(mode: Mode, says: &[Message<'_>]) -> HooksError {
    let says = std::iter::once(&Message::RamBlocksRequest).chain(says).map(bytes).collect();
    destination(mode, says).expect_err("a script ends in an error, if only its end")
}

#[test]
fn r22_r34_r35_requests_that_make_no_sense_are_refused_by_the_destination() {
    type Test = fn(&HooksError) -> bool;
    let no_index: Test = |e| matches!(e, HooksError::Block(BlockError::NoSuchIndex { .. }));
    let outside: Test = |e| matches!(e, HooksError::Block(BlockError::OutOfBlock { .. }));
    let not_held: Test = |e| matches!(e, HooksError::NotRegistered { .. });
    let unexpected: Test = |e| matches!(e, HooksError::Exchange(ExchangeError::Unexpected { .. }));
    let script_over: Test = |e| matches!(e, HooksError::Fabric(FabricError::Disconnected));
    let end = 12 * MIB + PAGE;
    #[rustfmt::skip]
    let cases: Vec<(&str, Vec<Message<'_>>, Test)> = vec![
        ("R-34 block index",               vec![register(2, 0, 0)],                  no_index),
        ("R-34 huge block index",          vec![register(u32::MAX, 0, 0)],           no_index),
        ("R-34 key past the block",        vec![register(0, end, 0)],                outside),
        ("R-34 key that wraps",            vec![register(0, u64::MAX, 0)],           outside),
        ("R-34 span that wraps",           vec![register(0, 0, u64::MAX)],           outside),
        ("a long span is cut",             vec![register(0, 0, u64::MAX - 1)],       script_over),
        ("R-34 zeros past the block",      vec![compress(0, end - PAGE, 2 * PAGE)],  outside),
        ("R-34 zeros that wrap",           vec![compress(0, PAGE, u64::MAX)],        outside),
        ("R-34 zeros of no block",         vec![compress(7, 0, PAGE)],               no_index),
        ("zeros of no bytes",              vec![compress(0, end, 0)],                script_over),
        ("R-35 never registered",          vec![unregister(0, 0)],                   not_held),
        ("R-35 not the first chunk",       vec![register(0, 0, 1), unregister(0, 1)], not_held),
        ("R-35 huge chunk",                vec![unregister(0, u64::MAX)],            not_held),
        ("R-35 twice",                     vec![register(0, 0, 0), unregister(0, 0), unregister(0, 0)], not_held),
        ("R-35 of no block",               vec![unregister(9, 0)],                   no_index),
        ("R-23 block tables twice",        vec![Message::RamBlocksRequest],          unexpected),
        ("R-22 stream bytes in a round",   vec![Message::Stream(b"x")],              unexpected),
        ("R-22 an answer",                 vec![Message::RegisterResult { results: vec![RegisterResult::default()], repeat: 1 }], |e| matches!(e, HooksError::Exchange(_))),
        ("R-22 a READY",                   vec![Message::Ready],                     unexpected),
        ("R-40 ERROR",                     vec![Message::Error],                     |e| matches!(e, HooksError::Exchange(ExchangeError::PeerFailed))),
        ("all is well",                    vec![register(0, MIB, 3), register(0, 2 * MIB, 0), unregister(0, 2), unregister(0, 1), compress(1, 0, PAGE), Message::RegisterFinished], script_over),
    ];
    for (what, says, expected) in cases {
        let error = serve(QEMU, &says);
        assert!(expected(&error), "{what}: {error:?}");
        assert!(!error.to_string().is_empty());
    }
    let several: Vec<(&str, Message<'_>, Test)> = vec![
        ("a list for a QEMU's end", zeros(&[(0, 0, PAGE)]), unexpected),
        ("a list, one of no block", zeros(&[(0, 0, PAGE), (2, 0, PAGE)]), no_index),
        ("a list, one past its block", zeros(&[(0, 0, PAGE), (1, PAGE, 1)]), outside),
        ("a list, one that wraps", zeros(&[(0, 2, u64::MAX)]), outside),
        ("a list", zeros(&[(0, 0, PAGE), (1, 0, PAGE)]), script_over),
    ];
    for (index, (what, list, expected)) in several.into_iter().enumerate() {
        let error = serve(if index == 0 { QEMU } else { NATIVE }, &[list]);
        assert!(expected(&error), "{what}: {error:?}");
    }
    assert!(unexpected(&serve(QEMU, &[Message::Alive])), "a sign of life that was not agreed on");
    assert!(script_over(&serve(NATIVE, &[Message::Alive, Message::Alive])));
    let pinned = serve(PINNED, &[unregister(0, 0)]);
    assert!(not_held(&pinned), "R-36 unregister with pin-all: {pinned:?}");
}

#[test]
fn r34_a_source_cannot_have_the_same_memory_pinned_over_and_over() {
    // Overlapping spans from every chunk to the end: half a square of the block's size.
    let says: Vec<_> = (0..12).rev().map(|chunk| register(0, chunk * MIB, 100)).collect();
    assert!(matches!(serve(QEMU, &says), HooksError::TooMuchRegistered { .. }));
    let says: Vec<_> =
        (0..12).rev().flat_map(|chunk| [register(0, chunk * MIB, 100), unregister(0, chunk)]).collect();
    let again: Vec<_> = says.iter().cycle().take(600).cloned().collect();
    assert!(
        matches!(serve(QEMU, &again), HooksError::Fabric(FabricError::Disconnected)),
        "none is held for long"
    );
}

#[test]
fn requests_before_the_block_tables_are_refused() {
    for message in [register(0, 0, 0), unregister(0, 0), compress(0, 0, PAGE)] {
        let error = destination(QEMU, vec![bytes(&message)]).unwrap_err();
        assert!(
            matches!(error, HooksError::Exchange(ExchangeError::Unexpected { .. })),
            "{message:?}: {error:?}"
        );
    }
}

#[test]
fn r12_to_r14_r25_r29_answers_that_make_no_sense_are_refused_by_the_source() {
    type Test = fn(&HooksError) -> bool;
    let ready = || Message::Ready;
    let table =
        |length, rkey| Message::RamBlocksResult(vec![BlockRecord { base: 0, label: 0, length, rkey }]);
    let key = |rkey, block_base| Message::RegisterResult {
        results: vec![RegisterResult { rkey, block_base }],
        repeat: 1,
    };
    // Setup: the mark's stream message, the block tables, the end of the round.
    let setup = || vec![ready(), ready(), table(3 * MIB, 0), ready()];
    let with = |more: Vec<Message<'static>>| [setup(), more].concat();
    let unexpected: Test = |e| matches!(e, HooksError::Exchange(ExchangeError::Unexpected { .. }));
    #[rustfmt::skip]
    let cases: Vec<(&str, Vec<Message<'static>>, Test)> = vec![
        ("R-13 two READYs",              vec![ready(), ready(), ready()],   |e| matches!(e, HooksError::Exchange(ExchangeError::TooManyReady { .. } | ExchangeError::ReadyBeforeReply { .. }))),
        ("R-14 READY before the answer", vec![ready(), ready(), ready(), table(3 * MIB, 0)], |e| matches!(e, HooksError::Exchange(ExchangeError::ReadyBeforeReply { .. }))),
        ("R-25 no blocks",               vec![ready(), ready(), Message::RamBlocksResult(vec![]), ready()], |e| matches!(e, HooksError::Block(BlockError::CountMismatch { .. }))),
        ("R-25 a shorter block",         vec![ready(), ready(), table(MIB, 0), ready()], |e| matches!(e, HooksError::Block(BlockError::LengthMismatch { .. }))),
        ("another answer",               vec![ready(), ready(), key(1, 0)], unexpected),
        ("an answer to nothing",         vec![table(3 * MIB, 0)],           unexpected),
        ("stream bytes",                 vec![Message::Stream(b"x")],       unexpected),
        ("a request",                    vec![Message::RegisterFinished],   unexpected),
        ("R-40 ERROR",                   vec![ready(), Message::Error],     |e| matches!(e, HooksError::Exchange(ExchangeError::PeerFailed))),
        ("R-29 key 0",                   with(vec![ready(), ready(), ready(), key(0, 0)]), |e| matches!(e, HooksError::NoKey { .. })),
        ("a base that wraps",            with(vec![ready(), ready(), ready(), key(5, u64::MAX - 10)]), |e| matches!(e, HooksError::Block(BlockError::Wraps { .. }))),
    ];
    for (what, says, expected) in cases {
        let error = source(QEMU, says.iter().map(bytes).collect()).unwrap_err();
        assert!(expected(&error), "{what}: {error:?}");
    }
    let unpinned = source(PINNED, [ready(), ready(), table(3 * MIB, 0)].iter().map(bytes).collect());
    assert!(matches!(unpinned, Err(HooksError::NoKey { .. })), "R-29 pin-all without keys: {unpinned:?}");
}

#[test]
fn r15_bytes_that_are_no_message_are_refused_by_both() {
    let short = || vec![vec![0; 7]];
    assert!(matches!(destination(QEMU, short()), Err(HooksError::Wire(WireError::ShortHeader { have: 7 }))));
    assert!(matches!(source(QEMU, short()), Err(HooksError::Wire(WireError::ShortHeader { have: 7 }))));
}

/// Messages that are mostly right, with numbers that are mostly small and sometimes wild.
fn plausible(random: &mut Random) -> Vec<u8> {
    let number = |random: &mut Random| match random.below(8) {
        0 => random.next(),
        1 => u64::MAX - random.below(3),
        2 => random.below(8) * MIB,
        _ => random.below(7),
    };
    let record = |random: &mut Random| RegisterRecord {
        key: number(random),
        block: random.below(3) as u32,
        extra_chunks: number(random),
    };
    let message = match random.below(13) {
        0 => Message::Error,
        1..=3 => Message::Ready,
        4 => Message::RamBlocksRequest,
        5 => Message::RamBlocksResult(vec![BlockRecord {
            base: number(random),
            label: number(random),
            length: 3 * MIB + random.below(2),
            rkey: number(random) as u32,
        }]),
        6 => compress(random.below(3) as u32, number(random), number(random)),
        7 => Message::RegisterRequest((0..1 + random.below(3)).map(|_| record(random)).collect()),
        8 => Message::RegisterResult {
            results: (0..1 + random.below(3))
                .map(|_| RegisterResult { rkey: number(random) as u32, block_base: number(random) })
                .collect(),
            repeat: 3,
        },
        11 => zeros(&[(random.below(3) as u32, number(random), number(random)), (1, 0, number(random))]),
        9 => Message::RegisterFinished,
        10 => Message::UnregisterRequest(vec![record(random)]),
        _ => Message::UnregisterFinished { repeat: 1 },
    };
    let mut bytes = bytes(&message);
    if random.chance(50) {
        let at = random.below(bytes.len() as u64) as usize;
        bytes[at] ^= 1 << random.below(8);
    }
    bytes
}

#[test]
fn seeded_nonsense_never_crashes_either_end() {
    let mut longest = 0;
    for seed in 0..20_000 {
        let mut random = Random(seed);
        let mode = Mode { pin_all: random.chance(300), native: random.chance(500) };
        let mut says: Vec<_> = (0..random.below(30)).map(|_| plausible(&mut random)).collect();
        says.insert(0, bytes(&Message::RamBlocksRequest));
        let _ = destination(mode, says.clone());

        // A source gets further if the first answers fit.
        let rkey = u32::from(mode.pin_all);
        let table = Message::RamBlocksResult(vec![BlockRecord { base: 0, label: 0, length: 3 * MIB, rkey }]);
        let opening = [Message::Ready, Message::Ready, table, Message::Ready, Message::Ready];
        says.splice(0..1, opening.iter().map(bytes));
        longest = longest.max(says.len());
        let _ = source(mode, says);

        let noise: Vec<u8> = (0..random.below(600)).map(|_| random.next() as u8).collect();
        control(&noise);
        exchange(&noise);
        let _ = destination(mode, messages(&noise));
    }
    assert!(longest > 20);
    assert_eq!(Kind::from_wire(0), None);
}
