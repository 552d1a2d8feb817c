//! Both ends of one migration after its switch, and what must hold.

mod guest;
mod loss;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::super::findings::Findings;
use super::super::plan::Rng;
use super::Orders;
use crate::engine::{
    BlockToFill, FaultAnswer, Fill, HostPage, KeyBreakage, Pager, PulledKeys, ServedKeys, Waiter,
};
use crate::ram::{BlockName, ClearShift, DirtyMap, PageBitmap, PageRun, RamBlock, RamBlockTable};
use crate::units::{BlockIndex, PageIndex, PageSize};

const PAGE: u64 = 4096;
/// Bytes behind a key, those of a READ that no thread waits for.
const SPAN: u64 = 1 << 20;
/// READs under way that no thread waits for, and those that threads wait for.
const REST: usize = 3;
const URGENT: usize = 4;
/// Steps after which nothing moves any more.
const STEPS: u64 = 40_000;
const THREADS: usize = 3;

type Page = (u32, u64);

/// A message.
#[derive(Clone, Copy, Debug)]
enum Message {
    Key(u32, PageRun),
    End,
    Whole(u32),
    Wanted(PageRun),
}

/// A READ under way.
#[derive(Clone, Copy, Debug)]
struct Read {
    run: PageRun,
    urgent: bool,
}

pub(super) struct World {
    pub(super) findings: Findings,
    rng: Rng,
    orders: Orders,
    table: RamBlockTable,
    host: u64,
    /// The source: contents, `None` once given back; keys that live, by number.
    from: Vec<Vec<Option<u64>>>,
    served: ServedKeys,
    live: BTreeMap<u32, PageRun>,
    gives_back: bool,
    ended: bool,
    /// The destination: contents of pages that are placed.
    to: Vec<Vec<Option<u64>>>,
    /// Contents at the switch.
    right: Vec<Vec<u64>>,
    fill: Fill,
    keys: PulledKeys,
    granted: BTreeSet<u32>,
    under_way: Vec<Read>,
    /// Threads of the guest: the page that each waits for.
    threads: [Option<Page>; THREADS],
    faults: VecDeque<Page>,
    came: bool,
    /// Messages under way to the destination, and to the source.
    there: VecDeque<Message>,
    back: VecDeque<Message>,
    /// The connection is lost at this step; the source is stopped from the second on.
    lost_at: Option<u64>,
    stopped_at: Option<u64>,
    lost: bool,
    now: u64,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "step {}, lost at {:?}, stopped at {:?}, under way {:?}, threads {:?}, {:?}",
            self.now,
            self.lost_at,
            self.stopped_at,
            self.under_way,
            self.threads,
            self.fill.counts()
        )
    }
}

impl World {
    pub(super) fn new(mut rng: Rng, orders: Orders) -> Self {
        let host = rng.pick(&[1, 1, 4]);
        let blocks = (0..1 + rng.below(2)).map(|number| {
            let name = BlockName::new(&format!("block{number}")).unwrap();
            let mut block = RamBlock::new(name, PAGE * host * (1 + rng.below(900 / host)));
            block.host_page = PageSize::from_bytes(host * PAGE).unwrap();
            block
        });
        let table = RamBlockTable::new(PageSize::SIZE_4K, blocks.collect()).unwrap();
        let mut dirty = DirtyMap::new(&table, ClearShift::default());
        for (index, block) in (0..).map(BlockIndex).zip(table.blocks()) {
            let pages = table.pages_of(block);
            for _ in 0..1 + rng.below(6) {
                let first = rng.below(pages);
                let run =
                    PageRun { block: index, first: PageIndex(first), pages: 1 + rng.below(pages - first) };
                dirty.set_run(run);
            }
            dirty.widen(index, host);
        }
        let right: Vec<Vec<u64>> = table
            .blocks()
            .iter()
            .map(|block| (0..table.pages_of(block)).map(|_| rng.next()).collect())
            .collect();
        let missing = |block: u32, page: u64| {
            dirty.block(BlockIndex(block)).is_some_and(|map| map.get(PageIndex(page)))
        };
        let to = (0..)
            .zip(&right)
            .map(|(block, pages)| {
                (0..).zip(pages).map(|(page, value)| (!missing(block, page)).then_some(*value)).collect()
            })
            .collect();
        let to_fill = (0..).map(BlockIndex).zip(table.blocks()).map(|(index, block)| BlockToFill {
            present: dirty.block(index).cloned().unwrap_or_else(|| PageBitmap::new(table.pages_of(block))),
            host_page: block.host_page,
        });
        let mut fill = Fill::new(table.page(), to_fill.collect()).withheld();
        fill.open();
        fill.break_order(orders.fill);
        let mut served = ServedKeys::in_spans_of(SPAN, &table, &dirty);
        served.break_order(orders.keys);
        let mut keys = PulledKeys::default();
        keys.break_order(orders.keys);
        let lost_at = rng.one_in(3).then(|| rng.below(400));
        let stopped_at = rng.one_in(4).then(|| rng.below(60));
        Self {
            findings: Findings::default(),
            gives_back: rng.one_in(2),
            from: right.iter().map(|pages| pages.iter().copied().map(Some).collect()).collect(),
            to,
            right,
            table,
            host,
            served,
            live: BTreeMap::new(),
            ended: false,
            fill,
            keys,
            granted: BTreeSet::new(),
            under_way: Vec::new(),
            threads: [None; THREADS],
            faults: VecDeque::new(),
            came: false,
            there: VecDeque::new(),
            back: VecDeque::new(),
            lost_at,
            stopped_at,
            lost: false,
            now: 0,
            rng,
            orders,
        }
    }

