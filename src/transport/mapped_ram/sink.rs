//! The sink for the stream: it writes the stream into the file around the pages, and its first word last.

use std::io;
use std::sync::Arc;

use super::file::MappedFile;
use super::writer::{Slots, Written};
use crate::ram::PageBitmap;
use crate::stream::DecodeError;
use crate::stream::qemu::file::encode_header;
use crate::stream::qemu::mapped::encode_bitmap;
use crate::stream::qemu::mapped_stream::{Piece, ToMapped};
use crate::stream::snapshot_note::{INCREMENTAL, SnapshotNote};
use crate::sys::{SendPart, Stop};
use crate::transport::{ByteSink, ChannelError};
use crate::units::PageSize;

/// Bytes that are gathered before they are written.
const GATHERED: usize = 1 << 20;

/// Space that is reserved for the end of the stream before the guest is handed over, so that a full disk is detected
/// before: a VM description has some 50 KiB.
const RESERVED: u64 = 1 << 20;

const WRITING: &str = "writing the stream";

/// The file as a sink of a plain stream.
pub(super) struct MappedSink {
    file: Arc<MappedFile>,
    written: Arc<Written>,
    to: ToMapped,
    /// Bytes of the plain stream.
    position: u64,
    /// The old content is deleted: with the first byte, since a migration may be refused before that.
    emptied: bool,
    /// The last page is at its offset.
    complete: bool,
    has_bitmaps: bool,
    ended: bool,
    /// Written behind the stream.
    note: Option<SnapshotNote>,
}

impl MappedSink {
    pub(super) fn new(file: Arc<MappedFile>, written: Arc<Written>, page: PageSize) -> Self {
        let to = ToMapped::new(file.starts_at, page);
        Self {
            file,
            written,
            to,
            position: 0,
            emptied: false,
            complete: false,
            has_bitmaps: false,
            ended: false,
            note: None,
        }
    }

    /// To be written behind the stream.
    pub(super) fn keep_note(&mut self, note: SnapshotNote) {
        self.note = Some(note);
    }

    /// No more pages follow: everything flushed from here on is on the disk.
    pub(super) fn pages_end(&mut self) {
        self.complete = true;
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), ChannelError> {
        if !self.emptied {
            self.file.empty().map_err(|source| self.file.failed(WRITING, source))?;
            self.emptied = true;
        }
        let refused = |error: DecodeError| self.file.failed(WRITING, io::Error::other(error));
        self.to.push(bytes).map_err(refused)?;
        self.position += bytes.len() as u64;
        if let Some(places) = self.to.places() {
            self.written.slots.get_or_init(|| places.iter().map(Slots::new).collect());
        }
        if self.to.len() > GATHERED { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> Result<(), ChannelError> {
        for Piece { at, bytes } in self.to.take_pieces() {
            let written = self.file.write(&bytes, at);
            written.map_err(|error| self.file.failed_at(WRITING, at, &error))?;
        }
        Ok(())
    }

    fn write_bitmaps(&mut self) -> Result<(), ChannelError> {
        for slots in self.written.slots.get().into_iter().flatten() {
            let mut present = PageBitmap::new(slots.present.len());
            slots.present.copy_into(&mut present);
            let mut bytes = Vec::new();
            encode_bitmap(&present, &mut bytes);
            let written = self.file.write(&bytes, slots.bitmap_offset);
            written.map_err(|error| self.file.failed_at("writing a bitmap", slots.bitmap_offset, &error))?;
        }
        self.has_bitmaps = true;
        let at = self.to.position();
        self.file.reserve(at, RESERVED).map_err(|error| self.file.failed_at("taking room", at, &error))
    }

    /// Returns after all received bytes are on the disk.
    fn settle(&mut self) -> Result<(), ChannelError> {
        self.write()?;
        if !self.has_bitmaps {
            self.write_bitmaps()?;
        }
        self.file.sync().map_err(|source| self.file.failed("syncing", source))
    }

    fn write_first_word(&self) -> io::Result<()> {
        let mut word = Vec::new();
        encode_header(&mut word);
        if self.note.as_ref().is_some_and(|note| note.base.is_some()) {
            word = INCREMENTAL.to_vec();
        }
        self.file.write(&word, self.file.starts_at)?;
        self.file.sync()?;
        self.file.sync_folder()
    }
}

impl crate::transport::Sealed for MappedSink {}

impl ByteSink for MappedSink {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        if let Some(reason) = stop.reason() {
            return Err(ChannelError::Stopped { reason, doing: WRITING });
        }
        for part in parts {
            match part {
                SendPart::Own(bytes) => self.push(bytes)?,
                SendPart::Guest(_) => {
                    let source = io::Error::other("a mapped-ram file has no pages in its stream");
                    return Err(self.file.failed(WRITING, source));
                }
            }
        }
        Ok(())
    }

    fn flush(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        if self.complete { self.settle() } else { self.write() }
    }

    fn finish(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        if self.ended {
            return Ok(());
        }
        let (end, mut note) = (self.to.position(), Vec::new());
        self.note.iter().for_each(|kept| kept.encode(&mut note));
        if !note.is_empty() {
            let written = self.file.write(&note, end);
            written.map_err(|error| self.file.failed_at("writing its note", end, &error))?;
        }
        self.settle()?;
        // What was reserved and is not used.
        let cut = self.file.cut(end + note.len() as u64);
        cut.map_err(|source| self.file.failed("giving room back", source))?;
        if let Err(source) = self.write_first_word() {
            // As far as still possible: a file that may not be on the disk must not be taken for complete later.
            let _ = self.file.write(&[0; 8], self.file.starts_at);
            let _ = self.file.sync();
            return Err(self.file.failed("writing the first word", source));
        }
        self.ended = true;
        Ok(())
    }

    fn position(&self) -> u64 {
        self.position
    }
}
