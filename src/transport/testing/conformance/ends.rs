//! Both ends of a migration of one block, as short as a link allows it.

use std::sync::Arc;

use crate::guest::{GuestError, GuestMemory, MappedGuest, PageWriter, Placer};
use crate::ram::{BlockName, PageBatch, PageRun, RamBlock, RoundKind, Verdict};
use crate::stream::DecodeError;
use crate::stream::qemu::blocks::{BlockAnnouncement, encode_block_list};
use crate::stream::qemu::file::{Configuration, encode_configuration, encode_header};
use crate::stream::qemu::incoming::{AnnouncedBlocks, Event, IncomingConfig, IncomingStream, Step};
use crate::stream::qemu::ram;
use crate::stream::qemu::section::{
    Phase, SectionName, encode_end, encode_eof, encode_footer, encode_part, encode_start,
};
use crate::stream::qemu::style::PeerStyle;
use crate::sys::{Mapping, RecvPart, SendPart, Stop};
use crate::transport::{
    ByteSink, ByteSource, ChannelError, DestinationConnection, DestinationLink, MoveError, Offer, ReadHints,
    Returned, SourceConnection, SourceLink,
};
use crate::units::{BlockIndex, BlockOffset, PageIndex, PageSize};

pub(super) const PAGE: usize = 4096;
/// More than a batch of any link, and more than one chunk of registered memory.
pub(super) const PAGES: u64 = 1500;
const SECTION: u32 = 2;

/// Memory of one block whose pages all hold `byte`.
pub(super) fn memory(byte: u8) -> Arc<MappedGuest> {
    let bytes = PAGES * PAGE as u64;
    let block = RamBlock::new(BlockName::new("ram").unwrap(), bytes);
    let mapping = Mapping::anonymous(bytes).unwrap();
    let memory = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &mapping).build().unwrap();
    let memory = Arc::new(memory);
    (0..PAGES).for_each(|page| fill(&memory, page, byte));
    memory
}

pub(super) fn run(first: u64, pages: u64) -> PageRun {
    PageRun { block: BlockIndex(0), first: PageIndex(first), pages }
}

pub(super) fn fill(memory: &MappedGuest, page: u64, byte: u8) {
    let landing = memory.table().admit_run(run(page, 1)).unwrap();
    memory.span(landing).unwrap().copy_from(&[byte; PAGE]);
}

/// The bytes of a page.
pub(super) fn page(memory: &MappedGuest, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE];
    memory.span(memory.table().admit_run(run(page, 1)).unwrap()).unwrap().copy_to(&mut bytes);
    bytes
}

/// The source's end.
pub(super) struct Sender {
    /// Dropping it closes a connection of its own.
    _back: Option<Box<dyn ByteSource>>,
    pub(super) link: Box<dyn SourceLink>,
    pub(super) offered: u64,
    pub(super) returned: Vec<Returned>,
}

impl Sender {
    pub(super) fn new(connection: SourceConnection) -> Self {
        Self { _back: connection.back, link: connection.link, offered: 0, returned: Vec::new() }
    }

    pub(super) fn send(&mut self, bytes: &[u8], stop: &Stop) -> Result<(), MoveError> {
        Ok(self.link.sink().send(&[SendPart::Own(bytes)], stop)?)
    }

    /// Sends everything that comes before the first page.
    pub(super) fn set_up(&mut self, stop: &Stop) -> Result<(), MoveError> {
        let mut head = Vec::new();
        encode_header(&mut head);
        encode_configuration(
            &Configuration { machine: "none".into(), ..Configuration::default() },
            &mut head,
        );
        let name = SectionName { id: SECTION, idstr: ram::IDSTR, instance: 0, version: ram::VERSION };
        encode_start(&name, &mut head);
        let used_length = PAGES * PAGE as u64;
        let name = BlockName::new("ram").unwrap();
        encode_block_list(
            &[BlockAnnouncement { name, used_length, host_page: None, guest_addr: None }],
            &mut head,
        );
        self.link.set_peer_style(Some(PeerStyle::RAMWIRE))?;
        self.send(&head, stop)?;
        self.link.open_round(RoundKind::Setup, stop)?;
        self.link.close_round(RoundKind::Setup, stop)?;
        self.end_section(stop)
    }

    fn end_section(&mut self, stop: &Stop) -> Result<(), MoveError> {
        let mut end = ram::EOS_RECORD.to_vec();
        encode_footer(SECTION, &mut end);
        self.send(&end, stop)?;
        Ok(self.link.sink().flush(stop)?)
    }

