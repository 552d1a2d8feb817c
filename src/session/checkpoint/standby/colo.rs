//! What a QEMU's checkpoints mean: bytes in, pages into the cache, and what the engine or the primary is to know. No I/O.

use std::sync::Arc;

use super::{Kept, STATE_PIECE, out_of_turn};
use crate::engine::StandbyEvent;
use crate::error::Remedy;
use crate::guest::GuestMemory;
use crate::ram::PageRun;
use crate::session::checkpoint::refuse_ignored;
use crate::session::destination::same_blocks;
use crate::session::source::described;
use crate::session::{Error, Incoming};
use crate::stream::qemu::blocks::BlockAnnouncement;
use crate::stream::qemu::colo::{ColoEvent, ColoMessage, ColoStep, ColoStream};
use crate::stream::qemu::command::Command;
use crate::stream::qemu::file::{Configuration, IGNORE_SHARED};
use crate::stream::qemu::incoming::{Event, IncomingConfig, SectionKind, Seen};
use crate::stream::qemu::state::sections_end;
use crate::stream::qemu::tail::Tail;
use crate::units::{BlockIndex, BlockOffset, PageIndex};

const KEEPING: &str = "keeping checkpoints of a QEMU";

/// What some bytes meant.
#[derive(Debug)]
pub(in crate::session) enum Taken {
    /// Nothing to be done about them.
    Kept,
    /// At least so many more bytes are needed.
    More(usize),
    /// The guest's blocks were announced: it needs memory.
    Guest,
    /// The primary waits for the answer to a PING.
    Ping(u32),
    /// The engine is to know, after the answer was given to the primary.
    Tell(StandbyEvent, Option<ColoMessage>),
}

/// Reads the stream of a primary.
pub(in crate::session) struct ColoIntake {
    stream: ColoStream,
    configuration: Configuration,
    /// What was announced, once it was.
    incoming: Option<Incoming>,
    /// Announced position to position in the guest's own table.
    blocks: Vec<BlockIndex>,
    early: Vec<u8>,
    max_state: u64,
    /// The checkpoint that arrives, or came last. The first one is the first migration.
    number: u64,
    /// Device state that arrives.
    state: Vec<u8>,
    /// The VM description of the first migration.
    description: Vec<u8>,
    #[cfg(test)]
    whole_without_state: bool,
}

impl ColoIntake {
    pub(in crate::session) fn new(max_state: u64) -> Self {
        let mut config = IncomingConfig { adopt_page_size: true, ..IncomingConfig::default() };
        let most = usize::try_from(max_state).unwrap_or(usize::MAX);
        config.limits.tail_bytes = config.limits.tail_bytes.min(most);
        Self {
            stream: ColoStream::new(config, max_state),
            configuration: Configuration::default(),
            incoming: None,
            blocks: Vec::new(),
            early: Vec::new(),
            max_state,
            number: 1,
            state: Vec::new(),
            description: Vec::new(),
            #[cfg(test)]
            whole_without_state: false,
        }
    }

    #[cfg(test)]
    pub(in crate::session) fn break_order(&mut self, whole_without_state: bool) {
        self.whole_without_state = whole_without_state;
        self.stream.break_order(whole_without_state);
    }

    /// What was announced: with [`Taken::Guest`] its blocks, and all of it once checkpoint 1 is whole.
    pub(super) fn incoming(&self) -> Option<&Incoming> {
        self.incoming.as_ref()
    }

    /// The primary has opened a return path, on which PING is answered, and which SHUT ends.
    pub(super) fn has_return_path(&self) -> bool {
        self.stream.items().seen().return_path
    }

    /// The cache for this memory, which is the announced guest's.
    ///
    /// # Errors
    /// [`Error::Guest`], [`Error::Config`] if it is another's.
    pub(in crate::session) fn place_in(&mut self, memory: Arc<dyn GuestMemory>) -> Result<Kept, Error> {
        refuse_ignored(&*memory)?;
        let announced = self.incoming.as_ref().map_or(&[][..], |incoming| &incoming.blocks);
        self.blocks = same_blocks(announced, memory.table())?;
        if memory.table().page() != self.stream.items().page_size() {
            let what = format!(
                "the source has pages of {} bytes, this guest of {}",
                self.stream.items().page_size().bytes(),
                memory.table().page().bytes()
            );
            return Err(Error::Config {
                what,
                remedy: Remedy::Advice("start both ends with the same machine"),
            });
        }
        Ok(Kept::new(memory)?)
    }

