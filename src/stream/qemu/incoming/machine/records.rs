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
            Record::Page(at) if !self.lists.mapped => {
                let (block, offset) = self.locate(at)?;
                let (bytes, used) = payload(input, head, self.page.bytes() as usize)?;
                Ok(Told(used, Event::Page { block, offset, bytes }))
            }
            Record::Zero { at, fill: 0 } if !self.lists.mapped => {
                let (block, offset) = self.locate(at)?;
                Ok(Told(head, Event::Zero { block, offset }))
            }
            other => self.rare_record(input, other, head),
        }
    }

    /// Consumes the records of whole pages at the front of `rest`, which is the input after the page at `offset` of
    /// `block`. It stops at the first record that is incomplete or not for the next page. Returns their number; each is
    /// [`PAGE_HEAD`](ram::PAGE_HEAD) bytes of head and a page.
    pub fn take_following(&mut self, rest: &[u8], block: BlockIndex, offset: BlockOffset) -> u64 {
        let page = self.page.bytes();
        let end = self.blocks.as_slice().get(block.as_usize()).map_or(0, |block| block.used_length);
        let record = ram::PAGE_HEAD + page as usize;
        let mut pages = 0;
        for bytes in rest.chunks_exact(record) {
            let due = offset.0.saturating_add((pages + 1) * page);
            let head = bytes.first_chunk().map(|head| u64::from_be_bytes(*head));
            if end.checked_sub(page).is_none_or(|last| due > last)
                || head != Some(due | ram::PAGE | ram::CONTINUE)
            {
                break;
            }
            pages += 1;
        }
        self.position += pages * record as u64;
        pages
    }

    fn rare_record<'a>(&mut self, input: &'a [u8], record: Record<'a>, head: usize) -> Advance<'a> {
        if self.lists.mapped && !matches!(record, Record::Eos | Record::MemSize { .. }) {
            return Err(out_of_order(
                "a RAM record",
                "under mapped-ram pages stand in the file, not in records",
            ));
        }
        if self.reached.postcopy && matches!(record, Record::Xbzrle { .. } | Record::MemSize { .. }) {
            return Err(out_of_order(
                "this RAM record",
                "the guest has moved, only whole and zero pages may follow",
            ));
        }
        match record {
            Record::Eos => {
                if self.open.phase == Phase::Start {
                    // A second START, which repeats the first, must not clear what the first has shown.
                    let before = self.seen.barrier_in_start.unwrap_or(false);
                    self.seen.barrier_in_start = Some(before || self.reached.barrier);
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
                self.reached.barrier = true;
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
            return Err(DecodeError::corrupt(0, Fault::TooMuchRam { announced: total, limit }));
        }
        self.lists.arriving = AnnouncedBlocks::default();
        self.state = State::List { remaining: total };
        Ok(Quiet(used))
    }

    pub(super) fn list_entry<'a>(&mut self, input: &'a [u8], remaining: u64) -> Advance<'a> {
        let (block, used) = decode_block(input, self.lists.form, remaining, self.page)?;
        let remaining = remaining - block.used_length;
        if self.lists.mapped {
            return self.mapped_block(input, block, used, remaining);
        }
        self.lists.arriving.push(block).map_err(|fault| DecodeError::corrupt(0, fault))?;
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
        let name = block.name.as_str();
        let (header, used) =
            decode_mapped_header(rest, name, self.page).map_err(|error| error.shifted(at))?;
        let here = self.config.starts_at.saturating_add(self.position + (at + used) as u64);
        let left = if self.lists.form.guest_addrs && header.is_absent() {
            self.lists.leaves_blocks_out = true;
            0
        } else {
            let end = header.end(name, block.used_length, here, self.config.file_len);
            end.map_err(|error| error.shifted(at))? - here
        };
        self.lists.arriving.push(block.clone()).map_err(|fault| DecodeError::corrupt(0, fault))?;
        self.state = State::Mapped { left, remaining };
        Ok(Told(at + used, Event::MappedBlock { block, header }))
    }

    pub(super) fn list_end<'a>(&mut self) -> Advance<'a> {
        if self.lists.listed && self.lists.arriving.as_slice() != self.blocks.as_slice() {
            return Err(DecodeError::corrupt(0, Fault::BlockListChanged));
        }
        if self.lists.mapped && self.lists.form.guest_addrs && !self.lists.leaves_blocks_out {
            return Err(DecodeError::corrupt(0, Fault::MappedRamShared));
        }
        if !self.lists.listed {
            self.blocks = std::mem::take(&mut self.lists.arriving);
            self.lists.listed = true;
        }
        self.state = State::Records;
        Ok(Told(0, Event::Blocks(self.blocks.as_slice().to_vec())))
    }
}

/// The `len` bytes after a head of `head` bytes, and the length of both together.
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
    fn pages_that_follow_are_taken_up_to_the_first_other_record() {
        let record =
            |page: u64, flags: u64| [&((page * 4096) | flags).to_be_bytes()[..], &[7; 4096]].concat();
        let whole = |page| record(page, ram::PAGE | ram::CONTINUE);
        let taken = |bytes: &[u8]| {
            let mut stream = IncomingStream::new(IncomingConfig::default());
            let name = crate::ram::BlockName::new("ram").unwrap();
            let block = BlockAnnouncement { name, used_length: 9 * 4096, host_page: None, guest_addr: None };
            stream.blocks = AnnouncedBlocks::new(vec![block]).unwrap();
            let pages = stream.take_following(bytes, BlockIndex(0), BlockOffset(4 * 4096));
            assert_eq!(stream.position(), pages * 4104);
            pages
        };
        let rest = [whole(5), whole(6), whole(7)].concat();
        assert_eq!(taken(&rest), 3);
        assert_eq!(taken(&rest[..rest.len() - 1]), 2, "a byte is missing");
        assert_eq!(taken(&[whole(5), whole(7)].concat()), 1, "a gap");
        assert_eq!(taken(&[whole(5), record(6, ram::ZERO | ram::CONTINUE)].concat()), 1, "a zero page");
        assert_eq!(taken(&[whole(5), record(6, ram::PAGE)].concat()), 1, "another block may follow");
        assert_eq!(taken(&[rest, whole(8), whole(9)].concat()), 4, "the block has nine pages");
        assert_eq!(taken(&[]), 0);
    }
}
