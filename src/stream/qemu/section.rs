//! Items of the main stream: section headers and footers, end of file, VM description.
//!
//! | byte | item | layout after it |
//! |------|------|-----------------|
//! | 00 | end of file | nothing |
//! | 01 | START | be32 id, counted idstr, be32 instance, be32 version, payload, footer |
//! | 02, 03 | PART, END | be32 id, payload, footer |
//! | 04 | FULL | as START |
//! | 06 | VM description | be32 length, JSON; only after the end of file |
//! | 08 | command | see [`command`](super::command) |
//! | 7e | footer | be32 id of the section it ends |
//!
//! Sections carry no length: the content between header and footer must be parsed to skip it.

use super::super::error::{DecodeError, Fault};
use super::super::reader::Reader;
use super::super::writer::Writer;

/// Type byte: the items end here.
pub const EOF: u8 = 0x00;
/// Type byte: first section of an iterable.
pub const START: u8 = 0x01;
/// Type byte: a further section of an iterable, while the guest runs.
pub const PART: u8 = 0x02;
/// Type byte: last section of an iterable.
pub const END: u8 = 0x03;
/// Type byte: whole state of a device.
pub const FULL: u8 = 0x04;
/// Type byte: description of the device sections as JSON.
pub const VM_DESCRIPTION: u8 = 0x06;
/// Type byte: a command.
pub const COMMAND: u8 = 0x08;
/// Type byte of a footer.
pub const FOOTER: u8 = 0x7e;

/// Bytes of the header of a PART or END section.
pub const PART_LEN: usize = 5;
/// Bytes of a footer.
pub const FOOTER_LEN: usize = 5;

/// What a source puts around its sections.
///
/// The stream does not announce it. A QEMU follows its machine type (up to 2.3 it writes neither), or its properties
/// `migration.send-configuration` and `migration.send-section-footer`, and its destination must be configured alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Framing {
    /// A configuration section follows the file header.
    pub configuration: bool,
    /// Each section ends with a footer.
    pub footers: bool,
}

impl Default for Framing {
    /// Both.
    fn default() -> Self {
        Self { configuration: true, footers: true }
    }
}

impl Framing {
    /// Appends the footer of section `id`, if there are footers.
    pub fn encode_footer(self, id: u32, out: &mut Vec<u8>) {
        if self.footers {
            encode_footer(id, out);
        }
    }

    /// Decodes the footer of section `id`: 5 bytes, or none.
    ///
    /// # Errors
    ///
    /// As the function `decode_footer`.
    pub fn decode_footer(self, input: &[u8], id: u32) -> Result<((), usize), DecodeError> {
        if self.footers { decode_footer(input, id) } else { Ok(((), 0)) }
    }

    /// Bytes of a footer: 5 or 0.
    pub fn footer_len(self) -> usize {
        if self.footers { FOOTER_LEN } else { 0 }
    }
}

/// Which of the four kinds a section is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The first section of an iterable, which binds the id.
    Start,
    /// One of any number of sections while the guest runs.
    Part,
    /// The last one.
    End,
    /// The only section of a device.
    Full,
}

/// Header of a START or FULL section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionName<'a> {
    /// Chosen by the sender, unique in the stream.
    pub id: u32,
    /// The owner of the section, 1 to 255 bytes.
    pub idstr: &'a str,
    /// Distinguishes equal names.
    pub instance: u32,
    /// Version of the payload's format.
    pub version: u32,
}

