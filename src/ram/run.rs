//! A run of neighbouring pages in one block.

use crate::units::{BlockIndex, BlockOffset, PageIndex, PageSize};

/// `pages` neighbouring target pages of one block, starting at `first`. Never empty in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// The block the pages belong to.
    pub block: BlockIndex,
    /// The first page.
    pub first: PageIndex,
    /// How many pages.
    pub pages: u64,
}

impl PageRun {
    /// One past the last page.
    pub fn end(self) -> PageIndex {
        PageIndex(self.first.0 + self.pages)
    }

    /// Splits off the first `pages` pages; the rest is `None` if nothing is left.
    pub fn split_at(self, pages: u64) -> (Self, Option<Self>) {
        if pages >= self.pages {
            return (self, None);
        }
        let head = Self { pages, ..self };
        (head, Some(Self { first: head.end(), pages: self.pages - pages, ..self }))
    }

    /// Its pages, each as a run of its own.
    pub fn each(self) -> impl Iterator<Item = Self> {
        (self.first.0..self.end().0).map(move |page| Self { first: PageIndex(page), pages: 1, ..self })
    }

    /// Offset of the first byte; `None` beyond `u64`.
    pub fn offset(self, page: PageSize) -> Option<BlockOffset> {
        page.offset_of(self.first)
    }

    /// Length in bytes; `None` beyond `u64`.
    pub fn bytes(self, page: PageSize) -> Option<u64> {
        self.pages.checked_mul(page.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_splits_without_losing_a_page() {
        let run = PageRun { block: BlockIndex(1), first: PageIndex(10), pages: 5 };
        let (head, rest) = run.split_at(2);
        assert_eq!((head.first, head.pages), (PageIndex(10), 2));
        assert_eq!(rest, Some(PageRun { first: PageIndex(12), pages: 3, ..run }));
        assert_eq!(run.split_at(5), (run, None));
    }
}
