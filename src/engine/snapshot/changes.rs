//! Which pages a snapshot with a base has to hold, and what the snapshot after it may be taken against.
//!
//! # Orders that hold
//!
//! Changes are logged before the snapshot's moment, and the log is read for the last time while the guest stands still in
//! that moment: what it reports later was written after it. Pages that a snapshot has read from the log and that are in no
//! file, since it failed, are written by the next one. After a log that could not be read there is no base any more: the
//! kernel may have cleared what nobody has seen.

#[cfg(test)]
use super::SnapshotBreakage;
use crate::ram::{PageRun, PageSet};
use crate::units::PageIndex;

/// What is known of the changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Log {
    /// Nothing: it is not on.
    Off,
    On,
    /// A part is lost.
    Lost,
}

/// What the next snapshot may be taken against.
#[derive(Clone, Debug)]
pub enum NextBase {
    /// Nothing: it has to be a whole one.
    Nothing,
    /// The snapshot that has just been taken.
    This,
    /// The base that this one had, with all pages that have changed since.
    Same(PageSet),
}

/// The changes of one snapshot.
#[derive(Debug)]
pub struct ChangedPages {
    log: Log,
    /// With a base: the pages that have changed since.
    since: Option<PageSet>,
    /// Those of them that are to be written already.
    known: PageSet,
    #[cfg(test)]
    breakage: SnapshotBreakage,
}

impl ChangedPages {
    /// All pages are written; changes are logged from [`logged`](Self::logged) on, if at all.
    pub fn of_all() -> Self {
        Self::new(Log::Off, None)
    }

    /// The changes since a base are written: `changed` so far, and what the log reports, which is on.
    pub fn since(changed: PageSet) -> Self {
        Self::new(Log::On, Some(changed))
    }

    fn new(log: Log, since: Option<PageSet>) -> Self {
        Self {
            log,
            since,
            known: PageSet::default(),
            #[cfg(test)]
            breakage: SnapshotBreakage::None,
        }
    }

    #[cfg(test)]
    pub(crate) fn break_order(&mut self, breakage: SnapshotBreakage) {
        self.breakage = breakage;
    }

    /// Only changes are written.
    pub fn has_base(&self) -> bool {
        self.since.is_some()
    }

    /// The log is on.
    pub fn logged(&mut self) {
        if self.log == Log::Off {
            self.log = Log::On;
        }
    }

    /// The log could not be read, or not all of it.
    pub fn lost(&mut self) {
        #[cfg(test)]
        if self.breakage == SnapshotBreakage::TrustLostLog {
            return;
        }
        self.log = Log::Lost;
    }

    /// The log was read, and reported `fresh`. Returns the pages that are to be written and were not returned before; `None`
    /// if all pages are written anyway.
    pub fn read(&mut self, fresh: &PageSet) -> Option<PageSet> {
        let since = self.since.as_mut()?;
        fresh.runs().for_each(|run| _ = since.add(run));
        if self.known.blocks() == 0 {
            self.known = emptied(since);
        }
        let mut new = emptied(since);
        for run in since.runs().flat_map(|run| outside(run, &self.known)) {
            new.add(run);
        }
        new.runs().for_each(|run| _ = self.known.add(run));
        Some(new)
    }

    /// The snapshot is over.
    pub fn end(self, taken: bool) -> NextBase {
        #[cfg(test)]
        if self.breakage == SnapshotBreakage::ForgetFailed && !taken {
            return self.since.map_or(NextBase::Nothing, |since| NextBase::Same(emptied(&since)));
        }
        match (self.log, self.since) {
            (Log::On, _) if taken => NextBase::This,
            (Log::On, Some(since)) => NextBase::Same(since),
            _ => NextBase::Nothing,
        }
    }
}

/// Room for the same pages.
fn emptied(set: &PageSet) -> PageSet {
    let mut empty = set.clone();
    set.runs().for_each(|run| empty.remove(run));
    empty
}

/// The parts of `run` that are not in `known`.
fn outside(run: PageRun, known: &PageSet) -> Vec<PageRun> {
    let (mut parts, mut at) = (Vec::new(), run.first.0);
    let mut part = |from: u64, to: u64| {
        if from < to {
            parts.push(PageRun { first: PageIndex(from), pages: to - from, ..run });
        }
    };
    while let Some(found) = known
        .block(run.block)
        .and_then(|map| map.next_run(PageIndex(at), u64::MAX))
        .filter(|f| f.start < run.end().0)
    {
        part(at, found.start);
        at = found.end;
    }
    part(at, run.end().0);
    parts
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::tests::{run, table};
    use super::*;

    fn set(runs: &[PageRun]) -> PageSet {
        let mut set = PageSet::new(&table(20));
        runs.iter().for_each(|run| _ = set.add(*run));
        set
    }

    fn runs(set: Option<PageSet>) -> Vec<PageRun> {
        set.unwrap().runs().collect()
    }

    #[test]
    fn a_change_is_returned_once_and_kept_for_the_next_snapshot_if_this_one_fails() {
        let mut changes = ChangedPages::since(set(&[run(1, 2)]));
        assert_eq!(runs(changes.read(&set(&[run(8, 1)]))), [run(1, 2), run(8, 1)]);
        assert_eq!(runs(changes.read(&set(&[run(2, 8)]))), [run(3, 5), run(9, 1)]);
        let NextBase::Same(left) = changes.end(false) else { panic!("it keeps its base") };
        assert_eq!(runs(Some(left.clone())), [run(1, 9)]);
        assert!(matches!(ChangedPages::since(left).end(true), NextBase::This));
    }

    #[test]
    fn without_a_log_that_can_be_trusted_there_is_no_base() {
        let mut whole = ChangedPages::of_all();
        assert!(whole.read(&set(&[run(1, 1)])).is_none() && !whole.has_base());
        assert!(matches!(whole.end(true), NextBase::Nothing), "nobody logs the changes");
        let mut tracked = ChangedPages::of_all();
        tracked.logged();
        assert!(matches!(tracked.end(true), NextBase::This));
        for taken in [true, false] {
            let mut changes = ChangedPages::since(set(&[]));
            changes.lost();
            assert!(matches!(changes.end(taken), NextBase::Nothing), "{taken}");
        }
    }
}
