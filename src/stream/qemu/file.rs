//! The beginning of a stream: file header and configuration section.
//!
//! ```text
//! "QEVM" be32 3   07   be32 len, machine name   { subsection }*
//! subsection := 05, u8 n, n bytes name, be32 version 1, payload
//! ```
//!
//! Neither has a length or a footer; the configuration ends when no further `05 .. "configuration/` follows.

use super::super::error::{DecodeError, Fault};
use super::super::reader::Reader;
use super::super::writer::Writer;
use crate::units::PageSize;

/// `QEVM`.
pub const MAGIC: u32 = 0x5145_564d;
/// The only stream version in use.
pub const VERSION: u32 = 3;
/// Type byte of the configuration section.
pub const CONFIGURATION: u8 = 0x07;
/// Type byte of a subsection.
pub const SUBSECTION: u8 = 0x05;
/// Bytes of magic and version.
pub const HEADER_LEN: usize = 8;
/// Longest machine name that is read, in bytes.
pub const MAX_MACHINE_NAME: u32 = 255;
/// Most capability names that are read.
pub const MAX_CAPABILITIES: u32 = 64;

const PREFIX: &str = "configuration/";
const PAGE_BITS: &str = "configuration/target-page-bits";
const CAPABILITIES: &str = "configuration/capabilities";
const UUID: &str = "configuration/uuid";

/// Capability that announces guest addresses in the block list and keeps shared blocks out of the stream.
pub const IGNORE_SHARED: &str = "x-ignore-shared";
/// Capability that gives every page a fixed place in a file.
pub const MAPPED_RAM: &str = "mapped-ram";

/// What the source announces about its machine at the start of the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    /// Resolved machine name, for instance `pc-i440fx-7.2`; 0 to 255 bytes.
    pub machine: String,
    /// Size of a target page, if the source announces it. Targets with one fixed size, such as x86, never do.
    pub page_size: Option<PageSize>,
    /// Validated capabilities that are on, in stream order. Empty: no such subsection.
    pub capabilities: Vec<String>,
    /// UUID of the VM, if capability `validate-uuid` is on.
    pub uuid: Option<[u8; 16]>,
}

impl Configuration {
    /// True if capability `name` is announced.
    pub fn has(&self, name: &str) -> bool {
        self.capabilities.iter().any(|capability| capability == name)
    }
}

/// Appends magic and version.
pub fn encode_header(out: &mut Vec<u8>) {
    Writer::new(out).be32(MAGIC).be32(VERSION);
}

/// Decodes magic and version, 8 bytes.
///
/// # Errors
///
/// [`Fault::Magic`], [`Fault::StreamVersion`]; [`DecodeError::Truncated`].
pub fn decode_header(input: &[u8]) -> Result<((), usize), DecodeError> {
    let mut reader = Reader::new(input);
    let found = reader.be32()?;
    if found != MAGIC {
        return Err(DecodeError::corrupt(0, Fault::Magic { found }));
    }
    let found = reader.be32()?;
    if found != VERSION {
        return Err(DecodeError::corrupt(4, Fault::StreamVersion { found }));
    }
    Ok(((), reader.position()))
}

/// Appends the configuration section. The machine name is cut at 255 bytes, as is each capability.
pub fn encode_configuration(config: &Configuration, out: &mut Vec<u8>) {
    let machine = clip(&config.machine);
    let mut writer = Writer::new(out);
    writer.u8(CONFIGURATION).be32(machine.len() as u32).bytes(machine);
    if let Some(page) = config.page_size {
        subsection(&mut writer, PAGE_BITS).be32(page.shift());
    }
    if !config.capabilities.is_empty() {
        subsection(&mut writer, CAPABILITIES).be32(config.capabilities.len() as u32);
        for name in &config.capabilities {
            let name = clip(name);
            writer.u8(name.len() as u8).bytes(name);
        }
    }
    if let Some(uuid) = &config.uuid {
        subsection(&mut writer, UUID).bytes(uuid);
    }
}

fn subsection<'w, 'o>(writer: &'w mut Writer<'o>, name: &str) -> &'w mut Writer<'o> {
    writer.u8(SUBSECTION).u8(name.len() as u8).bytes(name.as_bytes()).be32(1)
}

fn clip(name: &str) -> &[u8] {
    name.as_bytes().get(..MAX_MACHINE_NAME as usize).unwrap_or(name.as_bytes())
}

