//! Packets of the multifd channels.
//!
//! A channel begins with an initial packet of 64 bytes. Packets follow: a header of fixed size, then the pages that it
//! lists. All pages of a packet belong to one block.
//!
//! ```text
//!   0 be32 magic 0x11223344        24 be64 packet number
//!   4 be32 version 1               32 be32 zero pages
//!   8 be32 flags                   36 28 bytes unused
//!  12 be32 room for pages          64 256 bytes block name, NUL padded
//!  16 be32 normal pages           320 be64 offset of each normal, then of each zero page; always P entries
//!  20 be32 bytes that follow
//! ```
//!
//! P is the number of pages in 512 KiB. Data on different channels is not ordered; a SYNC packet on each channel pairs
//! with a barrier on the main channel. [`channel`](super::channel) parses one channel.

use super::super::error::{DecodeError, Fault};
use super::super::reader::Reader;
use super::super::writer::Writer;
use crate::units::{BlockOffset, PageSize};

/// First word of every packet.
pub const MAGIC: u32 = 0x1122_3344;
/// Second word of every packet.
pub const VERSION: u32 = 1;
/// Bytes of the initial packet.
pub const INIT_LEN: usize = 64;
/// Maximum number of bytes of pages that one packet lists.
pub const PACKET_BYTES: u64 = 512 << 10;
/// Longest compressed payload that is accepted.
pub const MAX_COMPRESSED: u32 = 1 << 20;

const SYNC: u32 = 0x01;
const METHOD: u32 = 0x3e;
const DEVICE_STATE: u32 = 0x40;
const NAME_AT: usize = 64;
const NAME_LEN: usize = 256;
const OFFSETS_AT: usize = NAME_AT + NAME_LEN;

/// How the pages of a channel are compressed. Both sides must be configured alike; a packet only repeats the setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Not at all.
    Plain,
    /// One zlib stream for the life of the channel.
    Zlib,
    /// One zstd frame for the life of the channel.
    Zstd,
}

impl Method {
    fn bits(self) -> u32 {
        match self {
            Self::Plain => 0x00,
            Self::Zlib => 0x02,
            Self::Zstd => 0x04,
        }
    }
}

/// QEMU's name (MultiFDCompression) of what a packet's flags say.
fn method_name(bits: u32) -> &'static str {
    match bits {
        0x00 => "none",
        0x02 => "zlib",
        0x04 => "zstd",
        0x08 => "qpl",
        0x10 => "uadk",
        0x20 => "qatzip",
        _ => "an unknown method",
    }
}

/// The initial packet of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Init {
    /// UUID of the VM; zero if it has none.
    pub uuid: [u8; 16],
    /// Number of the channel, from 0.
    pub id: u8,
}

/// Decodes the initial packet, 64 bytes. `uuid` is the UUID of the local VM, zero if it has none; `None` takes any. Ids
/// are below `channels`. The caller checks that no id comes twice.
///
/// # Errors
///
/// [`Fault::Multifd`]; [`DecodeError::Truncated`].
pub fn decode_init(
    input: &[u8],
    uuid: Option<&[u8; 16]>,
    channels: u8,
) -> Result<(Init, usize), DecodeError> {
    let mut reader = Reader::new(input);
    magic(&mut reader)?;
    let at = reader.position();
    let init = Init { uuid: reader.array()?, id: reader.u8()? };
    reader.array::<39>()?;
    if uuid.is_some_and(|uuid| init.uuid != *uuid) {
        return Err(DecodeError::corrupt(at, Fault::Multifd("the channel belongs to a VM of another UUID")));
    }
    if init.id >= channels {
        return Err(DecodeError::corrupt(
            24,
            Fault::Multifd("the channel's number exceeds the number of channels"),
        ));
    }
    Ok((init, reader.position()))
}

/// Appends the initial packet.
pub fn encode_init(init: &Init, out: &mut Vec<u8>) {
    let mut writer = Writer::new(out);
    writer.be32(MAGIC).be32(VERSION).bytes(&init.uuid).u8(init.id).bytes(&[0; 39]);
}

