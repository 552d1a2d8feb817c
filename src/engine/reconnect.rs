//! A connection between two ramwires that is lost before the guest runs at the destination: what has to be sent again,
//! and which connection is the next one.
//!
//! ```text
//! source:       pages -> FENCE 1 -> pages -> FENCE 2 -> pages [lost]        RESUME ->
//! destination:  placed   FENCED 1   placed in part      [lost]          <- HOLDS 1, and which pages came since FENCE 1
//! ```
//!
//! # Orders that must hold
//!
//! A page is taken for received only if the destination has reported a fence behind it, or the page itself on the next
//! connection. A page that was sent in more than one round since that fence is sent again in any case: the destination
//! can't tell which of its states it has.
//!
//! A completed RDMA WRITE says that the destination's device has acknowledged the bytes, not that they are in memory: a
//! device that fails behind that may lose them. Only a fence that the destination has read counts. Where nothing but
//! fences tells what has come, a fence is due every [`FENCE_INTERVAL`].
//!
//! A connection is accepted only if its attempt is newer than all before: one that was given up by the source, and
//! arrives late, continues nothing.

use std::collections::VecDeque;
use std::time::Duration;

use crate::ram::{PageRun, PageSet, RamBlockTable};
use crate::stream::native::Resume;
use crate::units::{BlockIndex, PageIndex};

/// Maximum number of rounds that are kept apart. Later ones are merged: each takes a bit a page.
const MAX_ROUNDS: usize = 4;
/// Longest time between two fences while pages travel of which the destination can't tell whether they have come.
const FENCE_INTERVAL: Duration = Duration::from_millis(500);

/// Pages that were sent and that the destination may not have.
#[derive(Debug)]
pub(crate) struct Unconfirmed {
    empty: PageSet,
    /// Pages between two fences; the numbers grow.
    rounds: VecDeque<Fenced>,
    /// Pages since the last fence.
    open: PageSet,
    last_fence: u64,
    /// When it was sent.
    fenced_at: Duration,
    confirmed: u64,
}

/// Pages between two fences.
#[derive(Debug)]
struct Fenced {
    /// The fence in front of them.
    behind: u64,
    /// The fence behind them.
    fence: u64,
    pages: PageSet,
}

/// What is known after a connection was replaced.
#[derive(Debug, Default)]
pub(crate) struct Again {
    /// Pages that are to be sent again.
    pub(crate) missing: PageSet,
    /// Pages that had been sent, and that the destination has: behind no fence that it has read.
    pub(crate) held: PageSet,
}

impl Unconfirmed {
    /// Nothing was sent.
    pub(crate) fn new(table: &RamBlockTable) -> Self {
        let empty = PageSet::new(table);
        Self {
            open: empty.clone(),
            empty,
            rounds: VecDeque::new(),
            last_fence: 0,
            fenced_at: Duration::ZERO,
            confirmed: 0,
        }
    }

    /// These pages are about to be sent.
    pub(crate) fn sent(&mut self, run: PageRun) {
        self.open.add(run);
    }

    /// What was sent of these pages counts as received, although no fence says so. For mutants.
    pub(crate) fn trust(&mut self, run: PageRun) {
        self.open.remove(run);
    }

    /// True if a fence is due where nothing else tells what has come.
    pub(crate) fn is_fence_due(&self, now: Duration) -> bool {
        self.is_any_confirmed() && now.saturating_sub(self.fenced_at) >= FENCE_INTERVAL
    }

    /// A fence is sent now: its number.
    pub(crate) fn fence(&mut self, now: Duration) -> u64 {
        let (behind, fence) = (self.last_fence, self.last_fence + 1);
        (self.last_fence, self.fenced_at) = (fence, now);
        let pages = std::mem::replace(&mut self.open, self.empty.clone());
        let full = self.rounds.len() >= MAX_ROUNDS;
        match self.rounds.back_mut().filter(|_| full) {
            Some(last) => {
                last.fence = fence;
                for run in pages.runs() {
                    last.pages.add(run);
                }
            }
            None => self.rounds.push_back(Fenced { behind, fence, pages }),
        }
        fence
    }

    /// The destination has everything in front of this fence. False if it can't have read it.
    #[must_use = "a peer that confirms what was not sent is wrong"]
    pub(crate) fn confirmed(&mut self, fence: u64) -> bool {
        if fence > self.last_fence {
            return false;
        }
        self.confirmed = self.confirmed.max(fence);
        while self.rounds.front().is_some_and(|round| round.fence <= fence) {
            self.rounds.pop_front();
        }
        true
    }

