//! Fills the memory and checks it, on all cores.

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::Ordering;

use super::page::{Content, Stamp, read, write};
use super::plan::{Expected, LastWrites};
use super::{MappedGuest, Shared};
use crate::guest::GuestMemory;
use crate::ram::PageRun;
use crate::sys::is_zero;
use crate::units::{BlockIndex, PageIndex};

/// Number of faults kept for the report; further ones are only counted.
const MAX_FAULTS: usize = 64;
/// Pages a thread takes at a time.
const STRETCH: u64 = 4096;

/// A page that does not hold its last write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// Name of the block.
    pub block: String,
    /// Target page inside the block.
    pub page: PageIndex,
    /// What the page must hold.
    pub expected: Content,
    /// What it holds.
    pub found: Content,
}

impl fmt::Display for PageFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { block, page, expected, found } = self;
        write!(f, "RAM block {block} page {:#x}: expected {expected}, found {found}", page.0)?;
        match (expected, found) {
            (Content::Stamped(new), Content::Stamped(old))
                if new.block == old.block && new.page == old.page && old.sequence < new.sequence =>
            {
                f.write_str(" (an older copy)")
            }
            _ => Ok(()),
        }
    }
}

/// Result of a check of the whole memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VerifyReport {
    /// Number of checked pages.
    pub pages: u64,
    /// Right pages that hold zeros.
    pub zero: u64,
    /// Correct pages that hold the fill from before the start.
    pub filled: u64,
    /// Correct pages that hold a writer's last write.
    pub written: u64,
    /// Wrong pages, including those that writers found before they overwrote them.
    pub wrong: u64,
    /// The first 64 wrong pages.
    pub faults: Vec<PageFault>,
}

impl VerifyReport {
    /// True if no page is wrong.
    pub fn is_whole(&self) -> bool {
        self.wrong == 0
    }
}

/// Faults as they are found.
#[derive(Debug, Default)]
pub(super) struct Faults {
    wrong: u64,
    first: Vec<PageFault>,
}

impl Faults {
    /// Compares; `true` if the page is correct.
    pub(super) fn check(
        &mut self,
        memory: &MappedGuest,
        run: PageRun,
        expected: Expected,
        found: Content,
    ) -> bool {
        let expected = match expected {
            Expected::Zero => Content::Zero,
            Expected::Stamped(stamp) => Content::Stamped(stamp),
        };
        if expected == found {
            return true;
        }
        self.wrong += 1;
        if self.first.len() < MAX_FAULTS {
            let block = memory.table().get(run.block).map_or_else(String::new, |b| b.name.to_string());
            self.first.push(PageFault { block, page: run.first, expected, found });
        }
        false
    }

    fn add(&mut self, other: &Self) {
        self.wrong += other.wrong;
        let room = MAX_FAULTS - self.first.len();
        self.first.extend(other.first.iter().take(room).cloned());
    }
}

/// Writes the fill of every migrated page; pages that are to be zero are left alone.
pub(super) fn fill(shared: &Shared) -> io::Result<()> {
    let seed = shared.plan.config.seed;
    side_by_side(shared, |buffer: &mut Vec<u8>, run| {
        if let Expected::Stamped(stamp) = shared.plan.initial(run.block.0, run.first.0)
            && let Some(span) = shared.span(run)
        {
            write(buffer, seed, stamp, u32::MAX);
            span.copy_from(buffer);
        }
    })?;
    Ok(())
}

pub(super) fn verify(shared: &Shared) -> io::Result<VerifyReport> {
    let done: Vec<u64> = shared.done.iter().map(|done| done.load(Ordering::Acquire)).collect();
    let last = shared.plan.last_writes(&done);
    let parts = side_by_side(shared, |check: &mut Check, run| check.page(shared, &last, run))?;
    let mut report = VerifyReport::default();
    let mut faults = Faults::default();
    faults.add(&shared.faults());
    for check in parts {
        report.pages += check.report.pages;
        report.zero += check.report.zero;
        report.filled += check.report.filled;
        report.written += check.report.written;
        faults.add(&check.faults);
    }
    Ok(VerifyReport { wrong: faults.wrong, faults: faults.first, ..report })
}

/// One thread's part of a check.
struct Check {
    buffer: Vec<u8>,
    report: VerifyReport,
    faults: Faults,
}

impl From<Vec<u8>> for Check {
    fn from(buffer: Vec<u8>) -> Self {
        Self { buffer, report: VerifyReport::default(), faults: Faults::default() }
    }
}

impl Check {
    fn page(&mut self, shared: &Shared, last: &LastWrites, run: PageRun) {
        let Some(span) = shared.span(run) else { return };
        let (block, page) = (run.block.0, run.first.0);
        let written = last.get(block, page).map(Expected::Stamped);
        let expected = written.unwrap_or_else(|| shared.plan.initial(block, page));
        let found = if is_zero(span) {
            Content::Zero
        } else {
            span.copy_to(&mut self.buffer);
            read(&self.buffer, shared.plan.config.seed)
        };
        self.report.pages += 1;
        if self.faults.check(&shared.memory, run, expected, found) {
            match found {
                Content::Stamped(Stamp { sequence: 1.., .. }) => self.report.written += 1,
                Content::Stamped(_) => self.report.filled += 1,
                _ => self.report.zero += 1,
            }
        }
    }
}

/// Calls `each` once for every migrated page, on all cores, and returns the results of the threads.
fn side_by_side<T: From<Vec<u8>> + Send>(
    shared: &Shared,
    each: impl Fn(&mut T, PageRun) + Sync,
) -> io::Result<Vec<T>> {
    let table = shared.memory.table();
    let blocks = (0u32..).zip(table.blocks()).filter(|(_, block)| !block.flags.ignored);
    let stretches: Vec<PageRun> = blocks
        .flat_map(|(index, block)| {
            let pages = table.pages_of(block);
            let stretch = move |first| PageRun {
                block: BlockIndex(index),
                first: PageIndex(first),
                pages: STRETCH.min(pages - first),
            };
            (0..pages).step_by(STRETCH as usize).map(stretch)
        })
        .collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let work = || {
        let mut gathered = T::from(vec![0; table.page().bytes() as usize]);
        while let Some(stretch) = stretches.get(next.fetch_add(1, Ordering::Relaxed)) {
            for page in stretch.first.0..stretch.end().0 {
                each(&mut gathered, PageRun { first: PageIndex(page), pages: 1, ..*stretch });
            }
        }
        gathered
    };
    let threads =
        std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(stretches.len().max(1));
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut gathered = vec![work()];
        for other in others {
            gathered.push(other.join().map_err(|_| io::Error::other("a checking thread panicked"))?);
        }
        Ok(gathered)
    })
}
