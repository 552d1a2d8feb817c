//! Huge pages for a test.

use std::{fs, io::Write, path::PathBuf};

use super::skip;

/// Huge pages that a test has reserved and frees at its end. Only one test at a time has them, over all processes.
pub(crate) struct HugePages {
    pool: PathBuf,
    before: String,
    _alone: fs::File,
}

impl HugePages {
    /// Makes the kernel reserve `pages` of `kib` each. `None`, with a message, without root, or if memory is too
    /// fragmented.
    pub(crate) fn reserve(kib: u64, pages: u64) -> Option<Self> {
        let pool = PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages"));
        let alone = fs::File::open(&pool).ok()?;
        rustix::fs::flock(&alone, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let before = fs::read_to_string(&pool).unwrap().trim().to_owned();
        // ci/test reserves those of 1 GiB before memory is fragmented.
        let free = fs::read_to_string(pool.with_file_name("free_hugepages")).unwrap();
        let more = pages.saturating_sub(free.trim().parse().unwrap());
        let wanted = before.parse::<u64>().unwrap() + more;
        let pool_name = pool.display().to_string();
        let reserved = Self { pool, before, _alone: alone };
        // Compacts memory, as far as the machine can.
        let _ = fs::write("/proc/sys/vm/compact_memory", "1");
        if let Err(error) = fs::write(&reserved.pool, wanted.to_string()) {
            skip(&format!("pages of {kib} KiB ({error}); as root: echo {wanted} > {pool_name}"));
            return None;
        }
        let now = fs::read_to_string(&reserved.pool).unwrap();
        if now.trim() != wanted.to_string() {
            // Not a missing privilege: a test can't change it, on CI neither.
            let lacks = format!("{pages} free stretches of {kib} KiB in this machine's memory");
            let _ = writeln!(std::io::stderr(), "SKIPPED: huge pages of {kib} KiB: {lacks}");
            return None;
        }
        Some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        fs::write(&self.pool, &self.before).unwrap();
    }
}
