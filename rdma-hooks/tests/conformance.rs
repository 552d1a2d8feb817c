//! Requirements of the protocol that show in what is posted, message by message.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::scripted::{Posted, Scripted};
use common::{MIB, PAGE};
use rdma_hooks::control::{BlockRecord, Compress, Kind, Message, RegisterRecord, RegisterResult};
use rdma_hooks::sim::SparseMemory;
use rdma_hooks::{
    BlockSpan, Cancel, Capabilities, DestinationConfig, DestinationHooks, Fabric, HookMark, HooksError,
    HostRegion, PageContent, RamBlock, RamControl, RegionMemory, ReturnWriter, SourceConfig, SourceHooks,
    Stop, Stopped,
};

const PLAIN: [u8; 8] = [0, 0, 0, 1, 0, 0, 0, 0];

fn scripted(says: &[Message<'_>]) -> Scripted {
    let bytes = |message: &Message<'_>| {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        bytes
    };
    Scripted::new(PLAIN.to_vec(), says.iter().map(bytes).collect())
}

fn stop(scripted: &Scripted) -> Stop {
    Stop::new(Some(scripted.now() + Duration::from_secs(10)), Cancel::default())
}

fn source(scripted: &Scripted) -> SourceHooks {
    SourceHooks::connect(scripted, "script", 1, SourceConfig::default(), &stop(scripted)).unwrap()
}

fn destination(scripted: &Scripted) -> DestinationHooks {
    let mut listener = scripted.clone();
    DestinationHooks::accept(&mut listener, &DestinationConfig::default(), &stop(scripted)).unwrap()
}

fn sent(scripted: &Scripted, kind: Kind) -> Vec<Vec<u8>> {
    let script = scripted.script.lock().unwrap();
    let of_kind = |message: &&Vec<u8>| message[4..8] == (kind as u32).to_be_bytes();
    script.sent.iter().filter(of_kind).cloned().collect()
}

#[test]
fn r08_r09_receive_buffers_are_posted_before_the_peer_can_send() {
    let peer = scripted(&[]);
    let _hooks = source(&peer);
    assert!(peer.script.lock().unwrap().receives >= 2, "a READY and an answer");
    let peer = scripted(&[]);
    let _hooks = destination(&peer);
    assert!(peer.script.lock().unwrap().receives >= 2);
    assert!(peer.script.lock().unwrap().sent.is_empty(), "no READY before bytes are wanted");
}

#[test]
fn r18_pieces_of_the_stream_have_1_to_32768_bytes() {
    let peer = scripted(&vec![Message::Ready; 6]);
    let mut hooks = source(&peer);
    let stop = stop(&peer);
    hooks.flush_stream(&stop).unwrap();
    hooks.write_stream(&[], &stop).unwrap();
    hooks.flush_stream(&stop).unwrap();
    assert!(sent(&peer, Kind::Stream).is_empty(), "nothing is never sent");
    let bytes: Vec<u8> = (0..100_000_u32).map(|i| i as u8).collect();
    hooks.write_stream(&bytes, &stop).unwrap();
    hooks.flush_stream(&stop).unwrap();
    hooks.flush_stream(&stop).unwrap();
    let pieces = sent(&peer, Kind::Stream);
    assert_eq!(pieces.iter().map(|piece| piece.len() - 16).collect::<Vec<_>>(), [32768, 32768, 32768, 1696]);
    assert_eq!(pieces.iter().flat_map(|piece| piece[16..].to_vec()).collect::<Vec<_>>(), bytes);
}

#[test]
fn r17_r19_pieces_of_any_size_are_one_stream_and_are_read_before_the_next_ready() {
    let long = vec![7; 524_272];
    let peer = scripted(&[Message::Stream(b"a"), Message::Stream(b"bcd"), Message::Stream(&long)]);
    let mut hooks = destination(&peer);
    let stop = stop(&peer);
    let readies = || sent(&peer, Kind::Ready).len();
    let mut all = Vec::new();
    let mut buffer = [0; 2];
    for (bytes, granted) in [(1, 1), (2, 2), (1, 2), (2, 3), (2, 3)] {
        let count = hooks.read_stream(&mut buffer, &stop).unwrap();
        all.extend_from_slice(&buffer[..count]);
        assert_eq!((count, readies()), (bytes, granted));
    }
    assert_eq!(all, b"abcd\x07\x07\x07\x07");
    let mut rest = vec![0; 600_000];
    assert_eq!(hooks.read_stream(&mut rest, &stop).unwrap(), 524_272 - 4);
    assert_eq!(readies(), 3, "no READY until more is wanted");
}

