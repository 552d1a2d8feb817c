//! Commands to the destination, between the sections.
//!
//! `08, be16 number, be16 length, body`. A command has no section id and no footer. Numbers and body lengths are fixed;
//! a receiver refuses any others.
//!
//! To add a command: a variant, its number in `number`, its body in `encode` and in `decode_body`.

use super::super::error::{DecodeError, Fault};
use super::super::native::{self, Order};
use super::super::reader::Reader;
use super::super::writer::Writer;
use super::section::COMMAND;

/// Maximum number of ranges that a sender puts into one discard command.
pub const MAX_DISCARD_RANGES: usize = 12;
/// Bytes before a command's body: type byte, number and length.
pub const HEAD_LEN: usize = 5;

/// A command from the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Command<'a> {
    /// The connection is bidirectional: answer on it.
    OpenReturnPath,
    /// Answer with a PONG of the same value.
    Ping(u32),
    /// Postcopy of dirty bitmaps only, not of RAM.
    PostcopyAdviseBitmaps,
    /// Postcopy of RAM may follow.
    PostcopyAdvise {
        /// Host page sizes of all blocks, ORed, in bytes.
        host_pages: u64,
        /// Target page size in bytes.
        target_page: u64,
    },
    /// A second reader takes over the connection; from here on the destination may request pages.
    PostcopyListen,
    /// The guest starts at the destination.
    PostcopyRun,
    /// Discard ranges of a block: they will be sent again.
    PostcopyRamDiscard(Discard<'a>),
    /// `size` bytes follow *after* the command: a stream of items that must be received whole before it is processed.
    Packaged {
        /// Length of the package in bytes.
        size: u32,
    },
    /// Checkpointing follows the first migration.
    EnableColo,
    /// Recovery: go on.
    PostcopyResume,
    /// Recovery: send the received bitmap of the block.
    RecvBitmap {
        /// Name of the block.
        block: &'a str,
    },
    /// The VM has stopped; the last part follows. Only newer peers support this command.
    SwitchoverStart,
    /// Between ramwire ends only.
    Native(Order<'a>),
}

/// Ranges of one block to discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard<'a> {
    block: &'a str,
    ranges: &'a [u8],
}

impl<'a> Discard<'a> {
    /// Name of the block.
    pub fn block(&self) -> &'a str {
        self.block
    }

    /// The ranges as `(start, length)` in bytes. Their bounds are not checked here: the blocks are not known.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = (u64, u64)> + 'a {
        let word = |bytes: &[u8]| bytes.iter().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        self.ranges.chunks_exact(16).map(move |range| {
            let (start, length) = range.split_at(8);
            (word(start), word(length))
        })
    }
}

impl Command<'_> {
    /// The number on the wire.
    pub fn number(&self) -> u16 {
        match self {
            Self::OpenReturnPath => 1,
            Self::Ping(_) => 2,
            Self::PostcopyAdviseBitmaps | Self::PostcopyAdvise { .. } => 3,
            Self::PostcopyListen => 4,
            Self::PostcopyRun => 5,
            Self::PostcopyRamDiscard(_) => 6,
            Self::Packaged { .. } => 7,
            Self::EnableColo => 8,
            Self::PostcopyResume => 9,
            Self::RecvBitmap { .. } => 10,
            Self::SwitchoverStart => 11,
            Self::Native(order) => order.number(),
        }
    }

    /// The command's name in QEMU's documentation and logs.
    pub fn name(&self) -> &'static str {
        name_of(self.number()).unwrap_or("an unnamed command")
    }

    /// Appends the command, type byte included. The bytes of a package are appended by the caller.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        let mut writer = Writer::new(out);
        writer.u8(COMMAND).be16(self.number()).be16(0);
        match self {
            Self::Ping(value) => {
                writer.be32(*value);
            }
            Self::PostcopyAdvise { host_pages, target_page } => {
                writer.be64(*host_pages).be64(*target_page);
            }
            Self::PostcopyRamDiscard(discard) => {
                writer.u8(0);
                name(&mut writer, discard.block).u8(0).bytes(discard.ranges);
            }
            Self::Packaged { size } => {
                writer.be32(*size);
            }
            Self::RecvBitmap { block } => {
                name(&mut writer, block);
            }
            Self::Native(order) => order.encode_body(out),
            Self::OpenReturnPath
            | Self::PostcopyAdviseBitmaps
            | Self::PostcopyListen
            | Self::PostcopyRun
            | Self::EnableColo
            | Self::PostcopyResume
            | Self::SwitchoverStart => {}
        }
        patch_length(out, start);
    }
}

/// Appends a discard of `ranges`, each `(start, length)` in bytes of `block`; at most [`MAX_DISCARD_RANGES`] of them
/// go into one command, so several commands may be written.
pub fn encode_discards(block: &str, ranges: &[(u64, u64)], out: &mut Vec<u8>) {
    for ranges in ranges.chunks(MAX_DISCARD_RANGES) {
        let mut packed = Vec::with_capacity(16 * MAX_DISCARD_RANGES);
        for (start, length) in ranges {
            Writer::new(&mut packed).be64(*start).be64(*length);
        }
        Command::PostcopyRamDiscard(Discard { block, ranges: &packed }).encode(out);
    }
}

