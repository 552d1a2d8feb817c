//! The stream of a mapped-ram file and the plain one that says the same, each from the other.
//!
//! In a plain stream pages come in records or on page channels; in a mapped-ram file they have places, and the block list
//! names those. All else is alike. So a file is read as a stream whose page channels are the places, and written as one.

use std::io;

use super::super::error::{Corrupt, DecodeError, Fault};
use super::blocks::{BlockAnnouncement, encode_block, encode_block_list};
use super::command::Command;
use super::file::{self, Configuration, HEADER_LEN, IGNORE_SHARED, MAPPED_RAM};
use super::incoming::{Ending, Event, IncomingConfig, IncomingStream, SectionKind, Step};
use super::mapped::{HEADER_LEN as MAPPED_HEADER_LEN, MappedHeader, bitmap_len, encode_header};
use super::ram::Record;
use super::section::Phase;
use crate::units::PageSize;

/// Bytes that are read at once.
const READ: usize = 256 << 10;

/// A RAM block and its places in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// The block, as it is announced.
    pub block: BlockAnnouncement,
    /// Where its bitmap and its pages stand.
    pub header: MappedHeader,
}

impl Places {
    /// Bytes of the bitmap.
    pub fn bitmap_len(&self) -> u64 {
        bitmap_len(self.pages())
    }

    /// Pages of the block.
    pub fn pages(&self) -> u64 {
        self.block.used_length / self.header.page_size.bytes()
    }
}

/// Why a file can't be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MappedReadError {
    /// The stream makes no sense at an offset, which is counted from the beginning of the stream.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// It ends too early.
    #[error("it ends inside what begins at {at:#x}: it was not written to its end, save the guest again")]
    Truncated {
        /// Where, in the file.
        at: u64,
    },
    /// It begins with zeros: whoever writes the file puts its first word in place last.
    #[error("the save into it did not end: there is no whole guest in it, save the guest again")]
    NotEnded,
    /// A stream without places.
    #[error("the stream has no mapped-ram pages: it is a plain one, read it by file:")]
    Plain,
    /// The kernel's answer.
    #[error("reading at {at:#x}")]
    Io {
        /// Where, in the file.
        at: u64,
        /// The answer.
        source: io::Error,
    },
}

/// A mapped-ram file as a plain stream whose pages come beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainStream {
    /// The stream: without the capability `mapped-ram`, with a plain list of blocks, and with a barrier behind that list
    /// and, where it ends RAM by itself, in front of that end.
    pub bytes: Vec<u8>,
    /// The blocks in the order of the list.
    pub places: Vec<Places>,
    /// A second barrier follows in front of the end of RAM.
    pub has_end: bool,
}

impl PlainStream {
    /// Reads the whole file but its pages: `read` fills a buffer from an offset in the file on as far as there are bytes. The
    /// stream begins at `config.starts_at`.
    ///
    /// # Errors
    /// [`MappedReadError`].
    pub fn read(
        config: IncomingConfig,
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<usize>,
    ) -> Result<Self, MappedReadError> {
        let starts_at = config.starts_at;
        let most = config.limits.tail_bytes.saturating_mul(2);
        let mut stream = IncomingStream::new(config);
        let mut made = Making::default();
        let mut buffer = vec![0; READ.max(stream.most_needed())];
        let (mut start, mut end) = (0, 0);
        loop {
            match stream.next(&buffer[start..end]).map_err(not_ended)? {
                Step::Event { event: Event::Done, .. } => return made.finish(),
                Step::Event { consumed, event } => {
                    made.take(&event, &buffer[start..start + consumed]).map_err(|fault| {
                        DecodeError::corrupt(0, fault).based(stream.position() - consumed as u64)
                    })?;
                    start += consumed;
                    if matches!(event, Event::MappedBlock { .. }) {
                        let skipped = usize::try_from(stream.skip_mapped()).unwrap_or(usize::MAX);
                        // What was read of the pages is not looked at.
                        start = start.saturating_add(skipped).min(end);
                    }
                    if made.bytes.len() > most {
                        let what = "the length of the stream beside the pages";
                        let fault = Fault::Limit { what, value: made.bytes.len() as u64, limit: most as u64 };
                        return Err(DecodeError::corrupt(0, fault).based(stream.position()).into());
                    }
                }
                Step::NeedMore { consumed, .. } => {
                    made.quiet(&buffer[start..start + consumed]);
                    buffer.copy_within(start + consumed..end, 0);
                    (start, end) = (0, end - start - consumed);
                    let at = starts_at.saturating_add(stream.position());
                    let from = at.saturating_add(end as u64);
                    let got = read(from, &mut buffer[end..])
                        .map_err(|source| MappedReadError::Io { at: from, source })?;
                    end += got;
                    if got == 0 {
                        return match stream.finish() {
                            Ok(Ending::Whole | Ending::NoDescription) => made.finish(),
                            Err(_) => Err(MappedReadError::Truncated { at }),
                        };
                    }
                }
            }
        }
    }
}

