#![allow(clippy::unwrap_used)]
use super::*;

const PAGE: PageSize = PageSize::SIZE_4K;

fn block(pages: u64, present: &[(u64, u64)], host: u64) -> BlockToFill {
    let mut map = PageBitmap::new(pages);
    present.iter().for_each(|(start, end)| _ = map.set_range(*start..*end));
    BlockToFill { present: map, host_page: PageSize::from_bytes(host * 4096).unwrap() }
}

fn run(block: u32, first: u64, pages: u64) -> PageRun {
    PageRun { block: BlockIndex(block), first: PageIndex(first), pages }
}

fn at(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

#[test]
fn what_is_waited_for_comes_first_then_what_lies_behind_it_then_the_rest() {
    let mut fill = Fill::new(PAGE, vec![block(1000, &[(0, 1000)], 1), block(10, &[(3, 4), (8, 10)], 1)]);
    assert_eq!(fill.next_run(), None, "the rest is not to be read yet");
    fill.open();
    assert_eq!(fill.next_run(), Some(run(0, 0, 256)), "a large read");
    assert_eq!(fill.fault(at(1), run(0, 600, 1), Waiter::default(), || false), FaultAnswer::Ask);
    assert_eq!(fill.fault(at(2), run(0, 600, 1), Waiter::default(), || false), FaultAnswer::Wait);
    assert_eq!(fill.next_run(), Some(run(0, 601, 256)), "behind the fault");
    assert_eq!(
        fill.fault(at(3), run(0, 700, 1), Waiter::default(), || false),
        FaultAnswer::Ask,
        "which is not there yet"
    );
    assert_eq!(fill.next_run(), Some(run(0, 857, 143)), "what another has is not read twice");
    assert_eq!(fill.next_run(), Some(run(0, 256, 256)));
    assert_eq!(fill.next_run(), Some(run(0, 512, 88)), "without the page that was waited for");
    assert_eq!((fill.next_run(), fill.next_run()), (Some(run(1, 3, 1)), Some(run(1, 8, 2))));
    assert_eq!(fill.next_run(), None);
    assert!(!fill.is_whole() && !fill.is_stuck());
    for run in [run(0, 0, 600), run(0, 601, 399), run(1, 3, 1), run(1, 8, 2)] {
        fill.placed(at(9), run);
    }
    assert!(!fill.is_whole(), "page 600");
    fill.placed(at(9), run(0, 600, 1));
    assert!(fill.is_whole());
    assert_eq!(fill.fault(at(10), run(0, 5, 1), Waiter::default(), || true), FaultAnswer::Received);
    assert_eq!((fill.counts().faults, fill.counts().urgent, fill.latency().summary().count), (4, 2, 2));
}

#[test]
fn what_was_touched_the_last_time_is_read_in_that_order_before_the_rest() {
    let mut fill = Fill::new(PAGE, vec![block(100, &[(0, 60)], 1)]);
    fill.read_first(vec![run(0, 40, 2), run(0, 7, 1), run(0, 58, 40), run(9, 0, 1)]);
    assert_eq!(fill.next_run(), Some(run(0, 40, 2)));
    fill.fault(at(1), run(0, 7, 1), Waiter::default(), || false);
    assert_eq!(fill.next_run(), Some(run(0, 58, 2)), "page 7 is read already, and there are no more than 60");
    assert_eq!(fill.next_run(), None);
    fill.fault(at(1), run(0, 30, 1), Waiter::default(), || false);
    fill.fault(at(1), run(0, 31, 1), Waiter::default(), || false);
    let touched = [run(0, 40, 2), run(0, 7, 1), run(0, 58, 40), run(9, 0, 1), run(0, 7, 1), run(0, 30, 2)];
    assert_eq!(fill.touched(), touched);
}

#[test]
fn huge_pages_are_read_whole_where_a_part_of_them_is_there() {
    let mut fill = Fill::new(PAGE, vec![block(4096, &[(5, 6), (1030, 1031)], 512)]);
    fill.open();
    fill.read_first(vec![run(0, 1100, 1)]);
    assert_eq!(
        (fill.next_run(), fill.next_run(), fill.next_run()),
        (Some(run(0, 1024, 512)), Some(run(0, 0, 512)), None)
    );
    fill.failed(run(0, 0, 512));
    fill.placed(at(1), run(0, 1024, 512));
    assert!(fill.is_stuck());
    assert_eq!((fill.retry(), fill.next_run()), (512, Some(run(0, 0, 512))));
}

#[test]
fn what_could_not_be_read_is_read_again_when_told_and_what_is_waited_for_first() {
    let mut fill = Fill::new(PAGE, vec![block(600, &[(0, 600)], 1)]);
    fill.open();
    assert_eq!(fill.next_run(), Some(run(0, 0, 256)));
    fill.failed(run(0, 10, 2));
    fill.placed(at(1), run(0, 0, 10));
    fill.placed(at(1), run(0, 12, 244));
    assert_eq!(fill.fault(at(2), run(0, 500, 1), Waiter::default(), || false), FaultAnswer::Ask);
    fill.failed(run(0, 500, 1));
    assert_eq!(
        fill.fault(at(3), run(0, 500, 1), Waiter::default(), || false),
        FaultAnswer::Wait,
        "nobody reads it by itself"
    );
    assert_eq!((fill.next_run(), fill.next_run()), (Some(run(0, 501, 99)), Some(run(0, 256, 244))));
    fill.placed(at(4), run(0, 501, 99));
    assert!(!fill.is_stuck(), "some are under way");
    fill.placed(at(4), run(0, 256, 244));
    assert!(fill.is_stuck() && !fill.is_whole());
    assert_eq!(fill.counts().failed, 3);
    assert_eq!(fill.retry(), 3);
    assert!(!fill.is_stuck());
    assert_eq!((fill.next_run(), fill.next_run()), (Some(run(0, 500, 1)), Some(run(0, 10, 2))));
    // One of them fails again, although another reader has placed it.
    fill.placed(at(5), run(0, 500, 1));
    fill.placed(at(5), run(0, 10, 2));
    fill.failed(run(0, 500, 1));
    assert!(fill.is_whole() && fill.next_run().is_none());
}

/// A guest that runs while its memory is filled: threads touch pages, readers are slow and fail, until all pages are
/// placed.
struct World {
    fill: Fill,
    holds: Vec<bool>,
    placed: Vec<bool>,
    waiting: Vec<bool>,
    /// Runs given to readers, without a result yet.
    reading: Vec<PageRun>,
    given: Vec<u32>,
    broken: bool,
}

impl World {
    fn draw(state: &mut u64, most: u64) -> u64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) % most
    }

    fn new(state: &mut u64, breakage: FillBreakage) -> Self {
        let pages = 1 + Self::draw(state, 40);
        let holds: Vec<bool> = (0..pages).map(|_| Self::draw(state, 4) > 0).collect();
        let mut map = PageBitmap::new(pages);
        (0..pages).filter(|page| holds[*page as usize]).for_each(|page| _ = map.set_range(page..page + 1));
        let mut fill = Fill::new(PAGE, vec![BlockToFill { present: map, host_page: PAGE }]);
        fill.breakage = breakage;
        let none = vec![false; pages as usize];
        let given = vec![0; pages as usize];
        Self { fill, placed: none.clone(), waiting: none, holds, reading: Vec::new(), given, broken: true }
    }

    fn ended(&mut self, run: PageRun, well: bool) {
        if !well {
            return self.fill.failed(run);
        }
        for page in pages(run) {
            (self.placed[page as usize], self.waiting[page as usize]) = (true, false);
        }
        self.fill.placed(at(1), run);
    }

    /// One step; false if an order was violated.
    fn step(&mut self, state: &mut u64) -> bool {
        let any = Self::draw(state, self.holds.len() as u64);
        match Self::draw(state, 10) {
            0..3 => {
                let (there, page) = (self.placed[any as usize] || !self.holds[any as usize], run(0, any, 1));
                match self.fill.fault(at(1), page, Waiter::default(), || there) {
                    FaultAnswer::Received => return there,
                    FaultAnswer::Wait => self.waiting[any as usize] = true,
                    FaultAnswer::Ask => {
                        self.waiting[any as usize] = true;
                        self.reading.push(page);
                    }
                }
            }
            3..6 => {
                if let Some(run) = self.fill.next_run() {
                    for page in pages(run) {
                        self.given[page as usize] += 1;
                        if !self.holds[page as usize] || self.given[page as usize] > 1 {
                            return false;
                        }
                    }
                    self.reading.push(run);
                }
            }
            6..9 if !self.reading.is_empty() => {
                let run = self.reading.swap_remove(Self::draw(state, self.reading.len() as u64) as usize);
                let well = !self.broken || Self::draw(state, 3) > 0;
                self.ended(run, well);
            }
            9 => self.fill.open(),
            _ => {}
        }
        let all = self.holds.iter().zip(&self.placed).all(|(holds, placed)| !holds || *placed);
        // From that moment on faults are not served: a missing page reads as zero.
        !self.fill.is_whole() || all
    }

    /// The disk works again and this is reported: first the pages that threads wait for are read, then all.
    fn mended(&mut self) -> bool {
        for run in std::mem::take(&mut self.reading) {
            self.ended(run, false);
        }
        self.broken = false;
        self.fill.open();
        self.fill.retry();
        let mut first = self.waiting.iter().filter(|waits| **waits).count();
        while let Some(run) = self.fill.next_run() {
            let waited = pages(run).filter(|page| self.waiting[*page as usize]).count();
            if first > 0 && waited == 0 {
                return false;
            }
            first = first.saturating_sub(waited);
            self.ended(run, true);
        }
        self.fill.is_whole() && !self.waiting.contains(&true)
    }
}

fn is_right(seed: u64, breakage: FillBreakage) -> bool {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut world = World::new(&mut state, breakage);
    (0..300).all(|_| world.step(&mut state)) && world.mended()
}

/// In any order of events: no missing page is treated as placed, no page is read by two readers of the rest, and once
/// the disk works again all pages are placed, first those that a thread waits for.
#[test]
fn all_pages_come_whatever_fails_and_each_order_is_needed() {
    for seed in 0..2000 {
        assert!(is_right(seed, FillBreakage::None), "seed {seed}");
    }
    let orders = [
        FillBreakage::WholeWhenRead,
        FillBreakage::ForgetFailed,
        FillBreakage::GiveTwice,
        FillBreakage::ForgetWaiting,
    ];
    for order in orders {
        assert!((0..2000).any(|seed| !is_right(seed, order)), "{order:?} is never found");
    }
}
