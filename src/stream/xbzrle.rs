//! XBZRLE: a page as its difference to the content that the peer already has.
//!
//! ```text
//! page   := pair+
//! pair   := zrun nzrun
//! zrun   := length                bytes equal to the old page, skipped
//! nzrun  := length byte{length}   bytes that replace the old ones
//! length := ULEB128 of one or two bytes, 0 to 16383
//! ```
//!
//! An unchanged run at the end is not encoded, an unchanged page has no encoding at all.

/// Longest run that can be encoded.
pub const MAX_RUN: usize = (1 << 14) - 1;

/// How an XBZRLE page breaks the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum XbzrleFault {
    /// Another encoding than 1.
    #[error("encoding {found} is unknown")]
    Encoding {
        /// The encoding byte.
        found: u8,
    },
    /// The input ends inside a pair.
    #[error("it ends inside a run")]
    Short,
    /// A length of more than two bytes.
    #[error("a run length has more than two bytes")]
    Length,
    /// A run that changes nothing, or a later run that skips nothing.
    #[error("a run is empty")]
    EmptyRun,
    /// A run leaves the page.
    #[error("a run leaves the page")]
    Overrun,
}

/// Applies an encoding to `page`, which holds the previous content.
///
/// An empty `input` leaves the page as it is.
///
/// # Errors
///
/// [`XbzrleFault`]; the page may then have been changed in part, so the migration must fail.
pub fn decode(mut input: &[u8], page: &mut [u8]) -> Result<(), XbzrleFault> {
    let mut at = 0;
    let mut first = true;
    while !input.is_empty() {
        let skip = take_length(&mut input)?;
        if skip == 0 && !first {
            return Err(XbzrleFault::EmptyRun);
        }
        first = false;
        at += skip;
        if at > page.len() {
            return Err(XbzrleFault::Overrun);
        }
        let len = take_length(&mut input)?;
        if len == 0 {
            return Err(XbzrleFault::EmptyRun);
        }
        let target = page.get_mut(at..at + len).ok_or(XbzrleFault::Overrun)?;
        let (bytes, rest) = input.split_at_checked(len).ok_or(XbzrleFault::Short)?;
        target.copy_from_slice(bytes);
        input = rest;
        at += len;
    }
    Ok(())
}

/// Two bytes must remain even if the length takes only one: a run of either kind is never the last byte.
fn take_length(input: &mut &[u8]) -> Result<usize, XbzrleFault> {
    let [low, high, ..] = **input else { return Err(XbzrleFault::Short) };
    let (value, used) = match (low & 0x80 != 0, high & 0x80 != 0) {
        (false, _) => (usize::from(low), 1),
        (true, false) => (usize::from(low & 0x7f) | usize::from(high) << 7, 2),
        (true, true) => return Err(XbzrleFault::Length),
    };
    *input = input.get(used..).unwrap_or(&[]);
    Ok(value)
}

/// Result of encoding a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// Both pages are equal: nothing is to be sent.
    Unchanged,
    /// The encoding is this many bytes at the start of the output.
    Delta(usize),
    /// The encoding does not fit: the whole page is to be sent. The output is undefined.
    Overflow,
}

/// Encodes `new` as a difference to `old` into `out`; all three have the length of a page.
///
/// Gives up as soon as fewer than two bytes are left where a run would begin, even if only an unchanged run follows;
/// this is the common behaviour of senders, and any encoding that decodes is legal. Runs above [`MAX_RUN`], possible
/// with pages above 16 KiB, overflow too.
pub fn encode(old: &[u8], new: &[u8], out: &mut [u8]) -> Encoded {
    let len = new.len().min(old.len());
    let (mut at, mut used) = (0, 0);
    while at < len {
        let (old_rest, new_rest) = (&old[at..len], &new[at..len]);
        let equal = equal_run(old_rest, new_rest);
        if used + 2 > out.len() {
            return Encoded::Overflow;
        }
        if at + equal == len {
            break;
        }
        let changed = changed_run(&old_rest[equal..], &new_rest[equal..]);
        if equal > MAX_RUN || changed > MAX_RUN {
            return Encoded::Overflow;
        }
        used += put_length(equal, &mut out[used..]);
        if used + 2 > out.len() {
            return Encoded::Overflow;
        }
        used += put_length(changed, &mut out[used..]);
        let Some(target) = out.get_mut(used..used + changed) else { return Encoded::Overflow };
        target.copy_from_slice(&new_rest[equal..equal + changed]);
        used += changed;
        at += equal + changed;
    }
    if used == 0 { Encoded::Unchanged } else { Encoded::Delta(used) }
}