fn magic(reader: &mut Reader<'_>) -> Result<(), DecodeError> {
    let at = reader.position();
    if reader.be32()? != MAGIC {
        return Err(DecodeError::corrupt(at, Fault::Multifd("no packet begins here")));
    }
    if reader.be32()? != VERSION {
        return Err(DecodeError::corrupt(at + 4, Fault::Multifd("the packet has an unknown version")));
    }
    Ok(())
}

/// Maximum number of pages that one packet lists: 128 of 4 KiB.
pub const fn packet_pages(page: PageSize) -> u64 {
    PACKET_BYTES >> page.shift()
}

/// Bytes of a packet's header: 1344 for 4 KiB pages.
pub const fn header_len(page: PageSize) -> usize {
    OFFSETS_AT + 8 * packet_pages(page) as usize
}

/// Header of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'a> {
    /// The channel stops after this packet until the main channel has reached its barrier.
    pub sync: bool,
    /// Counts packets over all channels: [`packet_numbers`](super::packet_numbers).
    pub number: u64,
    /// Pages of this packet; `None` if it has none.
    pub pages: Option<Pages<'a>>,
}

/// The pages of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages<'a> {
    /// Name of their block.
    pub block: &'a str,
    /// Bytes that follow the header: the normal pages, uncompressed or compressed.
    pub payload: u32,
    normal: &'a [[u8; 8]],
    zero: &'a [[u8; 8]],
}

impl<'a> Pages<'a> {
    /// Offsets of the pages whose bytes follow, in that order. Neither bounds nor alignment are checked.
    pub fn normal(&self) -> impl ExactSizeIterator<Item = BlockOffset> + 'a {
        self.normal.iter().map(|offset| BlockOffset(u64::from_be_bytes(*offset)))
    }

    /// Offsets of the pages that are zero. Neither bounds nor alignment are checked.
    pub fn zero(&self) -> impl ExactSizeIterator<Item = BlockOffset> + 'a {
        self.zero.iter().map(|offset| BlockOffset(u64::from_be_bytes(*offset)))
    }
}

/// Decodes the header of a packet: [`header_len`] bytes; [`Pages::payload`] bytes follow.
///
/// In a packet without pages only flags and number are read: old senders leave stale values in the rest.
///
/// # Errors
///
/// [`Fault::Multifd`] for every violation of the format, including device-state packets; [`Fault::OtherCompression`];
/// [`Fault::Limit`] for a payload above [`MAX_COMPRESSED`]; [`DecodeError::Truncated`].
pub fn decode_packet(
    input: &[u8],
    page: PageSize,
    method: Method,
) -> Result<(Packet<'_>, usize), DecodeError> {
    let mut reader = Reader::new(input);
    magic(&mut reader)?;
    let wrong = |at, what| Err(DecodeError::corrupt(at, Fault::Multifd(what)));
    let flags = reader.be32()?;
    if flags & DEVICE_STATE != 0 {
        return wrong(8, "the packet holds device state: migrate without multifd for VFIO devices");
    }
    if flags & !(SYNC | METHOD) != 0 {
        return wrong(8, "the packet has unknown flags");
    }
    let (room, normal, payload) = (reader.be32()?, reader.be32()?, reader.be32()?);
    let number = reader.be64()?;
    let zero = reader.be32()?;
    let head = input.get(..header_len(page));
    let head = head.ok_or(DecodeError::Truncated { needed: header_len(page), have: input.len() })?;
    if u64::from(room) > packet_pages(page) {
        return wrong(12, "the packet has room for more pages than a packet can have");
    }
    if u64::from(normal) + u64::from(zero) > u64::from(room) {
        return wrong(16, "the packet lists more pages than it has room for");
    }
    let mut packet = Packet { sync: flags & SYNC != 0, number, pages: None };
    if normal + zero > 0 {
        if flags & METHOD != method.bits() {
            let (theirs, ours) = (method_name(flags & METHOD), method_name(method.bits()));
            return Err(DecodeError::corrupt(8, Fault::OtherCompression { theirs, ours }));
        }
        let payload = checked_payload(payload, normal, page, method)?;
        let (offsets, _) = head.get(OFFSETS_AT..).unwrap_or(&[]).as_chunks::<8>();
        let (normal, rest) = offsets.split_at_checked(normal as usize).unwrap_or((&[], &[]));
        let zero = rest.get(..zero as usize).unwrap_or(&[]);
        packet.pages = Some(Pages { block: name(head)?, payload, normal, zero });
    }
    Ok((packet, head.len()))
}

