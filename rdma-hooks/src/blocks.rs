//! RAM block tables: they map a block index on the wire to memory.
//!
//! The source numbers its blocks in the order in which it announces them in the byte stream; that number is the block
//! index of every later message. The destination receives the names in that order, then answers with one record per
//! announced block. The source uses base and label in such a record only for arithmetic: this destination sends label 0
//! and base 0, so no host address leaves the process.

use std::collections::HashMap;
use std::ops::Range;

use crate::control::{BlockRecord, MAX_PAYLOAD_BYTES, Record};
use crate::region::{HostRegion, OutOfRegion};

/// Maximum number of blocks whose records fit into one message.
pub const MAX_BLOCKS: usize = MAX_PAYLOAD_BYTES / BlockRecord::BYTES;

/// Why a block, an index or a range is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// A name this end has no memory for.
    #[error("block {name:?} is not known here; both machines need the same devices and memory")]
    UnknownName {
        /// As announced.
        name: String,
    },
    /// The same name twice.
    #[error("block {name:?} is named twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// More bytes announced than there is memory for.
    #[error("block {name:?} is announced with {announced} bytes, there are {have} here")]
    TooLong {
        /// The name.
        name: String,
        /// Bytes announced.
        announced: u64,
        /// Bytes here.
        have: u64,
    },
    /// More blocks than one block table message holds.
    #[error("more than {MAX_BLOCKS} RAM blocks")]
    TooMany,
    /// The table was exchanged already.
    #[error("block {name:?} comes after the block tables were exchanged")]
    TooLate {
        /// The name.
        name: String,
    },
    /// A block index that was not announced.
    #[error("block index {index} is refused: {count} blocks are announced")]
    NoSuchIndex {
        /// As received.
        index: u32,
        /// Announced blocks.
        count: usize,
    },
    /// A range that is not inside its block.
    #[error("range {offset:#x}+{len:#x} is outside of block {block:?} ({length:#x} bytes)")]
    OutOfBlock {
        /// The block's name.
        block: String,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes in the block.
        length: u64,
    },
    /// The peer answered with a different number of blocks.
    #[error("peer has {theirs} RAM blocks, this end announced {ours}")]
    CountMismatch {
        /// Records received.
        theirs: usize,
        /// Blocks announced.
        ours: usize,
    },
    /// The peer's block is shorter than ours.
    #[error(
        "block {name:?} has {ours} bytes here and {theirs} at the peer; \
         a resizable block must have its final size before the migration starts"
    )]
    LengthMismatch {
        /// The block's name.
        name: String,
        /// Bytes here.
        ours: u64,
        /// Bytes there.
        theirs: u64,
    },
    /// Base plus length of a record does not fit into an address.
    #[error(
        "peer's record for block {name:?} wraps around: base {base:#x}, label {label:#x}, {length:#x} bytes"
    )]
    Wraps {
        /// The block's name.
        name: String,
        /// As received.
        base: u64,
        /// As received.
        label: u64,
        /// Bytes here.
        length: u64,
    },
}

/// A named piece of guest RAM.
#[derive(Clone, Debug)]
pub struct RamBlock {
    /// The name both machines use.
    pub name: String,
    /// Its memory.
    pub region: HostRegion,
}

impl RamBlock {
    /// A block of all of `region`.
    pub fn new(name: impl Into<String>, region: HostRegion) -> Self {
        Self { name: name.into(), region }
    }

    /// The bytes `offset..offset + len`.
    ///
    /// # Errors
    ///
    /// [`BlockError::OutOfBlock`].
    pub fn range(&self, offset: u64, len: u64) -> Result<Range<u64>, BlockError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.region.len() => Ok(offset..end),
            _ => Err(BlockError::OutOfBlock {
                block: self.name.clone(),
                offset,
                len,
                length: self.region.len(),
            }),
        }
    }

    pub(crate) fn part(&self, range: Range<u64>) -> Result<HostRegion, BlockError> {
        self.region.part(range.start, range.end - range.start).map_err(
            |OutOfRegion { offset, len, region }| BlockError::OutOfBlock {
                block: self.name.clone(),
                offset,
                len,
                length: region,
            },
        )
    }
}

