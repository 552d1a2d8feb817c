//! mapped-ram: a file in which every page has a fixed offset.
//!
//! After each entry of the block list come a header of 28 bytes, a bitmap and the pages, at absolute offsets in the
//! file; bit i of byte i/8 of the bitmap is set if page i is present; absent pages are zero.
//!
//! ```text
//! counted name, be64 used length [, be64 guest address]
//! be32 version   be64 page size   be64 bitmap offset   be64 pages offset
//! bitmap: ceil(pages / 64) little-endian words
//! a gap, up to the next multiple of 1 MiB
//! used length bytes of pages; the next entry, or what ends the list, follows at once
//! ```
//!
//! Under `x-ignore-shared` a block that is not in the file has a header with both offsets zero and nothing after it.

use super::super::error::{DecodeError, Fault};
use super::super::reader::Reader;
use super::super::writer::Writer;
use crate::ram::PageBitmap;
use crate::units::PageSize;

/// Version of the header.
pub const VERSION: u32 = 1;
/// Bytes of the header.
pub const HEADER_LEN: usize = 28;
/// In a file written here or by QEMU, the pages of a block begin at a multiple of this.
pub const REGION_ALIGN: u64 = 1 << 20;

/// Offsets of the fields in the header.
const PAGE_SIZE_AT: usize = 4;
const BITMAP_AT: usize = 12;
const PAGES_AT: usize = 20;

/// The offsets of a block's pages in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedHeader {
    /// Target page size.
    pub page_size: PageSize,
    /// Offset of the bitmap in the file.
    pub bitmap_offset: u64,
    /// Offset of page 0 in the file, a multiple of the page size.
    pub pages_offset: u64,
}

impl MappedHeader {
    /// The offsets of a block of `length` bytes whose header ends at `here`, as QEMU assigns them. `None` on overflow.
    pub fn behind(here: u64, length: u64, page_size: PageSize) -> Option<Self> {
        let bitmap_end = here.checked_add(bitmap_len(length / page_size.bytes()))?;
        let pages_offset = bitmap_end.checked_next_multiple_of(REGION_ALIGN)?;
        pages_offset.checked_add(length)?;
        Some(Self { page_size, bitmap_offset: here, pages_offset })
    }

    /// The header of a block that is not in the file (`x-ignore-shared`).
    pub fn absent(page_size: PageSize) -> Self {
        Self { page_size, bitmap_offset: 0, pages_offset: 0 }
    }

    /// True for a block that is not in the file.
    pub fn is_absent(&self) -> bool {
        (self.bitmap_offset, self.pages_offset) == (0, 0)
    }

    /// Offset of the next item after the block: the end of its pages. The block has `length` bytes, its header ends at
    /// `here`, and the file has `file_len` bytes where that is known.
    ///
    /// # Errors
    /// [`Fault::MappedRam`] at the field that is wrong, counted from the header: a bitmap or pages that lie before
    /// `here`, overlap, or lie outside the file.
    pub fn end(&self, name: &str, length: u64, here: u64, file_len: Option<u64>) -> Result<u64, DecodeError> {
        let wrong = |at, field, value, why| {
            Err(DecodeError::corrupt(at, Fault::MappedRam { name: name.into(), field, value, why }))
        };
        let bitmap = |why| wrong(BITMAP_AT, "the offset of the bitmap", self.bitmap_offset, why);
        let pages = |why| wrong(PAGES_AT, "the offset of the pages", self.pages_offset, why);
        let file_len = file_len.unwrap_or(u64::MAX);
        if self.bitmap_offset < here {
            return bitmap("the bitmap lies in front of its header");
        }
        let bitmap_bytes = bitmap_len(length / self.page_size.bytes());
        let Some(bitmap_end) = self.bitmap_offset.checked_add(bitmap_bytes).filter(|end| *end <= file_len)
        else {
            return bitmap("the bitmap ends outside the file");
        };
        if self.pages_offset < here {
            return pages("the pages lie in front of their header");
        }
        if self.pages_offset < bitmap_end {
            return pages("the bitmap is too long to end in front of the pages");
        }
        match self.pages_offset.checked_add(length).filter(|end| *end <= file_len) {
            Some(end) => Ok(end),
            None => pages("the pages end outside the file"),
        }
    }
}

