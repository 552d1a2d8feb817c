//! Which pages a writer writes, and in which order, so that one number per writer determines the content of every page.

use super::page::{FILL, Stamp, mix};
use crate::ram::RamBlockTable;
use crate::units::{Percent, Rate};

/// Maximum number of writers of a guest; it limits how many threads a device state can start.
pub(super) const MAX_WRITERS: u32 = 256;

/// Configuration of a synthetic guest. The same configuration over the same blocks fills the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyntheticConfig {
    /// Determines the fill and the position of the working set.
    pub seed: u64,
    /// Share of the pages that are zero at the start.
    pub zero: Percent,
    /// Bytes that are written repeatedly, spread over the blocks by their size; at least a page per writer.
    pub working_set: u64,
    /// Bytes written per second by all writers together; `None` for as fast as possible, 0 for an idle guest.
    pub rate: Option<Rate>,
    /// Writer threads, 1 to 256.
    pub writers: u32,
    /// Bytes of a page that each write changes besides its header of 40; [`u32::MAX`] for all.
    pub changes: u32,
}

impl Default for SyntheticConfig {
    fn default() -> Self {
        let zero = Percent::new(25).unwrap_or_default();
        Self {
            seed: 1,
            zero,
            working_set: 64 << 20,
            rate: Some(Rate(200 << 20)),
            writers: 2,
            changes: u32::MAX,
        }
    }
}

/// What a page must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    Zero,
    Stamped(Stamp),
}

/// A stretch of a block that is written.
#[derive(Clone, Copy, Debug)]
struct Extent {
    block: u32,
    first: u64,
    pages: u64,
}

/// The configuration applied to the blocks.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) config: SyntheticConfig,
    extents: Vec<Extent>,
    /// For each writer: its pages, and the step from one to the next.
    lanes: Vec<(u64, u64)>,
}

impl Plan {
    pub(super) fn new(table: &RamBlockTable, config: SyntheticConfig) -> Self {
        let config = SyntheticConfig { writers: config.writers.clamp(1, MAX_WRITERS), ..config };
        let page = table.page();
        let total = page.pages_in(table.total()).max(1);
        let wanted = page.pages_in(config.working_set).clamp(u64::from(config.writers).min(total), total);
        let extent = |(block, ram)| {
            let len = table.pages_of(ram);
            let share = u128::from(len) * u128::from(wanted);
            let pages = (share.div_ceil(u128::from(total)) as u64).min(len);
            let draw = mix(config.seed, Stamp { block, writer: FILL, page: u64::MAX, sequence: 0 });
            Extent { block, first: draw % (len - pages + 1), pages }
        };
        let blocks = (0u32..).zip(table.blocks()).filter(|(_, block)| !block.flags.ignored);
        let extents: Vec<Extent> = blocks.map(extent).collect();
        let pages: u64 = extents.iter().map(|extent| extent.pages).sum();
        let writers = u64::from(config.writers);
        let own = (0..writers).map(|writer| pages.saturating_sub(writer).div_ceil(writers));
        Self { config, extents, lanes: own.map(|own| (own, stride(own))).collect() }
    }

    /// Pages that belong to `writer`.
    pub(super) fn pages_of(&self, writer: u32) -> u64 {
        self.lanes.get(writer as usize).map_or(0, |(own, _)| *own)
    }

    /// The block and page of a writer's write number `sequence` (from 1): its pages one after the other in a fixed
    /// scattered order, repeatedly. `None` if the writer has no page.
    pub(super) fn place(&self, writer: u32, sequence: u64) -> Option<(u32, u64)> {
        let (own, stride) = *self.lanes.get(writer as usize)?;
        let turn = (sequence.checked_sub(1)?).checked_rem(own)?;
        let jump = (u128::from(turn) * u128::from(stride) % u128::from(own)) as u64;
        let mut at = jump * u64::from(self.config.writers) + u64::from(writer);
        for extent in &self.extents {
            if at < extent.pages {
                return Some((extent.block, extent.first + at));
            }
            at -= extent.pages;
        }
        None
    }

    /// True for a page of the working set.
    pub(super) fn is_written(&self, block: u32, page: u64) -> bool {
        let holds = |extent: &Extent| {
            extent.block == block && page.checked_sub(extent.first).is_some_and(|at| at < extent.pages)
        };
        self.extents.iter().any(holds)
    }

    /// Content of a page before any writer has written it.
    pub(super) fn initial(&self, block: u32, page: u64) -> Expected {
        let stamp = Stamp { block, writer: FILL, page, sequence: 0 };
        if mix(!self.config.seed, stamp) % 100 < u64::from(self.config.zero.get()) {
            Expected::Zero
        } else {
            Expected::Stamped(stamp)
        }
    }