fn name<'w, 'o>(writer: &'w mut Writer<'o>, block: &str) -> &'w mut Writer<'o> {
    let bytes = block.as_bytes().get(..255).unwrap_or(block.as_bytes());
    writer.u8(bytes.len() as u8).bytes(bytes)
}

/// Fills in the length of the command that begins at `start`. All bodies are below 64 KiB.
fn patch_length(out: &mut [u8], start: usize) {
    let len = (out.len() - start - HEAD_LEN) as u16;
    if let Some(field) = out.get_mut(start + 3..start + HEAD_LEN) {
        field.copy_from_slice(&len.to_be_bytes());
    }
}

/// Decodes a command, from its type byte to the end of its body: 5 to 65540 bytes.
///
/// # Errors
///
/// [`Fault::Item`] if the type byte is another, [`Fault::Command`] for a number that does not exist,
/// [`Fault::Body`] for a wrong length or malformed body; [`DecodeError::Truncated`].
pub fn decode_command(input: &[u8]) -> Result<(Command<'_>, usize), DecodeError> {
    let mut reader = Reader::new(input);
    let found = reader.u8()?;
    if found != COMMAND {
        return Err(DecodeError::corrupt(0, Fault::Item { found }));
    }
    let number = reader.be16()?;
    let len = reader.be16()?;
    let what = name_of(number).ok_or_else(|| DecodeError::corrupt(1, Fault::Command { number }))?;
    let malformed = || DecodeError::corrupt(HEAD_LEN, Fault::Body { what, len });
    if fixed_length(number).is_some_and(|fixed| fixed != len) {
        return Err(malformed());
    }
    let body = reader.bytes(usize::from(len))?;
    let command = decode_body(number, body).ok_or_else(malformed)?;
    Ok((command, reader.position()))
}

fn name_of(number: u16) -> Option<&'static str> {
    Some(match number {
        1 => "OPEN_RETURN_PATH",
        2 => "PING",
        3 => "POSTCOPY_ADVISE",
        4 => "POSTCOPY_LISTEN",
        5 => "POSTCOPY_RUN",
        6 => "POSTCOPY_RAM_DISCARD",
        7 => "PACKAGED",
        8 => "ENABLE_COLO",
        9 => "POSTCOPY_RESUME",
        10 => "RECV_BITMAP",
        11 => "SWITCHOVER_START",
        native::FIRST_NUMBER.. => "a ramwire command",
        _ => return None,
    })
}

/// Length of the body where it does not depend on the content; checked before the body has arrived.
fn fixed_length(number: u16) -> Option<u16> {
    match number {
        2 | 7 => Some(4),
        3 | 6 | 10 | native::FIRST_NUMBER.. => None,
        _ => Some(0),
    }
}

/// `None` if the body does not have the form of its command. All bytes of `body` must be used.
fn decode_body(number: u16, body: &[u8]) -> Option<Command<'_>> {
    let mut reader = Reader::new(body);
    let command = match number {
        1 => Command::OpenReturnPath,
        2 => Command::Ping(reader.be32().ok()?),
        3 if body.is_empty() => Command::PostcopyAdviseBitmaps,
        3 => Command::PostcopyAdvise { host_pages: reader.be64().ok()?, target_page: reader.be64().ok()? },
        4 => Command::PostcopyListen,
        5 => Command::PostcopyRun,
        6 => Command::PostcopyRamDiscard(decode_discard(&mut reader)?),
        7 => Command::Packaged { size: reader.be32().ok()? },
        8 => Command::EnableColo,
        9 => Command::PostcopyResume,
        10 => Command::RecvBitmap { block: reader.name("block name").ok()? },
        11 => Command::SwitchoverStart,
        native::FIRST_NUMBER.. => return native::decode_order(number, body).map(Command::Native),
        _ => return None,
    };
    reader.rest().is_empty().then_some(command)
}

