//! A switch to postcopy with a connection for urgent pages.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ramwire::engine::Ending;
use ramwire::ram::BlockName;
use ramwire::session::{
    DestinationConnection, DestinationGuest, DestinationSession, DestinationSettings, NextConnection,
};
use ramwire::stream::qemu::blocks::{BlockAnnouncement, encode_block_list};
use ramwire::stream::qemu::command::{Command, encode_discards};
use ramwire::stream::qemu::file::{self, Configuration};
use ramwire::stream::qemu::package::encode_package;
use ramwire::stream::qemu::ram;
use ramwire::stream::qemu::return_path::Message;
use ramwire::stream::qemu::section::{SectionName, encode_end, encode_eof, encode_footer, encode_start};
use ramwire::sys::Stop;
use ramwire::transport::{ChannelError, OpenError, StreamChannel, StreamOptions};
use ramwire::units::{BlockOffset, PageSize};
use seccompiler::BpfProgram;

use super::PAGES;
use super::machine::{Machine, spawner};

/// Returns the one connection for urgent pages, then none until the migration's end.
fn one_more(connection: UnixStream) -> Box<dyn NextConnection> {
    let mut there = Some(connection);
    Box::new(move |stop: &Stop| match there.take() {
        Some(socket) => Ok(StreamChannel::from_fd(socket.into(), "peer", &StreamOptions::default()).unwrap()),
        None => {
            while stop.sleep(Duration::from_millis(1)).is_none() {}
            let (peer, doing) = ("peer".into(), "waiting for a connection");
            Err(OpenError::from(ChannelError::Closed { peer, doing }))
        }
    })
}

/// A switch to postcopy by a source with a connection for urgent pages: here a hand-written stream. The last pages are
/// discarded, and are sent on that connection.
pub(crate) fn urgent(filters: Option<HashMap<String, BpfProgram>>) {
    const MISSING: u64 = 3;
    let there = Machine::new();
    let spawner = spawner(filters);
    let ((mut near, far), (mut urgent, theirs)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let mut settings = DestinationSettings::default();
    settings.spawner = spawner;
    settings.postcopy = true;
    let far = StreamChannel::from_fd(far.into(), "peer", &StreamOptions::default()).unwrap();
    let guest = DestinationGuest { memory: Box::new(there.memory.clone()), control: Box::new(there.clone()) };
    let session = DestinationSession::new(guest, DestinationConnection::over(far), settings)
        .with_next_connection(one_more(theirs));
    let arriving = session.spawn().unwrap();

    let mut main = Vec::new();
    file::encode_header(&mut main);
    file::encode_configuration(&Configuration::default(), &mut main);
    Command::OpenReturnPath.encode(&mut main);
    Command::PostcopyAdvise { host_pages: 4096, target_page: 4096 }.encode(&mut main);
    let name = BlockName::new("ram").unwrap();
    let host_page = Some(PageSize::SIZE_4K);
    let block = BlockAnnouncement { name, used_length: PAGES * 4096, host_page, guest_addr: None };
    encode_start(&SectionName { id: 2, idstr: ram::IDSTR, instance: 0, version: ram::VERSION }, &mut main);
    encode_block_list(&[block], &mut main);
    let end_section = |out: &mut Vec<u8>| {
        out.extend_from_slice(&ram::EOS_RECORD);
        encode_footer(2, out);
    };
    end_section(&mut main);
    let first = PAGES - MISSING;
    encode_discards("ram", &[(first * 4096, MISSING * 4096)], &mut main);
    let mut package = Vec::new();
    encode_package(b"devices", false, &mut package);
    Command::Packaged { size: package.len() as u32 }.encode(&mut main);
    main.extend_from_slice(&package);
    encode_end(2, &mut main);
    end_section(&mut main);
    encode_eof(&mut main);
    near.write_all(&main).unwrap();
    for page in first..PAGES {
        let mut record = Vec::new();
        ram::Record::Page(ram::PageAt { block: Some("ram"), offset: BlockOffset(page * 4096) })
            .encode(&mut record);
        record.extend_from_slice(&[9; 4096]);
        urgent.write_all(&record).unwrap();
    }
    // It stays open until the destination has reported its end.
    let (mut answers, mut shut, mut byte) = (Vec::new(), Vec::new(), [0]);
    Message::Shut { status: 0 }.encode(&mut shut);
    while !answers.ends_with(&shut) {
        near.read_exact(&mut byte).unwrap();
        answers.extend_from_slice(&byte);
    }
    drop(urgent);
    let arrived = arriving.wait().unwrap();
    assert_eq!(arrived.ending, Ending::Running, "{:?}", arrived.error);
    assert_eq!(arrived.missing_pages.unwrap().preempt_pages, MISSING);
    assert!(there.bytes().ends_with(&[9; MISSING as usize * 4096]));
    println!("migrated");
}