/// Decodes the configuration section, from its type byte to the last subsection.
///
/// Only the next bytes show whether another subsection follows, so decoding needs as many bytes of the next item as
/// distinguish the two: at least one byte must follow the section.
///
/// # Errors
///
/// [`Fault::NoConfiguration`], [`Fault::Limit`], [`Fault::Name`], [`Fault::Subsection`] (unknown or twice),
/// [`Fault::Version`], [`Fault::TargetPage`]; [`DecodeError::Truncated`].
pub fn decode_configuration(input: &[u8]) -> Result<(Configuration, usize), DecodeError> {
    let mut reader = Reader::new(input);
    let found = reader.u8()?;
    if found != CONFIGURATION {
        return Err(DecodeError::corrupt(0, Fault::NoConfiguration { found }));
    }
    let at = reader.position();
    let len = reader.be32()?;
    limit(at, "the length of the machine name", len, MAX_MACHINE_NAME)?;
    let at = reader.position();
    let machine = std::str::from_utf8(reader.bytes(len as usize)?)
        .map_err(|_| DecodeError::corrupt(at, Fault::Name { what: "machine name" }))?;
    let mut config = Configuration { machine: machine.to_owned(), ..Configuration::default() };
    while let Some((name, at)) = next_subsection(&mut reader)? {
        decode_subsection(&mut reader, name, at, &mut config)?;
    }
    Ok((config, reader.position()))
}

/// The name of the next subsection of the configuration and its offset; `None` if something else follows.
fn next_subsection<'a>(reader: &mut Reader<'a>) -> Result<Option<(&'a str, usize)>, DecodeError> {
    let mut peek = reader.clone();
    if peek.u8()? != SUBSECTION {
        return Ok(None);
    }
    let at = peek.position();
    let len = usize::from(peek.u8()?);
    let name = peek.bytes(len)?;
    if !name.starts_with(PREFIX.as_bytes()) {
        return Ok(None);
    }
    let name = std::str::from_utf8(name)
        .map_err(|_| DecodeError::corrupt(at, Fault::Name { what: "subsection name" }))?;
    *reader = peek;
    Ok(Some((name, at)))
}

fn decode_subsection(
    reader: &mut Reader<'_>,
    name: &str,
    at: usize,
    config: &mut Configuration,
) -> Result<(), DecodeError> {
    let refused = || DecodeError::corrupt(at, Fault::Subsection { name: name.into() });
    let version_at = reader.position();
    let found = reader.be32()?;
    if found != 1 {
        let fault = Fault::Version { name: name.into(), found, supported: 1 };
        return Err(DecodeError::corrupt(version_at, fault));
    }
    match name {
        PAGE_BITS if config.page_size.is_none() => {
            let at = reader.position();
            let bits = reader.be32()?;
            let bytes = 1u64.checked_shl(bits).unwrap_or(u64::MAX);
            let page = PageSize::from_bytes(bytes);
            let fault = Fault::TargetPage { found: bytes, expected: PageSize::SIZE_4K.bytes() };
            config.page_size = Some(page.ok_or_else(|| DecodeError::corrupt(at, fault))?);
        }
        CAPABILITIES if config.capabilities.is_empty() => {
            let at = reader.position();
            let count = reader.be32()?;
            limit(at, "the number of capabilities", count, MAX_CAPABILITIES)?;
            for _ in 0..count {
                config.capabilities.push(reader.name("capability name")?.to_owned());
            }
        }
        UUID if config.uuid.is_none() => config.uuid = Some(reader.array()?),
        _ => return Err(refused()),
    }
    Ok(())
}

