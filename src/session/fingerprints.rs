//! The use of fingerprints at either end: guest memory is compared with them.
//!
//! A fingerprint of a source is made after the page's dirty bit is cleared, before, while or after the page is sent. If the
//! guest writes to the page from the clearing on, the page is dirty again, is sent again, and has another one. So only the
//! last one of a page counts, and no write lies between it and the bytes that were sent last: however late those were read
//! (order 1).

use std::sync::Arc;

use crate::guest::{GuestError, GuestMemory, span_of};
use crate::ram::{BlockName, Fingerprints, Landing, PageRun, PageSet, RamBlockTable};
use crate::session::Error;
use crate::session::digest::ranges;
use crate::session::workers::Spawner;
use crate::stream::native::{Finding, Range};
use crate::units::{BlockIndex, BlockOffset, PageIndex, PageSize};

/// The result of the source's memory check, made after the guest ran at the destination: whether memory, which no
/// longer changes, holds what was last sent of it. Pages that were left out are not compared.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryCheck {
    /// It does: no write was lost by a dirty source.
    Equal {
        /// Pages that were compared.
        pages: u64,
    },
    /// It does not: the guest runs at the destination without the last write there.
    Differs {
        /// The first block that differs.
        block: BlockName,
        /// Start of its first range that differs.
        from: BlockOffset,
        /// End of that range.
        to: u64,
        /// All pages that differ.
        pages: u64,
    },
    /// It was not compared, or the result is not known.
    NotMade {
        /// Why.
        why: String,
    },
}

impl std::fmt::Display for MemoryCheck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Equal { pages } => write!(f, "the source's memory is what was sent of it ({pages} pages)"),
            Self::Differs { block, from, to, pages } => write!(
                f,
                "the source's memory is not what was sent of it: RAM block {block} between {from} and {to:#x}, {pages} pages \
                 in all; a dirty source has lost a write, and the guest runs at the destination without it"
            ),
            Self::NotMade { why } => {
                write!(f, "the source's memory was not compared with what was sent of it: {why}")
            }
        }
    }
}

impl MemoryCheck {
    /// The result in terms of `table`, which is in the order of the stream's list.
    pub(crate) fn of(finding: Finding, table: &RamBlockTable, announced: &[BlockName]) -> Self {
        match finding {
            Finding::Equal { pages } => Self::Equal { pages },
            Finding::Differs { block, range, pages } => {
                let bytes = |pages: u64| pages.saturating_mul(table.page().bytes());
                match usize::try_from(block).ok().and_then(|block| announced.get(block)) {
                    Some(name) => Self::Differs {
                        block: name.clone(),
                        from: BlockOffset(bytes(range.first)),
                        to: bytes(range.first.saturating_add(range.pages)),
                        pages,
                    },
                    None => Self::NotMade { why: "the source names a block that it did not announce".into() },
                }
            }
            Finding::NotMade => Self::NotMade { why: "the source could not".into() },
        }
    }
}

/// Pages that are read together where many are compared: few system calls, and they stay in a core's cache.
const READ_TOGETHER: u64 = 64;

/// The fingerprint of what a page holds now. `window` holds its bytes afterwards.
pub(super) fn of_memory(
    guest: &dyn GuestMemory,
    prints: &Fingerprints,
    (block, page): (BlockIndex, PageIndex),
    window: &mut Vec<u8>,
) -> Result<u64, GuestError> {
    read_pages(guest, PageRun { block, first: page, pages: 1 }, window)?;
    Ok(prints.of(window))
}

/// Copies what the pages hold now to `window`.
fn read_pages(guest: &dyn GuestMemory, run: PageRun, window: &mut Vec<u8>) -> Result<(), GuestError> {
    let landing = guest.table().admit_run(run)?;
    window.resize((run.pages * guest.table().page().bytes()) as usize, 0);
    let region = guest.region(run.block);
    // Reading by the file maps nothing.
    if !region.as_ref().is_some_and(|region| region.read_sparse(landing.offset().0, window)) {
        span_of(guest, landing)?.copy_to(window);
    }
    Ok(())
}

/// Pages of a range that were compared, those that differ, and the first run of these.
#[derive(Clone, Copy, Default)]
struct Part {
    compared: u64,
    differ: u64,
    first: Option<PageRun>,
}

impl Part {
    /// `bytes` is what the pages of `run` hold.
    fn compare(&mut self, prints: &Fingerprints, run: PageRun, bytes: &[u8], page_size: PageSize) {
        self.compared += run.pages;
        for (page, bytes) in (run.first.0..).zip(bytes.chunks_exact(page_size.bytes() as usize)) {
            let page = PageIndex(page);
            if prints.get(run.block, page) != Some(prints.of(bytes)) {
                self.differs(run.block, page);
            }
        }
    }

    fn differs(&mut self, block: BlockIndex, page: PageIndex) {
        self.differ += 1;
        match &mut self.first {
            None => self.first = Some(PageRun { block, first: page, pages: 1 }),
            Some(first) if first.end() == page => first.pages += 1,
            Some(_) => {}
        }
    }
}

/// Compares all of `guest`, which is paused, with `prints`, except the pages in `unsent`. `whole`: every page was sent,
/// so that one without a fingerprint differs, too. `still_at_it` is called about once a second.
///
/// # Errors
/// [`Error::Guest`], [`Error::Thread`] and what `still_at_it` answers.
pub(super) fn compare_memory(
    guest: &Arc<dyn GuestMemory>,
    prints: &Arc<Fingerprints>,
    (unsent, whole): (PageSet, bool),
    spawner: &Spawner,
    still_at_it: impl FnMut() -> Result<(), Error>,
) -> Result<Finding, Error> {
    let ranges = ranges(guest.table());
    let (memory, prints, work) = (Arc::clone(guest), Arc::clone(prints), ranges.clone());
    let compare = move |item: usize| compare_range(&*memory, &prints, work[item], (&unsent, whole));
    let parts = spawner.map_watched("ramwire-digest", ranges.len(), compare, still_at_it)?;
    let (mut compared, mut differ, mut first) = (0, 0, None);
    for part in parts {
        let part = part?;
        compared += part.compared;
        differ += part.differ;
        first = first.or(part.first);
    }
    Ok(match first {
        None => Finding::Equal { pages: compared },
        Some(PageRun { block, first, pages }) => {
            Finding::Differs { block: block.0, range: Range { first: first.0, pages }, pages: differ }
        }
    })
}

fn compare_range(
    guest: &dyn GuestMemory,
    prints: &Fingerprints,
    landing: Landing,
    (unsent, whole): (&PageSet, bool),
) -> Result<Part, GuestError> {
    let page_size = guest.table().page();
    let run = landing.run(page_size);
    let (mut part, mut window) = (Part::default(), Vec::new());
    // A page that was not sent may be unplugged memory, which must not be read.
    let is_due = |page: u64| {
        let page = PageIndex(page);
        !unsent.contains(run.block, page) && (whole || prints.get(run.block, page).is_some())
    };
    let (mut next, end) = (run.first.0, run.end().0);
    while next < end {
        let pages = (next..end.min(next + READ_TOGETHER)).take_while(|page| is_due(*page)).count() as u64;
        if pages > 0 {
            let run = PageRun { block: run.block, first: PageIndex(next), pages };
            read_pages(guest, run, &mut window)?;
            part.compare(prints, run, &window, page_size);
        }
        next += pages.max(1);
    }
    Ok(part)
}
