//! Messages between a page server and clients that read memory from it.
//!
//! ```text
//! client                                   server
//! HELLO  "RWPAGES\n" be32 newest version   WELCOME  "RWPAGES\n" be32 version, 16 bytes id, be64 bytes of memory
//! REQUEST                                  ANSWER, in any order
//!   be32 number  be32 1 READ, 2 MAP          be32 number  be32 0 done, 1 failed  be64 length
//!   be64 offset  be64 length                 as many bytes
//! ```
//!
//! READ returns the bytes of memory. MAP returns which pages of 4 KiB may have contents: bit i of byte i/8 is page i,
//! counted from the offset; the others are zero. A request that failed returns the reason, as text, and may be
//! repeated. The id is of the memory as it is: another file, or a file that has changed, has another one. Several
//! requests may be in flight.

use super::reader::Reader;
use super::writer::Writer;

/// The version in use.
pub const VERSION: u32 = 1;
/// Bytes of HELLO.
pub const HELLO_LEN: usize = 12;
/// Bytes of WELCOME.
pub const WELCOME_LEN: usize = 36;
/// Bytes of REQUEST.
pub const REQUEST_LEN: usize = 24;
/// Bytes of the head of ANSWER.
pub const ANSWER_LEN: usize = 16;
/// Maximum number of bytes that one READ requests.
pub const MAX_READ: u64 = 1 << 20;
/// Maximum number of bytes of memory that one MAP asks about.
pub const MAX_MAP: u64 = 8 << 30;
/// Page size of MAP.
pub const MAP_PAGE: u64 = 4096;
/// Longest text of a failure in bytes.
pub const MAX_WHY: usize = 400;

const MAGIC: [u8; 8] = *b"RWPAGES\n";

/// Messages that make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PageWordsError {
    /// The other end is none of ours.
    #[error("it is no page server's connection (it begins with {0:02x?})")]
    Magic([u8; 8]),
    /// A version that is not supported here.
    #[error("it speaks version {0}, and this ramwire {VERSION}")]
    Version(u32),
    /// A field.
    #[error("its {field} is {value:#x}, and {limit:#x} is the most that makes sense")]
    Field {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The greatest valid value.
        limit: u64,
    },
}

/// The kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Bytes.
    Read,
    /// Which pages hold something.
    Map,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Its answer has the same.
    pub number: u32,
    /// What.
    pub asked: Asked,
    /// From which byte of the memory on.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// The first message of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// Which memory it is.
    pub id: [u8; 16],
    /// Its bytes.
    pub len: u64,
}

/// The head of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The request's.
    pub number: u32,
    /// The bytes that follow were requested; otherwise they are the reason why there are none.
    pub is_done: bool,
    /// Bytes that follow.
    pub len: u64,
}

fn field(field: &'static str, value: u64, limit: u64) -> Result<(), PageWordsError> {
    if value <= limit { Ok(()) } else { Err(PageWordsError::Field { field, value, limit }) }
}

/// The fields of a message whose length is known: after its end there are none.
fn be64(reader: &mut Reader<'_>) -> u64 {
    reader.be64().unwrap_or(u64::MAX)
}

fn be32(reader: &mut Reader<'_>) -> u32 {
    reader.be32().unwrap_or(u32::MAX)
}

fn version(reader: &mut Reader<'_>) -> Result<u32, PageWordsError> {
    let magic: [u8; 8] = reader.array().unwrap_or_default();
    if magic == MAGIC { Ok(be32(reader)) } else { Err(PageWordsError::Magic(magic)) }
}

/// HELLO.
pub fn encode_hello(out: &mut Vec<u8>) {
    Writer::new(out).bytes(&MAGIC).be32(VERSION);
}

/// # Errors
/// [`PageWordsError`]. A later version supports this one, too.
pub fn decode_hello(bytes: &[u8; HELLO_LEN]) -> Result<(), PageWordsError> {
    match version(&mut Reader::new(bytes))? {
        0 => Err(PageWordsError::Version(0)),
        _ => Ok(()),
    }
}

impl Welcome {
    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Writer::new(out).bytes(&MAGIC).be32(VERSION).bytes(&self.id).be64(self.len);
    }

    /// # Errors
    /// [`PageWordsError`].
    pub fn decode(bytes: &[u8; WELCOME_LEN]) -> Result<Self, PageWordsError> {
        let mut reader = Reader::new(bytes);
        let version = version(&mut reader)?;
        if version != VERSION {
            return Err(PageWordsError::Version(version));
        }
        let id = reader.array().unwrap_or_default();
        let len = be64(&mut reader);
        field("length of the memory", len, i64::MAX as u64)?;
        Ok(Self { id, len })
    }
}

