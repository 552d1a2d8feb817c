//! Messages between two ramwire ends, sent only after they have recognized each other.
//!
//! They are sent in QEMU's own frames: commands from the source, messages on the return path, both with numbers from
//! 0x5200 that no QEMU uses. The greeting: the source sends PING([`GREETING`]) and PING(1); a QEMU answers one PONG to
//! each, a ramwire puts [`hello_pong`] between the two. A source that sees it sends HELLO.
//!
//! ```text
//! source                                     destination
//! OPEN_RETURN_PATH
//! PING(GREETING) PING(channels) PING(1)      PONG(GREETING) PONG(hello) PONG(channels) PONG(1)
//! HELLO                                      HELLO
//! VMM_CONFIGURATION*
//! MEMORY* (each with a descriptor, where both ends agreed in HELLO that memory is passed)
//! ... QEMU's stream up to the device state, which is one sized section ...
//! UNSENT* (in front of that section)
//! SENT STATE_SENT DIGEST*                    WORKING* (READY | REFUSED)
//! COMMIT                                     RUNNING
//! MEMORY_CHECK
//! ```
//!
//! A source whose memory was passed ahead of the stream says so in HELLO, and goes on only if the answer says that the
//! destination has it.
//!
//! With fingerprints in HELLO, FINGERPRINTS* follow each round, and the last ones the device state; MEMORY_CHECK follows
//! RUNNING.
//!
//! With secrets in both HELLOs a lost connection may be followed by another. FENCE follows the setup and each round, and
//! FENCED says that all before it is in place. Another connection begins with RESUME, without a header and a greeting:
//!
//! ```text
//! RESUME                                     HOLDS
//! RECV_BITMAP(block)*                        RECV_BITMAP(block), bitmap: pages that came since that fence
//! rounds, from their beginning
//! ```
//!
//! Behind COMMIT only HOLDS and RUNNING follow: RESUME is a COMMIT where that has not come. A source that keeps its guest
//! says so by RESUME as well, and nothing follows.
//!
//! Where the destination reads missing pages itself (RDMA READ, agreed by the connection), READ_KEYS follow the package
//! of a switch to postcopy, and the destination reports each key whose pages it has by READ_WHOLE. No page is sent.
//!
//! PING([`channels_ping`]) reports how many page channels the source has. A destination with another number answers
//! REFUSED, also before HELLO: the greeting has shown it that the source is a ramwire.

mod answer;
mod finding;
mod hello;
mod read_key;
mod resume;

use super::page_counts;
use super::qemu::section::{Framing, Item, SectionName, decode_item, encode_footer, encode_full};
use super::reader::Reader;
use super::writer::Writer;
use crate::ram::BlockName;
pub use answer::{Answer, decode_answer};
pub use finding::Finding;
pub use hello::Hello;
pub use read_key::ReadKey;
pub use resume::{Purpose, Resume};

/// Value of the PING that asks "are you a ramwire?": `RWM1`.
pub const GREETING: u32 = 0x5257_4d31;
/// Oldest supported version of these messages. Version 1 did not compare the sent pages with the placed ones.
pub const MIN_VERSION: u16 = 2;
/// Oldest version with VMM_CONFIGURATION.
pub const VMM_CONFIGURATION_VERSION: u16 = 3;
/// Oldest version with FINGERPRINTS and MEMORY_CHECK.
pub const FINGERPRINTS_VERSION: u16 = 4;
/// Oldest version with FENCE and RESUME.
pub const RESUME_VERSION: u16 = 5;
/// Newest supported version of these messages.
pub const MAX_VERSION: u16 = 5;
/// First number of a native command or message.
pub const FIRST_NUMBER: u16 = 0x5200;
/// Maximum number of digests in one DIGEST command; its length is counted in 16 bits.
pub const MAX_DIGESTS: usize = 4096;
/// Maximum number of bytes in one VMM_CONFIGURATION command.
pub const MAX_CONFIGURATION_PART: usize = 32 << 10;
/// Longest text of a refusal in bytes; a message body has at most 512.
pub const MAX_REASON: usize = 400;
/// Maximum number of ranges in one UNSENT command.
pub const MAX_RANGES: usize = 2048;
/// Maximum number of counts in one SENT command: the stream's and those of 255 page channels.
pub const MAX_COUNTS: usize = 256;
/// Maximum number of fingerprints of one run in one FINGERPRINTS command.
pub const MAX_FINGERPRINTS: usize = 4000;
/// Maximum number of keys in one READ_KEYS command.
pub const MAX_READ_KEYS: usize = 256;
/// Name of the section that holds the device state between ramwire ends: `be64 length`, then the bytes.
pub const STATE_SECTION: &str = "ramwire/state";

