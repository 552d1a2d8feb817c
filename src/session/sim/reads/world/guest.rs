//! Threads of the guest that touch pages.

use super::*;

impl World {
    pub(super) fn step_guest(&mut self) {
        let thread = self.rng.below(THREADS as u64) as usize;
        if self.threads[thread].is_some() {
            return;
        }
        let block = self.rng.below(self.right.len() as u64) as u32;
        let page = self.rng.below(self.right[block as usize].len() as u64);
        match self.to[block as usize][page as usize] {
            Some(value) => {
                let right = value == self.right[block as usize][page as usize];
                self.findings.must(right, "a page has other contents");
            }
            None => {
                self.threads[thread] = Some((block, page));
                self.faults.push_back((block, page));
            }
        }
    }

    pub(super) fn host_page(&self, (block, page): Page) -> PageRun {
        PageRun { block: BlockIndex(block), first: PageIndex(page / self.host * self.host), pages: self.host }
    }

    pub(super) fn is_here(&self, run: PageRun) -> bool {
        (run.first.0..run.end().0).all(|page| self.to[run.block.as_usize()][page as usize].is_some())
    }

    pub(super) fn has_key(&self, run: PageRun) -> bool {
        self.granted.iter().any(|number| {
            self.live
                .get(number)
                .is_some_and(|key| key.block == run.block && key.first <= run.first && run.end() <= key.end())
        })
    }
}
