//! The state machine of [`IncomingStream`].

use super::super::super::error::{DecodeError, Fault};
use super::super::super::reader::Reader;
use super::super::blocks::ListForm;
use super::super::command::{Command, decode_command};
use super::super::early::{BitmapChunk, decode_bitmap_chunk, decode_virtio_mem};
use super::super::file::{
    CONFIGURATION, Configuration, HEADER_LEN, IGNORE_SHARED, MAPPED_RAM, decode_configuration, decode_header,
};
use super::super::ram;
use super::super::section::Phase;
use super::super::tail::Tail;
use super::IncomingConfig;
use super::event::{Ending, Event, SectionKind, Seen, Step};
use super::table::AnnouncedBlocks;
use crate::units::PageSize;

mod records;
mod sections;

/// Reads one incoming stream; see the [module](super).
#[derive(Clone, Debug)]
pub struct IncomingStream {
    config: IncomingConfig,
    page: PageSize,
    state: State,
    /// The section that is open; meaningless between sections.
    open: Open,
    /// Offset of the next unread byte.
    position: u64,
    configuration: Option<Configuration>,
    blocks: AnnouncedBlocks,
    lists: Lists,
    ids: Ids,
    reached: Reached,
    seen: Seen,
    tail: Tail,
}

/// The block list, which comes again in a later section.
#[derive(Clone, Debug, Default)]
struct Lists {
    form: ListForm,
    mapped: bool,
    /// A block of a mapped-ram file is not in it.
    leaves_blocks_out: bool,
    arriving: AnnouncedBlocks,
    /// One has come.
    listed: bool,
}

/// Ids of the sections that come in several parts.
#[derive(Clone, Copy, Debug, Default)]
struct Ids {
    ram: Option<u32>,
    bitmap: Option<u32>,
}

/// What has come, and decides what may follow.
#[derive(Clone, Copy, Debug, Default)]
struct Reached {
    /// A section has ended, so it is known whether there are footers.
    footers_known: bool,
    /// A barrier record was in the open START.
    barrier: bool,
    /// A ram PART or END has begun.
    pages_began: bool,
    /// A package was received: what follows is postcopy.
    postcopy: bool,
    /// RAM of a checkpoint, whose device state comes elsewhere.
    checkpoint: bool,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    phase: Phase,
    id: u32,
    kind: SectionKind,
}

/// The expected item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// File header and configuration.
    Header,
    /// A section, a command or the end.
    Items,
    /// A record of the open ram section.
    Records,
    /// An entry of the block list, or its end if nothing remains.
    List { remaining: u64 },
    /// Bitmap and pages of a mapped-ram block, then the list again.
    Mapped { left: u64, remaining: u64 },
    /// The head of an early virtio-mem section.
    VirtioMem,
    /// A chunk of a dirty-bitmap section.
    Bitmap,
    /// Bytes of a section that is copied without being parsed, then a chunk or the footer.
    Carried { left: u64, chunk_follows: bool },
    /// The length of a ramwire's device state.
    NativeLength,
    /// The footer of the open section.
    Footer,
    /// Bytes of a package.
    Package { left: u32 },
    /// Device sections and everything after them.
    Tail,
    /// Nothing.
    Done,
}

/// One transition: bytes consumed, with or without an event.
enum Progress<'a> {
    Told(usize, Event<'a>),
    Quiet(usize),
}

use Progress::{Quiet, Told};

type Advance<'a> = Result<Progress<'a>, DecodeError>;

impl IncomingStream {
    /// A machine before the first byte of a stream.
    pub fn new(config: IncomingConfig) -> Self {
        Self {
            page: config.page_size,
            config,
            state: State::Header,
            open: Open { phase: Phase::Full, id: 0, kind: SectionKind::Ram },
            position: 0,
            configuration: None,
            blocks: AnnouncedBlocks::default(),
            lists: Lists::default(),
            ids: Ids::default(),
            reached: Reached::default(),
            seen: Seen::default(),
            tail: Tail::default(),
        }
    }

