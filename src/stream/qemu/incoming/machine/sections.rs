//! Sections: where each begins and ends, and which is allowed when.

use super::super::event::{Event, SectionKind};
use super::Progress::{self, Told};
use super::{Advance, IncomingStream, Open, State, out_of_order};
use crate::stream::native::STATE_SECTION;
use crate::stream::qemu::early::{DIRTY_BITMAP, DIRTY_BITMAP_VERSION, is_early_virtio_mem};
use crate::stream::qemu::ram;
use crate::stream::qemu::section::{FOOTER, Item, Phase, SectionName, VM_DESCRIPTION, decode_item};
use crate::stream::qemu::tail::Tail;
use crate::stream::{DecodeError, Fault};

impl IncomingStream {
    pub(super) fn item<'a>(&mut self, input: &'a [u8]) -> Advance<'a> {
        let (item, used) = decode_item(input)?;
        match item {
            Item::Command => self.command(input),
            Item::Start(name) => self.start(name, used),
            Item::Part(id) => self.part(Phase::Part, id, used),
            Item::End(id) => self.part(Phase::End, id, used),
            Item::Full(name) => self.full(name, used),
            Item::Eof if self.seen.barrier_in_start.is_none() && !self.reached.postcopy => {
                Err(out_of_order("the end of the stream", "RAM has not been announced"))
            }
            Item::Eof if self.reached.checkpoint && !self.seen.ram_end => {
                Err(out_of_order("the end of a checkpoint's RAM", "ram END has not come"))
            }
            Item::Eof if self.reached.postcopy || self.reached.checkpoint => {
                self.state = State::Done;
                Ok(Told(used, Event::Eof))
            }
            Item::Eof => {
                let eof = input.get(..used).unwrap_or(&[]);
                self.push_tail(eof)?;
                self.state = State::Tail;
                Ok(Told(used, Event::Eof))
            }
            Item::VmDescription(_) => {
                let found = VM_DESCRIPTION;
                Err(DecodeError::corrupt(0, Fault::Item { found }))
            }
        }
    }

    fn start<'a>(&mut self, name: SectionName<'a>, used: usize) -> Advance<'a> {
        let (kind, supported) = match (name.idstr, name.instance) {
            (ram::IDSTR, 0) => (SectionKind::Ram, ram::VERSION),
            (DIRTY_BITMAP, 0) => (SectionKind::DirtyBitmap, DIRTY_BITMAP_VERSION),
            (idstr, instance) => {
                return Err(DecodeError::corrupt(
                    0,
                    Fault::UnknownIterable { idstr: idstr.into(), instance },
                ));
            }
        };
        if name.version != supported {
            let fault = Fault::Version { name: name.idstr.into(), found: name.version, supported };
            return Err(DecodeError::corrupt(used - 4, fault));
        }
        if self.seen.ram_end || self.reached.postcopy || self.reached.checkpoint {
            return Err(out_of_order("START", "RAM is complete or the guest has moved"));
        }
        let other = if kind == SectionKind::Ram { self.ids.bitmap } else { self.ids.ram };
        if other == Some(name.id) {
            return Err(DecodeError::corrupt(1, Fault::SectionIdTaken { id: name.id }));
        }
        let slot = if kind == SectionKind::Ram { &mut self.ids.ram } else { &mut self.ids.bitmap };
        *slot = Some(name.id);
        self.reached.barrier = false;
        Ok(self.open(Phase::Start, name.id, kind, used))
    }

    fn part<'a>(&mut self, phase: Phase, id: u32, used: usize) -> Advance<'a> {
        let kind = match Some(id) {
            known if known == self.ids.ram => SectionKind::Ram,
            known if known == self.ids.bitmap => SectionKind::DirtyBitmap,
            _ => return Err(DecodeError::corrupt(1, Fault::UnknownSection { id })),
        };
        if kind == SectionKind::Ram {
            if self.seen.ram_end {
                return Err(out_of_order("a ram section", "ram END has come"));
            }
            self.reached.pages_began = true;
        }
        Ok(self.open(phase, id, kind, used))
    }

    fn full<'a>(&mut self, name: SectionName<'a>, used: usize) -> Advance<'a> {
        let started =
            self.seen.barrier_in_start.is_some() && !self.reached.postcopy && !self.reached.checkpoint;
        if started && !self.reached.pages_began && is_early_virtio_mem(name.idstr) {
            return Ok(self.open(Phase::Full, name.id, SectionKind::EarlyVirtioMem, used));
        }
        if started && self.seen.ram_end && name.idstr == STATE_SECTION {
            if (name.instance, name.version) != (0, 1) {
                let fault = Fault::Version { name: STATE_SECTION.into(), found: name.version, supported: 1 };
                return Err(DecodeError::corrupt(used - 4, fault));
            }
            return Ok(self.open(Phase::Full, name.id, SectionKind::NativeState, used));
        }
        if started && self.reached.pages_began {
            return Ok(self.quietly(State::Tail));
        }
        let fault = Fault::UnknownIterable { idstr: name.idstr.into(), instance: name.instance };
        Err(DecodeError::corrupt(0, fault))
    }

    fn open<'a>(&mut self, phase: Phase, id: u32, kind: SectionKind, used: usize) -> Progress<'a> {
        self.open = Open { phase, id, kind };
        self.state = match kind {
            SectionKind::Ram => State::Records,
            SectionKind::DirtyBitmap => State::Bitmap,
            SectionKind::EarlyVirtioMem => State::VirtioMem,
            SectionKind::NativeState => State::NativeLength,
        };
        Told(used, Event::SectionStart { phase, id, kind })
    }

    pub(super) fn footer<'a>(&mut self, input: &'a [u8]) -> Advance<'a> {
        let Open { phase, id, kind } = self.open;
        if !self.reached.footers_known {
            let Some(&first) = input.first() else {
                return Err(DecodeError::Truncated { needed: 1, have: 0 });
            };
            self.reached.footers_known = true;
            // No item begins with this byte, so it shows whether there are footers.
            self.seen.framing.footers = first == FOOTER;
            self.tail = Tail::new(self.seen.framing);
        }
        let ((), used) = self.seen.framing.decode_footer(input, id)?;
        if (kind, phase) == (SectionKind::Ram, Phase::End) {
            self.seen.ram_end = true;
        }
        self.state = State::Items;
        Ok(Told(used, Event::SectionEnd { phase, kind }))
    }
}