    /// Takes the first bytes of `input`, which begins at the first byte that was not taken. `kept` once there is one.
    ///
    /// # Errors
    /// What makes no sense, or can't be kept.
    pub(in crate::session) fn take(
        &mut self,
        input: &[u8],
        kept: Option<&mut Kept>,
    ) -> Result<(usize, Taken), Error> {
        let at = self.stream.position();
        match self.stream.next(input)? {
            ColoStep::NeedMore { consumed, needed } => Ok((consumed, Taken::More(needed))),
            ColoStep::Event { consumed, event } => {
                let raw = input.get(..consumed).unwrap_or(&[]);
                let taken = self.event(event, raw, kept).map_err(|error| error.at(at))?;
                Ok((consumed, taken))
            }
        }
    }

    fn event(&mut self, event: ColoEvent<'_>, raw: &[u8], kept: Option<&mut Kept>) -> Result<Taken, Error> {
        match event {
            ColoEvent::Item(item) => return self.item(item, raw, kept),
            ColoEvent::Requested => {
                self.number += 1;
                return Ok(Taken::Tell(StandbyEvent::Opened(self.number), Some(ColoMessage::Reply)));
            }
            // Memory is made for it as it comes.
            ColoEvent::StateBegins(len) => self.state = Vec::with_capacity(len.min(STATE_PIECE) as usize),
            ColoEvent::State(bytes) => self.state.extend_from_slice(bytes),
            ColoEvent::Whole => {
                let kept =
                    kept.ok_or_else(|| out_of_turn("the end of a stream", "waiting for its blocks"))?;
                #[cfg(test)]
                if self.whole_without_state && self.number > 1 {
                    return Ok(Taken::Tell(StandbyEvent::Whole(self.number), Some(ColoMessage::Received)));
                }
                let (state, answer) = match self.number {
                    1 => (self.first_is_whole(), None),
                    _ => (self.device_state()?, Some(ColoMessage::Received)),
                };
                kept.set_state(state);
                return Ok(Taken::Tell(StandbyEvent::Whole(self.number), answer));
            }
        }
        Ok(Taken::Kept)
    }

    /// The device state of the first migration, with its VM description.
    fn first_is_whole(&mut self) -> Vec<u8> {
        let (seen, early) = (*self.stream.items().seen(), std::mem::take(&mut self.early));
        if let Some(incoming) = &mut self.incoming {
            (incoming.seen, incoming.early_sections) = (seen, early);
        }
        let tail = self.stream.items().tail();
        let behind = tail.description().and_then(|end| tail.bytes().get(end.eof_at + 1..));
        self.description = behind.unwrap_or_default().to_vec();
        tail.bytes().to_vec()
    }

    /// The device state of a checkpoint has a length, and must have an end as well: it is read by others. A QEMU that reads
    /// it waits for a VM description behind it, and gets that of the same devices in the first migration.
    fn device_state(&mut self) -> Result<Vec<u8>, Error> {
        let mut state = std::mem::take(&mut self.state);
        let mut tail = Tail::new(self.stream.items().seen().framing);
        let limit = usize::try_from(self.max_state).unwrap_or(usize::MAX);
        let taken =
            tail.push(&state, limit, 0).map_err(|fault| Error::PeerFailed { why: fault.to_string() })?;
        if taken != state.len() || !tail.may_end_here() {
            let what = format!("{} bytes of device state that are no sections with an end", state.len());
            return Err(out_of_turn(&what, KEEPING));
        }
        let end = state.len() - 1;
        state.extend_from_slice(&self.description);
        if sections_end(&state, self.stream.items().seen().framing) != Some(end) {
            tracing::debug!("the VM description does not fit the device state any more");
            state.truncate(end + 1);
        }
        Ok(state)
    }

