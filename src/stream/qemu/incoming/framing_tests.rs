//! Streams with and without a configuration section and footers: a machine type up to 2.3 writes neither.

#![allow(clippy::unwrap_used)]

use super::super::super::error::{DecodeError, Fault};
use super::super::blocks::{BlockAnnouncement, encode_block_list};
use super::super::file::{Configuration, encode_configuration, encode_header};
use super::super::ram::{EOS_RECORD, IDSTR, Record};
use super::super::section::{self, Framing, SectionName};
use super::*;
use crate::ram::BlockName;
use crate::units::{BlockIndex, BlockOffset};

const ALL: [Framing; 4] = [
    Framing { configuration: true, footers: true },
    Framing { configuration: true, footers: false },
    Framing { configuration: false, footers: true },
    Framing { configuration: false, footers: false },
];

const DESCRIPTION: &[u8] = br#"{"devices": [{"name": "timer", "instance_id": 0, "size": 3},
    {"name": "cpu", "instance_id": 0, "size": 2}]}"#;

/// A stream of one page, a dirty bitmap and two devices, up to the end of the device sections.
fn stream(framing: Framing) -> Vec<u8> {
    let mut out = Vec::new();
    encode_header(&mut out);
    if framing.configuration {
        encode_configuration(&Configuration { machine: "none".into(), ..Default::default() }, &mut out);
    }
    section::encode_start(&SectionName { id: 2, idstr: IDSTR, instance: 0, version: 4 }, &mut out);
    let name = BlockName::new("ram").unwrap();
    let block = BlockAnnouncement { name, used_length: 4096, host_page: None, guest_addr: None };
    encode_block_list(&[block], &mut out);
    out.extend_from_slice(&EOS_RECORD);
    framing.encode_footer(2, &mut out);
    section::encode_start(&SectionName { id: 3, idstr: "dirty-bitmap", instance: 0, version: 1 }, &mut out);
    out.push(1);
    framing.encode_footer(3, &mut out);
    section::encode_part(2, &mut out);
    let at = super::super::ram::PageAt { block: Some("ram"), offset: BlockOffset(0) };
    Record::Zero { at, fill: 0 }.encode(&mut out);
    out.extend_from_slice(&EOS_RECORD);
    framing.encode_footer(2, &mut out);
    section::encode_end(2, &mut out);
    out.extend_from_slice(&EOS_RECORD);
    framing.encode_footer(2, &mut out);
    section::encode_end(3, &mut out);
    out.push(1);
    framing.encode_footer(3, &mut out);
    for (id, idstr, payload) in [(4, "timer", &b"abc"[..]), (5, "cpu", b"de")] {
        section::encode_full(&SectionName { id, idstr, instance: 0, version: 1 }, &mut out);
        out.extend_from_slice(payload);
        framing.encode_footer(id, &mut out);
    }
    section::encode_eof(&mut out);
    out
}

/// Reads `bytes` in pieces of `piece` bytes. Returns the machine, whether it reported the stream as complete, and the
/// number of zero pages.
fn read(bytes: &[u8], piece: usize) -> Result<(IncomingStream, bool, u64), DecodeError> {
    let mut stream = IncomingStream::new(IncomingConfig::default());
    let (mut at, mut come, mut zeros) = (0, 0, 0);
    loop {
        match stream.next(&bytes[at..come])? {
            Step::Event { consumed, event } => {
                at += consumed;
                match event {
                    Event::Zero { block: BlockIndex(0), .. } => zeros += 1,
                    Event::Done => return Ok((stream, true, zeros)),
                    _ => {}
                }
            }
            Step::NeedMore { consumed, .. } => {
                at += consumed;
                if come == bytes.len() {
                    return Ok((stream, false, zeros));
                }
                come = (come + piece).min(bytes.len());
            }
        }
    }
}

#[test]
fn s02_s08_a_stream_may_do_without_configuration_and_footers() {
    for framing in ALL {
        let mut bytes = stream(framing);
        for piece in [1, 7, 4096] {
            let (incoming, done, zeros) = read(&bytes, piece).unwrap();
            assert_eq!((done, zeros), (false, 1), "{framing:?}");
            assert_eq!(incoming.seen().framing, framing);
            assert_eq!(incoming.finish(), Ok(Ending::NoDescription), "{framing:?}");
        }
        section::encode_vm_description(DESCRIPTION, &mut bytes);
        for piece in [1, 7, 4096] {
            let (incoming, done, _) = read(&bytes, piece).unwrap();
            assert!(done, "{framing:?}");
            let split = &incoming.tail().description().unwrap().split;
            assert_eq!((split.sections.len(), split.is_exact()), (2, true), "{framing:?}: {split:?}");
        }
    }
}

#[test]
fn s08_what_the_first_section_shows_holds_for_all() {
    let with = stream(Framing::default());
    let footers: Vec<usize> = (0..with.len()).filter(|at| with[*at..].starts_with(b"\x7e\0\0\0")).collect();
    assert_eq!(footers.len(), 7);
    for at in &footers[1..5] {
        let one_less = [&with[..*at], &with[at + 5..]].concat();
        let error = read(&one_less, 4096).err().unwrap();
        assert!(
            matches!(error, DecodeError::Corrupt(ref c) if matches!(c.fault, Fault::NoFooter { .. })),
            "{error}"
        );
    }
    let without = stream(Framing { footers: false, ..Framing::default() });
    let part = without.windows(5).position(|bytes| bytes == b"\x03\0\0\0\x02").unwrap();
    let one_more = [&without[..part], b"\x7e\0\0\0\x02", &without[part..]].concat();
    let error = read(&one_more, 4096).err().unwrap();
    assert!(
        matches!(error, DecodeError::Corrupt(ref c) if c.fault == Fault::Item { found: 0x7e }),
        "{error}"
    );
}
