//! The tail: device sections, end of file and VM description, copied without being parsed.
//!
//! The tail's length is not announced before it, and a source with a return path keeps the connection open while it
//! waits for the answer. So the parser searches for the tail's end while it arrives: `00 06 be32 L {"` announces a VM
//! description of L bytes, and the tail ends after it if those bytes are one. A source may omit the description; then
//! only the end of the connection ends the tail.

use super::super::error::Fault;
use super::section::{
    EOF, FOOTER, FOOTER_LEN, FULL, Framing, Item, decode_item, encode_eof, encode_vm_description,
};
use super::vmdesc::{Split, VmDescription, split};

/// Bytes of a candidate that are examined: end of file, type byte, length, and the first two of the JSON.
const MARK_LEN: usize = 8;
/// Bytes before the JSON: end of file, type byte and length.
const JSON_AT: usize = 6;
/// Maximum number of incomplete candidates. A real tail has one; more are not worth their memory.
const MAX_CANDIDATES: usize = 256;
/// Bytes of JSON that are parsed in vain before the search ends.
const MAX_WASTE: usize = 256 << 20;

/// The bytes after RAM that have arrived so far.
#[derive(Clone, Debug, Default)]
pub struct Tail {
    framing: Framing,
    bytes: Vec<u8>,
    scanned: usize,
    candidates: Vec<Candidate>,
    wasted: usize,
    end: Option<Description>,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    eof_at: usize,
    end: usize,
}

/// A VM description that ends a tail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Offset of the end-of-file byte in the tail; the device sections come before it.
    pub eof_at: usize,
    /// The device sections, as the description divides them.
    pub split: Split,
}

