//! Checkpoints of a QEMU (COLO, capability `x-colo`): the stream behind an ordinary migration.
//!
//! ```text
//! primary                                        secondary
//! an ordinary stream, to its end                 READY
//! then for each checkpoint:
//! REQUEST                                        REPLY
//! pauses its guest; SEND
//! sections of RAM, end of file
//! SIZE, be64 n, n bytes of device state          RECEIVED, LOADED
//! the guest runs on
//! ```
//!
//! A message is a be32 ([`ColoMessage`]). The device state is FULL sections and an end of file; it has a length, and no VM
//! description. RAM is as in any stream, with the section ids of the first one. QEMU up to 10.1 sends ENABLE_COLO before
//! the first section, and later ones nothing: both ends must be set alike.

use super::super::error::{DecodeError, Fault};
use super::super::reader::Reader;
use super::super::writer::Writer;
use super::incoming::{Event, IncomingConfig, IncomingStream, Step};

/// Bytes of a message.
pub const MESSAGE_LEN: usize = 4;
/// Bytes of RAM sections that one checkpoint may have in addition to twice the guest's RAM: heads and footers.
const SECTION_ROOM: u64 = 16 << 20;

/// A message of either end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ColoMessage {
    /// The secondary has the guest of the first migration.
    Ready,
    /// The primary wants a checkpoint.
    Request,
    /// The secondary is ready for it.
    Reply,
    /// The primary's guest is paused: its RAM follows.
    Send,
    /// The length of the device state follows, and then that.
    Size,
    /// The secondary has all of it.
    Received,
    /// The secondary has applied it.
    Loaded,
}

impl ColoMessage {
    const ALL: [Self; 7] =
        [Self::Ready, Self::Request, Self::Reply, Self::Send, Self::Size, Self::Received, Self::Loaded];

    /// Its bytes.
    pub fn encode(self) -> [u8; MESSAGE_LEN] {
        (self as u32).to_be_bytes()
    }

    /// Decodes the message at the front of `input`.
    ///
    /// # Errors
    /// [`Fault::ColoMessage`]; [`DecodeError::Truncated`].
    pub fn decode(input: &[u8]) -> Result<Self, DecodeError> {
        let number = Reader::new(input).be32()?;
        let known = Self::ALL.into_iter().find(|message| *message as u32 == number);
        known.ok_or_else(|| DecodeError::corrupt(0, Fault::ColoMessage { number }))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Ready => "CHECKPOINT_READY",
            Self::Request => "CHECKPOINT_REQUEST",
            Self::Reply => "CHECKPOINT_REPLY",
            Self::Send => "VMSTATE_SEND",
            Self::Size => "VMSTATE_SIZE",
            Self::Received => "VMSTATE_RECEIVED",
            Self::Loaded => "VMSTATE_LOADED",
        }
    }
}

/// Appends VMSTATE_SIZE with the length of the device state.
pub fn encode_size(len: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(&ColoMessage::Size.encode());
    Writer::new(out).be64(len);
}

/// A piece of a primary's stream and its meaning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ColoEvent<'a> {
    /// An item of the first migration, or of a checkpoint's RAM.
    Item(Event<'a>),
    /// The primary wants a checkpoint, and waits for REPLY.
    Requested,
    /// The device state has this length.
    StateBegins(u64),
    /// A piece of it.
    State(&'a [u8]),
    /// All of a checkpoint is here. The first one is the first migration: its device state is
    /// [`Tail::bytes`](super::tail::Tail::bytes).
    Whole,
}

/// The answer to some bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ColoStep<'a> {
    /// The event of the first `consumed` bytes of the input.
    Event {
        /// Bytes taken; may be zero.
        consumed: usize,
        /// What they mean.
        event: ColoEvent<'a>,
    },
    /// The input is used up, or holds only the beginning of a value: as [`Step::NeedMore`].
    NeedMore {
        /// Bytes that were consumed.
        consumed: usize,
        /// Minimum number of bytes that are needed, counted after those consumed.
        needed: usize,
    },
}

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The first migration.
    First,
    Message(ColoMessage),
    /// RAM of a checkpoint, which may have so many bytes more.
    Ram {
        left: u64,
    },
    Device {
        left: u64,
    },
}

