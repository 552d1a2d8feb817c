//! Mapped-ram files to plain streams and back, and headers that are refused.

#![allow(clippy::unwrap_used)]
use std::io::Read;

use flate2::read::GzDecoder;
use proptest::prelude::*;

use super::*;
use crate::ram::BlockName;
use crate::stream::qemu::mapped::{MappedHeader, decode_bitmap};
use crate::stream::qemu::ram::{EOS_RECORD, IDSTR};
use crate::stream::qemu::section::{self, SectionName};
use crate::units::GuestAddr;

const RAM: u32 = 0x77;

fn read_from(file: &[u8]) -> impl FnMut(u64, &mut [u8]) -> io::Result<usize> {
    move |at, into| {
        let rest = file.get(usize::try_from(at).unwrap_or(usize::MAX)..).unwrap_or(&[]);
        let len = rest.len().min(into.len());
        into[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }
}

fn read(file: &[u8], starts_at: u64) -> Result<PlainStream, MappedReadError> {
    let config = IncomingConfig { starts_at, file_len: Some(file.len() as u64), ..IncomingConfig::default() };
    PlainStream::read(config, read_from(file))
}

fn block(name: &str, pages: u64) -> BlockAnnouncement {
    let name = BlockName::new(name).unwrap();
    BlockAnnouncement { name, used_length: pages * 4096, host_page: None, guest_addr: None }
}

/// A stream from the header to the list, which `list` writes, and the items after it.
fn stream(capabilities: &[&str], list: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let capabilities = capabilities.iter().map(|name| (*name).to_owned()).collect();
    let configuration = Configuration { machine: "none".into(), capabilities, ..Configuration::default() };
    let mut out = Vec::new();
    file::encode_header(&mut out);
    file::encode_configuration(&configuration, &mut out);
    section::encode_start(&SectionName { id: RAM, idstr: IDSTR, instance: 0, version: 4 }, &mut out);
    list(&mut out);
    for part in 0..3 {
        out.extend_from_slice(&EOS_RECORD);
        section::encode_footer(RAM, &mut out);
        match part {
            0 => section::encode_part(RAM, &mut out),
            1 => section::encode_end(RAM, &mut out),
            _ => {}
        }
    }
    let json = br#"{"devices": [{"name": "timer", "instance_id": 0, "size": 3}]}"#;
    section::encode_full(&SectionName { id: 9, idstr: "timer", instance: 0, version: 1 }, &mut out);
    out.extend_from_slice(b"abc");
    section::encode_footer(9, &mut out);
    section::encode_eof(&mut out);
    section::encode_vm_description(json, &mut out);
    out
}

fn plain(blocks: &[BlockAnnouncement]) -> Vec<u8> {
    stream(&[], |out| encode_block_list(blocks, out))
}

/// The file as a writer leaves it on disk, with its first word.
fn written(plain: &[u8], starts_at: u64, cuts: usize) -> (Vec<u8>, Vec<Places>) {
    let mut to = ToMapped::new(starts_at, PageSize::SIZE_4K);
    let mut file = vec![0; starts_at as usize];
    for bytes in plain.chunks(cuts.max(1)) {
        to.push(bytes).unwrap();
        for Piece { at, bytes } in to.take_pieces() {
            let (at, end) = (at as usize, at as usize + bytes.len());
            file.resize(file.len().max(end), 0);
            file[at..end].copy_from_slice(&bytes);
        }
    }
    let mut head = Vec::new();
    file::encode_header(&mut head);
    file[starts_at as usize..][..8].copy_from_slice(&head);
    (file, to.places().unwrap().to_vec())
}

/// The stream without its barrier records, which a plain stream without page channels does not have.
fn without_barriers(stream: &PlainStream) -> Vec<u8> {
    let mut barrier = Vec::new();
    Record::MultifdFlush.encode(&mut barrier);
    let mut bytes = stream.bytes.clone();
    // Device state may hold the same bytes.
    for _ in 0..1 + usize::from(stream.has_end) {
        let at = bytes.windows(8).position(|window| window == barrier).unwrap();
        bytes.drain(at..at + 8);
    }
    bytes
}

fn captured() -> Vec<u8> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/q100-microvm-mappedram.gz");
    let mut bytes = Vec::new();
    GzDecoder::new(std::fs::File::open(path).unwrap()).read_to_end(&mut bytes).unwrap();
    bytes
}

/// A file written by QEMU is read and written again. The result equals QEMU's file byte for byte, except for the PARTs,
/// the pages and the bitmaps.
#[test]
fn s69_s72_a_file_of_qemu_becomes_a_plain_stream_and_that_stream_the_same_file() {
    let file = captured();
    let read = read(&file, 0).unwrap();
    assert!(read.has_end);
    assert_eq!(read.places[0].header.pages_offset, 0x10_0000);
    let plain = without_barriers(&read);
    let (again, places) = written(&plain, 0, usize::MAX);
    assert_eq!(places, read.places);
    let last = places.last().unwrap();
    let listed = (last.header.pages_offset + last.block.used_length) as usize;
    let mut blank = file[..listed].to_vec();
    let mut in_file = 0;
    for place in &places {
        let bitmap = place.header.bitmap_offset as usize;
        let present = decode_bitmap(&file[bitmap..], place.block.name.as_str(), place.pages()).unwrap();
        in_file += present.count();
        blank[bitmap..(place.header.pages_offset + place.block.used_length) as usize].fill(0);
    }
    assert!(blank == again[..listed] && in_file > 0, "up to the last page");
    assert!(file.ends_with(&again[again.len() - 1000..]), "devices and description");
}

