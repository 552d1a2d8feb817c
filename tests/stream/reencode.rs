//! Values decoded from a capture encode to the same bytes.

use ramwire::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, SectionKind, Step};
use ramwire::stream::qemu::section::{self, Item, Phase, SectionName};
use ramwire::stream::qemu::{blocks, file, mapped, ram};
use ramwire::units::PageSize;

use super::captures;

#[test]
fn s02_s06_s07_s23_s29_captures_encode_to_themselves() {
    for (name, _, bytes) in captures::whole_streams() {
        let mut stream = IncomingStream::new(IncomingConfig::default());
        let (mut at, mut encoded, mut carried) = (0, Vec::new(), 0);
        loop {
            let step = stream.next(&bytes[at..]).unwrap_or_else(|error| panic!("{name}: {error}"));
            let Step::Event { consumed, event } = step else { panic!("{name}: {step:?} at {at}") };
            let raw = &bytes[at..at + consumed];
            let id = stream.ram_section_id();
            let start = encoded.len();
            match event {
                Event::TailBytes(_) | Event::MappedBytes(_) => {
                    encoded.extend_from_slice(raw);
                    carried += raw.len();
                }
                Event::Done => break,
                event => encode(&event, id, raw, &mut encoded),
            }
            assert_eq!(&encoded[start..], raw, "{name}: at {at:#x}");
            at += consumed;
        }
        assert!(encoded == bytes && carried < bytes.len(), "{name}");
    }
}

fn encode(event: &Event<'_>, ram_id: Option<u32>, raw: &[u8], out: &mut Vec<u8>) {
    let id = ram_id.unwrap_or_default();
    match event {
        Event::Configuration(configuration) => {
            file::encode_header(out);
            file::encode_configuration(configuration, out);
        }
        Event::Command(command) => command.encode(out),
        Event::SectionStart { phase: Phase::Start, id, kind: SectionKind::Ram } => {
            let name = SectionName { id: *id, idstr: ram::IDSTR, instance: 0, version: ram::VERSION };
            assert_eq!(section::decode_item(raw).unwrap().0, Item::Start(name));
            section::encode_start(&name, out);
        }
        Event::SectionStart { phase: Phase::Part, id, .. } => section::encode_part(*id, out),
        Event::SectionStart { phase: Phase::End, id, .. } => section::encode_end(*id, out),
        Event::RecordsEnd => out.extend_from_slice(&ram::EOS_RECORD),
        Event::SectionEnd { .. } => section::encode_footer(id, out),
        Event::Blocks(list) if !raw.is_empty() => blocks::encode_block_list(list, out),
        Event::Blocks(_) => {}
        Event::MappedBlock { block, header } => {
            // The first entry comes with the word before the list, whose total counts all blocks.
            if let Ok((record @ ram::Record::MemSize { .. }, _)) = ram::decode_record(raw, PageSize::SIZE_4K)
            {
                record.encode(out);
            }
            let mut list = Vec::new();
            blocks::encode_block_list(std::slice::from_ref(block), &mut list);
            out.extend_from_slice(&list[8..]);
            mapped::encode_header(header, out);
        }
        Event::Page { bytes, .. } | Event::Xbzrle { bytes, .. } | Event::Compressed { bytes, .. } => {
            encode_record(raw, out);
            out.extend_from_slice(bytes);
        }
        Event::Zero { .. } | Event::MultifdFlush => encode_record(raw, out),
        other => panic!("no capture holds {other:?}"),
    }
}

fn encode_record(raw: &[u8], out: &mut Vec<u8>) {
    let (record, used) = ram::decode_record(raw, PageSize::SIZE_4K).unwrap();
    let start = out.len();
    record.encode(out);
    assert_eq!(out.len() - start, used);
    if let ram::Record::Page(at) = record
        && at.block.is_none()
    {
        assert_eq!(&out[start..], ram::continued_page(at.offset));
    }
}