    /// Content of a writer's page before its write number `sequence`.
    pub(super) fn before(&self, writer: u32, sequence: u64, block: u32, page: u64) -> Expected {
        match sequence.checked_sub(self.pages_of(writer)) {
            Some(sequence) if sequence > 0 => Expected::Stamped(Stamp { block, writer, page, sequence }),
            _ => self.initial(block, page),
        }
    }

    /// The last write to each page of the working set, after each writer has done the given number of writes.
    pub(super) fn last_writes(&self, sequences: &[u64]) -> LastWrites {
        let empty = |extent: &Extent| (*extent, vec![None; extent.pages as usize]);
        let mut last = LastWrites(self.extents.iter().map(empty).collect());
        for (writer, done) in (0u32..).zip(sequences) {
            let lap = self.pages_of(writer);
            for sequence in done.saturating_sub(lap) + 1..=*done {
                if let Some((block, page)) = self.place(writer, sequence) {
                    last.set(Stamp { block, writer, page, sequence });
                }
            }
        }
        last
    }
}

/// The last write to each page of the working set.
pub(super) struct LastWrites(Vec<(Extent, Vec<Option<Stamp>>)>);

impl LastWrites {
    fn set(&mut self, stamp: Stamp) {
        let extent = self.0.iter_mut().find(|(extent, _)| extent.block == stamp.block);
        let slot = extent
            .and_then(|(extent, stamps)| stamps.get_mut(stamp.page.checked_sub(extent.first)? as usize));
        if let Some(slot) = slot {
            *slot = Some(stamp);
        }
    }

    /// `None` for a page that no writer has written.
    pub(super) fn get(&self, block: u32, page: u64) -> Option<Stamp> {
        let (extent, stamps) = self.0.iter().find(|(extent, _)| extent.block == block)?;
        *stamps.get(usize::try_from(page.checked_sub(extent.first)?).ok()?)?
    }
}

/// A step that visits each of `pages` once before it repeats.
pub(in crate::guest) fn stride(pages: u64) -> u64 {
    (pages * 5 / 8..).find(|stride| gcd(*stride, pages) == 1).unwrap_or(1)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::HashMap;

    use super::*;
    use crate::ram::{BlockName, RamBlock};
    use crate::units::PageSize;

    fn plan(writers: u32, working_set: u64) -> Plan {
        let block = |(name, pages): (&str, u64)| RamBlock::new(BlockName::new(name).unwrap(), pages * 4096);
        let blocks = [("a", 1000), ("b", 37), ("c", 1)].map(block).into();
        let table = RamBlockTable::new(PageSize::SIZE_4K, blocks).unwrap();
        Plan::new(&table, SyntheticConfig { writers, working_set, ..SyntheticConfig::default() })
    }

    /// The closed form agrees with a plain replay of every write, for any number of writes.
    #[test]
    fn the_last_write_of_each_page_follows_from_one_number_a_writer() {
        for (writers, working_set, done) in
            [(1, 0, 5), (3, 400 << 10, 0), (3, 400 << 10, 777), (2, 1 << 40, 300)]
        {
            let plan = plan(writers, working_set);
            let sequences: Vec<u64> = (0..writers).map(|writer| done + 13 * u64::from(writer)).collect();
            let mut replay = HashMap::new();
            for (writer, done) in (0..).zip(&sequences) {
                for sequence in 1..=*done {
                    let place = plan.place(writer, sequence).unwrap();
                    let before =
                        replay.insert(place, Stamp { block: place.0, writer, page: place.1, sequence });
                    let known = plan.before(writer, sequence, place.0, place.1);
                    let replayed = before.map_or(plan.initial(place.0, place.1), Expected::Stamped);
                    assert_eq!(known, replayed);
                }
            }
            let last = plan.last_writes(&sequences);
            for (block, pages) in [(0, 1000), (1, 37), (2, 1)] {
                for page in 0..pages {
                    assert_eq!(last.get(block, page), replay.get(&(block, page)).copied(), "{block} {page}");
                }
            }
        }
    }

    #[test]
    fn writers_share_the_working_set_without_sharing_a_page() {
        let plan = plan(3, 400 << 10);
        let mut seen = HashMap::new();
        for writer in 0..3 {
            for sequence in 1..=plan.pages_of(writer) {
                assert_eq!(seen.insert(plan.place(writer, sequence).unwrap(), writer), None);
            }
        }
        assert!((100..=103).contains(&seen.len()), "{}", seen.len());
        assert_eq!(plan.place(0, 0), None);
    }
}
