//! What the QEMUs of these tests send.

use super::*;

pub(super) const DESCRIPTION: &[u8] = br#"{"devices": [{"name": "timer", "instance_id": 0, "fields": []}]}"#;

/// Header, return path, PING(1), block list.
pub(crate) fn setup() -> Vec<u8> {
    setup_of(true)
}

pub(super) fn setup_of(pings: bool) -> Vec<u8> {
    let mut out = Vec::new();
    file::encode_header(&mut out);
    let machine = "pc-i440fx-7.2".into();
    file::encode_configuration(&Configuration { machine, ..Default::default() }, &mut out);
    Order::OpenReturnPath.encode(&mut out);
    if pings {
        Order::Ping(1).encode(&mut out);
    }
    encode_start(&SectionName { id: 2, idstr: ram::IDSTR, instance: 0, version: ram::VERSION }, &mut out);
    let block = BlockAnnouncement {
        name: BlockName::new("m0").unwrap(),
        used_length: 3 * 4096,
        host_page: None,
        guest_addr: None,
    };
    encode_block_list(&[block], &mut out);
    out.extend_from_slice(&ram::EOS_RECORD);
    encode_footer(2, &mut out);
    out
}

/// A round with a page.
pub(super) fn round() -> Vec<u8> {
    let mut out = Vec::new();
    encode_part(2, &mut out);
    out.extend_from_slice(&(4096 | ram::PAGE).to_be_bytes());
    out.extend_from_slice(b"\x02m0");
    out.extend_from_slice(&[7; 4096]);
    out.extend_from_slice(&ram::EOS_RECORD);
    encode_footer(2, &mut out);
    out
}

/// The last round, the device state and, if the guest is handed over, the byte that does so and those after it.
pub(super) fn end(gives_away: bool) -> Vec<u8> {
    let mut out = Vec::new();
    encode_end(2, &mut out);
    out.extend_from_slice(&ram::EOS_RECORD);
    encode_footer(2, &mut out);
    encode_full(&SectionName { id: 3, idstr: "timer", instance: 0, version: 2 }, &mut out);
    encode_footer(3, &mut out);
    if gives_away {
        encode_eof(&mut out);
        encode_vm_description(DESCRIPTION, &mut out);
    }
    out
}

pub(crate) fn shut(status: u32) -> Vec<u8> {
    encoded(Message::Shut { status })
}

pub(super) fn encoded(word: Message<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    word.encode(&mut out);
    out
}

pub(super) fn order(order: Order<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    order.encode(&mut out);
    out
}

/// As [`setup`], of a source that may switch to postcopy.
pub(super) fn setup_of_postcopy() -> Vec<u8> {
    let mut out = setup();
    let advise = order(Order::PostcopyAdvise { host_pages: 4096, target_page: 4096 });
    let ping = order(Order::Ping(1));
    let at = out.windows(ping.len()).position(|part| part == ping).unwrap() + ping.len();
    out.splice(at..at, advise);
    out
}