    /// The number of the last fence that was sent; 0: none was.
    pub(crate) fn last_fence(&self) -> u64 {
        self.last_fence
    }

    /// True once the destination has confirmed a fence: it may wait for another connection.
    pub(crate) fn is_any_confirmed(&self) -> bool {
        self.confirmed > 0
    }

    /// The connection was replaced, and the destination has reported its last fence, as [`confirmed`](Self::confirmed) was told:
    /// what is to be sent again. `received` are the pages that came after that fence. Nothing counts as sent any more.
    pub(crate) fn replaced(&mut self, received: &PageSet) -> Again {
        let mut again = Again { missing: self.empty.clone(), held: self.empty.clone() };
        let open = std::mem::replace(&mut self.open, self.empty.clone());
        let behind = self.rounds.back().map_or(self.last_fence, |round| round.fence);
        let last = Fenced { behind, fence: behind + 1, pages: open };
        let mut rounds = std::mem::take(&mut self.rounds);
        rounds.push_back(last);
        for round in &rounds {
            for run in round.pages.runs() {
                again.missing.add(run);
            }
        }
        // Those of one round can be told apart: each was sent once.
        let apart = |first: &&Fenced| first.behind == self.confirmed && first.fence == first.behind + 1;
        let Some(first) = rounds.front().filter(apart) else { return again };
        let later: Vec<&PageSet> = rounds.iter().skip(1).map(|round| &round.pages).collect();
        for block in (0..first.pages.blocks() as u32).map(BlockIndex) {
            for run in held_runs(block, &first.pages, received, &later) {
                again.missing.remove(run);
                again.held.add(run);
            }
        }
        again
    }
}

/// The pages of `block` in `sent` and `received`, and in none of `later`.
fn held_runs(block: BlockIndex, sent: &PageSet, received: &PageSet, later: &[&PageSet]) -> Vec<PageRun> {
    let words = |set: &PageSet, at: usize| {
        set.block(block).and_then(|pages| pages.words().get(at)).copied().unwrap_or_default()
    };
    let mut runs = Vec::new();
    for at in 0..sent.block(block).map_or(0, |pages| pages.words().len()) {
        let again = later.iter().fold(0, |all, set| all | words(set, at));
        let mut held = words(sent, at) & words(received, at) & !again;
        while held != 0 {
            let first = held.trailing_zeros();
            let pages = (held >> first).trailing_ones();
            runs.push(PageRun {
                block,
                first: PageIndex(at as u64 * 64 + u64::from(first)),
                pages: pages.into(),
            });
            held &= !(u64::MAX >> (64 - pages) << first);
        }
    }
    runs
}

/// What another connection must prove, at the destination.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Agreement {
    /// The migration.
    pub(crate) migration_id: [u8; 16],
    /// Our secret, which only the source was told.
    pub(crate) secret: [u8; 16],
    /// The newest attempt so far.
    pub(crate) attempt: u32,
}

/// Why a connection does not continue the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotAdmitted {
    /// Another migration.
    #[error("it belongs to another migration")]
    Other,
    /// It does not know the secret.
    #[error("it does not prove that it is the source")]
    Unproven,
    /// A newer connection has come.
    #[error("it is older than one that has come")]
    Old,
}

impl Agreement {
    /// Checks the first message of another connection, and remembers the attempt.
    ///
    /// # Errors
    /// [`NotAdmitted`]: the connection is of no use, and nothing has changed.
    pub(crate) fn admit(&mut self, resume: &Resume) -> Result<(), NotAdmitted> {
        if resume.migration_id != self.migration_id {
            return Err(NotAdmitted::Other);
        }
        if !is_equal(&resume.secret, &self.secret) {
            return Err(NotAdmitted::Unproven);
        }
        if resume.attempt <= self.attempt {
            return Err(NotAdmitted::Old);
        }
        self.attempt = resume.attempt;
        Ok(())
    }
}

