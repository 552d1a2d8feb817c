//! Streams of a primary whose guest has one block `ram` of eight pages, and a device of 28 bytes.
#![allow(clippy::unwrap_used)]

use super::{ColoMessage, encode_size};
use crate::ram::BlockName;
use crate::stream::qemu::blocks::{BlockAnnouncement, encode_block_list};
use crate::stream::qemu::command::Command;
use crate::stream::qemu::file::{Configuration, encode_configuration, encode_header};
use crate::stream::qemu::ram::{EOS_RECORD, IDSTR, PageAt, Record, VERSION};
use crate::stream::qemu::section::{
    SectionName, encode_end, encode_eof, encode_footer, encode_full, encode_part, encode_start,
    encode_vm_description,
};
use crate::units::BlockOffset;

pub(crate) const RAM: u32 = 2;

/// A section of zero pages.
pub(crate) fn ram(out: &mut Vec<u8>, phase: fn(u32, &mut Vec<u8>), pages: &[u64]) {
    phase(RAM, out);
    for page in pages {
        let at = PageAt { block: Some("ram"), offset: BlockOffset(page * 4096) };
        Record::Zero { at, fill: 0 }.encode(out);
    }
    out.extend_from_slice(&EOS_RECORD);
    encode_footer(RAM, out);
}

/// Device state of a checkpoint.
pub(crate) fn devices(out: &mut Vec<u8>) {
    encode_full(&SectionName { id: 5, idstr: "dev", instance: 0, version: 1 }, out);
    out.extend_from_slice(b"state");
    encode_footer(5, out);
    encode_eof(out);
}

/// The first migration, as QEMU 7.2 sends it.
pub(crate) fn first() -> Vec<u8> {
    let mut out = Vec::new();
    encode_header(&mut out);
    encode_configuration(&Configuration { machine: "none".into(), ..Default::default() }, &mut out);
    Command::EnableColo.encode(&mut out);
    encode_start(&SectionName { id: RAM, idstr: IDSTR, instance: 0, version: VERSION }, &mut out);
    let name = BlockName::new("ram").unwrap();
    let block = BlockAnnouncement { name, used_length: 8 * 4096, host_page: None, guest_addr: None };
    encode_block_list(&[block], &mut out);
    out.extend_from_slice(&EOS_RECORD);
    encode_footer(RAM, &mut out);
    ram(&mut out, encode_part, &[0, 1, 2]);
    ram(&mut out, encode_end, &[3]);
    devices(&mut out);
    encode_vm_description(br#"{"devices": [{"name": "dev", "instance_id": 0, "size": 5}]}"#, &mut out);
    out
}

/// A checkpoint is asked for behind these bytes.
pub(crate) fn requested(mut out: Vec<u8>) -> Vec<u8> {
    out.extend_from_slice(&ColoMessage::Request.encode());
    out
}

/// The guest of checkpoint 2 is paused.
pub(crate) fn sending() -> Vec<u8> {
    let mut out = requested(first());
    out.extend_from_slice(&ColoMessage::Send.encode());
    out
}

/// Page 7 of it has come.
pub(crate) fn ram_sent() -> Vec<u8> {
    let mut out = sending();
    ram(&mut out, encode_end, &[7]);
    encode_eof(&mut out);
    out
}

/// Two checkpoints.
pub(crate) fn whole() -> Vec<u8> {
    let (mut out, mut state) = (ram_sent(), Vec::new());
    devices(&mut state);
    encode_size(state.len() as u64, &mut out);
    out.extend_from_slice(&state);
    out
}
