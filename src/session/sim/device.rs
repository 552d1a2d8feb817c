//! Pages that need not be sent: a balloon device that passes hints on, memory that is plugged and unplugged, and which
//! of its pages may be sent.
//!
//! A page that is free or unplugged has no contents that anything relies on. A guest that takes a free page writes all
//! of it. Some hints are passed on at once; of others the guest holds the pages until a sync begins, and the device may
//! pass them on only after that.

use std::cell::Cell;
use std::collections::BTreeSet;

use super::plan::{Plan, Rng, Side};
use super::world::{Mark, Sim, World};
use crate::guest::{DiscardManager, HintBreakage, HintEpoch, Hinted, PageHints};
use crate::ram::{Landing, PageBatch, PageRun};
use crate::session::Breakage;
use crate::units::{BlockIndex, PageIndex, PageSize};

thread_local! {
    /// The device is acting: its own calls do not call it again.
    static ACTS: Cell<bool> = const { Cell::new(false) };
}

pub(super) type Page = (u32, u64);

/// Pages without contents.
#[derive(Clone, Debug, Default)]
pub(super) struct Nothing {
    pub(super) free: BTreeSet<Page>,
    pub(super) unplugged: BTreeSet<Page>,
}

impl Nothing {
    pub(super) fn has(&self, page: Page) -> bool {
        self.free.contains(&page) || self.unplugged.contains(&page)
    }
}

/// The device, and what the source must keep to.
#[derive(Debug)]
pub(super) struct Device {
    /// Its own chances, so that a seed without it goes as it would go without all this.
    rng: Rng,
    /// Number of plugs and unplugs that are left, so that every migration converges.
    plugs_left: u32,
    pub(super) hints: Option<PageHints>,
    /// Pages the guest holds, and the epoch they are held for.
    held: Vec<(HintEpoch, Page)>,
    /// Hints the device still has in its hands although a sync has begun.
    late: Vec<(HintEpoch, Page)>,
    /// Written since the logs were last read.
    written: BTreeSet<Page>,
    /// Hinted since the last batch: the batch that is being gathered may have them.
    fresh: BTreeSet<Page>,
    /// Hinted and not written since: not to be sent.
    left_out: BTreeSet<Page>,
    /// Unplugged at the source's last look, and ever since.
    known_unplugged: BTreeSet<Page>,
}

impl Device {
    pub(super) fn new(plan: &Plan) -> Self {
        let [held, late] = [Vec::new(), Vec::new()];
        let [written, fresh, left_out, known_unplugged] = [const { BTreeSet::new() }; 4];
        Self {
            rng: Rng::new(plan.seed ^ 0xba11),
            plugs_left: 60,
            hints: None,
            held,
            late,
            written,
            fresh,
            left_out,
            known_unplugged,
        }
    }

    pub(super) fn holds(&self, page: Page) -> bool {
        self.held.iter().any(|(_, held)| *held == page)
    }

    /// A write that a log sees.
    pub(super) fn wrote(&mut self, page: Page) {
        self.written.insert(page);
        self.fresh.remove(&page);
        self.left_out.remove(&page);
    }

    pub(super) fn logs_are_read(&mut self) {
        self.written.clear();
    }
}

fn pages(run: PageRun) -> impl Iterator<Item = Page> {
    (run.first.0..run.end().0).map(move |page| (run.block.0, page))
}

impl World {
    /// Memory is plugged and unplugged.
    pub(super) fn plugs(&mut self) {
        let may = !self.plan.plugs.is_empty() && self.guest.running[0] && !self.guest.promised;
        if !may || self.device.plugs_left == 0 || !self.device.rng.one_in(12) {
            return;
        }
        self.device.plugs_left -= 1;
        let plan = std::sync::Arc::clone(&self.plan);
        let page @ (block, number) = self.device.rng.pick(&plan.plugs);
        if self.device.holds(page) {
            return;
        }
        if self.guest.nothing[0].unplugged.remove(&page) {
            self.mark(Mark::Plugged);
            self.guest.nothing[0].free.remove(&page);
            self.guest.make_zero(block, number);
            // A manager that was not queried since its unplug reports the page to a log.
            if !self.device.known_unplugged.remove(&page) {
                self.logs[0].wrote(block, number);
            }
            self.device.wrote(page);
        } else {
            self.guest.nothing[0].unplugged.insert(page);
            self.guest.spoil(block, number);
        }
    }

    /// Pages are being sent: none of them needlessly.
    pub(super) fn offered(&mut self, batch: &PageBatch) {
        for page in batch.pieces().iter().flat_map(|piece| pages(piece.run)) {
            if self.device.left_out.contains(&page) {
                self.violation(format!("{page:?} was sent for nothing: the guest said that it is free"));
            }
            if self.marks.contains(&Mark::Passed) && self.plan.passed.contains(&page.0) {
                self.violation(format!("{page:?} was sent although its memory is passed"));
            }
            if self.plan.ignored == Some(page.0) {
                self.violation(format!("{page:?} was sent although its block is ignored"));
            }
        }
    }

    /// The source gathers its next batch.
    pub(super) fn batch_is_gone(&mut self) {
        let fresh = std::mem::take(&mut self.device.fresh);
        self.device.left_out.extend(fresh);
    }

    /// The source is about to read `landing`.
    pub(super) fn read(&mut self, landing: Landing) {
        let read =
            pages(landing.run(PageSize::SIZE_4K)).find(|page| self.device.known_unplugged.contains(page));
        if let Some(page) = read {
            self.violation(format!("{page:?} was read although it is unplugged"));
        }
    }