/// Length of the payload of a packet with `normal` pages; the announced number must fit them.
fn checked_payload(payload: u32, normal: u32, page: PageSize, method: Method) -> Result<u32, DecodeError> {
    if normal == 0 {
        return Ok(0);
    }
    if method == Method::Plain {
        let whole = u64::from(normal) << page.shift();
        if u64::from(payload) != whole {
            return Err(DecodeError::corrupt(
                20,
                Fault::Multifd("the payload is not the length of its pages"),
            ));
        }
    } else if payload == 0 || payload > MAX_COMPRESSED {
        let (value, limit) = (payload.into(), MAX_COMPRESSED.into());
        let what = "the length of a compressed multifd packet";
        return Err(DecodeError::corrupt(20, Fault::Limit { what, value, limit }));
    }
    Ok(payload)
}

/// The block name: up to the first NUL; the last byte always is one.
fn name(head: &[u8]) -> Result<&str, DecodeError> {
    let field = head.get(NAME_AT..OFFSETS_AT - 1).unwrap_or(&[]);
    let name = field.split(|byte| *byte == 0).next().unwrap_or(&[]);
    let text = std::str::from_utf8(name).ok().filter(|name| !name.is_empty());
    text.ok_or_else(|| DecodeError::corrupt(NAME_AT, Fault::Name { what: "block name" }))
}

/// Content of a packet to write.
#[derive(Clone, Copy, Debug)]
pub struct NewPacket<'a> {
    /// Counts packets over all channels.
    pub number: u64,
    /// How the channel is compressed.
    pub method: Method,
    /// Name of the block, 1 to 255 bytes.
    pub block: &'a str,
    /// Pages whose bytes follow, at most [`packet_pages`] together with `zero`.
    pub normal: &'a [BlockOffset],
    /// Pages that are zero. Only for peers that support this: others lose them silently.
    pub zero: &'a [BlockOffset],
    /// Bytes that follow.
    pub payload: u32,
}

/// Appends the header of a packet with pages. Offsets beyond [`packet_pages`] are left out, so the caller must split.
pub fn encode_packet(packet: &NewPacket<'_>, page: PageSize, out: &mut Vec<u8>) {
    let room = packet_pages(page) as usize;
    debug_assert!(packet.normal.len() + packet.zero.len() <= room && packet.block.len() < NAME_LEN);
    let normal = packet.normal.get(..room).unwrap_or(packet.normal);
    let zero = packet.zero.get(..room - normal.len()).unwrap_or(packet.zero);
    let end = out.len() + header_len(page);
    let mut writer = Writer::new(out);
    writer.be32(MAGIC).be32(VERSION).be32(packet.method.bits()).be32(room as u32);
    writer.be32(normal.len() as u32).be32(packet.payload).be64(packet.number);
    writer.be32(zero.len() as u32).bytes(&[0; 28]);
    let name = packet.block.as_bytes();
    let name = name.get(..NAME_LEN - 1).unwrap_or(name);
    writer.bytes(name).bytes(&[0; NAME_LEN][name.len()..]);
    for offset in normal.iter().chain(zero) {
        writer.be64(offset.0);
    }
    out.resize(end, 0);
}

