#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use proptest::prelude::*;

fn encoded(message: &Message<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

/// Bytes recorded between QEMUs.
#[test]
fn r01_r02_golden_bytes_encode_and_decode() {
    let register = RegisterRecord { key: 0x20_1000, block: 0, extra_chunks: 0 };
    let result = RegisterResult { rkey: 0x8dc, block_base: 0x7f81_c6e0_0000 };
    let compress = Compress { block: 0, key: 0x10_0000, length: 0x10_0000 };
    let block = BlockRecord { base: 0x7f81_c6e0_0000, label: 0, length: 0x100_0000, rkey: 0x1d50 };
    let eos = [0, 0, 0, 0, 0, 0, 0, 0x10];
    #[rustfmt::skip]
    let cases = [
        (Message::Ready,                            "00000000 00000002 00000001 00000000"),
        (Message::RamBlocksRequest,                 "00000000 00000004 00000001 00000000"),
        (Message::RegisterFinished,                 "00000000 00000009 00000001 00000000"),
        (Message::Error,                            "00000000 00000001 00000001 00000000"),
        (Message::Compress(compress),               "00000018 00000006 00000001 00000000 00000000 00000000 0000000000100000 0000000000100000"),
        (Message::RegisterRequest(vec![register]),  "00000018 00000007 00000001 00000000 0000000000201000 00000000 00000000 0000000000000000"),
        (Message::RegisterResult { results: vec![result], repeat: 1 },
                                                    "00000010 00000008 00000001 00000000 000008dc 00000000 00007f81c6e00000"),
        (Message::RamBlocksResult(vec![block]),     "00000020 00000005 00000001 00000000 00007f81c6e00000 0000000000000000 0000000001000000 00001d50 00000000"),
        (Message::Stream(&eos),                     "00000008 00000003 00000000 00000000 0000000000000010"),
        (Message::UnregisterRequest(vec![register]),"00000018 0000000a 00000001 00000000 0000000000201000 00000000 00000000 0000000000000000"),
        (Message::UnregisterFinished { repeat: 1 }, "00000000 0000000b 00000001 00000000"),
    ];
    for (message, bytes) in cases {
        assert_eq!(encoded(&message), hex(bytes), "{message:?}");
        assert_eq!(Message::decode(&hex(bytes)), Ok(message));
    }
}

#[test]
fn r01_padding_is_ignored_on_receive() {
    let request =
        hex("00000018 00000007 00000001 deadbeef 0000000000201000 00000001 deadbeef 0000000000000003");
    let record = RegisterRecord { key: 0x20_1000, block: 1, extra_chunks: 3 };
    assert_eq!(Message::decode(&request), Ok(Message::RegisterRequest(vec![record])));
}

#[test]
fn r15_to_r34_hostile_messages_are_refused() {
    use WireError::*;
    let record = "0000000000000000 00000000 00000000 0000000000000000";
    let bad = |kind, len, repeat, record| RecordBytes { kind, len, repeat, record };
    #[rustfmt::skip]
    let cases = [
        ("nothing",                     String::new(),                                        ShortHeader { have: 0 }),
        ("half a header",               "0000000000000002".into(),                            ShortHeader { have: 8 }),
        ("R-15 more than announced",    "00000000 00000002 00000001 00000000 00".into(),      LengthMismatch { kind: 2, announced: 0, received: 1 }),
        ("R-15 less than announced",    "00000002 00000003 00000001 00000000 00".into(),      LengthMismatch { kind: 3, announced: 2, received: 1 }),
        ("R-15 length wraps",           "ffffffff 00000003 00000001 00000000 00".into(),      LengthMismatch { kind: 3, announced: u32::MAX, received: 1 }),
        ("R-22 type NONE",              "00000000 00000000 00000001 00000000".into(),         UnknownKind { kind: 0 }),
        ("R-22 type 12",                "00000000 0000000c 00000001 00000000".into(),         UnknownKind { kind: 12 }),
        ("R-18 empty stream piece",     "00000000 00000003 00000000 00000000".into(),         EmptyStream),
        ("READY with payload",          "00000001 00000002 00000001 00000000 00".into(),      bad(Kind::Ready, 1, 1, 0)),
        ("R-31 no records",             "00000000 00000007 00000000 00000000".into(),         Repeat { kind: Kind::RegisterRequest, repeat: 0, min: 1, max: 4096 }),
        ("R-31 repeat above 4096",      "00000000 00000007 00001001 00000000".into(),         Repeat { kind: Kind::RegisterRequest, repeat: 4097, min: 0, max: 4096 }),
        ("R-31 repeat beyond payload",  format!("00000018 00000007 00000002 00000000 {record}"), bad(Kind::RegisterRequest, 24, 2, 24)),
        ("R-31 half a record",          "00000004 00000007 00000001 00000000 00000000".into(), bad(Kind::RegisterRequest, 4, 1, 24)),
        ("R-35 repeat beyond payload",  format!("00000018 0000000a 00000003 00000000 {record}"), bad(Kind::UnregisterRequest, 24, 3, 24)),
        ("R-32 fill value",             "00000018 00000006 00000001 00000000 00000001 00000000 0000000000000000 0000000000001000".into(), CompressValue { value: 1 }),
        ("no zero ranges",              "00000000 00000102 00000000 00000000".into(),         Repeat { kind: Kind::ZeroRuns, repeat: 0, min: 1, max: 4096 }),
        ("fewer zero ranges than said", format!("00000018 00000102 00000002 00000000 {record}"), bad(Kind::ZeroRuns, 24, 2, 24)),
        ("a zero range that is filled", format!("00000030 00000102 00000002 00000000 {record} 00000007 00000000 0000000000000000 0000000000001000"), CompressValue { value: 7 }),
        ("R-32 two ranges",             format!("00000030 00000006 00000002 00000000 {record}{record}"), bad(Kind::Compress, 48, 2, 24)),
        ("keys without a key",          "00000000 00000008 00000001 00000000".into(),         bad(Kind::RegisterResult, 0, 1, 16)),
        ("more keys than asked",        "00000010 00000008 00000000 00000000 0000000000000000 0000000000000000".into(), bad(Kind::RegisterResult, 16, 0, 16)),
        ("block table with a rest",     "00000001 00000005 00000001 00000000 00".into(),      bad(Kind::RamBlocksResult, 1, 1, 32)),
    ];
    for (what, bytes, want) in cases {
        assert_eq!(Message::decode(&hex(&bytes)), Err(want), "{what}");
    }
}

#[test]
fn r15_the_longest_payload_is_taken_and_one_more_byte_is_not() {
    let mut bytes = header(Kind::Stream, MAX_PAYLOAD_BYTES, 0).to_vec();
    bytes.resize(CONTROL_BUFFER_BYTES, 7);
    assert!(matches!(Message::decode(&bytes), Ok(Message::Stream(s)) if s.len() == MAX_PAYLOAD_BYTES));
    bytes.push(7);
    bytes[0..4].copy_from_slice(&(MAX_PAYLOAD_BYTES as u32 + 1).to_be_bytes());
    assert!(matches!(Message::decode(&bytes), Err(WireError::LengthMismatch { .. })));
}

#[test]
fn r16_repeat_of_a_stream_message_is_ignored() {
    let bytes = hex("00000001 00000003 deadbeef 00000000 2a");
    assert_eq!(Message::decode(&bytes), Ok(Message::Stream(&[0x2a])));
    assert_eq!(encoded(&Message::Stream(&[0x2a]))[8..12], [0; 4]);
}

#[test]
fn r31_a_truncated_batch_reply_of_a_qemu_decodes() {
    let bytes = hex("00000010 00000008 00000002 00000000 000008dc 00000000 00007f81c6e00000");
    let Ok(Message::RegisterResult { results, repeat: 2 }) = Message::decode(&bytes) else { panic!() };
    assert_eq!(results.len(), 1);
}

proptest! {
    /// Every message that decodes encodes to the same bytes, except for padding and unused counts.
    #[test]
    fn decode_then_encode_is_stable(bytes in prop::collection::vec(any::<u8>(), 0..120), kind in 0u32..13) {
        let mut bytes = bytes;
        if let Some(len) = bytes.len().checked_sub(HEADER_BYTES) {
            bytes[0..4].copy_from_slice(&(len as u32).to_be_bytes());
            bytes[4..8].copy_from_slice(&kind.to_be_bytes());
            bytes[8..12].copy_from_slice(&((len / 24) as u32).to_be_bytes());
        }
        if let Ok(message) = Message::decode(&bytes) {
            let again = encoded(&message);
            prop_assert_eq!(again.len(), bytes.len());
            prop_assert_eq!(Message::decode(&again), Ok(message));
        }
    }
}