    /// Continues on a new channel after postcopy was interrupted: the next byte begins an item without a header before
    /// it, a partially received section is discarded, and the next record names its block. The end of RAM is sent
    /// again.
    pub fn restart(&mut self) {
        self.state = State::Items;
        self.position = 0;
        self.seen.ram_end = false;
        self.blocks.forget_current();
    }

    /// Continues behind a whole stream with the RAM of a checkpoint (COLO): sections of RAM and commands up to an end of
    /// file, then [`Event::Done`]. The tail is given up. The first record may continue the block of the last one before.
    pub fn begin_checkpoint(&mut self) {
        self.state = State::Items;
        self.reached.checkpoint = true;
        self.seen.ram_end = false;
        self.tail = Tail::new(self.seen.framing);
    }

    /// Decodes the next item of `input`, which begins at the first byte that was not consumed.
    ///
    /// # Errors
    ///
    /// Only [`DecodeError::Corrupt`], with the offset from the start of the stream: truncation is [`Step::NeedMore`].
    /// The stream is then unusable, since the start of the next item is unknown.
    #[inline]
    pub fn next<'a>(&mut self, input: &'a [u8]) -> Result<Step<'a>, DecodeError> {
        let mut consumed = 0;
        loop {
            match self.advance(input.get(consumed..).unwrap_or(&[])) {
                Ok(Told(used, event)) => {
                    consumed += used;
                    self.position += used as u64;
                    return Ok(Step::Event { consumed, event });
                }
                Ok(Quiet(used)) => {
                    consumed += used;
                    self.position += used as u64;
                }
                Err(DecodeError::Truncated { needed, .. }) => return Ok(Step::NeedMore { consumed, needed }),
                Err(corrupt) => return Err(corrupt.based(self.position)),
            }
        }
    }

    /// Returns what the orderly end of the channel means, after [`Step::NeedMore`].
    ///
    /// # Errors
    ///
    /// [`DecodeError::Truncated`] if the stream was not at an end.
    pub fn finish(&self) -> Result<Ending, DecodeError> {
        match self.state {
            State::Done => Ok(Ending::Whole),
            State::Tail if self.tail.description().is_some() => Ok(Ending::Whole),
            State::Tail if self.tail.may_end_here() => Ok(Ending::NoDescription),
            _ => Err(DecodeError::Truncated { needed: 1, have: 0 }),
        }
    }

    /// Offset of the first byte that has not been consumed, from the start of the stream.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// After [`Event::MappedBlock`]: skips the bitmap and the pages, which the caller need not have read. The next byte
    /// of the stream is this many bytes after the last consumed one; after any other event it is 0.
    pub fn skip_mapped(&mut self) -> u64 {
        match &mut self.state {
            State::Mapped { left, .. } => {
                self.position += *left;
                std::mem::take(left)
            }
            _ => 0,
        }
    }

    /// Target page size in force.
    pub fn page_size(&self) -> PageSize {
        self.page
    }

    /// The configuration, once it has arrived.
    pub fn configuration(&self) -> Option<&Configuration> {
        self.configuration.as_ref()
    }

    /// The announced blocks; empty until [`Event::Blocks`].
    pub fn blocks(&self) -> &AnnouncedBlocks {
        &self.blocks
    }

    /// Id of the ram section, once it has started. A stream that is written again needs an id of its own that does not
    /// occur in the tail.
    pub fn ram_section_id(&self) -> Option<u32> {
        self.ids.ram
    }

    /// What the stream has shown about its sender.
    pub fn seen(&self) -> &Seen {
        &self.seen
    }

    /// Device sections, end of file and VM description, as far as they have arrived.
    pub fn tail(&self) -> &Tail {
        &self.tail
    }

    /// The largest `needed` that [`Step::NeedMore`] can hold, in bytes: a buffer of this size is always sufficient.
    pub fn max_needed(&self) -> usize {
        const COMMAND: usize = 5 + u16::MAX as usize;
        COMMAND.max(ram::MAX_HEAD_LEN + ram::compress_bound(self.page) as usize)
    }

    #[inline]
    fn advance<'a>(&mut self, input: &'a [u8]) -> Advance<'a> {
        match self.state {
            State::Records => self.record(input),
            _ => self.other(input),
        }
    }

    fn other<'a>(&mut self, input: &'a [u8]) -> Advance<'a> {
        match self.state {
            State::Header => self.header(input),
            State::Items => self.item(input),
            State::Records => self.record(input),
            State::List { remaining: 0 } => self.list_end(),
            State::List { remaining } => self.list_entry(input, remaining),
            State::Mapped { left: 0, remaining } => Ok(self.quietly(State::List { remaining })),
            State::Mapped { left, remaining } => {
                let (piece, left) = piece(input, left)?;
                self.state = State::Mapped { left, remaining };
                Ok(Told(piece.len(), Event::MappedBytes(piece)))
            }
            State::VirtioMem => {
                let (mem, used) = decode_virtio_mem(input)?;
                self.state = State::Carried { left: mem.bitmap_len(), chunk_follows: false };
                Ok(Told(used, Event::VirtioMem(mem)))
            }
            State::NativeLength => self.native_state(input),
            State::Bitmap => self.bitmap_chunk(input),
            State::Carried { left: 0, chunk_follows: true } => Ok(self.quietly(State::Bitmap)),
            State::Carried { left: 0, chunk_follows: false } => Ok(self.quietly(State::Footer)),
            State::Carried { left, chunk_follows } => {
                let (piece, left) = piece(input, left)?;
                self.state = State::Carried { left, chunk_follows };
                Ok(Told(piece.len(), Event::SectionBytes(piece)))
            }
            State::Footer => self.footer(input),
            State::Package { left: 0 } => {
                self.state = State::Items;
                Ok(Told(0, Event::PackageEnd))
            }
            State::Package { left } => {
                let (piece, left) = piece(input, left.into())?;
                // Cannot fail: the remaining length only shrinks.
                self.state = State::Package { left: u32::try_from(left).unwrap_or(0) };
                Ok(Told(piece.len(), Event::PackageBytes(piece)))
            }
            State::Tail => self.tail_bytes(input),
            State::Done => Ok(Told(0, Event::Done)),
        }
    }

    fn quietly<'a>(&mut self, state: State) -> Progress<'a> {
        self.state = state;
        Quiet(0)
    }

    fn header<'a>(&mut self, input: &'a [u8]) -> Advance<'a> {
        decode_header(input)?;
        let body = input.get(HEADER_LEN..).unwrap_or(&[]);
        let Some(&first) = body.first() else {
            return Err(DecodeError::Truncated { needed: HEADER_LEN + 1, have: input.len() });
        };
        if first != CONFIGURATION {
            self.seen.framing.configuration = false;
            self.configuration = Some(Configuration::default());
            self.state = State::Items;
            return Ok(Told(HEADER_LEN, Event::Configuration(Configuration::default())));
        }
        let (configuration, used) = decode_configuration(body).map_err(|error| error.shifted(HEADER_LEN))?;
        for name in &configuration.capabilities {
            if name != IGNORE_SHARED && name != MAPPED_RAM {
                let name = name.as_str().into();
                return Err(DecodeError::corrupt(HEADER_LEN, Fault::Capability { name }));
            }
        }
        match configuration.page_size {
            Some(page) if self.config.adopt_page_size => self.page = page,
            Some(page) => self.check_page_size(page.bytes(), HEADER_LEN)?,
            None => {}
        }
        self.lists.form.guest_addrs = configuration.has(IGNORE_SHARED);
        self.lists.mapped = configuration.has(MAPPED_RAM);
        self.configuration = Some(configuration.clone());
        self.state = State::Items;
        Ok(Told(HEADER_LEN + used, Event::Configuration(configuration)))
    }

    fn check_page_size(&self, found: u64, at: usize) -> Result<(), DecodeError> {
        let expected = self.page.bytes();
        if found == expected {
            return Ok(());
        }
        Err(DecodeError::corrupt(at, Fault::TargetPage { found, expected }))
    }

    fn command<'a>(&mut self, input: &'a [u8]) -> Advance<'a> {
        let (command, used) = decode_command(input)?;
        match command {
            Command::OpenReturnPath => self.seen.return_path = true,
            Command::Ping(_) if !self.seen.return_path => {
                return Err(out_of_order("PING", "the return path has not been opened"));
            }
            Command::PostcopyAdvise { .. } | Command::PostcopyAdviseBitmaps if self.ids.ram.is_some() => {
                return Err(out_of_order("POSTCOPY_ADVISE", "RAM has started"));
            }
            Command::PostcopyAdvise { target_page, .. } => {
                self.check_page_size(target_page, 13)?;
                self.seen.postcopy_advised = true;
                self.lists.form.host_pages = true;
            }
            Command::Packaged { size } => self.package(size)?,
            Command::SwitchoverStart => self.seen.switchover_start = true,
            _ => {}
        }
        Ok(Told(used, Event::Command(command)))
    }

    fn package(&mut self, size: u32) -> Result<(), DecodeError> {
        let limit = self.config.limits.package_bytes;
        if size > limit {
            let what = "the length of the package";
            return Err(DecodeError::corrupt(
                5,
                Fault::Limit { what, value: size.into(), limit: limit.into() },
            ));
        }
        if !self.seen.postcopy_advised || self.reached.postcopy {
            return Err(out_of_order("PACKAGED", "postcopy was not advised, or a package has come"));
        }
        self.reached.postcopy = true;
        self.state = State::Package { left: size };
        Ok(())
    }

    /// A ramwire's device state has a length, so that commands may follow it.
    fn native_state<'a>(&mut self, input: &'a [u8]) -> Advance<'a> {
        let left = Reader::new(input).be64()?;
        let limit = self.config.limits.tail_bytes as u64;
        if left > limit {
            let fault = Fault::Limit { what: "the length of the device state", value: left, limit };
            return Err(DecodeError::corrupt(0, fault));
        }
        self.state = State::Carried { left, chunk_follows: false };
        Ok(Quiet(8))
    }

    fn bitmap_chunk<'a>(&mut self, input: &'a [u8]) -> Advance<'a> {
        let (chunk, used) = decode_bitmap_chunk(input)?;
        self.state = match chunk {
            BitmapChunk::Last => State::Footer,
            BitmapChunk::More => State::Bitmap,
            BitmapChunk::Bits { len, last } => State::Carried { left: len, chunk_follows: !last },
        };
        Ok(Told(used, Event::BitmapChunk))
    }

    fn tail_bytes<'a>(&mut self, input: &'a [u8]) -> Advance<'a> {
        if self.tail.description().is_some() {
            self.state = State::Done;
            return Ok(Told(0, Event::Done));
        }
        if input.is_empty() {
            return Err(DecodeError::Truncated { needed: 1, have: 0 });
        }
        let used = self.push_tail(input)?;
        Ok(Told(used, Event::TailBytes(input.get(..used).unwrap_or(&[]))))
    }

    fn push_tail(&mut self, input: &[u8]) -> Result<usize, DecodeError> {
        let limits = &self.config.limits;
        let pushed = self.tail.push(input, limits.tail_bytes, limits.description_bytes);
        pushed.map_err(|fault| DecodeError::corrupt(0, fault))
    }
}

#[cold]
fn out_of_order(what: &'static str, why: &'static str) -> DecodeError {
    DecodeError::corrupt(0, Fault::OutOfOrder { what, why })
}

/// As many of the `left` bytes as have arrived, at least one, and how many then remain.
fn piece(input: &[u8], left: u64) -> Result<(&[u8], u64), DecodeError> {
    let len = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
    match input.get(..len) {
        Some(piece) if !piece.is_empty() => Ok((piece, left - len as u64)),
        _ => Err(DecodeError::Truncated { needed: 1, have: 0 }),
    }
}
