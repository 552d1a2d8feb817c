//! Pages that the modelled destination places, from whichever connection.

use super::{BATCH, Destination, PAGE};
use crate::engine::FIRST_ROOM;
use crate::session::sim::postcopy::channels::PageInChannel;
use crate::stream::qemu::ram::{Record, decode_record};
use crate::units::PageSize;

impl Destination {
    pub(super) fn place(&mut self, channel: usize, block: usize, page: u64, number: u64) {
        if !self.packaged {
            self.pages[block][page as usize] = Some(number);
            return;
        }
        let host = self.hosts[block];
        let first = page / host * host;
        let part = &mut self.parts[channel];
        if *part.at.get_or_insert((block, first)) != (block, first) {
            self.violations.push("host pages interleave".into());
        }
        part.numbers.push(number);
        let whole = part.numbers.len() as u64 == host;
        let numbers = if whole { std::mem::take(part).numbers } else { Vec::new() };
        if self.recovering {
            self.violations.push("a page comes in front of RESUME".into());
        }
        // The guest may have written a received page since. A page that a lost connection cut off is sent again whole.
        let was_here = self.pages[block][page as usize].is_some();
        if was_here {
            self.violations.push("a page comes that is there and was not forgotten".into());
        }
        if whole {
            for (at, number) in (first..).zip(numbers) {
                self.pages[block][at as usize] = Some(number);
            }
            match (self.outstanding.contains(&(block, first)), channel) {
                (true, _) => {}
                (false, 0) => self.filled += host,
                (false, 2..) => {}
                (false, _) => self.violations.push("an urgent page that nobody asked for".into()),
            }
            if self.known.is_none() && self.filled > FIRST_ROOM + BATCH + host {
                self.violations.push("too many pages are ahead of what was answered".into());
            }
            self.outstanding.retain(|page| *page != (block, first));
        }
    }

    /// The source gives a batch to a page channel: one of those with the fewest, which takes its oldest first if it has
    /// `room` of them.
    pub(in crate::session::sim::postcopy) fn offered(&mut self, pages: Vec<PageInChannel>, room: usize) {
        if self.packaged && self.serves != Some(true) {
            self.violations.push("a page channel carries missing pages before faults are served".into());
        }
        let least = (0..self.channels.len()).min_by_key(|at| self.channels[*at].len()).unwrap_or(0);
        if self.channels[least].len() >= room {
            self.deliver(least);
        }
        self.channels[least].push_back(pages);
    }

    /// Takes the oldest batch of a page channel; false if there is none.
    pub(super) fn deliver(&mut self, channel: usize) -> bool {
        let Some(pages) = self.channels[channel].pop_front() else { return false };
        for (block, page, number) in pages {
            self.channel_pages += u64::from(self.packaged);
            self.place(2 + channel, block, page, number);
        }
        true
    }

    /// Records without a section.
    pub(super) fn receive_urgent(&mut self, bytes: &[u8]) {
        self.sent_here += bytes.len() as u64;
        self.urgent.input.extend_from_slice(bytes);
        let input = std::mem::take(&mut self.urgent.input);
        let mut rest = &input[..];
        while let Ok((record, head)) = decode_record(rest, PageSize::SIZE_4K) {
            let (at, page) = match &record {
                Record::Page(at) => (at, PAGE),
                Record::Zero { at, .. } => (at, 0),
                Record::Eos => {
                    self.urgent.ended = true;
                    rest = &rest[head..];
                    continue;
                }
                _ => {
                    self.violations.push("the urgent stream is not understood".into());
                    return;
                }
            };
            let Some(bytes) = rest.get(head..head + page) else { break };
            if let Some(name) = at.block {
                self.urgent.block = (0..self.hosts.len()).find(|index| name == format!("b{index}")).unwrap();
            }
            let number = bytes.get(..8).map_or(0, |bytes| u64::from_ne_bytes(bytes.try_into().unwrap()));
            self.urgent.pages += 1;
            self.urgent.again += u64::from(self.recoveries > 0);
            self.place(1, self.urgent.block, at.offset.0 / PAGE as u64, number);
            rest = &rest[head + page..];
        }
        self.urgent.input = rest.to_vec();
    }
}
