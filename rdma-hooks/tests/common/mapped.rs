//! Mapped memory, as a VMM has it: anonymous, or of files in a folder.

#![allow(unsafe_code, clippy::unwrap_used)]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::OnceLock;

use rdma_hooks::{PinnedSpan, RegionMemory};

use super::{PAGE, TestMemory};

static ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];

/// Where all memory of this process lies in files, once it is set.
pub static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// A mapping.
pub struct Mapped {
    start: NonNull<u8>,
    len: u64,
}

// SAFETY: the mapping is owned; all access goes through volatile copies that expect others to write.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn at(&self, offset: u64, len: u64) -> *mut u8 {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: in bounds, as asserted.
        unsafe { self.start.as_ptr().add(offset as usize) }
    }
}

impl RegionMemory for Mapped {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
        let from = self.at(offset, into.len() as u64);
        // SAFETY: in bounds; a copy may mix old and new bytes of a concurrent writer, which tests avoid.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    fn write(&self, offset: u64, from: &[u8]) {
        let to = self.at(offset, from.len() as u64);
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    fn zero(&self, offset: u64, len: u64) {
        let to = self.at(offset, len);
        if !self.is_zero(offset, len) {
            // SAFETY: as above.
            unsafe { std::ptr::write_bytes(to, 0, len as usize) }
        }
    }

    fn is_zero(&self, offset: u64, len: u64) -> bool {
        let mut page = [0; PAGE as usize];
        (offset..offset + len).step_by(PAGE as usize).all(|at| {
            let part = &mut page[..(offset + len - at).min(PAGE) as usize];
            self.read(at, part);
            *part == ZEROS[..part.len()]
        })
    }

    fn pinned(&self) -> Option<PinnedSpan> {
        // SAFETY: mapped until `Drop`, never remapped or discarded, no references into it.
        Some(unsafe { PinnedSpan::new(self.start, self.len) })
    }
}

impl TestMemory for Mapped {
    fn zeros(len: u64) -> Self {
        let file = FOLDER.get().map(|folder| {
            let file = File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).open(folder);
            let mut file = file.unwrap();
            file.write_all(&vec![0; len as usize]).unwrap();
            file
        });
        let kind = if file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
        let (access, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_ref().map_or(-1, AsRawFd::as_raw_fd));
        // SAFETY: a fresh mapping; nothing else is touched.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len as usize, access, kind, fd, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start: NonNull::new(start.cast()).unwrap(), len }
    }

    fn difference(&self, other: &Self) -> Option<u64> {
        let (mut ours, mut theirs) = ([0; PAGE as usize], [0; PAGE as usize]);
        (0..self.len).step_by(PAGE as usize).find(|&at| {
            self.read(at, &mut ours);
            other.read(at, &mut theirs);
            ours != theirs
        })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by us, unmapped once; registrations keep this value alive.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len as usize) };
    }
}
