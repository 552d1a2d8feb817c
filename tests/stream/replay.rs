//! Applies a stream to zeroed memory and counts its items.

use std::collections::BTreeMap;

use ramwire::stream::qemu::blocks::BlockAnnouncement;
use ramwire::stream::qemu::compressed::inflate_page;
use ramwire::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, Step};
use ramwire::stream::qemu::mapped::{MappedHeader, bitmap_len};
use ramwire::stream::{DecodeError, xbzrle};
use ramwire::units::{BlockIndex, BlockOffset};

const PAGE: usize = 4096;

/// The destination of a test: memory, counts, and the machine.
pub(crate) struct Replay {
    pub(crate) stream: IncomingStream,
    pub(crate) memory: Vec<Vec<u8>>,
    pub(crate) announced: Vec<BlockAnnouncement>,
    pub(crate) counts: BTreeMap<&'static str, u64>,
    pub(crate) first_device_offset: Option<u64>,
    pub(crate) tail: Vec<u8>,
    pub(crate) done: bool,
    /// Events seen, as a coarse trace.
    pub(crate) events: u64,
    mapped: Option<Mapped>,
}

/// The mapped-ram block that is being received.
struct Mapped {
    header: MappedHeader,
    seen: usize,
    bits: Vec<u8>,
}

impl Replay {
    pub(crate) fn new() -> Self {
        Self {
            stream: IncomingStream::new(IncomingConfig::default()),
            memory: Vec::new(),
            announced: Vec::new(),
            counts: BTreeMap::new(),
            first_device_offset: None,
            tail: Vec::new(),
            done: false,
            events: 0,
            mapped: None,
        }
    }

    /// Feeds a whole capture through a buffer that never holds more than `room` bytes beyond what is needed.
    pub(crate) fn feed(&mut self, mut capture: &[u8], room: usize) -> Result<(), DecodeError> {
        let mut buffer: Vec<u8> = Vec::new();
        let mut needed = 1;
        loop {
            assert!(needed <= self.stream.max_needed(), "asks for {needed} bytes");
            let wanted = room.max(needed).saturating_sub(buffer.len()).min(capture.len());
            let (now, later) = capture.split_at(wanted);
            buffer.extend_from_slice(now);
            capture = later;
            let (taken, need) = self.drain(&buffer)?;
            buffer.drain(..taken);
            needed = need;
            if self.done || capture.is_empty() {
                return Ok(());
            }
        }
    }

    /// Takes every event in `input`; returns the consumed bytes and how many are needed next.
    pub(crate) fn drain(&mut self, input: &[u8]) -> Result<(usize, usize), DecodeError> {
        let mut at = 0;
        loop {
            match self.stream.next(&input[at..])? {
                Step::Event { consumed, event } => {
                    at += consumed;
                    self.apply(event)?;
                    if self.done {
                        return Ok((at, 0));
                    }
                }
                Step::NeedMore { consumed, needed } => {
                    at += consumed;
                    assert!(needed > input.len() - at, "asks for bytes it has");
                    return Ok((at, needed));
                }
            }
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn apply(&mut self, event: Event<'_>) -> Result<(), DecodeError> {
        self.events += 1;
        match event {
            Event::Blocks(blocks) => {
                self.count("MEM");
                if self.memory.is_empty() {
                    self.memory = blocks.iter().map(|block| vec![0; block.used_length as usize]).collect();
                }
                self.announced = blocks;
            }
            Event::Page { block, offset, bytes } => {
                self.count("PAGE");
                self.page(block, offset).copy_from_slice(bytes);
            }
            Event::Zero { block, offset } => {
                self.count("ZERO");
                self.page(block, offset).fill(0);
            }
            Event::Xbzrle { block, offset, bytes } => {
                self.count("XBZ");
                xbzrle::decode(bytes, self.page(block, offset)).map_err(|fault| wrong(fault.into()))?;
            }
            Event::Compressed { block, offset, bytes } => {
                self.count("COMP");
                inflate_page(bytes, self.page(block, offset)).map_err(wrong)?;
            }
            Event::MultifdFlush => self.count("MFF"),
            Event::SectionEnd { kind: ramwire::stream::qemu::incoming::SectionKind::Ram, .. } => {
                self.count("EOS")
            }
            Event::MappedBlock { block, header } => {
                self.memory.push(vec![0; block.used_length as usize]);
                self.mapped = Some(Mapped { header, seen: 0, bits: Vec::new() });
            }
            Event::MappedBytes(bytes) => self.mapped_bytes(bytes),
            Event::TailBytes(bytes) => {
                let start = self.stream.position() - bytes.len() as u64;
                self.first_device_offset.get_or_insert(start);
                self.tail.extend_from_slice(bytes);
            }
            Event::Done => self.done = true,
            _ => {}
        }
        Ok(())
    }

    fn page(&mut self, block: BlockIndex, offset: BlockOffset) -> &mut [u8] {
        let start = offset.0 as usize;
        &mut self.memory[block.as_usize()][start..start + PAGE]
    }

    /// Bitmap, gap and pages of the last block, in file order; the bitmap follows the header immediately. Pages whose
    /// bit is clear are stale and stay zero.
    fn mapped_bytes(&mut self, bytes: &[u8]) {
        let Some(mapped) = &mut self.mapped else { return };
        let block = self.memory.last_mut().unwrap();
        let pages_at = (mapped.header.pages_offset - mapped.header.bitmap_offset) as usize;
        let bitmap = bitmap_len((block.len() / PAGE) as u64) as usize;
        for (at, byte) in (mapped.seen..).zip(bytes) {
            if at < bitmap {
                mapped.bits.push(*byte);
            } else if let Some(offset) = at.checked_sub(pages_at) {
                let page = offset / PAGE;
                if (mapped.bits[page / 8] >> (page % 8)) & 1 == 1 {
                    block[offset] = *byte;
                }
            }
        }
        mapped.seen += bytes.len();
    }
}

fn wrong(fault: ramwire::stream::Fault) -> DecodeError {
    ramwire::stream::Corrupt { at: 0, fault }.into()
}
