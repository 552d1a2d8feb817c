//! Pages that a relay's source still has to send after its switch to postcopy.
//!
//! # Required order
//!
//! A page that the source has discarded is not here: what the relay holds of it is older. It is sent on only after it
//! has come again, in whole host pages. What the far end waits for is requested from the source once.

use crate::ram::{PageRun, PageSet, RamBlockTable};
use crate::units::PageIndex;

/// Target pages from which on a request takes no further host page: its length in bytes has 32 bits.
const LONGEST_REQUEST: u64 = 1 << 14;

/// A run that has come and may be sent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::session) struct Came {
    pub(in crate::session) run: PageRun,
    /// A thread at the far end waits for it.
    pub(in crate::session) asked: bool,
}

/// The pages that are not here.
#[derive(Debug, Default)]
pub(in crate::session) struct Owed {
    absent: PageSet,
    /// Requested from the source.
    asked: PageSet,
    /// Target pages of a host page, of each block.
    host_pages: Vec<u64>,
}

impl Owed {
    /// The source has discarded `absent`, in whole host pages.
    pub(in crate::session) fn new(table: &RamBlockTable, absent: PageSet) -> Self {
        let host = |block: &crate::ram::RamBlock| table.page().pages_in(block.host_page.bytes()).max(1);
        Self { absent, asked: PageSet::new(table), host_pages: table.blocks().iter().map(host).collect() }
    }

    /// The pages that are not here.
    pub(in crate::session) fn absent(&self) -> &PageSet {
        &self.absent
    }

    /// Number of pages that are not here.
    pub(in crate::session) fn left(&self) -> u64 {
        self.absent.count()
    }

    /// `run` has come: returns what may be sent on by now. Pages that were here before are not sent again.
    pub(in crate::session) fn came(&mut self, run: PageRun) -> Vec<Came> {
        let mut ready: Vec<Came> = Vec::new();
        for part in within(&self.absent, run) {
            self.absent.remove(part);
            if self.host_page(part) == 1 && !self.asked.touches(part) {
                put_behind(&mut ready, Came { run: part, asked: false });
                continue;
            }
            for whole in self.host_pages_of(part) {
                if !self.absent.touches(whole) {
                    put_behind(&mut ready, Came { run: whole, asked: self.asked.touches(whole) });
                    self.asked.remove(whole);
                }
            }
        }
        ready
    }

    /// The far end waits for `run`: returns what of it is to be requested from the source, in runs of whole host pages.
    /// `None` if all of it is here.
    pub(in crate::session) fn ask(&mut self, run: PageRun) -> Option<Vec<PageRun>> {
        let (mut is_missing, mut due) = (false, Vec::<PageRun>::new());
        for whole in self.host_pages_of(run) {
            if !self.absent.touches(whole) {
                continue;
            }
            is_missing = true;
            if self.asked.touches(whole) {
                continue;
            }
            self.asked.add(whole);
            match due.last_mut().filter(|last| last.end() == whole.first && last.pages < LONGEST_REQUEST) {
                Some(last) => last.pages += whole.pages,
                None => due.push(whole),
            }
        }
        is_missing.then_some(due)
    }

    /// Target pages of a host page of `run`.
    fn host_page(&self, run: PageRun) -> u64 {
        self.host_pages.get(run.block.as_usize()).copied().unwrap_or(1)
    }

    /// The host pages that `run` touches.
    fn host_pages_of(&self, run: PageRun) -> impl Iterator<Item = PageRun> + use<> {
        let host = self.host_page(run);
        let (first, end) = (run.first.0 / host * host, run.end().0);
        let starts = (first..end).step_by(usize::try_from(host).unwrap_or(usize::MAX));
        starts.map(move |start| PageRun { first: PageIndex(start), pages: host, ..run })
    }
}

/// Neighbours are one run: what a far end asks for page by page, or all at once, takes no more memory than its runs.
fn put_behind(ready: &mut Vec<Came>, came: Came) {
    let last = ready.last_mut().filter(|last| last.asked == came.asked && last.run.end() == came.run.first);
    match last.filter(|last| last.run.block == came.run.block) {
        Some(last) => last.run.pages += came.run.pages,
        None => ready.push(came),
    }
}