/// `u8 version 0, counted name, u8 0, { be64 start, be64 length }+`
fn decode_discard<'a>(reader: &mut Reader<'a>) -> Option<Discard<'a>> {
    if reader.u8().ok()? != 0 {
        return None;
    }
    let block = reader.name("block name").ok()?;
    if reader.u8().ok()? != 0 {
        return None;
    }
    let ranges = reader.rest();
    if ranges.is_empty() || !ranges.len().is_multiple_of(16) {
        return None;
    }
    reader.bytes(ranges.len()).ok()?;
    Some(Discard { block, ranges })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const DISCARD: &[u8] = b"\x08\0\x06\0\x1e\0\x0bmicrovm.ram\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01\x80\0";

    #[test]
    fn s11_s13_s57_commands_decode_to_what_encodes_the_same_bytes() {
        let ranges = &DISCARD[DISCARD.len() - 16..];
        #[rustfmt::skip]
        let cases: &[(&[u8], Command<'_>)] = &[
            (b"\x08\0\x01\0\0",                Command::OpenReturnPath),
            (b"\x08\0\x02\0\x04\0\0\0\x01",    Command::Ping(1)),
            (b"\x08\0\x03\0\0",                Command::PostcopyAdviseBitmaps),
            (b"\x08\0\x03\0\x10\0\0\0\0\0\x20\x10\0\0\0\0\0\0\0\x10\0", Command::PostcopyAdvise { host_pages: 0x20_1000, target_page: 4096 }),
            (b"\x08\0\x04\0\0",                Command::PostcopyListen),
            (b"\x08\0\x05\0\0",                Command::PostcopyRun),
            (DISCARD,                          Command::PostcopyRamDiscard(Discard { block: "microvm.ram", ranges })),
            (b"\x08\0\x07\0\x04\0\x01\0\0",    Command::Packaged { size: 0x10000 }),
            (b"\x08\0\x08\0\0",                Command::EnableColo),
            (b"\x08\0\x09\0\0",                Command::PostcopyResume),
            (b"\x08\0\x0a\0\x0c\x0bmicrovm.ram", Command::RecvBitmap { block: "microvm.ram" }),
            (b"\x08\0\x0b\0\0",                Command::SwitchoverStart),
        ];
        for (bytes, command) in cases {
            assert_eq!(decode_command(bytes), Ok((*command, bytes.len())));
            let mut out = Vec::new();
            command.encode(&mut out);
            assert_eq!(&out, bytes, "{command:?}");
            for cut in 0..bytes.len() {
                let error = decode_command(&bytes[..cut]).unwrap_err();
                assert!(
                    matches!(error, DecodeError::Truncated { needed, have } if needed > have && needed <= bytes.len())
                );
            }
        }
    }

    #[test]
    fn s11_s57_wrong_numbers_and_bodies_are_refused() {
        let body = |what, len| DecodeError::corrupt(HEAD_LEN, Fault::Body { what, len });
        #[rustfmt::skip]
        let cases: &[(&str, &[u8], DecodeError)] = &[
            ("number 0",                b"\x08\0\0\0\0",                DecodeError::corrupt(1, Fault::Command { number: 0 })),
            ("number 12",               b"\x08\0\x0c\0\0",              DecodeError::corrupt(1, Fault::Command { number: 12 })),
            ("no command",              b"\x01\0\x0c\0\0",              DecodeError::corrupt(0, Fault::Item { found: 1 })),
            ("a PING without value",    b"\x08\0\x02\0\0",              body("PING", 0)),
            ("a RUN with a body",       b"\x08\0\x05\0\x01\0",          body("POSTCOPY_RUN", 1)),
            ("a package of 8 bytes",    b"\x08\0\x07\0\x08\0\0\0\0",    body("PACKAGED", 8)),
            ("ADVISE of 8 bytes",       b"\x08\0\x03\0\x08\0\0\0\0\0\0\0\0", body("POSTCOPY_ADVISE", 8)),
            ("bitmap: name too short",  b"\x08\0\x0a\0\x03\x03ab",      body("RECV_BITMAP", 3)),
            ("bitmap: bytes behind",    b"\x08\0\x0a\0\x03\x01ab",      body("RECV_BITMAP", 3)),
            ("discard without a range", b"\x08\0\x06\0\x04\0\x01a\0",   body("POSTCOPY_RAM_DISCARD", 4)),
            ("discard version 1",       b"\x08\0\x06\0\x14\x01\x01a\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", body("POSTCOPY_RAM_DISCARD", 20)),
            ("discard without NUL",     b"\x08\0\x06\0\x14\0\x01a\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", body("POSTCOPY_RAM_DISCARD", 20)),
            ("discard of half a range", b"\x08\0\x06\0\x0c\0\x01a\0\0\0\0\0\0\0\0\0", body("POSTCOPY_RAM_DISCARD", 12)),
        ];
        for (what, input, want) in cases {
            assert_eq!(decode_command(input).unwrap_err(), *want, "{what}");
        }
    }

    #[test]
    fn s57_discards_are_split_into_commands_of_12_ranges() {
        let ranges: Vec<(u64, u64)> = (0..30).map(|i| (i << 13, 4096)).collect();
        let mut out = Vec::new();
        encode_discards("pc.ram", &ranges, &mut out);
        let (mut rest, mut seen, mut sizes) = (&out[..], Vec::new(), Vec::new());
        while !rest.is_empty() {
            let (command, used) = decode_command(rest).unwrap();
            let Command::PostcopyRamDiscard(discard) = command else { panic!("{command:?}") };
            assert_eq!(discard.block(), "pc.ram");
            sizes.push(discard.ranges().len());
            seen.extend(discard.ranges());
            rest = &rest[used..];
        }
        assert_eq!((seen, sizes), (ranges, vec![12, 12, 6]));
    }
}