/// Checks names and number of a source's blocks.
///
/// # Errors
///
/// [`BlockError::Duplicate`] and [`BlockError::TooMany`].
pub fn check_announceable(blocks: &[RamBlock]) -> Result<(), BlockError> {
    if blocks.len() > MAX_BLOCKS {
        return Err(BlockError::TooMany);
    }
    let mut seen = HashMap::new();
    match blocks.iter().find(|block| seen.insert(block.name.as_str(), ()).is_some()) {
        Some(twice) => Err(BlockError::Duplicate { name: twice.name.clone() }),
        None => Ok(()),
    }
}

/// Compares the destination's records with the source's blocks. A longer block at the peer is fine.
///
/// # Errors
///
/// [`BlockError::CountMismatch`], [`BlockError::LengthMismatch`], [`BlockError::Wraps`].
pub fn check_records(ours: &[RamBlock], records: &[BlockRecord]) -> Result<(), BlockError> {
    if ours.len() != records.len() {
        return Err(BlockError::CountMismatch { theirs: records.len(), ours: ours.len() });
    }
    for (block, record) in ours.iter().zip(records) {
        let (name, length) = (&block.name, block.region.len());
        if record.length < length {
            return Err(BlockError::LengthMismatch {
                name: name.clone(),
                ours: length,
                theirs: record.length,
            });
        }
        if record.base.checked_add(length).is_none() || record.label.checked_add(length).is_none() {
            let (base, label) = (record.base, record.label);
            return Err(BlockError::Wraps { name: name.clone(), base, label, length });
        }
    }
    Ok(())
}

/// The destination's blocks: memory is looked up by name at first, later by announced index.
#[derive(Debug, Default)]
pub struct DestinationBlocks {
    known: HashMap<String, HostRegion>,
    announced: Vec<RamBlock>,
    closed: bool,
}

impl DestinationBlocks {
    /// Offers memory under a name.
    ///
    /// # Errors
    ///
    /// [`BlockError::Duplicate`].
    pub fn add(&mut self, block: RamBlock) -> Result<(), BlockError> {
        let RamBlock { name, region } = block;
        if self.known.contains_key(&name) || self.announced.iter().any(|known| known.name == name) {
            return Err(BlockError::Duplicate { name });
        }
        self.known.insert(name, region);
        Ok(())
    }

    /// The source named its next block, `used_length` bytes of it; returns its index.
    ///
    /// # Errors
    ///
    /// [`BlockError::UnknownName`], [`BlockError::Duplicate`], [`BlockError::TooLong`], [`BlockError::TooMany`],
    /// [`BlockError::TooLate`] after [`records`](Self::records).
    pub fn announce(&mut self, name: &str, used_length: u64) -> Result<u32, BlockError> {
        let named = || name.to_owned();
        if self.closed {
            return Err(BlockError::TooLate { name: named() });
        }
        if self.announced.len() >= MAX_BLOCKS {
            return Err(BlockError::TooMany);
        }
        let Some(region) = self.known.remove(name) else {
            let twice = self.announced.iter().any(|block| block.name == name);
            return Err(match twice {
                true => BlockError::Duplicate { name: named() },
                false => BlockError::UnknownName { name: named() },
            });
        };
        let have = region.len();
        let region = region.part(0, used_length).map_err(|_| BlockError::TooLong {
            name: named(),
            announced: used_length,
            have,
        })?;
        self.announced.push(RamBlock { name: named(), region });
        Ok((self.announced.len() - 1) as u32)
    }

    /// One record per announced block, in announced order; `key` gives each block's key and base, zeros for none yet.
    /// No block can be announced afterwards.
    pub fn records(&mut self, key: impl Fn(usize) -> (u32, u64)) -> Vec<BlockRecord> {
        self.closed = true;
        let record = |(index, block): (usize, &RamBlock)| {
            let (rkey, base) = key(index);
            BlockRecord { base, label: 0, length: block.region.len(), rkey }
        };
        self.announced.iter().enumerate().map(record).collect()
    }

    /// Announced blocks, in order.
    pub fn announced(&self) -> &[RamBlock] {
        &self.announced
    }

