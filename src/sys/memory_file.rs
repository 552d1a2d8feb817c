//! Reading shared memory without taking memory for what was never written.
//!
//! A read through the mapping makes the kernel allocate a page for every page of a hole, and fault once for each. A
//! read(2) of the same memory file does neither, and sees what is in swap.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::fstatfs;
use rustix::io::{Errno, pread};

/// `TMPFS_MAGIC` of statfs(2): memfds of base pages, /dev/shm.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// The memory file behind a shared mapping, and where the mapping starts in it.
#[derive(Clone, Debug)]
pub(super) struct MemoryFile {
    fd: Arc<OwnedFd>,
    start: u64,
}

impl MemoryFile {
    /// `None` for a file of another kind: on a disk, or of huge pages.
    pub(super) fn new(fd: &Arc<OwnedFd>, start: u64) -> Option<Self> {
        let kind = fstatfs(&**fd).ok()?.f_type as u64;
        (kind == TMPFS_MAGIC).then(|| Self { fd: Arc::clone(fd), start })
    }

    /// Fills `out` with the mapping's bytes from `offset` on. `false` if the kernel does not give all of them.
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) -> bool {
        let mut at = 0;
        while at < out.len() {
            let from = self.start.saturating_add(offset).saturating_add(at as u64);
            match pread(&*self.fd, &mut out[at..], from) {
                Ok(0) => return false,
                Ok(got) => at += got,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::File;
    use std::io::Write;

    use crate::sys::Mapping;

    #[test]
    fn what_was_never_written_is_read_as_zeros_and_takes_no_memory() {
        const PAGE: u64 = 4096;
        let memfd = rustix::fs::memfd_create("holes", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(memfd);
        file.write_all(&[9; PAGE as usize]).unwrap();
        file.set_len(65 * PAGE).unwrap();
        // The mapping starts a page behind the file's first.
        let mapping = Mapping::file(file.into(), PAGE, 64 * PAGE).unwrap();
        let region = mapping.region();
        let blocks = || rustix::fs::fstat(mapping.backing().unwrap().0).unwrap().st_blocks;
        region.span(3 * PAGE + 7, 1).unwrap().copy_from(b"x");
        let mut out = vec![1; 64 * PAGE as usize];
        assert!(region.read_sparse(0, &mut out));
        assert_eq!(out.iter().position(|byte| *byte != 0), Some(3 * PAGE as usize + 7));
        assert_eq!(out.iter().filter(|byte| **byte != 0).count(), 1);
        assert_eq!(blocks(), 2 * 8);
        assert!(!region.read_sparse(PAGE, &mut out), "more than the mapping holds");
        assert!(!Mapping::anonymous(PAGE).unwrap().region().read_sparse(0, &mut out[..1]), "no file");
    }
}
