//! Counts the faults of a thread on memory that the kernel had not mapped yet.

use std::io;
use std::mem::MaybeUninit;

/// Page faults of the calling thread since it began, those that needed no I/O (`ru_minflt`, getrusage(2)).
/// Pages mapped by [`populate`](super::populate) count too.
///
/// # Errors
/// The kernel's error: the call itself is forbidden.
pub(crate) fn thread_page_faults() -> io::Result<u64> {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel fills the structure it is given room for.
    if unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: filled, and every bit pattern is a value: it was zeroed before.
    Ok(u64::try_from(unsafe { usage.assume_init() }.ru_minflt).unwrap_or(0))
}

/// Number of faults between two checks from which on it pays to populate the next pages ahead.
const WORTH: u64 = 16;

/// Number of checks for which memory is still assumed to be unmapped, after it had faults and was then written by other
/// means.
const TRUSTED: u32 = 64;

/// Detects whether writes to memory fault: then populating a run of it at once, or writing it through its file, costs
/// less. Memory that is already mapped has no faults, and the check only reads the kernel's fault counter.
#[derive(Debug, Default)]
pub(crate) struct MinorFaultMonitor {
    faults: Option<u64>,
    trusted: u32,
}

impl MinorFaultMonitor {
    /// True if the calling thread has had many faults since the last check. The first check returns false, and so does
    /// one where the kernel does not report the count: every page is then mapped by its fault.
    pub(crate) fn has_many_faults(&mut self) -> bool {
        if self.trusted > 0 {
            self.trusted -= 1;
            if self.trusted == 0 {
                self.faults = thread_page_faults().ok();
            }
            return self.trusted > 0;
        }
        let faults = thread_page_faults().ok();
        let many = self.faults.zip(faults).is_some_and(|(before, now)| now.saturating_sub(before) >= WORTH);
        self.faults = faults;
        many
    }

    /// Memory that a check found unmapped was written through its file, which never faults. The next checks return true
    /// as well; then one returns false, so that a write through the mapping shows whether it still faults.
    pub(crate) fn by_file(&mut self) {
        if self.trusted == 0 {
            self.trusted = TRUSTED;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::{Mapping, populate};

    #[test]
    fn touched_and_populated_pages_count_and_mapped_ones_do_not() {
        const PAGES: u64 = 64;
        for touch in [true, false] {
            let mapping = Mapping::memfd("faults", PAGES * 4096).unwrap();
            let span = mapping.region().span(0, PAGES * 4096).unwrap();
            let before = thread_page_faults().unwrap();
            if touch {
                span.fill_zero()
            } else {
                populate(span).unwrap()
            }
            let first = thread_page_faults().unwrap();
            assert!(first - before >= PAGES, "{} faults, touched: {touch}", first - before);
            span.fill_zero();
            populate(span).unwrap();
            let again = thread_page_faults().unwrap() - first;
            assert!(again < PAGES / 2, "{again} faults in memory that is mapped");
        }
    }

    #[test]
    fn memory_written_by_its_file_is_tried_through_the_mapping_now_and_then() {
        const LEN: u64 = 64 * 4096;
        let mapping = Mapping::memfd("faults", LEN).unwrap();
        let mut watch = MinorFaultMonitor::default();
        assert!(!watch.has_many_faults());
        mapping.region().span(0, LEN).unwrap().fill_zero();
        let looks: Vec<bool> = (0..TRUSTED + 1)
            .map(|_| {
                let unmapped = watch.has_many_faults();
                if unmapped {
                    watch.by_file();
                }
                unmapped
            })
            .collect();
        assert_eq!(looks.iter().filter(|unmapped| **unmapped).count() as u32, TRUSTED);
        assert_eq!(looks.last(), Some(&false), "time to try");
        assert!(!watch.has_many_faults(), "and no fault was met");
    }
}
