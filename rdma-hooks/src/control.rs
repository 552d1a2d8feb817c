//! Control messages: what is SENT on a queue pair, as bytes and as values.
//!
//! Every SEND is one message: a 16-byte header, then its payload. All integers are big endian; padding is sent as
//! zero and ignored on receive. This module reads and writes bytes and keeps no state; whose turn it is to speak is
//! decided in [`exchange`](crate::exchange).
//!
//! # Source
//!
//! QEMU's `rdma:` migration protocol, sections "control header" and "payload structs"; checked against messages
//! recorded between QEMU 7.2 and 10.0.

/// Bytes in front of every payload: length, type, repeat, padding.
pub const HEADER_BYTES: usize = 16;
/// Bytes of one control buffer: header and payload together. A peer's receive buffers have this size.
pub const CONTROL_BUFFER_BYTES: usize = 512 * 1024;
/// Longest payload a peer takes.
pub const MAX_PAYLOAD_BYTES: usize = CONTROL_BUFFER_BYTES - HEADER_BYTES;
/// Longest piece of the byte stream put into one message; QEMU never sends more, though it takes more.
pub const STREAM_PAYLOAD_BYTES: usize = 32 * 1024;
/// Most records in one message.
pub const MAX_REPEAT: u32 = 4096;

const _: () = assert!(RegisterRecord::BYTES == 24 && RegisterResult::BYTES == 16);
const _: () = assert!(Compress::BYTES == 24 && BlockRecord::BYTES == 32);

/// Type of a control message; the number is the one on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Kind {
    /// The sender gives up; no text, no code.
    Error = 1,
    /// The receiver of the byte stream takes exactly one more message.
    Ready = 2,
    /// A piece of the migration byte stream.
    Stream = 3,
    /// The source asks for the destination's block table.
    RamBlocksRequest = 4,
    /// The destination's block table.
    RamBlocksResult = 5,
    /// A range of a block reads as zero from now on.
    Compress = 6,
    /// The source asks for keys to write with.
    RegisterRequest = 7,
    /// Keys.
    RegisterResult = 8,
    /// The round's writes are all posted.
    RegisterFinished = 9,
    /// The source gives keys back.
    UnregisterRequest = 10,
    /// The keys are dead.
    UnregisterFinished = 11,
    /// Not QEMU's: marks the end of a round on an additional queue pair; `repeat` counts the rounds.
    Fence = 0x100,
    /// Not QEMU's: the receiver has read the whole stream and only waits for the sender to close.
    Done = 0x101,
}

impl Kind {
    /// The kind with this number on the wire.
    pub const fn from_wire(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Error,
            2 => Self::Ready,
            3 => Self::Stream,
            4 => Self::RamBlocksRequest,
            5 => Self::RamBlocksResult,
            6 => Self::Compress,
            7 => Self::RegisterRequest,
            8 => Self::RegisterResult,
            9 => Self::RegisterFinished,
            10 => Self::UnregisterRequest,
            11 => Self::UnregisterFinished,
            0x100 => Self::Fence,
            0x101 => Self::Done,
            _ => return None,
        })
    }

    /// True if the message is sent only against a READY of the peer.
    pub const fn needs_credit(self) -> bool {
        matches!(
            self,
            Self::Stream
                | Self::RamBlocksRequest
                | Self::Compress
                | Self::RegisterRequest
                | Self::RegisterFinished
                | Self::UnregisterRequest
        )
    }

    /// The answer the receiver of this message owes, if any.
    pub const fn reply(self) -> Option<Self> {
        match self {
            Self::RamBlocksRequest => Some(Self::RamBlocksResult),
            Self::RegisterRequest => Some(Self::RegisterResult),
            Self::UnregisterRequest => Some(Self::UnregisterFinished),
            _ => None,
        }
    }
}