    /// A round of `runs`, whose pages may be written again when it returns.
    pub(super) fn round(
        &mut self,
        kind: RoundKind,
        runs: &[(PageRun, Verdict)],
        stop: &Stop,
    ) -> Result<(), MoveError> {
        self.open(kind, stop)?;
        self.offer(runs, stop)?;
        self.link.close_round(kind, stop)?;
        self.end_section(stop)?;
        self.link.drain(stop)?;
        self.link.collect(&mut self.returned)
    }

    /// Ends the pages and the stream.
    pub(super) fn finish(&mut self, stop: &Stop) -> Result<(), MoveError> {
        let mut end = Vec::new();
        encode_eof(&mut end);
        self.send(&end, stop)?;
        self.link.sink().flush(stop)?;
        self.link.sink().finish(stop)?;
        self.link.close(stop)
    }

    pub(super) fn open(&mut self, kind: RoundKind, stop: &Stop) -> Result<(), MoveError> {
        let mut head = Vec::new();
        match kind {
            RoundKind::Final => encode_end(SECTION, &mut head),
            _ => encode_part(SECTION, &mut head),
        }
        self.send(&head, stop)?;
        self.link.open_round(kind, stop)
    }

    pub(super) fn offer(&mut self, runs: &[(PageRun, Verdict)], stop: &Stop) -> Result<(), MoveError> {
        let most = u64::from(self.link.abilities().batch_pages);
        for (whole, verdict) in runs {
            for first in (whole.first.0..whole.end().0).step_by(most as usize) {
                let mut batch = PageBatch::default();
                batch.push(run(first, most.min(whole.end().0 - first)), *verdict);
                self.offered += batch.pages();
                loop {
                    match self.link.offer(batch, stop)? {
                        Offer::Taken(_) => break,
                        Offer::Full(back) => batch = back,
                        Offer::Declined(_) => panic!("memory of its own is declined"),
                    }
                    self.link.drain(stop)?;
                }
                self.link.collect(&mut self.returned)?;
            }
        }
        Ok(())
    }

    /// Number of pages of returned batches, including those that a failed link still had.
    pub(super) fn given_back(&mut self) -> u64 {
        let reclaimed: u64 = self.link.reclaim().iter().map(PageBatch::pages).sum();
        // A broken link still returns the batches that it had finished, after the errors of its channels.
        while self.link.collect(&mut self.returned).is_err() {}
        reclaimed + self.come_back()
    }

    /// Number of pages of batches that were returned.
    pub(super) fn come_back(&self) -> u64 {
        self.returned.iter().map(|returned| returned.batch.pages()).sum()
    }
}

/// How reading ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// The last section of RAM and the stream have ended.
    Whole,
    /// The stream ended before.
    Cut,
    Failed(Box<dyn std::error::Error + Send + Sync>),
}