/// Reads a primary's stream.
#[derive(Clone, Debug)]
pub struct ColoStream {
    stream: IncomingStream,
    max_state: u64,
    state: State,
    /// Bytes that were consumed between the sections of RAM.
    beside: u64,
    #[cfg(test)]
    whole_without_state: bool,
}

impl ColoStream {
    /// Before the first byte. `max_state`: most bytes of the device state of a checkpoint.
    pub fn new(config: IncomingConfig, max_state: u64) -> Self {
        Self {
            stream: IncomingStream::new(config),
            max_state,
            state: State::First,
            beside: 0,
            #[cfg(test)]
            whole_without_state: false,
        }
    }

    /// Calls a checkpoint whole at the end of its RAM.
    #[cfg(test)]
    pub(crate) fn break_order(&mut self, whole_without_state: bool) {
        self.whole_without_state = whole_without_state;
    }

    /// The parser of items.
    pub fn items(&self) -> &IncomingStream {
        &self.stream
    }

    /// Offset of the first byte that has not been consumed, from the start of the stream.
    pub fn position(&self) -> u64 {
        self.stream.position() + self.beside
    }

    /// Decodes the next piece of `input`, which begins at the first byte that was not consumed.
    ///
    /// # Errors
    /// [`DecodeError::Corrupt`], with the offset from the start of the stream; the stream is unusable then.
    pub fn next<'a>(&mut self, input: &'a [u8]) -> Result<ColoStep<'a>, DecodeError> {
        let mut before = 0;
        loop {
            match self.advance(input.get(before..).unwrap_or(&[])) {
                Ok(Told(used, event)) => {
                    return Ok(ColoStep::Event { consumed: before + used, event });
                }
                Ok(Quiet(used)) => before += used,
                Ok(Short { used, needed }) => {
                    return Ok(ColoStep::NeedMore { consumed: before + used, needed });
                }
                Err(DecodeError::Truncated { needed, .. }) => {
                    return Ok(ColoStep::NeedMore { consumed: before, needed });
                }
                Err(corrupt) => return Err(corrupt),
            }
        }
    }

    fn advance<'a>(&mut self, input: &'a [u8]) -> Advance<'a> {
        match self.state {
            State::First => self.item(input, None),
            State::Ram { left } => self.item(input, Some(left)),
            State::Message(due) => {
                let at = self.position();
                self.message(input, due).map_err(|error| error.based(at))
            }
            State::Device { left: 0 } => {
                self.state = State::Message(ColoMessage::Request);
                Ok(Told(0, ColoEvent::Whole))
            }
            State::Device { .. } if input.is_empty() => Ok(Short { used: 0, needed: 1 }),
            State::Device { left } => {
                let len = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
                self.state = State::Device { left: left - len as u64 };
                self.beside += len as u64;
                Ok(Told(len, ColoEvent::State(input.get(..len).unwrap_or(&[]))))
            }
        }
    }

    /// An item of the first migration, or of RAM that may have `left` bytes more.
    fn item<'a>(&mut self, input: &'a [u8], left: Option<u64>) -> Advance<'a> {
        let beside = self.beside;
        let step = self.stream.next(input).map_err(|error| error.based(beside))?;
        let (Step::Event { consumed, .. } | Step::NeedMore { consumed, .. }) = &step;
        if let Some(left) = left {
            let Some(left) = left.checked_sub(*consumed as u64) else {
                let (what, limit) = ("the length of the RAM of one checkpoint", self.max_ram());
                let fault = Fault::Limit { what, value: limit.saturating_add(1), limit };
                return Err(DecodeError::corrupt(0, fault).based(self.position()));
            };
            self.state = State::Ram { left };
        }
        Ok(match step {
            Step::Event { consumed, event: Event::Done } if left.is_some() => {
                self.state = State::Message(ColoMessage::Size);
                #[cfg(test)]
                if self.whole_without_state {
                    return Ok(Told(consumed, ColoEvent::Whole));
                }
                Quiet(consumed)
            }
            Step::Event { consumed, event: Event::Done } => {
                self.state = State::Message(ColoMessage::Request);
                Told(consumed, ColoEvent::Whole)
            }
            Step::Event { consumed, event } => Told(consumed, ColoEvent::Item(event)),
            Step::NeedMore { consumed, needed } => Short { used: consumed, needed },
        })
    }

    /// Most bytes of RAM sections in a checkpoint. Its guest is paused, so a primary sends each page once.
    fn max_ram(&self) -> u64 {
        let lengths = self.stream.blocks().as_slice().iter().map(|block| block.used_length);
        lengths.fold(0u64, u64::saturating_add).saturating_mul(2).saturating_add(SECTION_ROOM)
    }

    fn message<'a>(&mut self, input: &'a [u8], due: ColoMessage) -> Advance<'a> {
        let message = ColoMessage::decode(input)?;
        if message != due {
            let why = match due {
                ColoMessage::Request => "only CHECKPOINT_REQUEST may follow a checkpoint",
                ColoMessage::Send => "only VMSTATE_SEND may follow CHECKPOINT_REQUEST",
                _ => "only VMSTATE_SIZE may follow the RAM of a checkpoint",
            };
            return Err(DecodeError::corrupt(0, Fault::OutOfOrder { what: message.name(), why }));
        }
        let mut reader = Reader::at(input, MESSAGE_LEN);
        let progress = match due {
            ColoMessage::Request => {
                self.state = State::Message(ColoMessage::Send);
                Told(MESSAGE_LEN, ColoEvent::Requested)
            }
            ColoMessage::Size => {
                let (value, limit) = (reader.be64()?, self.max_state);
                if value > limit {
                    let what = "the length of the device state";
                    return Err(DecodeError::corrupt(MESSAGE_LEN, Fault::Limit { what, value, limit }));
                }
                self.state = State::Device { left: value };
                Told(reader.position(), ColoEvent::StateBegins(value))
            }
            _ => {
                self.stream.begin_checkpoint();
                self.state = State::Ram { left: self.max_ram() };
                Quiet(MESSAGE_LEN)
            }
        };
        self.beside += reader.position() as u64;
        Ok(progress)
    }
}