/// Head of the section that holds `len` bytes of device state.
pub fn encode_state_head(id: u32, len: usize, out: &mut Vec<u8>) {
    encode_full(&SectionName { id, idstr: STATE_SECTION, instance: 0, version: 1 }, out);
    Writer::new(out).be64(len as u64);
}

/// The device state in the package of a switchover to postcopy: a whole section, with its footer on every machine.
pub fn encode_state_section(id: u32, state: &[u8], out: &mut Vec<u8>) {
    encode_state_head(id, state.len(), out);
    out.extend_from_slice(state);
    encode_footer(id, out);
}

/// The device state in such a section; `None` if it is another or has another length.
pub fn decode_state_section(input: &[u8]) -> Option<&[u8]> {
    let (Item::Full(name), used) = decode_item(input).ok()? else { return None };
    let mut reader = Reader::new(input.get(used..)?);
    let len = usize::try_from(reader.be64().ok()?).ok()?;
    let state = reader.bytes(len).ok()?;
    let footer = Framing::default().decode_footer(reader.rest(), name.id).ok()?;
    (name.idstr == STATE_SECTION && reader.rest().len() == footer.1).then_some(state)
}

/// The second PONG of a ramwire, which carries its newest version.
pub const fn hello_pong(version: u16) -> u32 {
    0x5258_0000 | version as u32
}

/// The version in a [`hello_pong`]; `None` for any other value.
pub const fn version_of_pong(value: u32) -> Option<u16> {
    if value >> 16 == 0x5258 { Some(value as u16) } else { None }
}

/// The PING that reports how many page channels a source has: `RWC`, then their number.
pub const fn channels_ping(channels: u8) -> u32 {
    0x5257_4300 | channels as u32
}

/// The number in a [`channels_ping`]; `None` for any other value.
pub const fn channels_of_ping(value: u32) -> Option<u8> {
    if value >> 8 == 0x52_5743 { Some(value as u8) } else { None }
}

/// Why pages were not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsent {
    /// The guest does not need their bytes: they may be anything.
    Free,
    /// They are unplugged: they must have no memory.
    Unplugged,
}

/// Pages of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Number of the first.
    pub first: u64,
    /// How many.
    pub pages: u64,
}

impl Range {
    /// Bytes of a range on the wire.
    pub const LEN: usize = 16;

    /// Two numbers of 64 bits, big endian.
    pub fn encode(self) -> [u8; Self::LEN] {
        (u128::from(self.first) << 64 | u128::from(self.pages)).to_be_bytes()
    }

    /// The ranges in `bytes`; an incomplete last one is ignored.
    pub fn decode_all(bytes: &[u8]) -> impl Iterator<Item = Self> {
        let numbers =
            bytes.chunks_exact(Self::LEN).filter_map(|b| b.try_into().ok().map(u128::from_be_bytes));
        numbers.map(|both| Self { first: (both >> 64) as u64, pages: both as u64 })
    }
}

/// Stands for device state and configuration where a block is named.
pub const STATE_BLOCK: u32 = u32::MAX;

