//! The return path: messages from the destination to the source.
//!
//! `be16 type, be16 length, body`. The bitmap of a RECV_BITMAP follows *after* the message: `be64 size, size bytes,
//! be64 end mark`, bit i of byte i/8 being page i.
//!
//! To add a message: a variant, its number in `number`, its body in `encode` and in `decode_body`.

use super::super::error::{DecodeError, Fault};
use super::super::native::{self, Answer};
use super::super::reader::Reader;
use super::super::writer::Writer;

/// Longest body that is accepted, in bytes.
pub const MAX_BODY: u16 = 512;
/// Follows a received bitmap.
pub const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;
/// Bytes before a message's body.
pub const HEAD_LEN: usize = 4;

/// A message from the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Message<'a> {
    /// The last message. `status` 0: everything is loaded and the destination owns the guest; otherwise loading failed.
    Shut {
        /// 0 or an error.
        status: u32,
    },
    /// Answer to a PING of the same value.
    Pong(u32),
    /// Requests pages of the named block, which becomes the block of later [`Message::RequestPages`].
    RequestPagesOf {
        /// Name of the block.
        block: &'a str,
        /// First byte.
        start: u64,
        /// Length in bytes.
        length: u32,
    },
    /// Requests pages of the block requested last.
    RequestPages {
        /// First byte.
        start: u64,
        /// Length in bytes.
        length: u32,
    },
    /// The received bitmap of the block follows the message; see [`decode_bitmap`].
    ReceivedBitmap {
        /// Name of the block.
        block: &'a str,
    },
    /// Recovery: the destination continues. 1 is the only value.
    ResumeAck(u32),
    /// The destination is ready for the switchover.
    SwitchoverAck,
    /// Between ramwire ends only.
    Native(Answer<'a>),
}

impl Message<'_> {
    /// The type on the wire.
    pub fn number(&self) -> u16 {
        match self {
            Self::Shut { .. } => 1,
            Self::Pong(_) => 2,
            Self::RequestPagesOf { .. } => 3,
            Self::RequestPages { .. } => 4,
            Self::ReceivedBitmap { .. } => 5,
            Self::ResumeAck(_) => 6,
            Self::SwitchoverAck => 7,
            Self::Native(answer) => answer.number(),
        }
    }

    /// Appends the message. A block name is cut at 255 bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start_at = out.len();
        let mut writer = Writer::new(out);
        writer.be16(self.number()).be16(0);
        match self {
            Self::Shut { status: value } | Self::Pong(value) | Self::ResumeAck(value) => {
                writer.be32(*value);
            }
            Self::RequestPagesOf { block, start, length } => {
                writer.be64(*start).be32(*length);
                name(&mut writer, block);
            }
            Self::RequestPages { start, length } => {
                writer.be64(*start).be32(*length);
            }
            Self::ReceivedBitmap { block } => name(&mut writer, block),
            Self::Native(answer) => answer.encode_body(out),
            Self::SwitchoverAck => {}
        }
        let len = (out.len() - start_at - HEAD_LEN) as u16;
        if let Some(field) = out.get_mut(start_at + 2..start_at + HEAD_LEN) {
            field.copy_from_slice(&len.to_be_bytes());
        }
    }
}

fn name(writer: &mut Writer<'_>, block: &str) {
    let bytes = block.as_bytes().get(..255).unwrap_or(block.as_bytes());
    writer.u8(bytes.len() as u8).bytes(bytes);
}

/// The first bytes of a TLS alert, read as a message type: the record type and the major version.
const TLS_ALERT: u16 = 0x1503;

