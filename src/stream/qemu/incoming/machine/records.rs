//! Records of the ram section and the list of blocks.

use super::super::event::Event;
use super::super::table::AnnouncedBlocks;
use super::Progress::{Quiet, Told};
use super::{Advance, IncomingStream, State, out_of_order};
use crate::stream::qemu::blocks::{BlockAnnouncement, decode_block};
use crate::stream::qemu::mapped::decode_header as decode_mapped_header;
use crate::stream::qemu::ram::{self, PageAt, Record, decode_record};
use crate::stream::qemu::section::Phase;
use crate::stream::{DecodeError, Fault};
use crate::units::{BlockIndex, BlockOffset};

impl IncomingStream {
    #[inline]
    pub(super) fn record<'a>(&mut self, input: &'a [u8]) -> Advance<'a> {
        let (record, head) = decode_record(input, self.page)?;
        match record {
            Record::Page(at) if !self.mapped => {
                let (block, offset) = self.locate(at)?;
                let (bytes, used) = payload(input, head, self.page.bytes() as usize)?;
                Ok(Told(used, Event::Page { block, offset, bytes }))
            }
            Record::Zero { at, fill: 0 } if !self.mapped => {
                let (block, offset) = self.locate(at)?;
                Ok(Told(head, Event::Zero { block, offset }))
            }
            other => self.rare_record(input, other, head),
        }
    }

    /// How many records of whole pages stand at the front of `rest`, the bytes behind the page at `offset`, each
    /// for the page behind the one before it. Counted without taking them; the last one's bytes may be still to come.
    pub fn pages_ahead(&self, rest: &[u8], offset: BlockOffset) -> u64 {
        let page = self.page.bytes();
        let head = |at: u64| {
            rest.get(usize::try_from(at).ok()?..)?.first_chunk().map(|head| u64::from_be_bytes(*head))
        };
        let mut pages = 0;
        loop {
            let due = offset.0.checked_add((pages + 1) * page).map(|next| next | ram::PAGE | ram::CONTINUE);
            if due.is_none() || head(pages * (8 + page)) != due {
                return pages;
            }
            pages += 1;
        }
    }

    fn rare_record<'a>(&mut self, input: &'a [u8], record: Record<'a>, head: usize) -> Advance<'a> {
        if self.mapped && !matches!(record, Record::Eos | Record::MemSize { .. }) {
            return Err(out_of_order(
                "a RAM record",
                "under mapped-ram pages stand in the file, not in records",
            ));
        }
        if self.postcopy
            && matches!(record, Record::Xbzrle { .. } | Record::MemSize { .. } | Record::MultifdFlush)
        {
            return Err(out_of_order(
                "this RAM record",
                "the guest has moved, only whole and zero pages may follow",
            ));
        }
        match record {
            Record::Eos => {
                if self.open.phase == Phase::Start {
                    // A second START, which repeats the first, may not take back what the first has shown.
                    let before = self.seen.barrier_in_start.unwrap_or(false);
                    self.seen.barrier_in_start = Some(before || self.barrier);
                }
                self.state = State::Footer;
                Ok(Told(head, Event::RecordsEnd))
            }
            Record::Zero { at, fill: byte } => {
                if !self.config.accept_fill {
                    return Err(DecodeError::corrupt(head - 1, Fault::FillByte { byte }));
                }
                let (block, offset) = self.locate(at)?;
                Ok(Told(head, Event::Filled { block, offset, byte }))
            }
            Record::Xbzrle { at, len } => {
                let (block, offset) = self.locate(at)?;
                let (bytes, used) = payload(input, head, len.into())?;
                Ok(Told(used, Event::Xbzrle { block, offset, bytes }))
            }
            Record::Compressed { at, len } => {
                let (block, offset) = self.locate(at)?;
                let (bytes, used) = payload(input, head, len as usize)?;
                Ok(Told(used, Event::Compressed { block, offset, bytes }))
            }
            Record::MemSize { total } => self.mem_size(total, head),
            Record::MultifdFlush => {
                self.barrier = true;
                Ok(Told(head, Event::MultifdFlush))
            }
            Record::Hook { argument } if self.config.accept_hooks => Ok(Told(head, Event::Hook { argument })),
            Record::Hook { .. } | Record::Page(_) => {
                Err(DecodeError::corrupt(0, Fault::RecordFlags { flags: ram::HOOK }))
            }
        }
    }

    #[inline]
    fn locate(&mut self, at: PageAt<'_>) -> Result<(BlockIndex, BlockOffset), DecodeError> {
        self.blocks.locate(at, self.page).map_err(|fault| DecodeError::corrupt(0, fault))
    }

    fn mem_size<'a>(&mut self, total: u64, used: usize) -> Advance<'a> {
        let limit = self.config.limits.ram_bytes;
        if total > limit {
            let what = "the total length of RAM";
            return Err(DecodeError::corrupt(0, Fault::Limit { what, value: total, limit }));
        }
        self.list = AnnouncedBlocks::default();
        self.state = State::List { remaining: total };
        Ok(Quiet(used))
    }

    pub(super) fn list_entry<'a>(&mut self, input: &'a [u8], remaining: u64) -> Advance<'a> {
        let (block, used) = decode_block(input, self.form, remaining, self.page)?;
        let remaining = remaining - block.used_length;
        if self.mapped {
            return self.mapped_block(input, block, used, remaining);
        }
        self.list.push(block).map_err(|fault| DecodeError::corrupt(0, fault))?;
        self.state = State::List { remaining };
        Ok(Quiet(used))
    }

    fn mapped_block<'a>(
        &mut self,
        input: &'a [u8],
        block: BlockAnnouncement,
        at: usize,
        remaining: u64,
    ) -> Advance<'a> {
        let rest = input.get(at..).unwrap_or(&[]);
        let (header, used) = decode_mapped_header(rest, self.page).map_err(|error| error.shifted(at))?;
        let used = at + used;
        let here = self.position + used as u64;
        let end = header.pages_offset.checked_add(block.used_length);
        let left = end.filter(|_| header.pages_offset >= here).map(|end| end - here).ok_or_else(|| {
            let fault = Fault::Device("the pages of a mapped-ram block stand in front of its header");
            DecodeError::corrupt(at, fault)
        })?;
        self.list.push(block.clone()).map_err(|fault| DecodeError::corrupt(0, fault))?;
        self.state = State::Mapped { left, remaining };
        Ok(Told(used, Event::MappedBlock { block, header }))
    }

    pub(super) fn list_end<'a>(&mut self) -> Advance<'a> {
        if self.listed && self.list.as_slice() != self.blocks.as_slice() {
            return Err(DecodeError::corrupt(0, Fault::BlockListChanged));
        }
        if !self.listed {
            self.blocks = std::mem::take(&mut self.list);
            self.listed = true;
        }
        self.state = State::Records;
        Ok(Told(0, Event::Blocks(self.blocks.as_slice().to_vec())))
    }
}

