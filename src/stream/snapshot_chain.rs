//! A snapshot and those that it needs: which file is the next base, and from which file a page is read.
//!
//! A file with a base holds the pages that have changed since; all others are as the base has them. So a page is read from
//! the newest file that has it, and one that no file has is zero. Nothing here opens a file.

use std::ops::Range;

use super::snapshot_note::{BaseNote, SnapshotNote};
use crate::ram::PageBitmap;
use crate::units::PageIndex;

/// Maximum number of files of a chain.
pub const MAX_SNAPSHOTS: usize = 64;

/// Why a file is not the next of a chain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// It is another snapshot.
    #[error("snapshot {wanted} is needed, and this is {found}")]
    Other {
        /// The id of the one that is needed.
        wanted: String,
        /// The id of this one, or "none".
        found: String,
    },
    /// Bases of bases without end.
    #[error("more than {MAX_SNAPSHOTS} snapshots need each other")]
    Long,
}

/// The files of a chain as far as they are known, the requested one first.
#[derive(Clone, Debug)]
pub struct SnapshotChain {
    /// Pages that are read from each file, block by block: no newer file has them.
    own: Vec<Vec<PageBitmap>>,
    /// Pages that any of them has.
    present: Vec<PageBitmap>,
    base: Option<BaseNote>,
    #[cfg(test)]
    breakage: ChainBreakage,
}

/// Rules that a test leaves out.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum ChainBreakage {
    #[default]
    None,
    /// Whatever lies under the name of a base is taken for it.
    TakeAnyBase,
    /// A page is read from the oldest file that has it.
    ReadOldest,
}

impl SnapshotChain {
    /// The requested snapshot: its note, and the pages that its file has, block by block.
    pub fn new(note: Option<&SnapshotNote>, present: Vec<PageBitmap>) -> Self {
        Self {
            own: vec![present.clone()],
            present,
            base: note.and_then(|note| note.base.clone()),
            #[cfg(test)]
            breakage: ChainBreakage::None,
        }
    }

    #[cfg(test)]
    pub(crate) fn break_rule(&mut self, breakage: ChainBreakage) {
        self.breakage = breakage;
    }

    /// The base that is missing; `None` once the chain is complete.
    ///
    /// # Errors
    /// [`ChainError::Long`].
    pub fn next_base(&self) -> Result<Option<&BaseNote>, ChainError> {
        match &self.base {
            Some(_) if self.own.len() >= MAX_SNAPSHOTS => Err(ChainError::Long),
            base => Ok(base.as_ref()),
        }
    }

    /// Adds the file that lies under the name of the [next base](Self::next_base), whose blocks are the same.
    ///
    /// # Errors
    /// [`ChainError::Other`]: it is not that base, and was not added.
    pub fn add(&mut self, note: Option<&SnapshotNote>, pages: &[PageBitmap]) -> Result<(), ChainError> {
        let found = note.map(|note| note.id);
        let wanted = self.base.as_ref().map(|base| base.id);
        #[cfg(test)]
        let found = if self.breakage == ChainBreakage::TakeAnyBase { wanted } else { found };
        if found != wanted {
            let named = |id: Option<_>| id.map_or_else(|| "none".to_owned(), |id| format!("{id}"));
            return Err(ChainError::Other { wanted: named(wanted), found: named(found) });
        }
        let only = |(above, base): (&mut PageBitmap, &PageBitmap)| {
            let words: Vec<u64> =
                base.words().iter().zip(above.words()).map(|(base, above)| base & !above).collect();
            let mut own = PageBitmap::new(base.len());
            own.merge_words(0, &words);
            above.merge_words(0, &words);
            own
        };
        let own = self.present.iter_mut().zip(pages).map(only).collect();
        #[cfg(test)]
        let own = self.broken(own, pages);
        self.own.push(own);
        self.base = note.and_then(|note| note.base.clone());
        Ok(())
    }

