//! Pages that need not be sent: those that the guest reports as free, and memory that is not plugged.
//!
//! # Orders that must hold
//!
//! A hint has its effect before the logs are read, or none (see [`PageHints`]). Unplugged memory is looked for after
//! the logs were read: a page that is plugged and written in between is in the next sync's log, and is found dirty then
//! because it was unplugged before. After a failure a page that was left out is dirty again.

use std::sync::Arc;

use crate::guest::{DiscardManager, PageHints};
use crate::ram::{DirtyMap, PageRun, PageSet, RamBlockTable};
use crate::stream::native::{MAX_RANGES, Order, Range, Unsent};
use crate::stream::qemu::command::Command;
use crate::units::BlockIndex;

use super::SourceSession;
use crate::session::Breakage;

/// What a source leaves out, and why.
#[derive(Default)]
pub(super) struct Skips {
    hints: Option<PageHints>,
    discards: Option<Arc<dyn DiscardManager>>,
    /// Pages whose bytes at the destination are not those here, and need not be.
    unsent: PageSet,
    /// Pages that were unplugged at the last look; a part of `unsent`.
    unplugged: PageSet,
    hinted: u64,
    discarded: u64,
}

impl Skips {
    fn is_used(&self) -> bool {
        self.hints.is_some() || self.discards.is_some()
    }

    /// Some memory may be unplugged.
    pub(super) fn has_discards(&self) -> bool {
        self.discards.is_some()
    }

    /// Pages whose bytes must not be compared.
    pub(super) fn unsent(&self) -> &PageSet {
        &self.unsent
    }

    /// Takes the hints that have arrived. Once a batch.
    pub(super) fn settle(&mut self, dirty: &mut DirtyMap) {
        let Self { hints: Some(hints), unsent, hinted, .. } = self else { return };
        hints.drain(|run| *hinted += dirty.skip_run(run, unsent));
    }

    /// The pages of `run` are on their way.
    pub(super) fn sent(&mut self, run: PageRun) {
        if self.is_used() {
            self.unsent.remove(run);
        }
    }

    /// The logs are about to be read.
    pub(super) fn before_sync(&mut self, dirty: &mut DirtyMap, breakage: Breakage) {
        if let Some(hints) = &self.hints {
            hints.close();
        }
        if !breakage.is(Breakage::HintAcrossSync) {
            self.settle(dirty);
        }
    }

    /// The logs were read.
    pub(super) fn after_sync(
        &mut self,
        table: &RamBlockTable,
        dirty: &mut DirtyMap,
        last: bool,
        breakage: Breakage,
    ) {
        self.check_plugs(table, dirty, breakage);
        if breakage.is(Breakage::HintAcrossSync) {
            self.settle(dirty);
        }
        if let Some(hints) = self.hints.as_ref().filter(|_| !last) {
            hints.open();
        }
    }

    pub(super) fn check_plugs(&mut self, table: &RamBlockTable, dirty: &mut DirtyMap, breakage: Breakage) {
        let Some(discards) = &self.discards else { return };
        let mut now = PageSet::new(table);
        for (index, block) in (0..).map(BlockIndex).zip(table.blocks()) {
            if !block.flags.ignored {
                discards.unplugged(index, &mut |run| {
                    now.add(run);
                });
            }
        }
        let before = std::mem::replace(&mut self.unplugged, now);
        let mut plugged = before.clone();
        self.unplugged.runs().for_each(|run| plugged.remove(run));
        if !breakage.is(Breakage::ForgetPlugged) {
            for run in plugged.runs() {
                dirty.set_run(run);
            }
        }
        for run in self.unplugged.runs() {
            dirty.skip_run(run, &mut self.unsent);
            self.unsent.add(run);
        }
        let kept = before.count() - plugged.count();
        self.discarded += self.unplugged.count() - kept;
    }

    /// No page of a block is sent: pages left out of it do not matter.
    pub(super) fn forget(&mut self, run: PageRun) {
        self.unsent.remove(run);
        self.unplugged.remove(run);
    }

    /// It is over: hints are too late, and pages that were left out are not at the destination.
    pub(super) fn give_up(&mut self, dirty: &mut DirtyMap, breakage: Breakage) {
        if let Some(hints) = &self.hints {
            hints.close();
            hints.drain(drop);
        }
        if !breakage.is(Breakage::ForgetSkipped) {
            for run in self.unsent.runs() {
                dirty.set_run(run);
            }
        }
    }

    /// Reports to a ramwire which pages have no bytes to compare, and which have no memory.
    fn encode(&self, out: &mut Vec<u8>) {
        let mut hinted = self.unsent.clone();
        self.unplugged.runs().for_each(|run| hinted.remove(run));
        for (why, pages) in [(Unsent::Free, &hinted), (Unsent::Unplugged, &self.unplugged)] {
            let runs: Vec<PageRun> = pages.runs().collect();
            for runs in runs.chunk_by(|a, b| a.block == b.block).flat_map(|runs| runs.chunks(MAX_RANGES)) {
                let bytes: Vec<u8> = runs
                    .iter()
                    .flat_map(|run| Range { first: run.first.0, pages: run.pages }.encode())
                    .collect();
                let block = runs.first().map_or(0, |run| run.block.0);
                Command::Native(Order::Unsent { block, why, ranges: &bytes }).encode(out);
            }
        }
    }

    /// Pages that were left out so far: hinted ones, and unplugged ones.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.hinted, self.discarded)
    }
}

impl SourceSession {
    /// Takes the guest's hints about pages whose bytes it does not need; clones of the returned value may be given to
    /// the receivers of hints, on any thread. Hints are good for this migration only, between its syncs.
    pub fn page_hints(&mut self) -> PageHints {
        let table = self.guest.memory.table();
        if !self.pages.skips.is_used() {
            self.pages.skips.unsent = PageSet::new(table);
        }
        let new = || PageHints::new(table, &self.guest.dirty);
        self.pages.skips.hints.get_or_insert_with(new).clone()
    }

    /// Memory that `discards` calls unplugged is not read and not sent.
    pub fn with_discards(mut self, discards: Arc<dyn DiscardManager>) -> Self {
        if !self.pages.skips.is_used() {
            self.pages.skips.unsent = PageSet::new(self.guest.memory.table());
        }
        self.pages.skips.discards = Some(discards);
        self
    }

    /// The pages that were left out, as messages for a ramwire; nothing if there are none.
    pub(super) fn encode_skips(&self, out: &mut Vec<u8>) {
        self.pages.skips.encode(out);
    }
}
