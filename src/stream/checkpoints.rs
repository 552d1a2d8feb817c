//! Messages between a source of checkpoints and its standby.
//!
//! ```text
//! source                                          standby
//! HELLO    version, page size, number of blocks
//! BLOCK    length, bytes of the name; the name    READY
//! then for each checkpoint, from number 1 on:
//! OPEN     number
//! PAGES    block, first page, pages; their bytes
//! ZEROS    block, first page, pages
//! STATE    bytes; the device state
//! CLOSE    number, pages                           CONFIRM  number
//! with a lease, at any time from READY on:
//! RENEW    number, nanoseconds                    GRANT    number
//! in the end:
//! RELEASE                                         RELEASED
//!                                                 TAKEN    number: the guest starts at the standby
//!                                                 DISCARDED: no guest starts at the standby
//! ```
//!
//! Each message begins with a head of [`HEAD_LEN`] bytes, all fields big-endian: `"RWCK"`, be32 kind, be32 block, be32 0,
//! and two be64. A page that comes twice in a checkpoint counts twice, and the later one is meant.

use super::reader::Reader;
use super::writer::Writer;
use crate::ram::MAX_BLOCKS;
use crate::units::BlockIndex;

/// Bytes of each message's head.
pub const HEAD_LEN: usize = 32;
/// The version in use.
pub const VERSION: u64 = 2;
/// Longest name of a block.
pub const MAX_NAME: u64 = 255;
/// Maximum number of pages in one message of PAGES.
pub const MAX_RUN: u64 = 1 << 12;

const MAGIC: u32 = 0x5257_434b;

/// A message of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckpointMessage {
    /// The first one.
    Hello {
        /// Bytes of a page.
        page: u32,
        /// Messages of blocks that follow.
        blocks: u64,
    },
    /// A RAM block; its name follows.
    Block {
        /// Bytes of memory.
        len: u64,
        /// Bytes of the name.
        name: u64,
    },
    /// A checkpoint begins.
    Open(u64),
    /// Pages, whose bytes follow.
    Pages {
        /// The block, by its position in the list.
        block: BlockIndex,
        /// The first page.
        first: u64,
        /// Pages.
        pages: u64,
    },
    /// Pages of zeros.
    Zeros {
        /// The block, by its position in the list.
        block: BlockIndex,
        /// The first page.
        first: u64,
        /// Pages.
        pages: u64,
    },
    /// The device state, whose bytes follow.
    State(u64),
    /// All of a checkpoint has been sent.
    Close {
        /// Its number.
        number: u64,
        /// Pages in all of its PAGES and ZEROS.
        pages: u64,
    },
    /// The protection ends.
    Release,
    /// The source asks for a lease.
    Renew {
        /// Its number.
        number: u64,
        /// How long the source runs its guest with it, from when it asked: nanoseconds.
        nanos: u64,
    },
}

/// A message of the standby.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandbyMessage {
    /// There is memory for the guest.
    Ready,
    /// All of this checkpoint is here.
    Confirm(u64),
    /// The guest starts here.
    Taken(u64),
    /// The end of the protection is known.
    Released,
    /// The source has this lease.
    Grant(u64),
    /// No guest starts here.
    Discarded,
}

/// Messages that make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointWordsError {
    /// The other end is none of ours.
    #[error("it speaks no checkpoints (it sends {0:#010x})")]
    Magic(u32),
    /// A version that is not supported here.
    #[error("it speaks version {0} of checkpoints, and this ramwire {VERSION}")]
    Version(u64),
    /// A kind of message.
    #[error("it sends a message of kind {0}, which is not known")]
    Kind(u32),
    /// A field.
    #[error("its {field} is {value:#x}, and {limit:#x} is the most that makes sense")]
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The greatest valid value.
        limit: u64,
    },
}

fn head(kind: u32, block: u32, first: u64, second: u64) -> [u8; HEAD_LEN] {
    let mut out = Vec::with_capacity(HEAD_LEN);
    Writer::new(&mut out).be32(MAGIC).be32(kind).be32(block).be32(0).be64(first).be64(second);
    let mut head = [0; HEAD_LEN];
    head.copy_from_slice(&out);
    head
}

/// Kind, block and the two numbers.
fn fields(head: &[u8; HEAD_LEN]) -> Result<(u32, u32, u64, u64), CheckpointWordsError> {
    // The length is known: after its end there are none.
    let mut reader = Reader::new(head);
    let mut be32 = || reader.be32().unwrap_or(u32::MAX);
    let (magic, kind, block, _) = (be32(), be32(), be32(), be32());
    let mut be64 = || reader.be64().unwrap_or(u64::MAX);
    match magic {
        MAGIC => Ok((kind, block, be64(), be64())),
        other => Err(CheckpointWordsError::Magic(other)),
    }
}

fn at_most(field: &'static str, value: u64, limit: u64) -> Result<u64, CheckpointWordsError> {
    if value <= limit { Ok(value) } else { Err(CheckpointWordsError::Field { field, value, limit }) }
}

