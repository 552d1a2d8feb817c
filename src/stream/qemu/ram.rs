//! Records of the `ram` section.
//!
//! The payload of each ram section is a list of records that ends with an end-of-section record. A record begins with a
//! big-endian word: the byte offset in the block, page aligned, and in the bits below the page size exactly one kind,
//! optionally with [`CONTINUE`]. Unless [`CONTINUE`] is set, the name of the block follows, which becomes the current
//! block of the channel, also for later sections.
//!
//! ```text
//! 00000000_00002008 06 "pc.ram" + 4096 bytes     PAGE, block named, offset 0x2000
//! 00000000_00003022 00                           ZERO | CONTINUE, offset 0x3000, fill byte
//! 00000000_00000010                              end of section
//! ```
//!
//! Decoding is the hot path of every receiver: no state, no allocation, borrowed names. Encoding of a page's header
//! gives 8 bytes by value, so that a sender can place thousands of them between guest pages in one vectored write.

use super::super::error::{DecodeError, Fault};
use super::super::reader::Reader;
use super::super::writer::Writer;
use crate::ram::BlockName;
use crate::units::{BlockOffset, PageSize};

/// Name of the section.
pub const IDSTR: &str = "ram";
/// Version of the section, the only one in use.
pub const VERSION: u32 = 4;

/// Record: a page filled with one byte, which is zero.
pub const ZERO: u64 = 0x002;
/// Record: the list of blocks.
pub const MEM_SIZE: u64 = 0x004;
/// Record: a whole page.
pub const PAGE: u64 = 0x008;
/// Record: end of the section's payload.
pub const EOS: u64 = 0x010;
/// Modifier: the current block, no name follows.
pub const CONTINUE: u64 = 0x020;
/// Record: a page as its difference to the previous content.
pub const XBZRLE: u64 = 0x040;
/// Record: the transport takes over (RDMA).
pub const HOOK: u64 = 0x080;
/// Record: a page as a zlib stream.
pub const COMPRESS_PAGE: u64 = 0x100;
/// Record: barrier of the multifd channels.
pub const MULTIFD_FLUSH: u64 = 0x200;

/// Longest record head: word, longest name, encoding byte and length.
pub const MAX_HEAD_LEN: usize = 8 + 1 + BlockName::MAX + 4;

/// Bytes before a whole page of the block that is current.
pub const PAGE_HEAD: usize = 8;

/// A record, without the bytes of its page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// The page's bytes follow.
    Page(PageAt<'a>),
    /// The page is filled with one byte; current senders use only zero.
    Zero {
        /// Which page.
        at: PageAt<'a>,
        /// The fill byte.
        fill: u8,
    },
    /// `len` bytes of an XBZRLE encoding follow, `len` up to the page size.
    Xbzrle {
        /// Which page.
        at: PageAt<'a>,
        /// Bytes that follow.
        len: u16,
    },
    /// `len` bytes of a zlib stream follow.
    Compressed {
        /// Which page.
        at: PageAt<'a>,
        /// Bytes that follow: 1 to [`compress_bound`].
        len: u32,
    },
    /// A list of blocks follows, whose lengths add up to `total` bytes; see [`blocks`](super::blocks).
    MemSize {
        /// Sum of the used lengths.
        total: u64,
    },
    /// Barrier of the multifd channels.
    MultifdFlush,
    /// The transport's own round begins; the transport defines the word's upper bits.
    Hook {
        /// The word without flags.
        argument: u64,
    },
    /// The payload ends; the footer follows.
    Eos,
}

/// The page a record is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageAt<'a> {
    /// Name of the block; `None`: the current block of the channel.
    pub block: Option<&'a str>,
    /// Offset of the page in the block, a multiple of the page size.
    pub offset: BlockOffset,
}

/// Longest zlib stream that one page can need, in bytes: 4110 for 4 KiB.
pub const fn compress_bound(page: PageSize) -> u64 {
    let n = page.bytes();
    n + (n >> 12) + (n >> 14) + (n >> 25) + 13
}