/// Why bytes received on a queue pair are not a control message.
///
/// All of these mean a broken or hostile peer: the connection is given up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Fewer bytes than a header.
    #[error("control message of {have} bytes is shorter than its header (16)")]
    ShortHeader {
        /// Bytes received.
        have: usize,
    },
    /// The header's length is not what arrived.
    #[error("control message type {kind} announces {announced} payload bytes, {received} arrived")]
    LengthMismatch {
        /// Type as on the wire.
        kind: u32,
        /// Length in the header.
        announced: u32,
        /// Payload bytes received.
        received: usize,
    },
    /// A type this protocol does not have.
    #[error("unknown control message type {kind}")]
    UnknownKind {
        /// Type as on the wire.
        kind: u32,
    },
    /// More (or fewer) records than any message may have.
    #[error("control message {kind:?} has repeat {repeat}, allowed are {min} to {max}")]
    Repeat {
        /// Which message.
        kind: Kind,
        /// Record count in the header.
        repeat: u32,
        /// Fewest records.
        min: u32,
        /// Most records.
        max: u32,
    },
    /// The payload is not a whole number of records, or not the announced number.
    #[error("control message {kind:?}: {len} payload bytes are not {repeat} records of {record} bytes")]
    RecordBytes {
        /// Which message.
        kind: Kind,
        /// Payload bytes.
        len: usize,
        /// Record count in the header.
        repeat: u32,
        /// Bytes of one record.
        record: usize,
    },
    /// COMPRESS with anything but zeros.
    #[error("COMPRESS fills with {value:#x}; only zero is defined")]
    CompressValue {
        /// Fill value.
        value: u32,
    },
    /// A piece of the byte stream without bytes, which a QEMU would wait on for ever.
    #[error("empty piece of the byte stream")]
    EmptyStream,
}

/// A fixed-size record in a payload.
pub trait Record: Sized {
    /// Bytes on the wire.
    const BYTES: usize;
    /// Reads the record from exactly [`BYTES`](Self::BYTES) bytes; shorter input reads as zeros.
    fn read(bytes: &[u8]) -> Self;
    /// Appends the record's bytes.
    fn write(&self, out: &mut Vec<u8>);
}

/// Asks for a key ([`Kind::RegisterRequest`]), or gives one back ([`Kind::UnregisterRequest`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegisterRecord {
    /// To register: the destination's label of the block plus the offset in the block, bytes.
    /// To unregister: the plain index of the first chunk.
    pub key: u64,
    /// Position of the block in the announced list.
    pub block: u32,
    /// Chunks after the first one that the key shall cover too.
    pub extra_chunks: u64,
}

impl Record for RegisterRecord {
    const BYTES: usize = 24;

    fn read(bytes: &[u8]) -> Self {
        Self { key: be64(bytes, 0), block: be32(bytes, 8), extra_chunks: be64(bytes, 16) }
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.key.to_be_bytes());
        out.extend_from_slice(&self.block.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.extra_chunks.to_be_bytes());
    }
}

/// A granted key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegisterResult {
    /// Remote key for RDMA WRITEs; never zero.
    pub rkey: u32,
    /// Remote address of the first byte of the *block* (not of the chunk).
    pub block_base: u64,
}

impl Record for RegisterResult {
    const BYTES: usize = 16;

    fn read(bytes: &[u8]) -> Self {
        Self { rkey: be32(bytes, 0), block_base: be64(bytes, 8) }
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.rkey.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.block_base.to_be_bytes());
    }
}

/// A range that reads as zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compress {
    /// Position of the block in the announced list.
    pub block: u32,
    /// The destination's label of the block plus the offset in the block, bytes.
    pub key: u64,
    /// Bytes to zero.
    pub length: u64,
}

impl Compress {
    const BYTES: usize = 24;

    fn write(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.block.to_be_bytes());
        out.extend_from_slice(&self.key.to_be_bytes());
        out.extend_from_slice(&self.length.to_be_bytes());
    }
}

/// The destination's view of one block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockRecord {
    /// Remote address of the block's first byte, as a label: `base + offset` is where to write.
    pub base: u64,
    /// The destination's label of the block, to be added to offsets in keys.
    pub label: u64,
    /// Bytes in the block; the source compares it with its own.
    pub length: u64,
    /// Key of the whole block with pin-all; otherwise zero.
    pub rkey: u32,
}

impl Record for BlockRecord {
    const BYTES: usize = 32;

    fn read(bytes: &[u8]) -> Self {
        Self { base: be64(bytes, 0), label: be64(bytes, 8), length: be64(bytes, 16), rkey: be32(bytes, 24) }
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.base.to_be_bytes());
        out.extend_from_slice(&self.label.to_be_bytes());
        out.extend_from_slice(&self.length.to_be_bytes());
        out.extend_from_slice(&self.rkey.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
    }
}