    fn item(&mut self, item: Event<'_>, raw: &[u8], kept: Option<&mut Kept>) -> Result<Taken, Error> {
        match item {
            Event::Page { block, offset, bytes } => {
                let kept = kept.ok_or_else(no_blocks)?;
                let landing = kept.admit(self.run_of(block, offset))?;
                kept.target(landing)?.copy_from(bytes);
                kept.commit(landing);
            }
            Event::Zero { block, offset } => {
                let kept = kept.ok_or_else(no_blocks)?;
                let landing = kept.admit(self.run_of(block, offset))?;
                kept.zero(landing);
            }
            Event::Configuration(configuration) => {
                if configuration.has(IGNORE_SHARED) {
                    return Err(off(
                        "x-ignore-shared",
                        "no checkpoint would hold the memory that is left out",
                    ));
                }
                self.configuration = configuration;
            }
            Event::Blocks(blocks) if self.incoming.is_none() => {
                self.incoming = Some(self.announced(&blocks));
                return Ok(Taken::Guest);
            }
            Event::Command(Command::Ping(value)) => return Ok(Taken::Ping(value)),
            // One that sends this reads READY as a message of the return path.
            Event::Command(Command::EnableColo) if self.has_return_path() => {
                return Err(off("return-path", "a QEMU of its version enters no checkpoints with it"));
            }
            Event::Command(Command::OpenReturnPath | Command::EnableColo | Command::SwitchoverStart) => {}
            Event::Command(Command::PostcopyAdvise { .. }) => {
                return Err(off("postcopy-ram", "there are no checkpoints in postcopy"));
            }
            Event::Command(Command::PostcopyAdviseBitmaps)
            | Event::SectionStart { kind: SectionKind::DirtyBitmap, .. } => {
                return Err(off("dirty-bitmaps", "they are no part of a checkpoint"));
            }
            Event::Command(other) => return Err(out_of_turn(&format!("{other:?}"), KEEPING)),
            Event::Xbzrle { .. } => return Err(off("xbzrle", "deltas are not kept")),
            Event::Compressed { .. } => return Err(off("compress", "compressed pages are not kept")),
            Event::MultifdFlush => return Err(off("multifd", "pages are taken from the stream only")),
            Event::SectionStart { kind: SectionKind::EarlyVirtioMem, .. }
            | Event::SectionEnd { kind: SectionKind::EarlyVirtioMem, .. }
            | Event::VirtioMem(_)
            | Event::SectionBytes(_) => self.keep_early(raw)?,
            Event::Blocks(_)
            | Event::SectionStart { kind: SectionKind::Ram, .. }
            | Event::SectionEnd { kind: SectionKind::Ram, .. }
            | Event::RecordsEnd
            | Event::TailBytes(_)
            | Event::Eof
            | Event::Done => {}
            other => return Err(out_of_turn(&format!("{other:?}"), KEEPING)),
        }
        Ok(Taken::Kept)
    }

    fn keep_early(&mut self, raw: &[u8]) -> Result<(), Error> {
        if (self.early.len() + raw.len()) as u64 > self.max_state {
            return Err(out_of_turn("more device state than is accepted", KEEPING));
        }
        self.early.extend_from_slice(raw);
        Ok(())
    }

    fn announced(&self, blocks: &[BlockAnnouncement]) -> Incoming {
        Incoming {
            configuration: self.configuration.clone(),
            seen: Seen::default(),
            // It runs its guest on in any case.
            has_return_path: false,
            gives_unasked: false,
            ..Incoming::of_blocks(blocks.iter().map(described).collect())
        }
    }

    fn run_of(&self, block: BlockIndex, offset: BlockOffset) -> PageRun {
        let block = self.blocks.get(block.as_usize()).copied().unwrap_or(BlockIndex(u32::MAX));
        PageRun { block, first: PageIndex(offset.0 / self.stream.items().page_size().bytes()), pages: 1 }
    }
}

fn no_blocks() -> Error {
    out_of_turn("a page", "waiting for the list of RAM blocks")
}

/// A capability of the primary that checkpoints are not kept with.
fn off(capability: &str, why: &str) -> Error {
    Error::Config {
        what: format!("the source has capability {capability} on, and {why}"),
        remedy: Remedy::Advice("turn it off at the source, and migrate again"),
    }
}
