//! A destination's result for a complete given stream.
#![allow(clippy::unwrap_used)]

use super::*;

/// A destination's result for a complete stream of bytes.
pub(super) fn received(stream: Vec<u8>, to: Arc<MappedGuest>) -> (DestinationReport, Machine) {
    let (mut near, far) = crate::transport::loopback(1 << 20);
    let machine = Machine::default();
    let settings = DestinationSettings { max_state: 1000, ..DestinationSettings::default() };
    let control = Box::new(machine.clone());
    let session = DestinationSession::new(
        DestinationGuest { memory: Box::new(to), control },
        DestinationConnection::of_stream(Box::new(far.source), Some(Box::new(far.sink))),
        settings,
    );
    let stop = Stop::on(&crate::sys::CancelToken::default());
    near.sink.send(&[SendPart::Own(&stream)], &stop).unwrap();
    drop(near.sink);
    (session.run(), machine)
}

/// Header, greeting and block list of a ramwire.
pub(super) fn native_start(blocks: &[(&str, u64)]) -> Vec<u8> {
    use crate::stream::native::{Hello, Order};
    use crate::stream::qemu::blocks::{BlockAnnouncement, encode_block_list};
    use crate::stream::qemu::command::Command;
    use crate::stream::qemu::section::{SectionName, encode_footer, encode_start};
    use crate::stream::qemu::{file, ram};
    let mut out = Vec::new();
    file::encode_header(&mut out);
    file::encode_configuration(&Configuration::default(), &mut out);
    Command::OpenReturnPath.encode(&mut out);
    Command::Native(Order::Hello(Hello::ours([1; 16], false))).encode(&mut out);
    encode_start(&SectionName { id: 2, idstr: ram::IDSTR, instance: 0, version: ram::VERSION }, &mut out);
    let announce = |(name, pages): &(&str, u64)| BlockAnnouncement {
        name: BlockName::new(name).unwrap(),
        used_length: pages * 4096,
        host_page: None,
        guest_addr: None,
    };
    encode_block_list(&blocks.iter().map(announce).collect::<Vec<_>>(), &mut out);
    out.extend_from_slice(&ram::EOS_RECORD);
    encode_footer(2, &mut out);
    out
}

fn state_section(len: usize) -> Vec<u8> {
    use crate::stream::native::STATE_SECTION;
    use crate::stream::qemu::section::{SectionName, encode_footer, encode_full};
    let mut out = Vec::new();
    encode_full(&SectionName { id: 3, idstr: STATE_SECTION, instance: 0, version: 1 }, &mut out);
    out.extend_from_slice(&(len as u64).to_be_bytes());
    out.resize(out.len() + len, 7);
    encode_footer(3, &mut out);
    out
}

#[test]
fn a_source_that_leaves_out_ram_starts_no_guest() {
    use crate::stream::native::Order;
    use crate::stream::qemu::command::Command;
    // Everything is reported as sent, without a last section of pages.
    let mut early = native_start(&[("block0", 3), ("block1", 1)]);
    Command::Native(Order::StateSent).encode(&mut early);
    Command::Native(Order::Commit { migration_id: [1; 16] }).encode(&mut early);
    // One of our blocks is not in the list.
    let partial = native_start(&[("block0", 3)]);
    for (stream, due) in [(early, "STATE_SENT"), (partial, "block1")] {
        let (report, machine) = received(stream, guest(&[3, 1]));
        let error = crate::error::Chain(&report.error.unwrap()).to_string();
        assert!(error.contains(due), "{error}");
        assert_eq!(report.ending, Ending::Discarded);
        assert!(!machine.runs());
    }
}

#[test]
fn device_state_in_many_sections_is_bounded() {
    use crate::stream::qemu::section::{encode_end, encode_footer};
    let mut stream = native_start(&[("block0", 1)]);
    encode_end(2, &mut stream);
    stream.extend_from_slice(&crate::stream::qemu::ram::EOS_RECORD);
    encode_footer(2, &mut stream);
    (0..20).for_each(|_| stream.extend(state_section(100)));
    let (report, machine) = received(stream, guest(&[1]));
    let error = crate::error::Chain(&report.error.unwrap()).to_string();
    assert!(error.contains("more device state"), "{error}");
    assert!(!machine.runs());
}