/// Compares secrets in a time that does not depend on where they differ.
pub(crate) fn is_equal(a: &[u8; 16], b: &[u8; 16]) -> bool {
    a.iter().zip(b).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::{BlockName, RamBlock};
    use crate::stream::native::Purpose;
    use crate::units::PageSize;

    fn table() -> RamBlockTable {
        let block = RamBlock::new(BlockName::new("ram").unwrap(), 64 * 4096);
        RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap()
    }

    fn run(first: u64, pages: u64) -> PageRun {
        PageRun { block: BlockIndex(0), first: PageIndex(first), pages }
    }

    fn set(runs: &[(u64, u64)]) -> PageSet {
        let mut set = PageSet::new(&table());
        for (first, pages) in runs {
            set.add(run(*first, *pages));
        }
        set
    }

    fn pages(set: &PageSet) -> Vec<u64> {
        set.runs().flat_map(PageRun::each).map(|run| run.first.0).collect()
    }

    /// Setup and two rounds, of which the second is not confirmed.
    fn two_rounds() -> Unconfirmed {
        let mut sent = Unconfirmed::new(&table());
        assert_eq!(sent.fence(Duration::ZERO), 1);
        sent.sent(run(0, 10));
        assert_eq!(sent.fence(Duration::ZERO), 2);
        sent.sent(run(5, 2));
        sent.sent(run(20, 1));
        assert!(!sent.is_any_confirmed() && sent.confirmed(2) && sent.is_any_confirmed());
        sent
    }

    #[test]
    fn what_is_behind_the_last_fence_goes_again_but_what_has_come() {
        let again = two_rounds().replaced(&set(&[]));
        assert_eq!((pages(&again.missing), pages(&again.held)), (vec![5, 6, 20], vec![]));
        let again = two_rounds().replaced(&set(&[(6, 1), (30, 3)]));
        assert_eq!((pages(&again.missing), pages(&again.held)), (vec![5, 20], vec![6]));
    }

    #[test]
    fn a_page_that_was_sent_in_two_rounds_goes_again_although_it_has_come() {
        let mut sent = two_rounds();
        sent.fence(Duration::ZERO);
        sent.sent(run(6, 1));
        let again = sent.replaced(&set(&[(5, 1), (6, 1)]));
        assert_eq!((pages(&again.missing), pages(&again.held)), (vec![6, 20], vec![5]));
    }

    #[test]
    fn a_fence_is_due_half_a_second_behind_the_last_once_one_was_confirmed() {
        let mut sent = Unconfirmed::new(&table());
        let at = |ms| Duration::from_millis(ms);
        assert_eq!(sent.fence(at(100)), 1);
        assert!(!sent.is_fence_due(at(900)), "nothing was confirmed");
        assert!(sent.confirmed(1) && !sent.is_fence_due(at(599)) && sent.is_fence_due(at(600)));
        assert_eq!(sent.fence(at(600)), 2);
        assert!(!sent.is_fence_due(at(1099)) && sent.is_fence_due(at(1100)));
    }

    #[test]
    fn what_the_destination_has_read_beyond_the_last_answer_counts() {
        let mut sent = two_rounds();
        sent.fence(Duration::ZERO);
        sent.sent(run(40, 2));
        assert!(sent.confirmed(3));
        let again = sent.replaced(&set(&[(41, 1)]));
        assert_eq!((pages(&again.missing), pages(&again.held)), (vec![40], vec![41]));
        assert!(!sent.confirmed(4), "it was not sent");
        assert_eq!(sent.fence(Duration::ZERO), 4, "numbers go on");
        assert!(pages(&sent.replaced(&set(&[])).missing).is_empty(), "nothing was sent since");
    }

    /// Of rounds that were merged it is not known which of their pages came in which.
    #[test]
    fn of_merged_rounds_all_pages_go_again() {
        let mut sent = two_rounds();
        for round in 0..10 {
            sent.fence(Duration::ZERO);
            sent.sent(run(30 + round, 1));
        }
        let all: Vec<u64> = [5, 6, 20].into_iter().chain(30..40).collect();
        assert_eq!(pages(&sent.replaced(&set(&[])).missing), all);

        let mut sent = two_rounds();
        for round in 0..10 {
            sent.fence(Duration::ZERO);
            sent.sent(run(30 + round, 1));
        }
        assert!(sent.confirmed(7));
        let again = sent.replaced(&set(&[(0, 64)]));
        assert!(pages(&again.held).is_empty() && pages(&again.missing).contains(&39), "{again:?}");
    }

    #[test]
    fn only_the_newest_connection_of_the_source_is_admitted() {
        let mut agreed = Agreement { migration_id: [1; 16], secret: [2; 16], attempt: 0 };
        let resume = Resume { migration_id: [1; 16], secret: [2; 16], attempt: 2, purpose: Purpose::GoOn };
        assert_eq!(agreed.admit(&Resume { migration_id: [3; 16], ..resume }), Err(NotAdmitted::Other));
        assert_eq!(agreed.admit(&Resume { secret: [3; 16], ..resume }), Err(NotAdmitted::Unproven));
        assert_eq!(agreed.admit(&resume), Ok(()));
        for attempt in [0, 1, 2] {
            assert_eq!(agreed.admit(&Resume { attempt, ..resume }), Err(NotAdmitted::Old));
        }
        assert_eq!(agreed.admit(&Resume { attempt: 3, ..resume }), Ok(()));
    }
}