impl CheckpointMessage {
    /// The head; what follows a message follows it.
    pub fn encode(self) -> [u8; HEAD_LEN] {
        match self {
            Self::Hello { page, blocks } => head(1, page, VERSION, blocks),
            Self::Block { len, name } => head(2, 0, len, name),
            Self::Open(number) => head(3, 0, number, 0),
            Self::Pages { block, first, pages } => head(4, block.0, first, pages),
            Self::Zeros { block, first, pages } => head(5, block.0, first, pages),
            Self::State(len) => head(6, 0, len, 0),
            Self::Close { number, pages } => head(7, 0, number, pages),
            Self::Release => head(8, 0, 0, 0),
            Self::Renew { number, nanos } => head(9, 0, number, nanos),
        }
    }

    /// # Errors
    /// [`CheckpointWordsError`].
    pub fn decode(bytes: &[u8; HEAD_LEN]) -> Result<Self, CheckpointWordsError> {
        let (kind, block, first, second) = fields(bytes)?;
        Ok(match kind {
            1 if first != VERSION => return Err(CheckpointWordsError::Version(first)),
            1 => Self::Hello { page: block, blocks: at_most("number of blocks", second, MAX_BLOCKS as u64)? },
            2 => Self::Block { len: first, name: at_most("name's length", second, MAX_NAME)? },
            3 => Self::Open(first),
            4 => {
                let pages = at_most("number of pages in one message", second, MAX_RUN)?;
                Self::Pages { block: BlockIndex(block), first, pages }
            }
            5 => Self::Zeros { block: BlockIndex(block), first, pages: second },
            6 => Self::State(first),
            7 => Self::Close { number: first, pages: second },
            8 => Self::Release,
            9 => Self::Renew { number: first, nanos: second },
            other => return Err(CheckpointWordsError::Kind(other)),
        })
    }
}

impl StandbyMessage {
    /// All of the message.
    pub fn encode(self) -> [u8; HEAD_LEN] {
        match self {
            Self::Ready => head(101, 0, VERSION, 0),
            Self::Confirm(number) => head(102, 0, number, 0),
            Self::Taken(number) => head(103, 0, number, 0),
            Self::Released => head(104, 0, 0, 0),
            Self::Grant(number) => head(105, 0, number, 0),
            Self::Discarded => head(106, 0, 0, 0),
        }
    }

    /// # Errors
    /// [`CheckpointWordsError`].
    pub fn decode(bytes: &[u8; HEAD_LEN]) -> Result<Self, CheckpointWordsError> {
        let (kind, _, first, _) = fields(bytes)?;
        Ok(match kind {
            101 if first != VERSION => return Err(CheckpointWordsError::Version(first)),
            101 => Self::Ready,
            102 => Self::Confirm(first),
            103 => Self::Taken(first),
            104 => Self::Released,
            105 => Self::Grant(first),
            106 => Self::Discarded,
            other => return Err(CheckpointWordsError::Kind(other)),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn messages_come_back_and_no_byte_means_something_else() {
        let block = BlockIndex(3);
        let ours = [
            CheckpointMessage::Hello { page: 4096, blocks: 2 },
            CheckpointMessage::Block { len: 1 << 40, name: 6 },
            CheckpointMessage::Open(1),
            CheckpointMessage::Pages { block, first: 7, pages: MAX_RUN },
            CheckpointMessage::Zeros { block, first: 7, pages: 1 << 30 },
            CheckpointMessage::State(12),
            CheckpointMessage::Close { number: 1, pages: 9 },
            CheckpointMessage::Release,
            CheckpointMessage::Renew { number: 4, nanos: 1 << 40 },
        ];
        for message in ours {
            let bytes = message.encode();
            assert_eq!(CheckpointMessage::decode(&bytes), Ok(message));
            assert!(StandbyMessage::decode(&bytes).is_err(), "{message:?}");
            for at in 0..4 {
                let mut other = bytes;
                other[at] ^= 1;
                assert!(matches!(CheckpointMessage::decode(&other), Err(CheckpointWordsError::Magic(_))));
            }
        }
        let theirs = [
            StandbyMessage::Ready,
            StandbyMessage::Confirm(9),
            StandbyMessage::Taken(8),
            StandbyMessage::Released,
            StandbyMessage::Grant(4),
            StandbyMessage::Discarded,
        ];
        for message in theirs {
            assert_eq!(StandbyMessage::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn fields_beyond_their_limits_are_refused() {
        let refused = |bytes: [u8; HEAD_LEN]| CheckpointMessage::decode(&bytes).unwrap_err();
        let block = BlockIndex(0);
        let long = CheckpointMessage::Pages { block, first: 0, pages: MAX_RUN + 1 };
        assert!(matches!(refused(long.encode()), CheckpointWordsError::Field { .. }));
        let name = CheckpointMessage::Block { len: 1, name: MAX_NAME + 1 };
        assert!(matches!(refused(name.encode()), CheckpointWordsError::Field { .. }));
        let many = CheckpointMessage::Hello { page: 4096, blocks: MAX_BLOCKS as u64 + 1 };
        assert!(matches!(refused(many.encode()), CheckpointWordsError::Field { .. }));
        assert_eq!(refused(head(1, 4096, VERSION + 1, 1)), CheckpointWordsError::Version(VERSION + 1));
        assert_eq!(refused(head(0, 0, 0, 0)), CheckpointWordsError::Kind(0));
    }
}
