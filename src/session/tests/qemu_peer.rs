//! A destination and a relay whose source is a QEMU 7.2: which messages they send back and when, and what they pass on.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use super::{Machine, bytes, guest, plain};
use crate::engine::Ending;
use crate::observe::SharedStatistics;
use crate::ram::BlockName;
use crate::session::*;
use crate::stream::qemu::blocks::{BlockAnnouncement, encode_block_list};
use crate::stream::qemu::command::Command;
use crate::stream::qemu::file::{self, Configuration};
use crate::stream::qemu::ram;
use crate::stream::qemu::return_path::Message;
use crate::stream::qemu::section::{
    Phase, SectionName, encode_end, encode_eof, encode_footer, encode_full, encode_part, encode_start,
    encode_vm_description,
};
use crate::sys::CancelToken;
use crate::transport::InlineLink;

/// The stream up to the end of the `ram` START: the return path is open, PING(1) waits for its answer, no page was
/// sent.
pub(in crate::session) fn start() -> Vec<u8> {
    start_with(&[])
}

/// The same, with these commands before the list of blocks.
pub(in crate::session) fn start_with(commands: &[Command<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    file::encode_header(&mut out);
    let machine = "pc-i440fx-7.2".into();
    file::encode_configuration(&Configuration { machine, ..Default::default() }, &mut out);
    Command::OpenReturnPath.encode(&mut out);
    Command::Ping(1).encode(&mut out);
    commands.iter().for_each(|command| command.encode(&mut out));
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
pub(in crate::session) fn rest() -> Vec<u8> {
    [page_and_end(), devices()].concat()
}

fn page_and_end() -> Vec<u8> {
    let mut out = page_of_block0();
    encode_end(2, &mut out);
    out.extend_from_slice(&ram::EOS_RECORD);
    encode_footer(2, &mut out);
    out
}

/// A section with one page, of bytes `fill`, that names its block.
pub(in crate::session) fn page_of_postcopy(block: &str, offset: u64, fill: u8) -> Vec<u8> {
    let mut out = Vec::new();
    encode_part(2, &mut out);
    out.extend_from_slice(&(offset | ram::PAGE).to_be_bytes());
    out.push(block.len() as u8);
    out.extend_from_slice(block.as_bytes());
    out.extend_from_slice(&[fill; 4096]);
    out.extend_from_slice(&ram::EOS_RECORD);
    encode_footer(2, &mut out);
    out
}

pub(in crate::session) fn page_of_block0() -> Vec<u8> {
    let mut out = Vec::new();
    encode_part(2, &mut out);
    out.extend_from_slice(&(4096 | ram::PAGE).to_be_bytes());
    out.extend_from_slice(b"\x06block0");
    out.extend_from_slice(&[7; 4096]);
    out.extend_from_slice(&ram::EOS_RECORD);
    encode_footer(2, &mut out);
    out
}

fn devices() -> Vec<u8> {
    let mut out = Vec::new();
    encode_full(&SectionName { id: 3, idstr: "timer", instance: 0, version: 2 }, &mut out);
    encode_footer(3, &mut out);
    encode_eof(&mut out);
    encode_vm_description(br#"{"devices": [{"name": "timer", "instance_id": 0, "fields": []}]}"#, &mut out);
    out
}

/// A section of `dirty-bitmap` that holds these chunks.
fn bitmap_section(phase: Phase, chunks: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    match phase {
        Phase::Start => {
            encode_start(&SectionName { id: 9, idstr: "dirty-bitmap", instance: 0, version: 1 }, &mut out);
        }
        Phase::Part => encode_part(9, &mut out),
        _ => encode_end(9, &mut out),
    }
    out.extend_from_slice(chunks);
    encode_footer(9, &mut out);
    out
}

/// The content of a source's dirty bitmap.
struct Bitmap {
    /// START: name, granularity, flags.
    start: Vec<u8>,
    /// PART: 16 bytes of bits. Empty PARTs of the source look like its end.
    part: Vec<u8>,
    /// END.
    end: Vec<u8>,
}

impl Bitmap {
    fn new() -> Self {
        let bits =
            [&b"\x40\0\0\0\0\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\x06\x02\0\0\0\x09\x01"[..], &[1]].concat();
        Self {
            start: bitmap_section(Phase::Start, b"\x1c\x02d0\x02b0\0\x01\0\0\x03\x01"),
            part: bitmap_section(Phase::Part, &bits),
            end: bitmap_section(Phase::End, b"\x2c\x02d0\x02b0\x01"),
        }
    }

    /// A complete stream with it, and many empty PARTs.
    fn stream(&self) -> Vec<u8> {
        let idle = bitmap_section(Phase::Part, &[1]).repeat(1000);
        let (page, end) = (page_of_block0(), page_and_end());
        [
            &start()[..],
            &self.start,
            &idle,
            &page,
            &idle,
            &self.part,
            &page,
            &idle,
            &end,
            &self.end,
            &devices(),
        ]
        .concat()
    }

    /// Its part of the device state.
    fn state(&self) -> Vec<u8> {
        [&self.part[..], &self.end, &devices()].concat()
    }
}

pub(in crate::session) fn encoded(message: Message<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    message.encode(&mut out);
    out
}

#[test]
fn s55_s65_s77_a_qemu_source_hears_its_pong_before_it_sends_a_page_then_one_shut_and_nothing_else() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let (machine, memory) = (Machine::default(), guest(&[3, 2]));
    let session = DestinationSession::new(
        DestinationGuest { memory: Box::new(Arc::clone(&memory)), control: Box::new(machine.clone()) },
        DestinationConnection::of_stream(plain(&far), Some(plain(&far))),
        DestinationSettings::default(),
    );
    drop(far);
    let session = std::thread::spawn(move || session.run());
    near.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    near.write_all(&start()).unwrap();
    // S-65: a source may wait for this before its first page.
    let pong = encoded(Message::Pong(1));
    let mut heard = vec![0; pong.len()];
    near.read_exact(&mut heard).unwrap();
    assert_eq!(heard, pong);
    near.write_all(&rest()).unwrap();
    // S-55: the return path holds no SWITCHOVER_ACK, which a QEMU 7.2 does not support, and no native message.
    let mut heard = Vec::new();
    near.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, encoded(Message::Shut { status: 0 }));
    let report = session.join().unwrap();
    assert_eq!((report.ending, machine.runs()), (Ending::Running, true), "{:?}", report.error);
    assert!(!report.native && !report.verified);
    // S-77: a block without received pages is a block of zeros.
    assert!(bytes(&memory, 0) == [[0; 4096], [7; 4096], [0; 4096]].concat());
    assert!(bytes(&memory, 1) == [0; 2 * 4096]);
}

#[test]
fn s20_a_dirty_bitmap_arrives_with_the_device_state_and_sections_that_tell_nothing_take_no_room() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let (machine, memory) = (Machine::default(), guest(&[3, 2]));
    let settings = DestinationSettings { max_state: 1024, ..DestinationSettings::default() };
    let control = Box::new(machine.clone());
    let session = DestinationSession::new(
        DestinationGuest { memory: Box::new(memory), control },
        DestinationConnection::of_stream(plain(&far), Some(plain(&far))),
        settings,
    );
    drop(far);
    let session = std::thread::spawn(move || session.run());
    let bitmap = Bitmap::new();
    near.write_all(&bitmap.stream()).unwrap();
    let mut heard = Vec::new();
    near.read_to_end(&mut heard).unwrap();
    assert!(heard.ends_with(&encoded(Message::Shut { status: 0 })));
    let report = session.join().unwrap();
    assert_eq!(report.ending, Ending::Running, "{:?}", report.error);
    assert_eq!(report.incoming.unwrap().early_sections, bitmap.start);
    assert_eq!(machine.state(), bitmap.state());
}