/// A QEMU's stream whose device state ends with the connection, without a VM description.
fn undescribed(return_path: bool) -> Vec<u8> {
    use crate::stream::qemu::{blocks, command::Command, file, ram, section};
    let mut out = Vec::new();
    file::encode_header(&mut out);
    file::encode_configuration(&Configuration { machine: "none".into(), ..Default::default() }, &mut out);
    if return_path {
        Command::OpenReturnPath.encode(&mut out);
    }
    let start = section::SectionName { id: 2, idstr: ram::IDSTR, instance: 0, version: ram::VERSION };
    section::encode_start(&start, &mut out);
    let block = |name: &str, pages: u64| blocks::BlockAnnouncement {
        name: BlockName::new(name).unwrap(),
        used_length: pages * 4096,
        host_page: None,
        guest_addr: None,
    };
    blocks::encode_block_list(&[block("block0", 300), block("block1", 7)], &mut out);
    for end in [false, true] {
        if end {
            section::encode_end(2, &mut out);
            for (name, pages) in [("block0", 300), ("block1", 7)] {
                for page in 0..pages {
                    let at = ram::PageAt { block: Some(name), offset: BlockOffset(page * 4096) };
                    ram::Record::Zero { at, fill: 0 }.encode(&mut out);
                }
            }
        }
        out.extend_from_slice(&ram::EOS_RECORD);
        section::encode_footer(2, &mut out);
    }
    let timer = section::SectionName { id: 3, idstr: "timer", instance: 0, version: 2 };
    section::encode_full(&timer, &mut out);
    section::encode_footer(3, &mut out);
    section::encode_eof(&mut out);
    out
}

/// A source that opened a return path and closes before our message has given up: its guest may continue there.
#[test]
fn s15_a_missing_description_is_taken_only_from_a_source_that_expects_no_answer() {
    for (return_path, ending) in [(false, Ending::Running), (true, Ending::Discarded)] {
        let (near, far) = UnixStream::pair().unwrap();
        (&near).write_all(&undescribed(return_path)).unwrap();
        near.shutdown(std::net::Shutdown::Write).unwrap();
        let machine = Machine::default();
        let settings =
            DestinationSettings { accept_missing_description: true, ..DestinationSettings::default() };
        let control = Box::new(machine.clone());
        let memory = Box::new(guest(&[300, 7]));
        let report = DestinationSession::new(
            DestinationGuest { memory, control },
            DestinationConnection::of_stream(plain(&far), Some(plain(&far))),
            settings,
        )
        .run();
        assert_eq!((report.ending, machine.runs()), (ending, !return_path), "{:?}", report.error);
        assert_eq!(matches!(report.error, Some(Error::Truncated { .. })), return_path);
    }
}

/// A source that waits for no answer may have sent the rest already, unless it closed its connection before the end.
#[test]
fn a_source_without_a_return_path_may_have_given_its_guest_away_unless_it_has_left() {
    let whole = undescribed(false);
    // A byte of the list of RAM blocks is followed by what is no section.
    let half = whole.len() / 2;
    let broken = [&whole[..half], &[0xee; 64]].concat();
    for (stream, order, ending) in [
        (&broken, Breakage::None, Ending::Unanswered),
        (&broken, Breakage::TrustUnasked, Ending::Discarded),
        (&whole[..half].to_vec(), Breakage::None, Ending::Discarded),
    ] {
        let (near, far) = UnixStream::pair().unwrap();
        (&near).write_all(stream).unwrap();
        near.shutdown(std::net::Shutdown::Write).unwrap();
        let machine = Machine::default();
        let guest =
            DestinationGuest { memory: Box::new(guest(&[300, 7])), control: Box::new(machine.clone()) };
        let connection = DestinationConnection::of_stream(plain(&far), Some(plain(&far)));
        let mut session = DestinationSession::new(guest, connection, DestinationSettings::default());
        session.break_order(order);
        let report = session.run();
        assert_eq!(report.ending, ending, "{order:?}: {:?}", report.error);
        assert!(!machine.runs());
    }
}
