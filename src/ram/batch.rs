//! A batch of runs for a transport.

use super::PageRun;

/// The form in which a run of pages is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// All bytes are zero; the bytes are not sent.
    Zero,
    /// Every byte travels.
    Whole,
    /// Not scanned: the transport detects zero pages.
    Unknown,
}

/// A run with its verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The pages.
    pub run: PageRun,
    /// What they travel as.
    pub verdict: Verdict,
}

/// Runs that are sent together. A batch is moved, never copied, so that a page has one owner at a time.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PageBatch {
    pieces: Vec<Piece>,
    pages: u64,
    whole_pages: u64,
}

impl PageBatch {
    /// An empty batch with room for `pieces` runs before it allocates.
    pub fn with_capacity(pieces: usize) -> Self {
        Self { pieces: Vec::with_capacity(pieces), pages: 0, whole_pages: 0 }
    }

    /// Adds a run; one that continues the last piece with the same verdict grows it.
    pub fn push(&mut self, run: PageRun, verdict: Verdict) {
        self.pages += run.pages;
        if verdict != Verdict::Zero {
            self.whole_pages += run.pages;
        }
        if let Some(last) = self.pieces.last_mut()
            && last.verdict == verdict
            && last.run.block == run.block
            && last.run.end() == run.first
        {
            last.run.pages += run.pages;
            return;
        }
        self.pieces.push(Piece { run, verdict });
    }

    /// The runs in the order they were found.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Pages in all.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages whose bytes are sent, or may be.
    pub fn whole_pages(&self) -> u64 {
        self.whole_pages
    }

    /// Pages known to be zero.
    pub fn zero_pages(&self) -> u64 {
        self.pages - self.whole_pages
    }

    /// True without pages.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Removes the runs and keeps the allocated room.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.pages = 0;
        self.whole_pages = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{BlockIndex, PageIndex};

    #[test]
    fn neighbours_with_one_verdict_become_one_piece() {
        let run = |first, pages| PageRun { block: BlockIndex(0), first: PageIndex(first), pages };
        let mut batch = PageBatch::default();
        batch.push(run(0, 2), Verdict::Whole);
        batch.push(run(2, 1), Verdict::Whole);
        batch.push(run(3, 1), Verdict::Zero);
        batch.push(run(5, 1), Verdict::Zero);
        assert_eq!(batch.pieces().len(), 3);
        assert_eq!((batch.pages(), batch.whole_pages(), batch.zero_pages()), (5, 3, 2));
        batch.clear();
        assert!(batch.is_empty() && batch.pages() == 0);
    }
}