/// One control message as a value that cannot be wrong in itself.
///
/// Whether its indices and ranges exist is for the receiver's block table to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// See [`Kind::Error`].
    Error,
    /// See [`Kind::Ready`].
    Ready,
    /// 1 to 524272 bytes of the byte stream.
    Stream(&'a [u8]),
    /// See [`Kind::RamBlocksRequest`].
    RamBlocksRequest,
    /// One record per announced block, in announced order.
    RamBlocksResult(Vec<BlockRecord>),
    /// See [`Kind::Compress`].
    Compress(Compress),
    /// 1 to 4096 spans to register.
    RegisterRequest(Vec<RegisterRecord>),
    /// The keys; `repeat` is the request's, and a QEMU sends only the first of several results.
    RegisterResult {
        /// At least one key.
        results: Vec<RegisterResult>,
        /// Record count of the request.
        repeat: u32,
    },
    /// See [`Kind::RegisterFinished`].
    RegisterFinished,
    /// 1 to 4096 spans to give back, named by their first chunk.
    UnregisterRequest(Vec<RegisterRecord>),
    /// See [`Kind::UnregisterFinished`].
    UnregisterFinished {
        /// Record count of the request.
        repeat: u32,
    },
    /// End of a round on an additional queue pair.
    Fence {
        /// The round, counted from 1.
        round: u32,
    },
    /// See [`Kind::Done`].
    Done,
}

impl<'a> Message<'a> {
    /// The type of the message.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Error => Kind::Error,
            Self::Ready => Kind::Ready,
            Self::Stream(_) => Kind::Stream,
            Self::RamBlocksRequest => Kind::RamBlocksRequest,
            Self::RamBlocksResult(_) => Kind::RamBlocksResult,
            Self::Compress(_) => Kind::Compress,
            Self::RegisterRequest(_) => Kind::RegisterRequest,
            Self::RegisterResult { .. } => Kind::RegisterResult,
            Self::RegisterFinished => Kind::RegisterFinished,
            Self::UnregisterRequest(_) => Kind::UnregisterRequest,
            Self::UnregisterFinished { .. } => Kind::UnregisterFinished,
            Self::Fence { .. } => Kind::Fence,
            Self::Done => Kind::Done,
        }
    }

    /// Decodes one received message: header and payload, exactly as many bytes as arrived.
    ///
    /// Pure, and allocates at most what arrived.
    ///
    /// # Errors
    ///
    /// A [`WireError`] for anything a well-behaved peer does not send; nothing was consumed.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, WireError> {
        let Some((header, payload)) = bytes.split_at_checked(HEADER_BYTES) else {
            return Err(WireError::ShortHeader { have: bytes.len() });
        };
        let (len, number, repeat) = (be32(header, 0), be32(header, 4), be32(header, 8));
        if usize::try_from(len) != Ok(payload.len()) || payload.len() > MAX_PAYLOAD_BYTES {
            let received = payload.len();
            return Err(WireError::LengthMismatch { kind: number, announced: len, received });
        }
        let kind = Kind::from_wire(number).ok_or(WireError::UnknownKind { kind: number })?;
        if !matches!(kind, Kind::Stream | Kind::Fence) && repeat > MAX_REPEAT {
            return Err(WireError::Repeat { kind, repeat, min: 0, max: MAX_REPEAT });
        }
        let head = Head { kind, repeat, payload };
        Ok(match kind {
            Kind::Stream if payload.is_empty() => return Err(WireError::EmptyStream),
            Kind::Stream => Self::Stream(payload),
            Kind::Error => head.bare(Self::Error)?,
            Kind::Ready => head.bare(Self::Ready)?,
            Kind::RamBlocksRequest => head.bare(Self::RamBlocksRequest)?,
            Kind::RegisterFinished => head.bare(Self::RegisterFinished)?,
            Kind::UnregisterFinished => head.bare(Self::UnregisterFinished { repeat })?,
            Kind::Fence => head.bare(Self::Fence { round: repeat })?,
            Kind::Done => head.bare(Self::Done)?,
            Kind::RamBlocksResult => Self::RamBlocksResult(head.whole_records()?),
            Kind::RegisterResult => Self::RegisterResult { results: head.some_records()?, repeat },
            Kind::RegisterRequest => Self::RegisterRequest(head.counted_records()?),
            Kind::UnregisterRequest => Self::UnregisterRequest(head.counted_records()?),
            Kind::Compress => Self::Compress(head.compress()?),
        })
    }

    /// The same message without a borrow. A piece of the stream has no owned form: it comes back as
    /// [`Message::Stream`] of no bytes, so read it first.
    pub(crate) fn into_owned(self) -> Message<'static> {
        match self {
            Self::Error => Message::Error,
            Self::Ready => Message::Ready,
            Self::Stream(_) => Message::Stream(&[]),
            Self::RamBlocksRequest => Message::RamBlocksRequest,
            Self::RamBlocksResult(records) => Message::RamBlocksResult(records),
            Self::Compress(range) => Message::Compress(range),
            Self::RegisterRequest(records) => Message::RegisterRequest(records),
            Self::RegisterResult { results, repeat } => Message::RegisterResult { results, repeat },
            Self::RegisterFinished => Message::RegisterFinished,
            Self::UnregisterRequest(records) => Message::UnregisterRequest(records),
            Self::UnregisterFinished { repeat } => Message::UnregisterFinished { repeat },
            Self::Fence { round } => Message::Fence { round },
            Self::Done => Message::Done,
        }
    }

    /// Appends the message's bytes: header, then payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; HEADER_BYTES]);
        let repeat = match self {
            Self::Stream(bytes) => {
                out.extend_from_slice(bytes);
                0
            }
            Self::RamBlocksResult(records) => {
                records.iter().for_each(|record| record.write(out));
                1
            }
            Self::Compress(range) => {
                range.write(out);
                1
            }
            Self::RegisterRequest(records) | Self::UnregisterRequest(records) => {
                records.iter().for_each(|record| record.write(out));
                records.len() as u32
            }
            Self::RegisterResult { results, repeat } => {
                results.iter().for_each(|result| result.write(out));
                *repeat
            }
            Self::UnregisterFinished { repeat } | Self::Fence { round: repeat } => *repeat,
            Self::Error | Self::Ready | Self::RamBlocksRequest | Self::RegisterFinished | Self::Done => 1,
        };
        let header = header(self.kind(), out.len() - start - HEADER_BYTES, repeat);
        out[start..start + HEADER_BYTES].copy_from_slice(&header);
    }
}