impl Request {
    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let asked = match self.asked {
            Asked::Read => 1,
            Asked::Map => 2,
        };
        Writer::new(out).be32(self.number).be32(asked).be64(self.offset).be64(self.len);
    }

    /// A request to a memory of `memory` bytes.
    ///
    /// # Errors
    /// [`PageWordsError`]: something outside the memory, or too much at once.
    pub fn decode(bytes: &[u8; REQUEST_LEN], memory: u64) -> Result<Self, PageWordsError> {
        let mut reader = Reader::new(bytes);
        let (number, asked) = (be32(&mut reader), be32(&mut reader));
        let (offset, len) = (be64(&mut reader), be64(&mut reader));
        let (asked, most) = match asked {
            1 => (Asked::Read, MAX_READ),
            2 => (Asked::Map, MAX_MAP),
            other => return Err(PageWordsError::Field { field: "kind", value: other.into(), limit: 2 }),
        };
        field("length", len, most)?;
        field("offset", offset, memory)?;
        field("end", offset.saturating_add(len), memory)?;
        Ok(Self { number, asked, offset, len })
    }

    /// Bytes of its answer.
    pub fn answer_len(&self) -> u64 {
        match self.asked {
            Asked::Read => self.len,
            Asked::Map => self.len.div_ceil(MAP_PAGE).div_ceil(8),
        }
    }
}

impl Answer {
    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        Writer::new(out).be32(self.number).be32(u32::from(!self.is_done)).be64(self.len);
    }

    /// The head of an answer; its length is compared with the request by [`check`](Self::check).
    ///
    /// # Errors
    /// [`PageWordsError`].
    pub fn decode(bytes: &[u8; ANSWER_LEN]) -> Result<Self, PageWordsError> {
        let mut reader = Reader::new(bytes);
        let (number, status, len) = (be32(&mut reader), be32(&mut reader), be64(&mut reader));
        field("status", status.into(), 1)?;
        Ok(Self { number, is_done: status == 0, len })
    }

    /// # Errors
    /// [`PageWordsError`]: another length than that of an answer of `asked` bytes.
    pub fn check(&self, asked: u64) -> Result<(), PageWordsError> {
        match self.is_done {
            true if self.len == asked => Ok(()),
            true => Err(PageWordsError::Field { field: "length", value: self.len, limit: asked }),
            false => field("length of the reason", self.len, MAX_WHY as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn bytes<const N: usize>(encode: impl FnOnce(&mut Vec<u8>)) -> [u8; N] {
        let mut out = Vec::new();
        encode(&mut out);
        out.try_into().unwrap()
    }

    #[test]
    fn words_round_trip() {
        assert_eq!(decode_hello(&bytes(encode_hello)), Ok(()));
        let welcome = Welcome { id: [7; 16], len: 5 << 30 };
        assert_eq!(Welcome::decode(&bytes(|out| welcome.encode(out))), Ok(welcome));
        for asked in [Asked::Read, Asked::Map] {
            let request = Request { number: 9, asked, offset: 4096, len: 12288 };
            assert_eq!(Request::decode(&bytes(|out| request.encode(out)), 1 << 20), Ok(request));
        }
        for is_done in [true, false] {
            let answer = Answer { number: 3, is_done, len: 100 };
            assert_eq!(Answer::decode(&bytes(|out| answer.encode(out))), Ok(answer));
            assert_eq!((answer.check(100).is_ok(), answer.check(99).is_ok()), (true, !is_done));
        }
    }

    #[test]
    fn words_that_make_no_sense_are_refused_by_their_field() {
        let request = |offset, len| Request { number: 9, asked: Asked::Read, offset, len };
        let refused = |request: Request| {
            Request::decode(&bytes(|out| request.encode(out)), 1 << 30).unwrap_err().to_string()
        };
        assert!(refused(request(1 << 31, 0)).contains("offset"));
        assert!(refused(request(u64::MAX, 4096)).contains("offset"));
        assert!(refused(request((1 << 30) - 1, 2)).contains("end"));
        assert!(refused(request(0, MAX_READ + 1)).contains("length"));
        let mut kind: [u8; REQUEST_LEN] = bytes(|out| request(0, 1).encode(out));
        kind[7] = 3;
        assert!(Request::decode(&kind, 1).unwrap_err().to_string().contains("kind"));
        let mut hello: [u8; HELLO_LEN] = bytes(encode_hello);
        hello[11] = 0;
        assert_eq!(decode_hello(&hello), Err(PageWordsError::Version(0)));
        hello[0] = b'Q';
        assert!(matches!(decode_hello(&hello), Err(PageWordsError::Magic(_))));
        let mut welcome: [u8; WELCOME_LEN] = bytes(|out| Welcome { id: [1; 16], len: 1 }.encode(out));
        welcome[11] = 2;
        assert_eq!(Welcome::decode(&welcome), Err(PageWordsError::Version(2)));
        let failed = Answer { number: 1, is_done: false, len: MAX_WHY as u64 + 1 };
        assert!(failed.check(4096).is_err());
    }
}