fn not_ended(error: DecodeError) -> MappedReadError {
    match error {
        DecodeError::Corrupt(Corrupt { at: 0, fault: Fault::Magic { found: 0 } }) => {
            MappedReadError::NotEnded
        }
        other => other.into(),
    }
}

/// A plain stream in the making.
#[derive(Default)]
struct Making {
    bytes: Vec<u8>,
    places: Vec<Places>,
    is_mapped: bool,
    listed: bool,
    /// Of the section of RAM that is open.
    phase: Option<Phase>,
    parts: u64,
    has_end: bool,
}

impl Making {
    fn take(&mut self, event: &Event<'_>, raw: &[u8]) -> Result<(), Fault> {
        match event {
            Event::Configuration(configuration) => self.configuration(configuration),
            Event::MappedBlock { block, header } => {
                self.places.push(Places { block: block.clone(), header: *header });
            }
            Event::Blocks(_) if self.listed => {
                let (what, why) = ("a second list of blocks", "their places were told already");
                return Err(Fault::OutOfOrder { what, why });
            }
            Event::Blocks(blocks) => {
                self.listed = true;
                encode_block_list(blocks, &mut self.bytes);
                Record::MultifdFlush.encode(&mut self.bytes);
            }
            Event::SectionStart { kind: SectionKind::Ram, phase, .. } => {
                self.phase = Some(*phase);
                self.parts += u64::from(*phase == Phase::Part);
                self.ram(raw);
            }
            Event::RecordsEnd => {
                if self.phase == Some(Phase::End) {
                    self.has_end = true;
                    Record::MultifdFlush.encode(&mut self.bytes);
                }
                self.ram(raw);
            }
            Event::SectionEnd { kind: SectionKind::Ram, .. } => self.ram(raw),
            Event::MappedBytes(_) => {}
            _ => self.bytes.extend_from_slice(raw),
        }
        Ok(())
    }

    /// Bytes without an event of their own. In the list they are entries, which are written anew.
    fn quiet(&mut self, raw: &[u8]) {
        if self.listed {
            self.bytes.extend_from_slice(raw);
        }
    }

    /// A PART holds nothing but its end: one of them says all that any number does.
    fn ram(&mut self, raw: &[u8]) {
        if self.phase != Some(Phase::Part) || self.parts == 1 {
            self.bytes.extend_from_slice(raw);
        }
    }

    fn configuration(&mut self, configuration: &Configuration) {
        self.is_mapped = configuration.has(MAPPED_RAM);
        let mut plain = configuration.clone();
        plain.capabilities.retain(|name| name != MAPPED_RAM);
        file::encode_header(&mut self.bytes);
        file::encode_configuration(&plain, &mut self.bytes);
    }

    fn finish(self) -> Result<PlainStream, MappedReadError> {
        if !self.is_mapped {
            return Err(MappedReadError::Plain);
        }
        Ok(PlainStream { bytes: self.bytes, places: self.places, has_end: self.has_end })
    }
}

/// Bytes and their place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the file.
    pub at: u64,
    /// What is written there.
    pub bytes: Vec<u8>,
}

/// Turns a plain stream into that of a mapped-ram file. Pages must not be in it, nor barriers.
///
/// The first [`HEADER_LEN`] bytes of the file's stream are not among the pieces: they are for the writer to put in place
/// once all others are.
#[derive(Debug)]
pub struct ToMapped {
    machine: IncomingStream,
    page: PageSize,
    /// Bytes of the plain stream that are not understood yet; unused once the blocks are listed.
    unread: Vec<u8>,
    places: Option<Vec<Places>>,
    /// Where the next byte goes.
    at: u64,
    pieces: Vec<Piece>,
}

impl ToMapped {
    /// The file's stream begins at `starts_at`, and the guest has pages of `page`.
    pub fn new(starts_at: u64, page: PageSize) -> Self {
        let config = IncomingConfig { page_size: page, ..IncomingConfig::default() };
        Self {
            machine: IncomingStream::new(config),
            page,
            unread: Vec::new(),
            places: None,
            at: starts_at.saturating_add(HEADER_LEN as u64),
            pieces: Vec::new(),
        }
    }

    /// The places of all blocks, once they have been listed.
    pub fn places(&self) -> Option<&[Places]> {
        self.places.as_deref()
    }

    /// Where the next byte of the stream goes.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// What is to be written, in no order that matters.
    pub fn take_pieces(&mut self) -> Vec<Piece> {
        std::mem::take(&mut self.pieces)
    }