/// Bytes of the bitmap of a block of `pages` pages: whole 64-bit words.
pub const fn bitmap_len(pages: u64) -> u64 {
    pages.div_ceil(64).saturating_mul(8)
}

/// Decodes the header of block `name`, 28 bytes. [`MappedHeader::end`] checks its offsets.
///
/// # Errors
///
/// [`Fault::Version`] above 1, [`Fault::TargetPage`] for another page size than `page`, [`Fault::MappedRam`] for one of
/// zero and for pages that do not begin at a page boundary; [`DecodeError::Truncated`].
pub fn decode_header(input: &[u8], name: &str, page: PageSize) -> Result<(MappedHeader, usize), DecodeError> {
    let wrong = |at, field, value, why| {
        Err(DecodeError::corrupt(at, Fault::MappedRam { name: name.into(), field, value, why }))
    };
    let mut reader = Reader::new(input);
    let found = reader.be32()?;
    if found > VERSION {
        let fault = Fault::Version { name: "mapped-ram".into(), found, supported: VERSION };
        return Err(DecodeError::corrupt(0, fault));
    }
    let found = reader.be64()?;
    if found == 0 {
        return wrong(PAGE_SIZE_AT, "the page size", 0, "no page has no bytes");
    }
    if found != page.bytes() {
        return Err(DecodeError::corrupt(PAGE_SIZE_AT, Fault::TargetPage { found, expected: page.bytes() }));
    }
    let bitmap_offset = reader.be64()?;
    let pages_offset = reader.be64()?;
    if !page.divides(pages_offset) {
        return wrong(PAGES_AT, "the offset of the pages", pages_offset, "they begin inside a page");
    }
    Ok((MappedHeader { page_size: page, bitmap_offset, pages_offset }, reader.position()))
}

/// Appends the header of a block.
pub fn encode_header(header: &MappedHeader, out: &mut Vec<u8>) {
    let mut writer = Writer::new(out);
    writer.be32(VERSION).be64(header.page_size.bytes()).be64(header.bitmap_offset).be64(header.pages_offset);
}

/// Decodes the bitmap of block `name`, which has `pages` pages: [`bitmap_len`] bytes.
///
/// # Errors
/// [`Fault::MappedRam`] at the word in which a page beyond the block's end is marked present;
/// [`DecodeError::Truncated`].
pub fn decode_bitmap(input: &[u8], name: &str, pages: u64) -> Result<PageBitmap, DecodeError> {
    let needed = usize::try_from(bitmap_len(pages)).unwrap_or(usize::MAX);
    let Some(bytes) = input.get(..needed) else {
        return Err(DecodeError::Truncated { needed, have: input.len() });
    };
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
    let words: Vec<u64> = bytes.chunks_exact(8).map(word).collect();
    if let Some(last) = words.last()
        && !pages.is_multiple_of(64)
        && last >> (pages % 64) != 0
    {
        let (field, why) = ("the last word of the bitmap", "it has pages beyond the block's end");
        let fault = Fault::MappedRam { name: name.into(), field, value: *last, why };
        return Err(DecodeError::corrupt(needed - 8, fault));
    }
    let mut present = PageBitmap::new(pages);
    present.merge_words(0, &words);
    Ok(present)
}