/// The `len` bytes behind a head of `head` bytes, and the bytes of both.
#[inline]
fn payload(input: &[u8], head: usize, len: usize) -> Result<(&[u8], usize), DecodeError> {
    let end = head + len;
    match input.get(head..end) {
        Some(bytes) => Ok((bytes, end)),
        None => Err(DecodeError::Truncated { needed: end, have: input.len() }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::stream::qemu::incoming::IncomingConfig;

    #[test]
    fn pages_ahead_are_counted_up_to_the_first_other_record() {
        let stream = IncomingStream::new(IncomingConfig::default());
        let record =
            |page: u64, flags: u64| [&((page * 4096) | flags).to_be_bytes()[..], &[7; 4096]].concat();
        let whole = |page| record(page, ram::PAGE | ram::CONTINUE);
        let ahead = |bytes: &[u8]| stream.pages_ahead(bytes, BlockOffset(4 * 4096));
        let rest = [whole(5), whole(6), whole(7)].concat();
        assert_eq!(ahead(&rest), 3);
        assert_eq!(ahead(&rest[..rest.len() - 4096]), 3, "its head is there");
        assert_eq!(ahead(&rest[..rest.len() - 4097]), 2);
        assert_eq!(ahead(&[whole(5), whole(7)].concat()), 1, "a gap");
        assert_eq!(ahead(&[whole(5), record(6, ram::ZERO | ram::CONTINUE)].concat()), 1, "a zero page");
        assert_eq!(ahead(&[whole(5), record(6, ram::PAGE)].concat()), 1, "another block may follow");
        assert_eq!(ahead(&[]), 0);
        assert_eq!(stream.pages_ahead(&rest, BlockOffset(u64::MAX - 4095)), 0);
    }
}
