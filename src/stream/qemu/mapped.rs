//! mapped-ram: a file in which every page has its place.
//!
//! Behind each entry of the block list stand a header of 28 bytes, a bitmap and the pages, at absolute offsets in the
//! file; bit i of byte i/8 of the bitmap says that page i is present, absent pages are zero.

use super::super::error::{DecodeError, Fault};
use super::super::reader::Reader;
use super::super::writer::Writer;
use crate::units::PageSize;

/// Version of the header.
pub const VERSION: u32 = 1;
/// Bytes of the header.
pub const HEADER_LEN: usize = 28;
/// The pages of a block begin at a multiple of this in a file that is written here or by QEMU.
pub const REGION_ALIGN: u64 = 1 << 20;

/// Where the pages of a block stand in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedHeader {
    /// Target page size.
    pub page_size: PageSize,
    /// Offset of the bitmap in the file.
    pub bitmap_offset: u64,
    /// Offset of page 0 in the file, a multiple of the page size.
    pub pages_offset: u64,
}

/// Bytes of the bitmap of a block with so many pages: whole 64-bit words.
pub const fn bitmap_len(pages: u64) -> u64 {
    pages.div_ceil(64).saturating_mul(8)
}

/// Decodes the header of a block, 28 bytes.
///
/// # Errors
///
/// [`Fault::Version`] above 1, [`Fault::TargetPage`] for another page size than `page`, [`Fault::Device`] for pages
/// that do not begin at a page boundary; [`DecodeError::Truncated`].
pub fn decode_header(input: &[u8], page: PageSize) -> Result<(MappedHeader, usize), DecodeError> {
    let mut reader = Reader::new(input);
    let found = reader.be32()?;
    if found > VERSION {
        let fault = Fault::Version { name: "mapped-ram".into(), found, supported: VERSION };
        return Err(DecodeError::corrupt(0, fault));
    }
    let found = reader.be64()?;
    if found != page.bytes() {
        return Err(DecodeError::corrupt(4, Fault::TargetPage { found, expected: page.bytes() }));
    }
    let bitmap_offset = reader.be64()?;
    let at = reader.position();
    let pages_offset = reader.be64()?;
    if !page.divides(pages_offset) {
        return Err(DecodeError::corrupt(at, Fault::Device("mapped-ram pages begin inside a page")));
    }
    Ok((MappedHeader { page_size: page, bitmap_offset, pages_offset }, reader.position()))
}

/// Appends the header of a block.
pub fn encode_header(header: &MappedHeader, out: &mut Vec<u8>) {
    let mut writer = Writer::new(out);
    writer.be32(VERSION).be64(header.page_size.bytes()).be64(header.bitmap_offset).be64(header.pages_offset);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn s69_s70_headers_round_trip_or_say_why_not() {
        let header =
            MappedHeader { page_size: PageSize::SIZE_4K, bitmap_offset: 0x8c, pages_offset: 0x10_0000 };
        let mut out = Vec::new();
        encode_header(&header, &mut out);
        assert_eq!(out, b"\0\0\0\x01\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x8c\0\0\0\0\0\x10\0\0");
        assert_eq!(decode_header(&out, PageSize::SIZE_4K), Ok((header, HEADER_LEN)));
        assert_eq!(
            decode_header(&out[..27], PageSize::SIZE_4K),
            Err(DecodeError::Truncated { needed: 28, have: 27 })
        );
        for (what, at, byte) in [("version 2", 3, 2), ("page size", 10, 0x20), ("half a page", 26, 2)] {
            let mut bad = out.clone();
            bad[at] = byte;
            assert!(matches!(decode_header(&bad, PageSize::SIZE_4K), Err(DecodeError::Corrupt(_))), "{what}");
        }
        out[3] = 0;
        assert!(decode_header(&out, PageSize::SIZE_4K).is_ok(), "version 0 is read");
    }
}
