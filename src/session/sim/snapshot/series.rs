//! Snapshots of one guest, one after the other, each of what has changed since the one before; and what is read of them.

use std::collections::{BTreeMap, BTreeSet};

use super::super::findings::{Findings, finds_each, survey};
use super::super::plan::Rng;
use super::guest::{Guest, Page};
use super::plan::{Fault, Plan};
use super::world::{World, pages_of};
use super::{MUTANT_SEEDS, SEEDS};
use crate::engine::{ChangedPages, NextBase, SnapshotBreakage, SnapshotOutcome};
use crate::ram::{PageBitmap, PageSet};
use crate::stream::snapshot_chain::{ChainBreakage, ChainError, SnapshotChain};
use crate::stream::snapshot_note::{BaseNote, SnapshotId, SnapshotNote};

/// What a test leaves out.
#[derive(Clone, Copy, Debug, Default)]
struct Broken {
    taking: SnapshotBreakage,
    reading: ChainBreakage,
}

/// A file, and what its guest's memory held in its moment.
struct File {
    note: SnapshotNote,
    present: Vec<PageBitmap>,
    values: BTreeMap<Page, u64>,
    moment: BTreeMap<Page, u64>,
}

/// What the next snapshot is taken against.
struct Base {
    note: BaseNote,
    changed: PageSet,
    /// Writes of the guest before its moment.
    moment_at: usize,
}

struct Series {
    rng: Rng,
    plan: Plan,
    broken: Broken,
    base: Option<Base>,
    files: Vec<File>,
    /// The number of the file that lies under a name.
    folder: BTreeMap<String, usize>,
    findings: Findings,
}

impl Series {
    fn run(seed: u64, broken: Broken) -> Self {
        let mut rng = Rng::new(seed ^ 0xba5e);
        let plan = Plan { tracked: true, ..Plan::of(&mut rng) };
        let mut guest = Guest::new(&plan, &mut rng);
        let mut this = Self {
            rng,
            plan,
            broken,
            base: None,
            files: Vec::new(),
            folder: BTreeMap::new(),
            findings: Findings::default(),
        };
        for number in 0..2 + this.rng.below(5) {
            for _ in 0..this.rng.below_one_of(&[1, 5, 40]) {
                let (page, value) = guest.draw(&mut this.rng);
                guest.write(page, value);
            }
            guest = this.take(number as u8, guest);
        }
        let swapped = this.swap();
        this.read_all(swapped);
        this
    }

    /// Takes a snapshot; returns the guest, which runs on.
    fn take(&mut self, number: u8, guest: Guest) -> Guest {
        let fault =
            if self.rng.one_in(8) { Fault::Log(1 + self.rng.below(4)) } else { Fault::of(&mut self.rng) };
        let plan = Plan { fault, ..self.plan.clone() };
        let base = self.base.take();
        let changes = match &base {
            Some(base) => ChangedPages::since(base.changed.clone()),
            None => ChangedPages::of_all(),
        };
        let rng = Rng::new(self.rng.next());
        let mut world = World::new(plan, rng, guest, changes, self.broken.taking);
        world.run();
        let taken = world.outcome == Some(SnapshotOutcome::Taken);
        self.findings.join(std::mem::take(&mut world.findings));
        let note =
            SnapshotNote { id: SnapshotId([number; 16]), base: base.as_ref().map(|base| base.note.clone()) };
        if taken {
            self.keep(number, note, &world, base.as_ref());
        }
        let World { changes, mut guest, moment_at, .. } = world;
        self.base = match (changes.end(taken), base) {
            (NextBase::This, _) => {
                let note = BaseNote { id: SnapshotId([number; 16]), path: number.to_string(), starts_at: 0 };
                Some(Base { note, changed: PageSet::new(&self.plan.table()), moment_at })
            }
            (NextBase::Same(changed), Some(base)) => {
                self.findings.saw("a failed one leaves its base");
                Some(Base { changed, ..base })
            }
            _ => None,
        };
        if self.base.is_none() {
            self.findings.saw("no base is left");
            guest.log.stop(&self.plan);
        }
        guest
    }

