//! Messages of the destination.

use super::{FIRST_NUMBER, Hello, MAX_REASON};
use crate::stream::reader::Reader;
use crate::stream::writer::Writer;

/// A message of the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// The sender's HELLO; `max_version` is the version that both support.
    Hello(Hello),
    /// All is loaded, the digest is equal: COMMIT may come.
    Ready,
    /// The guest runs here.
    Running,
    /// The migration failed here and the guest does not run here.
    Refused {
        /// Why, at most [`MAX_REASON`] bytes.
        why: &'a str,
    },
    /// Everything has arrived and is being checked and loaded: READY follows later.
    Working,
    /// All that was sent in front of this FENCE is in place.
    Fenced {
        /// Its number.
        number: u64,
    },
    /// All missing pages of the memory behind a key are here: it is needed no more.
    ReadWhole {
        /// The key's number.
        number: u32,
    },
    /// The answer to RESUME.
    Holds {
        /// The source's secret: this is the destination that it lost.
        secret: [u8; 16],
        /// The last FENCE that has come; 0: none.
        fence: u64,
    },
}

impl Answer<'_> {
    /// The message type on the wire.
    pub fn number(&self) -> u16 {
        FIRST_NUMBER
            + match self {
                Self::Hello(_) => 1,
                Self::Ready => 2,
                Self::Running => 3,
                Self::Refused { .. } => 4,
                Self::Working => 5,
                Self::Fenced { .. } => 6,
                Self::Holds { .. } => 7,
                Self::ReadWhole { .. } => 8,
            }
    }

    /// Appends the body; the text of a refusal is cut at [`MAX_REASON`].
    pub fn encode_body(&self, out: &mut Vec<u8>) {
        let mut writer = Writer::new(out);
        match self {
            Self::Hello(hello) => hello.encode(&mut writer),
            Self::Ready | Self::Running | Self::Working => {}
            Self::Fenced { number } => {
                writer.be64(*number);
            }
            Self::ReadWhole { number } => {
                writer.be32(*number);
            }
            Self::Holds { secret, fence } => {
                writer.bytes(secret).be64(*fence);
            }
            Self::Refused { why } => {
                let cut = (0..=MAX_REASON.min(why.len())).rev().find(|at| why.is_char_boundary(*at));
                writer.bytes(&why.as_bytes()[..cut.unwrap_or(0)]);
            }
        }
    }
}

/// Decodes the body of message `number`; `None` if there is no such message or the body is malformed.
pub fn decode_answer(number: u16, body: &[u8]) -> Option<Answer<'_>> {
    let mut reader = Reader::new(body);
    let answer = match number.checked_sub(FIRST_NUMBER)? {
        1 => return Hello::decode(&mut reader).ok().map(Answer::Hello),
        2 => Answer::Ready,
        3 => Answer::Running,
        5 => Answer::Working,
        4 => return std::str::from_utf8(body).ok().map(|why| Answer::Refused { why }),
        6 => Answer::Fenced { number: reader.be64().ok()? },
        7 => Answer::Holds { secret: reader.array().ok()?, fence: reader.be64().ok()? },
        8 => Answer::ReadWhole { number: reader.be32().ok()? },
        _ => return None,
    };
    reader.rest().is_empty().then_some(answer)
}