/// Appends the bitmap of a block.
pub fn encode_bitmap(present: &PageBitmap, out: &mut Vec<u8>) {
    out.extend(present.words().iter().flat_map(|word| word.to_le_bytes()));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;
    use crate::units::PageIndex;

    const PAGE: PageSize = PageSize::SIZE_4K;

    fn wrong(at: usize, field: &'static str, value: u64, why: &'static str) -> DecodeError {
        DecodeError::corrupt(at, Fault::MappedRam { name: "m".into(), field, value, why })
    }

    #[test]
    fn s69_s70_headers_round_trip_or_say_why_not() {
        let header = MappedHeader { page_size: PAGE, bitmap_offset: 0x8c, pages_offset: 0x10_0000 };
        let mut out = Vec::new();
        encode_header(&header, &mut out);
        assert_eq!(out, b"\0\0\0\x01\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x8c\0\0\0\0\0\x10\0\0");
        assert_eq!(decode_header(&out, "m", PAGE), Ok((header, HEADER_LEN)));
        assert_eq!(
            decode_header(&out[..27], "m", PAGE),
            Err(DecodeError::Truncated { needed: 28, have: 27 })
        );
        let version = Fault::Version { name: "mapped-ram".into(), found: 2, supported: 1 };
        let size = |found| DecodeError::corrupt(4, Fault::TargetPage { found, expected: 4096 });
        let begin = "they begin inside a page";
        for (what, at, byte, fault) in [
            ("version 2", 3, 2, DecodeError::corrupt(0, version)),
            ("no page size", 10, 0, wrong(4, "the page size", 0, "no page has no bytes")),
            ("half of it", 10, 8, size(0x800)),
            ("twice of it", 10, 0x20, size(0x2000)),
            ("half a page", 26, 2, wrong(20, "the offset of the pages", 0x10_0200, begin)),
        ] {
            let mut bad = out.clone();
            bad[at] = byte;
            assert_eq!(decode_header(&bad, "m", PAGE), Err(fault), "{what}");
        }
        out[3] = 0;
        assert!(decode_header(&out, "m", PAGE).is_ok(), "version 0 is read");
    }

    #[test]
    fn s70_places_that_no_file_has_are_refused_at_their_field() {
        const MIB: u64 = 1 << 20;
        let header =
            |bitmap_offset, pages_offset| MappedHeader { page_size: PAGE, bitmap_offset, pages_offset };
        let bitmap = |value, why| Err(wrong(12, "the offset of the bitmap", value, why));
        let pages = |value, why| Err(wrong(20, "the offset of the pages", value, why));
        let top = !0xfff;
        // 4 MiB are 1024 pages: a bitmap of 128 bytes. The header ends at 0x100, the file at 6 MiB.
        for (what, header, want) in [
            ("as written", header(0x100, MIB), Ok(5 * MIB)),
            ("closer", header(0x180, 4096), Ok(4 * MIB + 4096)),
            ("up to the end", header(0x100, 2 * MIB), Ok(6 * MIB)),
            ("bitmap in front", header(0xf8, MIB), bitmap(0xf8, "the bitmap lies in front of its header")),
            ("bitmap at 0", header(0, MIB), bitmap(0, "the bitmap lies in front of its header")),
            (
                "bitmap outside",
                header(6 * MIB - 127, MIB),
                bitmap(6 * MIB - 127, "the bitmap ends outside the file"),
            ),
            ("bitmap overflows", header(u64::MAX, MIB), bitmap(u64::MAX, "the bitmap ends outside the file")),
            ("pages in front", header(0x100, 0), pages(0, "the pages lie in front of their header")),
            (
                "pages in the bitmap",
                header(0xfc0, 4096),
                pages(4096, "the bitmap is too long to end in front of the pages"),
            ),
            (
                "bitmap behind the pages",
                header(5 * MIB, MIB),
                pages(MIB, "the bitmap is too long to end in front of the pages"),
            ),
            (
                "pages outside",
                header(0x100, 2 * MIB + 4096),
                pages(2 * MIB + 4096, "the pages end outside the file"),
            ),
            ("pages overflow", header(0x100, top), pages(top, "the pages end outside the file")),
        ] {
            assert_eq!(header.end("m", 4 * MIB, 0x100, Some(6 * MIB)), want, "{what}");
        }
        let endless = header(0x100, top).end("m", 4 * MIB, 0x100, None);
        assert!(endless.is_err(), "numbers end, too");
    }

    #[test]
    fn s70_s80_a_bitmap_has_whole_little_endian_words_and_no_page_behind_the_end() {
        let mut present = PageBitmap::new(70);
        present.set_range(0..1);
        present.set_range(8..9);
        present.set_range(69..70);
        let mut bytes = Vec::new();
        encode_bitmap(&present, &mut bytes);
        assert_eq!(bytes, b"\x01\x01\0\0\0\0\0\0\x20\0\0\0\0\0\0\0");
        assert_eq!(decode_bitmap(&bytes, "m", 70), Ok(present));
        assert_eq!(
            decode_bitmap(&bytes[..15], "m", 70),
            Err(DecodeError::Truncated { needed: 16, have: 15 })
        );
        let behind = wrong(8, "the last word of the bitmap", 0x20, "it has pages beyond the block's end");
        assert_eq!(decode_bitmap(&bytes, "m", 69), Err(behind));
        assert_eq!(
            decode_bitmap(&[], "m", u64::MAX),
            Err(DecodeError::Truncated { needed: bitmap_len(u64::MAX) as usize, have: 0 })
        );
    }

    proptest! {
        #[test]
        fn s69_what_is_placed_as_qemu_does_is_accepted(here in any::<u64>(), pages in 1u64..1 << 40) {
            let length = pages * PAGE.bytes();
            if let Some(header) = MappedHeader::behind(here, length, PAGE) {
                prop_assert_eq!(header.pages_offset % REGION_ALIGN, 0);
                let end = header.end("m", length, here, None).unwrap();
                prop_assert_eq!(end - length, header.pages_offset);
                prop_assert!(header.end("m", length, here, Some(end - 1)).is_err());
                let mut bytes = Vec::new();
                encode_header(&header, &mut bytes);
                prop_assert_eq!(decode_header(&bytes, "m", PAGE), Ok((header, HEADER_LEN)));
            }
        }

        /// For any header: an accepted bitmap and accepted pages lie after it, inside the file, and do not overlap.
        #[test]
        fn s70_what_is_accepted_overlaps_nothing(
            bitmap_offset in prop_oneof![any::<u64>(), 0u64..1 << 16],
            pages_at in prop_oneof![any::<u64>(), 0u64..16],
            here in 0u64..1 << 16,
            pages in 1u64..1 << 20,
            file_len in any::<u64>(),
        ) {
            let header = MappedHeader { page_size: PAGE, bitmap_offset, pages_offset: pages_at.wrapping_mul(4096) };
            if let Ok(end) = header.end("m", pages * 4096, here, Some(file_len)) {
                prop_assert!(here <= bitmap_offset && end <= file_len);
                prop_assert!(bitmap_offset + bitmap_len(pages) <= header.pages_offset);
                prop_assert_eq!(end, header.pages_offset + pages * 4096);
            }
        }

        #[test]
        fn s80_bitmaps_round_trip(model in prop::collection::vec(any::<bool>(), 1..700)) {
            let mut present = PageBitmap::new(model.len() as u64);
            for (page, _) in model.iter().enumerate().filter(|(_, set)| **set) {
                present.set_range(page as u64..page as u64 + 1);
            }
            let mut bytes = Vec::new();
            encode_bitmap(&present, &mut bytes);
            prop_assert_eq!(bytes.len() as u64, bitmap_len(model.len() as u64));
            let decoded = decode_bitmap(&bytes, "m", model.len() as u64).unwrap();
            for (page, set) in model.iter().enumerate() {
                prop_assert_eq!(decoded.get(PageIndex(page as u64)), *set);
                prop_assert_eq!(bytes[page / 8] >> (page % 8) & 1 == 1, *set);
            }
        }

        #[test]
        fn s70_any_header_is_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok((header, used)) = decode_header(&bytes, "m", PAGE) {
                prop_assert_eq!(used, HEADER_LEN);
                let _ = header.end("m", 4096, 28, Some(1 << 30));
            }
        }
    }
}