/// Length of the equal prefix: compares cache lines first, in a loop that the compiler vectorizes.
fn equal_run(old: &[u8], new: &[u8]) -> usize {
    let (old_lines, _) = old.as_chunks::<64>();
    let (new_lines, _) = new.as_chunks::<64>();
    let start = old_lines.iter().zip(new_lines).take_while(|(a, b)| is_equal_line(a, b)).count() * 64;
    let (old, new) = (&old[start..], &new[start..]);
    let (old_words, _) = old.as_chunks::<8>();
    let (new_words, _) = new.as_chunks::<8>();
    let mut at = 0;
    for (a, b) in old_words.iter().zip(new_words) {
        let differs = u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b);
        if differs != 0 {
            return start + at + first_byte(differs);
        }
        at += 8;
    }
    let tail = old[at..].iter().zip(&new[at..]).take_while(|(a, b)| a == b).count();
    start + at + tail
}

fn is_equal_line(old: &[u8; 64], new: &[u8; 64]) -> bool {
    let (old, _) = old.as_chunks::<8>();
    let (new, _) = new.as_chunks::<8>();
    let differs = |(a, b): (&[u8; 8], &[u8; 8])| u64::from_ne_bytes(*a) ^ u64::from_ne_bytes(*b);
    old.iter().zip(new).map(differs).fold(0, |all, word| all | word) == 0
}

/// Length of the differing prefix, found a word at a time: a word with no zero byte in `old ^ new` differs in every
/// byte.
fn changed_run(old: &[u8], new: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let (old_words, _) = old.as_chunks::<8>();
    let (new_words, _) = new.as_chunks::<8>();
    let mut at = 0;
    for (a, b) in old_words.iter().zip(new_words) {
        let word = u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b);
        // The lowest mark is that of the first zero byte; a borrow can set wrong marks only above it.
        let zeros = word.wrapping_sub(ONES) & !word & (ONES << 7);
        if zeros != 0 {
            return at + first_byte(zeros);
        }
        at += 8;
    }
    at + old[at..].iter().zip(&new[at..]).take_while(|(a, b)| a != b).count()
}

/// Index in memory of the first non-zero byte of a word that was read as little-endian.
fn first_byte(word: u64) -> usize {
    word.trailing_zeros() as usize / 8
}