    /// All pages of a base are read from it.
    #[cfg(test)]
    fn broken(&mut self, own: Vec<PageBitmap>, pages: &[PageBitmap]) -> Vec<PageBitmap> {
        if self.breakage != ChainBreakage::ReadOldest {
            return own;
        }
        for (newer, base) in self.own.iter_mut().flat_map(|layer| layer.iter_mut().zip(pages)) {
            let mut from = PageIndex(0);
            while let Some(run) = base.next_run(from, u64::MAX) {
                newer.clear_range(run.clone());
                from = PageIndex(run.end);
            }
        }
        pages.to_vec()
    }

    /// Pages that a file of the chain has, block by block; of a block that was left out, none.
    pub fn present(&self) -> &[PageBitmap] {
        &self.present
    }

    /// Pages of a block that are read from the file with this number.
    pub fn own(&self, file: usize, block: usize) -> Option<&PageBitmap> {
        self.own.get(file)?.get(block)
    }

    /// The next pages of a block from `from` on that one file has, at most `most`, and the number of that file. All pages
    /// between are zero.
    pub fn next_run(&self, block: usize, from: u64, most: u64) -> Option<(usize, Range<u64>)> {
        let run_of = |(file, own): (usize, &Vec<PageBitmap>)| {
            Some((file, own.get(block)?.next_run(PageIndex(from), most)?))
        };
        self.own.iter().enumerate().filter_map(run_of).min_by_key(|(_, run)| run.start)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::stream::snapshot_note::SnapshotId;

    /// From the first page up to the last, without that.
    fn pages(runs: &[(u64, u64)]) -> Vec<PageBitmap> {
        let mut map = PageBitmap::new(20);
        runs.iter().for_each(|(first, end)| _ = map.set_range(*first..*end));
        vec![map]
    }

    fn note(id: u8, base: Option<u8>) -> SnapshotNote {
        let base = base.map(|id| BaseNote { id: SnapshotId([id; 16]), path: format!("{id}"), starts_at: 0 });
        SnapshotNote { id: SnapshotId([id; 16]), base }
    }

    #[test]
    fn a_page_is_read_from_the_newest_file_that_has_it() {
        let mut chain = SnapshotChain::new(Some(&note(3, Some(2))), pages(&[(4, 6)]));
        assert_eq!(chain.next_base().unwrap().unwrap().path, "2");
        chain.add(Some(&note(2, Some(1))), &pages(&[(5, 8)])).unwrap();
        chain.add(Some(&note(1, None)), &pages(&[(0, 2), (7, 10)])).unwrap();
        assert_eq!(chain.next_base(), Ok(None));
        let mut found = Vec::new();
        let mut at = 0;
        while let Some((file, run)) = chain.next_run(0, at, 100) {
            at = run.end;
            found.push((file, run));
        }
        assert_eq!(found, [(2, 0..2), (0, 4..6), (1, 6..8), (2, 8..10)]);
        assert_eq!((chain.present()[0].count(), chain.own(2, 0).unwrap().count()), (8, 4));
        assert_eq!((chain.next_run(0, 0, 1), chain.next_run(1, 0, 1)), (Some((2, 0..1)), None));
    }

    #[test]
    fn another_snapshot_and_a_chain_without_end_are_refused() {
        let mut chain = SnapshotChain::new(Some(&note(3, Some(2))), pages(&[(0, 1)]));
        for other in [Some(note(3, None)), None] {
            let error = chain.add(other.as_ref(), &pages(&[(3, 9)])).unwrap_err();
            assert!(matches!(error, ChainError::Other { .. }) && chain.present()[0].count() == 1, "{error}");
        }
        let mut chain = SnapshotChain::new(Some(&note(1, Some(1))), pages(&[]));
        for _ in 1..MAX_SNAPSHOTS {
            assert!(chain.next_base().unwrap().is_some());
            chain.add(Some(&note(1, Some(1))), &pages(&[])).unwrap();
        }
        assert_eq!(chain.next_base(), Err(ChainError::Long));
    }
}