#[test]
fn s20_a_dirty_bitmap_goes_through_a_relay_also_where_it_stands_between_pages() {
    let [(mut near, relay_near), (relay_far, far)] = [(); 2].map(|()| UnixStream::pair().unwrap());
    let (machine, memory) = (Machine::default(), guest(&[3, 2]));
    let (provider, control) = (Box::new(Arc::clone(&memory)), Box::new(machine.clone()));
    let settings = DestinationSettings::default();
    let session = DestinationSession::new(
        DestinationGuest { memory: provider, control },
        DestinationConnection::of_stream(plain(&far), Some(plain(&far))),
        settings,
    );
    let session = std::thread::spawn(move || session.run());
    let connect = move |memory| {
        let link = Box::new(InlineLink::new(plain(&relay_far), memory));
        Ok(SourceConnection::new(link, Some(plain(&relay_far))))
    };
    let relay = Relay {
        connection: DestinationConnection::of_stream(plain(&relay_near), Some(plain(&relay_near))),
        connect: Box::new(connect),
        incoming: DestinationSettings::default(),
        outgoing: SourceSettings::new(Configuration::default()),
        urgent_came: false,
        urgent: None,
        huge_pages: false,
        cancel: CancelToken::default(),
        control: RelayControl::default(),
        guard: None,
        notice: Arc::new(|_: &Notice| ()),
        statistics: SharedStatistics::default(),
    };
    drop(relay_near);
    let relay = std::thread::spawn(move || relay.run());
    let bitmap = Bitmap::new();
    near.write_all(&bitmap.stream()).unwrap();
    let mut heard = Vec::new();
    near.read_to_end(&mut heard).unwrap();
    let (relay, report) = (relay.join().unwrap(), session.join().unwrap());
    assert!(heard.ends_with(&encoded(Message::Shut { status: 0 })), "{relay:?} {report:?}");
    assert_eq!(report.ending, Ending::Running, "{:?}", report.error);
    assert_eq!(report.incoming.unwrap().early_sections, bitmap.start);
    assert_eq!(machine.state(), bitmap.state());
    assert!(bytes(&memory, 0) == [[0; 4096], [7; 4096], [0; 4096]].concat());
}
