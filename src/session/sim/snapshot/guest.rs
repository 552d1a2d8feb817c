//! The guest's memory, what it writes, and the log of that.

use std::collections::BTreeMap;

use super::super::plan::Rng;
use super::plan::Plan;
use crate::ram::{PageRun, PageSet};
use crate::units::{BlockIndex, PageIndex};

/// A page, by block and number.
pub(super) type Page = (usize, u64);

/// The run of one page.
pub(super) fn alone(page: Page) -> PageRun {
    PageRun { block: BlockIndex(page.0 as u32), first: PageIndex(page.1), pages: 1 }
}

/// A dirty log that is read and armed in one step.
#[derive(Debug)]
pub(super) struct Log {
    on: bool,
    written: PageSet,
}

impl Log {
    pub(super) fn start(&mut self) {
        self.on = true;
    }

    pub(super) fn stop(&mut self, plan: &Plan) {
        *self = Self { on: false, written: PageSet::new(&plan.table()) };
    }

    /// What was written since the last time, in whole host pages.
    pub(super) fn read(&mut self, plan: &Plan) -> PageSet {
        let empty = PageSet::new(&plan.table());
        let written = std::mem::replace(&mut self.written, empty.clone());
        let mut fresh = empty;
        for page in written.runs().flat_map(super::world::pages_of) {
            fresh.add(plan.host_page(page.0, page.1));
        }
        fresh
    }
}

/// A guest, over all snapshots that are taken of it.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) memory: BTreeMap<Page, u64>,
    pub(super) log: Log,
    /// All pages that it has written, in order.
    pub(super) writes: Vec<Page>,
    blocks: Vec<(u64, u64)>,
}

impl Guest {
    /// Half of its pages hold something.
    pub(super) fn new(plan: &Plan, rng: &mut Rng) -> Self {
        let pages = plan
            .blocks
            .iter()
            .enumerate()
            .flat_map(|(block, (pages, _))| (0..*pages).map(move |p| (block, p)));
        let memory = pages.map(|page| (page, if rng.one_in(2) { rng.next() | 1 } else { 0 })).collect();
        let log = Log { on: false, written: PageSet::new(&plan.table()) };
        Self { memory, log, writes: Vec::new(), blocks: plan.blocks.clone() }
    }

    /// What it writes next, and where.
    pub(super) fn draw(&self, rng: &mut Rng) -> (Page, u64) {
        let block = rng.below(self.blocks.len() as u64) as usize;
        let page = (block, rng.below(self.blocks[block].0));
        (page, if rng.one_in(4) { 0 } else { rng.next() | 1 })
    }

    pub(super) fn write(&mut self, page: Page, value: u64) {
        self.memory.insert(page, value);
        self.writes.push(page);
        if self.log.on {
            self.log.written.add(alone(page));
        }
    }
}