/// One transition: bytes consumed, with an event, without, or not enough.
enum Progress<'a> {
    Told(usize, ColoEvent<'a>),
    Quiet(usize),
    Short { used: usize, needed: usize },
}

use Progress::{Quiet, Short, Told};

type Advance<'a> = Result<Progress<'a>, DecodeError>;

#[cfg(test)]
pub(crate) mod samples;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::command::Command;
    use super::super::ram::{IDSTR, PageAt, Record, VERSION};
    use super::super::section::{SectionName, encode_end, encode_eof, encode_part, encode_start};
    use super::samples::{RAM, devices, first, ram, ram_sent, requested, sending, whole};
    use super::*;
    use crate::units::BlockOffset;

    /// What `bytes` mean, given in pieces, and where the stream stands.
    fn read(bytes: &[u8], piece: usize) -> Result<(Vec<String>, u64), DecodeError> {
        let mut stream = ColoStream::new(IncomingConfig::default(), 1000);
        let (mut at, mut come, mut told) = (0, 0, Vec::new());
        loop {
            match stream.next(&bytes[at..come])? {
                ColoStep::Event { consumed, event } => {
                    at += consumed;
                    match event {
                        ColoEvent::Item(Event::Zero { offset, .. }) => {
                            told.push(format!("{}", offset.0 >> 12))
                        }
                        ColoEvent::Requested => told.push("request".into()),
                        ColoEvent::StateBegins(len) => told.push(format!("state {len}")),
                        ColoEvent::Whole => told.push("whole".into()),
                        ColoEvent::Item(_) | ColoEvent::State(_) => {}
                    }
                }
                ColoStep::NeedMore { consumed, .. } => {
                    at += consumed;
                    if come == bytes.len() {
                        return Ok((told, stream.position()));
                    }
                    come = (come + piece).min(bytes.len());
                }
            }
        }
    }

    fn fault(bytes: &[u8]) -> Fault {
        let Err(DecodeError::Corrupt(corrupt)) = read(bytes, bytes.len()) else { panic!("it was accepted") };
        assert!(corrupt.at <= bytes.len() as u64, "{corrupt}");
        corrupt.fault
    }

    #[test]
    fn a_first_migration_and_a_checkpoint_are_told_in_order_whatever_the_pieces() {
        let due = ["0", "1", "2", "3", "whole", "request", "7", "state 28", "whole", "request"];
        let bytes = requested(whole());
        for piece in [1, 3, 7, 4096] {
            let (told, position) = read(&bytes, piece).unwrap();
            assert_eq!(
                (told, position),
                (due.map(String::from).to_vec(), bytes.len() as u64),
                "pieces of {piece}"
            );
        }
    }

    /// As QEMU 7.2 does it.
    #[test]
    fn the_first_record_of_a_checkpoint_may_continue_the_block_before() {
        let mut out = sending();
        encode_end(RAM, &mut out);
        Record::Zero { at: PageAt { block: None, offset: BlockOffset(6 << 12) }, fill: 0 }.encode(&mut out);
        let (told, _) = read(&out, out.len()).unwrap();
        assert_eq!(told.last().map(String::as_str), Some("6"));
    }

    #[test]
    fn messages_out_of_turn_are_refused_with_their_name() {
        use ColoMessage::{Loaded, Ready, Received, Reply, Request, Send, Size};
        let all = [Ready, Request, Reply, Send, Size, Received, Loaded];
        for (before, due) in [(first(), Request), (requested(first()), Send), (ram_sent(), Size)] {
            for message in all.into_iter().filter(|message| *message != due) {
                let bytes = [&before[..], &message.encode()].concat();
                let found = fault(&bytes);
                assert!(
                    matches!(found, Fault::OutOfOrder { what, .. } if what == message.name()),
                    "{found:?}"
                );
            }
            let found = fault(&[&before[..], &7u32.to_be_bytes()].concat());
            assert_eq!(found, Fault::ColoMessage { number: 7 });
        }
    }

    #[test]
    fn what_is_no_ram_of_a_checkpoint_is_refused() {
        let after = |add: &dyn Fn(&mut Vec<u8>)| {
            let mut out = sending();
            add(&mut out);
            fault(&out)
        };
        let found = after(&|out| devices(out));
        assert!(matches!(found, Fault::UnknownIterable { .. }), "{found:?}");
        let start = SectionName { id: RAM, idstr: IDSTR, instance: 0, version: VERSION };
        let found = after(&|out| encode_start(&start, out));
        assert!(matches!(found, Fault::OutOfOrder { what: "START", .. }), "{found:?}");
        let found = after(&|out| encode_eof(out));
        assert!(
            matches!(found, Fault::OutOfOrder { what: "the end of a checkpoint's RAM", .. }),
            "{found:?}"
        );
        let found = after(&|out| ram(out, encode_end, &[8]));
        assert!(matches!(found, Fault::OutsideBlock { .. }), "{found:?}");
        let found = after(&|out| Command::Packaged { size: 9 }.encode(out));
        assert!(matches!(found, Fault::OutOfOrder { what: "PACKAGED", .. }), "{found:?}");
    }

    #[test]
    fn device_state_that_is_too_long_is_refused_before_it_comes() {
        for (len, accepted) in [(1000, true), (1001, false), (u64::MAX, false)] {
            let mut out = ram_sent();
            encode_size(len, &mut out);
            if accepted {
                assert!(read(&out, 7).is_ok());
            } else {
                let limit = Fault::Limit { what: "the length of the device state", value: len, limit: 1000 };
                assert_eq!(fault(&out), limit);
            }
        }
    }

    #[test]
    fn ram_of_a_checkpoint_that_never_ends_is_refused() {
        let mut bytes = sending();
        let limit = 2 * 8 * 4096 + SECTION_ROOM;
        while (bytes.len() as u64) < limit + (1 << 12) {
            ram(&mut bytes, encode_part, &[1, 2, 3]);
        }
        let what = "the length of the RAM of one checkpoint";
        assert_eq!(fault(&bytes), Fault::Limit { what, value: limit + 1, limit });
    }
}