/// The runs of `set` inside `run`.
fn within(set: &PageSet, run: PageRun) -> Vec<PageRun> {
    let (mut found, mut from) = (Vec::new(), run.first);
    while let Some(next) = set.block(run.block).and_then(|pages| pages.next_run(from, u64::MAX))
        && next.start < run.end().0
    {
        let end = next.end.min(run.end().0);
        found.push(PageRun { first: PageIndex(next.start), pages: end - next.start, ..run });
        from = PageIndex(end);
    }
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::{BlockName, RamBlock};
    use crate::units::{BlockIndex, PageSize};

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { block: BlockIndex(0), first: PageIndex(first), pages }
    }

    /// A block of 2048 pages, of which `absent` are not here.
    fn owed(host_page: PageSize, absent: &[PageRun]) -> Owed {
        let mut block = RamBlock::new(BlockName::new("ram").unwrap(), 2048 * 4096);
        block.host_page = host_page;
        let table = RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap();
        let mut set = PageSet::new(&table);
        absent.iter().for_each(|run| _ = set.add(*run));
        Owed::new(&table, set)
    }

    #[test]
    fn a_page_is_sent_on_once_after_it_has_come_again() {
        let mut owed = owed(PageSize::SIZE_4K, &[run(10, 5), run(20, 2)]);
        assert_eq!(owed.came(run(0, 10)), [], "they were here");
        let came = |first, pages, asked| Came { run: run(first, pages), asked };
        assert_eq!(owed.came(run(8, 13)), [came(10, 5, false), came(20, 1, false)]);
        assert_eq!(owed.came(run(8, 13)), [], "they are here by now");
        assert_eq!(owed.left(), 1);
        assert_eq!(owed.came(run(21, 1)), [came(21, 1, false)]);
        assert_eq!(owed.left(), 0);
    }

    #[test]
    fn what_is_not_here_is_asked_for_once_and_what_is_here_is_not() {
        let mut owed = owed(PageSize::SIZE_4K, &[run(10, 2)]);
        assert_eq!(owed.ask(run(9, 1)), None);
        assert_eq!(owed.ask(run(9, 2)), Some(vec![run(10, 1)]));
        assert_eq!(owed.ask(run(10, 2)), Some(vec![run(11, 1)]));
        assert_eq!(owed.ask(run(10, 2)), Some(vec![]));
        assert_eq!(owed.came(run(10, 2)), [Came { run: run(10, 2), asked: true }]);
        assert_eq!(owed.ask(run(10, 2)), None);
    }

    #[test]
    fn a_far_end_that_asks_for_everything_takes_the_memory_of_a_few_runs() {
        let mut all = owed(PageSize::SIZE_4K, &[run(0, 1000), run(1001, 1047)]);
        let runs = [run(0, 1000), run(1001, 1047)];
        assert_eq!(all.ask(run(0, 2048)), Some(runs.to_vec()));
        assert_eq!(all.ask(run(0, 2048)), Some(vec![]));
        assert_eq!(all.came(run(0, 2048)), runs.map(|run| Came { run, asked: true }));
        // A request is no longer than its length can tell.
        let mut block = RamBlock::new(BlockName::new("ram").unwrap(), 3 * 4096 * LONGEST_REQUEST);
        block.host_page = PageSize::SIZE_4K;
        let table = RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap();
        let mut set = PageSet::new(&table);
        set.add(run(0, 3 * LONGEST_REQUEST));
        let due = Owed::new(&table, set).ask(run(0, 3 * LONGEST_REQUEST)).unwrap();
        assert_eq!(due, [0, 1, 2].map(|part| run(part * LONGEST_REQUEST, LONGEST_REQUEST)));
    }

    #[test]
    fn a_huge_page_is_sent_on_and_asked_for_whole() {
        let mut owed = owed(PageSize::SIZE_2M, &[run(512, 1024)]);
        assert_eq!(owed.ask(run(600, 1)), Some(vec![run(512, 512)]));
        assert_eq!(owed.came(run(512, 511)), []);
        assert_eq!(owed.ask(run(700, 1)), Some(vec![]), "it is under way");
        assert_eq!(owed.came(run(1023, 2)), [Came { run: run(512, 512), asked: true }]);
        assert_eq!(owed.came(run(1025, 511)), [Came { run: run(1024, 512), asked: false }]);
        assert_eq!(owed.left(), 0);
    }
}
