//! The list of RAM blocks after a MEM_SIZE record.
//!
//! Until the announced lengths add up to the total of the record:
//!
//! ```text
//! counted name, be64 used length
//! [be64 host page size]       postcopy was advised, and the block's host page is not the normal one
//! [be64 guest address]        capability x-ignore-shared: every block
//! [mapped-ram header]         capability mapped-ram: see `mapped`
//! ```
//!
//! The stream does not announce whether the first optional field is present. The next bytes show it: after the length
//! comes either a power of two from 4 KiB to 1 GiB, or the length byte of the next name (never zero), or a record word,
//! whose flag bits no such power of two has.

use super::super::error::{DecodeError, Fault};
use super::super::reader::Reader;
use super::super::writer::Writer;
use super::ram::Record;
use crate::ram::BlockName;
use crate::units::{GuestAddr, PageSize};

/// Most blocks that are read.
pub const MAX_BLOCKS: usize = 4096;

/// A block as the source announces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockAnnouncement {
    /// Name of the block.
    pub name: BlockName,
    /// Bytes in use, a non-zero multiple of the target page size.
    pub used_length: u64,
    /// Page size of the memory that backs it, announced if it is not the normal one and postcopy is possible.
    pub host_page: Option<PageSize>,
    /// Guest physical address, announced under `x-ignore-shared`; zero for a block that is not mapped.
    pub guest_addr: Option<GuestAddr>,
}

/// Which optional fields the entries of a list have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListForm {
    /// Postcopy of RAM was advised: a host page size may follow.
    pub host_pages: bool,
    /// `x-ignore-shared` is on: a guest address follows.
    pub guest_addrs: bool,
}

/// Decodes one entry of the list, up to the mapped-ram header. `remaining` is what the lengths still have to add up
/// to; `page` is the target page size.
///
/// # Errors
///
/// [`Fault::Name`]; [`Fault::BlockLength`] for a length of zero, above `remaining` or no multiple of the page size;
/// [`DecodeError::Truncated`]. The caller checks for duplicates.
pub fn decode_block(
    input: &[u8],
    form: ListForm,
    remaining: u64,
    page: PageSize,
) -> Result<(BlockAnnouncement, usize), DecodeError> {
    let mut reader = Reader::new(input);
    let text = reader.name("block name")?;
    let name =
        BlockName::new(text).map_err(|_| DecodeError::corrupt(0, Fault::Name { what: "block name" }))?;
    let at = reader.position();
    let used_length = reader.be64()?;
    let wrong =
        |why| DecodeError::corrupt(at, Fault::BlockLength { name: text.into(), length: used_length, why });
    if used_length == 0 {
        return Err(wrong("a block cannot be empty"));
    }
    if !page.divides(used_length) {
        return Err(wrong("no multiple of the target page size"));
    }
    if used_length > remaining {
        return Err(wrong("the blocks are longer than the announced total"));
    }
    let host_page = if form.host_pages { host_page(&mut reader)? } else { None };
    let guest_addr = if form.guest_addrs { Some(GuestAddr(reader.be64()?)) } else { None };
    Ok((BlockAnnouncement { name, used_length, host_page, guest_addr }, reader.position()))
}

/// Takes the optional host page size, if the next eight bytes are one.
fn host_page(reader: &mut Reader<'_>) -> Result<Option<PageSize>, DecodeError> {
    let mut peek = reader.clone();
    let value = peek.be64()?;
    if value < PageSize::SIZE_4K.bytes() {
        return Ok(None);
    }
    let page = PageSize::from_bytes(value);
    if page.is_some() {
        *reader = peek;
    }
    Ok(page)
}

/// Appends a MEM_SIZE record and its list. Fields that are `Some` are written.
///
/// `ram` START is: section header, this, a multifd barrier if there are channels, end of section, footer.
pub fn encode_block_list(blocks: &[BlockAnnouncement], out: &mut Vec<u8>) {
    let total = blocks.iter().fold(0u64, |total, block| total.saturating_add(block.used_length));
    Record::MemSize { total }.encode(out);
    blocks.iter().for_each(|block| encode_block(block, out));
}

