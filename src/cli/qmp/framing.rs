//! Finds JSON values in the bytes that a client of the monitor sends.
//!
//! Pure: bytes in, values out. A value may come in any number of pieces, and several in one. No line end is needed
//! between them.
//!
//! Input that is no JSON is reported once, and the rest of it is skipped: up to the end of its line, or up to the
//! control byte (0xFF, or one below a space that is no blank) that a client sends to begin anew. A value is held only
//! up to [`MAX_VALUE`] bytes and [`MAX_DEPTH`] levels.

use serde_json::Value;

/// Maximum number of bytes of one value. A command of QMP has some hundred.
pub(super) const MAX_VALUE: usize = 64 << 10;

/// Maximum depth of nested objects and arrays; serde_json's own limit is 128.
pub(super) const MAX_DEPTH: usize = 64;

/// Why bytes are no value.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::cli) enum Damage {
    #[error("this is no JSON: {0}")]
    Syntax(String),
    #[error("byte 0x{0:02x} can't be in JSON; what came before it in the same value is left out")]
    Control(u8),
    #[error("{0:?} closes nothing that is open")]
    Unopened(char),
    #[error("more than {MAX_DEPTH} objects and arrays inside each other")]
    TooDeep,
    #[error("a value of more than {MAX_VALUE} bytes")]
    TooLong,
}

/// Position of the next byte in a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Between values.
    Outside,
    /// In an object or an array.
    Inside,
    /// In a string.
    Text { escaped: bool },
    /// In a number or a word outside objects and arrays.
    Word,
    /// In refused input, up to the end of its line.
    Refused,
}

/// The bytes of a value that is not whole yet.
#[derive(Debug)]
pub(in crate::cli) struct Framing {
    at: At,
    value: Vec<u8>,
    /// The closing bracket of each object and array that is open.
    open: Vec<u8>,
    /// A value of this length is parsed when its line ends, complete or not. Doubled each time, so that all attempts
    /// together take no longer than twice the last.
    parse_at: usize,
}

impl Default for Framing {
    fn default() -> Self {
        Self { at: At::Outside, value: Vec::new(), open: Vec::new(), parse_at: 1 }
    }
}

impl Framing {
    /// Takes bytes off `input` up to the end of one value. `None`: all are taken, and no value is complete.
    ///
    /// # Errors
    /// [`Damage`]; the next call continues after it.
    pub(in crate::cli) fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, Damage>> {
        while let Some((byte, rest)) = input.split_first() {
            // A word ends before a byte that can't belong to it, which is read again.
            if self.at == At::Word && !is_of_word(*byte) {
                return Some(self.finish());
            }
            *input = rest;
            if let Some(found) = self.take(*byte) {
                return Some(found);
            }
        }
        None
    }

    fn take(&mut self, byte: u8) -> Option<Result<Value, Damage>> {
        if byte == 0xff || (byte < b' ' && !is_blank(byte)) {
            self.restart();
            return Some(Err(Damage::Control(byte)));
        }
        match self.at {
            At::Refused => {
                if byte == b'\n' {
                    self.restart();
                }
                return None;
            }
            At::Outside if is_blank(byte) => return None,
            _ => self.value.push(byte),
        }
        if self.value.len() > MAX_VALUE {
            return Some(self.refuse(Damage::TooLong));
        }
        match (self.at, byte) {
            (At::Text { escaped: true }, _) => self.at = At::Text { escaped: false },
            (At::Text { .. }, b'\\') => self.at = At::Text { escaped: true },
            (At::Text { .. }, b'"') if self.open.is_empty() => return Some(self.finish()),
            (At::Text { .. }, b'"') => self.at = At::Inside,
            // A string has no line end; the value that it is in is no JSON.
            (_, b'\n') => return self.look_at_line(),
            (At::Text { .. }, _) => {}
            (_, b'"') => self.at = At::Text { escaped: false },
            (_, b'{') => return self.opens(b'}'),
            (_, b'[') => return self.opens(b']'),
            (_, b'}' | b']') => return self.closes(byte),
            (At::Outside, _) => self.at = At::Word,
            _ => {}
        }
        None
    }

    fn opens(&mut self, closing: u8) -> Option<Result<Value, Damage>> {
        self.open.push(closing);
        self.at = At::Inside;
        (self.open.len() > MAX_DEPTH).then(|| self.refuse(Damage::TooDeep))
    }

    fn closes(&mut self, byte: u8) -> Option<Result<Value, Damage>> {
        if self.open.pop() != Some(byte) {
            return Some(self.refuse(Damage::Unopened(byte.into())));
        }
        self.open.is_empty().then(|| self.finish())
    }

    /// A value that continues in the next line may be wrong already: a person who types it gets the error now.
    fn look_at_line(&mut self) -> Option<Result<Value, Damage>> {
        if self.value.len() < self.parse_at {
            return None;
        }
        self.parse_at = 2 * self.value.len();
        match serde_json::from_slice::<Value>(&self.value) {
            Err(error) if !error.is_eof() => {
                self.restart();
                Some(Err(Damage::Syntax(error.to_string())))
            }
            _ => None,
        }
    }

