//! Control messages: the SENDs on a queue pair, as bytes and as values.
//!
//! Every SEND is one message: a 16-byte header, then its payload. All integers are big endian; padding is sent as zero
//! and ignored on receive. This module reads and writes bytes and keeps no state; [`exchange`](crate::exchange) decides
//! which end may send.
//!
//! # Source
//!
//! QEMU's `rdma:` migration protocol, sections "control header" and "payload structs"; checked against messages
//! recorded between QEMU 7.2 and 10.0.

mod check;
mod record;

use check::Head;
pub use check::WireError;
use record::be32;
pub use record::{BlockRecord, Compress, Record, RegisterRecord, RegisterResult};

/// Bytes in front of every payload: length, type, repeat, padding.
pub const HEADER_BYTES: usize = 16;
/// Bytes of one control buffer: header and payload together. A QEMU's receive buffers have this size, and so have ours
/// if the peer is a QEMU.
pub const CONTROL_BUFFER_BYTES: usize = 512 * 1024;
/// Longest payload a peer takes.
pub const MAX_PAYLOAD_BYTES: usize = CONTROL_BUFFER_BYTES - HEADER_BYTES;
/// Longest piece of the byte stream put into one message. QEMU never sends more, but accepts more.
pub const STREAM_PAYLOAD_BYTES: usize = 32 * 1024;
/// Most records in one message.
pub const MAX_REPEAT: u32 = 4096;
/// Most keys a source of this crate asks for in one message.
pub const MAX_KEY_BATCH: usize = 2048;
/// Longest message that a source of this crate sends to a destination of this crate: a full batch of requests for keys.
pub const NATIVE_MESSAGE_BYTES: usize = HEADER_BYTES + MAX_KEY_BATCH * RegisterRecord::BYTES;
/// A full piece of the stream.
pub const STREAM_MESSAGE_BYTES: usize = HEADER_BYTES + STREAM_PAYLOAD_BYTES;
/// A buffer for READY, ERROR, Fence and Done, which have no payload.
pub const WORD_BYTES: usize = 64;

/// Bytes of the longest answer of a destination: its table of `blocks` blocks, or a full batch of keys.
pub const fn answer_bytes(blocks: usize) -> usize {
    let (table, keys) = (blocks.saturating_mul(BlockRecord::BYTES), MAX_KEY_BATCH * RegisterResult::BYTES);
    let longest = if table > keys { table } else { keys };
    HEADER_BYTES + if longest < MAX_PAYLOAD_BYTES { longest } else { MAX_PAYLOAD_BYTES }
}

const _: () = assert!(RegisterRecord::BYTES == 24 && RegisterResult::BYTES == 16);
const _: () = assert!(Compress::BYTES == 24 && BlockRecord::BYTES == 32);

/// Type of a control message; the number is the one on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Kind {
    /// The sender gives up; the message has no text and no error code.
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
    /// Not QEMU's: the receiver has read the whole stream and waits only for the sender to close.
    Done = 0x101,
    /// Not QEMU's: ranges of blocks read as zero from now on.
    ZeroRuns = 0x102,
    /// Not QEMU's: keepalive of the source, in a round in which it has no other message to send. Its RDMA WRITEs are
    /// not visible to the destination's software.
    Alive = 0x103,
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
            0x102 => Self::ZeroRuns,
            0x103 => Self::Alive,
            _ => return None,
        })
    }

    /// True if the message may be sent only against a READY of the peer.
    pub const fn needs_credit(self) -> bool {
        matches!(
            self,
            Self::Stream
                | Self::RamBlocksRequest
                | Self::Compress
                | Self::ZeroRuns
                | Self::Alive
                | Self::RegisterRequest
                | Self::RegisterFinished
                | Self::UnregisterRequest
        )
    }

    /// The answer that the receiver of this message must send, if any.
    pub const fn reply(self) -> Option<Self> {
        match self {
            Self::RamBlocksRequest => Some(Self::RamBlocksResult),
            Self::RegisterRequest => Some(Self::RegisterResult),
            Self::UnregisterRequest => Some(Self::UnregisterFinished),
            _ => None,
        }
    }
}

/// One control message as a value that is valid in itself.
///
/// The receiver's block table checks whether its indices and ranges exist.
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
    /// 1 to 4096 ranges that read as zero, each as in a COMPRESS.
    ZeroRuns(Vec<Compress>),
    /// See [`Kind::Alive`].
    Alive,
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
            Self::ZeroRuns(_) => Kind::ZeroRuns,
            Self::Alive => Kind::Alive,
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
            Kind::Alive => head.bare(Self::Alive)?,
            Kind::RamBlocksResult => Self::RamBlocksResult(head.whole_records()?),
            Kind::RegisterResult => Self::RegisterResult { results: head.some_records()?, repeat },
            Kind::RegisterRequest => Self::RegisterRequest(head.counted_records()?),
            Kind::UnregisterRequest => Self::UnregisterRequest(head.counted_records()?),
            Kind::Compress => Self::Compress(head.compress()?),
            Kind::ZeroRuns => Self::ZeroRuns(head.zero_ranges()?),
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
            Self::Alive => Message::Alive,
            Self::ZeroRuns(ranges) => Message::ZeroRuns(ranges),
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
            Self::ZeroRuns(ranges) => {
                ranges.iter().for_each(|range| range.write(out));
                ranges.len() as u32
            }
            Self::RegisterResult { results, repeat } => {
                results.iter().for_each(|result| result.write(out));
                *repeat
            }
            Self::UnregisterFinished { repeat } | Self::Fence { round: repeat } => *repeat,
            Self::Error
            | Self::Ready
            | Self::RamBlocksRequest
            | Self::RegisterFinished
            | Self::Done
            | Self::Alive => 1,
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

#[cfg(test)]
mod tests;