    /// A page for the balloon: free, or freed now.
    fn draw_free(&mut self) -> Option<Page> {
        let plan = std::sync::Arc::clone(&self.plan);
        let page = match self.device.rng.one_in(2) {
            true => self.device.rng.pick(&plan.working_set),
            false => super::plan::page_at(&plan.blocks, self.device.rng.below(plan.total_pages())),
        };
        if plan.ignored == Some(page.0)
            || self.device.holds(page)
            || self.guest.nothing[0].unplugged.contains(&page)
        {
            return None;
        }
        self.guest.nothing[0].free.insert(page);
        Some(page)
    }

    /// What the device does next: a hint to pass on.
    fn device_next(&mut self, hints: &PageHints) -> Option<(HintEpoch, Page, bool)> {
        let now = hints.epoch();
        // A sync has begun: the guest takes its pages back, whichever of them the device holds.
        let (held, over) =
            std::mem::take(&mut self.device.held).into_iter().partition(|(e, _)| Some(*e) == now);
        self.device.held = held;
        self.device.late.extend::<Vec<_>>(over);
        if !self.guest.running[0] || !self.device.rng.one_in(self.plan.hint_every) {
            return None;
        }
        if !self.device.late.is_empty() && self.device.rng.one_in(2) {
            let (epoch, page) = self.device.late.swap_remove(0);
            return Some((epoch, page, false));
        }
        if !self.device.held.is_empty() && self.device.rng.one_in(4) {
            let (epoch, page) = self.device.held.swap_remove(0);
            return Some((epoch, page, true));
        }
        let page = self.draw_free()?;
        let epoch = now?;
        if self.device.rng.one_in(3) {
            self.device.held.push((epoch, page));
            return None;
        }
        Some((epoch, page, true))
    }
}

impl Sim {
    /// The device runs for a moment. Called where the source's session holds nothing.
    pub(super) fn device_acts(&self, side: Side) {
        if side != Side::Source || !self.is_here(side) || ACTS.get() {
            return;
        }
        let (hints, next) = {
            let mut world = self.world();
            let Some(hints) = world.device.hints.clone() else { return };
            let next = world.device_next(&hints);
            (hints, next)
        };
        let Some((epoch, page, in_time)) = next else { return };
        let run = PageRun { block: BlockIndex(page.0), first: PageIndex(page.1), pages: 1 };
        ACTS.set(true);
        // The guest holds the page meanwhile.
        self.world().device.held.push((epoch, page));
        let hinted = hints.free(epoch, run);
        let mut world = self.world();
        world.device.held.retain(|held| *held != (epoch, page));
        match hinted {
            Ok(Hinted::Taken) => {
                world.mark(Mark::Hinted);
                if in_time && !world.device.written.contains(&page) {
                    world.device.fresh.insert(page);
                }
            }
            Ok(Hinted::TooLate) => world.mark(Mark::HintTooLate),
            // The log's call was the one to fail.
            Ok(Hinted::Full) | Err(_) => {}
        }
        ACTS.set(false);
    }
}

/// Informs a session of unplugged memory.
pub(super) struct SimDiscards(pub(super) Sim);

impl DiscardManager for SimDiscards {
    fn unplugged(&self, block: BlockIndex, found: &mut dyn FnMut(PageRun)) {
        let mut turn = self.0.enter();
        let unplugged = &turn.world.guest.nothing[0].unplugged;
        let here: Vec<Page> = unplugged.iter().copied().filter(|page| page.0 == block.0).collect();
        turn.world.device.known_unplugged.retain(|page| page.0 != block.0);
        turn.world.device.known_unplugged.extend(&here);
        if !here.is_empty() {
            turn.world.mark(Mark::Unplugged);
        }
        drop(turn);
        here.into_iter().for_each(|(_, page)| found(PageRun { block, first: PageIndex(page), pages: 1 }));
    }
}

/// Which of the hints' orders are switched off.
pub(super) fn hint_breakage(breakage: Breakage) -> HintBreakage {
    HintBreakage {
        unprotected: breakage.is(Breakage::HintUnprotected),
        any_epoch: breakage.is(Breakage::HintOfAnyEpoch),
    }
}

/// Memory of the guest that need not be sent.
pub(super) struct Drawn {
    pub(super) hint_every: u64,
    pub(super) plugs: Vec<Page>,
    pub(super) unplugged: BTreeSet<Page>,
    pub(super) ignored: Option<u32>,
}

impl Drawn {
    pub(super) fn of(seed: u64, blocks: &[(u64, PageSize)]) -> Self {
        // A generator of its own, so that a seed means the same guest with and without these.
        let mut rng = Rng::new(seed ^ 0xba11_0000);
        if rng.one_in(2) {
            return Self { hint_every: 0, plugs: Vec::new(), unplugged: BTreeSet::new(), ignored: None };
        }
        let hint_every = rng.pick(&[0, 1, 1, 3]);
        let ignored = rng.one_in(4).then(|| rng.below(blocks.len() as u64) as u32);
        let (mut plugs, mut unplugged) = (Vec::new(), BTreeSet::new());
        if rng.one_in(2) {
            for block in (0..blocks.len() as u32).filter(|block| ignored != Some(*block)) {
                let pages = blocks[block as usize].0;
                let first = rng.below(pages);
                let range = first..(first + 1 + rng.below(pages / 2 + 1)).min(pages);
                plugs.extend(range.clone().map(|page| (block, page)));
                unplugged.extend(range.filter(|_| !rng.one_in(3)).map(|page| (block, page)));
            }
        }
        Self { hint_every, plugs, unplugged, ignored }
    }
}

/// The pages that a plan's guest starts without.
pub(super) fn nothing_at_start(plan: &Plan) -> Nothing {
    Nothing { free: BTreeSet::new(), unplugged: plan.unplugged.clone() }
}