/// The next item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// The items end.
    Eof,
    /// START: the payload follows.
    Start(SectionName<'a>),
    /// PART of the section with this id: the payload follows.
    Part(u32),
    /// END of the section with this id: the payload follows.
    End(u32),
    /// FULL: the payload follows.
    Full(SectionName<'a>),
    /// A VM description of this many bytes follows.
    VmDescription(u32),
    /// A command; none of its bytes have been consumed, not even the type byte.
    Command,
}

/// Decodes the header of the next item: 1 to 269 bytes, 0 for a command, which is left in place.
///
/// # Errors
///
/// [`Fault::Item`] for any other type byte, [`Fault::Name`] for an empty or malformed idstr;
/// [`DecodeError::Truncated`].
pub fn decode_item(input: &[u8]) -> Result<(Item<'_>, usize), DecodeError> {
    let mut reader = Reader::new(input);
    let item = match reader.u8()? {
        EOF => Item::Eof,
        START => Item::Start(section_name(&mut reader)?),
        PART => Item::Part(reader.be32()?),
        END => Item::End(reader.be32()?),
        FULL => Item::Full(section_name(&mut reader)?),
        VM_DESCRIPTION => Item::VmDescription(reader.be32()?),
        COMMAND => return Ok((Item::Command, 0)),
        found => return Err(DecodeError::corrupt(0, Fault::Item { found })),
    };
    Ok((item, reader.position()))
}

fn section_name<'a>(reader: &mut Reader<'a>) -> Result<SectionName<'a>, DecodeError> {
    let id = reader.be32()?;
    let idstr = reader.name("section name")?;
    Ok(SectionName { id, idstr, instance: reader.be32()?, version: reader.be32()? })
}

/// Decodes the footer of section `id`, 5 bytes.
///
/// # Errors
///
/// [`Fault::NoFooter`], [`Fault::Footer`]; [`DecodeError::Truncated`].
pub fn decode_footer(input: &[u8], id: u32) -> Result<((), usize), DecodeError> {
    let mut reader = Reader::new(input);
    let found = reader.u8()?;
    if found != FOOTER {
        return Err(DecodeError::corrupt(0, Fault::NoFooter { id, found }));
    }
    let found = reader.be32()?;
    if found != id {
        return Err(DecodeError::corrupt(1, Fault::Footer { id, found }));
    }
    Ok(((), reader.position()))
}

/// Appends the header of a START section. The idstr is 1 to 255 bytes.
pub fn encode_start(name: &SectionName<'_>, out: &mut Vec<u8>) {
    encode_name(START, name, out);
}

/// Appends the header of a FULL section. The idstr is 1 to 255 bytes.
pub fn encode_full(name: &SectionName<'_>, out: &mut Vec<u8>) {
    encode_name(FULL, name, out);
}

fn encode_name(kind: u8, name: &SectionName<'_>, out: &mut Vec<u8>) {
    debug_assert!((1..=255).contains(&name.idstr.len()));
    let idstr = name.idstr.as_bytes();
    let idstr = idstr.get(..255).unwrap_or(idstr);
    let mut writer = Writer::new(out);
    writer.u8(kind).be32(name.id).u8(idstr.len() as u8).bytes(idstr);
    writer.be32(name.instance).be32(name.version);
}

/// Appends the header of a PART section.
pub fn encode_part(id: u32, out: &mut Vec<u8>) {
    Writer::new(out).u8(PART).be32(id);
}

/// Appends the header of an END section.
pub fn encode_end(id: u32, out: &mut Vec<u8>) {
    Writer::new(out).u8(END).be32(id);
}

/// Appends the footer of section `id`.
pub fn encode_footer(id: u32, out: &mut Vec<u8>) {
    Writer::new(out).u8(FOOTER).be32(id);
}

/// Appends the end of the items.
pub fn encode_eof(out: &mut Vec<u8>) {
    Writer::new(out).u8(EOF);
}