    /// Bytes that are to be written.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.bytes.len()).sum()
    }

    /// True if nothing is to be written.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Takes the next bytes of the plain stream.
    ///
    /// # Errors
    /// [`DecodeError`]: a stream that no mapped-ram file holds.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        if self.places.is_some() {
            self.put(bytes);
            return Ok(());
        }
        self.unread.extend_from_slice(bytes);
        let unread = std::mem::take(&mut self.unread);
        let mut start = 0;
        while self.places.is_none() {
            let base = self.machine.position();
            match self.machine.next(&unread[start..])? {
                Step::Event { consumed, event } => {
                    let raw = &unread[start..start + consumed];
                    start += consumed;
                    self.take(&event, raw).map_err(|fault| DecodeError::corrupt(0, fault).based(base))?;
                }
                Step::NeedMore { consumed, .. } => {
                    // Of the list, which is written anew: its entries are known once it is whole.
                    self.unread = unread[start + consumed..].to_vec();
                    return Ok(());
                }
            }
        }
        self.put(&unread[start..]);
        Ok(())
    }

    fn take(&mut self, event: &Event<'_>, raw: &[u8]) -> Result<(), Fault> {
        match event {
            Event::Configuration(_) if !self.machine.seen().framing.configuration => {
                let why = "a mapped-ram file is known by its configuration section";
                return Err(Fault::OutOfOrder { what: "a stream without one", why });
            }
            Event::Configuration(configuration) if configuration.has(IGNORE_SHARED) => {
                let why = "QEMU 10.2 and older can't read a mapped-ram file with it; turn it off, or write by file:";
                return Err(Fault::OutOfOrder { what: "x-ignore-shared", why });
            }
            Event::Configuration(configuration) => {
                let mut mapped = configuration.clone();
                mapped.capabilities.push(MAPPED_RAM.to_owned());
                let mut out = Vec::new();
                file::encode_configuration(&mapped, &mut out);
                self.put(&out);
            }
            Event::Command(Command::PostcopyAdvise { .. }) => {
                let why = "a guest in a file can't be asked for its pages; leave postcopy off";
                return Err(Fault::OutOfOrder { what: "postcopy", why });
            }
            Event::Blocks(blocks) => self.list(blocks)?,
            _ => self.put(raw),
        }
        Ok(())
    }

    fn list(&mut self, blocks: &[BlockAnnouncement]) -> Result<(), Fault> {
        let total = blocks.iter().fold(0u64, |total, block| total.saturating_add(block.used_length));
        let mut out = Vec::new();
        Record::MemSize { total }.encode(&mut out);
        self.put(&out);
        let mut places = Vec::with_capacity(blocks.len());
        for block in blocks {
            out.clear();
            encode_block(block, &mut out);
            self.put(&out);
            let here = self.at.saturating_add(MAPPED_HEADER_LEN as u64);
            let header = MappedHeader::behind(here, block.used_length, self.page).ok_or_else(|| {
                let why = "its places would lie behind the largest offset";
                Fault::BlockLength { name: block.name.as_str().into(), length: block.used_length, why }
            })?;
            out.clear();
            encode_header(&header, &mut out);
            self.put(&out);
            self.at = header.pages_offset + block.used_length;
            places.push(Places { block: block.clone(), header });
        }
        self.places = Some(places);
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        match self.pieces.last_mut() {
            Some(last) if last.at + last.bytes.len() as u64 == self.at => last.bytes.extend_from_slice(bytes),
            _ => self.pieces.push(Piece { at: self.at, bytes: bytes.to_vec() }),
        }
        self.at += bytes.len() as u64;
    }
}

#[cfg(test)]
mod tests {
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
        let config =
            IncomingConfig { starts_at, file_len: Some(file.len() as u64), ..IncomingConfig::default() };
        PlainStream::read(config, read_from(file))
    }

    fn block(name: &str, pages: u64) -> BlockAnnouncement {
        let name = BlockName::new(name).unwrap();
        BlockAnnouncement { name, used_length: pages * 4096, host_page: None, guest_addr: None }
    }

    /// Header to the list, which `list` writes, and a stream behind it.
    fn stream(capabilities: &[&str], list: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let capabilities = capabilities.iter().map(|name| (*name).to_owned()).collect();
        let configuration =
            Configuration { machine: "none".into(), capabilities, ..Configuration::default() };
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

    /// As a writer puts it on a disk, with its first word.
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

    /// The records that are barriers taken away, which a plain stream without page channels does not have.
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

    /// A file of QEMU's own is read, and what is made of it is written as QEMU has written it, byte for byte, but for the
    /// PARTs, the pages and the bitmaps.
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

    /// A block with both offsets zero is not in the file; without one nobody knows what an older QEMU has written.
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
        /// However the bytes come, wherever the stream begins: what is written is read again.
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

        /// Whatever byte is another: no panic, and places that are accepted lie apart and in the file.
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
}