/// The tail of a guest without device sections: end of file, and an empty description with pages of `page_size` bytes.
pub fn without_devices(page_size: u64) -> Vec<u8> {
    let mut out = Vec::new();
    encode_eof(&mut out);
    encode_vm_description(format!(r#"{{"page_size": {page_size}, "devices": []}}"#).as_bytes(), &mut out);
    out
}

impl Tail {
    /// An empty tail of sections with or without footers.
    pub fn new(framing: Framing) -> Self {
        Self { framing, ..Self::default() }
    }

    /// Appends bytes up to the end of the tail and returns how many of `input` belong to the tail.
    ///
    /// # Errors
    ///
    /// [`Fault::Limit`] if the tail would exceed `limit` bytes; nothing is appended then.
    pub fn push(&mut self, input: &[u8], limit: usize, max_description: u32) -> Result<usize, Fault> {
        if self.end.is_some() {
            return Ok(0);
        }
        let whole = self.bytes.len().saturating_add(input.len());
        if whole > limit {
            let what = "the length of the device state";
            return Err(Fault::Limit { what, value: whole as u64, limit: limit as u64 });
        }
        self.bytes.extend_from_slice(input);
        self.find_candidates(max_description);
        self.try_candidates();
        Ok(input.len() - (whole - self.bytes.len()))
    }

    fn find_candidates(&mut self, max_description: u32) {
        let unseen = self.bytes.get(self.scanned..).unwrap_or(&[]);
        for (i, mark) in unseen.windows(MARK_LEN).enumerate() {
            let &[0, 6, a, b, c, d, b'{', b'"'] = mark else { continue };
            let len = u32::from_be_bytes([a, b, c, d]);
            if len <= max_description && self.candidates.len() < MAX_CANDIDATES {
                let eof_at = self.scanned + i;
                self.candidates.push(Candidate { eof_at, end: eof_at + JSON_AT + len as usize });
            }
        }
        self.scanned += (unseen.len() + 1).saturating_sub(MARK_LEN);
    }

    /// Ends the tail at the first complete candidate that holds a description.
    fn try_candidates(&mut self) {
        let here = self.bytes.len();
        let mut arrived: Vec<Candidate> = self.candidates.iter().copied().filter(|c| c.end <= here).collect();
        self.candidates.retain(|c| c.end > here);
        arrived.sort_by_key(|c| c.end);
        for candidate in arrived {
            if self.wasted > MAX_WASTE {
                return;
            }
            if let Some(description) = self.describe(candidate) {
                self.bytes.truncate(candidate.end);
                self.candidates.clear();
                self.end = Some(description);
                return;
            }
            self.wasted += candidate.end - candidate.eof_at;
        }
    }

    /// A description whose sizes do not fit the sections (arrays with holes are described wrongly) is accepted only if
    /// it names the first section, the last section has its footer, and nothing has arrived after it.
    fn describe(&self, candidate: Candidate) -> Option<Description> {
        let json = self.bytes.get(candidate.eof_at + JSON_AT..candidate.end)?;
        if json.last() != Some(&b'}') {
            return None;
        }
        let description = VmDescription::parse(json)?;
        let sections = self.bytes.get(..candidate.eof_at)?;
        let split = split(sections, &description, self.framing);
        let plausible = || {
            let footer = sections.len().checked_sub(FOOTER_LEN).and_then(|at| sections.get(at));
            let ended = !self.framing.footers || footer == Some(&FOOTER);
            candidate.end == self.bytes.len() && ended && description.begins_with(sections)
        };
        (split.is_exact() || plausible()).then_some(Description { eof_at: candidate.eof_at, split })
    }

    /// All bytes so far, from the first device section on.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Gives the bytes away.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The description that ends the tail, once it has arrived.
    pub fn description(&self) -> Option<&Description> {
        self.end.as_ref()
    }

    /// True if the tail may be complete although no description has ended it: its last byte is an end of file, after
    /// the footer of a section of the tail. A source that omits the description ends in this way. A broken connection
    /// hardly ever does, unless there are no footers: then only the last byte shows it.
    pub fn may_end_here(&self) -> bool {
        let Some((&EOF, sections)) = self.bytes.split_last() else { return self.end.is_some() };
        if !self.framing.footers {
            let begins = || matches!(decode_item(sections), Ok((Item::Full(_), _)));
            return self.end.is_some() || sections.is_empty() || begins();
        }
        let Some((before, footer)) = sections.split_last_chunk::<FOOTER_LEN>() else {
            return self.end.is_some() || sections.is_empty();
        };
        let mut head = *footer;
        head[0] = FULL;
        self.end.is_some() || footer[0] == FOOTER && before.windows(FOOTER_LEN).any(|bytes| bytes == head)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::section::{SectionName, encode_eof, encode_footer, encode_full, encode_vm_description};
    use super::*;

    const LIMIT: usize = 1 << 20;

    fn tail(payload: &[u8]) -> Vec<u8> {
        tail_of("dev", payload, payload.len())
    }

    /// A tail of one section, described with `size` bytes.
    fn tail_of(idstr: &str, payload: &[u8], size: usize) -> Vec<u8> {
        let mut out = Vec::new();
        encode_full(&SectionName { id: 9, idstr, instance: 0, version: 1 }, &mut out);
        out.extend_from_slice(payload);
        encode_footer(9, &mut out);
        encode_eof(&mut out);
        let json = format!(
            r#"{{"devices": [{{"name": "{idstr}", "instance_id": 0, "vmsd_name": "d", "fields": [{{"size": {size}}}]}}]}}"#
        );
        encode_vm_description(json.as_bytes(), &mut out);
        out
    }

    /// Pushes `bytes` in pieces; returns how many were taken.
    fn push_all(tail: &mut Tail, bytes: &[u8], piece: usize) -> usize {
        bytes.chunks(piece).map(|piece| tail.push(piece, LIMIT, 64 << 20).unwrap()).sum()
    }

    #[test]
    fn s15_s17_the_end_is_found_whatever_the_pieces_and_what_follows() {
        let whole = tail(&[7; 100]);
        let longer = [&whole[..], b"trailing bytes"].concat();
        for piece in [1, 2, 3, 7, 50, 4096] {
            let mut found = Tail::default();
            assert_eq!(push_all(&mut found, &longer, piece), whole.len(), "pieces of {piece}");
            assert_eq!(found.bytes(), whole);
            assert!(found.description().unwrap().split.is_exact());
        }
        let mut short = Tail::default();
        push_all(&mut short, &whole[..whole.len() - 1], 10);
        assert!(short.description().is_none() && !short.may_end_here());
    }

    #[test]
    fn a_tail_without_devices_has_its_end() {
        let mut found = Tail::default();
        let whole = without_devices(4096);
        assert_eq!(push_all(&mut found, &whole, 5), whole.len());
        let end = found.description().unwrap();
        assert!(end.eof_at == 0 && end.split.is_exact());
    }

    #[test]
    fn s17_a_mark_inside_a_device_is_not_the_end() {
        let fake = tail_of("other", b"x", 1);
        for payload in
            [&fake[..], b"\0\x06\0\0\0\x08{\"a\": 1}", b"\0\x06\0\0\0\x02{\"", b"\0\x06\xff\xff\xff\xff{\""]
        {
            let whole = tail(payload);
            for piece in [1, 64, 4096] {
                let mut found = Tail::default();
                let taken = push_all(&mut found, &whole, piece);
                assert_eq!(taken, whole.len(), "pieces of {piece}");
                assert!(found.description().unwrap().split.is_exact());
            }
        }
    }

    #[test]
    fn s18_wrong_sizes_do_not_hide_the_end() {
        let whole = tail_of("dev", &[7; 100], 90);
        let mut found = Tail::default();
        assert_eq!(push_all(&mut found, &whole, 64), whole.len());
        let why = found.description().unwrap().split.unreliable;
        assert_eq!(why, Some((0, "the footer is not where the description puts it")));
    }

    #[test]
    fn s15_a_tail_without_description_ends_with_an_end_of_file() {
        let whole = tail(&[7; 10]);
        let sections = whole.iter().position(|b| *b == b'{').unwrap() - 5;
        let mut found = Tail::default();
        push_all(&mut found, &whole[..sections], 64);
        assert!(found.description().is_none() && found.may_end_here());
        // Zero bytes occur at many offsets, but the end is at one.
        for cut in 1..sections {
            let mut broken = Tail::default();
            push_all(&mut broken, &tail(&[0; 10])[..cut], 64);
            assert!(!broken.may_end_here(), "cut after {cut} of {sections} bytes");
        }
    }

    #[test]
    fn s15_without_footers_a_tail_ends_with_its_description_or_with_an_end_of_file() {
        let framing = Framing { footers: false, ..Framing::default() };
        let whole = tail(&[7; 10]);
        let footer = whole.windows(5).position(|bytes| bytes == b"\x7e\0\0\0\x09").unwrap();
        let whole = [&whole[..footer], &whole[footer + FOOTER_LEN..]].concat();
        for piece in [1, 7, 4096] {
            let mut found = Tail::new(framing);
            assert_eq!(push_all(&mut found, &whole, piece), whole.len());
            assert!(found.description().unwrap().split.is_exact());
        }
        let mut found = Tail::new(framing);
        push_all(&mut found, &whole[..=footer], 64);
        assert!(found.description().is_none() && found.may_end_here());
        let mut broken = Tail::new(framing);
        push_all(&mut broken, &whole[..footer], 64);
        assert!(!broken.may_end_here());
    }

    #[test]
    fn s79_a_tail_above_its_limit_is_refused() {
        let mut found = Tail::default();
        found.push(&[1; 100], 100, 64).unwrap();
        let limit = Fault::Limit { what: "the length of the device state", value: 101, limit: 100 };
        assert_eq!(found.push(&[1], 100, 64), Err(limit));
        assert_eq!(found.bytes().len(), 100);
    }

    #[test]
    fn s79_thousands_of_marks_are_passed_over() {
        let marks = b"\0\x06\0\0\0\x10{\"junk}".repeat(5000);
        let whole = tail(&marks);
        let mut found = Tail::default();
        assert_eq!(push_all(&mut found, &whole, 1000), whole.len());
        assert!(found.description().is_some());
    }
}