fn limit(at: usize, what: &'static str, value: u32, limit: u32) -> Result<(), DecodeError> {
    if value > limit {
        let fault = Fault::Limit { what, value: value.into(), limit: limit.into() };
        return Err(DecodeError::corrupt(at, fault));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::type_complexity)]
    use super::*;

    const NONE: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x04none";

    fn encoded(config: &Configuration) -> Vec<u8> {
        let mut out = Vec::new();
        encode_configuration(config, &mut out);
        out
    }

    #[test]
    fn s01_header_is_qevm_and_version_3() {
        let mut out = Vec::new();
        encode_header(&mut out);
        assert_eq!(out, &NONE[..8]);
        let magic = |found| Err(DecodeError::corrupt(0, Fault::Magic { found }));
        let version = |found| Err(DecodeError::corrupt(4, Fault::StreamVersion { found }));
        #[rustfmt::skip]
        let cases: &[(&str, &[u8], Result<((), usize), DecodeError>)] = &[
            ("the real one",       NONE,                    Ok(((), 8))),
            ("other magic",        b"QEVN\0\0\0\x03",       magic(0x5145_564e)),
            ("a multifd channel",  b"\x11\x22\x33\x44",     magic(0x1122_3344)),
            ("obsolete version",   b"QEVM\0\0\0\x02",       version(2)),
            ("future version",     b"QEVM\0\0\0\x04",       version(4)),
            ("cut in the magic",   b"QEV",                  Err(DecodeError::Truncated { needed: 4, have: 3 })),
            ("cut in the version", b"QEVM\0\0",             Err(DecodeError::Truncated { needed: 8, have: 6 })),
        ];
        for (what, input, want) in cases {
            assert_eq!(decode_header(input), *want, "{what}");
        }
    }

    #[test]
    fn s02_s03_s04_configuration_round_trips_in_the_order_of_the_source() {
        let full = Configuration {
            machine: "virt-9.0".into(),
            page_size: Some(PageSize::SIZE_4K),
            capabilities: vec!["x-ignore-shared".into(), "mapped-ram".into()],
            uuid: Some(*b"0123456789abcdef"),
        };
        for config in [
            Configuration { machine: "none".into(), ..Configuration::default() },
            Configuration::default(),
            full.clone(),
        ] {
            let mut bytes = encoded(&config);
            let len = bytes.len();
            bytes.push(0x08);
            assert_eq!(decode_configuration(&bytes), Ok((config, len)));
        }
        let uuid_only = Configuration { uuid: full.uuid, machine: "none".into(), ..Configuration::default() };
        assert_eq!(
            encoded(&uuid_only),
            b"\x07\0\0\0\x04none\x05\x12configuration/uuid\0\0\0\x010123456789abcdef"
        );
        assert_eq!(
            encoded(&Configuration { machine: "none".into(), ..Configuration::default() }),
            &NONE[8..]
        );
    }

    #[test]
    fn s03_configuration_refuses_what_it_does_not_know() {
        let none = Configuration { machine: "m".into(), ..Configuration::default() };
        let ok = |used| Ok((none.clone(), used));
        let bad = |at, fault| Err(DecodeError::corrupt(at, fault));
        let capped = |what, value, limit| Fault::Limit { what, value, limit };
        let bits =
            [&b"\x07\0\0\0\x01m\x05\x1econfiguration/target-page-bits\0\0\0\x01"[..], &[0, 0, 0, 9]].concat();
        #[rustfmt::skip]
        let cases: &[(&str, &[u8], Result<(Configuration, usize), DecodeError>)] = &[
            ("an item follows",        b"\x07\0\0\0\x01m\x01",             ok(6)),
            ("a foreign subsection",   b"\x07\0\0\0\x01m\x05\x03abc",      ok(6)),
            ("no configuration",       b"\x01\0\0\0\x01m\x01",             bad(0, Fault::NoConfiguration { found: 1 })),
            ("machine name too long",  b"\x07\0\0\x01\x00",                bad(1, capped("the length of the machine name", 256, 255))),
            ("machine name no text",   b"\x07\0\0\0\x01\xff\x01",          bad(5, Fault::Name { what: "machine name" })),
            ("unknown subsection",     b"\x07\0\0\0\x01m\x05\x0fconfiguration/x\0\0\0\x01", bad(7, Fault::Subsection { name: "configuration/x".into() })),
            ("future subsection",      b"\x07\0\0\0\x01m\x05\x12configuration/uuid\0\0\0\x02", bad(26, Fault::Version { name: "configuration/uuid".into(), found: 2, supported: 1 })),
            ("65 capabilities",        b"\x07\0\0\0\x01m\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x41", bad(38, capped("the number of capabilities", 65, 64))),
            ("512-byte pages",         &bits,                              bad(42, Fault::TargetPage { found: 512, expected: 4096 })),
            ("what follows is open",   b"\x07\0\0\0\x01m",                 Err(DecodeError::Truncated { needed: 7, have: 6 })),
            ("cut in a subsection",    b"\x07\0\0\0\x01m\x05\x12conf",     Err(DecodeError::Truncated { needed: 26, have: 12 })),
        ];
        for (what, input, want) in cases {
            assert_eq!(decode_configuration(input), *want, "{what}");
        }
    }
}