#[test]
fn r53_both_ways_of_cutting_the_bytes_before_a_round_are_taken_and_bytes_after_the_mark_are_kept() {
    let mark = HookMark::FLAG.to_be_bytes();
    let whole = [&[0x7e, 0, 0, 0, 1, 2, 0, 0, 0, 1][..], &mark].concat();
    let with_more = [&whole[..], b"later"].concat();
    let finished = Message::RegisterFinished;
    let ways: [&[Message<'_>]; 3] = [
        &[Message::Stream(&whole), finished.clone()],
        &[Message::Stream(&whole[..5]), Message::Stream(&whole[5..]), finished.clone()],
        &[Message::Stream(&with_more), finished],
    ];
    for (index, way) in ways.into_iter().enumerate() {
        let peer = scripted(way);
        let mut hooks = destination(&peer);
        let stop = stop(&peer);
        let mut read = [0; 18];
        let mut done = 0;
        while done < 18 {
            done += hooks.read_stream(&mut read[done..], &stop).unwrap();
        }
        assert_eq!(read[10..], mark);
        hooks.registration_handle(&stop).unwrap();
        if index == 2 {
            let mut later = [0; 8];
            assert_eq!(hooks.read_stream(&mut later, &stop).unwrap(), 5);
            assert_eq!(&later[..5], b"later");
        }
    }
}

#[test]
fn r21_r28_a_round_of_pages_is_keys_writes_and_one_end_with_the_peers_labels() {
    let (label, base, moved) = (0x100_0000, 0x5000_0000, 0x9000_0000);
    let table = BlockRecord { base, label, length: 4 * MIB, rkey: 0 };
    let key = RegisterResult { rkey: 77, block_base: moved };
    let ready = || Message::Ready;
    let peer = scripted(&[
        ready(),
        ready(),
        Message::RamBlocksResult(vec![table]),
        ready(),
        ready(),
        ready(),
        Message::RegisterResult { results: vec![key], repeat: 1 },
        ready(),
        ready(),
        ready(),
    ]);
    let mut hooks = source(&peer);
    let stop = stop(&peer);
    let memory = Arc::new(SparseMemory::new(4 * MIB));
    hooks.set_blocks(vec![RamBlock::new("ram", HostRegion::new(memory))]).unwrap();
    for kind in [RamControl::Setup, RamControl::Round] {
        let mark = hooks.registration_start(kind).unwrap().unwrap();
        hooks.write_stream(&mark.to_bytes(), &stop).unwrap();
        if kind == RamControl::Round {
            let zero = BlockSpan { block: 0, offset: MIB, len: MIB, content: PageContent::Zero };
            hooks.control_save_page(zero, &stop).unwrap();
            let data =
                BlockSpan { block: 0, offset: 2 * MIB + PAGE, len: 2 * PAGE, content: PageContent::Data };
            hooks.control_save_page(data, &stop).unwrap();
        }
        hooks.registration_stop(kind, &stop).unwrap();
    }
    let decoded = |kind| Message::decode(&sent(&peer, kind)[0]).map(|message| format!("{message:?}"));
    let compress = Message::Compress(Compress { block: 0, key: label + MIB, length: MIB });
    assert_eq!(decoded(Kind::Compress), Ok(format!("{compress:?}")));
    // The chunk's start, so that the key serves the whole chunk.
    let register = RegisterRecord { key: label + 2 * MIB, block: 0, extra_chunks: 0 };
    let register = Message::RegisterRequest(vec![register]);
    assert_eq!(decoded(Kind::RegisterRequest), Ok(format!("{register:?}")));
    let script = peer.script.lock().unwrap();
    assert_eq!((script.writes[0].rkey, script.writes[0].to), (77, moved + 2 * MIB + PAGE));
    let message = |kind: Kind| Posted::Message(kind as u32);
    let setup = [Kind::Stream, Kind::RamBlocksRequest, Kind::RegisterFinished].map(message);
    let round = [
        message(Kind::Stream),
        // Keys are waited for, zeros are not: they are told with the first credit that nobody needs more.
        message(Kind::RegisterRequest),
        Posted::Write(2 * PAGE as u32),
        message(Kind::Compress),
        message(Kind::RegisterFinished),
    ];
    assert_eq!(script.order, [&setup[..], &round].concat());
}

#[test]
fn r32_a_zeroed_range_reads_as_zero_before_the_next_ready() {
    let compress = Message::Compress(Compress { block: 0, key: PAGE, length: MIB });
    let peer = scripted(&[Message::RamBlocksRequest, compress, Message::RegisterFinished]);
    let mut hooks = destination(&peer);
    let memory = Arc::new(SparseMemory::new(2 * MIB));
    memory.write(0, &vec![9; 2 << 20]);
    hooks.add_block(RamBlock::new("ram", HostRegion::new(memory.clone()))).unwrap();
    hooks.block_notification("ram", 2 * MIB).unwrap();
    let summary = hooks.registration_handle(&stop(&peer)).unwrap();
    assert_eq!((summary.zero_ranges, summary.zero_bytes), (1, MIB));
    assert!(memory.is_zero(PAGE, MIB));
    assert!(!memory.is_zero(0, PAGE) && !memory.is_zero(PAGE + MIB, 1));
    assert_eq!(hooks.touched_chunks(0).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn r44_the_first_message_of_the_return_path_waits_for_its_ready() {
    let peer = scripted(&[]);
    let stop = stop(&peer);
    let mut listener = peer.clone();
    let mut back = ReturnWriter::accept(&mut listener, &Capabilities::default(), &stop).unwrap();
    back.write(b"answer", &stop).unwrap();
    let flushed = back.flush(&stop);
    assert!(
        matches!(flushed, Err(HooksError::Fabric(_) | HooksError::Stopped(Stopped::Deadline))),
        "{flushed:?}"
    );
    assert!(sent(&peer, Kind::Stream).is_empty());

    let peer = scripted(&[Message::Ready]);
    let mut listener = peer.clone();
    let mut back = ReturnWriter::accept(&mut listener, &Capabilities::default(), &stop).unwrap();
    back.write(b"answer", &stop).unwrap();
    back.flush(&stop).unwrap();
    assert_eq!(sent(&peer, Kind::Stream).len(), 1);
}