/// Decodes one message, 4 to 516 bytes.
///
/// # Errors
///
/// [`Fault::Message`] for a type that does not exist, [`Fault::Body`] for a wrong length or malformed body;
/// [`DecodeError::Truncated`].
pub fn decode_message(input: &[u8]) -> Result<(Message<'_>, usize), DecodeError> {
    let mut reader = Reader::new(input);
    let number = reader.be16()?;
    let unknown = || match number {
        TLS_ALERT => Fault::TlsAlert,
        number => Fault::Message { number },
    };
    let what = name_of(number).ok_or_else(|| DecodeError::corrupt(0, unknown()))?;
    let len = reader.be16()?;
    let malformed = || DecodeError::corrupt(2, Fault::Body { what, len });
    let fits = match number {
        3 => (14..=13 + 255).contains(&len),
        4 => len == 12,
        5 => (2..=256).contains(&len),
        7 => len == 0,
        native::FIRST_NUMBER.. => true,
        _ => len == 4,
    };
    if !fits || len > MAX_BODY {
        return Err(malformed());
    }
    let body = reader.bytes(usize::from(len))?;
    let message = decode_body(number, body).ok_or_else(malformed)?;
    Ok((message, reader.position()))
}

fn name_of(number: u16) -> Option<&'static str> {
    Some(match number {
        1 => "SHUT",
        2 => "PONG",
        3 => "REQ_PAGES_ID",
        4 => "REQ_PAGES",
        5 => "RECV_BITMAP",
        6 => "RESUME_ACK",
        7 => "SWITCHOVER_ACK",
        native::FIRST_NUMBER.. => "a ramwire message",
        _ => return None,
    })
}

/// `None` if the body does not have the form of its type. All bytes of `body` must be used.
fn decode_body(number: u16, body: &[u8]) -> Option<Message<'_>> {
    let mut reader = Reader::new(body);
    let message = match number {
        1 => Message::Shut { status: reader.be32().ok()? },
        2 => Message::Pong(reader.be32().ok()?),
        3 => {
            let (start, length) = (reader.be64().ok()?, reader.be32().ok()?);
            Message::RequestPagesOf { block: reader.name("block name").ok()?, start, length }
        }
        4 => Message::RequestPages { start: reader.be64().ok()?, length: reader.be32().ok()? },
        5 => Message::ReceivedBitmap { block: reader.name("block name").ok()? },
        6 => match reader.be32().ok()? {
            1 => Message::ResumeAck(1),
            _ => return None,
        },
        7 => Message::SwitchoverAck,
        native::FIRST_NUMBER.. => return native::decode_answer(number, body).map(Message::Native),
        _ => return None,
    };
    reader.rest().is_empty().then_some(message)
}

/// Bytes of the received bitmap of a block of `pages` pages: whole 64-bit words.
pub const fn bitmap_len(pages: u64) -> u64 {
    pages.div_ceil(64).saturating_mul(8)
}

/// Decodes the bitmap after a [`Message::ReceivedBitmap`] for a block of `pages` pages: 16 bytes and the bitmap.
///
/// The result borrows the bitmap, bit i of byte i/8 being page i. Its length is checked against `pages` before the
/// decoder requires any byte of the bitmap.
///
/// # Errors
///
/// [`Fault::Body`] if the size or the end mark is wrong; [`DecodeError::Truncated`].
pub fn decode_bitmap(input: &[u8], pages: u64) -> Result<(&[u8], usize), DecodeError> {
    let mut reader = Reader::new(input);
    let malformed = |at| DecodeError::corrupt(at, Fault::Body { what: "received bitmap", len: 0 });
    let size = reader.be64()?;
    let len = usize::try_from(size).map_err(|_| malformed(0))?;
    if size != bitmap_len(pages) {
        return Err(malformed(0));
    }
    let bits = reader.bytes(len)?;
    let at = reader.position();
    if reader.be64()? != BITMAP_END {
        return Err(malformed(at));
    }
    Ok((bits, reader.position()))
}

