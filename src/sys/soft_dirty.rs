//! The soft-dirty bits of this process: set by the first write after they were cleared.
//!
//! # Source
//! The kernel's admin-guide/mm/soft-dirty and pagemap: bit 55 of a page's entry in /proc/self/pagemap;
//! writing 4 to /proc/self/clear_refs clears the bits of the whole process.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

const SOFT_DIRTY: u64 = 1 << 55;
/// Pages per read: 64 KiB of entries, 32 MiB of memory.
const ENTRIES: usize = 8192;

/// The bits of this process.
#[derive(Debug)]
pub(crate) struct SoftDirtyBits {
    pagemap: File,
    clear_refs: File,
    page: usize,
}

impl SoftDirtyBits {
    /// Opens the two files.
    ///
    /// # Errors
    /// ENOENT or EACCES if /proc is hidden or read-only.
    pub(crate) fn open() -> io::Result<Self> {
        let clear_refs = OpenOptions::new().write(true).open("/proc/self/clear_refs")?;
        Ok(Self { pagemap: File::open("/proc/self/pagemap")?, clear_refs, page: rustix::param::page_size() })
    }

    /// Clears the bits of every page of the process. A write between a [`read`](Self::read) and this call is lost: no
    /// thread may write meanwhile.
    ///
    /// # Errors
    /// EINVAL if the kernel does not know the number.
    pub(crate) fn clear_all(&self) -> io::Result<()> {
        (&self.clear_refs).write_all(b"4")
    }

    /// Calls `each` with every page of `range` (whole pages) whose bit is set; adjacent pages come in one call.
    ///
    /// # Errors
    /// The error of the read.
    pub(crate) fn read(&self, range: Range<usize>, mut each: impl FnMut(Range<usize>)) -> io::Result<()> {
        let mut entries = vec![0; 8 * ENTRIES.min(range.len() / self.page)];
        let mut at = range.start;
        let mut dirty = at..at;
        while at < range.end {
            let pages = ENTRIES.min((range.end - at).div_ceil(self.page));
            let Some(part) = entries.get_mut(..8 * pages) else { break };
            self.pagemap.read_exact_at(part, (at / self.page * 8) as u64)?;
            for entry in part.as_chunks::<8>().0 {
                if u64::from_ne_bytes(*entry) & SOFT_DIRTY != 0 {
                    if dirty.end != at {
                        if !dirty.is_empty() {
                            each(dirty);
                        }
                        dirty = at..at;
                    }
                    dirty.end = at + self.page;
                }
                at += self.page;
            }
        }
        if !dirty.is_empty() {
            each(dirty);
        }
        Ok(())
    }
}
