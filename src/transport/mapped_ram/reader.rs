//! A thread that reads pages from their offsets into guest RAM.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crossbeam::channel::Sender;

use super::direct::DirectBuffer;
use super::file::MappedFile;
use super::layers::Layers;
use crate::guest::{PageWriter, Placer};
use crate::ram::Landing;
use crate::stream::qemu::mapped_stream::Places;
use crate::sys::Stop;
use crate::transport::{ChannelError, MoveError};
use crate::units::{BlockIndex, PageIndex};

/// Pages that a thread takes at a time: 8 MiB of 4 KiB pages.
pub(super) const SLICE: u64 = 2048;
/// Bytes that are read into a buffer at once for memory that is written by its file: they stay in the second-level cache.
const BUFFER: usize = 128 << 10;

const READING: &str = "reading pages";

/// What all threads share.
pub(super) struct Common {
    pub(super) layers: Arc<Layers>,
    pub(super) placer: Arc<Placer>,
    pub(super) places: Vec<Places>,
    /// The slice that is next, counted over all blocks.
    pub(super) next: AtomicUsize,
    /// Bytes read so far.
    pub(super) bytes: Arc<AtomicU64>,
}

/// Room of a thread for bytes that do not go straight into place.
#[derive(Default)]
struct Buffers {
    direct: DirectBuffer,
    cached: Vec<u8>,
}

/// One thread. It always reports its end.
pub(super) struct Reader {
    pub(super) common: Arc<Common>,
    pub(super) told: Sender<Result<(), MoveError>>,
    pub(super) stop: Stop,
}

impl Common {
    /// Block and pages of the slice with this number.
    fn slice(&self, mut number: u64) -> Option<(usize, std::ops::Range<u64>)> {
        for (block, places) in self.places.iter().enumerate() {
            let pages = if places.header.is_absent() { 0 } else { places.pages() };
            let slices = pages.div_ceil(SLICE);
            if number < slices {
                let first = number * SLICE;
                return Some((block, first..(first + SLICE).min(pages)));
            }
            number -= slices;
        }
        None
    }
}

impl Reader {
    /// Reads slices until none is left.
    pub(super) fn run(self) {
        let mut writer = PageWriter::default();
        let mut buffers = Buffers::default();
        let ended = loop {
            let number = self.common.next.fetch_add(1, Ordering::Relaxed) as u64;
            let Some((block, pages)) = self.common.slice(number) else { break Ok(()) };
            if let Err(error) = self.read_slice(block, pages, &mut writer, &mut buffers) {
                break Err(error);
            }
        };
        // The receiver is gone once the migration is over.
        let _ = self.told.send(ended);
    }

    /// Runs of pages that are present are read; those between are zero.
    fn read_slice(
        &self,
        block: usize,
        pages: std::ops::Range<u64>,
        writer: &mut PageWriter,
        buffers: &mut Buffers,
    ) -> Result<(), MoveError> {
        let common = &*self.common;
        let index = BlockIndex(block as u32);
        writer.check_faults();
        let mut at = pages.start;
        while at < pages.end {
            if let Some(reason) = self.stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: READING }.into());
            }
            let found = common.layers.next_run(block, at, pages.end - at);
            let found = found.filter(|(_, run, _)| run.start < pages.end);
            let run =
                found.as_ref().map_or(pages.end..pages.end, |(_, run, _)| run.start..run.end.min(pages.end));
            if let Some(hole) = common.placer.admit_pages(index, PageIndex(at), run.start - at)? {
                common.placer.zero(hole)?;
            }
            if let Some(landing) =
                common.placer.admit_pages(index, PageIndex(run.start), run.end - run.start)?
                && let Some((file, _, from)) = found
            {
                // Windows may reach to the end of the slice: what lies between two runs is holes for the most part.
                let end = from + (pages.end - run.start) * common.placer.page_bytes();
                self.read_run((file, from, end), landing, writer, buffers)?;
                common.placer.commit(landing);
            }
            at = run.end;
        }
        Ok(())
    }

    /// Reads past the page cache where that costs less, in windows that end at `end` of the file; returns how many bytes. The
    /// rest is read through the cache.
    fn read_directly(
        &self,
        (file, from, end): (&MappedFile, u64, u64),
        landing: Landing,
        writer: &mut PageWriter,
        window: &mut DirectBuffer,
    ) -> Result<usize, MoveError> {
        let Common { placer, bytes, .. } = &*self.common;
        let (mut done, len) = (0, landing.len() as usize);
        let Some(direct) = file.direct() else { return Ok(done) };
        while done < len {
            let at = from + done as u64;
            if let Some(part) = window.part(direct, at, len - done) {
                writer.write(placer, landing, done as u64, std::iter::once(part))?;
                done += part.len();
                bytes.fetch_add(part.len() as u64, Ordering::Relaxed);
            } else if !direct.fill(window, at, end.saturating_sub(at)) {
                break;
            }
            if let Some(reason) = self.stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: READING }.into());
            }
        }
        Ok(done)
    }

    /// Reads directly into place, or through `buffer` if writing through the backing file costs less.
    fn read_run(
        &self,
        (file, from, end): (&MappedFile, u64, u64),
        landing: Landing,
        writer: &mut PageWriter,
        buffers: &mut Buffers,
    ) -> Result<(), MoveError> {
        let Common { placer, bytes, .. } = &*self.common;
        let mut done = self.read_directly((file, from, end), landing, writer, &mut buffers.direct)?;
        let by_buffer = done < landing.len() as usize && writer.prepare(placer, &[landing]);
        let span = placer.target(landing)?;
        let buffer = &mut buffers.cached;
        while done < span.len() {
            let at = from + done as u64;
            let got = if by_buffer {
                buffer.resize(BUFFER, 0);
                let room = buffer.len().min(span.len() - done);
                let got = file.read(&mut buffer[..room], at);
                if let Ok(got) = got {
                    writer.write(placer, landing, done as u64, std::iter::once(&buffer[..got]))?;
                }
                got
            } else {
                let Some(rest) = span.part(done, span.len() - done) else { break };
                file.read_pages(rest, at)
            };
            match got {
                Ok(0) => {
                    let source = std::io::Error::other("the file has been made shorter meanwhile");
                    return Err(file.failed_at(READING, at, &source).into());
                }
                Ok(got) => {
                    done += got;
                    bytes.fetch_add(got as u64, Ordering::Relaxed);
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(file.failed_at(READING, at, &error).into()),
            }
        }
        Ok(())
    }
}