/// Writes a length into `out`, which has at least two bytes.
fn put_length(len: usize, out: &mut [u8]) -> usize {
    if len < 0x80 {
        out[0] = len as u8;
        1
    } else {
        out[0] = (len & 0x7f) as u8 | 0x80;
        out[1] = (len >> 7) as u8;
        2
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::type_complexity)]
    use proptest::prelude::*;

    use super::*;

    const PAGE: usize = 4096;

    fn with(edits: &[(usize, &[u8])]) -> Vec<u8> {
        let mut page = vec![0; PAGE];
        for (at, bytes) in edits {
            page[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        page
    }

    fn every(step: usize) -> Vec<u8> {
        (0..PAGE).map(|i| if i % step == 0 { 0x55 } else { 0 }).collect()
    }

    fn encoding(old: &[u8], new: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0; new.len()];
        match encode(old, new, &mut out) {
            Encoded::Unchanged => Some(Vec::new()),
            Encoded::Delta(len) => Some(out[..len].to_vec()),
            Encoded::Overflow => None,
        }
    }

    #[test]
    fn s35_worked_examples_encode_byte_for_byte() {
        let run = |len| vec![0x11u8; len];
        let joined = |head: &[u8], len| [head, &run(len)].concat();
        #[rustfmt::skip]
        let cases: &[(&str, Vec<u8>, Option<Vec<u8>>)] = &[
            ("nothing",             with(&[]),                                        Some(vec![])),
            ("first byte",          with(&[(0, b"A")]),                               Some(b"\x00\x01A".to_vec())),
            ("last byte",           with(&[(4095, b"A")]),                            Some(b"\xff\x1f\x01A".to_vec())),
            ("longest short run",   with(&[(127, b"A")]),                             Some(b"\x7f\x01A".to_vec())),
            ("shortest long run",   with(&[(128, b"A")]),                             Some(b"\x80\x01\x01A".to_vec())),
            ("two bytes",           with(&[(0x123, b"\xaa\xbb")]),                    Some(b"\xa3\x02\x02\xaa\xbb".to_vec())),
            ("three places",        with(&[(0, b"\x01"), (0x123, b"\x02"), (0x800, b"\x03\x04")]), Some(b"\x00\x01\x01\xa2\x02\x01\x02\xdc\x0d\x02\x03\x04".to_vec())),
            ("one byte between",    with(&[(10, b"ab"), (13, b"cd")]),                Some(b"\x0a\x02ab\x01\x02cd".to_vec())),
            ("128 changed",         with(&[(0, &run(128))]),                          Some(joined(b"\x00\x80\x01", 128))),
            ("fits exactly",        with(&[(3, &run(4093))]),                         Some(joined(b"\x03\xfd\x1f", 4093))),
            ("4093 at 0",           with(&[(0, &run(4093))]),                         None),
            ("4092 at 0",           with(&[(0, &run(4092))]),                         None),
            ("all",                 with(&[(0, &run(4096))]),                         None),
            ("every third byte",    every(3),                                         None),
            ("every second byte",   every(2),                                         None),
        ];
        for (what, new, want) in cases {
            assert_eq!(encoding(&with(&[]), new), *want, "{what}");
        }
        let fourth = encoding(&with(&[]), &every(4)).unwrap_or_default();
        assert_eq!((fourth.len(), &fourth[..6]), (3072, &b"\x00\x01\x55\x03\x01\x55"[..]));
    }

    #[test]
    fn s34_encodings_decode_or_say_why_not() {
        use XbzrleFault::*;
        #[rustfmt::skip]
        let cases: &[(&str, &[u8], Result<(), XbzrleFault>)] = &[
            ("nothing: page unchanged",    b"",                         Ok(())),
            ("from a real stream",         b"\x00\x01\xc0\xa2\x02\x01\xc0\xdc\x0d\x02\xc0\x0f", Ok(())),
            ("two bytes for zero",         b"\x80\x00\x01A",            Ok(())),
            ("half a length",              b"\x00",                     Err(Short)),
            ("empty change",               b"\x00\x00",                 Err(Short)),
            ("empty change, more",         b"\x00\x00\x00",             Err(EmptyRun)),
            ("change without bytes",       b"\x00\x01",                 Err(Short)),
            ("empty skip in second pair",  b"\x00\x01A\x00\x01B",       Err(EmptyRun)),
            ("length of three bytes",      b"\x80\x80\x01",             Err(Length)),
            ("skip of the whole page",     b"\x80\x20\x01A",            Err(Overrun)),
            ("skip only",                  b"\x7f",                     Err(Short)),
            ("too few bytes",              b"\x00\x05A",                Err(Short)),
            ("skip beyond the page",       b"\xff\x7f\x01A",            Err(Overrun)),
            ("change beyond the page",     b"\xff\x1f\x02AB",           Err(Overrun)),
        ];
        for (what, input, want) in cases {
            assert_eq!(decode(input, &mut with(&[])), *want, "{what}");
        }
    }

    fn pages() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        let edits = prop::collection::vec((0..PAGE, 1..200usize, any::<u8>()), 0..60);
        (prop::collection::vec(any::<u8>(), PAGE), edits).prop_map(|(old, edits)| {
            let mut new = old.clone();
            for (at, len, byte) in edits {
                new[at..(at + len).min(PAGE)].fill(byte);
            }
            (old, new)
        })
    }

    proptest! {
        /// old + encoding = new, never longer than a page, and empty exactly for equal pages.
        #[test]
        fn s34_s36_encodings_round_trip((old, new) in pages()) {
            if let Some(delta) = encoding(&old, &new) {
                prop_assert_eq!(delta.is_empty(), old == new);
                let mut page = old;
                prop_assert_eq!(decode(&delta, &mut page), Ok(()));
                prop_assert!(page == new);
            }
        }

        /// Arbitrary input never leaves the page or panics.
        #[test]
        fn s34_any_input_is_decoded_or_refused(input in prop::collection::vec(any::<u8>(), 0..600), len in 0..5000usize) {
            let mut page = vec![0; len];
            let _ = decode(&input, &mut page);
            prop_assert_eq!(page.len(), len);
        }

        /// The word-wise run searches agree with the plain ones.
        #[test]
        fn runs_agree_with_a_bytewise_search(
            lead in 0usize..200,
            differs in any::<bool>(),
            pairs in prop::collection::vec((0u8..2, prop_oneof![Just(0u8), Just(1), Just(0x80), Just(0xff)]), 0..100),
        ) {
            let lead = std::iter::repeat_n((7u8, if differs { 9u8 } else { 7 }), lead);
            let pairs: Vec<(u8, u8)> = lead.chain(pairs).collect();
            let (old, new): (Vec<u8>, Vec<u8>) = pairs.into_iter().unzip();
            let plain = |equal: bool| old.iter().zip(&new).take_while(|(a, b)| (a == b) == equal).count();
            prop_assert_eq!(equal_run(&old, &new), plain(true));
            prop_assert_eq!(changed_run(&old, &new), plain(false));
        }
    }
}