#[test]
fn s70_s71_what_is_no_whole_mapped_file_is_refused_with_its_offset() {
    let (file, places) = written(&plain(&[block("m", 4), block("vga", 1)]), 0, usize::MAX);
    let whole = read(&file, 0).unwrap();
    assert_eq!(whole.places, places);
    let header = places[1].header.bitmap_offset - 28;
    let patched = |at: u64, bytes: &[u8]| {
        let mut bad = file.clone();
        bad[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        read(&bad, 0).unwrap_err()
    };
    for (what, at, bytes, found, said) in [
        ("page size 0", header + 4, 0u64, header + 4, "page size is 0x0"),
        ("page size", header + 4, 8192, header + 4, "4096"),
        ("bitmap in front", header + 12, 64, header + 12, "\"vga\": the offset of the bitmap is 0x40"),
        ("bitmap outside", header + 12, 1 << 40, header + 12, "outside the file"),
        ("pages over others", header + 20, 1 << 20, header + 20, "in front of their header"),
        ("pages outside", header + 20, 1 << 40, header + 20, "outside the file"),
        ("pages overflow", header + 20, u64::MAX << 12, header + 20, "outside the file"),
        ("length over the total", header - 8, 2 * 4096, header - 8, "longer than the announced total"),
        ("length overflows", header - 8, u64::MAX << 12, header - 8, "longer than the announced total"),
    ] {
        let error = patched(at, &bytes.to_be_bytes());
        let MappedReadError::Decode(DecodeError::Corrupt(corrupt)) = &error else {
            panic!("{what}: {error}")
        };
        assert_eq!(corrupt.at, found, "{what}: {error}");
        assert!(error.to_string().contains(said), "{what}: {error}");
    }
    for cut in [0, 3, 8, 100, places[0].header.pages_offset as usize, file.len() - 100] {
        let error = read(&file[..cut], 0).unwrap_err();
        let outside = error.to_string().contains("outside the file");
        assert!(outside || matches!(error, MappedReadError::Truncated { .. }), "{cut}: {error}");
    }
    assert!(matches!(patched(0, &[0; 8]), MappedReadError::NotEnded));
    assert!(matches!(read(&plain(&[block("m", 4)]), 0), Err(MappedReadError::Plain)));
    let failing = PlainStream::read(IncomingConfig::default(), |_, _| Err(io::Error::other("no disk")));
    assert!(matches!(failing, Err(MappedReadError::Io { at: 0, .. })));
}

/// A block with both offsets zero is not in the file. Without such a header it is unknown what an older QEMU has
/// written.
#[test]
fn s29_s69_shared_blocks_are_left_out_as_qemu_11_does() {
    let list = |absent: bool, addr: Option<GuestAddr>| {
        move |out: &mut Vec<u8>| {
            Record::MemSize { total: 4096 }.encode(out);
            let shared = BlockAnnouncement { guest_addr: addr, ..block("m", 1) };
            encode_block(&shared, out);
            let here = out.len() as u64 + 28;
            let header = match absent {
                true => MappedHeader::absent(PageSize::SIZE_4K),
                false => MappedHeader::behind(here, 4096, PageSize::SIZE_4K).unwrap(),
            };
            encode_header(&header, out);
            if !absent {
                out.resize(header.pages_offset as usize + 4096, 0);
            }
        }
    };
    let capabilities = [IGNORE_SHARED, MAPPED_RAM];
    let addr = Some(GuestAddr(0));
    let whole = read(&stream(&capabilities, list(true, addr)), 0).unwrap();
    assert!(whole.places[0].header.is_absent());
    let error = read(&stream(&capabilities, list(false, addr)), 0).unwrap_err().to_string();
    assert!(error.contains("10.2 and older"), "{error}");
    let error = read(&stream(&[MAPPED_RAM], list(true, None)), 0).unwrap_err();
    assert!(error.to_string().contains("in front of its header"), "{error}");
    let mut to = ToMapped::new(0, PageSize::SIZE_4K);
    let error = to.push(&stream(&[IGNORE_SHARED], list(true, addr))).unwrap_err().to_string();
    assert!(error.contains("x-ignore-shared") && error.contains("10.2"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// For any split of the input and any start of the stream: what is written can be read again.
    #[test]
    fn s69_s70_what_is_written_is_read(
        pages in prop::collection::vec(1u64..300, 1..4),
        starts_at in 0u64..100_000,
        cuts in 1usize..400,
    ) {
        let blocks: Vec<_> = pages.iter().enumerate().map(|(at, pages)| block(&format!("m{at}"), *pages)).collect();
        let plain = plain(&blocks);
        let (file, places) = written(&plain, starts_at, cuts);
        for place in &places {
            prop_assert_eq!(place.header.pages_offset % (1 << 20), 0);
        }
        let read = read(&file, starts_at).unwrap();
        prop_assert_eq!(&read.places, &places);
        prop_assert!(without_barriers(&read) == plain);
    }

    /// For any changed byte: no panic, and accepted bitmaps and pages do not overlap and lie inside the file.
    #[test]
    fn s70_a_damaged_file_is_refused_or_read(at in 0usize..400, bit in 0u32..8) {
        let (mut file, _) = written(&plain(&[block("m", 4), block("vga", 1)]), 0, usize::MAX);
        let list: Vec<usize> = (0..200).chain((1 << 20) + 4 * 4096 - 100..(1 << 20) + 4 * 4096 + 100).collect();
        file[list[at]] ^= 1 << bit;
        if let Ok(read) = read(&file, 0) {
            let mut behind = 0;
            for place in &read.places {
                prop_assert!(place.header.bitmap_offset >= behind);
                prop_assert!(place.header.pages_offset >= place.header.bitmap_offset + place.bitmap_len());
                behind = place.header.pages_offset + place.block.used_length;
                prop_assert!(behind <= file.len() as u64);
            }
        }
    }
}
