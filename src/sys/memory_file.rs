//! Shared memory, read and written through its file instead of the mapping.
//!
//! A read through the mapping makes the kernel allocate a page for every page of a hole, with one fault for each. A
//! read(2) of the same memory file does neither, and also reads pages in swap. A write(2) of whole pages allocates the
//! memory without clearing it first and without an entry in the page tables: this costs half of a first store through
//! the mapping.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fstatfs};
use rustix::io::{Errno, pread, pwritev};
use rustix::process::{Resource, getrlimit};

/// `TMPFS_MAGIC` of statfs(2): memfds of base pages, /dev/shm.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// The memory file of a shared mapping, and the offset of the mapping in it.
#[derive(Clone, Debug)]
pub(super) struct MemoryFile {
    fd: Arc<OwnedFd>,
    start: u64,
    /// The offset in the file at which a write must end; 0 if no write is to be tried.
    writable: u64,
}

impl MemoryFile {
    /// `None` for a file of another kind: on a disk, or of huge pages.
    pub(super) fn new(fd: &Arc<OwnedFd>, start: u64) -> Option<Self> {
        let kind = fstatfs(&**fd).ok()?.f_type as u64;
        (kind == TMPFS_MAGIC).then(|| Self { fd: Arc::clone(fd), start, writable: writable(fd) })
    }

    /// Writes `parts`, one after the other, to the mapping's bytes from `offset` on. `false` if the file can't be
    /// written: the caller then writes the bytes through the mapping, some of them possibly for the second time.
    ///
    /// # Errors
    /// The error of pwritev(2), if the mapping would fail as well: no memory, no room in the file system.
    pub(super) fn write(&self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<bool> {
        let len: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let start = self.start.checked_add(offset);
        if start.and_then(|start| start.checked_add(len)).is_none_or(|end| end > self.writable) {
            return Ok(false);
        }
        let mut done = 0;
        while done < len {
            // A write that was cut short continues part by part: the kernel lacks a resource, and a later write returns
            // the error.
            let mut skip = usize::try_from(done).unwrap_or(usize::MAX);
            let mut rest = parts;
            while let Some(first) = rest.first().filter(|first| skip >= first.len()) {
                skip -= first.len();
                rest = &rest[1..];
            }
            let head = [IoSlice::new(rest.first().and_then(|first| first.get(skip..)).unwrap_or_default())];
            let now = if skip > 0 { &head[..] } else { rest };
            match pwritev(&*self.fd, now, self.start + offset + done) {
                Ok(0) => return Ok(false),
                Ok(count) => done += count as u64,
                Err(Errno::INTR) => {}
                Err(errno @ (Errno::NOSPC | Errno::NOMEM | Errno::DQUOT)) => return Err(errno.into()),
                Err(_) => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Fills `out` with the mapping's bytes from `offset` on. `false` if the kernel does not return all of them.
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

/// Bytes of the file that may be written by descriptor. A descriptor in append mode ignores the offset, and a write
/// beyond the process's limit raises SIGXFSZ (setrlimit(2)): neither is tried.
fn writable(fd: &OwnedFd) -> u64 {
    let for_both = |flags: OFlags| flags & OFlags::RWMODE == OFlags::RDWR && !flags.contains(OFlags::APPEND);
    if !fcntl_getfl(fd).is_ok_and(for_both) {
        return 0;
    }
    getrlimit(Resource::Fsize).current.unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::File;
    use std::io::Write;

    use super::*;
    use crate::sys::Mapping;

    #[test]
    fn what_was_never_written_is_read_as_zeros_and_takes_no_memory() {
        const PAGE: u64 = 4096;
        let memfd = rustix::fs::memfd_create("holes", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(memfd);
        file.write_all(&[9; PAGE as usize]).unwrap();
        file.set_len(65 * PAGE).unwrap();
        // The mapping starts one page after the file's first.
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

    /// Bytes written through the file appear in the mapping, no other page is allocated, and a file in append mode or
    /// with a seal is written through the mapping.
    #[test]
    fn pages_written_by_the_file_are_in_the_mapping() {
        const PAGE: u64 = 4096;
        let memfd = |sealing| {
            let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
            let memfd = rustix::fs::memfd_create("writes", flags).unwrap();
            rustix::fs::ftruncate(&memfd, 65 * PAGE).unwrap();
            let mapping = Mapping::file(memfd.try_clone().unwrap(), PAGE, 64 * PAGE).unwrap();
            if sealing {
                rustix::fs::fcntl_add_seals(&memfd, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
            }
            (memfd, mapping)
        };
        let pages: Vec<Vec<u8>> = (1..=3).map(|value| vec![value; PAGE as usize]).collect();
        let parts: Vec<IoSlice<'_>> = pages.iter().map(|page| IoSlice::new(page)).collect();
        let (fd, mapping) = memfd(false);
        let region = mapping.region();
        assert!(region.write_by_file(7 * PAGE, &parts).unwrap());
        let mut out = vec![9; 5 * PAGE as usize];
        region.span(6 * PAGE, 5 * PAGE).unwrap().copy_to(&mut out);
        let firsts: Vec<u8> = out.iter().step_by(PAGE as usize).copied().collect();
        assert_eq!(firsts, [0, 1, 2, 3, 0]);
        assert_eq!(&out[PAGE as usize..4 * PAGE as usize], pages.concat());
        // The copy above has read two holes through the mapping; before it there were three pages.
        assert_eq!(rustix::fs::fstat(&fd).unwrap().st_blocks, 5 * 8);
        assert!(!region.write_by_file(62 * PAGE, &parts).unwrap(), "more than the mapping holds");

        let (_fd, sealed) = memfd(true);
        assert!(!sealed.region().write_by_file(0, &parts).unwrap(), "sealed against new writers");
        let (fd, _) = memfd(false);
        rustix::fs::fcntl_setfl(&fd, OFlags::APPEND).unwrap();
        let appending = Mapping::file(fd.try_clone().unwrap(), 0, 65 * PAGE).unwrap();
        assert!(!appending.region().write_by_file(0, &parts).unwrap());
        assert_eq!(rustix::fs::fstat(&fd).unwrap().st_size as u64, 65 * PAGE);
        assert!(!Mapping::anonymous(PAGE).unwrap().region().write_by_file(0, &parts[..1]).unwrap());
    }
}