/// Appends a SYNC packet, which has no pages.
pub fn encode_sync(number: u64, page: PageSize, out: &mut Vec<u8>) {
    let end = out.len() + header_len(page);
    Writer::new(out).be32(MAGIC).be32(VERSION).be32(SYNC).bytes(&[0; 12]).be64(number);
    out.resize(end, 0);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const PAGE: PageSize = PageSize::SIZE_4K;

    fn packet(method: Method, payload: u32) -> Vec<u8> {
        let mut out = Vec::new();
        let (normal, zero) = ([BlockOffset(0x3000), BlockOffset(0x1000)], [BlockOffset(0x8000)]);
        let new = NewPacket { number: 5, method, block: "pc.ram", normal: &normal, zero: &zero, payload };
        encode_packet(&new, PAGE, &mut out);
        out
    }

    fn fault(result: Result<(Packet<'_>, usize), DecodeError>) -> (u64, Fault) {
        match result {
            Err(DecodeError::Corrupt(corrupt)) => (corrupt.at, corrupt.fault),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn s38_the_initial_packet_names_vm_and_channel() {
        let mut out = Vec::new();
        encode_init(&Init { uuid: [7; 16], id: 1 }, &mut out);
        assert_eq!(out.len(), INIT_LEN);
        assert_eq!(decode_init(&out, Some(&[7; 16]), 2), Ok((Init { uuid: [7; 16], id: 1 }, 64)));
        assert_eq!(
            decode_init(&out[..63], Some(&[7; 16]), 2),
            Err(DecodeError::Truncated { needed: 64, have: 63 })
        );
        #[rustfmt::skip]
        let cases: &[(&str, usize, [u8; 16], u8, u64)] = &[
            ("other VM",            0, [0; 16], 2, 8),
            ("id = N",              0, [7; 16], 1, 24),
            ("a main channel",      1, [7; 16], 2, 0),
            ("version 2",           8, [7; 16], 2, 4),
        ];
        for (what, flip_before, uuid, channels, at) in cases {
            let mut bad = out.clone();
            if *flip_before > 0 {
                bad[flip_before - 1] ^= 3;
            }
            let error = decode_init(&bad, Some(uuid), *channels).unwrap_err();
            assert!(
                matches!(error, DecodeError::Corrupt(ref corrupt) if corrupt.at == *at),
                "{what}: {error}"
            );
        }
    }

    #[test]
    fn s39_s41_headers_have_one_size_and_round_trip() {
        let out = packet(Method::Plain, 8192);
        assert_eq!((out.len(), header_len(PAGE), packet_pages(PAGE)), (1344, 1344, 128));
        let (decoded, used) = decode_packet(&out, PAGE, Method::Plain).unwrap();
        let pages = decoded.pages.unwrap();
        assert_eq!(
            (used, decoded.sync, decoded.number, pages.block, pages.payload),
            (1344, false, 5, "pc.ram", 8192)
        );
        assert_eq!(pages.normal().collect::<Vec<_>>(), [BlockOffset(0x3000), BlockOffset(0x1000)]);
        assert_eq!(pages.zero().collect::<Vec<_>>(), [BlockOffset(0x8000)]);

        let mut sync = Vec::new();
        encode_sync(9, PAGE, &mut sync);
        let decoded = decode_packet(&sync, PAGE, Method::Zlib).unwrap();
        assert_eq!(decoded, (Packet { sync: true, number: 9, pages: None }, 1344));
        sync[23] = 77;
        assert_eq!(
            decode_packet(&sync, PAGE, Method::Plain).unwrap().0.pages,
            None,
            "a stale size means nothing"
        );
    }

    #[test]
    fn s40_s48_s51_what_the_rules_forbid_is_refused() {
        #[rustfmt::skip]
        let cases: &[(&str, usize, u8, u64)] = &[
            ("magic",                    0,   0x12, 0),
            ("version",                  7,   2,    4),
            ("unknown flag",             10,  1,    8),
            ("device state",             11,  0x40, 8),
            ("zlib, not configured",     11,  0x02, 8),
            ("room for 129 pages",       15,  129,  12),
            ("more pages than room",     15,  2,    16),
            ("2^24 zero pages",          32,  1,    16),
            ("payload of another size",  22,  0x30, 20),
            ("no block name",            64,  0,    64),
            ("a name that is no text",   64,  0xff, 64),
        ];
        for (what, at, byte, want) in cases {
            let mut bad = packet(Method::Plain, 8192);
            bad[*at] = *byte;
            assert_eq!(fault(decode_packet(&bad, PAGE, Method::Plain)).0, *want, "{what}");
        }
        for payload in [0, MAX_COMPRESSED + 1] {
            let (at, fault) = fault(decode_packet(&packet(Method::Zlib, payload), PAGE, Method::Zlib));
            assert!(at == 20 && matches!(fault, Fault::Limit { .. }), "{payload}");
        }
        let whole = packet(Method::Plain, 8192);
        for cut in 0..whole.len() {
            assert!(decode_packet(&whole[..cut], PAGE, Method::Plain).unwrap_err().is_truncated(), "{cut}");
        }
    }
}