    pub(super) fn run(&mut self) {
        if self.host > 1 {
            self.findings.saw("host pages of several pages");
        }
        while !self.came && !self.lost && self.now < STEPS {
            self.now += 1;
            if self.lost_at == Some(self.now) {
                self.lose();
                break;
            }
            match self.rng.below(8) {
                0 | 1 => self.step_source(),
                2 => self.step_guest(),
                3 => self.take_fault(),
                4 => self.read_rest(),
                5 | 6 => self.end_read(),
                _ => self.pass_message(),
            }
        }
        self.check_end();
    }

    // --- source -----------------------------------------------------------------------------------------------------

    fn step_source(&mut self) {
        if self.stopped_at.is_some_and(|at| self.now >= at) && self.now < STEPS / 2 {
            return;
        }
        match self.rng.below(3) {
            0 => {
                let Some((number, run)) = self.served.next_grant() else { return };
                if !self.live.is_empty() && self.rng.one_in(6) {
                    self.findings.saw("a key can't be made before another is revoked");
                    self.served.put_off(number);
                } else {
                    self.live.insert(number, run);
                    self.served.granted(number);
                    self.there.push_back(Message::Key(number, run));
                }
            }
            1 => {
                if let Some((number, _)) = self.served.next_revocation() {
                    self.live.remove(&number);
                    self.served.revoked(number);
                }
            }
            _ if self.gives_back => self.give_back(),
            _ => {}
        }
        if self.served.pages_left() == 0 && !self.ended {
            self.ended = true;
            self.there.push_back(Message::End);
        }
    }

    fn give_back(&mut self) {
        let runs: Vec<PageRun> = self.served.may_be_given_back().collect();
        for run in runs {
            let lives = self
                .live
                .values()
                .any(|live| live.block == run.block && live.first < run.end() && run.first < live.end());
            self.findings.must(!lives, "memory is given back while its key lives");
            if !self.fill.is_whole() {
                self.findings.saw("memory is given back while pages are missing");
            }
            for page in run.first.0..run.end().0 {
                self.from[run.block.as_usize()][page as usize] = None;
            }
        }
    }

    // --- messages ---------------------------------------------------------------------------------------------------

    fn pass_message(&mut self) {
        if self.rng.one_in(2) {
            match self.there.pop_front() {
                Some(Message::Key(number, run)) => self.take_key(number, run),
                Some(Message::End) => {
                    let whole = self.missing_here() == 0;
                    self.findings.must(whole, "the end comes before all pages are placed");
                    self.came = true;
                }
                _ => {}
            }
            return;
        }
        if self.stopped_at.is_some_and(|at| self.now >= at) && self.now < STEPS / 2 {
            return;
        }
        match self.back.pop_front() {
            Some(Message::Whole(number)) => {
                let known = self.served.received(number);
                self.findings.must(known, "a span is reported that has no key");
            }
            Some(Message::Wanted(page)) => {
                self.served.want(page);
                self.findings.saw("its key is granted before others");
            }
            _ => {}
        }
    }

    fn take_key(&mut self, number: u32, run: PageRun) {
        self.findings.must(self.keys.may_add(number, run), "a key clashes with another");
        let missing = self.fill.grant(run);
        self.keys.add(number, run, missing);
        self.granted.insert(number);
    }

    // --- destination ------------------------------------------------------------------------------------------------

    fn take_fault(&mut self) {
        let urgent = self.under_way.iter().filter(|read| read.urgent).count();
        let Some(&page) = self.faults.front().filter(|_| urgent < URGENT) else { return };
        self.faults.pop_front();
        let (page, now) = (self.host_page(page), Duration::from_micros(self.now));
        let here = self.is_here(page);
        match self.fill.fault(now, page, Waiter::default(), || here) {
            FaultAnswer::Ask => {
                if self.under_way.iter().any(|read| overlaps(read.run, page)) {
                    self.findings.saw("a page is read for a thread while it is read with others");
                }
                self.begin(Read { run: page, urgent: true });
            }
            FaultAnswer::Wait => {}
            FaultAnswer::Received => self.wake(page),
        }
        while let Some(wanted) = self.fill.next_wanted() {
            self.findings.saw("a thread waits for a page whose key has not come");
            self.back.push_back(Message::Wanted(wanted));
        }
    }