/// A command of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order<'a> {
    /// The sender's HELLO.
    Hello(Hello),
    /// The next part of the data that the source's VMM sends to the destination's. Before the list of blocks.
    VmmConfiguration {
        /// At least one byte, at most [`MAX_CONFIGURATION_PART`].
        part: &'a [u8],
    },
    /// RAM and device state are complete.
    StateSent,
    /// Digests of 64 bits, big endian, from number `first` on.
    Digest {
        /// Number of the first one.
        first: u32,
        /// 8 bytes each, at most [`MAX_DIGESTS`].
        values: &'a [u8],
    },
    /// Pages whose last state was not sent; their bytes here do not matter. After the last page.
    Unsent {
        /// Position of their block in the stream's list.
        block: u32,
        /// Why.
        why: Unsent,
        /// [`Range`]s, at least one and at most [`MAX_RANGES`].
        ranges: &'a [u8],
    },
    /// Pages sent since the beginning, each time that a page was sent: in the stream, then on each page channel in
    /// the order of their ids. After the last page.
    Sent {
        /// Counts as [`super::page_counts`] writes them, at least one and at most [`MAX_COUNTS`].
        counts: &'a [u8],
    },
    /// The memory of a block: none of its pages is sent. The descriptor of its file arrives with the first byte of the
    /// command. Only if both ends have agreed that memory is passed, before the list of blocks.
    Memory {
        /// Offset of the memory in the file, in bytes.
        start: u64,
        /// Bytes of memory, at least those that the block has in use.
        len: u64,
        /// The block.
        block: &'a str,
    },
    /// Fingerprints of pages as they were sent last, 64 bits each, big endian.
    Fingerprints {
        /// Position of their block in the stream's list; [`STATE_BLOCK`]: the one of device state and configuration.
        block: u32,
        /// Number of the first page.
        first: u64,
        /// 8 bytes each, at least one and at most [`MAX_FINGERPRINTS`].
        values: &'a [u8],
    },
    /// The result of the source's check of its memory, which no longer changes since it handed over the guest.
    MemoryCheck(Finding),
    /// Everything in front of this is to be in place when it is answered by FENCED. Only if both HELLOs had secrets.
    Fence {
        /// Counts from 1, over all connections.
        number: u64,
    },
    /// Keys for memory whose missing pages the destination reads itself. After the package, on a connection that agreed to
    /// that.
    ReadKeys {
        /// [`ReadKey`]s, at least one and at most [`MAX_READ_KEYS`].
        keys: &'a [u8],
    },
    /// The first command on another connection of a migration whose connection was lost.
    Resume(Resume),
    /// The guest is yours. The source never resumes it again by itself.
    Commit {
        /// The migration it is about.
        migration_id: [u8; 16],
    },
}

impl Order<'_> {
    /// The command number on the wire.
    pub fn number(&self) -> u16 {
        FIRST_NUMBER
            + match self {
                Self::Hello(_) => 1,
                Self::StateSent => 2,
                Self::Digest { .. } => 3,
                Self::Commit { .. } => 4,
                Self::Unsent { .. } => 5,
                Self::Sent { .. } => 6,
                Self::VmmConfiguration { .. } => 7,
                Self::Memory { .. } => 8,
                Self::Fingerprints { .. } => 9,
                Self::MemoryCheck(_) => 10,
                Self::Fence { .. } => 11,
                Self::Resume(_) => 12,
                Self::ReadKeys { .. } => 13,
            }
    }

    /// Appends the body.
    pub fn encode_body(&self, out: &mut Vec<u8>) {
        let mut writer = Writer::new(out);
        match self {
            Self::Hello(hello) => hello.encode(&mut writer),
            Self::StateSent => {}
            Self::Digest { first, values } => {
                writer.be32(*first).bytes(values);
            }
            Self::Unsent { block, why, ranges } => {
                writer.be32(*block).u8(u8::from(*why == Unsent::Unplugged)).bytes(ranges);
            }
            Self::Sent { counts } => {
                writer.bytes(counts);
            }
            Self::VmmConfiguration { part } => {
                writer.bytes(part);
            }
            Self::Memory { start, len, block } => {
                writer.be64(*start).be64(*len).bytes(block.as_bytes());
            }
            Self::Fingerprints { block, first, values } => {
                writer.be32(*block).be64(*first).bytes(values);
            }
            Self::MemoryCheck(finding) => finding.encode(&mut writer),
            Self::Fence { number } => {
                writer.be64(*number);
            }
            Self::Resume(resume) => resume.encode(&mut writer),
            Self::ReadKeys { keys } => {
                writer.bytes(keys);
            }
            Self::Commit { migration_id } => {
                writer.bytes(migration_id);
            }
        }
    }
}

