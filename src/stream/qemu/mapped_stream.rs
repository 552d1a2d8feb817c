//! Conversion between the stream of a mapped-ram file and a plain stream with the same content.
//!
//! In a plain stream pages come in records or on page channels. In a mapped-ram file pages have fixed offsets, which
//! the block list contains. Everything else is the same. So a file is read as a plain stream whose page channels are
//! the offsets in the file, and written in the same way.

mod error;

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
pub use error::MappedReadError;

/// Bytes per read.
const READ: usize = 256 << 10;

/// A RAM block and its offsets in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// The block, as it is announced.
    pub block: BlockAnnouncement,
    /// Offsets of its bitmap and its pages.
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

/// A mapped-ram file as a plain stream whose pages are read separately.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlainStream {
    /// The stream: without the capability `mapped-ram`, with a plain list of blocks, and with a barrier after that
    /// list. If the stream has an end of RAM, a second barrier comes before it.
    pub bytes: Vec<u8>,
    /// The blocks in the order of the list.
    pub places: Vec<Places>,
    /// A second barrier comes before the end of RAM.
    pub has_end: bool,
}

impl PlainStream {
    /// Reads the whole file except its pages: `read` fills a buffer from an offset in the file, as far as the file has
    /// bytes. The stream begins at `config.starts_at`.
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
        let mut buffer = vec![0; READ.max(stream.max_needed())];
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
                        // Bytes of the pages that were read are skipped.
                        start = start.saturating_add(skipped).min(end);
                    }
                    if made.bytes.len() > most {
                        let what = "the length of the stream without the pages";
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

/// A plain stream under construction.
#[derive(Default)]
struct Making {
    bytes: Vec<u8>,
    places: Vec<Places>,
    is_mapped: bool,
    listed: bool,
    /// Phase of the open RAM section.
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
                let (what, why) = ("a second list of blocks", "their offsets were given already");
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

    /// Copies bytes without an event of their own. In the list these are entries, which are written again later.
    fn quiet(&mut self, raw: &[u8]) {
        if self.listed {
            self.bytes.extend_from_slice(raw);
        }
    }

    /// A PART contains nothing but its end, so only the first one is kept.
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

/// Bytes and their offset in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the file.
    pub at: u64,
    /// The bytes to write there.
    pub bytes: Vec<u8>,
}

/// Converts a plain stream into that of a mapped-ram file. It must contain neither pages nor barriers.
///
/// The first [`HEADER_LEN`] bytes of the file's stream are not among the pieces: the writer writes them after all
/// others.
#[derive(Debug)]
pub struct ToMapped {
    machine: IncomingStream,
    page: PageSize,
    /// Bytes of the plain stream that are not parsed yet; unused once the blocks are listed.
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

    /// The offsets of all blocks, once they have been listed.
    pub fn places(&self) -> Option<&[Places]> {
        self.places.as_deref()
    }

    /// Offset of the next byte of the stream in the file.
    pub fn position(&self) -> u64 {
        self.at
    }

    /// The pieces to write, in any order.
    pub fn take_pieces(&mut self) -> Vec<Piece> {
        std::mem::take(&mut self.pieces)
    }

    /// Number of bytes to write.
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
                    // Bytes of the list, which is written again: its entries are known once it is complete.
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
                let why = "its offsets would be larger than any file";
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
mod tests;
