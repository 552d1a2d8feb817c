//! A connection that is lost, and the one over which the source sends what is missing.

use super::*;

impl World {
    /// The connection is lost: all READs fail, whatever of their bytes has come.
    pub(super) fn lose(&mut self) {
        self.lost = true;
        let whole = self.missing_here() == 0;
        self.findings.saw(match whole {
            true => "the connection is lost when none is missing",
            false => "the connection is lost while pages are missing",
        });
        for read in std::mem::take(&mut self.under_way) {
            self.findings.saw("a READ fails although part of its bytes has come");
            let mut bytes: Vec<u64> = (read.run.first.0..read.run.end().0)
                .map(|page| self.right[read.run.block.as_usize()][page as usize])
                .collect();
            let come = self.rng.below(bytes.len() as u64) as usize;
            bytes[come..].fill(1);
            self.ended(read.run, false, &bytes);
        }
        self.live.clear();
        // Another connection goes on with what threads wait for.
        let faults: BTreeSet<Page> = std::mem::take(&mut self.faults).into_iter().collect();
        let pager = self.fill.take_pager();
        let outstanding: BTreeSet<Page> =
            pager.outstanding().map(|page| (page.block.0, page.offset / PAGE)).collect();
        for page in self.threads.into_iter().flatten() {
            let host = self.host_page(page);
            let known = outstanding.contains(&(host.block.0, host.first.0)) || faults.contains(&page);
            self.findings.must(known, "a thread waits for a page that nobody asks for");
        }
        if !whole {
            self.faults = faults.into_iter().collect();
            self.go_on(pager);
        }
    }

    /// Another connection: the source has learnt which pages are here, and sends all others, those first that threads wait
    /// for.
    pub(super) fn go_on(&mut self, mut pager: Pager) {
        let is_given_back = self.from.iter().flatten().any(Option::is_none);
        if is_given_back {
            self.findings.saw("memory was given back before the connection was lost");
        }
        let mut asked: VecDeque<PageRun> =
            pager.outstanding().map(|page| self.host_page((page.block.0, page.offset / PAGE))).collect();
        if !asked.is_empty() {
            self.findings.saw("a thread waits for a page from one connection to the next");
        }
        while self.missing_here() > 0 && self.now < STEPS {
            self.now += 1;
            match self.rng.below(4) {
                0 => self.step_guest(),
                1 => {
                    let Some(page) = self.faults.pop_front() else { continue };
                    let (page, now) = (self.host_page(page), Duration::from_micros(self.now));
                    let at = HostPage { block: page.block, offset: page.first.0 * PAGE };
                    match pager.fault(now, at, Waiter::default(), || self.is_here(page)) {
                        FaultAnswer::Ask => asked.push_back(page),
                        FaultAnswer::Wait => {}
                        FaultAnswer::Received => self.wake(page),
                    }
                }
                _ => self.send_page(&mut asked, &mut pager),
            }
        }
        self.findings.must(self.missing_here() == 0, "a page does not come over another connection");
        let waits = self.threads.iter().flatten().any(|page| !self.faults.contains(page));
        self.findings.must(!waits, "a thread waits for a page that is here");
        self.findings.saw("what is missing comes over another connection");
    }

    pub(super) fn send_page(&mut self, asked: &mut VecDeque<PageRun>, pager: &mut Pager) {
        let is_missing = |page: &PageRun| !self.is_here(*page);
        let rest = || {
            let blocks = (0..).zip(&self.to);
            blocks.flat_map(|(block, pages)| (0..).zip(pages).map(move |(page, here)| (block, page, here)))
        };
        let next = asked.pop_front().filter(is_missing).or_else(|| {
            let (block, page, _) = rest().find(|(.., here)| here.is_none())?;
            Some(self.host_page((block, page)))
        });
        let Some(page) = next else { return };
        let memory = &self.from[page.block.as_usize()][page.first.0 as usize..page.end().0 as usize];
        self.findings.must(memory.iter().all(Option::is_some), "memory that was given back is sent");
        let bytes: Vec<u64> = memory.iter().map(|value| value.unwrap_or(0)).collect();
        for (at, value) in (page.first.0..).zip(bytes) {
            self.to[page.block.as_usize()][at as usize].get_or_insert(value);
        }
        let at = HostPage { block: page.block, offset: page.first.0 * PAGE };
        pager.placed(Duration::from_micros(self.now), at);
        self.wake(page);
    }
}