impl From<MoveError> for Ended {
    fn from(error: MoveError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<ChannelError> for Ended {
    fn from(error: ChannelError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<GuestError> for Ended {
    fn from(error: GuestError) -> Self {
        Self::Failed(error.into())
    }
}

impl From<DecodeError> for Ended {
    fn from(error: DecodeError) -> Self {
        Self::Failed(error.into())
    }
}

/// The destination's end.
pub(super) struct Reader {
    pub(super) link: Box<dyn DestinationLink>,
    pub(super) memory: Arc<MappedGuest>,
    pub(super) placer: Option<Arc<Placer>>,
    _back: Option<Box<dyn ByteSink>>,
    stream: IncomingStream,
    bytes: Vec<u8>,
    writer: PageWriter,
    phase: Option<Phase>,
}

impl Reader {
    pub(super) fn new(mut connection: DestinationConnection, memory: Arc<MappedGuest>) -> Self {
        let config = IncomingConfig {
            accept_hooks: connection.link.abilities().has_rounds,
            ..IncomingConfig::default()
        };
        connection.link.stream().set_hints(ReadHints::default());
        Self {
            link: connection.link,
            memory,
            placer: None,
            _back: connection.back,
            stream: IncomingStream::new(config),
            bytes: Vec::new(),
            writer: PageWriter::default(),
            phase: None,
        }
    }

    /// Reads to the end of RAM. `at_round` is called when a round of pages is over and no page of the next one may be
    /// placed yet; it returns whether to continue.
    pub(super) fn read(&mut self, stop: &Stop, mut at_round: impl FnMut(&MappedGuest) -> bool) -> Ended {
        match self.try_read(stop, &mut at_round) {
            Ok(ended) | Err(ended) => ended,
        }
    }

    fn try_read(
        &mut self,
        stop: &Stop,
        at_round: &mut dyn FnMut(&MappedGuest) -> bool,
    ) -> Result<Ended, Ended> {
        let mut start = 0;
        loop {
            let bytes = std::mem::take(&mut self.bytes);
            let (consumed, over) = match self.stream.next(&bytes[start..])? {
                Step::Event { consumed, event } => (consumed, self.take_event(event, stop, at_round)),
                Step::NeedMore { consumed, .. } => {
                    let mut left = bytes[start + consumed..].to_vec();
                    let had = left.len();
                    left.resize(had + (64 << 10), 0);
                    let got = self.link.stream().recv(&mut [RecvPart::Own(&mut left[had..])], stop)?;
                    left.truncate(had + got);
                    (self.bytes, start) = (left, 0);
                    if got == 0 {
                        return Ok(Ended::Cut);
                    }
                    continue;
                }
            };
            self.bytes = bytes;
            start += consumed;
            if let Some(ended) = over? {
                self.bytes.drain(..start);
                return Ok(ended);
            }
        }
    }

    fn take_event(
        &mut self,
        event: Event<'_>,
        stop: &Stop,
        at_round: &mut dyn FnMut(&MappedGuest) -> bool,
    ) -> Result<Option<Ended>, Ended> {
        let abilities = self.link.abilities();
        let barrier_in_start = self.stream.seen().barrier_in_start;
        match event {
            Event::Blocks(list) if self.placer.is_none() => {
                let used = |block: &BlockAnnouncement| RamBlock::new(block.name.clone(), block.used_length);
                let announced: Vec<_> = list.iter().map(used).collect();
                let memory: Arc<dyn GuestMemory> = self.memory.clone();
                let mut placer = Placer::new(memory, &announced, None)?;
                placer.find_used(|_| false);
                let placer = Arc::new(placer);
                self.link.announce(&placer, &AnnouncedBlocks::new(list).unwrap())?;
                self.placer = Some(placer);
            }
            Event::Page { block, offset, bytes } => {
                let placer = self.placer.as_ref().unwrap();
                let landing = placer.admit(block, offset, PAGE as u64)?;
                self.writer.place(placer, landing, std::iter::once(bytes))?;
            }
            Event::Zero { block, offset } => {
                let placer = self.placer.as_ref().unwrap();
                placer.zero(placer.admit(block, BlockOffset(offset.0), PAGE as u64)?)?;
            }
            Event::Hook { .. } => {
                self.link.receive_round(stop, super::Duration::MAX)?;
                return self.round_over(at_round);
            }
            Event::MultifdFlush => return self.barrier(stop, at_round),
            Event::RecordsEnd if abilities.page_channels > 0 && barrier_in_start == Some(false) => {
                return self.barrier(stop, at_round);
            }
            Event::SectionStart { phase, .. } => self.phase = Some(phase),
            Event::Eof if self.phase == Some(Phase::End) => return Ok(Some(Ended::Whole)),
            Event::SectionEnd { .. } if abilities.page_channels == 0 && !abilities.has_rounds => {
                return self.round_over(at_round);
            }
            _ => {}
        }
        Ok(None)
    }

    fn barrier(
        &mut self,
        stop: &Stop,
        at_round: &mut dyn FnMut(&MappedGuest) -> bool,
    ) -> Result<Option<Ended>, Ended> {
        self.link.barrier(stop)?;
        assert_eq!(self.link.missing_packets(), None, "packets are missing at a barrier");
        let over = self.round_over(at_round);
        self.link.release();
        over
    }

    fn round_over(&mut self, at_round: &mut dyn FnMut(&MappedGuest) -> bool) -> Result<Option<Ended>, Ended> {
        let of_pages = self.phase == Some(Phase::Part);
        Ok((of_pages && !at_round(&self.memory)).then_some(Ended::Cut))
    }

    /// No thread places pages any more.
    pub(super) fn end(&mut self, stop: &Stop) {
        self.link.revoke();
        self.link.revoke();
        for time in ["once", "twice"] {
            self.link.close(stop).unwrap_or_else(|error| panic!("closed {time}: {error}"));
        }
    }
}