/// The 16 bytes in front of a payload of `len` bytes; `len` must not exceed [`MAX_PAYLOAD_BYTES`].
pub fn header(kind: Kind, len: usize, repeat: u32) -> [u8; HEADER_BYTES] {
    debug_assert!(len <= MAX_PAYLOAD_BYTES, "payload of {len} bytes");
    let mut bytes = [0; HEADER_BYTES];
    bytes[0..4].copy_from_slice(&(len as u32).to_be_bytes());
    bytes[4..8].copy_from_slice(&(kind as u32).to_be_bytes());
    bytes[8..12].copy_from_slice(&repeat.to_be_bytes());
    bytes
}

struct Head<'a> {
    kind: Kind,
    repeat: u32,
    payload: &'a [u8],
}

impl<'a> Head<'a> {
    fn bad_length(&self, record: usize) -> WireError {
        WireError::RecordBytes { kind: self.kind, len: self.payload.len(), repeat: self.repeat, record }
    }

    fn bare<'m>(&self, message: Message<'m>) -> Result<Message<'m>, WireError> {
        if self.payload.is_empty() { Ok(message) } else { Err(self.bad_length(0)) }
    }

    fn records<R: Record>(&self) -> Vec<R> {
        self.payload.chunks_exact(R::BYTES).map(R::read).collect()
    }

    /// As many records as fit, no rest; perhaps none.
    fn whole_records<R: Record>(&self) -> Result<Vec<R>, WireError> {
        if self.payload.len().is_multiple_of(R::BYTES) {
            Ok(self.records())
        } else {
            Err(self.bad_length(R::BYTES))
        }
    }

    /// At least one record, no rest, and not more than `repeat`.
    fn some_records<R: Record>(&self) -> Result<Vec<R>, WireError> {
        let records = self.whole_records()?;
        let fits = !records.is_empty() && records.len() <= self.repeat as usize;
        if fits { Ok(records) } else { Err(self.bad_length(R::BYTES)) }
    }

    /// Exactly `repeat` records, at least one.
    fn counted_records<R: Record>(&self) -> Result<Vec<R>, WireError> {
        if self.repeat == 0 {
            return Err(WireError::Repeat { kind: self.kind, repeat: 0, min: 1, max: MAX_REPEAT });
        }
        if self.payload.len() != self.repeat as usize * R::BYTES {
            return Err(self.bad_length(R::BYTES));
        }
        Ok(self.records())
    }

    fn compress(&self) -> Result<Compress, WireError> {
        if self.repeat != 1 || self.payload.len() != Compress::BYTES {
            return Err(self.bad_length(Compress::BYTES));
        }
        match be32(self.payload, 0) {
            0 => Ok(Compress {
                block: be32(self.payload, 4),
                key: be64(self.payload, 8),
                length: be64(self.payload, 16),
            }),
            value => Err(WireError::CompressValue { value }),
        }
    }
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
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
        digits
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    /// Bytes recorded between real QEMUs.
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
        /// Whatever decodes encodes to the same bytes, but for padding and meaningless counts.
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
}