/// Appends a VM description, which follows the end of the items. It is cut at 4 GiB.
pub fn encode_vm_description(json: &[u8], out: &mut Vec<u8>) {
    let len = u32::try_from(json.len()).unwrap_or(u32::MAX);
    let json = json.get(..len as usize).unwrap_or(json);
    Writer::new(out).u8(VM_DESCRIPTION).be32(len).bytes(json);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::type_complexity)]
    use super::*;

    #[test]
    fn s06_s10_items_decode_or_say_why_not() {
        let ram = SectionName { id: 2, idstr: "ram", instance: 0, version: 4 };
        #[rustfmt::skip]
        let cases: &[(&str, &[u8], Result<(Item<'_>, usize), DecodeError>)] = &[
            ("end of file",       b"\0X",                                     Ok((Item::Eof, 1))),
            ("START",             b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04", Ok((Item::Start(ram), 17))),
            ("FULL",              b"\x04\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04", Ok((Item::Full(ram), 17))),
            ("PART",              b"\x02\0\0\0\x77",                          Ok((Item::Part(0x77), 5))),
            ("END",               b"\x03\0\0\0\x02",                          Ok((Item::End(2), 5))),
            ("VM description",    b"\x06\0\0\x01\0{",                         Ok((Item::VmDescription(256), 5))),
            ("command",           b"\x08\0\x01",                              Ok((Item::Command, 0))),
            ("empty idstr",       b"\x01\0\0\0\x02\0",                        Err(DecodeError::corrupt(5, Fault::Name { what: "section name" }))),
            ("a lone subsection", b"\x05",                                    Err(DecodeError::corrupt(0, Fault::Item { found: 5 }))),
            ("configuration",     b"\x07",                                    Err(DecodeError::corrupt(0, Fault::Item { found: 7 }))),
            ("a lone footer",     b"\x7e\0\0\0\x02",                          Err(DecodeError::corrupt(0, Fault::Item { found: 0x7e }))),
            ("unknown",           b"\x09",                                    Err(DecodeError::corrupt(0, Fault::Item { found: 9 }))),
            ("nothing yet",       b"",                                        Err(DecodeError::Truncated { needed: 1, have: 0 })),
            ("cut in the idstr",  b"\x01\0\0\0\x02\x03ra",                    Err(DecodeError::Truncated { needed: 9, have: 8 })),
            ("cut in the version", b"\x01\0\0\0\x02\x03ram\0\0\0\0\0",        Err(DecodeError::Truncated { needed: 17, have: 14 })),
        ];
        for (what, input, want) in cases {
            assert_eq!(decode_item(input), *want, "{what}");
        }
    }

    #[test]
    fn s06_s07_headers_encode_to_what_decodes() {
        let ram = SectionName { id: 2, idstr: "ram", instance: 0, version: 4 };
        let mut out = Vec::new();
        encode_start(&ram, &mut out);
        encode_full(&ram, &mut out);
        encode_part(2, &mut out);
        encode_end(2, &mut out);
        encode_footer(2, &mut out);
        encode_eof(&mut out);
        encode_vm_description(b"{}", &mut out);
        let mut rest = &out[..];
        for want in [Item::Start(ram), Item::Full(ram), Item::Part(2), Item::End(2)] {
            let (item, used) = decode_item(rest).unwrap();
            assert_eq!(item, want);
            rest = &rest[used..];
        }
        assert_eq!(decode_footer(rest, 2), Ok(((), FOOTER_LEN)));
        assert_eq!(&rest[5..], b"\0\x06\0\0\0\x02{}");
    }

    #[test]
    fn s08_a_footer_must_be_there_and_name_its_section() {
        let footer = |id, found| Err(DecodeError::corrupt(1, Fault::Footer { id, found }));
        #[rustfmt::skip]
        let cases: &[(&str, &[u8], Result<((), usize), DecodeError>)] = &[
            ("right",         b"\x7e\0\0\0\x02", Ok(((), 5))),
            ("other section", b"\x7e\0\0\0\x03", footer(2, 3)),
            ("none",          b"\x02\0\0\0\x02", Err(DecodeError::corrupt(0, Fault::NoFooter { id: 2, found: 2 }))),
            ("cut",           b"\x7e\0",         Err(DecodeError::Truncated { needed: 5, have: 2 })),
        ];
        for (what, input, want) in cases {
            assert_eq!(decode_footer(input, 2), *want, "{what}");
        }
    }
}