/// Decodes the head of the next record: everything before a page's bytes.
///
/// Returns the record and the number of bytes it took, 8 to [`MAX_HEAD_LEN`]. The bytes that belong to it and follow
/// are: one page for [`Record::Page`], `len` for [`Record::Xbzrle`] and [`Record::Compressed`], the block list for
/// [`Record::MemSize`].
///
/// # Errors
///
/// - [`DecodeError::Truncated`]: nothing was taken.
/// - [`Fault::RecordFlags`]: no kind or several. [`Fault::Name`]: an empty or malformed name. [`Fault::Limit`]: a
///   length above the page size or [`compress_bound`]. [`Fault::Xbzrle`]: an encoding other than 1.
#[inline]
pub fn decode_record(input: &[u8], page: PageSize) -> Result<(Record<'_>, usize), DecodeError> {
    let mut reader = Reader::new(input);
    let word = reader.be64()?;
    let flags = word & (page.bytes() - 1);
    let offset = BlockOffset(word - flags);
    if flags == PAGE | CONTINUE {
        return Ok((Record::Page(PageAt { block: None, offset }), 8));
    }
    decode_other(reader, flags, offset, page)
}

fn decode_other(
    mut reader: Reader<'_>,
    flags: u64,
    offset: BlockOffset,
    page: PageSize,
) -> Result<(Record<'_>, usize), DecodeError> {
    let kind = flags & !CONTINUE;
    let record = match kind {
        PAGE => Record::Page(page_at(&mut reader, flags, offset)?),
        ZERO => Record::Zero { at: page_at(&mut reader, flags, offset)?, fill: reader.u8()? },
        XBZRLE => {
            let at = page_at(&mut reader, flags, offset)?;
            let encoding_at = reader.position();
            let encoding = reader.u8()?;
            if encoding != 1 {
                let fault = super::super::xbzrle::XbzrleFault::Encoding { found: encoding };
                return Err(DecodeError::corrupt(encoding_at, fault.into()));
            }
            let len_at = reader.position();
            let len = reader.be16()?;
            at_most(len_at, "the length of an XBZRLE page", len.into(), page.bytes())?;
            Record::Xbzrle { at, len }
        }
        COMPRESS_PAGE => {
            let at = page_at(&mut reader, flags, offset)?;
            let len_at = reader.position();
            let len = reader.be32()?;
            at_most(len_at, "the length of a compressed page", len.into(), compress_bound(page))?;
            if len == 0 {
                let fault = Fault::Inflate { page_bytes: page.bytes() };
                return Err(DecodeError::corrupt(len_at, fault));
            }
            Record::Compressed { at, len }
        }
        EOS => Record::Eos,
        MEM_SIZE if flags == kind => Record::MemSize { total: offset.0 },
        MULTIFD_FLUSH if flags == kind => Record::MultifdFlush,
        HOOK if flags == kind => Record::Hook { argument: offset.0 },
        _ => return Err(DecodeError::corrupt(0, Fault::RecordFlags { flags })),
    };
    Ok((record, reader.position()))
}

fn page_at<'a>(reader: &mut Reader<'a>, flags: u64, offset: BlockOffset) -> Result<PageAt<'a>, DecodeError> {
    let block = if flags & CONTINUE == 0 { Some(reader.name("block name")?) } else { None };
    Ok(PageAt { block, offset })
}

fn at_most(at: usize, what: &'static str, value: u64, limit: u64) -> Result<(), DecodeError> {
    if value > limit {
        return Err(DecodeError::corrupt(at, Fault::Limit { what, value, limit }));
    }
    Ok(())
}

/// Head of a whole page in the current block. The page's bytes follow.
#[inline]
pub const fn continued_page(offset: BlockOffset) -> [u8; PAGE_HEAD] {
    (offset.0 | PAGE | CONTINUE).to_be_bytes()
}

/// Record of a zero page in the current block, complete.
#[inline]
pub const fn continued_zero(offset: BlockOffset) -> [u8; 9] {
    let [a, b, c, d, e, f, g, h] = (offset.0 | ZERO | CONTINUE).to_be_bytes();
    [a, b, c, d, e, f, g, h, 0]
}

/// A record that ends the payload.
pub const EOS_RECORD: [u8; 8] = EOS.to_be_bytes();

