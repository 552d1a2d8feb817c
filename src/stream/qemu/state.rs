//! Device state as it is passed on and stored: sections of dirty bitmaps that came after the first page, then the tail.
//!
//! A source may write `dirty-bitmap` sections between sections of pages, and it writes the last one after `ram` END.
//! They are passed on after the last page, before the device sections and in their own order. A receiver accepts them
//! there: it identifies a section by its id, which START has bound.

use super::early::{BitmapChunk, DIRTY_BITMAP, decode_bitmap_chunk};
use super::section::{Framing, Item, decode_item};
use super::tail::Tail;
use crate::stream::DecodeError;

/// Offset of the tail in `state`: after complete sections of dirty bitmaps, 0 if there are none.
pub fn tail_at(state: &[u8], framing: Framing) -> usize {
    let mut at = 0;
    while let Some(len) = state.get(at..).and_then(|rest| bitmap_section(rest, framing).ok().flatten()) {
        at += len;
    }
    at
}

/// Offset in `state` of the byte that ends the device sections, if the VM description after it proves that they are
/// complete.
pub fn sections_end(state: &[u8], framing: Framing) -> Option<usize> {
    let at = tail_at(state, framing);
    let mut tail = Tail::new(framing);
    tail.push(state.get(at..)?, state.len(), u32::MAX).ok()?;
    tail.description().map(|end| at + end.eof_at)
}

/// Length of the dirty-bitmap section at the front of `input`; `None` if it begins with another item. The stream parser
/// refuses other iterables than RAM and dirty bitmaps before this.
fn bitmap_section(input: &[u8], framing: Framing) -> Result<Option<usize>, DecodeError> {
    let (item, mut at) = decode_item(input)?;
    let id = match item {
        Item::Part(id) | Item::End(id) => id,
        Item::Start(name) if name.idstr == DIRTY_BITMAP => name.id,
        _ => return Ok(None),
    };
    let rest = |at: usize| input.get(at..).unwrap_or(&[]);
    loop {
        let (chunk, used) = decode_bitmap_chunk(rest(at))?;
        at += used;
        match chunk {
            BitmapChunk::More => {}
            BitmapChunk::Last => break,
            BitmapChunk::Bits { len, last } => {
                at = at.saturating_add(usize::try_from(len).unwrap_or(usize::MAX));
                if last {
                    break;
                }
            }
        }
    }
    let ((), used) = framing.decode_footer(rest(at), id)?;
    Ok(Some(at + used))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::section::{
        SectionName, encode_end, encode_eof, encode_footer, encode_full, encode_part, encode_start,
        encode_vm_description,
    };
    use super::super::tail::without_devices;
    use super::*;

    /// A PART with 16 bytes of a bitmap and the END of it.
    fn bitmaps() -> Vec<u8> {
        let mut out = Vec::new();
        encode_part(3, &mut out);
        out.extend_from_slice(b"\x4c\x02d0\x02b0\0\0\0\0\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\x10");
        out.extend_from_slice(&[0xff; 16]);
        out.push(1);
        encode_footer(3, &mut out);
        encode_end(3, &mut out);
        out.push(0x21);
        encode_footer(3, &mut out);
        out
    }

    fn devices() -> Vec<u8> {
        let mut out = Vec::new();
        encode_full(&SectionName { id: 4, idstr: "timer", instance: 0, version: 2 }, &mut out);
        encode_footer(4, &mut out);
        out
    }

    #[test]
    fn s20_the_tail_begins_behind_the_sections_of_dirty_bitmaps() {
        let mut start = Vec::new();
        encode_start(&SectionName { id: 3, idstr: DIRTY_BITMAP, instance: 0, version: 1 }, &mut start);
        start.push(1);
        encode_footer(3, &mut start);
        let cut = &bitmaps()[..20];
        #[rustfmt::skip]
        let cases: &[(&str, Vec<u8>, usize)] = &[
            ("devices only",         devices(),                                      0),
            ("nothing",              Vec::new(),                                     0),
            ("bitmaps",              [bitmaps(), devices()].concat(),                bitmaps().len()),
            ("a late START",         [start.clone(), bitmaps(), devices()].concat(), start.len() + bitmaps().len()),
            ("a cut section",        cut.to_vec(),                                   0),
            ("whole, then cut",      [&start[..], cut].concat(),                     start.len()),
            ("bytes of an embedder", b"\x03 states".to_vec(),                        0),
        ];
        for (what, state, want) in cases {
            assert_eq!(tail_at(state, Framing::default()), *want, "{what}");
        }
    }

    #[test]
    fn s17_s20_the_sections_end_is_found_behind_dirty_bitmaps() {
        let json = br#"{"devices": [{"name": "timer", "instance_id": 0, "fields": []}]}"#;
        for before in [Vec::new(), bitmaps()] {
            let mut state = [before, devices()].concat();
            let end = state.len();
            encode_eof(&mut state);
            assert_eq!(sections_end(&state, Framing::default()), None, "nothing proves it");
            encode_vm_description(json, &mut state);
            assert_eq!(sections_end(&state, Framing::default()), Some(end));
        }
        assert_eq!(sections_end(&without_devices(4096), Framing::default()), Some(0));
    }
}