    /// The file of a snapshot that was taken.
    fn keep(&mut self, number: u8, note: SnapshotNote, world: &World, base: Option<&Base>) {
        let mut present: Vec<_> = self.plan.blocks.iter().map(|(pages, _)| PageBitmap::new(*pages)).collect();
        // Without a base a page that is zero is absent; with one it is there.
        for (&(block, page), value) in &world.written {
            if base.is_some() || *value != 0 {
                present[block].set_range(page..page + 1);
            }
        }
        if let Some(base) = base {
            self.findings.saw("one with a base is taken");
            let mut changed = PageSet::new(&self.plan.table());
            for page in &world.guest.writes[base.moment_at..world.moment_at] {
                changed.add(self.plan.host_page(page.0, page.1));
            }
            let changed: BTreeSet<Page> = changed.runs().flat_map(pages_of).collect();
            let only = world.written.keys().all(|page| changed.contains(page));
            self.findings.must(only, "a page that has not changed since is written");
        }
        self.folder.insert(number.to_string(), self.files.len());
        let (values, moment) = (world.written.clone(), world.moment.clone());
        self.files.push(File { note, present, values, moment });
    }

    /// Another file may lie under the name of one that is a base. True if one does.
    fn swap(&mut self) -> bool {
        if self.files.is_empty() || !self.rng.one_in(4) {
            return false;
        }
        let which = self.rng.below(self.files.len() as u64) as usize;
        let other = if self.rng.one_in(2) {
            // Of another guest with the same blocks.
            let values = self.files[which].moment.keys().map(|page| (*page, self.rng.next() | 1)).collect();
            let mut present: Vec<_> =
                self.plan.blocks.iter().map(|(pages, _)| PageBitmap::new(*pages)).collect();
            present.iter_mut().for_each(|map| _ = map.set_range(0..u64::MAX));
            let note = SnapshotNote { id: SnapshotId([0xff; 16]), base: None };
            self.files.push(File { note, present, values, moment: BTreeMap::new() });
            self.files.len() - 1
        } else {
            self.rng.below(self.files.len() as u64) as usize
        };
        let name = format!("{}", self.files[which].note.id.0[0]);
        let before = self.folder.insert(name, other);
        before != Some(other)
    }

    /// Each file holds its moment, or what it needs is not there.
    fn read_all(&mut self, swapped: bool) {
        for number in 0..self.files.len() {
            let file = &self.files[number];
            if file.moment.is_empty() {
                continue;
            }
            match self.read(file) {
                Ok(memory) => {
                    let same = memory == file.moment;
                    self.findings.must(same, "a file does not hold its moment");
                }
                Err(error) => {
                    self.findings.saw("another base is refused");
                    self.findings.must(swapped, &format!("a whole chain is refused: {error}"));
                }
            }
        }
    }

    fn read(&self, first: &File) -> Result<BTreeMap<Page, u64>, ChainError> {
        let mut chain = SnapshotChain::new(Some(&first.note), first.present.clone());
        chain.break_rule(self.broken.reading);
        let mut files = vec![first];
        while let Some(base) = chain.next_base()?.cloned() {
            let file = &self.files[self.folder[&base.path]];
            chain.add(Some(&file.note), &file.present)?;
            files.push(file);
        }
        let mut memory: BTreeMap<Page, u64> = first.moment.keys().map(|page| (*page, 0)).collect();
        for block in 0..self.plan.blocks.len() {
            let mut at = 0;
            while let Some((file, run)) = chain.next_run(block, at, u64::MAX) {
                at = run.end;
                memory.extend(run.map(|page| ((block, page), files[file].values[&(block, page)])));
            }
        }
        Ok(memory)
    }
}

#[test]
fn each_snapshot_of_a_series_holds_its_moment_whatever_became_of_the_others() {
    let all = [
        "one with a base is taken",
        "a failed one leaves its base",
        "no base is left",
        "a log is lost",
        "another base is refused",
    ];
    let describe = |series: &Series| format!("{:#?}", series.plan);
    survey(SEEDS, |seed| Series::run(seed, Broken::default()), |series| series.findings, describe, &all);
}

#[test]
fn each_order_of_a_series_is_needed() {
    let taking = [
        SnapshotBreakage::TrackLate,
        SnapshotBreakage::LookOnce,
        SnapshotBreakage::ForgetFailed,
        SnapshotBreakage::TrustLostLog,
    ];
    let taking = taking.map(|taking| Broken { taking, ..Broken::default() });
    let reading = [ChainBreakage::TakeAnyBase, ChainBreakage::ReadOldest];
    let reading = reading.map(|reading| Broken { reading, ..Broken::default() });
    let orders =
        taking.into_iter().chain(reading).map(|broken| (broken, ["a file does not hold its moment"]));
    finds_each(MUTANT_SEEDS, orders, |seed, broken| Series::run(seed, broken).findings.violations());
}