impl Record<'_> {
    /// Appends the head of the record: everything except the bytes of a page or the list of blocks.
    ///
    /// Offsets must be multiples of the page size; a `block` is 1 to 255 bytes, as [`BlockName`] has it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut writer = Writer::new(out);
        match self {
            Self::Page(at) => at.encode(PAGE, &mut writer),
            Self::Zero { at, fill } => {
                at.encode(ZERO, &mut writer);
                writer.u8(*fill);
            }
            Self::Xbzrle { at, len } => {
                at.encode(XBZRLE, &mut writer);
                writer.u8(1).be16(*len);
            }
            Self::Compressed { at, len } => {
                at.encode(COMPRESS_PAGE, &mut writer);
                writer.be32(*len);
            }
            Self::MemSize { total } => {
                writer.be64(total | MEM_SIZE);
            }
            Self::MultifdFlush => {
                writer.be64(MULTIFD_FLUSH);
            }
            Self::Hook { argument } => {
                writer.be64(argument | HOOK);
            }
            Self::Eos => {
                writer.be64(EOS);
            }
        }
    }
}

impl PageAt<'_> {
    fn encode(&self, kind: u64, writer: &mut Writer<'_>) {
        match self.block {
            None => {
                writer.be64(self.offset.0 | kind | CONTINUE);
            }
            Some(name) => {
                debug_assert!((1..=BlockName::MAX).contains(&name.len()));
                let name = name.as_bytes().get(..BlockName::MAX).unwrap_or(name.as_bytes());
                writer.be64(self.offset.0 | kind).u8(name.len() as u8).bytes(name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::type_complexity)]
    use proptest::prelude::*;

    use super::super::super::xbzrle::XbzrleFault;
    use super::*;

    fn at(block: Option<&str>, offset: u64) -> PageAt<'_> {
        PageAt { block, offset: BlockOffset(offset) }
    }

    #[test]
    fn s23_s24_s27_s33_records_decode_or_say_why_not() {
        let corrupt = |at, fault| Err(DecodeError::corrupt(at, fault));
        let flags = |flags| corrupt(0, Fault::RecordFlags { flags });
        let cut = |needed, have| Err(DecodeError::Truncated { needed, have });
        #[rustfmt::skip]
        let cases: &[(&str, &[u8], Result<(Record<'_>, usize), DecodeError>)] = &[
            ("a page, block named",      b"\0\0\0\0\0\0\x20\x08\x06pc.ramXX",  Ok((Record::Page(at(Some("pc.ram"), 0x2000)), 15))),
            ("a page, same block",       b"\0\0\0\0\0\0\x20\x28",              Ok((Record::Page(at(None, 0x2000)), 8))),
            ("a zero page",              b"\0\0\0\0\0\0\x30\x22\0",            Ok((Record::Zero { at: at(None, 0x3000), fill: 0 }, 9))),
            ("a zero page, block named", b"\0\0\0\0\0\0\0\x02\x03ram\x07",     Ok((Record::Zero { at: at(Some("ram"), 0), fill: 7 }, 13))),
            ("an XBZRLE page",           b"\0\0\0\0\0\0\x10\x60\x01\x0f\xff",  Ok((Record::Xbzrle { at: at(None, 0x1000), len: 4095 }, 11))),
            ("an XBZRLE page, full",     b"\0\0\0\0\0\0\x10\x60\x01\x10\x00",  Ok((Record::Xbzrle { at: at(None, 0x1000), len: 4096 }, 11))),
            ("a compressed page",        b"\0\0\0\0\0\0\x11\x20\0\0\x10\x0e",  Ok((Record::Compressed { at: at(None, 0x1000), len: 4110 }, 12))),
            ("the block list",           b"\0\0\0\0\x40\0\0\x04",              Ok((Record::MemSize { total: 0x4000_0000 }, 8))),
            ("a multifd barrier",        b"\0\0\0\0\0\0\x02\0",                Ok((Record::MultifdFlush, 8))),
            ("an RDMA mark",             b"\0\0\0\0\0\0\x10\x80",              Ok((Record::Hook { argument: 0x1000 }, 8))),
            ("the end",                  b"\0\0\0\0\0\0\0\x10",                Ok((Record::Eos, 8))),
            ("the end, whatever else",   b"\0\0\0\0\0\0\x70\x30",              Ok((Record::Eos, 8))),
            ("no kind",                  b"\0\0\0\0\0\0\x20\0",                flags(0)),
            ("only CONTINUE",            b"\0\0\0\0\0\0\x20\x20",              flags(0x20)),
            ("the obsolete FULL",        b"\0\0\0\0\0\0\x20\x01",              flags(1)),
            ("two kinds",                b"\0\0\0\0\0\0\x20\x0a",              flags(0x0a)),
            ("an undefined bit",         b"\0\0\0\0\0\0\x24\x00",              flags(0x400)),
            ("a block list continued",   b"\0\0\0\0\0\0\x20\x24",              flags(0x24)),
            ("an empty name",            b"\0\0\0\0\0\0\x20\x08\0",            corrupt(8, Fault::Name { what: "block name" })),
            ("a name that is no text",   b"\0\0\0\0\0\0\x20\x08\x01\xff",      corrupt(9, Fault::Name { what: "block name" })),
            ("XBZRLE encoding 2",        b"\0\0\0\0\0\0\x10\x60\x02\0\0",      corrupt(8, Fault::Xbzrle(XbzrleFault::Encoding { found: 2 }))),
            ("XBZRLE above a page",      b"\0\0\0\0\0\0\x10\x60\x01\x10\x01",  corrupt(9, Fault::Limit { what: "the length of an XBZRLE page", value: 4097, limit: 4096 })),
            ("compressed above bound",   b"\0\0\0\0\0\0\x11\x20\0\0\x10\x0f",  corrupt(8, Fault::Limit { what: "the length of a compressed page", value: 4111, limit: 4110 })),
            ("compressed to nothing",    b"\0\0\0\0\0\0\x11\x20\0\0\0\0",      corrupt(8, Fault::Inflate { page_bytes: 4096 })),
            ("nothing yet",              b"",                                  cut(8, 0)),
            ("cut in front of the name", b"\0\0\0\0\0\0\x20\x08",              cut(9, 8)),
            ("cut inside the name",      b"\0\0\0\0\0\0\x20\x08\x06pc.",       cut(15, 12)),
            ("cut before the fill byte", b"\0\0\0\0\0\0\x30\x22",              cut(9, 8)),
        ];
        for (what, input, want) in cases {
            assert_eq!(decode_record(input, PageSize::SIZE_4K), *want, "{what}");
        }
    }

    #[test]
    fn s23_fixed_heads_are_what_the_general_encoder_writes() {
        for offset in [0, 0x1000, 0xffff_ffff_f000] {
            let mut out = Vec::new();
            Record::Page(at(None, offset)).encode(&mut out);
            assert_eq!(out, continued_page(BlockOffset(offset)));
            out.clear();
            Record::Zero { at: at(None, offset), fill: 0 }.encode(&mut out);
            assert_eq!(out, continued_zero(BlockOffset(offset)));
        }
        let mut out = Vec::new();
        Record::Eos.encode(&mut out);
        assert_eq!(out, EOS_RECORD);
        assert_eq!(compress_bound(PageSize::SIZE_4K), 4110);
    }

    fn any_record() -> impl Strategy<Value = (Option<String>, u64, u8, u16)> {
        (prop::option::of("[a-z0-9/@.:]{1,255}"), any::<u64>(), any::<u8>(), any::<u16>())
    }

    proptest! {
        /// Every encoded record decodes to itself, at every page size, and consumes exactly its bytes.
        #[test]
        fn heads_round_trip((name, raw, kind, len) in any_record(), shift in 10u32..=16) {
            let page = PageSize::from_bytes(1 << shift).unwrap();
            let offset = raw & !(page.bytes() - 1);
            let at = at(name.as_deref(), offset);
            let record = match kind % 8 {
                0 => Record::Page(at),
                1 => Record::Zero { at, fill: kind },
                2 => Record::Xbzrle { at, len: len % 1025 },
                3 => Record::Compressed { at, len: u32::from(len % 1024) + 1 },
                4 => Record::MemSize { total: offset },
                5 if shift > 10 => Record::MultifdFlush,
                6 => Record::Hook { argument: offset },
                _ => Record::Eos,
            };
            let mut out = Vec::new();
            record.encode(&mut out);
            let len = out.len();
            prop_assert!(len <= MAX_HEAD_LEN);
            out.extend_from_slice(b"what follows");
            prop_assert_eq!(decode_record(&out, page), Ok((record, len)));
            for cut in 0..len {
                let error = decode_record(&out[..cut], page).unwrap_err();
                let honest = matches!(error, DecodeError::Truncated { needed, have } if have == cut && needed > cut && needed <= len);
                prop_assert!(honest, "{:?} at {}", error, cut);
            }
        }
    }
}