    fn finish(&mut self) -> Result<Value, Damage> {
        let parsed = serde_json::from_slice(&self.value);
        self.restart();
        parsed.map_err(|error| Damage::Syntax(error.to_string()))
    }

    fn refuse(&mut self, damage: Damage) -> Result<Value, Damage> {
        self.restart();
        self.at = At::Refused;
        Err(damage)
    }

    fn restart(&mut self) {
        *self = Self::default();
    }
}

fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

/// Of a number or a word outside objects and arrays.
fn is_of_word(byte: u8) -> bool {
    !is_blank(byte) && !matches!(byte, b'{' | b'}' | b'[' | b']' | b'"' | b',' | b':') && byte != 0xff
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    type Found = Result<Value, Damage>;

    /// The values found when `pieces` arrive one after the other.
    fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Found> {
        let mut framing = Framing::default();
        let mut found = Vec::new();
        for mut piece in pieces {
            while let Some(value) = framing.next(&mut piece) {
                found.push(value);
            }
            assert!(piece.is_empty() && framing.value.len() <= MAX_VALUE && framing.open.len() <= MAX_DEPTH);
        }
        found
    }

    #[test]
    fn values_are_found_however_they_are_cut() {
        let text = b"{\"a\": [1, {\"b\": \"}\\\"]\"}]}[2]\r\n\"x{\" 17 true{\"c\":\n null}";
        let values = [json!({"a": [1, {"b": "}\"]"}]}), json!([2]), json!("x{"), json!(17), json!(true)];
        let whole: Vec<Found> = values.into_iter().chain([json!({"c": null})]).map(Ok).collect();
        assert_eq!(read([&text[..]]), whole);
        for cut in 0..text.len() {
            assert_eq!(read([&text[..cut], &text[cut..]]), whole, "cut at {cut}");
        }
        assert_eq!(read(text.chunks(1)), whole);
    }

    #[test]
    fn what_is_wrong_is_told_once_and_the_next_value_is_found() {
        let good = br#"{"good": 1}"#;
        let deep = "[".repeat(MAX_DEPTH + 1);
        let long = format!("{{\"a\": \"{}", "x".repeat(MAX_VALUE));
        #[rustfmt::skip]
        let cases: &[(&str, &[u8], Option<Damage>)] = &[
            ("a byte to begin anew",             b"\xff",             Some(Damage::Control(0xff))),
            ("one in half an object",            b"{\"a\": \"\xff",   Some(Damage::Control(0xff))),
            ("another control byte",             b"{\"a\": \x01",     Some(Damage::Control(1))),
            ("a bracket of another kind",        b"{\"a\": [}\n",     Some(Damage::Unopened('}'))),
            ("a bracket that closes nothing",    b"] and more\n",     Some(Damage::Unopened(']'))),
            ("too deep",                         deep.as_bytes(),     Some(Damage::TooDeep)),
            ("too long",                         long.as_bytes(),     Some(Damage::TooLong)),
            ("an object in wrong words",         b"{ bad }",          None),
            ("an object that its line spoils",   b"{ bad \n",         None),
            ("a string over a line's end",       b"{\"a\": \"b\n",    None),
            ("no UTF-8",                         b"{\"a\": \"\xc3\"}", None),
            ("an unknown word",                  b"nul ",             None),
        ];
        for (what, bad, damage) in cases {
            let mut found = read([&[bad, &b"\n"[..], good].concat()[..]]);
            assert_eq!(found.pop(), Some(Ok(json!({"good": 1}))), "{what}: {found:?}");
            match damage {
                Some(damage) => assert_eq!(found, [Err(Damage::clone_of(damage))], "{what}"),
                None => assert!(matches!(found[..], [Err(Damage::Syntax(_))]), "{what}: {found:?}"),
            }
        }
    }

    impl Damage {
        fn clone_of(other: &Self) -> Self {
            match other {
                Self::Syntax(text) => Self::Syntax(text.clone()),
                Self::Control(byte) => Self::Control(*byte),
                Self::Unopened(bracket) => Self::Unopened(*bracket),
                Self::TooDeep => Self::TooDeep,
                Self::TooLong => Self::TooLong,
            }
        }
    }

    #[test]
    fn a_value_of_many_lines_is_looked_at_few_times() {
        let text = format!("{{\"a\": [{}1]}}", "1,\n".repeat(10_000));
        assert_eq!(read([text.as_bytes()]).len(), 1);
    }

    proptest! {
        /// Any input in any pieces: nothing panics, the held bytes are bounded, and after a control byte the next
        /// command is understood.
        #[test]
        fn damaged_input_is_survived(
            noise in proptest::collection::vec(any::<u8>(), 0..400),
            words in proptest::collection::vec(r#"[\[\]{}":,a0 \n\\]{0,12}"#, 0..30),
            size in 1usize..50,
        ) {
            for noise in [&noise[..], words.concat().as_bytes()] {
                let input = [noise, b"\xff{\"good\": [1]}"].concat();
                let found = read(input.chunks(size));
                let good = Ok(json!({"good": [1]}));
                prop_assert_eq!(found.last(), Some(&good));
                prop_assert!(matches!(found[found.len() - 2], Err(Damage::Control(0xff))));
                prop_assert_eq!(&read([&input[..]]), &found);
            }
        }
    }
}
