//! A destination whose source is a QEMU 7.2: what it says back, and when.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::tests::{Machine, bytes, guest, plain};
use super::*;
use crate::engine::Ending;
use crate::ram::BlockName;
use crate::stream::qemu::blocks::{BlockAnnouncement, encode_block_list};
use crate::stream::qemu::command::Command;
use crate::stream::qemu::file::{self, Configuration};
use crate::stream::qemu::ram;
use crate::stream::qemu::return_path::Message;
use crate::stream::qemu::section::{
    SectionName, encode_end, encode_eof, encode_footer, encode_full, encode_part, encode_start,
    encode_vm_description,
};

/// Up to the end of the `ram` START: the return path is open, PING(1) waits for its answer, no page was sent.
fn start() -> Vec<u8> {
    let mut out = Vec::new();
    file::encode_header(&mut out);
    let machine = "pc-i440fx-7.2".into();
    file::encode_configuration(&Configuration { machine, ..Default::default() }, &mut out);
    Command::OpenReturnPath.encode(&mut out);
    Command::Ping(1).encode(&mut out);
    encode_start(&SectionName { id: 2, idstr: ram::IDSTR, instance: 0, version: ram::VERSION }, &mut out);
    let block = |name: &str, pages: u64| BlockAnnouncement {
        name: BlockName::new(name).unwrap(),
        used_length: pages * 4096,
        host_page: None,
        guest_addr: None,
    };
    encode_block_list(&[block("block0", 3), block("block1", 2)], &mut out);
    out.extend_from_slice(&ram::EOS_RECORD);
    encode_footer(2, &mut out);
    out
}

/// One page of block0, the last round, a device, and its description.
fn rest() -> Vec<u8> {
    let mut out = Vec::new();
    encode_part(2, &mut out);
    out.extend_from_slice(&(4096 | ram::PAGE).to_be_bytes());
    out.extend_from_slice(b"\x06block0");
    out.extend_from_slice(&[7; 4096]);
    out.extend_from_slice(&ram::EOS_RECORD);
    encode_footer(2, &mut out);
    encode_end(2, &mut out);
    out.extend_from_slice(&ram::EOS_RECORD);
    encode_footer(2, &mut out);
    encode_full(&SectionName { id: 3, idstr: "timer", instance: 0, version: 2 }, &mut out);
    encode_footer(3, &mut out);
    encode_eof(&mut out);
    encode_vm_description(br#"{"devices": [{"name": "timer", "instance_id": 0, "fields": []}]}"#, &mut out);
    out
}

fn encoded(message: Message<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

#[test]
fn s55_s65_s77_a_qemu_source_hears_its_pong_before_it_sends_a_page_then_one_shut_and_nothing_else() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let (machine, memory) = (Machine::default(), guest(&[3, 2]));
    let session = DestinationSession::new(
        plain(&far),
        Some(plain(&far)),
        Box::new(Arc::clone(&memory)),
        Box::new(machine.clone()),
        DestinationSettings::default(),
    );
    drop(far);
    let session = std::thread::spawn(move || session.run());
    near.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    near.write_all(&start()).unwrap();
    // S-65: a source may wait for this with its first page.
    let pong = encoded(Message::Pong(1));
    let mut heard = vec![0; pong.len()];
    near.read_exact(&mut heard).unwrap();
    assert_eq!(heard, pong);
    near.write_all(&rest()).unwrap();
    // S-55: to its end the return path holds no SWITCHOVER_ACK, which a QEMU 7.2 does not know, and no word of ours.
    let mut heard = Vec::new();
    near.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, encoded(Message::Shut { status: 0 }));
    let report = session.join().unwrap();
    assert_eq!((report.ending, machine.runs()), (Ending::Running, true), "{:?}", report.error);
    assert!(!report.native && !report.verified);
    // S-77: a block of which no page came is a block of zeros.
    assert!(bytes(&memory, 0) == [[0; 4096], [7; 4096], [0; 4096]].concat());
    assert!(bytes(&memory, 1) == [0; 2 * 4096]);
}