/// Appends one entry of the list, up to the mapped-ram header.
pub fn encode_block(block: &BlockAnnouncement, out: &mut Vec<u8>) {
    let name = block.name.as_str().as_bytes();
    let mut writer = Writer::new(out);
    writer.u8(name.len() as u8).bytes(name).be64(block.used_length);
    if let Some(page) = block.host_page {
        writer.be64(page.bytes());
    }
    if let Some(addr) = block.guest_addr {
        writer.be64(addr.0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::type_complexity)]
    use super::*;

    fn block(name: &str, used_length: u64) -> BlockAnnouncement {
        let name = BlockName::new(name).unwrap();
        BlockAnnouncement { name, used_length, host_page: None, guest_addr: None }
    }

    #[test]
    fn s28_s29_entries_decode_or_say_why_not() {
        let plain = ListForm::default();
        let advised = ListForm { host_pages: true, guest_addrs: false };
        let shared = ListForm { host_pages: false, guest_addrs: true };
        let huge = BlockAnnouncement { host_page: Some(PageSize::SIZE_2M), ..block("m", 0x20_0000) };
        let mapped = BlockAnnouncement { guest_addr: Some(GuestAddr(0xfffc_0000)), ..block("r", 0x1000) };
        let wrong =
            |length, why| Err(DecodeError::corrupt(2, Fault::BlockLength { name: "r".into(), length, why }));
        #[rustfmt::skip]
        let cases: &[(&str, ListForm, &[u8], Result<(BlockAnnouncement, usize), DecodeError>)] = &[
            ("plain",                  plain,   b"\x01r\0\0\0\0\0\0\x10\0",                          Ok((block("r", 4096), 10))),
            ("guest address",          shared,  b"\x01r\0\0\0\0\0\0\x10\0\0\0\0\0\xff\xfc\0\0",      Ok((mapped, 18))),
            ("huge pages",             advised, b"\x01m\0\0\0\0\0\x20\0\0\0\0\0\0\0\x20\0\0",        Ok((huge, 18))),
            ("advised, list ends",     advised, b"\x01r\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x10",        Ok((block("r", 4096), 10))),
            ("advised, barrier",       advised, b"\x01r\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x02\0",        Ok((block("r", 4096), 10))),
            ("advised, name follows",  advised, b"\x01r\0\0\0\0\0\0\x10\0\x01s\0\0\0\0\0\0",         Ok((block("r", 4096), 10))),
            ("advised, cut",           advised, b"\x01r\0\0\0\0\0\0\x10\0\x01s",                     Err(DecodeError::Truncated { needed: 18, have: 12 })),
            ("empty",                  plain,   b"\x01r\0\0\0\0\0\0\0\0",                            wrong(0, "a block cannot be empty")),
            ("half a page",            plain,   b"\x01r\0\0\0\0\0\0\x18\0",                          wrong(0x1800, "no multiple of the target page size")),
            ("above the total",        plain,   b"\x01r\0\0\0\0\x01\0\0\0",                          wrong(0x100_0000, "the blocks are longer than the announced total")),
            ("hostile length",         plain,   b"\x01r\xff\xff\xff\xff\xff\xff\xf0\0",              wrong(u64::MAX - 0xfff, "the blocks are longer than the announced total")),
            ("no name",                plain,   b"\0",                                               Err(DecodeError::corrupt(0, Fault::Name { what: "block name" }))),
            ("cut in the length",      plain,   b"\x01r\0\0",                                        Err(DecodeError::Truncated { needed: 10, have: 4 })),
        ];
        for (what, form, input, want) in cases {
            assert_eq!(decode_block(input, *form, 0x20_0000, PageSize::SIZE_4K), *want, "{what}");
        }
    }

    #[test]
    fn s28_a_list_encodes_to_its_total_and_entries() {
        let mut out = Vec::new();
        encode_block_list(&[block("ram", 0x10_0000), block("b", 0x1000)], &mut out);
        assert_eq!(out, b"\0\0\0\0\0\x10\x10\x04\x03ram\0\0\0\0\0\x10\0\0\x01b\0\0\0\0\0\0\x10\0");
    }
}
