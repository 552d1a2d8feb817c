//! Bitmaps of received pages, asked for behind a lost connection.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::SourceEvent;
use crate::ram::{DirtyMap, PageRun, RamBlock};
use crate::session::{Breakage, Error};
use crate::stream::qemu::command::Command;
use crate::sys::{SendPart, Stop};
use crate::units::{BlockIndex, PageIndex};

use super::SourceSession;
use super::peer::refuse_verdict;
use super::recovery::silent;
use super::return_path::{PeerMessage, check_deadline};

/// Maximum number of bitmaps that are requested ahead of their answers. A peer that writes one reads no request
/// meanwhile, so there are few enough that they fit into any connection.
const MAX_ASKED: usize = 8;

impl SourceSession {
    /// Sends the first bytes of the new connection: the first request, whose answer is read later. They show the peer
    /// that this connection continues the migration.
    pub(super) fn ask_received(&mut self) -> Result<SourceEvent, Error> {
        if !self.driver.engine.is_postcopy() {
            return self.send_resume();
        }
        let memory = Arc::clone(&self.guest.memory);
        let first = memory.table().blocks().iter().find(|block| !block.flags.ignored);
        if let Some(block) = first.filter(|_| !self.breakage.is(Breakage::SkipBitmaps)) {
            let mut out = Vec::new();
            Command::RecvBitmap { block: block.name.as_str() }.encode(&mut out);
            self.wire.send(&out)?;
            self.wire.flush()?;
        }
        Ok(SourceEvent::Done)
    }

    /// Requests which pages the peer has. All others are dirty.
    pub(super) fn compare_received(&mut self) -> Result<SourceEvent, Error> {
        if self.breakage.is(Breakage::SkipBitmaps) {
            return Ok(SourceEvent::Done);
        }
        let memory = Arc::clone(&self.guest.memory);
        let table = memory.table();
        let stop = self.wire.stop.within(self.settings.stall_timeout);
        let mut dirty = DirtyMap::new(table, self.settings.clear_shift);
        // The first is already requested.
        self.bitmaps(1, &stop, |index, block, bits| {
            bit_runs(bits, table.pages_of(block), false).for_each(|(first, pages)| {
                dirty.set_run(PageRun { block: index, first: PageIndex(first), pages });
            });
            // The target pages of a host page are sent together.
            dirty.widen(index, table.page().pages_in(block.host_page.bytes()).max(1));
        })?;
        self.confirm_received(&dirty)?;
        self.pages.dirty = dirty;
        let now = self.driver.clock.now();
        if self.breakage.is(Breakage::TakenByBitmap) {
            self.driver.engine.handle(now, SourceEvent::Taken);
        }
        if !self.driver.engine.is_taken() && self.driver.engine.has_taken_who_compares() {
            self.figures.taken(now);
        }
        Ok(SourceEvent::Done)
    }

    /// Requests the bitmap of each block, but of the first `asked`, for which that was done, and passes each on.
    pub(super) fn bitmaps(
        &mut self,
        asked: usize,
        stop: &Stop,
        mut take: impl FnMut(BlockIndex, &RamBlock, &[u8]),
    ) -> Result<(), Error> {
        let memory = Arc::clone(&self.guest.memory);
        let table = memory.table();
        let mut blocks = (0..).map(BlockIndex).zip(table.blocks()).filter(|(_, block)| !block.flags.ignored);
        let mut asked: VecDeque<_> = blocks.by_ref().take(asked).collect();
        loop {
            while asked.len() < MAX_ASKED
                && let Some((index, block)) = blocks.next()
            {
                let mut out = Vec::new();
                Command::RecvBitmap { block: block.name.as_str() }.encode(&mut out);
                self.wire.link.sink().send(&[SendPart::Own(&out)], stop)?;
                asked.push_back((index, block));
            }
            self.wire.link.sink().flush(stop)?;
            let Some((index, block)) = asked.pop_front() else { return Ok(()) };
            let pages = table.pages_of(block);
            let bits = self.received_bitmap(block.name.as_str(), pages, stop)?;
            take(index, block, &bits);
        }
    }

    fn received_bitmap(&mut self, name: &str, pages: u64, stop: &Stop) -> Result<Vec<u8>, Error> {
        loop {
            let Some(back) = &mut self.wire.back else {
                return Err(silent("which pages it has", Duration::ZERO));
            };
            match back.next(stop)? {
                PeerMessage::Received(block) if block == name => return back.bitmap(pages, stop),
                PeerMessage::Received(block) => {
                    let what = format!("the bitmap of RAM block {block}");
                    let while_doing = "that of another was due";
                    return Err(Error::OutOfTurn { what, at: None, while_doing });
                }
                PeerMessage::Working => {}
                // It may take the guest meanwhile.
                taken @ PeerMessage::Pong(_) => self.take_message(taken)?,
                word => refuse_verdict(word)?,
            }
            check_deadline(stop)?;
        }
    }
}

/// Runs of bits that are `set` or not among the first `pages`: bit i of byte i / 8 is page i.
pub(super) fn bit_runs(bits: &[u8], pages: u64, set: bool) -> impl Iterator<Item = (u64, u64)> + '_ {
    let is_set = |page: u64| bits.get((page / 8) as usize).is_some_and(|byte| byte >> (page % 8) & 1 == 1);
    let mut page = 0;
    std::iter::from_fn(move || {
        while page < pages && is_set(page) != set {
            page += 1;
        }
        let first = page;
        while page < pages && is_set(page) == set {
            page += 1;
        }
        (page > first).then_some((first, page - first))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_marked_is_missing() {
        let runs = |bits: &[u8], pages| bit_runs(bits, pages, false).collect::<Vec<_>>();
        assert_eq!(runs(&[0b0000_0110, 0xff], 16), [(0, 1), (3, 5)]);
        assert_eq!(runs(&[0xff, 0x01], 9), [], "padding is no page");
        assert_eq!(runs(&[0xff], 12), [(8, 4)], "what a bitmap does not cover");
        assert_eq!(runs(&[], 0), []);
        let held = |bits: &[u8], pages| bit_runs(bits, pages, true).collect::<Vec<_>>();
        assert_eq!(held(&[0b0000_0110, 0xff], 14), [(1, 2), (8, 6)]);
        assert_eq!(held(&[0, 0b1000_0000, 1], 24), [(15, 2)]);
        assert_eq!(held(&[], 9), []);
    }
}
