//! A cursor over bytes that have arrived.
//!
//! Reads big-endian integers and length-prefixed names. A read past the end is [`Truncated`](DecodeError::Truncated)
//! and gives the minimum number of bytes needed, counted from the start of the input. The caller keeps its bytes, waits
//! for that many and starts the same decode again.

use super::error::{DecodeError, Fault};

/// A position in a slice of received bytes.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    input: &'a [u8],
    pos: usize,
}

impl<'a> Reader<'a> {
    /// A reader at the start of `input`.
    pub fn new(input: &'a [u8]) -> Self {
        Self { input, pos: 0 }
    }

    /// A reader that has already taken the first `pos` bytes of `input`.
    pub fn at(input: &'a [u8], pos: usize) -> Self {
        Self { input, pos }
    }

    /// Bytes taken so far.
    pub fn position(&self) -> usize {
        self.pos
    }

    /// The bytes that have not been consumed.
    pub fn rest(&self) -> &'a [u8] {
        self.input.get(self.pos..).unwrap_or(&[])
    }

    /// Takes `len` bytes. Costs only the bounds check, for any `len`.
    #[inline]
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let end = self.pos.saturating_add(len);
        match self.input.get(self.pos..end) {
            Some(bytes) => {
                self.pos = end;
                Ok(bytes)
            }
            None => Err(DecodeError::Truncated { needed: end, have: self.input.len() }),
        }
    }

    /// Takes `N` bytes as an array.
    #[inline]
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        match self.input.get(self.pos..).and_then(|rest| rest.first_chunk::<N>()) {
            Some(bytes) => {
                self.pos += N;
                Ok(*bytes)
            }
            None => {
                Err(DecodeError::Truncated { needed: self.pos.saturating_add(N), have: self.input.len() })
            }
        }
    }

    /// Takes one byte.
    #[inline]
    pub fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(|[byte]| byte)
    }

    /// Takes a big-endian 16-bit integer.
    pub fn be16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_be_bytes)
    }

    /// Takes a big-endian 32-bit integer.
    #[inline]
    pub fn be32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    /// Takes a big-endian 64-bit integer.
    #[inline]
    pub fn be64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_be_bytes)
    }

    /// Takes a name: one length byte and that many bytes of UTF-8, at least one. `what` names it in the error.
    ///
    /// # Errors
    ///
    /// [`Fault::Name`] at the length byte if it is zero, at the first byte of the name if that is no UTF-8.
    pub fn name(&mut self, what: &'static str) -> Result<&'a str, DecodeError> {
        let at = self.pos;
        let len = usize::from(self.u8()?);
        if len == 0 {
            return Err(DecodeError::corrupt(at, Fault::Name { what }));
        }
        let bytes = self.bytes(len)?;
        std::str::from_utf8(bytes).map_err(|_| DecodeError::corrupt(at + 1, Fault::Name { what }))
    }

    /// A fault at the byte that would be read next.
    pub fn fault(&self, fault: Fault) -> DecodeError {
        DecodeError::corrupt(self.pos, fault)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn integers_are_big_endian_and_the_cursor_moves() {
        let mut reader = Reader::new(&[1, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 9]);
        assert_eq!(reader.u8(), Ok(1));
        assert_eq!(reader.be16(), Ok(2));
        assert_eq!(reader.be32(), Ok(3));
        assert_eq!(reader.be64(), Ok(4));
        assert_eq!((reader.position(), reader.rest()), (15, &[9u8][..]));
    }

    #[test]
    fn truncation_counts_from_the_start_and_takes_nothing() {
        let mut reader = Reader::new(&[0; 10]);
        reader.be64().unwrap();
        assert_eq!(reader.be32(), Err(DecodeError::Truncated { needed: 12, have: 10 }));
        assert_eq!(reader.bytes(usize::MAX), Err(DecodeError::Truncated { needed: usize::MAX, have: 10 }));
        assert_eq!(reader.position(), 8);
    }

    #[test]
    fn names_are_text_of_1_to_255_bytes() {
        let long = [vec![255u8], vec![b'x'; 255]].concat();
        #[rustfmt::skip]
        let cases: &[(&str, &[u8], Result<usize, DecodeError>)] = &[
            ("one letter",        b"\x01a",    Ok(2)),
            ("the longest",       &long,       Ok(256)),
            ("empty",             b"\x00a",    Err(DecodeError::corrupt(0, Fault::Name { what: "name" }))),
            ("not text",          b"\x01\xff", Err(DecodeError::corrupt(1, Fault::Name { what: "name" }))),
            ("no length yet",     b"",         Err(DecodeError::Truncated { needed: 1, have: 0 })),
            ("cut inside",        b"\x03ab",   Err(DecodeError::Truncated { needed: 4, have: 3 })),
        ];
        for (what, input, want) in cases {
            let mut reader = Reader::new(input);
            assert_eq!(reader.name("name").map(|_| reader.position()), *want, "{what}");
        }
    }
}
