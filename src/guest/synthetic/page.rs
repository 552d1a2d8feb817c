//! The content of a page of the synthetic guest, and the check of it.

use std::fmt;

use twox_hash::XxHash3_64;

/// First word of a self-describing page, XORed with the guest's seed.
const MAGIC: u64 = u64::from_be_bytes(*b"ramwire1");
/// Words of the header: magic, checksum of all that follows, block and writer, page, sequence.
const HEADER: usize = 5;
/// The writer of the pages that were filled before any writer ran.
pub(super) const FILL: u32 = u32::MAX;

/// The writer of a page, and the number of its write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Position of the block in the table.
    pub block: u32,
    /// Number of the writer; `u32::MAX` for the fill before the start.
    pub writer: u32,
    /// Target page inside the block.
    pub page: u64,
    /// The writer's count of writes, from 1; 0 for the fill.
    pub sequence: u64,
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.writer {
            FILL => write!(f, "the fill of block {} page {:#x}", self.block, self.page)?,
            writer => write!(f, "write {} of writer {writer} to block {}", self.sequence, self.block)?,
        }
        if self.writer == FILL { Ok(()) } else { write!(f, " page {:#x}", self.page) }
    }
}

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Only zeros.
    Zero,
    /// A whole self-describing page.
    Stamped(Stamp),
    /// A header of this guest, but the checksum over the page is wrong: parts of two writes, or damage.
    Torn,
    /// Neither zero nor of this guest.
    Foreign,
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero => f.write_str("zeros"),
            Self::Stamped(stamp) => stamp.fmt(f),
            Self::Torn => f.write_str("a page whose checksum is wrong"),
            Self::Foreign => f.write_str("bytes that this guest never wrote"),
        }
    }
}

/// Fills `page`, whose length is a multiple of 8 and at least 1 KiB, with `stamp` and a body. The first `changes` bytes
/// of the body depend on the stamp; the rest depends only on the page, for every writer.
pub(super) fn write(page: &mut [u8], seed: u64, stamp: Stamp, changes: u32) {
    let (fresh, lasting) = (mix(seed, stamp), mix(seed, Stamp { writer: FILL, sequence: 0, ..stamp }));
    let changed = HEADER + changes as usize / 8;
    let (words, _) = page.as_chunks_mut::<8>();
    for (at, word) in words.iter_mut().enumerate().skip(HEADER) {
        let start = if at < changed { fresh } else { lasting };
        *word = start.wrapping_add((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes();
    }
    words[0] = (MAGIC ^ seed).to_le_bytes();
    words[2] = (u64::from(stamp.block) << 32 | u64::from(stamp.writer)).to_le_bytes();
    words[3] = stamp.page.to_le_bytes();
    words[4] = stamp.sequence.to_le_bytes();
    words[1] = XxHash3_64::oneshot(words[2..].as_flattened()).to_le_bytes();
}

/// Looks what `page` holds.
pub(super) fn read(page: &[u8], seed: u64) -> Content {
    let (words, _) = page.as_chunks::<8>();
    let word = |at: usize| words.get(at).map_or(0, |word| u64::from_le_bytes(*word));
    if word(0) != MAGIC ^ seed {
        let zero = page.iter().all(|byte| *byte == 0);
        return if zero { Content::Zero } else { Content::Foreign };
    }
    if words.len() < HEADER || word(1) != XxHash3_64::oneshot(words[2..].as_flattened()) {
        return Content::Torn;
    }
    let (block, writer) = ((word(2) >> 32) as u32, word(2) as u32);
    Content::Stamped(Stamp { block, writer, page: word(3), sequence: word(4) })
}

/// Spreads a stamp over 64 bits; pages and sequences that differ in one bit give very different bodies.
pub(super) fn mix(seed: u64, stamp: Stamp) -> u64 {
    let who = u64::from(stamp.block) << 32 | u64::from(stamp.writer);
    let words = [seed, who, stamp.page, stamp.sequence].map(u64::to_le_bytes);
    XxHash3_64::oneshot(words.as_flattened())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_reads_as_what_was_written_and_any_flip_is_seen() {
        let stamp = Stamp { block: 3, writer: 1, page: 0x1234, sequence: 99 };
        let mut page = [0; 4096];
        assert_eq!(read(&page, 5), Content::Zero);
        write(&mut page, 5, stamp, u32::MAX);
        assert_eq!(read(&page, 5), Content::Stamped(stamp));
        assert_eq!(read(&page, 6), Content::Foreign);
        for at in (0..4096).step_by(7) {
            page[at] ^= 0x10;
            assert!(matches!(read(&page, 5), Content::Torn | Content::Foreign), "byte {at}");
            page[at] ^= 0x10;
        }
        let mut next = [0; 4096];
        write(&mut next, 5, Stamp { sequence: 100, ..stamp }, u32::MAX);
        next[2048..].copy_from_slice(&page[2048..]);
        assert_eq!(read(&next, 5), Content::Torn);
        write(&mut page, 5, stamp, 16);
        write(&mut next, 5, Stamp { sequence: 100, ..stamp }, 16);
        let differ = page.chunks(8).zip(next.chunks(8)).filter(|(old, new)| old != new).count();
        assert_eq!(differ, 4, "checksum, sequence and two words");
        assert_eq!(read(&next, 5), Content::Stamped(Stamp { sequence: 100, ..stamp }));
    }
}