    /// The block with this index.
    ///
    /// # Errors
    ///
    /// [`BlockError::NoSuchIndex`].
    pub fn get(&self, index: u32) -> Result<&RamBlock, BlockError> {
        let count = self.announced.len();
        self.announced.get(index as usize).ok_or(BlockError::NoSuchIndex { index, count })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use super::*;
    use crate::sim::SparseMemory;

    fn block(name: &str, len: u64) -> RamBlock {
        RamBlock::new(name, HostRegion::new(Arc::new(SparseMemory::new(len))))
    }

    #[test]
    fn r24_r26_records_come_in_announced_order_with_announced_length() {
        let mut blocks = DestinationBlocks::default();
        for (name, len) in [("pc.rom", 0x2000), ("pc.ram", 0x10_0000)] {
            blocks.add(block(name, len)).unwrap();
        }
        assert_eq!(blocks.announce("pc.ram", 0x10_0000), Ok(0));
        assert_eq!(blocks.announce("pc.rom", 0x1000), Ok(1));
        let records = blocks.records(|index| (index as u32 + 5, 0));
        assert_eq!(records.iter().map(|r| r.length).collect::<Vec<_>>(), [0x10_0000, 0x1000]);
        assert_eq!(records.iter().map(|r| (r.base, r.label, r.rkey)).next(), Some((0, 0, 5)));
        assert_eq!(blocks.announce("late", 1), Err(BlockError::TooLate { name: "late".into() }));
    }

    #[test]
    fn r34_names_and_indices_of_a_hostile_source_are_refused() {
        let mut blocks = DestinationBlocks::default();
        blocks.add(block("ram", 0x1000)).unwrap();
        let name = || "ram".to_owned();
        assert_eq!(blocks.announce("rom", 1), Err(BlockError::UnknownName { name: "rom".into() }));
        assert_eq!(blocks.add(block("ram", 1)), Err(BlockError::Duplicate { name: name() }));
        blocks.announce("ram", 0x1000).unwrap();
        assert_eq!(blocks.announce("ram", 1), Err(BlockError::Duplicate { name: name() }));
        assert_eq!(blocks.get(1).map(|_| ()), Err(BlockError::NoSuchIndex { index: 1, count: 1 }));
        assert!(blocks.get(u32::MAX).is_err());
        let ram = blocks.get(0).unwrap();
        assert_eq!(ram.range(0xfff, 1), Ok(0xfff..0x1000));
        for (offset, len) in [(0x1000, 1), (0, 0x1001), (u64::MAX, 2), (2, u64::MAX)] {
            assert!(ram.range(offset, len).is_err(), "{offset:#x}+{len:#x}");
        }

        let mut long = DestinationBlocks::default();
        long.add(block("ram", 0x1000)).unwrap();
        let refused = BlockError::TooLong { name: name(), announced: 0x1001, have: 0x1000 };
        assert_eq!(long.announce("ram", 0x1001), Err(refused));
    }

    #[test]
    fn r25_a_table_that_does_not_fit_the_source_is_refused() {
        let ours = [block("a", 0x1000), block("b", 0x2000)];
        let record = |length| BlockRecord { length, ..BlockRecord::default() };
        assert_eq!(check_records(&ours, &[record(0x1000), record(0x3000)]), Ok(()));
        assert_eq!(
            check_records(&ours, &[record(0x1000)]),
            Err(BlockError::CountMismatch { theirs: 1, ours: 2 })
        );
        let short = BlockError::LengthMismatch { name: "b".into(), ours: 0x2000, theirs: 0x1fff };
        assert_eq!(check_records(&ours, &[record(0x1000), record(0x1fff)]), Err(short));
        let wraps = BlockRecord { base: u64::MAX - 10, length: 0x2000, ..BlockRecord::default() };
        assert!(matches!(check_records(&ours, &[wraps, record(0x2000)]), Err(BlockError::Wraps { .. })));
        assert_eq!(
            check_announceable(&[block("a", 1), block("a", 1)]),
            Err(BlockError::Duplicate { name: "a".into() })
        );
    }
}