/// Decodes the body of command `number`; `None` if there is no such command or the body is malformed.
///
/// HELLO may be longer than this version knows: a newer peer appends.
pub fn decode_order(number: u16, body: &[u8]) -> Option<Order<'_>> {
    let mut reader = Reader::new(body);
    let order = match number.checked_sub(FIRST_NUMBER)? {
        1 => return Hello::decode(&mut reader).ok().map(Order::Hello),
        2 => Order::StateSent,
        3 => {
            let first = reader.be32().ok()?;
            let values = reader.rest();
            let fits =
                !values.is_empty() && values.len().is_multiple_of(8) && values.len() / 8 <= MAX_DIGESTS;
            return fits.then_some(Order::Digest { first, values });
        }
        4 => Order::Commit { migration_id: reader.array().ok()? },
        5 => {
            let block = reader.be32().ok()?;
            let why = match reader.u8().ok()? {
                0 => Unsent::Free,
                1 => Unsent::Unplugged,
                _ => return None,
            };
            let ranges = reader.rest();
            let whole = !ranges.is_empty() && ranges.len().is_multiple_of(Range::LEN);
            return (whole && ranges.len() / Range::LEN <= MAX_RANGES).then_some(Order::Unsent {
                block,
                why,
                ranges,
            });
        }
        6 => {
            let counts = reader.rest();
            let whole = !counts.is_empty() && counts.len().is_multiple_of(page_counts::LEN);
            return (whole && counts.len() / page_counts::LEN <= MAX_COUNTS)
                .then_some(Order::Sent { counts });
        }
        7 => {
            let part = reader.rest();
            return (1..=MAX_CONFIGURATION_PART)
                .contains(&part.len())
                .then_some(Order::VmmConfiguration { part });
        }
        8 => {
            let (start, len) = (reader.be64().ok()?, reader.be64().ok()?);
            let block = std::str::from_utf8(reader.rest()).ok()?;
            let fits = len > 0 && (1..=BlockName::MAX).contains(&block.len());
            return fits.then_some(Order::Memory { start, len, block });
        }
        9 => {
            let (block, first) = (reader.be32().ok()?, reader.be64().ok()?);
            let values = reader.rest();
            let whole = !values.is_empty() && values.len().is_multiple_of(8);
            return (whole && values.len() / 8 <= MAX_FINGERPRINTS).then_some(Order::Fingerprints {
                block,
                first,
                values,
            });
        }
        10 => Order::MemoryCheck(Finding::decode(&mut reader).ok()??),
        11 => Order::Fence { number: reader.be64().ok()? },
        12 => Order::Resume(Resume::decode(&mut reader).ok()??),
        13 => {
            let keys = reader.rest();
            let whole = !keys.is_empty() && keys.len().is_multiple_of(ReadKey::LEN);
            return (whole && keys.len() / ReadKey::LEN <= MAX_READ_KEYS).then_some(Order::ReadKeys { keys });
        }
        _ => return None,
    };
    reader.rest().is_empty().then_some(order)
}

#[cfg(test)]
mod tests;