/// Appends the bitmap of a [`Message::ReceivedBitmap`], padded with zeros to whole 64-bit words.
pub fn encode_bitmap(bits: &[u8], out: &mut Vec<u8>) {
    let len = bits.len().next_multiple_of(8);
    let mut writer = Writer::new(out);
    writer.be64(len as u64).bytes(bits);
    writer.bytes(&[0; 8][..len - bits.len()]).be64(BITMAP_END);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn s52_messages_decode_to_what_encodes_the_same_bytes() {
        #[rustfmt::skip]
        let cases: &[(&[u8], Message<'_>)] = &[
            (b"\0\x01\0\x04\0\0\0\0",                                 Message::Shut { status: 0 }),
            (b"\0\x02\0\x04\x52\x57\x4d\x31",                         Message::Pong(0x5257_4d31)),
            (b"\0\x03\0\x10\0\0\0\0\0\0\x20\0\0\0\x10\0\x03ram",      Message::RequestPagesOf { block: "ram", start: 0x2000, length: 4096 }),
            (b"\0\x04\0\x0c\0\0\0\0\0\0\x20\0\0\0\x10\0",             Message::RequestPages { start: 0x2000, length: 4096 }),
            (b"\0\x05\0\x04\x03ram",                                  Message::ReceivedBitmap { block: "ram" }),
            (b"\0\x06\0\x04\0\0\0\x01",                               Message::ResumeAck(1)),
            (b"\0\x07\0\0",                                           Message::SwitchoverAck),
        ];
        for (bytes, message) in cases {
            assert_eq!(decode_message(bytes), Ok((*message, bytes.len())));
            let mut out = Vec::new();
            message.encode(&mut out);
            assert_eq!(&out, bytes, "{message:?}");
            for cut in 0..bytes.len() {
                let error = decode_message(&bytes[..cut]).unwrap_err();
                assert!(
                    matches!(error, DecodeError::Truncated { needed, have } if needed > have && needed <= bytes.len())
                );
            }
        }
    }

    #[test]
    fn s52_wrong_types_and_lengths_are_refused() {
        let body = |what, len| DecodeError::corrupt(2, Fault::Body { what, len });
        #[rustfmt::skip]
        let cases: &[(&str, &[u8], DecodeError)] = &[
            ("type 0",                b"\0\0\0\x04\0\0\0\0",                  DecodeError::corrupt(0, Fault::Message { number: 0 })),
            ("a TLS alert",           b"\x15\x03\x03\0\x02",                 DecodeError::corrupt(0, Fault::TlsAlert)),
            ("type 8",                b"\0\x08\0\0",                          DecodeError::corrupt(0, Fault::Message { number: 8 })),
            ("SHUT of 2 bytes",       b"\0\x01\0\x02\0\0",                    body("SHUT", 2)),
            ("an ACK with a body",    b"\0\x07\0\x01\0",                      body("SWITCHOVER_ACK", 1)),
            ("RESUME_ACK(2)",         b"\0\x06\0\x04\0\0\0\x02",              body("RESUME_ACK", 4)),
            ("request without name",  b"\0\x03\0\x0d\0\0\0\0\0\0\0\0\0\0\x10\0\0", body("REQ_PAGES_ID", 13)),
            ("request, name short",   b"\0\x03\0\x0f\0\0\0\0\0\0\0\0\0\0\x10\0\x05ra", body("REQ_PAGES_ID", 15)),
            ("65535 bytes announced", b"\0\x05\xff\xff",                      body("RECV_BITMAP", 65535)),
        ];
        for (what, input, want) in cases {
            assert_eq!(decode_message(input).unwrap_err(), *want, "{what}");
        }
    }

    #[test]
    fn s67_bitmaps_have_whole_words_and_an_end_mark() {
        let mut out = Vec::new();
        encode_bitmap(&[0xff, 0x01], &mut out);
        assert_eq!(out, b"\0\0\0\0\0\0\0\x08\xff\x01\0\0\0\0\0\0\x01\x23\x45\x67\x89\xab\xcd\xef");
        assert_eq!(decode_bitmap(&out, 9), Ok((&out[8..16], 24)));
        assert!(
            matches!(decode_bitmap(&out, 65), Err(DecodeError::Corrupt(c)) if c.at == 0),
            "size of another block"
        );
        assert_eq!(decode_bitmap(&out[..20], 9), Err(DecodeError::Truncated { needed: 24, have: 20 }));
        out[16] = 0;
        assert!(matches!(decode_bitmap(&out, 9), Err(DecodeError::Corrupt(c)) if c.at == 16), "end mark");
        assert_eq!((bitmap_len(1024), bitmap_len(1), bitmap_len(0)), (128, 8, 0));
    }
}