    fn begin(&mut self, read: Read) {
        let twice =
            self.under_way.iter().any(|other| other.urgent == read.urgent && overlaps(other.run, read.run));
        self.findings.must(!twice, "a page is read twice");
        self.findings.must(
            self.has_key(read.run)
                || self.orders.keys == KeyBreakage::RevokeEarly
                || self.is_here(read.run)
                || self.orders.keys == KeyBreakage::ReportEarly,
            "a page is read without a key",
        );
        self.keys.reading(read.run);
        self.under_way.push(read);
    }

    fn read_rest(&mut self) {
        if self.under_way.iter().filter(|read| !read.urgent).count() >= REST {
            return;
        }
        // Those that have waited for their key, and that nobody reads.
        let waiting: Vec<PageRun> = self
            .threads
            .iter()
            .flatten()
            .filter(|page| !self.faults.contains(page))
            .map(|page| self.host_page(*page))
            .filter(|page| {
                self.has_key(*page) && !self.under_way.iter().any(|read| overlaps(read.run, *page))
            })
            .collect();
        let Some(run) = self.fill.next_run() else { return };
        // Two threads may wait for one page, and the fault of only one have been taken.
        let is_waited_for =
            |run| self.threads.iter().flatten().any(|page| overlaps(self.host_page(*page), run));
        let first = waiting.is_empty() || is_waited_for(run);
        self.findings.must(first, "a page that a thread waits for is read behind others");
        self.begin(Read { run, urgent: false });
    }

    /// A READ ends: those of one queue pair in their order.
    fn end_read(&mut self) {
        let urgent = self.rng.one_in(2);
        let Some(at) = self.under_way.iter().position(|read| read.urgent == urgent) else { return };
        let read = self.under_way.remove(at);
        let bytes = self.device_reads(read.run);
        self.findings.must(bytes.is_some(), "a READ fails although nothing is lost");
        match bytes {
            Some(bytes) => self.ended(read.run, true, &bytes),
            None => self.ended(read.run, false, &vec![0; read.run.pages as usize]),
        }
        if self.stopped_at.is_some_and(|at| self.now > at) {
            self.findings.saw("the source is stopped, and the destination goes on");
        }
    }

    /// What the source's device answers.
    fn device_reads(&mut self, run: PageRun) -> Option<Vec<u64>> {
        if !self.has_key(run) {
            return None;
        }
        let memory = &self.from[run.block.as_usize()][run.first.0 as usize..run.end().0 as usize];
        let whole = memory.iter().all(Option::is_some);
        self.findings.must(whole, "memory is read that was given back");
        Some(memory.iter().map(|value| value.unwrap_or(0)).collect())
    }

    fn ended(&mut self, run: PageRun, is_read: bool, bytes: &[u64]) {
        if self.fill.ended(run, is_read) {
            self.place(run, bytes);
        }
        self.keys.ended(run);
        while let Some(number) = self.keys.next_whole() {
            if !self.fill.is_whole() {
                self.findings.saw("a span is whole while others are read");
            }
            self.back.push_back(Message::Whole(number));
        }
    }

    fn place(&mut self, run: PageRun, bytes: &[u64]) {
        for (page, value) in (run.first.0..).zip(bytes) {
            // A page that is there is left as it is.
            self.to[run.block.as_usize()][page as usize].get_or_insert(*value);
        }
        let fresh = self.fill.placed(Duration::from_micros(self.now), run);
        self.keys.placed(run, fresh);
        for page in (run.first.0..run.end().0).step_by(self.host as usize) {
            self.wake(PageRun { first: PageIndex(page), pages: self.host, ..run });
        }
    }

    fn wake(&mut self, page: PageRun) {
        for thread in &mut self.threads {
            if thread.is_some_and(|(block, at)| {
                block == page.block.0 && (page.first.0..page.end().0).contains(&at)
            }) {
                *thread = None;
            }
        }
    }

    // --- the end ----------------------------------------------------------------------------------------------------

    fn missing_here(&self) -> usize {
        self.to.iter().flatten().filter(|page| page.is_none()).count()
    }

    fn check_end(&mut self) {
        self.findings.must(self.came || self.lost, "does not end");
        for block in 0..self.right.len() {
            for page in 0..self.right[block].len() {
                let (here, right) = (self.to[block][page], self.right[block][page]);
                self.findings.must(here.is_none_or(|value| value == right), "a page has other contents");
                let somewhere = here.is_some() || self.from[block][page].is_some();
                self.findings.must(somewhere, "a page is at neither side");
            }
        }
        if self.came {
            self.findings.saw("all pages are read");
            self.findings.must(!self.served.has_keys_out(), "the source ends with keys out");
            self.findings.must(self.live.is_empty(), "memory is let go while a key lives");
        }
        let _ = &self.table;
    }
}

fn overlaps(one: PageRun, other: PageRun) -> bool {
    one.block == other.block && one.first < other.end() && other.first < one.end()
}
