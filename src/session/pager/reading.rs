//! The threads of a memory that is filled while it is used: those that serve its faults, and those that read the rest.

use std::collections::VecDeque;
use std::time::Duration;

use rustix::event::PollFlags;

use super::{Filling, PlaceError, State};
use crate::engine::{FaultAnswer, Waiter};
use crate::ram::PageRun;
use crate::sys::{PageContents, Stop};
use crate::transport::{PageReads, PageSpan};
use crate::units::{BlockIndex, BlockOffset, PageIndex, PageSize};

/// What threads that wait for something else are told.
pub(in crate::session) enum News {
    /// All missing pages behind the key of this number are placed.
    Whole(u32),
    /// A thread waits for this page, which can't be read yet.
    Wanted(PageRun),
}

impl Filling {
    /// Serves faults until the end.
    pub(in crate::session) fn serve_faults(&self) {
        let stop = Stop::on(&self.over);
        while let Ok(None) = stop.wait(self.memory.descriptor(), PollFlags::IN) {
            self.supply
                .read_all(true, &mut Reading { filling: self, is_urgent: true, pieces: VecDeque::new() });
            if self.supply.is_gone() {
                return self.end();
            }
        }
    }

    /// Reads pages that no thread waits for, until all pages are placed or the end.
    pub(in crate::session) fn read_rest(&self) {
        loop {
            let mut state = self.state();
            let run = loop {
                if state.is_over || state.fill.is_whole() {
                    return;
                }
                let now = self.began.elapsed();
                match state.next_run(now, self.page) {
                    Some(run) => break run,
                    None => {
                        let delay = state.pace.delay(now);
                        state = self.changed_within(state, delay);
                    }
                }
            };
            drop(state);
            let pieces = VecDeque::from([run]);
            self.supply.read_all(false, &mut Reading { filling: self, is_urgent: false, pieces });
            if self.supply.is_gone() {
                return self.end();
            }
        }
    }

    /// Waits for news; `None` once no page is read here any more.
    pub(in crate::session) fn next_news(&self) -> Option<News> {
        let mut state = self.state();
        loop {
            if let Some(number) = state.keys.next_whole() {
                return Some(News::Whole(number));
            }
            if let Some(page) = state.fill.next_wanted() {
                return Some(News::Wanted(page));
            }
            // The last page is in place before the read that brought it has ended.
            if state.is_over || state.fill.is_whole() && !state.keys.has_open() {
                return None;
            }
            state = self.changed(state);
        }
    }

    fn span_of(&self, run: PageRun) -> PageSpan {
        PageSpan {
            block: run.block,
            offset: run.offset(self.page).map_or(u64::MAX, |offset| offset.0),
            len: run.bytes(self.page).unwrap_or(0),
        }
    }

    fn run_of(&self, span: PageSpan) -> PageRun {
        let first = self.page.page_of(BlockOffset(span.offset));
        PageRun { block: span.block, first, pages: span.len / self.page.bytes() }
    }

    /// The page of a fault, if it is to be read now.
    fn page_to_read(&self, page: PageRun, who: Waiter) -> Option<PageRun> {
        let now = self.began.elapsed();
        let mut state = self.state();
        if let Some(vcpus) = self.memory.changed_vcpus() {
            state.fill.know(now, vcpus);
        }
        let answer = state.fill.fault(now, page, who, || self.memory.is_received(page));
        if answer == FaultAnswer::Ask {
            state.keys.reading(page);
        }
        drop(state);
        match answer {
            FaultAnswer::Ask => return Some(page),
            FaultAnswer::Wait => self.changed.notify_all(),
            FaultAnswer::Received => {
                if let Err(error) = self.memory.answer_received(page) {
                    self.failed(page, error);
                }
            }
        }
        None
    }

    /// The faults could not be read.
    fn faults_failed(&self, error: PlaceError) {
        if let PlaceError::Failed(why) = error {
            let first = PageRun { block: BlockIndex(0), first: PageIndex(0), pages: 1 };
            let why = format!("reading the faults of missing pages: {why}");
            self.failed(first, PlaceError::Failed(why));
        }
        self.end();
    }
}

impl State {
    /// The next run that no thread waits for, once it may be read. It is taken to be read.
    fn next_run(&mut self, now: Duration, page: PageSize) -> Option<PageRun> {
        if self.pace.delay(now) > Duration::ZERO {
            return None;
        }
        let run = self.fill.next_run()?;
        self.pace.charge(now, run.bytes(page).unwrap_or(0));
        self.keys.reading(run);
        Some(run)
    }
}

/// What a thread reads.
struct Reading<'a> {
    filling: &'a Filling,
    is_urgent: bool,
    /// To be read first: parts of what could not be read at once.
    pieces: VecDeque<PageRun>,
}

impl Reading<'_> {
    fn next_run(&mut self) -> Option<PageRun> {
        if let Some(run) = self.pieces.pop_front() {
            return Some(run);
        }
        if !self.is_urgent {
            let (mut state, now) = (self.filling.state(), self.filling.began.elapsed());
            return if state.is_over { None } else { state.next_run(now, self.filling.page) };
        }
        loop {
            match self.filling.memory.next_fault() {
                Ok(None) => return None,
                Ok(Some((page, who))) => {
                    if let Some(run) = self.filling.page_to_read(page, who) {
                        return Some(run);
                    }
                }
                Err(error) => {
                    self.filling.faults_failed(error);
                    return None;
                }
            }
        }
    }
}

impl PageReads for Reading<'_> {
    fn next(&mut self) -> Option<PageSpan> {
        self.next_run().map(|run| self.filling.span_of(run))
    }

    /// If a part of a run can't be read, the rest is.
    fn ended(&mut self, span: PageSpan, contents: std::io::Result<PageContents<'_>>) {
        let (filling, run) = (self.filling, self.filling.run_of(span));
        let host = filling.memory.host_page(run.block).bytes() / filling.page.bytes();
        match contents {
            Ok(contents) => {
                if filling.state().fill.ended(run, true) {
                    filling.place(run, host, contents);
                }
            }
            Err(_) if run.pages > host && !filling.supply.is_gone() => {
                let mut rest = Some(run);
                while let Some(run) = rest {
                    let (page, behind) = run.split_at(host);
                    filling.state().keys.reading(page);
                    self.pieces.push_back(page);
                    rest = behind;
                }
            }
            Err(_) if filling.supply.is_gone() => _ = filling.state().fill.ended(run, false),
            Err(error) => filling.failed(run, PlaceError::Failed(error.to_string())),
        }
        let mut state = filling.state();
        state.keys.ended(run);
        if state.keys.has_whole() {
            filling.changed.notify_all();
        }
    }
}
